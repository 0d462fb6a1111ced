"""cuDNN's FP8 attention as a contender, without a GPU: a stand-in for the module `cudnn` that computes in torch."""

import importlib.machinery
import sys
import types
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F

import bench_backward
import bench_forward
import common
import contenders
from test_bench import TINY, FakeClock, contender, run_tiny, sdpa

REASON = "cuDNN 9 has no engine for this\nmore text"
ONE = [1, 1, 1, 1]
GRADIENTS = ("dQ", "dK", "dV")


class Tensor:
    """A tensor of a graph: its attributes, by the setters that cuDNN has."""

    def __init__(self, name, dim=None, stride=None, data_type=None):
        self.name, self.dim, self.stride, self.data_type, self.output = name, dim, stride, data_type, False

    def set_output(self, output):
        self.output = output
        return self

    def set_dim(self, dim):
        self.dim = dim
        return self

    def set_stride(self, stride):
        self.stride = stride
        return self

    def set_data_type(self, data_type):
        self.data_type = data_type
        return self


@dataclass
class Cudnn:
    """What the stand-in does, and what was asked of it.

    Attributes:
        plans: milliseconds of each plan; None for one that cannot be built.
        refused: the step of the graph that raises.
        spoil: whether no output is written.
    """

    plans: tuple = (None, 3.0, 1.0, 2.0)
    refused: str = ""
    spoil: bool = False
    built: int = 0
    last_plan: int | None = None


def rounded(x, data, name):
    """x through E4M3, with the graph's scales of `name`."""
    return (x * data[f"scale_{name}"]).to(torch.float8_e4m3fn).float() * data[f"descale_{name}"]


def scores(data, scale):
    """(scores, q, k, v) in fp32."""
    q, k, v = (data[name].float() * data[f"descale_{name}"] for name in "qkv")
    return q @ k.mT * scale, q, k, v


def attend(data, scale):
    s, _, _, v = scores(data, scale)
    out = rounded(s.softmax(-1), data, "s") @ v
    data["amax_o"].fill_(out.abs().max())
    data["o"].copy_((out * data["scale_o"]).to(torch.float8_e4m3fn))
    if "stats" in data:
        data["stats"].copy_(s.logsumexp(-1, keepdim=True))


def differentiate(data, scale):
    s, q, k, v = scores(data, scale)
    o, dout = (data[name].float() * data[f"descale_{name}"] for name in ("o", "dO"))
    p = (s - data["stats"]).exp()
    dp = p * (dout @ v.mT - (o * dout).sum(-1, keepdim=True))
    data["amax_dP"].fill_(dp.abs().max())
    dp, p = rounded(dp, data, "dP"), rounded(p, data, "s")
    for name, x in zip(GRADIENTS, (dp @ k * scale, dp.mT @ q * scale, p.mT @ dout), strict=True):
        data[f"amax_{name}"].fill_(x.abs().max())
        data[name].copy_((x * data[f"scale_{name}"]).to(torch.float8_e4m3fn))


def stand_in(state):
    """A module `cudnn`."""

    class Graph:
        def __init__(self, io_data_type, intermediate_data_type, compute_data_type, handle):
            assert (io_data_type, intermediate_data_type, compute_data_type) == ("e4m3", "fp32", "fp32")
            assert handle == "handle"
            self.steps = []
            state.built += 1

        def __getattr__(self, step):
            assert step in ("validate", "build_operation_graph", "create_execution_plans", "check_support")

            def take(*args):
                assert bool(args) == (step == "create_execution_plans")
                self.steps.append(step)
                if step == state.refused:
                    raise ValueError(REASON)

            return take

        def tensor(self, name, dim, stride, data_type):
            return Tensor(name, dim, stride, data_type)

        def sdpa_fp8(self, q, k, v, attn_scale, generate_stats, name, **scalars):
            self.scale, self.differentiates = attn_scale, False
            self.check(scalars)
            return (
                Tensor("o"),
                Tensor("stats") if generate_stats else None,
                Tensor("amax_s"),
                Tensor("amax_o"),
            )

        def sdpa_fp8_backward(self, q, k, v, o, dO, stats, attn_scale, name, **scalars):
            self.scale, self.differentiates = attn_scale, True
            self.check(scalars)
            largest = (Tensor(f"amax_{name}") for name in (*GRADIENTS, "dP"))
            return *(Tensor(name) for name in GRADIENTS), *largest

        @staticmethod
        def check(scalars):
            assert all((s.dim, s.stride) == (ONE, ONE) for s in scalars.values())
            assert all(name == x.name and x.data_type == "fp32" for name, x in scalars.items())

        def get_execution_plan_count(self):
            assert self.steps[-1] == "check_support" and len(self.steps) == 4
            return len(state.plans)

        def build_plan_at_index(self, index):
            if state.plans[index] is None:
                raise RuntimeError(REASON)

        def get_workspace_size_plan_at_index(self, index):
            return 16 * index

        def execute_plan_at_index(self, pack, workspace, index, handle):
            assert handle == "handle" and workspace.numel() == 16 * index
            state.last_plan = index
            data = {x.name: value for x, value in pack.items()}
            for x, value in pack.items():
                assert list(value.shape) == list(x.dim) and list(value.stride()) == list(x.stride)
                assert value.dtype == {"e4m3": torch.float8_e4m3fn, "fp32": torch.float32}[x.data_type]
                made = (*GRADIENTS, "amax_") if self.differentiates else ("o", "stats", "amax_")
                assert x.output == x.name.startswith(made)
            if state.spoil:
                return
            (differentiate if self.differentiates else attend)(data, self.scale)

    module = types.ModuleType("cudnn")
    module.__spec__ = importlib.machinery.ModuleSpec("cudnn", None)
    module.__version__ = "1.32"
    module.backend_version_string = lambda: "9.19"
    module.pygraph = Graph
    module.data_type = types.SimpleNamespace(FP8_E4M3="e4m3", FLOAT="fp32")
    module.heur_mode = types.SimpleNamespace(A="A", FALLBACK="fallback")
    return module


