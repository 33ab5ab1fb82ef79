// What SM90 has beyond mma.cuh: bulk tensor copies that complete on a barrier in shared memory, and matrix products of a
// warpgroup (four warps) with operands in shared memory. Only for code that is compiled for sm_90a.
//
// Tiles that a product reads have rows of 128 bytes whose 16-byte units are permuted by the row (CU_TENSOR_MAP_SWIZZLE_128B);
// eight rows are one kilobyte.
#pragma once

#include <cstdint>

namespace mla {
namespace hopper {

__device__ inline void barrier_init(uint32_t barrier, uint32_t arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Makes initialised barriers visible to the copy engine.
__device__ inline void fence_barrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

__device__ inline void barrier_expect(uint32_t barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ inline void barrier_arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Without a branch, which products under way may not meet.
__device__ inline void barrier_arrive_if(uint32_t barrier, bool arrives) {
    asm volatile("{\n.reg .pred arrives;\nsetp.ne.u32 arrives, %1, 0;\n@arrives mbarrier.arrive.shared::cta.b64 _, [%0];\n}" ::"r"(barrier),
                 "r"(static_cast<uint32_t>(arrives))
                 : "memory");
}

// An arrival, once all copies of copy_async_16 that this thread has begun are there.
__device__ inline void barrier_arrive_after_copies(uint32_t barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

__device__ inline void barrier_wait(uint32_t barrier, uint32_t parity) {
    asm volatile(
        "{\n.reg .pred done;\nWAIT:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@done bra DONE;\nbra WAIT;\nDONE:\n}" ::"r"(barrier),
        "r"(parity)
        : "memory");
}

// Whether a wait would end at once.
__device__ inline bool barrier_test(uint32_t barrier, uint32_t parity) {
    uint32_t done;
    asm volatile(
        "{\n.reg .pred done;\nmbarrier.test_wait.parity.shared::cta.b64 done, [%1], %2;\nselp.u32 %0, 1, 0, done;\n}"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
    return done != 0;
}

// True for one lane of the warp, all of whose lanes are here.
__device__ inline bool elect_lane() {
    uint32_t elected;
    asm volatile("{\n.reg .pred one;\nelect.sync _|one, 0xffffffff;\nselp.u32 %0, 1, 0, one;\n}" : "=r"(elected));
    return elected != 0;
}

// A box of a 4-d tensor to shared memory; what lies outside of the tensor becomes zero.
__device__ inline void copy_box(uint32_t target, const void* map, uint32_t barrier, int c0, int c1, int c2, int c3) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(
            target),
        "l"(map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
        : "memory");
}

// The same to the L2 cache.
__device__ inline void prefetch_box(const void* map, int c0, int c1, int c2, int c3) {
    asm volatile("cp.async.bulk.prefetch.tensor.4d.L2.global [%0, {%1, %2, %3, %4}];" ::"l"(map), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
                 : "memory");
}

// The map is fetched before it is needed.
__device__ inline void prefetch_map(const void* map) { asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory"); }

// A multiple of 16 bytes, from and to multiples of 16.
__device__ inline void copy_bytes(uint32_t target, const void* source, uint32_t bytes, uint32_t barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(target), "l"(source),
                 "r"(bytes), "r"(barrier)
                 : "memory");
}

// The other way, by the thread's own count of copies.
__device__ inline void store_bytes(void* target, uint32_t source, uint32_t bytes) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(target), "r"(source), "r"(bytes) : "memory");
}
// A box of a 4-d tensor, where it is in the tensor.
__device__ inline void store_box(const void* map, uint32_t source, int c0, int c1, int c2, int c3) {
    asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(map), "r"(source),
                 "r"(c0), "r"(c1), "r"(c2), "r"(c3)
                 : "memory");
}
// What this thread has stored since the last commit is one group; until the places are free from which all but the last `pending`
// groups are stored.
__device__ inline void store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
template <int pending>
__device__ inline void store_wait_read() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(pending) : "memory");
}
// Until all that this thread has stored so is there.
__device__ inline void store_wait() {
    asm volatile("cp.async.bulk.commit_group;\ncp.async.bulk.wait_group 0;" ::: "memory");
}

