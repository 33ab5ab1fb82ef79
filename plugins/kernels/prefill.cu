#include "prefill.h"

#include <algorithm>

#include "prefill_hopper.cuh"
#include "prefill_plain.cuh"
#include "prefill_tensor.cuh"

namespace mla {

namespace {

using prefill_step::Plan;
using prefill_tensor::Shape;

// Bounds of the scratch memory, in bytes and keys. A single head's keys or states may take more.
constexpr int64_t expanded_bytes = int64_t{128} << 20;
constexpr int64_t state_bytes = int64_t{128} << 20;
constexpr int64_t most_chunk_keys = 16384;

// By columns of the output. Two row tiles a warp halve the traffic of keys and values from shared memory; 256 columns leave
// registers for one.
using Narrow = Shape<2, 4, 64, 2>;
using Middle = Shape<2, 4, 128, 2>;
using DeepSeek = Shape<2, 4, 128, 2, 128, 64>;
using Wide = Shape<1, 8, 256, 1>;

// Sizes and scratch memory. No size shrinks when a shape grows, so that memory for the largest shapes serves all.
Plan make_plan(const PrefillArguments& a, Workspace& workspace) {
    // padding alone has no sequence, and yet its tensors have maps
    int64_t const tokens = a.step.tokens, sequences = std::max<int64_t>(a.step.sequences, 1), heads = std::max(a.heads, 1);
    Plan plan{};
    plan.arguments = a;
    plan.nope = round_up(a.nope, 16);
    plan.rope = round_up(a.layout.rope, 16);
    plan.value = round_up(a.value, 16);
    plan.rank = round_up(a.layout.rank, prefill_tensor::expand_depth);
    plan.key_stride = round_up(plan.nope + plan.rope, 64);
    plan.value_slices = std::max(ceil_div(plan.value, Wide::width), 1);
    auto const in_vectors = [](const HeadView<const void*>& view) {
        return aligned_for_eight(view.data, view.token_stride, view.head_stride, view.type);
    };
    plan.nope_vectors = in_vectors(a.query_nope);
    plan.rope_vectors = in_vectors(a.query_rope);
    plan.output_pairs = reinterpret_cast<uintptr_t>(a.output.data) % 4 == 0 && a.value % 2 == 0 &&
                        a.output.token_stride % 2 == 0 && a.output.head_stride % 2 == 0;

    // heads of a group: as many as the memory for states takes
    int64_t const head_state_bytes = tokens * (4 * plan.value + 8 * plan.value_slices);
    int64_t const all_states = std::min(heads * head_state_bytes, std::max(state_bytes, head_state_bytes));
    int64_t const most_heads =
        std::clamp<int64_t>(head_state_bytes > 0 ? all_states / head_state_bytes : heads, 1, heads);
    int64_t const groups = ceil_div(heads, most_heads);
    int64_t const group_heads = ceil_div(heads, groups);
    plan.group_heads = static_cast<int32_t>(group_heads);

    // key tiles of a chunk: as many as the memory for keys and values takes
    int64_t const sequence_tiles =
        ceil_div<int64_t>(std::min<int64_t>(a.step.max_pages * a.layout.page_size, prefill_step::most_keys),
                          prefill_step::key_tile) + 1;
    int64_t const all_keys = sequences * sequence_tiles * prefill_step::key_tile;
    int64_t const key_bytes = int64_t{2} * plan.columns();  // of one head
    int64_t const least = prefill_step::key_tile * heads * key_bytes;  // a tile of every head
    int64_t const all_expanded =
        std::min(heads * std::min(all_keys, most_chunk_keys) * key_bytes, std::max(expanded_bytes, least));
    int64_t const chunk_keys = std::min({all_expanded / (group_heads * key_bytes), all_keys, most_chunk_keys});
    plan.chunk_tiles = static_cast<int32_t>(std::max<int64_t>(chunk_keys / prefill_step::key_tile, 1));
    plan.places = static_cast<int32_t>(std::min(heads, all_expanded / (plan.chunk_keys() * key_bytes)));
    // whole tiles of the expansion, which reads what lies behind a chunk's last key
    plan.gathered = std::min(round_up<int64_t>(all_keys, prefill_tensor::expand_tile), most_chunk_keys);

    plan.counter = workspace.take<int32_t>(1 + 2 * heads);
    plan.query_tiles = workspace.take<int32_t>(sequences + 1);
    plan.key_tiles = workspace.take<int32_t>(sequences + 1);
    plan.key_masks = workspace.take<uint64_t>(plan.gathered / prefill_step::key_tile);
    plan.row_scales = workspace.take<float>(plan.gathered);
    plan.latents = workspace.take<__nv_bfloat16>(plan.gathered * plan.rank);
    plan.ropes = workspace.take<__nv_bfloat16>(plan.gathered * plan.rope);
    plan.weights = workspace.take<__nv_bfloat16>(heads * plan.columns() * plan.rank);
    plan.expanded = workspace.take<__nv_bfloat16>(all_expanded / 2);
    plan.states = workspace.take<float>(all_states / 4);
    if (plan.states != nullptr) {
        plan.state_sums = reinterpret_cast<float2*>(plan.states + group_heads * tokens * plan.value);
    }
    return plan;
}

template <typename S>
int launch_tensor(const Plan& plan, const Device& device, cudaStream_t stream) {
    int const bytes = static_cast<int>(S::shared_bytes(plan.key_stride));
    auto* const kernel = prefill_tensor::prefill_tensor<S>;
    if (int status = check_cuda("MlaPrefill: shared memory",
                                cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes))) {
        return status;
    }
    int blocks = 0;
    if (int status = check_cuda("MlaPrefill: occupancy",
                                cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, S::threads, bytes))) {
        return status;
    }
    void* parameters[] = {const_cast<Plan*>(&plan)};
    return check_cuda("MlaPrefill",
                      cudaLaunchCooperativeKernel(kernel, dim3(blocks * device.multiprocessors), dim3(S::threads),
                                                  parameters, bytes, stream));
}

