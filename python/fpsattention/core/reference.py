"""The numeric contract, executable: exact attention, and the FP8 arithmetic that the kernels are held to.

Plain torch on any device, blockwise: besides inputs and outputs, memory is a few buffers of `BUDGET`
elements. Query tiles that attend the same box of key tiles are one *group*, and groups of equal size are
computed together, so dense attention is a handful of large matrix products and windowed attention a handful
of batched ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch.utils.checkpoint import checkpoint

from .checks import (
    Triple,
    as_scale,
    check_inputs,
    check_tensor,
    check_values,
    dispatches,
    kind_of,
    shown,
    to_heads_first,
)
from .config import AttentionConfig, ResolvedConfig, as_config
from .geometry import TileGeometry

E4M3_MAX = 448.0
AMAX_FLOOR = 2.0**-100  # a group no larger than this counts as zero: 448 / amax would overflow fp32
BUDGET = 2**25  # most elements of one buffer of scores or of gathered keys
CPU_BUDGET = 2**22  # the same on a CPU: buffers that its caches hold are up to three times as fast
LOG2E = math.log2(math.e)


def _check_dtype(dtype: torch.dtype) -> None:
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"dtype: {shown(dtype)} must be torch.float32 or torch.float64")


def valid_tokens(
    geometry: TileGeometry,
    prefix_valid: torch.Tensor | None,
    suffix_valid: torch.Tensor | None,
) -> torch.Tensor | None:
    """bool [B, L]: which tokens of each sample are valid, by the counts of valid text tokens; None: all are.

    Counts below 0 stand for 0, those beyond a section for the whole section.
    """
    counts = [(geometry.prefix_len, prefix_valid), (geometry.suffix_len, suffix_valid)]
    given = [valid for _, valid in counts if valid is not None]
    if not given:
        return None
    batch, device = len(given[0]), given[0].device
    prefix, suffix = (
        torch.ones(batch, length, dtype=torch.bool, device=device)
        if valid is None
        else torch.arange(length, device=device) < valid[:, None]
        for length, valid in counts
    )
    video = torch.ones(batch, math.prod(geometry.grid), dtype=torch.bool, device=device)
    return torch.cat([prefix, video, suffix], dim=1)


def zero_invalid(x: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
    """x [B, H, L, D] with zeros for invalid tokens: what these hold, be it NaN, is as good as never read."""
    return x if valid is None else x.masked_fill(~valid[:, None, :, None], 0.0)


@dataclass(frozen=True)
class Quantized:
    """Rounded operands of one call, heads first and in raster order whatever the layout of the inputs.

    Attributes:
        q8, k8, v8: float8_e4m3fn [B, H, L, D]; k8 is of K less its mean when smoothing.
        q_scale, k_scale: fp32 [B, H, n_tiles], x = x8 * scale; tiles of one brick have equal scales.
        v_scale: fp32 [B, H, D].
        k_mean: fp32 [B, H, D], or None without smoothing.
        tile_of_token: int64 [L].

    Invalid text tokens are zeros.
    """

    q8: torch.Tensor
    k8: torch.Tensor
    v8: torch.Tensor
    q_scale: torch.Tensor
    k_scale: torch.Tensor
    v_scale: torch.Tensor
    k_mean: torch.Tensor | None
    tile_of_token: torch.Tensor

    @property
    def q(self) -> torch.Tensor:
        """fp32 [B, H, L, D]: the values that q8 stands for."""
        return self.q8.float() * self.q_scale[:, :, self.tile_of_token, None]

    @property
    def k(self) -> torch.Tensor:
        """fp32 [B, H, L, D]: the values that k8 stands for; the mean is not added back."""
        return self.k8.float() * self.k_scale[:, :, self.tile_of_token, None]

    @property
    def v(self) -> torch.Tensor:
        """fp32 [B, H, L, D]: the values that v8 stands for."""
        return self.v8.float() * self.v_scale[:, :, None]


def _scales(amax: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(inv, scale) of groups with this amax: x8 = e4m3(x * inv), x = x8 * scale."""
    empty = amax <= AMAX_FLOOR
    top = torch.full_like(amax, E4M3_MAX)  # with a Python number torch may multiply by a rounded reciprocal
    return (top / amax).masked_fill(empty, 1.0), (amax / top).masked_fill(empty, 1.0)


