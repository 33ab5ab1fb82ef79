// Of SM90's prefill kernel: attention of a unit, by the warpgroups that multiply.
#pragma once

#include <type_traits>

#include "prefill_hopper_block.cuh"

namespace mla::prefill_hopper {

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)

// A row's weights are powers of two of its scores less a reference, a score of the row that is not far below its largest one so far. A
// tile in whose weights a thread's sum is below `most_of_weights` needs no other one. Where the largest score is looked for, it becomes
// the reference if it is this much above it, in powers of two: then sums must be multiplied.
constexpr float most_above_reference = 8.0f, most_of_weights = 1 << 24;

// The scores of the warp's rows once more, for 128 keys from `first` on, all of the unit: by products of the warp alone, with keys from
// global memory, as their place may have another tile's by now.
__device__ inline void score_again(const Plan& plan, uint8_t* memory, int32_t place_of_head, int32_t first, float (&scores)[64]) {
    int const lane = threadIdx.x % warp_size, g = lane / 4, t = lane % 4, row = threadIdx.x / warp_size * warp_rows + lane % 16;
    uint32_t const queries = shared_address(memory + place::queries) + row * 128;
    int32_t const key = first + g, width = plan.columns(), rope = HopperShape::rope;
    const __nv_bfloat16* const keys = plan.expanded + (static_cast<int64_t>(place_of_head) * plan.chunk_keys() + key) * width + 2 * t;
    const __nv_bfloat16* const ropes = plan.ropes + static_cast<int64_t>(key) * rope + 2 * t;
#pragma unroll
    for (int i = 0; i < 64; ++i) scores[i] = 0.0f;
#pragma unroll 1
    for (int step = 0; step < key_pieces * 4; ++step) {  // of 16 values
        bool const of_rope = step >= HopperShape::nope / 16;
        const __nv_bfloat16* const from = of_rope ? ropes + step * 16 - HopperShape::nope : keys + step * 16;
        int const stride = of_rope ? rope : width;
        uint32_t q[4];
        ldmatrix_x4(q, queries + step / 4 * piece_bytes + ((step % 4 * 2 + lane / 16 ^ row % 8) << 4));
#pragma unroll
        for (int i = 0; i < 16; ++i) {
            // another block wrote them, so not what L1 may have
            auto const pair = [&](int k) { return *reinterpret_cast<const volatile uint32_t*>(from + i * 8 * stride + k); };
            float sums[4] = {scores[4 * i], scores[4 * i + 1], scores[4 * i + 2], scores[4 * i + 3]};
            mma_bf16(sums, q, pair(0), pair(8));
#pragma unroll
            for (int m = 0; m < 4; ++m) scores[4 * i + m] = sums[m];
        }
    }
}

