// Rope, norm, quantisation and the cache row of each new token.
#pragma once

#include "rope_table.cuh"
#include "view.h"

namespace mla {

struct Append {
    View query, query_out;  // [T, H, Dr], before and after rope
    bool query_aligned, query_out_aligned;  // four values may be read or written at once; `append` finds out
    const void* latent;  // [T, R]
    const void* rope_key;  // [T, Dr]
    int32_t latent_type, rope_key_type;
    const void* norm_weight;  // [R] or null
    int32_t norm_weight_type;
    RopeTable cos, sin;  // [table_rows, Dr / 2]
    const int32_t* rope_rows;  // [T] or null: one row a token
    int64_t table_rows;
    int32_t heads;
    float epsilon;
    bool interleaved;
    KvLayout layout;
    Step step;
    uint8_t* pool;
    bool beside;  // the kernel before makes nothing of all this and uses none of it: both may run side by side
};

int append(const Append& work, cudaStream_t stream);

}  // namespace mla
