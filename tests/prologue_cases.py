"""Random inputs of `fps.norm_rope_quantize`, and its definition written a second time, token by token."""

from __future__ import annotations

import math

import torch

PAIRS = {64: (12, 10, 10), 128: (22, 21, 21)}  # of the axes, by head_dim; the latter are Wan's


def inputs(
    grid, heads, head_dim, *, norm="all heads", rope=True, batch=1, seed=0, device="cpu", dtype=torch.float32
):
    """(q, k, v [B, L, H, D], the prologue's keyword arguments)."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, device=device)

    q, k, v = (normal(batch, math.prod(grid), heads, head_dim) for _ in range(3))
    q, k = 3 * q + normal(head_dim), k / 5 + normal(heads, 1)
    given = {"eps": 1e-2}
    if norm:
        channels = heads * head_dim if norm == "all heads" else head_dim
        given |= {"q_weight": 1 + normal(channels) / 4, "k_weight": 1 + normal(channels) / 4}
    if rope:
        angles = (3 * normal(n, pairs) for n, pairs in zip(grid, PAIRS[head_dim], strict=True))
        given["rope"] = [torch.stack((x.cos(), x.sin()), dim=-1) for x in angles]
    return tuple(x.to(dtype) for x in (q, k, v)), given


def expected(x, weight, grid, eps, rope=None):
    """Norm and rotation of x [B, L, H, D] in fp64, with complex numbers for pairs."""
    x = x.double().clone()
    if weight is not None:
        for row in x.flatten(0, 1):  # [H, D], a view
            groups = row if weight.numel() == x.shape[3] else row.view(1, -1)
            for group in groups:
                group.mul_(weight.double() / (group.square().mean() + eps).sqrt())
    if rope is None:
        return x
    tokens = [(t, h, w) for t in range(grid[0]) for h in range(grid[1]) for w in range(grid[2])]
    for i, place in enumerate(tokens):
        turn = torch.cat(
            [torch.view_as_complex(table[n].double()) for table, n in zip(rope, place, strict=True)]
        )
        pairs = torch.view_as_complex(x[:, i].unflatten(-1, (-1, 2)).contiguous())
        x[:, i] = torch.view_as_real(pairs * turn).flatten(-2)
    return x
