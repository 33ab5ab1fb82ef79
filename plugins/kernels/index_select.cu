// The indexer's third stage: the exact top k of each token's ranks, in ascending order of index.
//
// A block takes a token, or a cluster of blocks where there are few tokens, each block a segment of the keys. Three passes over 11,
// 11 and 10 bits of the ranks find the k-th largest; a pass in index order then lists the keys above it and, of those equal to it,
// the first.
#include "indexer.cuh"

#include <algorithm>

#include "cluster.cuh"

namespace mla {
namespace {

constexpr int threads = 512, warps = threads / warp_size;
constexpr int bins = 2048;
constexpr int copies = 4;       // of a histogram: scores are alike, and neighbouring lanes would meet in one word
constexpr int batch = 4;        // loads of 16 bytes that a thread has in flight
constexpr int max_cluster = 8;  // what every GPU with clusters takes

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

// In dynamic shared memory, so that it lies at the same place in all blocks of a cluster. Behind it: the segment's ranks.
struct alignas(16) Shared {
    int32_t histogram[bins * copies];
    int32_t merged[2][bins];  // by turns, so that one barrier for each pass is enough
    int32_t scan[warp_size];
    uint32_t totals[2][warps];
    Digit digit;
    Count counts;
};

// A block's keys first .. last - 1 of a token; first is a multiple of 4.
struct Segment {
    const uint32_t* ranks;  // of the token, in global memory
    uint32_t* cache;        // of the segment, null where it does not fit
    int32_t first, last;
};

__device__ inline uint4 load(const uint32_t* ranks) { return *reinterpret_cast<const uint4*>(ranks); }

// Counts the segment's ranks whose bits from `shift + width` on are `prefix` by the `width` bits from `shift` on. Keys that are
// not visible do not count. `fill`: from global memory, filling the cache.
__device__ void count_digits(const Segment& segment, uint32_t prefix, int shift, int width, bool fill, int32_t* merged,
                             Shared& shared) {
    for (int i = threadIdx.x; i < bins * copies; i += threads) shared.histogram[i] = 0;
    __syncthreads();
    uint32_t const mask = (1u << width) - 1;
    const uint32_t* const source = fill || segment.cache == nullptr ? segment.ranks + segment.first : segment.cache;
    int32_t const count = segment.last - segment.first;
    for (int32_t start = 4 * threadIdx.x; start < count; start += 4 * threads * batch) {
        uint4 four[batch];
#pragma unroll
        for (int b = 0; b < batch; ++b) {
            if (start + 4 * threads * b < count) four[b] = load(source + start + 4 * threads * b);
        }
#pragma unroll
        for (int b = 0; b < batch; ++b) {
            int32_t const at = start + 4 * threads * b;
            if (at >= count) break;
            if (fill && segment.cache != nullptr) *reinterpret_cast<uint4*>(segment.cache + at) = four[b];
            uint32_t const rank[4] = {four[b].x, four[b].y, four[b].z, four[b].w};
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                if (at + i >= count || rank[i] == 0 || static_cast<uint64_t>(rank[i]) >> (shift + width) != prefix) continue;
                atomicAdd(&shared.histogram[(rank[i] >> shift & mask) * copies + threadIdx.x % copies], 1);
            }
        }
    }
    __syncthreads();
    for (int bin = threadIdx.x; bin < bins; bin += threads) {
        int32_t sum = 0;
        for (int i = 0; i < copies; ++i) sum += shared.histogram[bin * copies + i];
        merged[bin] = sum;
    }
    cluster_barrier();
}

// The bin of the `wanted`-th largest of the whole cluster; bin is -1 where there are fewer.
__device__ Digit find_digit(const int32_t* merged, int32_t wanted, Shared& shared) {
    constexpr int own = bins / threads;
    int const high = bins - 1 - own * threadIdx.x;
    int32_t count[own] = {}, sum = 0;
#pragma unroll
    for (int i = 0; i < own; ++i) {
        for (int rank = 0; rank < cluster_size(); ++rank) count[i] += load_from_block(merged + high - i, rank);
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

__device__ Threshold find_threshold(const Segment& segment, int32_t wanted, Shared& shared) {
    uint32_t prefix = 0;
    int shift = 32;
    for (int pass = 0; shift > 0; ++pass) {
        int const width = min(shift, 11);
        shift -= width;
        int32_t* const merged = shared.merged[pass % 2];
        count_digits(segment, prefix, shift, width, pass == 0, merged, shared);
        Digit const digit = find_digit(merged, wanted, shared);
        if (digit.bin < 0) return Threshold{0, 0};  // fewer are visible than wanted
        prefix = prefix << width | digit.bin;
        wanted -= digit.above;
        if (wanted == digit.count) return Threshold{max(prefix << shift, 1u) - 1, 0};  // the whole bin
    }
    return Threshold{prefix, wanted};
}

// Ranks of the keys key .. key + 3 of the segment; where the list takes all keys, 1 for each that is on a page of the pool.
__device__ void load_ranks(const IndexWindow& window, const Segment& segment, bool scored, int32_t sequence, int32_t key,
                           uint32_t (&rank)[4]) {
    uint4 four{0, 0, 0, 0};
    if (scored && key < segment.last) {
        four = load(segment.cache != nullptr ? segment.cache + (key - segment.first) : segment.ranks + key);
    }
    rank[0] = four.x, rank[1] = four.y, rank[2] = four.z, rank[3] = four.w;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        if (key + i >= segment.last) {
            rank[i] = 0;
        } else if (!scored) {
            rank[i] = window.page(sequence, key + i) >= 0 ? 1 : 0;
        }
    }
}

// Keys above and equal, of four: above in the low half of the word, equal in the high one.
__device__ inline uint32_t count_four(const uint32_t (&rank)[4], uint32_t threshold) {
    uint32_t count = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) count += rank[i] > threshold ? 1u : rank[i] == threshold ? 0x10000u : 0u;
    return count;
}

__global__ void __launch_bounds__(threads, 2) select_kernel(IndexWindow window, int32_t* indices, int32_t cache_keys) {
    extern __shared__ __align__(128) char memory[];
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    int const blocks = cluster_size(), block = cluster_rank();
    int32_t const row = static_cast<int32_t>(blockIdx.x) / blocks, keys = window.keys(row);
    int32_t const wanted = static_cast<int32_t>(min(window.top_k, int64_t{0x7fffffff}));
    int32_t* const list = indices + (window.first + row) * window.top_k;
    int32_t const sequence = window.step.sequence_of(window.first + row);
    bool const scored = window.scored_keys(row) > 0;
    int32_t const share = round_up(ceil_div(keys, blocks), 4);
    Segment const segment{window.ranks + row * window.stride,
                          share <= cache_keys ? reinterpret_cast<uint32_t*>(memory + sizeof(Shared)) : nullptr,
                          min(keys, share * block), min(keys, share * (block + 1))};
    Threshold const threshold = scored ? find_threshold(segment, wanted, shared) : Threshold{0, 0};

    // what the blocks before this one list, and all of them
    Count before{0, 0}, all{0, 0};
    uint32_t rank[4];
    if (blocks > 1) {
        Count own{0, 0};
        for (int32_t key = segment.first + 4 * threadIdx.x; key < segment.last; key += 4 * threads) {
            load_ranks(window, segment, scored, sequence, key, rank);
            uint32_t const count = count_four(rank, threshold.rank);
            own.above += static_cast<int32_t>(count & 0xffffu);
            own.equal += static_cast<int32_t>(count >> 16);
        }
        __syncthreads();
        Count sum;
        block_scan(own.above, shared.scan, &sum.above);
        __syncthreads();
        block_scan(own.equal, shared.scan, &sum.equal);
        if (threadIdx.x == 0) shared.counts = sum;
        cluster_barrier();
        for (int other = 0; other < blocks; ++other) {
            int32_t const above = load_from_block(&shared.counts.above, other);
            int32_t const equal = load_from_block(&shared.counts.equal, other);
            all.above += above;
            all.equal += equal;
            if (other < block) before.above += above, before.equal += equal;
        }
        cluster_barrier();  // a block's shared memory ends with it
    }

    int const lane = threadIdx.x % warp_size, warp = threadIdx.x / warp_size;
    int32_t above = before.above, equal = before.equal;
    int parity = 0;
    for (int32_t base = segment.first; base < segment.last && above + min(equal, threshold.equal) < wanted;
         base += 4 * threads, parity ^= 1) {
        int32_t const key = base + 4 * threadIdx.x;
        load_ranks(window, segment, scored, sequence, key, rank);
        uint32_t const own = count_four(rank, threshold.rank);
        uint32_t sum = own;
        for (int offset = 1; offset < warp_size; offset *= 2) {
            uint32_t const below = __shfl_up_sync(0xffffffffu, sum, offset);
            if (lane >= offset) sum += below;
        }
        if (lane == warp_size - 1) shared.totals[parity][warp] = sum;
        __syncthreads();
        uint32_t const part = lane < warps ? shared.totals[parity][lane] : 0u;
        uint32_t const earlier = sum - own + warp_sum(lane < warp ? part : 0u), total = warp_sum(part);
        int32_t own_above = above + static_cast<int32_t>(earlier & 0xffffu);
        int32_t own_equal = equal + static_cast<int32_t>(earlier >> 16);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            bool const is_above = rank[i] > threshold.rank, is_equal = rank[i] == threshold.rank;
            if (is_above || (is_equal && own_equal < threshold.equal)) {
                list[own_above + min(own_equal, threshold.equal)] = key + i;
            }
            own_above += is_above;
            own_equal += is_equal;
        }
        above += static_cast<int32_t>(total & 0xffffu);
        equal += static_cast<int32_t>(total >> 16);
    }
    if (blocks == 1) all = Count{above, equal};
    int64_t const listed = all.above + min(all.equal, threshold.equal);
    for (int64_t i = listed + block * threads + threadIdx.x; i < window.top_k; i += int64_t{blocks} * threads) list[i] = -1;
}

}  // namespace

