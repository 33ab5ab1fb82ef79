// The indexer's second stage on any GPU: index scores of a window of tokens over the paged keys, written as ranks.
#include <algorithm>

#include "index_items.cuh"
#include "mma.cuh"

namespace mla {
namespace {

constexpr int warps = 8;
constexpr int threads = warps * warp_size;

__device__ inline uint32_t decode_to_f16x2(uint32_t codes) {
    __half2_raw const values = __nv_cvt_fp8x2_to_halfraw2(static_cast<__nv_fp8x2_storage_t>(codes), __NV_E4M3);
    return static_cast<uint32_t>(values.x) | static_cast<uint32_t>(values.y) << 16;
}

// Rows of A are keys, columns of B are heads: a warp holds 16 * tiles keys in registers, reads each head's query from shared
// memory for all of them, and sums over the heads in the lanes that have their products. `chunks`: 64 values of a head each.
template <int chunks, int tiles>
__global__ void __launch_bounds__(threads, 2) score_fp8_kernel(IndexWindow window, QueryTile shape) {
    constexpr int width = 64 * chunks, steps = 4 * chunks, warp_keys = 16 * tiles, block_keys = warps * warp_keys;
    extern __shared__ __align__(128) char shared[];
    __shared__ int32_t scan[warp_size];
    __half* const queries = reinterpret_cast<__half*>(shared);
    float* const weights = reinterpret_cast<float*>(queries + int64_t{shape.slots} * shape.heads * width);
    int32_t* const tables = reinterpret_cast<int32_t*>(weights + shape.slots * shape.heads);
    Rows const rows{tables, tables + window.rows};

    int32_t const total = list_items(window, shape.slots, block_keys, rows, scan);
    int const warp = threadIdx.x / warp_size, lane = threadIdx.x % warp_size;
    int const group = lane / 4, quarter = lane % 4;
    // ldmatrix: lanes 0..15 address heads 0..7, both halves of a step's 16 values, lanes 16..31 heads 8..15
    uint32_t const matrix_row = shared_address(queries) + (lane / 16 * 8 + lane % 8) * width * 2;
    uint32_t const matrix_unit = ((lane / 8 & 1) ^ (lane % 8)) << 4;
    bool const whole = shape.heads == window.padded_heads;

    auto load_queries = [&](int32_t row, int32_t count, int32_t head, int32_t heads) {
        __syncthreads();
        const __half* const source =
            static_cast<const __half*>(window.queries) + (int64_t{row} * window.padded_heads + head) * width;
        // with several slots heads is padded_heads, so that the rows of all of them follow each other
        for (int32_t unit = threadIdx.x; unit < count * heads * (width / 8); unit += threads) {
            int32_t const line = unit / (width / 8), column = unit % (width / 8) * 8;
            copy_async_16(shared_address(shared) + swizzled(line, column, width), source + int64_t{line} * width + column,
                          true);
        }
        const float* const source_weights = window.weights + int64_t{row} * window.padded_heads + head;
        for (int32_t i = threadIdx.x; i < count * heads; i += threads) weights[i] = source_weights[i];
        copy_async_commit();
        copy_async_wait<0>();
        __syncthreads();
    };

    Run run;
    for (Part part(total, rows.ends, window.rows); part.item < part.last; ++part.item) {
        int32_t const base = part.tile(rows.ends) * block_keys + warp * warp_keys;
        if (part.row != run.first) {
            run = run_at(window, rows, part.row, shape.slots);
            if (whole) load_queries(run.first, run.count, 0, shape.heads);
        }

        // a lane writes the score of one of its keys, the one that its place among four names
        int32_t const own_key = base + 8 * quarter + group;
        int32_t own_page = -1;
        uint32_t keys[tiles][steps][4];
        auto load_row = [&](int tile, int half) {
            int32_t const key = base + 16 * tile + 8 * half + group;
            int32_t const page = key < run.keys ? window.page(run.sequence, key) : -1;
            if (quarter == 2 * tile + half) own_page = page;
            const char* const row = page < 0 ? nullptr
                                             : window.page_data(page) +
                                                   int64_t{key % window.layout.page_size} * window.layout.row_bytes;
#pragma unroll
            for (int chunk = 0; chunk < chunks; ++chunk) {
                int const offset = 64 * chunk + 16 * quarter;
                uint4 words{0, 0, 0, 0};
                if (page >= 0 && offset < window.layout.row_bytes) {
                    words = __ldg(reinterpret_cast<const uint4*>(row + offset));
                }
                uint32_t const word[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    keys[tile][4 * chunk + i][half] = decode_to_f16x2(word[i] & 0xffffu);
                    keys[tile][4 * chunk + i][half + 2] = decode_to_f16x2(word[i] >> 16);
                }
            }
        };
#pragma unroll
        for (int tile = 0; tile < tiles; ++tile) {
            load_row(tile, 0);
            load_row(tile, 1);
        }
        float scale = 0.0f;
        if (own_page >= 0) {
            scale = __ldg(reinterpret_cast<const float*>(window.page_data(own_page) + window.layout.scales_offset) +
                          own_key % window.layout.page_size);
        }

        for (int32_t token = 0; token < run.count; ++token) {
            if (rows.keys[run.first + token] <= base && whole) continue;
            float sums[tiles][2] = {};
            for (int32_t head = 0; head < window.padded_heads; head += shape.heads) {
                int32_t const heads = min(shape.heads, window.padded_heads - head);
                if (!whole) load_queries(run.first, 1, head, heads);
                uint32_t address = matrix_row + token * shape.heads * width * 2;
                const float* weight = weights + token * shape.heads + 2 * quarter;
                for (int32_t pair = 0; pair < heads; pair += 16) {
                    float products[tiles][2][4] = {};
#pragma unroll
                    for (int step = 0; step < steps; ++step) {
                        uint32_t b[4];
                        ldmatrix_x4(b, address + (matrix_unit ^ (step << 5)));
#pragma unroll
                        for (int tile = 0; tile < tiles; ++tile) {
                            mma_f16(products[tile][0], keys[tile][step], b[0], b[1]);
                            mma_f16(products[tile][1], keys[tile][step], b[2], b[3]);
                        }
                    }
#pragma unroll
                    for (int eight = 0; eight < 2; ++eight) {
                        float2 const w = *reinterpret_cast<const float2*>(weight + 8 * eight);
#pragma unroll
                        for (int tile = 0; tile < tiles; ++tile) {
                            const float* const p = products[tile][eight];
                            sums[tile][0] = fmaf(w.x, relu(p[0]), fmaf(w.y, relu(p[1]), sums[tile][0]));
                            sums[tile][1] = fmaf(w.x, relu(p[2]), fmaf(w.y, relu(p[3]), sums[tile][1]));
                        }
                    }
                    address += 16 * width * 2;
                    weight += 16;
                }
            }
            float score = 0.0f;
#pragma unroll
            for (int i = 0; i < 2 * tiles; ++i) {
                float sum = sums[i / 2][i % 2];
                sum += __shfl_xor_sync(0xffffffffu, sum, 1);
                sum += __shfl_xor_sync(0xffffffffu, sum, 2);
                if (quarter == i) score = sum;
            }
            if (quarter < 2 * tiles) write_rank(window, rows, run.first + token, own_key, own_page >= 0, score * scale);
        }
    }
}

constexpr int f32_group = 8;

// Verification format: 32 keys in shared memory, a lane a key, a warp four heads at a time.
__global__ void __launch_bounds__(threads) score_f32_kernel(IndexWindow window) {
    extern __shared__ __align__(128) char shared[];
    __shared__ int32_t scan[warp_size];
    __shared__ float partial[warps][warp_size];
    constexpr int row = warp_size + 1;  // f32 from one value's keys to the next value's: no bank conflicts
    float* const keys = reinterpret_cast<float*>(shared);
    int32_t* const tables = reinterpret_cast<int32_t*>(keys + row * window.width);
    Rows const rows{tables, tables + window.rows};
    int const warp = threadIdx.x / warp_size, lane = threadIdx.x % warp_size;

    int32_t const total = list_items(window, f32_group, warp_size, rows, scan);
    Run run;
    for (Part part(total, rows.ends, window.rows); part.item < part.last; ++part.item) {
        int32_t const base = part.tile(rows.ends) * warp_size;
        if (part.row != run.first) run = run_at(window, rows, part.row, f32_group);
        for (int32_t line = warp; line < warp_size; line += warps) {
            int32_t const key = base + line;
            int32_t const page = key < run.keys ? window.page(run.sequence, key) : -1;
            for (int32_t d = lane; d < window.width; d += warp_size) {
                keys[d * row + line] =
                    page < 0 ? 0.0f
                             : reinterpret_cast<const float*>(window.page_data(page) + int64_t{key % window.layout.page_size} *
                                                                                           window.layout.row_bytes)[d];
            }
        }
        __syncthreads();
        int32_t const key = base + lane;
        bool const visible = key < run.keys && window.page(run.sequence, key) >= 0;
        for (int32_t token = run.first; token < run.first + run.count; ++token) {
            float sum = 0.0f;
            for (int32_t head = 4 * warp; head < window.padded_heads; head += 4 * warps) {
                int64_t const place = int64_t{token} * window.padded_heads + head;
                const float* const query = static_cast<const float*>(window.queries) + place * window.width;
                float products[4] = {};
                for (int32_t d = 0; d < window.width; d += 4) {
#pragma unroll
                    for (int h = 0; h < 4; ++h) {
                        float4 const q = *reinterpret_cast<const float4*>(query + h * window.width + d);
                        products[h] = fmaf(q.x, keys[d * row + lane], products[h]);
                        products[h] = fmaf(q.y, keys[(d + 1) * row + lane], products[h]);
                        products[h] = fmaf(q.z, keys[(d + 2) * row + lane], products[h]);
                        products[h] = fmaf(q.w, keys[(d + 3) * row + lane], products[h]);
                    }
                }
#pragma unroll
                for (int h = 0; h < 4; ++h) sum = fmaf(window.weights[place + h], relu(products[h]), sum);
            }
            partial[warp][lane] = sum;
            __syncthreads();
            if (warp == 0) {
                sum = 0.0f;
                for (int i = 0; i < warps; ++i) sum += partial[i][lane];
                write_rank(window, rows, token, key, visible, sum);
            }
            __syncthreads();
        }
    }
}

int score_f32(const Call& call, const IndexWindow& window, const Device& device) {
    int const shared = (warp_size + 1) * window.width * 4 + window.rows * Rows::bytes;
    if (int status = check_cuda("MlaIndexer: shared memory",
                                cudaFuncSetAttribute(score_f32_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared))) {
        return status;
    }
    score_f32_kernel<<<4 * device.multiprocessors, threads, shared, call.stream>>>(window);
    return check_launch("MlaIndexer: f32 scores");
}

template <int chunks, int tiles>
int score_fp8(const Call& call, const IndexWindow& window, const Device& device) {
    constexpr int most_slots = 8, reserved = 2048;  // what a block needs beside this, and static shared memory
    int const line = 64 * chunks * 2 + 4, table = Rows::bytes * window.rows;
    int const budget = device.shared_bytes / 2 - reserved - table;
    QueryTile shape;
    shape.heads = std::min(window.padded_heads, budget / line / 16 * 16);
    shape.slots = shape.heads == window.padded_heads ? std::min(most_slots, budget / (line * shape.heads)) : 1;
    if (shape.heads < 16) return fail(MLA_UNSUPPORTED, "MlaIndexer: this GPU has too little shared memory");
    int const shared = shape.slots * shape.heads * line + table;
    auto const kernel = score_fp8_kernel<chunks, tiles>;
    if (int status = check_cuda("MlaIndexer: shared memory",
                                cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared))) {
        return status;
    }
    kernel<<<2 * device.multiprocessors, threads, shared, call.stream>>>(window, shape);
    return check_launch("MlaIndexer: scores");
}

}  // namespace

int score_index_keys(const Call& call, const IndexWindow& window, const Device& device) {
    if (window.query_codes) return score_index_keys_hopper(call, window, device);
    if (window.layout.format == index_format::f32) return score_f32(call, window, device);
    switch (window.width) {
        case 64: return score_fp8<1, 2>(call, window, device);
        case 128: return score_fp8<2, 2>(call, window, device);
        default: return score_fp8<4, 1>(call, window, device);
    }
}

}  // namespace mla
