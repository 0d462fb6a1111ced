// Forward: FP8 sliding-tile attention. One CTA per SM takes work items one by one: up to three query blocks that see
// the same keys (work_items.cuh).
//
//   warps           role      waits for        signals                                         registers
//   3 warpgroups    math      q_full, full     q_empty, empty                                   160
//   1 warp          queries   q_empty          q_full (with the copy engine's bytes)             32
//   1 warp          keys      q_full, empty    q_empty, full (with the copy engine's bytes)      32
//
// A math warpgroup owns one query block, 64 rows, and walks the key blocks of the item, 128 keys each. With
//   z = q8.k8 * s_q s_k scale log2(e)     P = 2^(z - m)     T = e4m3(448 P) v8
// a step computes O = O 2^(m_old - m) + T. The tensor core's accumulator keeps about 14 bits and truncates, so it adds
// up one step only; the sum over steps is in fp32. The output is O s_v / (448 l) with l = sum(P).
//
// m is an integer, at least the row's maximum so far. No step searches for the maximum: the sums of 448 P, which l
// needs anyway, show whether m is still large enough (see `exponentiate`).
#include <algorithm>
#include <cfloat>
#include <cute/tensor.hpp>
#include <numeric>

#include "fpsattention/fp8.cuh"
#include "fpsattention/fragments.cuh"
#include "fpsattention/hopper.cuh"
#include "fpsattention/launch.h"
#include "fpsattention/params.h"
#include "fpsattention/wgmma.cuh"
#include "fpsattention/work_items.cuh"

namespace fps {
namespace {

using namespace cute;
using E4M3 = cute::float_e4m3_t;

// 448 * 2^x is a finite float for x < 119. The margin covers the rounding of z and of the norms.
constexpr float kLargestExponent = 110.0f;
// E4M3 may enlarge an element by 1/17, and a score of two of them by (18/17)^2 = 1.121.
constexpr float kScoreGrowth = 1.14f;

template <int kHeadDim_>
struct FwdConfig {
    static constexpr int kHeadDim = kHeadDim_;
    static constexpr int kStages = 4, kQStages = 2;
    static constexpr int kWarpgroups = kBlocksPerItem, kMathThreads = 128 * kWarpgroups;
    static constexpr int kThreads = kMathThreads + 128;
    // Three warpgroups hide each other's waits; the SM has no registers for a fourth. The load warps give registers to
    // the math warps.
    static constexpr int kLoadRegisters = 32, kMathRegisters = 160;
    static_assert(128 * kLoadRegisters + kMathThreads * kMathRegisters <= kThreads * launch_registers(kThreads));
    static_assert(kHeadDim == 64 || kHeadDim == 128);

    using AtomRow = conditional_t<kHeadDim == 128, GMMA::Layout_K_SW128_Atom<E4M3>, GMMA::Layout_K_SW64_Atom<E4M3>>;
    using LayoutQ = decltype(tile_to_shape(AtomRow{}, Shape<Int<kQueryBlock>, Int<kHeadDim>>{}));
    using LayoutK = decltype(tile_to_shape(AtomRow{}, Shape<Int<kBlock>, Int<kHeadDim>>{}));
    using LayoutV = decltype(tile_to_shape(GMMA::Layout_K_SW128_Atom<E4M3>{}, Shape<Int<kHeadDim>, Int<kBlock>>{}));
    using AtomPV = conditional_t<kHeadDim == 128, SM90::GMMA::MMA_64x128x32_F32E4M3E4M3_RS_TN<>,
                                 SM90::GMMA::MMA_64x64x32_F32E4M3E4M3_RS_TN<>>;
    using MmaQK = decltype(make_tiled_mma(SM90::GMMA::MMA_64x128x32_F32E4M3E4M3_SS_TN<>{}));
    using MmaPV = decltype(make_tiled_mma(AtomPV{}));
};

// What one bulk copy brings: a packed block (params.h).
template <class Cfg>
struct PackedQ {
    E4M3 q[kQueryBlock * Cfg::kHeadDim];
    BlockMeta meta;
};
template <class Cfg>
struct PackedKV {
    E4M3 k[kBlock * Cfg::kHeadDim];
    E4M3 v[kBlock * Cfg::kHeadDim];
    BlockMeta meta;
};

template <class Cfg>
struct FwdSmem {
    struct alignas(1024) Stage {
        PackedKV<Cfg> block;
    };
    struct alignas(1024) Query {
        PackedQ<Cfg> block;
    };
    Stage stages[Cfg::kStages];
    Query queries[Cfg::kQStages][Cfg::kWarpgroups];
    Task tasks[Cfg::kQStages];
    Barrier q_full[Cfg::kQStages], q_empty[Cfg::kQStages], full[Cfg::kStages], empty[Cfg::kStages];

