"""PEP 517 backend: setuptools, and what compiles the extension as further build requirements.

`python build_backend.py` prints these, one a line, for a build without pip's build isolation.
"""

from setup import nvcc_on_path
from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403 (the backend's hooks are its module's names)

TOOLS = ["pybind11>=3.0", "cmake>=3.24", "ninja", "nvidia-cutlass==4.2.*"]
# NVIDIA's compiler, where PATH has no usable nvcc.
COMPILER = [
    f"{name}==13.0.*"
    for name in (
        "nvidia-cuda-nvcc",
        "nvidia-nvvm",
        "nvidia-cuda-crt",
        "nvidia-cuda-runtime",
        "nvidia-cuda-cccl",
    )
]


def requirements() -> list[str]:
    return TOOLS if nvcc_on_path() else TOOLS + COMPILER


def get_requires_for_build_wheel(config_settings=None):
    return build_meta.get_requires_for_build_wheel(config_settings) + requirements()


def get_requires_for_build_editable(config_settings=None):
    return build_meta.get_requires_for_build_editable(config_settings) + requirements()


if __name__ == "__main__":
    print(*requirements(), sep="\n")
