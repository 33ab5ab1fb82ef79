// The indexer's third stage: the exact top k of each token's ranks, in ascending order of index.
//
// A block takes a token, or a cluster of blocks where there are few tokens, each block a segment of the keys. A sample of the token's
// ranks gives a bound that a little more than k ranks are above, and one pass over all keys keeps those in shared memory and counts
// them in bins of equal width; the k-th largest is found among the few in its bin. Where these are many (ties) or scores are not
// finite, passes over 11 bits of the ranks find it, and if it has equals over 11 bits of their keys; they read all keys where the
// sample misled. What is listed is marked in a map of the keys, and the map written out.
#include "indexer.cuh"

#include <algorithm>
#include <cmath>

#include "cluster.cuh"
#include "early.cuh"

namespace mla {
namespace {

constexpr int many_rows_threads = 512, few_rows_threads = 1024;  // two blocks a multiprocessor, and one; of these there may be clusters
constexpr int bins = 2048;
constexpr int max_cluster = 8;        // what every GPU with clusters takes
constexpr int64_t alone_keys = 48 << 10;  // that a block reads sooner than two would have waited for each other
constexpr int batch = 4;              // loads of four ranks that a lane has in flight
constexpr int warp_keys = 4 * warp_size * batch;
constexpr int sample_bits = 10, sample_size = 1 << sample_bits;
constexpr int most_candidates = 512;  // each is compared with each
constexpr int map_words = 2048, map_keys = 32 * map_words;
constexpr uint32_t whole_warp = 0xffffffffu;

// Keys above `rank` are listed, and those up to `last` that have it.
struct Threshold {
    uint32_t rank;
    int32_t last;

    __device__ bool takes(uint32_t other, int32_t key) const { return other > rank || (other == rank && key <= last); }
};

struct Digit {
    int32_t bin, above, count;
};

// Scores by bins: the bin does not fall as the score grows, whatever is rounded. NaN and keys that are not visible have none.
struct Scale {
    float least, factor;

    __device__ Scale(float least, float greatest) : least(least), factor(static_cast<float>(bins) / (greatest - least)) {}
    __device__ bool valid() const { return factor > 0.0f && factor < INFINITY; }
    __device__ float start(int bin) const { return least + static_cast<float>(bin) / factor; }
    __device__ static float score(uint32_t rank) { return __uint_as_float(rank & 0x80000000u ? rank ^ 0x80000000u : ~rank); }
    __device__ int bin(uint32_t rank) const {
        return rank > 1 ? max(0, static_cast<int>(fminf((score(rank) - least) * factor, static_cast<float>(bins - 1)))) : -1;
    }
};

// In dynamic shared memory, so that it lies at the same place in all blocks of a cluster. Behind it: what is kept, ranks and keys.
struct alignas(16) Shared {
    int32_t histogram[2][bins];  // by turns: other blocks may still read the last one
    uint32_t map[map_words];
    uint64_t candidates[most_candidates];  // the block's keys in the bin, as order_of() has them
    uint64_t gathered[most_candidates];    // of all blocks
    int32_t scan[warp_size];
    uint32_t least[warp_size], greatest[warp_size];
    int32_t kept, found;
    int32_t above, before;  // keys of the block above those of the bin; listed keys of the blocks before
    Digit digit;
    Threshold threshold;
};

// What is listed first is larger.
__device__ inline uint64_t order_of(uint32_t rank, int32_t key) { return uint64_t{rank} << 32 | ~static_cast<uint32_t>(key); }
__device__ inline int32_t key_of(uint64_t order) { return static_cast<int32_t>(~static_cast<uint32_t>(order)); }

__device__ constexpr int key_offset(int i) { return i / 4 * (4 * warp_size) + i % 4; }

// A block's keys first .. last - 1 of a token; first is a multiple of 4. Keys that are not visible have rank 0; where the list takes
// all keys, the others have 1.
struct Segment {
    const IndexWindow& window;
    const uint32_t* ranks;
    int32_t row, keys, first, last;
    bool scored;

