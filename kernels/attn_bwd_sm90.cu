// Backward: dK, dV and dQ of the forward's FP8 attention. A CTA owns a key block, 128 keys, and walks the query
// blocks, 64 queries each, that attend it.
//
//   warps           role   waits for                       signals                                     registers
//   2 warpgroups    math   keys, full, q_full, ds_full,    empty, q_empty, ds_full, dq_full             240
//                          dq_empty
//   1 thread        load   empty, q_empty                  keys, full, q_full (with the copy engine's     24
//                                                          bytes)
//   2 warps         add    dq_full                         dq_empty                                      24
//
// A math warpgroup owns 64 of the keys. Everything is transposed, keys by queries, so that the rows of its
// accumulators are its keys and dK, dV stay in registers. For a query block, with the operands of params.h,
//   S^T  = k8 q8^T                                    FP8, as the forward computed it
//   X    = 2^(S^T s_q s_k scale log2(e) + offset)     448 P, up to the power of two that c takes back
//   dV  += X^ (c dO)                                  X^: X in E4M3's four significant bits, exact in bf16
//   dS^T = X (v (c dO)^T - delta)                     bf16
//   dK  += dS^T q        dQ += dS k
// The two warpgroups swap dS through shared memory, then each takes half of the channels of dQ. An add warp for each
// half has the copy engine add it up in global memory in fp32: atomically, or with `turns` one key block after the
// other.
//
// dK and dQ of a step are computed in the next one, beside its exponentials, so that the tensor core has work during
// those and neither warpgroup waits for the other's dS.
#include <algorithm>
#include <cfloat>
#include <cute/tensor.hpp>
#include <numeric>

#include "fpsattention/fragments.cuh"
#include "fpsattention/hopper.cuh"
#include "fpsattention/launch.h"
#include "fpsattention/params.h"

namespace fps {
namespace {

using namespace cute;
using E4M3 = cute::float_e4m3_t;
using BF16 = cute::bfloat16_t;

template <int kHeadDim_>
struct BwdConfig {
    static constexpr int kHeadDim = kHeadDim_;
    static constexpr int kHalf = kHeadDim / 2;  // channels of dQ that one warpgroup computes
    static constexpr int kStages = 2;
    static constexpr int kWarpgroups = 2, kMathThreads = 128 * kWarpgroups, kThreads = kMathThreads + 128;
    static constexpr int kKeys = kBlock / kWarpgroups;  // of a warpgroup
    // At launch every warp has as many, in multiples of 8; then the load warps give theirs up to the math warps.
    static constexpr int kLaunchRegisters = 64 * 1024 / kThreads / 8 * 8;
    static constexpr int kLoadRegisters = 24, kMathRegisters = 240;
    static_assert(128 * kLoadRegisters + kMathThreads * kMathRegisters <= kThreads * kLaunchRegisters);
    static_assert(kHeadDim == 64 || kHeadDim == 128);

    // Rows by channels. "By channels" the tensor core sums over channels; an image in parts of 64 columns serves both
    // ways, since the same bytes are K-major for one and MN-major for the other.
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
    using MmaS = decltype(make_tiled_mma(SM90::GMMA::MMA_64x64x32_F32E4M3E4M3_SS_TN<>{}));
    using MmaDP = decltype(make_tiled_mma(SM90::GMMA::MMA_64x64x16_F32BF16BF16_SS<K, K>{}));
    using MmaGrad = decltype(make_tiled_mma(AtomGrad{}));
    using MmaDQ = decltype(make_tiled_mma(AtomDQ{}));
};

// What bulk copies bring is parts of the images of params.h.
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
    BF16 q[Cfg::kStages][kQueryBlock * Cfg::kHeadDim];  // goes half a step later than the rest of its query block
    BF16 ds[2][kBlock * kQueryBlock];
    float dq[Cfg::kWarpgroups][kQueryBlock * Cfg::kHalf];
    QueryRows rows[Cfg::kStages];
    BlockMeta k_meta;
    Barrier keys_full, full[Cfg::kStages], empty[Cfg::kStages], q_full[Cfg::kStages], q_empty[Cfg::kStages];
    Barrier ds_full, dq_full[Cfg::kWarpgroups], dq_empty[Cfg::kWarpgroups];
};

// The key block of a CTA. Blocks of one head run together, in the order of p.key_axis, so that they share its queries
// in L2; with a window per head, heads with large windows come first. TextTokens keys, which all queries attend, come
// before all others, so that the last key blocks to run are short ones; but after them where turns are taken: a CTA
// must then wait only for CTAs with a smaller blockIdx.x. It assumes that these have started, which CUDA does not
// promise.
struct KeyBlock {
    int batch, head, first_row;
    int number;  // of the text key block among those of its head that hold a token; -1: a block of the grid's
    int64_t bh, image;
    Int3 tile;
    TileRows rows;
    TileBox queries;
    TextTokens text;  // valid tokens

