// Products with e4m3 weights on SM90, rows in bf16, sums in f32: half of the bytes that bf16 has, for the memory bounds products of few tokens.
//
// The weight is the product's A: `ldmatrix` with transposition gives a lane codes of two outputs, 2 g and 2 g + 1, of the columns 2 t and
// 2 t + 1, which are rows g and g + 8 of a fragment; so outputs are rows, tokens columns of the sums, and codes go from shared memory to
// registers once, where they become bf16; of up to 16 tokens they stay codes, and rows become codes, too (linear_codes_few.cuh). A block has 64
// outputs for each of three or four groups, of up to 128 tokens; up to eight blocks, a cluster, share the columns.
//
// Scales multiply the sums of a step, where there are registers for these: of up to 64 tokens. Else they multiply the weights, which are what
// bf16 holds of code times scale. Of many tokens each tile would do so again: weights are decoded to memory first (`decode_weights`), and the
// products are those of bf16.
#include "linear_codes_few.cuh"

namespace mla {
namespace {

using namespace linear_tiles;

constexpr int decoding_threads = 256;
constexpr int conversions = 200;  // about how many cycles those of a step and a group take

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)

// Adds a step's products to the sums; `clear`: they are zero before. `own_codes`: where the lane's first ones are. Behind a step's rows codes may
// be anything: it becomes numbers, which are multiplied by zeros.
template <class B, bool clear, class Decode>
__device__ inline void multiply_step(float (&sums)[B::tokens / 2], uint32_t own_codes, uint32_t x_tiles, uint32_t used_before, Decode decode) {
    // Those of the chunk before are in use while the next ones are made. Where registers are scarce there is no second set, and other groups'
    // products are under way meanwhile.
    constexpr int sets = B::tiles == 4 && B::tokens > 64 ? 1 : 2;
    uint32_t a[sets][2][4];
    uint32_t const first_x = tile_descriptor(x_tiles);
#pragma unroll
    for (int c = 0; c < chunks; ++c) {
        uint32_t codes[4];
        load_codes(codes, own_codes, c);
        product_wait<sets - 1>();
        auto& fragments = a[c % sets];
        make_fragments(fragments, codes, decode);
        pin(fragments);
        product_fence();
        uint32_t const x = first_x + c / 2 * (B::x_tile >> 4);
        if (c == 0) {
            product_bf16<0, clear>(sums, fragments[0], x);
            product_bf16<1>(sums, fragments[1], x);
        } else if (c % 2 == 0) {
            product_bf16<0>(sums, fragments[0], x);
            product_bf16<1>(sums, fragments[1], x);
        } else {
            product_bf16<2>(sums, fragments[0], x);
            product_bf16<3>(sums, fragments[1], x);
        }
        product_commit();
        if (c == 1) barrier_arrive_if(used_before, used_before != 0 && threadIdx.x % warp_size == 0);  // the step's before have ended
    }
}

// The sums of a group's 64 outputs: sums[4 j] and [4 j + 2] of a lane are outputs 2 g and 2 g + 1 of its warp's 16, token 8 j + 2 t; the
// ones behind them are of the next token. `scales`: the weight's of step `first`, where the block begins; `stride` further is the next one's,
// which is read a step ahead.
template <class B>
__device__ inline void multiply_codes(const Ring& ring, const CodeOperands& operands, int first, int steps, float (&sums)[B::tokens / 2],
                                      const float* scales, int stride) {
    // There are registers for a step's own sums of up to 64 tokens.
    constexpr bool scales_sums = B::tokens <= 64;
#pragma unroll
    for (int i = 0; i < B::tokens / 2; ++i) sums[i] = 0.0f;
    if constexpr (!scales_sums) pin(sums);
    // The last step may have fewer rows, and then others lie elsewhere.
    int const last_step = operands.steps - 1 - first;
    uint32_t const own = own_place<B>(tile_rows), own_last = own_place<B>(operands.rows_of(operands.steps - 1));
    Turn<B> turn;
    uint32_t used_before = 0;
    float next_scale = *scales;
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
        float const scale = next_scale;
        scales += stride;
        if (step + 1 < steps) next_scale = *scales;
        uint32_t const place = ring.base + turn.stage * B::stage_bytes;
        uint32_t const own_codes = place + (step == last_step ? own_last : own);
        barrier_wait(ring.there + 8 * turn.stage, turn.turn & 1);
        if constexpr (scales_sums) {
            float part[B::tokens / 2];
            multiply_step<B, true>(part, own_codes, place, used_before, decode_pair);
            product_wait();
            pin(part);
#pragma unroll
            for (int i = 0; i < B::tokens / 2; ++i) sums[i] = fmaf(scale, part[i], sums[i]);
        } else {
            Scale const terms(scale);
            multiply_step<B, false>(sums, own_codes, place, used_before, [&](uint32_t pair) { return terms.times(pair); });
        }
        used_before = ring.used + 8 * turn.stage;
        turn.advance();
    }
    if constexpr (!scales_sums) {
        product_wait();
        pin(sums);
    }
}

