"""Text tokens on the Hopper kernels: forward and gradient, and the results of invalid tokens."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

import fpsattention as fps
from fpsattention import reference
from inputs import poisoned, to_nhd
from tensor_core import tensor_core
from test_attention_gpu import BOTH_DTYPES, BOTH_HEAD_DIMS
from text_cases import TEXT_CASES, TextCase, check_attention, check_gradients

pytestmark = pytest.mark.gpu

# Grids of many tiles; sections that end inside a block, fill several text tiles, or are longer than the video.
CASES = TEXT_CASES | {
    "text last, windowed": TextCase((6, 18, 20), (3, 6, 5), (1, 3, 3), suffix_len=256, heads=3),
    "text first, slot of 384": TextCase((10, 16, 20), (6, 8, 8), (1, 1, 3), prefix_len=226, batch=2),
    "padded text": TextCase(
        *((6, 18, 20), (3, 6, 5), (1, 3, 3)), suffix_len=256, batch=3, suffix_valid=(256, 77, 0), layout="HND"
    ),
    "text longer than the video": TextCase((2, 8, 8), (2, 4, 8), prefix_len=700, suffix_len=300),
    "dense, ragged, both": TextCase(
        *((7, 11, 13), (3, 4, 5)), prefix_len=65, suffix_len=129, batch=2, prefix_valid=(64, 65),
        suffix_valid=(1, 128)
    ),
    "windows per head, bricks, smooth_k": TextCase(
        *((9, 17, 22), (3, 4, 4), ((1, 1, 1), (3, 3, 3), (1, 5, 3))), prefix_len=100, suffix_len=200, heads=3,
        quant_tile=(6, 8, 12), smooth_k=True, suffix_valid=(130,), layout="HND"
    ),
}  # fmt: skip
EVERY_CASE = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def outcome(case: TextCase, q, k, v, dout, dlse, deterministic=False):
    """out, lse and gradients of the kernels, run in poisoned memory."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    call = case.call(device="cuda") | {"backend": "sm90", "deterministic": deterministic}
    with poisoned():
        out, lse = fps.attention(*leaves, **call, return_lse=True)
        grads = torch.autograd.grad((out, lse), leaves, (dout, dlse))
        torch.cuda.synchronize()
    return out.detach(), lse.detach(), grads


def gradients_of(case: TextCase, q, seed):
    """dout and dlse. Those of invalid tokens are not zero: no gradient may depend on them."""
    generator = torch.Generator("cuda").manual_seed(seed)
    dout = torch.randn(q.shape, generator=generator, device="cuda").to(q.dtype)
    return dout, torch.randn(case.batch, case.heads, case.tokens, generator=generator, device="cuda")


@BOTH_HEAD_DIMS
@BOTH_DTYPES
@EVERY_CASE
def test_contract(case, dtype, head_dim, seed):
    # Half the usual scale keeps scores below about ten (log2) despite K's mean and sizes here. Above that the tensor
    # core's accumulator moves codes of P.
    case = replace(case, scale=0.5 * head_dim**-0.5)
    q, k, v = case.make_qkv(head_dim, dtype, seed, "cuda")
    dout, dlse = gradients_of(case, q, seed + 1)
    out, lse, grads = outcome(case, q, k, v, dout, dlse)
    call = case.call(device="cuda")
    exact, exact_lse = reference.exact_attention(q, k, v, **case.call("none", "cuda"))
    emu, emu_lse = reference.emulated_attention(q, k, v, **call)
    outs = (to_nhd(x, case.layout) for x in (out, exact, emu))
    own, exact, emu = outs
    check_attention(case, own, lse, exact, exact_lse, emu, emu_lse)

    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    exact = reference.emulated_attention(*leaves, **call, dtype=torch.float64)
    exact[1].data[exact[1] == -math.inf] = 0  # so that 0 * lse is not NaN
    exact = torch.autograd.grad(exact, leaves, (dout.double(), dlse.double()))
    with tensor_core():
        emulated = reference.emulated_backward(q, k, v, out, lse, dout, dlse, **call)
    check_gradients(case, *([to_nhd(x, case.layout) for x in three] for three in (grads, exact, emulated)))


@EVERY_CASE
def test_invalid_tokens_do_not_matter(case, seed):
    """Their values and gradients change no bit, and a deterministic call repeats its bits."""
    dtype = torch.bfloat16
    qkv = case.make_qkv(128, dtype, seed, "cuda", invalid=math.nan)
    others = case.make_qkv(128, dtype, seed, "cuda", invalid=1000.0)
    dout, dlse = gradients_of(case, qkv[0], seed + 1)
    want = outcome(case, *qkv, dout, dlse, deterministic=True)
    for sample in range(case.batch):
        valid = case.valid(sample).cuda()
        to_nhd(dout, case.layout)[sample, ~valid] = 7
        dlse[sample, :, ~valid] = -7
    got = outcome(case, *others, dout, dlse, deterministic=True)
    for a, b in zip((*want[:2], *want[2]), (*got[:2], *got[2]), strict=True):
        assert torch.equal(a, b)


def test_counts_beyond_the_section_are_clamped(seed):
    case = TextCase((2, 8, 8), (2, 4, 8), prefix_len=30, suffix_len=20, batch=2)
    q, k, v = case.make_qkv(128, torch.bfloat16, seed, "cuda")

    def run(prefix, suffix):
        counts = (torch.tensor(x, dtype=torch.int32, device="cuda") for x in (prefix, suffix))
        text = dict(zip(("prefix_valid", "suffix_valid"), counts, strict=True))
        return fps.attention(q, k, v, **(case.call(device="cuda") | text), backend="sm90")

    assert torch.equal(run((-4, 31), (99, -1)), run((0, 30), (20, 0)))


def test_quantised_once_and_compiled(seed):
    """quantize_qkv, torch.compile and counts in a strided view give the bits of the plain call."""
    case = CASES["padded text"]
    q, k, v = case.make_qkv(128, torch.bfloat16, seed, "cuda")
    call = case.call(device="cuda")
    want = fps.attention(q, k, v, **call, backend="sm90")
    assert torch.equal(fps.attention(fps.quantize_qkv(q, k, v, **call, backend="sm90")), want)
    compiled = torch.compile(fps.attention, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, k, v, **call, backend="sm90"), want)
    counts = torch.stack([call["suffix_valid"], call["suffix_valid"] * 0], dim=1)[:, 0]
    assert not counts.is_contiguous()
    assert torch.equal(fps.attention(q, k, v, **(call | {"suffix_valid": counts}), backend="sm90"), want)
