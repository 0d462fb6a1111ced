"""`fpsattention profile`: the user's shape under Nsight Compute or Nsight Systems."""

from __future__ import annotations

import argparse
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from ..core.api import attention
from ..core.checks import Triple
from ..core.config import ResolvedConfig
from ..core.support import hopper_obstacle
from ..schedules.models import VideoModel
from . import options
from .bench import random_call, resolve
from .console import people, print_json
from .errors import MachineError, require, require_hopper

CALLS = 3  # the first two load the kernel and warm the GPU, the last is profiled
NCU_SECTIONS = (
    "SpeedOfLight",
    "ComputeWorkloadAnalysis",
    "WarpStateStats",
    "SourceCounters",
    "MemoryWorkloadAnalysis",
    "SchedulerStats",
)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Print the profiler's command line for your shape, and run it where there are a Hopper GPU and the tool. "
        "docs/profiling.md explains how to read the report."
    )
    options.add_shape(parser)
    options.add_window(parser)
    parser.add_argument(
        "--tool",
        choices=("ncu", "nsys", "none"),
        default="ncu",
        help="ncu: the cycles of one kernel; nsys: a timeline of all that runs; none: only make the calls, for a "
        "profiler that you start yourself (default: %(default)s)",
    )
    parser.add_argument(
        "--output",
        type=options.stem,
        default="fpsattention-profile",  # text: argparse passes it to the type as well
        metavar="FILE",
        help="the report, to which the tool adds its suffix (default: %(default)s)",
    )
    options.add_json(parser)


def run(
    *,
    asked_shape: options.ShapeOptions,
    window: Triple | None,
    border: options.Border,
    tool: str,
    output: Path,
    as_json: bool,
) -> None:
    """The `profile` command. Raises UserError for a shape that is not legal, MachineError when nothing could run."""
    require("rich")
    shape, resolved = resolve(*asked_shape, window, border)
    command = obstacle = None
    if tool == "none":
        require_hopper()
        _calls(shape, resolved)
    else:
        command = _command(tool, shape, resolved, output)
        people(as_json).print(shlex.join(command))
        if reason := hopper_obstacle():
            obstacle = f"this command {reason}"
        elif shutil.which(tool) is None:
            obstacle = f"{tool} is not on PATH: it comes with CUDA"
        # With --json, stdout is for the document alone: what the profiler prints goes to stderr.
        elif status := subprocess.run(command, stdout=sys.stderr if as_json else None).returncode:
            obstacle = f"{tool} ended with status {status}"
    if as_json:
        print_json({"command": command, "report": str(output), "ran": obstacle is None, "obstacle": obstacle})
    if obstacle:
        raise MachineError(obstacle)


def _calls(shape: VideoModel, resolved: ResolvedConfig) -> None:
    """Make `CALLS` calls, each in an NVTX range of its own."""
    qkv, keywords = random_call(shape, resolved)
    with torch.no_grad():
        for i in range(CALLS):
            with torch.cuda.nvtx.range(f"fpsattention call {i}"):
                attention(*qkv, **keywords)
    torch.cuda.synchronize()


def _command(tool: str, shape: VideoModel, resolved: ResolvedConfig, output: Path) -> list[str]:
    """The profiler's command line; the program in it is this command with --tool none."""
    options = {
        "--grid": resolved.grid,
        "--heads": [shape.heads],
        "--head-dim": [shape.head_dim],
        "--tile": resolved.tile,
        "--window": resolved.windows[0],
        "--border": [resolved.border],
    }
    calls = [sys.executable, "-m", "fpsattention.cli", "profile", "--tool", "none"]
    for name, values in options.items():
        calls += [name, *map(str, values)]
    if tool == "nsys":
        how = ["nsys", "profile", "--trace", "cuda,nvtx", "--force-overwrite", "true"]
        how += ["--output", str(output)]
    else:
        # No clock control: the GPU sets its clock, as in real use.
        how = ["ncu", "--clock-control", "none", "--kernel-name", "regex:attn_fwd"]
        how += ["--launch-skip", str(CALLS - 1), "--launch-count", "1"]
        how += [x for section in NCU_SECTIONS for x in ("--section", section)]
        how += ["--force-overwrite", "--export", str(output)]
    return how + calls