// Attention of one unit over its key tiles of this chunk, two of them at a time, by the warpgroups. `vectors`: see Maps::outputs.
__device__ inline void attend_unit(const Plan& plan, uint8_t* memory, const Work& work, bool vectors) {
    const PrefillArguments& a = plan.arguments;
    const Unit& unit = work.unit;
    uint32_t const tiles = uniform(work.first);
    int const warp = threadIdx.x / warp_size, lane = threadIdx.x % warp_size;
    int const g = lane / 4, t = lane % 4, first_row = warp * warp_rows + g;
    int const side = uniform(warp / 4), group_row = side * 64;
    int32_t const count = uniform(tile_count(unit));
    float const factor = fmaxf(fabsf(a.softmax_scale) * log2e, 1e-30f);

    float sums[64], scores[64], largest[2], total[2];  // largest: the row's reference (most_above_reference); total: this lane's part
    uint32_t weights[8][4];
    auto state_row = [&] { return static_cast<int64_t>(unit.head) * a.step.tokens + unit.token + first_row; };
#pragma unroll
    for (int i = 0; i < 64; ++i) sums[i] = 0.0f;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        largest[half] = -INFINITY;
        total[half] = 0.0f;
        if (unit.starts || first_row + 8 * half >= unit.rows) continue;
        float2 const state = plan.state_sums[state_row() + 8 * half];
        largest[half] = state.x;
        total[half] = t == 0 ? state.y : 0.0f;
        const float* const row = plan.states + (state_row() + 8 * half) * HopperShape::width + 2 * t;
#pragma unroll
        for (int j = 0; j < 16; ++j) {
            float2 const pair = *reinterpret_cast<const float2*>(row + j * 8);
            sums[4 * j + 2 * half] = pair.x;
            sums[4 * j + 2 * half + 1] = pair.y;
        }
    }

    auto arrive = [&](uint32_t barrier) {
        __syncwarp();
        if (lane == 0) barrier_arrive(barrier);
    };
    auto keys_used = [&](int32_t tile) { arrive(ring_barrier<tile_ring>(memory, place::keys_used, tiles + tile)); };
    auto values_used = [&](int32_t tile) { arrive(ring_barrier<tile_ring>(memory, place::values_used, tiles + tile)); };
    // The warpgroups take turns: one orders products, the keys of a tile and the values of the one before, which the tensor
    // cores do while the other one makes weights.
    auto take_turn = [&] { named_sync(turn + side, HopperShape::threads); };
    auto pass_turn = [&] { named_arrive(turn + 1 - side, HopperShape::threads); };
    uint32_t const queries = tile_descriptor(shared_address(memory + place::queries) + group_row * 128);
    auto multiply_keys = [&](int32_t tile) {
        uint32_t const keys =
            tile_descriptor(shared_address(memory + place::keys) + (tiles + tile) % tile_ring * (key_pieces * piece_bytes));
        auto piece = [&](auto index) {
            constexpr int i = decltype(index)::value;
            uint32_t const q = queries + i * (piece_bytes >> 4), k = keys + i * (piece_bytes >> 4);
            product_bf16<0, i == 0>(scores, q, k);
            product_bf16<1, false>(scores, q, k);
            product_bf16<2, false>(scores, q, k);
            product_bf16<3, false>(scores, q, k);
        };
        piece(std::integral_constant<int, 0>());
        piece(std::integral_constant<int, 1>());
        piece(std::integral_constant<int, 2>());
        product_commit();
    };
    auto multiply_values = [&](int32_t tile, auto all) {
        uint32_t const values =
            tile_descriptor(shared_address(memory + place::values) + (tiles + tile) % tile_ring * (value_pieces * piece_bytes));
        product_bf16_values<0, piece_bytes>(sums, weights[0], values);
        product_bf16_values<1, piece_bytes>(sums, weights[1], values);
        product_bf16_values<2, piece_bytes>(sums, weights[2], values);
        product_bf16_values<3, piece_bytes>(sums, weights[3], values);
        if constexpr (decltype(all)::value) {
            product_bf16_values<4, piece_bytes>(sums, weights[4], values);
            product_bf16_values<5, piece_bytes>(sums, weights[5], values);
            product_bf16_values<6, piece_bytes>(sums, weights[6], values);
            product_bf16_values<7, piece_bytes>(sums, weights[7], values);
        }
        product_commit();
    };
    auto pin_weights = [&] {
#pragma unroll
        for (int i = 0; i < 32; ++i) asm volatile("" : "+r"(weights[i / 4][i % 4])::"memory");
    };
    // Of the tile's keys those that exist and that a row sees; mostly these are all.
    int32_t const position = uniform(unit.position - (unit.key_start - unit.first_key) * key_tile);  // counted from the first tile on
    auto masks_of = [&](int32_t tile) { return reinterpret_cast<const Masks*>(memory + place::masks)[(tiles + tile) % tile_ring]; };
    auto mask_scores = [&](int32_t tile, const Masks& masks) {
        if ((masks.low & masks.high) == ~uint64_t{0} && (tile + 1) * keys_of_tile - 1 <= position + group_row) return;
        int32_t const last = position + first_row - tile * keys_of_tile - 2 * t;
#pragma unroll
        for (int i = 0; i < 64; ++i) {
            int const key = i / 4 * 8 + i % 2;  // counted from the lane's first
            bool const present = ((i < 32 ? masks.low : masks.high) >> (2 * t + key % 64) & 1) != 0;
            if (!present || key > last + i / 2 % 2 * 8) scores[i] = -INFINITY;
        }
    };
    // Powers of two of scores less `base`, to weights, and their sums. Products use sums and weights until `values_done`, half of the way.
    auto make_powers = [&](const float(&base)[2], float(&sum)[2][2], auto values_done) {
        auto powers = [&](int begin, int end) {
#pragma unroll
            for (int i = begin; i < end; ++i) {
                scores[i] = power_of_two(fmaf(scores[i], factor, -base[i / 2 % 2]));
                sum[i / 2 % 2][i % 2] += scores[i];
            }
        };
        powers(0, 32);
        // Never so, but the assembler does not know: it would move the wait up, before all of this.
        if (fminf(sum[0][0], sum[1][0]) < 0.0f) __nanosleep(1);
        values_done();
        powers(32, 64);
#pragma unroll
        for (int i = 0; i < 32; ++i) weights[i / 4][i % 4] = pack(scores[2 * i], scores[2 * i + 1]);
    };
    // Scores to weights, and a reference that fits them.
    auto make_weights = [&](auto values_done) {
        float top[2][4];  // four at a time, so that one does not wait for the other
#pragma unroll
        for (int i = 0; i < 64; ++i) {
            float& own_top = top[i / 2 % 2][i / 4 % 4];
            own_top = i / 16 == 0 && i % 2 == 0 ? scores[i] : fmaxf(own_top, scores[i]);
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float* const four = top[half];
            four[0] = fmaxf(fmaxf(four[0], four[1]), fmaxf(fmaxf(four[2], four[3]), largest[half]));
        }
#pragma unroll
        for (int lanes = 1; lanes <= 2; lanes *= 2) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                top[half][0] = fmaxf(top[half][0], __shfl_xor_sync(0xffffffffu, top[half][0], lanes));
            }
        }
        float base[2], scale[2], sum[2][2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float const reference = largest[half];
            bool const rises = (top[half][0] - reference) * factor > most_above_reference;  // as from minus infinity
            if (rises) largest[half] = top[half][0];
            base[half] = largest[half] == -INFINITY ? 0.0f : largest[half] * factor;
            scale[half] = rises ? power_of_two(fmaf(reference, factor, -base[half])) : 1.0f;
            sum[half][0] = sum[half][1] = 0.0f;
        }
        make_powers(base, sum, [&] {
            values_done();
            if (__any_sync(0xffffffffu, scale[0] != 1.0f || scale[1] != 1.0f)) {
#pragma unroll
                for (int i = 0; i < 64; ++i) sums[i] *= scale[i / 2 % 2];
            }
        });
