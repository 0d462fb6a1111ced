"""What is compared: FPSAttention, torch's own attention, and the peers that are installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import fpsattention as fps
from common import CUDNN, CUDNN_FP8, FLASH, FLEX, OURS, OURS_DETERMINISTIC, to_e4m3
from fpsattention.core import ops
from shapes import Shape, Window

# Largest relative RMS error against exact attention that rounding explains.
TOLERANCE_16_BIT, TOLERANCE_8_BIT = 0.01, 0.10


@dataclass(frozen=True)
class Parts:
    """The two halves of FPSAttention, each callable by itself, and the bytes of the packed FP8 blocks between them."""

    quantize: Callable[[], object]
    attend: Callable[[], object]
    packed_bytes: int


@dataclass(frozen=True)
class Contender:
    """One way to compute the attention of a shape under a window.

    Attributes:
        prepare: takes q, k, v in the shape's layout and returns the function that is timed; itself not timed.
        finish: takes what that function returned and returns the output [B, H, L, D] in raster order; not timed.
        tolerance: largest relative RMS error of a right answer.
        note: what a reader must know about the time.
        parts: takes q, k, v and returns Parts; FPSAttention has it alone.
        train: takes q, k, v and the output's gradient, [B, H, L, D] all, and returns a function that attends, one that
            differentiates what it attended to, and one that returns the gradients. None: autograd differentiates.
    """

    name: str
    window: Window
    prepare: Callable[..., Callable[[], object]]
    finish: Callable[[object], torch.Tensor]
    tolerance: float
    note: str = ""
    parts: Callable[..., Parts] | None = None
    train: Callable[..., tuple[Callable, Callable, Callable]] | None = None


def as_hnd(x: torch.Tensor, layout: str) -> torch.Tensor:
    """A [B, H, L, D] view of a tensor in `layout`."""
    return x if layout == "HND" else x.transpose(1, 2)


def as_nhd(x: torch.Tensor, layout: str) -> torch.Tensor:
    """A [B, L, H, D] view of a tensor in `layout`."""
    return x if layout == "NHD" else x.transpose(1, 2)


def config_of(shape: Shape, window: Window, quant: str = "fp8") -> fps.AttentionConfig:
    return fps.AttentionConfig(tile=shape.tile, window=window, quant=quant)


def ours(shape: Shape, window: Window, **options) -> Contender:
    """FPSAttention; `options` are more arguments of `fpsattention.attention`."""
    config = config_of(shape, window)
    options |= {"grid": shape.grid, "config": config, "tensor_layout": shape.layout, "backend": "sm90"}

    def prepare(q, k, v):
        return lambda: fps.attention(q, k, v, **options)

    def parts(q, k, v):
        sizes = q.shape[0], shape.heads, shape.head_dim, q.dtype, shape.head_dim**-0.5, shape.layout
        call = ops.call_of(config, shape.grid, 0, 0, *sizes)
        packed = ops.launch_quantize(call, q, k, v, None, None)
        return Parts(
            lambda: ops.launch_quantize(call, q, k, v, None, None),
            lambda: ops.launch_attend(call, packed, None, None, None, None),
            call.sections.k_mean,  # where the packed blocks end
        )

    return Contender(
        OURS, window, prepare, lambda out: as_hnd(out, shape.layout), TOLERANCE_8_BIT, parts=parts
    )


def deterministic(shape: Shape, window: Window) -> Contender:
    """FPSAttention with a backward that gives the same bits every time."""
    return replace(ours(shape, window, deterministic=True), name=OURS_DETERMINISTIC, parts=None)


def _torch_dense(shape: Shape, name: str, backend: SDPBackend) -> Contender:
    def prepare(q, k, v):
        q, k, v = (as_hnd(x, shape.layout) for x in (q, k, v))

        def run():
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v)

        return run

    return Contender(name, None, prepare, lambda out: out, TOLERANCE_16_BIT)


def cudnn(shape: Shape) -> Contender:
    return _torch_dense(shape, CUDNN, SDPBackend.CUDNN_ATTENTION)


def torch_dense(shape: Shape) -> list[Contender]:
    return [cudnn(shape), _torch_dense(shape, FLASH, SDPBackend.FLASH_ATTENTION)]


def flex(shape: Shape, window: Window) -> Contender:
    config = config_of(shape, window, quant="none")

    def prepare(q, k, v):
        return lambda: fps.attention(q, k, v, grid=shape.grid, config=config, tensor_layout=shape.layout)

    note = "BF16, through quant='none': permutation into tile order and back included"
    return Contender(FLEX, window, prepare, lambda out: as_hnd(out, shape.layout), TOLERANCE_16_BIT, note)


def _first(out) -> torch.Tensor:
    """The output of an op that returns (out, lse, ...) in some versions and out alone in others."""
    return out[0] if isinstance(out, (tuple, list)) else out


def _flash_attention_3(shape: Shape) -> Contender:
    from flash_attn_interface import flash_attn_func

    def prepare(q, k, v):
        q, k, v = (as_nhd(x, shape.layout) for x in (q, k, v))
        return lambda: flash_attn_func(q, k, v)

    return Contender("fa3-bf16", None, prepare, lambda out: _first(out).transpose(1, 2), TOLERANCE_16_BIT)


def _flash_attention_3_fp8(shape: Shape) -> Contender:
    from flash_attn_interface import flash_attn_func

    def quantize(x):
        x8, descale = to_e4m3(x)
        return x8, descale.expand(shape.batch, shape.heads).contiguous()

    def prepare(q, k, v):
        (q, q_descale), (k, k_descale), (v, v_descale) = (
            quantize(as_nhd(x, shape.layout)) for x in (q, k, v)
        )
        return lambda: flash_attn_func(q, k, v, q_descale=q_descale, k_descale=k_descale, v_descale=v_descale)

    def finish(out):
        return _first(out).transpose(1, 2)

    return Contender(
        "fa3-fp8", None, prepare, finish, TOLERANCE_8_BIT, "one scale per tensor; quantisation not timed"
    )


def _cudnn_fp8(shape: Shape) -> Contender:
    import cudnn_fp8  # needs the module `cudnn`

    def prepare(*qkv):
        return cudnn_fp8.prepare(*(as_hnd(x, shape.layout) for x in qkv), scale=shape.head_dim**-0.5)

    def finish(result):
        out, scale = result
        return out.float() * scale

    def train(*qkv_dout):
        return cudnn_fp8.prepare_training(*qkv_dout, scale=shape.head_dim**-0.5)

    note = f"{cudnn_fp8.VERSION}; one scale per tensor, E4M3 output; quantisation not timed"
    return Contender(CUDNN_FP8, None, prepare, finish, TOLERANCE_8_BIT, note, train=train)


def _sage_attention(shape: Shape) -> Contender:
    from sageattention import sageattn

    def prepare(q, k, v):
        return lambda: sageattn(q, k, v, tensor_layout=shape.layout, is_causal=False)

    return Contender(
        "sageattention",
        None,
        prepare,
        lambda out: as_hnd(_first(out), shape.layout),
        TOLERANCE_8_BIT,
        "quantisation timed",
    )


def _flash_infer(shape: Shape) -> Contender:
    from flashinfer import single_prefill_with_kv_cache

    if shape.batch != 1:
        raise ValueError(f"batch {shape.batch}: FlashInfer's single prefill takes one sequence")

    def prepare(q, k, v):
        q, k, v = (as_nhd(x, shape.layout)[0].contiguous() for x in (q, k, v))
        return lambda: single_prefill_with_kv_cache(q, k, v, causal=False, kv_layout="NHD", backend="fa3")

    return Contender(
        "flashinfer-bf16", None, prepare, lambda out: _first(out).transpose(0, 1)[None], TOLERANCE_16_BIT
    )


FASTVIDEO_TILE = (6, 8, 8)
FASTVIDEO_GRIDS = ((30, 48, 80), (36, 48, 48), (18, 48, 80))  # those compiled into its kernel


def _fastvideo(module: str, shape: Shape, window: Window) -> Contender:
    sliding_tile_attention = importlib.import_module(module).sliding_tile_attention
    geometry = config_of(shape, window).resolve(shape.grid, shape.heads).geometry
    token_of_row = geometry.slot_tokens.reshape(-1)  # no padding: the tile divides these grids

    def prepare(q, k, v):
        index = token_of_row.to(q.device)
        q, k, v = (as_hnd(x, shape.layout)[:, :, index].contiguous() for x in (q, k, v))
        windows, seq_shape = [list(window)] * shape.heads, "x".join(map(str, shape.grid))
        return lambda: sliding_tile_attention(q, k, v, windows, 0, False, seq_shape)

    def finish(out):
        raster = torch.empty_like(out)
        raster[:, :, token_of_row.to(out.device)] = out
        return raster

    return Contender(
        "fastvideo-sta",
        window,
        prepare,
        finish,
        TOLERANCE_16_BIT,
        "permutation into tile order and back not timed",
    )


# Dense contenders of each peer, by the module that they import.
_DENSE_PEERS = {
    "cudnn": (_cudnn_fp8,),  # PyPI: nvidia-cudnn-frontend
    "flash_attn_interface": (_flash_attention_3, _flash_attention_3_fp8),
    "sageattention": (_sage_attention,),
    "flashinfer": (_flash_infer,),
}
_WINDOWED_PEERS = ("fastvideo_kernel", "st_attn")


def installed_peers() -> list[str]:
    """The peers' modules that are installed."""
    return [m for m in (*_DENSE_PEERS, *_WINDOWED_PEERS) if importlib.util.find_spec(m) is not None]


