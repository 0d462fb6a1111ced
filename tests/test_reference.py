"""The reference: exact attention against torch and brute force, emulated FP8 against a naive loop."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import brute
from fpsattention import reference
from fpsattention.core.config import AttentionConfig
from fpsattention.core.reference import emulated_attention, exact_attention, quantize

GRID, TILE, LENGTH = (4, 5, 7), (2, 3, 3), 140  # 2 x 2 x 3 tiles, ragged along h and w
CONFIGS = [
    AttentionConfig(),
    AttentionConfig(tile=TILE),
    AttentionConfig(tile=TILE, window=(1, 2, 1)),
    AttentionConfig(tile=(2, 1, 2), window=(1, 3, 3), border="truncate"),
    AttentionConfig(tile=(4, 5, 7)),
    AttentionConfig(tile=(5, 6, 8)),
    AttentionConfig(tile=(1, 1, 1), window=(1, 5, 3)),
    AttentionConfig(tile=(1, 2, 2), window=((1, 3, 1), (3, 1, 3), (9, 9, 9)), border="truncate"),
    AttentionConfig(tile=(1, 2, 2), window=((1, 3, 1), (3, 1, 3), (1, 3, 1))),
]


def qkv(seed=0, batch=2, length=LENGTH, heads=3, head_dim=16, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, length, heads, head_dim, generator=generator).to(dtype) for _ in range(3)]


def rms(x, ref):
    """Relative RMS error."""
    return ((x.double() - ref.double()).norm() / ref.double().norm()).item()


def masks(config, grid, heads):
    """bool [heads, L, L]"""
    resolved = config.resolve(grid, heads)
    windows = resolved.windows * (heads // len(resolved.windows))
    return torch.stack([brute.token_mask(grid, resolved.tile, w, config.border) for w in windows])


# --- exact attention ---


def test_dense_is_sdpa():
    q, k, v = qkv(dtype=torch.float64)
    out, lse = exact_attention(q, k, v, grid=GRID, config=AttentionConfig())
    expected = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    scores = q.transpose(1, 2) @ k.transpose(1, 2).mT / 4
    torch.testing.assert_close(lse, scores.logsumexp(-1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("config", CONFIGS)
def test_exact_is_masked_softmax(config):
    q, k, v = qkv()
    out, lse = exact_attention(q, k, v, grid=GRID, config=config, scale=0.4)
    first = [x.transpose(1, 2) for x in (q, k, v)]
    expected, expected_lse = brute.masked_softmax(*first, masks(config, GRID, 3), 0.4)
    assert (out.dtype, out.shape) == (torch.float64, q.shape)
    torch.testing.assert_close(out, expected.transpose(1, 2), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-12, atol=1e-12)


@st.composite
def cases(draw):
    grid = draw(st.tuples(*[st.integers(1, 8)] * 3).filter(lambda x: math.prod(x) <= 200))
    tile = draw(st.tuples(*[st.integers(1, 8)] * 3))
    windows = tuple(
        tuple(draw(st.sampled_from(brute.legal_windows(-(-g // t)))) for g, t in zip(grid, tile, strict=True))
        for _ in range(2)
    )
    border = draw(st.sampled_from(["clamp", "truncate"]))
    return grid, AttentionConfig(tile=tile, window=windows, border=border)


@settings(max_examples=40, deadline=None)
@given(cases())
def test_exact_on_random_geometry(case):
    grid, config = case
    q, k, v = qkv(batch=1, length=math.prod(grid), heads=2, head_dim=4)
    out, lse = exact_attention(q, k, v, grid=grid, config=config)
    first = [x.transpose(1, 2) for x in (q, k, v)]
    expected, expected_lse = brute.masked_softmax(*first, masks(config, grid, 2), 0.5)
    torch.testing.assert_close(out, expected.transpose(1, 2), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("config", [AttentionConfig(tile=TILE), CONFIGS[7]])
def test_exact_is_differentiable(config, monkeypatch):
    monkeypatch.setattr(reference, "BUDGET", 2**12)  # many chunks, each of them recomputed in the backward
    leaves = [x.requires_grad_() for x in qkv(dtype=torch.float64)]
    out, lse = exact_attention(*leaves, grid=GRID, config=config)
    weight = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    grads = torch.autograd.grad((out * weight).sum() + lse.square().sum(), leaves)
    expected, expected_lse = brute.masked_softmax(
        *(x.transpose(1, 2) for x in leaves), masks(config, GRID, 3), 0.25
    )
    loss = (expected.transpose(1, 2) * weight).sum() + expected_lse.square().sum()
    torch.testing.assert_close(grads, torch.autograd.grad(loss, leaves), rtol=1e-10, atol=1e-10)


def test_exact_in_float32_is_close_to_float64():
    q, k, v = qkv(dtype=torch.bfloat16)
    out, lse = exact_attention(q, k, v, grid=GRID, config=CONFIGS[2], dtype=torch.float32)
    expected, expected_lse = exact_attention(q, k, v, grid=GRID, config=CONFIGS[2])
    assert out.dtype == lse.dtype == torch.float32
    assert rms(out, expected) < 1e-6
    assert (lse - expected_lse).abs().max() < 1e-5


# --- quantisation, against a table of E4M3 and loops over the groups ---

# Values 0 to 448 in the order of their bytes: sign 0, 4 bits of exponent with bias 7, 3 of mantissa.
E4M3 = np.array(
    [(m / 8 * 2**-6 if e == 0 else (1 + m / 8) * 2.0 ** (e - 7)) for e in range(16) for m in range(8)][:-1]
)


def to_e4m3(x):
    """The value of E4M3 nearest to each of x (float array), a tie going to the even byte; saturating."""
    size = np.minimum(np.abs(np.asarray(x, dtype=np.float64)), 448.0)
    low = np.searchsorted(E4M3, size, side="right") - 1
    high = np.minimum(low + 1, len(E4M3) - 1)
    below, above = size - E4M3[low], E4M3[high] - size
    up = (above < below) | ((above == below) & (low % 2 == 1))
    return np.copysign(np.where(up, E4M3[high], E4M3[low]), x)


def test_rounding_is_to_nearest_even_and_saturates():
    middles = (E4M3[1:] + E4M3[:-1]) / 2
    x = np.concatenate(
        [E4M3, middles, middles * (1 + 1e-6), middles * (1 - 1e-6), [460.0, 465.0, 1e30, np.inf]]
    )
    x = np.concatenate([x, -x]).astype(np.float32)
    rounded = reference._to_e4m3(torch.from_numpy(x))
    assert rounded.dtype == torch.float8_e4m3fn
    np.testing.assert_array_equal(rounded.float().numpy(), to_e4m3(x))


def naive_groups(x, groups, largest):
    """x [L, D] as (values of E4M3, fp32 scale of every group); groups are lists of token indices.

    The largest element of a group becomes `largest`.
    """
    x = x.float().numpy()
    x8, scales = np.zeros_like(x), np.ones(len(groups), np.float32)
    for g, tokens in enumerate(groups):
        amax = np.abs(x[tokens]).max(initial=0)
        if amax > 0:
            x8[tokens] = to_e4m3(x[tokens] * (np.float32(largest) / amax))
            scales[g] = amax / np.float32(largest)
    return x8, scales


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    "config",
    [
        AttentionConfig(tile=TILE),
        AttentionConfig(tile=TILE, quant_tile=(4, 3, 6)),
        AttentionConfig(tile=TILE, quant_tile=(20, 30, 30), smooth_k=True),
        AttentionConfig(tile=GRID),  # two key blocks
        AttentionConfig(tile=(4, 5, 8), quant_tile=(4, 5, 16)),
    ],
)
def test_quantize_bit_for_bit(config, dtype):
    q, k, v = qkv(dtype=dtype)
    q[:, 3] = 0.0
    k[..., 5] += 3
    resolved = config.resolve(GRID, 3)
    x = quantize(q, k, v, resolved)
    tiles, bricks = (brute.tile_tokens(GRID, t) for t in (resolved.tile, resolved.quant_tile))
    blocks = brute.key_blocks(GRID, resolved.tile)
    brick_of_tile = [next(b for b, tokens in enumerate(bricks) if tile[0] in tokens) for tile in tiles]
    for b in range(2):
        for h in range(3):
            key = k[b, :, h]
            if config.smooth_k:
                mean = key.double().mean(0).float()
                torch.testing.assert_close(x.k_mean[b, h], mean, rtol=0, atol=0)
                key = key.float() - mean
            for values, x8, scale in ((q[b, :, h], x.q8, x.q_scale), (key, x.k8, x.k_scale)):
                expected, scales = naive_groups(values, bricks, 14)
                np.testing.assert_array_equal(x8[b, h].float().numpy(), expected)
                np.testing.assert_array_equal(scale[b, h].numpy(), scales[brick_of_tile])
            expected, scales = naive_groups(v[b, :, h], blocks, 448)
            np.testing.assert_array_equal(x.v8[b, h].float().numpy(), expected)
            np.testing.assert_array_equal(x.v_scale[b, h].numpy(), scales)
    assert (x.k_mean is None) == (not config.smooth_k)


def test_dequantised_views():
    q, k, v = qkv(batch=1)
    x = quantize(q, k, v, AttentionConfig(tile=TILE).resolve(GRID, 3))
    for given_, seen in ((q, x.q), (k, x.k), (v, x.v)):
        error = (seen.transpose(1, 2) - given_).abs()
        assert 0 < error.max() <= given_.abs().max() / 16, "half a step of E4M3 at most: 2**-4 of the value"


def test_a_group_of_zeros_or_of_next_to_nothing_has_scale_one():
    q, k, v = qkv(batch=1, heads=1)
    tile = brute.tile_tokens(GRID, TILE)[4]
    q[:, tile] = 0.0
    k[:, tile] = 1e-38  # 448 / 1e-38 is no fp32 number
    v[:, tile] = 0.0
    x = quantize(q, k, v, AttentionConfig(tile=TILE).resolve(GRID, 1))
    assert x.q_scale[0, 0, 4] == x.k_scale[0, 0, 4] == x.v_scale[0, 0, 4] == 1.0
    assert not x.q[0, 0, tile].any()
    assert not x.k[0, 0, tile].any()
    assert not x.v[0, 0, tile].any()
    assert (x.q_scale[0, 0, :4] < 1).all()


# --- emulated attention ---


LN2 = math.log(2)
LSE_BIAS = -math.log(2 * LN2**2)  # of an octave: log of the mean of a code's number over 2^z


def index_of(groups, length):
    """int [L]: the group of each token."""
    index = np.empty(length, int)
    for g, tokens in enumerate(groups):
        index[tokens] = g
    return index


def naive_emulation(q, k, v, mask, bricks, blocks, scale, smooth):
    """(out, lse) of one head by loops over its rows and their key blocks, from the contract's formulas, in fp64."""
    shift = np.zeros(len(q))
    if smooth:
        mean = k.double().mean(0).float()
        shift = scale * (q.double() @ mean.double()).numpy()
        k = k.float() - mean
    brick_of_token, block_of_token = index_of(bricks, len(q)), index_of(blocks, len(q))
    q8, s_q = naive_groups(q, bricks, 14)
    k8, s_k = naive_groups(k, bricks, 14)
    v8, s_v = naive_groups(v, blocks, 448)
    q8, k8, v8, s_q, s_k, s_v = (x.astype(np.float64) for x in (q8, k8, v8, s_q, s_k, s_v))
    out, lse = np.empty(q.shape), np.empty(len(q))
    for i in range(len(q)):
        total, sums = 0.0, 0.0
        for block in np.unique(block_of_token[mask[i].numpy()]):
            keys = np.flatnonzero(mask[i].numpy() & (block_of_token == block))
            z = k8[keys] @ q8[i] * s_q[brick_of_token[i]] * s_k[brick_of_token[keys]] * (scale / LN2)
            m = math.ceil(z.max())
            p = E4M3[np.clip(np.round(120 + 8 * (z - m)), 0, 126).astype(int)]
            sums += 2.0**m * s_v[block] * (p @ v8[keys])
            total += 2.0**m * p.sum()
        out[i] = sums / total
        lse[i] = math.log(total / 256) - LSE_BIAS + shift[i]
    return torch.from_numpy(out), torch.from_numpy(lse)


