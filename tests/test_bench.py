"""The bench without a GPU, on made-up contenders: cases, order of timing, counts, records, targets."""

import argparse
import contextlib
import dataclasses
import importlib.machinery
import json
import sys
import time
import types

import pytest
import torch
import torch.nn.functional as F

import bench_forward as bench
import common
import contenders
import fpsattention as fps
import shapes
from fpsattention import _C
from fpsattention.cli import timing
from records import make_record

TINY = shapes.Shape("tiny", (3, 5, 4), 2, (2, 2, 3), (None, (1, 3, 1)), head_dim=16, batch=2)
WINDOW = TINY.windows[1]


class FakeClock:
    """Runs each function on the CPU; a call takes `ms_of(its result, number of bursts)` milliseconds."""

    device = "cpu"

    def __init__(self, ms_of):
        self.ms_of, self.log = ms_of, []

    def burst(self, fn, calls):
        name = fn()
        self.log.append((name, calls))
        return [self.ms_of(name, len(self.log))] * calls

    def check(self, after):
        pass

    def copy(self):
        pass


class NoMonitor:
    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def between(self, start, end):
        return 1500.0, 600.0


def sdpa(q, k, v, mask=None):
    q, k, v = (x.transpose(1, 2).float() for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).to(torch.bfloat16).transpose(1, 2)


def contender(name, fn, window=None, tolerance=contenders.TOLERANCE_16_BIT, parts=None):
    return contenders.Contender(
        name,
        window,
        lambda q, k, v: lambda: fn(q, k, v),
        lambda out: out.transpose(1, 2),
        tolerance,
        parts=parts,
    )


