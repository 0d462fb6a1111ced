"""Tests of `check_gradients`: wrong gradients must fail, right ones must pass.

The emulation with the tensor core's scores stands in for the kernel. Every mutation is a mistake that a backward
kernel can make.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cached_property

import pytest
import torch

import compare
from fpsattention import reference
from inputs import KINDS, make_qkv
from tensor_core import tensor_core
from test_gradient import given, gradients, reference_gradients
from test_mutations import GRIDS, Case, judged_with
from test_reference import rms


class Backward:
    """One call: inputs, results of the forward, both reference gradients. `kernel` stands in for a kernel."""

    def __init__(self, case: Case, kind: str = "gaussian"):
        self.case, self.wide_logits = case, KINDS[kind].wide_logits
        self.qkv = make_qkv(
            kind, grid=case.grid, tile=case.config.tile, head_dim=case.head_dim, device="cpu", seed=3
        )
        self.call = {"grid": case.grid, "config": case.config}
        with tensor_core():
            self.out, self.lse = reference.emulated_attention(*self.qkv, **self.call)
        self.dout, self.dlse = given(self.out.shape, self.out.dtype)
        self.dout *= KINDS[kind].dout[self.out.dtype]
        self.reference = reference_gradients(*self.qkv, self.dout, self.dlse, **self.call)
        self.emulated = self.backward()

    def backward(self, **changes):
        """dq, dk, dv by the emulation, with `changes` to its arguments."""
        tensors = dict(zip("qkv", self.qkv, strict=True))
        tensors |= {"out": self.out, "lse": self.lse, "dout": self.dout, "dlse": self.dlse}
        return reference.emulated_backward(**{**tensors, **self.call, **changes})

    def kernel(self, **changes):
        """`backward` with the tensor core's scores."""
        with tensor_core():
            return self.backward(**changes)

    @cached_property
    def right(self):
        """The gradients of a right kernel. Do not write to them."""
        return self.kernel()

    def broken_rules(self, grads) -> set[str]:
        """The rules that gradients break. Also asserts that `check_gradients` raises if there are any."""
        geometry, wide = self.case.resolved.geometry, {"wide_logits": self.wide_logits}
        judged = (grads, self.reference, self.emulated)
        found = compare.gradient_violations(*judged, geometry.tile_of_token, **wide)
        if found:
            with pytest.raises(AssertionError, match=next(iter(found))):
                compare.check_gradients(*judged, geometry, **wide)
        else:
            compare.check_gradients(*judged, geometry, **wide)
        return set(found)


@pytest.fixture(params=GRIDS, scope="module")
def backward(request):
    return Backward(Case(*GRIDS[request.param], "cpu"))


def test_right_gradients_pass(backward):
    assert backward.broken_rules(backward.right) == set()
    assert backward.broken_rules(backward.emulated) == set()


@pytest.mark.parametrize("kind", KINDS)
def test_right_gradients_of_every_kind_pass(kind):
    backward = Backward(Case(*GRIDS["small tiles"], "cpu"), kind)
    assert backward.broken_rules(backward.kernel()) == set()


def test_unrounded_p_fails(backward, monkeypatch):
    """2^z is closer to exact attention, but dV is not the gradient of the forward's result."""
    monkeypatch.setattr(reference, "_number_of_code", lambda z, m: (z - m).exp2() * 2**reference.LOG2_BIAS)
    grads = backward.kernel()
    assert {"dv exact", "dv emulation"} <= backward.broken_rules(grads)
    leaves = [x.double().requires_grad_() for x in backward.qkv]
    exact = gradients(reference.exact_attention(*leaves, **backward.call), leaves[2:], backward.dout)
    assert rms(grads[2], exact[0]) < rms(backward.emulated[2], exact[0])


def test_p_without_the_bias_of_the_lse_fails(backward, monkeypatch):
    monkeypatch.setattr(reference, "LOG2_BIAS", 0.0)
    assert {"dq scale", "dk scale", "dv scale"} <= backward.broken_rules(backward.kernel())


