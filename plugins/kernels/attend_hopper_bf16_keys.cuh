// What attend_hopper_bf16.cu's blocks have in shared memory, and how keys that are not listed come there as they are: by the copy engine.
#pragma once

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
constexpr int own_staged_row = rank + 8;  // values: eight lanes' pairs of four rows are in banks of their own

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

#endif

}  // namespace hopper_bf16
}  // namespace mla