def full_mask(shape, window):
    """bool [L, L] from tile coordinates alone: |key - centre| <= w // 2, with the centre clamped into the grid."""
    t, h, w = torch.meshgrid(*(torch.arange(n) for n in shape.grid), indexing="ij")
    mask = torch.ones(shape.tokens, shape.tokens, dtype=torch.bool)
    for x, tokens, n_tokens, wide in zip((t, h, w), shape.tile, shape.grid, window, strict=True):
        tile, n = x.reshape(-1) // tokens, -(-n_tokens // tokens)
        if wide < n:
            centre = tile.clamp(wide // 2, n - 1 - wide // 2)
            mask &= (tile[None, :] - centre[:, None]).abs() <= wide // 2
    return mask


def run_tiny(monkeypatch, cast, ms=None, shape=TINY):
    """bench_shape on the CPU: every call runs, and the clock says `ms[key]` (default 1) for a timed key."""
    ms = ms or {}

    def fake_time(entries, clock, rounds, burst_ms, seed):
        def timed(name):
            entries[name]()
            return timing.Timing(ms.get(name, 1.0), 0.0)

        return {name: timed(name) for name in entries}

    monkeypatch.setattr(bench, "time_interleaved", fake_time)
    clock = FakeClock(lambda name, i: 1.0)
    return bench.bench_shape(shape, cast, clock, NoMonitor(), 1, 1.0)


# --- cases


def test_every_shape_resolves_and_the_cases_with_a_target_are_there():
    names = [shape.name for shape in shapes.SHAPES]
    assert len(set(names)) == len(names)
    cases = {}
    for shape in shapes.SHAPES:
        for window in dict.fromkeys(shape.windows + shape.sweep):
            cases[shape.case(window)] = shape
            resolved = contenders.config_of(shape, window).resolve(shape.grid, shape.heads)
            assert resolved.tile == shape.tile and len(resolved.windows) == 1
        of_windows = shape.flex + shape.emulated + shape.graph + shape.families
        assert set(of_windows) <= set(shape.windows)
    assert cases[shapes.PAPER].grid == (36, 48, 48) and cases[shapes.PAPER].heads == 24
    assert cases[shapes.WAN_DENSE].grid == (21, 45, 80) and cases[shapes.WAN_DENSE].heads == 40
    assert cases[shapes.COG_DENSE].head_dim == 64 and cases[shapes.COG_DENSE].heads == 48
    assert cases["18x48x80/3,3,3"].tile == (6, 8, 8)
    assert {shapes.WAN_WINDOW, shapes.HUNYUAN_WINDOW, shapes.WAN_480P_WINDOW} <= set(cases)
    for name in (shapes.WAN_480P_WINDOW, "wan1.3b-480p-hnd/1,5,3"):
        assert (cases[name].grid, cases[name].tile) == ((21, 30, 52), (21, 3, 6))
    assert cases[shapes.WAN_480P_WINDOW].graph == ((1, 5, 3),)
    short = cases[shapes.SHORT_WINDOW]
    assert (short.tokens, short.heads) == (32_760, 12)
    assert bench.work_of(short, short.windows[0]).density == pytest.approx(0.06, abs=0.005)
    with_families = {(s.head_dim, w is None) for s in shapes.SHAPES for w in s.families}
    assert with_families == {(128, True), (128, False), (64, True)}
    assert {s.layout for s in shapes.SHAPES} == {"NHD", "HND"}


def test_select():
    full, quick = shapes.select([]), shapes.select([], quick=True)
    assert full == list(shapes.SHAPES) and {s.suite for s in quick if not s.host} == {"core"}
    targets = {shapes.PAPER, shapes.WAN_DENSE, shapes.WAN_WINDOW, shapes.COG_DENSE}
    targets |= {shapes.HUNYUAN_WINDOW, shapes.WAN_480P_WINDOW, shapes.SHORT_WINDOW}
    assert targets <= {s.case(w) for s in quick for w in s.windows}
    assert not any(s.sweep or s.flex or s.emulated for s in quick)
    (one,) = shapes.select(["wan14b-720p/dense"], heads_scale=0.25)
    assert one.windows == (None,) and one.heads == 10 and not one.sweep
    (swept,) = shapes.select(["36x48x48/3,3,1"])
    assert swept.windows == ((3, 3, 1),) and not swept.sweep
    lengths = shapes.select(["length"])
    assert {s.head_dim for s in lengths} == {64, 128}
    assert {s.tokens // 1024 for s in lengths} == {4, 8, 16, 32, 64, 128}
    host = shapes.select(["host"])
    assert [(s.name, s.grid, s.heads, s.tile) for s in host] == [
        (f"length-4k-d{d}", (8, 16, 32), 16, (2, 8, 8)) for d in (64, 128)
    ]
    families = shapes.select([shapes.FAMILIES])
    assert {s.name for s in families} == {"wan14b-720p", "cogvideox1.5-768p", "cogvideox-480p"}
    assert all(s.families and not (s.windows or s.sweep or s.mlp or s.host) for s in families)
    assert not any(any(s.text) or s.flex or s.graph or s.emulated for s in families)
    assert shapes.select([shapes.FAMILIES], heads_scale=0.5)[0].heads == 20
    assert not one.families  # a case is timed alone
    both = shapes.select([shapes.FAMILIES, shapes.WAN_DENSE])
    assert both[0].windows == (None,) and both[0].families == (None, (3, 3, 9))
    assert any(s.families for s in quick)
    assert [s for s in quick if s.host] == host and all(s.windows == (None,) for s in host)
    with pytest.raises(ValueError, match="wan15b"):
        shapes.select(["wan14b-720p", "wan15b"])


# --- counts


def test_paper_setting_counts():
    (shape,) = shapes.select([shapes.PAPER])
    work = bench.work_of(shape, (6, 6, 1))
    tokens = 36 * 48 * 48
    assert work.density == pytest.approx(1 / 6)
    assert work.pairs == work.computed_pairs == tokens**2 // 6  # no padding in this setting
    assert common.attention_flops(work.pairs, 24, 128, 1) == 4 * 128 * 24 * tokens**2 // 6
    assert (
        common.quantize_bytes(tokens=1000, heads=3, head_dim=64, batch=2, packed_bytes=7) == 6 * 384_000 + 7
    )


@pytest.mark.parametrize("head_dim", [64, 128])
def test_packed_bytes_are_those_of_the_packed_blocks(monkeypatch, head_dim):
    shape = dataclasses.replace(TINY, head_dim=head_dim)
    monkeypatch.setattr(contenders.ops, "launch_quantize", lambda call, *tensors: "packed")
    monkeypatch.setattr(contenders.ops, "launch_attend", lambda call, packed, *counts: packed)
    parts = contenders.ours(shape, WINDOW).parts(*bench.random_qkv(shape, "cpu"))
    rows = contenders.config_of(shape, WINDOW).resolve(shape.grid, shape.heads).geometry.n_rows
    of_head = rows // _C.QUERY_BLOCK * _C.q_block_bytes(head_dim) + rows // _C.BLOCK * _C.kv_block_bytes(
        head_dim
    )
    assert parts.packed_bytes == shape.batch * shape.heads * of_head
    assert parts.quantize() == parts.attend() == "packed"


def test_allowed_is_the_window_rule():
    rows = torch.arange(TINY.tokens)
    assert torch.equal(bench.work_of(TINY, WINDOW).allowed(rows), full_mask(TINY, WINDOW))
    assert bench.work_of(TINY, None).allowed(rows).all()
    assert bench.work_of(TINY, WINDOW).pairs == full_mask(TINY, WINDOW).sum()


# --- timing


def test_rounds_are_interleaved_and_medians_are_taken():
    ms = {"slow": 50.0, "fast": 1.0}
    clock = FakeClock(lambda name, i: ms[name] * (3 if i > 20 else 1))
    entries = {name: lambda name=name: name for name in ms}
    results = timing.time_interleaved(entries, clock, rounds=10, burst_ms=20.0)
    warm, timed = clock.log[:4], clock.log[4:]
    assert [name for name, _ in warm] == ["slow", "slow", "fast", "fast"]
    assert {calls for name, calls in timed if name == "fast"} == {20}  # 20 ms of a call of 1 ms
    assert {calls for name, calls in timed if name == "slow"} == {1}
    for i in range(0, len(timed), 2):
        assert {name for name, _ in timed[i : i + 2]} == {"slow", "fast"}
    assert len({name for name, _ in timed[::2]}) == 2  # neither always goes first
    assert results["fast"].ms == 1.0 and results["slow"].ms == 50.0  # 8 of 10 rounds were undisturbed
    assert results["fast"].spread == pytest.approx(2.0)


def test_a_contender_that_fails_is_reported_and_the_rest_is_timed():
    def broken():
        raise RuntimeError("no kernel image\nmore text")

    clock = FakeClock(lambda name, i: 2.0)
    results = timing.time_interleaved({"broken": broken, "good": lambda: "good"}, clock, 2, 1.0)
    assert results["broken"] == "RuntimeError: no kernel image"
    assert results["good"].ms == 2.0


def test_a_lost_device_ends_the_timing():
    class Lost(FakeClock):
        def check(self, after):
            raise timing.DeviceLost(after)

    def broken():
        raise RuntimeError("illegal memory access")

    with pytest.raises(timing.DeviceLost, match="broken"):
        timing.time_interleaved({"broken": broken}, Lost(None), 2, 1.0)


class FakeNvml(types.ModuleType):
    """A pynvml with one GPU, GPU-1; `lacks` names what it cannot read."""

    NVML_CLOCK_SM = 1

    class NVMLError(Exception):
        pass

    def __init__(self, *lacks):
        super().__init__("pynvml")
        self.lacks, self.polls = lacks, 0

    def _read(self, name, device, value):
        assert device == "the handle"
        if name in self.lacks:
            raise self.NVMLError("Not Supported")
        return value

    def nvmlInit(self):
        if "driver" in self.lacks:
            raise self.NVMLError("NVML Shared Library Not Found")

    def nvmlDeviceGetHandleByUUID(self, uuid):
        if uuid != "GPU-1":
            raise self.NVMLError("Not Found")
        return "the handle"

    def nvmlDeviceGetClockInfo(self, device, clock):
        assert clock == self.NVML_CLOCK_SM
        self.polls += 1
        return self._read("clock", device, 1500 + 100 * min(self.polls, 3))

    def nvmlDeviceGetPowerUsage(self, device):
        return self._read("power", device, 600_500)

    def nvmlSystemGetDriverVersion(self):
        return "580.1"

    def nvmlDeviceGetPowerManagementLimit(self, device):
        return self._read("limit", device, 700_000)

    def nvmlDeviceGetMaxClockInfo(self, device, clock):
        assert clock == self.NVML_CLOCK_SM
        return self._read("most", device, 1980)


def watch(monkeypatch, nvml, uuid="GPU-1", polls=0):
    """A monitor over `nvml`, entered and left, once it has read `polls` times."""
    monkeypatch.setattr(common, "pynvml", nvml)
    deadline = time.monotonic() + 10
    with common.GpuMonitor(uuid, interval_s=0.001) as monitor:
        while polls and nvml.polls < polls and time.monotonic() < deadline:
            time.sleep(0.001)
    return monitor


def test_monitor_takes_medians_of_the_interval(monkeypatch):
    nvml = FakeNvml()
    start = time.monotonic()
    monitor = watch(monkeypatch, nvml, polls=7)
    end, polls = time.monotonic(), nvml.polls
    assert polls >= 7 and monitor.between(start, end) == (
        1800,
        600.5,
    )  # MHz, W; the first two clocks are lower
    assert monitor.between(start - 2, start) == monitor.between(end, end + 2) == (None, None)
    time.sleep(0.02)
    assert nvml.polls == polls  # no longer watching


@pytest.mark.parametrize(
    ("nvml", "uuid", "said"),
    [
        (None, "GPU-1", "no clocks and no power: nvidia-ml-py is not installed (pip install nvidia-ml-py)"),
        (FakeNvml("driver"), "GPU-1", "no clocks and no power: NVML Shared Library Not Found"),
        (FakeNvml(), "GPU-2", "no clocks and no power: Not Found"),
    ],
)
def test_monitor_says_why_it_has_no_readings(monkeypatch, capsys, nvml, uuid, said):
    assert watch(monkeypatch, nvml, uuid).between(0, float("inf")) == (None, None)
    assert capsys.readouterr().err == f"{said}\n"


@pytest.mark.parametrize("lacks", ["clock", "power"])
def test_monitor_goes_on_without_a_reading(monkeypatch, lacks):
    nvml = FakeNvml(lacks)
    assert watch(monkeypatch, nvml, polls=3).between(0, float("inf")) == (None, None)
    assert nvml.polls >= 3


@pytest.mark.parametrize(
    ("nvml", "found"),
    [
        (FakeNvml(), ["580.1", 700.0, 1980]),
        (FakeNvml("limit"), ["580.1", None, 1980]),
        (FakeNvml("most"), ["580.1", 700.0, None]),
        (None, [None] * 3),
    ],
)
def test_conditions(monkeypatch, nvml, found):
    properties = types.SimpleNamespace(name="NVIDIA H100", multi_processor_count=132, uuid="1")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(common, "pynvml", nvml)
    meta = common.conditions()
    assert [meta[name] for name in ("driver", "power_limit_w", "max_sm_clock_mhz")] == found
    assert (meta["gpu"], meta["sms"]) == ("NVIDIA H100", 132)


def test_largest_gap_is_taken_within_replays():
    one = [(0.0, 10.0), (12.0, 20.0), (25.0, 40.0)]
    later = [(start + 1000, end + 1000) for start, end in one]
    assert common.largest_gap(one, 1) == 5
    assert common.largest_gap(later[::-1] + one, 2) == 5  # in any order; 960 lie between the replays
    assert common.largest_gap([*one, *later, (2000.0, 2001.0), (2008.0, 2009.0), (2009.0, 2010.0)], 3) == 7
    assert common.largest_gap([(0.0, 1.0), (9.0, 10.0), (100.0, 101.0), (103.0, 104.0)], 2, skipped=1) == 2


def test_largest_gap_of_overlapping_events_is_when_nothing_runs():
    assert common.largest_gap([(0.0, 30.0), (1.0, 5.0), (20.0, 25.0), (33.0, 34.0)], 1) == 3
    assert common.largest_gap([(0.0, 10.0), (9.0, 12.0)], 1) == 0
    assert common.largest_gap([(0.0, 10.0), (50.0, 60.0)], 2) == 0  # one event in each replay


@pytest.mark.parametrize("events", [[], [(0.0, 1.0)] * 3])
def test_lost_events_are_noticed(events):
    with pytest.raises(ValueError, match=f"{len(events)} device events of 2 replays"):
        common.largest_gap(events, 2)


def test_graph_gap_counts_device_events_of_the_replays_only(monkeypatch):
    log, device = [], torch.profiler.DeviceType

    class Graph:
        def replay(self):
            log.append("replay")

    class Profile(contextlib.nullcontext):
        def __init__(self, activities):
            super().__init__(self)
            assert activities == [torch.profiler.ProfilerActivity.CUDA]
            log.clear()

        def events(self):
            def event(kind, start, end):
                return types.SimpleNamespace(
                    device_type=kind, time_range=types.SimpleNamespace(start=start, end=end)
                )

            for i in range(log.count("replay")):
                yield event(device.CPU, 100 * i, 100 * i + 50)  # the launch
                yield event(device.CUDA, 100 * i + 10, 100 * i + 20)
                yield event(
                    device.CUDA, 100 * i + (24 if i else 50), 100 * i + 90
                )  # the first waits for the host

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.profiler, "profile", Profile)
    calls = []
    assert common.graph_gap_us(lambda: calls.append(1)) == 4
    assert len(calls) == 2 and log == ["replay"] * (1 + common.GRAPH_REPLAYS)  # warm-up and capture


