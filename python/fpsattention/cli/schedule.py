"""`fpsattention schedule`: what every denoising step attends, and a picture of the windows."""

from __future__ import annotations

import argparse
import itertools
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..core.checks import Triple
from ..core.config import AttentionConfig, ResolvedConfig
from ..core.geometry import TileGeometry
from ..schedules.models import VideoModel
from ..schedules.presets import preset as preset_of
from ..schedules.schedule import STAGES, StepSchedule
from ..schedules.windows import WindowTable
from . import estimate, options
from .console import by, milliseconds, people, print_json, table_of
from .errors import UserError, asked, require

if TYPE_CHECKING:
    from rich.columns import Columns
    from rich.console import Console

UNSEEN, SEEN, QUERY = 0, 1, 2
MARKS = {UNSEEN: ("·", "dim"), SEEN: ("#", "yellow"), QUERY: ("Q", "bold cyan")}
COLOURS = ["#2b2b2b", "#ffb300", "#00e5ff"]  # of UNSEEN, SEEN and QUERY in the picture
DEFAULT_STEPS, DEFAULT_ALPHA = 50, (0.2, 0.8)
MOST_PICTURES = 3  # the most frequent windows of a table


@dataclass(frozen=True)
class StageStep:
    """A row of a `StepSchedule`'s table. `expected_ms` is of one forward; None without an estimate."""

    step: int
    stage: str
    tile: Triple
    scales: Triple
    window: Triple
    density: float
    expected_ms: float | None


@dataclass(frozen=True)
class TableStep:
    """A row of a `WindowTable`'s table: densities over the layers, and windows over layers and heads."""

    step: int
    density: float
    least: float
    most: float
    distinct_windows: int
    most_frequent: Triple


class _Collect(argparse.Action):
    """Collect the values of several options in one dict {option: value}."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: object,
        option_string: str | None = None,
    ) -> None:
        setattr(namespace, self.dest, {**getattr(namespace, self.dest), self.option_strings[0]: values})


Pictures = list[tuple[str, ResolvedConfig]]  # title, and the config whose window is drawn


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "A row for each denoising step, and a picture of what one query tile attends in each stage. The windows are "
        "those of three stages (a stage not named is dense), those of the model's preset, or come from a file with a "
        "window for every step, layer and head, as `fpsattention calibrate` writes it."
    )
    options.add_shape(parser)
    for stage in STAGES:
        for option, text in (
            (f"--{stage}", f"window of the {stage} steps, in tiles (default: dense)"),
            (f"--{stage}-scales", f"tokens that share a scale in the {stage} steps (default: the tile)"),
        ):
            parser.add_argument(
                option, help=text, action=_Collect, dest="stages", default={}, **options.TRIPLE
            )
    parser.add_argument(
        "--alpha",
        type=options.fraction,
        nargs=2,
        metavar=("A", "B"),
        help="progress, 0 to 1, at which mid and late begin (default: 0.2 0.8)",
    )
    parser.add_argument(
        "--num-steps", type=options.positive, metavar="N", help="steps of the sampler (default: 50)"
    )
    options.add_border(parser, default=None)  # None: not given, as --windows requires
    parser.add_argument(
        "--preset",
        action="store_true",
        help="the model's preset, in place of --tile and the options of stages and border; it was not trained with",
    )
    parser.add_argument(
        "--windows", type=Path, metavar="FILE", help="a table of windows, in place of all options above"
    )
    parser.add_argument(
        "--output", type=options.new_picture, metavar="PNG", help="also draw the picture to this file"
    )
    options.add_json(parser)


def run(
    *,
    asked_shape: options.ShapeOptions,
    stages: dict[str, Triple],
    alpha: tuple[float, float] | None,
    num_steps: int | None,
    border: options.Border | None,
    preset: bool,
    windows: Path | None,
    output: Path | None,
    as_json: bool,
) -> None:
    """The `schedule` command. `stages` holds the values of the options --STAGE and --STAGE-scales that are given.

    Raises UserError for what is not legal, for a file that cannot be read or written, and for --preset or --windows
    beside an option that it replaces.
    """
    require("rich", *(["matplotlib"] if output else []))
    from rich.text import Text

    fixed: dict[str, object] = {"--tile": asked_shape.tile, **stages, "--alpha": alpha, "--border": border}
    steps = num_steps or DEFAULT_STEPS
    if windows is not None:
        in_file = {
            "MODEL": asked_shape.model,
            "--grid": asked_shape.grid,
            "--heads": asked_shape.heads,
            "--head-dim": asked_shape.head_dim,
            "--num-steps": num_steps,
            "--preset": preset or None,
        }
        _refuse(in_file | fixed, "--windows: the file holds the whole schedule")
        console = people(as_json)
        result, pictures = _of_table(console, windows)
    elif preset:
        _refuse(
            {"--grid": asked_shape.grid} | fixed,
            "--preset: it is of a MODEL, with a tile and windows of its own",
        )
        console = people(as_json)
        result, pictures = _of_preset(console, asked_shape, steps)
    else:
        console = people(as_json)
        with asked():
            shape = asked_shape.choose()
            schedule = _step_schedule(
                shape, asked_shape.tile, stages, alpha or DEFAULT_ALPHA, border or "clamp"
            )
        result, pictures = _of_stages(console, shape, schedule, steps)
    for title, resolved in pictures:
        console.print(Text.assemble((title, "bold"), ": what the query tile Q in the middle attends (#)"))
        console.print(_planes(resolved))
    if output is not None:
        _draw(output, pictures)
        console.print(f"Picture: {output}")
    if as_json:
        print_json({**result, "picture": output and str(output)})


def _refuse(options: dict[str, object], because: str) -> None:
    """Raises UserError if one of the options, by name, has a value."""
    for option, value in options.items():
        if value is not None:
            raise UserError(f"{because}; leave {option} out")


def _step_schedule(
    shape: VideoModel,
    tile: Triple | None,
    stages: dict[str, Triple],
    alpha: tuple[float, float],
    border: options.Border,
) -> StepSchedule:
    """The schedule of `run`'s `stages`. Raises ValueError for what is not legal."""
    if not stages:
        raise ValueError(
            "no window: give one of --early, --mid and --late, --preset, or a file with --windows"
        )
    tile = shape.resolve(AttentionConfig(tile=tile)).tile
    configs = {
        stage: AttentionConfig(
            tile=tile,
            window=stages.get(f"--{stage}"),
            border=border,
            quant_tile=stages.get(f"--{stage}-scales"),
        )
        for stage in STAGES
    }
    for config in configs.values():
        shape.resolve(config)
    return StepSchedule(configs["early"], configs["mid"], configs["late"], alpha)


