// Products with weights on SM90: rows and weights in bf16, sums in f32.
//
// A block makes tiles of 64 to 256 outputs of up to 128 tokens: a group of four warps has 64 of the tokens and all of the outputs, another
// warp orders both operands by the copy engine, 64 columns at a time, as many steps ahead as shared memory holds. With few tokens the memory
// bounds it: weights are read once, by as many blocks as there are multiprocessors, and ordered before the kernel before has ended. With
// many the products do: a block goes on from tile to tile, and the next one's operands are on their way while results leave.
//
// Where the outputs are too few for that, up to eight blocks, a cluster, share the columns of one product; each sums the parts of all for
// some of the tokens.
#include <algorithm>

#include "cluster.cuh"
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
constexpr int most_cluster = 8;
constexpr int64_t most_size = (int64_t{1} << 31) - 1;  // coordinates of a copy

// Of a block: `groups` times 64 tokens, `columns` outputs. Stages leave room for `least_slots` tiles of 64 outputs that leave.
template <int groups_, int columns_, int least_slots>
struct Block {
    static constexpr int groups = groups_, columns = columns_;
    static constexpr int consumers = groups * group_threads, threads = consumers + warp_size;
    static constexpr int tiles = columns / 64;
    static constexpr int x_bytes = groups * tile_bytes, w_bytes = tiles * tile_bytes, stage_bytes = x_bytes + w_bytes;
    static constexpr int most = (budget - least_slots * x_bytes) / stage_bytes, stages = most < most_stages ? most : most_stages;
    static constexpr int free_slots = (budget - stages * stage_bytes) / x_bytes, slots = free_slots < tiles ? free_slots : tiles;
    static constexpr int bytes = stages * stage_bytes + (least_slots > 0 ? slots * x_bytes : 0);
};

template <int groups, int columns>
struct UnsplitBlock : Block<groups, columns, 1> {
    static_assert(UnsplitBlock::stages >= UnsplitBlock::tiles, "outputs of the last tile are staged where tokens were, 64 of them in each stage");
};

template <int groups, int columns>
struct SplitBlock : Block<groups, columns, 0> {
    static constexpr int row = columns + 8;  // floats of a row of sums: the four rows that half a warp writes meet no bank twice
    static_assert(groups * group_tokens * row * 4 <= SplitBlock::bytes);
};

// Parts of the outputs follow each other; each begins with a block of its own.
template <int parts>
struct Operands {
    CUtensorMap x, w[parts];
    int first_block[parts], outputs[parts];
    int count, tokens, steps;
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
            barrier_init(ring.there + 8 * i, 1);
            barrier_init(ring.used + 8 * i, B::consumers / warp_size);
        }
        fence_barrier_init();
    }
    __syncthreads();
    return ring;
}

// Orders `steps` steps of both operands for each of so many tiles. One thread.
template <class B, int parts, class TileAt>
__device__ inline void order_operands(const Ring& ring, const Operands<parts>& operands, int tiles, int steps, TileAt tile_at) {
    auto order_w = [&](const Tile& tile, int step, int stage) {
        barrier_expect(ring.there + 8 * stage, operands.x_bytes + B::w_bytes);
#pragma unroll
        for (int i = 0; i < B::tiles; ++i) {
            copy_box(ring.base + stage * B::stage_bytes + B::x_bytes + i * tile_bytes, &operands.w[tile.part], ring.there + 8 * stage,
                     (tile.first_output + i * 64) * 2, (tile.first + step) * step_rows, 0, 0);
        }
    };
    auto order_x = [&](const Tile& tile, int step, int stage) {
        copy_box(ring.base + stage * B::stage_bytes, &operands.x, ring.there + 8 * stage, (tile.first + step) * step_bytes, tile.first_token, 0,
                 0);
    };
    // Weights need not wait for the kernel before.
    int const ahead = min(steps, B::stages);
    Tile tile = tile_at(0);
    Turn<B> turn;
    for (int step = 0; step < ahead; ++step) order_w(tile, step, step);
    wait_for_kernel_before();
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

// The sums of a group's 64 tokens.
template <class B>
__device__ inline void multiply(const Ring& ring, int group, int steps, Turn<B>& turn, float (&sums)[B::columns / 2]) {
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
    product_wait();
    pin(sums);
    barrier_arrive_if(ring.used + 8 * before, steps > 0 && lane == 0);
}

// ---- all columns in one block -----------------------------------------------------------------------------------------------

struct Unsplit {
    Operands<most_unsplit_parts> operands;
    CUtensorMap out[most_unsplit_parts];
    int token_tiles, tiles;
    const float* squares;
    float mean, epsilon;
};

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)

