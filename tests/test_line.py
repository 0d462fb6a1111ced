"""`attention` without a grid: dense over tokens of any number, compared with torch's scaled_dot_product_attention."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend

import fpsattention as fps
from fpsattention.core import line, ops
from test_sizes_under_compile import kernels_on_cpu  # noqa: F401  a fixture

LENGTHS = (1, 2, 101, 127, 128, 129, 1009)  # primes among them
EXACT = fps.AttentionConfig(quant="none")
# Relative RMS error of FP8 against exact attention on Gaussian inputs: a rounding to E4M3 costs about 2.6 %.
FP8 = {"out": 0.065, "gradient": 0.095}

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:fpsattention runs its reference"),
]


def qkv(tokens: int, head_dim: int = 64, dtype=torch.float32, batch: int = 2, heads: int = 3):
    """[B, H, L, D]"""
    g = torch.Generator().manual_seed(tokens)
    return [torch.randn(batch, heads, tokens, head_dim, generator=g).to(dtype) for _ in range(3)]


def error(x: torch.Tensor, expected: torch.Tensor) -> float:
    return ((x.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("layout", ["HND", "NHD"])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("tokens", LENGTHS)
def test_any_length(tokens, head_dim, layout):
    q, k, v = qkv(tokens, head_dim)
    expected = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    given = [x.transpose(1, 2) if layout == "NHD" else x for x in (q, k, v)]
    for config, limit in ((None, FP8["out"]), (EXACT, 1e-5)):
        out = fps.attention(*given, config=config, tensor_layout=layout)
        assert out.shape == given[0].shape
        assert error(out.transpose(1, 2) if layout == "NHD" else out, expected) < limit


@pytest.mark.parametrize("tokens", LENGTHS[1:])
def test_gradients(tokens):
    q, k, v = (x.double().requires_grad_() for x in qkv(tokens))
    dout = torch.randn(q.shape, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    expected = torch.autograd.grad(F.scaled_dot_product_attention(q, k, v), (q, k, v), dout)
    for config, limit in ((None, FP8["gradient"]), (EXACT, 1e-5)):
        out = fps.attention(q, k, v, config=config, tensor_layout="HND")
        for x, y in zip(torch.autograd.grad(out, (q, k, v), dout), expected, strict=True):
            assert error(x, y) < limit


def test_lse():
    q, k, v = qkv(301)
    out, lse = fps.attention(q, k, v, tensor_layout="HND", return_lse=True)
    expected = (q.double() @ k.double().mT / 8).logsumexp(3)
    assert lse.shape == (2, 3, 301) and (lse - expected).abs().max() < 0.05


def test_a_scale_for_128_tokens():
    """One token of K far above the rest coarsens the scale of its own 128 tokens, and of no others."""
    q, k, v = qkv(384, batch=1, heads=1)
    seen = []
    for length in (1.0, 1000.0):
        k[0, 0, 200] = length / 8
        resolved = line.on_line(fps.AttentionConfig()).resolve((1, 1, 384), heads=1)
        seen.append(fps.reference.quantize(q, k, v, resolved, "HND").k_scale[0, 0])
    assert (seen[0] != seen[1]).tolist() == [False, True, False]


def test_rows_of_the_kernels():
    """At most 127 rows of padding, whatever the length: this is what the kernels read and compute besides."""
    for tokens in (1, 128, 129, 75_601):
        resolved = line.on_line(fps.AttentionConfig()).resolve((1, 1, tokens), heads=1)
        assert resolved.geometry.n_rows == -(-tokens // 128) * 128
        assert resolved.density == 1


def test_quantised_once():
    q, k, v = qkv(131)
    for config in (None, fps.AttentionConfig(smooth_k=True)):
        quantized = fps.quantize_qkv(q, k, v, config=config, tensor_layout="HND")
        expected = fps.attention(q, k, v, config=config, tensor_layout="HND")
        assert quantized.grid is None
        assert torch.equal(fps.attention(quantized), expected)
        assert torch.equal(fps.attention(quantized, config=config), expected)


def test_smooth_k():
    """K's mean goes before rounding, as with a grid."""
    q, k, v = qkv(500)
    k += 10 * torch.randn(64, generator=torch.Generator().manual_seed(0))
    expected = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    errors = [
        error(fps.attention(q, k, v, config=config, tensor_layout="HND"), expected)
        for config in (None, fps.AttentionConfig(smooth_k=True))
    ]
    assert errors[1] < FP8["out"] < errors[0]


