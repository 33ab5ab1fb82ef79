// Sequences of a step and rows of the pool, as both prefill kernels read them.
#pragma once

#include <cstdint>

#include "prefill.h"

namespace mla::prefill_step {

constexpr int32_t most_keys = 1 << 30;  // positions and sums of two of them stay in int32

struct Sequence {
    int64_t first;    // its first token
    int32_t tokens;   // new tokens
    int32_t cached;   // tokens before them
    int32_t keys;     // keys that the block table can name
};

__device__ inline int64_t clamp(int64_t value, int64_t low, int64_t high) { return min(max(value, low), high); }

__device__ inline Sequence sequence_at(const Step& step, int32_t page_size, int64_t index) {
    int32_t const limit = min(step.key_limit(page_size), most_keys);
    int64_t const first = clamp(step.query_offsets[index], 0, step.tokens);
    int64_t const end = clamp(step.query_offsets[index + 1], first, step.tokens);
    Sequence sequence;
    sequence.first = first;
    sequence.tokens = static_cast<int32_t>(min(end - first, static_cast<int64_t>(most_keys)));
    sequence.cached = static_cast<int32_t>(clamp(step.cache_lengths[index], 0, limit));
    sequence.keys = min(sequence.cached + sequence.tokens, limit);
    return sequence;
}

// Values of the pool that need not lie on a multiple of their size: R may be odd.
__device__ inline uint16_t load_u16(const uint8_t* bytes) { return static_cast<uint16_t>(bytes[0] | bytes[1] << 8); }

__device__ inline float load_f32(const uint8_t* bytes) {
    return __uint_as_float(static_cast<uint32_t>(load_u16(bytes)) | static_cast<uint32_t>(load_u16(bytes + 2)) << 16);
}

__device__ inline float bf16_bits(uint16_t bits) { return __uint_as_float(static_cast<uint32_t>(bits) << 16); }

// A token's row: its bytes, and the factor that all its values still have to be multiplied with.
struct Row {
    const uint8_t* bytes;
    float scale;
};

__device__ inline Row row_at(const KvLayout& layout, const uint8_t* pool, int32_t page, int32_t slot) {
    const uint8_t* const start = pool + page * layout.page_bytes;
    float scale = 1.0f;
    if (layout.format == row_format::fp8) scale = reinterpret_cast<const float*>(start + layout.scales_offset)[slot];
    if (layout.format == row_format::fp8_flat) scale = layout.kv_scale;
    return Row{start + static_cast<int64_t>(slot) * layout.row_bytes, scale};
}

// Latent value r of a row, before the row's factor.
__device__ inline float latent_value(const KvLayout& layout, const uint8_t* row, int32_t r) {
    switch (layout.format) {
        case row_format::f32: return reinterpret_cast<const float*>(row)[r];
        case row_format::bf16: return bf16_bits(reinterpret_cast<const uint16_t*>(row)[r]);
        case row_format::fp8_ds_mla:
            return decode_e4m3(row[r]) * load_f32(row + layout.rank + r / scale_group * 4);
        default: return decode_e4m3(row[r]);
    }
}

// Rope value d of a row, before the row's factor.
__device__ inline float rope_value(const KvLayout& layout, const uint8_t* row, int32_t d) {
    const uint8_t* const rope = row + layout.rope_offset;
    switch (layout.format) {
        case row_format::f32: return reinterpret_cast<const float*>(rope)[d];
        case row_format::fp8_flat: return decode_e4m3(rope[d]);
        default: return bf16_bits(load_u16(rope + 2 * d));
    }
}

// Element (row, column) of head `head` of a weight [H, rows, columns], scaled.
__device__ inline float weight_value(const BlockScaledWeight& weight, int32_t head, int32_t rows, int32_t columns,
                                     int32_t row, int32_t column) {
    int64_t const index = (static_cast<int64_t>(head) * rows + row) * columns + column;
    float const value = load_float(weight.data, weight.type, index);
    if (weight.scale == nullptr) return value;
    int64_t const block = (static_cast<int64_t>(head) * ceil_div(rows, scale_group) + row / scale_group) *
                              ceil_div(columns, scale_group) +
                          column / scale_group;
    return value * weight.scale[block];
}

}  // namespace mla::prefill_step
