"""FP8 linear layers in diffusers' transformers: torchao's, arranged so that torch.compile makes the most of them."""

from __future__ import annotations

import math
from collections.abc import Collection

import torch
from diffusers.models.activations import GELU
from torch import Tensor, nn

from ..fp8_linear import FP8Linear, FP8LinearThenElementwise
from ..hosts import host_class
from .compared import COMPARED, FIRST_UNTESTED, FUSED
from .descriptions import description_of


def use_fp8_linears(transformer: nn.Module) -> None:
    """Let the linear layers in a transformer's blocks multiply in FP8, for inference with torch.compile.

    Weights are rounded to E4M3 once, with a scale for each output channel; activations in every forward, with a scale
    for each token (torchao's Float8DynamicActivationFloat8WeightConfig, PerRow). Layers that make modulations from the
    timestep stay as they are: their input has one row. Three things differ from torchao's own layers, and none changes
    the result beyond rounding. Where an elementwise operation follows, scales and bias are applied there instead of in
    the matrix product. Projections of the same tokens for FPSAttention round them once. GELU's tanh is written as the
    logistic function that it is. All save time on H100 once compiled; in eager mode they cost some.

    Cannot be undone; parameters no longer require a gradient. Call it before or after `enable`, but before the first
    compiled forward.

    Args:
        transformer: one whose processors FPSAttention's own repeat (`docs/hosts.md`: fused), with the weights of its
            blocks in bfloat16.

    Raises ModuleNotFoundError without torchao; ValueError when the transformer is another one, or a weight is no
    bfloat16 tensor (rounded already, or sharded) or its size no multiple of 16; RuntimeError without FP8 tensor cores.
    """
    host = getattr(transformer, "_orig_mod", transformer)
    kind = host_class(host).__name__
    if kind not in FUSED:
        known = ", ".join(FUSED) if COMPARED else f"those of diffusers below {FIRST_UNTESTED}"
        raise ValueError(f"transformer: is a {kind}; it must be one of {known}")
    description = description_of(host, "transformer")
    blocks = {name: x for name, x in host.named_children() if isinstance(x, nn.ModuleList)}
    linears = {
        f"{start}.{name}": x
        for start, block in blocks.items()
        for name, x in block.named_modules()
        if isinstance(x, nn.Linear) and "norm" not in name
    }
    for name, linear in linears.items():
        _check_weight(name, linear.weight)
    _round(host, linears.values())
    # Projections go to attention as they are: no elementwise operation follows that could apply scales and bias.
    projections = {
        id(x)
        for attn in description.layers(host)
        for name, x in attn.named_children()
        if name != "to_add_out"
    }
    for linear in linears.values():
        linear.__class__ = FP8Linear if id(linear) in projections else FP8LinearThenElementwise
    logistic = {nn.GELU: _LogisticGELU, GELU: _LogisticGELUBehindLinear}
    for block in blocks.values():
        for x in block.modules():
            if type(x) in logistic and x.approximate == "tanh":
                x.__class__ = logistic[type(x)]


def _check_weight(name: str, weight: Tensor) -> None:
    kind, dtype = type(weight.data), weight.dtype
    if kind is not Tensor or dtype is not torch.bfloat16:
        raise ValueError(
            f"transformer: the weight of {name} is a {kind.__name__} of {dtype}; it must be a Tensor of "
            f"torch.bfloat16, nearest legal: load the transformer with torch_dtype=torch.bfloat16, and without "
            f"quantization_config"
        )
    if any(n % 16 for n in weight.shape):
        advice = (
            "; it is of an adapter: merge that first, by pipe.fuse_lora() and pipe.unload_lora_weights(), or take a "
            "rank that is a multiple of 16"
            if "lora_" in name
            else ""
        )
        raise ValueError(
            f"transformer: the weight of {name} is {list(weight.shape)}; FP8 products need multiples of 16{advice}"
        )


def _round(host: nn.Module, linears: Collection[nn.Linear]) -> None:
    """Round the weights of these layers by torchao, and let no parameter require a gradient."""
    try:
        from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_
        from torchao.quantization.quantize_.common import KernelPreference
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("torchao is not installed: pip install 'fpsattention[fp8]'") from error

    chosen = {id(x) for x in linears}
    config = Float8DynamicActivationFloat8WeightConfig(
        granularity=PerRow(),
        kernel_preference=KernelPreference.TORCH,  # rounds by torch operations, which Inductor fuses
        set_inductor_config=False,  # True makes Inductor try many variants of every kernel, for many minutes
    )
    try:
        quantize_(host, config, filter_fn=lambda module, name: id(module) in chosen)
    except AssertionError as error:  # raised before anything is changed
        raise RuntimeError(f"transformer: torchao cannot round it here: {error}") from error
    host.requires_grad_(False)  # biases would get a gradient, weights none


class _LogisticGELU(nn.GELU):
    """GELU with tanh approximation, x (1 + tanh(u)) / 2, computed as x / (1 + 2^(-2 u / ln 2)): a third of tanh's
    instructions. u = sqrt(2 / pi) (x + 0.044715 x^3).
    """

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        factor = -2 / math.log(2) * math.sqrt(2 / math.pi)
        return (y / (1 + torch.exp2(y * (factor + 0.044715 * factor * y * y)))).to(x.dtype)


class _LogisticGELUBehindLinear(GELU):
    """diffusers' GELU, which is a linear layer followed by the function."""

    gelu = _LogisticGELU.forward
