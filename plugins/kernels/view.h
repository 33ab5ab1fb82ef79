// A [T, H, n] tensor inside a larger one.
#pragma once

#include <cstdint>

#include "api.h"

namespace mla {

struct View {
    void* data;  // the first element
    int32_t type;
    int64_t token_stride, head_stride;  // elements; the last axis is contiguous

    // The view that begins `elements` later along the last axis.
    View from(int64_t elements) const {
        int64_t const bytes = type == MLA_FLOAT ? 4 : type == MLA_FLOAT8E4M3FN ? 1 : 2;
        return {static_cast<char*>(data) + elements * bytes, type, token_stride, head_stride};
    }
};

// Whether four values that follow each other may be read or written at once, from a multiple of four on.
inline bool in_fours(const View& view) {
    int64_t const bytes = view.type == MLA_FLOAT ? 4 : view.type == MLA_FLOAT8E4M3FN ? 1 : 2;
    return reinterpret_cast<uintptr_t>(view.data) % (4 * bytes) == 0 && view.token_stride % 4 == 0 && view.head_stride % 4 == 0;
}

// A contiguous [T, H, width] tensor.
inline View contiguous(void* data, int32_t type, int64_t heads, int64_t width) {
    return {data, type, heads * width, width};
}

}  // namespace mla
