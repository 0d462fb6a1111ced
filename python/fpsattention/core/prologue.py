"""Norm and rotary embedding of Q and K, fused into their quantisation: `norm_rope_quantize`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from . import checks, ops
from .api import QuantizedQKV, check_rounding, check_window, quantize_qkv, set_up
from .checks import as_grid, shown
from .config import AXES, AttentionConfig, as_config

MAX_ANGLES = 2**31 - 1  # elements of a table of each token: the kernel counts them in 32 bits


@dataclass(frozen=True)
class Norm:
    """A norm of the channels of Q or of K: RMSNorm (arXiv 1910.07467, Eq. 4) or LayerNorm (arXiv 1607.06450, Eq. 4).

    Attributes, tensors of any floating-point dtype:
        weight: [H * D]: one mean square over the channels of all heads; [D]: one for each head.
        bias: makes it a LayerNorm of each head, with this bias; [D], for a weight that is [D].
        text_weight: weight of text tokens, of weight's shape; None: the same. Not with a bias.
        eps: added to the mean square, or to the variance; finite, at least 0.
    """

    weight: Tensor
    bias: Tensor | None = None
    text_weight: Tensor | None = None
    eps: float = 1e-6

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Those that are given, by their names in errors."""
        given = {"weight": self.weight, "bias": self.bias, "text_weight": self.text_weight}
        return {f"{name}.{key}": x for key, x in given.items() if x is not None}


def norm_rope_quantize(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    grid: Sequence[int],
    q_norm: Norm | None = None,
    k_norm: Norm | None = None,
    rope: Tensor | Sequence[Tensor] | None = None,
    config: AttentionConfig | None = None,
    scale: float | None = None,
    tensor_layout: str = "NHD",
    prefix_len: int = 0,
    suffix_len: int = 0,
    prefix_valid: Tensor | None = None,
    suffix_valid: Tensor | None = None,
    backend: str = "auto",
) -> QuantizedQKV:
    """`quantize_qkv` of `norm_rope` of q, `norm_rope` of k, and v.

    The Hopper kernels read Q and K once for all of it, and once more for means over all heads. As separate steps, norm,
    rotation and quantisation would read and write Q and K twice more. The result has no gradient.

    Args:
        q, k, v: projections, [B, L, H, D] ("NHD") or [B, H, L, D] ("HND"): the T * H * W tokens of the grid, with
            prefix_len text tokens before and suffix_len after them.
        q_norm, k_norm: of one kind, with one eps; both or none.
        rope: as in `norm_rope`.
        grid, config, scale, tensor_layout, prefix_len, suffix_len, prefix_valid, suffix_valid, backend: as in
            `attention`; config.quant must be "fp8", and config.smooth_k False, since smoothing needs K's mean first.

    Returns a `QuantizedQKV`, which `attention` takes in place of q, k and v.
    Raises as `quantize_qkv` and `norm_rope` do.
    """
    config, tables, norms = as_config(config), _as_tables(rope), _as_pair(q_norm, k_norm)
    inputs: dict[str, Tensor] = {"q": q, "k": k, "v": v} | {
        f"rope[{axis}]": x for axis, x in enumerate(tables)
    }
    for name, norm in zip(("q_norm", "k_norm"), norms, strict=False):
        inputs |= norm.tensors(name)
    check_rounding(config, inputs, instead="hand norm_rope of q and k, and v, to attention")
    if config.smooth_k:
        raise ValueError(
            "config: smooth_k=True needs the mean of K before K is rounded; use smooth_k=False, or norm_rope and then "
            "quantize_qkv"
        )
    cast, counts = checks.as_autocast(q, k, v), (prefix_valid, suffix_valid)
    text = prefix_len, suffix_len, *counts
    name, scale, grid, *lengths = set_up(*cast, grid, config, scale, tensor_layout, backend, *text)
    for argument, given in (("q_norm", q_norm), ("k_norm", k_norm)):
        _check(q, argument, given, tables, grid, tensor_layout)
    check_window(q, grid, config, tensor_layout, *lengths)
    about: dict[str, Any] = {"grid": grid, "tensor_layout": tensor_layout}
    about |= {"prefix_len": lengths[0], "suffix_len": lengths[1]}
    valid: dict[str, Any] = {"prefix_valid": prefix_valid, "suffix_valid": suffix_valid}
    if name == "reference" or cast[0].dtype != q.dtype:  # autocast casts after norm and rotation
        q, k = (norm_rope(x, own, rope=rope, **about) for x, own in ((q, q_norm), (k, k_norm)))
        return quantize_qkv(q, k, v, config=config, scale=scale, backend=name, **about, **valid)
    weights, text_weights, biases = (_given(norms, of) for of in ("weight", "text_weight", "bias"))
    packed = ops.norm_rope_quantize(
        *(q.detach(), k.detach(), v.detach(), *counts, weights, text_weights, biases),
        *(float(norms[0].eps) if norms else 0.0, [x.detach() for x in tables]),
        *(list(grid), *lengths, config.spec, scale, tensor_layout),
    )
    sizes = {"dtype": q.dtype, "shape": tuple(q.shape)}
    return QuantizedQKV.of(
        operands=(packed,), config=config, scale=scale, backend=name, **sizes, **about, **valid
    )


