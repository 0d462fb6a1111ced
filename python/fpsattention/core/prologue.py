"""RMSNorm and rotary embedding of Q and K, fused into their quantisation: `norm_rope_quantize`."""

from __future__ import annotations

import math
from collections.abc import Sequence

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
    eps: float = 1e-6,
    rope: Sequence[Tensor] | None = None,
    config: AttentionConfig | None = None,
    scale: float | None = None,
    tensor_layout: str = "NHD",
    backend: str = "auto",
) -> QuantizedQKV:
    """`quantize_qkv` of `norm_rope` of q, `norm_rope` of k, and v.

    The Hopper kernels read Q and K once for the norms and once for all the rest. As separate steps, norm, rotation and
    quantisation would read and write Q and K twice more. The result has no gradient.

    Args:
        q, k, v: projections, [B, L, H, D] ("NHD") or [B, H, L, D] ("HND"), L = T * H * W tokens of the grid.
        q_weight, k_weight, eps, rope: as in `norm_rope`; both weights or none.
        grid, config, scale, tensor_layout, backend: as in `attention`; config.quant must be "fp8", and config.smooth_k
            False, since smoothing needs K's mean first.

    Returns a `QuantizedQKV`, which `attention` takes in place of q, k and v.
    Raises as `quantize_qkv` and `norm_rope` do.
    """
    config, rope, no_text = as_config(config), _as_tables(rope), (0, 0, None, None)
    inputs = {"q": q, "k": k, "v": v, "q_weight": q_weight, "k_weight": k_weight}
    inputs |= {f"rope[{axis}]": x for axis, x in enumerate(rope)}
    check_rounding(config, inputs, instead="hand norm_rope of q and k, and v, to attention")
    if config.smooth_k:
        raise ValueError(
            "config: smooth_k=True needs the mean of K before K is rounded; use smooth_k=False, or norm_rope and then "
            "quantize_qkv"
        )
    cast = checks.as_autocast(q, k, v)
    name, scale, grid, *_ = set_up(*cast, grid, config, scale, tensor_layout, backend, *no_text)
    if (q_weight is None) != (k_weight is None):
        missing = "q_weight" if q_weight is None else "k_weight"
        raise ValueError(f"{missing}: is missing; give the weights of both norms, or none")
    for argument, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        _check(argument, q, weight, eps, rope, grid, tensor_layout)
    if q_weight is not None and k_weight is not None and q_weight.numel() != k_weight.numel():
        raise ValueError(
            f"k_weight: has {k_weight.numel()} elements, q_weight {q_weight.numel()}; both must be weights of a head's "
            f"channels, or both of all heads' channels"
        )
    check_window(q, grid, config, tensor_layout)
    if name == "reference" or cast[0].dtype != q.dtype:  # autocast casts after norm and rotation
        q, k = (
            norm_rope(x, weight, eps=eps, rope=rope, grid=grid, tensor_layout=tensor_layout)
            for x, weight in ((q, q_weight), (k, k_weight))
        )
        return quantize_qkv(
            q, k, v, grid=grid, config=config, scale=scale, tensor_layout=tensor_layout, backend=name
        )
    weights = [None if x is None else x.detach() for x in (q_weight, k_weight)]
    packed = ops.norm_rope_quantize(
        *(q.detach(), k.detach(), v.detach(), *weights, eps, [x.detach() for x in rope]),
        *(list(grid), config.spec, scale, tensor_layout),
    )
    return QuantizedQKV.of(
        operands=(packed,),
        grid=grid,
        config=config,
        scale=scale,
        tensor_layout=tensor_layout,
        dtype=q.dtype,
        shape=tuple(q.shape),
        backend=name,
    )


