"""What a bench watches on the GPU, the records that a bench writes, and the words they are printed with."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import platform
import pty
import re
import statistics
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from fpsattention.cli.timing import CudaClock, Timing, time_interleaved

OURS, CUDNN, FLASH, FLEX = "fpsattention", "sdpa-cudnn", "sdpa-flash", "flexattention"  # Record.op
TORCH_DENSE = (CUDNN, FLASH)
# The last words of Record.case, but for forwards.
BACKWARD, TRAINING, STEP, ALONE, TEXT = "backward", "training", "block step", "alone", "with text"

COPY_BYTES = 1 << 30
GRAPH_REPLAYS = 10


class BenchClock(CudaClock):
    """A `CudaClock` that also knows what the memory can do, and what a call takes of it."""

    def __init__(self):
        super().__init__()
        self._source, self._target = (
            torch.zeros(COPY_BYTES, dtype=torch.uint8, device=self.device) for _ in range(2)
        )

    def copy(self) -> None:
        """Read and write COPY_BYTES: what the memory can do."""
        self._target.copy_(self._source)

    def peak_gib(self, fn: Callable[[], object]) -> float:
        """The most memory that torch's tensors take during one call, in GiB."""
        fn()  # compiles; what is cached stays out
        torch.cuda.reset_peak_memory_stats()
        fn()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() / 2**30


def forward_seconds(name: str, model: torch.nn.Module, inputs: dict, forwards: int) -> list[float]:
    """Of each forward of a host's model. The first compiles what is to be compiled."""
    seconds = []
    with torch.no_grad():
        for _ in range(forwards):
            torch.cuda.synchronize()
            start = time.perf_counter()
            (out,) = model(**inputs, return_dict=False)
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
    if not out.isfinite().all():
        raise RuntimeError(f"{name}: the output is not finite")
    return seconds


def largest_gap(events: list[tuple[float, float]], replays: int) -> float:
    """The longest time for which the GPU idles within one of several equal replays.

    Args:
        events: (start, end) of everything that ran on the GPU, in any order; events may overlap.
        replays: how often the same work ran, one replay after the other.

    Raises ValueError when the events are not the same number for each replay: then some were lost.
    """
    if not events or len(events) % replays:
        raise ValueError(f"{len(events)} device events of {replays} replays: not equally many of each")
    events = sorted(events)
    size = len(events) // replays
    gap = 0.0
    for first in range(0, len(events), size):
        busy_until = events[first][1]
        for start, end in events[first + 1 : first + size]:
            gap = max(gap, start - busy_until)
            busy_until = max(busy_until, end)
    return gap


def graph_gap_us(call: Callable[[], object]) -> float:
    """Microseconds of the largest gap between the kernels, memsets and copies of one call, as a CUDA graph."""
    call()  # loads kernels, which a capture cannot
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    graph.replay()  # the first one uploads the graph
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(GRAPH_REPLAYS):
            graph.replay()
        torch.cuda.synchronize()
    ranges = [e.time_range for e in profile.events() if e.device_type == torch.profiler.DeviceType.CUDA]
    return largest_gap([(r.start, r.end) for r in ranges], GRAPH_REPLAYS)


class GpuMonitor:
    """Samples SM clock and power through nvidia-smi while a bench runs; without nvidia-smi, nothing."""

    def __init__(self, device: str, interval_ms: int = 100):
        self._command = [
            *("nvidia-smi", "-i", device, "--query-gpu=clocks.sm,power.draw"),
            *("--format=csv,noheader,nounits", "-lms", str(interval_ms)),
        ]
        self._samples: list[tuple[float, float, float]] = []
        self._process = None

    def __enter__(self):
        ours, theirs = pty.openpty()  # into a pipe, nvidia-smi would write blocks of many samples
        try:
            self._process = subprocess.Popen(self._command, stdout=theirs, stderr=subprocess.DEVNULL)
        except OSError:
            os.close(ours)
            return self
        finally:
            os.close(theirs)
        threading.Thread(target=self._read, args=(ours,), daemon=True).start()
        return self

    def _read(self, terminal: int):
        # Reading a terminal whose other end is closed raises.
        with open(terminal, errors="replace") as lines, contextlib.suppress(OSError):
            for line in lines:
                self.add(line)

    def add(self, line: str) -> None:
        """Take one line "MHz, watts"; lines of another form (N/A, messages) are not samples."""
        try:
            clock, power = (float(x) for x in line.split(","))
        except ValueError:
            return
        self._samples.append((time.monotonic(), clock, power))

    def between(self, start: float, end: float) -> tuple[float | None, float | None]:
        """Median (SM clock in MHz, power in W) sampled between two `time.monotonic()`, or (None, None)."""
        inside = [s for s in self._samples if start <= s[0] <= end]
        if not inside:
            return None, None
        return statistics.median(s[1] for s in inside), statistics.median(s[2] for s in inside)

    def __exit__(self, *_):
        if self._process is not None:
            self._process.terminate()
            self._process.wait()


