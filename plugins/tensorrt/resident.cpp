#include "resident.h"

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

namespace mla::tensorrt {
namespace {

void check(cudaError_t status, const std::string& what) {
    if (status == cudaSuccess) return;
    cudaGetLastError();  // later calls must not find it
    throw std::runtime_error(what + ": " + cudaGetErrorString(status));
}

// A capture in the global mode, on whatever thread, makes allocations an error and breaks. These have no part in it.
class BesideCaptures {
public:
    BesideCaptures() { cudaThreadExchangeStreamCaptureMode(&mode_); }
    ~BesideCaptures() { cudaThreadExchangeStreamCaptureMode(&mode_); }
    BesideCaptures(const BesideCaptures&) = delete;
    BesideCaptures& operator=(const BesideCaptures&) = delete;

private:
    cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

// The default stream cannot be used while another is captured.
class Stream {
public:
    Stream() { check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "no stream for the page pools"); }
    ~Stream() { cudaStreamDestroy(stream); }
    Stream(const Stream&) = delete;
    Stream& operator=(const Stream&) = delete;

    cudaStream_t stream = nullptr;
};

}  // namespace

MlaTensor resident_tensor(const Instance& instance, size_t pool, void* data) {
    int64_t words = 0;
    if (instance.resident.at(pool)->page_words(&instance.attributes, &words) != MLA_OK) {
        throw std::runtime_error(mla_last_error());
    }
    return {data, MLA_INT32, 2, {instance.resident_pages, words}};
}

ResidentPools::ResidentPools(const Instance& instance) {
    for (size_t pool = 0; pool < instance.resident.size(); ++pool) {
        MlaTensor const tensor = resident_tensor(instance, pool, nullptr);
        bytes_.push_back(static_cast<size_t>(tensor.shape[0] * tensor.shape[1]) * sizeof(int32_t));
    }
}

ResidentPools::~ResidentPools() { free_all(); }

const std::vector<void*>& ResidentPools::memory() {
    std::lock_guard<std::mutex> const lock(mutex_);
    if (!memory_.empty()) return memory_;
    BesideCaptures const beside;
    try {
        Stream const zeros;
        for (size_t const bytes : bytes_) {
            void* data = nullptr;
            check(cudaMalloc(&data, bytes), "no memory for a page pool of " + std::to_string(bytes) + " bytes");
            memory_.push_back(data);
            check(cudaMemsetAsync(data, 0, bytes, zeros.stream), "a page pool cannot be filled with zeros");
        }
        check(cudaStreamSynchronize(zeros.stream), "a page pool cannot be filled with zeros");
    } catch (...) {
        free_all();
        throw;
    }
    return memory_;
}

void ResidentPools::free_all() noexcept {
    if (memory_.empty()) return;
    BesideCaptures const beside;
    for (void* const data : memory_) cudaFree(data);
    memory_.clear();
}

}  // namespace mla::tensorrt
