// MlaDecoding and MlaPrefillSparse: how the keys are split, and the merge of the parts.
#include "attend.h"

namespace mla {
namespace {

constexpr int most_splits = 64;
constexpr int merge_columns = 128;  // of a block, one a thread
constexpr int merge_batch = 8;  // parts whose values are in flight at a time

// Block (token x head, slice of the latent). Weighs the parts by 2^(lse - largest) and adds the sink to their sum. Every warp
// makes the weights, two parts a lane.
__global__ void __launch_bounds__(merge_columns) merge_kernel(Attend work, Partials partials) {
    __shared__ float weights[most_splits];
    int64_t const row = blockIdx.x;
    int64_t const token = row / work.heads;
    int const head = static_cast<int>(row % work.heads);
    int const lane = threadIdx.x % warp_size, splits = partials.splits;
    int32_t const sequence = work.step.sequence_of(token);

    float lse[2] = {-INFINITY, -INFINITY};
    for (int i = 0; i < 2; ++i) {
        int const split = lane + i * warp_size;
        if (sequence >= 0 && split < splits) lse[i] = partials.lse[row * splits + split];
    }
    float const largest = warp_max(fmaxf(lse[0], lse[1]));
    float const base = largest == -INFINITY ? 0.0f : largest;
    float const sum = warp_sum(exp2f(lse[0] - base) + exp2f(lse[1] - base));
    float denominator = sum;
    if (work.sinks != nullptr) denominator += exp2f(work.sinks[head] * log2e - base);
    for (int i = 0; i < 2; ++i) {
        int const split = lane + i * warp_size;
        if (threadIdx.x < warp_size) {
            weights[split] = largest == -INFINITY ? 0.0f : exp2f(lse[i] - base) / denominator;
        }
    }
    __syncthreads();
    int const rank = work.layout.rank, column = blockIdx.y * merge_columns + threadIdx.x;
    if (column < rank) {
        float value = 0.0f;
        if (sequence >= 0) {
            const float* part = partials.output + row * splits * rank + column;
            for (int first = 0; first < splits; first += merge_batch) {
                float values[merge_batch];
#pragma unroll
                for (int i = 0; i < merge_batch; ++i) {
                    values[i] = first + i < splits ? part[static_cast<int64_t>(first + i) * rank] : 0.0f;
                }
#pragma unroll
                for (int i = 0; i < merge_batch; ++i) {
                    if (first + i < splits) value += weights[first + i] * values[i];
                }
            }
        }
        store_float(work.output.data, work.output.type,
                    token * work.output.token_stride + head * work.output.head_stride + column, value);
    }
    if (blockIdx.y == 0 && threadIdx.x == 0 && work.lse != nullptr) {
        work.lse[row] = largest == -INFINITY ? -INFINITY : (largest + log2f(sum)) * ln2;
    }
}

// How many parts the keys of each token are cut into: as many as fill the GPU evenly, as few as that takes. Lengths are in
// device memory, so only the shapes decide: the blocks that there are without a cut, and the tiles of keys at most.
int choose_splits(const Attend& work, const Device& device, int block_rows, int tile, int64_t most_rows) {
    int64_t const rows = work.step.tokens * work.heads;
    int64_t const blocks = work.indices == nullptr ? ceil_div<int64_t>(rows, block_rows)
                                                   : work.step.tokens * ceil_div(work.heads, block_rows);
    int64_t const keys = work.indices == nullptr ? work.step.max_pages * work.layout.page_size : work.top_k;
    int64_t limit = ceil_div<int64_t>(keys, tile);
    if (limit > most_splits) limit = most_splits;
    if (limit > most_rows / rows) limit = most_rows / rows;
    int best = 1;
    double best_cost = 1e30;
    for (int splits = 1; splits <= limit; ++splits) {
        double const waves = static_cast<double>(ceil_div<int64_t>(blocks * splits, device.multiprocessors));
        double const cost = waves / splits + (splits > 1 ? 0.01 + 0.0003 * splits : 0.0);
        if (cost < best_cost) {
            best_cost = cost;
            best = splits;
        }
    }
    return best;
}

// MlaDecoding and MlaPrefillSparse name their inputs alike; both have the outputs output and lse.
int run(Call& call, const OpSpec& op) {
    auto place = [&](const char* name) { return input_index(op, name); };
    const MlaTensor& query = call.in[place("query")];
    Attend work{};
    work.query = contiguous(query.data, query.type, call.dims.H, call.dims.R + call.dims.Dr);
    work.output = contiguous(call.out[0].data, call.out[0].type, call.dims.H, call.dims.R);
    work.lse = call.output<float>(1);
    work.pool = call.input<uint8_t>(place("kv_cache"));
    work.layout = KvLayout(call.attributes);
    work.step = make_step(call, place("query_offsets"), place("cache_lengths"), place("block_table"),
                          place("token_sequence"), place("positions"), call.dims.pages);
    work.indices = call.input<int32_t>(place("indices"));
    work.top_k = work.indices == nullptr ? 0 : call.dims.K;
    if (int const lengths = place("index_lengths"); lengths >= 0) work.index_lengths = call.input<int32_t>(lengths);
    work.sinks = call.input<float>(place("sinks"));
    work.softmax_scale = call.attributes.softmax_scale;
    work.query_terms = call.attributes.query_terms;
    work.heads = static_cast<int32_t>(call.dims.H);
    return attend(call, work);
}

}  // namespace

int attend(Call& call, const Attend& work) {
    if (work.step.tokens == 0 || work.heads == 0) return MLA_OK;
    Device device;
    if (int status = current_device(&device)) return status;
    bool const hopper = attend_takes_hopper(work, device), tensor_cores = attend_takes_tensor_cores(work, device);
    int const block_rows = hopper ? hopper_rows(work) : tensor_cores ? rows_per_block(work) : 8;
    // of partial results at most: two blocks of 64 rows for each multiprocessor
    int64_t const rows = work.step.tokens * work.heads;
    int64_t const budget = int64_t{2} * device.multiprocessors * 64;
    int64_t const most_rows = budget < rows * most_splits ? budget : rows * most_splits;
    size_t const mark = call.workspace.mark();
    Partials partials{};
    partials.output = call.workspace.take<float>(most_rows * work.layout.rank);
    partials.lse = call.workspace.take<float>(most_rows);
    call.workspace.release(mark);
    if (call.workspace.sizing()) return MLA_OK;
    partials.splits = choose_splits(work, device, block_rows, hopper ? 128 : 64, most_rows);
    int const status = hopper         ? attend_hopper(work, partials, call.stream)
                       : tensor_cores ? attend_tensor_cores(work, partials, device, call.stream)
                                      : attend_exact(work, partials, call.stream);
    if (status != MLA_OK) return status;
    if (partials.splits == 1) return MLA_OK;
    dim3 const grid(static_cast<unsigned>(rows), ceil_div(work.layout.rank, merge_columns));
    merge_kernel<<<grid, merge_columns, 0, call.stream>>>(work, partials);
    return check_launch("merge of partial attention");
}

int run_decoding(Call& call) { return run(call, ops[op::decoding]); }

int run_prefill_sparse(Call& call) { return run(call, ops[op::prefill_sparse]); }

}  // namespace mla
