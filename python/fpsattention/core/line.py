"""Tokens without a grid: a line of any length, attended densely, in tiles of one key block.

Only the last tile has padding then, and Q and K have a scale for every 128 tokens. All lengths have the same tile, so
under torch.compile the length stays a symbol.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from .. import _C
from .checks import Triple, check_tensor, heads_first, shown
from .config import AttentionConfig

TILE: Triple = (1, 1, _C.BLOCK)


def grid_of(shape: Sequence[int], tensor_layout: str) -> Triple:
    """The grid (1, 1, L) of a tensor of this shape."""
    return 1, 1, heads_first(shape, tensor_layout)[2]


def on_line(config: AttentionConfig) -> AttentionConfig:
    """The config with the tile of a line. Raises ValueError for one that needs a grid."""
    for name in ("tile", "window", "quant_tile", "select"):
        if (value := getattr(config, name)) is not None:
            raise _needs_grid(f"config: {name}={shown(value)}", "without one attention is dense")
    return replace(config, tile=TILE)


def placed(
    q: Tensor, config: AttentionConfig, tensor_layout: str | None, needing_grid: dict[str, Any]
) -> tuple[Triple, AttentionConfig, str]:
    """(grid, config, tensor_layout) of a call without a grid.

    Args:
        tensor_layout: None: "NHD".
        needing_grid: as `refuse` takes them.

    Raises TypeError or ValueError for a q that is no tensor to attend, for a config or arguments that need a grid, and
    where the layout is not given and q may be heads first.
    """
    layout = "NHD" if tensor_layout is None else tensor_layout
    check_tensor("q", q, layout)
    refuse(needing_grid)
    _, heads, tokens, _ = heads_first(q.shape, layout)
    if tensor_layout is None and tokens < heads:
        raise ValueError(
            f'tensor_layout: is not given, and q {shown(list(q.shape))} has fewer tokens than heads as "NHD" [B, L, H, '
            f'D]; give "HND" if it is [B, H, L, D], as for torch\'s scaled_dot_product_attention, else "NHD"'
        )
    return grid_of(q.shape, layout), on_line(config), layout


def refuse(needing_grid: dict[str, Any]) -> None:
    """Raises ValueError for the first of these arguments, by name, that is given: neither 0 nor None."""
    for name, value in needing_grid.items():
        if isinstance(value, Tensor) or value not in (0, None):
            raise _needs_grid(
                f"{name}: {shown(value)}", "without one all tokens of a sample attend each other"
            )


def _needs_grid(what: str, because: str) -> ValueError:
    return ValueError(f"{what} needs a grid, {because}; give grid, the tokens (T, H, W), or leave it out")
