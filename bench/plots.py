"""Pictures for docs/images from the records of bench_forward.py; a picture that they cannot fill is skipped.

python bench/plots.py [--input FILE] [--output DIRECTORY]
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import FuncFormatter, NullFormatter

from common import CUDNN, CUDNN_FP8, FLASH, FLEX, OURS, Record, Results

# Measured at 700 W, the memory's on an H200, the others on an H100, whose SMs are the same; see docs/performance.md.
FP8_TFLOPS = 1790  # e4m3 wgmma m64n128k32, at the clock that 700 W allows
BF16_TFLOPS = 737  # cuBLAS, 16384^3
HBM_TBPS = 4.28  # copy, read + write
L2_TBPS = 7.5  # L2 to shared memory, bulk copies

# Operations of the quantisation per element: a comparison for the amax, a product with its inverse.
QUANTIZE_OPS = 2


class Peer(NamedTuple):
    """A point that others reach: dense, batch 1, useful TFLOP/s; not of the same run as the records."""

    name: str
    head_dim: int
    tokens: int
    tflops: float


# Measured on an H200 at 700 W, 40 heads of 128 and 48 of 64. FA3 FP8: a scale per tensor, quantisation not in the time;
# SageAttention2: in the time.
PEERS = (
    Peer("FA3 FP8", 128, 75_600, 918),
    Peer("SageAttention2", 128, 75_600, 798),
    Peer("FA3 BF16", 128, 75_600, 659),
    Peer("FA3 FP8", 64, 44_880, 673),
    Peer("SageAttention2", 64, 44_880, 544),
    Peer("FA3 BF16", 64, 44_880, 507),
)

WITH_QUANTISATION, KERNEL_ALONE = "FPSAttention, with quantisation", "FPSAttention, kernel alone"

CUDNN_FP8_ALONE = "cuDNN FP8, kernel alone"

INK, GREY, BLUE, ORANGE, GREEN, PURPLE = "#222222", "#8a8a8a", "#1f5fa8", "#d1651b", "#2f8f5b", "#7a4fa3"
STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "axes.linewidth": 0.8,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "savefig.dpi": 200,
}


class NothingToDraw(ValueError):
    """The records hold nothing of what a picture shows."""


def good(records: list[Record], op: str) -> list[Record]:
    """The records of one op that have a time and no error."""
    return [r for r in records if r.op == op and r.ms and not r.error]


def tokens(r: Record) -> int:
    return math.prod(r.grid)


def elements(r: Record) -> int:
    """Elements of Q, and of K, of V and of the output."""
    return r.batch * r.heads * tokens(r) * r.head_dim


def of_lengths(records: list[Record]) -> list[Record]:
    """The records of the suite "length", which has a picture of its own."""
    return [r for r in records if r.is_forward and r.case.startswith("length-")]


def of_models(records: list[Record]) -> list[Record]:
    """All other records of forwards."""
    return [r for r in records if r.is_forward and not r.case.startswith("length-")]


def attention_points(records: list[Record]) -> dict[str, list[tuple[float, float]]]:
    """(operations per byte, TFLOP/s) of every attention kernel, by what the bytes are and who ran it."""
    ours = [r for r in good(records, OURS) if r.attn_ms and r.attn_hbm_bytes]

    def points(r: Record, n_bytes: int, ms: float, tflops: float) -> tuple[float, float]:
        return tflops * ms * 1e9 / n_bytes, tflops

    return {
        f"FP8 attention, D {d}": [
            points(r, r.attn_hbm_bytes, r.attn_ms, r.tflops) for r in ours if r.head_dim == d
        ]
        for d in (128, 64)
    } | {
        "same, per byte from L2": [points(r, r.attn_l2_bytes, r.attn_ms, r.tflops) for r in ours],
        "cuDNN BF16 attention": [
            points(r, 4 * 2 * elements(r), r.ms, r.tflops_total) for r in good(records, CUDNN)
        ],
        "quantisation": [
            points(r, r.quant_bytes, r.quant_ms, QUANTIZE_OPS * 3 * elements(r) / r.quant_ms / 1e9)
            for r in {r.case.split("/")[0]: r for r in good(records, OURS) if r.quant_ms}.values()
        ],
    }


MARKS = {
    "FP8 attention, D 128": dict(marker="o", color=BLUE),
    "FP8 attention, D 64": dict(marker="s", color=GREEN),
    "same, per byte from L2": dict(marker="o", markerfacecolor="none", color=PURPLE),
    "cuDNN BF16 attention": dict(marker="^", color=GREY),
    "quantisation": dict(marker="D", color=ORANGE),
}


def _roofs(ax, x: np.ndarray) -> None:
    for bandwidth, style in ((HBM_TBPS, "-"), (L2_TBPS, "--")):
        ridge = FP8_TFLOPS / bandwidth
        slope = x[x < ridge]
        ax.plot(
            np.append(slope, ridge), np.append(slope, ridge) * bandwidth, style, color=INK, lw=1.1, zorder=2
        )
    ax.hlines(FP8_TFLOPS, FP8_TFLOPS / L2_TBPS, x[-1], color=INK, lw=1.3, zorder=2)
    ax.hlines(BF16_TFLOPS, BF16_TFLOPS / L2_TBPS, x[-1], color=GREY, lw=1.1, zorder=1)


def roofline(results: Results, path: Path) -> None:
    """Measured kernels under the ceilings of the machine; at the right, the corner where attention lives."""
    groups = {name: pts for name, pts in attention_points(of_models(results.records)).items() if pts}
    if not groups:
        raise NothingToDraw("no record of an attention kernel")
    with plt.rc_context(STYLE):
        fig, (whole, corner) = plt.subplots(
            1, 2, figsize=(9.6, 3.9), width_ratios=(1.25, 1), layout="constrained"
        )
        x = np.geomspace(0.2, 3e5, 300)
        for ax in (whole, corner):
            _roofs(ax, x)
            for name, pts in groups.items():
                ax.plot(
                    *zip(*pts, strict=True), linestyle="", markersize=5, zorder=3, label=name, **MARKS[name]
                )
            ax.set_xscale("log")
            ax.set_xlabel("operations per byte moved")
        whole.set_yscale("log")
        whole.set_xlim(x[0], x[-1])
        whole.set_ylim(0.3, 4500)
        whole.set_ylabel("useful TFLOP/s")
        whole.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        whole.text(x[-1], FP8_TFLOPS * 1.12, f"FP8 tensor cores {FP8_TFLOPS}", ha="right", fontsize=8)
        whole.legend(loc="lower right")
        corner.set_xlim(100, x[-1])
        corner.set_ylim(0, FP8_TFLOPS * 1.08)
        corner.text(x[-1], BF16_TFLOPS + 15, f"BF16 cuBLAS {BF16_TFLOPS}", ha="right", fontsize=8, color=GREY)
        corner.set_title("the compute-bound corner, linear scale", fontsize=9)
        fig.suptitle(f"Roofline, {results.meta['gpu']}", fontsize=10)
        fig.draw_without_rendering()  # the layout, and with it the angle of the slopes, is known from here on
        for bandwidth, name, at, lift, side in (
            (HBM_TBPS, "HBM", 6, 0.8, "top"),
            (L2_TBPS, "L2", 2, 1.2, "bottom"),
        ):
            (x0, y0), (x1, y1) = whole.transData.transform([(1, bandwidth), (10, 10 * bandwidth)])
            angle = math.degrees(math.atan2(y1 - y0, x1 - x0))
            label = f"{name} {bandwidth:g} TB/s"
            where = dict(rotation=angle, rotation_mode="anchor", va=side)
            whole.text(at, at * bandwidth * lift, label, fontsize=8, **where)
        _save(fig, path)


def density_series(
    records: list[Record],
) -> tuple[str | None, dict[str, list[tuple[float, float]]], float | None]:
    """(swept shape, {label: sorted (density, speed-up)}, dense speed-up of the swept shape)."""
    ours = [r for r in good(records, OURS) if r.speedup and r.baseline == CUDNN and r.head_dim == 128]
    by_shape: dict[str, list[Record]] = {}
    for r in ours:
        by_shape.setdefault(r.case.split("/")[0], []).append(r)
    if not by_shape:
        return None, {}, None
    swept = max(by_shape, key=lambda s: len(by_shape[s]))
    series = {name: sorted((r.density, r.speedup) for r in rs) for name, rs in by_shape.items()}
    flex = sorted((r.density, r.speedup) for r in good(records, FLEX) if r.speedup and r.baseline == CUDNN)
    if flex:
        series["FlexAttention BF16"] = flex
    dense = next((r.speedup for r in by_shape[swept] if r.density == 1.0), None)
    return swept, series, dense


def time_series(records: list[Record], shape: str) -> dict[str, list[tuple[float, float]]]:
    """{label: sorted (density, ms)} of one shape's windows."""
    of_shape = [r for r in records if r.case.split("/")[0] == shape]
    ours = good(of_shape, OURS)
    series = {
        WITH_QUANTISATION: sorted((r.density, r.ms) for r in ours),
        KERNEL_ALONE: sorted((r.density, r.attn_ms) for r in ours if r.attn_ms),
        "FlexAttention BF16": sorted((r.density, r.ms) for r in good(of_shape, FLEX)),
        "dense BF16 cuDNN": sorted((r.density, r.ms) for r in good(of_shape, CUDNN)),
    }
    return {label: pts for label, pts in series.items() if pts}


