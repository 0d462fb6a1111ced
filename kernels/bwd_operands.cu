// What comes before and after the backward's main kernel: its 16-bit operands, and dQ in raster order.
//
//   query_operands   one CTA per (query block, head): delta, dO c, dequantised q; reads O and dO once
//   key_operands     one CTA per (key block, head): dequantised k and v
//   finish_dq        one CTA per (query block, head): fp32 sums to raster order, times the softmax scale
//
// The forward saves packed blocks in FP8 (params.h). These kernels decode them instead of reading Q, K, V again, so
// the gradient matches the values that the forward used.
#include <cuda_fp8.h>

#include "fpsattention/fragments.cuh"
#include "fpsattention/launch.h"
#include "fpsattention/params.h"

namespace fps {
namespace {

constexpr int kThreads = 256;
constexpr int kCtas = 4;  // per SM; without this bound ptxas aims for more and spills

// Eight E4M3 elements, times their scale.
__device__ __forceinline__ void decode(uint2 bytes, float scale, float (&x)[kVec]) {
    const uint32_t words[2] = {bytes.x, bytes.y};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const __half2_raw pair =
            __nv_cvt_fp8x2_to_halfraw2(__nv_fp8x2_storage_t(words[i / 2] >> (i % 2 * 16)), __NV_E4M3);
        const float2 f = __half22float2(__half2(pair));
        x[2 * i] = f.x * scale;
        x[2 * i + 1] = f.y * scale;
    }
}

__device__ __forceinline__ uint4 to_bf16(const float (&x)[kVec]) {
    using T = __nv_bfloat16;
    return {downcast<T>(x[0], x[1]), downcast<T>(x[2], x[3]), downcast<T>(x[4], x[5]), downcast<T>(x[6], x[7])};
}

// Address of 8 channels of a row, from `channel` on, in a bf16 operand of `rows` rows that is stored in parts of kPart
// columns.
template <int kPart>
__device__ __forceinline__ uint4 *part_of(uint8_t *operand, int rows, int row, int channel) {
    const int offset = channel / kPart * rows * kPart * 2 + swizzled<2 * kPart>(row, channel % kPart * 2);
    return reinterpret_cast<uint4 *>(operand + offset);
}

// The block of kRows rows that a CTA works on.
template <int kRows>
struct Block {
    int batch, head, first_row;  // first row in the tile's slot
    int64_t bh, index;           // of the head and of the block, among those of all B, H
    TileRows rows;
    int valid;  // rows that hold a token

    __device__ explicit Block(const BackwardParams &p) {
        const TileGrid &g = p.geometry;
        const int per_tile = g.slot / kRows, per_head = g.all_tiles() * per_tile, in_head = blockIdx.x % per_head;
        head = blockIdx.x / per_head;
        batch = blockIdx.z;
        bh = int64_t(batch) * p.heads + head;
        index = bh * per_head + in_head;
        rows = g.rows(in_head / per_tile, p.valid_text(batch));
        first_row = in_head % per_tile * kRows;
        valid = min(kRows, rows.valid() - first_row);
    }
};

// grid (heads * query blocks, 1, batch)
template <class T, int kHeadDim>
__global__ void __launch_bounds__(kThreads, kCtas)
    query_operands(const __grid_constant__ Deferred<BackwardParams> deferred) {
    const BackwardParams &p = deferred.after_previous();
    constexpr int kLanes = kHeadDim / kVec, kRowsPerPass = kThreads / kLanes;
    const Block<kQueryBlock> block(p);
    if (block.valid <= 0) {
        return;  // no CTA of the backward loads it
    }
    const uint8_t *fp8 = p.q_blocks + block.index * q_block_bytes(kHeadDim);
    const float scale = reinterpret_cast<const BlockMeta *>(fp8 + kQueryBlock * kHeadDim)->scale;
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
        *part_of<64>(dout_operand, kQueryBlock, row, channel) = to_bf16(dout);
        // Row constants
        if (channel == 0) {
            rows.offset[row] = valid ? 1024.0f + kCodeOfOne - kCodes * m : -INFINITY;
            rows.minus_delta[row] = valid ? c * (p.dlse[at] - delta) : 0.0f;
        }
        // q
        float q[kVec];
        decode(*reinterpret_cast<const uint2 *>(fp8 + swizzled<kHeadDim>(row, channel)), scale, q);
        *part_of<64>(q_operand, kQueryBlock, row, channel) = to_bf16(q);
    }
}