# --- a whole shape


def test_bench_shape_fills_records(monkeypatch):
    mask, packed_bytes = full_mask(TINY, WINDOW), 1000

    def windowed(q, k, v):
        return sdpa(q, k, v, mask)

    parts = contenders.Parts(lambda: None, lambda: None, packed_bytes)
    cast = [
        *(contender(name, sdpa) for name in common.TORCH_DENSE),
        contender(common.OURS, windowed, WINDOW, parts=lambda q, k, v: parts),
    ]
    ms = {
        "tiny/dense sdpa-cudnn": 8.0,
        "tiny/dense sdpa-flash": 6.0,
        "tiny/1,3,1 fpsattention": 2.0,
        "tiny/1,3,1 fpsattention attend": 1.5,
        "quantize": 0.5,
        "copy": 2.0,
    }
    cudnn, flash, ours = run_tiny(monkeypatch, cast, ms)
    assert not any(r.error for r in (cudnn, flash, ours))
    assert 0 < ours.rel_rms < 0.01 and ours.density == pytest.approx(mask.float().mean().item())
    assert (ours.ms, ours.attn_ms, ours.quant_ms) == (2.0, 1.5, 0.5)
    flops = 4 * TINY.head_dim * TINY.heads * TINY.batch * int(mask.sum())
    assert ours.tflops == pytest.approx(flops / 1.5e-3 / 1e12)
    assert ours.tflops_total == pytest.approx(flops / 2e-3 / 1e12)
    assert ours.tflops_computed > ours.tflops
    assert (ours.baseline, ours.baseline_ms, ours.speedup) == (common.CUDNN, 8.0, 4.0)
    assert (ours.fastest_torch, ours.speedup_fastest_torch) == (common.FLASH, 3.0)
    assert cudnn.speedup == 1.0 and cudnn.tflops is None
    elements = TINY.tokens * TINY.heads * TINY.head_dim * TINY.batch
    assert ours.quant_bytes == 3 * 2 * elements + packed_bytes
    assert ours.quant_gbps == pytest.approx(ours.quant_bytes / 0.5e-3 / 1e9)
    assert ours.copy_gbps == pytest.approx(2 * common.COPY_BYTES / 2e-3 / 1e9)
    assert ours.sm_clock_mhz == 1500.0
    assert ours.attn_hbm_bytes == packed_bytes + 2 * elements + 4 * elements // TINY.head_dim


