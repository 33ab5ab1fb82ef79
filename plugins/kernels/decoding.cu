// MlaDecoding and MlaPrefillSparse: how the keys are split, and the merge of the parts.
#include "attend.h"

namespace mla {
namespace {

constexpr int most_splits = 64;
constexpr int merge_columns = 128;  // of a block, four a lane
constexpr int merge_warps = 4;  // each takes every fourth part
constexpr int merge_batch = 8;  // parts of a warp whose values are in flight at a time

// Four values of a part from `column` on, zero behind the last column.
__device__ float4 load_columns(const float* part, int column, int rank) {
    if (rank % 4 == 0) {
        return column < rank ? *reinterpret_cast<const float4*>(part + column) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    }
    float values[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) values[i] = column + i < rank ? part[column + i] : 0.0f;
    return make_float4(values[0], values[1], values[2], values[3]);
}

// Block (token x head, slice of the latent). Weighs the parts by 2^(lse - largest) and adds the sink to their sum. Every warp
// makes the weights, two parts a lane.
__global__ void __launch_bounds__(merge_warps* warp_size) merge_kernel(Attend work, Partials partials) {
    __shared__ float sums[merge_warps][merge_columns];
    int64_t const row = blockIdx.x;
    int64_t const token = row / work.heads;
    int const head = static_cast<int>(row % work.heads);
    int const warp = threadIdx.x / warp_size, lane = threadIdx.x % warp_size, splits = partials.splits;
    int const rank = work.layout.rank, first_column = blockIdx.y * merge_columns;
    int32_t const sequence = work.step.sequence_of(token);

    // nothing of the values depends on the weights, so that both are in flight together
    const float* part = partials.output + row * splits * rank;
    float4 values[merge_batch];
    auto load = [&](int first) {
#pragma unroll
        for (int i = 0; i < merge_batch; ++i) {
            int const split = first + i * merge_warps + warp;
            values[i] = load_columns(part + static_cast<int64_t>(split) * rank, first_column + 4 * lane,
                                     sequence >= 0 && split < splits ? rank : 0);
        }
    };
    load(0);
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
    float weights[2];
    for (int i = 0; i < 2; ++i) weights[i] = largest == -INFINITY ? 0.0f : exp2f(lse[i] - base) / denominator;

    float4 total = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    for (int first = 0; first < splits; first += merge_batch * merge_warps) {
        if (first > 0) load(first);
#pragma unroll
        for (int i = 0; i < merge_batch; ++i) {
            int const split = first + i * merge_warps + warp;
            float const weight = __shfl_sync(0xffffffffu, split < warp_size ? weights[0] : weights[1], split % warp_size);
            if (split >= splits) continue;
            total.x = fmaf(weight, values[i].x, total.x);
            total.y = fmaf(weight, values[i].y, total.y);
            total.z = fmaf(weight, values[i].z, total.z);
            total.w = fmaf(weight, values[i].w, total.w);
        }
    }
    *reinterpret_cast<float4*>(&sums[warp][4 * lane]) = total;
    __syncthreads();
    int const column = first_column + static_cast<int>(threadIdx.x);
    if (column < rank) {
        float value = 0.0f;
#pragma unroll
        for (int i = 0; i < merge_warps; ++i) value += sums[i][threadIdx.x];
        store_float(work.output.data, work.output.type,
                    token * work.output.token_stride + head * work.output.head_stride + column, value);
    }
    if (blockIdx.y == 0 && threadIdx.x == 0 && work.lse != nullptr) {
        work.lse[row] = largest == -INFINITY ? -INFINITY : (largest + log2f(sum)) * ln2;
    }
}

constexpr int block_tiles = 6;  // what a block takes besides its tiles, in tiles' time
constexpr double merge_bytes = 8e6;  // of parts that are written and read in a tile's time

// How many parts the keys of each token are cut into: as many as fill the GPU evenly, as few as that takes. Lengths are in
// device memory, so only the shapes decide: the blocks that there are without a cut, and the tiles of keys at most.
int choose_splits(const Attend& work, const Device& device, int block_rows, int tile, int64_t most_rows) {
    int64_t const rows = work.step.tokens * work.heads;
    int64_t const blocks = work.indices == nullptr ? ceil_div<int64_t>(rows, block_rows)
                                                   : work.step.tokens * ceil_div(work.heads, block_rows);
    int64_t const keys = work.indices == nullptr ? work.step.max_pages * work.layout.page_size : work.top_k;
    int64_t const tiles = ceil_div<int64_t>(keys, tile);
    int64_t limit = tiles < most_splits ? tiles : most_splits;
    if (limit > most_rows / rows) limit = most_rows / rows;
    // In units of a tile's time on a multiprocessor: each wave takes its blocks' tiles and what a block takes besides; parts
    // are written and read again.
    double const merged = static_cast<double>(rows) * work.layout.rank * 2 * sizeof(float) / merge_bytes;
    int best = 1;
    double best_cost = 1e30;
    for (int splits = 1; splits <= limit; ++splits) {
        auto const waves = static_cast<double>(ceil_div<int64_t>(blocks * splits, device.multiprocessors));
        double const cost = waves * static_cast<double>(ceil_div<int64_t>(tiles, splits) + block_tiles) +
                            (splits > 1 ? 1.0 + merged * splits : 0.0);
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
    bool const hopper_fp8 = attend_takes_hopper_fp8(work, device), hopper_bf16 = attend_takes_hopper_bf16(work, device);
    bool const tensor_cores = attend_takes_tensor_cores(work, device);
    int const block_rows = hopper_fp8     ? hopper_fp8_rows(work)
                           : hopper_bf16  ? 64
                           : tensor_cores ? rows_per_block(work)
                                          : 8;
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
    partials.splits = choose_splits(work, device, block_rows, hopper_fp8 ? 128 : 64, most_rows);
    int const status = hopper_fp8     ? attend_hopper_fp8(work, partials, call.stream)
                       : hopper_bf16  ? attend_hopper_bf16(work, partials, call.stream)
                       : tensor_cores ? attend_tensor_cores(work, partials, device, call.stream)
                                      : attend_exact(work, partials, call.stream);
    if (status != MLA_OK) return status;
    if (partials.splits == 1) return MLA_OK;
    dim3 const grid(static_cast<unsigned>(rows), ceil_div(work.layout.rank, merge_columns));
    merge_kernel<<<grid, merge_warps * warp_size, 0, call.stream>>>(work, partials);
    return check_launch("merge of partial attention");
}

int run_decoding(Call& call) { return run(call, ops[op::decoding]); }

int run_prefill_sparse(Call& call) { return run(call, ops[op::prefill_sparse]); }

}  // namespace mla
