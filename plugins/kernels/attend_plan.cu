// How the keys of a step of several sequences are shared out among an attention kernel's blocks. Their lengths are in device memory.
//
// 1. An item whose tiles are more than a fair share of all work is cut into parts that are not, unless the step ends later so.
// 2. Parts are ranked, long ones first: blocks begin in the order of their numbers, and short parts fill what is left at the end.
// 3. Where the last wave leaves multiprocessors idle, each of its parts, from rank `head` on, is cut again into `pieces`.
//
// Items longer than a fair share are fewer than multiprocessors, and so are their fair shares: their parts are at most two for each
// multiprocessor. As many are the pieces of the last wave. So there are slots for four, and merges for two.
//
// One block, whose time every layer pays: it has little code, for it is cold each time, and divides little.
#include "attend_items.cuh"

namespace mla {
namespace {

constexpr int threads = 512, warps = threads / warp_size;
constexpr int32_t endless = 0x7fffffff;
constexpr unsigned all_lanes = 0xffffffffu;

// A sequence's items, the parts that the keys of each are cut into, and the tiles of a part. `rank` is that of the first part: ranks go
// through all items of one part, then through those of the next. Slots and merges are those of the entries before it.
struct Entry {
    int32_t sequence, first_token, rows, items, parts, tiles;
    int32_t rank, slot, merge;

    __device__ int32_t all() const { return items * parts; }
};

struct Board {
    Entry entries[threads];
    int2 order[threads];  // what ranks a sequence, and its parts
    // of warps; those of `tail` are of the last wave
    int32_t all[warps], tail_tiles[warps], tail_parts[warps], most_parts[warps], slots[warps], merges[warps], longest[warps];
    float work[warps];
};

__device__ inline int lane_of_thread() { return static_cast<int>(threadIdx.x) % warp_size; }
__device__ inline int warp_of_thread() { return static_cast<int>(threadIdx.x) / warp_size; }

// Sums and maxima (none below 0) over all threads, by way of the board: each has a row of it, and a barrier between put and get.
__device__ inline void put_sum(int32_t (&row)[warps], int32_t value) {
    value = warp_sum(value);
    if (lane_of_thread() == 0) row[warp_of_thread()] = value;
}
__device__ inline void put_max(int32_t (&row)[warps], int32_t value) {
    value = __reduce_max_sync(all_lanes, value);
    if (lane_of_thread() == 0) row[warp_of_thread()] = value;
}
__device__ inline int32_t get_sum(const int32_t (&row)[warps], int before = warps) {
    return warp_sum(lane_of_thread() < before ? row[lane_of_thread()] : 0);
}
__device__ inline int32_t get_max(const int32_t (&row)[warps]) {
    return __reduce_max_sync(all_lanes, lane_of_thread() < warps ? row[lane_of_thread()] : 0);
}

__device__ inline int32_t sum_of_lanes_before(int32_t value) {
    int32_t sum = value;
#pragma unroll
    for (int offset = 1; offset < warp_size; offset *= 2) {
        int32_t const lower = __shfl_up_sync(all_lanes, sum, offset);
        if (lane_of_thread() >= offset) sum += lower;
    }
    return sum - value;
}

struct Planner {
    const Attend& work;
    const Partials& results;
    int32_t const sequences, tile_shift, row_shift, first;  // of the thread's sequences, which follow each other
    int32_t const last;  // behind them
    int32_t const own;  // how many each thread has; where more than one, they are so many that their order matters little
    Board& board;
    Entry* const entries;

    __device__ Entry entry_of(int32_t sequence) const {
        int32_t const start = work.step.query_offsets[sequence], fresh = new_tokens(work, start, work.step.query_offsets[sequence + 1]);
        int32_t const rows = fresh * work.heads, limit = work.step.key_limit(work.layout.page_size);
        int64_t const keys = static_cast<int64_t>(work.step.cache_lengths[sequence]) + fresh;
        auto const held = static_cast<uint32_t>(keys < 0 ? 0 : keys < limit ? keys : limit);
        int32_t const items = (rows + results.rows - 1) >> row_shift;
        return {sequence, start, rows, items, 1, items == 0 ? 0 : static_cast<int32_t>((held + (1u << tile_shift) - 1) >> tile_shift)};
    }

