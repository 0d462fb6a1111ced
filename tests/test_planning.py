"""plan(): the ranking of tiles, and the text of Plan.explain."""

import math
from collections import Counter, defaultdict
from unittest.mock import Mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from brute import tile_tokens
from fpsattention import _C
from fpsattention.core import planning, support
from fpsattention.core.config import AttentionConfig
from fpsattention.core.explain import plan
from fpsattention.core.geometry import TileGeometry
from fpsattention.core.planning import PATCH


@pytest.mark.parametrize(
    ("grid", "tile", "slot", "waste"),
    [
        ((21, 45, 80), (7, 9, 2), 128, 0.0159),  # Wan 720p; the 6 x 8 x 8 tile of STA wastes 22 %
        ((36, 48, 48), (4, 4, 8), 128, 0.0),
        ((28, 30, 53), (7, 3, 6), 128, 0.0350),  # Mochi 480 x 848
        ((1, 1, 1), (1, 1, 1), 128, 127.0),
    ],
)
def test_known_answers(grid, tile, slot, waste):
    best = plan(grid).best
    assert (best.tile, best.slot) == (tile, slot)
    assert best.waste == pytest.approx(waste, abs=5e-5)


def compactness(tile):
    t, h, w = (x * p for x, p in zip(tile, PATCH, strict=True))
    return (t * h + h * w + w * t) / (t * h * w) ** (2 / 3)


