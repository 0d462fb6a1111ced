// Forward: FP8 sliding-tile attention. A CTA per SM takes work items (batch, head, 128-row query block) in turn.
//
//   warps                     role    waits for              signals                               registers
//   2 warpgroups per tenant   math    q_full, stage full     q_empty, stage empty                  240 (D 64: 112)
//   1 warpgroup               load    q_empty, stage empty   q_full, stage full (the copy engine)   24 (D 64: 32)
//
// Each math warpgroup owns 64 query rows and walks the keys in steps. Per step it computes, in the log2 domain,
//   z = q8.k8 * s_q s_k scale log2(e)     m = ceil(running row max of z)     P = 2^(z - m)     T = e4m3(448 P) v8
// and O = O 2^(m_old - m) + T: the tensor core, whose accumulator keeps about 14 bits and truncates, adds up one step
// only; the sum over steps is full fp32. In the end O s_v / (448 l), l = sum(P).
#include <algorithm>
#include <cute/tensor.hpp>

#include "fpsattention/fp8.cuh"
#include "fpsattention/hopper.cuh"
#include "fpsattention/launch.h"
#include "fpsattention/params.h"

namespace fps {
namespace {

using namespace cute;
using E4M3 = cute::float_e4m3_t;

constexpr float kLog2E = 1.44269504088896341f;
constexpr float kLn2 = 0.69314718055994531f;
constexpr float kLog2P = 8.80735492205760410f;  // log2(448): P is scaled to E4M3's range

template <int kHeadDim_>
struct FwdConfig {
    static constexpr int kHeadDim = kHeadDim_;
    // A tenant is a pair of math warpgroups with its own work items and its own key ring. D 128 needs the registers of
    // the whole SM for one, whose PV runs beside the next step's softmax. D 64 spends twice as long in softmax per
    // tensor operation: there two tenants, with half-block steps and no such overlap, hide each other's latencies.
    static constexpr int kTenants = kHeadDim == 128 ? 1 : 2;
    static constexpr bool kOverlapPV = kTenants == 1, kTakeTurns = kTenants == 1;
    static constexpr int kStep = kTenants == 1 ? 128 : 64;  // keys per softmax step
    static constexpr int kStepsPerBlock = kBlock / kStep;
    static constexpr int kStages = 4;
    static constexpr int kMathWarpgroups = 2, kRows = 64;  // of one tenant; rows of one warpgroup
    static constexpr int kTenantThreads = 128 * kMathWarpgroups, kMathThreads = kTenants * kTenantThreads;
    static constexpr int kThreads = kMathThreads + 128;
    static constexpr int kLoadRegisters = kTenants == 1 ? 24 : 32, kMathRegisters = kTenants == 1 ? 240 : 112;
    // At launch every warp has as many, in multiples of 8; then the load warps give theirs up to the math warps.
    static constexpr int kLaunchRegisters = 64 * 1024 / kThreads / 8 * 8;
    static_assert(128 * kLoadRegisters + kMathThreads * kMathRegisters <= kThreads * kLaunchRegisters);
    static_assert(kRows * kMathWarpgroups == kBlock && kBlock % kStep == 0);