    static_assert(sizeof(PackedQ<Cfg>) == q_block_bytes(Cfg::kHeadDim));
    static_assert(sizeof(PackedKV<Cfg>) == kv_block_bytes(Cfg::kHeadDim));
};

// Queries warp: takes items and loads their queries. One lane does the work; the others follow it so that positions
// stay in uniform registers. All CTAs take items from one counter, one at a time: neighbours in space then run at the
// same time and share their keys in L2, and a CTA whose items were short takes more of them.
template <class Cfg>
__device__ void load_queries(const ForwardParams &p, FwdSmem<Cfg> &smem) {
    constexpr int kBytes = q_block_bytes(Cfg::kHeadDim);
    const TileGrid &g = p.geometry;
    const bool leads = threadIdx.x % 32 == 0;
    for (RingState<Cfg::kQStages> ring;;) {
        // Take an item.
        const int index = __shfl_sync(~0u, leads ? atomicAdd(p.next_item, 1) : 0, 0);
        const bool ends = index >= p.items;

        // Wait until the task of two items ago is no longer read.
        Task &task = smem.tasks[ring.stage()];
        Barrier &full = smem.q_full[ring.stage()];
        smem.q_empty[ring.stage()].wait(ring.empty_parity());
        fence_proxy_async();  // the math warps have read the metas of these queries

        // Load its query blocks and write its task.
        bool any = false;
        if (!ends) {
            const WorkItem item(p, index);
#pragma unroll 1
            for (int i = 0; i < kBlocksPerItem; ++i) {
                const QueryBlock query(p, item, i);
                any |= query.exists;
                if (leads) {
                    task.queries[i] = query;
                }
                if (leads && query.exists) {
                    const int64_t block = item.bh * (g.all_tiles() * (g.slot / kQueryBlock)) + query.block;
                    full.expect(kBytes);
                    bulk_load(&smem.queries[ring.stage()][i].block, p.q_blocks + block * kBytes, kBytes, full);
                }
            }
            if (leads) {
                task.item = item;
                task.n_key_blocks = item.n_key_blocks(g);
            }
        }

        // Publish it, unless it holds no token.
        if (any || ends) {
            if (leads) {
                task.index = index;
                full.arrive();
            }
            ring.next();
        }
        if (ends) {
            return;
        }
    }
}

// Keys warp: walks the keys of every item and keeps the ring of key blocks full.
template <class Cfg>
__device__ void load_keys(const ForwardParams &p, FwdSmem<Cfg> &smem) {
    constexpr int kBytes = kv_block_bytes(Cfg::kHeadDim);
    const TileGrid &g = p.geometry;
    const bool leads = threadIdx.x % 32 == 0;
    RingState<Cfg::kStages> ring;
    for (RingState<Cfg::kQStages> q_ring;; q_ring.next()) {
        // Wait for a task. It is worked out anew from its index: ptxas then knows that it is warp-uniform.
        smem.q_full[q_ring.stage()].wait(q_ring.full_parity());
        const int index = smem.tasks[q_ring.stage()].index;
        if (index >= p.items) {
            return;
        }
        const WorkItem item(p, __shfl_sync(~0u, index, 0));
        smem.q_empty[q_ring.stage()].arrive_as_warp();

        for_each_key_block(g, item, [&](int block) {
            // Wait for an empty stage.
            Barrier &full = smem.full[ring.stage()];
            smem.empty[ring.stage()].wait(ring.empty_parity());

            // Load K, V and their meta.
            if (leads) {
                fence_proxy_async();  // the math warps have read the meta of this stage
                const uint8_t *packed = p.kv_blocks + (item.bh * g.blocks() + block) * kBytes;
                full.expect(kBytes);
                full.arrive();
                bulk_load(&smem.stages[ring.stage()].block, packed, kBytes, full);
            }
            __syncwarp();  // a lane left behind could miss a phase
            ring.next();
        });
    }
}

// Sum and maximum over the four lanes of a quad, which together hold a row.
__device__ __forceinline__ float quad_sum(float x) {
    x += __shfl_xor_sync(~0u, x, 1);
    return x + __shfl_xor_sync(~0u, x, 2);
}
__device__ __forceinline__ float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
    return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

// A thread's two rows: m (an integer, log2 domain), l (times 448, over the thread's own columns), and the power of two
// by which the current step shrinks O and l.
struct RowState {
    float m[2] = {-INFINITY, -INFINITY}, l[2] = {0, 0}, shrink[2];
};

// Element (row r, own column c) of S. A thread holds it as groups of 8 columns, then rows, then pairs of columns.
template <class TensorS>
__device__ __forceinline__ auto &at(TensorS &s, int r, int c) {
    return s(c % 2 + 2 * r + c / 2 * 4);
}
constexpr int kOwnColumns = kBlock / 4;  // columns of a row that one thread holds

// Set the scores of padding keys to -inf, in own columns from kFirst on. Padding keys come last.
template <int kFirst, class TensorS>
__device__ __forceinline__ void mask(TensorS &s, int valid) {
    const int lane = threadIdx.x % 4;
#pragma unroll
    for (int c = kFirst; c < kOwnColumns; ++c) {
        // Own column c is key c / 2 * 8 + 2 * lane + c % 2. Written otherwise, ptxas keeps a register for each column.
        const bool padding = 2 * lane >= valid - (c / 2 * 8 + c % 2);
        at(s, 0, c) = padding ? -INFINITY : at(s, 0, c);
        at(s, 1, c) = padding ? -INFINITY : at(s, 1, c);
    }
}

// Raises m to the maximum of these scores.
template <class TensorS>
__device__ __forceinline__ void cover_max(const TensorS &s, RowState &row, float scale_log2) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        float top = -INFINITY;
#pragma unroll
        for (int c = 0; c < kOwnColumns; ++c) {
            top = fmaxf(top, at(s, r, c));
        }
        const float m = fmaxf(row.m[r], ceilf(quad_max(top) * scale_log2));
        row.shrink[r] = exp2_approx(row.m[r] - m);
        row.m[r] = m;
    }
}

