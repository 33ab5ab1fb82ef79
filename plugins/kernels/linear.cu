// MlaLinear. SM90 has a kernel of its own (linear_hopper.cu); this one takes every type and shape, a thread for each output, in f32: it
// is there so that the op runs everywhere, not to be fast, and `mla-trt build` has no use for it.
#include "linear.h"

#include <algorithm>

#include "device.cuh"

namespace mla {
namespace {

constexpr int threads = 256;
constexpr int64_t most_blocks = 1 << 16;

__global__ void __launch_bounds__(threads) linear_kernel(Linear work) {
    int64_t const total = work.tokens * work.outputs;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * threads + threadIdx.x; i < total; i += static_cast<int64_t>(gridDim.x) * threads) {
        int64_t const token = i / work.outputs, output = i % work.outputs;
        float sum = 0.0f;
        for (int64_t column = 0; column < work.columns; ++column) {
            sum += load_float(work.x, work.x_type, token * work.columns + column) *
                   load_float(work.weight, work.weight_type, column * work.outputs + output);
        }
        store_float(work.out, work.out_type, i, sum);
    }
}

}  // namespace

int run_linear(Call& call) {
    namespace in = linear::in;
    if (call.workspace.sizing()) return MLA_OK;
    const MlaTensor &x = call.in[in::x], &weight = call.in[in::weight], &out = call.out[linear::out::output];
    Linear const work{x.data, weight.data, out.data, x.type, weight.type, out.type, call.dims.T, call.dims.C,
                      call.dims.H * call.dims.M};
    if (work.tokens == 0 || work.outputs == 0) return MLA_OK;
    Device device;
    if (int status = current_device(&device)) return status;
    if (linear_takes_hopper(work, device)) return linear_hopper(work, device, call.stream);
    int64_t const blocks = std::min(ceil_div<int64_t>(work.tokens * work.outputs, threads), most_blocks);
    linear_kernel<<<static_cast<unsigned>(blocks), threads, 0, call.stream>>>(work);
    return check_launch("product of MlaLinear");
}

}  // namespace mla
