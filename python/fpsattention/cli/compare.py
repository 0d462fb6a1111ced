"""`fpsattention compare`: how far one video is from another, in numbers and in a picture."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path

import torch
from torch import Tensor

from . import options
from .console import people, print_json, progress, table_of
from .errors import UserError, asked, require
from .video import frames_of

LEAST_PIXELS = 11  # the side of SSIM's Gaussian window
GAIN = 4  # factor on the difference in the picture


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Compare two videos of equal size and length, frame by frame, and draw frames of both beside their "
        "difference."
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
        type=options.new_picture,
        default="comparison.png",
        metavar="PNG",
        help="the picture (default: %(default)s)",
    )
    options.add_json(parser)


def run(*, reference: Path, video: Path, output: Path, as_json: bool) -> None:
    """The `compare` command. Raises UserError for a video that cannot be read, and for unequal sizes or lengths."""
    require("matplotlib", "rich", "torchmetrics")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    measured = []  # (error, SSIM) of each frame
    with progress() as bar:
        task = bar.add_task("comparing", total=None)
        for i, (a, b) in enumerate(_pairs(reference, video)):
            bar.update(task, description=f"frame {i}")
            a, b = (x.to(device)[None].float() / 255 for x in (a, b))
            measured.append(similarity(b, a, data_range=1.0))
        bar.update(task, description="drawing", total=1)
        errors, similarities = map(torch.cat, zip(*measured, strict=True))
        n, worst = len(errors), int(errors.argmax())
        frames = [
            {"frame": i, "psnr": _finite(psnr(error)), "ssim": ssim.item()}
            for i, (error, ssim) in enumerate(zip(errors, similarities, strict=True))
        ]
        _draw(output, reference, video, [frames[i] for i in sorted({0, n // 2, n - 1, worst})])
        bar.advance(task)

    total_psnr = _finite(psnr(errors.mean()))
    total_ssim = similarities.mean(dtype=torch.float64).item()
    result = {
        "reference": str(reference),
        "video": str(video),
        "frames": n,
        "identical": not errors.any().item(),
        "psnr": total_psnr,
        "ssim": total_ssim,
        "worst_frame": frames[worst],
        "per_frame": frames,
        "picture": str(output),
    }
    console = people(as_json)
    table = table_of("", "PSNR", "SSIM", words=("",))
    table.add_row(f"all {n} frames", _decibels(total_psnr), f"{total_ssim:.4f}")
    table.add_row(f"worst, frame {worst}", _decibels(frames[worst]["psnr"]), f"{frames[worst]['ssim']:.4f}")
    console.print(table)
    console.print(
        "PSNR: of the mean squared error over all frames. SSIM: mean over the frames, Gaussian window of 11 pixels. "
        f"Both of RGB.\nPicture: {output}"
    )
    if as_json:
        print_json(result)


def similarity(frames: Tensor, reference: Tensor, data_range: float) -> tuple[Tensor, Tensor]:
    """How near RGB frames [N, H, W, 3], fp32, are to those of a reference.

    Returns, of each frame, the mean squared error over data_range squared, fp64 [N], which `psnr` takes, and SSIM,
    fp32 [N].
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    error = (frames - reference).square().mean(dim=(1, 2, 3), dtype=torch.float64) / data_range**2
    channels_first = (x.permute(0, 3, 1, 2) for x in (frames, reference))
    ssim = structural_similarity_index_measure(*channels_first, data_range=data_range, reduction="none")
    return error, ssim


def psnr(error: Tensor) -> Tensor:
    """Decibels of mean squared errors from `similarity`; infinite where there is no error."""
    return -10 * error.log10()


def _finite(value: Tensor) -> float | None:
    """A number, or None for infinity, which JSON does not have."""
    return value.item() if value.isfinite() else None


def _pairs(reference: Path, video: Path) -> Iterator[tuple[Tensor, Tensor]]:
    """Frames of both videos, uint8 [H, W, 3]. Raises UserError for videos that cannot be compared."""
    n = 0
    for a, b in zip_longest(frames_of(reference), frames_of(video)):
        if a is None or b is None:
            shorter, longer = (reference, video) if a is None else (video, reference)
            raise UserError(f"{shorter}: has {n} frames, {longer} has more; give videos of equal length")
        if a.shape != b.shape:
            sizes = [f"{x.shape[1]} x {x.shape[0]}" for x in (a, b)]
            raise UserError(
                f"{video}: frames of {sizes[1]}, those of {reference} are {sizes[0]}; sizes must be equal"
            )
        if min(a.shape[:2]) < LEAST_PIXELS:
            raise UserError(
                f"{reference}: frames of {a.shape[1]} x {a.shape[0]}, SSIM needs {LEAST_PIXELS} each way"
            )
        n += 1
        yield a, b
    if n == 0:
        raise UserError(f"{reference}: holds no frames")


def _decibels(value: float | None) -> str:
    return "identical" if value is None else f"{value:.2f} dB"


def _draw(path: Path, reference: Path, video: Path, frames: list[dict]) -> None:
    """Write the picture: for each of `frames` a row with both videos and `GAIN` times their difference."""
    from matplotlib.figure import Figure

    chosen = {frame["frame"] for frame in frames}
    kept = [pair for i, pair in enumerate(_pairs(reference, video)) if i in chosen]
    height, width = kept[0][0].shape[:2]
    figure = Figure(figsize=(12, len(kept) * (4 * height / width + 0.4)), layout="constrained")
    rows = figure.subplots(len(kept), 3, squeeze=False)
    for row, frame, (a, b) in zip(rows, frames, kept, strict=True):
        difference = ((b.int() - a.int()).abs() * GAIN).clamp(max=255).to(torch.uint8)
        titles = (
            f"{reference.name}, frame {frame['frame']}",
            f"{video.name}: {_decibels(frame['psnr'])}, SSIM {frame['ssim']:.4f}",
            f"difference, times {GAIN}",
        )
        for axes, title, image in zip(row, titles, (a, b, difference), strict=True):
            axes.imshow(image.numpy())
            axes.set_title(title, fontsize=9)
            axes.set_axis_off()
    with asked():
        figure.savefig(path, dpi=120)
