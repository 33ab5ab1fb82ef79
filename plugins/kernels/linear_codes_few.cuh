// The products with e4m3 weights of up to 16 tokens (linear_hopper_codes.cu): how rows come to a block, and the products.
#pragma once

#include "linear_codes.cuh"

namespace mla {
namespace linear_tiles {

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)

// Where 16 bytes of a step's rows are in a stage, permuted as the copy engine does: units of a row in tiles of 64 columns.
template <class B>
__device__ inline uint32_t row_place(int row, int unit) {
    constexpr int units = step_bytes / 16;
    return static_cast<uint32_t>(unit / units * B::x_tile + row * step_bytes + ((unit ^ row) % units << 4));
}

// Rows of few tokens come by lanes, which is faster than bulk copies. Supposed: those wait behind the weights', which are under way for
// microseconds before the kernel before ends.
template <class B>
__device__ inline void load_rows(const Ring& ring, const Codes& work, int first_token, int first, int steps) {
    constexpr int row_units = scale_block / 8;
    int const thread = static_cast<int>(threadIdx.x) - B::consumers - warp_size;
    int const units = min(work.operands.tokens - first_token, B::tokens) * row_units;
    wait_for_kernel_before();
    Turn<B> turn;
#pragma unroll 1
    for (int step = 0; step < steps; ++step, turn.advance()) {
        uint32_t const place = ring.base + turn.stage * B::stage_bytes;
        barrier_wait(ring.used + 8 * turn.stage, turn.turn & 1 ^ 1);
#pragma unroll 1
        for (int i = thread; i < units; i += B::row_loaders) {
            int const row = i / row_units, unit = i % row_units, column = (first + step) * scale_block + unit * 8;
            copy_async_16(place + row_place<B>(row, unit), work.x + static_cast<int64_t>(first_token + row) * work.columns + column,
                          column < work.columns);
        }
        barrier_arrive_after_copies(ring.there + 8 * turn.stage);
    }
}

// As `multiply_codes`, of rows from `load_rows`, by products of a warp: of so few tokens a group's take longer. `scales`: of the first step;
// `stride` further is the next one's.
template <class B>
__device__ inline void multiply_few(const Ring& ring, int warp, int steps, float (&sums)[B::tokens / 2], const float* scales, int stride) {
    constexpr int tiles = B::tokens / 8;
    int const lane = threadIdx.x % warp_size;
    Line line = line_of<B>(warp, lane);
    uint32_t row = row_place<B>(lane % 8, lane / 8);  // of a chunk's four matrices of eight columns; of an odd chunk with bit 6 the other way
    keep(line.first);
    keep(line.stride);
    keep(row);
#pragma unroll
    for (int i = 0; i < B::tokens / 2; ++i) sums[i] = 0.0f;
    Turn<B> turn;
    float next_scale = *scales;
#pragma unroll 1
    for (int step = 0; step < steps; ++step, turn.advance()) {
        uint32_t const place = ring.base + turn.stage * B::stage_bytes;
        float const scale = next_scale;
        scales += stride;
        if (step + 1 < steps) next_scale = *scales;
        barrier_wait(ring.there + 8 * turn.stage, turn.turn & 1);
        uint32_t codes[chunks][4], x[chunks][tiles][4];
#pragma unroll
        for (int c = 0; c < chunks; ++c) {
            ldmatrix_x4_transposed(codes[c], place + line.first + c * line.stride);
#pragma unroll
            for (int i = 0; i < tiles; ++i) ldmatrix_x4(x[c][i], (place + c / 2 * B::x_tile + i * 8 * step_bytes + row) ^ c % 2 * (step_bytes / 2));
        }
        barrier_arrive_if(ring.used + 8 * turn.stage, lane == 0);
        float parts[2][tiles][4] = {};  // of every other 16 columns, that fewer products wait for each other
#pragma unroll
        for (int c = 0; c < chunks; ++c) {
            uint32_t a[2][4];
            make_fragments(a, codes[c], decode_pair);
#pragma unroll
            for (int i = 0; i < tiles; ++i) {
                mma_bf16(parts[0][i], a[0], x[c][i][0], x[c][i][1]);
                mma_bf16(parts[1][i], a[1], x[c][i][2], x[c][i][3]);
            }
        }
#pragma unroll
        for (int i = 0; i < tiles; ++i) {
#pragma unroll
            for (int j = 0; j < 4; ++j) sums[4 * i + j] = fmaf(scale, parts[0][i][j] + parts[1][i][j], sums[4 * i + j]);
        }
    }
}

#endif

}  // namespace linear_tiles
}  // namespace mla
