// What the kernels' host code asks of the CUDA runtime and the driver.
#include <map>

#include "scheduler.h"
#include "tensor_map_box.h"

namespace emulator {
namespace {

CUresult encode(CUtensorMap* map, CUtensorMapDataType, cuuint32_t rank, void* data, const cuuint64_t* sizes, const cuuint64_t* strides,
                const cuuint32_t* box, const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle swizzle, CUtensorMapL2promotion,
                CUtensorMapFloatOOBfill) {
    if (rank != 4 || box[0] != (swizzle == CU_TENSOR_MAP_SWIZZLE_64B ? 64 : 128) || reinterpret_cast<size_t>(data) % 16 != 0) return CUDA_ERROR_INVALID_VALUE;
    Box made{};
    made.data = static_cast<const uint8_t*>(data);
    made.strides[0] = 1;
    for (int i = 0; i < 4; ++i) {
        if (sizes[i] == 0 || sizes[i] > uint64_t{1} << 32 || box[i] == 0 || box[i] > 256) return CUDA_ERROR_INVALID_VALUE;
        if (i > 0 && (strides[i - 1] % 16 != 0 || strides[i - 1] >= uint64_t{1} << 40)) return CUDA_ERROR_INVALID_VALUE;
        made.sizes[i] = static_cast<int64_t>(sizes[i]);
        made.box[i] = static_cast<int32_t>(box[i]);
        if (i > 0) made.strides[i] = static_cast<int64_t>(strides[i - 1]);
    }
    static_assert(sizeof(Box) <= sizeof(CUtensorMap));
    std::memcpy(static_cast<void*>(map), &made, sizeof made);
    return CUDA_SUCCESS;
}

}  // namespace

template <typename Each>
void Box::walk(uint32_t shared, int c0, int c1, int c2, int c3, Each each) const {
    if (shared % 128 != 0) fail("a box whose place in shared memory is no multiple of 128");
    uint32_t row = 0;
    for (int64_t z = c3; z < c3 + box[3]; ++z) {
        for (int64_t y = c2; y < c2 + box[2]; ++y) {
            for (int64_t x = c1; x < c1 + box[1]; ++x, ++row) {
                bool const there = x >= 0 && y >= 0 && z >= 0 && x < sizes[1] && y < sizes[2] && z < sizes[3];
                for (int unit = 0; unit < box[0] / 16; ++unit) {
                    uint32_t const bytes = static_cast<uint32_t>(box[0]), at = shared + bytes * row + static_cast<uint32_t>(16 * unit);
                    auto* values = reinterpret_cast<uint8_t*>(size_t{at ^ (at >> 3 & (bytes - 16))});
                    for (int byte = 0; byte < 16; ++byte) {
                        int64_t const column = c0 + 16 * unit + byte;
                        bool const inside = there && column >= 0 && column < sizes[0];
                        each(values[byte], inside ? const_cast<uint8_t*>(data) + column + x * strides[1] + y * strides[2] + z * strides[3] : nullptr);
                    }
                }
            }
        }
    }
}

void Box::copy(uint32_t target, int c0, int c1, int c2, int c3) const {
    walk(target, c0, c1, c2, c3, [](uint8_t& shared, const uint8_t* value) { shared = value == nullptr ? uint8_t{0} : *value; });
}

void Box::store(uint32_t source, int c0, int c1, int c2, int c3) const {
    walk(source, c0, c1, c2, c3, [](uint8_t shared, uint8_t* value) {
        if (value != nullptr) *value = shared;
    });
}

// Where memory begins, and how much of it there is.
static std::map<uintptr_t, size_t> memory;

void check_read(const void* source, size_t bytes, const char* what) {
    auto const begin = reinterpret_cast<uintptr_t>(source);
    auto behind = memory.upper_bound(begin);
    if (behind == memory.begin()) return;
    --behind;
    uintptr_t const end = behind->first + behind->second;
    if (begin < end && begin + bytes > end) fail("%s: reads %zu bytes behind the end of the memory", what, begin + bytes - end);
}

}  // namespace emulator

using emulator::settings;

extern "C" {

cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return "refused by the emulator"; }
const char* cudaGetErrorName(cudaError_t error) { return error == cudaSuccess ? "cudaSuccess" : "cudaErrorInvalidValue"; }

cudaError_t cudaGetDevice(int* device) {
    *device = 0;
    return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    switch (attribute) {
        case cudaDevAttrComputeCapabilityMajor: *value = 9; return cudaSuccess;
        case cudaDevAttrMultiProcessorCount: *value = settings.multiprocessors; return cudaSuccess;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = 227 << 10; return cudaSuccess;
        default: return cudaErrorInvalidValue;
    }
}
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int value) { return value <= 227 << 10 ? cudaSuccess : cudaErrorInvalidValue; }
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
    *attributes = {};
    attributes->ptxVersion = 90;
    attributes->sharedSizeBytes = settings.hopper ? 1 : 0;  // what kernels for sm_90a alone have where they were compiled for it
    return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
    emulator::enqueue_copy([=] { std::memcpy(to, from, bytes); });
    return cudaSuccess;
}
cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** entry, unsigned, unsigned long long, cudaDriverEntryPointQueryResult* found) {
    *entry = reinterpret_cast<void*>(emulator::encode);
    *found = cudaDriverEntryPointSuccess;
    return cudaSuccess;
}

__attribute__((visibility("default"))) void emulator_set(int multiprocessors, int early, int hopper) {
    settings = {multiprocessors, early != 0 ? emulator::Order::early : emulator::Order::late, hopper != 0};
}

// Memory that there is from now on; none: no more.
__attribute__((visibility("default"))) void emulator_memory(uintptr_t address, size_t bytes) {
    emulator::memory.erase(address);
    if (bytes > 0) emulator::memory.emplace(address, bytes);
}

// Does what is on the stream. The text says what went wrong; NULL: nothing.
__attribute__((visibility("default"))) const char* emulator_synchronize() {
    static std::string text;
    emulator::synchronize();
    text = emulator::take_error();
    return text.empty() ? nullptr : text.c_str();
}
}
