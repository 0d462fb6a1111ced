"""quant="none" on CUDA: windowed attention without rounding, by torch's FlexAttention."""

from __future__ import annotations

import copy
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from itertools import product
from types import FunctionType, SimpleNamespace

import torch
from torch.nn.attention import flex_attention as torch_flex

from .. import _C
from .checks import Triple, to_heads_first
from .config import ResolvedConfig
from .explain import plan
from .geometry import apart
from .reference import valid_tokens, zero_invalid

# FlexAttention's lists take 16 bytes for every pair of blocks: 4 GiB for these.
MAX_BLOCKS = 2**14
LISTS = tuple(
    f"{full}{side}_{what}"
    for full in ("", "full_")
    for side in ("kv", "q")
    for what in ("num_blocks", "indices")
)


def _attend(q, k, v, block_mask, scale):
    """flex_attention that returns (out, lse)."""
    aux = torch_flex.AuxRequest(lse=True)
    out, stats = torch_flex.flex_attention(q, k, v, block_mask=block_mask, scale=scale, return_aux=aux)
    return out, stats.lse


@lru_cache(maxsize=256)
def _compiled(kind: tuple) -> Callable:
    """`_attend`, compiled for one kind of call.

    torch gives up on a function after some recompilations, 8 by default, counted by its code: so each kind has code of
    its own, and the limit stays as the user has set it.
    """
    own = FunctionType(_attend.__code__.replace(), _attend.__globals__, _attend.__name__)
    # fullgraph: uncompiled, it would fill memory with all scores; better an error than that.
    return torch.compile(own, fullgraph=True, dynamic=False)


