#include "pool.h"

#include "device.cuh"

namespace mla {
namespace {

constexpr int threads = 256;

// Block (x, y): a slice of pair y. Reads the page `from` of `source` or, with `staged`, slot y of `source`; writes the page
// `to` of `target` or, without `staged`, slot y of it.
template <bool gather>
__global__ void move_pages(const int32_t* pairs, int64_t pages, int64_t page_vectors, const uint4* source,
                           uint4* target) {
    int64_t const pair = blockIdx.y;
    int64_t const from = pairs[2 * pair], to = pairs[2 * pair + 1];
    if (from < 0 || from >= pages || to < 0 || to >= pages) return;
    const uint4* read = source + (gather ? from : pair) * page_vectors;
    uint4* write = target + (gather ? pair : to) * page_vectors;
    for (int64_t i = blockIdx.x * static_cast<int64_t>(threads) + threadIdx.x; i < page_vectors;
         i += gridDim.x * static_cast<int64_t>(threads)) {
        write[i] = read[i];
    }
}

}  // namespace

int update_pool(Call& call, const MlaTensor& in, const MlaTensor& out, const MlaTensor& page_copies) {
    int64_t const pages = in.shape[0], page_vectors = in.shape[1] / 4;
    int64_t const copies = page_copies.rank < 0 ? 0 : page_copies.shape[0];
    size_t const mark = call.workspace.mark();
    auto* staged = call.workspace.take<uint4>(copies * page_vectors);
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
    const auto* pairs = static_cast<const int32_t*>(page_copies.data);
    for (int64_t first = 0; first < copies; first += 65535) {
        dim3 const grid(static_cast<unsigned>(min(ceil_div<int64_t>(page_vectors, threads), int64_t{8})),
                        static_cast<unsigned>(min(copies - first, int64_t{65535})));
        move_pages<true><<<grid, threads, 0, call.stream>>>(pairs + 2 * first, pages, page_vectors,
                                                            static_cast<const uint4*>(in.data),
                                                            staged + first * page_vectors);
    }
    for (int64_t first = 0; first < copies; first += 65535) {
        dim3 const grid(static_cast<unsigned>(min(ceil_div<int64_t>(page_vectors, threads), int64_t{8})),
                        static_cast<unsigned>(min(copies - first, int64_t{65535})));
        move_pages<false><<<grid, threads, 0, call.stream>>>(pairs + 2 * first, pages, page_vectors,
                                                             staged + first * page_vectors,
                                                             static_cast<uint4*>(out.data));
    }
    return check_launch("page copies");
}

}  // namespace mla
