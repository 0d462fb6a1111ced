"""fpsattention.integrations.lightx2v against the part of LightX2V's interface that it uses (stub_lightx2v.py)."""

from __future__ import annotations

import importlib.util
import sys
import threading
from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import pytest
import torch

import fpsattention as fps
from stub_lightx2v import TorchSDPAWeight

NARROW = fps.AttentionConfig(tile=(1, 2, 2), window=(1, 1, 1), quant="none")
NO_WINDOW = fps.AttentionConfig(tile=(1, 2, 2), quant="none")
WIDE = fps.AttentionConfig(tile=(1, 2, 2), window=(1, 3, 3), quant="none")
STAGES = fps.StepSchedule(NARROW, fps.AttentionConfig(tile=(2, 2, 2)), WIDE, alpha=(0.4, 0.8))
GRID = (3, 4, 6)

pytestmark = pytest.mark.filterwarnings("ignore:fpsattention runs its reference")


@pytest.fixture
def register(registry):
    module = importlib.import_module("fpsattention.integrations.lightx2v")
    return lambda *args, **kwargs: module.register(
        *args, **{"num_layers": 4, "dense_type": "torch_sdpa"} | kwargs
    )


@pytest.fixture
def qkv() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(72, 2, 64, generator=generator) for _ in range(3)]


def call(layer, qkv, *, step=0, block=1, **kwargs):
    """Call a layer as a Wan block calls its self_attn_1."""
    cu_seqlens = torch.tensor([0, 72], dtype=torch.int32)
    given = {
        "cu_seqlens_q": cu_seqlens,
        "cu_seqlens_kv": cu_seqlens,
        "max_seqlen_q": 72,
        "max_seqlen_kv": 72,
        "block_idx": block,
        "scheduler": SimpleNamespace(step_index=step, infer_steps=5),
        "grid_sizes": GRID,
    }
    q, k, v = qkv
    return layer.apply(q=q, k=k, v=v, **given | kwargs)


def test_each_step_and_block_runs_what_the_schedule_says(register, registry, qkv):
    register(STAGES, dense_layers=[-1], dense_steps=[1])
    layer = registry["fps_attn"]()
    batch = [x[None] for x in qkv]
    dense = TorchSDPAWeight().apply(*qkv)
    for step in range(5):
        for block in range(4):
            if step == 1 or block == 3:
                expected = dense
            else:
                config = STAGES.at(step=step, num_steps=5)
                expected = fps.attention(*batch, grid=GRID, config=config)[0].flatten(1)
                assert step in (2, 3) or (expected - dense).abs().max() > 0.1
            torch.testing.assert_close(call(layer, qkv, step=step, block=block), expected)
    assert len(layer.dense.calls) == 4 + 4
    assert {x["block_idx"] for x in layer.dense.calls} == {
        0,
        1,
        2,
        3,
    } and "max_seqlen_q" in layer.dense.calls[0]