@pytest.mark.parametrize(
    ("grid", "config"),
    [
        (GRID, AttentionConfig(tile=TILE)),
        (GRID, AttentionConfig(tile=TILE, window=(1, 2, 1), quant_tile=(2, 6, 3))),
        (GRID, AttentionConfig(tile=(2, 1, 2), window=(1, 3, 3), border="truncate", smooth_k=True)),
        (GRID, AttentionConfig(tile=(1, 2, 2), window=((1, 3, 1), (3, 1, 3)), quant_tile=(8, 2, 4), smooth_k=True)),
        # Slots of two and three key blocks, ragged tiles with fewer.
        (GRID, AttentionConfig(tile=GRID)),
        ((5, 8, 10), AttentionConfig(tile=(3, 7, 7), window=(1, 2, 1))),
        ((4, 9, 10), AttentionConfig(tile=(4, 9, 8), quant_tile=(4, 9, 16))),
    ],
)  # fmt: skip
def test_emulation_is_the_contract(grid, config):
    q, k, v = qkv(length=math.prod(grid), heads=2)
    k[..., 3] += 4
    v[:, 100:] *= 3
    call = {"grid": grid, "config": config, "scale": 0.3}
    out, lse = emulated_attention(q, k, v, **call, dtype=torch.float64)
    as_fp32, lse_fp32 = emulated_attention(q, k, v, **call)
    resolved = config.resolve(grid, 2)
    bricks, blocks = brute.tile_tokens(grid, resolved.quant_tile), brute.key_blocks(grid, resolved.tile)
    mask = masks(config, grid, 2)
    for b in range(2):
        for h in range(2):
            expected, expected_lse = naive_emulation(
                q[b, :, h], k[b, :, h], v[b, :, h], mask[h], bricks, blocks, 0.3, config.smooth_k
            )
            torch.testing.assert_close(out[b, :, h], expected, rtol=0, atol=1e-9)
            torch.testing.assert_close(lse[b, h], expected_lse, rtol=0, atol=1e-9)
            # In fp32, a code near a tie may round otherwise.
            assert rms(as_fp32[b, :, h], expected) < 5e-4
            assert (lse_fp32[b, h] - expected_lse).square().mean().sqrt() < 2e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("config", CONFIGS)
