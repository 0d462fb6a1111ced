"""The `fpsattention` command: the table of its subcommands, and how their errors end it.

A subcommand is a module with two functions: `add_options(parser)` declares its options, and `run` takes them as
keywords and does the work. A module imports the packages of the `cli` extra in its work alone, so that --help and a
wrong option need none of them.

Exit status: 0 done; 1 the machine could not do it (no Hopper GPU, out of memory, a failed self-test; stdout is closed,
a broken pipe or on a full disk); 2 the request was wrong; 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import IO, TYPE_CHECKING

import torch

from . import bench, calibrate, compare, demo, doctor, plan, profile, schedule
from .errors import MachineError, UserError
from .options import grouped

if TYPE_CHECKING:
    from _typeshed import SupportsWrite

COMMANDS = {  # name: (module, one line of help)
    "doctor": (doctor, "what is installed, what runs here, a self-test"),
    "plan": (plan, "tiles for a grid or model: padding, legal windows, density, expected time"),
    "schedule": (schedule, "what every denoising step attends, and a picture of the windows"),
    "bench": (bench, "time your shape on this GPU against torch's attention"),
    "profile": (profile, "run your shape under Nsight Compute or Nsight Systems"),
    "calibrate": (calibrate, "search a window for every step, layer and head on your own Q, K and V"),
    "compare": (compare, "two videos: PSNR, SSIM, a picture side by side"),
    "demo": (demo, "attend over a real video four ways; a table, a picture"),
}


class _Parser(argparse.ArgumentParser):
    def print_help(self, file: SupportsWrite[str] | None = None) -> None:
        """Raises OSError where stdout cannot be written; argparse's own method ignores that."""
        print(self.format_help(), end="", file=file)
        if file is None:
            sys.stdout.flush()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: sys.argv[1:]) and return the exit status.

    argparse raises SystemExit, with status 2 for a wrong option and 0 for --help.
    """
    if sys.stderr is None:  # closed; print() would take None for stdout
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (open as long as the program runs)
    if sys.stdout is None:
        return _fail("", "stdout is closed; redirect it to a file, or to /dev/null", 1)
    command, options = "", {}
    try:
        options = vars(_parser().parse_args(argv))
        command = options.pop("command")
        module, _ = COMMANDS[command]
        status = module.run(**grouped(options)) or 0
        sys.stdout.flush()  # here, where a failure is reported under the command's name
        return status
    except UserError as error:
        return _fail(command, str(error), 2)
    except MachineError as error:
        return _fail(command, str(error), 1)
    except KeyboardInterrupt:
        return _fail(command, "interrupted", 130)
    except OSError as error:
        return _fail(command, f"stdout: {error}" if _abandon(sys.stdout) else str(error), 1)
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        hint = "fewer --frames or a smaller --size" if command == "demo" else "or a smaller grid"
        advice = f"\nTry fewer --heads, {hint}." if "heads" in options else ""
        return _fail(command, (str(error) or "out of memory") + advice, 1)
    finally:
        for stream in (sys.stdout, sys.stderr):
            _abandon(stream)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="fpsattention", description="FP8 sliding-tile attention for video.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, text) in COMMANDS.items():
        module.add_options(commands.add_parser(name, help=text))
    return parser


def _abandon(stream: IO[str]) -> bool:
    """Flush a stream, and drop what it cannot write. Returns whether it dropped anything.

    Without this, Python would try again at exit, fail, and end with status 120.
    """
    try:
        stream.flush()
        return False
    except OSError:
        with open(os.devnull, "w") as null:
            os.dup2(null.fileno(), stream.fileno())
        return True


def _is_out_of_memory(error: MemoryError | RuntimeError) -> bool:
    """Whether Python, or torch on a GPU or a CPU, ran out of memory."""
    return isinstance(
        error, (MemoryError, torch.OutOfMemoryError)
    ) or "DefaultCPUAllocator: can't allocate memory" in str(error)


def _fail(command: str, message: str, status: int) -> int:
    with suppress(OSError):  # stderr cannot be written either: the status has to suffice
        print(f"{' '.join(filter(None, ('fpsattention', command)))}: error: {message}", file=sys.stderr)
    return status
