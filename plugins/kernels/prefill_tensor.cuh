// Prefill on tensor cores, bf16 with f32 sums: one cooperative kernel whose blocks stay on the device and walk through the
// step's keys together, because only the device knows the lengths.
//
// The keys of all sequences that are served lie behind each other in tiles of 64, each sequence starting a tile. For a group
// of heads and a chunk of key tiles, with a grid barrier after each stage:
//   gather   pool rows to bf16 latents and rope keys, and which keys exist
//   expand   [W_UK; W_UV] latent to keys and values of the group's heads
//   attend   units (query tile of one sequence, head) take their turn; a unit whose keys reach over a chunk's end leaves its
//            state (sums, maximum, denominator) in memory and goes on in the next chunk
// Groups are as large as the memory for states allows, chunks as large as the memory for keys and values allows.
#pragma once

#include <cooperative_groups.h>

#include "mma.cuh"
#include "prefill_gather.cuh"

namespace mla::prefill_tensor {

using namespace prefill_step;

// Tiles of the expansion: 128 keys x 128 columns, 64 latent values deep.
constexpr int expand_tile = 128;
constexpr int expand_depth = 64;
constexpr int expand_stages = 3;
constexpr int expand_operand_bytes = expand_tile * expand_depth * 2;
constexpr int expand_bytes = expand_stages * 2 * expand_operand_bytes;

// Tiles of the weights' conversion.
constexpr int weight_tile = 64;
constexpr int weight_tile_stride = weight_tile + 1;
constexpr int weight_bytes = weight_tile * weight_tile_stride * 4;

// A warp takes `row_tiles` x 16 query rows of a unit and `width` columns of the output; a multiprocessor has registers for
// `blocks` blocks. `nope` and `rope` are the plan's, or 0 where only the plan knows them, and the values.
template <int row_tiles_, int warps_, int width_, int blocks_, int nope_ = 0, int rope_ = 0>
struct Shape {
    static constexpr int row_tiles = row_tiles_, warps = warps_, width = width_, blocks = blocks_;
    static constexpr int nope = nope_, rope = rope_;
    static constexpr bool fixed = nope > 0;  // then the values are `width` too
    static constexpr int threads = warps * warp_size;
    static constexpr int warp_rows = 16 * row_tiles;
    static constexpr int rows = warps * warp_rows;

