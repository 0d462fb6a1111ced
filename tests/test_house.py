"""The rules of the house: which part may import which, and how long functions and parameter lists may be.

All is read from the sources. Each check is also shown something that it must find.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from importlib.util import resolve_name
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "fpsattention"
COMPILED = f"{PACKAGE}._C"

# What each part of the package may import of it, besides itself. "" is the package's own __init__.py.
MAY_IMPORT = {
    "core": {"_C"},
    "schedules": {"core"},
    "parallel": {"core"},
    "integrations": {"core", "schedules", "parallel"},
    "": {"_C", "core", "schedules", "parallel", "integrations"},
    "cli": {"", "_C", "core", "schedules", "parallel", "integrations"},
}

MOST_ENTRIES = 8  # at the top level of the package
MOST_LINES = 80  # of a Python function
MOST_PARAMETERS = 16  # of a Python function of the package
MOST_LINES_CPP = 120  # of a function in kernels/ and include/
MOST_PARAMETERS_CPP = 8  # of a function in the bindings

# Imports


def modules_in(folder: Path) -> dict[str, Path]:
    """The modules of the package in `folder`, by full name."""
    modules = {}
    for path in folder.rglob("*.py"):
        parts = (PACKAGE, *path.relative_to(folder).with_suffix("").parts)
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return modules


def imports_in(source: str, package: str, modules: set[str]) -> set[str]:
    """The modules that a file of `package` imports anywhere in it, also in its functions. Of `from a import b` that is
    a.b if b is one of `modules`, otherwise a.
    """
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = resolve_name("." * node.level + (node.module or ""), package)
            names = {f"{start}.{alias.name}" for alias in node.names}
            found |= names & modules
            if names - modules:
                found.add(start)
    return found


def import_graph(folder: Path) -> dict[str, set[str]]:
    """What each module of the package in `folder` imports of the package."""
    paths = modules_in(folder)
    modules = {*paths, COMPILED}
    graph = {}
    for name, path in paths.items():
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        found = imports_in(path.read_text(), package, modules)
        graph[name] = {x for x in found if x == PACKAGE or x.startswith(f"{PACKAGE}.")}
    return graph


def part_of(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def wrong_imports(graph: dict[str, set[str]]) -> list[str]:
    return sorted(
        f"{module} imports {other}"
        for module, others in graph.items()
        for other in others
        if part_of(other) not in MAY_IMPORT[part_of(module)] | {part_of(module)}
    )


def circle_in(graph: dict[str, set[str]]) -> list[str]:
    """Modules of which each imports the next and the last is the first again; empty if there is no circle."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1][::-1]
    return []


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    return import_graph(ROOT / "python" / PACKAGE)


def test_the_whole_package_is_read(graph):
    assert {part_of(x) for x in graph} == set(MAY_IMPORT)
    assert f"{PACKAGE}.core.config" in graph[f"{PACKAGE}.core.api"]
    assert COMPILED in set().union(*graph.values())


def test_imports_go_down(graph):
    assert wrong_imports(graph) == []


def test_no_module_imports_itself_by_others(graph):
    assert circle_in(graph) == []


def loads_by_name(source: str) -> bool:
    """Whether a source imports modules whose names the other checks cannot read."""
    names = {getattr(x, "attr", getattr(x, "id", "")) for x in ast.walk(ast.parse(source))}
    return not names.isdisjoint({"import_module", "__import__"})


def test_modules_are_loaded_by_name_only_where_that_is_their_purpose():
    """Lazy attributes, and the commands of the command line."""
    modules = modules_in(ROOT / "python" / PACKAGE)
    loading = {name for name, path in modules.items() if loads_by_name(path.read_text())}
    assert loading <= {PACKAGE, f"{PACKAGE}.integrations", f"{PACKAGE}.cli.main"}
    assert loads_by_name("def f():\n    return importlib.import_module('a')")
    assert loads_by_name("from importlib import import_module\nimport_module('a')")
    assert not loads_by_name("from importlib import metadata\nmetadata.version('a')")


def write_package(folder: Path, sources: dict[str, str]) -> dict[str, set[str]]:
    for name, source in sources.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    return import_graph(folder)


