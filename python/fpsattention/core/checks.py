"""Checks of arguments: each function returns the argument in its plain form, or raises an error that names it."""

from __future__ import annotations

import math
import numbers
import operator
import reprlib
from collections.abc import Sequence

import torch
from torch.autograd import forward_ad

from .. import _C

Triple = tuple[int, int, int]


MAX_TOKENS = 2**31 - _C.MAX_SLOT  # token indices are int32 in the kernels, rounded up to tiles too


class _Shown(reprlib.Repr):
    """`repr` for error messages: short, whatever the value."""

    MOST = 80  # characters

    def __init__(self):
        super().__init__()
        self.maxother = self.MOST

    def repr1(self, x, level):
        if isinstance(x, torch.Tensor) and not (x.is_cpu and x.numel() <= 4):  # a GPU would stop
            return f"a {x.dtype} tensor of shape {self.repr1(list(x.shape), level)}"
        try:
            return super().repr1(x, level)
        except Exception:  # of the value's own: Python refuses to print an int of 4,300 digits, for one
            return f"<{type(x).__name__}>"

    def __call__(self, x) -> str:
        text = self.repr(x)
        return text if len(text) <= self.MOST else f"{text[: self.MOST - 3]}..."


shown = _Shown()


def _is_integer(x) -> bool:
    return not isinstance(x, bool) and (isinstance(x, int) or hasattr(x, "__index__"))


def _plain(x) -> int:
    return x if isinstance(x, int) else operator.index(x)


def as_triple(name: str, value: Sequence[int], least: int) -> Triple:
    """`value` as three plain ints (t, h, w), each at least `least`.

    Raises TypeError when it is no sequence of integers, ValueError when it has not three or one is too small;
    both name the argument.
    """

    if type(value) is tuple and len(value) == 3:  # the usual case, in little time: every call comes here
        t, h, w = value
        if type(t) is type(h) is type(w) is int and t >= least and h >= least and w >= least:
            return t, h, w

    def form() -> str:
        return f"{name}: {shown(value)} must be three integers (t, h, w), each at least {least}"

    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        raise TypeError(form())
    if not all(_is_integer(x) for x in value):
        raise TypeError(form())
    if len(value) != 3:
        raise ValueError(f"{form()}; got {len(value)}")
    try:
        t, h, w = (_plain(x) for x in value)
    except TypeError:  # a tensor of floats has the attribute too
        raise TypeError(form()) from None
    if t < least or h < least or w < least:
        nearest = max(t, least), max(h, least), max(w, least)
        raise ValueError(f"{form()}; nearest legal value {shown(nearest)}")
    return t, h, w


def as_int(name: str, value: int, least: int, most: int | None = None) -> int:
    """`value` as a plain int from `least` to `most`. Raises TypeError or ValueError that name the argument."""

    def rule() -> str:
        bounds = f"at least {least}" if most is None else f"at least {least} and at most {most}"
        return f"{name}: {shown(value)} must be an integer, {bounds}"

    if not _is_integer(value):
        raise TypeError(rule())
    try:
        number = _plain(value)
    except TypeError:  # a tensor of floats has the attribute too
        raise TypeError(rule()) from None
    if number < least or (most is not None and number > most):
        raise ValueError(f"{rule()}; nearest legal value {least if number < least else most}")
    return number


def as_grid(value: Sequence[int]) -> Triple:
    """`value` as a token grid (T, H, W); an axis of 0 makes the empty grid. Raises as `as_triple` does."""
    grid = as_triple("grid", value, 0)
    if math.prod(grid) > MAX_TOKENS:
        raise ValueError(
            f"grid: {shown(grid)} has {shown(math.prod(grid))} tokens, at most {MAX_TOKENS} are possible"
        )
    return grid


def shrink_tile(tile: Triple) -> Triple:
    """A tile near `tile` that fits in a slot, made by shortening the longest axis."""
    axes = [min(x, _C.MAX_SLOT) for x in tile]
    while math.prod(axes) > _C.MAX_SLOT:
        axes[axes.index(max(axes))] -= 1
    t, h, w = axes
    return t, h, w


def as_tile(value: Sequence[int]) -> Triple:
    """`value` as a tile (t, h, w) in tokens, at most `_C.MAX_SLOT` of them. Raises as `as_triple` does."""
    tile = as_triple("tile", value, 1)
    if math.prod(tile) > _C.MAX_SLOT:
        raise ValueError(
            f"tile: {shown(tile)} has {shown(math.prod(tile))} tokens, at most {_C.MAX_SLOT} fit in a slot; "
            f"nearest legal tile {shrink_tile(tile)}"
        )
    return tile


