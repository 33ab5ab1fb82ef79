// Absorbed attention over the paged latent cache, for MlaDecoding, MlaPrefillSparse and the ops composed of them.
#pragma once

#include "device.cuh"
#include "view.h"

namespace mla {

struct Attend {
    View query;  // [T, H, R + Dr], absorbed and rotated
    View output;  // [T, H, R]
    float* lse;  // [T, H] or null
    const uint8_t* pool;
    KvLayout layout;
    Step step;
    const int32_t* indices;  // [T, top_k]: the keys of each token; null: all keys up to its own
    const int32_t* index_lengths;  // [T] or null
    int64_t top_k;
    const float* sinks;  // [H] or null
    float softmax_scale;
    int32_t heads;
    // Sequences with more new tokens are left alone: neither read nor written. 0: none is.
    int32_t most_new_tokens;
};

// One part of a token's keys, before the merge: rows [T * H][splits].
struct Partials {
    float* output;  // [T * H, splits, R], divided by the part's own sum
    float* lse;  // [T * H, splits], base 2, -inf where the part has no key
    int splits;
};

// Attends; takes its scratch memory from the call's workspace.
int attend(Call& call, const Attend& work);

// Rows (query tokens x heads of one sequence, or heads of one token with lists) of a block of the tensor-core kernel: 16 where
// more would stay empty.
inline int rows_per_block(const Attend& work) {
    bool const few = work.indices != nullptr || work.step.tokens <= work.step.sequences;
    return work.heads <= 16 && few ? 16 : 64;
}

// The two kernels behind it: tensor cores (any format but f32, R up to 512, Dr up to 64), and plain cores in f32 (everything).
bool attend_takes_tensor_cores(const Attend& work, const Device& device);
int attend_tensor_cores(const Attend& work, const Partials& partials, const Device& device, cudaStream_t stream);
int attend_exact(const Attend& work, const Partials& partials, cudaStream_t stream);

#if defined(__CUDACC__)

// Whether a sequence is this op's to compute.
__device__ inline bool is_active(const Attend& work, int32_t sequence) {
    if (sequence < 0) return false;
    if (work.most_new_tokens == 0) return true;
    return work.step.query_offsets[sequence + 1] - work.step.query_offsets[sequence] <= work.most_new_tokens;
}

// The last key that a token may see: its position, held inside the block table.
__device__ inline int32_t last_key(const Attend& work, int64_t token) {
    return min(work.step.positions[token], work.step.key_limit(work.layout.page_size) - 1);
}

// Keys in a token's list.
__device__ inline int32_t list_length(const Attend& work, int64_t token) {
    int64_t const length = work.index_lengths == nullptr ? work.top_k : work.index_lengths[token];
    return static_cast<int32_t>(length < 0 ? 0 : length < work.top_k ? length : work.top_k);
}

// A cached row: null when the key is masked for every query.
struct Row {
    const uint8_t* bytes;
    float scale;  // of the formats that keep it behind the rows; 1 in others
    int32_t position;  // INT32_MAX when masked
};

__device__ inline Row find_row(const Attend& work, int32_t sequence, int32_t key, int32_t end) {
    Row row{nullptr, 1.0f, 0x7fffffff};
    if (key < 0 || key >= end) return row;
    int32_t const page = page_of(work.step.block_table, work.step.max_pages, work.step.pages, work.layout.page_size,
                                 sequence, key);
    if (page < 0) return row;
    int32_t const slot = key % work.layout.page_size;
    const uint8_t* page_bytes = work.pool + page * work.layout.page_bytes;
    row.bytes = page_bytes + static_cast<int64_t>(slot) * work.layout.row_bytes;
    if (work.layout.has_page_scales()) {
        row.scale = reinterpret_cast<const float*>(page_bytes + work.layout.scales_offset)[slot];
    }
    row.position = key;
    return row;
}

#endif

}  // namespace mla
