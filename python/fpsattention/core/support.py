"""What the Hopper kernels run on: the one place that knows GPUs, head_dims and dtypes."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from .checks import shown
from .config import AttentionConfig, as_config

HEAD_DIMS = (64, 128)
DTYPES = {
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}  # torch's, and the compiled module's name for it
CAPABILITY = (9, 0)

_NEED = "needs a Hopper GPU (compute capability 9.0)"


@cache
def _capability(device: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@torch.compiler.assume_constant_result
def hopper_obstacle(device: int | None = None) -> str | None:
    """Why the Hopper kernels cannot run on a CUDA device, None when they can.

    Args:
        device: index of the device; None: the current one.

    Returns the rest of a sentence whose subject is what needs the GPU.
    """
    if torch.version.hip is not None:  # such a torch calls AMD's GPUs "cuda", and numbers an MI200 (9, 0)
        return f"{_NEED}, this torch is built for AMD GPUs (ROCm {torch.version.hip})"
    if not torch.cuda.is_initialized() and not torch.cuda.is_available():  # the former is asked in no time
        return f"{_NEED}, torch finds no GPU"
    capability = _capability(torch.cuda.current_device() if device is None else device)
    if capability == CAPABILITY:
        return None
    return f"{_NEED}, {torch.cuda.get_device_name(device)} has {capability[0]}.{capability[1]}"


BACKENDS = ("auto", "sm90", "reference")


def backend_for(q: Tensor, config: AttentionConfig, backend: str = "auto") -> tuple[str, str]:
    """What `attention` would run for such a q, and why.

    Returns (name, reason). name: "sm90", this package's Hopper kernels; "torch", which takes quant="none" on a GPU
    (FlexAttention with a BlockMask made from our plan, SDPA when dense); "reference", plain torch on any device.
    Raises ValueError for an unknown backend, RuntimeError when backend="sm90" cannot run.
    """
    check_backend(backend)
    config = as_config(config)
    if backend == "reference":
        return "reference", "it was asked for"
    if config.quant == "none":
        if q.is_cuda:
            return "torch", 'quant="none" runs on torch\'s own kernels'
        obstacle = f'q: quant="none" runs on torch\'s CUDA kernels, q is on {q.device}'
    else:
        obstacle = _sm90_obstacle(q)
        if obstacle is None:
            return "sm90", "FP8 on a Hopper GPU"
    if backend == "sm90":
        raise RuntimeError(f'backend="sm90" cannot run: {obstacle}')
    return "reference", obstacle


def check_backend(backend: str) -> None:
    """Raises ValueError for an unknown backend."""
    if not isinstance(backend, str) or backend not in BACKENDS:
        raise ValueError(f"backend: {shown(backend)} must be one of {BACKENDS}")


def _sm90_obstacle(q: Tensor) -> str | None:
    if not q.is_cuda:
        return f"q: must be on a CUDA device, got {q.device}"
    obstacle = hopper_obstacle(q.device.index)
    if obstacle is not None:
        return f"q: {obstacle}"
    if q.dtype not in DTYPES:
        return f"q: dtype must be bfloat16 or float16, got {q.dtype}"
    if q.shape[-1] not in HEAD_DIMS:
        return f"q: head_dim must be one of {HEAD_DIMS}, got {q.shape[-1]}"
    return None
