// What each block of an attention kernel works on: rows of a sequence, and a part of their keys.
//
// A sequence's rows (query tokens x heads) are cut into items of a block's rows; where each token has a list of keys, an item is of
// one token. The keys of an item are cut into parts, whose results are merged:
//
// - into as many for all, which the host chooses, where items are of one token, and where there is one sequence;
// - else as attend_plan.cu finds it on the device, for only there are the sequences' lengths known.
#pragma once

#include "attend.h"
#include "early.cuh"

namespace mla {

constexpr int block_tiles = 6;  // what a block takes besides its tiles, in tiles' time
constexpr double cluster_tiles = 0.4;  // what one of a cluster takes more
constexpr float merge_bytes = 8e6f;  // of parts that are written and read in a tile's time
constexpr int most_parts = 64;  // of an item's keys

// Items of a step at most, of up to `rows` rows each.
MLA_BOTH inline int64_t most_items(const Attend& work, int rows, bool by_token) {
    if (by_token) return work.step.tokens * ceil_div(work.heads, rows);
    if (work.step.sequences == 1) return ceil_div<int64_t>(work.step.tokens * work.heads, rows);
    return work.step.tokens * work.heads / rows + (work.heads % rows != 0 ? work.step.sequences : 0);
}

// Parts of a plan at most: the cut adds three for each multiprocessor at most (attend_plan.cu).
inline int64_t most_planned(const Attend& work, int rows, int multiprocessors) {
    return most_items(work, rows, false) + int64_t{3} * multiprocessors;
}

// Blocks of an attention kernel. Where items are not of one token, one is left for the tokens that belong to no sequence; clusters are of
// items that a token fills, so that such a token leaves blocks of its own.
inline int64_t block_count(const Attend& work, const Partials& partials) {
    if (partials.plan.items != nullptr) return most_planned(work, partials.item_rows, partials.multiprocessors) + 1;
    int64_t const items = most_items(work, partials.item_rows, partials.by_token);
    return items * partials.splits * partials.cluster + (partials.by_token || partials.cluster > 1 ? 0 : 1);
}

#if defined(__CUDACC__)

__device__ inline int32_t new_tokens(const Attend& work, int64_t start, int64_t end) {
    if (start < 0 || end > work.step.tokens || end <= start) return 0;
    return static_cast<int32_t>(end - start);
}

// The tokens of a sequence that are in the step.
__device__ inline int32_t new_tokens_of(const Attend& work, int32_t sequence) {
    return new_tokens(work, work.step.query_offsets[sequence], work.step.query_offsets[sequence + 1]);
}

// Of a sequence whose tokens begin at `first_token` and have `all_rows` rows the item number `item`, without its keys.
__device__ inline Item rows_of_sequence(const Attend& work, int rows, int32_t sequence, int64_t first_token, int32_t all_rows,
                                        int32_t item) {
    auto const row = static_cast<uint32_t>(item * rows), token = row / static_cast<uint32_t>(work.heads);  // unsigned: fewer instructions
    auto const first_head = static_cast<int32_t>(row - token * static_cast<uint32_t>(work.heads));
    return {first_token + token, sequence, first_head, max(min(all_rows - static_cast<int32_t>(row), rows), 0)};
}

__device__ inline int64_t last_token_of(const Attend& work, const Item& item) {
    return item.first_token + (item.first_head + item.count - 1) / work.heads;
}

// Gives an item its part of so many keys: from `begin` on as many shares as `shares` says, of `all`.
__device__ inline void take_keys_of(int32_t keys, const Partials& partials, Item& item, int32_t begin, int32_t shares, int32_t all) {
    item.keys = keys;
    uint32_t const tiles = (static_cast<uint32_t>(item.keys) + partials.tile - 1) >> (31 - __clz(partials.tile));
    item.first_tile = static_cast<int32_t>(tiles * begin / all);
    item.last_tile = static_cast<int32_t>(tiles * (begin + shares) / all);
}

// The same of the keys of an item that has rows.
__device__ inline void take_keys(const Attend& work, const Partials& partials, Item& item, int32_t begin, int32_t shares, int32_t all) {
    int32_t const keys = work.indices != nullptr ? list_length(work, item.first_token)
                                                 : max(last_key(work, last_token_of(work, item)) + 1, 0);
    take_keys_of(keys, partials, item, begin, shares, all);
}

// Item number `item` where the host cuts, without its keys; of no rows where there is none.
__device__ inline Item rows_of_item(const Attend& work, const Partials& partials, int32_t item) {
    int const rows = partials.item_rows, of_token = partials.items_of(work.heads), first_head = item % of_token * rows;
    if (!partials.by_token) return rows_of_sequence(work, rows, 0, work.step.query_offsets[0], new_tokens_of(work, 0) * work.heads, item);
    return {item / of_token, work.step.sequence_of(item / of_token), first_head, min(rows, work.heads - first_head)};
}

// The block's item and part. Called by a warp; a barrier must follow.
__device__ inline void take_item(const Attend& work, const Partials& partials, Item* shared_item) {
    int const lane = threadIdx.x % warp_size;
    auto const block = static_cast<int32_t>(blockIdx.x);
    if (partials.plan.items != nullptr) {
        wait_for_kernel_before();
        let_next_kernel_begin();  // only now: the merge reads of the plan before it waits for this kernel
        constexpr int words = sizeof(Item) / 4;
        if (lane < words) {  // where there is none, there is room: both are read at once
            int32_t const word = reinterpret_cast<const int32_t*>(partials.plan.items + block)[lane];
            reinterpret_cast<int32_t*>(shared_item)[lane] = block < partials.plan.counts->parts ? word : -1;
        }
        return;
    }
    int32_t const splits = partials.splits;
    if (partials.by_token) {  // what is not read waits neither for the kernel before nor for the item's sequence
        int const rows = partials.item_rows, of_token = partials.items_of(work.heads);
        int32_t const number = block / splits, token = number / of_token, first_head = (number - token * of_token) * rows;
        Item item{token, -1, first_head, min(rows, work.heads - first_head)};
        item.slot = splits > 1 ? block : -1;
        bool const reads_keys = work.indices == nullptr || work.index_lengths != nullptr;
        if (!reads_keys) take_keys(work, partials, item, block - number * splits, 1, splits);
        wait_for_kernel_before();
        let_next_kernel_begin();  // only now: the merge reads of its item before it waits for this kernel
        int32_t const sequence = work.step.token_sequence[token];
        if (reads_keys) take_keys(work, partials, item, block - number * splits, 1, splits);
        item.sequence = sequence >= 0 && sequence < work.step.sequences ? sequence : -1;
        if (lane == 0) *shared_item = item;
        return;
    }
    wait_for_kernel_before();
    let_next_kernel_begin();
    if (lane != 0) return;
    int32_t const blocks = splits * partials.cluster, number = block / blocks, part = block - number * blocks;
    // the item's last key is asked for beside its rows: with its last token as most steps have it
    int64_t const likely = min(static_cast<int64_t>(((number + 1) * partials.item_rows - 1) / work.heads), work.step.tokens - 1);
    int32_t const likely_key = last_key(work, likely);
    Item item = rows_of_item(work, partials, number);
    item.slot = splits > 1 ? block / partials.cluster : -1;
    if (item.count == 0) item.sequence = item.slot = -1;
    if (item.sequence >= 0) {
        if (last_token_of(work, item) == likely) {
            take_keys_of(max(likely_key + 1, 0), partials, item, part, 1, blocks);
        } else {
            take_keys(work, partials, item, part, 1, blocks);
        }
    }
    *shared_item = item;
}

__device__ inline void zero_row(const Attend& work, int64_t token, int head, int lane, int lanes) {
    int64_t const base = token * work.output.token_stride + head * work.output.head_stride;
    for (int i = lane; i < work.layout.rank; i += lanes) store_float(work.output.data, work.output.type, base + i, 0.0f);
    if (lane == 0 && work.lse != nullptr) work.lse[token * work.heads + head] = -INFINITY;
}

// Blocks without an item zero the tokens that belong to no sequence; where lists are cut, the merge does.
__device__ inline void zero_padding(const Attend& work, const Partials& partials, const Item& item) {
    if (item.slot >= 0) return;
    if (partials.by_token) {
        for (int row = threadIdx.x / warp_size; row < item.count; row += blockDim.x / warp_size) {
            zero_row(work, item.first_token, item.first_head + row, threadIdx.x % warp_size, warp_size);
        }
        return;
    }
    int64_t parts;
    if (partials.plan.items != nullptr) {
        parts = partials.plan.counts->parts;
    } else {
        parts = partials.items_of(new_tokens_of(work, 0) * work.heads) * int64_t{partials.splits} * partials.cluster;
    }
    int64_t const end = max(work.step.query_offsets[work.step.sequences], 0);
    for (int64_t token = end + blockIdx.x - parts; token < work.step.tokens; token += gridDim.x - parts) {
        for (int head = threadIdx.x / warp_size; head < work.heads; head += blockDim.x / warp_size) {
            zero_row(work, token, head, threadIdx.x % warp_size, warp_size);
        }
    }
}

#endif

}  // namespace mla
