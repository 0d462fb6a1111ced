"""Attention over tokens that several processes hold, on `torch.distributed`: gloo on CPUs, NCCL on GPUs.

`ulysses_attention` exchanges tokens for heads, attends, and exchanges back (arXiv 2309.14509). Neither rounding nor
softmax mixes heads, so it computes what one process would, for any window. `ring_attention` keeps the queries in place
and sends keys and values round (arXiv 2310.01889). `usp_attention` is the one around the other, on a mesh of processes
(arXiv 2405.07719). All use one collective: an all-to-all, whose gradient is the reverse all-to-all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from .core.api import attention
from .core.checks import (
    Triple,
    as_autocast,
    as_grid,
    as_int,
    check_tensor,
    grouped,
    kind_of,
    refuse_transforms,
    shown,
    to_heads_first,
)
from .core.config import AXES, AttentionConfig, ResolvedConfig, as_config
from .core.key_tiles import KeyTiles, check_key_tiles


def ulysses_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    grid: Sequence[int],
    config: AttentionConfig | None = None,
    group: dist.ProcessGroup | None = None,
    return_lse: bool = False,
    tensor_layout: str = "NHD",
    prefix_len: int = 0,
    suffix_len: int = 0,
    key_tiles: KeyTiles | None = None,
    **options,
) -> Tensor | tuple[Tensor, Tensor]:
    """`attention` over the tokens of all P processes of a group, some heads in each (Ulysses, arXiv 2309.14509).

    Every process passes consecutive tokens with all heads, and gets their output. In between it holds all tokens of
    H / P heads, and runs `attention` on them with the windows or lists of those heads. Where P does not divide H, the
    first H % P processes have one head more: no head is padded, sent or computed in vain. Differentiable as `attention`
    is: when every process runs the backward, the gradients are those of the sum of the processes' losses.

    All processes of the group must call it, with arguments that differ in the tokens only. Q, K, V and the output cross
    the network once, and their gradients once more.

    Args:
        q, k, v: [B, l, H, D] ("NHD") or [B, H, l, D] ("HND"), this process's share of the L = prefix_len + T * H * W +
            suffix_len tokens, in the order of ranks: `x.tensor_split(P, dim)[rank]` of all of them, so the first L % P
            processes hold one token more. H is at least P.
        group: None: the default group.
        grid, config, return_lse, tensor_layout, prefix_len, suffix_len, key_tiles: as in `attention`, for all tokens
            and heads.
        options: scale, prefix_valid, suffix_valid, backend and deterministic, as in `attention`.

    Returns out, like q; with return_lse, (out, lse), lse fp32 [B, H, l].
    Raises TypeError or ValueError as `attention` does, and when q, k, v are not this process's share or there are fewer
    heads than processes; ValueError when torch.distributed is not initialised, or this process is not in the group.
    When one process raises, the others wait for it: end them all, as torchrun does.
    """
    rank, ranks = _place(group)
    q, k, v = as_autocast(q, k, v)
    lengths = (("prefix_len", prefix_len), ("suffix_len", suffix_len))
    tokens = math.prod(as_grid(grid)) + sum(as_int(name, n, 0) for name, n in lengths)
    shares = _shares(tokens, ranks)
    heads = _checked_heads(
        q, k, v, tensor_layout, shares[rank], lambda: f"{shown(tokens)} tokens, process {rank} of {ranks}"
    )
    options |= {"grid": grid, "config": own_windows(config, heads, rank, ranks), "return_lse": return_lse}
    options |= {"prefix_len": prefix_len, "suffix_len": suffix_len}
    if key_tiles is not None:
        check_key_tiles(key_tiles, as_config(config), as_grid(grid), q.shape[0], heads, q.device)
        options |= {"key_tiles": key_tiles.of_heads(*_own_heads(heads, rank, ranks))}
    trade = _Trade(shares, _shares(heads, ranks), rank, group)
    return trade.around(partial(attention, **options), (q, k, v), tensor_layout)


def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    grid: Sequence[int],
    config: AttentionConfig | None = None,
    group: dist.ProcessGroup | None = None,
    axis: str = "t",
    return_lse: bool = False,
    tensor_layout: str = "NHD",
    **options,
) -> Tensor | tuple[Tensor, Tensor]:
    """`attention` over the tokens of all P processes of a group, for any number of heads (ring, arXiv 2310.01889).

    Every process holds a slab of the grid: a P-th of one axis, a whole number of tiles. Its queries attend one slab
    after another, while the keys and values of the next are on their way; `merge_states` joins the results. So a window
    must cover that whole axis; on the other two any is legal. Differentiable as `attention` is; each process then keeps
    what P calls keep.

    In exact arithmetic it gives what one process gives. Values that rounding takes from all tokens come from each slab
    instead: K's mean under smooth_k, and the scales of a quant_tile longer than the slab.

    All processes of the group must call it, with arguments that differ in the tokens only.

    Args:
        q, k, v: [B, l, H, D] ("NHD") or [B, H, l, D] ("HND"), the l = T * H * W / P tokens of this process's slab in
            raster order; slabs are in the order of ranks.
        group: None: the default group.
        axis: "t", "h" or "w": what the slabs cut. Slabs of frames ("t") are consecutive tokens.
        grid, config, return_lse, tensor_layout: as in `attention`, for all tokens. There are no text tokens.
        options: scale, backend and deterministic, as in `attention`.

    Returns out, like q; with return_lse, (out, lse), lse fp32 [B, H, l].
    Raises as `ulysses_attention` does, but for any number of heads; and ValueError for key_tiles and config.select,
    when a slab is not a whole number of tiles, and when a window is narrower than the axis.
    """
    _refuse_key_tiles(options)
    rank, ranks = _place(group)
    q, k, v = as_autocast(q, k, v)
    grid = as_grid(grid)
    heads = _checked_heads(
        q, k, v, tensor_layout, math.prod(grid) // ranks, lambda: f"grid {grid}, process {rank} of {ranks}"
    )
    slab, config = _slab(grid, as_config(config), heads, ranks, axis)
    options |= {"grid": slab, "config": config, "tensor_layout": tensor_layout, "return_lse": True}

    merged: tuple[Tensor, Tensor] | None = None
    for hop in range(ranks):
        # The transfer overlaps with attention: only the first read of a collective's result waits for it.
        following = [_from_previous(x, rank, ranks, group) for x in (k, v)] if hop < ranks - 1 else None
        out, lse = attention(q, k, v, **options)
        if merged is not None:
            out, lse = merge_states((merged[0], out), (merged[1], lse), tensor_layout)
        merged = out, lse
        k, v = following or (k, v)
    return (out.to(q.dtype), lse) if return_lse else out.to(q.dtype)


def usp_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mesh: DeviceMesh,
    grid: Sequence[int],
    config: AttentionConfig | None = None,
    axis: str = "t",
    return_lse: bool = False,
    tensor_layout: str = "NHD",
    **options,
) -> Tensor | tuple[Tensor, Tensor]:
    """`attention` over the tokens of all R * U processes of a mesh: a ring of R, each slab shared by U (arXiv
    2405.07719).

    The U processes of a slab exchange tokens for heads as in `ulysses_attention`; the R processes that then have the
    same heads are a ring as in `ring_attention`. So more processes than heads can share the work, and a number that
    does not divide the heads can share it evenly.

    All processes of the mesh must call it, with arguments that differ in the tokens only.

    Args:
        q, k, v: [B, l, H, D] ("NHD") or [B, H, l, D] ("HND"), this process's share of its slab:
            `slab.tensor_split(U, dim)[i]`, where i is its place on the dimension "ulysses" and slab the tokens of the
            slab that its place on "ring" gives, in raster order. H is at least U.
        mesh: has dimensions named "ring" and "ulysses", and any others, along which processes do not meet.
        axis, grid, config, return_lse, tensor_layout, options: as in `ring_attention`.

    Returns out, like q; with return_lse, (out, lse), lse fp32 [B, H, l].
    Raises as `ulysses_attention` and `ring_attention` do; TypeError or ValueError for a mesh without these dimensions.
    """
    _refuse_key_tiles(options)
    ring, ulysses = _groups(mesh)
    (slab, slabs), (rank, ranks) = _place(ring), _place(ulysses)
    q, k, v = as_autocast(q, k, v)
    grid = as_grid(grid)
    shares = _shares(math.prod(grid) // slabs, ranks)
    place = f"process {rank} of {ranks} of slab {slab} of {slabs}"
    heads = _checked_heads(q, k, v, tensor_layout, shares[rank], lambda: f"grid {grid}, {place}")
    own = own_windows(config, heads, rank, ranks)
    # With the windows of all heads, so that all processes raise if one does, before any waits for another.
    _slab(grid, as_config(config), heads, slabs, axis)
    options |= {"grid": grid, "config": own, "group": ring, "axis": axis, "return_lse": return_lse}
    trade = _Trade(shares, _shares(heads, ranks), rank, ulysses)
    return trade.around(partial(ring_attention, **options), (q, k, v), tensor_layout)


def merge_states(
    outs: Sequence[Tensor], lses: Sequence[Tensor], tensor_layout: str = "NHD"
) -> tuple[Tensor, Tensor]:
    """Attention over all keys, from attention of the same queries over parts of the keys (arXiv 2205.14135, section
    3.1).

    lse = ln(sum_i exp(lse_i)), out = sum_i exp(lse_i - lse) out_i. Differentiable.

    Args:
        outs: each [B, L, H, D] ("NHD") or [B, H, L, D] ("HND"), of a dtype that `attention` takes.
        lses: each [B, H, L], natural logarithm; -inf where a query saw none of the part's keys.

    Returns out, fp32 (fp64 if an out is), and lse, fp32; 0 and -inf where a query saw no key at all.
    Raises TypeError for anything but floating-point tensors; ValueError when there is no part, not one lse for each
    out, or shapes or devices differ.
    """
    if not outs or len(outs) != len(lses):
        raise ValueError(
            f"lses: {len(lses)} for {len(outs)} outs; there must be one for each, and at least one"
        )
    for i, out in enumerate(outs):
        check_tensor(f"outs[{i}]", out, tensor_layout)
    heads_first = [to_heads_first(out, tensor_layout) for out in outs]
    first = heads_first[0]
    for i, (out, lse) in enumerate(zip(heads_first, lses, strict=True)):
        if not isinstance(lse, Tensor) or not lse.is_floating_point():
            raise TypeError(f"lses[{i}]: must be a floating-point tensor, got {kind_of(lse)}")
        for name, x, shape in (("outs", out, first.shape), ("lses", lse, first.shape[:3])):
            if x.shape != shape or x.device != first.device:
                raise ValueError(
                    f"{name}[{i}]: shape {shown(list(x.shape))}, heads first, on {x.device}, must be {list(shape)} on "
                    f"{first.device}, as of outs[0]"
                )
    stacked = torch.stack(tuple(lses))
    shift = stacked.detach().amax(0)
    shift = shift.masked_fill(shift == -math.inf, 0.0)
    weights = (stacked - shift).exp()
    total = weights.sum(0)
    unseen = total == 0
    total = total.masked_fill(unseen, 1.0)
    out = sum(x * w[..., None] for x, w in zip(heads_first, weights / total, strict=True))
    return to_heads_first(out, tensor_layout), (shift + total.log()).masked_fill(unseen, -math.inf)


def _place(group: dist.ProcessGroup | None) -> tuple[int, int]:
    """(rank, size) of this process in the group."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    if rank < 0:
        raise ValueError(f"group: process {dist.get_rank()} is not in it; only those that are can call this")
    return rank, ranks


