// Quantisation: bf16 or fp16 Q, K, V in raster order to packed blocks in FP8, each of which the forward loads with one
// bulk copy.
//
//   row_rms         1 / RMS of the rows of Q and K, over all heads, if they are to be normalised so
//   quantize_v      one CTA per (block, head): amax, scale, E4M3, transposed, tokens permuted, swizzled. To smooth K,
//                   further CTAs add up K per (batch, head, channel) over some tokens
//   finish_mean     K's mean from the partial sums
//   quantize_qk     one CTA per (tile, head): amax, scale, E4M3, swizzled; reads each element once. With bricks of
//                   several tiles, a first launch takes each brick's amax
//
// Every element moves anyway, so the change from raster to tile order costs nothing here.
#include "fpsattention/fp8.cuh"
#include "fpsattention/launch.h"
#include "fpsattention/params.h"

namespace fps {
namespace {

constexpr int kVecsPerThread = 8;  // loads in flight per thread: a CTA holds its whole tile in registers
constexpr int kStatsThreads = 256;
constexpr int kMetaVecs = sizeof(BlockMeta) / sizeof(uint4);
static_assert(offsetof(BlockMeta, v_scale) == sizeof(uint4), "two kernels write the meta of a key block");

template <int kHeadDim>
constexpr int kLanesPerRow = kHeadDim / kVec;

// The larger magnitude in each half of `so_far` and of eight 16-bit floats, as `larger_magnitudes` has it.
template <class T>
__device__ __forceinline__ uint32_t larger_in_vec(uint32_t so_far, uint4 pairs) {
    for (uint32_t x : {pairs.x, pairs.y, pairs.z, pairs.w}) {
        so_far = larger_magnitudes<T>(so_far, x);
    }
    return so_far;
}
// The larger of the two halves.
template <class T>
__device__ __forceinline__ float larger_half(uint32_t pair) {
    const float2 x = upcast<T>(pair);
    return larger_magnitude(x.x, x.y);
}

// Which head, and which of its `count` tiles or blocks, CTA `linear` takes. Consecutive CTAs take what is closest in
// memory: consecutive heads for NHD, consecutive tiles for HND.
struct HeadAndIndex {
    int head, index;
};
__device__ __forceinline__ HeadAndIndex head_and_index(int linear, int heads, int count, const Strides &s) {
    return s.head < s.token ? HeadAndIndex{linear % heads, linear / heads}
                            : HeadAndIndex{linear / count, linear % count};
}

// The sum of x over kLanes neighbouring lanes; each of them gets it.
template <int kLanes>
__device__ __forceinline__ float sum_of_lanes(float x) {
#pragma unroll
    for (int offset = kLanes / 2; offset > 0; offset /= 2) {
        x += __shfl_xor_sync(~0u, x, offset);
    }
    return x;
}

// grid (tokens / warps per CTA, 2, batch), one warp per row: blockIdx.y = 0 is Q, 1 is K.
template <class T, int kHeadDim>
__global__ void __launch_bounds__(kStatsThreads) row_rms(const __grid_constant__ Deferred<QuantizeParams> deferred) {
    const QuantizeParams &p = deferred.after_previous();
    constexpr int kLanes = kLanesPerRow<kHeadDim>, kHeads = 32 / kLanes;  // heads that a warp reads at a time
    const NormRope &norm = p.norm_rope;
    const void *base = blockIdx.y == 1 ? p.k : p.q;
    const Strides &strides = blockIdx.y == 1 ? p.k_strides : p.q_strides;
    const int token = blockIdx.x * (kStatsThreads / 32) + threadIdx.x / 32, tokens = p.geometry.tokens();
    const int batch = blockIdx.z, lane = threadIdx.x % 32;
    if (token >= tokens) {
        return;
    }
    float sum = 0;
#pragma unroll 4
    for (int first = 0; first < p.heads; first += kHeads) {
        const int head = first + lane / kLanes;
        const int64_t offset = strides.offset(batch, head, token) + lane % kLanes * kVec;
        float x[kVec];
        upcast_vec<T>(head < p.heads ? load_vec<T>(base, offset) : uint4{}, x);
#pragma unroll
        for (int i = 0; i < kVec; ++i) {
            sum = fmaf(x[i], x[i], sum);
        }
    }
    sum = sum_of_lanes<32>(sum);
    if (lane == 0) {
        norm.inverse_rms[blockIdx.y][int64_t(batch) * tokens + token] = rsqrtf(sum / (p.heads * kHeadDim) + norm.eps);
    }
}

// Where the rows of a tile or of a block lie, in shared memory.
template <int kRows>
struct RowTable {
    int64_t offset[kRows];  // of the row in the source, in elements
    int token[kRows];

