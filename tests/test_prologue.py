"""`norm_rope` and `norm_rope_quantize` on the CPU: definition, reference backend, errors."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fpsattention as fps
from fpsattention import AttentionConfig
from fpsattention.core import ops, prologue
from prologue_cases import EPS, NORMS, ROPES, expected, inputs, of_one

GRID = (2, 3, 4)
CONFIG = fps.AttentionConfig(tile=(2, 2, 2), window=(1, 1, 1))


@pytest.mark.parametrize("text", [(0, 0), (3, 0), (2, 5)], ids=str)
@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_norm_rope(head_dim, norm, rope, text, seed):
    about = {"norm": norm, "rope": rope, "text": text, "text_norm": text[1] > 0, "batch": 2, "seed": seed}
    (q, k, _), given = inputs(GRID, 3, head_dim, **about)
    for name, x in (("q", q), ("k", k)):
        call = of_one(given, name)
        got = fps.norm_rope(x, grid=GRID, **call)
        torch.testing.assert_close(got, expected(x, GRID, **call).float(), rtol=1e-5, atol=1e-5)
        heads_first = fps.norm_rope(x.transpose(1, 2), grid=GRID, **call, tensor_layout="HND")
        assert torch.equal(heads_first, got.transpose(1, 2))
        half = fps.norm_rope(x.bfloat16(), grid=GRID, **call)
        assert torch.equal(half, fps.norm_rope(x.bfloat16().float(), grid=GRID, **call).bfloat16())


def test_mutations_of_the_definition_show(seed):
    """The test above would notice swapped signs, a shifted table, the other kind of norm, or a weight left out."""
    (q, _, _), given = inputs(GRID, 3, 64, seed=seed)
    norm, rope = given["q_norm"], given["rope"]
    want = expected(q, GRID, norm=norm, rope=rope)
    flipped = [x * torch.tensor([1.0, -1.0]) for x in rope]
    moved = [rope[0], rope[1], rope[2].roll(1, dims=0)]
    for mutation in (
        fps.norm_rope(q, norm, grid=GRID, rope=flipped),
        fps.norm_rope(q, norm, grid=GRID, rope=moved),
        fps.norm_rope(q, replace(norm, weight=norm.weight[:64]), grid=GRID, rope=rope),
        fps.norm_rope(q, replace(norm, weight=torch.ones_like(norm.weight)), grid=GRID, rope=rope),
        fps.norm_rope(q, replace(norm, eps=10 * norm.eps), grid=GRID, rope=rope),
        fps.norm_rope(q, None, grid=GRID, rope=rope),
    ):
        assert (mutation - want).norm() > 1e-3 * want.norm()
    for norm, of_norm in (("each head", "text_weight"), ("layer", "bias")):
        about = {"norm": norm, "rope": "heads", "text": (2, 3), "text_norm": True, "seed": seed}
        (q, _, _), given = inputs(GRID, 3, 64, **about)
        call = of_one(given, "q")
        want = expected(q, GRID, **call)
        for mutation in (
            {"norm": replace(call["norm"], **{of_norm: None})},
            {"rope": None},
            {"rope": call["rope"].roll(1, dims=1)},
            {"rope": call["rope"][:, :1]},
            {"prefix_len": 3, "suffix_len": 2},
        ):
            got = fps.norm_rope(q, grid=GRID, **call | mutation)
            assert (got - want).norm() > 1e-3 * want.norm(), mutation


@pytest.mark.parametrize("text", [(0, 0), (2, 5)], ids=str)
@pytest.mark.parametrize("tensor_layout", ["NHD", "HND"])
def test_reference_backend(tensor_layout, text, seed):
    """Bit for bit the attention of separately normalised and rotated Q and K."""
    (q, k, v), given = inputs(GRID, 2, 64, norm="layer", rope="tokens", text=text, batch=2, seed=seed)
    layout = {"grid": GRID, "tensor_layout": tensor_layout}
    if tensor_layout == "HND":
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    about = {**layout, "config": CONFIG, "scale": 0.1, "backend": "reference"}
    if any(text):
        about |= {"suffix_valid": torch.tensor([5, 3], dtype=torch.int32)}
    quantized = fps.norm_rope_quantize(q, k, v, **about, **given)
    q, k = (fps.norm_rope(x, **layout, **of_one(given, n)) for n, x in (("q", q), ("k", k)))
    about |= {n: given[n] for n in ("prefix_len", "suffix_len") if n in given}
    assert torch.equal(fps.attention(quantized), fps.attention(q, k, v, **about))


def test_fake(seed):
    """The op's fake gives the shapes that torch.compile sees."""
    with FakeTensorMode():
        q = torch.zeros(2, 24, 3, 64, dtype=torch.bfloat16)
        weight = torch.zeros(192)
        rope = [torch.zeros(n, p, 2) for n, p in zip(GRID, (12, 10, 10), strict=True)]
        rest = AttentionConfig(tile=(2, 2, 2)).spec, 0.125, "NHD"
        norm = [weight, weight], [], [], 1e-6, rope
        packed = ops.norm_rope_quantize(q, q, q, None, None, *norm, list(GRID), 0, 0, *rest)
        assert packed.shape == ops.quantize(q, q, q, None, None, list(GRID), 0, 0, *rest).shape


