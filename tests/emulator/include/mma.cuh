// The instructions of plugins/kernels/mma.cuh.
#pragma once

#include "emulator.h"

namespace mla {

struct WarpProduct {  // of one lane
    float* d;
    const uint32_t* a;
    uint32_t b[2];
};

inline float half_of(uint32_t pair, int half, bool is_bf16) {
    auto const bits = static_cast<uint16_t>(pair >> 16 * half);
    if (is_bf16) return __uint_as_float(static_cast<uint32_t>(bits) << 16);
    __half_raw raw;
    raw.x = bits;
    return __half2float(__half(raw));
}

template <bool is_bf16>
void multiply(void* const* given) {
    auto const lane = [&](int number) -> WarpProduct& { return *static_cast<WarpProduct*>(given[number]); };
    float a[16][16], b[16][8];
    for (int number = 0; number < 32; ++number) {
        int const g = number / 4, t = number % 4;
        for (int half = 0; half < 2; ++half) {
            for (int i = 0; i < 4; ++i) a[g + i % 2 * 8][2 * t + half + i / 2 * 8] = half_of(lane(number).a[i], half, is_bf16);
            for (int i = 0; i < 2; ++i) b[2 * t + half + i * 8][g] = half_of(lane(number).b[i], half, is_bf16);
        }
    }
    for (int row = 0; row < 16; ++row) {
        float sums[8];
        for (int n = 0; n < 8; ++n) sums[n] = lane(row % 8 * 4 + n / 2).d[row / 8 * 2 + n % 2];
        for (int k = 0; k < 16; ++k) {
            for (int n = 0; n < 8; ++n) sums[n] += a[row][k] * b[k][n];
        }
        for (int n = 0; n < 8; ++n) lane(row % 8 * 4 + n / 2).d[row / 8 * 2 + n % 2] = sums[n];
    }
}

inline void mma_bf16(float (&d)[4], uint32_t const (&a)[4], uint32_t b0, uint32_t b1) {
    WarpProduct own{d, a, {b0, b1}};
    emulator::together("mma_bf16", &own, multiply<true>);
}
inline void mma_f16(float (&d)[4], uint32_t const (&a)[4], uint32_t b0, uint32_t b1) {
    WarpProduct own{d, a, {b0, b1}};
    emulator::together("mma_f16", &own, multiply<false>);
}

struct WarpLoad {  // of one lane
    uint32_t row;
    uint32_t* r;
};

template <bool transposed>
void load_matrices(void* const* given) {
    auto const lane = [&](int number) -> WarpLoad& { return *static_cast<WarpLoad*>(given[number]); };
    for (int i = 0; i < 4; ++i) {
        uint16_t matrix[8][8];
        for (int row = 0; row < 8; ++row) std::memcpy(matrix[row], reinterpret_cast<const void*>(size_t{lane(8 * i + row).row}), 16);
        for (int number = 0; number < 32; ++number) {
            int const g = number / 4, t = number % 4;
            uint32_t const low = transposed ? matrix[2 * t][g] : matrix[g][2 * t];
            uint32_t const high = transposed ? matrix[2 * t + 1][g] : matrix[g][2 * t + 1];
            lane(number).r[i] = low | high << 16;
        }
    }
}

inline void ldmatrix_x4(uint32_t (&r)[4], uint32_t shared_address) {
    WarpLoad own{shared_address, r};
    emulator::together("ldmatrix", &own, load_matrices<false>);
}
inline void ldmatrix_x4_transposed(uint32_t (&r)[4], uint32_t shared_address) {
    WarpLoad own{shared_address, r};
    emulator::together("ldmatrix transposed", &own, load_matrices<true>);
}

inline uint32_t shared_address(const void* pointer) { return static_cast<uint32_t>(__cvta_generic_to_shared(pointer)); }

inline void copy_async(uint32_t shared, const void* global, size_t bytes, bool valid) {
    auto* to = reinterpret_cast<void*>(static_cast<size_t>(shared));
    emulator::thread_copy([=] { valid ? static_cast<void>(std::memcpy(to, global, bytes)) : static_cast<void>(std::memset(to, 0, bytes)); });
}
inline void copy_async_16(uint32_t shared, const void* global, bool valid) { copy_async(shared, global, 16, valid); }
inline void copy_async_16_once(uint32_t shared, const void* global, bool valid) { copy_async(shared, global, 16, valid); }
inline void copy_async_4(uint32_t shared, const void* global, bool valid) { copy_async(shared, global, 4, valid); }
inline void copy_async_4(uint32_t shared, const void* global) { copy_async(shared, global, 4, true); }
inline void copy_async_commit() { emulator::thread_copies_commit(); }
inline void copy_async_wait_all() { emulator::thread_copies_wait(-1); }
template <int pending>
inline void copy_async_wait() {
    emulator::thread_copies_wait(pending);
}

}  // namespace mla
