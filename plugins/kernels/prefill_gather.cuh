// What the prefill kernels on tensor cores do to rows before they multiply: pool rows to bf16, and padding of the output to zeros.
#pragma once

#include "mma.cuh"
#include "prefill_plan.cuh"

namespace mla::prefill_step {

__device__ inline uint32_t pack(float low, float high) {
    __nv_bfloat162 const pair = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<const uint32_t&>(pair);
}

// Latent values r..r+7 of a row, before the row's factor, as bf16; zeros past R. Rows lie on multiples of 16 bytes.
__device__ inline uint4 latent_vector(const KvLayout& layout, const uint8_t* row, int32_t r) {
    if (r + 8 <= layout.rank && layout.format == row_format::bf16) return *reinterpret_cast<const uint4*>(row + 2 * r);
    if (r + 8 <= layout.rank && layout.format != row_format::fp8_ds_mla) {
        uint2 const codes = *reinterpret_cast<const uint2*>(row + r);
        uint2 const low = decode_e4m3x4(codes.x), high = decode_e4m3x4(codes.y);
        return make_uint4(low.x, low.y, high.x, high.y);
    }
    float values[8];
    for (int i = 0; i < 8; ++i) values[i] = r + i < layout.rank ? latent_value(layout, row, r + i) : 0.0f;
    return make_uint4(pack(values[0], values[1]), pack(values[2], values[3]), pack(values[4], values[5]),
                      pack(values[6], values[7]));
}

// Rows of the chunk's keys; zeros for keys that do not exist.
template <typename S>
__device__ void gather(const Plan& plan, int32_t chunk_start, int32_t chunk_end) {
    constexpr int warps = S::warps, at_once = 4;  // rows of a warp whose loads are under way together
    __shared__ uint32_t present[key_tile / 32];
    const PrefillArguments& a = plan.arguments;
    const KvLayout& layout = a.layout;
    int const warp = threadIdx.x / warp_size, lane = threadIdx.x % warp_size;
    for (int32_t tile = chunk_start + blockIdx.x; tile < chunk_end; tile += gridDim.x) {
        int32_t const local = tile - chunk_start;
        int32_t const index = owner(plan.key_tiles, static_cast<int32_t>(a.step.sequences), tile);
        int32_t const key0 = (tile - plan.key_tiles[index]) * key_tile;
        int32_t const keys = sequence_at(a.step, layout.page_size, index).keys;
        S::sync();
        if (threadIdx.x < key_tile / 32) present[threadIdx.x] = 0;
        S::sync();
        for (int slot0 = warp * at_once; slot0 < key_tile; slot0 += warps * at_once) {
            int64_t const place0 = static_cast<int64_t>(local) * key_tile + slot0;
            Row rows[at_once];
#pragma unroll
            for (int i = 0; i < at_once; ++i) {
                int32_t const key = key0 + slot0 + i;
                int32_t const page =
                    key < keys ? page_of(a.step.block_table, a.step.max_pages, a.step.pages, layout.page_size, index, key) : -1;
                rows[i] = Row{nullptr, 0.0f};
                if (page >= 0) rows[i] = row_at(layout, static_cast<const uint8_t*>(a.pool), page, key % layout.page_size);
            }
            for (int r = lane * 8; r < plan.rank; r += warp_size * 8) {
                uint4 values[at_once];
#pragma unroll
                for (int i = 0; i < at_once; ++i) {
                    values[i] = rows[i].bytes != nullptr ? latent_vector(layout, rows[i].bytes, r) : make_uint4(0, 0, 0, 0);
                }
#pragma unroll
                for (int i = 0; i < at_once; ++i) *reinterpret_cast<uint4*>(plan.latents + (place0 + i) * plan.rank + r) = values[i];
            }
            for (int d = lane; d < plan.rope; d += warp_size) {
                float values[at_once];
#pragma unroll
                for (int i = 0; i < at_once; ++i) {
                    bool const there = rows[i].bytes != nullptr && d < layout.rope;
                    values[i] = there ? rope_value(layout, rows[i].bytes, d) * rows[i].scale : 0.0f;
                }
#pragma unroll
                for (int i = 0; i < at_once; ++i) plan.ropes[(place0 + i) * plan.rope + d] = __float2bfloat16_rn(values[i]);
            }
            if (lane == 0) {
#pragma unroll
                for (int i = 0; i < at_once; ++i) {
                    plan.row_scales[place0 + i] = rows[i].scale;
                    if (rows[i].bytes != nullptr) atomicOr(&present[(slot0 + i) / 32], 1u << ((slot0 + i) % 32));
                }
            }
        }
        S::sync();
        if (threadIdx.x == 0) plan.key_masks[local] = present[0] | static_cast<uint64_t>(present[1]) << 32;
    }
}

template <int threads>
__device__ void zero_token(const PrefillArguments& a, int64_t token) {
    if (a.step.sequence_of(token) >= 0) return;
    for (int j = threadIdx.x; j < a.heads * a.value; j += threads) {
        int64_t const start = token * a.output.token_stride + j / a.value * a.output.head_stride;
        store_float(a.output.data, a.output.type, start + j % a.value, 0.0f);
    }
    if (a.lse == nullptr) return;
    for (int head = threadIdx.x; head < a.heads; head += threads) a.lse[token * a.heads + head] = -INFINITY;
}

template <int threads>
__device__ void zero_padding(const PrefillArguments& a) {
    // a block's tokens, `threads` of them looked at together
    int64_t const apart = gridDim.x, stride = threads * apart;
    for (int64_t first = blockIdx.x; first < a.step.tokens; first += stride) {
        int64_t const own = first + threadIdx.x * apart;
        if (!__syncthreads_or(own < a.step.tokens && a.step.sequence_of(own) < 0)) continue;
        for (int64_t i = first; i < min(first + stride, a.step.tokens); i += apart) zero_token<threads>(a, i);
    }
}

}  // namespace mla::prefill_step
