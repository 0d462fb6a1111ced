"""Choice of a tile: rank the tiles of a token grid by padding, or by the expected time under a window."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

from .. import _C
from .checks import Triple
from .geometry import tile_geometry

# Latent pixels (t, h, w) of a token in most video models. Compactness is measured in latent pixels.
PATCH = (1, 2, 2)

# Padding or time, as a fraction, that is accepted for a tile that is more compact (its windows reach equally far in
# every direction) or smaller (finer windows, finer scales), and for a window nearer to the one wanted (`_miss`).
COST_OF_DOUBLED_SURFACE = 0.04
COST_OF_DOUBLED_SLOT = 0.02
COST_OF_MISS = 0.2

# Expected time of a forward: about that of kernel version 18 on an H200. Ranks depend on the ratios only.
CTAS = 132  # work items computed at the same time, one on each SM
# By head_dim and query blocks of a work item: microseconds for a key block of the item, full or not.
KEY_BLOCK_US = {(64, 2): 0.62, (64, 3): 0.80, (128, 2): 0.88}
ITEM_OVERHEAD = 2.5  # in key blocks: an item's loads of queries and of the first keys, and its stores
QUANTIZE_BYTES_PER_US = 4.09e6  # `quantize_bytes`
LAUNCHES_US = 8.0


@dataclass(frozen=True)
class TileChoice:
    """A tile for some grid, and a window for the tile if `plan` was asked for one.

    Attributes:
        tile: tokens (t, h, w) per axis.
        slot: rows of a tile in the kernels: 128, 256, 384 or 512.
        tiles: tiles per axis.
        waste: rows of the 128-row blocks that hold a token, over the number of tokens, less 1.
        window: the legal window, in tiles (t, h, w), nearest to the one wanted; None if none was.
        density: attended pairs of tokens under `window`, as a fraction of all pairs; None without a window.
        slowdown: expected time of a forward, quantisation included, over that of the fastest tile of the grid, both at
            the density wanted; None without a window.
    """

    tile: Triple
    slot: int
    tiles: Triple
    waste: float
    window: Triple | None = None
    density: float | None = None
    slowdown: float | None = None


class Wanted(NamedTuple):
    """A window for which to rank tiles, and the call that it is for.

    Attributes:
        reach: tokens (t, h, w) of the window. Where it is at least the grid's, the window is the whole axis.
        truncate: whether it is cut at the grid's edge.
        heads, head_dim: of the call, at batch 1.
    """

    reach: tuple[float, float, float]
    truncate: bool
    heads: int
    head_dim: int


def reach_of(grid: Triple, density: float, truncate: bool) -> tuple[float, float, float]:
    """Tokens (t, h, w) of a window with this density: a cube of latent pixels, cut to the grid."""

    def cube(side: float) -> tuple[float, float, float]:
        t, h, w = (min(float(g), side / p) for g, p in zip(grid, PATCH, strict=True))
        return t, h, w

    low, high = 0.0, float(max(g * p for g, p in zip(grid, PATCH, strict=True)))
    for _ in range(50):
        side = (low + high) / 2
        low, high = (side, high) if math.prod(_seen(grid, cube(side), truncate)) < density else (low, side)
    return cube(high)


def _seen(grid: Triple, reach: Sequence[float], truncate: bool) -> list[float]:
    """Mean fraction of each axis that a query sees in a window of `reach` tokens."""

    def on_axis(reach: float, n: int) -> float:
        if reach >= n:
            return 1.0
        seen = reach / n
        return seen - seen**2 / 4 if truncate else seen  # at the ends, half of a window may be cut

    return [on_axis(r, n) for r, n in zip(reach, grid, strict=True)]


@lru_cache(maxsize=256)
def ranked(grid: Triple, top: int = 3, wanted: Wanted | None = None) -> tuple[TileChoice, ...]:
    """The `top` best tiles of each slot size for a grid, all sorted best first. Cached.

    Without `wanted` tiles are ranked by padding; with it by expected time, each under its window nearest to `wanted`.
    An empty grid has no times.
    """
    if wanted is None or 0 in grid:
        costs = [(choice.waste, choice) for choice in _choices(grid)]
    else:
        costs = _time_costs(grid, wanted)
    kept: Counter[int] = Counter()
    best = []
    for _, choice in sorted((_rank(cost, choice), choice) for cost, choice in costs):
        kept[choice.slot] += 1
        if kept[choice.slot] <= top:
            best.append(choice)
    return tuple(best)


def _rank(cost: float, choice: TileChoice) -> tuple[float, int, Triple]:
    """Sort key: `cost` and that of the tile's shape and size, then the slot and the tile to break ties."""
    t, h, w = (x * p for x, p in zip(choice.tile, PATCH, strict=True))
    surface = (t * h + h * w + w * t) / (3 * (t * h * w) ** (2 / 3))  # 1 for a cube
    cost += COST_OF_DOUBLED_SURFACE * math.log2(surface)
    cost += COST_OF_DOUBLED_SLOT * math.log2(choice.slot / _C.BLOCK)
    return round(cost, 9), choice.slot, choice.tile


