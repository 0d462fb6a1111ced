// Plain structs that carry a call from the bindings to a kernel, and the layout of what the kernels exchange.
// No torch, no CuTe: this is the whole interface between host and device code.
#pragma once

#include <cuda_runtime.h>

#include "fpsattention/geometry.h"

namespace fps {

// Strides of a [batch, head, token, head_dim] view, in elements; head_dim is contiguous.
struct Strides {
    int64_t batch, head, token;
};

enum class Dtype : int { kBF16 = 0, kFP16 = 1 };

// The rows of one block as the forward wants them in shared memory, so that one bulk copy brings it all.
//   Q block:  q  [64][D] e4m3, swizzled | BlockMeta
//   KV block: k  [128][D] e4m3, swizzled | v^T [D][128] e4m3, swizzled, tokens permuted in 16s | BlockMeta
struct alignas(128) BlockMeta {
    float scale;  // of the tile's Q or K: x = x8 * scale
    int valid;    // rows that hold a token; they come first
};

FPS_HD constexpr int q_block_bytes(int head_dim) {
    return kQueryBlock * head_dim + int(sizeof(BlockMeta));
}
FPS_HD constexpr int kv_block_bytes(int head_dim) {
    return 2 * kBlock * head_dim + int(sizeof(BlockMeta));
}

struct QuantizeParams {
    const void *q, *k, *v;  // [B, H, L, D] bf16 or fp16, any strides that are multiples of 8 elements
    Strides q_strides, k_strides, v_strides;
    uint8_t *q_blocks;       // [B, H, tiles * slot / 64, q_block_bytes]
    uint8_t *kv_blocks;      // [B, H, tiles * slot / 128, kv_block_bytes]
    float *v_amax;           // [B, H, D], zeroed by the caller
    float *norms;            // [B, H, 2], zeroed by the caller: largest L2 norm of a row of Q, and of K
    float *k_sum;            // [B, H, chunks, D] partial sums, or null: no smoothing
    float *k_mean;           // [B, H, D], or null: no smoothing
    float *lse_shift;        // [B, H, L], q . k_mean * scale, or null
    float *q_amax, *k_amax;  // [B, H, bricks], zeroed by the caller, or null: each tile has its own
    TileGrid geometry;
    Int3 brick;  // tiles that share one scale, per axis
    int batch, heads, head_dim;
    Dtype dtype;
    float scale;  // softmax scale, for lse_shift
};

struct ForwardParams {
    const uint8_t *q_blocks, *kv_blocks;  // as above
    const float *v_amax;                  // [B, H, D]
    const float *norms;                   // [B, H, 2]
    const float *lse_shift;               // [B, H, L] or null
    void *out;                            // [B, H, L, D], dtype
    float *lse;                           // [B, H, L], natural log
    Strides out_strides;
    TileGrid geometry;
    int batch, heads, head_dim;
    Dtype dtype;
    float scale;
    Border border;
    int n_windows;              // 1, or heads
    Int3 windows[kMaxWindows];  // in tiles, at most the tiles there are

    // Work items; filled in by attn_fwd.
    Int3 runs;                     // per axis; a run is a box of query tiles that see the same keys
    int run_axis[3], run_size[3];  // axes, fastest first, and tiles of a run along them
    int n_runs, tiles_per_run, items_per_run, items;
    bool ragged_runs;                 // blocks may be empty, and so items
    uint8_t head_order[kMaxWindows];  // with a window per head: longest first
};

// Partial sums per (batch, head) that k_sum must hold.
int quantize_chunks(int tokens);
void quantize(const QuantizeParams &p, cudaStream_t stream);
void attn_fwd(ForwardParams p, cudaStream_t stream);

}  // namespace fps
