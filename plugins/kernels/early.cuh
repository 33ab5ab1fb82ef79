// Kernels that begin while the one before is still at work (SM90 and later): their launch, and what they do before they need its results,
// cost no time of their own. Elsewhere kernels follow each other as ever.
#pragma once

#include "call.h"
#include "ptx.cuh"

namespace mla {

// How a product stands to the kernels before and behind it.
enum class KernelOrder {
    behind,  // the kernel before makes what it reads
    beside,  // what it reads was there before the kernel before began, which does not use what it makes: both may run side by side
    leading,  // behind, and the kernel behind this one begins only when all before this one has ended: it may run beside this one
};

// Launches a kernel that calls `wait_for_kernel_before` ahead of all that the kernel before makes or still uses. Each of its blocks
// does so, or calls `end_after_kernel_before`: who waits for that kernel relies on all before it.
// `cluster` of them share their shared memory.
template <typename... Parameters, typename... Arguments>
int launch_clusters_early(const char* what, void (*kernel)(Parameters...), dim3 blocks, int cluster, int threads, int bytes,
                          const Device& device, cudaStream_t stream, const Arguments&... arguments) {
    cudaLaunchAttribute attributes[2] = {};
    attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[0].val.programmaticStreamSerializationAllowed = 1;
    attributes[1].id = cudaLaunchAttributeClusterDimension;
    attributes[1].val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
    cudaLaunchConfig_t config{};
    config.gridDim = blocks;
    config.blockDim = static_cast<unsigned>(threads);
    config.dynamicSmemBytes = static_cast<size_t>(bytes);
    config.stream = stream;
    config.attrs = attributes;
    config.numAttrs = device.major < 9 ? 0 : cluster == 1 ? 1 : 2;
    return check_cuda(what, cudaLaunchKernelEx(&config, kernel, arguments...));
}

template <typename... Parameters, typename... Arguments>
int launch_early(const char* what, void (*kernel)(Parameters...), dim3 blocks, int threads, int bytes, const Device& device,
                 cudaStream_t stream, const Arguments&... arguments) {
    return launch_clusters_early(what, kernel, blocks, 1, threads, bytes, device, stream, arguments...);
}

}  // namespace mla
