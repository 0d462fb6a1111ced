"""Dense FP8 attention of cuDNN, forward, through its graphs (PyPI: nvidia-cudnn-frontend).

E4M3 in and out, one scale a tensor: on Hopper cuDNN writes the output of its FP8 attention in E4M3 only. Quantisation
is not part of the graph.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial

import cudnn
import torch

from fpsattention.cli.timing import first_line
from fpsattention.core.reference import E4M3_MAX

VERSION = f"cudnn-frontend {cudnn.__version__}, cuDNN {cudnn.backend_version_string()}"
SCALE_S = 64.0  # factor on the probabilities, which are at most 1, before they are rounded to E4M3
SCALARS = ("descale_q", "descale_k", "descale_v", "descale_s", "scale_s", "scale_o")


@lru_cache(maxsize=1)
def _handle():
    """cuDNN's handle, on the stream that is current at the first call."""
    handle = cudnn.create_handle()
    cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream().cuda_stream)
    return handle


def _milliseconds(call: Callable[[], object]) -> float:
    """GPU time of the second of two calls."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    call()
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


class Graph:
    """The graph of one shape, and the fastest of its plans once `choose` has run.

    Args:
        shape, strides: of Q, K, V and O, [B, H, L, D].
        scale: of the scores before softmax.

    Raises what cuDNN raises for a graph that it does not support.
    """

    def __init__(self, shape: tuple[int, ...], strides: tuple[int, ...], scale: float):
        fp8, fp32 = cudnn.data_type.FP8_E4M3, cudnn.data_type.FLOAT
        self.graph = cudnn.pygraph(
            io_data_type=fp8, intermediate_data_type=fp32, compute_data_type=fp32, handle=_handle()
        )
        one = [1, 1, 1, 1]
        self.tensors = {
            name: self.graph.tensor(name=name, dim=list(shape), stride=list(strides), data_type=fp8)
            for name in "qkv"
        }
        for name in SCALARS:
            self.tensors[name] = self.graph.tensor(name=name, dim=one, stride=one, data_type=fp32)
        out, _, amax_s, amax_o = self.graph.sdpa_fp8(
            **self.tensors, attn_scale=scale, generate_stats=False, name="attention"
        )
        out.set_output(True).set_dim(list(shape)).set_stride(list(strides)).set_data_type(fp8)
        for amax in (amax_s, amax_o):
            amax.set_output(True).set_dim(one).set_stride(one).set_data_type(fp32)
        self.tensors |= {"out": out, "amax_s": amax_s, "amax_o": amax_o}
        self.graph.validate()
        self.graph.build_operation_graph()
        self.graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
        self.graph.check_support()
        self.plan: tuple[int, torch.Tensor] | None = None  # index and workspace

    def call(self, data: dict[str, torch.Tensor], plan: tuple[int, torch.Tensor]) -> Callable[[], None]:
        """A function that attends with one plan; `data` holds a tensor for each name in `self.tensors`."""
        index, workspace = plan
        pack = {self.tensors[name]: x for name, x in data.items()}
        return partial(self.graph.execute_plan_at_index, pack, workspace, index, handle=_handle())

    def choose(self, data: dict[str, torch.Tensor]) -> tuple[int, torch.Tensor]:
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


@lru_cache(maxsize=1)
def _graph(shape: tuple[int, ...], strides: tuple[int, ...], scale: float) -> Graph:
    """Of the last shape: its check and its timing follow each other."""
    return Graph(shape, strides, scale)


def prepare(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, descales: dict[str, torch.Tensor], scale: float
) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
    """A function that attends, and returns (out, its scale): E4M3 [B, H, L, D] and an fp32 scalar.

    The output's scale is that of a first run.

    Args:
        q, k, v: E4M3 [B, H, L, D], with equal strides.
        descales: "descale_q", "descale_k" and "descale_v", fp32 scalars: the scales of q, k and v.
        scale: of the scores before softmax.

    Raises RuntimeError when no plan runs, or when the first run leaves no largest output; and what cuDNN raises.
    """

    def scalar(x: float | torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(x, dtype=torch.float32, device=q.device).reshape(1, 1, 1, 1).clone()

    graph = _graph(tuple(q.shape), q.stride(), scale)
    out = torch.empty_like(q)
    data = {"q": q, "k": k, "v": v, "out": out, "amax_s": scalar(0), "amax_o": scalar(0)}
    data |= {name: scalar(x) for name, x in descales.items()}
    data |= {"scale_s": scalar(SCALE_S), "descale_s": scalar(1 / SCALE_S), "scale_o": scalar(1)}
    attend = graph.call(data, graph.choose(data))
    attend()
    largest = data["amax_o"].item()
    if not 0 < largest < float("inf"):
        raise RuntimeError(f"cuDNN's first run says that the largest output is {largest}")
    data["scale_o"].fill_(E4M3_MAX / largest)
    out_scale = scalar(largest / E4M3_MAX)

    def run():
        attend()
        return out, out_scale

    return run
