"""Errors of attention on sampled query rows, against exact attention in fp64."""

from __future__ import annotations

import torch

from common import Record
from contenders import as_hnd
from shapes import Shape

SAMPLED_ROWS = 256


def sampled_rows(shape: Shape, seed: int, device: str) -> torch.Tensor:
    """Indices of the query rows that are checked, int64 [at most SAMPLED_ROWS]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(shape.tokens, generator=generator)[:SAMPLED_ROWS].to(device)


def sampled_heads(shape: Shape) -> list[tuple[int, int]]:
    """(sample, head) of the heads that are checked: the first, one in the middle and the last."""
    return sorted({(0, 0), (0, shape.heads // 2), (shape.batch - 1, shape.heads - 1)})


def exact_rows(q, k, v, rows: torch.Tensor, allowed: torch.Tensor, scale: float) -> torch.Tensor:
    """Exact attention of some query rows of one head, fp64 [rows, D]; q, k, v [L, D], allowed [rows, L]."""
    scores = (q[rows].double() @ k.double().T).mul_(scale).masked_fill_(~allowed, float("-inf"))
    return scores.softmax(-1) @ v.double()


def exact_heads(shape: Shape, qkv, rows: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
    """Exact attention of some query rows in the sampled heads, fp64 [heads, rows, D]; qkv in the shape's layout."""
    q, k, v = (as_hnd(x, shape.layout) for x in qkv)
    scale = shape.head_dim**-0.5
    return torch.stack([exact_rows(q[at], k[at], v[at], rows, allowed, scale) for at in sampled_heads(shape)])


def relative_rms(x: torch.Tensor, reference: torch.Tensor) -> float:
    return ((x.double() - reference.double()).norm() / reference.double().norm()).item()


def judge(
    shape: Shape, out: torch.Tensor, rows, exact: torch.Tensor, tolerance: float, record: Record
) -> None:
    """Fill in a record's error, that of out [B, H, L, D] on the rows and heads of `exact_heads`, and say what fails."""
    if not out.isfinite().all():
        record.fail("output is not finite")
    record.rel_rms = relative_rms(torch.stack([out[at][rows] for at in sampled_heads(shape)]), exact)
    if not record.rel_rms <= tolerance:  # true for NaN, too
        record.fail(f"relative RMS error {record.rel_rms:.3g} is above {tolerance}")
