// Attention in f32 on plain cores: every row format and dimension. It serves the f32 format, whose purpose is comparison, and
// dimensions that the tensor-core kernel does not take.
#include "attend.h"

namespace mla {
namespace {

constexpr int threads = 256;
constexpr int tile_heads = exact_rows;
constexpr int tile_keys = threads / tile_heads;

// Value `column` of a row, latent first. `scale` as in Row.
__device__ float row_value(const KvLayout& layout, const uint8_t* row, float scale, int column) {
    bool const is_rope = column >= layout.rank;
    int const i = is_rope ? column - layout.rank : column;
    const uint8_t* part = is_rope ? row + layout.rope_offset : row;
    auto bf16 = [&] {
        uint16_t const bits = static_cast<uint16_t>(part[2 * i] | part[2 * i + 1] << 8);
        return __bfloat162float(__ushort_as_bfloat16(bits));
    };
    auto f32 = [](const uint8_t* bytes) {
        return __uint_as_float(static_cast<uint32_t>(bytes[0]) | static_cast<uint32_t>(bytes[1]) << 8 |
                               static_cast<uint32_t>(bytes[2]) << 16 | static_cast<uint32_t>(bytes[3]) << 24);
    };
    switch (layout.format) {
        case row_format::f32: return f32(part + 4 * i);
        case row_format::bf16: return bf16();
        case row_format::fp8: return scale * (is_rope ? bf16() : decode_e4m3(part[i]));
        case row_format::fp8_ds_mla:
            return is_rope ? bf16() : decode_e4m3(part[i]) * f32(row + layout.rank + 4 * (i / scale_group));
        default: return decode_e4m3(part[i]) * layout.kv_scale;
    }
}

// Block (token, group of 8 heads, split). Shared: queries [8][W], keys [32][W + 1], sums [8][R], and per-head numbers.
__global__ void __launch_bounds__(threads) attend_exact_kernel(Attend work, Partials partials) {
    extern __shared__ float memory[];
    __shared__ int32_t positions[tile_keys];
    __shared__ float scores[tile_heads][tile_keys], top[tile_heads], total[tile_heads], rescale[tile_heads];
    int const rank = work.layout.rank, width = rank + work.layout.rope;
    float* query = memory;
    float* keys = query + tile_heads * width;
    float* sums = keys + tile_keys * (width + 1);

    int64_t const token = blockIdx.x;
    int32_t const slot_of_part = static_cast<int32_t>((token * gridDim.y + blockIdx.y) * gridDim.z + blockIdx.z);
    int const first_head = blockIdx.y * tile_heads, split = blockIdx.z;
    int const heads = min(tile_heads, work.heads - first_head);
    int32_t const sequence = work.step.sequence_of(token);
    bool const active = sequence >= 0;

    for (int i = threadIdx.x; i < heads * width; i += threads) {
        int const head = first_head + i / width;
        query[i] = load_float(work.query.data, work.query.type,
                              token * work.query.token_stride + head * work.query.head_stride + i % width);
    }
    for (int i = threadIdx.x; i < tile_heads * rank; i += threads) sums[i] = 0.0f;
    if (threadIdx.x < tile_heads) {
        top[threadIdx.x] = -INFINITY;
        total[threadIdx.x] = 0.0f;
    }

    int32_t const end = active ? last_key(work, token) + 1 : 0;
    int32_t const count = !active ? 0 : work.indices == nullptr ? end : list_length(work, token);
    int32_t const tiles = ceil_div(count, tile_keys);
    int32_t const first_tile = static_cast<int32_t>(static_cast<int64_t>(tiles) * split / partials.splits);
    int32_t const last_tile = static_cast<int32_t>(static_cast<int64_t>(tiles) * (split + 1) / partials.splits);
    int const head = threadIdx.x / tile_keys, slot = threadIdx.x % tile_keys;
    for (int32_t tile = first_tile; tile < last_tile; ++tile) {
        __syncthreads();
        for (int line = threadIdx.x / warp_size; line < tile_keys; line += threads / warp_size) {
            int32_t const item = tile * tile_keys + line;
            int32_t key = item < count ? item : -1;
            if (work.indices != nullptr && item < count) key = work.indices[token * work.top_k + item];
            int32_t const page = key < end ? page_of(work.step.block_table, work.step.max_pages, work.step.pages,
                                                     work.layout.page_size, sequence, key)
                                           : -1;
            Row const row = row_at(work, key, page);
            for (int i = threadIdx.x % warp_size; i < width; i += warp_size) {
                keys[line * (width + 1) + i] =
                    row.bytes == nullptr ? 0.0f : row_value(work.layout, row.bytes, row.scale, i);
            }
            if (threadIdx.x % warp_size == 0) positions[line] = row.position;
        }
        __syncthreads();
        float score = -INFINITY;
        if (head < heads && positions[slot] != masked) {
            score = 0.0f;
            for (int i = 0; i < width; ++i) score += query[head * width + i] * keys[slot * (width + 1) + i];
            score *= work.softmax_scale;
        }
        // a warp has the 32 keys of one head
        float const before = top[head];
        float const best = fmaxf(before, warp_max(score));
        float const weight = best == -INFINITY ? 0.0f : expf(score - best);
        scores[head][slot] = weight;
        float const sum = warp_sum(weight);
        __syncwarp();  // every lane has read top[head]
        if (slot == 0) {
            float const factor = before == -INFINITY ? 0.0f : expf(before - best);
            rescale[head] = factor;
            top[head] = best;
            total[head] = total[head] * factor + sum;
        }
        __syncthreads();
        for (int i = threadIdx.x; i < heads * rank; i += threads) {
            int const line = i / rank, column = i % rank;
            float value = sums[i] * rescale[line];
            for (int key = 0; key < tile_keys; ++key) value += scores[line][key] * keys[key * (width + 1) + column];
            sums[i] = value;
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < heads * rank; i += threads) {
        int const line = i / rank, column = i % rank;
        if (partials.splits > 1) {
            partials.output[partials.row(slot_of_part, line) * rank + column] =
                total[line] > 0.0f || total[line] != total[line] ? sums[i] / total[line] : 0.0f;
            continue;
        }
        float denominator = total[line];
        if (work.sinks != nullptr && top[line] != -INFINITY) {
            denominator += expf(work.sinks[first_head + line] - top[line]);
        }
        float const value = top[line] == -INFINITY && denominator == 0.0f ? 0.0f : sums[i] / denominator;
        store_float(work.output.data, work.output.type,
                    token * work.output.token_stride + (first_head + line) * work.output.head_stride + column, value);
    }
    if (threadIdx.x < heads) {
        int64_t const row = token * work.heads + first_head + threadIdx.x;
        float const lse = total[threadIdx.x] == 0.0f ? -INFINITY : top[threadIdx.x] + logf(total[threadIdx.x]);
        if (partials.splits > 1) {
            partials.lse[partials.row(slot_of_part, threadIdx.x)] = lse * log2e;
        } else if (work.lse != nullptr) {
            work.lse[row] = lse;
        }
    }
}

}  // namespace

int attend_exact(const Attend& work, const Partials& partials, cudaStream_t stream) {
    int const width = work.layout.rank + work.layout.rope;
    size_t const shared = sizeof(float) * (static_cast<size_t>(tile_heads) * (width + work.layout.rank) +
                                           static_cast<size_t>(tile_keys) * (width + 1));
    Device device;
    if (int status = current_device(&device)) return status;
    if (shared + 4096 > static_cast<size_t>(device.shared_bytes)) {
        return fail(MLA_UNSUPPORTED, "a cache row of %d + %d values needs more shared memory than this GPU has",
                    work.layout.rank, work.layout.rope);
    }
    if (int status = check_cuda("attention", cudaFuncSetAttribute(attend_exact_kernel,
                                                                  cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                                  static_cast<int>(shared)))) {
        return status;
    }
    dim3 const grid(static_cast<unsigned>(work.step.tokens), ceil_div(work.heads, tile_heads), partials.splits);
    attend_exact_kernel<<<grid, threads, shared, stream>>>(work, partials);
    return check_launch("attention in f32");
}

}  // namespace mla
