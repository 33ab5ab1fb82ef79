// What attend_hopper_bf16.cu's blocks have in shared memory, and how their keys come there: rows as they lie by the copy engine,
// listed rows gathered, and codes (fp8, fp8_ds_mla) decoded.
#pragma once

#include <type_traits>

#include "attend_hopper.cuh"

namespace mla {
namespace hopper_bf16 {

using namespace hopper;

constexpr int block_threads = 3 * group;  // of which one group makes the scores and two the output
constexpr int fed_threads = 4 * group;  // of a block with a group more that gathers or decodes keys
constexpr int tile = attend_tile;
constexpr int value_pieces = rank / 64, pieces = value_pieces + 1;
constexpr int piece_bytes = tile * 128;
constexpr int tile_bytes = pieces * piece_bytes;

// Where things lie in shared memory, in bytes.
namespace place {
constexpr int tiles = tile_bytes;  // [2], behind the queries
constexpr int weights = tiles + value_pieces * piece_bytes;  // [64][64], bf16, of a tile: where its rope was
constexpr int rescale = tiles + 2 * tile_bytes;  // [2][64]
constexpr int changed = rescale + 2 * 64 * 4;  // [2][4], of the score group's warps
constexpr int factors = changed + 2 * 4 * 4;  // [64]
constexpr int limits = factors + 64 * 4;  // [64]
constexpr int offsets = limits + 64 * 4;  // [2][64], of listed bf16 rows
constexpr int scales = offsets;  // [2][64], of fp8 rows
constexpr int there = offsets + 2 * tile * 4;  // [2], a bit for each key of a tile
constexpr int lookups = there + 2 * 2 * 4;  // [2][group], of the decoding group's threads: a list's entry and a page on their way
constexpr int full = lookups + 2 * group * 4;  // [2][2 sides] barriers: that side of a tile is there
constexpr int used = full + 4 * 8;  // [2][2 sides]: the output has it
constexpr int ready = used + 4 * 8;  // [2]: the weights are there
constexpr int queries_full = ready + 2 * 8;  // barrier: the queries are there
constexpr int total = queries_full + 8;
}  // namespace place

enum : int { keys_read = 1, limits_there = 2, rows_found = 3 };  // named barriers

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)

// A tile has two sides, each brought and used by one of the output groups: half of the values, and on the second side the rope besides.
__device__ constexpr int first_piece(int side) { return side * (value_pieces / 2); }
__device__ constexpr int side_pieces(int side) { return side == 0 ? value_pieces / 2 : pieces - value_pieces / 2; }

// The block's tiles.
struct Span {
    int32_t first, count;
    int32_t last_keys;  // of the last tile

    __device__ int keys(int32_t n) const { return n + 1 < count ? tile : last_keys; }
    __device__ int32_t end() const { return (first + count - 1) * tile + last_keys; }
};

__device__ uint32_t barrier_of(const uint8_t* memory, int barriers, int32_t n, int side) {
    return shared_address(memory + barriers) + 16 * (n & 1) + 8 * side;
}

// Until what was at the place of tile n's side has been used. The second side has the weights besides, which both groups use.
__device__ void wait_for_place(const uint8_t* memory, int32_t n, int side) {
    if (n < 2) return;
    if (side == 1) barrier_wait(barrier_of(memory, place::used, n, 0), n / 2 - 1 & 1);
    barrier_wait(barrier_of(memory, place::used, n, side), n / 2 - 1 & 1);
}

// All keys up to the last one that a row sees: a side of tile n, whose page was asked for a tile's time before. By the first warp of
// the side's output group.
template <int side>
struct TileBringer {
    int page_shift;
    int32_t page;
    bool first_warp;