def _of_preset(console: Console, asked_shape: options.ShapeOptions, num_steps: int) -> tuple[dict, Pictures]:
    """Print the table of a model's preset. Returns the JSON result and the pictures."""
    with asked():
        shape = asked_shape.choose()
        chosen = preset_of(shape.name, num_steps=num_steps)
    result, pictures = _of_stages(console, shape, chosen.schedule, num_steps)
    layers = ", ".join(map(str, chosen.dense_layers))
    console.print(
        f"Layers with the host's own attention: {layers}. The model was not trained with this preset."
    )
    return result | {"dense_layers": chosen.dense_layers}, pictures


def _of_stages(
    console: Console, shape: VideoModel, schedule: StepSchedule, num_steps: int
) -> tuple[dict, Pictures]:
    """Print the table of a `StepSchedule`. Returns the JSON result and the pictures."""
    resolved = {stage: shape.resolve(getattr(schedule, stage)) for stage in STAGES}
    dense = shape.resolve(AttentionConfig(tile=resolved["early"].tile))
    expected = {s: estimate.forward(x, shape.heads, shape.head_dim) for s, x in resolved.items()}
    expected_dense = estimate.forward(dense, shape.heads, shape.head_dim)

    rows = []
    for step in range(num_steps):
        stage = schedule.stage(step=step, num_steps=num_steps)
        of, forward = resolved[stage], expected[stage]
        ms = None if forward is None else forward.ms
        rows.append(StageStep(step, stage, of.tile, of.quant_tile, of.windows[0], of.density, ms))
    mean_density = sum(row.density for row in rows) / num_steps
    _print_stages(console, rows, mean_density)
    if shape.text_tokens:
        console.print(f"Text: {shape.text_sentence}.")
    if expected_dense is not None:
        total = shape.layers * sum(row.expected_ms or 0.0 for row in rows)
        console.print(
            f"Expected: {milliseconds(total)} for {num_steps} steps x {shape.layers} layers, dense "
            f"{milliseconds(shape.layers * num_steps * expected_dense.ms)}; guidance doubles both. An estimate from "
            f"rates measured on an {estimate.SOURCE}."
        )
    result = {
        "grid": shape.grid,
        "prefix_len": dense.prefix_len,
        "suffix_len": dense.suffix_len,
        "heads": shape.heads,
        "head_dim": shape.head_dim,
        "layers": shape.layers,
        "num_steps": num_steps,
        "alpha": schedule.alpha,
        "mean_density": mean_density,
        "expected_from": estimate.SOURCE if expected_dense else None,
        "steps": [asdict(row) for row in rows],
    }
    occurring = dict.fromkeys(row.stage for row in rows)
    return result, [
        (f"{stage}, window {by(resolved[stage].windows[0])}", resolved[stage]) for stage in occurring
    ]