@dataclass
class Record:
    """One contender on one case. Times in ms, bandwidths in GB/s (1e9), errors are relative RMS.

    A case that ends in "backward" is the backward alone, one in "training" forward and backward, one in "block step" a
    training step of a transformer block, which alone has a `peak_gib`. One in "alone" or "with text" is a forward of
    the pair that tells what text tokens cost: `text_cost` is by how much the time grows beyond the work, as a fraction
    of the time without. The others are forwards. `tflops` is useful work, 4 * head_dim * attended pairs * heads *
    batch, over `attn_ms`; `tflops_total` the same over `ms`, quantisation included (2.5 times that work in a backward,
    3.5 times in training); `tflops_computed` is what the kernel computes, padding inside its blocks included, over
    `attn_ms`. `speedup` is baseline_ms / ms. `graph_gap_us` is the largest gap between the kernels of one call under a
    CUDA graph. A record with an `error` is used in no comparison.
    """

    case: str
    op: str
    grid: tuple[int, int, int]
    heads: int
    head_dim: int
    batch: int
    layout: str
    tile: tuple[int, int, int] | None
    window: tuple[int, int, int] | None
    density: float
    ms: float | None = None
    spread: float | None = None
    attn_ms: float | None = None
    quant_ms: float | None = None
    tflops: float | None = None
    tflops_total: float | None = None
    tflops_computed: float | None = None
    baseline: str | None = None
    baseline_ms: float | None = None
    speedup: float | None = None
    fastest_torch: str | None = None
    fastest_torch_ms: float | None = None
    speedup_fastest_torch: float | None = None
    rel_rms: float | None = None
    emulation_rel_rms: float | None = None
    rms_to_emulation: float | None = None
    error_over_emulation: float | None = None
    quant_bytes: int | None = None
    quant_gbps: float | None = None
    copy_gbps: float | None = None
    attn_hbm_bytes: int | None = None
    attn_l2_bytes: int | None = None
    graph_gap_us: float | None = None
    peak_gib: float | None = None
    text_cost: float | None = None
    sm_clock_mhz: float | None = None
    power_w: float | None = None
    note: str = ""
    error: str = ""

    @property
    def is_forward(self) -> bool:
        return not self.case.endswith((BACKWARD, TRAINING, STEP, ALONE, TEXT))

    def fail(self, message: str) -> None:
        self.error = f"{self.error}; {message}" if self.error else message

    def remark(self, message: str) -> None:
        self.note = f"{self.note}; {message}" if self.note else message


def time_records(
    records: list[Record], entries: dict, clock, monitor: GpuMonitor, rounds: int, burst_ms: float, seed: int
) -> None:
    """Time `entries`, by "case op" of the records, and fill in times, spread, clock and power.

    Raises DeviceLost.
    """
    start = time.monotonic()
    timings = time_interleaved(entries, clock, rounds, burst_ms, seed)
    clock_mhz, power_w = monitor.between(start, time.monotonic())
    for record in records:
        record.sm_clock_mhz, record.power_w = clock_mhz, power_w
        timing = timings.get(f"{record.case} {record.op}")
        if isinstance(timing, str):
            record.fail(timing)
        if isinstance(timing, Timing):
            record.ms, record.spread = timing.ms, timing.spread


def compare_with(baseline: Record, records: list[Record]) -> None:
    """Give the records that have a time their speed-up over `baseline`, if that has one."""
    for record in records:
        if record.ms and baseline.ms:
            record.baseline, record.baseline_ms = baseline.op, baseline.ms
            record.speedup = baseline.ms / record.ms


@dataclass(frozen=True)
class Target:
    """A number to reach: `value(records)` against `bound`, in the sense of `at_least` (else at most)."""

    text: str
    value: Callable[[list[Record]], float | None]
    bound: float
    at_least: bool = True

    def judge(self, records: list[Record]) -> dict:
        """{text, value, bound, at_least, met}; value and met are None when this run did not measure it."""
        value = self.value(records)
        met = None if value is None else (value >= self.bound if self.at_least else value <= self.bound)
        return {"text": self.text, "value": value, "bound": self.bound, "at_least": self.at_least, "met": met}


