"""The speed-up from FPSAttention in diffusers' other video models, at real sizes, with a few layers and random weights.

Time is proportional to the layers, so the speed-up of a few is nearly that of all. Each pipeline runs with random text
embeddings up to its first step; then its transformer's forward is timed with the arguments of that step. Contenders:

    stock            BF16, dense, as diffusers runs it (torch chooses the kernel)
    fps              FPSAttention by `fpsattention.integrations.diffusers.enable`, in one stage
    ..., compiled    both under torch.compile

    python bench/bench_models.py --output bench/results/h100_models.json     # needs pip install 'fpsattention[bench]'
"""

from __future__ import annotations

import argparse
import gc
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.pipelines.ltx2 import LTX2TextConnectors
from torch import Tensor, nn

import fpsattention as fps
from common import forward_seconds, parsed, write_results
from fpsattention.integrations.diffusers import enable
from fpsattention.schedules.models import MODELS


@dataclass(frozen=True)
class Case:
    """A model of the catalogue, with some of its layers.

    Attributes:
        pipe: class of its pipeline.
        transformer: makes the transformer, with a few layers.
        scheduler: makes the scheduler.
        call: arguments of the pipeline, except the size of the video.
        size: (height, width, frames) of the catalogue's setting.
        tile, window: density 0.13 to 0.19.
        parts: makes what else the pipeline cannot do without; text encoders and most VAEs may be None.
        fullgraph: whether torch.compile can take the host's forward in one graph.
    """

    pipe: type
    transformer: Callable[..., nn.Module]
    scheduler: Callable
    call: dict[str, Tensor]
    size: tuple[int, int, int]
    tile: tuple[int, int, int]
    window: tuple[int, int, int]
    parts: Callable[[], dict[str, Any]] = dict
    fullgraph: bool = True


def text(tokens: int, name: str = "prompt", mask: str | None = None, dim: int = 4096) -> dict[str, Tensor]:
    """Embeddings of a prompt without padding, and its mask where the pipeline takes one."""
    embeds = {f"{name}_embeds": torch.randn(1, tokens, dim).bfloat16()}
    return embeds | ({f"{name}_{mask}": torch.ones(1, tokens, dtype=torch.bool)} if mask else {})


def hunyuan15_parts() -> dict[str, Any]:
    """The pipeline reads the latent's channels from the VAE, of which no layer runs."""
    vae = diffusers.AutoencoderKLHunyuanVideo15(block_out_channels=(32,) * 5, layers_per_block=1)
    return {"vae": vae, "guider": diffusers.ClassifierFreeGuidance(enabled=False)}


def ltx2_parts() -> dict[str, Any]:
    """The text goes through `connectors` before the first step; here they have no layers."""
    layers = {"video_connector_num_layers": 0, "audio_connector_num_layers": 0}
    connectors = LTX2TextConnectors(text_proj_in_factor=1, rope_type="split", **layers)
    return {"connectors": connectors.to(torch.bfloat16)}


HUNYUAN, HUNYUAN15, COGVIDEOX, MOCHI = (
    MODELS[name] for name in ("hunyuanvideo-720p", "hunyuanvideo1.5-720p", "cogvideox1.5-5b", "mochi")
)
# HunyuanVideo-1.5 counts these among its text tokens. Text to video has an image of zeros, whose tokens are padding.
BYT5_TOKENS, IMAGE_TOKENS = 256, 729

