"""Tables of windows, one for each denoising step, layer and head, and the files they are saved in."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from ..core.checks import Triple, as_grid, as_int, as_triple, shown
from ..core.config import AttentionConfig, as_config, fit_window
from ..core.geometry import tile_geometry
from .files import check_object, config_from_json, config_to_json, read_json, write_json

FORMAT = "fpsattention-windows-1"
STA_TILE = (6, 8, 8)  # FastVideo's tile, in which its files count windows

LayerWindows = tuple[tuple[Triple, ...], ...]
"""Windows of one step: `[num_layers][heads]`."""


@dataclass(frozen=True)
class WindowTable:
    """A window for every (step, layer, head) of one model at one video size. Immutable, hashable.

    A `StepSchedule` has three configs for all layers and heads; this has a window for each. Both have a method `at`.

    Attributes:
        grid: tokens (T, H, W) the windows were chosen for.
        config: everything but the windows: tile (required), border, rounding.
        windows: (wt, wh, ww) in tiles, `[num_steps][num_layers][heads]`. An entry larger than its axis becomes the
            axis.

    Raises TypeError or ValueError that name the argument, its value, the rule and the nearest legal value; so do
    all methods. The errors name a window as `windows[step][layer][head]`.
    """

    grid: Triple
    config: AttentionConfig
    windows: tuple[LayerWindows, ...]

    def __post_init__(self):
        object.__setattr__(self, "grid", as_grid(self.grid))
        if not isinstance(self.config, AttentionConfig):
            raise TypeError(f"config: {shown(self.config)} must be an AttentionConfig")
        if self.config.tile is None:
            raise ValueError("config: tile=None; give the tile in which the windows are counted")
        if self.config.window is not None:
            raise ValueError(f"config: window={shown(self.config.window)} must be None: windows has them")
        if self.config.select is not None:
            raise ValueError(
                f"config: select={shown(self.config.select)} must be None: a table has windows; a StepSchedule takes "
                f"configs that select"
            )
        object.__setattr__(self, "windows", _checked(self.windows, self.grid, self.config))

    @property
    def num_steps(self) -> int:
        """Steps of the sampler."""
        return len(self.windows)

    @property
    def num_layers(self) -> int:
        """Layers of the transformer."""
        return len(self.windows[0])

    @property
    def heads(self) -> int:
        """Heads of a layer."""
        return len(self.windows[0][0])

    def at(self, *, step: int, layer: int, num_steps: int | None = None) -> AttentionConfig:
        """The config of a layer in an inference step. Equal configs are the same object.

        Args:
            step: the sampler's step, from 0 (pure noise), as in `StepSchedule.at`.
            layer: index of the transformer block.
            num_steps: of the sampler, if known; must be the table's.
        """
        if num_steps is not None and as_int("num_steps", num_steps, 1) != self.num_steps:
            raise ValueError(f"num_steps: {shown(num_steps)} is not the table's, {self.num_steps}")
        step = as_int("step", step, 0, self.num_steps - 1)
        return self.configs[step][as_int("layer", layer, 0, self.num_layers - 1)]

    @cached_property
    def configs(self) -> tuple[tuple[AttentionConfig, ...], ...]:
        """What `at` returns, `[num_steps][num_layers]`."""
        made: dict[tuple[Triple, ...], AttentionConfig] = {}
        for layers in self.windows:
            for heads in layers:
                if heads not in made:
                    made[heads] = with_windows(self.config, heads)
        return tuple(tuple(made[heads] for heads in layers) for layers in self.windows)

    def densities(self) -> list[list[float]]:
        """Attended pairs over all pairs, mean over the heads, `[num_steps][num_layers]`."""
        geometry = tile_geometry(self.grid, self.config.tile)
        distinct = {window for layers in self.windows for heads in layers for window in heads}
        density = {window: geometry.density(window, self.config.border) for window in distinct}
        return [
            [sum(density[window] for window in heads) / self.heads for heads in layers]
            for layers in self.windows
        ]

    def save(self, path: str | Path) -> None:
        """Write the table as JSON. The file is written whole or not at all."""
        index: dict[Triple, int] = {}
        steps = [
            [[index.setdefault(w, len(index)) for w in heads] for heads in layers] for layers in self.windows
        ]
        data = {
            "format": FORMAT,
            "grid": self.grid,
            "config": config_to_json(self.config, without="window"),
            "windows": list(index),
            "steps": steps,  # [step][layer][head], indices in "windows"
        }
        write_json(path, data)

    @classmethod
    def load(cls, path: str | Path) -> WindowTable:
        """Read a file that `save` wrote.

        Raises ValueError, with the path, for any other content: an unknown, missing or repeated key, an index without a
        window, a window that does not fit.
        """
        data = read_json(path)
        try:
            check_object("", data, {"grid", "config", "windows", "steps"}, FORMAT)
            config = config_from_json("config", data["config"], without="window")
            listed = _as_list('"windows"', data["windows"])
            windows = [as_triple(f'"windows"[{i}]', w, 1) for i, w in enumerate(listed)]
            steps = tuple(
                tuple(
                    tuple(_window_of(windows, index) for index in _as_list(f'"steps"[{s}][{i}]', heads))
                    for i, heads in enumerate(_as_list(f'"steps"[{s}]', layers))
                )
                for s, layers in enumerate(_as_list('"steps"', data["steps"]))
            )
            return cls(data["grid"], config, steps)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from error

    @classmethod
    def from_fastvideo(
        cls,
        path: str | Path,
        *,
        grid: Sequence[int],
        num_steps: int,
        num_layers: int,
        heads: int,
        config: AttentionConfig | None = None,
    ) -> WindowTable:
        """Read a mask_strategy JSON of FastVideo's Sliding Tile Attention.

        The file is one object: "step_layer_head" -> [wt, wh, ww] in tiles, every key once. That is what
        `dict_to_3d_list` and the SlidingTileAttention backend of FastVideo read (commit 6c94883). FastVideo ignores
        keys beyond the model's layers and heads, and makes None of missing ones; here both are errors. So is an even
        window that does not cover its axis, which FastVideo's kernel takes for the next odd one.

        Args:
            grid: tokens (T, H, W) of the video.
            num_steps, num_layers, heads: of sampler and model; the file must have exactly these.
            config: tile and border that the windows are meant for, and the rounding; None: FastVideo's tile (6, 8, 8)
                and border ("clamp"), FP8.

        Raises ValueError, with the path, for an unknown, out-of-range, missing or repeated key and for a window that
        does not fit.
        """
        config = AttentionConfig(tile=STA_TILE) if config is None else as_config(config)
        sizes = {"num_steps": num_steps, "num_layers": num_layers, "heads": heads}
        sizes = {name: as_int(name, value, 1) for name, value in sizes.items()}
        found: dict[tuple[int, int, int], Triple] = {}
        try:
            for key, window in read_json(path).items():
                place = _place(key, sizes)
                if place in found:
                    raise ValueError(f"key {shown(key)}: is there twice, in another spelling")
                found[place] = as_triple(f"key {shown(key)}", window, 1)
            places = [
                (s, layer, h) for s in range(num_steps) for layer in range(num_layers) for h in range(heads)
            ]
            missing = [place for place in places if place not in found]
            if missing:
                raise ValueError(
                    f"{len(missing)} of {len(places)} keys are missing, the first is "
                    f"{shown('_'.join(map(str, missing[0])))}"
                )
            windows = tuple(
                tuple(tuple(found[s, layer, h] for h in range(heads)) for layer in range(num_layers))
                for s in range(num_steps)
            )
            return cls(as_grid(grid), config, windows)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from error


def with_windows(config: AttentionConfig, heads: tuple[Triple, ...]) -> AttentionConfig:
    """`config` with the window of each head, or with a single one if all are equal."""
    return replace(config, window=heads if len(set(heads)) > 1 else heads[0])


def _as_list(name: str, value) -> list:
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise TypeError(f"{name}: {shown(value)} must be a sequence")
    if not value:
        raise ValueError(f"{name}: is empty")
    return list(value)


def _window_of(windows: list[Triple], index: int) -> Triple:
    return windows[as_int('"steps": index', index, 0, len(windows) - 1)]


def _place(key: str, sizes: dict[str, int]) -> tuple[int, int, int]:
    """The (step, layer, head) of a FastVideo key."""
    match = re.fullmatch(r"(\d+)_(\d+)_(\d+)", key, re.ASCII)
    if match is None:
        raise ValueError(f"key {shown(key)}: is unknown; a key is step_layer_head, for example '0_0_0'")
    step, layer, head = map(int, match.groups())
    place = step, layer, head
    for (name, size), what, index in zip(sizes.items(), ("step", "layer", "head"), place, strict=True):
        if index >= size:
            raise ValueError(
                f"key {shown(key)}: {what} {index} is out of range, {name} is {size}; at most {size - 1}"
            )
    return place


def _checked(windows, grid: Triple, config: AttentionConfig) -> tuple:
    """The windows as nested tuples, cut to their axes. Raises when one is not legal or a row is incomplete."""
    tiles = tile_geometry(grid, config.tile).tiles

    def fit(place: str, window) -> Triple:
        triple = as_triple(place, window, 1)
        try:
            return fit_window(triple, tiles)
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error

    def alike(name: str, rows: list, what: str) -> tuple:
        for i, row in enumerate(rows):
            if len(row) != len(rows[0]):
                raise ValueError(f"{name}[{i}]: has {len(row)} {what}, {name}[0] has {len(rows[0])}")
        return tuple(rows)

    steps = []
    for s, layers in enumerate(_as_list("windows", windows)):
        rows = []
        for i, heads in enumerate(_as_list(f"windows[{s}]", layers)):
            place = f"windows[{s}][{i}]"
            rows.append(tuple(fit(f"{place}[{h}]", w) for h, w in enumerate(_as_list(place, heads))))
        steps.append(alike(f"windows[{s}]", rows, "heads"))
    alike("windows", steps, "layers")
    alike("windows", [layers[0] for layers in steps], "heads")
    return tuple(steps)
