// Products with weights on SM90: rows and weights in bf16, sums in f32.
//
// A block makes 64 to 256 outputs of up to 128 tokens: a group of four warps has 64 of the tokens and all of the outputs, another warp
// orders both operands by the copy engine, 64 columns at a time, as many steps ahead as shared memory holds. With few tokens the memory
// bounds it: weights are read once, by as many blocks as there are multiprocessors, and ordered before the kernel before has ended.
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

// Of a block: `groups` times 64 tokens, `columns` outputs.
template <int groups_, int columns_>
struct Block {
    static constexpr int groups = groups_, columns = columns_;
    static constexpr int consumers = groups * group_threads, threads = consumers + warp_size;
    static constexpr int tiles = columns / 64;
    static constexpr int x_bytes = groups * tile_bytes, w_bytes = tiles * tile_bytes, stage_bytes = x_bytes + w_bytes;
    static constexpr int stages = budget / stage_bytes < most_stages ? budget / stage_bytes : most_stages;
    static constexpr int bytes = stages * stage_bytes;
    static_assert(stages >= tiles, "outputs are staged where tokens were, 64 of them in each stage");
    static constexpr int row = columns + 8;  // floats of a row of sums: the four rows that half a warp writes meet no bank twice
    static_assert(groups * group_tokens * row * 4 <= bytes);
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

// The barriers of a block's stages, and the stages.
struct Ring {
    uint32_t there, used, base;
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

// Orders `steps` steps of both operands, from `first` on. One thread.
template <class B, int parts>
__device__ inline void order_operands(const Ring& ring, const Operands<parts>& operands, int part, int first_token, int first_output, int first,
                                      int steps) {
    auto order_w = [&](int step, int stage) {
        barrier_expect(ring.there + 8 * stage, operands.x_bytes + B::w_bytes);
#pragma unroll
        for (int i = 0; i < B::tiles; ++i) {
            copy_box(ring.base + stage * B::stage_bytes + B::x_bytes + i * tile_bytes, &operands.w[part], ring.there + 8 * stage,
                     (first_output + i * 64) * 2, (first + step) * step_rows, 0, 0);
        }
    };
    auto order_x = [&](int step, int stage) {
        copy_box(ring.base + stage * B::stage_bytes, &operands.x, ring.there + 8 * stage, (first + step) * step_bytes, first_token, 0, 0);
    };
    // Weights need not wait for the kernel before.
    int const ahead = min(steps, B::stages);
    for (int step = 0; step < ahead; ++step) order_w(step, step);
    wait_for_kernel_before();
    for (int step = 0; step < ahead; ++step) order_x(step, step);
    int stage = 0, turn = 0;
    for (int step = ahead; step < steps; ++step) {
        barrier_wait(ring.used + 8 * stage, turn & 1);
        order_w(step, stage);
        order_x(step, stage);
        if (++stage == B::stages) stage = 0, ++turn;
    }
}

// The sums of a group's 64 tokens.
template <class B>
__device__ inline void multiply(const Ring& ring, int group, int steps, float (&sums)[B::columns / 2]) {
    int const lane = threadIdx.x % warp_size;
#pragma unroll
    for (int i = 0; i < B::columns / 2; ++i) sums[i] = 0.0f;
    pin(sums);
    int stage = 0, turn = 0, before = 0;
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
        uint32_t const place = ring.base + stage * B::stage_bytes;
        uint32_t const x = tile_descriptor(place + group * tile_bytes), w = tile_descriptor(place + B::x_bytes);
        barrier_wait(ring.there + 8 * stage, turn & 1);
        product_fence();
        product_bf16_wide<0, tile_bytes>(sums, x, w);
        product_bf16_wide<1, tile_bytes>(sums, x, w);
        product_bf16_wide<2, tile_bytes>(sums, x, w);
        product_bf16_wide<3, tile_bytes>(sums, x, w);
        product_commit();
        product_wait<1>();
        barrier_arrive_if(ring.used + 8 * before, step > 0 && lane == 0);
        before = stage;
        if (++stage == B::stages) stage = 0, ++turn;
    }
    product_wait();
    pin(sums);
}

// ---- all columns in one block -----------------------------------------------------------------------------------------------

struct Unsplit {
    Operands<most_unsplit_parts> operands;
    CUtensorMap out[most_unsplit_parts];
    const float* squares;
    float mean, epsilon;
};

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)

