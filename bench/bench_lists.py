"""Lists of key tiles beside dense and windows: forward and backward, on one Hopper GPU.

Random lists of each density, all as long; of several lengths; a window's tiles as lists; tiles chosen by content, the
choice included; and FlexAttention in BF16 under random lists, the way into tile order and back included. All of one
shape are timed in turns, in one process.

    python bench/bench_lists.py --output bench/results/h200_lists.json
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

import fpsattention as fps
from bench_forward import random_input, random_qkv
from common import attention_flops, parsed, write_results
from fpsattention.cli.timing import CudaClock, time_interleaved
from shapes import SHAPES, Shape

BURST_MS = 100.0  # of each call in a round
DENSITIES = (0.25, 0.14, 0.07, 0.04)


@dataclass(frozen=True)
class Arm:
    """What is attended: a window or None, and lists, or a choice."""

    name: str
    config: fps.AttentionConfig
    key_tiles: fps.KeyTiles | None = None


@dataclass
class Result:
    """Median milliseconds, and TFLOP/s of the attended pairs.

    Attributes:
        attend_ms: the forward over rounded operands; None where tiles are chosen, and for FlexAttention.
        ms: a forward, rounding and choice included.
        backward_ms: the backward.
    """

    case: str
    arm: str
    density: float
    attend_ms: float | None
    ms: float
    backward_ms: float
    attend_tflops: float | None
    tflops: float
    backward_tflops: float


def random_lists(
    n: int, heads: int, density: float, uneven: bool, generator: torch.Generator
) -> fps.KeyTiles:
    """Random tiles of each query tile and head; `uneven` lists have 1/3 to 5/3 of the mean length."""
    device = generator.device
    rank = torch.rand(1, heads, n, n, device=device, generator=generator).argsort(-1)
    count = max(1, round(density * n))
    counts = torch.full((1, heads, n), count, device=device)
    if uneven:
        least, most = max(1, count // 3), 5 * count // 3
        counts = torch.randint(least, most + 1, counts.shape, device=device, generator=generator)
    return fps.KeyTiles.of_mask(rank < counts[..., None])


def arms_of(shape: Shape, generator: torch.Generator) -> list[Arm]:
    dense = fps.AttentionConfig(shape.tile)
    n = dense.resolve(shape.grid, shape.heads).geometry.n_video_tiles
    arms = [Arm("dense", dense)]
    for window in shape.windows:
        if window is not None:
            lists = fps.KeyTiles.of_window(shape.grid, shape.tile, window).to(generator.device)
            arms += [
                Arm(f"window {window}", fps.AttentionConfig(shape.tile, window)),
                Arm(f"lists of {window}", dense, lists),
            ]
    for density in DENSITIES:
        arms.append(Arm(f"lists {density}", dense, random_lists(n, shape.heads, density, False, generator)))
    arms.append(Arm("uneven lists 0.14", dense, random_lists(n, shape.heads, 0.14, True, generator)))
    of_flex = random_lists(n, shape.heads, 0.14, False, generator)
    arms.append(Arm("FlexAttention 0.14", fps.AttentionConfig(shape.tile, quant="none"), of_flex))
    chosen = fps.AttentionConfig(shape.tile, select=fps.TopTiles(0.14))
    return [*arms, Arm("chosen 0.14", chosen)]


def density_of(arm: Arm, shape: Shape, qk: Sequence[torch.Tensor]) -> float:
    """Attended pairs of tokens as a share of all."""
    resolved = arm.config.resolve(shape.grid, shape.heads)
    lists = arm.key_tiles
    if arm.config.select is not None:
        lists = fps.select_tiles(*qk, grid=shape.grid, config=arm.config, tensor_layout=shape.layout)
    if lists is None:
        return resolved.density
    tokens = resolved.geometry.valid.double().to(lists.indices.device)
    return ((tokens @ (lists.mask().double() @ tokens)[..., None]).mean() / tokens.sum() ** 2).item()


def calls_of(arm: Arm, shape: Shape, qkv: Sequence[torch.Tensor], dout: torch.Tensor) -> dict[str, Callable]:
    is_fp8 = arm.config.quant == "fp8"
    call = {"grid": shape.grid, "tensor_layout": shape.layout, "backend": "sm90" if is_fp8 else "auto"}
    about = {"config": arm.config, "key_tiles": arm.key_tiles}
    leaves = [x.detach().requires_grad_() for x in qkv]
    out = fps.attention(*leaves, **call, **about)
    calls = {
        "ms": partial(fps.attention, *qkv, **call, **about),
        "backward_ms": partial(torch.autograd.grad, out, leaves, dout, retain_graph=True),
    }
    if is_fp8 and arm.config.select is None:
        packed = fps.quantize_qkv(*qkv, **call, config=arm.config)
        calls["attend_ms"] = partial(fps.attention, packed, **about)
    return calls


def measure(shape: Shape, rounds: int, seed: int) -> list[Result]:
    qkv, dout = random_qkv(shape, "cuda"), random_input(shape, "cuda", f"{shape.name} dout")
    arms = arms_of(shape, torch.Generator("cuda").manual_seed(seed))
    calls = {arm.name: calls_of(arm, shape, qkv, dout) for arm in arms}
    entries = {f"{arm} {name}": call for arm, own in calls.items() for name, call in own.items()}
    timings = time_interleaved(entries, CudaClock(), rounds, BURST_MS, seed)
    results = []
    for arm in arms:
        own = {name: timings[f"{arm.name} {name}"] for name in calls[arm.name]}
        if failed := [f"{name}: {error}" for name, error in own.items() if isinstance(error, str)]:
            print(f"! {shape.name} {arm.name} {'; '.join(failed)}", flush=True)
            continue
        medians = {name: timing.ms for name, timing in own.items()}
        density = density_of(arm, shape, qkv[:2])
        pairs = density * shape.tokens**2
        flops = attention_flops(pairs, shape.heads, shape.head_dim, shape.batch) / 1e9
        attend = medians.get("attend_ms")
        rates = attend and flops / attend, flops / medians["ms"], 2.5 * flops / medians["backward_ms"]
        results.append(
            Result(shape.name, arm.name, density, attend, medians["ms"], medians["backward_ms"], *rates)
        )
        shown = "       -" if attend is None else f"{attend:8.3f}"
        print(
            f"{shape.name:12s} {arm.name:20s} {density:6.3f} attend {shown} ms, call {medians['ms']:8.3f} ms "
            f"{rates[1]:6.0f} TFLOP/s, backward {medians['backward_ms']:8.2f} ms {rates[2]:5.0f} TFLOP/s",
            flush=True,
        )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    args = parsed(parser)
    results: list[Result] = []
    for shape in SHAPES:
        if shape.name in ("wan14b-720p", "36x48x48"):
            results += measure(shape, args.rounds, args.seed)
            if args.output:
                write_results(args.output, results)


if __name__ == "__main__":
    main()
