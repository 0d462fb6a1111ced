"""The log of a training run, `log.csv` in its folder with a row for each step, and its picture, `loss.png`."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from matplotlib.figure import Figure

LOG, PLOT = "log.csv", "loss.png"


def append(folder: Path, columns: Sequence[str], rows: Sequence[Sequence]) -> None:
    """Add rows. A new log gets the names of its columns first, of which "step" is the first."""
    new = not (folder / LOG).exists()
    with open(folder / LOG, "a", newline="") as file:
        csv.writer(file).writerows([columns, *rows] if new else rows)


def read(folder: Path) -> list[list[str]]:
    with open(folder / LOG, newline="") as file:
        return list(csv.reader(file))[1:]


def cut(folder: Path, columns: Sequence[str], step: int) -> None:
    """Drop the rows of steps after the checkpoint at `step`: those steps will run again."""
    rows = read(folder)
    with open(folder / LOG, "w", newline="") as file:
        csv.writer(file).writerows([columns, *(row for row in rows if int(row[0]) <= step)])


def plot(folder: Path, columns: Sequence[str], curves: Sequence[str], *, ylabel: str, title: str) -> None:
    """Draw these columns over the step, smoothed. Empty cells have no point."""
    rows = [[float(x or "nan") for x in row] for row in read(folder)]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for curve in curves:
        column = columns.index(curve)
        points = [(row[0], row[column]) for row in rows if not math.isnan(row[column])]
        width = max(1, len(points) // 50)
        means = [points[i : i + width] for i in range(0, len(points), width)]
        axes.plot([mean(p[0] for p in m) for m in means], [mean(p[1] for p in m) for m in means], label=curve)
    axes.set(xlabel="step", ylabel=ylabel, yscale="log", title=title)
    axes.legend()
    part = folder / f"{PLOT}.part"
    figure.savefig(part, dpi=120, format="png")
    os.replace(part, folder / PLOT)
