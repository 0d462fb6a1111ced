"""Part of bench_forward.py: FPSAttention on every family of inputs, beside its time on Gaussian ones.

Of the forward, the kernel alone is timed. Where a window is trained under, so is its whole backward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from accuracy import exact_heads, judge, sampled_rows
from bench_backward import FORWARDS_WORTH
from common import BACKWARD, INPUTS, OURS, GpuMonitor, Record, attention_flops, time_records
from contenders import Contender, ours
from families import FAMILIES, make
from fpsattention.cli.timing import first_line
from shapes import Shape, Window

GAUSSIAN = "gaussian"
# Where few keys share a row, the rounding of V and of the scores no longer averages out. A wrong answer is near 1.
TOLERANCE = 0.25


def bench_families(shape: Shape, work_of, clock, monitor: GpuMonitor, rounds, burst_ms, seed) -> list[Record]:
    """Check and time the windows in `Shape.families` on every family; `work_of` is bench_forward's.

    The families of a window take turns in every round, which is what makes their times comparable. Raises DeviceLost.
    """
    shape = replace(shape, batch=1, layout="NHD")  # as `make` makes them
    timed = (clock, monitor, rounds, burst_ms, seed)
    records = []
    for window in shape.families:
        work = work_of(shape, window)
        flops = attention_flops(work.pairs, shape.heads, shape.head_dim, shape.batch)
        kernel = partial(_kernel, shape=shape, work=work, seed=seed)
        for r in _time_each(shape, window, work, INPUTS, kernel, *timed):
            r.attn_ms, r.ms = r.ms, None  # the kernel alone was timed
            r.tflops = flops / r.attn_ms / 1e9 if r.attn_ms else None
            records.append(r)
        if window in shape.training:
            backward = partial(_backward, seed=seed)
            for r in _time_each(shape, window, work, f"{BACKWARD} {INPUTS}", backward, *timed):
                r.tflops_total = FORWARDS_WORTH[BACKWARD] * flops / r.ms / 1e9 if r.ms else None
                records.append(r)
    return records


def _time_each(
    shape: Shape,
    window: Window,
    work,
    what: str,
    function_of: Callable[[Contender, tuple[torch.Tensor, ...], Record], Callable[[], object]],
    clock,
    monitor: GpuMonitor,
    rounds,
    burst_ms,
    seed,
) -> list[Record]:
    """The records of one window, a family each. `function_of` checks a family's inputs and returns what to time."""
    contender = ours(shape, window)
    entries, records = {}, {}
    for family in FAMILIES:
        record = records[family] = Record(
            *(f"{shape.case(window)} {family} {what}", OURS, shape.grid, shape.heads, shape.head_dim),
            *(shape.batch, shape.layout, shape.tile, window and work.resolved.windows[0], work.density),
            family=family,
        )
        try:
            qkv = make(family, shape.grid, shape.heads, shape.head_dim, seed=seed, device=clock.device)
            entries[f"{record.case} {OURS}"] = function_of(contender, qkv, record)
        except Exception as error:  # a family that fails is a line in the results
            record.fail(first_line(error))
            clock.check(record.case)
    time_records(list(records.values()), entries, clock, monitor, rounds, burst_ms, seed)
    gaussian = records[GAUSSIAN]
    for record in records.values():
        if record.ms and gaussian.ms:
            record.over_gaussian = gaussian.ms / record.ms
    return list(records.values())


def check(shape: Shape, contender, work, qkv, record: Record, seed: int) -> None:
    """Compare the contender with exact attention on sampled rows of some heads, and fill in the record's error."""
    out = contender.finish(contender.prepare(*qkv)())
    rows = sampled_rows(shape, seed, out.device)
    judge(shape, out, rows, exact_heads(shape, qkv, rows, work.allowed(rows)), TOLERANCE, record)


def _kernel(contender: Contender, qkv, record: Record, shape: Shape, work, seed: int) -> Callable[[], object]:
    """The forward's kernel on these inputs, after a check of the whole forward."""
    check(shape, contender, work, qkv, record, seed)
    return contender.parts(*qkv).attend


@torch.enable_grad()
def _backward(contender: Contender, qkv, record: Record, seed: int) -> Callable[[], object]:
    """The backward on these inputs. The tests compare gradients; here they have to be finite."""
    qkv = tuple(x.requires_grad_() for x in qkv)
    out = contender.prepare(*qkv)()
    generator = torch.Generator(out.device).manual_seed(seed)
    dout = torch.randn(out.shape, dtype=out.dtype, device=out.device, generator=generator)

    def backward():
        return torch.autograd.grad(out, qkv, dout, retain_graph=True)

    if not all(x.isfinite().all() for x in backward()):
        record.fail("a gradient is not finite")
    return backward
