"""The GPU receipt: proof that the GPU tests passed on exactly these sources.

CI has no Hopper GPU. `make test-gpu` runs the whole suite on one and writes `tests/gpu_receipt.json`; on
every other machine `test_receipt.py` holds that file against the sources it finds. A receipt is good when it
is there, was written by a full and green run, and carries the hash of the sources as they are now.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
import subprocess
from datetime import datetime, timezone
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PATH = ROOT / "tests" / "gpu_receipt.json"
SUFFIXES = {".py", ".cu", ".cuh", ".h", ".cpp"}
REMEDY = "run `make test-gpu` on a machine with a Hopper GPU and commit tests/gpu_receipt.json"


def source_files(root: Path) -> list[Path]:
    """The files a receipt speaks for, sorted by their path below `root`: sources in kernels/, include/ and
    python/, at any depth, and tests/*.py. Compiled files, caches and the receipt have other suffixes.
    """
    files = [p for folder in ("kernels", "include", "python") for p in (root / folder).rglob("*")]
    files = [p for p in files if p.suffix in SUFFIXES] + list((root / "tests").glob("*.py"))
    return sorted((p for p in files if p.is_file()), key=lambda p: p.relative_to(root).as_posix())


def sources_hash(root: Path) -> str:
    """sha256 over path, length and contents of every source file."""
    digest = hashlib.sha256()
    for path in source_files(root):
        contents = path.read_bytes()
        digest.update(f"{path.relative_to(root).as_posix()}\0{len(contents)}\0".encode())
        digest.update(contents)
    return digest.hexdigest()


def gpu_test_files(root: Path) -> set[str]:
    """Names of the test files that hold tests marked `gpu`."""
    marker = re.compile(r"^(pytestmark = |@).*pytest\.mark\.gpu|marks=pytest\.mark\.gpu", re.MULTILINE)
    return {path.name for path in (root / "tests").glob("test_*.py") if marker.search(path.read_text())}


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
    duration_s: float,
):
    """Write a receipt.

    Args:
        sources: `sources_hash` from before the first test.
        machine: `environment()`.
        counts: tests by outcome: passed, failed, skipped, deselected, gpu_passed, gpu_deselected. The GPU's
            count in the totals too. The check of the receipt itself, which cannot run yet, is in none.
        gpu_files: names of the test files in which a GPU test passed.
        failures: ids of the failed tests.
    """
    record = {
        "sources": sources,
        **machine,
        "counts": counts,
        "gpu_files": sorted(gpu_files),
        "failures": failures,
        "duration_s": round(duration_s, 1),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    path.write_text(json.dumps(record, indent=2) + "\n")


def problems(path: Path, root: Path) -> list[str]:
    """Why the receipt at `path` does not vouch for the sources in `root`; empty when it does."""
    if not path.is_file():
        return [f"{path} is missing: {REMEDY}"]
    try:
        record = json.loads(path.read_text())
        counts, failures, sources = record["counts"], record["failures"], record["sources"]
        never_ran = gpu_test_files(root) - set(record["gpu_files"])
        failed, gpu_passed, left_out = (counts[k] for k in ("failed", "gpu_passed", "gpu_deselected"))
    except (ValueError, KeyError, TypeError) as error:
        return [f"{path} is not a receipt ({type(error).__name__}: {error}): {REMEDY}"]
    found = []
    if failed or failures:
        found.append(f"{path} is red: {failed} failed, {', '.join(failures) or 'not named'}: {REMEDY}")
    if not gpu_passed:
        found.append(f"{path} says that no GPU test passed: {REMEDY}")
    if left_out:
        found.append(f"{path} is of a partial run, {left_out} GPU tests were deselected: {REMEDY}")
    if never_ran:
        found.append(f"{path} is of a partial run, without {', '.join(sorted(never_ran))}: {REMEDY}")
    if sources != sources_hash(root):
        found.append(f"{path} is stale, the sources have changed since it was written: {REMEDY}")
    return found
