"""The reference gradients.

The gradient of exact attention is compared with finite differences, the straight-through gradient of the FP8 contract
with its formulas in full score matrices, and the gradient with the kernels' 16-bit roundings with both.
"""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint

import brute
import fpsattention as fps
from fpsattention import reference
from fpsattention.core.config import AttentionConfig
from fpsattention.core.reference import emulated_attention, emulated_backward, exact_attention, quantize
from inputs import KINDS, make_qkv, poisoned
from test_reference import E4M3, GRID, LENGTH, LN2, LSE_BIAS, TILE, LargestTensor, index_of, masks, qkv, rms

# Both borders, ragged tiles, windows per head, bricks, smoothing.
FP8_CONFIGS = [
    AttentionConfig(tile=TILE),
    AttentionConfig(tile=TILE, window=(1, 2, 1), quant_tile=(2, 6, 3)),
    AttentionConfig(tile=(2, 1, 2), window=(1, 3, 3), border="truncate", smooth_k=True),
    AttentionConfig(tile=(1, 2, 2), window=((1, 3, 1), (3, 1, 3), (9, 9, 9)), border="truncate"),
    AttentionConfig(tile=(1, 2, 2), window=((1, 3, 1), (3, 1, 3), (1, 3, 1)), quant_tile=(8, 2, 4), smooth_k=True),
    AttentionConfig(tile=GRID),  # two key blocks
]  # fmt: skip


