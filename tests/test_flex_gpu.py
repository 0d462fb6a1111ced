"""quant="none" on a GPU: FlexAttention compiled, on several streams, and in CUDA graphs."""

from dataclasses import replace

import pytest
import torch

import fpsattention as fps
from fpsattention.core import flex
from fpsattention.core.kept import Cache

pytestmark = pytest.mark.gpu

GRID = (4, 8, 16)
CONFIG = fps.AttentionConfig(quant="none", tile=(2, 4, 4), window=(1, 1, 3))
CONFIGS = {
    "window": CONFIG,
    "per head": replace(CONFIG, window=((1, 1, 3), (2, 1, 1))),
    "truncated": replace(CONFIG, window=(1, 1, 3), border="truncate"),
    "ragged": replace(CONFIG, tile=(3, 3, 5), window=(1, 3, 1)),
}


def qkv(seed, dtype=torch.bfloat16, grad=False):
    generator = torch.Generator("cuda").manual_seed(seed)
    shape = (2, 512, 2, 64)
    return [
        torch.randn(shape, device="cuda", generator=generator).to(dtype).requires_grad_(grad) for _ in "qkv"
    ]


def attend(q, k, v, config=CONFIG, **options):
    return fps.attention(q, k, v, grid=GRID, config=config, **options)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_values_and_gradients(config, seed):
    inputs = qkv(seed, torch.float32, grad=True)
    out, lse = attend(*inputs, config, return_lse=True)
    want, want_lse = fps.reference.exact_attention(*inputs, grid=GRID, config=config)
    torch.testing.assert_close(out.double(), want, rtol=0.01, atol=0.01)
    torch.testing.assert_close(lse.double(), want_lse, rtol=0.01, atol=0.01)
    for got, exact in zip(
        torch.autograd.grad(out.square().sum(), inputs),
        torch.autograd.grad(want.square().sum(), inputs),
        strict=True,
    ):
        error = (got.double() - exact.double()).norm() / exact.double().norm()
        assert error < 0.01


def test_autocast(seed):
    inputs = qkv(seed, torch.float32)
    with torch.autocast("cuda", torch.bfloat16):
        out = attend(*inputs)
    assert torch.equal(out, attend(*(x.bfloat16() for x in inputs)))


def test_a_graph_keeps_its_masks(monkeypatch, seed):
    """A graph is replayed after the cache has dropped its masks and their memory could be reused."""
    monkeypatch.setattr(flex, "_kept", Cache(1))
    static = qkv(seed)
    refused = pytest.raises(RuntimeError, match="make the same call once before the capture")
    with refused, torch.cuda.graph(torch.cuda.CUDAGraph()):
        attend(*static)
    torch.cuda.synchronize()
    want = attend(*static)
    flex._kept.max_bytes = 2**30
    attend(*static)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = attend(*static)
    flex._kept.max_bytes = 1
    for w in (1, 3):
        attend(*static, replace(CONFIG, window=(2, 1, w)))
    junk = [torch.full((2**18,), -1, dtype=torch.int32, device="cuda") for _ in range(64)]
    got.fill_(torch.nan)
    graph.replay()
    assert torch.equal(got, want) and len(junk) == 64


def test_masks_of_another_stream(monkeypatch, seed):
    """One stream drops masks and makes them anew while another still reads them."""
    monkeypatch.setattr(flex, "_kept", Cache(1))
    inputs = qkv(seed)
    want = attend(*inputs)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # about 60 ms
        got = attend(*inputs)
    for w in (1, 3):
        attend(*inputs, replace(CONFIG, window=(2, 1, w)))
    junk = [torch.full((2**18,), -1, dtype=torch.int32, device="cuda") for _ in range(64)]
    torch.cuda.synchronize()
    assert torch.equal(got, want) and len(junk) == 64


def test_in_a_callers_graph(seed):
    """The call breaks the graph, and compiles by itself."""
    torch.compiler.reset()
    inputs = qkv(seed)
    compiled = torch.compile(lambda *x: attend(*x) + 1)
    torch.testing.assert_close(compiled(*inputs), attend(*inputs) + 1, rtol=0.02, atol=0.02)
