// Products of the same rows with several weights.
#pragma once

#include "call.h"

namespace mla {

// One of the weights, and what its product becomes.
struct LinearPart {
    const void* weight;  // [columns, outputs]
    int32_t weight_type;
    const void* factors;  // [outputs]: what each output is multiplied by; may be null
    int32_t factors_type;
    void* out;  // [tokens, outputs]
    int32_t out_type;
    int64_t outputs;
    float* squares;  // [square_tiles(outputs), tokens]: sums of a row's outputs squared, before the factors; SM90 split alone; may be null
};

// Sums of squares of a row of so many outputs.
inline int64_t square_tiles(int64_t outputs) { return ceil_div<int64_t>(outputs, 64); }

constexpr int most_linear_parts = 5, most_unsplit_parts = 2;

struct Linear {
    const void* x;  // [tokens, columns]
    int32_t x_type;
    int64_t tokens, columns;
    LinearPart parts[most_linear_parts];
    int count;
    // SM90, not split: the squares of x's rows, each of which is to be divided by the root of its mean square and `epsilon`; may be null.
    const float* squares;
    float epsilon;

    void add(const LinearPart& part) { parts[count++] = part; }
};

// Any type and size, a thread for each output.
int linear_plain(const Linear& work, cudaStream_t stream);

// SM90's own kernels: all of bf16, but for what `split` gives, which may be f32. `split` is for few outputs, and takes most_linear_parts of
// them, the other most_unsplit_parts.
bool linear_takes_hopper(const Linear& work, const Device& device);
int linear_hopper(const Linear& work, const Device& device, cudaStream_t stream);
int linear_hopper_split(const Linear& work, const Device& device, cudaStream_t stream);

}  // namespace mla
