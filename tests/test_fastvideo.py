"""fpsattention.integrations.fastvideo against the part of FastVideo's interface that it uses (stub_fastvideo.py)."""

from __future__ import annotations

import importlib
from dataclasses import replace

import pytest
import torch
from torch import nn

import fpsattention as fps
import stub_fastvideo as stub

NARROW = fps.AttentionConfig((1, 2, 2), (1, 1, 1), quant="none")
OF_HEADS = fps.AttentionConfig((1, 2, 2), ((1, 1, 3), (3, 2, 1)), quant="none")
EXACT = fps.AttentionConfig(quant="none")
STAGES = fps.StepSchedule(NARROW, OF_HEADS, EXACT)
SAME = fps.StepSchedule(EXACT, EXACT, EXACT)
EARLY, MID, LATE = 999.0, 600.0, 1.0

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:fpsattention runs its reference"),
]


@pytest.fixture
def place(monkeypatch) -> stub.Place:
    return stub.install(monkeypatch)


@pytest.fixture
def fastvideo(place):
    return importlib.import_module("fpsattention.integrations.fastvideo")


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return stub.WanTransformer3DModel()


def run(model, *timesteps: float) -> torch.Tensor:
    g = torch.Generator().manual_seed(1)
    latents = torch.randn(1, 4, 3, 8, 12, generator=g).expand(len(timesteps), -1, -1, -1, -1)
    weight = model.patch_embedding.weight
    return model(latents.to(weight), None, torch.tensor(timesteps, device=weight.device))


def far(x: torch.Tensor, y: torch.Tensor) -> bool:
    return bool((x - y).abs().max() > 1e-2 * y.abs().max())


def test_dense_and_unrounded_is_the_host(fastvideo, model):
    stock = run(model, MID)
    handle = fastvideo.enable(model, SAME, shift=3.0)
    torch.testing.assert_close(run(model, MID), stock)
    assert handle.grid == (3, 4, 6)
    handle.remove()
    handle.remove()
    assert torch.equal(run(model, MID), stock)


def test_each_sample_runs_the_stage_of_its_noise_level(fastvideo, model):
    stock = run(model, LATE)
    handle = fastvideo.enable(model, STAGES, shift=1.0, dense_layers=[-1])
    mixed = run(model, MID, EARLY, LATE)
    for i, timestep in enumerate((MID, EARLY, LATE)):
        torch.testing.assert_close(mixed[i : i + 1], run(model, timestep))
    torch.testing.assert_close(mixed[2:], stock)
    assert far(mixed[1:2], stock) and far(mixed[:1], stock) and far(mixed[1:2], mixed[:1])
    handle.remove()
    fastvideo.enable(model, STAGES, shift=1.0)
    handle.remove()  # whose layers are gone
    assert far(run(model, EARLY), mixed[1:2]), "the last layer was dense"
    assert far(run(model, EARLY), stock)


def test_timestep_of_each_token(fastvideo, model):
    """Tokens of a given image have less noise than the others."""
    fastvideo.enable(model, STAGES, shift=1.0)
    expected = run(model, EARLY)
    g = torch.Generator().manual_seed(1)
    latents = torch.randn(1, 4, 3, 8, 12, generator=g)
    timestep = torch.full((1, 72), EARLY).index_fill(1, torch.arange(24), 0.0)
    torch.testing.assert_close(
        model(hidden_states=latents, encoder_hidden_states=None, timestep=timestep), expected
    )


def test_heads_of_each_process(fastvideo, place, model):
    outs = []
    model.blocks[0].attn1.register_forward_hook(lambda module, args, out: outs.append(out[0]))
    fastvideo.enable(model, STAGES, shift=1.0)
    run(model, MID)
    place.size = 2
    for place.rank in (0, 1):
        run(model, MID)
    alone, *ours = outs
    for rank, out in enumerate(ours):
        torch.testing.assert_close(out[:, :, rank], alone[:, :, rank])
        assert not out[:, :, 1 - rank].any()