    __device__ static void sync() { __syncthreads(); }
    static constexpr int64_t shared_bytes(int64_t key_stride) {
        int64_t const attend = 2 * ((rows + key_tile) * key_stride + key_tile * width);
        return attend > expand_bytes ? attend : expand_bytes;
    }
};

// A weight_tile x weight_tile part of a matrix [rows, columns] to shared memory, zeros where it reaches beyond the matrix.
template <int threads, typename T>
__device__ void load_weight_tile(float* tile, const T* matrix, float scale, int rows, int columns, int row0, int column0) {
    int const x = threadIdx.x % weight_tile, column = column0 + x;
#pragma unroll 8
    for (int y = threadIdx.x / weight_tile; y < weight_tile; y += threads / weight_tile) {
        bool const inside = row0 + y < rows && column < columns;
        tile[y * weight_tile_stride + x] =
            inside ? static_cast<float>(matrix[static_cast<int64_t>(row0 + y) * columns + column]) * scale : 0.0f;
    }
}

template <int threads>
__device__ void load_weight_tile(float* tile, const BlockScaledWeight& weight, int head, int rows, int columns, int row0,
                                 int column0) {
    int64_t const start = static_cast<int64_t>(head) * rows * columns;
    float scale = 1.0f;  // one for all: a weight_tile divides a scale's block
    if (weight.scale != nullptr) {
        int64_t const block_row = static_cast<int64_t>(head) * ceil_div(rows, scale_group) + row0 / scale_group;
        scale = weight.scale[block_row * ceil_div(columns, scale_group) + column0 / scale_group];
    }
    auto const load = [&](auto const* data) {
        load_weight_tile<threads>(tile, data + start, scale, rows, columns, row0, column0);
    };
    switch (weight.type) {
        case MLA_FLOAT: return load(static_cast<const float*>(weight.data));
        case MLA_FLOAT16: return load(static_cast<const __half*>(weight.data));
        case MLA_BFLOAT16: return load(static_cast<const __nv_bfloat16*>(weight.data));
        default: return load(static_cast<const __nv_fp8_e4m3*>(weight.data));
    }
}

// Weights of all heads to bf16 [H, nope + value, rank], the latent values innermost, zeros in what was added.
template <typename S>
__device__ void convert_weights(const Plan& plan, float* tile) {
    const PrefillArguments& a = plan.arguments;
    int const rank = a.layout.rank;
    int const across = ceil_div(rank, weight_tile);
    int const nope_tiles = ceil_div(a.nope, weight_tile) * across;
    int const head_tiles = nope_tiles + ceil_div(a.value, weight_tile) * across;
    for (int64_t job = blockIdx.x; job < static_cast<int64_t>(a.heads) * head_tiles; job += gridDim.x) {
        int const head = static_cast<int>(job / head_tiles), number = static_cast<int>(job % head_tiles);
        bool const keys = number < nope_tiles;
        int const local = keys ? number : number - nope_tiles;
        int const row0 = local / across * weight_tile, r0 = local % across * weight_tile;
        S::sync();
        if (keys) {
            load_weight_tile<S::threads>(tile, a.w_uk, head, rank, a.nope, r0, row0);
        } else {
            load_weight_tile<S::threads>(tile, a.w_uv, head, a.value, rank, row0, r0);
        }
        S::sync();
        int const rows = keys ? plan.nope : plan.value;
        __nv_bfloat16* const target =
            plan.weights + (static_cast<int64_t>(head) * plan.columns() + (keys ? 0 : plan.nope)) * plan.rank;
        for (int i = threadIdx.x; i < weight_tile * weight_tile; i += S::threads) {
            int const y = i / weight_tile, x = i % weight_tile;
            if (row0 + y >= rows) continue;
            float const value = tile[keys ? x * weight_tile_stride + y : y * weight_tile_stride + x];
            target[static_cast<int64_t>(row0 + y) * plan.rank + r0 + x] = __float2bfloat16_rn(value);
        }
    }
}

// expanded = row scale x latents x weights^T for heads head0.. and the first `tiles` key tiles of the chunk.
template <typename S>
__device__ __noinline__ void expand(const Plan& plan, uint8_t* shared, int32_t head0, int32_t heads, int32_t tiles) {
    constexpr int warps_across = S::warps / 2;  // two warps along the keys
    constexpr int m_tiles = expand_tile / 2 / 16;
    constexpr int n_tiles = expand_tile / warps_across / 8;
    constexpr int rows_at_once = S::threads / 8;
    int const warp = threadIdx.x / warp_size, lane = threadIdx.x % warp_size;
    int const warp_m = warp / warps_across * (expand_tile / 2), warp_n = warp % warps_across * (n_tiles * 8);
    int const load_row = threadIdx.x / 8, load_unit = threadIdx.x % 8;
    uint32_t const base = shared_address(shared);
    uint32_t const load_base = base + load_row * (expand_depth * 2) + ((load_unit ^ (load_row % 8)) << 4);
    int32_t const keys = tiles * key_tile, columns = heads * plan.columns();
    int32_t const down = ceil_div(keys, expand_tile), across = ceil_div(columns, expand_tile);
    int const depth = plan.rank / expand_depth;
    const __nv_bfloat16* const weights = plan.weights + static_cast<int64_t>(head0) * plan.columns() * plan.rank;

    // ldmatrix: lane's row and 16-byte unit in the fragments of A (rows 16 x depth 16) and of B (two tiles of 8 columns)
    int const a_row = lane % 16, a_unit = lane / 16;
    int const b_row = lane % 8 + lane / 16 * 8, b_unit = lane / 8 % 2;
    int const swizzle = lane % 8;

    for (int64_t job = blockIdx.x; job < static_cast<int64_t>(down) * across; job += gridDim.x) {
        int32_t const m0 = static_cast<int32_t>(job % down) * expand_tile;
        int32_t const n0 = static_cast<int32_t>(job / down) * expand_tile;
        int64_t const source = static_cast<int64_t>(load_row) * plan.rank + load_unit * 8;
        const __nv_bfloat16* const a_source = plan.latents + static_cast<int64_t>(m0) * plan.rank + source;
        const __nv_bfloat16* const b_source = weights + static_cast<int64_t>(n0) * plan.rank + source;
        auto const load = [&](int step) {
            uint32_t target = load_base + step % expand_stages * (2 * expand_operand_bytes);
            const __nv_bfloat16* next_a = a_source + step * expand_depth;
            const __nv_bfloat16* next_b = b_source + step * expand_depth;
#pragma unroll
            for (int row = 0; row < expand_tile; row += rows_at_once) {
                copy_async_16(target, next_a, true);
                copy_async_16(target + expand_operand_bytes, next_b, n0 + load_row + row < columns);
                target += rows_at_once * expand_depth * 2;
                next_a += rows_at_once * plan.rank;
                next_b += rows_at_once * plan.rank;
            }
        };
        float sums[m_tiles][n_tiles][4] = {};
#pragma unroll
        for (int step = 0; step < expand_stages - 1; ++step) {
            if (step < depth) load(step);
            copy_async_commit();
        }
        for (int step = 0; step < depth; ++step) {
            copy_async_wait<expand_stages - 2>();
            __syncthreads();
            if (step + expand_stages - 1 < depth) load(step + expand_stages - 1);
            copy_async_commit();
            uint32_t const stage = base + step % expand_stages * (2 * expand_operand_bytes);
            uint32_t const a_base = stage + (warp_m + a_row) * (expand_depth * 2);
            uint32_t const b_base = stage + expand_operand_bytes + (warp_n + b_row) * (expand_depth * 2);
#pragma unroll
            for (int k = 0; k < expand_depth / 16; ++k) {
                uint32_t a[m_tiles][4];
                uint32_t const a_offset = ((2 * k + a_unit) ^ swizzle) << 4, b_offset = ((2 * k + b_unit) ^ swizzle) << 4;
#pragma unroll
                for (int m = 0; m < m_tiles; ++m) ldmatrix_x4(a[m], a_base + m * 16 * (expand_depth * 2) + a_offset);
#pragma unroll
                for (int n = 0; n < n_tiles; n += 2) {
                    uint32_t b[4];
                    ldmatrix_x4(b, b_base + n * 8 * (expand_depth * 2) + b_offset);
#pragma unroll
                    for (int m = 0; m < m_tiles; ++m) {
                        mma_bf16(sums[m][n], a[m], b[0], b[1]);
                        mma_bf16(sums[m][n + 1], a[m], b[2], b[3]);
                    }
                }
            }
        }
        copy_async_wait<0>();
        __syncthreads();

        // Lanes 2i and 2i+1 exchange, so that each stores four neighbouring columns of one of two tiles. A pair of tiles
        // is 16 columns and never reaches over the border of two heads or of keys and values.
        int const g = lane / 4, t = lane % 4, odd = t % 2;
#pragma unroll
        for (int n = 0; n < n_tiles; n += 2) {
            int32_t const column = n0 + warp_n + n * 8;
            int32_t const head = column / plan.columns();
            int32_t const inner = column - head * plan.columns() + odd * 8 + t / 2 * 4;
            __nv_bfloat16* const target =
                plan.expanded + static_cast<int64_t>(head) * plan.chunk_keys() * plan.columns() + inner;
#pragma unroll
            for (int m = 0; m < m_tiles; ++m) {
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    int32_t const key = m0 + warp_m + m * 16 + half * 8 + g;
                    float const scale = key < keys ? plan.row_scales[key] : 0.0f;
                    uint32_t const left = pack(sums[m][n][2 * half] * scale, sums[m][n][2 * half + 1] * scale);
                    uint32_t const right = pack(sums[m][n + 1][2 * half] * scale, sums[m][n + 1][2 * half + 1] * scale);
                    uint32_t const other = __shfl_xor_sync(0xffffffffu, odd ? left : right, 1);
                    if (key < keys && column < columns) {
                        *reinterpret_cast<uint2*>(target + static_cast<int64_t>(key) * plan.columns()) =
                            odd ? make_uint2(other, right) : make_uint2(left, other);
                    }
                }
            }
        }
    }
}