    using AtomRow = conditional_t<kHeadDim == 128, GMMA::Layout_K_SW128_Atom<E4M3>, GMMA::Layout_K_SW64_Atom<E4M3>>;
    using LayoutQ = decltype(tile_to_shape(AtomRow{}, Shape<Int<kRows>, Int<kHeadDim>>{}));
    using LayoutK = decltype(tile_to_shape(AtomRow{}, Shape<Int<kStep>, Int<kHeadDim>>{}));
    using LayoutV = decltype(tile_to_shape(GMMA::Layout_K_SW128_Atom<E4M3>{}, Shape<Int<kHeadDim>, Int<kBlock>>{}));
    using AtomQK = conditional_t<kStep == 128, SM90::GMMA::MMA_64x128x32_F32E4M3E4M3_SS_TN<>,
                                 SM90::GMMA::MMA_64x64x32_F32E4M3E4M3_SS_TN<>>;
    using AtomPV = conditional_t<kHeadDim == 128, SM90::GMMA::MMA_64x128x32_F32E4M3E4M3_RS_TN<>,
                                 SM90::GMMA::MMA_64x64x32_F32E4M3E4M3_RS_TN<>>;
    using MmaQK = decltype(make_tiled_mma(AtomQK{}));
    using MmaPV = decltype(make_tiled_mma(AtomPV{}));
};

// What one bulk copy brings: the images of params.h.
template <class Cfg>
struct QBlock {
    E4M3 q[kBlock * Cfg::kHeadDim];
    BlockMeta meta;
};
template <class Cfg>
struct KVBlock {
    E4M3 k[kBlock * Cfg::kHeadDim];
    E4M3 v[kBlock * Cfg::kHeadDim];
    BlockMeta meta;
};

template <class Cfg>
struct FwdSmem {
    struct alignas(1024) Stage {
        KVBlock<Cfg> block;
    };
    alignas(1024) QBlock<Cfg> q;
    Stage stages[Cfg::kStages];
    Barrier q_full, q_empty, full[Cfg::kStages], empty[Cfg::kStages];

    static_assert(sizeof(QBlock<Cfg>) == q_block_bytes(Cfg::kHeadDim));
    static_assert(sizeof(KVBlock<Cfg>) == kv_block_bytes(Cfg::kHeadDim));
};

// One query block of one head and the box of key tiles it sees.
struct WorkItem {
    int batch, head, block, in_tile;
    int64_t bh;
    Int3 tile, extent;
    TileBox keys;

    __device__ WorkItem(const ForwardParams &p, int index) {
        const TileGrid &g = p.geometry;
        bh = index / g.blocks();
        block = index % g.blocks();
        batch = bh / p.heads;
        head = bh % p.heads;
        in_tile = block % g.blocks_per_tile() * kBlock;
        tile = g.tile_coord(block / g.blocks_per_tile());
        extent = g.extent(tile);
        keys = g.keys_of(tile, p.windows[p.n_windows == 1 ? 0 : head], p.border);
    }
    __device__ bool has_tokens() const { return in_tile < extent.volume(); }
};

// The items of one tenant: every kTenants * gridDim.x-th, so that neighbours in space run at the same time.
template <class Cfg, class F>
__device__ __forceinline__ void for_each_item(const ForwardParams &p, int tenant, F &&f) {
    for (int index = blockIdx.x * Cfg::kTenants + tenant; index < p.items; index += gridDim.x * Cfg::kTenants) {
        const WorkItem item(p, index);
        if (item.has_tokens()) {
            f(item, index);
        }
    }
}

// One thread walks every item's box and keeps the ring of key blocks full.
template <class Cfg>
__device__ void load(const ForwardParams &p, FwdSmem<Cfg> &smem, int tenant) {
    constexpr int kQBytes = q_block_bytes(Cfg::kHeadDim), kKVBytes = kv_block_bytes(Cfg::kHeadDim);
    const TileGrid &g = p.geometry;
    RingState<1> q_ring;
    RingState<Cfg::kStages> ring;
    for_each_item<Cfg>(p, tenant, [&](const WorkItem &item, int) {
        smem.q_empty.wait(q_ring.empty_parity());
        smem.q_full.arrive_expecting(kQBytes);
        bulk_load(&smem.q, p.q_blocks + (item.bh * g.blocks() + item.block) * kQBytes, kQBytes, smem.q_full);
        q_ring.next();

        const uint8_t *head_blocks = p.kv_blocks + item.bh * g.blocks() * kKVBytes;
        for (int t = item.keys.t.lo; t < item.keys.t.hi; ++t) {
            for (int h = item.keys.h.lo; h < item.keys.h.hi; ++h) {
                for (int w = item.keys.w.lo; w < item.keys.w.hi; ++w) {
                    const Int3 tile{t, h, w};
                    const int blocks = ceil_div(g.extent(tile).volume(), kBlock);
                    const uint8_t *from = head_blocks + int64_t(g.tile_index(tile)) * g.blocks_per_tile() * kKVBytes;
                    for (int b = 0; b < blocks; ++b, ring.next()) {
                        smem.empty[ring.stage()].wait(ring.empty_parity());
                        smem.full[ring.stage()].arrive_expecting(kKVBytes);
                        bulk_load(&smem.stages[ring.stage()].block, from + b * kKVBytes, kKVBytes,
                                  smem.full[ring.stage()]);
                    }
                }
            }
        }
    });
}

// Hides from the compiler that x is unchanged.
__device__ __forceinline__ int opaque(int x) {
    asm volatile("" : "+r"(x));
    return x;
}

// Four 4-byte words per lane of a quad, transposed: lane c ends up with word c of every lane, in lane order.
__device__ __forceinline__ void transpose_quad(uint32_t (&x)[4]) {
    const int lane = threadIdx.x;
#pragma unroll
    for (int k = 0; k < 4; k += 2) {
        const uint32_t got = __shfl_xor_sync(~0u, lane & 1 ? x[k] : x[k + 1], 1);
        (lane & 1 ? x[k] : x[k + 1]) = got;
    }
#pragma unroll
    for (int k = 0; k < 2; ++k) {
        const uint32_t got = __shfl_xor_sync(~0u, lane & 2 ? x[k] : x[k + 2], 2);
        (lane & 2 ? x[k] : x[k + 2]) = got;
    }
}

__device__ __forceinline__ float quad_sum(float x) {
    x += __shfl_xor_sync(~0u, x, 1);
    return x + __shfl_xor_sync(~0u, x, 2);
}

// By which powers of two the accumulated sums of a thread's two rows shrink when their maxima move: two biased
// exponents, 8 bits each.
struct Shrink {
    uint32_t bits;

