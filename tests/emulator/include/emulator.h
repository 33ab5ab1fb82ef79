// What kernels find on a GPU, on a CPU: threads with numbers, shared memory, barriers, warps that exchange values, launches.
//
// Every thread of a block is a fiber; one of them runs at a time, until it waits for others. So kernels keep their meaning, and a
// barrier that never completes is seen: nobody can run. `emulator.cpp` has the fibers and their scheduler.
//
// Copies and products that a GPU does beside its threads are done as late as possible (`Order::late`): when nobody can run, or when they
// are waited for. Code that does not wait finds what was there before. With `Order::early` they are done at once: code that orders them
// before their place is free is wrong then.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <tuple>
#include <type_traits>
#include <utility>

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cuda_runtime_api.h>
#include <vector_functions.h>

#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __global__
#define __global__
#undef __device__
#define __device__
#undef __host__
#define __host__
#undef __constant__
#define __constant__
#undef __grid_constant__
#define __grid_constant__
#undef __noinline__
#define __noinline__
#undef __forceinline__
#define __forceinline__ inline

namespace emulator {

constexpr int warp_size = 32, group_warps = 4;  // of the warps that multiply together

enum class Order : int { late, early };

struct Place {  // of the running thread, what `threadIdx` and its like do not say
    int lane, cluster_rank, cluster_size;
};
extern const Place* place;

[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// Fails where bytes of a memory and others behind its end are read; what begins in no memory that is known may be any.
void check_read(const void* source, size_t bytes, const char* what);

// Shared memory of the running thread's block: the dynamic part, and one variable by its declaration. All of it lies below 4 GiB, and
// begins at a multiple of 256 KiB: the low 18 bits of an address say where it is in the block's memory.
void* dynamic_shared();
void* static_shared(const void* declaration, size_t bytes, size_t alignment);
uint32_t shared_base();
uint32_t shared_base_of(int rank_in_cluster);

void block_sync();
int block_sync_or(int value);
void cluster_sync();
void grid_sync();
void named_sync(int id, int threads);
void named_arrive(int id, int threads);
void yield();
void count_up(int32_t* counter);
void wait_for_count(const int32_t* counter, int32_t least);

// The values that the warp's lanes gave, by lane. `what` must be the same for all of them.
const uint64_t* exchange(const char* what, uint64_t value);
// What the lanes of a warp do as one: whoever comes last does `work` with the pointers that all of them gave, by lane.
using Work = void (*)(void* const* given);
void together(const char* what, void* given, Work work);

// Barriers in shared memory, as mbarrier.
void barrier_init(uint32_t barrier, uint32_t arrivals);
void barrier_arrive(uint32_t barrier, uint32_t expected_bytes);
void barrier_complete(uint32_t barrier, uint32_t bytes);
void barrier_wait(uint32_t barrier, uint32_t parity);
bool barrier_test(uint32_t barrier, uint32_t parity);

// Copies of the copy engine; a thread's own copies, which it waits for in groups (-1: for all of them, committed or not); products of
// the running warp, by one of its lanes, and the waiting of all of them. `mark` says what is multiplied: it must be the same for the four
// warps of a group, of which each multiplies its own rows in its own time.
void engine_copy(std::function<void()> copy);
void thread_copy(std::function<void()> copy);
void thread_copies_commit();
void thread_copies_wait(int pending_groups);
void arrive_after_thread_copies(uint32_t barrier);
void order_product(std::function<void()> product, uint64_t mark);
int warp_in_group();
void products_commit();
void products_wait(int pending_groups);

struct Grid {
    dim3 blocks, threads;
    size_t shared_bytes = 0;
    int cluster = 1;
    bool all_at_once = false;  // blocks that wait for each other
    bool early = false;        // may begin while the grid before is at work
};
// What is put on the stream is done by `synchronize`.
void enqueue(const Grid& grid, std::function<void()> thread);
void enqueue_copy(std::function<void()> copy);
void synchronize();

// The next grid may begin when all blocks say so or have ended; whether the one before has ended, it must wait for.
void let_next_begin();
void wait_for_before();
void end_after_before();

template <typename... Parameters>
struct Launch {
    void (*kernel)(Parameters...);
    Grid grid;

    Launch(void (*function)(Parameters...), dim3 blocks, dim3 threads, size_t shared_bytes = 0, cudaStream_t = nullptr)
        : kernel(function), grid{blocks, threads, shared_bytes} {}

    template <typename... Arguments>
    void operator()(const Arguments&... arguments) const {
        std::tuple<std::decay_t<Parameters>...> const values(static_cast<std::decay_t<Parameters>>(arguments)...);
        enqueue(grid, [function = kernel, values] { std::apply(function, values); });
    }
};

template <typename T>
T lane_value(uint64_t bits) {
    T value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}
template <typename T>
const uint64_t* exchange_values(const char* what, T value) {
    static_assert(sizeof(T) <= 8);
    uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof value);
    return exchange(what, bits);
}

}  // namespace emulator

