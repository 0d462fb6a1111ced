"""`fpsattention plan` and `fpsattention schedule`: what would be attended, as tables and pictures."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import torch
from rich.columns import Columns
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..core import explain
from ..core.checks import Triple
from ..core.config import AttentionConfig, ResolvedConfig
from ..core.geometry import TileGeometry
from ..schedules.schedule import STAGES, StepSchedule
from ..schedules.windows import WindowTable
from . import catalog, estimate
from .console import by, milliseconds, people, print_json, table_of
from .errors import UserError, asked

UNSEEN, SEEN, QUERY = 0, 1, 2
MARKS = {UNSEEN: ("·", "dim"), SEEN: ("#", "yellow"), QUERY: ("Q", "bold cyan")}
COLOURS = ["#2b2b2b", "#ffb300", "#00e5ff"]  # of the three, in the PNG
DEFAULT_STEPS, DEFAULT_ALPHA = 50, (0.2, 0.8)
MOST_PICTURES = 3  # of a table's windows, the most frequent


def plan(*, model, grid, heads, head_dim, tile, window, border, as_json) -> None:
    """The `plan` command. Raises UserError for a shape, tile or window that is not legal."""
    with asked():
        shape = catalog.choose(model, grid, heads, head_dim)
        config = AttentionConfig(tile=tile, window=window, border=border)
        resolved = _resolve(config, shape)
        dense = _resolve(AttentionConfig(tile=resolved.tile), shape)
    ranked = explain.plan(shape.grid)
    geometry = resolved.geometry
    expected, expected_dense = (estimate.forward(x, shape.heads, shape.head_dim) for x in (resolved, dense))

    console = people(as_json)
    lines = explain.explain_tile(ranked, resolved, shape.heads, shape.head_dim)
    if shape.text_tokens:
        lines.append(f"text     {_text(shape)}")
    lines.append(f"expected {_expectation(expected, expected_dense, shape.layers)}")
    if shape.name:
        lines.insert(0, f"model    {shape.name}: {shape.setting}, {shape.layers} layers; {shape.source}")
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


def _resolve(config: AttentionConfig, shape: catalog.VideoModel) -> ResolvedConfig:
    """The config on the model's video and text tokens."""
    return config.resolve(shape.grid, shape.heads, *shape.text_lengths)


def _text(shape: catalog.VideoModel) -> str:
    return (
        f"up to {shape.text_tokens} text tokens come {shape.text_place} in the same sequence; all are counted"
    )


def _expectation(expected, dense, layers: int) -> str:
    if expected is None:
        return "no estimate: nothing of this kind (head_dim, tokens) was measured"
    ratio = f", dense {milliseconds(dense.ms)}" if dense.ms != expected.ms else ""
    depth = f"; {milliseconds(expected.ms * layers)} for {layers} layers" if layers > 1 else ""
    return (
        f"{milliseconds(expected.ms)} a forward, {milliseconds(expected.quantize_ms)} of it quantisation"
        f"{ratio}{depth}. An estimate from rates measured on an {estimate.SOURCE}"
    )


def _estimate_json(expected: estimate.Estimate | None) -> dict | None:
    return expected and {**asdict(expected), "from": estimate.SOURCE}


def _tiles_table(ranked: explain.Plan) -> Table:
    table = table_of("tile", "slot", "tiles", "waste", title="tiles, best first", title_justify="left")
    for choice in ranked.candidates:
        table.add_row(by(choice.tile), str(choice.slot), by(choice.tiles), f"{choice.waste:.1%}")
    return table


def schedule(*, windows, output, as_json, **stages) -> None:
    """The `schedule` command, of three stages or of the file `windows`.

    Raises UserError for what is not legal, for a file that cannot be read or written, and when both are given.
    """
    console = people(as_json)
    if windows is None:
        result, pictures = _stages(console, **stages)
    else:
        result, pictures = _from_file(console, windows, stages)
    for title, resolved in pictures:
        console.print(Text.assemble((title, "bold"), ": what the query tile Q in the middle attends (#)"))
        console.print(_planes(resolved))
    if output is not None:
        _draw(output, pictures)
        console.print(f"Picture: {output}")
    if as_json:
        print_json({**result, "picture": output and str(output)})


