// Host-side dispatch from run-time facts to template parameters, and launch checking.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "fpsattention/check.h"
#include "fpsattention/params.h"

namespace fps {

// Calls f(std::integral_constant<int, head_dim>{}, T{}) with T the element type.
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

// The kernel may start before the one ahead of it on the stream has ended: it must begin with wait_for_previous().
template <class Kernel, class Params>
void launch(Kernel kernel, dim3 grid, int threads, int smem_bytes, cudaStream_t stream, const Params &p) {
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
    FPS_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, p));
}

}  // namespace fps
