"""`attention`, the one call most users need, and the choice of what runs it."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from . import checks, ops, reference, reference_op  # noqa: F401  ops and reference_op register torch.ops.fpsattention
from .checks import as_grid, shown
from .config import AttentionConfig, ResolvedConfig, as_config
from .support import backend_for


@dataclass(frozen=True, eq=False)
class QuantizedQKV:
    """Q, K and V rounded to FP8 by `quantize_qkv`, for one or more calls of `attention`, which refuses one whose fields
    were replaced. An object equals itself alone.

    Attributes:
        operands: on the sm90 backend the packed operands, one uint8 tensor; on the reference backend Q, K and V
            themselves, which it rounds again in every call: leave them as they are.
        grid: tokens (T, H, W), as in the `quantize_qkv` call.
        config: that of the call.
        scale: that of the call, or what None stood for.
        tensor_layout: that of the call.
        dtype: of Q, K, V, and so of the output.
        shape: of Q, K, V, and so of the output.
        backend: "sm90" or "reference".
        prefix_len: that of the call.
        suffix_len: that of the call.
        prefix_valid: that of the call.
        suffix_valid: that of the call.
    """

    operands: tuple[Tensor, ...]
    grid: tuple[int, int, int]
    config: AttentionConfig
    scale: float
    tensor_layout: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    backend: str
    prefix_len: int = 0
    suffix_len: int = 0
    prefix_valid: Tensor | None = None
    suffix_valid: Tensor | None = None
    made_with: tuple = field(default=(), repr=False)  # all other fields, as they were

    @classmethod
    def of(cls, *fields) -> QuantizedQKV:
        """What a quantisation has made: the fields in their order, but for the last."""
        return cls(*fields, made_with=fields)


def quantize_qkv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    grid: Sequence[int],
    config: AttentionConfig | None = None,
    scale: float | None = None,
    tensor_layout: str = "NHD",
    prefix_len: int = 0,
    suffix_len: int = 0,
    prefix_valid: Tensor | None = None,
    suffix_valid: Tensor | None = None,
    backend: str = "auto",
) -> QuantizedQKV:
    """Round Q, K, V to FP8 once (arXiv 2506.04648, section 3.1); `attention` accepts the result in their place.

    It pays when the same Q, K, V are attended under several windows. What rounding depends on is fixed here: tile,
    quant_tile and smooth_k, and the text tokens; window and border may differ from call to call.

    It gives no gradient: hand Q, K, V themselves to `attention` for that.

    Args and errors are those of `attention`; config.quant must be "fp8".
    """
    config = as_config(config)
    q, k, v = checks.as_autocast(q, k, v)
    check_rounding(config, {"q": q, "k": k, "v": v}, instead="hand q, k, v to attention")
    lengths, counts = (prefix_len, suffix_len), (prefix_valid, suffix_valid)
    name, scale = set_up(q, k, v, grid, config, scale, tensor_layout, backend, *lengths, *counts)
    check_window(q, grid, config, tensor_layout, prefix_len, suffix_len)
    operands: tuple[Tensor, ...] = (q.detach(), k.detach(), v.detach())
    if name == "sm90":
        if ops.is_watched(q, k, v):
            rest = list(grid), *lengths, config.spec, scale, tensor_layout
            packed = ops.quantize(*operands, *counts, *rest)
        else:
            call = _call_of(q, grid, config, scale, tensor_layout, *lengths)
            packed = ops.launch_quantize(call, *operands, *counts)
        operands = (packed,)
    about = tuple(grid), config, scale, tensor_layout, q.dtype, tuple(q.shape), name
    return QuantizedQKV.of(operands, *about, *lengths, *counts)


def attention(
    q: Tensor | QuantizedQKV,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    grid: Sequence[int] | None = None,
    config: AttentionConfig | None = None,
    return_lse: bool = False,
    scale: float | None = None,
    tensor_layout: str | None = None,
    prefix_len: int = 0,
    suffix_len: int = 0,
    prefix_valid: Tensor | None = None,
    suffix_valid: Tensor | None = None,
    backend: str = "auto",
    deterministic: bool | None = None,
    **unsupported,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention over a 3D grid of video tokens, in FP8 and under a sliding window of tiles.

    The arithmetic is that of `fpsattention.reference.emulated_attention` (arXiv 2506.04648, sections 3.1 and 3.2; the
    window with border="clamp" is that of arXiv 2502.04507). The same call gives the same bits every time.

    Differentiable once in q, k and v, out and lse, by the straight-through estimator at the roundings. For its backward
    the Hopper kernel saves the FP8 operands, out and lse; the scores are computed anew
    (`fpsattention.reference.emulated_backward` has the arithmetic).

    Text tokens may lie before the video's (the prefix) and after them (the suffix): every query sees
    their keys, and their queries see every key, whatever the window. Where a sample has fewer than its section holds,
    say how many: the others are never read, their out is 0, their lse -inf and their gradients 0.

    Args:
        q, k, v: [B, L, H, D] ("NHD") or [B, H, L, D] ("HND"), L = prefix_len + T * H * W + suffix_len tokens in this
            order, the video's in raster order, w fastest. The Hopper kernel takes bf16 and fp16, D 64 and 128, any
            strides with D contiguous and rows on 16 bytes. Under autocast they are cast to its dtype first, as in
            torch's scaled_dot_product_attention. NaN or Inf spreads over all that shares its scale: in q it makes the
            rows of its tile (or quant_tile) non-finite, in k the rows that attend its tile, in v its channel in all
            rows of the head; in k under smooth_k all rows of the head. Or one `QuantizedQKV` as q, which brings grid,
            scale, layout, text tokens and backend with it; its config holds unless another one is given, which may
            differ in window and border.
        grid: tokens (T, H, W) after patchifying.
        config: tile, window and rounding; None: FP8, dense, the planned tile.
        return_lse: also return the log-sum-exp of the scores, fp32 [B, H, L], natural logarithm.
        scale: of the scores before softmax, positive; None: D ** -0.5.
        tensor_layout: "NHD" or "HND"; None: "NHD".
        prefix_len, suffix_len: text tokens of every sample, at least 0.
        prefix_valid, suffix_valid: int32 [B] on q's device, how many of the section's tokens are valid in each sample,
            the first ones, from 0 to its length; None: all. Out of range they are a ValueError on the CPU outside
            torch.compile; on a GPU, where looking would stop the device, they are clamped.
        backend: "sm90" runs on a Hopper GPU or raises RuntimeError; "reference" runs plain torch anywhere; "auto" takes
            the former where it can, else the latter, and warns once why (FPSATTENTION_STRICT=1 makes that a
            RuntimeError). See `backend_for`.
        deterministic: whether the Hopper kernel's backward gives the same bits every time, which takes longer; without
            it the last bits of q's gradient may differ. None: what `torch.use_deterministic_algorithms` asks for.
        unsupported: nothing; attn_mask, is_causal, dropout_p and enable_gqa are refused by name.

    Returns out, like q in shape, dtype and layout; with return_lse, (out, lse).
    Raises TypeError or ValueError that name the argument, its value, the rule and the nearest legal value; RuntimeError
    when the backend asked for cannot run, for a second derivative of the Hopper kernel, and inside the transforms of
    torch.func and torch.autograd.forward_ad.
    """
    if unsupported:
        _refuse(next(iter(unsupported)))
    if deterministic is not None and not isinstance(deterministic, bool):
        raise TypeError(f"deterministic: {shown(deterministic)} must be True, False or None")
    if isinstance(q, QuantizedQKV):
        given = {"k": k, "v": v, "grid": grid, "scale": scale, "tensor_layout": tensor_layout}
        lengths = {"prefix_len": prefix_len, "suffix_len": suffix_len}
        given |= {name: None if _equal(n, 0) else n for name, n in lengths.items()}  # 0: not said
        given |= {"prefix_valid": prefix_valid, "suffix_valid": suffix_valid}
        given |= {"deterministic": deterministic, "backend": None if backend == "auto" else backend}
        _check_repeated(q, given)
        _check_untouched(q)
        out, lse = _attend(q, q.config if config is None else _same_rounding(as_config(config), q))
        return (out, lse) if return_lse else out
    if grid is None:
        raise TypeError("grid: is missing; give the tokens (T, H, W)")
    config = as_config(config)
    q, k, v = checks.as_autocast(q, k, v)
    tensor_layout = "NHD" if tensor_layout is None else tensor_layout
    lengths, counts = (prefix_len, suffix_len), (prefix_valid, suffix_valid)
    name, scale = set_up(q, k, v, grid, config, scale, tensor_layout, backend, *lengths, *counts)
    keywords = {
        "grid": grid,
        "config": config,
        "scale": scale,
        "tensor_layout": tensor_layout,
        "prefix_len": prefix_len,
        "suffix_len": suffix_len,
        "prefix_valid": prefix_valid,
        "suffix_valid": suffix_valid,
    }
    if name == "sm90":
        if deterministic is None:
            deterministic = torch.are_deterministic_algorithms_enabled()
        if ops.is_watched(q, k, v):
            rest = list(grid), *lengths, config.spec, scale, tensor_layout, deterministic
            out, lse, _ = ops.attention(q, k, v, *counts, *rest)
        else:
            call = _call_of(q, grid, config, scale, tensor_layout, *lengths)
            out, lse, _ = ops.launch_attention(call, q, k, v, *counts)
    elif config.quant == "fp8":
        out, lse = reference.emulated_attention(q, k, v, **keywords)
    elif name == "torch":
        heads = checks.to_heads_first(q, tensor_layout).shape[1]
        out, lse = _unquantized(q, k, v, config.resolve(grid, heads, *lengths), return_lse, keywords)
    else:
        out, lse = _exact(q, k, v, keywords)
    return (out, lse) if return_lse else out


