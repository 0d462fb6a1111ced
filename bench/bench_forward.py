"""Forward and backward on one GPU: FPSAttention, torch's backends and installed peers on the same tensors.

    python bench/bench_forward.py [--quick] [--case NAME ...] [--heads-scale X] [--output FILE]

A full run writes bench/results/<gpu>.json; a partial one (--quick, --case, --heads-scale) writes
bench/results/<gpu>-partial.json, so that it never replaces a full one.
"""

from __future__ import annotations

import argparse
import gc
import math
import os
import statistics
import sys
import time
import zlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

import fpsattention as fps
from accuracy import exact_heads, judge, relative_rms, sampled_rows
from bench_backward import bench_training
from bench_block import bench_block
from bench_families import GAUSSIAN, bench_families
from bench_host import bench_host
from bench_text import bench_text
from common import (
    BACKWARD,
    COPY_BYTES,
    CUDNN,
    CUDNN_FP8,
    FLEX,
    INPUTS,
    OURS,
    OURS_DETERMINISTIC,
    TORCH_DENSE,
    BenchClock,
    GpuMonitor,
    Record,
    Results,
    Target,
    attention_flops,
    conditions,
    gpu_slug,
    gpu_uuid,
    graph_gap_us,
    quantize_bytes,
    table,
    target_lines,
)
from contenders import Contender, as_hnd, config_of, contenders_of, installed_peers, ours
from fpsattention import _C
from fpsattention.cli.timing import DeviceLost, Timing, first_line, time_interleaved
from fpsattention.core.config import ResolvedConfig
from fpsattention.core.reference import emulated_attention
from fpsattention.core.support import hopper_obstacle
from shapes import (
    BACKWARD_16K,
    BACKWARD_COG,
    BACKWARD_DENSE,
    BACKWARD_WINDOW,
    COG_DENSE,
    HUNYUAN_WINDOW,
    PAPER,
    SHORT_WINDOW,
    STEP_WINDOW,
    TRAINING_WINDOW,
    WAN_480P_WINDOW,
    WAN_DENSE,
    WAN_WINDOW,
    Shape,
    Window,
    select,
)


@dataclass(frozen=True)
class Work:
    """The work of one head under a window: density, attended and computed query-key pairs, and the resolved config."""

    density: float
    pairs: int
    computed_pairs: int
    resolved: ResolvedConfig

    def allowed(self, rows: torch.Tensor) -> torch.Tensor:
        """The tokens that each of these query tokens attends: bool [rows, L]."""
        geometry = self.resolved.geometry
        tile_of_token = geometry.tile_of_token
        tiles, index = tile_of_token[rows.cpu()].unique(return_inverse=True)
        seen = torch.zeros(len(tiles), geometry.n_tiles, dtype=torch.bool)
        for i, tile in enumerate(tiles.tolist()):
            seen[i, geometry.key_tiles(tile, self.resolved.windows[0], self.resolved.border)] = True
        return seen.to(rows.device)[index.to(rows.device)][:, tile_of_token.to(rows.device)]


@lru_cache
def work_of(shape: Shape, window: Window) -> Work:
    resolved = config_of(shape, window).resolve(shape.grid, shape.heads)
    geometry, tiles = resolved.geometry, resolved.windows[0]  # one window for all heads
    return Work(
        geometry.density(tiles, resolved.border),
        geometry.attended_pairs(tiles, resolved.border),
        geometry.computed_pairs(tiles, resolved.border),
        resolved,
    )


def seed_of(text: str) -> int:
    return zlib.crc32(text.encode())


def random_input(shape: Shape, device: str, seed_text: str) -> torch.Tensor:
    """A standard normal BF16 tensor in the shape's layout, determined by `seed_text`."""
    generator = torch.Generator(device).manual_seed(seed_of(seed_text))
    middle = (shape.tokens, shape.heads) if shape.layout == "NHD" else (shape.heads, shape.tokens)
    return torch.randn(
        shape.batch, *middle, shape.head_dim, dtype=torch.bfloat16, device=device, generator=generator
    )


def random_qkv(shape: Shape, device: str) -> tuple[torch.Tensor, ...]:
    """The shape's Q, K and V, the same in every run."""
    return tuple(random_input(shape, device, f"{shape.name} {name}") for name in "qkv")