def test_gradient_and_autocast(fastvideo, model):
    def gradient():
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            out = run(model, MID, EARLY)
        out.float().square().mean().backward()
        return model.blocks[0].to_qkv.weight.grad.clone()

    stock = gradient()
    fastvideo.enable(model, SAME, shift=3.0)
    ours = gradient()
    assert (ours - stock).norm() < 2e-2 * stock.norm()


@pytest.mark.gpu
def test_kernels(fastvideo, model):
    """Two stages in a batch, forward and gradient."""
    model.to("cuda", torch.bfloat16)
    stages = fps.StepSchedule(*(replace(config, quant="fp8") for config in (NARROW, OF_HEADS, EXACT)))

    def step(schedule, backend):
        model.zero_grad()
        handle = fastvideo.enable(model, schedule, shift=1.0, backend=backend)
        out = run(model, MID, EARLY)
        out.float().square().mean().backward()
        handle.remove()
        return out.detach().float(), model.blocks[0].to_qkv.weight.grad.float()

    ours, expected = step(stages, "sm90"), step(stages, "reference")
    other = step(fps.StepSchedule(stages.late, stages.early, stages.late), "sm90")
    for x, y, z in zip(ours, expected, other, strict=True):
        assert (x - y).norm() < min(0.03 * y.norm(), (z - y).norm() / 3)


def test_what_cannot_be_enabled(fastvideo, model):
    enable = fastvideo.enable
    with pytest.raises(
        ValueError, match="transformer: is a Linear; it must be FastVideo's WanTransformer3DModel"
    ):
        enable(nn.Linear(1, 1), STAGES, shift=1.0)
    with pytest.raises(TypeError, match="schedule: .* must be a StepSchedule"):
        enable(model, NARROW, shift=1.0)
    with pytest.raises(ValueError, match="shift: 0"):
        enable(model, STAGES, shift=0)
    with pytest.raises(ValueError, match="dense_layers: 2 must be from -2 to 1"):
        enable(model, STAGES, shift=1.0, dense_layers=[2])
    with pytest.raises(ValueError, match="backend: 'flash'"):
        enable(model, STAGES, shift=1.0, backend="flash")
    handle = enable(model, STAGES, shift=1.0)
    with pytest.raises(RuntimeError, match=r"FPSAttention is on in layer 0; call remove\(\)"):
        enable(model, STAGES, shift=1.0)
    handle.remove()
    model.blocks[1].attn1 = stub.DistributedAttention_VSA(2, 64)
    with pytest.raises(
        RuntimeError, match="layer 1 is a DistributedAttention_VSA .*FASTVIDEO_ATTENTION_BACKEND"
    ):
        enable(model, STAGES, shift=1.0)
    assert type(model.blocks[0].attn1.attn_impl) is stub.SDPAImpl, "none is changed unless all can be"


def test_no_silent_fallback(fastvideo, model):
    handle = fastvideo.enable(model, STAGES, shift=1.0)
    with torch.no_grad():
        run(model, MID)
        with pytest.raises(RuntimeError, match="outside of its transformer's forward"):
            model.forward(torch.zeros(1, 4, 3, 8, 12), None, torch.tensor([MID]))
    attn = model.blocks[1].attn1
    attn.attn_impl = attn.attn_impl.replaced
    with pytest.raises(RuntimeError, match="a layer's attention has become a SDPAImpl"):
        run(model, MID)
    handle.remove()
    run(model, MID)
    model.patch_size = (1, 2, 1)  # as if the host cut its patches in another way
    fastvideo.enable(model, STAGES, shift=1.0)
    with pytest.raises(ValueError, match=r"q: has 72 tokens .* grid \(3, 4, 12\) has 144"):
        run(model, MID)


def test_a_schedule_for_another_grid(fastvideo, model):
    fastvideo.enable(model, replace(STAGES, grid=(3, 4, 8)), shift=1.0)
    with pytest.raises(ValueError, match=r"schedule: is for the grid \(3, 4, 8\), but .* has \(3, 4, 6\)"):
        run(model, MID)


def test_a_version_that_was_not_compared(monkeypatch):
    stub.install(monkeypatch, "0.3.0")
    with pytest.raises(ImportError, match="fastvideo 0.3.0: .* compared with 0.2.1 only"):
        importlib.import_module("fpsattention.integrations.fastvideo")
