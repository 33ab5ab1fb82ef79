// The instructions of plugins/kernels/ptx.cuh.
#pragma once

#include "emulator.h"

namespace mla {

template <uint32_t selector>
inline uint32_t select_bytes(uint32_t value) {
    uint32_t selected = 0;
    for (int i = 0; i < 4; ++i) {
        uint32_t const nibble = selector >> 4 * i & 0xf;
        uint32_t byte = (nibble & 4) != 0 ? 0 : value >> 8 * (nibble & 3) & 0xff;
        if ((nibble & 8) != 0) byte = (byte & 0x80) != 0 ? 0xff : 0;
        selected |= byte << 8 * i;
    }
    return selected;
}

inline float without_denormals(float value) { return std::fpclassify(value) == FP_SUBNORMAL ? std::copysign(0.0f, value) : value; }

inline float power_of_two(float x) { return without_denormals(std::exp2(without_denormals(x))); }
inline float fast_log2(float value) { return std::log2(without_denormals(value)); }
inline float fast_inverse(float value) { return without_denormals(1.0f / without_denormals(value)); }
inline float relu(float value) { return std::isnan(value) ? value : value > 0.0f ? value : 0.0f; }

inline uint32_t encode_pair(float low, float high) {
    return static_cast<uint32_t>(__nv_cvt_float_to_fp8(low, __NV_SATFINITE, __NV_E4M3)) |
           static_cast<uint32_t>(__nv_cvt_float_to_fp8(high, __NV_SATFINITE, __NV_E4M3)) << 8;
}

inline void let_next_kernel_begin() { emulator::let_next_begin(); }
inline void wait_for_kernel_before() { emulator::wait_for_before(); }
inline void end_after_kernel_before() { emulator::end_after_before(); }

inline void named_sync(int id, int threads) { emulator::named_sync(id, threads); }
inline void named_arrive(int id, int threads) { emulator::named_arrive(id, threads); }

inline int32_t from_here(int32_t value) { return value; }

inline uint4 load_in_order(const uint8_t* from) { return *reinterpret_cast<const uint4*>(from); }
inline uint64_t load_in_order(const uint64_t* from) { return *from; }
inline float2 load_pair(uint32_t address) { return *reinterpret_cast<const float2*>(static_cast<size_t>(address)); }
inline void store_in_order(uint32_t to, uint4 value) { *reinterpret_cast<uint4*>(static_cast<size_t>(to)) = value; }
inline void store_word(uint32_t to, uint32_t value) { *reinterpret_cast<uint32_t*>(static_cast<size_t>(to)) = value; }

inline void count_up(int32_t* counter) { emulator::count_up(counter); }
inline void wait_for_count(const int32_t* counter, int32_t least) { emulator::wait_for_count(counter, least); }

inline void prefetch(const void*) {}

}  // namespace mla