def test_forwards_in_flight(register, registry, qkv):
    """A layer keeps no state between calls: two schedulers are at different steps, in threads that take turns."""
    register(STAGES)
    layer = registry["fps_attn"]()
    expected = {step: call(layer, qkv, step=step) for step in (0, 4)}
    barrier, outs = threading.Barrier(2, timeout=60), {0: [], 4: []}

    def run(step):
        for _ in range(3):
            barrier.wait()
            outs[step].append(call(layer, qkv, step=step))

    threads = [threading.Thread(target=run, args=(step,)) for step in outs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not torch.equal(expected[0], expected[4])
    for step in outs:
        assert len(outs[step]) == 3 and all(torch.equal(out, expected[step]) for out in outs[step])


def test_no_gradient(register, registry, qkv):
    """A recomputation would read the scheduler at a later step."""
    register(STAGES)
    layer = registry["fps_attn"]()
    q, k, v = qkv
    with pytest.raises(RuntimeError, match="fps_attn is for inference.*torch.no_grad"):
        call(layer, (q, k, v.clone().requires_grad_()))
    with torch.no_grad():
        call(layer, (q, k, v.clone().requires_grad_()))


def test_each_step_and_block_runs_the_windows_of_a_table(register, registry, qkv):
    """5 steps, 4 blocks, 2 heads; no two blocks or steps alike."""
    pairs = list(product(product((1, 3), (1, 2), (1, 3)), repeat=2))
    windows = [[pairs[3 * (4 * step + block)] for block in range(4)] for step in range(5)]
    register(fps.WindowTable(GRID, NO_WINDOW, windows), dense_layers=[-1], dense_steps=[1])
    layer = registry["fps_attn"]()
    batch = [x[None] for x in qkv]
    for step in (0, 2, 3, 4):
        for block in range(3):
            config = replace(NO_WINDOW, window=windows[step][block])
            expected = fps.attention(*batch, grid=GRID, config=config)[0].flatten(1)
            assert torch.equal(call(layer, qkv, step=step, block=block), expected)
    assert not layer.dense.calls
    call(layer, qkv, step=1, block=0)
    call(layer, qkv, step=0, block=3)
    assert len(layer.dense.calls) == 2


@pytest.mark.parametrize(
    "grid, steps, heads, error",
    [
        ((3, 4, 8), 5, 2, r"table's grid is \(3, 4, 8\), .* the video; nearest legal value \(3, 4, 6\)"),
        (GRID, 6, 2, "num_steps: 5 is not the table's, 6"),
        (GRID, 5, 3, "table's heads is 3, .* the model; nearest legal value 2"),
    ],
)
def test_table_of_another_run(register, qkv, grid, steps, heads, error):
    """All windows are equal, so the config alone would fit any number of heads."""
    table = fps.WindowTable(grid, NO_WINDOW, [[[(1, 1, 1)] * heads] * 4] * steps)
    with pytest.raises(ValueError, match=error):
        call(register(table)(), qkv)


def test_scale_goes_through(register, qkv):
    layer = register(STAGES)()
    expected = fps.attention(*(x[None] for x in qkv), grid=GRID, config=NARROW, scale=0.5)[0].flatten(1)
    torch.testing.assert_close(call(layer, qkv, softmax_scale=0.5), expected)


@pytest.mark.parametrize(
    "kwargs, error",
    [
        ({"block_idx": 4}, "num_layers: 4 was given, but there is a block 4"),
        ({"grid_sizes": (3, 4, 5)}, r"grid_sizes: \(3, 4, 5\) has 60 tokens"),
        ({"cu_seqlens_kv": torch.tensor([0, 36, 72])}, r"cu_seqlens_kv: .* must be \[0, 72\]"),
        ({"cu_seqlens_q": torch.tensor([0, 36])}, r"cu_seqlens_q: .* must be \[0, 72\]"),
        ({"cu_seqlens_q": [0, 36, 72]}, r"cu_seqlens_q: \[0, 36, 72\] must be \[0, 72\]"),
        ({"causal": True}, "causal: True was given"),
        ({"sol_morton_preordered": True}, "sol_morton_preordered: True was given"),
        ({"attn_mask": torch.ones(72, 72)}, "attn_mask: "),
    ],
)
def test_what_it_cannot_do_raises(register, qkv, kwargs, error):
    with pytest.raises(ValueError, match=error):
        call(register(STAGES)(), qkv, **kwargs)


@pytest.mark.parametrize(
    "kwargs, error",
    [
        ({"grid_sizes": None}, "grid_sizes: LightX2V did not say"),
        ({"scheduler": None, "block_idx": None}, "block_idx, scheduler.step_index, .*: LightX2V did not say"),
        ({"scheduler": SimpleNamespace(step_index=0)}, "scheduler.infer_steps: LightX2V did not say"),
        ({"step": None}, "scheduler.step_index: LightX2V did not say"),
        ({"step": -1}, "scheduler.step_index: -1 must be an integer, at least 0 and at most 4"),
        ({"step": 7}, "scheduler.step_index: 7 must be .* at most 4"),
        ({"block_idx": -1}, "block_idx: -1 must be an integer, at least 0"),
        ({"grid_sizes": (3.5, 4.2, 6.1)}, r"grid_sizes: \(3.5, 4.2, 6.1\) must be three integers"),
    ],
)
def test_what_lightx2v_must_say(register, qkv, kwargs, error):
    with pytest.raises(RuntimeError, match=error):
        call(register(STAGES)(), qkv, **kwargs)


def test_sequence_lengths_in_a_list(register, qkv):
    layer = register(STAGES)()
    assert torch.equal(call(layer, qkv, cu_seqlens_q=[0, 72]), call(layer, qkv))


@pytest.mark.parametrize(
    "kwargs, error",
    [
        ({"schedule": NARROW}, "schedule: .* must be a StepSchedule"),
        (
            {"schedule": fps.WindowTable(GRID, NO_WINDOW, [[[(1, 1, 1)] * 2] * 3])},
            "table's num_layers is 3, .* nearest legal value 4",
        ),
        ({"dense_layers": [4]}, "dense_layers: 4 must be from -4 to 3"),
        ({"dense_type": "flash_attn9"}, r"dense_type: 'flash_attn9' must be one of \['torch_sdpa'\]"),
        ({"dense_type": None}, "dense_type: None must be a string"),
        ({"name": "torch_sdpa"}, r"name: 'torch_sdpa' must be none of \['torch_sdpa'\]"),
        ({"name": 3}, "name: 3 must be a string"),
        ({"name": ["x"]}, r"name: \['x'\] must be a string"),
        ({"num_layers": 0}, "num_layers: 0 must be an integer, at least 1; nearest legal value 1"),
        ({"num_layers": "4"}, "num_layers: '4' must be an integer"),
        ({"num_layers": 4.0}, "num_layers: 4.0 must be an integer"),
        ({"backend": "bogus"}, "backend: 'bogus' must be one of .*sm90"),
    ],
)
def test_bad_arguments(register, registry, kwargs, error):
    with pytest.raises((TypeError, ValueError), match=error):
        register(**{"schedule": STAGES} | kwargs)
    assert list(registry) == ["torch_sdpa"]


@pytest.mark.skipif(importlib.util.find_spec("lightx2v") is not None, reason="LightX2V is installed")
def test_without_lightx2v(monkeypatch):
    monkeypatch.delitem(sys.modules, "fpsattention.integrations.lightx2v", raising=False)
    with pytest.raises(ModuleNotFoundError, match="lightx2v is not installed"):
        importlib.import_module("fpsattention.integrations.lightx2v")
