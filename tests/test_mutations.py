"""Tests of the judge: wrong outputs must fail `check_attention`, right ones must pass.

On the CPU the emulation with the tensor core's scores plays the kernel; on a GPU the kernel plays itself. Every
mutation is a mistake a kernel can make.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch

import brute
import compare
import families
import fpsattention as fps
from fpsattention import reference
from inputs import make_qkv, tile_coordinates
from tensor_core import tensor_core

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
        with tensor_core():
            return reference.emulated_attention(q, k, v, grid=self.grid, config=config)

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
    return (out.float() * 448 / v.float().abs().amax()).to(out.dtype), lse


def dropped_value_scale(case, q, k, v):
    """The V scale of one tile is twice what it should be."""
    v = v.clone()
    v[:, case.tile(1)] *= 2
    return case.attend(q, k, v)


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
    unmasked_padding_rows: "lse mean",
    swapped_query_tiles: "tile exact",
    swapped_value_tiles: "tile exact",
    swapped_heads: "exact",
    missing_value_scale: "exact",
    dropped_value_scale: "tile exact",
    probabilities_not_normalised: "scale",
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


# Mutations of the arithmetic between the scores and the output, on score matrices in full.

BLOCKS = Case(
    (4, 16, 24), fps.AttentionConfig(tile=(4, 8, 8), window=(1, 1, 3)), "cpu"
)  # two key blocks a tile


class Steps:
    """The contract's steps from z to out and lse, in fp64. A fault replaces one of them."""

    def __init__(self, case, q, k, v):
        x = reference.quantize(q, k, v, case.resolved)
        block = torch.empty(len(x.block_of_token), dtype=torch.int64)
        for i, tokens in enumerate(brute.key_blocks(case.grid, case.config.tile)):
            block[tokens] = i
        self.block, self.blocks = block, int(block.max()) + 1
        mask = brute.token_mask(case.grid, case.config.tile, case.config.window, case.config.border)
        z = x.q[0].double() @ x.k[0].double().mT * (case.scale / LN2)
        self.z = z.masked_fill(~mask, -math.inf)
        self.v8, self.v_scale, self.dtype = x.v8[0].double(), x.v_scale[0].double(), q.dtype
        self.m = torch.stack([self.z[..., block == i].amax(-1).ceil() for i in range(self.blocks)], -1)
        self.bias = compare.LSE_BIAS

    def exponents(self):
        """[H, L, blocks]: the exponent of each block, of which a code is the distance."""
        return self.m

    def weights(self, m):
        """2^m, for the blocks' sums of P V and of P."""
        return (m - 8).exp2(), (m - 8).exp2()

    def scales(self):
        return self.v_scale

    def summed(self, p, z_less_m):
        """What l sums, given P, and z less the block's exponent."""
        return p

    def out_and_lse(self):
        m = self.exponents()
        of_v, of_l = self.weights(m)
        out, total = 0, 0
        for i in range(self.blocks):
            seen = self.block == i
            z_less_m = self.z[..., seen] - m[..., i, None].clamp(min=-1e9)  # finite, for a block out of sight
            p = compare.number_of_code((120 + 8 * z_less_m).round().clamp(0, 126))
            out += of_v[..., i, None] * (p @ self.v8[:, seen]) * self.scales()[:, i, None, None]
            total += of_l[..., i] * self.summed(p, z_less_m).sum(-1)
        lse = total.log() - self.bias
        return (out / total[..., None]).transpose(0, 1)[None].to(self.dtype), lse[None].float()


class UnroundedSum(Steps):
    """l sums 2^z, as version 1 of the contract did."""

    def summed(self, p, z_less_m):
        return 2 ** (z_less_m + 8)


class NoBias(Steps):
    def __init__(self, *args):
        super().__init__(*args)
        self.bias = 0.0


class BiasOfTheWrongSign(Steps):
    def __init__(self, *args):
        super().__init__(*args)
        self.bias *= -1


class SwappedWeights(Steps):
    """Each block's sums get the exponent of its neighbour, as when a register is read a step late."""

    def weights(self, m):
        swapped = m.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
        return (swapped - 8).exp2(), (swapped - 8).exp2()


class SwappedWeightsOfValues(SwappedWeights):
    """The same, in the sums of P V alone."""

    def weights(self, m):
        return super().weights(m)[0], (m - 8).exp2()


class NoWeights(Steps):
    def weights(self, m):
        return (m > -math.inf).double(), (m > -math.inf).double()


class ScalesOfTheNextBlock(Steps):
    def scales(self):
        return self.v_scale.roll(-1, 1)


class OneScale(Steps):
    """All blocks have the largest of their scales."""

    def scales(self):
        return self.v_scale.amax(1, keepdim=True).expand(self.v_scale.shape)


class OneExponent(Steps):
    """Every block has the exponent of the row. No fault but for keys more than 14 octaves below it: they underflow."""

    def exponents(self):
        return self.m.amax(-1, keepdim=True).expand(self.m.shape)


