// MlaDecoding and MlaPrefillSparse: which kernel attends, into how many parts the host cuts the keys, and the merge of the parts.
#include "attend_items.cuh"

namespace mla {
namespace {

constexpr int most_rows = 64;  // of a block of any attention kernel
constexpr int slots_of_processor = 4;
constexpr int merge_columns = 128;  // of a slice, four a lane
constexpr int merge_warps = 4;
constexpr int merge_blocks = 7;  // on a multiprocessor, where there is a plan

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

// A slice of a row's columns, by `warps` warps that take turns with the parts, and each have the values of `batch` in flight; `part_of` is
// the warp's number among them. Weighs the parts by 2^(lse - largest) and adds the sink to their sum. Every warp makes the weights, two parts a lane.
template <int warps, int batch>
__device__ void merge_slice(const Attend& work, const Partials& partials, const Merge& merge, int row, int slice, int part_of) {
    __shared__ float sums[merge_warps][merge_columns];
    int64_t const token = merge.first_token + (merge.first_head + row) / work.heads;
    int const head = (merge.first_head + row) % work.heads, lane = threadIdx.x % warp_size, parts = merge.parts();
    int const rank = work.layout.rank, column = slice * merge_columns + 4 * lane;
    bool const there = work.step.sequence_of(token) >= 0;

    int32_t slots[2] = {};
    float lse[2] = {-INFINITY, -INFINITY};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        int const part = lane + i * warp_size;
        if (!there || part >= parts) continue;
        slots[i] = merge.slot_of(part);
        lse[i] = partials.lse[partials.row(slots[i], row)];
    }
    // nothing of the values depends on the weights, so that both are in flight together
    float4 values[batch];
    auto load = [&](int first) {
#pragma unroll
        for (int i = 0; i < batch; ++i) {
            int const part = first + i * warps + part_of;
            int32_t const slot = __shfl_sync(0xffffffffu, part < warp_size ? slots[0] : slots[1], part % warp_size);
            values[i] = load_columns(partials.output + partials.row(slot, row) * rank, column, there && part < parts ? rank : 0);
        }
    };
    load(0);
    float const largest = warp_max(fmaxf(lse[0], lse[1]));
    float const base = largest == -INFINITY ? 0.0f : largest;
    float const sum = warp_sum(exp2f(lse[0] - base) + exp2f(lse[1] - base));
    float denominator = sum;
    if (work.sinks != nullptr) denominator += exp2f(work.sinks[head] * log2e - base);
    float weights[2];
    for (int i = 0; i < 2; ++i) weights[i] = largest == -INFINITY ? 0.0f : exp2f(lse[i] - base) / denominator;