def _log_axes(ax, x_ticks: tuple, y_ticks: tuple) -> None:
    ax.set_xscale("log")
    ax.set_yscale("log")
    for axis, ticks in ((ax.xaxis, x_ticks), (ax.yaxis, y_ticks)):
        axis.set_ticks(ticks)
        axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
        axis.set_minor_formatter(NullFormatter())


DENSITY_TICKS = (0.02, 0.05, 0.1, 0.2, 0.5, 1)
TIME_STYLES = {
    WITH_QUANTISATION: dict(marker="o", color=BLUE, lw=1.4),
    KERNEL_ALONE: dict(marker="o", color=BLUE, markerfacecolor="none", lw=0.8),
    "FlexAttention BF16": dict(marker="x", color=INK, linestyle=""),
    "dense BF16 cuDNN": dict(marker="^", color=GREY, linestyle=""),
}


# Marker and colour of each shape beside the one that is swept over windows.
SHAPE_STYLES = (
    ("s", GREEN),
    ("^", PURPLE),
    ("D", ORANGE),
    ("v", "#b03060"),
    ("P", "#3a9aa5"),
    ("X", "#8c6d1f"),
    (">", "#d46ab0"),
    ("<", "#5b7f2b"),
)


def _legend_below(ax) -> None:
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2)