def _groups(mesh: DeviceMesh) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    """The groups of this process on the dimensions "ring" and "ulysses"."""
    if not isinstance(mesh, DeviceMesh):
        raise TypeError(f"mesh: {shown(mesh)} must be a torch.distributed DeviceMesh")
    if not {"ring", "ulysses"} <= set(mesh.mesh_dim_names or ()):
        raise ValueError(
            f'mesh: has dimensions {shown(mesh.mesh_dim_names)}, must have "ring" and "ulysses"; for example '
            f'init_device_mesh("cuda", (2, 4), mesh_dim_names=("ring", "ulysses"))'
        )
    return mesh.get_group("ring"), mesh.get_group("ulysses")


def _shares(n: int, ranks: int) -> list[int]:
    """n shared out among processes as by `tensor_split`: the first n % ranks have one more."""
    return [n // ranks + (i < n % ranks) for i in range(ranks)]


def _own_heads(heads: int, rank: int, ranks: int) -> tuple[int, int]:
    """(first, number) of the heads of a process, the rank-th share of them all."""
    shares = _shares(heads, ranks)
    return sum(shares[:rank]), shares[rank]


def _refuse_key_tiles(options: dict) -> None:
    """Raises ValueError for lists of key tiles among the options of a ring."""
    if (key_tiles := options.get("key_tiles")) is not None:
        raise ValueError(
            f"key_tiles: {shown(key_tiles)} must be None: a ring attends slab after slab, and lists name tiles of the "
            f"whole grid; use ulysses_attention, which takes them"
        )


def _as_nhd(x: Tensor, tensor_layout: str) -> Tensor:
    """A view of x as [B, L, H, D], or from that in the layout."""
    return to_heads_first(x, tensor_layout).transpose(1, 2)


def _checked_heads(
    q: Tensor, k: Tensor, v: Tensor, tensor_layout: str, tokens: int, where: Callable[[], str]
) -> int:
    """The number of heads of q, k, v. Raises when they are not of one shape with this number of tokens.

    Args:
        where: returns what the number of tokens follows from, for the error. A function: torch.compile (2.11) cannot
            trace `shown`.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        refuse_transforms(name, x)
        if not isinstance(x, Tensor) or x.dim() != 4:
            what = f"shape {shown(list(x.shape))}" if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"{name}: must be a tensor with 4 dimensions, got {what}")
        check_tensor(name, x, tensor_layout)
        held = _as_nhd(x, tensor_layout).shape[1]
        if held != tokens:
            raise ValueError(
                f"{name}: has {held} tokens in layout {tensor_layout}, must have {shown(tokens)} ({where()})"
            )
        if x.shape != q.shape:
            advice = grouped(name, x, q, tensor_layout)
            raise ValueError(f"{name}: shape {list(x.shape)} must be that of q, {list(q.shape)}{advice}")
    return _as_nhd(q, tensor_layout).shape[2]


def own_windows(config: AttentionConfig | None, heads: int, rank: int, ranks: int) -> AttentionConfig:
    """The config for the heads of this process, the rank-th share of them all."""
    if heads < ranks:
        raise ValueError(
            f"q: {heads} heads for {ranks} processes, of which some would have none; nearest legal number of "
            f"processes: {heads} (usp_attention shares out heads and slabs)"
        )
    config = as_config(config)
    if config.window is None or isinstance(config.window[0], int) or len(config.window) == 1:
        return config
    if len(config.window) != heads:
        raise ValueError(
            f"window: {len(config.window)} windows, one per head, for {heads} heads; give one triple, or {heads}"
        )
    first, own = _own_heads(heads, rank, ranks)
    return replace(config, window=config.window[first : first + own])


def _slab(
    grid: Triple, config: AttentionConfig, heads: int, ranks: int, axis: str
) -> tuple[Triple, AttentionConfig]:
    """The grid of one process's slab, and the config with the tile that it has on the whole grid."""
    if not isinstance(axis, str) or axis not in tuple(AXES):
        raise ValueError(f"axis: {shown(axis)} must be one of {', '.join(AXES)}")
    if config.select is not None:
        raise ValueError(
            f"config: select={shown(config.select)} must be None: a ring attends slab after slab, and a choice is "
            f"among tiles of the whole grid; use ulysses_attention, which takes it"
        )
    resolved = config.resolve(grid, heads)
    at = AXES.index(axis)
    length, tile, tiles = grid[at], resolved.tile[at], resolved.geometry.tiles[at]
    for window in resolved.windows:
        if window[at] < tiles:
            raise ValueError(
                f"window: {window} has {window[at]} on axis {axis}, which has {tiles} tiles; a ring needs the whole "
                f"axis, {tiles} (ulysses_attention takes any window)"
            )
    if ranks > 1 and length % (ranks * tile):
        advice = [f"{n} processes" for n in range(ranks - 1, 1, -1) if length % (n * tile) == 0][:1]
        advice += [f"a tile of {n}" for n in range(tile - 1, 0, -1) if length % (ranks * n) == 0][:1]
        advice += [f'axis="{AXES[i]}"' for i in range(3) if _cuts(resolved, i, ranks)]
        raise ValueError(
            f"grid: {length} tokens on axis {axis} are not {ranks} slabs, one for each process, of whole tiles of "
            f"{tile}; nearest legal: {' or '.join(advice or ['1 process'])}"
        )
    t, h, w = (n // ranks if i == at else n for i, n in enumerate(grid))
    return (t, h, w), replace(config, tile=resolved.tile)


def _cuts(resolved: ResolvedConfig, axis: int, ranks: int) -> bool:
    """Whether an axis is so many slabs of whole tiles, under windows that cover it."""
    covered = all(window[axis] == resolved.geometry.tiles[axis] for window in resolved.windows)
    return covered and resolved.grid[axis] % (ranks * resolved.tile[axis]) == 0


@dataclass(frozen=True)
class _Trade:
    """The exchange of tokens for heads among the processes of a group, and back.

    Attributes:
        tokens, heads: how many each process has, in the order of ranks: of the tokens before, of the heads in between.
        rank, group: of this process.
    """

    tokens: list[int]
    heads: list[int]
    rank: int
    group: dist.ProcessGroup | None

    def around(
        self, attend: Callable, qkv: tuple[Tensor, Tensor, Tensor], tensor_layout: str
    ) -> Tensor | tuple[Tensor, Tensor]:
        """What `attend` returns of q, k and v [B, L, h, D], all tokens of this process's heads; for its own tokens."""
        result = attend(*(self.to_heads(_as_nhd(x, tensor_layout)) for x in qkv))
        if isinstance(result, Tensor):
            return _as_nhd(self.to_tokens(result), tensor_layout)
        out, lse = result
        lse = lse.transpose(1, 2)[..., None]  # [B, L, h, 1]
        out, lse = (self.to_tokens(x) for x in (out, lse))
        return _as_nhd(out, tensor_layout), lse[..., 0].transpose(1, 2)

    def to_heads(self, x: Tensor) -> Tensor:
        """From [B, l, H, D], all heads of this process's tokens, to [B, L, h, D], all tokens of its heads."""
        batch, own = x.shape[0], self.heads[self.rank]
        sent = [part.transpose(0, 1).flatten(0, 2) for part in x.split(self.heads, dim=2)]  # rows of D
        received = [n * batch * own for n in self.tokens]
        rows = _all_to_all(torch.cat(sent), [len(part) for part in sent], received, self.group)
        return rows.unflatten(0, (sum(self.tokens), batch, own)).transpose(0, 1)

    def to_tokens(self, x: Tensor) -> Tensor:
        """The inverse of `to_heads`: from [B, L, h, D] to [B, l, H, D]."""
        batch, own, tokens = x.shape[0], self.heads[self.rank], self.tokens[self.rank]
        sent = [n * batch * own for n in self.tokens]
        received = [tokens * batch * n for n in self.heads]
        rows = _all_to_all(x.transpose(0, 1).flatten(0, 2), sent, received, self.group)
        parts = zip(rows.split(received), self.heads, strict=True)
        by_process = [part.unflatten(0, (tokens, batch, n)).transpose(0, 1) for part, n in parts]
        return torch.cat(by_process, dim=2)


def _from_previous(x: Tensor, rank: int, ranks: int, group) -> Tensor:
    """The x of the previous process in the ring, while the next one gets ours."""
    following, previous = (rank + 1) % ranks, (rank - 1) % ranks
    sent, received = ([len(x) * (i == other) for i in range(ranks)] for other in (following, previous))
    return _all_to_all(x, sent, received, group)


def _all_to_all(x: Tensor, sent: list[int], received: list[int], group) -> Tensor:
    """Send sent[i] rows of x to process i, and receive received[i] rows from it; both in the order of ranks.
    Differentiable. Returns at once; the first read of the result waits.
    """
    # torch has no public collective with a gradient. This one is private, so it is imported only when it is needed.
    from torch.distributed import _functional_collectives as collectives

    group = dist.group.WORLD if group is None else group
    return collectives.all_to_all_single_autograd(x.contiguous(), received, sent, group)
