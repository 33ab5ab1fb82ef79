// The score group of attend_hopper_bf16.cu: products of queries and keys, and the softmax over them, a tile at a time.
#pragma once

#include <type_traits>

#include "attend_hopper_bf16_ring.cuh"

namespace mla {
namespace hopper_bf16 {

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)

constexpr float spare_bits = 8.0f;

// Writes which key each row may see at last; by the score group.
__device__ inline void find_limits(const Attend& work, const Item& item, int32_t* limits, int thread) {
    if (thread < 64) limits[thread] = thread < item.count ? last_key(work, item.first_token + (item.first_head + thread) / work.heads) : -1;
    named_sync(limits_there, group);
}

// What a thread has of the softmax. Lane 4 g + t of warp w has rows 16 w + g and 16 w + g + 8, and of each 8 keys 2 t and 2 t + 1.
struct RowSoftmax {
    float scale;
    int warp, lane, t, first_row;
    float top[2] = {-INFINITY, -INFINITY}, total[2] = {0.0f, 0.0f};

    __device__ explicit RowSoftmax(const Attend& work)
        : scale(work.softmax_scale * log2e), warp(threadIdx.x % group / warp_size), lane(threadIdx.x % warp_size), t(lane % 4),
          first_row(warp * 16 + lane / 4) {}

    // Scores of keys that are not there, as `present` says, or behind a row's limit (all are allowed where there are none) become -inf.
    template <bool limited>
    __device__ void mask(float (&scores)[32], uint64_t present, int32_t first_key, const volatile int32_t* all_limits) const {
        const auto* limits = all_limits + first_row;  // not kept in registers
        bool const masks = present != ~uint64_t{0} || (limited && first_key + tile > min(limits[0], limits[8]) + 1);
        if (!masks) return;
        uint64_t const own = present >> 2 * t;
        int32_t const before = first_key + 2 * t, room[2] = {limited ? limits[0] - before : 0, limited ? limits[8] - before : 0};
#pragma unroll
        for (int j = 0; j < 32; ++j) {
            int const key = j / 4 * 8 + j % 2;
            bool const there = (own >> key & 1) != 0, seen = !limited || key <= room[j / 2 % 2];
            scores[j] = there && seen ? scores[j] : -INFINITY;
        }
    }

    // Makes weights of scores: row r's of keys 8 j + 2 t and the next are words[2 j + r], times the keys' scales if they have some. What
    // was summed up so far counts `factor` times as much; returns whether that is not 1.
    template <bool row_scales>
    __device__ bool weigh(const float (&scores)[32], const volatile float* row_scale, uint32_t (&words)[16], float (&factor)[2]) {
        // both rows side by side, and sums in two parts: fewer waits for what came just before
        float best[2][2], base[2], sum[2][2] = {};
#pragma unroll
        for (int j = 0; j < 32; ++j) {
            float& own = best[j / 2 % 2][j % 2];
            own = j < 4 ? scores[j] : fmaxf(own, scores[j]);
        }
#pragma unroll
        for (int r = 0; r < 2; ++r) best[r][0] = fmaxf(best[r][0], best[r][1]);
#pragma unroll
        for (int lanes = 1; lanes <= 2; lanes *= 2) {
#pragma unroll
            for (int r = 0; r < 2; ++r) best[r][0] = fmaxf(best[r][0], __shfl_xor_sync(0xffffffffu, best[r][0], lanes));
        }
        bool changed = false;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            float const largest = scale * best[r][0];
            float const highest = largest > top[r] + spare_bits || top[r] == -INFINITY ? largest : top[r];
            base[r] = highest == -INFINITY ? 0.0f : highest;
            factor[r] = power_of_two(top[r] - base[r]);
            changed = changed || highest != top[r];
            top[r] = highest;
        }
#pragma unroll
        for (int i = 0; i < 16; ++i) {
            float const low = power_of_two(fmaf(scores[2 * i], scale, -base[i % 2]));
            float const high = power_of_two(fmaf(scores[2 * i + 1], scale, -base[i % 2]));
            sum[i % 2][0] += low;
            sum[i % 2][1] += high;
            float const even = row_scales ? row_scale[i / 2 * 8] : 1.0f, odd = row_scales ? row_scale[i / 2 * 8 + 1] : 1.0f;
            __nv_bfloat162 const pair = __floats2bfloat162_rn(low * even, high * odd);
            words[i] = reinterpret_cast<const uint32_t&>(pair);
        }
#pragma unroll
        for (int r = 0; r < 2; ++r) total[r] = fmaf(total[r], factor[r], sum[r][0] + sum[r][1]);
        return changed;
    }