#pragma unroll
        for (int half = 0; half < 2; ++half) total[half] = fmaf(total[half], scale[half], sum[half][0] + sum[half][1]);
    };
    // The same with the reference that there is, without a look at the largest score. False where that does not fit, or there is none:
    // then nothing has come of the scores, which are lost.
    auto make_weights_as_before = [&](auto values_done) {
        float const base[2] = {largest[0] * factor, largest[1] * factor};
        float sum[2][2] = {};
        make_powers(base, sum, values_done);
        float const low = sum[0][0] + sum[0][1], high = sum[1][0] + sum[1][1];
        if (!__all_sync(0xffffffffu, low < most_of_weights && high < most_of_weights)) return false;
        total[0] += low;
        total[1] += high;
        return true;
    };

    // Tiles with keys that rows of this group see; those behind them are passed over.
    int32_t const seen = position + group_row + 63;
    int32_t const own = uniform(group_row >= unit.rows || seen < 0 ? 0 : min(seen / keys_of_tile + 1, count));
    auto queries_used = [&] { arrive(shared_address(memory + place::queries_used)); };
    barrier_wait(shared_address(memory + place::queries_full), work.number & 1);
    wait_ring<tile_ring>(memory, place::keys_full, tiles);
    take_turn();
    if (own > 0) {
        Masks masks = masks_of(0);
        pin(scores);
        product_fence();
        multiply_keys(0);
        pass_turn();
        product_wait();
        pin(scores);
        keys_used(0);
        if (own == 1) queries_used();
        mask_scores(0, masks);
        make_weights([] {});
        auto order_products = [&](int32_t tile) {
            wait_ring<tile_ring>(memory, place::keys_full, tiles + tile);
            take_turn();
            pin(scores);
            pin(sums);
            pin_weights();
            product_fence();
            multiply_keys(tile);
            wait_ring<tile_ring>(memory, place::values_full, tiles + tile - 1);
            product_fence();
            multiply_values(tile - 1, std::true_type());
            pass_turn();
            masks = masks_of(tile);
            product_wait<1>();
            pin(scores);
        };
        auto values_done = [&](int32_t tile) {
            product_wait();
            pin(sums);
            pin_weights();
            values_used(tile - 1);
        };
        for (int32_t tile = 1; tile < own - 1; ++tile) {
            order_products(tile);
            keys_used(tile);
            mask_scores(tile, masks);
            if (!make_weights_as_before([&] { values_done(tile); })) {
                score_again(plan, memory, work.place, unit.key_start * key_tile + tile * keys_of_tile, scores);
                mask_scores(tile, masks);
                make_weights([] {});
            }
        }
        if (own > 1) {
            order_products(own - 1);
            keys_used(own - 1);
            queries_used();
            mask_scores(own - 1, masks);
            make_weights([&] { values_done(own - 1); });
        }
        if (own < count) wait_ring<tile_ring>(memory, place::keys_full, tiles + own);
        wait_ring<tile_ring>(memory, place::values_full, tiles + own - 1);
        take_turn();
        auto last_values = [&](auto all) {
            pin(sums);
            pin_weights();
            product_fence();
            multiply_values(own - 1, all);
            pass_turn();
            product_wait();
            pin(sums);
            pin_weights();
        };
        // what lies behind the unit's last key tile is another sequence's, or was never written; rows may see no key of a tile's half
        if ((own == count && unit.key_start + 2 * count > unit.key_end) || seen < (own - 1) * keys_of_tile + key_tile) {
            last_values(std::false_type());
        } else {
            last_values(std::true_type());
        }
        values_used(own - 1);
        if (own < count) keys_used(own);
    } else {
        pass_turn();
        keys_used(0);
        queries_used();
    }
    for (int32_t tile = own + (own > 0); tile <= count; ++tile) {
        if (tile == 0) continue;
        if (tile < count) wait_ring<tile_ring>(memory, place::keys_full, tiles + tile);
        wait_ring<tile_ring>(memory, place::values_full, tiles + tile - 1);
        take_turn();
        pass_turn();
        if (tile < count) keys_used(tile);
        values_used(tile - 1);
    }
    part_done(memory);  // all its keys and values have been copied

