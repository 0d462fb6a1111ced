"""Key tiles as lists: against attention written query by query (text_cases.py), and against windows."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.flex_attention import create_block_mask

import brute
import fpsattention as fps
import text_cases
from fpsattention import KeyTiles, reference
from fpsattention.core import api, flex, ops
from fpsattention.core.checks import shown
from inputs import to_nhd
from test_flex import in_given_order, seen_by_rows
from test_reference import rms
from test_text_tokens import attend, close, random_gradients, straight_through
from text_cases import TextCase

pytestmark = pytest.mark.filterwarnings("ignore:fpsattention runs its reference")


@dataclass(frozen=True)
class ListCase(TextCase):
    """A call with lists. `lists`: [1 or B][1 or H][n], the key tiles of each query tile in any order."""

    lists: tuple = ()

    @property
    def key_tiles(self) -> KeyTiles:
        """Entries that do not count are no tiles: they must not be read."""
        n = len(brute.tile_tokens(self.grid, self.tile))
        cap = max([min(n, 1), *(len(row) for head in itertools.chain(*self.lists) for row in head)])
        indices = torch.full((len(self.lists), len(self.lists[0]), n, cap), 10**9, dtype=torch.int32)
        counts = torch.zeros(indices.shape[:3], dtype=torch.int32)
        for b, heads in enumerate(self.lists):
            for h, rows in enumerate(heads):
                for tile, row in enumerate(rows):
                    indices[b, h, tile, : len(row)] = torch.tensor(row, dtype=torch.int32)
                    counts[b, h, tile] = len(row)
        return KeyTiles(indices, counts)

    def call(self, quant="fp8", device="cpu") -> dict:
        return super().call(quant, device) | {"key_tiles": self.key_tiles.to(device)}

    def attended(self, sample: int, head: int) -> torch.Tensor:
        mask = super().attended(sample, head)
        tokens = [[self.video.start + i for i in tile] for tile in brute.tile_tokens(self.grid, self.tile)]
        rows = self.lists[sample % len(self.lists)]
        for tile, row in enumerate(rows[head % len(rows)]):
            mask[tokens[tile], self.video.start : self.video.stop] = False
            for key_tile in row:
                mask[torch.tensor(tokens[tile])[:, None], torch.tensor(tokens[key_tile])] = True
        return mask

    def tile_masks(self) -> torch.Tensor:
        """bool [1 or B, 1 or H, n, n]"""
        n = len(brute.tile_tokens(self.grid, self.tile))
        mask = torch.zeros(len(self.lists), len(self.lists[0]), n, n, dtype=torch.bool)
        for b, h, tile in itertools.product(*map(range, mask.shape[:3])):
            mask[b, h, tile, self.lists[b][h][tile]] = True
        return mask


def of_shape(grid, tile, batch=1, heads=1, seed=0) -> tuple:
    """Random lists in random order; about a third of them are empty, the second tile's always."""
    generator = torch.Generator().manual_seed(seed)
    n = len(brute.tile_tokens(grid, tile))

    def row(tile):
        size = int(torch.randint(-n // 2, n + 1, (), generator=generator)) if tile != 1 else 0
        return tuple(torch.randperm(n, generator=generator)[: max(size, 0)].tolist())

    return tuple(tuple(tuple(map(row, range(n))) for _ in range(heads)) for _ in range(batch))


@st.composite
def cases(draw, tokens=60, **options):
    """Few tokens, since `text_cases` computes query by query."""
    grid = draw(st.tuples(*[st.integers(1, 7)] * 3).filter(lambda x: 12 <= math.prod(x) <= tokens))
    tile = draw(st.tuples(*[st.integers(1, 4)] * 3))
    batch, heads = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    prefix, suffix = (draw(st.sampled_from([0, 0, 1, 5])) for _ in range(2))

    def valid(length):
        counts = st.tuples(*[st.integers(0, length)] * batch)
        return draw(st.none() | counts) if length else None

    sizes = draw(st.sampled_from([1, batch])), draw(st.sampled_from([1, heads]))
    lists = of_shape(grid, tile, *sizes, draw(st.integers(0, 2**16)))
    return ListCase(
        *(grid, tile), prefix_len=prefix, suffix_len=suffix, prefix_valid=valid(prefix), suffix_valid=valid(suffix),
        heads=heads, batch=batch, layout=draw(st.sampled_from(["NHD", "HND"])),
        scale=draw(st.sampled_from([None, 0.4])), lists=lists, **options,
    )  # fmt: skip


def fixed(grid, tile, *lists, **options) -> ListCase:
    return ListCase(grid, tile, lists=of_shape(grid, tile, *lists), **options)


FIXED = {
    "ragged": fixed((2, 5, 6), (2, 3, 2)),
    "of heads": fixed((2, 5, 6), (2, 3, 2), 1, 2, prefix_len=7, layout="HND"),
    "of samples": fixed((2, 5, 6), (2, 3, 2), 2, 1, batch=2, suffix_len=5, suffix_valid=(0, 4), scale=0.4),
    "of both, smooth_k": fixed((3, 4, 5), (2, 2, 2), 2, 2, batch=2, smooth_k=True),
    "smooth_k, counts, bricks": fixed(
        *((3, 4, 9), (1, 2, 2), 2, 2), prefix_len=9, suffix_len=11, smooth_k=True, quant_tile=(2, 2, 4), batch=2,
        prefix_valid=(9, 0), suffix_valid=(0, 0)
    ),
    "slot of 256": fixed((3, 9, 8), (3, 7, 7), prefix_len=130, heads=1),
    "one tile": fixed((2, 2, 2), (2, 2, 2)),
    "all empty": ListCase((2, 2, 4), (2, 2, 2), lists=((((), ()),),)),
    "no video": ListCase((0, 4, 5), (2, 2, 2), prefix_len=5, suffix_len=3, lists=(((),),)),
}  # fmt: skip
ALL = pytest.mark.parametrize("case", FIXED.values(), ids=FIXED.keys())


# The reference against its definition


def check_exact(case, seed):
    """Out, lse and gradients of exact attention, against autograd through a softmax under a mask of tokens."""
    qkv = case.make_qkv(seed=seed)
    close(attend(reference.exact_attention, case, qkv, "none"), text_cases.exact(case, *qkv))
    dout, dlse = random_gradients(case, qkv, torch.Generator().manual_seed(seed))
    leaves = [x.clone().requires_grad_() for x in qkv]
    got = torch.autograd.grad(
        reference.exact_attention(*leaves, **case.call("none")), leaves, (dout, dlse), materialize_grads=True
    )
    leaves = [x.nan_to_num().requires_grad_() for x in qkv]
    masks = text_cases.masks_of(case)
    attending = masks.any(-1)  # queries without keys get some, and no gradient
    heads_first = (to_nhd(x, case.layout).transpose(1, 2) for x in leaves)
    scale = qkv[0].shape[-1] ** -0.5 if case.scale is None else case.scale
    outputs = brute.masked_softmax(*heads_first, masks | ~attending[..., None], scale)
    dout = to_nhd(dout, case.layout).transpose(1, 2)
    want = torch.autograd.grad(outputs, leaves, (dout * attending[..., None], dlse * attending))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


def check_emulated(case, seed):
    """Out, lse and gradients of the FP8 contract in fp64, against its formulas query by query."""
    qkv = case.make_qkv(dtype=torch.float32, seed=seed)
    got = attend(reference.emulated_attention, case, qkv, dtype=torch.float64)
    close(got, text_cases.emulated(case, *qkv))
    dout, dlse = random_gradients(case, qkv, torch.Generator().manual_seed(seed))
    leaves = [x.clone().requires_grad_() for x in qkv]
    outputs = reference.emulated_attention(*leaves, **case.call(), dtype=torch.float64)
    got = torch.autograd.grad(outputs, leaves, (dout.double(), dlse.double()), materialize_grads=True)
    for a, b in zip(got, straight_through(case, qkv, dout, dlse), strict=True):
        torch.testing.assert_close(to_nhd(a, case.layout).double(), b, rtol=1e-5, atol=1e-6)


def check_backward(case, seed):
    """The kernels' gradient, by the rules that judge a kernel; queries and keys that meet nobody have none."""
    qkv = case.make_qkv(dtype=torch.bfloat16, head_dim=64, seed=seed)
    dout, dlse = random_gradients(case, qkv, torch.Generator().manual_seed(seed))
    out, lse = reference.emulated_attention(*qkv, **case.call())
    got = reference.emulated_backward(*qkv, out, lse, dout, dlse, **case.call())
    got = [to_nhd(x, case.layout) for x in got]
    text_cases.check_gradients(case, got, straight_through(case, qkv, dout, dlse), got)
    masks = text_cases.masks_of(case)
    queries, keys = (masks.any(dim).transpose(1, 2) for dim in (3, 2))
    assert not got[0][~queries].any() and not got[1][~keys].any() and not got[2][~keys].any()
    if case.video:
        assert masks.any() == all(x.any() for x in got)


@ALL
def test_fixed_cases(case, seed):
    check_exact(case, seed)
    check_emulated(case, seed)
    check_backward(case, seed)


@settings(max_examples=20, deadline=None)
@given(cases(), st.integers(0, 99))
def test_exact_attention(case, seed):
    check_exact(case, seed)


@settings(max_examples=20, deadline=None)
@given(st.booleans().flatmap(lambda smooth_k: cases(smooth_k=smooth_k)), st.integers(0, 99))
def test_emulated_attention(case, seed):
    check_emulated(case, seed)


@settings(max_examples=20, deadline=None)
@given(st.booleans().flatmap(lambda smooth_k: cases(smooth_k=smooth_k)), st.integers(0, 99))
def test_emulated_backward(case, seed):
    check_backward(case, seed)


@pytest.mark.parametrize("case", ["of heads", "smooth_k, counts, bricks", "slot of 256"])
def test_rounding_costs_what_it_does_under_a_window(case):
    """As in test_reference.py."""
    qkv = FIXED[case].make_qkv(dtype=torch.float32, head_dim=64, invalid=0.0)
    out, lse = reference.emulated_attention(*qkv, **FIXED[case].call())
    exact, exact_lse = reference.exact_attention(*qkv, **FIXED[case].call("none"))
    assert 0.02 < rms(out, exact) < 0.07
    assert torch.equal(lse == -math.inf, exact_lse == -math.inf)


def test_queries_without_keys():
    """A list may be empty. Without valid text out is 0 and lse -inf, whatever they or their dout hold."""
    case = replace(FIXED["of both, smooth_k"], quant_tile=None)
    empty = torch.tensor([case.video.start + i for i in brute.tile_tokens(case.grid, case.tile)[1]])
    q, k, v = case.make_qkv(dtype=torch.float32)
    for function, quant in ((reference.exact_attention, "none"), (reference.emulated_attention, "fp8")):
        call = case.call(quant) | {"dtype": torch.float32}
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out, lse = function(*leaves, **call)
        assert (out[:, empty] == 0).all() and (lse[:, :, empty] == -math.inf).all()
        assert torch.equal(lse > -math.inf, text_cases.masks_of(case).any(-1))
        assert out.isfinite().all()
        dout = torch.ones_like(out)
        grads = torch.autograd.grad((out, lse), leaves, (dout, torch.ones_like(lse)))
        assert not grads[0][:, empty].any() and all(x.isfinite().all() for x in grads)
    with_nan = q.index_fill(1, empty, math.nan)
    assert torch.equal(reference.emulated_attention(with_nan, k, v, **case.call())[0], out)
    dout[:, empty] = math.nan
    out, lse = reference.emulated_attention(q, k, v, **case.call())
    grads = reference.emulated_backward(q, k, v, out, lse, dout, **case.call())
    assert not grads[0][:, empty].any() and all(x.isfinite().all() for x in grads)


def everything_of(case, call, dtype=torch.float32):
    """out, lse and all gradients of both functions and of emulated_backward."""
    qkv = case.make_qkv(dtype=dtype, invalid=0.0)
    dout, dlse = random_gradients(case, qkv, torch.Generator().manual_seed(0))
    results = []
    for function, quant in ((reference.exact_attention, "none"), (reference.emulated_attention, "fp8")):
        leaves = [x.clone().requires_grad_() for x in qkv]
        out, lse = function(*leaves, **call(quant), dtype=torch.float32)
        results += [out, lse, *torch.autograd.grad((out, lse), leaves, (dout, dlse))]
    results += reference.emulated_backward(*qkv, out.detach(), lse.detach(), dout, dlse, **call("fp8"))
    return [x.detach() for x in results]


WINDOWS = {
    "clamp": TextCase((3, 6, 8), (1, 2, 2), (1, 3, 3), batch=2, layout="HND"),
    "truncate, text": TextCase(
        (3, 6, 8), (1, 2, 2), (3, 1, 3), "truncate", prefix_len=6, suffix_len=4, batch=2, prefix_valid=(6, 1)
    ),
    "of heads, ragged": TextCase((3, 7, 5), (2, 3, 2), ((1, 1, 3), (3, 3, 1), (1, 1, 3)), heads=3, smooth_k=True),
    "dense": TextCase((4, 4, 4), (2, 2, 2), (2, 2, 2)),
}  # fmt: skip


@pytest.mark.parametrize("budget", [2**22, 2**13])
@pytest.mark.parametrize("case", WINDOWS.values(), ids=WINDOWS.keys())
def test_a_window_as_lists_gives_the_same_bits(case, budget, monkeypatch):
    monkeypatch.setattr(reference, "BUDGET", budget)
    lists = KeyTiles.of_window(case.grid, case.tile, case.window, case.border)
    assert lists.indices.shape[1] == (1 if len(set(case.windows)) == 1 else case.heads)
    for h, window in enumerate(case.windows):
        own = lists.mask()[0, h % lists.indices.shape[1]]
        assert torch.equal(own, brute.tile_mask(case.grid, case.tile, window, case.border))

    def call(quant):
        return replace(case, window=None).call(quant) | {"key_tiles": lists}

    for a, b in zip(everything_of(case, call), everything_of(case, case.call), strict=True):
        assert torch.equal(a, b)


@settings(max_examples=20, deadline=None)
@given(
    st.tuples(*[st.integers(1, 5)] * 3),
    st.tuples(*[st.sampled_from([1, 3, 5])] * 3),
    st.sampled_from(["clamp", "truncate"]),
)
def test_a_window_as_lists_is_computed_in_the_same_chunks(tiles, window, border):
    """So the bits do not depend on what a matrix product does with its neighbours in a batch."""
    grid, tile = tuple(2 * n - 1 for n in tiles), (2, 2, 2)
    resolved = fps.AttentionConfig(tile, window, border).resolve(grid, 1, 3, 0)
    (look,) = KeyTiles.of_window(grid, tile, window, border).ascending()[0]
    for budget in (2**12, 2**22):
        ours, theirs = (reference._chunks(resolved, x, 1, 16, budget) for x in (look, *resolved.windows))
        for (queries, keys, lie), (*same, as_lying) in zip(ours, theirs, strict=True):
            assert torch.equal(queries, same[0]) and torch.equal(keys, same[1]) and lie == as_lying


def test_order_and_memory_of_lists_do_not_matter():
    """Another order, a larger cap, and lists repeated for every sample and head."""
    case = FIXED["of heads"]
    key_tiles = KeyTiles.of_mask(case.tile_masks().expand(case.batch, -1, -1, -1))
    assert key_tiles.indices.shape[3] == 6 == case.key_tiles.indices.shape[2]
    assert not torch.equal(key_tiles.indices, case.key_tiles.indices)

    def call(quant):
        return case.call(quant) | {"key_tiles": key_tiles}

    for a, b in zip(everything_of(case, call), everything_of(case, case.call), strict=True):
        assert torch.equal(a, b)


# Values that nobody looks at


@pytest.fixture
def unchecked(monkeypatch):
    """As on a GPU."""
    monkeypatch.setattr(KeyTiles, "_check_values", lambda self: None)


def test_values_out_of_range_are_clamped(unchecked):
    indices = torch.tensor([[[[0, 1], [9, 0], [-4, 2]]]], dtype=torch.int32)
    lists = KeyTiles(indices, torch.tensor([[[7, 1, -1]]], dtype=torch.int32))
    want = torch.tensor([[1, 1, 0], [0, 0, 1], [0, 0, 0]]).bool()
    assert torch.equal(lists.mask()[0, 0], want)
    assert lists.ascending().tolist() == [[[[0, 1], [2, 3], [3, 3]]]]
    case = ListCase((1, 1, 3), (1, 1, 1), lists=((((0, 1), (2,), ()),),))
    qkv = case.make_qkv(dtype=torch.float32)
    call = case.call() | {"key_tiles": lists}
    for a, b in zip(
        reference.emulated_attention(*qkv, **call),
        reference.emulated_attention(*qkv, **case.call()),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_a_tile_listed_twice_counts_twice(unchecked):
    """As if its keys stood there twice: the lse of a query that sees but one tile rises by ln 2."""
    lists = KeyTiles(torch.tensor([[[[1, 1], [0, 1]]]], dtype=torch.int32), torch.full((1, 1, 2), 2).int())
    q, k, v = TextCase((1, 2, 4), (1, 1, 4)).make_qkv()
    call = {"grid": (1, 2, 4), "config": fps.AttentionConfig((1, 1, 4), quant="none")}
    once = call | {"key_tiles": KeyTiles.of_mask(torch.tensor([[0, 1], [1, 1]]).bool())}
    (out, lse), (want, want_lse) = (
        reference.exact_attention(q, k, v, **x) for x in (call | {"key_tiles": lists}, once)
    )
    torch.testing.assert_close(out, want)
    want_lse[:, :, :4] += math.log(2)
    torch.testing.assert_close(lse, want_lse)


def test_nothing_reads_a_value():
    """Fake tensors have none: what would make a GPU wait raises here."""
    with FakeTensorMode():
        mask = torch.zeros(2, 3, 5, 5, dtype=torch.bool)
        lists = KeyTiles.of_mask(mask)
        assert (lists.indices.shape, lists.counts.shape) == ((2, 3, 5, 5), (2, 3, 5))
        assert lists.mask().shape == mask.shape
        assert KeyTiles.of_full_blocks(*lists.full_blocks(2, 3)).of_heads(1, 2).counts.shape == (2, 2, 5)
        q = torch.empty(2, 20, 3, 64)
        config = fps.AttentionConfig((1, 1, 4))
        assert fps.attention(q, q, q, grid=(1, 5, 4), config=config, key_tiles=lists).shape == q.shape


# Other forms


@settings(max_examples=40, deadline=None)
@given(cases())
def test_masks_and_lists(case):
    lists, masks = case.key_tiles, case.tile_masks()
    assert torch.equal(lists.mask(), masks)
    n = masks.shape[-1]
    made = KeyTiles.of_mask(masks)
    assert made.indices.shape[3] == n and torch.equal(made.counts, masks.sum(3).int())
    for b, h, tile in itertools.product(*map(range, masks.shape[:3])):
        listed = made.indices[b, h, tile, : made.counts[b, h, tile]]
        assert listed.tolist() == masks[b, h, tile].nonzero()[:, 0].tolist(), "ascending"


def test_axes_that_a_mask_leaves_out_are_one():
    mask = torch.rand(2, 3, 4, 4) < 0.5
    for part, shape in ((mask, (2, 3)), (mask[0], (1, 3)), (mask[0, 0], (1, 1))):
        lists = KeyTiles.of_mask(part)
        assert lists.counts.shape == (*shape, 4)
        assert torch.equal(lists.mask(), part.reshape(*shape, 4, 4))


@settings(max_examples=20, deadline=None)
@given(cases())
def test_full_blocks(case):
    """One list for each sample and head, as FlashAttention-4 and cuDNN have it."""
    counts, indices = case.key_tiles.full_blocks(case.batch, case.heads)
    assert counts.dtype == indices.dtype == torch.int32 and counts.shape[:2] == (case.batch, case.heads)
    assert counts.is_contiguous() and indices.is_contiguous()
    want = case.tile_masks().expand(case.batch, case.heads, -1, -1)
    assert torch.equal(KeyTiles.of_full_blocks(counts, indices).mask(), want)


@pytest.mark.parametrize("name", ["ragged", "of heads", "slot of 256", "one tile"])
def test_block_masks(name):
    """Blocks are tiles in slot order; what a BlockMask says of tokens is what the lists say."""
    case = FIXED[name]
    mask = case.key_tiles.block_mask(case.grid, case.tile)
    resolved = case.config().resolve(case.grid, case.heads)
    geometry = resolved.geometry
    assert (geometry.slot,) * 2 == mask.BLOCK_SIZE and mask.shape[-1] == geometry.n_rows
    assert torch.equal(KeyTiles.of_block_mask(mask, case.grid, case.tile).mask(), case.tile_masks())
    without_text = replace(case, prefix_len=0)
    at = torch.arange(geometry.n_rows)
    for h in range(case.heads):
        seen = mask.mask_mod(torch.tensor(0), torch.tensor(h), at[:, None], at)
        pairs = in_given_order(seen, geometry.slot_tokens.flatten())
        assert torch.equal(pairs, without_text.attended(0, h))
    by_flex = create_block_mask(
        mask.mask_mod, 1, len(case.lists[0]), *[geometry.n_rows] * 2, device="cpu", BLOCK_SIZE=geometry.slot
    )
    assert torch.equal(KeyTiles.of_block_mask(by_flex, case.grid, case.tile).mask(), case.tile_masks())


def test_full_and_partial_blocks_of_a_block_mask():
    """Tiles without padding are full blocks for FlexAttention, ragged ones partial."""
    grid, tile = (1, 8, 18), (1, 8, 16)
    case = ListCase(grid, tile, lists=((((0, 1), (0,)),),))
    mask_mod = case.key_tiles.block_mask(grid, tile).mask_mod
    made = create_block_mask(mask_mod, 1, 1, 256, 256, device="cpu", BLOCK_SIZE=128)
    assert made.full_kv_num_blocks.tolist() == [[[1, 1]]] and made.kv_num_blocks.tolist() == [[[1, 0]]]
    assert torch.equal(KeyTiles.of_block_mask(made, grid, tile).mask(), case.tile_masks())


# Without rounding, on a GPU


@ALL
def test_block_mask_of_lists_for_a_compiled_kernel(case):
    """For every sample, the pairs are those that the case lists query by query."""
    resolved = case.config("none").resolve(case.grid, case.heads, case.prefix_len, case.suffix_len)
    rows = resolved.geometry.slot_tokens.flatten()
    counts = case.counts().values()
    valid = reference.valid_tokens(resolved.geometry, *counts)
    mask = flex.block_mask_of_lists(resolved, case.key_tiles, True, valid is not None)
    if valid is not None:
        mask = flex._of_valid(mask, valid[:, rows.clamp(min=0)])
    for b, h in itertools.product(range(case.batch), range(case.heads)):
        at = b % len(case.lists), h % len(case.lists[0])
        one = flex.copy.copy(mask)
        for name in flex.LISTS:
            setattr(one, name, getattr(mask, name)[at[0] :, at[1] :])
        one.mask_mod = lambda _, __, q, kv, b=b, h=h: mask.mask_mod(b, h, q, kv)
        seen = seen_by_rows(one, 0, 0)
        pairs, own = in_given_order(seen, rows), case.valid(b)
        assert pairs[own].equal(case.attended(b, h)[own])
        assert not pairs[:, ~own].any() and not seen[:, rows < 0].any()


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@ALL
def test_flex_attention(case):
    qkv = case.make_qkv(dtype=torch.float32)
    resolved = case.config("none").resolve(case.grid, case.heads, case.prefix_len, case.suffix_len)
    about = resolved, case.scale or 0.25, case.layout, *case.counts().values(), case.key_tiles
    out, lse = flex.flex_attention(*qkv, *about)
    expected, expected_lse = text_cases.exact(case, *qkv)
    torch.testing.assert_close(to_nhd(out, case.layout).double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("return_lse", [False, True])
def test_torchs_kernels_get_the_lists(monkeypatch, return_lse):
    """Also where nothing but the lists keeps the call from being torch's dense attention."""
    monkeypatch.setattr(api, "backend_for", lambda *_: ("torch", ""))
    case = FIXED["ragged"]
    q, k, v = case.make_qkv(dtype=torch.float32)
    result = fps.attention(q, k, v, **case.call("none"), return_lse=return_lse)
    expected = text_cases.exact(case, q, k, v)
    for got, want in zip(result if return_lse else [result], expected, strict=False):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


def test_many_lists_of_blocks_are_refused(monkeypatch):
    monkeypatch.setattr(flex, "MAX_BLOCKS", 8)
    case = FIXED["of both, smooth_k"]
    with pytest.raises(ValueError, match=r"config: tile .* 12 blocks"):
        flex.block_mask_of_lists(case.config("none").resolve(case.grid, 2), case.key_tiles, True)
    monkeypatch.setattr(flex, "MAX_BLOCKS", 20)
    with pytest.raises(ValueError, match=r"key_tiles: 4 lists .* of 12 blocks; .* takes at most 2, since"):
        flex.block_mask_of_lists(case.config("none").resolve(case.grid, 2), case.key_tiles, True)


# The call

GRID, CONFIG = (2, 4, 6), fps.AttentionConfig((2, 2, 2))
CASE = ListCase(GRID, CONFIG.tile, lists=of_shape(GRID, CONFIG.tile, 1, 2), heads=2)


@ALL
@pytest.mark.parametrize("quant", ["fp8", "none"])
def test_the_call_is_the_reference(case, quant):
    qkv = case.make_qkv(dtype=torch.bfloat16)
    if quant == "fp8":
        want, want_lse = reference.emulated_attention(*qkv, **case.call())
    else:
        want, want_lse = reference.exact_attention(*qkv, **case.call("none"), dtype=torch.float32)
    out, lse = fps.attention(*qkv, **case.call(quant), return_lse=True, backend="reference")
    assert torch.equal(out, want.bfloat16()) and torch.equal(lse, want_lse)
    assert torch.equal(fps.attention(*qkv, **case.call(quant)), out)


def test_quantised_operands_take_other_lists_in_each_call():
    qkv = CASE.make_qkv(dtype=torch.bfloat16)
    with torch.no_grad():
        quantized = fps.quantize_qkv(*qkv, grid=GRID, config=CONFIG)
    results = []
    for seed in range(3):
        case = replace(CASE, lists=of_shape(GRID, CONFIG.tile, 1, 2, seed))
        results.append(fps.attention(quantized, key_tiles=case.key_tiles))
        assert torch.equal(results[-1], fps.attention(*qkv, **case.call()))
    assert not torch.equal(results[0], results[1])
    dense = fps.attention(quantized)
    assert torch.equal(dense, fps.attention(*qkv, grid=GRID, config=CONFIG))
    with_window = fps.quantize_qkv(*qkv, grid=GRID, config=replace(CONFIG, window=(1, 1, 1)))
    with pytest.raises(ValueError, match=r"config: window=\(1, 1, 1\) and key_tiles both say"):
        fps.attention(with_window, key_tiles=CASE.key_tiles)
    got = fps.attention(with_window, config=CONFIG, key_tiles=CASE.key_tiles)
    assert torch.equal(got, fps.attention(*qkv, **CASE.call()))


@pytest.mark.parametrize("quantised", [False, True])
def test_what_the_kernels_are_asked_for(monkeypatch, quantised):
    """An eager call on the Hopper backend hands the lists on as they are."""
    monkeypatch.setattr(api, "backend_for", lambda *_: ("sm90", ""))
    monkeypatch.setattr(ops, "is_watched", lambda *_: False)
    asked = []
    for name in ("launch_attention", "launch_attend"):
        monkeypatch.setattr(
            ops, name, lambda *args, with_lse=None: asked.append(args) or (None, None, None)[: 3 - quantised]
        )
    monkeypatch.setattr(
        ops, "launch_quantize", lambda call, *_: torch.zeros(call.sections.end, dtype=torch.uint8)
    )
    x = torch.zeros(1, 48, 2, 64, dtype=torch.bfloat16)
    lists, about = CASE.key_tiles, {"grid": GRID, "config": CONFIG}
    if quantised:
        fps.attention(fps.quantize_qkv(x, x, x, **about), key_tiles=lists)
        ((call, _, *tensors, _),) = asked
    else:
        fps.attention(x, x, x, **about, key_tiles=lists)
        ((call, _, _, _, *tensors),) = asked
    assert tensors[:2] == [None, None] and tensors[2] is lists.indices and tensors[3] is lists.counts
    assert call.resolved.windows == (call.resolved.geometry.tiles,)


@pytest.mark.parametrize("quant", ["fp8", "none"])
def test_one_graph_under_compile(quant):
    """Other lists of the same shape need no other graph; a graph may make them, too."""
    case = replace(CASE, prefix_len=3, prefix_valid=(2,))
    about = case.call(quant) | {"return_lse": True, "backend": "reference"}
    del about["key_tiles"]

    def call(q, k, v, mask):
        return fps.attention(q, k, v, **about, key_tiles=KeyTiles.of_mask(mask))

    def results(function, mask):
        leaves = [x.requires_grad_() for x in case.make_qkv(head_dim=64, dtype=torch.float32, invalid=0.0)]
        out, lse = function(*leaves, mask)
        return [out, lse, *torch.autograd.grad(out.square().sum() + lse[lse > -math.inf].sum(), leaves)]

    counter = CompileCounter()
    counted = torch.compile(call, fullgraph=True, backend=counter)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    masks = [torch.rand(1, 2, 6, 6, generator=torch.Generator().manual_seed(i)) < 0.4 for i in range(3)]
    for mask in masks:
        counted(*case.make_qkv(head_dim=64, dtype=torch.float32), mask)
        for got, want in zip(results(compiled, mask), results(call, mask), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    assert counter.frame_count == 1


def test_lists_given_to_a_graph():
    lists = CASE.key_tiles
    q, k, v = CASE.make_qkv(dtype=torch.float32)
    compiled = torch.compile(fps.attention, fullgraph=True, backend="aot_eager")
    call = CASE.call() | {"backend": "reference", "key_tiles": lists}
    assert torch.equal(compiled(q, k, v, **call), fps.attention(q, k, v, **call))


@pytest.mark.parametrize("kind", ["exact", "emulated"])
def test_opcheck(kind):
    case = FIXED["of samples"]
    inputs = [x.requires_grad_() for x in case.make_qkv(dtype=torch.float32, invalid=0.0)]
    tensors = *case.counts().values(), case.key_tiles.indices, case.key_tiles.counts
    rest = list(case.grid), [0, 5], case.config().spec, 0.4, case.layout, kind, torch.float32
    utils = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(
        torch.ops.fpsattention.reference.default, (*inputs, *tensors, *rest), test_utils=utils
    )


# Errors


def lists(*shape, fill=0):
    return KeyTiles(torch.full(shape, fill).int(), torch.ones(shape[:3]).int())


INT, ONE = torch.zeros(1, 1, 2, 2, dtype=torch.int32), torch.ones(1, 1, 2, dtype=torch.int32)
BLOCKS = CASE.key_tiles.block_mask(GRID, CONFIG.tile)
WRONG = {
    "a list": (lambda: KeyTiles([0], ONE), r"key_tiles.indices: must be a dense int32 tensor .*, got list"),
    "int64": (lambda: KeyTiles(INT.long(), ONE), r"key_tiles.indices: must be a dense int32 .*, got torch.int64"),
    "fp32": (lambda: KeyTiles(INT, ONE.float()), r"key_tiles.counts: .* \[1 or B, 1 or H, n\], got torch.float32"),
    "3 axes": (lambda: KeyTiles(INT[0], ONE), r"key_tiles.indices: shape \[1, 2, 2\] must be .*, n, cap\]"),
    "2 axes": (lambda: KeyTiles(INT, ONE[0]), r"key_tiles.counts: shape \[1, 2\] must be \[1 or B, 1 or H, n\]"),
    "fewer": (lambda: KeyTiles(INT, ONE[..., :1]), r"key_tiles.counts: shape \[1, 1, 1\] must .* \[1, 1, 2\]"),
    "strides": (lambda: KeyTiles(INT.expand(3, 1, 2, 2), ONE), r"key_tiles.indices: strides .*contiguous\(\)"),
    "device": (lambda: KeyTiles(INT, ONE.to("meta")), r"key_tiles.counts: device meta must be that of .*, cpu"),
    "cap 3": (lambda: lists(1, 1, 2, 3), r"key_tiles.indices: .* of 3 entries, must have 1 to 2, .* value 2"),
    "cap 0": (lambda: lists(1, 1, 2, 0), r"key_tiles.indices: .* of 0 entries, must have 1 to 2, .* value 1"),
    "index 2": (lambda: lists(1, 1, 2, 1, fill=2), r"key_tiles.indices: 2 of tile 0 \(sample 0, head 0\) .* 1; .* 1"),
    "index -1": (lambda: lists(1, 1, 2, 1, fill=-1), r"key_tiles.indices: -1 of tile 0 .* 0 to 1; nearest .* 0"),
    "count 3": (lambda: KeyTiles(INT, 3 * ONE), r"key_tiles.counts: 3 of tile 0 .* from 0 to 2; nearest .* 2"),
    "count -1": (lambda: KeyTiles(INT, -ONE), r"key_tiles.counts: -1 of tile 0 .* from 0 to 2; nearest .* 0"),
    "twice": (lambda: KeyTiles(INT, 2 * ONE), r"key_tiles.indices: tile 0 is twice in the list of tile 0 \(sample 0"),
    "int mask": (lambda: KeyTiles.of_mask(INT), "mask: must be a bool tensor, got torch.int32"),
    "no square": (lambda: KeyTiles.of_mask(INT.bool()[..., :1]), r"mask: shape \[1, 1, 2, 1\] must be \[n, n\], "),
    "1 axis": (lambda: KeyTiles.of_mask(INT.bool()[0, 0, 0]), r"mask: shape \[2\] must be"),
    "window": (lambda: KeyTiles.of_window(GRID, CONFIG.tile, (1, 1, 2)), r"window: .*nearest legal values 1 and 3"),
    "3 heads": (lambda: lists(2, 3, 2, 1).full_blocks(2, 2), r"key_tiles: has lists of 3 heads, q has 2; nearest .* 2"),
    "2 tiles": (lambda: lists(1, 1, 2, 1).block_mask(GRID, CONFIG.tile), "key_tiles: .* of 2 tiles, must have 6"),
    "blocks": (
        lambda: KeyTiles.of_block_mask(BLOCKS, GRID, (2, 2, 3)),
        r"block_mask: has \(6, 6\) blocks, must have \(4, 4\), as the grid has 4 tiles",
    ),
    "block size": (
        lambda: KeyTiles.of_block_mask(BLOCKS, (2, 9, 9), (2, 9, 9)),
        r"block_mask: BLOCK_SIZE \(128, 128\) must be \(256, 256\), the rows of a tile \(2, 9, 9\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_lists_that_are_none(name):
    make, message = WRONG[name]
    error = TypeError if "got" in message else ValueError
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"key_tiles": ONE}, TypeError, r"key_tiles: .* must be a KeyTiles or None, got torch.int32; KeyTiles.of_mask"),
        ({"config": replace(CONFIG, window=(1, 1, 1))}, ValueError, r"config: window=\(1, 1, 1\) and key_tiles both"),
        ({"key_tiles": lists(1, 1, 5, 1)}, ValueError, "key_tiles: has lists of 5 tiles, must have 6, one for each"),
        ({"key_tiles": lists(2, 1, 6, 1)}, ValueError, "key_tiles: has lists of 2 samples, q has 1; nearest legal"),
        ({"key_tiles": lists(1, 3, 6, 1)}, ValueError, "key_tiles: has lists of 3 heads, q has 2; nearest .* and 2"),
        ({"key_tiles": CASE.key_tiles.to("meta")}, ValueError, "key_tiles: device meta must be that of q, cpu"),
    ],
)  # fmt: skip
def test_lists_that_do_not_fit_the_call(change, error, message):
    x = torch.zeros(1, 48, 2, 64)
    call = {"grid": GRID, "config": CONFIG, "key_tiles": CASE.key_tiles} | change
    rows = {"out": x, "lse": torch.zeros(1, 2, 48), "dout": x}
    with torch.no_grad():
        quantized = fps.quantize_qkv(x, x, x, grid=GRID, config=CONFIG)
    about = {name: call[name] for name in ("config", "key_tiles")}
    for attempt in (
        lambda: fps.attention(x, x, x, **call),
        lambda: fps.attention(quantized, **about),
        lambda: reference.exact_attention(x, x, x, **call),
        lambda: reference.emulated_attention(x, x, x, **call),
        lambda: reference.emulated_backward(x, x, x, **rows, **call),
    ):
        with pytest.raises(error, match=message):
            attempt()


def test_lists_need_a_grid():
    x = torch.zeros(1, 48, 2, 64)
    message = r"key_tiles: KeyTiles\(int32 \[1, 2, 6, .*\] on cpu\) needs a grid, .*; give grid"
    with pytest.raises(ValueError, match=message):
        fps.attention(x, x, x, key_tiles=CASE.key_tiles)
    quantized = fps.quantize_qkv(x, x, x)
    with pytest.raises(ValueError, match=message):
        fps.attention(quantized, key_tiles=CASE.key_tiles)


def test_repr_shows_no_values():
    assert shown(CASE.key_tiles).startswith("KeyTiles(int32 [1, 2, 6, ") and len(repr(CASE.key_tiles)) < 60
