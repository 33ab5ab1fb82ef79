// What a block of attend_tensor_cores.cu works on: which rows it has, which cached rows are its keys, and how both come into
// shared memory.
#pragma once

#include "attend.h"
#include "mma.cuh"

namespace mla {

constexpr int rope_padded = 64;  // columns of shared memory behind the latent's

inline int padded_rank(const KvLayout& layout) { return layout.rank <= 128 ? 128 : layout.rank <= 256 ? 256 : 512; }

// Whether rows are keys as they lie: bf16, in 16-byte pieces.
inline bool is_direct(const KvLayout& layout) {
    return layout.format == row_format::bf16 && layout.rank % 8 == 0 && layout.rope % 8 == 0;
}

inline bool queries_aligned(const Attend& work) {
    return work.layout.rank % 8 == 0 &&
           aligned_for_eight(work.query.data, work.query.token_stride, work.query.head_stride, work.query.type);
}

// Blocks for `rows` rows each and the parts of their keys; room for one item more than there can be, for what belongs to no
// sequence.
inline int64_t block_count(const Attend& work, const Partials& partials, int rows) {
    int64_t const items = work.indices != nullptr ? work.step.tokens * ceil_div(work.heads, rows)
                                                  : work.step.sequences + work.step.tokens * work.heads / rows + 1;
    return items * partials.splits;
}

// Launches an attention kernel whose blocks have up to `rows` rows each and `bytes` of shared memory.
template <typename... Parameters, typename... Arguments>
int launch_blocks(void (*kernel)(Parameters...), const Attend& work, const Partials& partials, int rows, int threads, int bytes,
                  cudaStream_t stream, const Arguments&... arguments) {
    if (int status = check_cuda("attention", cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                                  cudaFuncAttributeMaxDynamicSharedMemorySize, bytes))) {
        return status;
    }
    int64_t const blocks = block_count(work, partials, rows);
    if (blocks > 0x7fffffff) return fail(MLA_UNSUPPORTED, "%lld query tokens are too many for one step",
                                         static_cast<long long>(work.step.tokens));
    kernel<<<static_cast<unsigned>(blocks), threads, bytes, stream>>>(arguments...);
    return check_launch("attention");
}

// The rows of a block: `count` consecutive (token, head) pairs of one sequence.
struct Item {
    int32_t sequence;  // -1: none
    int64_t first_token;
    int32_t first_head;
    int32_t count;
    int32_t surplus;  // blocks without an item are numbered, and there are `surplus_blocks` of them
    int32_t surplus_blocks;
};

__device__ inline int32_t new_tokens(const Attend& work, int64_t start, int64_t end) {
    if (start < 0 || end > work.step.tokens || end <= start) return 0;
    return static_cast<int32_t>(end - start);
}

constexpr int find_batch = 4;

// The block's item without lists. Called by one warp; every lane gets the result. Each lane counts the items of a run of
// sequences; the lane in whose run the item falls walks it again.
__device__ inline Item find_item(const Attend& work, const Partials& partials, int rows) {
    int const lane = threadIdx.x % warp_size;
    int64_t const run = ceil_div<int64_t>(work.step.sequences, warp_size);
    auto items_between = [&](int64_t start, int64_t end) {
        return ceil_div<int64_t>(static_cast<int64_t>(new_tokens(work, start, end)) * work.heads, rows);
    };
    auto items = [&](int64_t sequence) {
        return items_between(work.step.query_offsets[sequence], work.step.query_offsets[sequence + 1]);
    };
    int64_t own = 0;
    for (int64_t i = 0; i < run; i += find_batch) {
        int32_t offsets[find_batch + 1];  // read together; beyond the last sequence there are no tokens
#pragma unroll
        for (int j = 0; j <= find_batch; ++j) {
            offsets[j] = work.step.query_offsets[min(min(lane * run + i + j, (lane + 1) * run), work.step.sequences)];
        }
#pragma unroll
        for (int j = 0; j < find_batch; ++j) own += items_between(offsets[j], offsets[j + 1]);
    }
    int64_t before = own;
    for (int offset = 1; offset < warp_size; offset *= 2) {
        int64_t const lower = __shfl_up_sync(0xffffffffu, before, offset);
        if (lane >= offset) before += lower;
    }
    int64_t const total = __shfl_sync(0xffffffffu, before, warp_size - 1);
    before -= own;
    int64_t const wanted = item_of_block(partials);
    Item item{-1, 0, 0, 0, static_cast<int32_t>(wanted - total), static_cast<int32_t>(gridDim.x / partials.splits - total)};
    bool const mine = wanted >= before && wanted < before + own;
    if (mine) {
        int64_t sequence = lane * run;
        for (int64_t there = items(sequence); before + there <= wanted; there = items(sequence)) {
            before += there;
            ++sequence;
        }
        int64_t const first_row = (wanted - before) * rows;
        int64_t const token_end = work.step.query_offsets[sequence + 1];
        int64_t const all_rows =
            static_cast<int64_t>(new_tokens(work, work.step.query_offsets[sequence], token_end)) * work.heads;
        item.sequence = static_cast<int32_t>(sequence);
        item.first_token = work.step.query_offsets[sequence] + first_row / work.heads;
        item.first_head = static_cast<int32_t>(first_row % work.heads);
        item.count = static_cast<int32_t>(min(all_rows - first_row, static_cast<int64_t>(rows)));
    }
    unsigned const owners = __ballot_sync(0xffffffffu, mine);
    if (owners != 0) {
        int const owner = __ffs(static_cast<int>(owners)) - 1;
        item.sequence = __shfl_sync(0xffffffffu, item.sequence, owner);
        item.first_token = __shfl_sync(0xffffffffu, item.first_token, owner);
        item.first_head = __shfl_sync(0xffffffffu, item.first_head, owner);
        item.count = __shfl_sync(0xffffffffu, item.count, owner);
    }
    return item;
}

