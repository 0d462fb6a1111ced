"""Attention among torch's modes and transforms: fake tensors, export, compile, torch.func, autocast."""

import warnings
from dataclasses import replace

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

import fake_kernels
import fpsattention as fps
from fpsattention import parallel, reference
from fpsattention.core import api, config, geometry
from fpsattention.core.geometry import tile_geometry

GRID = (1, 6, 6)
CONFIG = fps.AttentionConfig(tile=(1, 3, 2), window=(1, 1, 1))
EXACT = replace(CONFIG, quant="none")
BOTH = pytest.mark.parametrize("config", [CONFIG, EXACT], ids=["fp8", "none"])
CALL = {"grid": GRID, "backend": "reference"}


def qkv(dtype=torch.float32, grad=False):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(1, 36, 2, 64, generator=generator).to(dtype).requires_grad_(grad) for _ in range(3)]


def fakes(dtype=torch.bfloat16, device="cpu", grad=False):
    return [torch.empty(1, 36, 2, 64, dtype=dtype, device=device, requires_grad=grad) for _ in range(3)]


# Tensors without values


@pytest.mark.parametrize("tensor_layout", ["NHD", "HND"])
@BOTH
def test_fake_tensors(config, tensor_layout):
    """They get shapes and gradients, as from SDPA. They once reached compiled code by their data pointer."""
    with FakeTensorMode():
        q, k, v = fakes(grad=True)
        if tensor_layout == "HND":
            q, k, v = (x.detach().transpose(1, 2).requires_grad_() for x in (q, k, v))
        out, lse = fps.attention(q, k, v, config=config, return_lse=True, tensor_layout=tensor_layout, **CALL)
        assert (out.shape, out.dtype, out.device) == (q.shape, q.dtype, q.device)
        assert (lse.shape, lse.dtype) == ((1, 2, 36), torch.float32)
        (out.sum() + lse.sum()).backward()
        assert all(x.grad.shape == x.shape for x in (q, k, v))


def test_fake_tensors_elsewhere():
    with FakeTensorMode():
        q, k, v = fakes()
        counts = torch.ones(1, dtype=torch.int32)
        with_text = {"grid": (1, 6, 5), "prefix_len": 6, "prefix_valid": counts, "backend": "reference"}
        assert fps.attention(q, k, v, **with_text).shape == q.shape
        quantized = fps.quantize_qkv(q, k, v, config=CONFIG, **CALL)
        assert fps.attention(quantized).shape == q.shape
        fused = fps.norm_rope_quantize(
            q, k, v, config=CONFIG, **CALL, q_norm=fps.Norm(q[0, 0, 0]), k_norm=fps.Norm(q[0, 0, 0])
        )
        assert fps.attention(fused).dtype == q.dtype
        for function in (reference.exact_attention, reference.emulated_attention):
            out, lse = function(q, k, v, grid=GRID, config=CONFIG, dtype=torch.float64)
            assert (out.shape, out.dtype, lse.dtype) == (q.shape, torch.float64, torch.float64)
        out, _ = parallel.merge_states([q, k], [lse, lse])
        assert out.shape == q.shape
        with pytest.raises(TypeError, match="q: is a FakeTensor, which has no values"):
            reference.quantize(q, k, v, CONFIG.resolve(GRID, 2))
        with pytest.raises(TypeError, match="q: is a FakeTensor, which has no values"):
            reference.emulated_backward(q, k, v, q, lse, q, grid=GRID, config=CONFIG)
        with pytest.raises(ValueError, match="window"):
            fps.attention(q, k, v, config=replace(CONFIG, window=(1, 1, 2)), **CALL)


@BOTH
def test_fake_tensors_on_a_gpu_that_is_not_there(config):
    """Tools plan memory on machines without a GPU."""
    with FakeTensorMode():
        q, k, v = fakes(device="cuda")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the reference is slow
            out = fps.attention(q, k, v, grid=GRID, config=config)
        assert (out.shape, out.device.type) == (q.shape, "cuda")


@pytest.fixture
def nothing_kept():
    for cached in (tile_geometry, config._resolve):
        cached.cache_clear()


def attempt(call):
    try:
        return call()
    except (RuntimeError, TypeError, ValueError):
        return None


