// What the parts of SM90's prefill kernel share: the tensors that the copy engine reads, the block and its shared memory, what
// its warps say to each other.
#pragma once

#include "hopper.cuh"
#include "prefill_gather.cuh"
#include "tensor_map.h"

namespace mla::prefill_hopper {

using namespace prefill_step;
using namespace hopper;

// Tensors, and boxes of 128 rows of 128 bytes of each.
struct Maps {
    bool queries;             // whether the engine can copy them: bf16, whole vectors, nothing to change
    bool outputs;             // whether outputs are bf16 and can be written four at once
    bool weights;             // whether the engine can copy them from where they are; otherwise from plan.weights
    CUtensorMap query_nope;   // [T, H, Dn]
    CUtensorMap query_rope;   // [T, H, Dr]
    CUtensorMap latents;      // [chunk keys, R]
    CUtensorMap key_weights;  // [H x R, Dn], boxes of 64 rows
    CUtensorMap value_weights;  // [H x Dv, R]
    CUtensorMap expanded;     // [places, chunk keys, Dn + Dv]
    CUtensorMap expanded_rows;  // the same, boxes of eight rows
    CUtensorMap ropes;        // [chunk keys, Dr]
};

constexpr int warp_rows = 16;  // of a block's, those that a warp multiplies

enum : int { turn = 1, stage = 3 };  // named barriers: `turn` of each warpgroup, which may order products then

// What multiplies; the block has a warpgroup more, whose warps feed, find and tell.
struct HopperShape {
    static constexpr int rows = 128, warps = 8, threads = 256;
    static constexpr int nope = 128, rope = 64, width = 128;
    __device__ static void sync() { named_sync(stage, threads); }
};
constexpr int block_threads = HopperShape::threads + 128;  // registers change hands among warpgroups
constexpr int launch_registers = 168, multiply_registers = 232, feed_registers = 40;
static_assert(2 * multiply_registers + feed_registers <= 3 * launch_registers, "registers that nobody gives up are waited for for ever");

constexpr int piece_bytes = 128 * 128;  // 128 rows of 64 values
constexpr int keys_of_tile = 128;
constexpr int key_pieces = 3, value_pieces = 2;
constexpr int rank = 512, latent_pieces = rank / 64;
constexpr int weight_pieces = 2 * latent_pieces;  // of a head: those of W_UK, then those of W_UV, of piece_bytes
constexpr int most_job_heads = 5;  // that are expanded from one tile of latents

// Places in shared memory: of keys and values, of weights, of work.
constexpr int tile_ring = 2, weight_ring = 5, work_ring = 4;

// What a block does next. `attention`: `unit`. `expansion`: key and value of `heads` heads from `head` on, for `keys` keys from
// `key` on. Whoever works on it reads it here again and again: what a warp that multiplies would keep besides its sums, the
// compiler spills, and from there it comes in 500 cycles.
enum class Kind : int32_t { none, attention, expansion };
struct Work {
    Kind kind;
    int32_t counter;  // which of plan.counter says that it is done
    int32_t head, heads;
    int32_t place;    // of the (first) head in `expanded`
    int32_t key, keys;
    uint32_t number;  // how many of its kind the block has had before
    uint32_t first;   // places of their ring that the block has used before: key tiles, or pieces of weights
    Unit unit;
};

// Where things lie in shared memory, in bytes.
namespace place {
constexpr int keys = 0;  // [tile_ring]
constexpr int values = keys + tile_ring * key_pieces * piece_bytes;  // [tile_ring]
constexpr int queries = values + tile_ring * value_pieces * piece_bytes;
constexpr int latents = 0;  // of the expansion, instead of these
constexpr int weights = latents + latent_pieces * piece_bytes;  // [weight_ring]
constexpr int staged = weights + weight_ring * piece_bytes;  // [warps][2] 64 columns of eight rows
constexpr int staged_bytes = warp_rows * 128;
constexpr int work = staged + HopperShape::warps * staged_bytes;  // [work_ring]
constexpr int work_bytes = 96;
constexpr int masks = work + work_ring * work_bytes;  // [tile_ring] of Masks
constexpr int work_number = masks + tile_ring * 16;  // [warps] of the block's work, the next of each warp
constexpr int found = work_number + block_threads / warp_size * 4;
constexpr int barriers = found + 24;
constexpr int keys_full = barriers, keys_used = keys_full + 8 * tile_ring;
constexpr int values_full = keys_used + 8 * tile_ring, values_used = values_full + 8 * tile_ring;
constexpr int work_full = values_used + 8 * tile_ring, work_used = work_full + 8 * work_ring;
constexpr int work_done = work_used + 8 * work_ring, work_wanted = work_done + 8 * work_ring;
constexpr int queries_full = work_wanted + 8, queries_used = queries_full + 8;
constexpr int latents_full = queries_used + 8, latents_used = latents_full + 8 * latent_pieces;
constexpr int weights_full = latents_used + 8 * latent_pieces, weights_used = weights_full + 8 * weight_ring;
constexpr int total = weights_used + 8 * weight_ring;
}  // namespace place
static_assert(place::queries + key_pieces * piece_bytes <= place::staged && sizeof(Work) <= place::work_bytes && place::barriers % 8 == 0);

// What a block has found so far: units of attention and their key tiles, expansions and their pieces of weights.
struct Found {
    uint32_t units, tiles, expansions, weights;
    uint32_t wanted;  // work that was asked for
};
static_assert(sizeof(Found) <= place::barriers - place::found);

// Which keys of a tile exist.
struct alignas(16) Masks {
    uint64_t low, high;
};

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)

