"""How a kernel's output is judged: by relative error, against two references.

*exact* is softmax attention in fp64 on the inputs as given; *emulated* is the FP8 contract in PyTorch. The
kernel may err against exact attention no more than the emulation does (FP8 rounding is the method, any further
error is a defect), and must agree with the emulation far more closely than either agrees with exact
attention. Both hold overall and for every (batch, head, query tile), so that one wrong tile among thousands
cannot hide in a mean. Errors are relative RMS: absolute tolerances accept an output of zeros when many keys
are averaged.

Three effects set the floor of what a correct kernel can achieve; all enter the limits as formulas:
- One flipped code. The last bit of a logit decides on which side of a rounding boundary 448 P falls, and
  neighbouring E4M3 codes are up to 1/8 apart. One flip shows where one row dominates a tile or the tile has few
  rows: it costs 1/8 of the largest row over the norm of all (`flip`). Beyond about 70 equal rows it does not show.
- The output's own rounding, half an epsilon of its dtype. It matters only where the emulation is closer to
  exact attention than that, as for constant inputs; there the emulation's error is luck and not a yardstick.
- The tensor core's accumulator. It keeps about 14 bits and truncates, so each of the four products of 32 keys
  between two promotions to fp32 may lose 2^-13 of the sum (`ACCUMULATOR`). It shows where everything else
  averages out, as for values of one sign.

`wide_logits` widens the limit against the emulation, because the same accumulator also sums QK: a logit of 100 is
off by some hundredths, a probability by some per cent, and for many keys the kernel rounds 448 P to another code
than the emulation. The two rounding errors are then independent, and their difference is sqrt(1 + factor^2) times
the emulation's own error. The limit against exact attention judges such inputs and stays as it is.

Gradients are judged alike: against the straight-through gradient of the FP8 contract in fp64, which takes the
place of exact attention, and against its emulation with the kernels' 16-bit roundings. The emulation gets the out and
lse that the kernel's backward got, so that errors of the forward do not count against the backward. Both round the
same numbers in the same places, so the limits of dQ and dK are tight:
- One rounding of a dS in the other direction moves it by 2^-7 of itself (`BF16_STEP`), and a tile of few rows by
  that much of its largest row. The emulation's error of such a tile depends on a few roundings, and the kernel may
  round as many others differently: hence twice that error for a tile.
- Where the summands of a gradient cancel (values with a mean, a tile that few attend) the emulation's error is
  large. A rounding in the other direction makes an independent error as large: sqrt(1 + factor^2) times it, as with
  wide logits.
- With `wide_logits` P is off by some per cent, and so is dS. This averages out over many tiles, but not in a tile
  where one query decides: `WIDE_LOGIT` times the accumulator's error.
- dV also has flipped codes of 448 P, as the forward: sqrt(error of P * step of a code) for a P that is off by 2^-13
  (`FLIPS`), and three times as much in a tile, as in the forward. With `wide_logits` P is rounded independently, so
  dV is off by up to the rounding of P: `P_ROUNDING`, the relative RMS error of rounding to 4 significant bits.
"""

from __future__ import annotations

import math

import torch

from inputs import tile_coordinates

EXACT_FACTOR, TILE_EXACT_FACTOR = 1.1, 1.25  # of the emulation's error against exact attention
EMULATION_RMS, TILE_EMULATION_RMS = 5e-3, 1.5e-2
GRADIENT_FACTOR, TILE_GRADIENT_FACTOR = 1.2, 2.0  # of the emulated gradient's error against the fp64 one
CODE_STEP = 1 / 8  # largest relative distance of neighbouring E4M3 codes
BF16_STEP = 2.0**-7
# A number of t in [1, 2) has an error of 2^-3 / sqrt(12); the mean of 1 / t^2 over all log t is 3 / (8 ln 2).
P_ROUNDING = 2.0**-3 / math.sqrt(12) * math.sqrt(3 / (8 * math.log(2)))
FLIPS = math.sqrt(2.0**-13 * CODE_STEP)
ZERO = 1e-6  # largest output where the reference is zero everywhere
LSE_ABS = 5e-3  # natural log units
LSE_WIDE = 2e-3  # of the largest LSE, with wide logits
ACCUMULATOR = 4 * 2.0**-13
WIDE_LOGIT = 100
TILE_NORM_FLOOR = (
    1e-3  # least norm that a tile's error is relative to, as a fraction of the norm if all tiles were equal
)


