"""Calls FPSAttention a few times on one case, under a profiler: `make profile`, docs/profiling.md.

python bench/profile_forward.py [--case SHAPE/WINDOW] [--calls N]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import torch

from bench_forward import random_qkv
from contenders import ours
from fpsattention.core.support import hopper_obstacle
from shapes import WAN_DENSE, Shape, Window, select


def one_case(name: str) -> tuple[Shape, Window]:
    """The shape and window of a case's name. Raises ValueError for a name that is not of exactly one case."""
    shape, *others = select([name])
    if others or name != shape.case(shape.windows[0]):
        raise ValueError(
            f"--case {name!r}: is more than one case; write SHAPE/WINDOW, for example {WAN_DENSE}"
        )
    return shape, shape.windows[0]


def run(case: str, call: Callable[[], object], calls: int) -> None:
    """Make the call `calls` times, each in an NVTX range of its own."""
    for i in range(calls):
        with torch.cuda.nvtx.range(f"{case}, call {i}"):
            call()
    torch.cuda.synchronize()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--case", default=WAN_DENSE, metavar="SHAPE/WINDOW", help="a case of shapes.py (default: %(default)s)"
    )
    parser.add_argument("--calls", type=int, default=3, help="number of calls (default: %(default)s)")
    options = parser.parse_args(argv)
    try:
        shape, window = one_case(options.case)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if obstacle := hopper_obstacle():
        print(f"profile_forward.py {obstacle}", file=sys.stderr)
        return 2
    with torch.no_grad():
        run(options.case, ours(shape, window).prepare(*random_qkv(shape, "cuda")), options.calls)
    return 0


if __name__ == "__main__":
    sys.exit(main())
