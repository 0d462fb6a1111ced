"""Attention under a window or over lists of tiles, without rounding (quant="none"): on CUDA, by FlexAttention."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from types import FunctionType

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import flex_attention as torch_flex

from .. import _C
from .checks import to_heads_first
from .config import ResolvedConfig
from .explain import plan
from .geometry import TileGeometry
from .kept import Cache
from .key_tiles import KeyTiles
from .reference import valid_tokens, zero_invalid

MAX_BLOCKS = 2**14  # FlexAttention's lists take 16 bytes for each pair of blocks, so at most 4 GiB
# Attributes of a BlockMask.
LISTS = tuple(
    f"{full}{side}_{what}"
    for full in ("", "full_")
    for side in ("kv", "q")
    for what in ("num_blocks", "indices")
)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, block_mask: torch_flex.BlockMask, scale: float
) -> tuple[Tensor, Tensor]:
    """(out, lse) by torch's flex_attention."""
    aux = torch_flex.AuxRequest(lse=True)
    out, stats = torch_flex.flex_attention(q, k, v, block_mask=block_mask, scale=scale, return_aux=aux)
    return out, stats.lse  # type: ignore[return-value]  # not None, as AuxRequest asks for it


@lru_cache(maxsize=256)
def _compiled(kind: tuple) -> Callable:
    """`_attend`, compiled for one kind of call.

    torch stops compiling a function after a number of recompilations, 8 by default, which it counts by code object. So
    each kind of call has a code object of its own, and the user's limit stays as it is.
    """
    own = FunctionType(_attend.__code__.replace(), _attend.__globals__, _attend.__name__)
    # Without fullgraph, a graph break would run it uncompiled, which fills memory with all scores. Prefer an error.
    return torch.compile(own, fullgraph=True, dynamic=False)


def _run(
    q: Tensor, k: Tensor, v: Tensor, block_mask: torch_flex.BlockMask, scale: float, compiled: bool
) -> tuple[Tensor, Tensor]:
    """`_attend`, compiled if asked for. While the caller is compiled, it becomes part of the caller's graph."""
    if not compiled or torch.compiler.is_compiling():
        return _attend(q, k, v, block_mask, scale)
    gradient = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    alike = tuple((x.shape, x.stride(), x.dtype, x.device) for x in (q, k, v))
    return _compiled((alike, gradient, block_mask.shape, scale))(q, k, v, block_mask, scale)


_kept = Cache(2**30)


def _check_blocks(resolved: ResolvedConfig, lists: int = 1) -> None:
    """Raises ValueError for more blocks than `MAX_BLOCKS`, or in so many `lists` more pairs than one may have."""
    blocks = resolved.geometry.n_tiles * resolved.geometry.blocks_per_tile
    if lists * blocks**2 > MAX_BLOCKS**2 >= blocks**2:
        raise ValueError(
            f'key_tiles: {lists} lists (samples times heads) of {blocks:,} blocks; quant="none" on a GPU takes at most '
            f"{MAX_BLOCKS**2 // blocks**2}, since FlexAttention lists pairs of blocks; share lists between heads, or "
            f"take a larger tile"
        )
    if blocks > MAX_BLOCKS:
        raise ValueError(
            f"config: tile {resolved.tile} cuts grid {resolved.grid} in {blocks:,} blocks of {_C.BLOCK} rows; "
            f'quant="none" on a GPU takes at most {MAX_BLOCKS:,}, since FlexAttention lists pairs of blocks; take a '
            f"larger tile, for example {plan(resolved.grid).best.tile}"
        )


def _listed_blocks(tiles: Tensor, token: Tensor) -> Tensor:
    """bool [.., query blocks, key blocks]: True for 128-row blocks with at least one attended pair of tokens.

    Args:
        tiles: bool [.., n_tiles, n_tiles], which tiles attend which.
        token: bool [rows], which rows are tokens.
    """
    holds_tokens = token.reshape(-1, _C.BLOCK)[:, 0]
    blocks_per_tile = len(holds_tokens) // tiles.shape[-1]
    for dim in (-1, -2):
        tiles = tiles.repeat_interleave(blocks_per_tile, dim)
    return tiles & holds_tokens & holds_tokens[:, None]


def _full_blocks(geometry: TileGeometry, partial_text: bool) -> Tensor:
    """bool [blocks]: True for blocks without padding; with `partial_text` for none of the text."""
    full = (geometry.slot_tokens >= 0).reshape(-1, _C.BLOCK).all(1)
    if partial_text:
        full[geometry.n_video_tiles * geometry.blocks_per_tile :] = False
    return full


