"""Part of bench_forward.py: FPSAttention's kernel alone on every family of inputs, beside its time on Gaussian ones."""

from __future__ import annotations

from dataclasses import replace

from accuracy import exact_heads, judge, sampled_rows
from common import INPUTS, OURS, GpuMonitor, Record, attention_flops, time_records
from contenders import ours
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
    return [
        record
        for window in shape.families
        for record in _bench_window(shape, window, work_of(shape, window), *timed)
    ]


def _bench_window(
    shape: Shape, window: Window, work, clock, monitor: GpuMonitor, rounds, burst_ms, seed
) -> list[Record]:
    """The records of one window, a family each."""
    contender = ours(shape, window)
    entries, records = {}, {}
    for family in FAMILIES:
        record = records[family] = Record(
            *(f"{shape.case(window)} {family} {INPUTS}", OURS, shape.grid, shape.heads, shape.head_dim),
            *(shape.batch, shape.layout, shape.tile, window and work.resolved.windows[0], work.density),
            family=family,
        )
        try:
            qkv = make(family, shape.grid, shape.heads, shape.head_dim, seed=seed, device=clock.device)
            check(shape, contender, work, qkv, record, seed)
            entries[f"{record.case} {OURS}"] = contender.parts(*qkv).attend
        except Exception as error:  # a family that fails is a line in the results
            record.fail(first_line(error))
            clock.check(record.case)
    time_records(list(records.values()), entries, clock, monitor, rounds, burst_ms, seed)
    flops = attention_flops(work.pairs, shape.heads, shape.head_dim, shape.batch)
    for record in records.values():
        record.attn_ms, record.ms = record.ms, None  # the kernel alone was timed
        if record.attn_ms:
            record.tflops = flops / record.attn_ms / 1e9
    gaussian = records[GAUSSIAN]
    for record in records.values():
        if record.attn_ms and gaussian.attn_ms:
            record.over_gaussian = gaussian.attn_ms / record.attn_ms
    return list(records.values())


def check(shape: Shape, contender, work, qkv, record: Record, seed: int) -> None:
    """Compare the contender with exact attention on sampled rows of some heads, and fill in the record's error."""
    out = contender.finish(contender.prepare(*qkv)())
    rows = sampled_rows(shape, seed, out.device)
    judge(shape, out, rows, exact_heads(shape, qkv, rows, work.allowed(rows)), TOLERANCE, record)
