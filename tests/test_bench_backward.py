"""The bench of the backward without a GPU: stand-ins for the contenders, on small tensors."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import bench_backward
import bench_block
import bench_forward
import bench_text
import common
import contenders
import fpsattention as fps
from fpsattention.cli import video
from shapes import Shape

WINDOW = (1, 1, 1)
OWN = (common.OURS, common.OURS_DETERMINISTIC)
SHAPE = Shape("t", (4, 6, 8), 2, (2, 3, 4), (None,), head_dim=64, training=(None, WINDOW), flex=(WINDOW,))


class Clock:
    """Runs every call; a call of the n-th burst takes n ms."""

    device = "cpu"

    def __init__(self):
        self.bursts = 0

    def burst(self, fn, calls):
        self.bursts += 1
        assert all(g.isfinite().all() for g in fn())
        return [float(self.bursts)] * calls

    def check(self, after):
        pass

    def peak_gib(self, fn):
        fn()
        return 1.5


@pytest.fixture
def stand_ins(monkeypatch):
    """Replaces the kernel by the reference and cuDNN by SDPA on the CPU; `spoil` changes our output."""

    def put(spoil=lambda out: out):
        def by_the_reference(make):
            def ours(shape, window):
                config = contenders.config_of(shape, window)

                def prepare(*qkv):
                    return lambda: spoil(
                        fps.attention(*qkv, grid=shape.grid, config=config, backend="reference")
                    )

                return replace(make(shape, window), prepare=prepare)

            return ours

        def cudnn(shape):
            def prepare(*qkv):
                return lambda: F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in qkv))

            return replace(contenders.cudnn(shape), prepare=prepare)

        for module in (bench_backward, bench_block):
            monkeypatch.setattr(module, "ours", by_the_reference(contenders.ours))
            monkeypatch.setattr(module, "cudnn", cudnn)
        monkeypatch.setattr(bench_backward, "deterministic", by_the_reference(contenders.deterministic))

    return put


def bench():
    """{(case, op): record}"""
    qkv = [x.float() for x in bench_forward.random_qkv(SHAPE, "cpu")]
    with torch.no_grad():  # as the bench runs
        records = bench_backward.bench_training(
            SHAPE, qkv, bench_forward.work_of, Clock(), common.GpuMonitor("none"), 2, 1e-3, 0
        )
    return {(r.case, r.op): r for r in records}


@pytest.mark.filterwarnings("ignore:fpsattention runs its reference")
def test_records(stand_ins):
    stand_ins()
    records = bench()
    cases = [f"t/{window} {name}" for window in ("dense", "1,1,1") for name in ("backward", "training")]
    assert set(records) == {
        *((case, op) for case in cases for op in OWN),
        *((case, common.CUDNN) for case in cases[:2]),
        *((case, common.FLEX) for case in cases[2:]),
    }
    for (case, op), r in records.items():
        assert not r.error and not r.is_forward and r.baseline == common.CUDNN
        assert r.baseline_ms == records[("t/dense " + case.split()[1], common.CUDNN)].ms
        assert r.speedup == r.baseline_ms / r.ms
        pairs = 192 * (192 if "dense" in case else 24)
        products = 5 if case.endswith("backward") else 7
        assert r.tflops_total == pytest.approx(products * 2 * 64 * 2 * pairs / r.ms / 1e9)
        assert 0.01 < r.rel_rms < 0.1 if op in OWN else r.rel_rms == 0


@pytest.mark.filterwarnings("ignore:fpsattention runs its reference")
def test_wrong_gradients_are_named(stand_ins):
    stand_ins(lambda out: 1.3 * out)
    records = bench()
    for (_, op), r in records.items():
        assert ("gradients differ" in r.error) == (op in OWN)


@pytest.mark.filterwarnings("ignore:fpsattention runs its reference")
def test_a_contender_without_gradient_is_a_record_with_an_error(stand_ins):
    stand_ins(lambda out: out.detach())
    records = bench()
    for (_, op), r in records.items():
        assert ("does not require grad" in r.error) == (op in OWN)
        assert (r.ms is None) == (op in OWN)


def test_a_block_is_timed_with_every_attention(stand_ins):
    stand_ins()
    shape = replace(SHAPE, windows=(None, WINDOW), mlp=96)
    with torch.no_grad():
        records = bench_block.bench_block(
            shape, bench_forward.work_of, Clock(), common.GpuMonitor("none"), 2, 1e-3, 0
        )
    assert [(r.case, r.op) for r in records] == [
        ("t/dense block step", common.CUDNN),
        ("t/dense block step", common.OURS),
        ("t/1,1,1 block step", common.OURS),
    ]
    for r in records:
        assert not r.error and not r.is_forward and r.peak_gib == 1.5
        assert r.speedup == records[0].ms / r.ms


def test_the_block_attends_in_its_own_layout():
    """With attention that returns V, the block treats each token alone."""
    block = bench_block.Block(replace(SHAPE, mlp=96))
    angles = video.rope_angles(SHAPE.grid, 64)
    x = torch.randn(1, 192, 128)
    out = block(x, angles, lambda q, k, v: v)
    order = torch.randperm(192)
    torch.testing.assert_close(block(x[:, order], angles, lambda q, k, v: v), out[:, order])


def test_gradients_reach_the_attention_of_a_block():
    """All of them: a kernel that multiplies zeros draws less power, and is faster for it."""
    given = []

    def attend(q, k, v):
        out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
        out.register_hook(given.append)
        return out

    block = bench_block.Block(replace(SHAPE, mlp=96))
    out = block(torch.randn(1, 192, 128), video.rope_angles(SHAPE.grid, 64), attend)
    out.backward(torch.randn_like(out))
    assert (given[0] != 0).all() and all((p.grad != 0).any() for p in block.parameters())


def test_text_is_timed_against_the_video_alone(monkeypatch):
    """Bursts take 1 and 2 ms: with text the call takes twice as long, for less than twice the work."""

    def attention(*qkv, backend, **call):
        calls.append((qkv[0].shape[1], call.get("prefix_len", 0), call.get("suffix_len", 0)))
        return fps.attention(*qkv, backend="reference", **call)

    calls = []
    monkeypatch.setattr(bench_text, "fps", SimpleNamespace(attention=attention))
    shape = replace(SHAPE, windows=(WINDOW,), training=(), text=(5, 9))
    clock = Clock()
    clock.burst = lambda fn, n: [float(fn().shape[1] > shape.tokens) + 1] * n
    qkv = bench_forward.random_qkv(shape, "cpu")
    with common.GpuMonitor("none") as monitor:
        alone, text = bench_text.bench_text(shape, qkv, bench_forward.work_of, clock, monitor, 2, 1.0, 0)
    assert set(calls) == {(shape.tokens, 0, 0), (shape.tokens + 14, 5, 9)}
    assert (alone.case, text.case) == ("t/1,1,1 alone", "t/1,1,1 with text") and not text.is_forward
    assert text.baseline_ms == alone.ms and alone.text_cost is None and not (alone.error or text.error)
    # Window 1,1,1 over 2 x 2 x 2 tiles: a query sees 24 tokens; with text 14 more, and 14 queries see all 206.
    work = (192 * (24 + 14) + 14 * (192 + 14)) / (192 * 24)
    assert text.text_cost == pytest.approx(2 - work)
