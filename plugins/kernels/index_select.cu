// The indexer's third stage: the exact top k of each token's ranks, in ascending order of index.
//
// A block takes a token, or a cluster of blocks where there are few tokens, each block a segment of the keys. A sample of the token's
// ranks gives a bound that a little more than k ranks are above, and one pass over all keys keeps those in shared memory. They are
// counted in bins of equal width; the k-th largest is found among the few in its bin. Where these are many (ties) or scores are not
// finite, three passes over 11, 11 and 10 bits of the ranks find it; they read all keys where the sample misled. What is listed is
// marked in a map of the keys, and the map written out.
#include "indexer.cuh"

#include <algorithm>
#include <cmath>

#include "cluster.cuh"

namespace mla {
namespace {

constexpr int threads = 512, warps = threads / warp_size;
constexpr int bins = 2048;
constexpr int max_cluster = 8;        // what every GPU with clusters takes
constexpr int batch = 4;              // loads of four ranks that a lane has in flight
constexpr int warp_keys = 4 * warp_size * batch, block_keys = warps * warp_keys;
constexpr int samples = 4;            // of a thread
constexpr int most_candidates = 512;  // each is compared with each
constexpr int map_words = 1024, map_keys = 32 * map_words;

// Keys above `rank` are listed, and the first `equal` of those that have it.
struct Threshold {
    uint32_t rank;
    int32_t equal;
};

struct Digit {
    int32_t bin, above, count;
};

struct Count {
    int32_t above, equal;
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
    uint32_t above_map[map_words], equal_map[map_words];
    int32_t candidates[most_candidates];  // ranks of the block's keys in the bin
    uint32_t gathered[most_candidates];   // of all blocks
    int32_t scan[warp_size];
    uint32_t least[warps], greatest[warps];
    int32_t kept, found;
    Digit digit;
    Threshold threshold;
    Count counts;
};

// A block's keys first .. last - 1 of a token; first is a multiple of 4. Keys that are not visible have rank 0; where the list takes
// all keys, the others have 1.
struct Segment {
    const IndexWindow& window;
    const uint32_t* ranks;
    int32_t keys, sequence, first, last;
    bool scored;

