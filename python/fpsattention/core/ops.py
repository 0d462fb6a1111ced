"""The `torch.library` ops over the compiled kernels: allocation, checks, gradients, and nothing else.

`fpsattention::quantize` turns raster-order Q, K, V into FP8 packed blocks, `fpsattention::attend` attends over them;
`fpsattention::attention` is both, and differentiable: its gradient is `fpsattention::attention_backward`. All take
plain integers, so that `torch.compile` traces them without looking inside, with symbols for sizes that change. They use
the current stream of the tensors' device, never synchronise, and allocate through torch only, so that CUDA graphs
capture them. NVTX ranges bear the names of quantize, attend and attention_backward.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import _C
from .checks import shown
from .config import AttentionConfig, ResolvedConfig
from .explain import plan
from .geometry import tile_geometry
from .support import DTYPES, HEAD_DIMS

# q_blocks, kv_blocks, v_amax, norms, lse_shift, k_mean
Packed = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def quantize(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    resolved: ResolvedConfig,
    scale: float,
    tensor_layout: str,
    prefix_valid: Tensor | None = None,
    suffix_valid: Tensor | None = None,
) -> Packed:
    """Round Q, K, V to E4M3 packed blocks (arXiv 2506.04648, section 3.1; the format is in include/.../params.h).

    Args:
        q, k, v: bf16 or fp16 CUDA tensors [B, L, H, D] ("NHD") or [B, H, L, D] ("HND"), D 64 or 128. Any strides,
            as long as D is contiguous and every row starts on 16 bytes.
        scale: of the scores before softmax; needed here only for the LSE of smoothed K.
        prefix_valid, suffix_valid: int32 [B], how many tokens of `resolved`'s sections are valid; None: all.

    Returns q_blocks uint8 [B, H, blocks, bytes], kv_blocks likewise, v_amax fp32 [B, H, D], norms fp32 [B, H, 2] (the
    largest norm of a row of Q, and of K); with smooth_k also lse_shift fp32 [B, H, L] and k_mean fp32 [B, H, D], which
    are empty without.
    Raises ValueError for a head_dim, dtype, stride or alignment that the kernels do not take.
    """
    rounding = resolved.grid, resolved.tile, resolved.quant_tile, resolved.smooth_k
    text = resolved.prefix_len, resolved.suffix_len, prefix_valid, suffix_valid
    return torch.ops.fpsattention.quantize(q, k, v, *rounding, scale, tensor_layout, *text)


def attend(
    images: Packed,
    resolved: ResolvedConfig,
    scale: float,
    tensor_layout: str,
    dtype: torch.dtype,
    prefix_valid: Tensor | None = None,
    suffix_valid: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over what `quantize` made, with the same valid counts, under the config's windows (arXiv 2506.04648,
    Eq. 2).

    Returns out [B, L, H, D] or [B, H, L, D] of `dtype`, tokens in their given order, and lse fp32 [B, H, L], natural
    logarithm.
    """
    windows = [max(x, 1) for window in resolved.windows for x in window]  # an empty axis has none
    what = resolved.grid, resolved.tile, windows, resolved.truncate
    text = resolved.prefix_len, resolved.suffix_len, prefix_valid, suffix_valid
    return torch.ops.fpsattention.attend(*images, *what, scale, tensor_layout, dtype, *text)