    // Lays tile n's weights, and what they count against those before, where the output groups look for them.
    template <typename Places>
    __device__ void hand_over(uint8_t* memory, int32_t n, const uint32_t (&words)[16], const float (&factor)[2], bool changed) const {
        uint32_t const weights = shared_address(memory) + Places::weights_of(n);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            // lanes 0 to 15 name the rows of the first eight keys, the others those of the next eight
            int const row = warp * 16 + lane % 16, unit = 2 * i + lane / 16;
            store_matrices(weights + row * 128 + ((unit ^ (row & 7)) << 4), words + 4 * i);
        }
        if (t == 0) {
#pragma unroll
            for (int r = 0; r < 2; ++r) reinterpret_cast<float*>(memory + Places::rescale)[(n & 1) * 64 + first_row + 8 * r] = factor[r];
        }
        bool const any = __any_sync(0xffffffffu, changed);
        if (lane == 0) reinterpret_cast<int32_t*>(memory + Places::changed)[(n & 1) * 4 + warp] = any ? 1 : 0;
    }

    // The rows' log-sum-exp, and what their outputs are multiplied by.
    __device__ void finish(const Attend& work, const Partials& partials, const Item& item, float* factors) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            total[r] += __shfl_xor_sync(0xffffffffu, total[r], 1);
            total[r] += __shfl_xor_sync(0xffffffffu, total[r], 2);
            int const row = first_row + 8 * r;
            if (t != 0 || row >= item.count) continue;
            float sum = total[r];
            int const flat = item.first_head + row;
            int64_t const token = item.first_token + flat / work.heads;
            int const head = flat % work.heads;
            int64_t const out_row = token * work.heads + head;
            float const lse = sum == 0.0f ? -INFINITY : top[r] + log2f(sum);
            if (item.slot >= 0) {
                partials.lse[partials.row(item.slot, row)] = lse;
            } else {
                if (work.lse != nullptr) work.lse[out_row] = lse * ln2;
                if (work.sinks != nullptr && sum != 0.0f) sum += exp2f(work.sinks[head] * log2e - top[r]);
            }
            factors[row] = sum == 0.0f ? 0.0f : 1.0f / sum;
        }
    }
};

