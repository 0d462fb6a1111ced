"""The Hopper kernels under lists of key tiles: against the contract, windows, and what nothing has checked."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch

import fpsattention as fps
from fpsattention import KeyTiles
from inputs import make_qkv, poisoned
from test_attention_gpu import check as check_forward
from test_backward_gpu import check as check_backward
from test_backward_gpu import differentiate, normal

pytestmark = pytest.mark.gpu

GRID, TILE = (10, 18, 20), (5, 6, 4)


@dataclass(frozen=True)
class Case:
    """`lists`: for so many samples and heads; `density`: of the listed tiles, besides each tile itself."""

    grid: tuple[int, int, int]
    tile: tuple[int, int, int]
    lists: tuple[int, int]
    density: float = 0.3
    batch: int = 1
    heads: int = 2
    layout: str = "NHD"
    quant_tile: tuple[int, int, int] | None = None
    smooth_k: bool = False
    kind: str = "gaussian"

    @property
    def config(self):
        return fps.AttentionConfig(self.tile, quant_tile=self.quant_tile, smooth_k=self.smooth_k)

    def inputs(self, head_dim, dtype, seed):
        about = {"grid": self.grid, "tile": self.tile, "batch": self.batch, "heads": self.heads}
        about |= {"head_dim": head_dim, "dtype": dtype, "tensor_layout": self.layout, "seed": seed}
        return make_qkv(self.kind, **about)

    def key_tiles(self, seed) -> KeyTiles:
        n = self.config.resolve(self.grid, self.heads).geometry.n_video_tiles
        generator = torch.Generator("cuda").manual_seed(seed)
        mask = torch.rand(*self.lists, n, n, generator=generator, device="cuda") < self.density
        return KeyTiles.of_mask(mask | torch.eye(n, dtype=torch.bool, device="cuda"))


CASES = {
    "slot 128": Case(GRID, TILE, (1, 2)),
    "all share": Case(GRID, TILE, (1, 1), heads=3, layout="HND"),
    "each its own, batch 2": Case(GRID, TILE, (2, 3), 0.6, batch=2, heads=3, layout="HND"),
    "of a sample": Case(GRID, TILE, (2, 1), batch=2),
    "one tile": Case(GRID, TILE, (1, 2), 0.0),
    "all tiles": Case(GRID, TILE, (1, 2), 1.0),
    "slot 256": Case((6, 18, 30), (6, 6, 6), (1, 2)),
    "slot 384, ragged": Case((10, 16, 32), (6, 8, 8), (1, 2), 0.5),
    "slot 512, ragged": Case((12, 12, 40), (8, 8, 8), (1, 2), 0.5),
    "ragged on every axis": Case((7, 11, 13), (3, 4, 5), (2, 3), batch=2, heads=3),
    "brick": Case(GRID, TILE, (1, 2), quant_tile=(5, 12, 8)),
    "smooth_k": Case(GRID, TILE, (1, 2), smooth_k=True, kind="key_mean"),
    "channel outliers": Case(GRID, TILE, (1, 2), kind="channel_outliers"),
}
ALL = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
TYPES = pytest.mark.parametrize(
    ("head_dim", "dtype"), [(64, torch.float16), (128, torch.bfloat16)], ids=["64, fp16", "128, bf16"]
)


@TYPES
@ALL
def test_forward(case, head_dim, dtype, seed):
    q, k, v = case.inputs(head_dim, dtype, seed)
    call = {"grid": case.grid, "config": case.config, "tensor_layout": case.layout}
    check_forward(q, k, v, **call, key_tiles=case.key_tiles(seed))


@TYPES
@ALL
def test_backward(case, head_dim, dtype, seed):
    q, k, v = case.inputs(head_dim, dtype, seed)
    call = {"grid": case.grid, "config": case.config, "tensor_layout": case.layout}
    deterministic = seed % 2 == 0
    check_backward(
        q,
        k,
        v,
        seed=seed,
        kind=case.kind,
        **call,
        key_tiles=case.key_tiles(seed),
        deterministic=deterministic,
    )


def same(found, expected) -> bool:
    return all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


@TYPES
@pytest.mark.parametrize("border", ["clamp", "truncate"])
def test_lists_of_a_window_are_the_window(border, head_dim, dtype, seed):
    """The same bits: keys and queries come in the same order."""
    case = CASES["slot 128"]
    q, k, v = case.inputs(head_dim, dtype, seed)
    dout, window = normal(q, seed + 1), (1, 3, 3)
    lists = KeyTiles.of_window(GRID, TILE, window, border).to("cuda")
    call = {"grid": GRID, "deterministic": True}
    expected, expected_grads = differentiate(
        q, k, v, dout, config=fps.AttentionConfig(TILE, window, border), **call
    )
    found, grads = differentiate(q, k, v, dout, config=case.config, key_tiles=lists, **call)
    assert same(found, expected)
    assert same(grads[1:], expected_grads[1:])
    torch.testing.assert_close(grads[0], expected_grads[0], rtol=0.02, atol=1e-3)  # sums have another order


@TYPES
def test_deterministic(head_dim, dtype, seed):
    case = CASES["each its own, batch 2"]
    q, k, v = case.inputs(head_dim, dtype, seed)
    call = {"grid": GRID, "config": case.config, "tensor_layout": case.layout, "deterministic": True}
    runs = [
        differentiate(q, k, v, normal(q, seed + 1), key_tiles=case.key_tiles(seed), **call) for _ in range(3)
    ]
    for out, grads in runs[1:]:
        assert same(out, runs[0][0]) and same(grads, runs[0][1])


@TYPES
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("text", [(0, 0), (90, 150)], ids=["video alone", "no valid text"])
def test_empty_lists(text, deterministic, head_dim, dtype, seed):
    """A tile that attends nothing has out 0, lse -inf and no gradient; one that none attends has no gradient."""
    case = CASES["slot 128"]
    n = case.config.resolve(GRID, 2).geometry.n_video_tiles
    tokens, video = sum(text) + math.prod(GRID), slice(text[0], text[0] + math.prod(GRID))
    generator = torch.Generator("cuda").manual_seed(seed)
    q, k, v, dout = (
        torch.randn(1, tokens, 2, head_dim, device="cuda", generator=generator).to(dtype) for _ in range(4)
    )
    mask = torch.rand(1, 1, n, n, device="cuda", generator=generator) < 0.3
    mask[..., 1, :] = mask[..., 2] = False
    none = torch.zeros(1, dtype=torch.int32, device="cuda")
    call = {"grid": GRID, "config": case.config, "key_tiles": KeyTiles.of_mask(mask)}
    call |= {"prefix_len": text[0], "suffix_len": text[1], "deterministic": deterministic}
    call |= {"prefix_valid": none, "suffix_valid": none} if sum(text) else {}
    (out, lse), (dq, dk, dv) = differentiate(q, k, v, dout, normal(q[..., 0].mT, seed).float(), **call)
    geometry = case.config.resolve(GRID, 2).geometry
    for tile, values in ((1, (out, dq)), (2, (dk, dv))):
        rows = (geometry.tile_of_token == tile).cuda()
        for x in values:
            assert (x[:, video][:, rows] == 0).all() and x.isfinite().all()
            assert (x[:, video][:, ~rows] != 0).any()
    assert (lse[:, :, video][..., (geometry.tile_of_token == 1).cuda()] == -math.inf).all()


@TYPES
def test_text_sees_and_is_seen(head_dim, dtype, seed):
    """Lists of all tiles, with text: the bits of the dense call."""
    text = {"prefix_len": 70, "suffix_len": 200, "prefix_valid": torch.tensor([3, 70], device="cuda").int()}
    tokens = 270 + math.prod(GRID)
    generator = torch.Generator("cuda").manual_seed(seed)
    q, k, v, dout = (
        torch.randn(2, tokens, 2, head_dim, device="cuda", generator=generator).to(dtype) for _ in range(4)
    )
    call = {"grid": GRID, "config": fps.AttentionConfig(TILE), "deterministic": True} | text
    lists = KeyTiles.of_window(GRID, TILE, None).to("cuda")
    expected, expected_grads = differentiate(q, k, v, dout, **call)
    found, grads = differentiate(q, k, v, dout, **call, key_tiles=lists)
    assert same(found, expected) and same(grads, expected_grads)


def test_values_outside_of_the_grid_are_clamped(seed):
    """Nothing checks values on a GPU; nothing outside of the operands may be read for them."""
    case = CASES["slot 128"]
    q, k, v = case.inputs(128, torch.bfloat16, seed)
    n = case.config.resolve(GRID, 2).geometry.n_video_tiles
    wild = torch.tensor([2**31 - 1, -(2**31), n, -1], dtype=torch.int32, device="cuda").expand(1, 1, n, 4)
    counts = torch.full((1, 1, n), 2**31 - 1, dtype=torch.int32, device="cuda")
    legal = torch.tensor([n - 1, 0, n - 1, 0], dtype=torch.int32, device="cuda").expand(1, 1, n, 4)
    call = {"grid": GRID, "config": case.config, "deterministic": True}
    found, expected = (
        differentiate(q, k, v, normal(q, seed), key_tiles=KeyTiles(x.contiguous(), c), **call)
        for x, c in ((wild, counts), (legal, counts.clamp(max=4)))
    )
    assert same(found[0], expected[0]) and same(found[1], expected[1])


@pytest.mark.parametrize("tensor_layout", ["NHD", "HND"])
def test_quantised_operands_serve_several_lists(tensor_layout, seed):
    case = Case(GRID, TILE, (1, 2), layout=tensor_layout)
    q, k, v = case.inputs(128, torch.bfloat16, seed)
    call = {"grid": GRID, "config": case.config, "tensor_layout": tensor_layout}
    rounded = fps.quantize_qkv(q, k, v, **call)
    for lists in (case.key_tiles(seed), None, case.key_tiles(seed + 1)):
        expected = fps.attention(q, k, v, **call, key_tiles=lists, return_lse=True)
        assert same(fps.attention(rounded, key_tiles=lists, return_lse=True), expected)


def test_no_call_waits_and_graphs_capture_it(seed):
    """Lists may change between replays of a graph."""
    case = CASES["slot 128"]
    q, k, v = case.inputs(128, torch.bfloat16, seed)
    first, second = (case.key_tiles(seed + i) for i in range(2))
    lists = KeyTiles(first.indices.clone(), first.counts.clone())
    call = {"grid": GRID, "config": case.config, "backend": "sm90", "deterministic": True}
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    dout = normal(q, seed)

    def run(key_tiles):
        out = fps.attention(*leaves, **call, key_tiles=key_tiles)
        return out, *torch.autograd.grad(out, leaves, dout)

    expected = [[x.detach().clone() for x in run(of)] for of in (first, second)]
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(lists)
    finally:
        torch.cuda.set_sync_debug_mode(before)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run(lists)
    for of, right in zip((first, second), expected, strict=True):
        lists.indices.copy_(of.indices)
        lists.counts.copy_(of.counts)
        graph.replay()
        assert same(found, right)


def test_one_graph_under_compile(seed):
    case = CASES["slot 128"]
    q, k, v = case.inputs(128, torch.bfloat16, seed)
    lists = case.key_tiles(seed)

    def call(q, k, v, indices, counts):
        return fps.attention(q, k, v, grid=GRID, config=case.config, key_tiles=KeyTiles(indices, counts))

    with poisoned():
        compiled = torch.compile(call, fullgraph=True)(q, k, v, lists.indices, lists.counts)
    assert torch.equal(compiled, call(q, k, v, lists.indices, lists.counts))


def test_offsets_of_a_long_call_are_not_32_bits(seed):
    """Lists of 75,600 tokens and 40 heads: the last heads are as right as one alone."""
    grid, tile, heads = (21, 45, 80), (7, 9, 2), 40
    config = fps.AttentionConfig(tile)
    generator = torch.Generator("cuda").manual_seed(seed)
    q, k, v = (
        torch.randn(1, math.prod(grid), heads, 128, device="cuda", generator=generator).bfloat16()
        for _ in range(3)
    )
    n = config.resolve(grid, heads).geometry.n_video_tiles
    lists = KeyTiles.of_mask(torch.rand(1, heads, n, n, device="cuda", generator=generator) < 0.1)
    out = fps.attention(q, k, v, grid=grid, config=config, key_tiles=lists, backend="sm90")
    for head in (0, heads - 1):
        alone = [x[:, :, head : head + 1].contiguous() for x in (q, k, v)]
        expected = fps.attention(
            *alone, grid=grid, config=config, key_tiles=lists.of_heads(head, 1), backend="sm90"
        )
        assert torch.equal(out[:, :, head : head + 1], expected)


@pytest.mark.parametrize(
    "select", [fps.TopTiles(0.3, always=(1, 3, 3)), fps.TopMass(0.8, most=0.6)], ids=["top", "mass"]
)
def test_tiles_chosen_by_content(select, seed):
    """The bits of lists that are given; no call waits, and a graph chooses anew in each replay."""
    case = Case((7, 17, 22), TILE, (1, 2), kind="channel_outliers")
    config = fps.AttentionConfig(TILE, select=select)
    q, k, v = case.inputs(128, torch.bfloat16, seed)
    others = case.inputs(128, torch.bfloat16, seed + 1)
    call = {"grid": case.grid, "backend": "sm90"}

    def with_lists(q, k, v):
        lists = fps.select_tiles(q, k, grid=case.grid, config=config)
        return fps.attention(q, k, v, **call, config=case.config, key_tiles=lists)

    expected = [with_lists(*x) for x in ((q, k, v), others)]
    assert torch.equal(fps.attention(q, k, v, **call, config=config), expected[0])
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        fps.attention(q, k, v, **call, config=config)
    finally:
        torch.cuda.set_sync_debug_mode(before)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = fps.attention(q, k, v, **call, config=config)
    for inputs, right in zip(((q.clone(), k.clone(), v.clone()), others), expected, strict=True):
        for x, y in zip((q, k, v), inputs, strict=True):
            x.copy_(y)
        graph.replay()
        assert torch.equal(out, right)


def test_chosen_tiles_have_a_gradient(seed):
    """That of attention over the lists, held fixed."""
    case = CASES["ragged on every axis"]
    config = fps.AttentionConfig(case.tile, select=fps.TopTiles(0.4))
    q, k, v = case.inputs(64, torch.bfloat16, seed)
    lists = fps.select_tiles(q, k, grid=case.grid, config=config)
    dout, call = normal(q, seed), {"grid": case.grid, "deterministic": True}
    found, grads = differentiate(q, k, v, dout, **call, config=config)
    expected, expected_grads = differentiate(q, k, v, dout, **call, config=case.config, key_tiles=lists)
    assert same(found, expected) and same(grads, expected_grads)


def test_scores_are_those_of_the_means(seed):
    """On the GPU as on the CPU: each list holds the best tiles but for near ties."""
    case = CASES["ragged on every axis"]
    config = fps.AttentionConfig(case.tile, select=fps.TopTiles(0.4))
    q, k, _ = case.inputs(64, torch.float16, seed)
    found = fps.select_tiles(q, k, grid=case.grid, config=config).mask().cpu()
    expected = fps.select_tiles(q.cpu(), k.cpu(), grid=case.grid, config=config).mask()
    assert found.sum() == expected.sum()
    assert (found == expected).float().mean() > 0.99
