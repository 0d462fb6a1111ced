// 16-bit operands of the backward, made from the E4M3 bytes of packed blocks (params.h) times a power of two.
//
// An operand lies in shared or global memory in parts of 64 channels, with rows of 128 swizzled bytes.
#pragma once

#include <cute/tensor.hpp>

#include "fpsattention/fragments.cuh"
#include "fpsattention/params.h"

namespace fps {

// Address of 8 channels of a row, from `channel` on, in an operand of kRows rows.
template <int kRows>
__device__ __forceinline__ uint4 *part_of_row(void *operand, int row, int channel) {
    const int offset = channel / 64 * (kRows * 128) + swizzled<128>(row, channel % 64 * 2);
    return reinterpret_cast<uint4 *>(static_cast<char *>(operand) + offset);
}

// Two E4M3 bytes as bf16 times `power`.
__device__ __forceinline__ uint32_t widen_two(const uint8_t *first, const uint8_t *second, uint32_t power) {
    return widen(*first | uint32_t(*second) << 8, Half::kLow, power);
}

// 8 channels of a row of E4M3 bytes as bf16 times `power`.
template <int kHeadDim>
__device__ __forceinline__ uint4 widened_part(const void *from, int row, int channel, uint32_t power) {
    const char *bytes = static_cast<const char *>(from) + swizzled<kHeadDim>(row, channel);
    return widen(*reinterpret_cast<const uint2 *>(bytes), power);
}

// Operand of a key block from its rows in E4M3, by kThreads threads.
template <int kHeadDim, int kThreads>
__device__ __forceinline__ void widen_rows(void *to, const void *from, uint32_t power) {
    constexpr int kVecs = kHeadDim / kVec;
    for (int i = threadIdx.x; i < kBlock * kVecs; i += kThreads) {
        const int row = i / kVecs, channel = i % kVecs * kVec;
        *part_of_row<kBlock>(to, row, channel) = widened_part<kHeadDim>(from, row, channel, power);
    }
}

// Operand of a key block from v8, whose rows are channels and whose tokens are permuted in 16s, by kThreads threads.
template <int kHeadDim, int kThreads>
__device__ __forceinline__ void widen_columns(void *to, const void *from, uint32_t power) {
    const uint8_t *v8 = static_cast<const uint8_t *>(from);
    for (int i = threadIdx.x; i < kBlock * kHeadDim / kVec; i += kThreads) {
        const int token = i % kBlock, byte = token / 16 * 16 + byte_of_token(token % 16), channel = i / kBlock * kVec;
        uint32_t words[kVec / 2];
#pragma unroll
        for (int j = 0; j < kVec / 2; ++j) {
            words[j] = widen_two(v8 + swizzled<kBlock>(channel + 2 * j, byte),
                                 v8 + swizzled<kBlock>(channel + 2 * j + 1, byte), power);
        }
        *part_of_row<kBlock>(to, token, channel) = {words[0], words[1], words[2], words[3]};
    }
}

// Operand A of 64 rows in registers, from rows of kRowBytes in shared memory. `row` is this thread's first.
template <int kRowBytes, class TensorA>
__device__ __forceinline__ void load_rows(const void *from, int row, TensorA &a) {
    cute::Tensor words = cute::recast<uint32_t>(a);
#pragma unroll
    for (int i = 0; i < cute::size(words); ++i) {
        const int byte = i / 4 * 32 + i / 2 % 2 * 16 + 4 * (threadIdx.x % 4);
        words(i) = *reinterpret_cast<const uint32_t *>(static_cast<const char *>(from) +
                                                       swizzled<kRowBytes>(row + 8 * (i % 2), byte));
    }
}

// Operand A of 64 channels by the keys of a block in registers, from its rows in E4M3. A word holds two keys.
template <int kHeadDim, class TensorA>
__device__ __forceinline__ void load_transposed(const void *from, uint32_t power, TensorA &a) {
    const uint8_t *bytes = static_cast<const uint8_t *>(from);
    cute::Tensor words = cute::recast<uint32_t>(a);
#pragma unroll
    for (int i = 0; i < cute::size(words); ++i) {
        const int key = i / 4 * 16 + i / 2 % 2 * 8 + 2 * (threadIdx.x % 4);
        const int channel = fragment_row(threadIdx.x % 128) + 8 * (i % 2);
        words(i) =
            widen_two(bytes + swizzled<kHeadDim>(key, channel), bytes + swizzled<kHeadDim>(key + 1, channel), power);
    }
}

}  // namespace fps
