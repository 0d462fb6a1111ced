// Instructions of sm_90a, each behind a function that is named after its effect. All inline PTX is here.
//
// The rules of synchronisation are in kernels/README.md.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace fps {

__device__ __forceinline__ uint32_t smem_address(const void *p) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

template <class F>
__device__ __forceinline__ void spin_until(F &&done) {
#ifdef FPS_DEBUG
    // A deadlock becomes a launch failure within seconds.
    for (int tries = 0; !done(); ++tries) {
        if (tries > (1 << 22)) {
            __trap();
        }
    }
#else
    while (!done()) {}
#endif
}

// An mbarrier in shared memory. A wait takes the parity of the phase that it waits for.
struct Barrier {
    uint64_t state;

    // mbarrier.init: `arrivals` arrivals complete a phase.
    __device__ void init(int arrivals) {
        asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(smem_address(this)), "r"(arrivals) : "memory");
    }
    // mbarrier.expect_tx: the phase also waits for `bytes` from the copy engine.
    __device__ void expect(int bytes) {
        asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(smem_address(this)), "r"(bytes)
                     : "memory");
    }
    __device__ void arrive() {
        asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(smem_address(this)) : "memory");
    }
    // One arrival for the whole warp, after all its lanes are done. Every warp that uses a buffer releases it this way.
    __device__ void arrive_as_warp() {
        __syncwarp();
        if (threadIdx.x % 32 == 0) {
            arrive();
        }
    }
    // mbarrier.try_wait: true once the phase of this parity has completed.
    __device__ bool try_wait(uint32_t parity) {
        uint32_t done;
        asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.b32 %0, 1, 0, p; }"
                     : "=r"(done)
                     : "r"(smem_address(this)), "r"(parity)
                     : "memory");
        return done;
    }
    __device__ void wait(uint32_t parity) {
        spin_until([&] { return try_wait(parity); });
    }
};

// Position in a ring of kStages buffers. The consumer waits for full_parity, the producer for empty_parity. The first
// lap of the producer does not wait.
template <int kStages>
class RingState {
public:
    __device__ int stage() const { return stage_; }
    __device__ uint32_t full_parity() const { return lap_parity_; }
    __device__ uint32_t empty_parity() const { return lap_parity_ ^ 1; }
    __device__ void next() {
        const bool wraps = ++stage_ == kStages;
        stage_ = wraps ? 0 : stage_;
        lap_parity_ ^= wraps;
    }

private:
    int stage_ = 0;
    uint32_t lap_parity_ = 0;
};

// griddepcontrol: lets the next kernel of the stream start, then waits until the kernels before this one have ended and
// their writes are visible. A kernel calls it before it reads or writes anything; see Deferred in launch.h.
__device__ __forceinline__ void wait_for_previous() {
    asm volatile("griddepcontrol.launch_dependents;");
    asm volatile("griddepcontrol.wait;" ::: "memory");
}

// fence.mbarrier_init: barrier initialisation becomes visible to the copy engine.
__device__ __forceinline__ void fence_barrier_init() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// cp.async.bulk: `bytes` (a multiple of 16) from global to shared memory, counted on `full`.
__device__ __forceinline__ void bulk_load(void *smem, const void *gmem, int bytes, Barrier &full) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     smem_address(smem)),
                 "l"(gmem), "r"(bytes), "r"(smem_address(&full))
                 : "memory");
}

// fence.proxy.async.shared::cta: orders accesses of threads to shared memory before the wgmmas and bulk copies that
// this thread issues next. Ordered are its own accesses and those that other threads made before a barrier it has
// passed.
__device__ __forceinline__ void fence_proxy_async() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
// fence.proxy.async.global: the same for global memory.
__device__ __forceinline__ void fence_proxy_async_global() {
    asm volatile("fence.proxy.async.global;" ::: "memory");
}

// stmatrix x4: four 8 x 8 matrices of 16-bit elements. Lane l passes the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void store_matrices(void *row, uint32_t x0, uint32_t x1, uint32_t x2, uint32_t x3) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(smem_address(row)), "r"(x0),
                 "r"(x1), "r"(x2), "r"(x3)
                 : "memory");
}

// cp.reduce.async.bulk: adds `bytes` (a multiple of 16) of floats in shared memory to floats in global memory. Two
// waits for all reductions that this thread has issued: until they have read their source, and until they are complete.
__device__ __forceinline__ void bulk_reduce_add(float *gmem, const float *smem, int bytes) {
    asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(gmem),
                 "r"(smem_address(smem)), "r"(bytes)
                 : "memory");
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
__device__ __forceinline__ void bulk_wait_read() {
    asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}
