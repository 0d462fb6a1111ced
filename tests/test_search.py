"""The search for windows, on heads whose windows are known."""

from __future__ import annotations

import pytest
import torch

import fpsattention as fps
from fpsattention import AttentionConfig
from fpsattention.schedules.search import legal_windows, search
from local_heads import GRID, REACHES, TILE, WHOLE, heads_of

CONFIG = AttentionConfig(tile=TILE)
GEOMETRY = CONFIG.resolve(GRID, 1).geometry
HOW = {"grid": GRID, "config": CONFIG}
BUDGET = 0.15

pytestmark = pytest.mark.usefixtures("one_thread")


def test_each_head_gets_the_sparsest_window_that_holds_what_it_attends():
    q, k, v = heads_of(REACHES)
    candidates = legal_windows(GEOMETRY, "clamp")
    windows, errors = search(q, k, v, **HOW, candidates=candidates, budget=BUDGET)
    assert windows == list(REACHES.values())
    assert max(errors) <= BUDGET

    # By hand: the reported error, and that no sparser window is within the budget.
    exact, _ = fps.reference.exact_attention(q, k, v, grid=GRID, config=CONFIG)
    for head, (window, error) in enumerate(zip(windows, errors, strict=True)):
        for candidate in candidates[: candidates.index(window) + 1]:
            config = AttentionConfig(tile=TILE, window=candidate)
            out = fps.attention(q, k, v, grid=GRID, config=config, backend="reference")
            difference = (out[:, :, head].double() - exact[:, :, head]).norm() / exact[:, :, head].norm()
            if candidate == window:
                assert difference.item() == pytest.approx(error, rel=0.02)
            else:
                assert difference > BUDGET


def test_layouts_and_parts_give_the_same():
    q, k, v = heads_of(REACHES)
    keywords = {
        **HOW,
        "candidates": legal_windows(GEOMETRY, "clamp"),
        "budget": BUDGET,
    }
    want = search(q, k, v, **keywords)
    heads_first = [x.transpose(1, 2) for x in (q, k, v)]
    assert search(*heads_first, tensor_layout="HND", **keywords) == want
    alone = [search(*(x[:, :, h : h + 1] for x in (q, k, v)), **keywords) for h in range(4)]
    assert [windows[0] for windows, _ in alone] == want[0]


def test_the_worst_sample_of_a_batch_counts():
    local, whole = heads_of([(0, 0, 0)]), heads_of([(1, 1, 1)])
    q, k, v = (torch.cat(pair) for pair in zip(local, whole, strict=True))
    candidates = legal_windows(GEOMETRY, "clamp")
    windows, _ = search(q, k, v, **HOW, candidates=candidates, budget=BUDGET)
    assert windows == [WHOLE]


def test_a_head_beyond_the_budget_gets_the_last_candidate_and_its_error():
    q, k, v = heads_of([(1, 1, 1)])
    windows, errors = search(q, k, v, **HOW, candidates=[(1, 1, 1), WHOLE], budget=1e-4)
    assert windows == [WHOLE] and 1e-4 < errors[0] < 0.1


def test_a_head_of_zeros_has_no_error():
    q, k, v = heads_of([(1, 1, 1)])
    windows, errors = search(q, k, torch.zeros_like(v), **HOW, candidates=[(1, 1, 1), WHOLE], budget=0.0)
    assert (windows, errors) == ([(1, 1, 1)], [0.0])


def test_candidates_are_sparsest_first():
    candidates = legal_windows(GEOMETRY, "clamp")
    assert sorted(candidates) == [(t, h, w) for t in (1, 2) for h in (1, 2) for w in (1, 3)]
    densities = [GEOMETRY.density(window, "clamp") for window in candidates]
    assert densities == sorted(densities) and candidates[-1] == WHOLE
