// Kernels that do what the emulator must tell from what is right. Their launches are at the end.
#include "api.h"
#include "call.h"
#include "cluster.cuh"
#include "early.cuh"
#include "hopper.cuh"
#include "mma.cuh"
#include "tensor_map.h"

namespace mla {

int fail(int status, const char*, ...) { return status; }
int check_cuda(const char*, cudaError_t error) { return error == cudaSuccess ? MLA_OK : MLA_CUDA; }

namespace {

using namespace hopper;

// A row of 128 bytes comes by the copy engine; `waits`: until it is there.
__global__ void copied_row(const uint8_t* in, uint8_t* out, bool waits) {
    extern __shared__ __align__(1024) uint8_t memory[];
    __shared__ uint64_t barrier;
    uint32_t const full = shared_address(&barrier);
    if (threadIdx.x == 0) {
        barrier_init(full, 1);
        fence_barrier_init();
        barrier_expect(full, 128);
        copy_bytes(shared_address(memory), in, 128, full);
    }
    __syncthreads();
    if (waits) barrier_wait(full, 0);
    out[threadIdx.x] = memory[threadIdx.x];
    __syncthreads();
    barrier_wait(full, 0);
}

// Two rows come to one place one after the other; `frees`: the second is ordered when the first has been read.
__global__ void two_rows(const uint8_t* in, uint8_t* out, bool frees) {
    extern __shared__ __align__(1024) uint8_t memory[];
    __shared__ uint64_t barriers[2];
    uint32_t const full = shared_address(barriers);
    auto const order = [&](uint32_t row) {
        barrier_expect(full + 8 * row, 128);
        copy_bytes(shared_address(memory), in + 128 * row, 128, full + 8 * row);
    };
    if (threadIdx.x == 0) {
        barrier_init(full, 1);
        barrier_init(full + 8, 1);
        order(0);
    }
    __syncthreads();
    barrier_wait(full, 0);
    if (!frees && threadIdx.x == 0) order(1);
    __syncthreads();
    uint8_t const first = memory[threadIdx.x];
    __syncthreads();
    if (frees && threadIdx.x == 0) order(1);
    __syncthreads();
    barrier_wait(full + 8, 0);
    out[threadIdx.x] = first;
}

__global__ void endless(const uint8_t*, uint8_t*, bool) {
    if (threadIdx.x < 32) named_sync(1, 96);  // nobody else comes
}

__global__ void parted(const uint8_t*, uint8_t* out, bool) {
    if (threadIdx.x % 32 < 16) {
        out[0] = __shfl_sync(0xffffffffu, 1, 0);
    } else {
        __syncwarp();
    }
}

__global__ void leaves_early(const uint8_t* in, uint8_t*, bool) {
    extern __shared__ __align__(1024) uint8_t memory[];
    __shared__ uint64_t barrier;
    if (threadIdx.x != 0) return;
    barrier_init(shared_address(&barrier), 1);
    barrier_expect(shared_address(&barrier), 128);
    copy_bytes(shared_address(memory), in, 128, shared_address(&barrier));
}

__global__ void first_kernel(const uint8_t* in, uint8_t* out, bool) {
    let_next_kernel_begin();
    __syncthreads();
    out[threadIdx.x] = in[threadIdx.x];
}
__global__ void next_kernel(uint8_t* out, bool waits) {
    if (waits) wait_for_kernel_before();
    out[128 + threadIdx.x] = out[threadIdx.x];
    wait_for_kernel_before();
}
__global__ void never_waits(uint8_t*) {}

__global__ void in_a_cluster(const uint8_t*, uint8_t* out, bool) {
    __shared__ int32_t value;
    if (threadIdx.x == 0) value = 7 + cluster_rank();
    cluster_barrier();
    if (threadIdx.x == 0) out[cluster_rank()] = static_cast<uint8_t>(load_from_block(&value, (cluster_rank() + 1) % cluster_size()));
    cluster_barrier();
}

// D [64][n] of the products of four warps. A and B come as boxes of rows of 128 bytes.
enum Form { codes, codes_in_registers, values, values_in_registers, columns, keys_of_registers };
__global__ void product(const __grid_constant__ CUtensorMap a_map, const __grid_constant__ CUtensorMap b_map, const uint8_t* a_bytes, float* out, int form,
                        bool waits) {
    extern __shared__ __align__(1024) uint8_t memory[];
    __shared__ uint64_t barrier;
    uint32_t const a = shared_address(memory), b = a + 8192, full = shared_address(&barrier);
    if (threadIdx.x == 0) {
        barrier_init(full, 1);
        barrier_expect(full, 2 * 8192);
        copy_box(a, &a_map, full, 0, 0, 0, 0);
        copy_box(b, &b_map, full, 0, 0, 0, 0);
    }
    __syncthreads();
    barrier_wait(full, 0);
    int const warp = static_cast<int>(threadIdx.x) / 32, g = static_cast<int>(threadIdx.x) % 32 / 4, t = static_cast<int>(threadIdx.x) % 4;
    float d[32];
    uint32_t registers[4];
    for (float& value : d) value = 0.0f;
    for (int i = 0; i < 4; ++i) {  // the bytes of step 1 of A
        int const row = 16 * warp + g + i % 2 * 8, byte = 32 + i / 2 * 16 + 4 * t;
        registers[i] = *reinterpret_cast<const uint32_t*>(a_bytes + 128 * row + byte);
    }
    uint32_t const left = tile_descriptor(a), right = tile_descriptor(b);
    if (form == codes) product_e4m3<1, true>(d, left, right);
    if (form == codes_in_registers) {
        product_e4m3<0>(d, registers, right);
        product_commit();
        product_wait();
        product_e4m3<1>(d, registers, right);  // and on top of it
    }
    if (form == values) product_bf16<1, true>(d, left, right);
    if (form == keys_of_registers) product_bf16<1, true>(d, registers, right);
    if (form == columns || form == values_in_registers) {  // of 64 columns, twice
        float wide[64];
        for (float& value : wide) value = 0.0f;
        if (form == columns) product_bf16_wide<1, 0>(wide, left, right);
        if (form == values_in_registers) product_bf16_values<1, 0>(wide, registers, right);
        product_commit();
        if (waits) product_wait();
        for (int i = 0; i < 32; ++i) d[i] = wide[i];
        product_wait();
    }
    product_commit();
    if (waits) product_wait();
    for (int i = 0; i < 32; ++i) out[(16 * warp + g + i % 4 / 2 * 8) * 64 + i / 4 * 8 + 2 * t + i % 2] = d[i];
    product_wait();
}

using Kernel = void (*)(const uint8_t*, uint8_t*, bool);

}  // namespace

extern "C" {

MLA_EXPORT int run_case(const char* name, const uint8_t* in, uint8_t* out, bool right) {
    auto const is = [&](const char* known) { return std::strcmp(name, known) == 0; };
    auto const launch = [&](Kernel kernel, size_t bytes = 1024) { kernel<<<1, 128, bytes>>>(in, out, right); };
    if (is("copied_row")) launch(copied_row);
    if (is("two_rows")) launch(two_rows);
    if (is("endless")) launch(endless);
    if (is("parted")) launch(parted);
    if (is("leaves_early")) launch(leaves_early);
    if (is("too_large")) launch(endless, 300 << 10);
    if (is("early")) {
        launch(first_kernel);
        return launch_early(name, next_kernel, 1, 128, 0, Device{9, 1, 0}, nullptr, out, right);
    }
    if (is("never_waits")) {
        launch(first_kernel);
        return launch_early(name, never_waits, 1, 128, 0, Device{9, 1, 0}, nullptr, out);
    }
    if (is("cluster")) {
        cudaLaunchAttribute cluster;
        cluster.id = cudaLaunchAttributeClusterDimension;
        cluster.val.clusterDim = {4, 1, 1};
        cudaLaunchConfig_t config{};
        config.gridDim = dim3(4);
        config.blockDim = dim3(128);
        config.attrs = &cluster;
        config.numAttrs = 1;
        return check_cuda(name, cudaLaunchKernelEx(&config, in_a_cluster, in, out, right));
    }
    return MLA_OK;
}

// A [64][128] and B [64][128] bytes; D [64][64].
MLA_EXPORT int run_product(int form, const uint8_t* a, const uint8_t* b, float* d, bool right) {
    CUtensorMap a_map, b_map;
    for (auto const& [map, data] : {std::pair{&a_map, a}, std::pair{&b_map, b}}) {
        if (int status = make_tensor_map(map, data, {128, 64, 1, 1}, {128, 8192, 8192}, {128, 64, 1, 1})) return status;
    }
    product<<<1, 128, 4 * 8192>>>(a_map, b_map, a, d, form, right);
    return MLA_OK;
}
}

}  // namespace mla