__device__ __forceinline__ void bulk_wait() {
    asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

// Turns between CTAs: waits, with acquire at GPU scope, until a growing counter has reached a value; and sets it, with
// release.
__device__ __forceinline__ void wait_for(const int *counter, int value) {
    spin_until([&] {
        int x;
        asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(x) : "l"(counter) : "memory");
        return x >= value;
    });
}
__device__ __forceinline__ void store_release(int *to, int x) {
    asm volatile("st.release.gpu.global.s32 [%0], %1;" ::"l"(to), "r"(x) : "memory");
}

// setmaxnreg: returns registers to the CTA's pool, or takes them from it.
template <int kRegisters>
__device__ __forceinline__ void release_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void claim_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// No instruction: the compiler no longer knows the value of x, so it cannot hoist what depends on x. That saves
// registers.
__device__ __forceinline__ int opaque(int x) {
    asm volatile("" : "+r"(x));
    return x;
}

// ex2.approx: 2^x with a relative error of 2^-22; 2^-inf = 0.
__device__ __forceinline__ float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Two fp16 numbers in a word: the larger of each, the sum, and a b + c, rounded once.
__device__ __forceinline__ uint32_t max_f16x2(uint32_t a, uint32_t b) {
    uint32_t y;
    asm("max.f16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
    return y;
}
__device__ __forceinline__ uint32_t add_f16x2(uint32_t a, uint32_t b) {
    uint32_t y;
    asm("add.rn.f16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
    return y;
}
__device__ __forceinline__ uint32_t fma_f16x2(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t y;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(y) : "r"(a), "r"(b), "r"(c));
    return y;
}

// Two bf16 numbers in a word: the product of each.
__device__ __forceinline__ uint32_t multiply_bf16x2(uint32_t a, uint32_t b) {
    uint32_t y;
    asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
    return y;
}

// The larger and the smaller of each half of two words of 16-bit floats. NaN if either is NaN.
template <class T>
__device__ __forceinline__ uint32_t larger_halves(uint32_t a, uint32_t b);
template <>
__device__ __forceinline__ uint32_t larger_halves<__nv_bfloat16>(uint32_t a, uint32_t b) {
    uint32_t y;
    asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
    return y;
}
template <>
__device__ __forceinline__ uint32_t larger_halves<__half>(uint32_t a, uint32_t b) {
    uint32_t y;
    asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
    return y;
}
template <class T>
__device__ __forceinline__ uint32_t smaller_halves(uint32_t a, uint32_t b);
template <>
__device__ __forceinline__ uint32_t smaller_halves<__nv_bfloat16>(uint32_t a, uint32_t b) {
    uint32_t y;
    asm("min.NaN.bf16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
    return y;
}
template <>
__device__ __forceinline__ uint32_t smaller_halves<__half>(uint32_t a, uint32_t b) {
    uint32_t y;
    asm("min.NaN.f16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
    return y;
}

// The larger magnitude of two floats, and of each half of two words of 16-bit floats. NaN if either is NaN. The sign of
// the result means nothing.
__device__ __forceinline__ float larger_magnitude(float a, float b) {
    float y;
    asm("max.NaN.xorsign.abs.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
    return y;
}
template <class T>
__device__ __forceinline__ uint32_t larger_magnitudes(uint32_t a, uint32_t b);
template <>
__device__ __forceinline__ uint32_t larger_magnitudes<__nv_bfloat16>(uint32_t a, uint32_t b) {
    uint32_t y;
    asm("max.NaN.xorsign.abs.bf16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
    return y;
}
template <>
__device__ __forceinline__ uint32_t larger_magnitudes<__half>(uint32_t a, uint32_t b) {
    uint32_t y;
    asm("max.NaN.xorsign.abs.f16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
    return y;
}

// prmt: each digit of `selector`, the last first, is the index of a byte of the result among the bytes of a, then of b.
__device__ __forceinline__ uint32_t select_bytes(uint32_t a, uint32_t b, uint32_t selector) {
    uint32_t y;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(y) : "r"(a), "r"(b), "r"(selector));
    return y;
}

// cvt.rn.satfinite.e4m3x2: four floats to four E4M3 bytes, the first in the low byte.
__device__ __forceinline__ uint32_t pack_e4m3(float x0, float x1, float x2, float x3) {
    uint32_t packed;
    asm("{ .reg .b16 lo, hi;\n"
        "cvt.rn.satfinite.e4m3x2.f32 lo, %2, %1;\n"
        "cvt.rn.satfinite.e4m3x2.f32 hi, %4, %3;\n"
        "mov.b32 %0, {lo, hi}; }"
        : "=r"(packed)
        : "f"(x0), "f"(x1), "f"(x2), "f"(x3));
    return packed;
}

}  // namespace fps
