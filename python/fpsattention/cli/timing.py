"""Timing on the GPU: bursts of calls between events, in rounds that give every function its turn."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch

FLUSH_BYTES = 256 << 20  # five times an H100's L2, so that every call reads its inputs from memory
HEAD_START_CYCLES = 8_000_000  # about 5 ms, in which the host queues a burst: host time is not measured
MAX_CALLS = 50


class DeviceLost(RuntimeError):
    """The CUDA context is unusable; nothing more can be measured in this process."""


class CudaClock:
    """Times calls on the GPU with events, each after a flush of the L2."""

    device = "cuda"

    def __init__(self):
        self._flush = torch.zeros(FLUSH_BYTES, dtype=torch.uint8, device=self.device)

    def burst(self, fn: Callable[[], object], calls: int) -> list[float]:
        """Milliseconds of each of `calls` calls, queued back to back."""
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]
        torch.cuda._sleep(HEAD_START_CYCLES)
        for start, end in events:
            self._flush.zero_()
            start.record()
            fn()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in events]

    def check(self, after: str) -> None:
        """Raises DeviceLost, naming the call `after`, when a fault has left the device unusable."""
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            raise DeviceLost(f"after {after}: {first_line(error)}") from error


@dataclass(frozen=True)
class Timing:
    """Median of the rounds' medians in milliseconds, and (slowest - fastest round) / median."""

    ms: float
    spread: float


def time_interleaved(
    entries: dict[str, Callable[[], object]], clock, rounds: int, burst_ms: float, seed: int = 0
) -> dict[str, Timing | str]:
    """Time several functions under equal conditions: heat, clocks and load change slowly compared with a round.

    Every round calls every function for about `burst_ms` milliseconds, at least once, in a new random order.

    Returns for each name a Timing, or the text of the error that the function raised. Raises DeviceLost.
    """
    results: dict[str, Timing | str] = {}
    calls: dict[str, int] = {}
    medians: dict[str, list[float]] = {name: [] for name in entries}

    def burst(name: str, n: int) -> list[float]:
        try:
            return clock.burst(entries[name], n)
        except Exception as error:  # a failure is the result of this function alone
            results[name] = first_line(error)
        clock.check(name)
        return []

    for name in entries:
        burst(name, 1)  # compiles, allocates, warms
        if name not in results and (estimate := burst(name, 1)):
            calls[name] = min(MAX_CALLS, max(1, round(burst_ms / max(estimate[0], 1e-3))))
    order = random.Random(seed)
    for _ in range(rounds):
        for name in order.sample(list(calls), len(calls)):
            if name not in results and (times := burst(name, calls[name])):
                medians[name].append(statistics.median(times))
    for name, values in medians.items():
        if name not in results:
            middle = statistics.median(values)
            results[name] = Timing(middle, (max(values) - min(values)) / middle)
    return results


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''}"
