"""What a host runs in each step: a schedule, and the steps and layers that keep the host's own attention."""

from __future__ import annotations

import operator
from collections.abc import Collection
from functools import lru_cache

from ..config import AttentionConfig
from ..schedule import StepSchedule


@lru_cache(maxsize=64)
def step_configs(
    schedule: StepSchedule, dense_steps: tuple[int, ...], num_steps: int
) -> tuple[AttentionConfig | None, ...]:
    """The config of each step; None: the host's own attention. `dense_steps` is as from `as_dense_steps`.

    Raises ValueError when one of them is no step of the sampler; else as `StepSchedule.at`.
    """
    schedule.at(step=0, num_steps=num_steps)  # raises if num_steps is not legal
    if dense_steps and dense_steps[-1] >= num_steps:
        raise ValueError(
            f"dense_steps: {dense_steps[-1]} is not a step of the sampler's {num_steps}, from 0 to {num_steps - 1}"
        )
    return tuple(
        None if i in dense_steps else schedule.at(step=i, num_steps=num_steps) for i in range(num_steps)
    )


def as_dense_layers(value: Collection[int], n_layers: int) -> tuple[int, ...]:
    """The layers that `dense_layers` means, ascending, from 0; negative numbers count from the end."""
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
    """The steps that `dense_steps` means, ascending."""
    steps = _as_ints("dense_steps", value if isinstance(value, Collection) else (value,))
    if min(steps, default=0) < 0:
        raise ValueError(
            f"dense_steps: {value!r} must be at least 0; nearest legal value for {min(steps)} is 0"
        )
    return tuple(sorted(set(steps))) if isinstance(value, Collection) else tuple(range(steps[0]))


def _as_ints(name: str, value: Collection[int]) -> list[int]:
    if not isinstance(value, Collection) or isinstance(value, str):
        raise TypeError(f"{name}: {value!r} must be a collection of integers")
    if any(isinstance(x, bool) or not hasattr(x, "__index__") for x in value):
        raise TypeError(f"{name}: {value!r} must be integers")
    return [operator.index(x) for x in value]