// What a token's x is multiplied by. The four lanes of a row call together.
__device__ inline float inverse_root(const Unsplit& work, int token) {
    float sum = 0.0f;
    if (token < work.operands.tokens) {
        for (int i = threadIdx.x % 4; i < work.operands.steps; i += 4) sum += work.squares[static_cast<int64_t>(i) * work.operands.tokens + token];
    }
    sum += __shfl_xor_sync(~0u, sum, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    return rsqrtf(sum * work.mean + work.epsilon);
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
    int const block = static_cast<int>(blockIdx.y), part = operands.part_of(block);
    int const first_token = static_cast<int>(blockIdx.x) * B::groups * group_tokens;
    int const first_output = (block - operands.first_block[part]) * B::columns;
    int const warp = threadIdx.x / warp_size, lane = threadIdx.x % warp_size;
    if (warp == B::consumers / warp_size) {
        if (elect_lane()) order_operands<B>(ring, operands, part, first_token, first_output, 0, operands.steps);
        return;
    }

    int const group = warp / 4;
    float sums[B::columns / 2];
    multiply<B>(ring, group, operands.steps, sums);
    if (work.squares != nullptr) {
        wait_for_kernel_before();
        int const token = first_token + warp * 16 + lane / 4;
        float const factor[2] = {inverse_root(work, token), inverse_root(work, token + 8)};
#pragma unroll
        for (int i = 0; i < B::columns / 2; ++i) sums[i] *= factor[i / 2 % 2];
    }
    named_sync(1 + group, group_threads);  // all of its warps have used its tokens

    int const line = warp % 4 * 16 + lane % 16;
#pragma unroll
    for (int i = 0; i < B::tiles; ++i) {
        uint32_t const staged = ring.base + i * B::stage_bytes + group * tile_bytes;
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
    if (threadIdx.x % group_threads == 0 && token < operands.tokens) {
#pragma unroll
        for (int i = 0; i < B::tiles; ++i) {
            int const output = first_output + i * 64;
            if (output < operands.outputs[part]) {
                store_box(&work.out[part], ring.base + i * B::stage_bytes + group * tile_bytes, output * 2, token, 0, 0);
            }
        }
        store_commit();
        store_wait_read<0>();  // what else there is to wait for, who waits for the kernel does
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

// Two outputs of a token.
__device__ inline void store_two(const Split::Result& result, int64_t place, float2 value) {
    if (result.type == MLA_FLOAT) {
        *reinterpret_cast<float2*>(static_cast<float*>(result.out) + place) = value;
    } else {
        *reinterpret_cast<uint32_t*>(static_cast<__nv_bfloat16*>(result.out) + place) = pack(value.x, value.y);
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
        if (elect_lane()) order_operands<B>(ring, operands, part, first_token, first_output, first, steps);
        __syncwarp();
        cluster_barrier();
    } else {
        float sums[B::columns / 2];
        multiply<B>(ring, warp / 4, steps, sums);
        named_sync(1, B::consumers);  // all have used the operands
        float* const there = tile + (warp * 16 + lane / 4) * B::row + lane % 4 * 2;
#pragma unroll
        for (int i = 0; i < B::columns / 8; ++i) {
            *reinterpret_cast<float2*>(there + 8 * i) = make_float2(sums[4 * i], sums[4 * i + 1]);
            *reinterpret_cast<float2*>(there + 8 * B::row + 8 * i) = make_float2(sums[4 * i + 2], sums[4 * i + 3]);
        }
        cluster_barrier();
        Split::Result const& result = work.results[part];
        int const outputs = operands.outputs[part], rows = B::groups * group_tokens / blocks;
        for (int i = warp; i < rows; i += B::consumers / warp_size) {
            int const row = rank * rows + i, token = first_token + row;
            if (token >= operands.tokens) break;
            uint64_t parts[B::tiles][most_cluster];  // asked for before anything is waited for
#pragma unroll
            for (int j = 0; j < B::tiles; ++j) {
#pragma unroll
                for (int k = 0; k < most_cluster; ++k) {
                    if (k < blocks) parts[j][k] = load_from_block(reinterpret_cast<const uint64_t*>(tile + row * B::row + 64 * j + 2 * lane), k);
                }
            }
#pragma unroll
            for (int j = 0; j < B::tiles; ++j) {
                float2 sum = make_float2(0.0f, 0.0f);
#pragma unroll
                for (int k = 0; k < most_cluster; ++k) {
                    if (k >= blocks) break;
                    sum.x += __uint_as_float(static_cast<uint32_t>(parts[j][k]));
                    sum.y += __uint_as_float(static_cast<uint32_t>(parts[j][k] >> 32));
                }
                int const output = first_output + 64 * j + 2 * lane;
                if (result.squares != nullptr) {
                    float const squares = warp_sum(sum.x * sum.x + sum.y * sum.y);  // of outputs that there are not: zero
                    if (lane == 0 && output < outputs) result.squares[static_cast<int64_t>(output / 64) * operands.tokens + token] = squares;
                }
                if (output >= outputs) continue;
                if (result.factors != nullptr) {
                    float2 const factors = __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(result.factors + output));
                    sum.x *= factors.x, sum.y *= factors.y;
                }
                store_two(result, static_cast<int64_t>(token) * outputs + output, sum);
            }
        }
    }
    __syncwarp();
    cluster_barrier();  // a block's shared memory ends with it
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
int launch(void (*kernel)(Work), const Work& argument, const Linear& work, int cluster, const Device& device, cudaStream_t stream) {
    if (int status = check_cuda("product with weights",
                                cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                     cudaFuncAttributeMaxDynamicSharedMemorySize, B::bytes))) {
        return status;
    }
    // Blocks of the same outputs follow each other: they share the weights in the L2 cache.
    dim3 const grid(static_cast<unsigned>(ceil_div<int64_t>(work.tokens, B::groups * group_tokens) * cluster),
                    static_cast<unsigned>(blocks_of(work, B::columns)));
    return launch_clusters_early("product with weights", kernel, grid, cluster, B::threads, B::bytes, device, stream, argument);
}

template <int groups, int columns>
int launch_unsplit(const Linear& work, const Device& device, cudaStream_t stream) {
    using B = Block<groups, columns>;
    Unsplit argument{};
    if (int status = make_operands<B>(work, &argument.operands)) return status;
    for (int i = 0; i < work.count; ++i) {
        LinearPart const& part = work.parts[i];
        if (int status = make_map(&argument.out[i], part.out, part.outputs, work.tokens, group_tokens)) return status;
    }
    argument.squares = work.squares;
    argument.mean = 1.0f / static_cast<float>(work.columns);
    argument.epsilon = work.epsilon;
    return launch<B>(linear_hopper_kernel<B>, argument, work, 1, device, stream);
}

template <int groups>
int launch_unsplit(const Linear& work, int columns, const Device& device, cudaStream_t stream) {
    if (columns == 64) return launch_unsplit<groups, 64>(work, device, stream);
    if (columns == 128) return launch_unsplit<groups, 128>(work, device, stream);
    return columns == 192 ? launch_unsplit<groups, 192>(work, device, stream) : launch_unsplit<groups, 256>(work, device, stream);
}

template <int groups, int columns>
int launch_split(const Linear& work, int cluster, const Device& device, cudaStream_t stream) {
    using B = Block<groups, columns>;
    Split argument{};
    if (int status = make_operands<B>(work, &argument.operands)) return status;
    for (int i = 0; i < work.count; ++i) {
        LinearPart const& part = work.parts[i];
        argument.results[i] = {part.out, static_cast<const __nv_bfloat16*>(part.factors), part.squares, part.out_type};
    }
    return launch<B>(linear_split_kernel<B>, argument, work, cluster, device, stream);
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
        work.columns * 2 > most_size || work.tokens > most_size / (2 * most_cluster) || blocks_of(work, 64) > 65535) {
        return false;
    }
    return has_hopper_code() && std::all_of(work.parts, work.parts + work.count, takes);
}

int linear_hopper(const Linear& work, const Device& device, cudaStream_t stream) {
    if (work.count == 0) return MLA_OK;
    constexpr struct Shape {
        int groups, columns;
    } shapes[] = {{1, 256}, {1, 192}, {1, 128}, {1, 64}, {2, 256}, {2, 192}, {2, 128}, {2, 64}};
    Shape best{};
    int64_t least = 0;
    for (Shape const& shape : shapes) {
        if (shape.groups == 1 && work.tokens > group_tokens) continue;  // weights would be read for each of them
        // Rounds over the multiprocessors, each its products and about as much besides as those of 32 outputs take.
        int64_t const blocks = ceil_div<int64_t>(work.tokens, shape.groups * group_tokens) * blocks_of(work, shape.columns);
        int64_t const cost = ceil_div<int64_t>(blocks, device.multiprocessors) * shape.groups * (shape.columns + 32);
        if (best.groups == 0 || cost < least) best = shape, least = cost;
    }
    return best.groups == 1 ? launch_unsplit<1>(work, best.columns, device, stream) : launch_unsplit<2>(work, best.columns, device, stream);
}

int linear_hopper_split(const Linear& work, const Device& device, cudaStream_t stream) {
    if (work.count == 0) return MLA_OK;
    int const groups = work.tokens > group_tokens ? 2 : 1;
    int best_columns = 0, best_cluster = 0;
    int64_t least = 0;
    for (int columns : {64, 192}) {
        for (int cluster = 1; cluster <= std::min<int64_t>(most_cluster, steps_of(work)); cluster *= 2) {
            // The blocks of a cluster of more than two are so near each other that not all multiprocessors have one. A round is its blocks'
            // bytes, and about as much besides as six steps' are.
            int64_t const places = cluster <= 2 ? device.multiprocessors : std::max(device.multiprocessors * 15 / 16, cluster);
            int64_t const blocks = ceil_div<int64_t>(work.tokens, groups * group_tokens) * blocks_of(work, columns) * cluster;
            int64_t const cost =
                ceil_div(blocks, places) * (ceil_div<int64_t>(steps_of(work), cluster) + 6) * (groups * group_tokens + columns);
            if (best_columns == 0 || cost < least) best_columns = columns, best_cluster = cluster, least = cost;
        }
    }
    if (groups == 1) {
        return best_columns == 64 ? launch_split<1, 64>(work, best_cluster, device, stream)
                                  : launch_split<1, 192>(work, best_cluster, device, stream);
    }
    return best_columns == 64 ? launch_split<2, 64>(work, best_cluster, device, stream)
                              : launch_split<2, 192>(work, best_cluster, device, stream);
}

}  // namespace mla
