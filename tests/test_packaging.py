"""The sdist holds what a build reads and nothing large; the compiled module's stub matches the module.

The build: its tools, when it configures CMake anew, and that it does not pack a deleted module.
"""

import ast
import os
import re
import shutil
import subprocess
import sys
import tarfile
from importlib.metadata import requires
from pathlib import Path

import build_backend
import pytest
import setup
from setuptools import Distribution

import fpsattention as fps
from fpsattention import _C

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "python" / "fpsattention"


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> dict[str, int]:
    """{file: size in bytes} of an sdist, made in a copy of the sources, as setuptools writes beside them."""
    folder = tmp_path_factory.mktemp("sdist")
    tree = folder / "tree"
    for name in ("kernels", "include", "python", "examples", "tests"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("*.egg-info", "__pycache__"))
    for path in ROOT.iterdir():
        if path.is_file() and path.name != ".git":
            shutil.copy2(path, tree)
    (tree / "python/fpsattention/_C.cpython-39-x86_64-linux-gnu.so").write_text("of another build")
    build = f"import build_backend; build_backend.build_sdist({str(folder)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=tree, check=True, capture_output=True, timeout=120)
    (path,) = folder.glob("*.tar.gz")
    assert path.name == f"fpsattention-{fps.__version__}.tar.gz"
    with tarfile.open(path) as archive:
        return {x.name.partition("/")[2]: x.size for x in archive if x.isfile()}


def test_the_sdist_holds_what_a_build_reads(sdist):
    needed = {"CMakeLists.txt", "build_backend.py", "setup.py", "pyproject.toml", "LICENSE", "README.md"}
    for folder, pattern in (
        ("kernels", "*"),
        ("include", "**/*"),
        ("python", "**/*.py"),
        ("python", "**/*.pyi"),
    ):
        needed |= {p.relative_to(ROOT).as_posix() for p in (ROOT / folder).glob(pattern) if p.is_file()}
    assert "python/fpsattention/_C.pyi" in needed and "include/fpsattention/params.h" in needed
    assert needed | {"python/fpsattention/py.typed"} <= sdist.keys()


def test_the_sdist_holds_nothing_large_or_compiled(sdist):
    assert sum(sdist.values()) < 2e6
    suffixes = {Path(name).suffix for name in sdist}
    assert not suffixes & {".so", ".pyc", ".safetensors", ".png", ".json"}
    assert not [name for name in sdist if name.startswith(("tests/", "examples/"))]


@pytest.fixture
def configured(tmp_path):
    """A function that configures with a stand-in for CMake, and returns how often CMake was called."""

    def configure(*options: str, nvcc: tuple[int, ...] = (13, 0, 88)) -> int:
        write = "import sys; open(sys.argv[1], 'a').write('x')"
        command = [sys.executable, "-c", write, str(tmp_path / "calls"), *options]
        setup.configure(tmp_path, command, nvcc, dict(os.environ))
        return len((tmp_path / "calls").read_text())

    return configure


def test_a_build_with_the_same_tools_is_not_configured_again(configured):
    assert [configured("a"), configured("a")] == [1, 1]


def test_a_build_with_other_tools_is_configured_again(configured):
    configured("a")
    assert [configured("b"), configured("b", nvcc=(13, 0, 89)), configured("a", nvcc=(13, 0, 89))] == [
        2,
        3,
        4,
    ]


def test_a_build_is_configured_again_after_a_failure(configured, tmp_path):
    configured("a")
    with pytest.raises(subprocess.CalledProcessError):
        setup.configure(
            tmp_path, [sys.executable, "-c", "import sys; sys.exit(1)"], (13, 0, 88), dict(os.environ)
        )
    assert configured("a") == 2


def test_a_deleted_module_is_not_packed_again(tmp_path):
    command = setup.Build(Distribution())
    command.build_base = str(tmp_path)
    command.ensure_finalized()
    stale = Path(command.build_lib) / "fpsattention" / "gone.py"
    stale.parent.mkdir(parents=True)
    stale.touch()
    command.run()
    assert not stale.exists()


def test_the_emulator_compiles_with_the_headers_of_the_build():
    extra = [x.partition(";")[0].strip() for x in requires("fpsattention") if 'extra == "emulator"' in x]
    assert len(extra) > 3 and set(extra) <= {*build_backend.TOOLS, *build_backend.COMPILER}


def functions_of_the_stub() -> dict[str, ast.arguments]:
    tree = ast.parse((PACKAGE / "_C.pyi").read_text())
    return {node.name: node.args for node in tree.body if isinstance(node, ast.FunctionDef)}


def signature_of(name: str) -> ast.arguments:
    """The signature in pybind11's docstring: positional parameters are arg0, arg1, ..."""
    line = getattr(_C, name).__doc__.splitlines()[0]
    (node,) = ast.parse(f"def {line}: ...").body
    return node.args


def described(arg: ast.arg) -> str:
    """What a stub and pybind11 both give of a parameter: the depth of its sequences and the type of an element."""
    text = ast.unparse(arg.annotation).replace("_Triple", "Sequence[int]")
    (kind,) = set(re.findall(r"\b(?:Supports)?(Int|Float|int|float|bool|str)\b", text))
    return f"{text.count('Sequence[')} {kind.lower()}"


def test_the_stub_has_the_functions_of_the_module():
    functions = {name for name in dir(_C) if callable(getattr(_C, name)) and not name.startswith("__")}
    stub = functions_of_the_stub()
    assert stub.keys() == functions and len(functions) > 10


@pytest.mark.parametrize("name", functions_of_the_stub())
def test_the_stub_has_the_signatures_of_the_module(name):
    found, real = functions_of_the_stub()[name], signature_of(name)
    assert not found.args and not found.defaults and not any(found.kw_defaults)
    assert not real.defaults and not any(real.kw_defaults)
    positional = [described(x) for x in found.posonlyargs]
    assert positional == [described(x) for x in (*real.posonlyargs, *real.args)]
    assert [x.arg for x in found.kwonlyargs] == [x.arg for x in real.kwonlyargs]
    assert [described(x) for x in found.kwonlyargs] == [described(x) for x in real.kwonlyargs]


def test_the_stub_has_the_constants_of_the_module():
    tree = ast.parse((PACKAGE / "_C.pyi").read_text())
    stub = {x.target.id: ast.unparse(x.annotation) for x in tree.body if isinstance(x, ast.AnnAssign)}
    constants = {name: type(getattr(_C, name)).__name__ for name in dir(_C) if name.isupper()}
    assert stub == constants and "BLOCK" in stub
