"""What the API refuses, when it falls back, and what its import may touch. Runs anywhere.

Fake CUDA tensors, which have shapes and no memory, reach the checks behind the choice of a Hopper GPU;
test_runtime_gpu.py has the checks that need memory.
"""

from __future__ import annotations

import importlib.util
import math
import pickle
import threading
import warnings
from contextlib import nullcontext
from dataclasses import fields, replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import fake_kernels
import fpsattention as fps
import programs
from fpsattention import _C
from fpsattention.core import api, ops, support
from inputs import poisoned

GRID = (4, 6, 8)
CONFIG = fps.AttentionConfig(tile=(2, 3, 2), window=(1, 1, 3))
BACKENDS = pytest.mark.parametrize("backend", ["reference", "sm90"])


def tensor(*shape, dtype=torch.bfloat16, device="cpu"):
    return torch.zeros(shape or (1, 192, 2, 64), dtype=dtype, device=device)


@pytest.fixture
def device(backend, monkeypatch):
    """The device of a backend's tensors. For "sm90" it is fake and claims to be a Hopper GPU."""
    if backend == "reference":
        yield "cpu"
        return
    monkeypatch.setattr(support, "hopper_obstacle", lambda index: None)
    with FakeTensorMode():
        yield "cuda"


def attend(q, k=None, v=None, *, grid=GRID, config=CONFIG, **kwargs):
    return fps.attention(q, q if k is None else k, q if v is None else v, grid=grid, config=config, **kwargs)


def says(*words):
    """A pattern for messages that contain all words, in any order."""
    return "(?s)" + "".join(f"(?=.*{word})" for word in words)


@BACKENDS
@pytest.mark.parametrize("tensor_layout", ["NHD", "HND"])
@pytest.mark.parametrize("config", [CONFIG, fps.AttentionConfig(), None], ids=["tile", "plan", "none"])
def test_good_call(backend, device, config, tensor_layout):
    q = tensor(*((2, 192, 3, 64) if tensor_layout == "NHD" else (2, 3, 192, 64)), device=device)
    out, lse = attend(q, config=config, tensor_layout=tensor_layout, return_lse=True, backend=backend)
    assert (out.shape, out.dtype, out.device) == (q.shape, q.dtype, q.device)
    assert (lse.shape, lse.dtype, lse.device) == ((2, 3, 192), torch.float32, q.device)
    alone = attend(q, config=config, tensor_layout=tensor_layout, backend=backend)
    assert isinstance(alone, torch.Tensor) and alone.shape == q.shape


# (operand, its shape, its other properties, words of the message)
BAD_TENSORS = {
    "rank 2": ("v", (192, 64), {}, ("4", r"\[192, 64\]")),
    "rank 3": ("q", (192, 2, 64), {}, ("4", r"\[192, 2, 64\]")),
    "rank 5": ("k", (1, 1, 192, 2, 64), {}, ("4", r"\[1, 1, 192, 2, 64\]")),
    "fewer tokens": ("k", (1, 96, 2, 64), {}, ("shape", "1, 96, 2, 64")),
    "fewer heads": (
        "k",
        (1, 192, 1, 64),
        {},
        ("shape", "1, 192, 1, 64", "grouped", r"k\.repeat_interleave\(2, dim=2\)"),
    ),
    "more channels": ("v", (1, 192, 2, 128), {}, ("shape", "1, 192, 2, 128")),
    "larger batch": ("v", (2, 192, 2, 64), {}, ("shape", "2, 192, 2, 64")),
    "k of another dtype": ("k", (), {"dtype": torch.float16}, ("dtype", "torch.float16", "torch.bfloat16")),
    "v of another dtype": ("v", (), {"dtype": torch.float32}, ("dtype", "torch.float32", "torch.bfloat16")),
    "k on another device": ("k", (), {"device": "meta"}, ("device", "meta")),
    "v on another device": ("v", (), {"device": "meta"}, ("device", "meta")),
}


@BACKENDS
@pytest.mark.parametrize(("name", "shape", "changes", "words"), BAD_TENSORS.values(), ids=BAD_TENSORS.keys())
def test_bad_tensor(backend, device, name, shape, changes, words):
    operands = {n: tensor(device=device) for n in "qkv"}
    operands[name] = tensor(*shape, **{"device": device, **changes})
    with pytest.raises(ValueError, match=says(rf"\b{name}:", *words)):
        fps.attention(**operands, grid=GRID, config=CONFIG, backend=backend)


@BACKENDS
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_no_floating_point_tensor(backend, device, name):
    for value, kind in ((tensor(dtype=torch.int32, device=device), "int32"), ([1.0], "list"), (None, "None")):
        operands = {n: tensor(device=device) for n in "qkv"}
        operands[name] = value
        with pytest.raises(TypeError, match=says(rf"\b{name}:", kind)):
            fps.attention(**operands, grid=GRID, config=CONFIG, backend=backend)


@BACKENDS
def test_heads_first_called_nhd(backend, device):
    """The most likely mistake: it reads as 192 heads of 2 tokens, and the grid has 192 tokens."""
    with pytest.raises(ValueError, match=says(r"\bq:", "2 tokens", "NHD", "192")):
        attend(tensor(1, 2, 192, 64, device=device), backend=backend)


