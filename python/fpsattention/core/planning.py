"""Choosing a tile: ranks the tiles of any token grid by the padding they cost, and explains the choice."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from .. import _C
from .checks import Triple
from .geometry import tile_geometry

if TYPE_CHECKING:
    pass

# A token of the models this serves is a patch of 1 x 2 x 2 latent pixels; a compact tile is compact in those.
PATCH = (1, 2, 2)

# What a tile may waste more than another and still be preferred, because it is more compact (a window of it
# reaches equally far in every direction) or smaller (finer windows, finer scales).
WASTE_PER_DOUBLED_SURFACE = 0.04
WASTE_PER_DOUBLED_SLOT = 0.02


@dataclass(frozen=True)
class TileChoice:
    """A tile (t, h, w) in tokens for some grid.

    Attributes:
        tile: tokens per axis.
        slot: rows a tile owns in the kernels: 128, 256, 384 or 512.
        tiles: tiles per axis.
        waste: rows computed over tokens, less 1; padding inside 128-row blocks that hold a token.
    """

    tile: Triple
    slot: int
    tiles: Triple
    waste: float


@lru_cache(maxsize=256)
def ranked(grid: Triple, top: int = 3) -> tuple[TileChoice, ...]:
    """Tiles for a grid, best first: `top` of each slot size. Cached."""
    kept: dict[int, list[TileChoice]] = {}
    for choice in sorted(_choices(grid), key=_rank):
        of_slot = kept.setdefault(choice.slot, [])
        if len(of_slot) < top:
            of_slot.append(choice)
    return tuple(sorted((choice for of_slot in kept.values() for choice in of_slot), key=_rank))


def _choices(grid: Triple) -> list[TileChoice]:
    """Every tile that fits in a slot and in the grid (an empty axis counts as one token)."""
    t_max, h_max, w_max = (max(x, 1) for x in grid)
    return [
        _choice(grid, (t, h, w))
        for t in range(1, min(t_max, _C.MAX_SLOT) + 1)
        for h in range(1, min(h_max, _C.MAX_SLOT // t) + 1)
        for w in range(1, min(w_max, _C.MAX_SLOT // (t * h)) + 1)
    ]


def _choice(grid: Triple, tile: Triple) -> TileChoice:
    g = tile_geometry.__wrapped__(grid, tile)  # thousands of tiles: leave the cache to those in use
    return TileChoice(tile, g.slot, g.tiles, g.waste)


def _rank(choice: TileChoice) -> tuple:
    t, h, w = (x * p for x, p in zip(choice.tile, PATCH, strict=True))
    surface = (t * h + h * w + w * t) / (3 * (t * h * w) ** (2 / 3))  # 1 for a cube
    cost = (
        choice.waste
        + WASTE_PER_DOUBLED_SURFACE * math.log2(surface)
        + WASTE_PER_DOUBLED_SLOT * math.log2(choice.slot / _C.BLOCK)
    )
    return round(cost, 9), choice.slot, choice.tile