    // Rows first_row to first_row + rows of a tile. Both are -1 for padding, or with `repeats` those of the block's
    // first row, if that holds a token.
    __device__ void fill(const TileGrid &g, const TileRows &tile, int first_row, int rows, bool repeats,
                         const Strides &strides, int batch, int head) {
        for (int r = threadIdx.x; r < rows; r += blockDim.x) {
            int in_tile = first_row + r;
            in_tile = repeats && in_tile >= tile.valid() ? in_tile / kBlock * kBlock : in_tile;
            token[r] = in_tile < tile.valid() ? g.token(tile, in_tile) : -1;
            offset[r] = token[r] < 0 ? -1 : strides.offset(batch, head, token[r]);
        }
        __syncthreads();
    }

    // Elements of a row from `channel` on; zeros for padding.
    template <class T>
    __device__ __forceinline__ uint4 load(const void *from, int row, int channel) const {
        const int64_t at = offset[row];
        return at < 0 ? uint4{} : load_vec<T>(from, at + channel);
    }
};

// Offsets of a grid token's angles in `rope`, one for each axis: the angle of channel pair i (of D / 2) lies at i plus
// the offset of the axis that rotates it. Where each token has angles of its own, as if one axis rotated all pairs.
__device__ __forceinline__ Int3 angles_of(const NormRope &norm, int token, int head, Int3 grid) {
    const Int3 pairs = norm.pairs;
    if (norm.rope_heads != 0) {
        return {(token * norm.rope_heads + (norm.rope_heads > 1 ? head : 0)) * pairs.t, 0, 0};
    }
    const Int3 at = coordinates(token, grid);
    const int of_h = grid.t * pairs.t, of_w = of_h + grid.h * pairs.h;
    return {at.t * pairs.t, of_h + at.h * pairs.h - pairs.t, of_w + at.w * pairs.w - pairs.t - pairs.h};
}

// Data that normalises and rotates the rows of a tile, in shared memory.
template <int kRows, int kLanes, bool kPerHead>
struct Prologue {
    static constexpr int kPairs = kVec / 2;
    Int3 angles[kRows];
    float inverse[kRows], shift[kPerHead ? kRows : 1];  // 1 / RMS, and what a LayerNorm adds then: -mean / RMS
    // [pair of a vector][vector of a row], so that lanes have no bank conflicts
    float2 weights[kPairs][kLanes], biases[kPerHead ? kPairs : 1][kLanes];
    bool rotates;

    __device__ void fill(const QuantizeParams &p, bool is_k, bool is_text, int batch, int head,
                         const int *token_of_row) {
        const NormRope &norm = p.norm_rope;
        const TileGrid &g = p.geometry;
        const bool weighs = norm.weights[0] != nullptr;
        if (threadIdx.x == 0) {
            rotates = norm.rope != nullptr && !is_text;
        }
        for (int r = threadIdx.x; r < g.slot; r += blockDim.x) {
            const int token = max(token_of_row[r], 0);
            angles[r] = angles_of(norm, is_text ? 0 : max(token - g.text.prefix, 0), head, g.grid);
            if constexpr (!kPerHead) {
                inverse[r] = weighs ? norm.inverse_rms[is_k][int64_t(batch) * g.tokens() + token] : 1.0f;
            }
        }
        const float *of_text = norm.text_weights[is_k];
        const float *from = is_text && of_text != nullptr ? of_text : norm.weights[is_k];
        for (int i = threadIdx.x; i < kPairs * kLanes; i += blockDim.x) {
            const int at = 2 * i + (kPerHead ? 0 : head * kLanes * kVec);
            weights[i % kPairs][i / kPairs] = weighs ? float2{from[at], from[at + 1]} : float2{1, 1};
            if constexpr (kPerHead) {
                const float *bias = norm.biases[is_k];
                biases[i % kPairs][i / kPairs] = bias != nullptr ? float2{bias[at], bias[at + 1]} : float2{};
            }
        }
    }

