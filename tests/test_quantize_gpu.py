"""The quantise kernel against `reference.quantize`: the same codes and scales, bit for bit."""

from __future__ import annotations

import math

import pytest
import torch

import fpsattention as fps
import packed
from fpsattention import _C, reference
from fpsattention.core import ops
from inputs import KINDS, make_qkv, poisoned

pytestmark = pytest.mark.gpu


def quantize(q, k, v, config, grid, tensor_layout="NHD"):
    """(call, packed operands); the operands are written into poisoned memory."""
    call = call_of(q, config, grid, tensor_layout)
    with poisoned():
        return call, ops.launch_quantize(call, q, k, v, None, None)


def call_of(q, config, grid, tensor_layout="NHD") -> ops.Call:
    batch, second, third, head_dim = q.shape
    heads = third if tensor_layout == "NHD" else second
    return ops.call_of(config, grid, 0, 0, batch, heads, head_dim, q.dtype, 0.125, tensor_layout)


def assert_bits(q, k, v, config, grid, tensor_layout="NHD"):
    call, operands = quantize(q, k, v, config, grid, tensor_layout)
    packed.check(call, operands, reference.quantize(q, k, v, call.resolved, tensor_layout))


GRIDS = {
    "even": ((6, 12, 8), (3, 6, 4), None),
    "slot 256, ragged": ((7, 13, 17), (6, 6, 6), None),
    "slot 384, ragged": ((7, 10, 18), (6, 8, 8), None),
    "slot 512, ragged": ((9, 12, 20), (8, 8, 8), None),
    "ragged to one token": ((4, 7, 11), (3, 3, 5), None),
    "brick": ((6, 12, 8), (3, 3, 4), (6, 6, 4)),
    "ragged brick": ((7, 11, 13), (2, 3, 4), (4, 9, 8)),
    "brick beyond the grid": ((7, 11, 13), (2, 3, 4), (20, 30, 40)),
    "tile beyond the grid": ((2, 9, 3), (4, 4, 8), None),
    "one token": ((1, 1, 1), (4, 4, 4), None),
}


