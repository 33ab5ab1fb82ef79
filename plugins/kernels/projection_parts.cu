// W_UV's product of one or two tokens on SM90, of an attention whose keys the host has cut and nobody has merged: each block merges the
// parts of its head, and multiplies the mean with its share of the head's weights (bf16 or e4m3), which come by the copy engine meanwhile.
//
// Such a step is as long as what its short kernels wait for, one behind the other, and their instructions come from memory too. So there is
// little code: no tensor cores, and loops that are not unrolled.
#include <algorithm>

#include "attend_items.cuh"
#include "early.cuh"
#include "hopper.cuh"
#include "mma.cuh"
#include "projection.h"
#include "projection_values.cuh"

namespace mla {
namespace {

using namespace hopper;

constexpr int threads = 512, warps = threads / warp_size;
constexpr int most_tokens = 2;
constexpr int columns = threads;  // R
constexpr int rows_at_once = 2 * warps;  // of a block: two rows a warp
constexpr int chunk_bytes = 16384, most_chunks = 8;  // of weights, each with its barrier

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)

constexpr int groups = columns / scale_group;  // of columns, which have a scale each
constexpr int row_lanes = scale_group / 8;
constexpr int takers = 4;  // warps that take turns with the parts of 128 columns
constexpr int batch = warp_size / takers;  // parts of a turn

// Where a row's parts are: `row` of the slots from `slot` on.
struct Place {
    int32_t slot, row;
    bool there;  // else the token belongs to no sequence
};

__device__ Place find_parts(const Attend& attend, const Partials& partials, int token, int head) {
    bool there;
    int32_t index = head;  // of the row among those of all items
    if (partials.by_token) {
        index += token * partials.items_of(attend.heads) * partials.item_rows;
        there = attend.step.sequence_of(token) >= 0;
    } else {
        int32_t const own = token - attend.step.query_offsets[0];
        there = own >= 0 && own < new_tokens_of(attend, 0);
        index += (there ? own : 0) * attend.heads;
    }
    int32_t const item = partials.item_of(index);
    return {item * partials.splits, index - item * partials.item_rows, there};
}

// A token's mean of a head, of the thread's column: in all it does as decoding.cu's merge does. `sums` [4][512] is scratch. `meanwhile` is
// done when the parts have been asked for.
template <int type, typename Meanwhile>
__device__ float merge(const Attend& attend, const Partials& partials, const Place& place, int head, float4* sums, Meanwhile&& meanwhile) {
    int const warp = threadIdx.x / warp_size, lane = threadIdx.x % warp_size, taker = warp / takers;
    int const slice = warp % takers * (columns / takers), column = slice + 4 * lane, parts = partials.splits;
    int const narrow_column = type == MLA_FLOAT16 ? partials.narrow_column(column) : column;
    int const part_floats = partials.rows * columns;
    int64_t const first_row = partials.row(place.slot, place.row);
    float lse[2] = {-INFINITY, -INFINITY};  // of two parts
    bool narrow = true;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        int const part = lane + i * warp_size;
        if (part >= parts) continue;
        lse[i] = partials.lse[first_row + part * partials.rows];
        if (type == MLA_FLOAT16 && partials.narrow != nullptr) narrow = narrow && *partials.narrow_at(place.slot + part, place.row, slice) != 0;
    }
    const float* const own_part = partials.output + first_row * columns + taker * part_floats;
    float weights[2];
    float4 total = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    auto add = [&](float weight, float4 four) {
        total.x = fmaf(weight, four.x, total.x);
        total.y = fmaf(weight, four.y, total.y);
        total.z = fmaf(weight, four.z, total.z);
        total.w = fmaf(weight, four.w, total.w);
    };
#pragma unroll 1
    for (int turn = 0; turn * warp_size < parts; ++turn) {
        uint2 values[batch];
#pragma unroll
        for (int i = 0; i < batch; ++i) {
            int const part = turn * warp_size + takers * i;
            values[i] = make_uint2(0, 0);
            if (part + taker < parts) {
                values[i] = *reinterpret_cast<const uint2*>(reinterpret_cast<const uint16_t*>(own_part + part * part_floats) + narrow_column);
            }
        }
        if (turn == 0) {
            meanwhile();
            float const largest = warp_max(fmaxf(lse[0], lse[1])), base = largest == -INFINITY ? 0.0f : largest;
            weights[0] = exp2f(lse[0] - base);
            weights[1] = exp2f(lse[1] - base);
            float denominator = warp_sum(weights[0] + weights[1]);
            if (attend.sinks != nullptr) denominator += exp2f(attend.sinks[head] * log2e - base);
#pragma unroll
            for (int i = 0; i < 2; ++i) weights[i] = largest == -INFINITY ? 0.0f : weights[i] / denominator * partials.scale;
        }
        float const own = turn == 0 ? weights[0] : weights[1];
#pragma unroll
        for (int i = 0; i < batch; ++i) add(__shfl_sync(0xffffffffu, own, takers * i + taker), four_of<type>(values[i]));
    }
    if (type == MLA_FLOAT16 && !__all_sync(0xffffffffu, narrow)) {  // some are f32
        total = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 1
        for (int part = 0; part + taker < parts; part += takers) {
            float const weight = __shfl_sync(0xffffffffu, part < warp_size ? weights[0] : weights[1], (part + taker) % warp_size);
            const float* const from = own_part + part * part_floats;
            bool const is_narrow = *partials.narrow_at(place.slot + part + taker, place.row, slice) != 0;
            add(weight, is_narrow ? four_of<type>(*reinterpret_cast<const uint2*>(reinterpret_cast<const uint16_t*>(from) + narrow_column))
                                  : *reinterpret_cast<const float4*>(from + column));
        }
    }
    sums[(taker * columns + column) / 4] = total;
    __syncthreads();
    const auto* const own_sums = reinterpret_cast<const float*>(sums) + threadIdx.x;
    float mean = 0.0f;
#pragma unroll
    for (int i = 0; i < takers; ++i) mean += own_sums[i * columns];
    return place.there ? mean : 0.0f;
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

// Block (share of the rows, head). Dynamic shared memory: the share's weights. `codes`: they are e4m3.
template <int type, bool codes>
__global__ void __launch_bounds__(threads, 1) project_parts_kernel(Projection work, int share, Attend attend, Partials partials) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    let_next_kernel_begin();
    extern __shared__ __align__(128) uint8_t weights[];
    __shared__ uint64_t barriers[most_chunks];
    __shared__ float4 x[most_tokens][columns / 4], sums[takers * columns / 4];
    __shared__ float x_scales[most_tokens][groups], tops[warps];
    constexpr int row_bytes = columns * (codes ? 1 : 2);
    int const head = blockIdx.y, first_row = blockIdx.x * share, rows = min(share, work.rows - first_row);
    int const warp = threadIdx.x / warp_size, lane = threadIdx.x % warp_size, tokens = static_cast<int>(work.tokens);
    uint32_t const full = shared_address(barriers);
    auto order_weights = [&] {  // by a thread
        const auto* from = static_cast<const uint8_t*>(work.w) + (static_cast<int64_t>(head) * work.rows + first_row) * row_bytes;
#pragma unroll 1
        for (int i = 0; i * chunk_bytes < rows * row_bytes; ++i) {
            int const size = min(chunk_bytes, rows * row_bytes - i * chunk_bytes);
            barrier_expect(full + 8 * i, size);
            copy_bytes(shared_address(weights) + i * chunk_bytes, from + i * chunk_bytes, size, full + 8 * i);
        }
    };
    if (threadIdx.x == 0) {
#pragma unroll 1
        for (int i = 0; i < most_chunks; ++i) barrier_init(full + 8 * i, 1);
        fence_barrier_init();
    }
#pragma unroll 1
    for (int token = 0; token < tokens; ++token) {
        Place const place = find_parts(attend, partials, token, head);
        wait_for_kernel_before();
        float value = merge<type>(attend, partials, place, head, sums, [&] {
            if (token == 0 && threadIdx.x == 0) order_weights();  // now: answers come in the order of what is asked for
        });
        float scale = 1.0f;
        if (codes && work.quantize_x) value = quantize(value, &scale, tops);
        reinterpret_cast<float*>(x[token])[threadIdx.x] = value;
        if (threadIdx.x % scale_group == 0) x_scales[token][threadIdx.x / scale_group] = scale;
        __syncthreads();
    }