// 448 P to E4M3, in the A operand's register order (see permuted_token).
template <class TensorS, class TensorP>
__device__ __forceinline__ void pack_p(const TensorS &s, TensorP &p) {
    Tensor words = recast<uint32_t>(p);
#pragma unroll
    for (int g = 0; g < kOwnColumns / 4; ++g) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int i = 8 * g + 2 * r;
            words(2 * g + r) = pack_e4m3(s(i), s(i + 1), s(i + 4), s(i + 5));
        }
    }
}

// S to 448 P in place, and to P in E4M3; adds to l.
//
// E4M3 holds at most 448. A thread adds up its columns of a row in two sums of 16. If both are at most 448, so is every
// column: that is almost always the case. Otherwise m of the row grows until the largest sum lies in (112, 224], and
// all that was computed with the smaller m shrinks, exactly, by a power of two.
template <class TensorS, class TensorP>
__device__ __forceinline__ void exponentiate(TensorS &s, TensorP &p, RowState &row, float scale_log2) {
    float sums[2][2] = {};
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const float offset = kLog2P - row.m[r];
#pragma unroll
        for (int c = 0; c < kOwnColumns; ++c) {
            at(s, r, c) = exp2_approx(fmaf(at(s, r, c), scale_log2, offset));
            sums[r][c % 2] += at(s, r, c);
        }
    }
    pack_p(s, p);
    const float top[2] = {fmaxf(sums[0][0], sums[0][1]), fmaxf(sums[1][0], sums[1][1])};
    float sum[2] = {sums[0][0] + sums[0][1], sums[1][0] + sums[1][1]};
    if (__any_sync(~0u, fmaxf(top[0], top[1]) > kE4M3Max)) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            // m grows by ceil(log2(row_top)) + 1, but not if row_top is NaN or Inf. The exponent bits of the next
            // smaller float are ceil(log2(row_top)) + 126.
            const float row_top = quad_max(top[r]) * (1.0f / kE4M3Max);
            const int by = row_top > 1.0f && row_top < INFINITY ? ((__float_as_int(row_top) - 1) >> 23) - 125 : 0;
            const float shrink = __int_as_float((127 - by) << 23);
            row.m[r] += by;
            row.shrink[r] *= shrink;
            sum[r] *= shrink;