CASES = {
    HUNYUAN.name: Case(
        diffusers.HunyuanVideoPipeline,
        partial(diffusers.HunyuanVideoTransformer3DModel, num_layers=2, num_single_layers=4),
        partial(diffusers.FlowMatchEulerDiscreteScheduler, shift=7.0),
        text(HUNYUAN.text_tokens, mask="attention_mask")
        | {"pooled_prompt_embeds": torch.randn(1, 768).bfloat16()},
        (720, 1280, 129),
        tile=(17, 3, 5),
        window=(2, 5, 7),
    ),
    HUNYUAN15.name: Case(
        diffusers.HunyuanVideo15Pipeline,
        partial(diffusers.HunyuanVideo15Transformer3DModel, num_layers=6),
        partial(diffusers.FlowMatchEulerDiscreteScheduler, shift=9.0),
        text(HUNYUAN15.text_tokens - BYT5_TOKENS - IMAGE_TOKENS, mask="embeds_mask", dim=3584)
        | {
            "prompt_embeds_2": torch.randn(1, BYT5_TOKENS, 1472).bfloat16(),
            "prompt_embeds_mask_2": torch.ones(1, BYT5_TOKENS, dtype=torch.bool),
        },
        (720, 1280, 121),
        tile=(16, 2, 8),
        window=(2, 11, 3),
        parts=hunyuan15_parts,
        fullgraph=False,  # the host chooses by the values of the image and of the masks
    ),
    COGVIDEOX.name: Case(
        diffusers.CogVideoXPipeline,
        partial(
            diffusers.CogVideoXTransformer3DModel,
            num_layers=6,
            num_attention_heads=COGVIDEOX.heads,
            sample_width=170,
            sample_height=96,
            sample_frames=81,
            patch_size_t=2,
            patch_bias=False,
            use_rotary_positional_embeddings=True,
        ),
        diffusers.CogVideoXDDIMScheduler,
        text(COGVIDEOX.text_tokens) | text(COGVIDEOX.text_tokens, "negative_prompt"),
        (768, 1360, 81),
        tile=(11, 2, 17),
        window=(1, 7, 3),
    ),
    MOCHI.name: Case(
        diffusers.MochiPipeline,
        partial(diffusers.MochiTransformer3DModel, num_layers=6),
        partial(diffusers.FlowMatchEulerDiscreteScheduler, invert_sigmas=True),
        text(MOCHI.text_tokens, mask="attention_mask")
        | text(MOCHI.text_tokens, "negative_prompt", mask="attention_mask"),
        (480, 848, 163),
        tile=(14, 9, 3),
        window=(2, 4, 3),
    ),
    "ltx-video": Case(
        diffusers.LTXPipeline,
        partial(diffusers.LTXVideoTransformer3DModel, num_layers=6),
        partial(diffusers.FlowMatchEulerDiscreteScheduler, use_dynamic_shifting=True),
        text(128, mask="attention_mask") | text(128, "negative_prompt", mask="attention_mask"),
        (512, 704, 161),
        tile=(21, 3, 6),
        window=(1, 3, 1),
    ),
    "ltx-2": Case(
        diffusers.LTX2Pipeline,
        partial(diffusers.LTX2VideoTransformer3DModel, num_layers=6, rope_type="split"),
        partial(diffusers.FlowMatchEulerDiscreteScheduler, use_dynamic_shifting=True),
        text(1024, mask="attention_mask", dim=3840)
        | text(1024, "negative_prompt", mask="attention_mask", dim=3840),
        (512, 768, 121),
        tile=(2, 8, 8),
        window=(7, 1, 1),
        parts=ltx2_parts,
    ),
}


@dataclass
class Result:
    """Median seconds of a forward, and the speed-up over the eager stock model."""

    model: str
    name: str
    tokens: int
    density: float
    seconds: float
    speedup: float


class FirstForward(Exception):
    """Ends a pipeline where its transformer would run, with the arguments of this forward."""


def forward_of_a_step(case: Case, device: str = "cuda") -> tuple[nn.Module, dict]:
    """The transformer, and the arguments of its forward in the first step."""
    torch.manual_seed(0)
    with torch.device(device):
        transformer = case.transformer().to(torch.bfloat16).eval().requires_grad_(False)
        parts = {"transformer": transformer, "scheduler": case.scheduler(), **case.parts()}
    pipe = case.pipe(**dict.fromkeys(case.pipe._get_signature_keys(case.pipe)[0]) | parts)
    pipe.set_progress_bar_config(disable=True)

    def stop(module: nn.Module, args: tuple, kwargs: dict) -> None:
        raise FirstForward(kwargs)

    hook = transformer.register_forward_pre_hook(stop, with_kwargs=True)
    height, width, frames = case.size
    call = {name: x.to(device) for name, x in case.call.items()}
    size = {"height": height, "width": width, "num_frames": frames}
    try:
        pipe(**call, **size, num_inference_steps=2, output_type="latent")
    except FirstForward as reached:
        (inputs,) = reached.args
    hook.remove()
    return transformer, {name: x for name, x in inputs.items() if name != "return_dict"}


def measure(name: str, case: Case, repeats: int) -> list[Result]:
    model = MODELS[name]
    config = fps.AttentionConfig(case.tile, case.window)
    density = config.resolve(model.grid, model.heads, *model.text_lengths).density
    transformer, inputs = forward_of_a_step(case)
    results = []
    for contender in ("stock", "fps", "stock, compiled", "fps, compiled"):
        ours = contender.startswith("fps")
        torch.compiler.reset()
        compiled = contender.endswith("compiled")
        run = torch.compile(transformer, fullgraph=case.fullgraph) if compiled else transformer
        if ours:
            handle = enable(transformer, fps.StepSchedule(config, config, config), shift=1.0, backend="sm90")
        _, *times = forward_seconds(f"{name}, {contender}", run, inputs, repeats + 1)
        if ours:
            (row,) = handle.report(num_steps=1).rows
            if row.configs[0].grid != model.grid:
                raise RuntimeError(f"{name}: ran on the grid {row.configs[0].grid}, must be {model.grid}")
            handle.remove()
        seconds = statistics.median(times)
        stock = results[0].seconds if results else seconds
        used = density if ours else 1.0
        results.append(Result(name, contender, model.tokens, used, seconds, stock / seconds))
        print(
            f"{name:18s} {contender:16s} {used:8.3f} {1e3 * seconds:8.1f} ms {stock / seconds:6.2f}",
            flush=True,
        )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"{', '.join(CASES)} (default: all)")
    parser.add_argument("--repeats", type=int, default=3, help="timed forwards (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    args = parsed(parser, CASES)
    results = []
    for name in args.models or CASES:
        results += measure(name, CASES[name], args.repeats)
        gc.collect()  # modules and their hooks refer to each other
        torch.cuda.empty_cache()
        if args.output:  # after each model: a run cut short keeps its results
            write_results(args.output, results)


if __name__ == "__main__":
    main()
