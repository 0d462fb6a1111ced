"""Wan models whole: seconds of a denoising step and of a video, and the speed-up, on one GPU.

The transformer is diffusers' own, with random weights, on which time does not depend. A forward of each stage of the
schedule is timed, all in one process, and counted as often as the sampler has steps in that stage. A step is one
forward: classifier-free guidance would double all times. VAE and text encoder are not in them. Contenders:

    stock                  BF16, dense attention by cuDNN, eager
    stock, compiled        the same, each block under torch.compile
    fps                    FPSAttention by `fpsattention.integrations.diffusers.enable`, eager
    fps, compiled          the same, each block under torch.compile
    fps, compiled, fp8     and FP8 linear layers of torchao, by `use_fp8_linears` of the same module

    python bench/bench_wan.py --output bench/results/h200_wan.json     # needs pip install 'fpsattention[bench]'

Under torchrun, diffusers' `enable_parallelism` (Ulysses) splits the tokens between several GPUs:

    torchrun --nproc-per-node 2 bench/bench_wan.py wan2.1-14b-720p --quick
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig, WanTransformer3DModel
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import fpsattention as fps
from common import forward_seconds, parsed, write_results
from fpsattention.integrations.diffusers import enable, use_fp8_linears
from fpsattention.schedules.models import MODELS
from fpsattention.schedules.presets import FEW_STEPS
from fpsattention.schedules.schedule import STAGES

# Config of Wan-AI/Wan2.1-T2V-14B-Diffusers, transformer/config.json.
WAN_14B = {
    "num_attention_heads": 40,
    "attention_head_dim": 128,
    "num_layers": 40,
    "ffn_dim": 13824,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 4096,
    "freq_dim": 256,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 1024,
}
TEXT = (1, 512, 4096)


@dataclass(frozen=True)
class Case:
    """A model of the catalogue.

    Attributes:
        sizes: arguments of its transformer, from the checkpoint's transformer/config.json.
        shift: of its sampler's noise levels.
        tile: in tokens.
        windows: of early, mid and late steps, for a sampler of many steps. One of up to 8 takes the preset's, whose
            first and last step are dense.
        timestep_per_token: as Wan2.2's TI2V pipeline gives it.
    """

    sizes: dict
    shift: float
    tile: tuple[int, int, int]
    windows: tuple[tuple[int, int, int], ...]
    timestep_per_token: bool = False

    def schedule(self, name: str, steps: int) -> fps.StepSchedule:
        if steps <= FEW_STEPS:
            return fps.preset(name, num_steps=steps).schedule
        return fps.StepSchedule(*(fps.AttentionConfig(self.tile, window) for window in self.windows))


# The windows see 0.14 to 0.16 of all pairs, as a mean over 50 steps. The paper's headline has 1/6.
CASES = {
    "wan2.1-14b-720p": Case(WAN_14B, 5.0, (7, 9, 2), ((3, 3, 5), (3, 3, 11), (3, 3, 9))),
    "wan2.1-1.3b-480p": Case(
        WAN_14B | {"num_attention_heads": 12, "num_layers": 30, "ffn_dim": 8960},
        3.0,
        (21, 3, 2),
        ((1, 3, 9), (1, 5, 9), (1, 3, 13)),
    ),
    "wan2.2-ti2v-5b-720p": Case(
        WAN_14B
        | {
            "num_attention_heads": 24,
            "num_layers": 30,
            "ffn_dim": 14336,
            "in_channels": 48,
            "out_channels": 48,
        },
        5.0,
        (16, 2, 4),
        ((2, 3, 3), (2, 3, 7), (2, 5, 3)),
        timestep_per_token=True,
    ),
}

CONTENDERS = ("stock", "fps", "stock, compiled", "fps, compiled", "fps, compiled, fp8")
# triton.multi_kernel lets Inductor keep a row of 5,120 or 13,824 values in registers where that is faster (about 1 % in
# all). torch 2.11 cannot load such kernels from its cache of graphs.
INDUCTOR = {"triton.multi_kernel": 1, "fx_graph_cache": False}


@dataclass
class Result:
    """One contender's times in seconds and its memory.

    Attributes:
        steps: of the sampler.
        seconds: median of a forward, by stage.
        step: mean of `seconds` over the steps.
        video: sum of `seconds` over the steps.
        warm_up: sum of the first forward of each stage, with compilation; of stock, which has one, the first forward.
        peak_gib: peak memory of the GPU.
        speedup: over the first contender with as many steps.
    """

    model: str
    name: str
    steps: int
    seconds: dict[str, float]
    step: float
    video: float
    warm_up: float
    peak_gib: float
    speedup: float = float("nan")


def steps_of_stage(schedule: fps.StepSchedule, steps: int) -> dict[str, int]:
    """How many of the sampler's steps are in each stage that has any."""
    stages = [schedule.stage(step=i, num_steps=steps) for i in range(steps)]
    return {stage: stages.count(stage) for stage in STAGES if stage in stages}