def _to_e4m3(x: torch.Tensor) -> torch.Tensor:
    """Round to nearest even, saturating; the cast alone makes NaN of what is too large in some versions."""
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def quantize(
    q,
    k,
    v,
    resolved: ResolvedConfig,
    tensor_layout: str = "NHD",
    prefix_valid: torch.Tensor | None = None,
    suffix_valid: torch.Tensor | None = None,
) -> Quantized:
    """Round Q, K, V to E4M3 as the kernels do, bit for bit (arXiv 2506.04648, section 3.1).

    Q and K have one scale per (batch, head, tile), or per brick of tiles when `resolved.quant_tile` is larger
    than the tile; a run of text tokens is a tile of its own. V has one per (batch, head, channel). amax is of the
    inputs in fp32, over valid tokens; a group whose amax is at most `AMAX_FLOOR` has scale 1 and rounds to zeros. A
    NaN or Inf in a valid token spreads over its group.

    Args:
        q, k, v: [B, L, H, D] ("NHD") or [B, H, L, D] ("HND"), of `DTYPES`; read as fp32.
        prefix_valid, suffix_valid: int32 [B], as in `exact_attention`; the lengths are those of `resolved`.

    Raises as `check_inputs` does.
    """
    lengths, counts = (resolved.prefix_len, resolved.suffix_len), (prefix_valid, suffix_valid)
    check_values("q", q)
    check_inputs(q, k, v, resolved.grid, tensor_layout, *lengths, *counts)
    q, k, v = (to_heads_first(x, tensor_layout) for x in (q, k, v))
    return _quantize(q, k, v, resolved, valid_tokens(resolved.geometry, *counts))


def _quantize(q, k, v, resolved: ResolvedConfig, valid: torch.Tensor | None) -> Quantized:
    """`quantize` of q, k, v [B, H, L, D] with these tokens valid, bool [B, L]."""
    q, k, v = (zero_invalid(x.float(), valid) for x in (q, k, v))
    geometry = resolved.geometry
    k_mean = None
    if resolved.smooth_k:
        n = geometry.n_tokens if valid is None else valid.sum(1).clamp(min=1)[:, None, None]
        k_mean = (k.sum(dim=2, dtype=torch.float64) / n).float()
        k = zero_invalid(k - k_mean[:, :, None], valid)
    tile_of_token = geometry.tile_of_token.to(q.device)
    brick_of_tile = geometry.brick_of_tile(resolved.quant_tile)
    n_bricks = int(brick_of_tile[-1]) + 1 if geometry.n_tiles else 0
    brick_of_tile = brick_of_tile.to(q.device)
    brick_of_token = brick_of_tile[tile_of_token]

    def per_brick(x):
        amax = x.new_zeros(*x.shape[:2], n_bricks)
        amax.scatter_reduce_(2, brick_of_token.expand(x.shape[:3]), x.abs().amax(3), "amax")
        inv, scale = _scales(amax)
        return _to_e4m3(x * inv[:, :, brick_of_token, None]), scale[:, :, brick_of_tile]

    q8, q_scale = per_brick(q)
    k8, k_scale = per_brick(k)
    v_amax = v.abs().amax(2) if geometry.n_tokens else v.new_zeros(*v.shape[:2], v.shape[3])
    v_inv, v_scale = _scales(v_amax)
    v8 = _to_e4m3(v * v_inv[:, :, None])
    return Quantized(q8, k8, v8, q_scale, k_scale, v_scale, k_mean, tile_of_token)