// What x of a token and of the one eight behind it is multiplied by. The four lanes of a row call together. All squares are asked for before
// any is waited for, up to 32 steps of them: a block's tile waits for this.
__device__ inline void inverse_roots(const Unsplit& work, int token, float (&roots)[2]) {
    constexpr int together = 8;
    int const tokens = work.operands.tokens, steps = work.operands.steps;
    float sums[2] = {0.0f, 0.0f};
#pragma unroll 1
    for (int first = threadIdx.x % 4; first < steps; first += 4 * together) {
        float squares[2][together];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
#pragma unroll
            for (int i = 0; i < together; ++i) {
                int const step = first + 4 * i, row = token + 8 * r;
                squares[r][i] = step < steps && row < tokens ? work.squares[static_cast<int64_t>(step) * tokens + row] : 0.0f;
            }
        }
#pragma unroll
        for (int r = 0; r < 2; ++r) {
#pragma unroll
            for (int i = 0; i < together; ++i) sums[r] += squares[r][i];
        }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        sums[r] += __shfl_xor_sync(~0u, sums[r], 1);
        sums[r] += __shfl_xor_sync(~0u, sums[r], 2);
        roots[r] = rsqrtf(sums[r] * work.mean + work.epsilon);
    }
}

#endif

template <class B>
__global__ void __launch_bounds__(B::threads, 1) linear_hopper_kernel(const __grid_constant__ Unsplit work) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    let_next_kernel_begin();
    extern __shared__ __align__(1024) uint8_t memory[];
    __shared__ uint64_t full[B::stages], empty[B::stages];
    Ring const ring = make_ring<B>(full, empty, memory);
    auto const& operands = work.operands;
    int const first = static_cast<int>(blockIdx.x), blocks = static_cast<int>(gridDim.x), tiles = (work.tiles - first + blocks - 1) / blocks;
    int const warp = threadIdx.x / warp_size, lane = threadIdx.x % warp_size;
    // Those of the same outputs follow each other: they share the weights in the L2 cache.
    auto tile_at = [&](int i) {
        int const tile = first + i * blocks, block = tile / work.token_tiles, part = operands.part_of(block);
        return Tile{part, tile % work.token_tiles * B::groups * group_tokens, (block - operands.first_block[part]) * B::columns, 0};
    };
    if (warp == B::consumers / warp_size) {
        if (elect_lane()) order_operands<B>(ring, operands, tiles, operands.steps, tile_at);
    } else {
        int const group = warp / 4, line = warp % 4 * 16 + lane % 16;
        bool const stores = threadIdx.x % group_threads == 0;
        Turn<B> turn;
        int slot = 0;
        for (int i = 0; i < tiles; ++i) {
            Tile const tile = tile_at(i);
            bool const last = i + 1 == tiles;
            float factor[2] = {1.0f, 1.0f};
            if (work.squares != nullptr) {
                if (i == 0) wait_for_kernel_before();
                inverse_roots(work, tile.first_token + warp * 16 + lane / 4, factor);
            }
            float sums[B::columns / 2];
            multiply<B>(ring, group, operands.steps, turn, sums);
#pragma unroll
            for (int j = 0; j < B::tiles; ++j) {
                // Behind the last one no operands are ordered: each 64 outputs have a place of their own.
                uint32_t const place = last ? j * B::stage_bytes : B::stages * B::stage_bytes + slot * B::x_bytes;
                uint32_t const staged = ring.base + place + group * tile_bytes;
                uint32_t words[16];
#pragma unroll
                for (int k = 0; k < 16; ++k) {
                    words[k] = pack(sums[32 * j + 2 * k] * factor[k % 2], sums[32 * j + 2 * k + 1] * factor[k % 2]);
                }
                if (!last || j == 0) {
                    if (stores) store_wait_read<B::slots - 1>();  // what lay there has left
                    named_sync(1 + group, group_threads);
                }
#pragma unroll
                for (int k = 0; k < 4; ++k) {
                    // lanes 0 to 15 name the rows of the first eight outputs, the others those of the next eight
                    store_matrices(staged + line * 128 + ((2 * k + lane / 16 ^ (line & 7)) << 4), words + 4 * k);
                }
                fence_async();
                named_sync(1 + group, group_threads);
                int const token = tile.first_token + group * group_tokens, output = tile.first_output + j * 64;
                if (stores) {
                    if (token < operands.tokens && output < operands.outputs[tile.part]) {
                        store_box(&work.out[tile.part], staged, output * 2, token, 0, 0);
                    }
                    store_commit();
                }
                slot = slot + 1 == B::slots ? 0 : slot + 1;
            }
        }
        if (stores) store_wait_read<0>();  // what else there is to wait for, who waits for the kernel does
    }
