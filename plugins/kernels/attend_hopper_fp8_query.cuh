// The queries of a block of attend_hopper_fp8.cu as codes.
#pragma once

#include "attend_hopper_fp8_ring.cuh"

namespace mla {
namespace hopper {

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)

// The rows' queries as codes, row scales, and the rope part divided by them (over rows of fp8_flat as codes too), and the last key of each
// row. A row by a warp, of all warps but the sum group's, which have not the registers, and but those that follow lists meanwhile; the
// caller's number among them is `number`. Codes may come where a row's values were: all lanes have theirs before any writes, for the
// reduction needs them.
template <typename F>
__device__ void make_query(const Attend& work, const Item& item, uint8_t* memory, int number) {
    using P = Places<F>;
    constexpr int warps = (F::lists ? 2 : 3) * group / warp_size;
    int const lane = threadIdx.x % warp_size, limited_row = number * warp_size + lane;
    auto* scales = reinterpret_cast<float*>(memory + P::query_scales);
    // asked for now and looked at behind the rows: the answer comes behind what the copy engine is ordered to bring
    int32_t position = -1;
    if (limited_row < item.count) position = work.step.positions[item.first_token + (item.first_head + limited_row) / work.heads];
    auto unit_of_row = [&](int start, int row, int unit) {
        return reinterpret_cast<uint4*>(memory + start + row * 128 + ((unit ^ (row & 7)) << 4));
    };
    if (F::query_boxes == 1) barrier_wait(shared_address(memory + P::queries_full), 0);
#pragma unroll 1
    for (int row = number; row < (F::packed ? 32 : 64); row += warps) {
        uint4 bits[2] = {}, rope_bits{};
        // also of rows that there are not: what comes must have come before the block ends
        if (F::query_boxes > 1 && row < F::rows) barrier_wait(shared_address(memory + P::queries_full) + row / F::query_box * 8, 0);
        if (row < item.count) {
            for (int i = 0; i < 2; ++i) bits[i] = *unit_of_row(P::raw_query(lane / 4), row, lane % 4 * 2 + i);
            if (lane < rope / 8) rope_bits = *unit_of_row(P::raw_query(query_columns - 1), row, lane);
        }
        __nv_bfloat162 most = __float2bfloat162_rn(0.0f);
        float values[16];
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            uint32_t const word = reinterpret_cast<const uint32_t*>(bits)[j];
            values[2 * j] = __uint_as_float(word << 16);
            values[2 * j + 1] = __uint_as_float(word & 0xffff0000u);
            most = __hmax2(most, __habs2(reinterpret_cast<const __nv_bfloat162&>(word)));
        }
        if constexpr (F::flat) {
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                most = __hmax2(most, __habs2(reinterpret_cast<const __nv_bfloat162*>(&rope_bits)[j]));
            }
        }
        // numbers above zero are in the order of their bits
        uint32_t const largest = __reduce_max_sync(0xffffffffu, __float_as_uint(fmaxf(__low2float(most), __high2float(most))));
        float const scale = fmaxf(__uint_as_float(largest), kv_scale_floor) * (1.0f / e4m3_max);
        // raw scores over rows of fp8_flat are compared before they are multiplied: their factor must be above zero
        float const inverse = F::flat ? copysignf(fast_inverse(scale), work.softmax_scale) : fast_inverse(scale);
        uint32_t high[4], low[4];
        // two terms of a pair, each two codes
        auto encode_terms = [&](float a, float b, uint32_t& first, uint32_t& second) {
            first = encode_pair(a, b);
            __half2_raw const rounded = __nv_cvt_fp8x2_to_halfraw2(static_cast<__nv_fp8x2_storage_t>(first), __NV_E4M3);
            float2 const back = __half22float2(__half2(rounded));
            second = encode_pair(a - back.x, b - back.y);
        };
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            uint32_t pairs[2], rests[2];
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                encode_terms(values[4 * k + 2 * j] * inverse, values[4 * k + 2 * j + 1] * inverse, pairs[j], rests[j]);
            }
            high[k] = pairs[0] | pairs[1] << 16;
            low[k] = rests[0] | rests[1] << 16;
        }
        // packed: rows 8 w + g are rows 16 w + g of the product, their second terms rows 16 w + g + 8
        int const line = F::packed ? row / 8 * 16 + row % 8 : row, piece = lane / 8 * row_piece_bytes;
        *unit_of_row(P::query + piece, line, lane % 8) = make_uint4(high[0], high[1], high[2], high[3]);
        if constexpr (F::packed) *unit_of_row(P::query + piece, line + 8, lane % 8) = make_uint4(low[0], low[1], low[2], low[3]);
        if constexpr (F::second) *unit_of_row(P::query_low + piece, line, lane % 8) = make_uint4(low[0], low[1], low[2], low[3]);
        if (F::flat && lane < rope / 8) {
            uint32_t words[2], rest_words[2];
#pragma unroll
            for (int k = 0; k < 2; ++k) {
                uint32_t pairs[2], rests[2];
#pragma unroll
                for (int j = 0; j < 2; ++j) {
                    uint32_t const word = reinterpret_cast<const uint32_t*>(&rope_bits)[2 * k + j];
                    encode_terms(__uint_as_float(word << 16) * inverse, __uint_as_float(word & 0xffff0000u) * inverse, pairs[j], rests[j]);
                }
                words[k] = pairs[0] | pairs[1] << 16;
                rest_words[k] = rests[0] | rests[1] << 16;
            }
            // of two terms of 64 rows the second lies behind the first, in the same rows
            auto half_unit = [&](int line, int unit) {
                return reinterpret_cast<uint2*>(unit_of_row(P::query + 4 * row_piece_bytes, line, unit + lane / 2)) + lane % 2;
            };
            *half_unit(line, 0) = make_uint2(words[0], words[1]);
            if constexpr (F::packed) *half_unit(line + 8, 0) = make_uint2(rest_words[0], rest_words[1]);
            if constexpr (F::second) *half_unit(line, rope / 16) = make_uint2(rest_words[0], rest_words[1]);
        }
        if (!F::flat && lane < rope / 8) {
            uint32_t words[4];
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                uint32_t const word = reinterpret_cast<const uint32_t*>(&rope_bits)[j];
                __nv_bfloat162 const pair = __floats2bfloat162_rn(__uint_as_float(word << 16) * inverse,
                                                                  __uint_as_float(word & 0xffff0000u) * inverse);
                words[j] = reinterpret_cast<const uint32_t&>(pair);
            }
            *unit_of_row(P::query + 4 * row_piece_bytes, line, lane) = make_uint4(words[0], words[1], words[2], words[3]);
            if constexpr (F::packed) *unit_of_row(P::query + 4 * row_piece_bytes, line + 8, lane) = make_uint4(0, 0, 0, 0);
        }
        if (lane == 0) {
            float const factor = scale * work.softmax_scale * log2e;
            scales[row] = F::flat ? fmaxf(fabsf(factor * work.layout.kv_scale), 0x1p-100f) : factor;
        }
    }
    if (limited_row < 64) {
        reinterpret_cast<int32_t*>(memory + P::limits)[limited_row] = min(position, work.step.key_limit(work.layout.page_size) - 1);
    }
    fence_async();
}

#endif

}  // namespace hopper
}  // namespace mla
