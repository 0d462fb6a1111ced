"""Key tiles chosen by content: `select_tiles` makes the lists that a config's `select` asks for.

Every tile of the grid is pooled to its mean Q and its mean K. The score of two tiles is the product of these means, as
in a tile-sized attention; the best ones of each query tile are taken. All of it has fixed shapes and waits for no GPU.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from . import ops
from .checks import Triple, as_autocast, as_scale, check_inputs, heads_first, to_heads_first
from .config import AttentionConfig, ResolvedConfig, as_config
from .geometry import tiles_per_axis
from .kept import Cache
from .key_tiles import KeyTiles
from .planning import ranked
from .selectors import TopTiles

ONE = 2**29  # a share of 1 in `TopMass`: integers, whose sums are exact in any order
ALWAYS = 2 * ONE  # above every share

_kept = Cache(2**28)


def select_tiles(
    q: Tensor,
    k: Tensor,
    *,
    grid: Sequence[int],
    config: AttentionConfig,
    scale: float | None = None,
    tensor_layout: str | None = None,
    prefix_len: int = 0,
    suffix_len: int = 0,
) -> KeyTiles:
    """The key tiles that `attention` would choose for these q and k under `config.select`.

    For a choice that outlives a call: pass it as `key_tiles`, with a config without select, which saves the time of
    choosing and lets operands of `quantize_qkv` attend chosen tiles. Q and K change from one denoising step to the
    next, and a choice ages: make it anew every few steps, and at each change of a schedule's stage, since lists fit one
    tile only. Each layer and each half of a batch for guidance has its own.

    The choice has no gradient: that of attention over chosen tiles is the gradient with the lists held fixed.

    Args:
        q, k, grid, scale, tensor_layout, prefix_len, suffix_len: as in `attention`. Text is not chosen: all queries see
            it.
        config: with select. Whether K is smoothed makes no difference: it shifts all scores of a row alike.

    Returns lists of `capacity` entries for every sample, head and tile, ascending. Of the same input it returns the
    same lists every time.
    Raises TypeError or ValueError as `attention` does, and ValueError for a config without select.
    """
    config = as_config(config)
    if config.select is None:
        raise ValueError(
            "config: select=None chooses nothing; give TopTiles or TopMass, or leave select_tiles out"
        )
    if grid is None:
        raise ValueError("grid: None; tiles are those of a grid, so give the tokens (T, H, W)")
    q, k = as_autocast(q, k)
    layout = "NHD" if tensor_layout is None else tensor_layout
    grid, *lengths = check_inputs(q, k, k, grid, layout, prefix_len, suffix_len, None, None)
    about = grid, lengths[0], lengths[1], config, as_scale(scale, q.shape[3]), layout
    return chosen(q, k, *about)


def chosen(
    q: Tensor,
    k: Tensor,
    grid: Triple,
    prefix_len: int,
    suffix_len: int,
    config: AttentionConfig,
    scale: float,
    tensor_layout: str,
) -> KeyTiles:
    """`select_tiles` of checked arguments."""
    q, k = q.detach(), k.detach()
    if not torch.compiler.is_compiling():  # in a graph, the op finds out
        config.resolve(grid, heads_first(q.shape, tensor_layout)[1], prefix_len, suffix_len)
    rest = list(grid), prefix_len, suffix_len, config.spec, scale, tensor_layout
    select = _select if ops.is_watched(q, k) else _select_now
    return KeyTiles(*select(q, k, *rest))


def _select_now(
    q: Tensor, k: Tensor, grid: Sequence[int], prefix_len: int, suffix_len: int, config: str, scale: float,
    tensor_layout: str
) -> tuple[Tensor, Tensor]:  # fmt: skip
    t, h, w = grid
    heads = heads_first(q.shape, tensor_layout)[1]
    resolved = AttentionConfig.from_spec(config).resolve((t, h, w), heads, prefix_len, suffix_len)
    q_mean, k_mean = (pooled(x, resolved, tensor_layout) for x in (q, k))
    lists = choose(score(q_mean, k_mean, scale), resolved)
    return lists.indices, lists.counts


@torch.library.custom_op("fpsattention::select_tiles", mutates_args=())
def _select(
    q: Tensor, k: Tensor, grid: Sequence[int], prefix_len: int, suffix_len: int, config: str, scale: float,
    tensor_layout: str
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(indices, counts) of `KeyTiles`. Sizes may be symbols under torch.compile; `config` is `AttentionConfig.spec`."""
    return _select_now(q, k, grid, prefix_len, suffix_len, config, scale, tensor_layout)


