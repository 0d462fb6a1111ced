"""FPSAttention in diffusers: `enable` puts it in the self-attention of a pipeline or of a transformer, step by step.

handle = fpsattention.integrations.diffusers.enable(pipe, schedule, dense_layers=(0, -1), dense_steps=2)
video = pipe(prompt).frames[0]
print(handle.report())
handle.remove()
"""

from packaging.version import Version

try:
    import diffusers
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("diffusers is not installed: pip install 'fpsattention[diffusers]'") from error

# The processors repeat what those of diffusers do. Tests have compared the two for these minor versions only.
OLDEST, FIRST_UNTESTED = "0.41", "0.43"
if not Version(OLDEST) <= Version(diffusers.__version__) < Version(FIRST_UNTESTED):
    raise ImportError(
        f"diffusers {diffusers.__version__}: FPSAttention's attention layers have not been compared with its own; "
        f"install a version from {OLDEST} to below {FIRST_UNTESTED}: pip install 'fpsattention[diffusers]'"
    )

# Below the check, as these import what only the compared versions are sure to have.
from .folder import load, save  # noqa: E402
from .handle import Handle, enable  # noqa: E402
from .linears import use_fp8_linears  # noqa: E402
from .report import Report, Row  # noqa: E402

__all__ = ["Handle", "Report", "Row", "enable", "load", "save", "use_fp8_linears"]
