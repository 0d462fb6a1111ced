"""`plan`: the best tiles of a grid, and `Plan.explain`: what a config means on it, in words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .checks import MAX_INT, Triple, as_grid, as_int, as_share, as_triple, as_truncate, shown
from .config import AXES, AttentionConfig, Border, ResolvedConfig, as_config
from .planning import TileChoice, Wanted, ranked, reach_of
from .selectors import Selector, TopMass
from .support import HEAD_DIMS, hopper_obstacle

TIME_NOTE = "; time: expected, over the fastest tile's at the density wanted"


@dataclass(frozen=True)
class Plan:
    """The best tiles of one grid. `print(plan.explain())` puts them in words.

    Attributes:
        grid: tokens (T, H, W).
        candidates: the best tiles of each slot size, all sorted best first.
        border: "clamp" or "truncate", of the candidates' windows.
    """

    grid: Triple
    candidates: tuple[TileChoice, ...]
    border: Border = "clamp"

    @property
    def best(self) -> TileChoice:
        """The first of `candidates`. A config with tile=None takes the tile that is best without a window."""
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
            config: the config to explain; None: FP8 attention with the best tile under its window, dense without one.
            heads: number of heads; None: one for each window of the config.
            head_dim: channels per head.
            prefix_len, suffix_len: text tokens before and after the video tokens; all count as valid.

        Raises TypeError or ValueError as `AttentionConfig.resolve` does, and unless head_dim is an integer of at least
        1.
        """
        if config is None:
            config = AttentionConfig(tile=self.best.tile, window=self.best.window, border=self.border)
        config, head_dim = as_config(config), as_int("head_dim", head_dim, 1, MAX_INT)
        if heads is None:
            windows = config.window or ()
            heads = len(windows) if windows and isinstance(windows[0], tuple) else 1
        resolved = config.resolve(self.grid, heads, prefix_len, suffix_len)
        return "\n".join([*explain_tile(self, resolved, heads, head_dim), *_explain_choice(self)])


def plan(
    grid: Sequence[int],
    *,
    top: int = 3,
    density: float | None = None,
    reach: Sequence[int] | None = None,
    border: Border = "clamp",
    heads: int = 1,
    head_dim: int = 128,
) -> Plan:
    """Rank tiles for a token grid. Cached.

    With a density or a reach, every tile gets the legal window nearest to it, and tiles are ranked by the expected time
    of a forward on an H200 at that density: quantisation, padding, and SMs without work at the end count. Without,
    they are ranked by padding alone. Near-equal tiles are ranked by compactness and size in both. Text tokens are left
    out.

    Args:
        grid: tokens (T, H, W); any grid is legal.
        top: number of tiles of each slot size in the result.
        density: attended pairs of tokens wanted, as a fraction of all pairs, for a window that is about a cube of
            latent pixels.
        reach: in place of the density, the size (t, h, w) of the window wanted, in tokens. Where it is at least the
            grid's, the window is the whole axis.
        border, heads, head_dim: of the call, for a density or a reach.

    Raises TypeError or ValueError unless the grid is three integers, each at least 0, `top` an integer of at least 1,
    and the others legal; density and reach exclude each other.
    """
    grid, top, truncate = as_grid(grid), as_int("top", top, 1), as_truncate(border)
    heads, head_dim = as_int("heads", heads, 1, MAX_INT), as_int("head_dim", head_dim, 1, MAX_INT)
    if density is not None and reach is not None:
        raise ValueError(f"reach: {shown(reach)} and density {shown(density)} exclude each other; give one")
    if density is not None:
        tokens = reach_of(grid, as_share("density", density), truncate)
    elif reach is not None:
        t, h, w = map(min, as_triple("reach", reach, 1), grid)
        tokens = float(t), float(h), float(w)
    else:
        return Plan(grid, ranked(grid, top), border)
    return Plan(grid, ranked(grid, top, Wanted(tokens, truncate, heads, head_dim)), border)


def explain_tile(plan: Plan, resolved: ResolvedConfig, heads: int, head_dim: int) -> list[str]:
    """The lines of `Plan.explain` about one config. The first nine characters of each line are its label."""
    g, border = resolved.geometry, resolved.border
    if resolved.select is None:
        attended = sum(g.attended_pairs(w, border) for w in resolved.windows)
        computed = sum(g.computed_pairs(w, border) for w in resolved.windows)
        flops = heads / len(resolved.windows) * sum(g.flops(w, border, head_dim) for w in resolved.windows)
    else:  # padding of the chosen tiles is not known
        attended = computed = 0
        flops = heads * resolved.density * g.flops(g.tiles, border, head_dim)
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
        f"window   {windows} tiles, {kind}; density {resolved.density:.3f}"
        if resolved.select is None
        else _explain_select(resolved, resolved.select),
        f"legal    windows, {legal}",
        f"work     {flops / 1e12:.3g} TFLOP forward, batch 1, heads {heads}, head_dim {head_dim}{overhead}",
        f"rounding {quant}",
        f"runs     {what_runs(resolved, head_dim)}",
    ]


def _explain_select(resolved: ResolvedConfig, select: Selector) -> str:
    bound = "at most " if isinstance(select, TopMass) else ""
    always = f", always the window {select.always} with border {resolved.border!r}" if select.always else ""
    return (
        f"select   {select}: {bound}{resolved.capacity:,} of {resolved.geometry.n_video_tiles:,} tiles by "
        f"score{always}; density {bound}{resolved.density:.3f}"
    )


def _explain_choice(plan: Plan) -> list[str]:
    header = f"{'tile':>14} {'slot':>5} {'tiles':>16} {'waste':>9}"
    rows = [f"{c.tile!s:>14} {c.slot:>5} {c.tiles!s:>16} {c.waste:>9.1%}" for c in plan.candidates]
    if plan.best.window is not None:
        header += f" {'window':>14} {'density':>8} {'time':>6}"
        under = [f" {c.window!s:>14} {c.density:>8.3f} {c.slowdown:>6.2f}" for c in plan.candidates]
        rows = [row + window for row, window in zip(rows, under, strict=True)]
    return [f"tiles    best first{TIME_NOTE if plan.best.window else ''}:", header, *rows]


def _legal(n: int, axis: str) -> str:
    odd = [str(w) for w in range(1, n, 2)]
    if len(odd) > 4:
        odd = [odd[0], odd[1], "...", odd[-1]]
    return f"{axis}: {', '.join([*odd, f'{n} or more (all)'])}"


def what_runs(resolved: ResolvedConfig, head_dim: int) -> str:
    """The backend that a config would run on here, and the reason if it is not the fastest one."""
    if resolved.quant == "none":
        dense = resolved.select is None and resolved.windows == (resolved.geometry.tiles,)
        kernel = "torch SDPA" if dense else "torch FlexAttention"
        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
        return f"{kernel} on {gpu}" if gpu else f"the reference (exact attention): no GPU for {kernel}"
    if head_dim not in HEAD_DIMS:
        legal = " or ".join(map(str, HEAD_DIMS))
        return f"the reference (emulated FP8): the Hopper kernel needs head_dim {legal}, not {head_dim}"
    if obstacle := hopper_obstacle():
        return f"the reference (emulated FP8): the Hopper kernel {obstacle}"
    return f"the FP8 Hopper kernel on {torch.cuda.get_device_name()}"
