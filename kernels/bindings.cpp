// pybind11 module `fpsattention._C`: the parameters of a launch as classes with named fields, the launches, and the
// geometry rule. Takes addresses, sizes, strides and a stream; knows nothing of torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <numeric>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "fpsattention/check.h"
#include "fpsattention/params.h"

namespace py = pybind11;
using namespace fps;
using namespace py::literals;

namespace {

using Triple = std::array<int, 3>;
using StrideTriple = std::array<int64_t, 3>;
// The emulator of the tests loads this module several times in one process: the classes belong to one module each.
using module_local = py::module_local;

Int3 int3(const Triple &x) {
    return {x[0], x[1], x[2]};
}

Border border_of(bool truncate) {
    return truncate ? Border::kTruncate : Border::kClamp;
}

std::array<int, 2> pair(Range r) {
    return {r.lo, r.hi};
}

// Token of every row of every tile's slot, -1 for padding, to host memory.
void slot_tokens(const TileGrid &g, uintptr_t out_address) {
    int *out = reinterpret_cast<int *>(out_address);
    for (int i = 0; i < g.all_tiles(); ++i) {
        const TileRows rows = g.rows(i, g.text);
        for (int r = 0; r < g.slot; ++r) {
            out[int64_t(i) * g.slot + r] = r < rows.valid() ? g.token(rows, r) : -1;
        }
    }
}

// Key blocks of the grid that hold a token and that a tile of the grid attends.
int valid_blocks(const TileGrid &g, const Triple &window, bool truncate, int query_tile) {
    return g.valid_blocks(g.keys_of(g.tile_coord(query_tile), int3(window), border_of(truncate)));
}

Triple tile_group(const TileGrid &g, const std::vector<Triple> &windows) {
    std::vector<Int3> list(windows.size());
    std::transform(windows.begin(), windows.end(), list.begin(), int3);
    const Int3 size = g.tile_group(list.data(), int(list.size()));
    return {size.t, size.h, size.w};
}

TileGrid tile_grid(const Triple &grid, const Triple &tile, int prefix_len, int suffix_len) {
    return TileGrid(int3(grid), int3(tile), {prefix_len, suffix_len});
}

CallParams call_params(const TileGrid &geometry, int batch, int heads, int head_dim, const std::string &dtype,
                       float scale) {
    FPS_CHECK(dtype == "bfloat16" || dtype == "float16", "dtype must be bfloat16 or float16, got ", dtype);
    // The kernels count work items in int, with room to step past the last one, and put the batch in gridDim.z.
    FPS_CHECK(batch <= 65535, "batch must be at most 65535, got ", batch);
    const int64_t blocks = int64_t(batch) * heads * geometry.all_tiles() * geometry.blocks_per_tile();
    FPS_CHECK(blocks <= 1 << 29, "batch * heads * blocks must be at most 2^29, got ", blocks);
    CallParams p{};
    p.geometry = geometry;
    p.batch = batch, p.heads = heads, p.head_dim = head_dim;
    p.dtype = dtype == "bfloat16" ? Dtype::kBF16 : Dtype::kFP16;
    p.scale = scale;
    return p;
}

template <class Params>
Params params_of(const CallParams &call) {
    Params p{};
    static_cast<CallParams &>(p) = call;
    return p;
}

// Windows in tiles: one for all heads, or one per head.
template <class Params>
Params windowed_params(const CallParams &call, const std::vector<Triple> &windows, bool truncate) {
    FPS_CHECK(windows.size() == 1 || int(windows.size()) == call.heads, "windows must hold 1 or ", call.heads, ", got ",
              windows.size());
    FPS_CHECK(windows.size() <= size_t(kMaxWindows), "windows must hold at most ", kMaxWindows, ", got ",
              windows.size());
    Params p = params_of<Params>(call);
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
    return p;
}

// The field as Python sees it: an address, 0 for none.
template <class Class, class Owner, class T>
void pointer(Class &c, const char *name, T *Owner::*field) {
    using Params = typename Class::type;
    c.def_property(
        name, [field](const Params &p) { return reinterpret_cast<uintptr_t>(p.*field); },
        [field](Params &p, uintptr_t address) { p.*field = reinterpret_cast<T *>(address); });
}

// (tiles, counts, starts, order, capacity, batch_step, head_step); the first four are addresses, 0 for none.
template <class Class, class Owner>
void tile_lists(Class &c, const char *name, TileLists Owner::*field) {
    using Params = typename Class::type;
    using Values = std::tuple<uintptr_t, uintptr_t, uintptr_t, uintptr_t, int, int, int>;
    c.def_property(
        name,
        [field](const Params &p) {
            const auto address = [](const int *x) { return reinterpret_cast<uintptr_t>(x); };
            const TileLists &x = p.*field;
            return Values{address(x.tiles), address(x.counts), address(x.starts), address(x.order),
                          x.capacity,       x.batch_step,      x.head_step};
        },
        [field](Params &p, const Values &x) {
            const auto array = [](uintptr_t address) { return reinterpret_cast<const int *>(address); };
            const auto &[tiles, counts, starts, order, capacity, batch_step, head_step] = x;
            const int64_t entries = int64_t(p.geometry.tiles.volume()) * capacity;
            FPS_CHECK(capacity >= 0 && entries < int64_t(1) << 31,
                      "lists must hold fewer than 2^31 entries of each head, got ", entries);
            p.*field = {array(tiles), array(counts), array(starts), array(order), capacity, batch_step, head_step};
        });
}

// (batch, head, token), in elements.
template <class Class, class Owner>
void strides(Class &c, const char *name, Strides Owner::*field) {
    using Params = typename Class::type;
    c.def_property(
        name, [field](const Params &p) { return StrideTriple{(p.*field).batch, (p.*field).head, (p.*field).token}; },
        [field](Params &p, const StrideTriple &s) { p.*field = {s[0], s[1], s[2]}; });
}

// (address, bytes).
template <class Class, class Owner>
void zeroed(Class &c, const char *name, Zeroed Owner::*field) {
    using Params = typename Class::type;
    c.def_property(
        name,
        [field](const Params &p) { return std::pair{reinterpret_cast<uintptr_t>((p.*field).begin), (p.*field).bytes}; },
        [field](Params &p, std::pair<uintptr_t, size_t> range) {
            p.*field = {reinterpret_cast<void *>(range.first), range.second};
        });
}

// Raises ValueError for a pointer that a kernel would follow and that was not set.
void require(std::initializer_list<std::pair<const char *, const void *>> pointers) {
    for (const auto &[name, address] : pointers) {
        FPS_CHECK(address != nullptr, name, " is not set");
    }
}

// Makes a device current for as long as this lives.
class DeviceGuard {
public:
    explicit DeviceGuard(int device) {
        FPS_CUDA_CHECK(cudaGetDevice(&previous_));
        if (device != previous_) {
            FPS_CUDA_CHECK(cudaSetDevice(device));
            changed_ = true;
        }
    }
    ~DeviceGuard() {
        if (changed_) {
            cudaSetDevice(previous_);
        }
    }
    DeviceGuard(const DeviceGuard &) = delete;
    DeviceGuard &operator=(const DeviceGuard &) = delete;

private:
    int previous_ = 0;
    bool changed_ = false;
};

cudaStream_t stream_of(uintptr_t address) {
    return reinterpret_cast<cudaStream_t>(address);
}

void launch_quantize(const QuantizeParams &p, int device, uintptr_t stream) {
    require({{"q", p.q}, {"k", p.k}, {"v", p.v}, {"q_blocks", p.q_blocks}, {"kv_blocks", p.kv_blocks}});
    require({{"zeroed", p.zeroed.begin}});
    const DeviceGuard guard(device);
    quantize(p, stream_of(stream));
}

void launch_attn_fwd(const ForwardParams &p, int device, uintptr_t stream) {
    require({{"q_blocks", p.q_blocks}, {"kv_blocks", p.kv_blocks}, {"out", p.out}, {"next_item", p.next_item}});
    const DeviceGuard guard(device);
    attn_fwd(p, stream_of(stream));
}

void launch_attn_bwd(const BackwardParams &p, int device, uintptr_t stream) {
    require({{"q_blocks", p.q_blocks}, {"kv_blocks", p.kv_blocks}, {"out", p.out}});
    require({{"dout", p.dout}, {"lse", p.lse}, {"dlse", p.dlse}, {"zeroed", p.zeroed.begin}, {"dq_sum", p.dq_sum}});
    require({{"query_operands", p.query_operands}});
    if (p.turns != nullptr) {
        require({{"next_item", p.next_item}});
    }
    if (p.keys.given()) {
        require({{"queries", p.queries.tiles}});
    }
    require({{"dq", p.dq}, {"dk", p.dk}, {"dv", p.dv}});
    const DeviceGuard guard(device);
    attn_bwd(p, stream_of(stream));
}

void bind_geometry(py::module_ &m) {
    m.attr("BLOCK") = kBlock;
    m.attr("QUERY_BLOCK") = kQueryBlock;
    m.attr("MAX_SLOT") = kMaxSlot;
    m.attr("MAX_WINDOWS") = kMaxWindows;
    m.def("blocks_per_item", &blocks_per_item, "head_dim"_a, "blocks_of_group"_a);
    m.def("axis_keys",
          [](int i, int n, int w, bool truncate) { return pair(axis_keys(i, n, w, border_of(truncate))); });
    m.def("axis_queries",
          [](int j, int n, int w, bool truncate) { return pair(axis_queries(j, n, w, border_of(truncate))); });
    py::class_<TileGrid>(m, "TileGrid", module_local())
        .def(py::init(&tile_grid), "grid"_a, "tile"_a, "prefix_len"_a = 0, "suffix_len"_a = 0)
        .def("slot_tokens", &slot_tokens, "out"_a)
        .def("valid_blocks", &valid_blocks, "window"_a, "truncate"_a, "query_tile"_a)
        .def("tile_group", &tile_group, "windows"_a);
}

void bind_format(py::module_ &m) {
    m.def("q_block_bytes", &q_block_bytes);
    m.def("kv_block_bytes", &kv_block_bytes);
    m.def("bwd_query_bytes", &bwd_query_bytes);
    m.def("quantize_chunks", &quantize_chunks);
}

void bind_call(py::module_ &m) {
    py::class_<CallParams> c(m, "CallParams", module_local());
    c.def(py::init(&call_params), "geometry"_a, py::kw_only(), "batch"_a, "heads"_a, "head_dim"_a, "dtype"_a,
          "scale"_a);
    pointer(c, "prefix_valid", &CallParams::prefix_valid);
    pointer(c, "suffix_valid", &CallParams::suffix_valid);
}

void bind_quantize(py::module_ &m) {
    py::class_<NormRope> n(m, "NormRope", module_local());
    const auto of_q_and_k = [&](const char *name, auto member) {
        n.def_property(
            name,
            [member](const NormRope &x) {
                return std::pair(reinterpret_cast<uintptr_t>((x.*member)[0]),
                                 reinterpret_cast<uintptr_t>((x.*member)[1]));
            },
            [member](NormRope &x, std::pair<uintptr_t, uintptr_t> addresses) {
                (x.*member)[0] = reinterpret_cast<float *>(addresses.first);
                (x.*member)[1] = reinterpret_cast<float *>(addresses.second);
            });
    };
    of_q_and_k("weights", &NormRope::weights);
    of_q_and_k("text_weights", &NormRope::text_weights);
    of_q_and_k("biases", &NormRope::biases);
    of_q_and_k("inverse_rms", &NormRope::inverse_rms);
    n.def_readwrite("per_head", &NormRope::per_head);
    n.def_readwrite("eps", &NormRope::eps);
    pointer(n, "rope", &NormRope::rope);
    n.def_readwrite("rope_heads", &NormRope::rope_heads);
    n.def_property(
        "pairs", [](const NormRope &x) { return Triple{x.pairs.t, x.pairs.h, x.pairs.w}; },
        [](NormRope &x, const Triple &pairs) { x.pairs = int3(pairs); });

    py::class_<QuantizeParams, CallParams> c(m, "QuantizeParams", module_local());
    c.def(py::init<const QuantizeParams &>(), "other"_a);  // first, or another's CallParams alone would be copied
    c.def(py::init(&params_of<QuantizeParams>), "call"_a);
    pointer(c, "q", &QuantizeParams::q);
    pointer(c, "k", &QuantizeParams::k);
    pointer(c, "v", &QuantizeParams::v);
    strides(c, "q_strides", &QuantizeParams::q_strides);
    strides(c, "k_strides", &QuantizeParams::k_strides);
    strides(c, "v_strides", &QuantizeParams::v_strides);
    pointer(c, "q_blocks", &QuantizeParams::q_blocks);
    pointer(c, "kv_blocks", &QuantizeParams::kv_blocks);
    pointer(c, "k_sum", &QuantizeParams::k_sum);
    pointer(c, "k_mean", &QuantizeParams::k_mean);
    pointer(c, "lse_shift", &QuantizeParams::lse_shift);
    pointer(c, "q_amax", &QuantizeParams::q_amax);
    pointer(c, "k_amax", &QuantizeParams::k_amax);
    c.def_property(
        "brick", [](const QuantizeParams &p) { return Triple{p.brick.t, p.brick.h, p.brick.w}; },
        [](QuantizeParams &p, const Triple &brick) { p.brick = int3(brick); });
    c.def_readwrite("norm_rope", &QuantizeParams::norm_rope);
    zeroed(c, "zeroed", &QuantizeParams::zeroed);
}

void bind_forward(py::module_ &m) {
    py::class_<ForwardParams, CallParams> c(m, "ForwardParams", module_local());
    c.def(py::init(&windowed_params<ForwardParams>), "call"_a, "windows"_a, "truncate"_a);
    c.def(py::init<const ForwardParams &>(), "other"_a);
    pointer(c, "q_blocks", &ForwardParams::q_blocks);
    pointer(c, "kv_blocks", &ForwardParams::kv_blocks);
    pointer(c, "lse_shift", &ForwardParams::lse_shift);
    pointer(c, "out", &ForwardParams::out);
    pointer(c, "lse", &ForwardParams::lse);
    strides(c, "out_strides", &ForwardParams::out_strides);
    pointer(c, "next_item", &ForwardParams::next_item);
    tile_lists(c, "keys", &ForwardParams::keys);
}

void bind_backward(py::module_ &m) {
    py::class_<BackwardParams, CallParams> c(m, "BackwardParams", module_local());
    c.def(py::init(&windowed_params<BackwardParams>), "call"_a, "windows"_a, "truncate"_a);
    c.def(py::init<const BackwardParams &>(), "other"_a);
    pointer(c, "q_blocks", &BackwardParams::q_blocks);
    pointer(c, "kv_blocks", &BackwardParams::kv_blocks);
    pointer(c, "out", &BackwardParams::out);
    pointer(c, "dout", &BackwardParams::dout);
    strides(c, "out_strides", &BackwardParams::out_strides);
    strides(c, "dout_strides", &BackwardParams::dout_strides);
    pointer(c, "lse", &BackwardParams::lse);
    pointer(c, "dlse", &BackwardParams::dlse);
    pointer(c, "lse_shift", &BackwardParams::lse_shift);
    pointer(c, "k_mean", &BackwardParams::k_mean);
    pointer(c, "query_operands", &BackwardParams::query_operands);
    tile_lists(c, "keys", &BackwardParams::keys);
    tile_lists(c, "queries", &BackwardParams::queries);
    pointer(c, "places", &BackwardParams::places);
    pointer(c, "dq_sum", &BackwardParams::dq_sum);
    pointer(c, "turns", &BackwardParams::turns);
    pointer(c, "next_item", &BackwardParams::next_item);
    pointer(c, "dq", &BackwardParams::dq);
    pointer(c, "dk", &BackwardParams::dk);
    pointer(c, "dv", &BackwardParams::dv);
    strides(c, "dq_strides", &BackwardParams::dq_strides);
    strides(c, "dk_strides", &BackwardParams::dk_strides);
    strides(c, "dv_strides", &BackwardParams::dv_strides);
    zeroed(c, "zeroed", &BackwardParams::zeroed);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "FPSAttention kernels and the geometry rule they share. Takes addresses, not tensors.";
    bind_geometry(m);
    bind_format(m);
    bind_call(m);
    bind_quantize(m);
    bind_forward(m);
    bind_backward(m);
    // Without the GIL: a launch waits while the stream's queue is full.
    using no_gil = py::call_guard<py::gil_scoped_release>;
    m.def("quantize", &launch_quantize, no_gil(), "params"_a, "device"_a, "stream"_a);
    m.def("attn_fwd", &launch_attn_fwd, no_gil(), "params"_a, "device"_a, "stream"_a);
    m.def("attn_bwd", &launch_attn_bwd, no_gil(), "params"_a, "device"_a, "stream"_a);
}
