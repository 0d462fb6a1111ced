"""Attention over tokens that several processes hold, on `torch.distributed`: gloo on CPUs, NCCL on GPUs.

`ulysses_attention` exchanges tokens for heads, attends, and exchanges back (arXiv 2309.14509). Neither rounding nor
softmax mixes heads, so it computes what one process would, for any window. `ring_attention` keeps the queries in place
and sends keys and values round (arXiv 2310.01889). Both use one collective: an all-to-all, whose gradient is the
reverse all-to-all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

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
from .core.config import AXES, AttentionConfig, as_config


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
    **options,
) -> Tensor | tuple[Tensor, Tensor]:
    """`attention` over the tokens of all P processes of a group, H / P heads in each (Ulysses, arXiv 2309.14509).

    Every process passes consecutive tokens with all heads, and gets their output. In between it holds all tokens of
    H / P heads, and runs `attention` on them with the windows of those heads. Differentiable as `attention` is: when
    every process runs the backward, the gradients are those of the sum of the processes' losses.

    All processes of the group must call it, with arguments that differ in the tokens only. Q, K, V and the output cross
    the network once, and their gradients once more.

    Args:
        q, k, v: [B, l, H, D] ("NHD") or [B, H, l, D] ("HND"), this process's share of the L = prefix_len + T * H * W +
            suffix_len tokens, in the order of ranks: `x.tensor_split(P, dim)[rank]` of all of them, so the first L % P
            processes hold one token more. H is a multiple of P.
        group: None: the default group.
        grid, config, return_lse, tensor_layout, prefix_len, suffix_len: as in `attention`, for all tokens.
        options: scale, prefix_valid, suffix_valid, backend and deterministic, as in `attention`.

    Returns out, like q; with return_lse, (out, lse), lse fp32 [B, H, l].
    Raises TypeError or ValueError as `attention` does, and when q, k, v are not this process's share or H is not a
    multiple of P; ValueError when torch.distributed is not initialised, or this process is not in the group. When one
    process raises, the others wait for it: end them all, as torchrun does.
    """
    rank, ranks = _place(group)
    q, k, v = as_autocast(q, k, v)
    lengths = (("prefix_len", prefix_len), ("suffix_len", suffix_len))
    tokens = math.prod(as_grid(grid)) + sum(as_int(name, n, 0) for name, n in lengths)
    shares = [tokens // ranks + (i < tokens % ranks) for i in range(ranks)]
    heads = _checked_heads(
        q, k, v, tensor_layout, shares[rank], lambda: f"{shown(tokens)} tokens, process {rank} of {ranks}"
    )
    options |= {"grid": grid, "config": own_windows(config, heads, rank, ranks), "return_lse": return_lse}
    options |= {"prefix_len": prefix_len, "suffix_len": suffix_len}

    result = attention(*(_to_heads(_as_nhd(x, tensor_layout), shares, group) for x in (q, k, v)), **options)
    if isinstance(result, Tensor):
        return _as_nhd(_to_tokens(result, shares[rank], shares, group), tensor_layout)
    out, lse = result
    lse = lse.transpose(1, 2)[..., None]  # [B, L, H / P, 1]
    out, lse = (_to_tokens(x, shares[rank], shares, group) for x in (out, lse))
    return _as_nhd(out, tensor_layout), lse[..., 0].transpose(1, 2)


def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    grid: Sequence[int],
    config: AttentionConfig | None = None,
    group: dist.ProcessGroup | None = None,
    return_lse: bool = False,
    tensor_layout: str = "NHD",
    **options,
) -> Tensor | tuple[Tensor, Tensor]:
    """`attention` over the tokens of all P processes of a group, for any number of heads (ring, arXiv 2310.01889).

    Every process holds a slab of T / P frames, a whole number of tiles. Its queries attend one slab after another,
    while the keys and values of the next are on their way; `merge_states` joins the results. So a window must cover the
    whole axis t; on h and w any is legal. Differentiable as `attention` is; each process then keeps what P calls keep.

    In exact arithmetic it gives what one process gives. Values that rounding takes from all tokens come from each slab
    instead: K's mean under smooth_k, and the scales of a quant_tile longer than the slab.

    All processes of the group must call it, with arguments that differ in the tokens only.

    Args:
        q, k, v: [B, l, H, D] ("NHD") or [B, H, l, D] ("HND"), the l = T / P * H * W tokens of this process's slab, in
            the order of ranks.
        group: None: the default group.
        grid, config, return_lse, tensor_layout: as in `attention`, for all tokens. There are no text tokens.
        options: scale, backend and deterministic, as in `attention`.

    Returns out, like q; with return_lse, (out, lse), lse fp32 [B, H, l].
    Raises as `ulysses_attention` does, but for any number of heads; and ValueError when T / P is not a whole number of
    tiles or a window is narrower than the axis t.
    """
    rank, ranks = _place(group)
    q, k, v = as_autocast(q, k, v)
    grid = as_grid(grid)
    heads = _checked_heads(
        q, k, v, tensor_layout, math.prod(grid) // ranks, lambda: f"grid {grid}, process {rank} of {ranks}"
    )
    slab, config = _slab(grid, as_config(config), heads, ranks)
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
    """The config for the heads of this process, the rank-th heads / ranks of them all."""
    if heads % ranks:
        legal = [n for n in range(1, heads + 1) if heads % n == 0]
        near = [n for n in legal if n < ranks][-1:] + [n for n in legal if n > ranks][:1]
        raise ValueError(
            f"q: {heads} heads do not divide among {ranks} processes; nearest legal numbers of processes: "
            f"{', '.join(map(str, near))}"
        )
    config = as_config(config)
    if config.window is None or isinstance(config.window[0], int) or len(config.window) == 1:
        return config
    if len(config.window) != heads:
        raise ValueError(
            f"window: {len(config.window)} windows, one per head, for {heads} heads; give one triple, or {heads}"
        )
    own = heads // ranks
    return replace(config, window=config.window[rank * own : (rank + 1) * own])


def _slab(grid: Triple, config: AttentionConfig, heads: int, ranks: int) -> tuple[Triple, AttentionConfig]:
    """The grid of one process's frames, and the config with the tile that it has on the whole grid."""
    resolved = config.resolve(grid, heads)
    frames, (tile, *_), (tiles, *_) = grid[0], resolved.tile, resolved.geometry.tiles
    for window in resolved.windows:
        if window[0] < tiles:
            raise ValueError(
                f"window: {window} has {window[0]} on axis {AXES[0]}, which has {tiles} tiles; a ring needs the whole "
                f"axis, {tiles} (ulysses_attention takes any window)"
            )
    if ranks > 1 and frames % (ranks * tile):
        advice = [f"{n} processes" for n in range(ranks - 1, 0, -1) if frames % (n * tile) == 0][:1]
        advice += [f"a tile of {n} frames" for n in range(tile - 1, 0, -1) if frames % (ranks * n) == 0][:1]
        raise ValueError(
            f"grid: {frames} frames are not {ranks} slabs, one for each process, of whole tiles of {tile} frames; "
            f"nearest legal: {' or '.join(advice) or '1 process'}"
        )
    return (frames // ranks, *grid[1:]), replace(config, tile=resolved.tile)


def _to_heads(x: Tensor, shares: list[int], group) -> Tensor:
    """From [B, l, H, D], all heads of this process's tokens, to [B, L, H / P, D], all tokens of its heads."""
    by_process = x.unflatten(2, (len(shares), -1)).permute(2, 1, 0, 3, 4)  # [P, l, B, H / P, D]
    sent = [x.shape[1]] * len(shares)
    return _all_to_all(by_process.flatten(0, 1), sent, shares, group).transpose(0, 1)


def _to_tokens(x: Tensor, own: int, shares: list[int], group) -> Tensor:
    """The inverse of `_to_heads`: from [B, L, H / P, D] to [B, l, H, D]."""
    received = _all_to_all(x.transpose(0, 1), shares, [own] * len(shares), group)
    by_process = received.unflatten(0, (len(shares), own)).transpose(1, 2)  # [P, B, l, H / P, D]
    return torch.cat(by_process.unbind(), dim=2)


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