# Arguments of torch's scaled_dot_product_attention that attention has not, and what to do.
_SDPA_ONLY = {
    "attn_mask": "config's window says what is attended, prefix_valid and suffix_valid which text tokens count",
    "is_causal": "every token of a video attends to both sides; for a causal mask call torch's function",
    "dropout_p": "there is no dropout; leave it out, or drop from the output",
    "enable_gqa": "q, k and v have equally many heads; repeat those of k and v with repeat_interleave",
}


def _refuse(name: str) -> None:
    if name in _SDPA_ONLY:
        raise TypeError(
            f"{name}: scaled_dot_product_attention of torch has this argument, attention has not: {_SDPA_ONLY[name]}"
        )
    raise TypeError(f"attention() got an unexpected keyword argument {shown(name)}")


def set_up(q, k, v, grid, config, scale, tensor_layout, backend, *text) -> tuple[str, float]:
    """(what runs, scale) of a call whose arguments have been checked, with a notice where that is the slow path."""
    checks.check_inputs(q, k, v, grid, tensor_layout, *text)
    scale = checks.as_scale(scale, q.shape[3])
    name, reason = backend_for(q, config, backend)
    if name == "reference" and backend == "auto":
        _notice(reason)
    return name, scale


def _attend(quantized: QuantizedQKV, config: AttentionConfig) -> tuple[Tensor, Tensor]:
    """(out, lse) of rounded operands under the config's window."""
    x = quantized
    text = {name: getattr(x, name) for name in ("prefix_len", "suffix_len", "prefix_valid", "suffix_valid")}
    if x.backend == "reference":
        return reference.emulated_attention(
            *x.operands,
            grid=x.grid,
            config=config,
            scale=x.scale,
            tensor_layout=x.tensor_layout,
            **text,
        )
    (packed,), counts = x.operands, (x.prefix_valid, x.suffix_valid)
    batch, second, third, head_dim = x.shape
    heads = third if x.tensor_layout == "NHD" else second
    if ops.is_watched(packed):
        rest = list(x.grid), x.prefix_len, x.suffix_len, config.spec, x.scale, x.tensor_layout
        return ops.attend(packed, *counts, *rest, batch, heads, head_dim, x.dtype)
    sizes = x.grid, x.prefix_len, x.suffix_len, batch, heads, head_dim, x.dtype, x.scale, x.tensor_layout
    return ops.launch_attend(ops.call_of(config, *sizes), packed, *counts)


