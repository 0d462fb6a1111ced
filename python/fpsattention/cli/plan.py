"""`fpsattention plan`: the tiles of a grid or model, and what one tile and window attend and cost."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import TYPE_CHECKING

from ..core import explain
from ..core.checks import Triple
from ..core.config import AttentionConfig
from . import estimate, options
from .console import by, milliseconds, people, print_json, table_of
from .errors import asked, require

if TYPE_CHECKING:
    from rich.table import Table


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Rank the tiles of a token grid by padding, and account for one tile and window: density, work, the time an "
        "H100 should take (an estimate from measured rates), and what would run on this machine."
    )
    options.add_shape(parser)
    options.add_window(parser)
    options.add_json(parser)


def run(
    *,
    asked_shape: options.ShapeOptions,
    window: Triple | None,
    border: options.Border,
    as_json: bool,
) -> None:
    """The `plan` command. Raises UserError for a shape, tile or window that is not legal."""
    require("rich")
    from rich.text import Text

    with asked():
        shape = asked_shape.choose()
        resolved = shape.resolve(AttentionConfig(tile=asked_shape.tile, window=window, border=border))
        dense = shape.resolve(AttentionConfig(tile=resolved.tile))
    ranked = explain.plan(shape.grid)
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
    table = table_of("tile", "slot", "tiles", "waste", title="tiles, best first")
    for choice in ranked.candidates:
        table.add_row(by(choice.tile), str(choice.slot), by(choice.tiles), f"{choice.waste:.1%}")
    return table
