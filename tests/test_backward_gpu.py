"""The Hopper backward against the straight-through gradient in fp64 and the emulated one (see compare.py)."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

import fpsattention as fps
from compare import check_gradients
from fpsattention import reference
from fpsattention.core import ops
from inputs import KINDS, make_qkv, poisoned, to_nhd
from tensor_core import tensor_core
from test_attention_gpu import BOTH_DTYPES, BOTH_HEAD_DIMS, CASES, random_cases

pytestmark = pytest.mark.gpu

GRID, CONFIG = (10, 18, 20), fps.AttentionConfig(tile=(5, 6, 4), window=(1, 3, 3))


def normal(x, seed):
    """Standard normal, like x in shape, dtype and device."""
    generator = torch.Generator(x.device).manual_seed(seed)
    return torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator)


def differentiate(q, k, v, dout, dlse=None, *, deterministic=False, **call):
    """(out, lse) and (dq, dk, dv) of the kernel, run in poisoned memory."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    with poisoned():
        out, lse = fps.attention(
            *leaves, **call, return_lse=True, backend="sm90", deterministic=deterministic
        )
        outputs, gradients = ((out,), (dout,)) if dlse is None else ((out, lse), (dout, dlse))
        grads = torch.autograd.grad(outputs, leaves, gradients)
        torch.cuda.synchronize()
    return (out.detach(), lse.detach()), grads


def check(q, k, v, *, seed, kind="gaussian", with_lse=False, deterministic=False, **call):
    """The kernel's gradients of one call, checked against the contract."""
    wide_logits, dout = KINDS[kind].wide_logits, normal(q, seed + 1) * KINDS[kind].dout[q.dtype]
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    exact_out, exact_lse = reference.emulated_attention(*leaves, **call, dtype=torch.float64)
    dlse = normal(exact_lse.float(), seed + 2) if with_lse else None
    (out, lse), grads = differentiate(q, k, v, dout, dlse, deterministic=deterministic, **call)
    for x, grad in zip((q, k, v), grads, strict=True):
        assert (grad.shape, grad.dtype, grad.device) == (x.shape, x.dtype, x.device)
    outputs, given_grads = ((exact_out,), (dout.double(),))
    if with_lse:
        outputs, given_grads = (exact_out, exact_lse), (dout.double(), dlse.double())
    exact = torch.autograd.grad(outputs, leaves, given_grads)
    with tensor_core():
        emulated = reference.emulated_backward(q, k, v, out, lse, dout, dlse, **call)
    layout = call.get("tensor_layout", "NHD")
    all_nhd = [[to_nhd(x, layout) for x in three] for three in (grads, exact, emulated)]
    geometry = call["config"].resolve(call["grid"], all_nhd[0][0].shape[2]).geometry
    check_gradients(*all_nhd, geometry, wide_logits=wide_logits)
    return grads


def check_case(case, head_dim, dtype, seed, **kwargs):
    q, k, v = make_qkv(
        case.kind,
        grid=case.grid,
        tile=case.tile,
        batch=case.batch,
        heads=case.heads,
        head_dim=head_dim,
        dtype=dtype,
        tensor_layout=case.layout,
        seed=seed,
    )
    call = {"grid": case.grid, "config": case.config, "scale": case.scale, "tensor_layout": case.layout}
    check(q, k, v, seed=seed, kind=case.kind, **call, **kwargs)


@BOTH_DTYPES
@BOTH_HEAD_DIMS
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_backward(case, head_dim, dtype, seed):
    check_case(case, head_dim, dtype, seed, with_lse=seed % 2 == 0)


@pytest.mark.parametrize(
    ("head_dim", "dtype"), [(64, torch.bfloat16), (128, torch.bfloat16), (128, torch.float16)], ids=str
)
@pytest.mark.parametrize("window", [None, (1, 3, 3)], ids=["dense", "window"])
@pytest.mark.parametrize("kind", KINDS)
def test_nasty_inputs(kind, window, head_dim, dtype, seed):
    grid, config = (9, 18, 20), fps.AttentionConfig(tile=(5, 6, 4), window=window)
    q, k, v = make_qkv(kind, grid=grid, tile=config.tile, head_dim=head_dim, dtype=dtype, seed=seed)
    check(q, k, v, seed=seed, grid=grid, config=config, kind=kind)


@BOTH_HEAD_DIMS
@pytest.mark.parametrize(
    ("grid", "tile"),
    [((1, 1, 1), (1, 1, 1)), ((1, 1, 2), (8, 8, 8)), ((2, 9, 10), (4, 3, 5)), ((1, 1, 129), (1, 1, 129))],
)
def test_one_tile_and_grids_smaller_than_the_tile(grid, tile, head_dim, seed):
    q, k, v = make_qkv("gaussian", grid=grid, tile=tile, head_dim=head_dim, batch=2, seed=seed)
    check(q, k, v, seed=seed, grid=grid, config=fps.AttentionConfig(tile=tile))


