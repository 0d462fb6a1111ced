"""quant="none": the BlockMask for FlexAttention, and the results of uncompiled FlexAttention on the CPU."""

import itertools
from functools import lru_cache
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode

import brute
import text_cases
from fpsattention.core import flex
from fpsattention.core.config import AttentionConfig
from fpsattention.core.geometry import tile_geometry
from fpsattention.core.kept import Cache
from fpsattention.core.reference import exact_attention, valid_tokens
from inputs import to_nhd

GRID = (5, 9, 7)
CONFIGS = [
    AttentionConfig(quant="none", tile=(2, 4, 4)),
    AttentionConfig(quant="none", tile=(5, 9, 3), window=(1, 1, 1)),  # 135 tokens: two blocks, one of 7
    AttentionConfig(quant="none", tile=(4, 8, 8), window=(1, 1, 1)),  # ragged tiles of two blocks and of one
    AttentionConfig(quant="none", tile=(2, 3, 3), window=(1, 1, 9), border="truncate"),
    AttentionConfig(quant="none", tile=(2, 3, 3), window=((1, 1, 3), (3, 3, 1)), border="clamp"),
    AttentionConfig(quant="none", tile=(8, 8, 2), window=(1, 1, 3)),  # a full tile would have no padding
]


def seen_by_rows(mask, sample, h):
    """bool [rows, rows]: the pairs that a compiled kernel attends, read from the BlockMask as it does."""
    n = mask.shape[-1]
    index = torch.arange(n)
    by_row = mask.mask_mod(sample, h, index[:, None], index[None, :]).expand(n, n)
    seen = torch.zeros(n, n, dtype=torch.bool)
    for full, count, blocks in (
        (False, mask.kv_num_blocks, mask.kv_indices),
        (True, mask.full_kv_num_blocks, mask.full_kv_indices),
    ):
        for q in range(count.shape[2]):
            listed = blocks[0, h, q, : count[0, h, q]].tolist()
            assert listed == sorted(set(listed)), "ascending, once"
            for kv in listed:
                block = slice(128 * q, 128 * q + 128), slice(128 * kv, 128 * kv + 128)
                seen[block] = True if full else by_row[block]
    return seen


def in_given_order(seen, rows):
    """bool [L, L], in the order of tokens, from bool [rows, rows]."""
    token = rows[rows >= 0]
    out = torch.zeros(len(token), len(token), dtype=torch.bool)
    out[token[:, None], token[None, :]] = seen[rows >= 0][:, rows >= 0]
    return out


