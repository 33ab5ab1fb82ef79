// Of SM90's prefill kernel: keys and values of some heads from latents, by the warpgroups that multiply.
#pragma once

#include "prefill_hopper_block.cuh"

namespace mla::prefill_hopper {

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)

// Weights that the copy engine cannot read where they are, as bf16 [H, 512, Dn] and, behind them, [H, Dv, 512]; zeros in what was
// added.
template <typename T>
__device__ void copy_weight(const BlockScaledWeight& weight, const T* data, int32_t heads, int32_t rows, int32_t columns,
                            int32_t all_rows, int32_t all_columns, __nv_bfloat16* target) {
    using S = HopperShape;
    int64_t const count = static_cast<int64_t>(heads) * all_rows * all_columns;
    int64_t const threads = static_cast<int64_t>(gridDim.x) * S::threads;
    for (int64_t i = (blockIdx.x * S::threads + threadIdx.x) * int64_t{8}; i < count; i += threads * 8) {
        int32_t const column = static_cast<int32_t>(i % all_columns), row = static_cast<int32_t>(i / all_columns % all_rows);
        int64_t const head = i / all_columns / all_rows;
        float scale = 1.0f;  // one for all eight
        if (weight.scale != nullptr) {
            int64_t const block_row = head * ceil_div(rows, scale_group) + row / scale_group;
            scale = weight.scale[block_row * ceil_div(columns, scale_group) + column / scale_group];
        }
        const T* const source = data + (head * rows + row) * columns + column;
        uint32_t pairs[4];
#pragma unroll
        for (int k = 0; k < 8; k += 2) {
            auto const value = [&](int j) { return row < rows && column + j < columns ? static_cast<float>(source[j]) * scale : 0.0f; };
            pairs[k / 2] = pack(value(k), value(k + 1));
        }
        *reinterpret_cast<uint4*>(target + i) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
    }
}
__device__ inline void copy_weights(const Plan& plan) {
    using S = HopperShape;
    const PrefillArguments& a = plan.arguments;
    auto const copy = [&](const BlockScaledWeight& weight, int32_t rows, int32_t columns, int32_t all_rows, int32_t all_columns,
                          __nv_bfloat16* target) {
        auto const of_type = [&](auto const* data) {
            copy_weight(weight, data, a.heads, rows, columns, all_rows, all_columns, target);
        };
        switch (weight.type) {
            case MLA_FLOAT: return of_type(static_cast<const float*>(weight.data));
            case MLA_FLOAT16: return of_type(static_cast<const __half*>(weight.data));
            case MLA_BFLOAT16: return of_type(static_cast<const __nv_bfloat16*>(weight.data));
            default: return of_type(static_cast<const __nv_fp8_e4m3*>(weight.data));
        }
    };
    copy(a.w_uk, a.layout.rank, S::nope, rank, S::nope, plan.weights);
    copy(a.w_uv, S::width, a.layout.rank, S::width, rank, plan.weights + static_cast<int64_t>(a.heads) * S::nope * rank);
}

// Keys and values of one job, by the warpgroups: row scale x latents x weights. W_UK lies with its columns next to each other, W_UV
// with the latent's.
__device__ inline void expand(const Plan& plan, uint8_t* memory, const Work& job, int32_t keys, Progress& done) {
    int const warp = threadIdx.x / warp_size, lane = threadIdx.x % warp_size;
    int const g = lane / 4, side = uniform(warp / 4);
    uint32_t const base = shared_address(memory);
    uint32_t const latents = tile_descriptor(base + place::latents + side * (piece_bytes / 2));
    int32_t const heads = uniform(job.heads), row0 = job.key + warp * 16 + g;
    uint32_t number = uniform(done.weights);
    float scale[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) scale[half] = row0 + half * 8 < keys ? plan.row_scales[row0 + half * 8] : 0.0f;
    for (int32_t head = 0; head < heads; ++head) {
        float key_sums[64], value_sums[64];
        pin(key_sums);
        pin(value_sums);
#pragma unroll
        for (int i = 0; i < latent_pieces; ++i) {
            uint32_t const ring_slot = (number + i) % weight_ring;
            uint32_t const x = latents + i * (piece_bytes >> 4);
            uint32_t const w = tile_descriptor(base + place::weights + ring_slot * (2 * weight_bytes));
            if (head == 0) barrier_wait(base + place::latents_full + 8 * i, done.jobs & 1);
            barrier_wait(base + place::weights_full + 8 * ring_slot, (number + i) / weight_ring & 1);
            product_fence();
            uint32_t const w_values = w + (weight_bytes >> 4);
            if (i == 0) {
                product_bf16_wide<0, weight_bytes / 2, true>(key_sums, x, w);
                product_bf16<0, true>(value_sums, x, w_values);
            } else {
                product_bf16_wide<0, weight_bytes / 2>(key_sums, x, w);
                product_bf16<0, false>(value_sums, x, w_values);
            }
            product_bf16_wide<1, weight_bytes / 2>(key_sums, x, w);
            product_bf16<1, false>(value_sums, x, w_values);
            product_bf16_wide<2, weight_bytes / 2>(key_sums, x, w);
            product_bf16<2, false>(value_sums, x, w_values);
            product_bf16_wide<3, weight_bytes / 2>(key_sums, x, w);
            product_bf16<3, false>(value_sums, x, w_values);
            product_commit();
            auto used = [&](int piece) {
                if (lane != 0) return;
                barrier_arrive(base + place::weights_used + 8 * ((number + piece) % weight_ring));
                if (head == heads - 1) barrier_arrive(base + place::latents_used + 8 * piece);
            };
            if (i > 0) {
                product_wait<1>();
                used(i - 1);
            }
            if (i == latent_pieces - 1) {
                product_wait();
                used(i);
            }
        }
        pin(key_sums);
        pin(value_sums);
        number += latent_pieces;

        __nv_bfloat16* const target =
            plan.expanded + (static_cast<int64_t>(job.place + head) * plan.chunk_keys() + row0) * plan.columns() + first_of_four(lane);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            bool const there = row0 + half * 8 < keys;
            auto store = [&](const float(&sums)[64], int column) {
#pragma unroll
                for (int j = 0; j < 16; j += 2) {
                    uint32_t const left = pack(sums[4 * j + 2 * half] * scale[half], sums[4 * j + 2 * half + 1] * scale[half]);
                    uint32_t const right = pack(sums[4 * j + 4 + 2 * half] * scale[half], sums[4 * j + 5 + 2 * half] * scale[half]);
                    uint2 const four = four_of_pairs(left, right, lane);
                    if (there) *reinterpret_cast<uint2*>(target + half * 8 * plan.columns() + column + j * 8) = four;
                }
            };
            store(key_sums, 0);
            store(value_sums, HopperShape::nope);
        }
    }
    fence_copies();
    part_done(memory, done.work - 1);
    ++done.jobs;
    done.weights = number;
}

#endif

}  // namespace mla::prefill_hopper
