// The warpgroup of attend_hopper_fp8.cu that makes scores and softmax weights.
#pragma once

#include "attend_hopper_fp8_query.cuh"

namespace mla {
namespace hopper {

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)

// Rows of the scores that a thread has: the first is that of the product's row `first_row` (of both of its terms where these are rows of
// one product), the second is 8 further.
template <typename F>
struct OwnRows {
    unsigned const number;  // of the thread in its group
    __device__ int quad_thread() const { return static_cast<int>(number % 4); }
    __device__ int first_row() const {
        unsigned const warp = number / warp_size % 4, g = number / 4 % 8;
        return static_cast<int>(F::packed ? (warp * 8 + g) % F::rows : warp * 16 + g);
    }
    __device__ bool there() const { return !F::packed || number / warp_size % 4 * 8 < F::rows; }
};

template <typename F>
__device__ void score_group(const Attend& work, const Ring<F>& ring, uint8_t* memory) {
    using P = Places<F>;
    OwnRows<F> const own{threadIdx.x % group};
    constexpr int sixteens = tile / 16;  // keys of which a thread has four
    float factors[own_rows<F>], top[own_rows<F>];
#pragma unroll
    for (int r = 0; r < own_rows<F>; ++r) {
        factors[r] = reinterpret_cast<const float*>(memory + P::query_scales)[own.first_row() + 8 * r];
        top[r] = -INFINITY;
    }
    // the first tile in which a row sees less than all keys; limits do not fall from row to row, and listed keys are seen by all
    int32_t const masked_from = (reinterpret_cast<const int32_t*>(memory + P::limits)[0] + 1) / tile - ring.first_tile();
    uint32_t const first_keys = tile_descriptor(shared_address(memory));
    uint32_t const query = tile_descriptor(shared_address(memory + P::query));
    uint32_t const query_low = tile_descriptor(shared_address(memory + P::query_low));

#pragma unroll 1
    for (int32_t n = 0; n < ring.count; ++n) {
        int const buffer = n & 1;
        float scores[tile / 2];
        pin(scores);
        if constexpr (F::lists) {  // whose rows were not written by the copy engine
#pragma unroll 1
            for (int i = 0; i < pieces; ++i) ring.wait(n, i);
            fence_async();
        }
        auto keys_of = [&](int i) { return first_keys + (ring.offset(ring.slot(n, i), i) >> 4); };
        auto latent = [&](auto number) {
            constexpr int i = decltype(number)::value;
            if constexpr (!F::lists) ring.wait(n, i);
            uint32_t const keys = keys_of(i);
            constexpr uint32_t columns = Ring<F>::column(i) * (row_piece_bytes >> 4);
            product_fence();
            product_e4m3<0, i == 0>(scores, query + columns, keys);
            product_e4m3<1, false>(scores, query + columns, keys);
            product_e4m3<2, false>(scores, query + columns, keys);
            product_e4m3<3, false>(scores, query + columns, keys);
            if constexpr (F::second) {
                product_e4m3<0, false>(scores, query_low + columns, keys);
                product_e4m3<1, false>(scores, query_low + columns, keys);
                product_e4m3<2, false>(scores, query_low + columns, keys);
                product_e4m3<3, false>(scores, query_low + columns, keys);
            }
        };
        latent(std::integral_constant<int, 0>());
        latent(std::integral_constant<int, 1>());
        latent(std::integral_constant<int, 2>());
        latent(std::integral_constant<int, 3>());
        if constexpr (!F::lists) ring.wait(n, 4);
        {
            uint32_t const keys = keys_of(4);
            constexpr uint32_t columns = 4 * (row_piece_bytes >> 4);
            product_fence();
            if constexpr (F::flat) {
                constexpr int row = F::apart ? rope : 128;
                product_e4m3<0, false, row>(scores, query + columns, keys);
                product_e4m3<1, false, row>(scores, query + columns, keys);
                if constexpr (F::second) {  // its codes lie behind those of the first
                    product_e4m3<0, false, row>(scores, query + columns + rope / 16, keys);
                    product_e4m3<1, false, row>(scores, query + columns + rope / 16, keys);
                }
            } else {
                product_bf16<0, false>(scores, query + columns, keys);
                product_bf16<1, false>(scores, query + columns, keys);
                product_bf16<2, false>(scores, query + columns, keys);
                product_bf16<3, false>(scores, query + columns, keys);
            }
        }
        product_commit();
        named_sync(weights_free + buffer, threads);  // with it comes this tile's table of scales
        const float4* table = reinterpret_cast<const float4*>(memory + P::scales + n % F::tables * table_bytes) + own.quad_thread();
        constexpr int at_once = 2;  // 16 keys each
        float4 scale[at_once], logarithm[at_once];
        auto read_table = [&](int i) {
            if (!F::scales) return;
            scale[i % at_once] = table[4 * i], logarithm[i % at_once] = table[4 * i + tile / 4];
        };
#pragma unroll
        for (int i = 0; i < at_once; ++i) read_table(i);
        product_wait();
        pin(scores);

        // y of each key (without scales: still to be multiplied by the row's factor), and the largest of each row
#pragma unroll
        for (int i = 0; i < sixteens; ++i) {
            const float4 &by = scale[i % at_once], &plus = logarithm[i % at_once];
#pragma unroll
            for (int r = 0; r < own_rows<F>; ++r) {
                float *low = scores + 8 * i + 2 * r, *high = low + 4;
                if constexpr (F::packed) {
                    low[0] += low[2];
                    low[1] += low[3];
                    high[0] += high[2];
                    high[1] += high[3];
                }
                if constexpr (F::scales) {
                    low[0] = fmaf(low[0] * factors[r], by.x, plus.x);
                    low[1] = fmaf(low[1] * factors[r], by.y, plus.y);
                    high[0] = fmaf(high[0] * factors[r], by.z, plus.z);
                    high[1] = fmaf(high[1] * factors[r], by.w, plus.w);
                }
            }
            if (i + at_once < sixteens) read_table(i + at_once);
        }
        if constexpr (!F::lists) {
            // else a scale of 0 says so
            bool const no_page[2] = {!F::scales && ring.page_of_half(work, n, 0) == static_cast<int32_t>(work.step.pages),
                                     !F::scales && ring.page_of_half(work, n, 1) == static_cast<int32_t>(work.step.pages)};
            if (n >= masked_from || no_page[0] || no_page[1]) {
                int32_t const first_key = (ring.first_tile() + n) * tile + 2 * own.quad_thread();
#pragma unroll
                for (int r = 0; r < own_rows<F>; ++r) {
                    int const seen = reinterpret_cast<const int32_t*>(memory + P::limits)[own.first_row() + 8 * r] - first_key;
#pragma unroll
                    for (int j = 0; j < tile / 8; ++j) {
                        bool const missing = no_page[j / (half / 8)];
                        if (missing || 8 * j > seen) scores[4 * j + 2 * r] = -INFINITY;
                        if (missing || 8 * j + 1 > seen) scores[4 * j + 2 * r + 1] = -INFINITY;
                    }
                }
            }
        }
        bool steady = true;  // all rows of the warp keep their reference
        float best[own_rows<F>], rescale[own_rows<F>], tile_factor[own_rows<F>], base[own_rows<F>];  // a weight is 2^(y + base)
#pragma unroll
        for (int r = 0; r < own_rows<F>; ++r) {
            float most[2] = {-INFINITY, -INFINITY};
#pragma unroll
            for (int j = 0; j < tile / 8; ++j) most[j % 2] = fmaxf(most[j % 2], fmaxf(scores[4 * j + 2 * r], scores[4 * j + 2 * r + 1]));
            best[r] = fmaxf(most[0], most[1]);
            best[r] = fmaxf(best[r], __shfl_xor_sync(0xffffffffu, best[r], 1));
            best[r] = fmaxf(best[r], __shfl_xor_sync(0xffffffffu, best[r], 2));
            if constexpr (!F::scales) best[r] *= factors[r];
            rescale[r] = 1.0f;
            tile_factor[r] = 1.0f;
            base[r] = weight_bits - top[r];
            float const above = best[r] - top[r];
            steady = steady && above <= spare_bits && above > -low_bits;
        }
        int changed = 0;  // 1: the reference, 2: the tile has its own
        if (!__all_sync(0xffffffffu, steady)) {
#pragma unroll
            for (int r = 0; r < own_rows<F>; ++r) {
                float const now = best[r], highest = now > top[r] + spare_bits ? now : top[r];
                float const reference = highest == -INFINITY ? 0.0f : highest;
                bool const low = now < reference - low_bits && now != -INFINITY;
                float const of_tile = low ? fmaxf(now, reference - most_bits) : reference;
                changed |= (highest != top[r] && top[r] != -INFINITY ? 1 : 0) | (of_tile != reference ? 2 : 0);
                rescale[r] = power_of_two(top[r] - reference);
                top[r] = highest;
                base[r] = weight_bits - of_tile;
                tile_factor[r] = power_of_two(of_tile - reference);
            }
            changed = __reduce_or_sync(0xffffffffu, own.there() ? changed : 0);
        }

        // the weights come where the tile's rope was, which all warps have used now
        named_sync(scores_made, group);
        if (F::halved && own.number == 0) barrier_arrive(shared_address(memory + P::scored) + 8 * buffer);
        if (!F::lists && n + 1 == ring.count && ring.keys(n) < tile) ring.clear_tail(n, static_cast<int>(own.number));
        int const row = own.first_row();
        uint32_t const line = ring.weights(n) + row * 128 + ((row & 7) << 4) + 4 * own.quad_thread();
#pragma unroll
        for (int i = 0; i < sixteens; ++i) {
#pragma unroll
            for (int r = 0; r < own_rows<F>; ++r) {
                const float *low = scores + 8 * i + 2 * r, *high = low + 4;
                auto weight = [&](float score) {
                    return power_of_two(F::scales ? score + base[r] : fmaf(score, factors[r], base[r]));
                };
                uint32_t const word = encode_pair(weight(low[0]), weight(low[1])) | encode_pair(weight(high[0]), weight(high[1])) << 16;
                if (own.there()) store_word((line ^ (i << 4)) + r * 1024, word);
            }
        }
        if (own.there() && own.quad_thread() == 0) {
#pragma unroll
            for (int r = 0; r < own_rows<F>; ++r) {
                reinterpret_cast<float*>(memory + P::rescale)[buffer * 64 + row + 8 * r] = rescale[r];
                reinterpret_cast<float*>(memory + P::tile_factors)[buffer * 64 + row + 8 * r] = tile_factor[r];
            }
        }
        if (own.number % warp_size == 0) {
            reinterpret_cast<int32_t*>(memory + P::changed)[buffer * 4 + own.number / warp_size] = changed;
        }
        fence_async();
        named_arrive(weights_ready + buffer, threads);
    }
    if (own.there() && own.quad_thread() == 0) {
#pragma unroll
        for (int r = 0; r < own_rows<F>; ++r) reinterpret_cast<float*>(memory + P::tops)[own.first_row() + 8 * r] = top[r];
    }
    named_arrive(tops_there, 2 * group);
}

#endif

}  // namespace hopper
}  // namespace mla
