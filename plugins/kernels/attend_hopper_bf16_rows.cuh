// Where the rows of keys lie that a thread brings, for attend_hopper_bf16_feed.cuh.
#pragma once

#include "attend_hopper_bf16_keys.cuh"

namespace mla {
namespace hopper_bf16 {

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)

// What listed rows are found by, to the L2 cache while the item is made: the entries of the block's first tiles, where lists are as long as
// they can be, its token's sequence and position, and of one sequence the table's beginning. Nothing is read, so that the kernel before
// may be at work.
__device__ inline void prefetch_list(const Attend& work, const Partials& partials) {
    constexpr int line = 128 / 4;  // entries
    int32_t const lane = threadIdx.x % warp_size, block = blockIdx.x, item = block / partials.splits, part = block - item * partials.splits;
    int32_t const token = item / partials.items_of(work.heads), first = line * lane;
    auto const tiles = static_cast<int32_t>(ceil_div<int64_t>(work.top_k, tile));
    int32_t const entry = tiles * part / partials.splits * tile + first;
    if (lane < 2 * tile / line && entry < work.top_k) prefetch(work.indices + token * work.top_k + entry);
    if (lane == 2 * tile / line) prefetch(work.step.positions + token);
    if (lane == 2 * tile / line + 1) prefetch(work.step.token_sequence + token);
    if (work.step.sequences == 1 && first < work.step.max_pages) prefetch(work.step.block_table + first);
}

// Where the rows of the keys lie that a thread has, every `step`-th of the block's: what `next` needs was asked for one and two
// steps before.
template <bool lists, int step, bool page_scales = false>
struct RowOffsets {
    int32_t at;  // of the key to ask for
    int32_t last;  // the last key that there is
    int32_t key, later_key, page;
    int page_shift;

    __device__ void begin(const Attend& work, const Item& item, const Span& span, int line) {
        page_shift = __ffs(work.layout.page_size) - 1;
        at = span.first * tile + line;
        last = lists ? last_key(work, item.first_token) : span.end() - 1;
        key = ask(work, item, span);
        later_key = ask(work, item, span);
        page = page_of(work, item, key);
    }
    float scale;  // of the row that `next` gave

    // In 16 bytes from the pool's beginning; no_row where there is none.
    __device__ uint32_t next(const Attend& work, const Item& item, const Span& span) {
        bool const there = page >= 0 && page < work.step.pages;
        int64_t const of_page = static_cast<int64_t>(page) * work.layout.page_bytes;
        int32_t const slot = key & (work.layout.page_size - 1);
        if (page_scales) {
            scale = there ? reinterpret_cast<const float*>(work.pool + of_page + work.layout.scales_offset)[slot] : 0.0f;
        }
        key = later_key;
        page = page_of(work, item, key);
        later_key = ask(work, item, span);
        return there ? static_cast<uint32_t>((of_page + slot * work.layout.row_bytes) / 16) : no_row;
    }

private:
    __device__ int32_t ask(const Attend& work, const Item& item, const Span& span) {
        int32_t const index = at;
        at += step;
        if (!lists) return index;
        return index < span.end() ? work.indices[item.first_token * work.top_k + index] : -1;
    }
    __device__ int32_t page_of(const Attend& work, const Item& item, int32_t of_key) const {
        if (of_key < 0 || of_key > last) return -1;
        return work.step.block_table[item.sequence * work.step.max_pages + (of_key >> page_shift)];
    }
};

// The same of listed keys for the decoding group, one of every half tile, whose entries and pages come through shared memory, and scales of
// whole rows to where the scores look for them: loads to registers would be waited for together with those of the rows' codes.
template <bool page_scales>
struct StagedRows {
    static constexpr int step = tile / 2;
    uint8_t* memory;
    int line;  // of the first key in its tile
    int32_t count;  // keys so far
    int32_t at;  // of the key to ask for
    int32_t key, last;
    int page_shift;
    int32_t volatile *entry, *page;  // of this thread

    __device__ void begin(const Attend& work, const Item& item, const Span& span, uint8_t* block_memory, int first_line) {
        memory = block_memory;
        line = first_line;
        count = 0;
        page_shift = __ffs(work.layout.page_size) - 1;
        at = span.first * tile + line;
        last = last_key(work, item.first_token);
        entry = reinterpret_cast<int32_t volatile*>(memory + FedPlaces::lookups) + threadIdx.x % group;
        page = entry + group;
        ask(entry, listed(work, item, span));
        copy_async_commit();
        copy_async_wait<0>();
        advance(work, item, span);
    }

    __device__ uint32_t next(const Attend& work, const Item& item, const Span& span) {
        copy_async_wait<0>();
        int32_t const of_page = *page, slot = key & (work.layout.page_size - 1);
        bool const there = of_page >= 0 && of_page < work.step.pages;
        if (page_scales && threadIdx.x % 4 == 0) {  // of a row's lanes one
            auto* target = reinterpret_cast<int32_t volatile*>(memory + FedPlaces::scale_of(count / 2, count % 2 * step + line));
            const uint8_t* scales = work.pool + of_page * work.layout.page_bytes + work.layout.scales_offset;
            ask(target, there ? reinterpret_cast<const int32_t*>(scales) + slot : nullptr, 0);
        }
        ++count;
        advance(work, item, span);
        return there ? static_cast<uint32_t>((of_page * work.layout.page_bytes + slot * work.layout.row_bytes) / 16) : no_row;
    }

private:
    // To the next key; its page is asked for, and the key behind it.
    __device__ void advance(const Attend& work, const Item& item, const Span& span) {
        key = *entry;
        at += step;
        ask(page, key < 0 || key > last ? nullptr : work.step.block_table + item.sequence * work.step.max_pages + (key >> page_shift));
        ask(entry, listed(work, item, span));
        copy_async_commit();
    }
    // The list's entry at `at`.
    __device__ const int32_t* listed(const Attend& work, const Item& item, const Span& span) const {
        return at < span.end() ? work.indices + item.first_token * work.top_k + at : nullptr;
    }
    // `missing` where there is no source.
    __device__ static void ask(int32_t volatile* target, const int32_t* source, int32_t missing = -1) {
        if (source != nullptr) {
            copy_async_4(shared_address(const_cast<int32_t*>(target)), source);
        } else {
            *target = missing;
        }
    }
};

#endif

}  // namespace hopper_bf16
}  // namespace mla
