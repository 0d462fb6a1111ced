"""Linear layers with a weight of torchao's Float8Tensor, scaled by row, arranged for torch.compile."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class FP8Linear(nn.Linear):
    """Rounds its input to E4M3 with a scale for each row, as torchao does, and multiplies it by the Float8Tensor."""

    weight: Any  # Float8Tensor: this module does not import torchao

    def round(self, x: Tensor) -> Any:
        """Round x [..., K] to a Float8Tensor [rows, K]."""
        weight = self.weight
        return type(weight).from_hp(x.flatten(0, -2), kernel_preference=weight.kernel_preference)

    def multiply(self, rows: Any) -> Tensor:
        """The product [rows, N] of what `round` returns and the weight."""
        return self._product(rows, rows.scale, self.weight.scale.t(), self.bias)

    def _product(
        self, rows: Any, row_scale: Tensor, weight_scale: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        weight = self.weight
        return torch._scaled_mm(
            rows.qdata,
            weight.qdata.t(),
            row_scale,
            weight_scale,
            bias,
            out_dtype=weight.dtype,
            use_fast_accum=weight.mm_config.use_fast_accum,
        )

    def output(self, rows: Any, x: Tensor) -> Tensor:
        """The layer's output [..., N] for x [..., K], whose rounding is `rows`."""
        return self.multiply(rows).to(x.dtype).unflatten(0, x.shape[:-1])

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.round(x), x)


class FP8LinearThenElementwise(FP8Linear):
    """Applies scales and bias after the product, so that Inductor fuses them with the elementwise operation that
    follows. cuBLAS is 8 to 14 % faster without them (CUDA 13.0, H100).
    """

    def multiply(self, rows: Any) -> Tensor:
        one = torch.ones((), device=rows.device, dtype=torch.float32)
        y = self._product(rows, one, one) * rows.scale * self.weight.scale.t()
        return y if self.bias is None else y + self.bias


def has_hooks(module: nn.Module) -> bool:
    """Whether a call does more than the forward of the class, such as fetching offloaded weights."""
    return bool(module._forward_pre_hooks or module._forward_hooks or "forward" in module.__dict__)


def apply_all(x: Tensor, *linears: nn.Linear) -> list[Tensor]:
    """The outputs of several linear layers for the same x. Layers that multiply in FP8 round it once."""
    fp8 = [linear for linear in linears if type(linear) is FP8Linear and not has_hooks(linear)]
    if len(fp8) < len(linears):
        return [linear(x) for linear in linears]
    rows = fp8[0].round(x)
    # Inductor would otherwise write the rounded tensor once for each product. as_strided needs it in memory.
    rows.qdata = rows.qdata.as_strided(rows.qdata.shape, rows.qdata.stride())
    return [linear.output(rows, x) for linear in fp8]