def check_attention(out, lse, exact, exact_lse, emu, emu_lse, geometry, *, wide_logits=False) -> None:
    """Raise AssertionError unless `out` and `lse` honour the contract.

    Args:
        out, exact, emu: [B, L, H, D]; out and emu of the same dtype, so that they share its rounding.
        lse, exact_lse, emu_lse: [B, H, L], natural logarithm.
        geometry: TileGeometry of the call.
        wide_logits: see the head of this file.
    """
    tile_of_token = geometry.tile_of_token.to(out.device)
    found = violations(out, lse, exact, exact_lse, emu, emu_lse, tile_of_token, wide_logits=wide_logits)
    assert not found, "\n".join(f"{rule}: {text}" for rule, text in found.items())


def violations(
    out, lse, exact, exact_lse, emu, emu_lse, tile_of_token, *, wide_logits=False
) -> dict[str, str]:
    """The rules that an output breaks, each with what was found and where. Arguments as `check_attention`,
    but for `tile_of_token`, int64 [L]; the L rows may be a sample of the grid's tokens.
    """
    assert out.shape == exact.shape == emu.shape, f"{out.shape}, {exact.shape}, {emu.shape}"
    assert lse.shape == exact_lse.shape == emu_lse.shape, f"{lse.shape}, {exact_lse.shape}, {emu_lse.shape}"
    assert out.dtype == emu.dtype and lse.dtype == torch.float32, f"{out.dtype}, {emu.dtype}, {lse.dtype}"
    found = _not_finite(out=out, lse=lse)
    if not found and out.numel():
        found |= _tensor_violations(
            out,
            exact,
            emu,
            tile_of_token,
            factors=(EXACT_FACTOR, TILE_EXACT_FACTOR),
            step=CODE_STEP,
            floors=(torch.finfo(out.dtype).eps / 2,) * 2,
            independent=wide_logits,
        )
        found |= _lse_violations(lse.double(), exact_lse.double(), emu_lse.double(), wide_logits)
    return found


def check_gradients(grads, reference, emulated, geometry, *, wide_logits=False) -> None:
    """Raise AssertionError unless `grads` honour the contract.

    Args:
        grads: dq, dk, dv of a kernel, [B, L, H, D] each.
        reference: the same in fp64, of `reference.emulated_attention` with dtype=torch.float64, by autograd.
        emulated: the same of `reference.emulated_backward`, of the dtype of `grads` and from the out and lse that
            the kernel's backward was given.
        geometry: TileGeometry of the call; dK and dV are judged for each key tile.
        wide_logits: see the head of this file.
    """
    tile_of_token = geometry.tile_of_token.to(grads[0].device)
    found = gradient_violations(grads, reference, emulated, tile_of_token, wide_logits=wide_logits)
    assert not found, "\n".join(f"{rule}: {text}" for rule, text in found.items())


def gradient_violations(grads, reference, emulated, tile_of_token, *, wide_logits=False) -> dict[str, str]:
    """The rules that gradients break, each with what was found and where. Arguments as `check_gradients`."""
    grads, reference, emulated = (
        dict(zip(("dq", "dk", "dv"), x, strict=True)) for x in (grads, reference, emulated)
    )
    for name, x in grads.items():
        assert x.shape == reference[name].shape == emulated[name].shape, f"{name}: shapes differ"
        assert x.dtype == emulated[name].dtype and reference[name].dtype == torch.float64, f"{name}: dtypes"
    found = _not_finite(**grads)
    if found or not grads["dq"].numel():
        return found
    for name, x in grads.items():
        wide = WIDE_LOGIT * ACCUMULATOR if wide_logits else 0.0
        tile_factor, step = TILE_GRADIENT_FACTOR, BF16_STEP
        floor = tile_floor = torch.finfo(x.dtype).eps / 2
        if name == "dv":
            tile_factor, step = GRADIENT_FACTOR, CODE_STEP
            floor, tile_floor = (P_ROUNDING, P_ROUNDING) if wide_logits else (FLIPS, 3 * FLIPS)
        found |= _tensor_violations(
            x,
            reference[name],
            emulated[name],
            tile_of_token,
            factors=(GRADIENT_FACTOR, tile_factor),
            step=step,
            floors=(floor, max(tile_floor, wide)),
            independent=True,
            prefix=f"{name} ",
        )
    return found


def _not_finite(**tensors) -> dict[str, str]:
    for name, x in tensors.items():
        if not x.isfinite().all():
            bad = (~x.isfinite()).nonzero()
            return {"finite": f"{len(bad)} elements of {name} are not finite, the first at {bad[0].tolist()}"}
    return {}


