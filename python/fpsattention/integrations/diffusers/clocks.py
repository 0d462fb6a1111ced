"""Which step or stage a forward is in: by the scheduler of a pipeline, or by the noise level of each sample."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pickle import PicklingError
from typing import NoReturn

import diffusers
import torch
from torch import Tensor

from ...core.config import AttentionConfig
from ...schedules.schedule import StepSchedule
from ...schedules.windows import LayerWindows, WindowTable
from ..hosts import StepConfig, noisiest, step_configs
from .processor import Parts


class SchedulerClock:
    """Reads the step of a pipeline from its scheduler."""

    def __init__(
        self,
        pipe: diffusers.DiffusionPipeline,
        schedule: StepSchedule | WindowTable,
        dense_steps: tuple[int, ...],
    ):
        self.pipe = pipe
        self.schedule = schedule
        self.dense_steps = dense_steps
        # The scheduler's own tensor: it makes another one for another run.
        self.timesteps: Tensor | None = None
        self.steps: Tensor | None = None  # the timestep of each step, on the CPU
        self.step_of: list[int] = []  # the step of each of the scheduler's timesteps, and of the end

    def __deepcopy__(self, memo: dict) -> SchedulerClock:
        """The copy of a whole pipeline reads the copied scheduler; the copy of a transformer alone reads this one."""
        copied: SchedulerClock = object.__new__(type(self))
        copied.__dict__.update(self.__dict__, pipe=memo.get(id(self.pipe), self.pipe))
        return copied

    def __getstate__(self) -> NoReturn:
        raise PicklingError(
            "a transformer that FPSAttention was enabled in with its pipeline would take the pipeline along; save its "
            "state_dict(), or call remove() of the handle first"
        )

    def parts(
        self, timestep: Tensor, sigma: Callable[[Tensor], Tensor]
    ) -> tuple[Parts | None, Tensor | None, LayerWindows | None]:
        """`Forward.parts` and `Forward.order` of a forward, and the windows of each layer if the schedule is a table.

        Args:
            timestep: as the forward gets it.
            sigma: maps timesteps to noise levels. Not used here.
        """
        steps = self._read_scheduler()
        configs = self.configs(len(steps))
        step = self._step_at(timestep, steps, configs)
        config = configs[step]
        if config is None:
            return None, None, None
        if isinstance(config, AttentionConfig):
            return ((config, None),), None, None
        assert isinstance(self.schedule, WindowTable)  # only a table has a config for each layer
        return ((self.schedule.config, None),), None, self.schedule.windows[step]

    def _read_scheduler(self) -> Tensor:
        """The timestep of each step of the run under way, on the CPU."""
        scheduler = self.pipe.scheduler
        if self.steps is None or scheduler.timesteps is not self.timesteps:
            self.timesteps = scheduler.timesteps
            self.steps = scheduler.timesteps.cpu()
            step_of = torch.arange(len(self.steps), device="cpu")
            # Such a scheduler visits a noise level twice: at the end of a step and at the start of the next.
            if scheduler.order > 1:
                self.steps, step_of = torch.unique_consecutive(self.steps, return_inverse=True)
            self.step_of = [*step_of.tolist(), len(self.steps)]
        return self.steps

    def _step_at(self, timestep: Tensor, timesteps: Tensor, configs: Sequence[StepConfig]) -> int:
        """The step that a forward's timestep belongs to, or the first of several that run the same."""
        values = set(noisiest(timestep).tolist())
        # The pipeline may have rounded the timestep, from float32 to bfloat16 for example.
        rounded = timesteps.to(timestep.dtype).tolist()
        steps = [i for i, value in enumerate(rounded) if {value} == values]
        if not steps:
            given = sorted(values)
            raise RuntimeError(
                f"timestep: {', '.join(map(str, given[:3]))}{', ...' if len(given) > 3 else ''} is none of the "
                f"{len(rounded)} timesteps, {rounded[0]} to {rounded[-1]}, of the {type(self.pipe).__name__} that "
                f"FPSAttention was enabled in; if another pipeline runs this transformer, enable that one; to train, "
                f"or to sample without a pipeline, enable the transformer alone, with shift="
            )
        if len({configs[i] for i in steps}) == 1:
            return steps[0]
        # Rounding made the timesteps of neighbours equal, but they run different configs: ask the scheduler.
        scheduler = self.pipe.scheduler
        index = scheduler.step_index
        if index is None:  # before its first step
            index = scheduler.begin_index or 0
        step = self.step_of[index]
        if step not in steps:
            raise RuntimeError(
                f"timestep: {values.pop()} may be that of the steps {steps[0]} to {steps[-1]}, but the scheduler is at "
                f"step {step}"
            )
        return step

    def configs(self, num_steps: int | None) -> Sequence[StepConfig]:
        """What runs in each step, as from `step_configs`."""
        if num_steps is None:
            if self.steps is None:
                raise ValueError("num_steps: must be given, as the pipeline has not run yet")
            num_steps = len(self.steps)
        return step_configs(self.schedule, self.dense_steps, num_steps)

    def steps_of(self, name: str, num_steps: int) -> list[int]:
        """The steps that a transformer runs. Those of Wan2.2's two are known once a run of `num_steps` steps has told
        its timesteps; until then, and for other models, all steps.
        """
        steps = list(range(num_steps))
        boundary = self.pipe.config.get("boundary_ratio")
        if boundary is None or self.steps is None or len(self.steps) != num_steps:
            return steps
        noisy = (self.steps >= boundary * self.pipe.scheduler.config.num_train_timesteps).tolist()
        return [i for i in steps if noisy[i] == (name == "transformer")]


class NoiseClock:
    """Reads the stage of each sample from its noise level."""

    def __init__(self, schedule: StepSchedule, shift: float):
        self.schedule = schedule
        self.shift = shift

    def parts(
        self, timestep: Tensor, sigma: Callable[[Tensor], Tensor]
    ) -> tuple[Parts, Tensor | None, LayerWindows | None]:
        """As `SchedulerClock.parts`. There are never windows."""
        groups = self.schedule.group_by_stage(sigma(noisiest(timestep).float()), shift=self.shift)
        if len(groups) == 1:
            return ((getattr(self.schedule, *groups), None),), None, None
        parts = tuple((getattr(self.schedule, stage), rows) for stage, rows in groups.items())
        return parts, torch.cat([rows for _, rows in parts]).argsort(), None

    def configs(self, num_steps: int | None) -> Sequence[StepConfig]:
        """What runs in each step, as from `step_configs`."""
        if num_steps is None:
            raise ValueError("num_steps: must be given, as a transformer alone has no sampler")
        return step_configs(self.schedule, (), num_steps)

    def steps_of(self, name: str, num_steps: int) -> list[int]:
        """The steps that a transformer runs: all."""
        return list(range(num_steps))


Clock = SchedulerClock | NoiseClock
