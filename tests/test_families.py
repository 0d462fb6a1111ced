"""The inputs by family that bench and tests share."""

from __future__ import annotations

import pytest
import torch

import families

GRID = (3, 6, 10)


def scores_of(q, k):
    """Softmax [heads, L, L] of the family's scores in fp64."""
    q, k = (x[0].transpose(0, 1).double() for x in (q, k))
    return (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("name", families.FAMILIES)
def test_a_family_is_determined_by_shape_and_seed(name, head_dim):
    call = {"grid": GRID, "heads": 2, "head_dim": head_dim}
    qkv = families.make(name, **call)
    for x in qkv:
        assert x.shape == (1, 180, 2, head_dim) and x.dtype == torch.bfloat16 and x.is_contiguous()
        assert x.isfinite().all() and 0.5 < x.float().std() < 5
    assert all(map(torch.equal, qkv, families.make(name, **call)))
    assert not any(map(torch.equal, qkv, families.make(name, **call, seed=1)))
    in_fp32 = families.make(name, **call, dtype=torch.float32)
    assert all(torch.equal(x, y.bfloat16()) for x, y in zip(qkv, in_fp32, strict=True))


def test_families_have_the_structure_they_are_named_for():
    made = {name: families.make(name, GRID, 2, 128, torch.float32) for name in families.FAMILIES}
    p = {name: scores_of(q, k) for name, (q, k, _) in made.items()}
    largest = {name: x.amax(-1).mean() for name, x in p.items()}
    assert largest["gaussian"] < largest["peaked"] < largest["very_peaked"] < largest["one_hot"]
    assert torch.equal(p["one_hot"].argmax(-1), (torch.arange(180) - 1).remainder(180).expand(2, -1))
    assert p["sink"][:, 1:, 0].mean() > 0.5 and p["sink"][:, 1:, 1:].mean() < 0.01
    assert (made["value_sign"][2] >= 0).all()
    for x in made["smooth"]:
        rows = x[0].view(*GRID, 2, 128)
        assert (rows[:, :, 1:] - rows[:, :, :-1]).square().mean() < 0.3 * 2 * rows.square().mean()
    position = torch.cartesian_prod(*map(torch.arange, GRID))
    near = (position[:, None] - position).abs().sum(-1) == 1
    assert p["rms_rope"][:, near].mean() > 1.5 * p["rms_rope"].mean()


def test_trained_family():
    shape = families.TRAINED_GRID, 2, families.TRAINED_HEAD_DIM
    q, k, v = families.make("trained", *shape)
    assert q.shape == k.shape == v.shape == (1, 8192, 2, 64) and q.dtype == torch.bfloat16
    assert all(x.isfinite().all() and x.any() for x in (q, k, v))
    with pytest.raises(ValueError, match=r"grid, heads, head_dim: \(8, 32, 32\), 25, 64"):
        families.make("trained", families.TRAINED_GRID, 25, 64)


def test_unknown_family():
    with pytest.raises(ValueError, match=r"name: 'flat' must be one of gaussian, rms_rope"):
        families.make("flat", GRID, 1, 64)
