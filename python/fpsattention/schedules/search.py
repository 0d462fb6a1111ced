"""A search for the sparsest window of each head whose output stays near dense exact attention."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from ..core.api import attention
from ..core.checks import Triple, to_heads_first
from ..core.config import AttentionConfig
from ..core.geometry import TileGeometry
from ..core.support import backend_for


def legal_windows(geometry: TileGeometry, border: str) -> list[Triple]:
    """All windows (wt, wh, ww) of a geometry, in tiles, sparsest first. The last one is the whole grid."""
    return by_density(itertools.product(*([*range(1, n, 2), n] for n in geometry.tiles)), geometry, border)


def search(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    grid: Triple,
    config: AttentionConfig,
    candidates: Sequence[Triple],
    budget: float,
    tensor_layout: str = "NHD",
) -> tuple[list[Triple], list[float]]:
    """For each head, the first of `candidates` whose output is near enough to dense exact attention.

    The error of a head is the RMS of the difference over the RMS of the exact output, over tokens and channels, for the
    worst sample of the batch. It includes all that happens in use: the window, and the config's rounding. Exact
    attention is quant="none": torch's SDPA in q's dtype on a GPU, fp32 elsewhere.

    Args:
        q, k, v, grid, tensor_layout: as in `attention`.
        config: everything but the window.
        candidates: windows in tiles, sparsest first. A head for which none is within the budget gets the last.
        budget: the largest error allowed.

    Returns the window and the error of each head.
    Raises ValueError when the exact output is not finite; otherwise as `attention`.
    """
    q, k, v = (to_heads_first(x, tensor_layout) for x in (q, k, v))

    def attend(config: AttentionConfig, heads: list[int]) -> Tensor:
        part = (q, k, v) if len(heads) == q.shape[1] else (x[:, heads] for x in (q, k, v))
        # By name, the reference runs without the warning that "auto" gives: the caller has said that it is slow.
        backend = "reference" if backend_for(q, config)[0] == "reference" else "auto"
        out = attention(*part, grid=grid, config=config, tensor_layout="HND", backend=backend)
        return cast(Tensor, out)  # without return_lse it is no pair

    left = list(range(q.shape[1]))
    exact = attend(AttentionConfig(tile=config.tile, quant="none"), left)
    if not exact.isfinite().all():
        raise ValueError(
            "the exact attention is not finite: q, k, v hold NaN or Inf, or their products overflow"
        )
    found: dict[int, tuple[Triple, float]] = {}
    for i, window in enumerate(candidates):
        errors = _relative_errors(attend(replace(config, window=window), left), exact[:, left]).tolist()
        for head, error in zip(left, errors, strict=True):
            if error <= budget or i == len(candidates) - 1:
                found[head] = window, error
        left = [head for head in left if head not in found]
        if not left:
            break
    best = [found[head] for head in range(q.shape[1])]
    return [window for window, _ in best], [error for _, error in best]


def _relative_errors(out: Tensor, exact: Tensor) -> Tensor:
    """RMS error of out [B, heads, L, D] relative to exact, of the worst sample: fp32 [heads]."""
    exact = exact.float()
    norm = torch.linalg.vector_norm
    error, size = norm(out.float() - exact, dim=(2, 3)), norm(exact, dim=(2, 3))
    return torch.where(error == 0, 0.0, error / size).amax(0)  # 0 for 0 / 0, of a head that is all zeros


def by_density(windows: Iterable[Triple], geometry: TileGeometry, border: str) -> list[Triple]:
    """Windows in tiles, sparsest first."""
    return sorted(windows, key=lambda window: (geometry.density(window, border), window))
