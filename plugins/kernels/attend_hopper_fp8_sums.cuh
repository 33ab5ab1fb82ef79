// The warpgroup of attend_hopper_fp8.cu that makes tables of scales and adds the weights up.
#pragma once

#include "attend_hopper_fp8_scores.cuh"

namespace mla {
namespace hopper {

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)

// A row's weights are added up as they were rounded, by products with 1 / s, whose two terms are columns in turn: all lanes of a row have
// its sum. In the end what divides the output comes of it.
template <typename F>
__device__ void sum_group(const Attend& work, const Partials& partials, const Item& item, const Ring<F>& ring, uint8_t* memory) {
    using P = Places<F>;
    OwnRows<F> const own{threadIdx.x % group};
    int const warp = __shfl_sync(0xffffffffu, static_cast<int>(own.number) / warp_size, 0);
    float total[own_rows<F>];
#pragma unroll
    for (int r = 0; r < own_rows<F>; ++r) total[r] = 0.0f;
    auto make_scales = [&](int32_t n) {
        if (F::scales && !F::lists) ring.make_scale(work, n, static_cast<int>(own.number));
    };
#pragma unroll 1
    for (int n = 0; n < 2; ++n) {
        make_scales(n);
        if (n < ring.count) named_arrive(weights_free + n, threads);
    }

#pragma unroll 1
    for (int32_t n = 0; n < ring.count; ++n) {
        int const buffer = n & 1;
        named_sync(weights_ready + buffer, threads);
        int4 const changed = reinterpret_cast<const int4*>(memory + P::changed)[buffer];
        int const flags = changed.x | changed.y | changed.z | changed.w;
        uint32_t const line = ring.offset(ring.slot(n, 4), 4) + own.first_row() * 128 + ((own.first_row() & 7) << 4) + 4 * own.quad_thread();
        const uint8_t* inverses = memory + P::scales + n % F::tables * table_bytes + 2 * (tile * 4) + own.quad_thread() * 16 + own.number / 4 % 2 * 8;
        float sums[4] = {};
#pragma unroll 2
        for (int i = 0; i < tile / 16; ++i) {
            uint32_t codes[4] = {};  // as bfloat16: of the first row's keys, two and two, and of the second's between them
#pragma unroll
            for (int r = 0; r < own_rows<F>; ++r) {
                uint32_t const word = *reinterpret_cast<const uint32_t*>(memory + (line ^ (i << 4)) + r * 1024);
                codes[r] = word << 4 & 0x07f007f0u;
                codes[2 + r] = word >> 4 & 0x07f007f0u;
            }
            uint2 inverse = make_uint2(two_code_units, two_code_units);
            if (F::scales) inverse = *reinterpret_cast<const uint2*>(inverses + i * 64);
            mma_bf16(sums, codes, inverse.x, inverse.y);
        }
        const auto* rescale = reinterpret_cast<const float*>(memory + P::rescale) + buffer * 64 + own.first_row();
        const auto* tile_factors = reinterpret_cast<const float*>(memory + P::tile_factors) + buffer * 64 + own.first_row();
#pragma unroll
        for (int r = 0; r < own_rows<F>; ++r) {
            float const sum = F::scales ? sums[2 * r] + sums[2 * r + 1] : sums[2 * r];
            if (flags != 0) {
                total[r] = fmaf(sum, tile_factors[8 * r], total[r] * rescale[8 * r]);
            } else {
                total[r] += sum;
            }
        }
        named_arrive(tile_done, 3 * group);
        // only now: until the weights of this tile were there, other warps added up with the table in that place
        make_scales(n + 2);
        if (!F::lists && warp < 2) ring.bring_scales(work, n, warp);
        if (n + 2 < ring.count) named_arrive(weights_free + buffer, threads);
    }

    named_sync(tops_there, 2 * group);
    if (own.quad_thread() != 0 || !own.there()) return;
#pragma unroll
    for (int r = 0; r < own_rows<F>; ++r) {
        int const row = own.first_row() + 8 * r;
        if (row >= item.count) continue;  // its factor is never read by write_rows
        float const top = reinterpret_cast<const float*>(memory + P::tops)[row];
        float sum = total[r] * half_code_unit;
        int const flat = item.first_head + row;
        int64_t const token = item.first_token + flat / work.heads;
        int const head = flat % work.heads;
        int64_t const out_row = token * work.heads + head;
        float const lse = sum == 0.0f ? -INFINITY : top + log2f(sum) - weight_bits;
        if constexpr (F::cluster > 1) {
            reinterpret_cast<float*>(memory + P::part_lse)[row] = lse;
        } else if (item.slot >= 0) {
            partials.lse[partials.row(item.slot, row)] = lse;
        } else {
            if (work.lse != nullptr) work.lse[out_row] = lse * ln2;
            if (work.sinks != nullptr && sum != 0.0f) sum += exp2f(work.sinks[head] * log2e - top + weight_bits);
        }
        // parts are of codes
        float const whole = F::flat && item.slot < 0 ? work.layout.kv_scale : 1.0f;
        reinterpret_cast<float*>(memory + P::factors)[row] = sum == 0.0f ? 0.0f : whole / sum;
    }
}

#endif

}  // namespace hopper
}  // namespace mla
