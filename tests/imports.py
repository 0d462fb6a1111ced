"""Integrations imported against a stub of their host."""

from __future__ import annotations

import sys

from fpsattention import integrations


def import_anew(monkeypatch, host: str) -> None:
    """The next import of `fpsattention.integrations.<host>` runs it again. When the test ends, what was there before is
    there again, and nothing that was bound to the test's stub.
    """
    for names, name in ((sys.modules, f"{integrations.__name__}.{host}"), (vars(integrations), host)):
        monkeypatch.setitem(names, name, None)  # remembers what is there, or that nothing is
        del names[name]
