"""The shape that a command is asked about: a model by its name, or a token grid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..core.checks import as_grid
from ..schedules.models import MODELS, VideoModel, named


def choose(
    name: str | None, grid: Sequence[int] | None, heads: int | None = None, head_dim: int | None = None
) -> VideoModel:
    """A model by its name, or a token grid with 1 head of 128 channels; `heads` and `head_dim` replace its own.

    Raises ValueError unless exactly one of name and grid is given, for an unknown name (with the nearest ones), and
    for an illegal grid.
    """
    if name is not None and grid is None:
        found = named(name)
    elif name is None and grid is not None:
        found = VideoModel("", "", as_grid(grid), 1, 128, 1, "")
    else:
        what = "both are given" if name else f"neither is given. Models: {', '.join(MODELS)}"
        raise ValueError(f"MODEL, --grid: give one of them; {what}")
    return replace(found, heads=heads or found.heads, head_dim=head_dim or found.head_dim)