def _draw_speedup(ax, swept: str, series: dict, dense: float | None, x: np.ndarray) -> None:
    if dense is not None:
        ax.plot(x, dense / x, color=BLUE, lw=1, ls="--", label=f"ideal: {dense:.2f} / density", zorder=1)
    ax.plot(x, 1 / x, color=GREY, lw=1, ls=":", label="BF16 ideal: 1 / density", zorder=1)
    others = itertools.cycle(SHAPE_STYLES)
    for name, pts in series.items():
        if name == swept:
            style = dict(marker="o", color=BLUE, lw=1.4, label=f"FPSAttention, {name}")
        elif name == "FlexAttention BF16":
            style = dict(marker="x", color=INK, linestyle="", label=name)
        else:
            marker, color = next(others)
            style = dict(marker=marker, color=color, linestyle="", label=f"FPSAttention, {name}")
        ax.plot(*zip(*pts, strict=True), markersize=5.5, zorder=3, **style)
    _log_axes(ax, DENSITY_TICKS, (0.5, 1, 2, 5, 10, 20, 50))
    speeds = [s for pts in series.values() for _, s in pts]
    ax.set_ylim(min(0.9, *speeds) * 0.9, max((dense or 1) / x[0], *speeds) * 1.1)
    ax.set_ylabel("speed-up over dense BF16 cuDNN,\nquantisation included")
    _legend_below(ax)


