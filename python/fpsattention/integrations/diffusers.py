"""FPSAttention in diffusers: `enable` puts it in a pipeline's or a transformer's self-attention, step by step.

handle = fpsattention.integrations.diffusers.enable(pipe, schedule, dense_layers=(0, -1), dense_steps=2)
video = pipe(prompt).frames[0]
print(handle.report())
handle.remove()
"""

from __future__ import annotations

import inspect
import warnings
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pickle import PicklingError

import torch
from torch import Tensor, nn

from ..core.checks import Triple, as_grid, shown
from ..core.config import AttentionConfig, ResolvedConfig
from ..core.support import check_backend
from ..schedules.schedule import StepSchedule
from ..schedules.windows import WindowTable

try:
    import diffusers
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("diffusers is not installed: pip install 'fpsattention[diffusers]'") from error
from packaging.version import Version

# The processors repeat what the host's do, so each minor version must have been compared with them (tests).
OLDEST, FIRST_UNTESTED = "0.41", "0.43"
if not Version(OLDEST) <= Version(diffusers.__version__) < Version(FIRST_UNTESTED):
    raise ImportError(
        f"diffusers {diffusers.__version__}: FPSAttention's attention layers have not been compared with its own; "
        f"install a version from {OLDEST} to below {FIRST_UNTESTED}: pip install 'fpsattention[diffusers]'"
    )

from .diffusers_linears import use_fp8_linears  # noqa: E402
from .diffusers_models import MODELS, Forward, Processor, model_of  # noqa: E402  (imports what the check above is for)
from .hosts import (  # noqa: E402
    StepConfig,
    as_dense_layers,
    as_dense_steps,
    check_schedule,
    noisiest,
    step_configs,
)
from .scope import Scope  # noqa: E402

__all__ = ["Handle", "Report", "Row", "enable", "use_fp8_linears"]