def peers(shape: Shape) -> tuple[list[Contender], list[str]]:
    """The installed peers' contenders for this shape, and why any could not be set up."""
    contenders, failures = [], []

    def add(module: str, make: Callable[[], Contender]) -> None:
        try:
            contenders.append(make())
        except Exception as error:  # a peer that fails is a line in the results
            failures.append(f"{module}: {type(error).__name__}: {error}")

    for module in installed_peers():
        for make in _DENSE_PEERS.get(module, ()):
            add(module, lambda make=make: make(shape))
        if module in _WINDOWED_PEERS and shape.tile == FASTVIDEO_TILE and shape.grid in FASTVIDEO_GRIDS:
            for window in shape.windows:
                if window is not None:
                    add(module, lambda module=module, window=window: _fastvideo(module, shape, window))
    return contenders, failures


def contenders_of(shape: Shape) -> tuple[list[Contender], list[str]]:
    """All contenders of a shape, none without windows, and why any peer could not be set up."""
    if not shape.windows:
        return [], []
    own = [ours(shape, window) for window in dict.fromkeys(shape.windows + shape.sweep)]
    others, failures = peers(shape)
    flexes = [flex(shape, window) for window in shape.flex if window in shape.windows]
    return [*torch_dense(shape), *own, *flexes, *others], failures
