"""The versions of diffusers that FPSAttention has been compared with, and what holds for these alone."""

from __future__ import annotations

import warnings

import diffusers
from packaging.version import Version

OLDEST, FIRST_UNTESTED = "0.41", "0.43"

_version = Version(diffusers.__version__)
_release = Version(_version.base_version)  # a development version counts as what it leads to
if _release < Version(OLDEST):
    raise ImportError(
        f"diffusers {_version}: FPSAttention has not been compared with it; install a version from {OLDEST} to below "
        f"{FIRST_UNTESTED}: pip install 'fpsattention[diffusers]'"
    )

COMPARED = _release < Version(FIRST_UNTESTED)
if COMPARED:
    from .models import FUSED
else:  # the module may import what that version has no more
    FUSED = {}
    warnings.warn(
        f"diffusers {_version}: FPSAttention has been compared with versions below {FIRST_UNTESTED} only; models run "
        f"their own processors, in which the attention call alone is exchanged, and each forward checks what "
        f"FPSAttention takes for granted",
        stacklevel=2,
    )
