// Forward: FP8 sliding-tile attention. One CTA per SM takes work items one by one: up to two query blocks, or three at
// head_dim 64, that see the same keys (work_items.cuh).
//
//   warps              role      waits for        signals                                      registers of 2, of 3
//   2 or 3 warpgroups  math      q_full, full     q_empty, empty                               240, 160
//   1 warp             queries   q_empty          q_full (with the copy engine's bytes)         24,  32
//   1 warp             keys      q_full, empty    q_empty, full (with the copy engine's bytes)  24,  32
//
// A math warpgroup owns one query block, 64 rows, and walks the key blocks of the item, 128 keys each. With
//   S = q8.k8      z = S s_q s_k scale log2(e)      m = ceil(max z), over this key block alone
// the bit pattern of E4M3 is a piecewise linear logarithm, so no exponential is evaluated:
//   P = the E4M3 number with code max(0, round(120 + 8 (z - m)))        about 256 2^(z - m)
//   T = P v8,  t = sum(P)           O += 2^(m - M) s_v T        l += 2^(m - M) t
// t is one more column of T: V^T has a row of ones for tokens and zeros for padding. M is an exponent of the row that
// hardly ever changes. The tensor core's accumulator of T keeps about 14 bits and truncates, so it adds up one key
// block only; the sum over blocks is in fp32. S is in fp16: two scores to an instruction, and half the traffic of
// registers.
//
// Within a warpgroup, the maxima of a key block are searched beside T of the block before, and that T is added to O
// beside S of the next block.
#include <algorithm>
#define CUTE_SM90_EXTENDED_MMA_SHAPES_ENABLED  // wgmma with N = 136 and N = 72
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

// Rows of V^T behind those of the channels: the meta, is_token, and six that nothing reads but wgmma.
constexpr int kExtraRows = 8;

// Up to this m, 1144 - 8 m is exact in fp16. Beyond, softmax subtracts the row's maximum first.
constexpr float kLargestExponent = 1900.0f;

// M is kHeadroom above m of the first key block, and is raised to that above a block whose m is kGrowth larger. So
// 2^(m - M) P is at most 2^(kGrowth - kHeadroom + 8) = 2^-20, and O does not overflow, whatever V is, in 2^20 tokens.
constexpr float kHeadroom = 36.0f, kGrowth = 8.0f;
constexpr float kWithoutHeadroom = 0x1p-36f;

template <int kHeadDim_, int kWarpgroups_, class Tiles_>
struct FwdConfig {
    using Tiles = Tiles_;                                // of WorkItem
    static constexpr bool kMayBeEmpty = kIsList<Tiles>;  // an item may have no key; a window has one at least
    static constexpr int kHeadDim = kHeadDim_, kWarpgroups = kWarpgroups_;
    static constexpr int kStages = 4, kQStages = 2;
    static constexpr int kMathThreads = 128 * kWarpgroups, kThreads = kMathThreads + 128;
    // The load warps give registers to the math warps. At head_dim 128, S, T, O, P and Q need more than 160.
    static constexpr int kLoadRegisters = kWarpgroups == 2 ? 24 : 32, kMathRegisters = kWarpgroups == 2 ? 240 : 160;
    static_assert(128 * kLoadRegisters + kMathThreads * kMathRegisters <= kThreads * launch_registers(kThreads));
    static_assert(kWarpgroups == 2 || (kWarpgroups == 3 && kHeadDim == 64));
    static_assert(kHeadDim == 64 || kHeadDim == 128);

    using AtomRow = conditional_t<kHeadDim == 128, GMMA::Layout_K_SW128_Atom<E4M3>, GMMA::Layout_K_SW64_Atom<E4M3>>;
    using LayoutK = decltype(tile_to_shape(AtomRow{}, Shape<Int<kBlock>, Int<kHeadDim>>{}));
    using LayoutV =
        decltype(tile_to_shape(GMMA::Layout_K_SW128_Atom<E4M3>{}, Shape<Int<kHeadDim + kExtraRows>, Int<kBlock>>{}));
    using AtomPV = conditional_t<kHeadDim == 128, SM90::GMMA::MMA_64x136x32_F32E4M3E4M3_RS_TN<>,
                                 SM90::GMMA::MMA_64x72x32_F32E4M3E4M3_RS_TN<>>;
    using MmaQK = decltype(make_tiled_mma(SM90::GMMA::MMA_64x128x32_F16E4M3E4M3_RS_TN<>{}));
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
    E4M3 is_token[kBlock];
};

