// Backward: dK, dV and dQ of the forward's FP8 attention. A CTA owns a key block, 128 keys, and walks the query blocks,
// 64 queries each, that attend it (KeyItem, work_items.cuh).
//
//   warps           role   waits for                       signals                                     registers
//   2 warpgroups    math   keys, full, q_full, ds_full,    empty, q_empty, ds_full, dq_full             240
//                          dq_empty
//   1 thread        load   empty, q_empty                  keys, full, q_full (with the copy engine's     24
//                                                          bytes)
//   2 warps         add    dq_full                         dq_empty                                      24
//
// A math warpgroup owns 64 of the keys. Scores are transposed, keys by queries: the rows of an accumulator are keys,
// and dK and dV stay in registers. For a query block, with the operands of params.h,
//   S^T  = k8 q8^T                               FP8, in fp16, as the forward computed it
//   X    = number(S^T 8 s_q s_k scale log2(e))   the forward's P from its code in E4M3's octaves, times a power of two
//                                                that c takes off again; exact in bf16
//   dV  += X (c dO)
//   dS^T = X (v (c dO)^T - delta)                bf16
//   dK  += dS^T q        dQ += dS k
// The warpgroups exchange dS through shared memory, and each computes dQ for half of the channels. One add warp per
// half has the copy engine add dQ to global memory in fp32: atomically, or with `turns` one key block after the other.
//
// dK and dQ of a step are computed in the next step, beside its X. The tensor core has work during those,
// and neither warpgroup waits for the other's dS.
#include <algorithm>
#include <cute/tensor.hpp>
#include <numeric>

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
using BF16 = cute::bfloat16_t;

template <int kHeadDim_>
struct BwdConfig {
    static constexpr int kHeadDim = kHeadDim_;
    static constexpr int kHalf = kHeadDim / 2;  // channels of dQ per warpgroup
    static constexpr int kStages = 2;
    static constexpr int kWarpgroups = 2, kMathThreads = 128 * kWarpgroups, kThreads = kMathThreads + 128;
    static constexpr int kKeys = kBlock / kWarpgroups;  // per warpgroup
    // The load warps give registers to the math warps.
    static constexpr int kLoadRegisters = 24, kMathRegisters = 240;
    static_assert(128 * kLoadRegisters + kMathThreads * kMathRegisters <= kThreads * launch_registers(kThreads));
    static_assert(kHeadDim == 64 || kHeadDim == 128);

    // Rows by channels. A 16-bit operand in parts of 64 columns serves products that sum over channels and products
    // that sum over rows: the same bytes are K-major for one and MN-major for the other.
    using RowsFP8 = conditional_t<kHeadDim == 128, GMMA::Layout_K_SW128_Atom<E4M3>, GMMA::Layout_K_SW64_Atom<E4M3>>;
    using RowsBF16 = GMMA::Layout_K_SW128_Atom<BF16>;
    using ColumnsBF16 = GMMA::Layout_MN_SW128_Atom<BF16>;
    using ColumnsK = conditional_t<kHalf == 64, ColumnsBF16, GMMA::Layout_MN_SW64_Atom<BF16>>;
    using PartByPart = Step<_2, _1>;
    using LayoutK8 = decltype(tile_to_shape(RowsFP8{}, Shape<Int<kKeys>, Int<kHeadDim>>{}));
    using LayoutQ8 = decltype(tile_to_shape(RowsFP8{}, Shape<Int<kQueryBlock>, Int<kHeadDim>>{}));
    using LayoutV = decltype(tile_to_shape(RowsBF16{}, Shape<Int<kBlock>, Int<kHeadDim>>{}));
    using LayoutQuery = decltype(tile_to_shape(RowsBF16{}, Shape<Int<kQueryBlock>, Int<kHeadDim>>{}));
    using LayoutQueryT = decltype(tile_to_shape(ColumnsBF16{}, Shape<Int<kHeadDim>, Int<kQueryBlock>>{}, PartByPart{}));
    using LayoutKT = decltype(tile_to_shape(ColumnsK{}, Shape<Int<kHalf>, Int<kBlock>>{}, PartByPart{}));
    using LayoutDS = decltype(tile_to_shape(ColumnsBF16{}, Shape<Int<kQueryBlock>, Int<kBlock>>{}, PartByPart{}));

