"""`fpsattention plan`: the tiles of a grid or model, and what one tile and window attend and cost."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING

from ..core import explain
from ..core.checks import Triple
from ..core.config import AttentionConfig, ResolvedConfig
from ..schedules.models import VideoModel
from . import estimate, options
from .console import by, milliseconds, people, print_json, table_of
from .errors import asked, require

if TYPE_CHECKING:
    from rich.table import Table


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Rank the tiles of a token grid by the expected time under --window or --density, without them by padding. "
        "Account for one tile and window: density, work, the time an H200 should take (an estimate from measured "
        "rates), and what would run on this machine."
    )
    options.add_shape(parser)
    options.add_window(parser)
    parser.add_argument(
        "--density",
        type=options.fraction,
        metavar="F",
        help="in place of --tile and --window: the fraction of all pairs to attend; the best tile and its window are "
        "accounted for",
    )
    options.add_json(parser)


def run(
    *,
    asked_shape: options.ShapeOptions,
    window: Triple | None,
    density: float | None,
    border: options.Border,
    as_json: bool,
) -> None:
    """The `plan` command. Raises UserError for a shape, tile, window or density that is not legal."""
    require("rich")
    from rich.text import Text

    with asked():
        shape = asked_shape.choose()
        ranked, resolved = _plan(shape, asked_shape.tile, window, density, border)
        dense = shape.resolve(AttentionConfig(tile=resolved.tile))
    geometry = resolved.geometry
    expected, expected_dense = (estimate.forward(x, shape.heads, shape.head_dim) for x in (resolved, dense))

    console = people(as_json)
    lines = explain.explain_tile(ranked, resolved, shape.heads, shape.head_dim)
    lines.append(f"expected {_expectation(expected, expected_dense, shape.layers)}")
    if shape.name:
        text = f", up to {shape.text_tokens} text tokens" if shape.text_tokens else ""
        lines.insert(
            0, f"model    {shape.name}: {shape.setting}, {shape.layers} layers{text}; {shape.source}"
        )
    for line in lines:
        console.print(Text.assemble((line[:9], "bold"), line[9:]))
    console.print(_tiles_table(ranked))
    if as_json:
        print_json(
            {
                "model": asdict(shape) if shape.name else None,
                "grid": shape.grid,
                "tokens": geometry.n_tokens,
                "prefix_len": resolved.prefix_len,
                "suffix_len": resolved.suffix_len,
                "heads": shape.heads,
                "head_dim": shape.head_dim,
                "tile": resolved.tile,
                "slot": geometry.slot,
                "tiles": geometry.tiles,
                "waste": geometry.waste,
                "window": resolved.windows[0],
                "border": border,
                "density": resolved.density,
                "flops": shape.heads * geometry.flops(resolved.windows[0], border, shape.head_dim),
                "expected": _estimate_json(expected),
                "expected_dense": _estimate_json(expected_dense),
                "runs": explain.what_runs(resolved, shape.head_dim),
                "candidates": [asdict(choice) for choice in ranked.candidates],
            }
        )


def _plan(
    shape: VideoModel,
    tile: Triple | None,
    window: Triple | None,
    density: float | None,
    border: options.Border,
) -> tuple[explain.Plan, ResolvedConfig]:
    """The ranking of tiles, and the config to account for."""
    plan = partial(explain.plan, shape.grid, border=border, heads=shape.heads, head_dim=shape.head_dim)
    if density is not None:
        if tile or window:
            raise ValueError("--density: finds the tile and the window; leave --tile and --window out")
        ranked = plan(density=density)
        return ranked, shape.resolve(AttentionConfig(ranked.best.tile, ranked.best.window, border))
    resolved = shape.resolve(AttentionConfig(tile, window, border))
    if window is None:
        return plan(), resolved
    tokens = [w * t for w, t in zip(resolved.windows[0], resolved.tile, strict=True)]
    return plan(reach=tokens), resolved


def _expectation(expected: estimate.Estimate | None, dense: estimate.Estimate | None, layers: int) -> str:
    if expected is None or dense is None:
        return "no estimate: nothing was measured for this head_dim or so few tokens"
    ratio = f", dense {milliseconds(dense.ms)}" if dense.ms != expected.ms else ""
    depth = f"; {milliseconds(expected.ms * layers)} for {layers} layers" if layers > 1 else ""
    return (
        f"{milliseconds(expected.ms)} a forward, {milliseconds(expected.quantize_ms)} of it quantisation"
        f"{ratio}{depth}. An estimate from rates measured on an {estimate.SOURCE}"
    )


def _estimate_json(expected: estimate.Estimate | None) -> dict | None:
    return None if expected is None else {**asdict(expected), "from": estimate.SOURCE}


def _tiles_table(ranked: explain.Plan) -> Table:
    columns, title = ["tile", "slot", "tiles", "waste"], "tiles, best first"
    if ranked.best.window is not None:
        columns += ["window", "density", "time"]
        title += explain.TIME_NOTE
    table = table_of(*columns, title=title)
    for choice in ranked.candidates:
        row = [by(choice.tile), str(choice.slot), by(choice.tiles), f"{choice.waste:.1%}"]
        if choice.window is not None:
            row += [by(choice.window), f"{choice.density:.3f}", f"{choice.slowdown:.2f}"]
        table.add_row(*row)
    return table