// Before the tensor cores or the copy engine read shared memory that this thread wrote.
__device__ inline void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Before the copy engine reads global memory that threads wrote.
__device__ inline void fence_copies() { asm volatile("fence.proxy.async;" ::: "memory"); }

template <int count>
__device__ inline void registers_decrease() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(count));
}
template <int count>
__device__ inline void registers_increase() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(count));
}

// Four 8 x 8 matrices of 16-bit values to shared memory: mma.cuh's ldmatrix_x4 the other way round.
__device__ inline void store_matrices(uint32_t shared_address, const uint32_t* four) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address), "r"(four[0]), "r"(four[1]),
                 "r"(four[2]), "r"(four[3])
                 : "memory");
}

// Each of the four transposed.
__device__ inline void store_matrices_transposed(uint32_t shared_address, const uint32_t* four) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address), "r"(four[0]), "r"(four[1]),
                 "r"(four[2]), "r"(four[3])
                 : "memory");
}

__device__ inline void product_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void product_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until at most `pending` committed groups of products are under way.
template <int pending = 0>
__device__ inline void product_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}

// Keeps the compiler from moving accesses of an accumulator across products in flight.
template <int n>
__device__ inline void pin(float (&d)[n]) {
#pragma unroll
    for (int i = 0; i < n; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// The same for fragments, which must lie in registers before the products' fence.
template <int n>
__device__ inline void pin(uint32_t (&a)[n][4]) {
#pragma unroll
    for (int i = 0; i < 4 * n; ++i) asm volatile("" : "+r"(a[i / 4][i % 4])::"memory");
}

// Lower half of the descriptor of a K-major tile in shared memory; 32 bytes further along K are 2 more, 16 bytes 1. The upper half
// is that of rows of 128 bytes, permuted, eight of them one kilobyte: 0x40000040; of rows of 64 bytes, half of it: 0x80000020.
__device__ inline uint32_t tile_descriptor(uint32_t address) { return (address & 0x3ffff) >> 4 | 1u << 16; }

// clang-format off
#define MLA_D8(d) "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7])
#define MLA_D16(d) MLA_D8(d), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15])
#define MLA_D24(d) MLA_D16(d), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23])
#define MLA_D32(d) MLA_D24(d), \
    "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
#define MLA_D96(d) MLA_D64(d), \
    "+f"(d[64]), "+f"(d[65]), "+f"(d[66]), "+f"(d[67]), "+f"(d[68]), "+f"(d[69]), "+f"(d[70]), "+f"(d[71]), \
    "+f"(d[72]), "+f"(d[73]), "+f"(d[74]), "+f"(d[75]), "+f"(d[76]), "+f"(d[77]), "+f"(d[78]), "+f"(d[79]), \
    "+f"(d[80]), "+f"(d[81]), "+f"(d[82]), "+f"(d[83]), "+f"(d[84]), "+f"(d[85]), "+f"(d[86]), "+f"(d[87]), \
    "+f"(d[88]), "+f"(d[89]), "+f"(d[90]), "+f"(d[91]), "+f"(d[92]), "+f"(d[93]), "+f"(d[94]), "+f"(d[95])
#define MLA_R8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define MLA_R16 MLA_R8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define MLA_R24 MLA_R16 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define MLA_R32 MLA_R24 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define MLA_R64 MLA_R32 \
    ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47" \
    ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define MLA_R96 MLA_R64 \
    ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79" \
    ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define MLA_R128 MLA_R96 \
    ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111" \
    ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define MLA_D64(d) MLA_D32(d), \
    "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), \
    "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), \
    "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), \
    "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
#define MLA_D128(d) MLA_D96(d), \
    "+f"(d[96]), "+f"(d[97]), "+f"(d[98]), "+f"(d[99]), "+f"(d[100]), "+f"(d[101]), "+f"(d[102]), "+f"(d[103]), \
    "+f"(d[104]), "+f"(d[105]), "+f"(d[106]), "+f"(d[107]), "+f"(d[108]), "+f"(d[109]), "+f"(d[110]), "+f"(d[111]), \
    "+f"(d[112]), "+f"(d[113]), "+f"(d[114]), "+f"(d[115]), "+f"(d[116]), "+f"(d[117]), "+f"(d[118]), "+f"(d[119]), \
    "+f"(d[120]), "+f"(d[121]), "+f"(d[122]), "+f"(d[123]), "+f"(d[124]), "+f"(d[125]), "+f"(d[126]), "+f"(d[127])

