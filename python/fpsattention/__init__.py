"""FP8 sliding-tile attention for video diffusion on Hopper GPUs: FPSAttention (arXiv 2506.04648), independently built.

out = fpsattention.attention(q, k, v, grid=(21, 45, 80), config=AttentionConfig(tile=(7, 9, 2), window=(3, 3, 9)))
"""

from importlib import import_module

from . import integrations, reference
from .api import QuantizedQKV, attention, backend_for, quantize_qkv
from .config import AttentionConfig
from .planning import Plan, plan
from .prologue import norm_rope, norm_rope_quantize
from .schedule import StepSchedule
from .windows import WindowTable

__all__ = [
    "AttentionConfig",
    "Plan",
    "QuantizedQKV",
    "StepSchedule",
    "WindowTable",
    "attention",
    "backend_for",
    "integrations",
    "norm_rope",
    "norm_rope_quantize",
    "parallel",
    "plan",
    "quantize_qkv",
    "reference",
]
__version__ = "0.1.0"


def __getattr__(name: str):
    if name == "parallel":  # a torch that is built without torch.distributed has all the rest
        return import_module(".parallel", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
