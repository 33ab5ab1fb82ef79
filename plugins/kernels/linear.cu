// MlaLinear. SM90 has a kernel of its own (linear_hopper.cu); this one takes every type and shape, in f32 on plain cores, so that an
// engine's ops run wherever it does.
#include "linear.h"

#include "device.cuh"

namespace mla {
namespace {

constexpr int tile = 64, chunk = 16, threads = 256;

__global__ void __launch_bounds__(threads) linear_kernel(Linear work) {
    __shared__ float x_tile[chunk][tile + 1], w_tile[chunk][tile];
    int const tx = threadIdx.x % 16, ty = threadIdx.x / 16;
    int64_t const first_output = static_cast<int64_t>(blockIdx.x) * tile;
    for (int64_t first = static_cast<int64_t>(blockIdx.y) * tile; first < work.tokens; first += static_cast<int64_t>(gridDim.y) * tile) {
        float sums[4][4] = {};
        for (int64_t column = 0; column < work.columns; column += chunk) {
            for (int i = threadIdx.x; i < tile * chunk; i += threads) {
                int64_t const token = first + i / chunk, of_x = column + i % chunk;
                bool const x_there = token < work.tokens && of_x < work.columns;
                x_tile[i % chunk][i / chunk] = x_there ? load_float(work.x, work.x_type, token * work.columns + of_x) : 0.0f;
                int64_t const output = first_output + i % tile, of_w = column + i / tile;
                bool const w_there = output < work.outputs && of_w < work.columns;
                w_tile[i / tile][i % tile] = w_there ? load_float(work.weight, work.weight_type, of_w * work.outputs + output) : 0.0f;
            }
            __syncthreads();
#pragma unroll
            for (int k = 0; k < chunk; ++k) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
#pragma unroll
                    for (int j = 0; j < 4; ++j) sums[i][j] += x_tile[k][ty + 16 * i] * w_tile[k][tx + 16 * j];
                }
            }
            __syncthreads();
        }
        for (int i = 0; i < 4; ++i) {
            for (int j = 0; j < 4; ++j) {
                int64_t const token = first + ty + 16 * i, output = first_output + tx + 16 * j;
                if (token < work.tokens && output < work.outputs) {
                    store_float(work.out, work.out_type, token * work.outputs + output, sums[i][j]);
                }
            }
        }
    }
}

constexpr int64_t grid_y = 65535, grid_x = 0x7fffffff;

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
    int64_t const columns = ceil_div<int64_t>(work.outputs, tile), rows = ceil_div<int64_t>(work.tokens, tile);
    if (columns > grid_x) return fail(MLA_UNSUPPORTED, "MlaLinear: %lld outputs are too many", static_cast<long long>(work.outputs));
    dim3 const grid(static_cast<unsigned>(columns), static_cast<unsigned>(rows < grid_y ? rows : grid_y));
    linear_kernel<<<grid, threads, 0, call.stream>>>(work);
    return check_launch("product of MlaLinear");
}

}  // namespace mla
