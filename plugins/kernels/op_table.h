// The op set of mla_trt/ops. Made by `python -m mla_trt.plugins.op_table`: do not edit.
#pragma once

#include <cstdint>

/* The attributes of all ops; an op reads its own. Text attributes are numbers of their choices, in order. */
extern "C" {
typedef struct MlaAttributes {
    int32_t num_partitions;
    int32_t page_size;
    int32_t kv_lora_rank;
    int32_t qk_rope_head_dim;
    int32_t row_format; /* f32, bf16, fp8, fp8_ds_mla, fp8_flat */
    float kv_scale;
    float epsilon;
    int32_t rope_interleaved;
    float softmax_scale;
    int32_t query_terms;
    int32_t index_head_dim;
    int32_t index_rope_dim;
    int32_t index_rope_interleaved;
    float index_norm_epsilon;
    int32_t index_hadamard;
    int32_t index_format; /* f32, fp8 */
    int32_t index_scale_ue8m0;
    int32_t top_k;
    int32_t num_heads;
    int32_t qk_nope_head_dim;
    int32_t v_head_dim;
} MlaAttributes;
}

namespace mla {

namespace row_format { enum : int32_t { f32, bf16, fp8, fp8_ds_mla, fp8_flat }; }
namespace index_format { enum : int32_t { f32, fp8 }; }

namespace op {
enum : int32_t { plan, fused_rope_rms_norm_quantization, decoding, prefill, prefill_sparse, decode_branch_fp8, indexer, attention, sparse_attention, input_projections, output_projection, count };
}  // namespace op

namespace plan {
namespace in { enum : int { tokens, query_offsets, cache_lengths, count }; }
namespace out { enum : int { token_sequence, positions, schedule, count }; }
}

namespace fused_rope_rms_norm_quantization {
namespace in { enum : int { query_rope, latent, rope_key, norm_weight, cos, sin, rope_rows, token_sequence, positions, block_table, kv_cache, page_copies, count }; }
namespace out { enum : int { query_rope_out, kv_cache_out, count }; }
}

namespace decoding {
namespace in { enum : int { query, query_offsets, cache_lengths, block_table, token_sequence, positions, schedule, kv_cache, indices, sinks, count }; }
namespace out { enum : int { output, lse, count }; }
}

namespace prefill {
namespace in { enum : int { query, query_offsets, cache_lengths, block_table, token_sequence, positions, schedule, kv_cache, w_uk, w_uk_scale, w_uv, w_uv_scale, sinks, count }; }
namespace out { enum : int { output, lse, count }; }
}

namespace prefill_sparse {
namespace in { enum : int { query, query_offsets, cache_lengths, block_table, token_sequence, positions, schedule, kv_cache, indices, sinks, index_lengths, count }; }
namespace out { enum : int { output, lse, count }; }
}

namespace decode_branch_fp8 {
namespace in { enum : int { query, latent, rope_key, norm_weight, cos, sin, rope_rows, w_uk, w_uk_scale, w_uv, w_uv_scale, sinks, query_offsets, cache_lengths, block_table, token_sequence, positions, schedule, kv_cache, indices, page_copies, count }; }
namespace out { enum : int { output, kv_cache_out, count }; }
}

namespace indexer {
namespace in { enum : int { index_query, index_key, index_weights, index_norm_weight, index_norm_bias, index_cos, index_sin, rope_rows, query_offsets, cache_lengths, block_table, token_sequence, positions, indexer_cache, page_copies, count }; }
namespace out { enum : int { indices, indexer_cache_out, count }; }
}

namespace attention {
namespace in { enum : int { query, latent, rope_key, norm_weight, cos, sin, rope_rows, w_uk, w_uk_scale, w_uv, w_uv_scale, sinks, query_offsets, cache_lengths, block_table, token_sequence, positions, schedule, kv_cache, page_copies, count }; }
namespace out { enum : int { output, kv_cache_out, count }; }
}

namespace sparse_attention {
namespace in { enum : int { query, latent, rope_key, norm_weight, cos, sin, rope_rows, w_uk, w_uk_scale, w_uv, w_uv_scale, sinks, query_offsets, cache_lengths, block_table, token_sequence, positions, schedule, kv_cache, page_copies, index_query, index_key, index_weights, index_norm_weight, index_norm_bias, index_cos, index_sin, indexer_cache, indices, count }; }
namespace out { enum : int { output, kv_cache_out, indices, indexer_cache_out, count }; }
}

namespace input_projections {
namespace in { enum : int { hidden, w_dq, query_norm_weight, w_uq, w_dkv, w_kr, w_index_query, w_index_key, w_index_weights, index_weights_factor, w_dq_scale, w_uq_scale, w_dkv_scale, w_kr_scale, w_index_query_scale, w_index_key_scale, count }; }
namespace out { enum : int { query, latent, rope_key, index_query, index_key, index_weights, count }; }
}

namespace output_projection {
namespace in { enum : int { attended, w_o, w_o_scale, count }; }
namespace out { enum : int { hidden, count }; }
}

enum class Kind { any_float, f32, table, i32, weight, e4m3, any };

struct TensorSpec {
    const char* name;
    Kind kind;
    const char* shape;  // words, null where any shape will do
    bool optional;
};

struct AttributeSpec {
    const char* name;
    enum { integer, number, text } kind;
    int32_t offset;  // bytes into MlaAttributes
    const char* letter;  // the dimension that it fixes, or null
    const char* choices;  // of a text attribute, separated by spaces
    double default_value;  // meaningless when required; for a text attribute the number of its choice
    bool required;
};

struct OpSpec {
    const char *name, *version;
    int32_t inputs, outputs, attributes;
    const TensorSpec* input;
    const TensorSpec* output;
    const AttributeSpec* attribute;
};

namespace table {
constexpr TensorSpec plan_inputs[] = {
    {"tokens", Kind::any, nullptr, false},
    {"query_offsets", Kind::i32, "B+1", false},
    {"cache_lengths", Kind::i32, "B", false},
};
constexpr TensorSpec plan_outputs[] = {
    {"token_sequence", Kind::i32, "T", false},
    {"positions", Kind::i32, "T", false},
    {"schedule", Kind::i32, "num_partitions+1 2", false},
};
constexpr AttributeSpec plan_attributes[] = {
    {"num_partitions", AttributeSpec::integer, 0, "num_partitions", nullptr, 128, false},
    {"page_size", AttributeSpec::integer, 4, "P", nullptr, 64, false},
};
constexpr TensorSpec fused_rope_rms_norm_quantization_inputs[] = {
    {"query_rope", Kind::any_float, "T H Dr", false},
    {"latent", Kind::any_float, "T R", false},
    {"rope_key", Kind::any_float, "T Dr", false},
    {"norm_weight", Kind::any_float, "R", true},
    {"cos", Kind::table, "N ceil(Dr/2)", false},
    {"sin", Kind::table, "N ceil(Dr/2)", false},
    {"rope_rows", Kind::i32, "T", true},
    {"token_sequence", Kind::i32, "T", false},
    {"positions", Kind::i32, "T", false},
    {"block_table", Kind::i32, "B max_pages", false},
    {"kv_cache", Kind::i32, "pages page_words", false},
    {"page_copies", Kind::i32, "copies 2", true},
};
constexpr TensorSpec fused_rope_rms_norm_quantization_outputs[] = {
    {"query_rope_out", Kind::any_float, "T H Dr", false},
    {"kv_cache_out", Kind::i32, "pages page_words", false},
};
constexpr AttributeSpec fused_rope_rms_norm_quantization_attributes[] = {
    {"kv_lora_rank", AttributeSpec::integer, 8, "R", nullptr, 0, true},
    {"qk_rope_head_dim", AttributeSpec::integer, 12, "Dr", nullptr, 0, true},
    {"page_size", AttributeSpec::integer, 4, "P", nullptr, 64, false},
    {"row_format", AttributeSpec::text, 16, nullptr, "f32 bf16 fp8 fp8_ds_mla fp8_flat", 2, false},
    {"kv_scale", AttributeSpec::number, 20, nullptr, nullptr, 1.0, false},
    {"epsilon", AttributeSpec::number, 24, nullptr, nullptr, 1e-06, false},
    {"rope_interleaved", AttributeSpec::integer, 28, nullptr, nullptr, 1, false},
};
constexpr TensorSpec decoding_inputs[] = {
    {"query", Kind::any_float, "T H R+Dr", false},
    {"query_offsets", Kind::i32, "B+1", false},
    {"cache_lengths", Kind::i32, "B", false},
    {"block_table", Kind::i32, "B max_pages", false},
    {"token_sequence", Kind::i32, "T", false},
    {"positions", Kind::i32, "T", false},
    {"schedule", Kind::i32, "units 2", false},
    {"kv_cache", Kind::i32, "pages page_words", false},
    {"indices", Kind::i32, "T K", true},
    {"sinks", Kind::f32, "H", true},
};
constexpr TensorSpec decoding_outputs[] = {
    {"output", Kind::any_float, "T H R", false},
    {"lse", Kind::f32, "T H", true},
};
constexpr AttributeSpec decoding_attributes[] = {
    {"kv_lora_rank", AttributeSpec::integer, 8, "R", nullptr, 0, true},
    {"qk_rope_head_dim", AttributeSpec::integer, 12, "Dr", nullptr, 0, true},
    {"page_size", AttributeSpec::integer, 4, "P", nullptr, 64, false},
    {"row_format", AttributeSpec::text, 16, nullptr, "f32 bf16 fp8 fp8_ds_mla fp8_flat", 2, false},
    {"kv_scale", AttributeSpec::number, 20, nullptr, nullptr, 1.0, false},
    {"softmax_scale", AttributeSpec::number, 32, nullptr, nullptr, 0, true},
    {"query_terms", AttributeSpec::integer, 36, nullptr, nullptr, 2, false},
};
constexpr TensorSpec prefill_inputs[] = {
    {"query", Kind::any_float, "T H Dn+Dr", false},
    {"query_offsets", Kind::i32, "B+1", false},
    {"cache_lengths", Kind::i32, "B", false},
    {"block_table", Kind::i32, "B max_pages", false},
    {"token_sequence", Kind::i32, "T", false},
    {"positions", Kind::i32, "T", false},
    {"schedule", Kind::i32, "units 2", false},
    {"kv_cache", Kind::i32, "pages page_words", false},
    {"w_uk", Kind::weight, "H R Dn", false},
    {"w_uk_scale", Kind::f32, "H ceil(R/128) ceil(Dn/128)", true},
    {"w_uv", Kind::weight, "H Dv R", false},
    {"w_uv_scale", Kind::f32, "H ceil(Dv/128) ceil(R/128)", true},
    {"sinks", Kind::f32, "H", true},
};
constexpr TensorSpec prefill_outputs[] = {
    {"output", Kind::any_float, "T H Dv", false},
    {"lse", Kind::f32, "T H", true},
};
constexpr AttributeSpec prefill_attributes[] = {
    {"kv_lora_rank", AttributeSpec::integer, 8, "R", nullptr, 0, true},
    {"qk_rope_head_dim", AttributeSpec::integer, 12, "Dr", nullptr, 0, true},
    {"page_size", AttributeSpec::integer, 4, "P", nullptr, 64, false},
    {"row_format", AttributeSpec::text, 16, nullptr, "f32 bf16 fp8 fp8_ds_mla fp8_flat", 2, false},
    {"kv_scale", AttributeSpec::number, 20, nullptr, nullptr, 1.0, false},
    {"softmax_scale", AttributeSpec::number, 32, nullptr, nullptr, 0, true},
};
constexpr TensorSpec prefill_sparse_inputs[] = {
    {"query", Kind::any_float, "T H R+Dr", false},
    {"query_offsets", Kind::i32, "B+1", false},
    {"cache_lengths", Kind::i32, "B", false},
    {"block_table", Kind::i32, "B max_pages", false},
    {"token_sequence", Kind::i32, "T", false},
    {"positions", Kind::i32, "T", false},
    {"schedule", Kind::i32, "units 2", false},
    {"kv_cache", Kind::i32, "pages page_words", false},
    {"indices", Kind::i32, "T K", false},
    {"sinks", Kind::f32, "H", true},
    {"index_lengths", Kind::i32, "T", true},
};
constexpr TensorSpec prefill_sparse_outputs[] = {
    {"output", Kind::any_float, "T H R", false},
    {"lse", Kind::f32, "T H", true},
};
constexpr AttributeSpec prefill_sparse_attributes[] = {
    {"kv_lora_rank", AttributeSpec::integer, 8, "R", nullptr, 0, true},
    {"qk_rope_head_dim", AttributeSpec::integer, 12, "Dr", nullptr, 0, true},
    {"page_size", AttributeSpec::integer, 4, "P", nullptr, 64, false},
    {"row_format", AttributeSpec::text, 16, nullptr, "f32 bf16 fp8 fp8_ds_mla fp8_flat", 2, false},
    {"kv_scale", AttributeSpec::number, 20, nullptr, nullptr, 1.0, false},
    {"softmax_scale", AttributeSpec::number, 32, nullptr, nullptr, 0, true},
    {"query_terms", AttributeSpec::integer, 36, nullptr, nullptr, 2, false},
};
constexpr TensorSpec decode_branch_fp8_inputs[] = {
    {"query", Kind::any_float, "T H Dn+Dr", false},
    {"latent", Kind::any_float, "T R", false},
    {"rope_key", Kind::any_float, "T Dr", false},
    {"norm_weight", Kind::any_float, "R", true},
    {"cos", Kind::table, "N ceil(Dr/2)", false},
    {"sin", Kind::table, "N ceil(Dr/2)", false},
    {"rope_rows", Kind::i32, "T", true},
    {"w_uk", Kind::e4m3, "H R Dn", false},
    {"w_uk_scale", Kind::f32, "H ceil(R/128) ceil(Dn/128)", false},
    {"w_uv", Kind::e4m3, "H Dv R", false},
    {"w_uv_scale", Kind::f32, "H ceil(Dv/128) ceil(R/128)", false},
    {"sinks", Kind::f32, "H", true},
    {"query_offsets", Kind::i32, "B+1", false},
    {"cache_lengths", Kind::i32, "B", false},
    {"block_table", Kind::i32, "B max_pages", false},
    {"token_sequence", Kind::i32, "T", false},
    {"positions", Kind::i32, "T", false},
    {"schedule", Kind::i32, "units 2", false},
    {"kv_cache", Kind::i32, "pages page_words", false},
    {"indices", Kind::i32, "T K", true},
    {"page_copies", Kind::i32, "copies 2", true},
};
constexpr TensorSpec decode_branch_fp8_outputs[] = {
    {"output", Kind::any_float, "T H Dv", false},
    {"kv_cache_out", Kind::i32, "pages page_words", false},
};
constexpr AttributeSpec decode_branch_fp8_attributes[] = {
    {"kv_lora_rank", AttributeSpec::integer, 8, "R", nullptr, 0, true},
    {"qk_rope_head_dim", AttributeSpec::integer, 12, "Dr", nullptr, 0, true},
    {"page_size", AttributeSpec::integer, 4, "P", nullptr, 64, false},
    {"row_format", AttributeSpec::text, 16, nullptr, "f32 bf16 fp8 fp8_ds_mla fp8_flat", 2, false},
    {"kv_scale", AttributeSpec::number, 20, nullptr, nullptr, 1.0, false},
    {"epsilon", AttributeSpec::number, 24, nullptr, nullptr, 1e-06, false},
    {"rope_interleaved", AttributeSpec::integer, 28, nullptr, nullptr, 1, false},
    {"softmax_scale", AttributeSpec::number, 32, nullptr, nullptr, 0, true},
    {"query_terms", AttributeSpec::integer, 36, nullptr, nullptr, 2, false},
};
constexpr TensorSpec indexer_inputs[] = {
    {"index_query", Kind::any_float, "T Hi Di", false},
    {"index_key", Kind::any_float, "T Di", false},
    {"index_weights", Kind::f32, "T Hi", false},
    {"index_norm_weight", Kind::any_float, "Di", true},
    {"index_norm_bias", Kind::any_float, "Di", true},
    {"index_cos", Kind::table, "index_N ceil(Dri/2)", false},
    {"index_sin", Kind::table, "index_N ceil(Dri/2)", false},
    {"rope_rows", Kind::i32, "T", true},
    {"query_offsets", Kind::i32, "B+1", false},
    {"cache_lengths", Kind::i32, "B", false},
    {"block_table", Kind::i32, "B max_pages", false},
    {"token_sequence", Kind::i32, "T", false},
    {"positions", Kind::i32, "T", false},
    {"indexer_cache", Kind::i32, "index_pages index_page_words", false},
    {"page_copies", Kind::i32, "copies 2", true},
};
constexpr TensorSpec indexer_outputs[] = {
    {"indices", Kind::i32, "T K", false},
    {"indexer_cache_out", Kind::i32, "index_pages index_page_words", false},
};
constexpr AttributeSpec indexer_attributes[] = {
    {"index_head_dim", AttributeSpec::integer, 40, "Di", nullptr, 0, true},
    {"index_rope_dim", AttributeSpec::integer, 44, "Dri", nullptr, 0, false},
    {"index_rope_interleaved", AttributeSpec::integer, 48, nullptr, nullptr, 0, false},
    {"index_norm_epsilon", AttributeSpec::number, 52, nullptr, nullptr, 1e-06, false},
    {"index_hadamard", AttributeSpec::integer, 56, nullptr, nullptr, 0, false},
    {"index_format", AttributeSpec::text, 60, nullptr, "f32 fp8", 1, false},
    {"index_scale_ue8m0", AttributeSpec::integer, 64, nullptr, nullptr, 0, false},
    {"top_k", AttributeSpec::integer, 68, "K", nullptr, 0, true},
    {"page_size", AttributeSpec::integer, 4, "P", nullptr, 64, false},
};
constexpr TensorSpec attention_inputs[] = {
    {"query", Kind::any_float, "T H Dn+Dr", false},
    {"latent", Kind::any_float, "T R", false},
    {"rope_key", Kind::any_float, "T Dr", false},
    {"norm_weight", Kind::any_float, "R", true},
    {"cos", Kind::table, "N ceil(Dr/2)", false},
    {"sin", Kind::table, "N ceil(Dr/2)", false},
    {"rope_rows", Kind::i32, "T", true},
    {"w_uk", Kind::weight, "H R Dn", true},
    {"w_uk_scale", Kind::f32, "H ceil(R/128) ceil(Dn/128)", true},
    {"w_uv", Kind::weight, "H Dv R", true},
    {"w_uv_scale", Kind::f32, "H ceil(Dv/128) ceil(R/128)", true},
    {"sinks", Kind::f32, "H", true},
    {"query_offsets", Kind::i32, "B+1", false},
    {"cache_lengths", Kind::i32, "B", false},
    {"block_table", Kind::i32, "B max_pages", false},
    {"token_sequence", Kind::i32, "T", false},
    {"positions", Kind::i32, "T", false},
    {"schedule", Kind::i32, "units 2", false},
    {"kv_cache", Kind::i32, "pages page_words", false},
    {"page_copies", Kind::i32, "copies 2", true},
};
constexpr TensorSpec attention_outputs[] = {
    {"output", Kind::any_float, "T H Dv", false},
    {"kv_cache_out", Kind::i32, "pages page_words", false},
};
constexpr AttributeSpec attention_attributes[] = {
    {"kv_lora_rank", AttributeSpec::integer, 8, "R", nullptr, 0, true},
    {"qk_rope_head_dim", AttributeSpec::integer, 12, "Dr", nullptr, 0, true},
    {"page_size", AttributeSpec::integer, 4, "P", nullptr, 64, false},
    {"row_format", AttributeSpec::text, 16, nullptr, "f32 bf16 fp8 fp8_ds_mla fp8_flat", 2, false},
    {"kv_scale", AttributeSpec::number, 20, nullptr, nullptr, 1.0, false},
    {"num_heads", AttributeSpec::integer, 72, "H", nullptr, 0, true},
    {"qk_nope_head_dim", AttributeSpec::integer, 76, "Dn", nullptr, 0, true},
    {"v_head_dim", AttributeSpec::integer, 80, "Dv", nullptr, 0, true},
    {"epsilon", AttributeSpec::number, 24, nullptr, nullptr, 1e-06, false},
    {"rope_interleaved", AttributeSpec::integer, 28, nullptr, nullptr, 1, false},
    {"softmax_scale", AttributeSpec::number, 32, nullptr, nullptr, 0, true},
    {"query_terms", AttributeSpec::integer, 36, nullptr, nullptr, 2, false},
};
constexpr TensorSpec sparse_attention_inputs[] = {
    {"query", Kind::any_float, "T H Dn+Dr", false},
    {"latent", Kind::any_float, "T R", false},
    {"rope_key", Kind::any_float, "T Dr", false},
    {"norm_weight", Kind::any_float, "R", true},
    {"cos", Kind::table, "N ceil(Dr/2)", false},
    {"sin", Kind::table, "N ceil(Dr/2)", false},
    {"rope_rows", Kind::i32, "T", true},
    {"w_uk", Kind::weight, "H R Dn", true},
    {"w_uk_scale", Kind::f32, "H ceil(R/128) ceil(Dn/128)", true},
    {"w_uv", Kind::weight, "H Dv R", true},
    {"w_uv_scale", Kind::f32, "H ceil(Dv/128) ceil(R/128)", true},
    {"sinks", Kind::f32, "H", true},
    {"query_offsets", Kind::i32, "B+1", false},
    {"cache_lengths", Kind::i32, "B", false},
    {"block_table", Kind::i32, "B max_pages", false},
    {"token_sequence", Kind::i32, "T", false},
    {"positions", Kind::i32, "T", false},
    {"schedule", Kind::i32, "units 2", false},
    {"kv_cache", Kind::i32, "pages page_words", false},
    {"page_copies", Kind::i32, "copies 2", true},
    {"index_query", Kind::any_float, "T Hi Di", true},
    {"index_key", Kind::any_float, "T Di", true},
    {"index_weights", Kind::f32, "T Hi", true},
    {"index_norm_weight", Kind::any_float, "Di", true},
    {"index_norm_bias", Kind::any_float, "Di", true},
    {"index_cos", Kind::table, "index_N ceil(Dri/2)", true},
    {"index_sin", Kind::table, "index_N ceil(Dri/2)", true},
    {"indexer_cache", Kind::i32, "index_pages index_page_words", true},
    {"indices", Kind::i32, "T K", true},
};
constexpr TensorSpec sparse_attention_outputs[] = {
    {"output", Kind::any_float, "T H Dv", false},
    {"kv_cache_out", Kind::i32, "pages page_words", false},
    {"indices", Kind::i32, "T K", true},
    {"indexer_cache_out", Kind::i32, "index_pages index_page_words", true},
};
constexpr AttributeSpec sparse_attention_attributes[] = {
    {"kv_lora_rank", AttributeSpec::integer, 8, "R", nullptr, 0, true},
    {"qk_rope_head_dim", AttributeSpec::integer, 12, "Dr", nullptr, 0, true},
    {"page_size", AttributeSpec::integer, 4, "P", nullptr, 64, false},
    {"row_format", AttributeSpec::text, 16, nullptr, "f32 bf16 fp8 fp8_ds_mla fp8_flat", 2, false},
    {"kv_scale", AttributeSpec::number, 20, nullptr, nullptr, 1.0, false},
    {"num_heads", AttributeSpec::integer, 72, "H", nullptr, 0, true},
    {"qk_nope_head_dim", AttributeSpec::integer, 76, "Dn", nullptr, 0, true},
    {"v_head_dim", AttributeSpec::integer, 80, "Dv", nullptr, 0, true},
    {"epsilon", AttributeSpec::number, 24, nullptr, nullptr, 1e-06, false},
    {"rope_interleaved", AttributeSpec::integer, 28, nullptr, nullptr, 1, false},
    {"softmax_scale", AttributeSpec::number, 32, nullptr, nullptr, 0, true},
    {"query_terms", AttributeSpec::integer, 36, nullptr, nullptr, 2, false},
    {"index_head_dim", AttributeSpec::integer, 40, "Di", nullptr, 0, true},
    {"index_rope_dim", AttributeSpec::integer, 44, "Dri", nullptr, 0, false},
    {"index_rope_interleaved", AttributeSpec::integer, 48, nullptr, nullptr, 0, false},
    {"index_norm_epsilon", AttributeSpec::number, 52, nullptr, nullptr, 1e-06, false},
    {"index_hadamard", AttributeSpec::integer, 56, nullptr, nullptr, 0, false},
    {"index_format", AttributeSpec::text, 60, nullptr, "f32 fp8", 1, false},
    {"index_scale_ue8m0", AttributeSpec::integer, 64, nullptr, nullptr, 0, false},
    {"top_k", AttributeSpec::integer, 68, "K", nullptr, 0, true},
};
constexpr TensorSpec input_projections_inputs[] = {
    {"hidden", Kind::any_float, "T C", false},
    {"w_dq", Kind::weight, "C Q", true},
    {"query_norm_weight", Kind::any_float, "Q", true},
    {"w_uq", Kind::weight, "Q H M", false},
    {"w_dkv", Kind::weight, "C R", true},
    {"w_kr", Kind::weight, "C Dr", true},
    {"w_index_query", Kind::weight, "Q Hi Di", true},
    {"w_index_key", Kind::weight, "C Di", true},
    {"w_index_weights", Kind::any_float, "C Hi", true},
    {"index_weights_factor", Kind::any_float, "Hi", true},
    {"w_dq_scale", Kind::f32, "ceil(C/128) ceil(Q/128)", true},
    {"w_uq_scale", Kind::f32, "ceil(Q/128) ceil(H*M/128)", true},
    {"w_dkv_scale", Kind::f32, "ceil(C/128) ceil(R/128)", true},
    {"w_kr_scale", Kind::f32, "ceil(C/128) ceil(Dr/128)", true},
    {"w_index_query_scale", Kind::f32, "ceil(Q/128) ceil(Hi*Di/128)", true},
    {"w_index_key_scale", Kind::f32, "ceil(C/128) ceil(Di/128)", true},
};
constexpr TensorSpec input_projections_outputs[] = {
    {"query", Kind::any_float, "T H M", false},
    {"latent", Kind::any_float, "T R", true},
    {"rope_key", Kind::any_float, "T Dr", true},
    {"index_query", Kind::any_float, "T Hi Di", true},
    {"index_key", Kind::any_float, "T Di", true},
    {"index_weights", Kind::f32, "T Hi", true},
};
constexpr AttributeSpec input_projections_attributes[] = {
    {"epsilon", AttributeSpec::number, 24, nullptr, nullptr, 1e-06, false},
};
constexpr TensorSpec output_projection_inputs[] = {
    {"attended", Kind::any_float, "T H Dv", false},
    {"w_o", Kind::weight, "H Dv C", false},
    {"w_o_scale", Kind::f32, "ceil(H*Dv/128) ceil(C/128)", true},
};
constexpr TensorSpec output_projection_outputs[] = {
    {"hidden", Kind::any_float, "T C", false},
};
constexpr const AttributeSpec* output_projection_attributes = nullptr;
}  // namespace table

constexpr OpSpec ops[] = {
    {"MlaPlan", "1", 3, 3, 2, table::plan_inputs, table::plan_outputs, table::plan_attributes},
    {"MlaFusedRopeRmsNormQuantization", "1", 12, 2, 7, table::fused_rope_rms_norm_quantization_inputs, table::fused_rope_rms_norm_quantization_outputs, table::fused_rope_rms_norm_quantization_attributes},
    {"MlaDecoding", "1", 10, 2, 7, table::decoding_inputs, table::decoding_outputs, table::decoding_attributes},
    {"MlaPrefill", "1", 13, 2, 6, table::prefill_inputs, table::prefill_outputs, table::prefill_attributes},
    {"MlaPrefillSparse", "1", 11, 2, 7, table::prefill_sparse_inputs, table::prefill_sparse_outputs, table::prefill_sparse_attributes},
    {"MlaDecodeBranchFp8", "1", 21, 2, 9, table::decode_branch_fp8_inputs, table::decode_branch_fp8_outputs, table::decode_branch_fp8_attributes},
    {"MlaIndexer", "1", 15, 2, 9, table::indexer_inputs, table::indexer_outputs, table::indexer_attributes},
    {"MlaAttention", "1", 20, 2, 12, table::attention_inputs, table::attention_outputs, table::attention_attributes},
    {"MlaSparseAttention", "1", 29, 4, 20, table::sparse_attention_inputs, table::sparse_attention_outputs, table::sparse_attention_attributes},
    {"MlaInputProjections", "2", 16, 6, 1, table::input_projections_inputs, table::input_projections_outputs, table::input_projections_attributes},
    {"MlaOutputProjection", "2", 3, 1, 0, table::output_projection_inputs, table::output_projection_outputs, table::output_projection_attributes},
};

}  // namespace mla