    static constexpr auto K = GMMA::Major::K, MN = GMMA::Major::MN;
    using AtomGrad = conditional_t<kHeadDim == 128, SM90::GMMA::MMA_64x128x16_F32BF16BF16_RS<K, MN>,
                                   SM90::GMMA::MMA_64x64x16_F32BF16BF16_RS<K, MN>>;
    using AtomDQ = conditional_t<kHeadDim == 128, SM90::GMMA::MMA_64x64x16_F32BF16BF16_SS<MN, MN>,
                                 SM90::GMMA::MMA_64x32x16_F32BF16BF16_SS<MN, MN>>;
    using MmaS = decltype(make_tiled_mma(SM90::GMMA::MMA_64x64x32_F16E4M3E4M3_SS_TN<>{}));
    using MmaDP = decltype(make_tiled_mma(SM90::GMMA::MMA_64x64x16_F32BF16BF16_SS<K, K>{}));
    using MmaGrad = decltype(make_tiled_mma(AtomGrad{}));
    using MmaDQ = decltype(make_tiled_mma(AtomDQ{}));
};

// Bulk copies load parts of the packed blocks and of the 16-bit operands (params.h).
template <class Cfg>
struct BwdSmem {
    struct alignas(1024) Stage {
        BF16 dout[kQueryBlock * Cfg::kHeadDim];
        E4M3 q8[kQueryBlock * Cfg::kHeadDim];
    };
    alignas(1024) BF16 k[kBlock * Cfg::kHeadDim];
    BF16 v[kBlock * Cfg::kHeadDim];
    E4M3 k8[kBlock * Cfg::kHeadDim];
    Stage stages[Cfg::kStages];
    BF16 q[Cfg::kStages][kQueryBlock * Cfg::kHeadDim];  // released half a step later than the rest of its query block
    BF16 ds[2][kBlock * kQueryBlock];
    float dq[Cfg::kWarpgroups][kQueryBlock * Cfg::kHalf];
    QueryRows rows[Cfg::kStages];
    BlockMeta k_meta;
    Barrier keys_full, full[Cfg::kStages], empty[Cfg::kStages], q_full[Cfg::kStages], q_empty[Cfg::kStages];
    Barrier ds_full, dq_full[Cfg::kWarpgroups], dq_empty[Cfg::kWarpgroups];
};

// Load thread: brings the keys, then keeps the rings of query blocks full.
template <class Cfg>
__device__ void load(const BackwardParams &p, BwdSmem<Cfg> &smem) {
    constexpr int kK8Bytes = sizeof(smem.k8), kKeyBytes = sizeof(smem.k);
    constexpr int kQBytes = sizeof(smem.q[0]), kQ8Bytes = sizeof(smem.stages[0].q8), kRowsBytes = sizeof(QueryRows);
    // Load the keys: k8 and its meta, k, v.
    const KeyItem key(p);
    const uint8_t *k8 = p.kv_blocks + key.index * kv_block_bytes(Cfg::kHeadDim);
    const uint8_t *k = p.key_operands + key.index * bwd_key_bytes(Cfg::kHeadDim);
    smem.keys_full.expect(kK8Bytes + int(sizeof(BlockMeta)) + 2 * kKeyBytes);
    smem.keys_full.arrive();
    bulk_load(smem.k8, k8, kK8Bytes, smem.keys_full);
    bulk_load(&smem.k_meta, k8 + 2 * kK8Bytes, sizeof(BlockMeta), smem.keys_full);
    bulk_load(smem.k, k, kKeyBytes, smem.keys_full);
    bulk_load(smem.v, k + kKeyBytes, kKeyBytes, smem.keys_full);

    RingState<Cfg::kStages> ring;
    for_each_query_block(p, key, [&](const QueryStep &query) {
        const int s = ring.stage();
        const uint8_t *q8 = p.q_blocks + query.index * q_block_bytes(Cfg::kHeadDim);
        const uint8_t *q = p.query_operands + query.index * bwd_query_bytes(Cfg::kHeadDim);

        // Wait for an empty stage. Load q8, dO and the row constants.
        smem.empty[s].wait(ring.empty_parity());
        fence_proxy_async();  // the math warps have read the row constants of this stage
        smem.full[s].expect(kQ8Bytes + kQBytes + kRowsBytes);
        smem.full[s].arrive();
        bulk_load(smem.stages[s].q8, q8, kQ8Bytes, smem.full[s]);
        bulk_load(smem.stages[s].dout, q + kQBytes, kQBytes, smem.full[s]);
        bulk_load(&smem.rows[s], q + 2 * kQBytes, kRowsBytes, smem.full[s]);

        // Wait until the stage's q is released, which is half a step later. Load q.
        smem.q_empty[s].wait(ring.empty_parity());
        smem.q_full[s].expect(kQBytes);
        smem.q_full[s].arrive();
        bulk_load(smem.q[s], q, kQBytes, smem.q_full[s]);
        ring.next();
    });
}

