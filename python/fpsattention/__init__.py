"""FP8 sliding-tile attention for video diffusion on Hopper GPUs: FPSAttention (arXiv 2506.04648), independently built.

out = fpsattention.attention(q, k, v, grid=(21, 45, 80), config=AttentionConfig(tile=(7, 9, 2), window=(3, 3, 9)))
"""

from importlib import import_module

try:
    from . import _C  # noqa: F401 (before what needs it, to explain why it does not load)
except ImportError as error:
    import sys
    from importlib.machinery import EXTENSION_SUFFIXES
    from pathlib import Path

    folder = Path(__file__).parent
    found = ", ".join(path.name for path in folder.glob("_C.*so")) or "no such file"
    raise ImportError(
        f"{error}\nPython {sys.version.split()[0]} needs the compiled module _C{EXTENSION_SUFFIXES[0]} in {folder}; "
        f"there is {found}. A wheel is for one version of Python on Linux x86-64: install the one for yours, or from "
        "source.",
        name=error.name,
    ) from error

from .core import reference
from .core.api import QuantizedQKV, attention, quantize_qkv
from .core.config import AttentionConfig
from .core.explain import Plan, plan
from .core.key_tiles import KeyTiles
from .core.prologue import Norm, norm_rope, norm_rope_quantize
from .core.selection import select_tiles
from .core.selectors import TopMass, TopTiles
from .core.support import backend_for
from .schedules.presets import Preset, preset
from .schedules.schedule import StepSchedule
from .schedules.windows import WindowTable

__all__ = [
    "AttentionConfig",
    "KeyTiles",
    "Norm",
    "Plan",
    "Preset",
    "QuantizedQKV",
    "StepSchedule",
    "TopMass",
    "TopTiles",
    "WindowTable",
    "attention",
    "backend_for",
    "integrations",
    "norm_rope",
    "norm_rope_quantize",
    "parallel",
    "plan",
    "preset",
    "quantize_qkv",
    "reference",
    "select_tiles",
]
__version__ = "0.1.0"


def __getattr__(name: str):
    if name in ("integrations", "parallel"):  # parallel needs a torch that is built with torch.distributed
        return import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
