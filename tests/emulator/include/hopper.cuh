// The instructions of plugins/kernels/hopper.cuh.
#pragma once

#include "emulator.h"
#include "ptx.cuh"
#include "tensor_map_box.h"

namespace mla {
namespace hopper {

inline void barrier_init(uint32_t barrier, uint32_t arrivals) { emulator::barrier_init(barrier, arrivals); }
inline void fence_barrier_init() {}
inline void barrier_expect(uint32_t barrier, uint32_t bytes) { emulator::barrier_arrive(barrier, bytes); }
inline void barrier_arrive(uint32_t barrier) { emulator::barrier_arrive(barrier, 0); }
inline void barrier_arrive_if(uint32_t barrier, bool arrives) {
    if (arrives) barrier_arrive(barrier);
}
inline void barrier_arrive_after_copies(uint32_t barrier) { emulator::arrive_after_thread_copies(barrier); }
inline void barrier_wait(uint32_t barrier, uint32_t parity) { emulator::barrier_wait(barrier, parity); }
inline bool barrier_test(uint32_t barrier, uint32_t parity) { return emulator::barrier_test(barrier, parity); }

inline bool elect_lane() {
    __syncwarp();
    return emulator::place->lane == 0;
}

inline void copy_box(uint32_t target, const void* map, uint32_t barrier, int c0, int c1, int c2, int c3) {
    emulator::Box const box = *static_cast<const emulator::Box*>(map);
    emulator::engine_copy([=] {
        box.copy(target, c0, c1, c2, c3);
        emulator::barrier_complete(barrier, box.bytes());
    });
}
inline void prefetch_map(const void*) {}
inline void prefetch_box(const void*, int, int, int, int) {}
inline void copy_bytes(uint32_t target, const void* source, uint32_t bytes, uint32_t barrier) {
    if (bytes % 16 != 0 || target % 16 != 0 || reinterpret_cast<size_t>(source) % 16 != 0) emulator::fail("copy_bytes: not multiples of 16");
    emulator::check_read(source, bytes, "copy_bytes");
    emulator::engine_copy([=] {
        std::memcpy(reinterpret_cast<void*>(size_t{target}), source, bytes);
        emulator::barrier_complete(barrier, bytes);
    });
}

inline void store_bytes(void* target, uint32_t source, uint32_t bytes) {
    if (bytes % 16 != 0 || source % 16 != 0 || reinterpret_cast<size_t>(target) % 16 != 0) emulator::fail("store_bytes: not multiples of 16");
    emulator::thread_copy([=] { std::memcpy(target, reinterpret_cast<const void*>(size_t{source}), bytes); });
}
inline void store_box(const void* map, uint32_t source, int c0, int c1, int c2, int c3) {
    emulator::Box const box = *static_cast<const emulator::Box*>(map);
    emulator::thread_copy([=] { box.store(source, c0, c1, c2, c3); });
}
inline void store_commit() { emulator::thread_copies_commit(); }
template <int pending>
inline void store_wait_read() {
    emulator::thread_copies_wait(pending);
}
inline void store_wait() { emulator::thread_copies_wait(-1); }

inline void fence_async() {}
inline void fence_copies() {}

template <int count>
inline void registers_decrease() {}
template <int count>
inline void registers_increase() {}

struct WarpStore {  // of one lane
    uint32_t row;
    const uint32_t* four;
};
inline void store_matrices_of(void* const* given) {
    auto const lane = [&](int number) -> WarpStore& { return *static_cast<WarpStore*>(given[number]); };
    for (int i = 0; i < 4; ++i) {
        for (int number = 0; number < 32; ++number) {
            reinterpret_cast<uint32_t*>(size_t{lane(8 * i + number / 4).row})[number % 4] = lane(number).four[i];
        }
    }
}
inline void store_matrices(uint32_t shared_address, const uint32_t* four) {
    WarpStore own{shared_address, four};
    emulator::together("stmatrix", &own, store_matrices_of);
}

inline void store_matrices_transposed_of(void* const* given) {
    auto const lane = [&](int number) -> WarpStore& { return *static_cast<WarpStore*>(given[number]); };
    for (int i = 0; i < 4; ++i) {
        for (int number = 0; number < 32; ++number) {
            for (int half = 0; half < 2; ++half) {
                reinterpret_cast<uint16_t*>(size_t{lane(8 * i + number % 4 * 2 + half).row})[number / 4] =
                    static_cast<uint16_t>(lane(number).four[i] >> 16 * half);
            }
        }
    }
}
inline void store_matrices_transposed(uint32_t shared_address, const uint32_t* four) {
    WarpStore own{shared_address, four};
    emulator::together("stmatrix", &own, store_matrices_transposed_of);
}

inline void product_fence() {}
inline void product_commit() { emulator::products_commit(); }
template <int pending = 0>
inline void product_wait() {
    emulator::products_wait(pending);
}

template <int n>
inline void pin(float (&)[n]) {}
template <int n>
inline void pin(uint32_t (&)[n][4]) {}

inline uint32_t tile_descriptor(uint32_t address) { return (address & 0x3ffff) >> 4 | 1u << 16; }

// A product of four warps, as one of their threads orders it: D [64][n] (+)= A [64][k] B, k 16 bf16 values or 32 e4m3 codes. A and B are
// the low halves of descriptors, A instead four registers of each thread. B is [n][k], or [k][n] in tiles of 64 columns. A warp has
// 16 rows of A and D.
struct Product {
    float* d;
    int n;
    bool codes, clear, columns;
    const uint32_t* a_registers;
    uint32_t a, b;
    int b_row;  // bytes of a row of B
};
void order_product_of(void* const* given);

inline void order(float* d, int n, bool codes, bool clear, bool columns, const uint32_t* a_registers, uint32_t a, uint32_t b, int b_row = 128) {
    Product own{d, n, codes, clear, columns, a_registers, a, b, b_row};
    emulator::together("wgmma", &own, order_product_of);
}

template <int step, bool clear>
inline void product_e4m3(float (&d)[32], uint32_t a, uint32_t b) {
    order(d, 64, true, clear, false, nullptr, a + 2 * step, b + 2 * step);
}
template <int step, bool clear, int b_row = 128>
inline void product_e4m3(float (&d)[64], uint32_t a, uint32_t b) {
    order(d, 128, true, clear, false, nullptr, a + 2 * step, b + 2 * step, b_row);
}
template <int step, bool clear = false>
inline void product_bf16(float (&d)[32], uint32_t a, uint32_t b) {
    order(d, 64, false, clear, false, nullptr, a + 2 * step, b + 2 * step);
}
template <int step, bool clear = false>
inline void product_bf16(float (&d)[32], const uint32_t (&a)[4], uint32_t b) {
    order(d, 64, false, clear, false, a, 0, b + 2 * step);
}
template <int step, bool clear = false>
inline void product_bf16(float (&d)[8], const uint32_t (&a)[4], uint32_t b) {
    order(d, 16, false, clear, false, a, 0, b + 2 * step);
}
template <int step, bool clear = false>
inline void product_bf16(float (&d)[64], const uint32_t (&a)[4], uint32_t b) {
    order(d, 128, false, clear, false, a, 0, b + 2 * step);
}
template <int step, bool clear>
inline void product_bf16(float (&d)[64], uint32_t a, uint32_t b) {
    order(d, 128, false, clear, false, nullptr, a + 2 * step, b + 2 * step);
}
template <int step, bool clear>
inline void product_bf16(float (&d)[128], uint32_t a, uint32_t b) {
    order(d, 256, false, clear, false, nullptr, a + 2 * step, b + 2 * step);
}
template <int step, int tile_stride>
inline void product_bf16_values(float (&d)[64], const uint32_t (&a)[4], uint32_t b) {
    order(d, 128, false, false, true, a, 0, b + 128 * step + (((tile_stride >> 4) - 1) << 16));
}
template <int step, int tile_stride>
inline void product_bf16_wide(float (&d)[128], uint32_t a, uint32_t b) {
    order(d, 256, false, false, true, nullptr, a + 2 * step, b + 128 * step + (((tile_stride >> 4) - 1) << 16));
}
template <int step, int tile_stride>
inline void product_bf16_wide(float (&d)[96], uint32_t a, uint32_t b) {
    order(d, 192, false, false, true, nullptr, a + 2 * step, b + 128 * step + (((tile_stride >> 4) - 1) << 16));
}
template <int step, int tile_stride>
inline void product_bf16_wide(float (&d)[32], uint32_t a, uint32_t b) {
    order(d, 64, false, false, true, nullptr, a + 2 * step, b + 128 * step + (((tile_stride >> 4) - 1) << 16));
}
template <int step, int tile_stride, bool clear = false>
inline void product_bf16_wide(float (&d)[64], uint32_t a, uint32_t b) {
    order(d, 128, false, clear, true, nullptr, a + 2 * step, b + 128 * step + (((tile_stride >> 4) - 1) << 16));
}
template <int step>
inline void product_e4m3(float (&d)[32], const uint32_t (&a)[4], uint32_t b) {
    order(d, 64, true, step == 0, false, a, 0, b + 2 * step);
}
template <int step>
inline void product_e4m3(float (&d)[24], const uint32_t (&a)[4], uint32_t b) {
    order(d, 48, true, step == 0, false, a, 0, b + 2 * step);
}
template <int step>
inline void product_e4m3(float (&d)[16], const uint32_t (&a)[4], uint32_t b) {
    order(d, 32, true, step == 0, false, a, 0, b + 2 * step);
}
template <int step>
inline void product_e4m3(float (&d)[8], const uint32_t (&a)[4], uint32_t b) {
    order(d, 16, true, step == 0, false, a, 0, b + 2 * step);
}

}  // namespace hopper
}  // namespace mla
