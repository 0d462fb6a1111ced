// Element formats: E4M3 scales, where an element lies in a packed block, and 16-bit elements.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "fpsattention/geometry.h"
#include "fpsattention/hopper.cuh"

namespace fps {

constexpr float kE4M3Max = 448.0f;
constexpr float kQKMax = 14.0f;  // largest element of Q and K in E4M3: scores, sums of 128 products, fit fp16
// P is an E4M3 number whose code, its bit pattern, is round(kTopCode + kCodes (z - m)).
constexpr float kCodes = 8.0f, kTopCode = 120.0f;  // codes of an octave; the code of 256 = 2^kLog2Top
constexpr float kLog2Top = 8.0f;
// Any number with three bits of mantissa has a code like that: bits 4 to 14 of a bf16. kCodeZero plus a code, in
// [0, 2048), is a float with the code in its low bits.
constexpr float kCodeZero = 0x1.8p23f, kCodeOfOne = 8 * 127;
constexpr int kCodeShift = 4;
constexpr float kLog2Bias = 0.05753275f;  // mean of log2(P) - z, as -log2(2 ln(2)^2)
constexpr float kLog2E = 1.44269504088896341f;
constexpr float kLn2 = 0.69314718055994531f;

// x8 = e4m3(x * inverse), and x is about x8 * scale. `largest` is the x8 of amax, the largest magnitude of the values
// that share a scale. If amax is at most kAmaxFloor, largest / amax might overflow: the scale is 1, and all become
// zeros. If it is NaN or Inf, the scale is NaN, and makes all NaN that attends these values.
constexpr float kAmaxFloor = 0x1p-100f;
struct QuantScale {
    float scale, inverse;
};
__device__ __forceinline__ QuantScale quant_scale(float amax, float largest) {
    return amax <= kAmaxFloor   ? QuantScale{1.0f, 1.0f}
           : !(amax < INFINITY) ? QuantScale{NAN, NAN}
                                : QuantScale{__fdiv_rn(amax, largest), __fdiv_rn(largest, amax)};
}

// A scale s is 2^e m with m in [1, 2). The backward's 16-bit operands take the power of two, which leaves them exact,
// and dS takes the mantissa. power_of is 2^e as bf16, twice in a word. If s is NaN, so is m.
__device__ __forceinline__ uint32_t power_of(float scale) {
    const uint32_t exponent = __float_as_uint(scale) >> 16 & 0x7f80;
    return exponent << 16 | exponent;
}
__device__ __forceinline__ float mantissa_of(float scale) {
    return scale < INFINITY ? __uint_as_float((__float_as_uint(scale) & 0x7fffff) | 0x3f800000) : scale;
}

// Two E4M3 bytes, in the low or the high half of a word, as bf16 times `power`. Exact: E4M3's bits, moved to where bf16
// has its exponent and mantissa, are the number times 2^-120.
enum class Half { kLow, kHigh };
__device__ __forceinline__ uint32_t widen(uint32_t word, Half half, uint32_t power) {
    constexpr uint32_t kTwoTo120 = (127 + 120) << 7;
    const uint32_t bytes = select_bytes(word, 0, half == Half::kLow ? 0x1404 : 0x3424);  // each on top of 16 bits
    const uint32_t bits = (bytes & 0x80008000) | (bytes & 0x7f007f00) >> 4;
    return multiply_bf16x2(multiply_bf16x2(bits, kTwoTo120 << 16 | kTwoTo120), power);
}
__device__ __forceinline__ uint4 widen(uint2 bytes, uint32_t power) {
    return {widen(bytes.x, Half::kLow, power), widen(bytes.x, Half::kHigh, power), widen(bytes.y, Half::kLow, power),
            widen(bytes.y, Half::kHigh, power)};
}

// From S to codes of P: 8 s_q s_k scale log2(e), with fp16's precision where fp16 has the range. Forward and backward
// multiply and round it alike, and both have S in fp16: so the backward's P is the forward's, bit for bit, unless the
// forward subtracts maxima. A NaN becomes the smallest.
constexpr float kLargestFactor = 60000.0f;
__device__ __forceinline__ float score_factor(float q_scale, float k_scale, float scale) {
    const float factor = fmaxf(q_scale * k_scale * (scale * (kLog2E * kCodes)), 0x1p-24f);
    return factor > kLargestFactor ? factor : __half2float(__float2half_rn(factor));
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