@pytest.mark.parametrize("config", [*CONFIGS, AttentionConfig(tile=(4, 4, 8), window=(1, 3, 1))])
def test_block_mask_holds_the_attended_pairs_and_no_others(config):
    """A compiled kernel attends full blocks whole, and masks partial ones by the mask function."""
    grid = (8, 12, 8) if config.tile == (4, 4, 8) else GRID
    resolved = config.resolve(grid, 2)
    mask = flex.block_mask(resolved, torch.device("cpu"), compiled=True)
    rows = resolved.geometry.slot_tokens.flatten()
    for h, window in enumerate(resolved.windows):
        seen = seen_by_rows(mask, 0, h)
        assert in_given_order(seen, rows).equal(brute.token_mask(grid, resolved.tile, window, config.border))
        assert not seen[:, rows < 0].any(), "no padding is attended"
        listed = int(mask.kv_num_blocks[0, h].sum() + mask.full_kv_num_blocks[0, h].sum())
        blocks = (-(-resolved.geometry.valid // 128)).tolist()
        tiles = brute.tile_mask(grid, resolved.tile, window, config.border)
        assert listed == sum(blocks[q] * blocks[k] for q, k in tiles.nonzero().tolist()), "nor visited"


def test_blocks_without_padding_are_full():
    resolved = AttentionConfig(tile=(4, 4, 8), window=(1, 3, 1)).resolve((8, 12, 8), 1)
    mask = flex.block_mask(resolved, torch.device("cpu"), compiled=True)
    assert not mask.kv_num_blocks.any()
    assert mask.full_kv_num_blocks.tolist() == [[[3] * 6]]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("config", CONFIGS)
def test_flex_is_exact_attention(config, layout):
    generator = torch.Generator().manual_seed(0)
    shape = (2, 315, 2, 16) if layout == "NHD" else (2, 2, 315, 16)
    q, k, v = (torch.randn(shape, generator=generator) for _ in range(3))
    out, lse = flex.flex_attention(q, k, v, config.resolve(GRID, 2), 0.3, layout)
    expected, expected_lse = exact_attention(
        q, k, v, grid=GRID, config=config, scale=0.3, tensor_layout=layout
    )
    assert out.shape == q.shape
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)


TEXT = pytest.mark.parametrize("case", text_cases.TEXT_CASES.values(), ids=text_cases.TEXT_CASES.keys())


@TEXT
def test_block_mask_of_text_tokens(case):
    """For every sample, the pairs are those that the case lists query by query."""
    resolved = case.config("none").resolve(case.grid, case.heads, case.prefix_len, case.suffix_len)
    rows = resolved.geometry.slot_tokens.flatten()
    valid = valid_tokens(resolved.geometry, *case.counts().values())
    mask = flex.block_mask(resolved, torch.device("cpu"), True, valid is not None)
    if valid is not None:
        mask = flex._of_valid(mask, valid[:, rows.clamp(min=0)])
    for sample in range(case.batch):
        for h in range(len(resolved.windows)):
            seen = seen_by_rows(mask, sample, h)
            pairs = in_given_order(seen, rows)
            own = case.valid(sample)  # what an invalid query sees is cleared afterwards
            assert pairs[own].equal(case.attended(sample, h)[own])
            assert not pairs[:, ~own].any() and not seen[:, rows < 0].any()


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@TEXT
def test_flex_of_text_tokens_is_exact_attention(case):
    qkv = case.make_qkv(dtype=torch.float32)
    resolved = case.config("none").resolve(case.grid, case.heads, case.prefix_len, case.suffix_len)
    out, lse = flex.flex_attention(*qkv, resolved, case.scale or 0.25, case.layout, *case.counts().values())
    expected, expected_lse = text_cases.exact(case, *qkv)
    assert out.shape == qkv[0].shape and lse.dtype == torch.float32
    torch.testing.assert_close(to_nhd(out, case.layout).double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)


def test_empty_grid():
    q = torch.zeros(2, 0, 3, 16)
    resolved = AttentionConfig(quant="none").resolve((0, 4, 4), 3)
    out, lse = flex.flex_attention(q, q, q, resolved, 1.0, "NHD")
    assert (out.shape, lse.shape, lse.dtype) == (q.shape, (2, 3, 0), torch.float32)


class Stats(NamedTuple):
    lse: torch.Tensor


def test_kinds_of_calls_beyond_torchs_limit(monkeypatch):
    """torch stops compiling a function after 8 recompilations. A process may have more kinds of calls."""
    stub = SimpleNamespace(flex_attention=lambda q, k, v, **_: (q + k, Stats(v)), AuxRequest=lambda lse: None)
    counter = CompileCounter()
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda call, **options: compile_(call, backend=counter, **options))
    monkeypatch.setattr(flex, "torch_flex", stub)
    monkeypatch.setattr(flex, "_compiled", lru_cache(flex._compiled.__wrapped__))
    mask = SimpleNamespace(shape=())
    for rank in range(1, 13):
        x = torch.ones([2] * rank)
        out, _ = flex._run(x, x, x, mask, 0.5, True)
        assert torch.equal(out, x + x)
    assert counter.frame_count == 12
    flex._run(x, x, x, mask, 0.5, True)
    assert counter.frame_count == 12, "this kind was compiled before"
    # While the caller is compiled, it is part of the caller's graph.
    whole = compile_(lambda x: flex._run(x, x, x, mask, 0.5, True)[0] + 1, backend="eager", fullgraph=True)
    assert torch.equal(whole(x), 2 * x + 1) and counter.frame_count == 12


def test_torchs_limit_stays_as_it_is_while_we_compile(monkeypatch):
    """The limit belongs to the process or the thread, where others compile too."""
    limits = []

    def compile_(call, **_):
        limits.append(torch._dynamo.config.recompile_limit)
        return lambda *args: limits.append(torch._dynamo.config.recompile_limit)

    monkeypatch.setattr(torch, "compile", compile_)
    monkeypatch.setattr(flex, "_compiled", lru_cache(flex._compiled.__wrapped__))
    before = torch._dynamo.config.recompile_limit
    x = torch.ones(3)
    flex._run(x, x, x, SimpleNamespace(shape=()), 0.5, True)
    assert limits == [before, before]


# The cache of masks


