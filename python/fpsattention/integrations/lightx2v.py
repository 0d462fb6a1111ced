"""FPSAttention in LightX2V: `register` adds an attention type, which a model's configuration then names.

    fpsattention.integrations.lightx2v.register(schedule, num_layers=40, dense_layers=(0, -1), dense_steps=2)
    # before the model is built; in its JSON: "self_attn_1_type": "fps_attn"

Written for the interface of LightX2V at f8aee98 (2026-08-21), where Wan's blocks pass their index, the scheduler and
the token grid to an attention type.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any, cast

import torch
from torch import Tensor

from ..core.api import attention
from ..core.checks import Triple, as_int, as_triple, shown
from ..core.support import check_backend
from ..schedules.schedule import StepSchedule
from ..schedules.windows import WindowTable
from .hosts import as_dense_layers, as_dense_steps, check_schedule, step_configs

try:
    from lightx2v.common.ops.attn.template import AttnWeightTemplate
    from lightx2v.utils.registry_factory import ATTN_WEIGHT_REGISTER
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "lightx2v is not installed; it is not on PyPI: see https://github.com/ModelTC/LightX2V"
    ) from error


# Arguments of LightX2V that are used, or that do not matter to one unmasked sequence in raster order.
KNOWN = {
    "block_idx",
    "scheduler",
    "grid_sizes",
    "softmax_scale",
    "max_seqlen_q",
    "max_seqlen_kv",
    "model_cls",
}


def register(
    schedule: StepSchedule | WindowTable,
    *,
    num_layers: int,
    dense_layers: Collection[int] = (),
    dense_steps: int | Collection[int] = 0,
    dense_type: str = "flash_attn3",
    name: str = "fps_attn",
    backend: str = "auto",
) -> type:
    """Add FPSAttention to LightX2V's attention types. It is for self-attention (self_attn_1_type) of Wan's models.

    Args:
        schedule: the config of each stage, by the scheduler's step_index and infer_steps; or a table of windows for
            each step, block and head, whose num_steps, num_layers, heads and grid must be LightX2V's.
        num_layers: blocks of the transformer, `num_layers` of its configuration.
        dense_layers: blocks that run `dense_type` instead; -1 is the last.
        dense_steps: steps that run it: a number of first steps, or a collection of steps.
        dense_type: a registered attention type of LightX2V.
        name: of the new attention type. A second name allows a second schedule.
        backend: as in `fpsattention.attention`.

    Returns the registered class; LightX2V calls its `apply`.
    Raises TypeError or ValueError that name the argument, its value, the rule and the nearest legal value. During a
    forward: RuntimeError when LightX2V does not pass block, step and grid, or passes illegal ones, or when a gradient
    is required; ValueError when it asks for what FPSAttention does not have (masks, cross-attention, packed sequences,
    tokens in another order, anything unknown). It never runs dense attention unless asked to.
    """
    num_layers = as_int("num_layers", num_layers, 1)
    check_schedule(schedule, "the model", num_layers=num_layers)
    own_layers, own_steps = as_dense_layers(dense_layers, num_layers), as_dense_steps(dense_steps)
    for argument, value, wanted in (("dense_type", dense_type, True), ("name", name, False)):
        if not isinstance(value, str):
            raise TypeError(f"{argument}: {shown(value)} must be a string")
        if (value in ATTN_WEIGHT_REGISTER) is not wanted:
            rule = "must be one of" if wanted else "must be none of"
            raise ValueError(f"{argument}: {shown(value)} {rule} {sorted(ATTN_WEIGHT_REGISTER.keys())}")
    check_backend(backend)

    @ATTN_WEIGHT_REGISTER(name)
    class FPSAttnWeight(AttnWeightTemplate):
        def __init__(self, weight_name: str = name):
            super().__init__(weight_name)
            self.dense = ATTN_WEIGHT_REGISTER[dense_type]()

        def apply(self, q: Tensor, k: Tensor, v: Tensor, **kwargs) -> Tensor:
            """q, k, v: [L, H, D], one sequence in raster order. Returns [L, H * D]."""
            if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
                raise RuntimeError(
                    f"q, k, v: require a gradient, but {name} is for inference: it reads the step from LightX2V's "
                    f"scheduler, which has moved on when a backward recomputes a layer; call it under torch.no_grad()"
                )
            block, step, num_steps, grid = _place_of(name, kwargs)
            if block >= num_layers:
                raise ValueError(f"num_layers: {num_layers} was given, but there is a block {block}")
            config = step_configs(schedule, own_steps, num_steps)[step]
            if config is None or block in own_layers:
                return self.dense.apply(q, k, v, **kwargs)
            if isinstance(config, tuple):
                config = config[block]
            _check_call(name, q, k, v, grid, kwargs)
            check_schedule(schedule, "the video", grid=grid)
            check_schedule(schedule, "the model", heads=q.shape[1])
            scale = kwargs.get("softmax_scale")
            out = attention(q[None], k[None], v[None], grid=grid, config=config, scale=scale, backend=backend)
            return cast(Tensor, out)[0].flatten(1)

    return FPSAttnWeight


def _place_of(name: str, kwargs: dict[str, Any]) -> tuple[int, int, int, Triple]:
    """(block, step, number of steps, grid) of a call. Raises RuntimeError when LightX2V does not pass one or passes an
    illegal value.
    """
    scheduler = kwargs.get("scheduler")
    said: dict[str, Any] = {
        "block_idx": kwargs.get("block_idx"),
        "scheduler.step_index": getattr(scheduler, "step_index", None),
        "scheduler.infer_steps": getattr(scheduler, "infer_steps", None),
        "grid_sizes": kwargs.get("grid_sizes"),
    }
    missing = [what for what, value in said.items() if value is None]
    if missing:
        raise RuntimeError(
            f"{', '.join(missing)}: LightX2V did not say; {name} is for the self-attention of Wan's models "
            f"(self_attn_1_type) in LightX2V of 2026-08 or later"
        )
    block, step, num_steps, grid = said.values()
    try:
        block = as_int("block_idx", block, 0)
        num_steps = as_int("scheduler.infer_steps", num_steps, 1)
        step = as_int("scheduler.step_index", step, 0, num_steps - 1)
        return block, step, num_steps, as_triple("grid_sizes", grid, 0)
    except (TypeError, ValueError) as error:
        raise RuntimeError(f"{error} (as LightX2V said it)") from error


def _check_call(name: str, q: Tensor, k: Tensor, v: Tensor, grid: Triple, kwargs: dict[str, Any]) -> None:
    """Raises ValueError when a call asks for more than attention among all tokens of the grid."""
    for key, value in kwargs.items():
        if key in ("cu_seqlens_q", "cu_seqlens_kv"):
            if value is not None and not _is_one_sequence(value, len(q)):
                raise ValueError(
                    f"{key}: {shown(value)} must be [0, {len(q)}]; {name} takes one sequence, of all tokens"
                )
        elif key not in KNOWN and (isinstance(value, Tensor) or value):  # None, False and 0 ask for nothing
            raise ValueError(f"{key}: {shown(value)} was given, but {name} does not know what to do with it")
    if not q.shape == k.shape == v.shape or q.shape[0] != math.prod(grid):
        raise ValueError(
            f"grid_sizes: {grid} has {math.prod(grid)} tokens, but q, k, v have shapes {tuple(q.shape)}, "
            f"{tuple(k.shape)}, {tuple(v.shape)}"
        )


def _is_one_sequence(cu_seqlens: Tensor | list[int], length: int) -> bool:
    """Whether cumulative lengths, from 0, are those of a single sequence. Only their number counts on a GPU, where
    reading them would wait for it, and in torch.compile.
    """
    ends = torch.as_tensor(cu_seqlens)
    if not ends.is_cpu or torch.compiler.is_compiling():
        return ends.numel() == 2
    return ends.tolist() == [0, length]
