"""Presets: each is legal on its model's grid and as its module says that it was chosen."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import fpsattention as fps
from fpsattention.schedules.models import MODELS
from fpsattention.schedules.presets import WINDOWS
from fpsattention.schedules.schedule import STAGES

ROOT = Path(__file__).resolve().parent.parent
NAMES = pytest.mark.parametrize("name", MODELS)


def resolved(preset: fps.Preset) -> dict:
    """The config of each stage on the model's video and text tokens."""
    return {stage: preset.model.resolve(getattr(preset.schedule, stage)) for stage in STAGES}


def stages(preset: fps.Preset) -> list[str]:
    return [preset.schedule.stage(step=i, num_steps=preset.num_steps) for i in range(preset.num_steps)]


def test_every_model_has_one():
    assert list(WINDOWS) == list(MODELS)


@NAMES
def test_densities(name):
    """Early dense, mid about a half of all pairs, late about a third; all wider than the small model's windows."""
    preset = fps.preset(name)
    early, mid, late = resolved(preset).values()
    assert early.density == 1
    assert 0.45 < mid.density < 0.6
    assert 0.3 < late.density < 0.45
    assert late.density < mid.density
    assert preset.dense_layers == (0,)


@NAMES
def test_no_window_cuts_the_video_in_parts(name):
    for config in resolved(fps.preset(name)).values():
        assert config.tile == fps.preset(name).schedule.early.tile
        (window,) = config.windows
        for seen, tiles in zip(window, config.geometry.tiles, strict=True):
            assert seen == tiles or seen >= 3


@NAMES
@pytest.mark.parametrize("density", [1 / 2, 1 / 3])
def test_the_tile_is_a_fast_one(name, density):
    """At the density, the expected time is at most 12 % above that of the fastest tile, whatever the windows."""
    model = MODELS[name]
    plan = fps.plan(model.grid, density=density, heads=model.heads, head_dim=model.head_dim, top=10_000)
    slowdown = {choice.tile: choice.slowdown for choice in plan.candidates}
    assert slowdown[fps.preset(name).schedule.mid.tile] < 1.12


FEW = {
    1: ["early"],
    2: ["early", "late"],
    3: ["early", "mid", "late"],
    4: ["early", "mid", "mid", "late"],
    5: ["early", "mid", "mid", "mid", "late"],
    6: ["early", *["mid"] * 4, "late"],
    7: ["early", *["mid"] * 5, "late"],
    8: ["early", *["mid"] * 6, "late"],
}


@pytest.mark.parametrize("num_steps", FEW)
@pytest.mark.parametrize("shift", [1.0, 3.0, 8.0])
def test_few_steps(num_steps, shift):
    """The first and the last step are dense, by step and by the noise level that the sampler starts the step from."""
    preset = fps.preset("wan2.1-1.3b-480p", num_steps=num_steps)
    assert stages(preset) == FEW[num_steps]
    dense = [preset.schedule.at(step=i, num_steps=num_steps).window is None for i in range(num_steps)]
    assert dense[0] and dense[-1] and not any(dense[1:-1])
    assert preset.schedule.mid == fps.preset("wan2.1-1.3b-480p").schedule.mid
    for i, stage in enumerate(FEW[num_steps]):
        u = 1 - i / num_steps
        assert preset.schedule.stage_for_sigma(shift * u / (1 + (shift - 1) * u), shift=shift) == stage


@pytest.mark.parametrize("num_steps", [9, 20, 50])
def test_many_steps(num_steps):
    preset = fps.preset("mochi", num_steps=num_steps)
    assert preset.schedule.alpha == (0.2, 0.8)
    counts = [stages(preset).count(stage) for stage in STAGES]
    assert counts[0] == -(-num_steps // 5) and counts[1] > counts[2] > 0
    assert preset.schedule.late.window == WINDOWS["mochi"][2]


def test_wrong_arguments():
    with pytest.raises(ValueError, match="model 'wan2.1-14b': is unknown; nearest: .*wan2.1-14b-720p"):
        fps.preset("wan2.1-14b")
    with pytest.raises(TypeError, match="model 3: must be a name, for example 'wan2.1-1.3b-480p'"):
        fps.preset(3)
    with pytest.raises(ValueError, match="num_steps: 0 must be an integer, at least 1"):
        fps.preset("mochi", num_steps=0)


def test_explained():
    preset = fps.preset("wan2.1-14b-720p", num_steps=4)
    text = preset.explain()
    assert text.startswith("wan2.1-14b-720p, 81 frames of 1280 x 720\n")
    assert preset.schedule.explain(4, (21, 45, 80), 40) in text
    assert text.endswith("layers with the host's own attention: 0\nnot trained with: measure your own model")


def test_the_table_of_the_documentation():
    text = (ROOT / "docs/schedule.md").read_text()
    rows = re.findall(r"^\| `(\S+)` \| (.+) \|$", text, re.MULTILINE)
    expected = []
    for name in MODELS:
        configs = resolved(fps.preset(name))
        by = [",".join(map(str, x)) for x in (configs["mid"].tile, *WINDOWS[name][1:])]
        densities = (f"{configs[stage].density:.2f}" for stage in ("mid", "late"))
        mid, late = (f"{window} ({density})" for window, density in zip(by[1:], densities, strict=True))
        expected.append((name, f"{by[0]} | {mid} | {late}"))
    assert rows == expected
