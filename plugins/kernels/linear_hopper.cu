// Products with weights on SM90, all columns in one block: rows and weights in bf16, sums in f32.
//
// With few tokens the memory bounds it: weights are read once, by as many blocks as there are multiprocessors, and ordered before the kernel
// before has ended. With many the products do: a block goes on from tile to tile, and the next one's operands are on their way while results
// leave.
#include "linear_hopper.cuh"
#include "projection_values.cuh"

namespace mla {
namespace {

using namespace linear_tiles;

struct Unsplit {
    Operands<most_unsplit_parts> operands;
    __nv_bfloat16* out[most_unsplit_parts];
    int token_tiles, tiles;
    const float* squares;
    float mean, epsilon;
};

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)

// What x of a token and of the one eight behind it is multiplied by. The four lanes of a row call together. All squares are asked for before
// any is waited for, up to 32 steps of them.
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

// The words of four lanes that follow each other, turned: of lane i each gets the word that has its own number among the four.
__device__ inline void turn_words(uint32_t (&words)[4]) {
#pragma unroll
    for (int bit = 1; bit < 4; bit *= 2) {
        bool const high = threadIdx.x & bit;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if (i & bit) continue;
            uint32_t const got = __shfl_xor_sync(~0u, high ? words[i] : words[i + bit], bit);
            (high ? words[i] : words[i + bit]) = got;
        }
    }
}

// A group's 64 tokens leave from the registers, 32 outputs of a token by its four lanes: so no thread waits for another, and the next tile's
// products begin at once.
template <class B>
__device__ inline void store_outputs(const Unsplit& work, const Tile& tile, const float (&sums)[B::columns / 2], const float (&factors)[2]) {
    int const outputs = work.operands.outputs[tile.part], token = tile.first_token + threadIdx.x / warp_size * 16 + threadIdx.x % warp_size / 4;
    int const output = tile.first_output + threadIdx.x % 4 * 8;
    __nv_bfloat16* const out = work.out[tile.part] + static_cast<int64_t>(token) * outputs + output;
#pragma unroll
    for (int first = 0; first < B::columns; first += 32) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            uint32_t words[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                float const* const pair = sums + first / 2 + 4 * i + 2 * r;
                words[i] = pack(pair[0] * factors[r], pair[1] * factors[r]);
            }
            turn_words(words);
            if (token + 8 * r >= work.operands.tokens || output + first >= outputs) continue;
            *reinterpret_cast<uint4*>(out + static_cast<int64_t>(8 * r) * outputs + first) = make_uint4(words[0], words[1], words[2], words[3]);
        }
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
        Turn<B> turn;
        for (int i = 0; i < tiles; ++i) {
            Tile const tile = tile_at(i);
            float sums[B::columns / 2], factors[2] = {1.0f, 1.0f};
            multiply<B>(ring, warp / 4, operands.steps, turn, sums, [&] {
                if (work.squares == nullptr) return;
                if (i == 0) wait_for_kernel_before();
                inverse_roots(work, tile.first_token + warp * 16 + lane / 4, factors);
            });
            store_outputs<B>(work, tile, sums, factors);
        }
    }
#endif
}

template <int groups, int columns>
int launch_unsplit(const Linear& work, const Shape& shape, const Device& device, cudaStream_t stream) {
    using B = Block<groups, columns>;
    Unsplit argument{};
    if (int status = make_operands<B>(work, &argument.operands)) return status;
    for (int i = 0; i < work.count; ++i) argument.out[i] = static_cast<__nv_bfloat16*>(work.parts[i].out);
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

bool aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

bool takes(const LinearPart& part) {
    bool const codes = part.weight_type == MLA_FLOAT8E4M3FN;
    return (codes || part.weight_type == MLA_BFLOAT16) && (part.factors == nullptr || part.factors_type == MLA_BFLOAT16) &&
           (part.out_type == MLA_BFLOAT16 || part.out_type == MLA_FLOAT) && part.outputs % (codes ? 16 : 8) == 0 &&
           part.outputs * 2 <= most_size && aligned(part.weight) && aligned(part.factors) && aligned(part.out);
}

}  // namespace

bool linear_takes_hopper(const Linear& work, const Device& device) {
    if (device.major != 9 || work.x_type != MLA_BFLOAT16 || work.columns == 0 || work.columns % 8 != 0 || !aligned(work.x) ||
        work.columns * 2 > most_size || work.tokens > most_size / (4 * most_cluster) || blocks_of(work, 64) > 65535 ||
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

}  // namespace mla