def sigma_of_stage(schedule: fps.StepSchedule, stage: str, shift: float) -> float:
    """A noise level in the middle of the stage."""
    sigmas = [(i + 0.5) / 1000 for i in range(1000)]
    own = [x for x in sigmas if schedule.stage_for_sigma(x, shift=shift) == stage]
    return own[len(own) // 2]


def build(sizes: dict, seed: int) -> nn.Module:
    """A transformer of these sizes on the GPU, in BF16 except where diffusers keeps FP32.

    Weights of norms are 1, biases 0, all else N(0, 0.02).
    """
    with torch.device("meta"):
        model = WanTransformer3DModel(**sizes)
    for name, x in model.named_parameters():
        if not set(name.split(".")) & set(model._keep_in_fp32_modules):
            x.data = x.data.to(torch.bfloat16)
    # The meta device has not computed the buffers.
    rope = type(model.rope)(sizes["attention_head_dim"], (1, 2, 2), sizes["rope_max_seq_len"])
    model = model.to_empty(device="cuda")
    model.rope = rope.to("cuda")
    generator = torch.Generator("cuda").manual_seed(seed)
    for name, x in model.named_parameters():
        with torch.no_grad():
            if x.dim() > 1:
                x.normal_(0, 0.02, generator=generator)
            else:
                x.fill_(1.0 if name.endswith("weight") else 0.0)
    return model.eval().requires_grad_(False)


def arguments_of(name: str, device: torch.device, sigma: float = 0.5, seed: int = 1) -> dict[str, Tensor]:
    """Random arguments of a forward of a model of `CASES`, at its grid and this noise level."""
    case = CASES[name]
    t, h, w = MODELS[name].grid
    generator = torch.Generator(device).manual_seed(seed)

    def random(*size: int) -> Tensor:
        return torch.randn(size, device=device, dtype=torch.bfloat16, generator=generator)

    per_sample = (1, t * h * w) if case.timestep_per_token else (1,)
    return {
        "hidden_states": random(1, case.sizes["in_channels"], t, 2 * h, 2 * w),  # a token: 1 x 2 x 2 pixels
        "encoder_hidden_states": random(*TEXT),
        "timestep": torch.full(per_sample, 1000 * sigma, device=device),
    }


def prepare(contender: str, name: str, sizes: dict, seed: int) -> nn.Module:
    model = build(sizes, seed)
    if contender.endswith("fp8"):
        use_fp8_linears(model)
    if dist.is_initialized():
        model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=dist.get_world_size()))
        with torch.no_grad():  # reads signatures in diffusers' hooks, which would break the graph
            model(**arguments_of(name, torch.device("cuda")), return_dict=False)
    return model


