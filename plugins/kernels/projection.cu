#include "projection.h"

#include <algorithm>

#include "early.cuh"
#include "mma.cuh"
#include "projection_values.cuh"

namespace mla {
namespace {

// The token that `map` gives for a product, -1 where there is none.
__device__ int64_t mapped(const int32_t* map, int64_t token, int64_t tokens) {
    if (token >= tokens) return -1;
    return map == nullptr ? token : map[token];
}

// ---- tensor cores -----------------------------------------------------------------------------------------------------------
//
// Weights lie in shared memory as they came and become bf16 when fragments are made. The order of k within a product of
// m16n8k16 is free as long as both operands have the same: of 64 columns lane 4 g + t holds 16 t to 16 t + 15 of its rows,
// four of them in each of four products, so that it reads 16 bytes at a time. The order of n is free too: a lane's outputs of
// all its products lie side by side and are written at once.

constexpr int chunk = 64;  // columns whose products are summed from zero
constexpr int tile_rows = 64;  // outputs at a time; divides 128, so that they have one scale
constexpr int most_stages = 4;

template <int tokens>
struct Tile {
    static constexpr bool few = tokens < 32;
    // warps: along tokens and along outputs
    static constexpr int token_warps = few ? 1 : tokens / 32, row_warps = few ? 4 : 2;
    static constexpr int threads = token_warps * row_warps * warp_size;
    static constexpr int blocks = few ? 8 : 512 / threads;  // of a multiprocessor
    static constexpr int warp_tokens = tokens / token_warps, warp_rows = tile_rows / row_warps;
    static constexpr int m_tiles = warp_tokens / 16, n_tiles = warp_rows / 8;
    static constexpr int x_bytes = tokens * step_columns * 2;
    static constexpr int x_units = tokens * unit_lanes / threads;  // of a thread
};

template <int32_t type>
constexpr int w_bytes = tile_rows * step_columns * element_bytes(type);

// How a block goes about it. Dynamic shared memory: x_slots of x, stages of w, x_slots of x's scales, stages of w's scale.
struct Plan {
    int row_tiles;  // of a block, one after the other, with the same x
    int stages;  // tiles of w in shared memory, at most most_stages
    int x_slots;  // tiles of x there: as many as w has, or all where there are several row tiles
    bool x_aligned, w_aligned, out_aligned;  // may be read and written 16 bytes at a time
};

// Byte of a 16-byte unit in a tile of rows of 128 values: eight lanes that read fragments together, at four columns of two
// rows that follow each other, meet no bank twice.
template <int value_bytes>
__device__ int place(int row, int unit) {
    int const key = value_bytes == 1 ? (row & 1) << 2 : value_bytes == 2 ? row & 1 : (row & 1) | (unit >> 2 & 2);
    return (row * (step_columns * value_bytes / 16) + (unit ^ key)) * 16;
}

// 16 bytes of values one by one; `count` of them exist, the rest are zero.
template <int value_bytes>
__device__ uint4 gather(const void* from, int count) {
    uint32_t words[4] = {};
#pragma unroll
    for (int i = 0; i < 16 / value_bytes; ++i) {
        if (i >= count) continue;
        uint32_t value;
        if constexpr (value_bytes == 1) value = static_cast<const uint8_t*>(from)[i];
        if constexpr (value_bytes == 2) value = static_cast<const uint16_t*>(from)[i];
        if constexpr (value_bytes == 4) value = static_cast<const uint32_t*>(from)[i];
        words[i * value_bytes / 4] |= value << i * value_bytes % 4 * 8;
    }
    return make_uint4(words[0], words[1], words[2], words[3]);
}

// What lane 4 g + t holds of a row of w for the four products over a chunk.
template <int32_t type>
__device__ void w_fragments(const uint8_t* tile, int row, int chunk_index, int t, uint32_t (&b)[4][2]) {
    constexpr int bytes = element_bytes(type);
    uint4 units[bytes];
#pragma unroll
    for (int i = 0; i < bytes; ++i) {
        units[i] = *reinterpret_cast<const uint4*>(tile + place<bytes>(row, (4 * chunk_index + t) * bytes + i));
    }
    if constexpr (type == MLA_FLOAT8E4M3FN) {
        uint32_t const words[4] = {units[0].x, units[0].y, units[0].z, units[0].w};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            uint2 const values = decode_e4m3x4(words[j]);
            b[j][0] = values.x;
            b[j][1] = values.y;
        }
    } else if constexpr (type == MLA_FLOAT) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            b[j][0] = pack(__uint_as_float(units[j].x), __uint_as_float(units[j].y));
            b[j][1] = pack(__uint_as_float(units[j].z), __uint_as_float(units[j].w));
        }
    } else {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            if constexpr (type == MLA_FLOAT16) {
                float values[8];
                unpack(units[i], type, values);
                units[i] = pack(values);
            }
            b[2 * i][0] = units[i].x;
            b[2 * i][1] = units[i].y;
            b[2 * i + 1][0] = units[i].z;
            b[2 * i + 1][1] = units[i].w;
        }
    }
}

