"""`plan`: the best tiles of a grid, and an account of them for people."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .checks import Triple, as_grid, as_int
from .config import MAX_INT, AttentionConfig, ResolvedConfig, as_config
from .planning import TileChoice, ranked
from .support import HEAD_DIMS, hopper_obstacle


@dataclass(frozen=True)
class Plan:
    """The best tiles of one grid. `print(plan.explain())` says what they mean.

    Attributes:
        grid: tokens (T, H, W).
        candidates: tiles, best first; the best few of every slot size.
    """

    grid: Triple
    candidates: tuple[TileChoice, ...]

    @property
    def best(self) -> TileChoice:
        """The first of `candidates`: the tile of a config with tile=None."""
        return self.candidates[0]

    def explain(
        self,
        config: AttentionConfig | None = None,
        heads: int | None = None,
        head_dim: int = 128,
        prefix_len: int = 0,
        suffix_len: int = 0,
    ) -> str:
        """An account for people: tile, waste, window, density, work, legal windows, and what would run here.

        Args:
            config: what to explain; None explains dense FP8 attention with the best tile.
            heads: number of heads; None: as many as the config has windows.
            head_dim: channels per head.
            prefix_len, suffix_len: text tokens before and after the grid's; all count as valid.

        Raises as `AttentionConfig.resolve` does, and for a head_dim that is no integer of at least 1.
        """
        config, head_dim = as_config(config), as_int("head_dim", head_dim, 1, MAX_INT)
        if heads is None:
            windows = config.window or ()
            heads = len(windows) if windows and isinstance(windows[0], tuple) else 1
        resolved = config.resolve(self.grid, heads, prefix_len, suffix_len)
        return "\n".join([*explain_tile(self, resolved, heads, head_dim), *_explain_choice(self)])


def plan(grid: Sequence[int], *, top: int = 3) -> Plan:
    """Rank tiles for a token grid (T, H, W) by padding waste, near-equal ones by compactness and size.
    Cached.

    Args:
        grid: tokens per axis; any grid is legal.
        top: tiles kept of each slot size.

    Raises TypeError or ValueError when the grid is not three integers, each at least 0, or `top` no integer of at least
    1.
    """
    grid = as_grid(grid)
    return Plan(grid, ranked(grid, as_int("top", top, 1)))


def explain_tile(plan: Plan, resolved: ResolvedConfig, heads: int, head_dim: int) -> list[str]:
    """The lines of `Plan.explain` on one config; the first nine characters of each say what it is about."""
    g, border = resolved.geometry, resolved.border
    attended = sum(g.attended_pairs(w, border) for w in resolved.windows)
    computed = sum(g.computed_pairs(w, border) for w in resolved.windows)
    flops = heads / len(resolved.windows) * sum(g.flops(w, border, head_dim) for w in resolved.windows)
    dense = resolved.windows == (g.tiles,)
    windows = ", ".join(str(w) for w in resolved.windows[:4]) + (", ..." if len(resolved.windows) > 4 else "")
    scales = "the tile" if resolved.brick == (1, 1, 1) else f"bricks of {resolved.quant_tile} tokens"
    quant = (
        "none"
        if resolved.quant == "none"
        else f"E4M3, Q and K scaled by {scales}{', K smoothed' if resolved.smooth_k else ''}"
    )
    kind = f"border {border!r}{' (dense)' if dense else ''}"
    legal = "; ".join(_legal(n, axis) for n, axis in zip(g.tiles, "thw", strict=True))
    overhead = f"; the kernel computes {computed / attended:.2f} times that" if attended else ""
    runs = g.n_tiles - g.n_video_tiles
    cut = f"{runs:,} run{'s' * (runs > 1)} of up to {g.slot}"
    sections = f"prefix {g.prefix_len:,} and suffix {g.suffix_len:,} tokens in {cut}"
    return [
        f"grid     {plan.grid}: {math.prod(plan.grid):,} tokens",
        *([f"text    {sections}, attended by all"] if runs else []),
        f"tile     {g.tile}: {math.prod(g.tile)} tokens in a slot of {g.slot} rows; "
        f"{g.tiles} = {g.n_video_tiles:,} tiles; padding waste {g.waste:.1%}",
        f"window   {windows} tiles, {kind}; density {resolved.density:.3f}",
        f"legal    windows, {legal}",
        f"work     {flops / 1e12:.3g} TFLOP forward, batch 1, heads {heads}, head_dim {head_dim}{overhead}",
        f"items    {_item_fill(resolved.item_fill)}",
        f"rounding {quant}",
        f"runs     {what_runs(resolved, head_dim)}",
    ]


def _item_fill(fill: float) -> str:
    text = f"{fill:.0%} of the Hopper kernel's warpgroups have queries"
    if fill > 0.9:
        return text
    return (
        f"{text}; all have with a tile of 321 to 384 tokens, or a window as long as an axis of several tiles"
    )


def _explain_choice(plan: Plan) -> list[str]:
    header = f"{'tile':>14} {'slot':>5} {'tiles':>16} {'waste':>9}"
    rows = [f"{c.tile!s:>14} {c.slot:>5} {c.tiles!s:>16} {c.waste:>9.1%}" for c in plan.candidates]
    return ["tiles    best first:", header, *rows]


def _legal(n: int, axis: str) -> str:
    odd = [str(w) for w in range(1, n, 2)]
    if len(odd) > 4:
        odd = [odd[0], odd[1], "...", odd[-1]]
    return f"{axis}: {', '.join([*odd, f'{n} or more (all)'])}"


def what_runs(resolved: ResolvedConfig, head_dim: int) -> str:
    """What would run for a config on this machine, and why nothing better."""
    if resolved.quant == "none":
        torchs = "torch SDPA" if resolved.windows == (resolved.geometry.tiles,) else "torch FlexAttention"
        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
        return f"{torchs} on {gpu}" if gpu else f"the reference (exact attention): no GPU for {torchs}"
    if head_dim not in HEAD_DIMS:
        return f"the reference (emulated FP8): the Hopper kernel needs head_dim 64 or 128, not {head_dim}"
    if obstacle := hopper_obstacle():
        return f"the reference (emulated FP8): the Hopper kernel {obstacle}"
    return f"the FP8 Hopper kernel on {torch.cuda.get_device_name()}"