    float4 total = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 1
    for (int first = 0; first < parts; first += batch * warps) {
        if (first > 0) load(first);
#pragma unroll
        for (int i = 0; i < batch; ++i) {
            int const part = first + i * warps + part_of;
            float const weight = __shfl_sync(0xffffffffu, part < warp_size ? weights[0] : weights[1], part % warp_size);
            if (part >= parts) continue;
            total.x = fmaf(weight, values[i].x, total.x);
            total.y = fmaf(weight, values[i].y, total.y);
            total.z = fmaf(weight, values[i].z, total.z);
            total.w = fmaf(weight, values[i].w, total.w);
        }
    }
    if constexpr (warps > 1) {
        __syncthreads();  // the sums before are read
        *reinterpret_cast<float4*>(&sums[part_of][4 * lane]) = total;
        __syncthreads();
        if (part_of != 0) return;
        for (int i = 1; i < warps; ++i) {
            float4 const other = *reinterpret_cast<const float4*>(&sums[i][4 * lane]);
            total.x += other.x;
            total.y += other.y;
            total.z += other.z;
            total.w += other.w;
        }
    }
    int64_t const at = token * work.output.token_stride + head * work.output.head_stride + column;
    if (column + 4 <= rank) {
        store_four(work.output.data, work.output.type, at, total, partials.output_aligned);
    } else {
        float const last[3] = {total.x, total.y, total.z};
        for (int i = 0; column + i < rank; ++i) store_float(work.output.data, work.output.type, at + i, last[i]);
    }
    if (slice == 0 && lane == 0 && work.lse != nullptr) {
        work.lse[token * work.heads + head] = largest == -INFINITY ? -INFINITY : (largest + log2f(sum)) * ln2;
    }
}

// Where the host cuts: block (row of an item, slice).
__global__ void __launch_bounds__(merge_warps* warp_size) merge_kernel(Attend work, Partials partials) {
    int32_t const number = static_cast<int32_t>(blockIdx.x) / partials.rows, row = static_cast<int32_t>(blockIdx.x) % partials.rows;
    Item const item = rows_of_item(work, partials, number);
    if (row >= item.count) return;
    Merge const merge{item.first_token, item.first_head, item.count, number * partials.splits, 1, partials.splits, 0, 0, 1, 0};
    merge_slice<merge_warps, 8>(work, partials, merge, row, blockIdx.y, threadIdx.x / warp_size);
}

// What the plan says; blocks take rows in turn. Most items are in few parts: then each warp has its own slice.
__global__ void __launch_bounds__(merge_warps* warp_size, merge_blocks) merge_planned_kernel(Attend work, Partials partials) {
    wait_for_kernel_before();
    int32_t const items = partials.plan.counts->merges, row_mask = partials.rows - 1, row_shift = __popc(row_mask);
    int const slices = ceil_div(work.layout.rank, merge_columns), warp = threadIdx.x / warp_size;
    for (auto i = static_cast<int32_t>(blockIdx.x); i >> row_shift < items; i += static_cast<int32_t>(gridDim.x)) {
        Merge const merge = partials.plan.merges[i >> row_shift];
        if ((i & row_mask) >= merge.rows) continue;
        constexpr int few_parts = 16;
        if (merge.parts() <= few_parts) {
            for (int slice = warp; slice < slices; slice += merge_warps) merge_slice<1, 8>(work, partials, merge, i & row_mask, slice, 0);
        } else {
            for (int slice = 0; slice < slices; ++slice) merge_slice<merge_warps, 4>(work, partials, merge, i & row_mask, slice, warp);
        }
    }
}

int merge_parts(const Attend& work, const Partials& partials, int64_t items, const Device& device, cudaStream_t stream) {
    constexpr int threads = merge_warps * warp_size;
    if (partials.plan.items != nullptr) {
        return launch_early(merge_planned_kernel, merge_blocks * device.multiprocessors, threads, 0, device, stream, work, partials);
    }
    dim3 const grid(static_cast<unsigned>(items * partials.rows), ceil_div(work.layout.rank, merge_columns));
    merge_kernel<<<grid, threads, 0, stream>>>(work, partials);
    return check_launch("merge of partial attention");
}

// How many parts the keys of each item are cut into: as many as fill the GPU evenly, as few as that takes.
int choose_splits(const Partials& partials, int64_t items, int64_t keys, int rank, int tile) {
    int64_t const tiles = ceil_div<int64_t>(keys, tile);
    int64_t limit = tiles < most_parts ? tiles : most_parts;
    if (limit > partials.slots / items) limit = partials.slots / items;
    // In units of a tile's time on a multiprocessor: each wave takes its blocks' tiles and what a block takes besides; parts
    // are written and read again.
    double const merged = static_cast<double>(items) * partials.rows * rank * 2 * sizeof(float) / merge_bytes;
    int best = 1;
    double best_cost = 1e30;
    for (int splits = 1; splits <= limit; ++splits) {
        auto const waves = static_cast<double>(ceil_div<int64_t>(items * splits, partials.multiprocessors));
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
    bool const exact = !hopper_fp8 && !hopper_bf16 && !tensor_cores;
    Partials partials{};
    partials.rows = hopper_fp8     ? hopper_fp8_rows(work)
                    : hopper_bf16  ? hopper_bf16_rows
                    : tensor_cores ? tensor_core_rows(work, device)
                                   : exact_rows;
    partials.multiprocessors = device.multiprocessors;
    partials.slots = slots_of_processor * device.multiprocessors;
    partials.output_aligned = in_fours(work.output);
    partials.by_token = work.indices != nullptr || exact;
    bool const planned = !partials.by_token && work.step.sequences != 1;
    // An engine has room for what its largest step needs, and a smaller step may have more rows a block.
    int64_t const rows = int64_t{partials.slots} * most_rows;
    size_t const mark = call.workspace.mark();
    partials.output = call.workspace.take<float>(rows * work.layout.rank);
    partials.lse = call.workspace.take<float>(rows);
    Plan const plan = take_plan(call.workspace, work, partials);
    call.workspace.release(mark);
    if (call.workspace.sizing()) return MLA_OK;
    int const tile = hopper_fp8 ? 128 : 64;
    int64_t const items = most_items(work, partials.rows, partials.by_token);
    if (planned) {
        partials.plan = plan;
        if (int status = plan_attention(work, partials, tile, call.stream)) return status;
    } else {
        int64_t const keys = work.indices == nullptr ? work.step.max_pages * work.layout.page_size : work.top_k;
        partials.splits = choose_splits(partials, items, keys, work.layout.rank, tile);
    }
    int const status = hopper_fp8     ? attend_hopper_fp8(work, partials, call.stream)
                       : hopper_bf16  ? attend_hopper_bf16(work, partials, call.stream)
                       : tensor_cores ? attend_tensor_cores(work, partials, device, call.stream)
                                      : attend_exact(work, partials, call.stream);
    if (status != MLA_OK || partials.splits == 1) return status;
    return merge_parts(work, partials, items, device, call.stream);
}

int run_decoding(Call& call) { return run(call, ops[op::decoding]); }

int run_prefill_sparse(Call& call) { return run(call, ops[op::prefill_sparse]); }

}  // namespace mla
