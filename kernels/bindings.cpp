// pybind11 module `fpsattention._C`: device pointers, sizes, strides and a stream in; nothing of torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <numeric>
#include <string>
#include <vector>

#include "fpsattention/check.h"
#include "fpsattention/params.h"

namespace py = pybind11;
using namespace fps;

namespace {

using Triple = std::array<int, 3>;
using StrideTriple = std::array<int64_t, 3>;

Int3 int3(const Triple &x) {
    return {x[0], x[1], x[2]};
}

Border border_of(bool truncate) {
    return truncate ? Border::kTruncate : Border::kClamp;
}

std::array<int, 2> pair(Range r) {
    return {r.lo, r.hi};
}

template <class T>
T *pointer(uintptr_t address) {
    return reinterpret_cast<T *>(address);
}

// Token of every row of every tile's slot, -1 for padding.
void slot_tokens(const Triple &grid, const Triple &tile, int prefix_len, int suffix_len, uintptr_t out_address) {
    const TileGrid g(int3(grid), int3(tile), {prefix_len, suffix_len});
    int *out = pointer<int>(out_address);
    for (int i = 0; i < g.all_tiles(); ++i) {
        const TileRows rows = g.rows(i, g.text);
        for (int r = 0; r < g.slot; ++r) {
            out[int64_t(i) * g.slot + r] = r < rows.valid() ? g.token(rows, r) : -1;
        }
    }
}

int valid_blocks(const Triple &grid, const Triple &tile, const Triple &window, bool truncate, int query_tile) {
    const TileGrid g(int3(grid), int3(tile));
    return g.valid_blocks(g.keys_of(g.tile_coord(query_tile), int3(window), border_of(truncate)));
}

Triple tile_group(const Triple &grid, const Triple &tile, const std::vector<Triple> &windows) {
    std::vector<Int3> list(windows.size());
    std::transform(windows.begin(), windows.end(), list.begin(), int3);
    const Int3 size = TileGrid(int3(grid), int3(tile)).tile_group(list.data(), int(list.size()));
    return {size.t, size.h, size.w};
}

Dtype dtype_of(const std::string &name) {
    FPS_CHECK(name == "bfloat16" || name == "float16", "dtype must be bfloat16 or float16, got ", name);
    return name == "bfloat16" ? Dtype::kBF16 : Dtype::kFP16;
}

Strides strides_of(const StrideTriple &s) {
    return {s[0], s[1], s[2]};
}

cudaStream_t stream_of(uintptr_t address) {
    return reinterpret_cast<cudaStream_t>(address);
}

// What a call says of itself, once for all of its launches.
void set_call(Call &p, const Triple &grid, const Triple &tile, int prefix_len, int suffix_len, uintptr_t prefix_valid,
              uintptr_t suffix_valid, int batch, int heads, int head_dim, const std::string &dtype, float scale) {
    p.geometry = TileGrid(int3(grid), int3(tile), {prefix_len, suffix_len});
    p.prefix_valid = pointer<int>(prefix_valid), p.suffix_valid = pointer<int>(suffix_valid);
    p.batch = batch, p.heads = heads, p.head_dim = head_dim;
    p.dtype = dtype_of(dtype);
    p.scale = scale;
    // The kernels count work items in int, with room to step past the last one, and put the batch in gridDim.z.
    FPS_CHECK(batch <= 65535, "batch must be at most 65535, got ", batch);
    const int64_t blocks = int64_t(batch) * heads * p.geometry.all_tiles() * p.geometry.blocks_per_tile();
    FPS_CHECK(blocks <= 1 << 29, "batch * heads * blocks must be at most 2^29, got ", blocks);
}

void bind_quantize(uintptr_t q, uintptr_t k, uintptr_t v, const StrideTriple &q_strides, const StrideTriple &k_strides,
                   const StrideTriple &v_strides, uintptr_t q_blocks, uintptr_t kv_blocks, uintptr_t v_amax,
                   uintptr_t norms, uintptr_t k_sum, uintptr_t k_mean, uintptr_t lse_shift, uintptr_t q_amax,
                   uintptr_t k_amax, const std::array<uintptr_t, 2> &norm_weights,
                   const std::array<uintptr_t, 2> &inverse_rms, bool norm_per_head, float norm_eps, uintptr_t rope,
                   const Triple &rope_pairs, const Triple &grid, const Triple &tile, int prefix_len, int suffix_len,
                   uintptr_t prefix_valid, uintptr_t suffix_valid, const Triple &brick, int batch, int heads,
                   int head_dim, const std::string &dtype, float scale, uintptr_t stream) {
    QuantizeParams p{};
    p.q = pointer<void>(q), p.k = pointer<void>(k), p.v = pointer<void>(v);
    p.q_strides = strides_of(q_strides), p.k_strides = strides_of(k_strides), p.v_strides = strides_of(v_strides);
    p.q_blocks = pointer<uint8_t>(q_blocks), p.kv_blocks = pointer<uint8_t>(kv_blocks);
    p.v_amax = pointer<float>(v_amax), p.norms = pointer<float>(norms), p.k_sum = pointer<float>(k_sum),
    p.k_mean = pointer<float>(k_mean);
    p.lse_shift = pointer<float>(lse_shift), p.q_amax = pointer<float>(q_amax), p.k_amax = pointer<float>(k_amax);
    p.brick = int3(brick);
    for (int i = 0; i < 2; ++i) {
        p.norm_rope.weights[i] = pointer<float>(norm_weights[i]);
        p.norm_rope.inverse_rms[i] = pointer<float>(inverse_rms[i]);
    }
    p.norm_rope.per_head = norm_per_head, p.norm_rope.eps = norm_eps;
    p.norm_rope.rope = pointer<float2>(rope);
    p.norm_rope.pairs = int3(rope_pairs);
    set_call(p, grid, tile, prefix_len, suffix_len, prefix_valid, suffix_valid, batch, heads, head_dim, dtype, scale);
    quantize(p, stream_of(stream));
}

// Of a call whose geometry and heads are known.
void set_windows(WindowedCall &p, const std::vector<Triple> &windows, bool truncate) {
    FPS_CHECK(windows.size() == 1 || int(windows.size()) == p.heads, "windows must hold 1 or ", p.heads, ", got ",
              windows.size());
    FPS_CHECK(windows.size() <= size_t(kMaxWindows), "windows must hold at most ", kMaxWindows, ", got ",
              windows.size());
    p.border = border_of(truncate);
    p.n_windows = int(windows.size());
    const Int3 tiles = p.geometry.tiles;
    for (int i = 0; i < p.n_windows; ++i) {
        const Int3 w = p.windows[i] = int3(windows[i]);
        for (int axis = 0; axis < 3; ++axis) {
            FPS_CHECK(w[axis] >= std::min(tiles[axis], 1) && w[axis] <= tiles[axis], "window (", w.t, ", ", w.h, ", ",
                      w.w, ") must lie within the tiles (", tiles.t, ", ", tiles.h, ", ", tiles.w, ")");
        }
    }
    std::iota(p.head_order, p.head_order + p.n_windows, 0);
    std::stable_sort(p.head_order, p.head_order + p.n_windows,
                     [&](int a, int b) { return p.windows[a].volume() > p.windows[b].volume(); });
}

void bind_attn_fwd(uintptr_t q_blocks, uintptr_t kv_blocks, uintptr_t v_amax, uintptr_t norms, uintptr_t lse_shift,
                   uintptr_t out, uintptr_t lse, const StrideTriple &out_strides, uintptr_t next_item,
                   const Triple &grid, const Triple &tile, int prefix_len, int suffix_len, uintptr_t prefix_valid,
                   uintptr_t suffix_valid, const std::vector<Triple> &windows, bool truncate, int batch, int heads,
                   int head_dim, const std::string &dtype, float scale, uintptr_t stream) {
    ForwardParams p{};
    p.q_blocks = pointer<uint8_t>(q_blocks), p.kv_blocks = pointer<uint8_t>(kv_blocks);
    p.v_amax = pointer<float>(v_amax), p.norms = pointer<float>(norms), p.lse_shift = pointer<float>(lse_shift);
    p.out = pointer<void>(out), p.lse = pointer<float>(lse);
    p.out_strides = strides_of(out_strides);
    p.next_item = pointer<int>(next_item);
    set_call(p, grid, tile, prefix_len, suffix_len, prefix_valid, suffix_valid, batch, heads, head_dim, dtype, scale);
    set_windows(p, windows, truncate);
    attn_fwd(p, stream_of(stream));
}

void bind_attn_bwd(uintptr_t q_blocks, uintptr_t kv_blocks, uintptr_t v_amax, uintptr_t out, uintptr_t dout,
                   const StrideTriple &out_strides, const StrideTriple &dout_strides, uintptr_t lse,
                   uintptr_t lse_shift, uintptr_t k_mean, uintptr_t dlse, uintptr_t query_operands,
                   uintptr_t key_operands, uintptr_t dq_sum, uintptr_t turns, uintptr_t dq, uintptr_t dk, uintptr_t dv,
                   const StrideTriple &dq_strides, const StrideTriple &dk_strides, const StrideTriple &dv_strides,
                   const Triple &grid, const Triple &tile, int prefix_len, int suffix_len, uintptr_t prefix_valid,
                   uintptr_t suffix_valid, const std::vector<Triple> &windows, bool truncate, int batch, int heads,
                   int head_dim, const std::string &dtype, float scale, uintptr_t stream) {
    BackwardParams p{};
    p.q_blocks = pointer<uint8_t>(q_blocks), p.kv_blocks = pointer<uint8_t>(kv_blocks);
    p.v_amax = pointer<float>(v_amax);
    p.out = pointer<void>(out), p.dout = pointer<void>(dout);
    p.out_strides = strides_of(out_strides), p.dout_strides = strides_of(dout_strides);
    p.lse = pointer<float>(lse), p.lse_shift = pointer<float>(lse_shift), p.k_mean = pointer<float>(k_mean),
    p.dlse = pointer<float>(dlse);
    p.query_operands = pointer<uint8_t>(query_operands), p.key_operands = pointer<uint8_t>(key_operands);
    p.dq_sum = pointer<float>(dq_sum), p.turns = pointer<int>(turns);
    p.dq = pointer<void>(dq), p.dk = pointer<void>(dk), p.dv = pointer<void>(dv);
    p.dq_strides = strides_of(dq_strides), p.dk_strides = strides_of(dk_strides), p.dv_strides = strides_of(dv_strides);
    set_call(p, grid, tile, prefix_len, suffix_len, prefix_valid, suffix_valid, batch, heads, head_dim, dtype, scale);
    set_windows(p, windows, truncate);
    attn_bwd(p, stream_of(stream));
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "FPSAttention kernels and the geometry rule they share. Takes addresses, not tensors.";
    m.attr("BLOCK") = kBlock;
    m.attr("QUERY_BLOCK") = kQueryBlock;
    m.attr("BLOCKS_PER_ITEM") = kBlocksPerItem;
    m.attr("MAX_SLOT") = kMaxSlot;
    m.attr("MAX_WINDOWS") = kMaxWindows;

    m.def("axis_keys",
          [](int i, int n, int w, bool truncate) { return pair(axis_keys(i, n, w, border_of(truncate))); });
    m.def("axis_queries",
          [](int j, int n, int w, bool truncate) { return pair(axis_queries(j, n, w, border_of(truncate))); });
    m.def("slot_tokens", &slot_tokens);
    m.def("valid_blocks", &valid_blocks);
    m.def("tile_group", &tile_group);
    m.def("q_block_bytes", &q_block_bytes);
    m.def("kv_block_bytes", &kv_block_bytes);
    m.def("bwd_query_bytes", &bwd_query_bytes);
    m.def("bwd_key_bytes", &bwd_key_bytes);
    m.def("quantize_chunks", &quantize_chunks);

    // Without the GIL: a launch waits while the stream's queue is full.
    using no_gil = py::call_guard<py::gil_scoped_release>;
    using namespace py::literals;
    m.def("quantize", &bind_quantize, no_gil(), py::kw_only(), "q"_a, "k"_a, "v"_a, "q_strides"_a, "k_strides"_a,
          "v_strides"_a, "q_blocks"_a, "kv_blocks"_a, "v_amax"_a, "norms"_a, "k_sum"_a, "k_mean"_a, "lse_shift"_a,
          "q_amax"_a, "k_amax"_a, "norm_weights"_a, "inverse_rms"_a, "norm_per_head"_a, "norm_eps"_a, "rope"_a,
          "rope_pairs"_a, "grid"_a, "tile"_a, "prefix_len"_a, "suffix_len"_a, "prefix_valid"_a, "suffix_valid"_a,
          "brick"_a, "batch"_a, "heads"_a, "head_dim"_a, "dtype"_a, "scale"_a, "stream"_a);
    m.def("attn_fwd", &bind_attn_fwd, no_gil(), py::kw_only(), "q_blocks"_a, "kv_blocks"_a, "v_amax"_a, "norms"_a,
          "lse_shift"_a, "out"_a, "lse"_a, "out_strides"_a, "next_item"_a, "grid"_a, "tile"_a, "prefix_len"_a,
          "suffix_len"_a, "prefix_valid"_a, "suffix_valid"_a, "windows"_a, "truncate"_a, "batch"_a, "heads"_a,
          "head_dim"_a, "dtype"_a, "scale"_a, "stream"_a);
    m.def("attn_bwd", &bind_attn_bwd, no_gil(), py::kw_only(), "q_blocks"_a, "kv_blocks"_a, "v_amax"_a, "out"_a,
          "dout"_a, "out_strides"_a, "dout_strides"_a, "lse"_a, "lse_shift"_a, "k_mean"_a, "dlse"_a, "query_operands"_a,
          "key_operands"_a, "dq_sum"_a, "turns"_a, "dq"_a, "dk"_a, "dv"_a, "dq_strides"_a, "dk_strides"_a,
          "dv_strides"_a, "grid"_a, "tile"_a, "prefix_len"_a, "suffix_len"_a, "prefix_valid"_a, "suffix_valid"_a,
          "windows"_a, "truncate"_a, "batch"_a, "heads"_a, "head_dim"_a, "dtype"_a, "scale"_a, "stream"_a);
}