def _stages(
    console: Console, *, model, grid, heads, head_dim, tile, border, alpha, num_steps, **of_stage
) -> tuple[dict, list[tuple[str, ResolvedConfig]]]:
    """The JSON result and the pictures of a `StepSchedule`, once its table is printed."""
    with asked():
        shape = catalog.choose(model, grid, heads, head_dim)
        alpha, steps, border = alpha or DEFAULT_ALPHA, num_steps or DEFAULT_STEPS, border or "clamp"
        if not any(of_stage.values()):
            raise ValueError("no window: give one of --early, --mid and --late, or a file with --windows")
        dense = _resolve(AttentionConfig(tile=tile), shape)
        tile = dense.tile
        configs = {
            stage: AttentionConfig(
                tile=tile, window=of_stage[stage], border=border, quant_tile=of_stage[f"{stage}_scales"]
            )
            for stage in STAGES
        }
        plan_of_steps = StepSchedule(**configs, alpha=alpha)
        resolved = {stage: _resolve(config, shape) for stage, config in configs.items()}
    expected = {s: estimate.forward(x, shape.heads, shape.head_dim) for s, x in resolved.items()}
    expected_dense = estimate.forward(dense, shape.heads, shape.head_dim)

    rows = []
    for step in range(steps):
        stage = plan_of_steps.stage(step=step, num_steps=steps)
        of = resolved[stage]
        rows.append(
            {
                "step": step,
                "stage": stage,
                "tile": of.tile,
                "scales": of.quant_tile,
                "window": of.windows[0],
                "density": of.density,
                "expected_ms": expected[stage] and expected[stage].ms,
            }
        )
    columns = ("step", "stage", "tile", "scales", "window", "density", "expected")
    table = table_of(*columns, words=("stage",))
    for row in rows:
        triples = (by(row[name]) for name in ("tile", "scales", "window"))
        ms = "-" if row["expected_ms"] is None else milliseconds(row["expected_ms"])
        table.add_row(str(row["step"]), row["stage"], *triples, f"{row['density']:.3f}", ms)
    console.print(table)
    mean = sum(row["density"] for row in rows) / steps
    console.print(f"Mean density over {steps} steps: {mean:.3f}.")
    if shape.text_tokens:
        console.print(f"Text: {_text(shape)}.")
    if expected_dense is not None:
        total = shape.layers * sum(row["expected_ms"] for row in rows)
        console.print(
            f"Expected: {milliseconds(total)} for {steps} steps x {shape.layers} layers, dense "
            f"{milliseconds(shape.layers * steps * expected_dense.ms)}; guidance doubles both. An estimate from rates "
            f"measured on an {estimate.SOURCE}."
        )
    result = {
        "grid": shape.grid,
        "prefix_len": dense.prefix_len,
        "suffix_len": dense.suffix_len,
        "heads": shape.heads,
        "head_dim": shape.head_dim,
        "layers": shape.layers,
        "num_steps": steps,
        "alpha": plan_of_steps.alpha,
        "mean_density": mean,
        "expected_from": estimate.SOURCE if expected_dense else None,
        "steps": rows,
    }
    occurring = dict.fromkeys(row["stage"] for row in rows)
    return result, [
        (f"{stage}, window {by(resolved[stage].windows[0])}", resolved[stage]) for stage in occurring
    ]


