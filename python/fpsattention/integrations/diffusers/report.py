"""The report of a handle: what runs in each step and layer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from ...core.checks import Triple
from ...core.config import AttentionConfig, ResolvedConfig
from ..hosts import StepConfig
from .transformer import PatchedTransformer


@dataclass(frozen=True)
class Row:
    """Steps and layers of a transformer that run the same. The layers are all that run FPSAttention, or all that do
    not.

    Attributes:
        transformer: its name in the pipeline.
        steps, layers: ascending.
        configs: the config of each of these layers in all these steps, fitted to the grid; None: the host's own dense
            attention.
    """

    transformer: str
    steps: tuple[int, ...]
    layers: tuple[int, ...]
    configs: tuple[ResolvedConfig, ...] | None

    @property
    def density(self) -> float:
        """Attended pairs of video tokens over all pairs, mean over layers and heads; with select as
        `ResolvedConfig.density`.
        """
        if self.configs is None:
            return 1.0
        if self.configs[0].select is not None:  # a schedule's, so of all layers
            return self.configs[0].density
        share: defaultdict[Triple, float] = defaultdict(float)
        for config in self.configs:
            for window in config.windows:
                share[window] += 1 / len(config.windows)
        geometry, border = self.configs[0].geometry, self.configs[0].border
        return sum(n * geometry.density(window, border) for window, n in share.items()) / len(self.configs)


@dataclass(frozen=True)
class Report:
    """What runs in each step and layer, from `Handle.report`. Its text is a table."""

    rows: tuple[Row, ...]

    @property
    def density(self) -> float:
        """Mean over the steps and layers of each transformer."""
        weights = [len(row.steps) * len(row.layers) for row in self.rows]
        return sum(w * row.density for w, row in zip(weights, self.rows, strict=True)) / sum(weights)

    def __str__(self) -> str:
        header = ("transformer", "steps", "layers", "attention", "tile", "window", "density", "padding")
        table = [header, *(_cells(row) for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = ["  ".join(x.ljust(n) for x, n in zip(row, widths, strict=True)).rstrip() for row in table]
        return "\n".join([*lines, f"mean density: {self.density:.3f}"])


def rows_of(
    patched: PatchedTransformer, grid: Triple, configs: Sequence[StepConfig], steps_run: list[int]
) -> list[Row]:
    """The rows of one transformer.

    Args:
        grid: tokens (T, H, W).
        configs: what runs in each step of the sampler, as from `step_configs`.
        steps_run: the steps that this transformer runs.
    """
    layers = tuple(patched.processors)
    steps_of: dict[tuple[AttentionConfig, ...] | None, list[int]] = {}
    for step in steps_run:
        config = configs[step]
        if isinstance(config, AttentionConfig):
            config = (config,) * len(layers)
        elif config is not None:
            config = tuple(config[i] for i in layers)
        steps_of.setdefault(config, []).append(step)
    rows = [
        Row(
            patched.name,
            tuple(steps),
            layers,
            None if of_layers is None else tuple(x.resolve(grid, patched.heads) for x in of_layers),
        )
        for of_layers, steps in steps_of.items()
        if layers
    ]
    if patched.dense_layers and steps_run:
        rows.append(Row(patched.name, tuple(steps_run), patched.dense_layers, None))
    return rows


def _cells(row: Row) -> tuple[str, ...]:
    start = (row.transformer, _ranges(row.steps), _ranges(row.layers))
    if row.configs is None:
        return (*start, "the host's own", "-", "dense", "1.000", "-")
    first, geometry, windows = row.configs[0], row.configs[0].geometry, {x.windows for x in row.configs}
    if first.select is not None:
        window = str(first.select)
    elif len(windows) > 1:
        window = "per layer"
    elif len(first.windows) > 1:
        window = "per head"
    else:
        window = "dense" if first.windows == (geometry.tiles,) else str(first.windows[0])
    kind = "FPSAttention, FP8" if first.quant == "fp8" else "FPSAttention, not rounded"
    return (*start, kind, str(first.tile), window, f"{row.density:.3f}", f"{geometry.waste:.1%}")


def _ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers as "0-3,7"."""
    starts = [x for i, x in enumerate(numbers) if i == 0 or x != numbers[i - 1] + 1]
    ends = [x for i, x in enumerate(numbers) if i == len(numbers) - 1 or x != numbers[i + 1] - 1]
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))
