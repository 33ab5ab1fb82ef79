// The warpgroups of attend_hopper_fp8.cu that make scores and softmax weights.
#pragma once

#include "attend_hopper_fp8_query.cuh"

namespace mla {
namespace hopper {

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)

// Scores and softmax of 64 keys of each tile; which, the group's number says.
template <typename F>
__device__ void score_group(const Attend& work, const Partials& partials, const Item& item, const Ring<F>& ring,
                            uint8_t* memory) {
    using P = Places<F>;
    // a thread's place in everything follows from its number, each time again
    unsigned const number = F::lists ? again(threadIdx.x) : kept_thread();
    auto side = [&] { return static_cast<int>(again(number) / group); };
    auto thread = [&] { return static_cast<int>(again(number) % group); };
    auto quad_thread = [&] { return static_cast<int>(again(number) % 4); };
    auto first_row = [&] {  // the second is 8 further
        unsigned const warp = again(number) / warp_size % 4, g = again(number) / 4 % 8;
        return static_cast<int>(F::packed ? (warp * 8 + g) % F::rows : warp * 16 + g);
    };
    auto has_rows = [&] { return !F::packed || again(number) / warp_size % 4 * 8 < F::rows; };

    float factors[own_rows<F>], top[own_rows<F>], total[own_rows<F>];
#pragma unroll
    for (int r = 0; r < own_rows<F>; ++r) {
        factors[r] = reinterpret_cast<const float*>(memory + P::query_scales)[first_row() + 8 * r];
        top[r] = -INFINITY;
        total[r] = 0.0f;
    }
    // the first tile in which a row sees less than all keys; limits do not fall from row to row, and listed keys are seen by all
    int32_t const masked_from =
        (reinterpret_cast<const int32_t*>(memory + P::limits)[0] + 1 - (side() + 1) * half + tile) / tile - ring.first_tile();

    // known to be uniform where it comes from a lane: faster with few rows, where keys are waited for, slower with many
    auto own_keys = [&] { return tile_descriptor(shared_address(memory)) + side() * (piece_bytes >> 5); };
    uint32_t const uniform_keys = F::packed ? __shfl_sync(0xffffffffu, own_keys(), 0) : 0;
    auto keys_of = [&](int32_t n, int i) { return (F::packed ? uniform_keys : own_keys()) + (ring.offset(ring.slot(n, i), i) >> 4); };
    auto rope_of = [&](int32_t n) {
        if (!F::apart) return keys_of(n, 4);
        return tile_descriptor(shared_address(memory)) + side() * (small_piece_bytes >> 5) + (ring.offset(ring.slot(n, 4), 4) >> 4);
    };
    uint32_t const query = tile_descriptor(shared_address(memory + P::query));
    uint32_t const query_low = tile_descriptor(shared_address(memory + P::query_low));
    int third = 0;  // n % 3
    uint32_t words[own_rows<F>][4];  // the weights' codes of a tile
    float tile_factor[own_rows<F>];
    auto scales_of = [&](int which) {
        return reinterpret_cast<const float4*>(memory + P::scales + which * (3 * tile * 4) + side() * (half * 4) + quad_thread() * 16);
    };
    float sums[own_rows<F>];  // of a tile's weights as they were rounded
    float4 inverse;
    // 1 / s of the `quarter`-th 16 of the group's keys, of the tile whose number % 3 is `which`; adds their weights.
    auto read_inverse = [&](int which, int quarter) {
        inverse = F::scales ? scales_of(which)[4 * quarter + 2 * (tile / 4)]
                            : make_float4(half_code_unit, half_code_unit, half_code_unit, half_code_unit);
    };
    auto add_weights = [&](int quarter) {
#pragma unroll
        for (int r = 0; r < own_rows<F>; ++r) {
            uint32_t const codes = words[r][quarter];
            float sum = quarter == 0 ? 0.0f : sums[r];
            sum = fmaf(__uint_as_float(codes << 20 & 0x07f00000u), inverse.x, sum);
            sum = fmaf(__uint_as_float(codes << 12 & 0x07f00000u), inverse.y, sum);
            sum = fmaf(__uint_as_float(codes << 4 & 0x07f00000u), inverse.z, sum);
            sum = fmaf(__uint_as_float(codes >> 4 & 0x07f00000u), inverse.w, sum);
            sums[r] = sum;
        }
    };
    auto add_sums = [&] {
#pragma unroll
        for (int r = 0; r < own_rows<F>; ++r) total[r] = fmaf(sums[r], tile_factor[r], total[r]);
    };

#pragma unroll 1
    for (int32_t n = 0; n < ring.count; ++n) {
        int const buffer = n & 1;
        float scores[32];
        pin(scores);
        if constexpr (F::lists) {  // whose rows were not written by the copy engine
#pragma unroll 1
            for (int i = 0; i < pieces; ++i) ring.wait(n, i);
            fence_async();
        }
        // sums of the tile before are made between the products, and what they need is read a piece earlier: behind products that are
        // under way a read takes as long as they do; but where these are few, and keys are waited for
        int const before = third == 0 ? 2 : third - 1;
        bool const adds = F::late_sums && n > 0;
        constexpr bool ahead = !F::packed;
        if (adds && ahead) read_inverse(before, 0);
        auto latent = [&](auto number) {
            constexpr int i = decltype(number)::value;
            if constexpr (!F::lists) ring.wait(n, i);
            uint32_t const keys = keys_of(n, i);
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
        auto add_quarter = [&](int quarter) {
            if (!adds) return;
            if (!ahead) read_inverse(before, quarter);
            add_weights(quarter);
            if (quarter == 3) {
                add_sums();
            } else if (ahead) {
                read_inverse(before, quarter + 1);
            }
        };
        latent(std::integral_constant<int, 0>());
        add_quarter(0);
        latent(std::integral_constant<int, 1>());
        add_quarter(1);
        latent(std::integral_constant<int, 2>());
        add_quarter(2);
        latent(std::integral_constant<int, 3>());
        add_quarter(3);
        if constexpr (!F::lists) ring.wait(n, 4);
        {
            uint32_t const keys = rope_of(n);
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
                product_bf16<0>(scores, query + columns, keys);
                product_bf16<1>(scores, query + columns, keys);
                product_bf16<2>(scores, query + columns, keys);
                product_bf16<3>(scores, query + columns, keys);
            }
        }
        product_commit();
        named_sync(weights_free + buffer, threads);  // with it comes this tile's table of scales
        const float4* table = scales_of(third);
        constexpr int at_once = F::lists ? 1 : 2;  // 16 keys each
        float4 scale[at_once], logarithm[at_once];
        auto read_table = [&](int quarter) {
            if (!F::scales) return;
            scale[quarter % at_once] = table[4 * quarter], logarithm[quarter % at_once] = table[4 * quarter + tile / 4];
        };
        // else a scale of 0 says so
        bool const no_page = !F::scales && ring.page_of_half(work, n, side()) == static_cast<int32_t>(work.step.pages);
#pragma unroll
        for (int quarter = 0; quarter < at_once; ++quarter) read_table(quarter);
        product_wait();
        pin(scores);

        // y of each key (without scales: still to be multiplied by the row's factor), and the largest of each row over both groups
        float best[own_rows<F>];
#pragma unroll
        for (int r = 0; r < own_rows<F>; ++r) best[r] = -INFINITY;
#pragma unroll
        for (int j = 0; j < 8; j += 2) {
            const float4 &by = scale[j / 2 % at_once], &plus = logarithm[j / 2 % at_once];
#pragma unroll
            for (int r = 0; r < own_rows<F>; ++r) {
                float *low = scores + 4 * j + 2 * r, *high = low + 4;
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
            if (j / 2 + at_once < 4) read_table(j / 2 + at_once);
        }
        if (!F::lists && (n >= masked_from || no_page)) {
            int32_t const first_key = (ring.first_tile() + n) * tile + side() * half + 2 * quad_thread();
#pragma unroll
            for (int r = 0; r < own_rows<F>; ++r) {
                int const limit = reinterpret_cast<const int32_t*>(memory + P::limits)[first_row() + 8 * r];
                int const seen = no_page ? -1 : limit - first_key;
#pragma unroll
                for (int j = 0; j < 8; ++j) {
                    if (8 * j > seen) scores[4 * j + 2 * r] = -INFINITY;
                    if (8 * j + 1 > seen) scores[4 * j + 2 * r + 1] = -INFINITY;
                }
            }
        }
#pragma unroll
        for (int r = 0; r < own_rows<F>; ++r) {
#pragma unroll
            for (int j = 0; j < 8; ++j) best[r] = fmaxf(best[r], fmaxf(scores[4 * j + 2 * r], scores[4 * j + 2 * r + 1]));
            best[r] = fmaxf(best[r], __shfl_xor_sync(0xffffffffu, best[r], 1));
            best[r] = fmaxf(best[r], __shfl_xor_sync(0xffffffffu, best[r], 2));
            if constexpr (!F::scales) best[r] *= factors[r];
            if (quad_thread() == 0 && has_rows()) {
                reinterpret_cast<float*>(memory + P::maxima)[(buffer * 2 + side()) * 64 + first_row() + 8 * r] = best[r];
            }
        }
        named_sync(maxima_ready, 2 * group);
        if (!F::lists && n + 1 == ring.count && ring.keys(n) < tile) ring.clear_tail(n, side(), thread());
        int changed = 0;  // 1: the reference, 2: the tile has its own
        float base[own_rows<F>];
#pragma unroll
        for (int r = 0; r < own_rows<F>; ++r) {
            float const other =
                reinterpret_cast<const float*>(memory + P::maxima)[(buffer * 2 + 1 - side()) * 64 + first_row() + 8 * r];
            float const now = fmaxf(best[r], other), highest = now > top[r] + spare_bits ? now : top[r];
            float const reference = highest == -INFINITY ? 0.0f : highest;
            float const factor = power_of_two(top[r] - reference);
            bool const low = now < reference - low_bits && now != -INFINITY;
            float const own = low ? fmaxf(now, reference - most_bits) : reference;
            changed |= (highest != top[r] ? 1 : 0) | (own != reference ? 2 : 0);
            top[r] = highest;
            total[r] *= factor;
            base[r] = weight_bits - own;
            best[r] = factor;
        }

#pragma unroll
        for (int j = 0; j < 8; j += 2) {
#pragma unroll
            for (int r = 0; r < own_rows<F>; ++r) {
                const float *low = scores + 4 * j + 2 * r, *high = low + 4;
                auto weight = [&](float score) {
                    return power_of_two(F::scales ? score + base[r] : fmaf(score, factors[r], base[r]));
                };
                words[r][j / 2] = encode_pair(weight(low[0]), weight(low[1])) | encode_pair(weight(high[0]), weight(high[1])) << 16;
            }
            if (!F::late_sums) {
                read_inverse(third, j / 2);
                add_weights(j / 2);
            }
        }
#pragma unroll
        for (int r = 0; r < own_rows<F>; ++r) {
            tile_factor[r] = power_of_two(weight_bits - base[r] - (top[r] == -INFINITY ? 0.0f : top[r]));
        }
        if (!F::late_sums) add_sums();
        if (has_rows()) {
            int const row = first_row();
            uint32_t const line = ring.weights(n) + row * 128 +
                                  (((4 * side()) ^ (row & 7)) << 4) + 4 * quad_thread();
#pragma unroll
            for (int r = 0; r < own_rows<F>; ++r) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    store_word((line ^ (i << 4)) + r * 1024, words[r][i]);
                }
                if (side() == 0 && quad_thread() == 0) {
                    reinterpret_cast<float*>(memory + P::rescale)[buffer * 64 + row + 8 * r] = best[r];
                    reinterpret_cast<float*>(memory + P::tile_factors)[buffer * 64 + row + 8 * r] = tile_factor[r];
                }
            }
        }
        if (side() == 0) {
            int const any = __reduce_or_sync(0xffffffffu, has_rows() ? changed : 0);
            if (thread() % warp_size == 0) {
                reinterpret_cast<int32_t*>(memory + P::changed)[buffer * 4 + thread() / warp_size] = any;
            }
        }
        fence_async();
        named_arrive(weights_ready + buffer, threads);
        third = third == 2 ? 0 : third + 1;
    }
    if (F::late_sums && ring.count > 0) {
#pragma unroll
        for (int quarter = 0; quarter < 4; ++quarter) {
            read_inverse(third == 0 ? 2 : third - 1, quarter);
            add_weights(quarter);
        }
        add_sums();
    }

