// Products of the same rows with several weights.
#pragma once

#include <cuda_bf16.h>

#include "early.cuh"

namespace mla {

// One of the weights, and what its product becomes.
struct LinearPart {
    const void* weight;  // [columns, outputs], codes in tiles
    int32_t weight_type;
    const float* scales;  // of codes' blocks of 128 x 128, [ceil(columns / 128), ceil(outputs / 128)]; null where weights are none
    const void* factors;  // [outputs]: what each output is multiplied by; may be null
    int32_t factors_type;
    void* out;  // [tokens, outputs]
    int32_t out_type;
    int64_t outputs;
    float* squares;  // [square_tiles(outputs), tokens]: sums of a row's outputs squared, before the factors; where blocks share columns; may be null
};

// Sums of squares of a row of so many outputs.
inline int64_t square_tiles(int64_t outputs) { return ceil_div<int64_t>(outputs, 64); }

// Weights that are codes lie in tiles: of `tile_rows` columns of x, or what is left of them, and in these of `tile_columns` outputs, or what is
// left, a tile behind the other, row by row. So what a block multiplies in a step is in one piece. Where the code is of a column and an output:
constexpr int tile_rows = 128, tile_columns = 16;
MLA_BOTH constexpr int64_t code_place(int64_t column, int64_t output, int64_t columns, int64_t outputs) {
    int64_t const row = column % tile_rows, rows = columns - (column - row) < tile_rows ? columns - (column - row) : tile_rows;
    int64_t const place = output % tile_columns, first = output - place, width = outputs - first < tile_columns ? outputs - first : tile_columns;
    return (column - row) * outputs + first * rows + row * width + place;
}

constexpr int most_linear_parts = 5, most_unsplit_parts = 2;

struct Linear {
    const void* x;  // [tokens, columns]
    int32_t x_type;
    int64_t tokens, columns;
    LinearPart parts[most_linear_parts];
    int count;
    // On SM90, not of linear_hopper_split: the squares of x's rows, each of which is to be divided by the root of its mean square and `epsilon`; may be null.
    const float* squares;
    float epsilon;
    bool weights_made;  // by a kernel before, which those of SM90 wait for
    KernelOrder order = KernelOrder::behind;  // on SM90, not of linear_hopper

    void add(const LinearPart& part) { parts[count++] = part; }
    // The parts whose weights are e4m3, or the others.
    Linear of_codes(bool codes) const {
        Linear found = *this;
        found.count = 0;
        for (int i = 0; i < count; ++i) {
            if ((parts[i].weight_type == MLA_FLOAT8E4M3FN) == codes) found.add(parts[i]);
        }
        return found;
    }
};

// Codes have scales, and other weights none. `input`: which of the op's the weight is.
inline int check_codes(const MlaTensor& weight, bool has_scales, const OpSpec& op, int input) {
    if ((weight.type == MLA_FLOAT8E4M3FN) == has_scales) return MLA_OK;
    return fail(MLA_BAD_CALL, "%s: %s %s", op.name, op.input[input].name, has_scales ? "has scales, so it must be e4m3" : "is e4m3, so it needs scales");
}

// Any type and size, a thread for each output.
int linear_plain(const Linear& work, cudaStream_t stream);

// SM90's own kernels: all in bf16, but for weights that are e4m3, and for what is made of columns that blocks share, which may be f32.
// `linear_hopper` has all columns in one block, and takes most_unsplit_parts; the other two share them, and take most_linear_parts:
// `linear_hopper_split` where outputs are few, `linear_hopper_codes` weights in e4m3.
bool linear_takes_hopper(const Linear& work, const Device& device);
int linear_hopper(const Linear& work, const Device& device, cudaStream_t stream);
int linear_hopper_split(const Linear& work, const Device& device, cudaStream_t stream);
int linear_hopper_codes(const Linear& work, const Device& device, cudaStream_t stream);

// Of more tokens weights in e4m3 are decoded first: to memory for `coded_values` of them.
constexpr int64_t most_coded_tokens = 256;
inline int64_t coded_values(const Linear& work) {
    int64_t values = 0;
    for (int i = 0; i < work.count; ++i) {
        if (work.parts[i].weight_type == MLA_FLOAT8E4M3FN) values += work.columns * work.parts[i].outputs;
    }
    return values;
}
// `work` with weights in bf16, for the kernels of SM90.
int decode_weights(const Linear& work, __nv_bfloat16* memory, Linear* decoded, cudaStream_t stream);

}  // namespace mla