BAD_ARGUMENTS = {
    "grid of other tokens": ({"grid": (4, 6, 9)}, ValueError, ("grid", r"\(4, 6, 9\)", "192", "216")),
    "grid of two axes": ({"grid": (24, 8)}, ValueError, ("grid", r"\(24, 8\)", "three")),
    "grid of floats": ({"grid": (4, 6, 8.0)}, TypeError, ("grid", r"8\.0")),
    "grid below zero": ({"grid": (-4, -6, 8)}, ValueError, ("grid", "-4")),
    "grid a number": ({"grid": 192}, TypeError, ("grid", "192")),
    "unknown layout": ({"tensor_layout": "BHLD"}, ValueError, ("tensor_layout", "BHLD", "NHD", "HND")),
    "unknown backend": ({"backend": "sm100"}, ValueError, ("backend", "sm100", "sm90", "reference")),
    "scale of zero": ({"scale": 0.0}, ValueError, ("scale", r"0\.0", "positive")),
    "scale below zero": ({"scale": -0.125}, ValueError, ("scale", r"-0\.125", "positive")),
    "scale of nan": ({"scale": math.nan}, ValueError, ("scale", "nan")),
    "scale of inf": ({"scale": math.inf}, ValueError, ("scale", "inf")),
    "scale not of fp32": ({"scale": 1e300}, ValueError, ("scale", r"1e\+300", r"2\*\*126")),
    "scale a truth value": ({"scale": True}, TypeError, ("scale", "True", "number")),
    "config a schedule": (
        {"config": fps.StepSchedule(CONFIG, CONFIG, CONFIG)},
        TypeError,
        ("config", "AttentionConfig", "StepSchedule", r"schedule\.at"),
    ),
    "scale a string": ({"scale": "auto"}, (ValueError, TypeError), ("scale", "auto")),
    "deterministic a string": ({"deterministic": "yes"}, TypeError, ("deterministic", "yes", "None")),
    "attn_mask": ({"attn_mask": None}, TypeError, ("attn_mask", "scaled_dot_product_attention", "window")),
    "is_causal": (
        {"is_causal": False},
        TypeError,
        ("is_causal", "scaled_dot_product_attention", "both sides"),
    ),
    "dropout_p": (
        {"dropout_p": 0.1},
        TypeError,
        ("dropout_p", "scaled_dot_product_attention", "leave it out"),
    ),
    "enable_gqa": ({"enable_gqa": True}, TypeError, ("enable_gqa", "scaled_dot_product_attention", "repeat")),
    "unknown argument": ({"mask": None}, TypeError, ("unexpected keyword argument", "mask")),
}


@BACKENDS
@pytest.mark.parametrize(("change", "error", "words"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS.keys())
def test_bad_argument(backend, device, change, error, words):
    with pytest.raises(error, match=says(*words)):
        attend(tensor(device=device), **{"backend": backend, **change})


BAD_CONFIGS = {
    "tile over 512 tokens": ({"tile": (8, 9, 8)}, ValueError, ("tile", r"\(8, 9, 8\)", "576", "512")),
    "tile of zero": ({"tile": (2, 0, 2)}, ValueError, ("tile", r"\(2, 0, 2\)")),
    "tile below zero": ({"tile": (2, -3, 2)}, ValueError, ("tile", "-3")),
    "tile of two axes": ({"tile": (2, 3)}, ValueError, ("tile", r"\(2, 3\)", "three")),
    "tile of floats": ({"tile": (2, 3, 2.5)}, TypeError, ("tile", r"2\.5")),
    "even window": ({"window": (1, 1, 2)}, ValueError, ("window", r"\(1, 1, 2\)", "odd", r"\b1\b", r"\b3\b")),
    "even for a head": ({"window": ((1, 1, 1), (1, 1, 2))}, ValueError, ("window", r"\(1, 1, 2\)", "odd")),
    "window of zero": ({"window": (1, 0, 1)}, ValueError, ("window", r"\(1, 0, 1\)")),
    "window of two axes": ({"window": (1, 3)}, ValueError, ("window", r"\(1, 3\)", "three")),
    "window of floats": ({"window": (1, 1, 3.0)}, TypeError, ("window", r"3\.0")),
    "windows for three heads": ({"window": ((1, 1, 1),) * 3}, ValueError, ("window", "3", "2", "heads")),
    "window for one head": ({"window": ((1, 1, 1),)}, None, ()),
    "unknown border": ({"border": "wrap"}, ValueError, ("border", "wrap", "clamp", "truncate")),
    "unknown quant": ({"quant": "int8"}, ValueError, ("quant", "int8", "fp8", "none")),
    "brick no multiple": ({"quant_tile": (2, 4, 2)}, ValueError, ("quant_tile", r"\(2, 4, 2\)", "multiple")),
    "brick below tile": ({"quant_tile": (2, 1, 2)}, ValueError, ("quant_tile", r"\(2, 1, 2\)", "multiple")),
    "smooth_k a string": ({"smooth_k": "yes"}, TypeError, ("smooth_k", "yes")),
}  # fmt: skip


@BACKENDS
@pytest.mark.parametrize(("change", "error", "words"), BAD_CONFIGS.values(), ids=BAD_CONFIGS.keys())
def test_bad_config(backend, device, change, error, words):
    """Some are refused when the config is made, some when it meets a grid; all name the field."""

    def call():
        config = fps.AttentionConfig(**{"tile": (2, 3, 2), **change})
        return attend(tensor(device=device), config=config, backend=backend)

    if error is None:
        assert call().shape == (1, 192, 2, 64)
        return
    with pytest.raises(error, match=says(*words)):
        call()


@BACKENDS
@pytest.mark.parametrize("tensor_layout", ["NHD", "HND"])
def test_quantized_once(backend, device, tensor_layout):
    q = tensor(*((2, 192, 3, 64) if tensor_layout == "NHD" else (2, 3, 192, 64)), device=device)
    call = {"grid": GRID, "config": CONFIG, "tensor_layout": tensor_layout, "backend": backend}
    quantized = fps.quantize_qkv(q, q, q, **call)
    assert (quantized.backend, quantized.scale, quantized.dtype) == (backend, 0.125, q.dtype)
    out, lse = fps.attention(quantized, return_lse=True)
    assert (out.shape, out.dtype, lse.shape) == (q.shape, q.dtype, (2, 3, 192))
    dense = replace(CONFIG, window=None)
    assert fps.attention(quantized, config=dense).shape == q.shape
    # Repeating the object's own values is allowed.
    assert fps.attention(quantized, grid=GRID, scale=0.125, tensor_layout=tensor_layout).shape == q.shape


def test_quantized_once_is_the_plain_call():
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(1, 192, 2, 64, generator=generator) for _ in range(3))
    quantized = fps.quantize_qkv(q, k, v, grid=GRID, config=CONFIG, backend="reference")
    for config in (CONFIG, replace(CONFIG, window=None, border="truncate")):
        want = fps.attention(q, k, v, grid=GRID, config=config, backend="reference")
        assert torch.equal(fps.attention(quantized, config=config), want)