    __device__ static Shrink from(float exponent0, float exponent1) {
        return {biased(exponent0) | biased(exponent1) << 8};
    }
    __device__ float row(int r) const { return __uint_as_float((bits >> 8 * r & 0xff) << 23); }

private:
    __device__ static uint32_t biased(float exponent) { return max(__float2int_rn(exponent), -127) + 127; }
};

// Those of the last two steps, in one register.
struct ShrinkPair {
    uint32_t bits = 0;

    __device__ void push(Shrink s) { bits = bits << 16 | s.bits; }
    __device__ Shrink last() const { return {bits & 0xffff}; }
    __device__ Shrink older() const { return {bits >> 16}; }
};

// The two rows of a thread: m (integer, log2 domain) and l (its own columns' share, times 448).
struct RowState {
    float m[2] = {-INFINITY, -INFINITY}, l[2] = {0, 0};
};

// Element (row r, column c) of this thread's share of S: column pairs, then rows, then groups of 8 columns.
template <class TensorS>
__device__ __forceinline__ float &at(TensorS &s, int r, int c) {
    return s(c % 2 + 2 * r + c / 2 * 4);
}
template <class TensorS>
constexpr int kColumns = decltype(size(TensorS{}))::value / 2;  // of each row, in one thread

// Padding keys, which come last, score -inf. Most steps have none, most others only a few.
template <class TensorS>
__device__ __forceinline__ void mask(TensorS &s, int valid) {
    constexpr int kAll = kColumns<TensorS>, kFew = 4;
    const auto mask_columns = [&](int first, int last) {
#pragma unroll
        for (int c = first; c < last; ++c) {
            const bool padding = c / 2 * 8 + int(threadIdx.x) % 4 * 2 + c % 2 >= valid;
            at(s, 0, c) = padding ? -INFINITY : at(s, 0, c);
            at(s, 1, c) = padding ? -INFINITY : at(s, 1, c);
        }
    };
    if (valid < 4 * kAll) {
        mask_columns(kAll - kFew, kAll);
        if (valid < 4 * (kAll - kFew)) {
            mask_columns(0, kAll - kFew);
        }
    }
}

// The new integer maxima of a thread's rows; a row lives in the four lanes of a quad. A three-way integer maximum takes
// two new inputs an instruction, a float one takes one; the floats' bits compare as integers as long as the maximum is
// not negative. If it is, and the row has seen no larger one, the floats are compared after all.
template <class TensorS>
__device__ __forceinline__ Shrink update_max(TensorS &s, RowState &row, float scale_log2) {
    constexpr int kChains = 4;  // independent ones
    int bits[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        int chain[kChains];
#pragma unroll
        for (int c = 0; c < kColumns<TensorS>; c += 2 * kChains) {
#pragma unroll
            for (int i = 0; i < kChains; ++i) {
                const int x = __float_as_int(at(s, r, c + i)), y = __float_as_int(at(s, r, c + i + kChains));
                chain[i] = c == 0 ? max(x, y) : max(max(chain[i], x), y);
            }
        }
        bits[r] = max(max(chain[0], chain[1]), max(chain[2], chain[3]));
    }
#pragma unroll
    for (int lane = 1; lane <= 2; ++lane) {
        bits[0] = max(bits[0], __shfl_xor_sync(~0u, bits[0], lane));
        bits[1] = max(bits[1], __shfl_xor_sync(~0u, bits[1], lane));
    }
    float top[2] = {__int_as_float(bits[0]), __int_as_float(bits[1])};
    if (__any_sync(~0u, (bits[0] < 0 && row.m[0] < 0) || (bits[1] < 0 && row.m[1] < 0))) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            top[r] = at(s, r, 0);
#pragma unroll
            for (int c = 1; c < kColumns<TensorS>; ++c) {
                top[r] = fmaxf(top[r], at(s, r, c));
            }
            top[r] = fmaxf(top[r], __shfl_xor_sync(~0u, top[r], 1));
            top[r] = fmaxf(top[r], __shfl_xor_sync(~0u, top[r], 2));
        }
    }
    const float m[2] = {fmaxf(row.m[0], ceilf(top[0] * scale_log2)), fmaxf(row.m[1], ceilf(top[1] * scale_log2))};
    const Shrink shrink = Shrink::from(row.m[0] - m[0], row.m[1] - m[1]);
    row.m[0] = m[0];
    row.m[1] = m[1];
    return shrink;
}

