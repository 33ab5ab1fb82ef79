// What the products with weights on SM90 share: how operands come to a block and are multiplied, and which shape its tiles have.
//
// A block makes tiles of 64 to 256 outputs of up to 128 tokens: a group of four warps has 64 of the tokens and all of the outputs, another
// warp orders both operands by the copy engine, 64 columns at a time, as many steps ahead as shared memory holds.
#pragma once

#include <algorithm>

#include "device.cuh"
#include "early.cuh"
#include "hopper.cuh"
#include "linear.h"
#include "mma.cuh"
#include "tensor_map.h"

namespace mla {
namespace linear_tiles {

using namespace hopper;

constexpr int group_tokens = 64, group_threads = 128;
constexpr int step_bytes = 128;  // of a row: 64 values
constexpr int step_rows = 64;  // of the weight
constexpr int tile_bytes = 64 * step_bytes;  // 64 tokens, or 64 rows of 64 outputs
constexpr int budget = 224 << 10;
constexpr int most_stages = 12;
constexpr int most_cluster = 8;
constexpr int64_t most_size = (int64_t{1} << 31) - 1;  // coordinates of a copy

// Parts of the outputs follow each other; each begins with a block of its own. `Weight`: how a block comes to a part's weights.
template <int parts, class Weight = CUtensorMap>
struct Operands {
    CUtensorMap x;
    Weight w[parts];
    int first_block[parts], outputs[parts];
    int count, tokens, steps;
    bool weights_made;  // by a kernel before
    KernelOrder order;
    int x_bytes;  // of a step: rows that there are not are not copied, for that takes the copy engine as long as others

    __device__ int part_of(int block) const {
        int part = 0;
        while (part + 1 < count && block >= first_block[part + 1]) ++part;
        return part;
    }
};

// What a block makes next: outputs of a part from `first_output` on, of tokens from `first_token` on, of columns from step `first` on.
struct Tile {
    int part, first_token, first_output, first;
};

// Of a block: `groups` times 64 tokens, `columns` outputs.
template <int groups_, int columns_>
struct Block {
    static constexpr int groups = groups_, columns = columns_;
    static constexpr int consumers = groups * group_threads, threads = consumers + warp_size;
    static constexpr int tiles = columns / 64;
    static constexpr int x_bytes = groups * tile_bytes, w_bytes = tiles * tile_bytes, stage_bytes = x_bytes + w_bytes;
    static constexpr int most = budget / stage_bytes, stages = most < most_stages ? most : most_stages, bytes = stages * stage_bytes;
    static constexpr int row_arrivals = 0;  // at a step's barrier, of warps that make of its rows of x what is multiplied