// clang-format on

// D [64][64] (+)= A [64][32] B [64][32]^T, all e4m3, at step `step` of K; `clear`: D is overwritten. Lane 4 g + t of warp w has rows
// 16 w + g (d[4 j], d[4 j + 1]) and 16 w + g + 8 (d[4 j + 2], d[4 j + 3]), columns 8 j + 2 t and the next.
template <int step, bool clear>
__device__ inline void product_e4m3(float (&d)[32], uint32_t a, uint32_t b) {
    asm volatile("{\n.reg .b64 x, y;\n.reg .b32 low;\n"
                 "add.u32 low, %32, %34;\nmov.b64 x, {low, 0x40000040};\nadd.u32 low, %33, %34;\nmov.b64 y, {low, 0x40000040};\n"
                 "wgmma.mma_async.sync.aligned.m64n64k32.f32.e4m3.e4m3 {" MLA_R32 "}, x, y, %35, 1, 1;\n}"
                 : MLA_D32(d)
                 : "r"(a), "r"(b), "n"(2 * step), "n"(clear ? 0 : 1));
}

// The same with 128 rows of B, of `b_row` bytes.
template <int step, bool clear, int b_row = 128>
__device__ inline void product_e4m3(float (&d)[64], uint32_t a, uint32_t b) {
    static_assert(b_row == 128 || b_row == 64);
    asm volatile("{\n.reg .b64 x, y;\n.reg .b32 low;\n"
                 "add.u32 low, %64, %66;\nmov.b64 x, {low, 0x40000040};\nadd.u32 low, %65, %66;\nmov.b64 y, {low, %68};\n"
                 "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 {" MLA_R64 "}, x, y, %67, 1, 1;\n}"
                 : MLA_D64(d)
                 : "r"(a), "r"(b), "n"(2 * step), "n"(clear ? 0 : 1), "n"(b_row == 128 ? 0x40000040 : static_cast<int>(0x80000020)));
}

// The same of bf16 values, A [64][16], B [64][16].
template <int step, bool clear = false>
__device__ inline void product_bf16(float (&d)[32], uint32_t a, uint32_t b) {
    asm volatile("{\n.reg .b64 x, y;\n.reg .b32 low;\n"
                 "add.u32 low, %32, %34;\nmov.b64 x, {low, 0x40000040};\nadd.u32 low, %33, %34;\nmov.b64 y, {low, 0x40000040};\n"
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" MLA_R32 "}, x, y, %35, 1, 1, 0, 0;\n}"
                 : MLA_D32(d)
                 : "r"(a), "r"(b), "n"(2 * step), "n"(clear ? 0 : 1));
}

// The same with A in registers.
template <int step, bool clear = false>
__device__ inline void product_bf16(float (&d)[32], const uint32_t (&a)[4], uint32_t b) {
    asm volatile("{\n.reg .b64 y;\n.reg .b32 low;\nadd.u32 low, %36, %37;\nmov.b64 y, {low, 0x40000040};\n"
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" MLA_R32 "}, {%32, %33, %34, %35}, y, %38, 1, 1, 0;\n}"
                 : MLA_D32(d)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b), "n"(2 * step), "n"(clear ? 0 : 1));
}

// The same with 16 rows of B, and with 128.
template <int step, bool clear = false>
__device__ inline void product_bf16(float (&d)[8], const uint32_t (&a)[4], uint32_t b) {
    asm volatile("{\n.reg .b64 y;\n.reg .b32 low;\nadd.u32 low, %12, %13;\nmov.b64 y, {low, 0x40000040};\n"
                 "wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {" MLA_R8 "}, {%8, %9, %10, %11}, y, %14, 1, 1, 0;\n}"
                 : MLA_D8(d)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b), "n"(2 * step), "n"(clear ? 0 : 1));
}
template <int step, bool clear = false>
__device__ inline void product_bf16(float (&d)[64], const uint32_t (&a)[4], uint32_t b) {
    asm volatile("{\n.reg .b64 y;\n.reg .b32 low;\nadd.u32 low, %68, %69;\nmov.b64 y, {low, 0x40000040};\n"
                 "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" MLA_R64 "}, {%64, %65, %66, %67}, y, %70, 1, 1, 0;\n}"
                 : MLA_D64(d)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b), "n"(2 * step), "n"(clear ? 0 : 1));
}

