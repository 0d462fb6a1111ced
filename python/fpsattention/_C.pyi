"""The compiled kernels and the geometry rule they share (kernels/bindings.cpp). Takes addresses, not tensors.

An address is that of device memory, 0 for none; `TileGrid.slot_tokens` alone takes host memory. `stream` is a
cudaStream_t, `device` the index of the GPU. The fields of parameters are explained in include/fpsattention/params.h.
"""

from collections.abc import Sequence
from typing import overload

# Three numbers: tokens or tiles on the axes (t, h, w), or strides in elements (batch, head, token).
_Triple = Sequence[int]
# Addresses of tiles, counts, starts and order, 0 for none; capacity, batch_step and head_step.
_TileLists = tuple[int, int, int, int, int, int, int]

BLOCK: int
QUERY_BLOCK: int
MAX_SLOT: int
MAX_WINDOWS: int

def blocks_per_item(head_dim: int, blocks_of_group: int) -> int: ...
def axis_keys(i: int, n: int, w: int, truncate: bool, /) -> list[int]: ...
def axis_queries(j: int, n: int, w: int, truncate: bool, /) -> list[int]: ...
def q_block_bytes(head_dim: int, /) -> int: ...
def kv_block_bytes(head_dim: int, /) -> int: ...
def bwd_query_bytes(head_dim: int, /) -> int: ...
def quantize_chunks(tokens: int, /) -> int: ...

class TileGrid:
    def __init__(self, grid: _Triple, tile: _Triple, prefix_len: int = 0, suffix_len: int = 0) -> None: ...
    def slot_tokens(self, out: int) -> None: ...
    def valid_blocks(self, window: _Triple, truncate: bool, query_tile: int) -> int: ...
    def tile_group(self, windows: Sequence[_Triple]) -> list[int]: ...

class CallParams:
    def __init__(
        self, geometry: TileGrid, *, batch: int, heads: int, head_dim: int, dtype: str, scale: float
    ) -> None: ...
    prefix_valid: int
    suffix_valid: int

class NormRope:
    weights: tuple[int, int]
    text_weights: tuple[int, int]
    biases: tuple[int, int]
    inverse_rms: tuple[int, int]
    per_head: bool
    eps: float
    rope: int
    rope_heads: int
    pairs: _Triple

class QuantizeParams(CallParams):
    @overload
    def __init__(self, other: QuantizeParams) -> None: ...
    @overload
    def __init__(self, call: CallParams) -> None: ...
    q: int
    k: int
    v: int
    q_strides: _Triple
    k_strides: _Triple
    v_strides: _Triple
    q_blocks: int
    kv_blocks: int
    k_sum: int
    k_mean: int
    lse_shift: int
    q_amax: int
    k_amax: int
    brick: _Triple
    norm_rope: NormRope
    zeroed: tuple[int, int]

class ForwardParams(CallParams):
    @overload
    def __init__(self, call: CallParams, windows: Sequence[_Triple], truncate: bool) -> None: ...
    @overload
    def __init__(self, other: ForwardParams) -> None: ...
    q_blocks: int
    kv_blocks: int
    lse_shift: int
    out: int
    lse: int
    out_strides: _Triple
    next_item: int
    keys: _TileLists

class BackwardParams(CallParams):
    @overload
    def __init__(self, call: CallParams, windows: Sequence[_Triple], truncate: bool) -> None: ...
    @overload
    def __init__(self, other: BackwardParams) -> None: ...
    q_blocks: int
    kv_blocks: int
    out: int
    dout: int
    out_strides: _Triple
    dout_strides: _Triple
    lse: int
    dlse: int
    lse_shift: int
    k_mean: int
    query_operands: int
    keys: _TileLists
    queries: _TileLists
    places: int
    dq_sum: int
    turns: int
    next_item: int
    dq: int
    dk: int
    dv: int
    dq_strides: _Triple
    dk_strides: _Triple
    dv_strides: _Triple
    zeroed: tuple[int, int]

def quantize(params: QuantizeParams, device: int, stream: int) -> None: ...
def attn_fwd(params: ForwardParams, device: int, stream: int) -> None: ...
def attn_bwd(params: BackwardParams, device: int, stream: int) -> None: ...
