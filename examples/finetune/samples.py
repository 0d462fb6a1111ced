"""What training shows the transformer: arguments of its forward, as the pipeline calls it, cached on disk.

A pipeline prepares text, positions, masks and layout in a way of its own for each model. So nothing of that is repeated
here: the pipeline runs, and a hook on its transformer notes what it is called with.
"""

from __future__ import annotations

import inspect
import json
import os
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fpsattention.cli.errors import UserError
from fpsattention.schedules.files import write_json

from .machine import Machine

SETTINGS = "cache.json"
NOT_KEPT = ("self", "return_dict", "attention_kwargs", "joint_attention_kwargs")
PARTS = (
    ("A red fox", "An old fisherman", "A dancer in a yellow coat", "A small robot", "A flock of starlings",
     "Two children", "A sailing boat", "A street musician", "A white horse", "A steam train"),
    ("runs through tall grass", "turns slowly towards the camera", "crosses a busy street", "climbs a rocky hill",
     "waits in the rain", "moves through drifting smoke", "jumps over a stream", "passes under a stone bridge"),
    ("at dawn", "at night under neon lights", "in a snowstorm", "on a bright summer day", "in a dim workshop",
     "by the sea", "in an autumn forest", "on a wide desert plain"),
    ("close-up, shallow focus", "wide shot from a drone", "handheld camera", "slow motion", "camera pans left",
     "static camera, fine detail"),
)  # fmt: skip


@dataclass(frozen=True)
class Request:
    """What the pipeline is asked for; samples of another request are not the same data.

    Attributes:
        model: folder or name of the pipeline.
        transformer: its name in the pipeline.
        size: (frames, height, width) of a video in pixels; None: the pipeline's default.
        source: folder of videos, or None: the model samples.
        steps: of the sampler.
        guidance: guidance scale; None: the pipeline's default.
        points: calls of the transformer that are kept of each sampled video.
        prompts: file of prompts; None: made of `PARTS`.
    """

    model: str
    transformer: str
    size: tuple[int, int, int] | None
    source: str | None
    steps: int
    guidance: float | None
    points: int
    prompts: str | None
    dtype: str
    seed: int

    def call(self) -> dict[str, Any]:
        """Arguments of a call of the pipeline."""
        call: dict[str, Any] = {"num_inference_steps": self.steps, "output_type": "latent"}
        if self.size is not None:
            call |= dict(zip(("num_frames", "height", "width"), self.size, strict=True))
        if self.guidance is not None:
            call["guidance_scale"] = self.guidance
        return call


@dataclass
class Sample:
    """One call of the transformer.

    Attributes:
        arguments: of its forward, by name. Tensors are on the CPU.
        progress: of denoising, from 0 (pure noise) to 1, as in `StepSchedule`; 0 of a video, which is noised anew each
            time that it is drawn.
        output: what the dense model returned; None of a video.
        clean: the video's latent, in the layout of hidden_states; None of a sampled one.
    """

    arguments: dict[str, Any]
    progress: float
    output: Tensor | None = None
    clean: Tensor | None = None


class Cache:
    """The samples in a folder, a file each: VIDEO-POINT.pt. Point 0 of a video is written last.

    Attributes:
        videos: names of the videos that are wanted: numbers of those that the model samples, or names of files. The
            folder may have others.
    """

    def __init__(self, folder: Path, request: Request, videos: list[str]):
        self.folder, self.request, self.videos = folder, request, videos
        self.prompt_of = prompts_of(request.prompts, request.seed)

    def claim(self) -> None:
        """Take the folder for this request. Raises UserError when it holds samples of another."""
        settings = json.loads(json.dumps(asdict(self.request)))  # tuples as lists
        path = self.folder / SETTINGS
        if path.exists():
            before = json.loads(path.read_text())
            for name, value in settings.items():
                if before.get(name) != value:
                    raise UserError(
                        f"--cache {self.folder}: holds samples for {name} {before.get(name)}, this run has {value}; "
                        f"give the same, or another folder"
                    )
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(path, settings)

    def path(self, video: str, point: int) -> Path:
        return self.folder / f"{video}-{point:02}.pt"

    def has(self, video: str) -> bool:
        return self.path(video, 0).exists()

    def write(self, video: str, samples: list[Sample]) -> None:
        for point, sample in reversed(list(enumerate(samples))):
            part = self.path(video, point).with_suffix(".part")
            torch.save(vars(sample), part)
            os.replace(part, self.path(video, point))

    def split(self, held_out: int) -> tuple[list[Path], list[Path]]:
        """Files for training, and those of the last `held_out` videos. Raises UserError when one has none."""
        first = max(0, len(self.videos) - held_out)
        train, rest = map(self._files_of, (self.videos[:first], self.videos[first:]))
        if not (train and rest):
            raise UserError(
                f"--held-out {held_out}: leaves {len(train)} samples to train with and {len(rest)} to validate "
                f"with, of {len(self.videos)} videos; give more of them"
            )
        return train, rest

    def _files_of(self, videos: list[str]) -> list[Path]:
        paths = [self.path(video, point) for video in videos for point in range(self.request.points)]
        return [path for path in paths if path.exists()]