    __device__ void begin(const Attend& work, const Item& item, const Span& span, int thread) {
        page_shift = __ffs(work.layout.page_size) - 1;
        first_warp = thread < warp_size;
        ask(work, item, span, 0);
    }
    // What can be done before the place is free.
    __device__ void prepare(const Attend& work, const Item&, const Span& span, uint8_t* memory, int32_t n, int thread) {
        bool const there = page >= 0 && page < work.step.pages;
        page = there ? page : static_cast<int32_t>(work.step.pages);  // outside of the map: zeros
        if (side == 0 && thread == 0 && n < span.count) {
            int const keys = there ? span.keys(n) : 0;
            reinterpret_cast<uint64_t*>(memory + place::there)[n & 1] = keys == 64 ? ~uint64_t{0} : (uint64_t{1} << keys) - 1;
        }
    }
    __device__ void bring(const Attend& work, const Item& item, const Span& span, const CUtensorMap* map, uint8_t* memory,
                          int32_t n, int) {
        if (!first_warp || n >= span.count) return;
        wait_for_place(memory, n, side);
        uint32_t const barrier = barrier_of(memory, place::full, n, side);
        uint32_t const target = shared_address(memory + place::tiles) + (n & 1) * tile_bytes;
        int const row = (span.first + n) * tile & (work.layout.page_size - 1);
        if (elect_lane()) {
            barrier_expect(barrier, side_pieces(side) * piece_bytes);
#pragma unroll
            for (int i = first_piece(side); i < first_piece(side) + side_pieces(side); ++i) {
                copy_box(target + i * piece_bytes, map, barrier, 0, row, i, page);
            }
        }
        ask(work, item, span, n + 1);
    }

private:
    __device__ void ask(const Attend& work, const Item& item, const Span& span, int32_t n) {
        if (!first_warp || n >= span.count) return;
        page = work.step.block_table[item.sequence * work.step.max_pages + ((span.first + n) * tile >> page_shift)];
    }
};

// Where the rows of the keys lie that a thread has, every `step`-th of the block's: what `next` needs was asked for one and two
// steps before.
template <bool lists, int step, bool page_scales = false>
struct RowOffsets {
    int32_t at;  // of the key to ask for
    int32_t last;  // the last key that there is
    int32_t key, later_key, page;
    int page_shift;

    __device__ void begin(const Attend& work, const Item& item, const Span& span, int line) {
        page_shift = __ffs(work.layout.page_size) - 1;
        at = span.first * tile + line;
        last = lists ? last_key(work, item.first_token) : span.end() - 1;
        key = ask(work, item, span);
        later_key = ask(work, item, span);
        page = page_of(work, item, key);
    }
    float scale;  // of the row that `next` gave

    // In 16 bytes from the pool's beginning; no_row where there is none.
    __device__ uint32_t next(const Attend& work, const Item& item, const Span& span) {
        bool const there = page >= 0 && page < work.step.pages;
        int64_t const of_page = static_cast<int64_t>(page) * work.layout.page_bytes;
        int32_t const slot = key & (work.layout.page_size - 1);
        if (page_scales) {
            scale = there ? reinterpret_cast<const float*>(work.pool + of_page + work.layout.scales_offset)[slot] : 0.0f;
        }
        key = later_key;
        page = page_of(work, item, key);
        later_key = ask(work, item, span);
        return there ? static_cast<uint32_t>((of_page + slot * work.layout.row_bytes) / 16) : no_row;
    }

private:
    __device__ int32_t ask(const Attend& work, const Item& item, const Span& span) {
        int32_t const index = at;
        at += step;
        if (!lists) return index;
        return index < span.end() ? work.indices[item.first_token * work.top_k + index] : -1;
    }
    __device__ int32_t page_of(const Attend& work, const Item& item, int32_t of_key) const {
        if (of_key < 0 || of_key > last) return -1;
        return work.step.block_table[item.sequence * work.step.max_pages + (of_key >> page_shift)];
    }
};

// The same of listed keys for the decoding group, one of every half tile, whose entries and pages come through shared memory: loads to
// registers would be waited for together with those of the rows' codes. Faster where a row is found without more: its scales lie in it.
struct StagedRows {
    static constexpr int step = tile / 2;
    int32_t at;  // of the key to ask for
    int32_t key, last;
    int page_shift;
    int32_t volatile *entry, *page;  // of this thread

