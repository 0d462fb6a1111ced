"""What a subcommand raises, and how arguments become torch's objects."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """What the user asked for cannot be done; the message says why. Shown without a traceback."""


class MachineError(Exception):
    """This machine cannot do what was asked; the message says why. Shown without a traceback."""


@contextmanager
def asked() -> Iterator[None]:
    """Around what depends on the user's arguments only: what is wrong with those becomes a UserError."""
    try:
        yield
    except (TypeError, ValueError, OSError) as error:
        raise UserError(str(error)) from error


def chosen_device(name: str):
    """The torch.device of --device: "auto", "cpu" or "cuda". Raises MachineError for a GPU that is not there."""
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise MachineError("--device cuda: torch finds no CUDA device; try --device cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")
