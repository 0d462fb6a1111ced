"""The Python examples of README.md and docs/ run as written, but for the size of the video and the device.

An example sees the names that those above it on its page have left, and what its text says is there (`given`). Not run
are docs/many_gpus.md, which needs several processes, and docs/command-line.md, which needs files of other programs.
"""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import fpsattention as fps
import stub_fastvideo
from test_fp8_linears import tiny  # skips all without diffusers or torchao
from test_own_transformer import Transformer

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", *(f"docs/{x}.md" for x in ("index", "faq", "schedule", "hosts", "finetune")))
GRID = (7, 9, 4)
SMALLER = {'device="cuda"': 'device="cpu"', "75600": "252", "(21, 45, 80)": str(GRID)}

pytestmark = [
    pytest.mark.usefixtures("fp8_on_cpu"),
    pytest.mark.filterwarnings("ignore:fpsattention runs its reference"),
]


def examples(page: str) -> list[tuple[int, str]]:
    """(line, code)"""
    text = (ROOT / page).read_text()
    found = re.finditer(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return [(text[: x.start(1)].count("\n") + 1, x[1]) for x in found]


class Pipe(tiny.diffusers.WanPipeline):
    """Of GRID tokens, three layers of two heads, random weights and embeddings; a prompt is all it needs."""

    def __call__(self, prompt: str, **kwargs):
        size = {"height": 16 * GRID[1], "width": 16 * GRID[2], "num_frames": 4 * GRID[0] - 3}
        steps = {"num_inference_steps": 5, "output_type": "latent"}
        return super().__call__(**tiny.text(8) | size | steps | kwargs)


def new_pipe() -> Pipe:
    transformer = tiny.wan_transformer(num_layers=3).to(torch.bfloat16)
    pipe = Pipe(tokenizer=None, text_encoder=None, vae=None, scheduler=tiny.flow(), transformer=transformer)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def given() -> dict:
    config = fps.AttentionConfig((7, 9, 2), (3, 3, 3))
    qkv = torch.randn(3, 2, 252, 2, 64, generator=tiny.noise()).bfloat16()
    return {
        "fps": fps,
        "grid": GRID,
        "config": config,
        "schedule": fps.StepSchedule(config, config, config),
        "sigmas": torch.tensor([0.9, 0.1]),
        "prompt": "a cat",
        "transformer": stub_fastvideo.WanTransformer3DModel(layers=3),
        **dict(zip("qkv", qkv, strict=True)),
        **dict(zip("THW", GRID, strict=True)),
        "self": SimpleNamespace(qkv=nn.Linear(16, 3 * 2 * 64)),
        "x": torch.randn(1, 252, 16, generator=tiny.noise()),
        "heads": 2,
        "head_dim": 64,
    }


@pytest.mark.parametrize("page", PAGES)
def test_examples(page, tmp_path, monkeypatch, registry):
    monkeypatch.chdir(tmp_path)
    registry["flash_attn3"] = registry["torch_sdpa"]
    stub_fastvideo.install(monkeypatch)
    fps.WindowTable(GRID, fps.AttentionConfig((7, 9, 2)), [[[(1, 1, 1)] * 2] * 3] * 5).save("windows.json")
    names = given()
    fps.integrations.diffusers.save("runs/wan/model", new_pipe().transformer, names["schedule"], shift=3.0)
    for line, code in examples(page):
        for written, smaller in SMALLER.items():
            code = code.replace(written, smaller)
        names["pipe"] = new_pipe()
        # Lines of an error's traceback are the page's own.
        own = {"transformer": Transformer()} if "Description(" in code else {}
        exec(compile("\n" * (line - 1) + code, str(ROOT / page), "exec"), names | own if own else names)


@pytest.mark.parametrize("page", PAGES)
def test_there_are_examples(page):
    assert examples(page)
