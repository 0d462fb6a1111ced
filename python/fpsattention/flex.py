"""quant="none" on CUDA: windowed attention without rounding, by torch's FlexAttention."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch

from . import _C
from .config import ResolvedConfig
from .reference import to_heads_first


def _module():
    """torch.nn.attention.flex_attention, which this package can be imported without."""
    try:
        from torch.nn.attention import flex_attention
    except ImportError as error:
        raise RuntimeError(
            f'quant="none" on CUDA needs torch >= 2.5 for its FlexAttention, this is {torch.__version__}; '
            f'use a newer torch, or backend="reference"'
        ) from error
    return flex_attention


@lru_cache(maxsize=2)
def _kernel(compiled: bool) -> Callable:
    """flex_attention that returns (out, lse), compiled once or as it is."""
    flex = _module()

    def attend(q, k, v, block_mask, scale):
        if hasattr(flex, "AuxRequest"):  # torch >= 2.9
            aux = flex.AuxRequest(lse=True)
            out, stats = flex.flex_attention(q, k, v, block_mask=block_mask, scale=scale, return_aux=aux)
            return out, stats.lse
        return flex.flex_attention(q, k, v, block_mask=block_mask, scale=scale, return_lse=True)

    # fullgraph: uncompiled, it would fill memory with all scores; better an error than that.
    return torch.compile(attend, fullgraph=True) if compiled else attend


def _listed_blocks(resolved: ResolvedConfig) -> torch.Tensor:
    """bool [windows, query blocks, key blocks]: 128-row blocks with at least one attended pair of tokens."""
    geometry = resolved.geometry
    coordinates = torch.cartesian_prod(*(torch.arange(n) for n in geometry.tiles))
    holds_tokens = (geometry.slot_tokens >= 0).reshape(-1, _C.BLOCK)[:, 0]
    listed = []
    for window in resolved.windows:
        lo, hi = geometry.key_boxes(window, resolved.border)[:, None].unbind(-1)
        tiles = ((coordinates >= lo) & (coordinates < hi)).all(-1)
        blocks = tiles.repeat_interleave(geometry.blocks_per_tile, 0)
        blocks = blocks.repeat_interleave(geometry.blocks_per_tile, 1)
        listed.append(blocks & holds_tokens & holds_tokens[:, None])
    return torch.stack(listed)


@lru_cache(maxsize=4)
def block_mask(resolved: ResolvedConfig, device: torch.device, compiled: bool):
    """The BlockMask [1, windows, rows, rows] of tokens in slot order: which key blocks every query block
    attends.

    Key blocks without padding are full; the others are partial and masked by row. Compiled FlexAttention
    visits the listed blocks only; uncompiled it knows nothing but the mask function, which then must hold the
    window as well.
    """
    valid = (resolved.geometry.slot_tokens >= 0).flatten()
    listed = _listed_blocks(resolved)
    full_block = valid.reshape(-1, _C.BLOCK).all(1)

    def lists(blocks):
        count = blocks.sum(-1, dtype=torch.int32)[None]
        return count.to(device), blocks.int().argsort(dim=-1, descending=True, stable=True).int()[None].to(
            device
        )

    valid_on_device = valid.to(device)

    def key_is_valid(b, h, q, kv):
        return valid_on_device[kv]

    listed_on_device = listed.to(device)

    def attended(b, h, q, kv):
        window = h if len(resolved.windows) > 1 else 0
        return valid_on_device[kv] & listed_on_device[window, q // _C.BLOCK, kv // _C.BLOCK]

    return _module().BlockMask.from_kv_blocks(
        *lists(listed & ~full_block),
        *lists(listed & full_block),
        BLOCK_SIZE=_C.BLOCK,
        mask_mod=key_is_valid if compiled else attended,
    )


@lru_cache(maxsize=4)
def _permutation(resolved: ResolvedConfig, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(token of every row, row of every token); padding repeats its tile's first token, so it is harmless."""
    rows = resolved.geometry.slot_tokens
    tokens = torch.where(rows < 0, rows[:, :1], rows).flatten()
    row_of_token = torch.empty(resolved.geometry.n_tokens, dtype=torch.int64)
    valid = (rows >= 0).flatten()
    row_of_token[tokens[valid]] = valid.nonzero()[:, 0]
    return tokens.to(device), row_of_token.to(device)


def flex_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    resolved: ResolvedConfig,
    scale: float,
    tensor_layout: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention under a window, not rounded to FP8 (arXiv 2502.04507). Differentiable on CUDA.

    Args:
        q, k, v: [B, L, H, D] ("NHD") or [B, H, L, D] ("HND"), on CUDA; elsewhere all scores are held in
            memory.
        resolved: grid, tile, windows and border are used.
        scale: of the scores before softmax.

    Returns out, like q, and lse fp32 [B, H, L], natural logarithm, in raster order.
    Raises RuntimeError when torch is older than 2.5.
    """
    q, k, v = (to_heads_first(x, tensor_layout) for x in (q, k, v))
    if not resolved.geometry.n_tokens:
        return to_heads_first(q.new_empty(q.shape), tensor_layout), q.new_empty(
            q.shape[:3], dtype=torch.float32
        )
    token_of_row, row_of_token = _permutation(resolved, q.device)
    mask = block_mask(resolved, q.device, q.is_cuda)
    out, lse = _kernel(q.is_cuda)(*(x[:, :, token_of_row] for x in (q, k, v)), mask, scale)
    return to_heads_first(out[:, :, row_of_token], tensor_layout), lse[:, :, row_of_token]
