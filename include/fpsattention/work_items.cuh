// What each CTA computes: the forward's work items and the backward's key items, worked out on the device.
//
// Packed blocks of one kind are numbered head by head: batch, head, tile, block of the tile.
#pragma once

#include "fpsattention/params.h"

namespace fps {

// Coordinates of element i of a box that is walked along axis[0] fastest; size[k] is its extent along axis[k].
__device__ __forceinline__ Int3 coordinates(int i, const int (&axis)[3], const int (&size)[3]) {
    const int fast = i % size[0], rest = i / size[0];
    const int middle = rest % size[1], slow = rest / size[1];
    const auto along = [&](int k) { return k == axis[0] ? fast : k == axis[1] ? middle : slow; };
    return {along(0), along(1), along(2)};
}

// The inverse: index of an element among those of the box.
__device__ __forceinline__ int index_of(const Int3 &at, const int (&axis)[3], const Int3 &size) {
    return (at[axis[2]] * size[axis[1]] + at[axis[1]]) * size[axis[0]] + at[axis[0]];
}

// ---- Forward ----

// Up to p.blocks_per_item query blocks that see the same keys.
//
// They belong to one tile group (TileGrid::tile_group). Its tiles are ordered with ragged axes slowest; the first
// blocks of all its tiles come first, then the second blocks, and so on. Blocks without a token then lie together, and
// most items are either full or empty. Blocks of text queries see every key; they form items of their own, which come
// before all others.
struct WorkItem {
    int batch, head;
    int first_block;  // index of its first query block in the tile group, or among the text query blocks
    bool is_text;
    int64_t bh;   // index of the head among all of B, H
    Int3 origin;  // first tile of the group
    TileBox keys;
    TextTokens text;  // valid text tokens of the sample

    __device__ WorkItem(const ForwardParams &p, int index) {
        is_text = index < p.text_items;
        index -= is_text ? 0 : p.text_items;
        const int per_group = is_text ? p.text_items_per_head : p.items_per_group, groups = is_text ? 1 : p.n_groups;
        first_block = index % per_group * p.blocks_per_item;
        index /= per_group;
        origin = coordinates(index % groups, p.groups);
        index /= groups;
        batch = index / p.heads;
        head = p.head_at(index % p.heads);
        bh = int64_t(batch) * p.heads + head;
        const TileGrid &g = p.geometry;
        keys = is_text ? g.everything() : g.keys_of(origin, p.window(head), p.border);
        text = p.valid_text(batch);
    }
    // Key blocks that hold a token.
    __device__ int n_key_blocks(const TileGrid &g) const { return g.valid_blocks(keys) + text.blocks(kBlock); }
};

// Query block i of an item.
struct QueryBlock {
    int block;      // number in the head
    int first_row;  // in the tile's slot
    TileRows rows;
    bool exists;  // false also if it holds no token

    __device__ QueryBlock(const ForwardParams &p, const WorkItem &item, int i) {
        const TileGrid &g = p.geometry;
        const int per_tile = g.slot / kQueryBlock, in_group = item.first_block + i;
        if (item.is_text) {
            exists = in_group < item.text.blocks(kQueryBlock);
            block = g.text_block(in_group, item.text, kQueryBlock);
            rows = g.rows(block / per_tile, item.text);
            first_row = block % per_tile * kQueryBlock;
            return;
        }
        const Int3 offset = coordinates(in_group % p.tiles_per_group, p.group_axis, p.group_size);
        const Int3 tile{item.origin.t + offset.t, item.origin.h + offset.h, item.origin.w + offset.w};
        rows = g.rows(tile);
        const int in_tile = in_group / p.tiles_per_group;
        block = g.tile_index(tile) * per_tile + in_tile;
        first_row = in_tile * kQueryBlock;
        exists = first_row < rows.valid();
    }
};

// A work item as the queries warp publishes it to the other warps.
struct Task {
    int index;         // of the item; an index past the last item ends the CTA
    int n_key_blocks;  // that hold a token
    WorkItem item;
    QueryBlock queries[kMaxBlocksPerItem];
};

// Calls f(block) for every key block of an item that holds a token: the window's box in raster order of its tiles, then
// text. `block` is its number in the head.
template <class F>
__device__ __forceinline__ void for_each_key_block(const TileGrid &g, const WorkItem &item, F &&f) {
    for (int t = item.keys.t.lo; t < item.keys.t.hi; ++t) {
        for (int h = item.keys.h.lo; h < item.keys.h.hi; ++h) {
            for (int w = item.keys.w.lo; w < item.keys.w.hi; ++w) {
                const Int3 tile{t, h, w};
                const int blocks = ceil_div(g.extent(tile).volume(), kBlock);
                const int first = g.tile_index(tile) * g.blocks_per_tile();
                for (int b = 0; b < blocks; ++b) {
                    f(first + b);
                }
            }
        }
    }
    for (int i = 0; i < item.text.blocks(kBlock); ++i) {
        f(g.text_block(i, item.text, kBlock));
    }
}

// ---- Backward ----

// With turns, key blocks of this many heads alternate: a CTA then waits for one that started several places earlier.
// More heads would leave fewer of their queries and sums dQ in L2.
constexpr int kHeadsInTurns = 2;

// The key block that a CTA owns.
//
// The key blocks of one head run at the same time, in the order of p.key_axis, so that they share its queries in L2.
// With a window per head, heads with large windows run first. Text keys, which all queries attend, run before all
// others, so that the last CTAs are short. With turns they run last instead, in the order of the turns.
struct KeyItem {
    int batch;
    int head;
    int first_row;    // in the tile's slot
    int text_number;  // index among the head's text key blocks that hold a token; -1: a block of the grid
    int64_t bh;       // index of the head among all of B, H
    int64_t index;    // of the key block among those of all B, H
    Int3 tile;        // if not text
    TileRows rows;    // of the tile
    TileBox queries;  // tiles that attend it
    TextTokens text;  // valid text tokens of the sample

