"""The kernels' own sources, run on the CPU by the emulator of tests/emulator, against the executable contract.

No GPU is needed. What this sees: indices, layouts, descriptors, masks, roundings, and whether every wait is there,
under random schedules. What it cannot see: time, memory ordering, and how the tensor core rounds its sums.
"""

from __future__ import annotations

import ctypes
import importlib.util
import math
import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import pytest
import torch

import packed
from emulator import build
from fpsattention import AttentionConfig, KeyTiles, norm_rope, reference
from fpsattention.core import api, line, ops
from fpsattention.core.key_tiles import tensors_of
from inputs import make_qkv
from prologue_cases import as_norm_rope, inputs, of_one
from tensor_core import tensor_core
from test_quantize_gpu import GRIDS

# Relative RMS. out and lse are compared with the contract as it stands, and with the contract with the kernel's scores
# (`tensor_core`). There, as in the gradients, few sums may fall to the other side of a rounding boundary, because
# sums have another order.
LIMITS = {
    "out": 4e-3,
    "lse": 2e-5,
    "dq": 4e-3,
    "dk": 4e-3,
    "dv": 4e-3,
    "out of contract": 2e-2,
    "lse of contract": 1e-3,
}
# Scores are far from zero: their rounding to fp16 moves a code by a third on average.
FAR_SCORES = {"out of contract": 5e-2}
# Besides, few keys count in a row, and dS is a small difference.
WIDE_SCORES = FAR_SCORES | {"dq": 2e-2, "dk": 2e-2, "dv": 1e-2}


@dataclass(frozen=True)
class Case:
    """One call, and how it is scheduled: CTAs at a time, wgmmas early or late. `text` and `counts` are the lengths of
    prefix and suffix, and how many of each are valid in a sample. `scores` are "random", "wide" (thousands), "growing"
    from key block to key block, or "negative", all of them. `not_finite` is a number in one element of q (0), k or v.
    `limits` override `LIMITS`. `lists`: there are random lists of key tiles, for so many samples and heads;
    `density` is theirs.
    """

    grid: tuple[int, int, int]
    config: AttentionConfig
    head_dim: int = 64
    batch: int = 1
    heads: int = 1
    dtype: torch.dtype = torch.bfloat16
    tensor_layout: str = "NHD"
    deterministic: bool = False
    ctas: int = 3
    eager: bool = False
    scores: str = "random"
    not_finite: tuple[int, float] | None = None
    limits: Mapping[str, float] = field(default_factory=dict)
    text: tuple[int, int] = (0, 0)
    counts: tuple[tuple[int, ...] | None, tuple[int, ...] | None] = (None, None)
    lists: tuple[int, int] | None = None
    density: float = 0.5


CASES = {
    "one tile": Case((4, 8, 8), AttentionConfig(tile=(4, 8, 8)), heads=2, head_dim=128),
    "ragged": Case((5, 9, 9), AttentionConfig(tile=(3, 5, 8)), deterministic=True, ctas=4),
    "window": Case(
        (5, 7, 9), AttentionConfig(tile=(2, 3, 4), window=(1, 3, 3)), dtype=torch.float16, batch=2, eager=True
    ),
    "truncate, a window per head": Case(
        (5, 7, 9),
        AttentionConfig(tile=(3, 4, 5), window=((1, 1, 1), (2, 2, 2)), border="truncate"),
        heads=2,
        head_dim=128,
        dtype=torch.float16,
        tensor_layout="HND",
        deterministic=True,
        ctas=5,
    ),
    "clamp, a window per head": Case(
        (6, 6, 15),
        AttentionConfig(tile=(3, 6, 5), window=((1, 1, 3), (2, 1, 1)), smooth_k=True),
        heads=2,
        tensor_layout="HND",
        ctas=1,
    ),
    "a line, without a grid": Case((1, 1, 257), line.on_line(AttentionConfig()), head_dim=128, batch=2),
    "smooth_k, quant_tile": Case(
        (5, 7, 9),
        AttentionConfig(tile=(2, 3, 4), quant_tile=(4, 6, 8), smooth_k=True),
        dtype=torch.float16,
        deterministic=True,
    ),
    "text tokens": Case(
        (5, 7, 9), AttentionConfig(tile=(2, 3, 4), window=(1, 3, 3)), head_dim=128, text=(70, 200), ctas=4
    ),
    "text tokens, some invalid": Case(
        (5, 7, 9),
        AttentionConfig(tile=(2, 3, 4), window=((1, 1, 3), (3, 3, 3)), quant_tile=(4, 6, 8), smooth_k=True),
        batch=2,
        heads=2,
        tensor_layout="HND",
        deterministic=True,
        eager=True,
        text=(140, 130),
        counts=((129, 3), (0, 130)),
    ),
    "text tokens alone": Case((0, 4, 4), AttentionConfig(tile=(2, 4, 4)), text=(90, 150), deterministic=True),
    "several blocks to a tile": Case(
        (5, 8, 8), AttentionConfig(tile=(5, 8, 6)), head_dim=128, deterministic=True, eager=True
    ),
    # A tile group has three tiles, of two query blocks each.
    "three blocks to an item": Case((4, 6, 15), AttentionConfig(tile=(4, 6, 5)), heads=2, ctas=2),
    "three blocks to an item, text": Case(
        (4, 6, 15), AttentionConfig(tile=(2, 6, 5), window=(1, 3, 3)), text=(150, 30), eager=True
    ),
    "wide scores": Case(
        (5, 9, 9), AttentionConfig(tile=(3, 5, 8)), scores="wide", limits=WIDE_SCORES, ctas=2
    ),
    "wide scores, head_dim 128": Case(
        (5, 7, 9),
        AttentionConfig(tile=(2, 3, 4), window=(1, 3, 3)),
        head_dim=128,
        scores="wide",
        limits=WIDE_SCORES,
    ),
    "scores that grow": Case((5, 9, 9), AttentionConfig(tile=(3, 5, 8)), scores="growing", ctas=2),
    "negative scores": Case(
        (5, 9, 9), AttentionConfig(tile=(3, 5, 8)), head_dim=128, scores="negative", limits=FAR_SCORES
    ),
}


