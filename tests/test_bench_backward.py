"""The bench of the backward without a GPU: stand-ins for the contenders, on small tensors."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import bench_backward
import bench_forward
import common
import contenders
import fpsattention as fps
from shapes import Shape

WINDOW = (1, 1, 1)
SHAPE = Shape("t", (4, 6, 8), 2, (2, 3, 4), (None,), head_dim=64, training=(None, WINDOW), flex=(WINDOW,))


class Clock:
    """Every call runs; the n-th burst took n ms a call."""

    device = "cpu"

    def __init__(self):
        self.bursts = 0

    def burst(self, fn, calls):
        self.bursts += 1
        assert all(g.shape == (1, 192, 2, 64) for g in fn())
        return [float(self.bursts)] * calls

    def check(self, after):
        pass


def bench(monkeypatch, spoil=lambda out: out):
    """{(case, op): record} with the reference in the kernel's place."""

    def ours(shape, window):
        call = {"grid": shape.grid, "config": contenders.config_of(shape, window), "backend": "reference"}
        return replace(
            contenders.ours(shape, window),
            prepare=lambda q, k, v: lambda: spoil(fps.attention(q, k, v, **call)),
        )

    def cudnn(shape):
        def prepare(*qkv):
            return lambda: F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in qkv))

        return replace(contenders.cudnn(shape), prepare=prepare)

    monkeypatch.setattr(bench_backward, "ours", ours)
    monkeypatch.setattr(bench_backward, "cudnn", cudnn)
    qkv = [x.float() for x in bench_forward.random_qkv(SHAPE, "cpu")]
    with torch.no_grad():  # as the bench runs
        records = bench_backward.bench_training(
            SHAPE, qkv, bench_forward.work_of, Clock(), common.GpuMonitor("none"), 2, 1e-3, 0
        )
    return {(r.case, r.op): r for r in records}


@pytest.mark.filterwarnings("ignore:fpsattention runs its reference")
def test_records(monkeypatch):
    records = bench(monkeypatch)
    cases = [f"t/{window} {name}" for window in ("dense", "1,1,1") for name in ("backward", "training")]
    assert set(records) == {
        *((case, common.OURS) for case in cases),
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
        assert 0.01 < r.rel_rms < 0.1 if op == common.OURS else r.rel_rms == 0


@pytest.mark.filterwarnings("ignore:fpsattention runs its reference")
def test_wrong_gradients_are_named(monkeypatch):
    records = bench(monkeypatch, lambda out: 1.3 * out)
    for (_, op), r in records.items():
        assert ("gradients differ" in r.error) == (op == common.OURS)


@pytest.mark.filterwarnings("ignore:fpsattention runs its reference")
def test_a_contender_without_gradient_is_a_record_with_an_error(monkeypatch):
    records = bench(monkeypatch, lambda out: out.detach())
    for (_, op), r in records.items():
        assert ("does not require grad" in r.error) == (op == common.OURS)
        assert (r.ms is None) == (op == common.OURS)
