"""Attention on the compiled kernels: calls resolved once, their launches, and the `torch.library` ops.

`quantize` rounds Q, K and V to packed operands, `attend` attends over those, `attention` does both and is
differentiable: `attention_backward` is its gradient. Each is an op of torch (`torch.ops.fpsattention`), so that
torch.compile and autograd see one node. A call that nothing watches (`is_watched`) skips the op: torch's dispatch would
take as long as the launches. Launches use the current stream of the tensors' device, never synchronise, and allocate
through torch only, so that CUDA graphs capture them. NVTX ranges bear the names of quantize, attend and
attention_backward.

The packed operands of a call are one buffer of bytes with the sections of `Sections`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple, cast

import torch
from torch import Tensor

from .. import _C
from .checks import Triple, heads_first, shown
from .config import AttentionConfig, ResolvedConfig
from .geometry import brick_count, slot_of, text_tiles, tiles_per_axis
from .planning import ranked
from .support import DTYPES, kernel_obstacle
from .tile_lists import in_order_of_work, transposed


class Sections(NamedTuple):
    """Offsets in bytes of the sections of packed operands, in their order; an absent section is empty.

    q_blocks and kv_blocks are the packed blocks of include/fpsattention/params.h. Everything from q_amax up to
    lse_shift is zeroed before the first kernel.
    """

    q_blocks: int  # uint8 [B, H, query blocks, q_block_bytes]
    kv_blocks: int  # uint8 [B, H, key blocks, kv_block_bytes]
    k_mean: int  # fp32 [B, H, D], with smooth_k
    q_amax: int  # fp32 [B, H, bricks], scratch of bricks of several tiles
    k_amax: int
    next_item: int  # int32 [1], the work counter of the forward that follows at once
    lse_shift: int  # fp32 [B, H, L], with smooth_k
    end: int

    @classmethod
    def of(cls, heads: int, head_dim: int, tokens: int, rows: int, bricks: int, smooth_k: bool) -> Sections:
        """Sections of `heads` heads in all samples, each of `rows` rows in slots. Sizes may be symbols."""
        sizes = {
            "q_blocks": heads * (rows // _C.QUERY_BLOCK * _C.q_block_bytes(head_dim)),
            "kv_blocks": heads * (rows // _C.BLOCK * _C.kv_block_bytes(head_dim)),
            "k_mean": heads * 4 * head_dim if smooth_k else 0,
            "q_amax": heads * 4 * bricks,
            "k_amax": heads * 4 * bricks,
            "next_item": 4,
            "lse_shift": heads * 4 * tokens if smooth_k else 0,
        }
        offset, offsets = 0, {}
        for name, size in sizes.items():
            offsets[name] = offset
            offset = offset + size
        return cls(**offsets, end=offset)


@dataclass(frozen=True, eq=False)
class Call:
    """One call, resolved: all that its launches need beside tensors. Get one from `call_of`, which caches.

    Attributes:
        resolved: grid, tile, windows, rounding and text lengths.
        batch, heads, head_dim: of Q, K and V.
        dtype: of Q, K, V, out and the gradients.
        scale: of the scores before softmax.
        tensor_layout: "NHD" or "HND".
    """

    resolved: ResolvedConfig
    batch: int
    heads: int
    head_dim: int
    dtype: torch.dtype
    scale: float
    tensor_layout: str

    @cached_property
    def shape(self) -> tuple[int, int, int, int]:
        """Of q, k, v, out and the gradients."""
        tokens = self.resolved.geometry.n_tokens
        return heads_first((self.batch, self.heads, tokens, self.head_dim), self.tensor_layout)

    @cached_property
    def lse_shape(self) -> tuple[int, int, int]:
        return self.batch, self.heads, self.resolved.geometry.n_tokens

    @cached_property
    def strides(self) -> Triple:
        """(batch, head, token) strides of a contiguous tensor of `shape`, in elements."""
        _, second, third, d = self.shape
        batch, head, token, _ = heads_first((second * third * d, third * d, d, 1), self.tensor_layout)
        return batch, head, token

    @property
    def token_dim(self) -> int:
        return 1 if self.tensor_layout == "NHD" else 2

    @cached_property
    def query_blocks(self) -> int:
        """64-row blocks of one head, those of padding included."""
        return self.resolved.geometry.n_rows // _C.QUERY_BLOCK

    @cached_property
    def key_blocks(self) -> int:
        """128-row blocks of one head, those of padding included."""
        return self.resolved.geometry.n_rows // _C.BLOCK

    @cached_property
    def sections(self) -> Sections:
        """Of the packed operands."""
        geometry, smooth_k = self.resolved.geometry, self.resolved.smooth_k
        coarse = self.resolved.quant_tile != self.resolved.tile
        bricks = geometry.n_bricks(self.resolved.quant_tile) if coarse else 0
        n_heads = self.batch * self.heads
        return Sections.of(n_heads, self.head_dim, geometry.n_tokens, geometry.n_rows, bricks, smooth_k)

    @cached_property
    def is_empty(self) -> bool:
        """Whether there is nothing to compute."""
        return math.prod(self.shape) == 0

    @cached_property
    def _params(self) -> _C.CallParams:
        geometry = self.resolved.geometry
        return _C.CallParams(
            _C.TileGrid(geometry.grid, geometry.tile, geometry.prefix_len, geometry.suffix_len),
            batch=self.batch,
            heads=self.heads,
            head_dim=self.head_dim,
            dtype=DTYPES[self.dtype],
            scale=self.scale,
        )

    # Each launch sets its addresses in a copy of one of these.

    @cached_property
    def quantize_params(self) -> _C.QuantizeParams:
        params = _C.QuantizeParams(self._params)
        params.brick = self.resolved.brick
        return params

    @cached_property
    def forward_params(self) -> _C.ForwardParams:
        params = _C.ForwardParams(self._params, self.resolved.windows, self.resolved.truncate)
        params.out_strides = self.strides
        return params

    @cached_property
    def backward_params(self) -> _C.BackwardParams:
        params = _C.BackwardParams(self._params, self.resolved.windows, self.resolved.truncate)
        params.out_strides = params.dq_strides = params.dk_strides = params.dv_strides = self.strides
        return params


class BackwardScratch(NamedTuple):
    """Offsets in bytes of what the backward needs for itself. Everything before query_operands starts at zero."""

    dq_sum: int  # fp32 [B, H, query blocks, 64 * D]
    turns: int  # int32 [B, H, query blocks], if the order of dQ's sums is fixed
    next_item: int  # int32, likewise
    query_operands: int  # uint8 [B, H, query blocks, bwd_query_bytes]
    end: int

    @classmethod
    def of(cls, call: Call, deterministic: bool) -> BackwardScratch:
        queries = call.batch * call.heads * call.query_blocks
        turns = queries * 4 * _C.QUERY_BLOCK * call.head_dim
        next_item = turns + (4 * queries if deterministic else 0)
        # The copies of the operands need 16 bytes of alignment.
        query_operands = -(-(next_item + (4 if deterministic else 0)) // 16) * 16
        end = query_operands + queries * _C.bwd_query_bytes(call.head_dim)
        return cls(0, turns, next_item, query_operands, end)


@lru_cache(maxsize=1024)
def call_of(
    config: AttentionConfig, grid: Triple, prefix_len: int, suffix_len: int, batch: int, heads: int,
    head_dim: int, dtype: torch.dtype, scale: float, tensor_layout: str
) -> Call:  # fmt: skip
    """The `Call` of a config for these sizes. Cached.

    Raises ValueError for a head_dim or dtype that the kernels do not take, and as `AttentionConfig.resolve` does.
    """
    if obstacle := kernel_obstacle(dtype, head_dim):
        raise ValueError(obstacle)
    if config.quant != "fp8":
        raise ValueError(f'config: quant={config.quant!r} does not run on the sm90 kernels; use quant="fp8"')
    resolved = config.resolve(grid, heads, prefix_len, suffix_len)
    return Call(resolved, batch, heads, head_dim, dtype, scale, tensor_layout)


class NormRope(NamedTuple):
    """Norm and rotary embedding ahead of the rounding: arguments of `fpsattention.norm_rope`, of q and of k.

    Attributes:
        weights, text_weights, biases: of q and of k; none for no norm, for the same weights, for an RMSNorm.
        rope: three tables, one table, or none.
    """

    weights: Sequence[Tensor]
    text_weights: Sequence[Tensor]
    biases: Sequence[Tensor]
    eps: float
    rope: Sequence[Tensor]


# What eager calls and the ops' CUDA implementations run. Tensors have been checked.


def launch_quantize(
    call: Call, q: Tensor, k: Tensor, v: Tensor, prefix_valid: Tensor | None, suffix_valid: Tensor | None,
    norm_rope: NormRope | None = None, with_lse: bool = True
) -> Tensor:  # fmt: skip
    """Packed operands, uint8 [bytes], of Q, K and V (arXiv 2506.04648, section 3.1).

    Without `with_lse` they serve calls that want no LSE.

    Raises ValueError for strides or an alignment that the kernels do not take.
    """
    at = call.sections
    packed = q.new_empty(at.end, dtype=torch.uint8)
    if call.is_empty:
        return packed.zero_()
    params = _C.QuantizeParams(call.quantize_params)
    scratch = _set_counts(params, prefix_valid, suffix_valid)  # alive until the launch
    params.q, params.k, params.v = q.data_ptr(), k.data_ptr(), v.data_ptr()
    params.q_strides = _strides("q", q, call)
    params.k_strides = _strides("k", k, call)
    params.v_strides = _strides("v", v, call)
    base = packed.data_ptr()
    params.q_blocks, params.kv_blocks = base + at.q_blocks, base + at.kv_blocks
    params.zeroed = base + at.q_amax, at.lse_shift - at.q_amax
    if at.k_amax != at.q_amax:
        params.q_amax, params.k_amax = base + at.q_amax, base + at.k_amax
    if call.resolved.smooth_k:
        chunks = _C.quantize_chunks(call.resolved.geometry.n_tokens)
        k_sum = q.new_empty((call.batch, call.heads, chunks, call.head_dim), dtype=torch.float32)
        scratch.append(k_sum)
        params.k_sum, params.k_mean = k_sum.data_ptr(), base + at.k_mean
        if with_lse:
            params.lse_shift = base + at.lse_shift
    if norm_rope is not None:
        scratch += _set_norm_rope(params.norm_rope, norm_rope, call, q)
    _launch(_C.quantize, "fpsattention::quantize", params, q.device)
    return packed


def launch_attend(
    call: Call, packed: Tensor, prefix_valid: Tensor | None, suffix_valid: Tensor | None,
    key_indices: Tensor | None, key_counts: Tensor | None, with_lse: bool = True, fresh: bool = False
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """(out, lse) of packed operands under the call's windows (arXiv 2506.04648, Eq. 2), or under lists of key tiles
    (`fpsattention.KeyTiles`); lse is None without `with_lse`.

    `fresh`: nothing has attended over the operands yet, so their work counter is still zero.
    """
    out = packed.new_empty(call.shape, dtype=call.dtype)
    lse = packed.new_empty(call.lse_shape, dtype=torch.float32) if with_lse else None
    if call.is_empty:
        return out, lse
    _fill_text(call, out, 0.0, call.token_dim, prefix_valid, suffix_valid)
    if lse is not None:
        _fill_text(call, lse, -math.inf, 2, prefix_valid, suffix_valid)
    at, base = call.sections, packed.data_ptr()
    params = _C.ForwardParams(call.forward_params)
    counts = _set_counts(params, prefix_valid, suffix_valid)  # noqa: F841  alive until the launch
    params.q_blocks, params.kv_blocks = base + at.q_blocks, base + at.kv_blocks
    if call.resolved.smooth_k:
        params.lse_shift = base + at.lse_shift
    params.out = out.data_ptr()
    if lse is not None:
        params.lse = lse.data_ptr()
    if key_indices is not None and key_counts is not None:
        lists = in_order_of_work(key_indices, key_counts)  # alive until the launch
        params.keys = lists.fields
    next_item = None if fresh else packed.new_zeros(1, dtype=torch.int32)
    params.next_item = base + at.next_item if next_item is None else next_item.data_ptr()
    _launch(_C.attn_fwd, "fpsattention::attend", params, packed.device)
    return out, lse


def launch_attention(
    call: Call, q: Tensor, k: Tensor, v: Tensor, prefix_valid: Tensor | None, suffix_valid: Tensor | None,
    key_indices: Tensor | None, key_counts: Tensor | None, with_lse: bool = True
) -> tuple[Tensor, Tensor | None, Tensor]:  # fmt: skip
    """(out, lse, packed operands) of Q, K and V; lse is None without `with_lse`."""
    packed = launch_quantize(call, q, k, v, prefix_valid, suffix_valid, with_lse=with_lse)
    lists = key_indices, key_counts
    out, lse = launch_attend(call, packed, prefix_valid, suffix_valid, *lists, with_lse, fresh=True)
    return out, lse, packed


def launch_backward(
    call: Call, dout: Tensor, dlse: Tensor, out: Tensor, lse: Tensor, packed: Tensor,
    prefix_valid: Tensor | None, suffix_valid: Tensor | None, key_indices: Tensor | None,
    key_counts: Tensor | None, deterministic: bool
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dq, dk, dv) of `launch_attend`'s out and lse. Raises ValueError for a dout that cannot be laid out."""
    dq, dk, dv = (torch.empty_like(out) for _ in range(3))
    if call.is_empty:
        return dq, dk, dv
    for gradient in (dq, dk, dv):
        _fill_text(call, gradient, 0.0, call.token_dim, prefix_valid, suffix_valid)
    dout, dlse = _loadable(dout, call), dlse.contiguous()
    in_scratch = BackwardScratch.of(call, deterministic)
    scratch = out.new_empty(in_scratch.end, dtype=torch.uint8)
    at, base, first = call.sections, packed.data_ptr(), scratch.data_ptr()
    params = _C.BackwardParams(call.backward_params)
    counts = _set_counts(params, prefix_valid, suffix_valid)  # noqa: F841  alive until the launch
    params.q_blocks, params.kv_blocks = base + at.q_blocks, base + at.kv_blocks
    if call.resolved.smooth_k:
        params.lse_shift, params.k_mean = base + at.lse_shift, base + at.k_mean
    params.out, params.dout = out.data_ptr(), dout.data_ptr()
    params.dout_strides = _strides("dout", dout, call)
    params.lse, params.dlse = lse.data_ptr(), dlse.data_ptr()
    params.dq_sum, params.zeroed = first + in_scratch.dq_sum, (first, in_scratch.query_operands)
    if deterministic:
        params.turns, params.next_item = first + in_scratch.turns, first + in_scratch.next_item
    params.query_operands = first + in_scratch.query_operands
    if key_indices is not None and key_counts is not None:
        lists = transposed(key_indices, key_counts, raster_order=deterministic)  # alive until the launch
        params.keys, params.queries = lists.keys.fields, lists.queries.fields
        params.places = lists.places.data_ptr()
    params.dq, params.dk, params.dv = dq.data_ptr(), dk.data_ptr(), dv.data_ptr()
    _launch(_C.attn_bwd, "fpsattention::attention_backward", params, out.device)
    return dq, dk, dv


