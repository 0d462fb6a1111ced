"""Python face of the geometry rule: which token sits in which tile, and which tiles a query tile attends.

The rule itself is C++ (include/fpsattention/geometry.h, shared by host and device) and is reached through
`_C`; this module turns its answers into index tensors and counts. All tensors live on the CPU, whatever the default
device; those that are kept are plain tensors, whatever mode torch is in.
"""

from __future__ import annotations

import math
import operator
import reprlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, lru_cache
from typing import TypeVar

import torch

from . import _C

Triple = tuple[int, int, int]
T = TypeVar("T")

MAX_TOKENS = 2**31 - _C.MAX_SLOT  # token indices are int32 in the kernels, rounded up to tiles too


class _Shown(reprlib.Repr):
    """`repr` for error messages: short, whatever the value."""

    MOST = 80  # characters

    def __init__(self):
        super().__init__()
        self.maxother = self.MOST

    def repr1(self, x, level):
        if isinstance(x, torch.Tensor) and not (x.is_cpu and x.numel() <= 4):  # a GPU would stop
            return f"a {x.dtype} tensor of shape {self.repr1(list(x.shape), level)}"
        try:
            return super().repr1(x, level)
        except Exception:  # of the value's own: Python refuses to print an int of 4,300 digits, for one
            return f"<{type(x).__name__}>"

    def __call__(self, x) -> str:
        text = self.repr(x)
        return text if len(text) <= self.MOST else f"{text[: self.MOST - 3]}..."


shown = _Shown()


# torch.compile knows that a symbol is an int, but not what attributes it has, and makes a constant of its index.


def _is_integer(x) -> bool:
    return not isinstance(x, bool) and (isinstance(x, int) or hasattr(x, "__index__"))


def _plain(x) -> int:
    return x if isinstance(x, int) else operator.index(x)


def as_triple(name: str, value: Sequence[int], least: int) -> Triple:
    """`value` as three plain ints (t, h, w), each at least `least`.

    Raises TypeError when it is no sequence of integers, ValueError when it has not three or one is too small;
    both name the argument.
    """

    def form() -> str:
        return f"{name}: {shown(value)} must be three integers (t, h, w), each at least {least}"

    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        raise TypeError(form())
    if not all(_is_integer(x) for x in value):
        raise TypeError(form())
    if len(value) != 3:
        raise ValueError(f"{form()}; got {len(value)}")
    try:
        t, h, w = (_plain(x) for x in value)
    except TypeError:  # a tensor of floats has the attribute too
        raise TypeError(form()) from None
    if t < least or h < least or w < least:
        nearest = max(t, least), max(h, least), max(w, least)
        raise ValueError(f"{form()}; nearest legal value {shown(nearest)}")
    return t, h, w


def as_int(name: str, value: int, least: int, most: int | None = None) -> int:
    """`value` as a plain int from `least` to `most`. Raises TypeError or ValueError that name the argument."""

    def rule() -> str:
        bounds = f"at least {least}" if most is None else f"at least {least} and at most {most}"
        return f"{name}: {shown(value)} must be an integer, {bounds}"

    if not _is_integer(value):
        raise TypeError(rule())
    try:
        number = _plain(value)
    except TypeError:  # a tensor of floats has the attribute too
        raise TypeError(rule()) from None
    if number < least or (most is not None and number > most):
        raise ValueError(f"{rule()}; nearest legal value {least if number < least else most}")
    return number


def as_grid(value: Sequence[int]) -> Triple:
    """`value` as a token grid (T, H, W); an axis of 0 makes the empty grid. Raises as `as_triple` does."""
    grid = as_triple("grid", value, 0)
    if math.prod(grid) > MAX_TOKENS:
        raise ValueError(
            f"grid: {shown(grid)} has {shown(math.prod(grid))} tokens, at most {MAX_TOKENS} are possible"
        )
    return grid


def shrink_tile(tile: Triple) -> Triple:
    """A tile near `tile` that fits in a slot, made by shortening the longest axis."""
    axes = [min(x, _C.MAX_SLOT) for x in tile]
    while math.prod(axes) > _C.MAX_SLOT:
        axes[axes.index(max(axes))] -= 1
    t, h, w = axes
    return t, h, w