// Keys that a group of its own brings.
template <bool lists, int format>
__device__ void score_fed(const Attend& work, const Partials& partials, const Item& item, const Span& span, uint8_t* memory) {
    constexpr bool codes = format != row_format::bf16, row_scales = format == row_format::fp8;
    RowSoftmax softmax(work);
    uint32_t const query = tile_descriptor(shared_address(memory));
    auto* limits = reinterpret_cast<int32_t*>(memory + FedPlaces::limits);
    if constexpr (!lists) find_limits(work, item, limits, threadIdx.x % group);
    barrier_wait(shared_address(memory + FedPlaces::queries_full), 0);

#pragma unroll 1
    for (int32_t n = 0; n < span.count; ++n) {
        float scores[32];
        uint32_t const keys = tile_descriptor(shared_address(memory + FedPlaces::tiles) + (n & 1) * tile_bytes);
        auto wait_for_side = [&](int side) {
            barrier_wait(barrier_of(memory, FedPlaces::full, n, side), n / 2 & 1);
            fence_async();  // those rows were not written by the copy engine
        };
        wait_for_side(0);
        pin(scores);
        product_fence();
        auto piece = [&](auto number) {
            constexpr int i = decltype(number)::value;
            product_bf16<0, i == 0>(scores, query + i * (piece_bytes >> 4), keys + i * (piece_bytes >> 4));
            product_bf16<1>(scores, query + i * (piece_bytes >> 4), keys + i * (piece_bytes >> 4));
            product_bf16<2>(scores, query + i * (piece_bytes >> 4), keys + i * (piece_bytes >> 4));
            product_bf16<3>(scores, query + i * (piece_bytes >> 4), keys + i * (piece_bytes >> 4));
        };
        piece(std::integral_constant<int, 0>());
        piece(std::integral_constant<int, 1>());
        piece(std::integral_constant<int, 2>());
        piece(std::integral_constant<int, 3>());
        if (!codes) {
            wait_for_side(1);
            product_fence();
        }
        piece(std::integral_constant<int, 4>());
        piece(std::integral_constant<int, 5>());
        piece(std::integral_constant<int, 6>());
        piece(std::integral_constant<int, 7>());
        piece(std::integral_constant<int, 8>());
        product_commit();
        product_wait();
        pin(scores);
        const auto* row_scale = reinterpret_cast<const volatile float*>(memory + FedPlaces::scale_of(n, 2 * softmax.t));
        if (row_scales) {
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                float const even = row_scale[8 * j], odd = row_scale[8 * j + 1];
                scores[4 * j] *= even, scores[4 * j + 1] *= odd, scores[4 * j + 2] *= even, scores[4 * j + 3] *= odd;
            }
        }
        softmax.template mask<!lists>(scores, reinterpret_cast<const uint64_t*>(memory + FedPlaces::there)[n & 1], (span.first + n) * tile, limits);
        uint32_t words[16];
        float factor[2];
        bool const changed = softmax.template weigh<row_scales>(scores, row_scale, words, factor);
        named_sync(keys_read, group);  // by all warps: the weights come where the tile's rope was
        softmax.template hand_over<FedPlaces>(memory, n, words, factor, changed);
        fence_async();
        __syncwarp();
        if (softmax.lane == 0) barrier_arrive(shared_address(memory + FedPlaces::ready) + 8 * (n & 1));
    }
    softmax.finish(work, partials, item, reinterpret_cast<float*>(memory + FedPlaces::factors));
}

