#include "few_tokens.h"

namespace mla {
namespace {

constexpr int threads = 256;

// One block: running sums over the sequences, a chunk of them at a time.
__global__ void __launch_bounds__(threads) gather_kernel(Step whole, FewTokens few) {
    __shared__ int32_t warp_totals[threads / warp_size];
    int const lane = threadIdx.x % warp_size, warp = threadIdx.x / warp_size;
    int32_t before = 0;
    for (int64_t base = 0; base < whole.sequences; base += threads) {
        int64_t const sequence = base + threadIdx.x;
        int32_t start = 0, count = 0;
        if (sequence < whole.sequences) {
            int32_t const end = whole.query_offsets[sequence + 1];
            start = whole.query_offsets[sequence];
            bool const inside = start >= 0 && end > start && end <= whole.tokens;
            count = inside && end - start <= few_new_tokens ? end - start : 0;
        }
        int32_t sum = count;
        for (int offset = 1; offset < warp_size; offset *= 2) {
            int32_t const lower = __shfl_up_sync(0xffffffffu, sum, offset);
            if (lane >= offset) sum += lower;
        }
        if (lane == warp_size - 1) warp_totals[warp] = sum;
        __syncthreads();
        int32_t total = 0;
        for (int other = 0; other < threads / warp_size; ++other) {
            if (other < warp) sum += warp_totals[other];
            total += warp_totals[other];
        }
        int32_t const first = before + sum - count;
        if (sequence < whole.sequences) {
            few.query_offsets[sequence] = first;
            for (int32_t i = 0; i < count; ++i) {
                few.tokens[first + i] = start + i;
                few.token_sequence[first + i] = static_cast<int32_t>(sequence);
                few.positions[first + i] = whole.positions[start + i];
            }
        }
        before += total;
        __syncthreads();
    }
    if (threadIdx.x == 0) few.query_offsets[whole.sequences] = before;
    for (int64_t i = before + threadIdx.x; i < few.capacity; i += threads) {
        few.tokens[i] = -1;
        few.token_sequence[i] = -1;
        few.positions[i] = 0;
    }
}

}  // namespace

FewTokens FewTokens::take(Workspace& workspace, int64_t sequences) {
    FewTokens few{};
    few.capacity = sequences * few_new_tokens;
    few.tokens = workspace.take<int32_t>(few.capacity);
    few.query_offsets = workspace.take<int32_t>(sequences + 1);
    few.token_sequence = workspace.take<int32_t>(few.capacity);
    few.positions = workspace.take<int32_t>(few.capacity);
    return few;
}

Step FewTokens::step(const Step& whole) const {
    Step step = whole;
    step.query_offsets = query_offsets;
    step.token_sequence = token_sequence;
    step.positions = positions;
    step.tokens = capacity;
    return step;
}

int gather_few_tokens(const Step& whole, const FewTokens& few, cudaStream_t stream) {
    gather_kernel<<<1, threads, 0, stream>>>(whole, few);
    return check_launch("gathering sequences with few new tokens");
}

}  // namespace mla
