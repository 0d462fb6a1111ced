"""A transformer of diffusers with what a forward of it gets, and the parts that such cases are made of."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import diffusers
import torch
from torch import nn

import tiny_diffusers as tiny
from tiny_configs import TEXT_DIM

GRID = (3, 4, 6)


@dataclass
class Case:
    """A transformer and a forward of it.

    Attributes:
        inputs: of a forward, of any number of samples.
        layers: self-attention layers, as the description counts them.
        before, after: tokens of text or else around the video's.
        timesteps: that the forward may get: noisy, middle and clean.
    """

    transformer: nn.Module
    inputs: dict[str, Any]
    layers: int = 2
    before: int = 0
    after: int = 0
    timesteps: tuple[float, float, float] = (990.0, 500.0, 20.0)

    def run(self, **kwargs) -> torch.Tensor:
        return self.transformer(**self.inputs | kwargs, return_dict=False)[0]

    def at(self, stage: int) -> Case:
        """The case at one of its timesteps."""
        timestep = torch.full_like(self.inputs["timestep"], self.timesteps[stage])
        return replace(self, inputs=self.inputs | {"timestep": timestep})


def randn(*shape: int, seed: int = 5) -> torch.Tensor:
    return torch.randn(*shape, generator=tiny.noise(seed))


def text(batch: int = 1, length: int = 7, seed: int = 6) -> torch.Tensor:
    return randn(batch, length, TEXT_DIM, seed=seed)


def built(kind: str, seed: int = 0, **config) -> nn.Module:
    """Every weight is random: some models begin with modulations of zero, which would hide attention."""
    torch.manual_seed(seed)
    transformer = getattr(diffusers, kind)(**config).eval()
    for parameter in transformer.parameters():
        if parameter.dim() > 1 and not parameter.any():
            nn.init.normal_(parameter, std=0.05)
    return transformer


def latent(batch: int = 1, channels: int = 4) -> dict[str, torch.Tensor]:
    return {
        "hidden_states": randn(batch, channels, 3, 8, 12),
        "timestep": torch.full((batch,), 500.0),
    }


def mask(*valid: int, length: int = 7) -> torch.Tensor:
    return torch.arange(length)[None] < torch.tensor(valid)[:, None]
