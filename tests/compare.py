"""How a kernel's output is judged: by relative error, against two references.

*exact* is softmax attention in fp64 on the inputs as given; *emulated* is the FP8 contract in PyTorch. The kernel may
err against exact attention no more than the emulation does: FP8 rounding is the method, any further error is a defect.
It must also agree with the emulation, as closely as scores in 16 bits allow. Both hold overall and for every (batch,
head, query tile), so that one wrong tile among thousands cannot hide in a mean. In fewer than `LEAST_ROWS` rows, chance
decides how far flipped codes (below) take kernel and emulation apart, so smaller tiles are judged together with those
that follow. One wrong row shows in that many rows as it would alone: its share of the norm falls as the limit does.
Errors are relative RMS: absolute tolerances accept an output of zeros when many keys are averaged.

Effects that a correct kernel cannot avoid set the limits:
- **Flipped codes.** P is a code, `round(120 + 8 (z - m))`, and neighbouring codes are up to 1/8 apart (`CODE_STEP`).
  The kernel sums scores in fp16 and rounds their factor to fp16, so z is off by up to 2^-11 + 2^-12 of itself
  (`SCORE_ERROR`): at |z| = 4 that flips 1 % of the codes. A flip moves P by 9 % RMS: with 1 to 2.5 % of the codes
  flipped, outputs differ by 0.09 sqrt(0.01 to 0.025) = 0.9e-2 to 1.4e-2 (`EMULATION_RMS`). Flips are as often up as
  down, so the error against exact attention stays that of the emulation, and a fault that makes all outputs too large
  or too small still shows: the component of the output along the emulation must have the emulation's size, but for
  `SCALE` and one flip.
- **One flip that shows.** Where one row dominates a tile, or the tile has few rows, a single flip of the largest row
  costs 1/8 of its norm over the norm of all (`flip`). This is independent of the flips that average out, and of the
  emulation's own error, so the limits are roots of sums of squares.
- **Wide logits** (`wide_logits`). At |z| = 100 the score is off by 0.07 octaves, half a code, so kernel and emulation
  round independently. Their difference is then sqrt(1 + factor^2) times the emulation's own error. FP8's noise in such
  a z is ten times larger, so the limit against exact attention stays as it is.
- **The output's own rounding**, half an epsilon of its dtype. It matters only where the emulation is closer to exact
  attention than that, as for constant inputs; there the emulation's error is luck and not a yardstick.
- **The tensor core's fp32 accumulator**, which sums P V. It keeps about 14 bits and truncates, so each of the four
  products of 32 keys of a key block may lose 2^-13 of the sum (`ACCUMULATOR`). It shows where everything else averages
  out, as for values of one sign.

The LSE of a row is that of its rounded P. A row of one key is off by one code, ln(9/8) (`LSE_STEP`); in the mean over
rows, flips cancel. So each row must be within LSE_STEP + `LSE_ABS` of the emulation, and the mean over the n rows of a
head or of a tile within `LSE_MEAN` + LSE_STEP / sqrt(n). (One flip in 30 of a step of 0.09 is 0.02 RMS a row at most,
so the second term is five standard deviations. The first is the rounding of a factor, which rows share: 2^-12 of a z of
16.) The RMS error against the exact LSE may exceed the emulation's by LSE_STEP / sqrt(rows). Wide logits add
`LSE_WIDE` of the largest LSE to LSE_ABS and LSE_MEAN, the score's error.

Gradients are judged alike: against the straight-through gradient of the FP8 contract in fp64, which takes the
place of exact attention, and against its emulation with the kernels' 16-bit roundings. The emulation gets the out and
lse that the kernel's backward got, so that errors of the forward do not count against the backward.
- All three gradients are sums of P, so all have flipped codes, as the forward: `EMULATION_RMS`, and `flip` in a tile.
  The fp64 gradient has none, so `EMULATION_RMS` is the floor of both limits. In the forward l follows a flip and takes
  half of it back; here nothing does, so `flip` is two codes.
- One rounding of a dS in the other direction moves it by 2^-7 of itself, far less than a flip.
- Where the summands of a gradient cancel (values with a mean, a tile that few attend) the emulation's error is
  large, and depends on a few roundings in a tile. A rounding in the other direction makes an independent error as
  large: sqrt(1 + factor^2) times it, as with wide logits, with a factor of 2 for a tile of dQ and dK.
- With `wide_logits` the codes are rounded independently, which is an error of the code (`P_ROUNDING`, the relative RMS
  error of one rounding), and P is off by some per cent. This averages out over many tiles, but not in a tile where one
  query decides: `WIDE_P`, the error of P at a z of 130.
"""

