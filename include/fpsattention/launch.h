// Launching: from run-time values to template parameters, the registers and shared memory of a CTA, and programmatic
// dependent launch with checks.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "fpsattention/check.h"
#include "fpsattention/hopper.cuh"
#include "fpsattention/params.h"

namespace fps {

// Calls f(std::integral_constant<int, head_dim>{}, T{}), where T is the element type.
template <class F>
void dispatch(int head_dim, Dtype dtype, F &&f) {
    const auto with_dim = [&](auto dim) { dtype == Dtype::kBF16 ? f(dim, __nv_bfloat16{}) : f(dim, __half{}); };
    switch (head_dim) {
        case 64:
            return with_dim(std::integral_constant<int, 64>{});
        case 128:
            return with_dim(std::integral_constant<int, 128>{});
        default:
            FPS_CHECK(false, "head_dim must be 64 or 128, got ", head_dim);
    }
}

// Parameters of a kernel that may start before the previous kernels of the stream have ended. A kernel takes every
// address from its parameters, and only `after_previous` returns them: a kernel that does not wait does not compile.
template <class Params>
class Deferred {
public:
    explicit Deferred(const Params &params) : params_(params) {}

    __device__ __forceinline__ const Params &after_previous() const {
        wait_for_previous();
        return params_;
    }

private:
    Params params_;
};

// Registers of a thread at launch, if a CTA has an SM to itself: all threads have the same number, a multiple of 8.
constexpr int launch_registers(int threads) {
    return 64 * 1024 / threads / 8 * 8;
}

// The runtime aligns dynamic shared memory to 16 bytes only; the swizzle needs 1024.
constexpr int kSmemAlignment = 1024;
constexpr int kMaxSmemBytes = 227 * 1024;  // dynamic shared memory of a CTA, at most

// Bytes of dynamic shared memory that hold a `Smem` at an aligned address.
template <class Smem>
constexpr int dynamic_smem_bytes() {
    constexpr int kBytes = sizeof(Smem) + kSmemAlignment;
    static_assert(kBytes <= kMaxSmemBytes);
    return kBytes;
}
// Bytes from there to the next aligned address.
__device__ __forceinline__ uint32_t bytes_to_alignment(const char *dynamic_smem) {
    return -smem_address(dynamic_smem) & (kSmemAlignment - 1);
}

// Launches a kernel that may overlap the end of the previous kernel of the stream.
template <class Params>
void launch(void (*kernel)(Deferred<Params>), dim3 grid, int threads, int smem_bytes, cudaStream_t stream,
            const Params &p) {
    if (smem_bytes > 48 * 1024) {
        FPS_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, smem_bytes));
    }
    cudaLaunchAttribute overlap{};
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = smem_bytes;
    config.stream = stream;
    config.attrs = &overlap;
    config.numAttrs = 1;
    FPS_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, Deferred<Params>(p)));
}

}  // namespace fps
