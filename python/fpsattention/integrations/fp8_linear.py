"""Linear layers of torchao's Float8Tensor, scaled by row, arranged so that torch.compile makes the most of them."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class FP8Linear(nn.Linear):
    """Rounds its input to E4M3 with a scale for each row, as torchao does, and multiplies it by a Float8Tensor."""

    def round(self, x: Tensor) -> Tensor:
        """x [..., K] as a Float8Tensor [rows, K]."""
        weight = self.weight
        return type(weight).from_hp(x.flatten(0, -2), kernel_preference=weight.kernel_preference)

    def multiply(self, rows: Tensor) -> Tensor:
        """[rows, N], of what `round` returns."""
        return self._product(rows, rows.scale, self.weight.scale.t(), self.bias)

    def _product(
        self, rows: Tensor, row_scale: Tensor, weight_scale: Tensor, bias: Tensor | None = None
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

    def output(self, rows: Tensor, x: Tensor) -> Tensor:
        """[..., N], like the x [..., K] that was rounded to `rows`."""
        return self.multiply(rows).to(x.dtype).unflatten(0, x.shape[:-1])

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.round(x), x)


class FP8LinearThenElementwise(FP8Linear):
    """Leaves scales and bias to the elementwise operation that follows, with which Inductor fuses them: of cuBLAS's
    kernels those without either are the fastest, by 8 to 14 % (CUDA 13.0, H100).
    """

    def multiply(self, rows: Tensor) -> Tensor:
        one = torch.ones((), device=rows.device, dtype=torch.float32)
        y = self._product(rows, one, one) * rows.scale * self.weight.scale.t()
        return y if self.bias is None else y + self.bias


def has_hooks(module: nn.Module) -> bool:
    """Whether a call does more than its class's forward: fetches its weights, for example, that were offloaded."""
    return bool(module._forward_pre_hooks or module._forward_hooks or "forward" in module.__dict__)


def apply_all(x: Tensor, *linears: nn.Linear) -> list[Tensor]:
    """What each of some linear layers makes of x. Those that multiply in FP8 round it once."""
    if not all(type(linear) is FP8Linear and not has_hooks(linear) for linear in linears):
        return [linear(x) for linear in linears]
    rows = linears[0].round(x)
    # Left to itself, Inductor would write the rounded tensor once for each product; what is seen through as_strided
    # has to be in memory.
    rows.qdata = rows.qdata.as_strided(rows.qdata.shape, rows.qdata.stride())
    return [linear.output(rows, x) for linear in linears]
