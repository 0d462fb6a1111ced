"""Tests of the judge: wrong outputs must fail `check_attention`, right ones must pass.

On the CPU the emulation with a little noise plays the kernel; on a GPU the kernel plays itself. Every
mutation is a mistake a kernel can make.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch

import compare
import fpsattention as fps
from fpsattention import reference
from inputs import make_qkv, tile_coordinates

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
LN2 = math.log(2)


@dataclass(frozen=True)
class Case:
    """One call. `attend` computes it, or a variation of it, as a kernel would."""

    grid: tuple[int, int, int]
    config: fps.AttentionConfig
    device: str
    heads: int = 2
    head_dim: int = 64

    @property
    def resolved(self):
        return self.config.resolve(self.grid, self.heads)

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5

    def inputs(self):
        return make_qkv(
            "gaussian",
            grid=self.grid,
            tile=self.config.tile,
            heads=self.heads,
            head_dim=self.head_dim,
            device=self.device,
            seed=3,
        )

    def attend(self, q, k, v, **changes):
        config = replace(self.config, **changes)
        if self.device == "cuda":
            return fps.attention(q, k, v, grid=self.grid, config=config, return_lse=True, backend="sm90")
        out, lse = reference.emulated_attention(q, k, v, grid=self.grid, config=config)
        noise = torch.Generator().manual_seed(4)
        out = (out.float() * (1 + 2e-3 * torch.randn(out.shape, generator=noise))).to(out.dtype)
        return out, lse + 1e-4 * torch.randn(lse.shape, generator=noise)

    def tile(self, n) -> torch.Tensor:
        """bool [L]: the tokens of query tile n."""
        return self.resolved.geometry.tile_of_token.to(self.device) == n


# Tiles of 12 tokens in slots of 128, and tiles that fill their slot of 512: one wrong row of 512 is the
# smallest fault that the per-tile rule must catch.
GRIDS = {
    "small tiles": ((4, 9, 20), fps.AttentionConfig(tile=(2, 3, 2), window=(1, 3, 3))),
    "full slots": ((8, 16, 40), fps.AttentionConfig(tile=(8, 8, 8), window=(1, 1, 3))),
}


@pytest.fixture(params=DEVICES, scope="module")
def device(request):
    return request.param


@pytest.fixture(params=GRIDS, scope="module")
def case(request, device):
    return Case(*GRIDS[request.param], device)


@pytest.fixture(scope="module")
def expected(case):
    """Inputs, and both references."""
    qkv = case.inputs()
    exact = reference.exact_attention(*qkv, grid=case.grid, config=case.config)
    emulated = reference.emulated_attention(*qkv, grid=case.grid, config=case.config)
    return qkv, exact, emulated


def broken_rules(case, expected, out, lse) -> set[str]:
    """The rules that an output breaks. Asserts that `check_attention` raises exactly when there are some."""
    _, exact, emulated = expected
    geometry = case.resolved.geometry
    tile_of_token = geometry.tile_of_token.to(out.device)
    found = compare.violations(out, lse, *exact, *emulated, tile_of_token)
    if found:
        with pytest.raises(AssertionError, match=next(iter(found))):
            compare.check_attention(out, lse, *exact, *emulated, geometry)
    else:
        compare.check_attention(out, lse, *exact, *emulated, geometry)
    return set(found)


def test_right_output_passes(case, expected):
    rules = broken_rules(case, expected, *case.attend(*expected[0]))
    assert rules == set()


def test_emulation_passes(case, expected):
    rules = broken_rules(case, expected, *expected[2])
    assert rules == set()


# Mutations: (case, inputs) -> (out, lse). Each is listed with the rule that must catch it.


def zero_output(case, q, k, v):
    out, lse = case.attend(q, k, v)
    return torch.zeros_like(out), lse


def noise_output(case, q, k, v):
    """Noise of the right size and spread."""
    out, lse = case.attend(q, k, v)
    return out.roll(1, dims=-1), lse


def dropped_key_scale(case, q, k, v):
    """The K scale of one tile is twice what it should be; a power of two changes no code."""
    k = k.clone()
    k[:, case.tile(1)] *= 2
    return case.attend(q, k, v)


def dropped_query_scale(case, q, k, v):
    q = q.clone()
    q[:, case.tile(2)] *= 2
    return case.attend(q, k, v)


def _window(case, axis, by):
    window = list(case.config.window)
    window[axis] += by
    return tuple(window)


def window_too_wide(case, q, k, v):
    return case.attend(q, k, v, window=_window(case, 2, 2))


def window_too_narrow(case, q, k, v):
    return case.attend(q, k, v, window=_window(case, 2, -2))


def window_cut_at_the_border(case, q, k, v):
    return case.attend(q, k, v, border="truncate")


def window_shifted(case, q, k, v):
    """Every query tile reads the keys of its neighbour's window."""
    width = case.config.tile[2]

    def shift(x):
        return x.unflatten(1, case.grid).roll(-width, dims=3).flatten(1, 3)

    return case.attend(q, shift(k), shift(v))