def _call_of(
    q: Tensor, grid, config: AttentionConfig, scale: float, tensor_layout: str, *lengths
) -> ops.Call:
    """The resolved call of q, k, v like q."""
    batch, second, third, head_dim = q.shape
    heads = third if tensor_layout == "NHD" else second
    sizes = tuple(grid), *lengths, batch, heads, head_dim, q.dtype, scale, tensor_layout
    return ops.call_of(config, *sizes)


def _check_repeated(quantized: QuantizedQKV, given: dict) -> None:
    """Arguments beside a `QuantizedQKV` must be left out, or say what it says."""
    for name, value in given.items():
        if value is None:
            continue
        if name in ("k", "v", "prefix_valid", "suffix_valid"):
            raise TypeError(f"{name}: is part of the QuantizedQKV given as q; leave it out")
        if name == "deterministic":
            raise TypeError(
                "deterministic: is of the backward, and quantised Q, K, V have none; leave it out"
            )
        own = getattr(quantized, name)
        if not _equal(as_grid(value) if name == "grid" else value, own):
            raise ValueError(
                f"{name}: {shown(value)} is not that of the quantised Q, K, V, {shown(own)}; leave it out"
            )


def _equal(value, own) -> bool:
    """Whether they are equal; a tensor, which would answer for each element, equals nothing."""
    return not isinstance(value, Tensor) and value == own


