"""What the commands print. With --json, stdout holds one JSON document and everything else goes to stderr.

rich is imported where something is printed: --help and a wrong option need no package of the `cli` extra.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Collection
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table


def people(as_json: bool) -> Console:
    """The console for tables and sentences."""
    return _console(stderr=as_json, soft_wrap=True)


def _console(stderr: bool, soft_wrap: bool) -> Console:
    from rich.console import Console

    class RaisingConsole(Console):
        def on_broken_pipe(self) -> None:
            raise  # the BrokenPipeError, which main.py reports; rich's own method ends the program silently

    return RaisingConsole(stderr=stderr, soft_wrap=soft_wrap, highlight=False)


def print_json(result: dict) -> None:
    """Print the one document on stdout. Raises ValueError for NaN and infinity, which JSON does not have."""
    json.dump(result, sys.stdout, indent=2, allow_nan=False)
    print()


def progress(remaining: bool = False) -> Progress:
    """A progress bar on stderr; with `remaining` it shows the time left."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = [TextColumn("{task.description:<24}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%")]
    columns.append(TimeElapsedColumn())
    if remaining:
        columns += [TextColumn("left"), TimeRemainingColumn()]
    return Progress(*columns, console=_console(stderr=True, soft_wrap=False))


def table_of(
    *columns: str, words: Collection[str] = (), title: str | None = None, collapse_padding: bool = False
) -> Table:
    """A table of numbers, right-aligned; the columns named in `words` hold text, left-aligned."""
    from rich import box
    from rich.table import Table

    table = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        title=title,
        title_justify="left",
        collapse_padding=collapse_padding,
    )
    for name in columns:
        table.add_column(name, justify="left" if name in words else "right")
    return table


def by(triple: tuple[int, int, int]) -> str:
    """A triple as people write it: 7 x 9 x 2."""
    return " x ".join(map(str, triple))


def milliseconds(ms: float) -> str:
    return f"{ms:,.2f} ms" if ms < 1000 else f"{ms / 1000:,.2f} s"
