// Kernels that begin while the one before is still at work (SM90 and later): their launch, and what they do before they need its results,
// cost no time of their own. Elsewhere kernels follow each other as ever.
#pragma once

#include "call.h"
#include "ptx.cuh"

namespace mla {

// Launches a kernel that calls `wait_for_kernel_before` ahead of all that the kernel before makes or still uses. Each of its blocks
// does so, or calls `end_after_kernel_before`: who waits for that kernel relies on all before it.
template <typename... Parameters, typename... Arguments>
int launch_early(const char* what, void (*kernel)(Parameters...), dim3 blocks, int threads, int bytes, const Device& device,
                 cudaStream_t stream, const Arguments&... arguments) {
    cudaLaunchAttribute early{};
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = blocks;
    config.blockDim = static_cast<unsigned>(threads);
    config.dynamicSmemBytes = static_cast<size_t>(bytes);
    config.stream = stream;
    config.attrs = &early;
    config.numAttrs = device.major >= 9 ? 1 : 0;
    return check_cuda(what, cudaLaunchKernelEx(&config, kernel, arguments...));
}

}  // namespace mla
