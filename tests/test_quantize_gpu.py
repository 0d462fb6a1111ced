"""The quantise kernel against `reference.quantize`: the same codes and scales, bit for bit."""

from __future__ import annotations

import math

import pytest
import torch

import fpsattention as fps
from fpsattention import _C, reference
from fpsattention.core import ops
from inputs import KINDS, make_qkv, poisoned

pytestmark = pytest.mark.gpu


def quantize(q, k, v, resolved, tensor_layout="NHD"):
    """(q_blocks, kv_blocks, v_amax, norms, lse_shift) out of poisoned memory."""
    with poisoned():
        return ops.quantize(q, k, v, resolved, 0.125, tensor_layout)


def decode(images, resolved, head_dim):
    """Dequantised q, k, v [B, L, H, D] of the images."""
    return ops.decode_blocks(*images[:3], resolved.grid, resolved.tile, head_dim)


def assert_bits(q, k, v, resolved, tensor_layout="NHD"):
    images = quantize(q, k, v, resolved, tensor_layout)
    expected = reference.quantize(q, k, v, resolved, tensor_layout)
    mine = decode(images, resolved, q.shape[-1])
    for name, got, want in zip("qkv", mine, (expected.q, expected.k, expected.v), strict=True):
        want = want.transpose(1, 2)
        wrong = (got != want).nonzero()
        first = tuple(wrong[0].tolist()) if len(wrong) else None
        assert first is None, (
            f"{name}: {len(wrong)} of {want.numel()} values differ, the first at [B, L, H, D] {first}: "
            f"{got[first].item():.9g}, reference {want[first].item():.9g}"
        )
    q, k, v = (reference.to_heads_first(x, tensor_layout).float() for x in (q, k, v))
    assert torch.equal(images[2], v.abs().amax(2))
    if expected.k_mean is not None:
        k = k - expected.k_mean[:, :, None]
    norms = torch.stack([x.norm(dim=-1).amax(-1) for x in (q, k)], -1)
    torch.testing.assert_close(images[3], norms, rtol=1e-5, atol=0)
    return images


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
    assert_bits(*qkv, config.resolve(grid, 3), tensor_layout)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("kind", KINDS)
def test_bits_of_nasty_inputs(kind, dtype, seed):
    grid, config = (9, 12, 10), fps.AttentionConfig(tile=(3, 6, 4))
    qkv = make_qkv(kind, grid=grid, tile=config.tile, head_dim=128, dtype=dtype, seed=seed)
    assert_bits(*qkv, config.resolve(grid, 2))


def test_bits_of_every_bfloat16(seed):
    """All finite bfloat16 values, in tiles of like magnitude: ties, subnormals, and the least amax that
    counts, 2^-100.
    """
    every = torch.arange(0x7F80, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    grid, tile = (1, 1, 1024), (1, 1, 32)  # 32 tiles of 32 tokens of 64 channels, each value twice
    values = torch.cat([every, -every, every[: 65536 - 2 * len(every)]]).reshape(1, 1024, 1, 64).cuda()
    by_size = values.flatten()[values.flatten().abs().argsort(stable=True)].reshape(values.shape)
    shuffled = values.flatten()[torch.randperm(65536, generator=torch.Generator().manual_seed(seed)).cuda()]
    resolved = fps.AttentionConfig(tile=tile).resolve(grid, 1)
    assert_bits(by_size, by_size.flip(1).contiguous(), shuffled.reshape(values.shape), resolved)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(("grid", "tile"), [((7, 11, 13), (3, 4, 5)), ((9, 12, 20), (8, 8, 8))])
def test_padding_rows_are_zero(grid, tile, head_dim):
    """Every input is 1, so every valid element has the code of 448, and the rest of an image must be zero: a
    stale NaN in a padding row of V would reach the output through a probability of zero.
    """
    code_of_448 = 0x7E
    resolved = fps.AttentionConfig(tile=tile).resolve(grid, 2)
    geometry = resolved.geometry
    ones = torch.ones(1, geometry.n_tokens, 2, head_dim, dtype=torch.bfloat16, device="cuda")
    q_blocks, kv_blocks, *_ = quantize(ones, ones, ones, resolved)
    image = _C.BLOCK * head_dim
    for operand, rows, codes in (
        ("q", _C.QUERY_BLOCK, q_blocks[..., : _C.QUERY_BLOCK * head_dim]),
        ("k", _C.BLOCK, kv_blocks[..., :image]),
        ("v", _C.BLOCK, kv_blocks[..., image : 2 * image]),
    ):
        valid = (geometry.slot_tokens >= 0).reshape(-1, rows).sum(1)
        assert (valid % rows != 0).any(), "the case has padding"
        for index in valid.nonzero()[:, 0].tolist():  # blocks of padding only are never read
            ones_found = (codes[:, :, index] == code_of_448).sum(-1)
            zeros_found = (codes[:, :, index] == 0).sum(-1)
            n = int(valid[index]) * head_dim
            assert (ones_found == n).all(), (
                f"{operand}, block {index}: {ones_found.tolist()} codes, {n} expected"
            )
            assert (zeros_found == rows * head_dim - n).all(), (
                f"{operand}, block {index}: padding is not zero"
            )


@pytest.mark.parametrize("quant_tile", [None, (6, 8, 8)], ids=["tile", "brick"])
@pytest.mark.parametrize("tensor_layout", ["NHD", "HND"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_smooth_k(head_dim, dtype, tensor_layout, quant_tile, seed):
    """The mean is summed in another order than the reference's, so its last bits, the scale's, and now and
    then a code may differ: by one step, in one value of a thousand. Q and V do not take part.
    """
    grid, tile = (7, 11, 13), (3, 4, 4)
    resolved = fps.AttentionConfig(tile=tile, quant_tile=quant_tile, smooth_k=True).resolve(grid, 3)
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
    images = quantize(q, k, v, resolved, tensor_layout)
    expected = reference.quantize(q, k, v, resolved, tensor_layout)
    got_q, got_k, got_v = decode(images, resolved, head_dim)
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
    torch.testing.assert_close(images[4].double(), shift, rtol=1e-4, atol=1e-4)


def test_layouts_give_the_same_images(seed):
    grid, config = (7, 11, 13), fps.AttentionConfig(tile=(3, 4, 5), smooth_k=True)
    resolved = config.resolve(grid, 3)
    qkv = make_qkv("gaussian", grid=grid, tile=config.tile, batch=2, heads=3, seed=seed)
    nhd = quantize(*qkv, resolved, "NHD")
    hnd = quantize(*(x.transpose(1, 2).contiguous() for x in qkv), resolved, "HND")
    for a, b in zip(decode(nhd, resolved, 64), decode(hnd, resolved, 64), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(nhd[2], hnd[2]) and torch.equal(nhd[3], hnd[3])


def test_same_images_every_time(seed):
    """Also where sums and maxima are gathered over many blocks: the mean of K, bricks, V's channels."""
    grid = (17, 45, 40)
    config = fps.AttentionConfig(tile=(7, 9, 2), quant_tile=(7, 9, 8), smooth_k=True)
    resolved = config.resolve(grid, 2)
    qkv = make_qkv("key_mean", grid=grid, tile=config.tile, head_dim=128, seed=seed)
    first = quantize(*qkv, resolved)
    assert math.prod(grid) == first[4].shape[2]
    for _ in range(4):
        again = quantize(*qkv, resolved)
        for a, b in zip(decode(first, resolved, 128), decode(again, resolved, 128), strict=True):
            assert torch.equal(a, b)
        assert torch.equal(first[2], again[2]) and torch.equal(first[3], again[3])
