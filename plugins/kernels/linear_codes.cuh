// A block of the products with e4m3 weights on SM90 (linear_hopper_codes.cu), and how codes become fragments of bf16.
#pragma once

#include "linear_sums.cuh"

namespace mla {
namespace linear_tiles {

constexpr int scale_block = 128;  // columns and outputs that have one scale; a step is one of columns
static_assert(tile_rows == scale_block);
constexpr int rows_together = 4;  // whose 128 columns a warp makes codes of

// Weights as codes in tiles (`code_place`).
struct CodeOperands : Operands<most_linear_parts, const uint8_t*> {
    int columns;
    // Of a step: its columns of x are rows of the weight.
    __device__ int rows_of(int step) const { return min(tile_rows, columns - step * tile_rows); }
};

// Codes of a step that a block multiplies, or of what is left of them, are one copy: tiles of 16 outputs behind each other. One warp behind
// the groups orders copies; of few tokens others make codes of the rows of x.
template <int tokens_, int groups>
struct CodesBlock {
    static constexpr int tokens = tokens_, tiles = groups, columns = tiles * 64;
    static constexpr bool few = tokens <= 16;
    static constexpr int other_groups = few && tokens > 8 ? 2 : 1;
    static constexpr int consumers = tiles * group_threads, threads = consumers + other_groups * group_threads;
    static constexpr int row_makers = other_groups * group_threads / warp_size - 1;  // warps, each of which makes `rows_together` at a time
    static constexpr int row_arrivals = few ? tokens / rows_together : 0;
    static constexpr int product_registers = few ? (tiles == 4 ? 88 : 120) : tiles == 4 ? 112 : 152;  // of a thread
    static constexpr int other_registers = few ? 56 : 32;
    static constexpr int row = columns + 4;  // floats of a row of sums: where half a warp writes no bank is met twice
    static constexpr int x_tile = tokens * step_bytes, x_bytes = 2 * x_tile;  // 64 columns of x, or 128 codes of one term, and a step's
    static constexpr int w_bytes = scale_block * columns;  // a step
    // More copies under way would fit, but then the first ones, too, are there later (benchmarks/LOG.md).
    static constexpr int stage_bytes = x_bytes + w_bytes, stages = few ? 4 : 3;
    // Or a row maker's barrier could be two phases behind what it waits for, which looks like none.
    static_assert(!few || stages * tokens >= row_makers * rows_together);
    static constexpr int scales_start = stages * stage_bytes, scales_bytes = few ? tokens * 4 : 0;  // of the rows, [stages][tokens]
    static constexpr int bytes = scales_start + stages * scales_bytes;
    static_assert(tokens * row * 4 <= bytes && tokens % most_cluster == 0);

    __device__ static int w_bytes_of(const CodeOperands& operands, const Tile& tile, int step) {
        return operands.rows_of(step) * min(columns, operands.outputs[tile.part] - tile.first_output);
    }
    __device__ static void order_w(const CodeOperands& operands, const Tile& tile, int step, uint32_t stage, uint32_t there) {
        int64_t const before = int64_t{operands.outputs[tile.part]} * step * scale_block;
        copy_bytes(stage + x_bytes, operands.w[tile.part] + before + tile.first_output * operands.rows_of(step),
                   w_bytes_of(operands, tile, step), there);
    }
    __device__ static void order_x(const CodeOperands& operands, const Tile& tile, int step, uint32_t stage, uint32_t there) {
#pragma unroll
        for (int i = 0; i < 2; ++i) copy_box(stage + i * x_tile, &operands.x, there, (2 * step + i) * step_bytes, tile.first_token, 0, 0);
    }
};

struct Codes {
    CodeOperands operands;
    Result results[most_linear_parts];
    const float* scales[most_linear_parts];
    const float* squares;  // of x's rows, [square_steps, tokens]
    int square_steps;
    float mean, epsilon;
};

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)

constexpr int chunk = 32, chunks = scale_block / chunk;  // columns that a matrix load has

// A block's scale, as two terms of bf16 each twice: their sum has 16 bits of it.
struct Scale {
    __nv_bfloat162 high, low;

    __device__ explicit Scale(float scale) {
        float const rounded = __bfloat162float(__float2bfloat16_rn(scale));
        high = __floats2bfloat162_rn(rounded, rounded);
        low = __floats2bfloat162_rn(scale - rounded, scale - rounded);
    }
    // Two codes as they come from `code_pair`, times the scale.
    __device__ uint32_t times(uint32_t pair) const {
        uint32_t const bits = decode_pair(pair);
        auto const values = reinterpret_cast<const __nv_bfloat162&>(bits);
        __nv_bfloat162 const scaled = __hfma2(values, high, __hmul2(values, low));
        return reinterpret_cast<const uint32_t&>(scaled);
    }
};

// The fragments of two products, each of 16 columns, from four matrices of eight columns. `decode`: what two codes become that come from
// `code_pair`.
template <class Decode>
__device__ inline void make_fragments(uint32_t (&a)[2][4], const uint32_t (&codes)[4], Decode decode) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        a[i / 2][i % 2 * 2] = decode(code_pair<codes_02>(codes[i]));
        a[i / 2][i % 2 * 2 + 1] = decode(code_pair<codes_13>(codes[i]));
    }
}

// Where the lane's first codes of a step lie in its stage. The step has `rows` rows of x; behind these lies what is another warp's, or was there
// before.
template <class B>
__device__ inline uint32_t own_place(int rows) {
    int const warp = static_cast<int>(threadIdx.x) / warp_size, lane = static_cast<int>(threadIdx.x) % warp_size;
    return B::x_bytes + (warp * rows + lane) * tile_columns;
}

// A warp's codes of a chunk: four matrices of eight rows.
__device__ inline void load_codes(uint32_t (&codes)[4], uint32_t own_codes, int index) {
    ldmatrix_x4_transposed(codes, own_codes + index * (chunk * tile_columns));
}

#endif

}  // namespace linear_tiles
}  // namespace mla
