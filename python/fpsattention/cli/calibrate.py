"""`fpsattention calibrate`: search the sparsest window for every step, layer and head on the user's own Q, K and V."""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import torch

from ..core.checks import Triple
from ..core.config import AttentionConfig
from ..core.support import backend_for
from ..schedules.files import write_json
from ..schedules.search import by_density, legal_windows, search
from ..schedules.windows import WindowTable
from . import options
from .console import by, people, print_json, progress, table_of
from .errors import UserError, asked, chosen_device, require

if TYPE_CHECKING:
    from rich.console import Console

STATE_FORMAT = "fpsattention-calibration-1"
FILE = re.compile(r"step(\d+)_layer(\d+)\.safetensors", re.ASCII)

# Most elements of Q that are searched at a time: 13 heads of Wan at 720p, which has 9.7 million a head. A search holds
# about ten tensors of that size, four of them fp32: 4 GB.
ELEMENTS_AT_ONCE = 2**27


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "For each head, find the sparsest window whose output, FP8 rounding included, is within the budget of dense "
        "exact attention. FOLDER holds one file step<N>_layer<M>.safetensors for each captured step and layer, with "
        "tensors q, k and v; several prompts form the batch, and the worst of them counts. The result is a table for "
        "fpsattention.WindowTable.load. Progress is saved beside it: after an interruption, the same command resumes."
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--grid", required=True, help="tokens of the video", **options.GRID)
    parser.add_argument(
        "--budget",
        type=options.between(0, 10),
        required=True,
        metavar="E",
        help="largest relative RMS error of a head's output, for example 0.15; FP8 rounding alone costs about 0.05 on "
        "Gaussian inputs",
    )
    parser.add_argument(
        "--num-steps",
        type=options.positive,
        required=True,
        metavar="N",
        help="steps of the sampler; a step that was not captured takes the windows of the nearest captured one",
    )
    parser.add_argument(
        "--layout",
        choices=("NHD", "HND"),
        default="NHD",
        help="layout of the tensors: [B, L, H, D] or [B, H, L, D] (default: %(default)s)",
    )
    options.add_tile(parser)
    options.add_border(parser)
    parser.add_argument(
        "--candidate",
        help="a window to try, in tiles; may be repeated (default: all legal ones)",
        action="append",
        dest="candidates",
        **options.TRIPLE,
    )
    options.add_device(parser)
    parser.add_argument(
        "--output",
        type=options.new_file,
        default="windows.json",
        metavar="FILE",
        help="the table (default: %(default)s)",
    )
    parser.add_argument("--restart", action="store_true", help="ignore the progress of an earlier run")
    options.add_json(parser)


@dataclass(frozen=True)
class Capture:
    """One file: Q, K and V of a step and a layer. `shape` is [B, H, L, D] in either layout."""

    path: Path
    step: int
    layer: int
    shape: tuple[int, int, int, int]

    @property
    def stamp(self) -> list[int]:
        """Changes when the file does: its bytes, and the time of its last change in ns."""
        stat = self.path.stat()
        return [stat.st_size, stat.st_mtime_ns]


class Entry(TypedDict):
    """What the search of one file found: the file's `Capture.stamp`, and a window and an error of each head."""

    stamp: list[int]
    windows: list[Triple]
    errors: list[float]


Results = dict[tuple[int, int], Entry]  # by (step, layer)


def run(
    *,
    folder: Path,
    grid: Triple,
    budget: float,
    num_steps: int,
    layout: str,
    tile: Triple | None,
    border: options.Border,
    candidates: list[Triple] | None,
    device: str,
    output: Path,
    restart: bool,
    as_json: bool,
) -> None:
    """The `calibrate` command. Writes the table to `output` and, after every file, its progress beside it.

    Raises UserError for files, shapes and options that do not fit, MachineError when --device cuda finds no GPU.
    """
    require("rich", "safetensors")
    with asked():
        captures = _captures(folder, grid, layout, num_steps)
        heads = captures[0].shape[1]
        resolved = AttentionConfig(tile=tile, border=border).resolve(grid, heads)
        config = AttentionConfig(tile=resolved.tile, border=border)
        geometry = resolved.geometry
        if candidates is None:
            candidates = legal_windows(geometry, border)
        else:
            fitted = [replace(config, window=w).resolve(grid, 1).windows[0] for w in candidates]
            candidates = by_density({*fitted, geometry.tiles}, geometry, border)
    job = Search(grid, config, layout, budget, candidates, chosen_device(device))
    settings = {
        "grid": list(resolved.grid),
        "tile": list(resolved.tile),
        "border": border,
        "layout": layout,
        "budget": budget,
        "candidates": [list(window) for window in candidates],
    }
    state_path = output.with_suffix(".state.json")
    done = {} if restart else _load_state(state_path, settings)

    console = people(as_json)
    console.print(
        f"{len(captures)} files, grid {by(resolved.grid)}, tile {by(resolved.tile)}, {heads} heads, "
        f"{len(candidates)} windows to choose from"
    )
    results: Results = {}
    with progress(remaining=True) as bar, torch.no_grad():
        task = bar.add_task("", total=len(captures) * heads)
        for capture in captures:
            entry = done.get(capture.path.name)
            if entry is None or entry["stamp"] != capture.stamp or len(entry["windows"]) != heads:
                bar.update(task, description=f"step {capture.step}, layer {capture.layer}")
                entry = job.entry_of(capture, partial(bar.advance, task))
                done[capture.path.name] = entry
                with asked():
                    write_json(state_path, {"format": STATE_FORMAT, "settings": settings, "files": done})
            else:
                bar.advance(task, heads)
            results[capture.step, capture.layer] = entry
        bar.update(task, description="done")

    table = _table(results, resolved.grid, config, num_steps)
    with asked():
        table.save(output)
    if job.backend is not None and job.backend[0] == "reference":
        console.print(f"Ran on the reference backend: {job.backend[1]}.")
    _report(console, table, results, budget, output, state_path, as_json)


