"""Videos of a folder as latents of the pipeline's VAE, and their noise.

A caption is in a text file of the video's name: clip.mp4, clip.txt.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fpsattention.cli import video
from fpsattention.cli.errors import UserError
from fpsattention.integrations.hosts import TRAIN_TIMESTEPS

from .machine import Machine
from .samples import Cache, Enough, Sample, follow

SUFFIXES = {".avi", ".mkv", ".mov", ".mp4", ".pt", ".webm"}


def _wan(pipe: Any, latent: Tensor) -> Tensor:
    mean, std = (
        torch.tensor(x, device=latent.device).view(1, -1, 1, 1, 1)
        for x in (pipe.vae.config.latents_mean, pipe.vae.config.latents_std)
    )
    return (latent - mean) / std


def _hunyuan(pipe: Any, latent: Tensor) -> Tensor:
    return latent * pipe.vae.config.scaling_factor


def _cogvideox(pipe: Any, latent: Tensor) -> Tensor:
    latent = latent.transpose(1, 2) * pipe.vae.config.scaling_factor
    # The 1.5 models have patches of two frames; the pipeline drops what it has put in front to fill the first.
    missing = -latent.shape[1] % (pipe.transformer.config.patch_size_t or 1)
    return torch.cat([latent[:, :1]] * missing + [latent], dim=1)


def _ltx(pipe: Any, latent: Tensor) -> Tensor:
    vae = pipe.vae
    latent = pipe._normalize_latents(latent, vae.latents_mean, vae.latents_std, vae.config.scaling_factor)
    return pipe._pack_latents(
        latent, pipe.transformer_spatial_patch_size, pipe.transformer_temporal_patch_size
    )


# From the VAE's latent [1, C, T, H, W] to the hidden_states of a transformer, by its class.
LATENTS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "CogVideoXTransformer3DModel": _cogvideox,
    "HunyuanVideoTransformer3DModel": _hunyuan,
    "LTXVideoTransformer3DModel": _ltx,
    "WanTransformer3DModel": _wan,
}


def find(folder: str) -> list[Path]:
    """The videos in a folder, by name. Raises UserError where there are none."""
    if not Path(folder).is_dir():
        raise UserError(f"--data {folder}: is not a folder; give one that holds video files")
    found = sorted(path for path in Path(folder).iterdir() if path.suffix.lower() in SUFFIXES)
    if not found:
        raise UserError(f"--data {folder}: holds no video; a file must end in one of {sorted(SUFFIXES)}")
    return found


def encode(pipe: Any, cache: Cache, machine: Machine, tick: Callable[[], None]) -> None:
    """Write a sample of each video: its latent, and what the pipeline calls the transformer with for its caption."""
    request = cache.request
    transformer = getattr(pipe, request.transformer)
    kind = type(transformer).__name__
    if kind not in LATENTS:
        raise UserError(
            f"--data {request.source}: how the latents of a {kind} are laid out is unknown here; known are "
            f"{', '.join(sorted(LATENTS))}; leave --data out to train on what the model samples"
        )
    for name in cache.videos[machine.rank :: machine.world]:
        path = Path(request.source, name)
        if not cache.has(name):
            # Without guidance a batch has no half of negative prompts.
            call = request.call() | {"prompt": _caption(path), "guidance_scale": 1.0}
            taken = _first_call(pipe, transformer, call)
            hidden = taken.arguments["hidden_states"]
            clean = LATENTS[kind](pipe, _vae_latent(pipe.vae, _frames(pipe, path, request.size)))
            if clean.shape != hidden.shape:
                raise UserError(
                    f"--data {request.source}: the latent of {path.name} has shape {tuple(clean.shape)}, but the "
                    f"transformer gets {tuple(hidden.shape)}; if it takes an image too, leave --data out"
                )
            cache.write(name, [Sample(taken.arguments, 0.0, clean=clean.to(hidden))])
        tick()


def _caption(path: Path) -> str:
    text = path.with_suffix(".txt")
    if not text.is_file():
        raise UserError(f"--data {path.parent}: {path.name} has no caption; write it to {text.name}")
    return text.read_text().strip()


def _first_call(pipe: Any, transformer: Any, call: dict[str, Any]) -> Sample:
    calls: list[Sample] = []

    def note(taken: Sample) -> None:
        calls.append(taken)
        raise Enough

    follow(pipe, transformer, call, note)
    return calls[0]


def _frames(pipe: Any, path: Path, size: tuple[int, int, int]) -> Tensor:
    """The first frames of a video, [1, 3, T, H, W] from -1 to 1."""
    count, height, width = size
    frames = [video.scale_frame(frame, height, width) for frame in islice(video.frames_of(path), count)]
    if len(frames) < count:
        raise UserError(f"--size {count} {height} {width}: {path.name} has {len(frames)} frames only")
    return torch.stack(frames).permute(3, 0, 1, 2)[None].to(pipe.vae.device).float() / 127.5 - 1


@torch.no_grad()
def _vae_latent(vae: Any, pixels: Tensor) -> Tensor:
    return vae.encode(pixels.to(vae.dtype)).latent_dist.mode().float()


def noised(scheduler: Any, taken: Sample, u: float, shift: float, noise: Tensor) -> tuple[Sample, Tensor]:
    """A video's sample at the noise level of progress 1 - u, and what a perfect model would return.

    Args:
        u: noise level before the timestep shift.
        noise: shaped like the latent.
    """
    clean, arguments = taken.clean, dict(taken.arguments)
    timestep = arguments["timestep"]
    if scheduler.config.get("prediction_type") == "v_prediction":  # CogVideoX: no rectified flow
        index = torch.full((len(clean),), round(u * (TRAIN_TIMESTEPS - 1)), device=clean.device)
        hidden, target = (f(clean, noise, index) for f in (scheduler.add_noise, scheduler.get_velocity))
        arguments["timestep"] = index.to(timestep.dtype).expand(timestep.shape)
    else:
        sigma = shift * u / (1 + (shift - 1) * u)
        hidden, target = (1 - sigma) * clean + sigma * noise, noise - clean
        arguments["timestep"] = torch.full_like(timestep, sigma * TRAIN_TIMESTEPS)
    arguments["hidden_states"] = hidden.to(clean.dtype)
    return Sample(arguments, 1 - u, clean=clean), target
