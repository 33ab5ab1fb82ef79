// Shared memory of a block of attend_hopper_fp8.cu, and how keys come into it.
#pragma once

#include <type_traits>

#include "attend_hopper.cuh"

namespace mla {
namespace hopper {

constexpr int tile = hopper_fp8_tile, half = 64;  // keys of a tile, and of a copy
constexpr int threads = 4 * group;
constexpr int score_registers = 96, sum_registers = 32, output_registers = 192;  // of a thread of each group
constexpr int pieces = 5;  // of a tile: four of the latent and the rope part
constexpr int piece_bytes = tile * 128, small_piece_bytes = tile * rope;  // the second: of the rope part as codes
constexpr int pages_ahead = 6;  // tiles whose pages are asked for before that tile's turn: so long before are they known to all who ask
constexpr int row_piece_bytes = 64 * 128;  // of the query
constexpr int table_bytes = 3 * tile * 4;  // of a tile's scales
// Two forms for at most 32 or 16 rows, two each for 48 and 64; each for all keys, and for lists of keys. Those of 64 rows also for all keys
// of one sequence, whose blocks are in clusters. All of them for rows of either format. Only the output's products are smaller of 48 rows.
enum class Keys { all, listed, of_clusters };
template <int row_count, int query_terms, Keys which, bool is_flat>
struct Form {
    static constexpr int rows = row_count, terms = query_terms;
    static constexpr bool lists = which == Keys::listed;
    static constexpr bool flat = is_flat;  // rows of fp8_flat, else of fp8
    // Rows have scales of their own. A listed row of fp8_flat has 1, and one that there is not 0.
    static constexpr bool scales = !flat || lists;
    static constexpr int cluster = which == Keys::of_clusters ? hopper_fp8_cluster : 1;
    static constexpr bool packed = rows <= 32;  // both terms in one product
    static constexpr bool second = terms == 2 && !packed;
    // Ropes of half a piece's size have places of their own, where room is scarcest. Not of lists, which have more of it to find rows.
    static constexpr bool apart = flat && second && !lists;
    static constexpr int ropes = apart ? 2 : 0;
    static constexpr int ring = apart ? 8 : second ? 9 : 11;  // places for pieces, for those of latents where ropes are apart
    // Both output groups use a piece at the same time, half of its columns each, so that pieces become free one after the other: where
    // the ring has no place for a whole tile beside the one that is multiplied.
    static constexpr bool halved = second && !lists;
    // Rows of the queries that come together, and warps that order them. Of lists all come at once.
    static constexpr int query_box = lists ? rows : rows == 16 ? 8 : 16, query_boxes = rows / query_box, orderers = lists ? 1 : 4;
    // Tables of scales. Of lists one more, as who finds their rows is a tile further than who adds weights up.
    static constexpr int tables = lists ? 4 : 3;
};

// Where things lie in shared memory, in bytes.
template <typename F>
struct Places {
    static constexpr int query = F::ring * piece_bytes + F::ropes * small_piece_bytes;
    static constexpr int query_low = query + pieces * row_piece_bytes;
    // Tables of the scales s of tiles: s and log2 s, each [8][4][4]: of each 16 keys four threads' fours, so that what threads read
    // together meets no bank twice; and the two terms of 1 / s in bfloat16, [8][4][2][4].
    static constexpr int scales = query_low + (F::second ? 4 * row_piece_bytes : 0);
    static constexpr int rescale = scales + (F::scales ? F::tables * table_bytes : 0);  // [2][64]
    static constexpr int tile_factors = rescale + 2 * 64 * 4;  // [2][64]
    static constexpr int changed = tile_factors + 2 * 64 * 4;  // [2][4], of the score group's warps
    static constexpr int tops = changed + 2 * 4 * 4;  // in the end [64], the rows' references
    static constexpr int query_scales = tops + 64 * 4;  // [64]
    static constexpr int factors = query_scales;  // in the end [64]
    static constexpr int limits = query_scales + 64 * 4;  // [64]
    static constexpr int part_lse = limits;  // of a block of a cluster, in the end [64]
    static constexpr int pages = limits + 64 * 4;  // [8][2], as the block table has them, of the halves of a tile
    static constexpr int raw_scales = pages + 8 * 2 * 4;  // [4][128]
    static constexpr int offsets = raw_scales;  // of listed rows in the pool, in 16 bytes, [4][128]: in their place
    static constexpr int scales_full = raw_scales + (F::scales ? 4 * tile * 4 : 0);  // [4][2], their barriers
    static constexpr int scales_barriers = F::scales && !F::lists ? 4 * 2 : 0;
    static constexpr int full = scales_full + scales_barriers * 8;  // barriers of the ring, then of the ropes
    static constexpr int queries_full = full + (F::ring + F::ropes) * 8;  // barriers of the queries as they come
    static constexpr int barriers = scales_barriers + F::ring + F::ropes;  // those of before
    static constexpr int scored = queries_full + F::query_boxes * 8;  // barriers [2] of tiles whose scores are made
    static constexpr int total = scored + (F::halved ? 2 * 8 : 0);
    static_assert(total <= 226 << 10);  // a kilobyte is the item's

