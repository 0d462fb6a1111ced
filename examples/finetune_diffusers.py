"""Fine-tune a video transformer of diffusers with FPSAttention: Wan2.1 and 2.2, HunyuanVideo, CogVideoX, LTX, Mochi.

The student, with FPSAttention, learns to return what the model itself returns with dense attention. That needs no data:
the dense model samples videos, and calls of its transformer on the way are what the student sees. A folder of videos
may take their place.

    python examples/finetune_diffusers.py --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --out runs/wan --tile 21 3 2 \\
        --mid 1 10 13 --late 1 7 13 --dense-layers 0
    torchrun --nproc-per-node 8 examples/finetune_diffusers.py ...    # FSDP2 shares out weights and samples

The result, in runs/wan/model, goes on a pipeline in one line:

    handle = fps.integrations.diffusers.load(pipe, "runs/wan/model")

docs/finetune.md explains all. Needs pip install '.[train]'.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from rich.console import Console
from rich.progress import Progress

import fpsattention as fps
from finetune import machine as machines
from finetune import samples, training, videos
from finetune.machine import Machine
from finetune.student import Make, Student, load_pipeline, load_transformer
from fpsattention.cli import options
from fpsattention.cli.errors import MachineError, UserError, asked
from fpsattention.schedules.files import config_to_json
from fpsattention.schedules.schedule import STAGES

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
MOST_APART = 0.1  # share of samples; with 50 steps, rounding moves only the steps beside the two boundaries
LR = {"lora": 1e-4, "weights": 1e-5}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return the exit status: 0 done, 1 out of GPU memory, 2 the request was wrong."""
    args = _parser().parse_args(argv)
    try:
        with machines.started(args.device) as machine:
            run(args, machine)
    except (UserError, MachineError) as error:
        return _fail(str(error), 2)
    except torch.OutOfMemoryError as error:
        return _fail(f"{error}\nTry a smaller --size, --batch 1, or more GPUs (torchrun).", 1)
    return 0


def run(args: argparse.Namespace, machine: Machine) -> None:
    """Prepare samples, train, validate, write the model."""
    schedule = _schedule(args)
    console = Console(quiet=not machine.is_first)
    request = _request(args)
    cache = samples.Cache(args.cache or args.out / "cache" / args.transformer, request, _videos(args))
    scheduler = _scheduler(args.model)
    shift = _shift(args.shift, scheduler)
    settings = _settings(args, schedule, shift, machine)
    _prepare(cache, machine, console)
    files = cache.split(args.held_out)
    make = Make(
        schedule=schedule,
        shift=shift,
        dense_layers=tuple(args.dense_layers),
        rank=args.rank if args.method == "lora" else None,
        targets=tuple(args.targets),
        checkpointing=args.checkpointing,
        compiled=args.compile,
        backend=args.backend,
    )
    transformer = load_transformer(args.model, args.transformer, DTYPES[args.dtype])
    kind = type(transformer).__name__  # FSDP2 changes it
    torch.manual_seed(args.seed)  # of the adapter's first weights
    with asked():
        student = Student(transformer, make, machine, with_teacher=args.data is not None)
    fit = training.Run(args.out / args.transformer, settings, student, scheduler, files)
    weights = sum(p.numel() for p in student.parameters.values())
    console.print(
        f"{kind}: {weights / 1e6:.1f} M weights to train ({args.method}), {machine.world} "
        f"processes on {machine.device.type}\n{len(files[0])} samples to train with, {len(files[1])} held out\n"
        f"{fit.folder}: {fit.step} of {args.steps} steps done",
        highlight=False,
        soft_wrap=True,
    )
    if (apart := fit.stages_apart()) > MOST_APART:
        console.print(
            f"{apart:.0%} of the samples are trained in another stage than the pipeline ran them in: --shift {shift:g} "
            f"is not that of the sampler, or it has few steps",
            style="yellow",
            soft_wrap=True,
        )
    with asked():  # the first forward tells the grid, which tile and windows must fit
        before = fit.validate("before")
    fit.train(args.save_every, console)
    after = fit.finish()
    fit.write_model(args.out / "model")
    if machine.is_first:
        training.plot(fit.folder)
    console.print(_table(before, after), highlight=False)
    console.print(f"{args.out / 'model'}: written", highlight=False, soft_wrap=True)


def _prepare(cache: samples.Cache, machine: Machine, console: Console) -> None:
    """Fill the cache. The pipeline is gone afterwards."""
    request = cache.request
    if machine.is_first:
        cache.claim()
    machine.wait()
    if not all(map(cache.has, cache.videos)):
        pipe = load_pipeline(request.model, DTYPES[request.dtype], machine.device)
        if getattr(pipe, request.transformer, None) is None:
            raise UserError(
                f"--transformer {request.transformer}: the {type(pipe).__name__} has none of this name"
            )
        with Progress(console=console, disable=not machine.is_first) as progress:
            task = progress.add_task("samples", total=len(cache.videos[machine.rank :: machine.world]))
            fill = samples.sample if request.source is None else videos.encode
            fill(pipe, cache, machine, lambda: progress.advance(task))
        del pipe
        gc.collect()
        if machine.device.type == "cuda":
            torch.cuda.empty_cache()
    machine.wait()


