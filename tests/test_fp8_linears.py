"""use_fp8_linears: which layers of the hosts' transformers multiply in FP8, and what they compute."""

from __future__ import annotations

import re
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._inductor.utils import run_and_get_code

import fpsattention as fps
from fpsattention.integrations.diffusers import use_fp8_linears
from fpsattention.integrations.fp8_linear import apply_all
from test_diffusers import diffusers, enable, tiny  # skips all without diffusers
from test_general import tiny as tiny_transformers

quantization = pytest.importorskip("torchao.quantization")

pytestmark = [
    pytest.mark.usefixtures("one_thread", "fp8_on_cpu"),
    pytest.mark.filterwarnings("ignore:fpsattention runs its reference"),
]


def transformer_of(name: str) -> nn.Module:
    return tiny.MODELS[name]().pipe.transformer.to(torch.bfloat16)


def is_fp8(linear: nn.Linear) -> bool:
    return type(linear.weight.data).__name__ == "Float8Tensor"


@pytest.mark.parametrize(
    "name", [*(x for x in tiny.MODELS if x != "mochi"), "wan_vace", "consisid", "hunyuan15"]
)
def test_linear_layers_of_the_blocks_and_no_others(name):
    if name in tiny.MODELS:
        transformer = transformer_of(name)
    else:
        transformer = tiny_transformers.CASES[name]().transformer.to(torch.bfloat16)
    use_fp8_linears(transformer)
    lists = tuple(f"{x}." for x, y in transformer.named_children() if isinstance(y, nn.ModuleList))
    linears = {x: y for x, y in transformer.named_modules() if isinstance(y, nn.Linear)}
    expected = {x for x in linears if x.startswith(lists) and "norm" not in x}
    assert {x for x, y in linears.items() if is_fp8(y)} == expected
    assert not any(x.requires_grad for x in transformer.parameters())
    assert len(expected) >= 10 and len(expected) < len(linears)


LAYERS = pytest.mark.parametrize(
    "layer", ["attn1.to_q", "attn1.to_out.0", "attn2.to_k", "ffn.net.0.proj", "ffn.net.2"]
)


def check_product(layer: str, shape: tuple[int, ...], device: str):
    """A layer's output is the product of the rounded rows and weights, with a scale for each, and the bias."""
    transformer = transformer_of("wan").to(device)
    linear = transformer.blocks[0].get_submodule(layer)
    weight, bias = linear.weight.double(), linear.bias.double()
    use_fp8_linears(transformer)
    x = torch.randn(*shape, linear.in_features, generator=tiny.noise())
    x = (x * torch.logspace(-3, 3, shape[-1])[:, None]).to(device, torch.bfloat16)  # rows of all sizes
    rows = type(linear.weight).from_hp(x)
    rounded = rows.qdata.double() * rows.scale.double()
    stored = linear.weight.qdata.double() * linear.weight.scale.double()
    assert (stored - weight).norm() < 0.04 * weight.norm() and (rounded - x).norm() < 0.04 * x.norm()
    expected = rounded @ stored.t() + bias
    out = linear(x)
    assert out.dtype is torch.bfloat16 and out.shape == (*shape, linear.out_features)
    # BF16 rounds the product, and the product with scales and bias.
    assert ((out - expected).abs() / expected.abs().amax(-1, keepdim=True)).max() < 2**-7


@LAYERS
@pytest.mark.parametrize("shape", [(7,), (2, 5), (1, 3, 4)])
def test_product(layer, shape):
    check_product(layer, shape, "cpu")


@pytest.mark.parametrize("name", ["wan", "hunyuan"])
def test_gelu_is_the_hosts(name):
    transformer = transformer_of(name)
    gelus = [x for x in transformer.modules() if type(x) in (nn.GELU, diffusers.models.activations.GELU)]
    use_fp8_linears(transformer)
    x = torch.cat([torch.linspace(-20, 20, 4001), torch.tensor([-3e38, -1e30, -0.0, 0.0, 1e30, 3e38])])
    expected = F.gelu(x.double(), approximate="tanh")
    changed = 0
    for gelu in gelus:
        if type(gelu).__module__.startswith("fpsattention"):
            out = gelu.gelu(x) if hasattr(gelu, "gelu") else gelu(x)
            assert ((out - expected).abs() <= 1e-6 * expected.abs() + 1e-6).all()
            changed += 1
    assert changed == {"wan": 2, "hunyuan": 3}[name]


def check_both(device: str, first: str, backend: str, compiled: bool = False):
    """Together with `enable`, the output is as far from BF16's as with torchao's own layers."""
    config = fps.AttentionConfig((1, 2, 2), (3, 1, 3))
    schedule = fps.StepSchedule(config, config, config)
    inputs = {
        "timestep": torch.tensor([500.0]),
        "hidden_states": torch.randn(1, 16, 3, 8, 12, generator=tiny.noise()).bfloat16(),
        "encoder_hidden_states": tiny.embeds(8, 1).bfloat16(),
    }
    inputs = {name: x.to(device) for name, x in inputs.items()}

    def run(change=None, compiled=False):
        transformer = transformer_of("wan").to(device)
        if change is not None and first != "enable":
            change(transformer)
        enable(transformer, schedule, shift=3.0, backend=backend)
        if change is not None and first == "enable":
            change(transformer)
        if compiled:
            torch.compiler.reset()
            transformer.compile_repeated_blocks(fullgraph=True)
        with torch.no_grad():
            return transformer(**inputs, return_dict=False)[0].float()

    def torchao(x):
        rounding = quantization.Float8DynamicActivationFloat8WeightConfig(
            granularity=quantization.PerRow(), set_inductor_config=False
        )
        quantization.quantize_(x.blocks, rounding)

    plain, theirs, ours = run(), run(torchao), run(use_fp8_linears, compiled)
    assert (ours - theirs).norm() < (theirs - plain).norm()
    assert (ours - plain).norm() < 1.5 * (theirs - plain).norm()