// Add warp `half`: has the copy engine add half of the channels of every step's dQ to global memory. One lane does the
// work; the others follow it so that positions stay in uniform registers.
template <class Cfg>
__device__ void add(const BackwardParams &p, BwdSmem<Cfg> &smem, int half) {
    constexpr int kFloats = kQueryBlock * Cfg::kHalf;
    const KeyItem key(p);
    RingState<1> ring;
    for_each_query_block(p, key, [&](const QueryStep &query) {
        // Wait for dQ.
        smem.dq_full[half].wait(ring.full_parity());
        ring.next();

        // Wait for the turn.
        const int64_t i = 2 * query.index + half;
        Turn turn{};
        if (p.turns != nullptr) {
            turn = turn_of(p, key, query);
            wait_for(p.turns + i, turn.from);
            fence_proxy_async_global();
        }
        if (threadIdx.x % 32 == 0) {
            // Add dQ.
            fence_proxy_async();
            bulk_reduce_add(p.dq_sum + i * kFloats, smem.dq[half], kFloats * int(sizeof(float)));

            // Release the buffer once the copy engine has read it.
            bulk_wait_read();
            smem.dq_empty[half].arrive();  // for the warp, whose other lanes do not use the buffer

            // Pass the turn on once all is added.
            if (p.turns != nullptr) {
                bulk_wait();
                fence_proxy_async_global();
                store_release(p.turns + i, turn.to);
            }
        }
        __syncwarp();  // a lane left behind could miss a phase of dq_full
    });
}

// S^T is keys by queries. Elements 4 i .. 4 i + 3 of its fragment belong to octet i of the queries: 8 queries.
constexpr int kOctets = kQueryBlock / 8, kHalfOctets = kOctets / 2;

// Values of this thread's two queries of an octet.
__device__ __forceinline__ float2 of_queries(const float *values, int octet) {
    return *reinterpret_cast<const float2 *>(values + 8 * octet + 2 * (threadIdx.x % 4));
}

// Offsets of half of the octets, from kFirstOctet on.
template <int kFirstOctet>
__device__ __forceinline__ void load_offsets(const QueryRows &rows, float2 (&offset)[kHalfOctets]) {
#pragma unroll
    for (int octet = 0; octet < kHalfOctets; ++octet) {
        offset[octet] = of_queries(rows.offset, kFirstOctet + octet);
    }
}
// Largest offset that fp16 holds exactly: offsets are multiples of 8.
constexpr float kLargestOffset = 16384.0f;

// S to X for these octets: pairs of bf16. A sum of score and offset is in [1024, 2048), where fp16 numbers are
// integers: its low bits are the rounded code, which is the exponent and the mantissa of X. X of padding is zero: keys
// of `row` and row + 8, if not below `valid`.
template <int kHeadDim, int kFirstOctet, class TensorS, class TensorX>
__device__ __forceinline__ void to_numbers(const TensorS &s, TensorX &x, float factor,
                                           const float2 (&offset)[kHalfOctets], int row, int valid) {
    Tensor scores = recast<const uint32_t>(s);
    Tensor words = recast<uint32_t>(x);
    constexpr uint32_t kZero = 0x64006400;  // twice 1024
    const float in_range = fminf(factor, kLargestFactor);
    const uint32_t slope = downcast<__half>(in_range, in_range);
#pragma unroll
    for (int octet = 0; octet < kHalfOctets; ++octet) {
        const uint32_t offsets = downcast<__half>(offset[octet].x, offset[octet].y);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int word = 2 * (kFirstOctet + octet) + r;
            const uint32_t sum = max_f16x2(fma_f16x2(scores(word), slope, offsets), kZero);
            words(word) = (sum << kCodeShift) - (kZero << kCodeShift);
        }
    }
    // Rare: scores so wide that an offset might not be exact in fp16.
    if (factor * (kQKMax * kQKMax * kHeadDim) > kLargestOffset / 2) {
        bool wide = false;
#pragma unroll
        for (int octet = 0; octet < kHalfOctets; ++octet) {
            wide |= fmaxf(fabsf(offset[octet].x), fabsf(offset[octet].y)) > kLargestOffset;
        }
        if (__any_sync(~0u, wide)) {
#pragma unroll
            for (int octet = 0; octet < kHalfOctets; ++octet) {
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    const int word = 2 * (kFirstOctet + octet) + r;
                    const float2 score = upcast<__half>(scores(word));
                    const float zero = kCodeZero - 1024.0f;
                    const float low = fmaf(score.x, factor, zero + offset[octet].x);
                    const float high = fmaf(score.y, factor, zero + offset[octet].y);
                    words(word) = (__float_as_uint(fmaxf(low, kCodeZero)) << kCodeShift & 0xffff) |
                                  __float_as_uint(fmaxf(high, kCodeZero)) << (16 + kCodeShift);
                }
            }
        }
    }
    if (valid < kBlock) {
#pragma unroll
        for (int word = 2 * kFirstOctet; word < 2 * (kFirstOctet + kHalfOctets); ++word) {
            words(word) = row + 8 * (word % 2) < valid ? words(word) : 0;
        }
    }
}

