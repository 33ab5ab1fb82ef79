// Dense causal attention with keys and values made from the latents: MlaPrefill, and the part of MlaAttention that serves
// sequences with many new tokens.
#pragma once

#include <cstdint>

#include "call.h"
#include "device.cuh"

namespace mla {

// A tensor [tokens, heads, values] of any float type whose values lie next to each other. Strides are elements.
template <typename Pointer>
struct HeadView {
    Pointer data;
    int32_t type;
    int64_t token_stride, head_stride;
};

// A weight [H, rows, columns], contiguous, and the scales of its 128 x 128 blocks or null.
struct BlockScaledWeight {
    const void* data;
    int32_t type;
    const float* scale;
};

struct PrefillArguments {
    HeadView<const void*> query_nope;  // [T, H, Dn]
    HeadView<const void*> query_rope;  // [T, H, Dr], rotated
    HeadView<void*> output;            // [T, H, Dv]
    float* lse;                        // [T, H], natural log, without the sink; may be null
    Step step;
    KvLayout layout;
    const void* pool;
    BlockScaledWeight w_uk;  // [H, R, Dn]
    BlockScaledWeight w_uv;  // [H, Dv, R]
    const float* sinks;      // [H] or null
    float softmax_scale;
    int32_t heads, nope, value;  // H, Dn, Dv
    int32_t min_new_tokens;  // outputs of sequences with fewer new tokens are left alone
    bool zero_padding;       // output 0 and lse -inf for the tokens of no sequence; otherwise they are left alone
};

// Takes its scratch memory, and returns before any launch when workspace.sizing().
int enqueue_prefill(const PrefillArguments& arguments, Workspace& workspace, cudaStream_t stream);

}  // namespace mla
