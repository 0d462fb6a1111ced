// What each CTA computes: the forward's work items and the backward's key items, worked out on the device.
//
// Packed blocks of one kind are numbered head by head: batch, head, tile, block of the tile. `Tiles` says which tiles
// attend which: TileBox under windows, TileList under lists of key tiles.
#pragma once

#include <type_traits>

#include "fpsattention/params.h"

namespace fps {

template <class Tiles>
constexpr bool kIsList = std::is_same_v<Tiles, TileList>;

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

// All tiles of the grid.
template <class Tiles>
__device__ __forceinline__ Tiles everything(const TileGrid &g) {
    if constexpr (kIsList<Tiles>) {
        return {nullptr, g.tiles.volume(), g.tiles.volume() - 1};
    } else {
        return g.everything();
    }
}

// Blocks of `rows` rows that hold a token: of a tile, or of all tiles of a box or a list. All lanes of a warp call the
// last one.
__device__ __forceinline__ int blocks_of(const TileGrid &g, const Int3 &tile, int rows) {
    return ceil_div(g.extent(tile).volume(), rows);
}
__device__ __forceinline__ int blocks_of(const TileGrid &g, const TileBox &box, int rows) {
    return g.valid_blocks(box, rows);
}
__device__ __forceinline__ int blocks_of(const TileGrid &g, const TileList &list, int rows) {
    int blocks = 0;
#pragma unroll 1  // the load warps have few registers
    for (int i = threadIdx.x % 32; i < list.count; i += 32) {
        blocks += blocks_of(g, g.tile_coord(list[i]), rows);
    }
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
        blocks += __shfl_xor_sync(~0u, blocks, offset);
    }
    return blocks;
}

// ---- Forward ----

// Up to p.blocks_per_item query blocks that see the same keys.
//
// They belong to one tile group (TileGrid::tile_group); under lists that is one tile. Its tiles are ordered with ragged
// axes slowest; the first blocks of all its tiles come first, then the second blocks, and so on. Blocks without a token
// then lie together, and most items are either full or empty. Blocks of text queries see every key; they form items of
// their own, which come before all others.
template <class Tiles>
struct WorkItem {
    int batch, head;
    int first_block;  // index of its first query block in the tile group, or among the text query blocks
    bool is_text;
    int64_t bh;   // index of the head among all of B, H
    Int3 origin;  // first tile of the group
    Tiles keys;
    TextTokens text;  // valid text tokens of the sample

    __device__ WorkItem(const ForwardParams &p, int index) {
        is_text = index < p.text_items;
        index -= is_text ? 0 : p.text_items;
        const int per_group = is_text ? p.text_items_per_head : p.items_per_group, groups = is_text ? 1 : p.n_groups;
        first_block = index % per_group * p.blocks_per_item;
        index /= per_group;
        const int group = index % groups;
        index /= groups;
        batch = index / p.heads;
        head = p.head_at(index % p.heads);
        bh = int64_t(batch) * p.heads + head;
        text = p.valid_text(batch);
        const TileGrid &g = p.geometry;
        if constexpr (kIsList<Tiles>) {
            const int set = p.keys.set(batch, head);
            const int n = g.tiles.volume(), tile = is_text ? 0 : p.keys.tile_at(set, n, group);
            origin = g.tile_coord(tile);
            keys = is_text ? everything<Tiles>(g) : p.keys.list(set, n, tile);
        } else {
            origin = coordinates(group, p.groups);
            keys = is_text ? everything<Tiles>(g) : g.keys_of(origin, p.window(head), p.border);
        }
    }
    // Key blocks that hold a token. All lanes of a warp call it.
    __device__ int n_key_blocks(const TileGrid &g) const { return blocks_of(g, keys, kBlock) + text.blocks(kBlock); }
};

// Query block i of an item.
struct QueryBlock {
    int block;      // number in the head
    int first_row;  // in the tile's slot
    TileRows rows;
    bool exists;  // false also if it holds no token