def as_tile(value: Sequence[int]) -> Triple:
    """`value` as a tile (t, h, w) in tokens, at most `_C.MAX_SLOT` of them. Raises as `as_triple` does."""
    tile = as_triple("tile", value, 1)
    if math.prod(tile) > _C.MAX_SLOT:
        raise ValueError(
            f"tile: {shown(tile)} has {shown(math.prod(tile))} tokens, at most {_C.MAX_SLOT} fit in a slot; "
            f"nearest legal tile {shrink_tile(tile)}"
        )
    return tile


def as_truncate(border: str) -> bool:
    """Whether `border`, "clamp" or "truncate", cuts the window at the grid's edge; ValueError for another."""
    if not isinstance(border, str) or border not in ("clamp", "truncate"):
        raise ValueError(f'border: {shown(border)} must be "clamp" or "truncate"')
    return border == "truncate"


def apart(make: Callable[..., T], *args) -> T:
    """`make(*args)` in a thread of its own, for tensors that outlive the call.

    What torch does to new tensors belongs to a thread: a mode makes fake or meta tensors of them, inference mode bars
    them from autograd, torch.func wraps them. A new thread has none of that.
    """
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(make, *args).result()


class _Kept(cached_property):
    """A property computed once, `apart`."""

    def __init__(self, compute):
        super().__init__(lambda instance: apart(compute, instance))
        self.__doc__ = compute.__doc__


