"""`attention`, the one call most users need, and `quantize_qkv`."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, NamedTuple, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from . import checks, line, ops, reference, reference_op  # noqa: F401  ops and reference_op register torch.ops
from .checks import Triple, as_grid, shown
from .config import AttentionConfig, as_config
from .key_tiles import KeyTiles, check_key_tiles, tensors_of
from .selection import chosen
from .selectors import refuse
from .support import backend_for

ROUNDED = "for quantised Q, K, V, as tiles are chosen before rounding"


@dataclass(frozen=True, eq=False)
class QuantizedQKV:
    """Q, K and V rounded to FP8 by `quantize_qkv`, for one or more calls of `attention`.

    `attention` refuses an object whose fields were replaced. Objects compare by identity.

    Attributes:
        operands: on the sm90 backend the packed operands, one uint8 tensor; on the reference backend Q, K and V
            themselves, which every call rounds anew: do not change them.
        grid, config, tensor_layout, prefix_len, suffix_len, prefix_valid, suffix_valid: as given to `quantize_qkv`, or
            what None stands for; grid stays None.
        scale: as given, or D ** -0.5.
        dtype, shape: of Q, K, V, and of the output.
        backend: "sm90" or "reference".
    """

    operands: tuple[Tensor, ...]
    grid: tuple[int, int, int] | None
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
    made_with: dict[str, Any] = field(default_factory=dict, repr=False)  # all other fields, as they were made

    @classmethod
    def of(cls, **values: Any) -> QuantizedQKV:
        """An object with these fields; `made_with` keeps them."""
        return cls(**values, made_with=values)


def quantize_qkv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    grid: Sequence[int] | None = None,
    config: AttentionConfig | None = None,
    scale: float | None = None,
    tensor_layout: str | None = None,
    prefix_len: int = 0,
    suffix_len: int = 0,
    prefix_valid: Tensor | None = None,
    suffix_valid: Tensor | None = None,
    backend: str = "auto",
) -> QuantizedQKV:
    """Round Q, K, V to FP8 once (arXiv 2506.04648, section 3.1); `attention` accepts the result in their place.

    It pays when the same Q, K, V are attended under several windows. Tile, quant_tile, smooth_k and the text tokens are
    fixed here; window, border and key_tiles may differ from call to call. The result has no gradient: for one, pass Q,
    K, V themselves to `attention`.

    Args and errors are those of `attention`; config.quant must be "fp8", and config.select None: `select_tiles` chooses
    from Q and K before they are rounded.
    """
    config = as_config(config)
    q, k, v = checks.as_autocast(q, k, v)
    check_rounding(config, {"q": q, "k": k, "v": v}, instead="hand q, k, v to attention")
    lengths, counts = (prefix_len, suffix_len), (prefix_valid, suffix_valid)
    at = _placed(q, k, v, _Given(grid, config, scale, tensor_layout, *lengths, *counts, backend))
    check_window(q, at.grid, at.config, at.tensor_layout, *at.lengths)
    q, k, v = q.detach(), k.detach(), v.detach()
    operands: tuple[Tensor, ...] = q, k, v
    if at.backend == "sm90" and ops.is_watched(q, k, v, *counts):
        rest = list(at.grid), *at.lengths, at.config.spec, at.scale, at.tensor_layout
        operands = (ops.quantize(q, k, v, *counts, *rest),)
    elif at.backend == "sm90":
        call = _call_of(q.shape, q.dtype, at.grid, at.config, at.scale, at.tensor_layout, *at.lengths)
        operands = (ops.launch_quantize(call, q, k, v, *counts),)
    return QuantizedQKV.of(
        operands=operands,
        grid=None if grid is None else at.grid,
        config=config,
        scale=at.scale,
        tensor_layout=at.tensor_layout,
        dtype=q.dtype,
        shape=tuple(q.shape),
        backend=at.backend,
        prefix_len=at.lengths[0],
        suffix_len=at.lengths[1],
        prefix_valid=prefix_valid,
        suffix_valid=suffix_valid,
    )


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
    key_tiles: KeyTiles | None = None,
    **unsupported: NoReturn,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention over a 3D grid of video tokens, in FP8, under a sliding window of tiles or over lists of tiles.

    Without a grid it is dense attention over L tokens of any kind, as of torch's scaled_dot_product_attention.

    `fpsattention.reference.emulated_attention` defines the arithmetic (arXiv 2506.04648, sections 3.1 and 3.2;
    border="clamp" is that of arXiv 2502.04507). The same call gives the same bits every time. It is differentiable
    once in q, k and v, from out and lse, straight through the roundings (`fpsattention.reference.emulated_backward`).

    Text tokens may lie before the video's (the prefix) and after them (the suffix). Every query sees their keys, and
    their queries see every key, whatever the window.

    Args:
        q, k, v: [B, L, H, D] ("NHD") or [B, H, L, D] ("HND"), L = prefix_len + T * H * W + suffix_len tokens in this
            order, the video's in raster order, w fastest. The Hopper kernel takes bf16 and fp16, D 64 and 128, D
            contiguous, rows on 16 bytes. Autocast applies as to torch's scaled_dot_product_attention. NaN or Inf
            spreads to all that shares its scale: in q to the rows of its tile (or quant_tile), in k to the rows that
            attend its tile, in v to the rows that attend its key block; in k under smooth_k perhaps to the whole head.
            Or q is one `QuantizedQKV`: it brings all arguments but key_tiles and config, which may change window and
            border.
        grid: tokens (T, H, W) after patchifying. None: L >= 1 tokens without one, all attended by all, with scales of
            128 tokens; tile, window, quant_tile, select, key_tiles and text tokens need a grid.
        config: tile, window or select, and rounding; None: FP8, dense, the planned tile. With select the gradient is
            that of attention over the chosen tiles, as if the lists were given.
        return_lse: also return the log-sum-exp of the scores, fp32 [B, H, L], natural logarithm.
        scale: of the scores before softmax, positive; None: D ** -0.5.
        tensor_layout: "NHD" or "HND"; None: "NHD". Without a grid it must be given where q [B, L, H, D] would have
            fewer tokens than heads.
        prefix_len, suffix_len: text tokens of every sample, at least 0.
        prefix_valid, suffix_valid: int32 [B] on q's device, valid tokens of the section in each sample, the first ones;
            None: all. Invalid tokens are never read; their out is 0, their lse -inf, their gradients 0. A count outside
            0 to the section's length is a ValueError on the CPU outside torch.compile, elsewhere it is clamped.
        backend: "sm90" runs the Hopper kernel or raises RuntimeError; "reference" runs plain torch anywhere; "auto"
            runs the Hopper kernel where it can, else the reference with one warning that says why (an error under
            FPSATTENTION_STRICT=1). See `backend_for`.
        deterministic: the Hopper kernel's backward gives the same bits every time, and takes longer; else the last bits
            of q's gradient may differ. None: as `torch.use_deterministic_algorithms` says.
        key_tiles: for each tile of the grid the list of tiles that it attends, in place of a window: config.window and
            config.select must be None. Whatever is listed, video queries see all text.
        unsupported: attn_mask, is_causal, dropout_p and enable_gqa are refused with advice.

    Returns out, like q in shape, dtype and layout; with return_lse, (out, lse).
    Raises TypeError or ValueError that name the argument, its value, the rule and the nearest legal value; RuntimeError
    when the backend asked for cannot run, for a second derivative of the Hopper kernel, and inside the transforms of
    torch.func and torch.autograd.forward_ad.
    """
    if unsupported:
        _refuse(next(iter(unsupported)))
    if deterministic is not None and not isinstance(deterministic, bool):
        raise TypeError(f"deterministic: {shown(deterministic)} must be True, False or None")
    lengths, counts = (prefix_len, suffix_len), (prefix_valid, suffix_valid)
    given = _Given(grid, config, scale, tensor_layout, *lengths, *counts, backend, deterministic, key_tiles)
    out, lse = (
        _attend_quantized(q, k, v, given, return_lse)
        if isinstance(q, QuantizedQKV)
        else _attend(q, k, v, given, return_lse)
    )
    if not return_lse:
        return out
    assert lse is not None
    return out, lse


