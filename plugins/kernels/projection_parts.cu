// W_UV's product of few tokens on SM90, of an attention whose parts nobody has merged: each block merges those of its head, and multiplies the
// means with its share of the head's weights (bf16 or e4m3), which come by the copy engine meanwhile.
//
// Such a step is as long as what its short kernels wait for, one behind the other, and their instructions come from memory too. So there is
// little code: most loops are not unrolled, and what only a plan needs is not in the variant for what the host has cut.
#include <algorithm>

#include "attend_items.cuh"
#include "early.cuh"
#include "hopper.cuh"
#include "mma.cuh"
#include "projection.h"
#include "projection_values.cuh"
#include "tensor_map.h"

namespace mla {
namespace {

using namespace hopper;

constexpr int threads = 512;
constexpr int most_tokens = 8;
constexpr int columns = threads;  // R
constexpr int tile_rows = 16, most_rows = 128;  // of a product of a warp, and of a block
constexpr int line_bytes = 128;  // of a row, in a piece of the weights that has a barrier

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)

constexpr int warps = threads / warp_size;
constexpr int groups = columns / scale_group;  // of columns, which have a scale each
constexpr int most_pieces = columns * 2 / line_bytes;
constexpr int slices = 4;  // of columns; a warp merges four of one in each lane
constexpr int takers = warps / slices;  // that share tokens, or one's parts
constexpr int x_row = columns + 8;  // values: where eight rows are read at once no bank is met twice
constexpr int batch = 9;  // parts whose values are in flight

// Where a row's parts are.
struct Place {
    Merge merge;
    int32_t row;  // of each slot
    bool there;  // else the token belongs to no sequence
};

// Of what a plan has cut, by a warp. A row of no parts is among attention's outputs.
__device__ Place find_planned(const Attend& attend, const Partials& partials, int token, int head) {
    Place place{{}, 0, true};
    int32_t const count = partials.plan.counts->merges, index = token * attend.heads + head;
    auto row_in = [&](int32_t first_token, int32_t first_head) { return index - first_token * attend.heads - first_head; };
#pragma unroll 1
    for (int32_t first = 0; first < count; first += warp_size) {
        int32_t const own = first + static_cast<int32_t>(threadIdx.x) % warp_size;
        bool found = false;
        if (own < count) {
            Merge const& merge = partials.plan.merges[own];
            int32_t const row = row_in(static_cast<int32_t>(merge.first_token), merge.first_head);
            found = row >= 0 && row < merge.rows;
        }
        uint32_t const all = __ballot_sync(0xffffffffu, found);
        if (all == 0) continue;
        place.merge = partials.plan.merges[first + __ffs(static_cast<int>(all)) - 1];
        place.row = row_in(static_cast<int32_t>(place.merge.first_token), place.merge.first_head);
        break;
    }
    return place;
}

// Of what the host has cut.
__device__ Place find_parts(const Attend& attend, const Partials& partials, int token, int head) {
    Place place{};
    int32_t index = head;  // of the row among those of all items
    if (partials.by_token) {
        index += token * partials.items_of(attend.heads) * partials.item_rows;
        place.there = attend.step.sequence_of(token) >= 0;
    } else {
        int32_t const own = token - attend.step.query_offsets[0];
        place.there = own >= 0 && own < new_tokens_of(attend, 0);
        index += (place.there ? own : 0) * attend.heads;
    }
    int32_t const item = partials.item_of(index);
    place.merge.slot = item * partials.splits;
    place.merge.count = partials.splits;
    place.row = index - item * partials.item_rows;
    return place;
}

// What a warp has of a token's mean of a head, of four columns a lane: of the parts from `first` on, `stride` apart. In all it does as
// decoding.cu's merge does. `meanwhile` is done when the first parts have been asked for.
template <int type, bool planned, typename Meanwhile>
__device__ float4 merge(const Attend& attend, const Partials& partials, const Place& place, int head, int column, int first, int stride,
                        Meanwhile&& meanwhile) {
    int const lane = threadIdx.x % warp_size, parts = planned ? place.merge.parts() : place.merge.count;
    int const narrow_column = type == MLA_FLOAT16 ? partials.narrow_column(column) : column;
    int32_t rows[2] = {};  // of two parts a lane
    float lse[2] = {-INFINITY, -INFINITY};
    bool narrow = true;
    auto slot_at = [&](int part) { return planned ? place.merge.slot_of(part) : place.merge.slot + part; };
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        int const part = lane + i * warp_size;
        if (part >= parts) continue;
        int32_t const slot = slot_at(part);
        rows[i] = slot * partials.rows + place.row;
        lse[i] = partials.lse[rows[i]];
        if (type == MLA_FLOAT16 && partials.narrow != nullptr) narrow = narrow && *partials.narrow_at(slot, place.row, column) != 0;
    }
    auto of_lane = [](auto (&values)[2], int part) { return __shfl_sync(0xffffffffu, part < warp_size ? values[0] : values[1], part % warp_size); };
    auto part_at = [&](int part) {
        int32_t const row = planned ? of_lane(rows, part) : (place.merge.slot + part) * partials.rows + place.row;
        return partials.output + int64_t{row} * columns;
    };
    float weights[2] = {};
    float4 total = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    auto add = [&](float weight, float4 four) {
        total.x = fmaf(weight, four.x, total.x);
        total.y = fmaf(weight, four.y, total.y);
        total.z = fmaf(weight, four.z, total.z);
        total.w = fmaf(weight, four.w, total.w);
    };
    auto narrow_four = [&](const float* from) { return *reinterpret_cast<const uint2*>(reinterpret_cast<const uint16_t*>(from) + narrow_column); };
#pragma unroll 1
    for (int turn = first; turn == first || turn < parts; turn += stride * batch) {
        uint2 values[batch];
#pragma unroll
        for (int i = 0; i < batch; ++i) {
            int const part = turn + stride * i;
            const float* const from = part_at(part);
            values[i] = part < parts ? narrow_four(from) : make_uint2(0, 0);
        }
        if (turn == first) {
            meanwhile();
            float const largest = warp_max(fmaxf(lse[0], lse[1])), base = largest == -INFINITY ? 0.0f : largest;
            weights[0] = exp2f(lse[0] - base);
            weights[1] = exp2f(lse[1] - base);
            float denominator = warp_sum(weights[0] + weights[1]);
            if (attend.sinks != nullptr) denominator += exp2f(attend.sinks[head] * log2e - base);
#pragma unroll
            for (int i = 0; i < 2; ++i) weights[i] = largest == -INFINITY ? 0.0f : weights[i] / denominator * partials.scale;
        }
#pragma unroll
        for (int i = 0; i < batch; ++i) add(of_lane(weights, turn + stride * i), four_of<type>(values[i]));
    }
    if (type == MLA_FLOAT16 && !__all_sync(0xffffffffu, narrow)) {  // some are f32
        total = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 1
        for (int part = first; part < parts; part += stride) {
            float const weight = of_lane(weights, part);
            const float* const from = part_at(part);
            bool const is_narrow = *partials.narrow_at(slot_at(part), place.row, column) != 0;
            add(weight, is_narrow ? four_of<type>(narrow_four(from)) : *reinterpret_cast<const float4*>(from + column));
        }
    }
    return total;
}