// S becomes 448 P in place, and l grows.
template <class TensorS>
__device__ __forceinline__ void exponentiate(TensorS &s, RowState &row, Shrink shrink, float scale_log2) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const float offset = kLog2P - row.m[r];
        float sum[2] = {};
#pragma unroll
        for (int c = 0; c < kColumns<TensorS>; ++c) {
            at(s, r, c) = exp2_approx(fmaf(at(s, r, c), scale_log2, offset));
            sum[c % 2] += at(s, r, c);
        }
        row.l[r] = fmaf(row.l[r], shrink.row(r), sum[0] + sum[1]);
    }
    // NOTE(perf): l is never negative. A wait for the tensor core that follows must not move up past the exponentials,
    // or PV would no longer run beside them.
    nanosleep_if(row.l[0] + row.l[1] < 0);
}

// 448 P to E4M3, in the A operand's register order (see permuted_token).
template <class TensorS, class TensorP>
__device__ __forceinline__ void pack_p(const TensorS &s, TensorP &p) {
    Tensor words = recast<uint32_t>(p);
#pragma unroll
    for (int g = 0; g < kColumns<TensorS> / 4; ++g) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int i = 8 * g + 2 * r;
            words(2 * g + r) = pack_e4m3(s(i), s(i + 1), s(i + 4), s(i + 5));
        }
    }
}

