"""Attention whose windows are data, so that one graph of `torch.compile` serves all steps and layers.

The ops of the core take windows as integers, which are constants of a graph. Here they are a tensor, an input of it.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from ..core.api import attention
from ..core.checks import Triple, as_autocast
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
    q, k, v = as_autocast(q, k, v)  # the op promises a result of their dtype
    tiles = list(config.tile or ()), list(config.quant_tile or ())
    flags = config.border == "truncate", config.quant == "fp8", config.smooth_k
    kwargs["grid"] = list(kwargs["grid"])
    return torch.ops.fpsattention.attention_in_windows(q, k, v, windows, layer, *tiles, *flags, **kwargs)


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
    quant_tile: list[int],
    truncate: bool,
    fp8: bool,
    smooth_k: bool,
    grid: list[int],
    backend: str,
    prefix_len: int = 0,
    suffix_len: int = 0,
    suffix_valid: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    config = AttentionConfig(
        tile=_triple(tile),
        border="truncate" if truncate else "clamp",
        quant="fp8" if fp8 else "none",
        quant_tile=_triple(quant_tile),
        smooth_k=smooth_k,
    )
    out = attention(
        q,
        k,
        v,
        grid=grid,
        config=in_windows(config, windows, layer),
        backend=backend,
        prefix_len=prefix_len,
        suffix_len=suffix_len,
        suffix_valid=suffix_valid,
        scale=scale,
    )
    return cast(Tensor, out).contiguous()


def _triple(values: list[int]) -> Triple | None:
    """None for an empty list: an op takes no optional list."""
    if not values:
        return None
    t, h, w = values
    return t, h, w


@_op.register_fake
def _(q, k, v, *_, **__):
    return q.new_empty(q.shape)


@_op.register_autograd
def _(ctx, grad):
    raise RuntimeError(
        "a WindowTable has no gradient under torch.compile; leave the transformer as it is, or give a StepSchedule"
    )
