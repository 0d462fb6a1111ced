"""Schedules to begin with, for the models of `models.MODELS`. No model was trained with any of them.

How they were chosen: by what the small model of docs/training.md lost when it was switched over without training, and
by expected time. Nobody has judged videos of the large models under them.

- **Early steps are dense.** There windows cost the small model 27 % of loss, FP8 alone 0.1 %.
- **Mid and late windows see about a half and a third of all pairs.** The small model's saw 0.39 and 0.23, and cost it
  3.6 % and 2.3 %.
- **No window cuts the video in parts.** On each axis a tile sees its neighbours on both sides, or the whole axis.
- **One tile in all stages.** With its windows it is the best in the order of `plan`, mid counted three times as much as
  late.
- **The first layer keeps the host's own attention**, as is usual in windows without training (Sparse VideoGen, arXiv
  2502.01776).
"""

from __future__ import annotations

from dataclasses import dataclass

from ..core.checks import Triple, as_int
from ..core.config import AttentionConfig
from .models import VideoModel, named
from .schedule import StepSchedule

FEW_STEPS = 8  # a sampler with so many steps, or fewer, is that of a distilled model

# Tile in tokens; windows of the mid and the late steps in tiles.
WINDOWS: dict[str, tuple[Triple, Triple, Triple]] = {
    "wan2.1-1.3b-480p": ((21, 3, 2), (1, 10, 13), (1, 7, 13)),
    "wan2.1-14b-480p": ((21, 3, 2), (1, 10, 13), (1, 7, 13)),
    "wan2.1-14b-720p": ((21, 3, 2), (1, 15, 21), (1, 11, 17)),
    "wan2.2-a14b-480p": ((21, 3, 2), (1, 10, 13), (1, 7, 13)),
    "wan2.2-a14b-720p": ((21, 3, 2), (1, 15, 21), (1, 11, 17)),
    "wan2.2-ti2v-5b-720p": ((16, 2, 4), (2, 11, 5), (2, 7, 5)),
    "hunyuanvideo-540p": ((6, 17, 5), (5, 2, 7), (5, 2, 5)),
    "hunyuanvideo-720p": ((17, 3, 5), (2, 13, 9), (2, 11, 7)),
    "hunyuanvideo1.5-720p": ((16, 2, 4), (2, 21, 11), (2, 17, 9)),
    "cogvideox-2b": ((13, 3, 9), (1, 9, 3), (1, 7, 3)),
    "cogvideox-5b": ((13, 4, 7), (1, 8, 3), (1, 5, 3)),
    "cogvideox1.5-5b": ((3, 8, 16), (4, 6, 3), (3, 5, 3)),
    "ltx-video": ((2, 16, 4), (11, 1, 3), (7, 1, 3)),
    "ltx-2": ((8, 4, 4), (2, 4, 3), (2, 3, 3)),
    "mochi": ((14, 3, 3), (2, 10, 9), (2, 7, 9)),
}


@dataclass(frozen=True)
class Preset:
    """A schedule to begin with, for one model at one size and one number of steps. The model was not trained with it.

    Attributes:
        model: the model and its size.
        num_steps: of the sampler.
        schedule: the configs of the stages.
        dense_layers: layers that keep the host's own attention.
    """

    model: VideoModel
    num_steps: int
    schedule: StepSchedule
    dense_layers: tuple[int, ...] = (0,)

    def explain(self) -> str:
        """A table to read, as of `StepSchedule.explain`, and what to know about the preset."""
        return (
            f"{self.model.name}, {self.model.setting}\n"
            f"{self.schedule.explain(self.num_steps, self.model.grid, self.model.heads)}\n"
            f"layers with the host's own attention: {', '.join(map(str, self.dense_layers))}\n"
            f"not trained with: measure your own model"
        )


def preset(name: str, *, num_steps: int = 50) -> Preset:
    """A schedule to begin with, for a published model (see `fpsattention.schedules.presets` for how it was chosen).

    With more than 8 steps the early ones are dense, mid and late ones see about a half and a third of all pairs. With
    up to 8 steps, as of a distilled model, each step makes a large part of the video, and nothing corrects the last:
    early is the first step and late the last, both dense, and mid is what lies between, with the windows of mid. So one
    or two steps are dense throughout. Dense steps are in FP8.

    Args:
        name: of a model and size, as on the command line, for example "wan2.1-14b-720p".
        num_steps: steps of the sampler, at least 1.

    Raises TypeError or ValueError that has the nearest names.
    """
    model, num_steps = named(name), as_int("num_steps", num_steps, 1)
    tile, *windows = WINDOWS[name]
    dense = AttentionConfig(tile=tile)
    mid, late = (AttentionConfig(tile=tile, window=window) for window in windows)
    if num_steps > FEW_STEPS:
        return Preset(model, num_steps, StepSchedule(early=dense, mid=mid, late=late))
    alpha = 1 / num_steps, max(1, num_steps - 1) / num_steps
    return Preset(model, num_steps, StepSchedule(early=dense, mid=mid, late=dense, alpha=alpha))