def _mask_of_blocks(listed: Tensor, full: Tensor, token: Tensor) -> torch_flex.BlockMask:
    """The BlockMask of listed blocks [B, H, query blocks, key blocks], with rows of `token`; `full` key blocks need no
    mask.
    """

    def lists(blocks: Tensor) -> tuple[Tensor, Tensor]:
        # In parts, because argsort returns int64.
        parts = blocks.split(1024, dim=2)
        indices = [x.byte().argsort(dim=-1, descending=True, stable=True).int() for x in parts]
        return blocks.sum(-1, dtype=torch.int32), torch.cat(indices, dim=2)

    def key_is_token(b, h, q, kv):
        return token[kv]

    partial, whole = lists(listed & ~full), lists(listed & full)
    return torch_flex.BlockMask.from_kv_blocks(
        partial[0], partial[1], whole[0], whole[1], BLOCK_SIZE=_C.BLOCK, mask_mod=key_is_token
    )


def _window_mask(
    resolved: ResolvedConfig, partial_text: bool, device: torch.device
) -> tuple[tuple[torch_flex.BlockMask, Tensor], tuple[Tensor, ...]]:
    """((BlockMask of the only window, its `_listed_blocks`), all tensors of both)."""
    geometry = resolved.geometry
    (window,) = resolved.windows
    token = (geometry.slot_tokens >= 0).flatten()
    listed = _listed_blocks(geometry.tile_mask(window, resolved.border), token)
    token, full = token.to(device), _full_blocks(geometry, partial_text)
    # Made on the CPU and copied, which waits. If kernels made it on the GPU, another stream might read it too early.
    mask = _mask_of_blocks(listed[None, None], full, token).to(device)
    listed = listed.to(device)
    return (mask, listed), (token, listed, *(getattr(mask, name) for name in LISTS))


