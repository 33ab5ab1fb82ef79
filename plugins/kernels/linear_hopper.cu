// MlaLinear on SM90: x, weight and output in bf16, sums in f32.
//
// A block makes 64 to 256 outputs of up to 256 tokens: a group of four warps has 64 of the tokens and all of the outputs, another warp
// orders both operands by the copy engine, 64 of C at a time, as many steps ahead as shared memory holds. With few tokens the memory bounds
// it: weights are read once, by as many blocks as there are multiprocessors, and ordered before the kernel before has ended.
#include <algorithm>

#include "early.cuh"
#include "hopper.cuh"
#include "linear.h"
#include "mma.cuh"
#include "projection_values.cuh"
#include "tensor_map.h"

namespace mla {
namespace {

using namespace hopper;

constexpr int group_tokens = 64, group_threads = 128;
constexpr int step_bytes = 128;  // of a row: 64 values
constexpr int step_rows = 64;  // of the weight
constexpr int tile_bytes = 64 * step_bytes;  // 64 tokens, or 64 rows of 64 outputs
constexpr int budget = 224 << 10;
constexpr int most_stages = 12;
constexpr int64_t most_size = (int64_t{1} << 31) - 1;  // coordinates of a copy

// Of a block: `groups` times 64 tokens, `columns` outputs.
template <int groups, int columns>
struct Block {
    static constexpr int threads = groups * group_threads + warp_size;
    static constexpr int tiles = columns / 64;
    static constexpr int x_bytes = groups * tile_bytes, w_bytes = tiles * tile_bytes, stage_bytes = x_bytes + w_bytes;
    static constexpr int stages = budget / stage_bytes < most_stages ? budget / stage_bytes : most_stages;
    static constexpr int bytes = stages * stage_bytes;
    static_assert(stages >= tiles, "outputs are staged where tokens were, 64 of them in each stage");
};

template <int groups, int columns>
__global__ void __launch_bounds__(Block<groups, columns>::threads, 1)
    linear_hopper_kernel(const __grid_constant__ CUtensorMap x_map, const __grid_constant__ CUtensorMap w_map,
                         const __grid_constant__ CUtensorMap out_map, int tokens, int outputs, int steps) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    let_next_kernel_begin();
    using B = Block<groups, columns>;
    extern __shared__ __align__(1024) uint8_t memory[];
    __shared__ uint64_t full[B::stages], empty[B::stages];
    uint32_t const there = shared_address(full), used = shared_address(empty), base = shared_address(memory);
    int const first_token = static_cast<int>(blockIdx.x) * groups * group_tokens, first_output = static_cast<int>(blockIdx.y) * columns;
    int const warp = threadIdx.x / warp_size, lane = threadIdx.x % warp_size;
    if (threadIdx.x == 0) {
        for (int i = 0; i < B::stages; ++i) {
            barrier_init(there + 8 * i, 1);
            barrier_init(used + 8 * i, groups * group_threads / warp_size);
        }
        fence_barrier_init();
    }
    __syncthreads();

    if (warp == groups * group_threads / warp_size) {
        if (!elect_lane()) return;
        auto order_w = [&](int step, int stage) {
            barrier_expect(there + 8 * stage, B::stage_bytes);
#pragma unroll
            for (int i = 0; i < B::tiles; ++i) {
                copy_box(base + stage * B::stage_bytes + B::x_bytes + i * tile_bytes, &w_map, there + 8 * stage,
                         (first_output + i * 64) * 2, step * step_rows, 0, 0);
            }
        };
        auto order_x = [&](int step, int stage) {
            copy_box(base + stage * B::stage_bytes, &x_map, there + 8 * stage, step * step_bytes, first_token, 0, 0);
        };
        // Weights need not wait for the kernel before.
        int const ahead = min(steps, B::stages);
        for (int step = 0; step < ahead; ++step) order_w(step, step);
        wait_for_kernel_before();
        for (int step = 0; step < ahead; ++step) order_x(step, step);
        int stage = 0, turn = 0;
        for (int step = ahead; step < steps; ++step) {
            barrier_wait(used + 8 * stage, turn & 1);
            order_w(step, stage);
            order_x(step, stage);
            if (++stage == B::stages) stage = 0, ++turn;
        }
        return;
    }

    int const group = warp / 4;
    float sums[columns / 2];
#pragma unroll
    for (int i = 0; i < columns / 2; ++i) sums[i] = 0.0f;
    pin(sums);
    int stage = 0, turn = 0, before = 0;
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
        uint32_t const place = base + stage * B::stage_bytes;
        uint32_t const x = tile_descriptor(place + group * tile_bytes), w = tile_descriptor(place + B::x_bytes);
        barrier_wait(there + 8 * stage, turn & 1);
        product_fence();
        product_bf16_wide<0, tile_bytes>(sums, x, w);
        product_bf16_wide<1, tile_bytes>(sums, x, w);
        product_bf16_wide<2, tile_bytes>(sums, x, w);
        product_bf16_wide<3, tile_bytes>(sums, x, w);
        product_commit();
        product_wait<1>();
        barrier_arrive_if(used + 8 * before, step > 0 && lane == 0);
        before = stage;
        if (++stage == B::stages) stage = 0, ++turn;
    }
    product_wait();
    pin(sums);
    named_sync(1 + group, group_threads);  // all of its warps have used its tokens