    // what divides the output
    auto* all_sums = reinterpret_cast<float*>(memory + P::sums(ring.count));
    bool const first_lane = quad_thread() == 0 && has_rows();
#pragma unroll
    for (int r = 0; r < own_rows<F>; ++r) {
        total[r] += __shfl_xor_sync(0xffffffffu, total[r], 1);
        total[r] += __shfl_xor_sync(0xffffffffu, total[r], 2);
        if (first_lane) all_sums[side() * 64 + first_row() + 8 * r] = total[r];
    }
    named_sync(maxima_ready, 2 * group);
    if (side() != 0 || !first_lane) return;
#pragma unroll
    for (int r = 0; r < own_rows<F>; ++r) {
        int const row = first_row() + 8 * r;
        if (row >= item.count) continue;  // its factor is never read by write_rows
        float sum = (all_sums[row] + all_sums[64 + row]) * half_code_unit;
        int const flat = item.first_head + row;
        int64_t const token = item.first_token + flat / work.heads;
        int const head = flat % work.heads;
        int64_t const out_row = token * work.heads + head;
        float const lse = sum == 0.0f ? -INFINITY : top[r] + log2f(sum) - weight_bits;
        if constexpr (F::cluster > 1) {
            reinterpret_cast<float*>(memory + P::part_lse)[row] = lse;
        } else if (item.slot >= 0) {
            partials.lse[partials.row(item.slot, row)] = lse;
        } else {
            if (work.lse != nullptr) work.lse[out_row] = lse * ln2;
            if (work.sinks != nullptr && sum != 0.0f) sum += exp2f(work.sinks[head] * log2e - top[r] + weight_bits);
        }
        // parts are of codes
        float const whole = F::flat && item.slot < 0 ? work.layout.kv_scale : 1.0f;
        reinterpret_cast<float*>(memory + P::factors)[row] = sum == 0.0f ? 0.0f : whole / sum;
    }
}

#endif

}  // namespace hopper
}  // namespace mla