#pragma unroll
            for (int c = 0; c < kOwnColumns; ++c) {
                at(s, r, c) *= shrink;
            }
        }
        pack_p(s, p);
    }
    row.l[0] = fmaf(row.l[0], row.shrink[0], sum[0]);
    row.l[1] = fmaf(row.l[1], row.shrink[1], sum[1]);
}

// Stores O s_v / l in raster order, and LSE.
template <class Cfg, class T, class TensorO>
__device__ void store(const ForwardParams &p, const WorkItem &item, const QueryBlock &block, TensorO &o,
                      const RowState &row) {
    const TileGrid &g = p.geometry;
    const int thread = opaque(threadIdx.x) % 128, lane = thread % 4;
    const float l[2] = {quad_sum(row.l[0]), quad_sum(row.l[1])};
    const float inverse[2] = {__fdiv_rn(1.0f, l[0]), __fdiv_rn(1.0f, l[1])};
    const float *v_amax = p.v_amax + item.bh * Cfg::kHeadDim;
#pragma unroll
    for (int j = 0; j < Cfg::kHeadDim / 8; ++j) {
        const float2 amax = __ldg(reinterpret_cast<const float2 *>(v_amax + 8 * j + 2 * lane));
        const float scale[2] = {dequant_scale(amax.x), dequant_scale(amax.y)};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            o(4 * j + i) = o(4 * j + i) * inverse[i / 2] * scale[i % 2];
        }
    }
    const int first = block.first_row + fragment_row(thread);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const bool valid = first + 8 * r < block.rows.valid();
        const int64_t token = valid ? g.token(block.rows, first + 8 * r) : 0;
        T *out = static_cast<T *>(p.out) + p.out_strides.offset(item.batch, item.head, token);
        store_row<T, Cfg::kHeadDim>(out, valid, r, lane, [&](int i) { return o(i); });
        if (valid && lane == 0 && p.lse != nullptr) {
            const int64_t at = item.bh * g.tokens() + token;
            p.lse[at] = kLn2 * (row.m[r] + log2f(l[r]) - kLog2P) + (p.lse_shift == nullptr ? 0.0f : p.lse_shift[at]);
        }
    }
}

// S to P. With `exactly`, m is raised to the maximum of these scores first.
template <class TensorS, class TensorP>
__device__ __forceinline__ void softmax(TensorS &s, TensorP &p, RowState &row, float q_scale_log2,
                                        const BlockMeta &meta, bool exactly) {
    // Above zero, because padding's score is -inf, and 0 times that would be NaN.
    const float scale_log2 = fmaxf(q_scale_log2 * meta.scale, FLT_MIN);
    row.shrink[0] = row.shrink[1] = 1.0f;
    // Nearly all padded blocks have padding among the last 8 keys only: no branch for those.
    mask<kOwnColumns - 2>(s, meta.valid);
    if (meta.valid <= kBlock - 8) {
        mask<0>(s, meta.valid);
    }
    if (exactly) {
        cover_max(s, row, scale_log2);
    }
    exponentiate(s, p, row, scale_log2);
}

// Whether an exponential of this item might overflow before m grows: its scores may lie very far apart.
__device__ __forceinline__ bool may_overflow(const ForwardParams &p, int64_t bh, const RowState &row) {
    const float2 norms = __ldg(reinterpret_cast<const float2 *>(p.norms) + bh);
    const float bound = kScoreGrowth * norms.x * norms.y * p.scale * kLog2E;
    return __any_sync(~0u, !(bound - fminf(row.m[0], row.m[1]) < kLargestExponent));
}

// O = O shrink + T, for the completed T.
template <class TensorO, class TensorT>
__device__ __forceinline__ void add_to_o(TensorO &o, const TensorT &t, const RowState &row) {
#pragma unroll
    for (int i = 0; i < size(t); ++i) {
        o(i) = fmaf(o(i), row.shrink[i / 2 % 2], t(i));
    }
}

