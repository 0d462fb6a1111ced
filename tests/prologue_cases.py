"""Random inputs of `fps.norm_rope_quantize`, and its definition written a second time, token by token."""

from __future__ import annotations

import math

import torch

import fpsattention as fps
from fpsattention.core import ops

PAIRS = {64: (12, 10, 10), 128: (22, 21, 21)}  # of the axes, by head_dim; the latter are Wan's
NORMS = (None, "all heads", "each head", "layer")
EPS = 1e-2
ROPES = (None, "axes", "tokens", "heads")  # tables of axes; one of tokens, alike for all heads or not


def inputs(
    grid,
    heads,
    head_dim,
    *,
    norm="all heads",
    rope="axes",
    text=(0, 0),
    text_norm=False,
    batch=1,
    seed=0,
    device="cpu",
    dtype=torch.float32,
):
    """(q, k, v [B, L, H, D], the prologue's keyword arguments).

    Args:
        text: tokens before and after the grid's.
        text_norm: whether the norms of text have weights of their own.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, device=device)

    tokens = math.prod(grid)
    q, k, v = (normal(batch, tokens + sum(text), heads, head_dim) for _ in range(3))
    q, k = 3 * q + normal(head_dim), k / 5 + normal(heads, 1)
    given = {}
    if norm:
        channels = heads * head_dim if norm == "all heads" else head_dim
        names = ["weight"] + ["bias"] * (norm == "layer") + ["text_weight"] * (text_norm and norm != "layer")
        for x in "qk":
            tensors = {name: (name != "bias") + normal(channels) / 4 for name in names}
            given[f"{x}_norm"] = fps.Norm(**tensors, eps=EPS)

    def rotations(*shape):
        angles = 3 * normal(*shape)
        return torch.stack((angles.cos(), angles.sin()), dim=-1)

    if rope == "axes":
        given["rope"] = [rotations(n, pairs) for n, pairs in zip(grid, PAIRS[head_dim], strict=True)]
    elif rope:
        given["rope"] = rotations(tokens, heads if rope == "heads" else 1, head_dim // 2)
    if any(text):
        given |= {"prefix_len": text[0], "suffix_len": text[1]}
    return tuple(x.to(dtype) for x in (q, k, v)), given


def of_one(given, name):
    """The arguments of `norm_rope`, of q or of k, in those of `norm_rope_quantize`."""
    rest = {x: value for x, value in given.items() if not x.endswith("_norm")}
    return rest | {"norm": given.get(f"{name}_norm")}


def as_norm_rope(given) -> ops.NormRope:
    """The same as the ops take it."""
    norms = [given[x] for x in ("q_norm", "k_norm") if x in given]
    of_both = (
        [x for norm in norms if (x := getattr(norm, name)) is not None]
        for name in ("weight", "text_weight", "bias")
    )
    rope = given.get("rope", [])
    return ops.NormRope(*of_both, EPS, [rope] if isinstance(rope, torch.Tensor) else rope)


def expected(x, grid, *, norm=None, rope=None, prefix_len=0, suffix_len=0):
    """Norm and rotation of x [B, L, H, D] in fp64, token by token, with complex numbers for pairs."""
    x = x.double().clone()
    places = [(t, h, w) for t in range(grid[0]) for h in range(grid[1]) for w in range(grid[2])]
    assert x.shape[1] == prefix_len + len(places) + suffix_len
    for i in range(x.shape[1]):
        is_text = not prefix_len <= i < prefix_len + len(places)
        for row in x[:, i] if norm is not None else ():  # [H, D], a view
            weight = norm.text_weight if is_text and norm.text_weight is not None else norm.weight
            for group in row if weight.numel() == x.shape[3] else row.view(1, -1):
                if norm.bias is not None:
                    group.sub_(group.mean())
                group.mul_(weight.double() / (group.square().mean() + norm.eps).sqrt())
                if norm.bias is not None:
                    group.add_(norm.bias.double())
        if rope is None or is_text:
            continue
        if isinstance(rope, torch.Tensor):
            turn = torch.view_as_complex(rope[i - prefix_len].double())
        else:
            place = places[i - prefix_len]
            parts = [torch.view_as_complex(table[n].double()) for table, n in zip(rope, place, strict=True)]
            turn = torch.cat(parts)
        pairs = torch.view_as_complex(x[:, i].unflatten(-1, (-1, 2)).contiguous())
        x[:, i] = torch.view_as_real(pairs * turn).flatten(-2)
    return x