def _print_stages(console: Console, rows: list[StageStep], mean_density: float) -> None:
    columns = ("step", "stage", "tile", "scales", "window", "density", "expected")
    table = table_of(*columns, words=("stage",))
    for row in rows:
        triples = map(by, (row.tile, row.scales, row.window))
        ms = "-" if row.expected_ms is None else milliseconds(row.expected_ms)
        table.add_row(str(row.step), row.stage, *triples, f"{row.density:.3f}", ms)
    console.print(table)
    console.print(f"Mean density over {len(rows)} steps: {mean_density:.3f}.")


def _of_table(console: Console, path: Path) -> tuple[dict, Pictures]:
    """Print a file's `WindowTable`. Returns the JSON result and the pictures."""
    with asked():
        loaded = WindowTable.load(path)
    densities = loaded.densities()
    rows: list[TableStep] = []
    every: Counter[Triple] = Counter()
    for step, (layers, of_layers) in enumerate(zip(loaded.windows, densities, strict=True)):
        count = Counter(itertools.chain.from_iterable(layers))
        every += count
        mean = sum(of_layers) / len(of_layers)
        most_frequent = count.most_common(1)[0][0]
        rows.append(TableStep(step, mean, min(of_layers), max(of_layers), len(count), most_frequent))
    mean_density = sum(row.density for row in rows) / len(rows)
    tile = loaded.config.resolve(loaded.grid, 1).tile
    console.print(
        f"{path}: grid {by(loaded.grid)}, tile {by(tile)}, {loaded.num_steps} steps, "
        f"{loaded.num_layers} layers, {loaded.heads} heads"
    )
    table = table_of("step", "density", "sparsest layer", "densest layer", "windows", "most frequent")
    for row in rows:
        numbers = (f"{density:.3f}" for density in (row.density, row.least, row.most))
        table.add_row(str(row.step), *numbers, str(row.distinct_windows), by(row.most_frequent))
    console.print(table)
    console.print(f"Mean density over {loaded.num_steps} steps: {mean_density:.3f}.")
    result = {
        "grid": loaded.grid,
        "tile": tile,
        "heads": loaded.heads,
        "layers": loaded.num_layers,
        "num_steps": loaded.num_steps,
        "mean_density": mean_density,
        "steps": [asdict(row) for row in rows],
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
    """What the query tile in the middle of the grid attends: int64 [tiles t, h, w] of UNSEEN, SEEN and QUERY."""
    geometry: TileGeometry = resolved.geometry
    seen = torch.full((geometry.n_tiles,), UNSEEN)
    t, h, w = (n // 2 for n in geometry.tiles)
    query = (t * geometry.tiles[1] + h) * geometry.tiles[2] + w
    seen[geometry.key_tiles(query, resolved.windows[0], resolved.border)] = SEEN
    seen[query] = QUERY
    return seen[: geometry.n_video_tiles].view(geometry.tiles)  # without the text tiles


def _planes(resolved: ResolvedConfig) -> Columns:
    """One block of characters for each plane of tiles along t, as many side by side as fit."""
    from rich.columns import Columns
    from rich.text import Text

    blocks = []
    for t, plane in enumerate(_seen(resolved).tolist()):
        text = Text(f"t = {t}\n")
        for row in plane:
            for mark in row:
                text.append(*MARKS[mark])
            text.append("\n")
        blocks.append(text)
    return Columns(blocks, padding=(0, 3))


def _draw(path: Path, pictures: Pictures) -> None:
    """Write the picture: a row for each of `pictures`, with a panel for each plane of tiles along t."""
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure

    planes = [_seen(resolved) for _, resolved in pictures]
    columns = max(len(seen) for seen in planes)
    figure = Figure(figsize=(max(6, 2.4 * columns), 2.2 * len(pictures)), layout="constrained")
    rows = figure.subfigures(len(pictures), 1, squeeze=False)[:, 0]
    for row, (title, resolved), seen in zip(rows, pictures, planes, strict=True):
        row.suptitle(f"{title}; density {resolved.density:.3f}", fontsize=10)
        # Tiles keep the proportions of their tokens in the video.
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
