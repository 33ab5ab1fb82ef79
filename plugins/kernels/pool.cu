#include "pool.h"

#include "device.cuh"

namespace mla {
namespace {

constexpr int threads = 256;

constexpr int few = 8;  // pairs that a thread has in registers

// A thread moves the same 16 bytes of all pages: first it reads them for all pairs, then it writes them, so that a page which one
// pair overwrites and another reads is read before. More than a few pairs wait in `staged`, [pairs, page_vectors].
__global__ void move_pages(const int32_t* pairs, int32_t count, int64_t pages, int64_t page_vectors, const uint4* source,
                           uint4* target, uint4* staged) {
    int64_t const place = blockIdx.x * static_cast<int64_t>(threads) + threadIdx.x;
    if (place >= page_vectors) return;
    uint4 held[few];
    for (int32_t first = 0; first < count; first += few) {
#pragma unroll
        for (int i = 0; i < few; ++i) {
            if (first + i >= count) break;
            int64_t const from = pairs[2 * (first + i)];
            if (from >= 0 && from < pages) held[i] = source[from * page_vectors + place];
        }
        if (count <= few) break;
#pragma unroll
        for (int i = 0; i < few; ++i) {
            if (first + i < count) staged[(first + i) * page_vectors + place] = held[i];
        }
    }
    for (int32_t first = 0; first < count; first += few) {
#pragma unroll
        for (int i = 0; i < few; ++i) {
            if (first + i >= count) break;
            int64_t const from = pairs[2 * (first + i)], to = pairs[2 * (first + i) + 1];
            if (from < 0 || from >= pages || to < 0 || to >= pages) continue;
            target[to * page_vectors + place] = count <= few ? held[i] : staged[(first + i) * page_vectors + place];
        }
    }
}

}  // namespace

int update_pool(Call& call, const MlaTensor& in, const MlaTensor& out, const MlaTensor& page_copies) {
    int64_t const pages = in.shape[0], page_vectors = in.shape[1] / 4;
    int64_t const copies = page_copies.rank < 0 ? 0 : page_copies.shape[0];
    size_t const mark = call.workspace.mark();
    auto* staged = call.workspace.take<uint4>(copies > few ? copies * page_vectors : 0);
    call.workspace.release(mark);
    if (call.workspace.sizing()) return MLA_OK;
    if (in.data != out.data && pages > 0) {
        if (int status = check_cuda("copy of the page pool",
                                    cudaMemcpyAsync(out.data, in.data, static_cast<size_t>(pages * page_vectors) * 16,
                                                    cudaMemcpyDeviceToDevice, call.stream))) {
            return status;
        }
    }
    if (copies == 0 || pages == 0) return MLA_OK;
    auto const blocks = static_cast<unsigned>(ceil_div<int64_t>(page_vectors, threads));
    move_pages<<<blocks, threads, 0, call.stream>>>(static_cast<const int32_t*>(page_copies.data), static_cast<int32_t>(copies),
                                                    pages, page_vectors, static_cast<const uint4*>(in.data),
                                                    static_cast<uint4*>(out.data), staged);
    return check_launch("page copies");
}

}  // namespace mla
