"""Text tokens before and after the grid's, on the CPU: against attention written query by query (text_cases.py)."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import brute
import fake_kernels
import fpsattention as fps
import text_cases
from compare import by_codes
from fpsattention import reference
from fpsattention.core import api, ops
from fpsattention.core.geometry import TileGeometry
from inputs import to_nhd
from text_cases import TEXT_CASES, TextCase

ALL = pytest.mark.parametrize("case", TEXT_CASES.values(), ids=TEXT_CASES.keys())
COUNTS = TEXT_CASES["counts"]


def close(got, want):
    """Assert that two pairs of out [B, L, H, D] and lse [B, H, L] agree."""
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-9, atol=1e-9)


def attend(function, case, qkv, quant="fp8", **kwargs):
    out, lse = function(*qkv, **case.call(quant), **kwargs)
    assert out.shape == qkv[0].shape
    return to_nhd(out, case.layout), lse


@ALL
def test_exact_attention(case, seed):
    qkv = case.make_qkv(seed=seed)
    close(attend(reference.exact_attention, case, qkv, "none"), text_cases.exact(case, *qkv))


@ALL
def test_emulated_attention(case, seed):
    qkv = case.make_qkv(dtype=torch.float32, seed=seed)
    got = attend(reference.emulated_attention, case, qkv, dtype=torch.float64)
    close(got, text_cases.emulated(case, *qkv))


@ALL
def test_quantize(case, seed):
    """Bit for bit: a text tile's scale covers its valid tokens, V's scale the valid tokens of a key block."""
    q, k, v = case.make_qkv(dtype=torch.bfloat16, seed=seed)
    resolved = case.config().resolve(case.grid, case.heads, case.prefix_len, case.suffix_len)
    x = reference.quantize(q, k, v, resolved, case.layout, **case.counts())
    want = text_cases.quantized(case, q, k, v)
    for name in ("q8", "k8", "v8"):
        assert torch.equal(getattr(x, name).float().transpose(1, 2), want[name]), name
    group = text_cases.index_of(case.groups(case.quant_tile or case.tile))
    for name in ("q", "k"):
        scale, step = getattr(x, f"{name}_scale"), want[f"{name}_step"].transpose(1, 2)
        assert torch.equal(scale[:, :, x.tile_of_token], step[:, :, group]), name
        if not case.quant_tile:
            assert torch.equal(scale, step), (
                "tiles in raster order, then the prefix's runs, then the suffix's"
            )
    assert torch.equal(x.v_scale, want["v_step"].transpose(1, 2))
    assert torch.equal(x.block_of_token, text_cases.index_of(case.blocks()))
    if case.smooth_k:
        torch.testing.assert_close(x.k_mean, want["k_mean"], rtol=1e-7, atol=0)


@ALL
def test_gradient_of_exact_attention(case, seed):
    """Against autograd through the masked softmax, for out and lse; invalid tokens have gradient 0."""
    qkv = case.make_qkv(seed=seed)
    generator = torch.Generator().manual_seed(seed)
    dout, dlse = random_gradients(case, qkv, generator)
    leaves = [x.clone().requires_grad_() for x in qkv]
    out, lse = reference.exact_attention(*leaves, **case.call("none"))
    got = torch.autograd.grad((out, lse), leaves, (dout, dlse))
    leaves = [x.clone().nan_to_num().requires_grad_() for x in qkv]
    masks = text_cases.masks_of(case)
    attending = masks.any(-1)
    masks |= ~attending[
        ..., None
    ]  # finite rows for queries that attend nothing; their gradient is left out below
    heads_first = (to_nhd(x, case.layout).transpose(1, 2) for x in leaves)
    scale = qkv[0].shape[-1] ** -0.5 if case.scale is None else case.scale
    out, lse = brute.masked_softmax(*heads_first, masks, scale)
    dout = to_nhd(dout, case.layout).transpose(1, 2)
    want = torch.autograd.grad((out, lse), leaves, (dout * attending[..., None], dlse * attending))
    for name, a, b in zip("qkv", got, want, strict=True):
        assert a.any(), name
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")


def random_gradients(case, qkv, generator):
    """dout like q, dlse [B, H, L]."""
    dout = torch.randn(qkv[0].shape, generator=generator, dtype=qkv[0].dtype)
    lse = (case.batch, case.heads, case.tokens)
    return dout, torch.randn(lse, generator=generator, dtype=torch.promote_types(dout.dtype, torch.float32))


def every_row(masks):
    """Indices (b, h, i) of the rows of masks [B, H, L, L], and the rows."""
    return list(itertools.product(*map(range, masks.shape[:3]))), masks.flatten(0, 2)


def straight_through(case, qkv, dout, dlse):
    """dq, dk, dv [B, L, H, D] of the FP8 contract in fp64, by the formulas of `emulated_attention`."""
    scale = qkv[0].shape[-1] ** -0.5 if case.scale is None else case.scale
    x = {name: t.double() for name, t in text_cases.quantized(case, *qkv).items()}
    group, block = (
        text_cases.index_of(x) for x in (case.groups(case.quant_tile or case.tile), case.blocks())
    )
    parts = (("q", group), ("k", group), ("v", block))
    q, k, v = ((x[f"{n}8"] * x[f"{n}_step"][:, i, :, None]).transpose(1, 2) for n, i in parts)
    k_mean = x["k_mean"][:, :, None]
    dout, dlse = to_nhd(dout, case.layout).double().transpose(1, 2), dlse.double()
    z = q @ k.mT * scale * math.log2(math.e)
    p = torch.zeros_like(z)
    for (b, h, i), seen in zip(*every_row(text_cases.masks_of(case)), strict=True):
        if seen.any():
            p[b, h, i, seen] = by_codes(z[b, h, i, seen][None], block[seen])[0]
    l = p.sum(-1, keepdim=True)  # noqa: E741
    p = p / l.clamp(min=1e-300)
    dout, dlse = dout * (l > 0), dlse * (l[..., 0] > 0)
    delta = (dout * (p @ v)).sum(-1) - dlse
    ds = p * (dout @ v.mT - delta[..., None])
    dq = scale * (ds @ k + dlse[..., None] * k_mean)
    return tuple(t.transpose(1, 2) for t in (dq, scale * ds.mT @ q, p.mT @ dout))


@ALL
def test_gradient_of_emulated_attention(case, seed):
    qkv = case.make_qkv(dtype=torch.float32, seed=seed)
    dout, dlse = random_gradients(case, qkv, torch.Generator().manual_seed(seed))
    leaves = [x.clone().requires_grad_() for x in qkv]
    out, lse = reference.emulated_attention(*leaves, **case.call(), dtype=torch.float64)
    got = torch.autograd.grad((out, lse), leaves, (dout.double(), dlse.double()))
    for name, a, b in zip("qkv", got, straight_through(case, qkv, dout, dlse), strict=True):
        assert a.any(), name
        torch.testing.assert_close(to_nhd(a, case.layout).double(), b, rtol=1e-5, atol=1e-6, msg=name)


@ALL
def test_emulated_backward(case, seed):
    """The kernels' gradient is the exact one but for 16-bit roundings, by the rules that judge a kernel."""
    qkv = case.make_qkv(dtype=torch.bfloat16, head_dim=64, seed=seed)
    dout, dlse = random_gradients(case, qkv, torch.Generator().manual_seed(seed))
    out, lse = reference.emulated_attention(*qkv, **case.call())
    got = reference.emulated_backward(*qkv, out, lse, dout, dlse, **case.call())
    assert all((x.shape, x.dtype) == (y.shape, y.dtype) for x, y in zip(got, qkv, strict=True))
    got = [to_nhd(x, case.layout) for x in got]
    want = straight_through(case, qkv, dout, dlse)
    text_cases.check_gradients(case, got, want, got)
    for name, a, b in zip("qkv", got, want, strict=True):
        assert (a - b).norm() < 0.03 * b.norm(), name
    for sample in range(case.batch):
        invalid = ~case.valid(sample)
        if invalid.any():
            wrong = [x.clone() for x in got]
            wrong[1][sample, invalid.nonzero()[0]] = 1e-3
            with pytest.raises(AssertionError, match="dk of invalid"):
                text_cases.check_gradients(case, wrong, want, got)


