// wgmma on CuTe tensors: operands in shared memory, and products of several k steps.
#pragma once

#include <cute/tensor.hpp>

namespace fps {

// Layout of a ring of buffers that lie kStride elements apart: `layout` with the stage as one more, last mode.
template <int kStages, int kStride, class Layout>
__device__ constexpr auto ring_of(Layout layout) {
    using cute::Int;
    return cute::make_composed_layout(
        layout.layout_a(), layout.offset(),
        cute::append(layout.layout_b(), cute::make_layout(Int<kStages>{}, Int<kStride>{})));
}

template <class Element, class Layout>
__device__ auto smem_tensor(Element *first, Layout layout) {
    return cute::make_tensor(cute::make_smem_ptr(first), layout);
}

// Fragments in registers: accumulator C of kRows x kColumns, and operand A of kRows x kInner.
template <class Mma, int kRows, int kColumns>
using FragmentC = decltype(cute::partition_fragment_C(Mma{}, cute::Shape<cute::Int<kRows>, cute::Int<kColumns>>{}));
template <class Element, class Mma, int kRows, int kInner>
using FragmentA = decltype(cute::make_tensor<Element>(
    cute::partition_shape_A(Mma{}, cute::Shape<cute::Int<kRows>, cute::Int<kInner>>{})));

// Operand A or B of a product, as descriptors of a tensor in shared memory. Modes: instruction, rows, k steps, and the
// stage if there is a ring.
template <class Mma, class Tensor>
__device__ auto operand_a(const Tensor &smem) {
    return Mma{}.get_slice(threadIdx.x % 128).partition_fragment_A(smem);
}
template <class Mma, class Tensor>
__device__ auto operand_b(const Tensor &smem) {
    return Mma{}.get_slice(threadIdx.x % 128).partition_fragment_B(smem);
}

// Issues C = A B^T, or C += A B^T, over all k steps and commits it as one group.
enum class Sum { kFromZero, kAddTo };
template <class Mma, class A, class B, class C>
__device__ __forceinline__ void issue(const A &a, const B &b, C &c, Sum sum) {
    using cute::_;
    Mma mma;
    cute::warpgroup_fence_operand(c);
    cute::warpgroup_arrive();
    mma.accumulate_ = sum == Sum::kFromZero ? cute::GMMA::ScaleOut::Zero : cute::GMMA::ScaleOut::One;
#pragma unroll
    for (int k = 0; k < cute::size<2>(a); ++k) {
        cute::gemm(mma, a(_, _, k), b(_, _, k), c);
        mma.accumulate_ = cute::GMMA::ScaleOut::One;
    }
    cute::warpgroup_commit_batch();
}

// Waits until at most kInFlight groups of this warp are in flight. The results that are complete then may be read.
template <int kInFlight, class... C>
__device__ __forceinline__ void wait_for_products(C &...complete) {
    cute::warpgroup_wait<kInFlight>();
    (cute::warpgroup_fence_operand(complete), ...);
}

}  // namespace fps
