"""quant="none": what FlexAttention is told to compute, and on the CPU, uncompiled, what it computes."""

import builtins
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import brute
import extra_cases
from fpsattention import flex
from fpsattention.config import AttentionConfig
from fpsattention.reference import exact_attention, valid_tokens
from inputs import to_nhd

pytest.importorskip("torch.nn.attention.flex_attention", reason="torch >= 2.5")

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
    """bool [rows, rows]: what a compiled kernel makes of a BlockMask."""
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
    """bool [L, L] from bool [rows, rows]."""
    token = rows[rows >= 0]
    out = torch.zeros(len(token), len(token), dtype=torch.bool)
    out[token[:, None], token[None, :]] = seen[rows >= 0][:, rows >= 0]
    return out


@pytest.mark.parametrize("config", [*CONFIGS, AttentionConfig(tile=(4, 4, 8), window=(1, 3, 1))])
def test_block_mask_holds_the_attended_pairs_and_no_others(config):
    """Read as a compiled kernel reads it: full blocks whole, partial ones through the mask function."""
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


EXTRA = pytest.mark.parametrize("case", extra_cases.EXTRA_CASES.values(), ids=extra_cases.EXTRA_CASES.keys())


@EXTRA
def test_block_mask_of_extra_tokens(case):
    """For every sample the pairs that query by query attend each other."""
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
@EXTRA
def test_flex_of_extra_tokens_is_exact_attention(case):
    qkv = case.make_qkv(dtype=torch.float32)
    resolved = case.config("none").resolve(case.grid, case.heads, case.prefix_len, case.suffix_len)
    out, lse = flex.flex_attention(*qkv, resolved, case.scale or 0.25, case.layout, *case.counts().values())
    expected, expected_lse = extra_cases.exact(case, *qkv)
    assert out.shape == qkv[0].shape and lse.dtype == torch.float32
    torch.testing.assert_close(to_nhd(out, case.layout).double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)


def test_empty_grid():
    q = torch.zeros(2, 0, 3, 16)
    resolved = AttentionConfig(quant="none").resolve((0, 4, 4), 3)
    out, lse = flex.flex_attention(q, q, q, resolved, 1.0, "NHD")
    assert (out.shape, lse.shape, lse.dtype) == (q.shape, (2, 3, 0), torch.float32)


def test_old_torch_is_told(monkeypatch):
    real = builtins.__import__

    def without_flex(name, globals=None, locals=None, fromlist=(), level=0):
        if name == "torch.nn.attention" and "flex_attention" in fromlist:
            raise ImportError("no flex_attention")
        return real(name, globals, locals, fromlist, level)

    monkeypatch.setattr(builtins, "__import__", without_flex)
    with pytest.raises(RuntimeError, match=r'quant="none".*torch >= 2.5.*backend="reference"'):
        flex._module()


def test_kinds_of_calls_beyond_torchs_limit(monkeypatch):
    """torch gives up on a function after 8 recompilations, which a process's calls of all kinds soon are."""
    stub = SimpleNamespace(flex_attention=lambda q, k, v, **_: (q + k, v))
    counter = CompileCounter()
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda call, **options: compile_(call, backend=counter, **options))
    monkeypatch.setattr(flex, "_module", lambda: stub)
    kernel = flex._kernel.__wrapped__(True)
    for rank in range(1, 13):
        x = torch.ones([2] * rank)
        out, _ = kernel(x, x, x, None, 0.5)
        assert torch.equal(out, x + x)
    assert counter.frame_count == 12
    # In a graph of the caller's it is part of that.
    whole = compile_(lambda x: kernel(x, x, x, None, 0.5)[0] + 1, backend="eager", fullgraph=True)
    assert torch.equal(whole(x), 2 * x + 1) and counter.frame_count == 12
