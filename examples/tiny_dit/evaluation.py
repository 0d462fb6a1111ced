"""The comparison of arXiv 2506.04648, Table 5: attention changed without training, and with training.

Crops of held-out frames are measured, with seeds that training cannot draw (`SEEDS_BEGIN`). For one seed all arms see
the same crops, noise levels and noise, so that arms are compared seed by seed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

import torch
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch import Tensor

from fpsattention.cli.compare import psnr
from fpsattention.cli.compare import similarity as frame_similarity

from . import flow
from .clips import Clips
from .training import Weights

SEEDS_BEGIN = 1 << 31  # beyond every seed of training, and within 32 bits as those are
STAGE_POINT = {"early": 0.9, "mid": 0.5, "late": 0.1}  # u (see flow.py) of the one-step reconstructions


@dataclass(frozen=True)
class Arm:
    """Weights under an attention mode (of `flow.MODES`)."""

    name: str
    weights: Weights
    mode: str


def untrained(mode: str) -> str:
    return f"{mode}, untrained"


def trained(mode: str) -> str:
    return f"{mode}, fine-tuned"


def arms_of(base: Weights, tuned: Weights, dense_tuned: Weights | None) -> list[Arm]:
    """The base, the base under the attention of `tuned` and the parts of that attention, and the fine-tunings."""
    mode = tuned.settings.mode
    parts = ("fp8", "window", "fps") if mode == "fps" else (mode,)
    arms = [
        Arm("dense", base, "dense"),
        *(Arm(untrained(part), base, part) for part in parts),
        Arm(trained(mode), tuned, mode),
    ]
    return arms if dense_tuned is None else [*arms, Arm(trained("dense"), dense_tuned, "dense")]


@dataclass(frozen=True)
class Effort:
    """How much to measure.

    Attributes:
        seeds: at least 2, for the deviation.
        crops: held-out crops of each seed.
        points: noise levels of the loss, evenly spread over the steps of a sampler.
        steps: steps of the sampler.
        start: the step at which the sampler starts, from the crop with that step's noise.
        batch: crops at a time.
    """

    seeds: int
    crops: int
    points: int
    steps: int
    start: int
    batch: int


def evaluate(
    arms: list[Arm],
    plan: flow.Plan,
    clips: Clips,
    effort: Effort,
    backend: str,
    device: torch.device,
    tick: Callable,
) -> tuple[dict, dict]:
    """Measure all arms. Calls `tick` after every arm and seed.

    Returns ({arm: {metric: one value per seed}}, {arm or "held-out": frames of the first crop [frames, H, W, 3]}).
    """
    results, pictures = {arm.name: {} for arm in arms}, {}
    for seed in range(effort.seeds):
        generator = torch.Generator().manual_seed(SEEDS_BEGIN + seed)
        pixels = clips.draw("val", effort.crops, generator)
        codec = arms[0].weights.codec  # the same in all arms
        clean = codec.encode(pixels)
        noise = torch.randn(clean.shape, generator=generator).to(
            device
        )  # drawn on the CPU: equal on every device
        for arm in arms:
            attention = flow.Attention(plan, arm.mode, backend)
            measured, video = _measure(arm, clean, noise, attention, effort)
            for name, value in measured.items():
                results[arm.name].setdefault(name, []).append(value)
            if seed == 0:
                pictures[arm.name] = video
                pictures["held-out"] = codec.decode(clean[:1])[0].cpu()
            tick()
    return results, pictures


@torch.no_grad()
def _measure(
    arm: Arm, clean: Tensor, noise: Tensor, attention: flow.Attention, effort: Effort
) -> tuple[dict, Tensor]:
    model, codec, shift = arm.weights.model, arm.weights.codec, attention.plan.shift
    chunks = [slice(i, i + effort.batch) for i in range(0, len(clean), effort.batch)]

    def at(u: float) -> Tensor:
        return flow.shifted(torch.tensor(u, dtype=torch.float64), shift).float()

    def over_crops(fn: Callable) -> Tensor:
        return torch.cat([fn(clean[c], noise[c]) for c in chunks])

    def levels(sigma: Tensor) -> Callable:
        return lambda x: sigma.expand(len(x))

    by_stage = {stage: [] for stage in flow.STAGES}
    for i in range(effort.points):
        of = levels(at(1 - (i + 0.5) / effort.points))
        loss = over_crops(lambda x, e, of=of: flow.losses(model, x, e, of(x), attention))
        by_stage[attention.stage(of(clean)[0].item())].append(loss.mean().item())
    measured = {f"loss {stage}": mean(x) if x else math.nan for stage, x in by_stage.items()}
    measured["loss"] = mean(x for values in by_stage.values() for x in values)

    target = codec.decode(clean)
    for stage, u in STAGE_POINT.items():
        of = levels(at(u))
        guess = over_crops(lambda x, e, of=of: flow.one_step(model, flow.mix(x, e, of(x)), of(x), attention))
        measured |= similarity(codec.decode(guess), target, f"one step {stage}")

    sampled = codec.decode(
        over_crops(lambda x, e: flow.resample(model, x, e, effort.start, effort.steps, attention))
    )
    return measured | similarity(sampled, target, "sampler"), sampled[0].cpu()


def similarity(videos: Tensor, targets: Tensor, name: str) -> dict[str, float]:
    """PSNR (dB) and SSIM of videos [B, frames, H, W, 3] from -1 to 1: means over the videos, by metric's name."""
    error, ssim = frame_similarity(videos.flatten(0, 1), targets.flatten(0, 1), data_range=2.0)
    of_videos = psnr(error.unflatten(0, videos.shape[:2]).mean(1))
    return {f"PSNR {name}": of_videos.mean().item(), f"SSIM {name}": ssim.mean().item()}