def norm_rope(
    x: Tensor,
    weight: Tensor | None = None,
    *,
    grid: Sequence[int],
    eps: float = 1e-6,
    rope: Sequence[Tensor] | None = None,
    tensor_layout: str = "NHD",
) -> Tensor:
    """RMSNorm of x (arXiv 1910.07467, Eq. 4), then rotary embedding on three axes (arXiv 2104.09864, Eq. 34).

    The arithmetic is in fp32; the result is rounded to x's dtype once.

    Args:
        x: [B, L, H, D] ("NHD") or [B, H, L, D] ("HND"), L = T * H * W tokens of the grid.
        weight: weight of the norm. [H * D]: one mean square over the channels of all heads; [D]: one for each head;
            None: no norm. Of any floating-point dtype.
        grid: tokens (T, H, W).
        eps: added to the mean square.
        rope: three tables [T, P_t, 2], [H, P_h, 2], [W, P_w, 2] of any floating-point dtype, P_t + P_h + P_w = D / 2:
            cosine and sine of the angle by which a coordinate rotates a pair of channels. Channels (2i, 2i + 1) are
            pair i; the pairs of t come first, then those of h, then those of w. None or empty: no rotation.

    Returns a tensor like x.
    Raises TypeError or ValueError that name the argument, its value, the rule and the nearest legal value.
    """
    rope = _as_tables(rope)
    checks.check_tensor("x", x, tensor_layout)
    _, _, tokens, _ = checks.heads_first(x.shape, tensor_layout)
    if tokens != math.prod(as_grid(grid)):
        raise ValueError(
            f"x: has {tokens} tokens in layout {tensor_layout}, but grid {tuple(grid)} has {math.prod(grid)}"
        )
    _check("weight", x, weight, eps, rope, grid, tensor_layout)
    values = checks.to_heads_first(x, tensor_layout).transpose(1, 2).float()  # [B, L, H, D]
    if weight is not None:
        per_head = weight.numel() == values.shape[3]
        mean = values.square().mean(3 if per_head else (2, 3), keepdim=True)
        values = values * (mean + eps).rsqrt() * weight.float().view(1, 1, -1, values.shape[3])
    if rope:
        shapes = [[n if i == axis else 1 for i in range(3)] for axis, n in enumerate(grid)]
        rotations = [
            table.float().view(*shape, -1, 2).expand(*grid, -1, 2)
            for table, shape in zip(rope, shapes, strict=True)
        ]
        cos, sin = torch.cat(rotations, dim=3).flatten(0, 2)[:, None].unbind(-1)  # [L, 1, D / 2]
        even, odd = values.unflatten(3, (-1, 2)).unbind(-1)
        values = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(3)
    return (values if tensor_layout == "NHD" else values.transpose(1, 2)).to(x.dtype)


def _as_tables(rope: Sequence[Tensor] | None) -> tuple[Tensor, ...]:
    if rope is None:
        return ()
    rule = "rope: must be three floating-point tensors, for the axes t, h and w"
    try:
        tables = tuple(rope)
    except TypeError:
        raise TypeError(f"{rule}, got {type(rope).__name__}") from None
    for table in tables:
        if not isinstance(table, Tensor) or not table.is_floating_point():
            raise TypeError(f"{rule}; one is {checks.kind_of(table)}")
    return tables


def _check(
    name: str,
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    rope: tuple[Tensor, ...],
    grid: Sequence[int],
    tensor_layout: str,
) -> None:
    """Check the arguments of `norm_rope` for x. `name` is the weight's in errors."""
    _, heads, _, head_dim = checks.to_heads_first(x, tensor_layout).shape
    if not isinstance(eps, float) or not eps >= 0:
        raise ValueError(f"eps: {shown(eps)} must be a float of at least 0")
    if weight is not None:
        if not isinstance(weight, Tensor):
            raise TypeError(f"{name}: must be a tensor, got {checks.kind_of(weight)}")
        if weight.device != x.device or not weight.is_floating_point():
            raise ValueError(
                f"{name}: {weight.dtype} on {weight.device} must be floating-point on {x.device}"
            )
        if weight.dim() != 1 or weight.numel() not in (head_dim, heads * head_dim):
            raise ValueError(
                f"{name}: shape {shown(list(weight.shape))} must be [{head_dim}], for a norm of each head, or "
                f"[{heads * head_dim}], for a norm of all heads together"
            )
    if not rope:
        return
    if len(rope) != 3:
        raise ValueError(f"rope: {len(rope)} tables must be three, for the axes t, h and w")
    for axis, table, n in zip(AXES, rope, grid, strict=True):
        if table.dim() != 3 or table.shape[0] != n or table.shape[2] != 2:
            raise ValueError(
                f"rope: shape {shown(list(table.shape))} on axis {axis} must be [{n}, pairs, 2], cosines and sines"
            )
        if table.device != x.device:
            raise ValueError(
                f"rope: device {table.device} on axis {axis} must be that of the tensor it rotates, {x.device}"
            )
    if sum(table.shape[1] for table in rope) * 2 != head_dim:
        raise ValueError(
            f"rope: {[table.shape[1] for table in rope]} pairs must be {head_dim // 2} in all, half of head_dim"
        )
