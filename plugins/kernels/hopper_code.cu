// Whether this library was compiled for sm_90a.
#include "call.h"
#include "device.cuh"

namespace mla {
namespace {

__global__ void hopper_code_kernel() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    __shared__ int there;
    auto& kept = const_cast<volatile int&>(there);  // else the compiler leaves it out
    kept = 1;
#endif
}

}  // namespace

// Code for sm_90a alone has the kernel's body, and with it its static shared memory.
bool has_hopper_code() {
    cudaFuncAttributes attributes;
    return cudaFuncGetAttributes(&attributes, hopper_code_kernel) == cudaSuccess && attributes.sharedSizeBytes > 0;
}

}  // namespace mla