    // Of the ring, ordered before the queries are codes: those of the first tile.
    static constexpr int early_pieces = F::apart ? pieces - 1 : pieces;
    // A column of the queries as they come: behind those pieces, in the ring's second tile, or else where the codes will be, row by row.
    MLA_BOTH static constexpr int raw_query(int column) {
        if (!F::second) return early_pieces * piece_bytes + column * F::rows * 128;
        return (column % 2 == 0 ? query : query_low) + column / 2 * row_piece_bytes;
    }
};

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)

template <typename F>
constexpr int own_rows = F::packed ? 1 : 2;  // of the scores of a thread

// P is 2^6 at a reference that stays, and a maximum may exceed it by 2^2.75: below 448. A tile whose maximum is much smaller than
// the reference has its own, or its weights would be too small for e4m3: many keys of little weight count beside one of much.
constexpr float weight_bits = 6.0f, spare_bits = 2.75f, low_bits = 8.0f, most_bits = 60.0f;

// An e4m3 code's bits at the places of an f32's are 2^-120 of it; half of that goes into 1 / s, so that nothing overflows.
constexpr float half_code_unit = 0x1p60f;
constexpr uint32_t two_code_units = 0x5d805d80u;  // two of that as bfloat16

// Named barriers. Ready and free: of the weights' two buffers.
enum : int {
    weights_ready = 1,
    weights_free = 3,
    scores_made = 5,
    piece_used = 6,
    rows_found = 10,
    queries_there = 11,
    tile_done = 12,
    tops_there = 13
};

// The ring of pieces. Piece `i` of the block's tile `n` is number 5 n + i, in slot (5 n + i) % ring. Columns of the pieces in
// order: the two output groups' first ones, their second ones, rope. Where ropes are apart the others are numbers 4 n + i, and the
// rope's slots come behind theirs.
template <typename F>
struct Ring {
    using P = Places<F>;
    uint8_t* memory;
    const CUtensorMap *map, *rope_map;
    const Item* item;
    int32_t count;  // tiles of this block

    static constexpr int in_turn = F::apart ? pieces - 1 : pieces;  // pieces of a tile that the ring has
    __device__ static constexpr int column(int i) { return i == 1 ? 2 : i == 2 ? 1 : i; }
    __device__ static constexpr bool is_small(int i) { return F::apart && i == 4; }
    __device__ static int slot(int32_t n, int i) {
        if (is_small(i)) return F::ring + static_cast<int>(static_cast<uint32_t>(n) % max(F::ropes, 1));
        return static_cast<int>(static_cast<uint32_t>(in_turn * n + i) % F::ring);
    }
    __device__ static int parity(int32_t n, int i) {
        if (is_small(i)) return static_cast<int>(static_cast<uint32_t>(n) / max(F::ropes, 1) & 1);
        return static_cast<int>(static_cast<uint32_t>(in_turn * n + i) / F::ring & 1);
    }

