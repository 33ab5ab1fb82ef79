// Products with W_UK and W_UV on SM90: x in bf16, w in bf16 or e4m3 with scales, sums in f32.
//
// A block has 64 or 128 tokens of one head and makes one or several tiles of 128 outputs, 128 columns at a time. A group of threads has
// 64 tokens and 64 outputs. Operands come by the copy engine, several steps ahead. Where x is quantised products are of the codes
// themselves: exact, and sums of 128 keep 14 bits (docs/kernels.md). Else codes of w become bf16 in registers, and products are made the other
// way round, of outputs as rows. What bounds it is the memory, and the codes of x: a block makes them once.
#include <algorithm>

#include "early.cuh"
#include "hopper.cuh"
#include "mma.cuh"
#include "projection.h"
#include "projection_values.cuh"
#include "tensor_map.h"

namespace mla {
namespace {

using namespace hopper;

constexpr int tile_rows = 128;  // outputs
[[maybe_unused]] constexpr int pieces = 2;  // of a step's columns: 128 bytes in bf16
[[maybe_unused]] constexpr int piece_bytes = tile_rows * 128;  // of w
constexpr int staged_bytes = 16 * 128;  // a warp's outputs
constexpr int most_stages = 4;
constexpr int64_t fewest_tokens = 17;  // projection.cu is faster for fewer (measured on an H100)
constexpr int64_t most_tokens = int64_t{65535} * 128;  // of a grid

template <int tokens, bool codes>
struct Tile {
    static constexpr int threads = tokens * 4;
    static constexpr int x_bytes = tokens * step_columns * 2;
    static constexpr int w_bytes = tile_rows * step_columns * (codes ? 1 : 2);
};

// How a block goes about it, and where things lie in shared memory: x_slots of x, stages of w, staged outputs, scales of the slots' tokens.
struct HopperPlan {
    int row_tiles;  // of a block, one after the other, with the same x
    int stages;
    int x_slots;  // as many as stages, or all steps where there are several row tiles
    int w, staged, scales, bytes;
};

template <int tokens, bool codes>
HopperPlan make_plan(int row_tiles, int stages, int steps) {
    using T = Tile<tokens, codes>;
    HopperPlan plan{};
    plan.row_tiles = row_tiles;
    plan.stages = stages;
    plan.x_slots = row_tiles > 1 ? steps : stages;
    plan.w = plan.x_slots * T::x_bytes;
    plan.staged = plan.w + stages * T::w_bytes;
    plan.scales = plan.staged + T::threads / warp_size * staged_bytes;
    plan.bytes = plan.scales + plan.x_slots * tokens * 4;
    return plan;
}

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)

// Byte of a 16-byte unit of a row in tiles of 64 columns, `tile_bytes` from one to the next.
__device__ int unit_at(int row, int unit, int tile_bytes) {
    return unit / 8 * tile_bytes + row * 128 + ((unit % 8 ^ (row & 7)) << 4);
}

// x of a step in place: its codes, where the first 64 of 128 columns were, and the scale of each token. A row's lanes have all read it
// before any writes.
template <int tokens>
__device__ void quantize_x(uint8_t* x, float* scales, int count) {
    constexpr int lines = tokens * 4 / unit_lanes;  // at a time
    int const unit = threadIdx.x % unit_lanes;
#pragma unroll 2
    for (int row = threadIdx.x / unit_lanes; row < round_up(count, lines); row += lines) {
        float values[8], scale;
        unpack(*reinterpret_cast<const uint4*>(x + unit_at(row, unit, tokens * 128)), MLA_BFLOAT16, values);
        uint2 const codes = encode_eight(values, &scale);
        *reinterpret_cast<uint2*>(x + unit_at(row, unit / 2, 0) + unit % 2 * 8) = codes;
        if (unit == 0) scales[row] = scale;
    }
}

// Codes of w as bf16, of 16 rows of a warp and 32 columns from `unit` (of 16 codes) on: fragments of A of two products. `line` is where
// the lane's first two codes are in `memory`. Two codes at a time, as products have them; a warp's lanes meet no bank twice.
__device__ void decode_w(const uint8_t* memory, int line, int unit, uint32_t (&a)[2][4]) {
#pragma unroll
    for (int k = 0; k < 2; ++k) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            uint32_t const two = *reinterpret_cast<const uint16_t*>(memory + (line ^ (unit + k) << 4) + i % 2 * 1024 + i / 2 * 8);
            a[k][i] = decode_pair(code_pair<codes_01>(two));
        }
    }
}