def _schedule(args: argparse.Namespace) -> fps.StepSchedule:
    windows = {stage: getattr(args, stage) for stage in STAGES}
    try:
        if args.schedule is not None:
            for name, value in (windows | {"tile": args.tile, "alpha": args.alpha}).items():
                if value is not None:
                    raise UserError(f"--schedule: the file holds tile and windows; leave --{name} out")
            schedule = fps.StepSchedule.load(args.schedule)
            if args.data is None:
                schedule.at(step=0, num_steps=args.sampler_steps)  # raises if it is for another number
            return schedule
        if args.tile is None:
            raise UserError("--tile: must be given, or a --schedule")
        configs = {stage: fps.AttentionConfig(args.tile, window) for stage, window in windows.items()}
        return fps.StepSchedule(**configs, alpha=args.alpha or (0.2, 0.8))
    except (TypeError, ValueError, OSError) as error:
        raise UserError(f"schedule: {error}") from error


def _scheduler(model: str) -> Any:
    """The pipeline's scheduler, which tells the shift and, for CogVideoX, how noise is added."""
    try:
        _, kind = diffusers.DiffusionPipeline.load_config(model)["scheduler"]
        return getattr(diffusers, kind).from_pretrained(model, subfolder="scheduler")
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"--model {model}: is no pipeline of diffusers: {error}") from error


def _shift(given: float | None, scheduler: Any) -> float:
    if given is not None:
        return given
    config = scheduler.config
    shift = config.get("shift", config.get("flow_shift"))
    if shift is None or config.get("use_dynamic_shifting"):
        raise UserError(
            f"--shift: must be given, as the {type(scheduler).__name__} does not say it; 1 for CogVideoX, e ** mu "
            f"where the shift depends on the size"
        )
    return float(shift)


def _request(args: argparse.Namespace) -> samples.Request:
    if args.data is not None and args.size is None:
        raise UserError("--size: must be given with --data")
    return samples.Request(
        model=args.model,
        transformer=args.transformer,
        size=args.size,
        source=args.data,
        steps=args.sampler_steps,
        guidance=args.guidance,
        points=args.points,
        prompts=args.prompts,
        dtype=args.dtype,
        seed=args.seed,
    )


def _videos(args: argparse.Namespace) -> list[str]:
    if args.data is None:
        return [f"{number:06}" for number in range(args.videos)]
    return [path.name for path in videos.find(args.data)]


def _settings(
    args: argparse.Namespace, schedule: fps.StepSchedule, shift: float, machine: Machine
) -> training.Settings:
    flow = args.flow
    if flow is None:
        flow = 0.0 if args.data is None else 1.0
    if flow and args.data is None:
        raise UserError(f"--flow {flow:g}: needs videos of your own; give --data, or leave it out")
    configs = {stage: config_to_json(getattr(schedule, stage)) for stage in STAGES}
    return training.Settings(
        model=args.model,
        transformer=args.transformer,
        method=args.method
        if args.method != "lora"
        else f"lora, rank {args.rank} on {' '.join(args.targets)}",
        schedule=configs | {"alpha": schedule.alpha},
        shift=shift,
        dense_layers=tuple(args.dense_layers),
        processes=machine.world,
        steps=args.steps,
        batch=args.batch,
        lr=args.lr or LR[args.method],
        warmup=args.warmup,
        ema=args.ema,
        flow=flow,
        held_out=args.held_out,
        seed=args.seed,
    )


def _table(before: dict[str, float], after: dict[str, float]) -> str:
    lines = ["relative squared error against the dense output", f"{'':8}{'before':>10}{'after':>10}"]
    return "\n".join([*lines, *(f"{name:8}{x:10.5f}{after[name]:10.5f}" for name, x in before.items())])


def _fail(message: str, status: int) -> int:
    print(f"finetune_diffusers.py: error: {message}", file=sys.stderr)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    model = "folder of a pipeline that save_pretrained wrote, or its name on the Hugging Face Hub"
    parser.add_argument("--model", required=True, help=model)
    out = "folder of the run; a run that it already holds is resumed; the result is in its subfolder model"
    parser.add_argument("--out", type=Path, required=True, metavar="RUN", help=out)
    part = "which transformer of the pipeline (default: transformer); Wan2.2 has a transformer_2 too"
    parser.add_argument("--transformer", default="transformer", metavar="NAME", help=part)
    _add_schedule(parser.add_argument_group("attention"))
    _add_data(parser.add_argument_group("samples"))
    _add_training(parser.add_argument_group("training"))
    _add_machine(parser.add_argument_group("machine"))
    return parser