// dS = X (dP - delta), in place of dP.
template <class TensorP, class TensorX>
__device__ __forceinline__ void differentiate(TensorP &dp, const TensorX &x, const QueryRows &rows) {
    Tensor words = recast<const uint32_t>(x);
#pragma unroll
    for (int octet = 0; octet < kOctets; ++octet) {
        const float2 minus_delta = of_queries(rows.minus_delta, octet);
#pragma unroll
        for (int word = 2 * octet; word < 2 * octet + 2; ++word) {
            const float2 number = upcast<__nv_bfloat16>(words(word));
            dp(2 * word) = number.x * (dp(2 * word) + minus_delta.x);
            dp(2 * word + 1) = number.y * (dp(2 * word + 1) + minus_delta.y);
        }
    }
}

// An accumulator as bf16 A operand. Two elements that are neighbours in it share a word.
template <class TensorX, class TensorA>
__device__ __forceinline__ void pack(const TensorX &x, TensorA &a) {
    Tensor words = recast<uint32_t>(a);
#pragma unroll
    for (int i = 0; i < size(words); ++i) {
        words(i) = downcast<__nv_bfloat16>(x(2 * i), x(2 * i + 1));
    }
}

// dS^T lies in shared memory as [keys][64 queries], swizzled. Four matrices of 8 x 8 are stored at a time, which are
// words i .. i + 3 of the operand: twice 8 keys, then the same keys and the next 8 queries.
template <class TensorA>
__device__ __forceinline__ void store_ds(BF16 *ds, int first_key, const TensorA &a) {
    Tensor words = recast<const uint32_t>(a);
    const int thread = threadIdx.x % 128, lane = thread % 32;
    const int key = first_key + thread / 32 * 16 + lane / 8 % 2 * 8 + lane % 8;  // whose row this lane addresses
#pragma unroll
    for (int i = 0; i < size(words); i += 4) {
        const int query = 4 * i + lane / 16 * 8;
        void *row = reinterpret_cast<char *>(ds) + swizzled<128>(key, 2 * query);
        store_matrices(row, words(i), words(i + 1), words(i + 2), words(i + 3));
    }
}

// dQ of a step in the order of the fragment, for the add warp. The step's stage tells whether its number is odd.
template <class Cfg, class TensorQ>
__device__ __forceinline__ void hand_over_dq(BwdSmem<Cfg> &smem, int warpgroup, const TensorQ &dq, int stage) {
    static_assert(Cfg::kStages == 2);
    smem.dq_empty[warpgroup].wait(stage ^ 1);
    float *to = smem.dq[warpgroup] + 4 * (threadIdx.x % 128);
#pragma unroll
    for (int i = 0; i < size(dq); i += 4) {
        *reinterpret_cast<float4 *>(to + i * 128) = {dq(i), dq(i + 1), dq(i + 2), dq(i + 3)};
    }
    smem.dq_full[warpgroup].arrive_as_warp();
}

