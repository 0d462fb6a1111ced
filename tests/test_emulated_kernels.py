"""The kernels' own sources, run on the CPU by the emulator of tests/emulator, against the executable contract.

No GPU is needed. What this sees: indices, layouts, descriptors, masks, roundings, and whether every wait is there,
under random schedules. What it cannot see: time, memory ordering, and how the tensor core rounds its sums.
"""

from __future__ import annotations

import ctypes
import importlib.util
import math
import os
import subprocess
import sys
import threading
from contextlib import suppress
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

import packed
from emulator import build
from fpsattention import AttentionConfig, norm_rope, reference
from fpsattention.core import api, ops
from prologue_cases import inputs

# Relative RMS. dQ and dK are of products of 16-bit numbers, which only their sums' order can change. A probability on
# the edge between two E4M3 codes may fall to the other side, as exp2 differs by an ulp: then one element P of out's and
# dV's sums moves by P / 8. With the hundred keys and more of the windows below, P is at most some 0.3, and both sides
# have hundreds of rows.
LIMITS = {"out": 1e-2, "lse": 1e-5, "dq": 4e-3, "dk": 4e-3, "dv": 1e-2}


@dataclass(frozen=True)
class Case:
    """One call, and how it is scheduled: CTAs at a time, wgmmas early or late. `text` and `counts` are the lengths of
    prefix and suffix, and how many of each are valid in a sample.
    """

    grid: tuple[int, int, int]
    config: AttentionConfig
    head_dim: int = 64
    batch: int = 1
    heads: int = 1
    dtype: torch.dtype = torch.bfloat16
    tensor_layout: str = "NHD"
    deterministic: bool = False
    ctas: int = 3
    eager: bool = False
    text: tuple[int, int] = (0, 0)
    counts: tuple[tuple[int, ...] | None, tuple[int, ...] | None] = (None, None)


CASES = {
    "one tile": Case((4, 8, 8), AttentionConfig(tile=(4, 8, 8)), heads=2, head_dim=128),
    "ragged": Case((5, 9, 9), AttentionConfig(tile=(3, 5, 8)), deterministic=True, ctas=4),
    "window": Case(
        (5, 7, 9), AttentionConfig(tile=(2, 3, 4), window=(1, 3, 3)), dtype=torch.float16, batch=2, eager=True
    ),
    "truncate, a window per head": Case(
        (5, 7, 9),
        AttentionConfig(tile=(3, 4, 5), window=((1, 1, 1), (2, 2, 2)), border="truncate"),
        heads=2,
        head_dim=128,
        dtype=torch.float16,
        tensor_layout="HND",
        deterministic=True,
        ctas=5,
    ),
    "clamp, a window per head": Case(
        (6, 6, 15),
        AttentionConfig(tile=(3, 6, 5), window=((1, 1, 3), (2, 1, 1)), smooth_k=True),
        heads=2,
        tensor_layout="HND",
        ctas=1,
    ),
    "smooth_k, quant_tile": Case(
        (5, 7, 9),
        AttentionConfig(tile=(2, 3, 4), quant_tile=(4, 6, 8), smooth_k=True),
        dtype=torch.float16,
        deterministic=True,
    ),
    "text tokens": Case(
        (5, 7, 9), AttentionConfig(tile=(2, 3, 4), window=(1, 3, 3)), head_dim=128, text=(70, 200), ctas=4
    ),
    "text tokens, some invalid": Case(
        (5, 7, 9),
        AttentionConfig(tile=(2, 3, 4), window=((1, 1, 3), (3, 3, 3)), quant_tile=(4, 6, 8), smooth_k=True),
        batch=2,
        heads=2,
        tensor_layout="HND",
        deterministic=True,
        eager=True,
        text=(140, 130),
        counts=((129, 3), (0, 130)),
    ),
    "text tokens alone": Case((0, 4, 4), AttentionConfig(tile=(2, 4, 4)), text=(90, 150), deterministic=True),
    "several blocks to a tile": Case(
        (5, 8, 8), AttentionConfig(tile=(5, 8, 6)), head_dim=128, deterministic=True, eager=True
    ),
}