def test_emulation_is_within_fp8_of_exact(config, dtype):
    q, k, v = qkv(head_dim=64, dtype=dtype)
    out, lse = emulated_attention(q, k, v, grid=GRID, config=config)
    expected, expected_lse = exact_attention(q, k, v, grid=GRID, config=config)
    assert (out.dtype, out.shape, lse.dtype, lse.shape) == (dtype, q.shape, torch.float32, (2, 3, LENGTH))
    # Three roundings of about 2.6 % RMS each (V, P, and Q and K through the scores), less where few keys
    # dominate.
    assert 0.02 < rms(out, expected) < 0.07
    assert (lse - expected_lse).abs().max() < 0.25


def nasty(name):
    q, k, v = qkv(batch=1, heads=2, head_dim=64)
    tile = brute.tile_tokens(GRID, TILE)[5]
    if name == "zero tile":
        for x in (q, k, v):
            x[:, tile] = 0
    elif name == "all zero":
        q, k, v = (torch.zeros_like(x) for x in (q, k, v))
    elif name == "constant":
        q, k, v = (torch.full_like(x, 0.7) for x in (q, k, v))
    elif name == "very negative":
        q, k = -20 - q.abs(), 20 + k.abs()  # scores near -3200, far below what exp can hold
    elif name == "very positive":
        q, k = 20 + q.abs(), 20 + k.abs()
    elif name == "outlier channels":
        q[..., 7] *= 100
        k[..., 9] *= 100
        v[..., 11] *= 100
    elif name == "hot token":
        k[:, 77] *= 50
    elif name == "tiny":
        q, k, v = q * 1e-35, k * 1e-35, v * 1e-35
    return q, k, v


