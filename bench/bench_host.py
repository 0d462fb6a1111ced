"""Part of bench_forward.py: the host's time of one short call, beside torch's scaled_dot_product_attention."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

import fpsattention as fps
from common import HOST, OURS, SDPA, Record
from contenders import as_hnd, config_of
from fpsattention.cli.timing import first_line
from shapes import Shape

WARM_UP, BLOCKS, CALLS = 50, 10, 50  # calls before any is timed; blocks for each contender; calls in a block


def call_us(call: Callable[[], object]) -> tuple[float, float]:
    """Microseconds of one call on an idle GPU: until it returns, and until the GPU has finished."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    out = call()  # kept until the end: to free it is not part of the call
    returned = time.perf_counter()
    torch.cuda.synchronize()
    finished = time.perf_counter()
    del out
    return (returned - start) * 1e6, (finished - start) * 1e6


def bench_host(shape: Shape, qkv, clock) -> list[Record]:
    """Time dense calls of FPSAttention and of torch on the same tensors, in blocks of calls that alternate.

    Q, K and V are in the shape's layout. Raises DeviceLost.
    """
    config = config_of(shape, None)
    calls = {  # each with its default backend; the views for torch are made before the call
        OURS: partial(fps.attention, *qkv, grid=shape.grid, config=config, tensor_layout=shape.layout),
        SDPA: partial(F.scaled_dot_product_attention, *(as_hnd(x, shape.layout) for x in qkv)),
    }
    records = {
        op: Record(
            *(f"{shape.name} {HOST}", op, shape.grid, shape.heads, shape.head_dim, shape.batch),
            *(shape.layout, shape.tile if op == OURS else None, None, 1.0),
        )
        for op in calls
    }
    samples: dict[str, list[tuple[float, float]]] = {op: [] for op in calls}
    for block in range(BLOCKS + 1):
        for op, call in calls.items():
            if records[op].error:
                continue
            try:
                times = [call_us(call) for _ in range(CALLS if block else WARM_UP)]
            except Exception as error:  # a contender that fails is a line in the results
                records[op].fail(first_line(error))
                clock.check(records[op].case)
                continue
            samples[op] += times if block else []
    for op, record in records.items():
        if not record.error:
            record.host_us, record.total_us = map(statistics.median, zip(*samples[op], strict=True))
    ours, torchs = records[OURS], records[SDPA]
    if ours.host_us and torchs.host_us:
        ours.host_ratio, ours.total_ratio = ours.host_us / torchs.host_us, ours.total_us / torchs.total_us
    return [ours, torchs]