    // Of a slot, from the first one's place.
    __device__ static uint32_t offset(int slot, int i) {
        return is_small(i) ? F::ring * piece_bytes + (slot - F::ring) * small_piece_bytes : slot * piece_bytes;
    }
    __device__ uint32_t piece(int32_t n, int i) const { return shared_address(memory) + offset(slot(n, i), i); }
    // A tile's weights lie where its rope was.
    __device__ uint32_t weights(int32_t n) const { return piece(n, 4); }
    __device__ void wait(int32_t n, int i) const {
        barrier_wait(shared_address(memory + P::full) + 8 * slot(n, i), parity(n, i));
    }

    // Asks for the first tiles' pages. By the warp that then begins with them.
    __device__ void fetch_pages(const Attend& work) const {
        int const lane = threadIdx.x % warp_size;
        if (lane < 2 * pages_ahead) fetch_page(work, lane / 2, lane % 2);
    }

    // Orders the pieces that come before the queries are codes, and the scales of three tiles; `bring_scales` goes on from there.
    __device__ void begin(const Attend& work) const {
        copy_async_wait<0>();
        __syncwarp();
#pragma unroll 1
        for (int i = 0; i < in_turn; ++i) order_in_turn(work, 0, i);
        if (F::apart) order(work, 0, 4);
#pragma unroll 1
        for (int i = 0; i < 6; ++i) order_scales(work, i / 2, i % 2);
    }

    // Orders what else the ring has place for.
    __device__ void fill(const Attend& work) const {
#pragma unroll 1
        for (int i = P::early_pieces; i < F::ring; ++i) order_in_turn(work, i / in_turn, i % in_turn);
#pragma unroll 1
        for (int n = 1; n < F::ropes; ++n) order(work, n, 4);
    }

    // Orders the piece that takes the place of piece i of tile n, when that one is used up. By a warp.
    __device__ void order_after(const Attend& work, int32_t n, int i) const {
        if (is_small(i)) return order(work, n + F::ropes, i);
        int const later = i + F::ring % in_turn;
        order(work, n + F::ring / in_turn + (later >= in_turn), later >= in_turn ? later - in_turn : later);
    }

    // By a warp. Halves without a page come from outside of the map.
    __device__ void order(const Attend& work, int32_t n, int i) const {
        if (is_small(i)) {
            order_to(work, n, slot(n, i), piece(n, i), rope_map, rank, small_piece_bytes);
        } else {
            order_in_turn(work, n, i);
        }
    }
    __device__ void order_in_turn(const Attend& work, int32_t n, int i) const {
        int const slot = static_cast<int>(static_cast<uint32_t>(in_turn * n + i) % F::ring);
        order_to(work, n, slot, shared_address(memory) + slot * piece_bytes, map, column(i) * 128, piece_bytes);
    }
    __device__ void order_to(const Attend& work, int32_t n, int slot, uint32_t target, const CUtensorMap* from, int byte, int bytes) const {
        if (n >= count) return;
        uint32_t const barrier = shared_address(memory + P::full) + 8 * slot;
        int32_t const page[2] = {page_of_half(work, n, 0), page_of_half(work, n, 1)};
        if (elect_lane()) {
            barrier_expect(barrier, bytes);
#pragma unroll
            for (int h = 0; h < 2; ++h) copy_box(target + h * (bytes / 2), from, barrier, byte, row_of_half(work, n, h), page[h], 0);
        }
    }

    // Orders the scales of a half's rows, by a warp; without a page any others.
    __device__ void order_scales(const Attend& work, int32_t n, int h) const {
        if (!F::scales || n >= count) return;
        int32_t const page = page_of_half(work, n, h);
        uint32_t const barrier = shared_address(memory + P::scales_full) + (n % 4 * 2 + h) * 8;
        const uint8_t* scales =
            work.pool + (page < work.step.pages ? page : 0) * work.layout.page_bytes + work.layout.scales_offset;
        if (elect_lane()) {
            barrier_expect(barrier, half * 4);
            copy_bytes(shared_address(memory + P::raw_scales) + (n % 4 * tile + h * half) * 4, scales + 4 * row_of_half(work, n, h),
                       half * 4, barrier);
        }
    }

