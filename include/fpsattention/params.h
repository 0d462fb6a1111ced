// Plain structs that carry a call from the bindings to a kernel, and the layout of what the kernels exchange.
// No torch, no CuTe: this is the whole interface between host and device code.
#pragma once

#include <cuda_runtime.h>

#include "fpsattention/geometry.h"

namespace fps {

// Strides of a [batch, head, token, head_dim] view, in elements; head_dim is contiguous.
struct Strides {
    int64_t batch, head, token;
    FPS_HD int64_t offset(int b, int h, int64_t t) const { return b * batch + h * head + t * token; }
};

enum class Dtype : int { kBF16 = 0, kFP16 = 1 };

// A packed block holds the rows of one block as the forward reads them from shared memory: one bulk copy brings it.
//   Q block:  q  [64][D] e4m3, swizzled | BlockMeta
//   KV block: k  [128][D] e4m3, swizzled | v^T [D][128] e4m3, swizzled, tokens permuted in 16s | BlockMeta |
//             is_token [128] e4m3, tokens permuted: 1 for a token, 0 for padding; swizzled as row D + 1 of v^T
// The rows of a block's tokens come first. Padding of q and v is zero. Padding of k repeats the block's first row: it
// changes no maximum of scores, and with v and is_token zero no sum.
struct alignas(128) BlockMeta {
    float scale;  // of the tile's Q or K: x = x8 * scale; NaN if the tile holds a NaN or an Inf
    int valid;    // rows that hold a token
    int unused[2];
    float v_scale;  // of the V of a key block, likewise
};

FPS_HD constexpr int q_block_bytes(int head_dim) {
    return kQueryBlock * head_dim + int(sizeof(BlockMeta));
}
FPS_HD constexpr int kv_block_bytes(int head_dim) {
    return 2 * kBlock * head_dim + int(sizeof(BlockMeta)) + kBlock;
}

// 16-bit operands of a query block in the backward, bf16 for fp16 inputs as well, in parts of 64 columns whose rows are
// swizzled:
//   q8 times the power of two in its scale  [D/64][64][64] | dO c  [D/64][64][64] | QueryRows
struct QueryRows {
    float offset[kQueryBlock];       // -M in codes of P, plus the code of 1 and 1024; -inf for padding
    float minus_delta[kQueryBlock];  // m c (dlse - rowsum(dO O)), m of q8, c = 2^(M - lse2 - kLog2Bias), M = ceil(lse2)
    float scale;                     // of q8
    int unused[3];                   // zero
};
FPS_HD constexpr int bwd_query_bytes(int head_dim) {
    return kQueryBlock * 2 * 2 * head_dim + int(sizeof(QueryRows));
}

// Parameters that all launches of a call share. Pointers are to device memory.
struct CallParams {
    TileGrid geometry;
    const int *prefix_valid, *suffix_valid;  // [B], valid text tokens of each sample; null: all are valid
    int batch, heads, head_dim;
    Dtype dtype;
    float scale;  // of the scores before softmax

    FPS_HD TextTokens valid_text(int sample) const {
        const TextTokens all = geometry.text;
        return {count(prefix_valid, sample, all.prefix), count(suffix_valid, sample, all.suffix)};
    }

private:
    FPS_HD static int count(const int *valid, int sample, int all) {
        return valid == nullptr ? all : clamped(valid[sample], 0, all);
    }
};

// Memory that a host function fills with zeros before its first kernel.
struct Zeroed {
    void *begin;
    size_t bytes;
};

// Norm and rotary embedding of Q and K ahead of their quantisation. An RMSNorm multiplies each row by 1 / RMS and a
// weight per channel; a LayerNorm takes the row's mean off first, and adds a bias. Then each channel pair (2i, 2i + 1)
// of the grid's tokens is rotated; text is not.
struct NormRope {
    const float *weights[2];       // of Q and of K, [H, D] or, if per_head, [D]; null: no norm
    const float *text_weights[2];  // of text tokens, likewise; null: those of the grid's
    const float *biases[2];        // [D]; not null: a LayerNorm, which is per_head
    float *inverse_rms[2];         // [B, L], scratch; unused if per_head
    bool per_head;                 // means are over one head's channels
    float eps;
    const float2 *rope;  // cosines and sines; null: no rotation. Either of each axis, [tokens, pairs], one after the
                         // other: the pairs of t come first, then those of h, then those of w.
    Int3 pairs;
    int rope_heads;  // or, if not zero, of each token: [T H W, rope_heads, D / 2]. 1: all heads have the same

    FPS_HD bool any() const { return weights[0] != nullptr || rope != nullptr; }
};

struct QuantizeParams : CallParams {
    const void *q, *k, *v;  // [B, H, L, D], dtype; strides are multiples of 8 elements
    Strides q_strides, k_strides, v_strides;
    uint8_t *q_blocks;       // [B, H, tiles * slot / 64, q_block_bytes]
    uint8_t *kv_blocks;      // [B, H, tiles * slot / 128, kv_block_bytes]
    float *k_sum;            // [B, H, chunks, D], partial sums, scratch; null: no smoothing
    float *k_mean;           // [B, H, D]; null: no smoothing
    float *lse_shift;        // [B, H, L], q . k_mean * scale; null: no smoothing, or no LSE is wanted
    float *q_amax, *k_amax;  // [B, H, bricks], zeroed; null: each tile has its own
    Int3 brick;              // tiles that share one scale, per axis; a text tile has its own
    NormRope norm_rope;
    Zeroed zeroed;  // holds all that is marked so
};

// A list of tiles of the grid.
struct TileList {
    const int *entries;  // null: every tile, in raster order
    int count;
    int last_tile;  // of the grid