def as_truncate(border: str) -> bool:
    """Whether `border`, "clamp" or "truncate", cuts the window at the grid's edge; ValueError for another."""
    if not isinstance(border, str) or border not in ("clamp", "truncate"):
        raise ValueError(f'border: {shown(border)} must be "clamp" or "truncate"')
    return border == "truncate"


DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


MAX_SCALE = 2.0**126  # in the log2 domain still a number of fp32


def check_layout(tensor_layout: str) -> None:
    """Raises ValueError for an unknown layout."""
    if not isinstance(tensor_layout, str) or tensor_layout not in ("NHD", "HND"):
        raise ValueError(
            f'tensor_layout: {shown(tensor_layout)} must be "NHD" ([B, L, H, D]) or "HND" ([B, H, L, D])'
        )


def to_heads_first(x: torch.Tensor, tensor_layout: str) -> torch.Tensor:
    """A view of `x` as [B, H, L, D], from "NHD" [B, L, H, D] or "HND" [B, H, L, D]. Its own inverse. Raises ValueError
    for an unknown layout.
    """
    check_layout(tensor_layout)
    return x.transpose(1, 2) if tensor_layout == "NHD" else x


def kind_of(x) -> str:
    """What an error calls x: the dtype of a tensor, the type of anything else."""
    return str(x.dtype) if isinstance(x, torch.Tensor) else type(x).__name__


def check_tensor(name: str, x: torch.Tensor, tensor_layout: str) -> None:
    """Raises TypeError unless x is a dense tensor of one of `DTYPES`, ValueError unless it has the four dimensions of
    the layout, at least one head and one channel.
    """
    if not isinstance(x, torch.Tensor) or x.dtype not in DTYPES:
        raise TypeError(f"{name}: must be a tensor of {', '.join(map(str, DTYPES))}, got {kind_of(x)}")
    if x.layout is not torch.strided or x.is_nested:
        kind = "a nested tensor" if x.is_nested else x.layout
        raise TypeError(f"{name}: must be a dense tensor (torch.strided), got {kind}")
    if x.dim() != 4:
        shape = "[B, L, H, D]" if tensor_layout == "NHD" else "[B, H, L, D]"
        raise ValueError(f"{name}: must have 4 dimensions {shape}, got shape {shown(list(x.shape))}")
    check_layout(tensor_layout)
    _, second, third, channels = x.shape
    if not (third if tensor_layout == "NHD" else second) or not channels:
        raise ValueError(f"{name}: shape {list(x.shape)} has no heads or no channels; at least 1 of each")


def dispatches(x: torch.Tensor) -> bool:
    """Whether x says itself what an op does with it, as a FakeTensor: there are no values to compute with."""
    return type(x).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__