// Two neighbouring values of the output, of which `room` at most are there.
__device__ inline void store_pair(const HeadView<void*>& view, bool pairs, int64_t index, float left, float right,
                                  int32_t room) {
    if (pairs && room > 0 && view.type == MLA_BFLOAT16) {
        *reinterpret_cast<uint32_t*>(static_cast<__nv_bfloat16*>(view.data) + index) = pack(left, right);
        return;
    }
    if (room > 0) store_float(view.data, view.type, index, left);
    if (room > 1) store_float(view.data, view.type, index + 1, right);
}

// Attention of one unit over its key tiles of this chunk.
template <typename S>
__device__ __noinline__ void attend_unit(const Plan& plan, uint8_t* shared, const Unit& unit, int32_t head0) {
    constexpr int rows_at_once = S::threads / 8;
    constexpr int value_tiles = S::width / 8;
    const PrefillArguments& a = plan.arguments;
    int const warp = threadIdx.x / warp_size, lane = threadIdx.x % warp_size;
    int const g = lane / 4, t = lane % 4;
    int const load_row = threadIdx.x / 8, load_unit = threadIdx.x % 8;
    int const nope = S::fixed ? S::nope : plan.nope, rope = S::fixed ? S::rope : plan.rope;
    int const value = S::fixed ? S::width : plan.value, columns = nope + value;
    int const row_bytes = round_up(nope + rope, 64) * 2;
    int const warp_row = warp * S::warp_rows;
    int const head = head0 + unit.head;
    int const column0 = S::fixed ? 0 : unit.slice * S::width;
    uint8_t* const queries = shared;
    uint32_t const query_base = shared_address(queries);
    uint32_t const key_base = query_base + S::rows * row_bytes;
    uint32_t const value_base = key_base + key_tile * row_bytes;
    int const nope_units = nope / 8, rope_units = rope / 8;
    int const value_units = min(value - column0, S::width) / 8;

    // A thread copies 16-byte units load_unit, load_unit + 8, .. of rows load_row, load_row + rows_at_once, ..: those are
    // the same places in all of its rows, since rows_at_once is a multiple of 8.
    int const load_swizzle = (load_unit ^ (load_row % 8)) << 4;
    const __nv_bfloat16* key_source =
        plan.expanded + ((static_cast<int64_t>(unit.head) * plan.chunk_tiles + unit.key_start) * key_tile + load_row) * columns +
        load_unit * 8;
    const __nv_bfloat16* rope_source = plan.ropes + (unit.key_start * key_tile + load_row) * rope + load_unit * 8;
    uint32_t const key_target = key_base + load_row * row_bytes;
    uint32_t const value_target = value_base + load_row * (S::width * 2) + load_swizzle;
    auto const load_keys = [&] {
        const __nv_bfloat16* next = key_source;
        const __nv_bfloat16* next_rope = rope_source;
        uint32_t target = key_target;
#pragma unroll
        for (int row = 0; row < key_tile; row += rows_at_once) {
#pragma unroll
            for (int u = 0; u < nope_units; u += 8) {
                if (u + load_unit < nope_units) copy_async_16(target + u * 16 + load_swizzle, next + u * 8, true);
            }
#pragma unroll
            for (int u = 0; u < rope_units; u += 8) {
                if (u + load_unit >= rope_units) continue;
                int const place = nope_units + u + load_unit;
                copy_async_16(target + ((place ^ (load_row % 8)) << 4), next_rope + u * 8, true);
            }
            next += rows_at_once * columns;
            next_rope += rows_at_once * rope;
            target += rows_at_once * row_bytes;
        }
    };
    auto const load_values = [&] {
        const __nv_bfloat16* next = key_source + nope + column0;
        uint32_t target = value_target;
#pragma unroll
        for (int row = 0; row < key_tile; row += rows_at_once) {
#pragma unroll
            for (int u = 0; u < S::width / 8; u += 8) {
                if (u + load_unit < value_units) copy_async_16(target + u * 16, next + u * 8, true);
            }
            next += rows_at_once * columns;
            target += rows_at_once * S::width * 2;
        }
    };

    load_keys();
    copy_async_commit();

    // a negative softmax scale goes into the queries: maxima below are of scores times a positive factor. The factor is not
    // 0 either, so that -inf times it stays what it is
    uint32_t const signs = a.softmax_scale < 0.0f ? 0x80008000u : 0u;
    float const factor = fmaxf(fabsf(a.softmax_scale) * log2e, 1e-30f);
    for (int row = load_row; row < S::rows; row += rows_at_once) {
        bool const real = row < unit.rows;
        int64_t const token = unit.token + row;
        int64_t const nope_start = token * a.query_nope.token_stride + head * a.query_nope.head_stride;
        int64_t const rope_start = token * a.query_rope.token_stride + head * a.query_rope.head_stride;
        for (int u = load_unit; u < nope_units + rope_units; u += 8) {
            uint4 values = make_uint4(0, 0, 0, 0);
            if (real && u < nope_units) {
                values = load_eight(a.query_nope.data, a.query_nope.type, nope_start + u * 8, a.nope - u * 8,
                                    plan.nope_vectors);
            } else if (real) {
                int const d = (u - nope_units) * 8;
                values = load_eight(a.query_rope.data, a.query_rope.type, rope_start + d, a.layout.rope - d,
                                    plan.rope_vectors);
            }
            values = make_uint4(values.x ^ signs, values.y ^ signs, values.z ^ signs, values.w ^ signs);
            *reinterpret_cast<uint4*>(queries + row * row_bytes + ((u ^ (row % 8)) << 4)) = values;
        }
    }

    float sums[S::row_tiles][value_tiles][4];
    float largest[S::row_tiles][2], total[S::row_tiles][2];  // total: this lane's part
    int64_t const state_row = static_cast<int64_t>(unit.head) * a.step.tokens + unit.token + warp_row + g;
    float2* const state_sums = plan.state_sums + static_cast<int64_t>(unit.slice) * plan.group_heads * a.step.tokens;
#pragma unroll
    for (int m = 0; m < S::row_tiles; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            int const row = m * 16 + half * 8;
            bool const stored = !unit.starts && warp_row + g + row < unit.rows;
            float2 state = make_float2(-INFINITY, 0.0f);
            if (stored) state = state_sums[state_row + row];
            largest[m][half] = state.x;
            total[m][half] = t == 0 ? state.y : 0.0f;
#pragma unroll
            for (int n = 0; n < value_tiles; ++n) {
                int const column = column0 + n * 8 + 2 * t;
                float2 pair = make_float2(0.0f, 0.0f);
                if (stored && column < value) {
                    pair = *reinterpret_cast<const float2*>(plan.states + (state_row + row) * value + column);
                }
                sums[m][n][2 * half] = pair.x;
                sums[m][n][2 * half + 1] = pair.y;
            }
        }
    }

    int const a_row = lane % 16, a_unit = lane / 16;
    int const b_row = lane % 8 + lane / 16 * 8, b_unit = lane / 8 % 2;
    int const swizzle = lane % 8;
    uint32_t const query_row = query_base + (warp_row + a_row) * row_bytes;
    uint32_t const key_row = key_base + b_row * row_bytes;
    uint32_t const value_row = value_base + a_row * (S::width * 2);
    int const steps = (nope + rope) / 16;
    int32_t const first_position = unit.position + warp_row;
    bool const idle = warp_row >= unit.rows;

    for (int32_t tile = unit.key_start; tile < unit.key_end; ++tile) {
        uint64_t const mask = plan.key_masks[tile];
        int32_t const key0 = (tile - unit.first_key) * key_tile;
        bool const skip = idle || key0 > first_position + S::warp_rows - 1;
        copy_async_wait<0>();
        __syncthreads();  // the keys are here, and nobody reads the values of the last tile any more
        load_values();
        copy_async_commit();

        float scores[S::row_tiles][key_tile / 8][4];
        if (!skip) {
#pragma unroll
            for (int m = 0; m < S::row_tiles; ++m) {
#pragma unroll
                for (int n = 0; n < key_tile / 8; ++n) {
#pragma unroll
                    for (int i = 0; i < 4; ++i) scores[m][n][i] = 0.0f;
                }
            }
#pragma unroll 4
            for (int k = 0; k < steps; ++k) {
                uint32_t q[S::row_tiles][4];
                uint32_t const q_offset = ((2 * k + a_unit) ^ swizzle) << 4, k_offset = ((2 * k + b_unit) ^ swizzle) << 4;
#pragma unroll
                for (int m = 0; m < S::row_tiles; ++m) ldmatrix_x4(q[m], query_row + m * 16 * row_bytes + q_offset);
#pragma unroll
                for (int n = 0; n < key_tile / 8; n += 2) {
                    uint32_t b[4];
                    ldmatrix_x4(b, key_row + n * 8 * row_bytes + k_offset);
#pragma unroll
                    for (int m = 0; m < S::row_tiles; ++m) {
                        mma_bf16(scores[m][n], q[m], b[0], b[1]);
                        mma_bf16(scores[m][n + 1], q[m], b[2], b[3]);
                    }
                }
            }
            if (mask != ~uint64_t{0} || key0 + key_tile - 1 > first_position) {
                uint64_t const own = mask >> (2 * t);  // from here keys count from the lane's first
                int32_t const last = first_position + g - key0 - 2 * t;
#pragma unroll
                for (int n = 0; n < key_tile / 8; ++n) {
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        int const key = n * 8 + i % 2;
                        bool const present = (own >> key & 1) != 0;
#pragma unroll
                        for (int m = 0; m < S::row_tiles; ++m) {
                            if (!present || key - m * 16 - i / 2 * 8 > last) scores[m][n][i] = -INFINITY;
                        }
                    }
                }
            }
        }
        copy_async_wait<0>();
        __syncthreads();  // the values are here, and nobody reads this tile's keys any more
        key_source += key_tile * columns;
        rope_source += key_tile * rope;
        if (tile + 1 < unit.key_end) load_keys();
        copy_async_commit();
        if (skip) continue;

        uint32_t weights[S::row_tiles][key_tile / 16][4];
