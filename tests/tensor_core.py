"""The kernels' scores, put into the emulation: it then stands in for a kernel, forward and backward."""

from __future__ import annotations

import math
from contextlib import contextmanager

import pytest
import torch

from fpsattention import reference


@contextmanager
def tensor_core():
    """Inside, the emulation computes z as the kernels do: scores are summed in fp16, 32 channels at a time, and the
    factor from scores to codes is rounded to fp16. A code is rounded once, as in the contract.
    """

    def scores(q8, q_scale, k8, k_scale, scale, padding):
        total = torch.zeros((), dtype=torch.float64, device=q8.device)
        for q_part, k_part in zip(q8.double().split(32, -1), k8.double().split(32, -1), strict=True):
            total = (total + q_part @ k_part.mT).half().double()
        factor = (q_scale * (8 * scale / math.log(2)))[..., None] * k_scale[..., None, :]
        z = (total * factor.clamp(2.0**-24, 60000.0).half() / 8).to(q8.dtype)
        return z if padding is None else z.masked_fill(padding, -math.inf)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "_scores", scores)
        yield
