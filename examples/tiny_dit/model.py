"""A rectified-flow video transformer built like Wan2.1's (arXiv 2503.20314), without text."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fpsattention.cli import video

PATCH = 2  # latent pixels per token along height and width; one latent frame along time
TIME_CHANNELS = 256
SIZES = {  # parameters: 0.6, 5.3 and 22 million
    "tiny": {"dim": 128, "depth": 2, "heads": 2},
    "small": {"dim": 256, "depth": 6, "heads": 4},
    "base": {"dim": 384, "depth": 12, "heads": 3},
}

# The self-attention that the model calls. It takes q, k, v [B, L, heads, head_dim], tokens in raster order, and returns
# that shape.
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Shape:
    """The shape of a model and its input: a size of `SIZES`, a grid of tokens (T, H, W), channels of a latent pixel."""

    size: str
    grid: tuple[int, int, int]
    channels: int


def patchify(x: Tensor) -> Tensor:
    """Latent [B, T, 2H, 2W, C] to tokens [B, T * H * W, 4C] in raster order, w fastest."""
    return x.unflatten(3, (-1, PATCH)).unflatten(2, (-1, PATCH)).transpose(3, 4).flatten(4).flatten(1, 3)


def unpatchify(tokens: Tensor, grid: tuple[int, int, int]) -> Tensor:
    x = tokens.unflatten(1, grid).unflatten(4, (PATCH, PATCH, -1)).transpose(3, 4)
    return x.flatten(4, 5).flatten(2, 3)


class Block(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = (nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False) for _ in range(2))
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.norm_q, self.norm_k = (nn.RMSNorm(dim, eps=1e-6) for _ in range(2))  # over all heads, as in Wan
        self.mlp = nn.Sequential(
            nn.Linear(dim, 4 * dim), nn.GELU(approximate="tanh"), nn.Linear(4 * dim, dim)
        )
        self.modulation = nn.Parameter(torch.zeros(6, dim))

    def forward(self, x: Tensor, time: Tensor, angles: Tensor, attend: Attend) -> Tensor:
        """x [B, L, dim]; time [B, 1, 6, dim], shared by all blocks; angles as from `video.rope_angles`."""
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.modulation + time).unbind(2)
        q, k, v = self.qkv(self.norm1(x) * (1 + scale1) + shift1).chunk(3, dim=-1)
        q, k, v = (
            y.unflatten(-1, (self.heads, -1)) for y in (self.norm_q(q.float()), self.norm_k(k.float()), v)
        )
        q, k = (video.apply_rope(y, angles).to(v.dtype) for y in (q, k))
        x = x + gate1 * self.out(attend(q, k, v).flatten(2))
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class VideoDiT(nn.Module):
    """Predicts the velocity noise - clean of a noisy latent (1 - sigma) * clean + sigma * noise."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.shape = shape
        dim, depth, heads = SIZES[shape.size].values()
        self.embed = nn.Linear(PATCH**2 * shape.channels, dim)
        self.time = nn.Sequential(nn.Linear(TIME_CHANNELS, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.modulation = nn.Parameter(torch.zeros(2, dim))
        self.head = nn.Linear(dim, PATCH**2 * shape.channels)
        self.register_buffer("angles", video.rope_angles(shape.grid, dim // heads), persistent=False)
        # At first every block is the identity, and the prediction is zero.
        for layer in (self.time_projection[1], self.head):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, sigma: Tensor, attend: Attend) -> Tensor:
        """x [B, T, 2H, 2W, C], sigma [B] in [0, 1]; returns the velocity, fp32, shaped like x."""
        hidden = self.embed(patchify(x))
        time = self.time(_time_features(sigma))
        time6 = self.time_projection(time).float().unflatten(-1, (6, -1))[:, None]
        for block in self.blocks:
            hidden = block(hidden, time6, self.angles, attend)
        shift, scale = (self.modulation + time.float()[:, None, None]).unbind(2)
        return unpatchify(self.head(self.norm(hidden) * (1 + scale) + shift).float(), self.shape.grid)


def _time_features(sigma: Tensor) -> Tensor:
    """Cosines and sines of the timestep 1000 * sigma, [B, TIME_CHANNELS]."""
    half = TIME_CHANNELS // 2
    frequency = torch.exp(-math.log(10_000) * torch.arange(half, device=sigma.device) / half)
    angles = 1000 * sigma.float()[:, None] * frequency
    return torch.cat([angles.cos(), angles.sin()], dim=-1)