#pragma unroll
        for (int m = 0; m < S::row_tiles; ++m) {
            float scale[2];
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float top = largest[m][half];
#pragma unroll
                for (int n = 0; n < key_tile / 8; ++n) {
                    top = fmaxf(top, fmaxf(scores[m][n][2 * half], scores[m][n][2 * half + 1]));
                }
                top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
                top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
                float const base = top == -INFINITY ? 0.0f : top * factor;
                scale[half] = power_of_two(fmaf(largest[m][half], factor, -base));
                largest[m][half] = top;
                float sum = 0.0f;
#pragma unroll
                for (int n = 0; n < key_tile / 8; ++n) {
                    float const left = power_of_two(fmaf(scores[m][n][2 * half], factor, -base));
                    float const right = power_of_two(fmaf(scores[m][n][2 * half + 1], factor, -base));
                    sum += left + right;
                    weights[m][n / 2][n % 2 * 2 + half] = pack(left, right);
                }
                total[m][half] = total[m][half] * scale[half] + sum;
            }
            if (__any_sync(0xffffffffu, scale[0] != 1.0f || scale[1] != 1.0f)) {
#pragma unroll
                for (int n = 0; n < value_tiles; ++n) {
                    sums[m][n][0] *= scale[0];
                    sums[m][n][1] *= scale[0];
                    sums[m][n][2] *= scale[1];
                    sums[m][n][3] *= scale[1];
                }
            }
        }