def both(weight, eps=EPS, **tensors):
    """Of q and k."""
    return dict.fromkeys(("q_norm", "k_norm"), fps.Norm(weight, eps=eps, **tensors))


def wrong(**kwargs):
    (q, k, v), given = inputs(GRID, 2, 64)
    return {"q": q, "k": k, "v": v, "grid": GRID, "backend": "reference"} | given | kwargs


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"q_norm": None}, ValueError, "q_norm: is missing"),
        (
            {"k_norm": fps.Norm(torch.ones(64), eps=EPS)},
            ValueError,
            r"k_norm.weight: shape \[64\] must be that of q_norm, \[128\]",
        ),
        (both(torch.ones(65)), ValueError, r"q_norm.weight: shape \[65\] must be \[64\].*or \[128\]"),
        (
            both(torch.ones(128).int()),
            ValueError,
            "q_norm.weight: torch.int32 on cpu must be floating-point",
        ),
        (
            both(torch.ones(64), eps=-1.0),
            ValueError,
            "q_norm.eps: -1.0 must be a finite number of at least 0",
        ),
        (both(torch.ones(64), eps=None), ValueError, "q_norm.eps: None must be"),
        (both(torch.ones(64), eps=float("nan")), ValueError, "q_norm.eps: nan must be"),
        (both(torch.ones(64), eps=float("inf")), ValueError, "q_norm.eps: inf must be"),
        (
            {"rope": torch.ones(1, 1, 1, 1).expand(24, 2, 32, 2), "max_angles": 3071},
            ValueError,
            "rope: has 3,072 elements, must have at most 3,071",
        ),
        (
            {"k_norm": fps.Norm(torch.ones(128), eps=0.1)},
            ValueError,
            "k_norm: has eps 0.1, but must have .* 0.01",
        ),
        ({"q_norm": torch.ones(128)}, TypeError, "q_norm: a torch.float32 tensor .* must be a Norm or None"),
        ({"rope": [torch.ones(2, 32, 2)]}, ValueError, "rope: 1 tables must be three"),
        (
            {"rope": [torch.ones(n, 10, 2) for n in GRID]},
            ValueError,
            r"rope: \[10, 10, 10\] pairs must be 32 in all",
        ),
        (
            {"rope": [torch.ones(n, p, 2) for n, p in zip((2, 4, 3), (12, 10, 10), strict=True)]},
            ValueError,
            r"rope: shape \[4, 10, 2\] on axis h must be \[3, pairs, 2\]",
        ),
        (
            {"config": fps.AttentionConfig(smooth_k=True)},
            ValueError,
            "config: smooth_k=True needs the mean of K",
        ),
        ({"config": fps.AttentionConfig(quant="none")}, ValueError, "config: quant='none' rounds nothing"),
        ({"grid": (2, 3, 5)}, ValueError, "grid"),
        ({"q": torch.ones(1, 24, 2, 64, requires_grad=True)}, RuntimeError, "q: a gradient is required"),
        (
            both(torch.ones(128, requires_grad=True)),
            RuntimeError,
            "q_norm.weight, k_norm.weight: a gradient is required",
        ),
        (both([1.0] * 128), TypeError, "q_norm.weight: must be a tensor, got list"),
        ({"rope": 5}, TypeError, "rope: must be a floating-point tensor, or three of them .*, got int"),
        ({"rope": torch.ones(23, 1, 32, 2)}, ValueError, r"rope: shape .* must be \[24, 1 or 2, 32, 2\]"),
        (
            {"k_norm": fps.Norm(torch.ones(128), text_weight=torch.ones(128), eps=EPS)},
            ValueError,
            "k_norm.text_weight: only one of the norms has it",
        ),
        (
            both(torch.ones(128), bias=torch.ones(128)),
            ValueError,
            r"q_norm.bias: shape \[128\] must be \[64\]",
        ),
        (
            both(torch.ones(128), text_weight=torch.ones(64)),
            ValueError,
            r"q_norm.text_weight: shape \[64\] must be that of q_norm.weight, \[128\]",
        ),
        (
            both(torch.ones(64), bias=torch.ones(64), text_weight=torch.ones(64)),
            ValueError,
            "q_norm must have no bias",
        ),
        ({"suffix_len": 3}, ValueError, "q: has 24 tokens .* suffix_len is 3"),
        ({"rope": [torch.ones(n, 10, 2).int() for n in GRID]}, TypeError, "rope: .*; one is torch.int32"),
        ({"config": 0}, TypeError, "config: 0 must be an AttentionConfig or None, got int"),
        ({"config": fps.AttentionConfig((1, 1, 1), (1, 2, 1))}, ValueError, r"window: \(1, 2, 1\) .* odd"),
    ],
)
def test_errors(kwargs, error, message, monkeypatch):
    if "max_angles" in kwargs:
        kwargs = dict(kwargs)
        monkeypatch.setattr(prologue, "MAX_ANGLES", kwargs.pop("max_angles"))
    with pytest.raises(error, match=message):
        fps.norm_rope_quantize(**wrong(**kwargs))


