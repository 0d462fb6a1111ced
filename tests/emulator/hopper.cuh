// In place of include/fpsattention/hopper.cuh: the same functions, with the emulator's effects. The build fails when
// the real file has one that is missing here.
#pragma once

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
struct RingState {
    uint32_t count = 0;

    int stage() const { return count % kStages; }
    uint32_t full_parity() const { return count / kStages % 2; }
    uint32_t empty_parity() const { return full_parity() ^ 1; }
    void next() { ++count; }
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

inline void load_matrices(const void *row, uint32_t &x0, uint32_t &x1, uint32_t &x2, uint32_t &x3) {
    emulator::load_matrices(smem_address(row), {&x0, &x1, &x2, &x3});
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

inline uint32_t pack_e4m3(float x0, float x1, float x2, float x3) {
    const auto e4m3 = [](float x) { return uint32_t(__nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E4M3)); };
    return e4m3(x0) | e4m3(x1) << 8 | e4m3(x2) << 16 | e4m3(x3) << 24;
}

}  // namespace fps
