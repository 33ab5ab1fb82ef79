// The indexer's third stage: the exact top k of each token's ranks, in ascending order of index; a block a token.
//
// Three passes over 11, 11 and 10 bits of the ranks find the k-th largest; a pass in index order then lists the keys above it and,
// of those equal to it, the first.
#include "indexer.cuh"

namespace mla {
namespace {

constexpr int threads = 1024;
constexpr int bins = 2048;
constexpr int copies = 4;  // of a histogram's bins: scores are alike, and neighbouring lanes would meet in one word

// Keys above `rank` are listed, and the first `equal` of those that have it.
struct Threshold {
    uint32_t rank;
    int32_t equal;
};

struct Digit {
    int32_t bin, above, count, total;
};

struct Shared {
    int32_t histogram[bins * copies];
    int32_t scan[warp_size];
    uint32_t totals[2][warp_size];
    Digit digit;
};

// Counts the ranks whose bits from `shift + width` on are `prefix` by the `width` bits from `shift` on. Keys that are not
// visible do not count.
__device__ void count_digits(const uint32_t* ranks, int32_t keys, uint32_t prefix, int shift, int width, Shared& shared) {
    for (int i = threadIdx.x; i < bins * copies; i += threads) shared.histogram[i] = 0;
    __syncthreads();
    uint32_t const mask = (1u << width) - 1;
    for (int64_t first = 4 * threadIdx.x; first < keys; first += 4 * threads) {
        uint4 const four = *reinterpret_cast<const uint4*>(ranks + first);
        uint32_t const rank[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if (first + i >= keys || rank[i] == 0 || static_cast<uint64_t>(rank[i]) >> (shift + width) != prefix) continue;
            atomicAdd(&shared.histogram[(rank[i] >> shift & mask) * copies + threadIdx.x % copies], 1);
        }
    }
    __syncthreads();
}

// The bin of the `wanted`-th largest; total: all that were counted. bin is -1 where there are fewer.
__device__ Digit find_digit(int32_t wanted, Shared& shared) {
    static_assert(bins == 2 * threads, "each thread has two bins");
    int const high = bins - 1 - 2 * threadIdx.x;
    int32_t count[2] = {};
    for (int i = 0; i < copies; ++i) {
        count[0] += shared.histogram[high * copies + i];
        count[1] += shared.histogram[(high - 1) * copies + i];
    }
    int32_t total;
    int32_t const above = block_scan(count[0] + count[1], shared.scan, &total) - count[0] - count[1];
    if (total < wanted) return Digit{-1, 0, 0, total};
    if (above < wanted && wanted <= above + count[0]) {
        shared.digit = Digit{high, above, count[0], total};
    } else if (above + count[0] < wanted && wanted <= above + count[0] + count[1]) {
        shared.digit = Digit{high - 1, above + count[0], count[1], total};
    }
    __syncthreads();
    return shared.digit;
}

__device__ Threshold find_threshold(const uint32_t* ranks, int32_t keys, int32_t wanted, Shared& shared) {
    uint32_t prefix = 0;
    int shift = 32;
    while (shift > 0) {
        int const width = min(shift, 11);
        shift -= width;
        count_digits(ranks, keys, prefix, shift, width, shared);
        Digit const digit = find_digit(wanted, shared);
        if (digit.bin < 0) return Threshold{0, 0};  // fewer are visible than wanted
        prefix = prefix << width | digit.bin;
        wanted -= digit.above;
        if (wanted == digit.count) return Threshold{max(prefix << shift, 1u) - 1, 0};  // the whole bin
    }
    return Threshold{prefix, wanted};
}

__global__ void __launch_bounds__(threads) select_kernel(IndexWindow window, int32_t* indices) {
    __shared__ Shared shared;
    int32_t const row = blockIdx.x, keys = window.keys(row);
    int64_t const token = window.first + row;
    int32_t const wanted = static_cast<int32_t>(min(window.top_k, int64_t{0x7fffffff}));
    int32_t* const list = indices + token * window.top_k;
    const uint32_t* const ranks = window.ranks + row * window.stride;
    bool const scored = window.scored_keys(row) > 0;
    int32_t const sequence = window.step.sequence_of(token);
    Threshold const threshold = scored ? find_threshold(ranks, keys, wanted, shared) : Threshold{0, 0};

    int const lane = threadIdx.x % warp_size, warp = threadIdx.x / warp_size;
    int32_t above = 0, equal = 0;  // so far
    int parity = 0;
    for (int64_t base = 0; base < keys && above + min(equal, threshold.equal) < wanted; base += 4 * threads, parity ^= 1) {
        int64_t const first = base + 4 * threadIdx.x;
        uint32_t rank[4] = {};
        if (scored && first < keys) {
            uint4 const four = *reinterpret_cast<const uint4*>(ranks + first);
            rank[0] = four.x, rank[1] = four.y, rank[2] = four.z, rank[3] = four.w;
        }
        uint32_t own = 0;  // above in the low half, equal in the high one
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if (first + i >= keys) {
                rank[i] = 0;
            } else if (!scored) {
                rank[i] = window.page(sequence, static_cast<int32_t>(first + i)) >= 0 ? 1 : 0;
            }
            own += rank[i] > threshold.rank ? 1u : rank[i] == threshold.rank ? 0x10000u : 0u;
        }
        uint32_t sum = own;
        for (int offset = 1; offset < warp_size; offset *= 2) {
            uint32_t const below = __shfl_up_sync(0xffffffffu, sum, offset);
            if (lane >= offset) sum += below;
        }
        if (lane == warp_size - 1) shared.totals[parity][warp] = sum;
        __syncthreads();
        uint32_t const part = shared.totals[parity][lane];
        uint32_t const before = sum - own + warp_sum(lane < warp ? part : 0u), total = warp_sum(part);
        int32_t own_above = above + static_cast<int32_t>(before & 0xffffu);
        int32_t own_equal = equal + static_cast<int32_t>(before >> 16);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            bool const is_above = rank[i] > threshold.rank, is_equal = rank[i] == threshold.rank;
            if (is_above || (is_equal && own_equal < threshold.equal)) {
                list[own_above + min(own_equal, threshold.equal)] = static_cast<int32_t>(first + i);
            }
            own_above += is_above;
            own_equal += is_equal;
        }
        above += static_cast<int32_t>(total & 0xffffu);
        equal += static_cast<int32_t>(total >> 16);
    }
    for (int64_t i = above + min(equal, threshold.equal) + static_cast<int64_t>(threadIdx.x); i < window.top_k; i += threads) {
        list[i] = -1;
    }
}

}  // namespace

int select_index_keys(const Call& call, const IndexWindow& window, int32_t* indices) {
    select_kernel<<<static_cast<unsigned>(window.rows), threads, 0, call.stream>>>(window, indices);
    return check_launch("MlaIndexer: selection");
}

}  // namespace mla
