"""The receipt vouches for these sources; and the check of receipts catches the ones that do not."""

from __future__ import annotations

import json

import pytest

import receipt

MACHINE = {"gpu": "H100", "driver": "580.1", "cuda": "13.0", "torch": "2.11", "python": "3.12"}
GREEN = {"passed": 7, "failed": 0, "skipped": 0, "deselected": 0, "gpu_passed": 3, "gpu_deselected": 0}


@pytest.mark.receipt
def test_receipt_vouches_for_these_sources():
    found = receipt.problems(receipt.PATH, receipt.ROOT)
    assert not found, "\n".join(found)


@pytest.fixture
def tree(tmp_path):
    """A project with one file of each kind, and a green receipt for it."""
    for name in (
        "kernels/forward.cu",
        "include/fps/geometry.h",
        "python/fps/api.py",
        "tests/conftest.py",
        "tests/test_a.py",
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("pytestmark = pytest.mark.gpu\n" if path.name == "test_a.py" else f"// {name}\n")
    write(tmp_path)
    return tmp_path


def write(root, failures=(), gpu_files=("test_a.py",), **counts):
    receipt.write(
        root / "tests/gpu_receipt.json",
        sources=receipt.sources_hash(root),
        machine=MACHINE,
        counts={**GREEN, **counts},
        gpu_files=set(gpu_files),
        failures=list(failures),
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
    "name", ["kernels/forward.cu", "include/fps/geometry.h", "python/fps/api.py", "tests/conftest.py"]
)
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


@pytest.mark.parametrize("name", ["kernels/new.cuh", "python/fps/deep/new.py", "tests/test_new.py"])
def test_added_source_makes_the_receipt_stale(tree, name):
    (tree / name).parent.mkdir(exist_ok=True)
    (tree / name).write_text("")
    assert "stale" in problems(tree)


def test_contents_cannot_move_between_files_unseen(tree):
    """Length is hashed with path and contents, so a boundary cannot shift."""
    before = receipt.sources_hash(tree)
    first, second = tree / "tests/conftest.py", tree / "tests/test_a.py"
    text = second.read_text()
    second.write_text(text[1:])
    first.write_text(first.read_text() + text[0])
    assert receipt.sources_hash(tree) != before


@pytest.mark.parametrize(
    "name", ["python/fps/_C.so", "python/fps/__pycache__/api.pyc", "kernels/README.md", "bench/run.py"]
)
def test_other_files_leave_the_receipt_good(tree, name):
    (tree / name).parent.mkdir(exist_ok=True)
    (tree / name).write_text("anything")
    assert problems(tree) == ""


def test_the_real_tree_is_hashed():
    names = {path.relative_to(receipt.ROOT).as_posix() for path in receipt.source_files(receipt.ROOT)}
    assert {"tests/receipt.py", "tests/conftest.py", "kernels/bindings.cpp"} <= names
    assert any(name.startswith("include/") for name in names)
    assert not any(name.endswith((".so", ".json", ".pyc")) for name in names)
    gpu_files = receipt.gpu_test_files(receipt.ROOT)
    assert {"test_attention_gpu.py", "test_mutations.py"} <= gpu_files and "test_receipt.py" not in gpu_files
