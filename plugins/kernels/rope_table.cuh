// cos or sin of the positions, as a model has them: of any float type, and with rows that may be longer than the pairs are.
#pragma once

#include "device.cuh"

namespace mla {

struct RopeTable {
    const void* data;  // [rows, row_values], of which the first values are those of the pairs
    int32_t type;
    int64_t row_values;

    // In two steps, so that other reads are asked for before the first one is waited for.
    __device__ uint32_t bits(int64_t row, int pair) const { return load_bits(data, type, row * row_values + pair); }
    __device__ float value(uint32_t of_bits) const { return float_of_bits(of_bits, type); }
};

inline RopeTable rope_table(const MlaTensor& tensor) { return {tensor.data, tensor.type, tensor.shape[1]}; }

}  // namespace mla
