// How the keys of a step of several sequences are shared out among an attention kernel's blocks. Their lengths are in device memory.
//
// 1. An item whose tiles are more than a fair share of all work is cut into equal parts that are not, unless the step ends later so.
// 2. Parts are ranked, long ones first: blocks begin in the order of their numbers, and short parts fill what is left at the end. Where all begin
//    at once, or are as long, any order does.
// 3. Where the last wave leaves multiprocessors idle, each of its parts, from rank `head` on, is cut again into `pieces`.
//
// Where lengths differ and items are few, 1 and 3 are not done: fair shares are cut off, and what is left of an item is a part by itself, a
// rest, ranked as what it is. A multiprocessor has a share then, or a short item and a rest. Only if these do not fit together is it undone.
//
// Items longer than a fair share are fewer than multiprocessors, and so are their fair shares: their parts are at most two for each
// multiprocessor, and shares and rests are no more. As many are the pieces of the last wave. So there are slots for four, and merges for two.
//
// One block, whose time every layer pays: it has little code, for it is cold each time, and divides little.
#include <algorithm>

#include "attend_items.cuh"

namespace mla {
namespace {

constexpr int threads = 512, warps = threads / warp_size;
constexpr int32_t endless = 0x7fffffff;
constexpr int32_t least_share = 4 * block_tiles;  // that leaves rests: much beside what a block takes besides
constexpr unsigned all_lanes = 0xffffffffu;

struct Sequence {
    int32_t first_token, rows, items, tiles, cached;
};

// A sequence's items, the parts that the keys of each are cut into, and the tiles of a part; or the rests of these items. `rank` is that of
// the first part: ranks go through all items of one part, then through those of the next. Slots (of the entry's own first part) and merges
// are behind those of the sequences before.
struct Entry {
    int32_t sequence, items, parts, tiles;
    int32_t of_item;  // parts, with the rest
    int32_t begin;  // parts of the item before the entry's: 0, or of a rest all others
    int32_t rank, slot, merge;

    __device__ int32_t all() const { return items * parts; }

