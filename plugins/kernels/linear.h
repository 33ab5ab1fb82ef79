// out = x weight.
#pragma once

#include "call.h"

namespace mla {

struct Linear {
    const void* x;  // [T, C]
    const void* weight;  // [C, outputs]
    void* out;  // [T, outputs]
    int32_t x_type, weight_type, out_type;
    int64_t tokens, columns, outputs;  // T, C, H M
};

// SM90's own kernel: all of bf16.
bool linear_takes_hopper(const Linear& work, const Device& device);
int linear_hopper(const Linear& work, const Device& device, cudaStream_t stream);

}  // namespace mla