def enable(
    model: diffusers.DiffusionPipeline | nn.Module,
    schedule: StepSchedule | WindowTable,
    *,
    dense_layers: Collection[int] = (),
    dense_steps: int | Collection[int] = 0,
    shift: float | None = None,
    backend: str = "auto",
) -> Handle:
    """Let the self-attention layers of a pipeline, or of a transformer, run FPSAttention.

    The transformers are those of Wan2.1 and 2.2, HunyuanVideo, CogVideoX, LTX-Video and Mochi. Cross-attention, text
    encoders and the VAE stay as they are. The token grid is read from each forward's input.

    Of a pipeline all transformers are changed (Wan2.2 has two). The step is the place of the forward's timestep in
    `pipe.scheduler.timesteps`; calls are not counted, so guidance may run as many as it likes, and a sampler may enter
    late. Of a transformer alone, for training or another sampler, the noise level comes from the timestep (over 1000)
    and goes to `StepSchedule.for_sigma`; samples of one batch may be in different stages. Either way a forward waits
    for the GPU once, to read the timestep (Mochi's twice, to check its mask).

    Works with `transformer.compile()`, `torch.compile(transformer)` and `transformer.compile_repeated_blocks()`, before
    or after: one graph per stage, or one for all windows of a table, and one for the host's own attention where steps
    keep it; twice as many when the video's size changes, and for LTX-Video and Mochi one for each size. A warning says
    when these are more than torch keeps. Works under gradient checkpointing, by `enable_gradient_checkpointing()`
    or torch.distributed's `checkpoint_wrapper`: layers are recomputed as they ran in their forward, whatever ran since.

    So does `transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=...))` of Wan and LTX-Video, if
    all its processes get the same inputs.

    Args:
        model: a pipeline, or one of its transformers.
        schedule: the config of each stage. Or, of a pipeline, a table of windows for each step, layer (in the order
            they run in) and head: its num_steps must be the sampler's, its num_layers and heads the transformer's, its
            grid that of every forward. Compiled it has no gradient.
        dense_layers: layers that keep the host's own attention, counted in the order they run in; -1 is the last. Of
            HunyuanVideo the dual-stream blocks come first.
        dense_steps: steps that keep it: so many from the first, or a collection of them. Only of a pipeline.
        shift: as in `StepSchedule.for_sigma`; to be given with a transformer, and only then. 1.0 for CogVideoX, whose
            timestep is no sigma but falls evenly, as progress does.
        backend: as in `fpsattention.attention`.

    Returns the `Handle` that reports and takes it off again.
    Raises TypeError or ValueError that name the argument, its value, the rule and the nearest legal value; RuntimeError
    when FPSAttention is on already or a layer's processor is not the host's own. During a forward: RuntimeError when
    the host does what the processors do not know (other parallelism, processors replaced, tokens outside of the grid, a
    timestep that is none of the scheduler's); ValueError when the table is of another grid or number of steps.
    """
    check_schedule(schedule, "the model")
    check_backend(backend)
    dense_steps = as_dense_steps(dense_steps)
    if isinstance(model, diffusers.DiffusionPipeline):
        if shift is not None:
            raise ValueError(
                f"shift: {shown(shift)} is for a transformer; a pipeline's scheduler tells the step; leave it out"
            )
        names = ("transformer", "transformer_2")
        transformers = {x: getattr(model, x) for x in names if getattr(model, x, None) is not None}
        if not transformers:
            raise ValueError(f"model: {type(model).__name__} has no transformer")
        clock = _SchedulerClock(model, schedule, dense_steps)
    elif isinstance(model, diffusers.ModularPipeline):
        raise ValueError(
            f"model: is a {type(model).__name__}, a ModularPipeline, whose steps FPSAttention does not know; enable "
            f"its transformer instead, which goes by the noise level: enable(pipe.transformer, schedule, shift=...)"
        )
    else:
        if not isinstance(schedule, StepSchedule):
            raise ValueError(
                "schedule: a WindowTable is for a pipeline, whose scheduler tells the step; a transformer alone does "
                "not know it; give a StepSchedule"
            )
        if shift is None:
            raise ValueError(
                "shift: must be given with a transformer, to know how far a noise level is from clean"
            )
        if dense_steps:
            raise ValueError(
                f"dense_steps: {shown(dense_steps)} is for a pipeline; a transformer alone does not know its step"
            )
        transformers = {"transformer": model}
        schedule.for_sigma(1.0, shift=shift)  # raises if shift is not legal
        clock = _NoiseClock(schedule, shift)
    hosts = [
        _Host(name, transformer, clock, dense_layers, backend) for name, transformer in transformers.items()
    ]
    for host in hosts:  # all have been checked: none is changed unless all can be
        host.install()
    return Handle(hosts, clock)


class Handle:
    """FPSAttention in a model, from `enable` to `remove`."""

    def __init__(self, hosts: list[_Host], clock: _SchedulerClock | _NoiseClock):
        self._hosts = hosts
        self._clock = clock

    def remove(self) -> None:
        """Give every layer its own processor back, save one that someone else has replaced since. Can be repeated. Deep
        copies made in between stay as they are.
        """
        for host in self._hosts:
            host.remove()

    def report(self, *, grid: Sequence[int] | None = None, num_steps: int | None = None) -> Report:
        """What runs in each step and layer. `print` it.

        Args:
            grid: tokens (T, H, W); None: those of the last forward.
            num_steps: None: those of the pipeline's last run.

        Raises ValueError when one is None and no forward has told it; else as `AttentionConfig.resolve`.
        """
        rows = []
        for host in self._hosts:
            tokens = host.last_grid if grid is None else as_grid(grid)
            if tokens is None:
                continue  # of Wan2.2's transformers one may not have run
            check_schedule(self._clock.schedule, "the report", grid=tokens)
            configs = self._clock.configs(num_steps)
            rows += _rows(host, tokens, configs, self._clock.steps_of(host.name, len(configs)))
        if not rows:
            raise ValueError("grid: must be given, as no forward has run yet")
        return Report(tuple(rows))


