"""What is measured: attention shapes, the windows over them, and the cases with a target.

Shapes of published models come from `fpsattention.schedules.models`; the others are the bench's own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from fpsattention.core.checks import Triple
from fpsattention.schedules.models import MODELS

Window = Triple | None  # tiles per axis; None: dense
FAMILIES = "families"  # the group of a selection that is measured on every family of inputs, and nothing else


@dataclass(frozen=True)
class Shape:
    """One set of Q, K and V, shared by every contender, and the windows attended over it.

    Attributes:
        name: first part of a case's name in the records.
        grid: tokens (T, H, W).
        tile: tokens (t, h, w) of a tile.
        windows: measured in every run that selects the shape.
        sweep: more windows, for the picture of speed over density; not in quick runs.
        flex: windows that FlexAttention computes as well, in BF16; not in quick runs, as it takes seconds to compile.
        emulated: windows whose output is compared with the emulation of the FP8 contract; not in quick runs.
        graph: windows whose call is replayed as a CUDA graph, to measure the gaps between its kernels.
        training: windows whose backward, and forward with backward, are measured.
        mlp: hidden channels of a transformer block's MLP, to measure a training step of the block; 0: no such step.
        host: whether the host's time of a dense call is measured.
        families: windows for which the kernel alone, and the backward if in `training`, are measured on every family of
            inputs; all else is Gaussian.
        text: text tokens before and after the video; their cost under the first window is measured.
        suite: "core" is in every run, the others are in full runs.
    """

    name: str
    grid: Triple
    heads: int
    tile: Triple
    windows: tuple[Window, ...]
    head_dim: int = 128
    batch: int = 1
    layout: str = "NHD"
    sweep: tuple[Window, ...] = ()
    flex: tuple[Triple, ...] = ()
    emulated: tuple[Window, ...] = ()
    graph: tuple[Window, ...] = ()
    training: tuple[Window, ...] = ()
    mlp: int = 0
    text: tuple[int, int] = (0, 0)
    host: bool = False
    families: tuple[Window, ...] = ()
    suite: str = "more"

    @property
    def tokens(self) -> int:
        t, h, w = self.grid
        return t * h * w

    @property
    def names(self) -> set[str]:
        """The names by which --case selects this shape with all its windows."""
        return {self.name, self.suite, *(["host"] if self.host else [])}

    @property
    def families_alone(self) -> Shape:
        """This shape with no windows: nothing but its families is measured."""
        sizes = self.name, self.grid, self.heads, self.tile, (), self.head_dim
        return Shape(*sizes, training=self.training, families=self.families)

    def case(self, window: Window) -> str:
        """The name of this shape under a window in the records."""
        return f"{self.name}/{'dense' if window is None else ','.join(map(str, window))}"


def _model(name: str) -> dict:
    """Grid, heads and head_dim of a model in the catalogue, as keywords of a `Shape`."""
    model = MODELS[name]
    return {"grid": model.grid, "heads": model.heads, "head_dim": model.head_dim}


def _lengths() -> tuple[Shape, ...]:
    # (thousands of tokens, grid, heads). The longest has half the heads: even so the slowest contender takes 0.2 s.
    lengths = (
        (4, (8, 16, 32), 16),
        (8, (8, 32, 32), 16),
        (16, (16, 32, 32), 16),
        (32, (16, 32, 64), 16),
        (64, (32, 32, 64), 16),
        (128, (32, 64, 64), 8),
    )
    return tuple(
        Shape(f"length-{k}k-d{d}", grid, heads, (2, 8, 8), (None,), head_dim=d, suite="length", host=k == 4)
        for d in (64, 128)
        for k, grid, heads in lengths
    )


_WAN_480P = Shape(
    "wan1.3b-480p",
    **_model("wan2.1-1.3b-480p"),
    tile=(21, 3, 6),
    windows=(None, (1, 5, 3)),
    flex=((1, 5, 3),),
    graph=((1, 5, 3),),
    mlp=8960,  # ffn_dim of Wan2.1-1.3B, wan/configs
    suite="core",
)

# Shapes with a target come first: a run cut short has measured them.
SHAPES = (
    Shape(
        "36x48x48",  # the paper's setting, arXiv 2506.04648
        (36, 48, 48),
        24,
        (6, 8, 8),
        ((6, 6, 1),),
        training=((6, 6, 1),),
        sweep=(None, (6, 6, 5), (6, 6, 3), (6, 3, 3), (3, 3, 3), (6, 3, 1), (3, 3, 1)),
        flex=((6, 6, 1),),
        emulated=((6, 6, 1),),
        suite="core",
    ),
    Shape(
        "wan14b-720p",
        **_model("wan2.1-14b-720p"),
        tile=(7, 9, 2),
        windows=(None, (3, 3, 9)),
        flex=((3, 3, 9),),
        training=(None, (3, 3, 9)),
        families=(None, (3, 3, 9)),
        mlp=13824,  # ffn_dim of Wan2.1-14B, wan/configs
        suite="core",
    ),
    Shape("train-16k", (16, 32, 32), 40, (2, 8, 8), (None,), training=(None,), suite="core"),
    Shape(
        "cogvideox-480p",
        **_model("cogvideox-5b"),
        tile=(13, 3, 13),
        windows=(None,),
        emulated=(None,),
        training=(None,),
        families=(None,),
        suite="core",
    ),
    Shape(
        "cogvideox1.5-768p",
        **_model("cogvideox1.5-5b"),
        tile=(11, 2, 17),
        windows=(None,),
        families=(None,),
        text=MODELS["cogvideox1.5-5b"].text_lengths,
        suite="core",
    ),
    Shape(
        "hunyuan-720p",
        **_model("hunyuanvideo-720p"),
        tile=(3, 8, 16),
        windows=((3, 3, 3),),
        sweep=(None,),
        flex=((3, 3, 3),),
        text=MODELS["hunyuanvideo-720p"].text_lengths,
        suite="core",
    ),
    Shape(  # density a tenth
        "hunyuan-720p-deep",
        **_model("hunyuanvideo-720p"),
        tile=(17, 3, 5),
        windows=((2, 5, 5),),
        training=((2, 5, 5),),
        suite="core",
    ),
    _WAN_480P,
    Shape(  # a short call: density .058, with the tile that `plan` ranks first
        "wan1.3b-short",
        **_model("wan2.1-1.3b-480p"),
        tile=(21, 3, 2),
        windows=((1, 5, 3),),
        suite="core",
    ),
    replace(_WAN_480P, name="wan1.3b-480p-hnd", layout="HND", flex=(), graph=(), mlp=0, suite="more"),
    Shape("18x48x80", (18, 48, 80), 24, (6, 8, 8), ((3, 3, 3),), flex=((3, 3, 3),)),
    *_lengths(),
)

# Cases with a target.
PAPER, WAN_DENSE, WAN_WINDOW = "36x48x48/6,6,1", "wan14b-720p/dense", "wan14b-720p/3,3,9"
COG_DENSE, HUNYUAN_WINDOW = "cogvideox1.5-768p/dense", "hunyuan-720p-deep/2,5,5"
WAN_480P_WINDOW, SHORT_WINDOW = "wan1.3b-480p/1,5,3", "wan1.3b-short/1,5,3"
BACKWARD_DENSE, BACKWARD_WINDOW = f"{WAN_DENSE} backward", f"{WAN_WINDOW} backward"
BACKWARD_16K, BACKWARD_COG = "train-16k/dense backward", "cogvideox-480p/dense backward"
TRAINING_WINDOW, STEP_WINDOW = f"{WAN_WINDOW} training", f"{WAN_WINDOW} block step"


def select(names: list[str], quick: bool = False, heads_scale: float = 1.0) -> list[Shape]:
    """The shapes to run, in order.

    Args:
        names: shapes, cases ("shape/window"), suites, "host", or "families", which selects nothing else of its shapes;
            empty: all, or with `quick` those with a target.
        quick: without sweeps, FlexAttention and emulation.
        heads_scale: factor on the number of heads, which is at least 1.

    Raises ValueError for an unknown name.
    """
    chosen = []
    found: set[str] = set()
    for shape in SHAPES:
        windows = shape.windows
        if names:
            cases = {shape.case(w): w for w in dict.fromkeys(shape.windows + shape.sweep)}
            whole = shape.names & set(names)
            named = [name for name in cases if name in names]
            families = {FAMILIES} & set(names) if shape.families else set()
            found |= whole | set(named) | families
            if not (whole or named or families):
                continue
            if not whole:
                windows = tuple(cases[name] for name in named)
                shape = replace(shape if named else shape.families_alone, sweep=())
                if not families:
                    shape = replace(shape, families=())
        elif quick and not (shape.suite == "core" or shape.host):
            continue
        shape = replace(shape, windows=windows, heads=max(1, round(shape.heads * heads_scale)))
        if quick:
            shape = replace(shape, sweep=(), flex=(), emulated=())
        chosen.append(shape)
    if unknown := [name for name in names if name not in found]:
        known = [shape.case(w) for shape in SHAPES for w in shape.windows]
        raise ValueError(
            f"--case: unknown {unknown}; known shapes and cases: {', '.join(known)}; "
            f"groups: length, host, {FAMILIES}"
        )
    return chosen