    // At tile n: orders the scales of tile n + 3, whose pages have been asked for, and asks for pages. Of a half, by a warp.
    __device__ void bring_scales(const Attend& work, int32_t n, int h) const {
        copy_async_wait<0>();
        __syncwarp();
        order_scales(work, n + 3, h);
        if (elect_lane()) fetch_page(work, n + pages_ahead, h);
    }

    // What the softmax needs of the scale of key `key` of tile n.
    __device__ void make_scale(const Attend& work, int32_t n, int key) const {
        if (n >= count) return;
        barrier_wait(shared_address(memory + P::scales_full) + (n % 4 * 2 + key / half) * 8, n / 4 & 1);
        int32_t const page = page_of_half(work, n, key / half);
        float const scale = reinterpret_cast<const float*>(memory + P::raw_scales)[n % 4 * tile + key];
        put_scale(n, key, page < static_cast<int32_t>(work.step.pages) ? scale : 0.0f);
    }

    // 0, or what else is no scale (what was never written may be anything), makes the key's weight 0.
    __device__ void put_scale(int32_t n, int key, float scale) const {
        bool const there = scale > 0.0f;
        uint8_t* scales = memory + P::scales + n % F::tables * table_bytes;
        auto* table = reinterpret_cast<float*>(scales) + key / 16 * 16 + key % 8 / 2 * 4 + key % 16 / 8 * 2 + key % 2;
        table[0] = there ? scale : 0.0f;
        table[tile] = there ? fast_log2(scale) : -INFINITY;
        float const inverse = there ? fminf(half_code_unit * fast_inverse(scale), 1e37f) : 0.0f;  // finite: P may be 0
        auto* terms = reinterpret_cast<__nv_bfloat16*>(scales + 2 * (tile * 4)) + (key / 16 * 4 + key % 8 / 2) * 8 + key % 2 * 2 + key % 16 / 8;
        __nv_bfloat16 const high = __float2bfloat16_rn(inverse);
        terms[0] = high;
        terms[4] = __float2bfloat16_rn(inverse - __bfloat162float(high));
    }

    // Zeros for the values of keys behind the last one, which were never written and may be NaN. By `group` threads.
    __device__ void clear_tail(int32_t n, int thread) const {
        int const from = keys(n) * 8, to = tile * 8;
#pragma unroll 1
        for (int i = 0; i < 4; ++i) {
            auto* units = reinterpret_cast<uint4*>(memory + slot(n, i) * piece_bytes);
#pragma unroll 1
            for (int unit = from + thread; unit < to; unit += group) units[unit] = make_uint4(0, 0, 0, 0);
        }
    }

    // Copies a piece of listed rows, by the `group` threads of an output group. Rows that there are not become zeros.
    __device__ void gather(const Attend& work, int32_t n, int i, int thread) const {
        if (n >= count) return;
        int const unit = thread % 8, first_row = thread / 8;
        const auto* offsets = reinterpret_cast<const uint32_t*>(memory + P::offsets) + n % 4 * tile + first_row;
        uint32_t const target = piece(n, i) + first_row * 128 + ((unit ^ (first_row & 7)) << 4);
        const uint8_t* source = work.pool + column(i) * 128 + unit * 16;
        if (!F::flat || i != 4 || unit < rope / 16) {
#pragma unroll
            for (int k = 0; k < tile / 16; ++k) {
                uint32_t const offset = offsets[16 * k];
                bool const there = offset != no_row;
                copy_async_16(target + k * 2048, source + (there ? static_cast<uint64_t>(offset) * 16 : 0), there);
            }
        }
        barrier_arrive_after_copies(shared_address(memory + P::full) + 8 * slot(n, i));
    }
    __device__ void gather_after(const Attend& work, int32_t n, int i, int thread) const {
        int const later = i + F::ring % pieces;
        gather(work, n + F::ring / pieces + (later >= pieces), later >= pieces ? later - pieces : later, thread);
    }

    __device__ int row_of_half(const Attend& work, int32_t n, int h) const {
        return ((first_tile() + n) * tile + h * half) & (work.layout.page_size - 1);
    }

    __device__ int32_t first_tile() const { return item->first_tile; }