    __device__ uint4 load_four(int32_t key) const {
        uint4 four{0, 0, 0, 0};
        if (key >= last) return four;
        if (scored) {
            four = *reinterpret_cast<const uint4*>(ranks + key);
        } else {
            int32_t const sequence = window.step.sequence_of(window.first + row);
            four.x = window.page(sequence, key) >= 0;
            four.y = window.page(sequence, key + 1) >= 0;
            four.z = window.page(sequence, key + 2) >= 0;
            four.w = window.page(sequence, key + 3) >= 0;
        }
        if (key + 1 >= last) four.y = 0;
        if (key + 2 >= last) four.z = 0;
        if (key + 3 >= last) four.w = 0;
        return four;
    }

    // Ranks of a warp's keys from `start` on: four[i] are of key start + 4 lane + 128 i and the next three.
    __device__ void load(int32_t start, uint4 (&four)[batch]) const {
        int32_t const key = start + 4 * static_cast<int32_t>(threadIdx.x % warp_size);
        if (scored && start + warp_keys <= last) {
#pragma unroll
            for (int i = 0; i < batch; ++i) four[i] = *reinterpret_cast<const uint4*>(ranks + key + 4 * warp_size * i);
        } else {
#pragma unroll
            for (int i = 0; i < batch; ++i) four[i] = load_four(key + 4 * warp_size * i);
        }
    }

    // As an array: rank[i] is of key start + 4 lane + key_offset(i).
    __device__ static void spread(const uint4 (&four)[batch], uint32_t (&rank)[4 * batch]) {
#pragma unroll
        for (int i = 0; i < batch; ++i) {
            rank[4 * i] = four[i].x, rank[4 * i + 1] = four[i].y, rank[4 * i + 2] = four[i].z, rank[4 * i + 3] = four[i].w;
        }
    }
};

// The threads of a block.
template <int threads>
struct Selection {
    static constexpr int warps = threads / warp_size, block_keys = warps * warp_keys;

    Shared& shared;
    Segment segment;
    int32_t wanted, capacity;
    int blocks, block;  // of the cluster; blocks is a power of two
    int turn = 0;

    __device__ uint32_t* kept_ranks() const { return reinterpret_cast<uint32_t*>(&shared + 1); }
    __device__ int32_t* kept_keys() const { return reinterpret_cast<int32_t*>(kept_ranks() + capacity); }
    __device__ static int lane() { return threadIdx.x % warp_size; }
    __device__ static int warp() { return threadIdx.x / warp_size; }

    __device__ void wait_for_blocks() const {
        if (blocks > 1) {
            cluster_barrier();
        } else {
            __syncthreads();
        }
    }

    // Loops of few turns are not unrolled: code that has not run yet is waited for longer.
    template <typename T, int count>
    __device__ static void clear(T (&words)[count]) {
        for (int i = threadIdx.x; i < count / 4; i += threads) reinterpret_cast<uint4*>(words)[i] = uint4{0, 0, 0, 0};
    }

    // The bin of the `number`-th largest by a histogram of this block or (`all`) those of all blocks; bin is -1 where there are fewer.
    // Between two calls there must be a barrier.
    __device__ Digit find_bin(const int32_t* histogram, bool all, int32_t number) {
        constexpr int own = bins / threads;
        int const low = bins - own * (static_cast<int>(threadIdx.x) + 1);
        auto const* const pairs = reinterpret_cast<const uint64_t*>(histogram + low);
        int32_t count[own] = {};  // the largest bin first
        auto const add = [&](int i, uint64_t pair) {
            count[own - 1 - 2 * i] += static_cast<int32_t>(pair);
            count[own - 2 - 2 * i] += static_cast<int32_t>(pair >> 32);
        };
        for (int i = 0; i < own / 2; ++i) add(i, pairs[i]);
        if constexpr (threads == few_rows_threads) {
            if (all && blocks > 1) {
                uint64_t other[max_cluster - 1];  // all are on their way at once
#pragma unroll
                for (int i = 1; i < max_cluster; ++i) {
                    if (i < blocks) other[i - 1] = load_from_block(pairs, block ^ i);
                }
#pragma unroll
                for (int i = 1; i < max_cluster; ++i) {
                    if (i < blocks) add(0, other[i - 1]);
                }
            }
        }
        int32_t sum = 0;
        for (int i = 0; i < own; ++i) sum += count[i];
        int32_t const of_warp = __reduce_add_sync(whole_warp, sum);
        if (lane() == 0) shared.scan[warp()] = of_warp;
        __syncthreads();
        int32_t const part = lane() < warps ? shared.scan[lane()] : 0;
        if (__reduce_add_sync(whole_warp, part) < number) return Digit{-1, 0, 0};
        int32_t above = __reduce_add_sync(whole_warp, lane() < warp() ? part : 0);
        if (above < number && number <= above + of_warp) {
            int32_t before = sum;
            for (int offset = 1; offset < warp_size; offset *= 2) {
                int32_t const earlier = __shfl_up_sync(whole_warp, before, offset);
                if (lane() >= offset) before += earlier;
            }
            above += before - sum;
            for (int i = 0; i < own; ++i) {
                if (above < number && number <= above + count[i]) shared.digit = Digit{low + own - 1 - i, above, count[i]};
                above += count[i];
            }
        }
        __syncthreads();
        return shared.digit;
    }

