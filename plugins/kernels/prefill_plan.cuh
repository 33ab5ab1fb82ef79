// How the prefill kernels on tensor cores share a step out: its sizes and scratch memory, where sequences start, and units of
// attention.
#pragma once

#include "prefill_step.cuh"

namespace mla::prefill_step {

constexpr int key_tile = 64;

struct Plan {
    PrefillArguments arguments;

    int32_t nope;          // Dn rounded up to 16
    int32_t rope;          // Dr rounded up to 16
    int32_t value;         // Dv rounded up to 16
    int32_t rank;          // R rounded up to expand_depth
    int32_t key_stride;    // nope + rope rounded up to 64: values of a row of queries or keys in shared memory
    int32_t group_heads;   // heads of a group
    int32_t chunk_tiles;   // key tiles of a chunk
    int32_t places;        // heads whose keys and values of a chunk `expanded` has room for; a group's at least
    int32_t value_slices;  // units that share the columns of the output
    int64_t gathered;      // keys of a chunk that there is room for
    bool nope_vectors, rope_vectors;  // the query's rows can be read 8 values at once
    bool output_pairs;                // the output's rows can be written 2 values at once

    int32_t* counter;      // [1 + 2 H] of attend's units; the others are for SM90's kernel
    int32_t* query_tiles;  // [B + 1] first query tile of each sequence
    int32_t* key_tiles;    // [B + 1] first key tile of each sequence
    uint64_t* key_masks;   // [chunk tiles] which keys exist
    float* row_scales;     // [chunk keys]
    __nv_bfloat16* latents;   // [chunk keys, rank]
    __nv_bfloat16* ropes;     // [chunk keys, rope]
    __nv_bfloat16* weights;   // [H, nope + value, rank]; for SM90's kernel [H, rank, nope] and then [H, value, rank]
    __nv_bfloat16* expanded;  // [places, chunk keys, nope + value]
    float* states;            // [group heads, T, value]
    float2* state_sums;       // [value slices, group heads, T] maximum and denominator