def _tensor_violations(
    out, exact, emu, tile_of_token, *, factors, step, floors, independent, prefix=""
) -> dict[str, str]:
    """The rules that one tensor [B, L, H, D] breaks, their names with `prefix`.

    Args:
        factors: of the emulation's error against `exact`, overall and by tile.
        step: the largest relative error of one rounding in the other direction than the emulation's.
        floors: relative RMS error, overall and of a tile, that is allowed even where the emulation's own is smaller.
        independent: whether rounding errors may be independent of the emulation's.
    """
    out, exact, emu = out.double(), exact.double(), emu.double()

    def by_tile(x):  # sums over the rows and channels of each (tile, batch, head), from squares [B, L, H, D]
        rows = x.sum(-1).transpose(0, 1)
        return rows.new_zeros(n_tiles, *rows.shape[1:]).index_add_(0, tile_of_token, rows)

    def largest_row(x):  # norm [tile, batch, head] of the largest row
        rows = x.square().sum(-1).transpose(0, 1)
        index = tile_of_token[:, None, None].expand(rows.shape)
        return rows.new_zeros(n_tiles, *rows.shape[1:]).scatter_reduce_(0, index, rows, "amax").sqrt()

    found = {}
    for name, reference in (("exact", exact), ("emulation", emu)):
        if not reference.any():
            if out.abs().max() > ZERO:
                found[prefix + name] = f"the reference is zero, the output reaches {out.abs().max():.3g}"
            return found

    n_tiles = int(tile_of_token.max()) + 1
    size = by_tile(torch.ones_like(out)).clamp(min=1)  # a sample of the tokens may leave a tile without rows
    for tiled in (False, True):
        over = by_tile if tiled else torch.sum
        share = (size / out.numel()).sqrt() if tiled else 1.0

        def rms(x, reference, over=over, share=share):
            least = TILE_NORM_FLOOR * share * reference.square().sum().sqrt()
            norm = torch.maximum(over(reference.square()).sqrt(), least)
            return over((x - reference).square()).sqrt() / norm

        emu_norm = over(emu.square()).sqrt()
        rows = largest_row(emu)
        flip = step * (rows if tiled else rows.max()) / emu_norm.clamp(min=1e-300)
        own = rms(emu, exact)  # the emulation's error
        factor, floor = factors[tiled], floors[tiled]
        agreement = TILE_EMULATION_RMS if tiled else EMULATION_RMS
        limit = {
            "exact": factor * torch.maximum(own, flip).clamp(min=floor) + ACCUMULATOR,
            "emulation": flip.clamp(min=max(agreement, factor * floor)),
        }
        if independent:
            limit["emulation"] = torch.maximum(limit["emulation"], math.sqrt(1 + factor**2) * own)
        for name, reference in (("exact", exact), ("emulation", emu)):
            error = rms(out, reference)
            excess = error / limit[name]
            if not (excess <= 1).all():
                worst = tuple(int(i) for i in (excess == excess.max()).nonzero()[0])
                text = f"relative RMS error {error[worst]:.3g}, at most {limit[name][worst]:.3g} is allowed"
                text += f" (the emulation's error is {own[worst]:.3g})"
                where = _worst_element(out, exact, emu, tile_of_token, worst)
                found[("tile " if tiled else "") + prefix + name] = f"{text}; {where}"
    return found


def _worst_element(out, exact, emu, tile_of_token, tile) -> str:
    """Where `out` is furthest from the emulation: in (tile, batch, head), or anywhere when `tile` is ()."""
    error = (out - emu).abs()
    text = ""
    if tile:
        n, b, h = tile
        inside = torch.zeros_like(error, dtype=torch.bool)
        inside[b, tile_of_token == n, h] = True
        error = error.masked_fill(~inside, -1)
        text = f"batch {b}, head {h}, tile {n} is worst, {int(inside[b, :, h, 0].sum())} rows; "
    at = torch.unravel_index(error.argmax(), error.shape)
    b, row, h, d = (int(i) for i in at)
    return text + (
        f"worst element [batch {b}, row {row}, head {h}, channel {d}], tile {int(tile_of_token[row])}: "
        f"{out[at]:.6g}, emulation {emu[at]:.6g}, exact {exact[at]:.6g}"
    )


