"""Part of bench_forward.py: a training step of one Wan2.1 transformer block, with cuDNN's or our self-attention.

The block is Wan's without the cross-attention to text: modulated norms, Q, K, V, RMS norms and rotation of Q and K,
self-attention, output, MLP. A step is forward and backward in BF16, with gradients of input and weights.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import OURS, STEP, GpuMonitor, Record, compare_with, time_records
from contenders import Contender, as_nhd, cudnn, ours
from fpsattention.cli import video
from fpsattention.cli.timing import first_line
from shapes import Shape


class Block(nn.Module):
    """Takes and returns x [B, L, heads * head_dim]; `attend` takes q, k, v [B, L, H, D] and returns that shape."""

    def __init__(self, shape: Shape):
        super().__init__()
        dim = shape.heads * shape.head_dim
        self.heads = shape.heads
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.norm_q, self.norm_k = nn.RMSNorm(dim, eps=1e-6), nn.RMSNorm(dim, eps=1e-6)
        self.up, self.down = nn.Linear(dim, shape.mlp), nn.Linear(shape.mlp, dim)
        # Not zero, as gates are before training: no gradient would reach the attention, and zeros take less power.
        self.modulation = nn.Parameter(torch.randn(6, dim))

    def forward(self, x: Tensor, angles: Tensor, attend) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation
        q, k, v = self.qkv(F.layer_norm(x, x.shape[-1:]) * (1 + scale1) + shift1).chunk(3, -1)
        q, k, v = (y.unflatten(-1, (self.heads, -1)) for y in (self.norm_q(q), self.norm_k(k), v))
        q, k = (video.apply_rope(y.float(), angles).to(v.dtype) for y in (q, k))
        x = x + gate1 * self.out(attend(q, k, v).flatten(2))
        hidden = self.up(F.layer_norm(x, x.shape[-1:]) * (1 + scale2) + shift2)
        return x + gate2 * self.down(F.gelu(hidden, approximate="tanh"))


@torch.enable_grad()
def bench_block(shape: Shape, work_of, clock, monitor: GpuMonitor, rounds, burst_ms, seed) -> list[Record]:
    """Time and peak memory of a step: dense with cuDNN, and under the shape's windows with FPSAttention."""
    generator = torch.Generator(clock.device).manual_seed(seed)
    options = {"device": clock.device, "dtype": torch.bfloat16}
    block = Block(shape).to(**options)
    size = (shape.batch, shape.tokens, shape.heads * shape.head_dim)
    x = torch.randn(size, generator=generator, **options).requires_grad_()
    dout = torch.randn(size, generator=generator, **options)
    angles = video.rope_angles(shape.grid, shape.head_dim).to(clock.device)
    leaves = [x, *block.parameters()]

    def step(contender: Contender):
        def attend(q, k, v):
            return as_nhd(contender.finish(contender.prepare(q, k, v)()), "HND")

        return lambda: torch.autograd.grad(block(x, angles, attend), leaves, dout)

    entries, measured = {}, []
    for c in [cudnn(shape), *(ours(shape, window) for window in shape.windows)]:
        work = work_of(shape, c.window)
        window = None if c.window is None else work.resolved.windows[0]
        record = Record(
            *(f"{shape.case(c.window)} {STEP}", c.name, shape.grid, shape.heads, shape.head_dim, shape.batch),
            *("NHD", shape.tile if c.name == OURS else None, window, work.density),
        )
        measured.append(record)
        try:
            record.peak_gib = clock.peak_gib(step(c))
            entries[f"{record.case} {c.name}"] = step(c)
        except Exception as error:  # a contender that fails is a line in the results
            record.fail(first_line(error))
            clock.check(c.name)
    time_records(measured, entries, clock, monitor, rounds, burst_ms, seed)
    compare_with(measured[0], measured)  # the first is cuDNN's
    return measured
