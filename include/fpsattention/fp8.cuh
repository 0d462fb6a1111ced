// Element formats: E4M3 scales, where an element lies in a packed block, and 16-bit elements.
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

// x8 = e4m3(x * inverse), and x is about x8 * scale. If the amax of the values that share a scale is at most
// kAmaxFloor, 448 / amax might overflow: their scale is 1, and they become zeros.
constexpr float kAmaxFloor = 0x1p-100f;
struct QuantScale {
    float scale, inverse;
};
__device__ __forceinline__ QuantScale quant_scale(float amax) {
    return amax <= kAmaxFloor ? QuantScale{1.0f, 1.0f}
                              : QuantScale{__fdiv_rn(amax, kE4M3Max), __fdiv_rn(kE4M3Max, amax)};
}
// The scale alone, at most one ulp off, without a division.
__device__ __forceinline__ float dequant_scale(float amax) {
    return amax <= kAmaxFloor ? 1.0f : amax * (1.0f / kE4M3Max);
}

// Byte offset of (row, byte) in rows of kRowBytes with wgmma's swizzle of 128 bytes (64 bytes for 64-byte rows): the
// index of the 16-byte chunk is XORed with the low bits of the index of the 128-byte line.
template <int kRowBytes>
__device__ __forceinline__ int swizzled(int row, int byte) {
    static_assert(kRowBytes == 64 || kRowBytes == 128, "one swizzle row holds one FP8 row");
    const int offset = row * kRowBytes + byte;
    return offset ^ ((offset >> 3) & (kRowBytes == 128 ? 0x70 : 0x30));
}

// Token order of V^T within 16 tokens. wgmma leaves columns {2c, 2c+1, 8+2c, 9+2c} of S in lane c of a quad, and wants
// columns {4c .. 4c+3} of its A operand there. V^T's tokens are stored in the order of P, so P needs no shuffle.
// Returns the token in byte `byte` of 4-byte word `word`.
__device__ __forceinline__ int permuted_token(int word, int byte) {
    return 2 * word + (byte & 1) + 8 * (byte >> 1);
}
// The inverse: the byte, of 16, that holds a token.
__device__ __forceinline__ int byte_of_token(int token) {
    return token % 8 / 2 * 4 + token % 2 + token / 8 * 2;
}

// Two 16-bit floats in a word, as floats; the first is in the low half.
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

// Vectors of eight elements: 16 bytes of a 16-bit type, 8 bytes of E4M3.
constexpr int kVec = 8;

template <class T>
__device__ __forceinline__ uint4 load_vec(const void *base, int64_t offset) {
    return __ldg(reinterpret_cast<const uint4 *>(static_cast<const T *>(base) + offset));
}

template <class T>
__device__ __forceinline__ void upcast_vec(uint4 raw, float (&x)[kVec]) {
    const uint32_t pairs[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float2 f = upcast<T>(pairs[i]);
        x[2 * i] = f.x;
        x[2 * i + 1] = f.y;
    }
}

}  // namespace fps
