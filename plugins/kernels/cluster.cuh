// Blocks that share their shared memory (thread block clusters, SM90 and later). Elsewhere every block is alone.
#pragma once

#include <cstdint>

namespace mla {

__device__ inline int cluster_rank() {
#if __CUDA_ARCH__ >= 900
    uint32_t rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return static_cast<int>(rank);
#else
    return 0;
#endif
}

__device__ inline int cluster_size() {
#if __CUDA_ARCH__ >= 900
    uint32_t size;
    asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
    return static_cast<int>(size);
#else
    return 1;
#endif
}

// Barrier of all threads of the cluster; what was written to shared memory before is seen by all after.
__device__ inline void cluster_barrier() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
    __syncthreads();
#endif
}

// The same in two halves for those who have read, and write no more: what a thread wrote before it arrives need not be seen.
__device__ inline void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}
__device__ inline void cluster_wait() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
    __syncthreads();
#endif
}

// The value of four, eight or sixteen bytes at this place in the shared memory of the cluster's block `rank`.
template <typename T>
__device__ inline T load_from_block(const T* shared, int rank) {
#if __CUDA_ARCH__ >= 900
    uint32_t const local = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
    uint32_t remote;
    T value;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(local), "r"(rank));
    if constexpr (sizeof(T) == 16) {
        asm volatile("ld.shared::cluster.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                     : "r"(remote)
                     : "memory");
    } else if constexpr (sizeof(T) == 8) {
        asm volatile("ld.shared::cluster.u64 %0, [%1];" : "=l"(value) : "r"(remote) : "memory");
    } else {
        asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(value) : "r"(remote) : "memory");
    }
    return value;
#else
    (void)rank;
    return *shared;
#endif
}

}  // namespace mla
