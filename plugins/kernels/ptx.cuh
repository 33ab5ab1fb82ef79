// Single instructions that CUDA C++ has no name for, or does not keep where they are written.
#pragma once

#include <cstdint>

namespace mla {

// The bytes of `value` that the selector's nibbles name; with 8 more, the byte's sign eight times.
template <uint32_t selector>
__device__ inline uint32_t select_bytes(uint32_t value) {
    uint32_t selected;
    asm("prmt.b32 %0, %1, 0, %2;" : "=r"(selected) : "r"(value), "n"(selector));
    return selected;
}

// 2^x; denormal results are 0.
__device__ inline float power_of_two(float x) {
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
}

// Of normal numbers; others give 0 or infinity.
__device__ inline float fast_log2(float value) {
    float result;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(value));
    return result;
}
__device__ inline float fast_inverse(float value) {
    float result;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(value));
    return result;
}

// max(value, 0) that keeps NaN.
__device__ inline float relu(float value) {
    float result;
    asm("max.NaN.f32 %0, %1, 0f00000000;" : "=f"(result) : "f"(value));
    return result;
}

// Two values as e4m3 codes, `low` in the low byte. SM89 and later.
__device__ inline uint32_t encode_pair(float low, float high) {
    uint16_t codes;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(codes) : "f"(high), "f"(low));
    return codes;
}

// The kernel behind this one may begin, if it was launched early (early.cuh), as soon as all blocks of this one have said so or have ended.
__device__ inline void let_next_kernel_begin() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Waits until the kernel before has ended and its results can be seen.
__device__ inline void wait_for_kernel_before() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// In the end of a kernel that runs beside the one before, by all blocks: it does not end before that one, and who waits for it relies on
// that. One block waits, for a kernel ends with the last of its blocks.
__device__ inline void end_after_kernel_before() {
    if (blockIdx.x == 0 && blockIdx.y == 0 && blockIdx.z == 0) wait_for_kernel_before();
}

// Barriers 1 to 15 of the block, among `threads` threads: `sync` waits, `arrive` does not.
__device__ inline void named_sync(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
__device__ inline void named_arrive(int id, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// The same value, of which nothing is made before this: what makes something of a read waits for it, and so do the reads behind that.
__device__ inline int32_t from_here(int32_t value) {
    asm volatile("" : "+r"(value));
    return value;
}

// In the order of the program: left to itself ptxas moves loads to where their values are used, or all of them to the front.
__device__ inline uint4 load_in_order(const uint8_t* from) {
    uint4 value;
    asm volatile("ld.volatile.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                 : "l"(from));
    return value;
}
__device__ inline uint64_t load_in_order(const uint64_t* from) {
    uint64_t value;
    asm volatile("ld.global.b64 %0, [%1];" : "=l"(value) : "l"(from));
    return value;
}

// The same of shared memory, by its address there.
__device__ inline float2 load_pair(uint32_t address) {
    float2 value;
    asm volatile("ld.volatile.shared.v2.f32 {%0, %1}, [%2];" : "=f"(value.x), "=f"(value.y) : "r"(address));
    return value;
}
__device__ inline void store_in_order(uint32_t to, uint4 value) {
    asm volatile("st.volatile.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(value.x), "r"(value.y), "r"(value.z),
                 "r"(value.w)
                 : "memory");
}
__device__ inline void store_word(uint32_t to, uint32_t value) {
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(to), "r"(value) : "memory");
}

// Counters by which blocks that run at once tell each other what they have done: who has waited for a count sees what was written
// before each of its additions.
__device__ inline void count_up(int32_t* counter) { asm volatile("red.release.gpu.global.add.s32 [%0], 1;" ::"l"(counter) : "memory"); }
__device__ inline void wait_for_count(const int32_t* counter, int32_t least) {
    while (true) {
        int32_t found;
        asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(found) : "l"(counter) : "memory");
        if (found >= least) return;
        __nanosleep(100);
    }
}

__device__ inline void prefetch(const void* from) { asm volatile("prefetch.global.L2 [%0];" ::"l"(from)); }

}  // namespace mla