// What a token's sums are multiplied by, a token by a thread: neighbours read what lies side by side.
__device__ inline float inverse_root(const Codes& work, int token) {
    int const tokens = work.operands.tokens;
    if (work.squares == nullptr || token >= tokens) return 1.0f;
    float sum = 0.0f;
#pragma unroll 8
    for (int step = 0; step < work.square_steps; ++step) sum += work.squares[static_cast<int64_t>(step) * tokens + token];
    return rsqrtf(sum * work.mean + work.epsilon);
}

// Sixteen codes by a thread, of one row and one scale, at a time; four that follow each other have rows of one tile, and others the tiles beside it.
__global__ void __launch_bounds__(decoding_threads) decode_kernel(LinearPart part, int64_t columns, __nv_bfloat16* decoded) {
    constexpr int rows = 4;
    int64_t const tiles = part.outputs / tile_columns, blocks = ceil_div<int64_t>(part.outputs, scale_block);
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * decoding_threads + threadIdx.x; i < columns * tiles;
         i += static_cast<int64_t>(gridDim.x) * decoding_threads) {
        int64_t const across = i / rows / tiles, column = rows * across + i % rows, output = (i / rows - across * tiles) * tile_columns;
        Scale const scale(part.scales[column / scale_block * blocks + output / scale_block]);
        uint4 const codes = static_cast<const uint4*>(part.weight)[code_place(column, output, columns, part.outputs) / tile_columns];
        uint32_t const words[4] = {codes.x, codes.y, codes.z, codes.w};
        uint32_t pairs[8];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            pairs[2 * j] = scale.times(code_pair<codes_01>(words[j]));
            pairs[2 * j + 1] = scale.times(code_pair<codes_23>(words[j]));
        }
        auto* const out = reinterpret_cast<uint4*>(decoded + column * part.outputs + output);
        out[0] = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
        out[1] = make_uint4(pairs[4], pairs[5], pairs[6], pairs[7]);
    }
}

#else

__global__ void decode_kernel(LinearPart, int64_t, __nv_bfloat16*) {}

#endif

