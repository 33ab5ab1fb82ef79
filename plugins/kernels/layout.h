// Rows and pages of both caches, as mla_trt/formats.py has them; a test compares every number.
#pragma once

#include <cstdint>

#include "op_table.h"

#if defined(__CUDACC__)
#define MLA_BOTH __host__ __device__
#else
#define MLA_BOTH
#endif

namespace mla {

constexpr float e4m3_max = 448.0f;
constexpr float kv_scale_floor = 1e-6f;
constexpr float index_scale_floor = 1e-10f;
constexpr int scale_group = 128;  // latent values that share a scale in fp8_ds_mla, and sides of a weight's block

template <typename T>
MLA_BOTH constexpr T ceil_div(T value, T divisor) {
    return (value + divisor - 1) / divisor;
}

template <typename T>
MLA_BOTH constexpr T round_up(T value, T multiple) {
    return ceil_div(value, multiple) * multiple;
}

// What the pages of both caches share. Sizes are bytes.
struct PageLayout {
    int32_t page_size;  // tokens
    int32_t row_bytes;  // from one row to the next
    int32_t scales_offset;  // where the rows end and, in formats with one scale a row, the scales begin
    int64_t page_bytes;

    MLA_BOTH int64_t page_words() const { return page_bytes / 4; }

protected:
    MLA_BOTH void set(int32_t size, int32_t content_bytes, bool has_page_scales) {
        page_size = size;
        row_bytes = round_up(content_bytes, 16);
        scales_offset = size * row_bytes;
        page_bytes = round_up<int64_t>(static_cast<int64_t>(scales_offset) + (has_page_scales ? 4 * size : 0), 128);
    }
};

struct KvLayout : PageLayout {
    int32_t format;  // mla::row_format
    int32_t rank, rope;  // R and Dr
    int32_t rope_offset;
    float kv_scale;

    KvLayout() = default;
    MLA_BOTH explicit KvLayout(const MlaAttributes& attributes)
        : format(attributes.row_format), rank(attributes.kv_lora_rank), rope(attributes.qk_rope_head_dim),
          kv_scale(attributes.kv_scale) {
        int32_t const latent = rank * (format == row_format::f32 ? 4 : format == row_format::bf16 ? 2 : 1);
        int32_t const groups = format == row_format::fp8_ds_mla ? ceil_div(rank, scale_group) : 0;
        rope_offset = latent + 4 * groups;
        int32_t const rope_value = format == row_format::f32 ? 4 : format == row_format::fp8_flat ? 1 : 2;
        set(attributes.page_size, rope_offset + rope * rope_value, has_page_scales());
    }

    MLA_BOTH bool has_page_scales() const { return format == row_format::fp8; }
};

struct IndexLayout : PageLayout {
    int32_t format;  // mla::index_format
    int32_t head;  // Di
    bool scale_ue8m0;

    IndexLayout() = default;
    MLA_BOTH explicit IndexLayout(const MlaAttributes& attributes)
        : format(attributes.index_format), head(attributes.index_head_dim),
          scale_ue8m0(attributes.index_scale_ue8m0 != 0) {
        set(attributes.page_size, head * (format == index_format::f32 ? 4 : 1), has_page_scales());
    }

    MLA_BOTH bool has_page_scales() const { return format == index_format::fp8; }
};

}  // namespace mla
