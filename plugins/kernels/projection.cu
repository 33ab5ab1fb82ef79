#include "projection.h"

#include "device.cuh"
#include "mma.cuh"

namespace mla {
namespace {

constexpr float activation_bound = 1200.0f;

// The token that `map` gives for a product, -1 where there is none.
__device__ int64_t mapped(const int32_t* map, int64_t token, int64_t tokens) {
    if (token >= tokens) return -1;
    return map == nullptr ? token : map[token];
}

// ---- tensor cores -----------------------------------------------------------------------------------------------------------

constexpr int chunk = 64;  // columns of a step; divides 128, so that a step has one scale
constexpr int tile_rows = 64;  // outputs of a block
constexpr int mma_threads = 128;

// Block: `tile_tokens` tokens x 64 outputs of one head. Both tiles pass through registers, where they become bf16, into two
// shared buffers in turn: the loads of a step are in flight during the products of the one before.
template <int tile_tokens>
__global__ void __launch_bounds__(mma_threads) project_kernel(Projection work, bool x_aligned, bool w_aligned) {
    // warps: along tokens and along outputs
    constexpr int token_warps = tile_tokens >= 32 ? 2 : 1, row_warps = 4 / token_warps;
    constexpr int m_tiles = tile_tokens / token_warps / 16, n_pairs = tile_rows / row_warps / 16;
    constexpr int x_units = ceil_div(tile_tokens * chunk / 8, mma_threads), w_units = tile_rows * chunk / 8 / mma_threads;
    __shared__ __align__(128) uint8_t x_tiles[2][tile_tokens * chunk * 2];
    __shared__ __align__(128) uint8_t w_tiles[2][tile_rows * chunk * 2];

    int const head = blockIdx.z, first_row = blockIdx.x * tile_rows;
    int64_t const first_token = static_cast<int64_t>(blockIdx.y) * tile_tokens;
    int const warp = threadIdx.x / warp_size, lane = threadIdx.x % warp_size;
    int const token_warp = warp / row_warps, row_warp = warp % row_warps;
    int const steps = ceil_div(work.columns, chunk);
    int const scale_columns = ceil_div(work.columns, scale_group);
    const float* w_scale = work.w_scale == nullptr
                               ? nullptr
                               : work.w_scale + (static_cast<int64_t>(head) * ceil_div(work.rows, scale_group) +
                                                 first_row / scale_group) *
                                                    scale_columns;

    uint4 x_next[x_units], w_next[w_units];
    auto load = [&](int step) {
#pragma unroll
        for (int i = 0; i < x_units; ++i) {
            int const unit = threadIdx.x + i * mma_threads, row = unit / (chunk / 8);
            int const column = step * chunk + unit % (chunk / 8) * 8;
            int64_t const token = row < tile_tokens ? mapped(work.x_tokens, first_token + row, work.tokens) : -1;
            x_next[i] = load_eight(work.x.data, work.x.type,
                                   token * work.x.token_stride + head * work.x.head_stride + column,
                                   token >= 0 ? work.columns - column : 0, x_aligned);
        }
#pragma unroll
        for (int i = 0; i < w_units; ++i) {
            int const unit = threadIdx.x + i * mma_threads, row = first_row + unit / (chunk / 8);
            int const column = step * chunk + unit % (chunk / 8) * 8;
            w_next[i] = load_eight(work.w, work.w_type,
                                   (static_cast<int64_t>(head) * work.rows + row) * work.columns + column,
                                   row < work.rows ? work.columns - column : 0, w_aligned);
        }
    };
    auto store = [&](int buffer) {
#pragma unroll
        for (int i = 0; i < x_units; ++i) {
            int const unit = threadIdx.x + i * mma_threads, row = unit / (chunk / 8);
            if (row < tile_tokens) {
                *reinterpret_cast<uint4*>(x_tiles[buffer] + swizzled(row, unit % (chunk / 8) * 8, chunk)) = x_next[i];
            }
        }
#pragma unroll
        for (int i = 0; i < w_units; ++i) {
            int const unit = threadIdx.x + i * mma_threads;
            *reinterpret_cast<uint4*>(w_tiles[buffer] + swizzled(unit / (chunk / 8), unit % (chunk / 8) * 8, chunk)) =
                w_next[i];
        }
    };

    float sums[m_tiles][2 * n_pairs][4] = {};
    load(0);
    store(0);
    __syncthreads();
    for (int step = 0; step < steps; ++step) {
        int const buffer = step % 2;
        if (step + 1 < steps) load(step + 1);
        float products[m_tiles][2 * n_pairs][4] = {};
        uint32_t const x_base = shared_address(x_tiles[buffer]), w_base = shared_address(w_tiles[buffer]);
#pragma unroll
        for (int k = 0; k < chunk; k += 16) {
            uint32_t a[m_tiles][4];
#pragma unroll
            for (int m = 0; m < m_tiles; ++m) {
                int const row = token_warp * (tile_tokens / token_warps) + m * 16 + lane % 16;
                ldmatrix_x4(a[m], x_base + swizzled(row, k + lane / 16 * 8, chunk));
            }
#pragma unroll
            for (int n = 0; n < n_pairs; ++n) {
                uint32_t b[4];
                int const row = row_warp * (tile_rows / row_warps) + n * 16 + lane % 8 + lane / 16 * 8;
                ldmatrix_x4(b, w_base + swizzled(row, k + lane / 8 % 2 * 8, chunk));
#pragma unroll
                for (int m = 0; m < m_tiles; ++m) {
                    mma_bf16(products[m][2 * n], a[m], b[0], b[1]);
                    mma_bf16(products[m][2 * n + 1], a[m], b[2], b[3]);
                }
            }
        }
        int const group = step * chunk / scale_group;
        float const w_factor = w_scale == nullptr ? 1.0f : w_scale[group];
#pragma unroll
        for (int m = 0; m < m_tiles; ++m) {
            float factor[2] = {w_factor, w_factor};
            if (work.x_scale != nullptr) {
                for (int half = 0; half < 2; ++half) {
                    int64_t const token =
                        first_token + token_warp * (tile_tokens / token_warps) + m * 16 + lane / 4 + half * 8;
                    if (token < work.tokens) {
                        factor[half] *= work.x_scale[(token * work.heads + head) * scale_columns + group];
                    }
                }
            }
#pragma unroll
            for (int n = 0; n < 2 * n_pairs; ++n) {
#pragma unroll
                for (int i = 0; i < 4; ++i) sums[m][n][i] += factor[i / 2] * products[m][n][i];
            }
        }
        if (step + 1 < steps) store(1 - buffer);
        __syncthreads();
    }
#pragma unroll
    for (int m = 0; m < m_tiles; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            int64_t const token = mapped(
                work.out_tokens, first_token + token_warp * (tile_tokens / token_warps) + m * 16 + lane / 4 + half * 8,
                work.tokens);
            if (token < 0) continue;
            int64_t const base = token * work.out.token_stride + head * work.out.head_stride;
#pragma unroll
            for (int n = 0; n < 2 * n_pairs; ++n) {
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    int const row = first_row + row_warp * (tile_rows / row_warps) + n * 8 + lane % 4 * 2 + i;
                    if (row < work.rows) {
                        store_float(work.out.data, work.out.type, base + row, sums[m][n][2 * half + i]);
                    }
                }
            }
        }
    }
}