def read(path: Path) -> Sample:
    return Sample(**torch.load(path, map_location="cpu", weights_only=True))


def to_device(value: Any, device: torch.device | str) -> Any:
    """A value with all tensors in it, in dicts, lists and tuples too, on a device."""
    if isinstance(value, Tensor):
        return value.detach().to(device)
    if isinstance(value, dict):
        return {key: to_device(x, device) for key, x in value.items()}
    return type(value)(to_device(x, device) for x in value) if isinstance(value, list | tuple) else value


def prompts_of(path: str | None, seed: int) -> Callable[[int], str]:
    """The prompt of each video: the lines of a file in turn, or random combinations of `PARTS`."""
    if path is None:

        def made(video: int) -> str:
            chooser = random.Random(f"prompt {seed} {video}")
            return ", ".join(chooser.choice(part) for part in PARTS)

        return made
    try:
        lines = [line.strip() for line in Path(path).read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts {path}: cannot be read ({error})") from error
    if not lines:
        raise UserError(f"--prompts {path}: is empty; it must hold a prompt in each line")
    return lambda video: lines[video % len(lines)]


class Enough(Exception):
    """Raised by `note` of `follow` to stop the pipeline."""


def follow(pipe: Any, transformer: nn.Module, call: dict[str, Any], note: Callable[[Sample], None]) -> None:
    """Call the pipeline. `note` gets every call of the transformer."""
    signature = inspect.signature(type(transformer).forward)
    step = 0

    def after(module, args, kwargs, output):
        arguments = dict(signature.bind(module, *args, **kwargs).arguments)
        for name in NOT_KEPT:
            arguments.pop(name, None)
        note(Sample(to_device(arguments, "cpu"), step / pipe.num_timesteps, to_device(output[0], "cpu")))

    def next_step(_, index, timestep, tensors):
        nonlocal step
        step = index + 1
        return {}

    hook = transformer.register_forward_hook(after, with_kwargs=True)
    try:
        pipe(**call, callback_on_step_end=next_step)
    except Enough:
        pass
    finally:
        hook.remove()


def sample(pipe: Any, cache: Cache, machine: Machine, tick: Callable[[], None]) -> None:
    """Let the dense model sample videos and keep random calls of each. The processes share the work.

    Every call is as likely: those with the negative prompt, which guidance makes, belong to inference too.
    """
    request = cache.request
    for number, video in list(enumerate(cache.videos))[machine.rank :: machine.world]:
        if not cache.has(video):
            chooser = random.Random(f"sample {request.seed} {number}")
            kept = _Reservoir(request.points, chooser)
            generator = torch.Generator().manual_seed(chooser.getrandbits(63))
            call = request.call() | {"prompt": cache.prompt_of(number), "generator": generator}
            follow(pipe, getattr(pipe, request.transformer), call, kept.add)
            if not kept.samples:
                raise UserError(
                    f"--transformer {request.transformer}: is not called in {request.steps} steps of the "
                    f"{type(pipe).__name__}; give more --sampler-steps"
                )
            cache.write(video, kept.samples)
        tick()


class _Reservoir:
    """A random choice of `size` samples, each as likely, without knowing how many will come."""

    def __init__(self, size: int, chooser: random.Random):
        self.size, self.chooser = size, chooser
        self.samples: list[Sample] = []
        self.seen = 0

    def add(self, taken: Sample) -> None:
        place = self.seen if self.seen < self.size else self.chooser.randrange(self.seen + 1)
        self.seen += 1
        if place < self.size:
            self.samples[place : place + 1] = [taken]