    template <typename F>
    __device__ void for_own(F&& each) const {
#pragma unroll 1
        for (int32_t i = first; i < last; ++i) each(i);
    }

    // Entries in the order of their ranks, their items cut where they have more than `most_tiles`. Returns the number of parts.
    __device__ int32_t rank(int32_t most_tiles) const {
        int32_t parts = 0;
        for_own([&](int32_t sequence) {
            Entry entry = entry_of(sequence);
            if (entry.tiles > most_tiles) {
                entry.parts = min(ceil_div(entry.tiles, most_tiles), most_parts);
                entry.tiles = static_cast<int32_t>(ceilf(__fdividef(static_cast<float>(entry.tiles), static_cast<float>(entry.parts))));
            }
            parts += entry.all();
            entries[sequence] = entry;
            // long parts before short ones, then as the sequences are
            if (own == 1) board.order[sequence] = make_int2(min(entry.tiles, 0x3fffff) * threads + threads - 1 - sequence, entry.all());
        });
        put_sum(board.all, parts);
        __syncthreads();
        int32_t const all = get_sum(board.all);
        if (own > 1) {
            int32_t rank = sum_of_lanes_before(parts) + get_sum(board.all, warp_of_thread());
            for_own([&](int32_t sequence) {
                entries[sequence].rank = rank;
                rank += entries[sequence].all();
            });
            __syncthreads();
            return all;
        }
        // `lanes` threads for each sequence look at the others
        int32_t lanes = warp_size;
        while (lanes > 1 && lanes * sequences > threads) lanes /= 2;
        int32_t const sequence = static_cast<int32_t>(threadIdx.x) / lanes;
        int32_t const key = sequence < sequences ? board.order[sequence].x : endless;
        int32_t rank = 0, place = 0;
#pragma unroll 2
        for (int32_t other = static_cast<int32_t>(threadIdx.x) % lanes; other < sequences; other += lanes) {
            int2 const there = board.order[other];
            if (there.x > key) {
                rank += there.y;
                ++place;
            }
        }
        for (int32_t offset = 1; offset < lanes; offset *= 2) {
            rank += __shfl_xor_sync(all_lanes, rank, offset);
            place += __shfl_xor_sync(all_lanes, place, offset);
        }
        Entry entry;
        bool const writes = sequence < sequences && static_cast<int32_t>(threadIdx.x) % lanes == 0;
        if (writes) entry = entries[sequence];
        __syncthreads();
        if (writes) {
            entry.rank = rank;
            entries[place] = entry;
        }
        __syncthreads();
        return all;
    }

    // Into how many pieces each part of the last wave is cut; when the step ends then, in 1 / 16 of a tile's time; the most parts of an item.
    struct Cut {
        int32_t pieces, end, parts;
    };
    __device__ Cut cut_tail(int32_t all, int32_t head, int32_t fair) const {
        int32_t const processors = results.multiprocessors, tail = all - head;
        int32_t tail_tiles = 0, tail_parts = 1, parts = 1;
        for_own([&](int32_t i) {
            Entry const entry = entries[i];
            parts = max(parts, entry.parts);
            if (entry.rank + entry.all() <= head) return;
            tail_tiles = max(tail_tiles, entry.tiles);
            tail_parts = max(tail_parts, entry.parts);
        });
        put_max(board.tail_tiles, tail_tiles);
        put_max(board.tail_parts, tail_parts);
        put_max(board.most_parts, parts);
        __syncthreads();
        tail_tiles = get_max(board.tail_tiles);
        tail_parts = get_max(board.tail_parts);
        parts = get_max(board.most_parts);

        // A lane tries as many pieces as its number and one. No end is earlier than a fair one.
        int32_t const pieces = lane_of_thread() + 1, blocks = tail * pieces;
        bool const allowed =
            pieces == 1 || (blocks <= 2 * processors && tail_parts * pieces <= most_parts && 2 * pieces <= tail_tiles);
        float const waves = blocks > processors ? 2.0f : blocks > 0 ? 1.0f : 0.0f;
        float const piece = ceilf(__fdividef(static_cast<float>(tail_tiles), static_cast<float>(pieces)));
        float cost = roundf(__fdividef(static_cast<float>(head), static_cast<float>(processors))) * static_cast<float>(tail_tiles + block_tiles) +
                     waves * (piece + block_tiles);
        cost = fmaxf(cost, static_cast<float>(fair));
        if (parts > 1 || pieces > 1) {
            auto const merged = static_cast<float>(parts > 1 ? head + blocks : blocks);
            cost += 1.0f + merged * static_cast<float>(results.rows * work.layout.rank * 2 * static_cast<int>(sizeof(float))) / merge_bytes;
        }
        auto const end = static_cast<int32_t>(fminf(cost, 4e6f) * 16.0f) * warp_size + lane_of_thread();
        int32_t const best = __reduce_min_sync(all_lanes, allowed ? end : endless);
        return {best % warp_size + 1, best / warp_size, parts};
    }