// `count` of `n` values that follow each other. `aligned`: 16 bytes, or those of all values, may be written at once.
template <int n>
__device__ void store_run(void* data, int32_t type, int64_t index, float const (&v)[n], int count, bool aligned) {
    bool const whole = aligned && count >= n;
    if (type == MLA_FLOAT) {
        float* const to = static_cast<float*>(data) + index;
#pragma unroll
        for (int i = 0; i < n; i += 4) {
            if (whole) {
                *reinterpret_cast<float4*>(to + i) = make_float4(v[i], v[i + 1], v[i + 2], v[i + 3]);
            } else {
#pragma unroll
                for (int k = i; k < i + 4; ++k) {
                    if (k < count) to[k] = v[k];
                }
            }
        }
        return;
    }
    uint32_t words[n / 2];
#pragma unroll
    for (int i = 0; i < n / 2; ++i) {
        __half2 const pair = __floats2half2_rn(v[2 * i], v[2 * i + 1]);
        words[i] = type == MLA_FLOAT16 ? reinterpret_cast<const uint32_t&>(pair) : pack(v[2 * i], v[2 * i + 1]);
    }
    uint16_t* const to = static_cast<uint16_t*>(data) + index;
    if (!whole) {
#pragma unroll
        for (int i = 0; i < n; ++i) {
            if (i < count) to[i] = static_cast<uint16_t>(words[i / 2] >> i % 2 * 16);
        }
    } else if constexpr (n == 8) {
        *reinterpret_cast<uint4*>(to) = make_uint4(words[0], words[1], words[2], words[3]);
    } else {
        *reinterpret_cast<uint2*>(to) = make_uint2(words[0], words[1]);
    }
}

// Waits until at most `pending` of the thread's groups of copies are under way.
__device__ void wait_for_copies(int pending) {
    static_assert(most_stages == 4);
    switch (pending) {
        case 0: copy_async_wait<0>(); break;
        case 1: copy_async_wait<1>(); break;
        case 2: copy_async_wait<2>(); break;
        default: copy_async_wait<3>();
    }
}

// An item of a block's work, 64 outputs over 128 columns, and where its operands lie in shared memory.
struct Item {
    int row, step = 0, stage = 0;

    __device__ explicit Item(int first_row) : row(first_row) {}
    __device__ void next(int steps, int stages) {
        if (++stage == stages) stage = 0;
        if (++step == steps) {
            step = 0;
            row += tile_rows;
        }
    }
    __device__ int x_slot(const Plan& plan) const { return plan.row_tiles == 1 ? stage : step; }
};

