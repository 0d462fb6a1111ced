// The E4M3 side of the numeric contract: scales, and where an element sits in a packed block.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "fpsattention/geometry.h"
#include "fpsattention/hopper.cuh"

namespace fps {

constexpr float kE4M3Max = 448.0f;
constexpr float kLog2P = 8.80735492205760410f;  // log2(448): P is scaled to E4M3's range
constexpr float kLog2E = 1.44269504088896341f;
constexpr float kLn2 = 0.69314718055994531f;

// x8 = e4m3(x * inverse), x ~ x8 * scale. A group whose amax is at most kAmaxFloor (448 / amax might overflow) has
// scale 1 and becomes zeros.
constexpr float kAmaxFloor = 0x1p-100f;
struct QuantScale {
    float scale, inverse;
};
__device__ __forceinline__ QuantScale quant_scale(float amax) {
    return amax <= kAmaxFloor ? QuantScale{1.0f, 1.0f}
                              : QuantScale{__fdiv_rn(amax, kE4M3Max), __fdiv_rn(kE4M3Max, amax)};
}
// The scale alone, without a division: at most one ulp away.
__device__ __forceinline__ float dequant_scale(float amax) {
    return amax <= kAmaxFloor ? 1.0f : amax * (1.0f / kE4M3Max);
}

// Byte offset of (row, byte) in an image of rows of kRowBytes, in wgmma's 128-byte (or, for 64-byte rows, 64-byte)
// swizzle: the 16-byte chunk index is XORed with the low bits of the 128-byte line index.
template <int kRowBytes>
__device__ __forceinline__ int swizzled(int row, int byte) {
    static_assert(kRowBytes == 64 || kRowBytes == 128, "one swizzle row holds one FP8 row");
    const int offset = row * kRowBytes + byte;
    return offset ^ ((offset >> 3) & (kRowBytes == 128 ? 0x70 : 0x30));
}

// wgmma leaves S in registers so that a thread owns columns {2c, 2c+1, 8+2c, 9+2c} of every 16, and wants its A
// operand with columns {4c .. 4c+3}. V^T is stored with its tokens in the matching order, so P needs no shuffle:
// 4-byte word c of each 16 tokens holds these tokens.
__device__ __forceinline__ int permuted_token(int word, int byte) {
    return 2 * word + (byte & 1) + 8 * (byte >> 1);
}
// The inverse: the byte of its 16 that holds this token.
__device__ __forceinline__ int place_of_token(int token) {
    return token % 8 / 2 * 4 + token % 2 + token / 8 * 2;
}

// Two 16-bit floats of a 32-bit word, upcast.
template <class T>
__device__ __forceinline__ float2 upcast(uint32_t pair);
template <>
__device__ __forceinline__ float2 upcast<__nv_bfloat16>(uint32_t pair) {
    return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
}
template <>
__device__ __forceinline__ float2 upcast<__half>(uint32_t pair) {
    return __half22float2(*reinterpret_cast<const __half2 *>(&pair));
}

template <class T>
__device__ __forceinline__ uint32_t downcast(float x0, float x1);
template <>
__device__ __forceinline__ uint32_t downcast<__nv_bfloat16>(float x0, float x1) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(x0, x1);
    return *reinterpret_cast<const uint32_t *>(&pair);
}
template <>
__device__ __forceinline__ uint32_t downcast<__half>(float x0, float x1) {
    const __half2 pair = __floats2half2_rn(x0, x1);
    return *reinterpret_cast<const uint32_t *>(&pair);
}

}  // namespace fps