CASES |= {
    "lists": Case((5, 9, 9), AttentionConfig(tile=(2, 3, 4)), head_dim=128, batch=2, heads=2, lists=(2, 2)),
    "lists, in turns": Case(
        (5, 9, 9),
        AttentionConfig(tile=(2, 3, 4)),
        heads=2,
        dtype=torch.float16,
        tensor_layout="HND",
        deterministic=True,
        ctas=8,
        lists=(1, 2),
    ),
    "lists of several blocks to a tile, smooth_k": Case(
        (5, 8, 28),
        AttentionConfig(tile=(5, 8, 6), smooth_k=True),
        batch=2,
        deterministic=True,
        eager=True,
        lists=(1, 1),
    ),
    "lists, three blocks to an item": Case(
        (8, 6, 15), AttentionConfig(tile=(4, 8, 5), quant_tile=(8, 8, 5)), heads=3, ctas=2, lists=(1, 3)
    ),
    "lists and text tokens": Case(
        (5, 7, 9),
        AttentionConfig(tile=(2, 3, 4)),
        head_dim=128,
        batch=2,
        heads=2,
        deterministic=True,
        text=(140, 130),
        counts=((129, 0), (7, 0)),
        lists=(2, 1),
    ),
    "lists longer than a warp": Case(
        (2, 8, 5), AttentionConfig(tile=(1, 2, 1)), ctas=4, lists=(1, 1), density=0.95
    ),
}


def random_lists(case: Case, generator: torch.Generator) -> KeyTiles | None:
    """Random lists. The first tile attends none, and none attends the last."""
    if case.lists is None:
        return None
    n = case.config.resolve(case.grid, case.heads).geometry.n_video_tiles
    mask = torch.rand(*case.lists, n, n, generator=generator) < case.density
    mask[..., 0, :] = mask[..., -1] = False
    return KeyTiles.of_mask(mask)


def load(path):
    """The compiled module, under a name of its own: the real `_C` stays where it is, and so do other builds."""
    spec = importlib.util.spec_from_file_location(f"{path.parent.name}._C", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def emulated(tmp_path_factory):
    """Path of the emulated module."""
    try:
        return build.build(tmp_path_factory.mktemp("emulated"), list(MUTATIONS.values()))
    except build.MissingTool as missing:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"the kernels cannot be compiled for the CPU: {missing}")


@pytest.fixture
def on_cpu(monkeypatch):
    """Lets the host code of ops.py take tensors of the CPU; memory that it leaves uninitialised holds NaN."""
    monkeypatch.setattr(ops, "_launch", lambda kernels, name, params, device: kernels(params, 0, 0))

    def poisoned(allocate):
        def wrapper(*args, **kwargs):
            x = allocate(*args, **kwargs)
            ctypes.memset(x.data_ptr(), 0xFF, x.numel() * x.element_size())
            return x

        return wrapper

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))


def call_of(q, config, grid, scale, tensor_layout, prefix_len=0, suffix_len=0) -> ops.Call:
    """A new one, whose parameters belong to the module that is loaded."""
    batch, second, third, head_dim = q.shape
    heads = third if tensor_layout == "NHD" else second
    sizes = batch, heads, head_dim, q.dtype, scale, tensor_layout
    return ops.call_of.__wrapped__(config, grid, prefix_len, suffix_len, *sizes)


