// What blocks that share the columns of a product do with their sums: they lie in shared memory as [tokens][B::row] f32, and each block adds up
// those of all for some of the tokens.
#pragma once

#include "cluster.cuh"
#include "linear_hopper.cuh"
#include "projection_values.cuh"

namespace mla {
namespace linear_tiles {

// Where the outputs of a part go, and what becomes of them (`LinearPart`).
struct Result {
    void* out;
    const __nv_bfloat16* factors;
    float* squares;
    int32_t type;
};

inline Result result_of(const LinearPart& part) {
    return {part.out, static_cast<const __nv_bfloat16*>(part.factors), part.squares, part.out_type};
}

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)

// Four outputs of a token.
__device__ inline void store_four(const Result& result, int64_t place, float4 value) {
    if (result.type == MLA_FLOAT) {
        *reinterpret_cast<float4*>(static_cast<float*>(result.out) + place) = value;
    } else {
        *reinterpret_cast<uint2*>(static_cast<__nv_bfloat16*>(result.out) + place) = make_uint2(pack(value.x, value.y), pack(value.z, value.w));
    }
}

// Adds up the parts of all `blocks` blocks for this one's share of the tokens. Half a warp has 64 outputs of a token, and asks for eight parts
// before it waits: of several tokens, where few blocks have one. It begins with its own block's part, so that not all read one block at once.
// `factor_of(token)`: what all sums of a token are multiplied by.
template <class B, int blocks, class FactorOf>
__device__ inline void sum_parts(const Result& result, int all_tokens, int outputs, int first_token, int first_output, const float* tile,
                                 FactorOf&& factor_of) {
    constexpr int rows = B::tokens / blocks, shares = rows * B::tiles, halves = B::consumers / 16, together = most_cluster / blocks;
    int const lane = threadIdx.x % warp_size, rank = cluster_rank();
#pragma unroll 1
    for (int first = threadIdx.x / warp_size * 2; first < shares; first += halves * together) {
        int tokens[together], columns[together];
        bool there[together];
        uint2 factors[together];
        uint4 parts[together][blocks];
#pragma unroll
        for (int i = 0; i < together; ++i) {
            int const share = first + i * halves + lane / 16, row = rank * rows + share / B::tiles;
            columns[i] = share % B::tiles * 64 + lane % 16 * 4;
            tokens[i] = first_token + row;
            there[i] = share < shares && tokens[i] < all_tokens && first_output + columns[i] < outputs;
            factors[i] = make_uint2(0, 0);
            if (there[i] && result.factors != nullptr) {
                factors[i] = *reinterpret_cast<const uint2*>(result.factors + first_output + columns[i]);
            }
#pragma unroll
            for (int j = 0; j < blocks; ++j) {
                parts[i][j] = make_uint4(0, 0, 0, 0);
                if (!there[i]) continue;
                parts[i][j] = load_from_block(reinterpret_cast<const uint4*>(tile + row * B::row + columns[i]), rank + j & blocks - 1);
            }
        }
#pragma unroll
        for (int i = 0; i < together; ++i) {
            float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
            for (int j = 0; j < blocks; ++j) {
                sum.x += __uint_as_float(parts[i][j].x), sum.y += __uint_as_float(parts[i][j].y);
                sum.z += __uint_as_float(parts[i][j].z), sum.w += __uint_as_float(parts[i][j].w);
            }
            float const factor = there[i] ? factor_of(tokens[i]) : 0.0f;
            sum.x *= factor, sum.y *= factor, sum.z *= factor, sum.w *= factor;
            int const output = first_output + columns[i];
            if (result.squares != nullptr) {
                float squares = sum.x * sum.x + sum.y * sum.y + sum.z * sum.z + sum.w * sum.w;  // of outputs that there are not: zero
#pragma unroll
                for (int other = 8; other > 0; other /= 2) squares += __shfl_xor_sync(~0u, squares, other);
                if (lane % 16 == 0 && there[i]) result.squares[static_cast<int64_t>(output / 64) * all_tokens + tokens[i]] = squares;
            }
            if (!there[i]) continue;
            if (result.factors != nullptr) {
                sum.x *= __uint_as_float(factors[i].x << 16), sum.y *= __uint_as_float(factors[i].x & 0xffff0000u);
                sum.z *= __uint_as_float(factors[i].y << 16), sum.w *= __uint_as_float(factors[i].y & 0xffff0000u);
            }
            store_four(result, static_cast<int64_t>(tokens[i]) * outputs + output, sum);
        }
    }
}

// The same of as many blocks as the cluster has.
template <class B, class FactorOf>
__device__ inline void sum_parts(const Result& result, int all_tokens, int outputs, int first_token, int first_output, const float* tile,
                                 FactorOf&& factor_of) {
    switch (cluster_size()) {
        case 8: return sum_parts<B, 8>(result, all_tokens, outputs, first_token, first_output, tile, factor_of);
        case 4: return sum_parts<B, 4>(result, all_tokens, outputs, first_token, first_output, tile, factor_of);
        case 2: return sum_parts<B, 2>(result, all_tokens, outputs, first_token, first_output, tile, factor_of);
        default: return sum_parts<B, 1>(result, all_tokens, outputs, first_token, first_output, tile, factor_of);
    }
}

#endif

}  // namespace linear_tiles
}  // namespace mla