@pytest.mark.parametrize("first", ["enable", "use_fp8_linears"])
def test_a_transformer_with_both(first):
    check_both("cpu", first, "reference")


def test_projections_of_the_same_tokens_share_their_rounding():
    """Compiled, three products share one E4M3 tensor, and each gives what it gives alone."""
    transformer = transformer_of("wan")
    use_fp8_linears(transformer)
    attn = transformer.blocks[0].attn1
    linears = attn.to_q, attn.to_k, attn.to_v
    x = torch.randn(1, 72, 128, generator=tiny.noise()).bfloat16()
    torch.compiler.reset()
    with torch.no_grad():
        together = torch.compile(lambda x: apply_all(x.sin(), *linears), fullgraph=True)
        outs, (code,) = run_and_get_code(together, x)
        for out, linear in zip(outs, linears, strict=True):
            alone = linear(x.sin())
            assert (out - alone).norm() < 0.01 * alone.norm()
    assert len(re.findall(r"= empty_strided_cpu\(.*torch\.float8_e4m3fn\)", code)) == 1


def test_hooks_of_a_projection_run():
    """Hooks may fetch offloaded weights."""
    transformer = transformer_of("wan")
    use_fp8_linears(transformer)
    attn, calls = transformer.blocks[0].attn1, []
    x = torch.randn(1, 72, 128, generator=tiny.noise()).bfloat16()
    expected = apply_all(x, attn.to_q, attn.to_k, attn.to_v)
    attn.to_k.register_forward_pre_hook(lambda module, args: calls.append(module))
    ours = apply_all(x, attn.to_q, attn.to_k, attn.to_v)
    assert calls == [attn.to_k]
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


def test_default_dtype():
    """Scales stay in float32."""
    transformer = transformer_of("wan")
    use_fp8_linears(transformer)
    x = torch.randn(2, 128, generator=tiny.noise()).bfloat16()
    expected = transformer.blocks[0].attn1.to_out[0](x)
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(transformer.blocks[0].attn1.to_out[0](x), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_machine_that_cannot(monkeypatch):
    """Nothing is changed."""

    def check(_):
        raise AssertionError("Float8 dynamic quantization requires CUDA compute capability >= 8.9")

    monkeypatch.setattr("torchao.float8.inference._check_hardware_support", check)
    monkeypatch.setattr("torchao.quantization.quant_api._check_hardware_support", check, raising=False)
    transformer = transformer_of("wan")
    with pytest.raises(RuntimeError, match="transformer: torchao cannot round it here: .* >= 8.9"):
        use_fp8_linears(transformer)
    assert all(x.requires_grad for x in transformer.parameters())


def test_bad_arguments():
    with pytest.raises(
        ValueError, match="transformer: is a Linear; it must be one of CogVideoXTransformer3DModel"
    ):
        use_fp8_linears(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"weight of blocks\.0\.attn1\.to_q is a Tensor of torch\.float32"):
        use_fp8_linears(tiny.wan_transformer())
    with pytest.raises(
        ValueError, match=r"ff\.net\.0\.proj is \[682, 128\]; FP8 products need multiples of 16"
    ):
        use_fp8_linears(transformer_of("mochi"))  # a full model's sizes are multiples of 16
    transformer = transformer_of("wan")
    use_fp8_linears(transformer)
    with pytest.raises(
        ValueError, match=r"weight of blocks\.0\.attn1\.to_q is a Float8Tensor of torch\.bfloat16"
    ):
        use_fp8_linears(transformer)


class LoraLinear(nn.Module):
    """Has the parts of peft's layer, with their names."""

    def __init__(self, base: nn.Linear, rank: int):
        super().__init__()
        kwargs = {"bias": False, "dtype": base.weight.dtype}
        self.base_layer = base
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, rank, **kwargs)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, base.out_features, **kwargs)})


def test_an_adapter_too_narrow():
    """LoRA of rank 8: the message says that it is an adapter, and how to merge it."""
    transformer = transformer_of("wan")
    attn = transformer.blocks[0].attn1
    attn.to_q = LoraLinear(attn.to_q, 8)
    with pytest.raises(
        ValueError, match=r"lora_A\.default is \[8, 128\].*of an adapter.*fuse_lora"
    ) as raised:
        use_fp8_linears(transformer)
    assert len(str(raised.value)) <= 400
    assert type(attn.to_q.base_layer) is nn.Linear


def test_without_torchao(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(ModuleNotFoundError, match="torchao is not installed: pip install"):
        use_fp8_linears(transformer_of("wan"))
