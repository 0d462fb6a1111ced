"""FPSAttention in LightX2V: `register` adds an attention type, which a model's configuration then names.

    fpsattention.integrations.lightx2v.register(schedule, num_layers=40, dense_layers=(0, -1), dense_steps=2)
    # before the model is built; in its JSON: "self_attn_1_type": "fps_attn"

Written for the interface of LightX2V at f8aee98 (2026-08-21): Wan's blocks give an attention type their number, the
scheduler and the token grid.
"""

from __future__ import annotations

import math
from collections.abc import Collection

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


# What LightX2V passes that is used, or that one unmasked sequence in raster order has no use for.
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
        dense_steps: steps that run it: so many from the first, or a collection of them.
        dense_type: a registered attention type of LightX2V.
        name: under which to register. Another name allows another schedule beside it.
        backend: as in `fpsattention.attention`.

    Returns the registered class; its `apply` is what LightX2V calls.
    Raises TypeError or ValueError that name the argument, its value, the rule and the nearest legal value. During a
    forward: RuntimeError when LightX2V does not say block, step or grid, or says what is none, or when a gradient is
    required; ValueError when it asks for what FPSAttention has not (masks, cross-attention, packed sequences, tokens in
    another order, anything unknown). It never runs dense attention unasked.
    """
    num_layers = as_int("num_layers", num_layers, 1)
    check_schedule(schedule, "the model", num_layers=num_layers)
    dense_layers, dense_steps = as_dense_layers(dense_layers, num_layers), as_dense_steps(dense_steps)
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
            block, step, num_steps, grid = _said(name, kwargs)
            if block >= num_layers:
                raise ValueError(f"num_layers: {num_layers} was given, but there is a block {block}")
            config = step_configs(schedule, dense_steps, num_steps)[step]
            if config is None or block in dense_layers:
                return self.dense.apply(q, k, v, **kwargs)
            if isinstance(config, tuple):
                config = config[block]
            for key, value in kwargs.items():
                if key in ("cu_seqlens_q", "cu_seqlens_kv"):
                    if value is not None and not _is_one_sequence(value, len(q)):
                        raise ValueError(
                            f"{key}: {shown(value)} must be [0, {len(q)}]; {name} takes one sequence, of all tokens"
                        )
                elif key not in KNOWN and (
                    isinstance(value, Tensor) or value
                ):  # None, False and 0 ask for nothing
                    raise ValueError(
                        f"{key}: {shown(value)} was given, but {name} does not know what to do with it"
                    )
            if not q.shape == k.shape == v.shape or q.shape[0] != math.prod(grid):
                raise ValueError(
                    f"grid_sizes: {grid} has {math.prod(grid)} tokens, but q, k, v have shapes {tuple(q.shape)}, "
                    f"{tuple(k.shape)}, {tuple(v.shape)}"
                )
            check_schedule(schedule, "the video", grid=grid)
            check_schedule(schedule, "the model", heads=q.shape[1])
            scale = kwargs.get("softmax_scale")
            out = attention(q[None], k[None], v[None], grid=grid, config=config, scale=scale, backend=backend)
            return out[0].flatten(1)

    return FPSAttnWeight


def _said(name: str, kwargs: dict) -> tuple[int, int, int, Triple]:
    """(block, step, number of steps, grid). Raises RuntimeError when LightX2V does not say one or says what is none."""
    scheduler = kwargs.get("scheduler")
    said = {
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


def _is_one_sequence(cu_seqlens: Tensor | list[int], length: int) -> bool:
    """Whether cumulated lengths, from 0, are those of one sequence. On a GPU, where looking would stop the device, and
    in torch.compile, only their number counts.
    """
    ends = torch.as_tensor(cu_seqlens)
    if not ends.is_cpu or torch.compiler.is_compiling():
        return ends.numel() == 2
    return ends.tolist() == [0, length]
