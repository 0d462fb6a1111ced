"""Attention whose windows are data, so that one graph of `torch.compile` serves all steps and layers.

The ops of the core take windows as integers, which are constants of a graph. Here they are a tensor, an input of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.api import attention
from ..core.checks import as_autocast
from ..core.config import AttentionConfig
from ..schedules.windows import with_windows


def in_windows(config: AttentionConfig, windows: Tensor, layer: Tensor) -> AttentionConfig:
    """`config`, which has no window, with the windows of a layer.

    Args:
        windows: int64 [layers, H, 3] on the CPU, tiles (wt, wh, ww) of each head.
        layer: int64 [] on the CPU, its index.
    """
    return with_windows(config, tuple(map(tuple, windows[layer].tolist())))


def attention_in_windows(
    q: Tensor, k: Tensor, v: Tensor, *, windows: Tensor, layer: Tensor, config: AttentionConfig, **kwargs
) -> Tensor:
    """`attention` with `in_windows(config, windows, layer)`, as a single op for torch.compile. It has no gradient."""
    rounding = config.border, config.quant, list(config.quant_tile or ()), config.smooth_k
    kwargs["grid"] = list(kwargs["grid"])
    q, k, v = as_autocast(q, k, v)  # the op promises a result of their dtype
    return torch.ops.fpsattention.attention_in_windows(
        q, k, v, windows, layer, list(config.tile or ()), *rounding, **kwargs
    )


# Every call reads the windows on the CPU, so no CUDA graph can record it.
@torch.library.custom_op(
    "fpsattention::attention_in_windows", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,)
)
def _op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    windows: Tensor,
    layer: Tensor,
    tile: list[int],
    border: str,
    quant: str,
    quant_tile: list[int],
    smooth_k: bool,
    grid: list[int],
    backend: str,
    prefix_len: int = 0,
    suffix_len: int = 0,
    suffix_valid: Tensor | None = None,
) -> Tensor:
    config = AttentionConfig(tuple(tile) or None, None, border, quant, tuple(quant_tile) or None, smooth_k)
    text = {"prefix_len": prefix_len, "suffix_len": suffix_len, "suffix_valid": suffix_valid}
    out = attention(q, k, v, grid=grid, config=in_windows(config, windows, layer), backend=backend, **text)
    return out.contiguous()


@_op.register_fake
def _(q, k, v, *_, **__):
    return q.new_empty(q.shape)


@_op.register_autograd
def _(ctx, grad):
    raise RuntimeError(
        "a WindowTable has no gradient under torch.compile; leave the transformer as it is, or give a StepSchedule"
    )
