"""Part of bench_forward.py: the cost of text tokens, from FPSAttention with and without them on the same video."""

from __future__ import annotations

from functools import partial

import torch

import fpsattention as fps
from common import ALONE, OURS, TEXT, GpuMonitor, Record, attention_flops, compare_with, time_records
from contenders import config_of
from fpsattention.cli.timing import first_line
from shapes import Shape


def bench_text(
    shape: Shape, qkv, work_of, clock, monitor: GpuMonitor, rounds, burst_ms, seed
) -> list[Record]:
    """Time the shape's first window with and without text; `work_of` is bench_forward's. Raises DeviceLost."""
    window, (prefix_len, suffix_len) = shape.windows[0], shape.text
    config, work = config_of(shape, window), work_of(shape, window)
    sections = {"prefix_len": prefix_len, "suffix_len": suffix_len}
    geometry = config.resolve(shape.grid, shape.heads, **sections).geometry
    pairs = geometry.attended_pairs(work.resolved.windows[0], work.resolved.border)
    axis = 1 if shape.layout == "NHD" else 2
    call = {"grid": shape.grid, "config": config, "tensor_layout": shape.layout, "backend": "sm90"}
    records, entries = [], {}
    for name, text, tokens in ((ALONE, {}, shape.tokens), (TEXT, sections, geometry.n_tokens)):
        record = Record(
            *(f"{shape.case(window)} {name}", OURS, shape.grid, shape.heads, shape.head_dim, shape.batch),
            *(shape.layout, shape.tile, work.resolved.windows[0], work.density),
            note=f"{prefix_len} text tokens first and {suffix_len} last, or none",
        )
        records.append(record)
        try:
            own = [torch.cat([x, x.narrow(axis, 0, tokens - shape.tokens)], dim=axis) for x in qkv]
            entries[f"{record.case} {OURS}"] = partial(fps.attention, *own, **call, **text)
        except Exception as error:  # a contender that fails is a line in the results
            record.fail(first_line(error))
            clock.check(record.case)
    time_records(records, entries, clock, monitor, rounds, burst_ms, seed)
    video, with_text = records
    compare_with(video, records)
    for record, own in zip(records, (work.pairs, pairs), strict=True):
        if record.ms:
            flops = attention_flops(own, shape.heads, shape.head_dim, shape.batch)
            record.tflops_total = flops / record.ms / 1e9
    if video.ms and with_text.ms:
        with_text.text_cost = with_text.ms / video.ms - pairs / work.pairs
    return records