@pytest.mark.parametrize(
    "name, source, wrong",
    [
        ("core/a.py", "from ..schedules import b", "core.a imports fpsattention.schedules.b"),
        ("core/a.py", "from ..parallel import ring_attention", "core.a imports fpsattention.parallel"),
        ("core/a.py", "import fpsattention", "core.a imports fpsattention"),
        ("core/a.py", "import fpsattention.cli.c as c", "core.a imports fpsattention.cli.c"),
        (
            "parallel.py",
            "def f():\n    from .schedules import b",
            "parallel imports fpsattention.schedules.b",
        ),
        ("schedules/b.py", "from ..parallel import *", "schedules.b imports fpsattention.parallel"),
        ("schedules/b.py", "from .. import _C", "schedules.b imports fpsattention._C"),
        (
            "integrations/d/e.py",
            "if True:\n    from ...cli.c import x",
            "integrations.d.e imports fpsattention.cli.c",
        ),
        ("__init__.py", "from .cli import c", "fpsattention imports fpsattention.cli.c"),
    ],
)
def test_an_import_upward_is_found(tmp_path, name, source, wrong):
    legal = {
        "__init__.py": "from .core.a import x",
        "parallel.py": "from .core import a",
        "core/a.py": "import torch\nfrom .. import _C\nfrom ._b import x",
        "core/_b.py": "",
        "schedules/b.py": "from ..core.a import x\nimport fpsattention.core.a",
        "integrations/d/__init__.py": "from .e import x",
        "integrations/d/e.py": "from ...parallel import ulysses_attention\nfrom ..d2 import x",
        "integrations/d2.py": "from ..core import a\nfrom ..schedules.b import x",
        "cli/c.py": "from ..integrations import d\nimport fpsattention as fps",
    }
    assert wrong_imports(write_package(tmp_path, legal)) == []
    (found,) = wrong_imports(write_package(tmp_path, {name: source}))
    assert found.removeprefix(f"{PACKAGE}.") == wrong.removeprefix(f"{PACKAGE}.")


def test_a_circle_is_found(tmp_path):
    sources = {
        "core/a.py": "from .b import x",
        "core/b.py": "def f():\n    from . import c",
        "core/c.py": "import torch",
    }
    assert circle_in(write_package(tmp_path, sources)) == []
    circle = circle_in(write_package(tmp_path, {"core/c.py": "def f():\n    from .a import x"}))
    assert circle[0] == circle[-1]
    assert {x.removeprefix("fpsattention.core.") for x in circle} == {"a", "b", "c"}


def entries_of(folder: Path) -> set[str]:
    """Files and folders, without those that git ignores: what is compiled, and what Python caches."""
    return {x.name for x in folder.iterdir() if x.name != "__pycache__" and x.suffix != ".so"}


def test_the_top_level_is_small():
    assert len(entries_of(ROOT / "python" / PACKAGE)) <= MOST_ENTRIES


def test_entries_are_counted(tmp_path):
    for name in ("a.py", "py.typed", "_C.cpython-311.so"):
        (tmp_path / name).touch()
    for name in ("core", "__pycache__"):
        (tmp_path / name).mkdir()
    assert entries_of(tmp_path) == {"a.py", "py.typed", "core"}


# Sizes of functions


@dataclass(frozen=True)
class Function:
    """A function in a source: its name, the line it begins on, its lines and its parameters."""

    name: str
    line: int
    lines: int
    parameters: int