    template <class Tiles>
    __device__ QueryBlock(const ForwardParams &p, const WorkItem<Tiles> &item, int i) {
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
template <class Tiles>
struct Task {
    int index;         // of the item; an index past the last item ends the CTA
    int n_key_blocks;  // that hold a token; 0 only for an empty list
    WorkItem<Tiles> item;
    QueryBlock queries[kMaxBlocksPerItem];
};

// Calls f(tile, blocks) for every key tile: of a box in raster order, of a list in its order. `tile` is its index,
// `blocks` its key blocks that hold a token. All lanes of a warp call it: they read 32 entries of a list at a
// time, one round ahead.
template <class F>
__device__ __forceinline__ void for_each_key_tile(const TileGrid &g, const TileBox &box, F &&f) {
    for (int t = box.t.lo; t < box.t.hi; ++t) {
        for (int h = box.h.lo; h < box.h.hi; ++h) {
            for (int w = box.w.lo; w < box.w.hi; ++w) {
                const Int3 tile{t, h, w};
                f(g.tile_index(tile), blocks_of(g, tile, kBlock));
            }
        }
    }
}
template <class F>
__device__ __forceinline__ void for_each_key_tile(const TileGrid &g, const TileList &list, F &&f) {
    const int lane = threadIdx.x % 32;
    const auto entry = [&](int i) { return i < list.count ? list[i] : 0; };
    int mine = 0, ahead = entry(lane);
    for (int i = 0; i < list.count; ++i) {
        if (i % 32 == 0) {
            mine = ahead;
            ahead = entry(i + 32 + lane);
        }
        const int tile = __shfl_sync(~0u, mine, i % 32);
        f(tile, blocks_of(g, g.tile_coord(tile), kBlock));
    }
}

// Calls f(block) for every key block of an item that holds a token; text comes last. `block` is its number in the head.
template <class Tiles, class F>
__device__ __forceinline__ void for_each_key_block(const TileGrid &g, const WorkItem<Tiles> &item, F &&f) {
    for_each_key_tile(g, item.keys, [&](int tile, int blocks) {
        for (int b = 0; b < blocks; ++b) {
            f(tile * g.blocks_per_tile() + b);
        }
    });
    for (int i = 0; i < item.text.blocks(kBlock); ++i) {
        f(g.text_block(i, item.text, kBlock));
    }
}

// ---- Backward ----

// The key block that a CTA owns.
//
// The key blocks of one head run at the same time, in the order of p.key_axis or of p.queries, so that they share its
// queries in L2. With a window per head, heads with large windows run first. Text keys, which all queries attend, run
// before all others, so that the last CTAs are short. With turns they run last instead, in the order of the turns.
template <class Tiles>
struct KeyItem {
    int batch;
    int head;
    int first_row;    // in the tile's slot
    int text_number;  // index among the head's text key blocks that hold a token; -1: a block of the grid
    int64_t bh;       // index of the head among all of B, H
    int64_t index;    // of the key block among those of all B, H
    Int3 tile;        // if not text
    TileRows rows;    // of the tile
    Tiles queries;    // tiles that attend it
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
        const int together = p.heads_together, first = i / (per_head * together) * together;
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
            queries = everything<Tiles>(g);
            return;
        }
        text_number = -1;
        const int block = in_head % per_tile, place_of_tile = in_head / per_tile;
        if constexpr (kIsList<Tiles>) {
            const int set = p.queries.set(batch, head);
            const int n = g.tiles.volume(), number = p.queries.tile_at(set, n, place_of_tile);
            tile = g.tile_coord(number);
            queries = p.queries.list(set, n, number);
        } else {
            tile = coordinates(place_of_tile, p.key_axis, p.key_size);
            queries = g.queries_of(tile, p.window(head), p.border);
        }
        index = bh * g.blocks() + g.tile_index(tile) * per_tile + block;
        first_row = block * kBlock;
        rows = g.rows(tile);
    }
    __device__ bool is_text() const { return text_number >= 0; }
    __device__ bool exists() const { return first_row < rows.valid(); }
    // Query blocks that hold a token and attend it. All lanes of a warp call it.
    __device__ int n_query_blocks(const TileGrid &g) const {
        return blocks_of(g, queries, kQueryBlock) + text.blocks(kQueryBlock);
    }
};

// One step of a key item: a query block that attends it.
struct QueryStep {
    int64_t index;  // of the query block among those of all B, H
    bool is_text;
    Int3 tile;  // if not text
    int entry;  // of the tile, in the item's list
};

