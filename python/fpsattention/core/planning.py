"""Choice of a tile: rank the tiles of a token grid by the padding that they cost."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from .. import _C
from .checks import Triple
from .geometry import tile_geometry

# Latent pixels (t, h, w) of a token in most video models. Compactness is measured in latent pixels.
PATCH = (1, 2, 2)

# Extra waste accepted for a tile that is more compact (its windows reach equally far in every direction) or smaller
# (finer windows, finer scales).
WASTE_PER_DOUBLED_SURFACE = 0.04
WASTE_PER_DOUBLED_SLOT = 0.02


@dataclass(frozen=True)
class TileChoice:
    """A tile for some grid.

    Attributes:
        tile: tokens (t, h, w) per axis.
        slot: rows of a tile in the kernels: 128, 256, 384 or 512.
        tiles: tiles per axis.
        waste: rows of the 128-row blocks that hold a token, over the number of tokens, less 1.
    """

    tile: Triple
    slot: int
    tiles: Triple
    waste: float


@lru_cache(maxsize=256)
def ranked(grid: Triple, top: int = 3) -> tuple[TileChoice, ...]:
    """The `top` best tiles of each slot size for a grid, all sorted best first. Cached."""
    kept: dict[int, list[TileChoice]] = {}
    for choice in sorted(_choices(grid), key=_rank):
        of_slot = kept.setdefault(choice.slot, [])
        if len(of_slot) < top:
            of_slot.append(choice)
    return tuple(sorted((choice for of_slot in kept.values() for choice in of_slot), key=_rank))


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


def _rank(choice: TileChoice) -> tuple[float, int, Triple]:
    """Sort key: the cost, then the slot and the tile to break ties."""
    t, h, w = (x * p for x, p in zip(choice.tile, PATCH, strict=True))
    surface = (t * h + h * w + w * t) / (3 * (t * h * w) ** (2 / 3))  # 1 for a cube
    cost = (
        choice.waste
        + WASTE_PER_DOUBLED_SURFACE * math.log2(surface)
        + WASTE_PER_DOUBLED_SLOT * math.log2(choice.slot / _C.BLOCK)
    )
    return round(cost, 9), choice.slot, choice.tile