def measure(
    contender: str, name: str, model: nn.Module, all_steps: list[int], repeats: int, seed: int
) -> list[Result]:
    """A result for each number of steps: medians of `repeats` forwards, after a first one, which may compile."""
    case, device, results = CASES[name], torch.device("cuda"), []
    ours = contender.startswith("fps")

    def forwards(sigma: float, text: str) -> list[float]:
        return forward_seconds(text, model, arguments_of(name, device, sigma, seed + 1), repeats + 1)

    if not ours:
        torch.cuda.reset_peak_memory_stats()
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            dense = forwards(0.5, f"{name}, {contender}")  # takes the same time in all stages
    for steps in all_steps:
        schedule = case.schedule(name, steps)
        of_stage = steps_of_stage(schedule, steps)
        if ours:
            torch.cuda.reset_peak_memory_stats()
            handle = enable(model, schedule, shift=case.shift, backend="sm90")
            if "compiled" in contender:
                torch.compiler.reset()
                model.compile_repeated_blocks(fullgraph=True, options=INDUCTOR)
            sigmas = {stage: sigma_of_stage(schedule, stage, case.shift) for stage in of_stage}
            times = {
                stage: forwards(sigma, f"{name}, {contender}, {stage}") for stage, sigma in sigmas.items()
            }
            warm_up = sum(first for first, *_ in times.values())
            handle.remove()
        else:
            times, warm_up = dict.fromkeys(of_stage, dense), dense[0]
        seconds = {stage: statistics.median(timed) for stage, (_, *timed) in times.items()}
        video = sum(seconds[stage] * n for stage, n in of_stage.items())
        peak = torch.cuda.max_memory_allocated() / 2**30
        stages = ", ".join(f"{stage} {s:.3f} s" for stage, s in seconds.items())
        say(f"{contender:20s} {steps:3d} steps: {video:7.2f} s a video ({stages}), {peak:.1f} GiB")
        results.append(Result(name, contender, steps, seconds, video / steps, video, warm_up, peak))
    return results


def is_first() -> bool:
    """Whether this is the only process or the first one."""
    return not dist.is_initialized() or dist.get_rank() == 0


def say(text: str) -> None:
    if is_first():
        print(text, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"{', '.join(CASES)} (default: all)")
    parser.add_argument(
        "--steps", type=int, nargs="+", default=[50, 4], help="of the sampler (default: 50 4)"
    )
    parser.add_argument("--layers", type=int, help="layers of the transformer (default: all)")
    parser.add_argument(
        "--repeats", type=int, default=2, help="timed forwards of each stage (default: %(default)s)"
    )
    parser.add_argument("--quick", action="store_true", help="only the first and the last contender")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    args = parsed(parser, CASES)
    if "LOCAL_RANK" in os.environ:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device)
    names = args.models or list(CASES)
    about = {
        "gpus": dist.get_world_size() if dist.is_initialized() else 1,
        "cases": {
            name: {"tile": case.tile, "windows": case.windows}
            for name, case in CASES.items()
            if name in names
        },
        **({"layers": args.layers} if args.layers else {}),
    }
    results: list[Result] = []
    for name in names:
        sizes = CASES[name].sizes | ({"num_layers": args.layers} if args.layers else {})
        say(f"{name}, grid {MODELS[name].grid}")
        stock: dict[int, float] = {}
        for contender in CONTENDERS[:: len(CONTENDERS) - 1] if args.quick else CONTENDERS:
            torch.compiler.reset()
            model = prepare(contender, name, sizes, args.seed)
            if contender == "stock, compiled":
                model.compile_repeated_blocks(fullgraph=True, options=INDUCTOR)
            for result in measure(contender, name, model, args.steps, args.repeats, args.seed):
                result.speedup = stock.setdefault(result.steps, result.video) / result.video
                results.append(result)
            del model
            gc.collect()  # modules and their hooks refer to each other
            torch.cuda.empty_cache()
            if args.output and is_first():
                # After each contender: a run cut short keeps its results.
                write_results(args.output, results, **about)
    say(f"\n{'':41s} steps  s a step  s a video  speed-up  peak GiB")
    for r in results:
        times = f"{r.steps:5d}  {r.step:8.3f}  {r.video:9.2f}  {r.speedup:8.2f}"
        say(f"{r.model:20s} {r.name:20s} {times}  {r.peak_gib:8.1f}")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
