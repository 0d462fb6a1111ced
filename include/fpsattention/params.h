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
    int valid;    // rows that hold a token; they come first. What follows is zero
};

FPS_HD constexpr int q_block_bytes(int head_dim) {
    return kQueryBlock * head_dim + int(sizeof(BlockMeta));
}
FPS_HD constexpr int kv_block_bytes(int head_dim) {
    return 2 * kBlock * head_dim + int(sizeof(BlockMeta));
}

// The 16-bit operands that the backward has beside these, bf16 for fp16 inputs as well, D in halves or in parts of 64
// columns, rows of which are swizzled:
//   query block:  q  [D/64][64][64] | dO c  [D/64][64][64] | QueryRows
//   key block:    k  [2][128][D/2]  | v  [D/64][128][64]
struct QueryRows {
    float offset[kQueryBlock];  // log2(448) - M: 448 P 2^(lse2 - M) = 2^(z + offset), M = ceil(lse2); -inf for padding
    float minus_delta[kQueryBlock];  // c (dlse - rowsum(dO O)), c = 2^(M - lse2) / 448
    float scale;                     // of q8
    int unused[3];                   // zero
};
FPS_HD constexpr int bwd_query_bytes(int head_dim) {
    return kQueryBlock * 2 * 2 * head_dim + int(sizeof(QueryRows));
}
FPS_HD constexpr int bwd_key_bytes(int head_dim) {
    return kBlock * 2 * 2 * head_dim;
}

// What every launch is told of the call it belongs to.
struct Call {
    TileGrid geometry;
    const int *prefix_valid, *suffix_valid;  // [B], how many of a sample's text tokens are valid; or null: all
    int batch, heads, head_dim;
    Dtype dtype;
    float scale;  // of the scores before softmax

    FPS_HD TextTokens valid_text(int sample) const {
        const TextTokens all = geometry.text;
        return {count(prefix_valid, sample, all.prefix), count(suffix_valid, sample, all.suffix)};
    }

private:
    FPS_HD static int count(const int *valid, int sample, int all) {
        const int n = valid == nullptr ? all : valid[sample];
        return n < 0 ? 0 : n < all ? n : all;
    }
};

// What may be done to Q and K, of a grid without text tokens, before they are quantised: each row times 1 / RMS and a
// weight per channel, then channel pairs (2i, 2i + 1) turned by the angle of one axis, those of t first, then h, then
// w.
struct NormRope {
    const float *weights[2];  // of Q and of K, [H, D] or [D]; or null: no norm
    float *inverse_rms[2];    // [B, L, 1 or H], scratch
    bool per_head;            // the mean square is of a head's channels, and so are the weights; not of all heads'
    float eps;
    const float2 *rope;  // cosine and sine, [tokens, pairs] of each axis, one after the other; or null: no rotation
    Int3 pairs;

    FPS_HD bool any() const { return weights[0] != nullptr || rope != nullptr; }
};

struct QuantizeParams : Call {
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
    Int3 brick;              // tiles that share one scale, per axis; a text tile has its own
    NormRope norm_rope;
};

// Of a launch that attends.
struct WindowedCall : Call {
    Border border;
    int n_windows;                    // 1, or heads
    Int3 windows[kMaxWindows];        // in tiles, at most the tiles there are
    uint8_t head_order[kMaxWindows];  // with a window per head: large ones first, so that the last to run are short

    FPS_HD Int3 window(int head) const { return windows[n_windows == 1 ? 0 : head]; }
    // The head that is the i-th to run.
    FPS_HD int head_at(int i) const { return n_windows == 1 ? i : head_order[i]; }
};

struct ForwardParams : WindowedCall {
    const uint8_t *q_blocks, *kv_blocks;  // as above
    const float *v_amax;                  // [B, H, D]
    const float *norms;                   // [B, H, 2]
    const float *lse_shift;               // [B, H, L] or null
    void *out;                            // [B, H, L, D], dtype; invalid text tokens are not written
    float *lse;                           // [B, H, L], natural log; likewise
    Strides out_strides;
    int *next_item;  // zero

    // Work items; filled in by attn_fwd.
    Int3 groups;                       // per axis; a tile group is a box of query tiles that see the same keys
    int group_axis[3], group_size[3];  // axes, fastest first, and tiles of a group along them
    int n_groups, tiles_per_group, items_per_group;
    int text_items_per_head, text_items;  // of text queries; they come first
    int items;
};

struct BackwardParams : WindowedCall {
    const uint8_t *q_blocks, *kv_blocks;  // as above
    const float *v_amax;                  // [B, H, D]
    const void *out, *dout;               // [B, H, L, D], dtype
    Strides out_strides, dout_strides;
    const float *lse, *dlse;  // [B, H, L], and its gradient
    const float *lse_shift;   // [B, H, L] or null
    const float *k_mean;      // [B, H, D] or null, what lse_shift comes from
    uint8_t *query_operands;  // [B, H, tiles * slot / 64, bwd_query_bytes]
    uint8_t *key_operands;    // [B, H, tiles * slot / 128, bwd_key_bytes]
    float *dq_sum;            // [B, H, tiles * slot / 64, 64 * D] in the order of fragments, zeroed by the caller
    int *turns;               // [B, H, tiles * slot / 64, 2], zeroed by the caller: deterministic; or null
    void *dq, *dk, *dv;       // [B, H, L, D], dtype; invalid text tokens are not written
    Strides dq_strides, dk_strides, dv_strides;

    int key_axis[3], key_size[3];  // order of the key blocks: axes, fastest first, and tiles along them; by attn_bwd
};

// Partial sums per (batch, head) that k_sum must hold.
int quantize_chunks(int tokens);
void quantize(const QuantizeParams &p, cudaStream_t stream);
void attn_fwd(ForwardParams p, cudaStream_t stream);
void attn_bwd(BackwardParams p, cudaStream_t stream);  // all of the backward: the next two, and between them the kernel
void bwd_operands(const BackwardParams &p, cudaStream_t stream);
void bwd_finish_dq(const BackwardParams &p, cudaStream_t stream);

}  // namespace fps
