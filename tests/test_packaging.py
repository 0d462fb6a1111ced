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


STUB = ast.parse((PACKAGE / "_C.pyi").read_text())
FUNCTIONS = {node.name: node.args for node in STUB.body if isinstance(node, ast.FunctionDef)}
CLASSES = {node.name: node for node in STUB.body if isinstance(node, ast.ClassDef)}
ALIASES = {node.targets[0].id: ast.unparse(node.value) for node in STUB.body if isinstance(node, ast.Assign)}


def signatures_of(function) -> list[ast.arguments]:
    """As pybind11 writes them into the docstring, without self; unnamed parameters are arg0, arg1, ..."""
    lines = [re.sub(r"^\d+\. ", "", line.strip()) for line in function.__doc__.splitlines()]
    lines = [line for line in lines if re.match(r"\w*\(.*\) -> ", line)]
    found = [ast.parse(f"def f{line[line.index('(') :]}: ...").body[0].args for line in lines]
    return [_without_self(arguments) for arguments in found]


def _without_self(arguments: ast.arguments) -> ast.arguments:
    if arguments.args and arguments.args[0].arg == "self":
        arguments.args = arguments.args[1:]
    return arguments


def described(annotation: ast.expr) -> str:
    """What a stub and pybind11 both say of a type: how deep its sequences nest, and the type of an element."""
    text = re.sub(r"\w+", lambda word: ALIASES.get(word[0], word[0]), ast.unparse(annotation))
    if "tuple[" in text:
        return f"pair of {text.lower().count('int')}"
    (kind,) = set(re.findall(rf"\b(?:Supports)?(Int|Float|int|float|bool|str|{'|'.join(CLASSES)})\b", text))
    return f"{text.count('Sequence[')} {kind.lower()}"


def parameters(arguments: ast.arguments) -> list[tuple[str, str]]:
    """Name and type of each parameter; those that pybind11 has no name for are positional in the stub."""
    positional = [("", described(x.annotation)) for x in arguments.posonlyargs]
    named = [*arguments.args, *arguments.kwonlyargs]
    unnamed = re.compile(r"arg\d+")
    return positional + [("" if unnamed.fullmatch(x.arg) else x.arg, described(x.annotation)) for x in named]


def test_the_stub_has_the_names_of_the_module():
    there = {name: getattr(_C, name) for name in dir(_C) if not name.startswith("__")}
    classes = {name for name, value in there.items() if isinstance(value, type)}
    assert CLASSES.keys() == classes and {"ForwardParams", "BackwardParams"} <= classes
    assert FUNCTIONS.keys() == {name for name, value in there.items() if callable(value)} - classes


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_stub_has_the_signatures_of_the_module(name):
    assert [parameters(x) for x in signatures_of(getattr(_C, name))] == [parameters(FUNCTIONS[name])]


@pytest.mark.parametrize("name", CLASSES)
def test_the_stub_has_the_members_of_the_module(name):
    real, body = getattr(_C, name), CLASSES[name].body
    assert [x.id for x in CLASSES[name].bases] == [
        x.__name__ for x in real.__bases__ if hasattr(_C, x.__name__)
    ]
    methods: dict[str, list[ast.arguments]] = {}
    for node in body:
        if isinstance(node, ast.FunctionDef):
            methods.setdefault(node.name, []).append(_without_self(node.args))
    made = {
        x: signatures_of(f) for x, f in vars(real).items() if x == "__init__" or x[0] != "_" and callable(f)
    }
    if made.get("__init__") == []:  # pybind11's own, of a class without constructors
        del made["__init__"]
    assert {x: [*map(parameters, overloads)] for x, overloads in methods.items()} == {
        x: [*map(parameters, overloads)] for x, overloads in made.items()
    }
    fields = {node.target.id: described(node.annotation) for node in body if isinstance(node, ast.AnnAssign)}
    setters = {x: signatures_of(value.fset) for x, value in vars(real).items() if isinstance(value, property)}
    assert fields == {x: described(setter[0].args[-1].annotation) for x, setter in setters.items()}
    assert fields or methods.keys() > {"__init__"}


def test_the_stub_has_the_constants_of_the_module():
    stub = {x.target.id: ast.unparse(x.annotation) for x in STUB.body if isinstance(x, ast.AnnAssign)}
    constants = {name: type(getattr(_C, name)).__name__ for name in dir(_C) if name.isupper()}
    assert stub == constants and "BLOCK" in stub