@BOTH_HEAD_DIMS
@pytest.mark.parametrize("tokens", [1, 127, 1009, 4099])
def test_backward_of_a_line(tokens, head_dim, seed):
    grid, config = (1, 1, tokens), fps.AttentionConfig(tile=(1, 1, 128))
    q, k, v = make_qkv("gaussian", grid=grid, tile=config.tile, batch=2, head_dim=head_dim, seed=seed)
    check(q, k, v, seed=seed, grid=grid, config=config)


@BOTH_HEAD_DIMS
def test_without_a_grid(head_dim, seed):
    """The bits of a line in tiles of 128 tokens."""
    grid, config = (1, 1, 1009), fps.AttentionConfig(tile=(1, 1, 128))
    q, k, v = make_qkv("gaussian", grid=grid, tile=config.tile, head_dim=head_dim, seed=seed)
    dout = normal(q, seed + 1)
    _, grads = differentiate(q, k, v, dout, deterministic=True)
    _, of_line = differentiate(q, k, v, dout, deterministic=True, grid=grid, config=config)
    assert all(torch.equal(x, y) for x, y in zip(grads, of_line, strict=True))


@pytest.mark.parametrize("tensor_layout", ["NHD", "HND"])
@pytest.mark.parametrize(("batch", "grid"), [(0, (4, 6, 8)), (2, (0, 6, 8))])
def test_empty(batch, grid, tensor_layout):
    tokens = math.prod(grid)
    shape = (batch, tokens, 3, 64) if tensor_layout == "NHD" else (batch, 3, tokens, 64)
    q = torch.empty(shape, dtype=torch.bfloat16, device="cuda")
    config = fps.AttentionConfig(tile=(2, 3, 4))
    _, grads = differentiate(q, q, q, q, grid=grid, config=config, tensor_layout=tensor_layout)
    assert all(grad.shape == q.shape for grad in grads)


@settings(max_examples=40, phases=[Phase.generate])  # no shrinking: GPU time is dear, the cases are small
@given(
    case=random_cases(),
    head_dim=st.sampled_from([64, 128]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
    seed=st.integers(0, 2**31),
    with_lse=st.booleans(),
    deterministic=st.booleans(),
)
def test_random_calls(case, head_dim, dtype, seed, with_lse, deterministic):
    check_case(case, head_dim, dtype, seed, with_lse=with_lse, deterministic=deterministic)


def test_long_windowed(seed):
    """Wan at 720p: 75,600 tokens."""
    grid, config = (21, 45, 80), fps.AttentionConfig(tile=(7, 9, 2), window=(3, 3, 9))
    q, k, v = make_qkv("gaussian", grid=grid, tile=config.tile, heads=1, head_dim=128, seed=seed)
    check(q, k, v, seed=seed, grid=grid, config=config)


DETERMINISTIC = {
    "window": (GRID, CONFIG),
    "dense": (GRID, fps.AttentionConfig(tile=(5, 6, 4))),
    "truncate, per head": (
        GRID,
        fps.AttentionConfig(tile=(5, 6, 4), window=((1, 1, 1), (2, 3, 3), (1, 3, 5)), border="truncate"),
    ),
    "ragged slots of 512": ((9, 20, 11), fps.AttentionConfig(tile=(8, 8, 8), window=(2, 1, 2))),
    "more key blocks than SMs": ((20, 32, 40), fps.AttentionConfig(tile=(4, 4, 8))),
}


@BOTH_HEAD_DIMS
@pytest.mark.parametrize(("grid", "config"), DETERMINISTIC.values(), ids=DETERMINISTIC.keys())
def test_deterministic(grid, config, head_dim, seed):
    """The same bits every time; a call that sums in another order differs in the last bits only."""
    q, k, v = make_qkv("gaussian", grid=grid, tile=config.tile, heads=3, head_dim=head_dim, seed=seed)
    dout = normal(q, seed + 1)
    call = {"grid": grid, "config": config}
    _, first = differentiate(q, k, v, dout, **call, deterministic=True)
    for _ in range(5):
        _, again = differentiate(q, k, v, dout, **call, deterministic=True)
        assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))
    _, free = differentiate(q, k, v, dout, **call, deterministic=False)
    for a, b in zip(free, first, strict=True):  # a few bf16 values round the other way
        assert (a.float() - b.float()).norm() < 2e-3 * b.float().norm()


