"""Checks of arguments.

Errors name the argument, its value, the rule and the nearest legal value. `as_...` functions return the argument in its
plain form.
"""

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

MAX_INT = 2**31 - 1
# Token indices are int32 in the kernels, also after rounding up to a slot.
MAX_TOKENS = MAX_INT - (_C.MAX_SLOT - 1)
MAX_SCALE = 2.0**126  # fp32 holds it also after the factor log2(e)
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
LAYOUTS = {"NHD": "[B, L, H, D]", "HND": "[B, H, L, D]"}


class _Shown(reprlib.Repr):
    """`repr` for error messages: short, whatever the value."""

    MOST = 80  # characters

    def __init__(self) -> None:
        super().__init__()
        self.maxother = self.MOST

    def repr1(self, x: object, level: int) -> str:
        if isinstance(x, torch.Tensor) and not (x.is_cpu and x.numel() <= 4):  # values on a GPU cost a wait
            return f"a {x.dtype} tensor of shape {self.repr1(list(x.shape), level)}"
        try:
            return super().repr1(x, level)
        except Exception:  # the value's own repr fails; Python refuses to print an int of 4,300 digits
            return f"<{type(x).__name__}>"

    def __call__(self, x: object) -> str:
        text = self.repr(x)
        return text if len(text) <= self.MOST else f"{text[: self.MOST - 3]}..."


shown = _Shown()


# Both ask for int first. torch.compile treats a symbol as an int, but knows none of its attributes, and its index would
# become a constant of the graph.


def _is_integer(x: object) -> bool:
    return not isinstance(x, bool) and (isinstance(x, int) or hasattr(x, "__index__"))


def _plain(x: int) -> int:
    return x if isinstance(x, int) else operator.index(x)


def as_triple(name: str, value: Sequence[int], least: int) -> Triple:
    """`value` as three plain ints (t, h, w), each at least `least`.

    Raises TypeError for anything but a sequence of integers, ValueError unless it has three, none below `least`.
    """
    if type(value) is tuple and len(value) == 3:  # fast path: every call of attention comes here
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
    except TypeError:  # a tensor of floats has __index__ too
        raise TypeError(form()) from None
    if t < least or h < least or w < least:
        nearest = max(t, least), max(h, least), max(w, least)
        raise ValueError(f"{form()}; nearest legal value {shown(nearest)}")
    return t, h, w


def as_int(name: str, value: int, least: int, most: int | None = None) -> int:
    """`value` as a plain int from `least` to `most`; None: no upper bound. Raises TypeError or ValueError."""

    def rule() -> str:
        bounds = f"at least {least}" if most is None else f"at least {least} and at most {most}"
        return f"{name}: {shown(value)} must be an integer, {bounds}"

    if not _is_integer(value):
        raise TypeError(rule())
    try:
        number = _plain(value)
    except TypeError:  # a tensor of floats has __index__ too
        raise TypeError(rule()) from None
    if number < least or (most is not None and number > most):
        raise ValueError(f"{rule()}; nearest legal value {least if number < least else most}")
    return number


def as_share(name: str, value: float) -> float:
    """`value` as a plain float above 0 and at most 1. Raises TypeError or ValueError."""

    def rule() -> str:
        return f"{name}: {shown(value)} must be a number above 0 and at most 1"

    # Ask for float first, as in `as_scale`.
    if type(value) not in (int, float) and (type(value) is bool or not isinstance(value, numbers.Real)):
        raise TypeError(rule())
    if not 0 < value <= 1:
        raise ValueError(f"{rule()}{'; nearest legal value 1.0' if value > 1 else ''}")
    return float(value)


def as_grid(value: Sequence[int]) -> Triple:
    """`value` as a token grid (T, H, W). A grid with an axis of 0 is empty. Raises as `as_triple` does."""
    grid = as_triple("grid", value, 0)
    if math.prod(grid) > MAX_TOKENS:
        raise ValueError(
            f"grid: {shown(grid)} has {shown(math.prod(grid))} tokens, at most {MAX_TOKENS} are possible"
        )
    return grid


def shrink_tile(tile: Triple) -> Triple:
    """A tile that fits in a slot: `tile`, its longest axis shortened until it does."""
    axes = [min(x, _C.MAX_SLOT) for x in tile]
    while math.prod(axes) > _C.MAX_SLOT:
        axes[axes.index(max(axes))] -= 1
    t, h, w = axes
    return t, h, w


def as_tile(value: Sequence[int]) -> Triple:
    """`value` as a tile of (t, h, w) tokens, at most `_C.MAX_SLOT` in all. Raises as `as_triple` does."""
    tile = as_triple("tile", value, 1)
    if math.prod(tile) > _C.MAX_SLOT:
        raise ValueError(
            f"tile: {shown(tile)} has {shown(math.prod(tile))} tokens, at most {_C.MAX_SLOT} fit in a slot; "
            f"nearest legal tile {shrink_tile(tile)}"
        )
    return tile


