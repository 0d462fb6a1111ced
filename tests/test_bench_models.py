"""The cases of bench/bench_models.py on the CPU: at real size up to the first forward, and whole with few layers."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

import fpsattention as fps
import imports
from fpsattention.schedules.models import MODELS

with imports.or_skip():
    import bench_models
    from fpsattention.integrations.diffusers.descriptions import description_of

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:fpsattention runs its reference"),
    pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning"),  # Mochi's, of float32
]

NAMES = pytest.mark.parametrize("name", bench_models.CASES)

FEW = {"num_layers": 1, "num_attention_heads": 2}
TINY = {
    "hunyuanvideo-720p": FEW | {"num_single_layers": 1},
    "hunyuanvideo1.5-720p": FEW,
    "cogvideox1.5-5b": FEW,
    "mochi": FEW,
    "ltx-video": FEW | {"cross_attention_dim": 128},
    "ltx-2": FEW
    | {"cross_attention_dim": 256, "audio_num_attention_heads": 2, "audio_cross_attention_dim": 128},
}
SMALL = {  # height, width, frames; the tokens (T, H, W)
    "hunyuanvideo-720p": ((64, 96, 9), (3, 4, 6)),
    "hunyuanvideo1.5-720p": ((64, 96, 9), (3, 4, 6)),
    "cogvideox1.5-5b": ((64, 96, 9), (2, 4, 6)),
    "mochi": ((64, 96, 13), (3, 4, 6)),
    "ltx-video": ((128, 192, 17), (3, 4, 6)),
    "ltx-2": ((128, 192, 17), (3, 4, 6)),
}


def tiny(name: str) -> bench_models.Case:
    """The case with few layers and heads, at its real size of video."""
    case = bench_models.CASES[name]
    return replace(case, transformer=partial(case.transformer, **TINY[name]))


@NAMES
def test_a_case_is_what_the_catalogue_says(name):
    case, model = bench_models.CASES[name], MODELS[name]
    transformer, inputs = bench_models.forward_of_a_step(tiny(name), "cpu")
    description = description_of(transformer, "transformer")
    assert description.grid(transformer.config, inputs) == model.grid
    others = tuple(count(transformer.config, inputs) for count in (description.before, description.after))
    assert others == model.text_lengths
    with torch.device("meta"):
        config = case.transformer().config
    assert (config.num_attention_heads, config.attention_head_dim) == (model.heads, model.head_dim)
    assert 0.13 < model.resolve(fps.AttentionConfig(case.tile, case.window)).density < 0.19


@NAMES
def test_the_contenders_run(name, monkeypatch):
    """Those of a tiny case on a small video. A graph break of what must be one graph raises."""
    size, grid = SMALL[name]
    case = replace(tiny(name), size=size, tile=(1, 2, 3), window=(1, 1, 1))
    model = replace(MODELS[name], grid=grid, heads=2)
    monkeypatch.setitem(MODELS, name, model)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    of_a_step = bench_models.forward_of_a_step
    monkeypatch.setattr(bench_models, "forward_of_a_step", lambda case: of_a_step(case, "cpu"))
    on_the_cpu = partial(bench_models.enable, backend="reference")
    monkeypatch.setattr(bench_models, "enable", lambda *args, backend, **kwargs: on_the_cpu(*args, **kwargs))
    results = bench_models.measure(name, case, repeats=1)
    assert [x.name for x in results] == ["stock", "fps", "stock, compiled", "fps, compiled"]
    density = model.resolve(fps.AttentionConfig(case.tile, case.window)).density
    assert [x.density for x in results] == [1, density, 1, density]
    assert all(x.tokens == model.tokens and x.seconds > 0 for x in results)