    // The item at this place in the order of work.
    __device__ KeyItem(const BackwardParams &p, int place) {
        const TileGrid &g = p.geometry;
        const int per_tile = g.blocks_per_tile(), text_blocks = g.text.blocks(kBlock);
        const int in_grid = g.tiles.volume() * per_tile, all_text = p.batch * p.heads * text_blocks;
        int i = place + (p.turns == nullptr ? 0 : all_text);
        i -= i < int(gridDim.x) ? 0 : int(gridDim.x);
        const bool is_text = i < all_text;
        i -= is_text ? 0 : all_text;
        const int per_head = is_text ? text_blocks : in_grid;
        const int together = p.turns == nullptr ? 1 : kHeadsInTurns, first = i / (per_head * together) * together;
        const int of_group = min(together, p.batch * p.heads - first), in_group = i - first * per_head;
        const int in_head = in_group / of_group, sample_head = first + in_group % of_group;
        batch = sample_head % p.batch;
        head = p.head_at(sample_head / p.batch);
        bh = int64_t(batch) * p.heads + head;
        text = p.valid_text(batch);
        if (is_text) {
            text_number = in_head;
            const int block = g.text_block(text_number, text, kBlock);
            index = bh * g.blocks() + block;
            first_row = block % per_tile * kBlock;
            rows = text_number < text.blocks(kBlock) ? g.rows(block / per_tile, text) : TileRows{};
            queries = g.everything();
            return;
        }
        text_number = -1;
        const int block = in_head % per_tile;
        tile = coordinates(in_head / per_tile, p.key_axis, p.key_size);
        index = bh * g.blocks() + g.tile_index(tile) * per_tile + block;
        first_row = block * kBlock;
        rows = g.rows(tile);
        queries = g.queries_of(tile, p.window(head), p.border);
    }
    __device__ bool is_text() const { return text_number >= 0; }
    __device__ bool exists() const { return first_row < rows.valid(); }
    // Query blocks that hold a token and attend it.
    __device__ int n_query_blocks(const TileGrid &g) const {
        return g.valid_blocks(queries, kQueryBlock) + text.blocks(kQueryBlock);
    }
};

// One step of a key item: a query block that attends it.
struct QueryStep {
    int64_t index;  // of the query block among those of all B, H
    bool is_text;
    Int3 tile;  // if not text
};

// Calls f(QueryStep) for every query block that attends a key block, in the order in which the CTA takes them.
template <class F>
__device__ __forceinline__ void for_each_query_block(const BackwardParams &p, const KeyItem &key, F &&f) {
    const TileGrid &g = p.geometry;
    const int per_tile = g.slot / kQueryBlock;
    const int64_t of_head = key.bh * (g.all_tiles() * per_tile);
    const TileBox &box = key.queries;
    const Int3 size{box.t.size(), box.h.size(), box.w.size()};
    const int tiles = box.tiles();
    // Key blocks that run at the same time start at different query tiles, so that they do not all add to the same rows
    // of dQ. With turns they start where the turns do.
    const int start = p.turns == nullptr && tiles > 0 ? int(key.index % tiles) : 0;
    for (int i = 0; i < tiles; ++i) {
        const Int3 at = coordinates((start + i) % tiles, size);
        const Int3 tile{box.t.lo + at.t, box.h.lo + at.h, box.w.lo + at.w};
        const int blocks = ceil_div(g.extent(tile).volume(), kQueryBlock);
        const int64_t first = of_head + g.tile_index(tile) * per_tile;
        for (int b = 0; b < blocks; ++b) {
            f(QueryStep{first + b, false, tile});
        }
    }
    for (int i = 0; i < key.text.blocks(kQueryBlock); ++i) {
        f(QueryStep{of_head + g.text_block(i, key.text, kQueryBlock), true, {}});
    }
}

// The turn of a key block at a query block's dQ: it adds once the counter has reached `from`, then sets it to `to`.
struct Turn {
    int from, to;
};

// A query block's key blocks are numbered from 1 in the order of p.key_axis within its box of keys, `blocks_per_tile`
// to a tile; text comes after them. `to` is the number of this key block, `from` that of the one before it that holds a
// token. KeyItem has them in the same order.
__device__ inline Turn turn_of(const BackwardParams &p, const KeyItem &key, const QueryStep &query) {
    const TileGrid &g = p.geometry;
    const TileBox box = query.is_text ? g.everything() : g.keys_of(query.tile, p.window(key.head), p.border);
    const Int3 size{box.t.size(), box.h.size(), box.w.size()};
    const auto in_box = [&](const Int3 &at) { return Int3{at.t - box.t.lo, at.h - box.h.lo, at.w - box.w.lo}; };
    const int tile = key.is_text() ? size.volume() : index_of(in_box(key.tile), p.key_axis, size);
    const int block = key.is_text() ? key.text_number : key.first_row / kBlock;
    const int to = tile * g.blocks_per_tile() + block + 1;
    if (block > 0 || tile == 0) {
        return {to - 1, to};
    }
    const int sizes[3] = {size[p.key_axis[0]], size[p.key_axis[1]], size[p.key_axis[2]]};
    const Int3 before = coordinates(tile - 1, p.key_axis, sizes);
    const Int3 extent = g.extent({box.t.lo + before.t, box.h.lo + before.h, box.w.lo + before.w});
    return {(tile - 1) * g.blocks_per_tile() + ceil_div(extent.volume(), kBlock), to};
}

}  // namespace fps