@dataclass
class Results:
    """What a run writes: the conditions, the records, the targets."""

    meta: dict
    records: list[Record] = field(default_factory=list)
    targets: list[dict] = field(default_factory=list)

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        data = {"meta": self.meta, "targets": self.targets, "records": [asdict(r) for r in self.records]}
        path.write_text(json.dumps(_rounded(data), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> Results:
        data = json.loads(path.read_text())
        return cls(data["meta"], [Record(**r) for r in data["records"]], data["targets"])


def _rounded(x):
    if isinstance(x, float):
        return float(f"{x:.6g}")
    if isinstance(x, dict):
        return {k: _rounded(v) for k, v in x.items()}
    return [_rounded(v) for v in x] if isinstance(x, (list, tuple)) else x


def attention_flops(pairs: int, heads: int, head_dim: int, batch: int) -> int:
    """Operations of a forward: two products of 2 * head_dim operations for each attended query-key pair."""
    return 4 * head_dim * pairs * heads * batch


def quantize_bytes(tokens: int, heads: int, head_dim: int, batch: int, packed_bytes: int) -> int:
    """Bytes the quantisation must move: Q, K, V read once in 16 bits, the FP8 image written once.

    A kernel that reads V twice, for its channel amax first, gets no credit for the second time.
    """
    return 3 * 2 * tokens * heads * head_dim * batch + packed_bytes


def device_query() -> str:
    """The current CUDA device for nvidia-smi: its UUID, which CUDA_VISIBLE_DEVICES does not renumber."""
    uuid = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
    return uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"


def gpu_slug(name: str) -> str:
    """Short file name for a GPU: "NVIDIA H100 80GB HBM3" -> "h100"."""
    words = re.findall(r"[a-z0-9]+", name.lower())
    return next((w for w in words if re.fullmatch(r"[a-z]+\d+", w)), "-".join(words) or "gpu")


def conditions() -> dict:
    """GPU, driver and versions, as far as they can be known."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    query = ["nvidia-smi", "-i", device_query(), "--query-gpu=driver_version,power.limit,clocks.max.sm"]
    try:
        smi = subprocess.run(
            [*query, "--format=csv,noheader,nounits"], capture_output=True, text=True, timeout=30, check=True
        )
        driver, power_limit, max_clock = (x.strip() for x in smi.stdout.strip().split(","))
    except (OSError, subprocess.SubprocessError, ValueError):
        driver = power_limit = max_clock = None
    return {
        "gpu": properties.name,
        "sms": properties.multi_processor_count,
        "driver": driver,
        "power_limit_w": power_limit,
        "max_sm_clock_mhz": max_clock,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


_COLUMNS = (
    # title, width, format, value
    ("case", 24, "", lambda r: r.case),
    ("op", 16, "", lambda r: r.op),
    ("density", 8, ".3f", lambda r: r.density),
    ("ms", 9, ".3f", lambda r: r.ms),
    ("attn", 9, ".3f", lambda r: r.attn_ms),
    ("quant", 8, ".3f", lambda r: r.quant_ms),
    ("TFLOP/s", 8, ".0f", lambda r: r.tflops or r.tflops_total),
    ("speed-up", 9, ".2f", lambda r: r.speedup),
    ("rel RMS", 9, ".1e", lambda r: r.rel_rms),
    ("spread", 7, ".1%", lambda r: r.spread),
)


def table(records: list[Record]) -> str:
    """The records as plain text; errors and notes follow it."""
    lines = ["".join(f"{t:<{w}}" if not f else f"{t:>{w}}" for t, w, f, _ in _COLUMNS)]
    for r in records:
        cells = []
        for _, width, form, value in _COLUMNS:
            x = value(r)
            text = str(x) if not form else "-" if x is None else format(x, form)
            cells.append(f"{text[: width - 1]:<{width}}" if not form else f"{text:>{width}}")
        lines.append("".join(cells) + ("  !" if r.error else ""))
    lines += [f"! {r.case} {r.op}: {r.error}" for r in records if r.error]
    notes = {r.op: r.note for r in records if r.note}
    return "\n".join([*lines, *(f"{op}: {note}" for op, note in notes.items())])


def target_lines(targets: list[dict]) -> str:
    """One line per target: met or not, its text, value and bound."""
    words = {True: "met", False: "NOT MET", None: "not measured"}
    return "\n".join(
        f"{words[t['met']]:<13} {t['text']:<58} {'-' if t['value'] is None else format(t['value'], '.4g'):>8}"
        f"  {'>=' if t['at_least'] else '<='} {t['bound']:g}"
        for t in targets
    )