BAD_REPEATS = {
    "k": (lambda q: {"k": q}, TypeError, (r"\bk:", "QuantizedQKV")),
    "v": (lambda q: {"v": q}, TypeError, (r"\bv:", "QuantizedQKV")),
    "grid": (lambda q: {"grid": (8, 6, 4)}, ValueError, ("grid", r"\(8, 6, 4\)", r"\(4, 6, 8\)")),
    "scale": (lambda q: {"scale": 0.5}, ValueError, ("scale", r"0\.5", r"0\.125")),
    "layout": (lambda q: {"tensor_layout": "HND"}, ValueError, ("tensor_layout", "HND", "NHD")),
    "backend": (lambda q: {"backend": "sm90"}, ValueError, ("backend", "sm90", "reference")),
    "deterministic": (
        lambda q: {"deterministic": True},
        TypeError,
        ("deterministic", "backward", "leave it out"),
    ),
    "not deterministic": (lambda q: {"deterministic": False}, TypeError, ("deterministic", "leave it out")),
    "tile": (
        lambda q: {"config": replace(CONFIG, tile=(4, 3, 2))},
        ValueError,
        ("config", "tile", r"\(4, 3, 2\)"),
    ),
    "smooth_k": (
        lambda q: {"config": replace(CONFIG, smooth_k=True)},
        ValueError,
        ("config", "smooth_k", "True"),
    ),
    "quant": (lambda q: {"config": replace(CONFIG, quant="none")}, ValueError, ("config", "quant", "none")),
    "config": (lambda q: {"config": "dense"}, TypeError, ("config", "dense", "AttentionConfig")),
    "grid a number": (lambda q: {"grid": 192}, TypeError, ("grid", "192", "three")),
}


@pytest.mark.parametrize(("change", "error", "words"), BAD_REPEATS.values(), ids=BAD_REPEATS.keys())
def test_quantized_otherwise(change, error, words):
    q = tensor()
    quantized = fps.quantize_qkv(q, q, q, grid=GRID, config=CONFIG, backend="reference")
    with pytest.raises(error, match=says(*words)):
        fps.attention(quantized, **change(q))


REPLACED = {
    "grid": (8, 6, 4),
    "config": replace(CONFIG, tile=(3, 2, 2)),  # equal in size, so the operands' shapes do not reveal it
    "scale": 0.5,
    "tensor_layout": "HND",
    "dtype": torch.float16,
    "shape": (1, 96, 4, 64),
    "backend": "torch",
    "prefix_len": 1,
    "suffix_len": 1,
    "prefix_valid": torch.ones(1, dtype=torch.int32),
    "suffix_valid": torch.ones(1, dtype=torch.int32),
    "operands": (torch.zeros(1, 192, 2, 64, dtype=torch.bfloat16),) * 3,
    "made_with": (),
}


@BACKENDS
@pytest.mark.parametrize(("name", "value"), REPLACED.items(), ids=REPLACED.keys())
def test_replaced_field_of_quantized(backend, device, name, value):
    """The operands are of one grid, tile and so on: under others the kernel would read past their end."""
    q = tensor(device=device)
    quantized = fps.quantize_qkv(q, q, q, grid=GRID, config=CONFIG, backend=backend)
    assert fps.attention(replace(quantized)).shape == q.shape, "with the same fields"
    what = "has not made" if name == "made_with" else f"whose {name} was replaced"
    with pytest.raises(ValueError, match=says("q: is a QuantizedQKV", what, "quantize_qkv")):
        fps.attention(replace(quantized, **{name: value}))


def test_quantized_are_compared_by_identity():
    q = tensor()
    one, other = (fps.quantize_qkv(q, q, q, grid=GRID, config=CONFIG, backend="reference") for _ in range(2))
    assert one == one and one != other and len({one, other}) == 2
    copy = pickle.loads(pickle.dumps(one))
    assert torch.equal(fps.attention(copy), fps.attention(one))


def test_every_field_of_quantized_is_guarded():
    assert {x.name for x in fields(fps.QuantizedQKV)} == REPLACED.keys()


