// MlaPlan: the sequence and position of each token, and the cut of the step's pages into equal parts.
#include "device.cuh"

namespace mla {
namespace {

constexpr int threads = 256;

// The first sequence in [0, sequences) whose end is above `value`, `sequences` where there is none. `ends` does not fall.
template <typename T>
__device__ int64_t first_above(const T* ends, int64_t sequences, int64_t value) {
    int64_t low = 0, high = sequences;
    while (low < high) {
        int64_t const middle = (low + high) / 2;
        if (static_cast<int64_t>(ends[middle]) > value) {
            high = middle;
        } else {
            low = middle + 1;
        }
    }
    return low;
}

__device__ void place_tokens(const int32_t* offsets, const int32_t* cached, int64_t sequences, int64_t tokens,
                             int32_t* token_sequence, int32_t* positions, int64_t first, int64_t step) {
    for (int64_t token = first; token < tokens; token += step) {
        int64_t const sequence = first_above(offsets + 1, sequences, token);
        bool const padding = sequence >= sequences;
        token_sequence[token] = padding ? -1 : static_cast<int32_t>(sequence);
        positions[token] = padding ? 0 : cached[sequence] + static_cast<int32_t>(token) - offsets[sequence];
    }
}

// One block: running sums of the sequences' pages, then the page at which each part starts.
__device__ void cut(const int32_t* offsets, const int32_t* cached, int64_t sequences, int32_t page_size, int32_t parts,
                    int64_t* unit_ends, int32_t* schedule) {
    __shared__ int64_t warp_totals[threads / warp_size];
    int const lane = threadIdx.x % warp_size, warp = threadIdx.x / warp_size;
    int64_t before = 0;
    for (int64_t base = 0; base < sequences; base += threads) {
        int64_t const sequence = base + threadIdx.x;
        int64_t units = 0;
        if (sequence < sequences) {
            int64_t const fresh = static_cast<int64_t>(offsets[sequence + 1]) - offsets[sequence];
            if (fresh > 0) units = max(ceil_div<int64_t>(cached[sequence] + fresh, page_size), int64_t{0});
        }
        int64_t sum = units;
        for (int offset = 1; offset < warp_size; offset *= 2) {
            int64_t const lower = __shfl_up_sync(0xffffffffu, sum, offset);
            if (lane >= offset) sum += lower;
        }
        if (lane == warp_size - 1) warp_totals[warp] = sum;
        __syncthreads();
        int64_t total = 0;
        for (int other = 0; other < threads / warp_size; ++other) {
            if (other < warp) sum += warp_totals[other];
            total += warp_totals[other];
        }
        if (sequence < sequences) unit_ends[sequence] = before + sum;
        before += total;
        __syncthreads();
    }
    for (int64_t part = threadIdx.x; part <= parts; part += threads) {
        int64_t const first = part * before / parts;
        int64_t const sequence = first_above(unit_ends, sequences, first);
        schedule[2 * part] = static_cast<int32_t>(sequence);
        schedule[2 * part + 1] =
            sequence < sequences ? static_cast<int32_t>(first - (sequence > 0 ? unit_ends[sequence - 1] : 0)) : 0;
    }
}

__global__ void plan_kernel(const int32_t* offsets, const int32_t* cached, int64_t sequences, int64_t tokens,
                            int32_t page_size, int32_t parts, int64_t* unit_ends, int32_t* token_sequence,
                            int32_t* positions, int32_t* schedule) {
    let_next_kernel_begin();
    if (blockIdx.x == 0) {
        cut(offsets, cached, sequences, page_size, parts, unit_ends, schedule);
    } else {
        place_tokens(offsets, cached, sequences, tokens, token_sequence, positions,
                     (blockIdx.x - 1) * static_cast<int64_t>(threads) + threadIdx.x,
                     (gridDim.x - 1) * static_cast<int64_t>(threads));
    }
}

}  // namespace

int run_plan(Call& call) {
    using namespace plan;
    auto* unit_ends = call.workspace.take<int64_t>(call.dims.B);
    if (call.workspace.sizing()) return MLA_OK;
    int64_t const blocks = 1 + min(ceil_div<int64_t>(call.dims.T, threads), int64_t{1024});
    plan_kernel<<<static_cast<unsigned>(blocks), threads, 0, call.stream>>>(
        call.input<int32_t>(in::query_offsets), call.input<int32_t>(in::cache_lengths), call.dims.B, call.dims.T,
        call.attributes.page_size, call.attributes.num_partitions, unit_ends, call.output<int32_t>(out::token_sequence),
        call.output<int32_t>(out::positions), call.output<int32_t>(out::schedule));
    return check_launch("MlaPlan");
}

}  // namespace mla
