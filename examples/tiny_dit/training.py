"""One training run in a folder: `checkpoint.pt`, `log.csv`, `loss.png`. The same call resumes it."""

from __future__ import annotations

import dataclasses
import math
import os
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import training_log
from fpsattention.cli.errors import UserError

from . import flow
from .clips import CHANNELS, Clips, Codec
from .distillation import Teacher
from .model import Shape, VideoDiT

CHECKPOINT = "checkpoint.pt"
COLUMNS = ("step", "loss", *flow.STAGES, "grad_norm", "lr")
CODEC_SEED = 0
CLIP_NORM = 1.0
MOST_STEPS, MOST_SEED = 2**24 - 1, 2**6 - 1  # see `_seed`
LAST_LR = 0.1  # the cosine ends at this share of the peak


@dataclasses.dataclass(frozen=True)
class Settings:
    """All that determines the result of a run. A resumed run must have equal settings.

    Attributes:
        size: of `model.SIZES`.
        mode: attention, of `flow.MODES`.
        start: where the initial weights come from; None: random weights from the seed.
        lr: peak learning rate. It rises over `warmup` steps, then falls on a cosine to a tenth at the last step.
        ema: decay of the averaged weights; lower in the first steps.
        t_std: standard deviation of the logit-normal u. 1.4 is nearly uniform: early and late steps get their share.
        latents: that the start model samples, to be distilled; 0: the loss is flow matching, on clips.
    """

    size: str
    plan: flow.Plan
    mode: str
    start: str | None
    clips: tuple[str, ...]
    steps: int
    batch: int
    lr: float
    warmup: int
    ema: float
    t_std: float
    seed: int
    latents: int = 0


@dataclasses.dataclass
class Weights:
    """A trained model and how it was made: `finetune` starts from one, and `evaluate` compares them."""

    model: VideoDiT
    codec: Codec
    settings: Settings
    step: int