def as_truncate(border: str) -> bool:
    """Whether `border` cuts the window at the grid's edge. Raises ValueError unless it is "clamp" or "truncate"."""
    if not isinstance(border, str) or border not in ("clamp", "truncate"):
        raise ValueError(f'border: {shown(border)} must be "clamp" or "truncate"')
    return border == "truncate"


def as_scale(scale: float | None, head_dim: int) -> float:
    """`scale` as a plain float; None: head_dim ** -0.5. Raises TypeError or ValueError."""
    if scale is None:
        return head_dim**-0.5

    def rule() -> str:
        return f"scale: {shown(scale)} must be a positive number, at most 2**126"

    # Ask for float first: torch.compile cannot trace a test against numbers.Real.
    if type(scale) not in (int, float) and (type(scale) is bool or not isinstance(scale, numbers.Real)):
        raise TypeError(rule())
    if not 0 < scale <= MAX_SCALE:
        raise ValueError(rule())
    return float(scale)


def check_layout(tensor_layout: str) -> None:
    """Raises ValueError for an unknown layout."""
    if not isinstance(tensor_layout, str) or tensor_layout not in LAYOUTS:
        legal = " or ".join(f'"{name}" ({shape})' for name, shape in LAYOUTS.items())
        raise ValueError(f"tensor_layout: {shown(tensor_layout)} must be {legal}")


def to_heads_first(x: torch.Tensor, tensor_layout: str) -> torch.Tensor:
    """View "NHD" [B, L, H, D] or "HND" [B, H, L, D] as [B, H, L, D]. The function is its own inverse.

    Raises ValueError for an unknown layout.
    """
    check_layout(tensor_layout)
    return x.transpose(1, 2) if tensor_layout == "NHD" else x


def heads_first(sizes: Sequence[int], tensor_layout: str) -> tuple[int, int, int, int]:
    """Sizes or strides of the axes in the order [B, H, L, D], from those in the layout's order. Its own inverse."""
    batch, second, third, channels = sizes
    return (batch, third, second, channels) if tensor_layout == "NHD" else (batch, second, third, channels)


def kind_of(x: object) -> str:
    """The name of x in an error: the dtype of a tensor, the type of anything else."""
    return str(x.dtype) if isinstance(x, torch.Tensor) else type(x).__name__


def check_tensor(name: str, x: torch.Tensor, tensor_layout: str) -> None:
    """Raises TypeError unless x is a dense tensor of one of `DTYPES`; ValueError unless it has four dimensions, with at
    least one head and one channel.
    """
    if not isinstance(x, torch.Tensor) or x.dtype not in DTYPES:
        raise TypeError(f"{name}: must be a tensor of {', '.join(map(str, DTYPES))}, got {kind_of(x)}")
    if x.layout is not torch.strided or x.is_nested:
        kind = "a nested tensor" if x.is_nested else x.layout
        raise TypeError(f"{name}: must be a dense tensor (torch.strided), got {kind}")
    check_layout(tensor_layout)
    if x.dim() != 4:
        shape = LAYOUTS[tensor_layout]
        raise ValueError(f"{name}: must have 4 dimensions {shape}, got shape {shown(list(x.shape))}")
    _, heads, _, channels = heads_first(x.shape, tensor_layout)
    if not heads or not channels:
        raise ValueError(
            f"{name}: shape {list(x.shape)} has no heads or no channels; at least 1 of each is needed"
        )


def dispatches(x: torch.Tensor) -> bool:
    """Whether x is of a tensor class that handles every op itself, as FakeTensor does. It may have no values."""
    return type(x).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__


