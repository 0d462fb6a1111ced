// Query operands of the backward's main kernel, and dQ in raster order.
//
//   query_operands   one CTA per (query block, head): delta, dO c, q in 16 bits; reads O and dO once
//   finish_dq        one CTA per (query block, head): fp32 sums to raster order, with scales and K's mean
//
// The forward saves packed blocks in FP8 (params.h). q is widened from them instead of read again, so the gradient
// matches the values that the forward used.
#include "fpsattention/fragments.cuh"
#include "fpsattention/launch.h"
#include "fpsattention/operands.cuh"
#include "fpsattention/params.h"

namespace fps {
namespace {

constexpr int kThreads = 256;
constexpr int kCtas = 4;  // per SM; without this bound ptxas aims for more and spills

template <class T>
__device__ __forceinline__ uint4 to_vec(const float (&x)[kVec]) {
    return {downcast<T>(x[0], x[1]), downcast<T>(x[2], x[3]), downcast<T>(x[4], x[5]), downcast<T>(x[6], x[7])};
}

// The query block that a CTA works on.
struct Block {
    int batch, head, first_row;  // first row in the tile's slot
    int64_t bh, index;           // of the head and of the block, among those of all B, H
    TileRows rows;
    int valid;  // rows that hold a token

    __device__ explicit Block(const BackwardParams &p) {
        const TileGrid &g = p.geometry;
        const int per_tile = g.slot / kQueryBlock, per_head = g.all_tiles() * per_tile, in_head = blockIdx.x % per_head;
        head = blockIdx.x / per_head;
        batch = blockIdx.z;
        bh = int64_t(batch) * p.heads + head;
        index = bh * per_head + in_head;
        rows = g.rows(in_head / per_tile, p.valid_text(batch));
        first_row = in_head % per_tile * kQueryBlock;
        valid = min(kQueryBlock, rows.valid() - first_row);
    }
    template <int kHeadDim>
    __device__ float q_scale(const BackwardParams &p) const {
        const uint8_t *meta = p.q_blocks + index * q_block_bytes(kHeadDim) + kQueryBlock * kHeadDim;
        return reinterpret_cast<const BlockMeta *>(meta)->scale;
    }
};

// grid (heads * query blocks, 1, batch)
template <class T, int kHeadDim>
__global__ void __launch_bounds__(kThreads, kCtas)
    query_operands(const __grid_constant__ Deferred<BackwardParams> deferred) {
    const BackwardParams &p = deferred.after_previous();
    constexpr int kLanes = kHeadDim / kVec, kRowsPerPass = kThreads / kLanes;
    const Block block(p);
    if (block.valid <= 0) {
        return;  // no CTA of the backward loads it
    }
    const uint8_t *q8 = p.q_blocks + block.index * q_block_bytes(kHeadDim);
    const float scale = block.q_scale<kHeadDim>(p), mantissa = mantissa_of(scale);
    const uint32_t power = power_of(scale);
    uint8_t *q_operand = p.query_operands + block.index * bwd_query_bytes(kHeadDim);
    uint8_t *dout_operand = q_operand + kQueryBlock * kHeadDim * 2;
    QueryRows &rows = *reinterpret_cast<QueryRows *>(dout_operand + kQueryBlock * kHeadDim * 2);
    if (threadIdx.x == 0) {
        *reinterpret_cast<float4 *>(&rows.scale) = {scale, 0, 0, 0};  // and `unused`, which bulk copies read too
    }
    const int channel = threadIdx.x % kLanes * kVec;
#pragma unroll
    for (int row = threadIdx.x / kLanes; row < kQueryBlock; row += kRowsPerPass) {
        const bool valid = row < block.valid;
        const int64_t token = valid ? p.geometry.token(block.rows, block.first_row + row) : 0;
        const auto load = [&](const void *base, const Strides &s, float (&x)[kVec]) {
            const int64_t offset = s.offset(block.batch, block.head, token) + channel;
            upcast_vec<T>(valid ? load_vec<T>(base, offset) : uint4{}, x);
        };
        // delta = rowsum(dO O)
        float out[kVec], dout[kVec], delta = 0;
        load(p.out, p.out_strides, out);
        load(p.dout, p.dout_strides, dout);
#pragma unroll
        for (int i = 0; i < kVec; ++i) {
            delta = fmaf(out[i], dout[i], delta);
        }
#pragma unroll
        for (int offset = kLanes / 2; offset > 0; offset /= 2) {
            delta += __shfl_xor_sync(~0u, delta, offset);
        }
        // dO c, with c = 2^(M - lse2 - kLog2Bias) and M = ceil(lse2): X c is a probability
        const int64_t at = block.bh * p.geometry.tokens() + token;
        const float shift = p.lse_shift == nullptr ? 0.0f : p.lse_shift[at];
        const float lse2 = valid ? (p.lse[at] - shift) * kLog2E : 0.0f, m = ceilf(lse2);
        const float c = exp2f(m - lse2 - kLog2Bias);
#pragma unroll
        for (int i = 0; i < kVec; ++i) {
            dout[i] *= c;
        }
        *part_of_row<kQueryBlock>(dout_operand, row, channel) = to_vec<__nv_bfloat16>(dout);
        // Row constants
        if (channel == 0) {
            rows.offset[row] = valid ? 1024.0f + kCodeOfOne - kCodes * m : -INFINITY;
            rows.minus_delta[row] = valid ? mantissa * (c * (p.dlse[at] - delta)) : 0.0f;
        }
        // q
        *part_of_row<kQueryBlock>(q_operand, row, channel) = widened_part<kHeadDim>(q8, row, channel, power);
    }
}

// grid (heads * query blocks, 1, batch)
template <class T, int kHeadDim>
__global__ void __launch_bounds__(kThreads) finish_dq(const __grid_constant__ Deferred<BackwardParams> deferred) {
    const BackwardParams &p = deferred.after_previous();
    // Each of the two warpgroups of attn_bwd_sm90 computed half of dq_sum and left it in the order of its fragments: at
    // head_dim 64 dQ^T of half of the queries, at 128 dQ of half of the channels.
    constexpr bool kTransposed = kHeadDim == 64;
    constexpr int kHalf = kTransposed ? kQueryBlock / 2 : kHeadDim / 2;  // columns of the fragments of a warpgroup
    constexpr int kPitch = kHeadDim + 4;                                 // floats of a query; the pad avoids conflicts
    constexpr int kRow = kTransposed ? 1 : kPitch, kColumn = kTransposed ? kPitch : 1;
    constexpr int kLanes = kHeadDim / kVec, kRowsPerPass = kThreads / kLanes;
    __shared__ alignas(16) float sums[kQueryBlock * kPitch];
    const Block block(p);
    if (block.valid <= 0) {
        return;
    }
    // Fragments to queries by channels.
    const int warpgroup = threadIdx.x / 128, thread = threadIdx.x % 128;
    const float4 *from = reinterpret_cast<const float4 *>(p.dq_sum + block.index * (kQueryBlock * kHeadDim)) + thread;
    float *to = sums + fragment_row(thread) * kRow + (warpgroup * kHalf + 2 * (thread % 4)) * kColumn;
#pragma unroll
    for (int i = 0; i < kHalf / 8; ++i) {
        const float4 sum = __ldg(from + (warpgroup * (kHalf / 8) + i) * 128);
        float *of_octet = to + 8 * i * kColumn;
        of_octet[0] = sum.x, of_octet[kColumn] = sum.y;
        of_octet[8 * kRow] = sum.z, of_octet[8 * kRow + kColumn] = sum.w;
    }
    __syncthreads();
    // Store in raster order.
    const float scale = p.scale / mantissa_of(block.q_scale<kHeadDim>(p));
    const int channel = threadIdx.x % kLanes * kVec;
#pragma unroll
    for (int row = threadIdx.x / kLanes; row < block.valid; row += kRowsPerPass) {
        const int64_t token = p.geometry.token(block.rows, block.first_row + row);
        float x[kVec];
#pragma unroll
        for (int i = 0; i < kVec; ++i) {
            x[i] = sums[row * kPitch + channel + i] * scale;
        }
        if (p.k_mean != nullptr) {
            // lse includes K's mean, the sums do not. A row without keys has an lse of -inf, and no gradient.
            const int64_t at = block.bh * p.geometry.tokens() + token;
            const float dlse = p.lse[at] == -INFINITY ? 0.0f : p.dlse[at] * p.scale;
#pragma unroll
            for (int i = 0; i < kVec; ++i) {
                x[i] += dlse * p.k_mean[block.bh * kHeadDim + channel + i];
            }
        }
        T *dq = static_cast<T *>(p.dq) + p.dq_strides.offset(block.batch, block.head, token) + channel;
        *reinterpret_cast<uint4 *>(dq) = to_vec<T>(x);
    }
}

dim3 query_blocks(const BackwardParams &p) {
    return {unsigned(p.heads * p.geometry.all_tiles() * (p.geometry.slot / kQueryBlock)), 1, unsigned(p.batch)};
}

}  // namespace

void bwd_operands(const BackwardParams &p, cudaStream_t stream) {
    dispatch(p.head_dim, p.dtype, [&](auto dim, auto element) {
        constexpr int kHeadDim = decltype(dim)::value;
        launch(query_operands<decltype(element), kHeadDim>, query_blocks(p), kThreads, 0, stream, p);
    });
}

void bwd_finish_dq(const BackwardParams &p, cudaStream_t stream) {
    dispatch(p.head_dim, p.dtype, [&](auto dim, auto element) {
        launch(finish_dq<decltype(element), decltype(dim)::value>, query_blocks(p), kThreads, 0, stream, p);
    });
}

}  // namespace fps
