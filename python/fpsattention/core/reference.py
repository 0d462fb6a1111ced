"""The numeric contract in plain torch: exact attention, and the FP8 arithmetic that the kernels must reproduce.

It runs on any device, in blocks: beside inputs and outputs, it needs a few buffers of `BUDGET` elements. Query tiles
that attend the same key tiles are one *group*. Groups of equal size are computed together, so dense attention takes a
few large matrix products and windowed attention a few batched ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
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
from .key_tiles import KeyTiles, check_key_tiles, tensors_of
from .selectors import refuse

E4M3_MAX = 448.0
QK_MAX = 14.0  # largest element of Q and K in E4M3: products of 128 of them fit fp16
AMAX_FLOOR = 2.0**-100  # values up to this count as zero, because 448 / amax could overflow fp32
SMOOTH_SAMPLES = 2048  # tokens, about, from which smoothing takes K's mean
CODES = 8  # E4M3 codes of an octave
IN_REFERENCE = "in fpsattention.reference, which takes lists"
TOP_CODE = 120  # of P where z is the exponent of its key block: 256
# log2 of the mean of P / 2^z over an octave of z: the code is a piecewise linear logarithm, never below the true one.
LOG2_BIAS = -math.log2(2 * math.log(2) ** 2)
BUDGET = 2**25  # largest number of elements in a buffer of scores or of gathered keys
CPU_BUDGET = 2**22  # the same on a CPU, where buffers that fit in its caches are up to three times as fast
LOG2E = math.log2(math.e)

# What the query tiles of a head attend: a window, or for each of the n tiles of the grid its list of key tiles, int64
# [n, cap], ascending, then n where the list is shorter.
Look = Triple | Tensor


def _check_dtype(dtype: torch.dtype) -> None:
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"dtype: {shown(dtype)} must be torch.float32 or torch.float64")


def valid_tokens(
    geometry: TileGeometry,
    prefix_valid: Tensor | None,
    suffix_valid: Tensor | None,
) -> Tensor | None:
    """bool [B, L]: True for the valid tokens of each sample; None if all are valid.

    Args:
        prefix_valid, suffix_valid: int32 [B], numbers of valid text tokens, clamped to 0 and the length of the section;
            None: all are valid.
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


def zero_invalid(x: Tensor, valid: Tensor | None) -> Tensor:
    """x [B, H, L, D] with invalid tokens set to zero, so that a NaN in them cannot spread."""
    return x if valid is None else x.masked_fill(~valid[:, None, :, None], 0.0)


@dataclass(frozen=True)
class Quantized:
    """Rounded operands of one call, heads first and with tokens in the order of the inputs. Invalid tokens are zeros.

    Attributes:
        q8, k8, v8: float8_e4m3fn [B, H, L, D]. With smoothing, k8 is K less its mean, rounded.
        q_scale, k_scale: fp32 [B, H, n_tiles]; x = x8 * scale. Tiles of one brick have equal scales.
        v_scale: fp32 [B, H, n_blocks], one for each key block.
        k_mean: fp32 [B, H, D], or None without smoothing.
        tile_of_token, block_of_token: int64 [L].
    """

    q8: Tensor
    k8: Tensor
    v8: Tensor
    q_scale: Tensor
    k_scale: Tensor
    v_scale: Tensor
    k_mean: Tensor | None
    tile_of_token: Tensor
    block_of_token: Tensor

    @property
    def q(self) -> Tensor:
        """fp32 [B, H, L, D]: the values that q8 stands for."""
        return self.q8.float() * self.q_scale[:, :, self.tile_of_token, None]

    @property
    def k(self) -> Tensor:
        """fp32 [B, H, L, D]: the values that k8 stands for; the mean is not added back."""
        return self.k8.float() * self.k_scale[:, :, self.tile_of_token, None]

    @property
    def v(self) -> Tensor:
        """fp32 [B, H, L, D]: the values that v8 stands for."""
        return self.v8.float() * self.v_scale[:, :, self.block_of_token, None]


def _scales(amax: Tensor, largest: float) -> tuple[Tensor, Tensor]:
    """(inv, scale) of values that share a scale and have this amax: x8 = e4m3(x * inv), x = x8 * scale.

    The largest x8 is `largest`.
    """
    empty = amax <= AMAX_FLOOR
    top = torch.full_like(amax, largest)  # by a Python number, torch may divide with a rounded reciprocal
    return (top / amax).masked_fill(empty, 1.0), (amax / top).masked_fill(empty, 1.0)


