// Values of the products with W_UK and W_UV, eight at a time, and the codes that they are rounded to.
#pragma once

#include "device.cuh"

namespace mla {

constexpr float activation_bound = 1200.0f;
constexpr int step_columns = scale_group;  // in shared memory at a time; they have one scale
constexpr int unit_lanes = step_columns / 8;  // lanes that hold a group of x, eight values each

__device__ inline uint32_t pack(float low, float high) {
    __nv_bfloat162 const pair = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<const uint32_t&>(pair);
}

__device__ inline uint4 pack(float const (&v)[8]) {
    return make_uint4(pack(v[0], v[1]), pack(v[2], v[3]), pack(v[4], v[5]), pack(v[6], v[7]));
}

// Eight values of bf16 or f16.
__device__ inline void unpack(uint4 const& bits, int32_t type, float (&v)[8]) {
    uint32_t const words[4] = {bits.x, bits.y, bits.z, bits.w};
    if (type == MLA_BFLOAT16) {
#pragma unroll
        for (int i = 0; i < 8; ++i) v[i] = __uint_as_float(i % 2 == 0 ? words[i / 2] << 16 : words[i / 2] & 0xffff0000u);
    } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            float2 const pair = __half22float2(reinterpret_cast<const __half2&>(words[i]));
            v[2 * i] = pair.x;
            v[2 * i + 1] = pair.y;
        }
    }
}

// The codes of eight values of a group, and the group's scale. The group's 16 lanes call together.
__device__ inline uint2 encode_eight(float (&v)[8], float* scale_of_group) {
    float amax = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; ++i) amax = fmaxf(amax, fabsf(v[i]));
#pragma unroll
    for (int offset = unit_lanes / 2; offset > 0; offset /= 2) amax = fmaxf(amax, __shfl_xor_sync(0xffffffffu, amax, offset));
    float scale = divide(fminf(amax, activation_bound), e4m3_max);
    *scale_of_group = scale;
    if (amax > activation_bound || scale < 0x1p-60f) {
        if (scale == 0.0f) return make_uint2(0, 0);
        // The divisions below want finite values, and remainders that are no denormals. A NaN stays one.
        float const lift = scale < 0x1p-60f ? 0x1p64f : 1.0f;
        scale *= lift;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            v[i] = lift * (v[i] > activation_bound ? activation_bound : v[i] < -activation_bound ? -activation_bound : v[i]);
        }
    }
    // Correctly rounded as by divide(), which would find the reciprocal anew for each. The second correction makes it so
    // (Markstein): it begins with a quotient that is one unit off at most, and the reciprocal is the nearest.
    float const reciprocal = __frcp_rn(scale);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        float quotient = v[i] * reciprocal;
        quotient = __fmaf_rn(__fmaf_rn(-quotient, scale, v[i]), reciprocal, quotient);
        v[i] = __fmaf_rn(__fmaf_rn(-quotient, scale, v[i]), reciprocal, quotient);
    }
    uint32_t codes[2] = {0, 0};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        uint32_t const pair = __nv_cvt_float2_to_fp8x2(make_float2(v[2 * i], v[2 * i + 1]), __NV_SATFINITE, __NV_E4M3);
        codes[i / 2] |= pair << i % 2 * 16;
    }
    return make_uint2(codes[0], codes[1]);
}

// The same, the codes as bf16.
__device__ inline uint4 quantize_eight(float (&v)[8], float* scale_of_group) {
    uint2 const codes = encode_eight(v, scale_of_group);
    uint2 const low = decode_e4m3x4(codes.x), high = decode_e4m3x4(codes.y);
    return make_uint4(low.x, low.y, high.x, high.y);
}

}  // namespace mla