// Whether SM90's own kernel takes it.
bool takes_hopper(const Plan& plan, const Device& device) {
    using S = prefill_hopper::HopperShape;
    return device.major == 9 && plan.arguments.nope == S::nope && plan.arguments.layout.rope == S::rope &&
           plan.arguments.value == S::width && plan.rank == 512 && has_hopper_code();
}

int launch_hopper(const Plan& plan, const Device& device, cudaStream_t stream) {
    const PrefillArguments& a = plan.arguments;
    prefill_hopper::Maps maps{};
    int64_t const heads = a.heads, chunk_keys = plan.chunk_keys();
    auto const is_bf16 = [](int type) { return type == MLA_BFLOAT16; };
    maps.outputs = is_bf16(a.output.type) &&
                   aligned_for_eight(a.output.data, a.output.token_stride, a.output.head_stride, a.output.type);
    maps.queries = plan.nope_vectors && plan.rope_vectors && is_bf16(a.query_nope.type) && is_bf16(a.query_rope.type) &&
                   a.softmax_scale >= 0.0f;
    if (maps.queries) {
        auto const map_queries = [&](CUtensorMap* map, const HeadView<const void*>& view, int64_t values) {
            int64_t const head = 2 * view.head_stride, token = 2 * view.token_stride;
            return make_tensor_map(map, view.data, {2 * values, heads, a.step.tokens, 1}, {head, token, token}, {128, 1, 128, 1});
        };
        if (int status = map_queries(&maps.query_nope, a.query_nope, a.nope)) return status;
        if (int status = map_queries(&maps.query_rope, a.query_rope, a.layout.rope)) return status;
    }
    std::array<int, 4> const box{128, 128, 1, 1};
    std::array<int64_t, 3> const of_ranks{1024, 1024, 1024};
    if (int status = make_tensor_map(&maps.latents, plan.latents, {1024, plan.gathered, 1, 1}, of_ranks, box)) return status;
    using S = prefill_hopper::HopperShape;
    auto const are_plain = [](const BlockScaledWeight& weight) {
        return weight.type == MLA_BFLOAT16 && weight.scale == nullptr && reinterpret_cast<uintptr_t>(weight.data) % 16 == 0;
    };
    maps.weights = a.layout.rank == plan.rank && are_plain(a.w_uk) && are_plain(a.w_uv);
    const void* const key_weights = maps.weights ? a.w_uk.data : plan.weights;
    const void* const value_weights = maps.weights ? a.w_uv.data : plan.weights + heads * S::nope * plan.rank;
    if (int status = make_tensor_map(&maps.key_weights, key_weights, {2 * S::nope, heads * plan.rank, 1, 1}, {256, 256, 256},
                                     {128, 64, 1, 1})) {
        return status;
    }
    if (int status = make_tensor_map(&maps.value_weights, value_weights, {1024, heads * S::width, 1, 1}, of_ranks, box)) return status;
    if (int status = make_tensor_map(&maps.expanded, plan.expanded, {512, chunk_keys, plan.places, 1},
                                     {512, 512 * chunk_keys, 512}, box)) {
        return status;
    }
    if (int status = make_tensor_map(&maps.expanded_rows, plan.expanded, {512, chunk_keys, plan.places, 1},
                                     {512, 512 * chunk_keys, 512}, {128, 8, 1, 1})) {
        return status;
    }
    if (int status = make_tensor_map(&maps.ropes, plan.ropes, {128, plan.gathered, 1, 1}, {128, 128, 128}, box)) return status;
    auto* const kernel = prefill_hopper::prefill_hopper;
    constexpr int bytes = prefill_hopper::place::total;
    if (int status = check_cuda("MlaPrefill: shared memory",
                                cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes))) {
        return status;
    }
    void* parameters[] = {const_cast<Plan*>(&plan), &maps};
    return check_cuda("MlaPrefill",
                      cudaLaunchCooperativeKernel(kernel, dim3(device.multiprocessors),
                                                  dim3(prefill_hopper::block_threads), parameters, bytes, stream));
}