    __device__ void begin(const Attend& work, const Item& item, const Span& span, uint8_t* memory, int line) {
        page_shift = __ffs(work.layout.page_size) - 1;
        at = span.first * tile + line;
        last = last_key(work, item.first_token);
        entry = reinterpret_cast<int32_t volatile*>(memory + place::lookups) + threadIdx.x % group;
        page = entry + group;
        ask(entry, at < span.end() ? work.indices + item.first_token * work.top_k + at : nullptr);
        copy_async_commit();
        copy_async_wait<0>();
        advance(work, item, span);
    }

    __device__ uint32_t next(const Attend& work, const Item& item, const Span& span) {
        copy_async_wait<0>();
        int32_t const of_page = *page, slot = key & (work.layout.page_size - 1);
        advance(work, item, span);
        bool const there = of_page >= 0 && of_page < work.step.pages;
        return there ? static_cast<uint32_t>((of_page * work.layout.page_bytes + slot * work.layout.row_bytes) / 16) : no_row;
    }

private:
    // To the next key; its page is asked for, and the key behind it.
    __device__ void advance(const Attend& work, const Item& item, const Span& span) {
        key = *entry;
        at += step;
        ask(page, key < 0 || key > last ? nullptr : work.step.block_table + item.sequence * work.step.max_pages + (key >> page_shift));
        ask(entry, at < span.end() ? work.indices + item.first_token * work.top_k + at : nullptr);
        copy_async_commit();
    }
    __device__ static void ask(int32_t volatile* place, const int32_t* source) {
        if (source != nullptr) {
            copy_async_4(shared_address(const_cast<int32_t*>(place)), source);
        } else {
            *place = -1;
        }
    }
};

// Listed keys, by a group of its own: 72 KB of a tile in 36 copies a thread, which took the output groups a quarter of their time.
// Of the rows' finding each of the first 64 threads has one key of every tile.
struct TileGatherer {
    static constexpr int step = group / 8;  // rows that all threads copy at once, a unit of each piece

    const Attend& work;
    const Item& item;
    const Span& span;
    int thread;
    uint32_t found[tile / step];  // offsets of the thread's rows
    uint32_t present;  // a bit for each of the warp's 32 keys, in two warps

    // All tiles one after the other.
    __device__ void run(uint8_t* memory) {
        thread = threadIdx.x % group;
        RowOffsets<true, tile> rows;
        if (thread < tile) rows.begin(work, item, span, thread);
#pragma unroll 1
        for (int32_t n = 0; n < span.count; ++n) {
            auto* offsets = reinterpret_cast<uint32_t*>(memory + place::offsets) + (n & 1) * tile;
            if (thread < tile) {
                uint32_t const offset = rows.next(work, item, span);
                offsets[thread] = offset;
                present = __ballot_sync(0xffffffffu, offset != no_row);
            }
            named_sync(rows_found, group);
#pragma unroll
            for (int k = 0; k < tile / step; ++k) found[k] = offsets[thread / 8 + step * k];
            bring<0>(memory, n);
            bring<1>(memory, n);
        }
    }

private:
    template <int side>
    __device__ void bring(uint8_t* memory, int32_t n) const {
        wait_for_place(memory, n, side);
        bool const tells = thread < tile && thread % warp_size == 0;
        if (side == 0 && tells) reinterpret_cast<uint32_t*>(memory + place::there)[(n & 1) * 2 + thread / warp_size] = present;
        int const unit = thread % 8, first_row = thread / 8;
        uint32_t const target = shared_address(memory + place::tiles) + (n & 1) * tile_bytes + first_piece(side) * piece_bytes +
                                first_row * 128 + ((unit ^ (first_row & 7)) << 4);
#pragma unroll
        for (int k = 0; k < tile / step; ++k) {
            bool const there = found[k] != no_row;
            const uint8_t* source = work.pool + (there ? static_cast<uint64_t>(found[k]) * 16 : 0) + first_piece(side) * 128 + unit * 16;
#pragma unroll
            for (int i = 0; i < side_pieces(side); ++i) copy_async_16(target + k * (step * 128) + i * piece_bytes, source + i * 128, there);
        }
        barrier_arrive_after_copies(barrier_of(memory, place::full, n, side));
        if (tells) barrier_arrive(barrier_of(memory, place::full, n, side));
    }
};

__device__ const uint4 missing_row[(rank + rank / scale_group * 4 + rope * 2) / 16] = {};

// Codes of the latent as bf16 values, of whole sequences or of lists, by a group of its own. A scale of a whole row (fp8) is given to
// the scores' group, and what the codes become is exact; else they are rounded with their scales, which are two bf16 numbers each. These
// have the 2^120 of `decode_pair` in them, unless one of the scales is too large for that.
// Rows are fetched half a tile at a time, eight by a warp, each part while that of the rows before is decoded. Four lanes have a row:
// 16 of its columns of each piece, and two units of its rope.
template <bool lists, int format>
struct TileDecoder {
    static constexpr int half = tile / 2, rows = half / 4;
    static constexpr bool page_scales = format == row_format::fp8;
    static constexpr int rope_offset = rank + (page_scales ? 0 : rank / scale_group * 4), row_bytes = rope_offset + 2 * rope;