from __future__ import annotations

import math

import torch

from inputs import tile_coordinates

EXACT_FACTOR, TILE_EXACT_FACTOR = 1.1, 1.25  # of the emulation's error against exact attention
EMULATION_RMS = 1.5e-2
GRADIENT_FACTOR, TILE_GRADIENT_FACTOR = 1.2, 2.0  # of the emulated gradient's error against the fp64 one
CODE_STEP = 1 / 8  # largest relative distance of neighbouring E4M3 codes
SCORE_ERROR = 2.0**-11 + 2.0**-12  # relative: of a sum in fp16, and of a factor rounded to fp16
# A code of t in [1, 2) is rounded with an error of 2^-3 / sqrt(12). t is uniform, since codes are equally likely: the
# mean of 1 / t^2 is 1/2.
P_ROUNDING = 2.0**-3 / math.sqrt(12) * math.sqrt(1 / 2)
WIDE_P = 130 * math.log(2) * SCORE_ERROR  # 130: the largest z of tests/inputs.py
SCALE = 5e-3
LEAST_ROWS = 32
ZERO = 1e-6  # largest output where the reference is zero everywhere
LSE_BIAS = -math.log(2 * math.log(2) ** 2)  # log of the mean of P / 2^z over an octave
LSE_STEP = math.log(1 + CODE_STEP)  # natural log units, as the two below
LSE_ABS, LSE_MEAN = 5e-3, 3e-3
LSE_WIDE = 2e-3  # of the largest LSE, with wide logits
ACCUMULATOR = 4 * 2.0**-13
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
            floors=(torch.finfo(out.dtype).eps / 2,) * 2,
            step=CODE_STEP,
            independent=wide_logits,
        )
        found |= _lse_violations(
            lse.double(), exact_lse.double(), emu_lse.double(), tile_of_token, wide_logits
        )
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
    floors = (P_ROUNDING, max(P_ROUNDING, WIDE_P)) if wide_logits else (EMULATION_RMS, EMULATION_RMS)
    for name, x in grads.items():
        tile_factor = GRADIENT_FACTOR if name == "dv" else TILE_GRADIENT_FACTOR
        found |= _tensor_violations(
            x,
            reference[name],
            emulated[name],
            tile_of_token,
            factors=(GRADIENT_FACTOR, tile_factor),
            floors=floors,
            step=2 * CODE_STEP,
            independent=True,
            scale=P_ROUNDING if wide_logits else SCALE,
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
    out, exact, emu, tile_of_token, *, factors, floors, step, independent, scale=SCALE, prefix=""
) -> dict[str, str]:
    """The rules that one tensor [B, L, H, D] breaks, their names with `prefix`.

    Args:
        factors: of the emulation's error against `exact`, overall and by tile.
        floors: relative RMS error, overall and of a tile, that is allowed even where the emulation's own is smaller.
        step: the largest relative change of one P that flips.
        independent: whether rounding errors may be independent of the emulation's.
        scale: by how much all of it may be too large or too small.
    """
    out, exact, emu = out.double(), exact.double(), emu.double()

    def by_group(x):
        """Sums over the rows and channels of each (group, batch, head), from squares [B, L, H, D]."""
        rows = x.sum(-1).transpose(0, 1)
        return rows.new_zeros(n_groups, *rows.shape[1:]).index_add_(0, group_of_token, rows)

    def largest_row(x):  # norm [group, batch, head] of the largest row
        rows = x.square().sum(-1).transpose(0, 1)
        index = group_of_token[:, None, None].expand(rows.shape)
        return rows.new_zeros(n_groups, *rows.shape[1:]).scatter_reduce_(0, index, rows, "amax").sqrt()

    found = {}
    for name, reference in (("exact", exact), ("emulation", emu)):
        if not reference.any():
            # Roundings that cancel in fp64 may leave as much as they leave in the emulation.
            if out.abs().max() > max(ZERO, TILE_GRADIENT_FACTOR * float(emu.abs().max())):
                found[prefix + name] = f"the reference is zero, the output reaches {out.abs().max():.3g}"
            return found

    tiles = _judged_together(tile_of_token)
    group_of_token, n_groups = tiles[tile_of_token], int(tiles.max()) + 1
    size = by_group(torch.ones_like(out))
    for tiled in (False, True):
        over = by_group if tiled else torch.sum
        share = (size / out.numel()).sqrt() if tiled else 1.0

        def rms(x, reference, over=over, share=share):
            least = TILE_NORM_FLOOR * share * reference.square().sum().sqrt()
            norm = torch.maximum(over(reference.square()).sqrt(), least)
            return over((x - reference).square()).sqrt() / norm

        emu_norm = over(emu.square()).sqrt()
        rows = largest_row(emu)
        flip = step * (rows if tiled else rows.max()) / emu_norm.clamp(min=1e-300)
        own = rms(emu, exact)  # the emulation's error
        factor = factors[tiled]
        least_factor = min(factor, TILE_EXACT_FACTOR)  # a larger factor is for `own` alone
        floor = least_factor * flip.clamp(min=floors[tiled])
        with_flip = ((factor * own).square() + (least_factor * flip).square()).sqrt()
        limit = {
            "exact": torch.maximum(with_flip, floor) + ACCUMULATOR,
            "emulation": torch.maximum((EMULATION_RMS**2 + flip.square()).sqrt(), floor),
        }
        if independent:
            limit["emulation"] = torch.maximum(limit["emulation"], math.sqrt(1 + factor**2) * own)
        if not tiled:
            larger = float((out * emu).sum() / emu.square().sum()) - 1
            # A flip of the largest row counts in its share of the squares. An independent error of the emulation
            # makes it larger, by the error's square.
            allowed = scale + float(flip.square() / step + (own.square() if independent else 0))
            if not abs(larger) <= allowed:
                found[prefix + "scale"] = (
                    f"larger than the emulation by {larger:.3g}, at most {allowed:.3g} is allowed"
                )
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


