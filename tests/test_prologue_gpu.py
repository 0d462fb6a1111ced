"""`norm_rope_quantize` on the Hopper kernels, against `norm_rope` and then `quantize_qkv`."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import fpsattention as fps
import packed
from fpsattention.core import ops
from inputs import poisoned
from prologue_cases import NORMS, inputs, of_one
from test_attention_gpu import BOTH_DTYPES, BOTH_HEAD_DIMS

pytestmark = pytest.mark.gpu

GRID = (7, 11, 13)  # ragged on every axis
CONFIGS = {
    "tile": fps.AttentionConfig(tile=(3, 4, 5)),
    "slot of 512": fps.AttentionConfig(tile=(7, 8, 9), window=(1, 1, 1)),
    "brick": fps.AttentionConfig(tile=(3, 4, 5), quant_tile=(6, 8, 10)),
}


def call_of(x: fps.QuantizedQKV) -> ops.Call:
    batch, second, third, head_dim = x.shape
    heads = third if x.tensor_layout == "NHD" else second
    text = x.prefix_len, x.suffix_len
    return ops.call_of(x.config, GRID, *text, batch, heads, head_dim, x.dtype, x.scale, x.tensor_layout)


def values(x: fps.QuantizedQKV):
    return packed.decode(call_of(x), *x.operands)


@BOTH_HEAD_DIMS
@BOTH_DTYPES
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize(
    ("rope", "text"),
    [(None, (0, 0)), ("axes", (0, 0)), ("tokens", (0, 200)), ("heads", (7, 5))],
    ids=["no rope", "axes", "tokens", "heads"],
)
@pytest.mark.parametrize("norm", NORMS)
def test_contract(norm, rope, text, config, dtype, head_dim, seed):
    """The same codes, except a few whose values lie near a rounding boundary: the norm is summed in another order."""
    about = {"norm": norm, "rope": rope, "batch": 2, "seed": seed, "device": "cuda", "dtype": dtype}
    (q, k, v), given = inputs(GRID, 3, head_dim, text=text, text_norm=text[0] > 0, **about)
    call = {"grid": GRID, "config": config, "backend": "sm90"}
    if any(text):
        call["suffix_valid"] = torch.tensor([text[1], text[1] // 2], dtype=torch.int32, device="cuda")
    with poisoned():
        got = fps.norm_rope_quantize(q, k, v, **call, **given)
    q, k = (fps.norm_rope(x, grid=GRID, **of_one(given, n)) for n, x in (("q", q), ("k", k)))
    call |= {n: given[n] for n in ("prefix_len", "suffix_len") if n in given}
    want = fps.quantize_qkv(q, k, v, **call)
    ours, theirs = values(got), values(want)
    for a, b in zip(ours, theirs, strict=True):
        assert a.isfinite().all() and (a - b).norm() <= 3e-3 * b.norm()
        assert ((a - b).abs() > 1e-2 * b.abs()).float().mean() <= 5e-3
    assert torch.equal(ours[2], theirs[2])
    out, expected = fps.attention(got).float(), fps.attention(want).float()
    assert (out - expected).norm() <= 5e-3 * expected.norm()


def test_layouts_and_strides(seed):
    (q, k, v), given = inputs(GRID, 3, 128, seed=seed, device="cuda", dtype=torch.bfloat16)
    call = {"grid": GRID, "config": CONFIGS["tile"], "backend": "sm90"} | given
    want = fps.norm_rope_quantize(q, k, v, **call)
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    hnd = fps.norm_rope_quantize(*heads_first, **call, tensor_layout="HND")
    together = torch.stack((q, k, v), dim=2).unbind(2)
    strided = fps.norm_rope_quantize(*together, **call)
    of_want = values(want)
    # Weights that do not start on 8 bytes.
    norms = {x: given[x] for x in ("q_norm", "k_norm")}
    norms = {
        x: replace(norm, weight=torch.cat([norm.weight[:1], norm.weight])[1:]) for x, norm in norms.items()
    }
    shifted = fps.norm_rope_quantize(q, k, v, **call | norms)
    for got in (hnd, strided, shifted):
        of_got = values(got)
        assert all(torch.equal(a, b) for a, b in zip(of_got, of_want, strict=True))


def test_compiled(seed):
    (q, k, v), given = inputs(GRID, 3, 128, seed=seed, device="cuda", dtype=torch.bfloat16)

    def layer(q, k, v):
        return fps.attention(
            fps.norm_rope_quantize(q, k, v, grid=GRID, config=CONFIGS["tile"], backend="sm90", **given)
        )

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, k, v), layer(q, k, v))


def test_opcheck(seed):
    (q, k, v), given = inputs(GRID, 3, 128, seed=seed, device="cuda", dtype=torch.bfloat16)
    norm = [given["q_norm"].weight, given["k_norm"].weight], [], [], 1e-6, given["rope"]
    args = q, k, v, None, None, *norm, list(GRID), 0, 0, CONFIGS["tile"].spec, 0.1, "NHD"
    torch.library.opcheck(
        torch.ops.fpsattention.norm_rope_quantize.default, args, test_utils=("test_schema", "test_faketensor")
    )
