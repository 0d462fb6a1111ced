"""What the commands' options share: types of their values, and options that several commands have.

A type is a function of the text on the command line. It raises argparse.ArgumentTypeError for an illegal value.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

from ..core.checks import Triple
from ..core.config import Border
from ..schedules.models import VideoModel
from . import catalog

# Formats of a picture: those that matplotlib writes and people view. Named here to need no matplotlib.
PICTURES = (
    *(".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff"),
    *(".pdf", ".svg", ".svgz", ".eps", ".ps"),
)


def positive(text: str) -> int:
    if not text.isdecimal() or len(text) > 10 or not 0 < int(text) < 2**31:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number, from 1 to 2^31 - 1")
    return int(text)


def between(low: float, high: float) -> Callable[[str], float]:
    """The type of a number from `low` to `high`."""

    def number(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = low - 1
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text!r} must be a number from {low:g} to {high:g}")
        return value

    return number


fraction = between(0, 1)


def seed(text: str) -> int:
    """What torch.Generator.manual_seed takes."""
    try:
        value = int(text)
    except ValueError:
        value = 2**64
    if not -(2**63) <= value < 2**64:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number from -2^63 to 2^64 - 1")
    return value


def stem(text: str) -> Path:
    """A file's name without its suffix. The folder must exist: better refused now than after the work."""
    path = Path(text)
    if not os.path.isdir(path.parent):  # False for a name that is too long, where Path.is_dir raises
        raise argparse.ArgumentTypeError(f"{text!r}: there is no folder {path.parent}")
    return path


def new_file(text: str) -> Path:
    """A file to write, in a folder that exists."""
    path = stem(text)
    if os.path.isdir(path):
        raise argparse.ArgumentTypeError(f"{text!r}: is a folder; name a file in it")
    return path


def new_picture(text: str) -> Path:
    """A `new_file` with one of the suffixes `PICTURES`; without a suffix it gets .png."""
    path = new_file(text)
    if not path.suffix:
        return new_file(f"{path}.png")
    if path.suffix.lower() not in PICTURES:
        raise argparse.ArgumentTypeError(
            f"{text!r}: suffix {path.suffix} must be one of {', '.join(PICTURES)}"
        )
    return path


class ThreeNumbers(TypedDict):
    """Keywords of add_argument for three numbers on the axes t, h and w. A command gets them as a list."""

    type: Callable[[str], int]
    nargs: int
    metavar: tuple[str, str, str]


TRIPLE: ThreeNumbers = {"type": positive, "nargs": 3, "metavar": ("t", "h", "w")}
GRID: ThreeNumbers = {"type": positive, "nargs": 3, "metavar": ("T", "H", "W")}


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--json",
        dest="as_json",
        action="store_true",
        help="print the results as JSON on stdout, and tables and sentences on stderr",
    )


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="auto (default): cuda if there is one",
    )


def add_tile(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tile", help="tile in tokens (default: the best of fpsattention.plan)", **TRIPLE)


def add_shape(parser: argparse.ArgumentParser) -> None:
    """The shape of an attention: MODEL or --grid, heads, head_dim, tile."""
    parser.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="name of a model, for example wan2.1-14b-720p; without MODEL and --grid the command lists the names",
    )
    parser.add_argument("--grid", help="tokens after patches, in place of MODEL", **GRID)
    parser.add_argument(
        "--heads", type=positive, metavar="N", help="heads (default: the model's; 1 with --grid)"
    )
    parser.add_argument(
        "--head-dim",
        type=positive,
        metavar="D",
        help="channels of a head (default: the model's; 128 with --grid)",
    )
    add_tile(parser)


class ShapeOptions(NamedTuple):
    """The values of `add_shape`'s options; None: not given."""

    model: str | None = None
    grid: Triple | None = None
    heads: int | None = None
    head_dim: int | None = None
    tile: Triple | None = None

    def choose(self) -> VideoModel:
        """The model or grid, with its heads. Raises ValueError as `catalog.choose` does."""
        return catalog.choose(self.model, self.grid, self.heads, self.head_dim)


def grouped(values: dict[str, Any]) -> dict[str, Any]:
    """The parsed values of a command, with those of `add_shape` as one `ShapeOptions` under "asked_shape"."""
    if "model" not in values:
        return values
    shape = {name: values[name] for name in ShapeOptions._fields}
    rest = {name: value for name, value in values.items() if name not in shape}
    return rest | {"asked_shape": ShapeOptions(**shape)}


def add_window(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--window",
        help="key tiles that a query tile attends on each axis: odd, or the whole axis (default: dense)",
        **TRIPLE,
    )
    add_border(parser)


def add_border(parser: argparse.ArgumentParser, default: Border | None = "clamp") -> None:
    parser.add_argument(
        "--border",
        choices=("clamp", "truncate"),
        default=default,
        help="at the edge of the grid, clamp shifts a window inward and truncate cuts it (default: clamp)",
    )
