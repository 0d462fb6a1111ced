"""Key tiles chosen by content: against loops over tiles in fp64, and against attention with the same lists given."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

import brute
import families
import fpsattention as fps
from fpsattention import AttentionConfig, StepSchedule, TopMass, TopTiles, reference
from fpsattention.core import api, selection
from fpsattention.core.kept import Cache
from fpsattention.core.selection import choose, pooled
from inputs import to_nhd

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:fpsattention runs its reference"),
]

GRID, TILE = (3, 5, 8), (2, 2, 3)  # ragged on each axis; 2 * 3 * 3 tiles
TILES = 18
TEXT = {"prefix_len": 3, "suffix_len": 5}
SELECTORS = {
    "tiles": TopTiles(0.3),
    "tiles, always": TopTiles(0.3, always=(1, 1, 3)),
    "mass": TopMass(0.6),
    "mass, always, most": TopMass(0.6, always=(1, 3, 1), most=0.4),
}
ALL = pytest.mark.parametrize("select", SELECTORS.values(), ids=SELECTORS.keys())


def make_qkv(text=True, dtype=torch.float32, heads=2, batch=2, layout="NHD", seed=0):
    """Scores of tiles differ by several units, so that few tiles have most of the mass."""
    tokens = math.prod(GRID) + sum(TEXT.values()) * text
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(batch, tokens, heads, 64, generator=g) for _ in range(3))
    k += torch.randn(batch, tokens, heads, 1, generator=g) * q.mean(1, keepdim=True)
    return tuple(
        (4 * x if x is q else x).to(dtype).transpose(1, 2 if layout == "HND" else 1) for x in (q, k, v)
    )


def config_of(select, **options) -> AttentionConfig:
    return AttentionConfig(TILE, select=select, **options)


# Means, scores and the choice, against loops


@st.composite
def grids(draw):
    grid = draw(st.tuples(*[st.integers(1, 6)] * 3))
    return grid, draw(st.tuples(*[st.integers(1, 4)] * 3))


@settings(max_examples=60)
@given(
    grids(),
    st.tuples(*[st.sampled_from([0, 0, 1, 4])] * 2),
    st.sampled_from(["NHD", "HND"]),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_means_of_tiles(sizes, text, layout, dtype):
    (grid, tile), (prefix_len, suffix_len) = sizes, text
    x = torch.randn(2, prefix_len + math.prod(grid) + suffix_len, 3, 8).to(dtype)
    given_x = x if layout == "NHD" else x.transpose(1, 2).contiguous()
    got = pooled(given_x, AttentionConfig(tile).resolve(grid, 3, prefix_len, suffix_len), layout)
    tokens = [torch.tensor(t) + prefix_len for t in brute.tile_tokens(grid, tile)]
    want = torch.stack([x[:, t].double().mean(1) for t in tokens], dim=2)
    assert got.dtype == torch.float32 and got.shape == (2, 3, len(tokens), 8)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)


def scores_of(q, k, grid, tile, scale):
    """fp64 [B, H, n, n] of q and k [B, L, H, D] without text."""
    tokens = brute.tile_tokens(grid, tile)
    q, k = (torch.stack([x[:, t].double().mean(1) for t in tokens], dim=2) for x in (q, k))
    return torch.einsum("bhid,bhjd->bhij", q, k) * scale


def always_of(select, grid, tile, border):
    """The tiles in the window of each query tile: [n] lists."""
    if select.always is None:
        return [[] for _ in brute.tile_tokens(grid, tile)]
    mask = brute.tile_mask(grid, tile, select.always, border)
    return [row.nonzero()[:, 0].tolist() for row in mask]


def rows_of(lists, n):
    """((sample, head, query tile), its list), after checks of the form of all lists."""
    for *at, count in zip(*(lists.counts + 1).nonzero(as_tuple=True), lists.counts.flatten(), strict=True):
        row = lists.indices[tuple(at)][: int(count)].tolist()
        assert row == sorted(set(row)) and all(0 <= x < n for x in row), "ascending, no tile twice"
        yield tuple(map(int, at)), row


def shares_of(scores, grid, tile):
    sizes = torch.tensor([len(t) for t in brute.tile_tokens(grid, tile)])
    weights = sizes * (scores - scores.amax(-1, keepdim=True)).exp()
    return weights / weights.sum(-1, keepdim=True)


@st.composite
def choices(draw, kind):
    grid, tile = draw(grids())
    windows = [
        draw(st.sampled_from(brute.legal_windows(-(-a // b)))) for a, b in zip(grid, tile, strict=True)
    ]
    always = draw(st.none() | st.just(tuple(windows)))
    share = st.floats(0.01, 1)
    select = TopTiles(draw(share), always)
    if kind is TopMass:
        select = TopMass(draw(st.floats(0.01, 0.99)), always, draw(share))
    g = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    n = len(brute.tile_tokens(grid, tile))
    scores = torch.randn(2, 1, n, n, generator=g) * draw(st.sampled_from([0.1, 1.0, 10.0]))
    border = draw(st.sampled_from(["clamp", "truncate"]))
    return grid, AttentionConfig(tile, border=border, select=select), scores


def chosen(case):
    """(lists, the tiles of the window for each tile) of a case of `choices`."""
    grid, config, scores = case
    return choose(scores, config.resolve(grid, 1)), always_of(config.select, grid, config.tile, config.border)


def room(share, n, always):
    """How many tiles a list has room for, by a share of n tiles."""
    return max(math.ceil(round(share, 6) * n - 1e-9), 1, *map(len, always))


@settings(max_examples=80)
@given(choices(TopTiles))
def test_top_tiles(case):
    """Always k of them: those of the window, then those with the highest scores."""
    _, config, scores = case
    n, (lists, always) = scores.shape[-1], chosen(case)
    size = room(config.select.fraction, n, always)
    assert lists.indices.shape == (2, 1, n, size) and (lists.counts == size).all()
    for (b, h, tile), row in rows_of(lists, n):
        best = sorted(range(n), key=lambda x: (x not in always[tile], -scores[b, h, tile, x].item()))  # noqa: B023
        assert row == sorted(best[:size])


@settings(max_examples=80)
@given(choices(TopMass))
def test_top_mass(case):
    """It reaches the mass unless `most` forbids, and without its lightest tile would not."""
    grid, config, scores = case
    n, select, (lists, always) = scores.shape[-1], config.select, chosen(case)
    most = room(select.most, n, always)
    assert lists.indices.shape[3] == most
    shares = shares_of(scores.double(), grid, config.tile)
    for at, row in rows_of(lists, n):
        own, free = shares[at], sorted(set(row) - set(always[at[2]]))
        assert row and set(always[at[2]]) <= set(row)
        assert own[row].sum() >= select.mass - 1e-5 or len(row) == most
        if free:
            left_out = [own[x].item() for x in range(n) if x not in row]
            assert min(own[free]) >= max(left_out, default=0.0) - 1e-6, "the heaviest ones"
            if len(row) > 1:
                assert own[row].sum() - min(own[free]) < select.mass + 1e-5, "no more than it takes"


def test_a_heavy_tile_is_a_large_one():
    """Among equal scores a ragged tile has a smaller share: 4 + 4 of 9 tokens are 0.89 of the mass."""
    lists = choose(
        torch.zeros(1, 1, 3, 3), AttentionConfig((1, 1, 4), select=TopMass(0.8)).resolve((1, 1, 9), 1)
    )
    assert lists.counts.eq(2).all() and lists.indices[..., :2].tolist() == [[[[0, 1]] * 3]]


def test_all_of_the_mass():
    """Tiles with a share below 2^-30 count as none."""
    scores = torch.tensor([0.0, -1.0, -50.0]).expand(1, 1, 3, 3)
    for mass, count in ((1.0, 2), (0.74, 2), (0.73, 1)):
        config = AttentionConfig((1, 1, 4), select=TopMass(mass))
        assert choose(scores, config.resolve((1, 1, 12), 1)).counts.eq(count).all()


@ALL
@pytest.mark.parametrize("value", [0.0, math.nan, math.inf, -math.inf])
def test_scores_that_say_nothing_give_legal_lists(select, value):
    """Equal ones, and those of inputs that are not finite."""
    resolved = config_of(select).resolve(GRID, 1)
    lists = choose(torch.full((1, 1, TILES, TILES), value), resolved)
    assert all(row for _, row in rows_of(lists, TILES))
    again = choose(torch.full((1, 1, TILES, TILES), value), resolved)
    assert torch.equal(again.indices, lists.indices) and torch.equal(again.counts, lists.counts)


@pytest.mark.parametrize(
    "select, tiles, capacity",
    [
        (TopTiles(0.07), (1, 10, 10), 7),  # 0.07 * 100 is above 7 in floating point
        (TopTiles(5 / 6), (1, 2, 3), 5),
        (TopTiles(1e-9), (4, 4, 4), 1),
        (TopTiles(1), (4, 4, 4), 64),
        (TopTiles(0.1), (3, 3, 3), 3),
        (TopTiles(0.01, (3, 3, 9)), (5, 5, 3), 27),
        (TopTiles(0.5, (1, 1, 1)), (5, 5, 3), 38),
        (TopMass(0.9), (5, 5, 3), 75),
        (TopMass(0.9, most=0.2), (5, 5, 3), 15),
        (TopMass(0.9, (1, 5, 5), 0.1), (5, 5, 3), 15),
        (TopTiles(0.5), (0, 5, 3), 0),
    ],
)
def test_capacity(select, tiles, capacity):
    assert select.capacity(tiles) == capacity


@ALL
@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_select_tiles_is_all_of_it(select, layout):
    """The lists of the scores that loops give; text is not looked at."""
    q, k, _ = make_qkv(layout=layout)
    config = config_of(select)
    lists = fps.select_tiles(q, k, grid=GRID, config=config, scale=0.3, tensor_layout=layout, **TEXT)
    video = slice(TEXT["prefix_len"], TEXT["prefix_len"] + math.prod(GRID))
    scores = scores_of(*(to_nhd(x, layout)[:, video] for x in (q, k)), GRID, TILE, 0.3)
    want = choose(scores.float(), config.resolve(GRID, 2, *TEXT.values()))
    assert torch.equal(lists.mask(), want.mask())
    assert torch.equal(lists.counts, want.counts)
    assert (
        lists.mask().float().mean() < 0.6 and len({tuple(x.flatten().tolist()) for x in lists.mask()[0]}) == 2
    )


def test_smoothing_k_changes_no_choice():
    q, k, _ = make_qkv(text=False)
    for select in SELECTORS.values():
        lists = [
            fps.select_tiles(q, x, grid=GRID, config=config_of(select)) for x in (k, k - k.mean(1, True))
        ]
        assert torch.equal(lists[0].mask(), lists[1].mask())


def test_no_video():
    x = torch.randn(1, 5, 2, 64)
    config = AttentionConfig((2, 2, 2), select=TopMass(0.5))
    lists = fps.select_tiles(x, x, grid=(0, 4, 5), config=config, prefix_len=5)
    assert lists.indices.shape == (1, 2, 0, 0)
    out = fps.attention(x, x, x, grid=(0, 4, 5), config=config, prefix_len=5)
    assert torch.equal(
        out, fps.attention(x, x, x, grid=(0, 4, 5), config=replace(config, select=None), prefix_len=5)
    )


# Attention


def results(q, k, v, **call):
    """out, lse and the gradients."""
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out, lse = fps.attention(*leaves, grid=GRID, return_lse=True, backend="reference", **call)
    g = torch.Generator().manual_seed(1)
    dout, dlse = (torch.randn(x.shape, generator=g).to(x) for x in (out, lse))
    return [out, lse, *torch.autograd.grad((out, lse), leaves, (dout, dlse))]


@ALL
@pytest.mark.parametrize("quant", ["fp8", "none"])
@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_attention_is_that_over_the_lists(select, quant, layout):
    """Out, lse and gradients, bit for bit: the choice is detached."""
    qkv = make_qkv(layout=layout, dtype=torch.bfloat16)
    config = config_of(select, quant=quant)
    about = {"scale": 0.3, "tensor_layout": layout, **TEXT}
    lists = fps.select_tiles(*qkv[:2], grid=GRID, config=config, **about)
    fixed = replace(config, select=None)
    got = results(*qkv, config=config, **about)
    for a, b in zip(got, results(*qkv, config=fixed, key_tiles=lists, **about), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(got[0], results(*qkv, config=fixed, **about)[0])


def test_lists_need_no_gradient():
    q, k, _ = (x.requires_grad_() for x in make_qkv(text=False))
    lists = fps.select_tiles(q, k, grid=GRID, config=config_of(TopTiles(0.3)))
    assert not lists.indices.requires_grad and not lists.counts.requires_grad


def test_autocast_chooses_as_attention_does():
    q, k, v = make_qkv(text=False)
    config = config_of(TopTiles(0.3))
    with torch.autocast("cpu", torch.bfloat16):
        lists = fps.select_tiles(q, k, grid=GRID, config=config)
        out = fps.attention(q, k, v, grid=GRID, config=config)
    q, k, v = (x.bfloat16() for x in (q, k, v))
    assert torch.equal(lists.indices, fps.select_tiles(q, k, grid=GRID, config=config).indices)
    assert torch.equal(out, fps.attention(q, k, v, grid=GRID, config=config))


def test_what_the_kernels_are_asked_for(monkeypatch):
    """They get lists, and a config that does not select."""
    asked = []
    monkeypatch.setattr(api, "backend_for", lambda *_: ("sm90", ""))
    monkeypatch.setattr(api.ops, "is_watched", lambda *_: False)
    monkeypatch.setattr(
        api.ops, "launch_attention", lambda *args, with_lse=None: asked.append(args) or (None, None, None)
    )
    q, k, v = make_qkv(dtype=torch.bfloat16)
    config = config_of(TopMass(0.6, most=0.5))
    fps.attention(q, k, v, grid=GRID, config=config, **TEXT)
    lists = fps.select_tiles(q, k, grid=GRID, config=config, **TEXT)
    ((call, *_, indices, counts),) = asked
    assert torch.equal(indices, lists.indices) and torch.equal(counts, lists.counts)
    assert call.resolved == replace(config, select=None).resolve(GRID, 2, *TEXT.values())


def test_the_way_out_for_rounded_operands():
    """As its error says."""
    q, k, v = make_qkv(dtype=torch.bfloat16)
    config = config_of(TopTiles(0.3))
    lists = fps.select_tiles(q, k, grid=GRID, config=config, **TEXT)
    with torch.no_grad():
        quantized = fps.quantize_qkv(q, k, v, grid=GRID, config=replace(config, select=None), **TEXT)
    want = fps.attention(q, k, v, grid=GRID, config=config, **TEXT)
    assert torch.equal(fps.attention(quantized, key_tiles=lists), want)
    with pytest.raises(
        ValueError,
        match=r"config: select=TopTiles.* for quantised Q, K, V, .*fpsattention.select_tiles\(q, k",
    ):
        fps.attention(quantized, config=config)


@pytest.mark.parametrize("fraction, window, ratio", [(1 / 8, (1, 3, 3), 0.75), (1 / 4, (2, 3, 3), 0.67)])
def test_a_choice_loses_less_than_a_window(fraction, window, ratio):
    """On inputs that are smooth along the grid, at equal density. Measured with two seeds, the error over that of the
    window is 0.68 and 0.69 for an eighth of the tiles, 0.60 and 0.62 for a quarter.
    """
    grid, tile = (8, 24, 24), (4, 4, 4)
    q, k, v = families.make("smooth", grid, 2, 64, dtype=torch.float32)

    def error(**options):
        config = AttentionConfig(tile, quant="none", **options)
        density.append(config.resolve(grid, 2).density)
        return (fps.attention(q, k, v, grid=grid, config=config) - dense).norm()

    density = []
    dense = fps.attention(q, k, v, grid=grid, config=AttentionConfig(tile, quant="none"))
    chosen, windowed = error(select=TopTiles(fraction)), error(window=window)
    assert density == [fraction, fraction]
    assert chosen < ratio * windowed


@pytest.mark.parametrize(
    "layer, by_number, by_mass", [(0, (0.67, 0.77), (0.45, 0.55)), (1, (1.2, 1.4), (0.87, 0.97))]
)
def test_a_trained_model(layer, by_number, by_mass):
    """Errors over that of the window, as docs/accuracy.md has them: one layer where a choice gains, one where not."""
    grid, tile, window, always = families.TRAINED_GRID, (2, 8, 8), (3, 3, 3), (1, 3, 3)
    qkv = families.make(families.TRAINED, grid, families.TRAINED_HEADS, 64, dtype=torch.float32)
    q, k, v = (x[:, :, 4 * layer : 4 * layer + 4] for x in qkv)

    def out(**options):
        return fps.attention(q, k, v, grid=grid, config=AttentionConfig(tile, quant="none", **options))

    dense = out()
    density = AttentionConfig(tile, window).resolve(grid, 4).density
    windowed = (out(window=window) - dense).norm()
    for select, (least, most) in (
        (TopTiles(density, always), by_number),
        (TopMass(0.8, always), by_mass),
    ):
        assert least < (out(select=select) - dense).norm() / windowed < most


# Tracing


@ALL
@pytest.mark.parametrize("quant", ["fp8", "none"])
def test_one_graph_under_compile(select, quant):
    """Other inputs of the same shape, other choices: the same graph."""
    torch.compiler.reset()  # torch counts the graphs of all cases
    config = config_of(select, quant=quant)

    def call(q, k, v):
        return fps.attention(q, k, v, grid=GRID, config=config, backend="reference", **TEXT)

    def with_gradients(function, qkv):
        leaves = [x.clone().requires_grad_() for x in qkv]
        out = function(*leaves)
        return [out, *torch.autograd.grad(out.square().sum(), leaves)]

    counter = CompileCounter()
    counted = torch.compile(call, fullgraph=True, backend=counter)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for seed in range(3):
        qkv = make_qkv(seed=seed)
        counted(*qkv)
        for got, want in zip(with_gradients(compiled, qkv), with_gradients(call, qkv), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    assert counter.frame_count == 1


def test_lists_made_in_one_graph_and_a_config_too():
    @torch.compile(fullgraph=True, backend="aot_eager")
    def call(q, k, v):
        lists = fps.select_tiles(
            q, k, grid=GRID, config=AttentionConfig(TILE, select=TopMass(0.5, (1, 1, 3)))
        )
        out = fps.attention(
            q, k, v, grid=GRID, config=AttentionConfig(TILE), key_tiles=lists, backend="reference"
        )
        return lists.indices, out

    q, k, v = make_qkv(text=False)
    config = config_of(TopMass(0.5, (1, 1, 3)))
    indices, out = call(q, k, v)
    assert torch.equal(indices, fps.select_tiles(q, k, grid=GRID, config=config).indices)
    assert torch.equal(out, fps.attention(q, k, v, grid=GRID, config=config))


@ALL
def test_sizes_become_symbols(select):
    """Few graphs for all grids and lengths of text."""
    counter, config = CompileCounterWithBackend("aot_eager"), config_of(select)

    @torch.compile(fullgraph=True, backend=counter, dynamic=True)
    def call(q, k, grid, prefix_len):
        lists = fps.select_tiles(q, k, grid=grid, config=config, prefix_len=prefix_len)
        return lists.indices, lists.counts

    for i, grid in enumerate([(3, 5, 8), (4, 8, 8), (6, 12, 8), (5, 9, 7), (8, 8, 8)]):
        x = torch.randn(1, 3 + i + math.prod(grid), 2, 64)
        want = fps.select_tiles(x, x, grid=grid, config=config, prefix_len=3 + i)
        got = call(x, x, grid, 3 + i)
        assert torch.equal(got[0], want.indices) and torch.equal(got[1], want.counts)
    assert counter.frame_count <= 2


@ALL
def test_opcheck(select):
    q, k, _ = make_qkv()
    rest = list(GRID), *TEXT.values(), config_of(select).spec, 0.3, "NHD"
    utils = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(torch.ops.fpsattention.select_tiles.default, (q, k, *rest), test_utils=utils)


@ALL
def test_nothing_reads_a_value(select, monkeypatch):
    """Fake tensors have none: what would make a GPU wait raises here."""
    monkeypatch.setattr(selection, "_kept", Cache(2**20))
    with FakeTensorMode():
        tables = torch.zeros(TILES, TILES, dtype=torch.bool), torch.ones(TILES)
        monkeypatch.setattr(selection._kept, "get", lambda *_: tables)
        resolved = config_of(select).resolve(GRID, 3)
        x = torch.empty(2, math.prod(GRID), 3, 64)
        mean = pooled(x, resolved, "NHD")
        lists = choose(selection.score(mean, mean, 0.1), resolved)
        assert lists.indices.shape == (2, 3, TILES, resolved.capacity) and lists.counts.shape == (2, 3, TILES)
        assert fps.attention(x, x, x, grid=GRID, config=config_of(select)).shape == x.shape


def test_the_first_call_may_come_in_a_mode(monkeypatch):
    """What it caches serves calls outside of the mode."""
    monkeypatch.setattr(selection, "_kept", Cache(2**20))
    q, k, v = make_qkv(text=False)
    config = config_of(TopMass(0.5, (1, 1, 3)))
    with torch.inference_mode():
        fps.attention(q, k, v, grid=GRID, config=config)
    tables = selection._kept.get(selection._tables, config.resolve(GRID, 2), q.device)
    assert len(selection._kept.entries) == 1 and not any(x.is_inference() for x in tables)
    fps.attention(q.requires_grad_(), k, v, grid=GRID, config=config).sum().backward()
    assert q.grad.isfinite().all() and q.grad.any()


# Configs


@ALL
@pytest.mark.parametrize("border", ["clamp", "truncate"])
def test_density(select, border):
    """That of the lists where no tile is ragged; a bound for a mass."""
    grid = (4, 6, 9)
    config = AttentionConfig(TILE, border=border, select=select)
    resolved = config.resolve(grid, 1, 7, 0)
    x = torch.randn(1, 7 + math.prod(grid), 1, 64)
    mask = fps.select_tiles(x, x, grid=grid, config=config, prefix_len=7).mask()
    pairs = mask.sum().item() * 12**2 + 7 * (x.shape[1] + math.prod(grid))
    if isinstance(select, TopTiles):
        assert resolved.density == pytest.approx(pairs / x.shape[1] ** 2)
    else:
        assert resolved.density >= pairs / x.shape[1] ** 2 - 1e-12
    assert AttentionConfig(select=select).resolve((0, 4, 4), 1).density == 1.0


def test_explain():
    text = fps.plan((21, 45, 80)).explain(AttentionConfig((7, 9, 2), select=TopTiles(0.1, always=(1, 3, 3))))
    assert (
        "select   top 0.1: 60 of 600 tiles by score, always the window (1, 3, 3) with border 'clamp'; density 0.100"
        in text
    )
    assert "window  " not in text
    dense = fps.plan((21, 45, 80)).explain(AttentionConfig((7, 9, 2)))
    work = [float(x.split("work")[1].split()[0]) for x in (text, dense)]
    assert work[0] == pytest.approx(0.1 * work[1], rel=0.01)
    text = fps.plan((21, 45, 80)).explain(
        AttentionConfig((7, 9, 2), select=TopMass(0.9, most=0.25)), prefix_len=9
    )
    assert "select   mass 0.9: at most 150 of 600 tiles by score; density at most 0.250" in text


@ALL
def test_a_schedule_selects(select, tmp_path):
    dense, chosen = AttentionConfig(TILE), config_of(select, smooth_k=True)
    schedule = StepSchedule(chosen, dense, AttentionConfig(TILE, (1, 1, 3)), alpha=(0.4, 0.8))
    assert schedule.at(step=1, num_steps=5) == schedule.for_sigma(0.9, shift=1.0) == chosen
    lines = schedule.explain(5, GRID).splitlines()
    resolved = chosen.resolve(GRID, 1)
    assert lines[1].split() == f"early 0-1 {TILE} {TILE} {select} {resolved.density:.3f}".split()
    schedule.save(path := tmp_path / "schedule.json")
    assert StepSchedule.load(path) == schedule
    assert StepSchedule.load(path).early.select == select
    data = json.loads(path.read_text())
    assert "select" not in data["mid"], "as in files from before there was one"
    assert data["early"]["select"]["kind"] == type(select).__name__


@pytest.mark.parametrize(
    "select, words",
    [
        (
            {"fraction": 0.1, "always": None},
            '"early": "select": {.*} must be an object whose "kind" is TopTiles or',
        ),
        (
            {"kind": "TopTiles", "always": None},
            "'select': missing key 'fraction'|\"select\": missing key 'fraction'",
        ),
        ({"kind": "TopTiles", "fraction": 0.1, "always": None, "most": 1}, "unknown key 'most'"),
        (
            {"kind": "TopTiles", "fraction": 2, "always": None},
            "fraction: 2 must be a number above 0 and at most 1",
        ),
        ({"kind": ["TopTiles"]}, "must be an object"),
        ("TopTiles", "must be an object"),
    ],
)
def test_another_file_is_refused(select, words, tmp_path):
    config = AttentionConfig(TILE)
    StepSchedule(config, config, config).save(path := tmp_path / "schedule.json")
    data = json.loads(path.read_text())
    data["early"]["select"] = select
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=words):
        StepSchedule.load(path)


def test_a_table_of_windows_takes_no_choice():
    with pytest.raises(
        ValueError, match=r"config: select=TopTiles.* must be None: a table has windows; a StepSched"
    ):
        fps.WindowTable((2, 4, 4), AttentionConfig((2, 2, 2), select=TopTiles(0.5)), ((((1, 1, 1),),),))


# Errors


@pytest.mark.parametrize(
    "make, error, words",
    [
        (lambda: TopTiles(0), ValueError, r"^fraction: 0 must be a number above 0 and at most 1$"),
        (lambda: TopTiles(1.5), ValueError, r"^fraction: 1.5 must be .*; nearest legal value 1.0$"),
        (lambda: TopTiles(math.nan), ValueError, r"^fraction: nan must be"),
        (lambda: TopTiles("a"), TypeError, r"^fraction: 'a' must be"),
        (lambda: TopTiles(True), TypeError, r"^fraction: True must be"),
        (
            lambda: TopTiles(0.5, (1, 0, 1)),
            ValueError,
            r"^always: \(1, 0, 1\) .* nearest legal value \(1, 1, 1\)",
        ),
        (lambda: TopTiles(0.5, 3), TypeError, r"^always: 3 must be three integers"),
        (lambda: TopMass(-1), ValueError, r"^mass: -1 must be"),
        (lambda: TopMass(0.5, most=2), ValueError, r"^most: 2 must be .*; nearest legal value 1.0$"),
        (
            lambda: AttentionConfig(select=0.1),
            TypeError,
            r"^select: 0.1 must be a TopTiles, a TopMass or None, got fl",
        ),
        (
            lambda: AttentionConfig(window=(1, 1, 1), select=TopTiles(0.5)),
            ValueError,
            r"^select: TopTiles\(.*\) and window=\(1, 1, 1\) both say .*leave one of them out",
        ),
        (
            lambda: config_of(TopTiles(0.5, (1, 2, 1))).resolve(GRID, 1),
            ValueError,
            r"^always: \(1, 2, 1\) has 2 on axis h, which has 3 tiles; .* nearest legal values 1 and 3",
        ),
    ],
)
def test_errors_of_the_config(make, error, words):
    with pytest.raises(error, match=words):
        make()


SELECTS = config_of(TopTiles(0.3))


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda q, k, v: fps.attention(q, k, v, config=SELECTS), r"^config: tile=\(2, 2, 3\) needs a grid"),
        (
            lambda q, k, v: fps.attention(q, k, v, config=AttentionConfig(select=TopTiles(0.3))),
            r"^config: select=TopTiles\(.*\) needs a grid",
        ),
        (
            lambda q, k, v: fps.attention(
                *(q, k, v),
                grid=GRID,
                config=SELECTS,
                key_tiles=fps.select_tiles(q, k, grid=GRID, config=SELECTS),
            ),
            r"^config: select=TopTiles\(.*\) and key_tiles both say what is attended; .*select=None, or leave key_t",
        ),
        (
            lambda q, k, v: fps.attention(q, k, v, grid=GRID, config=config_of(TopTiles(0.1, (1, 2, 1)))),
            r"^always: \(1, 2, 1\)",
        ),
        (
            lambda q, k, v: fps.quantize_qkv(q, k, v, grid=GRID, config=SELECTS),
            r"^config: select=.* must be None for quantised Q, K, V, as .*select_tiles\(q, k, \.\.\.\) and pass its",
        ),
        (
            lambda q, k, v: fps.norm_rope_quantize(q, k, v, grid=GRID, config=SELECTS),
            r"^config: select=.* must be None for quantised",
        ),
        (
            lambda q, k, v: reference.emulated_attention(q, k, v, grid=GRID, config=SELECTS),
            r"^config: select=.* must be None in fpsattention.reference, which takes lists",
        ),
        (
            lambda q, k, v: reference.exact_attention(q, k, v, grid=GRID, config=SELECTS),
            r"^config: select=.* must be None in fpsattention.reference",
        ),
        (
            lambda q, k, v: fps.select_tiles(q, k, grid=GRID, config=AttentionConfig(TILE)),
            r"^config: select=None chooses nothing",
        ),
        (
            lambda q, k, v: fps.select_tiles(q, k, grid=None, config=SELECTS),
            r"^grid: None; tiles are those of a",
        ),
        (lambda q, k, v: fps.select_tiles(q, k[:, :9], grid=GRID, config=SELECTS), r"^k: "),
        (lambda q, k, v: fps.select_tiles(q, k, grid=(3, 5, 9), config=SELECTS), r"^q: has 120 tokens"),
        (lambda q, k, v: fps.select_tiles(q, k, grid=GRID, config=SELECTS, scale=-1), r"^scale: -1"),
        (
            lambda q, k, v: fps.select_tiles(q, k, grid=GRID, config=SELECTS, tensor_layout="LHD"),
            r"^tensor_layout: 'LHD'",
        ),
    ],
)
def test_errors_of_the_call(call, words):
    with pytest.raises(ValueError, match=words):
        call(*make_qkv(text=False))
