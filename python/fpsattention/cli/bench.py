"""`fpsattention bench`: FPSAttention and torch's attention on the user's shape, timed on this machine's GPU."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from ..core.api import attention, quantize_qkv
from ..core.checks import Triple
from ..core.config import AttentionConfig, ResolvedConfig
from ..core.support import HEAD_DIMS
from ..schedules.models import VideoModel
from . import catalog, options
from .console import by, milliseconds, people, print_json, progress, table_of
from .errors import MachineError, asked, require, require_hopper
from .timing import CudaClock, DeviceLost, Timing, time_interleaved

if TYPE_CHECKING:
    from rich.console import Console

BURST_MS = 100  # time of each contender in each round
OURS, QUANTISATION = "FPSAttention", "of it quantisation"
TORCH = {"CUDNN_ATTENTION": "torch SDPA, cuDNN", "FLASH_ATTENTION": "torch SDPA, FlashAttention"}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Time FPSAttention, quantisation included, and torch's dense scaled_dot_product_attention on the same random "
        "BF16 tensors, batch 1, in turns within one run. Needs a Hopper GPU."
    )
    options.add_shape(parser)
    options.add_window(parser)
    parser.add_argument(
        "--rounds",
        type=options.positive,
        default=5,
        metavar="N",
        help="rounds of about 0.1 s for each contender (default: %(default)s)",
    )
    options.add_json(parser)


def run(
    *,
    asked_shape: options.ShapeOptions,
    window: Triple | None,
    border: options.Border,
    rounds: int,
    as_json: bool,
) -> None:
    """The `bench` command. Raises UserError for a shape that is not legal, MachineError without a Hopper GPU."""
    require("rich")
    shape, resolved = resolve(*asked_shape, window, border)
    require_hopper("; `fpsattention plan` estimates the time without one")
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
    _print(people(as_json), shape, resolved, rows, gpu)
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


def _print(console: Console, shape: VideoModel, resolved: ResolvedConfig, rows: list[dict], gpu: str) -> None:
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


def resolve(
    model: str | None,
    grid: Triple | None,
    heads: int | None,
    head_dim: int | None,
    tile: Triple | None,
    window: Triple | None,
    border: options.Border,
) -> tuple[VideoModel, ResolvedConfig]:
    """The shape and config that the options ask for. Raises UserError for one that is not legal."""
    with asked():
        shape = catalog.choose(model, grid, heads, head_dim)
        if shape.head_dim not in HEAD_DIMS:
            raise ValueError(
                f"--head-dim {shape.head_dim}: the Hopper kernel takes {' and '.join(map(str, HEAD_DIMS))}"
            )
        config = AttentionConfig(tile=tile, window=window, border=border)
        return shape, config.resolve(shape.grid, shape.heads)


def random_call(shape: VideoModel, resolved: ResolvedConfig) -> tuple[tuple[torch.Tensor, ...], dict]:
    """Arguments of a call of `attention`: random Q, K and V on the GPU, and the keywords."""
    size = (1, resolved.geometry.n_tokens, shape.heads, shape.head_dim)
    qkv = tuple(torch.randn(size, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    config = AttentionConfig(tile=resolved.tile, window=resolved.windows[0], border=resolved.border)
    return qkv, {"grid": resolved.grid, "config": config, "backend": "sm90"}


def _contenders(shape: VideoModel, resolved: ResolvedConfig) -> dict[str, Callable[[], object]]:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    qkv, keywords = random_call(shape, resolved)
    q, k, v = (x.transpose(1, 2) for x in qkv)

    def sdpa(backend: SDPBackend) -> torch.Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v)

    return {
        OURS: partial(attention, *qkv, **keywords),
        QUANTISATION: partial(quantize_qkv, *qkv, **keywords),
        **{label: partial(sdpa, getattr(SDPBackend, name)) for name, label in TORCH.items()},
    }


def _rows(results: dict[str, Timing | str], shape: VideoModel, resolved: ResolvedConfig) -> list[dict]:
    """A row for each contender: name and error, or name, ms, spread, tflops and speedup.

    tflops is useful work, 4 * head_dim * attended pairs * heads, over the time; speedup is the row's time over
    FPSAttention's. Both are None where they mean nothing.
    """
    geometry = resolved.geometry
    ours = results[OURS]
    rows: list[dict] = []
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
