"""Imports of what may not be installed, and of integrations against a stub of their host."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator

import pytest

from fpsattention import integrations


def import_anew(monkeypatch, host: str) -> None:
    """Let the next import of `fpsattention.integrations.<host>` run its module again. When the test ends, the module
    from before is back, and none that was bound to the test's stub is left.
    """
    for names, name in ((sys.modules, f"{integrations.__name__}.{host}"), (vars(integrations), host)):
        monkeypatch.setitem(names, name, None)  # remembers what is there, or that nothing is
        del names[name]


@contextlib.contextmanager
def or_skip() -> Iterator[None]:
    """Skips the test module if something imported inside is not installed or too old. Under CI that fails."""
    try:
        yield
    except ImportError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(error), allow_module_level=True)