NASTY = [
    "zero tile",
    "all zero",
    "constant",
    "very negative",
    "very positive",
    "outlier channels",
    "hot token",
    "tiny",
]


@pytest.mark.parametrize("name", NASTY)
@pytest.mark.parametrize("window", [None, (1, 2, 1)])
def test_nasty_inputs(name, window):
    """Against exact attention on the rounded operands, rounding P is the only error, and it is bounded.

    z is off its code by at most half a code, 2^(1/16), and the code's number is 0 to 6.2 % above 2^z, the highest at a
    fraction of 0.44 of an octave. So P is between `least` and `most` times 2^z, and so is l. A P below 2^-6 is a
    subnormal, off by 2^-10 at most, where l is at least `least` times 128.
    """
    q, k, v = nasty(name)
    config = AttentionConfig(tile=TILE, window=window)
    out, lse = emulated_attention(q, k, v, grid=GRID, config=config)
    assert out.isfinite().all()
    assert lse.isfinite().all()
    x = quantize(q, k, v, config.resolve(GRID, 2))
    seen = {"grid": GRID, "config": config, "tensor_layout": "HND"}
    expected, expected_lse = exact_attention(x.q, x.k, x.v, **seen)
    size, _ = exact_attention(x.q, x.k, x.v.abs(), **seen)
    fraction = 1 / LN2 - 1
    least, most = 2 ** (-1 / 16), (1 + fraction) * 2 ** (1 / 16 - fraction)
    bound = (most / least - 1) * size + LENGTH * 2**-10 / (128 * least) * x.v.abs().amax(2, keepdim=True)
    assert ((out.transpose(1, 2) - expected).abs() <= bound * (1 + 1e-3)).all()
    error = lse + LSE_BIAS - expected_lse
    assert math.log(least) - 1e-5 <= error.min() and error.max() <= math.log(most) + 2e-3
    assert name == "all zero" or name == "tiny" or out.any()


def test_equal_keys_are_averaged_exactly():
    """l is the sum of the same rounded P, so only the LSE shows how far P is from 2^z."""
    q = torch.full((1, LENGTH, 1, 16), 0.5)
    v = torch.randn(1, LENGTH, 1, 16, generator=torch.Generator().manual_seed(0))
    for factor in (1.0, 1.1, 1.2, 1.3):
        call = {"grid": GRID, "config": AttentionConfig(tile=TILE), "scale": factor}
        out, lse = emulated_attention(q, q, v, **call)
        z = 16 * 0.5 * 0.5 * factor / LN2
        m = math.ceil(z)
        p = E4M3[round(120 + 8 * (z - m))] / 256
        mean = quantize(q, q, v, AttentionConfig(tile=TILE).resolve(GRID, 1)).v[0, 0].double().mean(0)
        torch.testing.assert_close(out[0, :, 0].double(), mean.expand(LENGTH, -1), rtol=1e-5, atol=1e-7)
        expected = math.log(LENGTH * p * 2.0**m) - LSE_BIAS
        torch.testing.assert_close(lse, torch.full_like(lse, expected), rtol=1e-6, atol=0)


