"""A forward of Wan2.1-14B at 720p, 81 frames, as a mean over a sampler of 50 steps: the speed-up of the whole model.

The transformer is diffusers' own, whole, with random weights, on which time does not depend. Each stage of the schedule
is timed, in one process on one GPU, and weighted by its share of the steps. Contenders:

    stock                  BF16, dense attention by cuDNN, eager
    stock, compiled        the same, each block under torch.compile
    fps                    FPSAttention by `fpsattention.integrations.diffusers.enable`, eager
    fps, compiled          the same, each block under torch.compile
    fps, compiled, fp8     and FP8 linear layers of torchao, by `use_fp8_linears` of the same module

    python bench/bench_wan.py --output bench/results/h100_wan.json     # needs pip install 'fpsattention[bench]'

Under torchrun, diffusers' `enable_parallelism` (Ulysses) splits the tokens between several GPUs:

    torchrun --nproc-per-node 2 bench/bench_wan.py --quick
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig, WanTransformer3DModel
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import fpsattention as fps
from common import forward_seconds, write_results
from fpsattention.core.support import hopper_obstacle
from fpsattention.integrations.diffusers import enable, use_fp8_linears
from fpsattention.schedules.models import MODELS

MODEL = MODELS["wan2.1-14b-720p"]
# Config of Wan-AI/Wan2.1-T2V-14B-Diffusers, transformer/config.json.
WAN_14B = {
    "num_attention_heads": MODEL.heads,
    "attention_head_dim": MODEL.head_dim,
    "ffn_dim": 13824,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 4096,
    "freq_dim": 256,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 1024,
}
LATENT = (1, 16, MODEL.grid[0], 2 * MODEL.grid[1], 2 * MODEL.grid[2])  # a token is 1 x 2 x 2 latent pixels
TEXT = (1, 512, 4096)
SHIFT, STEPS = 5.0, 50  # Wan's at 720p

# Mean density 0.141; the paper's headline has 1/6.
TILE = (7, 9, 2)
SCHEDULE = fps.StepSchedule(
    early=fps.AttentionConfig(tile=TILE, window=(3, 3, 5)),
    mid=fps.AttentionConfig(tile=TILE, window=(3, 3, 11)),
    late=fps.AttentionConfig(tile=TILE, window=(3, 3, 9)),
    alpha=(0.2, 0.8),
)


CONTENDERS = ("stock", "fps", "stock, compiled", "fps, compiled", "fps, compiled, fp8")
# triton.multi_kernel lets Inductor keep a row of 5,120 or 13,824 values in registers where that is faster (about 1 % in
# all). torch 2.11 cannot load such kernels from its cache of graphs.
INDUCTOR = {"triton.multi_kernel": 1, "fx_graph_cache": False}


@dataclass
class Result:
    """One contender's times in seconds and its memory.

    Attributes:
        seconds: median of a forward, by stage.
        weighted: mean of `seconds` over the steps.
        warm_up: sum of the first forward of each stage, with compilation.
        peak_gib: peak memory of the GPU.
        speedup: over the first contender.
    """

    name: str
    seconds: dict[str, float]
    weighted: float
    warm_up: float
    peak_gib: float
    speedup: float = float("nan")


def steps_of_stage() -> dict[str, int]:
    configs = [SCHEDULE.at(step=i, num_steps=STEPS) for i in range(STEPS)]
    return {stage: configs.count(getattr(SCHEDULE, stage)) for stage in ("early", "mid", "late")}


def sigma_of_stage() -> dict[str, float]:
    """A noise level in the middle of each stage."""
    sigmas = [(i + 0.5) / 1000 for i in range(1000)]
    found = {}
    for stage in ("early", "mid", "late"):
        own = [x for x in sigmas if SCHEDULE.for_sigma(x, shift=SHIFT) is getattr(SCHEDULE, stage)]
        found[stage] = own[len(own) // 2]
    return found


def build(layers: int, seed: int, sizes: dict = WAN_14B) -> nn.Module:
    """A transformer of these sizes on the GPU, in BF16 except where diffusers keeps FP32.

    Weights of norms are 1, biases 0, all else N(0, 0.02).
    """
    with torch.device("meta"):
        model = WanTransformer3DModel(num_layers=layers, **sizes)
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


def prepare(name: str, layers: int, seed: int, inputs: dict[str, Tensor]) -> nn.Module:
    model = build(layers, seed)
    if name.startswith("fps"):
        enable(model, SCHEDULE, shift=SHIFT, backend="sm90")
    if name.endswith("fp8"):
        use_fp8_linears(model)
    if dist.is_initialized():
        model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=dist.get_world_size()))
        with torch.no_grad():  # reads signatures in diffusers' hooks, which would break the graph
            model(timestep=torch.tensor([500.0], device="cuda"), return_dict=False, **inputs)
    if "compiled" in name:
        model.compile_repeated_blocks(fullgraph=True, options=INDUCTOR)
    return model


def measure(
    name: str, model: nn.Module, stages: dict[str, float], inputs: dict[str, Tensor], repeats: int
) -> Result:
    """Median of `repeats` forwards of each stage, after a first one, which may compile."""
    dense = sdpa_kernel(SDPBackend.CUDNN_ATTENTION) if name.startswith("stock") else nullcontext()
    seconds, warm_up = {}, 0.0
    with dense:
        torch.cuda.reset_peak_memory_stats()
        for stage, sigma in stages.items():
            of_stage = inputs | {"timestep": torch.tensor([1000 * sigma], device="cuda")}
            first, *times = forward_seconds(f"{name}, {stage}", model, of_stage, repeats + 1)
            warm_up += first
            seconds[stage] = statistics.median(times)
    steps = {"all": STEPS} if "all" in stages else steps_of_stage()
    weighted = sum(seconds[stage] * n for stage, n in steps.items()) / STEPS
    peak = torch.cuda.max_memory_allocated() / 2**30
    stage_times = ", ".join(f"{stage} {s:.3f} s" for stage, s in seconds.items())
    say(f"{name:20s} {weighted:7.3f} s a step ({stage_times}), {peak:.1f} GiB, warm-up {warm_up:.0f} s")
    return Result(name, seconds, weighted, warm_up, peak)


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
    parser.add_argument(
        "--layers",
        type=int,
        default=MODEL.layers,
        help="layers of the transformer (default: all, %(default)s)",
    )
    parser.add_argument(
        "--repeats", type=int, default=2, help="timed forwards of each stage (default: %(default)s)"
    )
    parser.add_argument("--quick", action="store_true", help="only the first and the last contender")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    args = parser.parse_args()
    if obstacle := hopper_obstacle():
        parser.exit(1, f"bench_wan.py {obstacle}\n")
    if "LOCAL_RANK" in os.environ:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device)
    generator = torch.Generator("cuda").manual_seed(args.seed + 1)

    def random(*size):
        return torch.randn(size, device="cuda", dtype=torch.bfloat16, generator=generator)

    inputs = {"hidden_states": random(*LATENT), "encoder_hidden_states": random(*TEXT)}
    any_stage = {"all": 0.5}  # dense attention takes the same time in all stages
    stages = sigma_of_stage()
    results = []
    about = {
        "gpus": dist.get_world_size() if dist.is_initialized() else 1,
        "layers": args.layers,
        "steps": steps_of_stage(),
        "windows": {stage: getattr(SCHEDULE, stage).window for stage in stages},
        "tile": TILE,
    }

    for name in CONTENDERS[:: len(CONTENDERS) - 1] if args.quick else CONTENDERS:
        torch.compiler.reset()
        model = prepare(name, args.layers, args.seed, inputs)
        chosen = stages if name.startswith("fps") else any_stage
        results.append(measure(name, model, chosen, inputs, args.repeats))
        del model
        gc.collect()  # modules and their hooks refer to each other
        results[-1].speedup = results[0].weighted / results[-1].weighted
        if args.output and is_first():
            # After each contender: a run cut short keeps its results.
            write_results(args.output, results, **about)

    say(f"\n{'':20s}  s a step  speed-up  peak GiB")
    for r in results:
        say(f"{r.name:20s}  {r.weighted:8.3f}  {r.speedup:8.2f}  {r.peak_gib:8.1f}")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
