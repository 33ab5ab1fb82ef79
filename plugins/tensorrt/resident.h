// Page pools that the plugins of a node hold in device memory, instead of taking them as inputs.
#pragma once

#include <mutex>
#include <vector>

#include "instance.h"

namespace mla::tensorrt {

// The pool's shape, over `data`. Throws std::runtime_error where the attributes describe no page.
MlaTensor resident_tensor(const Instance& instance, size_t pool, void* data);

// The pools of one node of one engine: what TensorRT clones for its contexts shares them.
class ResidentPools {
public:
    explicit ResidentPools(const Instance& instance);
    ~ResidentPools();
    ResidentPools(const ResidentPools&) = delete;
    ResidentPools& operator=(const ResidentPools&) = delete;

    // Memory of each of the instance's resident pools; the first call allocates it on the current device and fills it with
    // zeros. Legal while streams are captured. Throws std::runtime_error.
    const std::vector<void*>& memory();

private:
    void free_all() noexcept;

    std::vector<size_t> bytes_;
    std::mutex mutex_;
    std::vector<void*> memory_;
};

}  // namespace mla::tensorrt
