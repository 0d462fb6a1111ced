"""For each head the sparsest window whose output stays near dense exact attention."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..core.api import attention
from ..core.checks import Triple, to_heads_first
from ..core.config import AttentionConfig
from ..core.geometry import TileGeometry
from ..core.support import backend_for


def legal_windows(geometry: TileGeometry, border: str) -> list[Triple]:
    """All windows (tiles) of a geometry, sparsest first; the last one is the whole grid."""
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

    The error of a head is the RMS of the difference over the RMS of the exact output, over tokens and channels; of
    several samples in the batch the worst one counts. It has all in it that will happen in use: the window, and the
    config's rounding. Exact is quant="none": on a GPU torch's SDPA in q's dtype, elsewhere fp32.

    Args:
        q, k, v, grid, tensor_layout: as in `attention`.
        config: everything but the window.
        candidates: windows in tiles, sparsest first; a head that none of them suits gets the last.
        budget: the largest error allowed.

    Returns one window and its error per head. Raises ValueError when the exact output is not finite, and as
    `attention` does.
    """
    q, k, v = (to_heads_first(x, tensor_layout) for x in (q, k, v))

    def attend(config: AttentionConfig, heads: list[int]) -> Tensor:
        part = q, k, v
        if len(heads) < q.shape[1]:
            part = tuple(x[:, heads] for x in part)
        name, _ = backend_for(q, config)
        backend = (
            "reference" if name == "reference" else "auto"
        )  # the command says so once: no warning besides
        return attention(*part, grid=grid, config=config, tensor_layout="HND", backend=backend)

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
    windows, errors = zip(*(found[head] for head in range(q.shape[1])), strict=True)
    return list(windows), list(errors)


def _relative_errors(out: Tensor, exact: Tensor) -> Tensor:
    """fp32 [heads]: RMS error of out [B, heads, L, D] relative to exact, the worst of the batch."""
    exact = exact.float()
    norm = torch.linalg.vector_norm
    error, size = norm(out.float() - exact, dim=(2, 3)), norm(exact, dim=(2, 3))
    return torch.where(error == 0, 0.0, error / size).amax(0)  # of a head that is all zero, too


def by_density(windows, geometry: TileGeometry, border: str) -> list[Triple]:
    return sorted(windows, key=lambda window: (geometry.density(window, border), window))