def _to_e4m3(x: Tensor) -> Tensor:
    """Round to nearest even, saturating. Without the clamp, some versions of torch make NaN of values above 448."""
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def quantize(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    resolved: ResolvedConfig,
    tensor_layout: str = "NHD",
    prefix_valid: Tensor | None = None,
    suffix_valid: Tensor | None = None,
) -> Quantized:
    """Round Q, K, V to E4M3 as the kernels do, bit for bit (arXiv 2506.04648, section 3.1).

    Q and K have one scale per (batch, head, tile), or per brick if `resolved.quant_tile` is larger than the tile. Each
    text tile has a scale of its own. V has one scale per (batch, head, key block). A scale comes from amax, the largest
    magnitude in fp32 among the valid tokens that share it: it maps amax to `QK_MAX` in Q and K, to `E4M3_MAX` in V.
    Where amax is at most `AMAX_FLOOR`, the scale is 1 and all rounds to zero. A NaN or Inf in a valid token spreads to
    all that share its scale.

    With smoothing, K's mean is that of the valid tokens whose index is a multiple of max(1, L // `SMOOTH_SAMPLES`).

    Args:
        q, k, v: [B, L, H, D] ("NHD") or [B, H, L, D] ("HND"), of a dtype in `DTYPES`; read as fp32.
        resolved: the config for this grid.
        tensor_layout: "NHD" or "HND".
        prefix_valid, suffix_valid: int32 [B], as in `exact_attention`; the lengths are those of `resolved`.

    Raises TypeError or ValueError that name the argument.
    """
    lengths, counts = (resolved.prefix_len, resolved.suffix_len), (prefix_valid, suffix_valid)
    check_values("q", q)
    check_inputs(q, k, v, resolved.grid, tensor_layout, *lengths, *counts)
    q, k, v = (to_heads_first(x, tensor_layout) for x in (q, k, v))
    return _quantize(q, k, v, resolved, valid_tokens(resolved.geometry, *counts))


