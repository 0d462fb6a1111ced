"""Inputs for the tests: friendly and nasty Q, K, V, and memory that is poisoned before a launch."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

FP16_MAX = 65504.0


def tile_coordinates(grid, tile, device="cpu") -> torch.Tensor:
    """int64 [L, 3]: tile coordinates (t, h, w) of every token in raster order. Written out here, so that the
    tests do not take their idea of a tile from the package.
    """
    _, height, width = grid
    token = torch.arange(grid[0] * height * width, device=device)
    axes = (token // (height * width), token // width % height, token % width)
    return torch.stack([x // t for x, t in zip(axes, tile, strict=True)], dim=1)


@contextmanager
def poisoned():
    """Inside, torch fills uninitialised memory: with NaN for floats, with the largest value for integers
    (bytes of 0x7f or 0xff, which are NaN in E4M3). A kernel that leaves an output, an operand or padding
    unwritten, and later reads it, cannot pass by the luck of a zeroed allocation.
    """
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fill


class Draw:
    """Random and constant fp32 tensors [B, L, H, D] for one call, and the facts of the call that a generator needs."""

    def __init__(self, shape, grid, tile, dtype, device, seed):
        self.shape, self.grid, self.tile, self.dtype, self.device = shape, grid, tile, dtype, device
        self.generator = torch.Generator(device).manual_seed(seed)

    def normal(self, *shape) -> torch.Tensor:
        return torch.randn(*(shape or self.shape), generator=self.generator, device=self.device)

    def student_t(self) -> torch.Tensor:
        """Three degrees of freedom: the variance exists, the kurtosis does not."""
        chi2 = sum(self.normal().square() for _ in range(3))
        return self.normal() / (chi2 / 3).sqrt()

    def direction(self) -> torch.Tensor:
        """A unit vector [D]."""
        x = self.normal(self.shape[-1])
        return x / x.norm()


def _gaussian(draw):
    return draw.normal(), draw.normal(), draw.normal()


def _peaked(draw):
    """Logits that spread as in a trained model, more than those of unit vectors."""
    return 1.5 * draw.normal(), draw.normal(), draw.normal()


def _heavy_tailed(draw):
    return draw.student_t(), draw.student_t(), draw.student_t()


def _channel_outliers(draw):
    """Outlier channels in every operand whose products stay moderate."""
    q, k, v = _gaussian(draw)
    k[..., 3] *= 100
    q[..., 3] /= 100
    q[..., 7] *= 100
    k[..., 7] /= 100
    v[..., 5] *= 100
    return q, k, v


def _key_outliers(draw):
    """An outlier channel in K alone: it decides the softmax, and coarsens all other channels."""
    q, k, v = _gaussian(draw)
    k[..., 3] *= 100
    return q, k, v


def _constant(draw):
    """All equal: every probability is 1/n. 0.5 keeps P off the boundary between two codes, where the last bit of a
    logit would decide for all rows at once.
    """
    return tuple(torch.full(draw.shape, 0.5, device=draw.device) for _ in range(3))


def _one_hot_token(draw):
    q, k, v = (torch.zeros(draw.shape, device=draw.device) for _ in range(3))
    token = draw.shape[1] // 2
    q[:, token] = k[:, token] = 0.5
    v[:, token] = draw.normal(draw.shape[0], *draw.shape[2:])
    return q, k, v


def _zero_tile(draw):
    """One tile holds zeros: its amax is 0, and its scale must not become 0 or infinite."""
    q, k, v = _gaussian(draw)
    coordinates = tile_coordinates(draw.grid, draw.tile, draw.device)
    inside = (coordinates == coordinates[draw.shape[1] // 2]).all(1)
    for x in (q, k, v):
        x[:, inside] = 0
    return q, k, v


def _negative_rows(draw, length=12.0):
    """Every other query points away from all keys: all its logits are far below zero."""
    q, k, v = _gaussian(draw)
    away = draw.direction()
    q[:, ::2] -= length * away
    return q, k + 6 * away, v


def _very_negative_rows(draw):
    """Logits near -80: a running maximum that starts at zero would round every probability to zero."""
    return _negative_rows(draw, 120.0)


def _large(draw):
    """Near the largest number of the type; the logits are moderate."""
    q, k, v = _gaussian(draw)
    if draw.dtype == torch.float16:
        return tuple((x * s).clamp(-FP16_MAX, FP16_MAX) for x, s in ((q, 1e4), (k, 1e-4), (v, 1e4)))
    return q * 1e28, k * 1e-28, v * 5e37


def _tiny(draw):
    q, k, v = _gaussian(draw)
    if draw.dtype == torch.float16:
        return q * 1e-3, k * 1e-3, v * 1e-2
    return q * 1e-20, k * 1e-20, v * 1e-20


def _vanishing(draw):
    """So small that 448 / amax overflows fp32 (bfloat16) or that most values are subnormal (float16): the
    contract rounds a group of at most 2^-100 to zeros. V stays ordinary, so there is an output to compare.
    """
    q, k, v = _gaussian(draw)
    small = 1e-6 if draw.dtype == torch.float16 else 1e-36
    return q * small, k * small, v


def _all_zeros(draw):
    return tuple(torch.zeros(draw.shape, device=draw.device) for _ in range(3))


def _key_mean(draw):
    """Each channel of K has a large mean, which smooth_k takes out."""
    q, k, v = _gaussian(draw)
    return q, k + draw.normal(draw.shape[-1]), v


def _value_mean(draw):
    """V has a mean: the output does not shrink with the number of keys, errors average out."""
    q, k, v = _gaussian(draw)
    return q, k, v + 3


@dataclass(frozen=True)
class Kind:
    """A kind of input.

    make: its generator.
    wide_logits: whether its logits are so wide (beyond some ten in the log2 domain) that rounding them to fp16
        moves many probabilities to another code (see compare.py).
    dout: by dtype, the size of the output's gradient for which those of q, k, v are within what the dtype holds.
    """

    make: Callable
    wide_logits: bool = False
    dout: dict[torch.dtype, float] = field(default_factory=lambda: {torch.bfloat16: 1.0, torch.float16: 1.0})


KINDS = {
    "gaussian": Kind(_gaussian),
    "peaked": Kind(_peaked, wide_logits=True),
    "heavy_tailed": Kind(_heavy_tailed, wide_logits=True),
    "channel_outliers": Kind(_channel_outliers),
    "key_outliers": Kind(_key_outliers, wide_logits=True),
    "constant": Kind(_constant),
    "one_hot_token": Kind(_one_hot_token),
    "zero_tile": Kind(_zero_tile),
    "negative_rows": Kind(_negative_rows),
    "very_negative_rows": Kind(_very_negative_rows, wide_logits=True),
    "large": Kind(_large, dout={torch.bfloat16: 1e-35, torch.float16: 1e-4}),
    "tiny": Kind(_tiny),
    "vanishing": Kind(_vanishing),
    "all_zeros": Kind(_all_zeros),
    "key_mean": Kind(_key_mean),
    "value_mean": Kind(_value_mean),
}


def make_qkv(
    kind,
    *,
    grid,
    tile,
    batch=1,
    heads=2,
    head_dim=64,
    dtype=torch.bfloat16,
    tensor_layout="NHD",
    seed=0,
    device="cuda",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k, v of one of `KINDS`, contiguous, [B, L, H, D] ("NHD") or [B, H, L, D] ("HND")."""
    shape = (batch, grid[0] * grid[1] * grid[2], heads, head_dim)
    qkv = KINDS[kind].make(Draw(shape, grid, tile, dtype, device, seed))
    assert all(x.isfinite().all() for x in qkv)
    qkv = (x.to(dtype) for x in qkv)
    if tensor_layout == "HND":
        qkv = (x.transpose(1, 2).contiguous() for x in qkv)
    return tuple(qkv)


def to_nhd(x: torch.Tensor, tensor_layout: str) -> torch.Tensor:
    """A view of x as [B, L, H, D]."""
    return x if tensor_layout == "NHD" else x.transpose(1, 2)
