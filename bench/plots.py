"""Pictures for docs/images from the records of bench_forward.py: roofline.png and speedup_over_density.png.

python bench/plots.py [--input FILE] [--output DIRECTORY]
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import FuncFormatter, NullFormatter

from common import CUDNN, FLEX, OURS, Record, Results

# Measured on an H100 SXM 80 GB at 700 W; see docs/performance.md.
FP8_TFLOPS = 1790  # e4m3 wgmma m64n128k32, at the clock that 700 W allows
BF16_TFLOPS = 737  # cuBLAS, 16384^3
HBM_TBPS = 3.0  # copy, read + write
L2_TBPS = 7.5  # L2 to shared memory, bulk copies
EXPONENTIALS = (
    16 * 132 * 1.66e9
)  # per second: 16 per clock and SM; attention needs one per 4 * head_dim operations

# Operations of the quantisation per element: a comparison for the amax, a product with its inverse.
QUANTIZE_OPS = 2

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


def good(records: list[Record], op: str) -> list[Record]:
    """The records of one op that have a time and no error."""
    return [r for r in records if r.op == op and r.ms and not r.error]


def elements(r: Record) -> int:
    """Elements of Q, and of K, of V and of the output."""
    return r.batch * r.heads * r.grid[0] * r.grid[1] * r.grid[2] * r.head_dim


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
    groups = {name: pts for name, pts in attention_points(results.records).items() if pts}
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
        if "FP8 attention, D 64" in groups:
            limit = 4 * 64 * EXPONENTIALS / 1e12
            corner.axhline(limit, color=GREEN, lw=1, ls=":")
            label = f"exponential unit, D 64: {limit:.0f}"
            corner.text(x[-1], limit + 15, label, ha="right", fontsize=8, color=GREEN)
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
    ours = [r for r in ours if not r.case.startswith("length-")]
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


def speedup_over_density(results: Results, path: Path) -> None:
    """Speed-up over dense BF16 cuDNN, quantisation included, against the share of pairs attended."""
    swept, series, dense = density_series(results.records)
    if swept is None:
        raise ValueError("no record of FPSAttention with a cuDNN baseline: nothing to draw")
    others = iter([("s", GREEN), ("^", PURPLE), ("D", ORANGE), ("v", "#b03060"), ("P", "#3a9aa5")])
    least = min(density for pts in series.values() for density, _ in pts)
    with plt.rc_context(STYLE):
        fig, ax = plt.subplots(figsize=(5.6, 4.2), layout="constrained")
        x = np.geomspace(least * 0.85, 1, 100)
        if dense is not None:
            ax.plot(x, dense / x, color=BLUE, lw=1, ls="--", label=f"ideal: {dense:.2f} / density", zorder=1)
        ax.plot(x, 1 / x, color=GREY, lw=1, ls=":", label="BF16 ideal: 1 / density", zorder=1)
        for name, pts in series.items():
            if name == swept:
                style = dict(marker="o", color=BLUE, lw=1.4, label=f"FPSAttention, {name}")
            elif name == "FlexAttention BF16":
                style = dict(marker="x", color=INK, linestyle="", label=name)
            else:
                marker, color = next(others, ("o", GREY))
                style = dict(marker=marker, color=color, linestyle="", label=f"FPSAttention, {name}")
            ax.plot(*zip(*pts, strict=True), markersize=5.5, zorder=3, **style)
        ax.set_xscale("log")
        ax.set_yscale("log")
        for axis, ticks in (
            (ax.xaxis, (0.02, 0.05, 0.1, 0.2, 0.5, 1)),
            (ax.yaxis, (0.5, 1, 2, 5, 10, 20, 50)),
        ):
            axis.set_ticks(ticks)
            axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
            axis.set_minor_formatter(NullFormatter())
        speeds = [s for pts in series.values() for _, s in pts]
        ax.set_xlim(x[0], 1.1)
        ax.set_ylim(min(0.9, *speeds) * 0.9, max((dense or 1) / x[0], *speeds) * 1.1)
        ax.set_xlabel("density (attended pairs / all pairs)")
        ax.set_ylabel("speed-up over dense BF16 cuDNN, quantisation included")
        ax.set_title(f"{results.meta['gpu']}, batch 1, head_dim 128", fontsize=9)
        ax.legend(loc="upper right")
        _save(fig, path)


def _save(fig, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path)
    plt.close(fig)


def main(argv: list[str] | None = None) -> int:
    root = Path(__file__).resolve().parents[1]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--input", type=Path, default=root / "bench" / "results" / "h100.json")
    parser.add_argument("--output", type=Path, default=root / "docs" / "images")
    options = parser.parse_args(argv)
    results = Results.load(options.input)
    roofline(results, options.output / "roofline.png")
    speedup_over_density(results, options.output / "speedup_over_density.png")
    print(f"wrote {options.output / 'roofline.png'} and {options.output / 'speedup_over_density.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