#pragma unroll
    for (int half = 0; half < 2; ++half) {
        float sum = total[half];
        sum += __shfl_xor_sync(0xffffffffu, sum, 1);
        sum += __shfl_xor_sync(0xffffffffu, sum, 2);
        int const row = first_row + 8 * half;
        bool const there = row < unit.rows;
        if (!unit.ends) {
            if (there && t == 0) plan.state_sums[state_row() + 8 * half] = make_float2(largest[half], sum);
#pragma unroll
            for (int j = 0; j < 16; ++j) {
                if (!there) continue;
                *reinterpret_cast<float2*>(plan.states + (state_row() + 8 * half) * HopperShape::width + j * 8 + 2 * t) =
                    make_float2(sums[4 * j + 2 * half], sums[4 * j + 2 * half + 1]);
            }
            continue;
        }
        int64_t const token = unit.token + row;
        int const head = work.head;
        float const top = largest[half] * factor;
        float denominator = sum;
        if (a.sinks != nullptr) denominator += exp2f(a.sinks[head] * log2e - top);
        float const share = sum > 0.0f ? 1.0f / denominator : 0.0f;
        if (a.lse != nullptr && there && t == 0) a.lse[token * a.heads + head] = logf(sum) + top * ln2;
        int64_t const start = token * a.output.token_stride + head * a.output.head_stride;
        if (vectors) {
            auto* const target = static_cast<__nv_bfloat16*>(a.output.data) + start + first_of_four(lane);
#pragma unroll
            for (int j = 0; j < 16; j += 2) {
                uint32_t const left = pack(sums[4 * j + 2 * half] * share, sums[4 * j + 2 * half + 1] * share);
                uint32_t const right = pack(sums[4 * j + 4 + 2 * half] * share, sums[4 * j + 5 + 2 * half] * share);
                uint2 const four = four_of_pairs(left, right, lane);
                if (there) *reinterpret_cast<uint2*>(target + j * 8) = four;
            }
            continue;
        }
#pragma unroll
        for (int j = 0; j < 16; ++j) {
            if (!there) continue;
            int const column = j * 8 + 2 * t;
            store_float(a.output.data, a.output.type, start + column, sums[4 * j + 2 * half] * share);
            store_float(a.output.data, a.output.type, start + column + 1, sums[4 * j + 2 * half + 1] * share);
        }
    }
}

#endif

}  // namespace mla::prefill_hopper