@pytest.mark.parametrize("tensor_layout", ["NHD", "HND"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(("grid", "tile", "quant_tile"), GRIDS.values(), ids=GRIDS.keys())
def test_bits(grid, tile, quant_tile, head_dim, dtype, tensor_layout, seed):
    config = fps.AttentionConfig(tile=tile, quant_tile=quant_tile)
    qkv = make_qkv(
        "gaussian",
        grid=grid,
        tile=tile,
        batch=2,
        heads=3,
        head_dim=head_dim,
        dtype=dtype,
        tensor_layout=tensor_layout,
        seed=seed,
    )
    assert_bits(*qkv, config, grid, tensor_layout)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("kind", KINDS)
def test_bits_of_nasty_inputs(kind, dtype, seed):
    grid, config = (9, 12, 10), fps.AttentionConfig(tile=(3, 6, 4))
    qkv = make_qkv(kind, grid=grid, tile=config.tile, head_dim=128, dtype=dtype, seed=seed)
    assert_bits(*qkv, config, grid)


def test_bits_of_every_bfloat16(seed):
    """All finite bfloat16 values, in tiles of similar magnitude: ties, subnormals, and the least amax that is
    not rounded to zero, 2^-100.
    """
    every = torch.arange(0x7F80, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    grid, tile = (1, 1, 1024), (1, 1, 32)  # 32 tiles of 32 tokens of 64 channels, each value twice
    values = torch.cat([every, -every, every[: 65536 - 2 * len(every)]]).reshape(1, 1024, 1, 64).cuda()
    by_size = values.flatten()[values.flatten().abs().argsort(stable=True)].reshape(values.shape)
    shuffled = values.flatten()[torch.randperm(65536, generator=torch.Generator().manual_seed(seed)).cuda()]
    config = fps.AttentionConfig(tile=tile)
    assert_bits(by_size, by_size.flip(1).contiguous(), shuffled.reshape(values.shape), config, grid)


@pytest.mark.parametrize("quant_tile", [None, (4, 9, 8)], ids=["tile", "brick"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_what_is_not_finite_spreads_over_its_scale(dtype, value, quant_tile, seed):
    """One such value makes NaN of all that share its scale, of their padding too, and of nothing else."""
    grid, config = (7, 11, 13), fps.AttentionConfig(tile=(2, 3, 4), quant_tile=quant_tile)
    qkv = make_qkv("gaussian", grid=grid, tile=config.tile, batch=2, heads=2, dtype=dtype, seed=seed)
    for operand, x in enumerate(qkv):
        x[1, 100 * operand + 5, 0, 3] = value
        x[0, -1, 1, 40] = value
    assert_bits(*qkv, config, grid)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(("grid", "tile"), [((7, 11, 13), (3, 4, 5)), ((9, 12, 20), (8, 8, 8))])
def test_padding(grid, tile, head_dim):
    """Every input is 1, so every token has the codes of 14 in q and k, and of 448 in v. So has the padding of k. That
    of q and v must be zero: a stale NaN in a padding row of V would reach the output through a probability of zero.
    """
    ones = torch.ones(1, math.prod(grid), 2, head_dim, dtype=torch.bfloat16, device="cuda")
    call, operands = quantize(ones, ones, ones, fps.AttentionConfig(tile=tile), grid)
    x, slots = packed.blocks(call, operands), call.resolved.geometry.slot_tokens
    for name, rows, codes, value in (
        ("q", _C.QUERY_BLOCK, x.q, 14),
        ("k", _C.BLOCK, x.k, 14),
        ("v", _C.BLOCK, x.v, 448),
        ("is_token", _C.BLOCK, x.is_token[..., None], 1),
    ):
        holds = (slots >= 0).reshape(-1, rows, 1).to(codes.device)
        assert not holds.all(), "the case has padding"
        holds = holds.any(1, keepdim=True).expand_as(holds) if name == "k" else holds
        assert torch.equal(codes, (value * holds.float()).expand_as(codes)), name


@pytest.mark.parametrize("counts", [None, ((100, 3), (0, 130))], ids=["all", "some"])
def test_text_tokens(counts, seed):
    grid, config = (5, 7, 9), fps.AttentionConfig(tile=(2, 3, 4))
    generator = torch.Generator("cuda").manual_seed(seed)
    shape = (2, 140 + math.prod(grid) + 130, 2, 128)
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.bfloat16, device="cuda") for _ in range(3))
    given = (None, None)
    if counts is not None:
        given = [torch.tensor(x, dtype=torch.int32, device="cuda") for x in counts]
    call = ops.call_of(config, grid, 140, 130, 2, 2, 128, q.dtype, 0.125, "NHD")
    with poisoned():
        operands = ops.launch_quantize(call, q, k, v, *given)
    valid = reference.valid_tokens(call.resolved.geometry, *given)
    packed.check(call, operands, reference.quantize(q, k, v, call.resolved, "NHD", *given), valid)


@pytest.mark.parametrize("quant_tile", [None, (6, 8, 8)], ids=["tile", "brick"])
@pytest.mark.parametrize("tensor_layout", ["NHD", "HND"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_smooth_k(head_dim, dtype, tensor_layout, quant_tile, seed):
    """The mean is summed in another order than the reference's, so its last bits and the scale's may differ,
    and one code in a thousand, by one step. Q and V are not affected.
    """
    grid, tile = (7, 11, 13), (3, 4, 4)
    config = fps.AttentionConfig(tile=tile, quant_tile=quant_tile, smooth_k=True)
    q, k, v = make_qkv(
        "key_mean",
        grid=grid,
        tile=tile,
        batch=2,
        heads=3,
        head_dim=head_dim,
        dtype=dtype,
        tensor_layout=tensor_layout,
        seed=seed,
    )
    call, operands = quantize(q, k, v, config, grid, tensor_layout)
    expected = reference.quantize(q, k, v, call.resolved, tensor_layout)
    got_q, got_k, got_v = packed.decode(call, operands)
    assert torch.equal(got_q, expected.q.transpose(1, 2))
    assert torch.equal(got_v, expected.v.transpose(1, 2))

    want = expected.k.transpose(1, 2)
    step = expected.k_scale[:, :, expected.tile_of_token].transpose(1, 2)[..., None]
    error = (got_k - want).abs()
    assert (error <= want.abs() / 7.9 + 2.0**-8.9 * step).all(), "more than one code apart"
    assert (error > 1e-5 * want.abs()).float().mean() <= 1e-3

    heads_first = q.transpose(1, 2) if tensor_layout == "NHD" else q
    shift = 0.125 * (heads_first.double() * expected.k_mean[:, :, None].double()).sum(-1)
    assert shift.abs().max() > 1
    torch.testing.assert_close(
        packed.sections(call, operands).lse_shift.double(), shift, rtol=1e-4, atol=1e-4
    )


def test_layouts_give_the_same_codes(seed):
    grid, config = (7, 11, 13), fps.AttentionConfig(tile=(3, 4, 5), smooth_k=True)
    qkv = make_qkv("gaussian", grid=grid, tile=config.tile, batch=2, heads=3, seed=seed)
    nhd = quantize(*qkv, config, grid, "NHD")
    hnd = quantize(*(x.transpose(1, 2).contiguous() for x in qkv), config, grid, "HND")
    for a, b in zip(packed.decode(*nhd), packed.decode(*hnd), strict=True):
        assert torch.equal(a, b)


def test_same_codes_every_time(seed):
    """Sums and maxima over many blocks included: the mean of K, and bricks."""
    grid = (17, 45, 40)
    config = fps.AttentionConfig(tile=(7, 9, 2), quant_tile=(7, 9, 8), smooth_k=True)
    qkv = make_qkv("key_mean", grid=grid, tile=config.tile, head_dim=128, seed=seed)
    first = quantize(*qkv, config, grid)
    assert math.prod(grid) == packed.sections(*first).lse_shift.shape[2]
    for _ in range(4):
        again = quantize(*qkv, config, grid)
        for a, b in zip(packed.decode(*first), packed.decode(*again), strict=True):
            assert torch.equal(a, b)
