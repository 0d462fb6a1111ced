"""Links of the pages lead somewhere, the walk through the code is a call's, and the README's figures are recorded."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

import common
import fpsattention as fps
from fpsattention.core import config, geometry, ops, support

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").glob("*.md")),
]


def without_code(page: Path) -> str:
    return re.sub(r"^ *```.*?^ *```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """Of the headings of a page, as mkdocs makes them."""
    pages = [page, ROOT / "kernels/README.md"] if page.name == "kernels.md" else [page]
    headings = (x for p in pages for x in re.findall(r"^#+ (.+)$", without_code(p), re.MULTILINE))
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", x).strip().lower()) for x in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links(page):
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", without_code(page)):
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def walk() -> list[str]:
    """The files of "From fps.attention to wgmma"."""
    text = (ROOT / "CONTRIBUTING.md").read_text().partition("## From fps.attention to wgmma")[2]
    return re.findall(r"^\d+\. `(.+?)`", text, re.MULTILINE)


def test_files_of_the_walk_are_there():
    """Twelve files, each named once."""
    files = walk()
    assert len(files) == 12 and len(set(files)) == 12
    assert not [x for x in files if not (ROOT / x).exists()]


@pytest.mark.parametrize("tile, beside", [((2, 3, 4), set()), (None, {"planning.py"})])
def test_the_walk_has_the_files_that_a_call_enters(monkeypatch, tile, beside):
    """A call on the Hopper backend, without its kernels, enters the walk's files of core, and no others."""
    monkeypatch.setattr(support, "_sm90_obstacle", lambda q: None)
    monkeypatch.setattr(ops, "_launch", lambda *args: None)
    for cached in (ops.call_of, config._resolve, geometry.tile_geometry):  # what a cache has is not entered
        cached.cache_clear()
    q, k, v = torch.zeros(3, 1, 5 * 7 * 11, 2, 64, dtype=torch.bfloat16)
    entered = set()

    def note(frame, event, arg):
        if event == "call":
            entered.add(frame.f_code.co_filename)

    profiler = sys.getprofile()
    sys.setprofile(note)
    try:
        fps.attention(q, k, v, grid=(5, 7, 11), config=fps.AttentionConfig(tile=tile))
    finally:
        sys.setprofile(profiler)
    files = {path.name for path in map(Path, entered) if path.parent == Path(ops.__file__).parent}
    assert files == {Path(x).name for x in walk() if x.startswith("python/fpsattention/core/")} | beside


def rows_of_the_readme() -> list[list[str]]:
    text = (ROOT / "README.md").read_text()
    _, _, numbers = text.partition("<!-- numbers: bench/results/h200.json -->")
    table, _, _ = numbers.partition("<!-- end numbers -->")
    return [[x.strip() for x in line.strip("|").split("|")] for line in table.strip().splitlines()[2:]]


def agrees(written: str, value: float) -> bool:
    """Whether a figure is the value, rounded to the digits that are written."""
    digits = len(written.partition(".")[2])
    return abs(float(written) - value) <= 0.501 * 10.0**-digits


def numbers(text: str, separator: str) -> list[int]:
    return [int(x) for x in text.split(separator)]


@pytest.mark.parametrize("row", rows_of_the_readme(), ids=lambda row: f"{row[0].split()[0]} {row[3]}")
def test_figures_of_the_readme(row):
    grid, heads, tile, window, density, cudnn_ms, flex_ms, ms, quant_ms, speedup = row
    shape = dict(zip(("heads", "head_dim"), numbers(heads, " x "), strict=True))
    shape |= {"grid": tuple(numbers(grid.split()[0], "x")), "layout": "NHD"}
    windowed = shape | {"window": None if window == "dense" else tuple(numbers(window, ","))}
    records = common.Results.load(ROOT / "bench" / "results" / "h200.json").records
    records = [r for r in records if re.fullmatch(r"[^/]+/\S+", r.case)]  # forwards of the video alone

    def found(op: str, **fields) -> list[common.Record]:
        return [
            r for r in records if r.op == op and all(_plain(getattr(r, k)) == v for k, v in fields.items())
        ]

    (ours,) = found(common.OURS, **windowed, tile=tuple(numbers(tile, "x")))
    assert agrees(density, ours.density) and agrees(ms, ours.ms) and agrees(speedup, ours.speedup)
    assert (
        agrees(quant_ms, ours.quant_ms)
        and agrees(cudnn_ms, ours.baseline_ms)
        and ours.baseline == common.CUDNN
    )
    if flex_ms != "-":
        (flex,) = found(common.FLEX, **windowed)
        assert agrees(flex_ms, flex.ms)


def _plain(value):
    return tuple(value) if isinstance(value, list) else value