// dK and dV in raster order. `row` is this thread's first key of the block; the other is row + 8.
template <class Cfg, class T, class TensorC>
__device__ void store(const BackwardParams &p, int row, const TensorC &dk, const TensorC &dv) {
    const KeyItem key(p);
    const int lane = threadIdx.x % 4;
    const auto row_of = [&](void *base, const Strides &to, int64_t token) {
        return static_cast<T *>(base) + to.offset(key.batch, key.head, token);
    };
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const int in_tile = key.first_row + row + 8 * r;
        const bool valid = in_tile < key.rows.valid();
        const int64_t token = valid ? p.geometry.token(key.rows, in_tile) : 0;
        store_row<T, Cfg::kHeadDim>(row_of(p.dk, p.dk_strides, token), valid, r, lane,
                                    [&](int i) { return dk(i) * p.scale; });
        store_row<T, Cfg::kHeadDim>(row_of(p.dv, p.dv_strides, token), valid, r, lane, [&](int i) { return dv(i); });
    }
}

// Operands in shared memory, as descriptors. Where there is a ring, the last mode is the stage.
template <class K8, class Q8, class V, class DOut, class DOutT, class QT, class DS, class KT>
struct Operands {
    K8 k8;
    Q8 q8;
    V v;
    DOut dout;
    DOutT dout_t;
    QT q_t;
    DS ds;
    KT k_t;
};
template <class... X>
Operands(X...) -> Operands<X...>;

template <class Cfg>
__device__ auto operands_of(BwdSmem<Cfg> &smem, int warpgroup) {
    constexpr int kStages = Cfg::kStages, kQStride = kQueryBlock * Cfg::kHeadDim;
    constexpr int kQ8Stride = sizeof(smem.stages[0]), kDOutStride = kQ8Stride / sizeof(BF16);
    auto &first = smem.stages[0];
    Tensor k8 = smem_tensor(smem.k8 + warpgroup * Cfg::kKeys * Cfg::kHeadDim, typename Cfg::LayoutK8{});
    Tensor q8 = smem_tensor(first.q8, ring_of<kStages, kQ8Stride>(typename Cfg::LayoutQ8{}));
    Tensor v = local_tile(smem_tensor(smem.v, typename Cfg::LayoutV{}), Shape<Int<Cfg::kKeys>, Int<Cfg::kHeadDim>>{},
                          make_coord(warpgroup, 0));
    Tensor dout = smem_tensor(first.dout, ring_of<kStages, kDOutStride>(typename Cfg::LayoutQuery{}));
    Tensor dout_t = smem_tensor(first.dout, ring_of<kStages, kDOutStride>(typename Cfg::LayoutQueryT{}));
    Tensor q_t = smem_tensor(smem.q[0], ring_of<kStages, kQStride>(typename Cfg::LayoutQueryT{}));
    Tensor ds = smem_tensor(smem.ds[0], ring_of<2, kBlock * kQueryBlock>(typename Cfg::LayoutDS{}));
    Tensor k_t = smem_tensor(smem.k + warpgroup * kBlock * Cfg::kHalf, typename Cfg::LayoutKT{});
    return Operands{operand_a<typename Cfg::MmaS>(k8),        operand_b<typename Cfg::MmaS>(q8),
                    operand_a<typename Cfg::MmaDP>(v),        operand_b<typename Cfg::MmaDP>(dout),
                    operand_b<typename Cfg::MmaGrad>(dout_t), operand_b<typename Cfg::MmaGrad>(q_t),
                    operand_a<typename Cfg::MmaDQ>(ds),       operand_b<typename Cfg::MmaDQ>(k_t)};
}

// Results in registers.
template <class Cfg>
struct Fragments {
    FragmentC<typename Cfg::MmaS, Cfg::kKeys, kQueryBlock> s;           // S^T
    FragmentC<typename Cfg::MmaDP, Cfg::kKeys, kQueryBlock> dp;         // dP^T, then dS^T
    FragmentA<BF16, typename Cfg::MmaGrad, Cfg::kKeys, kQueryBlock> a;  // dS^T', as operand
    FragmentA<BF16, typename Cfg::MmaGrad, Cfg::kKeys, kQueryBlock> x;  // X, as operand
    FragmentC<typename Cfg::MmaDQ, kQueryBlock, Cfg::kHalf> dq;
    FragmentC<typename Cfg::MmaGrad, Cfg::kKeys, Cfg::kHeadDim> dv, dk;
};

// The keys of a math warpgroup.
struct OwnKeys {
    int warpgroup;
    int first;          // first key, in the block
    int row;            // this thread's first key, in the block; the other is row + 8
    int valid;          // keys of the block that are not padding
    float k_scale;      // of k8
    float score_scale;  // of the scores before softmax
};

