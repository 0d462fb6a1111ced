"""FPSAttention in diffusers: `enable` puts it in the self-attention of a pipeline or of a transformer, step by step.

handle = fpsattention.integrations.diffusers.enable(pipe, schedule, dense_layers=(0, -1), dense_steps=2)
video = pipe(prompt).frames[0]
print(handle.report())
handle.remove()
"""

try:
    import diffusers  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("diffusers is not installed: pip install 'fpsattention[diffusers]'") from error

# First: it refuses versions that lack what the others import.
from . import compared  # noqa: F401
from .description import Description
from .folder import load, save
from .handle import Handle, enable
from .linears import use_fp8_linears
from .report import Report, Row

__all__ = ["Description", "Handle", "Report", "Row", "enable", "load", "save", "use_fp8_linears"]