    // Keys of tile n that exist.
    __device__ int keys(int32_t n) const { return n < count ? min(item->keys - (first_tile() + n) * tile, tile) : 0; }

    __device__ int32_t page_of_half(const Attend& work, int32_t n, int h) const {
        auto const page = reinterpret_cast<const uint32_t*>(memory + P::pages)[n % 8 * 2 + h];
        return static_cast<int32_t>(min(page, static_cast<uint32_t>(work.step.pages)));
    }

    // Asks for a half's entry of the block table; it is there after copy_async_wait.
    __device__ void fetch_page(const Attend& work, int32_t n, int h) const {
        uint8_t* target = memory + P::pages + (n % 8 * 2 + h) * 4;
        if (h * half >= keys(n)) {
            *reinterpret_cast<int32_t*>(target) = -1;
            return;
        }
        int32_t const key = (first_tile() + n) * tile + h * half;
        const int32_t* entry = work.step.block_table + item->sequence * work.step.max_pages + (key >> (31 - __clz(work.layout.page_size)));
        copy_async_4(shared_address(target), entry);
        copy_async_commit();
    }
};

// Finds the rows of listed keys: entry, page and scale are asked for a tile's time before they are needed. For the thread that
// has key `key` of each tile.
template <typename F>
struct ListFinder {
    using P = Places<F>;
    int32_t entry_next, page_next, entry_later;  // of tiles n + 3 and n + 4
    float scale;  // of tile n + 2; 0: there is no such row

    // Rows of the first three tiles, and the scales of the first two.
    __device__ void begin(const Attend& work, const Item& item, const Ring<F>& ring, int key) {
        int32_t entries[5], found[4];
        float scales[3];
#pragma unroll
        for (int n = 0; n < 5; ++n) entries[n] = entry(work, item, ring, n, key);
#pragma unroll
        for (int n = 0; n < 4; ++n) found[n] = page(work, item, entries[n]);
#pragma unroll
        for (int n = 0; n < 3; ++n) scales[n] = put_row(work, ring, n, key, entries[n], found[n]);
        for (int n = 0; n < 2; ++n) {
            if (n < ring.count) ring.put_scale(n, key, scales[n]);
        }
        scale = scales[2];
        entry_next = entries[3];
        page_next = found[3];
        entry_later = entries[4];
    }

    // At tile n: the scale of tile n + 2 and the row of tile n + 3.
    __device__ void advance(const Attend& work, const Item& item, const Ring<F>& ring, int32_t n, int key) {
        if (n + 2 < ring.count) ring.put_scale(n + 2, key, scale);
        scale = put_row(work, ring, n + 3, key, entry_next, page_next);
        entry_next = entry_later;
        page_next = page(work, item, entry_next);
        entry_later = entry(work, item, ring, n + 5, key);
    }

private:
    __device__ static int32_t entry(const Attend& work, const Item& item, const Ring<F>& ring, int32_t n, int key) {
        if (n >= ring.count || key >= ring.keys(n)) return -1;
        return work.indices[item.first_token * work.top_k + (ring.first_tile() + n) * tile + key];
    }

    __device__ static int32_t page(const Attend& work, const Item& item, int32_t entry) {
        if (entry < 0 || entry > last_key(work, item.first_token)) return -1;
        return work.step.block_table[item.sequence * work.step.max_pages + (entry >> (31 - __clz(work.layout.page_size)))];
    }

    __device__ static float put_row(const Attend& work, const Ring<F>& ring, int32_t n, int key, int32_t entry, int32_t page) {
        bool const there = page >= 0 && page < work.step.pages;
        int32_t const slot = entry & (work.layout.page_size - 1);
        int64_t const page_start = there ? page * work.layout.page_bytes : 0;
        reinterpret_cast<uint32_t*>(ring.memory + P::offsets)[n % 4 * tile + key] =
            there ? static_cast<uint32_t>((page_start + slot * work.layout.row_bytes) / 16) : no_row;
        if (!there) return 0.0f;
        return F::flat ? 1.0f : reinterpret_cast<const float*>(work.pool + page_start + work.layout.scales_offset)[slot];
    }
};

#endif

}  // namespace hopper
}  // namespace mla