// A quarter of 128 columns: decoded, and its products ordered. `x`: the tile of its piece, in which it begins at `step`.
template <int step, bool clear = false>
__device__ void order_quarter(float (&products)[32], uint32_t (&a)[2][4], const uint8_t* memory, int line, int unit, uint32_t x) {
    decode_w(memory, line, unit, a);
    if (clear) pin(products);
    pin(a);
    product_fence();
    product_bf16<step, clear>(products, a[0], x);
    product_bf16<step + 1>(products, a[1], x);
    product_commit();
}

// 64 outputs of a group times 64 tokens over 128 columns: a quarter is decoded while the one before is multiplied. `x`: its first piece's tile.
template <int next_x>
__device__ void multiply_codes(float (&products)[32], const uint8_t* memory, int line, uint32_t x) {
    uint32_t a[2][4], b[2][4];
    order_quarter<0, true>(products, a, memory, line, 0, x);
    order_quarter<2>(products, b, memory, line, 2, x);
    product_wait<1>();
    order_quarter<0>(products, a, memory, line, 4, x + next_x);
    product_wait<1>();
    order_quarter<2>(products, b, memory, line, 6, x + next_x);
    product_wait();
    pin(products);
}

// Pairs of outputs as float16 or bf16.
__device__ void pack_outputs(const float (&sums)[32], int32_t type, uint32_t (&words)[16]) {
#pragma unroll
    for (int i = 0; i < 16; ++i) {
        __half2 const halves = __floats2half2_rn(sums[2 * i], sums[2 * i + 1]);
        words[i] = type == MLA_FLOAT16 ? reinterpret_cast<const uint32_t&>(halves) : pack(sums[2 * i], sums[2 * i + 1]);
    }
}

// 16 tokens x 64 outputs of a warp from `row` on. `token` is that of the warp's first.
__device__ void store_outputs(const Projection& work, const float (&sums)[32], uint8_t* staged, int head, int64_t token, int row) {
    int const lane = threadIdx.x % warp_size, g = lane / 4, t = lane % 4;
    int64_t const first = head * work.out.head_stride + row;
    if (work.out.type == MLA_FLOAT) {
        float* const out = static_cast<float*>(work.out.data) + first;
#pragma unroll
        for (int i = 0; i < 16; ++i) {
            int64_t const own = token + g + i % 2 * 8;
            int const column = i / 2 * 8 + 2 * t;
            if (own < work.tokens && row + column < work.rows) {
                *reinterpret_cast<float2*>(out + own * work.out.token_stride + column) = make_float2(sums[2 * i], sums[2 * i + 1]);
            }
        }
        return;
    }
    uint32_t words[16];
    pack_outputs(sums, work.out.type, words);
    __syncwarp();  // what was staged before has been read
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        // lanes 0 to 15 name the rows of the first eight outputs, the others those of the next eight
        store_matrices(shared_address(staged + unit_at(lane % 16, 2 * i + lane / 16, 0)), words + 4 * i);
    }
    __syncwarp();
    uint16_t* const out = static_cast<uint16_t*>(work.out.data) + first;
    int const unit = lane % 8;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
        int const line = 4 * k + lane / 8;
        if (token + line < work.tokens && row + unit * 8 < work.rows) {
            *reinterpret_cast<uint4*>(out + (token + line) * work.out.token_stride + unit * 8) =
                *reinterpret_cast<const uint4*>(staged + unit_at(line, unit, 0));
        }
    }
}

