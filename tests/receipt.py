"""The GPU receipt: proof that the GPU tests passed on exactly these sources.

CI has no Hopper GPU. `make test-gpu` runs the GPU tests on one and writes `tests/gpu_receipt.json`; on every other
machine `test_receipt.py` holds that file against the sources it finds. A receipt is good when it is there, was written
by a full and green run, names no skipped test but those of `ALLOWED_SKIPS`, and carries the hash of the sources as they
are now.

The sources are what decides whether the kernels compute the right thing:

- kernels/ and include/: all CUDA and C++;
- what fixes compiler, flags and pins: CMakeLists.txt, setup.py, build_backend.py, [build-system] of pyproject.toml;
- python/: the library, which launches the kernels; not `NOT_VOUCHED_FOR`, the command line;
- tests/: conftest.py, the files that hold GPU tests, and the modules of tests/ that those import.

Everything else may change without a new receipt: documentation, benchmarks, examples, tests that need no GPU.
"""

from __future__ import annotations

import ast
import hashlib
import json
import platform
import re
import subprocess
from datetime import datetime, timezone
from importlib.util import resolve_name
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PATH = ROOT / "tests" / "gpu_receipt.json"
CUDA_SUFFIXES = {".cu", ".cuh", ".h", ".cpp"}
BUILD_FILES = ("CMakeLists.txt", "setup.py", "build_backend.py")
# Paths below python/. A new file counts unless it is listed here.
NOT_VOUCHED_FOR = ("fpsattention/cli/",)
# A GPU test may be skipped for these reasons only. `make test` says which ones were: nothing vouches for those.
ALLOWED_SKIPS = ("needs two GPUs",)
REMEDY = "run `make test-gpu` on a machine with a Hopper GPU and commit tests/gpu_receipt.json"


def source_files(root: Path) -> list[Path]:
    """The files that a receipt vouches for, as listed at the head of this module, but without pyproject.toml."""
    cuda = [
        p for name in ("kernels", "include") for p in (root / name).rglob("*") if p.suffix in CUDA_SUFFIXES
    ]
    python = [
        p
        for p in (root / "python").rglob("*.py")
        if not p.relative_to(root / "python").as_posix().startswith(NOT_VOUCHED_FOR)
    ]
    build = [root / name for name in BUILD_FILES]
    files = [*cuda, *python, *build, *_gpu_test_modules(root)]
    return sorted((p for p in files if p.is_file()), key=lambda p: p.relative_to(root).as_posix())


def sources_hash(root: Path) -> str:
    """sha256 over path, length and contents of every source file, and over the build requirements."""
    digest = hashlib.sha256()
    parts = [(path.relative_to(root).as_posix(), path.read_bytes()) for path in source_files(root)]
    for name, contents in [*parts, ("[build-system]", _build_system(root))]:
        digest.update(f"{name}\0{len(contents)}\0".encode())
        digest.update(contents)
    return digest.hexdigest()


def _build_system(root: Path) -> bytes:
    """The text of [build-system] in pyproject.toml, with its pins."""
    text = (root / "pyproject.toml").read_text()
    (table,) = re.findall(r"^\[build-system\]\n(.*?)(?=^\[|\Z)", text, re.MULTILINE | re.DOTALL)
    return table.encode()


def gpu_test_files(root: Path) -> set[str]:
    """Names of the test files that hold tests marked `gpu`."""
    marker = re.compile(r"^(pytestmark = |@).*pytest\.mark\.gpu|marks=pytest\.mark\.gpu", re.MULTILINE)
    return {path.name for path in (root / "tests").glob("test_*.py") if marker.search(path.read_text())}


def _gpu_test_modules(root: Path) -> set[Path]:
    """conftest.py, the files that hold GPU tests, and the modules of tests/ that these import, directly or not."""
    found: set[Path] = set()
    left = [root / "tests" / name for name in ("conftest.py", *gpu_test_files(root))]
    while left:
        path = left.pop()
        if path.is_file() and path not in found:
            found.add(path)
            left += [root / "tests" / f"{name}.py" for name in imported_modules(path)]
    return found


def imported_modules(path: Path, package: str = "") -> set[str]:
    """Full names of all imports in a Python file of `package`; `from a import b` gives a and a.b: b may be a module."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = resolve_name("." * node.level + (node.module or ""), package)
            names |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return names


def environment() -> dict[str, str]:
    """GPU, driver and versions of this machine."""
    import torch

    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    return {
        "gpu": torch.cuda.get_device_name(),
        "driver": driver,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def write(
    path: Path,
    *,
    sources: str,
    machine: dict,
    counts: dict,
    gpu_files: set[str],
    failures: list[str],
    skipped: dict[str, str],
    duration_s: float,
):
    """Write a receipt.

    Args:
        sources: `sources_hash` from before the first test.
        machine: `environment()`.
        counts: tests by outcome: passed, failed, skipped, deselected, gpu_passed, gpu_deselected. The totals
            include the GPU tests. None includes the check of the receipt itself, which cannot run yet.
        gpu_files: names of the test files in which a GPU test passed.
        failures: ids of the failed tests.
        skipped: ids of the GPU tests that were skipped, and why.
    """
    record = {
        "sources": sources,
        **machine,
        "counts": counts,
        "gpu_files": sorted(gpu_files),
        "failures": failures,
        "skipped": skipped,
        "duration_s": round(duration_s, 1),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    path.write_text(json.dumps(record, indent=2) + "\n")


def problems(path: Path, root: Path) -> list[str]:
    """The reasons why the receipt at `path` does not vouch for the sources in `root`; empty when it does."""
    if not path.is_file():
        return [f"{path} is missing: {REMEDY}"]
    try:
        record = json.loads(path.read_text())
        counts, failures, sources = record["counts"], record["failures"], record["sources"]
        skipped = {name: why for name, why in record["skipped"].items() if why not in ALLOWED_SKIPS}
        never_ran = gpu_test_files(root) - set(record["gpu_files"])
        failed, gpu_passed, left_out = (counts[k] for k in ("failed", "gpu_passed", "gpu_deselected"))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return [f"{path} is not a receipt ({type(error).__name__}: {error}): {REMEDY}"]
    found = []
    if failed or failures:
        found.append(f"{path} is red: {failed} failed, {', '.join(failures) or 'not named'}: {REMEDY}")
    if not gpu_passed:
        found.append(f"{path} says that no GPU test passed: {REMEDY}")
    if left_out:
        found.append(f"{path} is of a partial run, {left_out} GPU tests were deselected: {REMEDY}")
    if skipped:
        named = "; ".join(f"{name} ({why})" for name, why in skipped.items())
        found.append(f"{path} is of a partial run, GPU tests were skipped: {named}: {REMEDY}")
    if never_ran:
        found.append(f"{path} is of a partial run, without {', '.join(sorted(never_ran))}: {REMEDY}")
    if sources != sources_hash(root):
        found.append(f"{path} is stale, the sources have changed since it was written: {REMEDY}")
    return found


def skipped_tests(path: Path) -> dict[str, str]:
    """{id: reason} of the GPU tests that the receipt's run skipped; empty without a receipt."""
    try:
        return dict(json.loads(path.read_text())["skipped"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}  # `problems` reports the fault