def test_bias_of_the_lse_is_the_mean_of_a_code_over_an_octave():
    """And so the LSE of many keys is near that of exact attention."""
    z = np.arange(1_000_000) / 1_000_000
    numbers = E4M3[np.round(112 + 8 * z).astype(int)] / 128
    assert abs(math.log((numbers / 2**z).mean()) - LSE_BIAS) < 3e-3, "rounding to a code adds no more"
    q, k, v = qkv(head_dim=64)
    call = {"grid": GRID, "config": AttentionConfig(tile=GRID)}
    error = emulated_attention(q, k, v, **call)[1] - exact_attention(q, k, v, **call)[1]
    assert abs(float(error.mean())) < 3e-3


def test_each_key_block_has_its_own_exponent():
    """Keys 40 octaves below another block's keep their full precision, beside a key that holds no value."""
    grid, config = (1, 1, 256), AttentionConfig(tile=(1, 1, 128))
    q, k, v = (x[:, :, :1] for x in qkv(length=256, head_dim=64))
    q[..., 0], k[..., 0], v[:, 0] = 8.0, 0.0, 0.0
    k[:, 0, :, 0] = 40.0 * LN2  # * 8 / 8, the scale
    out, _ = emulated_attention(q, k, v, grid=grid, config=config, dtype=torch.float64)
    x = quantize(q, k, v, config.resolve(grid, 1))
    z = x.q[0, 0].double() @ x.k[0, 0, 128:].double().T / 8 / LN2
    p = E4M3[np.round(120 + 8 * (z - z.amax(1, keepdim=True).ceil()).numpy()).clip(0).astype(int)]
    of_block = torch.from_numpy(p) @ x.v[0, 0, 128:].double()
    assert (
        rms(
            out[0, :, 0] / out[0, :, 0].norm(dim=1, keepdim=True),
            of_block / of_block.norm(dim=1, keepdim=True),
        )
        < 1e-6
    )


@pytest.mark.parametrize("which", ["k", "v"])
def test_nan_reaches_only_the_queries_that_attend_it(which):
    operands = dict(zip("qkv", qkv(batch=1, heads=2, head_dim=64), strict=True))
    config = AttentionConfig(tile=TILE, window=(1, 1, 1))
    tile = brute.tile_tokens(GRID, TILE)[5]
    clean, _ = emulated_attention(**operands, grid=GRID, config=config)
    for bad in (float("nan"), float("inf")):
        broken = operands[which].clone()
        broken[0, tile[0], 1, 3] = bad
        out, lse = emulated_attention(**{**operands, which: broken}, grid=GRID, config=config)
        reached = torch.zeros(1, LENGTH, 2, dtype=torch.bool)
        reached[0, tile, 1] = True
        assert out.isnan().all(-1).equal(reached)
        assert lse.isnan().equal(
            reached.transpose(1, 2) if which == "k" else torch.zeros_like(lse, dtype=torch.bool)
        )
        assert out[~reached].equal(clean[~reached])


# --- smoothing K ---


def test_smoothing_k_removes_a_shared_offset():
    q, k, v = qkv(head_dim=64)
    k = k + 16 * torch.randn(64, generator=torch.Generator().manual_seed(1))
    error, error_lse = {}, {}
    for smooth in (False, True):
        config = AttentionConfig(tile=TILE, window=(1, 2, 1), smooth_k=smooth)
        out, lse = emulated_attention(q, k, v, grid=GRID, config=config)
        expected, expected_lse = exact_attention(q, k, v, grid=GRID, config=config)
        error[smooth], error_lse[smooth] = rms(out, expected), (lse - expected_lse).abs().max().item()
    assert error[True] < 0.07 < 0.2 < error[False]
    assert error_lse[True] < 0.25 < 0.5 < error_lse[False]


def test_smoothing_takes_the_mean_of_a_sample():
    """Of 4,608 tokens, every second; of those, the valid ones."""
    grid, config = (4, 32, 35), AttentionConfig(tile=(4, 8, 8), smooth_k=True)
    q, k, v = qkv(length=4608)
    resolved = config.resolve(grid, 3, 0, 128)
    x = quantize(q, k, v, resolved)
    mean = k[:, ::2].double().mean(1).float()
    torch.testing.assert_close(x.k_mean, mean, rtol=0, atol=0)
    counts = torch.tensor([0, 7], dtype=torch.int32)
    x = quantize(q, k, v, resolved, suffix_valid=counts)
    for b, n in enumerate((4480, 4487)):
        torch.testing.assert_close(x.k_mean[b], k[b, :n:2].double().mean(0).float(), rtol=0, atol=0)