def check_accuracy(shape: Shape, contender: Contender, work: Work, k, v, record: Record) -> None:
    """Compare a contender with exact attention on sampled rows of some heads, and fill in its record.

    Each contender gets queries of its own: memory that another one left behind cannot hold its answer.
    """
    device = k.device
    q = random_input(shape, device.type, f"{record.case} {record.op} q")
    out = contender.finish(contender.prepare(q, k, v)())
    rows = sampled_rows(shape, seed_of(f"{record.case} rows"), device)
    exact = exact_heads(shape, (q, k, v), rows, work.allowed(rows))
    judge(shape, out, rows, exact, contender.tolerance, record)
    if contender.name == OURS and contender.window in shape.emulated:
        try:
            one_head = (as_hnd(x, shape.layout)[:1, :1] for x in (q, k, v))
            config = config_of(shape, contender.window)
            emulated, _ = emulated_attention(*one_head, grid=shape.grid, config=config, tensor_layout="HND")
            record.emulation_rel_rms = relative_rms(emulated[0, 0, rows], exact[0])
            record.rms_to_emulation = relative_rms(out[0, 0], emulated[0, 0])
            same_rows = relative_rms(out[0, 0, rows], exact[0])
            record.error_over_emulation = same_rows / record.emulation_rel_rms
        except Exception as error:  # a failure of the emulation: the kernel is timed all the same
            record.remark(f"not compared with the emulation: {first_line(error)}")


def make_entries(shape: Shape, contenders: list[Contender], q, k, v, clock) -> tuple[dict, dict, list]:
    """Check every contender and collect what is to be timed.

    Returns the functions to time by key, the bytes of packed FP8 blocks by key, and (record, contender, work) of each
    contender.
    """
    entries, packed_bytes, measured = {}, {}, []
    for c in contenders:
        work = work_of(shape, c.window)
        tile = shape.tile if c.name in (OURS, FLEX) or c.window is not None else None
        window = None if c.window is None else work.resolved.windows[0]
        record = Record(
            *(shape.case(c.window), c.name, shape.grid, shape.heads, shape.head_dim, shape.batch),
            *(shape.layout, tile, window, work.density),
            note=c.note,
        )
        measured.append((record, c, work))
        key = f"{record.case} {record.op}"
        try:
            check_accuracy(shape, c, work, k, v, record)
            entries[key] = c.prepare(q, k, v)
            if c.parts is not None:
                parts = c.parts(q, k, v)
                entries["quantize"] = parts.quantize  # the same for every window of a tile
                entries[f"{key} attend"] = parts.attend
                packed_bytes[key] = parts.packed_bytes
        except Exception as error:  # a contender that fails is a line in the results
            record.fail(first_line(error))
            clock.check(key)
    return entries, packed_bytes, measured


def fill(record: Record, shape: Shape, work: Work, key: str, timings: dict, packed_bytes: int | None) -> None:
    """Fill in a record's times and the rates that follow from them."""

    def timing(name: str) -> Timing | None:
        result = timings.get(name)
        if isinstance(result, str):
            record.fail(result)
        return result if isinstance(result, Timing) else None

    sizes = (shape.heads, shape.head_dim, shape.batch)
    flops = attention_flops(work.pairs, *sizes)
    if total := timing(key):
        record.ms, record.spread = total.ms, total.spread
        record.tflops_total = flops / total.ms / 1e9
    if isinstance(copy := timings.get("copy"), Timing):
        record.copy_gbps = 2 * COPY_BYTES / copy.ms / 1e6
    if packed_bytes is None:
        return
    if attend := timing(f"{key} attend"):
        record.attn_ms = attend.ms
        record.tflops = flops / attend.ms / 1e9
        record.tflops_computed = attention_flops(work.computed_pairs, *sizes) / attend.ms / 1e9
    if quantize := timing("quantize"):
        record.quant_ms = quantize.ms
        record.quant_bytes = quantize_bytes(shape.tokens, *sizes, packed_bytes)
        record.quant_gbps = record.quant_bytes / quantize.ms / 1e6
    rows = shape.tokens * shape.heads * shape.batch
    # Packed blocks are read; output (16 bits) and LSE (fp32) are written.
    record.attn_hbm_bytes = packed_bytes + rows * (2 * shape.head_dim + 4)
    # All query blocks of a work item share one read of a key block. Items are taken as full.
    pairs_of_item = blocks_per_item(work.resolved, shape.head_dim) * _C.QUERY_BLOCK * _C.BLOCK
    items = work.computed_pairs / pairs_of_item * shape.heads * shape.batch
    record.attn_l2_bytes = round(items * _C.kv_block_bytes(shape.head_dim))