    // What is left of an item's tiles.
    __device__ Entry rest(int32_t item_tiles) const {
        Entry other = *this;
        other.begin = parts;
        other.parts = of_item - parts;
        other.tiles = item_tiles - parts * tiles;
        other.slot = slot + parts * items;
        return other;
    }
};

struct Board {
    Sequence held[threads];
    Entry entries[threads];
    alignas(16) int2 order[threads];  // what ranks a sequence, and its parts
    // of warps; those of `tail` are of the last wave
    int32_t all[warps], tail_tiles[warps], tail_parts[warps], slots[warps], merges[warps], longest[warps], shortest[warps], items[warps], pairs[warps];
    float work[warps];
};

__device__ inline int lane_of_thread() { return static_cast<int>(threadIdx.x) % warp_size; }
__device__ inline int warp_of_thread() { return static_cast<int>(threadIdx.x) / warp_size; }

// Of numbers that are not below 0: half of the instructions that signs would need.
__device__ inline int32_t divide(int32_t value, int32_t divisor) {
    return static_cast<int32_t>(static_cast<uint32_t>(value) / static_cast<uint32_t>(divisor));
}
__device__ inline int32_t divide_up(int32_t value, int32_t divisor) { return divide(value + divisor - 1, divisor); }

// Sums and maxima (none below 0) over all threads, by way of the board: each has a row of it, and a barrier between put and get.
__device__ inline void put_sum(int32_t (&row)[warps], int32_t value) {
    value = __reduce_add_sync(all_lanes, value);
    if (lane_of_thread() == 0) row[warp_of_thread()] = value;
}
__device__ inline void put_max(int32_t (&row)[warps], int32_t value) {
    value = __reduce_max_sync(all_lanes, value);
    if (lane_of_thread() == 0) row[warp_of_thread()] = value;
}
__device__ inline int32_t get_sum(const int32_t (&row)[warps], int before = warps) {
    return __reduce_add_sync(all_lanes, lane_of_thread() < before ? row[lane_of_thread()] : 0);
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

// `many`: more sequences than threads. Each thread has some that follow each other then, they lie in device memory, and their order matters
// little.
template <bool many>
struct Planner {
    const Attend& work;
    const Partials& results;
    int32_t const sequences, tile_shift, first, last;  // of the thread's sequences; `last` is behind them
    int32_t const most;  // parts that there is room for before the last wave is cut
    Board& board;
    Entry* const all_entries;
    int32_t count;  // of entries: sequences, and as many rests where there are any

    __device__ Entry* entries() const { return many ? all_entries : board.entries; }
    __device__ Sequence* held() const { return many ? reinterpret_cast<Sequence*>(all_entries + sequences) : board.held; }

    __device__ Sequence look_at(int32_t sequence) const {
        int32_t const start = work.step.query_offsets[sequence], fresh = new_tokens(work, start, work.step.query_offsets[sequence + 1]);
        int32_t const rows = fresh * work.heads;
        int32_t const cached = work.step.cache_lengths[sequence], items = results.items_of(rows);
        int32_t const tiles = static_cast<int32_t>((keys_with(cached, fresh) + (1u << tile_shift) - 1) >> tile_shift);
        return {start, rows, items, items == 0 ? 0 : tiles, cached};
    }

    // Keys of a sequence, its first `fresh` new tokens among them.
    __device__ int32_t keys_with(int32_t cached, int64_t fresh) const {
        int64_t const keys = cached + fresh, limit = work.step.key_limit(work.layout.page_size);
        return static_cast<int32_t>(keys < 0 ? 0 : keys < limit ? keys : limit);
    }

    template <typename F>
    __device__ void for_own(F&& each) const {
        if constexpr (many) {
#pragma unroll 1
            for (int32_t i = first; i < last; ++i) each(i);
        } else if (first < last) {
            each(first);
        }
    }

    // Parts of all entries; slots and merges of those whose items are in parts.
    struct Ranked {
        int32_t all, slots, merges;
    };
    // Entries in the order of their ranks, their items cut where they have more than `most_tiles`: into equal parts, or `rests` are left. `uneven`:
    // items differ in tiles.
    __device__ Ranked rank(int32_t most_tiles, bool rests, bool uneven) {
        int32_t parts = 0, own_slots = 0, own_merges = 0;
        auto put = [&](int32_t place, const Entry& entry) {
            entries()[place] = entry;
            // long parts before short ones, then as the sequences are
            if (!many) board.order[place] = make_int2(min(entry.tiles, 0x3fffff) * threads + threads - 1 - place, entry.all());
        };
        for_own([&](int32_t sequence) {
            int32_t const tiles = held()[sequence].tiles;
            Entry entry{sequence, held()[sequence].items, 1, tiles, 1};
            if (tiles > most_tiles) {
                entry.of_item = min(divide_up(tiles, most_tiles), most_parts);
                entry.parts = rests ? divide(tiles, most_tiles) : entry.of_item;
                entry.tiles = rests ? most_tiles : divide_up(tiles, entry.of_item);
            }
            parts += entry.items * entry.of_item;
            if (entry.of_item > 1) {
                own_slots += entry.items * entry.of_item;
                own_merges += entry.items;
            }
            put(sequence, entry);
        });
        put_sum(board.all, parts);
        put_sum(board.slots, own_slots);
        put_sum(board.merges, own_merges);
        __syncthreads();
        Ranked const ranked{get_sum(board.all), get_sum(board.slots), get_sum(board.merges)};
        count = rests ? 2 * sequences : sequences;
        if (ranked.merges > 0) {
            int32_t slot = sum_of_lanes_before(own_slots) + get_sum(board.slots, warp_of_thread());
            int32_t merge = sum_of_lanes_before(own_merges) + get_sum(board.merges, warp_of_thread());
            for_own([&](int32_t sequence) {
                Entry& entry = entries()[sequence];
                entry.slot = slot;
                entry.merge = merge;
                if (rests) put(sequences + sequence, entry.rest(held()[sequence].tiles));
                if (entry.of_item == 1) return;
                slot += entry.items * entry.of_item;
                merge += entry.items;
            });
            __syncthreads();
        }
        if (many || (!rests && (!uneven || ranked.all <= results.multiprocessors))) {
            int32_t rank = sum_of_lanes_before(parts) + get_sum(board.all, warp_of_thread());
            for_own([&](int32_t sequence) {
                entries()[sequence].rank = rank;
                rank += entries()[sequence].all();
            });
            __syncthreads();
            return ranked;
        }
        // `lanes` threads for each entry look at the others
        int shift = 5;
        while (shift > 0 && count << shift > threads) --shift;
        int32_t const lanes = 1 << shift, lane = static_cast<int32_t>(threadIdx.x) & (lanes - 1), looked = static_cast<int32_t>(threadIdx.x) >> shift;
        int32_t const key = looked < count ? board.order[looked].x : endless;
        int32_t rank = 0, place = 0;
#pragma unroll 2
        for (int32_t other = 2 * lane; other < count; other += 2 * lanes) {
            int4 const two = *reinterpret_cast<const int4*>(board.order + other);
            if (two.x > key) {
                rank += two.y;
                ++place;
            }
            if (two.z > key && other + 1 < count) {
                rank += two.w;
                ++place;
            }
        }
        for (int32_t offset = 1; offset < lanes; offset *= 2) {
            rank += __shfl_xor_sync(all_lanes, rank, offset);
            place += __shfl_xor_sync(all_lanes, place, offset);
        }
        Entry entry;
        bool const writes = looked < count && lane == 0;
        if (writes) entry = entries()[looked];
        __syncthreads();
        if (writes) {
            entry.rank = rank;
            entries()[place] = entry;
        }
        __syncthreads();
        return ranked;
    }

    // Into how many pieces each part of the last wave is cut; when the step ends then, in 1 / 16 of a tile's time.
    struct Cut {
        int32_t pieces, end;
    };
    __device__ Cut cut_tail(const Ranked& ranked, int32_t head, int32_t fair) const {
        int32_t const processors = results.multiprocessors, tail = ranked.all - head;
        int32_t tail_tiles = 0, tail_parts = 1;
        for_own([&](int32_t i) {
            Entry const entry = entries()[i];
            if (entry.rank + entry.all() <= head) return;
            tail_tiles = max(tail_tiles, entry.tiles);
            tail_parts = max(tail_parts, entry.parts);
        });
        put_max(board.tail_tiles, tail_tiles);
        put_max(board.tail_parts, tail_parts);
        __syncthreads();
        tail_tiles = get_max(board.tail_tiles);
        tail_parts = get_max(board.tail_parts);

        // A lane tries as many pieces as its number and one. No end is earlier than a fair one.
        int32_t const pieces = lane_of_thread() + 1, blocks = tail * pieces;
        bool const allowed =
            pieces == 1 || (blocks <= 2 * processors && tail_parts * pieces <= most_parts && 2 * pieces <= tail_tiles);
        float const waves = blocks > processors ? 2.0f : blocks > 0 ? 1.0f : 0.0f;
        float const piece = ceilf(__fdividef(static_cast<float>(tail_tiles), static_cast<float>(pieces)));
        float cost = roundf(__fdividef(static_cast<float>(head), static_cast<float>(processors))) * static_cast<float>(tail_tiles + block_tiles) +
                     waves * (piece + block_tiles);
        cost = fmaxf(cost, static_cast<float>(fair));
        if (ranked.merges > 0 || pieces > 1) {
            auto const merged = static_cast<float>(ranked.merges > 0 ? head + blocks : blocks);
            cost += 1.0f + merged * static_cast<float>(results.item_rows * work.layout.rank * 2 * static_cast<int>(sizeof(float))) / merge_bytes;
        }
        auto const end = static_cast<int32_t>(fminf(cost, 4e6f) * 16.0f) * warp_size + lane_of_thread();
        int32_t const best = __reduce_min_sync(all_lanes, allowed ? end : endless);
        return {best % warp_size + 1, best / warp_size};
    }

    // Over all threads.
    __device__ float sum_work(float own_work) const {
        own_work = warp_sum(own_work);
        if (lane_of_thread() == 0) board.work[warp_of_thread()] = own_work;
        __syncthreads();
        float const all = warp_sum(lane_of_thread() < warps ? board.work[lane_of_thread()] : 0.0f);
        __syncthreads();
        return all;
    }

    // Tiles of a multiprocessor, were the work shared out evenly.
    __device__ int32_t fair_share(float all_work) const {
        return max(static_cast<int32_t>(fminf(ceilf(all_work / static_cast<float>(results.multiprocessors)), 1e9f)), 2);
    }

    // Where lengths differ (the longest is 1.25 times their mean), and each multiprocessor has one or two parts: with more of them, whole ones
    // fill the end as well.
    __device__ bool may_leave_rests(float all_work, int32_t items, int32_t longest) const {
        float const tiles = all_work - static_cast<float>(block_tiles * items);
        return !many && 2 * sequences <= threads && 2 * items <= 3 * results.multiprocessors &&
               static_cast<float>(longest) * static_cast<float>(4 * items) > 5.0f * tiles;
    }

    // Tiles of a share that leaves rests.
    __device__ int32_t find_share(int32_t fair) const {
        int32_t share = max(fair - block_tiles, 2);
#pragma unroll 1
        for (int i = 0; i < 3; ++i) {  // a smaller share makes more parts, and these more work
            float own_work = 0.0f;
            for_own([&](int32_t sequence) {
                Sequence const own = held()[sequence];
                own_work += static_cast<float>(own.items) * static_cast<float>(own.tiles + block_tiles * divide_up(own.tiles, share));
            });
            share = max(fair_share(sum_work(own_work)) - block_tiles, 2);
        }
        return share;
    }

    // What a multiprocessor takes at most where parts are at most two for each: the longest and the shortest one, and so on.
    __device__ int32_t tiles_of_pairs(int32_t all) const {
        int32_t const processors = results.multiprocessors;
        int32_t tiles = 0;
#pragma unroll 1
        for (int32_t i = static_cast<int32_t>(threadIdx.x); i < processors; i += threads) {
            int32_t pair = 0;
#pragma unroll 1
            for (int turn = 0; turn < 2; ++turn) {
                int32_t const place = turn == 0 ? i : 2 * processors - 1 - i;
                if (place < all) pair += find(place).tiles + block_tiles;
            }
            tiles = max(tiles, pair);
        }
        put_max(board.pairs, tiles);
        __syncthreads();
        return get_max(board.pairs);
    }

    // The entry of a rank.
    __device__ Entry find(int32_t rank) const {
        int32_t low = 0, high = count;
#pragma unroll 1
        while (high - low > 1) {
            int32_t const middle = (low + high) / 2;
            if (entries()[middle].rank <= rank) {
                low = middle;
            } else {
                high = middle;
            }
        }
        return entries()[low];
    }

    // What the blocks work on and what is merged, by all threads. `share`: that leaves rests; 0: parts are equal.
    __device__ void write(int32_t head, int32_t blocks, int32_t pieces, int32_t cut_merges, int32_t share) const {
        int32_t const tail_slots = 2 * results.multiprocessors;
#pragma unroll 1
        for (int32_t block = static_cast<int32_t>(threadIdx.x); block < blocks; block += threads) {
            bool const again = block >= head && pieces > 1;
            int32_t rank = block, piece = 0;
            if (again) {
                rank = head + divide(block - head, pieces);
                piece = block - head - (rank - head) * pieces;
            }
            Entry const entry = find(rank);
            int32_t const part = divide(rank - entry.rank, entry.items), number = rank - entry.rank - part * entry.items;
            Sequence const from = held()[entry.sequence];
            Item item = rows_of_sequence(work, results.item_rows, entry.sequence, from.first_token, from.rows, number);
            int32_t const begin = part * pieces + piece;
            int32_t const keys = keys_with(from.cached, last_token_of(work, item) + 1 - from.first_token);
            if (share > 0) {
                take_keys_of(keys, results, item, 0, 1, 1);
                item.first_tile = min(entry.begin * share + part * entry.tiles, item.last_tile);
                item.last_tile = min(item.first_tile + entry.tiles, item.last_tile);
            } else {
                take_keys_of(keys, results, item, begin, again ? 1 : pieces, entry.parts * pieces);
            }
            item.slot = again ? tail_slots + block - head : entry.of_item > 1 ? entry.slot + rank - entry.rank : -1;
            results.plan.items[block] = item;
            if (item.slot < 0) continue;

            // Ranks of an item's parts are the entry's items apart; those of rank `head` and more are cut again.
            int32_t whole = entry.of_item, before = head - entry.rank - number;
            if (pieces > 1 && before < entry.all()) whole = before <= 0 ? 0 : divide_up(before, entry.items);
            Merge merge{item.first_token, item.first_head, item.count, entry.slot + number, entry.items, whole,
                        tail_slots + (whole * entry.items - before) * pieces, entry.items * pieces, pieces,
                        (entry.of_item - whole) * pieces};
            // first items of several parts; then one for each part of the last wave, for items of one
            if (entry.of_item > 1 && entry.begin + begin == 0) results.plan.merges[entry.merge + number] = merge;
            if (again && piece == 0) {
                if (entry.of_item > 1) merge.rows = 0;
                results.plan.merges[cut_merges + rank - head] = merge;
            }
        }
    }

    __device__ void run() {
        float own_work = 0.0f;
        int32_t own_longest = 0, own_missing = 0, own_items = 0;  // the shortest by what it has less than the most
        for_own([&](int32_t sequence) {
            Sequence const own = look_at(sequence);
            held()[sequence] = own;
            own_work += static_cast<float>(own.items) * static_cast<float>(own.tiles + block_tiles);
            own_longest = max(own_longest, own.tiles);
            if (own.items > 0) own_missing = max(own_missing, endless - own.tiles);
            own_items += own.items;
        });
        put_max(board.longest, own_longest);
        put_max(board.shortest, own_missing);
        put_sum(board.items, own_items);
        float const all_work = sum_work(own_work);
        int32_t const fair = fair_share(all_work), longest = get_max(board.longest), shortest = endless - get_max(board.shortest);
        int32_t const items = get_sum(board.items);
        int32_t const processors = results.multiprocessors;

        int32_t most_tiles = longest > fair ? fair : endless, head = 0;
        bool rests = false, fits;
        if (longest > fair && may_leave_rests(all_work, items, longest)) {
            int32_t const share = find_share(fair);
            rests = share >= least_share && share < longest && longest <= most_parts * share;
            if (rests) most_tiles = share;
        }
        Ranked ranked;
        Cut cut{1, 0};
#pragma unroll 1
        for (;;) {  // one place for what is done several times: each instruction is waited for
            ranked = rank(most_tiles, rests, shortest < longest);
            // Offsets that overlap, as a builder's may, can give more than there is room for: then nothing is done.
            fits = ranked.slots <= 2 * processors && ranked.all <= most;
            if (rests) {
                head = ranked.all;  // they fit together: within a fifth more than a share
                if (fits && head <= 2 * processors && 5 * tiles_of_pairs(head) <= 6 * (most_tiles + block_tiles)) break;
                rests = false;
                most_tiles = fair;
                continue;
            }
            head = divide(ranked.all, processors) * processors;
            cut = cut_tail(ranked, head, fair);
            if (most_tiles == endless || cut.end < 16 * (longest + block_tiles)) break;
            most_tiles = endless;
        }
        int32_t const tail = ranked.all - head, pieces = cut.pieces, blocks = fits ? head + tail * pieces : 0;
        if (threadIdx.x == 0) *results.plan.counts = {blocks, fits ? ranked.merges + (pieces > 1 ? tail : 0) : 0};
        write(head, blocks, pieces, ranked.merges, rests ? most_tiles : 0);
    }
};

template <bool many>
__global__ void __launch_bounds__(threads) plan_attention_kernel(Attend work, Partials results, bool beside, int32_t most) {
    __shared__ Board board;
    let_next_kernel_begin();
    auto const sequences = static_cast<int32_t>(work.step.sequences), run = many ? divide_up(sequences, threads) : 1;
    int32_t const first = min(static_cast<int32_t>(threadIdx.x) * run, sequences);
    if (first < sequences) {
        prefetch(work.step.query_offsets + first);
        prefetch(work.step.cache_lengths + first);
    }
    if (!beside) wait_for_kernel_before();
    Planner<many>{work, results, sequences, 31 - __clz(results.tile), first, min(first + run, sequences), most, board,
                  static_cast<Entry*>(results.plan.scratch), sequences}
        .run();
    if (beside) wait_for_kernel_before();  // for those who wait for this one
}

}  // namespace

Plan take_plan(Workspace& workspace, const Attend& work, const Partials& partials) {
    Plan plan{};
    plan.counts = workspace.take<Plan::Counts>(1);
    constexpr int least_rows = 16;  // of a block; a smaller step may have fewer than the largest
    // and one, as blocks are: they read their item before they know whether they have one
    plan.items = workspace.take<Item>(most_planned(work, least_rows, partials.multiprocessors) + work.step.sequences + 1);
    plan.merges = workspace.take<Merge>(partials.slots / 2);
    int64_t const in_memory = work.step.sequences > threads ? work.step.sequences : 0;
    plan.scratch = workspace.take<char>(in_memory * static_cast<int64_t>(sizeof(Entry) + sizeof(Sequence)));
    return plan;
}

int plan_attention(const Attend& work, const Partials& partials, bool beside, cudaStream_t stream) {
    Device device;
    if (int status = current_device(&device)) return status;
    auto const most = static_cast<int32_t>(std::min<int64_t>(most_items(work, partials.item_rows, false) + partials.multiprocessors, endless));
    auto const kernel = work.step.sequences > threads ? plan_attention_kernel<true> : plan_attention_kernel<false>;
    return launch_early("attention", kernel, 1, threads, 0, device, stream, work, partials, beside, most);
}

}  // namespace mla