def as_autocast(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The tensors as torch's own attention takes them under autocast: in its dtype, save those of fp64."""

    def cast(x):
        if not isinstance(x, torch.Tensor) or x.device.type == "meta":  # which autocast does not know
            return x
        if not torch.is_autocast_enabled(x.device.type) or x.dtype not in DTYPES or x.dtype == torch.float64:
            return x
        return x.to(torch.get_autocast_dtype(x.device.type))

    return tuple(map(cast, tensors))


def check_values(name: str, x: torch.Tensor) -> None:
    """Raises TypeError when x has no values of its own."""
    if isinstance(x, torch.Tensor) and dispatches(x):
        raise TypeError(
            f"{name}: is a {type(x).__name__}, which has no values to compute with; give a plain torch.Tensor"
        )


def refuse_transforms(name: str, x: torch.Tensor) -> None:
    """Raises RuntimeError where a derivative or a batch would be lost, or fail far from here: under forward-mode
    differentiation and the transforms of torch.func.
    """
    if not isinstance(x, torch.Tensor):
        return
    if forward_ad.unpack_dual(x).tangent is not None:
        raise RuntimeError(
            f"{name}: has a forward-mode derivative (torch.func.jvp, torch.autograd.forward_ad), which attention does "
            f"not have; differentiate backward (torch.autograd.grad), or use torch's scaled_dot_product_attention "
            f"under sdpa_kernel(SDPBackend.MATH)"
        )
    # Behind torch.compile none of its wrappers are left; torch itself asks in this way.
    if not torch.compiler.is_compiling() and torch._C._functorch.is_functorch_wrapped_tensor(x):
        raise RuntimeError(
            f"{name}: is inside a transform of torch.func (vmap, grad, vjp or one built on them), which attention does "
            f"not support; batch along dimension 0 in place of vmap, and differentiate with torch.autograd.grad or "
            f"backward()"
        )


def grouped(name: str, x: torch.Tensor, q: torch.Tensor, tensor_layout: str) -> str:
    """What to do about x, k or v of the same tokens as q, if it has a head for each group of q's; else nothing."""
    dim = 2 if tensor_layout == "NHD" else 1
    alike = [n == m for i, (n, m) in enumerate(zip(x.shape, q.shape, strict=True)) if i != dim]
    if not all(alike) or not 0 < x.shape[dim] < q.shape[dim] or q.shape[dim] % x.shape[dim]:
        return ""
    groups = q.shape[dim] // x.shape[dim]
    return f" (grouped-query attention: pass {name}.repeat_interleave({groups}, dim={dim}))"


def check_inputs(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, grid: Sequence[int], tensor_layout: str,
    prefix_len: int = 0, suffix_len: int = 0,
    prefix_valid: torch.Tensor | None = None, suffix_valid: torch.Tensor | None = None,
) -> None:  # fmt: skip
    """Check that q, k, v are alike, fill the grid and the sections of text tokens, and have counts that fit.

    Raises TypeError for what is no tensor of `DTYPES`, no integer length or no int32 tensor of counts, ValueError for a
    rank, shape, dtype, device or token count that does not fit, and on the CPU for a count out of range.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        refuse_transforms(name, x)
        check_tensor(name, x, tensor_layout)
        if x is not q:
            _check_alike(name, x, q, tensor_layout)
    if q.device.type == "meta":
        raise ValueError("q: has no values, its device is meta; move it to a CUDA device or the CPU")
    prefix_len, suffix_len = as_int("prefix_len", prefix_len, 0), as_int("suffix_len", suffix_len, 0)
    tokens, video = q.shape[1 if tensor_layout == "NHD" else 2], math.prod(as_grid(grid))
    if tokens != video + prefix_len + suffix_len:
        lengths = {"prefix": prefix_len, "suffix": suffix_len}
        with_text = "".join(f", {name}_len is {shown(n)}" for name, n in lengths.items() if n)
        raise ValueError(
            f"q: has {tokens} tokens in layout {tensor_layout}, but grid {tuple(grid)} has {video}{with_text}"
        )
    if prefix_valid is not None:
        _check_valid("prefix_valid", prefix_valid, "prefix_len", prefix_len, q)
    if suffix_valid is not None:
        _check_valid("suffix_valid", suffix_valid, "suffix_len", suffix_len, q)


def _check_alike(name: str, x: torch.Tensor, q: torch.Tensor, tensor_layout: str) -> None:
    """Raises ValueError unless x has q's shape, dtype and device."""
    if x.shape == q.shape and x.dtype == q.dtype and x.device == q.device:
        return
    for what in ("shape", "dtype", "device"):
        mine, first = getattr(x, what), getattr(q, what)
        if mine != first:
            advice = grouped(name, x, q, tensor_layout) if what == "shape" else ""
            raise ValueError(f"{name}: {what} {mine} must be that of q, {first}{advice}")


def as_scale(scale: float | None, head_dim: int) -> float:
    """`scale` as a plain float; None is head_dim ** -0.5. Raises TypeError or ValueError that name it."""
    if scale is None:
        return head_dim**-0.5

    def rule() -> str:
        return f"scale: {shown(scale)} must be a positive number, at most 2**126"

    # torch.compile knows what is a float, but not what is registered as a number.
    if type(scale) not in (int, float) and (type(scale) is bool or not isinstance(scale, numbers.Real)):
        raise TypeError(rule())
    if not 0 < scale <= MAX_SCALE:
        raise ValueError(rule())
    return float(scale)


def _check_valid(name: str, valid, section: str, length: int, q: torch.Tensor) -> None:
    """Raise unless `valid` counts tokens of a section this long in each sample of q [B, ...]."""
    if not isinstance(valid, torch.Tensor) or valid.dtype != torch.int32:
        raise TypeError(
            f"{name}: must be an int32 tensor with one count for each sample, got {kind_of(valid)}"
        )
    if not length:
        raise ValueError(f"{name}: counts tokens of an empty section, {section} is 0; leave it out")
    if valid.shape != q.shape[:1]:
        raise ValueError(
            f"{name}: shape {shown(list(valid.shape))} must be [{q.shape[0]}], one count for each sample of q"
        )
    if valid.device != q.device:
        raise ValueError(f"{name}: device {valid.device} must be that of q, {q.device}")
    # Elsewhere there is nothing to look at, or looking would stop the device.
    if valid.is_cpu and not torch.compiler.is_compiling() and not dispatches(valid):
        for sample, count in enumerate(valid.tolist()):
            if not 0 <= count <= length:
                raise ValueError(
                    f"{name}: {count} of sample {sample} must be from 0 to {length} ({section}); nearest legal "
                    f"value {min(max(count, 0), length)}"
                )