// Block: `tile_tokens` tokens x row_tiles times 64 outputs of one head. Copies for the next items are under way during the
// products of one. Each thread makes codes of the x that it copied itself, in place.
template <int tile_tokens, int32_t w_type>
__global__ void __launch_bounds__(Tile<tile_tokens>::threads, Tile<tile_tokens>::blocks)
    project_kernel(Projection work, Plan plan) {
    using T = Tile<tile_tokens>;
    constexpr int value_bytes = element_bytes(w_type);
    if (work.order != KernelOrder::leading) let_next_kernel_begin();
    extern __shared__ __align__(128) uint8_t memory[];
    uint8_t* const x_tiles = memory;
    uint8_t* const w_tiles = x_tiles + plan.x_slots * T::x_bytes;
    auto* const x_scales = reinterpret_cast<float*>(w_tiles + plan.stages * w_bytes<w_type>);
    float* const w_scales = x_scales + plan.x_slots * tile_tokens;

    int const head = blockIdx.z;
    int64_t const first_token = static_cast<int64_t>(blockIdx.y) * tile_tokens;
    int const warp = threadIdx.x / warp_size, lane = threadIdx.x % warp_size, g = lane / 4, t = lane % 4;
    int const token_warp = warp / T::row_warps, row_warp = warp % T::row_warps;
    int const steps = ceil_div(work.columns, step_columns);
    int const first_row = blockIdx.x * plan.row_tiles * tile_rows;
    int const end_row = min(first_row + plan.row_tiles * tile_rows, work.rows);
    bool const convert = work.quantize_x || work.x.type != MLA_BFLOAT16;

    // This thread's part of x: eight columns of every so many tokens.
    constexpr int x_stride = T::threads / unit_lanes;
    int const x_unit = threadIdx.x % unit_lanes, x_row = threadIdx.x / unit_lanes;
    auto x_count = [&](int step) { return work.columns - step * step_columns - x_unit * 8; };  // columns from there on
    auto x_index = [&](int step, int i) {  // -1: zeros
        int64_t const token = mapped(work.x_tokens, first_token + x_row + i * x_stride, work.tokens);
        return token < 0 || x_count(step) <= 0
                   ? -1
                   : token * work.x.token_stride + head * work.x.head_stride + step * step_columns + x_unit * 8;
    };
    auto x_place = [&](const Item& item, int i) {
        return x_tiles + item.x_slot(plan) * T::x_bytes + place<2>(x_row + i * x_stride, x_unit);
    };
    auto load_x = [&](const Item& item) {
        if (work.x.type == MLA_FLOAT) return;  // takes more room than a slot has
        const auto* x = static_cast<const uint16_t*>(work.x.data);
        if (plan.x_aligned) {
#pragma unroll
            for (int i = 0; i < T::x_units; ++i) {
                int64_t const index = x_index(item.step, i);
                copy_async_16(shared_address(x_place(item, i)), index < 0 ? x : x + index, index >= 0);
            }
        } else {
#pragma unroll 1
            for (int i = 0; i < T::x_units; ++i) {
                int64_t const index = x_index(item.step, i);
                *reinterpret_cast<uint4*>(x_place(item, i)) = gather<2>(x + index, index < 0 ? 0 : x_count(item.step));
            }
        }
    };
    auto convert_x = [&](const Item& item) {
#pragma unroll 2
        for (int i = 0; i < T::x_units; ++i) {
            if (first_token + x_row / 2 * 2 + i * x_stride >= work.tokens) break;  // a warp's two rows, whose products nobody reads
            auto* const at = reinterpret_cast<uint4*>(x_place(item, i));
            float v[8];
            if (work.x.type == MLA_FLOAT) {
                int64_t const index = x_index(item.step, i);
                const float* const x = static_cast<const float*>(work.x.data) + index;
                int const count = index < 0 ? 0 : x_count(item.step);
#pragma unroll
                for (int k = 0; k < 8; k += 4) {
                    float4 four = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
                    if (plan.x_aligned && k < count) {
                        four = *reinterpret_cast<const float4*>(x + k);
                    } else {
                        if (k < count) four.x = x[k];
                        if (k + 1 < count) four.y = x[k + 1];
                        if (k + 2 < count) four.z = x[k + 2];
                        if (k + 3 < count) four.w = x[k + 3];
                    }
                    v[k] = four.x, v[k + 1] = four.y, v[k + 2] = four.z, v[k + 3] = four.w;
                }
            } else {
                unpack(*at, work.x.type, v);
            }
            if (work.quantize_x) {
                float scale;
                *at = quantize_eight(v, &scale);
                if (x_unit == 0) x_scales[item.x_slot(plan) * tile_tokens + x_row + i * x_stride] = scale;
            } else {
                *at = pack(v);
            }
        }
    };
    auto load_w = [&](const Item& item) {
        constexpr int row_units = step_columns * value_bytes / 16, units = tile_rows * row_units / T::threads;
        constexpr int stride = T::threads / row_units;  // even: the places of a thread's units differ by a constant
        int const unit = threadIdx.x % row_units, line = threadIdx.x / row_units;
        int const row = item.row + line, column = item.step * step_columns + unit * (16 / value_bytes);
        int const count = work.columns - column;
        uint8_t* const to = w_tiles + item.stage * w_bytes<w_type> + place<value_bytes>(line, unit);
        const uint8_t* from = static_cast<const uint8_t*>(work.w) +
                              ((static_cast<int64_t>(head) * work.rows + row) * work.columns + column) * value_bytes;
        int64_t const advance = static_cast<int64_t>(stride * value_bytes) * work.columns;
        if (work.w_scale != nullptr && threadIdx.x == 0) {
            int64_t const scale_rows = ceil_div(work.rows, scale_group), scale_row = item.row / scale_group;
            copy_async_4(shared_address(w_scales + item.stage), work.w_scale + (head * scale_rows + scale_row) * steps + item.step);
        }
        if (plan.w_aligned) {
#pragma unroll
            for (int i = 0; i < units; ++i, from += advance) {
                bool const valid = count > 0 && row + i * stride < work.rows;
                copy_async_16(shared_address(to + i * stride * row_units * 16), valid ? from : work.w, valid);
            }
        } else {
#pragma unroll 1
            for (int i = 0; i < units; ++i, from += advance) {
                *reinterpret_cast<uint4*>(to + i * stride * row_units * 16) =
                    gather<value_bytes>(from, row + i * stride < work.rows ? count : 0);
            }
        }
    };

    float sums[T::m_tiles][T::n_tiles][4] = {};
    auto store_sums = [&](int first_output) {
#pragma unroll
        for (int m = 0; m < T::m_tiles; ++m) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                int const line = token_warp * T::warp_tokens + m * 16 + g + half * 8;
                int64_t const token = mapped(work.out_tokens, first_token + line, work.tokens);
                float run[2 * T::n_tiles];
#pragma unroll
                for (int i = 0; i < 2 * T::n_tiles; ++i) {
                    run[i] = sums[m][i / 2][2 * half + i % 2];
                    sums[m][i / 2][2 * half + i % 2] = 0.0f;
                }
                int const row = first_output + row_warp * T::warp_rows + t * (2 * T::n_tiles);
                if (token >= 0) {
                    store_run(work.out.data, work.out.type,
                              token * work.out.token_stride + head * work.out.head_stride + row, run, work.rows - row,
                              plan.out_aligned);
                }
            }
        }
    };
    // The first weights need not wait for the kernel before.
    Item item(first_row), ahead(first_row), with_x(first_row);
    for (int i = 0; i < plan.stages && ahead.row < end_row; ++i, ahead.next(steps, plan.stages)) load_w(ahead);
    if (work.order != KernelOrder::beside) wait_for_kernel_before();
    if (work.order == KernelOrder::leading) let_next_kernel_begin();
    for (int i = 0; i < plan.stages; ++i, with_x.next(steps, plan.stages)) {
        if (with_x.row == first_row) load_x(with_x);
        copy_async_commit();  // a group for every item, be it empty
    }
    for (; item.row < end_row; item.next(steps, plan.stages)) {
        wait_for_copies(plan.stages - 1);
        if (convert && item.row == first_row) convert_x(item);
        __syncthreads();
        const uint8_t* const x_tile = x_tiles + item.x_slot(plan) * T::x_bytes;
        const uint8_t* const w_tile = w_tiles + item.stage * w_bytes<w_type>;
        const float* const scales = x_scales + item.x_slot(plan) * tile_tokens;
        float const w_factor = work.w_scale == nullptr ? 1.0f : w_scales[item.stage];
        int const chunks = min(ceil_div(work.columns - item.step * step_columns, chunk), step_columns / chunk);
#pragma unroll 1
        for (int c = 0; c < chunks; ++c) {
            uint32_t b[T::n_tiles][4][2];
#pragma unroll
            for (int n = 0; n < T::n_tiles; ++n) {
                // outputs 2 t, 2 t + 1 of the n-th product are 2 n, 2 n + 1 of those that lane t has in all
                int const row = row_warp * T::warp_rows + g / 2 * (2 * T::n_tiles) + 2 * n + g % 2;
                w_fragments<w_type>(w_tile, row, c, t, b[n]);
            }
#pragma unroll
            for (int m = 0; m < T::m_tiles; ++m) {
                int const row = token_warp * T::warp_tokens + m * 16 + g;
                float products[T::n_tiles][4] = {};
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    int const unit = 8 * c + 2 * t + i;
                    uint4 const low = *reinterpret_cast<const uint4*>(x_tile + place<2>(row, unit));
                    uint4 const high = *reinterpret_cast<const uint4*>(x_tile + place<2>(row + 8, unit));
                    uint32_t const a[2][4] = {{low.x, high.x, low.y, high.y}, {low.z, high.z, low.w, high.w}};
#pragma unroll
                    for (int j = 0; j < 2; ++j) {
#pragma unroll
                        for (int n = 0; n < T::n_tiles; ++n) {
                            mma_bf16(products[n], a[j], b[n][2 * i + j][0], b[n][2 * i + j][1]);
                        }
                    }
                }
                float factor[2] = {w_factor, w_factor};
                if (work.quantize_x) {
                    factor[0] *= scales[row];
                    factor[1] *= scales[row + 8];
                }
#pragma unroll
                for (int n = 0; n < T::n_tiles; ++n) {
#pragma unroll
                    for (int i = 0; i < 4; ++i) sums[m][n][i] += factor[i / 2] * products[n][i];
                }
            }
        }
        __syncthreads();
        if (ahead.row < end_row) {
            load_w(ahead);
            if (ahead.row == first_row) load_x(ahead);
            ahead.next(steps, plan.stages);
        }
        copy_async_commit();
        if (item.step == steps - 1) store_sums(item.row);
    }
    if (work.order == KernelOrder::beside) end_after_kernel_before();
}