def _judged_together(tile_of_token) -> torch.Tensor:
    """int64 [tiles]: the group of each tile, consecutive tiles that have `LEAST_ROWS` rows together."""
    groups, group, rows, left = [], 0, 0, len(tile_of_token)
    for count in torch.bincount(tile_of_token).tolist():
        groups.append(group)
        rows, left = rows + count, left - count
        if rows >= LEAST_ROWS and left >= LEAST_ROWS:
            group, rows = group + 1, 0
    return torch.tensor(groups, device=tile_of_token.device)


def _worst_element(out, exact, emu, tile_of_token, group) -> str:
    """Where `out` is furthest from the emulation: in (group, batch, head), or anywhere when `group` is ()."""
    error = (out - emu).abs()
    text = ""
    if group:
        n, b, h = group
        tiles = (_judged_together(tile_of_token) == n).nonzero()[:, 0].tolist()
        inside = torch.zeros_like(error, dtype=torch.bool)
        inside[b, (tile_of_token >= tiles[0]) & (tile_of_token <= tiles[-1]), h] = True
        error = error.masked_fill(~inside, -1)
        named = f"tile {tiles[0]} is" if len(tiles) == 1 else f"tiles {tiles[0]} to {tiles[-1]} are"
        text = f"batch {b}, head {h}, {named} worst, {int(inside[b, :, h, 0].sum())} rows; "
    at = torch.unravel_index(error.argmax(), error.shape)
    b, row, h, d = (int(i) for i in at)
    return text + (
        f"worst element [batch {b}, row {row}, head {h}, channel {d}], tile {int(tile_of_token[row])}: "
        f"{out[at]:.6g}, emulation {emu[at]:.6g}, exact {exact[at]:.6g}"
    )