    // Keeps the ranks that are probably among the wanted ones of the token, and counts them in the second histogram. Blocks of a
    // cluster look at the same sample.
    __device__ Scale keep() {
        int shift = max(0, 31 - sample_bits - __clz(segment.keys));
        shift += segment.keys >> shift > sample_size;
        constexpr int own = sample_size / threads;
        uint32_t sample[own], least = 0xffffffffu, greatest = 0;
#pragma unroll
        for (int i = 0; i < own; ++i) {
            uint32_t const index = i * threads + threadIdx.x, mixed = (index * 2654435761u) >> 16 & ((1u << shift) - 1);
            int32_t const key = static_cast<int32_t>(index << shift | mixed);
            sample[i] = key < segment.keys ? segment.ranks[key] : 0;
        }
        int32_t start = segment.first + warp() * warp_keys;
        uint4 four[batch];
        segment.load(start, four);  // on their way while the sample is looked at
#pragma unroll
        for (int i = 0; i < own; ++i) {
            if (sample[i] > 1) least = min(least, sample[i]);
            greatest = max(greatest, sample[i]);
        }
        least = __reduce_min_sync(whole_warp, least);
        greatest = __reduce_max_sync(whole_warp, greatest);
        if (lane() == 0) shared.least[warp()] = least, shared.greatest[warp()] = greatest;
        __syncthreads();  // what was cleared is clear, too
        least = __reduce_min_sync(whole_warp, shared.least[lane() % warps]);
        greatest = __reduce_max_sync(whole_warp, shared.greatest[lane() % warps]);

        Scale scale(Scale::score(least), Scale::score(greatest));
        uint32_t bound = 2;
        if (segment.keys > capacity && scale.valid()) {
            float const share = ldexpf(static_cast<float>(wanted), -shift);
#pragma unroll
            for (int i = 0; i < own; ++i) {
                if (int const bin = scale.bin(sample[i]); bin >= 0) atomicAdd(&shared.histogram[0][bin], 1);
            }
            __syncthreads();
            Digit const digit = find_bin(shared.histogram[0], false, static_cast<int32_t>(share + 4.0f * sqrtf(share) + 4.0f));
            if (digit.bin > 0) {
                bound = max(rank_of(scale.start(digit.bin)), bound);
                scale = Scale(Scale::score(bound), Scale::score(greatest));
            }
        }
        while (start < segment.last) {
            uint32_t rank[4 * batch], mask = 0;
            Segment::spread(four, rank);
#pragma unroll
            for (int i = 0; i < 4 * batch; ++i) mask |= rank[i] >= bound ? 1u << i : 0u;
            int32_t const key = start + 4 * lane();
            start += block_keys;
            if (start < segment.last) segment.load(start, four);
            int32_t const own_kept = __popc(mask);
            int32_t sum = own_kept;
            for (int offset = 1; offset < warp_size; offset *= 2) {
                int32_t const earlier = __shfl_up_sync(whole_warp, sum, offset);
                if (lane() >= offset) sum += earlier;
            }
            int32_t end = 0;
            if (lane() == warp_size - 1) end = atomicAdd(&shared.kept, sum) + sum;
            end = __shfl_sync(whole_warp, end, warp_size - 1);
            int32_t const begin = end - __shfl_sync(whole_warp, sum, warp_size - 1);
            int32_t place = begin + sum - own_kept;
#pragma unroll 1
            for (; mask != 0; mask &= mask - 1, ++place) {
                if (place < capacity) kept_keys()[place] = key + key_offset(__ffs(static_cast<int>(mask)) - 1);
            }
            __syncwarp();
            // read again, as a register cannot be had by its number; each lane as many
#pragma unroll 1
            for (int32_t i = begin + lane(); i < min(end, capacity); i += warp_size) {
                uint32_t const again = segment.ranks[kept_keys()[i]];
                kept_ranks()[i] = again;
                if (int const bin = scale.bin(again); bin >= 0) atomicAdd(&shared.histogram[1][bin], 1);
            }
        }
        wait_for_blocks();
        return scale;
    }