def _run(q, k, v, block_mask, scale: float, compiled: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """`_attend`, compiled or as it is; in a graph of the caller's it is a part of that."""
    if not compiled or torch.compiler.is_compiling():
        return _attend(q, k, v, block_mask, scale)
    gradient = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    alike = tuple((x.shape, x.stride(), x.dtype, x.device) for x in (q, k, v))
    return _compiled((alike, gradient, block_mask.shape, scale))(q, k, v, block_mask, scale)


class _Cache:
    """Tensors made once and kept from call to call: the most recently used, up to a number of bytes.

    Work that reads them may be under way on any stream when they are dropped, so the allocator is told of every stream
    they were handed to. What was handed out while a CUDA graph was captured is never dropped: each replay reads it.
    """

    def __init__(self, max_bytes: int):
        self.max_bytes, self.bytes = max_bytes, 0
        self.entries: OrderedDict[tuple, SimpleNamespace] = OrderedDict()
        self.lock = threading.Lock()

    def get(self, make: Callable, *key):
        """The first of what `make(*key)` returns; the second is all tensors in it, which are on the device key[-1]."""
        device, key = key[-1], (make, *key)
        capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        with self.lock:
            entry = self.entries.get(key)
            if entry is None:
                if capturing:
                    raise RuntimeError(
                        'config: quant="none" copies lists of tokens to the GPU in the first call of its kind, which a '
                        "CUDA graph cannot capture; make the same call once before the capture"
                    )
                value, tensors = apart(*key)
                size = sum(x.nbytes for x in tensors)
                entry = SimpleNamespace(
                    value=value, tensors=tensors, size=size, streams=set(), captured=False
                )
                self.entries[key] = entry
                self.bytes += size
            self.entries.move_to_end(key)
            entry.captured |= capturing
            if device.type == "cuda":
                entry.streams.add(torch.cuda.current_stream(device))
            if self.bytes > self.max_bytes:
                self._drop()
            return entry.value

    def _drop(self) -> None:
        for key, entry in list(self.entries.items())[:-1]:  # the last is in use
            if self.bytes > self.max_bytes and not entry.captured:
                for x, stream in product(entry.tensors, entry.streams):
                    x.record_stream(stream)
                self.bytes -= entry.size
                del self.entries[key]


_kept = _Cache(2**30)


def _check_blocks(resolved: ResolvedConfig) -> None:
    blocks = resolved.geometry.n_tiles * resolved.geometry.blocks_per_tile
    if blocks > MAX_BLOCKS:
        raise ValueError(
            f"config: tile {resolved.tile} cuts grid {resolved.grid} in {blocks:,} blocks of {_C.BLOCK} rows; "
            f'quant="none" on a GPU takes at most {MAX_BLOCKS:,}, since FlexAttention lists pairs of them; take a '
            f"larger tile, for example {plan(resolved.grid).best.tile}"
        )


def _listed_blocks(resolved: ResolvedConfig, window: Triple) -> torch.Tensor:
    """bool [query blocks, key blocks]: 128-row blocks with at least one attended pair of tokens."""
    geometry = resolved.geometry
    holds_tokens = (geometry.slot_tokens >= 0).reshape(-1, _C.BLOCK)[:, 0]
    listed = geometry.tile_mask(window, resolved.border)
    for dim in (0, 1):
        listed = listed.repeat_interleave(geometry.blocks_per_tile, dim)
    return listed & holds_tokens & holds_tokens[:, None]


def _window_mask(resolved: ResolvedConfig, partial_text: bool, device: torch.device):
    """((BlockMask of the one window, `_listed_blocks`), all tensors of both)."""
    geometry = resolved.geometry
    token = (geometry.slot_tokens >= 0).flatten()
    listed = _listed_blocks(resolved, *resolved.windows)
    full_block = token.reshape(-1, _C.BLOCK).all(1)
    if partial_text:
        full_block[geometry.n_video_tiles * geometry.blocks_per_tile :] = False

    def lists(blocks):
        # A part at a time: argsort counts in int64.
        indices = [x.byte().argsort(dim=-1, descending=True, stable=True).int() for x in blocks.split(1024)]
        return blocks.sum(-1, dtype=torch.int32)[None, None], torch.cat(indices)[None, None]

    token, listed_on_device = token.to(device), listed.to(device)

    def key_is_token(b, h, q, kv):
        return token[kv]

    # Made on the CPU and copied: on a GPU other streams might read it before this one has made it.
    mask = torch_flex.BlockMask.from_kv_blocks(
        *lists(listed & ~full_block),
        *lists(listed & full_block),
        BLOCK_SIZE=_C.BLOCK,
        mask_mod=key_is_token,
    ).to(device)
    return (mask, listed_on_device), (token, listed_on_device, *(getattr(mask, name) for name in LISTS))


@torch.compiler.disable
def block_mask(resolved: ResolvedConfig, device: torch.device, compiled: bool, partial_text: bool = False):
    """The BlockMask [1, windows, rows, rows] of tokens in slot order: which key blocks every query block
    attends.

    Key blocks without padding are full; the others are partial and masked by row. With `partial_text` all blocks of
    text tokens are partial, since a sample may have fewer valid ones (`_of_valid`). Compiled FlexAttention visits the
    listed blocks only; uncompiled it knows nothing but the mask function, which then must hold the window as well.

    Raises ValueError for more blocks than `MAX_BLOCKS`.
    """
    _check_blocks(resolved)
    # One window at a time: heads combine few of them in many ways.
    masks, listed = zip(
        *(
            _kept.get(_window_mask, replace(resolved, windows=(window,)), partial_text, device)
            for window in resolved.windows
        ),
        strict=True,
    )
    mask = copy.copy(masks[0])
    if len(masks) > 1:
        for name in LISTS:
            setattr(mask, name, torch.cat([getattr(x, name) for x in masks], dim=1))
    if compiled:
        return mask
    key_is_token, listed = mask.mask_mod, torch.stack(listed)

    def attended(b, h, q, kv):
        window = h if len(masks) > 1 else 0
        return key_is_token(b, h, q, kv) & listed[window, q // _C.BLOCK, kv // _C.BLOCK]

    mask.mask_mod = attended
    return mask


def _of_valid(mask, valid_rows: torch.Tensor):
    """The BlockMask of one call: only keys that are valid in their sample, `valid_rows` bool [B, rows]."""
    attended = mask.mask_mod

    def attended_and_valid(b, h, q, kv):
        return attended(b, h, q, kv) & valid_rows[b, kv]

    mask = copy.copy(mask)
    mask.mask_mod = attended_and_valid
    return mask


def _permutation(resolved: ResolvedConfig, device: torch.device):
    """(token of every row, row of every token), twice; padding repeats its tile's first token, so it is harmless."""
    geometry = resolved.geometry
    rows = geometry.slot_tokens
    tokens = torch.where(rows < 0, rows[:, :1], rows).flatten()
    row_of_token = torch.empty(geometry.n_tokens, dtype=torch.int64, device="cpu")
    valid = (rows >= 0).flatten()
    row_of_token[tokens[valid]] = valid.nonzero()[:, 0]
    tables = tokens.to(device), row_of_token.to(device)
    return tables, tables


@torch.compiler.disable
def permutation(resolved: ResolvedConfig, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(token of every row, row of every token) on a device."""
    return _kept.get(_permutation, replace(resolved, windows=()), device)


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
    Raises RuntimeError while a CUDA graph is captured if no such call was made before; ValueError for a
    tile that is too small for the grid (`MAX_BLOCKS`).
    """
    q, k, v = (to_heads_first(x, tensor_layout) for x in (q, k, v))
    if not resolved.geometry.n_tokens:
        return to_heads_first(q.new_empty(q.shape), tensor_layout), q.new_empty(
            q.shape[:3], dtype=torch.float32
        )
    valid = valid_tokens(resolved.geometry, prefix_valid, suffix_valid)
    mask = block_mask(resolved, q.device, q.is_cuda, valid is not None)
    token_of_row, row_of_token = permutation(resolved, q.device)
    if valid is not None:
        mask = _of_valid(mask, valid[:, token_of_row])
    q, k, v = (zero_invalid(x, valid)[:, :, token_of_row] for x in (q, k, v))
    with torch.autocast(q.device.type, enabled=False):  # whose dtype q, k and v have
        out, lse = _run(q, k, v, mask, scale, q.is_cuda)
    out, lse = zero_invalid(out[:, :, row_of_token], valid), lse[:, :, row_of_token]
    if valid is not None:
        lse = lse.masked_fill(~valid[:, None], -torch.inf)
    return to_heads_first(out, tensor_layout), lse