# Mistakes that a kernel might make.


def missed_key(case):
    """Only its own query sees the last valid text key."""
    masks = text_cases.masks_of(case)
    for sample in range(case.batch):
        text = [i for i in case.valid(sample).nonzero()[:, 0].tolist() if i not in case.video]
        if text:
            masks[sample, :, : text[-1], text[-1]] = False
    return case, masks


def invalid_key(case):
    """The first invalid key is seen."""
    masks = text_cases.masks_of(case)
    for sample in range(case.batch):
        invalid = ~case.valid(sample)
        if invalid.any():
            masks[sample, :, :, invalid.nonzero()[0]] = masks[sample].any(-1, keepdim=True)
    return case, masks


def window_on_text_queries(case):
    """Text queries see the window of the first video tile instead of everything."""
    masks = text_cases.masks_of(case)
    outside = [i for i in range(case.tokens) if i not in case.video]
    video = slice(case.video.start, case.video.stop)
    masks[:, :, outside, video] &= masks[:, :, case.video.start, video][:, :, None]
    return case, masks


def only_own_section(case):
    """Text queries do not see the other section."""
    masks = text_cases.masks_of(case)
    masks[:, :, : case.video.start, case.video.stop :] = False
    return case, masks


def sections_swapped(case):
    """The suffix is taken to come first, the prefix last."""
    swapped = replace(
        case,
        prefix_len=case.suffix_len,
        suffix_len=case.prefix_len,
        prefix_valid=case.suffix_valid,
        suffix_valid=case.prefix_valid,
    )
    return swapped, text_cases.masks_of(swapped)