def _add_schedule(group: Any) -> None:
    file = "schedule that StepSchedule.save wrote, in place of tile, windows and alpha"
    group.add_argument("--schedule", type=Path, metavar="FILE", help=file)
    group.add_argument("--tile", help="tokens of a tile, at most 512", **options.TRIPLE)
    for stage in STAGES:
        text = f"window of {stage} steps in tiles, each odd or the whole axis (default: dense FP8)"
        group.add_argument(f"--{stage}", help=text, **options.TRIPLE)
    alpha = "progress, 0 to 1, at which mid and late begin (default: 0.2 0.8)"
    group.add_argument("--alpha", type=options.fraction, nargs=2, metavar=("A", "B"), help=alpha)
    shift = "timestep shift of the sampler (default: the scheduler's)"
    group.add_argument("--shift", type=options.between(1e-3, 1e3), help=shift)
    layers = "layers that keep the host's dense attention; -1 is the last"
    group.add_argument("--dense-layers", type=int, nargs="+", default=(), metavar="I", help=layers)


def _add_data(group: Any) -> None:
    data = "folder of videos, each with its caption in a .txt file (default: the dense model samples)"
    group.add_argument("--data", metavar="DIR", help=data)
    cache = "folder of samples, which runs with the same request share (default: RUN/cache/NAME)"
    group.add_argument("--cache", type=Path, metavar="DIR", help=cache)
    size = {"type": options.positive, "nargs": 3, "metavar": ("FRAMES", "H", "W")}
    group.add_argument("--size", help="frames and pixels of a video (default: the pipeline's)", **size)
    group.add_argument(
        "--videos", type=options.positive, default=200, metavar="N", help="videos to sample (200)"
    )
    points = "calls of the transformer that are kept of each sampled video (8)"
    group.add_argument("--points", type=options.positive, default=8, metavar="N", help=points)
    prompts = "file with a prompt in each line (default: random combinations of a few words)"
    group.add_argument("--prompts", metavar="FILE", help=prompts)
    group.add_argument("--sampler-steps", type=options.positive, default=50, metavar="N", help="steps (50)")
    guidance = "guidance scale (default: the pipeline's)"
    group.add_argument("--guidance", type=options.between(0, 100), metavar="G", help=guidance)
    held_out = "videos that are for validation alone (4)"
    group.add_argument("--held-out", type=options.positive, default=4, metavar="N", help=held_out)


def _add_training(group: Any) -> None:
    method = "lora (default): an adapter; weights: all weights"
    group.add_argument("--method", choices=LR, default="lora", help=method)
    group.add_argument("--rank", type=options.positive, default=64, help="rank of the adapter (64)")
    targets = "ends of the names of the linear layers that get an adapter (default: to_q to_k to_v to_out.0)"
    group.add_argument("--targets", nargs="+", default=TARGETS, metavar="NAME", help=targets)
    group.add_argument(
        "--steps", type=options.positive, default=1000, help="steps of the optimizer, in all (1000)"
    )
    group.add_argument(
        "--batch", type=options.positive, default=1, help="samples a step, of each process (1)"
    )
    lr = "peak learning rate (default: 1e-4 for an adapter, 1e-5 for all weights)"
    group.add_argument("--lr", type=options.between(1e-12, 1), help=lr)
    warmup = "steps over which the learning rate rises (50)"
    group.add_argument("--warmup", type=options.positive, default=50, help=warmup)
    group.add_argument(
        "--ema", type=options.fraction, default=0.99, help="decay of the averaged weights (0.99)"
    )
    flow = "weight of the flow-matching loss beside distillation's 1 (default: 1 with --data)"
    group.add_argument("--flow", type=options.between(0, 1e3), help=flow)
    group.add_argument("--seed", type=options.seed, default=0, help="seed of all draws (0)")
    every = "steps from checkpoint to checkpoint (100)"
    group.add_argument("--save-every", type=options.positive, default=100, metavar="N", help=every)


def _add_machine(group: Any) -> None:
    options.add_device(group)
    group.add_argument("--dtype", choices=DTYPES, default="bf16", help="of the transformer (bf16)")
    checkpointing = "keep all activations: faster, but much memory"
    group.add_argument("--no-checkpointing", dest="checkpointing", action="store_false", help=checkpointing)
    group.add_argument("--compile", action="store_true", help="torch.compile the repeated blocks")
    backend = "backend of fpsattention.attention (default: auto); sm90 never falls back"
    group.add_argument("--backend", choices=("auto", "sm90", "reference"), default="auto", help=backend)


if __name__ == "__main__":
    sys.exit(main())