#pragma unroll
        for (int k = 0; k < key_tile / 16; ++k) {
#pragma unroll
            for (int n = 0; n < value_tiles; n += 2) {
                uint32_t b[4];
                ldmatrix_x4_transposed(b, value_row + k * 16 * (S::width * 2) + (((n + a_unit) ^ swizzle) << 4));
#pragma unroll
                for (int m = 0; m < S::row_tiles; ++m) {
                    mma_bf16(sums[m][n], weights[m][k], b[0], b[1]);
                    mma_bf16(sums[m][n + 1], weights[m][k], b[2], b[3]);
                }
            }
        }
    }
    copy_async_wait<0>();

#pragma unroll
    for (int m = 0; m < S::row_tiles; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            int const row = m * 16 + half * 8;
            float sum = total[m][half];
            sum += __shfl_xor_sync(0xffffffffu, sum, 1);
            sum += __shfl_xor_sync(0xffffffffu, sum, 2);
            if (warp_row + g + row >= unit.rows) continue;
            if (!unit.ends) {
                if (t == 0) state_sums[state_row + row] = make_float2(largest[m][half], sum);
#pragma unroll
                for (int n = 0; n < value_tiles; ++n) {
                    int const column = column0 + n * 8 + 2 * t;
                    if (column >= value) continue;
                    *reinterpret_cast<float2*>(plan.states + (state_row + row) * value + column) =
                        make_float2(sums[m][n][2 * half], sums[m][n][2 * half + 1]);
                }
                continue;
            }
            int64_t const token = unit.token + warp_row + g + row;
            float const top = largest[m][half] * factor;
            float denominator = sum;
            if (a.sinks != nullptr) denominator += exp2f(a.sinks[head] * log2e - top);
            float const share = sum > 0.0f ? 1.0f / denominator : 0.0f;
            if (a.lse != nullptr && t == 0 && unit.slice == 0) a.lse[token * a.heads + head] = logf(sum) + top * ln2;
            int64_t const start = token * a.output.token_stride + head * a.output.head_stride;
#pragma unroll
            for (int n = 0; n < value_tiles; ++n) {
                int const column = column0 + n * 8 + 2 * t;
                store_pair(a.output, plan.output_pairs, start + column, sums[m][n][2 * half] * share,
                           sums[m][n][2 * half + 1] * share, a.value - column);
            }
        }
    }
}