class _Given(NamedTuple):
    """Arguments of `attention` beside the tensors, as given."""

    grid: Sequence[int] | None
    config: AttentionConfig | None
    scale: float | None
    tensor_layout: str | None
    prefix_len: int
    suffix_len: int
    prefix_valid: Tensor | None
    suffix_valid: Tensor | None
    backend: str
    deterministic: bool | None = None
    key_tiles: KeyTiles | None = None


class _Placed(NamedTuple):
    """Arguments of a call, checked: plain numbers, and what None stands for."""

    backend: str
    grid: Triple
    config: AttentionConfig
    scale: float
    tensor_layout: str
    lengths: tuple[int, int]


def _placed(q: Tensor, k, v, given: _Given) -> _Placed:
    """Check the arguments of a call, and find its place: a grid, or a line of tokens."""
    grid, config, layout = given.grid, as_config(given.config), given.tensor_layout
    if grid is None:
        names = "prefix_len", "suffix_len", "prefix_valid", "suffix_valid", "key_tiles"
        grid, config, layout = line.placed(q, config, layout, {name: getattr(given, name) for name in names})
    layout = "NHD" if layout is None else layout
    text = given.prefix_len, given.suffix_len, given.prefix_valid, given.suffix_valid
    name, scale, grid, *lengths = set_up(q, k, v, grid, config, given.scale, layout, given.backend, *text)
    if given.key_tiles is not None:
        batch, heads, _, _ = checks.heads_first(q.shape, layout)
        check_key_tiles(given.key_tiles, config, grid, batch, heads, q.device)
    return _Placed(name, grid, config, scale, layout, (lengths[0], lengths[1]))


