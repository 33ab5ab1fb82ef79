// What the kernels for SM90 have in common: the pool as a tensor that the copy engine reads, and the way of the output's rows.
#pragma once

#include "attend_block.cuh"
#include "hopper.cuh"
#include "tensor_map.h"

namespace mla {
namespace hopper {

constexpr int rank = 512, rope = 64;
constexpr int group = 128;  // threads that do the same
constexpr int staged_row = rank + 4;  // values from one staged row of the output to the next: fewer bank conflicts
constexpr int narrow_row = rank + 8;  // the same of two bytes each
constexpr uint32_t no_row = 0xffffffffu;  // the offset in the pool, in 16 bytes, of a listed key that there is not

// The pool as [page][column of 128 bytes][row][byte]; a box is `box_columns` of 64 rows.
inline int make_map(CUtensorMap* map, const Attend& work, int columns, int box_columns) {
    const KvLayout& layout = work.layout;
    return make_tensor_map(map, work.pool, {128, layout.page_size, columns, work.step.pages},
                           {layout.row_bytes, 128, layout.page_bytes}, {128, 64, box_columns, 1});
}

// The queries as [column of 128 bytes][row][byte], where a row is a head of a token; a box is a column of `rows`.
constexpr int query_columns = (rank + rope) * 2 / 128;
inline int make_query_map(CUtensorMap* map, const Attend& work, int rows) {
    int64_t const all = work.step.tokens * work.heads, row_bytes = query_columns * 128;
    return make_tensor_map(map, work.query.data, {128, all, query_columns, 1}, {row_bytes, 128, all * row_bytes}, {128, rows, 1, 1});
}

// Whether there is such a map, and outputs may be written in fours.
inline bool tensors_fit(const Attend& work) {
    const View& query = work.query;
    if (!in_fours(work.output)) return false;
    return query.type == MLA_BFLOAT16 && query.head_stride == rank + rope && query.token_stride == work.heads * query.head_stride &&
           reinterpret_cast<uintptr_t>(query.data) % 16 == 0 && work.step.tokens * work.heads <= 0x7fffffff;
}

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)

// Orders an item's queries by columns, each to where `place` says. Rows come `box` at a time, each box with a barrier of its own, so that
// who waits for the first ones need not wait for all. By a lane of each of `orderers` warps, which share the columns. Rows behind
// the item's are those of others.
template <int rows, int box = rows, int orderers = 1, typename Place>
__device__ void order_queries(const Attend& work, const CUtensorMap* map, const Item& item, int number, uint32_t barriers, Place&& place) {
    auto const row = static_cast<int32_t>(item.first_token * work.heads + item.first_head);
#pragma unroll 1
    for (int first = 0; first < rows; first += box, barriers += 8) {
        barrier_expect(barriers, (query_columns - number + orderers - 1) / orderers * box * 128);
#pragma unroll 1
        for (int i = number; i < query_columns; i += orderers) copy_box(place(i) + first * 128, map, barriers, 0, row + first, i, 0);
    }
}

// The value, as if it were another one: what is made from it is made again each time, and takes no registers throughout a loop.
__device__ inline unsigned again(unsigned value) {
    asm volatile("" : "+r"(value));
    return value;
}

// threadIdx.x, kept in a register. ptxas reads it anew wherever it is used otherwise, and the answer comes behind the products that are
// under way: hundreds of cycles.
__device__ inline unsigned kept_thread() { return __shfl_sync(0xffffffffu, threadIdx.x, threadIdx.x % warp_size); }

// The staged rows to their places, by all threads: a warp writes a row.
template <int staged_row = hopper::staged_row>
__device__ inline void write_rows(const Attend& work, const Partials& partials, const Item& item, const uint8_t* memory) {
    int const warp = threadIdx.x / warp_size, lane = threadIdx.x % warp_size;
#pragma unroll 1
    for (int row = warp; row < item.count; row += static_cast<int>(blockDim.x) / warp_size) {
        int const flat = item.first_head + row;
        int64_t const token = item.first_token + flat / work.heads;
        int const head = flat % work.heads;
        const auto* values = reinterpret_cast<const float4*>(memory) + row * (staged_row / 4);
        bool const part = item.slot >= 0;
        int64_t const at = part ? partials.row(item.slot, row) * rank
                                : token * work.output.token_stride + head * work.output.head_stride;
        if (part || work.output.type == MLA_FLOAT) {
            auto* target = reinterpret_cast<float4*>((part ? partials.output : static_cast<float*>(work.output.data)) + at);
            for (int i = lane; i < rank / 4; i += warp_size) target[i] = values[i];
        } else {
            auto* target = reinterpret_cast<uint2*>(static_cast<uint16_t*>(work.output.data) + at);
            for (int i = lane; i < rank / 4; i += warp_size) {
                float4 const four = values[i];
                if (work.output.type == MLA_FLOAT16) {
                    __half2 const low = __floats2half2_rn(four.x, four.y), high = __floats2half2_rn(four.z, four.w);
                    target[i] = make_uint2(reinterpret_cast<const uint32_t&>(low), reinterpret_cast<const uint32_t&>(high));
                } else {
                    __nv_bfloat162 const low = __floats2bfloat162_rn(four.x, four.y);
                    __nv_bfloat162 const high = __floats2bfloat162_rn(four.z, four.w);
                    target[i] = make_uint2(reinterpret_cast<const uint32_t&>(low), reinterpret_cast<const uint32_t&>(high));
                }
            }
        }
    }
}

#endif

}  // namespace hopper
}  // namespace mla