    // Calls visit(rank, key) for what is kept.
    template <typename Visit>
    __device__ void each_kept(Visit visit) const {
        int32_t const kept = min(shared.kept, capacity);
#pragma unroll 1
        for (int32_t i = threadIdx.x; i < kept; i += threads) visit(kept_ranks()[i], kept_keys()[i]);
    }

    // The threshold, of the keys whose bin is the digit's: each is compared with each. Says how many keys of the blocks before are listed.
    __device__ Threshold compare_all(const Digit& digit, const Scale& scale, int32_t* before) {
        int32_t above = 0;
        each_kept([&](uint32_t rank, int32_t key) {
            int const bin = scale.bin(rank);
            if (bin == digit.bin) shared.candidates[atomicAdd(&shared.found, 1)] = order_of(rank, key);
            above += bin > digit.bin;
        });
        const uint64_t* candidates = shared.candidates;
        if (blocks > 1) {
            above = __reduce_add_sync(whole_warp, above);
            if (lane() == 0) atomicAdd(&shared.above, above);
            cluster_barrier();
            if (warp() < blocks) {  // a warp for each block
                int32_t const found = lane() < blocks ? load_from_block(&shared.found, lane()) : 0;
                int32_t const place = __reduce_add_sync(whole_warp, lane() < warp() ? found : 0);
                int32_t const count = __shfl_sync(whole_warp, found, warp());
                for (int32_t i = lane(); i < count; i += warp_size) {
                    shared.gathered[place + i] = load_from_block(shared.candidates + i, warp());
                }
                if (warp() < block && lane() == 0) atomicAdd(&shared.before, load_from_block(&shared.above, warp()));
            }
            candidates = shared.gathered;
        }
        __syncthreads();
        int32_t const left = wanted - digit.above;
        for (int32_t i = threadIdx.x; i < digit.count; i += threads) {
            uint64_t const own = candidates[i];
            int32_t larger = 0;
#pragma unroll 4
            for (int32_t other = 0; other < digit.count; ++other) larger += candidates[other] > own;
            if (larger == left - 1) shared.threshold = Threshold{static_cast<uint32_t>(own >> 32), key_of(own)};
            if (blocks > 1 && larger < left && key_of(own) < segment.first) atomicAdd(&shared.before, 1);
        }
        __syncthreads();
        *before = shared.before;
        return shared.threshold;
    }

    // Writes the keys of the segment that each(visit) visits and the threshold takes, `before` of the list are others'. Returns how many
    // of it there are then.
    template <typename Each>
    __device__ int32_t list_keys(const Threshold& threshold, int32_t before, int32_t* list, Each each) {
        for (int32_t begin = segment.first; begin < segment.last; begin += map_keys) {
            int32_t const end = min(segment.last, begin + map_keys);
            if (begin > segment.first) {
                __syncthreads();
                clear(shared.map);
                __syncthreads();
            }
            each([&](uint32_t rank, int32_t key) {
                uint32_t const place = static_cast<uint32_t>(key - begin);
                if (threshold.takes(rank, key) && key >= begin && key < end) atomicOr(&shared.map[place >> 5], 1u << (place & 31));
            });
            __syncthreads();
            int32_t const own = ceil_div(end - begin, 32 * threads), first = own * static_cast<int32_t>(threadIdx.x);
            int32_t sum = 0, total;
#pragma unroll 1
            for (int32_t i = first; i < first + own; ++i) sum += __popc(shared.map[i]);
            int32_t place = before + block_scan(sum, shared.scan, &total) - sum;
#pragma unroll 1
            for (int32_t i = first; i < first + own; ++i) {
#pragma unroll 1
                for (uint32_t left = shared.map[i]; left != 0; left &= left - 1) {
                    list[place++] = begin + 32 * i + __ffs(static_cast<int>(left)) - 1;
                }
            }
            before += total;
        }
        return before;
    }