int launch_plain(const PrefillArguments& a, const Device& device, cudaStream_t stream) {
    int heads = std::min(a.heads, prefill_plain::most_heads);
    auto const bytes = [&] { return 4 * prefill_plain::shared_floats(heads, a.layout.rank, a.layout.rope); };
    int64_t const available = device.shared_bytes - 1024;  // less what the kernel has besides
    while (heads > 1 && bytes() > available) --heads;
    if (bytes() > available) {
        return fail(MLA_UNSUPPORTED, "MlaPrefill: rows of %d + %d values do not fit into this GPU's shared memory",
                    a.layout.rank, a.layout.rope);
    }
    auto* const kernel = prefill_plain::prefill_plain;
    if (int status = check_cuda("MlaPrefill: shared memory",
                                cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                     static_cast<int>(bytes())))) {
        return status;
    }
    dim3 const grid(static_cast<unsigned>(a.step.tokens), static_cast<unsigned>(ceil_div(a.heads, heads)));
    kernel<<<grid, prefill_plain::threads, bytes(), stream>>>(a, heads);
    return check_launch("MlaPrefill");
}

}  // namespace

int enqueue_prefill(const PrefillArguments& a, Workspace& workspace, cudaStream_t stream) {
    bool const in_f32 = a.layout.format == row_format::f32;
    Plan plan{};
    if (!in_f32) plan = make_plan(a, workspace);
    if (workspace.sizing() || a.step.tokens == 0 || a.heads == 0) return MLA_OK;
    Device device;
    if (int status = current_device(&device)) return status;
    int64_t const available = device.shared_bytes - 1024;  // less what the kernels have besides
    if (!in_f32) {
        if (takes_hopper(plan, device)) return launch_hopper(plan, device, stream);
        if (plan.value <= Narrow::width && Narrow::shared_bytes(plan.key_stride) <= available) {
            return launch_tensor<Narrow>(plan, device, stream);
        }
        bool const deepseek = plan.value == DeepSeek::width && plan.nope == DeepSeek::nope && plan.rope == DeepSeek::rope;
        if (deepseek && DeepSeek::shared_bytes(plan.key_stride) <= available) {
            return launch_tensor<DeepSeek>(plan, device, stream);
        }
        if (plan.value <= Middle::width && Middle::shared_bytes(plan.key_stride) <= available) {
            return launch_tensor<Middle>(plan, device, stream);
        }
        if (Wide::shared_bytes(plan.key_stride) <= available) return launch_tensor<Wide>(plan, device, stream);
    }
    return launch_plain(a, device, stream);
}

int run_prefill(Call& call) {
    using namespace mla::prefill;
    const Dims& dims = call.dims;
    int64_t const query_head = dims.Dn + dims.Dr;
    int const query_type = call.in[in::query].type;
    const char* const query = call.input<char>(in::query);
    PrefillArguments a{};
    a.query_nope = {query, query_type, dims.H * query_head, query_head};
    a.query_rope = a.query_nope;
    if (query != nullptr) a.query_rope.data = query + dims.Dn * element_bytes(query_type);
    a.output = {call.output<void>(out::output), call.out[out::output].type, dims.H * dims.Dv, dims.Dv};
    a.lse = call.output<float>(out::lse);
    a.step = make_step(call, in::query_offsets, in::cache_lengths, in::block_table, in::token_sequence, in::positions,
                       call.dims.pages);
    a.layout = KvLayout(call.attributes);
    a.pool = call.input<void>(in::kv_cache);
    a.w_uk = {call.input<void>(in::w_uk), call.in[in::w_uk].type, call.input<float>(in::w_uk_scale)};
    a.w_uv = {call.input<void>(in::w_uv), call.in[in::w_uv].type, call.input<float>(in::w_uv_scale)};
    a.sinks = call.input<float>(in::sinks);
    a.softmax_scale = call.attributes.softmax_scale;
    a.heads = static_cast<int32_t>(dims.H);
    a.nope = static_cast<int32_t>(dims.Dn);
    a.value = static_cast<int32_t>(dims.Dv);
    a.min_new_tokens = 1;
    a.zero_padding = true;
    return enqueue_prefill(a, call.workspace, call.stream);
}

}  // namespace mla
