"""FPSAttention in FastVideo's Wan models, for training and wherever else a process holds the transformer itself.

FastVideo chooses its attention from an enumeration, to which another package cannot add a member. But its
self-attention layer, `DistributedAttention`, holds an object that does the work for all tokens and this process's
heads. `enable` replaces that object. Compared with FastVideo 0.2.1.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection
from dataclasses import dataclass
from importlib import metadata
from typing import Any, cast

from fastvideo.attention.backends.abstract import AttentionImpl
from fastvideo.attention.layer import DistributedAttention
from fastvideo.distributed.parallel_state import get_sp_parallel_rank, get_sp_world_size
from fastvideo.models.dits.wanvideo import WanTransformer3DModel
from torch import Tensor, nn

from ..core.api import attention
from ..core.checks import Triple, shown
from ..core.config import AttentionConfig
from ..core.support import check_backend
from ..parallel import own_windows
from ..schedules.schedule import StepSchedule
from .hosts import TRAIN_TIMESTEPS, as_dense_layers, check_schedule, host_class, noisiest, patches
from .scope import Scope

COMPARED = ("0.2.1",)
if metadata.version("fastvideo") not in COMPARED:
    raise ImportError(
        f"fastvideo {metadata.version('fastvideo')}: fpsattention.integrations.fastvideo was compared with "
        f"{', '.join(COMPARED)} only; install a version from these"
    )


def enable(
    transformer: nn.Module,
    schedule: StepSchedule,
    *,
    shift: float,
    dense_layers: Collection[int] = (),
    backend: str = "auto",
) -> Handle:
    """Let the self-attention layers of a transformer run FPSAttention.

    The stage of each sample is that of its noise level, timestep / 1000 (`StepSchedule.for_sigma`). The token grid is
    read from the latents of each forward. Works under FastVideo's sequence parallelism, and before or after its FSDP
    and its activation checkpointing: layers are recomputed as they ran in their forward, whatever ran since. A forward
    waits for the GPU once, to read the timesteps.

    Args:
        transformer: FastVideo's Wan2.1 or 2.2, text or image to video (`WanTransformer3DModel`).
        schedule: the config of each stage.
        shift: as in `StepSchedule.for_sigma`; the `flow_shift` of the pipeline's scheduler.
        dense_layers: layers that keep FastVideo's own attention; -1 is the last.
        backend: as in `fpsattention.attention`.

    Returns the `Handle` that removes FPSAttention again.
    Raises TypeError or ValueError that name the argument, its value, the rule and the nearest legal value; RuntimeError
    when FPSAttention is on already, or the model was loaded with a backend whose layers take more than Q, K and V
    (VIDEO_SPARSE_ATTN) or have weights. During a forward: RuntimeError when a layer's attention has been replaced;
    ValueError when a layer's tokens are not those of the grid, or the schedule is for another grid.
    """
    model: Any = getattr(transformer, "_orig_mod", transformer)
    if host_class(model) is not WanTransformer3DModel:
        raise ValueError(
            f"transformer: is a {type(model).__name__}; it must be FastVideo's WanTransformer3DModel"
        )
    if not isinstance(schedule, StepSchedule):
        raise TypeError(f"schedule: {shown(schedule)} must be a StepSchedule")
    schedule.for_sigma(1.0, shift=shift)  # raises if shift is not legal
    check_backend(backend)
    layers = [block.attn1 for block in model.blocks]
    for i, layer in enumerate(layers):
        if type(layer) is not DistributedAttention or isinstance(layer.attn_impl, nn.Module):
            raise RuntimeError(
                f"transformer: layer {i} is a {type(layer).__name__} with a {type(layer.attn_impl).__name__}; load the "
                f"model with FASTVIDEO_ATTENTION_BACKEND=FLASH_ATTN or TORCH_SDPA"
            )
        if isinstance(layer.attn_impl, FPSAttentionImpl):
            raise RuntimeError(
                f"transformer: FPSAttention is on in layer {i}; call remove() of the handle first"
            )
    dense = as_dense_layers(dense_layers, len(layers))
    return Handle(model, schedule, shift, [x for i, x in enumerate(layers) if i not in dense], backend)


@dataclass(frozen=True)
class Forward:
    """What the layers need to know of one forward of the transformer.

    Attributes:
        grid: tokens (T, H, W).
        sigmas: fp32 [B] on the CPU, the noise level of each sample.
    """

    grid: Triple
    sigmas: Tensor


class Handle:
    """FPSAttention in a transformer, from `enable` to `remove`.

    Attributes:
        grid: tokens (T, H, W) of the last forward; None before the first.
    """

    def __init__(
        self, transformer: nn.Module, schedule: StepSchedule, shift: float, layers: list, backend: str
    ):
        self.transformer, self.schedule, self.shift, self.backend = transformer, schedule, shift, backend
        self.scope = Scope()
        self.grid: Triple | None = None
        self.signature = inspect.signature(WanTransformer3DModel.forward)
        self.layers = layers
        for layer in layers:
            layer.attn_impl = FPSAttentionImpl(layer, self)
        self.hooks = self.scope.hooks(transformer, self._forward_of)

    def remove(self) -> None:
        """Give every layer its own attention back, except where someone else has replaced ours since. Can be
        repeated.
        """
        for layer in self.layers:
            if self._is_in(layer):
                layer.attn_impl = layer.attn_impl.replaced
        self.hooks.remove()

    def _is_in(self, layer: DistributedAttention) -> bool:
        return isinstance(layer.attn_impl, FPSAttentionImpl) and layer.attn_impl.handle is self

    def _forward_of(self, module: Any, args: tuple, kwargs: dict) -> Forward:
        for layer in self.layers:
            if not self._is_in(layer):
                raise RuntimeError(
                    f"transformer: a layer's attention has become a {type(layer.attn_impl).__name__}, so FPSAttention "
                    f"would not run; call remove() of the handle, and enable() again"
                )
        inputs = self.signature.bind(module, *args, **kwargs).arguments
        self.grid = patches(inputs["hidden_states"].shape[2:], module.patch_size)
        check_schedule(self.schedule, "the transformer's input", grid=self.grid)
        return Forward(self.grid, noisiest(inputs["timestep"]).float().cpu() / TRAIN_TIMESTEPS)


class FPSAttentionImpl(AttentionImpl):
    """Does the work of a `DistributedAttention`, in place of FastVideo's own (`replaced`)."""

    def __init__(self, layer: DistributedAttention, handle: Handle):
        self.replaced = layer.attn_impl
        self.scale, self.heads = layer.softmax_scale, layer.num_heads
        self.handle = handle

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attn_metadata: Any) -> Tensor:
        """query, key, value: [B, L, H / P, D], all tokens of this process's heads. Returns the same shape."""
        handle = self.handle
        forward = handle.scope.current()

        def attend(config: AttentionConfig, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            config = own_windows(config, self.heads, get_sp_parallel_rank(), get_sp_world_size())
            out = attention(
                q, k, v, grid=forward.grid, config=config, scale=self.scale, backend=handle.backend
            )
            return cast(Tensor, out)  # without return_lse it is no pair

        return handle.schedule.map_by_stage(attend, forward.sigmas, query, key, value, shift=handle.shift)