def _launch(kernels: Callable, name: str, params: _C.CallParams, device: torch.device) -> None:
    """Launch on the device's current stream, in an NVTX range of this name."""
    # As torch's own generated code does: torch.cuda.current_stream() makes an object, in as long as a launch takes.
    stream = torch._C._cuda_getCurrentRawStream(device.index)
    torch.cuda.nvtx.range_push(name)
    try:
        kernels(params, device.index, stream)
    finally:
        torch.cuda.nvtx.range_pop()


def _set_counts(
    params: _C.CallParams, prefix_valid: Tensor | None, suffix_valid: Tensor | None
) -> list[Tensor]:
    """Set the counts of valid text tokens; returns the tensors that hold them."""
    held = []
    if prefix_valid is not None:
        held.append(prefix_valid.contiguous())
        params.prefix_valid = held[-1].data_ptr()
    if suffix_valid is not None:
        held.append(suffix_valid.contiguous())
        params.suffix_valid = held[-1].data_ptr()
    return held


def _set_norm_rope(params: _C.NormRope, norm_rope: NormRope, call: Call, q: Tensor) -> list[Tensor]:
    """Set norm and rotation; returns the tensors that hold their tables."""
    held: list[Tensor] = []

    def addresses(tensors: Sequence[Tensor]) -> tuple[int, int]:
        """Of these tensors in fp32, which are of q and of k."""
        held.extend(x.to(torch.float32).contiguous() for x in tensors)
        q_address, k_address = (x.data_ptr() for x in held[-2:])
        return q_address, k_address

    params.eps = norm_rope.eps
    if norm_rope.weights:
        params.weights = addresses(norm_rope.weights)
        params.per_head = held[-1].numel() == call.head_dim
        if not params.per_head:
            tokens = call.resolved.geometry.n_tokens
            params.inverse_rms = addresses(q.new_empty((2, call.batch, tokens), dtype=torch.float32).unbind())
    if norm_rope.text_weights:
        params.text_weights = addresses(norm_rope.text_weights)
    if norm_rope.biases:
        params.biases = addresses(norm_rope.biases)
    if norm_rope.rope:
        first, *others = norm_rope.rope
        if others:
            params.pairs = [x.shape[1] for x in norm_rope.rope]
            table = torch.cat([x.to(torch.float32).flatten() for x in norm_rope.rope])
        else:
            params.rope_heads, params.pairs = first.shape[1], (first.shape[2], 0, 0)
            table = first.to(torch.float32).contiguous()
            table = (
                table if table.data_ptr() % 8 == 0 else table.clone()
            )  # the kernel loads cosine and sine together
        held.append(table)
        params.rope = table.data_ptr()
    return held


