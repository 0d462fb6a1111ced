"""The Hopper forward against exact attention and the emulated contract (see compare.py for the rules)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import fpsattention as fps
from compare import LSE_BIAS, attend_rows, check_attention, violations
from fpsattention import reference
from inputs import KINDS, make_qkv, poisoned, to_nhd

pytestmark = pytest.mark.gpu

BOTH_DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
BOTH_HEAD_DIMS = pytest.mark.parametrize("head_dim", [64, 128])


def attend(q, k, v, *, grid, config, **kwargs):
    """(out, lse) of the kernel, run in poisoned memory."""
    with poisoned():
        return fps.attention(q, k, v, grid=grid, config=config, return_lse=True, backend="sm90", **kwargs)


def check(q, k, v, *, grid, config, scale=None, tensor_layout="NHD", wide_logits=False, key_tiles=None):
    """The kernel's (out, lse) for one call, checked against the contract."""
    call = {"grid": grid, "config": config, "scale": scale, "tensor_layout": tensor_layout}
    call["key_tiles"] = key_tiles
    out, lse = attend(q, k, v, **call)
    assert (out.shape, out.dtype, out.device) == (q.shape, q.dtype, q.device)
    exact, exact_lse = reference.exact_attention(q, k, v, **call)
    emu, emu_lse = reference.emulated_attention(q, k, v, **call)
    out_nhd, exact, emu = (to_nhd(x, tensor_layout) for x in (out, exact, emu))
    geometry = config.resolve(grid, out_nhd.shape[2]).geometry
    check_attention(out_nhd, lse, exact, exact_lse, emu, emu_lse, geometry, wide_logits=wide_logits)
    return out, lse


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn, torch.uint8], ids=str
)
@pytest.mark.parametrize("numel", [1, 1000, 10_000_000])
def test_poison_works(dtype, numel):
    """Unwritten memory is NaN inside `poisoned`, even where the allocator hands out zeros."""
    torch.zeros(numel, dtype=dtype, device="cuda")  # freed at once: leaves a block of zeros in the allocator
    with poisoned():
        empty = torch.empty(numel, dtype=dtype, device="cuda")
        alike = torch.zeros(1, device="cuda").new_empty(numel, dtype=dtype)
    for x in (empty, alike):
        assert (x == 255).all() if dtype == torch.uint8 else x.float().isnan().all()


@dataclass(frozen=True)
class Case:
    grid: tuple[int, int, int]
    tile: tuple[int, int, int]
    window: tuple | None = None
    border: str = "clamp"
    quant_tile: tuple[int, int, int] | None = None
    smooth_k: bool = False
    heads: int = 2
    batch: int = 1
    layout: str = "NHD"
    scale: float | None = None
    kind: str = "gaussian"

    @property
    def config(self):
        return fps.AttentionConfig(
            tile=self.tile,
            window=self.window,
            border=self.border,
            quant_tile=self.quant_tile,
            smooth_k=self.smooth_k,
        )

    def check(self, head_dim, dtype, seed):
        q, k, v = make_qkv(
            self.kind,
            grid=self.grid,
            tile=self.tile,
            batch=self.batch,
            heads=self.heads,
            head_dim=head_dim,
            dtype=dtype,
            tensor_layout=self.layout,
            seed=seed,
        )
        check(q, k, v, grid=self.grid, config=self.config, scale=self.scale, tensor_layout=self.layout)