def test_with_smoothing_an_offset_changes_the_lse_only():
    q, k, v = qkv(head_dim=64)
    config = AttentionConfig(tile=TILE, smooth_k=True)
    offset = torch.randn(64, generator=torch.Generator().manual_seed(1))
    out, lse = emulated_attention(q, k, v, grid=GRID, config=config)
    moved, moved_lse = emulated_attention(q, k + offset, v, grid=GRID, config=config)
    assert rms(moved, out) < 0.005, "a few keys cross a rounding boundary of E4M3"
    torch.testing.assert_close(moved_lse, lse + (q @ offset).transpose(1, 2) / 8, rtol=0, atol=0.01)


# --- brick scales ---


def test_coarser_bricks_cost_accuracy_where_tiles_differ():
    q, k, v = qkv(head_dim=64)
    for i, tokens in enumerate(brute.tile_tokens(GRID, TILE)):
        k[:, tokens] *= 2.0 ** -(7 * (i % 4))
        q[:, tokens] *= 2.0 ** (7 * (i % 4))  # every tile's own scores stay as they were
    error = []
    for quant_tile in (None, (4, 6, 9)):
        config = AttentionConfig(tile=TILE, quant_tile=quant_tile, window=(1, 1, 1))
        out, _ = emulated_attention(q, k, v, grid=GRID, config=config)
        error.append(rms(out, exact_attention(q, k, v, grid=GRID, config=config)[0]))
    assert error[0] < 0.07 < 2 * 0.07 < error[1]


# --- what holds for both ---


@pytest.fixture(params=[exact_attention, emulated_attention])
def attention(request):
    return request.param