template <class B>
__global__ void __launch_bounds__(B::threads, 1) linear_codes_kernel(const __grid_constant__ Codes work) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    if (work.operands.order != KernelOrder::leading) let_next_kernel_begin();
    extern __shared__ __align__(1024) uint8_t memory[];
    __shared__ uint64_t full[2 * B::stages], empty[B::stages];  // in the second half those of rows as they come
    __shared__ float factors[B::tokens];
    Ring const ring = make_ring<B>(full, empty, memory);
    auto const& operands = work.operands;
    int const rank = cluster_rank(), blocks = cluster_size();
    int const block = static_cast<int>(blockIdx.y), part = operands.part_of(block), outputs = operands.outputs[part];
    int const first_token = static_cast<int>(blockIdx.x) / blocks * B::tokens;
    int const first_output = (block - operands.first_block[part]) * B::columns;
    int const first = operands.steps * rank / blocks, steps = operands.steps * (rank + 1) / blocks - first;
    int const warp = threadIdx.x / warp_size, lane = threadIdx.x % warp_size;
    float* const tile = reinterpret_cast<float*>(memory);  // [tokens][B::row], where the operands were
    if (warp >= B::consumers / warp_size) {
        registers_decrease<B::other_registers>();
        int const other = warp - B::consumers / warp_size;
        if (other == 0 && elect_lane()) order_operands<B>(ring, operands, 1, steps, [&](int) { return Tile{part, first_token, first_output, first}; });
        if constexpr (B::few) {
            if (other > 0) make_rows<B>(ring, work, steps, memory);
        }
        __syncwarp();
        cluster_barrier();
    } else {
        registers_increase<B::product_registers>();
        if (work.squares != nullptr) wait_for_kernel_before();
        if (threadIdx.x < B::tokens) factors[threadIdx.x] = inverse_root(work, first_token + static_cast<int>(threadIdx.x));
        int const blocks_of_outputs = ceil_div(outputs, scale_block);
        int const own = min((first_output + warp / 4 * 64) / scale_block, blocks_of_outputs - 1);
        float sums[B::tokens / 2];
        const float* const scales = work.scales[part] + static_cast<int64_t>(first) * blocks_of_outputs + own;
        if constexpr (B::few) {
            multiply_few<B>(ring, operands, memory, first, steps, sums, scales, blocks_of_outputs);
        } else {
            multiply_codes<B>(ring, operands, first, steps, sums, scales, blocks_of_outputs);
        }
        named_sync(1, B::consumers);  // all have used the operands, and the factors are there
        float* const there = tile + lane % 4 * 2 * B::row + warp * 16 + lane / 4 * 2;
#pragma unroll
        for (int i = 0; i < B::tokens / 8; ++i) {
            *reinterpret_cast<float2*>(there + 8 * i * B::row) = make_float2(sums[4 * i], sums[4 * i + 2]);
            *reinterpret_cast<float2*>(there + (8 * i + 1) * B::row) = make_float2(sums[4 * i + 1], sums[4 * i + 3]);
        }
        cluster_barrier();
        sum_parts<B>(work.results[part], operands.tokens, outputs, first_token, first_output, tile,
                     [&](int token) { return factors[token - first_token]; });
    }
    __syncwarp();
    cluster_arrive();
    cluster_wait();  // a block's shared memory ends with it
#endif
}

template <class B>
int make_operands(const Linear& work, Codes* codes) {
    auto& operands = codes->operands;
    operands.count = work.count;
    operands.tokens = static_cast<int>(work.tokens);
    operands.weights_made = work.weights_made;
    operands.order = work.order;
    operands.columns = static_cast<int>(work.columns);
    operands.steps = static_cast<int>(ceil_div<int64_t>(work.columns, scale_block));
    int64_t blocks = 0;
    for (int i = 0; i < work.count; ++i) {
        LinearPart const& part = work.parts[i];
        operands.first_block[i] = static_cast<int>(blocks);
        operands.outputs[i] = static_cast<int>(part.outputs);
        blocks += ceil_div<int64_t>(part.outputs, B::columns);
        codes->results[i] = result_of(part);
        codes->scales[i] = part.scales;
        operands.w[i] = static_cast<const uint8_t*>(part.weight);
    }
    int const rows = static_cast<int>(std::min<int64_t>(B::tokens, round_up<int64_t>(work.tokens, 8)));
    operands.x_bytes = 2 * rows * step_bytes;
    return make_map(&operands.x, work.x, work.columns, work.tokens, rows);
}