def _attend(q: Tensor, k, v, given: _Given, with_lse: bool) -> tuple[Tensor, Tensor | None]:
    """(out, lse); without `with_lse`, lse may be None."""
    q, k, v = checks.as_autocast(q, k, v)
    name, grid, config, scale, layout, lengths = _placed(q, k, v, given)
    key_tiles = given.key_tiles
    if config.select is not None:
        key_tiles = chosen(q, k, grid, *lengths, config, scale, layout)
        config = replace(config, select=None)
    lists = (None, None) if key_tiles is None else tensors_of(key_tiles)
    tensors = given.prefix_valid, given.suffix_valid, *lists
    if name == "sm90":
        if not ops.is_watched(q, k, v, *tensors):
            call = _call_of(q.shape, q.dtype, grid, config, scale, layout, *lengths)
            return ops.launch_attention(call, q, k, v, *tensors, with_lse=with_lse)[:2]
        deterministic = given.deterministic
        if deterministic is None:
            deterministic = torch.are_deterministic_algorithms_enabled()
        rest = list(grid), *lengths, config.spec, scale, layout, deterministic
        return ops.attention(q, k, v, *tensors, *rest)[:2]
    about: dict[str, Any] = {"grid": grid, "config": config, "scale": scale, "tensor_layout": layout}
    about |= {"prefix_len": lengths[0], "suffix_len": lengths[1]}
    about |= {name: getattr(given, name) for name in ("prefix_valid", "suffix_valid")}
    about["key_tiles"] = key_tiles
    if config.quant == "fp8":
        return reference.emulated_attention(q, k, v, **about)
    if name == "torch":
        return _unquantized(q, k, v, with_lse, about)
    return _exact(q, k, v, about)


# Arguments that torch's scaled_dot_product_attention has and `attention` has not, with advice.
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


def set_up(
    q, k, v, grid, config, scale, tensor_layout, backend, *text
) -> tuple[str, float, Triple, int, int]:
    """Check the arguments of a call; warn where "auto" takes the slow path.

    Returns (name of the backend, scale, grid, prefix_len, suffix_len), all plain numbers.
    """
    sizes = checks.check_inputs(q, k, v, grid, tensor_layout, *text)
    scale = checks.as_scale(scale, q.shape[3])
    name, reason = backend_for(q, config, backend)
    if name == "reference" and backend == "auto":
        _notice(reason)
    return name, scale, *sizes