// Waits for q of a step and issues dK += dS^T q.
template <class Cfg, class Operands>
__device__ __forceinline__ void issue_dk(BwdSmem<Cfg> &smem, const Operands &operands, Fragments<Cfg> &fragments,
                                         RingState<Cfg::kStages> step) {
    smem.q_full[step.stage()].wait(step.full_parity());
    warpgroup_fence_operand(fragments.a);
    issue<typename Cfg::MmaGrad>(fragments.a, operands.q_t(_, _, _, step.stage()), fragments.dk, Sum::kAddTo);
}

// Waits for dS of both warpgroups in this buffer and issues dQ = dS k. dS of step n lies in buffer n % 2 and completes
// phase n + 1 of ds_full. Phase 0 is that of the zeros before the first step.
template <class Cfg, class Operands>
__device__ __forceinline__ void issue_dq(BwdSmem<Cfg> &smem, const Operands &operands, Fragments<Cfg> &fragments,
                                         int buffer) {
    smem.ds_full.wait(buffer ^ 1);
    fence_proxy_async();
    issue<typename Cfg::MmaDQ>(operands.ds(_, _, _, buffer), operands.k_t, fragments.dq, Sum::kFromZero);
}

// One query block. A prime marks values of the previous step, at ring position `before`.
template <class Cfg, class Operands>
__device__ __forceinline__ void step(BwdSmem<Cfg> &smem, const Operands &operands, Fragments<Cfg> &fragments,
                                     const OwnKeys &own, RingState<Cfg::kStages> ring, RingState<Cfg::kStages> &before,
                                     bool is_first) {
    auto &[rS, rdP, rA, rX, rdQ, rdV, rdK] = fragments;
    const int s = ring.stage(), ds_buffer = s;  // dS' is in the other buffer
    const QueryRows &rows = smem.rows[s];
    float2 offset[kHalfOctets];

    // Wait for the queries. Issue S^T = k8 q8^T.
    smem.full[s].wait(ring.full_parity());
    issue<typename Cfg::MmaS>(operands.k8, operands.q8(_, _, _, s), rS, Sum::kFromZero);

    // Wait for q'. Issue dK += dS^T' q'.
    issue_dk(smem, operands, fragments, before);

    // Wait for S^T. X of the first half of the queries.
    const float factor = score_factor(rows.scale, own.k_scale, own.score_scale);
    load_offsets<0>(rows, offset);
    wait_for_products<1>(rS);
    to_numbers<Cfg::kHeadDim, 0>(rS, rX, factor, offset, own.row, own.valid);

    // Wait for dS' of both warpgroups. Issue dQ' = dS' k.
    issue_dq(smem, operands, fragments, ds_buffer ^ 1);

    // Wait for dK and dQ'. Hand over dQ' and release q'.
    load_offsets<kHalfOctets>(rows, offset);
    wait_for_products<0>(rdK, rdQ);
    if (!is_first) {
        hand_over_dq(smem, own.warpgroup, rdQ, before.stage());
        smem.q_empty[before.stage()].arrive_as_warp();
        before.next();
    }

    // Issue dP^T = v dO^T.
    issue<typename Cfg::MmaDP>(operands.v, operands.dout(_, _, _, s), rdP, Sum::kFromZero);

    // X of the other half.
    to_numbers<Cfg::kHeadDim, kHalfOctets>(rS, rX, factor, offset, own.row, own.valid);

    // Issue dV += X dO.
    warpgroup_fence_operand(rX);
    issue<typename Cfg::MmaGrad>(rX, operands.dout_t(_, _, _, s), rdV, Sum::kAddTo);

    // Wait for dP^T. dS^T = X (dP^T - delta).
    wait_for_products<1>(rdP);
    differentiate(rdP, rX, rows);
    pack(rdP, rA);

    // Publish dS^T.
    store_ds(smem.ds[ds_buffer], own.first, rA);
    smem.ds_full.arrive_as_warp();

    // Wait for dV. Release the stage.
    wait_for_products<0>(rdV);
    smem.empty[s].arrive_as_warp();
}