@_select.register_fake
def _(q, k, grid, prefix_len, suffix_len, config, scale, tensor_layout):
    batch, heads, _, _ = heads_first(q.shape, tensor_layout)
    described = AttentionConfig.from_spec(config)
    # A tile is planned for one grid, so that a graph without one is of that grid alone.
    tile = described.tile or ranked(tuple(int(x) for x in grid))[0].tile
    tiles = tiles_per_axis(grid, tile)
    lists = batch, heads, math.prod(tiles)
    assert described.select is not None
    indices = q.new_empty(*lists, described.select.capacity(tiles), dtype=torch.int32)
    return indices, q.new_empty(lists, dtype=torch.int32)


def pooled(x: Tensor, resolved: ResolvedConfig, tensor_layout: str) -> Tensor:
    """The mean of each tile's tokens, text left out: fp32 [B, H, n, D] of Q or K in the layout.

    It reads x once and copies nothing: whole tiles and those at each edge are views of x.
    """
    geometry, grid = resolved.geometry, resolved.grid
    x = to_heads_first(x, tensor_layout)
    batch, heads, _, channels = x.shape
    video = x.narrow(2, resolved.prefix_len, math.prod(grid)).unflatten(2, grid)
    out = x.new_empty(batch, heads, *geometry.tiles, channels, dtype=torch.float32)
    for t, h, w in itertools.product(*map(_alike, grid, geometry.tile)):
        tiles = video
        for dim, (tokens, size, _) in (
            (4, w),
            (3, h),
            (2, t),
        ):  # the last first: it moves no dimension before it
            tiles = tiles.narrow(dim, tokens.start, len(tokens)).unflatten(dim, (-1, size))
        out[:, :, t[2], h[2], w[2]] = tiles.mean((3, 5, 7), dtype=torch.float32)
    return out.flatten(2, 4)


def _alike(tokens: int, size: int) -> list[tuple[range, int, slice]]:
    """The whole tiles of an axis, then the one at its end with fewer tokens: (tokens, tokens of a tile, tiles)."""
    whole = tokens // size
    parts = [
        (range(whole * size), size, slice(0, whole)),
        (range(whole * size, tokens), tokens % size, slice(whole, whole + 1)),
    ]
    return [part for part in parts if len(part[0])]


def score(q_mean: Tensor, k_mean: Tensor, scale: float) -> Tensor:
    """fp32 [B, H, n, n] of query tiles (rows) and key tiles, from their means [B, H, n, D]."""
    with torch.autocast(q_mean.device.type, enabled=False):  # it would round the product
        return (q_mean * scale) @ k_mean.mT


def choose(scores: Tensor, resolved: ResolvedConfig) -> KeyTiles:
    """The lists that `resolved.select` takes by scores fp32 [B, H, n, n], ascending, with `resolved.capacity` entries.

    Entries beyond a list's count are n.
    """
    always, tokens = _kept.get(_tables, resolved, scores.device)
    select = resolved.select
    if isinstance(select, TopTiles):
        if select.always is not None:
            scores = scores.masked_fill(always, math.inf)
        indices = scores.topk(resolved.capacity, sorted=False).indices.int().sort(-1).values
        counts = indices.new_full(indices.shape[:3], resolved.capacity)
        return KeyTiles(indices, counts)
    assert select is not None
    shares = (scores + tokens.log()).softmax(-1).nan_to_num_(nan=0.0)
    shares = (shares * ONE).round_().int()
    target = (shares.sum(-1, keepdim=True).double() * select.mass).ceil_()
    shares += always.int() * ALWAYS
    shares, tiles = shares.topk(resolved.capacity, sorted=True)
    is_always, shares = shares >= ALWAYS, shares % ALWAYS
    before = shares.cumsum(-1) - shares
    # Before the first tile the mass is 0, so that a row has at least one, unless its scores are NaN.
    counts = ((before < target) | is_always).sum(-1, dtype=torch.int32).clamp_(min=min(1, resolved.capacity))
    number = torch.arange(resolved.capacity, device=tiles.device)
    indices = tiles.int().masked_fill_(number >= counts[..., None], scores.shape[-1]).sort(-1).values
    return KeyTiles(indices, counts)


def _tables(
    resolved: ResolvedConfig, device: torch.device
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, ...]]:
    """(value, tensors) for the cache; both are (bool [n, n], the tiles that are always taken; fp32 [n], tokens of each
    tile).
    """
    geometry, select = resolved.geometry, resolved.select
    n = geometry.n_video_tiles
    always = torch.zeros(n, n, dtype=torch.bool, device="cpu")
    if select is not None and select.always is not None:
        always = geometry.tile_mask(select.always, resolved.border)[:n, :n]
    tables = always.to(device), geometry.valid[:n].float().to(device)
    return tables, tables
