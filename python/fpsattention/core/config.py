"""Tile, window and rounding of attention: the user's `AttentionConfig`, and `ResolvedConfig`, its form for one grid."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal, cast

from .. import _C
from .checks import MAX_INT, Triple, as_grid, as_int, as_tile, as_triple, as_truncate, shown
from .geometry import TileGeometry, tile_geometry
from .planning import ranked
from .selectors import Selector, check_selector, from_text, to_text

AXES = "thw"
Border = Literal["clamp", "truncate"]
Quant = Literal["fp8", "none"]


@dataclass(frozen=True)
class AttentionConfig:
    """Tile, window and rounding of an attention call (arXiv 2506.04648, section 3). Immutable, hashable.

    Attributes:
        tile: tokens (t, h, w) of a tile, at most 512 in all; None: the best tile of `plan(grid)`, whatever the window
            and the heads. Any grid is legal: tiles at the edge may be ragged. The tile is the unit of sparsity and of
            the scales of Q and K.
        window: tiles (wt, wh, ww) that a query tile attends, or one such triple per head; None: all tiles. Each number
            is odd, or at least the number of tiles on its axis and then means the whole axis.
        border: "clamp" shifts the window inward at the grid's edge, so that every query tile sees equally
            many key tiles (arXiv 2502.04507); "truncate" cuts it (arXiv 2506.04648, Eq. 2).
        quant: "fp8" rounds Q, K, P and V to E4M3; "none" does not round.
        quant_tile: tokens (t, h, w) of a brick, whose tiles share one scale; a whole multiple of the tile on each axis;
            None: the tile itself. A coarser brick costs accuracy and saves no time.
        smooth_k: subtract K's mean over some 2,048 tokens before rounding. Without rounding it would not change the
            output.
        select: in place of a window, the key tiles of each query tile are chosen by content in each call: `TopTiles` or
            `TopMass`; None: the window's.

    Raises TypeError or ValueError that name the argument, its value, the rule and the nearest legal value.
    """

    tile: Triple | None = None
    window: Triple | tuple[Triple, ...] | None = None
    border: Border = "clamp"
    quant: Quant = "fp8"
    quant_tile: Triple | None = None
    smooth_k: bool = False
    select: Selector | None = None

    def __post_init__(self) -> None:
        def put(name: str, value: object) -> None:
            object.__setattr__(self, name, value)

        if self.tile is not None:
            put("tile", as_tile(self.tile))
        if self.window is not None:
            put("window", _as_window(self.window))
        as_truncate(self.border)
        if not isinstance(self.quant, str) or self.quant not in ("fp8", "none"):
            raise ValueError(f'quant: {shown(self.quant)} must be "fp8" or "none"')
        if not isinstance(self.smooth_k, bool):
            raise TypeError(f"smooth_k: {shown(self.smooth_k)} must be True or False")
        if self.quant_tile is not None:
            put("quant_tile", as_triple("quant_tile", self.quant_tile, 1))
            if self.tile is not None:
                _check_quant_tile(self.quant_tile, self.tile)
        if self.quant == "none" and (self.quant_tile is not None or self.smooth_k):
            name = "smooth_k" if self.quant_tile is None else "quant_tile"
            raise ValueError(
                f'{name}: {shown(getattr(self, name))} has no effect with quant="none", which rounds nothing; '
                f'leave it out, or use quant="fp8"'
            )
        if self.select is not None:
            check_selector(self.select)
            if self.window is not None:
                raise ValueError(
                    f"select: {shown(self.select)} and window={shown(self.window)} both say what is attended; leave "
                    f"one of them out (a window that is always attended goes into select's `always`)"
                )
        put("_spec", _spec_of(self))

    @property
    def spec(self) -> str:
        """This config as a string for torch ops: tile, quant_tile, windows, border, quant, smooth_k, select.

        For example "7.9.2||3.3.9|clamp|fp8||". Numbers are hexadecimal; None and False are empty.
        """
        return self._spec  # type: ignore[attr-defined]  # set by __post_init__; a field would show in fields()

    @classmethod
    def from_spec(cls, spec: str) -> AttentionConfig:
        """The config that `spec` describes. Cached."""
        return _from_spec(spec)

    def __hash__(self) -> int:
        return hash(self.spec)  # a string caches its hash, and every call of attention looks its config up

    def resolve(
        self, grid: Sequence[int], heads: int, prefix_len: int = 0, suffix_len: int = 0
    ) -> ResolvedConfig:
        """This config for a grid (T, H, W) of tokens, a number of heads, and the lengths of the text. Cached.

        Raises TypeError or ValueError if the window does not fit the grid or the heads, or unless both lengths are
        integers of at least 0.
        """
        lengths = as_int("prefix_len", prefix_len, 0), as_int("suffix_len", suffix_len, 0)
        return _resolve(self, as_grid(grid), as_int("heads", heads, 1, MAX_INT), *lengths)


def _spec_of(config: AttentionConfig) -> str:
    def by(triple: Triple | None) -> str:
        # Python limits the digits of a decimal int, not of a hexadecimal one. Under torch.compile, operator.index makes
        # a symbol a constant of the graph.
        return ".".join([f"{operator.index(n):x}" for n in triple or ()])

    windows = config.window or ()
    windows = (windows,) if windows and isinstance(windows[0], int) else windows
    listed = ",".join([by(window) for window in windows])
    smooth_k = "smooth_k" if config.smooth_k else ""
    select = "" if config.select is None else to_text(config.select)
    return "|".join(
        [by(config.tile), by(config.quant_tile), listed, config.border, config.quant, smooth_k, select]
    )


_DEFAULT = AttentionConfig()


def as_config(value: AttentionConfig | None) -> AttentionConfig:
    """`value`, or the default config for None. Raises TypeError for anything else."""
    if value is None:
        return _DEFAULT
    if not isinstance(value, AttentionConfig):
        of_schedule = "; a schedule's is schedule.at(...) or schedule.for_sigma(...)"
        raise TypeError(
            f"config: {shown(value)} must be an AttentionConfig or None, got {type(value).__name__}"
            f"{of_schedule if hasattr(value, 'at') else ''}"
        )
    return value


@dataclass(frozen=True)
class ResolvedConfig:
    """An `AttentionConfig` for one grid. Windows are cut to their axes. Immutable, hashable.

    Attributes:
        grid, tile, quant_tile: tokens per axis.
        windows: triples of tiles; one for all heads, or one per head; with select, all tiles.
        border, quant, smooth_k, select: as in `AttentionConfig`.
        prefix_len, suffix_len: text tokens before and after the video tokens.
    """

    grid: Triple
    tile: Triple
    windows: tuple[Triple, ...]
    border: Literal["clamp", "truncate"]
    quant: str
    quant_tile: Triple
    smooth_k: bool
    prefix_len: int = 0
    suffix_len: int = 0
    select: Selector | None = None

    @property
    def geometry(self) -> TileGeometry:
        """The geometry of the grid, the tile and the text tokens."""
        return tile_geometry(self.grid, self.tile, self.prefix_len, self.suffix_len)

    @property
    def truncate(self) -> bool:
        """Whether windows are cut at the grid's edge."""
        return as_truncate(self.border)

    @property
    def brick(self) -> Triple:
        """Tiles per axis that share one scale, at most the number of tiles on the axis."""
        per_axis = zip(self.quant_tile, self.tile, self.geometry.tiles, strict=True)
        t, h, w = (min(b // t, max(n, 1)) for b, t, n in per_axis)
        return t, h, w

    @cached_property
    def capacity(self) -> int:
        """With select, the entries of a list of key tiles: how many a query tile attends, or with `TopMass` at most."""
        return 0 if self.select is None else self.select.capacity(self.geometry.tiles)

    @property
    def density(self) -> float:
        """Attended pairs of tokens as a fraction of all pairs, mean over the heads.

        With `TopTiles` it is exact but for ragged tiles, which count as whole ones. With `TopMass` it is an upper
        bound, that of `most`: the density is not known before the scores are.
        """
        geometry = self.geometry
        if self.select is not None and geometry.n_video_tiles:
            unseen = 1 - self.capacity / geometry.n_video_tiles
            return 1 - unseen * (math.prod(self.grid) / geometry.n_tokens) ** 2
        per_head = [geometry.density(w, self.border) for w in self.windows]
        return sum(per_head) / len(per_head)


def _as_window(value: Sequence) -> Triple | tuple[Triple, ...]:
    per_head = isinstance(value, Sequence) and len(value) > 0 and isinstance(value[0], Sequence)
    if not per_head:
        return as_triple("window", value, 1)
    if len(value) > _C.MAX_WINDOWS:
        raise ValueError(f"window: {len(value)} windows, one per head; at most {_C.MAX_WINDOWS} are possible")
    return tuple(as_triple(f"window[{head}]", triple, 1) for head, triple in enumerate(value))


def _check_quant_tile(quant_tile: Triple, tile: Triple) -> None:
    nearest = tuple(t * max(1, (2 * b + t - 1) // (2 * t)) for b, t in zip(quant_tile, tile, strict=True))
    if quant_tile != nearest:
        raise ValueError(
            f"quant_tile: {shown(quant_tile)} must be a whole multiple of the tile {tile} on each axis; "
            f"nearest legal value {shown(nearest)}"
        )


@lru_cache(maxsize=1024)
def _from_spec(spec: str) -> AttentionConfig:
    try:
        config = _parsed(spec)
    except (KeyError, TypeError, ValueError) as error:
        raise _no_spec(spec) from error
    if config.spec != spec:
        raise _no_spec(spec)
    return config


def _no_spec(spec: str) -> ValueError:
    example = AttentionConfig(tile=(7, 9, 2), window=(3, 3, 9)).spec
    return ValueError(
        f"config: {shown(spec)} must be the spec of an AttentionConfig, for example {example!r}"
    )


def _parsed(spec: str) -> AttentionConfig:
    def triples(text: str) -> tuple[Triple, ...]:
        parts = (part.split(".") for part in text.split(",") if part)
        return tuple((int(t, 16), int(h, 16), int(w, 16)) for t, h, w in parts)

    tile, quant_tile, windows, border, quant, smooth_k, select = spec.split("|")
    per_head = triples(windows)
    return AttentionConfig(
        tile=next(iter(triples(tile)), None),
        window=(per_head[0] if len(per_head) == 1 else per_head) or None,
        border=cast(Border, border),
        quant=cast(Quant, quant),
        quant_tile=next(iter(triples(quant_tile)), None),
        smooth_k=bool(smooth_k),
        select=from_text(select),
    )


def fit_window(window: Triple, tiles: Triple, name: str = "window") -> Triple:
    """`window` cut to the tiles of each axis; `name` is the argument's in errors.

    Raises ValueError for an even number that does not cover its axis.
    """
    for axis, w, n in zip(AXES, window, tiles, strict=True):
        if w < n and w % 2 == 0:
            raise ValueError(
                f"{name}: {shown(window)} has {w} on axis {axis}, which has {n} tiles; it must be odd, or at least "
                f"{n} (the whole axis); nearest legal values {w - 1} and {w + 1}"
            )
    t, h, w = (min(w, n) for w, n in zip(window, tiles, strict=True))
    return t, h, w


@lru_cache(maxsize=1024)
def _resolve(
    config: AttentionConfig, grid: Triple, heads: int, prefix_len: int, suffix_len: int
) -> ResolvedConfig:
    tile = config.tile or ranked(grid)[0].tile
    quant_tile = config.quant_tile or tile
    _check_quant_tile(quant_tile, tile)
    tiles = tile_geometry(grid, tile, prefix_len, suffix_len).tiles
    windows = (tiles,) if config.window is None else config.window
    if not isinstance(windows[0], tuple):
        windows = (windows,)
    if len(windows) not in (1, heads):
        raise ValueError(
            f"window: {len(windows)} windows, one per head, for {heads} heads; give one triple, or {heads}"
        )
    windows = tuple(fit_window(w, tiles) for w in windows)
    if len(set(windows)) == 1:
        windows = windows[:1]
    if config.select is not None and config.select.always is not None:
        fit_window(config.select.always, tiles, "always")
    rounding = config.quant, quant_tile, config.smooth_k
    return ResolvedConfig(
        grid, tile, windows, config.border, *rounding, prefix_len, suffix_len, config.select
    )
