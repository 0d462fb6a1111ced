"""How many key tiles a choice by content takes: `TopTiles` and `TopMass`, the values of `AttentionConfig.select`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from fractions import Fraction

import torch

from .checks import Triple, as_share, as_triple, shown

# A share is rounded to a fraction with at most this denominator: 0.07 of 100 tiles are 7, though the float is above.
DENOMINATOR = 10**6


@dataclass(frozen=True)
class TopTiles:
    """Each query tile attends the k key tiles with the highest scores. Immutable, hashable.

    A score is that of two tiles: their mean Q times their mean K. k is `fraction` of all n tiles of the grid, rounded
    up, and at least as many as a query tile sees under the window `always`: fraction=0.01 with a window of 27 tiles
    takes 27.

    Attributes:
        fraction: above 0, at most 1.
        always: tiles (wt, wh, ww) around a query tile that are among its k whatever their scores, as a window of
            `AttentionConfig` under the config's border; None: none.

    Raises TypeError or ValueError that name the argument, its value, the rule and the nearest legal value.
    """

    fraction: float
    always: Triple | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "fraction", as_share("fraction", self.fraction))
        object.__setattr__(self, "always", _as_always(self.always))

    def __str__(self) -> str:
        return f"top {self.fraction:g}"

    def capacity(self, tiles: Sequence[int]) -> int:
        """k on a grid with so many tiles on each axis."""
        return _capacity(self.fraction, self.always, tiles)


@dataclass(frozen=True)
class TopMass:
    """Each query tile attends the fewest key tiles whose share of a softmax over tiles reaches `mass`. Immutable,
    hashable.

    The softmax is over all n tiles of the grid: each weighs its number of tokens times exp(score), where the score is
    mean Q times mean K. Text is not in it. So rows with flat scores get many tiles, peaked ones few. Shares are rounded
    to multiples of 2^-29.

    Attributes:
        mass: above 0, at most 1.
        always: as in `TopTiles`; these tiles count towards the mass, and are attended beyond it.
        most: upper bound of the number of tiles, as a fraction of n, rounded up, and at least as many as a query tile
            sees under `always`. The lists have room for so many: it bounds their memory.

    Raises TypeError or ValueError that name the argument, its value, the rule and the nearest legal value.
    """

    mass: float
    always: Triple | None = None
    most: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "mass", as_share("mass", self.mass))
        object.__setattr__(self, "always", _as_always(self.always))
        object.__setattr__(self, "most", as_share("most", self.most))

    def __str__(self) -> str:
        return f"mass {self.mass:g}"

    def capacity(self, tiles: Sequence[int]) -> int:
        """The most tiles in a list, on a grid with so many tiles on each axis."""
        return _capacity(self.most, self.always, tiles)


Selector = TopTiles | TopMass
KINDS: dict[str, type[TopTiles] | type[TopMass]] = {kind.__name__: kind for kind in (TopTiles, TopMass)}


def check_selector(value: Selector) -> None:
    """Raises TypeError for anything but the two classes."""
    if not isinstance(value, (TopTiles, TopMass)):
        raise TypeError(
            f"select: {shown(value)} must be a TopTiles, a TopMass or None, got {type(value).__name__}"
        )


def refuse(selector: Selector | None, where: str) -> None:
    """Raises ValueError, with the way out, for anything but None. `where` says who takes no selector, and why."""
    if selector is not None:
        raise ValueError(
            f"config: select={shown(selector)} must be None {where}; call fpsattention.select_tiles(q, k, ...) and "
            f"pass its result as key_tiles, with dataclasses.replace(config, select=None)"
        )


def to_text(selector: Selector) -> str:
    """A string without "|"."""
    values = (getattr(selector, field.name) for field in fields(selector))
    texts = (".".join(f"{n:x}" for n in x or ()) if not isinstance(x, float) else repr(x) for x in values)
    return ":".join([type(selector).__name__, *texts])


def from_text(text: str) -> Selector | None:
    """The inverse of `to_text`; None for an empty string. Raises ValueError or KeyError for other text."""
    if not text:
        return None
    name, *texts = text.split(":")
    values = {field.name: x for field, x in zip(fields(KINDS[name]), texts, strict=True)}
    always = values.pop("always")
    triple = tuple(int(n, 16) for n in always.split(".")) if always else None
    return KINDS[name](**{key: float(x) for key, x in values.items()}, always=triple)  # type: ignore[arg-type]


def _as_always(value: Triple | None) -> Triple | None:
    return None if value is None else as_triple("always", value, 1)


def _capacity(share: float, always: Triple | None, tiles: Sequence[int]) -> int:
    """Entries of a list; in arithmetic that is symbolic where the numbers of tiles are.

    Python's own min and max would compare symbols, and each answer would need a graph.
    """
    n = math.prod(tiles)
    part = Fraction(share).limit_denominator(DENOMINATOR)
    # Under both borders a tile amid the grid sees the whole window.
    least = 1 if always is None else math.prod(map(torch.sym_min, always, tiles))
    share_of_n = -(-n * part.numerator // part.denominator)
    return torch.sym_min(n, torch.sym_max(share_of_n, least))
