"""bench/bench_wan.py: what is timed is the models of the catalogue, under legal schedules, in the right stages."""

from __future__ import annotations

import pytest
import torch

import imports

with imports.or_skip():
    import bench_wan

from fpsattention.schedules.models import MODELS

CASES = pytest.mark.parametrize("name", bench_wan.CASES)


@CASES
def test_sizes_are_those_of_the_catalogue(name):
    model, sizes = MODELS[name], bench_wan.CASES[name].sizes
    assert sizes["num_attention_heads"] == model.heads
    assert sizes["attention_head_dim"] == model.head_dim
    assert sizes["num_layers"] == model.layers


@CASES
def test_the_windows_see_what_the_module_says(name):
    case = bench_wan.CASES[name]
    schedule = case.schedule(name, 50)
    steps = bench_wan.steps_of_stage(schedule, 50)
    assert steps == {"early": 10, "mid": 30, "late": 10}
    density = sum(n * MODELS[name].resolve(getattr(schedule, s)).density for s, n in steps.items()) / 50
    assert 0.14 <= density <= 0.16


@CASES
@pytest.mark.parametrize("steps, expected", [(4, {"early": 1, "mid": 2, "late": 1}), (1, {"early": 1})])
def test_few_steps_run_the_preset(name, steps, expected):
    schedule = bench_wan.CASES[name].schedule(name, steps)
    assert bench_wan.steps_of_stage(schedule, steps) == expected
    assert MODELS[name].resolve(schedule.early).density == 1


@CASES
@pytest.mark.parametrize("steps", [50, 4])
def test_a_noise_level_of_each_stage_runs_its_config(name, steps):
    case = bench_wan.CASES[name]
    schedule = case.schedule(name, steps)
    for stage in bench_wan.steps_of_stage(schedule, steps):
        sigma = bench_wan.sigma_of_stage(schedule, stage, case.shift)
        assert schedule.for_sigma(sigma, shift=case.shift) is getattr(schedule, stage)


@CASES
def test_arguments_have_the_tokens_of_the_grid(name):
    model = MODELS[name]
    arguments = bench_wan.arguments_of(name, torch.device("cpu"), 0.25)
    _, channels, t, h, w = arguments["hidden_states"].shape
    assert (channels, t, h // 2, w // 2) == (bench_wan.CASES[name].sizes["in_channels"], *model.grid)
    assert arguments["timestep"].shape == ((1, model.tokens) if "ti2v" in name else (1,))
    assert arguments["timestep"].unique().tolist() == [250.0]
