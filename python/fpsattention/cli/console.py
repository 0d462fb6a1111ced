"""What the subcommands print with. With --json, stdout holds one JSON document and people read stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Collection

from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table


class _Console(Console):
    def on_broken_pipe(self) -> None:
        raise  # the BrokenPipeError, for `cli.main` to name as any other; rich's own ends the program without a word


def people(as_json: bool) -> Console:
    """Where tables and sentences go."""
    return _Console(stderr=as_json, highlight=False, soft_wrap=True)


def print_json(result: dict) -> None:
    """The one document on stdout. Raises ValueError for NaN and infinity, which JSON does not have."""
    json.dump(result, sys.stdout, indent=2, allow_nan=False)
    print()


def progress(remaining: bool = False) -> Progress:
    """A progress bar on stderr; with `remaining`, also the time that is left."""
    columns = [TextColumn("{task.description:<24}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%")]
    columns.append(TimeElapsedColumn())
    if remaining:
        columns += [TextColumn("left"), TimeRemainingColumn()]
    return Progress(*columns, console=_Console(stderr=True))


def table_of(*columns: str, words: Collection[str] = (), **options) -> Table:
    """A table of numbers; the columns named in `words` hold text."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, **options)
    for name in columns:
        table.add_column(name, justify="left" if name in words else "right")
    return table


def by(triple: tuple[int, int, int]) -> str:
    """A triple as people write it: 7 x 9 x 2."""
    return " x ".join(map(str, triple))


def milliseconds(ms: float) -> str:
    return f"{ms:,.2f} ms" if ms < 1000 else f"{ms / 1000:,.2f} s"