def _attend_quantized(x: QuantizedQKV, k, v, given: _Given, with_lse: bool) -> tuple[Tensor, Tensor | None]:
    """(out, lse) of rounded operands, under the windows of another config or over lists if given; as in `_attend`."""
    _check_repeated(x, k, v, given)
    _check_untouched(x)
    grid, own = x.grid, x.config
    config = own if given.config is None else as_config(given.config)
    refuse(config.select, ROUNDED)
    if grid is None:
        line.refuse({"key_tiles": given.key_tiles})
        grid, own, config = line.grid_of(x.shape, x.tensor_layout), line.on_line(own), line.on_line(config)
    if config is not own:
        config = _same_rounding(config, own, grid)
    batch, heads, _, head_dim = checks.heads_first(x.shape, x.tensor_layout)
    check_key_tiles(given.key_tiles, config, grid, batch, heads, x.operands[0].device)
    lengths = x.prefix_len, x.suffix_len
    tensors = x.prefix_valid, x.suffix_valid, *tensors_of(given.key_tiles)
    if x.backend == "reference":
        return reference.emulated_attention(
            *x.operands,
            grid=grid,
            config=config,
            scale=x.scale,
            tensor_layout=x.tensor_layout,
            prefix_len=x.prefix_len,
            suffix_len=x.suffix_len,
            prefix_valid=x.prefix_valid,
            suffix_valid=x.suffix_valid,
            key_tiles=given.key_tiles,
        )
    (packed,) = x.operands
    if ops.is_watched(packed, *tensors):
        rest = list(grid), *lengths, config.spec, x.scale, x.tensor_layout
        return ops.attend(packed, *tensors, *rest, batch, heads, head_dim, x.dtype)
    call = _call_of(x.shape, x.dtype, grid, config, x.scale, x.tensor_layout, *lengths)
    return ops.launch_attend(call, packed, *tensors, with_lse)


def _call_of(
    shape, dtype, grid, config: AttentionConfig, scale: float, layout: str, *lengths: int
) -> ops.Call:
    """The resolved call of q, k, v of this shape."""
    batch, heads, _, head_dim = checks.heads_first(shape, layout)
    return ops.call_of(config, grid, *lengths, batch, heads, head_dim, dtype, scale, layout)


