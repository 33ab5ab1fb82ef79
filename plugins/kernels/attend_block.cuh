// What a block of attend_tensor_cores.cu works on: which rows it has, which cached rows are its keys, and how both come into
// shared memory.
#pragma once

#include "attend_items.cuh"
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

// Launches an attention kernel whose blocks have `bytes` of shared memory.
template <typename... Parameters, typename... Arguments>
int launch_blocks(void (*kernel)(Parameters...), const Attend& work, const Partials& partials, int threads, int bytes,
                  cudaStream_t stream, const Arguments&... arguments) {
    if (int status = check_cuda("attention", cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                                  cudaFuncAttributeMaxDynamicSharedMemorySize, bytes))) {
        return status;
    }
    int64_t const blocks = block_count(work, partials);
    if (blocks > 0x7fffffff) return fail(MLA_UNSUPPORTED, "%lld query tokens are too many for one step",
                                         static_cast<long long>(work.step.tokens));
    Device device;
    if (int status = current_device(&device)) return status;
    return launch_clusters_early("attention", kernel, static_cast<unsigned>(blocks), partials.cluster, threads, bytes, device, stream, arguments...);
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
