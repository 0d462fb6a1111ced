"""Reads packed operands, for tests: their sections, and the values of the packed blocks."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fpsattention import _C
from fpsattention.core.ops import Call
from fpsattention.core.reference import AMAX_FLOOR, E4M3_MAX


class Packed(NamedTuple):
    """Views of the sections, shaped as `fpsattention.core.ops.Sections` says."""

    q_blocks: Tensor
    kv_blocks: Tensor
    v_amax: Tensor
    norms: Tensor
    lse_shift: Tensor
    k_mean: Tensor


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
        floats(at.v_amax, call.head_dim),
        floats(at.norms, 2),
        floats(at.lse_shift, call.resolved.geometry.n_tokens) if smooth_k else packed.new_empty(0),
        floats(at.k_mean, call.head_dim) if smooth_k else packed.new_empty(0),
    )


def decode(call: Call, packed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Dequantised q, k, v, fp32 [B, L, H, D], tokens as given."""
    x, geometry, head_dim = sections(call, packed), call.resolved.geometry, call.head_dim
    rows = geometry.slot_tokens.flatten().to(packed.device)
    k_bytes = _C.BLOCK * head_dim

    def unswizzle(x: Tensor, row_bytes: int) -> Tensor:
        offset = torch.arange(x.shape[-1], device=x.device)
        offset ^= (offset >> 3) & (0x70 if row_bytes == 128 else 0x30)
        return x[..., offset].view(torch.float8_e4m3fn).float().unflatten(-1, (-1, row_bytes))

    def raster(x: Tensor) -> Tensor:  # [B, H, blocks, rows of a block, D] -> [B, L, H, D]
        out = x.new_empty(call.batch, call.heads, geometry.n_tokens, head_dim)
        out[:, :, rows[rows >= 0]] = x.flatten(2, 3)[:, :, rows >= 0]
        return out.transpose(1, 2)

    def scaled(blocks: Tensor, n_bytes: int) -> Tensor:
        scale = blocks[..., -128:-124].contiguous().view(torch.float32)
        return raster(unswizzle(blocks[..., :n_bytes], head_dim) * scale[..., None])

    # In each group of 16 tokens, word c holds tokens 2c, 2c+1, 2c+8, 2c+9 (kernels/README.md).
    place = torch.arange(16, device=packed.device)
    token = 2 * (place // 4) + place % 2 + 8 * (place % 4 // 2)
    permuted = unswizzle(x.kv_blocks[..., k_bytes : 2 * k_bytes], 128).unflatten(-1, (-1, 16))
    v = torch.empty_like(permuted)
    v[..., token] = permuted
    v_scale = torch.where(
        x.v_amax <= AMAX_FLOOR, torch.ones_like(x.v_amax), x.v_amax / torch.full_like(x.v_amax, E4M3_MAX)
    )
    q, k = scaled(x.q_blocks, _C.QUERY_BLOCK * head_dim), scaled(x.kv_blocks, k_bytes)
    return q, k, raster(v.flatten(-2).mT * v_scale[:, :, None, None])