// The code of the thread's value, which is rounded to bf16 first, as a number; the scale of its group of 128 to `scale`. `tops` [16] is
// scratch.
__device__ float quantize(float value, float* scale, float* tops) {
    int const warp = threadIdx.x / warp_size;
    value = __bfloat162float(__float2bfloat16_rn(value));
    float const top = warp_max(fabsf(value));
    if (threadIdx.x % warp_size == 0) tops[warp] = top;
    __syncthreads();
    constexpr int group_warps = scale_group / warp_size;
    const float* const own = tops + warp / group_warps * group_warps;
    *scale = divide(fminf(fmaxf(fmaxf(own[0], own[1]), fmaxf(own[2], own[3])), activation_bound), e4m3_max);
    return *scale == 0.0f ? 0.0f : decode_e4m3(encode_e4m3(divide(value, *scale)));
}

#endif

// Where x of a column lies among those of its sixteen: of codes a lane has four that follow each other in a row, which a product takes for
// the columns 2 t, 2 t + 1, 2 t + 8 and 2 t + 9.
template <bool codes>
__device__ inline int x_place(int column) {
    if (!codes) return column;
    return (column & ~15) + (column >> 2 & 3) * 2 + (column & 1) + (column >> 1 & 1) * 8;
}

// The sums of sixteen rows and a group's columns. `a`: where the lane's row of a piece is, `permuted` what its units are permuted by, `x` where
// its row of x is.
template <bool codes, class Wait>
__device__ inline void multiply(float (&sums)[4], uint32_t a, int permuted, uint32_t x, int group, int piece_bytes, Wait&& wait) {
    int const unit = threadIdx.x % warp_size / 16;
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[i] = 0.0f;
#pragma unroll
    for (int i = 0; i < scale_group / 32; ++i) {
        uint32_t b[4];
        ldmatrix_x4(b, x + (group * scale_group + i * 32) * 2);
        if constexpr (codes) {
            if (i == 0) wait(group);
            uint32_t four[4];
            ldmatrix_x4(four, a + group * piece_bytes + ((2 * i + unit ^ permuted) << 4));
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                uint2 const low = decode_e4m3x4(four[2 * j]), high = decode_e4m3x4(four[2 * j + 1]);
                uint32_t const fragment[4] = {low.x, high.x, low.y, high.y};
                mma_bf16(sums, fragment, b[2 * j], b[2 * j + 1]);
            }
        } else {
            int const piece = 2 * group + i / 2;
            if (i % 2 == 0) wait(piece);
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                uint32_t fragment[4];
                ldmatrix_x4(fragment, a + piece * piece_bytes + ((i % 2 * 4 + 2 * j + unit ^ permuted) << 4));
                mma_bf16(sums, fragment, b[2 * j], b[2 * j + 1]);
            }
        }
    }
}

