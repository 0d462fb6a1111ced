"""What the Hopper kernels support: GPUs, head_dims and dtypes, and the backend that follows from it."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from .checks import shown
from .config import AttentionConfig, as_config

BACKENDS = ("auto", "sm90", "reference")
HEAD_DIMS = (64, 128)
DTYPES = {torch.bfloat16: "bfloat16", torch.float16: "float16"}  # to the names that the compiled module uses
CAPABILITY = (9, 0)

_NEED = f"needs a Hopper GPU (compute capability {CAPABILITY[0]}.{CAPABILITY[1]})"


@cache
def _capability(device: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@torch.compiler.assume_constant_result
def hopper_obstacle(device: int | None = None) -> str | None:
    """The reason why the Hopper kernels cannot run on a CUDA device; None if they can.

    Args:
        device: index of the device; None: the current one.

    Returns the predicate of a sentence, "needs a Hopper GPU ...", to which the caller adds a subject.
    """
    # torch for ROCm calls AMD's GPUs "cuda" and gives an MI200 capability (9, 0).
    if torch.version.hip is not None:
        return f"{_NEED}, this torch is built for AMD GPUs (ROCm {torch.version.hip})"
    if not torch.cuda.is_initialized() and not torch.cuda.is_available():  # is_available takes longer
        return f"{_NEED}, torch finds no GPU"
    capability = _capability(torch.cuda.current_device() if device is None else device)
    if capability == CAPABILITY:
        return None
    return f"{_NEED}, {torch.cuda.get_device_name(device)} has {capability[0]}.{capability[1]}"


def backend_for(q: Tensor, config: AttentionConfig, backend: str = "auto") -> tuple[str, str]:
    """The backend that `attention` would take for q and config, and the reason.

    Returns (name, reason). name is one of
        "sm90": this package's Hopper kernels;
        "torch": torch's CUDA kernels, for quant="none": SDPA when dense, else FlexAttention under the config's window;
        "reference": plain torch on any device.
    Raises ValueError for an unknown backend, RuntimeError if backend="sm90" cannot run.
    """
    check_backend(backend)
    config = as_config(config)
    if backend == "reference":
        return "reference", "it was asked for"
    if config.quant == "fp8":
        obstacle = _sm90_obstacle(q)
        if obstacle is None:
            return "sm90", "FP8 on a Hopper GPU"
    else:
        if q.is_cuda:
            return "torch", 'quant="none" runs on torch\'s own kernels'
        obstacle = f'q: quant="none" runs on torch\'s CUDA kernels, q is on {q.device}'
    if backend == "sm90":
        raise RuntimeError(f'backend="sm90" cannot run: {obstacle}')
    return "reference", obstacle


def check_backend(backend: str) -> None:
    """Raises ValueError for an unknown backend."""
    if not isinstance(backend, str) or backend not in BACKENDS:
        raise ValueError(f"backend: {shown(backend)} must be one of {BACKENDS}")


def _sm90_obstacle(q: Tensor) -> str | None:
    """The reason why the Hopper kernels cannot take q; None if they can."""
    if not q.is_cuda:
        return f"q: must be on a CUDA device, got {q.device}"
    obstacle = hopper_obstacle(q.device.index)
    if obstacle is not None:
        return f"q: {obstacle}"
    return kernel_obstacle(q.dtype, q.shape[-1])


def kernel_obstacle(dtype: torch.dtype, head_dim: int) -> str | None:
    """The reason why no Hopper kernel takes this dtype or head_dim; None if one does."""
    if dtype not in DTYPES:
        return f"q: dtype must be {' or '.join(DTYPES.values())}, got {dtype}"
    if head_dim not in HEAD_DIMS:
        return f"q: head_dim must be one of {HEAD_DIMS}, got {head_dim}"
    return None
