"""Geometry of tiles and windows: the tile of each token, and the key tiles that each query tile attends.

The rule itself is C++ (include/fpsattention/geometry.h, shared by host and device). This module makes index tensors and
counts from what `_C` returns. All tensors live on the CPU, whatever the default device. Cached ones are plain tensors,
whatever mode torch is in.
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


def apart(make: Callable[..., T], *args: object) -> T:
    """`make(*args)` in a thread of its own, for tensors that outlive the call.

    torch's modes belong to a thread. They would make new tensors fake, meta or inference tensors, or wrap them for
    torch.func. A new thread has no mode.
    """
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(make, *args).result()


class _Kept(cached_property[torch.Tensor]):
    """A tensor computed once, by `apart`."""

    def __init__(self, compute: Callable[[TileGeometry], torch.Tensor]) -> None:
        super().__init__(lambda instance: apart(compute, instance))
        self.__doc__ = compute.__doc__


# Counts in arithmetic that is symbolic where the sizes are, as under torch.compile.


def slot_of(tile: Sequence[int]) -> int:
    """Rows that a tile owns: its tokens, rounded up to whole blocks."""
    return -(-math.prod(tile) // _C.BLOCK) * _C.BLOCK


def tiles_per_axis(grid: Sequence[int], tile: Sequence[int]) -> Triple:
    """Tiles of a grid on each axis, ragged ones included."""
    t, h, w = (-(-n // size) for n, size in zip(grid, tile, strict=True))
    return t, h, w


def text_tiles(slot: int, prefix_len: int, suffix_len: int) -> int:
    """Text tiles of both sections."""
    return -(-prefix_len // slot) - (-suffix_len // slot)


def brick_count(
    grid: Sequence[int], tile: Sequence[int], quant_tile: Sequence[int], n_text_tiles: int
) -> int:
    """Bricks of a grid's tiles, and text tiles, each of which is a brick of its own."""
    tiles = tiles_per_axis(grid, tile)
    return n_text_tiles + math.prod(
        -(-n // (brick // size)) for n, brick, size in zip(tiles, quant_tile, tile, strict=True)
    )


class TileGeometry:
    """A token grid (T, H, W) cut in tiles of (t, h, w) tokens. Get one from `tile_geometry`, which caches.

    Tiles at the edge may be ragged. Tiles are numbered in raster order. A tile owns `slot` rows: its tokens first, in
    raster order, then padding. Windows are (wt, wh, ww) in tiles, each odd or at least the number of tiles on its axis.
    `border` is "clamp" or "truncate" (Sliding Tile Attention, arXiv 2502.04507; FPSAttention, arXiv 2506.04648, Eq. 2).

    Text tokens may precede the video tokens (the prefix) and follow them (the suffix). Each of the two sections is cut
    in *text tiles* of `slot` tokens, the last of which may hold fewer. A text tile lies outside the grid: it attends
    everything, and everything attends it. Text tiles are numbered after the video's tiles, those of the prefix first.

    Attributes:
        grid, tile: tokens per axis.
        prefix_len, suffix_len: text tokens before and after the video tokens.
        tiles: tiles of the grid per axis.
        n_tokens, n_tiles: all tokens and all tiles, those of the text included.
        n_video_tiles: tiles of the grid.
        n_text_tokens: prefix_len + suffix_len.
        slot: rows per tile: 128, 256, 384 or 512.
        blocks_per_tile, n_blocks: key blocks, of 128 rows, per slot and in all; those of padding count.
    """

    def __init__(
        self, grid: Sequence[int], tile: Sequence[int], prefix_len: int = 0, suffix_len: int = 0
    ) -> None:
        self.grid = as_grid(grid)
        self.tile = as_tile(tile)
        self.prefix_len = as_int("prefix_len", prefix_len, 0)
        self.suffix_len = as_int("suffix_len", suffix_len, 0)
        self.tiles = tiles_per_axis(self.grid, self.tile)
        self.n_text_tokens = self.prefix_len + self.suffix_len
        self.n_tokens = math.prod(self.grid) + self.n_text_tokens
        if self.n_tokens > MAX_TOKENS:
            raise ValueError(
                f"prefix_len: {shown(self.prefix_len)} and suffix_len {shown(self.suffix_len)} make "
                f"{shown(self.n_tokens)} tokens with grid {self.grid}, at most {MAX_TOKENS} are possible"
            )
        self.slot = slot_of(self.tile)
        self.blocks_per_tile = self.slot // _C.BLOCK
        self.n_video_tiles = math.prod(self.tiles)
        self.n_tiles = self.n_video_tiles + text_tiles(self.slot, self.prefix_len, self.suffix_len)
        self.n_blocks = self.n_tiles * self.blocks_per_tile

    @property
    def _rule(self) -> _C.TileGrid:
        return _C.TileGrid(self.grid, self.tile, self.prefix_len, self.suffix_len)

    @property
    def n_rows(self) -> int:
        """Rows of all slots, including padding."""
        return self.n_tiles * self.slot

    @_Kept
    def slot_tokens(self) -> torch.Tensor:
        """int64 [n_tiles, slot]: index of the token in each row, -1 for padding."""
        rows = torch.empty(self.n_tiles, self.slot, dtype=torch.int32, device="cpu")
        if self.n_tiles:
            self._rule.slot_tokens(rows.data_ptr())
        return rows.long()

    @_Kept
    def text_tokens(self) -> torch.Tensor:
        """int64 [n_text_tokens], ascending: indices of the text tokens."""
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

    @_Kept
    def block_of_token(self) -> torch.Tensor:
        """int64 [n_tokens]: the key block of each token."""
        row_in_tile = torch.arange(self.slot, device="cpu").expand(self.n_tiles, -1)
        is_token = self.slot_tokens >= 0
        out = self.tile_of_token * self.blocks_per_tile
        out[self.slot_tokens[is_token]] += row_in_tile[is_token] // _C.BLOCK
        return out

    def n_bricks(self, quant_tile: Sequence[int]) -> int:
        """Number of bricks: boxes of `quant_tile` tokens in the grid, and one for each text tile."""
        n_text_tiles = self.n_tiles - self.n_video_tiles
        return brick_count(self.grid, self.tile, quant_tile, n_text_tiles)

    def brick_of_tile(self, quant_tile: Sequence[int]) -> torch.Tensor:
        """int64 [n_tiles]: the brick of each tile. `quant_tile` is a whole multiple of the tile.

        A text tile is a brick of its own, numbered after those of the grid.
        """
        per_axis = [
            torch.arange(n, device="cpu") // (b // t)
            for n, b, t in zip(self.tiles, quant_tile, self.tile, strict=True)
        ]
        bricks = [int(x[-1]) + 1 if len(x) else 0 for x in per_axis]
        t, h, w = torch.meshgrid(*per_axis, indexing="ij")
        video = ((t * bricks[1] + h) * bricks[2] + w).reshape(-1)
        text_tiles = torch.arange(self.n_tiles - self.n_video_tiles, device="cpu")
        return torch.cat([video, math.prod(bricks) + text_tiles])

    def coordinates(self, tile_index: int) -> Triple:
        """Coordinates (t, h, w) of a tile of the grid. Raises IndexError if there is no such tile."""
        if not 0 <= tile_index < self.n_video_tiles:
            raise IndexError(f"tile_index: {shown(tile_index)} must be in [0, {self.n_video_tiles})")
        rest, w = divmod(tile_index, self.tiles[2])
        t, h = divmod(rest, self.tiles[1])
        return t, h, w

    def _axis_keys(self, axis: int, window: Triple, border: str) -> list[list[int]]:
        """The range [lo, hi) of key tiles on an axis, for each query tile on it."""
        n, truncate = self.tiles[axis], as_truncate(border)
        return [_C.axis_keys(i, n, window[axis], truncate) for i in range(n)]

    def key_boxes(self, window: Triple, border: str) -> torch.Tensor:
        """int64 [n_video_tiles, 3, 2]: range [lo, hi) of key tiles on each axis, for each tile of the grid."""
        keys = (self._axis_keys(axis, window, border) for axis in range(3))
        per_axis = [torch.tensor(x, dtype=torch.int64, device="cpu").reshape(-1, 2) for x in keys]
        index = torch.meshgrid(*(torch.arange(n, device="cpu") for n in self.tiles), indexing="ij")
        return torch.stack([x[i.reshape(-1)] for x, i in zip(per_axis, index, strict=True)], dim=1)

    def tiles_in(self, boxes: torch.Tensor) -> torch.Tensor:
        """int64 [n, tiles of a box], ascending: the tiles in `boxes` [n, 3, 2], which have equally many."""
        first, sizes = boxes[..., 0, None], (boxes[..., 1] - boxes[..., 0])[..., None]
        rest = torch.arange(int(sizes[0].prod()), device="cpu")
        t, h, w = rest // (sizes[:, 1] * sizes[:, 2]), rest // sizes[:, 2] % sizes[:, 1], rest % sizes[:, 2]
        _, n_h, n_w = self.tiles
        return ((first[:, 0] + t) * n_h + first[:, 1] + h) * n_w + first[:, 2] + w

    def key_tiles(self, query_tile: int, window: Triple, border: str) -> torch.Tensor:
        """int64 [n], ascending: the key tiles that `query_tile` attends."""
        return self._box(query_tile, window, border, _C.axis_keys)

    def query_tiles(self, key_tile: int, window: Triple, border: str) -> torch.Tensor:
        """int64 [n], ascending: the query tiles that attend `key_tile` (the transpose of `key_tiles`)."""
        return self._box(key_tile, window, border, _C.axis_queries)

    def _box(
        self, tile_index: int, window: Triple, border: str, axis_rule: Callable[..., list[int]]
    ) -> torch.Tensor:
        truncate = as_truncate(border)
        if self.n_video_tiles <= tile_index < self.n_tiles:
            return torch.arange(self.n_tiles, device="cpu")
        box = [
            axis_rule(i, n, w, truncate)
            for i, n, w in zip(self.coordinates(tile_index), self.tiles, window, strict=True)
        ]
        text_tiles = torch.arange(self.n_video_tiles, self.n_tiles, device="cpu")
        return torch.cat([self.tiles_in(torch.tensor([box], device="cpu"))[0], text_tiles])

    def tile_mask(self, window: Triple, border: str) -> torch.Tensor:
        """bool [n_tiles, n_tiles]: True where the query tile (row) attends the key tile (column)."""
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
        """Attended query-key pairs of tokens of one head. All text tokens count as valid."""
        pairs = 1  # of video tokens: a tile's keys are a box, so the count is a product over the axes
        for axis, n in enumerate(self.tiles):
            extent = [min(self.tile[axis], self.grid[axis] - i * self.tile[axis]) for i in range(n)]
            keys = self._axis_keys(axis, window, border)
            pairs *= sum(extent[i] * sum(extent[lo:hi]) for i, (lo, hi) in enumerate(keys))
        # Text queries attend all tokens. Video queries attend all text keys, besides their window.
        return pairs + self.n_text_tokens * (self.n_tokens + math.prod(self.grid))

    def density(self, window: Triple, border: str) -> float:
        """Attended pairs as a fraction of all pairs; 1.0 for an empty grid without text tokens."""
        return self.attended_pairs(window, border) / self.n_tokens**2 if self.n_tokens else 1.0

    def computed_pairs(self, window: Triple, border: str) -> int:
        """Query rows times key rows that the kernel computes for one head.

        A block that holds a token counts in full, with its padding: 64 query rows, 128 key rows. Blocks of padding only
        do not count, since the kernel skips them.
        """
        rule, truncate = self._rule, as_truncate(border)
        query_blocks = (-(-self.valid // _C.QUERY_BLOCK)).tolist()
        video, text = query_blocks[: self.n_video_tiles], query_blocks[self.n_video_tiles :]
        blocks = sum(text) * (self._video_blocks + self._text_blocks) + sum(
            n * (rule.valid_blocks(window, truncate, i) + self._text_blocks) for i, n in enumerate(video)
        )
        return blocks * _C.QUERY_BLOCK * _C.BLOCK

    def flops(self, window: Triple, border: str, head_dim: int) -> int:
        """Useful floating-point operations of one head's forward: 4 * head_dim * attended pairs."""
        return 4 * head_dim * self.attended_pairs(window, border)

    @cached_property
    def waste(self) -> float:
        """Rows of the 128-row blocks that hold a token, over the number of tokens, less 1; 0 without tokens."""
        if not self.n_tokens:
            return 0.0
        return (self._video_blocks + self._text_blocks) * _C.BLOCK / self.n_tokens - 1

    @property
    def _video_blocks(self) -> int:
        """128-row blocks of the grid's tiles that hold a token."""
        return self._rule.valid_blocks(self.tiles, False, 0) if self.n_video_tiles else 0

    @property
    def _text_blocks(self) -> int:
        """128-row blocks of the text tiles that hold a token."""
        return sum(-(-n // _C.BLOCK) for n in (self.prefix_len, self.suffix_len))


@lru_cache(maxsize=64)
def tile_geometry(grid: Triple, tile: Triple, prefix_len: int = 0, suffix_len: int = 0) -> TileGeometry:
    """The `TileGeometry` of a grid, a tile and text lengths. Cached, so callers share it."""
    return TileGeometry(grid, tile, prefix_len, suffix_len)
