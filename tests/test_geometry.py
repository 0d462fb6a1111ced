"""The geometry rule against the definitions in brute.py: exhaustive on small grids, random on larger ones."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from brute import axis_keys, legal_windows, tile_mask, tile_tokens, token_mask
from fpsattention import _C
from fpsattention.core.checks import MAX_TOKENS, as_grid, as_tile, shrink_tile
from fpsattention.core.geometry import TileGeometry, tile_geometry

BORDERS = ("clamp", "truncate")
# Every axis of at most 8 tiles, under every legal window.
AXIS_CASES = [(n, w, border) for n in range(1, 9) for w in legal_windows(n) for border in BORDERS]


@pytest.mark.parametrize(("n", "w", "border"), AXIS_CASES)
def test_axis_rule_is_the_definition_and_its_transpose(n, w, border):
    truncate = border == "truncate"
    seen = [axis_keys(i, n, w, border) for i in range(n)]
    assert [list(range(*_C.axis_keys(i, n, w, truncate))) for i in range(n)] == seen
    seen_by = [[i for i in range(n) if j in seen[i]] for j in range(n)]
    assert [list(range(*_C.axis_queries(j, n, w, truncate))) for j in range(n)] == seen_by
    assert all(i in seen[i] for i in range(n)), "a tile sees itself"
    if border == "clamp":
        assert {len(keys) for keys in seen} == {min(w, n)}, "every query tile sees equally many"


SMALL_GRIDS = list(itertools.product((1, 2, 5), (1, 3, 4), (1, 2, 7)))


@pytest.mark.parametrize("tile", [(1, 1, 1), (2, 2, 2), (2, 3, 4), (1, 4, 3), (5, 4, 7), (8, 8, 8)])
def test_slots_hold_every_token_once_in_order(tile):
    for grid in SMALL_GRIDS:
        g = TileGeometry(grid, tile)
        expected = tile_tokens(grid, tile)
        assert g.slot == 128 * math.ceil(math.prod(tile) / 128)
        assert g.slot_tokens.shape == (len(expected), g.slot)
        assert g.slot_tokens.tolist() == [x + [-1] * (g.slot - len(x)) for x in expected]
        assert g.valid.tolist() == [len(x) for x in expected]
        for i, tokens in enumerate(expected):
            assert (g.tile_of_token[tokens] == i).all()


@st.composite
def geometries(draw):
    """(grid, tile, window, border): slots of one to four blocks, up to 7 tiles on an axis, often ragged."""
    tile = draw(st.tuples(*[st.integers(1, 9)] * 3).filter(lambda x: math.prod(x) <= 512))
    tiles = draw(st.tuples(*[st.integers(1, 7)] * 3).filter(lambda x: math.prod(x) <= 60))
    grid = tuple(max(1, t * n - draw(st.integers(0, t - 1))) for t, n in zip(tile, tiles, strict=True))
    if math.prod(grid) > 1500:
        tile, grid = (1, 1, 1), tiles
    window = tuple(draw(st.sampled_from(legal_windows(n))) for n in tiles)
    return grid, tile, window, draw(st.sampled_from(BORDERS))


def check_tile_lists(grid, tile, window, border):
    g = TileGeometry(grid, tile)
    mask = tile_mask(grid, tile, window, border)
    boxes = g.key_boxes(window, border)
    for i in range(g.n_tiles):
        assert g.key_tiles(i, window, border).tolist() == mask[i].nonzero()[:, 0].tolist()
        assert g.query_tiles(i, window, border).tolist() == mask[:, i].nonzero()[:, 0].tolist()
        assert g.tiles_in(boxes[i : i + 1])[0].tolist() == g.key_tiles(i, window, border).tolist()


@settings(max_examples=60, deadline=None)
@given(geometries())
def test_tile_lists_are_the_definition_and_their_transpose(case):
    check_tile_lists(*case)


@pytest.mark.parametrize("border", BORDERS)
@pytest.mark.parametrize("window", list(itertools.product((1, 2, 3), (3, 5), (1, 3, 7))))
def test_tile_lists_near_borders(window, border):
    check_tile_lists((3, 9, 14), (2, 2, 2), window, border)  # 2 x 5 x 7 tiles: "clamp" is not symmetric here


@settings(max_examples=60, deadline=None)
@given(geometries())
def test_counts_are_those_of_the_token_mask(case):
    grid, tile, window, border = case
    g = TileGeometry(grid, tile)
    tokens = token_mask(grid, tile, window, border)
    assert g.attended_pairs(window, border) == int(tokens.sum())
    assert g.density(window, border) == pytest.approx(tokens.double().mean().item(), rel=1e-12)
    assert g.flops(window, border, 64) == 4 * 64 * int(tokens.sum())

    blocks = [-(-len(x) // 128) for x in tile_tokens(grid, tile)]  # blocks that hold a token, of every tile
    per_query_tile = (tile_mask(grid, tile, window, border) * torch.tensor(blocks)).sum(1).tolist()
    rule = _C.TileGrid(grid, tile)
    found = [rule.valid_blocks(window, border == "truncate", i) for i in range(g.n_tiles)]
    assert found == per_query_tile
    query_blocks = [-(-len(x) // 64) for x in tile_tokens(grid, tile)]
    computed = sum(q * k for q, k in zip(query_blocks, per_query_tile, strict=True)) * 64 * 128
    assert g.computed_pairs(window, border) == computed
    assert g.waste == pytest.approx(sum(blocks) * 128 / math.prod(grid) - 1)


def test_blocks_of_padding_only_are_not_counted():
    # Tiles of 512 and of 64 tokens: 4 and 1 blocks of keys, 8 and 1 blocks of queries.
    g = TileGeometry((9, 8, 8), (8, 8, 8))
    assert g.valid.tolist() == [512, 64]
    assert g.computed_pairs((2, 1, 1), "clamp") == (8 + 1) * (4 + 1) * 64 * 128
    assert g.waste == pytest.approx(5 * 128 / 576 - 1)


@settings(max_examples=40, deadline=None)
@given(geometries(), st.tuples(*[st.integers(1, 4)] * 3))
def test_bricks_are_boxes_of_tiles(case, multiple):
    grid, tile, _, _ = case
    quant_tile = tuple(t * m for t, m in zip(tile, multiple, strict=True))
    bricks = TileGeometry(grid, tile).brick_of_tile(quant_tile)
    members = [{r for r in tokens} for tokens in tile_tokens(grid, tile)]
    for brick, tokens in enumerate(tile_tokens(grid, quant_tile)):
        inside = set().union(*(members[i] for i in (bricks == brick).nonzero()[:, 0].tolist()))
        assert inside == set(tokens)


def test_known_densities():
    g = tile_geometry((36, 48, 48), (6, 8, 8))
    assert (g.tiles, g.slot, g.waste) == ((6, 6, 6), 384, 0.0)
    assert g.density((6, 6, 1), "clamp") == pytest.approx(1 / 6)
    wan = tile_geometry((21, 45, 80), (7, 9, 2))
    assert wan.density((3, 3, 9), "clamp") == pytest.approx(3 / 5 * 9 / 40)
    assert wan.waste == pytest.approx(600 * 128 / 75600 - 1)


def test_empty_grid():
    g = TileGeometry((3, 0, 4), (2, 2, 2))
    assert (g.n_tokens, g.n_tiles, g.waste) == (0, 0, 0.0)
    assert g.slot_tokens.shape == (0, 128)
    assert g.tile_of_token.shape == g.valid.shape == g.brick_of_tile((2, 2, 2)).shape == (0,)
    assert g.key_boxes((1, 1, 1), "clamp").shape == (0, 3, 2)
    assert g.attended_pairs((1, 1, 1), "clamp") == g.computed_pairs((1, 1, 1), "clamp") == 0
    assert g.density((1, 1, 1), "clamp") == 1.0


def test_geometry_is_shared():
    assert tile_geometry((4, 4, 4), (2, 2, 2)) is tile_geometry((4, 4, 4), (2, 2, 2))


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: as_grid((21, 45)), ValueError, ["grid", "(21, 45)", "three"]),
        (lambda: as_grid((21, 45, -1)), ValueError, ["grid", "(21, 45, -1)", "at least 0", "(21, 45, 0)"]),
        (lambda: as_grid((21, 45, 8.0)), TypeError, ["grid", "8.0", "integers"]),
        (lambda: as_grid((True, 45, 8)), TypeError, ["grid", "True", "integers"]),
        (lambda: as_grid(75600), TypeError, ["grid", "75600", "three"]),
        (lambda: as_grid("abc"), TypeError, ["grid", "'abc'", "three"]),
        (lambda: as_grid((2048, 1024, 1024)), ValueError, ["grid", str(2**31), str(MAX_TOKENS)]),
        (lambda: as_tile((0, 8, 8)), ValueError, ["tile", "(0, 8, 8)", "at least 1", "(1, 8, 8)"]),
        (lambda: as_tile((8, 8, 9)), ValueError, ["tile", "(8, 8, 9)", "576", "512", "(8, 8, 8)"]),
        (lambda: TileGeometry((4, 4, 4), (2, 2, 2)).coordinates(8), IndexError, ["tile_index", "8"]),
        (lambda: TileGeometry((4, 4, 4), (2, 2, 2)).key_tiles(-1, (1, 1, 1), "clamp"), IndexError, ["-1"]),
        (
            lambda: TileGeometry((4, 4, 4), (2, 2, 2)).density((1, 1, 1), "wrap"),
            ValueError,
            ["border", "'wrap'"],
        ),
    ],
)
def test_errors_say_what_is_wrong_and_what_is_legal(make, error, words):
    with pytest.raises(error) as caught:
        make()
    for word in words:
        assert word in str(caught.value)


@given(st.tuples(*[st.integers(1, 10**6)] * 3))
def test_shrunk_tile_is_legal(tile):
    shrunk = shrink_tile(tile)
    assert as_tile(shrunk) == shrunk
    assert all(a <= b for a, b in zip(shrunk, tile, strict=True))
    assert math.prod(tile) > 512 or shrunk == tile
