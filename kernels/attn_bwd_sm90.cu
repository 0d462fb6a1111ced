// Backward: dK, dV and dQ of the forward's FP8 attention. A CTA owns a key block, 128 keys, and walks the query blocks,
// 64 queries each, that attend it (KeyItem, work_items.cuh).
//
//   warps           role   waits for                       signals                                     registers
//   2 warpgroups    math   keys, full, q_full, ds_full,    empty, q_empty, ds_full, dq_full             240
//                          dq_empty
//   1 thread        load   empty, q_empty                  keys, full, q_full (with the copy engine's    24
//                                                          bytes)
//   2 warps         add    dq_full                         dq_empty                                      24
//
// A math warpgroup owns 64 of the keys. Scores are transposed, keys by queries: the rows of an accumulator are keys,
// and dK and dV stay in registers. A scale s is 2^e m with m in [1, 2): q, k and v in 16 bits take the power of two,
// which leaves them exact, and dS takes m. For a query block, with the operands of params.h,
//   S^T  = k8 q8^T                               FP8, in fp16, as the forward computed it
//   X    = number(S^T 8 s_q s_k scale log2(e))   the forward's P from its code in E4M3's octaves, times a power of two
//                                                that c takes off again; exact in bf16
//   dV  += X (c dO)
//   dS^T = X m_q m_k (m_v v (c dO)^T - delta)    rounded to bf16 before and after the product with X
//   dK  += dS^T q        dQ += dS k              m_k comes off when dK is stored, m_q in finish_dq
// The warpgroups exchange dS through shared memory. Each computes dQ of half of the channels, or dQ^T = k^T dS^T of
// half of the queries where registers can hold k^T. The add warps have the copy engine add dQ to global memory in fp32:
// atomically, or with `turns` one key block after the other.
//
// dK and dQ of a step are computed in the next step, beside its X. The tensor core has work during those,
// and neither warpgroup waits for the other's dS.
#include <algorithm>
#include <cute/tensor.hpp>
#include <numeric>

#include "fpsattention/fragments.cuh"
#include "fpsattention/hopper.cuh"
#include "fpsattention/launch.h"
#include "fpsattention/operands.cuh"
#include "fpsattention/params.h"
#include "fpsattention/wgmma.cuh"
#include "fpsattention/work_items.cuh"

namespace fps {
namespace {

using namespace cute;
using E4M3 = cute::float_e4m3_t;
using BF16 = cute::bfloat16_t;

template <int kHeadDim_, class Tiles_>
struct BwdConfig {
    using Tiles = Tiles_;                                // of KeyItem
    static constexpr bool kMayBeEmpty = kIsList<Tiles>;  // a key may have no query; a window has one at least
    static constexpr int kHeadDim = kHeadDim_;
    // The keys' operands stay in registers where these suffice: reads of shared memory cost power, which sets the
    // clock.
    static constexpr bool kKeysInRegisters = kHeadDim == 64;
    static constexpr int kDqQueries = kKeysInRegisters ? kQueryBlock / 2 : kQueryBlock;  // of dQ, per warpgroup
    static constexpr int kStages = 2;
    static constexpr int kWarpgroups = 2, kMathThreads = 128 * kWarpgroups, kThreads = kMathThreads + 128;
    static constexpr int kKeys = kBlock / kWarpgroups;  // per warpgroup
    static constexpr int kAddWarps = kStages;           // they take steps in turn
    // The load warps give registers to the math warps.
    static constexpr int kLoadRegisters = 24, kMathRegisters = 240;
    static_assert(128 * kLoadRegisters + kMathThreads * kMathRegisters <= kThreads * launch_registers(kThreads));
    static_assert(kHeadDim == 64 || kHeadDim == 128);

