// Tensors that SM90's copy engine reads.
#pragma once

#include <array>
#include <cuda.h>

#include "call.h"

namespace mla {

// A tensor of bytes, innermost axis first; strides are those of the outer axes. A box's innermost axis is 128 or 64 bytes, and its
// 16-byte units are permuted by the row, as the tensor cores want operands. What lies outside of the tensor is zeros.
inline int make_tensor_map(CUtensorMap* map, const void* data, const std::array<int64_t, 4>& sizes,
                           const std::array<int64_t, 3>& strides, const std::array<int, 4>& box) {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
    cudaError_t const error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found);
#else
    cudaError_t const error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &entry, cudaEnableDefault, &found);
#endif
    if (int status = check_cuda("cuTensorMapEncodeTiled", error)) return status;
    if (found != cudaDriverEntryPointSuccess) return fail(MLA_CUDA, "the driver has no cuTensorMapEncodeTiled: update it");
    auto const encode = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(entry);
    cuuint64_t map_sizes[4], map_strides[3];
    cuuint32_t map_box[4], steps[4] = {1, 1, 1, 1};
    for (int i = 0; i < 4; ++i) {
        map_sizes[i] = static_cast<cuuint64_t>(sizes[i]);
        map_box[i] = static_cast<cuuint32_t>(box[i]);
        if (i < 3) map_strides[i] = static_cast<cuuint64_t>(strides[i]);
    }
    CUresult const status =
        encode(map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 4, const_cast<void*>(data), map_sizes, map_strides, map_box, steps,
               CU_TENSOR_MAP_INTERLEAVE_NONE, box[0] == 64 ? CU_TENSOR_MAP_SWIZZLE_64B : CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
               CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (status == CUDA_SUCCESS) return MLA_OK;
    return fail(MLA_CUDA, "cuTensorMapEncodeTiled gave error %d for a tensor of %lld x %lld x %lld x %lld bytes",
                static_cast<int>(status), static_cast<long long>(sizes[0]), static_cast<long long>(sizes[1]),
                static_cast<long long>(sizes[2]), static_cast<long long>(sizes[3]));
}

}  // namespace mla
