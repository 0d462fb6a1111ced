"""The reference as an op of `torch.library`: one node for what traces calls, and shapes for tensors without values.

`fpsattention.reference` calls it there, and computes at once everywhere else. It is differentiable once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference
from .checks import to_heads_first
from .config import AttentionConfig
from .geometry import apart


def _call(
    kind, grid, tile, quant_tile, windows, truncate, smooth_k, scale, tensor_layout, dtype, prefix_len, suffix_len,
    prefix_valid, suffix_valid
):  # fmt: skip
    """(function of `reference`, its keywords) behind the op's arguments."""
    config = AttentionConfig.from_lists(
        tile, quant_tile, windows, truncate, smooth_k, quant="fp8" if kind == "emulated" else "none"
    )
    keywords = {
        "grid": tuple(grid),
        "config": config,
        "scale": scale,
        "tensor_layout": tensor_layout,
        "dtype": dtype,
    }
    keywords |= {"prefix_len": prefix_len, "suffix_len": suffix_len}
    keywords |= {"prefix_valid": prefix_valid, "suffix_valid": suffix_valid}
    return getattr(reference, f"{kind}_attention"), keywords


def _attention(q: Tensor, k: Tensor, v: Tensor, *arguments) -> tuple[Tensor, Tensor]:
    function, keywords = _call(*arguments)
    return function(q, k, v, **keywords)


def _attention_fake(
    q, k, v, kind, grid, tile, quant_tile, windows, truncate, smooth_k, scale, tensor_layout, dtype, *_
):
    shape = to_heads_first(q, tensor_layout).shape
    out = to_heads_first(q.new_empty(shape, dtype=dtype or q.dtype), tensor_layout)
    return out, q.new_empty(shape[:3], dtype=dtype or torch.float32)


def _backward(dout: Tensor, dlse: Tensor, q: Tensor, k: Tensor, v: Tensor, *arguments) -> tuple[Tensor, ...]:
    function, keywords = _call(*arguments)
    stream = torch.cuda.current_stream(q.device) if q.is_cuda else None

    def gradients():
        with torch.cuda.stream(stream):
            inputs = [x.detach().requires_grad_() for x in (q, k, v)]
            gradients = torch.autograd.grad(function(*inputs, **keywords), inputs, (dout, dlse))
            return tuple(x.contiguous() for x in gradients)

    return apart(gradients)  # in an op's implementation autograd is off, in a thread of its own it is not


def _backward_fake(dout, dlse, q, k, v, *_):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _save(ctx, inputs, output) -> None:
    q, k, v, *ctx.call, prefix_valid, suffix_valid = inputs
    ctx.save_for_backward(q, k, v, prefix_valid, suffix_valid)


def _differentiate(ctx, dout, dlse):
    q, k, v, *counts = ctx.saved_tensors
    gradients = torch.ops.fpsattention.reference_backward(dout, dlse, q, k, v, *ctx.call, *counts)
    return *gradients, *[None] * (len(ctx.call) + len(counts))


_CALL = (
    "Tensor q, Tensor k, Tensor v, str kind, SymInt[] grid, int[] tile, int[] quant_tile, int[] windows, "
    "bool truncate, bool smooth_k, float scale, str tensor_layout, ScalarType? dtype, SymInt prefix_len, "
    "SymInt suffix_len, Tensor? prefix_valid, Tensor? suffix_valid"
)
_library = torch.library.Library("fpsattention", "FRAGMENT")
for _name, _schema, _compute, _fake in (
    ("reference", f"({_CALL}) -> (Tensor, Tensor)", _attention, _attention_fake),
    (
        "reference_backward",
        f"(Tensor dout, Tensor dlse, {_CALL}) -> (Tensor, Tensor, Tensor)",
        _backward,
        _backward_fake,
    ),
):
    _library.define(_name + _schema)
    _library.impl(_name, _compute, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fpsattention::{_name}", _fake)
torch.library.register_autograd("fpsattention::reference", _differentiate, setup_context=_save)
