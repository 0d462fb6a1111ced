"""Lists as the kernels take them: turned around, and in an order of work."""

from __future__ import annotations

import pytest
import torch

from fpsattention import KeyTiles
from fpsattention.core.tile_lists import in_order_of_work, transposed


@pytest.mark.parametrize("shared", [(2, 3), (1, 3), (1, 1)])
@pytest.mark.parametrize("raster_order", [False, True])
def test_transposed(shared, raster_order, seed):
    generator = torch.Generator().manual_seed(seed)
    n = 7
    masks = torch.rand(*shared, n, n, generator=generator) < 0.4
    masks[..., 2, :] = masks[..., 4] = False
    lists = KeyTiles.of_mask(masks)
    tiles = torch.where(torch.arange(n) < lists.counts[..., None], lists.indices, n + 3)
    keys, queries, places = transposed(tiles, lists.counts, raster_order)
    assert queries.starts is not None and keys.starts is None
    for b in range(shared[0]):
        for h in range(shared[1]):
            entries = queries.tiles[b, h].flatten()
            at_place = places[b, h].flatten()
            for key in range(n):
                start, count = int(queries.starts[b, h, key]), int(queries.counts[b, h, key])
                attending = entries[start : start + count].tolist()
                assert attending == masks[b, h, :, key].nonzero()[:, 0].tolist()
                for query, place in zip(attending, at_place[start : start + count].tolist(), strict=True):
                    assert keys.tiles[b, h, query, place] == key
            if queries.order is not None:
                of_order = queries.counts[b, h][queries.order[b, h].long()].tolist()
                assert of_order == sorted(of_order, reverse=True)
                assert sorted(queries.order[b, h].tolist()) == list(range(n))
    assert (queries.order is None) == raster_order


def test_values_outside_of_the_grid_are_clamped():
    """As the forward does: a tile before the first is the first, one behind the last is the last."""
    tiles = torch.tensor([[[[5, -2], [1, 9]]]], dtype=torch.int32)
    counts = torch.tensor([[[2, 7]]], dtype=torch.int32)
    keys, queries, _ = transposed(tiles, counts, raster_order=True)
    assert keys.tiles.tolist() == [[[[0, 1], [1, 1]]]]
    assert keys.counts.tolist() == [[[2, 2]]]
    assert queries.counts.tolist() == [[[1, 3]]]
    assert queries.tiles.flatten().tolist() == [0, 0, 1, 1]


def test_long_lists_run_first():
    counts = torch.tensor([[[1, 3, 0, 3]]], dtype=torch.int32)
    lists = in_order_of_work(torch.zeros(1, 1, 4, 4, dtype=torch.int32), counts)
    assert lists.order is not None and lists.order.tolist() == [[[1, 3, 0, 2]]]


def test_steps_say_what_is_shared():
    """(batch_step, head_step), in sets of lists."""
    for shared, steps in (((2, 3), (3, 1)), ((1, 3), (0, 1)), ((2, 1), (1, 0)), ((1, 1), (0, 0))):
        tiles = torch.zeros(*shared, 4, 2, dtype=torch.int32)
        lists = in_order_of_work(tiles, torch.zeros(*shared, 4, dtype=torch.int32))
        assert lists.fields[4:] == (2, *steps)