def crash(q, k, v):
    raise RuntimeError("no kernel image")


def test_wrong_answers_are_named_and_never_compared(monkeypatch):
    cast = [
        contender(common.CUDNN, sdpa),
        contender("zeros", lambda q, k, v: torch.zeros_like(q)),
        contender("nan", lambda q, k, v: torch.full_like(q, float("nan"))),
        contender("crash", crash),
        contender("dense instead", sdpa, WINDOW),
    ]
    good, *bad = run_tiny(monkeypatch, cast)
    assert good.speedup == 1.0 and not good.error
    assert all(r.speedup is None and r.error for r in bad)
    assert bad[0].rel_rms == 1.0 and "not finite" in bad[1].error and "no kernel image" in bad[2].error
    assert bad[2].ms is None and bad[3].rel_rms > 0.1
    text = common.table([good, *bad])
    assert all(f"{r.op}: {r.error}" in text for r in bad)


def test_an_answer_left_in_memory_by_another_contender_is_wrong(monkeypatch):
    kept = {}

    def honest(q, k, v):
        kept.setdefault("out", sdpa(q, k, v))
        return sdpa(q, k, v)

    cast = [contender(common.CUDNN, honest), contender("thief", lambda q, k, v: kept["out"])]
    good, thief = run_tiny(monkeypatch, cast)
    assert not good.error and thief.rel_rms > 1