def load(path):
    """The compiled module, under a name of its own: the real `_C` stays where it is, and so do other builds."""
    spec = importlib.util.spec_from_file_location(f"{path.parent.name}._C", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def emulated(tmp_path_factory):
    """Path of the emulated module."""
    try:
        return build.build(tmp_path_factory.mktemp("emulated"), list(MUTATIONS.values()))
    except build.MissingTool as missing:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"the kernels cannot be compiled for the CPU: {missing}")


@pytest.fixture
def on_cpu(monkeypatch):
    """Lets the host code of ops.py take tensors of the CPU; memory that it leaves uninitialised holds NaN."""
    monkeypatch.setattr(ops, "_launch", lambda kernels, name, params, device: kernels(params, 0, 0))

    def poisoned(allocate):
        def wrapper(*args, **kwargs):
            x = allocate(*args, **kwargs)
            ctypes.memset(x.data_ptr(), 0xFF, x.numel() * x.element_size())
            return x

        return wrapper

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))


def call_of(q, config, grid, scale, tensor_layout, prefix_len=0, suffix_len=0) -> ops.Call:
    """A new one, whose parameters belong to the module that is loaded."""
    batch, second, third, head_dim = q.shape
    heads = third if tensor_layout == "NHD" else second
    sizes = batch, heads, head_dim, q.dtype, scale, tensor_layout
    return ops.call_of.__wrapped__(config, grid, prefix_len, suffix_len, *sizes)


def run(
    path, case: Case, seed: int, schedule: int, monkeypatch, mutation: int = 0
) -> tuple[list[torch.Tensor], tuple, dict]:
    """Every result for random tensors of this seed, and what the contract's functions take for the same call."""
    monkeypatch.setattr(ops, "_C", load(path))
    configure = ctypes.CDLL(str(path)).emulator_configure
    configure(case.ctas, case.eager, ctypes.c_uint64(schedule), mutation)

    generator = torch.Generator().manual_seed(seed)
    tokens, heads = math.prod(case.grid) + sum(case.text), case.heads
    shape = (tokens, heads) if case.tensor_layout == "NHD" else (heads, tokens)
    shape = (case.batch, *shape, case.head_dim)
    q, k, v, dout = (torch.randn(shape, generator=generator) for _ in range(4))
    if case.config.smooth_k:
        k += 2 * torch.randn(case.head_dim, generator=generator)
    q, k, v, dout = (x.to(case.dtype) for x in (q, k, v, dout))
    dlse = torch.randn(case.batch, heads, tokens, generator=generator)
    scale = case.head_dim**-0.5

    counts = [None if x is None else torch.tensor(x, dtype=torch.int32) for x in case.counts]
    text = (*case.text, *counts)
    call = call_of(q, case.config, case.grid, scale, case.tensor_layout, *case.text)
    out, lse, operands = ops.launch_attention(call, q, k, v, *counts)
    gradients = ops.launch_backward(call, dout, dlse, out, lse, operands, *counts, case.deterministic)
    about = dict(grid=case.grid, config=case.config, scale=scale, tensor_layout=case.tensor_layout)
    about |= dict(zip(("prefix_len", "suffix_len", "prefix_valid", "suffix_valid"), text, strict=True))
    return [out, lse, *gradients], (q, k, v, dout, dlse), about


def errors(path, case: Case, seed: int, monkeypatch, mutation: int = 0) -> dict[str, float]:
    """Relative RMS distance of every result from the contract; infinite if it is not finite."""
    results, (q, k, v, dout, dlse), about = run(path, case, seed, seed, monkeypatch, mutation)
    out, lse = results[:2]
    expected = (
        *reference.emulated_attention(q, k, v, **about),
        *reference.emulated_backward(q, k, v, out, lse, dout, dlse, **about),
    )
    found = {}
    for name, x, right in zip(LIMITS, results, expected, strict=True):
        none = right == -math.inf  # the lse of invalid tokens
        assert (x[none] == -math.inf).all(), name
        x, right = x.masked_fill(none, 0.0), right.masked_fill(none, 0.0)
        distance = (x.double() - right.double()).norm() / right.double().norm()
        found[name] = distance.item() if x.isfinite().all() else math.inf
    return found