    // Works out 1 / RMS and shift of a row, of which this lane has vector `vec`. All lanes of a warp must call it.
    template <class T>
    __device__ __forceinline__ void measure(uint4 raw, const NormRope &norm, int row, int vec) {
        constexpr int kChannels = kLanes * kVec;
        float x[kVec], mean = 0, squares = 0;
        upcast_vec<T>(raw, x);
        if (norm.biases[0] != nullptr) {
#pragma unroll
            for (int i = 0; i < kVec; ++i) {
                mean += x[i];
            }
            mean = sum_of_lanes<kLanes>(mean) / kChannels;
        }
#pragma unroll
        for (int i = 0; i < kVec; ++i) {
            squares = fmaf(x[i] - mean, x[i] - mean, squares);
        }
        squares = sum_of_lanes<kLanes>(squares);
        if (vec == 0) {
            inverse[row] = rsqrtf(squares / kChannels + norm.eps);
            shift[row] = -mean * inverse[row];
        }
    }

    // Normalises and rotates vector `vec` of a row, and rounds it once.
    template <class T>
    __device__ __forceinline__ uint4 apply(uint4 raw, const NormRope &norm, int row, int vec) const {
        const Int3 from = angles[row];
        uint32_t words[kPairs] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
        for (int i = 0; i < kPairs; ++i) {
            const float2 x = upcast<T>(words[i]), weight = weights[i][vec];
            float even, odd;
            if constexpr (kPerHead) {
                even = fmaf(fmaf(x.x, inverse[row], shift[row]), weight.x, biases[i][vec].x);
                odd = fmaf(fmaf(x.y, inverse[row], shift[row]), weight.y, biases[i][vec].y);
            } else {
                even = x.x * inverse[row] * weight.x, odd = x.y * inverse[row] * weight.y;
            }
            float2 rotation{1, 0};  // cosine, sine
            if (rotates) {
                const int pair = vec * kPairs + i, of_h = norm.pairs.t, of_w = of_h + norm.pairs.h;
                rotation = __ldg(norm.rope + (pair + (pair < of_h ? from.t : pair < of_w ? from.h : from.w)));
            }
            words[i] = downcast<T>(even * rotation.x - odd * rotation.y, even * rotation.y + odd * rotation.x);
        }
        return {words[0], words[1], words[2], words[3]};
    }
};

// grid (heads, batch), one thread per channel. Adds in a fixed order, so it is deterministic.
__global__ void finish_mean(const __grid_constant__ Deferred<QuantizeParams> deferred) {
    const QuantizeParams &p = deferred.after_previous();
    const int64_t bh = int64_t(blockIdx.y) * p.heads + blockIdx.x;
    const int tokens = p.geometry.tokens(), chunks = quantize_chunks(tokens), stride = smooth_stride(tokens);
    double total = 0;
#pragma unroll 8
    for (int c = 0; c < chunks; ++c) {
        total += p.k_sum[(bh * chunks + c) * p.head_dim + threadIdx.x];
    }
    const TextTokens valid = p.valid_text(blockIdx.y);
    int samples = 0;
    for (int i = 0; i < 3; ++i) {
        const Range section = p.geometry.section(i, valid);
        samples += ceil_div(section.hi, stride) - ceil_div(section.lo, stride);
    }
    p.k_mean[bh * p.head_dim + threadIdx.x] = float(total * kSamplesOfCta / max(samples, 1));
}

// The largest magnitude of the CTA's x. The order of floats x >= 0 is that of their bits, and NaN is the largest.
__device__ __forceinline__ int largest_magnitude(float x) {
    __shared__ int warp_max[32];
    const int of_warp = __reduce_max_sync(~0u, __float_as_int(fabsf(x)));
    if (threadIdx.x % 32 == 0) {
        warp_max[threadIdx.x / 32] = of_warp;
    }
    __syncthreads();
    const int lane = threadIdx.x % 32;
    return __reduce_max_sync(~0u, lane < blockDim.x / 32 ? warp_max[lane] : 0);
}

// Index of a tile's brick in q_amax and k_amax. Bricks of the grid come first, then each text tile as a brick of its
// own.
__device__ __forceinline__ int64_t brick_of(const QuantizeParams &p, int64_t bh, int tile, int all_tiles) {
    const TileGrid &g = p.geometry;
    const Int3 b = p.brick, bricks{ceil_div(g.tiles.t, b.t), ceil_div(g.tiles.h, b.h), ceil_div(g.tiles.w, b.w)};
    const int text_tile = tile - g.tiles.volume();
    const Int3 c = text_tile < 0 ? g.tile_coord(tile) : Int3{};
    const int brick =
        text_tile < 0 ? (c.t / b.t * bricks.h + c.h / b.h) * bricks.w + c.w / b.w : bricks.volume() + text_tile;
    return bh * (bricks.volume() + all_tiles - g.tiles.volume()) + brick;
}

// Product of a row of Q with K's mean. Each of the kLanes lanes of the row holds eight elements of both; each gets the
// sum.
template <int kLanes>
__device__ __forceinline__ float dot_with_mean(const float (&q)[kVec], const float *mean) {
    float dot = 0;
#pragma unroll
    for (int j = 0; j < kVec; ++j) {
        dot += q[j] * mean[j];
    }
    return sum_of_lanes<kLanes>(dot);
}

// The largest magnitude of K less its mean, in this thread's vectors: `raw[i]` is of a row whose token is
// token_of_row[i * rows_per_pass]. Rounding is monotone, so the extremes of a channel decide.
template <class T>
__device__ __forceinline__ float largest_smoothed(const uint4 (&raw)[kVecsPerThread], const int *token_of_row,
                                                  int rows_per_pass, const float *mean) {
    if (token_of_row[0] < 0) {
        return 0;
    }
    uint32_t high[] = {raw[0].x, raw[0].y, raw[0].z, raw[0].w}, low[] = {high[0], high[1], high[2], high[3]};
#pragma unroll
    for (int i = 1; i < kVecsPerThread; ++i) {
        if (token_of_row[i * rows_per_pass] >= 0) {
            const uint32_t words[] = {raw[i].x, raw[i].y, raw[i].z, raw[i].w};
#pragma unroll
            for (int w = 0; w < 4; ++w) {
                high[w] = larger_halves<T>(high[w], words[w]), low[w] = smaller_halves<T>(low[w], words[w]);
            }
        }
    }
    float largest = 0;
#pragma unroll
    for (int w = 0; w < 4; ++w) {
        const float2 most = upcast<T>(high[w]), least = upcast<T>(low[w]), of_word{mean[2 * w], mean[2 * w + 1]};
        largest = larger_magnitude(largest, larger_magnitude(most.x - of_word.x, least.x - of_word.x));
        largest = larger_magnitude(largest, larger_magnitude(most.y - of_word.y, least.y - of_word.y));
    }
    return largest;
}

// Writes the metas of a tile's blocks, 16 bytes a thread: all of each, because a copy of the block reads all of it. Of
// a key block it writes the first 16 bytes; quantize_v writes the others.
template <bool kIsK, int kBlockBytes>
__device__ __forceinline__ void store_metas(uint8_t *metas, int blocks, float scale, int valid) {
    constexpr int kVecs = kIsK ? 1 : kMetaVecs, kRows = kIsK ? kBlock : kQueryBlock;
    if (threadIdx.x < blocks * kVecs) {
        const int block = threadIdx.x / kVecs, vec = threadIdx.x % kVecs;
        const uint32_t rows_left = min(max(valid - block * kRows, 0), kRows);
        reinterpret_cast<uint4 *>(metas + block * kBlockBytes)[vec] =
            vec == 0 ? uint4{__float_as_uint(scale), rows_left, 0, 0} : uint4{};
    }
}

// Rows of Q and K are quantised as they are given, or changed first.
enum class Rows {
    kAsGiven,
    kSmoothed,        // K loses its mean
    kNormalised,      // over all heads or not at all, and rotated, as NormRope says
    kHeadNormalised,  // head by head, and rotated
};
FPS_HD constexpr bool has_prologue(Rows rows) {
    return rows == Rows::kNormalised || rows == Rows::kHeadNormalised;
}

template <int kHeadDim, Rows kRows>
struct QuantizeSmem {
    RowTable<kMaxSlot> rows;
    Prologue<has_prologue(kRows) ? kMaxSlot : 1, kLanesPerRow<kHeadDim>, kRows == Rows::kHeadNormalised> prologue;
    float k_mean[kHeadDim];
};

// Quantises one tile of Q or of K.
template <class T, int kHeadDim, bool kIsK, bool kBrickAmax, Rows kRows>
__device__ void quantize_tile(const QuantizeParams &p, QuantizeSmem<kHeadDim, kRows> &smem) {
    constexpr int kLanes = kLanesPerRow<kHeadDim>;
    const TileGrid &g = p.geometry;
    const void *base = kIsK ? p.k : p.q;
    const Strides &strides = kIsK ? p.k_strides : p.q_strides;
    const int n_tiles = g.all_tiles();
    const auto [head, tile] = head_and_index(blockIdx.x, p.heads, n_tiles, strides);
    const int batch = blockIdx.z;
    const int64_t bh = int64_t(batch) * p.heads + head;
    const TileRows rows = g.rows(tile, p.valid_text(batch));
    if (kRows == Rows::kSmoothed && threadIdx.x < kHeadDim) {
        smem.k_mean[threadIdx.x] = p.k_mean[bh * kHeadDim + threadIdx.x];
    }
    smem.rows.fill(g, rows, 0, g.slot, kIsK, strides, batch, head);

    // Load the tile. Normalise and rotate its rows.
    const int first_row = threadIdx.x / kLanes, rows_per_pass = blockDim.x / kLanes;
    const int channel = threadIdx.x % kLanes * kVec;
    if constexpr (has_prologue(kRows)) {  // before the loads, whose registers it would need
        smem.prologue.fill(p, kIsK, tile >= g.tiles.volume(), batch, head, smem.rows.token);
    }
    if constexpr (kRows == Rows::kHeadNormalised) {  // the loads that follow find these rows in L2
#pragma unroll 2
        for (int i = 0; i < kVecsPerThread; ++i) {
            const int row = first_row + i * rows_per_pass;
            smem.prologue.template measure<T>(smem.rows.template load<T>(base, row, channel), p.norm_rope, row,
                                              channel / kVec);
        }
    }
    uint4 raw[kVecsPerThread];
#pragma unroll
    for (int i = 0; i < kVecsPerThread; ++i) {
        raw[i] = smem.rows.template load<T>(base, first_row + i * rows_per_pass, channel);
    }
    if constexpr (has_prologue(kRows)) {
        __syncthreads();
#pragma unroll
        for (int i = 0; i < kVecsPerThread; ++i) {
            const int row = opaque(first_row) + i * rows_per_pass;
            if (smem.rows.token[row] >= 0) {
                raw[i] = smem.prologue.template apply<T>(raw[i], p.norm_rope, row, opaque(channel) / kVec);
            }
        }
    }

    // Its amax.
    const auto values = [&](int i, float (&x)[kVec]) {  // of row i of this thread; padding stays zero
        upcast_vec<T>(raw[i], x);
        if (kIsK && kRows == Rows::kSmoothed && smem.rows.token[first_row + i * rows_per_pass] >= 0) {
#pragma unroll
            for (int j = 0; j < kVec; ++j) {
                x[j] -= smem.k_mean[channel + j];
            }
        }
    };
    float largest;
    if constexpr (kIsK && kRows == Rows::kSmoothed) {
        largest = largest_smoothed<T>(raw, smem.rows.token + first_row, rows_per_pass, smem.k_mean + channel);
    } else {
        uint32_t magnitudes = 0;
#pragma unroll
        for (int i = 0; i < kVecsPerThread; ++i) {
            magnitudes = larger_in_vec<T>(magnitudes, raw[i]);
        }
        largest = larger_half<T>(magnitudes);
    }
    int amax = largest_magnitude(largest);
    int *brick_amax = reinterpret_cast<int *>(kIsK ? p.k_amax : p.q_amax);
    if constexpr (kBrickAmax) {
        if (threadIdx.x == 0) {
            atomicMax(&brick_amax[brick_of(p, bh, tile, n_tiles)], amax);
        }
        return;
    }
    if (brick_amax != nullptr) {
        amax = brick_amax[brick_of(p, bh, tile, n_tiles)];
    }

    // Quantise it to packed blocks. For Q, store what smoothing K takes off its scores.
    const QuantScale quant = quant_scale(__int_as_float(amax), kQKMax);
    constexpr int kBlockBytes = kIsK ? kv_block_bytes(kHeadDim) : q_block_bytes(kHeadDim);
    constexpr int kBlockRows = kIsK ? kBlock : kQueryBlock;
    const int blocks = g.slot / kBlockRows;  // of this tile
    uint8_t *packed = (kIsK ? p.kv_blocks : p.q_blocks) + (bh * n_tiles + tile) * blocks * kBlockBytes;
    // rows_per_pass is a multiple of 16, so the swizzle of all rows of a thread is that of the first.
    uint8_t *first = packed + swizzled<kHeadDim>(first_row % 16, channel) - first_row % 16 * kHeadDim;
#pragma unroll
    for (int i = 0; i < kVecsPerThread; ++i) {
        const int row = first_row + i * rows_per_pass;
        float x[kVec];
        values(i, x);
        if (!kIsK && kRows == Rows::kSmoothed && p.lse_shift != nullptr) {
            const float dot = dot_with_mean<kLanes>(x, smem.k_mean + channel);
            const int token = smem.rows.token[row];
            if (channel == 0 && token >= 0) {
                p.lse_shift[bh * g.tokens() + token] = dot * p.scale;
            }
        }
#pragma unroll
        for (int j = 0; j < kVec; ++j) {
            x[j] *= quant.inverse;
        }
        *reinterpret_cast<uint2 *>(first + row / kBlockRows * kBlockBytes + row % kBlockRows * kHeadDim) = {
            pack_e4m3(x[0], x[1], x[2], x[3]), pack_e4m3(x[4], x[5], x[6], x[7])};
    }
    store_metas<kIsK, kBlockBytes>(packed + (kIsK ? 2 : 1) * kBlockRows * kHeadDim, blocks, quant.scale, rows.valid());
}

// grid (heads * tiles, 2, batch): blockIdx.y = 0 is Q, 1 is K. slot * head_dim / 64 threads, each with eight vectors of
// 16 bytes in registers. With kBrickAmax it only takes the brick's amax, and a second launch quantises.
template <class T, int kHeadDim, bool kBrickAmax, Rows kRows>
__global__ void __launch_bounds__(kMaxSlot *kHeadDim / 64, 128 / kHeadDim)  // 64 registers
    quantize_qk(const __grid_constant__ Deferred<QuantizeParams> deferred) {
    const QuantizeParams &p = deferred.after_previous();
    __shared__ QuantizeSmem<kHeadDim, kRows> smem;
    if (blockIdx.y == 1) {
        quantize_tile<T, kHeadDim, true, kBrickAmax, kRows>(p, smem);
    } else {
        quantize_tile<T, kHeadDim, false, kBrickAmax, kRows>(p, smem);
    }
}

// Adds up K over the samples of one chunk of one head.
template <class T, int kHeadDim>
__device__ void sum_channels(const QuantizeParams &p, int index) {
    constexpr int kLanes = kLanesPerRow<kHeadDim>, kRows = kBlock * kHeadDim / 64 / kLanes;
    __shared__ float partial[kRows][kHeadDim + 4];
    const TileGrid &g = p.geometry;
    const int tokens = g.tokens(), chunks = quantize_chunks(tokens), stride = smooth_stride(tokens);
    const auto [head, chunk] = head_and_index(index, p.heads, chunks, p.k_strides);
    const int batch = blockIdx.z, row = threadIdx.x / kLanes, channel = threadIdx.x % kLanes * kVec;
    const TextTokens valid = p.valid_text(batch);

    float sum[kVec] = {};
#pragma unroll
    for (int i = row; i < kSamplesOfCta; i += kRows) {
        const int token = (chunk * kSamplesOfCta + i) * stride;
        float x[kVec];
        const bool counts = token < tokens && g.is_valid(token, valid);
        const int64_t offset = p.k_strides.offset(batch, head, token) + channel;
        upcast_vec<T>(counts ? load_vec<T>(p.k, offset) : uint4{}, x);
#pragma unroll
        for (int j = 0; j < kVec; ++j) {
            sum[j] = fmaf(x[j], 1.0f / kSamplesOfCta, sum[j]);  // the sum of large K might overflow
        }
    }
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
        partial[row][channel + i] = sum[i];
    }
    __syncthreads();
    for (int d = threadIdx.x; d < kHeadDim; d += blockDim.x) {
        float total = 0;
        for (int r = 0; r < kRows; ++r) {
            total += partial[r][d];
        }
        const int64_t bh = int64_t(batch) * p.heads + head;
        p.k_sum[(bh * chunks + chunk) * kHeadDim + d] = total;
    }
}

// grid (heads * blocks, 1, batch), kBlock * head_dim / 64 threads. A thread loads eight channels of the four tokens
// that share a word of V^T; shared memory turns [word][channel] into [channel][word]. If K is smoothed, the first
// heads * chunks CTAs add up K, beside those that work on V.
template <class T, int kHeadDim>
__global__ void __launch_bounds__(kBlock *kHeadDim / 64)
    quantize_v(const __grid_constant__ Deferred<QuantizeParams> deferred) {
    const QuantizeParams &p = deferred.after_previous();
    constexpr int kLanes = kLanesPerRow<kHeadDim>, kThreads = kBlock * kHeadDim / 64;
    constexpr int kWords = kBlock / 4, kWordsPerPass = kThreads / kLanes;
    // A row is the four words of a 16-byte chunk, for all channels. The pad of 4 words spreads chunks over the banks.
    __shared__ alignas(16) uint32_t words[kWords / 4][4 * kHeadDim + 4];
    __shared__ RowTable<kBlock> table;
    const TileGrid &g = p.geometry;
    const int sums = p.k_sum != nullptr ? p.heads * quantize_chunks(g.tokens()) : 0;
    if (blockIdx.x < sums) {
        sum_channels<T, kHeadDim>(p, blockIdx.x);
        return;
    }
    const auto [head, block] = head_and_index(blockIdx.x - sums, p.heads, g.blocks(), p.v_strides);
    const int batch = blockIdx.z;
    const int64_t bh = int64_t(batch) * p.heads + head;
    const int in_tile = block % g.blocks_per_tile();
    const TileRows rows = g.rows(block / g.blocks_per_tile(), p.valid_text(batch));
    table.fill(g, rows, in_tile * kBlock, kBlock, false, p.v_strides, batch, head);

    // Load the tokens of this thread's words.
    const int channel = threadIdx.x % kLanes * kVec;
    uint4 raw[kWords / kWordsPerPass][4];
#pragma unroll
    for (int i = 0; i < kWords / kWordsPerPass; ++i) {
        const int word = threadIdx.x / kLanes + i * kWordsPerPass;
#pragma unroll
        for (int byte = 0; byte < 4; ++byte) {
            const int row = word / 4 * 16 + permuted_token(word % 4, byte);
            raw[i][byte] = table.template load<T>(p.v, row, channel);
        }
    }

    // Quantise them with the block's scale.
    uint32_t magnitudes = 0;
#pragma unroll
    for (int i = 0; i < kWords / kWordsPerPass; ++i) {
#pragma unroll
        for (int byte = 0; byte < 4; ++byte) {
            magnitudes = larger_in_vec<T>(magnitudes, raw[i][byte]);
        }
    }
    const int amax = largest_magnitude(larger_half<T>(magnitudes));
    const QuantScale quant = quant_scale(__int_as_float(amax), kE4M3Max);
#pragma unroll
    for (int i = 0; i < kWords / kWordsPerPass; ++i) {
        const int word = threadIdx.x / kLanes + i * kWordsPerPass;
        float x[4][kVec];
#pragma unroll
        for (int byte = 0; byte < 4; ++byte) {
            upcast_vec<T>(raw[i][byte], x[byte]);
        }
        uint32_t packed[kVec];
#pragma unroll
        for (int j = 0; j < kVec; ++j) {
            packed[j] = pack_e4m3(x[0][j] * quant.inverse, x[1][j] * quant.inverse, x[2][j] * quant.inverse,
                                  x[3][j] * quant.inverse);
        }
        uint4 *to = reinterpret_cast<uint4 *>(&words[word / 4][word % 4 * kHeadDim + channel]);
        to[0] = {packed[0], packed[1], packed[2], packed[3]};
        to[1] = {packed[4], packed[5], packed[6], packed[7]};
    }
    __syncthreads();

    // Store V^T, 16 bytes of a channel at a time, the meta from v_scale on, and is_token.
    constexpr int kChunks = kBlock / 16;
    uint8_t *v = p.kv_blocks + (bh * g.blocks() + block) * kv_block_bytes(kHeadDim) + kBlock * kHeadDim;
    if (threadIdx.x < kMetaVecs - 1) {
        uint4 *meta = reinterpret_cast<uint4 *>(v + kBlock * kHeadDim);
        meta[1 + threadIdx.x] = {threadIdx.x == 0 ? __float_as_uint(quant.scale) : 0, 0, 0, 0};
    }
    if (threadIdx.x < kWords) {
        constexpr uint32_t kOne = 0x38;  // in E4M3
        const int *tokens = table.token + threadIdx.x / 4 * 16;
        uint32_t word = 0;
#pragma unroll
        for (int byte = 0; byte < 4; ++byte) {
            word |= (tokens[permuted_token(threadIdx.x % 4, byte)] < 0 ? 0 : kOne) << (8 * byte);
        }
        *reinterpret_cast<uint32_t *>(v + swizzled<kBlock>(kHeadDim + 1, 4 * threadIdx.x)) = word;
    }
#pragma unroll
    for (int i = threadIdx.x; i < kHeadDim * kChunks; i += kThreads) {
        const int chunk = i % kChunks, d = i / kChunks;
        const uint32_t *from = &words[chunk][d];
        const uint4 bytes{from[0], from[kHeadDim], from[2 * kHeadDim], from[3 * kHeadDim]};
        *reinterpret_cast<uint4 *>(v + swizzled<kBlock>(d, chunk * 16)) = bytes;
    }
}

}  // namespace