// 64 tokens x 16 outputs of a warp from `row` on, of products of outputs as rows.
__device__ void store_turned(const Projection& work, const float (&sums)[32], uint8_t* staged, int head, int64_t token, int row) {
    int const lane = threadIdx.x % warp_size, g = lane / 4, t = lane % 4;
    int64_t const first = head * work.out.head_stride + row;
    if (work.out.type == MLA_FLOAT) {
        float* const out = static_cast<float*>(work.out.data) + first;
#pragma unroll
        for (int i = 0; i < 32; ++i) {
            int64_t const own = token + i / 4 * 8 + 2 * t + i % 2;
            int const column = g + i % 4 / 2 * 8;
            if (own < work.tokens && row + column < work.rows) out[own * work.out.token_stride + column] = sums[i];
        }
        return;
    }
    uint32_t words[16];
    pack_outputs(sums, work.out.type, words);
    __syncwarp();  // what was staged before has been read
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        // eight lanes name the rows of eight tokens: of the first eight outputs, the others, and the same of the next tokens
        int const line = 16 * i + lane / 16 * 8 + lane % 8;
        store_matrices_transposed(shared_address(staged + line * 32 + lane / 8 % 2 * 16), words + 4 * i);
    }
    __syncwarp();
    uint16_t* const out = static_cast<uint16_t*>(work.out.data) + first;
    int const half = lane % 2;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
        int const line = 16 * k + lane / 2;
        if (token + line < work.tokens && row + half * 8 < work.rows) {
            *reinterpret_cast<uint4*>(out + (token + line) * work.out.token_stride + half * 8) =
                *reinterpret_cast<const uint4*>(staged + line * 32 + half * 16);
        }
    }
}

// Steps 1 to 7 of 128 columns, which lie in two pieces.
template <int next_a, int next_b>
__device__ inline void multiply_rest(float (&sums)[32], uint32_t a, uint32_t b) {
    product_bf16<1>(sums, a, b);
    product_bf16<2>(sums, a, b);
    product_bf16<3>(sums, a, b);
    product_bf16<0>(sums, a + next_a, b + next_b);
    product_bf16<1>(sums, a + next_a, b + next_b);
    product_bf16<2>(sums, a + next_a, b + next_b);
    product_bf16<3>(sums, a + next_a, b + next_b);
}

#endif

template <int tokens, bool codes, bool quantize>
__global__ void __launch_bounds__(Tile<tokens, codes>::threads, 1)
    project_hopper_kernel(const __grid_constant__ CUtensorMap x_map, const __grid_constant__ CUtensorMap w_map, Projection work,
                          HopperPlan plan) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    if (work.order != KernelOrder::leading) let_next_kernel_begin();
    extern __shared__ __align__(1024) uint8_t memory[];
    __shared__ uint64_t barriers[most_stages];  // a stage's operands are there
    int const head = blockIdx.z;
    int64_t const first_token = static_cast<int64_t>(blockIdx.y) * tokens;
    int const first_row = blockIdx.x * plan.row_tiles * tile_rows;
    int const steps = ceil_div(work.columns, step_columns);
    int const items = min(plan.row_tiles, ceil_div(work.rows - first_row, tile_rows)) * steps;
    bool const keeps_x = plan.row_tiles > 1;
    using T = Tile<tokens, codes>;
    uint32_t const full = shared_address(barriers);
    auto x_slot = [&](int item) { return keeps_x ? item % steps : item % plan.stages; };
    auto brings_x = [&](int item) { return !keeps_x || item < steps; };
    // Both by a warp; the weights first.
    auto order_w = [&](int item) {
        if (item >= items || !elect_lane()) return;
        int const stage = item % plan.stages, column = item % steps * step_columns;
        uint32_t const w = shared_address(memory + plan.w) + stage * T::w_bytes;
        barrier_expect(full + 8 * stage, T::w_bytes + (brings_x(item) ? T::x_bytes : 0));
#pragma unroll
        for (int i = 0; i < (codes ? 1 : pieces); ++i) {
            copy_box(w + i * piece_bytes, &w_map, full + 8 * stage, codes ? column : column * 2 + i * 128,
                     first_row + item / steps * tile_rows, head, 0);
        }
    };
    auto order_x = [&](int item) {
        if (item >= items || !brings_x(item) || !elect_lane()) return;
        uint32_t const x = shared_address(memory) + x_slot(item) * T::x_bytes;
#pragma unroll
        for (int i = 0; i < pieces; ++i) {
            copy_box(x + i * tokens * 128, &x_map, full + 8 * (item % plan.stages), item % steps * step_columns * 2 + i * 128, head,
                     static_cast<int>(first_token), 0);
        }
    };
    // Scales of 32 items, a lane an item: in time, as they are far away where nobody has asked for them.
    auto look_up = [&](int item) {
        if (work.w_scale == nullptr || item >= items) return 1.0f;
        int64_t const scale_rows = ceil_div(work.rows, scale_group);
        return work.w_scale[(head * scale_rows + (first_row + item / steps * tile_rows) / scale_group) * steps + item % steps];
    };
    float w_scales = 1.0f;
    if (codes) w_scales = look_up(threadIdx.x % warp_size);
    if (threadIdx.x < warp_size) {
        if (elect_lane()) {
            for (int i = 0; i < plan.stages; ++i) barrier_init(full + 8 * i, 1);
            fence_barrier_init();
        }
        __syncwarp();
        // Weights need not wait for the kernel before; but what is ordered comes in turn, and the first x must not come last.
        order_w(0);
        if (work.order != KernelOrder::beside) wait_for_kernel_before();
        if (work.order == KernelOrder::leading) let_next_kernel_begin();
        order_x(0);
        for (int i = 1; i < plan.stages; ++i) {
            order_w(i);
            order_x(i);
        }
    }
    __syncthreads();

    int const warp = threadIdx.x / warp_size, lane = threadIdx.x % warp_size;
    int const token_half = warp / 8, row_half = warp / 4 % 2, token_line = token_half * 64 + warp % 4 * 16;
    auto const count = static_cast<int>(min(work.tokens - first_token, static_cast<int64_t>(tokens)));
    float sums[32];
