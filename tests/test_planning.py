"""plan(): the ranking of tiles, and the text of Plan.explain."""

import math
from collections import Counter
from unittest.mock import Mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from brute import tile_tokens
from fpsattention.core import planning, support
from fpsattention.core.config import AttentionConfig
from fpsattention.core.explain import plan
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


def test_empty_grid():
    best = plan((0, 4, 4)).best
    assert best.waste == 0.0
    assert best.tiles[0] == 0
    assert "0 tokens" in plan((0, 4, 4)).explain()


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
        "100% of the Hopper kernel's warpgroups",
    ):
        assert fact in text
    short = plan((21, 45, 80)).explain(AttentionConfig(tile=(7, 9, 2), window=(1, 3, 9)))
    assert "67% of the Hopper kernel's warpgroups" in short and "321 to 384 tokens" in short


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
