// MlaDecoding and MlaPrefillSparse: which kernel attends, into how many parts the host cuts the keys, and the merge of the parts.
#include "attend_items.cuh"

namespace mla {
namespace {

constexpr int most_rows = 64;  // of a block of any attention kernel
constexpr int slots_of_processor = 4;
constexpr int merge_columns = 128;  // of a slice, four a lane
constexpr int merge_warps = 4;
// Where there is a plan: blocks on a multiprocessor, and parts of a row whose values are in flight.
constexpr int merge_blocks = 6, merge_batch = 3;
// Where there is none, all parts of a row are in flight, be they `most_parts`: more of them than elsewhere are written and read in a
// tile's time.
constexpr double host_merge_bytes = 1e7;

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

// The same of a part as it lies: f32, or of two bytes a value (R 512).
template <int type>
struct Four {
    uint2 pairs;

    __device__ void load(const Partials& partials, const float* part, int column, int rank) {
        int const at = type == MLA_FLOAT16 ? partials.narrow_column(column) : column;
        pairs = column < rank ? *reinterpret_cast<const uint2*>(reinterpret_cast<const uint16_t*>(part) + at) : make_uint2(0, 0);
    }
    __device__ float4 get() const { return four_of<type>(pairs); }
};

template <>
struct Four<MLA_FLOAT> {
    float4 values;

    __device__ void load(const Partials&, const float* part, int column, int rank) { values = load_columns(part, column, rank); }
    __device__ float4 get() const { return values; }
};

// `slices` slices of a row's columns from `first_slice` on, by `warps` warps that take turns with the parts, each with the values of `batch`
// parts in flight; `part_of` is the warp's number among them. Weighs the parts by 2^(lse - largest) and adds the sink to their sum. Every
// warp makes the weights, two parts a lane. Nothing of the values depends on the weights, so that both are in flight together. `known_rank`:
// R, where outputs may be written in fours; 0: any.
template <int type, int warps, int batch, int slices, int known_rank = 0>
__device__ void merge_row(const Attend& work, const Partials& partials, const Merge& merge, int row, int first_slice, int part_of) {
    static_assert(warps == 1 || slices == 1);
    int64_t const token = merge.first_token + (merge.first_head + row) / work.heads;
    int const head = (merge.first_head + row) % work.heads, lane = threadIdx.x % warp_size, parts = merge.parts();
    int const rank = known_rank > 0 ? known_rank : work.layout.rank, column = first_slice * merge_columns + 4 * lane;

    int32_t slots[2] = {};
    float lse[2] = {-INFINITY, -INFINITY};
    constexpr int halves = (slices * merge_columns + 255) / 256;  // of the columns, which may be of either type each
    uint32_t wide[2] = {};  // halves that are f32, as bits
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        int const part = lane + i * warp_size;
        if (part >= parts) continue;
        slots[i] = merge.slot_of(part);
        lse[i] = partials.lse[partials.row(slots[i], row)];
        if constexpr (type == MLA_FLOAT16) {
            if (partials.narrow == nullptr) continue;
#pragma unroll
            for (int half = 0; half < halves; ++half) {
                if (*partials.narrow_at(slots[i], row, first_slice * merge_columns + 256 * half) == 0) wide[i] |= 1u << half;
            }
        }
    }
    Four<type> values[batch][slices];
    auto load = [&](int first) {
#pragma unroll
        for (int i = 0; i < batch; ++i) {
            int const part = first + i * warps + part_of;
            int32_t const slot = __shfl_sync(0xffffffffu, part < warp_size ? slots[0] : slots[1], part % warp_size);
#pragma unroll
            for (int k = 0; k < slices; ++k) {
                values[i][k].load(partials, partials.output + partials.row(slot, row) * rank, column + k * merge_columns, part < parts ? rank : 0);
            }
        }
    };
    load(0);
    // most are float16, and loaded so before that is known
    bool const all_narrow = type != MLA_FLOAT16 || __all_sync(0xffffffffu, (wide[0] | wide[1]) == 0);
    bool const there = !partials.by_token || work.step.sequence_of(token) >= 0;  // else nobody has written the parts
    float const largest = there ? warp_max(fmaxf(lse[0], lse[1])) : -INFINITY;
    float const base = largest == -INFINITY ? 0.0f : largest;
    float const sum = warp_sum(exp2f(lse[0] - base) + exp2f(lse[1] - base));
    float denominator = sum;
    if (work.sinks != nullptr) denominator += exp2f(work.sinks[head] * log2e - base);
    float weights[2];
    for (int i = 0; i < 2; ++i) weights[i] = largest == -INFINITY ? 0.0f : exp2f(lse[i] - base) / denominator * partials.scale;

