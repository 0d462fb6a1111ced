"""How the Hopper kernels behave in a program: memory layouts, streams, graphs, compile, huge offsets, errors.

test_attention_gpu.py checks the values; here results are compared bit for bit with a plain call.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import fpsattention as fps
from fpsattention.core import ops
from inputs import make_qkv, poisoned, to_nhd

pytestmark = pytest.mark.gpu

GRID = (6, 14, 15)
CONFIG = fps.AttentionConfig(tile=(3, 5, 4), window=(1, 3, 3))
TOKENS = math.prod(GRID)


def attend(q, k, v, *, grid=GRID, config=CONFIG, **kwargs):
    return fps.attention(q, k, v, grid=grid, config=config, return_lse=True, backend="sm90", **kwargs)


def random_qkv(seed, *, grid=GRID, tile=CONFIG.tile, **kwargs):
    return make_qkv("gaussian", grid=grid, tile=tile, seed=seed, **{"batch": 2, "heads": 3, **kwargs})


def assert_same(got, want):
    for name, a, b in zip(("out", "lse"), got, want, strict=True):
        assert torch.equal(a, b), f"{name}: {(a != b).sum()} of {a.numel()} elements differ"


# Memory layouts of [B, L, H, D]: each maps a contiguous x to a tensor of equal values and other strides.


def inside(x, before, after):
    """The same values as a slice of a larger tensor, which holds NaN before and after it on each axis."""
    shape = [b + n + a for b, n, a in zip(before, x.shape, after, strict=True)]
    outer = torch.full(shape, math.nan, dtype=x.dtype, device=x.device)
    view = outer[tuple(slice(b, b + n) for b, n in zip(before, x.shape, strict=True))]
    return view.copy_(x)


LAYOUTS = {
    "fused heads": lambda x: torch.stack([x, x + 1, x + 2], 2)[:, :, 0],
    "fused, last": lambda x: torch.stack([x + 2, x + 1, x], 2)[:, :, 2],
    "fused per head": lambda x: torch.stack([x + 1, x, x + 2], 3)[:, :, :, 1],
    "head slice": lambda x: inside(x, (0, 0, 2, 0), (0, 0, 1, 0)),
    "token slice": lambda x: inside(x, (0, 7, 0, 0), (0, 5, 0, 0)),
    "batch slice": lambda x: inside(x, (1, 0, 0, 0), (1, 0, 0, 0)),
    "channel slice": lambda x: inside(x, (0, 0, 0, 8), (0, 0, 0, 16)),
    "slice of everything": lambda x: inside(x, (1, 3, 1, 8), (0, 2, 2, 8)),
    "every other token": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "heads first in memory": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "tokens first in memory": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "storage offset of 16 bytes": lambda x: torch.cat([x.new_zeros(8), x.flatten()])[8:].view(x.shape),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("tensor_layout", ["NHD", "HND"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_strided_input(layout, tensor_layout, dtype, seed):
    qkv = random_qkv(seed, dtype=dtype)
    want, want_lse = attend(*qkv)
    # Each operand has another layout, so that a kernel that mixes up their strides fails.
    for operand in range(3):
        moved = [layout(x) if i == operand else x for i, x in enumerate(qkv)]
        assert torch.equal(moved[operand], qkv[operand])
        if tensor_layout == "HND":
            moved = [x.transpose(1, 2) for x in moved]
        out, lse = attend(*moved, tensor_layout=tensor_layout)
        assert_same((to_nhd(out, tensor_layout), lse), (want, want_lse))


def test_expanded_heads(seed):
    """Grouped-query callers expand K and V over the heads: a stride of zero, and no copy."""
    q, k, v = random_qkv(seed, heads=4)
    k, v = (x[:, :, :1].expand(-1, -1, 4, -1) for x in (k, v))
    assert k.stride(2) == 0
    assert_same(attend(q, k, v), attend(q, k.contiguous(), v.contiguous()))


@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize(
    "break_it",
    [
        lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
        lambda x: torch.cat([x.new_zeros(4), x.flatten()])[4:].view(x.shape),
        lambda x: inside(x, (0, 0, 0, 0), (0, 0, 0, 1)),
        lambda x: inside(x, (0, 0, 0, 4), (0, 0, 0, 4)),
        lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    ],
    ids=["address + 2", "address + 8", "rows of D + 1", "rows from channel 4", "channels apart"],
)
def test_strides_that_cannot_be_loaded_are_refused(break_it, name, seed):
    """Rows that do not start on 16 bytes, or are not contiguous: the error names the operand and the rule."""
    operands = dict(zip("qkv", random_qkv(seed), strict=True))
    operands[name] = break_it(operands[name])
    with pytest.raises(ValueError, match=rf"^{name}: .*(16 bytes|contiguous)"):
        attend(*operands.values())


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"head_dim": 96}, r"head_dim.*96"),
        ({"head_dim": 256}, r"head_dim.*256"),
        ({"dtype": torch.float64}, r"dtype.*float64"),
        ({"dtype": torch.float32}, r"dtype.*float32"),
    ],
)
def test_sm90_never_falls_back(changes, match, seed):
    with pytest.raises(RuntimeError, match=match):
        attend(*random_qkv(seed, **changes))


def test_auto_takes_the_kernel(seed):
    q, k, v = random_qkv(seed)
    assert fps.backend_for(q, CONFIG)[0] == "sm90"
    auto = fps.attention(q, k, v, grid=GRID, config=CONFIG, return_lse=True)
    assert_same(auto, attend(q, k, v))
    assert torch.equal(fps.attention(q, k, v, grid=GRID, config=CONFIG), auto[0])


def test_inputs_on_two_devices(seed):
    q, k, v = random_qkv(seed)
    with pytest.raises(ValueError, match=r"v: device cpu"):
        attend(q, k, v.cpu())


@pytest.mark.parametrize(
    ("grid", "config", "heads"),
    [
        (GRID, CONFIG, 3),
        (GRID, fps.AttentionConfig(tile=(3, 5, 4), quant_tile=(6, 10, 8), smooth_k=True), 3),
        ((21, 45, 80), fps.AttentionConfig(tile=(7, 9, 2), window=(3, 3, 9)), 2),
        ((21, 45, 80), fps.AttentionConfig(tile=(7, 9, 2)), 2),
    ],
    ids=["small", "brick, smooth_k", "75600 windowed", "75600 dense"],
)
def test_same_bits_every_time(grid, config, heads, seed):
    qkv = random_qkv(seed, grid=grid, tile=config.tile, batch=1, heads=heads, head_dim=128)
    first = attend(*qkv, grid=grid, config=config)
    for _ in range(4):
        with poisoned():
            again = attend(*qkv, grid=grid, config=config)
        assert_same(again, first)


def test_inputs_are_left_alone(seed):
    qkv = random_qkv(seed)
    before = [x.clone() for x in qkv]
    attend(*qkv, config=fps.AttentionConfig(tile=(3, 5, 4), smooth_k=True))
    assert all(torch.equal(a, b) for a, b in zip(qkv, before, strict=True))


def test_runs_on_the_current_stream(seed):
    """The inputs are written late, on a stream of their own: a launch on any other stream would read NaN."""
    qkv = random_qkv(seed)
    want = attend(*qkv)
    late = [torch.full_like(x, math.nan) for x in qkv]
    stream = torch.cuda.Stream()
    for cycles in (
        0,
        100_000_000,
    ):  # the first call fills the stream's memory pool; the second waits about 60 ms
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(cycles)
            for x, y in zip(late, qkv, strict=True):
                x.copy_(y)
            got = [x.clone() for x in attend(*late)]
            for x in late:
                x.fill_(math.nan)
    assert not stream.query(), "the call waited for the GPU"
    stream.synchronize()
    assert_same(got, want)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_runs_on_the_inputs_device(seed):
    qkv = random_qkv(seed)
    assert torch.cuda.current_device() == 0
    got = attend(*(x.to("cuda:1") for x in qkv))
    assert torch.cuda.current_device() == 0 and all(x.device.index == 1 for x in got)
    assert_same([x.to("cuda:0") for x in got], attend(*qkv))


CONFIGS = {
    "window": fps.AttentionConfig(tile=(3, 5, 4), window=(1, 3, 3)),
    "per head": fps.AttentionConfig(tile=(3, 5, 4), window=((1, 1, 1), (2, 3, 3), (1, 3, 1))),
    "brick, smooth_k": fps.AttentionConfig(tile=(3, 5, 4), quant_tile=(6, 5, 8), smooth_k=True),
    "planned tile": fps.AttentionConfig(),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_never_waits_for_the_gpu(config, seed):
    """Not even in the first call for a grid, which makes lists and tables."""
    grid = (5, 13, 16)
    qkv = random_qkv(seed, grid=grid)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = attend(*qkv, grid=grid, config=config)
    finally:
        torch.cuda.set_sync_debug_mode(before)
    assert got[0].isfinite().all() and got[1].isfinite().all()


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_cuda_graph(config, seed):
    """Captured as the first call for its grid, replayed on new contents."""
    grid = (5, 12, 17)
    first, second = (random_qkv(s, grid=grid) for s in (seed, seed + 1))
    static = [x.clone() for x in first]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = attend(*static, grid=grid, config=config)
    for qkv in (second, first, second):
        for x, y in zip(static, qkv, strict=True):
            x.copy_(y)
        for x in got:
            x.fill_(math.nan)
        graph.replay()
        assert_same(got, attend(*qkv, grid=grid, config=config))


@pytest.mark.parametrize("tensor_layout", ["NHD", "HND"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_compile_traces_through(config, tensor_layout, seed):
    """fullgraph=True makes any graph break an error; the backend "eager" traces without compiling."""
    torch._dynamo.reset()
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    for batch in (1, 2):
        qkv = random_qkv(seed, batch=batch, tensor_layout=tensor_layout)
        want = attend(*qkv, config=config, tensor_layout=tensor_layout)
        assert_same(compiled(*qkv, config=config, tensor_layout=tensor_layout), want)


def test_compile_with_inductor(seed):
    """As users call it: inside a larger function, the kernel chosen by "auto"; compiled once per shape."""

    def block(qkv):
        q, k, v = (2 * qkv).unflatten(-1, (3, 3, 64)).unbind(2)
        return fps.attention(q, k, v, grid=GRID, config=CONFIG).flatten(2) + 1

    torch._dynamo.reset()
    inductor = CompileCounterWithBackend("inductor")
    compiled = torch.compile(block, fullgraph=True, backend=inductor)
    generator = torch.Generator("cuda").manual_seed(seed)
    for _ in range(3):
        qkv = torch.randn(2, TOKENS, 576, generator=generator, device="cuda", dtype=torch.bfloat16)
        assert torch.equal(compiled(qkv), block(qkv))
    assert inductor.frame_count == 1


def test_sizes_become_symbols(seed):
    """Changing sizes compile twice, not every time, with gradients as well."""

    def call(q, k, v, t):
        return fps.attention(q, k, v, grid=(t, 16, 16), config=config, deterministic=True)

    config = fps.AttentionConfig(tile=(2, 8, 8), window=(1, 1, 1))
    torch._dynamo.reset()
    inductor = CompileCounterWithBackend("inductor")
    compiled = torch.compile(call, fullgraph=True, backend=inductor)
    for t in (2, 4, 6, 3, 8):
        qkv = [x.requires_grad_() for x in random_qkv(seed, grid=(t, 16, 16), tile=(2, 8, 8))]
        ours, want = (f(*qkv, t) for f in (compiled, call))
        assert torch.equal(ours, want)
        for x, y in zip(*(torch.autograd.grad(out.sum(), qkv) for out in (ours, want)), strict=True):
            assert torch.equal(x, y)
    assert inductor.frame_count == 2


@pytest.mark.parametrize("tensor_layout", ["NHD", "HND"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_opcheck(config, tensor_layout, seed):
    """The ops match their schemas; their fakes give the shapes, strides and dtypes of the results."""
    q, k, v = random_qkv(seed, tensor_layout=tensor_layout)
    utils = ("test_schema", "test_faketensor")
    rest = list(GRID), 0, 0, config.spec, 0.125, tensor_layout
    no_text, no_lists = (None, None), (None, None)
    torch.library.opcheck(
        torch.ops.fpsattention.quantize.default, (q, k, v, *no_text, *rest), test_utils=utils
    )
    packed = ops.quantize(q, k, v, *no_text, *rest)
    args = packed, *no_text, *no_lists, *rest, q.shape[0], 3, q.shape[3], q.dtype
    torch.library.opcheck(torch.ops.fpsattention.attend.default, args, test_utils=utils)
    # An eager call makes the same launches without the ops.
    call = {"grid": GRID, "config": config, "scale": 0.125, "tensor_layout": tensor_layout}
    want = fps.attention(q, k, v, **call, return_lse=True)
    assert_same(ops.attend(*args), want)
    assert_same(ops.attention(q, k, v, *no_text, *no_lists, *rest, False)[:2], want)


def test_offsets_beyond_32_bits(seed):
    """3.1e9 elements: every tensor, and the packed blocks of K and V, pass 2^31 elements and 2^32 bytes."""
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    if free < 40 * 2**30:
        pytest.skip(f"needs 40 GiB of free GPU memory, there are {free / 2**30:.0f}")
    grid, config = (21, 45, 80), fps.AttentionConfig(tile=(7, 9, 2), window=(1, 1, 1))
    batch, heads = 8, 40
    generator = torch.Generator("cuda").manual_seed(seed)
    q, k, v = (
        torch.empty(batch, math.prod(grid), heads, 128, dtype=torch.bfloat16, device="cuda").normal_(
            generator=generator
        )
        for _ in range(3)
    )
    assert q.numel() > 2**31
    with poisoned():
        out, lse = attend(q, k, v, grid=grid, config=config)
    for b, h in ((0, 0), (3, 17), (5, 20), (6, 0), (batch - 1, heads - 1)):
        alone = attend(
            *(x[b : b + 1, :, h : h + 1].contiguous() for x in (q, k, v)), grid=grid, config=config
        )
        assert_same((out[b, :, h], lse[b, h]), (alone[0][0, :, 0], alone[1][0, 0]))
    del q, k, v, out, lse, alone
    torch.cuda.empty_cache()