def norm_rope(
    x: Tensor,
    norm: Norm | None = None,
    *,
    grid: Sequence[int],
    rope: Tensor | Sequence[Tensor] | None = None,
    tensor_layout: str = "NHD",
    prefix_len: int = 0,
    suffix_len: int = 0,
) -> Tensor:
    """The norm of x, then rotary embedding of the grid's tokens (arXiv 2104.09864, Eq. 34).

    The arithmetic is in fp32; the result is rounded to x's dtype once.

    Args:
        x: [B, L, H, D] ("NHD") or [B, H, L, D] ("HND"): the T * H * W tokens of the grid, with prefix_len text tokens
            before and suffix_len after them.
        norm: None: no norm.
        grid: tokens (T, H, W).
        rope: cosine and sine of the angle by which a token rotates a pair of channels, of any floating-point dtype.
            Channels (2i, 2i + 1) are pair i. One tensor [T * H * W, 1 or H, D / 2, 2], of each token and, with H, of
            each head; or three tables [T, P_t, 2], [H, P_h, 2], [W, P_w, 2] for rotation on three axes,
            P_t + P_h + P_w = D / 2: the pairs of t come first, then those of h, then those of w. None or empty: no
            rotation. Text is never rotated.

    Returns a tensor like x.
    Raises TypeError or ValueError that name the argument, its value, the rule and the nearest legal value.
    """
    tables = _as_tables(rope)
    checks.check_tensor("x", x, tensor_layout)
    _, _, tokens, _ = checks.heads_first(x.shape, tensor_layout)
    video = math.prod(as_grid(grid))
    prefix_len = checks.as_int("prefix_len", prefix_len, 0)
    suffix_len = checks.as_int("suffix_len", suffix_len, 0)
    if tokens != prefix_len + video + suffix_len:
        lengths = {"prefix_len": prefix_len, "suffix_len": suffix_len}
        with_text = "".join(f", {name} is {shown(n)}" for name, n in lengths.items() if n)
        raise ValueError(
            f"x: has {tokens} tokens in layout {tensor_layout}, but grid {tuple(grid)} has {video}{with_text}"
        )
    _check(x, "norm", norm, tables, grid, tensor_layout)
    values = checks.to_heads_first(x, tensor_layout).transpose(1, 2).float()  # [B, L, H, D]
    before, values, after = values.split([prefix_len, video, suffix_len], dim=1)
    values = _normalised(values, norm)
    if tables:
        values = _rotated(values, tables, grid)
    if prefix_len or suffix_len:
        if norm is not None and norm.text_weight is not None:
            norm = replace(norm, weight=norm.text_weight)
        values = torch.cat((_normalised(before, norm), values, _normalised(after, norm)), dim=1)
    return (values if tensor_layout == "NHD" else values.transpose(1, 2)).to(x.dtype)


