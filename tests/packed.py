"""Reads packed operands, for tests: their sections, the packed blocks, and the values that these stand for."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fpsattention import _C
from fpsattention.core.ops import Call
from fpsattention.core.reference import Quantized

META = 128  # bytes of a BlockMeta


class Packed(NamedTuple):
    """Views of the sections, shaped as `fpsattention.core.ops.Sections` says."""

    q_blocks: Tensor
    kv_blocks: Tensor
    lse_shift: Tensor
    k_mean: Tensor


class Blocks(NamedTuple):
    """The packed blocks [B, H, blocks, ...] of include/fpsattention/params.h, in the order of rows.

    Attributes:
        q, k, v: E4M3 as fp32 [..., rows, D].
        q_scale, k_scale, v_scale: fp32 [...].
        q_valid, k_valid: int32 [...], rows that hold a token.
        is_token: E4M3 as fp32 [..., 128], of key blocks.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    q_scale: Tensor
    k_scale: Tensor
    v_scale: Tensor
    q_valid: Tensor
    k_valid: Tensor
    is_token: Tensor


def sections(call: Call, packed: Tensor) -> Packed:
    """Views of the sections of `packed`; lse_shift and k_mean are empty without smooth_k."""
    at, heads = call.sections, (call.batch, call.heads)

    def floats(begin: int, *shape: int) -> Tensor:
        size = 4 * heads[0] * heads[1] * shape[0]
        return packed[begin : begin + size].view(torch.float32).view(*heads, *shape)

    smooth_k = call.resolved.smooth_k
    return Packed(
        packed[at.q_blocks : at.kv_blocks].view(*heads, call.query_blocks, -1),
        packed[at.kv_blocks : at.k_mean].view(*heads, call.key_blocks, -1),
        floats(at.lse_shift, call.resolved.geometry.n_tokens) if smooth_k else packed.new_empty(0),
        floats(at.k_mean, call.head_dim) if smooth_k else packed.new_empty(0),
    )


def blocks(call: Call, packed: Tensor) -> Blocks:
    x, head_dim = sections(call, packed), call.head_dim

    def unswizzle(x: Tensor, row_bytes: int) -> Tensor:
        offset = torch.arange(x.shape[-1], device=x.device)
        offset ^= (offset >> 3) & (0x70 if row_bytes == 128 else 0x30)
        return x[..., offset].view(torch.float8_e4m3fn).float().unflatten(-1, (-1, row_bytes))

    def meta(blocks: Tensor, begin: int, word: int, dtype: torch.dtype) -> Tensor:
        return blocks[..., begin + 4 * word : begin + 4 * word + 4].contiguous().view(dtype)[..., 0]

    q_bytes, k_bytes = _C.QUERY_BLOCK * head_dim, _C.BLOCK * head_dim
    assert x.q_blocks.shape[-1] == q_bytes + META and x.kv_blocks.shape[-1] == 2 * k_bytes + META + _C.BLOCK
    # In each group of 16 tokens, word c holds tokens 2c, 2c+1, 2c+8, 2c+9 (kernels/README.md).
    place = torch.arange(16, device=packed.device)
    token = 2 * (place // 4) + place % 2 + 8 * (place % 4 // 2)
    permuted = unswizzle(x.kv_blocks[..., k_bytes:], 128).unflatten(-1, (-1, 16))  # V^T, meta, is_token
    v_transposed = torch.empty_like(permuted)
    v_transposed[..., token] = permuted
    v_transposed = v_transposed.flatten(-2)
    return Blocks(
        unswizzle(x.q_blocks[..., :q_bytes], head_dim),
        unswizzle(x.kv_blocks[..., :k_bytes], head_dim),
        v_transposed[..., :head_dim, :].mT,
        meta(x.q_blocks, q_bytes, 0, torch.float32),
        meta(x.kv_blocks, 2 * k_bytes, 0, torch.float32),
        meta(x.kv_blocks, 2 * k_bytes, 4, torch.float32),
        meta(x.q_blocks, q_bytes, 1, torch.int32),
        meta(x.kv_blocks, 2 * k_bytes, 1, torch.int32),
        v_transposed[..., head_dim + 1, :],
    )


def decode(call: Call, packed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Dequantised q, k, v, fp32 [B, L, H, D], tokens as given."""
    x, geometry = blocks(call, packed), call.resolved.geometry
    rows = geometry.slot_tokens.flatten().to(packed.device)

    def raster(x8: Tensor, scale: Tensor) -> Tensor:
        x = (x8 * scale[..., None, None]).flatten(2, 3)
        out = x.new_empty(call.batch, call.heads, geometry.n_tokens, call.head_dim)
        out[:, :, rows[rows >= 0]] = x[:, :, rows >= 0]
        return out.transpose(1, 2)

    return raster(x.q, x.q_scale), raster(x.k, x.k_scale), raster(x.v, x.v_scale)


def check(call: Call, packed: Tensor, expected: Quantized, valid: Tensor | None = None) -> None:
    """Raise AssertionError unless the packed blocks hold `expected` bit for bit, padding and metas included.

    `valid`: bool [B, L], the valid tokens of each sample; None: all are.
    """
    x, geometry = blocks(call, packed), call.resolved.geometry
    for name, got in zip("qkv", decode(call, packed), strict=True):
        want = getattr(expected, name).transpose(1, 2)
        if valid is not None:  # invalid tokens are padding
            got, want = (t.masked_fill(~valid[..., None, None], 0.0) for t in (got, want))
        wrong = (~_same(got, want)).nonzero()
        first = tuple(wrong[0].tolist()) if len(wrong) else None
        assert first is None, (
            f"{name}: {len(wrong)} of {want.numel()} values differ, the first at [B, L, H, D] {first}: "
            f"{got[first].item():.9g}, reference {want[first].item():.9g}"
        )

    tokens = geometry.slot_tokens.flatten().to(packed.device)
    holds = (tokens >= 0).expand(call.batch, -1)
    if valid is not None:
        holds = holds & valid[:, tokens.clamp(min=0)]
    for name, x8, scale, rows in (
        ("q", x.q, x.q_scale, 64),
        ("k", x.k, x.k_scale, 128),
        ("v", x.v, x.v_scale, 128),
    ):
        of_block = geometry.slot // rows if name != "v" else 1
        want_scale = getattr(expected, f"{name}_scale").repeat_interleave(of_block, dim=2)
        # The reference has Inf for the scale of an Inf; only the values that it stands for count, which are NaN.
        assert _same(scale, want_scale.masked_fill(want_scale.isinf(), torch.nan)).all(), (
            f"the scales of {name}"
        )
        in_block = holds.unflatten(1, (-1, rows))[:, None, :, :, None]
        count = in_block.sum((3, 4))
        padding = x8[:, :, :, :1] if name == "k" else torch.zeros_like(x8)
        padding = padding.masked_fill((count == 0)[..., None, None], 0.0)
        padding = padding.masked_fill(scale.isnan()[..., None, None], torch.nan)
        assert (_same(x8, padding) | in_block).all(), f"the padding of {name}"
        if name != "v":
            found = getattr(x, f"{name}_valid")
            assert torch.equal(found, count.expand(found.shape).to(torch.int32)), f"the valid rows of {name}"
    is_token = holds.unflatten(1, (-1, _C.BLOCK))[:, None].expand(x.is_token.shape)
    assert torch.equal(x.is_token, is_token.float()), "is_token"


def _same(a: Tensor, b: Tensor) -> Tensor:
    return (a == b) | (a.isnan() & b.isnan())
