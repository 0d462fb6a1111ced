"""Python face of the geometry rule: which token sits in which tile, and which tiles a query tile attends.

The rule itself is C++ (include/fpsattention/geometry.h, shared by host and device) and is reached through
`_C`; this module turns its answers into index tensors and counts. All tensors live on the CPU, whatever the default
device; those that are kept are plain tensors, whatever mode torch is in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, lru_cache
from typing import TypeVar

import torch

from .. import _C
from .checks import MAX_TOKENS, Triple, as_grid, as_int, as_tile, as_truncate, shown

T = TypeVar("T")


# torch.compile knows that a symbol is an int, but not what attributes it has, and makes a constant of its index.


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

    Text tokens may lie before the video's (the prefix) and after them (the suffix). Each of
    the two sections is cut, in order, in *runs* of `slot` tokens. A run is a tile of its own, outside the grid:
    it attends everything, and everything attends it. Runs are numbered after the video's tiles, the prefix's first.

    Attributes:
        grid, tile: tokens per axis.
        prefix_len, suffix_len: tokens before and after the video's.
        tiles: number of tiles per axis.
        n_tokens, n_tiles: all tokens and all tiles, the text ones included.
        n_video_tiles: tiles of the grid.
        n_text_tokens: prefix_len + suffix_len.
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
        self.n_text_tokens = self.prefix_len + self.suffix_len
        self.n_tokens = math.prod(self.grid) + self.n_text_tokens
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

    @property
    def n_rows(self) -> int:
        """Rows of all slots, padding included."""
        return self.n_tiles * self.slot

    @_Kept
    def slot_tokens(self) -> torch.Tensor:
        """int64 [n_tiles, slot]: index of the token in each row, -1 for padding."""
        rows = torch.empty(self.n_tiles, self.slot, dtype=torch.int32, device="cpu")
        if self.n_tiles:
            _C.slot_tokens(self.grid, self.tile, self.prefix_len, self.suffix_len, rows.data_ptr())
        return rows.long()

    @_Kept
    def text_tokens(self) -> torch.Tensor:
        """int64 [n_text_tokens], ascending: indices of the prefix's and the suffix's tokens."""
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
        """int64 [n_tiles]: the brick each tile is in; `quant_tile` is a whole multiple of the tile. A run of text
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
        """Query-key pairs of tokens that attend each other, of one head; all text tokens count as valid."""
        pairs = 1  # of the video: the attended set is a product of axes, so the count is too
        for axis, n in enumerate(self.tiles):
            extent = [min(self.tile[axis], self.grid[axis] - i * self.tile[axis]) for i in range(n)]
            keys = self._axis_keys(axis, window, border)
            pairs *= sum(extent[i] * sum(extent[lo:hi]) for i, (lo, hi) in enumerate(keys))
        # Text queries attend all tokens; the video's attend the text keys besides their window.
        return pairs + self.n_text_tokens * (self.n_tokens + math.prod(self.grid))

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
        video, text = query_blocks[: self.n_video_tiles], query_blocks[self.n_video_tiles :]
        blocks = sum(text) * (self._video_blocks + self._text_blocks) + sum(
            n * (_C.valid_blocks(self.grid, self.tile, window, truncate, i) + self._text_blocks)
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
        return (self._video_blocks + self._text_blocks) * _C.BLOCK / self.n_tokens - 1

    @property
    def _video_blocks(self) -> int:
        """128-row blocks of the grid's tiles that hold a token."""
        return _C.valid_blocks(self.grid, self.tile, self.tiles, False, 0) if self.n_video_tiles else 0

    @property
    def _text_blocks(self) -> int:
        """128-row blocks of the runs that hold a token."""
        return sum(-(-n // _C.BLOCK) for n in (self.prefix_len, self.suffix_len))


@lru_cache(maxsize=64)
def tile_geometry(grid: Triple, tile: Triple, prefix_len: int = 0, suffix_len: int = 0) -> TileGeometry:
    """The `TileGeometry` of a grid, a tile and so many text tokens, shared between callers."""
    return TileGeometry(grid, tile, prefix_len, suffix_len)