@pytest.fixture(scope="module")
def in_blocks():
    qkv = BLOCKS.inputs()
    call = {"grid": BLOCKS.grid, "config": BLOCKS.config}
    return qkv, reference.exact_attention(*qkv, **call), reference.emulated_attention(*qkv, **call)


@pytest.mark.parametrize("steps", [Steps, OneExponent])
def test_right_steps_pass(in_blocks, steps):
    out, lse = steps(BLOCKS, *in_blocks[0]).out_and_lse()
    assert broken_rules(BLOCKS, in_blocks, out, lse) == set()
    assert (out.float() - in_blocks[2][0].float()).norm() < 2e-3 * out.float().norm()
    torch.testing.assert_close(lse, in_blocks[2][1], rtol=0, atol=2e-3)


@pytest.mark.parametrize(
    ("steps", "rules"),
    [
        (UnroundedSum, {"scale", "lse mean"}),
        (NoBias, {"lse mean"}),
        (BiasOfTheWrongSign, {"lse mean"}),
        (SwappedWeights, {"exact"}),
        (SwappedWeightsOfValues, {"exact"}),
        (NoWeights, {"exact"}),
        (ScalesOfTheNextBlock, {"emulation"}),
        (OneScale, {"scale"}),
    ],
)
def test_wrong_steps_fail(in_blocks, steps, rules):
    assert rules <= broken_rules(BLOCKS, in_blocks, *steps(BLOCKS, *in_blocks[0]).out_and_lse())


def test_one_exponent_for_all_blocks_fails_beside_a_sink():
    """Keys far below those of another block are lost. It shows where the block above holds little value."""
    case = replace(BLOCKS, head_dim=128)
    qkv = families.make("sink", case.grid, case.heads, case.head_dim)
    qkv[1][:, 0] *= 1.5
    qkv[2][:, 0] = 0
    call = {"grid": case.grid, "config": case.config}
    expected = qkv, reference.exact_attention(*qkv, **call), reference.emulated_attention(*qkv, **call)
    assert broken_rules(case, expected, *Steps(case, *qkv).out_and_lse()) == set()
    assert broken_rules(case, expected, *OneExponent(case, *qkv).out_and_lse())


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


def judged_with(tile, tile_of_token) -> str:
    """How a report names the tiles that are judged together with `tile`, on a grid of equal tiles."""
    together = -(-compare.LEAST_ROWS // int((tile_of_token == 0).sum()))
    first = tile // together * together
    return f"tile {tile} is" if together == 1 else f"tiles {first} to {first + together - 1} are"


def test_failure_names_the_place(case, expected):
    """The report names the wrong element."""
    out, lse = (x.clone() for x in case.attend(*expected[0]))
    out[0, 17, 1] = 0
    out[0, 17, 1, 5] = 90.0
    _, exact, emulated = expected
    tile_of_token = case.resolved.geometry.tile_of_token
    tile = int(tile_of_token[17])
    with pytest.raises(AssertionError) as failure:
        compare.check_attention(out, lse, *exact, *emulated, case.resolved.geometry)
    assert f"batch 0, head 1, {judged_with(tile, tile_of_token)} worst" in str(failure.value)
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
    tile = (4, 5, 7) if window is None else (2, 2, 2)  # two key blocks a tile, some of them empty
    grid, config = (5, 7, 9), fps.AttentionConfig(tile=tile, window=window, border=border)
    q, k, v = make_qkv("peaked", grid=grid, tile=config.tile, device="cpu", seed=seed)
    resolved = config.resolve(grid, 2)
    rows = torch.randperm(5 * 7 * 9, generator=torch.Generator().manual_seed(seed))
    exact = reference.exact_attention(q, k, v, grid=grid, config=config)
    emulated = reference.emulated_attention(q, k, v, grid=grid, config=config, dtype=torch.float64)
    for head in range(2):
        mine = compare.attend_rows(
            *(x[0, :, head] for x in (q, k, v)), rows, resolved, resolved.windows[0], 64**-0.5
        )
        torch.testing.assert_close(mine[0], exact[0][0, rows, head], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(mine[1], exact[1][0, head, rows], rtol=1e-12, atol=1e-12)
        same = mine[2].float() - emulated[0][0, rows, head].to(mine[2].dtype).float()
        assert same.norm() <= 1e-4 * mine[2].float().norm()
        torch.testing.assert_close(mine[3].double(), emulated[1][0, head, rows], rtol=0, atol=1e-5)


def test_tile_coordinates_agree_with_the_geometry():
    resolved = fps.AttentionConfig(tile=(2, 3, 4)).resolve((5, 7, 9), 1)
    tiles = resolved.geometry.tiles
    mine = tile_coordinates((5, 7, 9), (2, 3, 4)) @ torch.tensor([tiles[1] * tiles[2], tiles[2], 1])
    assert torch.equal(mine, resolved.geometry.tile_of_token)