    int const line = warp % 4 * 16 + lane % 16;
#pragma unroll
    for (int i = 0; i < B::tiles; ++i) {
        uint32_t const staged = base + i * B::stage_bytes + group * tile_bytes;
        uint32_t words[16];
#pragma unroll
        for (int j = 0; j < 16; ++j) words[j] = pack(sums[32 * i + 2 * j], sums[32 * i + 2 * j + 1]);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            // lanes 0 to 15 name the rows of the first eight outputs, the others those of the next eight
            store_matrices(staged + line * 128 + ((2 * j + lane / 16 ^ (line & 7)) << 4), words + 4 * j);
        }
    }
    fence_async();
    named_sync(1 + group, group_threads);
    int const token = first_token + group * group_tokens;
    if (threadIdx.x % group_threads == 0 && token < tokens) {
#pragma unroll
        for (int i = 0; i < B::tiles; ++i) {
            int const output = first_output + i * 64;
            if (output < outputs) store_box(&out_map, base + i * B::stage_bytes + group * tile_bytes, output * 2, token, 0, 0);
        }
        store_commit();
        store_wait_read<0>();  // what else there is to wait for, who waits for the kernel does
    }
#endif
}

int make_map(CUtensorMap* map, const void* data, int64_t width, int64_t rows, int box_rows) {
    int64_t const row = width * 2;
    return make_tensor_map(map, data, {row, rows, 1, 1}, {row, row * rows, row * rows}, {step_bytes, box_rows, 1, 1});
}

template <int groups, int columns>
int launch(const Linear& work, const Device& device, cudaStream_t stream) {
    using B = Block<groups, columns>;
    CUtensorMap x_map, w_map, out_map;
    if (int status = make_map(&x_map, work.x, work.columns, work.tokens, groups * group_tokens)) return status;
    if (int status = make_map(&w_map, work.weight, work.outputs, work.columns, step_rows)) return status;
    if (int status = make_map(&out_map, work.out, work.outputs, work.tokens, group_tokens)) return status;
    auto* const kernel = linear_hopper_kernel<groups, columns>;
    if (int status = check_cuda("product of MlaLinear",
                                cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                     cudaFuncAttributeMaxDynamicSharedMemorySize, B::bytes))) {
        return status;
    }
    // Blocks of the same outputs follow each other: they share the weights in the L2 cache.
    dim3 const grid(static_cast<unsigned>(ceil_div<int64_t>(work.tokens, groups * group_tokens)),
                    static_cast<unsigned>(ceil_div<int64_t>(work.outputs, columns)));
    return launch_early("product of MlaLinear", kernel, grid, B::threads, B::bytes, device, stream, x_map, w_map, out_map,
                        static_cast<int>(work.tokens), static_cast<int>(work.outputs),
                        static_cast<int>(ceil_div<int64_t>(work.columns, step_rows)));
}

// What blocks of so many tokens and outputs take: their rounds over the multiprocessors, each its products and about as much besides as
// those of 32 outputs take.
int64_t cost_of(const Linear& work, const Device& device, int groups, int columns) {
    int64_t const blocks = ceil_div<int64_t>(work.tokens, groups * group_tokens) * ceil_div<int64_t>(work.outputs, columns);
    return ceil_div<int64_t>(blocks, device.multiprocessors) * groups * (columns + 32);
}

template <int groups>
int launch(const Linear& work, int columns, const Device& device, cudaStream_t stream) {
    if (columns == 64) return launch<groups, 64>(work, device, stream);
    if (columns == 128) return launch<groups, 128>(work, device, stream);
    if constexpr (groups < 4) {  // more sums of 16 warps than there are registers
        return columns == 192 ? launch<groups, 192>(work, device, stream) : launch<groups, 256>(work, device, stream);
    }
    return MLA_BAD_CALL;  // no such shape below
}

bool aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

}  // namespace

bool linear_takes_hopper(const Linear& work, const Device& device) {
    if (device.major != 9 || work.x_type != MLA_BFLOAT16 || work.weight_type != MLA_BFLOAT16 || work.out_type != MLA_BFLOAT16 ||
        work.columns == 0 || work.columns % 8 != 0 || work.outputs % 8 != 0 || !aligned(work.x) || !aligned(work.weight) ||
        !aligned(work.out) || work.columns * 2 > most_size || work.outputs * 2 > most_size || work.tokens > most_size ||
        ceil_div<int64_t>(work.outputs, 64) > 65535) {
        return false;
    }
    return has_hopper_code();
}

int linear_hopper(const Linear& work, const Device& device, cudaStream_t stream) {
    constexpr struct Shape {
        int groups, columns;
    } shapes[] = {{1, 256}, {1, 192}, {1, 128}, {1, 64}, {2, 256}, {2, 192}, {2, 128}, {2, 64}, {4, 128}, {4, 64}};
    Shape best{};
    int64_t least = 0;
    for (Shape const& shape : shapes) {
        if (shape.groups == 1 && work.tokens > group_tokens) continue;  // weights would be read for each of them
        int64_t const cost = cost_of(work, device, shape.groups, shape.columns);
        if (best.groups == 0 || cost < least) best = shape, least = cost;
    }
    if (best.groups == 1) return launch<1>(work, best.columns, device, stream);
    if (best.groups == 2) return launch<2>(work, best.columns, device, stream);
    return launch<4>(work, best.columns, device, stream);
}

}  // namespace mla