def test_quantized_with_what_none_stands_for():
    """Naming the planned tile, or a brick of one tile, does not change the rounding."""
    q = tensor()
    quantized = fps.quantize_qkv(q, q, q, grid=GRID, backend="reference")
    planned = fps.plan(GRID).best.tile
    config = fps.AttentionConfig(planned, quant_tile=planned)
    assert torch.equal(fps.attention(quantized, config=config), fps.attention(quantized))


def test_window_that_does_not_fit_is_not_quantized():
    q = tensor()
    with pytest.raises(ValueError, match=says("window", "5 windows", "2 heads")):
        config = fps.AttentionConfig(window=((1, 1, 1),) * 5)
        fps.quantize_qkv(q, q, q, grid=GRID, config=config, backend="reference")
    with pytest.raises(ValueError, match=says("window", r"\(1, 2, 1\)", "odd")):
        config = fps.AttentionConfig((1, 1, 1), (1, 2, 1))
        fps.quantize_qkv(q, q, q, grid=GRID, config=config, backend="reference")


def test_nothing_to_quantize():
    q = tensor()
    with pytest.raises(ValueError, match=says("config", "none", "fp8")):
        fps.quantize_qkv(q, q, q, grid=GRID, config=fps.AttentionConfig(quant="none"))


def test_quant_tile_that_does_not_fit_the_planned_tile():
    planned = fps.plan(GRID).best.tile
    config = fps.AttentionConfig(quant_tile=tuple(2 * t + 1 if t > 1 else t for t in planned))
    assert max(planned) > 1
    with pytest.raises(ValueError, match=says("quant_tile", "multiple")):
        attend(tensor(), config=config, backend="reference")


@pytest.mark.parametrize("head_dim", [32, 96, 256])
def test_sm90_head_dims(monkeypatch, head_dim):
    monkeypatch.setattr(support, "hopper_obstacle", lambda index: None)
    with FakeTensorMode():
        q = tensor(1, 192, 2, head_dim, device="cuda")
        with pytest.raises(
            RuntimeError, match=says('backend="sm90"', "head_dim", "64", "128", f"got {head_dim}")
        ):
            attend(q, backend="sm90")
        name, reason = fps.backend_for(q, CONFIG)
        assert name == "reference" and str(head_dim) in reason


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_sm90_dtypes(monkeypatch, dtype):
    monkeypatch.setattr(support, "hopper_obstacle", lambda index: None)
    with FakeTensorMode():
        q = tensor(dtype=dtype, device="cuda")
        with pytest.raises(RuntimeError, match=says('backend="sm90"', "dtype", str(dtype), "bfloat16")):
            attend(q, backend="sm90")
        name, reason = fps.backend_for(q, CONFIG)
        assert name == "reference" and str(dtype) in reason


@pytest.mark.parametrize("capability", [80, 89, 100, 120])
def test_sm90_devices(monkeypatch, capability):
    """The kernels are built for one architecture; a newer GPU cannot run them either."""
    with FakeTensorMode():
        q = tensor(device="cuda")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(support, "_capability", lambda index: divmod(capability, 10))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Some GPU")
        with pytest.raises(RuntimeError, match=says('backend="sm90"', "Hopper", "9.0", f"{capability / 10}")):
            attend(q, backend="sm90")
        assert fps.backend_for(q, CONFIG)[0] == "reference"


def test_sm90_on_the_cpu():
    with pytest.raises(RuntimeError, match=says('backend="sm90"', "CUDA", "cpu")):
        attend(tensor(), backend="sm90")
    name, reason = fps.backend_for(tensor(), CONFIG)
    assert name == "reference" and "cpu" in reason


def test_backend_for_names_what_would_run(monkeypatch):
    monkeypatch.setattr(support, "hopper_obstacle", lambda index: None)
    unquantized = fps.AttentionConfig(quant="none")
    assert fps.backend_for(tensor(), CONFIG, "reference")[0] == "reference"
    assert fps.backend_for(tensor(), unquantized)[0] == "reference"
    with FakeTensorMode():
        q = tensor(device="cuda")
        assert fps.backend_for(q, CONFIG)[0] == fps.backend_for(q, CONFIG, "sm90")[0] == "sm90"
        assert fps.backend_for(q, CONFIG, "reference")[0] == "reference"
        assert fps.backend_for(q, unquantized)[0] == "torch"
    with pytest.raises(ValueError, match=says("backend", "fast")):
        fps.backend_for(tensor(), CONFIG, "fast")


@pytest.fixture
def pretended_kernel(monkeypatch):
    """Fake tensors on the CPU, with the kernel as the chosen backend, whose ops have fakes. Without CUDA, a fake CUDA
    tensor cannot require a gradient.
    """
    monkeypatch.setattr(api, "backend_for", lambda *_: ("sm90", "it is pretended"))
    with FakeTensorMode():
        yield


@pytest.mark.parametrize("smooth_k", [False, True])
@pytest.mark.parametrize("names", ["q", "k", "v", "qk", "qv", "kv", "qkv"])
def test_gradient_of_the_kernel(names, smooth_k, pretended_kernel):
    """Gradients of out and lse reach those of q, k, v that require one, and no others."""
    config = replace(CONFIG, smooth_k=smooth_k)
    operands = {n: tensor().requires_grad_(n in names) for n in "qkv"}
    out, lse = fps.attention(**operands, grid=GRID, config=config, return_lse=True)
    (out.float().sum() + lse.sum()).backward()
    for name, x in operands.items():
        assert (x.grad is not None) == (name in names)
        assert x.grad is None or (x.grad.shape, x.grad.dtype) == (x.shape, x.dtype)
    with torch.no_grad():
        assert not fps.attention(**operands, grid=GRID, config=config).requires_grad