// ---- plain cores ------------------------------------------------------------------------------------------------------------

constexpr int exact_tile = 64, exact_chunk = 16, exact_threads = 256;

// Block: 64 tokens x 64 outputs of one head, 4 x 4 a thread.
__global__ void __launch_bounds__(exact_threads) project_exact_kernel(Projection work) {
    __shared__ float x_tile[exact_chunk][exact_tile + 1], w_tile[exact_chunk][exact_tile + 1];
    int const head = blockIdx.z, first_row = blockIdx.x * exact_tile;
    int64_t const first_token = static_cast<int64_t>(blockIdx.y) * exact_tile;
    int const tx = threadIdx.x % 16, ty = threadIdx.x / 16;
    int const scale_rows = ceil_div(work.rows, scale_group), scale_columns = ceil_div(work.columns, scale_group);
    float sums[4][4] = {};
    for (int column = 0; column < work.columns; column += exact_chunk) {
        for (int i = threadIdx.x; i < exact_tile * exact_chunk; i += exact_threads) {
            int const k = i % exact_chunk, line = i / exact_chunk;
            int64_t const token = mapped(work.x_tokens, first_token + line, work.tokens);
            float x = 0.0f, w = 0.0f;
            if (column + k < work.columns && token >= 0) {
                x = load_float(work.x.data, work.x.type,
                               token * work.x.token_stride + head * work.x.head_stride + column + k);
                if (work.x_scale != nullptr) {
                    x *= work.x_scale[(token * work.heads + head) * scale_columns + (column + k) / scale_group];
                }
            }
            int const row = first_row + line;
            if (column + k < work.columns && row < work.rows) {
                w = load_float(work.w, work.w_type,
                               (static_cast<int64_t>(head) * work.rows + row) * work.columns + column + k);
                if (work.w_scale != nullptr) {
                    w *= work.w_scale[(static_cast<int64_t>(head) * scale_rows + row / scale_group) * scale_columns +
                                      (column + k) / scale_group];
                }
            }
            x_tile[k][line] = x;
            w_tile[k][line] = w;
        }
        __syncthreads();
#pragma unroll
        for (int k = 0; k < exact_chunk; ++k) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
#pragma unroll
                for (int j = 0; j < 4; ++j) sums[i][j] += x_tile[k][ty + 16 * i] * w_tile[k][tx + 16 * j];
            }
        }
        __syncthreads();
    }
    for (int i = 0; i < 4; ++i) {
        for (int j = 0; j < 4; ++j) {
            int64_t const token = mapped(work.out_tokens, first_token + ty + 16 * i, work.tokens);
            int const row = first_row + tx + 16 * j;
            if (token >= 0 && row < work.rows) {
                store_float(work.out.data, work.out.type,
                            token * work.out.token_stride + head * work.out.head_stride + row, sums[i][j]);
            }
        }
    }
}

