"""Dense FP8 attention of cuDNN, forward and backward, through its graphs (PyPI: nvidia-cudnn-frontend).

E4M3 in and out, one scale a tensor: on Hopper cuDNN writes the output of its FP8 attention, and its gradients, in E4M3
only. Quantisation is not part of the graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial

import cudnn
import torch

from common import to_e4m3
from fpsattention.cli.timing import first_line
from fpsattention.core.reference import E4M3_MAX

VERSION = f"cudnn-frontend {cudnn.__version__}, cuDNN {cudnn.backend_version_string()}"
# Factor on the forward's probabilities before they are rounded to E4M3: the largest of a row is 1.
SCALE_S = 64.0
SCALAR = [1, 1, 1, 1]  # shape and strides

Data = dict[str, torch.Tensor]
"""The tensors of a graph, by name."""


@lru_cache(maxsize=1)
def _handle():
    """cuDNN's handle, on the stream that is current at the first call."""
    handle = cudnn.create_handle()
    cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream().cuda_stream)
    return handle


def _milliseconds(call: Callable[[], object]) -> float:
    """Least GPU time of three calls after a first one."""
    call()
    times = []
    for _ in range(3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return min(times)


class Graph:
    """One FP8 operation of cuDNN on Q, K and V of one shape, and the fastest of its plans once `choose` has run.

    Args:
        shape, strides: of Q, K, V and all that is like them, [B, H, L, D].

    A constructor adds inputs, the operation and its outputs, then calls `build`, which raises what cuDNN raises for a
    graph that it does not support.
    """

    def __init__(self, shape: Sequence[int], strides: Sequence[int]):
        self.shape, self.strides = list(shape), list(strides)
        self.graph = cudnn.pygraph(
            io_data_type=cudnn.data_type.FP8_E4M3,
            intermediate_data_type=cudnn.data_type.FLOAT,
            compute_data_type=cudnn.data_type.FLOAT,
            handle=_handle(),
        )
        self.tensors: dict[str, object] = {}
        self.plan: tuple[int, torch.Tensor] | None = None  # index and workspace

    def inputs(self, fp8: Sequence[str] = (), scalars: Sequence[str] = ()) -> None:
        """Add E4M3 inputs of the shape, and fp32 scalars."""
        for name in fp8:
            self.tensors[name] = self.graph.tensor(
                name=name, dim=self.shape, stride=self.strides, data_type=cudnn.data_type.FP8_E4M3
            )
        for name in scalars:
            self.tensors[name] = self.graph.tensor(
                name=name, dim=SCALAR, stride=SCALAR, data_type=cudnn.data_type.FLOAT
            )

    def output(self, name: str, tensor, shape: Sequence[int], strides: Sequence[int], dtype) -> None:
        self.tensors[name] = (
            tensor.set_output(True).set_dim(list(shape)).set_stride(list(strides)).set_data_type(dtype)
        )

    def fp8_output(self, name: str, tensor) -> None:
        self.output(name, tensor, self.shape, self.strides, cudnn.data_type.FP8_E4M3)

    def fp32_output(self, name: str, tensor, shape: Sequence[int] = SCALAR) -> None:
        self.output(name, tensor, shape, _contiguous_strides(shape), cudnn.data_type.FLOAT)

    def build(self) -> None:
        self.graph.validate()
        self.graph.build_operation_graph()
        self.graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
        self.graph.check_support()

    def call(self, data: Data, plan: tuple[int, torch.Tensor]) -> Callable[[], None]:
        """A function that runs one plan; `data` holds a tensor for each name in `self.tensors`."""
        index, workspace = plan
        pack = {self.tensors[name]: data[name] for name in self.tensors}
        return partial(self.graph.execute_plan_at_index, pack, workspace, index, handle=_handle())

    def choose(self, data: Data) -> tuple[int, torch.Tensor]:
        """The fastest plan on `data`. Raises RuntimeError with every plan's reason when none runs."""
        if self.plan is not None:
            return self.plan
        times, reasons = [], []
        for index in range(self.graph.get_execution_plan_count()):
            try:
                self.graph.build_plan_at_index(index)
                n_bytes = max(1, self.graph.get_workspace_size_plan_at_index(index))
                workspace = torch.empty(n_bytes, dtype=torch.uint8, device=data["q"].device)
                times.append((_milliseconds(self.call(data, (index, workspace))), index, workspace))
            except Exception as error:  # other plans may run
                reasons.append(f"plan {index}: {first_line(error)}")
        if not times:
            raise RuntimeError(f"cuDNN has no FP8 plan that runs: {'; '.join(reasons) or 'it offers none'}")
        _, index, workspace = min(times, key=lambda timed: timed[0])
        self.plan = index, workspace
        return self.plan


class Forward(Graph):
    """Attention; `stats` also returns what the backward needs of the softmax, fp32 [B, H, L, 1]."""

    def __init__(self, shape: tuple[int, ...], strides: tuple[int, ...], scale: float, stats: bool):
        super().__init__(shape, strides)
        self.inputs("qkv", ("descale_q", "descale_k", "descale_v", "descale_s", "scale_s", "scale_o"))
        out, of_softmax, amax_s, amax_o = self.graph.sdpa_fp8(
            **self.tensors, attn_scale=scale, generate_stats=stats, name="attention"
        )
        self.fp8_output("o", out)
        if stats:
            self.fp32_output("stats", of_softmax, (*shape[:3], 1))
        self.fp32_output("amax_s", amax_s)
        self.fp32_output("amax_o", amax_o)
        self.build()


class Backward(Graph):
    """Gradients of Q, K and V from what `Forward` gave and the gradient of its output, E4M3 all."""

    GRADIENTS = ("dQ", "dK", "dV")

    def __init__(self, shape: tuple[int, ...], strides: tuple[int, ...], scale: float):
        super().__init__(shape, strides)
        stats = [*shape[:3], 1]
        self.inputs(("q", "k", "v", "o", "dO"))
        self.tensors["stats"] = self.graph.tensor(
            name="stats", dim=stats, stride=_contiguous_strides(stats), data_type=cudnn.data_type.FLOAT
        )
        self.inputs(scalars=[f"descale_{x}" for x in ("q", "k", "v", "o", "dO", "s", "dP")])
        self.inputs(scalars=[f"scale_{x}" for x in ("s", "dP", *self.GRADIENTS)])
        results = self.graph.sdpa_fp8_backward(**self.tensors, attn_scale=scale, name="backward")
        for name, result in zip(self.GRADIENTS, results[:3], strict=True):
            self.fp8_output(name, result)
        for name, result in zip((*self.GRADIENTS, "dP"), results[3:7], strict=True):
            self.fp32_output(f"amax_{name}", result)
        self.build()


def _contiguous_strides(shape: Sequence[int]) -> list[int]:
    return list(torch.empty(tuple(shape), device="meta").stride())


# Keep the last shape only: a contender is checked and timed before the next shape begins.
_forward = lru_cache(maxsize=1)(Forward)
_backward = lru_cache(maxsize=1)(Backward)


def _scalar(x: float | torch.Tensor, device) -> torch.Tensor:
    return torch.as_tensor(x, dtype=torch.float32, device=device).reshape(SCALAR).clone()


def _set_scale(data: Data, name: str) -> None:
    """Set the scale of an output to what its largest element in the last run asks for.

    Raises RuntimeError when that run left no largest element.
    """
    largest = data[f"amax_{name}"].item()
    if not 0 < largest < float("inf"):
        raise RuntimeError(f"cuDNN's run says that the largest {name} is {largest}")
    data[f"scale_{name}"].fill_(E4M3_MAX / largest)
    data[f"descale_{name}"].fill_(largest / E4M3_MAX)


def _scaled_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, stats: bool
) -> tuple[Callable[[], None], Data]:
    """A function that attends, and its tensors: the output "o" is scaled by what a first run says."""
    data: Data = {}
    for name, x in (("q", q), ("k", k), ("v", v)):
        data[name], descale = to_e4m3(x)
        data[f"descale_{name}"] = _scalar(descale, q.device)
    data["o"] = torch.empty_like(data["q"])
    ones = {
        "scale_s": SCALE_S,
        "descale_s": 1 / SCALE_S,
        "scale_o": 1,
        "descale_o": 1,
        "amax_s": 0,
        "amax_o": 0,
    }
    data |= {name: _scalar(x, q.device) for name, x in ones.items()}
    if stats:
        data["stats"] = torch.empty(*q.shape[:3], 1, device=q.device)
    graph = _forward(tuple(q.shape), q.stride(), scale, stats)
    attend = graph.call(data, graph.choose(data))
    attend()
    _set_scale(data, "o")
    return attend, data