def _with_padding_keys(case, out, lse, count):
    """The output with `count` more keys of score 0 and value 0."""
    more = torch.logaddexp(lse, lse.new_tensor(math.log(count)))
    return (out.float() * (lse - more).exp().transpose(1, 2)[..., None]).to(out.dtype), more


def unmasked_padding_of_one_tile(case, q, k, v):
    geometry = case.resolved.geometry
    # A tile that fills its slot has no padding; there the fault takes a block of another tile's rows.
    padding = geometry.slot - math.prod(case.config.tile) or 128
    return _with_padding_keys(case, *case.attend(q, k, v), padding)


def unmasked_padding_rows(case, q, k, v):
    return _with_padding_keys(case, *case.attend(q, k, v), 16)


def swapped_query_tiles(case, q, k, v):
    out, lse = (x.clone() for x in case.attend(q, k, v))
    first, second = case.tile(0), case.tile(1)
    out[:, first], out[:, second] = out[:, second].clone(), out[:, first].clone()
    return out, lse


def swapped_value_tiles(case, q, k, v):
    first, second = case.tile(0), case.tile(1)
    v = v.clone()
    v[:, first], v[:, second] = v[:, second].clone(), v[:, first].clone()
    return case.attend(q, k, v)


def swapped_heads(case, q, k, v):
    out, lse = case.attend(q, k, v)
    return out.flip(2), lse


def missing_value_scale(case, q, k, v):
    out, lse = case.attend(q, k, v)
    step = v.float().abs().amax(1, keepdim=True) / 448
    return (out.float() / step).to(out.dtype), lse


def one_value_scale_for_all_channels(case, q, k, v):
    out, lse = case.attend(q, k, v)
    amax = v.float().abs().amax(1, keepdim=True)
    return (out.float() * amax.amax(3, keepdim=True) / amax).to(out.dtype), lse


def probabilities_not_normalised(case, q, k, v):
    out, lse = case.attend(q, k, v)
    return (out.float() * 1.02).to(out.dtype), lse


def lse_in_log2_units(case, q, k, v):
    out, lse = case.attend(q, k, v)
    return out, lse / LN2


def lse_off_by_one_octave(case, q, k, v):
    """One row's LSE is off by a factor of 2: its maximum was taken after its sum was scaled with the previous one."""
    out, lse = (x.clone() for x in case.attend(q, k, v))
    lse[0, 1, 5] += LN2
    return out, lse


def one_stale_nan(case, q, k, v):
    out, lse = (x.clone() for x in case.attend(q, k, v))
    out[0, 17, 1, 3] = math.nan
    return out, lse


def one_stale_nan_in_lse(case, q, k, v):
    out, lse = (x.clone() for x in case.attend(q, k, v))
    lse[0, 1, 17] = math.nan
    return out, lse


def one_row_unwritten(case, q, k, v):
    out, lse = (x.clone() for x in case.attend(q, k, v))
    out[0, 17, 1] = 0
    return out, lse