class TileGeometry:
    """A token grid (T, H, W) cut in tiles of (t, h, w) tokens. Get one from `tile_geometry`, which caches.

    Edge tiles are ragged. Tiles are numbered in raster order of their coordinates. A tile owns `slot` rows:
    its valid tokens first, in raster order, then padding. Windows are (wt, wh, ww) in tiles, each odd or at
    least the number of tiles on its axis; `border` is "clamp" or "truncate" (Sliding Tile Attention, arXiv
    2502.04507; FPSAttention, arXiv 2506.04648, Eq. 2).

    Extra tokens, text for instance, may lie before the video's (the prefix) and after them (the suffix). Each of
    the two sections is cut, in order, in *runs* of `slot` tokens. A run is a tile of its own, outside the grid:
    it attends everything, and everything attends it. Runs are numbered after the video's tiles, the prefix's first.

    Attributes:
        grid, tile: tokens per axis.
        prefix_len, suffix_len: tokens before and after the video's.
        tiles: number of tiles per axis.
        n_tokens, n_tiles: all tokens and all tiles, the extra ones included.
        n_video_tiles: tiles of the grid.
        n_extra_tokens: prefix_len + suffix_len.
        slot: rows per tile, a multiple of 128, at most 512.
        blocks_per_tile: 128-row kernel blocks per slot.
    """

    def __init__(self, grid: Sequence[int], tile: Sequence[int], prefix_len: int = 0, suffix_len: int = 0):
        self.grid = as_grid(grid)
        self.tile = as_tile(tile)
        self.prefix_len = as_int("prefix_len", prefix_len, 0)
        self.suffix_len = as_int("suffix_len", suffix_len, 0)
        t, h, w = (-(-g // t) for g, t in zip(self.grid, self.tile, strict=True))
        self.tiles: Triple = (t, h, w)
        self.n_extra_tokens = self.prefix_len + self.suffix_len
        self.n_tokens = math.prod(self.grid) + self.n_extra_tokens
        if self.n_tokens > MAX_TOKENS:
            raise ValueError(
                f"prefix_len: {shown(self.prefix_len)} and suffix_len {shown(self.suffix_len)} make "
                f"{shown(self.n_tokens)} tokens with grid {self.grid}, at most {MAX_TOKENS} are possible"
            )
        self.blocks_per_tile = -(-math.prod(self.tile) // _C.BLOCK)
        self.slot = self.blocks_per_tile * _C.BLOCK
        self.n_video_tiles = math.prod(self.tiles)
        self.n_tiles = self.n_video_tiles + sum(
            -(-n // self.slot) for n in (self.prefix_len, self.suffix_len)
        )

    @_Kept
    def slot_tokens(self) -> torch.Tensor:
        """int64 [n_tiles, slot]: index of the token in each row, -1 for padding."""
        rows = torch.empty(self.n_tiles, self.slot, dtype=torch.int32, device="cpu")
        if self.n_tiles:
            _C.slot_tokens(self.grid, self.tile, self.prefix_len, self.suffix_len, rows.data_ptr())
        return rows.long()

    @_Kept
    def extra_tokens(self) -> torch.Tensor:
        """int64 [n_extra_tokens], ascending: indices of the prefix's and the suffix's tokens."""
        tokens = torch.arange(self.n_tokens, device="cpu")
        return torch.cat([tokens[: self.prefix_len], tokens[self.n_tokens - self.suffix_len :]])

    @_Kept
    def valid(self) -> torch.Tensor:
        """int64 [n_tiles]: tokens of each tile."""
        return (self.slot_tokens >= 0).sum(1)

    @_Kept
    def tile_of_token(self) -> torch.Tensor:
        """int64 [n_tokens]: the tile of each token."""
        tile_of_row = torch.arange(self.n_tiles, device="cpu").repeat_interleave(self.valid)
        out = torch.empty(self.n_tokens, dtype=torch.int64, device="cpu")
        out[self.slot_tokens[self.slot_tokens >= 0]] = tile_of_row
        return out

    def n_bricks(self, quant_tile: Sequence[int]) -> int:
        """How many bricks `brick_of_tile` tells apart."""
        per_axis = (-(-n // (b // t)) for n, b, t in zip(self.tiles, quant_tile, self.tile, strict=True))
        return math.prod(per_axis) + self.n_tiles - self.n_video_tiles

    def brick_of_tile(self, quant_tile: Sequence[int]) -> torch.Tensor:
        """int64 [n_tiles]: the brick each tile is in; `quant_tile` is a whole multiple of the tile. A run of extra
        tokens is a brick of its own; these come after the grid's.
        """
        per_axis = [
            torch.arange(n, device="cpu") // (b // t)
            for n, b, t in zip(self.tiles, quant_tile, self.tile, strict=True)
        ]
        bricks = [int(x[-1]) + 1 if len(x) else 0 for x in per_axis]
        t, h, w = torch.meshgrid(*per_axis, indexing="ij")
        video = ((t * bricks[1] + h) * bricks[2] + w).reshape(-1)
        runs = torch.arange(self.n_tiles - self.n_video_tiles, device="cpu")
        return torch.cat([video, math.prod(bricks) + runs])

    def coordinates(self, tile_index: int) -> Triple:
        """Coordinates (t, h, w) of a tile of the grid. Raises IndexError when there is no such tile."""
        if not 0 <= tile_index < self.n_video_tiles:
            raise IndexError(f"tile_index: {shown(tile_index)} must be in [0, {self.n_video_tiles})")
        rest, w = divmod(tile_index, self.tiles[2])
        return (*divmod(rest, self.tiles[1]), w)

    def _axis_keys(self, axis: int, window: Triple, border: str) -> list[list[int]]:
        n, truncate = self.tiles[axis], as_truncate(border)
        return [_C.axis_keys(i, n, window[axis], truncate) for i in range(n)]

    def key_boxes(self, window: Triple, border: str) -> torch.Tensor:
        """int64 [n_video_tiles, 3, 2]: half-open range [lo, hi) of key tiles on each axis, for every query tile of the
        grid.
        """
        per_axis = [
            torch.tensor(self._axis_keys(axis, window, border), dtype=torch.int64, device="cpu").reshape(
                -1, 2
            )
            for axis in range(3)
        ]
        index = torch.meshgrid(*(torch.arange(n, device="cpu") for n in self.tiles), indexing="ij")
        return torch.stack([x[i.reshape(-1)] for x, i in zip(per_axis, index, strict=True)], dim=1)

    def tiles_in(self, boxes: torch.Tensor) -> torch.Tensor:
        """int64 [n, tiles of a box], ascending: the tiles in `boxes` [n, 3, 2] of equal sizes."""
        sizes = (boxes[0, :, 1] - boxes[0, :, 0]).tolist()
        t, h, w = (boxes[:, axis, :1] + torch.arange(sizes[axis], device="cpu") for axis in range(3))
        _, n_h, n_w = self.tiles
        tiles = (t[:, :, None, None] * n_h + h[:, None, :, None]) * n_w + w[:, None, None, :]
        return tiles.flatten(1)

    def key_tiles(self, query_tile: int, window: Triple, border: str) -> torch.Tensor:
        """int64 [n], ascending: the key tiles that `query_tile` attends."""
        return self._box(query_tile, window, border, _C.axis_keys)

    def query_tiles(self, key_tile: int, window: Triple, border: str) -> torch.Tensor:
        """int64 [n], ascending: the query tiles that attend `key_tile` (the transpose of `key_tiles`)."""
        return self._box(key_tile, window, border, _C.axis_queries)

    def _box(self, tile_index, window, border, axis_rule) -> torch.Tensor:
        truncate = as_truncate(border)
        if self.n_video_tiles <= tile_index < self.n_tiles:
            return torch.arange(self.n_tiles, device="cpu")
        box = [
            axis_rule(i, n, w, truncate)
            for i, n, w in zip(self.coordinates(tile_index), self.tiles, window, strict=True)
        ]
        runs = torch.arange(self.n_video_tiles, self.n_tiles, device="cpu")
        return torch.cat([self.tiles_in(torch.tensor([box], device="cpu"))[0], runs])

    def tile_mask(self, window: Triple, border: str) -> torch.Tensor:
        """bool [n_tiles, n_tiles]: which tiles (rows) attend which (columns)."""
        per_axis = []
        for axis, n in enumerate(self.tiles):
            keys = self._axis_keys(axis, window, border)
            lo, hi = torch.tensor(keys, dtype=torch.int64, device="cpu").reshape(-1, 2, 1).unbind(1)
            coordinate = torch.arange(n, device="cpu")
            per_axis.append((coordinate >= lo) & (coordinate < hi))
        t, h, w = per_axis
        video = self.n_video_tiles
        mask = torch.ones(self.n_tiles, self.n_tiles, dtype=torch.bool, device="cpu")
        attended = (
            t[:, None, None, :, None, None] & h[None, :, None, None, :, None] & w[None, None, :, None, None]
        )
        mask[:video, :video] = attended.reshape(video, video)
        return mask

    def attended_pairs(self, window: Triple, border: str) -> int:
        """Query-key pairs of tokens that attend each other, of one head; all extra tokens count as valid."""
        pairs = 1  # of the video: the attended set is a product of axes, so the count is too
        for axis, n in enumerate(self.tiles):
            extent = [min(self.tile[axis], self.grid[axis] - i * self.tile[axis]) for i in range(n)]
            keys = self._axis_keys(axis, window, border)
            pairs *= sum(extent[i] * sum(extent[lo:hi]) for i, (lo, hi) in enumerate(keys))
        # Extra queries attend all tokens; the video's attend the extra keys besides their window.
        return pairs + self.n_extra_tokens * (self.n_tokens + math.prod(self.grid))

    def density(self, window: Triple, border: str) -> float:
        """Attended pairs as a fraction of all pairs; 1.0 where there are no tokens, and so nothing is left out."""
        return self.attended_pairs(window, border) / self.n_tokens**2 if self.n_tokens else 1.0

    def computed_pairs(self, window: Triple, border: str) -> int:
        """Query rows times key rows that the kernel computes, of one head.

        Counts every block that holds a valid token in full, its padding included: 64 query rows, 128 key rows. Blocks
        of padding only are skipped by the kernel and are not counted.
        """
        truncate = as_truncate(border)
        query_blocks = (-(-self.valid // _C.QUERY_BLOCK)).tolist()
        video, extra = query_blocks[: self.n_video_tiles], query_blocks[self.n_video_tiles :]
        blocks = sum(extra) * (self._video_blocks + self._extra_blocks) + sum(
            n * (_C.valid_blocks(self.grid, self.tile, window, truncate, i) + self._extra_blocks)
            for i, n in enumerate(video)
        )
        return blocks * _C.QUERY_BLOCK * _C.BLOCK

    def flops(self, window: Triple, border: str, head_dim: int) -> int:
        """Useful floating-point operations of one head's forward: 4 * head_dim * attended pairs."""
        return 4 * head_dim * self.attended_pairs(window, border)

    @cached_property
    def waste(self) -> float:
        """Rows of all blocks that hold a token, over the number of tokens, less 1. 0 where there are none."""
        if not self.n_tokens:
            return 0.0
        return (self._video_blocks + self._extra_blocks) * _C.BLOCK / self.n_tokens - 1

    @property
    def _video_blocks(self) -> int:
        """128-row blocks of the grid's tiles that hold a token."""
        return _C.valid_blocks(self.grid, self.tile, self.tiles, False, 0) if self.n_video_tiles else 0

    @property
    def _extra_blocks(self) -> int:
        """128-row blocks of the runs that hold a token."""
        return sum(-(-n // _C.BLOCK) for n in (self.prefix_len, self.suffix_len))


@lru_cache(maxsize=64)
def tile_geometry(grid: Triple, tile: Triple, prefix_len: int = 0, suffix_len: int = 0) -> TileGeometry:
    """The `TileGeometry` of a grid, a tile and so many extra tokens, shared between callers."""
    return TileGeometry(grid, tile, prefix_len, suffix_len)