def blocks_per_item(resolved: ResolvedConfig, head_dim: int) -> int:
    """Query blocks of a work item, at most."""
    group = _C.TileGrid(resolved.grid, resolved.tile).tile_group(resolved.windows)
    return _C.blocks_per_item(head_dim, math.prod(group) * resolved.geometry.slot // _C.QUERY_BLOCK)


def compare(records: list[Record]) -> None:
    """Fill in the baselines of a shape's records: dense BF16 cuDNN, and torch's fastest dense backend."""
    dense = {r.op: r.ms for r in records if r.op in TORCH_DENSE and r.ms and not r.error}
    if not dense:
        return
    baseline = CUDNN if CUDNN in dense else min(dense, key=dense.get)
    fastest = min(dense, key=dense.get)
    for r in records:
        r.baseline, r.baseline_ms = baseline, dense[baseline]
        r.fastest_torch, r.fastest_torch_ms = fastest, dense[fastest]
        if r.ms and not r.error:
            r.speedup, r.speedup_fastest_torch = r.baseline_ms / r.ms, r.fastest_torch_ms / r.ms


def bench_shape(
    shape: Shape, contenders: list[Contender], clock, monitor: GpuMonitor, rounds: int, burst_ms: float
) -> list[Record]:
    """Check and time all contenders of one shape. Raises DeviceLost."""
    q, k, v = random_qkv(shape, clock.device)
    entries, packed_bytes, measured = make_entries(shape, contenders, q, k, v, clock)
    entries["copy"] = clock.copy
    start = time.monotonic()
    timings = time_interleaved(entries, clock, rounds, burst_ms, seed_of(shape.name))
    clock_mhz, power_w = monitor.between(start, time.monotonic())
    for record, c, work in measured:
        key = f"{record.case} {record.op}"
        fill(record, shape, work, key, timings, packed_bytes.get(key) if c.parts is not None else None)
        record.sm_clock_mhz, record.power_w = clock_mhz, power_w
    records = [record for record, _, _ in measured]
    compare(records)
    del entries, timings
    timed = (clock, monitor, rounds, burst_ms, seed_of(shape.name))
    if shape.training and shape.windows:
        records += bench_training(shape, (q, k, v), work_of, *timed)
    if shape.host:
        records += bench_host(shape, (q, k, v), clock)
    if shape.families:
        records += bench_families(shape, work_of, *timed)
    if any(shape.text):
        records += bench_text(shape, (q, k, v), work_of, *timed)
    if shape.mlp:
        del q, k, v
        records += bench_block(shape, work_of, *timed)
    return records


def measure_graph_gaps(shapes: list[Shape], records: list[Record], device: str) -> None:
    """Fill in the gaps between kernels, for the windows in `Shape.graph`.

    To be called after all timing: a profiler, once loaded, can slow down every later launch of the process.
    """
    for shape in shapes:
        window_of = {shape.case(window): window for window in shape.graph}
        for record in records:
            if record.op != OURS or record.case not in window_of:
                continue
            try:
                call = ours(shape, window_of[record.case]).prepare(*random_qkv(shape, device))
                record.graph_gap_us = graph_gap_us(call)
            except Exception as error:  # the times stay valid
                record.remark(f"gaps not measured: {first_line(error)}")


def _of(op: str, case: str, value):
    """A target's value: `value` of the record of one contender and case, or None without a good record."""

    def of(records: list[Record]) -> float | None:
        for r in records:
            if r.case == case and r.op == op and not r.error:
                return value(r)
        return None

    return of


def _our(case: str, value):
    """`_of` FPSAttention."""
    return _of(OURS, case, value)


def _cudnn_speedup(r: Record) -> float | None:
    return r.speedup if r.baseline == CUDNN else None


def _cudnn_speedup_of_kernel(r: Record) -> float | None:
    return r.baseline_ms / r.attn_ms if r.baseline == CUDNN and r.attn_ms else None


def _of_copy_bandwidth(r: Record) -> float | None:
    return r.quant_gbps / r.copy_gbps if r.quant_gbps and r.copy_gbps else None


def _window_over_dense(records: list[Record]) -> float | None:
    """Of the families' records: there each is timed among its like. Elsewhere the calls before it set its clock."""
    cases = (f"{case} {GAUSSIAN} {INPUTS}" for case in (WAN_WINDOW, WAN_DENSE))
    window, dense = (_our(case, lambda r: r.tflops)(records) for case in cases)
    return window / dense if window and dense else None


def _backward_window_over_dense(records: list[Record]) -> float | None:
    window, dense = (_our(c, lambda r: r.tflops_total)(records) for c in (BACKWARD_WINDOW, BACKWARD_DENSE))
    return window / dense if window and dense else None


def _kernel_over_cudnn_fp8(records: list[Record]) -> float | None:
    """Both without quantisation."""
    ours_ms = _our(WAN_DENSE, lambda r: r.attn_ms)(records)
    cudnn_ms = _of(CUDNN_FP8, WAN_DENSE, lambda r: r.ms)(records)
    return cudnn_ms / ours_ms if ours_ms and cudnn_ms else None


def _slowest_family(ending: str):
    """A target's value: the lowest speed on a family over that on Gaussian inputs, in cases with this ending."""

    def of(records: list[Record]) -> float | None:
        good = (r for r in records if r.over_gaussian and not r.error)
        return min((r.over_gaussian for r in good if r.case.endswith(f"{r.family} {ending}")), default=None)

    return of


def _worst(value):
    """A target's value: the largest `value` of FPSAttention's records, or None when none has it."""

    def of(records: list[Record]) -> float | None:
        return max((x for r in records if r.op == OURS and (x := value(r)) is not None), default=None)

    return of


def _deterministic_over_other(records: list[Record]) -> float | None:
    """The most time that a backward with deterministic=True takes, over the time of the same one without."""
    other = {r.case: r.ms for r in records if r.op == OURS and r.case.endswith(BACKWARD) and not r.error}
    ratios = (
        r.ms / other[r.case]
        for r in records
        if r.op == OURS_DETERMINISTIC and r.ms and not r.error and other.get(r.case)
    )
    return max(ratios, default=None)


TARGETS = (
    Target(
        "dense 21x45x80, 40 heads, kernel alone: x cuDNN", _our(WAN_DENSE, _cudnn_speedup_of_kernel), 2.25
    ),
    Target("dense 21x45x80, 40 heads: x cuDNN", _our(WAN_DENSE, _cudnn_speedup), 2.2),
    Target("dense 21x45x80, 40 heads, kernel alone: x cuDNN FP8", _kernel_over_cudnn_fp8, 1.5),
    Target("paper's setting 36x48x48, window 6,6,1: x cuDNN", _our(PAPER, _cudnn_speedup), 11.5),
    Target("21x45x80, window 3,3,9: of the dense case's TFLOP/s", _window_over_dense, 0.95),
    Target("kernel alone, slowest family of inputs: x Gaussian", _slowest_family(INPUTS), 0.95),
    Target("21x30x52, 12 heads, density .058: x cuDNN", _our(SHORT_WINDOW, _cudnn_speedup), 20),
    Target("33x45x80, window 2,5,5 (density .1): x cuDNN", _our(HUNYUAN_WINDOW, _cudnn_speedup), 10),
    Target("dense 11x48x85, 48 heads, D 64: x cuDNN", _our(COG_DENSE, _cudnn_speedup), 2.1),
    Target("quantisation 21x45x80, 40 heads: of copy bandwidth", _our(WAN_DENSE, _of_copy_bandwidth), 0.88),
    Target(
        "21x30x52, window 1,5,3, CUDA graph: largest gap, us",
        _our(WAN_480P_WINDOW, lambda r: r.graph_gap_us),
        10,
        at_least=False,
    ),
    Target("backward, dense 21x45x80, 40 heads: x cuDNN", _our(BACKWARD_DENSE, _cudnn_speedup), 1.4),
    Target("backward, dense 16x32x32, 40 heads: x cuDNN", _our(BACKWARD_16K, _cudnn_speedup), 1.4),
    Target("backward, dense 13x30x45, 48 heads, D 64: x cuDNN", _our(BACKWARD_COG, _cudnn_speedup), 1.45),
    Target(
        "backward, deterministic: time over the other's, worst",
        _deterministic_over_other,
        1.15,
        at_least=False,
    ),
    Target("backward, slowest family of inputs: x Gaussian", _slowest_family(f"{BACKWARD} {INPUTS}"), 0.95),
    Target("backward, window 3,3,9: of the dense one's TFLOP/s", _backward_window_over_dense, 0.9),
    Target("forward and backward, window 3,3,9: x dense cuDNN", _our(TRAINING_WINDOW, _cudnn_speedup), 11),
    Target("training step of a Wan 14B block, 3,3,9: x cuDNN", _our(STEP_WINDOW, _cudnn_speedup), 3.6),
    Target(
        "text tokens: time beyond their share of work", _worst(lambda r: r.text_cost), 0.02, at_least=False
    ),
    Target("4,096 tokens: host time of a call, x SDPA", _worst(lambda r: r.host_ratio), 5, at_least=False),
    Target("4,096 tokens: call and GPU, x SDPA", _worst(lambda r: r.total_ratio), 1.1, at_least=False),
    Target(
        "error against exact, worst: x the emulation's",
        _worst(lambda r: r.error_over_emulation),
        1.1,
        at_least=False,
    ),
    Target(
        "relative RMS to the emulation, worst", _worst(lambda r: r.rms_to_emulation), 2e-2, at_least=False
    ),
    Target("records of FPSAttention with an error", _worst(lambda r: bool(r.error) * 1.0), 0, at_least=False),
)


def run(shapes: list[Shape], options: argparse.Namespace, output: Path) -> Results:
    """Measure the shapes one after the other, save after each, and judge the targets."""
    began = time.monotonic()
    rounds, burst_ms = (3, 60.0) if options.quick else (5, 100.0)
    meta = conditions() | {
        "fpsattention": fps.__version__,
        "rounds": rounds,
        "burst_ms": burst_ms,
        "heads_scale": options.heads_scale,
        "quick": options.quick,
        "peers": installed_peers(),
        "peer_failures": [],
    }
    results = Results(meta)
    clock = BenchClock()

    def save() -> None:
        meta["seconds"] = time.monotonic() - began
        for name in ("sm_clock_mhz", "power_w"):
            samples = [x for r in results.records if (x := getattr(r, name)) is not None]
            meta[name] = statistics.median(samples) if samples else None
        results.targets = [t.judge(results.records) for t in TARGETS]
        results.save(output)

    with GpuMonitor(gpu_uuid()) as monitor:
        for shape in shapes:
            if shape.flex:
                torch.compiler.reset()  # else the second shape is compiled for dynamic sizes, which are slower
            contenders, failures = contenders_of(shape)
            meta["peer_failures"] += failures
            try:
                results.records += bench_shape(shape, contenders, clock, monitor, rounds, burst_ms)
            except DeviceLost as error:
                meta["device_lost"] = f"{shape.name}: {error}"
                break
            finally:
                save()
            gc.collect()
            torch.cuda.empty_cache()
            print(f"{meta['seconds']:6.1f} s  {shape.name} done", file=sys.stderr, flush=True)
        else:  # the device was not lost
            measure_graph_gaps(shapes, results.records, clock.device)
            save()
    return results


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="only the shapes with a target, in fewer rounds")
    parser.add_argument(
        "--case",
        nargs="+",
        default=[],
        metavar="NAME",
        help="shapes, cases (shape/window), 'length', 'host' or 'families'",
    )
    parser.add_argument("--heads-scale", type=float, default=1.0, help="factor on the number of heads")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    try:
        shapes = select(options.case, options.quick, options.heads_scale)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if obstacle := hopper_obstacle():
        print(f"bench_forward.py {obstacle}", file=sys.stderr)
        return 2
    os.environ["FPSATTENTION_STRICT"] = "1"  # else a fallback to the reference would be timed, for hours
    partial = options.quick or options.case or options.heads_scale != 1.0
    name = gpu_slug(torch.cuda.get_device_name()) + ("-partial" if partial else "")
    output = options.output or Path(__file__).parent / "results" / f"{name}.json"
    with torch.no_grad():
        results = run(shapes, options, output)
    print(table(results.records))
    meta = results.meta
    print(
        f"\n{meta['gpu']}, {meta['sm_clock_mhz']} MHz and {meta['power_w']} W under load, "
        f"driver {meta['driver']}, torch {meta['torch']}, cuDNN {meta['cudnn']}, "
        f"fpsattention {meta['fpsattention']}, {meta['seconds']:.0f} s"
    )
    for failure in meta["peer_failures"]:
        print(f"peer failed: {failure}")
    if "device_lost" in meta:
        print(f"the device was lost, the run is incomplete: {meta['device_lost']}")
    if options.heads_scale != 1.0:
        print("no targets: --heads-scale changes their shapes")
    else:
        print(target_lines(results.targets))
    print(f"wrote {output}")
    return 1 if "device_lost" in meta else 0


if __name__ == "__main__":
    sys.exit(main())
