"""Errors of the commands, and the checks that raise them."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..core.support import hopper_obstacle


class UserError(Exception):
    """The request cannot be met; the message says why. Shown without a traceback."""


class MachineError(Exception):
    """This machine cannot do what was asked; the message says why. Shown without a traceback."""


@contextmanager
def asked() -> Iterator[None]:
    """Turn errors that follow from the user's arguments alone into a UserError."""
    try:
        yield
    except (TypeError, ValueError, OSError) as error:
        raise UserError(str(error)) from error


def require(*packages: str, extra: str = "cli") -> None:
    """Check, before a command starts its work, that the packages of an extra are there. Raises UserError."""
    for name in packages:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"{name} is not installed: pip install 'fpsattention[{extra}]'")


def require_hopper(advice: str = "") -> None:
    """Raises MachineError where the Hopper kernels cannot run; `advice` ends its message."""
    if obstacle := hopper_obstacle():
        raise MachineError(f"this command {obstacle}{advice}")


def chosen_device(name: str) -> torch.device:
    """The device of --device: "auto", "cpu" or "cuda". Raises MachineError for a GPU that is not there."""
    if name == "cuda" and not torch.cuda.is_available():
        raise MachineError("--device cuda: torch finds no CUDA device; try --device cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")
