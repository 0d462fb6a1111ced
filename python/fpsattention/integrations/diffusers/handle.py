"""`enable` and the `Handle` that it returns."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import diffusers
from torch import nn

from ...core.checks import as_grid, shown
from ...core.support import check_backend
from ...schedules.schedule import StepSchedule
from ...schedules.windows import WindowTable
from ..hosts import as_dense_steps, check_schedule
from .clocks import Clock, NoiseClock, SchedulerClock
from .description import Description
from .report import Report, Row, rows_of
from .transformer import PatchedTransformer


def enable(
    model: diffusers.DiffusionPipeline | nn.Module,
    schedule: StepSchedule | WindowTable,
    *,
    dense_layers: Collection[int] = (),
    dense_steps: int | Collection[int] = 0,
    shift: float | None = None,
    backend: str = "auto",
    description: Description | None = None,
) -> Handle:
    """Let the self-attention layers of a pipeline, or of a transformer, run FPSAttention.

    The transformers are the video transformers of diffusers that `docs/hosts.md` lists; any other one needs its
    `description`. Cross-attention, text encoders and the VAE stay as they are. The token grid is read from the input of
    each forward.

    All transformers of a pipeline are changed (Wan2.2 has two). The step is the place of the forward's timestep in
    `pipe.scheduler.timesteps`. Calls are not counted, so guidance may make any number of them, and a sampler may enter
    late. A transformer alone, for training or another sampler, gets the noise level from the timestep (over 1000) and
    the config from `StepSchedule.for_sigma`; samples of one batch may be in different stages. In both cases a forward
    waits for the GPU once, to read the timestep; once more to check the mask of padded text, where a model does so.

    Works with `transformer.compile()`, `torch.compile(transformer)` and `transformer.compile_repeated_blocks()`, before
    or after. There is one graph for each stage, or one for all windows of a table, and one for the host's own attention
    where steps keep it. There are more when the size of the video changes, in some models one for each size
    (`docs/hosts.md`). A warning says when torch keeps fewer than that. Works under gradient checkpointing, by
    `enable_gradient_checkpointing()` or torch.distributed's `checkpoint_wrapper`: layers are recomputed as they ran in
    their forward, whatever ran since. Works under `transformer.enable_parallelism(config=ContextParallelConfig(
    ulysses_degree=...))` of Wan and LTX-Video, if all processes get the same inputs.

    Args:
        model: a pipeline, or one of its transformers.
        schedule: the config of each stage; or, for a pipeline, a table of windows for each step, layer (in the order
            they run in) and head. The table's num_steps must be the sampler's, its num_layers and heads the
            transformer's, its grid that of every forward. Under torch.compile a table has no gradient.
        dense_layers: layers that keep the host's own attention, counted in the order they run in; -1 is the last. In
            HunyuanVideo the dual-stream blocks come first.
        dense_steps: steps that keep it, for a pipeline only: a number of first steps, or a collection of steps.
        shift: as in `StepSchedule.for_sigma`; required with a transformer, not allowed with a pipeline. 1.0 for
            CogVideoX: its timestep is no sigma, but falls evenly, as progress rises.
        backend: as in `fpsattention.attention`.
        description: of the transformers, if they are of a class that this package does not know, or not as you want.

    Returns the `Handle` that reports what runs and removes FPSAttention again.
    Raises TypeError or ValueError that name the argument, its value, the rule and the nearest legal value; RuntimeError
    when FPSAttention is on already or cannot run in the processor of a layer. During a forward: RuntimeError when the
    host does what the processors do not know (other parallelism, processors replaced, tokens outside of the grid, an
    attention call other than described, a timestep that is none of the scheduler's); ValueError when the table is of
    another grid or number of steps, or the schedule names another.
    """
    check_schedule(schedule, "the model")
    check_backend(backend)
    steps = as_dense_steps(dense_steps)
    clock: Clock
    if isinstance(model, diffusers.DiffusionPipeline):
        clock, transformers = _scheduler_clock(model, schedule, steps, shift), transformers_of(model)
    else:
        clock, transformers = _noise_clock(model, schedule, steps, shift), {"transformer": model}
    patched = [
        PatchedTransformer(name, x, clock, dense_layers, backend, description)
        for name, x in transformers.items()
    ]
    for x in patched:  # all are checked by now, so either all are changed or none
        x.install()
    return Handle(patched, clock)


class Handle:
    """FPSAttention in a model, from `enable` to `remove`."""

    def __init__(self, patched: list[PatchedTransformer], clock: Clock):
        self._patched = patched
        self._clock = clock

    def remove(self) -> None:
        """Give every layer its own processor back, except where someone else has replaced ours since. Can be repeated.
        Deep copies made in between stay as they are.
        """
        for x in self._patched:
            x.remove()

    @contextmanager
    def dense(self) -> Iterator[None]:
        """Let the forwards that this thread begins in here run the host's own attention, in all layers and at any
        timestep. So one model is its own dense teacher:

            with torch.no_grad(), handle.dense():
                target = transformer(**inputs).sample
            loss = (transformer(**inputs).sample - target).square().mean()

        What a forward runs belongs to it: its checkpoints recompute as it ran, and under torch.compile it has a graph
        of its own. Forwards of other threads, and of copies of the model, are not changed. Can be nested.
        """
        with ExitStack() as stack:
            for x in self._patched:
                stack.enter_context(x.scope.dense())
            yield

    def report(self, *, grid: Sequence[int] | None = None, num_steps: int | None = None) -> Report:
        """What runs in each step and layer. `print` it.

        Args:
            grid: tokens (T, H, W); None: those of the last forward.
            num_steps: None: those of the pipeline's last run.

        Raises ValueError when one is None and no forward has run yet; otherwise as `AttentionConfig.resolve`.
        """
        rows: list[Row] = []
        for x in self._patched:
            tokens = x.last_grid if grid is None else as_grid(grid)
            if tokens is None:
                continue  # one of Wan2.2's two transformers may not have run
            check_schedule(self._clock.schedule, "the report", grid=tokens)
            configs = self._clock.configs(num_steps)
            rows += rows_of(x, tokens, configs, self._clock.steps_of(x.name, len(configs)))
        if not rows:
            raise ValueError("grid: must be given, as no forward has run yet")
        return Report(tuple(rows))


def transformers_of(pipe: diffusers.DiffusionPipeline) -> dict[str, nn.Module]:
    names = ("transformer", "transformer_2")
    transformers = {x: getattr(pipe, x) for x in names if getattr(pipe, x, None) is not None}
    if not transformers:
        raise ValueError(f"model: {type(pipe).__name__} has no transformer")
    return transformers


def _scheduler_clock(
    pipe: diffusers.DiffusionPipeline,
    schedule: StepSchedule | WindowTable,
    dense_steps: tuple[int, ...],
    shift: float | None,
) -> SchedulerClock:
    if shift is not None:
        raise ValueError(
            f"shift: {shown(shift)} is for a transformer; a pipeline's scheduler tells the step; leave it out"
        )
    return SchedulerClock(pipe, schedule, dense_steps)


def _noise_clock(
    transformer: nn.Module,
    schedule: StepSchedule | WindowTable,
    dense_steps: tuple[int, ...],
    shift: float | None,
) -> NoiseClock:
    if isinstance(transformer, diffusers.ModularPipeline):
        raise ValueError(
            f"model: is a {type(transformer).__name__}, a ModularPipeline, whose steps FPSAttention does not know; "
            f"enable its transformer instead, which goes by the noise level: enable(pipe.transformer, schedule, "
            f"shift=...)"
        )
    if not isinstance(schedule, StepSchedule):
        raise ValueError(
            "schedule: a WindowTable is for a pipeline, whose scheduler tells the step; a transformer alone does not "
            "know it; give a StepSchedule"
        )
    if shift is None:
        raise ValueError(
            "shift: must be given with a transformer, to know how far a noise level is from clean"
        )
    if dense_steps:
        raise ValueError(
            f"dense_steps: {shown(dense_steps)} is for a pipeline; a transformer alone does not know its step"
        )
    schedule.for_sigma(1.0, shift=shift)  # raises if shift is not legal
    return NoiseClock(schedule, shift)