// Calls f(tile, entry) for every tile of a box or a list, from entry `start` on and round again.
template <class F>
__device__ __forceinline__ void for_each_query_tile(const TileGrid &, const TileBox &box, int start, F &&f) {
    const Int3 size{box.t.size(), box.h.size(), box.w.size()};
    const int tiles = box.tiles();
    for (int i = 0; i < tiles; ++i) {
        const int entry = (start + i) % tiles;
        const Int3 at = coordinates(entry, size);
        f(Int3{box.t.lo + at.t, box.h.lo + at.h, box.w.lo + at.w}, entry);
    }
}
template <class F>
__device__ __forceinline__ void for_each_query_tile(const TileGrid &g, const TileList &list, int start, F &&f) {
    int entry = start, tile = list.count > 0 ? list[entry] : 0;
    for (int i = 0; i < list.count; ++i) {
        const int after = entry + 1 < list.count ? entry + 1 : 0, ahead = list[after];  // loads take long
        f(g.tile_coord(tile), entry);
        entry = after, tile = ahead;
    }
}

__device__ __forceinline__ int tiles_of(const TileBox &box) {
    return box.tiles();
}
__device__ __forceinline__ int tiles_of(const TileList &list) {
    return list.count;
}

// Calls f(QueryStep) for every query block that attends a key block, in the order in which the CTA takes them.
template <class Tiles, class F>
__device__ __forceinline__ void for_each_query_block(const BackwardParams &p, const KeyItem<Tiles> &key, F &&f) {
    const TileGrid &g = p.geometry;
    const int per_tile = g.slot / kQueryBlock, tiles = tiles_of(key.queries);
    const int64_t of_head = key.bh * (g.all_tiles() * per_tile);
    // Key blocks that run at the same time start at different query tiles, so that they do not all add to the same rows
    // of dQ. With turns they start where the turns do.
    const int start = p.turns == nullptr && tiles > 0 ? int(key.index % tiles) : 0;
    for_each_query_tile(g, key.queries, start, [&](const Int3 &tile, int entry) {
        const int blocks = blocks_of(g, tile, kQueryBlock);
        const int64_t first = of_head + g.tile_index(tile) * per_tile;
        for (int b = 0; b < blocks; ++b) {
            f(QueryStep{first + b, false, tile, entry});
        }
    });
    for (int i = 0; i < key.text.blocks(kQueryBlock); ++i) {
        f(QueryStep{of_head + g.text_block(i, key.text, kQueryBlock), true, {}, 0});
    }
}

// The turn of a key block at a query block's dQ: it adds once the counter has reached `from`, then sets it to `to`.
struct Turn {
    int from, to;
};

// A query block's key blocks are numbered from 1, `blocks_per_tile` to a tile: tiles in the order of p.key_axis within
// its box of keys, or in the order of its list, which ascends; text comes after them. `to` is the number of this key
// block, `from` that of the one before it that holds a token. KeyItem has them in the same order.
template <class Tiles>
__device__ Turn turn_of(const BackwardParams &p, const KeyItem<Tiles> &key, const QueryStep &query) {
    const TileGrid &g = p.geometry;
    int place;    // of the key tile
    Int3 before;  // the tile before it, if any
    if constexpr (kIsList<Tiles>) {
        const int n = g.tiles.volume();
        const TileList keys = query.is_text ? everything<Tiles>(g)
                                            : p.keys.list(p.keys.set(key.batch, key.head), n, g.tile_index(query.tile));
        place = key.is_text()   ? keys.count
                : query.is_text ? g.tile_index(key.tile)
                                : p.places[key.queries.entries - p.queries.tiles + query.entry];
        before = g.tile_coord(place > 0 ? keys[place - 1] : 0);
    } else {
        const TileBox box = query.is_text ? g.everything() : g.keys_of(query.tile, p.window(key.head), p.border);
        const Int3 size{box.t.size(), box.h.size(), box.w.size()};
        const Int3 at{key.tile.t - box.t.lo, key.tile.h - box.h.lo, key.tile.w - box.w.lo};
        place = key.is_text() ? size.volume() : index_of(at, p.key_axis, size);
        const int sizes[3] = {size[p.key_axis[0]], size[p.key_axis[1]], size[p.key_axis[2]]};
        const Int3 in_box = coordinates(place > 0 ? place - 1 : 0, p.key_axis, sizes);
        before = {box.t.lo + in_box.t, box.h.lo + in_box.h, box.w.lo + in_box.w};
    }
    const int block = key.is_text() ? key.text_number : key.first_row / kBlock;
    const int to = place * g.blocks_per_tile() + block + 1;
    if (block > 0 || place == 0) {
        return {to - 1, to};
    }
    return {(place - 1) * g.blocks_per_tile() + blocks_of(g, before, kBlock), to};
}

}  // namespace fps