def _lse_violations(lse, exact, emu, tile_of_token, wide_logits) -> dict[str, str]:
    """The rules that lse [B, H, L] breaks; all are fp64."""

    def rms(x):
        return float(x.square().mean().sqrt())

    found = {}
    wide = LSE_WIDE * float(emu.abs().max()) if wide_logits else 0.0
    limit = LSE_ABS + wide
    error = lse - emu
    tiles = _judged_together(tile_of_token)
    rows = torch.bincount(tiles[tile_of_token])
    by_tile = torch.zeros(*lse.shape[:2], len(rows), dtype=lse.dtype, device=lse.device)
    by_tile = by_tile.index_add_(2, tiles[tile_of_token], error) / rows
    worst = (error.abs() - LSE_STEP).clamp(min=0)
    if not worst.max() <= limit:
        at = torch.unravel_index(worst.argmax(), error.shape)
        found["lse"] = (
            f"off the emulation by {error[at]:.3g}, at most {LSE_STEP + limit:.3g} is allowed, at [batch, head, row] "
            f"{[int(i) for i in at]}: {lse[at]:.6g}, emulation {emu[at]:.6g}, exact {exact[at]:.6g}"
        )
    for name, mean, n in (("lse mean", error.mean(2), rows.sum()), ("tile lse mean", by_tile, rows)):
        excess = mean.abs() / (LSE_MEAN + wide + LSE_STEP / n.sqrt())
        if not excess.max() <= 1:
            at = torch.unravel_index(excess.argmax(), excess.shape)
            where = dict(zip(("batch", "head", "group of tiles"), (int(i) for i in at), strict=False))
            found[name] = (
                f"off the emulation by {mean[at]:.3g}, {excess[at]:.3g} times what is allowed, at {where}"
            )
    own, mine = rms(emu - exact), rms(lse - exact)
    if not mine <= EXACT_FACTOR * own + limit / 5 + LSE_STEP / math.sqrt(lse.numel()):
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
    n_tiles = math.prod(n)
    tile = (coordinates[:, 0] * n[1] + coordinates[:, 1]) * n[2] + coordinates[:, 2]
    by_tile = tile.argsort(stable=True)  # tile after tile, each in raster order, as in the slots
    first = tile.bincount(minlength=n_tiles).cumsum(0) - tile.bincount(minlength=n_tiles)
    row = torch.empty_like(tile)
    row[by_tile] = torch.arange(len(tile), device=q.device) - first[tile[by_tile]]
    block = 4 * tile + row // 128  # a slot has at most 4

    def quantize(x, group, groups, largest):  # group: int64 [L], the scale each token shares
        amax = torch.zeros(groups, device=x.device).scatter_reduce_(0, group, x.abs().amax(1), "amax")
        # With a Python number, torch computes 448 / amax as 448 * (1 / amax), rounded twice. BF16 inputs lie on
        # ties of E4M3 so often that the last bit moves hundreds of codes of a tile. Hence a tensor of 448.
        top, one = torch.full_like(amax, largest), torch.ones_like(amax)
        inverse, step = (torch.where(amax > 2.0**-100, s, one) for s in (top / amax, amax / top))
        return _e4m3(x * inverse[group, None]), step

    q8, q_step = quantize(q.float(), tile, n_tiles, 14)
    k8, k_step = quantize(k.float(), tile, n_tiles, 14)
    v8, v_step = quantize(v.float(), block, 4 * n_tiles, 448)

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
        p = by_codes(z, block[seen])
        total = p.sum(1, keepdim=True)
        emu = p @ (v8[seen].double() * v_step[block[seen], None].double()) / total
        emu_lse = total.log()[:, 0] - LSE_BIAS
        parts.append((exact, exact_lse, emu.to(q.dtype), emu_lse.float()))
        order.append(some)
    back = torch.cat(order).argsort()[rows.argsort().argsort()]  # from tile by tile to the order of `rows`
    return tuple(torch.cat(x)[back] for x in zip(*parts, strict=True))


def by_codes(z, block) -> torch.Tensor:
    """P [rows, keys] in fp64, about 2^z, from z [rows, keys] and the key block [keys] of each key; 0 for -inf."""
    _, block = block.unique(return_inverse=True)
    index = block.expand(z.shape)
    top = torch.full((len(z), int(block.max()) + 1), -math.inf, dtype=z.dtype, device=z.device)
    m = top.scatter_reduce_(1, index, z, "amax").ceil().gather(1, index)
    m = m.clamp(min=-1e9)  # finite, for a block of which nothing is seen
    return number_of_code((120 + 8 * (z - m)).round().clamp(0, 126)) * (m - 8).exp2()


def number_of_code(code) -> torch.Tensor:
    """The E4M3 numbers with these bit patterns, whole numbers from 0 to 126."""
    exponent, mantissa = (code / 8).floor(), code % 8
    return torch.where(exponent > 0, (8 + mantissa) * (exponent - 10).exp2(), mantissa * 2.0**-9)


def _e4m3(x: torch.Tensor) -> torch.Tensor:
    return x.clamp(-448, 448).to(torch.float8_e4m3fn).float()
