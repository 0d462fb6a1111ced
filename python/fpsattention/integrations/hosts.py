"""What the integrations share: what each step and layer runs, and what transformers of all hosts have in common."""

from __future__ import annotations

import operator
from collections.abc import Collection, Sequence
from functools import lru_cache

from torch import Tensor, nn
from torch.distributed import fsdp

from ..core.checks import Triple, shown
from ..core.config import AttentionConfig
from ..schedules.schedule import StepSchedule
from ..schedules.windows import WindowTable

TRAIN_TIMESTEPS = 1000  # num_train_timesteps of the schedulers of all hosts' models

StepConfig = AttentionConfig | tuple[AttentionConfig, ...] | None
"""What a step runs: one config for all layers, or one for each layer; None: the host's own attention."""


def step_configs(
    schedule: StepSchedule | WindowTable, dense_steps: tuple[int, ...], num_steps: int
) -> tuple[StepConfig, ...]:
    """What each step runs.

    Args:
        dense_steps: as from `as_dense_steps`.
        num_steps: of the sampler.

    Raises ValueError when a dense step is not one of the sampler's; otherwise as `at` of the schedule or table.
    """
    configs: Sequence[StepConfig]
    if isinstance(schedule, WindowTable):
        schedule.at(step=0, layer=0, num_steps=num_steps)  # raises if num_steps is not the table's
        configs = schedule.configs
    else:
        schedule.at(step=0, num_steps=num_steps)  # raises if num_steps is not legal
        configs = _scheduled(schedule, num_steps)
    if dense_steps and dense_steps[-1] >= num_steps:
        given, most = dense_steps[-1], num_steps - 1
        if len(dense_steps) > given:  # all steps from 0 on: say their number, as it was given
            given, most = given + 1, num_steps
        raise ValueError(
            f"dense_steps: {given} must be at most {most}, as the sampler has {num_steps} steps; nearest legal value "
            f"{most}"
        )
    return tuple(None if i in dense_steps else configs[i] for i in range(num_steps))


@lru_cache(maxsize=64)
def _scheduled(schedule: StepSchedule, num_steps: int) -> tuple[AttentionConfig, ...]:
    return tuple(schedule.at(step=i, num_steps=num_steps) for i in range(num_steps))


def check_schedule(schedule: StepSchedule | WindowTable, host: str, **sizes: int | Triple) -> None:
    """Check the type of a schedule, the sizes of a table, and the grid of a `StepSchedule` that has one.

    Args:
        host: what has the sizes, for the error.
        sizes: those that the schedule must have: grid, num_layers or heads. Only the given ones are checked.

    Raises TypeError when schedule is neither; ValueError when a size differs.
    """
    if isinstance(schedule, StepSchedule):
        grid = sizes.get("grid")
        if grid is not None and schedule.grid not in (None, grid):
            raise ValueError(
                f"schedule: is for the grid {schedule.grid}, but {host} has {grid}; nearest legal value {grid}; "
                f"dataclasses.replace(schedule, grid=None) fits any grid"
            )
        return
    if not isinstance(schedule, WindowTable):
        raise TypeError(f"schedule: {shown(schedule)} must be a StepSchedule or a WindowTable")
    for name, value in sizes.items():
        own = getattr(schedule, name)
        if own != value:
            raise ValueError(
                f"schedule: the table's {name} is {own}, but must be that of {host}; nearest legal value {value}"
            )


def host_class(transformer: nn.Module) -> type:
    """The host's own class of a transformer. FSDP2 replaces it by one derived from FSDPModule and the host's class."""
    kind = type(transformer)
    return kind.__bases__[-1] if isinstance(transformer, fsdp.FSDPModule) else kind


def noisiest(timestep: Tensor) -> Tensor:
    """The timestep of each sample, [B], from one for each sample or for each token ([B, L]). It is the largest of a
    sample's tokens: those of an input image have less noise.
    """
    return timestep.flatten(1).amax(1) if timestep.dim() > 1 else timestep.reshape(-1)


def patches(size: Sequence[int], patch: Sequence[int]) -> Triple:
    """Tokens (T, H, W) of a latent (T, H, W) cut in patches. A remainder is dropped, as by the hosts' convolutions."""
    t, h, w = (n // p for n, p in zip(size, patch, strict=True))
    return t, h, w


def as_dense_layers(value: Collection[int], n_layers: int) -> tuple[int, ...]:
    """The layers that `dense_layers` names, ascending, counted from 0. Negative numbers count from the end."""
    layers = _as_ints("dense_layers", value)
    for layer in layers:
        if not -n_layers <= layer < n_layers:
            nearest = -n_layers if layer < 0 else n_layers - 1
            raise ValueError(
                f"dense_layers: {layer} must be from {-n_layers} to {n_layers - 1}, as the transformer has {n_layers} "
                f"layers; nearest legal value {nearest}"
            )
    return tuple(sorted({layer % n_layers for layer in layers}))


def as_dense_steps(value: int | Collection[int]) -> tuple[int, ...]:
    """The steps that `dense_steps` names, ascending: a collection of steps, or a number of first steps."""
    steps = _as_ints("dense_steps", value if isinstance(value, Collection) else (value,))
    if min(steps, default=0) < 0:
        raise ValueError(
            f"dense_steps: {shown(value)} must be at least 0; nearest legal value for {min(steps)} is 0"
        )
    return tuple(sorted(set(steps))) if isinstance(value, Collection) else tuple(range(steps[0]))


def _as_ints(name: str, value: Collection[int]) -> list[int]:
    if not isinstance(value, Collection) or isinstance(value, str):
        raise TypeError(f"{name}: {shown(value)} must be a collection of integers")
    if any(isinstance(x, bool) or not hasattr(x, "__index__") for x in value):
        raise TypeError(f"{name}: {shown(value)} must be integers")
    return [operator.index(x) for x in value]