int select_index_keys(const Call& call, const IndexWindow& window, const Device& device, int32_t* indices) {
    cudaFuncAttributes compiled;
    if (int status = check_cuda("MlaIndexer: selection", cudaFuncGetAttributes(&compiled, select_kernel))) return status;
    int blocks = 1;
    if (compiled.ptxVersion >= 90) {
        while (blocks < max_cluster && 2 * blocks * window.rows <= 2 * device.multiprocessors &&
               window.stride > int64_t{4} * threads * blocks) {
            blocks *= 2;
        }
    }
    constexpr int shared_bytes = static_cast<int>(sizeof(Shared)), reserved = 1024;  // what a block needs beside
    bool const alone = blocks * window.rows <= device.multiprocessors;
    int const budget = alone ? device.shared_bytes : device.shared_bytes / 2 - reserved;
    int64_t const segment = round_up<int64_t>(ceil_div<int64_t>(window.stride, blocks), 4);
    int64_t const cache_keys = std::min<int64_t>(segment, std::max(0, budget - shared_bytes) / 16 * 4);
    size_t const shared = shared_bytes + static_cast<size_t>(cache_keys) * 4;
    if (int status = check_cuda("MlaIndexer: shared memory",
                                cudaFuncSetAttribute(select_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                     static_cast<int>(shared)))) {
        return status;
    }
    cudaLaunchAttribute cluster;
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = static_cast<unsigned>(blocks);
    cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(window.rows * blocks));
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared;
    config.stream = call.stream;
    config.attrs = &cluster;
    config.numAttrs = blocks > 1 ? 1 : 0;
    return check_cuda("MlaIndexer: selection",
                      cudaLaunchKernelEx(&config, select_kernel, window, indices, static_cast<int32_t>(cache_keys)));
}

}  // namespace mla
