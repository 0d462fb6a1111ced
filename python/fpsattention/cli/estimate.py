"""The expected time of a forward on an H200, from rates measured there. An estimate, not a measurement."""

from __future__ import annotations

from dataclasses import dataclass

from ..core.config import ResolvedConfig
from ..core.planning import QUANTIZE_BYTES_PER_US, quantize_bytes

SOURCE = (
    "H200 at 700 W: the dense forward and the quantisation of Wan2.1-14B at 720p (head_dim 128), and the dense forward "
    "of CogVideoX1.5 at 768p (64)"
)

# FLOP/s of the forward kernel by head_dim, padding included, on that H200. The forwards of at least 16,000 tokens in
# bench/results/h200.json lie within a quarter of the estimate.
KERNEL_FLOPS = {128: 1250e12, 64: 1000e12}

# With fewer tokens the host's launches bound eager calls, which the rates do not cover.
LEAST_TOKENS = 8000


@dataclass(frozen=True)
class Estimate:
    """Milliseconds of one FP8 forward, batch 1, and the part of them that is quantisation."""

    ms: float
    quantize_ms: float


def forward(resolved: ResolvedConfig, heads: int, head_dim: int) -> Estimate | None:
    """The expected time of a config on an H200.

    None where nothing was measured: a head_dim other than 64 and 128, no FP8, or fewer than `LEAST_TOKENS` tokens.
    """
    geometry = resolved.geometry
    if head_dim not in KERNEL_FLOPS or resolved.quant != "fp8" or geometry.n_tokens < LEAST_TOKENS:
        return None
    pairs = sum(geometry.computed_pairs(w, resolved.border) for w in resolved.windows) / len(resolved.windows)
    attend = 4 * head_dim * heads * pairs / KERNEL_FLOPS[head_dim]
    quantize_us = quantize_bytes(geometry.n_tokens, geometry.n_rows, heads, head_dim) / QUANTIZE_BYTES_PER_US
    return Estimate(attend * 1e3 + quantize_us / 1e3, quantize_us / 1e3)
