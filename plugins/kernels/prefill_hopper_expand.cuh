// Of SM90's prefill kernel: keys and values of some heads from latents, by the warpgroups that multiply.
#pragma once

#include "prefill_hopper_block.cuh"

namespace mla::prefill_hopper {

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)

// prefill_tensor::convert_weights for bf16 weights, eight at once: W_UV as it is, W_UK's parts of 64 x 64 turned round.
__device__ inline bool weights_are_vectors(const PrefillArguments& a) {
    auto const fits = [](const BlockScaledWeight& weight) {
        return weight.type == MLA_BFLOAT16 && weight.scale == nullptr && reinterpret_cast<uintptr_t>(weight.data) % 16 == 0;
    };
    return fits(a.w_uk) && fits(a.w_uv);
}
__device__ inline void turn_weights(const Plan& plan, uint16_t* tile) {
    using S = HopperShape;
    constexpr int rank = 512, side = 64, stride = side + 2, vectors = side * side / 8;
    const PrefillArguments& a = plan.arguments;
    auto* const weights = reinterpret_cast<uint4*>(plan.weights);
    int const of_head = (S::nope + S::width) * rank / 8, values_of_head = S::width * rank / 8;
    const auto* const values = static_cast<const uint4*>(a.w_uv.data);
    int64_t const count = static_cast<int64_t>(a.heads) * values_of_head;
#pragma unroll 4
    for (int64_t i = blockIdx.x * S::threads + threadIdx.x; i < count; i += gridDim.x * S::threads) {
        weights[i / values_of_head * of_head + S::nope * rank / 8 + i % values_of_head] = values[i];
    }
    constexpr int jobs_of_head = rank / side * (S::nope / side);
    for (int32_t job = blockIdx.x; job < a.heads * jobs_of_head; job += gridDim.x) {
        int32_t const head = job / jobs_of_head, r0 = job % jobs_of_head / (S::nope / side) * side;
        int32_t const n0 = job % (S::nope / side) * side;
        const auto* const source = static_cast<const uint4*>(a.w_uk.data) + (static_cast<int64_t>(head) * rank + r0) * (S::nope / 8) + n0 / 8;
        S::sync();
#pragma unroll
        for (int i = threadIdx.x; i < vectors; i += S::threads) {
            int const row = i / (side / 8), unit = i % (side / 8);
            uint4 const found = source[row * (S::nope / 8) + unit];
            auto* const target = reinterpret_cast<uint32_t*>(tile + row * stride + unit * 8);
            target[0] = found.x;
            target[1] = found.y;
            target[2] = found.z;
            target[3] = found.w;
        }
        S::sync();
#pragma unroll
        for (int i = threadIdx.x; i < vectors; i += S::threads) {
            int const column = i / (side / 8), unit = i % (side / 8);
            const uint16_t* const from = tile + unit * 8 * stride + column;
            auto const pair = [&](int k) { return from[2 * k * stride] | static_cast<uint32_t>(from[(2 * k + 1) * stride]) << 16; };
            weights[static_cast<int64_t>(head) * of_head + ((n0 + column) * rank + r0) / 8 + unit] =
                make_uint4(pair(0), pair(1), pair(2), pair(3));
        }
    }
}

// expanded = row scale x latents x weights^T for one job, by the warpgroups. `slot`: where `expanded` has its first head.
__device__ inline void expand(const Plan& plan, uint8_t* memory, const Work& job, int32_t slot, int32_t keys, Progress& done) {
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
        float sums[128];
        pin(sums);
#pragma unroll
        for (int i = 0; i < latent_pieces; ++i) {
            uint32_t const ring_slot = (number + i) % weight_ring;
            uint32_t const x = latents + i * (piece_bytes >> 4);
            uint32_t const w = tile_descriptor(base + place::weights + ring_slot * (weight_pieces * piece_bytes));
            if (head == 0) barrier_wait(base + place::latents_full + 8 * i, done.jobs & 1);
            barrier_wait(base + place::weights_full + 8 * ring_slot, (number + i) / weight_ring & 1);
            product_fence();
            if (i == 0) {
                product_bf16<0, true>(sums, x, w);
            } else {
                product_bf16<0, false>(sums, x, w);
            }
            product_bf16<1, false>(sums, x, w);
            product_bf16<2, false>(sums, x, w);
            product_bf16<3, false>(sums, x, w);
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
        pin(sums);
        number += latent_pieces;

        __nv_bfloat16* const target =
            plan.expanded + (static_cast<int64_t>(slot + job.head + head) * plan.chunk_keys() + row0) * plan.columns() + first_of_four(lane);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            bool const there = row0 + half * 8 < keys;
#pragma unroll
            for (int j = 0; j < 32; j += 2) {
                uint32_t const left = pack(sums[4 * j + 2 * half] * scale[half], sums[4 * j + 2 * half + 1] * scale[half]);
                uint32_t const right = pack(sums[4 * j + 4 + 2 * half] * scale[half], sums[4 * j + 5 + 2 * half] * scale[half]);
                uint2 const four = four_of_pairs(left, right, lane);
                if (there) *reinterpret_cast<uint2*>(target + half * 8 * plan.columns() + j * 8) = four;
            }
        }
    }
    ++done.jobs;
    done.weights = number;
}

#endif

}  // namespace mla::prefill_hopper
