"""Builds the extension with CMake. CMakeLists.txt is the one place for sources and flags; this file finds the tools."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


def package_dir(name: str) -> Path | None:
    """Where an installed package lies, found without importing it."""
    try:
        spec = importlib.util.find_spec(name)
    except ModuleNotFoundError:  # its parent package
        spec = None
    return Path(next(iter(spec.submodule_search_locations))) if spec else None


def nvcc_version(nvcc: str) -> tuple[int, ...]:
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    return tuple(int(x) for x in re.search(r"release .*V(\d+)\.(\d+)\.(\d+)", text).groups())


def nvcc_on_path() -> str | None:
    """nvcc from PATH when it is new enough for the kernels: 12.8 or later."""
    nvcc = shutil.which("nvcc")
    return nvcc if nvcc and nvcc_version(nvcc) >= (12, 8) else None


def find_nvcc() -> str:
    """nvcc from PATH, else the one of the PyPI compiler wheels that pyproject's build backend asked for."""
    nvcc = nvcc_on_path()
    if nvcc:
        return nvcc
    cuda = package_dir("nvidia.cu13")
    if cuda and (cuda / "bin" / "nvcc").exists():
        return str(cuda / "bin" / "nvcc")
    raise RuntimeError(
        "no nvcc: PATH has none of version 12.8 or later, and the nvidia-cuda-nvcc wheel is not installed; "
        "build with pip's build isolation (the default), which fetches it"
    )


def configure(build: Path, command: list[str], nvcc: tuple[int, ...], env: dict[str, str]) -> None:
    """Run CMake unless the last build here had the same tools and options.

    CMake's cache names tools that may be gone, such as those of pip's build environment, so a new cache is made, and
    everything is compiled again. An edit of CMakeLists.txt needs nothing here: `cmake --build` notices it.
    """
    done = build / "configured.json"
    wanted = json.dumps({"command": command, "cmake": shutil.which("cmake"), "nvcc": nvcc}, indent=1)
    if done.exists() and done.read_text() == wanted:
        return
    done.unlink(missing_ok=True)
    subprocess.run(command, check=True, env=env)
    done.write_text(wanted)


class Build(build):
    """Empties the folder that setuptools packs: it may hold modules that the sources no longer have."""

    def run(self) -> None:
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        # Kept from build to build, so that only what changed is compiled; setuptools' own may be temporary.
        build = Path(os.environ.get("FPSATTENTION_BUILD_DIR", ROOT / "build" / sys.implementation.cache_tag))
        build.mkdir(parents=True, exist_ok=True)
        cutlass = package_dir("cutlass_library")
        pybind11 = package_dir("pybind11")
        if cutlass is None or pybind11 is None:
            missing = "nvidia-cutlass" if cutlass is None else "pybind11"
            raise RuntimeError(f"{missing} is not installed; build with pip's build isolation (the default)")
        nvcc = Path(find_nvcc())
        # The PyPI toolkit keeps its libraries in lib/, where its nvcc does not look.
        paths = [str(nvcc.parent.parent / "lib"), os.environ.get("LIBRARY_PATH", "")]
        env = os.environ | {"LIBRARY_PATH": ":".join(filter(None, paths))}
        kernels = os.environ.get("FPSATTENTION_KERNELS", "")  # .ci/build_wheels.py
        debug = "ON" if os.environ.get("FPSATTENTION_DEBUG") == "1" else "OFF"
        command = [
            *("cmake", "--fresh", "-S", str(ROOT), "-B", str(build), "-G", "Ninja"),
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DCMAKE_CUDA_COMPILER={nvcc}",
            f"-DCUTLASS_INCLUDE_DIR={cutlass / 'source' / 'include'}",
            f"-Dpybind11_DIR={pybind11 / 'share' / 'cmake' / 'pybind11'}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DFPS_KERNELS={kernels}",
            f"-DFPS_DEBUG={debug}",
        ]
        configure(build, command, nvcc_version(str(nvcc)), env)
        subprocess.run(["cmake", "--build", str(build)], check=True, env=env)
        module = build / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(module, target)


if __name__ == "__main__":
    setup(
        ext_modules=[Extension("fpsattention._C", sources=[])],
        cmdclass={"build": Build, "build_ext": CMakeBuild},
    )