def _tables(
    resolved: ResolvedConfig, partial_text: bool, device: torch.device
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """(value, tensors) for the cache; both are (rows that are tokens, blocks without padding)."""
    geometry = resolved.geometry
    token = (geometry.slot_tokens >= 0).flatten()
    tables = token.to(device), _full_blocks(geometry, partial_text).to(device)
    return tables, tables


@torch.compiler.disable
def block_mask_of_lists(
    resolved: ResolvedConfig, key_tiles: KeyTiles, compiled: bool, partial_text: bool = False
) -> torch_flex.BlockMask:
    """`block_mask` of lists of key tiles, [1 or B, 1 or H, rows, rows]. It waits for no GPU, and is not cached.

    Raises ValueError for more blocks than `MAX_BLOCKS`, or for so many pairs of them in all lists.
    """
    geometry, tiles = resolved.geometry, key_tiles.mask()
    several = [n > 1 for n in tiles.shape[:2]]
    _check_blocks(resolved, math.prod(tiles.shape[:2]))
    text = (0, geometry.n_tiles - geometry.n_video_tiles) * 2
    tiles = F.pad(tiles, text, value=True)
    token, full = _kept.get(_tables, replace(resolved, windows=()), partial_text, tiles.device)
    listed = _listed_blocks(tiles, token)
    mask = _mask_of_blocks(listed, full, token)
    if compiled:
        return mask
    key_is_token = mask.mask_mod

    def attended(b, h, q, kv):
        sample, head = (i * more for i, more in zip((b, h), several, strict=True))
        return key_is_token(b, h, q, kv) & listed[sample, head, q // _C.BLOCK, kv // _C.BLOCK]

    mask.mask_mod = attended
    return mask


@torch.compiler.disable
def block_mask(
    resolved: ResolvedConfig, device: torch.device, compiled: bool, partial_text: bool = False
) -> torch_flex.BlockMask:
    """The BlockMask [1, windows, rows, rows] for tokens in slot order: the key blocks that each query block attends.

    Key blocks without padding are full; the others are partial and masked by row. With `partial_text` all text blocks
    are partial, because some of their tokens may be invalid in a sample (`_of_valid`). Compiled FlexAttention visits
    only the listed blocks. Uncompiled FlexAttention reads only the mask function, which then includes the window.

    Raises ValueError for more blocks than `MAX_BLOCKS`.
    """
    _check_blocks(resolved)
    # Cached by window, because heads combine few windows in many ways.
    kept = [
        _kept.get(_window_mask, replace(resolved, windows=(window,)), partial_text, device)
        for window in resolved.windows
    ]
    masks = [mask for mask, _ in kept]
    mask = copy.copy(masks[0])
    if len(masks) > 1:
        for name in LISTS:
            setattr(mask, name, torch.cat([getattr(x, name) for x in masks], dim=1))
    if compiled:
        return mask
    key_is_token, listed = mask.mask_mod, torch.stack([blocks for _, blocks in kept])

    def attended(b, h, q, kv):
        window = h if len(masks) > 1 else 0
        return key_is_token(b, h, q, kv) & listed[window, q // _C.BLOCK, kv // _C.BLOCK]

    mask.mask_mod = attended
    return mask


def _of_valid(mask: torch_flex.BlockMask, valid_rows: Tensor) -> torch_flex.BlockMask:
    """`mask` restricted to the keys that are valid in each sample, `valid_rows` bool [B, rows]."""
    attended = mask.mask_mod

    def attended_and_valid(b, h, q, kv):
        return attended(b, h, q, kv) & valid_rows[b, kv]

    mask = copy.copy(mask)
    mask.mask_mod = attended_and_valid
    return mask


def _permutation(
    resolved: ResolvedConfig, device: torch.device
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(value, tensors) for the cache; both are (token of each row, row of each token).

    A row of padding repeats its tile's first token.
    """
    geometry = resolved.geometry
    rows = geometry.slot_tokens
    tokens = torch.where(rows < 0, rows[:, :1], rows).flatten()
    row_of_token = torch.empty(geometry.n_tokens, dtype=torch.int64, device="cpu")
    valid = (rows >= 0).flatten()
    row_of_token[tokens[valid]] = valid.nonzero()[:, 0]
    tables = tokens.to(device), row_of_token.to(device)
    return tables, tables


@torch.compiler.disable
def permutation(resolved: ResolvedConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    """(token of each row, row of each token) on a device."""
    return _kept.get(_permutation, replace(resolved, windows=()), device)


def flex_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    resolved: ResolvedConfig,
    scale: float,
    tensor_layout: str,
    prefix_valid: Tensor | None = None,
    suffix_valid: Tensor | None = None,
    key_tiles: KeyTiles | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention under a window or over lists of tiles, without rounding to FP8 (arXiv 2502.04507). Differentiable on
    CUDA.

    Args:
        q, k, v: [B, L, H, D] ("NHD") or [B, H, L, D] ("HND"), checked by the caller. On the CPU all scores are held in
            memory.
        resolved: grid, tile, windows, border, prefix_len and suffix_len are used.
        scale: factor of the scores before softmax.
        tensor_layout: "NHD" or "HND".
        prefix_valid, suffix_valid: int32 [B], as in `fpsattention.reference.exact_attention`.
        key_tiles: lists in place of the windows, checked by the caller.

    Returns out, like q, and lse fp32 [B, H, L], natural logarithm, with tokens in the order of q.
    Raises RuntimeError during the capture of a CUDA graph unless the same call was made before; ValueError for a tile
    that is too small for the grid (`MAX_BLOCKS`).
    """
    q, k, v = (to_heads_first(x, tensor_layout) for x in (q, k, v))
    if not resolved.geometry.n_tokens:
        return to_heads_first(q.new_empty(q.shape), tensor_layout), q.new_empty(
            q.shape[:3], dtype=torch.float32
        )
    valid = valid_tokens(resolved.geometry, prefix_valid, suffix_valid)
    if key_tiles is None:
        mask = block_mask(resolved, q.device, q.is_cuda, valid is not None)
    else:
        mask = block_mask_of_lists(resolved, key_tiles, q.is_cuda, valid is not None)
    token_of_row, row_of_token = permutation(resolved, q.device)
    if valid is not None:
        mask = _of_valid(mask, valid[:, token_of_row])
    q, k, v = (zero_invalid(x, valid)[:, :, token_of_row] for x in (q, k, v))
    with torch.autocast(q.device.type, enabled=False):  # q, k and v have its dtype already
        out, lse = _run(q, k, v, mask, scale, q.is_cuda)
    out, lse = zero_invalid(out[:, :, row_of_token], valid), lse[:, :, row_of_token]
    if valid is not None:
        lse = lse.masked_fill(~valid[:, None], -torch.inf)
    return to_heads_first(out, tensor_layout), lse
