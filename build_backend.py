"""PEP 517 backend: setuptools, plus NVIDIA's compiler wheels as build requirements where PATH has no usable nvcc."""

from setup import nvcc_on_path
from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403 (the backend's hooks are its module's names)

COMPILER_WHEELS = [
    f"{name}==13.0.*"
    for name in (
        "nvidia-cuda-nvcc",
        "nvidia-nvvm",
        "nvidia-cuda-crt",
        "nvidia-cuda-runtime",
        "nvidia-cuda-cccl",
    )
]


def _compiler() -> list[str]:
    return [] if nvcc_on_path() else COMPILER_WHEELS


def get_requires_for_build_wheel(config_settings=None):
    return build_meta.get_requires_for_build_wheel(config_settings) + _compiler()


def get_requires_for_build_editable(config_settings=None):
    return build_meta.get_requires_for_build_editable(config_settings) + _compiler()
