// Products with weights on SM90 whose outputs are too few for blocks that have all columns: up to eight blocks, a cluster, share the columns of
// one product; each sums the parts of all for some of the tokens.
#include "linear_sums.cuh"

namespace mla {
namespace {

using namespace linear_tiles;

template <int groups, int columns>
struct SplitBlock : Block<groups, columns> {
    static constexpr int tokens = groups * group_tokens;
    static constexpr int row = columns + 8;  // floats of a row of sums: the four rows that half a warp writes meet no bank twice
    static_assert(tokens * row * 4 <= SplitBlock::bytes);
};

struct Split {
    Operands<most_linear_parts> operands;
    Result results[most_linear_parts];
};

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
        sum_parts<B>(work.results[part], operands.tokens, operands.outputs[part], first_token, first_output, tile, [](int) { return 1.0f; });
    }
    __syncwarp();
    if (operands.order == KernelOrder::beside) end_after_kernel_before();
    cluster_arrive();
    cluster_wait();  // a block's shared memory ends with it
#endif
}

template <int groups, int columns>
int launch_split(const Linear& work, const Shape& shape, const Device& device, cudaStream_t stream) {
    using B = SplitBlock<groups, columns>;
    Split argument{};
    if (int status = make_operands<B>(work, &argument.operands)) return status;
    for (int i = 0; i < work.count; ++i) argument.results[i] = result_of(work.parts[i]);
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
