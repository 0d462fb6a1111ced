"""FPSAttention in one transformer: its processors, and what they need to know of each forward."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Collection, Hashable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from ...core.checks import MAX_TOKENS, Triple, as_grid, as_int
from ..hosts import as_dense_layers, check_schedule, host_class
from ..scope import Hooks, Scope
from .clocks import Clock
from .compared import FUSED
from .description import Description, Inputs
from .descriptions import DESCRIPTIONS, description_of
from .general import General, general
from .processor import Attn, Forward, Parts, Processor


class PatchedTransformer:
    """A transformer with our processors in its layers, once `install` is called and until `remove`.

    Attributes:
        name: of the transformer in its pipeline.
        description: of its class.
        heads: of each self-attention layer.
        processors: ours, by the index of their layer.
        dense_layers: the layers that keep the host's own.
        last_grid: tokens (T, H, W) of the last forward; None before the first.

    Raises as `enable` does.
    """

    def __init__(
        self,
        name: str,
        transformer: nn.Module,
        clock: Clock,
        dense_layers: Collection[int],
        backend: str,
        description: Description | None,
    ):
        self.compiled = hasattr(transformer, "_orig_mod")  # by torch.compile(transformer)
        transformer = getattr(transformer, "_orig_mod", transformer)
        self.name = name
        self.transformer = transformer
        self.clock = clock
        self.description = description_of(transformer, name) if description is None else description
        self.fused = FUSED.get(host_class(transformer).__name__) if description is None else None
        self.layers = _layers_of(transformer, name, self.description)
        self.heads: int = getattr(self.layers[0], "heads", None) or self.layers[0].num_heads
        check_schedule(clock.schedule, name, num_layers=len(self.layers), heads=self.heads)
        self.dense_layers = as_dense_layers(dense_layers, len(self.layers))
        self.signature = _signature_of(transformer, name)
        self.scope = Scope()
        self.hooks: Hooks | None = None
        self.last_grid: Triple | None = None
        self.sizes_change = False  # whether two forwards had different grids
        self.graphs: set[Hashable] = set()  # what torch.compile needs a graph of its own for
        self.around = _modules_around(transformer, self.layers)
        self.processors: dict[int, Processor] = {}
        for i, layer in enumerate(self.layers):
            if i not in self.dense_layers:
                self.processors[i] = self._processor(i, layer, backend)

    def _processor(self, i: int, layer: Attn, backend: str) -> Processor:
        """Ours for a layer: one that fuses, if it repeats the one that the layer has."""
        stock = layer.processor
        if isinstance(stock, Processor):
            raise RuntimeError(
                f"model: layer {i} of {self.name} has a {type(stock).__name__} of FPSAttention already; call remove() "
                f"of the handle first"
            )
        if self.fused is not None and type(stock) is self.fused.stock:
            return self.fused(stock, self.scope, i, backend)
        try:
            kind = general(type(stock))
        except ValueError as error:
            raise RuntimeError(
                f"model: layer {i} of {self.name} has a {type(stock).__name__}, where FPSAttention cannot run: {error}"
            ) from None
        first = not any(isinstance(x, General) for x in self.processors.values())
        return kind(stock, self.scope, i, backend, self.description, first)

    def install(self) -> None:
        """Put our processors in the layers."""
        for i, processor in self.processors.items():
            self.layers[i].processor = processor
        self.hooks = self.scope.hooks(self.transformer, self.forward_of)

    def remove(self) -> None:
        """Put the host's processors back."""
        for i, processor in self.processors.items():
            if self.layers[i].processor is processor:
                self.layers[i].processor = processor.replaced
        if self.hooks is not None:
            self.hooks.remove()

    def forward_of(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> Forward:
        """What the layers need to know of a forward with these arguments."""
        for i, processor in self.processors.items():
            if self.layers[i].processor is not processor:
                raise RuntimeError(
                    f"{self.name}: the processor of layer {i} has become a {type(self.layers[i].processor).__name__}, "
                    f"so FPSAttention would not run; call remove() of the handle, and enable() again"
                )
        inputs = self.signature.bind(module, *args, **kwargs).arguments
        config, description = getattr(module, "config", None), self.description
        grid = as_grid(description.grid(config, inputs))
        check_schedule(self.clock.schedule, f"{self.name}'s input", grid=grid)
        parts, order, windows = None, None, None
        if not self.scope.asked_dense:
            parts, order, windows = self.clock.parts(inputs["timestep"], partial(description.sigma, config))
        others = [
            as_int(x, getattr(description, x)(config, inputs), 0, MAX_TOKENS) for x in ("before", "after")
        ]
        extent = torch.empty(*grid, *others, 0, device="cpu")
        if self.last_grid not in (None, grid):
            self.sizes_change = True
        if self.sizes_change and self.description.symbolic_dims:
            # Mark all sizes at once. torch.compile would discover them one by one, each time with another graph for
            # each stage.
            torch._dynamo.maybe_mark_dynamic(extent, [0, 1, 2])
            torch._dynamo.maybe_mark_dynamic(inputs["hidden_states"], list(self.description.symbolic_dims))
        self.last_grid = grid
        if self.compiled or any(x._compiled_call_impl is not None for x in self.around):
            self._count_graphs(grid, parts)
        return Forward(
            extent,
            parts,
            order,
            None if windows is None else torch.tensor(windows, device="cpu"),
            self._text_valid(config, inputs),
            self._group(module),
        )

    def _count_graphs(self, grid: Triple, parts: Parts | None) -> None:
        """Warn once when torch.compile needs more graphs than it keeps."""
        size = self.sizes_change if self.description.symbolic_dims else grid
        configs = None if parts is None else tuple(config for config, _ in parts)
        graph = (size, configs, torch.is_grad_enabled())
        limit = torch._dynamo.config.recompile_limit
        if graph not in self.graphs and len(self.graphs) == limit:
            warnings.warn(
                f"{self.name}: torch.compile needs graph {limit + 1} (each stage of the schedule has one, each size of "
                f"the video may have), but keeps {limit}; what is beyond it runs uncompiled, or raises with "
                f"fullgraph=True; set torch._dynamo.config.recompile_limit = {4 * limit} before the first forward",
                stacklevel=2,
            )
        self.graphs.add(graph)

    def _text_valid(self, config: Any, inputs: Inputs) -> Tensor | None:
        """The model's, for each sample. The mask of a single sample holds for all, as the host broadcasts it."""
        valid, batch = self.description.valid(config, inputs), len(inputs["hidden_states"])
        if valid is None or len(valid) == batch:
            return valid
        if len(valid) != 1:
            raise ValueError(
                f"encoder_attention_mask: has {len(valid)} samples, hidden_states has {batch}; it must have {batch}, "
                f"or 1"
            )
        return valid.expand(batch)

    def _group(self, module: Any) -> ProcessGroup | None:
        """The processes among which the host has split the tokens; None if it has not."""
        parallel = getattr(module, "_parallel_config", None)
        if parallel is None:
            return None
        config = parallel.context_parallel_config
        if config is None:
            raise RuntimeError(
                f"{self.name}: tensor parallelism is switched on, which hands a layer a part of the heads only; "
                f"FPSAttention knows context parallelism: ContextParallelConfig(ulysses_degree=...)"
            )
        if not self.description.context_parallel:
            known = ", ".join(name for name, x in DESCRIPTIONS.items() if x.context_parallel)
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


def _layers_of(transformer: nn.Module, name: str, description: Description) -> list[Attn]:
    """The self-attention layers. Raises ValueError when they are not as a description promises."""
    layers = list(description.layers(transformer))
    if not layers:
        raise ValueError(f"description: its layers(transformer) finds none in {name}")
    for i, layer in enumerate(layers):
        if not hasattr(layer, "processor") or not (hasattr(layer, "heads") or hasattr(layer, "num_heads")):
            raise ValueError(
                f"description: layer {i} of {name}, a {type(layer).__name__}, must have a processor, and heads or "
                f"num_heads"
            )
    return layers


def _signature_of(transformer: nn.Module, name: str) -> inspect.Signature:
    """Of the forward. Raises ValueError when it lacks what FPSAttention reads."""
    signature = inspect.signature(type(transformer).forward)
    for argument in ("hidden_states", "timestep"):
        if argument not in signature.parameters:
            raise ValueError(f"model: the forward of {name} must have the argument {argument}")
    return signature


def _modules_around(transformer: nn.Module, layers: list[nn.Module]) -> list[nn.Module]:
    """The layers and all modules that contain one: those whose `compile()` puts a layer in a graph."""
    wanted = set(layers)
    names = [name.split(".") for name, module in transformer.named_modules() if module in wanted]
    around = {".".join(name[:i]) for name in names for i in range(len(name) + 1)}
    return [transformer.get_submodule(name) for name in sorted(around)]
