// A matrix for each head: out[t, h, :] = w[h] x[t, h, :].
#pragma once

#include "view.h"

#include "call.h"

namespace mla {

struct Projection {
    View x;  // [T, H, columns]
    View out;  // [T, H, rows]
    const void* w;  // [H, rows, columns], any float type or e4m3
    int32_t w_type;
    const float* w_scale;  // [H, ceil(rows / 128), ceil(columns / 128)] of e4m3 weights, or null
    const float* x_scale;  // [T, H, ceil(columns / 128)] of e4m3 x, or null
    const int32_t* x_tokens;  // [T]: the token of x for each product, -1 for none; null: its own
    const int32_t* out_tokens;  // [T]: the token of out, -1: not written; null: its own
    int64_t tokens;
    int32_t heads, rows, columns;
    bool exact;  // f32 products on plain cores; else bf16 products on tensor cores, sums in f32
};

int project(const Projection& work, cudaStream_t stream);

// e4m3 codes and scales of each 128 values of x [T, H, columns] (docs/op-set.md, MlaDecodeBranchFp8):
// s = min(amax, 1200) / 448, codes = e4m3(clamp(x / s)), 0 where s is 0. `codes` is contiguous.
int quantize_groups(const View& x, int64_t tokens, int32_t heads, int32_t columns, uint8_t* codes, float* scales,
                    cudaStream_t stream);

}  // namespace mla