    // A lane has eight columns of each group of a row, and keeps x of these.
    int const unit = lane % row_lanes;
    float4 own_x[most_tokens][2 * groups];
#pragma unroll
    for (int i = 0; i < most_tokens * 2 * groups; ++i) {
        int const token = i / (2 * groups), four = i % (2 * groups);
        own_x[token][four] = x[token][(unit + four / 2 * row_lanes) * 2 + four % 2];
    }
    auto* const outputs = reinterpret_cast<float*>(sums);  // [rows][tokens]
#pragma unroll 1
    for (int row = 2 * warp + lane / row_lanes; row < rows; row += rows_at_once) {
        barrier_wait(full + 8 * (row * row_bytes / chunk_bytes), 0);
        uint32_t words[groups][4];  // pairs of bf16
#pragma unroll
        for (int i = 0; i < groups; ++i) {
            const uint8_t* const from = weights + row * row_bytes + (unit + i * row_lanes) * (row_bytes / (groups * row_lanes));
            if constexpr (codes) {
                uint2 const eight = *reinterpret_cast<const uint2*>(from);
                uint2 const low = decode_e4m3x4(eight.x), high = decode_e4m3x4(eight.y);
                words[i][0] = low.x, words[i][1] = low.y, words[i][2] = high.x, words[i][3] = high.y;
            } else {
                uint4 const eight = *reinterpret_cast<const uint4*>(from);
                words[i][0] = eight.x, words[i][1] = eight.y, words[i][2] = eight.z, words[i][3] = eight.w;
            }
        }
        float scales[groups];
#pragma unroll
        for (int i = 0; i < groups; ++i) {
            int const scale_row = head * ceil_div(work.rows, scale_group) + (first_row + row) / scale_group;
            scales[i] = codes && work.w_scale != nullptr ? work.w_scale[scale_row * groups + i] : 1.0f;
        }
#pragma unroll
        for (int token = 0; token < most_tokens; ++token) {
            if (token >= tokens) break;
            float total = 0.0f;
#pragma unroll
            for (int i = 0; i < groups; ++i) {
                float sum = 0.0f;
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    float4 const four = own_x[token][2 * i + half];
                    sum = fmaf(__uint_as_float(words[i][2 * half] << 16), four.x, sum);
                    sum = fmaf(__uint_as_float(words[i][2 * half] & 0xffff0000u), four.y, sum);
                    sum = fmaf(__uint_as_float(words[i][2 * half + 1] << 16), four.z, sum);
                    sum = fmaf(__uint_as_float(words[i][2 * half + 1] & 0xffff0000u), four.w, sum);
                }
                total = codes ? fmaf(scales[i] * x_scales[token][i], sum, total) : total + sum;
            }
#pragma unroll
            for (int offset = row_lanes / 2; offset > 0; offset /= 2) total += __shfl_xor_sync(0xffffffffu, total, offset);
            if (unit == 0) outputs[row * most_tokens + token] = total;
        }
    }
    __syncthreads();
    int64_t const to = head * work.out.head_stride + first_row + threadIdx.x;
