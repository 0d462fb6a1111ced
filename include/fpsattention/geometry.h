// The geometry: which row holds which token, and which tiles attend which. Host and device, forward and backward, tests
// and FLOP counts all call these functions. The rule of rows and windows stands here alone.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define FPS_HD __host__ __device__ __forceinline__
#else
#define FPS_HD inline
#endif

namespace fps {

constexpr int kBlock = 128;           // keys of a pipeline stage; a slot is a multiple of it
constexpr int kQueryBlock = 64;       // queries of a warpgroup
constexpr int kMaxBlocksPerItem = 3;  // query blocks of a work item, which a CTA computes at a time, at most
constexpr int kMaxSlot = 512;         // rows of a slot, at most
constexpr int kMaxWindows = 256;      // heads with a window each, at most

// One value per axis: 0 is t, 1 is h, 2 is w.
struct Int3 {
    int t, h, w;
    FPS_HD int volume() const { return t * h * w; }
    FPS_HD int operator[](int axis) const { return axis == 0 ? t : axis == 1 ? h : w; }
    FPS_HD Int3 operator/(Int3 o) const { return {t / o.t, h / o.h, w / o.w}; }
};
// Coordinates of element `index` of a box, in raster order.
FPS_HD Int3 coordinates(int index, Int3 size) {
    const int row = index / size.w;
    return {row / size.h, row % size.h, index % size.w};
}

// Half-open interval [lo, hi).
struct Range {
    int lo, hi;
    FPS_HD int size() const { return hi - lo; }
};

enum class Border : int {
    kClamp = 0,     // shift the window inward: every query tile sees equally many key tiles
    kTruncate = 1,  // cut the window at the grid's edge
};

FPS_HD int ceil_div(int a, int b) {
    return (a + b - 1) / b;
}
FPS_HD int clamped(int x, int low, int high) {
    return x < low ? low : x < high ? x : high;
}

// Query blocks of a work item, one to a warpgroup, in tile groups of this many. At head_dim 64 softmax outweighs the
// products: three warpgroups are a tenth faster than two, unless one of them is often idle.
FPS_HD int blocks_per_item(int head_dim, int blocks_of_group) {
    const int in_threes = ceil_div(blocks_of_group, 3) * 3, in_twos = ceil_div(blocks_of_group, 2) * 2;
    return head_dim == 64 && 10 * in_threes <= 11 * in_twos ? 3 : 2;
}

// Key tiles that query tile `i` sees on an axis of `n` tiles, under a window of `w` tiles: odd, or at least n (the
// whole axis).
FPS_HD Range axis_keys(int i, int n, int w, Border border) {
    if (w >= n) {
        return {0, n};
    }
    const int r = w / 2;
    if (border == Border::kClamp) {
        i = i < r ? r : (i > n - 1 - r ? n - 1 - r : i);
    }
    return {i - r < 0 ? 0 : i - r, i + r + 1 > n ? n : i + r + 1};
}

// The inverse: query tiles that see key tile `j`. They are an interval too, because the window's centre is monotone in
// i.
FPS_HD Range axis_queries(int j, int n, int w, Border border) {
    if (w >= n) {
        return {0, n};
    }
    const int r = w / 2;
    Range q{j - r < 0 ? 0 : j - r, j + r + 1 > n ? n : j + r + 1};
    if (border == Border::kClamp) {
        // Query tiles 0 .. r share the window centred at r; tiles n-1-r .. n-1 share the one centred at n-1-r.
        q.lo = q.lo <= r ? 0 : q.lo;
        q.hi = q.hi > n - 1 - r ? n : q.hi;
    }
    return q;
}

// A box of tiles: the key tiles that a query tile sees, or the query tiles that see a key tile. Kernels walk the box;
// no list of its tiles exists.
struct TileBox {
    Range t, h, w;
    FPS_HD int tiles() const { return t.size() * h.size() * w.size(); }
};

// Numbers of text tokens before the grid's tokens (the prefix) and after them (the suffix): all of them, or the valid
// ones of a sample, which come first in each section.
struct TextTokens {
    int prefix, suffix;
    // Blocks of `rows` rows that hold them.
    FPS_HD int blocks(int rows) const { return ceil_div(prefix, rows) + ceil_div(suffix, rows); }
};

// The valid rows of a slot: a box of tokens, in raster order.
struct TileRows {
    Int3 extent;  // tokens along each axis
    int first;    // token in the first row

    FPS_HD int valid() const { return extent.volume(); }
};

// The token grid, cut in tiles. Tiles are numbered in raster order. The last tile of an axis may be ragged. A tile owns
// a slot, `slot` consecutive rows: its tokens in raster order, then padding.
//
// Prefix and suffix are cut in *text tiles* of `slot` tokens. A text tile attends all tiles, and all tiles attend it.
// Text tiles are numbered after the grid's tiles, those of the prefix first.
struct TileGrid {
    Int3 grid;        // tokens
    Int3 tile;        // tokens of a full tile
    Int3 tiles;       // tiles per axis
    int slot;         // rows per tile, a multiple of kBlock
    TextTokens text;  // tokens

    TileGrid() = default;
    FPS_HD TileGrid(Int3 grid_, Int3 tile_, TextTokens text_ = {})
        : grid(grid_),
          tile(tile_),
          tiles{ceil_div(grid_.t, tile_.t), ceil_div(grid_.h, tile_.h), ceil_div(grid_.w, tile_.w)},
          slot(ceil_div(tile_.volume(), kBlock) * kBlock),
          text(text_) {}