class Run:
    """Model, averaged weights and optimizer of a run after `step` steps.

    Step n draws crops, noise levels and noise from generators seeded with (seed, n). So no generator's state needs to
    be saved, and runs of one seed see the same draws under any attention. A resumed run equals an uninterrupted one bit
    for bit where the device's kernels are deterministic; by default a GPU's backward of attention is not
    (`torch.use_deterministic_algorithms`).
    """

    def __init__(
        self,
        folder: Path,
        settings: Settings,
        start: Weights | None,
        source: Clips | Teacher,
        device: torch.device,
    ):
        self.folder, self.settings, self.source, self.device = folder, settings, source, device
        self.codec = (start.codec if start else Codec.fit(source, CODEC_SEED)).to(device)
        torch.manual_seed(settings.seed)
        self.model = start.model if start else VideoDiT(shape_of(settings))
        self.model = self.model.to(device).train()
        self.ema = [p.detach().clone() for p in self.model.parameters()]
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=settings.lr,
            betas=(0.9, 0.95),
            weight_decay=0.01,
            fused=device.type == "cuda",
        )
        self.step, self._pending = 0, []
        if (folder / CHECKPOINT).exists():
            self._load()
        else:
            (folder / training_log.LOG).unlink(
                missing_ok=True
            )  # of a run that ended before its first checkpoint

    def train(self, attention: flow.Attention, minutes: float, save_every: int, console: Console) -> bool:
        """Train to the last step, or until `minutes` have passed. Returns whether the last step is done.

        Raises UserError when the loss is not finite; the last checkpoint stays.
        """
        settings, deadline = self.settings, time.monotonic() + 60 * minutes
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        with Progress(*columns, console=console) as progress:
            task = progress.add_task(f"{settings.mode:6}", total=settings.steps, completed=self.step)
            since, first = time.monotonic(), self.step
            while self.step < settings.steps and time.monotonic() < deadline:
                self._one_step(attention)
                progress.advance(task)
                if self.step % save_every == 0 or self.step == settings.steps:
                    loss = self.save()
                    pace = (time.monotonic() - since) / (self.step - first)
                    progress.update(task, description=f"{settings.mode:6} loss {loss:.4f}")
                    console.print(
                        f"step {self.step} of {settings.steps}: loss {loss:.4f}, {pace:.3f} s a step",
                        highlight=False,
                    )
            if self._pending:
                self.save()
        return self.step == settings.steps

    def _one_step(self, attention: flow.Attention) -> None:
        settings = self.settings
        generator = torch.Generator().manual_seed(_seed(settings.seed, self.step, 0))
        teach = None
        if isinstance(self.source, Teacher):
            clean, teach = self.source.draw(settings.batch, generator), self.source.velocity
        else:
            clean = self.codec.encode(self.source.draw("train", settings.batch, generator))
        sigma = flow.draw_sigma(settings.batch, settings.t_std, settings.plan.shift, generator)
        of_noise = torch.Generator(self.device).manual_seed(_seed(settings.seed, self.step, 1))
        noise = torch.randn(clean.shape, device=self.device, generator=of_noise)
        lr = settings.lr * lr_factor(self.step, settings.warmup, settings.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        loss = flow.losses(self.model, clean, noise, sigma, attention, teach)
        loss.mean().backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        decay = min(settings.ema, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(self.ema, [p.detach() for p in self.model.parameters()], 1 - decay)
        self.step += 1
        stages = [attention.stage(s) for s in sigma.tolist()]
        self._pending.append((self.step, loss.detach(), stages, norm.detach(), lr))

    def save(self) -> float:
        """Write the log, and atomically the checkpoint. Returns the mean loss since the last call."""
        rows = []
        for step, loss, stages, norm, lr in self._pending:
            loss = loss.tolist()
            by_stage = [[x for x, s in zip(loss, stages, strict=True) if s == stage] for stage in flow.STAGES]
            rows.append([step, _mean(loss), *map(_mean, by_stage), norm.item(), lr])
        bad = [row[0] for row in rows if not (math.isfinite(row[1]) and math.isfinite(row[5]))]
        if bad:
            raise UserError(
                f"loss or gradient is not finite at step {bad[0]}; {self.folder} stays at its last checkpoint. Try a "
                f"lower --lr than {self.settings.lr:g}"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        training_log.append(self.folder, COLUMNS, rows)
        state = {
            "settings": plain(self.settings),
            "step": self.step,
            "model": self.model.state_dict(),
            "ema": self.ema,
            "optimizer": self.optimizer.state_dict(),
            "codec": dataclasses.astuple(self.codec),
        }
        temporary = self.folder / f"{CHECKPOINT}.new"
        torch.save(state, temporary)
        os.replace(temporary, self.folder / CHECKPOINT)
        self._pending.clear()
        return _mean([row[1] for row in rows])

    def _load(self) -> None:
        state = _read_checkpoint(self.folder, self.device)
        saved = plain(from_plain(state["settings"]))
        for name, now in plain(self.settings).items():
            if (before := saved[name]) != now:
                raise UserError(
                    f"{self.folder}: holds a run with {name} {before}, this one has {now}; use {before} again, or "
                    f"another --out"
                )
        self.step = state["step"]
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.ema, self.codec = state["ema"], Codec(*state["codec"])
        training_log.cut(self.folder, COLUMNS, self.step)


def lr_factor(step: int, warmup: int, steps: int) -> float:
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return LAST_LR + (1 - LAST_LR) * (1 + math.cos(math.pi * progress)) / 2


def shape_of(settings: Settings) -> Shape:
    return Shape(settings.size, settings.plan.grid, CHANNELS)


def load(folder: Path, device: torch.device) -> Weights:
    """The averaged weights of a run's last checkpoint."""
    state = _read_checkpoint(folder, device)
    settings = from_plain(state["settings"])
    model = VideoDiT(shape_of(settings)).to(device).eval()
    for parameter, average in zip(model.parameters(), state["ema"], strict=True):
        parameter.data.copy_(average)
    return Weights(model, Codec(*state["codec"]), settings, state["step"])


def plot(folder: Path) -> None:
    """Draw the smoothed loss of each stage to `loss.png`."""
    title = f"{folder.name}: training loss by stage"
    training_log.plot(folder, COLUMNS, flow.STAGES, ylabel="loss", title=title)


def from_plain(values: dict) -> Settings:
    plan = {k: tuple(v) if isinstance(v, list) else v for k, v in values["plan"].items()}
    return Settings(**values | {"plan": flow.Plan(**plan), "clips": tuple(values["clips"])})


def plain(settings: Settings) -> dict:
    """Settings as numbers, strings, lists and dicts."""

    def plain(x):
        if isinstance(x, dict):
            return {k: plain(v) for k, v in x.items()}
        return [plain(v) for v in x] if isinstance(x, tuple) else x

    return plain(dataclasses.asdict(settings))


def _read_checkpoint(folder: Path, device: torch.device) -> dict:
    path = folder / CHECKPOINT
    if not path.exists():
        raise UserError(
            f"{folder}: holds no {CHECKPOINT}; give the --out of a run that train or finetune has begun"
        )
    return torch.load(path, map_location=device, weights_only=True)


def _seed(seed: int, step: int, stream: int) -> int:
    """A generator's seed, different for all arguments and within 32 bits: torch's CPU generator uses no more."""
    return seed << 25 | stream << 24 | step


def _mean(values: list[float]) -> float | str:
    """The mean; for no values "", an empty cell of the log."""
    return sum(values) / len(values) if values else ""
