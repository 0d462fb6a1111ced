"""bench/bench_lists.py, on the CPU: what its arms attend."""

from __future__ import annotations

import pytest
import torch

import bench_lists
from shapes import Shape

SHAPE = Shape("small", (4, 8, 10), 2, (2, 4, 2), ((1, 1, 3), None), head_dim=64)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(1)


@pytest.mark.parametrize("uneven", [False, True])
def test_random_lists(uneven, generator):
    lists = bench_lists.random_lists(60, 3, 0.25, uneven, generator)
    assert lists.indices.shape[:3] == lists.counts.shape == (1, 3, 60)
    assert lists.mask().sum() == lists.counts.sum()
    if uneven:
        assert lists.counts.min() >= 5 and lists.counts.max() <= 25
        assert lists.counts.unique().numel() > 5
        assert 13 < lists.counts.double().mean() < 17
    else:
        assert (lists.counts == 15).all()


def test_density_is_that_of_attended_tokens(generator):
    arms = {arm.name: arm for arm in bench_lists.arms_of(SHAPE, generator)}
    qk = [torch.randn(1, SHAPE.tokens, 2, 64, generator=generator) for _ in range(2)]
    density = {name: bench_lists.density_of(arm, SHAPE, qk) for name, arm in arms.items()}
    assert density["dense"] == 1
    # Of 2 x 2 x 5 tiles, equally large, a window of three sees three.
    assert density["window (1, 1, 3)"] == pytest.approx(3 / 20)
    assert density["lists of (1, 1, 3)"] == pytest.approx(3 / 20)
    assert density["lists 0.25"] == pytest.approx(5 / 20)
    assert density["FlexAttention 0.14"] == density["chosen 0.14"] == pytest.approx(3 / 20)
