// Absorbed attention over the paged latent cache, for MlaDecoding, MlaPrefillSparse and the ops composed of them.
#pragma once

#include "device.cuh"
#include "view.h"

namespace mla {

struct Attend {
    View query;  // [T, H, R + Dr], absorbed and rotated
    View output;  // [T, H, R]
    float* lse;  // [T, H] or null
    const uint8_t* pool;
    KvLayout layout;
    Step step;
    const int32_t* indices;  // [T, top_k]: the keys of each token; null: all keys up to its own
    const int32_t* index_lengths;  // [T] or null
    int64_t top_k;
    const float* sinks;  // [H] or null
    float softmax_scale;
    int32_t heads;
    int32_t query_terms;  // e4m3 terms that the query may be made of; 0: products of bf16 only
};

// What a block works on: `count` consecutive (token, head) pairs of one sequence, and a part of the tiles of their keys.
struct Item {
    int64_t first_token;
    int32_t sequence;  // -1: none
    int32_t first_head;
    int32_t count;
    int32_t keys;  // that its rows see at most, or listed ones, in all parts
    int32_t first_tile, last_tile;  // the last one is not among the part's
    int32_t slot;  // of the part's result among the partial ones; -1: there is no other part
};

// Rows whose results are in parts: in `count` slots from `slot` on, `stride` apart, then in `tail_count` more.
struct Merge {
    int64_t first_token;
    int32_t first_head, rows;
    int32_t slot, stride, count;
    int32_t tail_slot, tail_stride, tail_pieces, tail_count;

    MLA_BOTH int32_t parts() const { return count + tail_count; }
    MLA_BOTH int32_t slot_of(int32_t part) const {
        if (part < count) return slot + part * stride;
        int32_t const later = part - count;
        return tail_slot + later / tail_pieces * tail_stride + later % tail_pieces;
    }
};

// The parts of a step's keys and what is to be merged of them, in device memory; null where the host cuts.
struct Plan {
    struct Counts {
        int32_t parts, merges;
    };
    Counts* counts;
    Item* items;
    Merge* merges;
    void* scratch;
};

// Results of parts of the keys, before the merge, each in a slot of a block's rows.
struct Partials {
    float* output;  // [slots, rows, R], divided by the part's own sum; the values of `type` lie at each row's beginning
    float* lse;  // [slots, rows], base 2, -inf where the part has no key
    float scale;  // what multiplies them in the merge
    // [slots, 4, 2], of 16 rows and 256 columns each: 0 where they are f32 instead of float16. Either lies where the f32 would begin. Null: all
    // are of two bytes, and rows without a gap.
    int32_t* narrow;
    int rows;  // of a slot, a power of two
    int item_rows;  // of an item at most, no more than of a slot
    uint32_t item_inverse;  // 2^32 over it, rounded up
    int tile;  // keys of a tile, a power of two
    int32_t type;  // MLA_FLOAT, MLA_BFLOAT16, or MLA_FLOAT16 as `narrow` says
    int32_t slots, multiprocessors;
    bool by_token;  // items are heads of one token
    bool output_aligned;  // four outputs that follow each other may be written at once
    int32_t splits;  // parts of every item, where there is no plan
    int32_t cluster;  // blocks of a part, which merge what they have themselves
    Plan plan;

    void set_rows(int of_item) {
        item_rows = of_item;
        for (rows = 1; rows < item_rows; rows *= 2) {}
        item_inverse = static_cast<uint32_t>(0xffffffffu / static_cast<uint32_t>(item_rows) + 1);
    }
    // The item of a row, counted through; rows below 2^27.
    MLA_BOTH int32_t item_of(int32_t row) const { return static_cast<int32_t>(uint64_t{static_cast<uint32_t>(row)} * item_inverse >> 32); }
    // Items of so many rows of a sequence, or heads of a token.
    MLA_BOTH int32_t items_of(int32_t all) const { return item_of(all + item_rows - 1); }

