// Prefill in f32 on plain cores: the verification format's path, and the one for dimensions that no tile of the tensor cores'
// kernel holds. Any row format, any dimensions. It works with the absorbed query, q W_UK^T, so that nothing is expanded.
#pragma once

#include "prefill_step.cuh"

namespace mla::prefill_plain {

using namespace prefill_step;

constexpr int threads = 256;
constexpr int warps = threads / warp_size;
constexpr int key_tile = 16;

// A block: one token and `heads` (at most most_heads) of its heads.
constexpr int most_heads = 8;

// Floats of shared memory: queries [heads][R + Dr], sums [heads][R], rows [key_tile][R + Dr], scores [heads][key_tile].
inline int64_t shared_floats(int64_t heads, int64_t rank, int64_t rope) {
    return heads * (rank + rope) + heads * rank + key_tile * (rank + rope) + heads * key_tile;
}

__global__ void __launch_bounds__(threads) prefill_plain(const __grid_constant__ PrefillArguments a, int block_heads) {
    extern __shared__ float memory[];
    __shared__ float largest[most_heads], total[most_heads], rescale[most_heads];
    const KvLayout& layout = a.layout;
    int const rank = layout.rank, width = layout.rank + layout.rope;
    int const warp = threadIdx.x / warp_size, lane = threadIdx.x % warp_size;
    int64_t const token = blockIdx.x;
    int const first_head = blockIdx.y * block_heads, heads = min(block_heads, a.heads - first_head);
    float* const queries = memory;
    float* const sums = queries + block_heads * width;
    float* const rows = sums + block_heads * rank;
    float* const scores = rows + key_tile * width;

    int32_t const index = a.step.sequence_of(token);
    if (index < 0) {
        if (!a.zero_padding) return;
        for (int i = threadIdx.x; i < heads * a.value; i += threads) {
            int const head = first_head + i / a.value;
            store_float(a.output.data, a.output.type,
                        token * a.output.token_stride + head * a.output.head_stride + i % a.value, 0.0f);
        }
        if (a.lse != nullptr && threadIdx.x < heads) a.lse[token * a.heads + first_head + threadIdx.x] = -INFINITY;
        return;
    }
    Sequence const sequence = sequence_at(a.step, layout.page_size, index);
    if (sequence.tokens < a.min_new_tokens) return;
    int32_t const visible = static_cast<int32_t>(clamp(sequence.cached + (token - sequence.first) + 1, 0, sequence.keys));

    for (int i = warp; i < heads * rank; i += warps) {
        int const head = i / rank, r = i % rank;
        int64_t const start =
            token * a.query_nope.token_stride + (first_head + head) * a.query_nope.head_stride;
        float value = 0.0f;
        for (int n = lane; n < a.nope; n += warp_size) {
            value += load_float(a.query_nope.data, a.query_nope.type, start + n) *
                     weight_value(a.w_uk, first_head + head, rank, a.nope, r, n);
        }
        value = warp_sum(value);
        if (lane == 0) queries[head * width + r] = value;
    }
    for (int i = threadIdx.x; i < heads * layout.rope; i += threads) {
        int const head = i / layout.rope, d = i % layout.rope;
        queries[head * width + rank + d] =
            load_float(a.query_rope.data, a.query_rope.type,
                       token * a.query_rope.token_stride + (first_head + head) * a.query_rope.head_stride + d);
    }
    for (int i = threadIdx.x; i < heads * rank; i += threads) sums[i] = 0.0f;
    if (threadIdx.x < heads) {
        largest[threadIdx.x] = -INFINITY;
        total[threadIdx.x] = 0.0f;
    }

    for (int32_t start = 0; start < visible; start += key_tile) {
        __syncthreads();
        for (int slot = warp; slot < key_tile; slot += warps) {
            int32_t const key = start + slot;
            int32_t const page = key < visible ? page_of(a.step.block_table, a.step.max_pages, a.step.pages,
                                                         layout.page_size, index, key)
                                               : -1;
            float* const row = rows + slot * width;
            if (page < 0) {
                for (int i = lane; i < width; i += warp_size) row[i] = 0.0f;
                if (lane < heads) scores[lane * key_tile + slot] = -INFINITY;
                continue;
            }
            Row const stored =
                row_at(layout, static_cast<const uint8_t*>(a.pool), page, key % layout.page_size);
            for (int r = lane; r < rank; r += warp_size) row[r] = latent_value(layout, stored.bytes, r) * stored.scale;
            for (int d = lane; d < layout.rope; d += warp_size) {
                row[rank + d] = rope_value(layout, stored.bytes, d) * stored.scale;
            }
            __syncwarp();
            for (int head = 0; head < heads; ++head) {
                float score = 0.0f;
                for (int i = lane; i < width; i += warp_size) score += queries[head * width + i] * row[i];
                score = warp_sum(score) * a.softmax_scale;
                if (lane == 0) scores[head * key_tile + slot] = score;
            }
        }
        __syncthreads();
        if (threadIdx.x < heads) {
            float* const own = scores + threadIdx.x * key_tile;
            float top = largest[threadIdx.x];
            for (int slot = 0; slot < key_tile; ++slot) top = fmaxf(top, own[slot]);
            float const base = top == -INFINITY ? 0.0f : top;
            float const factor = expf(largest[threadIdx.x] - base);
            float sum = 0.0f;
            for (int slot = 0; slot < key_tile; ++slot) {
                own[slot] = expf(own[slot] - base);
                sum += own[slot];
            }
            largest[threadIdx.x] = top;
            rescale[threadIdx.x] = factor;
            total[threadIdx.x] = total[threadIdx.x] * factor + sum;
        }
        __syncthreads();
        for (int i = threadIdx.x; i < heads * rank; i += threads) {
            int const head = i / rank, r = i % rank;
            float value = sums[i] * rescale[head];
            for (int slot = 0; slot < key_tile; ++slot) value += scores[head * key_tile + slot] * rows[slot * width + r];
            sums[i] = value;
        }
    }
    __syncthreads();
    for (int i = warp; i < heads * a.value; i += warps) {
        int const head = i / a.value, v = i % a.value, number = first_head + head;
        float value = 0.0f;
        for (int r = lane; r < rank; r += warp_size) {
            value += sums[head * rank + r] * weight_value(a.w_uv, number, a.value, rank, v, r);
        }
        value = warp_sum(value);
        float denominator = total[head];
        if (a.sinks != nullptr && denominator > 0.0f) denominator += expf(a.sinks[number] - largest[head]);
        if (lane == 0) {
            store_float(a.output.data, a.output.type, token * a.output.token_stride + number * a.output.head_stride + v,
                        total[head] > 0.0f ? value / denominator : 0.0f);
        }
    }
    if (a.lse != nullptr && threadIdx.x < heads) {
        a.lse[token * a.heads + first_head + threadIdx.x] = logf(total[threadIdx.x]) + largest[threadIdx.x];
    }
}

}  // namespace mla::prefill_plain