@pytest.fixture
def cudnn(monkeypatch):
    """The stand-in, installed; the bench's module is imported anew, over it alone."""
    state = Cudnn()
    monkeypatch.setitem(sys.modules, "cudnn", stand_in(state))
    monkeypatch.delitem(sys.modules, "cudnn_fp8", raising=False)
    import cudnn_fp8

    def milliseconds(call):
        call()
        return state.plans[state.last_plan]

    monkeypatch.setattr(cudnn_fp8, "_handle", lambda: "handle")
    monkeypatch.setattr(cudnn_fp8, "_milliseconds", milliseconds)
    yield state
    sys.modules.pop("cudnn_fp8", None)


def fp8_of(shape):
    found, failures = contenders.peers(shape)
    assert not failures
    (fp8,) = (c for c in found if c.name == common.CUDNN_FP8)
    return fp8


@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_it_attends_with_its_fastest_plan(monkeypatch, cudnn, layout):
    shape = replace(TINY, layout=layout)
    assert "cudnn" in contenders.installed_peers()
    (record,) = run_tiny(monkeypatch, [fp8_of(shape)], shape=shape)
    assert not record.error and 0.01 < record.rel_rms < 0.1
    assert (record.case, record.window, record.ms) == ("tiny/dense", None, 1.0)
    assert cudnn.last_plan == 2 and cudnn.built == 1  # one graph for the check and the timing
    said = ("cudnn-frontend 1.32, cuDNN 9.19", "E4M3 output", "quantisation not timed")
    assert all(text in record.note for text in said)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (dict(refused="validate"), "ValueError: cuDNN 9 has no engine for this"),
        (dict(refused="check_support"), "ValueError: cuDNN 9 has no engine for this"),
        (
            dict(plans=(None, None)),
            "RuntimeError: cuDNN has no FP8 plan that runs: plan 0: RuntimeError: cuDNN 9 has no engine for this; "
            "plan 1: RuntimeError: cuDNN 9 has no engine for this",
        ),
        (dict(plans=()), "RuntimeError: cuDNN has no FP8 plan that runs: it offers none"),
        (dict(spoil=True), "RuntimeError: cuDNN's run says that the largest o is 0.0"),
    ],
)
def test_without_a_graph_that_runs_the_reason_is_shown_and_the_rest_is_timed(
    monkeypatch, cudnn, changes, reason
):
    vars(cudnn).update(changes)
    good, fp8 = run_tiny(monkeypatch, [contender(common.CUDNN, sdpa), fp8_of(TINY)])
    assert good.ms == 1.0 and not good.error
    assert fp8.ms is None and fp8.error == reason
    assert f"! tiny/dense cudnn-fp8: {reason}" in common.table([good, fp8])


@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_it_differentiates(monkeypatch, cudnn, layout):
    """Gradients near those of SDPA, with scales from runs of its own."""
    shape = replace(TINY, layout=layout, training=(None,))

    def bf16(*qkv):
        return lambda: F.scaled_dot_product_attention(*(contenders.as_hnd(x, layout) for x in qkv))

    both = [replace(contenders.cudnn(shape), prepare=bf16), fp8_of(shape)]
    monkeypatch.setattr(bench_backward, "contenders_of", lambda _: both)
    qkv = bench_forward.random_qkv(shape, "cpu")
    monitor = common.GpuMonitor("none")
    records = bench_backward.bench_training(
        shape, qkv, bench_forward.work_of, FakeClock(lambda *_: 1.0), monitor, 2, 1e-3, 0
    )
    of_fp8 = [r for r in records if r.op == common.CUDNN_FP8]
    assert [r.case for r in of_fp8] == ["tiny/dense backward", "tiny/dense training"]
    for r in of_fp8:
        assert not r.error and r.ms == 1.0 and 0.02 < r.rel_rms < 0.12


def test_without_libcudnn_it_is_named_among_the_peers_that_failed(monkeypatch, cudnn):
    def missing():
        raise RuntimeError("Unable to find symbol cudnnGetVersion")

    monkeypatch.setattr(sys.modules["cudnn"], "backend_version_string", missing)
    del sys.modules["cudnn_fp8"]
    found, failures = contenders.peers(TINY)
    assert not any(c.name == common.CUDNN_FP8 for c in found)
    assert failures == ["cudnn: RuntimeError: Unable to find symbol cudnnGetVersion"]


def test_e4m3_values_and_scale():
    x = torch.tensor([[1.0, -7.0], [0.5, 3.5]]).T
    values, scale = common.to_e4m3(x)
    assert values.dtype == torch.float8_e4m3fn and values.stride() == x.stride()
    assert scale == 7 / 448 and torch.equal(values.float() * scale, x)