template <int tile_tokens, int32_t w_type>
int launch_typed(const Projection& work, const Device& device, cudaStream_t stream) {
    using T = Tile<tile_tokens>;
    constexpr int x_slot = T::x_bytes + tile_tokens * 4, w_stage = w_bytes<w_type> + 4;  // with their scales
    constexpr int warps = 15;  // of a multiprocessor, below the 16 that fit, so that a wave need not be quite full
    int const budget = device.shared_bytes / 2 - 1024;  // two blocks, each with what the system takes
    int const steps = ceil_div(work.columns, step_columns), row_tiles = ceil_div(work.rows, tile_rows);
    int64_t const token_tiles = ceil_div<int64_t>(work.tokens, tile_tokens);
    Plan plan{};
    plan.row_tiles = 1;
    // Each block makes its own codes of x: few blocks with many tiles where that leaves the GPU full.
    if (!T::few && steps <= (budget - 2 * w_stage) / x_slot) {
        int64_t const all = row_tiles * token_tiles * work.heads * (T::threads / warp_size);
        plan.row_tiles = static_cast<int>(std::clamp<int64_t>(all / (warps * device.multiprocessors), 1, row_tiles));
    }
    if (plan.row_tiles == 1) {
        plan.stages = std::min(steps, budget / (x_slot + w_stage));
    } else {
        plan.stages = std::min(steps * plan.row_tiles, (budget - steps * x_slot) / w_stage);
    }
    plan.stages = std::clamp(plan.stages, 1, most_stages);
    plan.x_slots = plan.row_tiles == 1 ? plan.stages : steps;
    plan.x_aligned = work.columns % 8 == 0 &&
                     aligned_for_eight(work.x.data, work.x.token_stride, work.x.head_stride, work.x.type);
    plan.w_aligned = reinterpret_cast<uintptr_t>(work.w) % 16 == 0 && work.columns * element_bytes(w_type) % 16 == 0;
    plan.out_aligned = aligned_for_eight(work.out.data, work.out.token_stride, work.out.head_stride, work.out.type);

    int const shared = plan.x_slots * x_slot + plan.stages * w_stage;
    auto* const kernel = project_kernel<tile_tokens, w_type>;
    if (int status = check_cuda("product with W_UK or W_UV",
                                cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                     cudaFuncAttributeMaxDynamicSharedMemorySize, shared))) {
        return status;
    }
    dim3 const grid(ceil_div(row_tiles, plan.row_tiles), static_cast<unsigned>(token_tiles), work.heads);
    return launch_early("product with W_UK or W_UV", kernel, grid, T::threads, shared, device, stream, work, plan);
}

