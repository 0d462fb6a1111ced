"""What the benchmarks share: readings of the GPU, the records they write, and how they print them."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import platform
import re
import statistics
import sys
import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from fpsattention.cli.timing import CudaClock, Timing, time_interleaved
from fpsattention.core.reference import E4M3_MAX
from fpsattention.core.support import hopper_obstacle

try:
    import pynvml  # of the PyPI package nvidia-ml-py
except ImportError:
    pynvml = None

OURS, CUDNN, FLASH, FLEX = "fpsattention", "sdpa-cudnn", "sdpa-flash", "flexattention"  # Record.op
OURS_DETERMINISTIC = "fps-deterministic"  # Record.op of FPSAttention with deterministic=True
CUDNN_FP8 = "cudnn-fp8"  # Record.op of cuDNN's FP8 attention, without quantisation
SDPA = "sdpa"  # Record.op of torch's attention with the backend that torch picks
TORCH_DENSE = (CUDNN, FLASH)
# Record.case ends in one of these, unless the record is of a forward.
BACKWARD, TRAINING, STEP, ALONE, TEXT = "backward", "training", "block step", "alone", "with text"
HOST = "host"
INPUTS = "inputs"

COPY_BYTES = 1 << 30
GRAPH_REPLAYS = 10


class BenchClock(CudaClock):
    """A `CudaClock` that also measures memory: its bandwidth, and how much of it a call takes."""

    def __init__(self):
        super().__init__()
        self._source, self._target = (
            torch.zeros(COPY_BYTES, dtype=torch.uint8, device=self.device) for _ in range(2)
        )

    def copy(self) -> None:
        """Read and write COPY_BYTES, to measure the bandwidth."""
        self._target.copy_(self._source)

    def peak_gib(self, fn: Callable[[], object]) -> float:
        """Peak memory of torch's tensors during one call, in GiB."""
        fn()  # compiles and fills caches first
        torch.cuda.reset_peak_memory_stats()
        fn()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() / 2**30


def forward_seconds(name: str, model: torch.nn.Module, inputs: dict, forwards: int) -> list[float]:
    """Seconds of each forward of a host's model; the first may compile. Raises RuntimeError for a non-finite output."""
    seconds = []
    with torch.no_grad():
        for _ in range(forwards):
            torch.cuda.synchronize()
            start = time.perf_counter()
            outputs = model(**inputs, return_dict=False)
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
    if not all(x.isfinite().all() for x in outputs):
        raise RuntimeError(f"{name}: the output is not finite")
    return seconds


def largest_gap(events: list[tuple[float, float]], replays: int, skipped: int = 0) -> float:
    """The longest time for which the GPU idles within one replay, over several replays of equal work.

    Args:
        events: (start, end) of all work on the GPU, in any order; events may overlap.
        replays: number of replays, which ran one after the other.
        skipped: of these, the first so many do not count.

    Raises ValueError when the events do not divide evenly into replays: some were lost.
    """
    if not events or len(events) % replays:
        raise ValueError(f"{len(events)} device events of {replays} replays: some were lost")
    events = sorted(events)
    size = len(events) // replays
    gap = 0.0
    for first in range(skipped * size, len(events), size):
        busy_until = events[first][1]
        for start, end in events[first + 1 : first + size]:
            gap = max(gap, start - busy_until)
            busy_until = max(busy_until, end)
    return gap


def graph_gap_us(call: Callable[[], object]) -> float:
    """Microseconds of the largest gap between the kernels, memsets and copies of one call, as a CUDA graph."""
    call()  # loads the kernels; a capture cannot
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    graph.replay()  # the first replay uploads the graph
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(1 + GRAPH_REPLAYS):
            graph.replay()
        torch.cuda.synchronize()
    ranges = [e.time_range for e in profile.events() if e.device_type == torch.profiler.DeviceType.CUDA]
    # The first replay finds the GPU idle, which starts on it before the host has handed over all of it.
    return largest_gap([(r.start, r.end) for r in ranges], 1 + GRAPH_REPLAYS, skipped=1)


