// In place of include/fpsattention/hopper.cuh: the same functions, with the emulator's effects. The build fails when
// the real file has one that is missing here.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace fps {

inline uint32_t smem_address(const void *p) {
    return emulator::shared_address(p);
}

template <class F>
void spin_until(F &&done) {
    while (!done()) {
        emulator::yield();
    }
}

struct Barrier {
    uint64_t state;

    void init(int arrivals) { emulator::mbarrier_init(this, arrivals); }
    void expect(int bytes) { emulator::mbarrier_expect(this, bytes); }
    void arrive() { emulator::mbarrier_arrive(this); }
    void arrive_as_warp() {
        __syncwarp();
        if (threadIdx.x % 32 == 0) {
            arrive();
        }
    }
    bool try_wait(uint32_t parity) { return emulator::mbarrier_completed(this, parity); }
    void wait(uint32_t parity) {
        spin_until([&] { return try_wait(parity); });
    }
};

template <int kStages>
class RingState {
public:
    int stage() const { return count_ % kStages; }
    uint32_t full_parity() const { return count_ / kStages % 2; }
    uint32_t empty_parity() const { return full_parity() ^ 1; }
    void next() { ++count_; }

private:
    uint32_t count_ = 0;
};

// One launch ends before the next begins.
inline void wait_for_previous() {
}
inline void fence_barrier_init() {
    emulator::fence_mbarrier_init();
}
inline void fence_proxy_async() {
    emulator::fence_proxy_shared();
}
inline void fence_proxy_async_global() {
    emulator::fence_proxy_global();
}

inline void bulk_load(void *smem, const void *gmem, int bytes, Barrier &full) {
    emulator::bulk_copy(smem, gmem, bytes, &full);
}

inline void store_matrices(void *row, uint32_t x0, uint32_t x1, uint32_t x2, uint32_t x3) {
    emulator::store_matrices(smem_address(row), {x0, x1, x2, x3});
}

inline void bulk_reduce_add(float *gmem, const float *smem, int bytes) {
    emulator::bulk_reduce_add(gmem, smem, bytes);
}
inline void bulk_wait_read() {
    emulator::bulk_wait(true);
}
inline void bulk_wait() {
    emulator::bulk_wait(false);
}

inline void wait_for(const int *counter, int value) {
    spin_until([&] { return *counter >= value; });
    emulator::acquired_global();
}
inline void store_release(int *to, int x) {
    *to = x;
    emulator::progress();
}

template <int kRegisters>
void release_registers() {
}
template <int kRegisters>
void claim_registers() {
}

inline int opaque(int x) {
    return x;
}

inline float exp2_approx(float x) {
    const float y = std::exp2(x);
    return y < 0x1p-126f ? 0.0f : y;  // keeps NaN
}

// Applies f to both halves of each word.
template <class F, class... Words>
uint32_t by_halves(F &&f, Words... words) {
    return f(uint16_t(words)...) | uint32_t(f(uint16_t(words >> 16)...)) << 16;
}
// As the instructions: one rounding, and NaN is 0x7fff.
inline uint16_t rounded_f16(double x) {
    return std::isnan(x) ? 0x7fff : emulator::bits<uint16_t>(__double2half(x));
}
inline float of_f16(uint16_t x) {
    return __half2float(emulator::bits<__half>(x));
}
inline uint32_t max_f16x2(uint32_t a, uint32_t b) {
    return by_halves([](uint16_t x, uint16_t y) { return rounded_f16(std::fmax(of_f16(x), of_f16(y))); }, a, b);
}
inline uint32_t add_f16x2(uint32_t a, uint32_t b) {
    return by_halves([](uint16_t x, uint16_t y) { return rounded_f16(double(of_f16(x)) + of_f16(y)); }, a, b);
}
inline uint32_t fma_f16x2(uint32_t a, uint32_t b, uint32_t c) {
    return by_halves(
        [](uint16_t x, uint16_t y, uint16_t z) { return rounded_f16(double(of_f16(x)) * of_f16(y) + of_f16(z)); }, a, b,
        c);
}
// As the instruction: NaN wins, and the sign is the product of the signs.
inline float larger_magnitude(float a, float b) {
    const float larger = std::isnan(a) || std::isnan(b) ? NAN : max(std::fabs(a), std::fabs(b));
    return std::copysign(larger, std::signbit(a) == std::signbit(b) ? 1.0f : -1.0f);
}
// Applies f to the halves of two words as floats of type T.
template <class T, class F>
uint32_t by_floats(F &&f, uint32_t a, uint32_t b) {
    const auto of = [](uint16_t bits) { return float(emulator::bits<T>(bits)); };
    return by_halves([&](uint16_t x, uint16_t y) { return emulator::bits<uint16_t>(T(f(of(x), of(y)))); }, a, b);
}
inline uint32_t multiply_bf16x2(uint32_t a, uint32_t b) {
    return by_floats<__nv_bfloat16>([](float x, float y) { return x * y; }, a, b);
}
template <class T>
uint32_t larger_magnitudes(uint32_t a, uint32_t b) {
    return by_floats<T>(larger_magnitude, a, b);
}
template <class T>
uint32_t larger_halves(uint32_t a, uint32_t b) {
    return by_floats<T>([](float x, float y) { return std::isnan(x) || std::isnan(y) ? NAN : max(x, y); }, a, b);
}
template <class T>
uint32_t smaller_halves(uint32_t a, uint32_t b) {
    return by_floats<T>([](float x, float y) { return std::isnan(x) || std::isnan(y) ? NAN : min(x, y); }, a, b);
}
inline uint32_t select_bytes(uint32_t a, uint32_t b, uint32_t selector) {
    uint32_t y = 0;
    for (int i = 0; i < 4; ++i) {
        const uint64_t both = uint64_t(b) << 32 | a;
        y |= uint32_t(both >> (selector >> (4 * i) & 7) * 8 & 0xff) << (8 * i);
    }
    return y;
}

inline uint32_t pack_e4m3(float x0, float x1, float x2, float x3) {
    const auto e4m3 = [](float x) { return uint32_t(__nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E4M3)); };
    return e4m3(x0) | e4m3(x1) << 8 | e4m3(x2) << 16 | e4m3(x3) << 24;
}

}  // namespace fps