// D [64][128] (+)= A [64][16] B [128][16]^T, bf16, at step `step` of K; `clear`: D is overwritten.
template <int step, bool clear>
__device__ inline void product_bf16(float (&d)[64], uint32_t a, uint32_t b) {
    asm volatile("{\n.reg .b64 x, y;\n.reg .b32 low;\n"
                 "add.u32 low, %64, %66;\nmov.b64 x, {low, 0x40000040};\nadd.u32 low, %65, %66;\nmov.b64 y, {low, 0x40000040};\n"
                 "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" MLA_R64 "}, x, y, %67, 1, 1, 0, 0;\n}"
                 : MLA_D64(d)
                 : "r"(a), "r"(b), "n"(2 * step), "n"(clear ? 0 : 1));
}

// The same with 256 rows of B.
template <int step, bool clear>
__device__ inline void product_bf16(float (&d)[128], uint32_t a, uint32_t b) {
    asm volatile("{\n.reg .b64 x, y;\n.reg .b32 low;\n"
                 "add.u32 low, %128, %130;\nmov.b64 x, {low, 0x40000040};\nadd.u32 low, %129, %130;\nmov.b64 y, {low, 0x40000040};\n"
                 "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {" MLA_R128 "}, x, y, %131, 1, 1, 0, 0;\n}"
                 : MLA_D128(d)
                 : "r"(a), "r"(b), "n"(2 * step), "n"(clear ? 0 : 1));
}

// D [64][128] += A [64][16] B [16][128], bf16, A in registers: step `step` of K. B's rows are those of two tiles of 64 columns,
// `tile_stride` bytes from one to the next.
template <int step, int tile_stride>
__device__ inline void product_bf16_values(float (&d)[64], const uint32_t (&a)[4], uint32_t b) {
    asm volatile("{\n.reg .b64 y;\n.reg .b32 low;\nadd.u32 low, %68, %69;\nmov.b64 y, {low, 0x40000040};\n"
                 "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" MLA_R64 "}, {%64, %65, %66, %67}, y, 1, 1, 1, 1;\n}"
                 : MLA_D64(d)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b), "n"(128 * step + (((tile_stride >> 4) - 1) << 16)));
}

// D [64][N] += A [64][16] B [16][N], bf16: step `step` of K in both. B's rows are those of N / 64 tiles of 64 columns, `tile_stride`
// bytes from one to the next; `clear`: D is overwritten.
template <int step, int tile_stride>
__device__ inline void product_bf16_wide(float (&d)[128], uint32_t a, uint32_t b) {
    asm volatile("{\n.reg .b64 x, y;\n.reg .b32 low;\n"
                 "add.u32 low, %128, %130;\nmov.b64 x, {low, 0x40000040};\nadd.u32 low, %129, %131;\nmov.b64 y, {low, 0x40000040};\n"
                 "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {" MLA_R128 "}, x, y, 1, 1, 1, 0, 1;\n}"
                 : MLA_D128(d)
                 : "r"(a), "r"(b), "n"(2 * step), "n"(128 * step + (((tile_stride >> 4) - 1) << 16)));
}
template <int step, int tile_stride>
__device__ inline void product_bf16_wide(float (&d)[96], uint32_t a, uint32_t b) {
    asm volatile("{\n.reg .b64 x, y;\n.reg .b32 low;\n"
                 "add.u32 low, %96, %98;\nmov.b64 x, {low, 0x40000040};\nadd.u32 low, %97, %99;\nmov.b64 y, {low, 0x40000040};\n"
                 "wgmma.mma_async.sync.aligned.m64n192k16.f32.bf16.bf16 {" MLA_R96 "}, x, y, 1, 1, 1, 0, 1;\n}"
                 : MLA_D96(d)
                 : "r"(a), "r"(b), "n"(2 * step), "n"(128 * step + (((tile_stride >> 4) - 1) << 16)));
}
template <int step, int tile_stride>
__device__ inline void product_bf16_wide(float (&d)[32], uint32_t a, uint32_t b) {
    asm volatile("{\n.reg .b64 x, y;\n.reg .b32 low;\n"
                 "add.u32 low, %32, %34;\nmov.b64 x, {low, 0x40000040};\nadd.u32 low, %33, %35;\nmov.b64 y, {low, 0x40000040};\n"
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" MLA_R32 "}, x, y, 1, 1, 1, 0, 1;\n}"
                 : MLA_D32(d)
                 : "r"(a), "r"(b), "n"(2 * step), "n"(128 * step + (((tile_stride >> 4) - 1) << 16)));
}
template <int step, int tile_stride, bool clear = false>
__device__ inline void product_bf16_wide(float (&d)[64], uint32_t a, uint32_t b) {
    asm volatile("{\n.reg .b64 x, y;\n.reg .b32 low;\n"
                 "add.u32 low, %64, %66;\nmov.b64 x, {low, 0x40000040};\nadd.u32 low, %65, %67;\nmov.b64 y, {low, 0x40000040};\n"
                 "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" MLA_R64 "}, x, y, %68, 1, 1, 0, 1;\n}"
                 : MLA_D64(d)
                 : "r"(a), "r"(b), "n"(2 * step), "n"(128 * step + (((tile_stride >> 4) - 1) << 16)), "n"(clear ? 0 : 1));
}

