// Products with weights on SM90 whose outputs are too few for blocks that have all columns: up to eight blocks, a cluster, share the columns of
// one product; each sums the parts of all for some of the tokens.
#include "cluster.cuh"
#include "linear_hopper.cuh"
#include "projection_values.cuh"

namespace mla {
namespace {

using namespace linear_tiles;

template <int groups, int columns>
struct SplitBlock : Block<groups, columns> {
    static constexpr int row = columns + 8;  // floats of a row of sums: the four rows that half a warp writes meet no bank twice
    static_assert(groups * group_tokens * row * 4 <= SplitBlock::bytes);
};

struct Split {
    Operands<most_linear_parts> operands;
    struct Result {
        void* out;
        const __nv_bfloat16* factors;
        float* squares;
        int32_t type;
    } results[most_linear_parts];
};

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)

// Four outputs of a token.
__device__ inline void store_four(const Split::Result& result, int64_t place, float4 value) {
    if (result.type == MLA_FLOAT) {
        *reinterpret_cast<float4*>(static_cast<float*>(result.out) + place) = value;
    } else {
        *reinterpret_cast<uint2*>(static_cast<__nv_bfloat16*>(result.out) + place) = make_uint2(pack(value.x, value.y), pack(value.z, value.w));
    }
}

// Adds up the parts of all `blocks` blocks for this one's share of the tokens. Half a warp has 64 outputs of a token, and asks for eight parts
// before it waits: of several tokens, where few blocks have one. It begins with its own block's part, so that not all read one block at once.
template <class B, int blocks>
__device__ inline void sum_parts(const Split& work, int part, int first_token, int first_output, const float* tile) {
    auto const& operands = work.operands;
    Split::Result const& result = work.results[part];
    constexpr int rows = B::groups * group_tokens / blocks, shares = rows * B::tiles, halves = B::consumers / 16, together = most_cluster / blocks;
    int const lane = threadIdx.x % warp_size, rank = cluster_rank(), outputs = operands.outputs[part];
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
            there[i] = share < shares && tokens[i] < operands.tokens && first_output + columns[i] < outputs;
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
            int const output = first_output + columns[i];
            if (result.squares != nullptr) {
                float squares = sum.x * sum.x + sum.y * sum.y + sum.z * sum.z + sum.w * sum.w;  // of outputs that there are not: zero
#pragma unroll
                for (int other = 8; other > 0; other /= 2) squares += __shfl_xor_sync(~0u, squares, other);
                if (lane % 16 == 0 && there[i]) result.squares[static_cast<int64_t>(output / 64) * operands.tokens + tokens[i]] = squares;
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

#endif

template <class B>
__global__ void __launch_bounds__(B::threads, 1) linear_split_kernel(const __grid_constant__ Split work) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    let_next_kernel_begin();
    extern __shared__ __align__(1024) uint8_t memory[];
    __shared__ uint64_t full[B::stages], empty[B::stages];
    Ring const ring = make_ring<B>(full, empty, memory);
    auto const& operands = work.operands;
    int const rank = cluster_rank(), blocks = cluster_size();
    int const block = static_cast<int>(blockIdx.y), part = operands.part_of(block);
    int const first_token = static_cast<int>(blockIdx.x) / blocks * B::groups * group_tokens;
    int const first_output = (block - operands.first_block[part]) * B::columns;
    int const first = operands.steps * rank / blocks, steps = operands.steps * (rank + 1) / blocks - first;
    int const warp = threadIdx.x / warp_size, lane = threadIdx.x % warp_size;
    float* const tile = reinterpret_cast<float*>(memory);  // [tokens][B::row], where the operands were
    if (warp == B::consumers / warp_size) {
        if (elect_lane()) order_operands<B>(ring, operands, 1, steps, [&](int) { return Tile{part, first_token, first_output, first}; });
        __syncwarp();
        cluster_barrier();
    } else {
        float sums[B::columns / 2];
        Turn<B> turn;
        multiply<B>(ring, warp / 4, steps, turn, sums, [] {});
        named_sync(1, B::consumers);  // all have used the operands
        float* const there = tile + (warp * 16 + lane / 4) * B::row + lane % 4 * 2;
#pragma unroll
        for (int i = 0; i < B::columns / 8; ++i) {
            *reinterpret_cast<float2*>(there + 8 * i) = make_float2(sums[4 * i], sums[4 * i + 1]);
            *reinterpret_cast<float2*>(there + 8 * B::row + 8 * i) = make_float2(sums[4 * i + 2], sums[4 * i + 3]);
        }
        cluster_barrier();
        if (blocks == 8) {
            sum_parts<B, 8>(work, part, first_token, first_output, tile);
        } else if (blocks == 4) {
            sum_parts<B, 4>(work, part, first_token, first_output, tile);
        } else if (blocks == 2) {
            sum_parts<B, 2>(work, part, first_token, first_output, tile);
        } else {
            sum_parts<B, 1>(work, part, first_token, first_output, tile);
        }
    }
    __syncwarp();
    cluster_arrive();
    cluster_wait();  // a block's shared memory ends with it
#endif
}

template <int groups, int columns>
int launch_split(const Linear& work, const Shape& shape, const Device& device, cudaStream_t stream) {
    using B = SplitBlock<groups, columns>;
    Split argument{};
    if (int status = make_operands<B>(work, &argument.operands)) return status;
    for (int i = 0; i < work.count; ++i) {
        LinearPart const& part = work.parts[i];
        argument.results[i] = {part.out, static_cast<const __nv_bfloat16*>(part.factors), part.squares, part.out_type};
    }
    // Blocks of the same outputs follow each other: they share the weights in the L2 cache.
    dim3 const grid(static_cast<unsigned>(shape.token_tiles(work) * shape.cluster), static_cast<unsigned>(blocks_of(work, columns)));
    return launch<B>(linear_split_kernel<B>, argument, grid, shape.cluster, device, stream);
}

template <int groups>
int launch_split(const Linear& work, const Shape& shape, const Device& device, cudaStream_t stream) {
    if (shape.columns == 64) return launch_split<groups, 64>(work, shape, device, stream);
    if (shape.columns == 128) return launch_split<groups, 128>(work, shape, device, stream);
    return launch_split<groups, 192>(work, shape, device, stream);
}

}  // namespace

int linear_hopper_split(const Linear& work, const Device& device, cudaStream_t stream) {
    if (work.count == 0) return MLA_OK;
    int const groups = work.tokens > group_tokens ? 2 : 1;
    Shape best{};
    for (int columns : {64, 128, 192}) {
        for (int cluster = 1; cluster <= std::min<int64_t>({most_cluster, device.multiprocessors, steps_of(work)}); cluster *= 2) {
            Shape{groups, columns, cluster}.take_if_better(&best, work, device);
        }
    }
    return groups == 1 ? launch_split<1>(work, best, device, stream) : launch_split<2>(work, best, device, stream);
}

}  // namespace mla