template <class Cfg>
struct FwdSmem {
    struct alignas(1024) Stage {
        PackedKV<Cfg> block;
        E4M3 unread[(kExtraRows - 2) * kBlock];
    };
    static_assert(sizeof(BlockMeta) == kBlock * sizeof(E4M3), "a row of V^T");
    struct alignas(1024) Query {
        PackedQ<Cfg> block;
    };
    Stage stages[Cfg::kStages];
    Query queries[Cfg::kQStages][Cfg::kWarpgroups];
    Task<typename Cfg::Tiles> tasks[Cfg::kQStages];
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
        auto &task = smem.tasks[ring.stage()];
        Barrier &full = smem.q_full[ring.stage()];
        smem.q_empty[ring.stage()].wait(ring.empty_parity());
        fence_proxy_async();  // the math warps have read these queries

        // Write its task and load its query blocks.
        bool any = false;
        if (!ends) {
            if (leads) {
                task.item = WorkItem<typename Cfg::Tiles>(p, index);
            }
            __syncwarp();
            const auto &item = task.item;  // stays in shared memory: registers are few
            const int n_key_blocks = item.n_key_blocks(g);
            if (leads) {
                task.n_key_blocks = n_key_blocks;
            }
#pragma unroll 1
            for (int i = 0; i < Cfg::kWarpgroups; ++i) {
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
        const WorkItem<typename Cfg::Tiles> item(p, __shfl_sync(~0u, index, 0));
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

// A thread's two rows of a key block: the exponent m, and the factors of T and of t. Before the first block, there is
// no T to add.
struct BlockWeights {
    float m[2], of_t[2] = {0, 0}, of_sum[2] = {0, 0};
};

// A thread's two rows over all key blocks: M, and l. The first lane of a quad has their l.
struct RowState {
    float reference[2], l[2] = {0, 0};
};

// Scores lie in a thread as words of two: word 2 g + r holds columns 8 g + 2 (lane % 4) and the next of row r, the
// lower one in the low half.
constexpr int kWords = kBlock / 4;

// The largest scores of both rows, in the low and the high half.
template <class Words>
__device__ __forceinline__ uint32_t row_maxima(const Words &s) {
    uint32_t top[2] = {s(0), s(1)};
#pragma unroll
    for (int i = 2; i < kWords; ++i) {  // ptxas merges two steps into one instruction; a tree is slower
        top[i % 2] = max_f16x2(top[i % 2], s(i));
    }
    uint32_t both = max_f16x2(select_bytes(top[0], top[1], 0x5410), select_bytes(top[0], top[1], 0x7632));
    both = max_f16x2(both, __shfl_xor_sync(~0u, both, 1));
    return max_f16x2(both, __shfl_xor_sync(~0u, both, 2));
}

// Takes the maximum of its row off each score. fp16 holds the difference to the largest scores exactly.
template <class Words>
__device__ __forceinline__ void subtract_maxima(Words &s, uint32_t maxima) {
    constexpr uint32_t kSigns = 0x80008000;
    const uint32_t minus_top[2] = {select_bytes(maxima, 0, 0x1010) ^ kSigns, select_bytes(maxima, 0, 0x3232) ^ kSigns};
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
        s(i) = add_f16x2(s(i), minus_top[i % 2]);
    }
}

// S to the codes of P, in place: a code is the low byte of its half. Sets m of both rows. m is NaN if a scale is.
template <int kHeadDim, class TensorS>
__device__ __forceinline__ void softmax(TensorS &s, float q_scale, float k_scale, float score_scale, float (&m)[2]) {
    Tensor words = recast<uint32_t>(s);
    const float factor = score_factor(q_scale, k_scale, score_scale);
    const uint32_t maxima = row_maxima(words);
    const float2 both = upcast<__half>(maxima);
    const float top[2] = {both.x, both.y};
    float offset[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        m[r] = ceilf(top[r] * (factor * (1 / kCodes)));
        offset[r] = fmaf(-kCodes, m[r], 1024.0f + kTopCode);
    }
    // Rare: scores so wide that the offset might not be exact in fp16.
    if (factor * (kQKMax * kQKMax * kHeadDim / kCodes) > kLargestExponent &&
        __any_sync(~0u, fmaxf(fabsf(m[0]), fabsf(m[1])) > kLargestExponent)) {
        subtract_maxima(words, maxima);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            // m and the offset are rounded where scores reach 10^7: no code may pass the largest
            offset[r] = fminf(fmaf(top[r], factor, offset[r]), 1024.0f + kTopCode);
        }
    }
    // fp16 numbers from 1024 to 2047 are integers, with the integer less 1024 in their low bits. So one multiply-add
    // also rounds, and 1024 is the code zero.
    constexpr uint32_t kZero = 0x64006400;
    const float in_range = fminf(factor, kLargestFactor);
    const uint32_t slope = downcast<__half>(in_range, in_range);
    const uint32_t offsets[2] = {downcast<__half>(offset[0], offset[0]), downcast<__half>(offset[1], offset[1])};
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
        words(i) = max_f16x2(fma_f16x2(words(i), slope, offsets[i % 2]), kZero);
    }
    if (!(q_scale * k_scale < INFINITY)) {
        m[0] = m[1] = NAN;
    }
}

