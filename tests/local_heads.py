"""Heads that attend their own tile only along some axes, so that the window that each needs is known."""

from __future__ import annotations

import torch

GRID, TILE = (4, 4, 6), (2, 2, 2)  # 2 x 2 x 3 tiles
WHOLE = (2, 2, 3)  # tiles
TOKENS, HEAD_DIM = 96, 64


def local_head(seed: int, reach: tuple[int, int, int]):
    """q, k, v [1, L, 1, D] of a head that, on each axis with reach 0, attends within its own tile.

    On those axes Q and K hold the tile's coordinate, one-hot and large.
    """
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(TOKENS, HEAD_DIM, generator=generator) for _ in range(3))
    position = torch.cartesian_prod(*(torch.arange(n) for n in GRID))
    for axis in range(3):
        if not reach[axis]:
            where = 8 * torch.nn.functional.one_hot(position[:, axis] // TILE[axis], 3).float()
            columns = slice(3 * axis, 3 * axis + 3)
            q[:, columns], k[:, columns] = where, where
    return tuple(x.view(1, TOKENS, 1, HEAD_DIM).bfloat16() for x in (q, k, v))


# The axes on which a head leaves its tile, and the sparsest window that holds all it attends.
REACHES = {(0, 0, 0): (1, 1, 1), (1, 0, 0): (2, 1, 1), (0, 0, 1): (1, 1, 3), (1, 1, 1): WHOLE}


def heads_of(reaches, seed=0):
    heads = [local_head(seed + i, reach) for i, reach in enumerate(reaches)]
    return tuple(torch.cat(parts, dim=2) for parts in zip(*heads, strict=True))