def change(results: dict, arm: str, reference: str, metric: str = "loss") -> tuple[float, float]:
    """Percent by which the metric of `arm` exceeds that of `reference`: mean and deviation over the seeds."""
    pairs = zip(results[arm][metric], results[reference][metric], strict=True)
    changes = [100 * (a / b - 1) for a, b in pairs]
    return mean(changes), stdev(changes)


def verdict(results: dict, mode: str, steps: int) -> str:
    """What the numbers of the arms of `arms_of` say about the paper's claim, for or against."""
    lost, lost_spread = change(results, untrained(mode), "dense")
    beside, whose = "dense", "the dense model"
    if trained("dense") in results:
        beside, whose = trained("dense"), "the dense model fine-tuned for as many steps"
    left, left_spread = change(results, trained(mode), beside)
    text = (
        f"Without training, the dense model's validation loss under {mode} attention is "
        f"{_beside(lost, lost_spread)} its own; after {steps} steps of fine-tuning with it, it is "
        f"{_beside(left, left_spread)} that of {whose}."
    )
    if not lost > 2 * lost_spread:
        return f"{text} Nothing measurable was lost without training, so there is nothing for training to return."
    returned = 100 * (1 - left / lost)
    return (
        f"{text} So training returns {returned:.0f} % of what was lost. In the paper (Table 5) VBench falls from "
        f"0.8019 to 0.6325 without training and is 0.8160 with it: "
        f"{'the same' if returned >= 50 else 'not the same'} direction."
    )


def _beside(percent: float, spread: float) -> str:
    return f"{abs(percent):.2f} % (± {spread:.2f}) {'above' if percent >= 0 else 'below'}"


def tables(results: dict, arms: list[Arm], start: str) -> list[Table]:
    """Loss, its change, PSNR and SSIM: mean and deviation over the seeds. `start` says where the sampler started."""
    metrics = list(results[arms[0].name])
    losses = ["loss", *(f"loss {stage}" for stage in flow.STAGES)]

    def table(title: str, columns: list[str], cell: Callable, rows: list[Arm]) -> Table:
        made = Table(
            title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True
        )
        made.add_column("arm", no_wrap=True)
        for metric in columns:
            made.add_column("all" if metric == "loss" else metric.split()[-1], justify="right")
        for arm in rows:
            made.add_row(arm.name, *(cell(arm.name, metric) for metric in columns))
        return made

    def level(digits: int) -> Callable:
        def cell(arm: str, metric: str) -> str:
            values = results[arm][metric]
            return f"{mean(values):.{digits}f} ± {stdev(values):.{digits}f}"

        return cell

    def moved(arm: str, metric: str) -> str:
        return "{:+.2f} ± {:.2f}".format(*change(results, arm, "dense", metric))

    psnr, ssim = ([metric for metric in metrics if metric.startswith(kind)] for kind in ("PSNR", "SSIM"))
    where = f"one step in each stage, and the sampler {start}"
    return [
        table("validation loss", losses, level(3), arms),
        # Seeds differ far more than arms: only the change seed by seed tells arms apart.
        table("validation loss beside that of dense, %", losses, moved, arms[1:]),
        table(f"PSNR in dB: {where}", psnr, level(2), arms),
        table(f"SSIM: {where}", ssim, level(3), arms),
    ]


def draw(pictures: dict, path: Path, title: str) -> None:
    """Four frames of every video, one row for each."""
    shown = 4
    figure = Figure(figsize=(2 * shown + 2, 2 * len(pictures) + 0.5), layout="constrained")
    axes = figure.subplots(len(pictures), shown, squeeze=False)
    order = sorted(pictures, key=lambda name: name != "held-out")
    for row, name in zip(axes, order, strict=True):
        video = pictures[name]
        for axis, i in zip(row, torch.linspace(0, len(video) - 1, shown).long().tolist(), strict=True):
            axis.imshow((video[i].numpy() + 1) / 2)
            axis.set(xticks=[], yticks=[])
        row[0].set_ylabel(name.replace(", ", "\n"), fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=120)