    __device__ uint4 load(int32_t key) const {
        uint4 four{0, 0, 0, 0};
        if (key >= last) return four;
        if (scored) {
            four = *reinterpret_cast<const uint4*>(ranks + key);
        } else {
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

    // Calls visit(ranks, key) for the keys from `begin` to `end` - 1 of the segment: ranks[4 i .. 4 i + 3] are of key + 128 i and the
    // next three. Whole warps call.
    template <typename Visit>
    __device__ void each(int32_t begin, int32_t end, Visit visit) const {
        for (int32_t start = begin + threadIdx.x / warp_size * warp_keys; start < end; start += block_keys) {
            int32_t const key = start + 4 * (threadIdx.x % warp_size);
            uint4 four[batch];
            if (scored && start + warp_keys <= last) {
#pragma unroll
                for (int i = 0; i < batch; ++i) four[i] = *reinterpret_cast<const uint4*>(ranks + key + 4 * warp_size * i);
            } else {
#pragma unroll
                for (int i = 0; i < batch; ++i) four[i] = load(key + 4 * warp_size * i);
            }
            uint32_t rank[4 * batch];
#pragma unroll
            for (int i = 0; i < batch; ++i) {
                rank[4 * i] = four[i].x, rank[4 * i + 1] = four[i].y, rank[4 * i + 2] = four[i].z, rank[4 * i + 3] = four[i].w;
            }
            visit(rank, key);
        }
    }
};

__device__ constexpr int key_offset(int i) { return i / 4 * (4 * warp_size) + i % 4; }

// The threads of a block. What says `each` is called with visit(rank) and calls it for ranks of the block.
struct Selection {
    Shared& shared;
    const Segment& segment;
    int32_t capacity;
    int turn = 0;

    __device__ uint32_t* kept_ranks() const { return reinterpret_cast<uint32_t*>(&shared + 1); }
    __device__ int32_t* kept_keys() const { return reinterpret_cast<int32_t*>(kept_ranks() + capacity); }

    __device__ void wait_for(int blocks) const {
        if (blocks > 1) {
            cluster_barrier();
        } else {
            __syncthreads();
        }
    }

    __device__ void clear(int32_t* histogram) const {
        for (int i = threadIdx.x; i < bins; i += threads) histogram[i] = 0;
    }

    // The bin of the `wanted`-th largest of `blocks` blocks, where bin_of says a rank's bin, -1 for none; bin is -1 where there are
    // fewer.
    template <typename Each, typename BinOf>
    __device__ Digit find_digit(int blocks, int32_t wanted, Each each, BinOf bin_of) {
        int32_t* const histogram = shared.histogram[turn];
        turn ^= 1;
        each([&](uint32_t rank) {
            int const bin = bin_of(rank);
            if (bin >= 0) atomicAdd(histogram + bin, 1);
        });
        wait_for(blocks);
        clear(shared.histogram[turn]);  // all have read it before they came to the barrier
        constexpr int own = bins / threads;
        int const high = bins - 1 - own * threadIdx.x;
        int32_t count[own] = {}, sum = 0;
#pragma unroll
        for (int i = 0; i < own; ++i) {
            if (blocks == 1) {
                count[i] = histogram[high - i];
            } else {
                for (int block = 0; block < blocks; ++block) count[i] += load_from_block(histogram + high - i, block);
            }
            sum += count[i];
        }
        int32_t total;
        int32_t above = block_scan(sum, shared.scan, &total) - sum;
        if (total < wanted) return Digit{-1, 0, 0};
#pragma unroll
        for (int i = 0; i < own; ++i) {
            if (above < wanted && wanted <= above + count[i]) shared.digit = Digit{high - i, above, count[i]};
            above += count[i];
        }
        __syncthreads();
        return shared.digit;
    }

    // Keeps the ranks that are probably among the `wanted` largest of the token. Blocks of a cluster look at the same sample.
    __device__ Scale keep(int32_t wanted) {
        int shift = 0;
        while (segment.keys >> shift > samples * threads) ++shift;
        uint32_t sample[samples], least = 0xffffffffu, greatest = 0;
#pragma unroll
        for (int i = 0; i < samples; ++i) {
            uint32_t const index = i * threads + threadIdx.x, mixed = (index * 2654435761u) >> 16 & ((1u << shift) - 1);
            int32_t const key = static_cast<int32_t>(index << shift | mixed);
            sample[i] = key < segment.keys ? segment.ranks[key] : 0;
            if (sample[i] > 1) least = min(least, sample[i]);
            greatest = max(greatest, sample[i]);
        }
        int const lane = threadIdx.x % warp_size, warp = threadIdx.x / warp_size;
        least = __reduce_min_sync(0xffffffffu, least);
        greatest = __reduce_max_sync(0xffffffffu, greatest);
        if (lane == 0) shared.least[warp] = least, shared.greatest[warp] = greatest;
        __syncthreads();
        least = __reduce_min_sync(0xffffffffu, shared.least[lane % warps]);
        greatest = __reduce_max_sync(0xffffffffu, shared.greatest[lane % warps]);

        Scale scale(Scale::score(least), Scale::score(greatest));
        uint32_t bound = 2;
        if (segment.keys > capacity && scale.valid()) {
            float const share = ldexpf(static_cast<float>(wanted), -shift);
            Digit const digit = find_digit(
                1, static_cast<int32_t>(share + 4.0f * sqrtf(share) + 4.0f),
                [&](auto visit) {
#pragma unroll
                    for (int i = 0; i < samples; ++i) visit(sample[i]);
                },
                [&](uint32_t rank) { return scale.bin(rank); });
            if (digit.bin > 0) {
                bound = max(rank_of(scale.start(digit.bin)), bound);
                scale = Scale(Scale::score(bound), Scale::score(greatest));
            }
        }
        segment.each(segment.first, segment.last, [&](const uint32_t* rank, int32_t key) {
            uint32_t mask = 0;
#pragma unroll
            for (int i = 0; i < 4 * batch; ++i) mask |= rank[i] >= bound ? 1u << i : 0u;
            int32_t const own = __popc(mask);
            int32_t sum = own;
            for (int offset = 1; offset < warp_size; offset *= 2) {
                int32_t const below = __shfl_up_sync(0xffffffffu, sum, offset);
                if (lane >= offset) sum += below;
            }
            int32_t place = 0;
            if (lane == warp_size - 1) place = atomicAdd(&shared.kept, sum);
            place = __shfl_sync(0xffffffffu, place, warp_size - 1) + sum - own;
            for (; mask != 0; mask &= mask - 1, ++place) {
                if (place < capacity) kept_keys()[place] = key + key_offset(__ffs(static_cast<int>(mask)) - 1);
            }
        });
        __syncthreads();
        // read again, as a register cannot be had by its number
        for (int32_t i = threadIdx.x; i < min(shared.kept, capacity); i += threads) kept_ranks()[i] = segment.ranks[kept_keys()[i]];
        __syncthreads();
        return scale;
    }

    // Of the ranks whose bin is the digit's, the threshold. Every rank is compared with every other.
    template <typename Each, typename BinOf>
    __device__ Threshold compare_all(const Digit& digit, int32_t wanted, Each each, BinOf bin_of) {
        each([&](uint32_t rank) {
            if (bin_of(rank) == digit.bin) shared.candidates[atomicAdd(&shared.found, 1)] = static_cast<int32_t>(rank);
        });
        wait_for(cluster_size());
        int32_t place = 0;
        for (int block = 0; block < cluster_size(); ++block) {
            int32_t const found = load_from_block(&shared.found, block);
            for (int32_t i = threadIdx.x; i < found; i += threads) {
                shared.gathered[place + i] = static_cast<uint32_t>(load_from_block(shared.candidates + i, block));
            }
            place += found;
        }
        __syncthreads();
        for (int32_t i = threadIdx.x; i < digit.count; i += threads) {
            uint32_t const own = shared.gathered[i];
            int32_t above = 0, equal = 0;
            for (int32_t other = 0; other < digit.count; ++other) {
                above += shared.gathered[other] > own;
                equal += shared.gathered[other] == own;
            }
            if (above < wanted && wanted <= above + equal) shared.threshold = Threshold{own, wanted - above};
        }
        __syncthreads();
        return shared.threshold;
    }

    template <typename Each>
    __device__ Threshold find_by_bits(int32_t wanted, Each each) {
        uint32_t prefix = 0;
        for (int shift = 32; shift > 0;) {
            int const width = min(shift, 11);
            shift -= width;
            uint32_t const mask = (1u << width) - 1;
            Digit const digit = find_digit(cluster_size(), wanted, each, [&](uint32_t rank) {
                bool const counts = rank != 0 && static_cast<uint64_t>(rank) >> (shift + width) == prefix;
                return counts ? static_cast<int>(rank >> shift & mask) : -1;
            });
            if (digit.bin < 0) return Threshold{0, 0};  // fewer are visible than wanted
            prefix = prefix << width | digit.bin;
            wanted -= digit.above;
            if (wanted == digit.count) return Threshold{max(prefix << shift, 1u) - 1, 0};  // the whole bin
        }
        return Threshold{prefix, wanted};
    }

    // `kept`: in: whether it may be used; out: whether it holds all that is listed.
    __device__ Threshold find_threshold(int32_t wanted, const Scale& scale, bool* kept) {
        auto const each_kept = [&](auto visit) {
            for (int32_t i = threadIdx.x; i < min(shared.kept, capacity); i += threads) visit(kept_ranks()[i]);
        };
        auto const each = [&](auto visit) {
            segment.each(segment.first, segment.last, [&](const uint32_t* rank, int32_t) {
#pragma unroll
                for (int i = 0; i < 4 * batch; ++i) visit(rank[i]);
            });
        };
        auto const bin_of = [&](uint32_t rank) { return scale.bin(rank); };
        Digit const digit = find_digit(cluster_size(), wanted, each_kept, bin_of);
        *kept = digit.bin >= 0;
        for (int block = 0; block < cluster_size(); ++block) *kept &= load_from_block(&shared.kept, block) <= capacity;
        if (!*kept) return find_by_bits(wanted, each);
        if (!scale.valid() || digit.count > most_candidates) return find_by_bits(wanted, each_kept);
        return compare_all(digit, wanted - digit.above, each_kept, bin_of);
    }
};

__device__ inline void mark(uint32_t* map, int32_t place) { atomicOr(map + (place >> 5), 1u << (place & 31)); }

// Writes the keys of a map, before which `before` are listed or equal; returns what the map adds to it.
__device__ Count write_map(Shared& shared, const Threshold& threshold, int32_t first, const Count& before, int32_t* list) {
    constexpr int own = map_words / threads;
    uint32_t above_words[own], equal_words[own], sum = 0;
#pragma unroll
    for (int i = 0; i < own; ++i) {
        above_words[i] = shared.above_map[own * threadIdx.x + i], equal_words[i] = shared.equal_map[own * threadIdx.x + i];
        sum += static_cast<uint32_t>(__popc(above_words[i])) | static_cast<uint32_t>(__popc(equal_words[i])) << 16;
    }
    uint32_t total;
    uint32_t const earlier = block_scan(sum, reinterpret_cast<uint32_t*>(shared.scan), &total) - sum;
    int32_t above = before.above + static_cast<int32_t>(earlier & 0xffffu), equal = before.equal + static_cast<int32_t>(earlier >> 16);
#pragma unroll
    for (int i = 0; i < own; ++i) {
        for (uint32_t left = above_words[i] | equal_words[i]; left != 0; left &= left - 1) {
            int const bit = __ffs(static_cast<int>(left)) - 1;
            bool const is_above = above_words[i] >> bit & 1;
            if (is_above || equal < threshold.equal) {
                list[above + min(equal, threshold.equal)] = first + 32 * (own * static_cast<int32_t>(threadIdx.x) + i) + bit;
            }
            above += is_above;
            equal += !is_above;
        }
    }
    __syncthreads();
    return Count{static_cast<int32_t>(total & 0xffffu), static_cast<int32_t>(total >> 16)};
}

__global__ void __launch_bounds__(threads, 2) select_kernel(IndexWindow window, int32_t* indices, int32_t capacity) {
    extern __shared__ __align__(128) char memory[];
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    int const blocks = cluster_size(), block = cluster_rank();
    int32_t const row = static_cast<int32_t>(blockIdx.x) / blocks, keys = window.keys(row);
    int32_t const wanted = static_cast<int32_t>(min(window.top_k, int64_t{0x7fffffff}));
    int32_t const share = round_up(ceil_div(keys, blocks), 4), first = min(keys, share * block);
    Segment const segment{window, window.ranks + row * window.stride, keys, window.step.sequence_of(window.first + row),
                          first, min(keys, first + share), window.scored_keys(row) > 0};
    Selection selection{shared, segment, capacity};
    selection.clear(shared.histogram[0]);
    if (threadIdx.x == 0) shared.kept = shared.found = 0;
    __syncthreads();
    Threshold threshold{0, 0};
    bool kept = false;
    if (segment.scored) {
        Scale const scale = selection.keep(wanted);
        threshold = selection.find_threshold(wanted, scale, &kept);
    }
    auto const each = [&](int32_t begin, int32_t end, auto visit) {
        if (kept) {
            for (int32_t i = threadIdx.x; i < shared.kept; i += threads) {
                int32_t const key = selection.kept_keys()[i];
                if (key >= begin && key < end) visit(selection.kept_ranks()[i], key);
            }
        } else {
            segment.each(begin, end, [&](const uint32_t* rank, int32_t key) {
#pragma unroll
                for (int i = 0; i < 4 * batch; ++i) {
                    if (key + key_offset(i) < end) visit(rank[i], key + key_offset(i));
                }
            });
        }
    };

    Count before{0, 0}, all{0, 0};  // before this block, and of all
    if (blocks > 1) {
        Count own{0, 0};
        each(segment.first, segment.last, [&](uint32_t rank, int32_t) {
            own.above += rank > threshold.rank;
            own.equal += rank == threshold.rank;
        });
        __syncthreads();
        Count sum;
        block_scan(own.above, shared.scan, &sum.above);
        __syncthreads();
        block_scan(own.equal, shared.scan, &sum.equal);
        if (threadIdx.x == 0) shared.counts = sum;
        cluster_barrier();
        for (int other = 0; other < blocks; ++other) {
            Count const count{load_from_block(&shared.counts.above, other), load_from_block(&shared.counts.equal, other)};
            all.above += count.above;
            all.equal += count.equal;
            if (other < block) before.above += count.above, before.equal += count.equal;
        }
        cluster_barrier();  // a block's shared memory ends with it
    }

    int32_t* const list = indices + (window.first + row) * window.top_k;
    for (int32_t begin = segment.first; begin < segment.last; begin += map_keys) {
        int32_t const end = min(segment.last, begin + map_keys);
        for (int i = threadIdx.x; i < map_words; i += threads) shared.above_map[i] = shared.equal_map[i] = 0;
        __syncthreads();
        each(begin, end, [&](uint32_t rank, int32_t key) {
            if (rank > threshold.rank) {
                mark(shared.above_map, key - begin);
            } else if (rank == threshold.rank && threshold.equal > 0) {
                mark(shared.equal_map, key - begin);
            }
        });
        __syncthreads();
        Count const added = write_map(shared, threshold, begin, before, list);
        before.above += added.above;
        before.equal += added.equal;
    }
    if (blocks == 1) all = before;
    int64_t const listed = all.above + min(all.equal, threshold.equal);
    for (int64_t i = listed + block * threads + threadIdx.x; i < window.top_k; i += int64_t{blocks} * threads) list[i] = -1;
}

}  // namespace

int select_index_keys(const Call& call, const IndexWindow& window, const Device& device, int32_t* indices) {
    cudaFuncAttributes compiled;
    if (int status = check_cuda("MlaIndexer: selection", cudaFuncGetAttributes(&compiled, select_kernel))) return status;
    int blocks = 1;
    if (compiled.ptxVersion >= 90) {
        while (blocks < max_cluster && 2 * blocks * window.rows <= device.multiprocessors && window.stride > int64_t{2048} * blocks) {
            blocks *= 2;
        }
    }
    // what keep() expects to keep, and six times its deviation
    double const interval = std::exp2(std::ceil(std::log2(std::max(1.0, static_cast<double>(window.stride) / (samples * threads)))));
    double const wanted = static_cast<double>(window.top_k);
    double const kept = wanted + 10.0 * std::sqrt(wanted * interval) + 16.0 * interval + 512.0;
    int64_t const most = (device.shared_bytes - static_cast<int64_t>(sizeof(Shared))) / 8;
    int64_t const capacity = std::min(round_up<int64_t>(static_cast<int64_t>(std::min(kept, 1e6)), 4), most / 4 * 4);
    size_t const bytes = sizeof(Shared) + static_cast<size_t>(capacity) * 8;
    if (int status = check_cuda("MlaIndexer: shared memory",
                                cudaFuncSetAttribute(select_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                     static_cast<int>(bytes)))) {
        return status;
    }
    cudaLaunchAttribute cluster;
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = static_cast<unsigned>(blocks);
    cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(window.rows * blocks));
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = bytes;
    config.stream = call.stream;
    config.attrs = &cluster;
    config.numAttrs = blocks > 1 ? 1 : 0;
    return check_cuda("MlaIndexer: selection",
                      cudaLaunchKernelEx(&config, select_kernel, window, indices, static_cast<int32_t>(capacity)));
}

}  // namespace mla
