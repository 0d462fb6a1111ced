"""quant="none" on CUDA: windowed attention without rounding, by torch's FlexAttention."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import lru_cache

import torch

from . import _C
from .config import ResolvedConfig
from .reference import to_heads_first, valid_tokens, zero_invalid


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


# Numbers of tokens, heads and samples, head_dims, dtypes and layouts of a process, with and without gradients and text:
# torch would give up after 8.
COMPILED_KINDS = 256


@lru_cache(maxsize=2)
def _kernel(compiled: bool) -> Callable:
    """flex_attention that returns (out, lse), compiled once for each kind of call or as it is."""
    flex = _module()

    def attend(q, k, v, block_mask, scale):
        if hasattr(flex, "AuxRequest"):  # torch >= 2.9
            aux = flex.AuxRequest(lse=True)
            out, stats = flex.flex_attention(q, k, v, block_mask=block_mask, scale=scale, return_aux=aux)
            return out, stats.lse
        return flex.flex_attention(q, k, v, block_mask=block_mask, scale=scale, return_lse=True)

    if not compiled:
        return attend
    # fullgraph: uncompiled, it would fill memory with all scores; better an error than that.
    kernel = torch.compile(attend, fullgraph=True)
    dynamo = torch._dynamo.config
    limit = "recompile_limit" if hasattr(dynamo, "recompile_limit") else "cache_size_limit"

    def attend_compiled(*args):
        if torch.compiler.is_compiling():  # part of the caller's graph
            return attend(*args)
        with dynamo.patch({limit: max(COMPILED_KINDS, getattr(dynamo, limit))}):
            return kernel(*args)

    return attend_compiled


def _listed_blocks(resolved: ResolvedConfig) -> torch.Tensor:
    """bool [windows, query blocks, key blocks]: 128-row blocks with at least one attended pair of tokens."""
    geometry = resolved.geometry
    holds_tokens = (geometry.slot_tokens >= 0).reshape(-1, _C.BLOCK)[:, 0]
    listed = []
    for window in resolved.windows:
        tiles = geometry.tile_mask(window, resolved.border)
        blocks = tiles.repeat_interleave(geometry.blocks_per_tile, 0)
        blocks = blocks.repeat_interleave(geometry.blocks_per_tile, 1)
        listed.append(blocks & holds_tokens & holds_tokens[:, None])
    return torch.stack(listed)


@lru_cache(maxsize=4)
@torch.inference_mode(False)
def block_mask(resolved: ResolvedConfig, device: torch.device, compiled: bool, partial_extra: bool = False):
    """The BlockMask [1, windows, rows, rows] of tokens in slot order: which key blocks every query block
    attends.

    Key blocks without padding are full; the others are partial and masked by row. With `partial_extra` all blocks of
    extra tokens are partial, since a sample may have fewer valid ones (`_of_valid`). Compiled FlexAttention visits the
    listed blocks only; uncompiled it knows nothing but the mask function, which then must hold the window as well.
    """
    geometry = resolved.geometry
    token = (geometry.slot_tokens >= 0).flatten()
    listed = _listed_blocks(resolved)
    full_block = token.reshape(-1, _C.BLOCK).all(1)
    if partial_extra:
        full_block[geometry.n_video_tiles * geometry.blocks_per_tile :] = False

    def lists(blocks):
        count = blocks.sum(-1, dtype=torch.int32)[None]
        return count.to(device), blocks.int().argsort(dim=-1, descending=True, stable=True).int()[None].to(
            device
        )

    token_on_device = token.to(device)

    def key_is_token(b, h, q, kv):
        return token_on_device[kv]

    listed_on_device = listed.to(device)

    def attended(b, h, q, kv):
        window = h if len(resolved.windows) > 1 else 0
        return token_on_device[kv] & listed_on_device[window, q // _C.BLOCK, kv // _C.BLOCK]

    return _module().BlockMask.from_kv_blocks(
        *lists(listed & ~full_block),
        *lists(listed & full_block),
        BLOCK_SIZE=_C.BLOCK,
        mask_mod=key_is_token if compiled else attended,
    )


def _of_valid(mask, valid_rows: torch.Tensor):
    """The BlockMask of one call: only keys that are valid in their sample, `valid_rows` bool [B, rows]."""
    attended = mask.mask_mod

    def attended_and_valid(b, h, q, kv):
        return attended(b, h, q, kv) & valid_rows[b, kv]

    mask = copy.copy(mask)
    mask.mask_mod = attended_and_valid
    return mask


@lru_cache(maxsize=4)
@torch.inference_mode(False)
def _permutation(resolved: ResolvedConfig, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(token of every row, row of every token); padding repeats its tile's first token, so it is harmless."""
    rows = resolved.geometry.slot_tokens
    tokens = torch.where(rows < 0, rows[:, :1], rows).flatten()
    row_of_token = torch.empty(resolved.geometry.n_tokens, dtype=torch.int64, device="cpu")
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
    prefix_valid: torch.Tensor | None = None,
    suffix_valid: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention under a window, not rounded to FP8 (arXiv 2502.04507). Differentiable on CUDA.

    Args:
        q, k, v: [B, L, H, D] ("NHD") or [B, H, L, D] ("HND"), as `attention` has checked them, on CUDA; elsewhere all
            scores are held in memory.
        resolved: grid, tile, windows, border, prefix_len and suffix_len are used.
        scale: of the scores before softmax.
        prefix_valid, suffix_valid: int32 [B], as in `fpsattention.reference.exact_attention`.

    Returns out, like q, and lse fp32 [B, H, L], natural logarithm, in the order of memory.
    Raises RuntimeError when torch is older than 2.5.
    """
    q, k, v = (to_heads_first(x, tensor_layout) for x in (q, k, v))
    if not resolved.geometry.n_tokens:
        return to_heads_first(q.new_empty(q.shape), tensor_layout), q.new_empty(
            q.shape[:3], dtype=torch.float32
        )
    valid = valid_tokens(resolved.geometry, prefix_valid, suffix_valid)
    token_of_row, row_of_token = _permutation(resolved, q.device)
    mask = block_mask(resolved, q.device, q.is_cuda, valid is not None)
    if valid is not None:
        mask = _of_valid(mask, valid[:, token_of_row])
    q, k, v = (zero_invalid(x, valid)[:, :, token_of_row] for x in (q, k, v))
    out, lse = _kernel(q.is_cuda)(q, k, v, mask, scale)
    out, lse = zero_invalid(out[:, :, row_of_token], valid), lse[:, :, row_of_token]
    if valid is not None:
        lse = lse.masked_fill(~valid[:, None], -torch.inf)
    return to_heads_first(out, tensor_layout), lse