// O s_v / l in raster order, and LSE. A quad holds 8 consecutive columns of a row, two per lane; transposing four such
// groups gives each lane 16 contiguous bytes.
template <class Cfg, class T, class TensorO>
__device__ void store(const ForwardParams &p, const WorkItem &item, TensorO &o, RowState &row) {
    const TileGrid &g = p.geometry;
    const int thread = opaque(threadIdx.x) % Cfg::kTenantThreads, lane = thread % 4;
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
    const int first = item.in_tile + thread / 32 * 16 + thread % 32 / 4;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const bool valid = first + 8 * r < item.extent.volume();
        const int64_t token = valid ? g.token(item.tile, item.extent, first + 8 * r) : 0;
        T *out = static_cast<T *>(p.out) + item.batch * p.out_strides.batch + item.head * p.out_strides.head +
                 token * p.out_strides.token;
#pragma unroll
        for (int j = 0; j < Cfg::kHeadDim / 8; j += 4) {
            uint32_t words[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                words[i] = downcast<T>(o(4 * (j + i) + 2 * r), o(4 * (j + i) + 2 * r + 1));
            }
            transpose_quad(words);
            if (valid) {
                *reinterpret_cast<uint4 *>(out + 8 * (j + lane)) = {words[0], words[1], words[2], words[3]};
            }
        }
        if (valid && lane == 0) {
            const int64_t at = item.bh * g.tokens() + token;
            p.lse[at] = kLn2 * (row.m[r] + log2f(l[r]) - kLog2P) + (p.lse_shift == nullptr ? 0.0f : p.lse_shift[at]);
        }
    }
}