#pragma unroll 1
    for (int token = 0; token < tokens && threadIdx.x < rows; ++token) {
        store_float(work.out.data, work.out.type, to + token * work.out.token_stride, outputs[threadIdx.x * most_tokens + token]);
    }
#endif
}

// Outputs of a block: as few as leave one block for each multiprocessor.
int share_of(const Projection& work, const Device& device) {
    return round_up(ceil_div(work.rows, std::max(device.multiprocessors / work.heads, 1)), rows_at_once);
}

int weight_bytes(const Projection& work, const Device& device) { return share_of(work, device) * columns * element_bytes(work.w_type); }

template <int type>
auto choose_kernel(int32_t w_type) {
    return w_type == MLA_BFLOAT16 ? project_parts_kernel<type, false> : project_parts_kernel<type, true>;
}

}  // namespace

bool project_takes_parts(const Projection& work, const Attention& attention) {
    Device device;
    const Partials& partials = attention.partials;
    return current_device(&device) == MLA_OK && device.major == 9 && has_hopper_code() && partials.plan.items == nullptr && partials.splits > 1 &&
           partials.type != MLA_FLOAT && !work.exact && (work.w_type == MLA_FLOAT8E4M3FN || (work.w_type == MLA_BFLOAT16 && !work.quantize_x)) &&
           work.columns == columns && work.tokens <= most_tokens && work.rows % 2 == 0 && share_of(work, device) <= threads &&
           weight_bytes(work, device) <= most_chunks * chunk_bytes && reinterpret_cast<uintptr_t>(work.w) % 16 == 0;
}

int project_parts(const Projection& work, const Attend& attend, const Partials& partials, cudaStream_t stream) {
    Device device;
    if (int status = current_device(&device)) return status;
    auto* const kernel = partials.type == MLA_FLOAT16 ? choose_kernel<MLA_FLOAT16>(work.w_type) : choose_kernel<MLA_BFLOAT16>(work.w_type);
    int const share = share_of(work, device), bytes = weight_bytes(work, device);
    if (int status = check_cuda("product with W_UV", cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                                          cudaFuncAttributeMaxDynamicSharedMemorySize, bytes))) {
        return status;
    }
    dim3 const grid(ceil_div(work.rows, share), work.heads);
    return launch_early("product with W_UV", kernel, grid, threads, bytes, device, stream, work, share, attend, partials);
}

}  // namespace mla