def as_autocast(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Cast the tensors to autocast's dtype where it is enabled. As in torch's own attention, fp64 stays as it is."""
    first = tensors[0]
    if (
        isinstance(first, torch.Tensor)
        and not first.is_meta
        and not torch.is_autocast_enabled(first.device.type)
    ):
        return tensors  # tensors of another device are refused later
    return tuple(map(_as_autocast, tensors))


def _as_autocast(x: torch.Tensor) -> torch.Tensor:
    if not isinstance(x, torch.Tensor) or x.device.type == "meta":  # torch raises when asked about "meta"
        return x
    if not torch.is_autocast_enabled(x.device.type) or x.dtype not in DTYPES or x.dtype == torch.float64:
        return x
    return x.to(torch.get_autocast_dtype(x.device.type))


def check_values(name: str, x: torch.Tensor) -> None:
    """Raises TypeError when x is a tensor without values, as a FakeTensor is."""
    if isinstance(x, torch.Tensor) and dispatches(x):
        raise TypeError(
            f"{name}: is a {type(x).__name__}, which has no values to compute with; give a plain torch.Tensor"
        )


def refuse_transforms(name: str, x: torch.Tensor) -> None:
    """Raises RuntimeError under forward-mode differentiation and inside the transforms of torch.func.

    There a derivative or a batch dimension would be lost without a word, or torch would raise an obscure error.
    """
    if not isinstance(x, torch.Tensor):
        return
    if forward_ad.unpack_dual(x).tangent is not None:
        raise RuntimeError(
            f"{name}: has a forward-mode derivative (torch.func.jvp, torch.autograd.forward_ad), which attention does "
            f"not have; differentiate backward (torch.autograd.grad), or use torch's scaled_dot_product_attention "
            f"under sdpa_kernel(SDPBackend.MATH)"
        )
    # Under torch.compile no wrappers are left. Elsewhere torch's own code asks in this way.
    if not torch.compiler.is_compiling() and torch._C._functorch.is_functorch_wrapped_tensor(x):
        raise RuntimeError(
            f"{name}: is inside a transform of torch.func (vmap, grad, vjp or one built on them), which attention does "
            f"not support; batch along dimension 0 in place of vmap, and differentiate with torch.autograd.grad or "
            f"backward()"
        )


def grouped(name: str, x: torch.Tensor, q: torch.Tensor, tensor_layout: str) -> str:
    """Advice for an error if x (k or v) has fewer heads than q, as in grouped-query attention; otherwise ""."""
    dim = 2 if tensor_layout == "NHD" else 1
    alike = [n == m for i, (n, m) in enumerate(zip(x.shape, q.shape, strict=True)) if i != dim]
    if not all(alike) or not 0 < x.shape[dim] < q.shape[dim] or q.shape[dim] % x.shape[dim]:
        return ""
    groups = q.shape[dim] // x.shape[dim]
    return f" (grouped-query attention: pass {name}.repeat_interleave({groups}, dim={dim}))"


def check_inputs(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, grid: Sequence[int], tensor_layout: str,
    prefix_len: int, suffix_len: int, prefix_valid: torch.Tensor | None, suffix_valid: torch.Tensor | None,
) -> tuple[Triple, int, int]:  # fmt: skip
    """Check q, k and v against each other, and their token count against the grid and the text tokens.

    Returns grid, prefix_len and suffix_len as plain ints: what was given may be tensors, whose values can change.
    Raises TypeError for anything but tensors of `DTYPES`, integer lengths and int32 counts; ValueError for a rank,
    shape, dtype, device or token count that does not fit, and on the CPU for a count of valid tokens out of range.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        refuse_transforms(name, x)
        check_tensor(name, x, tensor_layout)
        if x is not q:
            _check_alike(name, x, q, tensor_layout)
    if q.is_meta:
        raise ValueError("q: is on device meta and has no values; move it to a CUDA device or the CPU")
    prefix_len, suffix_len = as_int("prefix_len", prefix_len, 0), as_int("suffix_len", suffix_len, 0)
    _, _, tokens, _ = heads_first(q.shape, tensor_layout)
    grid = as_grid(grid)
    video = math.prod(grid)
    if tokens != video + prefix_len + suffix_len:
        lengths = {"prefix": prefix_len, "suffix": suffix_len}
        with_text = "".join(f", {name}_len is {shown(n)}" for name, n in lengths.items() if n)
        raise ValueError(
            f"q: has {tokens} tokens in layout {tensor_layout}, but grid {grid} has {video}{with_text}"
        )
    if prefix_valid is not None:
        _check_valid("prefix_valid", prefix_valid, "prefix_len", prefix_len, q)
    if suffix_valid is not None:
        _check_valid("suffix_valid", suffix_valid, "suffix_len", suffix_len, q)
    return grid, prefix_len, suffix_len


def _check_alike(name: str, x: torch.Tensor, q: torch.Tensor, tensor_layout: str) -> None:
    """Raises ValueError unless x has q's shape, dtype and device."""
    if x.shape == q.shape and x.dtype == q.dtype and x.device == q.device:
        return
    for what in ("shape", "dtype", "device"):
        mine, first = getattr(x, what), getattr(q, what)
        if mine != first:
            advice = grouped(name, x, q, tensor_layout) if what == "shape" else ""
            raise ValueError(f"{name}: {what} {mine} must be that of q, {first}{advice}")


def _check_valid(name: str, valid: torch.Tensor, section: str, length: int, q: torch.Tensor) -> None:
    """Check the counts of valid tokens in a section of `length` tokens, one count for each sample of q [B, ...].

    `section` is the argument that gives the length.
    """
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
    # A traced tensor has no values, and reading a GPU's would wait for the GPU.
    if valid.is_cpu and not torch.compiler.is_compiling() and not dispatches(valid):
        for sample, count in enumerate(valid.tolist()):
            if not 0 <= count <= length:
                raise ValueError(
                    f"{name}: {count} of sample {sample} must be from 0 to {length} ({section}); nearest legal "
                    f"value {min(max(count, 0), length)}"
                )
