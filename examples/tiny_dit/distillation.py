"""Fine-tuning without clips: the dense start model samples the latents and says what to predict on them."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from . import flow
from .model import PATCH, VideoDiT

SAMPLER_STEPS = 30
BATCH = 8


class Teacher:
    """The dense model as it was before training, and latents that it has sampled from noise.

    Attributes:
        latents: [count, T, 2H, 2W, C], on the CPU. A run samples them again when it is resumed: they follow from the
            seed.
    """

    def __init__(
        self, model: VideoDiT, plan: flow.Plan, backend: str, count: int, seed: int, device: torch.device
    ):
        self.model = copy.deepcopy(model).to(device).requires_grad_(False).eval()
        self.attention = flow.Attention(plan, "dense", backend)
        self.device = device
        t, h, w = plan.grid
        generator = torch.Generator().manual_seed(seed)  # on the CPU: equal on every device
        noise = torch.randn(count, t, PATCH * h, PATCH * w, model.shape.channels, generator=generator)
        with torch.no_grad():
            parts = [
                flow.sample(self.model, x.to(device), 0, SAMPLER_STEPS, self.attention).cpu()
                for x in noise.split(BATCH)
            ]
        self.latents = torch.cat(parts)

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Random ones of the latents."""
        return self.latents[torch.randint(len(self.latents), (count,), generator=generator)].to(self.device)

    @torch.no_grad()
    def velocity(self, x: Tensor, sigma: Tensor) -> Tensor:
        """What the dense model predicts; sigma [B] on the CPU."""
        return flow.velocity(self.model, x, sigma, self.attention.of_batch(sigma))
