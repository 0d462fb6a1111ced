"""What models do to Q and K ahead of attention, fused into their quantisation: `norm_rope_quantize`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from . import checks, ops
from .api import QuantizedQKV, check_rounding, check_window, quantize_qkv, set_up
from .checks import as_grid, shown
from .config import AttentionConfig, as_config


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
    """What `quantize_qkv` gives for `norm_rope` of q and of k, and for v: on the Hopper kernels in one pass over each
    besides one for the norms, where the three steps on their own read and write Q and K twice more.

    It gives no gradient.

    Args:
        q, k, v: projections, [B, L, H, D] ("NHD") or [B, H, L, D] ("HND"), L = T * H * W tokens of the grid.
        q_weight, k_weight, eps, rope: see `norm_rope`; both weights or none.
        grid, config, scale, tensor_layout, backend: as in `attention`; config.quant must be "fp8", and smooth_k False:
            K's mean would have to be known first.

    Returns what `attention` takes in place of q, k and v.
    Raises as `quantize_qkv` and `norm_rope` do.
    """
    config, rope, no_text = as_config(config), _as_tables(rope), (0, 0, None, None)
    inputs = {"q": q, "k": k, "v": v, "q_weight": q_weight, "k_weight": k_weight}
    inputs |= {f"rope[{axis}]": x for axis, x in enumerate(rope)}
    check_rounding(config, inputs, instead="hand norm_rope of q and k, and v, to attention")
    if config.smooth_k:
        raise ValueError(
            "config: smooth_k=True needs the mean of K before it is rounded; use smooth_k=False, or norm_rope and "
            "quantize_qkv"
        )
    cast = checks.as_autocast(q, k, v)
    name, scale = set_up(*cast, grid, config, scale, tensor_layout, backend, *no_text)
    if (q_weight is None) != (k_weight is None):
        missing = "q_weight" if q_weight is None else "k_weight"
        raise ValueError(f"{missing}: is missing; give the weights of both norms, or none")
    for argument, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        _check(argument, q, weight, eps, rope, grid, tensor_layout)
    if q_weight is not None and q_weight.numel() != k_weight.numel():
        raise ValueError(
            f"k_weight: has {k_weight.numel()} elements, q_weight {q_weight.numel()}; both norms must be of a head's "
            f"channels, or both of all heads'"
        )
    check_window(q, grid, config, tensor_layout)
    if name == "reference" or cast[0].dtype != q.dtype:  # autocast is of attention, not of norm and rotation
        q, k = (
            norm_rope(x, weight, eps=eps, rope=rope, grid=grid, tensor_layout=tensor_layout)
            for x, weight in ((q, q_weight), (k, k_weight))
        )
        about = {"grid": grid, "config": config, "scale": scale, "tensor_layout": tensor_layout}
        return quantize_qkv(q, k, v, **about, backend=name)
    weights = (None, None) if q_weight is None else (q_weight.detach(), k_weight.detach())
    packed = ops.norm_rope_quantize(
        *(q.detach(), k.detach(), v.detach(), *weights, eps, [x.detach() for x in rope]),
        *(list(grid), config.spec, scale, tensor_layout),
    )
    about = tuple(grid), config, scale, tensor_layout, q.dtype, tuple(q.shape), name
    return QuantizedQKV.of((packed,), *about, *no_text)


def norm_rope(
    x: Tensor,
    weight: Tensor | None = None,
    *,
    grid: Sequence[int],
    eps: float = 1e-6,
    rope: Sequence[Tensor] | None = None,
    tensor_layout: str = "NHD",
) -> Tensor:
    """RMSNorm (arXiv 1910.07467, Eq. 4) of x and then rotary embedding of its three axes (arXiv 2104.09864, Eq. 34), in
    fp32, rounded once.

    Args:
        x: [B, L, H, D] or [B, H, L, D], L = T * H * W tokens of the grid.
        weight: of the norm: [H * D], the mean square is of all heads' channels; [D], of each head's; None: no norm.
        eps: added to the mean square.
        rope: for each axis, cosine and sine of the angle by which a coordinate turns a pair of channels, fp32
            [T, P_t, 2], [H, P_h, 2], [W, P_w, 2], P_t + P_h + P_w = D / 2. Channels (2i, 2i + 1) are pair i; the pairs
            of t come first, then those of h, then of w. None, or empty: no rotation.

        Weights and tables may be of any floating dtype; the arithmetic is in fp32.

    Returns a tensor like x.
    Raises TypeError or ValueError that name the argument, its value, the rule and the nearest legal value.
    """
    rope = _as_tables(rope)
    checks.check_tensor("x", x, tensor_layout)
    tokens = x.shape[1 if tensor_layout == "NHD" else 2]
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
        turns = [
            table.float().view(*shape, -1, 2).expand(*grid, -1, 2)
            for table, shape in zip(rope, shapes, strict=True)
        ]
        cos, sin = torch.cat(turns, dim=3).flatten(0, 2)[:, None].unbind(-1)  # [L, 1, D / 2]
        even, odd = values.unflatten(3, (-1, 2)).unbind(-1)
        values = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(3)
    return (values if tensor_layout == "NHD" else values.transpose(1, 2)).to(x.dtype)


def _as_tables(rope: Sequence[Tensor] | None) -> tuple[Tensor, ...]:
    if rope is None:
        return ()
    rule = "rope: must be three floating-point tensors, of the axes t, h and w"
    try:
        tables = tuple(rope)
    except TypeError:
        raise TypeError(f"{rule}, got {type(rope).__name__}") from None
    for table in tables:
        if not isinstance(table, Tensor) or not table.is_floating_point():
            raise TypeError(f"{rule}; one is {checks.kind_of(table)}")
    return tables


def _check(name: str, x: Tensor, weight: Tensor | None, eps: float, rope: tuple, grid, tensor_layout: str):
    """Raise unless x [B, L, H, D], or heads first, can be normalised and turned; `name` is that of the weight."""
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
                f"[{heads * head_dim}], for one of all heads"
            )
    if not rope:
        return
    if len(rope) != 3:
        raise ValueError(f"rope: {len(rope)} tables must be three, of the axes t, h and w")
    for axis, table, n in zip("thw", rope, grid, strict=True):
        if table.dim() != 3 or table.shape[0] != n or table.shape[2] != 2:
            raise ValueError(
                f"rope: shape {shown(list(table.shape))} on axis {axis} must be [{n}, pairs, 2], cosines and sines"
            )
        if table.device != x.device:
            raise ValueError(f"rope: device {table.device} on axis {axis} must be that of q, {x.device}")
    if sum(table.shape[1] for table in rope) * 2 != head_dim:
        raise ValueError(
            f"rope: {[table.shape[1] for table in rope]} pairs must be {head_dim // 2} in all, half of head_dim"
        )