@dataclass
class Search:
    """The search of one run. `backend` is that of the first search, (name, reason); None before it."""

    grid: Triple
    config: AttentionConfig
    layout: str
    budget: float
    candidates: list[Triple]
    device: torch.device
    backend: tuple[str, str] | None = None

    def entry_of(self, capture: Capture, advance: Callable[[int], None]) -> Entry:
        """Search the heads of one file. Calls `advance` with the number of heads just done.

        Raises UserError for tensors that attention does not take.
        """
        from safetensors import SafetensorError

        entry: Entry = {"stamp": capture.stamp, "windows": [], "errors": []}
        try:
            for part in _parts(capture, self.layout):
                q, k, v = (x.to(self.device) for x in part)
                self.backend = self.backend or backend_for(q, self.config)
                windows, errors = search(
                    q,
                    k,
                    v,
                    grid=self.grid,
                    config=self.config,
                    candidates=self.candidates,
                    budget=self.budget,
                    tensor_layout=self.layout,
                )
                entry["windows"] += windows
                entry["errors"] += errors
                advance(len(windows))
        except (TypeError, ValueError, OSError, SafetensorError) as error:
            raise UserError(f"{capture.path}: {error}") from error
        return entry


def _captures(folder: Path, grid: Triple, layout: str, num_steps: int) -> list[Capture]:
    """The files of a folder in order of step and layer. Their headers fit together.

    Raises ValueError for a file of another name or form, a missing layer, a step beyond `num_steps`.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: is not a folder")
    found: dict[tuple[int, int], Capture] = {}
    for path in sorted(folder.glob("*.safetensors")):
        match = FILE.fullmatch(path.name)
        if match is None:
            raise ValueError(f"{path}: a file must be named step<N>_layer<M>.safetensors")
        step, layer = map(int, match.groups())
        if step >= num_steps:
            raise ValueError(f"{path}: step {step} is out of range, --num-steps is {num_steps}")
        if (step, layer) in found:
            raise ValueError(f"{path}: is the same step and layer as {found[step, layer].path.name}")
        found[step, layer] = Capture(path, step, layer, _shape(path, grid, layout))
    if not found:
        raise ValueError(f"{folder}: holds no file step<N>_layer<M>.safetensors")
    captures = [found[place] for place in sorted(found)]
    first = captures[0]
    for capture in captures:
        if capture.shape[1:] != first.shape[1:]:
            raise ValueError(
                f"{capture.path}: has heads, tokens, channels {capture.shape[1:]}, {first.path.name} has "
                f"{first.shape[1:]}"
            )
    layers = range(max(layer for _, layer in found) + 1)
    for step in sorted({step for step, _ in found}):
        if missing := [layer for layer in layers if (step, layer) not in found]:
            raise ValueError(
                f"{folder}: step {step} lacks layer {missing[0]}; every step needs all layers, 0 to {layers[-1]}"
            )
    return captures


def _shape(path: Path, grid: Triple, layout: str) -> tuple[int, int, int, int]:
    """[B, H, L, D] of the tensors in a file, from its header."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            names = sorted(file.keys())
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names}
    except (SafetensorError, OSError) as error:  # OSError: a folder has that name
        raise ValueError(f"{path}: is not a safetensors file ({error})") from error
    if names != ["k", "q", "v"]:
        raise ValueError(f"{path}: must hold the tensors q, k and v and no others, holds {names}")
    shape = shapes["q"]
    if len(shape) != 4 or len(set(shapes.values())) != 1:
        raise ValueError(f"{path}: q, k and v must have one shape of four dimensions, have {shapes}")
    if layout == "NHD":
        shape = (shape[0], shape[2], shape[1], shape[3])
    if shape[2] != math.prod(grid):
        raise ValueError(
            f"{path}: has {shape[2]} tokens in layout {layout}, grid {tuple(grid)} has {math.prod(grid)}"
        )
    if not all(shape):
        raise ValueError(f"{path}: shape {shapes['q']} is empty")
    return shape