def prepare(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
    """A function that attends, and returns (out, its scale): E4M3 [B, H, L, D] and an fp32 scalar.

    Args:
        q, k, v: [B, H, L, D], with equal strides; rounded to E4M3 here.
        scale: of the scores before softmax.

    Raises RuntimeError when no plan runs, or when a first run leaves no largest output; and what cuDNN raises.
    """
    attend, data = _scaled_forward(q, k, v, scale, stats=False)

    def run():
        attend()
        return data["o"], data["descale_o"]

    return run


def _largest_probability(data: Data, scale: float) -> float:
    """Of some rows of all heads, after a forward with stats. The backward's probabilities add up to 1 in each row."""
    rows = torch.linspace(0, data["q"].shape[2] - 1, 64, device=data["q"].device).long()
    q, k = (data[name].float() * data[f"descale_{name}"] for name in ("q", "k"))
    return ((q[:, :, rows] @ k.mT) * scale - data["stats"][:, :, rows]).max().exp().item()


def prepare_training(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dout: torch.Tensor, scale: float
) -> tuple[Callable[[], None], Callable[[], None], Callable[[], tuple[torch.Tensor, ...]]]:
    """Functions that run the forward and the backward, and one that returns the gradients of the last run in fp32.

    Args and errors as of `prepare`; dout is like q.
    """
    attend, data = _scaled_forward(q, k, v, scale, stats=True)
    attend()
    names = Backward.GRADIENTS
    data = dict(data)  # the forward keeps its scale of probabilities
    data["scale_s"] = _scalar(E4M3_MAX / 2 / _largest_probability(data, scale), q.device)
    data["descale_s"] = 1 / data["scale_s"]
    data["dO"], descale = to_e4m3(dout)
    data["descale_dO"] = _scalar(descale, q.device)
    data |= {name: torch.empty_like(data["q"]) for name in names}
    for name in (*names, "dP"):
        data |= {f"{x}_{name}": _scalar(float(x != "amax"), q.device) for x in ("scale", "descale", "amax")}
    graph = _backward(tuple(q.shape), q.stride(), scale)
    differentiate = graph.call(data, graph.choose(data))
    # dP's scale first: the gradients are made of rounded dP.
    for scaled in (("dP",), names):
        differentiate()
        for name in scaled:
            _set_scale(data, name)

    def gradients():
        return tuple(data[name].float() * data[f"descale_{name}"] for name in names)

    return attend, differentiate, gradients