#endif
}

// ---- the columns among the blocks of a cluster ------------------------------------------------------------------------------

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
        multiply<B>(ring, warp / 4, steps, turn, sums);
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

// ---- launches ---------------------------------------------------------------------------------------------------------------

int make_map(CUtensorMap* map, const void* data, int64_t width, int64_t rows, int box_rows) {
    int64_t const row = width * 2;
    return make_tensor_map(map, data, {row, rows, 1, 1}, {row, row * rows, row * rows}, {step_bytes, box_rows, 1, 1});
}

int64_t steps_of(const Linear& work) { return ceil_div<int64_t>(work.columns, step_rows); }

// Blocks along the outputs.
int64_t blocks_of(const Linear& work, int columns) {
    int64_t blocks = 0;
    for (int i = 0; i < work.count; ++i) blocks += ceil_div<int64_t>(work.parts[i].outputs, columns);
    return blocks;
}

template <class B, int parts>
int make_operands(const Linear& work, Operands<parts>* operands) {
    operands->count = work.count;
    operands->tokens = static_cast<int>(work.tokens);
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

template <int groups, int columns>
int launch_unsplit(const Linear& work, const Shape& shape, const Device& device, cudaStream_t stream) {
    using B = UnsplitBlock<groups, columns>;
    Unsplit argument{};
    if (int status = make_operands<B>(work, &argument.operands)) return status;
    for (int i = 0; i < work.count; ++i) {
        LinearPart const& part = work.parts[i];
        if (int status = make_map(&argument.out[i], part.out, part.outputs, work.tokens, group_tokens)) return status;
    }
    argument.token_tiles = static_cast<int>(shape.token_tiles(work));
    argument.tiles = static_cast<int>(shape.tiles(work));
    argument.squares = work.squares;
    argument.mean = 1.0f / static_cast<float>(work.columns);
    argument.epsilon = work.epsilon;
    dim3 const grid(static_cast<unsigned>(std::min<int64_t>(argument.tiles, device.multiprocessors)));
    return launch<B>(linear_hopper_kernel<B>, argument, grid, 1, device, stream);
}

template <int groups>
int launch_unsplit(const Linear& work, const Shape& shape, const Device& device, cudaStream_t stream) {
    if (shape.columns == 64) return launch_unsplit<groups, 64>(work, shape, device, stream);
    if (shape.columns == 128) return launch_unsplit<groups, 128>(work, shape, device, stream);
    if (shape.columns == 192) return launch_unsplit<groups, 192>(work, shape, device, stream);
    return launch_unsplit<groups, 256>(work, shape, device, stream);
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

bool aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

bool takes(const LinearPart& part) {
    return part.weight_type == MLA_BFLOAT16 && (part.factors == nullptr || part.factors_type == MLA_BFLOAT16) &&
           (part.out_type == MLA_BFLOAT16 || part.out_type == MLA_FLOAT) && part.outputs % 8 == 0 && part.outputs * 2 <= most_size &&
           aligned(part.weight) && aligned(part.factors) && aligned(part.out);
}

}  // namespace

bool linear_takes_hopper(const Linear& work, const Device& device) {
    if (device.major != 9 || work.x_type != MLA_BFLOAT16 || work.columns == 0 || work.columns % 8 != 0 || !aligned(work.x) ||
        work.columns * 2 > most_size || work.tokens > most_size / (2 * most_cluster) || blocks_of(work, 64) > 65535 ||
        blocks_of(work, 64) * ceil_div<int64_t>(work.tokens, group_tokens) > most_size) {
        return false;
    }
    return has_hopper_code() && std::all_of(work.parts, work.parts + work.count, takes);
}

int linear_hopper(const Linear& work, const Device& device, cudaStream_t stream) {
    if (work.count == 0) return MLA_OK;
    int const groups = work.tokens > group_tokens ? 2 : 1;  // more than one, or weights would be read for each 64 tokens
    Shape best{};
    for (int columns : {256, 192, 128, 64}) Shape{groups, columns, 1}.take_if_better(&best, work, device);
    return groups == 1 ? launch_unsplit<1>(work, best, device, stream) : launch_unsplit<2>(work, best, device, stream);
}

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