def test_tables_of_any_iterable():
    (x, _, _), given = inputs(GRID, 2, 64)
    expected = fps.norm_rope(x, grid=GRID, rope=given["rope"])
    assert torch.equal(fps.norm_rope(x, grid=GRID, rope=iter(given["rope"])), expected)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"x": torch.ones(1, 12, 2, 64)},
            ValueError,
            r"x: has 12 tokens in layout NHD, but grid \(2, 3, 4\) has 24",
        ),
        ({"x": torch.ones(1, 1, 2, 64), "rope": None}, ValueError, "x: has 1 tokens"),
        ({"prefix_len": 2}, ValueError, "x: has 24 tokens .* has 24, prefix_len is 2"),
        ({"prefix_len": -1}, ValueError, "prefix_len: -1 must be"),
        ({"x": torch.ones(24, 2, 64)}, ValueError, r"x: must have 4 dimensions \[B, L, H, D\]"),
        ({"x": torch.ones(1, 24, 2, 64).int()}, TypeError, "x: must be a tensor of torch.bfloat16, .*int32"),
        ({"x": torch.ones(1, 24, 2, 64).cfloat()}, TypeError, "x: must be a tensor of .*complex64"),
        ({"x": None}, TypeError, "x: must be a tensor of .*NoneType"),
        ({"grid": (2, 3), "rope": None}, ValueError, r"grid: \(2, 3\) must be three integers"),
        ({"grid": (2, 3, 4.0)}, TypeError, "grid: .*4.0"),
        ({"tensor_layout": "LHD"}, ValueError, "tensor_layout: 'LHD'"),
    ],
)
def test_errors_of_norm_rope(change, error, message):
    (x, _, _), given = inputs(GRID, 2, 64)
    call = {"x": x, "grid": GRID, "norm": given["q_norm"], "rope": given["rope"]} | change
    with pytest.raises(error, match=message):
        fps.norm_rope(**call)
