"""The bench on input families without a GPU: the reference in place of the kernel, on a small shape."""

from dataclasses import replace

import pytest
import torch

import bench_families
import bench_forward
import common
import contenders
import families
import fpsattention as fps
from shapes import Shape
from test_bench import FakeClock, NoMonitor

WINDOW = (1, 3, 1)
SHAPE = Shape("t", (3, 8, 8), 2, (3, 2, 4), (None, WINDOW), head_dim=64, families=(None, WINDOW))
MS = {"gaussian": 2.0, "sink": 2.5}  # of the others 2.0


class Ours:
    """FPSAttention by the reference; `spoil` changes an output, given the number of the call."""

    def __init__(self, spoil=lambda out, call: out):
        self.spoil, self.calls, self.inputs = spoil, 0, []

    def __call__(self, shape, window):
        config = contenders.config_of(shape, window)

        def prepare(q, k, v):
            self.calls += 1
            out = fps.attention(q, k, v, grid=shape.grid, config=config, backend="reference")
            return lambda: self.spoil(out, self.calls)

        def parts(q, k, v):
            self.inputs.append(q)
            family = list(families.FAMILIES)[(self.calls - 1) % len(families.FAMILIES)]
            return contenders.Parts(lambda: pytest.fail("quantised again"), lambda: family, 1)

        return replace(contenders.ours(shape, window), prepare=prepare, parts=parts)


def run(monkeypatch, ours, shape=SHAPE):
    monkeypatch.setattr(bench_families, "ours", ours)
    clock = FakeClock(lambda family, i: MS.get(family, 2.0))
    return bench_families.bench_families(shape, bench_forward.work_of, clock, NoMonitor(), 3, 4.0, 0)


def test_every_family_is_checked_timed_and_held_against_gaussian(monkeypatch):
    ours = Ours()
    records = run(monkeypatch, ours)
    cases = ("t/dense", "t/1,3,1")
    assert [r.case for r in records] == [
        f"{case} {name} inputs" for case in cases for name in families.FAMILIES
    ]
    assert not any(r.error or r.is_forward or r.ms for r in records) and {r.op for r in records} == {
        common.OURS
    }
    for r in records:
        assert r.attn_ms == MS.get(r.family, 2.0) and r.over_gaussian == 2.0 / r.attn_ms
        window = None if "dense" in r.case else WINDOW
        flops = common.attention_flops(bench_forward.work_of(SHAPE, window).pairs, 2, 64, 1)
        assert (r.window, r.tflops) == (window, pytest.approx(flops / r.attn_ms / 1e9))
        assert 0.001 < r.rel_rms < bench_families.TOLERANCE and (r.spread, r.sm_clock_mhz) == (0.0, 1500.0)
    assert len({r.rel_rms for r in records}) == len(records)  # each on inputs of its own
    assert bench_families.GAUSSIAN in families.FAMILIES
    assert bench_forward._slowest_family(common.INPUTS)(records) == 0.8


@pytest.mark.filterwarnings("ignore:fpsattention runs its reference")
def test_a_backward_that_is_trained_through_is_timed_on_every_family(monkeypatch):
    """Calls that are bursts of the backward return gradients; they take 4 ms on the third family, else 2."""

    def ours(shape, window):
        config = contenders.config_of(shape, window)

        def prepare(q, k, v):
            return lambda: fps.attention(q, k, v, grid=shape.grid, config=config, backend="reference")

        kernel = contenders.Parts(lambda: None, lambda: None, 1)
        return replace(contenders.ours(shape, window), prepare=prepare, parts=lambda *qkv: kernel)

    gradients = []

    def ms_of(result, burst):
        if result is None:
            return 1.0
        key = result[0].float().sum().item()
        if key not in gradients:
            gradients.append(key)
        return 4.0 if gradients.index(key) == 2 else 2.0

    monkeypatch.setattr(bench_families, "ours", ours)
    shape = replace(SHAPE, training=(WINDOW,))
    with torch.no_grad():  # as the bench runs
        records = bench_families.bench_families(
            shape, bench_forward.work_of, FakeClock(ms_of), NoMonitor(), 3, 4.0, 0
        )
    backward = [r for r in records if r.case.endswith("backward inputs")]
    assert [r.case for r in backward] == [f"t/1,3,1 {name} backward inputs" for name in families.FAMILIES]
    assert len(gradients) == len(families.FAMILIES) and not any(r.error or r.is_forward for r in records)
    assert sorted(r.ms for r in backward) == [2.0] * (len(backward) - 1) + [4.0]
    for r in backward:
        flops = 2.5 * common.attention_flops(bench_forward.work_of(SHAPE, WINDOW).pairs, 2, 64, 1)
        assert r.tflops_total == pytest.approx(flops / r.ms / 1e9)
    slowest = {what: bench_forward._slowest_family(what)(records) for what in ("inputs", "backward inputs")}
    gaussian = next(r for r in backward if r.family == "gaussian")
    assert slowest == {"inputs": 1.0, "backward inputs": 0.5 * gaussian.ms / 2.0}
    assert "t/1,3,1 backward" in common.table(records)


def test_a_wrong_answer_on_one_family_is_named(monkeypatch):
    first, second = list(families.FAMILIES)[1:3]

    def spoil(out, call):
        return {2: torch.zeros_like(out), 3: torch.full_like(out, float("nan"))}.get(call, out)

    records = {r.family: r for r in run(monkeypatch, Ours(spoil), replace(SHAPE, families=(None,)))}
    assert records[first].error == "relative RMS error 1 is above 0.25"
    assert records[second].error.startswith("output is not finite; relative RMS error nan")
    assert sum(bool(r.error) for r in records.values()) == 2
    worst = next(t for t in bench_forward.TARGETS if t.text == "records of FPSAttention with an error")
    assert worst.value(list(records.values())) == 1


def test_a_family_that_cannot_be_made_is_named_and_the_others_are_timed(monkeypatch):
    def make(name, *shape, **how):
        if name == "gaussian":
            raise torch.OutOfMemoryError("CUDA out of memory\nmore text")
        return families.make(name, *shape, **how)

    monkeypatch.setattr(bench_families, "make", make)
    gaussian, *others = run(monkeypatch, Ours(), replace(SHAPE, families=(WINDOW,)))
    assert gaussian.error == "OutOfMemoryError: CUDA out of memory" and gaussian.attn_ms is None
    assert all(r.attn_ms and not r.error and r.over_gaussian is None for r in others)


def test_inputs_have_the_layout_and_batch_of_the_families(monkeypatch):
    ours = Ours()
    records = run(monkeypatch, ours, replace(SHAPE, families=(None,), layout="HND", batch=2))
    assert {(r.layout, r.batch) for r in records} == {("NHD", 1)}
    assert {x.shape for x in ours.inputs} == {(1, 192, 2, 64)}


def test_a_shape_without_windows_measures_its_families_alone(monkeypatch):
    alone = replace(SHAPE.families_alone)
    assert contenders.contenders_of(alone) == ([], [])
    monkeypatch.setattr(bench_forward, "time_interleaved", lambda entries, *rest: {})
    monkeypatch.setattr(bench_families, "ours", Ours())
    clock = FakeClock(lambda family, i: 1.0)
    records = bench_forward.bench_shape(
        alone, *contenders.contenders_of(alone)[:1], clock, NoMonitor(), 1, 1.0
    )
    assert len(records) == 2 * len(families.FAMILIES) and all(r.family and r.attn_ms for r in records)