def depends_on_schedule(path, case: Case, monkeypatch, mutation: int = 0) -> bool:
    """Whether some result has other bits when CTAs, threads and copies run in another order."""
    first, *others = (run(path, case, 3, schedule, monkeypatch, mutation)[0] for schedule in range(4))
    return not all(torch.equal(x, y) for other in others for x, y in zip(first, other, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_kernels_keep_the_contract(name, emulated, on_cpu, monkeypatch, seed):
    found = errors(emulated, CASES[name], seed, monkeypatch)
    assert all(found[x] <= LIMITS[x] for x in LIMITS), found


@pytest.mark.parametrize("name", ["text tokens, some invalid", "smooth_k, quant_tile"])
def test_eager_calls_launch_what_the_ops_do(name, emulated, on_cpu, monkeypatch):
    """`attention` and `quantize_qkv` go past the ops where nothing watches: the same bits, by the same arguments."""
    case = CASES[name]
    (want, want_lse, *_), (q, k, v, *_), about = run(emulated, case, 3, 3, monkeypatch)
    monkeypatch.setattr(api, "backend_for", lambda *_: ("sm90", "it is pretended"))
    monkeypatch.setattr(ops, "call_of", ops.call_of.__wrapped__)  # parameters of the module that is loaded
    out, lse = api.attention(q, k, v, **about, return_lse=True)
    assert torch.equal(out, want) and torch.equal(lse, want_lse)
    assert torch.equal(api.attention(q, k, v, **about), want)
    quantized = api.quantize_qkv(q, k, v, **about)
    for _ in range(2):  # the second call has a work counter of its own, too
        out, lse = api.attention(quantized, return_lse=True)
        assert torch.equal(out, want) and torch.equal(lse, want_lse)
    assert torch.equal(api.attention(quantized), want)


def test_norm_and_rotation_ahead_of_rounding(emulated, on_cpu, monkeypatch, seed):
    """The codes of Q and K are those of `norm_rope`, save a few that tip; V's are what they were."""
    monkeypatch.setattr(ops, "_C", load(emulated))
    grid, tile = (5, 7, 9), (2, 3, 4)
    (q, k, v), given = inputs(grid, 3, 128, seed=seed, dtype=torch.bfloat16)
    rest = {"eps": given["eps"], "rope": given["rope"]}
    call = call_of(q, AttentionConfig(tile=tile), grid, 0.1, "NHD")
    got = ops.launch_quantize(call, q, k, v, None, None, ops.NormRope(**given))
    q, k = (norm_rope(x, given[f"{n}_weight"], grid=grid, **rest) for n, x in (("q", q), ("k", k)))
    want = ops.launch_quantize(call, q, k, v, None, None)
    monkeypatch.undo()
    for a, b in zip(*(packed.decode(call, x) for x in (got, want)), strict=True):
        assert (a - b).norm() <= 3e-3 * b.norm()
    assert torch.equal(*(packed.sections(call, x).v_amax for x in (got, want)))


# Every CTA of the forward goes round its rings several times, and the last query block of some items is missing.
RING = Case((5, 9, 9), AttentionConfig(tile=(3, 5, 8)), ctas=2)
# In fp16, which shows more of the sums' last bits than bf16. Eight key blocks add to every dQ.
TURNS = Case(
    (5, 9, 9), AttentionConfig(tile=(3, 5, 8)), heads=2, dtype=torch.float16, deterministic=True, ctas=4
)


def test_deterministic_gradients_do_not_depend_on_the_schedule(emulated, on_cpu, monkeypatch):
    assert not depends_on_schedule(emulated, TURNS, monkeypatch)


def test_every_byte_that_is_copied_is_written(emulated, on_cpu, monkeypatch):
    """What the kernels copy to shared memory is the same, whatever its memory held before. Here every block holds a
    token: the backward leaves the operands of the others alone, which nothing reads.
    """
    case = Case((3, 5, 8), AttentionConfig(tile=(3, 5, 8), smooth_k=True), heads=2)
    poisoned = torch.Tensor.new_empty

    def buffers(fill: int) -> list[torch.Tensor]:
        made = []

        def filled(*args, **kwargs):
            x = poisoned(*args, **kwargs)
            if x.dtype == torch.uint8:
                made.append(x.fill_(fill))
            return x

        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "new_empty", filled)
            run(emulated, case, 3, 3, patch)
        return made

    first, second = buffers(0xFF), buffers(0)
    assert len(first) == 2  # the packed operands; the scratch of the backward
    for x, y in zip(first, second, strict=True):
        assert torch.equal(x, y)


def test_launches_let_other_threads_run(emulated, on_cpu, monkeypatch):
    """A launch waits while the stream's queue is full; it must not hold the GIL then."""
    real, ran = load(emulated), dict.fromkeys(("quantize", "attn_fwd", "attn_bwd"), 0)

    def watched(name):
        def launch(*args):
            counting, counted = threading.Event(), threading.Event()
            thread = threading.Thread(target=lambda: (counting.wait(), counted.set()))
            thread.start()
            counting.set()
            getattr(real, name)(*args)
            ran[name] += counted.is_set()
            thread.join()

        return launch

    others = {name: getattr(real, name) for name in dir(real) if name not in ran}
    module = SimpleNamespace(**others, **{name: watched(name) for name in ran})
    monkeypatch.setitem(globals(), "load", lambda path: module)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000)  # Python itself takes the GIL from nobody meanwhile
    try:
        for attempt in range(20):  # the other thread may be slow to wake
            run(emulated, RING, attempt, attempt, monkeypatch)
            if all(ran.values()):
                return
    finally:
        sys.setswitchinterval(interval)
    pytest.fail(f"no other thread ran during a launch: {ran}")


