"""Small launches of every kernel variant, for compute-sanitizer, which tests/sanitize.py runs over them:

    python tests/sanitizer_cases.py [NAME OF A CASE ...]

Other tests check the values; here they need only be finite. Under a sanitizer a launch takes seconds,
so the grids have only a few tiles, with ragged edges, padding blocks and several key blocks per row.
"""

from __future__ import annotations

import math
import sys
from itertools import product

import torch

import fpsattention as fps

# (grid, config); each runs without text, and with text around the video, some of it invalid
CASES = {
    "one token": ((1, 1, 1), fps.AttentionConfig(tile=(4, 4, 4))),
    "no padding": ((4, 8, 8), fps.AttentionConfig(tile=(4, 4, 8))),
    "window": ((5, 7, 9), fps.AttentionConfig(tile=(2, 3, 4), window=(1, 3, 3))),
    "truncate, a window per head": (
        (5, 7, 9),
        fps.AttentionConfig(tile=(2, 3, 4), window=((1, 1, 1), (3, 3, 1)), border="truncate"),
    ),
    "quant_tile, smooth_k": (
        (5, 7, 9),
        fps.AttentionConfig(tile=(2, 3, 4), quant_tile=(4, 6, 8), smooth_k=True),
    ),
    "slots of 256": ((9, 9, 9), fps.AttentionConfig(tile=(6, 6, 6))),  # some blocks hold padding only
    "slots of 384": ((9, 9, 9), fps.AttentionConfig(tile=(6, 8, 8), window=(1, 3, 3))),
    "slots of 512": ((9, 8, 12), fps.AttentionConfig(tile=(8, 8, 8), smooth_k=True)),
    "lists": ((5, 7, 9), fps.AttentionConfig(tile=(2, 3, 4))),
    "lists, slots of 384": ((9, 9, 9), fps.AttentionConfig(tile=(6, 8, 8))),
    "chosen tiles": ((5, 7, 9), fps.AttentionConfig(tile=(2, 3, 4), select=fps.TopTiles(0.4))),
}
PREFIX, SUFFIX = 70, 200


def lists_of(grid, config) -> fps.KeyTiles:
    """Lists of about half of the tiles, each with the tile itself, for both heads."""
    n = config.resolve(grid, 2).geometry.n_video_tiles
    mask = torch.rand(1, 2, n, n, device="cuda") < 0.5
    return fps.KeyTiles.of_mask(mask | torch.eye(n, dtype=torch.bool, device="cuda"))


def main(names: list[str]) -> None:
    launches = 0
    valid = torch.tensor([[70, 3], [0, 130]], dtype=torch.int32, device="cuda")
    both_sides = {
        "prefix_len": PREFIX,
        "suffix_len": SUFFIX,
        "prefix_valid": valid[0],
        "suffix_valid": valid[1],
    }
    for name, text in product(names, ({}, both_sides)):
        grid, config = CASES[name]
        lists = {"key_tiles": lists_of(grid, config)} if name.startswith("lists") else {}
        for head_dim in (64, 128):
            for tensor_layout, dtype in (("NHD", torch.bfloat16), ("HND", torch.float16)):
                text_of_case = "text" if text else "no text"
                tokens = math.prod(grid) + (PREFIX + SUFFIX if text else 0)
                shape = (2, tokens, 2, head_dim) if tensor_layout == "NHD" else (2, 2, tokens, head_dim)
                leaves = [
                    torch.randn(shape, dtype=dtype, device="cuda", requires_grad=True) for _ in range(3)
                ]
                out, lse = fps.attention(
                    *leaves,
                    grid=grid,
                    config=config,
                    return_lse=True,
                    tensor_layout=tensor_layout,
                    backend="sm90",
                    deterministic=tensor_layout == "HND",
                    **text,
                    **lists,
                )
                grads = torch.autograd.grad(
                    (out, lse), leaves, (torch.randn_like(out), torch.randn_like(lse))
                )
                case = f"{grid}, {config}, head_dim {head_dim}, {tensor_layout}, {dtype}, {text_of_case}"
                assert out.isfinite().all(), f"out is not finite: {case}"
                none = lse == -math.inf  # at invalid tokens
                assert (lse.isfinite() | none).all(), f"lse is not finite: {case}"
                assert none.any() == bool(text), f"lse of invalid tokens is not -inf: {case}"
                assert all(x.isfinite().all() for x in grads), f"a gradient is not finite: {case}"
                launches += 1
                if not (config.smooth_k or config.select or lists):
                    about = {"grid": grid, "config": config, "tensor_layout": tensor_layout, **text}
                    check_prologue(about, *(x.detach() for x in leaves))
    print(f"{launches} calls and their backwards, all finite")


def check_prologue(about, q, k, v) -> None:
    """The same call with norms over all heads or of each, and both forms of rotation, before the quantisation."""
    head_dim, grid = q.shape[3], about["grid"]
    pairs = (head_dim // 2 - 20, 10, 10)
    axes = [torch.ones(n, p, 2, device="cuda") for n, p in zip(grid, pairs, strict=True)]
    tokens = torch.ones(math.prod(grid), 2, head_dim // 2, 2, device="cuda")
    one, all_heads = torch.ones(head_dim, device="cuda"), torch.ones(2 * head_dim, device="cuda")
    norms = fps.Norm(all_heads), fps.Norm(one, text_weight=one), fps.Norm(one, bias=one)
    for norm, rope in zip(norms, (axes, tokens, tokens), strict=True):
        packed = fps.norm_rope_quantize(q, k, v, **about, q_norm=norm, k_norm=norm, rope=rope, backend="sm90")
        out = fps.attention(packed)
        assert out.isfinite().all(), f"out is not finite after a prologue: {about}"


if __name__ == "__main__":
    main(sys.argv[1:] or list(CASES))
