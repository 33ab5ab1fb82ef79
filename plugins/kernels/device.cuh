// What several kernels share on the device: element types, rows of the pools, positions, reductions.
#pragma once

#include <cstdint>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include "call.h"
#include "ptx.cuh"

namespace mla {

constexpr int warp_size = 32;
constexpr float log2e = 1.4426950408889634f;
constexpr float ln2 = 0.6931471805599453f;

// One element of a tensor of any float type (e4m3 included) as f32. `type` is an MLA_ type.
__device__ inline float load_float(const void* data, int32_t type, int64_t index) {
    switch (type) {
        case MLA_FLOAT: return static_cast<const float*>(data)[index];
        case MLA_FLOAT16: return __half2float(static_cast<const __half*>(data)[index]);
        case MLA_BFLOAT16: return __bfloat162float(static_cast<const __nv_bfloat16*>(data)[index]);
        default: return static_cast<float>(static_cast<const __nv_fp8_e4m3*>(data)[index]);
    }
}

// The same of f32, f16 and bf16 in two steps: a read that nothing waits for yet, and what waits for it.
__device__ inline uint32_t load_bits(const void* data, int32_t type, int64_t index) {
    return type == MLA_FLOAT ? static_cast<const uint32_t*>(data)[index] : static_cast<const uint16_t*>(data)[index];
}

__device__ inline float float_of_bits(uint32_t bits, int32_t type) {
    if (type == MLA_FLOAT) return __uint_as_float(bits);
    return type == MLA_FLOAT16 ? __half2float(__ushort_as_half(static_cast<uint16_t>(bits))) : __uint_as_float(bits << 16);
}

__device__ inline void store_float(void* data, int32_t type, int64_t index, float value) {
    switch (type) {
        case MLA_FLOAT: static_cast<float*>(data)[index] = value; break;
        case MLA_FLOAT16: static_cast<__half*>(data)[index] = __float2half_rn(value); break;
        default: static_cast<__nv_bfloat16*>(data)[index] = __float2bfloat16_rn(value);
    }
}

MLA_BOTH constexpr int element_bytes(int32_t type) {
    return type == MLA_FLOAT || type == MLA_INT32 ? 4 : type == MLA_INT64 ? 8 : type == MLA_FLOAT8E4M3FN ? 1 : 2;
}

// e4m3 code of a value, to nearest, ties to even, saturating at +-448; NaN stays NaN.
__device__ inline uint8_t encode_e4m3(float value) {
    return static_cast<uint8_t>(__nv_cvt_float_to_fp8(value, __NV_SATFINITE, __NV_E4M3));
}

__device__ inline float decode_e4m3(uint8_t code) {
    __nv_fp8_e4m3 value;
    value.__x = code;
    return static_cast<float>(value);
}

// Two codes of four as bf16x2, each times 2^-120. The selector's nibbles: a code, its sign (8 more), the other code, its sign.
constexpr uint32_t codes_01 = 0x9180, codes_23 = 0xb3a2, codes_02 = 0xa280, codes_13 = 0xb391;

template <uint32_t selector>
__device__ inline uint32_t code_pair(uint32_t codes) {
    return select_bytes<selector>(codes) << 4 & 0x87f087f0u;
}

// Two codes as they come from `code_pair`, as values. Exact: e4m3 has fewer bits than bf16 in every field. 2^120 makes up for the
// difference of the exponents' biases, of subnormal codes too. Many times faster than conversions; NaN becomes 480.
__device__ inline uint32_t decode_pair(uint32_t bits) {
    __nv_bfloat162 const bias = __halves2bfloat162(__ushort_as_bfloat16(0x7b80), __ushort_as_bfloat16(0x7b80));
    __nv_bfloat162 const values = __hmul2(reinterpret_cast<const __nv_bfloat162&>(bits), bias);
    return reinterpret_cast<const uint32_t&>(values);
}

// Four e4m3 codes (low byte first) as two bf16x2.
__device__ inline uint2 decode_e4m3x4(uint32_t codes) {
    return make_uint2(decode_pair(code_pair<codes_01>(codes)), decode_pair(code_pair<codes_23>(codes)));
}

// Four values of two bytes each.
template <int32_t type>
__device__ inline float4 four_of(uint2 values) {
    if constexpr (type == MLA_FLOAT16) {
        float2 const low = __half22float2(reinterpret_cast<const __half2&>(values.x));
        float2 const high = __half22float2(reinterpret_cast<const __half2&>(values.y));
        return make_float4(low.x, low.y, high.x, high.y);
    } else {
        return make_float4(__uint_as_float(values.x << 16), __uint_as_float(values.x & 0xffff0000u), __uint_as_float(values.y << 16),
                           __uint_as_float(values.y & 0xffff0000u));
    }
}

// Four values that follow each other. `aligned`: they may be written at once.
__device__ inline void store_four(void* data, int32_t type, int64_t index, float4 value, bool aligned) {
    if (!aligned) {
        store_float(data, type, index, value.x);
        store_float(data, type, index + 1, value.y);
        store_float(data, type, index + 2, value.z);
        store_float(data, type, index + 3, value.w);
    } else if (type == MLA_FLOAT) {
        *reinterpret_cast<float4*>(static_cast<float*>(data) + index) = value;
    } else if (type == MLA_FLOAT16) {
        __half2 const pairs[2] = {__floats2half2_rn(value.x, value.y), __floats2half2_rn(value.z, value.w)};
        *reinterpret_cast<uint2*>(static_cast<__half*>(data) + index) = reinterpret_cast<const uint2&>(pairs);
    } else {
        __nv_bfloat162 const pairs[2] = {__floats2bfloat162_rn(value.x, value.y), __floats2bfloat162_rn(value.z, value.w)};
        *reinterpret_cast<uint2*>(static_cast<__nv_bfloat16*>(data) + index) = reinterpret_cast<const uint2&>(pairs);
    }
}

// Eight consecutive values as bf16 bits. `count` of them exist, the rest are zero. `aligned`: they may be read at once.
__device__ inline uint4 load_eight(const void* data, int32_t type, int64_t index, int count, bool aligned) {
    __nv_bfloat162 pairs[4];
    if (count <= 0) return make_uint4(0, 0, 0, 0);
    if (aligned && count >= 8) {
        switch (type) {
            case MLA_BFLOAT16:
                return *reinterpret_cast<const uint4*>(static_cast<const __nv_bfloat16*>(data) + index);
            case MLA_FLOAT16: {
                uint4 const bits = *reinterpret_cast<const uint4*>(static_cast<const __half*>(data) + index);
                const auto* halves = reinterpret_cast<const __half2*>(&bits);
                for (int i = 0; i < 4; ++i) pairs[i] = __float22bfloat162_rn(__half22float2(halves[i]));
                break;
            }
            case MLA_FLOAT: {
                const auto* values = reinterpret_cast<const float4*>(static_cast<const float*>(data) + index);
                float4 const low = values[0], high = values[1];
                pairs[0] = __floats2bfloat162_rn(low.x, low.y);
                pairs[1] = __floats2bfloat162_rn(low.z, low.w);
                pairs[2] = __floats2bfloat162_rn(high.x, high.y);
                pairs[3] = __floats2bfloat162_rn(high.z, high.w);
                break;
            }
            default: {
                uint2 const codes = *reinterpret_cast<const uint2*>(static_cast<const uint8_t*>(data) + index);
                uint2 const low = decode_e4m3x4(codes.x), high = decode_e4m3x4(codes.y);
                return make_uint4(low.x, low.y, high.x, high.y);
            }
        }
    } else {
        float values[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) values[i] = i < count ? load_float(data, type, index + i) : 0.0f;
#pragma unroll
        for (int i = 0; i < 4; ++i) pairs[i] = __floats2bfloat162_rn(values[2 * i], values[2 * i + 1]);
    }
    return *reinterpret_cast<uint4*>(pairs);
}

// Whether load_eight may read at once: the base and the strides (elements) of a tensor of this type.
inline bool aligned_for_eight(const void* data, int64_t stride_a, int64_t stride_b, int32_t type) {
    return reinterpret_cast<uintptr_t>(data) % (8 * element_bytes(type) < 16 ? 8 : 16) == 0 && stride_a % 8 == 0 &&
           stride_b % 8 == 0;
}

// Division as the formats define it: correctly rounded f32, whatever the compiler's flags.
__device__ inline float divide(float a, float b) { return __fdiv_rn(a, b); }

// Where the block table has the page of a position of a sequence; null where it has no column for it.
__device__ inline const int32_t* page_entry(const int32_t* block_table, int64_t max_pages, int32_t page_size, int64_t sequence,
                                            int32_t position) {
    int64_t const column = position / page_size;
    return position < 0 || column >= max_pages ? nullptr : block_table + sequence * max_pages + column;
}

// Page of a position of a sequence, or -1 where the block table has no column for it or names no page of the pool.
__device__ inline int32_t page_of(const int32_t* block_table, int64_t max_pages, int64_t pages, int32_t page_size,
                                  int64_t sequence, int32_t position) {
    const int32_t* entry = page_entry(block_table, max_pages, page_size, sequence, position);
    int32_t const page = entry == nullptr ? -1 : *entry;
    return page >= 0 && page < pages ? page : -1;
}

// Byte of element (row, column) in a tile of 16-bit values whose rows are a multiple of 64 values: 16-byte units of each 128
// bytes are permuted by the row, so that eight rows at one column lie in different banks.
__device__ inline int swizzled(int row, int column, int row_values) {
    int const unit = column >> 3;
    return (row * row_values + ((unit ^ (row & 7)) << 3) + (column & 7)) * 2;
}

template <typename T>
__device__ inline T warp_max(T value) {
    for (int offset = warp_size / 2; offset > 0; offset /= 2) {
        value = max(value, __shfl_xor_sync(0xffffffffu, value, offset));
    }
    return value;
}

template <typename T>
__device__ inline T warp_sum(T value) {
    for (int offset = warp_size / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
    return value;
}

// Sum and maximum over a block of `threads` (a multiple of 32, at most 1024). `scratch` holds 32 floats; every thread calls
// and gets the result.
__device__ inline float block_sum(float value, float* scratch) {
    int const warps = blockDim.x / warp_size, warp = threadIdx.x / warp_size, lane = threadIdx.x % warp_size;
    value = warp_sum(value);
    __syncthreads();
    if (lane == 0) scratch[warp] = value;
    __syncthreads();
    return warp_sum(lane < warps ? scratch[lane] : 0.0f);
}

__device__ inline float block_max(float value, float* scratch) {
    int const warps = blockDim.x / warp_size, warp = threadIdx.x / warp_size, lane = threadIdx.x % warp_size;
    value = warp_max(value);
    __syncthreads();
    if (lane == 0) scratch[warp] = value;
    __syncthreads();
    return warp_max(lane < warps ? scratch[lane] : -INFINITY);
}

// Sequences, tokens and pages of a step, as every kernel reads them. Lengths and offsets come from device memory and may be
// anything (a builder times kernels on garbage): they are clamped where they are used.
struct Step {
    const int32_t* query_offsets;
    const int32_t* cache_lengths;
    const int32_t* block_table;
    const int32_t* token_sequence;
    const int32_t* positions;
    int64_t tokens, sequences, max_pages, pages;

    // Keys that the sequence can have at most.
    __device__ int32_t key_limit(int32_t page_size) const {
        int64_t const limit = max_pages * page_size;
        return limit < 0x7fffffff ? static_cast<int32_t>(limit) : 0x7fffffff;
    }

    // The sequence of a token, -1 for padding.
    __device__ int32_t sequence_of(int64_t token) const {
        int32_t const sequence = token_sequence[token];
        return sequence >= 0 && sequence < sequences ? sequence : -1;
    }
};

// The step's tensors from a call: the indices are those of the op's inputs, `pages` counts those of the pool.
inline Step make_step(const Call& call, int query_offsets, int cache_lengths, int block_table, int token_sequence,
                      int positions, int64_t pages) {
    return Step{call.input<int32_t>(query_offsets),  call.input<int32_t>(cache_lengths),
                call.input<int32_t>(block_table),    call.input<int32_t>(token_sequence),
                call.input<int32_t>(positions),      call.dims.T,
                call.dims.B,                         call.dims.max_pages,
                pages};
}

}  // namespace mla