@pytest.mark.parametrize(
    ("source", "error"),
    [
        ("*deferred.after_previous().turns = 0;", None),
        ("*deferred.params_.turns = 0;", "private"),
        ("*deferred.turns = 0;", "has no member named"),
    ],
)
def test_a_kernel_that_does_not_wait_for_the_one_before_does_not_compile(source, error, emulated, tmp_path):
    kernel = (
        f"__global__ void kernel(const __grid_constant__ Deferred<BackwardParams> deferred) {{ {source} }}\n"
    )
    path = tmp_path / "kernel.cpp"
    path.write_text(f'#include "fpsattention/launch.h"\nnamespace fps {{\n{kernel}}}\n')
    command = [*build.compiler(emulated.parent), "-fsyntax-only", str(path)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert (result.returncode == 0) == (error is None), result.stderr
    assert (error or "") in result.stderr


def test_only_kernels_that_wait_can_be_launched(emulated, tmp_path):
    path = tmp_path / "launch.cpp"
    path.write_text(
        '#include "fpsattention/launch.h"\nnamespace fps {\n'
        "__global__ void kernel(const __grid_constant__ BackwardParams p) {}\n"
        "void f(const BackwardParams &p) { launch(kernel, dim3(1), 32, 0, nullptr, p); }\n}\n"
    )
    command = [*build.compiler(emulated.parent), "-fsyntax-only", str(path)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode != 0 and "no matching function for call to" in result.stderr


# Faults of the kernels, each of which must be noticed. One build holds them all, and they stay asleep until a test
# wakes one. Text of a source, and what replaces it.
Q_EMPTY = "        smem.q_empty[before.stage()].arrive_as_warp();\n"
ZEROS = "    store_ds(smem.ds[1], own.first, fragments.a);\n"
DK = "    issue_dk(smem, operands, fragments, before);\n\n"
DQ = (
    "    issue<typename Cfg::MmaDQ>"
    "(operands.ds(_, _, _, buffer), operands.k_t, fragments.dq, Sum::kFromZero);\n"
)
FENCED_DQ = "    fence_proxy_async();\n" + DQ
DP_DONE = "    wait_for_products<1>(rdP);\n"
DS = "    store_ds(smem.ds[ds_buffer], own.first, rdST);\n"
STEP_DONE = "    smem.empty[s].arrive_as_warp();\n"
ONE_FOR_FOUR = "if (threadIdx.x % 128 == 0) {{\nfor (int i = 0; i < 4; ++i) {{\n{}.arrive();\n}}\n}}\n"
BACKWARD = {
    "S read while it is computed": {"    wait_for_products<1>(rS);\n": "    warpgroup_fence_operand(rS);\n"},
    "no zeros for the first step": {ZEROS: ""},
    "dQ of dS that is not all there": {"    smem.ds_full.wait(buffer ^ 1);": ""},
    "dQ of dS without a proxy fence": {FENCED_DQ: DQ},
    "one buffer of dS": {
        ZEROS: ZEROS.replace("ds[1]", "ds[0]"),
        "smem.ds[ds_buffer ^ 1]": "smem.ds[0]",
        FENCED_DQ: FENCED_DQ.replace("buffer", "0"),
        DS: DS.replace("ds[ds_buffer]", "ds[0]"),
        "smem.ds[last]": "smem.ds[0]",
    },
    "dK of the dS before last": {"smem.ds[ds_buffer ^ 1]": "smem.ds[ds_buffer]"},
    "dS in registers that dV reads": {
        "    pack(rdP, rdST);\n": "    pack(rdP, rA);\n",
        DS: DS.replace("rdST", "rA"),
    },
    "dK of queries that are not there": {
        "    smem.q_full[step.stage()].wait(step.full_parity());\n": "",
    },
    "queries released before dK has read them": {
        Q_EMPTY: "",
        DK: DK + "    if (ring.count > 0) {\n" + Q_EMPTY + "    }\n",
    },
    "queries released by one warp for four": {Q_EMPTY: ONE_FOR_FOUR.format("smem.q_empty[before.stage()]")},
    "dO released before dV has read it": {
        DP_DONE: DP_DONE + STEP_DONE.lstrip(),
        STEP_DONE: "",
    },
    "rows released before minus_delta was read": {
        DP_DONE: DP_DONE.replace("<1>", "<0>") + STEP_DONE.lstrip(),
        STEP_DONE: "",
    },
    "dO released by one warp for four": {STEP_DONE: ONE_FOR_FOUR.format("smem.empty[s]")},
    "dQ handed over while the one before is read": {
        "    smem.dq_empty[warpgroup].wait(step.empty_parity());\n": "",
    },
    "dQ's buffer released before the copy engine has read it": {"            bulk_wait_read();\n": ""},
    "dQ added before it is there": {"        smem.dq_full[half].wait(ring.full_parity());\n": ""},
    "rows refilled without a proxy fence": {
        "        smem.empty[s].wait(ring.empty_parity());\n        fence_proxy_async();": (
            "        smem.empty[s].wait(ring.empty_parity());\n"
        ),
    },
    "dQ added without a proxy fence": {"            fence_proxy_async();\n": ""},
}
TAKE_TURN = "            wait_for(p.turns + i, turn.from);\n            fence_proxy_async_global();\n"
TURNS_TAKEN = {
    "a key block adds without its turn": {TAKE_TURN: "            fence_proxy_async_global();\n"},
    "a turn taken without a proxy fence": {TAKE_TURN: "            wait_for(p.turns + i, turn.from);\n"},
    "the turn is passed on before all is added": {"                bulk_wait();\n": ""},
}
FIRST_KEYS = (
    "        // First key block: S = Q K^T, and softmax from its maxima.\n"
    "        smem.full[ring.stage()].wait(ring.full_parity());\n"
)
KEYS = (
    "            smem.full[ring.stage()].wait(ring.full_parity());\n"
    "            meta = smem.stages[ring.stage()].block.meta;\n"
)
ADD = "            add_to_o(rO, rT, row);\n"
PV = "            wait_for_products<0>(rT);\n" + ADD
RELEASE = "\n            // Release the stage.\n            read.arrive_as_warp();\n"
REFILL = "        smem.q_empty[ring.stage()].wait(ring.empty_parity());\n        fence_proxy_async();"
STORE = (
    "        store<Cfg, T>(p, task.item, task.queries[warpgroup], rO, row);\n"
    "        smem.q_empty[q_stage].arrive_as_warp();\n"
)
FORWARD = {
    "S read while it is computed": {
        "            wait_for_products<0>(rS);\n": "            warpgroup_fence_operand(rS);\n"
    },
    "T read while it is computed": {PV + RELEASE: "warpgroup_fence_operand(rT);\n" + ADD + RELEASE},
    "keys read before they are there": {FIRST_KEYS: "", KEYS: KEYS.splitlines(keepends=True)[1]},
    "keys waited for with the parity of the lap before": {
        FIRST_KEYS: FIRST_KEYS.replace("full_parity", "empty_parity"),
        KEYS: KEYS.replace("full_parity", "empty_parity"),
    },
    "a stage released before PV has read it": {PV + RELEASE: RELEASE + PV},
    "a stage released by one warp for four": {PV + RELEASE: PV + ONE_FOR_FOUR.format("read")},
    "a stage filled while it is read": {
        "            smem.empty[ring.stage()].wait(ring.empty_parity());\n": ""
    },
    "a stage released before it is filled": {
        "        smem.full[ring.stage()].wait(ring.full_parity());\n"
        "        smem.empty[ring.stage()].arrive_as_warp();\n": (
            "        smem.empty[ring.stage()].arrive_as_warp();\n"
        ),
    },
    "keys refilled without a proxy fence": {"                fence_proxy_async();": ""},
    "queries refilled without a proxy fence": {REFILL: REFILL.splitlines(keepends=True)[0]},
    "the bytes of keys not waited for": {
        "                full.expect(kBytes);\n                full.arrive();\n": "                full.arrive();\n"
    },
    "the bytes of queries not waited for": {"                    full.expect(kBytes);\n": ""},
    "queries replaced while they are read": {REFILL: REFILL.splitlines(keepends=True)[1]},
    "queries released before they are read": {
        "        clear(rO);\n": "        clear(rO);\n        smem.q_empty[q_stage].arrive_as_warp();\n",
        STORE: STORE.splitlines(keepends=True)[0],
    },
    "mbarriers that the copy engine may not know": {"        fence_barrier_init();\n": ""},
    "mbarriers used before they are there": {"    __syncthreads();\n": ""},
}
MAXIMA = "    if (threadIdx.x % 32 == 0) {\n        warp_max[threadIdx.x / 32] = {x, y};\n    }\n"
QUANTIZE = {
    "V read before it is transposed": {"    __syncthreads();\n\n": "\n"},
    "the largest of a tile before all warps have theirs": {
        MAXIMA + "    __syncthreads();\n": MAXIMA,
    },
}
MUTATIONS = {
    (source, name): build.Mutation(source, replacements)
    for source, faults in (
        ("attn_fwd_sm90", FORWARD),
        ("attn_bwd_sm90", BACKWARD | TURNS_TAKEN),
        ("quantize", QUANTIZE),
    )
    for name, replacements in faults.items()
}


@pytest.mark.parametrize(("source", "name"), MUTATIONS)
def test_a_broken_kernel_is_noticed(source, name, emulated, on_cpu, monkeypatch):
    mutation = 1 + list(MUTATIONS).index((source, name))
    if name in TURNS_TAKEN:
        with suppress(RuntimeError):  # the emulator's own checks
            assert depends_on_schedule(emulated, TURNS, monkeypatch, mutation)
        return
    for seed in range(3, 9):  # a race need not be lost under every schedule
        try:
            found = errors(emulated, RING, seed, monkeypatch, mutation)
        except RuntimeError:
            return
        if any(not found[x] <= LIMITS[x] for x in LIMITS):
            return
    pytest.fail(f"not noticed under any schedule: {found}")