    template <int parts>
    __device__ static int w_bytes_of(const Operands<parts>&, const Tile&, int) { return w_bytes; }
    template <int parts>
    __device__ static void order_w(const Operands<parts>& operands, const Tile& tile, int step, uint32_t stage, uint32_t there) {
#pragma unroll
        for (int i = 0; i < tiles; ++i) {
            copy_box(stage + x_bytes + i * tile_bytes, &operands.w[tile.part], there, (tile.first_output + i * 64) * 2, step * step_rows, 0, 0);
        }
    }
    template <int parts>
    __device__ static void order_x(const Operands<parts>& operands, const Tile& tile, int step, uint32_t stage, uint32_t there) {
        copy_box(stage, &operands.x, there, step * step_bytes, tile.first_token, 0, 0);
    }
};

// The barriers of a block's stages, and the stages.
struct Ring {
    uint32_t there, used, base;
};

// The next stage, and how often all have been used before.
template <class B>
struct Turn {
    int stage = 0, turn = 0;
    __device__ void advance() {
        if (++stage == B::stages) stage = 0, ++turn;
    }
};

template <class B>
__device__ inline Ring make_ring(uint64_t* full, uint64_t* empty, const uint8_t* memory) {
    Ring const ring{shared_address(full), shared_address(empty), shared_address(memory)};
    if (threadIdx.x == 0) {
        for (int i = 0; i < B::stages; ++i) {
            barrier_init(ring.there + 8 * i, 1 + B::row_arrivals);
            barrier_init(ring.used + 8 * i, B::consumers / warp_size);
            if (B::row_arrivals > 0) barrier_init(ring.there + 8 * (B::stages + i), 1);  // rows for these warps
        }
        fence_barrier_init();
    }
    __syncthreads();
    return ring;
}

// Orders `steps` steps of both operands for each of so many tiles. One thread.
template <class B, class AllOperands, class TileAt>
__device__ inline void order_operands(const Ring& ring, const AllOperands& operands, int tiles, int steps, TileAt tile_at) {
    auto order_w = [&](const Tile& tile, int step, int stage) {
        int const bytes = B::w_bytes_of(operands, tile, tile.first + step);
        barrier_expect(ring.there + 8 * stage, bytes + (B::row_arrivals == 0 ? operands.x_bytes : 0));
        B::order_w(operands, tile, tile.first + step, ring.base + stage * B::stage_bytes, ring.there + 8 * stage);
    };
    auto order_x = [&](const Tile& tile, int step, int stage) {
        uint32_t const there = ring.there + 8 * (B::row_arrivals == 0 ? stage : B::stages + stage);
        if (B::row_arrivals > 0) barrier_expect(there, operands.x_bytes);
        B::order_x(operands, tile, tile.first + step, ring.base + stage * B::stage_bytes, there);
    };
    // Weights need not wait for the kernel before, unless it makes them.
    if (operands.weights_made) wait_for_kernel_before();
    int const ahead = min(steps, B::stages);
    Tile tile = tile_at(0);
    Turn<B> turn;
    for (int step = 0; step < ahead; ++step) order_w(tile, step, step);
    if (operands.order != KernelOrder::beside) wait_for_kernel_before();
    if (operands.order == KernelOrder::leading) let_next_kernel_begin();
    for (int step = 0; step < ahead; ++step, turn.advance()) order_x(tile, step, step);
    for (int i = 0; i < tiles; ++i) {
        if (i > 0) tile = tile_at(i);
        for (int step = i == 0 ? ahead : 0; step < steps; ++step, turn.advance()) {
            barrier_wait(ring.used + 8 * turn.stage, turn.turn & 1 ^ 1);  // at once, where it has not been used
            order_w(tile, step, turn.stage);
            order_x(tile, step, turn.stage);
        }
    }
}

// The sums of a group's 64 tokens. `meanwhile()` is done while the last step's products are under way.
template <class B, class Meanwhile>
__device__ inline void multiply(const Ring& ring, int group, int steps, Turn<B>& turn, float (&sums)[B::columns / 2], Meanwhile meanwhile) {
    int const lane = threadIdx.x % warp_size;
#pragma unroll
    for (int i = 0; i < B::columns / 2; ++i) sums[i] = 0.0f;
    pin(sums);
    int before = 0;
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
        uint32_t const place = ring.base + turn.stage * B::stage_bytes;
        uint32_t const x = tile_descriptor(place + group * tile_bytes), w = tile_descriptor(place + B::x_bytes);
        barrier_wait(ring.there + 8 * turn.stage, turn.turn & 1);
        product_fence();
        product_bf16_wide<0, tile_bytes>(sums, x, w);
        product_bf16_wide<1, tile_bytes>(sums, x, w);
        product_bf16_wide<2, tile_bytes>(sums, x, w);
        product_bf16_wide<3, tile_bytes>(sums, x, w);
        product_commit();
        product_wait<1>();
        barrier_arrive_if(ring.used + 8 * before, step > 0 && lane == 0);
        before = turn.stage;
        turn.advance();
    }
    meanwhile();
    product_wait();
    pin(sums);
    barrier_arrive_if(ring.used + 8 * before, steps > 0 && lane == 0);
}

inline int make_map(CUtensorMap* map, const void* data, int64_t width, int64_t rows, int box_rows) {
    int64_t const row = width * 2;
    return make_tensor_map(map, data, {row, rows, 1, 1}, {row, row * rows, row * rows}, {step_bytes, box_rows, 1, 1});
}

inline int64_t steps_of(const Linear& work) { return ceil_div<int64_t>(work.columns, step_rows); }

// Blocks along the outputs.
inline int64_t blocks_of(const Linear& work, int columns) {
    int64_t blocks = 0;
    for (int i = 0; i < work.count; ++i) blocks += ceil_div<int64_t>(work.parts[i].outputs, columns);
    return blocks;
}

template <class B, int parts>
int make_operands(const Linear& work, Operands<parts>* operands) {
    operands->count = work.count;
    operands->tokens = static_cast<int>(work.tokens);
    operands->weights_made = work.weights_made;
    operands->order = work.order;
    operands->steps = static_cast<int>(steps_of(work));
    int64_t blocks = 0;
    for (int i = 0; i < work.count; ++i) {
        LinearPart const& part = work.parts[i];
        operands->first_block[i] = static_cast<int>(blocks);
        operands->outputs[i] = static_cast<int>(part.outputs);
        blocks += ceil_div<int64_t>(part.outputs, B::columns);
        if (int status = make_map(&operands->w[i], part.weight, part.outputs, work.columns, step_rows)) return status;
    }
    int const rows = static_cast<int>(std::min<int64_t>(B::groups * group_tokens, round_up<int64_t>(work.tokens, 8)));
    operands->x_bytes = rows * step_bytes;
    return make_map(&operands->x, work.x, work.columns, work.tokens, rows);
}

template <class B, class Work>
int launch(void (*kernel)(Work), const Work& argument, dim3 grid, int cluster, const Device& device, cudaStream_t stream) {
    if (int status = check_cuda("product with weights",
                                cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                     cudaFuncAttributeMaxDynamicSharedMemorySize, B::bytes))) {
        return status;
    }
    return launch_clusters_early("product with weights", kernel, grid, cluster, B::threads, B::bytes, device, stream, argument);
}

// A tile of the product, and the blocks that share its columns.
struct Shape {
    int groups, columns, cluster;

    int64_t token_tiles(const Linear& work) const { return ceil_div<int64_t>(work.tokens, groups * group_tokens); }
    int64_t tiles(const Linear& work) const { return token_tiles(work) * blocks_of(work, columns); }
    // About how many cycles it takes: rounds over the multiprocessors, each as many steps' products or copies, whichever are more, what results
    // take on their way, and what the sums of a cluster's parts do. The numbers choose what was the fastest, or nearly, of all that were
    // measured on an H200.
    int64_t cost(const Linear& work, const Device& device) const {
        // The blocks of a cluster of more than two are so near each other that not all multiprocessors have one.
        int const places = std::max(1, (cluster <= 2 ? device.multiprocessors : device.multiprocessors * 15 / 16) / cluster);
        int64_t const products = 2 * groups * columns, copies = (groups * tile_bytes + columns * step_bytes) / 36;
        int64_t const results = 2000 + groups * columns * (5 + 64 * (cluster - 1) / cluster);
        return ceil_div<int64_t>(tiles(work), places) * (ceil_div<int64_t>(steps_of(work), cluster) * std::max(products, copies) + results);
    }
    void take_if_better(Shape* best, const Linear& work, const Device& device) const {
        if (best->groups == 0 || cost(work, device) < best->cost(work, device)) *best = *this;
    }
};

}  // namespace linear_tiles
}  // namespace mla
