"""bench/bench_finetune.py, on the CPU and a small model: what is timed is a training step."""

from __future__ import annotations

import pytest
import torch

import fpsattention as fps
import imports

with imports.or_skip():
    import bench_finetune
    import tiny_diffusers as tiny
    from fpsattention.integrations.diffusers import processor

from fpsattention.schedules.models import MODELS

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:fpsattention runs its reference"),
]


@pytest.mark.parametrize("attention", bench_finetune.ATTENTIONS)
def test_a_step_trains_the_adapter_under_its_attention(monkeypatch, attention):
    calls, real = [], processor.attention
    monkeypatch.setattr(
        processor, "attention", lambda *args, **kw: calls.append(kw["config"]) or real(*args, **kw)
    )
    config = fps.AttentionConfig((1, 2, 2), (1, 1, 3))
    student = bench_finetune.student_of(tiny.wan_transformer(), config, False, torch.device("cpu"), "auto")
    before = {name: p.detach().clone() for name, p in student.parameters.items()}
    assert len(before) == 2 * 2 * 2 * 4  # A and B, layers, self- and cross-attention, targets
    arguments = {
        "hidden_states": torch.randn(1, 16, 3, 8, 12, generator=tiny.noise()),
        "encoder_hidden_states": tiny.embeds(8, 1),
        "timestep": torch.tensor([500.0]),
    }
    seconds, _ = bench_finetune.measure(student, arguments, attention, repeats=2)
    assert seconds > 0
    # Each layer attends in the forward and, under checkpointing, again in the backward: two layers, three steps.
    assert calls == ([config] * 12 if attention == "fps" else [])
    assert all(not torch.equal(before[name], p) for name, p in student.parameters.items() if "lora_B" in name)


def test_the_windows_are_narrow():
    for name, config in bench_finetune.CONFIGS.items():
        assert 0.1 < MODELS[name].resolve(config).density < 0.2