__device__ inline void init_barriers(uint8_t* memory) {
    auto init = [&](int full, int used, int count) {
        for (int i = 0; i < count; ++i) {
            barrier_init(shared_address(memory + full) + 8 * i, 1);
            barrier_init(shared_address(memory + used) + 8 * i, HopperShape::warps);
        }
    };
    init(place::keys_full, place::keys_used, tile_ring);
    init(place::values_full, place::values_used, tile_ring);
    init(place::work_full, place::work_done, work_ring);
    for (int i = 0; i < work_ring; ++i) barrier_init(shared_address(memory + place::work_used) + 8 * i, HopperShape::warps + 1);
    barrier_init(shared_address(memory + place::work_wanted), 1);
    init(place::queries_full, place::queries_used, 1);
    init(place::latents_full, place::latents_used, latent_pieces);
    init(place::weights_full, place::weights_used, weight_ring);
    fence_barrier_init();
    for (int i = place::work_number; i < place::barriers; i += 4) *reinterpret_cast<uint32_t*>(memory + i) = 0;
}

// The barrier of what is numbered n in a ring, and waits for it: until it is there or was used, and until what it replaces was used.
template <int places>
__device__ inline uint32_t ring_barrier(uint8_t* memory, int barriers, uint32_t n) {
    return shared_address(memory + barriers) + 8 * (n % places);
}
template <int places>
__device__ inline void wait_ring(uint8_t* memory, int barriers, uint32_t n) {
    barrier_wait(ring_barrier<places>(memory, barriers, n), n / places & 1);
}
template <int places>
__device__ inline void wait_replaceable(uint8_t* memory, int barriers, uint32_t n) {
    if (n >= places) barrier_wait(ring_barrier<places>(memory, barriers, n), (n / places - 1) & 1);
}

__device__ inline Work& work_at(uint8_t* memory, uint32_t n) {
    return *reinterpret_cast<Work*>(memory + place::work + n % work_ring * place::work_bytes);
}

// What all blocks do between two barriers of the grid: expansion of, and attention for, these heads and key tiles.
struct Stage {
    int32_t chunk_start, chunk_end;
    int32_t head0, heads;
};

// Which work is this warp's next.
__device__ inline uint32_t volatile& work_number(uint8_t* memory) {
    return reinterpret_cast<uint32_t volatile*>(memory + place::work_number)[threadIdx.x / warp_size];
}
// By the warps that multiply: this one has done its part as far as other blocks wait for it.
__device__ inline void part_done(uint8_t* memory) {
    __syncwarp();
    if (threadIdx.x % warp_size == 0) barrier_arrive(ring_barrier<work_ring>(memory, place::work_done, work_number(memory)));
}

// The same for all lanes, which the compiler then knows.
template <typename T>
__device__ inline T uniform(T value) {
    return __shfl_sync(0xffffffffu, value, 0);
}

// Lanes 2 i and 2 i + 1 have two neighbouring values each of two groups of eight columns: they exchange, so that each has four of
// one group, from column `first_of_four` on.
__device__ inline uint2 four_of_pairs(uint32_t left, uint32_t right, int lane) {
    bool const odd = lane % 2 != 0;
    uint32_t const other = __shfl_xor_sync(0xffffffffu, odd ? left : right, 1);
    return odd ? make_uint2(other, right) : make_uint2(left, other);
}
__device__ inline int first_of_four(int lane) { return lane % 2 * 8 + lane % 4 / 2 * 4; }

__device__ inline int32_t tile_count(const Unit& unit) { return ceil_div(unit.key_end - unit.key_start, 2); }

#endif

}  // namespace mla::prefill_hopper