    // Rows by channels. A 16-bit operand in parts of 64 columns serves products that sum over channels and products
    // that sum over rows: the same bytes are K-major for one and MN-major for the other.
    using RowsFP8 = conditional_t<kHeadDim == 128, GMMA::Layout_K_SW128_Atom<E4M3>, GMMA::Layout_K_SW64_Atom<E4M3>>;
    using RowsBF16 = GMMA::Layout_K_SW128_Atom<BF16>;
    using ColumnsBF16 = GMMA::Layout_MN_SW128_Atom<BF16>;
    using ColumnsDS = conditional_t<kKeysInRegisters, GMMA::Layout_MN_SW64_Atom<BF16>, ColumnsBF16>;
    using PartByPart = Step<_2, _1>;
    using LayoutK8 = decltype(tile_to_shape(RowsFP8{}, Shape<Int<kKeys>, Int<kHeadDim>>{}));
    using LayoutQ8 = decltype(tile_to_shape(RowsFP8{}, Shape<Int<kQueryBlock>, Int<kHeadDim>>{}));
    using LayoutV = decltype(tile_to_shape(RowsBF16{}, Shape<Int<kBlock>, Int<kHeadDim>>{}));
    using LayoutQuery = decltype(tile_to_shape(RowsBF16{}, Shape<Int<kQueryBlock>, Int<kHeadDim>>{}));
    using LayoutQueryT = decltype(tile_to_shape(ColumnsBF16{}, Shape<Int<kHeadDim>, Int<kQueryBlock>>{}, PartByPart{}));
    using LayoutK = decltype(tile_to_shape(ColumnsBF16{}, Shape<Int<64>, Int<kBlock>>{}, PartByPart{}));
    using LayoutDS = decltype(tile_to_shape(ColumnsDS{}, Shape<Int<kDqQueries>, Int<kBlock>>{}, PartByPart{}));