# Mutations: Backward -> (dq, dk, dv). MUTATIONS lists the rules that must catch each.


def zero_gradients(x):
    return [torch.zeros_like(g) for g in x.emulated]


def dropped_key_scale(x):
    """The K scale of one tile is twice what it should be; a power of two changes no code."""
    q, k, v = x.qkv
    k = torch.where(x.case.tile(1)[:, None, None], 2 * k, k)
    return x.kernel(k=k)


def dropped_key_scale_in_dq(x):
    """The same mistake in dQ alone."""
    dq, dk, dv = x.right
    return dropped_key_scale(x)[0], dk, dv


def dropped_query_scale(x):
    q = x.qkv[0]
    return x.kernel(q=torch.where(x.case.tile(2)[:, None, None], 2 * q, q))


def missing_query_scale_in_dk(x):
    """dK = dS^T q8."""
    dq, dk, dv = x.right
    amax = x.qkv[0].float().abs().amax()
    return dq, (dk.float() * 14 / amax).to(dk.dtype), dv


def missing_value_scale_in_dp(x):
    """dP = dO v8^T."""
    v = x.qkv[2].float()
    return x.kernel(v=(v * 448 / v.abs().amax()).to(x.out.dtype))


def transposed_list_off_by_one(x):
    """Key tile j sums over the query tiles that attend j + 1."""
    width = x.case.config.tile[2]

    def shift(t, by):
        return t.unflatten(1, x.case.grid).roll(by, dims=3).flatten(1, 3)

    _, k, v = x.qkv
    _, dk, dv = x.kernel(k=shift(k, width), v=shift(v, width))
    return x.right[0], shift(dk, -width), shift(dv, -width)


def transposed_window_cut_at_the_border(x):
    _, dk, dv = x.kernel(config=replace(x.case.config, border="truncate"))
    return x.right[0], dk, dv


def transposed_window_too_wide(x):
    """Queries that do not attend a key tile contribute to its gradient."""
    t, h, w = x.case.config.window
    _, dk, dv = x.kernel(config=replace(x.case.config, window=(t, h, w + 2)))
    return x.right[0], dk, dv


def stale_padding_in_dq(x):
    """The padding of one query tile's keys is not masked, and holds the rows of a block loaded before."""
    t, h, w = x.case.config.window
    wide = x.kernel(config=replace(x.case.config, window=(t, h, w + 2)))[0]
    dq, dk, dv = x.right
    return torch.where(x.case.tile(5)[:, None, None], wide, dq), dk, dv


def delta_missing(x):
    return x.kernel(out=torch.zeros_like(x.out))


def delta_of_another_row(x):
    return x.kernel(out=x.out.roll(1, dims=1))


def dlse_ignored(x):
    return x.kernel(dlse=None)


def dlse_of_the_wrong_sign(x):
    return x.kernel(dlse=-x.dlse)


def probabilities_not_normalised(x):
    """P is 2 % too large."""
    return x.kernel(lse=x.lse - math.log(1.02))


def one_lse_of_an_octave_before(x):
    lse = x.lse.clone()
    lse[0, 1, 17] -= math.log(2)
    return x.kernel(lse=lse)


def dq_and_dk_swapped(x):
    dq, dk, dv = x.right
    return dk, dq, dv


def missing_softmax_scale(x):
    dq, dk, dv = x.right
    return dq / x.case.scale, dk / x.case.scale, dv


def swapped_heads(x):
    return [g.flip(2) for g in x.right]


def swapped_key_tiles(x):
    """dK and dV of two tiles are stored in each other's place."""
    dq, dk, dv = (g.clone() for g in x.right)
    tiles = [x.case.tile(n).nonzero()[:, 0] for n in (0, 1)]
    for g in (dk, dv):
        g[:, torch.cat(tiles)] = g[:, torch.cat(tiles[::-1])]
    return dq, dk, dv