def _check_untouched(quantized: QuantizedQKV) -> None:
    """Raises ValueError when a field is not what it was: the operands belong to one grid, tile, scale and backend."""
    if torch.compiler.is_compiling():  # it was made in the same graph
        return
    names = [x.name for x in fields(quantized) if x.name != "made_with"]
    if len(quantized.made_with) != len(names):
        raise ValueError("q: is a QuantizedQKV that quantize_qkv has not made; call quantize_qkv")
    for name, made in zip(names, quantized.made_with, strict=True):
        value = getattr(quantized, name)
        comparable = name not in ("operands", "prefix_valid", "suffix_valid")
        if value is not made and not (comparable and type(value) is type(made) and value == made):
            raise ValueError(
                f"q: is a QuantizedQKV whose {name} was replaced, but not the operands to match; call "
                f"quantize_qkv anew (another window or border goes into attention's config)"
            )


def _same_rounding(config: AttentionConfig, quantized: QuantizedQKV) -> AttentionConfig:
    own = quantized.config
    if config.tile is None:
        config = replace(config, tile=own.tile)
    names = ("tile", "quant", "quant_tile", "smooth_k")
    if any(getattr(config, name) != getattr(own, name) for name in names):
        # What None stands for may be the same.
        given, expected = (replace(x, window=None).resolve(quantized.grid, 1) for x in (config, own))
        for name in names:
            if getattr(given, name) != getattr(expected, name):
                raise ValueError(
                    f"config: {name}={shown(getattr(config, name))}, but Q, K, V were quantised with "
                    f"{name}={shown(getattr(own, name))}; only window and border may differ"
                )
    return config


@torch.compiler.assume_constant_result  # torch.compile runs it while it traces, and leaves it out of the graph
def _notice(reason: str) -> None:
    """Say that the slow path runs; an error in strict mode."""
    message = f"fpsattention runs its reference instead of the Hopper kernel, slowly: {reason}"
    strict = os.environ.get("FPSATTENTION_STRICT", "0")
    if strict not in ("", "0", "1"):
        raise ValueError(f"FPSATTENTION_STRICT: {shown(strict)} must be 0 or 1")
    if strict == "1":
        raise RuntimeError(f"{message} (FPSATTENTION_STRICT=1)")
    _warn_once(message)


@cache
def _warn_once(message: str) -> None:
    # Past _notice, what calls that, and the public function: the caller's line.
    warnings.warn(message, stacklevel=5)


def check_rounding(config: AttentionConfig, inputs: dict, instead: str) -> None:
    """Raises ValueError when the config rounds nothing, RuntimeError when one of the inputs requires a gradient."""
    if config.quant != "fp8":
        raise ValueError(f'config: quant={config.quant!r} rounds nothing; use quant="fp8"')
    names = [name for name, x in inputs.items() if isinstance(x, Tensor) and x.requires_grad]
    if names and torch.is_grad_enabled():
        raise RuntimeError(
            f"{', '.join(names)}: a gradient is required, but there is none of quantised tensors; call it under "
            f"torch.no_grad(), or {instead}"
        )


def check_window(q, grid, config: AttentionConfig, tensor_layout: str, prefix_len=0, suffix_len=0) -> None:
    """Raises ValueError, ahead of `attention`, when the window does not fit the grid or the heads."""
    if not torch.compiler.is_compiling():  # a graph has the check in `attention`
        config.resolve(grid, checks.to_heads_first(q, tensor_layout).shape[1], prefix_len, suffix_len)


def _unquantized(
    q, k, v, resolved: ResolvedConfig, return_lse: bool, call: dict
) -> tuple[Tensor, Tensor | None]:
    """quant="none" on a GPU: torch's SDPA where it can say all that is asked, else FlexAttention."""
    scale, tensor_layout = call["scale"], call["tensor_layout"]
    counts = call["prefix_valid"], call["suffix_valid"]
    everything = resolved.windows == (resolved.geometry.tiles,) and counts == (None, None)
    if everything and not return_lse:
        heads_first = [checks.to_heads_first(x, tensor_layout) for x in (q, k, v)]
        out = F.scaled_dot_product_attention(*heads_first, scale=scale)
        return checks.to_heads_first(out, tensor_layout), None
    if checks.dispatches(q):  # FlexAttention's lists of blocks have values
        return _exact(q, k, v, call)
    from .flex import flex_attention  # brings torch's compiler, which takes a second to import

    return flex_attention(q, k, v, resolved, scale, tensor_layout, *counts)


def _exact(q, k, v, call: dict) -> tuple[Tensor, Tensor]:
    """The reference without rounding, in fp32 at least."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    out, lse = reference.exact_attention(q, k, v, **call, dtype=dtype)
    return out.to(q.dtype), lse.float()
