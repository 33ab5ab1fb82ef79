// Of SM90's prefill kernel: keys and values of some heads from latents, by the warpgroups that multiply.
#pragma once

#include <type_traits>

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

// Keys and values of one expansion, by the warpgroups: row scale x latents x weights. W_UK lies with its columns next to each other,
// W_UV with the latent's. A head's keys are stored while its values are multiplied, and these beside the next head's keys, by the copy
// engine: stores from registers, 32 bytes of each of eight rows, would take the tensor cores' time at shared memory.
__device__ inline void expand(const Plan& plan, const Maps& maps, uint8_t* memory, const Work& work) {
    int const warp = threadIdx.x / warp_size, lane = threadIdx.x % warp_size;
    int const side = uniform(warp / 4), row0 = warp * warp_rows + lane / 4;
    uint32_t const base = shared_address(memory);
    uint32_t const latents = tile_descriptor(base + place::latents + side * (piece_bytes / 2));
    int32_t const heads = uniform(work.heads);
    uint32_t slot = uniform(work.first % weight_ring), round = uniform(work.first / weight_ring & 1);
    float scale[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) scale[half] = row0 + half * 8 < work.keys ? plan.row_scales[work.key + row0 + half * 8] : 0.0f;

    // Eight rows and 64 columns are staged at a time, in two places: a copy takes a thousand cycles until its place is free.
    uint32_t const staged = base + place::staged + warp * place::staged_bytes;
    int const staged_row = lane % 8;  // of the matrices, the one that the lane gives the address of
    // A part of eight of `of_head`'s keys (columns 0 on) or values: 32 columns of eight of the warp's rows.
    auto store = [&](const float(&sums)[64], int part, int column, int32_t of_head) {
        int const half = part / 2 % 2;
        if (part % 2 == 0) {
            if (lane == 0) store_wait_read<1>();
            __syncwarp();
        }
        uint32_t four[4];
#pragma unroll
        for (int k = 0; k < 4; ++k) {  // of eight columns each
            int const first = (part / 4 * 8 + part % 2 * 4 + k) * 4 + 2 * half;
            four[k] = pack(sums[first] * scale[half], sums[first + 1] * scale[half]);
        }
        uint32_t const rows = staged + half * (place::staged_bytes / 2);
        store_matrices(rows + staged_row * 128 + ((part % 2 * 4 + lane / 8 ^ staged_row) << 4), four);
        if (part % 2 == 1) {
            fence_async();
            __syncwarp();
            if (lane == 0) {
                int const bytes = (column + part / 4 * 64) * 2;
                store_box(&maps.expanded_rows, rows, bytes, work.key + warp * warp_rows + half * 8, work.place + of_head, 0);
                store_commit();
            }
        }
    };
    // The piece of weights before the one at `slot` was used, and maybe the last of the latents' pieces.
    auto used = [&](int piece, bool last) {
        if (lane != 0) return;
        barrier_arrive(base + place::weights_used + 8 * (slot == 0 ? weight_ring - 1 : slot - 1));
        if (last) barrier_arrive(base + place::latents_used + 8 * piece);
    };
    bool ready = false;  // whether the piece at `slot` is known to be there: seen beside work for which a wait is no loss
    // `sums` of a head, and beside them what is to be done after what was multiplied before.
    auto multiply = [&](auto of_keys, float(&sums)[64], float(&before)[64], bool first, bool last, auto&& beside) {
        constexpr bool is_key = decltype(of_keys)::value;
        if (!first) {
            product_wait();
            used(latent_pieces - 1, false);
            pin(before);
        }
        pin(sums);
#pragma unroll
        for (int i = 0; i < latent_pieces; ++i) {
            if (first) barrier_wait(base + place::latents_full + 8 * i, work.number & 1);
            if (!ready) barrier_wait(base + place::weights_full + 8 * slot, round);
            uint32_t const x = latents + i * (piece_bytes >> 4);
            uint32_t const w = tile_descriptor(base + place::weights) + slot * (piece_bytes >> 4);
            auto step = [&](auto number) {
                constexpr int n = decltype(number)::value;
                if constexpr (is_key) {
                    if (n == 0 && i == 0) {
                        product_bf16_wide<n, piece_bytes / 2, true>(sums, x, w);
                    } else {
                        product_bf16_wide<n, piece_bytes / 2>(sums, x, w);
                    }
                } else {
                    if (n == 0 && i == 0) {
                        product_bf16<n, true>(sums, x, w);
                    } else {
                        product_bf16<n, false>(sums, x, w);
                    }
                }
            };
            product_fence();
            step(std::integral_constant<int, 0>());
            step(std::integral_constant<int, 1>());
            step(std::integral_constant<int, 2>());
            step(std::integral_constant<int, 3>());
            product_commit();
            if (i > 0) {
                product_wait<1>();
                used(i - 1, last);
            }
            slot = slot == weight_ring - 1 ? 0 : slot + 1;
            round ^= slot == 0;
            ready = barrier_test(base + place::weights_full + 8 * slot, round);
            beside(i);
        }
    };
    float keys[64], values[64];
    multiply(std::true_type(), keys, keys, true, false, [](int) {});
    for (int32_t head = 1; head < heads; ++head) {
        multiply(std::false_type(), values, keys, false, false, [&](int i) { store(keys, i, 0, head - 1); });
        multiply(std::true_type(), keys, values, false, false, [&](int i) { store(values, i, HopperShape::nope, head - 1); });
    }
    multiply(std::false_type(), values, keys, false, true, [&](int i) { store(keys, i, 0, heads - 1); });
    product_wait();
    used(latent_pieces - 1, true);
    pin(values);
#pragma unroll
    for (int i = 0; i < latent_pieces; ++i) store(values, i, HopperShape::nope, heads - 1);
    if (lane == 0) store_wait();
    part_done(memory);
}

#endif

}  // namespace mla::prefill_hopper