def _with(x, which, value):
    """One row of one gradient, of usual size, holds `value`."""
    grads = [g.clone() for g in x.right]
    rows = grads[which][0, :, 1].float().norm(dim=1)
    grads[which][0, (rows - rows.square().mean().sqrt()).abs().argmin(), 1] = value
    return grads


def one_row_of_dq_unwritten(x):
    return _with(x, 0, 0.0)


def one_row_of_dk_unwritten(x):
    return _with(x, 1, 0.0)


def one_row_of_dv_unwritten(x):
    return _with(x, 2, 0.0)


def one_stale_nan(x):
    grads = [g.clone() for g in x.right]
    grads[1][0, 17, 1, 3] = math.nan
    return grads


MUTATIONS = {
    zero_gradients: {"dq exact", "dk exact", "dv exact"},
    dropped_key_scale: {"tile dq exact", "tile dk exact", "tile dv exact"},
    dropped_key_scale_in_dq: {"dq emulation"},
    dropped_query_scale: {"tile dq exact", "tile dk exact", "tile dv exact"},
    missing_query_scale_in_dk: {"dk exact"},
    missing_value_scale_in_dp: {"dq exact", "dk exact"},
    transposed_list_off_by_one: {"dk exact", "dv exact"},
    transposed_window_cut_at_the_border: {"tile dk exact", "tile dv exact"},
    transposed_window_too_wide: {"dk exact", "dv exact"},
    stale_padding_in_dq: {"tile dq exact"},
    delta_missing: {"dq emulation", "dk emulation"},
    delta_of_another_row: {"dq emulation", "dk emulation"},
    dlse_ignored: {"dq emulation", "dk emulation"},
    dlse_of_the_wrong_sign: {"dq emulation", "dk emulation"},
    probabilities_not_normalised: {"dq scale", "dk scale"},
    one_lse_of_an_octave_before: {"tile dq exact"},
    dq_and_dk_swapped: {"dq exact", "dk exact"},
    missing_softmax_scale: {"dq exact", "dk exact"},
    swapped_heads: {"dq exact", "dk exact", "dv exact"},
    swapped_key_tiles: {"tile dk exact", "tile dv exact"},
    one_row_of_dq_unwritten: {"tile dq emulation"},
    one_row_of_dk_unwritten: {"tile dk emulation"},
    one_row_of_dv_unwritten: {"tile dv emulation"},
    one_stale_nan: {"finite"},
}


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda f: f.__name__)
def test_wrong_gradients_fail(backward, mutation):
    assert MUTATIONS[mutation] <= backward.broken_rules(mutation(backward))


@pytest.mark.parametrize("which", range(3))
def test_failure_names_the_gradient_and_the_place(backward, which):
    grads = [g.clone() for g in backward.emulated]
    grads[which][0, 17, 1] = 0
    grads[which][0, 17, 1, 5] = 90.0
    tile_of_token = backward.case.resolved.geometry.tile_of_token
    tile = int(tile_of_token[17])
    with pytest.raises(AssertionError) as failure:
        compare.check_gradients(grads, backward.reference, backward.emulated, backward.case.resolved.geometry)
    name = ("dq", "dk", "dv")[which]
    assert f"tile {name} exact: " in str(failure.value)
    assert f"batch 0, head 1, {judged_with(tile, tile_of_token)} worst" in str(failure.value)
    assert f"[batch 0, row 17, head 1, channel 5], tile {tile}: 90, emulation" in str(failure.value)


@pytest.mark.parametrize("mutation", [zero_gradients, swapped_heads, one_row_of_dq_unwritten, one_stale_nan])
def test_wrong_gradients_fail_with_wide_logits(mutation):
    """The wider tolerance for wide logits does not let these pass."""
    backward = Backward(Case(*GRIDS["small tiles"], "cpu"), "key_outliers")
    assert backward.broken_rules(mutation(backward))
