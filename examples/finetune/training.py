"""One fine-tuning in a folder: checkpoint, `log.csv`, `loss.png`, `validation.json`. The same call resumes it."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from diffusers.optimization import get_cosine_schedule_with_warmup
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

import fpsattention as fps
import training_log
from fpsattention.cli.errors import UserError
from fpsattention.integrations.diffusers.descriptions import description_of
from fpsattention.integrations.hosts import noisiest
from fpsattention.schedules.files import write_json
from fpsattention.schedules.schedule import STAGES

from .machine import Machine
from .samples import Sample, read, to_device
from .student import Student
from .videos import noised

CHECKPOINT, VALIDATION = "checkpoint.json", "validation.json"
COLUMNS = ("step", "loss", *STAGES, "flow", "grad_norm", "lr", "seconds")
CLIP_NORM = 1.0
VALIDATION_POINTS = 5  # noise levels at which a held-out video is measured


@dataclasses.dataclass(frozen=True)
class Settings:
    """All that determines the result of a run. A resumed run must have equal settings.

    Attributes:
        processes: of the run. Each has its share of the weights, and a checkpoint has a file of each.
        batch: samples of a step, of each process.
        lr: peak learning rate; it rises over `warmup` steps, then falls on a cosine to zero.
        flow: weight of the flow-matching loss beside the distillation's, which has 1.
        ema: decay of the averaged weights; lower in the first steps.
    """

    model: str
    transformer: str
    method: str
    schedule: dict[str, Any]
    shift: float
    dense_layers: tuple[int, ...]
    processes: int
    steps: int
    batch: int
    lr: float
    warmup: int
    ema: float
    flow: float
    held_out: int
    seed: int


class Run:
    """Student, optimizer and averaged weights after `step` steps.

    The optimizer and the average are float32 copies of this process's share of the trained weights, whatever dtype the
    transformer has. Step n draws samples, noise levels and noise from generators seeded with (seed, n, process), so a
    checkpoint need not hold their state, and a resumed run equals an uninterrupted one bit for bit where the device's
    kernels are deterministic.
    """

    def __init__(
        self, folder: Path, settings: Settings, student: Student, scheduler: Any, files: tuple[list, list]
    ):
        self.folder, self.settings, self.student, self.scheduler = folder, settings, student, scheduler
        self.machine: Machine = student.machine
        self.train_files, self.held_out_files = files
        self.shares = student.shares()
        self.masters = [x.float().clone() for x in self.shares]
        self.ema = [x.clone() for x in self.masters]
        self.optimizer = torch.optim.AdamW(self.masters, lr=settings.lr, betas=(0.9, 0.95), weight_decay=0.01)
        self.rates = get_cosine_schedule_with_warmup(self.optimizer, settings.warmup, settings.steps)
        self.step, self._pending = 0, []
        if (folder / CHECKPOINT).exists():
            self._load()
        elif self.machine.is_first:
            folder.mkdir(parents=True, exist_ok=True)
            for name in (training_log.LOG, VALIDATION):  # of a run that ended before its first checkpoint
                (folder / name).unlink(missing_ok=True)
        self.machine.wait()

    def train(self, save_every: int, console: Console) -> None:
        """Train to the last step. Raises UserError when the loss is not finite; the last checkpoint stays."""
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        with Progress(*columns, console=console, disable=not self.machine.is_first) as progress:
            task = progress.add_task("training", total=self.settings.steps, completed=self.step)
            while self.step < self.settings.steps:
                loss = self._one_step()
                progress.update(task, advance=1, description=f"loss {loss:.5f}")
                if self.step % save_every == 0 or self.step == self.settings.steps:
                    self.save()

    def _one_step(self) -> float:
        settings, begin = self.settings, time.monotonic()
        chooser = random.Random(f"{settings.seed} {self.step} {self.machine.rank}")
        torch.manual_seed(chooser.getrandbits(32))  # of an adapter's dropout, if it has one
        rows = []
        for _ in range(settings.batch):
            loss, row = self._loss(read(chooser.choice(self.train_files)), chooser.random(), chooser)
            (loss / settings.batch).backward()
            rows.append(row)
        norm = self._take_gradients()
        lr = self.rates.get_last_lr()[0]
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.rates.step()
        decay = min(settings.ema, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(self.ema, self.masters, 1 - decay)
        self._put(self.masters)
        self.step += 1
        rows = [row for of_process in self.machine.gather(rows) for row in of_process]
        total = mean(distilled + settings.flow * flow for _, distilled, flow in rows)
        if not (math.isfinite(total) and math.isfinite(norm)):
            raise UserError(
                f"loss or gradient is not finite at step {self.step}; {self.folder} stays at its last checkpoint. "
                f"Try a lower --lr than {settings.lr:g}"
            )
        by_stage = [_mean([x for stage, x, _ in rows if stage == wanted]) for wanted in STAGES]
        flow = _mean([x for _, _, x in rows]) if settings.flow else ""
        self._pending.append([self.step, total, *by_stage, flow, norm, lr, time.monotonic() - begin])
        return total

    def _loss(
        self, taken: Sample, u: float, chooser: random.Random
    ) -> tuple[Tensor, tuple[str, float, float]]:
        """The loss of a sample; and its stage, distillation loss and flow-matching loss."""
        taken = dataclasses.replace(taken, **to_device(vars(taken), self.machine.device))
        flow = None
        if taken.clean is not None:
            taken, flow = self._noised(taken, u, chooser.getrandbits(32))
        target = self.student.teach(taken.arguments) if taken.output is None else taken.output
        predicted = self.student.forward(taken.arguments).float()
        distilled = (predicted - target.float()).square().mean()
        matched = distilled.new_zeros(()) if flow is None else (predicted - flow.float()).square().mean()
        row = self._stage(taken.progress), distilled.item(), matched.item()
        return distilled + self.settings.flow * matched, row

    def _noised(self, taken: Sample, u: float, seed: int) -> tuple[Sample, Tensor]:
        generator = torch.Generator().manual_seed(seed)  # on the CPU: equal on every device
        noise = torch.randn(taken.clean.shape, generator=generator).to(taken.clean)
        return noised(self.scheduler, taken, u, self.settings.shift, noise)

    def _stage(self, progress: float) -> str:
        return self.student.make.schedule.stage_for_sigma(1 - progress, shift=1.0)

    def _take_gradients(self) -> float:
        """Give the optimizer the student's gradients, of a norm of at most `CLIP_NORM`. Returns the norm before."""
        grads = self.student.gradients()
        norm = self.student.norm(grads)
        self.student.transformer.zero_grad(set_to_none=True)
        torch._foreach_mul_([x for x in grads if x is not None], min(1.0, CLIP_NORM / (norm + 1e-6)))
        for master, grad in zip(self.masters, grads, strict=True):
            master.grad = grad
        return norm

    def _put(self, weights: list[Tensor]) -> None:
        """Give the student these weights."""
        torch._foreach_copy_(self.shares, weights)

    @torch.no_grad()
    def validate(self, when: str) -> dict[str, float]:
        """How far the student's output on held-out samples is from the dense model's, under "before" or "after" of
        `validation.json`: squared error over the dense output's square, of all and of each stage.
        """
        found = (
            json.loads((self.folder / VALIDATION).read_text()) if (self.folder / VALIDATION).exists() else {}
        )
        if when == "before" and when in found:  # a resumed run's student is no longer what it was before
            return found[when]
        sums = torch.zeros(len(STAGES), 2, dtype=torch.float64)
        samples = list(self._validation_samples())
        world = self.machine.world
        # Processes that share weights must make equally many forwards; the last ones repeat a sample, and do not count.
        for i in range(self.machine.rank, -(-len(samples) // world) * world, world):
            taken = samples[min(i, len(samples) - 1)]()
            target = self.student.teach(taken.arguments) if taken.output is None else taken.output
            error = self.student.forward(taken.arguments).float() - target.float()
            pair = torch.stack([error.square().mean(), target.float().square().mean()])
            if i < len(samples):
                sums[STAGES.index(self._stage(taken.progress))] += pair.double().cpu()
        sums = self.machine.sum(sums)
        rows = {"all": sums.sum(0), **dict(zip(STAGES, sums, strict=True))}
        found[when] = {name: (error / square).item() for name, (error, square) in rows.items() if square}
        self.machine.wait()
        if self.machine.is_first:
            write_json(self.folder / VALIDATION, found)
        return found[when]

    def stages_apart(self) -> float:
        """The share of held-out calls that the pipeline made in another stage than their noise level says."""
        transformer, schedule = self.student.transformer, self.student.make.schedule
        description = description_of(transformer, "transformer")
        apart = []
        for taken in map(read, self.held_out_files):
            if taken.clean is None:
                timestep = noisiest(taken.arguments["timestep"]).float()
                sigma = description.sigma(transformer.config, timestep).max().item()
                apart.append(
                    schedule.stage_for_sigma(sigma, shift=self.settings.shift) != self._stage(taken.progress)
                )
        return mean(apart) if apart else 0.0

    def _validation_samples(self) -> Iterator[Any]:
        """Functions that make the held-out samples. A video is seen at noise levels evenly spread over the steps."""

        def sample(path: Path, point: int) -> Sample:
            taken = read(path)
            taken = dataclasses.replace(taken, **to_device(vars(taken), self.machine.device))
            if taken.clean is None:
                return taken
            u = 1 - (point + 0.5) / VALIDATION_POINTS
            return self._noised(taken, u, seed=point)[0]

        are_videos = read(self.held_out_files[0]).clean is not None  # or calls: a cache has one kind
        for path in self.held_out_files:
            for point in range(VALIDATION_POINTS if are_videos else 1):
                yield lambda path=path, point=point: sample(path, point)

    def finish(self) -> dict[str, float]:
        """Give the student its averaged weights, and validate it."""
        self._put(self.ema)
        return self.validate("after")

    def write_model(self, folder: Path) -> None:
        """Write the student, with the schedule for the grid that it was trained on, as
        `fpsattention.integrations.diffusers.load` reads it.
        """
        make, weights = self.student.make, self.student.whole()
        report = self.student.handle.report(num_steps=make.schedule.num_steps or 1)
        (row, *_) = (row for row in report.rows if row.configs)
        if self.machine.is_first:
            fps.integrations.diffusers.save(
                folder,
                self.student.transformer,
                dataclasses.replace(make.schedule, grid=row.configs[0].geometry.grid),
                shift=make.shift,
                dense_layers=make.dense_layers,
                name=self.settings.transformer,
                weights=weights,
            )
        self.machine.wait()

    def save(self) -> None:
        """Write the log and the checkpoint. The checkpoint counts when all processes have written theirs."""
        if self.machine.is_first:
            training_log.append(self.folder, COLUMNS, self._pending)
        self._pending.clear()
        parts = self.folder / f"checkpoint-{self.step:06}"
        parts.mkdir(parents=True, exist_ok=True)
        state = {
            "masters": self.masters,
            "ema": self.ema,
            "optimizer": self.optimizer.state_dict(),
            "rates": self.rates.state_dict(),
        }
        torch.save(state, parts / f"process-{self.machine.rank}.pt")
        self.machine.wait()
        if self.machine.is_first:
            write_json(
                self.folder / CHECKPOINT,
                {"step": self.step, "folder": parts.name, "settings": dataclasses.asdict(self.settings)},
            )
            for old in self.folder.glob("checkpoint-*"):
                if old != parts:
                    shutil.rmtree(old)
        self.machine.wait()

    def _load(self) -> None:
        state = json.loads((self.folder / CHECKPOINT).read_text())
        for name, now in json.loads(json.dumps(dataclasses.asdict(self.settings))).items():
            if (before := state["settings"].get(name)) != now:
                raise UserError(
                    f"--out {self.folder}: holds a run with {name} {before}, this one has {now}; use {before} again, "
                    f"or another --out"
                )
        path = self.folder / state["folder"] / f"process-{self.machine.rank}.pt"
        parts = torch.load(path, map_location=self.machine.device, weights_only=True)
        for ours, saved in ((self.masters, parts["masters"]), (self.ema, parts["ema"])):
            torch._foreach_copy_(ours, saved)
        self.optimizer.load_state_dict(parts["optimizer"])
        self.rates.load_state_dict(parts["rates"])
        self.step = state["step"]
        self._put(self.masters)
        if self.machine.is_first:
            training_log.cut(self.folder, COLUMNS, self.step)


def plot(folder: Path) -> None:
    """Draw the smoothed distillation loss of each stage to `loss.png`."""
    training_log.plot(folder, COLUMNS, STAGES, ylabel="distance to the dense output", title=folder.name)


def _mean(values: list[float]) -> float | str:
    """The mean; for no values "", an empty cell of the log."""
    return mean(values) if values else ""