// The units of a chunk and a group of heads in turn.
template <typename S>
__device__ void attend(const Plan& plan, uint8_t* shared, int32_t head0, int32_t heads, int32_t chunk_start,
                       int32_t chunk_end) {
    __shared__ Unit unit;
    __shared__ bool found;
    int32_t query_end = 0, query_count = 0, units = 0;
    if (threadIdx.x == 0) {
        int32_t const sequences = static_cast<int32_t>(plan.arguments.step.sequences);
        query_end = plan.query_tiles[owner(plan.key_tiles, sequences, chunk_end - 1) + 1];
        query_count = query_end - plan.query_tiles[owner(plan.key_tiles, sequences, chunk_start)];
        units = heads * query_count * plan.value_slices;
    }
    while (true) {
        __syncthreads();  // nobody reads the last unit or its tiles any more
        if (threadIdx.x == 0) {
            found = false;
            while (!found) {
                int32_t const index = atomicAdd(plan.counter, 1);
                if (index >= units) break;
                found = make_unit<S::rows>(plan, index, heads, 1, query_end, query_count, chunk_start, chunk_end, unit);
            }
        }
        __syncthreads();
        if (!found) return;
        attend_unit<S>(plan, shared, unit, head0);
    }
}

template <typename S>
__global__ void __launch_bounds__(S::threads, S::blocks) prefill_tensor(const __grid_constant__ Plan plan) {
    extern __shared__ __align__(128) uint8_t shared_memory[];
    const PrefillArguments& a = plan.arguments;
    auto const grid = cooperative_groups::this_grid();
    if (a.zero_padding) zero_padding<S::threads>(a);
    if (!anything_served<S::threads>(a)) return;  // every block finds the same
    if (blockIdx.x == 0) make_starts<S>(plan);
    convert_weights<S>(plan, reinterpret_cast<float*>(shared_memory));
    grid.sync();
    int32_t const key_tiles = plan.key_tiles[a.step.sequences];
    for (int32_t head0 = 0; head0 < a.heads; head0 += plan.group_heads) {
        int32_t const heads = min(plan.group_heads, a.heads - head0);
        for (int32_t start = 0; start < key_tiles; start += plan.chunk_tiles) {
            int32_t const end = min(start + plan.chunk_tiles, key_tiles);
            if (head0 == 0 || key_tiles > plan.chunk_tiles) {  // otherwise they are still there
                gather<S>(plan, start, end);
                grid.sync();
            }
            if (blockIdx.x == 0 && threadIdx.x == 0) *plan.counter = 0;
            expand<S>(plan, shared_memory, head0, heads, end - start);
            grid.sync();
            attend<S>(plan, shared_memory, head0, heads, start, end);
            grid.sync();
        }
    }
}

}  // namespace mla::prefill_tensor