def test_second_derivative_of_the_kernel_is_refused(pretended_kernel):
    q, k, v = (tensor().requires_grad_() for _ in range(3))
    out = fps.attention(q, k, v, grid=GRID, config=CONFIG)
    (first,) = torch.autograd.grad(out.float().square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match=says("first derivative", "create_graph", "none")):
        first.float().sum().backward()


@pytest.mark.parametrize("quant", ["fp8", "none"])
def test_default_device_and_mode_of_the_first_call(quant):
    """Tensors cached between calls are on the CPU, and can be saved for a backward."""
    code = f"""
import torch, fpsattention as fps
from fpsattention.core import flex
config = fps.AttentionConfig(tile=(2, 2, 2), window=(1, 1, 1), quant={quant!r})
q = torch.randn(1, 32, 1, 64)
torch.set_default_device("meta")
resolved = config.resolve((2, 4, 4), 1)
flex._run = lambda q, k, v, *_: (q + k + v, q.sum(-1))  # uncompiled it has no gradient
def attend(q):
    if {quant!r} == "fp8":
        return fps.attention(q, q, q, grid=(2, 4, 4), config=config, backend="reference")
    return flex.flex_attention(q, q, q, resolved, 0.125, "NHD")[0]
with torch.inference_mode():
    attend(q)
q.requires_grad_()
attend(q).sum().backward()
assert q.grad.isfinite().all()
print(len(str(fps.plan((4, 6, 8)).explain())) > 0)
"""
    assert run_python(code) == "True"


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_quantised_operands_have_no_gradient(name):
    operands = {n: tensor().requires_grad_(n == name) for n in "qkv"}
    call = {"grid": GRID, "config": CONFIG, "backend": "reference"}
    with pytest.raises(RuntimeError, match=says("gradient", "no_grad", "attention")):
        fps.quantize_qkv(**operands, **call)
    with torch.no_grad():
        quantized = fps.quantize_qkv(**operands, **call)
    assert not fps.attention(quantized).requires_grad


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_gradient_of_the_reference(name):
    operands = {n: tensor().requires_grad_(n == name) for n in "qkv"}
    call = {"grid": GRID, "config": CONFIG, "backend": "reference"}
    out = fps.attention(**operands, **call)
    out.sum().backward()
    assert operands[name].grad.dtype == out.dtype and operands[name].grad.shape == out.shape
    with torch.no_grad():
        assert not fps.attention(**operands, **call).requires_grad


# The ops themselves check their operands: a kernel would read past the end of wrong ones.

SIZES = GRID, 3, 0  # grid and text lengths: 195 tokens
PACKED = torch.zeros(ops.call_of(CONFIG, *SIZES, 1, 2, 64, torch.bfloat16, 0.125, "NHD").sections.end).byte()


def run(op, arguments: dict):
    """The op's work on a GPU, up to the launch."""
    return op._init_fn(**arguments)


def packed_arguments(**changes):
    """Arguments of `attend` for 195 tokens, on the CPU: legal up to the launch."""
    call = dict(zip(("grid", "prefix_len", "suffix_len"), SIZES, strict=True))
    call |= {"config": CONFIG.spec, "scale": 0.125, "tensor_layout": "NHD"}
    call |= {"prefix_valid": torch.ones(1, dtype=torch.int32), "suffix_valid": None}
    return {"packed": PACKED, "key_indices": None, "key_counts": None} | call | changes


SHAPE = {"batch": 1, "heads": 2, "head_dim": 64, "dtype": torch.bfloat16}
BAD_OPERANDS = {
    "another grid": ({"grid": (60, 60, 60)}, "packed"),
    "another tile": ({"config": fps.AttentionConfig(tile=(1, 1, 1)).spec}, "packed"),
    "another rounding": ({"config": replace(CONFIG, smooth_k=True).spec}, "packed"),
    "other text tokens": ({"prefix_len": 300}, "packed"),
    "fewer heads": ({"heads": 1}, "packed"),
    "cut": ({"packed": PACKED[1:]}, "packed"),
    "apart": ({"packed": torch.zeros(2 * len(PACKED), dtype=torch.uint8)[::2]}, "packed"),
    "as fp32": ({"packed": PACKED.float()}, "packed"),
    "not on 16 bytes": ({"packed": torch.zeros(len(PACKED) + 1, dtype=torch.uint8)[1:]}, "packed"),
    "head_dim": ({"head_dim": 80}, "q"),
    "counts in int64": ({"prefix_valid": torch.ones(1, dtype=torch.int64)}, "prefix_valid"),
    "counts of two samples": ({"prefix_valid": torch.ones(2, dtype=torch.int32)}, "prefix_valid"),
    "counts on another device": ({"prefix_valid": torch.ones(1, dtype=torch.int32, device="meta")}, "prefix_valid"),
    "counts of no section": ({"suffix_valid": torch.ones(1, dtype=torch.int32)}, "suffix_valid"),
    "fp32 out": ({"dtype": torch.float32}, "q"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "name"), BAD_OPERANDS.values(), ids=BAD_OPERANDS.keys())