    // Nothing has checked the values, since it would have to wait for them: none leads outside of the grid.
    FPS_HD int operator[](int i) const { return entries == nullptr ? i : clamped(entries[i], 0, last_tile); }
};

// For each of the grid's n tiles a list of tiles (fpsattention.KeyTiles). There is a set of n lists for each sample and
// head, or one that several share.
struct TileLists {
    const int *tiles;           // [sets, n, capacity]; null: windows say what is attended
    const int *counts;          // [sets, n]
    const int *starts;          // [sets, n], of a list, in its set's n * capacity entries; null: tile * capacity
    const int *order;           // [sets, n], all tiles in the order of work: long lists first. Null: raster order
    int capacity;               // entries of a list, at most; with `starts`, in the mean
    int batch_step, head_step;  // in sets, from one sample and head to the next; 0: they share it

    FPS_HD bool given() const { return tiles != nullptr; }
    FPS_HD int set(int batch, int head) const { return batch * batch_step + head * head_step; }
    // The tile at a place in the order of work.
    FPS_HD int tile_at(int set, int n, int place) const {
        return order == nullptr ? place : clamped(order[int64_t(set) * n + place], 0, n - 1);
    }
    FPS_HD TileList list(int set, int n, int tile) const {
        const int64_t number = int64_t(set) * n + tile;
        const int64_t first = starts == nullptr ? number * capacity : int64_t(set) * n * capacity + starts[number];
        return {tiles + first, clamped(counts[number], 0, starts == nullptr ? capacity : n * capacity), n - 1};
    }
};

// Parameters that the forward and the backward share.
struct WindowedParams : CallParams {
    Border border;
    int n_windows;                    // 1, or heads
    Int3 windows[kMaxWindows];        // in tiles, at most the tiles there are
    uint8_t head_order[kMaxWindows];  // with a window per head: large windows first, so that the last CTAs are short
    TileLists keys;                   // of each query tile. Given: windows are the whole grid

    FPS_HD Int3 window(int head) const { return windows[n_windows == 1 ? 0 : head]; }
    // The i-th head in the order of work.
    FPS_HD int head_at(int i) const { return n_windows == 1 ? i : head_order[i]; }
};

struct ForwardParams : WindowedParams {
    const uint8_t *q_blocks, *kv_blocks;  // as in QuantizeParams
    const float *lse_shift;               // [B, H, L] or null
    void *out;                            // [B, H, L, D], dtype; rows of invalid text tokens are not written
    float *lse;                           // [B, H, L], natural logarithm; likewise. Null: not wanted
    Strides out_strides;
    int *next_item;  // counter of work items; must be zero

    // Work items; set by attn_fwd.
    Int3 groups;                       // tile groups per axis; a tile group is a box of query tiles with the same keys
    int group_axis[3], group_size[3];  // axes, fastest first, and tiles of a group along them
    int blocks_per_item;               // query blocks, at most
    int n_groups, tiles_per_group, items_per_group;
    int text_items_per_head, text_items;  // of text queries; they come first
    int items;
};

struct BackwardParams : WindowedParams {
    const uint8_t *q_blocks, *kv_blocks;  // as in QuantizeParams
    const void *out, *dout;               // [B, H, L, D], dtype
    Strides out_strides, dout_strides;
    const float *lse, *dlse;  // [B, H, L], and its gradient
    const float *lse_shift;   // [B, H, L] or null
    const float *k_mean;      // [B, H, D] or null; lse_shift is q . k_mean * scale
    uint8_t *query_operands;  // [B, H, tiles * slot / 64, bwd_query_bytes], scratch
    float *dq_sum;            // [B, H, tiles * slot / 64, 64 * D] in the order of fragments, scratch, zeroed
    TileLists queries;        // of each key tile, given where `keys` is
    const int *places;        // [sets, n, capacity], in queries.tiles' order: of the key tile in its query tile's list
    int *turns;               // [B, H, tiles * slot / 64], scratch, zeroed; null: the order of dq_sum's sums is free
    int *next_item;           // counter of key items, scratch, zeroed; not null if turns is not
    void *dq, *dk, *dv;       // [B, H, L, D], dtype; rows of invalid text tokens are not written
    Strides dq_strides, dk_strides, dv_strides;
    Zeroed zeroed;  // holds all that is marked so

    // Order of the key blocks; set by attn_bwd.
    int key_axis[3], key_size[3];  // axes, fastest first, and tiles along them
    int heads_together;            // heads whose key blocks alternate
};

// Smoothing takes K's mean over about kSmoothSamples tokens: those whose index is a multiple of the stride. The mean
// need not be exact, because softmax does not change when all keys of a row move alike.
constexpr int kSmoothSamples = 2048;
FPS_HD int smooth_stride(int tokens) {
    return tokens < kSmoothSamples ? 1 : tokens / kSmoothSamples;
}
constexpr int kSamplesOfCta = 128;  // of which one CTA adds up K
// Partial sums per (batch, head) that k_sum must hold.
FPS_HD int quantize_chunks(int tokens) {
    return ceil_div(ceil_div(tokens, smooth_stride(tokens)), kSamplesOfCta);
}

void quantize(const QuantizeParams &p, cudaStream_t stream);
void attn_fwd(ForwardParams p, cudaStream_t stream);
void attn_bwd(BackwardParams p, cudaStream_t stream);  // the whole backward; the next two are its first and last part
void bwd_operands(const BackwardParams &p, cudaStream_t stream);
void bwd_finish_dq(const BackwardParams &p, cudaStream_t stream);

}  // namespace fps