// As `Shape::cost`: of a block's groups and a cluster's blocks.
template <class B>
int64_t cost(const Linear& work, int cluster, const Device& device) {
    int64_t const tiles = ceil_div<int64_t>(work.tokens, B::tokens) * blocks_of(work, B::columns);
    int64_t const steps = ceil_div<int64_t>(ceil_div<int64_t>(work.columns, scale_block), cluster);
    int const places = std::max(1, (cluster <= 2 ? device.multiprocessors : device.multiprocessors * 15 / 16) / cluster);
    int64_t const step = std::max({4 * B::tiles * B::tokens, B::tiles * conversions, B::stage_bytes / 36});
    int64_t const results = 2000 + B::tokens * B::tiles * (5 + 64 * (cluster - 1) / cluster) / 4;
    return ceil_div<int64_t>(tiles, places) * (steps * step + results);
}

template <class B>
int launch_codes(const Linear& work, int cluster, const Device& device, cudaStream_t stream) {
    Codes argument{};
    if (int status = make_operands<B>(work, &argument)) return status;
    argument.squares = work.squares;
    argument.square_steps = static_cast<int>(square_tiles(work.columns));
    argument.mean = 1.0f / static_cast<float>(work.columns);
    argument.epsilon = work.epsilon;
    // Blocks of the same outputs follow each other: they share the weights in the L2 cache.
    dim3 const grid(static_cast<unsigned>(ceil_div<int64_t>(work.tokens, B::tokens) * cluster), static_cast<unsigned>(blocks_of(work, B::columns)));
    return launch<B>(linear_codes_kernel<B>, argument, grid, cluster, device, stream);
}

template <int tokens>
int launch_codes(const Linear& work, const Device& device, cudaStream_t stream) {
    using Narrow = CodesBlock<tokens, 3>;
    using Wide = CodesBlock<tokens, 4>;
    int64_t const steps = ceil_div<int64_t>(work.columns, scale_block);
    bool wide = true;
    int best = 1;
    int64_t least = -1;
    for (int cluster = 1; cluster <= std::min<int64_t>({most_cluster, device.multiprocessors, steps}); cluster *= 2) {
        for (bool const four : {true, false}) {
            int64_t const own = four ? cost<Wide>(work, cluster, device) : cost<Narrow>(work, cluster, device);
            if (least < 0 || own < least) wide = four, best = cluster, least = own;
        }
    }
    return wide ? launch_codes<Wide>(work, best, device, stream) : launch_codes<Narrow>(work, best, device, stream);
}

}  // namespace

int decode_weights(const Linear& work, __nv_bfloat16* memory, Linear* decoded, cudaStream_t stream) {
    *decoded = work;
    decoded->weights_made = true;
    for (int i = 0; i < work.count; ++i) {
        LinearPart& part = decoded->parts[i];
        if (part.weight_type != MLA_FLOAT8E4M3FN) continue;
        int64_t const count = work.columns * part.outputs, blocks = ceil_div<int64_t>(count / 16, decoding_threads);
        decode_kernel<<<static_cast<unsigned>(std::min<int64_t>(blocks, 1 << 14)), decoding_threads, 0, stream>>>(part, work.columns, memory);
        if (int status = check_launch("decoding of weights")) return status;
        part.weight = memory;
        part.weight_type = MLA_BFLOAT16;
        part.scales = nullptr;
        memory += count;
    }
    return MLA_OK;
}

int linear_hopper_codes(const Linear& work, const Device& device, cudaStream_t stream) {
    if (work.count == 0) return MLA_OK;
    if (work.tokens <= 8) return launch_codes<8>(work, device, stream);
    if (work.tokens <= 16) return launch_codes<16>(work, device, stream);
    return work.tokens <= 64 ? launch_codes<64>(work, device, stream) : launch_codes<128>(work, device, stream);
}

}  // namespace mla
