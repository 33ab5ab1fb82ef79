// What every op is given: its tensors, the sizes behind the letters of the op table, scratch memory and the stream.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <cuda_runtime_api.h>

#include "api.h"
#include "layout.h"

namespace mla {

// The dimension letters of the op set (docs/op-set.md). -1: the op's tensors do not say.
struct Dims {
    int64_t T = -1, H = -1, B = -1, R = -1, Dr = -1, Dn = -1, Dv = -1, K = -1, N = -1, P = -1;
    int64_t C = -1, Q = -1, M = -1;  // of the ops of projections
    int64_t Hi = -1, Di = -1, Dri = -1, index_N = -1, copies = -1;
    int64_t max_pages = -1, pages = -1, page_words = -1, index_pages = -1, index_page_words = -1;
    int64_t units = -1, num_partitions = -1;

    int64_t* find(const char* letter, size_t length);
};

// Scratch memory, handed out front to back. In a sizing call pointers are null and nothing may be launched.
class Workspace {
public:
    explicit Workspace(void* memory, size_t bytes, bool sizing)
        : memory_(static_cast<char*>(memory)), bytes_(bytes), sizing_(sizing) {}

    // `count` elements, aligned to 256 bytes.
    template <typename T>
    T* take(int64_t count) {
        size_t const start = used_;
        used_ = round_up<size_t>(used_ + static_cast<size_t>(count) * sizeof(T), 256);
        if (used_ > most_) most_ = used_;
        return sizing_ ? nullptr : reinterpret_cast<T*>(memory_ + start);
    }

    // What was taken since `mark` may be taken again: for stages that follow each other on the stream.
    size_t mark() const { return used_; }
    void release(size_t mark) { used_ = mark; }

    bool sizing() const { return sizing_; }
    size_t most() const { return most_; }
    bool fits() const { return sizing_ || most_ <= bytes_; }

private:
    char* memory_;
    size_t bytes_;
    size_t used_ = 0, most_ = 0;
    bool sizing_;
};

struct Call {
    const MlaAttributes& attributes;
    const MlaTensor* in;
    const MlaTensor* out;
    Dims dims;
    Workspace& workspace;
    cudaStream_t stream;

    bool given(int input) const { return in[input].rank >= 0; }
    template <typename T>
    const T* input(int index) const {
        return given(index) ? static_cast<const T*>(in[index].data) : nullptr;
    }
    template <typename T>
    T* output(int index) const {
        return out[index].rank >= 0 ? static_cast<T*>(out[index].data) : nullptr;
    }
};

// The place of an input among an op's, -1 where it has none of that name.
constexpr int input_index(const OpSpec& op, const char* name) {
    for (int i = 0; i < op.inputs; ++i) {
        const char *a = op.input[i].name, *b = name;
        while (*a != '\0' && *a == *b) ++a, ++b;
        if (*a == *b) return i;
    }
    return -1;
}

// Sets mla_last_error() and returns `status`.
int fail(int status, const char* format, ...) __attribute__((format(printf, 2, 3)));

// The status of the last launch or CUDA call, naming `what`.
int check_cuda(const char* what, cudaError_t error);
int check_launch(const char* what);

// Of the current device: its compute capability's first number, multiprocessors, bytes of shared memory that a block may have.
struct Device {
    int major;
    int multiprocessors;
    int shared_bytes;
};
int current_device(Device* device);
// Whether the library has code for sm_90a, which alone has the kernels for Hopper.
bool has_hopper_code();

// The ops. Each takes its scratch memory first and returns MLA_OK before any launch when call.workspace.sizing().
int run_plan(Call& call);
int run_fused_rope_rms_norm_quantization(Call& call);
int run_decoding(Call& call);
int run_prefill(Call& call);
int run_prefill_sparse(Call& call);
int run_decode_branch_fp8(Call& call);
// `beside` queues what the indexer neither makes nor uses; it runs beside the scores, before the selection.
int run_indexer(Call& call, const std::function<int()>& beside);
int run_indexer(Call& call);
int run_attention(Call& call);
int run_sparse_attention(Call& call);
int run_input_projections(Call& call);
int run_output_projection(Call& call);

}  // namespace mla