// Block (share of the rows, head). Dynamic shared memory: the share's weights, in pieces of 128 bytes of each row. `codes`: they are e4m3.
template <int type, bool codes, bool planned>
__global__ void __launch_bounds__(threads, 1)
    project_parts_kernel(const __grid_constant__ CUtensorMap map, Projection work, int share, Attend attend, Partials partials) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    let_next_kernel_begin();
    extern __shared__ __align__(1024) uint8_t weights[];
    __shared__ uint64_t barriers[most_pieces];
    __shared__ uint4 x[most_tokens][x_row / 8];
    __shared__ float4 sums[groups * most_rows * most_tokens / 4];
    __shared__ float x_scales[most_tokens][groups], tops[warps];
    static_assert(takers * columns * 4 <= sizeof(sums) && takers == 4 && most_tokens == 8);
    constexpr int pieces = columns * (codes ? 1 : 2) / line_bytes;
    int const head = blockIdx.y, first_row = blockIdx.x * share, rows = min(share, work.rows - first_row), piece_bytes = share * line_bytes;
    int const warp = threadIdx.x / warp_size, lane = threadIdx.x % warp_size, tokens = static_cast<int>(work.tokens);
    auto* const scratch = reinterpret_cast<float*>(sums);
    uint32_t const full = shared_address(barriers);
    auto order_weights = [&] {  // by a thread
#pragma unroll 1
        for (int i = 0; i < pieces; ++i) barrier_init(full + 8 * i, 1);
        fence_barrier_init();
#pragma unroll 1
        for (int i = 0; i < pieces; ++i) {
            barrier_expect(full + 8 * i, piece_bytes);
            copy_box(shared_address(weights) + i * piece_bytes, &map, full + 8 * i, i * line_bytes, head * work.rows + first_row, 0, 0);
        }
    };
    float w_scale = 1.0f;  // of the share's blocks of 128 rows a lane has one's
    // Four warps take a token each, or parts of one.
    int const taker = warp / slices, column = warp % slices * (columns / slices) + 4 * lane;
    int const together_shift = tokens > 2 ? 2 : tokens - 1, together = 1 << together_shift;
#pragma unroll 1
    for (int first = 0; first < tokens; first += together) {
        int const token = first + (taker & together - 1), first_part = taker >> together_shift;
        Place place{};
        if (token < tokens) place = planned ? find_planned(attend, partials, token, head) : find_parts(attend, partials, token, head);
        if (first == 0) wait_for_kernel_before();
        float4 total = merge<type, planned>(attend, partials, place, head, column, first_part, takers >> together_shift, [&] {
            if (first > 0) return;
            if (threadIdx.x == 0) order_weights();  // now: answers come in the order of what is asked for
            if (!codes || work.w_scale == nullptr) return;
            int const all = ceil_div(work.rows, scale_group), block = first_row / scale_group + lane / groups;
            if (block < all) w_scale = work.w_scale[(head * all + block) * groups + lane % groups];
        });
        if (planned && place.merge.parts() == 0 && token < tokens && first_part == 0) {
            int64_t const at = token * work.x.token_stride + head * work.x.head_stride + column;
            total = four_of<MLA_BFLOAT16>(*reinterpret_cast<const uint2*>(static_cast<const uint16_t*>(work.x.data) + at));
        }
        sums[(taker * columns + column) / 4] = place.there ? total : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        __syncthreads();
#pragma unroll 1
        for (int i = 0; i < together && first + i < tokens; ++i) {
            float value = 0.0f, scale = 1.0f;
#pragma unroll
            for (int j = 0; j < takers; ++j) value += (j & together - 1) == i ? scratch[j * columns + threadIdx.x] : 0.0f;
            if (codes && work.quantize_x) value = quantize(value, &scale, tops);
            reinterpret_cast<__nv_bfloat16*>(x[first + i])[x_place<codes>(threadIdx.x)] = __float2bfloat16_rn(value);
            if (threadIdx.x % scale_group == 0) x_scales[first + i][threadIdx.x / scale_group] = scale;
            if (codes && work.quantize_x) __syncthreads();
        }
        __syncthreads();
    }

    int const row_in_tile = lane % tile_rows, permuted = row_in_tile % 8;
    uint32_t const x_lane = shared_address(x) + (lane % 8 * x_row + lane / 8 * 8) * 2;