__device__ inline Item list_item(const Attend& work, const Partials& partials, int rows) {
    int const tiles = ceil_div(work.heads, rows);
    int64_t const token = item_of_block(partials) / tiles;
    int const first_head = item_of_block(partials) % tiles * rows;
    int32_t const sequence = work.step.sequence_of(token);
    return {sequence, token, first_head, min(rows, work.heads - first_head), 0, 0};
}

__device__ inline void zero_row(const Attend& work, int64_t token, int head, int lane, int lanes) {
    int64_t const base = token * work.output.token_stride + head * work.output.head_stride;
    for (int i = lane; i < work.layout.rank; i += lanes) store_float(work.output.data, work.output.type, base + i, 0.0f);
    if (lane == 0 && work.lse != nullptr) work.lse[token * work.heads + head] = -INFINITY;
}

// Blocks without an item zero the tokens that belong to no sequence.
__device__ inline void zero_padding(const Attend& work, const Item& item) {
    if (work.indices != nullptr) {
        for (int row = threadIdx.x / warp_size; row < item.count; row += blockDim.x / warp_size) {
            zero_row(work, item.first_token, item.first_head + row, threadIdx.x % warp_size, warp_size);
        }
        return;
    }
    int64_t const end = max(work.step.query_offsets[work.step.sequences], 0);
    for (int64_t token = end + item.surplus; token < work.step.tokens; token += item.surplus_blocks) {
        for (int head = threadIdx.x / warp_size; head < work.heads; head += blockDim.x / warp_size) {
            zero_row(work, token, head, threadIdx.x % warp_size, warp_size);
        }
    }
}

// Copied rows to the tile of keys, by `threads` threads of which this is number `thread`, value by value.
template <int tile, int threads, int rank_padded>
__device__ inline void convert(const KvLayout& layout, const uint8_t* raw, uint8_t* keys, int thread) {
    constexpr int width = rank_padded + rope_padded;
    bool const grouped = layout.format == row_format::fp8_ds_mla;
    int const values = layout.rank + layout.rope;
    for (int i = thread; i < tile * values; i += threads) {
        int const line = i / values, column = i % values;
        bool const is_rope = column >= layout.rank;
        const uint8_t* row = raw + line * layout.row_bytes;
        const uint8_t* part = is_rope ? row + layout.rope_offset : row;
        int const at = is_rope ? column - layout.rank : column;
        __nv_bfloat16 value;
        if (layout.format == row_format::bf16 || (is_rope && layout.format != row_format::fp8_flat)) {
            value = __ushort_as_bfloat16(static_cast<uint16_t>(part[2 * at] | part[2 * at + 1] << 8));
        } else {
            float factor = 1.0f;
            if (grouped) {
                const uint8_t* bytes = row + layout.rank + 4 * (at / scale_group);
                factor = __uint_as_float(static_cast<uint32_t>(bytes[0]) | static_cast<uint32_t>(bytes[1]) << 8 |
                                         static_cast<uint32_t>(bytes[2]) << 16 | static_cast<uint32_t>(bytes[3]) << 24);
            }
            value = __float2bfloat16_rn(decode_e4m3(part[at]) * factor);
        }
        int const column_padded = is_rope ? rank_padded + at : at;
        *reinterpret_cast<__nv_bfloat16*>(keys + swizzled(line, column_padded, width)) = value;
    }
}

