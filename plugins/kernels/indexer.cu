// MlaIndexer: appends the new index keys, scores the cached ones for each token and lists the best.
//
// Scores are kept for a window of tokens at a time, within a bound on scratch memory; the windows follow each other on the
// stream, and their number depends on shapes alone.
#include "indexer.cuh"

#include <algorithm>

#include "pool.h"

namespace mla {
namespace {

constexpr int64_t scratch_bound = int64_t{80} << 20;

IndexWindow shapes_of(const Call& call) {
    using namespace indexer;
    IndexWindow window{};
    window.step = make_step(call, in::query_offsets, in::cache_lengths, in::block_table, in::token_sequence, in::positions,
                            call.dims.index_pages);
    window.layout = IndexLayout(call.attributes);
    window.pool = call.output<char>(out::indexer_cache_out);
    window.heads = static_cast<int32_t>(call.dims.Hi);
    window.padded_heads = round_up(window.heads, 16);
    int32_t const size = window.layout.head;
    window.width = window.layout.format == index_format::f32 ? round_up(size, 4) : size <= 64 ? 64 : size <= 128 ? 128 : 256;
    window.top_k = call.dims.K;
    window.stride = round_up<int64_t>(call.dims.max_pages * call.dims.P, 64);
    return window;
}

IndexAppend append_of(const Call& call) {
    using namespace indexer;
    const MlaAttributes& attributes = call.attributes;
    return IndexAppend{call.in[in::index_query].data,
                       call.in[in::index_key].data,
                       call.input<float>(in::index_weights),
                       call.input<void>(in::index_norm_weight),
                       call.input<void>(in::index_norm_bias),
                       rope_table(call.in[in::index_cos]),
                       rope_table(call.in[in::index_sin]),
                       call.input<int32_t>(in::rope_rows),
                       call.in[in::index_query].type,
                       call.in[in::index_norm_weight].type,
                       call.in[in::index_norm_bias].type,
                       call.dims.index_N,
                       attributes.index_rope_dim,
                       attributes.index_rope_interleaved,
                       attributes.index_hadamard,
                       attributes.index_norm_epsilon,
                       call.output<char>(out::indexer_cache_out),
                       true,
                       false};
}

int check(const Call& call) {
    int64_t const size = call.dims.Di;
    if (size < 1 || size > 256) {
        return fail(MLA_UNSUPPORTED, "MlaIndexer: index_head_dim %lld, the kernels take 1 to 256",
                    static_cast<long long>(size));
    }
    int32_t const rope = call.attributes.index_rope_dim;
    if (rope < 0 || rope > size || rope % 2) {
        return fail(MLA_BAD_CALL, "MlaIndexer: index_rope_dim %d must be even and at most index_head_dim %lld", rope,
                    static_cast<long long>(size));
    }
    if (call.attributes.index_hadamard && (size & (size - 1))) {
        return fail(MLA_BAD_CALL, "MlaIndexer: index_hadamard needs an index_head_dim that is a power of two, not %lld",
                    static_cast<long long>(size));
    }
    if (call.dims.P < 1) return fail(MLA_BAD_CALL, "MlaIndexer: page_size must be at least 1");
    if (call.dims.max_pages > max_index_keys / call.dims.P) {
        return fail(MLA_UNSUPPORTED, "MlaIndexer: block_table has %lld columns, the kernels take %lld keys of a sequence",
                    static_cast<long long>(call.dims.max_pages), static_cast<long long>(max_index_keys));
    }
    if (call.given(indexer::in::index_norm_bias) && !call.given(indexer::in::index_norm_weight)) {
        return fail(MLA_BAD_CALL, "MlaIndexer: index_norm_bias is given without index_norm_weight");
    }
    if (call.in[indexer::in::index_query].type != call.in[indexer::in::index_key].type) {
        return fail(MLA_BAD_CALL, "MlaIndexer: index_query and index_key must have the same type");
    }
    return MLA_OK;
}

}  // namespace

int run_indexer(Call& call) {
    return run_indexer(call, [] { return MLA_OK; });
}

int run_indexer(Call& call, const std::function<int()>& beside) {
    using namespace indexer;
    if (int status = check(call)) return status;
    size_t const mark = call.workspace.mark();
    const MlaTensor& pool = call.out[out::indexer_cache_out];
    if (int status = update_pool(call, call.in[in::indexer_cache], pool, call.in[in::page_copies])) return status;
    call.workspace.release(mark);

    IndexWindow window = shapes_of(call);
    int64_t const tokens = call.dims.T;
    int64_t const rank_bytes = window.stride * 4;
    int64_t const query_bytes =
        int64_t{window.padded_heads} * window.width * (window.layout.format == index_format::f32 ? 4 : 2);
    int64_t const row_bytes = rank_bytes + query_bytes + int64_t{window.padded_heads} * 4;
    // grows with every dimension, as the sizes asked for once must do for all smaller ones
    int64_t const bytes =
        std::min(std::min<int64_t>(tokens, max_window_rows) * row_bytes, std::max(scratch_bound, row_bytes));
    char* const scratch = call.workspace.take<char>(bytes);
    if (call.workspace.sizing()) return MLA_OK;
    if (tokens == 0) return beside();

    Device device;
    if (int status = current_device(&device)) return status;
    window.query_codes = index_takes_hopper(window, device);
    int64_t const most_rows = std::min<int64_t>(bytes / row_bytes, max_window_rows);
    int64_t const windows = ceil_div(tokens, most_rows);
    int64_t const rows = std::min(most_rows, round_up<int64_t>(ceil_div(tokens, windows), 8));
    window.ranks = reinterpret_cast<uint32_t*>(scratch);
    window.queries = scratch + rows * rank_bytes;
    window.weights = reinterpret_cast<float*>(scratch + rows * (rank_bytes + query_bytes));
    IndexAppend append = append_of(call);
    for (window.first = 0; window.first < tokens; window.first += rows) {
        window.rows = static_cast<int32_t>(std::min(rows, tokens - window.first));
        if (int status = append_index_keys(call, window, device, append)) return status;
        append.keys = false;
        if (window.top_k > 0) {
            if (int status = score_index_keys(call, window, device)) return status;
        }
        if (window.first == 0) {
            if (int status = beside()) return status;
        }
        if (window.top_k == 0) break;
        if (int status = select_index_keys(call, window, device, call.output<int32_t>(out::indices))) return status;
    }
    return MLA_OK;
}

}  // namespace mla