def run(
    path, case: Case, seed: int, schedule: int, monkeypatch, mutation: int = 0
) -> tuple[ops.Call, torch.Tensor, list[torch.Tensor], tuple, dict]:
    """The call, its packed operands and every result for random tensors of this seed, and what the contract's functions
    take for the same call.
    """
    monkeypatch.setattr(ops, "_C", load(path))
    configure = ctypes.CDLL(str(path)).emulator_configure
    configure(case.ctas, case.eager, ctypes.c_uint64(schedule), mutation)

    generator = torch.Generator().manual_seed(seed)
    tokens, heads = math.prod(case.grid) + sum(case.text), case.heads
    shape = (tokens, heads) if case.tensor_layout == "NHD" else (heads, tokens)
    shape = (case.batch, *shape, case.head_dim)
    q, k, v, dout = (torch.randn(shape, generator=generator) for _ in range(4))
    if case.scores == "wide":
        q, k = 30 * q, 30 * k
    elif case.scores == "growing":
        token = torch.linspace(0.1, 60, tokens)
        k *= token[:, None, None] if case.tensor_layout == "NHD" else token[:, None]
    elif case.scores == "negative":
        q, k = q + 3, k - 3
    if case.config.smooth_k:
        k += 2 * torch.randn(case.head_dim, generator=generator)
    q, k, v, dout = (x.to(case.dtype) for x in (q, k, v, dout))
    if case.not_finite is not None:
        operand, value = case.not_finite
        (q, k, v)[operand].view(case.batch, -1, case.head_dim)[0, tokens * heads // 2, 7] = value
    dlse = torch.randn(case.batch, heads, tokens, generator=generator)
    scale = case.head_dim**-0.5

    counts = [None if x is None else torch.tensor(x, dtype=torch.int32) for x in case.counts]
    text = (*case.text, *counts)
    call = call_of(q, case.config, case.grid, scale, case.tensor_layout, *case.text)
    key_tiles = random_lists(case, generator)
    counts += tensors_of(key_tiles)
    out, lse, operands = ops.launch_attention(call, q, k, v, *counts)
    gradients = ops.launch_backward(call, dout, dlse, out, lse, operands, *counts, case.deterministic)
    about = dict(grid=case.grid, config=case.config, scale=scale, tensor_layout=case.tensor_layout)
    about |= dict(zip(("prefix_len", "suffix_len", "prefix_valid", "suffix_valid"), text, strict=True))
    about |= {} if key_tiles is None else {"key_tiles": key_tiles}
    return call, operands, [out, lse, *gradients], (q, k, v, dout, dlse), about


def check_packed(call, operands, q, k, v, about) -> None:
    counts = about["prefix_valid"], about["suffix_valid"]
    expected = reference.quantize(q, k, v, call.resolved, about["tensor_layout"], *counts)
    packed.check(call, operands, expected, reference.valid_tokens(call.resolved.geometry, *counts))


def relative(x: torch.Tensor, right: torch.Tensor) -> float:
    """Relative RMS distance; infinite if x is not finite. Both are -inf where there is no result: the lse of invalid
    tokens.
    """
    none = right == -math.inf
    assert (x[none] == -math.inf).all()
    x, right = x.masked_fill(none, 0.0), right.masked_fill(none, 0.0)
    distance = (x.double() - right.double()).norm() / right.double().norm()
    return distance.item() if x.isfinite().all() else math.inf


def errors(path, case: Case, seed: int, monkeypatch, mutation: int = 0) -> dict[str, float]:
    """Relative RMS distance of every result from the contract with the kernel's scores, as `LIMITS` names them."""
    call, operands, results, (q, k, v, dout, dlse), about = run(path, case, seed, seed, monkeypatch, mutation)
    out, lse = results[:2]
    if not case.config.smooth_k:  # or the order of the mean's sum moves codes
        check_packed(call, operands, q, k, v, about)
    contract = reference.emulated_attention(q, k, v, **about)
    with tensor_core():
        forward = reference.emulated_attention(q, k, v, **about)
        backward = reference.emulated_backward(q, k, v, out, lse, dout, dlse, **about)
    pairs = zip((*results, out, lse), (*forward, *backward, *contract), strict=True)
    return {name: relative(*pair) for name, pair in zip(LIMITS, pairs, strict=True)}


def depends_on_schedule(path, case: Case, monkeypatch, mutation: int = 0) -> bool:
    """Whether some result has other bits when CTAs, threads and copies run in another order."""
    first, *others = (run(path, case, 3, schedule, monkeypatch, mutation)[2] for schedule in range(4))
    return not all(torch.equal(x, y) for other in others for x, y in zip(first, other, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_kernels_keep_the_contract(name, emulated, on_cpu, monkeypatch, seed):
    found, limits = errors(emulated, CASES[name], seed, monkeypatch), LIMITS | CASES[name].limits
    assert all(found[x] <= limits[x] for x in limits), found


def attend_two_blocks(path, monkeypatch, q, k, v):
    """(out, gradients for a dout of ones, out and lse of the contract) of 256 tokens in two key blocks."""
    monkeypatch.setattr(ops, "_C", load(path))
    about = {"grid": (1, 1, 256), "config": AttentionConfig(tile=(1, 1, 128))}
    scale = q.shape[3] ** -0.5
    call = call_of(q, about["config"], about["grid"], scale, "NHD")
    out, lse, operands = ops.launch_attention(call, q, k, v, None, None, None, None)
    dlse = torch.zeros_like(lse)
    gradients = ops.launch_backward(call, torch.ones_like(out), dlse, out, lse, operands, *[None] * 4, False)
    return (out, lse), gradients, reference.emulated_attention(q, k, v, **about, scale=scale)


def test_scores_of_ten_millions(emulated, on_cpu, monkeypatch, seed):
    """fp32 no longer holds eight times a score exactly, and yet no code may pass the largest."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, 256, 1, 64, generator=generator) for _ in range(3))
    q, k, v = (x.bfloat16() for x in (1300 * (1 + 0.1 * q), 1300 * (1 + 0.1 * k), v))
    (out, lse), gradients, (_, want_lse) = attend_two_blocks(emulated, monkeypatch, q, k, v)
    assert all(x.isfinite().all() for x in (out, lse, *gradients))
    assert out.abs().max() <= 1.1 * v.abs().max()
    assert relative(lse, want_lse) < 1e-3


def test_a_block_of_little_weight_and_large_values_counts(emulated, on_cpu, monkeypatch):
    q, k, v = (torch.ones(1, 256, 1, 64, dtype=torch.bfloat16) for _ in range(3))
    k[:, :128] = 0.0
    k[:, 128:] = -8.25  # a score of -66: 95 octaves below
    v[:, 128:] = 1e38
    (out, _), _, (want, _) = attend_two_blocks(emulated, monkeypatch, q, k, v)
    assert want.float().mean() > 1e9
    assert relative(out, want) < 0.01


@pytest.mark.parametrize(("of_q", "of_k"), [(2.384765625, 4.13671875), (6.46875, 8.328125)])
def test_forward_and_backward_round_one_factor(of_q, of_k, emulated, on_cpu, monkeypatch):
    """The product of these scales is next to a tie of fp16: multiplied in another order it falls to its other side, and
    the sum of a row's probabilities in the backward would be 1.1 or more.
    """
    q, k, v = (torch.full((1, 256, 1, 128), x, dtype=torch.float16) for x in (of_q, of_k, 1.0))
    _, (_, _, dv), _ = attend_two_blocks(emulated, monkeypatch, q, k, v)
    torch.testing.assert_close(dv.float(), torch.ones_like(dv, dtype=torch.float32), rtol=0.01, atol=0)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("name", GRIDS)
def test_packed_blocks(name, head_dim, emulated, on_cpu, monkeypatch, seed):
    """Bit for bit, as on a GPU."""
    monkeypatch.setattr(ops, "_C", load(emulated))
    grid, tile, quant_tile = GRIDS[name]
    dtype, tensor_layout = (torch.bfloat16, "NHD") if head_dim == 64 else (torch.float16, "HND")
    about = {"grid": grid, "tile": tile, "head_dim": head_dim, "dtype": dtype, "tensor_layout": tensor_layout}
    q, k, v = make_qkv("gaussian", **about, batch=2, seed=seed, device="cpu")
    call = call_of(q, AttentionConfig(tile=tile, quant_tile=quant_tile), grid, 0.1, tensor_layout)
    operands = ops.launch_quantize(call, q, k, v, None, None)
    packed.check(call, operands, reference.quantize(q, k, v, call.resolved, tensor_layout))


@pytest.mark.parametrize("quant_tile", [None, (4, 6, 8)], ids=["tile", "brick"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_packed_blocks_of_what_is_not_finite(dtype, value, quant_tile, emulated, on_cpu, monkeypatch, seed):
    monkeypatch.setattr(ops, "_C", load(emulated))
    grid, tile = (5, 7, 9), (2, 3, 4)
    qkv = make_qkv("gaussian", grid=grid, tile=tile, batch=2, dtype=dtype, seed=seed, device="cpu")
    for operand, x in enumerate(qkv):
        x[1, 100 * operand + 5, 0, 3] = x[0, -1, 1, 40] = value
    call = call_of(qkv[0], AttentionConfig(tile=tile, quant_tile=quant_tile), grid, 0.1, "NHD")
    operands = ops.launch_quantize(call, *qkv, None, None)
    packed.check(call, operands, reference.quantize(*qkv, call.resolved))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("operand", [0, 1, 2], ids=["q", "k", "v"])
def test_what_is_not_finite_reaches_those_that_attend_it(operand, value, emulated, on_cpu, monkeypatch):
    config = AttentionConfig(tile=(2, 3, 4), window=(1, 3, 3))
    case = Case((5, 7, 9), config, batch=2, heads=2, not_finite=(operand, value))
    call, operands, (out, lse, *_), (q, k, v, *_), about = run(emulated, case, 3, 3, monkeypatch)
    check_packed(call, operands, q, k, v, about)
    want_out, want_lse = reference.emulated_attention(q, k, v, **about)
    assert 0 < want_out.isfinite().float().mean() < 1
    assert torch.equal(out.isfinite(), want_out.isfinite())
    assert torch.equal(lse.isfinite(), want_lse.isfinite())
    assert operand == 2 or not lse.isfinite().all()


def test_items_have_two_and_three_query_blocks(emulated):
    """At head_dim 64, in the cases above."""
    module = load(emulated)
    found = set()
    for case in CASES.values():
        if case.head_dim == 64 and math.prod(case.grid):
            resolved = case.config.resolve(case.grid, case.heads, *case.text)
            rule = module.TileGrid(case.grid, resolved.tile)
            tiles = math.prod(rule.tile_group(list(resolved.windows)))
            found.add(module.blocks_per_item(64, tiles * resolved.geometry.slot // module.QUERY_BLOCK))
    assert found == {2, 3}


@pytest.mark.parametrize("name", ["text tokens, some invalid", "smooth_k, quant_tile"])
def test_eager_calls_launch_what_the_ops_do(name, emulated, on_cpu, monkeypatch):
    """`attention` and `quantize_qkv` go past the ops where nothing watches: the same bits, by the same arguments."""
    case = CASES[name]
    _, _, (want, want_lse, *_), (q, k, v, *_), about = run(emulated, case, 3, 3, monkeypatch)
    monkeypatch.setattr(api, "backend_for", lambda *_: ("sm90", "it is pretended"))
    monkeypatch.setattr(ops, "call_of", ops.call_of.__wrapped__)  # parameters of the module that is loaded
    out, lse = api.attention(q, k, v, **about, return_lse=True)
    assert torch.equal(out, want) and torch.equal(lse, want_lse)
    assert torch.equal(api.attention(q, k, v, **about), want)
    quantized = api.quantize_qkv(q, k, v, **about)
    for _ in range(2):  # the second call has a work counter of its own, too
        out, lse = api.attention(quantized, return_lse=True)
        assert torch.equal(out, want) and torch.equal(lse, want_lse)
    assert torch.equal(api.attention(quantized), want)


@pytest.mark.parametrize(
    ("norm", "rope", "head_dim", "text", "text_norm"),
    [
        ("all heads", "axes", 128, (0, 0), False),
        ("all heads", "heads", 64, (0, 0), False),
        ("each head", "tokens", 128, (0, 9), True),
        ("layer", "tokens", 64, (5, 0), False),
        (None, "axes", 128, (5, 9), False),
    ],
)
def test_norm_and_rotation_ahead_of_rounding(
    emulated, on_cpu, monkeypatch, norm, rope, head_dim, text, text_norm, seed
):
    """The codes of Q and K are those of `norm_rope`, save a few that tip; V's are what they were."""
    monkeypatch.setattr(ops, "_C", load(emulated))
    monkeypatch.setattr(ops, "call_of", ops.call_of.__wrapped__)  # parameters of the module that is loaded
    grid, config = (5, 7, 9), AttentionConfig(tile=(2, 3, 4))
    about = {"norm": norm, "rope": rope, "text": text, "text_norm": text_norm}
    (q, k, v), given = inputs(grid, 3, head_dim, seed=seed, dtype=torch.bfloat16, **about)
    valid = torch.tensor([text[1] - 2], dtype=torch.int32) if text[1] else None
    call = ops.call_of(config, grid, *text, 1, 3, head_dim, q.dtype, 0.1, "NHD")
    got = ops.launch_quantize(call, q, k, v, None, valid, as_norm_rope(given))
    q, k = (norm_rope(x, grid=grid, **of_one(given, n)) for n, x in (("q", q), ("k", k)))
    want = ops.launch_quantize(call, q, k, v, None, valid)
    monkeypatch.undo()
    got, want = (packed.decode(call, x) for x in (got, want))
    for a, b in zip(got, want, strict=True):
        assert (a - b).norm() <= 3e-3 * b.norm()
    assert torch.equal(got[2], want[2])


# Every CTA of the forward goes round its rings several times, and the last query block of some items is missing.
RING = Case((5, 9, 9), AttentionConfig(tile=(3, 5, 8)), ctas=2)
# In fp16, which shows more of the sums' last bits than bf16. Eight key blocks add to every dQ.
TURNS = Case(
    (5, 9, 9), AttentionConfig(tile=(3, 5, 8)), heads=2, dtype=torch.float16, deterministic=True, ctas=8
)


@pytest.mark.parametrize("case", [TURNS, CASES["lists, in turns"]], ids=["windows", "lists"])
def test_deterministic_gradients_do_not_depend_on_the_schedule(case, emulated, on_cpu, monkeypatch):
    assert not depends_on_schedule(emulated, case, monkeypatch)


def test_lists_of_a_window_are_the_window(emulated, on_cpu, monkeypatch):
    """The same bits, forward and backward in turns: the order of the keys is the same."""
    window = (1, 3, 3)
    case = replace(CASES["text tokens"], deterministic=True)
    _, _, expected, *_ = run(emulated, case, 3, 3, monkeypatch)
    lists = KeyTiles.of_window(case.grid, case.config.tile, window)
    monkeypatch.setattr(sys.modules[__name__], "random_lists", lambda *_: lists)
    _, _, found, *_ = run(
        emulated, replace(case, config=AttentionConfig(case.config.tile)), 3, 3, monkeypatch
    )
    for x, y in zip(found, expected, strict=True):
        assert torch.equal(x, y)


def test_every_byte_that_is_copied_is_written(emulated, on_cpu, monkeypatch):
    """What the kernels copy to shared memory is the same, whatever its memory held before. Here every block holds a
    token: the backward leaves the operands of the others alone, which nothing reads.
    """
    case = Case((3, 5, 8), AttentionConfig(tile=(3, 5, 8), smooth_k=True), heads=2)
    poisoned = torch.Tensor.new_empty

    def buffers(fill: int) -> list[torch.Tensor]:
        made = []

        def filled(*args, **kwargs):
            x = poisoned(*args, **kwargs)
            if x.dtype == torch.uint8:
                made.append(x.fill_(fill))
            return x

        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "new_empty", filled)
            run(emulated, case, 3, 3, patch)
        return made

    first, second = buffers(0xFF), buffers(0)
    assert len(first) == 2  # the packed operands; the scratch of the backward
    for x, y in zip(first, second, strict=True):
        assert torch.equal(x, y)


def test_launches_let_other_threads_run(emulated, on_cpu, monkeypatch):
    """A launch waits while the stream's queue is full; it must not hold the GIL then."""
    real, ran = load(emulated), dict.fromkeys(("quantize", "attn_fwd", "attn_bwd"), 0)

    def watched(name):
        def launch(*args):
            counting, counted = threading.Event(), threading.Event()
            thread = threading.Thread(target=lambda: (counting.wait(), counted.set()))
            thread.start()
            counting.set()
            getattr(real, name)(*args)
            ran[name] += counted.is_set()
            thread.join()

        return launch

    others = {name: getattr(real, name) for name in dir(real) if name not in ran}
    module = SimpleNamespace(**others, **{name: watched(name) for name in ran})
    monkeypatch.setitem(globals(), "load", lambda path: module)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000)  # Python itself takes the GIL from nobody meanwhile
    try:
        for attempt in range(20):  # the other thread may be slow to wake
            run(emulated, RING, attempt, attempt, monkeypatch)
            if all(ran.values()):
                return
    finally:
        sys.setswitchinterval(interval)
    pytest.fail(f"no other thread ran during a launch: {ran}")


@pytest.mark.parametrize(
    ("source", "error"),
    [
        ("*deferred.after_previous().turns = 0;", None),
        ("*deferred.params_.turns = 0;", "private"),
        ("*deferred.turns = 0;", "has no member named"),
    ],
)
def test_a_kernel_that_does_not_wait_for_the_one_before_does_not_compile(source, error, emulated, tmp_path):
    kernel = (
        f"__global__ void kernel(const __grid_constant__ Deferred<BackwardParams> deferred) {{ {source} }}\n"
    )
    path = tmp_path / "kernel.cpp"
    path.write_text(f'#include "fpsattention/launch.h"\nnamespace fps {{\n{kernel}}}\n')
    command = [*build.compiler(emulated.parent), "-fsyntax-only", str(path)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert (result.returncode == 0) == (error is None), result.stderr
    assert (error or "") in result.stderr


def test_only_kernels_that_wait_can_be_launched(emulated, tmp_path):
    path = tmp_path / "launch.cpp"
    path.write_text(
        '#include "fpsattention/launch.h"\nnamespace fps {\n'
        "__global__ void kernel(const __grid_constant__ BackwardParams p) {}\n"
        "void f(const BackwardParams &p) { launch(kernel, dim3(1), 32, 0, nullptr, p); }\n}\n"
    )
    command = [*build.compiler(emulated.parent), "-fsyntax-only", str(path)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode != 0 and "no matching function for call to" in result.stderr


# Faults of the kernels, each of which must be noticed. One build holds them all, and they stay asleep until a test
# wakes one. Text of a source, and what replaces it.
Q_EMPTY = "        smem.q_empty[before.stage()].arrive_as_warp();\n"
WIDENED = "        smem.ds_full.wait(0);\n"
DK = "    issue_dk(smem, queries, fragments, before);\n\n"
DS_DONE, FENCE = "    smem.ds_full.wait(buffer ^ 1);\n", "    fence_proxy_async();\n"
DQ = (
    "    if constexpr (Cfg::kKeysInRegisters) {\n"
    "        issue<typename Cfg::MmaDQ>"
    "(keys.k, queries.ds(_, _, _, buffer), fragments.dq, Sum::kFromZero);\n"
    "    } else {\n"
    "        issue<typename Cfg::MmaDQ>"
    "(queries.ds(_, _, _, buffer), keys.k, fragments.dq, Sum::kFromZero);\n"
    "    }\n"
)
DP_DONE = "    wait_for_products<1>(rdP);\n"
TO_DS = "    differentiate(rdP, rX, rA, rows, slope, k_mantissa);\n"
DS = "    store_ds<Cfg::kDqQueries>(smem.ds[ds_buffer], own.first, rA);\n"
STEP_DONE = "    smem.empty[s].arrive_as_warp();\n"
ONE_FOR_FOUR = "if (threadIdx.x % 128 == 0) {{\nfor (int i = 0; i < 4; ++i) {{\n{}.arrive();\n}}\n}}\n"
BACKWARD = {
    "S read while it is computed": {"    wait_for_products<1>(rS);\n": "    warpgroup_fence_operand(rS);\n"},
    "v read before all warps have widened it": {WIDENED: ""},
    "no zeros for the first step": {
        "    clear(fragments.a);\n": "    fill(fragments.a, BF16(1.0f));\n",
    },
    "dQ of dS that is not all there": {DS_DONE + FENCE: FENCE},
    "dQ of dS without a proxy fence": {DS_DONE + FENCE: DS_DONE},
    "one buffer of dS": {
        DQ: DQ.replace("buffer", "0"),
        DS: DS.replace("ds[ds_buffer]", "ds[0]"),
    },
    "dS in registers that dV reads": {
        TO_DS: TO_DS.replace("rX, rA", "rX, rX") + "    copy(rX, rA);\n",
    },
    "dK of queries that are not there": {
        "    smem.q_full[step.stage()].wait(step.full_parity());\n": "",
    },
    "queries released before dK has read them": {
        Q_EMPTY: "",
        DK: DK + "    if (!is_first) {\n" + Q_EMPTY + "    }\n",
    },
    "queries released by one warp for four": {Q_EMPTY: ONE_FOR_FOUR.format("smem.q_empty[before.stage()]")},
    "dO released before dV has read it": {
        DP_DONE: DP_DONE + STEP_DONE.lstrip(),
        STEP_DONE: "",
    },
    "rows released before minus_delta was read": {
        DP_DONE: DP_DONE.replace("<1>", "<0>") + STEP_DONE.lstrip(),
        STEP_DONE: "",
    },
    "dO released by one warp for four": {STEP_DONE: ONE_FOR_FOUR.format("smem.empty[s]")},
    "dQ handed over while the one before is read": {
        "    smem.dq_empty.wait(stage ^ 1);\n": "",
    },
    "dQ's buffer released before the copy engine has read it": {"            bulk_wait_read();\n": ""},
    "dQ added before it is there": {"        smem.dq_full[number].wait(ring.full_parity());\n": ""},
    "rows refilled without a proxy fence": {
        "        smem.empty[s].wait(ring.empty_parity());\n        fence_proxy_async();": (
            "        smem.empty[s].wait(ring.empty_parity());\n"
        ),
    },
    "dQ added without a proxy fence": {"            fence_proxy_async();\n": ""},
    "padding keys are not masked": {"valid < kBlock": "false"},
}
WAIT_FOR_TURN = "            wait_for(p.turns + query.index, turn.from);\n"
TAKE_TURN = WAIT_FOR_TURN + "            fence_proxy_async_global();\n"
TURNS_TAKEN = {
    "a key block adds without its turn": {TAKE_TURN: "            fence_proxy_async_global();\n"},
    "a turn taken without a proxy fence": {TAKE_TURN: WAIT_FOR_TURN},
    "key items in the order of blockIdx": {"atomicAdd(p.next_item, 1)": "int(blockIdx.x)"},
    "the turn is passed on before all is added": {"                bulk_wait();\n": ""},
}
FIRST_KEYS = (
    "        smem.full[ring.stage()].wait(ring.full_parity());\n"
    "        issue<MmaQK>(rQ, rK(_, _, _, ring.stage()), rS, Sum::kFromZero);\n"
)
KEYS = "            smem.full[after.stage()].wait(after.full_parity());\n"
PV, RELEASE, PACK = (
    "            wait_for_products<0>(rT);\n",
    "            smem.empty[ring.stage()].arrive_as_warp();\n",
    "            pack(rS, rP);\n",
)
LAST_PV = (
    "        wait_for_products<0>(rT);\n"
    "        smem.empty[ring.stage()].arrive_as_warp();\n"
    "        add(rO, row, rT, block);\n"
)
REFILL = "        smem.q_empty[ring.stage()].wait(ring.empty_parity());\n        fence_proxy_async();"
STORE = (
    "        store<Cfg, T>(p, task.item, task.queries[warpgroup], rO, row);\n"
    "        smem.q_empty[q_stage].arrive_as_warp();\n"
)
FORWARD = {
    "the first S read while it is computed": {
        "        wait_for_products<0>(rS);\n": "        warpgroup_fence_operand(rS);\n"
    },
    "S read while it is computed": {
        "            wait_for_products<1>(rS);\n": "            warpgroup_fence_operand(rS);\n"
    },
    "T read while it is computed": {LAST_PV: "".join(LAST_PV.splitlines(keepends=True)[1:])},
    "P replaced while PV reads it": {PV + RELEASE + PACK: PACK + PV + RELEASE},
    "keys read before they are there": {FIRST_KEYS: FIRST_KEYS.splitlines(keepends=True)[1], KEYS: ""},
    "keys waited for with the parity of the lap before": {
        FIRST_KEYS: FIRST_KEYS.replace("full_parity", "empty_parity"),
        KEYS: KEYS.replace("full_parity", "empty_parity"),
    },
    "a stage released before PV has read it": {PV + RELEASE + PACK: RELEASE + PV + PACK},
    "a stage released by one warp for four": {
        PV + RELEASE + PACK: PV + ONE_FOR_FOUR.format("smem.empty[ring.stage()]") + PACK
    },
    "the last stage released before PV has read it": {
        LAST_PV: "".join(LAST_PV.splitlines(keepends=True)[i] for i in (1, 0, 2))
    },
    "a stage filled while it is read": {
        "            smem.empty[ring.stage()].wait(ring.empty_parity());\n": ""
    },
    "a stage released before it is filled": {
        "        smem.full[ring.stage()].wait(ring.full_parity());\n"
        "        smem.empty[ring.stage()].arrive_as_warp();\n": (
            "        smem.empty[ring.stage()].arrive_as_warp();\n"
        ),
    },
    "keys refilled without a proxy fence": {"                fence_proxy_async();": ""},
    "queries refilled without a proxy fence": {REFILL: REFILL.splitlines(keepends=True)[0]},
    "the bytes of keys not waited for": {
        "                full.expect(kBytes);\n                full.arrive();\n": "                full.arrive();\n"
    },
    "the bytes of queries not waited for": {"                    full.expect(kBytes);\n": ""},
    "queries replaced while they are read": {REFILL: REFILL.splitlines(keepends=True)[1]},
    "queries released before they are read": {
        "        clear(rO);\n": "        clear(rO);\n        smem.q_empty[q_stage].arrive_as_warp();\n",
        STORE: STORE.splitlines(keepends=True)[0],
    },
    "mbarriers that the copy engine may not know": {"        fence_barrier_init();\n": ""},
    "mbarriers used before they are there": {"    __syncthreads();\n": ""},
    "one row's factor for both": {"block.of_t[i / 2 % 2]": "block.of_t[0]"},
    "one row's maximum for both": {
        "upcast<__half>(maxima)": "float2{upcast<__half>(maxima).x, upcast<__half>(maxima).x}"
    },
    "V without its scale": {"(v_scale * kWithoutHeadroom)": "kWithoutHeadroom"},
    "the maximum of a lane for that of the row": {
        "    both = max_f16x2(both, __shfl_xor_sync(~0u, both, 1));\n": "    __shfl_xor_sync(~0u, both, 1);\n"
    },
    "P in the order of S": {"0x6420": "0x6240"},
}
# Faults that show only where scores are wide, or grow from key block to key block.
FORWARD_OF_WIDE = {
    "wide scores as they are": {"        subtract_maxima(words, maxima);\n": ""},
    "wide scores less the largest of another row": {"minus_top[i % 2]": "minus_top[0]"},
}
FORWARD_OF_GROWING = {
    "the reference stays": {"excess > kGrowth - kHeadroom": "false"},
    "O keeps its reference": {"        o(i) *= shrink[i / 2 % 2];\n": ""},
    "l keeps its reference": {"        row.l[r] *= shrink[r];\n": ""},
}
MAXIMA = "    if (threadIdx.x % 32 == 0) {\n        warp_max[threadIdx.x / 32] = of_warp;\n    }\n"
PADDED_TABLE = "smem.rows.fill(g, rows, 0, g.slot, kIsK, strides, batch, head)"
QUANTIZE = {
    "V read before it is transposed": {"    __syncthreads();\n\n": "\n"},
    "the largest of a tile before all warps have theirs": {
        MAXIMA + "    __syncthreads();\n": MAXIMA,
    },
    "padding counts as a token": {"tokens[permuted_token(threadIdx.x % 4, byte)] < 0": "false"},
    "padding of K is zero": {
        PADDED_TABLE: PADDED_TABLE.replace("kIsK", "false"),
    },
}
MUTATIONS = {
    (source, name): build.Mutation(source, replacements)
    for source, faults in (
        ("attn_fwd_sm90", FORWARD | FORWARD_OF_WIDE | FORWARD_OF_GROWING),
        ("attn_bwd_sm90", BACKWARD | TURNS_TAKEN),
        ("quantize", QUANTIZE),
    )
    for name, replacements in faults.items()
}


@pytest.mark.parametrize(("source", "name"), MUTATIONS)
def test_a_broken_kernel_is_noticed(source, name, emulated, on_cpu, monkeypatch):
    mutation = 1 + list(MUTATIONS).index((source, name))
    if name in TURNS_TAKEN:
        with suppress(RuntimeError):  # the emulator's own checks
            assert depends_on_schedule(emulated, TURNS, monkeypatch, mutation)
        return
    case = CASES["wide scores"] if name in FORWARD_OF_WIDE else RING
    case = CASES["scores that grow"] if name in FORWARD_OF_GROWING else case
    for seed in range(3, 33):  # a race need not be lost under every schedule
        try:
            found = errors(emulated, case, seed, monkeypatch, mutation)
        except (RuntimeError, AssertionError):  # of the emulator; of the packed blocks
            return
        limits = LIMITS | case.limits
        if any(not found[x] <= limits[x] for x in limits):
            return
    pytest.fail(f"not noticed under any schedule: {found}")