def python_functions(source: str) -> Iterator[Function]:
    """All functions of a Python source, nested ones and methods included. Decorators do not count as lines of them;
    `self`, *args and **kwargs count as parameters.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            x = node.args
            named = [*x.posonlyargs, *x.args, *x.kwonlyargs]
            parameters = len(named) + (x.vararg is not None) + (x.kwarg is not None)
            yield Function(node.name, node.lineno, node.end_lineno - node.lineno + 1, parameters)


PYTHON_FILES = sorted(
    path
    for folder in (".ci", "bench", "examples", "python", "tests")
    for path in (ROOT / folder).rglob("*.py")
) + sorted(ROOT.glob("*.py"))


def test_python_functions_are_short():
    files = {path: list(python_functions(path.read_text())) for path in PYTHON_FILES}
    assert sum(map(len, files.values())) > 1000
    assert too_long(files, MOST_LINES) == []


def test_python_functions_of_the_package_have_few_parameters():
    files = {
        path: list(python_functions(path.read_text())) for path in (ROOT / "python" / PACKAGE).rglob("*.py")
    }
    assert too_many_parameters(files, MOST_PARAMETERS) == []


def too_long(files: dict[Path, list[Function]], most: int) -> list[str]:
    return [
        f"{path.relative_to(ROOT)}:{x.line}: {x.name} has {x.lines} lines"
        for path, functions in files.items()
        for x in functions
        if x.lines > most
    ]


def too_many_parameters(files: dict[Path, list[Function]], most: int) -> list[str]:
    return [
        f"{path.relative_to(ROOT)}:{x.line}: {x.name} has {x.parameters} parameters"
        for path, functions in files.items()
        for x in functions
        if x.parameters > most
    ]


def test_a_long_python_function_is_found():
    source = "class A:\n    @staticmethod\n    def f(a, /, b, *c, d, **e):\n" + "        x = 1\n" * 80
    (found,) = python_functions(source)
    assert found == Function("f", 3, 81, 5)
    files = {ROOT / "a.py": [found]}
    assert too_long(files, 80) == ["a.py:3: f has 81 lines"] and too_long(files, 81) == []
    assert too_many_parameters(files, 4) == ["a.py:3: f has 5 parameters"]
    assert too_many_parameters(files, 5) == []


# What is no code in C++: comments, strings and characters, and preprocessor lines with their continuations.
NO_CODE = re.compile(
    r"//[^\n]*|/\*.*?\*/|\"(?:\\.|[^\"\\\n])*\"|'(?:\\.|[^'\\\n])'|^[ \t]*#(?:\\\n|[^\n])*",
    re.DOTALL | re.MULTILINE,
)
CONTROL = {"if", "for", "while", "switch", "catch", "constexpr"}  # constexpr: of `if constexpr (...)`
# Between the parameters of a function and its body: qualifiers, a result type, members that a constructor sets.
QUALIFIERS = re.compile(
    r"\)(?:\s*(?:const|noexcept|mutable|override))*(?:\s*->\s*[\w:<>,&*\s]+)?(?:\s*:\s*\w+[({][^;{}]*[)}])?\s*$"
)


def cpp_functions(source: str) -> Iterator[Function]:
    """The functions and lambdas that a C++ source defines, in the style of clang-format: every body is in braces. A
    function begins on the line of its name.
    """
    code = NO_CODE.sub(lambda found: re.sub(r"[^\n]", " ", found[0]), source)
    opened: list[tuple[str, int, int] | None] = []  # for each open brace, the function whose body it begins
    for brace in re.finditer(r"[{}]", code):
        if brace[0] == "{":
            opened.append(_head_before(code, brace.start()))
        elif head := opened.pop():
            name, start, parameters = head
            line = code.count("\n", 0, start) + 1
            yield Function(name, line, code.count("\n", start, brace.start()) + 1, parameters)
    assert not opened, "braces do not match"


def _head_before(code: str, brace: int) -> tuple[str, int, int] | None:
    """(name, its place, number of parameters) of the function whose body opens at `brace`; None if none does."""
    start = max(code.rfind(x, 0, brace) for x in ";{}") + 1
    end = QUALIFIERS.search(code, start, brace)
    if end is None:
        return None
    depth, place = 0, end.start()
    while True:
        depth += (code[place] == ")") - (code[place] == "(")
        if depth == 0:
            break
        place -= 1
    before = code[:place].rstrip()
    if before.endswith("]"):
        name, at = "lambda", before.rindex("[")
    else:
        word = re.search(r"~?\w+$|operator\W+$", before)
        if word is None or word[0] in CONTROL:
            return None
        name, at = word[0], word.start()
    return name, at, _count_parameters(code[place + 1 : end.start()])


def _count_parameters(text: str) -> int:
    """Commas outside of brackets and template arguments, and one."""
    depth, commas = 0, 0
    for x in text.replace("->", "  "):
        depth += (x in "([{<") - (x in ")]}>")
        commas += x == "," and depth == 0
    return commas + 1 if text.strip() not in ("", "void") else 0


def cpp_files(*folders: str) -> dict[Path, list[Function]]:
    paths = [p for x in folders for p in (ROOT / x).rglob("*") if p.suffix in (".cu", ".cuh", ".h", ".cpp")]
    return {path: list(cpp_functions(path.read_text())) for path in sorted(paths)}


def test_functions_of_the_kernels_are_short():
    files = cpp_files("kernels", "include")
    names = {x.name for functions in files.values() for x in functions}
    assert {"PYBIND11_MODULE", "math", "launch"} <= names
    assert too_long(files, MOST_LINES_CPP) == []


def test_functions_of_the_bindings_have_few_parameters():
    files = {
        path: functions for path, functions in cpp_files("kernels").items() if path.name == "bindings.cpp"
    }
    assert any(functions for functions in files.values())
    assert too_many_parameters(files, MOST_PARAMETERS_CPP) == []


CPP = """
#define BEGIN(x) \\
    if (x) {
// } a brace in a comment {
namespace fps {
struct Point {
    int x = 0, y{1};
    Point(int a, int b) : x(a), y(b) {}
    ~Point() { clear(); }
    bool operator==(const Point &other) const { return x == other.x; }
};
template <int N, typename T>
__global__ void __launch_bounds__(N, 1)
    long_one(const __grid_constant__ Params params, std::array<int, 3> sizes, void (*callback)(int, int),
             int last = f(1, 2)) {
    if constexpr (N > 1) {
        for (int i = 0; i < N; ++i) {
            x += '{';
        }
    } else {
        s = "}";
    }
    auto add = [&](int a, int b) -> int {
        return a + b;
    };
BODY
}
inline void nothing(void) {}
}  // namespace fps
PYBIND11_MODULE(_C, m) {
    m.def("f", [](std::uintptr_t a, std::map<int, int> b) { return a; }, py::arg("a"));
    m.def("g", &g);
}
"""


def test_functions_in_cpp_are_found():
    source = CPP.replace("BODY", "    step();\n" * 120)
    found = {x.name: x for x in cpp_functions(source) if x.name != "lambda"}
    assert {name: x.parameters for name, x in found.items()} == {
        "Point": 2, "~Point": 0, "operator==": 1, "long_one": 4, "nothing": 0, "PYBIND11_MODULE": 2,
    }  # fmt: skip
    lambdas = [x.parameters for x in cpp_functions(source) if x.name == "lambda"]
    assert lambdas == [2, 2]
    assert (found["long_one"].line, found["long_one"].lines) == (14, 134)
    files = {ROOT / "a.cu": list(found.values())}
    assert too_long(files, 133) == ["a.cu:14: long_one has 134 lines"] and too_long(files, 134) == []
    assert too_many_parameters(files, 3) == ["a.cu:14: long_one has 4 parameters"]