MUTATIONS = {
    zero_output: "exact",
    noise_output: "exact",
    dropped_key_scale: "emulation",
    dropped_query_scale: "tile exact",
    window_too_wide: "exact",
    window_too_narrow: "exact",
    window_cut_at_the_border: "tile exact",
    window_shifted: "exact",
    unmasked_padding_of_one_tile: "exact",
    unmasked_padding_rows: "lse",
    swapped_query_tiles: "tile exact",
    swapped_value_tiles: "tile exact",
    swapped_heads: "exact",
    missing_value_scale: "exact",
    one_value_scale_for_all_channels: "exact",
    probabilities_not_normalised: "emulation",
    lse_in_log2_units: "lse",
    lse_off_by_one_octave: "lse",
    one_stale_nan: "finite",
    one_stale_nan_in_lse: "finite",
    one_row_unwritten: "tile emulation",
}


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda f: f.__name__)
def test_wrong_output_fails(case, expected, mutation):
    rules = broken_rules(case, expected, *mutation(case, *expected[0]))
    assert MUTATIONS[mutation] in rules


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mutation", [zero_output, missing_value_scale, one_row_unwritten, one_stale_nan])
def test_wrong_output_fails_with_wide_logits(device, mutation):
    """The wider limits of wide logits do not let these pass."""
    case = Case(*GRIDS["small tiles"], device)
    q, k, v = make_qkv("key_outliers", grid=case.grid, tile=case.config.tile, device=device, seed=5)
    exact = reference.exact_attention(q, k, v, grid=case.grid, config=case.config)
    emulated = reference.emulated_attention(q, k, v, grid=case.grid, config=case.config)
    geometry = case.resolved.geometry
    compare.check_attention(*case.attend(q, k, v), *exact, *emulated, geometry, wide_logits=True)
    with pytest.raises(AssertionError):
        compare.check_attention(*mutation(case, q, k, v), *exact, *emulated, geometry, wide_logits=True)


def test_failure_names_the_place(case, expected):
    """The report names the wrong element."""
    out, lse = (x.clone() for x in case.attend(*expected[0]))
    out[0, 17, 1] = 0
    out[0, 17, 1, 5] = 90.0
    _, exact, emulated = expected
    tile = int(case.resolved.geometry.tile_of_token[17])
    with pytest.raises(AssertionError) as failure:
        compare.check_attention(out, lse, *exact, *emulated, case.resolved.geometry)
    assert f"batch 0, head 1, tile {tile} is worst" in str(failure.value)
    assert f"[batch 0, row 17, head 1, channel 5], tile {tile}: 90, emulation" in str(failure.value)


def test_zero_reference_needs_a_zero_output():
    zeros, lse = torch.zeros(1, 6, 1, 64), torch.zeros(1, 1, 6)
    tile_of_token = torch.zeros(6, dtype=torch.int64)
    references = (zeros, lse, zeros, lse)
    assert compare.violations(zeros, lse, *references, tile_of_token) == {}
    assert "exact" in compare.violations(zeros + 1e-5, lse, *references, tile_of_token)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("border", ["clamp", "truncate"])
@pytest.mark.parametrize("window", [(1, 3, 3), (3, 1, 9), (1, 1, 1), None])
def test_row_oracle_agrees_with_the_reference(window, border, seed):
    """Two independent versions of the contract agree: geometry, scales, rounding, LSE."""
    grid, config = (5, 7, 9), fps.AttentionConfig(tile=(2, 2, 2), window=window, border=border)
    q, k, v = make_qkv("peaked", grid=grid, tile=config.tile, device="cpu", seed=seed)
    resolved = config.resolve(grid, 2)
    rows = torch.randperm(5 * 7 * 9, generator=torch.Generator().manual_seed(seed))
    exact = reference.exact_attention(q, k, v, grid=grid, config=config)
    emulated = reference.emulated_attention(q, k, v, grid=grid, config=config)
    for head in range(2):
        mine = compare.attend_rows(
            *(x[0, :, head] for x in (q, k, v)), rows, resolved, resolved.windows[0], 64**-0.5
        )
        torch.testing.assert_close(mine[0], exact[0][0, rows, head], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(mine[1], exact[1][0, head, rows], rtol=1e-12, atol=1e-12)
        same = mine[2].float() - emulated[0][0, rows, head].float()
        assert same.norm() <= 1e-3 * mine[2].float().norm()
        torch.testing.assert_close(mine[3], emulated[1][0, head, rows], rtol=0, atol=1e-5)


def test_tile_coordinates_agree_with_the_geometry():
    resolved = fps.AttentionConfig(tile=(2, 3, 4)).resolve((5, 7, 9), 1)
    tiles = resolved.geometry.tiles
    mine = tile_coordinates((5, 7, 9), (2, 3, 4)) @ torch.tensor([tiles[1] * tiles[2], tiles[2], 1])
    assert torch.equal(mine, resolved.geometry.tile_of_token)
