"""The ops of the Hopper kernels without a GPU: they return what their fakes do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fpsattention.core import ops


@contextmanager
def on_cpu() -> Iterator[None]:
    """The Hopper ops take CPU tensors and return what their fakes do: tensors of the right shape, without values."""
    with torch.library._scoped_library("fpsattention", "IMPL") as library:
        for op in (ops.quantize, ops.norm_rope_quantize, ops.attend, ops.attention, ops.attention_backward):
            library.impl(op._name, op._abstract_fn, "CPU")
        yield
