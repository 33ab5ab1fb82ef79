// Products with weights of any type and size, a thread for each output, in f32: there so that they run everywhere, not to be fast.
#include "linear.h"

#include <algorithm>

#include "device.cuh"

namespace mla {
namespace {

constexpr int threads = 256;
constexpr int64_t most_blocks = 1 << 16;

__global__ void __launch_bounds__(threads)
    linear_kernel(const void* x, int32_t x_type, int64_t tokens, int64_t columns, LinearPart part) {
    int64_t const total = tokens * part.outputs;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * threads + threadIdx.x; i < total; i += static_cast<int64_t>(gridDim.x) * threads) {
        int64_t const token = i / part.outputs, output = i % part.outputs;
        float sum = 0.0f;
        for (int64_t column = 0; column < columns; ++column) {
            int64_t const place = part.weight_type == MLA_FLOAT8E4M3FN ? code_place(column, output, columns, part.outputs) : column * part.outputs + output;
            float weight = load_float(part.weight, part.weight_type, place);
            if (part.scales != nullptr) weight *= part.scales[column / 128 * ceil_div<int64_t>(part.outputs, 128) + output / 128];
            sum += load_float(x, x_type, token * columns + column) * weight;
        }
        if (part.factors != nullptr) sum *= load_float(part.factors, part.factors_type, output);
        store_float(part.out, part.out_type, i, sum);
    }
}

}  // namespace

int linear_plain(const Linear& work, cudaStream_t stream) {
    for (int i = 0; i < work.count; ++i) {
        LinearPart const& part = work.parts[i];
        int64_t const total = work.tokens * part.outputs;
        if (total == 0) continue;
        int64_t const blocks = std::min(ceil_div<int64_t>(total, threads), most_blocks);
        linear_kernel<<<static_cast<unsigned>(blocks), threads, 0, stream>>>(work.x, work.x_type, work.tokens, work.columns, part);
        if (int status = check_launch("product with weights")) return status;
    }
    return MLA_OK;
}

}  // namespace mla