def test_operands_of_attend_are_checked(changes, name):
    with pytest.raises(ValueError, match=rf"^{name}: "):
        run(ops.attend, SHAPE | packed_arguments(**changes))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("dout", torch.zeros(1, 195, 2, 64)),
        ("dout", torch.zeros(1, 192, 2, 64, dtype=torch.bfloat16)),
        ("out", torch.zeros(1, 195, 64, 2, dtype=torch.bfloat16).mT),
        ("out", torch.zeros(1, 192, 2, 64, dtype=torch.bfloat16)),
        ("out", torch.zeros(195, 2, 64, dtype=torch.bfloat16)),
        ("lse", torch.zeros(1, 2, 195, dtype=torch.float64)),
        ("lse", torch.zeros(1, 195, 2).mT),
        ("dlse", torch.zeros(1, 2, 195, 1)),
        ("packed", PACKED[1:]),
        ("prefix_valid", torch.ones(1)),
    ],
)
def test_operands_of_the_backward_are_checked(name, value):
    rows = {x: torch.zeros(1, 195, 2, 64, dtype=torch.bfloat16) for x in ("out", "dout")}
    rows |= {x: torch.zeros(1, 2, 195) for x in ("lse", "dlse")}
    with pytest.raises(ValueError, match=rf"^{name}: "):
        run(ops.attention_backward, packed_arguments() | rows | {"deterministic": False, name: value})


@pytest.mark.parametrize("op", [ops.quantize, ops.attention])
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("q", {"q": tensor()[0]}),
        ("k", {"k": tensor(1, 96, 2, 64)}),
        ("v", {"v": tensor(dtype=torch.float16)}),
        ("v", {"v": tensor(device="meta")}),
        ("q", {"grid": (4, 6, 9)}),
        ("config", {"config": replace(CONFIG, quant="none").spec}),
        ("config", {"config": "garbage"}),
        ("suffix_valid", {"suffix_valid": torch.ones(1, dtype=torch.int32)}),
        ("prefix_valid", {"grid": (4, 6, 7), "prefix_len": 24, "prefix_valid": torch.ones(1)}),
    ],
)
def test_operands_of_quantize_are_checked(op, name, changes):
    call = {"grid": GRID, "prefix_len": 0, "suffix_len": 0, "config": CONFIG.spec, "scale": 1.0}
    call |= {"tensor_layout": "NHD", "prefix_valid": None, "suffix_valid": None}
    if op is ops.attention:
        call |= {"deterministic": False, "key_indices": None, "key_counts": None}
    with pytest.raises(ValueError, match=rf"^{name}: "):
        run(op, dict.fromkeys("qkv", tensor()) | call | changes)


TILES = math.prod(CONFIG.resolve(GRID, 2).geometry.tiles)
INDICES, COUNTS = torch.zeros(1, 2, TILES, 3).int(), torch.ones(1, 2, TILES).int()


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("config", {"config": replace(CONFIG, window=(1, 1, 1)).spec}),
        ("key_counts", {"key_counts": None}),
        ("key_indices", {"key_indices": None}),
        ("key_indices", {"key_indices": INDICES.long()}),
        ("key_indices", {"key_indices": INDICES[0]}),
        ("key_indices", {"key_indices": INDICES[:, :, 1:]}),
        ("key_indices", {"key_indices": torch.zeros(1, 3, TILES, 3).int()}),
        ("key_indices", {"key_indices": torch.zeros(1, 2, 3, TILES).int().mT}),
        ("key_indices", {"key_indices": INDICES.to("meta")}),
        ("key_counts", {"key_counts": COUNTS.float()}),
        ("key_counts", {"key_counts": COUNTS[:, :1]}),
        ("key_counts", {"key_counts": torch.ones(1, TILES, 2).int().mT}),
    ],
)
@pytest.mark.parametrize("op", [ops.attend, ops.attention, ops.attention_backward])
def test_lists_of_key_tiles_are_checked(op, name, changes):
    lists = {"key_indices": INDICES, "key_counts": COUNTS, "config": replace(CONFIG, window=None).spec}
    call = packed_arguments(**lists | changes)
    if op is ops.attend:
        call |= SHAPE
    elif op is ops.attention:
        del call["packed"]
        call |= dict.fromkeys("qkv", tensor(1, 195, 2, 64)) | {"deterministic": False}
    else:
        rows = {x: torch.zeros(1, 195, 2, 64, dtype=torch.bfloat16) for x in ("out", "dout")}
        call |= rows | {x: torch.zeros(1, 2, 195) for x in ("lse", "dlse")} | {"deterministic": False}
    with pytest.raises(ValueError, match=rf"^{name}: "):
        run(op, call)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        (r"weights\[0\]", {"weights": [torch.ones(63), torch.ones(64)]}),
        (r"weights\[1\]", {"weights": [torch.ones(64), torch.ones(128)]}),
        ("weights", {"weights": [torch.ones(64)]}),
        (r"text_weights\[0\]", {"text_weights": [torch.ones(128), torch.ones(64)]}),
        ("text_weights", {"text_weights": [torch.ones(64)] * 2, "weights": []}),
        (r"biases\[1\]", {"biases": [torch.ones(64), torch.ones(63)]}),
        (r"weights\[0\]", {"weights": [torch.ones(128)] * 2, "biases": [torch.ones(64)] * 2}),
        (r"rope\[0\]", {"rope": [torch.ones(192, 3, 32, 2)]}),
        ("q", {"suffix_len": 3}),
        ("config", {"config": replace(CONFIG, smooth_k=True).spec}),
        (r"rope\[1\]", {"rope": [torch.ones(n, 11, 2) for n in (4, 5, 8)]}),
        (r"rope\[0\]", {"rope": [torch.ones(4), *(torch.ones(n, 16, 2) for n in (6, 8))]}),
        ("rope", {"rope": [torch.ones(n, 11, 2) for n in GRID]}),
    ],
)
def test_operands_of_norm_rope_quantize_are_checked(name, changes):
    call = {"prefix_valid": None, "suffix_valid": None, "prefix_len": 0, "suffix_len": 0}
    call |= {"weights": [torch.ones(64)] * 2, "text_weights": [], "biases": [], "eps": 1e-6, "rope": []}
    call |= {"grid": GRID, "config": CONFIG.spec, "scale": 1.0, "tensor_layout": "NHD"}
    with pytest.raises(ValueError, match=rf"^{name}: "):
        run(ops.norm_rope_quantize, dict.fromkeys("qkv", tensor()) | call | changes)