#pragma unroll 1
    for (int task = warp; task < ceil_div(rows, tile_rows) * groups; task += warps) {
        int const group = task % groups, first = task / groups * tile_rows;
        float own[4];
        multiply<codes>(own, shared_address(weights) + (first + row_in_tile) * line_bytes, permuted, x_lane, group, piece_bytes,
                        [&](int piece) { barrier_wait(full + 8 * piece, 0); });
        float const scale = __shfl_sync(0xffffffffu, w_scale, (first_row % scale_group + first) / scale_group * groups + group);
        int const token = lane % 4 * 2;
        float const low = codes ? scale * x_scales[token][group] : 1.0f, high = codes ? scale * x_scales[token + 1][group] : 1.0f;
        auto* const to = reinterpret_cast<float2*>(scratch + (group * most_rows + first + lane / 4) * most_tokens + token);
        to[0] = make_float2(low * own[0], high * own[1]);
        to[8 * most_tokens / 2] = make_float2(low * own[2], high * own[3]);
    }
    __syncthreads();
    int64_t const to = head * work.out.head_stride + first_row;
#pragma unroll 1
    for (int i = threadIdx.x; i < tokens * most_rows; i += threads) {
        int const token = i / most_rows, row = i % most_rows;
        if (row >= rows) break;
        float total = 0.0f;
#pragma unroll
        for (int group = 0; group < groups; ++group) total += scratch[(group * most_rows + row) * most_tokens + token];
        store_float(work.out.data, work.out.type, to + token * work.out.token_stride + row, total);
    }
#endif
}

// Outputs of a block: as few as leave one block for each multiprocessor, and no less than two warps' tiles.
int share_of(const Projection& work, const Device& device) {
    return round_up(ceil_div(work.rows, std::max(device.multiprocessors / work.heads, 1)), 2 * tile_rows);
}

template <int type, bool planned>
auto choose_kernel(int32_t w_type) {
    return w_type == MLA_BFLOAT16 ? project_parts_kernel<type, false, planned> : project_parts_kernel<type, true, planned>;
}

template <int type>
auto choose_kernel(int32_t w_type, const Partials& partials) {
    return partials.plan.items != nullptr ? choose_kernel<type, true>(w_type) : choose_kernel<type, false>(w_type);
}

}  // namespace

bool project_takes_parts(const Projection& work, const Attention& attention) {
    Device device;
    const Partials& partials = attention.partials;
    bool const in_parts = partials.plan.items != nullptr || partials.splits > 1;
    return current_device(&device) == MLA_OK && device.major == 9 && has_hopper_code() && in_parts && partials.type != MLA_FLOAT && !work.exact &&
           work.x.type == MLA_BFLOAT16 && (work.w_type == MLA_FLOAT8E4M3FN || (work.w_type == MLA_BFLOAT16 && !work.quantize_x)) &&
           work.columns == columns && work.tokens <= most_tokens && share_of(work, device) <= most_rows && reinterpret_cast<uintptr_t>(work.w) % 16 == 0;
}

int project_parts(const Projection& work, const Attend& attend, const Partials& partials, cudaStream_t stream) {
    Device device;
    if (int status = current_device(&device)) return status;
    auto* const kernel = partials.type == MLA_FLOAT16 ? choose_kernel<MLA_FLOAT16>(work.w_type, partials) : choose_kernel<MLA_BFLOAT16>(work.w_type, partials);
    int const share = share_of(work, device), row_bytes = columns * element_bytes(work.w_type), bytes = share * row_bytes;
    int64_t const all_rows = int64_t{work.heads} * work.rows;
    CUtensorMap map;
    if (int status = make_tensor_map(&map, work.w, {row_bytes, all_rows, 1, 1}, {row_bytes, row_bytes * all_rows, row_bytes * all_rows},
                                     {line_bytes, share, 1, 1})) {
        return status;
    }
    if (int status = check_cuda("product with W_UV", cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                                          cudaFuncAttributeMaxDynamicSharedMemorySize, bytes))) {
        return status;
    }
    dim3 const grid(ceil_div(work.rows, share), work.heads);
    return launch_early("product with W_UV", kernel, grid, threads, bytes, device, stream, map, work, share, attend, partials);
}

}  // namespace mla