def _from_file(console: Console, path: Path, stages: dict) -> tuple[dict, list[tuple[str, ResolvedConfig]]]:
    """The JSON result and the pictures of a `WindowTable`, once its table is printed."""
    if given := [name for name, value in stages.items() if value is not None]:
        option = "MODEL" if given[0] == "model" else f"--{given[0].replace('_', '-')}"
        raise UserError(f"--windows: a file has all of the schedule in it; leave {option} out")
    with asked():
        loaded = WindowTable.load(path)
    densities = loaded.densities()
    rows, every = [], Counter()
    for step, (layers, of_layers) in enumerate(zip(loaded.windows, densities, strict=True)):
        count = Counter(itertools.chain.from_iterable(layers))
        every += count
        rows.append(
            {
                "step": step,
                "density": sum(of_layers) / len(of_layers),
                "least": min(of_layers),
                "most": max(of_layers),
                "distinct_windows": len(count),
                "most_frequent": count.most_common(1)[0][0],
            }
        )
    console.print(
        f"{path}: grid {by(loaded.grid)}, tile {by(loaded.config.tile)}, {loaded.num_steps} steps, "
        f"{loaded.num_layers} layers, {loaded.heads} heads"
    )
    table = table_of("step", "density", "sparsest layer", "densest layer", "windows", "most frequent")
    for row in rows:
        numbers = (f"{row[name]:.3f}" for name in ("density", "least", "most"))
        table.add_row(str(row["step"]), *numbers, str(row["distinct_windows"]), by(row["most_frequent"]))
    console.print(table)
    mean = sum(row["density"] for row in rows) / len(rows)
    console.print(f"Mean density over {loaded.num_steps} steps: {mean:.3f}.")
    result = {
        "grid": loaded.grid,
        "tile": loaded.config.tile,
        "heads": loaded.heads,
        "layers": loaded.num_layers,
        "num_steps": loaded.num_steps,
        "mean_density": mean,
        "steps": rows,
    }
    total = sum(every.values())
    pictures = [
        (f"{n / total:.0%} of all have window {by(window)}", _one_window(loaded, window))
        for window, n in every.most_common(MOST_PICTURES)
    ]
    return result, pictures


def _one_window(table: WindowTable, window: Triple) -> ResolvedConfig:
    config = AttentionConfig(tile=table.config.tile, window=window, border=table.config.border)
    return config.resolve(table.grid, 1)


def _seen(resolved: ResolvedConfig) -> torch.Tensor:
    """int64 [tiles t, h, w]: UNSEEN, SEEN or QUERY, for the query tile in the middle of the grid."""
    geometry: TileGeometry = resolved.geometry
    seen = torch.full((geometry.n_tiles,), UNSEEN)
    t, h, w = (n // 2 for n in geometry.tiles)
    query = (t * geometry.tiles[1] + h) * geometry.tiles[2] + w
    seen[geometry.key_tiles(query, resolved.windows[0], resolved.border)] = SEEN
    seen[query] = QUERY
    return seen[: geometry.n_video_tiles].view(geometry.tiles)  # runs of text have no place in the grid


def _planes(resolved: ResolvedConfig) -> Columns:
    """One block of characters for each layer of tiles along t, as many in a row as fit."""
    blocks = []
    for t, plane in enumerate(_seen(resolved).tolist()):
        text = Text(f"t = {t}\n")
        for row in plane:
            for mark in row:
                text.append(*MARKS[mark])
            text.append("\n")
        blocks.append(text)
    return Columns(blocks, padding=(0, 3))


def _draw(path: Path, pictures: list[tuple[str, ResolvedConfig]]) -> None:
    """Write the picture: a row for each stage, in it a panel for each layer of tiles along t."""
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure

    planes = [_seen(resolved) for _, resolved in pictures]
    columns = max(len(seen) for seen in planes)
    figure = Figure(figsize=(max(6, 2.4 * columns), 2.2 * len(pictures)), layout="constrained")
    rows = figure.subfigures(len(pictures), 1, squeeze=False)[:, 0]
    for row, (title, resolved), seen in zip(rows, pictures, planes, strict=True):
        row.suptitle(f"{title}; density {resolved.density:.3f}", fontsize=10)
        # Tiles are drawn in the proportions that their tokens have in the video.
        _, height, width = resolved.tile
        for t, axes in enumerate(row.subplots(1, len(seen), squeeze=False)[0]):
            axes.imshow(
                seen[t].numpy(),
                cmap=ListedColormap(COLOURS),
                vmin=UNSEEN,
                vmax=QUERY,
                aspect=height / width,
                interpolation="nearest",
            )
            axes.set_title(f"t = {t}", fontsize=8)
            axes.set_axis_off()
    with asked():
        figure.savefig(path, dpi=120)
