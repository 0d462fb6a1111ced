// Fragments: how a warpgroup's accumulator lies in registers, and how it is stored to rows in raster order.
//
// In a 64 x N accumulator, lane l of warp w holds row 16 w + l / 4 (r = 0) and the row 8 below it (r = 1). Of every 8
// columns it holds two: element 4 g + 2 r + c is column 8 g + 2 (l % 4) + c of row r.
#pragma once

#include "fpsattention/fp8.cuh"

namespace fps {

// Row r = 0 of a thread; row r = 1 is 8 below.
__device__ __forceinline__ int fragment_row(int thread) {
    return thread / 32 % 4 * 16 + thread % 32 / 4;
}

// Transposes the four words of each lane of a quad: lane c gets word c of every lane, in the order of the lanes.
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

// Stores row r of a fragment of kColumns columns as T, if `valid`. value(i) is element i, `out` the row's first column,
// `lane` the lane in its quad. A transpose of four groups of 8 columns gives each lane 16 contiguous bytes.
template <class T, int kColumns, class Value>
__device__ __forceinline__ void store_row(T *out, bool valid, int r, int lane, Value &&value) {
#pragma unroll
    for (int j = 0; j < kColumns / 8; j += 4) {
        uint32_t words[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            words[i] = downcast<T>(value(4 * (j + i) + 2 * r), value(4 * (j + i) + 2 * r + 1));
        }
        transpose_quad(words);
        if (valid) {
            *reinterpret_cast<uint4 *>(out + 8 * (j + lane)) = {words[0], words[1], words[2], words[3]};
        }
    }
}

}  // namespace fps