@pytest.mark.parametrize("mode", ["fake", "meta", "inference", "grad", "vmap", "jvp"])
def test_the_first_call_leaves_plain_tensors(nothing_kept, mode):
    """Tensors cached by a call in a mode serve calls outside it, with right results and gradients."""
    want = fps.attention(*qkv(), config=CONFIG, **CALL)
    tile_geometry.cache_clear()

    def call(x):
        attempt(lambda: fps.attention(x, x, x, config=CONFIG, **CALL))
        geometry = tile_geometry(GRID, CONFIG.tile)  # cached even if the call was refused
        made = [geometry.slot_tokens, geometry.valid, geometry.tile_of_token, geometry.text_tokens]
        assert all(type(t) is torch.Tensor and t.device.type == "cpu" for t in made)
        return x.sum()

    q, k, v = qkv(grad=True)
    if mode == "fake":
        with FakeTensorMode():
            call(fakes()[0])
    elif mode == "meta":
        with torch.device("meta"):
            call(q)
    elif mode == "inference":
        with torch.inference_mode():
            call(q)
    elif mode == "jvp":
        torch.func.jvp(call, (q.detach(),), (q.detach(),))
    else:
        transform = torch.func.grad(call) if mode == "grad" else torch.func.vmap(call)
        transform(q.detach()[None] if mode == "vmap" else q.detach())
    made = tile_geometry(GRID, CONFIG.tile)
    for x in (made.slot_tokens, made.valid, made.tile_of_token):
        assert not x.is_inference() and not torch._C._functorch.is_functorch_wrapped_tensor(x)
    out = fps.attention(q, k, v, config=CONFIG, **CALL)
    assert torch.equal(out, want)
    out.sum().backward()
    assert all(x.grad.isfinite().all() for x in (q, k, v))


@BOTH
@pytest.mark.parametrize("strict", [False, True])
def test_export(config, strict):
    class Module(torch.nn.Module):
        def forward(self, q, k, v):
            return fps.attention(q, k, v, config=config, return_lse=True, **CALL)

    program = torch.export.export(Module(), tuple(qkv()), strict=strict)
    inputs = [2 * x for x in qkv()]
    for got, want in zip(program.module()(*inputs), Module()(*inputs), strict=True):
        assert torch.equal(got, want)


@BOTH
def test_compile_is_one_graph(config):
    def call(q, k, v):
        return fps.attention(q, k, v, config=config, return_lse=True, **CALL)

    def gradients(function):
        inputs = qkv(grad=True)
        out, lse = function(*inputs)
        return [out, lse, *torch.autograd.grad(out.square().sum() + lse.sum(), inputs)]

    counter = CompileCounter()
    torch.compile(call, fullgraph=True, backend=counter)(*qkv())
    assert counter.frame_count == 1
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for got, want in zip(gradients(compiled), gradients(call), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("tensor_layout", ["NHD", "HND"])
@pytest.mark.parametrize("kind", ["exact", "emulated"])
def test_opcheck(kind, tensor_layout):
    """The op's schema, its fake and its gradient agree with what it does."""
    inputs = qkv(grad=True)
    if tensor_layout == "HND":
        inputs = [x.detach().transpose(1, 2).contiguous().requires_grad_() for x in inputs]
    dtype = torch.float32 if kind == "exact" else None
    call = *[None] * 4, list(GRID), [0, 0], CONFIG.spec, 0.125, tensor_layout, kind, dtype
    utils = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(torch.ops.fpsattention.reference.default, (*inputs, *call), test_utils=utils)


@pytest.mark.parametrize("fused", [False, True])
def test_quantised_operands_under_compile(monkeypatch, fused):
    """One graph, as on a Hopper GPU. The ops' fakes run in place of the kernels."""
    monkeypatch.setattr(api, "backend_for", lambda *_: ("sm90", "it is pretended"))
    weight = torch.ones(64)

    def call(q, k, v):
        if fused:
            norms = {"q_norm": fps.Norm(weight), "k_norm": fps.Norm(weight)}
            quantized = fps.norm_rope_quantize(q, k, v, grid=GRID, config=CONFIG, **norms)
        else:
            quantized = fps.quantize_qkv(q, k, v, grid=GRID, config=CONFIG)
        return fps.attention(quantized), fps.attention(quantized, config=replace(CONFIG, window=None))

    with fake_kernels.on_cpu():
        for out in torch.compile(call, fullgraph=True, backend="aot_eager")(*qkv(torch.bfloat16)):
            assert (out.shape, out.dtype) == ((1, 36, 2, 64), torch.bfloat16)


# Derivatives and batches by transformation


def attend(x):
    return fps.attention(x, x, x, config=CONFIG, **CALL)


def in_forward_mode(function, x):
    with forward_ad.dual_level():
        return function(forward_ad.make_dual(x, torch.ones_like(x)))


FORWARD = {
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x,)),
    "jacfwd": lambda f, x: torch.func.jacfwd(f)(x),
    "dual numbers": in_forward_mode,
    "jvp, compiled": lambda f, x: torch.compile(lambda y: torch.func.jvp(f, (y,), (y,)), backend="eager")(x),
}


@pytest.mark.parametrize("run", FORWARD.values(), ids=FORWARD.keys())
@pytest.mark.parametrize("backend", ["reference", "sm90"])
def test_forward_mode_is_refused_by_name(monkeypatch, backend, run):
    """An op of torch.library would silently give a derivative of zero."""
    monkeypatch.setattr(api, "backend_for", lambda *_: (backend, "it is pretended"))
    torch.compiler.reset()
    with pytest.raises(Exception, match="forward-mode derivative.*torch.func.jvp.*differentiate backward"):
        run(attend, qkv()[0])


