"""A fine-tuning step of Wan2.1 with an adapter: time and peak memory, dense and with FPSAttention, on one Hopper GPU.

The step is that of examples/finetune_diffusers.py on a sample that holds the teacher's output: forward, backward with
gradient checkpointing, optimizer. Weights are random, on which time does not depend.

    python bench/bench_finetune.py --output finetune.json     # needs pip install '.[bench,train]'
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import bench_wan
import fpsattention as fps
from common import parsed, write_results

sys.path.append(str(Path(__file__).parents[1] / "examples"))  # finetune is not in the wheel
from finetune.machine import Machine  # noqa: E402
from finetune.student import Make, Student  # noqa: E402

# A config for all steps, of density 0.169 and 0.135.
CONFIGS = {
    "wan2.1-1.3b-480p": fps.AttentionConfig((21, 3, 6), (1, 5, 3)),
    "wan2.1-14b-720p": fps.AttentionConfig((7, 9, 2), (3, 3, 9)),
}
RANK, TARGETS = 64, ("to_q", "to_k", "to_v", "to_out.0")
ATTENTIONS = ("dense", "fps")


@dataclass
class Result:
    """`seconds` of a step, the median; peak memory of the device."""

    model: str
    attention: str
    compiled: bool
    seconds: float
    peak_gib: float


def measure(
    student: Student, arguments: dict[str, Tensor], attention: str, repeats: int
) -> tuple[float, float]:
    """(median of the seconds of a step, peak GiB), after a step to warm up."""
    device = student.machine.device
    on_gpu = device.type == "cuda"
    optimizer = torch.optim.AdamW(student.parameters.values(), lr=1e-6)
    target = torch.zeros_like(arguments["hidden_states"])
    seconds = []
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        with student.handle.dense() if attention == "dense" else nullcontext():
            out = student.forward(arguments)
        (out.float() - target.float()).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if on_gpu:
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - begin)
    peak = torch.cuda.max_memory_allocated(device) / 2**30 if on_gpu else float("nan")
    return statistics.median(seconds[1:]), peak


def student_of(
    transformer, config: fps.AttentionConfig, compiled: bool, device: torch.device, backend: str
) -> Student:
    schedule = fps.StepSchedule(config, config, config)
    make = Make(schedule, 5.0, (), RANK, TARGETS, checkpointing=True, compiled=compiled, backend=backend)
    return Student(transformer, make, Machine(device), with_teacher=False)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=CONFIGS, action="append", help="default: all")
    parser.add_argument("--compile", action="store_true", help="torch.compile the blocks")
    parser.add_argument("--repeats", type=int, default=3, help="timed steps (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    args = parsed(parser)
    device, results = torch.device("cuda"), []
    for name in args.model or CONFIGS:
        for attention in ATTENTIONS:
            torch.compiler.reset()
            transformer = bench_wan.build(bench_wan.CASES[name].sizes, 0)
            student = student_of(transformer, CONFIGS[name], args.compile, device, "sm90")
            seconds, peak = measure(student, bench_wan.arguments_of(name, device), attention, args.repeats)
            results.append(Result(name, attention, args.compile, seconds, peak))
            print(f"{name:18} {attention:6} {seconds:8.3f} s a step  {peak:6.1f} GiB", flush=True)
            del transformer, student
            gc.collect()  # modules and their hooks refer to each other
            torch.cuda.empty_cache()
        if args.output:
            write_results(args.output, results, rank=RANK)


if __name__ == "__main__":
    main()
