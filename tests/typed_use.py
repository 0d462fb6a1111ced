"""The public interface as a typed program uses it. `make lint` checks the types; nothing runs this."""

from pathlib import Path

import torch
from torch import Tensor
from typing_extensions import assert_type

import fpsattention as fps
from fpsattention.core import ops


def attention(q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> None:
    grid = (21, 45, 80)
    config = fps.AttentionConfig(tile=(7, 9, 2), window=((3, 3, 9), (1, 1, 1)), border="truncate")
    name, reason = fps.backend_for(q, config)
    assert_type(name, str)
    assert_type(reason, str)
    result = fps.attention(q, k, v, grid=grid, config=config, suffix_len=226, suffix_valid=valid)
    assert_type(result, Tensor | tuple[Tensor, Tensor])
    quantized = fps.quantize_qkv(q, k, v, grid=grid, config=config)
    assert_type(quantized, fps.QuantizedQKV)
    fps.attention(quantized, return_lse=True)
    assert_type(fps.attention(q, k, v, tensor_layout="HND"), Tensor | tuple[Tensor, Tensor])


def plans_and_schedules(q: Tensor, path: Path) -> None:
    grid = [21, 45, 80]
    resolved = fps.AttentionConfig().resolve(grid, heads=40)
    assert_type(resolved.density, float)
    assert_type(resolved.tile, tuple[int, int, int])
    assert_type(fps.plan(grid), fps.Plan)
    assert_type(fps.plan(grid, density=0.1, heads=40).best.window, tuple[int, int, int] | None)
    assert_type(fps.plan(grid).explain(fps.AttentionConfig(), heads=40), str)
    config = fps.AttentionConfig(tile=(7, 9, 2))
    choosing = fps.AttentionConfig(tile=(7, 9, 2), select=fps.TopTiles(0.1, always=(1, 3, 3)))
    assert_type(fps.select_tiles(q, q, grid=grid, config=choosing), fps.KeyTiles)
    schedule = fps.StepSchedule(early=config, mid=config, late=config, alpha=(0.2, 0.8))
    assert_type(schedule.at(step=3, num_steps=50), fps.AttentionConfig)
    assert_type(schedule.for_sigma(0.9, shift=5.0), fps.AttentionConfig)
    assert_type(schedule.group_by_stage(torch.rand(4), shift=5.0), dict[str, Tensor])
    assert_type(fps.preset("wan2.1-14b-720p", num_steps=4).schedule, fps.StepSchedule)
    table = fps.WindowTable.load(path)
    assert_type(table, fps.WindowTable)
    assert_type(table.at(step=3, layer=7), fps.AttentionConfig)
    assert_type(table.densities(), list[list[float]])


def the_launches(q: Tensor, k: Tensor, v: Tensor) -> None:
    sizes = 1, 40, 128, torch.bfloat16, 0.125, "NHD"
    call = ops.call_of(fps.AttentionConfig(), (21, 45, 80), 0, 0, *sizes)
    packed = ops.launch_quantize(call, q, k, v, None, None)
    assert_type(packed, Tensor)
    assert_type(ops.launch_attend(call, packed, None, None, None, None), tuple[Tensor, Tensor | None])