    __device__ explicit KeyBlock(const BackwardParams &p) {
        const TileGrid &g = p.geometry;
        const int per_tile = g.blocks_per_tile(), text_blocks = g.text.blocks(kBlock);
        const int in_grid = g.tiles.volume() * per_tile;
        int index = blockIdx.x + (p.turns == nullptr ? 0 : p.batch * p.heads * text_blocks);
        index -= index < int(gridDim.x) ? 0 : int(gridDim.x);
        const bool is_text = index < p.batch * p.heads * text_blocks;
        index -= is_text ? 0 : p.batch * p.heads * text_blocks;
        const int per_head = is_text ? text_blocks : in_grid, in_head = index % per_head;
        index /= per_head;
        batch = index % p.batch;
        head = p.head_at(index / p.batch);
        bh = int64_t(batch) * p.heads + head;
        text = p.valid_text(batch);
        if (is_text) {
            number = in_head;
            const int block = g.text_block(number, text, kBlock);
            image = bh * g.blocks() + block;
            first_row = block % per_tile * kBlock;
            rows = number < text.blocks(kBlock) ? g.rows(block / per_tile, text) : TileRows{};
            queries = g.everything();
            return;
        }
        number = -1;
        const int place = in_head / per_tile, block = in_head % per_tile;
        const Int3 size{p.key_size[2], p.key_size[1], p.key_size[0]}, at = coordinates(place, size);
        const auto along = [&](int axis) { return axis == p.key_axis[0] ? at.w : axis == p.key_axis[1] ? at.h : at.t; };
        tile = {along(0), along(1), along(2)};
        image = bh * g.blocks() + g.tile_index(tile) * per_tile + block;
        first_row = block * kBlock;
        rows = g.rows(tile);
        queries = g.queries_of(tile, p.window(head), p.border);
    }
    __device__ bool exists() const { return first_row < rows.valid(); }
};

// A query block, its number among all of B, H; of text queries, or of this tile.
struct QueryBlock {
    int64_t image;
    bool is_text;
    Int3 tile;
};

// Key blocks of a query block are numbered along its box of keys in raster order, `blocks_per_tile` to a tile, from 1;
// then come the text ones. The number of this key block is its `last`; its `turn` is the number of the one before it
// that holds a token.
__device__ inline int2 turn_of(const BackwardParams &p, const KeyBlock &key, const QueryBlock &query) {
    const TileGrid &g = p.geometry;
    const TileBox box = query.is_text ? g.everything() : g.keys_of(query.tile, p.window(key.head), p.border);
    const Int3 size{box.t.size(), box.h.size(), box.w.size()};
    const bool is_text = key.number >= 0;
    const int tile = is_text
                         ? size.volume()
                         : ((key.tile.t - box.t.lo) * size.h + key.tile.h - box.h.lo) * size.w + key.tile.w - box.w.lo;
    const int block = is_text ? key.number : key.first_row / kBlock, last = tile * g.blocks_per_tile() + block + 1;
    if (block > 0 || tile == 0) {
        return {last - 1, last};
    }
    const Int3 before = coordinates(tile - 1, size);
    const Int3 extent = g.extent({box.t.lo + before.t, box.h.lo + before.h, box.w.lo + before.w});
    return {(tile - 1) * g.blocks_per_tile() + ceil_div(extent.volume(), kBlock), last};
}

// The query blocks that attend a key block, in the order in which the CTA takes them.
template <class F>
__device__ __forceinline__ void for_each_query_block(const BackwardParams &p, const KeyBlock &key, F &&f) {
    const TileGrid &g = p.geometry;
    const int per_tile = g.slot / kQueryBlock;
    const int64_t images = key.bh * (g.all_tiles() * per_tile);
    const TileBox &box = key.queries;
    const Int3 size{box.t.size(), box.h.size(), box.w.size()};
    const int tiles = box.tiles();
    // Key blocks that run at the same time start at different query tiles, or they would all add to the same rows of
    // dQ. With turns they start where the turns do.
    const int start = p.turns == nullptr && tiles > 0 ? int(key.image % tiles) : 0;
    for (int i = 0; i < tiles; ++i) {
        const Int3 at = coordinates((start + i) % tiles, size);
        const Int3 tile{box.t.lo + at.t, box.h.lo + at.h, box.w.lo + at.w};
        const int blocks = ceil_div(g.extent(tile).volume(), kQueryBlock);
        const int64_t first = images + g.tile_index(tile) * per_tile;
        for (int b = 0; b < blocks; ++b) {
            f(QueryBlock{first + b, false, tile});
        }
    }
    for (int i = 0; i < key.text.blocks(kQueryBlock); ++i) {
        f(QueryBlock{images + g.text_block(i, key.text, kQueryBlock), true, {}});
    }
}

// One thread brings the keys, then keeps the rings of query blocks full.
template <class Cfg>
__device__ void load(const BackwardParams &p, BwdSmem<Cfg> &smem) {
    constexpr int kK8Bytes = sizeof(smem.k8), kKeyBytes = sizeof(smem.k);
    constexpr int kQBytes = sizeof(smem.q[0]), kQ8Bytes = sizeof(smem.stages[0].q8), kRowsBytes = sizeof(QueryRows);
    const KeyBlock key(p);
    const uint8_t *kv = p.kv_blocks + key.image * kv_block_bytes(Cfg::kHeadDim);
    smem.keys_full.expect(kK8Bytes + int(sizeof(BlockMeta)) + 2 * kKeyBytes);
    smem.keys_full.arrive();
    bulk_load(smem.k8, kv, kK8Bytes, smem.keys_full);
    bulk_load(&smem.k_meta, kv + 2 * kK8Bytes, sizeof(BlockMeta), smem.keys_full);
    const uint8_t *images = p.key_operands + key.image * bwd_key_bytes(Cfg::kHeadDim);
    bulk_load(smem.k, images, kKeyBytes, smem.keys_full);
    bulk_load(smem.v, images + kKeyBytes, kKeyBytes, smem.keys_full);

    RingState<Cfg::kStages> ring;
    for_each_query_block(p, key, [&](const QueryBlock &query) {
        const int s = ring.stage();
        const uint8_t *q8 = p.q_blocks + query.image * q_block_bytes(Cfg::kHeadDim);
        const uint8_t *image = p.query_operands + query.image * bwd_query_bytes(Cfg::kHeadDim);
        smem.empty[s].wait(ring.empty_parity());
        fence_proxy_async();  // the math warps read the row constants of this stage
        smem.full[s].expect(kQ8Bytes + kQBytes + kRowsBytes);
        smem.full[s].arrive();
        bulk_load(smem.stages[s].q8, q8, kQ8Bytes, smem.full[s]);
        bulk_load(smem.stages[s].dout, image + kQBytes, kQBytes, smem.full[s]);
        bulk_load(&smem.rows[s], image + 2 * kQBytes, kRowsBytes, smem.full[s]);
        smem.q_empty[s].wait(ring.empty_parity());
        smem.q_full[s].expect(kQBytes);
        smem.q_full[s].arrive();
        bulk_load(smem.q[s], image, kQBytes, smem.q_full[s]);
        ring.next();
    });
}

// A warp has half of the channels of every query block's dQ added to global memory. One lane does it; that the warp
// comes along keeps positions uniform, in registers that are no thread's.
template <class Cfg>
__device__ void add(const BackwardParams &p, BwdSmem<Cfg> &smem, int half) {
    constexpr int kFloats = kQueryBlock * Cfg::kHalf;
    const KeyBlock key(p);
    RingState<1> ring;
    for_each_query_block(p, key, [&](const QueryBlock &query) {
        smem.dq_full[half].wait(ring.full_parity());
        ring.next();
        const int64_t i = 2 * query.image + half;
        int2 turn{};
        if (p.turns != nullptr) {
            turn = turn_of(p, key, query);
            wait_for(p.turns + i, turn.x);
            fence_proxy_async_global();
        }
        if (threadIdx.x % 32 == 0) {
            fence_proxy_async();
            bulk_reduce_add(p.dq_sum + i * kFloats, smem.dq[half], kFloats * int(sizeof(float)));
            bulk_wait_read();
            smem.dq_empty[half].arrive();
            if (p.turns != nullptr) {
                bulk_wait();
                fence_proxy_async_global();
                store_release(p.turns + i, turn.y);
            }
        }
        __syncwarp();  // a lane left behind could miss a phase of dq_full
    });
}

// x in E4M3's four significant bits, to nearest, ties to even; where E4M3 has subnormals or nothing, four bits still.
// The last bit of 2^20 x + x is worth an eighth of x's leading one, and 2^20 x itself has no smaller bits.
__device__ __forceinline__ float four_bits(float x) {
    return __fmaf_rn(x, -0x1p20f, __fmaf_rn(x, 0x1p20f, x));
}

// 16-bit pairs of an accumulator, in the order of an A operand.
template <class TensorX, class TensorA, class F>
__device__ __forceinline__ void pack(const TensorX &x, TensorA &a, F &&f) {
    Tensor words = recast<uint32_t>(a);
#pragma unroll
    for (int i = 0; i < size(words); ++i) {
        words(i) = downcast<__nv_bfloat16>(f(x(2 * i)), f(x(2 * i + 1)));
    }
}

// dS^T of this warpgroup's keys in shared memory, [keys][64 queries], swizzled: f(address of this lane's row, words)
// for every four matrices. In the order of the words, these are two groups of 8 keys, then the next 8 queries.
template <class TensorA, class F>
__device__ __forceinline__ void for_each_four_matrices(BF16 *ds, TensorA &a, int first_key, int thread, F &&f) {
    Tensor words = recast<uint32_t>(a);
    const int lane = thread % 32, key = first_key + thread / 32 * 16 + lane / 8 % 2 * 8 + lane % 8;
#pragma unroll
    for (int i = 0; i < size(words); i += 4) {
        const int query = 4 * i + lane / 16 * 8;
        f(reinterpret_cast<char *>(ds) + swizzled<128>(key, 2 * query), words(i), words(i + 1), words(i + 2),
          words(i + 3));
    }
}

// Warpgroup `warpgroup` owns keys 64 * warpgroup and on of the block.
template <class Cfg, class T>
__device__ void math(const BackwardParams &p, BwdSmem<Cfg> &smem, int warpgroup) {
    const int thread = threadIdx.x % 128, lane = thread % 4;
    constexpr auto kWithStages = [](auto layout, auto stages, auto stride) {
        return make_composed_layout(layout.layout_a(), layout.offset(),
                                    append(layout.layout_b(), make_layout(stages, stride)));
    };
    constexpr auto kStages = Int<Cfg::kStages>{};
    constexpr auto kStageBytes = Int<sizeof(smem.stages[0])>{};
    constexpr auto kStageStride = Int<sizeof(smem.stages[0]) / sizeof(BF16)>{};
    constexpr auto kQStride = Int<kQueryBlock * Cfg::kHeadDim>{};
    auto &first = smem.stages[0];
    Tensor sK8 = make_tensor(make_smem_ptr(smem.k8 + warpgroup * Cfg::kKeys * Cfg::kHeadDim), typename Cfg::LayoutK8{});
    Tensor sQ8 = make_tensor(make_smem_ptr(first.q8), kWithStages(typename Cfg::LayoutQ8{}, kStages, kStageBytes));
    Tensor sV = local_tile(make_tensor(make_smem_ptr(smem.v), typename Cfg::LayoutV{}),
                           Shape<Int<Cfg::kKeys>, Int<Cfg::kHeadDim>>{}, make_coord(warpgroup, 0));
    Tensor sdO =
        make_tensor(make_smem_ptr(first.dout), kWithStages(typename Cfg::LayoutQuery{}, kStages, kStageStride));
    Tensor sdOT =
        make_tensor(make_smem_ptr(first.dout), kWithStages(typename Cfg::LayoutQueryT{}, kStages, kStageStride));
    Tensor sQT = make_tensor(make_smem_ptr(smem.q[0]), kWithStages(typename Cfg::LayoutQueryT{}, kStages, kQStride));
    Tensor sKT = make_tensor(make_smem_ptr(smem.k + warpgroup * kBlock * Cfg::kHalf), typename Cfg::LayoutKT{});
    Tensor sdS = make_tensor(make_smem_ptr(smem.ds[0]),
                             kWithStages(typename Cfg::LayoutDS{}, Int<2>{}, Int<kBlock * kQueryBlock>{}));

    typename Cfg::MmaS mma_s;
    typename Cfg::MmaDP mma_dp;
    typename Cfg::MmaGrad mma_grad;
    typename Cfg::MmaDQ mma_dq;
    // Shared-memory descriptors.
    Tensor rK8 = mma_s.get_slice(thread).partition_fragment_A(sK8);
    Tensor rQ8 = mma_s.get_slice(thread).partition_fragment_B(sQ8);
    Tensor rV = mma_dp.get_slice(thread).partition_fragment_A(sV);
    Tensor rdO = mma_dp.get_slice(thread).partition_fragment_B(sdO);
    Tensor rdOT = mma_grad.get_slice(thread).partition_fragment_B(sdOT);
    Tensor rQT = mma_grad.get_slice(thread).partition_fragment_B(sQT);
    Tensor rdS = mma_dq.get_slice(thread).partition_fragment_A(sdS);
    Tensor rKT = mma_dq.get_slice(thread).partition_fragment_B(sKT);
    using Scores = Shape<Int<Cfg::kKeys>, Int<kQueryBlock>>;
    Tensor rS = partition_fragment_C(mma_s, Scores{});
    Tensor rdP = partition_fragment_C(mma_dp, Scores{});
    Tensor rA = make_tensor<BF16>(partition_shape_A(mma_grad, Scores{}));  // dS^T or P^T
    Tensor rdQ = partition_fragment_C(mma_dq, Shape<Int<kQueryBlock>, Int<Cfg::kHalf>>{});
    Tensor rdV = partition_fragment_C(mma_grad, Shape<Int<Cfg::kKeys>, Int<Cfg::kHeadDim>>{});
    Tensor rdK = partition_fragment_C(mma_grad, Shape<Int<Cfg::kKeys>, Int<Cfg::kHeadDim>>{});
    clear(rdV);
    clear(rdK);

    // A product over all of its k steps, from zero or added to what is there, as a group of its own.
    const auto issue = [](auto &mma, bool from_zero, const auto &a, const auto &b, auto &c) {
        warpgroup_fence_operand(c);
        warpgroup_arrive();
        mma.accumulate_ = from_zero ? GMMA::ScaleOut::Zero : GMMA::ScaleOut::One;
#pragma unroll
        for (int k = 0; k < size<2>(a); ++k) {
            gemm(mma, a(_, _, k), b(_, _, k), c);
            mma.accumulate_ = GMMA::ScaleOut::One;
        }
        warpgroup_commit_batch();
    };

    const TileGrid &g = p.geometry;
    smem.keys_full.wait(0);
    const float k_scale_log2 = smem.k_meta.scale * p.scale * kLog2E;
    // Rows below `valid` of the block hold a key. This thread has rows `row` and `row` + 8.
    const int valid = smem.k_meta.valid;
    const int row = warpgroup * Cfg::kKeys + fragment_row(thread);
    // dS^T of this warpgroup's keys: buffer 0 is of even steps, 1 of odd ones.
    constexpr auto kStore = [](auto *row, auto... words) { store_matrices(row, words...); };
    constexpr auto kLoad = [](const auto *row, auto &...words) { load_matrices(row, words...); };
    const auto access_ds = [&](int ds, auto &a, auto access) {
        for_each_four_matrices(smem.ds[ds], a, warpgroup * Cfg::kKeys, thread, access);
    };
    // dK and dQ of step `before`, its dS in buffer `ds`; and where dQ goes.
    const auto issue_dk = [&](RingState<Cfg::kStages> before) {
        smem.q_full[before.stage()].wait(before.full_parity());
        warpgroup_fence_operand(rA);
        issue(mma_grad, false, rA, rQT(_, _, _, before.stage()), rdK);
    };
    const auto issue_dq = [&](int ds) {
        smem.ds_full.wait(ds ^ 1);  // steps have the phases in turn, and so do the buffers
        fence_proxy_async();
        issue(mma_dq, true, rdS(_, _, _, ds), rKT, rdQ);
    };
    const auto hand_over_dq = [&](RingState<1> before) {
        smem.dq_empty[warpgroup].wait(before.empty_parity());
        float *to = smem.dq[warpgroup] + 4 * thread;  // in the order of the fragment
#pragma unroll
        for (int i = 0; i < size(rdQ); i += 4) {
            *reinterpret_cast<float4 *>(to + i * 128) = {rdQ(i), rdQ(i + 1), rdQ(i + 2), rdQ(i + 3)};
        }
        smem.dq_full[warpgroup].arrive_as_warp();
    };
    // Before the first step there is no dS; zeros, times the first q, do for it.
    clear(rA);
    access_ds(1, rA, kStore);
    smem.ds_full.arrive_as_warp();
    RingState<Cfg::kStages> ring, before;
    int left;
    {
        const KeyBlock key(p);
        left = g.valid_blocks(key.queries, kQueryBlock) + key.text.blocks(kQueryBlock);
    }
    for (; left > 0; --left) {
        const int s = ring.stage(), ds = ring.count % 2;
        access_ds(ds ^ 1, rA, kLoad);
        smem.full[s].wait(ring.full_parity());
        issue(mma_s, true, rK8, rQ8(_, _, _, s), rS);
        issue_dk(before);

        const QueryRows &rows = smem.rows[s];
        const auto of_queries = [&](const float *values, int group) {  // two neighbouring ones
            return *reinterpret_cast<const float2 *>(values + 8 * group + 2 * lane);
        };
        // Above zero, so that padding's -inf stays that.
        const float scale_log2 = fmaxf(rows.scale * k_scale_log2, FLT_MIN);
        const auto exponentiate = [&](int group, float2 offset) {
#pragma unroll
            for (int i = 4 * group; i < 4 * group + 4; ++i) {
                rS(i) = exp2_approx(fmaf(rS(i), scale_log2, i % 2 ? offset.y : offset.x));
            }
        };
        constexpr int kGroups = kQueryBlock / 8, kHalf = kGroups / 2;
        float2 offset[kHalf];
#pragma unroll
        for (int i = 0; i < kHalf; ++i) {
            offset[i] = of_queries(rows.offset, i);
        }
        warpgroup_wait<1>();
        warpgroup_fence_operand(rS);
        if (valid < kBlock) {
#pragma unroll
            for (int i = 0; i < size(rS); ++i) {
                rS(i) = row + 8 * (i / 2 % 2) < valid ? rS(i) : -INFINITY;
            }
        }
#pragma unroll
        for (int i = 0; i < kHalf; ++i) {
            exponentiate(i, offset[i]);
        }
        issue_dq(ds ^ 1);
#pragma unroll
        for (int i = 0; i < kHalf; ++i) {
            offset[i] = of_queries(rows.offset, kHalf + i);
        }
        warpgroup_wait<0>();
        warpgroup_fence_operand(rdK);
        warpgroup_fence_operand(rdQ);
        if (ring.count > 0) {
            hand_over_dq({before.count});
            smem.q_empty[before.stage()].arrive_as_warp();
            before.next();
        }
        issue(mma_dp, true, rV, rdO(_, _, _, s), rdP);
#pragma unroll
        for (int i = 0; i < kHalf; ++i) {
            exponentiate(kHalf + i, offset[i]);
        }
        pack(rS, rA, four_bits);
        warpgroup_fence_operand(rA);
        issue(mma_grad, false, rA, rdOT(_, _, _, s), rdV);
        warpgroup_wait<1>();
        warpgroup_fence_operand(rdP);
#pragma unroll
        for (int group = 0; group < kGroups; ++group) {
            const float2 minus_delta = of_queries(rows.minus_delta, group);
#pragma unroll
            for (int i = 4 * group; i < 4 * group + 4; ++i) {
                rdP(i) = rS(i) * (rdP(i) + (i % 2 ? minus_delta.y : minus_delta.x));
            }
        }
        Tensor rdST = make_fragment_like(rA);  // rA is in use, by dV
        pack(rdP, rdST, [](float x) { return x; });
        access_ds(ds, rdST, kStore);
        smem.ds_full.arrive_as_warp();
        warpgroup_wait<0>();
        warpgroup_fence_operand(rdV);
        smem.empty[s].arrive_as_warp();
        ring.next();
    }
    access_ds(ring.count % 2 ^ 1, rA, kLoad);
    issue_dk(before);
    issue_dq(ring.count % 2 ^ 1);
    warpgroup_wait<0>();
    warpgroup_fence_operand(rdK);
    warpgroup_fence_operand(rdQ);
    hand_over_dq({before.count});

    const KeyBlock key(p);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const int in_tile = key.first_row + row + 8 * r;
        const bool holds_key = in_tile < key.rows.valid();
        const int64_t token = holds_key ? g.token(key.rows, in_tile) : 0;
        const auto store = [&](void *base, const Strides &to, const auto &grad, float factor) {
            T *out = static_cast<T *>(base) + key.batch * to.batch + key.head * to.head + token * to.token;
            store_row<T, Cfg::kHeadDim>(out, holds_key, r, lane, [&](int i) { return grad(i) * factor; });
        };
        store(p.dk, p.dk_strides, rdK, p.scale);
        store(p.dv, p.dv_strides, rdV, 1.0f);
    }
}

template <class Cfg, class T>
__global__ void __launch_bounds__(Cfg::kThreads, 1)
    attn_bwd_sm90(const __grid_constant__ Deferred<BackwardParams> deferred) {
    const BackwardParams &p = deferred.after_previous();
    if (!KeyBlock(p).exists()) {
        return;
    }
    extern __shared__ char smem_bytes[];
    // The runtime aligns dynamic shared memory to 16 bytes only; the swizzle needs 1024.
    auto &smem = *reinterpret_cast<BwdSmem<Cfg> *>(smem_bytes + (-smem_address(smem_bytes) & 1023));
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
        constexpr int kSmemBytes = sizeof(BwdSmem<Cfg>) + 1024;
        static_assert(kSmemBytes <= 227 * 1024);
        const TileGrid &g = p.geometry;
        const int key_blocks = g.tiles.volume() * g.blocks_per_tile() + g.text.blocks(kBlock);
        launch(attn_bwd_sm90<Cfg, decltype(element)>, dim3(p.batch * p.heads * key_blocks), Cfg::kThreads, kSmemBytes,
               stream, p);
    });
    bwd_finish_dq(p, stream);
}

}  // namespace fps
