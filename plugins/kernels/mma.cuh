// Tensor cores and asynchronous copies that SM80 and every later GPU have.
//
// Fragments of m16n8k16, lane = 4 g + t (PTX ISA, "Matrix fragments for mma.m16n8k16"):
//   A (row)  a0 [g][2t, 2t+1]  a1 [g+8][2t, 2t+1]  a2 [g][2t+8, +9]  a3 [g+8][2t+8, +9]
//   B (col)  b0 [k 2t, 2t+1][n g]  b1 [k 2t+8, +9][n g]
//   C        c0, c1 [g][2t, 2t+1]  c2, c3 [g+8][2t, 2t+1]
#pragma once

#include <cstdint>

namespace mla {

// D += A B in f32; A and B bf16.
__device__ inline void mma_bf16(float (&d)[4], uint32_t const (&a)[4], uint32_t b0, uint32_t b1) {
    asm(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// D += A B in f32; A and B f16.
__device__ inline void mma_f16(float (&d)[4], uint32_t const (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four 8 x 8 matrices of 16-bit values; lane i gives the address of row i % 8 of matrix i / 8. Lane 4 g + t gets
// [g][2t, 2t+1] of each, and with `transposed` [2t, 2t+1][g].
__device__ inline void ldmatrix_x4(uint32_t (&r)[4], uint32_t shared_address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address)
                 : "memory");
}

__device__ inline void ldmatrix_x4_transposed(uint32_t (&r)[4], uint32_t shared_address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address)
                 : "memory");
}

__device__ inline uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// 16 bytes from global to shared memory; zeros where `valid` is false (the source is then not read).
__device__ inline void copy_async_16(uint32_t shared, const void* global, bool valid) {
    int const bytes = valid ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(bytes) : "memory");
}

// The same of what is read once: the whole line comes to the L2 cache, and is the first to go there.
__device__ inline void copy_async_16_once(uint32_t shared, const void* global, bool valid) {
    int const bytes = valid ? 16 : 0;
    asm volatile("cp.async.cg.shared.global.L2::cache_hint.L2::128B [%0], [%1], 16, %2, %3;" ::"r"(shared), "l"(global), "r"(bytes),
                 "l"(uint64_t{0x12f0000000000000})  // what createpolicy makes of evict_first, for all of it
                 : "memory");
}

__device__ inline void copy_async_4(uint32_t shared, const void* global, bool valid) {
    int const bytes = valid ? 4 : 0;
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared), "l"(global), "r"(bytes) : "memory");
}

__device__ inline void copy_async_4(uint32_t shared, const void* global) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared), "l"(global) : "memory");
}

__device__ inline void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits for all copies of this thread, those that no commit has made a group of included.
__device__ inline void copy_async_wait_all() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Waits until at most `pending` groups of copies are under way. Copies without a commit are in no group.
template <int pending>
__device__ inline void copy_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

}  // namespace mla
