"""Changing sizes under torch.compile: they become symbols, as with torch's own operations, and graphs stay few.

Here the reference computes the ops of the Hopper kernels, so that no GPU is needed to see what torch.compile sees.
"""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import fpsattention as fps
from fpsattention.core import api, ops
from fpsattention.core.config import AttentionConfig
from fpsattention.core.key_tiles import key_tiles_of

TILED = AttentionConfig(tile=(2, 4, 4), window=(1, 3, 3))
SMOOTHED = AttentionConfig(tile=(2, 4, 4), quant_tile=(4, 4, 8), smooth_k=True, border="truncate")
PLANNED = AttentionConfig()
SELECTING = AttentionConfig(tile=(2, 4, 4), select=fps.TopMass(0.5, always=(1, 1, 3), most=0.7))
GRIDS = [(2, 8, 8), (4, 8, 8), (6, 12, 8), (3, 10, 12), (5, 9, 7), (8, 8, 8)]

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:fpsattention runs its reference"),
]


def attention_on_cpu(
    q, k, v, prefix_valid, suffix_valid, key_indices, key_counts, grid, prefix_len, suffix_len, config, scale,
    tensor_layout, deterministic
):  # fmt: skip
    config = AttentionConfig.from_spec(config)
    out, lse = fps.reference.emulated_attention(
        q, k, v, grid=grid, config=config, scale=scale, prefix_len=prefix_len, suffix_len=suffix_len,
        prefix_valid=prefix_valid, suffix_valid=suffix_valid, key_tiles=key_tiles_of(key_indices, key_counts),
    )  # fmt: skip
    batch, _, heads, head_dim = q.shape
    sizes = tuple(grid), prefix_len, suffix_len, batch, heads, head_dim, q.dtype, scale, tensor_layout
    packed = torch.zeros(ops.call_of(config, *sizes).sections.end, dtype=torch.uint8)
    return out.contiguous(), lse.contiguous(), packed


def backward_on_cpu(dout, dlse, out, *_):
    return tuple(torch.full_like(out, 1.5) for _ in "qkv")


@pytest.fixture
def kernels_on_cpu(monkeypatch):
    library = torch.library.Library("fpsattention", "IMPL")
    library.impl("attention", attention_on_cpu, "CPU")
    library.impl("attention_backward", backward_on_cpu, "CPU")
    monkeypatch.setattr(api, "backend_for", lambda *_: ("sm90", ""))
    monkeypatch.setattr(ops, "is_watched", lambda *_: True)  # eager calls would launch
    torch.compiler.reset()
    yield
    library._destroy()


def qkv(grid, text: int = 0, heads: int = 2) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    tokens = grid[0] * grid[1] * grid[2] + text
    return [torch.randn(1, tokens, heads, 64, generator=g).bfloat16() for _ in range(3)]


@pytest.mark.parametrize("requires_grad", [False, True], ids=["", "gradient"])
@pytest.mark.parametrize("config", [TILED, SMOOTHED, SELECTING], ids=["tiled", "smoothed", "selecting"])
def test_sizes_become_symbols(kernels_on_cpu, config, requires_grad):
    """One graph for the first size and few for all others, with text as well."""
    counter = CompileCounterWithBackend("aot_eager")

    def call(q, k, v, grid, prefix_len):
        return fps.attention(q, k, v, grid=grid, config=config, prefix_len=prefix_len)

    compiled = torch.compile(call, fullgraph=True, backend=counter)
    for i, grid in enumerate(GRIDS):
        x = [x.requires_grad_(requires_grad) for x in qkv(grid, 3 + i)]
        out = compiled(*x, grid, 3 + i)
        assert torch.equal(out, call(*x, grid, 3 + i))
        if requires_grad:
            assert all((grad == 1.5).all() for grad in torch.autograd.grad(out.sum(), x))
    assert counter.frame_count <= 4, "one more each time that an axis differs for the first time"


def test_a_size_marked_dynamic_is_one_graph(kernels_on_cpu):
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter, dynamic=True)
    def call(q, k, v, grid):
        return fps.attention(q, k, v, grid=grid, config=TILED)

    for grid in GRIDS:
        x = qkv(grid)
        assert torch.equal(call(*x, grid), fps.attention(*x, grid=grid, config=TILED))
    assert counter.frame_count == 1


def test_a_planned_tile_is_of_one_size(kernels_on_cpu):
    """Without a given tile each grid has a tile, and so a graph, of its own."""
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter)
    def call(q, k, v, grid):
        return fps.attention(q, k, v, grid=grid)

    for grid in GRIDS[:3] * 2:
        x = qkv(grid)
        assert torch.equal(call(*x, grid), fps.attention(*x, grid=grid))
    assert counter.frame_count == 3


@pytest.mark.parametrize("config", [TILED, SMOOTHED, PLANNED], ids=["tiled", "smoothed", "planned"])
def test_shapes_that_are_promised(kernels_on_cpu, config):
    """Every result has the promised shape, operands for the backward included, by torch's own check."""
    for grid, prefix_len, suffix_len in ((GRIDS[2], 0, 0), (GRIDS[4], 3, 150)):
        sizes = list(grid), prefix_len, suffix_len
        call = *qkv(grid, prefix_len + suffix_len), *[None] * 4, *sizes, config.spec, 0.125, "NHD", False
        torch.library.opcheck(
            torch.ops.fpsattention.attention, call, test_utils=("test_schema", "test_faketensor")
        )


def test_errors_name_their_argument(kernels_on_cpu):
    """Wrong shapes are found in tracing, whose error has the text in pieces on torch 2.11; a wrong window in the op."""

    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=True)
    def call(q, k, v, grid, window):
        return fps.attention(q, k, v, grid=grid, config=AttentionConfig(tile=(2, 4, 4), window=window))

    call(*qkv(GRIDS[0]), GRIDS[0], (1, 1, 1))
    message = "q: has .*128.* tokens in layout .*NHD.*, but grid .* has .*256"
    with pytest.raises(Exception, match=message):
        call(*qkv(GRIDS[0]), GRIDS[1], (1, 1, 1))
    with pytest.raises(ValueError, match=r"window: \(1, 2, 3\) has 2 on axis h, which has 4 tiles"):
        call(*qkv((2, 16, 16)), (2, 16, 16), (1, 2, 3))


def test_auto_says_what_runs_while_it_traces():
    """The warning about the slow path is not part of the graph."""
    api._warn_once.cache_clear()
    compiled = torch.compile(fps.attention, fullgraph=True, backend="aot_eager")
    x = qkv(GRIDS[0])
    with pytest.warns(UserWarning, match="fpsattention runs its reference"):
        out = compiled(*x, grid=GRIDS[0], config=TILED)
    assert torch.equal(out, fps.attention(*x, grid=GRIDS[0], config=TILED))