template <class Cfg, class T>
__device__ void math(const ForwardParams &p, FwdSmem<Cfg> &smem, int tenant, int warpgroup) {
    const int thread = threadIdx.x % 128;
    constexpr auto kWithStages = [](auto layout) {
        return make_composed_layout(layout.layout_a(), layout.offset(),
                                    append(append(layout.layout_b(), make_layout(Int<Cfg::kStepsPerBlock>{},
                                                                                 Int<Cfg::kStep * Cfg::kHeadDim>{})),
                                           make_layout(Int<Cfg::kStages>{}, Int<sizeof(smem.stages[0])>{})));
    };
    Tensor sQ = make_tensor(make_smem_ptr(smem.q.q + warpgroup * Cfg::kRows * Cfg::kHeadDim), typename Cfg::LayoutQ{});
    Tensor sK = make_tensor(make_smem_ptr(smem.stages[0].block.k), kWithStages(typename Cfg::LayoutK{}));
    Tensor sV = make_tensor(make_smem_ptr(smem.stages[0].block.v), kWithStages(typename Cfg::LayoutV{}))(_, _, 0, _);
    typename Cfg::MmaQK mma_qk;
    typename Cfg::MmaPV mma_pv;
    const auto thr_qk = mma_qk.get_slice(thread);
    const auto thr_pv = mma_pv.get_slice(thread);
    Tensor rQ = thr_qk.partition_fragment_A(sQ);  // shared-memory descriptors
    Tensor rK = thr_qk.partition_fragment_B(sK);
    Tensor rV = thr_pv.partition_fragment_B(sV);
    Tensor rS = partition_fragment_C(mma_qk, Shape<Int<Cfg::kRows>, Int<Cfg::kStep>>{});
    Tensor rP = make_tensor<E4M3>(partition_shape_A(mma_pv, Shape<Int<Cfg::kRows>, Int<Cfg::kStep>>{}));
    Tensor rT = partition_fragment_C(mma_pv, Shape<Int<Cfg::kRows>, Int<Cfg::kHeadDim>>{});
    Tensor rO = make_fragment_like(rT);

    const auto issue_qk = [&](int stage, int step_in_block) {
        warpgroup_fence_operand(rS);
        warpgroup_arrive();
        mma_qk.accumulate_ = GMMA::ScaleOut::Zero;
#pragma unroll
        for (int k = 0; k < size<2>(rQ); ++k) {
            gemm(mma_qk, rQ(_, _, k), rK(_, _, k, step_in_block, stage), rS);
            mma_qk.accumulate_ = GMMA::ScaleOut::One;
        }
        warpgroup_commit_batch();
    };
    const auto issue_pv = [&](int stage, int step_in_block) {
        warpgroup_fence_operand(rT);
        warpgroup_arrive();
        mma_pv.accumulate_ = GMMA::ScaleOut::Zero;
#pragma unroll
        for (int k = 0; k < size<2>(rP); ++k) {
            gemm(mma_pv, rP(_, _, k), rV(_, _, step_in_block * size<2>(rP) + k, stage), rT);
            mma_pv.accumulate_ = GMMA::ScaleOut::One;
        }
        warpgroup_commit_batch();
    };

    // The two warpgroups take turns at the exponentials: side by side they would each wait for the unit half of the
    // time, and then both leave it idle.
    const auto wait_turn = [&] {
        if constexpr (Cfg::kTakeTurns) {
            named_barrier_sync(1 + warpgroup, Cfg::kTenantThreads);
        }
    };
    const auto pass_turn = [&] {
        if constexpr (Cfg::kTakeTurns) {
            named_barrier_arrive(1 + (warpgroup ^ 1), Cfg::kTenantThreads);
        }
    };
    if (warpgroup == 1) {
        pass_turn();
    }
    RingState<1> q_ring;
    RingState<Cfg::kStages> ring;
    for_each_item<Cfg>(p, tenant, [&](const WorkItem &item, int index) {
        const int n_blocks = p.geometry.valid_blocks(item.keys);
        RowState row;
        clear(rO);
        smem.q_full.wait(q_ring.full_parity());
        const float q_scale_log2 = smem.q.meta.scale * p.scale * kLog2E;
        BlockMeta meta;
        const auto wait_for_stage = [&] {
            smem.full[ring.stage()].wait(ring.full_parity());
            meta = smem.stages[ring.stage()].block.meta;
        };
        const auto release_stage = [&](int stage) {
            if (thread == 0) {
                smem.empty[stage].arrive();
            }
        };
        const auto softmax = [&](int step_in_block) {
            float scale_log2 = q_scale_log2 * meta.scale;
            warpgroup_fence_operand(rS);
            mask(rS, meta.valid - step_in_block * Cfg::kStep);
            const Shrink shrink = update_max(rS, row, scale_log2);
            if constexpr (Cfg::kTakeTurns) {
                wait_turn();
                // Read once more, or ptxas would move the exponentials up past the barrier.
                scale_log2 =
                    q_scale_log2 * *const_cast<const volatile float *>(&smem.stages[ring.stage()].block.meta.scale);
            }
            exponentiate(rS, row, shrink, scale_log2);
            pass_turn();
            return shrink;
        };
        const auto accumulate = [&](Shrink shrink) {
            warpgroup_fence_operand(rT);
#pragma unroll
            for (int i = 0; i < size(rT); ++i) {
                rO(i) = fmaf(rO(i), shrink.row(i / 2 % 2), rT(i));
            }
        };

        if constexpr (Cfg::kOverlapPV) {
            wait_for_stage();
            issue_qk(ring.stage(), 0);
            ShrinkPair shrinks;
            warpgroup_wait<0>();
            shrinks.push(softmax(0));
            pack_p(rS, rP);
            clear(rT);
            // T of two steps ago joins O while QK of this step runs; then softmax runs beside PV of the previous step.
            for (int left = n_blocks - 1; left > 0; --left) {
                const int previous = ring.stage();
                ring.next();
                wait_for_stage();
                issue_qk(ring.stage(), 0);
                accumulate(shrinks.older());
                issue_pv(previous, 0);
                warpgroup_wait<1>();  // S is there; PV may still run
                shrinks.push(softmax(0));
                warpgroup_wait<0>();
                release_stage(previous);
                pack_p(rS, rP);
            }
            accumulate(shrinks.older());
            issue_pv(ring.stage(), 0);
            if (thread == 0) {
                smem.q_empty.arrive();
            }
            warpgroup_wait<0>();
            release_stage(ring.stage());
            ring.next();
            accumulate(shrinks.last());
        } else {
            for (int j = 0; j < n_blocks; ++j) {
                wait_for_stage();
#pragma unroll
                for (int i = 0; i < Cfg::kStepsPerBlock; ++i) {
                    issue_qk(ring.stage(), i);
                    warpgroup_wait<0>();
                    const Shrink shrink = softmax(i);
                    pack_p(rS, rP);
                    issue_pv(ring.stage(), i);
                    warpgroup_wait<0>();
                    accumulate(shrink);
                }
                release_stage(ring.stage());
                ring.next();
            }
            if (thread == 0) {
                smem.q_empty.arrive();
            }
        }
        q_ring.next();
        // Worked out anew: nothing of the item but its index stays in registers through the loop.
        store<Cfg, T>(p, WorkItem(p, opaque(index)), rO, row);
    });
    if (warpgroup == 0) {
        wait_turn();  // the one that the other passed last, so that no barrier is left half full
    }
}

