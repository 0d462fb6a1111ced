"""Which `AttentionConfig` at which denoising step: the schedule S(t) of arXiv 2506.04648, section 3.3."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path

import torch
from torch import Tensor

from ..core.checks import Triple, as_grid, as_int, shown
from ..core.config import AttentionConfig
from .files import check_object, config_from_json, config_to_json, read_json, write_json

FORMAT = "fpsattention-schedule-1"
STAGES = ("early", "mid", "late")

# Tolerance for rounding in float32: progress this far below a boundary has reached it, and a sigma this far outside
# [0, 1] is legal. Shifting in float32 takes sigma to 1 + 1.2e-7 (at shift 2.9), and progress off by 3e-6 (at shift 12).
ROUNDING = 1e-5


@dataclass(frozen=True)
class StepSchedule:
    """Three configs for the stages of denoising (arXiv 2506.04648, section 3.3: S(t) = [g(t), W(t)]). Immutable,
    hashable.

    A config may select its key tiles by content. A choice is then made in every call, with the tile of its stage.

    The paper gives early steps a coarse tile and a sparse window, middle steps a fine tile and a dense window, late
    steps something between. A config's tile (or quant_tile) is g, its window is W.

    Progress p is 0 at pure noise and 1 when clean. With alpha = (a, b) the stage is

        early: p < a        mid: a <= p < b        late: b <= p

    A p less than 1e-5 below a boundary has reached it. A boundary of 1 is never reached: alpha=(0, 1) is mid
    throughout. In inference p = step / num_steps. In training the noise level sigma is random, and p is where the
    sampler of inference meets it: its step i starts from u = 1 - i / num_steps, shifted to
    sigma = shift * u / (1 + (shift - 1) * u). Inverted:

        p = 1 - u = shift * (1 - sigma) / (sigma + shift * (1 - sigma))

    So a config meets the same noise in both. For a sampler with other sigmas (Karras's, for example), call `for_sigma`
    in inference too.

    Attributes:
        early: the config of the first stage, from pure noise.
        mid: the config of the second stage.
        late: the config of the last stage, to clean.
        alpha: progress at which mid and late begin, 0 <= a <= b <= 1.
        grid: tokens (T, H, W) that the windows are meant for; an integration raises for a video of another grid. None:
            any grid.
        num_steps: steps of the sampler that the schedule is meant for; all methods raise for another number. None: any.

    Raises TypeError or ValueError that name the argument, its value, the rule and the nearest legal value; so do
    all methods.
    """

    early: AttentionConfig
    mid: AttentionConfig
    late: AttentionConfig
    alpha: tuple[float, float] = (0.2, 0.8)
    grid: Triple | None = None
    num_steps: int | None = None

    def __post_init__(self):
        for name in STAGES:
            if not isinstance(getattr(self, name), AttentionConfig):
                raise TypeError(f"{name}: {shown(getattr(self, name))} must be an AttentionConfig")
        object.__setattr__(self, "alpha", _as_alpha(self.alpha))
        if self.grid is not None:
            object.__setattr__(self, "grid", as_grid(self.grid))
        if self.num_steps is not None:
            object.__setattr__(self, "num_steps", as_int("num_steps", self.num_steps, 1))

    def stage(self, *, step: int, num_steps: int) -> str:
        """The stage ("early", "mid" or "late") of inference step `step`; the arguments are those of `at`."""
        num_steps = as_int("num_steps", num_steps, 1)
        if self.num_steps not in (None, num_steps):
            raise ValueError(
                f"num_steps: {num_steps} is not the schedule's, {self.num_steps}; nearest legal value "
                f"{self.num_steps}; replace(schedule, num_steps=None) fits any number"
            )
        return self._stage(as_int("step", step, 0, num_steps - 1) / num_steps)

    def at(self, *, step: int, num_steps: int) -> AttentionConfig:
        """The config of an inference step.

        Args:
            step: the sampler's step, from 0 (pure noise). Do not count forwards: guidance runs several in a step.
            num_steps: steps from pure noise to clean, even if the sampler starts at a later one (video to video).
        """
        return getattr(self, self.stage(step=step, num_steps=num_steps))

    def stage_for_sigma(self, sigma: float, *, shift: float) -> str:
        """The stage ("early", "mid" or "late") of a noise level; the arguments are those of `for_sigma`."""
        return self._stage(_progress("sigma", sigma, _as_shift(shift)))

    def for_sigma(self, sigma: float, *, shift: float) -> AttentionConfig:
        """The config of a noise level of rectified flow: x = (1 - sigma) * clean + sigma * noise.

        Args:
            sigma: in [0, 1], as the model sees it, after any shift; for example timestep / 1000 (truncating a timestep
                to an integer moves p by up to shift / 1000). A sigma up to 1e-5 outside, from shifting in float32, is
                taken for the end.
            shift: timestep shift of the sampler in inference, positive (Wan: 3 to 12), however training draws its
                sigmas. 1: no shift.
        """
        return getattr(self, self.stage_for_sigma(sigma, shift=shift))

    def group_by_stage(self, sigmas: Tensor, *, shift: float) -> dict[str, Tensor]:
        """The samples of a batch in each stage, so that a mixed batch takes at most three calls.

        Args:
            sigmas: floating point [B], each as in `for_sigma`; on any device. Waits once for a GPU.
            shift: as in `for_sigma`.

        Returns the indices of the samples in each stage that occurs, in order of denoising: int64, ascending, on the
        device of `sigmas`. The config of a stage is `getattr(schedule, stage)`.
        """
        if not (isinstance(sigmas, Tensor) and sigmas.is_floating_point()):
            raise TypeError(f"sigmas: {shown(sigmas)} must be a floating-point tensor [B]")
        if sigmas.dim() != 1:
            raise ValueError(f"sigmas: shape {tuple(sigmas.shape)} must be [B], one per sample")
        shift = _as_shift(shift)
        samples = enumerate(sigmas.tolist())
        stages = [self._stage(_progress(f"sigmas[{i}]", sigma, shift)) for i, sigma in samples]
        return {
            stage: torch.tensor([i for i, x in enumerate(stages) if x == stage], device=sigmas.device)
            for stage in STAGES
            if stage in stages
        }

    def map_by_stage(
        self, fn: Callable[..., Tensor], sigmas: Tensor, *batched: Tensor, shift: float
    ) -> Tensor:
        """Call `fn` once for each stage of a batch and return the results in the batch's order. Differentiable.

            attend = lambda config, q, k, v: attention(q, k, v, grid=grid, config=config)
            out = schedule.map_by_stage(attend, sigmas, q, k, v, shift=5.0)

        Args:
            fn: called as fn(config, *parts) with b of the B samples; returns [b, ...]. Results may differ in b only.
            sigmas, shift: as in `group_by_stage`, B at least 1.
            batched: [B, ...] each. Passed on without a copy when all samples are in one stage.

        Returns [B, ...], of the dtype and device of fn's results.
        """
        groups = self.group_by_stage(sigmas, shift=shift)
        if not groups:
            raise ValueError("sigmas: shape (0,) must be [B] with B at least 1")
        for i, x in enumerate(batched):
            if not isinstance(x, Tensor):
                raise TypeError(f"batched[{i}]: must be a tensor [B, ...], got {type(x).__name__}")
            if x.shape[:1] != sigmas.shape:
                rule = f"must begin with {len(sigmas)}, the number of sigmas"
                raise ValueError(f"batched[{i}]: shape {tuple(x.shape)} {rule}")
        parts = []
        for stage, rows in groups.items():
            own = batched if len(groups) == 1 else [x.index_select(0, rows.to(x.device)) for x in batched]
            parts.append(fn(getattr(self, stage), *own))
            _check_result(stage, parts[-1], len(rows), like=parts[0])
        if len(parts) == 1:
            return parts[0]
        out = parts[0].new_empty(len(sigmas), *parts[0].shape[1:])
        for rows, part in zip(groups.values(), parts, strict=True):
            out.index_copy_(0, rows.to(out.device), part)
        return out

    def explain(self, num_steps: int, grid: Sequence[int], heads: int = 1) -> str:
        """A table to read: steps, tile, scales, window (or select) and density of each stage.

        Args:
            num_steps: as in `at`.
            grid, heads: tokens (T, H, W) and number of heads, as in `AttentionConfig.resolve`.
        """
        num_steps = as_int("num_steps", num_steps, 1)
        stages = [self.stage(step=i, num_steps=num_steps) for i in range(num_steps)]
        resolved = {stage: getattr(self, stage).resolve(grid, heads) for stage in STAGES}
        lines = [f"{'stage':5} {'steps':>9} {'tile':>14} {'scales':>14} {'window':>14} {'density':>8}"]
        for stage, config in resolved.items():
            own = [i for i, x in enumerate(stages) if x == stage]
            steps = f"{own[0]}-{own[-1]}" if own else "none"
            scales = config.quant_tile if config.quant == "fp8" else "none"
            window = config.select or (config.windows[0] if len(config.windows) == 1 else "per head")
            lines.append(
                f"{stage:5} {steps:>9} {config.tile!s:>14} {scales!s:>14} {window!s:>14} {config.density:>8.3f}"
            )
        mean = sum(resolved[stage].density for stage in stages) / num_steps
        return "\n".join([*lines, f"mean density over {num_steps} steps: {mean:.3f}"])

    def save(self, path: str | Path) -> None:
        """Write the schedule as JSON. The file is written whole or not at all."""
        configs = {stage: config_to_json(getattr(self, stage)) for stage in STAGES}
        rest = {"alpha": self.alpha, "grid": self.grid, "num_steps": self.num_steps}
        write_json(path, {"format": FORMAT, **configs, **rest})

    @classmethod
    def load(cls, path: str | Path) -> StepSchedule:
        """Read a file that `save` wrote. Raises ValueError, with the path, for any other content."""
        data = read_json(path)
        try:
            check_object("", data, {*STAGES, "alpha", "grid", "num_steps"}, FORMAT)
            configs = {stage: config_from_json(stage, data[stage]) for stage in STAGES}
            return cls(**configs, alpha=data["alpha"], grid=data["grid"], num_steps=data["num_steps"])
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from error

    def _stage(self, progress: float) -> str:
        return STAGES[sum(bound < 1 and bound <= progress + ROUNDING for bound in self.alpha)]


def _check_result(stage: str, result: Tensor, samples: int, like: Tensor) -> None:
    """Check that a result of `map_by_stage`'s fn fits in one batch with `like`. Raises TypeError or ValueError."""
    if not isinstance(result, Tensor):
        raise TypeError(f"fn: must return a tensor [b, ...], returned {type(result).__name__} for {stage}")
    got = tuple(result.shape), result.dtype, result.device
    rule = (samples, *like.shape[1:]), like.dtype, like.device
    if got != rule:
        returned, legal = (" ".join(map(str, x)) for x in (got, rule))
        raise ValueError(f"fn: returned {returned} for {stage}, must return {legal}")


def _progress(name: str, sigma: float, shift: float) -> float:
    """The progress at a noise level, from 0 (pure noise) to 1 (clean), for a sampler with this shift."""
    rule = f"{name}: {shown(sigma)} must be a number from 0 (clean) to 1 (pure noise)"
    if not _is_real(sigma):
        raise TypeError(f"{rule}; a batch goes to group_by_stage as a tensor [B]")
    if not -ROUNDING <= sigma <= 1 + ROUNDING:
        raise ValueError(f"{rule}{_nearest(sigma)}")
    sigma = min(max(float(sigma), 0.0), 1.0)
    return shift * (1 - sigma) / (sigma + shift * (1 - sigma))


def _as_shift(shift: float) -> float:
    rule = f"shift: {shown(shift)} must be a positive, finite number; 1.0 is no shift"
    if not _is_real(shift):
        raise TypeError(rule)
    if not 0 < shift <= sys.float_info.max:
        raise ValueError(rule)
    return float(shift)


def _as_alpha(alpha: Sequence[float]) -> tuple[float, float]:
    rule = f"alpha: {shown(alpha)} must be two numbers (a, b) with 0 <= a <= b <= 1"
    if not (isinstance(alpha, Sequence) and all(map(_is_real, alpha))):
        raise TypeError(rule)
    if len(alpha) != 2:
        raise ValueError(f"{rule}; got {len(alpha)}")
    if not 0 <= alpha[0] <= alpha[1] <= 1:
        raise ValueError(f"{rule}{_nearest(*alpha)}")
    return float(alpha[0]), float(alpha[1])


def _is_real(value) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _nearest(*values: float) -> str:
    """Text that names the legal value nearest to a sigma, or to both of alpha; empty for NaN."""
    if any(x != x for x in values):
        return ""
    legal = sorted(float(min(max(x, 0), 1)) for x in values)
    return f"; nearest legal value {legal[0] if len(legal) == 1 else tuple(legal)}"