    MLA_BOTH int32_t columns() const { return nope + value; }
    MLA_BOTH int32_t chunk_keys() const { return chunk_tiles * key_tile; }
};

// Whether the kernel attends for a sequence. Its first and last tokens must know that they are its own: garbage, on which
// builders time, then costs no time.
__device__ inline bool served(const PrefillArguments& a, const Sequence& sequence, int64_t index) {
    return sequence.tokens >= max(a.min_new_tokens, 1) && a.step.token_sequence[sequence.first] == index &&
           a.step.token_sequence[sequence.first + sequence.tokens - 1] == index;
}

// The index i with starts[i] <= item < starts[i + 1].
__device__ inline int32_t owner(const int32_t* starts, int32_t count, int32_t item) {
    int32_t low = 0, high = count;
    while (low < high) {
        int32_t const middle = (low + high) / 2;
        if (starts[middle + 1] > item) {
            high = middle;
        } else {
            low = middle + 1;
        }
    }
    return low;
}

template <int threads>
__device__ bool anything_served(const PrefillArguments& a) {
    bool found = false;
    for (int64_t i = threadIdx.x; i < a.step.sequences; i += threads) {
        found |= served(a, sequence_at(a.step, a.layout.page_size, i), i);
    }
    return __syncthreads_or(found);
}

// By one block: where each sequence's query tiles and key tiles start. A thread takes consecutive sequences.
template <typename S>
__device__ void make_starts(const Plan& plan) {
    __shared__ int2 warp_sums[S::warps];
    const PrefillArguments& a = plan.arguments;
    int64_t const count = ceil_div<int64_t>(a.step.sequences, S::threads);
    int64_t const first = min(threadIdx.x * count, a.step.sequences);
    int64_t const end = min(first + count, a.step.sequences);
    auto const tiles = [&](int64_t i) {
        Sequence const sequence = sequence_at(a.step, a.layout.page_size, i);
        if (!served(a, sequence, i)) return make_int2(0, 0);
        // one tile where there is no key either: its queries get their zeros like all others
        return make_int2(ceil_div(sequence.tokens, S::rows), max(ceil_div(sequence.keys, key_tile), 1));
    };
    int2 sum = make_int2(0, 0);
    for (int64_t i = first; i < end; ++i) {
        int2 const own = tiles(i);
        sum.x += own.x;
        sum.y += own.y;
    }
    int const warp = threadIdx.x / warp_size, lane = threadIdx.x % warp_size;
    int2 before = sum;  // inclusive within the warp
    for (int offset = 1; offset < warp_size; offset *= 2) {
        int const x = __shfl_up_sync(0xffffffffu, before.x, offset), y = __shfl_up_sync(0xffffffffu, before.y, offset);
        if (lane >= offset) {
            before.x += x;
            before.y += y;
        }
    }
    if (lane == warp_size - 1) warp_sums[warp] = before;
    S::sync();
    before.x -= sum.x;
    before.y -= sum.y;
    for (int i = 0; i < warp; ++i) {
        before.x += warp_sums[i].x;
        before.y += warp_sums[i].y;
    }
    if (threadIdx.x == 0) plan.query_tiles[0] = plan.key_tiles[0] = 0;
    for (int64_t i = first; i < end; ++i) {
        int2 const own = tiles(i);
        before.x += own.x;
        before.y += own.y;
        plan.query_tiles[i + 1] = before.x;
        plan.key_tiles[i + 1] = before.y;
    }
}

struct Unit {
    int64_t token;             // its first row
    int32_t rows;              // rows that are tokens
    int32_t position;          // of the first row
    int32_t head;              // in the group
    int32_t slice;             // of the output's columns
    int32_t first_key;         // the sequence's first key tile, counted from the chunk's start (may be negative)
    int32_t key_start, key_end;  // key tiles in this chunk
    bool starts, ends;         // whether its first and its last keys are in this chunk
};

// The unit numbered `index`: of `bundle` heads after the other, the last query tiles, which see most keys, first. False where
// the unit sees nothing of this chunk.
template <int rows>
__device__ bool make_unit(const Plan& plan, int32_t index, int32_t heads, int32_t bundle, int32_t query_end,
                          int32_t query_count, int32_t chunk_start, int32_t chunk_end, Unit& unit) {
    const PrefillArguments& a = plan.arguments;
    int32_t const per_head = query_count * plan.value_slices;
    int32_t const first_head = index / (per_head * bundle) * bundle;
    int32_t const width = bundle == 1 ? 1 : min(bundle, heads - first_head);
    int32_t const number_in_bundle = index - first_head * per_head, rest = number_in_bundle / width;
    unit.head = first_head + number_in_bundle % width;
    unit.slice = rest % plan.value_slices;
    int32_t const tile = query_end - 1 - rest / plan.value_slices;
    int32_t const number = owner(plan.query_tiles, static_cast<int32_t>(a.step.sequences), tile);
    Sequence const sequence = sequence_at(a.step, a.layout.page_size, number);
    int32_t const row0 = (tile - plan.query_tiles[number]) * rows;
    unit.token = sequence.first + row0;
    unit.rows = min(sequence.tokens - row0, rows);
    unit.position = sequence.cached + row0;
    int32_t const sequence_start = plan.key_tiles[number] - chunk_start;
    int32_t const seen = max(ceil_div(min(unit.position + unit.rows, sequence.keys), key_tile), 1);
    unit.first_key = sequence_start;
    unit.key_start = max(sequence_start, 0);
    unit.key_end = min(sequence_start + seen, chunk_end - chunk_start);
    unit.starts = sequence_start >= 0;
    unit.ends = sequence_start + seen <= chunk_end - chunk_start;
    return unit.key_start < unit.key_end;
}

}  // namespace mla::prefill_step