// Loads this thread's part of Q as operand A: rows of 16 (warp % 4) + lane / 4 and 8 more, four bytes in 16.
template <int kHeadDim, class TensorQ>
__device__ __forceinline__ void load_q(const E4M3 *q, TensorQ &fragment) {
    Tensor words = recast<uint32_t>(fragment);
    const int thread = threadIdx.x % 128, row = fragment_row(thread), byte = thread % 4 * 4;
#pragma unroll
    for (int i = 0; i < size(words); ++i) {
        const int offset = swizzled<kHeadDim>(row + i % 2 * 8, i / 2 * 16 + byte);
        words(i) = *reinterpret_cast<const uint32_t *>(reinterpret_cast<const char *>(q) + offset);
    }
    warpgroup_fence_operand(fragment);
}

// Codes to P, in the A operand's register order (see permuted_token).
template <class TensorS, class TensorP>
__device__ __forceinline__ void pack(const TensorS &s, TensorP &p) {
    Tensor codes = recast<const uint32_t>(s);
    Tensor words = recast<uint32_t>(p);
#pragma unroll
    for (int g = 0; g < kWords / 4; ++g) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            words(2 * g + r) = select_bytes(codes(4 * g + r), codes(4 * g + 2 + r), 0x6420);
        }
    }
}

// Raises M where m of a block is much larger, and shrinks O and l by the same power of two.
template <class TensorO>
__device__ __forceinline__ void raise_reference(TensorO &o, RowState &row, const float (&m)[2]) {
    float shrink[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const float reference = fmaxf(row.reference[r], m[r] + kHeadroom);
        shrink[r] = exp2_approx(row.reference[r] - reference);
        row.reference[r] = reference;
        row.l[r] *= shrink[r];
    }
#pragma unroll
    for (int i = 0; i < size(o); ++i) {
        o(i) *= shrink[i / 2 % 2];
    }
}

// Sets the factors of T and t from m.
template <class TensorO>
__device__ __forceinline__ void weigh(TensorO &o, RowState &row, BlockWeights &block, float v_scale) {
    const float excess = fmaxf(block.m[0] - row.reference[0], block.m[1] - row.reference[1]);
    if (__any_sync(~0u, excess > kGrowth - kHeadroom)) {
        raise_reference(o, row, block.m);
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        block.of_sum[r] = exp2_approx(block.m[r] - row.reference[r]);
        // V may be so large that a block counts whose own weight is too small for a float.
        block.of_t[r] = exp2_approx(block.m[r] - row.reference[r] + kHeadroom) * (v_scale * kWithoutHeadroom);
    }
}

// O += 2^(m - M) s_v T and l += 2^(m - M) t, for the completed T.
template <class TensorO, class TensorT>
__device__ __forceinline__ void add(TensorO &o, RowState &row, const TensorT &t, const BlockWeights &block) {
#pragma unroll
    for (int i = 0; i < size(o); ++i) {
        o(i) = fmaf(t(i), block.of_t[i / 2 % 2], o(i));
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        row.l[r] = fmaf(t(size(o) + 2 * r + 1), block.of_sum[r], row.l[r]);  // the column of is_token
    }
}