// Of the running thread: set whenever another one runs.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

inline size_t __cvta_generic_to_shared(const void* pointer) { return reinterpret_cast<size_t>(pointer); }

inline void __syncthreads() { emulator::block_sync(); }
inline int __syncthreads_or(int value) { return emulator::block_sync_or(value); }
inline void __syncwarp() { emulator::exchange("__syncwarp", 0); }
inline void __nanosleep(unsigned) { emulator::yield(); }
inline void __threadfence() {}
inline void __threadfence_block() {}

template <typename T>
T __shfl_sync(unsigned, T value, int lane) {
    return emulator::lane_value<T>(emulator::exchange_values("__shfl_sync", value)[lane % 32]);
}
template <typename T>
T __shfl_xor_sync(unsigned, T value, int lanes) {
    return emulator::lane_value<T>(emulator::exchange_values("__shfl_xor_sync", value)[emulator::place->lane ^ lanes]);
}
template <typename T>
T __shfl_up_sync(unsigned, T value, int lanes) {
    const uint64_t* values = emulator::exchange_values("__shfl_up_sync", value);
    return emulator::place->lane < lanes ? value : emulator::lane_value<T>(values[emulator::place->lane - lanes]);
}
template <typename T>
T __shfl_down_sync(unsigned, T value, int lanes) {
    const uint64_t* values = emulator::exchange_values("__shfl_down_sync", value);
    return emulator::place->lane + lanes > 31 ? value : emulator::lane_value<T>(values[emulator::place->lane + lanes]);
}
inline unsigned __ballot_sync(unsigned, int predicate) {
    const uint64_t* values = emulator::exchange("__ballot_sync", predicate != 0);
    unsigned bits = 0;
    for (int lane = 0; lane < 32; ++lane) bits |= static_cast<unsigned>(values[lane]) << lane;
    return bits;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == 0xffffffffu; }

namespace emulator {
template <typename T, typename Combine>
T reduce(const char* what, T value, Combine combine) {
    const uint64_t* values = exchange_values(what, value);
    T result = lane_value<T>(values[0]);
    for (int lane = 1; lane < 32; ++lane) result = combine(result, lane_value<T>(values[lane]));
    return result;
}
}  // namespace emulator

template <typename T>
T __reduce_max_sync(unsigned, T value) {
    return emulator::reduce("__reduce_max_sync", value, [](T a, T b) { return a > b ? a : b; });
}
template <typename T>
T __reduce_min_sync(unsigned, T value) {
    return emulator::reduce("__reduce_min_sync", value, [](T a, T b) { return a < b ? a : b; });
}
template <typename T>
T __reduce_add_sync(unsigned, T value) {
    return emulator::reduce("__reduce_add_sync", value, [](T a, T b) { return static_cast<T>(a + b); });
}
template <typename T>
T __reduce_or_sync(unsigned, T value) {
    return emulator::reduce("__reduce_or_sync", value, [](T a, T b) { return static_cast<T>(a | b); });
}

// One thread runs at a time: what it does to memory is atomic.
template <typename T>
T atomicAdd(T* at, T value) {
    T const before = *at;
    *at = static_cast<T>(before + value);
    return before;
}
template <typename T>
T atomicOr(T* at, T value) {
    T const before = *at;
    *at = before | value;
    return before;
}
template <typename T>
T atomicMax(T* at, T value) {
    T const before = *at;
    *at = before > value ? before : value;
    return before;
}
template <typename T>
T atomicExch(T* at, T value) {
    T const before = *at;
    *at = value;
    return before;
}

