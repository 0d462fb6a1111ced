"""Norm and rotary embedding of Q and K, fused into their quantisation: `norm_rope_quantize`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import checks, ops
from .api import QuantizedQKV, check_rounding, check_window, quantize_qkv, set_up
from .checks import as_grid, shown
from .config import AXES, AttentionConfig, as_config


def norm_rope_quantize(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    grid: Sequence[int],
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    q_bias: Tensor | None = None,
    k_bias: Tensor | None = None,
    q_text_weight: Tensor | None = None,
    k_text_weight: Tensor | None = None,
    eps: float = 1e-6,
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
        q_weight, q_bias, q_text_weight and those of k: weight, bias and text_weight of `norm_rope`; of both or none.
        eps, rope: as in `norm_rope`.
        grid, config, scale, tensor_layout, prefix_len, suffix_len, prefix_valid, suffix_valid, backend: as in
            `attention`; config.quant must be "fp8", and config.smooth_k False, since smoothing needs K's mean first.

    Returns a `QuantizedQKV`, which `attention` takes in place of q, k and v.
    Raises as `quantize_qkv` and `norm_rope` do.
    """
    config, tables = as_config(config), _as_tables(rope)
    of_q, of_k = (q_weight, q_bias, q_text_weight), (k_weight, k_bias, k_text_weight)
    inputs: dict[str, Tensor | None] = {"q": q, "k": k, "v": v}
    for name, mine, other in zip(("weight", "bias", "text_weight"), of_q, of_k, strict=True):
        inputs |= {f"q_{name}": mine, f"k_{name}": other}
    inputs |= {f"rope[{axis}]": x for axis, x in enumerate(tables)}
    check_rounding(config, inputs, instead="hand norm_rope of q and k, and v, to attention")
    if config.smooth_k:
        raise ValueError(
            "config: smooth_k=True needs the mean of K before K is rounded; use smooth_k=False, or norm_rope and then "
            "quantize_qkv"
        )
    cast, counts = checks.as_autocast(q, k, v), (prefix_valid, suffix_valid)
    text = prefix_len, suffix_len, *counts
    name, scale, grid, *lengths = set_up(*cast, grid, config, scale, tensor_layout, backend, *text)
    for argument, mine, other in zip(("weight", "bias", "text_weight"), of_q, of_k, strict=True):
        if (mine is None) != (other is None):
            missing = f"{'q' if mine is None else 'k'}_{argument}"
            raise ValueError(f"{missing}: is missing; give those of both norms, or none")
    for prefix, norm in (("q_", of_q), ("k_", of_k)):
        _check(q, *norm, eps, tables, grid, tensor_layout, prefix)
    if q_weight is not None and k_weight is not None and q_weight.numel() != k_weight.numel():
        raise ValueError(
            f"k_weight: has {k_weight.numel()} elements, q_weight {q_weight.numel()}; both must be weights of a head's "
            f"channels, or both of all heads' channels"
        )
    check_window(q, grid, config, tensor_layout, *lengths)
    about: dict[str, Any] = {
        "grid": grid,
        "tensor_layout": tensor_layout,
        "prefix_len": lengths[0],
        "suffix_len": lengths[1],
    }
    if name == "reference" or cast[0].dtype != q.dtype:  # autocast casts after norm and rotation
        q, k = (
            norm_rope(x, weight, bias=bias, text_weight=text_weight, eps=eps, rope=rope, **about)
            for x, (weight, bias, text_weight) in ((q, of_q), (k, of_k))
        )
        about |= {"prefix_valid": prefix_valid, "suffix_valid": suffix_valid}
        return quantize_qkv(q, k, v, config=config, scale=scale, backend=name, **about)
    weights, biases, text_weights = (
        [x.detach() for x in pair if x is not None] for pair in zip(of_q, of_k, strict=True)
    )
    packed = ops.norm_rope_quantize(
        *(q.detach(), k.detach(), v.detach(), *counts, weights, text_weights, biases, eps),
        *([x.detach() for x in tables], list(grid), *lengths, config.spec, scale, tensor_layout),
    )
    return QuantizedQKV.of(
        operands=(packed,),
        config=config,
        scale=scale,
        dtype=q.dtype,
        shape=tuple(q.shape),
        backend=name,
        prefix_valid=prefix_valid,
        suffix_valid=suffix_valid,
        **about,
    )


