"""`fpsattention compare`: how far one video is from another, in numbers and in a picture."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torchmetrics.functional.image import structural_similarity_index_measure

from .console import people, print_json, progress, table_of
from .errors import UserError, asked
from .video import frames_of

LEAST_PIXELS = 11  # the side of the Gaussian window of SSIM
GAIN = 4  # of the difference in the picture


def run(*, reference: Path, video: Path, output: Path, as_json) -> None:
    """The `compare` command. Raises UserError for what cannot be read, and for videos of unequal size or length."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    errors, similarities = [], []  # mean squared error and SSIM of each frame, of values from 0 to 1
    with progress() as bar:
        task = bar.add_task("comparing", total=None)
        for i, (a, b) in enumerate(_pairs(reference, video)):
            bar.update(task, description=f"frame {i}")
            a, b = (x.to(device).permute(2, 0, 1)[None].float() / 255 for x in (a, b))
            errors.append((a - b).square().mean(dtype=torch.float64).item())
            similarities.append(structural_similarity_index_measure(b, a, data_range=1.0).item())
        bar.update(task, description="drawing", total=1)
        n, worst = len(errors), errors.index(max(errors))
        _draw(output, reference, video, sorted({0, n // 2, n - 1, worst}), errors, similarities)
        bar.advance(task)

    frames = [
        {"frame": i, "psnr": _psnr(error), "ssim": ssim}
        for i, (error, ssim) in enumerate(zip(errors, similarities, strict=True))
    ]
    result = {
        "reference": str(reference),
        "video": str(video),
        "frames": n,
        "identical": max(errors) == 0,
        "psnr": _psnr(sum(errors) / n),
        "ssim": sum(similarities) / n,
        "worst_frame": frames[worst],
        "per_frame": frames,
        "picture": str(output),
    }
    console = people(as_json)
    table = table_of("", "PSNR", "SSIM", words=("",))
    table.add_row(f"all {n} frames", _decibels(result["psnr"]), f"{result['ssim']:.4f}")
    table.add_row(f"worst, frame {worst}", _decibels(frames[worst]["psnr"]), f"{frames[worst]['ssim']:.4f}")
    console.print(table)
    console.print(
        "PSNR is of the mean squared error over all frames, SSIM (Gaussian window of 11 pixels) the mean over the "
        f"frames; both of RGB.\nPicture: {output}"
    )
    if as_json:
        print_json(result)


def _pairs(reference: Path, video: Path) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Frames of both videos, uint8 [H, W, 3]. Raises UserError where they do not fit together."""
    n = 0
    for a, b in zip_longest(frames_of(reference), frames_of(video)):
        if a is None or b is None:
            shorter, longer = (reference, video) if a is None else (video, reference)
            raise UserError(f"{shorter}: has {n} frames, {longer} has more; give videos of equal length")
        if a.shape != b.shape:
            sizes = [f"{x.shape[1]} x {x.shape[0]}" for x in (a, b)]
            raise UserError(
                f"{video}: frames of {sizes[1]}, those of {reference} are {sizes[0]}; they must be alike"
            )
        if min(a.shape[:2]) < LEAST_PIXELS:
            raise UserError(
                f"{reference}: frames of {a.shape[1]} x {a.shape[0]}, SSIM needs {LEAST_PIXELS} each way"
            )
        n += 1
        yield a, b
    if n == 0:
        raise UserError(f"{reference}: holds no frames")


def _psnr(error: float) -> float | None:
    """Decibels; None for no error, as infinity is no JSON."""
    return -10 * math.log10(error) if error else None


def _decibels(psnr: float | None) -> str:
    return "identical" if psnr is None else f"{psnr:.2f} dB"


def _draw(path: Path, reference: Path, video: Path, chosen: list[int], errors, similarities) -> None:
    """Write the picture: a row for each chosen frame; both videos and `GAIN` times their difference."""
    kept = [pair for i, pair in enumerate(_pairs(reference, video)) if i in chosen]
    height, width = kept[0][0].shape[:2]
    figure = Figure(figsize=(12, len(kept) * (4 * height / width + 0.4)), layout="constrained")
    rows = figure.subplots(len(kept), 3, squeeze=False)
    for row, i, (a, b) in zip(rows, chosen, kept, strict=True):
        difference = ((b.int() - a.int()).abs() * GAIN).clamp(max=255).to(torch.uint8)
        titles = (
            f"{reference.name}, frame {i}",
            f"{video.name}: {_decibels(_psnr(errors[i]))}, SSIM {similarities[i]:.4f}",
            f"difference, times {GAIN}",
        )
        for axes, title, image in zip(row, titles, (a, b, difference), strict=True):
            axes.imshow(image.numpy())
            axes.set_title(title, fontsize=9)
            axes.set_axis_off()
    with asked():
        figure.savefig(path, dpi=120)