@pytest.fixture
def launches(monkeypatch):
    """The grid, text lengths and layout of each eager call that would launch; nothing runs."""
    found = []

    def launch(call, q, *_, with_lse=True):
        found.append((call.resolved.grid, call.resolved.prefix_len, call.resolved.suffix_len, call.shape))
        return (
            torch.zeros(call.shape, dtype=call.dtype),
            torch.zeros(call.lse_shape) if with_lse else None,
            None,
        )

    monkeypatch.setattr(api, "backend_for", lambda *_: ("sm90", "it is pretended"))
    monkeypatch.setattr(ops, "launch_attention", launch)
    return found


def test_sizes_given_as_tensors_are_read_in_every_call(launches):
    """A tensor may change between two calls; what it held then must not decide what a kernel reads now."""
    length, height = torch.tensor(300), torch.tensor(6)
    for text, h in ((300, 6), (3, 6), (3, 2)):
        length.fill_(text), height.fill_(h)
        q = tensor(1, text + 4 * h * 8, 2, 64)
        out = fps.attention(q, q, q, grid=(4, height, 8), config=CONFIG, prefix_len=length)
        assert out.shape == q.shape and launches[-1] == ((4, h, 8), text, 0, tuple(q.shape))
        assert all(type(n) is int for n in (*launches[-1][0], *launches[-1][1:3]))


def test_eager_calls_return_what_is_asked_for(launches):
    q = tensor()
    assert isinstance(fps.attention(q, q, q, grid=GRID, config=CONFIG), torch.Tensor)
    out, lse = fps.attention(q, q, q, grid=GRID, config=CONFIG, return_lse=True)
    assert out.shape == q.shape and lse.shape == (1, 2, 192) and len(launches) == 2


class Counted(torch.Tensor):
    """A subclass, whose own class says what torch does with it."""


@pytest.mark.parametrize(
    "watcher", ["grad", "dispatch mode", "function mode", "trace", "profiler", "subclass", "counts"]
)
def test_what_watches_sees_the_op(launches, watcher):
    """Past the op torch would record uninitialised memory as the result, or lose a gradient."""
    q, counts, context = tensor(1, 195, 2, 64), torch.ones(1, dtype=torch.int32), nullcontext()
    if watcher == "grad":
        q.requires_grad_()
    elif watcher == "dispatch mode":
        context = FlopCounterMode(display=False)
    elif watcher == "function mode":
        context = torch.device("cpu")
    elif watcher == "profiler":
        context = torch.profiler.profile()
    elif watcher == "subclass":
        q = q.as_subclass(Counted)
    elif watcher == "counts":
        counts = counts.as_subclass(Counted)

    def call(q):
        return fps.attention(q, q, q, grid=GRID, config=CONFIG, prefix_len=3, prefix_valid=counts)

    with fake_kernels.on_cpu(), context:
        if watcher == "trace":
            graph = torch.jit.trace(call, q, check_trace=False).graph
            assert "fpsattention::attention" in str(graph)
        else:
            call(q)
    assert not launches


def test_modes_belong_to_their_thread(launches):
    """One thread leaves its mode while another is still in its own."""
    entered, left = threading.Event(), threading.Event()

    def first():
        with FlopCounterMode(display=False):
            assert entered.wait(60)
        left.set()

    thread = threading.Thread(target=first)
    thread.start()
    with FlopCounterMode(display=False):
        entered.set()
        assert left.wait(60)
        assert ops.is_watched(tensor())
    thread.join()
    assert not ops.is_watched(tensor())