@dataclass(frozen=True)
class Row:
    """Steps of a transformer in which the same runs, and layers: all that run FPSAttention, or all that do not.

    Attributes:
        transformer: its name in the pipeline.
        steps, layers: ascending.
        configs: of each of these layers, alike in all these steps, fitted to the grid; None: the host's own dense
            attention.
    """

    transformer: str
    steps: tuple[int, ...]
    layers: tuple[int, ...]
    configs: tuple[ResolvedConfig, ...] | None

    @property
    def density(self) -> float:
        """Attended pairs of video tokens over all pairs, mean over layers and heads."""
        if self.configs is None:
            return 1.0
        share = Counter()
        for config in self.configs:
            for window in config.windows:
                share[window] += 1 / len(config.windows)
        geometry, border = self.configs[0].geometry, self.configs[0].border
        return sum(n * geometry.density(window, border) for window, n in share.items()) / len(self.configs)


@dataclass(frozen=True)
class Report:
    """What runs where, as `Handle.report` tells it. Its text is a table."""

    rows: tuple[Row, ...]

    @property
    def density(self) -> float:
        """Mean over the steps and layers of each transformer."""
        weights = [len(row.steps) * len(row.layers) for row in self.rows]
        return sum(w * row.density for w, row in zip(weights, self.rows, strict=True)) / sum(weights)

    def __str__(self) -> str:
        header = ("transformer", "steps", "layers", "attention", "tile", "window", "density", "padding")
        table = [header, *(_cells(row) for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = ["  ".join(x.ljust(n) for x, n in zip(row, widths, strict=True)).rstrip() for row in table]
        return "\n".join([*lines, f"mean density: {self.density:.3f}"])


class _Host:
    """One transformer: its processors and the hook that sets their `Forward`."""

    def __init__(self, name, transformer, clock, dense_layers, backend):
        self.compiled = hasattr(transformer, "_orig_mod")  # by torch.compile(transformer)
        transformer = getattr(transformer, "_orig_mod", transformer)
        self.name = name
        self.transformer = transformer
        self.clock = clock
        self.model = model_of(transformer)
        if self.model is None:
            known = ", ".join(sorted(x.__name__ for x in MODELS))
            raise ValueError(f"model: {name} is a {type(transformer).__name__}; it must be one of {known}")
        self.layers = self.model.layers(transformer)
        self.heads = self.layers[0].heads
        check_schedule(clock.schedule, name, num_layers=len(self.layers), heads=self.heads)
        self.dense_layers = as_dense_layers(dense_layers, len(self.layers))
        self.signature = inspect.signature(type(transformer).forward)
        self.scope = Scope()
        self.last_grid: Triple | None = None  # tokens (T, H, W) of the last forward
        self.sizes_change = False  # whether it was ever another than that of the forward before
        self.graphs: set = set()  # what has a graph of its own, once the transformer is compiled
        self.hooks = ()
        self.processors: dict[int, Processor] = {}
        for i, layer in enumerate(self.layers):
            if type(layer.processor) is not self.model.stock:
                advice = (
                    "; call remove() of the handle first" if isinstance(layer.processor, Processor) else ""
                )
                raise RuntimeError(
                    f"model: layer {i} of {name} has a {type(layer.processor).__name__}, where FPSAttention can only "
                    f"take the place of {self.model.stock.__name__}{advice}"
                )
            if i not in self.dense_layers:
                self.processors[i] = self.model(layer.processor, self.scope, i, backend)

    def install(self):
        for i, processor in self.processors.items():
            self.layers[i].processor = processor
        # Methods, not functions: a deep copy of the transformer gets hooks of a host of its own.
        self.hooks = (
            self.transformer.register_forward_pre_hook(self.before_forward, with_kwargs=True),
            self.transformer.register_forward_hook(self.after_forward, always_call=True),
        )

    def remove(self):
        for i, processor in self.processors.items():
            if self.layers[i].processor is processor:
                self.layers[i].processor = processor.replaced
        self.scope.put_down(self.transformer)
        for hook in self.hooks:
            hook.remove()

    # Hooks of a compiled module run outside of its graph. Nor are they to be compiled themselves: they would be for
    # every timestep anew.

    @torch.compiler.disable
    def before_forward(self, module, args, kwargs):
        self.scope.enter(None)  # first of all: `after_forward` leaves it even if this raises
        self.scope.forward = self.forward(module, args, kwargs)
        if torch.is_grad_enabled():
            self.scope.carry(module)

    @torch.compiler.disable
    def after_forward(self, module, args, output):
        self.scope.leave()

    def forward(self, module, args, kwargs) -> Forward:
        for i, processor in self.processors.items():
            if self.layers[i].processor is not processor:
                raise RuntimeError(
                    f"{self.name}: the processor of layer {i} has become a {type(self.layers[i].processor).__name__}, "
                    f"so FPSAttention would not run; call remove() of the handle, and enable() again"
                )
        inputs = self.signature.bind(module, *args, **kwargs).arguments
        grid = self.model.grid(module.config, inputs)
        check_schedule(self.clock.schedule, f"{self.name}'s input", grid=grid)
        parts, order, windows = self.clock.parts(inputs["timestep"], self.model)
        extent = torch.empty(*grid, 0, device="cpu")
        if self.last_grid not in (None, grid):
            self.sizes_change = True
        if self.sizes_change and self.model.symbolic_dims:
            # All sizes at once: torch.compile would find out one by one, each time with a graph more for each stage.
            torch._dynamo.maybe_mark_dynamic(extent, [0, 1, 2])
            torch._dynamo.maybe_mark_dynamic(inputs["hidden_states"], list(self.model.symbolic_dims))
        self.last_grid = grid
        if self.compiled or _is_compiled(module):
            self.count_graphs(grid, parts)
        return Forward(
            extent,
            parts,
            order,
            None if windows is None else torch.tensor(windows, device="cpu"),
            self.text_valid(inputs),
            self.group(module),
        )

    def count_graphs(self, grid: Triple, parts) -> None:
        """Warn once when torch.compile has to make more graphs than it keeps."""
        size = self.sizes_change if self.model.symbolic_dims else grid
        configs = parts and tuple(config for config, _ in parts)
        graph = (size, configs, torch.is_grad_enabled())
        limit = torch._dynamo.config.recompile_limit
        if graph not in self.graphs and len(self.graphs) == limit:
            warnings.warn(
                f"{self.name}: torch.compile needs graph {limit + 1} (each stage of the schedule has one, each "
                f"size of the video may have), but keeps {limit}; what is beyond it runs uncompiled, or raises with "
                f"fullgraph=True; set torch._dynamo.config.recompile_limit = {4 * limit} before the first forward",
                stacklevel=2,
            )
        self.graphs.add(graph)

    def text_valid(self, inputs: dict) -> Tensor | None:
        """The model's, for each sample: a mask of one sample is of them all, as the host lets it broadcast."""
        valid, batch = self.model.text_valid(inputs), len(inputs["hidden_states"])
        if valid is None or len(valid) == batch:
            return valid
        if len(valid) != 1:
            raise ValueError(
                f"encoder_attention_mask: is of {len(valid)} samples, hidden_states of {batch}; it must be of as many, "
                f"or of one"
            )
        return valid.expand(batch)

    def group(self, module) -> torch.distributed.ProcessGroup | None:
        """The processes among which the host has split the tokens; None: it has not."""
        if module._parallel_config is None:
            return None
        config = module._parallel_config.context_parallel_config
        if config is None:
            raise RuntimeError(
                f"{self.name}: tensor parallelism is switched on, which hands a layer a part of the heads only; "
                f"FPSAttention knows context parallelism: ContextParallelConfig(ulysses_degree=...)"
            )
        if not self.model.context_parallel:
            known = ", ".join(sorted(x.__name__ for x, model in MODELS.items() if model.context_parallel))
            raise RuntimeError(
                f"{self.name}: context parallelism is switched on, but how it splits the text of a "
                f"{type(self.transformer).__name__} is unknown to FPSAttention; it can be on in {known}"
            )
        if config.ring_degree != 1:
            raise RuntimeError(
                f"{self.name}: ring_degree={config.ring_degree}, but FPSAttention exchanges heads only; nearest legal: "
                f"ContextParallelConfig(ulysses_degree={config.ring_degree * config.ulysses_degree})"
            )
        return config._ulysses_mesh.get_group()


def _is_compiled(transformer: nn.Module) -> bool:
    """Whether `compile()` was called on it, or on one of its blocks."""
    return any(module._compiled_call_impl is not None for module in transformer.modules())


class _SchedulerClock:
    """Tells a pipeline's step by its scheduler."""

    def __init__(self, pipe, schedule: StepSchedule | WindowTable, dense_steps: tuple[int, ...]):
        self.pipe = pipe
        self.schedule = schedule
        self.dense_steps = dense_steps
        self.timesteps: Tensor | None = None  # the scheduler's, to see when it makes new ones
        self.steps: Tensor | None = None  # the timestep of each step, on the CPU
        self.step_of: list[int] = []  # the step of each of the scheduler's timesteps, and of the end

    def __deepcopy__(self, memo: dict) -> _SchedulerClock:
        """Of a pipeline copied whole, the copy's; of a transformer alone, its pipeline stays the one there is."""
        copied = object.__new__(type(self))
        copied.__dict__.update(self.__dict__, pipe=memo.get(id(self.pipe), self.pipe))
        return copied

    def __getstate__(self):
        raise PicklingError(
            "a transformer that FPSAttention was enabled in with its pipeline would take the pipeline along; save its "
            "state_dict(), or call remove() of the handle first"
        )

    def parts(self, timestep: Tensor, model: type[Processor]):
        """`Forward`'s parts and order, and of a table the windows of each layer."""
        scheduler = self.pipe.scheduler
        if scheduler.timesteps is not self.timesteps:
            self.timesteps = scheduler.timesteps
            self.steps = scheduler.timesteps.cpu()
            step_of = torch.arange(len(self.steps), device="cpu")
            if scheduler.order > 1:  # visits a noise level twice, to end a step and to begin the next
                self.steps, step_of = torch.unique_consecutive(self.steps, return_inverse=True)
            self.step_of = [*step_of.tolist(), len(self.steps)]
        configs = self.configs(len(self.steps))
        values = set(noisiest(timestep).tolist())
        # The pipeline may have rounded the timestep on the way, from float32 to bfloat16 for example.
        rounded = self.steps.to(timestep.dtype).tolist()
        steps = [i for i, value in enumerate(rounded) if {value} == values]
        if not steps:
            given = sorted(values)
            raise RuntimeError(
                f"timestep: {', '.join(map(str, given[:3]))}{', ...' if len(given) > 3 else ''} is none of the "
                f"{len(rounded)} timesteps, {rounded[0]} to {rounded[-1]}, of the {type(self.pipe).__name__} that "
                f"FPSAttention was enabled in; if another pipeline runs this transformer, enable that one; to train, "
                f"or to sample without a pipeline, enable the transformer alone, with shift="
            )
        if len({configs[i] for i in steps}) > 1:
            # Rounding made neighbours equal that do not run the same: the scheduler knows which one it is at.
            index = scheduler.step_index
            if index is None:  # before its first step
                index = scheduler.begin_index or 0
            step = self.step_of[index]
            if step not in steps:
                raise RuntimeError(
                    f"timestep: {values.pop()} may be that of the steps {steps[0]} to {steps[-1]}, but the scheduler "
                    f"is at step {step}"
                )
            steps = [step]
        config = configs[steps[0]]
        if config is None:
            return None, None, None
        if isinstance(config, AttentionConfig):
            return ((config, None),), None, None
        return ((self.schedule.config, None),), None, self.schedule.windows[steps[0]]

    def configs(self, num_steps: int | None) -> Sequence[StepConfig]:
        """What runs in each step, as from `step_configs`."""
        if num_steps is None:
            if self.steps is None:
                raise ValueError("num_steps: must be given, as the pipeline has not run yet")
            num_steps = len(self.steps)
        return step_configs(self.schedule, self.dense_steps, num_steps)

    def steps_of(self, name: str, num_steps: int) -> list[int]:
        """The steps that a transformer runs: of Wan2.2's two those on its side of the boundary, once a run has told the
        timesteps of so many steps; else all.
        """
        steps = list(range(num_steps))
        boundary = self.pipe.config.get("boundary_ratio")
        if boundary is None or self.steps is None or len(self.steps) != num_steps:
            return steps
        noisy = (self.steps >= boundary * self.pipe.scheduler.config.num_train_timesteps).tolist()
        return [i for i in steps if noisy[i] == (name == "transformer")]


class _NoiseClock:
    """Tells the stage of each sample by its noise level."""

    def __init__(self, schedule: StepSchedule, shift: float):
        self.schedule = schedule
        self.shift = shift

    def parts(self, timestep: Tensor, model: type[Processor]):
        sigmas = model.sigma(noisiest(timestep).float())
        groups = self.schedule.group_by_stage(sigmas, shift=self.shift)
        if len(groups) == 1:
            return ((getattr(self.schedule, *groups), None),), None, None
        parts = tuple((getattr(self.schedule, stage), rows) for stage, rows in groups.items())
        return parts, torch.cat([rows for _, rows in parts]).argsort(), None

    def configs(self, num_steps: int | None) -> Sequence[StepConfig]:
        if num_steps is None:
            raise ValueError("num_steps: must be given, as a transformer alone has no sampler")
        return step_configs(self.schedule, (), num_steps)

    def steps_of(self, name: str, num_steps: int) -> list[int]:
        return list(range(num_steps))


def _rows(host: _Host, grid: Triple, configs: Sequence[StepConfig], steps_run: list[int]) -> list[Row]:
    layers = tuple(host.processors)
    steps_of: dict[tuple[AttentionConfig, ...] | None, list[int]] = {}
    for step in steps_run:
        config = configs[step]
        if isinstance(config, AttentionConfig):
            config = (config,) * len(layers)
        elif config is not None:
            config = tuple(config[i] for i in layers)
        steps_of.setdefault(config, []).append(step)
    rows = [
        Row(
            host.name,
            tuple(steps),
            layers,
            of_layers and tuple(x.resolve(grid, host.heads) for x in of_layers),
        )
        for of_layers, steps in steps_of.items()
        if layers
    ]
    if host.dense_layers and steps_run:
        rows.append(Row(host.name, tuple(steps_run), host.dense_layers, None))
    return rows


def _cells(row: Row) -> tuple[str, ...]:
    start = (row.transformer, _ranges(row.steps), _ranges(row.layers))
    if row.configs is None:
        return (*start, "the host's own", "-", "dense", "1.000", "-")
    first, geometry, windows = row.configs[0], row.configs[0].geometry, {x.windows for x in row.configs}
    if len(windows) > 1:
        window = "per layer"
    elif len(first.windows) > 1:
        window = "per head"
    else:
        window = "dense" if first.windows == (geometry.tiles,) else str(first.windows[0])
    kind = "FPSAttention, FP8" if first.quant == "fp8" else "FPSAttention, not rounded"
    return (*start, kind, str(first.tile), window, f"{row.density:.3f}", f"{geometry.waste:.1%}")


def _ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers as "0-3,7"."""
    starts = [x for i, x in enumerate(numbers) if i == 0 or x != numbers[i - 1] + 1]
    ends = [x for i, x in enumerate(numbers) if i == len(numbers) - 1 or x != numbers[i + 1] - 1]
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))
