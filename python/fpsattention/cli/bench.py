"""`fpsattention bench` and `fpsattention profile`: a user's own shape on this machine's GPU."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from ..core.api import attention, quantize_qkv
from ..core.config import AttentionConfig, ResolvedConfig
from ..core.support import HEAD_DIMS, hopper_obstacle
from . import catalog
from .console import by, milliseconds, people, print_json, progress, table_of
from .errors import MachineError, asked
from .timing import CudaClock, DeviceLost, Timing, time_interleaved

BURST_MS = 100  # of each contender in each round
CALLS = 3  # under a profiler: two to load the kernel and warm the GPU, one to look at
OURS, QUANTISATION = "FPSAttention", "of it quantisation"
TORCH = {"CUDNN_ATTENTION": "torch SDPA, cuDNN", "FLASH_ATTENTION": "torch SDPA, FlashAttention"}
NCU_SECTIONS = (
    "SpeedOfLight",
    "ComputeWorkloadAnalysis",
    "WarpStateStats",
    "SourceCounters",
    "MemoryWorkloadAnalysis",
    "SchedulerStats",
)


def run(*, model, grid, heads, head_dim, tile, window, border, rounds, as_json) -> None:
    """The `bench` command. Raises UserError for a shape that is not legal, MachineError without a Hopper GPU."""
    shape, resolved = _resolve(model, grid, heads, head_dim, tile, window, border)
    if obstacle := _obstacle():
        raise MachineError(f"{obstacle}; `fpsattention plan` estimates the time without one")
    console = people(as_json)
    with progress() as bar, torch.no_grad():
        bar.add_task("measuring", total=None)
        try:
            results = time_interleaved(_contenders(shape, resolved), CudaClock(), rounds, BURST_MS)
        except DeviceLost as error:
            raise MachineError(str(error)) from error
    rows = _rows(results, shape, resolved)
    if "error" in rows[0]:
        raise MachineError(rows[0]["error"])

    gpu = torch.cuda.get_device_name()
    console.print(
        f"{shape.name or 'grid'} {by(resolved.grid)}: {resolved.geometry.n_tokens:,} tokens, {shape.heads} heads of "
        f"{shape.head_dim}, tile {by(resolved.tile)}, window {by(resolved.windows[0])}, density "
        f"{resolved.density:.3f}, on {gpu}"
    )
    table = table_of("", "time", "spread", "TFLOP/s", "FPSAttention is faster by", words=("",))
    for row in rows:
        if "error" in row:
            continue
        tflops, speedup = row["tflops"], row["speedup"]
        table.add_row(
            row["name"],
            milliseconds(row["ms"]),
            f"{row['spread']:.1%}",
            "" if tflops is None else f"{tflops:,.0f}",
            "" if speedup is None else f"{speedup:.2f}x",
        )
    console.print(table)
    for row in rows:
        if "error" in row:
            console.print(f"{row['name']} did not run: {row['error']}")
    console.print(
        "BF16 in and out, batch 1; medians of rounds taken in turns, spread is (slowest - fastest round) / median. "
        f"FPSAttention's time includes quantisation; torch attends everything, FPSAttention {resolved.density:.1%}."
    )
    if shape.text_tokens:
        console.print(f"Video tokens only: the model's {shape.text_tokens} text tokens are left out.")
    if as_json:
        print_json(
            {
                "gpu": gpu,
                "torch": torch.__version__,
                "model": shape.name or None,
                "grid": resolved.grid,
                "heads": shape.heads,
                "head_dim": shape.head_dim,
                "tile": resolved.tile,
                "window": resolved.windows[0],
                "border": border,
                "density": resolved.density,
                "rounds": rounds,
                "rows": rows,
            }
        )


def _resolve(model, grid, heads, head_dim, tile, window, border) -> tuple[catalog.VideoModel, ResolvedConfig]:
    with asked():
        shape = catalog.choose(model, grid, heads, head_dim)
        if shape.head_dim not in HEAD_DIMS:
            raise ValueError(
                f"--head-dim {shape.head_dim}: the Hopper kernel takes {' and '.join(map(str, HEAD_DIMS))}"
            )
        return shape, AttentionConfig(tile=tile, window=window, border=border).resolve(
            shape.grid, shape.heads
        )


def _obstacle() -> str | None:
    """Why the Hopper kernel cannot run on this machine; None when it can."""
    obstacle = hopper_obstacle()
    return None if obstacle is None else f"it {obstacle}"


def _ours(shape: catalog.VideoModel, resolved: ResolvedConfig) -> tuple[tuple, dict]:
    """Random Q, K, V on the GPU, and the keywords of a call of `attention` on them."""
    size = (1, resolved.geometry.n_tokens, shape.heads, shape.head_dim)
    qkv = tuple(torch.randn(size, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    config = AttentionConfig(tile=resolved.tile, window=resolved.windows[0], border=resolved.border)
    return qkv, {"grid": resolved.grid, "config": config, "backend": "sm90"}


def _contenders(shape: catalog.VideoModel, resolved: ResolvedConfig) -> dict[str, Callable[[], object]]:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    qkv, keywords = _ours(shape, resolved)
    heads_first = [x.transpose(1, 2) for x in qkv]

    def sdpa(backend: SDPBackend):
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(*heads_first)

    return {
        OURS: partial(attention, *qkv, **keywords),
        QUANTISATION: partial(quantize_qkv, *qkv, **keywords),
        **{label: partial(sdpa, getattr(SDPBackend, name)) for name, label in TORCH.items()},
    }


def _rows(
    results: dict[str, Timing | str], shape: catalog.VideoModel, resolved: ResolvedConfig
) -> list[dict]:
    """A row for each contender: name and error, or name, ms, spread, and what can be said of them.

    tflops is useful work, 4 * head_dim * attended pairs * heads, over the time; speedup is the row's time over ours.
    """
    geometry = resolved.geometry
    ours = results[OURS]
    rows = []
    for name, timing in results.items():
        if isinstance(timing, str):
            rows.append({"name": name, "error": timing})
            continue
        window = geometry.tiles if name in TORCH.values() else resolved.windows[0]
        flops = shape.heads * geometry.flops(window, resolved.border, shape.head_dim)
        rows.append(
            {
                "name": name,
                **asdict(timing),
                "tflops": None if name == QUANTISATION else flops / timing.ms / 1e9,
                "speedup": timing.ms / ours.ms
                if name in TORCH.values() and isinstance(ours, Timing)
                else None,
            }
        )
    return rows


def profile(*, model, grid, heads, head_dim, tile, window, border, tool, output: Path, as_json) -> None:
    """The `profile` command. Raises UserError for a shape that is not legal, MachineError when nothing could run."""
    shape, resolved = _resolve(model, grid, heads, head_dim, tile, window, border)
    if tool == "none":
        if obstacle := _obstacle():
            raise MachineError(obstacle)
        _calls(shape, resolved)
        command = None
    else:
        command = _command(tool, shape, resolved, output)
        people(as_json).print(shlex.join(command))
        obstacle = _obstacle() or (
            None if shutil.which(tool) else f"{tool} is not on PATH: it comes with CUDA"
        )
        if obstacle is None:
            # What the profiler prints is for people: with --json, stdout is for the document alone.
            status = subprocess.run(command, stdout=sys.stderr if as_json else None).returncode
            obstacle = f"{tool} ended with status {status}" if status else None
    if as_json:
        print_json({"command": command, "report": str(output), "ran": obstacle is None, "obstacle": obstacle})
    if obstacle:
        raise MachineError(obstacle)


def _calls(shape: catalog.VideoModel, resolved: ResolvedConfig) -> None:
    """`CALLS` calls, each in an NVTX range of its own."""
    qkv, keywords = _ours(shape, resolved)
    with torch.no_grad():
        for i in range(CALLS):
            with torch.cuda.nvtx.range(f"fpsattention call {i}"):
                attention(*qkv, **keywords)
    torch.cuda.synchronize()


def _command(tool: str, shape: catalog.VideoModel, resolved: ResolvedConfig, output: Path) -> list[str]:
    """The profiler's command line, around this command with --tool none."""
    options = {
        "--grid": resolved.grid,
        "--heads": [shape.heads],
        "--head-dim": [shape.head_dim],
        "--tile": resolved.tile,
        "--window": resolved.windows[0],
        "--border": [resolved.border],
    }
    calls = [sys.executable, "-m", "fpsattention.cli", "profile", "--tool", "none"]
    for name, values in options.items():
        calls += [name, *map(str, values)]
    if tool == "nsys":
        how = [
            "nsys",
            "profile",
            "--trace",
            "cuda,nvtx",
            "--force-overwrite",
            "true",
            "--output",
            str(output),
        ]
    else:
        # The clock is left to the GPU, as in real use.
        how = ["ncu", "--clock-control", "none", "--kernel-name", "regex:attn_fwd"]
        how += ["--launch-skip", str(CALLS - 1), "--launch-count", "1"]
        how += [x for section in NCU_SECTIONS for x in ("--section", section)]
        how += ["--force-overwrite", "--export", str(output)]
    return how + calls