PER_HEAD = ((1, 1, 1), (2, 3, 3), (1, 3, 5))
CASES = {
    "slot 128": Case((10, 18, 20), (5, 6, 4), (1, 3, 3)),
    "slot 256": Case((6, 18, 30), (6, 6, 6), (1, 1, 3)),
    "slot 384, ragged": Case((10, 16, 32), (6, 8, 8), (1, 1, 3)),
    "slot 512, ragged": Case((12, 12, 40), (8, 8, 8), (2, 1, 3)),
    "slot 128, dense": Case((10, 18, 20), (5, 6, 4)),
    "slot 256, dense, batch 2": Case((7, 13, 17), (6, 6, 6), batch=2),
    "slot 384, dense, HND": Case((10, 16, 16), (6, 8, 8), layout="HND"),
    "slot 512, dense, batch 2, HND": Case((9, 10, 20), (8, 8, 8), batch=2, layout="HND"),
    "no padding at all": Case((8, 16, 24), (4, 4, 8), (1, 3, 3)),
    "ragged on every axis": Case((7, 11, 13), (3, 4, 5), (1, 1, 1), batch=2, heads=3),
    "ragged, one axis whole": Case((7, 11, 13), (3, 4, 5), (3, 1, 1), layout="HND"),
    "truncate": Case((10, 18, 20), (5, 6, 4), (1, 3, 3), "truncate"),
    "truncate, ragged, HND": Case((7, 20, 26), (3, 4, 5), (3, 3, 3), "truncate", layout="HND"),
    "per head": Case((10, 18, 20), (5, 6, 4), PER_HEAD, heads=3),
    "per head, truncate, batch 2, HND": Case(
        (10, 17, 19), (5, 6, 4), PER_HEAD, "truncate", heads=3, batch=2, layout="HND"
    ),
    "brick": Case((10, 18, 20), (5, 6, 4), (1, 3, 3), quant_tile=(5, 12, 8)),
    "ragged brick": Case((9, 17, 22), (3, 4, 4), (1, 3, 3), quant_tile=(6, 8, 12), batch=2, layout="HND"),
    "brick beyond the grid": Case((10, 18, 20), (5, 6, 4), quant_tile=(40, 60, 40)),
    "smooth_k": Case((10, 18, 20), (5, 6, 4), (1, 3, 3), smooth_k=True, kind="key_mean"),
    "smooth_k, ragged brick, batch 2, HND": Case(
        (9, 17, 22), (3, 4, 4), (1, 3, 3), "clamp", (6, 8, 12), True, batch=2, layout="HND", kind="key_mean"
    ),
    "smooth_k, scale": Case((10, 18, 20), (5, 6, 4), smooth_k=True, scale=0.05, kind="key_mean"),
    "scale": Case((10, 18, 20), (5, 6, 4), (1, 3, 3), scale=0.07),
    # Tile groups: query tiles that differ only on axes whose window is the whole axis share keys and a work item.
    "tile group along t": Case((14, 9, 20), (5, 6, 4), (3, 1, 3)),
    "tile group along h and w, ragged": Case((9, 13, 17), (5, 6, 4), (1, 3, 5), batch=2),
    "tile group along t and w, slot 512, empty blocks": Case((9, 20, 11), (8, 8, 8), (2, 1, 2), layout="HND"),
    "an empty block in every tile": Case((10, 10, 12), (5, 5, 6), (1, 1, 1)),
    "runs and windows per head": Case((14, 9, 20), (5, 6, 4), ((3, 1, 1), (3, 2, 5), (3, 1, 3)), heads=3, batch=2),
    "more heads than windows could be given": Case((4, 6, 6), (4, 3, 3), (1, 1, 1), heads=300),
    "single tokens as tiles": Case((4, 5, 6), (1, 1, 1), (1, 3, 3)),
    "flat": Case((1, 36, 50), (1, 9, 14), (1, 3, 1)),
    "line": Case((1, 1, 2000), (1, 1, 300), (1, 1, 3)),
}  # fmt: skip


@BOTH_DTYPES
@BOTH_HEAD_DIMS
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_forward(case, head_dim, dtype, seed):
    case.check(head_dim, dtype, seed)


@pytest.mark.parametrize(
    ("head_dim", "dtype"), [(64, torch.bfloat16), (128, torch.bfloat16), (128, torch.float16)], ids=str
)
@pytest.mark.parametrize("window", [None, (1, 3, 3)], ids=["dense", "window"])
@pytest.mark.parametrize("kind", KINDS)
def test_nasty_inputs(kind, window, head_dim, dtype, seed):
    grid, config = (9, 18, 20), fps.AttentionConfig(tile=(5, 6, 4), window=window)
    q, k, v = make_qkv(kind, grid=grid, tile=config.tile, head_dim=head_dim, dtype=dtype, seed=seed)
    check(q, k, v, grid=grid, config=config, wide_logits=KINDS[kind].wide_logits)


@BOTH_HEAD_DIMS
@pytest.mark.parametrize(
    ("grid", "tile"),
    [
        ((1, 1, 1), (1, 1, 1)),
        ((1, 1, 1), (4, 4, 4)),
        ((1, 1, 2), (8, 8, 8)),
        ((2, 3, 4), (4, 4, 4)),
        ((2, 9, 10), (4, 3, 5)),
        ((1, 1, 127), (1, 1, 128)),
        ((1, 1, 128), (1, 1, 128)),
        ((1, 1, 129), (1, 1, 129)),
        ((1, 1, 129), (1, 1, 512)),
        ((8, 8, 8), (8, 8, 8)),
    ],
)
def test_one_tile_and_grids_smaller_than_the_tile(grid, tile, head_dim, seed):
    q, k, v = make_qkv("gaussian", grid=grid, tile=tile, head_dim=head_dim, batch=2, seed=seed)
    check(q, k, v, grid=grid, config=fps.AttentionConfig(tile=tile))


