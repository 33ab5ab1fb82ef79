// The products with e4m3 weights of up to 16 tokens (linear_hopper_codes.cu): rows become codes as well, in two terms, the second of which holds
// what the first leaves, and products are those of e4m3. Both terms are rows of one product: it takes as long with few rows as with many.
//
// bf16 has eight significant bits, e4m3 four. The 128 values of a step are multiplied by a power of two that brings the largest to 128 to 256, and
// what the first term leaves by another, so that both together are each value itself, but where it is less than 2^-14 of the largest: there they
// are within 2^-22 of the largest.
#pragma once

#include "code_fragments.cuh"
#include "linear_codes.cuh"

namespace mla {
namespace linear_tiles {

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)

constexpr int row_lanes = warp_size / rows_together;  // that have a row's 128 columns, 16 each
constexpr float second_unit = 0x1p-5f;  // of the second term's codes: what the first leaves of 2^7 and more is 2^3 at most

// What 128 values are multiplied by, in each half, and what their codes stand for one of. `largest`: the bits of the largest of them as f32, without sign.
struct RowScale {
    uint32_t factor;
    float scale;

    __device__ explicit RowScale(uint32_t largest) {
        constexpr uint32_t highest = 7, bias = 127;  // the largest becomes 2^7 or more
        uint32_t const exponent = max(largest >> 23, highest + 1);  // else the scale were no normal number
        factor = (2 * bias + highest - exponent << 7) * 0x10001u;
        scale = __uint_as_float(largest >= 0x7f800000u ? 0x7fffffffu : exponent - highest << 23);  // of what is not finite: none
    }
};

// The codes of two values of bf16, and of what these leave.
__device__ inline void encode_terms(uint32_t pair, uint32_t factor, uint32_t* first, uint32_t* second) {
    __nv_bfloat162 const scaled = __hmul2(reinterpret_cast<const __nv_bfloat162&>(pair), reinterpret_cast<const __nv_bfloat162&>(factor));
    uint32_t const bits = reinterpret_cast<const uint32_t&>(scaled);
    __half2 const values = __floats2half2_rn(__uint_as_float(bits << 16), __uint_as_float(bits & 0xffff0000u));
    __nv_fp8x2_storage_t const codes = __nv_cvt_halfraw2_to_fp8x2(values, __NV_SATFINITE, __NV_E4M3);
    __half2 const left = __hsub2(values, __half2(__nv_cvt_fp8x2_to_halfraw2(codes, __NV_E4M3)));
    *first = codes;
    *second = __nv_cvt_halfraw2_to_fp8x2(__hmul2(left, __float2half2_rn(1.0f / second_unit)), __NV_SATFINITE, __NV_E4M3);
}

// Sixteen values, eight columns each, as sixteen codes of each term in the order of `make_code_fragments`; gives the row's scale. The row's lanes
// call together.
__device__ inline float encode_sixteen(const uint4 (&values)[2], uint4 (&codes)[2]) {
    const auto* words = reinterpret_cast<const uint32_t*>(values);
    __nv_bfloat162 most = __float2bfloat162_rn(0.0f);
#pragma unroll
    for (int i = 0; i < 8; ++i) most = __hmax2_nan(most, __habs2(reinterpret_cast<const __nv_bfloat162&>(words[i])));
    auto const both = reinterpret_cast<const uint32_t&>(most);
    uint32_t largest = max(both << 16, both & 0xffff0000u);  // numbers above zero, and behind them what is none, are in the order of their bits
#pragma unroll
    for (int other = row_lanes / 2; other > 0; other /= 2) largest = max(largest, __shfl_xor_sync(~0u, largest, other));
    RowScale const own(largest);
    uint32_t terms[2][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        uint32_t of_half[2][2];
#pragma unroll
        for (int half = 0; half < 2; ++half) encode_terms(words[4 * half + i], own.factor, &of_half[half][0], &of_half[half][1]);
#pragma unroll
        for (int term = 0; term < 2; ++term) terms[term][i] = of_half[0][term] | of_half[1][term] << 16;
    }
#pragma unroll
    for (int term = 0; term < 2; ++term) codes[term] = make_uint4(terms[term][0], terms[term][1], terms[term][2], terms[term][3]);
    return own.scale;
}

// 16 bytes of a step's rows, permuted as the copy engine does: of 64 columns of values, or of the codes of a term.
template <class B>
__device__ inline int row_place(int tile, int row, int unit) {
    return tile * B::x_tile + row * step_bytes + ((unit ^ row % 8) << 4);
}

// Makes codes of all steps' rows where they lie, four rows of a step by a warp in turn. All lanes of a row have its values before any writes, for
// the largest of them is needed.
template <class B>
__device__ inline void make_rows(const Ring& ring, const Codes& work, int steps, uint8_t* memory) {
    constexpr int turns = B::row_arrivals;  // of a step
    int const lane = threadIdx.x % warp_size, unit = lane % row_lanes;
#pragma unroll 1
    for (int turn = (static_cast<int>(threadIdx.x) - B::consumers) / warp_size - 1; turn < steps * turns; turn += B::row_makers) {
        int const step = turn / turns, stage = step % B::stages, first_row = turn % turns * rows_together, row = first_row + lane / row_lanes;
        // Other warps waited for what was there before: of that, too, or a barrier that is so far behind tells the opposite.
        barrier_wait(ring.used + 8 * stage, step / B::stages & 1 ^ 1);
        barrier_wait(ring.there + 8 * (B::stages + stage), step / B::stages & 1);
        if (first_row < work.operands.tokens) {
            uint8_t* const place = memory + stage * B::stage_bytes;
            auto unit_of = [&](int tile, int number) { return reinterpret_cast<uint4*>(place + row_place<B>(tile, row, number)); };
            uint4 values[2], codes[2];
#pragma unroll
            for (int half = 0; half < 2; ++half) values[half] = *unit_of(unit / 4, unit % 4 * 2 + half);
            float const scale = encode_sixteen(values, codes);
#pragma unroll
            for (int term = 0; term < 2; ++term) *unit_of(term, unit) = codes[term];
            if (unit == 0) reinterpret_cast<float*>(memory + B::scales_start + stage * B::scales_bytes)[row] = scale;
            fence_async();
        }
        __syncwarp();
        barrier_arrive_if(ring.there + 8 * stage, lane == 0);
    }
}

// The sums of a group's 64 outputs: sums[4 j] and [4 j + 2] of a lane are outputs 2 g and 2 g + 1 of its warp's 16, token 8 j + 2 t; the
// ones behind them are of the next token. Each step's products are summed from zero, for such sums keep 14 bits (docs/kernels.md).
// `scales`: the weight's of step `first`, where the block begins; `stride` further is the next one's.
template <class B>
__device__ inline void multiply_few(const Ring& ring, const CodeOperands& operands, const uint8_t* memory, int first, int steps,
                                    float (&sums)[B::tokens / 2], const float* scales, int stride) {
    int const lane = threadIdx.x % warp_size;
#pragma unroll
    for (int i = 0; i < B::tokens / 2; ++i) sums[i] = 0.0f;
    Turn<B> turn;
    float next_scale = *scales;
#pragma unroll 1
    for (int step = 0; step < steps; ++step, turn.advance()) {
        uint32_t const place = ring.base + turn.stage * B::stage_bytes;
        float const scale = next_scale;
        scales += stride;
        if (step + 1 < steps) next_scale = *scales;
        int const rows = operands.rows_of(first + step);
        barrier_wait(ring.there + 8 * turn.stage, turn.turn & 1);
        uint32_t a[4][4];
#pragma unroll
        for (int k = 0; k < 4; ++k) load_codes(a[k], place + own_place<B>(rows), k);
        if (rows < tile_rows) {  // what is not a number times zero is not zero
#pragma unroll
            for (int i = 0; i < 16; ++i) {
                if (8 * i >= rows) a[i / 4][i % 4] = 0;
            }
        }
        make_code_fragments(a);
        uint32_t const x = tile_descriptor(place);
        float part[B::tokens];  // of the first terms, and behind them of the second
        pin(part);
        pin(a);
        product_fence();
        product_e4m3<0>(part, a[0], x);
        product_e4m3<1>(part, a[1], x);
        product_e4m3<2>(part, a[2], x);
        product_e4m3<3>(part, a[3], x);
        product_commit();
        product_wait();
        pin(part);
#pragma unroll
        for (int j = 0; j < B::tokens / 8; ++j) {
            auto const of_rows = reinterpret_cast<const float2*>(memory + B::scales_start + turn.stage * B::scales_bytes)[4 * j + lane % 4];
            float const factors[2] = {scale * of_rows.x, scale * of_rows.y};
#pragma unroll
            for (int i = 4 * j; i < 4 * j + 4; ++i) sums[i] = fmaf(fmaf(second_unit, part[B::tokens / 2 + i], part[i]), factors[i % 2], sums[i]);
        }
        barrier_arrive_if(ring.used + 8 * turn.stage, lane == 0);
    }
}

#endif

}  // namespace linear_tiles
}  // namespace mla