// Keys that the copy engine brings. The products of the next tile are ordered before the weights of this one are handed over: then the
// tensor cores make scores of the next tile first, and this one's output while its softmax is made. Where keys
// come late, the weights do not wait for them, so that places become free.
__device__ inline void score_ring(const Attend& work, const Partials& partials, const Item& item, const Span& span, uint8_t* memory) {
    RowSoftmax softmax(work);
    int const thread = threadIdx.x % group;
    bool const tells = softmax.lane == 0;
    uint32_t const base = shared_address(memory);
    auto* limits = reinterpret_cast<int32_t*>(memory + RingPlaces::limits);
    find_limits(work, item, limits, thread);

    barrier_wait(base + RingPlaces::queries_full, 0);
    uint32_t kept[kept_pieces][4][4];
#pragma unroll
    for (int i = 0; i < kept_pieces; ++i) {
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            int const row = softmax.warp * 16 + softmax.lane % 16, unit = 2 * k + softmax.lane / 16;
            ldmatrix_x4(kept[i][k], base + RingPlaces::query_piece(i) + row * 128 + ((unit ^ (row & 7)) << 4));
        }
        pin(kept[i]);
    }
    __syncwarp();
    if (tells) barrier_arrive(base + RingPlaces::queries_kept);

    // Several blocks read the keys of a sequence, and each has enough tiles: then keys are there in time.
    bool const in_time = work.step.tokens * work.heads > work.step.sequences * hopper_bf16_rows && span.count > 8;
    float scores[32];
    int place = 0, lap = 0;  // of the next tile to be ordered: n mod 3, and the lap's parity
    // Orders the products of tile n; `late` is called where its keys may be waited for.
    auto order = [&](int32_t n, auto&& late) {
        uint32_t const half = n & 1, parity = n / 2 & 1;
        auto wait = [&](uint32_t barrier, uint32_t of) {
            late(!in_time && !barrier_test(barrier, of));
            barrier_wait(barrier, of);
        };
        uint32_t const first = tile_descriptor(base + RingPlaces::first + place * side_bytes);
        uint32_t const second = tile_descriptor(base + RingPlaces::second + half * side_bytes);
        uint32_t const rope = tile_descriptor(base + RingPlaces::ropes + half * piece_bytes);
        auto piece = [&](auto number, uint32_t keys) {
            constexpr int i = decltype(number)::value;
            if constexpr (i < kept_pieces) {
                product_bf16<0, i == 0>(scores, kept[i][0], keys);
                product_bf16<1>(scores, kept[i][1], keys);
                product_bf16<2>(scores, kept[i][2], keys);
                product_bf16<3>(scores, kept[i][3], keys);
            } else {
                uint32_t const query = tile_descriptor(base) + (i - kept_pieces) * (piece_bytes >> 4);
                product_bf16<0>(scores, query, keys);
                product_bf16<1>(scores, query, keys);
                product_bf16<2>(scores, query, keys);
                product_bf16<3>(scores, query, keys);
            }
        };
        wait(base + RingPlaces::first_full + 8 * place, lap);
        pin(scores);
        product_fence();
        piece(std::integral_constant<int, 0>(), first);
        piece(std::integral_constant<int, 1>(), first + (piece_bytes >> 4));
        piece(std::integral_constant<int, 2>(), first + 2 * (piece_bytes >> 4));
        piece(std::integral_constant<int, 3>(), first + 3 * (piece_bytes >> 4));
        wait(base + RingPlaces::rope_full + 8 * half, parity);
        product_fence();
        piece(std::integral_constant<int, 8>(), rope);
        wait(base + RingPlaces::second_full + 8 * half, parity);
        product_fence();
        piece(std::integral_constant<int, 4>(), second);
        piece(std::integral_constant<int, 5>(), second + (piece_bytes >> 4));
        piece(std::integral_constant<int, 6>(), second + 2 * (piece_bytes >> 4));
        piece(std::integral_constant<int, 7>(), second + 3 * (piece_bytes >> 4));
        product_commit();
        if (++place == first_places) place = 0, lap ^= 1;
    };

    if (span.count > 0) {
        order(0, [](bool) {});
#pragma unroll 1
        for (int32_t n = 0;; ++n) {
            int const third = place == 0 ? first_places - 1 : place - 1;
            product_wait();
            pin(scores);
            __syncwarp();
            if (tells) barrier_arrive(base + RingPlaces::rope_used + 8 * (n & 1));
            softmax.mask<true>(scores, reinterpret_cast<const uint64_t*>(memory + RingPlaces::there)[third], (span.first + n) * tile, limits);
            uint32_t words[16];
            float factor[2];
            bool const changed = softmax.weigh<false>(scores, nullptr, words, factor);
            // The weights two tiles before have been used: by the second side, as its keys of this tile are there; by the first, whose
            // place then is the one of the next tile now.
            if (n >= 2) barrier_wait(base + RingPlaces::first_used + 8 * place, lap ^ 1);
            softmax.hand_over<RingPlaces>(memory, n, words, factor, changed);
            bool const last = n + 1 == span.count;
            if (last && span.last_keys < tile) {  // values that were never written may be NaN
                int const of_piece = (tile - span.last_keys) * 8;
                for (int i = thread; i < value_pieces * of_piece; i += group) {
                    int const piece = i / of_piece;
                    uint8_t* side = memory + RingPlaces::values_of(piece / side_values, n, third);
                    reinterpret_cast<uint4*>(side + piece % side_values * piece_bytes + span.last_keys * 128)[i % of_piece] = make_uint4(0, 0, 0, 0);
                }
            }
            fence_async();
            __syncwarp();
            bool waits = tells;  // whether the weights have still to be handed over, by this thread
            auto hand_over = [&](bool now) {
                barrier_arrive_if(base + RingPlaces::ready + 8 * (n & 1), waits && now);
                waits = waits && !now;
            };
            if (last) {
                hand_over(true);
                break;
            }
            order(n + 1, hand_over);
            hand_over(true);
        }
    }
    softmax.finish(work, partials, item, reinterpret_cast<float*>(memory + RingPlaces::factors));
}

#endif

}  // namespace hopper_bf16
}  // namespace mla