    const Attend& work;
    const Item& item;
    const Span& span;
    int quarter;
    static constexpr bool staged = lists && !page_scales;
    std::conditional_t<staged, StagedRows, RowOffsets<lists, half, page_scales>> offsets;
    const uint8_t* row;  // to be fetched
    bool present;
    uint4 codes[value_pieces], rope_units[2];
    uint4 scales;  // f32

    // Two scales in a unit as pairs of bf16 numbers whose sums they are, to 2^-16; and one of them, twice.
    struct Scales {
        uint32_t high, low;
        __device__ Scales(uint32_t first, uint32_t second, float unit) {
            float2 const both = make_float2(__uint_as_float(first) * unit, __uint_as_float(second) * unit);
            __nv_bfloat162 const rounded = __float22bfloat162_rn(both);
            float2 const back = __bfloat1622float2(rounded);
            __nv_bfloat162 const rest = __floats2bfloat162_rn(both.x - back.x, both.y - back.y);
            high = reinterpret_cast<const uint32_t&>(rounded);
            low = reinterpret_cast<const uint32_t&>(rest);
        }
    };
    struct Factor {
        uint32_t high, low;
    };

    // All tiles one after the other.
    __device__ void run(uint8_t* memory) {
        int const warp = threadIdx.x % group / warp_size, lane = threadIdx.x % warp_size, own_row = lane / 4;
        quarter = lane % 4;
        if constexpr (staged) {
            offsets.begin(work, item, span, memory, warp * rows + own_row);
        } else {
            offsets.begin(work, item, span, warp * rows + own_row);
        }
        find_row();
        scales = ask_scales();
#pragma unroll
        for (int i = 0; i < value_pieces; ++i) fetch(i);
        bool fetched = present;
        find_row();
#pragma unroll 1
        for (int32_t m = 0; m < 2 * span.count; ++m) {
            int32_t const n = m / 2;
            if (m % 2 == 0) wait_for_place(memory, n, 1);
            int const line = m % 2 * half + warp * rows + own_row;
            if (page_scales && quarter == 0) {
                reinterpret_cast<float*>(memory + place::scales)[(n & 1) * tile + line] = __uint_as_float(scales.x);
            }
            uint32_t const bits = rows_of(__ballot_sync(0xffffffffu, fetched));
            if (lane == 0) memory[place::there + (n & 1) * 8 + m % 2 * 4 + warp] = static_cast<uint8_t>(bits);
            fetched = present;
            uint32_t const target = shared_address(memory) + place::tiles + (n & 1) * tile_bytes + line * 128;
            if (!page_scales && __any_sync(0xffffffffu, most(most(scales.x, scales.y), most(scales.z, scales.w)) >= large_scale)) {
                decode_half<true>(target, own_row);
            } else {
                decode_half<false>(target, own_row);
            }
            find_row();
            // without a fence, which would wait for the next rows: those who use the tile have one
            if (m % 2 == 1) barrier_arrive(barrier_of(memory, place::full, n, 0));
        }
    }

private:
    static constexpr uint32_t large_scale = 0x43000000;  // 2^7 as bits
    __device__ static uint32_t most(uint32_t a, uint32_t b) { return a > b ? a : b; }