def normal(*shape, seed=7, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def gradients(outputs, leaves, dout, dlse=None):
    """dq, dk, dv of out and lse."""
    out, lse = outputs
    loss = (out * dout).sum() if dlse is None else (out * dout).sum() + (lse * dlse).sum()
    return torch.autograd.grad(loss, leaves)


def given(shape=(2, LENGTH, 3, 16), dtype=torch.float64):
    """dout and dlse of tensors [B, L, H, D]."""
    return normal(*shape).to(dtype), normal(shape[0], shape[2], shape[1], seed=8).float()


def reference_gradients(q, k, v, dout, dlse, **call):
    """dq, dk, dv in fp64."""
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    dlse = None if dlse is None else dlse.double()
    return gradients(emulated_attention(*leaves, **call, dtype=torch.float64), leaves, dout.double(), dlse)


class Dense:
    """One call in fp64 by the contract's formulas, with score matrices [B, H, L, L]; q, k, v are [B, L, H, D]."""

    def __init__(self, q, k, v, config, scale):
        resolved = config.resolve(GRID, q.shape[2])
        x = quantize(q, k, v, resolved)
        self.scale, self.block = scale, index_of(brute.key_blocks(GRID, resolved.tile), LENGTH)
        scales = (
            x.q_scale[:, :, x.tile_of_token],
            x.k_scale[:, :, x.tile_of_token],
            x.v_scale[:, :, self.block],
        )
        scales = [s.double()[..., None] for s in scales]
        self.q, self.k, self.v = (x8.double() * s for x8, s in zip((x.q8, x.k8, x.v8), scales, strict=True))
        self.mantissas = [s / 2 ** s.log2().floor() for s in scales]
        self.mean = torch.zeros(()) if x.k_mean is None else x.k_mean.double()[:, :, None]
        self.lse_of_mean = scale * (q.double().transpose(1, 2) * self.mean).sum(-1)
        z = self.q @ self.k.mT * scale / LN2
        self.z = z.masked_fill(~masks(config, GRID, q.shape[2]), -torch.inf)

    def forward(self):
        """out, lse and P, normalised."""
        z = self.z.numpy()
        p = np.zeros_like(z)
        for block in range(self.block.max() + 1):
            own = z[..., self.block == block]
            m = np.ceil(own.max(-1, keepdims=True)).clip(-1e9)  # finite, for a block out of sight
            p[..., self.block == block] = E4M3[np.round(120 + 8 * (own - m)).clip(0).astype(int)] * 2 ** (
                m - 8
            )
        p = torch.from_numpy(p)
        total = p.sum(-1, keepdim=True)
        lse = total.log()[..., 0] - LSE_BIAS + self.lse_of_mean
        p = p / total
        return (p @ self.v).transpose(1, 2), lse, p

    def straight_through(self, dout, dlse):
        out, _, p = self.forward()
        d = dout.double().transpose(1, 2)
        delta = (dout * out).sum(-1).transpose(1, 2) - dlse
        ds = p * (d @ self.v.mT - delta[..., None])
        dq = self.scale * (ds @ self.k + dlse[..., None] * self.mean)
        return [g.transpose(1, 2) for g in (dq, self.scale * ds.mT @ self.q, p.mT @ d)]

    def sizes(self, dout, dlse):
        """The three gradients with all summands made positive: the scale of their errors."""
        out, _, p = self.forward()
        d, q, k, v = (x.abs() for x in (dout.double().transpose(1, 2), self.q, self.k, self.v))
        delta = (d * out.transpose(1, 2).abs()).sum(-1) + dlse.abs()
        ds = p * (d @ v.mT + delta[..., None])
        dq = self.scale * (ds @ k + dlse.abs()[..., None] * self.mean.abs())
        return [g.transpose(1, 2) for g in (dq, self.scale * ds.mT @ q, p.mT @ d)]

    def in_16_bits(self, out, lse, dout, dlse):
        """The gradients with the roundings of dO' and dS in the places where the kernels have them.

        P has a code of any octave: no key underflows.
        """

        def bf16(x):
            return x.float().bfloat16().double()

        d = dout.double().transpose(1, 2)
        lse2 = ((lse - self.lse_of_mean) / LN2)[..., None]
        m = lse2.ceil()
        c = 2 ** (m - lse2 - LSE_BIAS / LN2)
        octave, code = np.divmod(np.round(8 * self.z.numpy().clip(-1e9)), 8)
        x = torch.from_numpy(E4M3[56 + code.astype(int)] * 2 ** (octave - m.numpy()))
        delta = c * ((d * out.transpose(1, 2)).sum(-1) - dlse)[..., None]
        m_q, m_k, m_v = self.mantissas
        q, k, v = self.q / m_q, self.k / m_k, self.v / m_v
        assert all(torch.equal(t, bf16(t)) for t in (q, k, v))
        ds = bf16(x * bf16(m_q * m_k.mT * (m_v.mT * (bf16(c * d) @ v.mT) - delta)))
        dq = self.scale * (ds @ k / m_q + dlse[..., None] * self.mean)
        dk, dv = self.scale * ds.mT @ q / m_k, x.mT @ bf16(c * d)
        return [g.transpose(1, 2) for g in (dq, dk, dv)]


# --- exact attention ---

SMALL = (2, 3, 4)  # in tiles of (1, 2, 3): ragged along h and w


@pytest.mark.parametrize("tensor_layout", ["NHD", "HND"])
@pytest.mark.parametrize(
    "config",
    [
        AttentionConfig(),
        AttentionConfig(tile=(1, 2, 3), window=(1, 1, 2), border="truncate"),
        AttentionConfig(tile=(1, 1, 2), window=((1, 3, 1), (2, 1, 2))),
    ],
)
def test_exact_has_the_gradient_of_finite_differences(config, tensor_layout, monkeypatch):
    """The gradient can be differentiated again."""
    monkeypatch.setattr(reference, "BUDGET", 2**6)
    shape = (1, 24, 2, 3) if tensor_layout == "NHD" else (1, 2, 24, 3)
    leaves = [normal(*shape, seed=s).requires_grad_() for s in range(3)]

    def attend(*operands):
        return exact_attention(*operands, grid=SMALL, config=config, scale=0.7, tensor_layout=tensor_layout)

    assert torch.autograd.gradcheck(attend, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(attend, leaves, fast_mode=True)


def test_exact_gradient_in_full():
    """Every derivative of every output, not a random projection of them."""
    leaves = [normal(1, 6, 1, 2, seed=s).requires_grad_() for s in range(3)]
    config = AttentionConfig(tile=(1, 2, 1), window=(1, 1, 1))
    assert torch.autograd.gradcheck(lambda *x: exact_attention(*x, grid=(1, 3, 2), config=config), leaves)


def test_unquantised_attention_has_the_gradient_of_finite_differences():
    leaves = [normal(1, 24, 2, 3, seed=s).requires_grad_() for s in range(3)]
    config = AttentionConfig(tile=(1, 2, 3), window=(1, 1, 2), border="truncate", quant="none")

    def attend(*operands):
        return fps.attention(*operands, grid=SMALL, config=config, backend="reference")

    assert torch.autograd.gradcheck(attend, leaves, fast_mode=True)


# --- the straight-through gradient of the emulation ---


@pytest.fixture
def small_budget(monkeypatch):
    """Many chunks, each of them recomputed in the backward."""
    monkeypatch.setattr(reference, "BUDGET", 2**14)


@pytest.mark.parametrize("scale", [0.25, 0.6])
@pytest.mark.parametrize("config", FP8_CONFIGS)
def test_emulation_has_the_gradient_of_the_contract(config, scale, small_budget):
    leaves = [x.requires_grad_() for x in qkv(dtype=torch.float64)]
    out, lse = emulated_attention(*leaves, grid=GRID, config=config, scale=scale, dtype=torch.float64)
    grads = gradients((out, lse), leaves, *given())
    dense = Dense(*(x.detach() for x in leaves), config, scale)
    expected = [*dense.forward()[:2], *dense.straight_through(*given())]
    torch.testing.assert_close([out, lse, *grads], expected, rtol=1e-10, atol=1e-10)


def test_without_rounding_emulation_has_the_gradient_of_finite_differences(monkeypatch):
    """Scales are constants that cancel. A second derivative works too."""

    def unrounded(z, _):
        m = z.amax(-1).ceil()
        return (z - m[..., None] + 8).exp2() * math.exp(LSE_BIAS), m

    monkeypatch.setattr(reference, "_StraightThrough", SimpleNamespace(apply=lambda x, rounded: x))
    monkeypatch.setattr(reference, "_probabilities", unrounded)
    leaves = [normal(1, 24, 2, 3, seed=s).requires_grad_() for s in range(3)]
    config = AttentionConfig(tile=(1, 2, 3), window=((1, 1, 2), (2, 1, 1)), border="truncate")
    call = {"grid": SMALL, "config": config}

    def attend(*operands):
        return emulated_attention(*operands, **call, dtype=torch.float64)

    torch.testing.assert_close(attend(*leaves), exact_attention(*leaves, **call))
    assert torch.autograd.gradcheck(attend, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(attend, leaves, fast_mode=True)


def test_second_gradient_is_straight_through_too():
    """d(sum dV * w) / d(dO) has the rounded P again."""
    leaves = [x.requires_grad_() for x in qkv(dtype=torch.float64)]
    dout, w = given()[0].requires_grad_(), normal(2, LENGTH, 3, 16, seed=9)
    config = FP8_CONFIGS[1]
    out, _ = emulated_attention(*leaves, grid=GRID, config=config, dtype=torch.float64)
    (dv,) = torch.autograd.grad((out * dout).sum(), leaves[2], create_graph=True)
    (twice,) = torch.autograd.grad((dv * w).sum(), dout)
    rounded = Dense(*(x.detach() for x in leaves), config, 0.25).forward()[2]
    torch.testing.assert_close(twice, (rounded @ w.transpose(1, 2)).transpose(1, 2), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gradient_in_the_dtype_of_the_call(dtype):
    """fp32 inside; asking for a gradient changes no bit of the output."""
    q, k, v = qkv(dtype=dtype)
    call = {"grid": GRID, "config": FP8_CONFIGS[2]}
    plain = emulated_attention(q, k, v, **call)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out, lse = emulated_attention(*leaves, **call)
    assert torch.equal(out, plain[0]) and torch.equal(lse, plain[1])
    dout, dlse = given(dtype=dtype)
    grads = gradients((out, lse), leaves, dout, dlse)
    assert {g.dtype for g in grads} == {dtype}
    for grad, expected in zip(grads, reference_gradients(q, k, v, dout, dlse, **call), strict=True):
        # In bf16, delta comes from out in fp32, and only the result is rounded: each element by 2^-9 at most.
        assert rms(grad, expected) < (2**-8 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize(
    "names", [x for n in (1, 2, 3) for x in itertools.combinations("qkv", n)], ids="".join
)
def test_any_subset_may_require_a_gradient(names):
    tensors = dict(zip("qkv", qkv(), strict=True))
    dout, dlse = given(dtype=torch.float32)
    call = {"grid": GRID, "config": FP8_CONFIGS[2]}
    expected = dict(zip("qkv", reference_gradients(*tensors.values(), dout, dlse, **call), strict=True))
    leaves = [tensors[n].requires_grad_() for n in names]
    outputs = emulated_attention(*tensors.values(), **call)
    for name, grad in zip(names, gradients(outputs, leaves, dout, dlse), strict=True):
        assert rms(grad, expected[name]) < 1e-5


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant):
    leaves = [x.requires_grad_() for x in qkv()]

    def attend(*operands):
        return emulated_attention(*operands, grid=GRID, config=FP8_CONFIGS[3])

    expected = gradients(attend(*leaves), leaves, *given(dtype=torch.float32))
    recomputed = checkpoint(attend, *leaves, use_reentrant=use_reentrant)
    if use_reentrant:  # it allows backward() alone
        torch.autograd.backward(recomputed, given(dtype=torch.float32))
        grads = tuple(x.grad for x in leaves)
    else:
        grads = gradients(recomputed, leaves, *given(dtype=torch.float32))
    torch.testing.assert_close(grads, expected, rtol=0, atol=0)


@pytest.mark.parametrize("config", [FP8_CONFIGS[0], FP8_CONFIGS[2]])
def test_memory_of_the_gradient_is_bounded(config, monkeypatch):
    """No buffer exceeds the budget, and the backward keeps operands, not scores."""
    leaves = [x.requires_grad_() for x in qkv(batch=1, heads=2)]
    call = {"grid": GRID, "config": config}
    dout, dlse = given(leaves[0].shape, torch.float32)
    out, lse = emulated_attention(*leaves, **call)
    expected = gradients((out, lse), leaves, dout, dlse)
    rounded = emulated_backward(*leaves, out, lse, dout, dlse, **call)
    monkeypatch.setattr(reference, "BUDGET", 2**13)  # the scores of one head are 19,600
    kept = {}

    def keep(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes() // x.element_size()
        return x

    with LargestTensor() as largest:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            outputs = emulated_attention(*leaves, **call)
        grads = gradients(outputs, leaves, dout, dlse)
        rounded_in_parts = emulated_backward(*leaves, out, lse, dout, dlse, **call)
    assert largest.elements <= 2**13
    # Room for x8 of Q, K and V, scales of tokens and channels, and indices, but not for 39,200 scores.
    assert sum(kept.values()) <= 6 * out.numel()
    for grad, want in zip(grads, expected, strict=True):
        assert rms(grad, want) < 1e-5
    for grad, want in zip(rounded_in_parts, rounded, strict=True):
        assert rms(grad, want) < 3e-4


# --- the gradient with the kernels' 16-bit roundings ---

# Relative RMS error of rounding to bf16: 2^-7 / sqrt(12) for a number in [1, 2), and 3 / (8 ln 2) is the mean of
# its inverse square.
BF16_RMS = 1.66e-3


def test_the_backwards_p_is_the_forwards():
    """But in octaves of a float's exponent: no number of it underflows, and bf16 holds it exactly."""
    z = normal(4, 200, seed=3) * 4
    m = z.amax(-1).ceil()
    code = np.round(120 + 8 * (z - m[:, None]).numpy()).astype(int)
    assert code.min() < 8 < code.max() <= 120
    for shift in (0, 5, -70):
        p = reference._number_of_code(z, m[:, None] + shift)
        assert torch.equal(p.float(), p.bfloat16().float())
        p = (p * 2.0**shift).numpy()
        np.testing.assert_array_equal(p[code >= 8], E4M3[code[code >= 8]] / 256)
        assert (abs(np.log2(p[code < 8]) - (z - m[:, None]).numpy()[code < 8]) < 1 / 16 + 0.0861).all()
    z = torch.tensor([-math.inf, math.nan])
    assert reference._number_of_code(z, torch.zeros(1)).nan_to_num(nan=7).tolist() == [0, 7]


@pytest.mark.parametrize("tensor_layout", ["NHD", "HND"])
@pytest.mark.parametrize("config", FP8_CONFIGS)
def test_every_rounding_is_where_the_kernels_have_it(config, tensor_layout, small_budget):
    """Against full matrices in fp64 with the same roundings; one of them elsewhere would show as 1e-3."""
    q, k, v = qkv()
    k[..., 3] += 2
    call = {"grid": GRID, "config": config, "scale": 0.3, "tensor_layout": tensor_layout}
    dout, dlse = given(dtype=torch.float32)

    def laid_out(x):  # its own inverse
        return x.transpose(1, 2) if tensor_layout == "HND" else x

    operands = [laid_out(x) for x in (q, k, v)]
    out, lse = emulated_attention(*operands, **call)
    grads = emulated_backward(*operands, out, lse, laid_out(dout), dlse, **call)
    expected = Dense(q, k, v, config, 0.3).in_16_bits(laid_out(out), lse, dout, dlse)
    for grad, want in zip(grads, expected, strict=True):
        assert (grad.shape, grad.dtype) == (operands[0].shape, torch.float32)
        assert rms(laid_out(grad), want) < 3e-4  # a value near a tie may round otherwise in fp32


# Here dP - delta is as large as dP and the limit is relative to the gradient itself. In the others they cancel:
# values have a mean, or one key has nearly all of the probability. Or one number decides: with one_hot_token, dK is
# that of one query, in proportion to its delta.
WELL_CONDITIONED = {"gaussian", "peaked", "channel_outliers", "zero_tile", "large"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_roundings_to_16_bits_are_the_only_error(kind, dtype):
    """Five independent roundings enter dQ and dK: of dO', V, dS, K or Q, and the result. Together they err by sqrt(5)
    times one of them, relative to the size of the summands. The rounding of out enters through delta, where it averages
    out.
    """
    q, k, v = make_qkv(kind, grid=GRID, tile=TILE, dtype=dtype, device="cpu")
    dout, dlse = given(q.shape, dtype)
    dout *= KINDS[kind].dout[dtype]
    if kind in ("tiny", "vanishing"):  # so are the gradients, below what 16 bits hold
        q, k, v = (x.float() for x in (q, k, v))
    call = {"grid": GRID, "config": FP8_CONFIGS[1]}
    out, lse = emulated_attention(q, k, v, **call)
    grads = emulated_backward(q, k, v, out, lse, dout, dlse, **call)
    expected = reference_gradients(q, k, v, dout, dlse, **call)
    sizes = Dense(q, k, v, FP8_CONFIGS[1], 64**-0.5).sizes(dout, dlse)
    for grad, want, size in zip(grads, expected, sizes, strict=True):
        assert grad.isfinite().all()
        assert (grad - want).norm() <= 5**0.5 * BF16_RMS * size.norm()
        if kind in WELL_CONDITIONED:
            assert rms(grad, want) < 1.25 * 5**0.5 * BF16_RMS


def test_no_dlse_is_zero_dlse_and_nothing_is_left_unwritten():
    q, k, v = qkv(dtype=torch.bfloat16)
    dout, dlse = given(dtype=torch.bfloat16)
    for config in FP8_CONFIGS:
        call = {"grid": GRID, "config": config}
        out, lse = emulated_attention(q, k, v, **call)
        plain = emulated_backward(q, k, v, out, lse, dout, torch.zeros_like(dlse), **call)
        expected = reference_gradients(q, k, v, dout, None, **call)
        with poisoned():
            again = emulated_backward(q, k, v, out, lse, dout, **call)
            exact = reference_gradients(q, k, v, dout, None, **call)
        for grad, same, want, wanted in zip(plain, again, expected, exact, strict=True):
            assert torch.equal(grad, same) and torch.equal(want, wanted)
            assert grad.dtype == q.dtype and rms(grad, want) < 2 * 5**0.5 * BF16_RMS


def test_gradient_of_nothing():
    for q, grid in ((torch.zeros(0, LENGTH, 2, 8), GRID), (torch.zeros(2, 0, 3, 8), (4, 0, 7))):
        call = {"grid": grid, "config": FP8_CONFIGS[0]}
        out, lse = emulated_attention(q, q, q, **call)
        assert {x.shape for x in emulated_backward(q, q, q, out, lse, out, **call)} == {q.shape}


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("out", torch.zeros(2, LENGTH, 3, 8), ["out", "[2, 3, 140, 8]", "[2, 3, 140, 16]"]),
        ("dout", torch.zeros(2, LENGTH, 1, 16), ["dout", "[2, 1, 140, 16]"]),
        ("lse", torch.zeros(2, LENGTH, 3), ["lse", "[2, 140, 3]", "[2, 3, 140]"]),
        ("dlse", torch.zeros(2, 3), ["dlse", "[2, 3]"]),
        ("dlse", 0.5, ["dlse", "float"]),
        ("out", None, ["out", "NoneType"]),
        ("dout", torch.zeros(2, LENGTH, 3, 16, dtype=torch.int32), ["dout", "int32"]),
        ("dout", torch.zeros(2, LENGTH, 3, 16, device="meta"), ["dout", "meta", "cpu"]),
        ("k", torch.zeros(2, LENGTH, 3, 16).half(), ["k", "float16"]),
        ("config", AttentionConfig(quant="none"), ["config", "none", "fp8"]),
    ],
)
def test_backward_names_what_does_not_fit(name, value, words):
    call = dict(zip("qkv", qkv(), strict=True))
    call |= {"out": call["v"], "dout": call["v"], "lse": torch.zeros(2, 3, LENGTH), "dlse": None}
    call |= {"grid": GRID, "config": FP8_CONFIGS[0], name: value}
    with pytest.raises((TypeError, ValueError)) as caught:
        emulated_backward(**call)
    for word in words:
        assert word in str(caught.value)