    // The entry of a rank.
    __device__ Entry find(int32_t rank) const {
        int32_t low = 0, high = sequences;
#pragma unroll 1
        while (high - low > 1) {
            int32_t const middle = (low + high) / 2;
            if (entries[middle].rank <= rank) {
                low = middle;
            } else {
                high = middle;
            }
        }
        return entries[low];
    }

    // Slots and merges of the entries whose items were cut first. Returns how many there are of each.
    struct Results {
        int32_t slots, merges;
    };
    __device__ Results place_results() const {
        int32_t own_slots = 0, own_merges = 0;
        for_own([&](int32_t i) {
            if (entries[i].parts == 1) return;
            own_slots += entries[i].all();
            own_merges += entries[i].items;
        });
        put_sum(board.slots, own_slots);
        put_sum(board.merges, own_merges);
        __syncthreads();
        int32_t slot = sum_of_lanes_before(own_slots) + get_sum(board.slots, warp_of_thread());
        int32_t merge = sum_of_lanes_before(own_merges) + get_sum(board.merges, warp_of_thread());
        for_own([&](int32_t i) {
            if (entries[i].parts == 1) return;
            entries[i].slot = slot;
            entries[i].merge = merge;
            slot += entries[i].all();
            merge += entries[i].items;
        });
        __syncthreads();
        return {get_sum(board.slots), get_sum(board.merges)};
    }

    // What the blocks work on and what is merged, by all threads.
    __device__ void write(int32_t head, int32_t blocks, int32_t pieces, int32_t cut_merges) const {
        int32_t const tail_slots = 2 * results.multiprocessors;
#pragma unroll 1
        for (int32_t block = static_cast<int32_t>(threadIdx.x); block < blocks; block += threads) {
            bool const again = block >= head && pieces > 1;
            int32_t rank = block, piece = 0;
            if (again) {
                rank = head + (block - head) / pieces;
                piece = block - head - (rank - head) * pieces;
            }
            Entry const entry = find(rank);
            int32_t const part = (rank - entry.rank) / entry.items, number = rank - entry.rank - part * entry.items;
            Item item = rows_of_sequence(work, results.rows, entry.sequence, entry.first_token, entry.rows, number);
            int32_t const begin = part * pieces + piece;
            take_keys(work, results, item, begin, again ? 1 : pieces, entry.parts * pieces);
            item.slot = again ? tail_slots + block - head : entry.parts > 1 ? entry.slot + rank - entry.rank : -1;
            results.plan.items[block] = item;
            if (item.slot < 0) continue;

            // Ranks of an item's parts are the entry's items apart; those of rank `head` and more are cut again.
            int32_t whole = entry.parts, before = head - entry.rank - number;
            if (pieces > 1 && before < entry.all()) whole = before <= 0 ? 0 : ceil_div(before, entry.items);
            Merge merge{item.first_token, item.first_head, item.count, entry.slot + number, entry.items, whole,
                        tail_slots + (whole * entry.items - before) * pieces, entry.items * pieces, pieces,
                        (entry.parts - whole) * pieces};
            // first items of several parts; then one for each part of the last wave, for items of one
            if (entry.parts > 1 && begin == 0) results.plan.merges[entry.merge + number] = merge;
            if (again && piece == 0) {
                if (entry.parts > 1) merge.rows = 0;
                results.plan.merges[cut_merges + rank - head] = merge;
            }
        }
    }

