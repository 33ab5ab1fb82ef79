// A matrix for each head: out[t, h, :] = w[h] x[t, h, :].
#pragma once

#include "attend.h"
#include "early.cuh"
#include "view.h"

namespace mla {

struct Projection {
    View x;  // [T, H, columns]
    View out;  // [T, H, rows]
    const void* w;  // [H, rows, columns], any float type or e4m3
    int32_t w_type;
    const float* w_scale;  // [H, ceil(rows / 128), ceil(columns / 128)] of e4m3 weights, or null
    bool quantize_x;  // each 128 values of x as e4m3 codes and their scale (docs/op-set.md, MlaDecodeBranchFp8)
    const int32_t* x_tokens;  // [T]: the token of x for each product, -1 for none; null: its own
    const int32_t* out_tokens;  // [T]: the token of out, -1: not written; null: its own
    int64_t tokens;
    int32_t heads, rows, columns;
    bool exact;  // f32 products on plain cores; else bf16 products on tensor cores, sums in f32
    KernelOrder order;
};

// Reads the weights while the kernel before is still at work: none of this library's kernels may have made them, which alone let the next
// one begin before they end.
int project(const Projection& work, cudaStream_t stream);

// The same on SM90 of few tokens whose x, the output of an attention, is still in parts, or some of it is. The kernel before is that attention.
bool project_takes_parts(const Projection& work, const Attention& attention);
int project_parts(const Projection& work, const Attend& attend, const Partials& partials, cudaStream_t stream);

// SM90's own kernel behind it: x in bf16, w in bf16 or e4m3, every token its own.
bool project_takes_hopper(const Projection& work, const Device& device);
int project_hopper(const Projection& work, const Device& device, cudaStream_t stream);

}  // namespace mla