// D [64][N] (+)= A [64][32] B [N][32]^T, all e4m3, A in registers. Step 0 overwrites D.
template <int step>
__device__ inline void product_e4m3(float (&d)[32], const uint32_t (&a)[4], uint32_t b) {
    asm volatile("{\n.reg .b64 tile;\n.reg .b32 low;\nadd.u32 low, %36, %37;\nmov.b64 tile, {low, 0x40000040};\n"
                 "wgmma.mma_async.sync.aligned.m64n64k32.f32.e4m3.e4m3 {" MLA_R32 "}, {%32, %33, %34, %35}, tile, %38, 1, 1;\n}"
                 : MLA_D32(d)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b), "n"(2 * step), "n"(step > 0));
}
template <int step>
__device__ inline void product_e4m3(float (&d)[24], const uint32_t (&a)[4], uint32_t b) {
    asm volatile("{\n.reg .b64 tile;\n.reg .b32 low;\nadd.u32 low, %28, %29;\nmov.b64 tile, {low, 0x40000040};\n"
                 "wgmma.mma_async.sync.aligned.m64n48k32.f32.e4m3.e4m3 {" MLA_R24 "}, {%24, %25, %26, %27}, tile, %30, 1, 1;\n}"
                 : MLA_D24(d)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b), "n"(2 * step), "n"(step > 0));
}
template <int step>
__device__ inline void product_e4m3(float (&d)[16], const uint32_t (&a)[4], uint32_t b) {
    asm volatile("{\n.reg .b64 tile;\n.reg .b32 low;\nadd.u32 low, %20, %21;\nmov.b64 tile, {low, 0x40000040};\n"
                 "wgmma.mma_async.sync.aligned.m64n32k32.f32.e4m3.e4m3 {" MLA_R16 "}, {%16, %17, %18, %19}, tile, %22, 1, 1;\n}"
                 : MLA_D16(d)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b), "n"(2 * step), "n"(step > 0));
}
template <int step>
__device__ inline void product_e4m3(float (&d)[8], const uint32_t (&a)[4], uint32_t b) {
    asm volatile("{\n.reg .b64 tile;\n.reg .b32 low;\nadd.u32 low, %12, %13;\nmov.b64 tile, {low, 0x40000040};\n"
                 "wgmma.mma_async.sync.aligned.m64n16k32.f32.e4m3.e4m3 {" MLA_R8 "}, {%8, %9, %10, %11}, tile, %14, 1, 1;\n}"
                 : MLA_D8(d)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b), "n"(2 * step), "n"(step > 0));
}

#undef MLA_D8
#undef MLA_D16
#undef MLA_D24
#undef MLA_D32
#undef MLA_D64
#undef MLA_D96
#undef MLA_D128
#undef MLA_R8
#undef MLA_R16
#undef MLA_R24
#undef MLA_R32
#undef MLA_R64
#undef MLA_R96
#undef MLA_R128

}  // namespace hopper
}  // namespace mla