    float4 total[slices];
#pragma unroll
    for (int k = 0; k < slices; ++k) total[k] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 1
    for (int first = 0; first < parts; first += batch * warps) {
        if (first > 0) load(first);
#pragma unroll
        for (int i = 0; i < batch; ++i) {
            int const part = first + i * warps + part_of;
            float const weight = __shfl_sync(0xffffffffu, part < warp_size ? weights[0] : weights[1], part % warp_size);
            uint32_t wide_halves = 0;
            int32_t slot = 0;
            if (!all_narrow) {
                wide_halves = __shfl_sync(0xffffffffu, part < warp_size ? wide[0] : wide[1], part % warp_size);
                slot = __shfl_sync(0xffffffffu, part < warp_size ? slots[0] : slots[1], part % warp_size);
            }
            if (part >= parts || !there) continue;
#pragma unroll
            for (int k = 0; k < slices; ++k) {
                float4 four = values[i][k].get();
                if ((wide_halves >> (k * merge_columns / 256) & 1) != 0) {
                    four = load_columns(partials.output + partials.row(slot, row) * rank, column + k * merge_columns, rank);
                }
                total[k].x = fmaf(weight, four.x, total[k].x);
                total[k].y = fmaf(weight, four.y, total[k].y);
                total[k].z = fmaf(weight, four.z, total[k].z);
                total[k].w = fmaf(weight, four.w, total[k].w);
            }
        }
    }
    if constexpr (warps > 1) {
        __shared__ float sums[warps][merge_columns];
        *reinterpret_cast<float4*>(&sums[part_of][4 * lane]) = total[0];
        __syncthreads();
        if (part_of != 0) return;
        for (int i = 1; i < warps; ++i) {
            float4 const other = *reinterpret_cast<const float4*>(&sums[i][4 * lane]);
            total[0].x += other.x;
            total[0].y += other.y;
            total[0].z += other.z;
            total[0].w += other.w;
        }
    }
    int64_t const at = token * work.output.token_stride + head * work.output.head_stride;
#pragma unroll
    for (int k = 0; k < slices; ++k) {
        int const first = column + k * merge_columns;
        if (known_rank > 0 || first + 4 <= rank) {
            store_four(work.output.data, work.output.type, at + first, total[k], known_rank > 0 || partials.output_aligned);
        } else {
            float const last[3] = {total[k].x, total[k].y, total[k].z};
            for (int i = 0; first + i < rank; ++i) store_float(work.output.data, work.output.type, at + first + i, last[i]);
        }
    }
    if (first_slice == 0 && lane == 0 && work.lse != nullptr) {
        work.lse[token * work.heads + head] = largest == -INFINITY ? -INFINITY : (largest + log2f(sum)) * ln2;
    }
}

// R of the rows that are merged by a kernel with few instructions, for they are read from memory in each step. Parts in two bytes are such
// rows always.
constexpr int lean_rank = 512;

// Where the host cuts: block (row of an item, slice), whose warps take turns with the parts, `batch` for each.
template <int type, int batch, int known_rank>
__global__ void __launch_bounds__(merge_warps* warp_size) merge_kernel(Attend work, Partials partials) {
    int32_t const number = static_cast<int32_t>(blockIdx.x) / partials.rows, row = static_cast<int32_t>(blockIdx.x) % partials.rows;
    let_next_kernel_begin();
    Item const item = rows_of_item(work, partials, number);
    wait_for_kernel_before();
    if (row >= item.count) return;
    Merge const merge{item.first_token, item.first_head, item.count, number * partials.splits, 1, partials.splits, 0, 0, 1, 0};
    merge_row<type, merge_warps, batch, 1, known_rank>(work, partials, merge, row, blockIdx.y, threadIdx.x / warp_size);
}

// The one that has just enough parts in flight: more are instructions for nothing.
template <int type, int known_rank>
auto choose_merge(int splits) {
    static_assert(16 * merge_warps >= most_parts);
    return splits <= 4 * merge_warps   ? merge_kernel<type, 4, known_rank>
           : splits <= 8 * merge_warps ? merge_kernel<type, 8, known_rank>
                                       : merge_kernel<type, 16, known_rank>;
}

// What the plan says, which is there before attention lets this kernel begin. Warps take whole rows in turn; those that follow each other are of
// different blocks.
template <int type, int known_rank>
__global__ void __launch_bounds__(merge_warps* warp_size, merge_blocks) merge_planned_kernel(Attend work, Partials partials) {
    let_next_kernel_begin();
    int32_t const items = partials.plan.counts->merges, row_mask = partials.rows - 1, row_shift = __popc(row_mask);
    int const slices = ceil_div(work.layout.rank, merge_columns);
    auto const warp = static_cast<int32_t>(threadIdx.x / warp_size * gridDim.x + blockIdx.x);
    Merge merge{};
    if (warp >> row_shift < items) merge = partials.plan.merges[warp >> row_shift];
    wait_for_kernel_before();
    for (int32_t i = warp; i >> row_shift < items; i += static_cast<int32_t>(merge_warps * gridDim.x)) {
        if (i != warp) merge = partials.plan.merges[i >> row_shift];
        if ((i & row_mask) >= merge.rows) continue;
        if constexpr (known_rank > 0) {
            merge_row<type, 1, merge_batch, known_rank / merge_columns, known_rank>(work, partials, merge, i & row_mask, 0, 0);
        } else {
            for (int slice = 0; slice < slices; ++slice) merge_row<type, 1, 8, 1>(work, partials, merge, i & row_mask, slice, 0);
        }
    }
}

int merge_parts(const Attend& work, const Partials& partials, int64_t items, const Device& device, cudaStream_t stream) {
    constexpr int threads = merge_warps * warp_size;
    if (partials.plan.items != nullptr) {
        bool const lean = work.layout.rank == lean_rank && partials.output_aligned;
        auto const kernel = partials.type == MLA_FLOAT16    ? merge_planned_kernel<MLA_FLOAT16, lean_rank>
                            : partials.type == MLA_BFLOAT16 ? merge_planned_kernel<MLA_BFLOAT16, lean_rank>
                            : lean                          ? merge_planned_kernel<MLA_FLOAT, lean_rank>
                                                            : merge_planned_kernel<MLA_FLOAT, 0>;
        return launch_early("attention", kernel, merge_blocks * device.multiprocessors, threads, 0, device, stream, work, partials);
    }
    dim3 const grid(static_cast<unsigned>(items * partials.rows), ceil_div(work.layout.rank, merge_columns));
    auto const kernel = partials.type == MLA_FLOAT16    ? choose_merge<MLA_FLOAT16, lean_rank>(partials.splits)
                        : partials.type == MLA_BFLOAT16 ? choose_merge<MLA_BFLOAT16, lean_rank>(partials.splits)
                                                        : choose_merge<MLA_FLOAT, 0>(partials.splits);
    return launch_early("attention", kernel, grid, threads, 0, device, stream, work, partials);
}

// How the keys of each item are cut: into how many parts, each of how many blocks.
struct Cut {
    int splits = 1, cluster = 1;
    double cost = 1e30;
};

// As many blocks as fill the GPU evenly, as few as that takes.
Cut choose_splits(const Partials& partials, int64_t items, int64_t keys, int rank, int cluster) {
    int64_t const tiles = ceil_div<int64_t>(keys, partials.tile);
    int64_t limit = ceil_div<int64_t>(tiles, cluster);
    if (limit > most_parts) limit = most_parts;
    if (limit > partials.slots / items) limit = partials.slots / items;
    // In units of a tile's time on a multiprocessor: each wave takes its blocks' tiles and what a block takes besides; parts
    // are written and read again.
    double const merged = static_cast<double>(items) * partials.item_rows * rank * 2 * (partials.type == MLA_FLOAT ? 4 : 2) / host_merge_bytes;
    Cut best;
    for (int splits = cluster > 1 ? 2 : 1; splits <= limit; ++splits) {  // a cluster makes parts, and no outputs
        int64_t const blocks = int64_t{splits} * cluster;
        auto const waves = static_cast<double>(ceil_div<int64_t>(items * blocks, partials.multiprocessors));
        double const cost = waves * (static_cast<double>(ceil_div<int64_t>(tiles, blocks) + block_tiles) + (cluster > 1 ? cluster_tiles : 0.0)) +
                            (splits > 1 ? 1.0 + merged * splits : 0.0);
        if (cost < best.cost) best = {splits, cluster, cost};
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
    Attention attention{};
    if (int status = begin_attention(call, work, false, &attention)) return status;
    return call.workspace.sizing() ? MLA_OK : attend(work, attention, false, call.stream);
}

}  // namespace

int begin_attention(Call& call, const Attend& work, bool beside, Attention* attention) {
    if (work.step.tokens == 0 || work.heads == 0) return MLA_OK;
    Device device;
    if (int status = current_device(&device)) return status;
    attention->kernel = attend_takes_hopper_fp8(work, device)    ? Attention::hopper_fp8
                        : attend_takes_hopper_bf16(work, device) ? Attention::hopper_bf16
                        : attend_takes_tensor_cores(work, device) ? Attention::tensor_cores
                                                                  : Attention::exact;
    Partials& partials = attention->partials;
    partials = {};
    partials.cluster = 1;
    switch (attention->kernel) {
        case Attention::hopper_fp8: partials.set_rows(hopper_fp8_rows(work)); break;
        case Attention::hopper_bf16: partials.set_rows(hopper_bf16_rows); break;
        case Attention::tensor_cores: partials.set_rows(tensor_core_rows(work, device)); break;
        case Attention::exact: partials.set_rows(exact_rows); break;
    }
    partials.tile = attention->kernel == Attention::hopper_fp8 ? hopper_fp8_tile : attend_tile;
    // of rows with one scale for all, parts are of the codes, not of what these stand for
    bool const of_codes = attention->kernel == Attention::hopper_fp8 && work.layout.format == row_format::fp8_flat;
    partials.scale = of_codes ? work.layout.kv_scale : 1.0f;
    partials.multiprocessors = device.multiprocessors;
    partials.slots = slots_of_processor * device.multiprocessors;
    partials.output_aligned = in_fours(work.output);
    partials.by_token = work.indices != nullptr || attention->kernel == Attention::exact;
    attention->items = most_items(work, partials.item_rows, partials.by_token);
    bool const planned = !partials.by_token && work.step.sequences != 1;
    // An engine has room for what its largest step needs, and a smaller step may have more rows a block.
    int64_t const rows = int64_t{partials.slots} * most_rows;
    size_t const mark = call.workspace.mark();
    partials.output = call.workspace.take<float>(rows * work.layout.rank);
    partials.lse = call.workspace.take<float>(rows);
    partials.narrow = call.workspace.take<int32_t>(int64_t{partials.slots} * 8);
    partials.type = MLA_FLOAT;
    Plan const plan = take_plan(call.workspace, work, partials);
    call.workspace.release(mark);
    if (call.workspace.sizing()) return MLA_OK;
    // Parts' bytes are much of what a step takes. What e4m3 products lose is more than bfloat16 does; what those of bfloat16 lose is about as
    // much. float16 holds whatever is made of codes alone.
    if (attention->kernel == Attention::hopper_fp8) partials.type = of_codes ? MLA_FLOAT16 : MLA_BFLOAT16;
    if (of_codes) partials.narrow = nullptr;
    if (attention->kernel == Attention::hopper_bf16 && hopper_bf16_halves(work.layout.format)) partials.type = MLA_FLOAT16;
    if (planned) {
        partials.plan = plan;
        return plan_attention(work, partials, beside, call.stream);
    }
    int64_t const keys = work.indices == nullptr ? work.step.max_pages * work.layout.page_size : work.top_k;
    Cut cut = choose_splits(partials, attention->items, keys, work.layout.rank, 1);
    if (attention->kernel == Attention::hopper_fp8 && hopper_fp8_takes_clusters(work, partials)) {
        Cut const clusters = choose_splits(partials, attention->items, keys, work.layout.rank, hopper_fp8_cluster);
        if (clusters.cost < cut.cost) cut = clusters;
    }
    partials.splits = cut.splits;
    partials.cluster = cut.cluster;
    return MLA_OK;
}

int attend(const Attend& work, const Attention& attention, bool leaves_parts, cudaStream_t stream) {
    if (work.step.tokens == 0 || work.heads == 0) return MLA_OK;
    Device device;
    if (int status = current_device(&device)) return status;
    const Partials& partials = attention.partials;
    int status = MLA_OK;
    switch (attention.kernel) {
        case Attention::hopper_fp8: status = attend_hopper_fp8(work, partials, stream); break;
        case Attention::hopper_bf16: status = attend_hopper_bf16(work, partials, stream); break;
        case Attention::tensor_cores: status = attend_tensor_cores(work, partials, device, stream); break;
        case Attention::exact: status = attend_exact(work, partials, stream); break;
    }
    if (status != MLA_OK || partials.splits == 1 || leaves_parts) return status;
    return merge_parts(work, partials, attention.items, device, stream);
}

int run_decoding(Call& call) { return run(call, ops[op::decoding]); }

int run_prefill_sparse(Call& call) { return run(call, ops[op::prefill_sparse]); }

}  // namespace mla