def _choices(grid: Triple) -> list[TileChoice]:
    """All tiles that fit in a slot and in the grid. An axis of 0 tokens counts as one."""
    t_max, h_max, w_max = (max(x, 1) for x in grid)
    return [
        _choice(grid, (t, h, w))
        for t in range(1, min(t_max, _C.MAX_SLOT) + 1)
        for h in range(1, min(h_max, _C.MAX_SLOT // t) + 1)
        for w in range(1, min(w_max, _C.MAX_SLOT // (t * h)) + 1)
    ]


def _choice(grid: Triple, tile: Triple) -> TileChoice:
    g = tile_geometry.__wrapped__(grid, tile)  # past the cache, which thousands of tiles would flush
    return TileChoice(tile, g.slot, g.tiles, g.waste)


# ---- Under a window ----


# Tiles of one axis, or of a box, as pairs (number of tiles, tokens of each). Only the last tile of an axis is ragged.
Tiles = tuple[tuple[int, int], ...]


class AxisGroups(NamedTuple):
    """Tile groups on one axis with equal query tiles.

    Attributes:
        number: how many groups these are.
        queries: query tiles of one group.
        keys: key tiles that the groups see, added up over them.
    """

    number: int
    queries: Tiles
    keys: Tiles


class AxisWindow(NamedTuple):
    """A window of `tiles` on one axis, the fraction of the axis that a query sees on average, and all tile groups."""

    tiles: int
    seen: float
    groups: tuple[AxisGroups, ...]


@lru_cache(maxsize=1 << 14)
def _axis_window(grid: int, tile: int, window: int, truncate: bool) -> AxisWindow:
    n = -(-grid // tile)

    def tokens_of(lo: int, hi: int) -> Counter[int]:
        """Number of tiles of each size in [lo, hi)."""
        rest = grid % tile if lo < hi == n else 0
        return Counter({tile: hi - lo - (rest > 0)}) + Counter({rest: 1} if rest else {})

    # Along an axis that the window covers, tiles form one group.
    queries = [(0, n)] if window >= n else [(i, i + 1) for i in range(n)]
    counts: Counter[Tiles] = Counter()
    keys: dict[Tiles, Counter[int]] = {}
    for lo, hi in queries:
        group = _as_tiles(tokens_of(lo, hi))
        counts[group] += 1
        keys.setdefault(group, Counter()).update(tokens_of(*_C.axis_keys(lo, n, window, truncate)))
    groups = tuple(AxisGroups(count, group, _as_tiles(keys[group])) for group, count in counts.items())
    pairs = sum(_tokens(group.queries) * _tokens(group.keys) for group in groups)
    return AxisWindow(window, pairs / grid**2, groups)


def _as_tiles(tokens: Counter[int]) -> Tiles:
    return tuple((n, size) for size, n in tokens.items())


def _tokens(tiles: Tiles) -> int:
    return sum(n * tokens for n, tokens in tiles)


def _box(axes: Iterable[Tiles]) -> Tiles:
    """The tiles of a box, given those on each axis."""
    return tuple(
        (math.prod(n for n, _ in kind), math.prod(tokens for _, tokens in kind))
        for kind in itertools.product(*axes)
    )


def _near(grid: int, tile: int, reach: float, truncate: bool) -> list[AxisWindow]:
    """The legal windows on either side of `reach` tokens on one axis."""
    n = -(-grid // tile)
    if reach >= grid:
        return [_axis_window(grid, tile, n, truncate)]
    odd = max(1, (int(reach / tile) + 1) // 2 * 2 - 1)  # the largest within the reach, at least 1
    return [_axis_window(grid, tile, w, truncate) for w in sorted({min(odd, n), min(odd + 2, n)})]


def _miss(axes: Sequence[AxisWindow], wanted: Sequence[float]) -> float:
    """Distance from the window wanted: 1 for twice its density, or for four times the ratio of one axis to another."""
    ratios = [axis.seen / seen for axis, seen in zip(axes, wanted, strict=True)]
    return abs(math.log2(math.prod(ratios))) + 0.5 * math.log2(max(ratios) / min(ratios))


def _time_costs(grid: Triple, wanted: Wanted) -> list[tuple[float, TileChoice]]:
    """All tiles, each under its legal window nearest to `wanted`, with the cost of its time and of the miss."""
    seen = _seen(grid, wanted.reach, wanted.truncate)
    found = []
    for choice in _choices(grid):
        per_axis = zip(grid, choice.tile, wanted.reach, strict=True)
        windows = itertools.product(*(_near(n, tile, reach, wanted.truncate) for n, tile, reach in per_axis))
        axes = min(windows, key=lambda axes: _miss(axes, seen))
        found.append((choice, axes, _forward_us(grid, choice, axes, math.prod(seen), wanted)))
    fastest = min(us for _, _, us in found)
    costs = []
    for choice, axes, us in found:
        t, h, w = (axis.tiles for axis in axes)
        density = math.prod(axis.seen for axis in axes)
        choice = replace(choice, window=(t, h, w), density=density, slowdown=us / fastest)
        costs.append((us / fastest + COST_OF_MISS * _miss(axes, seen), choice))
    return costs


def _forward_us(
    grid: Triple, choice: TileChoice, axes: Sequence[AxisWindow], density: float, wanted: Wanted
) -> float:
    """Expected microseconds of a forward, quantisation included, if the window had this density."""
    blocks_per_item = _blocks_per_item(choice, axes, wanted.head_dim)
    items = key_blocks = 0  # of one head; key blocks are those of all its items
    for groups in itertools.product(*(axis.groups for axis in axes)):
        per_group = _items(_box(group.queries for group in groups), choice.slot, blocks_per_item)
        items += per_group * math.prod(group.number for group in groups)
        keys = _box(group.keys for group in groups)
        key_blocks += per_group * sum(n * -(-tokens // _C.BLOCK) for n, tokens in keys)
    per_item = key_blocks / items * density / math.prod(axis.seen for axis in axes)
    rounds = -(-items * wanted.heads // CTAS)  # the last one may leave CTAs idle
    of_128 = KEY_BLOCK_US[128, 2]  # the kernels have no head_dim but those of the table
    block_us = KEY_BLOCK_US.get((wanted.head_dim, blocks_per_item), of_128)
    rows = math.prod(choice.tiles) * choice.slot
    quantize_us = quantize_bytes(math.prod(grid), rows, wanted.heads, wanted.head_dim) / QUANTIZE_BYTES_PER_US
    return rounds * (ITEM_OVERHEAD + per_item) * block_us + quantize_us + LAUNCHES_US


def quantize_bytes(tokens: int, rows: int, heads: int, head_dim: int) -> int:
    """Bytes that the quantisation of 16-bit Q, K and V must read, and write in packed blocks of `rows` rows a head."""
    q_blocks, kv_blocks = rows // _C.QUERY_BLOCK, rows // _C.BLOCK
    packed = q_blocks * _C.q_block_bytes(head_dim) + kv_blocks * _C.kv_block_bytes(head_dim)
    return heads * (3 * 2 * tokens * head_dim + packed)


def _blocks_per_item(choice: TileChoice, axes: Sequence[AxisWindow], head_dim: int) -> int:
    """Query blocks of a work item, at most. All tile groups of a grid have equally many tiles."""
    tiles = math.prod(sum(n for n, _ in axis.groups[0].queries) for axis in axes)
    return _C.blocks_per_item(head_dim, tiles * (choice.slot // _C.QUERY_BLOCK))


def _items(tiles: Tiles, slot: int, blocks_per_item: int) -> int:
    """Work items of a tile group that hold a token. The first blocks of all tiles come first, then the second blocks.

    Tiles that lack a block are taken to be the last ones.
    """
    n_tiles, items, end = sum(n for n, _ in tiles), 0, 0
    for block in range(slot // _C.QUERY_BLOCK):
        first = block * n_tiles
        holding = sum(n for n, tokens in tiles if tokens > block * _C.QUERY_BLOCK)
        if holding:
            begin, end = max(end, first // blocks_per_item), -(-(first + holding) // blocks_per_item)
            items += end - begin
    return items
