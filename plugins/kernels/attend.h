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
    int32_t query_terms;  // e4m3 terms that the query may be made of; 0: products of bf16 only
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

// The kernels behind it: SM90's own with products in e4m3 (fp8 rows) and in bf16 (bf16, fp8 and fp8_ds_mla rows; both R 512,
// Dr 64), tensor cores (any format but f32, R up to 512, Dr up to 64), and plain cores in f32 (everything).
bool attend_takes_hopper_fp8(const Attend& work, const Device& device);
int hopper_fp8_rows(const Attend& work);  // of a block
int attend_hopper_fp8(const Attend& work, const Partials& partials, cudaStream_t stream);
bool attend_takes_hopper_bf16(const Attend& work, const Device& device);  // 64 rows, tiles of 64 keys
int attend_hopper_bf16(const Attend& work, const Partials& partials, cudaStream_t stream);
bool attend_takes_tensor_cores(const Attend& work, const Device& device);
int attend_tensor_cores(const Attend& work, const Partials& partials, const Device& device, cudaStream_t stream);
int attend_exact(const Attend& work, const Partials& partials, cudaStream_t stream);

#if defined(__CUDACC__)

// The grid is one line: the parts of an item follow each other, and blocks without an item are last, so that none of them
// holds a place for which a part waits.
__device__ inline int part_of_block(const Partials& partials) { return static_cast<int>(blockIdx.x % partials.splits); }
__device__ inline int item_of_block(const Partials& partials) { return static_cast<int>(blockIdx.x / partials.splits); }

// The last key that a token may see: its position, held inside the block table.
__device__ inline int32_t last_key(const Attend& work, int64_t token) {
    return min(work.step.positions[token], work.step.key_limit(work.layout.page_size) - 1);
}

// Keys in a token's list.
__device__ inline int32_t list_length(const Attend& work, int64_t token) {
    int64_t const length = work.index_lengths == nullptr ? work.top_k : work.index_lengths[token];
    return static_cast<int32_t>(length < 0 ? 0 : length < work.top_k ? length : work.top_k);
}

constexpr int32_t masked = 0x7fffffff;

// A cached row.
struct Row {
    const uint8_t* bytes;  // null where there is none
    float scale;  // of the whole row, where the format has one; else 1
    int32_t position;  // `masked` where there is none
};

// The row of a key on a page; a page outside of the pool has none.
__device__ inline Row row_at(const Attend& work, int32_t key, int32_t page) {
    const KvLayout& layout = work.layout;
    Row row{nullptr, layout.format == row_format::fp8_flat ? layout.kv_scale : 1.0f, masked};
    if (page < 0 || page >= work.step.pages) return row;
    int32_t const slot = key % layout.page_size;
    const uint8_t* page_bytes = work.pool + page * layout.page_bytes;
    row.bytes = page_bytes + static_cast<int64_t>(slot) * layout.row_bytes;
    if (layout.has_page_scales()) row.scale = reinterpret_cast<const float*>(page_bytes + layout.scales_offset)[slot];
    row.position = key;
    return row;
}

#endif

}  // namespace mla
