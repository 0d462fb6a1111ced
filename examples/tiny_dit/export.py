"""A trained model as one safetensors file, and back."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

import fpsattention
from fpsattention.cli.errors import UserError

from .clips import Codec
from .model import VideoDiT
from .training import Weights, from_plain, plain, shape_of

FORMAT = "fpsattention tiny_dit 1"


def save(weights: Weights, path: Path, limit_mb: float) -> int:
    """Write the weights in BF16, the codec in fp32 and, as metadata, how they were made. Returns the file's bytes."""
    tensors = {f"model.{name}": x.bfloat16().contiguous() for name, x in weights.model.state_dict().items()}
    tensors |= {f"codec.{name}": x.contiguous() for name, x in vars(weights.codec).items()}
    size = sum(x.numel() * x.element_size() for x in tensors.values())
    if size > limit_mb * 1e6:
        raise UserError(
            f"--limit {limit_mb:g}: a model of --size {weights.settings.size} takes {size / 1e6:.1f} MB; raise the "
            f"limit to {-(-size // 10**6)}, or train a smaller --size"
        )
    metadata = {
        "format": FORMAT,
        "settings": json.dumps(plain(weights.settings)),
        "step": str(weights.step),
        "weights": "averaged over training (EMA), rounded to bfloat16",
        "made_by": f"examples/train_tiny_dit.py of fpsattention {fpsattention.__version__}, torch {torch.__version__}",
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata)
    return path.stat().st_size


def load(path: Path, device: torch.device | str = "cpu") -> Weights:
    """The fp32 model of a file from `save`. Raises UserError for another file."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: cannot be read as safetensors ({error})") from error
    if metadata.get("format") != FORMAT:
        raise UserError(f"{path}: its format is {metadata.get('format')!r}, must be {FORMAT!r}")
    settings = from_plain(json.loads(metadata["settings"]))
    model = VideoDiT(shape_of(settings))
    model.load_state_dict(
        {name.removeprefix("model."): x.float() for name, x in tensors.items() if name.startswith("model.")}
    )
    codec = Codec(*(tensors[f"codec.{field.name}"] for field in dataclasses.fields(Codec)))
    return Weights(model.to(device).eval(), codec.to(device), settings, int(metadata["step"]))