def test_the_global_setting_makes_it_deterministic(seed, monkeypatch):
    asked, real = [], ops.attention

    def spy(*args):
        asked.append(args[-1])
        return real(*args)

    monkeypatch.setattr(ops, "attention", spy)
    q, k, v = (x.requires_grad_() for x in make_qkv("gaussian", grid=GRID, tile=CONFIG.tile, seed=seed))
    for setting in (True, False):
        torch.use_deterministic_algorithms(setting)
        try:
            fps.attention(q, k, v, grid=GRID, config=CONFIG)
        finally:
            torch.use_deterministic_algorithms(False)
    assert asked == [True, False]


@pytest.mark.parametrize("names", ["q", "k", "v", "qk", "kv", "qv"])
def test_gradients_of_some_inputs(names, seed):
    """Only inputs that require a gradient get one, equal to that of a call where all do."""
    q, k, v = make_qkv("gaussian", grid=GRID, tile=CONFIG.tile, seed=seed)
    dout, call = (
        normal(q, seed + 1),
        {"grid": GRID, "config": CONFIG, "backend": "sm90", "deterministic": True},
    )
    _, want = differentiate(q, k, v, dout, grid=GRID, config=CONFIG, deterministic=True)
    leaves = {n: x.detach().requires_grad_(n in names) for n, x in zip("qkv", (q, k, v), strict=True)}
    fps.attention(**leaves, **call).backward(dout)
    for (name, x), grad in zip(leaves.items(), want, strict=True):
        assert (x.grad is None) == (name not in names)
        assert x.grad is None or torch.equal(x.grad, grad)


@pytest.mark.parametrize(
    "strange",
    [
        lambda x: x[:, :1].expand(x.shape),
        lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
        lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
    ],
    ids=["expanded", "channels apart", "address + 2"],
)
def test_any_gradient_of_the_output_is_taken(strange, seed):
    """Autograd passes gradients of any strides: a sum, for example, gives an expanded one."""
    q, k, v = make_qkv("gaussian", grid=GRID, tile=CONFIG.tile, seed=seed)
    dout = strange(normal(q, seed + 1))
    call = {"grid": GRID, "config": CONFIG, "deterministic": True}
    _, got = differentiate(q, k, v, dout, **call)
    _, want = differentiate(q, k, v, dout.contiguous().clone(), **call)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_second_derivative_is_refused(seed):
    q, k, v = (x.requires_grad_() for x in make_qkv("gaussian", grid=GRID, tile=CONFIG.tile, seed=seed))
    out = fps.attention(q, k, v, grid=GRID, config=CONFIG, backend="sm90")
    (dq,) = torch.autograd.grad(out.float().square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivative only"):
        dq.float().sum().backward()


def test_gradient_checkpointing(seed):
    q, k, v = make_qkv("gaussian", grid=GRID, tile=CONFIG.tile, seed=seed)
    dout = normal(q, seed + 1)
    _, want = differentiate(q, k, v, dout, grid=GRID, config=CONFIG, deterministic=True)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]

    def block(q, k, v):
        return fps.attention(q, k, v, grid=GRID, config=CONFIG, backend="sm90", deterministic=True)

    checkpoint(block, *leaves, use_reentrant=False).backward(dout)
    assert all(torch.equal(x.grad, grad) for x, grad in zip(leaves, want, strict=True))


@pytest.mark.parametrize("smooth_k", [False, True])
def test_compile_traces_through(smooth_k, seed):
    """Forward and backward are one graph each, and give the bits of eager mode."""
    config = fps.AttentionConfig(tile=(5, 6, 4), window=(1, 3, 3), smooth_k=smooth_k)
    q, k, v = make_qkv("gaussian", grid=GRID, tile=config.tile, seed=seed)
    dout = normal(q, seed + 1)

    def block(q, k, v):
        return fps.attention(q, k, v, grid=GRID, config=config, backend="sm90", deterministic=True) * 2

    torch._dynamo.reset()
    grads = []
    for function in (block, torch.compile(block, fullgraph=True, backend="aot_eager")):
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        function(*leaves).backward(dout)
        grads.append([x.grad for x in leaves])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_never_waits_for_the_gpu(seed):
    q, k, v = (x.requires_grad_() for x in make_qkv("gaussian", grid=GRID, tile=CONFIG.tile, seed=seed))
    dout = normal(q, seed + 1)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        grads = torch.autograd.grad(fps.attention(q, k, v, grid=GRID, config=CONFIG), (q, k, v), dout)
    finally:
        torch.cuda.set_sync_debug_mode(before)
    assert all(grad.isfinite().all() for grad in grads)


def test_opcheck(seed):
    """Schema, fake and autograd of the differentiable op."""
    q, k, v = (x.requires_grad_() for x in make_qkv("gaussian", grid=GRID, tile=CONFIG.tile, seed=seed))
    args = q, k, v, *[None] * 4, list(GRID), 0, 0, CONFIG.spec, 0.125, "NHD", True
    utils = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.fpsattention.attention.default, args, test_utils=utils)