def counts_of_another_sample(case):
    rolled = replace(case, prefix_valid=case.prefix_valid[1:] + case.prefix_valid[:1])
    return rolled, text_cases.masks_of(rolled)


def invalid_query_computed(case):
    masks = text_cases.masks_of(case)
    for sample in range(case.batch):
        masks[sample, :, ~case.valid(sample)] = case.valid(sample)
    return case, masks


def text_keys_of_the_first_tile_only(case):
    """A window that ignores text tiles: of the video, only the first tile sees the text keys."""
    masks = text_cases.masks_of(case)
    later = [case.video.start + i for tile in brute.tile_tokens(case.grid, case.tile)[1:] for i in tile]
    masks[:, :, later, : case.video.start] = False
    masks[:, :, later, case.video.stop :] = False
    return case, masks


@pytest.mark.parametrize(
    "mutation",
    [
        missed_key,
        invalid_key,
        window_on_text_queries,
        only_own_section,
        sections_swapped,
        counts_of_another_sample,
        invalid_query_computed,
        text_keys_of_the_first_tile_only,
    ],
)
def test_wrong_attention_is_told_from_right(mutation):
    """This file's own comparison and the rules that judge a kernel both fail it."""
    qkv = COUNTS.make_qkv(head_dim=64, dtype=torch.bfloat16, invalid=1.0)
    right = attend(reference.exact_attention, COUNTS, qkv, "none")
    emulated = attend(reference.emulated_attention, COUNTS, qkv)
    text_cases.check_attention(COUNTS, *emulated, *right, *emulated)
    case, masks = mutation(COUNTS)
    wrong = text_cases.exact(case, *qkv, masks)
    with pytest.raises(AssertionError):
        close(wrong, right)
    with pytest.raises(AssertionError, match="sample"):
        text_cases.check_attention(COUNTS, wrong[0].bfloat16(), wrong[1].float(), *right, *emulated)


def test_wrong_scales_are_told_from_right(seed):
    """Large invalid tokens would show in amax; a text tile without a valid token has scale 1."""
    case = TEXT_CASES["counts that empty a run"]
    q, k, v = case.make_qkv(dtype=torch.float32, seed=seed, invalid=50.0)
    resolved = case.config().resolve(case.grid, case.heads, case.prefix_len, case.suffix_len)
    x = reference.quantize(q, k, v, resolved, case.layout, **case.counts())
    invalid_read = reference.quantize(q, k, v, resolved, case.layout)
    assert (x.q_scale[0, :, -3] == 1).all(), "the prefix's second run has no valid token in the first sample"
    assert (x.q_scale[1, :, -3] != 1).all() and (x.q_scale[1, :, -1] == 1).all()
    assert not torch.equal(x.q_scale, invalid_read.q_scale) and not torch.equal(
        x.v_scale, invalid_read.v_scale
    )