template <class Cfg, class T>
__global__ void __launch_bounds__(Cfg::kThreads, 1) attn_fwd_sm90(const __grid_constant__ ForwardParams p) {
    extern __shared__ char smem_bytes[];
    // The runtime aligns dynamic shared memory to 16 bytes only; the swizzle needs 1024.
    auto *tenants = reinterpret_cast<FwdSmem<Cfg> *>(smem_bytes + (-smem_address(smem_bytes) & 1023));
    if (threadIdx.x < Cfg::kTenants) {
        FwdSmem<Cfg> &smem = tenants[threadIdx.x];
        smem.q_full.init(1);
        smem.q_empty.init(Cfg::kMathWarpgroups);
        for (int s = 0; s < Cfg::kStages; ++s) {
            smem.full[s].init(1);
            smem.empty[s].init(Cfg::kMathWarpgroups);
        }
        fence_barrier_init();
    }
    __syncthreads();
    if (threadIdx.x < Cfg::kMathThreads) {
        claim_registers<Cfg::kMathRegisters>();
        const int warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0);  // warp-uniform, for the descriptors' sake
        const int tenant = warpgroup / Cfg::kMathWarpgroups;
        math<Cfg, T>(p, tenants[tenant], tenant, warpgroup % Cfg::kMathWarpgroups);
    } else {
        release_registers<Cfg::kLoadRegisters>();
        const int tenant = (threadIdx.x - Cfg::kMathThreads) / 32;
        if (tenant < Cfg::kTenants && threadIdx.x % 32 == 0) {
            load<Cfg>(p, tenants[tenant], tenant);
        }
    }
}

}  // namespace

void attn_fwd(const ForwardParams &p, cudaStream_t stream) {
    int device, sm_count;
    FPS_CUDA_CHECK(cudaGetDevice(&device));
    FPS_CUDA_CHECK(cudaDeviceGetAttribute(&sm_count, cudaDevAttrMultiProcessorCount, device));
    dispatch(p.head_dim, p.dtype, [&](auto dim, auto element) {
        using Cfg = FwdConfig<decltype(dim)::value>;
        constexpr int kSmemBytes = Cfg::kTenants * sizeof(FwdSmem<Cfg>) + 1024;
        static_assert(kSmemBytes <= 227 * 1024);
        launch(attn_fwd_sm90<Cfg, decltype(element)>, dim3(std::min(ceil_div(p.items, Cfg::kTenants), sm_count)),
               Cfg::kThreads, kSmemBytes, stream, p);
    });
}

}  // namespace fps