    FPS_HD int tokens() const { return text.prefix + grid.volume() + text.suffix; }
    FPS_HD int all_tiles() const { return tiles.volume() + text.blocks(slot); }
    FPS_HD int blocks_per_tile() const { return slot / kBlock; }
    FPS_HD int blocks() const { return all_tiles() * blocks_per_tile(); }
    FPS_HD TileBox everything() const { return {{0, tiles.t}, {0, tiles.h}, {0, tiles.w}}; }

    FPS_HD int tile_index(Int3 c) const { return (c.t * tiles.h + c.h) * tiles.w + c.w; }
    FPS_HD Int3 tile_coord(int index) const { return coordinates(index, tiles); }

    // Number, among all blocks of `rows` rows, of the i-th text block that holds a valid token. The prefix comes first.
    FPS_HD int text_block(int i, TextTokens valid, int rows) const {
        const int in_suffix = i - ceil_div(valid.prefix, rows);
        const int first_tile = tiles.volume() + (in_suffix < 0 ? 0 : ceil_div(text.prefix, slot));
        return first_tile * (slot / rows) + (in_suffix < 0 ? i : in_suffix);
    }

    // Valid rows of a tile, in a sample with these valid text tokens.
    FPS_HD TileRows rows(int index, TextTokens valid) const {
        int text_tile = index - tiles.volume();
        if (text_tile < 0) {
            return rows(tile_coord(index));
        }
        const int prefix_tiles = ceil_div(text.prefix, slot);
        const bool in_suffix = text_tile >= prefix_tiles;
        text_tile -= in_suffix ? prefix_tiles : 0;
        const int left = (in_suffix ? valid.suffix : valid.prefix) - text_tile * slot;
        const int first = text_tile * slot + (in_suffix ? text.prefix + grid.volume() : 0);
        return {{1, 1, left < 0 ? 0 : left < slot ? left : slot}, first};
    }
    FPS_HD TileRows rows(Int3 c) const {
        const int first = (c.t * tile.t * grid.h + c.h * tile.h) * grid.w + c.w * tile.w;
        return {extent(c), text.prefix + first};
    }
    // Valid tokens of the prefix (i = 0), the grid (1) or the suffix (2).
    FPS_HD Range section(int i, TextTokens valid) const {
        const int suffix = text.prefix + grid.volume();
        return i == 0   ? Range{0, valid.prefix}
               : i == 1 ? Range{text.prefix, suffix}
                        : Range{suffix, suffix + valid.suffix};
    }
    FPS_HD bool is_valid(int token, TextTokens valid) const {
        const int in_suffix = token - text.prefix - grid.volume();
        return token < text.prefix ? token < valid.prefix : in_suffix < valid.suffix;
    }
    // Token of row r (0 <= r < rows.valid()).
    FPS_HD int token(const TileRows &rows, int r) const {
        const Int3 c = coordinates(r, rows.extent);
        return rows.first + (c.t * grid.h + c.h) * grid.w + c.w;
    }

    // Valid tokens of tile `c` along each axis.
    FPS_HD Int3 extent(Int3 c) const {
        const Int3 left{grid.t - c.t * tile.t, grid.h - c.h * tile.h, grid.w - c.w * tile.w};
        return {left.t < tile.t ? left.t : tile.t, left.h < tile.h ? left.h : tile.h,
                left.w < tile.w ? left.w : tile.w};
    }

    FPS_HD TileBox keys_of(Int3 query, Int3 window, Border border) const {
        return {axis_keys(query.t, tiles.t, window.t, border), axis_keys(query.h, tiles.h, window.h, border),
                axis_keys(query.w, tiles.w, window.w, border)};
    }

    FPS_HD TileBox queries_of(Int3 key, Int3 window, Border border) const {
        return {axis_queries(key.t, tiles.t, window.t, border), axis_queries(key.h, tiles.h, window.h, border),
                axis_queries(key.w, tiles.w, window.w, border)};
    }

    // Tiles per axis of a *tile group*: query tiles that see the same keys under each of these windows. They differ
    // only on axes where every window is the whole axis.
    FPS_HD Int3 tile_group(const Int3 *windows, int n_windows) const {
        Int3 size = tiles;
        for (int i = 0; i < n_windows; ++i) {
            const Int3 w = windows[i];
            size = {w.t == tiles.t ? size.t : 1, w.h == tiles.h ? size.h : 1, w.w == tiles.w ? size.w : 1};
        }
        return size;
    }

    // Blocks of `rows` rows that hold a valid token, over all tiles of the box. Only the last tile of an axis is
    // ragged, so there are at most eight kinds of tile: two per axis.
    FPS_HD int valid_blocks(TileBox box, int rows = kBlock) const {
        int count = 0;
#if defined(__CUDA_ARCH__)
#pragma unroll 1  // unrolled, the eight products become loop invariants of the caller, in eight registers
#endif
        for (int kind = 0; kind < 8; ++kind) {
            const Part t = part(box.t, tiles.t, grid.t, tile.t, kind & 4);
            const Part h = part(box.h, tiles.h, grid.h, tile.h, kind & 2);
            const Part w = part(box.w, tiles.w, grid.w, tile.w, kind & 1);
            count += t.tiles * h.tiles * w.tiles * ceil_div(t.extent * h.extent * w.extent, rows);
        }
        return count;
    }

private:
    struct Part {
        int tiles, extent;
    };
    // One axis of a box: the number and extent of its tiles that are the last of the axis, or of those that are not.
    FPS_HD static Part part(Range r, int axis_tiles, int axis_grid, int axis_tile, bool last) {
        const int has_last = r.hi == axis_tiles && r.lo < r.hi;
        return last ? Part{has_last, axis_grid - (axis_tiles - 1) * axis_tile} : Part{r.size() - has_last, axis_tile};
    }
};

}  // namespace fps