@pytest.mark.parametrize("operand", range(3))
def test_forward_mode_of_any_operand(operand):
    def call(x):
        inputs = qkv()
        inputs[operand] = x
        return fps.quantize_qkv(*inputs, config=CONFIG, **CALL).operands[0]

    with pytest.raises(RuntimeError, match=f"{'qkv'[operand]}: has a forward-mode derivative"):
        in_forward_mode(call, qkv()[0])


TRANSFORMS = {
    "vmap": lambda f, x: torch.func.vmap(f)(x[None]),
    "vmap of samples": lambda f, x: torch.func.vmap(f)(x),  # of rank 3 each
    "grad": lambda f, x: torch.func.grad(lambda y: f(y).sum())(x),
    "vjp": lambda f, x: torch.func.vjp(f, x),
    "jacrev": lambda f, x: torch.func.jacrev(f)(x),
    "gradients of samples": lambda f, x: torch.func.vmap(torch.func.grad(lambda y: f(y).sum()))(x[None]),
    "hessian": lambda f, x: torch.func.hessian(lambda y: f(y).sum())(x),
}


@pytest.mark.parametrize("run", TRANSFORMS.values(), ids=TRANSFORMS.keys())
@pytest.mark.parametrize("backend", ["reference", "sm90"])
def test_transforms_are_refused_by_name(monkeypatch, backend, run):
    monkeypatch.setattr(api, "backend_for", lambda *_: (backend, "it is pretended"))
    with pytest.raises(
        RuntimeError, match="q: (is inside a transform of torch.func|has a forward-mode derivative)"
    ):
        run(attend, qkv()[0])


def test_norm_rope_is_transformed():
    """norm_rope consists of torch's own ops, so it can be transformed."""
    x, weight = qkv()[0], torch.linspace(1, 2, 64)
    norm = lambda x: fps.norm_rope(x, fps.Norm(weight), grid=GRID)  # noqa: E731
    _, tangent = torch.func.jvp(norm, (x,), (x,))
    step = 1e-3
    difference = (norm(x.double() * (1 + step)) - norm(x.double() * (1 - step))) / (2 * step)
    torch.testing.assert_close(tangent.double(), difference, rtol=1e-3, atol=1e-3)
    assert torch.equal(torch.func.vmap(norm)(x[None])[0], norm(x))


# Autocast


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@BOTH
def test_autocast_is_that_of_sdpa(config, dtype):
    """q, k and v are cast to autocast's dtype; nothing inside is cast."""
    inputs = qkv()
    want, want_lse = fps.attention(*(x.to(dtype) for x in inputs), config=config, return_lse=True, **CALL)
    with torch.autocast("cpu", dtype):
        sdpa = torch.nn.functional.scaled_dot_product_attention(*inputs)
        out, lse = fps.attention(*inputs, config=config, return_lse=True, **CALL)
    assert out.dtype == sdpa.dtype == dtype and lse.dtype == torch.float32
    assert torch.equal(out, want) and torch.equal(lse, want_lse)


def test_autocast_leaves_fp64_as_sdpa_does():
    inputs = qkv(torch.float64)
    want = fps.attention(*inputs, config=CONFIG, **CALL)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fps.attention(*inputs, config=CONFIG, **CALL), want)


def test_autocast_of_quantised_operands():
    inputs, norm = qkv(), fps.Norm(torch.linspace(1, 2, 64))
    normed = lambda x: fps.norm_rope(x, norm, grid=GRID).bfloat16()  # noqa: E731
    want = fps.attention(normed(inputs[0]), normed(inputs[1]), inputs[2].bfloat16(), config=CONFIG, **CALL)
    with torch.autocast("cpu", torch.bfloat16):
        quantized = fps.quantize_qkv(*inputs, config=CONFIG, **CALL)
        fused = fps.norm_rope_quantize(*inputs, config=CONFIG, q_norm=norm, k_norm=norm, **CALL)
        assert quantized.dtype == fused.dtype == torch.bfloat16
        assert torch.equal(fps.attention(fused), want)


@pytest.mark.parametrize("function", [reference.exact_attention, reference.emulated_attention])
def test_autocast_changes_nothing_in_the_reference(function):
    inputs = qkv(grad=True)
    call = {"grid": GRID, "config": CONFIG, "dtype": torch.float32}
    want, _ = function(*inputs, **call)
    with torch.autocast("cpu", torch.bfloat16):
        out, lse = function(*inputs, **call)
        backward = (inputs[0], inputs[1], inputs[2], out, lse, out)
        got = reference.emulated_backward(*(x.detach() for x in backward), grid=GRID, config=CONFIG)
    assert torch.equal(out, want)
    gradients = reference.emulated_backward(*(x.detach() for x in backward), grid=GRID, config=CONFIG)
    assert all(torch.equal(x, y) for x, y in zip(got, gradients, strict=True))
    for x, y in zip(
        torch.autograd.grad(out.sum(), inputs), torch.autograd.grad(want.sum(), inputs), strict=True
    ):
        assert torch.equal(x, y)


def test_apart_hands_on_what_is_raised():
    with pytest.raises(ZeroDivisionError):
        geometry.apart(lambda x: 1 / x, 0)