def decode_blocks(
    q_blocks: Tensor,
    kv_blocks: Tensor,
    v_amax: Tensor,
    grid: tuple,
    tile: tuple,
    head_dim: int,
    prefix_len: int = 0,
    suffix_len: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """What the packed blocks stand for, for inspection: dequantised q, k, v, fp32 [B, L, H, D], tokens as given."""
    geometry = tile_geometry(tuple(grid), tuple(tile), prefix_len, suffix_len)
    rows = geometry.slot_tokens.flatten().to(q_blocks.device)
    batch, heads, _, _ = q_blocks.shape
    image = _C.BLOCK * head_dim

    def unswizzle(x: Tensor, row_bytes: int) -> Tensor:
        offset = torch.arange(x.shape[-1], device=x.device)
        offset ^= (offset >> 3) & (0x70 if row_bytes == 128 else 0x30)
        return x[..., offset].view(torch.float8_e4m3fn).float().unflatten(-1, (-1, row_bytes))

    def raster(x: Tensor) -> Tensor:  # [B, H, blocks, BLOCK, D] -> [B, L, H, D]
        out = x.new_empty(batch, heads, geometry.n_tokens, head_dim)
        out[:, :, rows[rows >= 0]] = x.flatten(2, 3)[:, :, rows >= 0]
        return out.transpose(1, 2)

    def scaled(blocks: Tensor, n_bytes: int) -> Tensor:
        scale = blocks[..., -128:-124].contiguous().view(torch.float32)
        return raster(unswizzle(blocks[..., :n_bytes], head_dim) * scale[..., None])

    # Word c of each 16 tokens holds tokens 2c, 2c+1, 2c+8, 2c+9 (kernels/README.md).
    slot = torch.arange(16, device=q_blocks.device)
    token = 2 * (slot // 4) + slot % 2 + 8 * (slot % 4 // 2)
    permuted = unswizzle(kv_blocks[..., image : 2 * image], 128).unflatten(-1, (-1, 16))
    v = torch.empty_like(permuted)
    v[..., token] = permuted
    v_scale = torch.where(
        v_amax <= 2.0**-100, torch.ones_like(v_amax), v_amax / torch.full_like(v_amax, 448.0)
    )
    q, k = scaled(q_blocks, _C.QUERY_BLOCK * head_dim), scaled(kv_blocks, image)
    return q, k, raster(v.flatten(-2).mT * v_scale[:, :, None, None])


def _resolve(
    grid,
    tile,
    heads,
    quant_tile=(),
    windows=(),
    truncate=False,
    smooth_k=False,
    prefix_len=0,
    suffix_len=0,
) -> ResolvedConfig:
    """The config behind an op's integer lists, fitted to the grid."""
    config = AttentionConfig.from_lists(tile, quant_tile, windows, truncate, smooth_k)
    return config.resolve(tuple(grid), heads, prefix_len, suffix_len)


def _launch(
    resolved: ResolvedConfig, batch: int, heads: int, head_dim: int, dtype, scale: float, *counts
) -> dict:
    """What every launch is told of its call."""
    prefix_valid, suffix_valid = (0 if x is None else x.data_ptr() for x in counts)
    return {
        "grid": resolved.grid,
        "tile": resolved.tile,
        "prefix_len": resolved.prefix_len,
        "suffix_len": resolved.suffix_len,
        "prefix_valid": prefix_valid,
        "suffix_valid": suffix_valid,
        "batch": batch,
        "heads": heads,
        "head_dim": head_dim,
        "dtype": DTYPES[dtype],
        "scale": scale,
        "stream": torch.cuda.current_stream().cuda_stream,
    }


def _fill_sections(
    x: Tensor, value: float, dim: int, resolved: ResolvedConfig, prefix_valid, suffix_valid
) -> None:
    """Give the text tokens of x, along `dim`, this value where some of them may be invalid: no kernel writes those."""
    prefix, suffix = resolved.prefix_len, resolved.suffix_len
    if prefix_valid is not None:
        x.narrow(dim, 0, prefix).fill_(value)
    if suffix_valid is not None:
        x.narrow(dim, x.shape[dim] - suffix, suffix).fill_(value)


def _check(name: str, x: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    """Raises ValueError unless the kernels may read x as this."""
    if tuple(x.shape) != shape or x.dtype != dtype or x.device != device:
        raise ValueError(
            f"{name}: shape {shown(list(x.shape))}, {x.dtype} on {x.device} must be {list(shape)}, {dtype} on {device}"
        )


def _counts(
    resolved: ResolvedConfig, like: Tensor, prefix_valid: Tensor | None, suffix_valid: Tensor | None
) -> list[Tensor | None]:
    """The counts as the kernels read them, for the samples of `like` [B, ...]. Raises ValueError for others."""
    sections = ("prefix", resolved.prefix_len, prefix_valid), ("suffix", resolved.suffix_len, suffix_valid)
    for name, length, valid in sections:
        if valid is not None:
            _check(f"{name}_valid", valid, (like.shape[0],), torch.int32, like.device)
            if not length:
                raise ValueError(
                    f"{name}_valid: counts tokens of an empty section, {name}_len is 0; leave it out"
                )
    return [None if x is None else x.contiguous() for x in (prefix_valid, suffix_valid)]


def _check_packed(
    q_blocks: Tensor, kv_blocks: Tensor, v_amax: Tensor, norms: Tensor | None, lse_shift: Tensor, k_mean: Tensor,
    resolved: ResolvedConfig,
) -> None:  # fmt: skip
    """Raises ValueError unless `quantize` can have made these for this grid and tile."""
    batch, heads, head_dim = v_amax.shape if v_amax.dim() == 3 else (0, 0, 0)
    if head_dim not in HEAD_DIMS:
        raise ValueError(
            f"v_amax: shape {shown(list(v_amax.shape))} must be [B, H, D] with D one of {HEAD_DIMS}"
        )
    rows = resolved.geometry.n_tiles * resolved.geometry.slot
    q_bytes, kv_bytes = _C.q_block_bytes(head_dim), _C.kv_block_bytes(head_dim)
    smooth = lse_shift.dim() > 1
    expected = {
        "q_blocks": (q_blocks, (rows // _C.QUERY_BLOCK, q_bytes), torch.uint8),
        "kv_blocks": (kv_blocks, (rows // _C.BLOCK, kv_bytes), torch.uint8),
        "v_amax": (v_amax, (head_dim,), torch.float32),
        "norms": (norms, (2,), torch.float32),
        "lse_shift": (lse_shift, (resolved.geometry.n_tokens,) if smooth else None, torch.float32),
        "k_mean": (k_mean, (head_dim,) if smooth else None, torch.float32),
    }
    for name, (x, shape, dtype) in expected.items():
        if x is None:
            continue
        _check(name, x, (0,) if shape is None else (batch, heads, *shape), dtype, v_amax.device)
        if not x.is_contiguous():
            raise ValueError(f"{name}: strides {x.stride()} must be those of a contiguous tensor")


def _heads_first(x: Tensor, tensor_layout: str) -> Tensor:
    return x.transpose(1, 2) if tensor_layout == "NHD" else x


def _strides(name: str, x: Tensor) -> tuple[int, int, int]:
    """(batch, head, token) strides of x [B, H, L, D] in elements, once the kernels can load 16 bytes at a time."""
    if x.shape[3] > 1 and x.stride(3) != 1:
        raise ValueError(
            f"{name}: head_dim has stride {x.stride(3)}, it must be contiguous; pass {name}.contiguous()"
        )
    strides = tuple(0 if n == 1 else s for n, s in zip(x.shape[:3], x.stride()[:3], strict=True))
    if x.data_ptr() % 16 or any(s * x.element_size() % 16 for s in strides):
        raise ValueError(
            f"{name}: rows must start on multiples of 16 bytes, got address {x.data_ptr():#x} and strides "
            f"{x.stride()} of {x.element_size()} bytes; pass {name}.clone(memory_format=torch.contiguous_format)"
        )
    return strides


def _rows(grid, tile, prefix_len: int, suffix_len: int) -> int:
    """Rows of all tiles' slots, text's too: `TileGeometry`'s, in arithmetic that is symbolic where the sizes are."""
    # A tile is planned for one grid, so that a graph without one is of that grid alone.
    tile = tile or plan([int(x) for x in grid]).best.tile
    slot = -(-math.prod(tile) // _C.BLOCK) * _C.BLOCK
    tiles = math.prod(-(-g // t) for g, t in zip(grid, tile, strict=True))
    return (tiles - -prefix_len // slot - -suffix_len // slot) * slot


def _quantize_shapes(q: Tensor, rows: int, smooth_k: bool, tensor_layout: str) -> Packed:
    batch, heads, tokens, head_dim = _heads_first(q, tensor_layout).shape
    if head_dim not in HEAD_DIMS:
        raise ValueError(f"q: head_dim {head_dim} must be one of {HEAD_DIMS} for the sm90 kernels")
    if q.dtype not in DTYPES:
        raise ValueError(f"q: dtype {q.dtype} must be bfloat16 or float16 for the sm90 kernels")
    return (
        q.new_empty(batch, heads, rows // _C.QUERY_BLOCK, _C.q_block_bytes(head_dim), dtype=torch.uint8),
        q.new_empty(batch, heads, rows // _C.BLOCK, _C.kv_block_bytes(head_dim), dtype=torch.uint8),
        q.new_empty(batch, heads, head_dim, dtype=torch.float32),
        q.new_empty(batch, heads, 2, dtype=torch.float32),
        q.new_empty((batch, heads, tokens) if smooth_k else 0, dtype=torch.float32),
        q.new_empty((batch, heads, head_dim) if smooth_k else 0, dtype=torch.float32),
    )


def _quantize_cuda(
    q, k, v, grid, tile, quant_tile, smooth_k, scale, tensor_layout, prefix_len=0, suffix_len=0, prefix_valid=None,
    suffix_valid=None, *, weights=None, eps=0.0, rope=None
) -> Packed:  # fmt: skip
    """weights (of Q and of K), eps and rope: as in `norm_rope_quantize`; all there is to `_norm_rope_quantize_cuda`."""
    heads_first = [_heads_first(x, tensor_layout) for x in (q, k, v)]
    batch, heads, tokens, head_dim = heads_first[0].shape
    resolved = _resolve(
        grid, tile, heads, quant_tile, smooth_k=smooth_k, prefix_len=prefix_len, suffix_len=suffix_len
    )
    for name, x in (("k", k), ("v", v)):
        _check(name, x, tuple(q.shape), q.dtype, q.device)
    if tokens != resolved.geometry.n_tokens:
        raise ValueError(
            f"q: has {tokens} tokens, the grid and the text tokens are {resolved.geometry.n_tokens}"
        )
    prefix_valid, suffix_valid = _counts(resolved, q, prefix_valid, suffix_valid)
    rows = resolved.geometry.n_tiles * resolved.geometry.slot
    images = _quantize_shapes(q, rows, smooth_k, tensor_layout)
    q_blocks, kv_blocks, v_amax, norms, lse_shift, k_mean = images
    v_amax.zero_()
    norms.zero_()
    if q.numel() == 0:
        return images

    def scratch(*shape, zero=False):
        return (q.new_zeros if zero else q.new_empty)(shape, dtype=torch.float32)

    k_sum = q_amax = k_amax = scratch(0)
    per_head = weights is not None and weights[0].numel() == head_dim
    tables = torch.cat([x.to(torch.float32).flatten() for x in rope]) if rope else None
    inverse_rms = [scratch(batch, tokens, heads if per_head else 1) for _ in weights or ()]
    if smooth_k:
        k_sum = scratch(batch, heads, _C.quantize_chunks(tokens), head_dim)
    if resolved.brick != (1, 1, 1):
        bricks = resolved.geometry.n_bricks(resolved.quant_tile)
        q_amax, k_amax = (scratch(batch, heads, bricks, zero=True) for _ in "qk")
    with torch.cuda.device(q.device), torch.cuda.nvtx.range("fpsattention::quantize"):
        _C.quantize(
            **{name: x.data_ptr() for name, x in zip("qkv", (q, k, v), strict=True)},
            **{f"{name}_strides": _strides(name, x) for name, x in zip("qkv", heads_first, strict=True)},
            q_blocks=q_blocks.data_ptr(),
            kv_blocks=kv_blocks.data_ptr(),
            v_amax=v_amax.data_ptr(),
            norms=norms.data_ptr(),
            k_sum=k_sum.data_ptr(),
            k_mean=k_mean.data_ptr(),
            lse_shift=lse_shift.data_ptr(),
            q_amax=q_amax.data_ptr(),
            k_amax=k_amax.data_ptr(),
            brick=resolved.brick,
            norm_weights=[x.data_ptr() for x in weights] if weights else (0, 0),
            inverse_rms=[x.data_ptr() for x in inverse_rms] if weights else (0, 0),
            norm_per_head=per_head,
            norm_eps=eps,
            rope=0 if tables is None else tables.data_ptr(),
            rope_pairs=[x.shape[1] for x in rope] if rope else (0, 0, 0),
            **_launch(resolved, batch, heads, head_dim, q.dtype, scale, prefix_valid, suffix_valid),
        )
    return images


def _quantize_fake(
    q, k, v, grid, tile, quant_tile, smooth_k, scale, tensor_layout, prefix_len=0, suffix_len=0, prefix_valid=None,
    suffix_valid=None
) -> Packed:  # fmt: skip
    return _quantize_shapes(q, _rows(grid, tile, prefix_len, suffix_len), smooth_k, tensor_layout)


def _norm_rope_quantize_cuda(
    q, k, v, q_weight, k_weight, eps, rope, grid, tile, quant_tile, scale, tensor_layout
) -> Packed:  # fmt: skip
    weights = None
    if q_weight is not None:
        weights = [x.to(torch.float32).contiguous() for x in (q_weight, k_weight)]
        weights = [x if x.data_ptr() % 8 == 0 else x.clone() for x in weights]  # the kernel loads pairs
        _, heads, _, head_dim = _heads_first(q, tensor_layout).shape
        channels = head_dim if q_weight.numel() == head_dim else heads * head_dim
        for name, x in zip(("q_weight", "k_weight"), weights, strict=True):
            _check(name, x, (channels,), torch.float32, q.device)
    for axis, (x, n) in enumerate(zip(rope, grid if rope else (), strict=True)):
        _check(f"rope[{axis}]", x, (n, x.shape[1] if x.dim() > 1 else 0, 2), x.dtype, q.device)
    if rope and 2 * sum(x.shape[1] for x in rope) != q.shape[3]:
        raise ValueError(
            f"rope: pairs {[x.shape[1] for x in rope]} must be half of head_dim, {q.shape[3]}, in all"
        )
    return _quantize_cuda(
        q, k, v, grid, tile, quant_tile, False, scale, tensor_layout, weights=weights, eps=eps, rope=rope
    )


def _norm_rope_quantize_fake(
    q, k, v, q_weight, k_weight, eps, rope, grid, tile, quant_tile, scale, tensor_layout
) -> Packed:  # fmt: skip
    return _quantize_fake(q, k, v, grid, tile, quant_tile, False, scale, tensor_layout)


def _attend_shapes(v_amax: Tensor, tokens: int, tensor_layout: str, dtype) -> tuple[Tensor, Tensor]:
    batch, heads, head_dim = v_amax.shape
    shape = (batch, tokens, heads, head_dim) if tensor_layout == "NHD" else (batch, heads, tokens, head_dim)
    return v_amax.new_empty(shape, dtype=dtype), v_amax.new_empty(batch, heads, tokens)


def _attend_cuda(
    q_blocks,
    kv_blocks,
    v_amax,
    norms,
    lse_shift,
    k_mean,
    grid,
    tile,
    windows,
    truncate,
    scale,
    tensor_layout,
    dtype,
    prefix_len=0,
    suffix_len=0,
    prefix_valid=None,
    suffix_valid=None,
) -> tuple[Tensor, Tensor]:
    resolved = _resolve(
        *(grid, tile, v_amax.shape[1] if v_amax.dim() == 3 else 1),
        windows=windows, truncate=truncate, prefix_len=prefix_len, suffix_len=suffix_len,
    )  # fmt: skip
    _check_packed(q_blocks, kv_blocks, v_amax, norms, lse_shift, k_mean, resolved)
    batch, heads, head_dim = v_amax.shape
    if dtype not in DTYPES:
        raise ValueError(f"dtype: {dtype} must be bfloat16 or float16 for the sm90 kernels")
    counts = _counts(resolved, v_amax, prefix_valid, suffix_valid)
    out, lse = _attend_shapes(v_amax, resolved.geometry.n_tokens, tensor_layout, dtype)
    if out.numel() == 0:
        return out, lse
    _fill_sections(_heads_first(out, tensor_layout), 0.0, 2, resolved, *counts)
    _fill_sections(lse, -math.inf, 2, resolved, *counts)
    next_item = v_amax.new_zeros(1, dtype=torch.int32)
    with torch.cuda.device(v_amax.device), torch.cuda.nvtx.range("fpsattention::attend"):
        _C.attn_fwd(
            q_blocks=q_blocks.data_ptr(),
            kv_blocks=kv_blocks.data_ptr(),
            v_amax=v_amax.data_ptr(),
            norms=norms.data_ptr(),
            lse_shift=lse_shift.data_ptr(),
            out=out.data_ptr(),
            lse=lse.data_ptr(),
            out_strides=_strides("out", _heads_first(out, tensor_layout)),
            next_item=next_item.data_ptr(),
            windows=resolved.windows,
            truncate=resolved.truncate,
            **_launch(resolved, batch, heads, head_dim, dtype, scale, *counts),
        )
    return out, lse


def _attend_fake(
    q_blocks,
    kv_blocks,
    v_amax,
    norms,
    lse_shift,
    k_mean,
    grid,
    tile,
    windows,
    truncate,
    scale,
    tensor_layout,
    dtype,
    prefix_len=0,
    suffix_len=0,
    prefix_valid=None,
    suffix_valid=None,
) -> tuple[Tensor, Tensor]:
    if all(
        isinstance(x, int) for x in (*grid, prefix_len, suffix_len)
    ):  # where sizes are symbols, the op checks alone
        _resolve(
            *(grid, tile, v_amax.shape[1]),
            windows=windows, truncate=truncate, prefix_len=prefix_len, suffix_len=suffix_len,
        )  # fmt: skip
    return _attend_shapes(v_amax, math.prod(grid) + prefix_len + suffix_len, tensor_layout, dtype)


def _attention(quantize, attend):
    """`fpsattention::attention` of these two parts."""

    def attention(
        q, k, v, grid, tile, quant_tile, windows, truncate, smooth_k, scale, tensor_layout, deterministic,
        prefix_len=0, suffix_len=0, prefix_valid=None, suffix_valid=None
    ):  # fmt: skip
        text = prefix_len, suffix_len, prefix_valid, suffix_valid
        images = quantize(q, k, v, grid, tile, quant_tile, smooth_k, scale, tensor_layout, *text)
        return *attend(*images, grid, tile, windows, truncate, scale, tensor_layout, q.dtype, *text), *images

    return attention


def _loadable(x: Tensor, tensor_layout: str) -> Tensor:
    """A gradient as the kernels can load it: what autograd hands over may be expanded, or lie anywhere."""
    strides = _heads_first(x, tensor_layout).stride()
    whole_rows = strides[3] == 1 and all(s * x.element_size() % 16 == 0 for s in strides[:3])
    aligned = x.data_ptr() % 16 == 0
    return x if whole_rows and aligned else x.clone(memory_format=torch.contiguous_format)


def _attention_backward_cuda(
    dout, dlse, out, lse, q_blocks, kv_blocks, v_amax, lse_shift, k_mean, grid, tile, windows, truncate, scale,
    tensor_layout, deterministic, prefix_len=0, suffix_len=0, prefix_valid=None, suffix_valid=None
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    batch, heads, head_dim = v_amax.shape
    resolved = _resolve(
        grid, tile, heads, windows=windows, truncate=truncate, prefix_len=prefix_len, suffix_len=suffix_len
    )
    _check_packed(q_blocks, kv_blocks, v_amax, None, lse_shift, k_mean, resolved)
    tokens = resolved.geometry.n_tokens
    shape = (batch, tokens, heads, head_dim) if tensor_layout == "NHD" else (batch, heads, tokens, head_dim)
    for name, x in (("out", out), ("dout", dout)):
        _check(name, x, shape, out.dtype, v_amax.device)
    for name, x in (("lse", lse), ("dlse", dlse)):
        _check(name, x, (batch, heads, tokens), torch.float32, v_amax.device)
    counts = _counts(resolved, v_amax, prefix_valid, suffix_valid)
    grads = dq, dk, dv = tuple(torch.empty_like(out) for _ in range(3))
    if out.numel() == 0:
        return grads
    for grad in grads:
        _fill_sections(_heads_first(grad, tensor_layout), 0.0, 2, resolved, *counts)
    dout, dlse = _loadable(dout, tensor_layout), dlse.contiguous()
    rows = {"out": out, "dout": dout, "dq": dq, "dk": dk, "dv": dv}
    query_blocks, key_blocks = q_blocks.shape[2], kv_blocks.shape[2]

    def scratch(*shape, dtype, zero=False):
        return (out.new_zeros if zero else out.new_empty)((batch, heads, *shape), dtype=dtype)

    query_operands = scratch(query_blocks, _C.bwd_query_bytes(head_dim), dtype=torch.uint8)
    key_operands = scratch(key_blocks, _C.bwd_key_bytes(head_dim), dtype=torch.uint8)
    dq_sum = scratch(query_blocks, _C.QUERY_BLOCK * head_dim, dtype=torch.float32, zero=True)
    turns = scratch(query_blocks if deterministic else 0, 2, dtype=torch.int32, zero=True)
    with torch.cuda.device(out.device), torch.cuda.nvtx.range("fpsattention::attention_backward"):
        _C.attn_bwd(
            q_blocks=q_blocks.data_ptr(),
            kv_blocks=kv_blocks.data_ptr(),
            v_amax=v_amax.data_ptr(),
            lse=lse.data_ptr(),
            lse_shift=lse_shift.data_ptr(),
            k_mean=k_mean.data_ptr(),
            dlse=dlse.data_ptr(),
            query_operands=query_operands.data_ptr(),
            key_operands=key_operands.data_ptr(),
            dq_sum=dq_sum.data_ptr(),
            turns=turns.data_ptr(),
            **{name: x.data_ptr() for name, x in rows.items()},
            **{f"{name}_strides": _strides(name, _heads_first(x, tensor_layout)) for name, x in rows.items()},
            windows=resolved.windows,
            truncate=resolved.truncate,
            **_launch(resolved, batch, heads, head_dim, out.dtype, scale, *counts),
        )
    return grads


def _attention_backward_fake(
    dout, dlse, out, lse, q_blocks, kv_blocks, v_amax, lse_shift, k_mean, grid, tile, windows, truncate, scale,
    tensor_layout, deterministic, prefix_len=0, suffix_len=0, prefix_valid=None, suffix_valid=None
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return torch.empty_like(out), torch.empty_like(out), torch.empty_like(out)


def _save(ctx, inputs, output) -> None:
    grid, tile, _, windows, truncate, _, scale, tensor_layout, deterministic, *lengths = inputs[3:-2]
    ctx.call = (grid, tile, windows, truncate, scale, tensor_layout, deterministic, *lengths)
    out, lse, q_blocks, kv_blocks, v_amax, _, lse_shift, k_mean = output
    ctx.save_for_backward(out, lse, q_blocks, kv_blocks, v_amax, lse_shift, k_mean, *inputs[-2:])


def _differentiate(ctx, dout, dlse, *_):
    *saved, prefix_valid, suffix_valid = ctx.saved_tensors
    grads = torch.ops.fpsattention.attention_backward(
        dout, dlse, *saved, *ctx.call, prefix_valid, suffix_valid
    )
    return *grads, *[None] * 13


def _refuse_second_derivative(ctx, *_):
    raise RuntimeError(
        "fpsattention: FP8 attention has a first derivative only; for a second one (create_graph=True) use "
        'AttentionConfig(quant="none")'
    )


_EXTRA = "SymInt prefix_len=0, SymInt suffix_len=0, Tensor? prefix_valid=None, Tensor? suffix_valid=None"
_library = torch.library.Library("fpsattention", "DEF")
_library.define(
    "quantize(Tensor q, Tensor k, Tensor v, SymInt[] grid, int[] tile, int[] quant_tile, bool smooth_k, float scale, "
    f"str tensor_layout, {_EXTRA}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_library.define(
    "norm_rope_quantize(Tensor q, Tensor k, Tensor v, Tensor? q_weight, Tensor? k_weight, float eps, Tensor[] rope, "
    "SymInt[] grid, int[] tile, int[] quant_tile, float scale, str tensor_layout) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_library.define(
    "attend(Tensor q_blocks, Tensor kv_blocks, Tensor v_amax, Tensor norms, Tensor lse_shift, Tensor k_mean, "
    "SymInt[] grid, int[] tile, int[] windows, bool truncate, float scale, str tensor_layout, ScalarType dtype, "
    f"{_EXTRA}) -> (Tensor, Tensor)"
)
_library.define(
    "attention(Tensor q, Tensor k, Tensor v, SymInt[] grid, int[] tile, int[] quant_tile, int[] windows, "
    f"bool truncate, bool smooth_k, float scale, str tensor_layout, bool deterministic, {_EXTRA}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_library.define(
    "attention_backward(Tensor dout, Tensor dlse, Tensor out, Tensor lse, Tensor q_blocks, Tensor kv_blocks, "
    "Tensor v_amax, Tensor lse_shift, Tensor k_mean, SymInt[] grid, int[] tile, int[] windows, bool truncate, "
    f"float scale, str tensor_layout, bool deterministic, {_EXTRA}) -> (Tensor, Tensor, Tensor)"
)
for _name, _cuda, _fake in (
    ("quantize", _quantize_cuda, _quantize_fake),
    ("norm_rope_quantize", _norm_rope_quantize_cuda, _norm_rope_quantize_fake),
    ("attend", _attend_cuda, _attend_fake),
    ("attention", _attention(_quantize_cuda, _attend_cuda), _attention(_quantize_fake, _attend_fake)),
    ("attention_backward", _attention_backward_cuda, _attention_backward_fake),
):
    _library.impl(_name, _cuda, "CUDA")
    torch.library.register_fake(f"fpsattention::{_name}", _fake)
torch.library.register_autograd("fpsattention::attention", _differentiate, setup_context=_save)
torch.library.register_autograd("fpsattention::attention_backward", _refuse_second_derivative)