def test_own_kernel_on_cpu_tensors_is_a_record_with_an_error(monkeypatch):
    (record,) = run_tiny(monkeypatch, [contenders.ours(TINY, WINDOW)])
    assert record.error and record.ms is None and record.op == common.OURS


def test_own_kernel_is_held_against_the_emulation(monkeypatch):
    shape = dataclasses.replace(TINY, emulated=(WINDOW,))
    config = contenders.config_of(shape, WINDOW)

    def emulated(q, k, v):
        return fps.attention(q, k, v, grid=shape.grid, config=config, backend="reference")

    (record,) = run_tiny(monkeypatch, [contender(common.OURS, emulated, WINDOW, 0.1)], shape=shape)
    assert record.rms_to_emulation == 0 and record.error_over_emulation == 1 and not record.error
    assert 0.01 < record.emulation_rel_rms < 0.1  # of one head; rel_rms is of all
    assert record.rel_rms == pytest.approx(record.emulation_rel_rms, rel=0.5)


@pytest.mark.filterwarnings("ignore:fpsattention runs its reference")
@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_torch_contenders_answer_in_their_layout(monkeypatch, layout):
    shape = dataclasses.replace(TINY, layout=layout)
    flash = contenders.torch_dense(shape)[1]
    records = run_tiny(monkeypatch, [flash, contenders.flex(shape, WINDOW)], shape=shape)
    assert [r.op for r in records] == [common.FLASH, common.FLEX]
    assert all(r.rel_rms < 0.01 and not r.error for r in records)