def nvml_device(uuid: str):
    """NVML's handle of a GPU. None, with the reason on stderr, without nvidia-ml-py, NVIDIA's driver or the GPU."""
    if pynvml is None:
        print(
            "no clocks and no power: nvidia-ml-py is not installed (pip install nvidia-ml-py)",
            file=sys.stderr,
        )
        return None
    try:
        pynvml.nvmlInit()  # lasts as long as the process; a second call does nothing
        return pynvml.nvmlDeviceGetHandleByUUID(uuid)
    except pynvml.NVMLError as error:
        print(f"no clocks and no power: {error}", file=sys.stderr)
        return None


class GpuMonitor:
    """Samples SM clock and power of a GPU in a thread while a bench runs; no samples where NVML has none."""

    def __init__(self, uuid: str, interval_s: float = 0.1):
        self._uuid, self._interval_s = uuid, interval_s
        self._samples: list[tuple[float, float, float]] = []  # time.monotonic(), MHz, W
        self._stop = threading.Event()
        self._thread = None

    def __enter__(self):
        device = nvml_device(self._uuid)
        if device is not None:
            self._thread = threading.Thread(target=self._sample, args=(device,), daemon=True)
            self._thread.start()
        return self

    def _sample(self, device) -> None:
        while not self._stop.is_set():
            with contextlib.suppress(pynvml.NVMLError):  # a reading that this GPU does not have
                clock_mhz = pynvml.nvmlDeviceGetClockInfo(device, pynvml.NVML_CLOCK_SM)
                power_w = pynvml.nvmlDeviceGetPowerUsage(device) / 1000
                self._samples.append((time.monotonic(), clock_mhz, power_w))
            self._stop.wait(self._interval_s)

    def between(self, start: float, end: float) -> tuple[float | None, float | None]:
        """Median (SM clock in MHz, power in W) sampled between two `time.monotonic()`, or (None, None)."""
        inside = [s for s in self._samples if start <= s[0] <= end]
        if not inside:
            return None, None
        return statistics.median(s[1] for s in inside), statistics.median(s[2] for s in inside)

    def __exit__(self, *_):
        if self._thread is not None:
            self._stop.set()
            self._thread.join()


@dataclass
class Record:
    """One contender on one case. Times are in ms, bandwidths in GB/s (1e9), errors are relative RMS.

    The end of `case` says what was timed: "backward" the backward alone; "training" forward and backward; "block step"
    a training step of a transformer block; "alone" and "with text" a forward without and with text tokens; "host" a
    forward by the host's clock; "inputs" the kernel alone on one family of inputs; anything else a forward. Inputs are
    Gaussian unless the case names another family.

    Attributes:
        tflops: useful work, 4 * head_dim * attended pairs * heads * batch, over `attn_ms`.
        tflops_total: the same work over `ms`, quantisation included unless the note says otherwise; 2.5 times the work
            in a backward, 3.5 in training.
        tflops_computed: work that the kernel computes, padding inside its blocks included, over `attn_ms`.
        speedup: baseline_ms / ms.
        graph_gap_us: largest gap between the kernels of one call in a CUDA graph.
        peak_gib: peak memory of a block step.
        text_cost: growth of the time beyond the growth of the work, as a fraction of the time without text.
        host_us: median microseconds until one call returns, on an idle GPU.
        total_us: median microseconds from the start of such a call until the GPU has finished.
        host_ratio, total_ratio: these times over those of torch's attention.
        family: name of the inputs in families.py; empty unless the case ends in "inputs".
        over_gaussian: speed on these inputs over the speed on Gaussian ones, of the kernel alone or of a backward.
        error: why the record is in no comparison; empty for a good one.
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
    host_us: float | None = None
    total_us: float | None = None
    host_ratio: float | None = None
    total_ratio: float | None = None
    family: str = ""
    over_gaussian: float | None = None
    sm_clock_mhz: float | None = None
    power_w: float | None = None
    note: str = ""
    error: str = ""

    @property
    def is_forward(self) -> bool:
        return not self.case.endswith((BACKWARD, TRAINING, STEP, ALONE, TEXT, HOST, INPUTS))

    def fail(self, message: str) -> None:
        self.error = f"{self.error}; {message}" if self.error else message

    def remark(self, message: str) -> None:
        self.note = f"{self.note}; {message}" if self.note else message


def time_records(
    records: list[Record], entries: dict, clock, monitor: GpuMonitor, rounds: int, burst_ms: float, seed: int
) -> None:
    """Time `entries`, whose keys are "case op" of the records, and fill in times, spread, clock and power.

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
    """Fill in the speed-up over `baseline`, where both have a time."""
    for record in records:
        if record.ms and baseline.ms:
            record.baseline, record.baseline_ms = baseline.op, baseline.ms
            record.speedup = baseline.ms / record.ms