    MLA_BOTH int64_t row(int32_t slot, int row) const { return static_cast<int64_t>(slot) * rows + row; }
    // Where a value of two bytes lies in its row.
    MLA_BOTH int narrow_column(int column) const { return narrow != nullptr && column >= 256 ? column + 256 : column; }
    MLA_BOTH int32_t* narrow_at(int32_t slot, int row, int column) const { return narrow + slot * 8 + row / 16 * 2 + column / 256; }
};

// How a step is attended to.
struct Attention {
    enum { hopper_fp8, hopper_bf16, tensor_cores, exact } kernel;
    int64_t items;
    Partials partials;
};

// Finds that, takes the scratch memory from the call's workspace, where it may be used until `attend` has been called, and launches the plan
// where there is one. `beside`: the kernel before makes nothing that the plan needs, and the plan is made meanwhile. `leaves_parts`: what is cut stays in parts, for `project_parts`.
int begin_attention(Call& call, const Attend& work, bool beside, Attention* attention);
int attend(const Attend& work, const Attention& attention, bool leaves_parts, cudaStream_t stream);

// The kernels behind it, and the rows (query tokens x heads of one sequence, or heads of one token with lists) of a block of each:
// SM90's own with products in e4m3 (fp8 rows) and in bf16 (bf16, fp8 and fp8_ds_mla rows; both R 512,
// Dr 64), tensor cores (any format but f32, R up to 512, Dr up to 64), and plain cores in f32 (everything).
constexpr int hopper_fp8_tile = 128, attend_tile = 64;  // keys of a tile: of the first, and of the next two
bool attend_takes_hopper_fp8(const Attend& work, const Device& device);
int hopper_fp8_rows(const Attend& work);
// Blocks of a cluster where one sequence is cut into many parts: they make one part of what they have. Not where blocks have fewer rows, for
// these have little to merge; and each token has blocks of its own, so that one that belongs to no sequence leaves some without rows.
constexpr int hopper_fp8_cluster = 2;
inline bool hopper_fp8_takes_clusters(const Attend& work, const Partials& partials) {
    return partials.item_rows == 64 && work.heads % partials.item_rows == 0 && !partials.by_token;
}
int attend_hopper_fp8(const Attend& work, const Partials& partials, cudaStream_t stream);
bool attend_takes_hopper_bf16(const Attend& work, const Device& device);
constexpr int hopper_bf16_rows = 64;
// Whether its parts may be float16. Over fp8 rows the code for it made steps without parts 2% slower.
MLA_BOTH constexpr bool hopper_bf16_halves(int32_t format) { return format != row_format::fp8; }
int attend_hopper_bf16(const Attend& work, const Partials& partials, cudaStream_t stream);
bool attend_takes_tensor_cores(const Attend& work, const Device& device);
int tensor_core_rows(const Attend& work, const Device& device);
int attend_tensor_cores(const Attend& work, const Partials& partials, const Device& device, cudaStream_t stream);
constexpr int exact_rows = 8;
int attend_exact(const Attend& work, const Partials& partials, cudaStream_t stream);

// The plan of a step of several sequences, and its kernel.
Plan take_plan(Workspace& workspace, const Attend& work, const Partials& partials);
int plan_attention(const Attend& work, const Partials& partials, bool beside, cudaStream_t stream);

#if defined(__CUDACC__)

// The last key that a token may see: its position, held inside the block table.
__device__ inline int32_t last_key(const Attend& work, int64_t token) {
    return min(work.step.positions[token], work.step.key_limit(work.layout.page_size) - 1);
}

// Keys in a token's list.
__device__ inline int32_t list_length(const Attend& work, int64_t token) {
    int64_t const length = work.index_lengths == nullptr ? work.top_k : work.index_lengths[token];
    return static_cast<int32_t>(length < 0 ? 0 : length < work.top_k ? length : work.top_k);
}

constexpr int32_t masked = 0x7fffffff;

// A cached row.
struct Row {
    const uint8_t* bytes;  // null where there is none
    float scale;  // of the whole row, where the format has one; else 1
    int32_t position;  // `masked` where there is none
};

// The row of a key on a page; a page outside of the pool has none.
__device__ inline Row row_at(const Attend& work, int32_t key, int32_t page) {
    const KvLayout& layout = work.layout;
    Row row{nullptr, layout.format == row_format::fp8_flat ? layout.kv_scale : 1.0f, masked};
    if (page < 0 || page >= work.step.pages) return row;
    int32_t const slot = key % layout.page_size;
    const uint8_t* page_bytes = work.pool + page * layout.page_bytes;
    row.bytes = page_bytes + static_cast<int64_t>(slot) * layout.row_bytes;
    if (layout.has_page_scales()) row.scale = reinterpret_cast<const float*>(page_bytes + layout.scales_offset)[slot];
    row.position = key;
    return row;
}

#endif

}  // namespace mla