def _normalised(x: Tensor, norm: Norm | None) -> Tensor:
    """x [B, L, H, D] after its norm."""
    if norm is None:
        return x
    per_head = norm.weight.numel() == x.shape[3]
    if norm.bias is not None:
        x = x - x.mean(3, keepdim=True)
    mean = x.square().mean(3 if per_head else (2, 3), keepdim=True)
    x = x * (mean + norm.eps).rsqrt() * norm.weight.float().view(1, 1, -1, x.shape[3])
    return x if norm.bias is None else x + norm.bias.float()


def _rotated(x: Tensor, tables: tuple[Tensor, ...], grid: Sequence[int]) -> Tensor:
    """x [B, L, H, D] after its rotation."""
    if len(tables) == 1:
        angles = tables[0].float()
    else:
        shapes = [[n if i == axis else 1 for i in range(3)] for axis, n in enumerate(grid)]
        rotations = [
            table.float().view(*shape, -1, 2).expand(*grid, -1, 2)
            for table, shape in zip(tables, shapes, strict=True)
        ]
        angles = torch.cat(rotations, dim=3).flatten(0, 2)[:, None]
    cos, sin = angles.unbind(-1)  # [L, 1 or H, D / 2]
    even, odd = x.unflatten(3, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(3)


def _as_tables(rope: Tensor | Sequence[Tensor] | None) -> tuple[Tensor, ...]:
    if rope is None:
        return ()
    rule = "rope: must be a floating-point tensor, or three of them for the axes t, h and w"
    try:
        tables = (rope,) if isinstance(rope, Tensor) else tuple(rope)
    except TypeError:
        raise TypeError(f"{rule}, got {type(rope).__name__}") from None
    for table in tables:
        if not isinstance(table, Tensor) or not table.is_floating_point():
            raise TypeError(f"{rule}; one is {checks.kind_of(table)}")
    if len(tables) not in (0, 3) and not isinstance(rope, Tensor):
        raise ValueError(f"rope: {len(tables)} tables must be three, for the axes t, h and w")
    return tables


def _given(norms: Sequence[Norm], name: str) -> list[Tensor]:
    """This tensor of the norms that have it."""
    tensors = [getattr(norm, name) for norm in norms]
    return [x.detach() for x in tensors if x is not None]


def _as_pair(q_norm: Norm | None, k_norm: Norm | None) -> tuple[Norm, ...]:
    """Both norms, or none. Raises unless they are of one kind."""
    for name, norm in (("q_norm", q_norm), ("k_norm", k_norm)):
        if norm is not None and not isinstance(norm, Norm):
            raise TypeError(f"{name}: {shown(norm)} must be a Norm or None")
    if q_norm is None and k_norm is None:
        return ()
    if q_norm is None or k_norm is None:
        raise ValueError(f"{'q_norm' if q_norm is None else 'k_norm'}: is missing; give both norms, or none")
    if q_norm.eps != k_norm.eps and q_norm.eps == q_norm.eps:  # NaN is refused elsewhere
        raise ValueError(
            f"k_norm: has eps {shown(k_norm.eps)}, but must have that of q_norm, {shown(q_norm.eps)}"
        )
    ours, theirs = q_norm.tensors("k_norm"), k_norm.tensors("k_norm")
    for name in {**ours, **theirs}:
        if name not in ours or name not in theirs:
            raise ValueError(f"{name}: only one of the norms has it; give both norms one, or none")
        if isinstance(ours[name], Tensor) and isinstance(theirs[name], Tensor):
            mine, other = list(theirs[name].shape), list(ours[name].shape)
            if mine != other:
                raise ValueError(f"{name}: shape {shown(mine)} must be that of q_norm, {shown(other)}")
    return q_norm, k_norm


def _check(
    x: Tensor,
    name: str,
    norm: Norm | None,
    tables: tuple[Tensor, ...],
    grid: Sequence[int],
    tensor_layout: str,
) -> None:
    """Check the arguments of `norm_rope` for x. `name` is the norm's in errors."""
    _, heads, _, head_dim = checks.to_heads_first(x, tensor_layout).shape
    if norm is not None:
        _check_norm(x, name, norm, heads, head_dim)
    if tables:
        _check_rope(x, tables, grid, heads, head_dim)


def _check_norm(x: Tensor, name: str, norm: Norm, heads: int, head_dim: int) -> None:
    if not isinstance(norm, Norm):
        raise TypeError(f"{name}: {shown(norm)} must be a Norm or None")
    if isinstance(norm.eps, bool) or not isinstance(norm.eps, (int, float)) or not 0 <= norm.eps < math.inf:
        raise ValueError(f"{name}.eps: {shown(norm.eps)} must be a finite number of at least 0")
    for key, tensor in norm.tensors(name).items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{key}: must be a tensor, got {checks.kind_of(tensor)}")
        if tensor.device != x.device or not tensor.is_floating_point():
            raise ValueError(f"{key}: {tensor.dtype} on {tensor.device} must be floating-point on {x.device}")
    weight, bias, text_weight = norm.weight, norm.bias, norm.text_weight
    if not isinstance(weight, Tensor):
        raise TypeError(f"{name}.weight: must be a tensor, got {checks.kind_of(weight)}")
    if weight.dim() != 1 or weight.numel() not in (head_dim, heads * head_dim):
        raise ValueError(
            f"{name}.weight: shape {shown(list(weight.shape))} must be [{head_dim}], for a norm of each head, or "
            f"[{heads * head_dim}], for a norm of all heads together"
        )
    if text_weight is not None and (bias is not None or text_weight.shape != weight.shape):
        raise ValueError(
            f"{name}.text_weight: shape {shown(list(text_weight.shape))} must be that of {name}.weight, "
            f"{shown(list(weight.shape))}, and {name} must have no bias"
        )
    if bias is not None and (weight.numel() != head_dim or bias.shape != weight.shape):
        raise ValueError(
            f"{name}.bias: shape {shown(list(bias.shape))} must be [{head_dim}], as that of {name}.weight: a LayerNorm "
            f"is of each head"
        )


def _check_rope(
    x: Tensor, tables: tuple[Tensor, ...], grid: Sequence[int], heads: int, head_dim: int
) -> None:
    for axis, table in enumerate(tables):
        if table.device != x.device:
            on_axis = f" on axis {AXES[axis]}" if len(tables) == 3 else ""
            raise ValueError(
                f"rope: device {table.device}{on_axis} must be that of the tensor it rotates, {x.device}"
            )
    if len(tables) == 1:
        tokens, pairs = math.prod(grid), head_dim // 2
        if tuple(tables[0].shape) not in ((tokens, 1, pairs, 2), (tokens, heads, pairs, 2)):
            raise ValueError(
                f"rope: shape {shown(list(tables[0].shape))} must be [{tokens}, 1 or {heads}, {pairs}, 2], cosines and "
                f"sines of each token of the grid"
            )
        if tables[0].numel() > MAX_ANGLES:
            raise ValueError(
                f"rope: has {tables[0].numel():,} elements, must have at most {MAX_ANGLES:,}; give angles that all "
                f"heads share, or three tables of axes"
            )
        return
    for of_axis, table, n in zip(AXES, tables, grid, strict=True):
        if table.dim() != 3 or table.shape[0] != n or table.shape[2] != 2:
            raise ValueError(
                f"rope: shape {shown(list(table.shape))} on axis {of_axis} must be [{n}, pairs, 2], cosines and sines"
            )
    if sum(table.shape[1] for table in tables) * 2 != head_dim:
        raise ValueError(
            f"rope: {[table.shape[1] for table in tables]} pairs must be {head_dim // 2} in all, half of head_dim"
        )