@settings(max_examples=30, deadline=None)
@given(st.tuples(*[st.integers(1, 12)] * 3).filter(lambda x: math.prod(x) <= 500))
def test_candidates_are_described_truly_and_none_beats_the_best_in_everything(grid):
    result = plan(grid, top=4)
    assert result.best is result.candidates[0]
    assert len({c.tile for c in result.candidates}) == len(result.candidates)
    for c in result.candidates:
        valid = [len(tokens) for tokens in tile_tokens(grid, c.tile)]
        assert c.slot == 128 * math.ceil(math.prod(c.tile) / 128)
        assert c.tiles == tuple(-(-g // t) for g, t in zip(grid, c.tile, strict=True))
        assert c.waste == pytest.approx(sum(128 * math.ceil(n / 128) for n in valid) / math.prod(grid) - 1)
    best = result.best
    for c in result.candidates[1:]:
        better = (best.waste - c.waste, best.slot - c.slot, compactness(best.tile) - compactness(c.tile))
        assert min(better) <= 1e-9


def test_every_slot_size_is_offered():
    result = plan((21, 45, 80), top=2)
    assert sorted(c.slot for c in result.candidates) == [128, 128, 256, 256, 384, 384, 512, 512]


def test_waste_of_the_best_is_small_on_the_grids_of_video_models():
    grids = [(21, 30, 52), (21, 45, 80), (31, 22, 40), (33, 45, 80), (33, 34, 60), (31, 45, 80), (28, 30, 53)]
    assert all(plan(grid).best.waste < 0.055 for grid in grids)


def test_the_work_does_not_grow_with_the_grid(monkeypatch):
    """Tiles are limited by the slot once the grid is larger than any tile."""
    looked_at = Mock(wraps=planning._choice)
    monkeypatch.setattr(planning, "_choice", looked_at)
    grids = (512, 512, 512), (1200, 1200, 1200)
    for grid in grids:
        assert plan(grid, top=1).grid == grid
    seen = Counter(call.args[0] for call in looked_at.call_args_list)
    assert seen[grids[0]] == seen[grids[1]] > 0


@pytest.mark.parametrize("wanted", [{}, {"density": 0.5}, {"reach": (1, 2, 2)}], ids=str)
def test_empty_grid(wanted):
    result = plan((0, 4, 4), **wanted)
    assert result.best.waste == 0.0
    assert result.best.tiles[0] == 0
    assert result.best.window is result.best.density is result.best.slowdown is None
    assert "0 tokens" in result.explain()


def blocks_of(geometry, tile, rows):
    return math.ceil(geometry.valid[tile].item() / rows)


def brute_items(geometry, window, border, head_dim):
    """Of every work item of one head: its query blocks, the places for them, its key blocks. Counted tile by tile."""
    groups = defaultdict(list)
    for tile in range(geometry.n_tiles):
        groups[
            tuple(geometry.key_tiles(tile, window, border).tolist()), one_of(geometry, tile, window)
        ].append(tile)
    for (keys, _), tiles in groups.items():
        tiles.sort(key=lambda tile: -geometry.valid[tile].item())
        holds = [
            block < blocks_of(geometry, tile, _C.QUERY_BLOCK)
            for block in range(geometry.slot // _C.QUERY_BLOCK)
            for tile in tiles
        ]
        key_blocks = sum(blocks_of(geometry, tile, _C.BLOCK) for tile in keys)
        places = _C.blocks_per_item(head_dim, len(holds))
        for first in range(0, len(holds), places):
            if queries := sum(holds[first : first + places]):
                yield queries, places, key_blocks


def one_of(geometry, tile, window):
    """What tells tile groups apart: the tile's place on the axes that the window does not cover."""
    axes = zip(geometry.coordinates(tile), window, geometry.tiles, strict=True)
    return tuple(i for i, w, n in axes if w < n)


def brute_us(grid, choice, border, density, heads, head_dim):
    g = TileGeometry(grid, choice.tile)
    _, places, key_blocks = zip(*brute_items(g, choice.window, border, head_dim), strict=True)
    rounds = math.ceil(heads * len(key_blocks) / planning.CTAS)
    item = planning.ITEM_OVERHEAD + sum(key_blocks) / len(key_blocks) * density / choice.density
    codes_and_metas = 3 * head_dim * g.n_rows + (128 / 64 + 256 / 128) * g.n_rows
    quantize = heads * (6 * head_dim * g.n_tokens + codes_and_metas) / planning.QUANTIZE_BYTES_PER_US
    return rounds * item * planning.KEY_BLOCK_US[head_dim, places[0]] + quantize + planning.LAUNCHES_US


@settings(max_examples=20, deadline=None)
@given(
    grid=st.tuples(*[st.integers(1, 12)] * 3).filter(lambda x: math.prod(x) <= 500),
    fractions=st.tuples(*[st.floats(0.05, 1)] * 3),
    border=st.sampled_from(["clamp", "truncate"]),
    heads=st.integers(1, 300),
    head_dim=st.sampled_from([64, 128]),
)
def test_expected_times_are_those_of_the_work_items(grid, fractions, border, heads, head_dim):
    reach = tuple(max(1, round(x * n)) for x, n in zip(fractions, grid, strict=True))
    seen = [r / n for r, n in zip(reach, grid, strict=True)]
    density = math.prod(x - x**2 / 4 if x < 1 and border == "truncate" else x for x in seen)
    result = plan(grid, reach=reach, border=border, heads=heads, head_dim=head_dim)
    call = border, density, heads, head_dim
    fastest = brute_us(grid, result.best, *call) / result.best.slowdown
    for choice in result.candidates:
        assert choice.slowdown >= 1
        assert choice.slowdown == pytest.approx(brute_us(grid, choice, *call) / fastest)


@settings(max_examples=20, deadline=None)
@given(
    grid=st.tuples(*[st.integers(1, 30)] * 3),
    density=st.floats(0.01, 1),
    border=st.sampled_from(["clamp", "truncate"]),
)
def test_windows_of_the_candidates_are_legal_and_described_truly(grid, density, border):
    for choice in plan(grid, density=density, border=border).candidates:
        resolved = AttentionConfig(choice.tile, choice.window, border).resolve(grid, 1)
        assert resolved.windows == (choice.window,)
        assert choice.density == pytest.approx(resolved.density)


def test_the_first_choice_of_a_short_sparse_call_is_fast():
    """Wan2.1-1.3B at 480p: dense in the work items, near the density, and near the fastest tile of all."""
    grid = (21, 30, 52)
    best = plan(grid, density=0.06, heads=12).best
    items = list(brute_items(TileGeometry(grid, best.tile), best.window, "clamp", 128))
    assert sum(queries for queries, _, _ in items) > 0.9 * sum(places for _, places, _ in items)
    assert best.density == pytest.approx(0.06, rel=0.1)
    assert best.slowdown <= 1.05


@pytest.mark.parametrize(
    ("grid", "heads", "head_dim", "density"),
    [
        ((21, 45, 80), 40, 128, 0.135),
        ((21, 30, 52), 12, 128, 0.169),
        ((33, 45, 80), 24, 128, 0.1),
        ((36, 48, 48), 24, 128, 1 / 6),
        ((11, 48, 85), 48, 64, 1.0),
    ],
)
def test_the_first_choice_is_fast_and_near_the_density(grid, heads, head_dim, density):
    best = plan(grid, density=density, heads=heads, head_dim=head_dim).best
    assert best.slowdown <= 1.05 and best.density == pytest.approx(density, rel=0.1)


def test_a_reach_is_met_where_the_tile_allows_it():
    """The window of a tile, in tokens, is that tile's own window again; a whole axis stays whole for all tiles."""
    result = plan((21, 45, 80), reach=(99, 27, 18), heads=40, top=10_000)
    windows = {choice.tile: choice.window for choice in result.candidates}
    assert windows[7, 9, 2] == (3, 3, 9)
    assert all(choice.window[0] == choice.tiles[0] for choice in result.candidates)


def test_dense_attends_everything():
    for wanted in ({"density": 1}, {"reach": (21, 45, 80)}):
        for choice in plan((21, 45, 80), **wanted).candidates:
            assert choice.window == choice.tiles and choice.density == 1


def test_explanation_of_a_plan_with_a_window():
    result = plan((21, 45, 80), density=0.1, heads=40, border="truncate")
    text, best = result.explain(heads=40), result.best
    assert f"{best.window} tiles, border 'truncate'; density {best.density:.3f}" in text
    for choice in result.candidates:
        row = f"{choice.window!s:>14} {choice.density:>8.3f} {choice.slowdown:>6.2f}"
        assert any(line.endswith(row) and str(choice.tile) in line for line in text.splitlines())
    assert "density wanted" in text and "density wanted" not in plan((21, 45, 80)).explain()


@pytest.mark.parametrize(
    ("kwargs", "error", "words"),
    [
        ({"grid": (21, 45)}, ValueError, ["grid", "(21, 45)", "three integers"]),
        ({"grid": 75600}, TypeError, ["grid", "75600", "three integers"]),
        ({"grid": (1, 1, 1), "top": 0}, ValueError, ["top: 0", "at least 1", "nearest legal value 1"]),
        ({"grid": (1, 1, 1), "top": "x"}, TypeError, ["top: 'x'", "integer"]),
        ({"grid": (1, 1, 1), "top": None}, TypeError, ["top: None", "integer"]),
        ({"grid": (1, 1, 1), "top": 1.5}, TypeError, ["top: 1.5", "integer"]),
        ({"grid": (1, 1, 1), "top": True}, TypeError, ["top: True", "integer"]),
        ({"grid": (1, 1, 1), "density": 0}, ValueError, ["density: 0", "above 0 and at most 1"]),
        ({"grid": (1, 1, 1), "density": 1.01}, ValueError, ["density: 1.01", "above 0 and at most 1"]),
        ({"grid": (1, 1, 1), "density": math.nan}, ValueError, ["density: nan", "above 0 and at most 1"]),
        ({"grid": (1, 1, 1), "density": True}, TypeError, ["density: True", "number"]),
        ({"grid": (1, 1, 1), "reach": (1, 0, 1)}, ValueError, ["reach: (1, 0, 1)", "at least 1"]),
        (
            {"grid": (1, 1, 1), "reach": (1, 1, 1), "density": 0.5},
            ValueError,
            ["reach: (1, 1, 1)", "density 0.5"],
        ),
        ({"grid": (1, 1, 1), "border": "cut"}, ValueError, ["border: 'cut'", "clamp"]),
        ({"grid": (1, 1, 1), "heads": 0}, ValueError, ["heads: 0", "nearest legal value 1"]),
        ({"grid": (1, 1, 1), "head_dim": 0}, ValueError, ["head_dim: 0", "nearest legal value 1"]),
    ],
)
def test_errors(kwargs, error, words):
    with pytest.raises(error) as caught:
        plan(**kwargs)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("kwargs", "error", "words"),
    [
        ({"head_dim": -5}, ValueError, "head_dim: -5 .* nearest legal value 1"),
        ({"head_dim": "x"}, TypeError, "head_dim: 'x' must be an integer"),
        ({"head_dim": None}, TypeError, "head_dim: None must be an integer"),
        ({"config": 0}, TypeError, "config: 0 must be an AttentionConfig or None"),
    ],
)
def test_errors_of_an_explanation(kwargs, error, words):
    with pytest.raises(error, match=words):
        plan((4, 4, 8)).explain(**kwargs)


def test_explanation_of_a_window():
    config = AttentionConfig(tile=(7, 9, 2), window=(3, 3, 9), quant_tile=(7, 9, 8), smooth_k=True)
    text = plan((21, 45, 80)).explain(config, heads=40, head_dim=128)
    for fact in (
        "(21, 45, 80): 75,600 tokens",
        "(7, 9, 2): 126 tokens in a slot of 128 rows",
        "(3, 5, 40) = 600 tiles",
        "padding waste 1.6%",
        "(3, 3, 9) tiles, border 'clamp'; density 0.135",
        "t: 1, 3 or more (all); h: 1, 3, 5 or more (all); w: 1, 3, ..., 39, 40 or more (all)",
        f"{4 * 128 * 40 * 0.135 * 75600**2 / 1e12:.3g} TFLOP",
        "bricks of (7, 9, 8) tokens, K smoothed",
    ):
        assert fact in text


def test_explanation_of_dense_and_of_per_head_windows():
    assert "(3, 5, 40) tiles, border 'clamp' (dense); density 1.000" in plan((21, 45, 80)).explain()
    config = AttentionConfig(tile=(7, 9, 2), window=((3, 5, 40), (3, 1, 40)))
    text = plan((21, 45, 80)).explain(config)
    assert "(3, 5, 40), (3, 1, 40) tiles" in text
    assert "density 0.600" in text
    assert "heads 2" in text


@pytest.mark.parametrize(
    ("quant", "capability", "head_dim", "runs"),
    [
        ("fp8", (9, 0), 128, "the FP8 Hopper kernel on Some GPU"),
        (
            "fp8",
            (9, 0),
            96,
            "the reference (emulated FP8): the Hopper kernel needs head_dim 64 or 128, not 96",
        ),
        (
            "fp8",
            (8, 9),
            128,
            "the Hopper kernel needs a Hopper GPU (compute capability 9.0), Some GPU has 8.9",
        ),
        (
            "fp8",
            None,
            64,
            "the Hopper kernel needs a Hopper GPU (compute capability 9.0), torch finds no GPU",
        ),
        ("none", (8, 9), 128, "torch FlexAttention on Some GPU"),
        ("none", None, 128, "the reference (exact attention): no GPU for torch FlexAttention"),
    ],
)
def test_explanation_says_what_runs(monkeypatch, quant, capability, head_dim, runs):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Some GPU")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(support, "_capability", lambda device: capability)
    config = AttentionConfig(tile=(2, 2, 2), window=(1, 1, 3), quant=quant)
    assert runs in plan((4, 4, 8)).explain(config, head_dim=head_dim)


def test_explanation_of_dense_attention_without_rounding(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Some GPU")
    assert "torch SDPA on Some GPU" in plan((4, 4, 8)).explain(AttentionConfig(quant="none"))