def _lse_violations(lse, exact, emu, wide_logits) -> dict[str, str]:
    def rms(x):
        return float(x.square().mean().sqrt())

    found = {}
    limit = LSE_ABS + (LSE_WIDE * float(emu.abs().max()) if wide_logits else 0.0)
    error = (lse - emu).abs()
    if not error.max() <= limit:
        at = torch.unravel_index(error.argmax(), error.shape)
        found["lse"] = (
            f"off the emulation by {error[at]:.3g}, at most {limit:.3g} is allowed, at [batch, head, row] "
            f"{[int(i) for i in at]}: {lse[at]:.6g}, emulation {emu[at]:.6g}, exact {exact[at]:.6g}"
        )
    own, mine = rms(emu - exact), rms(lse - exact)
    if not mine <= EXACT_FACTOR * own + limit / 5:
        found["lse exact"] = f"RMS error {mine:.3g}, the emulation's is {own:.3g}"
    return found


def attend_rows(q, k, v, rows, resolved, window, scale) -> tuple[torch.Tensor, ...]:
    """Exact and emulated attention of a few query rows of one head, for grids too long to do in full.

    Written from the specification alone, in fp64 but for the roundings the contract asks for: an oracle that
    shares no line with the package's reference and geometry, and is held against them in test_mutations.py.

    Args:
        q, k, v: [L, D]. rows: int64 [R], tokens in raster order. window: tiles. scale: of the scores.
        resolved: ResolvedConfig with quant_tile equal to the tile and without smooth_k.

    Returns exact [R, D], exact_lse [R], emulated [R, D] in q's dtype, emulated_lse [R] in fp32.
    """
    assert resolved.quant_tile == resolved.tile and not resolved.smooth_k
    coordinates = tile_coordinates(resolved.grid, resolved.tile, q.device)
    n = [-(-g // t) for g, t in zip(resolved.grid, resolved.tile, strict=True)]
    tile = (coordinates[:, 0] * n[1] + coordinates[:, 1]) * n[2] + coordinates[:, 2]

    def quantize(x, group, groups):  # group: int64 like x, the scale each element shares
        amax = torch.zeros(groups, device=x.device)
        amax.scatter_reduce_(0, group.flatten(), x.abs().flatten(), "amax")
        # With a Python number, torch computes 448 / amax as 448 * (1 / amax), rounded twice. BF16 inputs lie on
        # ties of E4M3 so often that the last bit moves hundreds of codes of a tile. Hence a tensor of 448.
        top, one = torch.full_like(amax, 448), torch.ones_like(amax)
        inverse, step = (torch.where(amax > 2.0**-100, s, one) for s in (top / amax, amax / top))
        return _e4m3(x * inverse[group]), step

    q8, q_step = quantize(q.float(), tile[:, None].expand(q.shape), n[0] * n[1] * n[2])
    k8, k_step = quantize(k.float(), tile[:, None].expand(k.shape), n[0] * n[1] * n[2])
    v8, v_step = quantize(v.float(), torch.arange(v.shape[1], device=v.device).expand(v.shape), v.shape[1])

    parts = []
    order = []
    for own in tile[rows].unique():
        some = rows[tile[rows] == own]
        seen = torch.ones_like(tile, dtype=torch.bool)
        for axis in range(3):
            i, reach = int(coordinates[some[0], axis]), window[axis] // 2
            if window[axis] < n[axis]:
                centre = i if resolved.truncate else min(max(i, reach), n[axis] - 1 - reach)
                seen &= (coordinates[:, axis] - centre).abs() <= reach
        scores = q[some].double() @ k[seen].double().T * scale
        exact_lse = scores.logsumexp(1)
        exact = (scores - exact_lse[:, None]).exp() @ v[seen].double()
        steps = q_step[tile[some], None].double() * k_step[tile[seen]].double()
        z = q8[some].double() @ k8[seen].double().T * steps * (scale * math.log2(math.e))
        m = z.amax(1, keepdim=True).ceil()
        p = (z - m).exp2()
        total = p.sum(1, keepdim=True)
        p8 = _e4m3((448 * p).float())
        emu = p8.double() @ v8[seen].double() * v_step / (448 * total)
        emu_lse = (m + total.log2())[:, 0] * math.log(2)
        parts.append((exact, exact_lse, emu.to(q.dtype), emu_lse.float()))
        order.append(some)
    back = torch.cat(order).argsort()[rows.argsort().argsort()]  # from tile by tile to the order of `rows`
    return tuple(torch.cat(x)[back] for x in zip(*parts, strict=True))


def _e4m3(x: torch.Tensor) -> torch.Tensor:
    return x.clamp(-448, 448).to(torch.float8_e4m3fn).float()
