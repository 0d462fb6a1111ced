"""Inputs by family, for speed and accuracy: random Q, K and V with the structures that attention meets in video models.

    q, k, v = make("smooth", grid=(21, 45, 80), heads=40, head_dim=128, device="cuda")

A kernel that is fast or accurate on Gaussian inputs alone is neither. The same families serve the tests.
"""

from __future__ import annotations

import math
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from fpsattention.cli.video import apply_rope, rope_angles
from fpsattention.core.checks import Triple

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
TRAINED = "trained"
TRAINED_GRID, TRAINED_HEADS, TRAINED_HEAD_DIM = (8, 32, 32), 24, 64  # 4 heads of each of 6 layers
SIGMA = 0.6  # noise level at which the trained model is looked at
COARSE = 8  # tokens between two points of the noise that "smooth" interpolates along height and width
SMOOTH_NOISE = 0.1  # of one token, beside a smooth part of size 1


class Draw:
    """Normal fp32 tensors for one call: [L, heads, head_dim] unless a shape is given."""

    def __init__(self, grid: Triple, heads: int, head_dim: int, device: torch.device | str, seed: int):
        self.grid, self.heads, self.head_dim, self.device = grid, heads, head_dim, device
        self.generator = torch.Generator(device).manual_seed(seed)

    def __call__(self, *shape: int) -> Tensor:
        shape = shape or (math.prod(self.grid), self.heads, self.head_dim)
        return torch.randn(*shape, generator=self.generator, device=self.device)

    def qkv(self) -> list[Tensor]:
        return [self() for _ in range(3)]


def gaussian(draw: Draw) -> list[Tensor]:
    """Unit normals: flat attention, the mean of V is small beside its size."""
    return draw.qkv()


def rms_rope(draw: Draw) -> list[Tensor]:
    """Q and K as Wan2.1 makes them: RMS norm over all heads, weights per channel, rotary embedding over the 3D grid.

    Q and K share a mean direction, as after training, so that the rotation makes nearby keys the likelier ones.
    """
    angles = rope_angles(draw.grid, draw.head_dim)
    mean = draw(draw.heads, draw.head_dim)

    def norm_and_turn() -> Tensor:
        x = draw().add_(mean)
        x *= (x.square().mean((1, 2), keepdim=True) + 1e-6).rsqrt_()
        return apply_rope(x * (0.3 * draw(draw.heads, draw.head_dim)).exp_(), angles)

    return [norm_and_turn(), norm_and_turn(), draw()]


def peaked(draw: Draw) -> list[Tensor]:
    """Scores of standard deviation 3."""
    q, k, v = draw.qkv()
    return [q.mul_(2), k.mul_(1.5), v]


def very_peaked(draw: Draw) -> list[Tensor]:
    """Scores of standard deviation 8: few keys share a row."""
    q, k, v = draw.qkv()
    return [q.mul_(4), k.mul_(2), v]


def sink(draw: Draw) -> list[Tensor]:
    """The first key attracts every query: its score is sqrt(head_dim) above the mean of the others."""
    q, k, v = draw.qkv()
    direction = draw(draw.heads, draw.head_dim).sign()
    q += direction / 2
    k[0] = 2 * direction
    return [q, k, v]


def smooth(draw: Draw) -> list[Tensor]:
    """Noise on a coarse grid, interpolated, and a little noise of each token: neighbours are alike, as in video."""
    coarse = tuple(n // step + 2 for n, step in zip(draw.grid, (COARSE // 2, COARSE, COARSE), strict=True))

    def smoothed() -> Tensor:
        noise = draw(1, draw.heads * draw.head_dim, *coarse)
        x = F.interpolate(noise, size=draw.grid, mode="trilinear", align_corners=True)[0]
        x = x.flatten(1).T.unflatten(1, (draw.heads, draw.head_dim))
        x = x / x.square().mean().sqrt()
        return x.add_(draw(), alpha=SMOOTH_NOISE)

    return [smoothed(), smoothed(), smoothed()]


def value_sign(draw: Draw) -> list[Tensor]:
    """V of one sign: the output does not shrink with the number of keys, so nothing but its own error averages out."""
    q, k, v = draw.qkv()
    return [q, k, v.abs_()]


def one_hot(draw: Draw) -> list[Tensor]:
    """One hot key for each query, that of the token before it."""
    _, k, v = draw.qkv()
    return [2 * k.roll(1, dims=0), k, v]


FAMILIES: dict[str, Callable[[Draw], list[Tensor]]] = {
    f.__name__: f for f in (gaussian, rms_rope, peaked, very_peaked, sink, smooth, value_sign, one_hot)
}


def make(
    name: str,
    grid: Triple,
    heads: int,
    head_dim: int,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [1, L, heads, head_dim] of a family, determined by its name, the shape, the seed and the kind of device.

    Args:
        name: of `FAMILIES`, or "trained", which has the shape of `trained` (or fewer heads) and no seed.

    Raises ValueError for another name, or another shape of "trained".
    """
    if name == TRAINED:
        if (tuple(grid), head_dim) != (TRAINED_GRID, TRAINED_HEAD_DIM) or heads > TRAINED_HEADS:
            raise ValueError(
                f"grid, heads, head_dim: {tuple(grid)}, {heads}, {head_dim}; the trained model has "
                f"{TRAINED_GRID}, at most {TRAINED_HEADS}, {TRAINED_HEAD_DIM}"
            )
        q, k, v = (x[:, :, :heads].to(dtype) for x in trained(device))
        return q, k, v
    if name not in FAMILIES:
        raise ValueError(f"name: {name!r} must be one of {', '.join([*FAMILIES, TRAINED])}")
    draw = Draw(grid, heads, head_dim, device, seed + zlib.crc32(name.encode()))
    q, k, v = (x.to(dtype)[None].contiguous() for x in FAMILIES[name](draw))
    return q, k, v


@torch.no_grad()
def trained(device: torch.device | str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v fp32 [1, 8192, 24, 64] of the small trained model (docs/training.md) on held-out frames, noise level 0.6.

    The heads of its layers, one layer after the other; grid `TRAINED_GRID`. Needs pip install 'fpsattention[train]'.
    """
    if str(EXAMPLES) not in sys.path:
        sys.path.append(str(EXAMPLES))
    from tiny_dit import denoise, flow  # its packages are needed for this family alone

    case = denoise.prepare(denoise.checkpoints(denoise.CHECKPOINTS), torch.device(device))
    layers = []

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        layers.append((q, k, v))
        return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

    sigma = torch.tensor([SIGMA])
    flow.velocity(case.dense.model, flow.mix(case.clean, case.noise, sigma), sigma, attend)
    q, k, v = (torch.cat(x, dim=2).float() for x in zip(*layers, strict=True))
    return q, k, v
