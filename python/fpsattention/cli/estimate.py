"""The expected time of a forward on an H100, from rates measured there. An estimate, not a measurement."""

from __future__ import annotations

from dataclasses import dataclass

from ..core.config import ResolvedConfig

SOURCE = (
    "H100 80GB at 700 W, docs/performance.md: the dense forward and the quantisation of Wan2.1-14B at 720p (head_dim "
    "128), and the dense forward of CogVideoX at 480p (64)"
)

# FLOP/s of the forward kernel by head_dim, padding included. From bench/results/h100.json: its other forwards of at
# least 16,000 tokens lie within a quarter of the estimate.
KERNEL_FLOPS = {128: 1083e12, 64: 715e12}
# Bytes/s of the quantisation: three 16-bit reads and three FP8 writes. V is read twice and counted once.
QUANTIZE_BYTES = 2.38e12
BYTES_PER_ELEMENT = 3 * 2 + 3 * 1

# With fewer tokens the host's launches bound eager calls, which the rates do not cover.
LEAST_TOKENS = 8000


@dataclass(frozen=True)
class Estimate:
    """Milliseconds of one FP8 forward, batch 1, and the part of them that is quantisation."""

    ms: float
    quantize_ms: float


def forward(resolved: ResolvedConfig, heads: int, head_dim: int) -> Estimate | None:
    """The expected time of a config on an H100.

    None where nothing was measured: a head_dim other than 64 and 128, no FP8, or fewer than `LEAST_TOKENS` tokens.
    """
    geometry = resolved.geometry
    if head_dim not in KERNEL_FLOPS or resolved.quant != "fp8" or geometry.n_tokens < LEAST_TOKENS:
        return None
    pairs = sum(geometry.computed_pairs(w, resolved.border) for w in resolved.windows) / len(resolved.windows)
    attend = 4 * head_dim * heads * pairs / (KERNEL_FLOPS[head_dim] * resolved.item_fill)
    quantize = BYTES_PER_ELEMENT * geometry.n_tokens * heads * head_dim / QUANTIZE_BYTES
    return Estimate((attend + quantize) * 1e3, quantize * 1e3)