    static constexpr auto K = GMMA::Major::K, MN = GMMA::Major::MN;
    using AtomGrad = conditional_t<kHeadDim == 128, SM90::GMMA::MMA_64x128x16_F32BF16BF16_RS<K, MN>,
                                   SM90::GMMA::MMA_64x64x16_F32BF16BF16_RS<K, MN>>;
    using AtomS = conditional_t<kKeysInRegisters, SM90::GMMA::MMA_64x64x32_F16E4M3E4M3_RS_TN<>,
                                SM90::GMMA::MMA_64x64x32_F16E4M3E4M3_SS_TN<>>;
    using AtomDP = conditional_t<kKeysInRegisters, SM90::GMMA::MMA_64x64x16_F32BF16BF16_RS<K, K>,
                                 SM90::GMMA::MMA_64x64x16_F32BF16BF16_SS<K, K>>;
    using AtomDQ = conditional_t<kKeysInRegisters, SM90::GMMA::MMA_64x32x16_F32BF16BF16_RS<K, MN>,
                                 SM90::GMMA::MMA_64x64x16_F32BF16BF16_SS<MN, MN>>;
    using MmaS = decltype(make_tiled_mma(AtomS{}));
    using MmaDP = decltype(make_tiled_mma(AtomDP{}));
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
    alignas(1024) BF16 k[Cfg::kKeysInRegisters ? 1 : kBlock * Cfg::kHeadDim];
    alignas(1024) BF16 v[kBlock * Cfg::kHeadDim];
    E4M3 k8[kBlock * Cfg::kHeadDim];
    Stage stages[Cfg::kStages];
    BF16 q[Cfg::kStages][kQueryBlock * Cfg::kHeadDim];  // released half a step later than the rest of its query block
    BF16 ds[2][kBlock * kQueryBlock];
    union {
        E4M3 v8[kBlock * Cfg::kHeadDim];  // until v is made of it
        float dq[Cfg::kWarpgroups][kQueryBlock * Cfg::kHeadDim / Cfg::kWarpgroups];
    };
    QueryRows rows[Cfg::kStages];
    BlockMeta k_meta;
    int place;  // of the key item in the order of work
    Barrier keys_full, full[Cfg::kStages], empty[Cfg::kStages], q_full[Cfg::kStages], q_empty[Cfg::kStages];
    Barrier ds_full, dq_full[Cfg::kAddWarps], dq_empty;
};

// Load thread: brings the keys, then keeps the rings of query blocks full.
template <class Cfg>
__device__ void load(const BackwardParams &p, BwdSmem<Cfg> &smem) {
    constexpr int kK8Bytes = sizeof(smem.k8), kQBytes = sizeof(smem.q[0]);
    constexpr int kQ8Bytes = sizeof(smem.stages[0].q8), kRowsBytes = sizeof(QueryRows);
    // Load the keys: k8, v8 and their meta.
    const KeyItem<typename Cfg::Tiles> key(p, smem.place);
    const uint8_t *k8 = p.kv_blocks + key.index * kv_block_bytes(Cfg::kHeadDim);
    smem.keys_full.expect(2 * kK8Bytes + int(sizeof(BlockMeta)));
    smem.keys_full.arrive();
    bulk_load(smem.k8, k8, kK8Bytes, smem.keys_full);
    bulk_load(smem.v8, k8 + kK8Bytes, kK8Bytes, smem.keys_full);
    bulk_load(&smem.k_meta, k8 + 2 * kK8Bytes, sizeof(BlockMeta), smem.keys_full);

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

// Add warp `number`: has the copy engine add dQ of every second step to global memory. One lane does the work; the
// others follow it so that positions stay in uniform registers.
template <class Cfg>
__device__ void add(const BackwardParams &p, BwdSmem<Cfg> &smem, int number) {
    const KeyItem<typename Cfg::Tiles> key(p, smem.place);
    RingState<1> ring;
    int next = 0;  // add warp of the next step
    for_each_query_block(p, key, [&](const QueryStep &query) {
        const bool is_other = next != number;
        next ^= 1;
        if (is_other) {
            return;
        }
        // Wait for the turn. First, so that it has mostly come, and is known to have, when dQ is there: whoever waits
        // for this CTA's turn would wait for that as well.
        Turn turn{};
        if (p.turns != nullptr) {
            turn = turn_of(p, key, query);
            wait_for(p.turns + query.index, turn.from);
            fence_proxy_async_global();
        }

        // Wait for dQ.
        smem.dq_full[number].wait(ring.full_parity());
        __syncwarp();  // a lane left behind could miss a phase of dq_full
        ring.next();
        if (threadIdx.x % 32 == 0) {
            // Add dQ.
            fence_proxy_async();
            bulk_reduce_add(p.dq_sum + query.index * (kQueryBlock * Cfg::kHeadDim), smem.dq[0], int(sizeof(smem.dq)));

            // Release the buffer once the copy engine has read it.
            bulk_wait_read();
            smem.dq_empty.arrive();  // for the warp, whose other lanes do not use the buffer

            // Pass the turn on once all is added. The other warp is at its step meanwhile.
            if (p.turns != nullptr) {
                bulk_wait();
                fence_proxy_async_global();
                store_release(p.turns + query.index, turn.to);
            }
        }
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

// dS = X (slope dP - k_mantissa delta), as A operand. Two elements that are neighbours in an accumulator share a word.
template <class TensorP, class TensorX, class TensorA>
__device__ __forceinline__ void differentiate(const TensorP &dp, const TensorX &x, TensorA &a, const QueryRows &rows,
                                              float slope, float k_mantissa) {
    Tensor numbers = recast<const uint32_t>(x);
    Tensor words = recast<uint32_t>(a);
#pragma unroll
    for (int octet = 0; octet < kOctets; ++octet) {
        float2 minus_delta = of_queries(rows.minus_delta, octet);
        minus_delta.x *= k_mantissa;
        minus_delta.y *= k_mantissa;
#pragma unroll
        for (int i = 2 * octet; i < 2 * octet + 2; ++i) {
            const uint32_t difference = downcast<__nv_bfloat16>(fmaf(dp(2 * i), slope, minus_delta.x),
                                                                fmaf(dp(2 * i + 1), slope, minus_delta.y));
            words(i) = multiply_bf16x2(numbers(i), difference);
        }
    }
}

// dS^T lies in shared memory as [64 / kPart][keys][kPart queries], swizzled. Four matrices of 8 x 8 are stored at a
// time, which are words i .. i + 3 of the operand: twice 8 keys, then the same keys and the next 8 queries.
template <int kPart, class TensorA>
__device__ __forceinline__ void store_ds(BF16 *ds, int first_key, const TensorA &a) {
    Tensor words = recast<const uint32_t>(a);
    const int thread = threadIdx.x % 128, lane = thread % 32;
    const int key = first_key + thread / 32 * 16 + lane / 8 % 2 * 8 + lane % 8;  // whose row this lane addresses
#pragma unroll
    for (int i = 0; i < size(words); i += 4) {
        const int query = 4 * i + lane / 16 * 8;
        const int offset = query / kPart * (2 * kPart * kBlock) + swizzled<2 * kPart>(key, query % kPart * 2);
        void *row = reinterpret_cast<char *>(ds) + offset;
        store_matrices(row, words(i), words(i + 1), words(i + 2), words(i + 3));
    }
}

// dQ of a step in the order of the fragment, for the add warp. The step's stage tells whether its number is odd.
template <class Cfg, class TensorQ>
__device__ __forceinline__ void hand_over_dq(BwdSmem<Cfg> &smem, int warpgroup, const TensorQ &dq, int stage) {
    static_assert(Cfg::kStages == 2);
    smem.dq_empty.wait(stage ^ 1);
    float *to = smem.dq[warpgroup] + 4 * (threadIdx.x % 128);
#pragma unroll
    for (int i = 0; i < size(dq); i += 4) {
        *reinterpret_cast<float4 *>(to + i * 128) = {dq(i), dq(i + 1), dq(i + 2), dq(i + 3)};
    }
    smem.dq_full[stage].arrive_as_warp();
}

// dK and dV in raster order. `row` is this thread's first key of the block; the other is row + 8.
template <class Cfg, class T, class TensorC>
__device__ void store(const BackwardParams &p, const KeyItem<typename Cfg::Tiles> &key, int row, float dk_scale,
                      const TensorC &dk, const TensorC &dv) {
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
                                    [&](int i) { return dk(i) * dk_scale; });
        store_row<T, Cfg::kHeadDim>(row_of(p.dv, p.dv_strides, token), valid, r, lane, [&](int i) { return dv(i); });
    }
}

// Operands of a query block, and dS, in shared memory, as descriptors. The last mode is the buffer.
template <class Q8, class DOut, class DOutT, class QT, class DS>
struct QueryOperands {
    Q8 q8;
    DOut dout;
    DOutT dout_t;
    QT q_t;
    DS ds;
};
template <class... X>
QueryOperands(X...) -> QueryOperands<X...>;

template <class Cfg>
__device__ auto query_operands_of(BwdSmem<Cfg> &smem, int warpgroup) {
    constexpr int kStages = Cfg::kStages, kQStride = kQueryBlock * Cfg::kHeadDim, kDsStride = kBlock * kQueryBlock;
    constexpr int kQ8Stride = sizeof(smem.stages[0]), kDOutStride = kQ8Stride / sizeof(BF16);
    auto &first = smem.stages[0];
    Tensor q8 = smem_tensor(first.q8, ring_of<kStages, kQ8Stride>(typename Cfg::LayoutQ8{}));
    Tensor dout = smem_tensor(first.dout, ring_of<kStages, kDOutStride>(typename Cfg::LayoutQuery{}));
    Tensor dout_t = smem_tensor(first.dout, ring_of<kStages, kDOutStride>(typename Cfg::LayoutQueryT{}));
    Tensor q_t = smem_tensor(smem.q[0], ring_of<kStages, kQStride>(typename Cfg::LayoutQueryT{}));
    const int first_query = warpgroup * (kQueryBlock - Cfg::kDqQueries);
    Tensor ds = smem_tensor(smem.ds[0] + first_query * kBlock, ring_of<2, kDsStride>(typename Cfg::LayoutDS{}));
    const auto ds_operand = [&] {
        if constexpr (Cfg::kKeysInRegisters) {
            return operand_b<typename Cfg::MmaDQ>(ds);
        } else {
            return operand_a<typename Cfg::MmaDQ>(ds);
        }
    };
    return QueryOperands{operand_b<typename Cfg::MmaS>(q8), operand_b<typename Cfg::MmaDP>(dout),
                         operand_b<typename Cfg::MmaGrad>(dout_t), operand_b<typename Cfg::MmaGrad>(q_t), ds_operand()};
}

// The keys of a math warpgroup.
struct OwnKeys {
    int warpgroup;
    int first;          // first key, in the block
    int row;            // this thread's first key, in the block; the other is row + 8
    int valid;          // keys of the block that are not padding
    float k_scale;      // of k8
    float kv_mantissa;  // m_k m_v
    float score_scale;  // of the scores before softmax
};

// Operands of the keys: k8, v, and k for dQ. In registers or as descriptors.
template <class K8, class V, class K>
struct KeyOperands {
    K8 k8;
    V v;
    K k;
};
template <class... X>
KeyOperands(X...) -> KeyOperands<X...>;

// Makes operands of k8 and v8, with all math warps. Phase 0 of ds_full: all have written what they widen to shared
// memory, and read v8. issue_dq waits for it as well, and fences, before the first product that reads k or v there.
template <class Cfg>
__device__ __forceinline__ auto key_operands_of(BwdSmem<Cfg> &smem, const OwnKeys &own) {
    const uint32_t k_power = power_of(own.k_scale);
    const auto wait_for_math_warps = [&] {
        smem.ds_full.arrive_as_warp();
        smem.ds_full.wait(0);
    };
    widen_columns<Cfg::kHeadDim, Cfg::kMathThreads>(smem.v, smem.v8, power_of(smem.k_meta.v_scale));
    if constexpr (Cfg::kKeysInRegisters) {
        FragmentA<E4M3, typename Cfg::MmaS, Cfg::kKeys, Cfg::kHeadDim> k8;
        FragmentA<BF16, typename Cfg::MmaDP, Cfg::kKeys, Cfg::kHeadDim> v;
        FragmentA<BF16, typename Cfg::MmaDQ, Cfg::kHeadDim, kBlock> k_t;
        load_rows<Cfg::kHeadDim>(smem.k8, own.row, k8);
        load_transposed<Cfg::kHeadDim>(smem.k8, k_power, k_t);
        wait_for_math_warps();
        load_rows<128>(smem.v, own.row, v);
        return KeyOperands{k8, v, k_t};
    } else {
        widen_rows<Cfg::kHeadDim, Cfg::kMathThreads>(smem.k, smem.k8, k_power);
        wait_for_math_warps();
        Tensor k8 = smem_tensor(smem.k8 + own.first * Cfg::kHeadDim, typename Cfg::LayoutK8{});
        Tensor v = local_tile(smem_tensor(smem.v, typename Cfg::LayoutV{}),
                              Shape<Int<Cfg::kKeys>, Int<Cfg::kHeadDim>>{}, make_coord(own.warpgroup, 0));
        Tensor k = smem_tensor(smem.k + own.warpgroup * kBlock * 64, typename Cfg::LayoutK{});
        return KeyOperands{operand_a<typename Cfg::MmaS>(k8), operand_a<typename Cfg::MmaDP>(v),
                           operand_b<typename Cfg::MmaDQ>(k)};
    }
}

// Results in registers.
template <class Cfg>
struct Fragments {
    FragmentC<typename Cfg::MmaS, Cfg::kKeys, kQueryBlock> s;           // S^T
    FragmentC<typename Cfg::MmaDP, Cfg::kKeys, kQueryBlock> dp;         // dP^T
    FragmentA<BF16, typename Cfg::MmaGrad, Cfg::kKeys, kQueryBlock> a;  // dS^T, as operand
    FragmentA<BF16, typename Cfg::MmaGrad, Cfg::kKeys, kQueryBlock> x;  // X, as operand
    FragmentC<typename Cfg::MmaDQ, 64, Cfg::kDqQueries> dq;             // queries by channels, or channels by queries
    FragmentC<typename Cfg::MmaGrad, Cfg::kKeys, Cfg::kHeadDim> dv, dk;
};

// Waits for q of a step and issues dK += dS^T q.
template <class Cfg, class Queries>
__device__ __forceinline__ void issue_dk(BwdSmem<Cfg> &smem, const Queries &queries, Fragments<Cfg> &fragments,
                                         RingState<Cfg::kStages> step) {
    smem.q_full[step.stage()].wait(step.full_parity());
    warpgroup_fence_operand(fragments.a);
    issue<typename Cfg::MmaGrad>(fragments.a, queries.q_t(_, _, _, step.stage()), fragments.dk, Sum::kAddTo);
}

// Waits for dS of both warpgroups in this buffer and issues dQ = dS k. dS of step n lies in buffer n % 2 and completes
// phase n + 1 of ds_full; phase 0 is of key_operands_of.
template <class Cfg, class Queries, class Keys>
__device__ __forceinline__ void issue_dq(BwdSmem<Cfg> &smem, const Queries &queries, const Keys &keys,
                                         Fragments<Cfg> &fragments, int buffer) {
    smem.ds_full.wait(buffer ^ 1);
    fence_proxy_async();
    if constexpr (Cfg::kKeysInRegisters) {
        issue<typename Cfg::MmaDQ>(keys.k, queries.ds(_, _, _, buffer), fragments.dq, Sum::kFromZero);
    } else {
        issue<typename Cfg::MmaDQ>(queries.ds(_, _, _, buffer), keys.k, fragments.dq, Sum::kFromZero);
    }
}

// One query block. A prime marks values of the previous step, at ring position `before`. In the first step dS' in
// registers is zero, and what shared memory gives for dQ' is dropped.
template <class Cfg, class Queries, class Keys>
__device__ __forceinline__ void step(BwdSmem<Cfg> &smem, const Queries &queries, const Keys &keys,
                                     Fragments<Cfg> &fragments, const OwnKeys &own, RingState<Cfg::kStages> ring,
                                     RingState<Cfg::kStages> &before, bool is_first) {
    auto &[rS, rdP, rA, rX, rdQ, rdV, rdK] = fragments;
    const int s = ring.stage(), ds_buffer = s;  // dS' is in the other buffer
    const QueryRows &rows = smem.rows[s];
    float2 offset[kHalfOctets];

    // Wait for the queries. Issue S^T = k8 q8^T.
    smem.full[s].wait(ring.full_parity());
    issue<typename Cfg::MmaS>(keys.k8, queries.q8(_, _, _, s), rS, Sum::kFromZero);

    // Wait for q'. Issue dK += dS^T' q'.
    issue_dk(smem, queries, fragments, before);

    // Wait for S^T. X of the first half of the queries.
    const float factor = score_factor(rows.scale, own.k_scale, own.score_scale);
    load_offsets<0>(rows, offset);
    wait_for_products<1>(rS);
    to_numbers<Cfg::kHeadDim, 0>(rS, rX, factor, offset, own.row, own.valid);

    // Wait for dS' of both warpgroups. Issue dQ' = dS' k.
    issue_dq(smem, queries, keys, fragments, ds_buffer ^ 1);

    // Wait for dK and dQ'. Hand over dQ' and release q'.
    load_offsets<kHalfOctets>(rows, offset);
    wait_for_products<0>(rdK, rdQ);
    if (!is_first) {
        hand_over_dq(smem, own.warpgroup, rdQ, before.stage());
        smem.q_empty[before.stage()].arrive_as_warp();
        before.next();
    }

    // Issue dP^T = v dO^T.
    issue<typename Cfg::MmaDP>(keys.v, queries.dout(_, _, _, s), rdP, Sum::kFromZero);

    // X of the other half.
    to_numbers<Cfg::kHeadDim, kHalfOctets>(rS, rX, factor, offset, own.row, own.valid);

    // Issue dV += X dO.
    warpgroup_fence_operand(rX);
    issue<typename Cfg::MmaGrad>(rX, queries.dout_t(_, _, _, s), rdV, Sum::kAddTo);

    // Wait for dP^T. dS^T = X (dP^T - delta), with the scales' mantissas.
    const float k_mantissa = mantissa_of(own.k_scale), slope = mantissa_of(rows.scale) * own.kv_mantissa;
    wait_for_products<1>(rdP);
    differentiate(rdP, rX, rA, rows, slope, k_mantissa);

    // Publish dS^T.
    store_ds<Cfg::kDqQueries>(smem.ds[ds_buffer], own.first, rA);
    smem.ds_full.arrive_as_warp();

    // Wait for dV. Release the stage.
    wait_for_products<0>(rdV);
    smem.empty[s].arrive_as_warp();
}

// Math warpgroup `warpgroup` owns the 64 keys of the block from 64 * warpgroup on.
template <class Cfg, class T>
__device__ void math(const BackwardParams &p, BwdSmem<Cfg> &smem, int warpgroup) {
    // Wait for the keys. Make operands of them.
    smem.keys_full.wait(0);
    const BlockMeta &meta = smem.k_meta;
    const int first_key = warpgroup * Cfg::kKeys;
    const OwnKeys own{warpgroup,  first_key,  first_key + fragment_row(threadIdx.x % 128),
                      meta.valid, meta.scale, mantissa_of(meta.scale) * mantissa_of(meta.v_scale),
                      p.scale};
    const auto keys = key_operands_of(smem, own);
    const auto queries = query_operands_of(smem, warpgroup);
    Fragments<Cfg> fragments;
    clear(fragments.dv);
    clear(fragments.dk);
    clear(fragments.a);

    // Walk the query blocks.
    RingState<Cfg::kStages> ring, before;
    bool is_first = true;
    for (int left = KeyItem<typename Cfg::Tiles>(p, smem.place).n_query_blocks(p.geometry); left > 0; --left) {
        step(smem, queries, keys, fragments, own, ring, before, is_first);
        ring.next();
        is_first = false;
    }

    // dK and dQ of the last step, if there was one.
    if (!Cfg::kMayBeEmpty || !is_first) {
        const int last = ring.stage() ^ 1;
        issue_dk(smem, queries, fragments, before);
        issue_dq(smem, queries, keys, fragments, last);
        wait_for_products<0>(fragments.dk, fragments.dq);
        hand_over_dq(smem, warpgroup, fragments.dq, before.stage());
    }

    const float dk_scale = p.scale / mantissa_of(meta.scale);
    store<Cfg, T>(p, KeyItem<typename Cfg::Tiles>(p, smem.place), own.row, dk_scale, fragments.dk, fragments.dv);
}

template <class Cfg, class T>
__global__ void __launch_bounds__(Cfg::kThreads, 1)
    attn_bwd_sm90(const __grid_constant__ Deferred<BackwardParams> deferred) {
    const BackwardParams &p = deferred.after_previous();
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
        for (int w = 0; w < Cfg::kAddWarps; ++w) {
            smem.dq_full[w].init(kMathWarps);
        }
        smem.dq_empty.init(1);
        fence_barrier_init();
        // With turns a CTA waits for those ahead of it: their places are taken, so they run.
        smem.place = p.turns == nullptr ? blockIdx.x : atomicAdd(p.next_item, 1);
    }
    __syncthreads();
    if (!KeyItem<typename Cfg::Tiles>(p, smem.place).exists()) {
        return;
    }
    if (threadIdx.x < Cfg::kMathThreads) {
        claim_registers<Cfg::kMathRegisters>();
        const int warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0);  // warp-uniform, for the descriptors' sake
        math<Cfg, T>(p, smem, warpgroup);
    } else {
        release_registers<Cfg::kLoadRegisters>();
        const int warp = __shfl_sync(~0u, (threadIdx.x - Cfg::kMathThreads) / 32, 0);
        if (warp < Cfg::kAddWarps) {
            add<Cfg>(p, smem, warp);
        } else if (threadIdx.x == Cfg::kThreads - 32) {
            load<Cfg>(p, smem);
        }
    }
}

// With turns, key blocks of several heads alternate: a CTA then waits for one that started as many places earlier. It
// has to make up for less of that, the more steps it has, and more heads leave fewer of their queries and sums dQ in
// L2.
int heads_in_turns(int steps) {
    return steps < 200 ? 4 : steps < 1000 ? 2 : 1;
}

}  // namespace

void attn_bwd(BackwardParams p, cudaStream_t stream) {
    // Axes that a window covers come first: the key blocks that run at the same time then have the same queries. Of the
    // others, first the one of which it covers most: they have the fewest queries, and sums dQ, in common. With turns,
    // the one of which it covers least: fewest key blocks there are near a border, where they have more or fewer
    // queries than their neighbours, who would wait for them.
    const Int3 tiles = p.geometry.tiles, window = p.window(p.head_at(0));
    const auto rank = [&](int axis) {
        const float covered = std::min(1.0f, float(window[axis]) / float(tiles[axis]));
        return covered < 1 && p.turns != nullptr ? -covered : covered;
    };
    std::iota(p.key_axis, p.key_axis + 3, 0);
    std::reverse(p.key_axis, p.key_axis + 3);
    std::stable_sort(p.key_axis, p.key_axis + 3, [&](int a, int b) { return rank(a) > rank(b); });
    for (int i = 0; i < 3; ++i) {
        p.key_size[i] = tiles[p.key_axis[i]];
    }
    p.heads_together = p.turns == nullptr ? 1 : heads_in_turns(window.volume() * (p.geometry.slot / kQueryBlock));
    FPS_CUDA_CHECK(cudaMemsetAsync(p.zeroed.begin, 0, p.zeroed.bytes, stream));
    bwd_operands(p, stream);
    dispatch(p.head_dim, p.dtype, [&](auto dim, auto element) {
        constexpr int kDim = decltype(dim)::value;
        const TileGrid &g = p.geometry;
        const int key_blocks = g.tiles.volume() * g.blocks_per_tile() + g.text.blocks(kBlock);
        const auto launch_as = [&](auto cfg) {
            using Cfg = decltype(cfg);
            constexpr int kSmemBytes = dynamic_smem_bytes<BwdSmem<Cfg>>();
            launch(attn_bwd_sm90<Cfg, decltype(element)>, dim3(p.batch * p.heads * key_blocks), Cfg::kThreads,
                   kSmemBytes, stream, p);
        };
        p.keys.given() ? launch_as(BwdConfig<kDim, TileList>{}) : launch_as(BwdConfig<kDim, TileBox>{});
    });
    bwd_finish_dq(p, stream);
}

}  // namespace fps