// grid (heads * key blocks, 1, batch)
template <int kHeadDim>
__global__ void __launch_bounds__(kThreads, kCtas)
    key_operands(const __grid_constant__ Deferred<BackwardParams> deferred) {
    const BackwardParams &p = deferred.after_previous();
    constexpr int kLanes = kHeadDim / kVec, kChunks = kBlock / 16;
    constexpr int kPitch = kBlock + 4;  // bytes from channel to channel; the pad of a word shifts them by one bank
    __shared__ alignas(16) uint8_t tokens_of[kHeadDim * kPitch];
    const Block<kBlock> block(p);
    if (block.valid <= 0) {
        return;
    }
    const uint8_t *fp8 = p.kv_blocks + block.index * kv_block_bytes(kHeadDim);
    const BlockMeta &meta = *reinterpret_cast<const BlockMeta *>(fp8 + 2 * kBlock * kHeadDim);
    const float k_scale = meta.scale, v_scale = meta.v_scale;
    uint8_t *k_operand = p.key_operands + block.index * bwd_key_bytes(kHeadDim);
    uint8_t *v_operand = k_operand + kBlock * kHeadDim * 2;

    // V's channels to shared memory, as they lie: tokens by channel, permuted.
    for (int i = threadIdx.x; i < kHeadDim * kChunks; i += kThreads) {
        const int d = i / kChunks, byte = i % kChunks * 16;
        const uint4 raw = *reinterpret_cast<const uint4 *>(fp8 + kBlock * kHeadDim + swizzled<kBlock>(d, byte));
        uint32_t *to = reinterpret_cast<uint32_t *>(&tokens_of[d * kPitch + byte]);
        to[0] = raw.x, to[1] = raw.y, to[2] = raw.z, to[3] = raw.w;
    }
    // k
    for (int i = threadIdx.x; i < kBlock * kLanes; i += kThreads) {
        const int row = i / kLanes, channel = i % kLanes * kVec;
        float k[kVec];
        decode(*reinterpret_cast<const uint2 *>(fp8 + swizzled<kHeadDim>(row, channel)), k_scale, k);
        *part_of<kHeadDim / 2>(k_operand, kBlock, row, channel) = to_bf16(k);
    }
    __syncthreads();
    // v. Neighbouring lanes take neighbouring tokens and so read from the same few words.
    for (int i = threadIdx.x; i < kBlock * kLanes; i += kThreads) {
        const int row = i % kBlock, channel = i / kBlock * kVec;
        const uint8_t *from = &tokens_of[channel * kPitch + row / 16 * 16 + byte_of_token(row % 16)];
        uint32_t words[2] = {};
#pragma unroll
        for (int j = 0; j < kVec; ++j) {
            words[j / 4] |= uint32_t(from[j * kPitch]) << (j % 4 * 8);
        }
        float v[kVec];
        decode({words[0], words[1]}, v_scale, v);
        *part_of<64>(v_operand, kBlock, row, channel) = to_bf16(v);
    }
}

// grid (heads * query blocks, 1, batch). A warpgroup takes half of the channels: dq_sum is in the order of the
// fragments of attn_bwd_sm90, whose two warpgroups each computed half of the channels.
template <class T, int kHeadDim>
__global__ void __launch_bounds__(kThreads) finish_dq(const __grid_constant__ Deferred<BackwardParams> deferred) {
    const BackwardParams &p = deferred.after_previous();
    constexpr int kColumns = kHeadDim / 2, kGroups = kColumns / 8;
    const Block<kQueryBlock> block(p);
    if (block.valid <= 0) {
        return;
    }
    const int half = threadIdx.x / 128, thread = threadIdx.x % 128, lane = thread % 4;
    const float4 *sums =
        reinterpret_cast<const float4 *>(p.dq_sum + block.index * (kQueryBlock * kHeadDim)) + half * kGroups * 128;
    float x[4 * kGroups];
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
        const float4 sum = __ldg(sums + g * 128 + thread);
        x[4 * g] = sum.x, x[4 * g + 1] = sum.y, x[4 * g + 2] = sum.z, x[4 * g + 3] = sum.w;
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const int row = fragment_row(thread) + 8 * r;
        const bool valid = row < block.valid;
        const int64_t token = valid ? p.geometry.token(block.rows, block.first_row + row) : 0;
        if (p.k_mean != nullptr) {
            // lse includes K's mean, the sums do not.
            const float dlse = p.dlse[block.bh * p.geometry.tokens() + token];
            const float *mean = p.k_mean + block.bh * kHeadDim + half * kColumns + 2 * lane;
#pragma unroll
            for (int i = 0; i < 2 * kGroups; ++i) {
                x[i / 2 * 4 + 2 * r + i % 2] += dlse * mean[i / 2 * 8 + i % 2];
            }
        }
        T *to = static_cast<T *>(p.dq) + p.dq_strides.offset(block.batch, block.head, token) + half * kColumns;
        store_row<T, kColumns>(to, valid, r, lane, [&](int i) { return x[i] * p.scale; });
    }
}

template <int kRows>
dim3 blocks_of(const BackwardParams &p) {
    return {unsigned(p.heads * p.geometry.all_tiles() * (p.geometry.slot / kRows)), 1, unsigned(p.batch)};
}

}  // namespace

void bwd_operands(const BackwardParams &p, cudaStream_t stream) {
    dispatch(p.head_dim, p.dtype, [&](auto dim, auto element) {
        constexpr int kHeadDim = decltype(dim)::value;
        launch(query_operands<decltype(element), kHeadDim>, blocks_of<kQueryBlock>(p), kThreads, 0, stream, p);
        launch(key_operands<kHeadDim>, blocks_of<kBlock>(p), kThreads, 0, stream, p);
    });
}

void bwd_finish_dq(const BackwardParams &p, cudaStream_t stream) {
    dispatch(p.head_dim, p.dtype, [&](auto dim, auto element) {
        launch(finish_dq<decltype(element), decltype(dim)::value>, blocks_of<kQueryBlock>(p), kThreads, 0, stream, p);
    });
}

}  // namespace fps