// A warp for each (token, head, group).
__global__ void quantize_groups_kernel(View x, int64_t total, int32_t heads, int32_t columns, int32_t groups,
                                       uint8_t* codes, float* scales) {
    int64_t const item = (blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x) / warp_size;
    if (item >= total) return;
    int const lane = threadIdx.x % warp_size;
    int const group = static_cast<int>(item % groups);
    int64_t const token = item / groups / heads;
    int const head = static_cast<int>(item / groups % heads);
    int64_t const base = token * x.token_stride + head * x.head_stride;
    float values[scale_group / warp_size];
    float amax = 0.0f;
    for (int i = 0; i < scale_group / warp_size; ++i) {
        int const column = group * scale_group + lane + i * warp_size;
        values[i] = column < columns ? load_float(x.data, x.type, base + column) : 0.0f;
        amax = fmaxf(amax, fabsf(values[i]));
    }
    float const scale = divide(fminf(warp_max(amax), activation_bound), e4m3_max);
    for (int i = 0; i < scale_group / warp_size; ++i) {
        int const column = group * scale_group + lane + i * warp_size;
        if (column < columns) {
            codes[(token * heads + head) * columns + column] =
                scale == 0.0f ? uint8_t{0} : encode_e4m3(divide(values[i], scale));
        }
    }
    if (lane == 0) scales[item] = scale;
}

template <int tile_tokens>
void launch(const Projection& work, cudaStream_t stream) {
    dim3 const grid(ceil_div(work.rows, tile_rows), static_cast<unsigned>(ceil_div<int64_t>(work.tokens, tile_tokens)),
                    work.heads);
    bool const x_aligned = aligned_for_eight(work.x.data, work.x.token_stride, work.x.head_stride, work.x.type);
    bool const w_aligned = aligned_for_eight(work.w, work.columns, work.columns, work.w_type);
    project_kernel<tile_tokens><<<grid, mma_threads, 0, stream>>>(work, x_aligned, w_aligned);
}

constexpr int64_t grid_y = 65535;

}  // namespace

int project(const Projection& whole, cudaStream_t stream) {
    if (whole.rows == 0 || whole.heads == 0) return MLA_OK;
    int const tile = whole.exact ? exact_tile : whole.tokens <= 16 ? 16 : 64;
    for (int64_t first = 0; first < whole.tokens; first += grid_y * tile) {
        Projection work = whole;
        work.tokens = whole.tokens - first < grid_y * tile ? whole.tokens - first : grid_y * tile;
        if (whole.x_tokens != nullptr) {
            work.x_tokens += first;
        } else {
            work.x.data = whole.x.from(first * whole.x.token_stride).data;
        }
        if (whole.out_tokens != nullptr) {
            work.out_tokens += first;
        } else {
            work.out.data = whole.out.from(first * whole.out.token_stride).data;
        }
        if (whole.x_scale != nullptr) {
            work.x_scale = whole.x_scale + first * whole.heads * ceil_div(whole.columns, scale_group);
        }
        if (work.exact) {
            dim3 const grid(ceil_div(work.rows, exact_tile),
                            static_cast<unsigned>(ceil_div<int64_t>(work.tokens, exact_tile)), work.heads);
            project_exact_kernel<<<grid, exact_threads, 0, stream>>>(work);
        } else if (tile == 16) {
            launch<16>(work, stream);
        } else {
            launch<64>(work, stream);
        }
    }
    return check_launch("product with W_UK or W_UV");
}

int quantize_groups(const View& x, int64_t tokens, int32_t heads, int32_t columns, uint8_t* codes, float* scales,
                    cudaStream_t stream) {
    constexpr int threads = 256;
    int32_t const groups = ceil_div(columns, scale_group);
    int64_t const total = tokens * heads * groups;
    if (total == 0) return MLA_OK;
    quantize_groups_kernel<<<static_cast<unsigned>(ceil_div<int64_t>(total * warp_size, threads)), threads, 0, stream>>>(
        x, total, heads, columns, groups, codes, scales);
    return check_launch("quantisation of activations");
}

}  // namespace mla
