// A block of the products with e4m3 weights on SM90 (linear_hopper_codes.cu), and how codes become fragments of bf16.
#pragma once

#include "linear_sums.cuh"

namespace mla {
namespace linear_tiles {

constexpr int scale_block = 128;  // columns and outputs that have one scale; a step is one of columns
constexpr int rows_together = 4;  // whose 128 columns a warp makes codes of
constexpr int few_stages = 4;  // of few tokens: with more copies under way the first ones, too, are there later

// Three groups read the first 128 outputs as four do, and the last 64 as rows of half the width. One warp behind them orders copies; of few tokens
// others make codes of the rows of x.
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
    static constexpr int w_tile = scale_block * step_bytes, w_bytes = tiles * w_tile / 2;  // a step of 128 outputs, and of all
    static constexpr int stage_bytes = x_bytes + w_bytes, most = few ? few_stages : budget / stage_bytes;
    static constexpr int stages = most < most_stages ? most : most_stages;
    // Or a row maker's barrier could be two phases behind what it waits for, which looks like none.
    static_assert(!few || stages * tokens >= row_makers * rows_together);
    static constexpr int scales_start = stages * stage_bytes, scales_bytes = few ? tokens * 4 : 0;  // of the rows, [stages][tokens]
    static constexpr int bytes = scales_start + stages * scales_bytes;
    static_assert(tokens * row * 4 <= bytes && tokens % most_cluster == 0);

    // Of a part the map of rows of 128 outputs, and behind those of all parts that of 64.
    template <int parts>
    __device__ static void order_w(const Operands<parts>& operands, const Tile& tile, int step, uint32_t stage, uint32_t there) {
        copy_box(stage + x_bytes, &operands.w[tile.part], there, tile.first_output, step * scale_block, 0, 0);
        copy_box(stage + x_bytes + w_tile, &operands.w[tile.part + (groups == 4 ? 0 : most_linear_parts)], there, tile.first_output + scale_block,
                 step * scale_block, 0, 0);
    }
    template <int parts>
    __device__ static void order_x(const Operands<parts>& operands, const Tile& tile, int step, uint32_t stage, uint32_t there) {
#pragma unroll
        for (int i = 0; i < 2; ++i) copy_box(stage + i * x_tile, &operands.x, there, (2 * step + i) * step_bytes, tile.first_token, 0, 0);
    }
};

struct Codes {
    Operands<2 * most_linear_parts> operands;
    Result results[most_linear_parts];
    const float* scales[most_linear_parts];
    const float* squares;  // of x's rows, [square_steps, tokens]
    int square_steps;
    float mean, epsilon;
};

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)

constexpr int chunk = 32, chunks = scale_block / chunk;  // columns that a matrix load has
__device__ const float no_scale = 1.0f;

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

// Where a lane's codes lie in a stage: of the first of a step's rows, and from a chunk's to the next one's.
struct Line {
    uint32_t first, stride;
};

template <class B>
__device__ inline Line line_of(int warp, int lane) {
    bool const half = B::tiles == 3 && warp >= 8;
    int const unit = warp % (half ? 4 : 8), bytes = half ? step_bytes / 2 : step_bytes;
    int const permuted = unit ^ (half ? lane >> 1 & 3 : lane & 7);  // as the copy engine does
    return {static_cast<uint32_t>(B::x_bytes + warp / 8 * B::w_tile + lane * bytes + (permuted << 4)), static_cast<uint32_t>(chunk * bytes)};
}

#endif

}  // namespace linear_tiles
}  // namespace mla
