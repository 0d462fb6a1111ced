"""The host's time of a call, on the CPU with a made-up clock."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import bench_forward
import bench_host
import common
import fpsattention as fps
import shapes
from fpsattention.cli.timing import DeviceLost

SHAPE = shapes.Shape("t", (2, 4, 4), 2, (2, 2, 2), (None,), head_dim=16, host=True)


class Clock:
    """A host and a GPU in made-up microseconds: a call occupies the host, then the GPU until it is waited for."""

    def __init__(self):
        self.now_us, self.gpu_us, self.lost = 0.0, 0.0, False

    def call(self, host_us, gpu_us):
        assert self.gpu_us == 0, "the GPU was not idle"
        self.now_us += host_us
        self.gpu_us = gpu_us

    def synchronize(self):
        self.now_us += self.gpu_us
        self.gpu_us = 0.0

    def check(self, after):
        if self.lost:
            raise DeviceLost(after)


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(torch.cuda, "synchronize", clock.synchronize)
    monkeypatch.setattr(bench_host, "time", SimpleNamespace(perf_counter=lambda: clock.now_us * 1e-6))
    return clock


def attend_with(monkeypatch, ours, torchs):
    """Let the two contenders call these functions, then compute; returns the log of (contender, output)."""
    log = []
    sdpa = torch.nn.functional.scaled_dot_product_attention

    def attention(*qkv, **call):
        ours()
        log.append(("ours", fps.attention(*qkv, **call, backend="reference")))

    def scaled_dot_product_attention(*qkv):
        torchs()
        log.append(("torch", sdpa(*qkv).transpose(1, 2)))

    monkeypatch.setattr(bench_host, "fps", SimpleNamespace(attention=attention))
    functions = SimpleNamespace(scaled_dot_product_attention=scaled_dot_product_attention)
    monkeypatch.setattr(bench_host, "F", functions)
    return log


def run(clock, shape=SHAPE):
    return bench_host.bench_host(shape, bench_forward.random_qkv(shape, "cpu"), clock)


def test_a_call_is_timed_until_it_returns_and_until_the_gpu_has_finished(clock):
    clock.gpu_us = 1000.0  # left by an earlier call
    host_us, total_us = bench_host.call_us(lambda: clock.call(80.0, 120.0))
    assert (host_us, total_us) == (pytest.approx(80), pytest.approx(200))


def test_host_times_are_medians_and_ratios_over_torch(monkeypatch, clock):
    """FPSAttention takes 80 us of host and 120 of GPU, torch 20 and 180; the warm-up and every third call are slow."""
    calls = {"ours": 0, "torch": 0}

    def slow(name):
        calls[name] += 1
        return 1e4 * (calls[name] <= bench_host.WARM_UP or calls[name] % 3 == 0)

    log = attend_with(
        monkeypatch,
        lambda: clock.call(80 + slow("ours"), 120),
        lambda: clock.call(20 + slow("torch"), 180),
    )
    ours, torchs = run(clock)
    assert (ours.case, ours.op, torchs.case, torchs.op) == ("t host", common.OURS, "t host", common.SDPA)
    assert not (ours.is_forward or torchs.is_forward or ours.error or torchs.error)
    assert (ours.host_us, ours.total_us) == (pytest.approx(80), pytest.approx(200))
    assert (torchs.host_us, torchs.total_us) == (pytest.approx(20), pytest.approx(200))
    assert (ours.host_ratio, ours.total_ratio) == (pytest.approx(4), pytest.approx(1))
    assert torchs.host_ratio is None and torchs.total_ratio is None
    assert ours.ms is None and torchs.ms is None  # in no comparison of the GPU's times
    timed = bench_host.BLOCKS * bench_host.CALLS
    assert calls == dict.fromkeys(("ours", "torch"), bench_host.WARM_UP + timed) and timed >= 300
    names = [name for name, _ in log[2 * bench_host.WARM_UP :]]
    assert names == (["ours"] * bench_host.CALLS + ["torch"] * bench_host.CALLS) * bench_host.BLOCKS


@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_both_compute_the_same_attention(monkeypatch, clock, layout):
    monkeypatch.setattr(bench_host, "WARM_UP", 1)
    monkeypatch.setattr(bench_host, "BLOCKS", 1)
    monkeypatch.setattr(bench_host, "CALLS", 1)
    log = attend_with(monkeypatch, lambda: None, lambda: None)
    records = run(clock, replace(SHAPE, layout=layout))
    assert [(r.layout, r.tile, r.density) for r in records] == [(layout, (2, 2, 2), 1.0), (layout, None, 1.0)]
    outputs = [out if name == "torch" or layout == "NHD" else out.transpose(1, 2) for name, out in log]
    assert outputs[0].shape == (1, 32, 2, 16)
    assert bench_forward.relative_rms(outputs[0], outputs[-1]) < 0.1


def test_a_call_that_fails_is_a_record_with_an_error_and_no_ratio(monkeypatch, clock):
    def broken():
        raise RuntimeError("no kernel image\nmore text")

    log = attend_with(monkeypatch, broken, lambda: clock.call(20, 180))
    ours, torchs = run(clock)
    assert ours.error == "RuntimeError: no kernel image" and not torchs.error
    assert ours.host_us is None and ours.host_ratio is None and torchs.host_us == pytest.approx(20)
    assert {name for name, _ in log} == {"torch"}
    clock.lost = True
    with pytest.raises(DeviceLost, match="t host"):
        run(clock)


def test_host_records_follow_a_shape_that_asks_for_them(monkeypatch, clock):
    monkeypatch.setattr(bench_forward, "time_interleaved", lambda entries, *rest: {})
    monkeypatch.setattr(bench_forward, "bench_host", lambda shape, qkv, clock: [f"host of {shape.name}"])
    clock.device, clock.copy = "cpu", None
    with common.GpuMonitor("none") as monitor:
        assert bench_forward.bench_shape(SHAPE, [], clock, monitor, 1, 1.0) == ["host of t"]
        assert bench_forward.bench_shape(replace(SHAPE, host=False), [], clock, monitor, 1, 1.0) == []
