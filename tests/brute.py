"""The geometry and the softmax by their definitions: slow, and independent of the package, to compare with."""

import itertools

import torch


def legal_windows(n):
    """Every legal window on an axis of n tiles; the last two reach past the axis."""
    return [*range(1, n, 2), n, n + 1, n + 4]


def axis_keys(i, n, w, border):
    """Key tiles of query tile i: |j - centre| <= w // 2, with the centre shifted inward by "clamp"."""
    if w >= n:
        return list(range(n))
    r = w // 2
    centre = max(r, min(i, n - 1 - r)) if border == "clamp" else i
    return [j for j in range(n) if abs(j - centre) <= r]


def tile_tokens(grid, tile):
    """The raster indices of every tile's tokens; tiles and tokens in raster order."""
    tiles = {c: [] for c in itertools.product(*(range(-(-g // t)) for g, t in zip(grid, tile, strict=True)))}
    for index, token in enumerate(itertools.product(*map(range, grid))):
        tiles[tuple(x // t for x, t in zip(token, tile, strict=True))].append(index)
    return list(tiles.values())


def key_blocks(grid, tile):
    """The raster indices of every key block's tokens, tile after tile: 128 of a tile's tokens each. A slot has as many
    blocks as a whole tile needs, so those of a ragged tile may be empty.
    """
    per_slot = -(-(tile[0] * tile[1] * tile[2]) // 128)
    return [tokens[128 * i : 128 * (i + 1)] for tokens in tile_tokens(grid, tile) for i in range(per_slot)]


def tile_mask(grid, tile, window, border):
    """bool [tiles, tiles]: which tiles (rows) attend which (columns)."""
    axes = []
    for g, t, w in zip(grid, tile, window, strict=True):
        n = -(-g // t)
        axis = torch.zeros(n, n, dtype=torch.bool)
        for i in range(n):
            axis[i, axis_keys(i, n, w, border)] = True
        axes.append(axis)
    t, h, w = axes
    mask = t[:, None, None, :, None, None] & h[None, :, None, None, :, None] & w[None, None, :, None, None, :]
    n = t.shape[0] * h.shape[0] * w.shape[0]
    return mask.reshape(n, n)


def token_mask(grid, tile, window, border):
    """bool [L, L] in raster order: which tokens (rows) attend which (columns)."""
    tokens = tile_tokens(grid, tile)
    tile_of_token = torch.empty(sum(map(len, tokens)), dtype=torch.int64)
    for i, members in enumerate(tokens):
        tile_of_token[members] = i
    mask = tile_mask(grid, tile, window, border)
    return mask[tile_of_token[:, None], tile_of_token[None, :]]


def masked_softmax(q, k, v, masks, scale):
    """(out, lse) in fp64 of heads-first q, k, v [B, H, L, D] under masks [H or 1, L, L]."""
    scores = (q.double() @ k.double().mT) * scale
    scores = scores.masked_fill(~masks, -torch.inf)
    return scores.softmax(-1) @ v.double(), scores.logsumexp(-1)
