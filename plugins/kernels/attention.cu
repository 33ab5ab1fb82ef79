// The composed ops: MlaAttention, MlaSparseAttention and MlaDecodeBranchFp8.
//
// Absorbed: W_UK turns each head's query into one over the latent, attention runs over the cache as it lies, W_UV turns each
// head's mean latent into its output. Between the parts lie bf16 tensors (f32 where the rows are f32). Where a step has more
// tokens than few_new_tokens a sequence, both ways are taken: long prompts with expanded keys and values (prefill.h), the
// others, gathered, absorbed. Which sequence goes where is known on the device only.
#include "append.h"
#include "attend.h"
#include "few_tokens.h"
#include "pool.h"
#include "prefill.h"
#include "projection.h"

namespace mla {
namespace {

// Tokens whose absorbed queries and outputs are held at a time where each has its own list of keys.
constexpr int64_t list_window = 1024;

// What the three ops have in common.
struct Layer {
    View query;  // [T, H, Dn + Dr], not rotated
    View output;  // [T, H, Dv]
    Append append;  // its queries are set here
    Attend attend;  // its query and output are set here
    const MlaTensor *w_uk, *w_uk_scale, *w_uv, *w_uv_scale;  // rank -1: absent
    bool quantized_activations;
    int32_t nope;  // Dn
};

__global__ void copy_kernel(View from, const int32_t* from_tokens, View to, int64_t total, int32_t heads, int32_t columns) {
    for (int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; i < total;
         i += gridDim.x * static_cast<int64_t>(blockDim.x)) {
        int64_t const token = i / columns / heads, head = i / columns % heads, column = i % columns;
        int64_t const source = from_tokens == nullptr ? token : from_tokens[token];
        float const value =
            source < 0 ? 0.0f
                       : load_float(from.data, from.type, source * from.token_stride + head * from.head_stride + column);
        store_float(to.data, to.type, token * to.token_stride + head * to.head_stride + column, value);
    }
}

// `from_tokens` [tokens] or null: the token of `from` for each of `to`, -1 for zeros.
int copy_values(const View& from, const int32_t* from_tokens, const View& to, int64_t tokens, int32_t heads,
                int32_t columns, cudaStream_t stream) {
    int64_t const total = tokens * heads * columns;
    if (total == 0) return MLA_OK;
    int64_t const blocks = ceil_div<int64_t>(total, 256);
    copy_kernel<<<static_cast<unsigned>(blocks < 4096 ? blocks : 4096), 256, 0, stream>>>(from, from_tokens, to, total,
                                                                                         heads, columns);
    return check_launch("copy of queries");
}

bool is_exact(const Layer& layer) { return layer.append.layout.format == row_format::f32; }

bool has_lists(const Call& call) { return call.dims.K >= 0; }

// x [tokens, H, columns] times a weight [H, rows, columns], the activations as e4m3 groups where the layer has it so.
Projection product(const Layer& layer, const View& x, const View& out, const MlaTensor& w, const MlaTensor& w_scale, int64_t tokens) {
    Projection work{};
    work.x = x;
    work.out = out;
    work.w = w.data;
    work.w_type = w.type;
    work.w_scale = w_scale.rank < 0 ? nullptr : static_cast<const float*>(w_scale.data);
    work.quantize_x = layer.quantized_activations;
    work.tokens = tokens;
    work.heads = layer.attend.heads;
    work.rows = static_cast<int32_t>(w.shape[1]);
    work.columns = static_cast<int32_t>(w.shape[2]);
    work.exact = is_exact(layer);
    return work;
}

// The tokens from `first` on.
View advance(const View& view, int64_t first) { return view.from(first * view.token_stride); }

// The queries of the tokens [first, first + count) over the latent. `order`: as in Projection.
int absorb(const Layer& layer, const View& absorbed, int64_t first, int64_t count, KernelOrder order, cudaStream_t stream) {
    View const nope = advance(layer.query, first);
    if (layer.w_uk->rank < 0) return copy_values(nope, nullptr, absorbed, count, layer.attend.heads, layer.nope, stream);
    Projection work = product(layer, nope, absorbed, *layer.w_uk, *layer.w_uk_scale, count);
    work.order = order;
    return project(work, stream);
}

// How far the queries over the latent are.
enum class Queries {
    missing,  // as are the cache rows
    rotated,  // their rope part is there
    made,
};

// What there is not yet of queries and cache rows, attention and W_UV for the tokens [first, first + count).
int attend_absorbed(Call& call, const Layer& layer, const View& absorbed, const View& mean, int64_t first, int64_t count, Queries queries) {
    Attend work = layer.attend;
    View const output = advance(layer.output, first);
    bool const has_w_uv = layer.w_uv->rank >= 0;
    work.query = absorbed;
    work.output = has_w_uv ? mean : output;
    work.step.tokens = count;
    if (first > 0) {  // only with lists, where no kernel looks at offsets
        work.step.token_sequence += first;
        work.step.positions += first;
        work.indices += first * work.top_k;
    }
    // W_UK first, for its weights can be there before what it multiplies; beside it the plan and the append, which need only what was there
    // before it.
    bool const all = queries == Queries::missing;
    auto const absorb_now = [&](KernelOrder order) { return absorb(layer, absorbed, first, count, order, call.stream); };
    if (all && !call.workspace.sizing()) {
        if (int status = absorb_now(KernelOrder::leading)) return status;
    }
    Attention attention{};
    if (int status = begin_attention(call, work, all, &attention)) return status;
    if (call.workspace.sizing()) return MLA_OK;
    if (all) {
        if (int status = append(layer.append, call.stream)) return status;
    } else if (queries == Queries::rotated) {
        if (int status = absorb_now(KernelOrder::beside)) return status;
    }
    if (!has_w_uv) return attend(work, attention, false, call.stream);
    Projection const expand = product(layer, mean, output, *layer.w_uv, *layer.w_uv_scale, count);
    bool const in_parts = project_takes_parts(expand, attention);
    if (int status = attend(work, attention, in_parts, call.stream)) return status;
    return in_parts ? project_parts(expand, work, attention.partials, call.stream) : project(expand, call.stream);
}

// A step with long prompts. `rotated` has the rotated rope part of all queries.
int attend_mixed(Call& call, const Layer& layer, const View& rotated) {
    const Attend& all = layer.attend;
    PrefillArguments prompts{};
    prompts.query_nope = {layer.query.data, layer.query.type, layer.query.token_stride, layer.query.head_stride};
    prompts.query_rope = {rotated.data, rotated.type, rotated.token_stride, rotated.head_stride};
    prompts.output = {layer.output.data, layer.output.type, layer.output.token_stride, layer.output.head_stride};
    prompts.step = all.step;
    prompts.layout = all.layout;
    prompts.pool = all.pool;
    auto weight = [](const MlaTensor& w, const MlaTensor& scale) {
        return BlockScaledWeight{w.data, w.type, scale.rank < 0 ? nullptr : static_cast<const float*>(scale.data)};
    };
    prompts.w_uk = weight(*layer.w_uk, *layer.w_uk_scale);
    prompts.w_uv = weight(*layer.w_uv, *layer.w_uv_scale);
    prompts.sinks = all.sinks;
    prompts.softmax_scale = all.softmax_scale;
    prompts.heads = all.heads;
    prompts.nope = layer.nope;
    prompts.value = static_cast<int32_t>(layer.w_uv->shape[1]);
    prompts.min_new_tokens = few_new_tokens + 1;
    prompts.zero_padding = true;
    size_t const mark = call.workspace.mark();
    if (int status = enqueue_prefill(prompts, call.workspace, call.stream)) return status;
    call.workspace.release(mark);

    FewTokens const few = FewTokens::take(call.workspace, all.step.sequences);
    int64_t const rank = all.layout.rank, width = rank + all.layout.rope, heads = all.heads;
    View const absorbed =
        contiguous(call.workspace.take<__nv_bfloat16>(few.capacity * heads * width), MLA_BFLOAT16, heads, width);
    View const mean = contiguous(call.workspace.take<__nv_bfloat16>(few.capacity * heads * rank), MLA_BFLOAT16, heads, rank);
    if (!call.workspace.sizing()) {
        if (int status = gather_few_tokens(all.step, few, call.stream)) return status;
        if (int status = copy_values(rotated, few.tokens, absorbed.from(rank), few.capacity, all.heads, all.layout.rope,
                                     call.stream)) {
            return status;
        }
    }
    Projection absorb = product(layer, layer.query, absorbed, *layer.w_uk, *layer.w_uk_scale, few.capacity);
    absorb.x_tokens = few.tokens;
    if (!call.workspace.sizing()) {
        if (int status = project(absorb, call.stream)) return status;
    }
    Attend work = all;
    work.step = few.step(all.step);
    work.query = absorbed;
    work.output = mean;
    Attention attention{};
    if (int status = begin_attention(call, work, false, &attention)) return status;
    if (call.workspace.sizing()) return MLA_OK;
    if (int status = attend(work, attention, false, call.stream)) return status;
    Projection expand = product(layer, mean, layer.output, *layer.w_uv, *layer.w_uv_scale, few.capacity);
    expand.out_tokens = few.tokens;
    return project(expand, call.stream);
}

// Makes the lists of keys, and queues what it is given for the time until then.
using Select = std::function<int(const std::function<int()>& beside)>;

// All tokens absorbed; those with lists of keys in windows. `select`: where the lists are not there yet.
int attend_all_absorbed(Call& call, Layer& layer, const Select& select) {
    int32_t const type = is_exact(layer) ? MLA_FLOAT : MLA_BFLOAT16;
    int64_t const bytes = is_exact(layer) ? 4 : 2;
    const KvLayout& layout = layer.append.layout;
    int64_t const heads = layer.attend.heads, tokens = call.dims.T;
    int64_t const window = has_lists(call) && tokens > list_window ? list_window : tokens;
    int64_t const width = layout.rank + layout.rope;
    bool const windows = window < tokens;

    View const absorbed =
        contiguous(call.workspace.take<uint8_t>(window * heads * width * bytes), type, heads, width);
    View const mean =
        contiguous(call.workspace.take<uint8_t>(window * heads * layout.rank * bytes), type, heads, layout.rank);
    // in windows the rotated queries of all tokens are kept apart: the cache rows are written once, before any is read
    View rotated = absorbed.from(layout.rank);
    if (windows) {
        rotated = contiguous(call.workspace.take<uint8_t>(tokens * heads * layout.rope * bytes), type, heads, layout.rope);
    }
    layer.append.query_out = rotated;
    layer.append.beside = select || (!windows && heads > 0);  // without heads it is the op's first kernel
    // Neither cache rows nor queries need the lists: they are made beside the scores, whose blocks leave room before the last one ends.
    auto const prepare = [&]() -> int {
        if (call.workspace.sizing()) return MLA_OK;
        if (int status = append(layer.append, call.stream)) return status;
        return windows || tokens == 0 ? MLA_OK : absorb(layer, absorbed, 0, tokens, KernelOrder::beside, call.stream);
    };
    Queries const queries = windows ? Queries::rotated : select ? Queries::made : Queries::missing;
    size_t const mark = call.workspace.mark();
    if (queries != Queries::missing) {
        if (int status = select ? select(prepare) : prepare()) return status;
    }
    call.workspace.release(mark);
    for (int64_t first = 0; first < tokens; first += window) {
        int64_t const count = tokens - first < window ? tokens - first : window;
        if (windows && !call.workspace.sizing()) {
            if (int status = copy_values(advance(rotated, first), nullptr, absorbed.from(layout.rank), count,
                                         static_cast<int32_t>(heads), layout.rope, call.stream)) {
                return status;
            }
        }
        if (int status = attend_absorbed(call, layer, absorbed, mean, first, count, queries)) return status;
        if (call.workspace.sizing()) break;
    }
    return MLA_OK;
}

int run_layer(Call& call, Layer& layer, const MlaTensor& cache, const MlaTensor& cache_out, const MlaTensor& page_copies,
              const Select& select = {}) {
    if (int status = update_pool(call, cache, cache_out, page_copies)) return status;
    layer.append.query = layer.query.from(layer.nope);
    // of absorbed tokens at most; without sequences there are still outputs to zero
    int64_t const tokens = call.dims.T, few = few_new_tokens * (call.dims.B > 0 ? call.dims.B : 1);
    bool const may_mix = !has_lists(call) && !is_exact(layer) && !layer.quantized_activations && layer.w_uk->rank >= 0 &&
                         layer.w_uv->rank >= 0;
    size_t const mark = call.workspace.mark();
    // memory for these shapes must do for all smaller ones: fewer sequences with as many tokens make a mixed step
    if (may_mix && tokens > (call.workspace.sizing() ? few_new_tokens : few)) {
        int64_t const heads = layer.attend.heads, rope = layer.append.layout.rope;
        View const rotated =
            contiguous(call.workspace.take<__nv_bfloat16>(tokens * heads * rope), MLA_BFLOAT16, heads, rope);
        layer.append.query_out = rotated;
        if (!call.workspace.sizing()) {
            if (int status = append(layer.append, call.stream)) return status;
        }
        if (int status = attend_mixed(call, layer, rotated)) return status;
        if (!call.workspace.sizing()) return MLA_OK;
        call.workspace.release(mark);
    }
    if (may_mix && tokens > few) call.dims.T = few;  // only in a sizing call
    return attend_all_absorbed(call, layer, select);
}

// What the inputs and outputs that the three ops name alike say.
Layer make_layer(const Call& call, const OpSpec& op) {
    auto input = [&](const char* name) -> const MlaTensor& { return call.in[input_index(op, name)]; };
    auto step_input = [&](const char* name) { return input_index(op, name); };
    const Dims& dims = call.dims;
    const MlaTensor& query = input("query");
    const MlaTensor& output = call.out[0];
    Layer layer{};
    layer.query = contiguous(query.data, query.type, dims.H, dims.Dn + dims.Dr);
    layer.output = contiguous(output.data, output.type, dims.H, dims.Dv);
    layer.nope = static_cast<int32_t>(dims.Dn);
    layer.w_uk = &input("w_uk");
    layer.w_uk_scale = &input("w_uk_scale");
    layer.w_uv = &input("w_uv");
    layer.w_uv_scale = &input("w_uv_scale");

    Append& append = layer.append;
    append.latent = input("latent").data;
    append.latent_type = input("latent").type;
    append.rope_key = input("rope_key").data;
    append.rope_key_type = input("rope_key").type;
    append.norm_weight = input("norm_weight").rank < 0 ? nullptr : input("norm_weight").data;
    append.norm_weight_type = input("norm_weight").type;
    append.cos = rope_table(input("cos"));
    append.sin = rope_table(input("sin"));
    append.rope_rows = call.input<int32_t>(step_input("rope_rows"));
    append.table_rows = dims.N;
    append.heads = static_cast<int32_t>(dims.H);
    append.epsilon = call.attributes.epsilon;
    append.interleaved = call.attributes.rope_interleaved != 0;
    append.layout = KvLayout(call.attributes);
    append.step = make_step(call, step_input("query_offsets"), step_input("cache_lengths"), step_input("block_table"),
                            step_input("token_sequence"), step_input("positions"), dims.pages);
    append.pool = call.output<uint8_t>(1);  // kv_cache_out, as in all three

    Attend& attend = layer.attend;
    attend.pool = append.pool;
    attend.layout = append.layout;
    attend.step = append.step;
    attend.sinks = call.input<float>(step_input("sinks"));
    attend.softmax_scale = call.attributes.softmax_scale;
    attend.query_terms = call.attributes.query_terms;
    attend.heads = append.heads;
    return layer;
}

// The lists of keys of a layer with an indexer, to `selection`; `beside` as in run_indexer.
int select_keys(Call& call, const MlaTensor& selection, const std::function<int()>& beside) {
    namespace in = sparse_attention::in;
    namespace out = sparse_attention::out;
    MlaTensor inputs[indexer::in::count], outputs[indexer::out::count];
    inputs[indexer::in::index_query] = call.in[in::index_query];
    inputs[indexer::in::index_key] = call.in[in::index_key];
    inputs[indexer::in::index_weights] = call.in[in::index_weights];
    inputs[indexer::in::index_norm_weight] = call.in[in::index_norm_weight];
    inputs[indexer::in::index_norm_bias] = call.in[in::index_norm_bias];
    inputs[indexer::in::index_cos] = call.in[in::index_cos];
    inputs[indexer::in::index_sin] = call.in[in::index_sin];
    inputs[indexer::in::rope_rows] = call.in[in::rope_rows];
    inputs[indexer::in::query_offsets] = call.in[in::query_offsets];
    inputs[indexer::in::cache_lengths] = call.in[in::cache_lengths];
    inputs[indexer::in::block_table] = call.in[in::block_table];
    inputs[indexer::in::token_sequence] = call.in[in::token_sequence];
    inputs[indexer::in::positions] = call.in[in::positions];
    inputs[indexer::in::indexer_cache] = call.in[in::indexer_cache];
    inputs[indexer::in::page_copies] = call.in[in::page_copies];
    outputs[indexer::out::indices] = selection;
    outputs[indexer::out::indexer_cache_out] = call.out[out::indexer_cache_out];
    Call index{call.attributes, inputs, outputs, call.dims, call.workspace, call.stream};
    return run_indexer(index, beside);
}

}  // namespace

int run_attention(Call& call) {
    namespace in = attention::in;
    namespace out = attention::out;
    Layer layer = make_layer(call, ops[op::attention]);
    return run_layer(call, layer, call.in[in::kv_cache], call.out[out::kv_cache_out], call.in[in::page_copies]);
}

int run_decode_branch_fp8(Call& call) {
    namespace in = decode_branch_fp8::in;
    namespace out = decode_branch_fp8::out;
    Layer layer = make_layer(call, ops[op::decode_branch_fp8]);
    layer.quantized_activations = true;
    layer.attend.indices = call.input<int32_t>(in::indices);
    layer.attend.top_k = call.given(in::indices) ? call.dims.K : 0;
    return run_layer(call, layer, call.in[in::kv_cache], call.out[out::kv_cache_out], call.in[in::page_copies]);
}

int run_sparse_attention(Call& call) {
    namespace in = sparse_attention::in;
    namespace out = sparse_attention::out;
    MlaTensor selection = call.in[in::indices];
    Select select;
    if (!call.given(in::indices)) {
        selection = call.out[out::indices];
        if (selection.rank < 0) {
            selection = {call.workspace.take<int32_t>(call.dims.T * call.dims.K), MLA_INT32, 2, {call.dims.T, call.dims.K}};
        }
        select = [&](const std::function<int()>& beside) { return select_keys(call, selection, beside); };
    } else if (call.out[out::indices].rank >= 0 && call.out[out::indices].data != selection.data && !call.workspace.sizing()) {
        if (int status = check_cuda("copy of the selection",
                                    cudaMemcpyAsync(call.out[out::indices].data, selection.data,
                                                    static_cast<size_t>(call.dims.T * call.dims.K) * sizeof(int32_t),
                                                    cudaMemcpyDeviceToDevice, call.stream))) {
            return status;
        }
    }
    Layer layer = make_layer(call, ops[op::sparse_attention]);
    layer.attend.indices = static_cast<const int32_t*>(selection.data);
    layer.attend.top_k = call.dims.K;
    return run_layer(call, layer, call.in[in::kv_cache], call.out[out::kv_cache_out], call.in[in::page_copies], select);
}

}  // namespace mla
