"""Part of bench_forward.py: backward, and forward with backward, of FPSAttention, cuDNN, FlexAttention and peers.

All run on the same tensors. A contender's gradients are compared with those of a BF16 contender that computes the same
attention, where there is one.
"""

from __future__ import annotations

import torch
import torch._functorch.config

from common import (
    BACKWARD,
    FLEX,
    OURS,
    OURS_DETERMINISTIC,
    TRAINING,
    GpuMonitor,
    Record,
    attention_flops,
    compare_with,
    time_records,
)
from contenders import TOLERANCE_8_BIT, Contender, as_hnd, cudnn, deterministic, flex, ours, peers
from fpsattention.cli.timing import first_line
from shapes import Shape

# A graph is differentiated many times: FlexAttention's compiled backward must keep the tensors that it saved.
torch._functorch.config.donated_buffer = False

# Operations of a pass relative to the forward's: a forward is two products, a backward five.
FORWARDS_WORTH = {BACKWARD: 2.5, TRAINING: 3.5}


def contenders_of(shape: Shape) -> list[Contender]:
    """Contenders of the backward: dense cuDNN and peers that can train, FlexAttention under the windows, FPSAttention
    under every window, deterministic as well.
    """
    flexes = [flex(shape, window) for window in shape.training if window in shape.flex]
    others = [c for c in peers(shape)[0] if c.train is not None]
    own = [make(shape, window) for window in shape.training for make in (ours, deterministic)]
    return [cudnn(shape), *flexes, *others, *own]


def differentiate(contender: Contender, layout: str, qkv, dout) -> tuple[dict, tuple]:
    """The functions to time of one contender, by pass, and its gradients of q, k and v in `layout`."""
    if contender.train is not None:
        operands = (as_hnd(x.detach(), layout) for x in qkv)
        forward, backward, gradients = contender.train(*operands, dout)

        def both():
            forward()
            backward()

        both()
        grads = tuple(as_hnd(x, layout) for x in gradients())  # the transposition is its own inverse
        return {BACKWARD: backward, TRAINING: both}, grads

    call = contender.prepare(*qkv)

    def training():
        return torch.autograd.grad(contender.finish(call()), qkv, dout)

    grads = training()
    out = contender.finish(call())

    def backward():
        return torch.autograd.grad(out, qkv, dout, retain_graph=True)

    return {BACKWARD: backward, TRAINING: training}, grads


def relative_rms(x: torch.Tensor, reference: torch.Tensor) -> float:
    return ((x.float() - reference.float()).norm() / reference.float().norm()).item()


@torch.enable_grad()
def bench_training(
    shape: Shape, qkv, work_of, clock, monitor: GpuMonitor, rounds, burst_ms, seed
) -> list[Record]:
    """Time both passes of every contender on one shape; `work_of` is bench_forward's. Raises DeviceLost."""
    qkv = tuple(x.detach().requires_grad_() for x in qkv)
    dout = as_hnd(torch.randn_like(qkv[0]), shape.layout)
    entries, measured, grads_of = {}, [], {}
    for c in contenders_of(shape):
        work = work_of(shape, c.window)
        window = None if c.window is None else work.resolved.windows[0]
        tile = shape.tile if c.name in (OURS, OURS_DETERMINISTIC, FLEX) else None
        records = {
            name: Record(
                *(
                    f"{shape.case(c.window)} {name}",
                    c.name,
                    shape.grid,
                    shape.heads,
                    shape.head_dim,
                    shape.batch,
                ),
                *(shape.layout, tile, window, work.density),
                note=c.note,
            )
            for name in FORWARDS_WORTH
        }
        measured += [(record, name, work) for name, record in records.items()]
        try:
            passes, grads = differentiate(c, shape.layout, qkv, dout)
            entries |= {f"{records[name].case} {c.name}": fn for name, fn in passes.items()}
            same = grads_of.setdefault(c.window, grads)  # the first is cuDNN's or FlexAttention's
            for record in records.values():
                record.rel_rms = max(relative_rms(a, b) for a, b in zip(grads, same, strict=True))
                if not record.rel_rms <= 1.5 * TOLERANCE_8_BIT:
                    record.fail(f"gradients differ from BF16 ones by {record.rel_rms:.3g} in relative RMS")
        except Exception as error:  # a contender that fails is a line in the results
            for record in records.values():
                record.fail(first_line(error))
            clock.check(c.name)
    time_records([record for record, _, _ in measured], entries, clock, monitor, rounds, burst_ms, seed)
    for record, name, work in measured:
        if record.ms:
            flops = FORWARDS_WORTH[name] * attention_flops(
                work.pairs, shape.heads, shape.head_dim, shape.batch
            )
            record.tflops_total = flops / record.ms / 1e9
    for name in FORWARDS_WORTH:
        of_pass = [record for record, other, _ in measured if other == name]
        compare_with(of_pass[0], of_pass)  # the first is cuDNN's
    return [record for record, _, _ in measured]