class Kept:
    """A cache for 10 bytes of stand-ins for GPU tensors. The test sets the current stream and whether it captures."""

    def __init__(self, monkeypatch):
        self.stream, self.capturing, self.recorded, self.made = "a", False, [], []
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self.stream)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)
        self.cache = Cache(10)

    def make(self, name, device):
        self.made.append(name)
        tensor = SimpleNamespace(nbytes=4, record_stream=lambda stream: self.recorded.append((name, stream)))
        return name, (tensor,)

    def get(self, name):
        return self.cache.get(self.make, name, torch.device("cuda", 0))


@pytest.fixture
def kept(monkeypatch):
    return Kept(monkeypatch)


def test_the_least_recently_used_goes(kept):
    for name in "xyxyxzxz":
        assert kept.get(name) == name
    assert kept.made == ["x", "y", "z"]
    kept.get("y")
    assert kept.made == ["x", "y", "z", "y"], "x was used after y"


def test_the_allocator_is_told_of_every_stream(kept):
    """Another stream may still read a dropped tensor."""
    kept.get("x")
    kept.stream = "b"
    kept.get("x")
    assert not kept.recorded
    kept.get("y")
    kept.get("z")
    assert sorted(kept.recorded) == [("x", "a"), ("x", "b")]


def test_what_a_graph_reads_is_never_dropped(kept):
    kept.get("x")
    kept.capturing = True
    kept.get("x")
    kept.capturing = False
    for name in "yzyz":
        kept.get(name)
    kept.get("x")
    assert kept.made.count("x") == 1 and not [name for name, _ in kept.recorded if name == "x"]


def test_nothing_is_made_for_a_graph(kept):
    kept.capturing = True
    with pytest.raises(RuntimeError, match="CUDA graph cannot capture; make the same call once before"):
        kept.get("x")
    assert not kept.made


def test_many_windows_are_made_once(monkeypatch):
    """Heads combine few windows in many ways. The cache once held four configs, and rebuilt all masks beyond that."""
    monkeypatch.setattr(flex, "_kept", Cache(2**30))
    windows = [(1, h, w) for h in (1, 3) for w in (1, 3, 5)]
    made = []
    build = flex._window_mask
    monkeypatch.setattr(
        flex, "_window_mask", lambda resolved, *rest: made.extend(resolved.windows) or build(resolved, *rest)
    )
    for _ in range(2):
        for pair in itertools.product(windows, windows):
            resolved = AttentionConfig(quant="none", tile=(5, 2, 1), window=pair).resolve(GRID, 2)
            mask = flex.block_mask(resolved, torch.device("cpu"), compiled=True)
            assert mask.kv_num_blocks.shape[1] == len(resolved.windows)
    assert sorted(made) == sorted(windows)


@pytest.mark.parametrize("mode", ["fake", "inference", "grad"])
def test_masks_are_of_no_mode(monkeypatch, mode):
    """The first call for a window may come in a mode whose tensors are unusable outside it."""
    monkeypatch.setattr(flex, "_kept", Cache(2**30))
    tile_geometry.cache_clear()
    resolved = AttentionConfig(quant="none", tile=(5, 2, 1), window=(1, 1, 3)).resolve(GRID, 1)
    made = []

    def make(x):
        mask = flex.block_mask(resolved, torch.device("cpu"), compiled=True)
        made.extend(
            [mask.kv_indices, mask.full_kv_num_blocks, *flex.permutation(resolved, torch.device("cpu"))]
        )
        return x.sum()

    if mode == "grad":
        torch.func.grad(make)(torch.ones(2))
    else:
        with FakeTensorMode() if mode == "fake" else torch.inference_mode():
            make(torch.ones(2))
    for x in made:
        assert type(x) is torch.Tensor and not x.is_inference()
        assert not torch._C._functorch.is_functorch_wrapped_tensor(x)


def test_small_tiles_of_a_long_video_are_refused():
    """With a tile for every token, lists of 75,600 x 75,600 blocks would take 90 GB."""
    resolved = AttentionConfig(quant="none", tile=(1, 1, 1), window=(3, 3, 3)).resolve((21, 45, 80), 1)
    with pytest.raises(
        ValueError, match=r"tile \(1, 1, 1\) .* 75,600 blocks .* 16,384.*larger tile, for example \(7, 9, 2"
    ):
        flex.block_mask(resolved, torch.device("cpu"), compiled=True)