    // Calls visit(rank, key) for what is kept, if it holds all that is listed, or for all keys of the segment.
    template <typename Visit>
    __device__ void each_key(bool kept, Visit visit) const {
        if (kept) return each_kept(visit);
        for (int32_t start = segment.first + warp() * warp_keys; start < segment.last; start += block_keys) {
            uint4 four[batch];
            segment.load(start, four);
            uint32_t rank[4 * batch];
            Segment::spread(four, rank);
#pragma unroll
            for (int i = 0; i < 4 * batch; ++i) visit(rank[i], start + 4 * lane() + key_offset(i));
        }
    }

    // The `number`-th largest of the values of `bits` bits that each(visit) visits, in all blocks, and how many are equal to it; `number`
    // is then counted among these. There are none where there are fewer values.
    template <typename Each>
    __device__ int32_t find_by_bits(int bits, int32_t* number, uint32_t* value, Each each) {
        *value = 0;
        Digit digit{};
        for (int shift = bits; shift > 0;) {
            int const width = min(shift, 11);
            shift -= width;
            int32_t* const histogram = shared.histogram[turn];
            turn ^= 1;
            each([&](uint32_t other) {
                if (static_cast<uint64_t>(other) >> (shift + width) == *value) {
                    atomicAdd(histogram + (other >> shift & ((1u << width) - 1)), 1);
                }
            });
            wait_for_blocks();
            clear(shared.histogram[turn]);  // all have read it before they came to the barrier
            digit = find_bin(histogram, true, *number);
            if (digit.bin < 0) return 0;
            *value = *value << width | digit.bin;
            *number -= digit.above;
        }
        return digit.count;
    }

    // All that is rare, out of the way of the instructions that are not, with its own copy of what is in registers.
    __device__ __noinline__ static void list_rare(Selection selection, bool kept, int32_t* list) { selection.list_by_bits(kept, list); }

    __device__ void list_by_bits(bool kept, int32_t* list) {
        Threshold threshold{0, -1};
        if (segment.scored) {
            wait_for_blocks();
            clear(shared.histogram[0]);
            clear(shared.histogram[1]);
            __syncthreads();
            int32_t left = wanted;
            uint32_t value = 0;
            int32_t const equal = find_by_bits(32, &left, &value, [&](auto visit) {
                each_key(kept, [&](uint32_t rank, int32_t) {
                    if (rank != 0) visit(rank);
                });
            });
            if (equal > 0) threshold = Threshold{value, 0x7fffffff};
            if (left < equal) {  // the first of them
                uint32_t const last = segment.keys - 1;
                find_by_bits(32 - __clz(static_cast<int>(last)), &left, &value, [&](auto visit) {
                    each_key(kept, [&](uint32_t rank, int32_t key) {
                        if (rank == threshold.rank) visit(last - static_cast<uint32_t>(key));
                    });
                });
                threshold.last = static_cast<int32_t>(last - value);
            }
        }
        int32_t before = 0, listed = 0;
        if (blocks > 1) {
            int32_t own = 0;
            each_key(kept, [&](uint32_t rank, int32_t key) { own += threshold.takes(rank, key); });
            own = __reduce_add_sync(whole_warp, own);
            if (lane() == 0) atomicAdd(&shared.above, own);
            cluster_barrier();
            for (int other = 0; other < blocks; ++other) {
                int32_t const count = load_from_block(&shared.above, other);
                listed += count;
                if (other < block) before += count;
            }
            cluster_barrier();  // a block's shared memory ends with it
        }
        int32_t const after = list_keys(threshold, before, list, [&](auto visit) { each_key(kept, visit); });
        if (blocks == 1) listed = after;
        int64_t const top_k = segment.window.top_k;
        for (int64_t i = int64_t{listed} + block * threads + threadIdx.x; i < top_k; i += int64_t{blocks} * threads) list[i] = -1;
    }

