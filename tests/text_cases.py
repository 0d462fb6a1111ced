"""Calls with text tokens before and after the grid's: cases, which keys each query attends, and attention computed
query by query, to compare with. Of the package only the config is used.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

import brute
import fpsattention as fps
from compare import LSE_BIAS, by_codes, gradient_violations, violations
from inputs import to_nhd


@dataclass(frozen=True)
class TextCase:
    """One call. prefix_valid and suffix_valid: counts, one for each of the `batch` samples, or None."""

    grid: tuple[int, int, int]
    tile: tuple[int, int, int]
    window: tuple | None = None
    border: str = "clamp"
    prefix_len: int = 0
    suffix_len: int = 0
    prefix_valid: tuple[int, ...] | None = None
    suffix_valid: tuple[int, ...] | None = None
    quant_tile: tuple[int, int, int] | None = None
    smooth_k: bool = False
    heads: int = 2
    batch: int = 1
    layout: str = "NHD"
    scale: float | None = None

    def config(self, quant="fp8") -> fps.AttentionConfig:
        rounding = {"quant_tile": self.quant_tile, "smooth_k": self.smooth_k} if quant == "fp8" else {}
        return fps.AttentionConfig(self.tile, self.window, self.border, quant, **rounding)

    def counts(self, device="cpu") -> dict[str, torch.Tensor | None]:
        """prefix_valid and suffix_valid as a call takes them."""
        given = {"prefix_valid": self.prefix_valid, "suffix_valid": self.suffix_valid}
        return {
            name: None if x is None else torch.tensor(x, dtype=torch.int32, device=device)
            for name, x in given.items()
        }

    def call(self, quant="fp8", device="cpu") -> dict:
        """Arguments besides q, k, v of `fps.attention` and of the reference's functions."""
        return {
            "grid": self.grid,
            "config": self.config(quant),
            "scale": self.scale,
            "tensor_layout": self.layout,
            "prefix_len": self.prefix_len,
            "suffix_len": self.suffix_len,
            **self.counts(device),
        }

    @property
    def video(self) -> range:
        return range(self.prefix_len, self.prefix_len + math.prod(self.grid))

    @property
    def tokens(self) -> int:
        return self.video.stop + self.suffix_len

    @property
    def windows(self) -> list[tuple[int, int, int]]:
        """The window of each head."""
        window = self.window or self.grid  # as many tiles as there are tokens: everything
        return list(window) if isinstance(window[0], tuple) else [window] * self.heads

    def valid(self, sample: int) -> torch.Tensor:
        """bool [L]: which tokens of a sample are valid."""
        valid = torch.ones(self.tokens, dtype=torch.bool)
        if self.prefix_valid is not None:
            valid[self.prefix_valid[sample] : self.prefix_len] = False
        if self.suffix_valid is not None:
            valid[self.video.stop + self.suffix_valid[sample] :] = False
        return valid

    def attended(self, sample: int, head: int) -> torch.Tensor:
        """bool [L, L]: which tokens (rows) attend which (columns); rows of invalid queries are empty."""
        valid = self.valid(sample)
        mask = torch.zeros(self.tokens, self.tokens, dtype=torch.bool)
        in_video = brute.token_mask(self.grid, self.tile, self.windows[head], self.border)
        for i in range(self.tokens):
            if i in self.video:
                mask[i] = valid
                mask[i, self.video.start : self.video.stop] = in_video[i - self.video.start]
            elif valid[i]:
                mask[i] = valid
        return mask

    def groups(self, tile: tuple[int, int, int]) -> list[list[int]]:
        """The tokens that share one scale: bricks of `tile` tokens, then the prefix's text tiles, then the suffix's."""
        slot = 128 * -(-math.prod(self.tile) // 128)
        groups = [[self.video.start + i for i in brick] for brick in brute.tile_tokens(self.grid, tile)]
        for section in (range(self.prefix_len), range(self.video.stop, self.tokens)):
            groups += [list(section[i : i + slot]) for i in range(0, len(section), slot)]
        return groups

    def blocks(self) -> list[list[int]]:
        """The tokens of every key block, empty for one of padding alone."""
        per_slot = -(-math.prod(self.tile) // 128)
        return [tokens[128 * i : 128 * (i + 1)] for tokens in self.groups(self.tile) for i in range(per_slot)]

    def make_qkv(self, head_dim=16, dtype=torch.float64, seed=0, device="cpu", invalid=math.nan):
        """q, k, v of unit normals; K's channels and the sections have means and sizes of their own, so that a token
        in the wrong group, or a wrong mean, shows. Invalid tokens hold `invalid`.
        """
        generator = torch.Generator(device).manual_seed(seed)

        def normal(*shape):
            return torch.randn(*shape, generator=generator, device=device)

        shape = self.batch, self.tokens, self.heads, head_dim
        q, k, v = (normal(*shape) for _ in range(3))
        k += normal(head_dim) / 2
        for x, prefix, suffix in ((q, 1.5, 0.5), (k, 0.5, 1.5), (v, 2.0, 3.0)):
            x[:, : self.prefix_len] *= prefix
            x[:, self.video.stop :] *= suffix
        for sample in range(self.batch):
            for x in (q, k, v):
                x[sample, ~self.valid(sample).to(device)] = invalid
        qkv = (x.to(dtype) for x in (q, k, v))
        return tuple(x if self.layout == "NHD" else x.transpose(1, 2).contiguous() for x in qkv)


TEXT_CASES = {
    "prefix": TextCase((2, 5, 6), (2, 3, 2), (1, 1, 3), prefix_len=7),
    "suffix": TextCase((2, 5, 6), (2, 3, 2), (1, 1, 1), suffix_len=9, layout="HND"),
    "both, dense": TextCase((3, 4, 5), (2, 2, 2), prefix_len=5, suffix_len=11),
    "several text tiles": TextCase((2, 4, 6), (2, 2, 2), (1, 1, 1), prefix_len=130, suffix_len=129, heads=1),
    "slot of 256": TextCase((3, 9, 8), (3, 7, 7), (1, 1, 1), prefix_len=257, suffix_len=3, heads=1),
    "truncate": TextCase((3, 6, 8), (1, 2, 2), (1, 3, 3), "truncate", prefix_len=6, suffix_len=4),
    "windows per head": TextCase(
        (3, 6, 8), (1, 2, 2), ((1, 1, 1), (3, 3, 1)), prefix_len=6, suffix_len=4, layout="HND"
    ),
    "counts": TextCase(
        *((2, 5, 6), (2, 3, 2), (1, 1, 3)), prefix_len=9, suffix_len=12, batch=4,
        prefix_valid=(9, 0, 4, 0), suffix_valid=(3, 12, 0, 0)
    ),
    "counts of the prefix alone": TextCase(
        *((2, 5, 6), (2, 3, 2), (1, 1, 1)), prefix_len=6, suffix_len=5, batch=2, prefix_valid=(2, 5), layout="HND"
    ),
    "counts that empty a run": TextCase(
        *((2, 4, 4), (2, 2, 2), (1, 1, 1)), prefix_len=130, suffix_len=132, batch=2, heads=1,
        prefix_valid=(128, 129), suffix_valid=(131, 1)
    ),
    "counts, windows per head, truncate": TextCase(
        *((3, 6, 8), (1, 2, 2), ((1, 1, 3), (3, 3, 1)), "truncate"), prefix_len=6, suffix_len=4, batch=2,
        prefix_valid=(6, 1), suffix_valid=(0, 3), scale=0.4
    ),
    "smooth_k": TextCase((3, 4, 5), (2, 2, 2), (1, 1, 1), prefix_len=5, suffix_len=11, smooth_k=True),
    "smooth_k, counts, bricks": TextCase(
        *((3, 4, 9), (1, 2, 2), (3, 1, 3)), prefix_len=9, suffix_len=11, smooth_k=True, quant_tile=(2, 2, 4),
        batch=2, prefix_valid=(9, 3), suffix_valid=(0, 11)
    ),
    "no video": TextCase((0, 4, 5), (2, 2, 2), prefix_len=5, suffix_len=3, batch=2, prefix_valid=(2, 0),
                          suffix_valid=(3, 0), smooth_k=True),
}  # fmt: skip


# Attention of a case, query by query.


def masks_of(case: TextCase) -> torch.Tensor:
    """bool [B, H, L, L]: which tokens attend which."""
    return torch.stack(
        [torch.stack([case.attended(b, h) for h in range(case.heads)]) for b in range(case.batch)]
    )


def _by_query(attend_row, masks, head_dim, device):
    """(out [B, L, H, D], lse [B, H, L]) of `attend_row(b, h, i, keys)`, which gives one row of each."""
    batch, heads, tokens, _ = masks.shape
    zero, least = (torch.tensor(x, dtype=torch.float64, device=device) for x in (0.0, -math.inf))
    rows, lses = [], []
    for b in range(batch):
        for i in range(tokens):
            for h in range(heads):
                keys = masks[b, h, i].nonzero()[:, 0].to(device)
                out, lse = attend_row(b, h, i, keys) if len(keys) else (zero.expand(head_dim), least)
                rows.append(out)
                lses.append(lse)
    out = torch.stack(rows).reshape(batch, tokens, heads, head_dim)
    return out, torch.stack(lses).reshape(batch, tokens, heads).transpose(1, 2)


def exact(case: TextCase, q, k, v, masks=None):
    """(out [B, L, H, D], lse [B, H, L]) in fp64 by the softmax's definition, under `masks` or the case's own."""
    q, k, v = (to_nhd(x, case.layout).double() for x in (q, k, v))
    scale = q.shape[3] ** -0.5 if case.scale is None else case.scale

    def attend_row(b, h, i, keys):
        scores = k[b, keys, h] @ q[b, i, h] * scale
        return scores.softmax(0) @ v[b, keys, h], scores.logsumexp(0)

    return _by_query(attend_row, masks_of(case) if masks is None else masks, q.shape[3], q.device)


def e4m3(x: torch.Tensor) -> torch.Tensor:
    return x.clamp(-448, 448).to(torch.float8_e4m3fn)


def quantized(case: TextCase, q, k, v) -> dict[str, torch.Tensor]:
    """The contract's operands, group by group: q8, k8, v8 fp32 [B, L, H, D] with the values of E4M3 codes, q_step and
    k_step fp32 [B, groups, H], v_step fp32 [B, blocks, H], k_mean fp32 [B, H, D] (0 without smoothing).
    """
    q, k, v = (to_nhd(x, case.layout).float() for x in (q, k, v))
    groups, blocks = case.groups(case.quant_tile or case.tile), case.blocks()
    batch, _, heads, head_dim = q.shape
    r = {f"{n}8": torch.zeros_like(x) for n, x in (("q", q), ("k", k), ("v", v))}
    r |= {f"{n}_step": q.new_ones(batch, len(groups), heads) for n in "qk"}
    r |= {"v_step": q.new_ones(batch, len(blocks), heads), "k_mean": q.new_zeros(batch, heads, head_dim)}

    def put(into, x, largest):  # x: the values that share one scale
        amax = x.abs().max() if x.numel() else x.new_zeros(())
        # A tensor: with a Python number, torch multiplies by the rounded inverse of amax.
        top = torch.full_like(amax, largest)
        if amax > 2.0**-100:
            into.copy_(e4m3(x * (top / amax)))
        return amax / top if amax > 2.0**-100 else torch.ones_like(amax)

    for b in range(batch):
        valid = case.valid(b).to(q.device)
        for h in range(heads):
            own_k = k[b, :, h]
            if case.smooth_k and valid.any():
                r["k_mean"][b, h] = own_k[valid].double().mean(0)
                own_k = own_k - r["k_mean"][b, h]
            of_groups = (
                ("q", q[b, :, h], groups, 14),
                ("k", own_k, groups, 14),
                ("v", v[b, :, h], blocks, 448),
            )
            for name, x, parts, largest in of_groups:
                for g, tokens in enumerate(parts):
                    some = torch.tensor(tokens, dtype=torch.int64, device=q.device)
                    some = some[valid[some]]
                    codes = torch.zeros_like(x[some])
                    r[f"{name}_step"][b, g, h] = put(codes, x[some], largest)
                    r[f"{name}8"][b, some, h] = codes
    return r


def index_of(groups: list[list[int]], device="cpu") -> torch.Tensor:
    """int64 [L]: the group of each token, given the tokens of each group."""
    group = torch.empty(sum(map(len, groups)), dtype=torch.int64, device=device)
    for g, tokens in enumerate(groups):
        group[tokens] = g
    return group


def emulated(case: TextCase, q, k, v):
    """(out [B, L, H, D], lse [B, H, L]) of the FP8 contract, in fp64 but for the roundings it asks for."""
    scale = q.shape[3] ** -0.5 if case.scale is None else case.scale
    x = {name: t.double() for name, t in quantized(case, q, k, v).items()}
    q = to_nhd(q, case.layout).double()
    group, block = (index_of(x, q.device) for x in (case.groups(case.quant_tile or case.tile), case.blocks()))

    def attend_row(b, h, i, keys):
        z = x["k8"][b, keys, h] @ x["q8"][b, i, h] * x["q_step"][b, group[i], h]
        z = z * x["k_step"][b, group[keys], h] * (scale * math.log2(math.e))
        p = by_codes(z[None], block[keys])[0]
        out = p @ (x["v8"][b, keys, h] * x["v_step"][b, block[keys], h, None]) / p.sum()
        mean = scale * (q[b, i, h] @ x["k_mean"][b, h])
        return out, p.sum().log() - LSE_BIAS + mean

    return _by_query(attend_row, masks_of(case), q.shape[3], q.device)


# For a kernel: a sample's valid tokens obey the rules of compare.py, invalid ones hold the values of the contract.


def check_attention(case: TextCase, out, lse, exact, exact_lse, emu, emu_lse) -> None:
    """Raise AssertionError unless `out` [B, L, H, D] and `lse` [B, H, L] honour the contract of one call."""
    for sample in range(case.batch):
        valid, tile_of_token = _sample(case, sample, out.device)
        assert (out[sample, ~valid] == 0).all(), f"sample {sample}: out of invalid queries must be 0"
        assert (lse[sample, :, ~valid] == -math.inf).all(), f"sample {sample}: lse of invalid queries: -inf"
        outs = (x[sample, None, valid] for x in (out, exact, emu))
        lses = (x[sample, None, :, valid] for x in (lse, exact_lse, emu_lse))
        pairs = zip(outs, lses, strict=True)
        found = violations(*(x for pair in pairs for x in pair), tile_of_token)
        assert not found, f"sample {sample}: {found}"


def check_gradients(case: TextCase, grads, reference, emulated) -> None:
    """Raise AssertionError unless `grads`, dq, dk, dv [B, L, H, D], honour the contract of one call."""
    for sample in range(case.batch):
        valid, tile_of_token = _sample(case, sample, grads[0].device)
        for name, x in zip(("dq", "dk", "dv"), grads, strict=True):
            assert (x[sample, ~valid] == 0).all(), f"sample {sample}: {name} of invalid tokens must be 0"
        own = (tuple(x[sample, None, valid] for x in three) for three in (grads, reference, emulated))
        found = gradient_violations(*own, tile_of_token)
        assert not found, f"sample {sample}: {found}"


def _sample(case: TextCase, sample: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    """(bool [L], which tokens are valid; int64, the tile of each of those)."""
    tile_of_token = index_of(case.groups(case.tile))
    valid = case.valid(sample)
    return valid.to(device), tile_of_token[valid].to(device)
