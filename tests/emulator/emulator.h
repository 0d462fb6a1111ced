// The CUDA language as plain C++ for the kernels' sources, with device functions from the emulator. The build
// includes this file first in every source.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <vector>

#undef __device__
#define __device__
#undef __forceinline__
#define __forceinline__ inline
#undef __global__
#define __global__
#undef __grid_constant__
#define __grid_constant__
#undef __host__
#define __host__
#undef __launch_bounds__
#define __launch_bounds__(...)
// Static shared memory: kernels that use it run one CTA at a time.
#undef __shared__
#define __shared__ static

using std::max;
using std::min;

// Indices of the running thread.
inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

namespace emulator {

// Number of the active mutation; 0: none.
inline int active_mutation = 0;

[[noreturn]] void fail(const char *format, ...);
void run(dim3 grid, int threads, size_t shared_bytes, std::function<void()> body);

// Lets other threads run. A waiting thread calls it in a loop; `progress` means that something happened, which tells
// a wait from a deadlock.
void yield();
void progress();

char *shared_memory();
uint32_t shared_address(const void *p);

void barrier(int threads);
// The value that lane `from` passes; all 32 lanes of a warp must call it.
uint32_t shuffle(uint32_t x, int from);
bool all(bool x);
int largest(int x);
void store_matrices(uint32_t row, const uint32_t (&words)[4]);

void mbarrier_init(void *barrier, int arrivals);
void mbarrier_expect(void *barrier, int bytes);
void mbarrier_arrive(void *barrier);
bool mbarrier_completed(void *barrier, uint32_t parity);
void fence_mbarrier_init();
void bulk_copy(void *shared, const void *global, int bytes, void *barrier);
void bulk_reduce_add(float *global, const float *shared, int bytes);
// Waits for all reductions of this thread: until their source is read, or until they are added as well.
void bulk_wait(bool until_read);

// Proxy fences, and the event that makes the one for global memory necessary.
void fence_proxy_shared();
void fence_proxy_global();
void acquired_global();

// One wgmma of 64 x n x k: E4M3 or bf16 operands, fp16 or fp32 sums, A from registers or from shared memory, `mn_major`
// operands transposed. d are the registers of the sums, each a float or two halves.
struct Shape {
    int n, k;
    bool fp8, fp16_sums, a_in_registers, a_mn_major, b_mn_major;
};
void wgmma(Shape shape, std::vector<const uint32_t *> a, uint64_t a_descriptor, uint64_t b_descriptor,
           std::vector<void *> d, bool accumulate);
void wgmma_commit();
void wgmma_wait(int groups);

template <class Kernel, class Params>
cudaError_t launch(const cudaLaunchConfig_t *config, Kernel kernel, const Params &p) {
    run(config->gridDim, int(config->blockDim.x), config->dynamicSmemBytes, [=] { kernel(p); });
    return cudaSuccess;
}

template <class To, class From>
To bits(From x) {
    static_assert(sizeof(To) == sizeof(From));
    To y;
    std::memcpy(&y, &x, sizeof y);
    return y;
}

template <class T>
T load(const T *p) {
    return *p;
}

// A thread loads from this address, which may lie in shared memory.
void note_load(const void *p);

// A number whose loads are observed.
template <class T>
struct Observed {
    T value;
    operator T() const {
        note_load(this);
        return value;
    }
};

}  // namespace emulator

// Macros where the CUDA headers declare the name already.
#define cudaLaunchKernelEx emulator::launch
#define __ldg emulator::load

inline void __syncthreads() {
    emulator::barrier(int(blockDim.x));
}
inline void __syncwarp() {
    emulator::all(true);
}
inline void __threadfence() {
}
template <class T>
T __shfl_sync(unsigned, T x, int from) {
    return emulator::bits<T>(emulator::shuffle(emulator::bits<uint32_t>(x), from));
}
template <class T>
T __shfl_xor_sync(unsigned mask, T x, int with) {
    return __shfl_sync(mask, x, int(threadIdx.x % 32) ^ with);
}
inline bool __any_sync(unsigned, bool x) {
    return !emulator::all(!x);
}
inline int __reduce_max_sync(unsigned, int x) {
    return emulator::largest(x);
}
inline int __float_as_int(float x) {
    return emulator::bits<int>(x);
}
inline float __int_as_float(int x) {
    return emulator::bits<float>(x);
}
inline float __uint_as_float(uint32_t x) {
    return emulator::bits<float>(x);
}
inline uint32_t __float_as_uint(float x) {
    return emulator::bits<uint32_t>(x);
}
inline float rsqrtf(float x) {
    return 1.0f / std::sqrt(x);
}
inline float __fdiv_rn(float a, float b) {
    return a / b;
}
inline float __fmaf_rn(float a, float b, float c) {
    return std::fma(a, b, c);
}
inline int atomicAdd(int *p, int x) {
    const int before = *p;
    *p = before + x;
    return before;
}
inline int atomicMax(int *p, int x) {
    const int before = *p;
    *p = max(before, x);
    return before;
}