// The value of the first of the four lanes that share a row.
__device__ __forceinline__ float first_of_quad(float x) {
    return __shfl_sync(~0u, x, threadIdx.x & 28);
}

// Stores O / l in raster order, and LSE. Of a row without keys O is 0 and LSE -inf.
template <class Cfg, class T, class TensorO>
__device__ void store(const ForwardParams &p, const WorkItem<typename Cfg::Tiles> &item, const QueryBlock &block,
                      TensorO &o, const RowState &row) {
    const TileGrid &g = p.geometry;
    const int thread = opaque(threadIdx.x) % 128, lane = thread % 4;
    const float l[2] = {first_of_quad(row.l[0]), first_of_quad(row.l[1])};
    const auto inverse_of = [](float x) { return Cfg::kMayBeEmpty && x == 0 ? 0.0f : __fdiv_rn(1.0f, x); };
    const float inverse[2] = {inverse_of(l[0]), inverse_of(l[1])};
#pragma unroll
    for (int i = 0; i < size(o); ++i) {
        o(i) *= inverse[i / 2 % 2];
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
            const float lse2 = row.reference[r] + log2f(l[r]) - (kLog2Top + kLog2Bias);
            p.lse[at] = kLn2 * lse2 + (p.lse_shift == nullptr ? 0.0f : p.lse_shift[at]);
        }
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
    constexpr int kStride = sizeof(smem.stages[0]);
    auto &keys = smem.stages[0].block;
    Tensor rK = operand_b<MmaQK>(smem_tensor(keys.k, ring_of<Cfg::kStages, kStride>(typename Cfg::LayoutK{})));
    Tensor rV = operand_b<MmaPV>(smem_tensor(keys.v, ring_of<Cfg::kStages, kStride>(typename Cfg::LayoutV{})));

    // Fragments in registers.
    FragmentA<E4M3, MmaQK, kQueryBlock, Cfg::kHeadDim> rQ;
    FragmentC<MmaQK, kQueryBlock, kBlock> rS;
    FragmentA<E4M3, MmaPV, kQueryBlock, kBlock> rP;
    FragmentC<MmaPV, kQueryBlock, Cfg::kHeadDim + kExtraRows> rT;
    auto rO = make_tensor<float>(Shape<Int<Cfg::kHeadDim / 2>>{});

    RingState<Cfg::kStages> ring;
    for (RingState<Cfg::kQStages> q_ring;; q_ring.next()) {
        // Wait for Q
        const int q_stage = q_ring.stage();
        smem.q_full[q_stage].wait(q_ring.full_parity());
        const auto &task = smem.tasks[q_stage];
        if (task.index >= p.items) {
            return;
        }
        int left = task.n_key_blocks;  // key blocks whose S is not issued yet
        if (!task.queries[warpgroup].exists) {
            smem.q_empty[q_stage].arrive_as_warp();
            skip_keys(smem, ring, left);
            continue;
        }
        const auto &query = smem.queries[q_stage][warpgroup].block;
        const float q_scale = query.meta.scale;
        RowState row;
        BlockWeights block;
        clear(rO);
        if (Cfg::kMayBeEmpty && left == 0) {
            row.reference[0] = row.reference[1] = 0;
            store<Cfg, T>(p, task.item, task.queries[warpgroup], rO, row);
            smem.q_empty[q_stage].arrive_as_warp();
            continue;
        }
        clear(rT);
        load_q<Cfg::kHeadDim>(query.q, rQ);

        // First key block: S = Q K^T. Softmax: S to codes, codes to P.
        smem.full[ring.stage()].wait(ring.full_parity());
        issue<MmaQK>(rQ, rK(_, _, _, ring.stage()), rS, Sum::kFromZero);
        wait_for_products<0>(rS);
        softmax<Cfg::kHeadDim>(rS, q_scale, smem.stages[ring.stage()].block.meta.scale, p.scale, block.m);
        row.reference[0] = block.m[0] + kHeadroom;
        row.reference[1] = block.m[1] + kHeadroom;
        pack(rS, rP);

        while (--left > 0) {
            // Wait for the next K and V. Issue the next S = Q K^T.
            RingState<Cfg::kStages> after = ring;
            after.next();
            smem.full[after.stage()].wait(after.full_parity());
            issue<MmaQK>(rQ, rK(_, _, _, after.stage()), rS, Sum::kFromZero);

            // Add T of the block before to O. Issue T = P V.
            add(rO, row, rT, block);
            warpgroup_fence_operand(rP);
            issue<MmaPV>(rP, rV(_, _, _, ring.stage()), rT, Sum::kFromZero);
            weigh(rO, row, block, smem.stages[ring.stage()].block.meta.v_scale);

            // Wait for S. Softmax: S to codes.
            const float k_scale = smem.stages[after.stage()].block.meta.scale;
            wait_for_products<1>(rS);
            softmax<Cfg::kHeadDim>(rS, q_scale, k_scale, p.scale, block.m);

            // Wait for T. Release its stage. Codes to P: while T was in flight, ptxas would have serialised all wgmmas.
            wait_for_products<0>(rT);
            smem.empty[ring.stage()].arrive_as_warp();
            pack(rS, rP);
            ring = after;
        }

        // Last key block: T = P V, added to O. Release the stage.
        add(rO, row, rT, block);
        warpgroup_fence_operand(rP);
        issue<MmaPV>(rP, rV(_, _, _, ring.stage()), rT, Sum::kFromZero);
        weigh(rO, row, block, smem.stages[ring.stage()].block.meta.v_scale);
        wait_for_products<0>(rT);
        smem.empty[ring.stage()].arrive_as_warp();
        add(rO, row, rT, block);
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
    const Int3 group = p.keys.given() ? Int3{1, 1, 1} : g.tile_group(p.windows, p.n_windows);
    std::iota(p.group_axis, p.group_axis + 3, 0);
    std::stable_partition(p.group_axis, p.group_axis + 3, [&](int axis) { return g.grid[axis] % g.tile[axis] == 0; });
    for (int i = 0; i < 3; ++i) {
        p.group_size[i] = group[p.group_axis[i]];
    }
    p.tiles_per_group = group.volume();
    p.groups = p.tiles_per_group > 0 ? g.tiles / group : Int3{1, 1, 1};  // there may be text tokens only
    p.n_groups = p.groups.volume();
    const int blocks_of_group = p.tiles_per_group * (g.slot / kQueryBlock);
    p.blocks_per_item = blocks_per_item(p.head_dim, blocks_of_group);
    p.items_per_group = ceil_div(blocks_of_group, p.blocks_per_item);
    p.text_items_per_head = ceil_div(g.text.blocks(kQueryBlock), p.blocks_per_item);
    p.text_items = p.batch * p.heads * p.text_items_per_head;
    p.items = p.text_items + p.batch * p.heads * p.n_groups * p.items_per_group;

    int device, sm_count;
    FPS_CUDA_CHECK(cudaGetDevice(&device));
    FPS_CUDA_CHECK(cudaDeviceGetAttribute(&sm_count, cudaDevAttrMultiProcessorCount, device));
    const auto launch_as = [&](auto cfg, auto element) {
        using Cfg = decltype(cfg);
        constexpr int kSmemBytes = dynamic_smem_bytes<FwdSmem<Cfg>>();
        launch(attn_fwd_sm90<Cfg, decltype(element)>, dim3(std::min(p.items, sm_count)), Cfg::kThreads, kSmemBytes,
               stream, p);
    };
    const auto launch_with = [&](auto dim, auto element, auto warpgroups) {
        constexpr int kDim = decltype(dim)::value, kWarpgroups = decltype(warpgroups)::value;
        p.keys.given() ? launch_as(FwdConfig<kDim, kWarpgroups, TileList>{}, element)
                       : launch_as(FwdConfig<kDim, kWarpgroups, TileBox>{}, element);
    };
    dispatch(p.head_dim, p.dtype, [&](auto dim, auto element) {
        if constexpr (decltype(dim)::value == 64) {
            if (p.blocks_per_item == 3) {
                return launch_with(dim, element, std::integral_constant<int, 3>{});
            }
        }
        launch_with(dim, element, std::integral_constant<int, 2>{});
    });
}

}  // namespace fps