def norm_rope(
    x: Tensor,
    weight: Tensor | None = None,
    *,
    grid: Sequence[int],
    bias: Tensor | None = None,
    text_weight: Tensor | None = None,
    eps: float = 1e-6,
    rope: Tensor | Sequence[Tensor] | None = None,
    tensor_layout: str = "NHD",
    prefix_len: int = 0,
    suffix_len: int = 0,
) -> Tensor:
    """RMSNorm (arXiv 1910.07467, Eq. 4) or LayerNorm (arXiv 1607.06450, Eq. 4) of x, then rotary embedding of the
    grid's tokens (arXiv 2104.09864, Eq. 34).

    The arithmetic is in fp32; the result is rounded to x's dtype once.

    Args:
        x: [B, L, H, D] ("NHD") or [B, H, L, D] ("HND"): the T * H * W tokens of the grid, with prefix_len text tokens
            before and suffix_len after them.
        weight: weight of the norm. [H * D]: one mean square over the channels of all heads; [D]: one for each head;
            None: no norm. Of any floating-point dtype.
        grid: tokens (T, H, W).
        bias: makes the norm a LayerNorm of each head, with this bias; [D], for a weight that is [D].
        text_weight: weight of text tokens, of weight's shape; None: the same.
        eps: added to the mean square, or to the variance.
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
        with_text = "".join(f", {name} is {n}" for name, n in lengths.items() if n)
        raise ValueError(
            f"x: has {tokens} tokens in layout {tensor_layout}, but grid {tuple(grid)} has {video}{with_text}"
        )
    _check(x, weight, bias, text_weight, eps, tables, grid, tensor_layout)
    values = checks.to_heads_first(x, tensor_layout).transpose(1, 2).float()  # [B, L, H, D]
    before, values, after = values.split([prefix_len, video, suffix_len], dim=1)
    values = _normalised(values, weight, bias, eps)
    if tables:
        values = _rotated(values, tables, grid)
    if prefix_len or suffix_len:
        of_text = weight if text_weight is None else text_weight
        before, after = (_normalised(text, of_text, bias, eps) for text in (before, after))
        values = torch.cat((before, values, after), dim=1)
    return (values if tensor_layout == "NHD" else values.transpose(1, 2)).to(x.dtype)


def _normalised(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """x [B, L, H, D] after its norm."""
    if weight is None:
        return x
    per_head = weight.numel() == x.shape[3]
    if bias is not None:
        x = x - x.mean(3, keepdim=True)
    mean = x.square().mean(3 if per_head else (2, 3), keepdim=True)
    x = x * (mean + eps).rsqrt() * weight.float().view(1, 1, -1, x.shape[3])
    return x if bias is None else x + bias.float()


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


def _check(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    text_weight: Tensor | None,
    eps: float,
    tables: tuple[Tensor, ...],
    grid: Sequence[int],
    tensor_layout: str,
    prefix: str = "",
) -> None:
    """Check the arguments of `norm_rope` for x. `prefix` is that of their names in errors."""
    _, heads, _, head_dim = checks.to_heads_first(x, tensor_layout).shape
    if not isinstance(eps, float) or not eps >= 0:
        raise ValueError(f"eps: {shown(eps)} must be a float of at least 0")
    of_norm = {"weight": weight, "bias": bias, "text_weight": text_weight}
    for name, tensor in of_norm.items():
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{prefix}{name}: must be a tensor, got {checks.kind_of(tensor)}")
        if tensor.device != x.device or not tensor.is_floating_point():
            raise ValueError(
                f"{prefix}{name}: {tensor.dtype} on {tensor.device} must be floating-point on {x.device}"
            )
        if weight is None:
            raise ValueError(f"{prefix}{name}: is given without {prefix}weight; a norm has a weight")
    if weight is not None and (weight.dim() != 1 or weight.numel() not in (head_dim, heads * head_dim)):
        raise ValueError(
            f"{prefix}weight: shape {shown(list(weight.shape))} must be [{head_dim}], for a norm of each head, or "
            f"[{heads * head_dim}], for a norm of all heads together"
        )
    if weight is not None and text_weight is not None and text_weight.shape != weight.shape:
        raise ValueError(
            f"{prefix}text_weight: shape {shown(list(text_weight.shape))} must be that of {prefix}weight, "
            f"{shown(list(weight.shape))}"
        )
    if weight is not None and bias is not None and (weight.numel() != head_dim or bias.shape != weight.shape):
        raise ValueError(
            f"{prefix}bias: shape {shown(list(bias.shape))} must be [{head_dim}], as that of {prefix}weight: a "
            f"LayerNorm is of each head"
        )
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
    elif tables:
        for of_axis, table, n in zip(AXES, tables, grid, strict=True):
            if table.dim() != 3 or table.shape[0] != n or table.shape[2] != 2:
                raise ValueError(
                    f"rope: shape {shown(list(table.shape))} on axis {of_axis} must be [{n}, pairs, 2], cosines "
                    f"and sines"
                )
        if sum(table.shape[1] for table in tables) * 2 != head_dim:
            raise ValueError(
                f"rope: {[table.shape[1] for table in tables]} pairs must be {head_dim // 2} in all, half of head_dim"
            )