def _products_are_fp32(device: torch.device) -> bool:
    """Whether torch multiplies fp32 matrices in fp32 there, not in TF32 or bf16, as users may allow."""
    if device.type not in ("cuda", "cpu"):
        return True
    backend = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
    return backend.matmul.fp32_precision in ("ieee", "none")


def _exact_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b, in fp32 at least, whatever torch is allowed: the setting is the process's, so it is not touched.

    The FP8 arithmetic needs no such care: its operands have 8 bits at most, which TF32 and bf16 hold.
    """
    if a.dtype != torch.float32 or _products_are_fp32(a.device):
        return a @ b
    return (a.double() @ b.double()).float()


def _budget(device: torch.device) -> int:
    return min(BUDGET, CPU_BUDGET) if device.type == "cpu" else BUDGET


def _chunks(
    resolved: ResolvedConfig, window: Triple, heads: int, head_dim: int, budget: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Pairs of token indices (queries [n, rows], keys [n, keys]) computed in one go; -1 is padding. Text tokens
    take no part in tiles here: as keys they follow those of every group, and as queries they are a group.

    Row i of `queries` attends row i of `keys`; every query token comes once. heads * n * keys * rows and
    heads * n * keys * head_dim stay within `budget`, unless a single row, or the keys of a single group, are
    more.
    """
    geometry = resolved.geometry
    text = geometry.text_tokens
    if len(text):
        everything = torch.arange(geometry.n_tokens, device="cpu")[None]
        for some in text[None].split(max(1, budget // (heads * geometry.n_tokens)), dim=1):
            yield some, everything
    if not geometry.n_video_tiles:
        return
    video = slice(geometry.n_video_tiles)
    rows_of_tile = geometry.slot_tokens[video, : int(geometry.valid[video].max())]
    boxes, group_of_tile = geometry.key_boxes(window, resolved.border).unique(dim=0, return_inverse=True)
    tiles_by_group = group_of_tile.argsort(stable=True)
    query_tiles = group_of_tile.bincount()
    first = query_tiles.cumsum(0) - query_tiles
    sizes = torch.cat([query_tiles[:, None], boxes[..., 1] - boxes[..., 0]], dim=1)
    for size in sizes.unique(dim=0):
        alike = (sizes == size).all(1).nonzero()[:, 0]
        n_query_tiles, n_key_tiles = int(size[0]), int(size[1:].prod())
        per_row = heads * (n_key_tiles * rows_of_tile.shape[1] + len(text))
        rows = min(n_query_tiles * rows_of_tile.shape[1], max(1, budget // per_row))
        n = max(1, budget // (per_row * max(rows, head_dim)))
        for groups in alike.split(n):
            tiles = tiles_by_group[first[groups, None] + torch.arange(n_query_tiles, device="cpu")]
            queries = rows_of_tile[tiles].flatten(1)
            keys = rows_of_tile[geometry.tiles_in(boxes[groups])].flatten(1)
            keys = torch.cat([keys, text.expand(len(groups), -1)], dim=1)
            for some in queries.split(rows, dim=1):
                yield some, keys


def _blockwise(
    compute: Callable,
    of_queries: tuple,
    of_keys: tuple,
    resolved: ResolvedConfig,
    window: Triple,
    dtype: torch.dtype,
    valid: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of some heads under one window: `compute` on every chunk, results back in the order of memory.

    Args:
        compute: takes the chunk's slices of `of_queries` [heads, n, rows, ...] and of `of_keys` [heads, n,
            keys, ...], and a mask that broadcasts to [heads, n, rows, keys], True where a key is padding or invalid,
            or None; returns out [heads, n, rows, D] and lse [heads, n, rows] in `dtype`. Differentiable when the
            operands require a gradient: chunks are recomputed.
        of_queries, of_keys: tensors [heads, L, ...], the first of each with D channels.
        valid: bool [heads, L], or None: all tokens are valid.

    Returns out [heads, L, D] and lse [heads, L]; of invalid queries 0 and -inf.
    """
    q = of_queries[0]
    heads, _, head_dim = q.shape
    out = torch.empty(q.shape, dtype=dtype, device=q.device)
    lse = torch.empty(q.shape[:2], dtype=dtype, device=q.device)

    def run(queries, keys, padding, *operands):
        values = [x[:, queries] for x in operands[: len(of_queries)]]
        values += [x[:, keys] for x in operands[len(of_queries) :]]
        with torch.autocast(queries.device.type, enabled=False):  # the dtypes are part of the contract
            return compute(*values, padding)

    for queries, keys in _chunks(resolved, window, heads, head_dim, _budget(q.device)):
        rows, in_use = queries.clamp(min=0).to(q.device), queries >= 0
        padding = (keys < 0)[:, None].to(q.device) if keys.min() < 0 else None
        keys = keys.clamp(min=0).to(q.device)
        if valid is not None:
            unseen = ~valid[:, keys][:, :, None]
            padding = unseen if padding is None else unseen | padding
        args = (rows, keys, padding, *of_queries, *of_keys)
        if torch.is_grad_enabled() and any(x.requires_grad for x in (*of_queries, *of_keys)):
            some_out, some_lse = checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False)
        else:
            some_out, some_lse = run(*args)
        tokens, in_use = queries[in_use].to(q.device), in_use.to(q.device)
        out[:, tokens] = some_out[:, in_use]
        lse[:, tokens] = some_lse[:, in_use]
    if valid is not None:
        out, lse = out.masked_fill(~valid[..., None], 0.0), lse.masked_fill(~valid, -math.inf)
    return out, lse


def _head_slices(
    q: torch.Tensor, resolved: ResolvedConfig, valid: torch.Tensor | None
) -> Iterator[tuple[Triple, tuple, torch.Tensor | None]]:
    """(window, index into [B, H], their tokens of `valid` [B, L] if not None) of all heads of q [B, H, L, D], in parts
    whose copies fit in `BUDGET`.
    """
    batch, heads, tokens, head_dim = q.shape
    at_once = max(1, BUDGET // max(1, tokens * head_dim))
    windows = resolved.windows * (heads if len(resolved.windows) == 1 else 1)
    for window in dict.fromkeys(windows):
        pairs = [(b, h) for b in range(batch) for h in range(heads) if windows[h] == window]
        pairs = torch.tensor(pairs, device="cpu")
        for some in pairs.reshape(-1, 2).split(at_once):
            if len(some):
                index = tuple(some.to(q.device).unbind(1))
                yield window, index, None if valid is None else valid[index[0]]


class _StraightThrough(torch.autograd.Function):
    """`rounded`, with the gradient of `x`: the derivative of rounding is taken to be one."""

    @staticmethod
    def forward(ctx, x, rounded):
        return rounded

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


def _set_up(q, k, v, grid, config, scale, tensor_layout, prefix_len, suffix_len, *counts):
    """(q, k, v heads first with zeros for invalid tokens, valid [B, L] or None, resolved, scale), checked."""
    check_inputs(q, k, v, grid, tensor_layout, prefix_len, suffix_len, *counts)
    q, k, v = (to_heads_first(x, tensor_layout) for x in (q, k, v))
    resolved = as_config(config).resolve(grid, q.shape[1], prefix_len, suffix_len)
    valid = valid_tokens(resolved.geometry, *counts)
    q, k, v = (zero_invalid(x, valid) for x in (q, k, v))
    return q, k, v, valid, resolved, as_scale(scale, q.shape[3])


def _check_fp8(config) -> None:
    if as_config(config).quant != "fp8":
        raise ValueError(
            f'config: quant={config.quant!r} has nothing to emulate; use "fp8", or exact_attention'
        )


def _goes_by_the_op(q) -> bool:
    """Whether what is asked for is shapes, or a node of a graph: then one op stands for the whole."""
    return isinstance(q, torch.Tensor) and (torch.compiler.is_compiling() or dispatches(q))


def _call_op(
    kind, q, k, v, dtype, grid, config, scale, tensor_layout, prefix_len, suffix_len, prefix_valid, suffix_valid
):  # fmt: skip
    """`exact_attention` or `emulated_attention` by the op of reference_op.py."""
    lengths, counts = (prefix_len, suffix_len), (prefix_valid, suffix_valid)
    check_inputs(q, k, v, grid, tensor_layout, *lengths, *counts)
    _, heads, _, head_dim = to_heads_first(q, tensor_layout).shape
    config = as_config(config)
    if not torch.compiler.is_compiling():  # a graph has the check inside of the op
        config.resolve(grid, heads, *lengths)
    return torch.ops.fpsattention.reference(
        *(q, k, v, *counts, list(grid), *lengths, config.spec),
        *(as_scale(scale, head_dim), tensor_layout, kind, dtype),
    )


def _scores(q8, q_scale, k8, k_scale, scale: float, padding) -> torch.Tensor:
    """z [..., rows, keys], the scores in the log2 domain; -inf where `padding` is True."""
    z = q8 @ k8.mT
    z *= (q_scale * (scale * LOG2E))[..., None]
    z *= k_scale[..., None, :]
    if padding is not None:
        z.masked_fill_(padding, -math.inf)
    return z


def _lse_of_mean(q, k_mean, scale: float) -> torch.Tensor:
    """What smoothing took off the lse of q [heads, L, D], by k_mean [heads, 1, D]: [heads, L]."""
    return scale * (q * k_mean).sum(-1)


def exact_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    grid: Triple,
    config: AttentionConfig,
    scale: float | None = None,
    tensor_layout: str = "NHD",
    dtype: torch.dtype = torch.float64,
    prefix_len: int = 0,
    suffix_len: int = 0,
    prefix_valid: torch.Tensor | None = None,
    suffix_valid: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention under the config's window, on the values as given: nothing is rounded to FP8.

    Differentiable; the backward recomputes block by block.

    Text tokens lie before the grid's (the prefix) and after them (the suffix). Their keys are seen
    by every query, and their queries see every key, whatever the window. Where fewer than a section holds are valid,
    the first ones are; what the others hold is never read, their out is 0, their lse -inf, their gradients are 0.

    Args:
        q, k, v: [B, L, H, D] ("NHD") or [B, H, L, D] ("HND"), L = prefix_len + T * H * W + suffix_len in this order,
            the grid in raster order.
        grid: tokens (T, H, W).
        config: tile, window and border are used; quant, quant_tile and smooth_k do not apply here.
        scale: of the scores before softmax, positive; None: D ** -0.5.
        dtype: of the arithmetic and the results, float32 or float64.
        prefix_len, suffix_len: text tokens in every sample.
        prefix_valid, suffix_valid: int32 [B] on the device of q, how many of the section's tokens are valid in each
            sample, from 0 to its length; None: all. Out of range they are an error on the CPU outside torch.compile;
            elsewhere they are clamped.

    Returns out, like q but of `dtype`, and lse [B, H, L] of `dtype`, natural logarithm.
    Raises TypeError or ValueError that name the argument.
    """
    _check_dtype(dtype)
    call = grid, config, scale, tensor_layout, prefix_len, suffix_len, prefix_valid, suffix_valid
    if _goes_by_the_op(q):
        return _call_op("exact", q, k, v, dtype, *call)
    q, k, v, valid, resolved, scale = _set_up(q, k, v, *call)

    def compute(q, k, v, padding):
        scores = _exact_product(q * scale, k.mT)
        if padding is not None:
            scores.masked_fill_(padding, -math.inf)
        shift = scores.detach().amax(-1, keepdim=True)
        p = scores.sub_(shift).exp_()
        l = p.sum(-1)  # noqa: E741
        return _exact_product(p, v) / l[..., None], shift[..., 0] + l.log()

    out = torch.empty(q.shape, dtype=dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=dtype, device=q.device)
    for window, heads, some_valid in _head_slices(q, resolved, valid):
        of_queries, *of_keys = (x[heads].to(dtype) for x in (q, k, v))
        out[heads], lse[heads] = _blockwise(
            compute, (of_queries,), of_keys, resolved, window, dtype, some_valid
        )
    return to_heads_first(out, tensor_layout), lse


def emulated_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    grid: Triple,
    config: AttentionConfig,
    scale: float | None = None,
    tensor_layout: str = "NHD",
    dtype: torch.dtype | None = None,
    prefix_len: int = 0,
    suffix_len: int = 0,
    prefix_valid: torch.Tensor | None = None,
    suffix_valid: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The FP8 contract: what the kernels compute, with the same roundings (arXiv 2506.04648, section 3).

    With z = q8.k8 * s_q * s_k * scale * log2(e), m = ceil(max z) over the keys of a row, P = 2^(z - m), l =
    sum P and p8 = e4m3(448 P): out = sum(p8 * v8) * s_v / (448 l), lse = ln(2) * (m + log2 l). m is an
    integer, so that rescaling when it grows from block to block, as the kernels do, is exact. The kernels' m is
    that or up to some five larger, which changes nothing but where the codes of p8 end at the bottom.

    Differentiable, any number of times; the backward recomputes block by block (arXiv 2307.08691), and its fp32
    products follow torch's TF32 setting. All roundings are straight-through: their derivative is one, and scales, m
    and K's mean are constants (smoothing changes nothing that is not rounded, so its mean has no gradient to give).
    With x^ = x8 * s_x, delta = rowsum(dO * out) - dlse and dS = P / l * (dO v^.T - delta):

        dV = (p8 / 448 l).T dO        dK = scale * dS.T q^        dQ = scale * (dS k^ + dlse * k_mean)

    Args:
        q, k, v: [B, L, H, D] ("NHD") or [B, H, L, D] ("HND"), L = prefix_len + T * H * W + suffix_len in this order,
            the grid in raster order; of `DTYPES`.
        grid: tokens (T, H, W).
        config: all of it; `quant` must be "fp8".
        scale: of the scores before softmax, positive; None: D ** -0.5.
        dtype: of the arithmetic and the results, float32 or float64; what is rounded stays so. None: the kernels', fp32
            with out in the dtype of q.
        prefix_len, suffix_len, prefix_valid, suffix_valid: as in `exact_attention`. amax and K's mean are of valid
            tokens. A run of text tokens (`fpsattention.geometry.TileGeometry`) has a scale of its own.

    Returns out, like q, and lse fp32 [B, H, L], natural logarithm; with `dtype`, both of it.
    Raises TypeError or ValueError that name the argument.
    """
    if dtype is not None:
        _check_dtype(dtype)
    _check_fp8(config)
    call = grid, config, scale, tensor_layout, prefix_len, suffix_len, prefix_valid, suffix_valid
    if _goes_by_the_op(q):
        return _call_op("emulated", q, k, v, dtype, *call)
    q, k, v, valid, resolved, scale = _set_up(q, k, v, *call)
    out_dtype, dtype = dtype or q.dtype, dtype or torch.float32

    def compute(q8, q_scale, k8, k_scale, v8, padding):
        z = _scores(q8, q_scale, k8, k_scale, scale, padding)
        m = z.detach().amax(-1, keepdim=True).ceil_()
        p = z.sub_(m).exp2_()
        l = p.sum(-1)  # noqa: E741
        p448 = p * E4M3_MAX  # at most 448: nothing to saturate
        p8 = _StraightThrough.apply(p448, p448.detach().to(torch.float8_e4m3fn).to(dtype))
        return p8 @ v8 / (E4M3_MAX * l)[..., None], math.log(2) * (m[..., 0] + l.log2())

    out = torch.empty(q.shape, dtype=out_dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=dtype, device=q.device)
    for window, heads, some_valid in _head_slices(q, resolved, valid):
        some = [x[heads] for x in (q, k, v)]
        with torch.no_grad():
            x = _quantize(*(t[:, None] for t in some), resolved, some_valid)
            q_scale, k_scale = (s[:, 0, x.tile_of_token].to(dtype) for s in (x.q_scale, x.k_scale))
            v_scale = x.v_scale.to(dtype)
        rounded = zip(
            some, (x.q8, x.k8, x.v8), (q_scale[..., None], k_scale[..., None], v_scale), strict=True
        )
        q8, k8, v8 = (_StraightThrough.apply(t.to(dtype) / s, t8[:, 0].to(dtype)) for t, t8, s in rounded)
        some_out, some_lse = _blockwise(
            compute, (q8, q_scale), (k8, k_scale, v8), resolved, window, dtype, some_valid
        )
        if x.k_mean is not None:
            some_lse = some_lse + _lse_of_mean(some[0].to(dtype), x.k_mean, scale)
        out[heads] = (some_out * v_scale).to(out_dtype)
        lse[heads] = some_lse
    return to_heads_first(out, tensor_layout), lse


def _to_bf16(x: torch.Tensor) -> torch.Tensor:
    """fp32 x rounded to bf16: products of such numbers are exact in fp32."""
    return x.bfloat16().float()


def _to_four_bits(x: torch.Tensor) -> torch.Tensor:
    """fp32 x >= 0 rounded to 4 significant bits, as E4M3 has, to nearest even; nothing is too small or large."""
    power = (x.view(torch.int32) & 0x7F800000).view(torch.float32)  # of two, at most x
    power *= 2.0**20  # the last bit of a number this large is the fourth of x
    return x + power - power


@torch.no_grad()
def emulated_backward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    dout: torch.Tensor,
    dlse: torch.Tensor | None = None,
    *,
    grid: Triple,
    config: AttentionConfig,
    scale: float | None = None,
    tensor_layout: str = "NHD",
    prefix_len: int = 0,
    suffix_len: int = 0,
    prefix_valid: torch.Tensor | None = None,
    suffix_valid: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradient of `emulated_attention` as the kernels compute it, with the same 16-bit roundings (arXiv
    2506.04648, section 3; recomputed block by block from the lse as in arXiv 2307.08691, section 3.2).

    With z as in the forward, lse2 the lse in log2 units without what smoothing adds to it, M = ceil(lse2) and c =
    2^(M - lse2) / 448, a probability is x * c with x = 448 * 2^(z - M). So c is applied once for each query:
    dO' = bf16(c * dO), delta' = c * (rowsum(dO * out) - dlse), and

        dP' = dO' bf16(v8 s_v).T        dS = bf16(x * (dP' - delta'))
        dV = x^.T dO'                   dK = scale * dS.T bf16(q8 s_q)
        dQ = scale * (dS bf16(k8 s_k) + dlse * k_mean)

    x^ is x rounded to the 4 significant bits of E4M3, to nearest even: the forward's p8 but for a power of two.
    There it has no smallest number, so where the forward's p8 is subnormal or zero, x^ is the more exact one. The
    16-bit type is bf16, also for fp16 inputs; everything else is fp32.

    Args:
        q, k, v: [B, L, H, D] ("NHD") or [B, H, L, D] ("HND"), as in the forward.
        out, lse: what the forward returned; like q, and fp32 [B, H, L].
        dout, dlse: their gradients; no dlse: zero.
        grid, config, scale, tensor_layout, prefix_len, suffix_len, prefix_valid, suffix_valid: as in the forward.

    Returns dq, dk, dv, like q.
    Raises TypeError or ValueError that name the argument.
    """
    _check_fp8(config)
    check_values("q", q)
    call = grid, config, scale, tensor_layout, prefix_len, suffix_len, prefix_valid, suffix_valid
    q, k, v, valid, resolved, scale = _set_up(q, k, v, *call)
    for name, x in (("out", out), ("dout", dout)):
        check_tensor(name, x, tensor_layout)
    out, dout = (to_heads_first(x, tensor_layout) for x in (out, dout))
    dlse = torch.zeros(q.shape[:3], device=q.device) if dlse is None else dlse
    for name, x, shape in (
        ("out", out, q.shape),
        ("lse", lse, q.shape[:3]),
        ("dout", dout, q.shape),
        ("dlse", dlse, q.shape[:3]),
    ):
        if not isinstance(x, torch.Tensor) or not x.is_floating_point():
            raise TypeError(f"{name}: must be a floating-point tensor, got {kind_of(x)}")
        if x.shape != shape or x.device != q.device:
            raise ValueError(
                f"{name}: shape {shown(list(x.shape))}, heads first, on {x.device}, must be {list(shape)} on {q.device}"
            )
    if valid is not None:  # zeros from here on: an invalid query has no gradient to give
        out, dout = zero_invalid(out, valid), zero_invalid(dout, valid)
        lse, dlse = (x.masked_fill(~valid[:, None], 0.0) for x in (lse, dlse))

    gradients = [torch.empty(q.shape, dtype=q.dtype, device=q.device) for _ in range(3)]
    for window, heads, some_valid in _head_slices(q, resolved, valid):
        x = _quantize(*(t[heads][:, None] for t in (q, k, v)), resolved, some_valid)
        q_scale, k_scale = (s[:, 0, x.tile_of_token] for s in (x.q_scale, x.k_scale))
        q16, k16, v16 = (_to_bf16(t[:, 0]) for t in (x.q, x.k, x.v))
        some_out, some_lse, some_dout, some_dlse = (t[heads].float() for t in (out, lse, dout, dlse))
        if x.k_mean is not None:
            some_lse = some_lse - _lse_of_mean(q[heads].float(), x.k_mean, scale)
        lse2 = some_lse * LOG2E
        m = lse2.ceil()
        c = (m - lse2).exp2() / E4M3_MAX
        dout16 = _to_bf16(c[..., None] * some_dout)
        delta = c * ((some_dout * some_out).sum(-1) - some_dlse)

        of_queries = (x.q8[:, 0].float(), q_scale, q16, m, dout16, delta)
        of_keys = (x.k8[:, 0].float(), k_scale, k16, v16)
        dq, dk, dv = (torch.zeros_like(t) for t in (q16, k16, v16))
        for queries, keys in _chunks(resolved, window, *q16.shape[::2], _budget(q.device)):
            queries, keys = queries.to(q.device), keys.to(q.device)
            rows, seen = queries >= 0, keys >= 0
            q8, s_q, q_, m_, do, d = (t[:, queries.clamp(min=0)] for t in of_queries)
            k8, s_k, k_, v_ = (t[:, keys.clamp(min=0)] for t in of_keys)
            unseen = ~(rows[..., None] & seen[:, None])
            if some_valid is not None:
                unseen = unseen | ~some_valid[:, keys.clamp(min=0)][:, :, None]
            with torch.autocast(queries.device.type, enabled=False):
                z = _scores(q8, s_q, k8, s_k, scale, unseen)
                x448 = z.sub_(m_[..., None]).exp2_().mul_(E4M3_MAX)
                ds = _to_bf16(x448 * (do @ v_.mT - d[..., None]))
                dq[:, queries[rows]] = (ds @ k_)[:, rows]
                dk.index_add_(1, keys[seen], (ds.mT @ q_)[:, seen])
                dv.index_add_(1, keys[seen], (_to_four_bits(x448).mT @ do)[:, seen])

        if x.k_mean is not None:
            dq += some_dlse[..., None] * x.k_mean
        for gradient, some in zip(gradients, (scale * dq, scale * dk, dv), strict=True):
            gradient[heads] = some.to(q.dtype)
    return tuple(to_heads_first(x, tensor_layout) for x in gradients)