def _parts(capture: Capture, layout: str) -> Iterator[tuple[torch.Tensor, ...]]:
    """(q, k, v) on the CPU in the file's layout, as many heads at a time as `ELEMENTS_AT_ONCE` allows."""
    from safetensors import safe_open

    batch, heads, tokens, head_dim = capture.shape
    at_once = max(1, ELEMENTS_AT_ONCE // (batch * tokens * head_dim))
    with safe_open(capture.path, framework="pt") as file:
        slices = [file.get_slice(name) for name in "qkv"]
        for first in range(0, heads, at_once):
            some = slice(first, min(first + at_once, heads))
            yield tuple(x[:, :, some] if layout == "NHD" else x[:, some] for x in slices)


def _load_state(path: Path, settings: dict) -> dict[str, Entry]:
    """The files that an earlier run has done; empty without one. Raises UserError when it had other settings."""
    if not path.exists():
        return {}
    try:
        state = json.loads(path.read_text())
        if state["format"] != STATE_FORMAT:
            raise ValueError(f"format {state['format']!r} is not {STATE_FORMAT!r}")
        before, files = {name: state["settings"][name] for name in settings}, state["files"]
        for name, entry in files.items():
            windows, errors = entry["windows"], entry["errors"]
            if not (
                entry["stamp"]
                and len(windows) == len(errors) > 0
                and all(window in before["candidates"] for window in windows)
                and all(0 <= error < math.inf for error in errors)
            ):
                raise ValueError(f"the windows and errors of {name} are damaged")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}: is not the progress of an earlier run ({error}); remove it, or give --restart"
        ) from error
    for name, value in settings.items():
        if before[name] != value:
            was = "other ones" if name == "candidates" else before[name]
            raise UserError(
                f"{path}: an earlier run had other settings ({name}: {was}); use those again, or give another "
                "--output or --restart"
            )
    return files


def _table(results: Results, grid: Triple, config: AttentionConfig, num_steps: int) -> WindowTable:
    """The table of all steps. A step between captured ones has the windows of the nearest, the earlier of two."""
    captured = sorted({step for step, _ in results})
    layers = range(len(results) // len(captured))
    nearest = [min(captured, key=lambda c: (abs(c - step), c)) for step in range(num_steps)]
    windows = tuple(tuple(tuple(results[step, layer]["windows"]) for layer in layers) for step in nearest)
    return WindowTable(grid, config, windows)


def _report(
    console: Console,
    table: WindowTable,
    results: Results,
    budget: float,
    output: Path,
    state_path: Path,
    as_json: bool,
) -> None:
    densities = table.densities()
    whole = table.config.resolve(table.grid, table.heads).geometry.tiles
    rows = []
    for step in sorted({step for step, _ in results}):
        entries = [entry for (s, _), entry in results.items() if s == step]
        errors = [error for entry in entries for error in entry["errors"]]
        windows = [tuple(window) for entry in entries for window in entry["windows"]]
        rows.append(
            {
                "step": step,
                "density": sum(densities[step]) / table.num_layers,
                "mean_error": sum(errors) / len(errors),
                "worst_error": max(errors),
                "dense_heads": windows.count(whole),
                "over_budget": sum(error > budget for error in errors),
            }
        )
    shown = table_of("captured step", "density", "mean error", "worst error", "dense heads", "over budget")
    for row in rows:
        numbers = (f"{row[name]:.4f}" for name in ("density", "mean_error", "worst_error"))
        shown.add_row(str(row["step"]), *numbers, str(row["dense_heads"]), str(row["over_budget"]))
    console.print(shown)
    over = sum(row["over_budget"] for row in rows)
    if over:
        console.print(
            f"{over} heads are over the budget of {budget:g} even when they attend the whole grid: FP8 alone costs "
            "more. They are dense in the table."
        )
    mean = sum(map(sum, densities)) / (table.num_steps * table.num_layers)
    console.print(
        f"Mean density over {table.num_steps} steps: {mean:.3f}. Table: {output}; errors of every head: {state_path}"
    )
    if as_json:
        print_json(
            {
                "table": str(output),
                "state": str(state_path),
                "grid": table.grid,
                "tile": table.config.tile,
                "budget": budget,
                "num_steps": table.num_steps,
                "layers": table.num_layers,
                "heads": table.heads,
                "mean_density": mean,
                "captured_steps": rows,
            }
        )