REFUSED = {
    "tile": ({"config": fps.AttentionConfig(tile=(1, 1, 64))}, r"config: tile=\(1, 1, 64\) needs a grid"),
    "window": ({"config": fps.AttentionConfig(window=(1, 1, 3))}, r"config: window=\(1, 1, 3\) needs a grid"),
    "brick": ({"config": fps.AttentionConfig(quant_tile=(1, 1, 256))}, "config: quant_tile=.* needs a grid"),
    "prefix": ({"prefix_len": 3}, "prefix_len: 3 needs a grid"),
    "suffix": ({"suffix_len": 3}, "suffix_len: 3 needs a grid"),
    "count": ({"prefix_valid": torch.ones(2, dtype=torch.int32)}, "prefix_valid: .* needs a grid"),
    "counts": ({"suffix_valid": torch.zeros(1, dtype=torch.int32)}, "suffix_valid: .* needs a grid"),
}


@pytest.mark.parametrize("function", [fps.attention, fps.quantize_qkv])
@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_needs_a_grid(function, change, message):
    with pytest.raises(ValueError, match=f"{message}, .*; give grid, the tokens"):
        function(*qkv(9), tensor_layout="HND", **change)


def test_a_window_over_quantised_tokens_without_a_grid():
    quantized = fps.quantize_qkv(*qkv(300), tensor_layout="HND")
    with pytest.raises(ValueError, match="config: window=.* needs a grid"):
        fps.attention(quantized, config=fps.AttentionConfig(window=(1, 1, 1)))
    with pytest.raises(ValueError, match=r"grid: \(1, 1, 300\) is not that of the quantised"):
        fps.attention(quantized, grid=(1, 1, 300))


def test_heads_first_without_a_layout():
    """Torch's own attention takes [B, H, L, D]; read as [B, L, H, D], that would be other attention, silently."""
    q, k, v = qkv(9)
    for function in (fps.attention, fps.quantize_qkv):
        with pytest.raises(ValueError, match=r'tensor_layout: is not given, and q \[2, 3, 9, 64\] .*"HND"'):
            function(q, k, v)
    few = [x.transpose(1, 2) for x in qkv(2)]
    assert fps.attention(*few, tensor_layout="NHD").shape == (2, 2, 3, 64)
    assert fps.attention(*(x.transpose(1, 2) for x in (q, k, v))).shape == (2, 9, 3, 64)


def test_no_tensor():
    with pytest.raises(TypeError, match="q: must be a tensor"):
        fps.attention([1.0], [1.0], [1.0])
    with pytest.raises(ValueError, match="q: must have 4 dimensions"):
        fps.attention(*[torch.zeros(9, 64)] * 3)


def test_lengths_become_symbols(kernels_on_cpu):  # noqa: F811
    """One graph for all lengths, with the gradient: the tile does not depend on the length."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(fps.attention, fullgraph=True, backend=counter, dynamic=True)
    for tokens in LENGTHS[2:]:
        x = [x.transpose(1, 2).requires_grad_() for x in qkv(tokens, dtype=torch.bfloat16)]
        out = compiled(*x)
        assert torch.equal(out, fps.attention(*x))
        assert all((grad == 1.5).all() for grad in torch.autograd.grad(out.sum(), x))
    assert counter.frame_count == 1


def test_what_the_kernels_are_asked_for(monkeypatch, kernels_on_cpu):  # noqa: F811
    """An eager call on the Hopper backend is a line in tiles of one key block, without a window."""
    calls = []
    monkeypatch.setattr(ops, "is_watched", lambda *_: False)
    monkeypatch.setattr(ops, "launch_attention", lambda call, *_, **__: calls.append(call) or (None, None))
    fps.attention(*qkv(75_601, dtype=torch.bfloat16, batch=1, heads=1), tensor_layout="HND")
    (resolved,) = (call.resolved for call in calls)
    assert (resolved.grid, resolved.tile, resolved.windows) == ((1, 1, 75_601), (1, 1, 128), ((1, 1, 591),))