#pragma unroll
    for (int i = 0; i < 32; ++i) sums[i] = 0.0f;
#pragma unroll 1
    for (int item = 0; item < items; ++item) {
        int const stage = item % plan.stages, step = item % steps, row = first_row + item / steps * tile_rows;
        uint8_t* const x = memory + x_slot(item) * T::x_bytes;
        auto* const x_scales = reinterpret_cast<float*>(memory + plan.scales) + x_slot(item) * tokens;
        float w_scale = 1.0f;
        if (codes) {
            w_scale = __shfl_sync(0xffffffffu, w_scales, item % warp_size);
            if (item % warp_size == warp_size - 1) w_scales = look_up(item + 1 + lane);
        }
        barrier_wait(full + 8 * stage, item / plan.stages & 1);
        if (quantize && (!keeps_x || item < steps)) quantize_x<tokens>(x, x_scales, count);
        const uint8_t* const w = memory + plan.w + stage * T::w_bytes;
        // Where nothing is made here and no place is used again, groups need not go along with each other: one stores, others multiply.
        int const next = item - 1 + plan.stages;
        bool const replaces = item > 0 && next < items;
        if (quantize) fence_async();
        if (quantize || replaces) __syncthreads();  // and all have used what the item before had
        if (threadIdx.x < warp_size && replaces) {
            order_w(next);
            order_x(next);
        }

        uint32_t const a = tile_descriptor(shared_address(x) + token_half * 64 * 128);
        uint32_t const b = tile_descriptor(shared_address(w) + row_half * 64 * 128);
        constexpr int next_a = tokens * 128 >> 4, next_b = piece_bytes >> 4;
        if constexpr (quantize) {
            float products[32];
            pin(products);
            product_fence();
            product_e4m3<0, true>(products, a, b);
            product_e4m3<1, false>(products, a, b);
            product_e4m3<2, false>(products, a, b);
            product_e4m3<3, false>(products, a, b);
            product_commit();
            product_wait();
            pin(products);
            float factor[2] = {w_scale, w_scale};
#pragma unroll
            for (int r = 0; r < 2; ++r) factor[r] *= x_scales[token_line + lane / 4 + 8 * r];
#pragma unroll
            for (int i = 0; i < 32; ++i) sums[i] = fmaf(factor[i / 2 % 2], products[i], sums[i]);
        } else if constexpr (codes) {
            float products[32];
            int const line = plan.w + stage * T::w_bytes + (row_half * 64 + warp % 4 * 16 + lane / 4) * 128 + (lane / 4 << 4) + lane % 4 * 2;
            multiply_codes<next_a>(products, memory, line, a);
#pragma unroll
            for (int i = 0; i < 32; ++i) sums[i] = fmaf(w_scale, products[i], sums[i]);
        } else {  // no scales; and so few registers that the append's blocks find room beside
            pin(sums);
            product_fence();
            product_bf16<0>(sums, a, b);
            multiply_rest<next_a, next_b>(sums, a, b);
            product_commit();
            product_wait();
            pin(sums);
        }
        if (step + 1 < steps) continue;
        uint8_t* const staged = memory + plan.staged + warp * staged_bytes;
        if constexpr (codes && !quantize) {
            store_turned(work, sums, staged, head, first_token + token_half * 64, row + row_half * 64 + warp % 4 * 16);
        } else {
            store_outputs(work, sums, staged, head, first_token + token_line, row + row_half * 64);
        }
#pragma unroll
        for (int i = 0; i < 32; ++i) sums[i] = 0.0f;
    }
    if (work.order == KernelOrder::beside) end_after_kernel_before();