template <typename A, typename B>
std::common_type_t<A, B> max(A a, B b) {
    using T = std::common_type_t<A, B>;
    return static_cast<T>(a) < static_cast<T>(b) ? static_cast<T>(b) : static_cast<T>(a);
}
template <typename A, typename B>
std::common_type_t<A, B> min(A a, B b) {
    using T = std::common_type_t<A, B>;
    return static_cast<T>(b) < static_cast<T>(a) ? static_cast<T>(b) : static_cast<T>(a);
}

template <typename T>
T emulated_bits(const void* value) {
    T bits;
    std::memcpy(&bits, value, sizeof bits);
    return bits;
}
inline float __uint_as_float(unsigned bits) { return emulated_bits<float>(&bits); }
inline float __int_as_float(int bits) { return emulated_bits<float>(&bits); }
inline unsigned __float_as_uint(float value) { return emulated_bits<unsigned>(&value); }
inline int __float_as_int(float value) { return emulated_bits<int>(&value); }

inline int __ffs(int value) { return __builtin_ffs(value); }
inline int __clz(int value) { return value == 0 ? 32 : __builtin_clz(static_cast<unsigned>(value)); }
inline int __popc(unsigned value) { return __builtin_popcount(value); }
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
    uint64_t const bytes = static_cast<uint64_t>(high) << 32 | low;
    unsigned result = 0;
    for (int i = 0; i < 4; ++i) result |= static_cast<unsigned>(bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
    return result;
}

// Rounded by themselves: -ffp-contract=off keeps g++ from joining them; __fmaf_rn is one rounding.
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fdividef(float a, float b) { return a / b; }
inline float rsqrtf(float a) { return 1.0f / std::sqrt(a); }

inline __nv_bfloat16 __hfma(__nv_bfloat16 a, __nv_bfloat16 b, __nv_bfloat16 c) {
    return __float2bfloat16_rn(std::fma(__bfloat162float(a), __bfloat162float(b), __bfloat162float(c)));
}
inline __nv_bfloat162 __hfma2(__nv_bfloat162 a, __nv_bfloat162 b, __nv_bfloat162 c) { return {__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y)}; }

template <typename T>
T __ldg(const T* at) {
    return *at;
}

template <typename... Parameters>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, void (*)(Parameters...)) {
    return cudaFuncGetAttributes(attributes, static_cast<const void*>(nullptr));
}
template <typename... Parameters>
cudaError_t cudaFuncSetAttribute(void (*)(Parameters...), cudaFuncAttribute attribute, int value) {
    return cudaFuncSetAttribute(static_cast<const void*>(nullptr), attribute, value);
}
template <typename... Parameters>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void (*)(Parameters...), int, size_t) {
    *blocks = 1;
    return cudaSuccess;
}

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), const Arguments&... arguments) {
    emulator::Launch<Parameters...> launch(kernel, config->gridDim, config->blockDim, config->dynamicSmemBytes);
    for (unsigned i = 0; i < config->numAttrs; ++i) {
        if (config->attrs[i].id == cudaLaunchAttributeClusterDimension) {
            launch.grid.cluster = static_cast<int>(config->attrs[i].val.clusterDim.x);
        } else if (config->attrs[i].id == cudaLaunchAttributeProgrammaticStreamSerialization) {
            launch.grid.early = config->attrs[i].val.programmaticStreamSerializationAllowed != 0;
        }
    }
    launch(arguments...);
    return cudaSuccess;
}

namespace emulator {
template <typename... Parameters, size_t... i>
void launch_all_at_once(Launch<Parameters...>& launch, void** arguments, std::index_sequence<i...>) {
    launch(*static_cast<std::decay_t<Parameters>*>(arguments[i])...);
}
}  // namespace emulator

template <typename... Parameters>
cudaError_t cudaLaunchCooperativeKernel(void (*kernel)(Parameters...), dim3 blocks, dim3 threads, void** arguments,
                                        size_t shared_bytes, cudaStream_t) {
    emulator::Launch<Parameters...> launch(kernel, blocks, threads, shared_bytes);
    launch.grid.all_at_once = true;
    emulator::launch_all_at_once(launch, arguments, std::index_sequence_for<Parameters...>{});
    return cudaSuccess;
}