    // The lane's codes to their places, while those of the row after are fetched.
    template <bool large>
    __device__ void decode_half(uint32_t target, int own_row) {
        constexpr float unit_of_codes = large || page_scales ? 1.0f : 0x1p120f;
        Scales const pairs[2] = {{scales.x, scales.y, unit_of_codes}, {scales.z, scales.w, unit_of_codes}};
        scales = ask_scales();
        uint32_t const unit = (2 * quarter ^ own_row) * 16;
#pragma unroll
        for (int i = 0; i < value_pieces; ++i) {
            uint32_t const which = i % 4 < 2 ? 0x1010 : 0x3232;
            Factor const factor{__byte_perm(pairs[i / 4].high, 0, which), __byte_perm(pairs[i / 4].low, 0, which)};
            store_in_order(target + i * piece_bytes + unit, decode<large>(codes[i].x, codes[i].y, factor));
            store_in_order(target + i * piece_bytes + (unit ^ 16), decode<large>(codes[i].z, codes[i].w, factor));
            if (i % 4 == 0) {
                store_in_order(target + value_pieces * piece_bytes + ((quarter + i) * 16 ^ own_row * 16), rope_units[i / 4]);
            }
            fetch(i);
        }
    }

    __device__ void find_row() {
        uint32_t const offset = offsets.next(work, item, span);
        present = offset != no_row;
        row = (present ? work.pool + static_cast<uint64_t>(offset) * 16 : reinterpret_cast<const uint8_t*>(missing_row)) + quarter * 16;
        // to L2 before they are asked for: what is on its way to registers is too little to cover the latency of DRAM
        prefetch(row + quarter * 112);
        if (quarter * 128 + 512 < row_bytes) prefetch(row + quarter * 112 + 512);
        if (quarter == 3) prefetch(row - quarter * 16 + row_bytes - 1);
    }

    // Of 32 lanes' bits those of the eight rows.
    __device__ static uint32_t rows_of(uint32_t bits) {
        bits &= 0x11111111u;
        bits = (bits | bits >> 3) & 0x03030303u;
        bits = (bits | bits >> 6) & 0x000f000fu;
        return (bits | bits >> 12) & 0xffu;
    }

    // The row's only scale, or its four.
    __device__ uint4 ask_scales() const {
        if constexpr (page_scales) {
            return make_uint4(__float_as_uint(offsets.scale), 0, 0, 0);
        } else {
            return load_in_order(row - quarter * 16 + rank);
        }
    }
    // Asks for what the lane has of piece i, and with every fourth one for a unit of the rope.
    __device__ void fetch(int i) {
        codes[i] = load_in_order(row + i * 64);
        if (i % 4 == 0) rope_units[i / 4] = load_in_order(row + rope_offset + i * 16);
    }

    // Eight codes.
    template <bool large>
    __device__ static uint4 decode(uint32_t low, uint32_t high, Factor factor) {
        auto value = [&](uint32_t pair) {
            if (large || page_scales) pair = decode_pair(pair);
            if (page_scales) return pair;
            const auto &codes = reinterpret_cast<const __nv_bfloat162&>(pair), &low = reinterpret_cast<const __nv_bfloat162&>(factor.low);
            __nv_bfloat162 const values = __hfma2(codes, reinterpret_cast<const __nv_bfloat162&>(factor.high), __hmul2(codes, low));
            return reinterpret_cast<const uint32_t&>(values);
        };
        return make_uint4(value(code_pair<codes_01>(low)), value(code_pair<codes_23>(low)), value(code_pair<codes_01>(high)),
                          value(code_pair<codes_23>(high)));
    }
};

#endif

}  // namespace hopper_bf16
}  // namespace mla
