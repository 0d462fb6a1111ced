"""Programs that tests start, in the environment of a user whose shell holds nothing of note."""

from __future__ import annotations

import os
import subprocess
import sys


def environment(**more: str) -> dict[str, str]:
    """HOME, PATH and `more`; imports are found where this process finds them. Anything else that a developer's shell
    holds, PYTHONUNBUFFERED for instance, may hide a fault.
    """
    kept = {name: os.environ[name] for name in ("HOME", "PATH") if name in os.environ}
    return kept | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))} | more


def run_python(*argv: str, env: dict[str, str] | None = None, **options) -> subprocess.CompletedProcess:
    """The end of `python ARGV` under `env` (None: `environment()`): its status, and the text of stdout and stderr.

    `options` are those of subprocess.run.
    """
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "timeout": 120} | options
    return subprocess.run([sys.executable, *argv], env=environment() if env is None else env, **options)