def test_the_planned_tile(seed):
    """Without a config: FP8, dense, the tile that plan() ranks first."""
    grid = (9, 16, 28)
    q, k, v = make_qkv("gaussian", grid=grid, tile=(1, 1, 1), head_dim=128, seed=seed)
    out, lse = attend(q, k, v, grid=grid, config=None)
    planned = check(q, k, v, grid=grid, config=fps.AttentionConfig(tile=fps.plan(grid).best.tile))
    assert torch.equal(out, planned[0]) and torch.equal(lse, planned[1])


@BOTH_HEAD_DIMS
@pytest.mark.parametrize("tokens", [1, 127, 1009, 4099, 75_601])
def test_without_a_grid(tokens, head_dim, seed):
    """The bits of a line in tiles of 128 tokens, which `test_forward_of_a_line` holds against the contract."""
    grid, config = (1, 1, tokens), fps.AttentionConfig(tile=(1, 1, 128))
    q, k, v = make_qkv(
        "gaussian", grid=grid, tile=config.tile, head_dim=head_dim, tensor_layout="HND", seed=seed
    )
    out, lse = attend(q, k, v, grid=None, config=None, tensor_layout="HND")
    line = attend(q, k, v, grid=grid, config=config, tensor_layout="HND")
    assert torch.equal(out, line[0]) and torch.equal(lse, line[1])


@BOTH_HEAD_DIMS
@pytest.mark.parametrize("tokens", [1, 127, 1009, 4099])
def test_forward_of_a_line(tokens, head_dim, seed):
    grid, config = (1, 1, tokens), fps.AttentionConfig(tile=(1, 1, 128))
    q, k, v = make_qkv("gaussian", grid=grid, tile=config.tile, batch=2, head_dim=head_dim, seed=seed)
    check(q, k, v, grid=grid, config=config)


@pytest.mark.parametrize("tensor_layout", ["NHD", "HND"])
@pytest.mark.parametrize(("batch", "grid"), [(0, (4, 6, 8)), (2, (0, 6, 8)), (2, (4, 6, 0)), (0, (0, 0, 0))])
def test_empty(batch, grid, tensor_layout):
    tokens, config = math.prod(grid), fps.AttentionConfig(tile=(2, 3, 4))
    shape = (batch, tokens, 3, 64) if tensor_layout == "NHD" else (batch, 3, tokens, 64)
    q = torch.empty(shape, dtype=torch.bfloat16, device="cuda")
    out, lse = attend(q, q, q, grid=grid, config=config, tensor_layout=tensor_layout)
    assert out.shape == q.shape and out.dtype == q.dtype
    assert lse.shape == (batch, 3, tokens) and lse.dtype == torch.float32


