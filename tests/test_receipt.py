"""The receipt vouches for these sources, and the check refuses a receipt that does not."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

import conftest
import receipt

MACHINE = {"gpu": "H100", "driver": "580.1", "cuda": "13.0", "torch": "2.11", "python": "3.12"}
VOUCHED_FOR = {
    "kernels/forward.cu": "// forward\n",
    "include/fps/geometry.h": "// geometry\n",
    "CMakeLists.txt": "add_compile_options(-O3)\n",
    "setup.py": "CUDA = (12, 8)\n",
    "build_backend.py": "PINS = []\n",
    "python/fpsattention/core/api.py": "import torch\n",
    "python/fpsattention/integrations/host.py": "from ..core.api import attention\n",
    "tests/conftest.py": "import judge\n",
    "tests/judge.py": "LIMIT = 1\n",
    "tests/test_a.py": "from test_b import tiny\n\npytestmark = pytest.mark.gpu\n",
    "tests/test_b.py": "def tiny():\n    import inputs\n",
    "tests/inputs.py": "SEED = 1\n",
}
OTHERS = {
    "python/fpsattention/cli/demo.py": "from .errors import UserError\n",
    "python/fpsattention/cli/errors.py": "class UserError(Exception): pass\n",
    "examples/tiny_dit/model.py": "LAYERS = 6\n",
    "python/fpsattention/_C.pyi": "BLOCK: int\n",
    "python/fpsattention/_C.so": "",
    "python/fpsattention/__pycache__/api.pyc": "",
    "tests/test_c.py": "def test_on_a_cpu(): pass\n",
    "tests/plots.py": "COLOURS = []\n",
    "kernels/README.md": "# Kernels\n",
    "docs/index.md": "# Home\n",
    "bench/run.py": "ROUNDS = 5\n",
    "examples/attention.py": "HEADS = 2\n",
    "Makefile": "test:\n",
    "pyproject.toml": '[build-system]\nrequires = ["nvidia-cutlass==4.2.*"]\n\n[project]\nname = "fps"\n',
}
GREEN = {"passed": 7, "failed": 0, "skipped": 0, "deselected": 0, "gpu_passed": 3, "gpu_deselected": 0}


@pytest.mark.receipt
def test_receipt_vouches_for_these_sources():
    found = receipt.problems(receipt.PATH, receipt.ROOT)
    assert not found, "\n".join(found)


@pytest.fixture
def tree(tmp_path):
    """A project with one file of each kind, and a green receipt for it."""
    for name, text in {**VOUCHED_FOR, **OTHERS}.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    write(tmp_path)
    return tmp_path


def write(root, failures=(), gpu_files=("test_a.py",), skipped=(), **counts):
    receipt.write(
        root / "tests/gpu_receipt.json",
        sources=receipt.sources_hash(root),
        machine=MACHINE,
        counts={**GREEN, **counts},
        gpu_files=set(gpu_files),
        failures=list(failures),
        skipped=dict(skipped),
        duration_s=1.0,
    )


def problems(root) -> str:
    return "\n".join(receipt.problems(root / "tests/gpu_receipt.json", root))


def test_good_receipt(tree):
    assert problems(tree) == ""
    record = json.loads((tree / "tests/gpu_receipt.json").read_text())
    assert record["counts"] == GREEN and record["failures"] == []
    assert {k: record[k] for k in MACHINE} == MACHINE
    assert record["date"] and record["duration_s"] == 1.0


def test_missing_receipt(tree):
    (tree / "tests/gpu_receipt.json").unlink()
    assert "missing" in problems(tree) and "make test-gpu" in problems(tree)


@pytest.mark.parametrize("contents", ["", "[]", "{", '{"sources": 1}', '{"counts": 3}'])
def test_garbled_receipt(tree, contents):
    (tree / "tests/gpu_receipt.json").write_text(contents)
    assert "not a receipt" in problems(tree) and "make test-gpu" in problems(tree)


def test_red_receipt(tree):
    write(tree, failed=1, failures=["tests/test_a.py::test_x"])
    assert "red" in problems(tree) and "tests/test_a.py::test_x" in problems(tree)


def test_receipt_without_gpu_tests(tree):
    write(tree, gpu_passed=0)
    assert "no GPU test passed" in problems(tree)


def test_receipt_of_a_partial_run(tree):
    write(tree, deselected=2, gpu_deselected=2)
    assert "partial" in problems(tree) and "2 GPU tests" in problems(tree)


def test_receipt_of_some_files(tree):
    """A run of a single file deselects nothing."""
    write(tree, gpu_files=())
    assert "partial" in problems(tree) and "without test_a.py" in problems(tree)


@pytest.mark.parametrize(
    ("details", "why"),
    [
        ({"longrepr": ("test_a.py", 3, "Skipped: needs two GPUs")}, "needs two GPUs"),
        ({"longrepr": "XFAIL", "wasxfail": "rounds once more"}, "expected to fail: rounds once more"),
    ],
)
def test_the_writer_names_skipped_gpu_tests(tmp_path, monkeypatch, details, why):
    monkeypatch.setattr(receipt, "environment", lambda: MACHINE)
    writer = conftest.ReceiptWriter(tmp_path / "receipt.json")
    outcome = {"failed": False, "skipped": True, "passed": False, **details}
    for nodeid, keywords in (("test_a.py::test_x", {"gpu": 1}), ("test_b.py::test_on_a_cpu", {})):
        writer.pytest_runtest_logreport(SimpleNamespace(nodeid=nodeid, keywords=keywords, **outcome))
    deselected = {"deselected": 3, "gpu_deselected": 1}
    node = SimpleNamespace(workeroutput={"deselected": deselected}, config=SimpleNamespace(deselected=None))
    conftest.pytest_testnodedown(node)  # a worker of pytest-xdist reports what it has left out
    writer.pytest_sessionfinish(SimpleNamespace(config=node.config), pytest.ExitCode.OK)
    record = json.loads((tmp_path / "receipt.json").read_text())
    assert record["skipped"] == {"test_a.py::test_x": why} and record["counts"]["skipped"] == 2
    assert record["counts"] | deselected == record["counts"]


@pytest.mark.parametrize("name", [name for name in VOUCHED_FOR if name != "tests/test_a.py"])
@pytest.mark.parametrize("change", ["edit", "remove", "rename"])
def test_changed_source_makes_the_receipt_stale(tree, name, change):
    path = tree / name
    if change == "edit":
        path.write_text(path.read_text() + " ")
    elif change == "remove":
        path.unlink()
    else:
        path.rename(path.with_stem("renamed"))
    assert "stale" in problems(tree) and "make test-gpu" in problems(tree)


@pytest.mark.parametrize("name", ["kernels/new.cuh", "python/fpsattention/deep/new.py", "tests/test_new.py"])
def test_added_source_makes_the_receipt_stale(tree, name):
    (tree / name).parent.mkdir(exist_ok=True)
    (tree / name).write_text("@pytest.mark.gpu\ndef test_x(): pass\n")
    assert "stale" in problems(tree)


@pytest.mark.parametrize(
    ("old", "new", "stale"),
    [("4.2", "4.3", True), ('requires = ["', 'requires = ["setuptools", "', True), ("fps", "other", False)],
)
def test_build_requirements_of_pyproject_count(tree, old, new, stale):
    path = tree / "pyproject.toml"
    assert path.read_text().count(old) == 1
    path.write_text(path.read_text().replace(old, new))
    assert ("stale" in problems(tree)) == stale


def test_a_skipped_gpu_test_is_named(tree):
    write(
        tree, skipped={"tests/test_a.py::test_x": "needs 40 GiB", "tests/test_a.py::test_y": "needs two GPUs"}
    )
    assert "skipped: tests/test_a.py::test_x (needs 40 GiB)" in problems(tree)
    assert "test_y" not in problems(tree)
    path = tree / "tests/gpu_receipt.json"
    assert receipt.skipped_tests(path)["tests/test_a.py::test_y"] == "needs two GPUs"
    path.unlink()
    assert receipt.skipped_tests(path) == {}


def test_contents_cannot_move_between_files_unseen(tree):
    """Length is hashed with path and contents, so a boundary cannot shift."""
    first, second = tree / "kernels/forward.cu", tree / "kernels/forward.h"
    second.write_text("// of the forward")
    before = receipt.sources_hash(tree)
    text = second.read_text()
    second.write_text(text[1:])
    first.write_text(first.read_text() + text[0])
    assert receipt.sources_hash(tree) != before


@pytest.mark.parametrize("name", [name for name in OTHERS if name != "pyproject.toml"])
def test_other_files_leave_the_receipt_good(tree, name):
    (tree / name).write_text("ANYTHING = 1\n")
    assert problems(tree) == ""


def test_the_real_tree_is_hashed():
    names = {path.relative_to(receipt.ROOT).as_posix() for path in receipt.source_files(receipt.ROOT)}
    assert {"CMakeLists.txt", "setup.py", "build_backend.py", "kernels/bindings.cpp"} <= names
    assert {"tests/receipt.py", "tests/conftest.py", "tests/compare.py", "tests/tiny_diffusers.py"} <= names
    assert {"python/fpsattention/core/api.py", "python/fpsattention/integrations/hosts.py"} <= names
    assert any(name.startswith("include/") for name in names)
    assert not names & {"tests/test_demo.py", "tests/test_receipt.py", "python/fpsattention/cli/demo.py"}
    assert not any(name.endswith((".so", ".json", ".pyc", ".pyi", ".md")) for name in names)
    gpu_files = receipt.gpu_test_files(receipt.ROOT)
    assert {"test_attention_gpu.py", "test_mutations.py"} <= gpu_files and "test_receipt.py" not in gpu_files


def test_what_is_left_out_exists_and_nothing_vouched_for_imports_it():
    """A file that the library imports decides what the kernels compute; it must count."""
    python = receipt.ROOT / "python"
    assert [name for name in receipt.NOT_VOUCHED_FOR if not (python / name).exists()] == []
    left_out = {name.removesuffix(".py").strip("/").replace("/", ".") for name in receipt.NOT_VOUCHED_FOR}
    assert "fpsattention.cli" in left_out
    for path in receipt.source_files(receipt.ROOT):
        if path.is_relative_to(python):
            package = ".".join(path.relative_to(python).parent.parts)
            assert not receipt.imported_modules(path, package) & left_out, path
