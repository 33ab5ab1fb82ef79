// What the indexer's stages share: the window of query tokens that they work on, and its scratch memory.
#pragma once

#include "rope_table.cuh"

namespace mla {

constexpr int max_window_rows = 1024;  // tables of them are kept in shared memory
constexpr int64_t max_index_keys = 0x7fff0000;  // of a sequence: leaves room to count whole tiles in 32 bits

// Consecutive query tokens whose scores are in memory at one time, and what is known of all tokens. Row r of the scratch
// memory is token first + r. Heads are padded with zeros to a multiple of 16, heads' values to `width`.
struct IndexWindow {
    Step step;
    IndexLayout layout;
    const char* pool;
    int64_t first;
    int32_t rows;
    int32_t heads, padded_heads;  // Hi
    int32_t width;                // values from one head of `queries` to the next
    int64_t top_k;
    int64_t stride;               // keys from one row of `ranks` to the next, a multiple of 64

    uint32_t* ranks;  // [rows, stride], see rank_of(); written for the keys of scored tokens only
    bool query_codes;  // for index_score_hopper.cu
    void* queries;    // [rows, padded_heads, width]: f32; e4m3 codes; or as f16 in that of fragment_place()
    float* weights;   // [rows, padded_heads], times the query's scale

    // Keys that the token of a row can see, were all its pages in the pool.
    __device__ int32_t keys(int32_t row) const {
        int32_t const position = step.positions[first + row], limit = step.key_limit(layout.page_size);  // not after the sequence
        if (step.sequence_of(first + row) < 0) return 0;
        return position < 0 ? 0 : position < limit ? position + 1 : limit;
    }

    // Keys to score: none where the list takes all that there are.
    __device__ int32_t scored_keys(int32_t row) const {
        int32_t const count = keys(row);
        return count > top_k ? count : 0;
    }

    __device__ int32_t page(int32_t sequence, int32_t key) const {
        return page_of(step.block_table, step.max_pages, step.pages, layout.page_size, sequence, key);
    }

    __device__ const char* page_data(int32_t page) const { return pool + page * layout.page_bytes; }
};

// Order of scores as unsigned numbers: 0 stands for a key that is not visible, 1 for NaN, which loses against every number.
// -0 and 0 are equal.
__device__ inline uint32_t rank_of(float score) {
    uint32_t const bits = __float_as_uint(score + 0.0f);
    uint32_t const flip = static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31) | 0x80000000u;
    return score != score ? 1 : bits ^ flip;
}

// Where value d of a head lies in `queries` of the tensor path: a lane then finds the key's values of four fragments in 16
// consecutive bytes of the row (lane t of four those from 64 j + 16 t on), and key rows go straight to registers.
MLA_BOTH constexpr int fragment_place(int d) {
    int const lane = d >> 4 & 3, step = d >> 2 & 3, byte = d & 3;
    return (d & ~63) + 16 * step + 8 * (byte >> 1) + 2 * lane + (byte & 1);
}

// Inclusive sum over the threads of a block (a multiple of 32, at most 1024), and the sum of all. `scratch` holds 32 words;
// between two calls with the same scratch memory there must be a barrier.
template <typename T>
__device__ inline T block_scan(T value, T* scratch, T* total) {
    int const lane = threadIdx.x % warp_size, warp = threadIdx.x / warp_size, warps = blockDim.x / warp_size;
    T sum = value;
    for (int offset = 1; offset < warp_size; offset *= 2) {
        T const below = __shfl_up_sync(0xffffffffu, sum, offset);
        if (lane >= offset) sum += below;
    }
    if (lane == warp_size - 1) scratch[warp] = sum;
    __syncthreads();
    T const part = lane < warps ? scratch[lane] : T(0);
    *total = __reduce_add_sync(0xffffffffu, part);
    return sum + __reduce_add_sync(0xffffffffu, lane < warp ? part : T(0));
}

// Appends the keys of all tokens to the pool where `keys` is set, and makes `queries` and `weights` of the window.
struct IndexAppend {
    const void* query;
    const void* key;
    const float* weights;
    const void* norm_weight;
    const void* norm_bias;
    RopeTable cos, sin;  // [table_rows, rope / 2]
    const int32_t* rope_rows;
    int32_t type, norm_type, bias_type;
    int64_t table_rows;
    int32_t rope, rope_interleaved, hadamard;
    float epsilon;
    char* pool;
    bool keys;
    bool aligned;  // several values may be read at once; `append_index_keys` finds out
};

int append_index_keys(const Call& call, const IndexWindow& window, const Device& device, IndexAppend append);
int score_index_keys(const Call& call, const IndexWindow& window, const Device& device);
// By warpgroup products of codes, where `index_takes_hopper`.
bool index_takes_hopper(const IndexWindow& window, const Device& device);
int score_index_keys_hopper(const Call& call, const IndexWindow& window, const Device& device);
int select_index_keys(const Call& call, const IndexWindow& window, const Device& device, int32_t* indices);

}  // namespace mla