    __device__ void run(int32_t* list) {
        clear(shared.histogram[0]);
        clear(shared.histogram[1]);
        clear(shared.map);
        if (threadIdx.x == 0) shared.kept = shared.found = shared.above = shared.before = 0;
        wait_for_kernel_before();
        if (!segment.scored) {
            __syncthreads();
            return list_rare(*this, false, list);
        }
        Scale const scale = keep();
        int32_t most = shared.kept;
        if (blocks > 1) most = __reduce_max_sync(whole_warp, lane() < blocks ? load_from_block(&shared.kept, lane()) : 0);
        Digit const digit = find_bin(shared.histogram[1], true, wanted);
        bool const kept = digit.bin >= 0 && most <= capacity;
        if (!kept || !scale.valid() || digit.count > most_candidates) return list_rare(*this, kept, list);
        int32_t before;
        Threshold const threshold = compare_all(digit, scale, &before);
        if (blocks > 1) cluster_arrive();  // nothing more is read of others
        list_keys(threshold, before, list, [&](auto visit) { each_kept(visit); });
        if (blocks > 1) cluster_wait();  // a block's shared memory ends with it
    }
};

template <int threads>
__global__ void __launch_bounds__(threads, threads == few_rows_threads ? 1 : 2)
    select_kernel(const __grid_constant__ IndexWindow window, int32_t* indices, int32_t capacity) {
    let_next_kernel_begin();
    extern __shared__ __align__(128) char memory[];
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    int const blocks = threads == few_rows_threads ? cluster_size() : 1, block = threads == few_rows_threads ? cluster_rank() : 0;
    int const shift = 31 - __clz(blocks);
    int32_t const row = static_cast<int32_t>(blockIdx.x) >> shift, keys = window.keys(row);
    int32_t const wanted = static_cast<int32_t>(min(window.top_k, int64_t{0x7fffffff}));
    int32_t const share = round_up((keys + blocks - 1) >> shift, 4), first = min(keys, share * block);
    Segment const segment{window, window.ranks + row * window.stride, row, keys, first, min(keys, first + share), keys > window.top_k};
    Selection<threads>{shared, segment, wanted, capacity, blocks, block}.run(indices + (window.first + row) * window.top_k);
}

// `blocks` of a cluster for each row.
template <int threads>
int launch(const Call& call, const IndexWindow& window, const Device& device, int blocks, int64_t capacity, int32_t* indices) {
    auto const kernel = select_kernel<threads>;
    size_t const bytes = sizeof(Shared) + static_cast<size_t>(capacity) * 8;
    if (int status = check_cuda("MlaIndexer: shared memory",
                                cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)))) {
        return status;
    }
    if (threads == many_rows_threads) {  // a prompt takes 1.5% longer where its selection begins early
        kernel<<<static_cast<unsigned>(window.rows), threads, bytes, call.stream>>>(window, indices, static_cast<int32_t>(capacity));
        return check_launch("MlaIndexer: selection");
    }
    return launch_clusters_early("MlaIndexer: selection", kernel, static_cast<unsigned>(window.rows * blocks), blocks, threads, static_cast<int>(bytes),
                                 device, call.stream, window, indices, static_cast<int32_t>(capacity));
}

}  // namespace

int select_index_keys(const Call& call, const IndexWindow& window, const Device& device, int32_t* indices) {
    cudaFuncAttributes compiled;
    if (int status = check_cuda("MlaIndexer: selection", cudaFuncGetAttributes(&compiled, select_kernel<few_rows_threads>))) return status;
    int blocks = 1;
    if (compiled.ptxVersion >= 90) {
        while (blocks < max_cluster && 2 * blocks * window.rows <= device.multiprocessors && window.stride > alone_keys * blocks) {
            blocks *= 2;
        }
    }
    // what keep() expects to keep, and six times its deviation
    double const interval = std::exp2(std::ceil(std::log2(std::max(1.0, static_cast<double>(window.stride) / sample_size))));
    double const wanted = static_cast<double>(window.top_k);
    double const kept = wanted + 10.0 * std::sqrt(wanted * interval) + 16.0 * interval + 512.0;
    int64_t const most = (device.shared_bytes - static_cast<int64_t>(sizeof(Shared))) / 8;
    int64_t const capacity = std::min(round_up<int64_t>(static_cast<int64_t>(std::min(kept, 1e6)), 4), most / 4 * 4);
    if (window.rows * blocks <= device.multiprocessors) return launch<few_rows_threads>(call, window, device, blocks, capacity, indices);
    return launch<many_rows_threads>(call, window, device, 1, capacity, indices);
}

}  // namespace mla