def _quantize(q: Tensor, k: Tensor, v: Tensor, resolved: ResolvedConfig, valid: Tensor | None) -> Quantized:
    """`quantize` of q, k, v [B, H, L, D]; `valid` is bool [B, L], or None if all tokens are valid."""
    q, k, v = (zero_invalid(x.float(), valid) for x in (q, k, v))
    geometry = resolved.geometry
    k_mean = None
    if resolved.smooth_k:
        stride = max(1, geometry.n_tokens // SMOOTH_SAMPLES)
        samples = k[:, :, ::stride]  # zeros where invalid
        n = samples.shape[2] if valid is None else valid[:, ::stride].sum(1).clamp(min=1)[:, None, None]
        k_mean = (samples.sum(dim=2, dtype=torch.float64) / n).float()
        k = zero_invalid(k - k_mean[:, :, None], valid)
    tile_of_token, block_of_token = (
        x.to(q.device) for x in (geometry.tile_of_token, geometry.block_of_token)
    )
    brick_of_tile = geometry.brick_of_tile(resolved.quant_tile)
    n_bricks = int(brick_of_tile[-1]) + 1 if geometry.n_tiles else 0
    brick_of_tile = brick_of_tile.to(q.device)

    def rounded(x: Tensor, group_of_token: Tensor, groups: int, largest: float) -> tuple[Tensor, Tensor]:
        """x in E4M3 and the scale of each group."""
        amax = x.new_zeros(*x.shape[:2], groups)
        amax.scatter_reduce_(2, group_of_token.expand(x.shape[:3]), x.abs().amax(3), "amax")
        inv, scale = _scales(amax, largest)
        return _to_e4m3(x * inv[:, :, group_of_token, None]), scale

    q8, q_scale = rounded(q, brick_of_tile[tile_of_token], n_bricks, QK_MAX)
    k8, k_scale = rounded(k, brick_of_tile[tile_of_token], n_bricks, QK_MAX)
    v8, v_scale = rounded(v, block_of_token, geometry.n_blocks, E4M3_MAX)
    q_scale, k_scale = (x[:, :, brick_of_tile] for x in (q_scale, k_scale))
    return Quantized(q8, k8, v8, q_scale, k_scale, v_scale, k_mean, tile_of_token, block_of_token)


def _products_are_fp32(device: torch.device) -> bool:
    """Whether torch multiplies fp32 matrices in fp32 on this device. Users may allow TF32 or bf16."""
    if device.type not in ("cuda", "cpu"):
        return True
    backend = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
    return backend.matmul.fp32_precision in ("ieee", "none")


def _exact_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in fp32 or fp64, even where torch may use TF32 or bf16. That setting belongs to the whole process.

    Other products of the FP8 arithmetic need no such care: their operands have at most 8 bits, so TF32 and bf16 hold
    them.
    """
    if a.dtype != torch.float32 or _products_are_fp32(a.device):
        return a @ b
    return (a.double() @ b.double()).float()


def _budget(device: torch.device) -> int:
    return min(BUDGET, CPU_BUDGET) if device.type == "cpu" else BUDGET


@dataclass(frozen=True)
class _KeyBlocks:
    """How the keys of a chunk lie: `tiles` times `rows` rows of the grid's tiles, then the prefix, then the suffix."""

    tiles: int
    rows: int
    text: tuple[int, int]
    block: int  # rows of a key block

    def of(self, x: Tensor) -> list[Tensor]:
        """Views [..., blocks, keys of a block] of x [..., keys], for blocks of equal size: together, all key blocks."""
        parts = []
        first = self.tiles * self.rows
        if first:
            tiles = x[..., :first].unflatten(-1, (self.tiles, self.rows))
            parts += tiles.split(self.block, dim=-1)
        for length in self.text:
            section, whole = x[..., first : first + length], length // self.block * self.block
            if whole:
                parts.append(section[..., :whole].unflatten(-1, (-1, self.block)))
            if length > whole:
                parts.append(section[..., None, whole:])
            first += length
        return parts


@dataclass(frozen=True)
class _Groups:
    """Query tiles that attend the same key tiles, as groups.

    Attributes:
        of_tile: int64 [n], the group of each tile of the grid.
        n_keys: int64 [groups], key tiles of each, at least 1.
        keys_of: int64 [g, keys], ascending, of groups [g] with equally many key tiles. The tile n is padding.
    """

    of_tile: Tensor
    n_keys: Tensor
    keys_of: Callable[[Tensor], Tensor]

    @classmethod
    def of(cls, geometry: TileGeometry, look: Look, border: str) -> _Groups:
        if isinstance(look, Tensor):
            lists, of_tile = look.unique(dim=0, return_inverse=True)
            # A tile of padding stands for an empty list, so that all queries have keys to compute with.
            n_keys = (lists < geometry.n_video_tiles).sum(1).clamp(min=1)
            return cls(of_tile, n_keys, lambda groups: lists[groups, : n_keys[groups[0]]])
        boxes, of_tile = geometry.key_boxes(look, border).unique(dim=0, return_inverse=True)
        n_keys = (boxes[..., 1] - boxes[..., 0]).prod(1)
        return cls(of_tile, n_keys, lambda groups: geometry.tiles_in(boxes[groups]))


def _chunks(
    resolved: ResolvedConfig, look: Look, heads: int, head_dim: int, budget: int
) -> Iterator[tuple[Tensor, Tensor, _KeyBlocks]]:
    """What is computed together: queries [n, rows], keys [n, keys] (token indices; -1 is padding), and how keys lie.

    Row i of `queries` attends row i of `keys`, and every query token comes once. heads * n * keys * rows and
    heads * n * keys * head_dim stay within `budget`, unless a single row, or the keys of a single group, exceed it.
    Text queries are a group. A window and the same window as lists give the same chunks.
    """
    geometry = resolved.geometry
    text = geometry.text_tokens
    video = slice(geometry.n_video_tiles)
    longest = int(geometry.valid[video].max()) if geometry.n_video_tiles else 0
    rows_of_tile = geometry.slot_tokens[video, :longest]

    def lie(tiles: int) -> _KeyBlocks:
        lengths = geometry.prefix_len, geometry.suffix_len
        return _KeyBlocks(tiles, longest, lengths, geometry.slot // geometry.blocks_per_tile)

    if len(text):
        everything = torch.cat([rows_of_tile.flatten(), text])[None]
        for some in text[None].split(max(1, budget // (heads * everything.shape[1])), dim=1):
            yield some, everything, lie(geometry.n_video_tiles)
    if not geometry.n_video_tiles:
        return
    rows_or_padding = torch.cat([rows_of_tile, torch.full((1, longest), -1, device="cpu")])
    grouped = _Groups.of(geometry, look, resolved.border)
    tiles_by_group = grouped.of_tile.argsort(stable=True)
    query_tiles = grouped.of_tile.bincount()
    first = query_tiles.cumsum(0) - query_tiles
    in_order = tiles_by_group[first].argsort()  # by a group's first tile
    sizes = torch.stack([query_tiles, grouped.n_keys], dim=1)
    for size in sizes.unique(dim=0):
        alike = in_order[(sizes[in_order] == size).all(1)]
        n_query_tiles, n_key_tiles = size.tolist()
        per_row = heads * (n_key_tiles * longest + len(text))
        rows = min(n_query_tiles * longest, max(1, budget // per_row))
        n = max(1, budget // (per_row * max(rows, head_dim)))
        for groups in alike.split(n):
            tiles = tiles_by_group[first[groups, None] + torch.arange(n_query_tiles, device="cpu")]
            queries = rows_of_tile[tiles].flatten(1)
            keys = rows_or_padding[grouped.keys_of(groups)].flatten(1)
            keys = torch.cat([keys, text.expand(len(groups), -1)], dim=1)
            for some in queries.split(rows, dim=1):
                yield some, keys, lie(n_key_tiles)


def _blockwise(
    compute: Callable[..., tuple[Tensor, Tensor]],
    of_queries: Sequence[Tensor],
    of_keys: Sequence[Tensor],
    resolved: ResolvedConfig,
    look: Look,
    dtype: torch.dtype,
    valid: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Attention of some heads that look alike: `compute` on every chunk, with results in the order of the tokens.

    Differentiable: the backward recomputes one chunk after the other.

    Args:
        compute: takes a chunk of each of `of_queries` [heads, n, rows, ...], a chunk of each of `of_keys` [heads, n,
            keys, ...], a mask that broadcasts to [heads, n, rows, keys], True where a key is padding or invalid, or
            None, and how the keys lie in blocks. Returns out [heads, n, rows, D] and lse [heads, n, rows] in `dtype`;
            of rows whose keys are all masked out must be 0, the lse does not matter.
        of_queries, of_keys: tensors [heads, L, ...]; the first of each has D channels.
        valid: bool [heads, L]; None: all tokens are valid.

    Returns out [heads, L, D] and lse [heads, L]; 0 and -inf for invalid queries and for those without keys.
    """
    q, operands = of_queries[0], (*of_queries, *of_keys)
    heads, _, head_dim = q.shape
    out = torch.empty(q.shape, dtype=dtype, device=q.device)
    lse = torch.empty(q.shape[:2], dtype=dtype, device=q.device)

    def compute_chunk(
        queries: Tensor, keys: Tensor, padding: Tensor | None, blocks: _KeyBlocks, *operands: Tensor
    ) -> tuple[Tensor, Tensor]:
        values = [x[:, queries] for x in operands[: len(of_queries)]]
        values += [x[:, keys] for x in operands[len(of_queries) :]]
        if (
            padding is not None
        ):  # or a NaN in the value of a key that is not attended would spread, times zero
            values[-1] = values[-1].masked_fill(padding.mT, 0.0)
        with torch.autocast(queries.device.type, enabled=False):  # the dtypes are part of the contract
            some_out, some_lse = compute(*values, padding, blocks)
        if padding is not None:
            some_lse = some_lse.masked_fill(padding.all(-1), -math.inf)
        return some_out, some_lse

    for queries, keys, blocks in _chunks(resolved, look, heads, head_dim, _budget(q.device)):
        rows, in_use = queries.clamp(min=0).to(q.device), queries >= 0
        padding = (keys < 0)[:, None].to(q.device) if keys.min() < 0 else None
        keys = keys.clamp(min=0).to(q.device)
        if valid is not None:
            unseen = ~valid[:, keys][:, :, None]
            padding = unseen if padding is None else unseen | padding
        if torch.is_grad_enabled() and any(x.requires_grad for x in operands):
            some_out, some_lse = checkpoint(
                *(compute_chunk, rows, keys, padding, blocks, *operands),
                use_reentrant=False,
                preserve_rng_state=False,
            )
        else:
            some_out, some_lse = compute_chunk(rows, keys, padding, blocks, *operands)
        tokens, in_use = queries[in_use].to(q.device), in_use.to(q.device)
        out[:, tokens] = some_out[:, in_use]
        lse[:, tokens] = some_lse[:, in_use]
    if valid is not None:
        out, lse = out.masked_fill(~valid[..., None], 0.0), lse.masked_fill(~valid, -math.inf)
    return out, lse


def _looks(
    resolved: ResolvedConfig, key_tiles: KeyTiles | None, batch: int, heads: int
) -> tuple[list[Look], list[list[int]]]:
    """All that some head of a call looks at, each once, and which of these is that of each [sample][head]."""
    if key_tiles is None or not resolved.geometry.n_video_tiles:
        windows = resolved.windows * (heads if len(resolved.windows) == 1 else 1)
        looks = list(dict.fromkeys(windows))
        return [*looks], [[looks.index(window) for window in windows]] * batch
    lists = key_tiles.ascending()
    distinct, own = lists.flatten(0, 1).unique(dim=0, return_inverse=True)
    return [*distinct], own.view(lists.shape[:2]).expand(batch, heads).tolist()


def _head_slices(
    q: Tensor, resolved: ResolvedConfig, valid: Tensor | None, key_tiles: KeyTiles | None
) -> Iterator[tuple[Look, tuple[Tensor, ...], Tensor | None]]:
    """All heads of q [B, H, L, D], in parts that look alike and whose copies fit in `BUDGET`.

    Yields (what they look at, index into [B, H], `valid` [B, L] at that index or None).
    """
    batch, heads, tokens, head_dim = q.shape
    at_once = max(1, BUDGET // max(1, tokens * head_dim))
    looks, own = _looks(resolved, key_tiles, batch, heads)
    for i, look in enumerate(looks):
        pairs = [(b, h) for b in range(batch) for h in range(heads) if own[b][h] == i]
        for some in torch.tensor(pairs, device="cpu").reshape(-1, 2).split(at_once):
            if len(some):
                index = tuple(some.to(q.device).unbind(1))
                yield look, index, None if valid is None else valid[index[0]]


class _StraightThrough(torch.autograd.Function):
    """`rounded` with the gradient of `x`, as if the derivative of rounding were one."""

    @staticmethod
    def forward(ctx, x, rounded):
        return rounded

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


def _set_up(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: Triple,
    config: AttentionConfig,
    scale: float | None,
    tensor_layout: str,
    prefix_len: int,
    suffix_len: int,
    prefix_valid: Tensor | None,
    suffix_valid: Tensor | None,
    key_tiles: KeyTiles | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, ResolvedConfig, float]:
    """Check the arguments; returns (q, k, v, valid [B, L] or None, resolved, scale).

    q, k and v are heads first, with zeros for invalid tokens.
    """
    counts = prefix_valid, suffix_valid
    check_inputs(q, k, v, grid, tensor_layout, prefix_len, suffix_len, *counts)
    q, k, v = (to_heads_first(x, tensor_layout) for x in (q, k, v))
    config = as_config(config)
    refuse(config.select, IN_REFERENCE)
    check_key_tiles(key_tiles, config, grid, q.shape[0], q.shape[1], q.device)
    resolved = config.resolve(grid, q.shape[1], prefix_len, suffix_len)
    valid = valid_tokens(resolved.geometry, *counts)
    q, k, v = (zero_invalid(x, valid) for x in (q, k, v))
    return q, k, v, valid, resolved, as_scale(scale, q.shape[3])


def _check_fp8(config: AttentionConfig) -> None:
    if as_config(config).quant != "fp8":
        raise ValueError(
            f'config: quant={config.quant!r} has nothing to emulate; use "fp8", or exact_attention'
        )


def _needs_op(q: Tensor) -> bool:
    """Whether the call is traced, or q has no values: then one op stands for the whole computation."""
    return isinstance(q, Tensor) and (torch.compiler.is_compiling() or dispatches(q))


def _call_op(
    kind: str, q: Tensor, k: Tensor, v: Tensor, dtype: torch.dtype | None, grid: Triple, config: AttentionConfig,
    scale: float | None, tensor_layout: str, prefix_len: int, suffix_len: int,
    prefix_valid: Tensor | None, suffix_valid: Tensor | None, key_tiles: KeyTiles | None
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`exact_attention` (kind "exact") or `emulated_attention` ("emulated") by the op of reference_op.py."""
    lengths, counts = (prefix_len, suffix_len), (prefix_valid, suffix_valid)
    check_inputs(q, k, v, grid, tensor_layout, *lengths, *counts)
    batch, heads, _, head_dim = to_heads_first(q, tensor_layout).shape
    config = as_config(config)
    refuse(config.select, IN_REFERENCE)
    check_key_tiles(key_tiles, config, grid, batch, heads, q.device)
    if not torch.compiler.is_compiling():  # in a graph, the op checks it
        config.resolve(grid, heads, *lengths)
    return torch.ops.fpsattention.reference(
        *(q, k, v, *counts, *tensors_of(key_tiles), list(grid), lengths, config.spec),
        *(as_scale(scale, head_dim), tensor_layout, kind, dtype),
    )


def _scores(
    q8: Tensor, q_scale: Tensor, k8: Tensor, k_scale: Tensor, scale: float, padding: Tensor | None
) -> Tensor:
    """z [..., rows, keys]: scores times log2(e); -inf where `padding` is True."""
    z = q8 @ k8.mT
    z *= (q_scale * (scale * LOG2E))[..., None]
    z *= k_scale[..., None, :]
    if padding is not None:
        z.masked_fill_(padding, -math.inf)
    return z


def _total(p: Tensor, padding: Tensor | None) -> Tensor:
    """[..., rows]: the sum of p [..., rows, keys]; 1 for a row whose keys are all `padding`."""
    total = p.sum(-1)
    return total if padding is None else total.masked_fill(padding.all(-1), 1.0)


def _lse_of_mean(q: Tensor, k_mean: Tensor, scale: float) -> Tensor:
    """[heads, L]: the lse of q [heads, L, D] that smoothing removes by subtracting k_mean [heads, 1, D]."""
    return scale * (q * k_mean).sum(-1)


def exact_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    grid: Triple,
    config: AttentionConfig,
    scale: float | None = None,
    tensor_layout: str = "NHD",
    dtype: torch.dtype = torch.float64,
    prefix_len: int = 0,
    suffix_len: int = 0,
    prefix_valid: Tensor | None = None,
    suffix_valid: Tensor | None = None,
    key_tiles: KeyTiles | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention under the config's window or over lists of key tiles, without rounding to FP8.

    Differentiable; the backward recomputes block by block.

    Text tokens precede the video tokens (the prefix) and follow them (the suffix). Every query attends their keys, and
    their queries attend every key, whatever the window. In each section the first tokens are valid, as many as
    `prefix_valid` and `suffix_valid` say. Invalid tokens have no effect on others; their out is 0, their lse -inf and
    their gradients are 0.

    Args:
        q, k, v: [B, L, H, D] ("NHD") or [B, H, L, D] ("HND"), L = prefix_len + T * H * W + suffix_len in this order,
            the grid in raster order.
        grid: tokens (T, H, W).
        config: tile, window and border are used; quant, quant_tile and smooth_k do not apply here.
        scale: factor of the scores before softmax, positive; None: D ** -0.5.
        tensor_layout: "NHD" or "HND".
        dtype: float32 or float64, for the arithmetic and the results.
        prefix_len, suffix_len: text tokens in every sample.
        prefix_valid, suffix_valid: int32 [B] on the device of q, the number of valid tokens of the section in each
            sample, from 0 to its length; None: all. A count out of range is an error on the CPU outside torch.compile,
            and clamped elsewhere.
        key_tiles: the tiles that each tile of the grid attends, in place of a window: config.window must be None. See
            `fpsattention.KeyTiles`.

    Returns out, like q but of `dtype`, and lse [B, H, L] of `dtype`, natural logarithm.
    Raises TypeError or ValueError that name the argument.
    """
    _check_dtype(dtype)
    call = grid, config, scale, tensor_layout, prefix_len, suffix_len, prefix_valid, suffix_valid, key_tiles
    if _needs_op(q):
        return _call_op("exact", q, k, v, dtype, *call)
    q, k, v, valid, resolved, factor = _set_up(q, k, v, *call)

    def compute(
        q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None, _: _KeyBlocks
    ) -> tuple[Tensor, Tensor]:
        scores = _exact_product(q * factor, k.mT)
        if padding is not None:
            scores.masked_fill_(padding, -math.inf)
        shift = scores.detach().amax(-1, keepdim=True)
        shift = shift.masked_fill(shift == -math.inf, 0.0)  # of a row without keys
        p = scores.sub_(shift).exp_()
        l = _total(p, padding)  # noqa: E741
        return _exact_product(p, v) / l[..., None], shift[..., 0] + l.log()

    out = torch.empty(q.shape, dtype=dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=dtype, device=q.device)
    for look, heads, some_valid in _head_slices(q, resolved, valid, key_tiles):
        of_queries, *of_keys = (x[heads].to(dtype) for x in (q, k, v))
        out[heads], lse[heads] = _blockwise(
            compute, (of_queries,), of_keys, resolved, look, dtype, some_valid
        )
    return to_heads_first(out, tensor_layout), lse


def emulated_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    grid: Triple,
    config: AttentionConfig,
    scale: float | None = None,
    tensor_layout: str = "NHD",
    dtype: torch.dtype | None = None,
    prefix_len: int = 0,
    suffix_len: int = 0,
    prefix_valid: Tensor | None = None,
    suffix_valid: Tensor | None = None,
    key_tiles: KeyTiles | None = None,
) -> tuple[Tensor, Tensor]:
    """The FP8 contract: the arithmetic of the kernels, with the same roundings (arXiv 2506.04648, section 3).

    Let z = q8.k8 * s_q * s_k * scale * log2(e), and m = ceil(max z) over the keys of a row in one key block (128 rows
    of a slot). No exponential is evaluated: bit patterns of E4M3 are a piecewise linear logarithm, 8 codes an octave.

        code = clamp(round(120 + 8 (z - m)), 0, 126)        P = the E4M3 number with this bit pattern, 256 for z = m
        l = sum 2^m P        out = sum 2^m P v8 s_v / l        lse = ln(2) * (log2 l - 8 - b)

    The sums are over all keys, m is that of a key's block, and l sums the rounded P, so that rows of out are averages
    exactly. b = -log2(2 ln(2)^2) = 0.0575 is log2 of the mean of P / 2^(z - m + 8) over an octave of z.

    Differentiable any number of times. The backward recomputes block by block (arXiv 2307.08691); its fp32 products
    follow torch's TF32 setting. Roundings are straight-through: their derivative is one (that of 2^z for a code), and
    scales, m and K's mean are constants. (Without rounding, smoothing has no effect, so K's mean needs no gradient.)
    With x^ = x8 * s_x, p = 2^m P / l, delta = rowsum(dO * out) - dlse and dS = p * (dO v^.T - delta):

        dV = p.T dO        dK = scale * dS.T q^        dQ = scale * (dS k^ + dlse * k_mean)

    Args:
        q, k, v: [B, L, H, D] ("NHD") or [B, H, L, D] ("HND"), L = prefix_len + T * H * W + suffix_len in this order,
            the grid in raster order; of a dtype in `DTYPES`.
        grid: tokens (T, H, W).
        config: tile, window and rounding; `quant` must be "fp8".
        scale: factor of the scores before softmax, positive; None: D ** -0.5.
        tensor_layout: "NHD" or "HND".
        dtype: float32 or float64, for the arithmetic and the results; the roundings stay. None: as in the kernels, fp32
            arithmetic and lse, and out in the dtype of q.
        prefix_len, suffix_len, prefix_valid, suffix_valid, key_tiles: as in `exact_attention`. Scales and K's mean come
            from valid tokens. A text tile (`fpsattention.core.geometry.TileGeometry`) has a scale of its own.

    Returns out, like q, and lse fp32 [B, H, L], natural logarithm; both in `dtype` if it is given.
    Raises TypeError or ValueError that name the argument.
    """
    if dtype is not None:
        _check_dtype(dtype)
    _check_fp8(config)
    call = grid, config, scale, tensor_layout, prefix_len, suffix_len, prefix_valid, suffix_valid, key_tiles
    if _needs_op(q):
        return _call_op("emulated", q, k, v, dtype, *call)
    q, k, v, valid, resolved, factor = _set_up(q, k, v, *call)
    out = torch.empty(q.shape, dtype=dtype or q.dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=dtype or torch.float32, device=q.device)
    for look, heads, some_valid in _head_slices(q, resolved, valid, key_tiles):
        some = q[heads], k[heads], v[heads]
        some_out, some_lse = _emulate_heads(*some, resolved, look, factor, lse.dtype, some_valid)
        out[heads] = some_out.to(out.dtype)
        lse[heads] = some_lse
    return to_heads_first(out, tensor_layout), lse


def _emulate_heads(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    resolved: ResolvedConfig,
    look: Look,
    scale: float,
    dtype: torch.dtype,
    valid: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`emulated_attention` of heads q, k, v [heads, L, D] that look alike: out and lse [heads, L] in `dtype`."""
    with torch.no_grad():
        x = _quantize(q[:, None], k[:, None], v[:, None], resolved, valid)
        q_scale, k_scale = (s[:, 0, x.tile_of_token].to(dtype) for s in (x.q_scale, x.k_scale))
        v_scale = x.v_scale[:, 0, x.block_of_token].to(dtype)
        v_rounded = x.v8[:, 0].to(dtype) * v_scale[..., None]
    q8, k8 = (
        _StraightThrough.apply(t.to(dtype) / s[..., None], t8[:, 0].to(dtype))
        for t, t8, s in ((q, x.q8, q_scale), (k, x.k8, k_scale))
    )
    of_keys = k8, k_scale, _StraightThrough.apply(v.to(dtype), v_rounded)
    compute = partial(_emulate_chunk, scale)
    out, lse = _blockwise(compute, (q8, q_scale), of_keys, resolved, look, dtype, valid)
    if x.k_mean is not None:
        of_mean = _lse_of_mean(q.to(dtype), x.k_mean, scale)
        lse = lse + of_mean.masked_fill(lse == -math.inf, 0.0)  # no gradient where there is no key
    return out, lse


def _emulate_chunk(
    scale: float,
    q8: Tensor,
    q_scale: Tensor,
    k8: Tensor,
    k_scale: Tensor,
    v: Tensor,
    padding: Tensor | None,
    blocks: _KeyBlocks,
) -> tuple[Tensor, Tensor]:
    """out and lse of one chunk, as `_blockwise` asks for."""
    z = _scores(q8, q_scale, k8, k_scale, scale, padding)
    p, m = _probabilities(z.detach(), blocks)
    if z.requires_grad:
        p = p * (z - z.detach()).masked_fill(z == -math.inf, 0.0).exp2()  # one, with the derivative of 2^z
    l = _total(p, padding)  # noqa: E741
    log2_top = TOP_CODE / CODES - 7  # 2^8 is the number with the top code
    out = _exact_product(p / l[..., None], v)  # in this order, because P times a large V may overflow fp32
    return out, math.log(2) * (m + l.log2() - log2_top - LOG2_BIAS)


def _probabilities(z: Tensor, blocks: _KeyBlocks) -> tuple[Tensor, Tensor]:
    """(2^(m - M) P [..., keys], M [...]) of z [..., keys]: m is of a key's block, M is the largest m of the row."""
    p, views = torch.empty_like(z), blocks.of(z)
    tops = [view.amax(-1).ceil() for view in views]
    largest = torch.cat(tops, dim=-1).amax(-1)
    largest = largest.masked_fill(largest == -math.inf, 0.0)  # a row may have no keys
    for view, top, to in zip(views, tops, blocks.of(p), strict=True):
        m = top.masked_fill(top == -math.inf, 0.0)[..., None]  # a block may hold padding only
        code = (TOP_CODE + CODES * (view - m)).round_().clamp_(0, 126)
        number = code.to(torch.uint8).view(torch.float8_e4m3fn).to(z.dtype)
        torch.mul(number, (top - largest[..., None]).exp2()[..., None], out=to)
        to.masked_fill_(code.isnan(), math.nan)  # which has no code
    return p, largest


def _to_bf16(x: Tensor) -> Tensor:
    """fp32 x rounded to bf16. The product of two such numbers is exact in fp32."""
    return x.bfloat16().float()


def _mantissa_and_power(scale: Tensor) -> tuple[Tensor, Tensor]:
    """m and 2^e of scale = 2^e m, with m in [1, 2)."""
    mantissa, exponent = torch.frexp(scale)
    return 2 * mantissa, torch.ldexp(torch.ones_like(scale), exponent - 1)


def _number_of_code(z: Tensor, m: Tensor) -> Tensor:
    """2^-m times the forward's P, for the same z; without E4M3's limits of range. m is an integer."""
    code = (CODES * z).round_().sub_(CODES * m)
    octave = (code / CODES).floor_()
    number = (code - CODES * octave).div_(CODES).add_(1).mul_(octave.exp2())
    return number.masked_fill_(z == -math.inf, 0.0)


@torch.no_grad()
def emulated_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor | None = None,
    *,
    grid: Triple,
    config: AttentionConfig,
    scale: float | None = None,
    tensor_layout: str = "NHD",
    prefix_len: int = 0,
    suffix_len: int = 0,
    prefix_valid: Tensor | None = None,
    suffix_valid: Tensor | None = None,
    key_tiles: KeyTiles | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of `emulated_attention` as the kernels compute it, with the same 16-bit roundings.

    The method is that of arXiv 2506.04648, section 3, recomputed block by block from the lse (arXiv 2307.08691, section
    3.2). Let z be as in the forward, lse2 the lse in log2 units without the share that smoothing adds to it, M =
    ceil(lse2) and c = 2^(M - lse2 - b). A probability is x * c with x = 2^-M P, where the code of P is round(8 z), any
    octave. This is the forward's P, but for keys that underflow in their block. c is applied once per query:
    dO' = bf16(c * dO), delta' = c * (rowsum(dO * out) - dlse). Scales are 2^e m with m in [1, 2): an E4M3 number times
    2^e is exact in bf16, and dS takes m. With q' = 2^e_q q8, and k' and v' likewise,

        dP' = m_v dO' v'.T              dS' = bf16(x * bf16(m_q m_k (dP' - delta')))
        dV = x.T dO'                    dK = scale * dS'.T q' / m_k
        dQ = scale * (dS' k' / m_q + dlse * k_mean)

    The 16-bit type is bf16, also for fp16 inputs, and holds x exactly; everything else is fp32.

    Args:
        q, k, v: [B, L, H, D] ("NHD") or [B, H, L, D] ("HND"), as in the forward.
        out, lse: the results of the forward, like q and fp32 [B, H, L].
        dout, dlse: their gradients; None for dlse: zero.
        grid, config, scale, tensor_layout, prefix_len, suffix_len, prefix_valid, suffix_valid, key_tiles: as in the
            forward.

    Returns dq, dk, dv, like q.
    Raises TypeError or ValueError that name the argument.
    """
    _check_fp8(config)
    check_values("q", q)
    call = grid, config, scale, tensor_layout, prefix_len, suffix_len, prefix_valid, suffix_valid, key_tiles
    q, k, v, valid, resolved, factor = _set_up(q, k, v, *call)
    for name, x in (("out", out), ("dout", dout)):
        check_tensor(name, x, tensor_layout)
    out, dout = (to_heads_first(x, tensor_layout) for x in (out, dout))
    dlse = torch.zeros(q.shape[:3], device=q.device) if dlse is None else dlse
    _check_results(q, out, lse, dout, dlse)
    idle = lse == -math.inf  # queries without keys and invalid ones contribute no gradient
    if valid is not None:
        idle = idle | ~valid[:, None]
    out, dout = (x.masked_fill(idle[..., None], 0.0) for x in (out, dout))
    lse, dlse = (x.masked_fill(idle, 0.0) for x in (lse, dlse))
    dq, dk, dv = (torch.empty(q.shape, dtype=q.dtype, device=q.device) for _ in range(3))
    for look, heads, some_valid in _head_slices(q, resolved, valid, key_tiles):
        some, results = (q[heads], k[heads], v[heads]), (out[heads], lse[heads])
        derivatives = dout[heads], dlse[heads]
        gradients = _backward_of_heads(*some, *results, *derivatives, resolved, look, factor, some_valid)
        dq[heads], dk[heads], dv[heads] = (x.to(q.dtype) for x in gradients)
    return (
        to_heads_first(dq, tensor_layout),
        to_heads_first(dk, tensor_layout),
        to_heads_first(dv, tensor_layout),
    )


def _check_results(q: Tensor, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor) -> None:
    """Check results of the forward and their gradients against q; all are heads first."""
    for name, x, shape in (
        ("out", out, q.shape),
        ("lse", lse, q.shape[:3]),
        ("dout", dout, q.shape),
        ("dlse", dlse, q.shape[:3]),
    ):
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise TypeError(f"{name}: must be a floating-point tensor, got {kind_of(x)}")
        if x.shape != shape or x.device != q.device:
            raise ValueError(
                f"{name}: shape {shown(list(x.shape))}, heads first, on {x.device}, must be {list(shape)} on {q.device}"
            )


def _backward_of_heads(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor,
    resolved: ResolvedConfig, look: Look, scale: float, valid: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`emulated_backward` of heads [heads, L, D] that look alike: dq, dk, dv in fp32."""
    x = _quantize(q[:, None], k[:, None], v[:, None], resolved, valid)
    q_scale, k_scale = (s[:, 0, x.tile_of_token] for s in (x.q_scale, x.k_scale))
    (q_mantissa, q_power), (k_mantissa, k_power), (v_mantissa, v_power) = (
        _mantissa_and_power(s) for s in (q_scale, k_scale, x.v_scale[:, 0, x.block_of_token])
    )
    q16, k16, v16 = (
        t[:, 0].float() * s[..., None] for t, s in ((x.q8, q_power), (x.k8, k_power), (x.v8, v_power))
    )
    out, lse, dout, dlse = (t.float() for t in (out, lse, dout, dlse))
    if x.k_mean is not None:
        lse = lse - _lse_of_mean(q.float(), x.k_mean, scale)
    lse2 = lse * LOG2E
    m = lse2.ceil()
    c = (m - lse2 - LOG2_BIAS).exp2()
    dout16 = _to_bf16(c[..., None] * dout)
    delta = c * ((dout * out).sum(-1) - dlse)

    of_queries = (x.q8[:, 0].float(), q_scale, q16, q_mantissa, m, dout16, delta)
    of_keys = (x.k8[:, 0].float(), k_scale, k16, k_mantissa, v16, v_mantissa)
    dq, dk, dv = (torch.zeros_like(t) for t in (q16, k16, v16))
    heads, _, head_dim = q16.shape
    for queries, keys, _ in _chunks(resolved, look, heads, head_dim, _budget(q.device)):
        queries, keys = queries.to(q.device), keys.to(q.device)
        rows, seen = queries >= 0, keys >= 0
        q8, s_q, q_, m_q, m_, do, d = (t[:, queries.clamp(min=0)] for t in of_queries)
        k8, s_k, k_, m_k, v_, m_v = (t[:, keys.clamp(min=0)] for t in of_keys)
        unseen = ~(rows[..., None] & seen[:, None])
        if valid is not None:
            unseen = unseen | ~valid[:, keys.clamp(min=0)][:, :, None]
        with torch.autocast(queries.device.type, enabled=False):
            z = _scores(q8, s_q, k8, s_k, scale, unseen)
            p = _number_of_code(z, m_[..., None])
            scales = m_q[..., None] * m_k[..., None, :]
            ds = _to_bf16(p * _to_bf16(scales * (do @ v_.mT * m_v[..., None, :] - d[..., None])))
            dq[:, queries[rows]] = (ds @ k_ / m_q[..., None])[:, rows]
            dk.index_add_(1, keys[seen], (ds.mT @ q_ / m_k[..., None])[:, seen])
            dv.index_add_(1, keys[seen], (p.mT @ do)[:, seen])

    if x.k_mean is not None:
        dq += dlse[..., None] * x.k_mean
    return scale * dq, scale * dk, dv