#endif
}

template <int tokens, bool codes, bool quantize>
int launch(const Projection& work, const Device& device, cudaStream_t stream) {
    int const steps = ceil_div(work.columns, step_columns), row_tiles = ceil_div(work.rows, tile_rows);
    int64_t const token_tiles = ceil_div<int64_t>(work.tokens, tokens);
    // One block for each multiprocessor, if there is work enough; of several row tiles where all of x fits.
    auto plan_of = [&](int of_rows, int stages) { return make_plan<tokens, codes>(of_rows, stages, steps); };
    int const budget = device.shared_bytes - 1024;
    int64_t const wanted = ceil_div<int64_t>(row_tiles * token_tiles * work.heads, device.multiprocessors);
    auto tiles = static_cast<int>(std::clamp<int64_t>(wanted, 1, row_tiles));
    if (plan_of(tiles, 2).bytes > budget) tiles = 1;
    int stages = std::min(most_stages, steps * tiles);
    while (stages > 1 && plan_of(tiles, stages).bytes > budget) --stages;
    HopperPlan const plan = plan_of(tiles, stages);

    CUtensorMap x_map, w_map;
    if (int status = make_tensor_map(&x_map, work.x.data, {work.columns * 2, work.heads, work.tokens, 1},
                                     {work.x.head_stride * 2, work.x.token_stride * 2, work.tokens * work.x.token_stride * 2},
                                     {128, 1, tokens, 1})) {
        return status;
    }
    int64_t const row_bytes = work.columns * element_bytes(work.w_type);
    if (int status = make_tensor_map(&w_map, work.w, {row_bytes, work.rows, work.heads, 1},
                                     {row_bytes, work.rows * row_bytes, work.heads * work.rows * row_bytes},
                                     {128, tile_rows, 1, 1})) {
        return status;
    }
    auto* const kernel = project_hopper_kernel<tokens, codes, quantize>;
    if (int status = check_cuda("product with W_UK or W_UV",
                                cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                     cudaFuncAttributeMaxDynamicSharedMemorySize, plan.bytes))) {
        return status;
    }
    dim3 const grid(ceil_div(row_tiles, plan.row_tiles), static_cast<unsigned>(token_tiles), work.heads);
    return launch_early("product with W_UK or W_UV", kernel, grid, Tile<tokens, codes>::threads, plan.bytes, device, stream, x_map, w_map,
                        work, plan);
}

template <int tokens>
int launch(const Projection& work, const Device& device, cudaStream_t stream) {
    if (work.w_type == MLA_BFLOAT16) return launch<tokens, false, false>(work, device, stream);
    return work.quantize_x ? launch<tokens, true, true>(work, device, stream) : launch<tokens, true, false>(work, device, stream);
}

}  // namespace

bool project_takes_hopper(const Projection& work, const Device& device) {
    bool const codes = work.w_type == MLA_FLOAT8E4M3FN;
    if (device.major != 9 || work.exact || work.x.type != MLA_BFLOAT16 || (work.w_type != MLA_BFLOAT16 && !codes) ||
        (work.quantize_x && !codes) || work.x_tokens != nullptr || work.out_tokens != nullptr || work.columns % (codes ? 16 : 8) != 0 ||
        work.rows % 8 != 0 || reinterpret_cast<uintptr_t>(work.w) % 16 != 0 || work.tokens < fewest_tokens ||
        work.tokens > most_tokens ||
        !aligned_for_eight(work.x.data, work.x.token_stride, work.x.head_stride, work.x.type) ||
        !aligned_for_eight(work.out.data, work.out.token_stride, work.out.head_stride, work.out.type)) {
        return false;
    }
    return has_hopper_code();
}

int project_hopper(const Projection& work, const Device& device, cudaStream_t stream) {
    return work.tokens <= 64 ? launch<64>(work, device, stream) : launch<128>(work, device, stream);
}

}  // namespace mla