@dataclass(frozen=True)
class Target:
    """A number to reach: `value(records)` must be at least `bound`, or at most with at_least=False."""

    text: str
    value: Callable[[list[Record]], float | None]
    bound: float
    at_least: bool = True

    def judge(self, records: list[Record]) -> dict:
        """{text, value, bound, at_least, met}; value and met are None for what was not measured."""
        value = self.value(records)
        met = None if value is None else (value >= self.bound if self.at_least else value <= self.bound)
        return {"text": self.text, "value": value, "bound": self.bound, "at_least": self.at_least, "met": met}


@dataclass
class Results:
    """The contents of a results file: conditions, records, targets.

    In the file, `records` are of Gaussian inputs. Those of families stand apart.
    """

    meta: dict
    records: list[Record] = field(default_factory=list)
    targets: list[dict] = field(default_factory=list)

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        calls = [asdict(r) for r in self.records if not r.family]
        families = [asdict(r) for r in self.records if r.family]
        data = {"meta": self.meta, "targets": self.targets, "records": calls, "families": families}
        path.write_text(json.dumps(_rounded(data), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> Results:
        data = json.loads(path.read_text())
        records = data["records"] + data.get("families", [])  # results of an H100 have none
        return cls(data["meta"], [Record(**r) for r in records], data["targets"])


def _rounded(x):
    if isinstance(x, float):
        return float(f"{x:.6g}")
    if isinstance(x, dict):
        return {k: _rounded(v) for k, v in x.items()}
    return [_rounded(v) for v in x] if isinstance(x, (list, tuple)) else x


def parsed(parser: argparse.ArgumentParser, cases: Collection[str] = ()) -> argparse.Namespace:
    """The command line's arguments. Exits with 2 for a model that is none of `cases`, with 1 without a Hopper GPU."""
    args = parser.parse_args()
    if unknown := set(getattr(args, "models", ())) - set(cases):
        parser.error(f"{', '.join(sorted(unknown))}: must be one of {', '.join(cases)}")
    if obstacle := hopper_obstacle():
        parser.exit(1, f"{parser.prog} {obstacle}\n")
    return args


def write_results(path: Path, results: Sequence, **about) -> None:
    """Write dataclasses as JSON, with the GPU, torch's version and what else the file is about."""
    about = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, **about}
    path.write_text(json.dumps({**about, "results": [asdict(x) for x in results]}, indent=1) + "\n")


def attention_flops(pairs: int, heads: int, head_dim: int, batch: int) -> int:
    """Operations of a forward: two products, of 2 * head_dim operations each, per attended query-key pair."""
    return 4 * head_dim * pairs * heads * batch


def quantize_bytes(tokens: int, heads: int, head_dim: int, batch: int, packed_bytes: int) -> int:
    """Bytes that the quantisation must move: Q, K, V read once in 16 bits, the packed FP8 blocks written once.

    A second read of a tensor does not count.
    """
    return 3 * 2 * tokens * heads * head_dim * batch + packed_bytes


def to_e4m3(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """E4M3 values of x, with x's strides, and their scale, an fp32 scalar: x is about values * scale."""
    scale = x.abs().amax().float() / E4M3_MAX
    return (x.float() / scale).clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn), scale


def gpu_uuid() -> str:
    """NVML's name for the current CUDA device; unlike an index, CUDA_VISIBLE_DEVICES does not change it."""
    uuid = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
    return uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"


def gpu_slug(name: str) -> str:
    """A short file name for a GPU: "NVIDIA H100 80GB HBM3" -> "h100"."""
    words = re.findall(r"[a-z0-9]+", name.lower())
    return next((w for w in words if re.fullmatch(r"[a-z]+\d+", w)), "-".join(words) or "gpu")


def conditions() -> dict:
    """GPU, driver and versions; None for what NVML does not say."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    driver = limit_mw = max_clock_mhz = None
    device = nvml_device(gpu_uuid())
    if device is not None:
        driver = pynvml.nvmlSystemGetDriverVersion()
        with contextlib.suppress(pynvml.NVMLError):  # a reading that this GPU does not have
            limit_mw = pynvml.nvmlDeviceGetPowerManagementLimit(device)
        with contextlib.suppress(pynvml.NVMLError):
            max_clock_mhz = pynvml.nvmlDeviceGetMaxClockInfo(device, pynvml.NVML_CLOCK_SM)
    return {
        "gpu": properties.name,
        "sms": properties.multi_processor_count,
        "driver": driver,
        "power_limit_w": limit_mw and limit_mw / 1000,
        "max_sm_clock_mhz": max_clock_mhz,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


# title, width, format, value
_COLUMNS = (
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
_FAMILY_COLUMNS = (
    (
        "kernel, or backward, on",
        34,
        "",
        lambda r: r.case.replace(f" {r.family}", "").removesuffix(f" {INPUTS}"),
    ),
    ("inputs", 12, "", lambda r: r.family),
    ("ms", 9, ".3f", lambda r: r.attn_ms or r.ms),
    ("TFLOP/s", 9, ".0f", lambda r: r.tflops or r.tflops_total),
    ("x Gaussian", 12, ".3f", lambda r: r.over_gaussian),
    ("rel RMS", 9, ".1e", lambda r: r.rel_rms),
    ("spread", 8, ".1%", lambda r: r.spread),
)


def _rows(records: list[Record], columns: tuple) -> list[str]:
    """A line of titles and a line for each record; nothing without records."""
    if not records:
        return []
    lines = ["".join(f"{t:<{w}}" if not f else f"{t:>{w}}" for t, w, f, _ in columns)]
    for r in records:
        cells = []
        for _, width, form, value in columns:
            x = value(r)
            text = str(x) if not form else "-" if x is None else format(x, form)
            cells.append(f"{text[: width - 1]:<{width}}" if not form else f"{text:>{width}}")
        lines.append("".join(cells) + ("  !" if r.error else ""))
    return lines


def table(records: list[Record]) -> str:
    """The records as plain text, those of input families apart, followed by host times, errors and notes."""
    lines = _rows([r for r in records if not r.family], _COLUMNS)
    lines += _rows([r for r in records if r.family], _FAMILY_COLUMNS)
    lines += [
        f"{r.case} {r.op}: {r.host_us:.1f} us until the call returns, {r.total_us:.1f} us in all"
        for r in records
        if r.host_us
    ]
    lines += [f"! {r.case} {r.op}: {r.error}" for r in records if r.error]
    notes = {r.op: r.note for r in records if r.note}
    return "\n".join([*lines, *(f"{op}: {note}" for op, note in notes.items())])


def target_lines(targets: list[dict]) -> str:
    """A line for each target: met or not, text, value and bound."""
    words = {True: "met", False: "NOT MET", None: "not measured"}
    return "\n".join(
        f"{words[t['met']]:<13} {t['text']:<58} {'-' if t['value'] is None else format(t['value'], '.4g'):>8}"
        f"  {'>=' if t['at_least'] else '<='} {t['bound']:g}"
        for t in targets
    )