// Eight values of the latent or the rope part of a row's query, from `column` on of that part; zero where there is no row and
// behind the part's end.
__device__ inline uint4 load_query_eight(const Attend& work, const Item& item, int row, int column, bool is_rope, bool aligned) {
    int const flat = item.first_head + row;
    int64_t const base = (item.first_token + flat / work.heads) * work.query.token_stride +
                         (flat % work.heads) * work.query.head_stride;
    int const rank = work.layout.rank;
    int const count = row < item.count ? (is_rope ? work.layout.rope : rank) - column : 0;
    return load_eight(work.query.data, work.query.type, base + (is_rope ? rank : 0) + column, count, aligned);
}

// The rows' queries to shared memory as ldmatrix reads them, zero where there is no row and in the padding.
template <int rows, int rank_padded>
__device__ void load_queries(const Attend& work, const Item& item, uint8_t* query, bool aligned) {
    constexpr int width = rank_padded + rope_padded, units = width / 8;
    for (int i = threadIdx.x; i < rows * units; i += blockDim.x) {
        int const row = i / units, column = i % units * 8;
        bool const is_rope = column >= rank_padded;
        *reinterpret_cast<uint4*>(query + swizzled(row, column, width)) =
            load_query_eight(work, item, row, is_rope ? column - rank_padded : column, is_rope, aligned);
    }
}

// Finds the rows of a block's keys one tile after the other, for the thread that copies row `line` of each. What a row needs
// (list entry, page, scale) is fetched three, two and one tile ahead, so that nothing waits for it.
template <int tile>
struct RowFinder {
    const Attend& work;
    const Item& item;
    int32_t end, count, last;  // keys that exist, entries, tiles
    int line;
    int page_shift;  // of a page size that is a power of two, else -1
    int32_t key_next, key_later, page_next, slot_next;
    Row row;  // of the tile that `advance` or the constructor named

    __device__ RowFinder(const Attend& attend, const Item& block, int32_t key_end, int32_t entries, int32_t first_tile,
                         int32_t last_tile, int line_of_thread)
        : work(attend), item(block), end(key_end), count(entries), last(last_tile), line(line_of_thread) {
        int const size = work.layout.page_size;
        page_shift = (size & (size - 1)) == 0 ? __ffs(size) - 1 : -1;
        int32_t const key = key_of(first_tile);
        key_next = key_of(first_tile + 1);
        key_later = key_of(first_tile + 2);
        int32_t slot;
        int32_t const page = page_entry(key, &slot);
        row = row_in(key, page, slot);
        page_next = page_entry(key_next, &slot_next);
    }

    // To the row of tile `index`, which follows the one before.
    __device__ void advance(int32_t index) {
        row = row_in(key_next, page_next, slot_next);
        key_next = key_later;
        page_next = page_entry(key_next, &slot_next);
        key_later = key_of(index + 2);
    }

private:
    __device__ int32_t key_of(int32_t index) const {
        int32_t const entry = index * tile + line;
        if (index >= last || entry >= count) return -1;
        return work.indices == nullptr ? entry : work.indices[item.first_token * work.top_k + entry];
    }

    __device__ int32_t page_entry(int32_t key, int32_t* slot) const {
        *slot = 0;
        if (key < 0 || key >= end) return -1;
        int32_t const column = page_shift >= 0 ? key >> page_shift : key / work.layout.page_size;
        *slot = key - column * work.layout.page_size;
        return work.step.block_table[item.sequence * work.step.max_pages + column];
    }

    // As row_at, which divides again.
    __device__ Row row_in(int32_t key, int32_t page, int32_t slot) const {
        const KvLayout& layout = work.layout;
        Row found{nullptr, layout.format == row_format::fp8_flat ? layout.kv_scale : 1.0f, masked};
        if (page < 0 || page >= work.step.pages) return found;
        const uint8_t* page_bytes = work.pool + page * layout.page_bytes;
        found.bytes = page_bytes + static_cast<int64_t>(slot) * layout.row_bytes;
        if (layout.has_page_scales()) found.scale = reinterpret_cast<const float*>(page_bytes + layout.scales_offset)[slot];
        found.position = key;
        return found;
    }
};

}  // namespace mla