// T's fragment. At D 128 it shares S's registers: neither lives while the other is computed.
template <class Cfg, class TensorS, class TensorO>
__device__ auto fragment_of_t(TensorS &s, const TensorO &o) {
    if constexpr (Cfg::kHeadDim == 128) {
        return make_tensor(s.data(), o.layout());
    } else {
        return make_fragment_like(o);
    }
}

// Releases the key blocks of an item in which this warpgroup has no queries.
template <class Cfg>
__device__ __forceinline__ void skip_keys(FwdSmem<Cfg> &smem, RingState<Cfg::kStages> &ring, int blocks) {
    for (; blocks > 0; --blocks, ring.next()) {
        smem.full[ring.stage()].wait(ring.full_parity());
        smem.empty[ring.stage()].arrive_as_warp();
    }
}

// Math warpgroup `warpgroup` attends for query block `warpgroup` of every item.
template <class Cfg, class T>
__device__ void math(const ForwardParams &p, FwdSmem<Cfg> &smem, int warpgroup) {
    // Operands in shared memory. Their last mode is the stage.
    using MmaQK = typename Cfg::MmaQK;
    using MmaPV = typename Cfg::MmaPV;
    constexpr int kQStride = sizeof(smem.queries[0]), kStride = sizeof(smem.stages[0]);
    auto &queries = smem.queries[0][warpgroup].block;
    auto &keys = smem.stages[0].block;
    Tensor rQ = operand_a<MmaQK>(smem_tensor(queries.q, ring_of<Cfg::kQStages, kQStride>(typename Cfg::LayoutQ{})));
    Tensor rK = operand_b<MmaQK>(smem_tensor(keys.k, ring_of<Cfg::kStages, kStride>(typename Cfg::LayoutK{})));
    Tensor rV = operand_b<MmaPV>(smem_tensor(keys.v, ring_of<Cfg::kStages, kStride>(typename Cfg::LayoutV{})));

    // Fragments in registers.
    FragmentC<MmaQK, kQueryBlock, kBlock> rS;
    FragmentA<E4M3, MmaPV, kQueryBlock, kBlock> rP;
    FragmentC<MmaPV, kQueryBlock, Cfg::kHeadDim> rO;
    Tensor rT = fragment_of_t<Cfg>(rS, rO);

    RingState<Cfg::kStages> ring;
    for (RingState<Cfg::kQStages> q_ring;; q_ring.next()) {
        // Wait for Q
        const int q_stage = q_ring.stage();
        smem.q_full[q_stage].wait(q_ring.full_parity());
        const Task &task = smem.tasks[q_stage];
        if (task.index >= p.items) {
            return;
        }
        int left = task.n_key_blocks;  // key blocks whose S is not issued yet
        if (!task.queries[warpgroup].exists) {
            smem.q_empty[q_stage].arrive_as_warp();
            skip_keys(smem, ring, left);
            continue;
        }
        const float q_scale_log2 = smem.queries[q_stage][warpgroup].block.meta.scale * p.scale * kLog2E;
        RowState row;
        clear(rO);

        // First key block: S = Q K^T, and softmax from its maxima.
        smem.full[ring.stage()].wait(ring.full_parity());
        BlockMeta meta = smem.stages[ring.stage()].block.meta;
        issue<MmaQK>(rQ(_, _, _, q_stage), rK(_, _, _, ring.stage()), rS, Sum::kFromZero);
        wait_for_products<0>(rS);
        softmax(rS, rP, row, q_scale_log2, meta, true);
        const bool careful = may_overflow(p, task.item.bh, row);

        while (--left > 0) {
            // Issue T = P V.
            warpgroup_fence_operand(rP);
            issue<MmaPV>(rP, rV(_, _, _, ring.stage()), rT, Sum::kFromZero);
            Barrier &read = smem.empty[ring.stage()];
            ring.next();

            // Wait for the next K and V.
            smem.full[ring.stage()].wait(ring.full_parity());
            meta = smem.stages[ring.stage()].block.meta;

            // Wait for T. O = O shrink + T.
            wait_for_products<0>(rT);
            add_to_o(rO, rT, row);

            // Release the stage.
            read.arrive_as_warp();

            // Issue S = Q K^T and wait for it.
            issue<MmaQK>(rQ(_, _, _, q_stage), rK(_, _, _, ring.stage()), rS, Sum::kFromZero);
            wait_for_products<0>(rS);

            // Softmax: S to P.
            softmax(rS, rP, row, q_scale_log2, meta, careful);
        }

        // Last key block: T = P V, added to O. Release the stage.
        warpgroup_fence_operand(rP);
        issue<MmaPV>(rP, rV(_, _, _, ring.stage()), rT, Sum::kFromZero);
        wait_for_products<0>(rT);
        add_to_o(rO, rT, row);
        smem.empty[ring.stage()].arrive_as_warp();
        ring.next();

        // Store O and LSE. Release Q.
        store<Cfg, T>(p, task.item, task.queries[warpgroup], rO, row);
        smem.q_empty[q_stage].arrive_as_warp();
    }
}