def test_every_head_has_its_own_window(attention):
    q, k, v = qkv()
    windows = ((1, 3, 1), (3, 1, 3), (9, 9, 9))
    config = AttentionConfig(tile=(1, 2, 2), window=windows)
    out, lse = attention(q, k, v, grid=GRID, config=config)
    for h, window in enumerate(windows):
        one = AttentionConfig(tile=(1, 2, 2), window=window)
        q1, k1, v1 = (x[:, :, h : h + 1] for x in (q, k, v))
        out1, lse1 = attention(q1, k1, v1, grid=GRID, config=one)
        torch.testing.assert_close(out[:, :, h : h + 1], out1, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(lse[:, h : h + 1], lse1, rtol=1e-5, atol=1e-6)


def test_layouts_and_strides_do_not_matter(attention):
    q, k, v = qkv()
    config = CONFIGS[7]
    out, lse = attention(q, k, v, grid=GRID, config=config)
    heads_first = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
    out2, lse2 = attention(*heads_first, grid=GRID, config=config, tensor_layout="HND")
    assert out2.transpose(1, 2).equal(out)
    assert lse2.equal(lse)
    packed = torch.stack([q, k, v], dim=2)  # [B, L, 3, H, D], as a fused projection leaves it
    out3, lse3 = attention(*packed.unbind(2), grid=GRID, config=config)
    assert out3.equal(out)
    assert lse3.equal(lse)


def test_empty_batch_and_empty_grid(attention):
    q = torch.zeros(0, LENGTH, 2, 8)
    out, lse = attention(q, q, q, grid=GRID, config=AttentionConfig(tile=TILE))
    assert (out.shape, lse.shape) == (q.shape, (0, 2, LENGTH))
    q = torch.zeros(2, 0, 3, 8)
    out, lse = attention(q, q, q, grid=(4, 0, 7), config=AttentionConfig())
    assert (out.shape, lse.shape) == (q.shape, (2, 3, 0))


def test_arithmetic_settings_of_torch_are_restored(attention):
    q, k, v = qkv()
    before = torch.backends.cuda.matmul.allow_tf32
    try:
        for setting in (True, False):
            torch.backends.cuda.matmul.allow_tf32 = setting
            attention(q, k, v, grid=GRID, config=CONFIGS[2])
            assert torch.backends.cuda.matmul.allow_tf32 is setting
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


class LargestTensor(TorchDispatchMode):
    """Count the elements of the largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        viewed = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if torch.is_tensor(x)}
        for x in tree_leaves(result):
            if torch.is_tensor(x) and x.untyped_storage().data_ptr() not in viewed:
                self.elements = max(self.elements, x.numel())
        return result


@pytest.mark.parametrize("config", [CONFIGS[0], CONFIGS[2], CONFIGS[3], CONFIGS[6], CONFIGS[8]])
def test_memory_is_bounded_and_the_bound_changes_nothing(attention, config, monkeypatch):
    q, k, v = qkv()
    out, lse = attention(q, k, v, grid=GRID, config=config)
    monkeypatch.setattr(reference, "BUDGET", 2**12)  # the scores of one head are 19,600
    with LargestTensor() as largest:  # the geometry is cached by now
        out2, lse2 = attention(q, k, v, grid=GRID, config=config)
    assert q.numel() <= largest.elements <= max(2**12, q.numel())
    torch.testing.assert_close(out2, out, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse2, lse, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("grid", "config"),
    [
        ((21, 45, 80), AttentionConfig()),
        ((21, 45, 80), AttentionConfig(tile=(7, 9, 2), window=(3, 3, 9))),
        ((36, 48, 48), AttentionConfig(tile=(6, 8, 8), window=(6, 6, 1))),
        ((33, 45, 80), AttentionConfig(tile=(3, 8, 16), window=(3, 5, 5), border="truncate")),
    ],
)
def test_chunks_of_video_sizes_stay_within_the_budget(grid, config):
    resolved = config.resolve(grid, 1)
    head_dim, length = 128, math.prod(grid)
    count = torch.zeros(length, dtype=torch.int64)
    pairs = chunks = 0
    for queries, keys, _ in reference._chunks(resolved, resolved.windows[0], 1, head_dim, reference.BUDGET):
        n, rows = queries.shape
        assert n * keys.shape[1] * max(rows, head_dim) <= reference.BUDGET
        count[queries[queries >= 0]] += 1
        pairs += int(((queries >= 0).sum(1) * (keys >= 0).sum(1)).sum())
        chunks += 1
    assert (count == 1).all()
    assert pairs == resolved.geometry.attended_pairs(resolved.windows[0], config.border)
    least = pairs / reference.BUDGET
    assert chunks <= 3 * least + 20, "groups of equal size go together"


@pytest.mark.parametrize("text", [(0, 0), (130, 257), (3, 0)])
@pytest.mark.parametrize("tile", [(2, 3, 3), (4, 5, 8), (3, 7, 7), (2, 9, 20)])
def test_chunks_are_cut_at_the_key_blocks(tile, text):
    """Every view holds keys of one block in its last dimension, and together they hold every key once."""
    grid = (5, 9, 20)
    resolved = AttentionConfig(tile=tile, window=(1, 1, 3)).resolve(grid, 1, *text)
    per_slot = -(-math.prod(tile) // 128)
    groups = [[text[0] + i for i in tokens] for tokens in brute.tile_tokens(grid, tile)]
    for start, length in ((0, text[0]), (text[0] + 900, text[1])):
        section = list(range(start, start + length))
        groups += [section[i : i + 128 * per_slot] for i in range(0, length, 128 * per_slot)]
    blocks = [tokens[128 * i : 128 * (i + 1)] for tokens in groups for i in range(per_slot)]
    block = torch.from_numpy(index_of(blocks, 900 + sum(text)))
    assert torch.equal(resolved.geometry.block_of_token, block)
    assert resolved.geometry.n_blocks == len(blocks)
    for _, keys, lie in reference._chunks(resolved, resolved.windows[0], 1, 64, 2**14):
        seen = []
        for view in lie.of(keys):
            for own in view.flatten(0, -2):
                own = own[own >= 0]
                assert len(block[own].unique()) <= 1
                seen += [(int(block[own[0]]), len(own))] if len(own) else []
        assert sum(n for _, n in seen) == int((keys >= 0).sum())
        assert len({b for b, _ in seen}) * len(keys) >= len(seen), "a block is in one view"


ARGS = {"grid": GRID, "config": AttentionConfig(tile=TILE)}


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"q": torch.zeros(LENGTH, 3, 16)}, ValueError, ["q", "[B, L, H, D]", "[140, 3, 16]"]),
        (
            {"k": torch.zeros(2, LENGTH, 1, 16)},
            ValueError,
            ["k", "shape", "[2, 140, 1, 16]", "[2, 140, 3, 16]"],
        ),
        ({"v": torch.zeros(2, LENGTH, 3, 16, dtype=torch.half)}, ValueError, ["v", "float16", "float32"]),
        ({"k": torch.zeros(2, LENGTH, 3, 16, device="meta")}, ValueError, ["k", "device", "meta", "cpu"]),
        (
            {"q": torch.zeros(2, LENGTH, 3, 16, dtype=torch.int32)},
            TypeError,
            ["q", "int32", "torch.bfloat16, torch.float16, torch.float32, torch.float64"],
        ),
        ({"q": torch.zeros(2, LENGTH, 3, 16).to(torch.float8_e4m3fn)}, TypeError, ["q", "float8_e4m3fn"]),
        ({"q": [1.0]}, TypeError, ["q", "list", "torch.bfloat16"]),
        ({"q": torch.zeros(2, LENGTH, 3, 16).to_sparse()}, TypeError, ["q", "dense", "torch.sparse_coo"]),
        (dict.fromkeys("qkv", torch.zeros(2, LENGTH, 3, 16, device="meta")), ValueError, ["q", "meta"]),
        (
            dict.fromkeys("qkv", torch.zeros(2, LENGTH, 0, 16)),
            ValueError,
            ["q", "no heads", "[2, 140, 0, 16]"],
        ),
        (dict.fromkeys("qkv", torch.zeros(2, LENGTH, 3, 0)), ValueError, ["q", "no channels"]),
        ({"scale": 0.0}, ValueError, ["scale: 0.0", "positive"]),
        ({"scale": math.nan}, ValueError, ["scale: nan"]),
        ({"scale": 1e300}, ValueError, ["scale: 1e+300", "2**126"]),
        ({"scale": 10**400}, ValueError, ["scale", "2**126"]),
        ({"scale": True}, TypeError, ["scale: True", "number"]),
        ({"scale": "x"}, TypeError, ["scale: 'x'", "number"]),
        ({"dtype": torch.float16}, ValueError, ["dtype: torch.float16", "torch.float32 or torch.float64"]),
        ({"config": "x"}, TypeError, ["config: 'x'", "AttentionConfig", "str"]),
        ({"grid": (4, 5, 8)}, ValueError, ["140 tokens", "(4, 5, 8)", "160"]),
        ({"grid": (140,)}, ValueError, ["grid", "(140,)", "three integers"]),
        ({"tensor_layout": "HND"}, ValueError, ["3 tokens", "HND", "140"]),
        ({"tensor_layout": "BSHD"}, ValueError, ["tensor_layout", "'BSHD'", '"NHD"', '"HND"']),
        (
            {"config": AttentionConfig(tile=TILE, window=((1, 1, 1),) * 2)},
            ValueError,
            ["window", "2 windows", "3 heads"],
        ),
    ],
)
def test_errors(attention, change, error, words):
    tensors = dict(zip("qkv", qkv(), strict=True))
    tensors.update({name: change[name] for name in tensors if name in change})
    options = {**ARGS, **{name: x for name, x in change.items() if name not in tensors}}
    with pytest.raises(error) as caught:
        attention(*tensors.values(), **options)
    for word in words:
        assert word in str(caught.value)


def test_emulation_of_nothing_is_an_error():
    with pytest.raises(ValueError, match=r"quant='none'.*\"fp8\".*exact_attention"):
        emulated_attention(*qkv(), grid=GRID, config=AttentionConfig(quant="none"))


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_coarse_products_are_not_used_and_the_setting_is_left_alone(monkeypatch, precision):
    """The setting belongs to the whole process, so the reference reads it and never sets it."""
    q, k, v = qkv()
    call = {**ARGS, "dtype": torch.float32}
    want = exact_attention(q, k, v, **call)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        for device in ("cuda", "cpu"):
            assert not reference._products_are_fp32(torch.device(device)), device
        seen = set()
        product = reference._exact_product

        def watch(a, b):
            seen.add(torch.get_float32_matmul_precision())
            return product(a, b)

        monkeypatch.setattr(reference, "_exact_product", watch)
        got = exact_attention(q, k, v, **call)
        assert seen == {precision}
    finally:
        torch.set_float32_matmul_precision(before)
    assert reference._products_are_fp32(torch.device("cuda"))
    for x, y in zip(got, want, strict=True):
        assert x.dtype == torch.float32
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


def test_coarse_products_are_replaced(monkeypatch):
    """fp64 replaces them. Without a GPU that rounds to TF32, the test only sees the dtype of the product."""
    a, b = torch.full((1, 1), 1 + 2.0**-20), torch.full((1, 1), 1 - 2.0**-20)
    seen = []
    product = torch.Tensor.__matmul__
    monkeypatch.setattr(reference, "_products_are_fp32", lambda device: False)
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda x, y: seen.append(x.dtype) or product(x, y))
    assert reference._exact_product(a, b).dtype == torch.float32
    assert seen == [torch.float64]


def test_coarse_products_change_no_operand_of_the_fp8_arithmetic(monkeypatch):
    """Operands of its products have at most 8 significant bits, or the product is replaced by one in fp64."""
    operands = []
    product = torch.Tensor.__matmul__

    def watch(a, b):
        operands.extend((a.detach().clone(), b.detach().clone()))
        return product(a, b)

    monkeypatch.setattr(reference, "_products_are_fp32", lambda device: False)
    monkeypatch.setattr(torch.Tensor, "__matmul__", watch)
    q, k, v = qkv()
    config = replace(ARGS["config"], quant="fp8", smooth_k=True)
    call = {**ARGS, "config": config}
    out, lse = emulated_attention(q, k, v, **call)
    forward = len(operands)
    reference.emulated_backward(q, k, v, out, lse, torch.randn_like(out), torch.randn_like(lse), **call)
    assert 0 < forward < len(operands)
    for x in operands:
        assert x.dtype == torch.float64 or (x.dtype == torch.float32 and torch.equal(x, x.bfloat16().float()))