def test_the_backward_makes_no_gradient_of_the_operands():
    """It would take as much memory as they do."""
    made = []

    class Log(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            made.extend(
                x.dtype
                for x in (result if isinstance(result, tuple) else (result,))
                if isinstance(x, torch.Tensor)
            )
            return result

    q = tensor().requires_grad_()
    with fake_kernels.on_cpu():
        rest = list(GRID), 0, 0, CONFIG.spec, 0.125, "NHD", False
        for output in (0, 1):
            results = ops.attention(q, q, q, None, None, None, None, *rest)
            with Log():
                results[output].sum().backward()
            assert torch.uint8 not in made and q.grad is not None


def test_the_backward_reads_what_was_saved_once():
    """A checkpoint computes saved tensors anew, for one reading."""
    q = tensor().requires_grad_()
    rest = list(GRID), 0, 0, CONFIG.spec, 0.125, "NHD", False

    def call(q):
        return ops.attention(q, q, q, None, None, None, None, *rest)[0]

    with fake_kernels.on_cpu():
        checkpoint(call, q, use_reentrant=False).sum().backward()
    assert q.grad is not None and q.grad.shape == q.shape


def test_a_launch_names_what_is_not_set():
    """A kernel would read address 0."""
    call = ops.call_of(CONFIG, *SIZES, 1, 2, 64, torch.bfloat16, 0.125, "NHD")
    for launch, params, missing in (
        (_C.quantize, call.quantize_params, "q"),
        (_C.attn_fwd, call.forward_params, "q_blocks"),
        (_C.attn_bwd, call.backward_params, "q_blocks"),
    ):
        with pytest.raises(ValueError, match=f"^{missing} is not set"):
            launch(params, 0, 0)
        with pytest.raises(AttributeError):
            params.no_such_field = 1


@BACKENDS
@pytest.mark.parametrize(("batch", "grid"), [(0, (4, 6, 8)), (1, (0, 6, 8)), (1, (4, 0, 0))])
def test_empty(backend, device, batch, grid):
    q = tensor(batch, math.prod(grid), 2, 64, device=device)
    out, lse = attend(q, grid=grid, return_lse=True, backend=backend)
    assert out.shape == q.shape and lse.shape == (batch, 2, math.prod(grid))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.uint8], ids=str)
def test_poison_works(dtype):
    """The helper of the GPU tests, here on the CPU. It restores the settings it changes."""
    before = torch.are_deterministic_algorithms_enabled()
    with poisoned():
        x = torch.empty(1000, dtype=dtype)
    assert (x == 255).all() if dtype == torch.uint8 else x.isnan().all()
    assert torch.are_deterministic_algorithms_enabled() == before


def test_strict_mode_refuses_the_fallback(monkeypatch):
    """Even after a lenient call has warned of the fallback."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        monkeypatch.delenv("FPSATTENTION_STRICT", raising=False)
        attend(tensor())
    monkeypatch.setenv("FPSATTENTION_STRICT", "1")
    for _ in range(2):
        with pytest.raises(RuntimeError, match=says("FPSATTENTION_STRICT", "cpu")):
            attend(tensor())
    assert attend(tensor(), backend="reference").shape == (1, 192, 2, 64), "asked for: no fallback"
    monkeypatch.setenv("FPSATTENTION_STRICT", "true")
    with pytest.raises(ValueError, match=says("FPSATTENTION_STRICT", "true", "0 or 1")):
        attend(tensor())


def run_python(code, **env):
    """stdout of a fresh interpreter, which sees no GPU."""
    done = programs.run_python("-c", code, env=programs.environment(CUDA_VISIBLE_DEVICES="", **env))
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


CALL = """
import torch, warnings, fpsattention as fps
q = torch.zeros(1, 8, 1, 64, dtype=torch.bfloat16)
def call(**kwargs):
    return fps.attention(q, q, q, grid=(2, 2, 2), config=fps.AttentionConfig(tile=(2, 2, 2)), **kwargs)
"""


def test_fallback_warns_once():
    code = (
        CALL
        + """
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    call(backend="reference")
    assert not caught, "it was asked for"
    call(), call(), call()
assert [w.category for w in caught] == [UserWarning], caught
print(caught[0].message)
"""
    )
    assert "cpu" in run_python(code)


@pytest.mark.parametrize(
    ("call", "quant"), [(fps.attention, "fp8"), (fps.attention, "none"), (fps.quantize_qkv, "fp8")]
)
def test_fallback_warns_of_the_callers_line(call, quant, monkeypatch):
    monkeypatch.delenv("FPSATTENTION_STRICT", raising=False)
    api._warn_once.cache_clear()
    q = tensor()
    with pytest.warns(UserWarning, match="cpu") as caught:
        call(q, q, q, grid=GRID, config=replace(CONFIG, quant=quant))
    assert caught[0].filename == __file__


def test_import_touches_no_gpu():
    """The package imports without a GPU. On any machine its import does not start CUDA, and does not load modules that
    older versions of torch lack.
    """
    code = """
import sys, torch
before = set(sys.modules)
import fpsattention
new = set(sys.modules) - before
assert not torch.cuda.is_initialized()
late = ("torch.nn.attention", "av", "rich", "matplotlib")
assert not [m for m in new if m.startswith(late)], new
print(fpsattention.__version__)
"""
    assert run_python(code) == fps.__version__


def test_import_needs_no_distributed_torch():
    """torch can be built without distributed, and its differentiable collectives are in a private module."""
    code = """
import sys
sys.modules["torch.distributed._functional_collectives"] = None
import torch, fpsattention as fps
assert "fpsattention.parallel" not in sys.modules
q = torch.zeros(1, 8, 1, 64)
print(fps.attention(q, q, q, grid=(2, 2, 2), backend="reference").shape[1])
import fpsattention.parallel
try:
    fps.something
except AttributeError as error:
    assert "fpsattention" in str(error) and "something" in str(error)
"""
    assert run_python(code) == "8"


def test_compiled_module_needs_neither_torch_nor_cuda():
    """The module loads alone: its symbols resolve without torch's libraries, the CUDA runtime or the driver."""
    origin = importlib.util.find_spec("fpsattention._C").origin
    code = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("_C", {origin!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
assert "torch" not in sys.modules
maps = open("/proc/self/maps").read()
assert not [x for x in ("libtorch", "libc10", "libcudart", "libcuda.so") if x in maps]
print(module.BLOCK)
"""
    assert run_python(code) == "128"
