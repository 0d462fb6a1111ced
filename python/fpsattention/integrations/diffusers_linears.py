"""FP8 linear layers in diffusers' transformers: torchao's, arranged so that torch.compile makes the most of them."""

from __future__ import annotations

import math

import torch
from diffusers.models.activations import GELU
from torch import Tensor, nn

from .diffusers_models import MODELS, model_of
from .fp8_linear import FP8Linear, FP8LinearThenElementwise


def use_fp8_linears(transformer: nn.Module) -> None:
    """Let the linear layers in a transformer's blocks multiply in FP8, for inference with torch.compile.

    Weights are rounded to E4M3 once, with a scale for each output channel; activations in every forward, with a scale
    for each token (torchao's Float8DynamicActivationFloat8WeightConfig, PerRow). Layers that make modulations of the
    timestep stay as they are: they see one row. Three things differ from torchao's own layers, none of which changes
    the result beyond rounding. Where an elementwise operation follows, scales and bias are applied there instead of in
    the matrix product. Layers that FPSAttention projects the same tokens with round them once. And GELU's tanh is
    written as the logistic function that it is. On H100 all save time once compiled; eager they cost some.

    Cannot be undone; parameters no longer require a gradient. Before or after `enable`, and before the first compiled
    forward.

    Args:
        transformer: one that `enable` knows, its blocks' weights in bfloat16.

    Raises ModuleNotFoundError without torchao; ValueError when the transformer is of another model, or a weight is no
    bfloat16 tensor (rounded already, or sharded) or its size no multiple of 16; RuntimeError without FP8 tensor cores.
    """
    try:
        from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_
        from torchao.quantization.quantize_.common import KernelPreference
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("torchao is not installed: pip install 'fpsattention[fp8]'") from error

    host = getattr(transformer, "_orig_mod", transformer)
    model = model_of(host)
    if model is None:
        known = ", ".join(sorted(x.__name__ for x in MODELS))
        raise ValueError(f"transformer: is a {type(host).__name__}; it must be one of {known}")
    blocks = {name: x for name, x in host.named_children() if isinstance(x, nn.ModuleList)}
    linears = {
        f"{start}.{name}": x
        for start, block in blocks.items()
        for name, x in block.named_modules()
        if isinstance(x, nn.Linear) and "norm" not in name
    }
    for name, linear in linears.items():
        kind, dtype = type(linear.weight.data), linear.weight.dtype
        if kind is not Tensor or dtype is not torch.bfloat16:
            raise ValueError(
                f"transformer: the weight of {name} is a {kind.__name__} of {dtype}; it must be a Tensor of "
                f"torch.bfloat16, nearest legal: load the transformer with torch_dtype=torch.bfloat16, and without "
                f"quantization_config"
            )
        if any(n % 16 for n in linear.weight.shape):
            advice = (
                "; it is of an adapter: merge that first, by pipe.fuse_lora() and pipe.unload_lora_weights(), or take "
                "a rank that is a multiple of 16"
                if "lora_" in name
                else ""
            )
            raise ValueError(
                f"transformer: the weight of {name} is {list(linear.weight.shape)}; FP8 products need multiples of "
                f"16{advice}"
            )
    chosen = {id(x) for x in linears.values()}
    config = Float8DynamicActivationFloat8WeightConfig(
        granularity=PerRow(),
        kernel_preference=KernelPreference.TORCH,  # rounding in torch's operations, which Inductor fuses
        set_inductor_config=False,  # it would have Inductor try many variants of every kernel, for many minutes
    )
    try:
        quantize_(host, config, filter_fn=lambda module, name: id(module) in chosen)
    except AssertionError as error:  # before it has changed anything
        raise RuntimeError(f"transformer: torchao cannot round it here: {error}") from error
    host.requires_grad_(False)  # of the biases there would be a gradient, of the weights none
    # Projections that go to attention as they are have nothing behind them to leave scales and bias to.
    projections = {
        id(x) for attn in model.layers(host) for name, x in attn.named_children() if name != "to_add_out"
    }
    for linear in linears.values():
        linear.__class__ = FP8Linear if id(linear) in projections else FP8LinearThenElementwise
    logistic = {nn.GELU: _LogisticGELU, GELU: _LogisticGELUBehindLinear}
    for block in blocks.values():
        for x in block.modules():
            if type(x) in logistic and x.approximate == "tanh":
                x.__class__ = logistic[type(x)]


class _LogisticGELU(nn.GELU):
    """x (1 + tanh(u)) / 2 = x / (1 + 2^(-2 u / ln 2)), a third of tanh's instructions; u is odd in x."""

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        factor = -2 / math.log(2) * math.sqrt(2 / math.pi)
        return (y / (1 + torch.exp2(y * (factor + 0.044715 * factor * y * y)))).to(x.dtype)


class _LogisticGELUBehindLinear(GELU):
    """diffusers' GELU, a linear layer and the function."""

    gelu = _LogisticGELU.forward
