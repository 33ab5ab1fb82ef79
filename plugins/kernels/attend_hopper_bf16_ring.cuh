// What lies in the shared memory of a block of attend_hopper_bf16.cu whose keys the copy engine brings, and who orders them.
//
// A tile has two sides of 256 values each, and its rope. Five pieces of the queries are in registers, which leaves room for a third
// place of the first side: it may be on its way while the other output group, which has its turn first, frees the second one's place.
#pragma once

#include "attend_hopper_bf16_keys.cuh"

namespace mla {
namespace hopper_bf16 {

constexpr int kept_pieces = 5;  // of the queries, in registers
constexpr int first_places = 3, second_places = 2;  // of a side; a rope has as many as the second one
constexpr int side_bytes = side_values * piece_bytes;

// In bytes.
struct RingPlaces {
    static constexpr int first = (pieces - kept_pieces) * piece_bytes;  // [3], behind the other pieces of the queries
    static constexpr int second = first + first_places * side_bytes;  // [2]
    static constexpr int ropes = second + second_places * side_bytes;  // [2]
    static constexpr int weights = ropes + second_places * piece_bytes;  // [2][64][64], bf16
    static constexpr int rescale = weights + 2 * piece_bytes;  // [2][64]
    static constexpr int changed = rescale + 2 * 64 * 4;  // [2][4], of the score group's warps
    static constexpr int factors = changed + 2 * 4 * 4;  // [64]
    static constexpr int limits = factors + 64 * 4;  // [64]
    static constexpr int there = limits + 64 * 4;  // [3], a bit for each key of a tile
    static constexpr int first_full = there + first_places * 8;  // [3] barriers: that side of a tile is there
    static constexpr int first_used = first_full + first_places * 8;  // [3]: the output has it
    static constexpr int second_full = first_used + first_places * 8;  // [2]
    static constexpr int second_used = second_full + second_places * 8;  // [2]
    static constexpr int rope_full = second_used + second_places * 8;  // [2]
    static constexpr int rope_used = rope_full + second_places * 8;  // [2]: the scores have been made of it
    static constexpr int ready = rope_used + second_places * 8;  // [2]: the weights are there
    static constexpr int queries_full = ready + 2 * 8;  // barrier: the queries are there
    static constexpr int queries_kept = queries_full + 8;  // barrier: those pieces are in registers
    static constexpr int total = queries_kept + 8;

    // Where a piece of the queries comes to: what is kept, to where the third tile's first side and the second one's weights will be.
    static __device__ int query_piece(int i) {
        if (i >= kept_pieces) return (i - kept_pieces) * piece_bytes;
        return i < side_values ? first + 2 * side_bytes + i * piece_bytes : weights + piece_bytes;
    }
    static_assert(kept_pieces == side_values + 1);

    // As of FedPlaces; `third` is n mod 3.
    static __device__ int weights_of(int32_t n) { return weights + (n & 1) * piece_bytes; }
    static __device__ int values_of(int side, int32_t n, int third) {
        return side == 0 ? first + third * side_bytes : second + (n & 1) * side_bytes;
    }
    static __device__ int used_of(int side, int32_t n, int third) { return side == 0 ? first_used + 8 * third : second_used + 8 * (n & 1); }
};

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)

// Orders a side of all keys up to the last one that a row sees, tile by tile, and with the second side the ropes. By the first warp of the
// side's output group. A tile's page is asked for when the tile before it has been ordered.
template <int side>
struct SideBringer {
    static constexpr int places = side == 0 ? first_places : second_places;
    int page_shift;
    int32_t n;  // the tile to be ordered
    int32_t page;  // of it
    int place, lap;  // of its side: the lap's parity
    bool orders;

    __device__ void begin(const Attend& work, const Item& item, const Span& span, int thread) {
        page_shift = __ffs(work.layout.page_size) - 1;
        orders = thread < warp_size;
        n = 0, place = 0, lap = 0;
        ask(work, item, span);
    }

    // What can be done before the side's place is free: a rope's is free as soon as its tile's scores are made.
    __device__ void prepare(const Attend& work, const Span& span, const CUtensorMap* map, uint8_t* memory) {
        if (!orders || n >= span.count) return;
        bool const there = page >= 0 && page < work.step.pages;
        page = there ? page : static_cast<int32_t>(work.step.pages);  // outside of the map: zeros
        if constexpr (side == 0) {
            int const keys = there ? span.keys(n) : 0;
            if (elect_lane()) {  // the lane that arrives where the scores wait for the side, which so see this too
                reinterpret_cast<uint64_t*>(memory + RingPlaces::there)[place] = keys == tile ? ~uint64_t{0} : (uint64_t{1} << keys) - 1;
            }
        } else {
            uint32_t const base = shared_address(memory), full = base + RingPlaces::rope_full + 8 * place;
            if (n >= places) barrier_wait(base + RingPlaces::rope_used + 8 * place, lap ^ 1);
            if (elect_lane()) {
                barrier_expect(full, piece_bytes);
                copy_box(base + RingPlaces::ropes + place * piece_bytes, map, full, 0, row_of_page(work, span), value_pieces, page);
            }
        }
    }

    // Orders it, when its place is free, and goes on to the next tile.
    __device__ void bring(const Attend& work, const Item& item, const Span& span, const CUtensorMap* map, uint8_t* memory) {
        if (!orders || n >= span.count) return;
        uint32_t const base = shared_address(memory), target = base + RingPlaces::values_of(side, place, place);
        uint32_t const full = base + (side == 0 ? RingPlaces::first_full : RingPlaces::second_full) + 8 * place;
        if (n >= places) barrier_wait(base + RingPlaces::used_of(side, place, place), lap ^ 1);
        if (elect_lane()) {
            barrier_expect(full, side_bytes);
#pragma unroll
            for (int i = 0; i < side_values; ++i) {
                copy_box(target + i * piece_bytes, map, full, 0, row_of_page(work, span), side * side_values + i, page);
            }
        }
        ++n;
        if (++place == places) place = 0, lap ^= 1;
        ask(work, item, span);
    }

private:
    __device__ void ask(const Attend& work, const Item& item, const Span& span) {
        if (!orders || n >= span.count) return;
        page = work.step.block_table[item.sequence * work.step.max_pages + ((span.first + n) * tile >> page_shift)];
    }
    __device__ int row_of_page(const Attend& work, const Span& span) const { return (span.first + n) * tile & (work.layout.page_size - 1); }
};

#endif

}  // namespace hopper_bf16
}  // namespace mla
