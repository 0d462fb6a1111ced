"""The reference as an op of torch: one node for what traces calls, and shapes for tensors without values.

`fpsattention.reference` calls it there, and computes at once everywhere else. It is differentiable once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import reference
from .checks import to_heads_first
from .config import AttentionConfig
from .geometry import apart
from .key_tiles import key_tiles_of


def _attention(
    q, k, v, prefix_valid, suffix_valid, key_indices, key_counts, grid, lengths, config, scale, tensor_layout, kind,
    dtype
) -> tuple[Tensor, Tensor]:  # fmt: skip
    function = reference.exact_attention if kind == "exact" else reference.emulated_attention
    return function(
        q,
        k,
        v,
        grid=tuple(grid),
        config=AttentionConfig.from_spec(config),
        scale=scale,
        tensor_layout=tensor_layout,
        dtype=dtype,
        prefix_len=lengths[0],
        suffix_len=lengths[1],
        prefix_valid=prefix_valid,
        suffix_valid=suffix_valid,
        key_tiles=key_tiles_of(key_indices, key_counts),
    )


@torch.library.custom_op("fpsattention::reference", mutates_args=())
def attention(
    q: Tensor, k: Tensor, v: Tensor, prefix_valid: Tensor | None, suffix_valid: Tensor | None,
    key_indices: Tensor | None, key_counts: Tensor | None, grid: Sequence[int], lengths: Sequence[int],
    config: str, scale: float, tensor_layout: str, kind: str, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out, lse) of `exact_attention` (kind "exact") or `emulated_attention` ("emulated").

    `key_indices` and `key_counts` are those of `KeyTiles`, `lengths` those of the text before and after the video.
    """
    about = grid, lengths, config, scale, tensor_layout, kind, dtype
    return _attention(q, k, v, prefix_valid, suffix_valid, key_indices, key_counts, *about)


@attention.register_fake
def _(
    q, k, v, prefix_valid, suffix_valid, key_indices, key_counts, grid, lengths, config, scale, tensor_layout, kind,
    dtype
):  # fmt: skip
    shape = to_heads_first(q, tensor_layout).shape
    out = to_heads_first(q.new_empty(shape, dtype=dtype or q.dtype), tensor_layout)
    return out, q.new_empty(shape[:3], dtype=dtype or torch.float32)


@torch.library.custom_op("fpsattention::reference_backward", mutates_args=())
def backward(
    dout: Tensor, dlse: Tensor, q: Tensor, k: Tensor, v: Tensor,
    prefix_valid: Tensor | None, suffix_valid: Tensor | None,
    key_indices: Tensor | None, key_counts: Tensor | None, grid: Sequence[int], lengths: Sequence[int],
    config: str, scale: float, tensor_layout: str, kind: str, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dq, dk, dv) of what `attention` returned."""
    tensors = prefix_valid, suffix_valid, key_indices, key_counts
    about = grid, lengths, config, scale, tensor_layout, kind, dtype
    stream = torch.cuda.current_stream(q.device) if q.is_cuda else None

    def gradients():
        with torch.cuda.stream(stream):
            inputs = [x.detach().requires_grad_() for x in (q, k, v)]
            outputs = _attention(inputs[0], inputs[1], inputs[2], *tensors, *about)
            dq, dk, dv = torch.autograd.grad(outputs, inputs, (dout, dlse))
            return dq.contiguous(), dk.contiguous(), dv.contiguous()

    return apart(gradients)  # in an op's implementation autograd is off, in a thread of its own it is not


@backward.register_fake
def _(dout, dlse, q, k, v, *_):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:7])
    ctx.call = inputs[7:]


def _differentiate(ctx, dout, dlse):
    gradients = backward(dout, dlse, *ctx.saved_tensors, *ctx.call)
    return *gradients, *(None for _ in range(4)), *(None for _ in ctx.call)


attention.register_autograd(_differentiate, setup_context=_save)