template <class Cfg, class T>
__global__ void __launch_bounds__(Cfg::kThreads, 1)
    attn_fwd_sm90(const __grid_constant__ Deferred<ForwardParams> deferred) {
    const ForwardParams &p = deferred.after_previous();
    extern __shared__ char smem_bytes[];
    auto &smem = *reinterpret_cast<FwdSmem<Cfg> *>(smem_bytes + bytes_to_alignment(smem_bytes));
    if (threadIdx.x == 0) {
        for (int s = 0; s < Cfg::kQStages; ++s) {
            smem.q_full[s].init(1);
            smem.q_empty[s].init(Cfg::kMathThreads / 32 + 1);  // every warp that reads the task
        }
        for (int s = 0; s < Cfg::kStages; ++s) {
            smem.full[s].init(1);
            smem.empty[s].init(Cfg::kMathThreads / 32);
        }
        fence_barrier_init();
    }
    __syncthreads();
    if (threadIdx.x < Cfg::kMathThreads) {
        claim_registers<Cfg::kMathRegisters>();
        const int warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0);  // warp-uniform, for the descriptors' sake
        math<Cfg, T>(p, smem, warpgroup);
    } else {
        release_registers<Cfg::kLoadRegisters>();
        const int warp = __shfl_sync(~0u, (threadIdx.x - Cfg::kMathThreads) / 32, 0);
        if (warp == 0) {
            load_queries<Cfg>(p, smem);
        } else if (warp == 1) {
            load_keys<Cfg>(p, smem);
        }
    }
}

}  // namespace

void attn_fwd(ForwardParams p, cudaStream_t stream) {
    const TileGrid &g = p.geometry;
    const Int3 group = g.tile_group(p.windows, p.n_windows);
    std::iota(p.group_axis, p.group_axis + 3, 0);
    std::stable_partition(p.group_axis, p.group_axis + 3, [&](int axis) { return g.grid[axis] % g.tile[axis] == 0; });
    for (int i = 0; i < 3; ++i) {
        p.group_size[i] = group[p.group_axis[i]];
    }
    p.tiles_per_group = group.volume();
    p.groups = p.tiles_per_group > 0 ? g.tiles / group : Int3{1, 1, 1};  // there may be text tokens only
    p.n_groups = p.groups.volume();
    p.items_per_group = ceil_div(p.tiles_per_group * (g.slot / kQueryBlock), kBlocksPerItem);
    p.text_items_per_head = ceil_div(g.text.blocks(kQueryBlock), kBlocksPerItem);
    p.text_items = p.batch * p.heads * p.text_items_per_head;
    p.items = p.text_items + p.batch * p.heads * p.n_groups * p.items_per_group;

    int device, sm_count;
    FPS_CUDA_CHECK(cudaGetDevice(&device));
    FPS_CUDA_CHECK(cudaDeviceGetAttribute(&sm_count, cudaDevAttrMultiProcessorCount, device));
    dispatch(p.head_dim, p.dtype, [&](auto dim, auto element) {
        using Cfg = FwdConfig<decltype(dim)::value>;
        constexpr int kSmemBytes = dynamic_smem_bytes<FwdSmem<Cfg>>();
        launch(attn_fwd_sm90<Cfg, decltype(element)>, dim3(std::min(p.items, sm_count)), Cfg::kThreads, kSmemBytes,
               stream, p);
    });
}

}  // namespace fps