template <int tile_tokens>
int launch(const Projection& work, const Device& device, cudaStream_t stream) {
    switch (work.w_type) {
        case MLA_FLOAT: return launch_typed<tile_tokens, MLA_FLOAT>(work, device, stream);
        case MLA_FLOAT16: return launch_typed<tile_tokens, MLA_FLOAT16>(work, device, stream);
        case MLA_BFLOAT16: return launch_typed<tile_tokens, MLA_BFLOAT16>(work, device, stream);
        default: return launch_typed<tile_tokens, MLA_FLOAT8E4M3FN>(work, device, stream);
    }
}

// ---- plain cores ------------------------------------------------------------------------------------------------------------

constexpr int exact_tile = 64, exact_chunk = 16, exact_threads = 256;

// Block: 64 tokens x 64 outputs of one head, 4 x 4 a thread.
__global__ void __launch_bounds__(exact_threads) project_exact_kernel(Projection work) {
    __shared__ float x_tile[exact_chunk][exact_tile + 1], w_tile[exact_chunk][exact_tile + 1], x_scales[exact_tile];
    int const head = blockIdx.z, first_row = blockIdx.x * exact_tile;
    int64_t const first_token = static_cast<int64_t>(blockIdx.y) * exact_tile;
    int const tx = threadIdx.x % 16, ty = threadIdx.x / 16;
    int const scale_rows = ceil_div(work.rows, scale_group), scale_columns = ceil_div(work.columns, scale_group);
    auto load_x = [&](int line, int column) {
        int64_t const token = mapped(work.x_tokens, first_token + line, work.tokens);
        return column < work.columns && token >= 0
                   ? load_float(work.x.data, work.x.type, token * work.x.token_stride + head * work.x.head_stride + column)
                   : 0.0f;
    };
    float sums[4][4] = {};
    for (int column = 0; column < work.columns; column += exact_chunk) {
        if (work.quantize_x && column % scale_group == 0) {
            for (int line = threadIdx.x / warp_size; line < exact_tile; line += exact_threads / warp_size) {
                float amax = 0.0f;
                for (int k = threadIdx.x % warp_size; k < scale_group; k += warp_size) {
                    amax = fmaxf(amax, fabsf(load_x(line, column + k)));
                }
                x_scales[line] = divide(fminf(warp_max(amax), activation_bound), e4m3_max);
            }
            __syncthreads();
        }
        for (int i = threadIdx.x; i < exact_tile * exact_chunk; i += exact_threads) {
            int const k = i % exact_chunk, line = i / exact_chunk;
            float x = load_x(line, column + k), w = 0.0f;
            if (work.quantize_x) {
                float const scale = x_scales[line];
                x = scale == 0.0f ? 0.0f : decode_e4m3(encode_e4m3(divide(x, scale))) * scale;
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

int launch_exact(const Projection& work, cudaStream_t stream) {
    dim3 const grid(ceil_div(work.rows, exact_tile), static_cast<unsigned>(ceil_div<int64_t>(work.tokens, exact_tile)),
                    work.heads);
    project_exact_kernel<<<grid, exact_threads, 0, stream>>>(work);
    return MLA_OK;
}

// Tokens of a block: 128 where that leaves no multiprocessor without one, so that weights are read as seldom as can be.
int choose_tile(const Projection& work, const Device& device) {
    if (work.tokens <= 16) return 16;
    int64_t const blocks = ceil_div<int64_t>(work.tokens, 128) * ceil_div(work.rows, tile_rows) * work.heads;
    return work.tokens <= 64 || blocks < device.multiprocessors ? 64 : 128;
}

constexpr int64_t grid_y = 65535;

}  // namespace

int project(const Projection& whole, cudaStream_t stream) {
    if (whole.rows == 0 || whole.heads == 0) return MLA_OK;
    Device device;
    if (int status = current_device(&device)) return status;
    if (whole.tokens > 0 && project_takes_hopper(whole, device)) {
        if (int status = project_hopper(whole, device, stream)) return status;
        return check_launch("product with W_UK or W_UV");
    }
    bool const exact = whole.exact || whole.columns == 0;  // outputs of no columns are zero
    int const tile = exact ? exact_tile : choose_tile(whole, device);
    for (int64_t first = 0; first < whole.tokens; first += grid_y * tile) {
        Projection work = whole;
        work.tokens = std::min(whole.tokens - first, grid_y * tile);
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
        int const status = exact        ? launch_exact(work, stream)
                           : tile == 16 ? launch<16>(work, device, stream)
                           : tile == 64 ? launch<64>(work, device, stream)
                                        : launch<128>(work, device, stream);
        if (status != MLA_OK) return status;
    }
    return check_launch("product with W_UK or W_UV");
}

}  // namespace mla