    __device__ void run() const {
        float own_work = 0.0f;
        int32_t own_longest = 0;
        for_own([&](int32_t sequence) {
            Entry const entry = entry_of(sequence);
            own_work += static_cast<float>(entry.items) * static_cast<float>(entry.tiles + block_tiles);
            own_longest = max(own_longest, entry.tiles);
        });
        own_work = warp_sum(own_work);
        if (lane_of_thread() == 0) board.work[warp_of_thread()] = own_work;
        put_max(board.longest, own_longest);
        __syncthreads();
        float const all_work = warp_sum(lane_of_thread() < warps ? board.work[lane_of_thread()] : 0.0f);
        int32_t const longest = get_max(board.longest), processors = results.multiprocessors;
        int32_t const fair = max(static_cast<int32_t>(fminf(ceilf(all_work / static_cast<float>(processors)), 1e9f)), 2);

        int32_t most_tiles = longest > fair ? fair : endless, all, head;
        Cut cut;
#pragma unroll 1
        for (;;) {
            all = rank(most_tiles);
            head = all / processors * processors;
            cut = cut_tail(all, head, fair);
            if (most_tiles == endless || cut.end < 16 * (longest + block_tiles)) break;
            most_tiles = endless;
        }
        int32_t const tail = all - head, pieces = cut.pieces;
        Results const placed = cut.parts > 1 ? place_results() : Results{0, 0};
        // Offsets that overlap, as a builder's may, can give more than there is room for: then nothing is done.
        bool const fits = placed.slots <= 2 * processors && all <= most_items(work, results.rows, false) + processors;
        int32_t const blocks = fits ? head + tail * pieces : 0;
        if (threadIdx.x == 0) *results.plan.counts = {blocks, fits ? placed.merges + (pieces > 1 ? tail : 0) : 0};
        write(head, blocks, pieces, placed.merges);
    }
};

__global__ void __launch_bounds__(threads) plan_attention_kernel(Attend work, Partials results, bool after_append, Entry* entries) {
    __shared__ Board board;
    let_next_kernel_begin();
    if (!after_append) wait_for_kernel_before();
    auto const sequences = static_cast<int32_t>(work.step.sequences);
    int32_t const run = ceil_div(sequences, threads);
    Planner{work, results, sequences, 31 - __clz(results.tile), 31 - __clz(results.rows), min(static_cast<int32_t>(threadIdx.x) * run, sequences),
            min(static_cast<int32_t>(threadIdx.x + 1) * run, sequences), run, board, run > 1 ? entries : board.entries}
        .run();
    if (after_append) wait_for_kernel_before();  // for those who wait for this one
}

}  // namespace

Plan take_plan(Workspace& workspace, const Attend& work, const Partials& partials) {
    Plan plan{};
    plan.counts = workspace.take<Plan::Counts>(1);
    constexpr int least_rows = 16;  // of a block; a smaller step may have fewer than the largest
    // and one, as blocks are: they read their item before they know whether they have one
    plan.items = workspace.take<Item>(most_planned(work, least_rows, partials.multiprocessors) + work.step.sequences + 1);
    plan.merges = workspace.take<Merge>(partials.slots / 2);
    plan.scratch = workspace.take<Entry>(work.step.sequences > threads ? work.step.sequences : 0);
    return plan;
}

int plan_attention(const Attend& work, const Partials& partials, bool after_append, cudaStream_t stream) {
    Device device;
    if (int status = current_device(&device)) return status;
    auto* entries = static_cast<Entry*>(partials.plan.scratch);
    return launch_early("attention", plan_attention_kernel, 1, threads, 0, device, stream, work, partials, after_append, entries);
}

}  // namespace mla