// Math warpgroup `warpgroup` owns the 64 keys of the block from 64 * warpgroup on.
template <class Cfg, class T>
__device__ void math(const BackwardParams &p, BwdSmem<Cfg> &smem, int warpgroup) {
    const auto operands = operands_of(smem, warpgroup);
    Fragments<Cfg> fragments;
    clear(fragments.dv);
    clear(fragments.dk);

    // Wait for the keys.
    smem.keys_full.wait(0);
    const int first_key = warpgroup * Cfg::kKeys;
    const OwnKeys own{warpgroup,         first_key,         first_key + fragment_row(threadIdx.x % 128),
                      smem.k_meta.valid, smem.k_meta.scale, p.scale};

    // Before the first step there is no dS'. Zeros take its place.
    clear(fragments.a);
    store_ds(smem.ds[1], own.first, fragments.a);
    smem.ds_full.arrive_as_warp();

    // Walk the query blocks.
    RingState<Cfg::kStages> ring, before;
    bool is_first = true;
    for (int left = KeyItem(p).n_query_blocks(p.geometry); left > 0; --left) {
        step(smem, operands, fragments, own, ring, before, is_first);
        ring.next();
        is_first = false;
    }

    // dK and dQ of the last step.
    const int last = ring.stage() ^ 1;
    issue_dk(smem, operands, fragments, before);
    issue_dq(smem, operands, fragments, last);
    wait_for_products<0>(fragments.dk, fragments.dq);
    hand_over_dq(smem, warpgroup, fragments.dq, before.stage());

    store<Cfg, T>(p, own.row, fragments.dk, fragments.dv);
}

template <class Cfg, class T>
__global__ void __launch_bounds__(Cfg::kThreads, 1)
    attn_bwd_sm90(const __grid_constant__ Deferred<BackwardParams> deferred) {
    const BackwardParams &p = deferred.after_previous();
    if (!KeyItem(p).exists()) {
        return;
    }
    extern __shared__ char smem_bytes[];
    auto &smem = *reinterpret_cast<BwdSmem<Cfg> *>(smem_bytes + bytes_to_alignment(smem_bytes));
    if (threadIdx.x == 0) {
        constexpr int kMathWarps = Cfg::kMathThreads / 32;
        smem.keys_full.init(1);
        for (int s = 0; s < Cfg::kStages; ++s) {
            smem.full[s].init(1);
            smem.empty[s].init(kMathWarps);
            smem.q_full[s].init(1);
            smem.q_empty[s].init(kMathWarps);
        }
        smem.ds_full.init(kMathWarps);
        for (int w = 0; w < Cfg::kWarpgroups; ++w) {
            smem.dq_full[w].init(kMathWarps / Cfg::kWarpgroups);
            smem.dq_empty[w].init(1);
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
        if (warp < Cfg::kWarpgroups) {
            add<Cfg>(p, smem, warp);
        } else if (threadIdx.x == Cfg::kThreads - 32) {
            load<Cfg>(p, smem);
        }
    }
}

}  // namespace

void attn_bwd(BackwardParams p, cudaStream_t stream) {
    // Fastest, the axis of which a window covers most: the key blocks that run at the same time then have the fewest
    // queries, and sums dQ, that any of them needs. Turns go by raster order, and so must the CTAs that take them.
    const Int3 tiles = p.geometry.tiles;
    std::iota(p.key_axis, p.key_axis + 3, 0);
    std::reverse(p.key_axis, p.key_axis + 3);
    if (p.turns == nullptr) {
        const Int3 window = p.window(p.head_at(0));
        std::stable_sort(p.key_axis, p.key_axis + 3,
                         [&](int a, int b) { return window[a] * tiles[b] > window[b] * tiles[a]; });
    }
    for (int i = 0; i < 3; ++i) {
        p.key_size[i] = tiles[p.key_axis[i]];
    }
    FPS_CUDA_CHECK(cudaMemsetAsync(p.zeroed.begin, 0, p.zeroed.bytes, stream));
    bwd_operands(p, stream);
    dispatch(p.head_dim, p.dtype, [&](auto dim, auto element) {
        using Cfg = BwdConfig<decltype(dim)::value>;
        constexpr int kSmemBytes = dynamic_smem_bytes<BwdSmem<Cfg>>();
        const TileGrid &g = p.geometry;
        const int key_blocks = g.tiles.volume() * g.blocks_per_tile() + g.text.blocks(kBlock);
        launch(attn_bwd_sm90<Cfg, decltype(element)>, dim3(p.batch * p.heads * key_blocks), Cfg::kThreads, kSmemBytes,
               stream, p);
    });
    bwd_finish_dq(p, stream);
}

}  // namespace fps