def _fill_text(
    call: Call, x: Tensor, value: float, dim: int, prefix_valid: Tensor | None, suffix_valid: Tensor | None
) -> None:
    """Fill the text sections of x, along `dim`, where some tokens may be invalid: no kernel writes those rows."""
    prefix, suffix = call.resolved.prefix_len, call.resolved.suffix_len
    if prefix_valid is not None:
        x.narrow(dim, 0, prefix).fill_(value)
    if suffix_valid is not None:
        x.narrow(dim, x.shape[dim] - suffix, suffix).fill_(value)


def _strides(name: str, x: Tensor, call: Call) -> Triple:
    """(batch, head, token) strides of x in elements. Raises ValueError unless the kernels can load 16 bytes at a
    time.
    """
    batch, head, token, channel = heads_first(x.stride(), call.tensor_layout)
    address, size = x.data_ptr(), x.element_size()
    if channel == 1 and (address | size * batch | size * head | size * token) % 16 == 0:
        return batch, head, token
    if channel != 1 and x.shape[3] > 1:
        raise ValueError(
            f"{name}: head_dim has stride {channel}, it must be contiguous; pass {name}.contiguous()"
        )
    # The stride of an axis of length 1 is never used.
    lengths = heads_first(x.shape, call.tensor_layout)[:3]
    batch, head, token = (0 if n == 1 else s for n, s in zip(lengths, (batch, head, token), strict=True))
    if (address | size * batch | size * head | size * token) % 16:
        raise ValueError(
            f"{name}: rows must start on multiples of 16 bytes, got address {address:#x} and strides {x.stride()} of "
            f"{size} bytes; pass {name}.clone(memory_format=torch.contiguous_format)"
        )
    return batch, head, token


