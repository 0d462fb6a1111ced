"""Lists of tiles as the kernels take them: in an order of work, and turned around for the backward.

All of it has fixed shapes and runs on the lists' device without a wait for it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class TileLists(NamedTuple):
    """`TileLists` of include/fpsattention/params.h: int32 tensors, contiguous.

    The leading two axes, samples and heads, are each 1 where all share the lists.
    """

    tiles: Tensor  # [B | 1, H | 1, n, capacity]
    counts: Tensor  # [B | 1, H | 1, n]
    starts: Tensor | None  # [B | 1, H | 1, n]; None: a list starts at its tile's row
    order: Tensor | None  # [B | 1, H | 1, n]; None: raster order

    @property
    def fields(self) -> tuple[int, int, int, int, int, int, int]:
        """Addresses and sizes, as the launch parameters take them."""
        addresses = (0 if x is None else x.data_ptr() for x in self)
        samples, heads, _, capacity = self.tiles.shape
        tiles, counts, starts, order = addresses
        return (
            tiles, counts, starts, order, capacity, heads if samples > 1 else 0, 1 if heads > 1 else 0
        )  # fmt: skip


class Transposed(NamedTuple):
    """The lists of a backward: those of the forward, ascending, and those of each key tile."""

    keys: TileLists
    queries: TileLists
    places: Tensor  # int32, as queries.tiles: the key tile's place in its query tile's list of `keys`


def in_order_of_work(tiles: Tensor, counts: Tensor) -> TileLists:
    """Lists with the long ones first, so that the last CTAs are short."""
    return TileLists(tiles, counts, None, _long_first(counts))


def transposed(tiles: Tensor, counts: Tensor, raster_order: bool) -> Transposed:
    """The lists turned around. Query tiles ascend in each.

    Args:
        raster_order: key blocks run in raster order, as turns ask for; else those with long lists run first.
    """
    n, capacity = tiles.shape[-2:]
    number = torch.arange(capacity, device=tiles.device)
    # Entries that do not count become n, behind all tiles.
    keys = torch.where(number < counts[..., None], tiles.clamp(0, n - 1), n).sort(-1).values
    found, entries = keys.flatten(-2).sort(stable=True)
    every_tile = torch.arange(n + 1, device=tiles.device, dtype=torch.int32)
    ends = torch.searchsorted(found, every_tile.expand(*found.shape[:-1], -1).contiguous(), out_int32=True)
    starts, of_keys = ends[..., :-1].contiguous(), ends.diff(dim=-1)
    queries = (entries // capacity).to(torch.int32).view_as(tiles)
    places = (entries % capacity).to(torch.int32)
    order = None if raster_order else _long_first(of_keys)
    return Transposed(
        TileLists(keys, counts.clamp(0, capacity), None, None),
        TileLists(queries, of_keys, starts, order),
        places,
    )


def _long_first(counts: Tensor) -> Tensor:
    return counts.argsort(dim=-1, descending=True, stable=True).to(torch.int32)
