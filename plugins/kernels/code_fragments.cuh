// Codes that lie in shared memory with K as rows, as A of e4m3 products (attend_hopper_fp8.cu, linear_hopper_codes.cu).
#pragma once

#include <cstdint>

namespace mla {
namespace hopper {

// 16 outputs of 128 values of K, a[k] from `ldmatrix_x4_transposed` of 32 rows of 16 bytes each, become fragments of four products. Lane
// 4 g + t has outputs 2 g (rows g of the product) and 2 g + 1 (rows g + 8), and of each 16 values of K 2 t, 2 t + 1, 8 + 2 t, 9 + 2 t where
// the product has 4 t to 4 t + 3: B is written in that order.
__device__ inline void make_code_fragments(uint32_t (&a)[4][4]) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
        uint32_t const r[4] = {a[k][0], a[k][1], a[k][2], a[k][3]};
        a[k][0] = __byte_perm(r[0], r[1], 0x6420);
        a[k][1] = __byte_perm(r[0], r[1], 0x7531);
        a[k][2] = __byte_perm(r[2], r[3], 0x6420);
        a[k][3] = __byte_perm(r[2], r[3], 0x7531);
    }
}

}  // namespace hopper
}  // namespace mla