def _check_repeated(quantized: QuantizedQKV, k, v, given: _Given) -> None:
    """Raises unless arguments beside a `QuantizedQKV` are left out, or say what it says."""
    for name, value in {"k": k, "v": v, **given._asdict()}.items():
        unsaid = {"prefix_len": 0, "suffix_len": 0, "backend": "auto"}.get(name)
        if name in ("config", "key_tiles") or value is None or (unsaid is not None and _equal(value, unsaid)):
            continue
        if name in ("k", "v", "prefix_valid", "suffix_valid"):
            raise TypeError(f"{name}: is part of the QuantizedQKV given as q; leave it out")
        if name == "deterministic":
            raise TypeError(
                "deterministic: concerns the backward, and quantised Q, K, V have none; leave it out"
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
    """Raises ValueError when a field was replaced: the operands belong to one grid, tile, scale and backend."""
    if torch.compiler.is_compiling():  # the object was made in the same graph
        return
    if not quantized.made_with:
        raise ValueError("q: is a QuantizedQKV that quantize_qkv has not made; call quantize_qkv")
    for name, made in quantized.made_with.items():
        value = getattr(quantized, name)
        comparable = name not in ("operands", "prefix_valid", "suffix_valid")
        if value is not made and not (comparable and type(value) is type(made) and value == made):
            raise ValueError(
                f"q: is a QuantizedQKV whose {name} was replaced, but not the operands to match; call "
                f"quantize_qkv anew (another window or border goes into attention's config)"
            )


def _same_rounding(config: AttentionConfig, own: AttentionConfig, grid: Triple) -> AttentionConfig:
    """The config, with the tile of the operands' `own` if it has none. Raises ValueError unless it rounds as that."""
    if config.tile is None:
        config = replace(config, tile=own.tile)
    names = ("tile", "quant", "quant_tile", "smooth_k")
    if any(getattr(config, name) != getattr(own, name) for name in names):
        # What None stands for may be the same.
        given, expected = (replace(x, window=None).resolve(grid, 1) for x in (config, own))
        for name in names:
            if getattr(given, name) != getattr(expected, name):
                raise ValueError(
                    f"config: {name}={shown(getattr(config, name))}, but Q, K, V were quantised with "
                    f"{name}={shown(getattr(own, name))}; only window and border may differ"
                )
    return config


@torch.compiler.assume_constant_result  # torch.compile runs it while tracing and leaves it out of the graph
def _notice(reason: str) -> None:
    """Warn once that the slow path runs. Raises RuntimeError in strict mode."""
    message = f"fpsattention runs its reference instead of the Hopper kernel, slowly: {reason}"
    strict = os.environ.get("FPSATTENTION_STRICT", "0")
    if strict not in ("", "0", "1"):
        raise ValueError(f"FPSATTENTION_STRICT: {shown(strict)} must be 0 or 1")
    if strict == "1":
        raise RuntimeError(f"{message} (FPSATTENTION_STRICT=1)")
    _warn_once(message)


@cache
def _warn_once(message: str) -> None:
    package, frame, level = __name__.partition(".")[0], sys._getframe(), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == package:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)  # names the line that calls this package


def check_rounding(config: AttentionConfig, inputs: dict, instead: str) -> None:
    """Raises ValueError when the config rounds nothing or selects, RuntimeError when one of the inputs requires a
    gradient.
    """
    if config.quant != "fp8":
        raise ValueError(f'config: quant={config.quant!r} rounds nothing; use quant="fp8"')
    refuse(config.select, ROUNDED)
    names = [name for name, x in inputs.items() if isinstance(x, Tensor) and x.requires_grad]
    if names and torch.is_grad_enabled():
        raise RuntimeError(
            f"{', '.join(names)}: a gradient is required, but there is none of quantised tensors; call it under "
            f"torch.no_grad(), or {instead}"
        )


def check_window(q, grid, config: AttentionConfig, tensor_layout: str, prefix_len=0, suffix_len=0) -> None:
    """Raises ValueError when the window does not fit the grid or the heads."""
    if not torch.compiler.is_compiling():  # a graph checks it in `attention`
        config.resolve(grid, checks.to_heads_first(q, tensor_layout).shape[1], prefix_len, suffix_len)


def _unquantized(q, k, v, with_lse: bool, about: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
    """quant="none" on a GPU: torch's SDPA where it can do all that is asked, else FlexAttention."""
    scale, layout = about["scale"], about["tensor_layout"]
    counts, key_tiles = (about["prefix_valid"], about["suffix_valid"]), about["key_tiles"]
    _, heads, _, _ = checks.heads_first(q.shape, layout)
    resolved = about["config"].resolve(about["grid"], heads, about["prefix_len"], about["suffix_len"])
    everything = resolved.windows == (resolved.geometry.tiles,) and key_tiles is None
    if everything and counts == (None, None) and not with_lse:
        q, k, v = (checks.to_heads_first(x, layout) for x in (q, k, v))
        out = checks.to_heads_first(F.scaled_dot_product_attention(q, k, v, scale=scale), layout)
        return out, None
    if checks.dispatches(q):  # FlexAttention's lists of blocks have values
        return _exact(q, k, v, about)
    from .flex import flex_attention  # brings torch's compiler, which takes a second to import

    return flex_attention(q, k, v, resolved, scale, layout, *counts, key_tiles)


def _exact(q, k, v, about: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The reference without rounding, in fp32 at least."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    out, lse = reference.exact_attention(q, k, v, **about, dtype=dtype)
    return out.to(q.dtype), lse.float()