def _draw_time(ax, swept: str, series: dict, x: np.ndarray) -> None:
    for label, pts in series.items():
        ax.plot(*zip(*pts, strict=True), markersize=5.5, zorder=3, label=label, **TIME_STYLES[label])
    if dense := dict(series[WITH_QUANTISATION]).get(1.0):
        label = f"ideal: {dense:.3g} ms * density"
        ax.plot(x, dense * x, color=BLUE, lw=1, ls="--", label=label, zorder=1)
    times = [ms for pts in series.values() for _, ms in pts]
    _log_axes(ax, DENSITY_TICKS, (0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500))
    ax.set_ylim(min(*times, (dense or math.inf) * x[0]) * 0.9, max(times) * 1.2)
    ax.set_ylabel(f"ms, {swept}")
    _legend_below(ax)


def speedup_over_density(results: Results, path: Path) -> None:
    """Against the share of pairs attended: speed-up over dense BF16 cuDNN, quantisation included, and time."""
    records = of_models(results.records)
    swept, series, dense = density_series(records)
    if swept is None:
        raise NothingToDraw("no record of FPSAttention at head_dim 128 with a cuDNN baseline")
    least = min(density for pts in series.values() for density, _ in pts)
    x = np.geomspace(least * 0.85, 1, 100)
    with plt.rc_context(STYLE):
        fig, (speed, time) = plt.subplots(1, 2, figsize=(10, 5.2), layout="constrained")
        _draw_speedup(speed, swept, series, dense, x)
        _draw_time(time, swept, time_series(records, swept), x)
        for ax in (speed, time):
            ax.set_xlim(x[0], 1.1)
            ax.set_xlabel("density (attended pairs / all pairs)")
        fig.suptitle(f"{results.meta['gpu']}, batch 1, head_dim 128", fontsize=10)
        _save(fig, path)


def length_series(records: list[Record], head_dim: int) -> dict[str, list[tuple[int, float]]]:
    """{label: sorted (tokens, useful TFLOP/s)} of the dense runs over length."""

    def points(op: str, rate: str) -> list[tuple[int, float]]:
        rated = [(tokens(r), getattr(r, rate)) for r in good(records, op) if r.head_dim == head_dim]
        return sorted((n, tflops) for n, tflops in rated if tflops)

    series = {
        KERNEL_ALONE: points(OURS, "tflops"),
        WITH_QUANTISATION: points(OURS, "tflops_total"),
        CUDNN_FP8_ALONE: points(CUDNN_FP8, "tflops_total"),
        "cuDNN BF16": points(CUDNN, "tflops_total"),
        "torch flash BF16": points(FLASH, "tflops_total"),
    }
    return {label: pts for label, pts in series.items() if pts}


LENGTH_STYLES = {
    KERNEL_ALONE: dict(marker="o", color=BLUE, markerfacecolor="none", ls="--", lw=1.2),
    WITH_QUANTISATION: dict(marker="o", color=BLUE, lw=1.4),
    CUDNN_FP8_ALONE: dict(marker="^", color=GREEN, markerfacecolor="none", ls="--", lw=1.2),
    "cuDNN BF16": dict(marker="^", color=GREY, lw=1.2),
    "torch flash BF16": dict(marker="v", color=INK, lw=1.2),
}
PEER_STYLES = {
    "FA3 FP8": dict(marker="s", color=GREEN),
    "SageAttention2": dict(marker="D", color=ORANGE),
    "FA3 BF16": dict(marker="P", color=PURPLE),
}


