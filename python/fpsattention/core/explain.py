"""`plan`: the best tiles of a grid, and `Plan.explain`: what a config means on it, in words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .checks import MAX_INT, Triple, as_grid, as_int
from .config import AXES, AttentionConfig, ResolvedConfig, as_config
from .planning import TileChoice, ranked
from .support import HEAD_DIMS, hopper_obstacle


@dataclass(frozen=True)
class Plan:
    """The best tiles of one grid. `print(plan.explain())` puts them in words.

    Attributes:
        grid: tokens (T, H, W).
        candidates: the best tiles of each slot size, all sorted best first.
    """

    grid: Triple
    candidates: tuple[TileChoice, ...]

    @property
    def best(self) -> TileChoice:
        """The first of `candidates`. A config with tile=None takes this tile."""
        return self.candidates[0]

    def explain(
        self,
        config: AttentionConfig | None = None,
        heads: int | None = None,
        head_dim: int = 128,
        prefix_len: int = 0,
        suffix_len: int = 0,
    ) -> str:
        """A text for people: tile, waste, window, density, legal windows, work, and what would run on this machine.

        Args:
            config: the config to explain; None: dense FP8 attention with the best tile.
            heads: number of heads; None: one for each window of the config.
            head_dim: channels per head.
            prefix_len, suffix_len: text tokens before and after the video tokens; all count as valid.

        Raises TypeError or ValueError as `AttentionConfig.resolve` does, and unless head_dim is an integer of at least
        1.
        """
        config, head_dim = as_config(config), as_int("head_dim", head_dim, 1, MAX_INT)
        if heads is None:
            windows = config.window or ()
            heads = len(windows) if windows and isinstance(windows[0], tuple) else 1
        resolved = config.resolve(self.grid, heads, prefix_len, suffix_len)
        return "\n".join([*explain_tile(self, resolved, heads, head_dim), *_explain_choice(self)])


def plan(grid: Sequence[int], *, top: int = 3) -> Plan:
    """Rank tiles for a token grid by padding waste; near-equal ones by compactness and size. Cached.

    Args:
        grid: tokens (T, H, W); any grid is legal.
        top: number of tiles of each slot size in the result.

    Raises TypeError or ValueError unless the grid is three integers, each at least 0, and `top` an integer of at least
    1.
    """
    grid = as_grid(grid)
    return Plan(grid, ranked(grid, as_int("top", top, 1)))


def explain_tile(plan: Plan, resolved: ResolvedConfig, heads: int, head_dim: int) -> list[str]:
    """The lines of `Plan.explain` about one config. The first nine characters of each line are its label."""
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
    legal = "; ".join(_legal(n, axis) for n, axis in zip(g.tiles, AXES, strict=True))
    overhead = f"; the kernel computes {computed / attended:.2f} times that" if attended else ""
    text_tiles = g.n_tiles - g.n_video_tiles
    cut = f"{text_tiles:,} text tile{'s' * (text_tiles > 1)} of up to {g.slot}"
    sections = f"prefix {g.prefix_len:,} and suffix {g.suffix_len:,} tokens in {cut}"
    return [
        f"grid     {plan.grid}: {math.prod(plan.grid):,} tokens",
        *([f"text     {sections}, attended by all"] if text_tiles else []),
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
        f"{text}; a tile of 321 to 384 tokens, or a window that covers an axis of several tiles, gives all of them "
        f"queries"
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
    """The backend that a config would run on here, and the reason if it is not the fastest one."""
    if resolved.quant == "none":
        kernel = "torch SDPA" if resolved.windows == (resolved.geometry.tiles,) else "torch FlexAttention"
        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
        return f"{kernel} on {gpu}" if gpu else f"the reference (exact attention): no GPU for {kernel}"
    if head_dim not in HEAD_DIMS:
        legal = " or ".join(map(str, HEAD_DIMS))
        return f"the reference (emulated FP8): the Hopper kernel needs head_dim {legal}, not {head_dim}"
    if obstacle := hopper_obstacle():
        return f"the reference (emulated FP8): the Hopper kernel {obstacle}"
    return f"the FP8 Hopper kernel on {torch.cuda.get_device_name()}"