@st.composite
def random_cases(draw):
    tile = draw(st.tuples(*[st.integers(1, 8)] * 3))
    axes = [st.integers(1, min(4 * t + 1, 20)) for t in tile]
    grid = draw(st.tuples(*axes).filter(lambda g: math.prod(g) <= 3000))
    tiles = [-(-g // t) for g, t in zip(grid, tile, strict=True)]
    one = st.tuples(*(st.sampled_from([w for w in range(1, n) if w % 2] + [n, n + 1]) for n in tiles))
    heads = draw(st.integers(1, 3))
    return Case(
        grid,
        tile,
        window=draw(st.none() | one | st.tuples(*[one] * heads)),
        border=draw(st.sampled_from(["clamp", "truncate"])),
        quant_tile=draw(st.none() | st.tuples(*(st.sampled_from([t, 2 * t, 3 * t]) for t in tile))),
        smooth_k=draw(st.booleans()),
        heads=heads,
        batch=draw(st.integers(1, 2)),
        layout=draw(st.sampled_from(["NHD", "HND"])),
        kind=draw(st.sampled_from(["gaussian", "key_mean", "value_mean", "channel_outliers", "zero_tile"])),
    )


@settings(max_examples=60, phases=[Phase.generate])  # no shrinking: GPU time is dear, the cases are small
@given(
    case=random_cases(),
    head_dim=st.sampled_from([64, 128]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
    seed=st.integers(0, 2**31),
)
def test_random_calls(case, head_dim, dtype, seed):
    case.check(head_dim, dtype, seed)


@pytest.mark.parametrize(
    ("grid", "tile", "window", "heads"),
    [
        ((21, 45, 80), (7, 9, 2), (3, 3, 9), 2),  # Wan 720p: 75,600 tokens
        ((34, 50, 100), (4, 8, 8), (3, 3, 5), 1),  # 170,000 tokens, ragged on every axis
    ],
    ids=["75600", "170000"],
)
def test_long_windowed(grid, tile, window, heads, seed):
    q, k, v = make_qkv("gaussian", grid=grid, tile=tile, heads=heads, head_dim=128, seed=seed)
    check(q, k, v, grid=grid, config=fps.AttentionConfig(tile=tile, window=window))


@pytest.mark.parametrize(
    ("grid", "tile", "head_dim"),
    [
        ((34, 50, 100), (4, 8, 8), 128),
        ((34, 50, 100), (7, 9, 2), 64),
        ((41, 90, 160), (7, 9, 2), 128),
        ((1, 1, 75_601), (1, 1, 128), 128),
    ],
    ids=["170000-d128", "170000-d64", "590400-d128", "line-75601-d128"],
)
def test_long_dense(grid, tile, head_dim, seed):
    """Tokens that all attend each other: the first, the last and two other query tiles in full."""
    config = fps.AttentionConfig(tile=tile)
    q, k, v = make_qkv("gaussian", grid=grid, tile=tile, heads=1, head_dim=head_dim, seed=seed)
    out, lse = attend(q, k, v, grid=grid, config=config)
    resolved = config.resolve(grid, 1)
    tile_of_token = resolved.geometry.tile_of_token.cuda()
    last = resolved.geometry.n_tiles - 1
    sample = torch.tensor([0, seed % last, last // 2, last], device="cuda")
    rows = torch.isin(tile_of_token, sample).nonzero()[:, 0]
    exact, exact_lse, emu, emu_lse = attend_rows(
        *(x[0, :, 0] for x in (q, k, v)), rows, resolved, resolved.windows[0], head_dim**-0.5
    )
    found = violations(
        out[:, rows],
        lse[:, :, rows],
        exact[None, :, None],
        exact_lse[None, None],
        emu[None, :, None],
        emu_lse[None, None],
        tile_of_token[rows],
    )
    assert not found, found
    assert out.isfinite().all() and lse.isfinite().all()


@BOTH_HEAD_DIMS
@pytest.mark.parametrize("window", [None, (1, 3, 3)], ids=["dense", "window"])
def test_a_late_key_far_above_the_rest(window, head_dim, seed):
    """For half of the queries one key of the last tile scores about 400 (log2) above all others, for the rest about 400
    below. A float's exponent does not cover that: sums scaled by an earlier maximum must not overflow.
    """
    grid, config = (9, 18, 20), fps.AttentionConfig(tile=(5, 6, 4), window=window)
    q, k, v = make_qkv("gaussian", grid=grid, tile=config.tile, head_dim=head_dim, seed=seed)
    q[..., 0] = 30.0
    q[:, ::2, :, 0] = -30.0
    k[..., 0] = 0.0
    k[:, -1, :, 0] = 9.0 * head_dim**0.5
    out, _ = check(q, k, v, grid=grid, config=config, wide_logits=True)
    geometry = config.resolve(grid, 2).geometry
    tile_of_token = geometry.tile_of_token
    seen_by = geometry.query_tiles(int(tile_of_token[-1]), config.resolve(grid, 2).windows[0], "clamp")
    rows = torch.isin(tile_of_token, seen_by).nonzero()[:, 0]
    rows = rows[rows % 2 == 1].cuda()
    last = v[:, -1:].float()
    error = (out[:, rows].float() - last).square().mean().sqrt() / last.square().mean().sqrt()
    # Rounding to E4M3 costs up to 1/16, about 1/38 in the mean: once for V and once for P, so 4 % together. A row that
    # attends other keys too, or none, is far off.
    assert error < 1 / 16, "these rows see that key alone: its value, rounded to E4M3"


@BOTH_HEAD_DIMS
def test_quantized_once(head_dim, seed):
    """Q, K, V quantised once and attended under several windows give the bits of plain calls."""
    grid, tile = (10, 18, 20), (5, 6, 4)
    q, k, v = make_qkv("key_mean", grid=grid, tile=tile, head_dim=head_dim, seed=seed)
    first = fps.AttentionConfig(tile=tile, window=(1, 3, 3), smooth_k=True)
    quantized = fps.quantize_qkv(q, k, v, grid=grid, config=first, scale=0.1, backend="sm90")
    for config in (first, replace(first, window=None), replace(first, window=(2, 1, 3), border="truncate")):
        with poisoned():
            got = fps.attention(quantized, config=config, return_lse=True)
        want = attend(q, k, v, grid=grid, config=config, scale=0.1)
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


@pytest.mark.parametrize("window", [None, (1, 3, 3)], ids=["dense", "window"])
def test_lse_is_exact_where_it_is_known(window):
    """Zero logits: every P is its 2^z exactly. The LSE is the logarithm of the number of attended keys, less the mean
    bias that the contract takes off.
    """
    grid, config = (10, 18, 20), fps.AttentionConfig(tile=(5, 6, 4), window=window)
    q, k, v = make_qkv("all_zeros", grid=grid, tile=config.tile)
    _, lse = attend(q, k, v, grid=grid, config=config)
    attended = math.prod(grid) if window is None else 120 * math.prod(window)
    torch.testing.assert_close(lse, torch.full_like(lse, math.log(attended) - LSE_BIAS), rtol=1e-6, atol=0)


def test_smooth_k_changes_neither_output_nor_lse(seed):
    """K's mean shifts all scores of a row by one amount, so softmax and LSE stay the same without it."""
    grid = (10, 18, 20)
    q, k, v = make_qkv("key_mean", grid=grid, tile=(5, 6, 4), head_dim=128, seed=seed)
    plain, smooth = (
        attend(q, k, v, grid=grid, config=fps.AttentionConfig(tile=(5, 6, 4), smooth_k=s))
        for s in (False, True)
    )
    _, exact_lse = reference.exact_attention(q, k, v, grid=grid, config=fps.AttentionConfig(tile=(5, 6, 4)))
    error = [(lse.double() - exact_lse).square().mean().sqrt() for _, lse in (plain, smooth)]
    assert error[1] < error[0] < 0.2, "smoothing makes K's rounding, and with it the LSE, better"
    # K's mean moves an LSE by a few units, and a missing correction would show as that much error.
    mean = k.float().mean(1)[0]
    shift = torch.einsum("lhd,hd->hl", q[0].float(), mean) * 128**-0.5
    assert shift.abs().mean() > 0.5
    assert (plain[0].float() - smooth[0].float()).norm() < 0.2 * plain[0].float().norm()


def test_each_head_of_each_batch_is_computed_alone(seed):
    """A head's result does not depend on the rest of the batch or on other heads, bit for bit."""
    grid, config = (9, 18, 20), fps.AttentionConfig(tile=(5, 6, 4), window=(1, 3, 3))
    q, k, v = make_qkv("gaussian", grid=grid, tile=config.tile, batch=2, heads=3, seed=seed)
    out, lse = attend(q, k, v, grid=grid, config=config)
    for b, h in ((0, 0), (0, 2), (1, 1), (1, 2)):
        one = [x[b : b + 1, :, h : h + 1].contiguous() for x in (q, k, v)]
        alone, alone_lse = attend(*one, grid=grid, config=config)
        assert torch.equal(out[b, :, h], alone[0, :, 0]) and torch.equal(lse[b, h], alone_lse[0, 0])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("which", ["q", "k", "v"])
def test_not_finite_input(which, value, seed):
    """The call returns. Rows that attend the bad element are not finite; other heads and tiles keep their values."""
    grid, config = (10, 18, 20), fps.AttentionConfig(tile=(5, 6, 4), window=(1, 1, 3))
    q, k, v = make_qkv("gaussian", grid=grid, tile=config.tile, seed=seed)
    token, head, channel = 777, 1, 5
    {"q": q, "k": k, "v": v}[which][0, token, head, channel] = value
    out, lse = attend(q, k, v, grid=grid, config=config)
    torch.cuda.synchronize()

    assert out[:, :, 0].isfinite().all() and lse[:, 0].isfinite().all(), "the other head"
    geometry = config.resolve(grid, 2).geometry
    tile_of_token = geometry.tile_of_token.cuda()
    own = int(tile_of_token[token])
    attending = torch.isin(tile_of_token, geometry.query_tiles(own, (1, 1, 3), "clamp").cuda())
    assert 0 < attending.sum() < len(attending)
    rows = out[0, :, head]
    if which == "q":
        assert not rows[token].isfinite().any()
        assert rows[tile_of_token != own].isfinite().all()
    elif which == "k":
        assert not rows[attending].isfinite().any()
        assert rows[~attending].isfinite().all()
    else:  # a scale of V covers a key block
        assert not rows[attending].isfinite().any()
        assert rows[~attending].isfinite().all()
        assert lse.isfinite().all()