def tflops_over_length(results: Results, path: Path) -> None:
    """Useful TFLOP/s of dense attention against the number of tokens, at both head dims."""
    records = of_lengths(results.records)
    if not any(length_series(records, d) for d in (64, 128)):
        raise NothingToDraw('no record of the suite "length"')
    legend = {}
    with plt.rc_context(STYLE):
        fig, axes = plt.subplots(1, 2, figsize=(10.6, 3.9), sharey=True, layout="constrained")
        for ax, head_dim in zip(axes, (128, 64), strict=True):
            for label, pts in length_series(records, head_dim).items():
                (legend[label],) = ax.plot(*zip(*pts, strict=True), markersize=5, **LENGTH_STYLES[label])
            for name, style in PEER_STYLES.items():
                pts = [(p.tokens, p.tflops) for p in PEERS if (p.name, p.head_dim) == (name, head_dim)]
                if pts:
                    (legend[f"{name} *"],) = ax.plot(*zip(*pts, strict=True), linestyle="", **style)
            ax.set_xscale("log", base=2)
            ax.xaxis.set_major_formatter(FuncFormatter(lambda n, _: f"{n / 1024:g}k"))
            ax.set_ylim(bottom=0)
            ax.set_xlabel("tokens")
            ax.set_title(f"head_dim {head_dim}", fontsize=9)
        axes[0].set_ylabel("useful TFLOP/s, dense")
        fig.suptitle(f"{results.meta['gpu']}, batch 1", fontsize=10)
        fig.legend(
            legend.values(),
            legend,
            loc="outside right center",
            title="* other runs, or published",
            title_fontsize=8,
        )
        _save(fig, path)


def split_bars(records: list[Record], dense: bool) -> list[tuple[str, float, float]]:
    """(case, ms of quantisation, ms of attention) of every dense case, or of every windowed one, fastest first."""
    ours = [r for r in good(records, OURS) if r.quant_ms and r.attn_ms and (r.density == 1) == dense]
    return [(r.case, r.quant_ms, r.attn_ms) for r in sorted(ours, key=lambda r: r.quant_ms + r.attn_ms)]


def time_split(results: Results, path: Path) -> None:
    """What of each case's time is quantisation, and what attention."""
    panels = {name: split_bars(of_models(results.records), name == "dense") for name in ("dense", "windowed")}
    panels = {name: bars for name, bars in panels.items() if bars}
    if not panels:
        raise NothingToDraw("no record of FPSAttention with the times of its parts")
    rows = max(len(bars) for bars in panels.values())
    with plt.rc_context(STYLE | {"axes.grid.axis": "x"}):
        fig, axes = plt.subplots(
            1,
            len(panels),
            figsize=(4.9 * len(panels), 1.2 + 0.28 * rows),
            squeeze=False,
            layout="constrained",
        )
        for ax, (name, bars) in zip(axes[0], panels.items(), strict=True):
            cases, quantise, attend = zip(*bars, strict=True)
            ax.barh(cases, quantise, color=ORANGE, label="quantisation", zorder=2)
            ax.barh(cases, attend, left=quantise, color=BLUE, label="attention", zorder=2)
            for y, (_, q, a) in enumerate(bars):
                ax.text(q + a, y, f"  {q:.2f} + {a:.2f}: {q / (q + a):.0%}", va="center", fontsize=7)
            ax.set_xlim(0, 1.45 * max(q + a for _, q, a in bars))
            ax.set_xlabel("ms (quantisation + attention: share of quantisation)")
            ax.set_title(name, fontsize=9)
            ax.legend(loc="lower right")
        fig.suptitle(f"{results.meta['gpu']}, batch 1", fontsize=10)
        _save(fig, path)


PICTURES = {
    "roofline.png": roofline,
    "speedup_over_density.png": speedup_over_density,
    "tflops_over_length.png": tflops_over_length,
    "time_split.png": time_split,
}


def _save(fig, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path)
    plt.close(fig)


def main(argv: list[str] | None = None) -> int:
    root = Path(__file__).resolve().parents[1]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--input", type=Path, default=root / "bench" / "results" / "h200.json")
    parser.add_argument("--output", type=Path, default=root / "docs" / "images")
    options = parser.parse_args(argv)
    results = Results.load(options.input)
    for name, draw in PICTURES.items():
        try:
            draw(results, options.output / name)
            print(f"wrote {options.output / name}")
        except NothingToDraw as reason:
            print(f"{name} skipped: {reason}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