def fake_peers(monkeypatch):
    """Modules with the peers' names and signatures over plain attention."""

    def flash_attn_func(q, k, v, q_descale=None, k_descale=None, v_descale=None):
        def value(x, descale):
            return x if descale is None else (x.float() * descale[:, None, :, None]).to(torch.bfloat16)

        pairs = zip((q, k, v), (q_descale, k_descale, v_descale), strict=True)
        return sdpa(*(value(x, descale) for x, descale in pairs)), None

    def sageattn(q, k, v, tensor_layout, is_causal):
        assert not is_causal
        out = sdpa(*(contenders.as_nhd(x, tensor_layout) for x in (q, k, v)))
        return contenders.as_nhd(out, tensor_layout)

    def single_prefill_with_kv_cache(q, k, v, causal, kv_layout, backend):
        assert (causal, kv_layout) == (False, "NHD")
        return sdpa(q[None], k[None], v[None])[0]

    def sliding_tile_attention(q, k, v, windows, text_length, has_text, seq_shape):
        assert (windows, text_length, has_text) == ([[1, 2, 2]] * q.shape[1], 0, False)
        assert seq_shape == "4x8x16" and q.is_contiguous()
        return sdpa(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

    for module, function in (
        ("flash_attn_interface", flash_attn_func),
        ("sageattention", sageattn),
        ("flashinfer", single_prefill_with_kv_cache),
        ("st_attn", sliding_tile_attention),
    ):
        fake = types.ModuleType(module)
        fake.__spec__ = importlib.machinery.ModuleSpec(module, None)
        setattr(fake, function.__name__, function)
        monkeypatch.setitem(sys.modules, module, fake)
    monkeypatch.delitem(contenders._DENSE_PEERS, "cudnn")  # in test_bench_cudnn_fp8.py
    monkeypatch.setattr(contenders, "FASTVIDEO_TILE", (4, 4, 8))
    monkeypatch.setattr(contenders, "FASTVIDEO_GRIDS", ((4, 8, 16),))


@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_peers_are_found_and_their_adapters_fit(monkeypatch, layout):
    fake_peers(monkeypatch)
    shape = shapes.Shape("peers", (4, 8, 16), 2, (4, 4, 8), (None, (1, 2, 2)), head_dim=16, layout=layout)
    found, failures = contenders.peers(shape)
    assert not failures and {"flash_attn_interface", "st_attn"} <= set(contenders.installed_peers())
    records = run_tiny(monkeypatch, found, shape=shape)
    ops = ["fa3-bf16", "fa3-fp8", "sageattention", "flashinfer-bf16", "fastvideo-sta"]
    assert [r.op for r in records] == ops
    assert all(not r.error for r in records)
    assert 0.01 < records[1].rel_rms < 0.1  # it rounds to FP8


def test_a_peer_that_cannot_be_set_up_is_reported(monkeypatch):
    fake_peers(monkeypatch)
    del sys.modules["sageattention"].sageattn
    _, failures = contenders.peers(TINY)  # of batch 2
    assert [f.split(":")[0] for f in failures] == ["sageattention", "flashinfer"]


def run_all(monkeypatch, path, cast_of, clock):
    monkeypatch.setattr(bench, "BenchClock", lambda: clock)
    monkeypatch.setattr(bench, "GpuMonitor", lambda device: NoMonitor())
    monkeypatch.setattr(bench, "gpu_uuid", lambda: "GPU-none")
    monkeypatch.setattr(bench, "conditions", lambda: {"gpu": "made up"})
    monkeypatch.setattr(bench, "contenders_of", lambda shape: (cast_of(shape), ["peer: broken"]))
    options = argparse.Namespace(quick=True, heads_scale=1.0)
    other = dataclasses.replace(TINY, name="other", flex=(WINDOW,))
    return bench.run([TINY, other], options, path)


def test_run_measures_saves_and_judges(monkeypatch, tmp_path):
    path = tmp_path / "r.json"
    clock = FakeClock(lambda result, i: 0.25)
    results = run_all(monkeypatch, path, lambda shape: [contender(common.CUDNN, sdpa)], clock)
    saved = common.Results.load(path)
    assert [r.case for r in saved.records] == ["tiny/dense", "other/dense"]
    assert saved.records[0].ms == results.records[0].ms == 0.25 and saved.records[0].power_w == 600.0
    assert saved.meta["sm_clock_mhz"] == 1500.0 and saved.meta["peer_failures"] == ["peer: broken"] * 2
    assert len(saved.targets) == len(bench.TARGETS)


def test_graph_gaps_are_filled_in_or_noted(monkeypatch):
    shape = dataclasses.replace(TINY, graph=(WINDOW,))
    records = [make_record("tiny/dense"), make_record("tiny/1,3,1"), make_record("tiny/1,3,1", common.FLEX)]
    records[1].note = "noted before"
    bench.measure_graph_gaps([shape], records, "cpu")  # where no graph can be captured
    assert records[1].graph_gap_us is None and not records[1].error
    assert records[1].note.startswith("noted before; gaps not measured: RuntimeError: ")
    monkeypatch.setattr(bench, "graph_gap_us", lambda call: 4.5)
    bench.measure_graph_gaps([shape, TINY], records, "cpu")
    assert [r.graph_gap_us for r in records] == [None, 4.5, None]


def test_run_measures_graph_gaps_after_all_timing(monkeypatch, tmp_path):
    path = tmp_path / "r.json"
    bench_shape = bench.bench_shape
    log = []

    def logged(shape, *rest):
        log.append(shape.name)
        return bench_shape(shape, *rest)

    def gaps(shapes, records, device):
        log.append([s.name for s in shapes])
        records[0].graph_gap_us = 4.5

    monkeypatch.setattr(bench, "bench_shape", logged)
    monkeypatch.setattr(bench, "measure_graph_gaps", gaps)
    clock = FakeClock(lambda result, i: 0.25)
    run_all(monkeypatch, path, lambda shape: [contender(common.CUDNN, sdpa)], clock)
    assert log == ["tiny", "other", ["tiny", "other"]]
    assert common.Results.load(path).records[0].graph_gap_us == 4.5


def test_run_keeps_what_it_has_when_the_device_is_lost(monkeypatch, tmp_path):
    class Lost(FakeClock):
        def check(self, after):
            raise timing.DeviceLost(f"after {after}")

    def cast_of(shape):
        return [contender(common.CUDNN, sdpa if shape is TINY else crash)]

    path = tmp_path / "r.json"
    run_all(monkeypatch, path, cast_of, Lost(lambda result, i: 1.0))
    saved = common.Results.load(path)
    assert [r.case for r in saved.records] == ["tiny/dense"]
    assert saved.meta["device_lost"] == "other: after other/dense sdpa-cudnn"


# --- records, targets, words


def test_results_survive_the_file(tmp_path):
    results = common.Results({"gpu": "made up"}, [make_record(rel_rms=0.123456789)], [{"met": None}])
    path = tmp_path / "new" / "r.json"
    results.save(path)
    loaded = common.Results.load(path)
    assert loaded.meta == results.meta and loaded.targets == results.targets
    assert loaded.records[0].rel_rms == 0.123457 and loaded.records[0].ms == 10.0


def test_the_file_holds_families_apart(tmp_path):
    family = make_record("36x48x48/6,6,1 sink inputs", ms=None, attn_ms=9.0, family="sink")
    path = tmp_path / "r.json"
    common.Results({"gpu": "made up"}, [family, make_record()]).save(path)
    data = json.loads(path.read_text())
    assert [len(data[x]) for x in ("records", "families")] == [1, 1] and data["records"][0]["ms"] == 10.0
    assert [r.family for r in common.Results.load(path).records] == ["", "sink"]


def judged(records):
    return [t.judge(records)["met"] for t in bench.TARGETS]


def test_targets():
    cudnn = dict(baseline=common.CUDNN, baseline_ms=200.0)
    dense = dict(window=None, density=1.0, quant_gbps=2700.0, copy_gbps=3000.0) | cudnn
    wan = make_record(shapes.WAN_DENSE, attn_ms=80.0, speedup=2.3, tflops=1100.0, **dense)
    cudnn_fp8 = make_record(shapes.WAN_DENSE, common.CUDNN_FP8, ms=130.0, **dense)
    families = [
        make_record(f"{case} {name} inputs", attn_ms=80.0, family=name, over_gaussian=ratio, tflops=tflops)
        for case, name, ratio, tflops in (
            (shapes.WAN_DENSE, "gaussian", 1.0, 1000.0),
            (shapes.WAN_DENSE, "peaked", 1.04, 1040.0),
            (shapes.WAN_WINDOW, "sink", 0.96, 921.6),
            (shapes.WAN_WINDOW, "gaussian", 1.0, 960.0),
        )
    ]
    slow = make_record(f"{shapes.WAN_WINDOW} sink backward inputs", family="sink", over_gaussian=0.97)
    short = make_record(shapes.SHORT_WINDOW, speedup=20.5, **cudnn)
    cog = make_record(shapes.COG_DENSE, speedup=2.11, **dense)
    hunyuan = make_record(shapes.HUNYUAN_WINDOW, speedup=10.1, **cudnn)
    small = make_record(shapes.WAN_480P_WINDOW, graph_gap_us=4.0, **cudnn)
    errors = dict(error_over_emulation=1.0, rms_to_emulation=1e-3)
    paper = make_record(shapes.PAPER, speedup=11.6, **errors, **cudnn)
    backward = make_record(shapes.BACKWARD_DENSE, speedup=1.41, tflops_total=700.0, **cudnn)
    windowed_backward = make_record(shapes.BACKWARD_WINDOW, tflops_total=640.0, **cudnn)
    backward.ms = windowed_backward.ms = 100.0
    deterministic = [
        make_record(case, common.OURS_DETERMINISTIC, ms=ms, **cudnn)
        for case, ms in ((shapes.BACKWARD_DENSE, 104.0), (shapes.BACKWARD_WINDOW, 114.0))
    ]
    others = [
        make_record(case, speedup=speedup, **cudnn)
        for case, speedup in (
            (shapes.BACKWARD_16K, 1.42),
            (shapes.BACKWARD_COG, 1.46),
            (shapes.TRAINING_WINDOW, 11.1),
            (shapes.STEP_WINDOW, 3.7),
        )
    ]
    text = make_record("hunyuan-720p/3,3,3 with text", text_cost=0.01)
    host = [
        make_record(f"length-4k-d{d} host", host_ratio=4.0 + d / 128, total_ratio=1.05) for d in (64, 128)
    ]
    records = [paper, wan, cudnn_fp8, *families, short, cog, hunyuan, small]
    records += [backward, windowed_backward, *deterministic, slow, *others, text, *host]
    assert judged(records) == [True] * 25
    assert judged([]) == [None] * 25
    values = [t.value(records) for t in bench.TARGETS[:7]]
    assert values == [2.5, 2.3, 1.625, 11.6, 0.96, 0.96, 20.5]

    wan.attn_ms, wan.speedup, paper.speedup, families[3].tflops = 90.0, 2.1, 11.4, 940.0
    families[2].over_gaussian, short.speedup = 0.94, 19.9
    hunyuan.speedup, cog.baseline, wan.quant_gbps, small.graph_gap_us = 9.9, common.FLASH, 2600.0, 11.0
    backward.speedup, windowed_backward.tflops_total = 1.39, 620.0
    deterministic[1].ms, slow.over_gaussian = 116.0, 0.94
    for other in others:
        other.speedup -= 0.2
    text.text_cost, host[0].host_ratio, host[1].total_ratio = 0.03, 5.1, 1.11
    assert judged(records) == [False] * 8 + [None] + [False] * 13 + [True] * 3
    paper.error_over_emulation, paper.rms_to_emulation = 1.2, 2.1e-2
    wan.fail("relative RMS error")
    families[2].fail("relative RMS error")
    assert judged(records) == [None] * 3 + [False, False, True, False, False, None, None] + [False] * 15
    for family in families:
        family.fail("relative RMS error")
    cudnn_fp8.fail("no plan")
    assert judged(records)[4:6] == [None, None] and judged([cudnn_fp8]) == [None] * 25


def test_table_and_target_lines_fit():
    long = make_record("wan1.3b-480p-hnd/1,5,9", "flashinfer-bf16", 1234.5678, spread=0.123, rel_rms=1e-3)
    long.attn_ms, long.quant_ms, long.tflops, long.speedup = 1000.0, 999.9, 1234.0, 123.45
    wrong = make_record(ms=None)
    wrong.fail("bad")
    host = make_record("length-4k-d128 host", ms=None, host_us=80.04, total_us=200.06)
    sink = make_record("wan14b-720p/3,3,9 sink inputs", ms=None, attn_ms=11.25, tflops=1234.0, rel_rms=0.07)
    sink.family, sink.over_gaussian, sink.spread = "sink", 0.9876, 0.012
    back = dataclasses.replace(
        sink, case="wan14b-720p/3,3,9 sink backward inputs", attn_ms=None, ms=60.5, rel_rms=None
    )
    lines = common.table([long, sink, back, wrong, host]).splitlines()
    title, row = (lines.index(next(x for x in lines if x.startswith(s))) for s in ("kernel, or", "wan14b"))
    assert row == title + 1 > 3
    assert lines[row].split() == ["wan14b-720p/3,3,9", "sink", "11.250", "1234", "0.988", "7.0e-02", "1.2%"]
    assert lines[row + 1].split()[:4] == ["wan14b-720p/3,3,9", "backward", "sink", "60.500"]
    assert "kernel, or" not in common.table([long])
    assert "length-4k-d128 host fpsattention: 80.0 us until the call returns, 200.1 us in all" in lines
    assert max(map(len, lines)) <= 110
    assert "wan1.3b-480p-hnd/1,5,9 " in lines[1] and "1234.568" in lines[1] and "123.45" in lines[1]
    text = common.target_lines([t.judge([]) for t in bench.TARGETS])
    assert text.count("not measured") == len(bench.TARGETS) and max(map(len, text.splitlines())) <= 110


def test_gpu_slug():
    assert common.gpu_slug("NVIDIA H100 80GB HBM3") == "h100"
    assert common.gpu_slug("NVIDIA GeForce RTX 4090") == "nvidia-geforce-rtx-4090"


def test_main_without_gpu_measures_nothing(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    output = tmp_path / "r.json"
    assert bench.main(["--quick", "--output", str(output)]) == 2
    assert bench.main(["--case", "nothing"]) == 2
    said = capsys.readouterr().err
    assert "torch finds no GPU" in said and "nothing" in said and not output.exists()