# The geometry.


@ALL
def test_geometry(case):
    resolved = case.config().resolve(case.grid, case.heads, case.prefix_len, case.suffix_len)
    g = resolved.geometry
    groups = case.groups(case.tile)
    assert (g.n_tokens, g.n_tiles, g.n_video_tiles) == (case.tokens, len(groups), math.prod(g.tiles))
    assert [row[row >= 0].tolist() for row in g.slot_tokens] == groups
    assert all((row[len(tokens) :] == -1).all() for row, tokens in zip(g.slot_tokens, groups, strict=True))
    assert [g.tile_of_token[tokens].tolist() for tokens in groups] == [
        [i] * len(tokens) for i, tokens in enumerate(groups)
    ]
    everything = replace(case, prefix_valid=None, suffix_valid=None)
    densities = []
    for head, window in enumerate(everything.windows):
        window = tuple(min(w, n) for w, n in zip(window, g.tiles, strict=True))
        mask = everything.attended(0, head)
        of_tiles = torch.tensor([[bool(mask[a[0], b[0]]) for b in groups] for a in groups])
        assert torch.equal(g.tile_mask(window, case.border), of_tiles)
        for tile in range(len(groups)):
            keys, queries = (f(tile, window, case.border) for f in (g.key_tiles, g.query_tiles))
            assert keys.tolist() == of_tiles[tile].nonzero()[:, 0].tolist()
            assert queries.tolist() == of_tiles[:, tile].nonzero()[:, 0].tolist()
        assert g.attended_pairs(window, case.border) == mask.sum()
        assert g.flops(window, case.border, 64) == 4 * 64 * mask.sum()
        blocks = [(-(-len(a) // 64), -(-len(a) // 128)) for a in groups]
        computed = sum(blocks[i][0] * blocks[j][1] for i, j in of_tiles.nonzero().tolist())
        assert g.computed_pairs(window, case.border) == computed * 64 * 128
        densities.append(float(mask.double().mean()))
    assert resolved.density == pytest.approx(sum(densities) / len(densities))
    rows = sum(-(-len(tokens) // 128) * 128 for tokens in groups)
    assert g.waste == pytest.approx(rows / case.tokens - 1)


def test_text_tiles_are_no_tiles_of_the_grid():
    g = TileGeometry((4, 4, 4), (2, 2, 2), 130, 1)
    assert (g.n_video_tiles, g.n_tiles) == (8, 11)
    with pytest.raises(IndexError, match=r"8 must be in \[0, 8\)"):
        g.coordinates(8)
    with pytest.raises(IndexError, match="11"):
        g.key_tiles(11, (1, 1, 1), "clamp")
    assert g.brick_of_tile((4, 4, 2)).tolist() == [0, 1] * 4 + [2, 3, 4]


def test_explain():
    plan = fps.plan((21, 45, 80))
    config = fps.AttentionConfig(tile=(7, 9, 2), window=(3, 3, 9))
    text = plan.explain(config, heads=40, prefix_len=226, suffix_len=3)
    assert "75,600 tokens" in text and "(3, 5, 40) = 600 tiles" in text
    assert "prefix 226 and suffix 3 tokens in 3 text tiles of up to 128" in text
    assert "the reference (emulated FP8)" in text
    assert "text" not in plan.explain(config, heads=40)


# The API.


@ALL
def test_api_on_the_reference(case, seed):
    """`attention` and `quantize_qkv` pass all arguments on."""
    qkv = case.make_qkv(dtype=torch.bfloat16, seed=seed)
    call = case.call()
    got = fps.attention(*qkv, **call, return_lse=True, backend="reference")
    want = reference.emulated_attention(*qkv, **call)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert got[0].dtype == torch.bfloat16 and got[1].dtype == torch.float32
    quantised = fps.quantize_qkv(*qkv, **call, backend="reference")
    again = fps.attention(quantised, return_lse=True)
    assert all(torch.equal(a, b) for a, b in zip(again, want, strict=True))
    got = fps.attention(*qkv, **case.call("none"), return_lse=True, backend="reference")
    want = reference.exact_attention(*qkv, **case.call("none"), dtype=torch.float32)
    assert torch.equal(got[0], want[0].bfloat16()) and torch.equal(got[1], want[1])


def test_quantised_once_brings_its_text_tokens():
    case = TEXT_CASES["counts of the prefix alone"]
    quantised = fps.quantize_qkv(*case.make_qkv(), **case.call(), backend="reference")
    call = {"prefix_len": case.prefix_len, "suffix_len": case.suffix_len}
    assert torch.equal(fps.attention(quantised, **call), fps.attention(quantised))
    with pytest.raises(ValueError, match="prefix_len: 7 is not that of the quantised Q, K, V, 6"):
        fps.attention(quantised, prefix_len=7)
    with pytest.raises(TypeError, match="suffix_valid: is part of the QuantizedQKV"):
        fps.attention(quantised, suffix_valid=torch.zeros(2, dtype=torch.int32))


GRID = (2, 3, 4)


def call_with(tokens=29, batch=2, **kwargs):
    q = torch.zeros(batch, tokens, 1, 16)
    return fps.attention(q, q, q, grid=GRID, backend="reference", **kwargs)


def counts(*values, dtype=torch.int32, device="cpu"):
    return torch.tensor(values, dtype=dtype, device=device)


BAD = {
    "tokens": ({"prefix_len": 4}, ValueError, r"q: has 29 tokens .* has 24, prefix_len is 4"),
    "tokens of neither": ({}, ValueError, r"q: has 29 tokens .* has 24$"),
    "negative": ({"prefix_len": -5}, ValueError, "prefix_len: -5 .* nearest legal value 0"),
    "no integer": ({"suffix_len": 5.0}, TypeError, "suffix_len: 5.0 must be an integer"),
    "a truth value": ({"suffix_len": True}, TypeError, "suffix_len: True must be an integer"),
    "no section": (
        {"prefix_len": 5, "suffix_valid": counts(1, 1)},
        ValueError,
        "suffix_valid: .* suffix_len is 0; leave it out",
    ),
    "no tensor": (
        {"prefix_len": 5, "prefix_valid": [1, 1]},
        TypeError,
        "prefix_valid: .* int32 tensor.*list",
    ),
    "int64": (
        {"prefix_len": 5, "prefix_valid": counts(1, 1, dtype=torch.int64)},
        TypeError,
        "prefix_valid: .* int32 tensor.*int64",
    ),
    "too few counts": (
        {"prefix_len": 5, "prefix_valid": counts(1)},
        ValueError,
        r"prefix_valid: shape \[1\] must be \[2\]",
    ),
    "one number": (
        {"prefix_len": 5, "prefix_valid": torch.tensor(1, dtype=torch.int32)},
        ValueError,
        r"prefix_valid: shape \[\] must be \[2\]",
    ),
    "another device": (
        {"suffix_len": 5, "suffix_valid": counts(1, 1, device="meta")},
        ValueError,
        "suffix_valid: device meta must be that of q, cpu",
    ),
    "too many": (
        {"suffix_len": 5, "suffix_valid": counts(5, 6)},
        ValueError,
        r"suffix_valid: 6 of sample 1 must be from 0 to 5 \(suffix_len\); nearest legal value 5",
    ),
    "below zero": (
        {"prefix_len": 5, "prefix_valid": counts(-1, 6)},
        ValueError,
        "prefix_valid: -1 of sample 0 .* nearest legal value 0",
    ),
}


@pytest.mark.parametrize(("kwargs", "error", "message"), BAD.values(), ids=BAD.keys())
@pytest.mark.parametrize("function", [fps.attention, fps.quantize_qkv])
def test_errors(function, kwargs, error, message):
    q = torch.zeros(2, 29, 1, 16)
    with pytest.raises(error, match=message):
        function(q, q, q, grid=GRID, backend="reference", **kwargs)


def test_more_tokens_than_indices():
    with pytest.raises(ValueError, match=r"prefix_len: 2147483647 .* at most 2147483136"):
        fps.AttentionConfig().resolve((1, 1, 1), 1, prefix_len=2**31 - 1)


def test_counts_out_of_range_are_clamped_where_they_cannot_be_checked():
    """The reference clamps them as the kernels do."""
    g = TileGeometry((1, 1, 2), (1, 1, 2), 3, 2)
    valid = reference.valid_tokens(g, counts(-4, 9), counts(1, 7))
    assert valid.int().tolist() == [[0, 0, 0, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1, 1]]


@pytest.mark.parametrize("case", ["several text tiles", "counts", "smooth_k, counts, bricks"])
def test_ops(case):
    """The fakes give shapes with the text tiles' blocks, and gradients of q, k, v alone."""
    case = TEXT_CASES[case]
    shape = (case.batch, case.tokens, case.heads, 64)
    if case.layout == "HND":
        shape = (case.batch, case.heads, case.tokens, 64)
    geometry = TileGeometry(case.grid, case.tile, case.prefix_len, case.suffix_len)
    config = case.config()
    lengths = case.prefix_len, case.suffix_len
    call = ops.call_of(
        config, case.grid, *lengths, case.batch, case.heads, 64, torch.bfloat16, 0.125, case.layout
    )
    assert call.sections.kv_blocks == case.batch * case.heads * geometry.n_rows // 64 * (64 * 64 + 128)
    with FakeTensorMode():
        q, k, v = (torch.zeros(shape, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
        given = (case.prefix_valid, case.suffix_valid)
        valid = [None if x is None else torch.zeros(len(x), dtype=torch.int32) for x in given]
        rest = list(case.grid), *lengths, config.spec, 0.125, case.layout
        out, lse, packed = ops.attention(q, k, v, *valid, None, None, *rest, False)
        assert out.shape == shape and lse.shape == (case.batch, case.heads, case.tokens)
        assert packed.shape == (call.sections.end,)
        (out.float().sum() + lse.sum()).backward()
        assert all(x.grad.shape == x.shape for x in (q, k, v))
        packed = ops.quantize(*(x.detach() for x in (q, k, v)), *valid, *rest)
        assert packed.shape == (call.sections.end,)
        again, _ = ops.attend(packed, *valid, None, None, *rest, case.batch, case.heads, 64, q.dtype)
        assert again.shape == out.shape


def test_the_kernels_call_is_one_graph(monkeypatch):
    """Under torch.compile, lengths that change between calls included: no code reads the counts or a symbolic length.
    The fakes run in place of the kernels.
    """
    monkeypatch.setattr(api, "backend_for", lambda *_: ("sm90", "it is pretended"))

    @torch.compile(fullgraph=True, backend="aot_eager")
    def call(q, valid, prefix_len, suffix_len):
        config = fps.AttentionConfig(tile=GRID)
        text = {"prefix_len": prefix_len, "suffix_len": suffix_len, "prefix_valid": valid}
        return fps.attention(q, q, q, grid=GRID, config=config, **text, return_lse=True)

    with fake_kernels.on_cpu():
        for prefix_len in (5, 3, 2):
            q = torch.zeros(2, 29, 1, 64, dtype=torch.bfloat16, requires_grad=True)
            out, lse = call(q, counts(1, 2), prefix_len, 5 - prefix_len)
            assert out.shape == q.shape and lse.shape == (2, 1, 29)
            (out.float().sum() + lse.sum()).backward()
            assert q.grad.shape == q.shape


def test_without_text_tokens_nothing_changes(seed):
    """Zero lengths change nothing, and sections of invalid tokens alone leave the video's rows as they are."""
    case = TextCase(
        (2, 5, 6), (2, 3, 2), (1, 1, 3), prefix_len=3, suffix_len=2, prefix_valid=(0,), suffix_valid=(0,)
    )
    qkv = case.make_qkv(dtype=torch.float32, seed=seed)
    video = [x[:, case.video.start : case.video.stop] for x in qkv]
    config = case.config()
    want = fps.attention(*video, grid=case.grid, config=config, backend="reference")
    zero = fps.attention(
        *video, grid=case.grid, config=config, prefix_len=0, suffix_len=0, backend="reference"
    )
    assert torch.equal(want, zero)
    got = fps.attention(*qkv, **case.call(), backend="reference")
    torch.testing.assert_close(got[:, case.video.start : case.video.stop], want, rtol=1e-5, atol=1e-6)
    assert not got[:, : case.video.start].any() and not got[:, case.video.stop :].any()