void quantize(const QuantizeParams &p, cudaStream_t stream) {
    const TileGrid &g = p.geometry;
    const unsigned batch = p.batch, heads = p.heads, tiles = g.all_tiles();
    FPS_CUDA_CHECK(cudaMemsetAsync(p.zeroed.begin, 0, p.zeroed.bytes, stream));
    dispatch(p.head_dim, p.dtype, [&](auto dim, auto element) {
        constexpr int kHeadDim = decltype(dim)::value;
        using T = decltype(element);
        const unsigned sums = p.k_sum != nullptr ? heads * quantize_chunks(g.tokens()) : 0;
        launch(quantize_v<T, kHeadDim>, {sums + heads * g.blocks(), 1, batch}, kBlock * kHeadDim / 64, 0, stream, p);
        if (p.k_mean != nullptr) {
            launch(finish_mean, {heads, batch}, kHeadDim, 0, stream, p);
        }
        const dim3 tile_grid{heads * tiles, 2, batch};
        const int tile_threads = g.slot * kHeadDim / 64;
        if (p.norm_rope.weights[0] != nullptr && !p.norm_rope.per_head) {
            const unsigned rows = ceil_div(g.tokens(), kStatsThreads / 32);
            launch(row_rms<T, kHeadDim>, {rows, 2, batch}, kStatsThreads, 0, stream, p);
        }
        const auto quantize_qk_of = [&](auto rows) {
            constexpr Rows kRows = decltype(rows)::value;
            if (p.q_amax != nullptr) {
                launch(quantize_qk<T, kHeadDim, true, kRows>, tile_grid, tile_threads, 0, stream, p);
            }
            launch(quantize_qk<T, kHeadDim, false, kRows>, tile_grid, tile_threads, 0, stream, p);
        };
        if (p.norm_rope.weights[0] != nullptr && p.norm_rope.per_head) {
            quantize_qk_of(std::integral_constant<Rows, Rows::kHeadNormalised>{});
        } else if (p.norm_rope.any()) {
            quantize_qk_of(std::integral_constant<Rows, Rows::kNormalised>{});
        } else if (p.k_mean != nullptr) {
            quantize_qk_of(std::integral_constant<Rows, Rows::kSmoothed>{});
        } else {
            quantize_qk_of(std::integral_constant<Rows, Rows::kAsGiven>{});
        }
    });
}

}  // namespace fps
