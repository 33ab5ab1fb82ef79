// A block of attend_hopper_bf16.cu and its tiles, and what lies in its shared memory where a group of its own brings the keys.
#pragma once

#include "attend_hopper.cuh"

namespace mla {
namespace hopper_bf16 {

using namespace hopper;

constexpr int block_threads = 3 * group;  // of which one group makes the scores and two the output
constexpr int fed_threads = 4 * group;  // of a block with a group more that gathers or decodes keys
constexpr int tile = attend_tile;
constexpr int value_pieces = rank / 64, side_values = value_pieces / 2, pieces = value_pieces + 1;
constexpr int piece_bytes = tile * 128;
constexpr int tile_bytes = pieces * piece_bytes;
constexpr int own_staged_row = rank + 8;  // values: eight lanes' pairs of four rows are in banks of their own

// Where things lie in the shared memory of a block whose keys a group of its own brings, in bytes.
struct FedPlaces {
    static constexpr int tiles = tile_bytes;  // [2], behind the queries
    static constexpr int weights = tiles + value_pieces * piece_bytes;  // [64][64], bf16, of a tile: where its rope was
    static constexpr int rescale = tiles + 2 * tile_bytes;  // [2][64]
    static constexpr int changed = rescale + 2 * 64 * 4;  // [2][4], of the score group's warps
    static constexpr int factors = changed + 2 * 4 * 4;  // [64]
    static constexpr int limits = factors + 64 * 4;  // [64]
    static constexpr int offsets = limits + 64 * 4;  // [2][64], of listed bf16 rows
    static constexpr int scales = offsets, scale_tiles = 4;  // [4][64], of fp8 rows, of which listed ones are a tile ahead
    static constexpr int there = offsets + scale_tiles * tile * 4;  // [2], a bit for each key of a tile
    static constexpr int lookups = there + 2 * 2 * 4;  // [2][group], of the decoding group's threads: a list's entry and a page on their way
    static constexpr int full = lookups + 2 * group * 4;  // [2][2 sides] barriers: that side of a tile is there
    static constexpr int used = full + 4 * 8;  // [2][2 sides]: the output has it
    static constexpr int ready = used + 4 * 8;  // [2]: the weights are there
    static constexpr int queries_full = ready + 2 * 8;  // barrier: the queries are there
    static constexpr int total = queries_full + 8;

    // Where a piece of the queries comes to.
    static __device__ int query_piece(int i) { return i * piece_bytes; }
    // Where a key's scale of tile n lies.
    static __device__ int scale_of(int32_t n, int key) { return scales + ((n & (scale_tiles - 1)) * tile + key) * 4; }
    // Where the weights of tile n lie, and its values of a side; and where the output tells that it has them.
    static __device__ int weights_of(int32_t n) { return weights + (n & 1) * tile_bytes; }
    static __device__ int values_of(int side, int32_t n, int) { return tiles + (n & 1) * tile_bytes + side * side_values * piece_bytes; }
    static __device__ int used_of(int side, int32_t n, int) { return used + 16 * (n & 1) + 8 * side; }
};

// Arrivals that say that a side of a tile is there. Of codes each thread of the decoding group says so of its copies, and two lanes of each of
// its warps of what these have stored.
constexpr int gather_arrivals = group + 2, code_arrivals = group + 2 * group / warp_size;

enum : int { keys_read = 1, limits_there = 2, rows_found = 3, second_side_first = 4 };  // named barriers; of the last one two

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)

// A tile has two sides, each brought and used by one of the output groups: half of the values, and on the second side the rope besides.
__device__ constexpr int first_piece(int side) { return side * side_values; }
__device__ constexpr int side_pieces(int side) { return side == 0 ? side_values : pieces - side_values; }

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
    if (side == 1) barrier_wait(barrier_of(memory, FedPlaces::used, n, 0), n / 2 - 1 & 1);
    barrier_wait(barrier_of(memory, FedPlaces::used, n, side), n / 2 - 1 & 1);
}

#endif

}  // namespace hopper_bf16
}  // namespace mla