def _loadable(x: Tensor, call: Call) -> Tensor:
    """A gradient as the kernels can load it: autograd may hand over an expanded or an unaligned one."""
    try:
        _strides("dout", x, call)
    except ValueError:
        return x.clone(memory_format=torch.contiguous_format)
    return x


# Checks of what the ops are given. A caller of `torch.ops.fpsattention` may give anything.


def _check(name: str, x: Tensor, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
    """Raises ValueError unless the kernels may read x as this."""
    if tuple(x.shape) != tuple(shape) or x.dtype != dtype or x.device != device:
        raise ValueError(
            f"{name}: shape {shown(list(x.shape))}, {x.dtype} on {x.device} must be {list(shape)}, {dtype} on {device}"
        )


def _check_counts(call: Call, device: torch.device, prefix_valid, suffix_valid) -> None:
    lengths = call.resolved.prefix_len, call.resolved.suffix_len
    for name, length, valid in zip(("prefix", "suffix"), lengths, (prefix_valid, suffix_valid), strict=True):
        if valid is None:
            continue
        _check(f"{name}_valid", valid, (call.batch,), torch.int32, device)
        if not length:
            raise ValueError(
                f"{name}_valid: counts tokens of an empty section, {name}_len is 0; leave it out"
            )


def _check_lists(call: Call, device: torch.device, key_indices, key_counts) -> None:
    if (key_indices is None) != (key_counts is None):
        missing, given = (
            ("key_counts", "key_indices") if key_counts is None else ("key_indices", "key_counts")
        )
        raise ValueError(f"{missing}: is None, but {given} is given; give both or none")
    if key_indices is None:
        return
    tiles = call.resolved.geometry.tiles
    if call.resolved.windows != (tiles,):
        raise ValueError(
            f"config: window={shown(call.resolved.windows)} must be None (all tiles) where lists of key tiles are given"
        )
    *shared, n, capacity = key_indices.shape if key_indices.dim() == 4 else (1, 1, math.prod(tiles), 1)
    shape = [1 if x == 1 else size for x, size in zip(shared, (call.batch, call.heads), strict=True)]
    shape.append(math.prod(tiles))
    _check("key_indices", key_indices, (*shape, capacity), torch.int32, device)
    _check("key_counts", key_counts, shape, torch.int32, device)
    for name, x in (("key_indices", key_indices), ("key_counts", key_counts)):
        if not x.is_contiguous():
            raise ValueError(f"{name}: strides {x.stride()} must be those of a contiguous tensor")


def _check_packed(call: Call, packed: Tensor) -> None:
    _check("packed", packed, (call.sections.end,), torch.uint8, packed.device)
    if not packed.is_contiguous() or packed.data_ptr() % 16:
        raise ValueError(
            f"packed: stride {packed.stride()} and address {packed.data_ptr():#x} must be those of a contiguous tensor "
            f"on 16 bytes; pass packed.clone()"
        )


def _checked_call(q, k, v, prefix_valid, suffix_valid, grid, prefix_len, suffix_len, config, scale, layout):
    """The `Call` of an op that takes Q, K and V, once they fit it."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4:
            raise ValueError(f"{name}: must have 4 dimensions, got shape {shown(list(x.shape))}")
        _check(name, x, q.shape, q.dtype, q.device)
    batch, heads, tokens, head_dim = heads_first(q.shape, layout)
    sizes = tuple(grid), prefix_len, suffix_len, batch, heads, head_dim, q.dtype, scale, layout
    call = call_of(AttentionConfig.from_spec(config), *sizes)
    if tokens != call.resolved.geometry.n_tokens:
        raise ValueError(
            f"q: has {tokens} tokens, the grid and the text are {call.resolved.geometry.n_tokens}"
        )
    _check_counts(call, q.device, prefix_valid, suffix_valid)
    return call


# The ops. `grid` and the lengths may be symbols under torch.compile; `config` is `AttentionConfig.spec`.


def is_watched(*tensors: Tensor | None) -> bool:
    """Whether torch must see a call as an op: it traces, differentiates, profiles, or a mode or a tensor's own class
    intercepts calls.
    """
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return True
    # Stacks of this thread.
    if torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():
        return True
    if torch._C._autograd._profiler_enabled():
        return True
    given = [x for x in tensors if x is not None]
    if torch.is_grad_enabled() and any(x.requires_grad for x in given):
        return True
    return any(type(x) is not Tensor and type(x) is not torch.nn.Parameter for x in given)


def _packed_bytes(q: Tensor, grid, prefix_len, suffix_len, config: str, tensor_layout: str) -> int:
    """Size of the packed operands, in arithmetic that is symbolic where the sizes are."""
    batch, heads, tokens, head_dim = heads_first(q.shape, tensor_layout)
    if obstacle := kernel_obstacle(q.dtype, head_dim):
        raise ValueError(obstacle)
    described = AttentionConfig.from_spec(config)
    # A tile is planned for one grid, so that a graph without one is of that grid alone.
    tile = described.tile or ranked(tuple(int(x) for x in grid))[0].tile
    slot = slot_of(tile)
    n_text_tiles = text_tiles(slot, prefix_len, suffix_len)
    rows = (math.prod(tiles_per_axis(grid, tile)) + n_text_tiles) * slot
    coarse = described.quant_tile not in (None, tile)
    bricks = brick_count(grid, tile, described.quant_tile or tile, n_text_tiles) if coarse else 0
    return Sections.of(batch * heads, head_dim, tokens, rows, bricks, described.smooth_k).end


def _check_windows(config: str, grid, prefix_len, suffix_len, heads) -> None:
    """Raises ValueError for a window that does not fit; where sizes are symbols, the op alone finds out."""
    if all(isinstance(x, int) for x in (*grid, prefix_len, suffix_len, heads)):
        AttentionConfig.from_spec(config).resolve(tuple(grid), heads, prefix_len, suffix_len)


@torch.library.custom_op("fpsattention::quantize", mutates_args=(), device_types="cuda")
def quantize(
    q: Tensor, k: Tensor, v: Tensor, prefix_valid: Tensor | None, suffix_valid: Tensor | None,
    grid: Sequence[int], prefix_len: int, suffix_len: int, config: str, scale: float, tensor_layout: str
) -> Tensor:  # fmt: skip
    """Packed operands of Q, K and V, uint8 [bytes]."""
    about = grid, prefix_len, suffix_len, config, scale, tensor_layout
    call = _checked_call(q, k, v, prefix_valid, suffix_valid, *about)
    return launch_quantize(call, q, k, v, prefix_valid, suffix_valid)


@quantize.register_fake
def _(q, k, v, prefix_valid, suffix_valid, grid, prefix_len, suffix_len, config, scale, tensor_layout):
    size = _packed_bytes(q, grid, prefix_len, suffix_len, config, tensor_layout)
    return q.new_empty(size, dtype=torch.uint8)


@torch.library.custom_op("fpsattention::norm_rope_quantize", mutates_args=(), device_types="cuda")
def norm_rope_quantize(
    q: Tensor, k: Tensor, v: Tensor, prefix_valid: Tensor | None, suffix_valid: Tensor | None,
    weights: Sequence[Tensor], text_weights: Sequence[Tensor], biases: Sequence[Tensor], eps: float,
    rope: Sequence[Tensor], grid: Sequence[int], prefix_len: int, suffix_len: int, config: str, scale: float,
    tensor_layout: str
) -> Tensor:  # fmt: skip
    """`quantize` of `fpsattention.norm_rope` of q and of k, and of v."""
    about = grid, prefix_len, suffix_len, config, scale, tensor_layout
    call = _checked_call(q, k, v, prefix_valid, suffix_valid, *about)
    if call.resolved.smooth_k:
        raise ValueError(
            "config: smooth_k needs the mean of K before it is rounded; use quantize of norm_rope"
        )
    channels = call.head_dim
    if weights and weights[0].numel() != channels and not biases:
        channels *= call.heads
    for name, tensors in (("weights", weights), ("text_weights", text_weights), ("biases", biases)):
        if len(tensors) not in (0, 2) or (tensors and not weights):
            raise ValueError(
                f"{name}: {len(tensors)} tensors must be two, of q and of k, or none; norms have weights"
            )
        for i, x in enumerate(tensors):
            _check(f"{name}[{i}]", x, (channels,), x.dtype, q.device)
    if len(rope) == 1:
        heads = rope[0].shape[1] if rope[0].dim() > 1 and rope[0].shape[1] in (1, call.heads) else call.heads
        _check("rope[0]", rope[0], (math.prod(grid), heads, call.head_dim // 2, 2), rope[0].dtype, q.device)
    elif rope:
        for axis, (x, n) in enumerate(zip(rope, grid, strict=True)):
            _check(f"rope[{axis}]", x, (n, x.shape[1] if x.dim() > 1 else 0, 2), x.dtype, q.device)
    if len(rope) == 3 and 2 * sum(x.shape[1] for x in rope) != call.head_dim:
        raise ValueError(
            f"rope: pairs {[x.shape[1] for x in rope]} must be half of head_dim, {call.head_dim}, in all"
        )
    return launch_quantize(
        call, q, k, v, prefix_valid, suffix_valid, NormRope(weights, text_weights, biases, eps, rope)
    )


@norm_rope_quantize.register_fake
def _(
    q, k, v, prefix_valid, suffix_valid, weights, text_weights, biases, eps, rope, grid, prefix_len, suffix_len,
    config, scale, tensor_layout
):  # fmt: skip
    size = _packed_bytes(q, grid, prefix_len, suffix_len, config, tensor_layout)
    return q.new_empty(size, dtype=torch.uint8)


@torch.library.custom_op("fpsattention::attend", mutates_args=(), device_types="cuda")
def attend(
    packed: Tensor, prefix_valid: Tensor | None, suffix_valid: Tensor | None, key_indices: Tensor | None,
    key_counts: Tensor | None, grid: Sequence[int], prefix_len: int, suffix_len: int, config: str, scale: float,
    tensor_layout: str, batch: int, heads: int, head_dim: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out, lse) over the packed operands of Q, K, V of these sizes."""
    sizes = tuple(grid), prefix_len, suffix_len, batch, heads, head_dim, dtype, scale, tensor_layout
    call = call_of(AttentionConfig.from_spec(config), *sizes)
    _check_packed(call, packed)
    _check_counts(call, packed.device, prefix_valid, suffix_valid)
    _check_lists(call, packed.device, key_indices, key_counts)
    lists = key_indices, key_counts
    return cast(tuple[Tensor, Tensor], launch_attend(call, packed, prefix_valid, suffix_valid, *lists))


@attend.register_fake
def _(
    packed, prefix_valid, suffix_valid, key_indices, key_counts, grid, prefix_len, suffix_len, config, scale,
    tensor_layout, batch, heads, head_dim, dtype
):  # fmt: skip
    _check_windows(config, grid, prefix_len, suffix_len, heads)
    tokens = math.prod(grid) + prefix_len + suffix_len
    shape = heads_first((batch, heads, tokens, head_dim), tensor_layout)
    out = packed.new_empty(shape, dtype=dtype)
    return out, packed.new_empty((batch, heads, tokens), dtype=torch.float32)


@torch.library.custom_op("fpsattention::attention", mutates_args=(), device_types="cuda")
def attention(
    q: Tensor, k: Tensor, v: Tensor, prefix_valid: Tensor | None, suffix_valid: Tensor | None,
    key_indices: Tensor | None, key_counts: Tensor | None, grid: Sequence[int], prefix_len: int, suffix_len: int,
    config: str, scale: float, tensor_layout: str, deterministic: bool
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(out, lse, packed operands) of Q, K and V; `deterministic` is of the backward."""
    about = grid, prefix_len, suffix_len, config, scale, tensor_layout
    call = _checked_call(q, k, v, prefix_valid, suffix_valid, *about)
    _check_lists(call, q.device, key_indices, key_counts)
    results = launch_attention(call, q, k, v, prefix_valid, suffix_valid, key_indices, key_counts)
    return cast(tuple[Tensor, Tensor, Tensor], results)


@attention.register_fake
def _(
    q, k, v, prefix_valid, suffix_valid, key_indices, key_counts, grid, prefix_len, suffix_len, config, scale,
    tensor_layout, deterministic
):  # fmt: skip
    batch, heads, tokens, _ = heads_first(q.shape, tensor_layout)
    _check_windows(config, grid, prefix_len, suffix_len, heads)
    size = _packed_bytes(q, grid, prefix_len, suffix_len, config, tensor_layout)
    lse = q.new_empty((batch, heads, tokens), dtype=torch.float32)
    return q.new_empty(q.shape), lse, q.new_empty(size, dtype=torch.uint8)


@torch.library.custom_op("fpsattention::attention_backward", mutates_args=(), device_types="cuda")
def attention_backward(
    dout: Tensor, dlse: Tensor, out: Tensor, lse: Tensor, packed: Tensor,
    prefix_valid: Tensor | None, suffix_valid: Tensor | None, key_indices: Tensor | None,
    key_counts: Tensor | None, grid: Sequence[int], prefix_len: int, suffix_len: int, config: str, scale: float,
    tensor_layout: str, deterministic: bool
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dq, dk, dv) of what `attention` returned."""
    if out.dim() != 4:
        raise ValueError(f"out: must have 4 dimensions, got shape {shown(list(out.shape))}")
    batch, heads, _, head_dim = heads_first(out.shape, tensor_layout)
    sizes = tuple(grid), prefix_len, suffix_len, batch, heads, head_dim, out.dtype, scale, tensor_layout
    call = call_of(AttentionConfig.from_spec(config), *sizes)
    _check_packed(call, packed)
    for name, x in (("out", out), ("dout", dout)):
        _check(name, x, call.shape, out.dtype, packed.device)
    for name, x in (("lse", lse), ("dlse", dlse)):
        _check(name, x, call.lse_shape, torch.float32, packed.device)
    for name, x in (("out", out), ("lse", lse)):
        if not x.is_contiguous():
            raise ValueError(f"{name}: strides {x.stride()} must be those of a contiguous tensor")
    _check_counts(call, packed.device, prefix_valid, suffix_valid)
    _check_lists(call, packed.device, key_indices, key_counts)
    others = prefix_valid, suffix_valid, key_indices, key_counts
    return launch_backward(call, dout, dlse, out, lse, packed, *others, deterministic)


@attention_backward.register_fake
def _(dout, dlse, out, *_):
    return torch.empty_like(out), torch.empty_like(out), torch.empty_like(out)


def _save(ctx, inputs, output) -> None:
    _, _, _, prefix_valid, suffix_valid, key_indices, key_counts, *ctx.call = inputs
    ctx.save_for_backward(*output, prefix_valid, suffix_valid, key_indices, key_counts)
    ctx.set_materialize_grads(False)  # no zeros in the size of the packed operands


def _differentiate(ctx, dout, dlse, _):
    out, lse, *others = ctx.saved_tensors  # once: a checkpoint computes them anew for one reading
    dout = torch.zeros_like(out) if dout is None else dout
    dlse = torch.zeros_like(lse) if dlse is None else dlse
    gradients = attention_backward(dout, dlse, out, lse, *others, *ctx.call)
    return *gradients, None, None, None, None, *(None for _ in ctx.call)


def _refuse_second_derivative(ctx, *_):
    raise RuntimeError(
        "fpsattention: FP8 attention has a first derivative only; for a second one (create_graph=True) use "
        'AttentionConfig(quant="none")'
    )


attention.register_autograd(_differentiate, setup_context=_save)
attention_backward.register_autograd(_refuse_second_derivative)
