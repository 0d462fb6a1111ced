"""FPSAttention in the video transformers of diffusers, by their own processors and by those that fuse, on the CPU."""

from __future__ import annotations

import os

import pytest
import torch
import torch.nn.functional as F

import brute
import fpsattention as fps

try:
    import tiny_transformers as tiny
    from fpsattention.integrations.diffusers import enable, transformer
except ImportError as error:  # not installed, or a version that is too old
    if os.environ.get("CI"):
        raise
    pytest.skip(str(error), allow_module_level=True)

EXACT = fps.AttentionConfig(quant="none")
WINDOW = fps.AttentionConfig(tile=(1, 2, 3), window=(3, 1, 1), quant="none")
NARROW = fps.AttentionConfig(tile=(1, 2, 2), window=(1, 1, 1), quant="none")

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:fpsattention runs its reference"),
    pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning"),  # Mochi's, of float32
]


def same(config: fps.AttentionConfig) -> fps.StepSchedule:
    return fps.StepSchedule(config, config, config)


def no_fused(monkeypatch) -> None:
    """As with a version of diffusers that was not compared."""
    monkeypatch.setattr(transformer, "FUSED", {})


@pytest.fixture(params=tiny.CASES)
def case(request) -> tiny.Case:
    return tiny.CASES[request.param]()


@pytest.fixture(params=["the best way", "the general way"])
def way(request, monkeypatch) -> str:
    if request.param == "the general way":
        no_fused(monkeypatch)
    return request.param


def close(ours: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=2e-5 * expected.abs().max().item())


@torch.no_grad()
def test_dense_and_unrounded_equals_the_host(case, way):
    stock = case.run()
    handle = enable(case.transformer, same(EXACT), shift=1.0)
    close(case.run(), stock)
    assert len(handle.report(num_steps=1).rows[0].layers) == case.layers
    handle.remove()
    assert torch.equal(case.run(), stock)


@torch.no_grad()
def test_a_window_is_that_window_in_the_hosts_own_attention(case, way, monkeypatch):
    """The oracle is the host with a mask over its video tokens; others see all and are seen by all."""
    handle = enable(case.transformer, same(WINDOW), shift=1.0)
    ours = case.run()
    handle.remove()
    dense = case.run()
    video = brute.token_mask(tiny.GRID, WINDOW.tile, WINDOW.window, WINDOW.border)
    sdpa, masked_calls = F.scaled_dot_product_attention, []

    def masked(query, key, value, attn_mask=None, **kwargs):
        others = query.shape[2] - len(video)
        if query.shape == key.shape and case.before <= others <= case.before + case.after:
            window = F.pad(video, (case.before, others - case.before) * 2, value=True)
            attn_mask = window if attn_mask is None else attn_mask & window
            masked_calls.append(query.shape)
        return sdpa(query, key, value, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", masked)
    expected = case.run()
    assert len(masked_calls) >= case.layers
    close(ours, expected)
    assert (expected - dense).abs().max() > 1e-3 * dense.abs().max()
