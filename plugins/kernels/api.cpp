// The C interface: checks a call against the op table, resolves its dimension letters and hands it to its op.
#include "api.h"

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "call.h"

#ifndef MLA_BUILD
#define MLA_BUILD "unknown"
#endif

namespace mla {
namespace {

thread_local char last_error[512] = "";

struct Letter {
    const char* name;
    int64_t Dims::* member;
};

constexpr Letter letters[] = {
    {"T", &Dims::T},
    {"H", &Dims::H},
    {"B", &Dims::B},
    {"R", &Dims::R},
    {"Dr", &Dims::Dr},
    {"Dn", &Dims::Dn},
    {"Dv", &Dims::Dv},
    {"K", &Dims::K},
    {"N", &Dims::N},
    {"P", &Dims::P},
    {"C", &Dims::C},
    {"Q", &Dims::Q},
    {"M", &Dims::M},
    {"Hi", &Dims::Hi},
    {"Di", &Dims::Di},
    {"Dri", &Dims::Dri},
    {"index_N", &Dims::index_N},
    {"copies", &Dims::copies},
    {"max_pages", &Dims::max_pages},
    {"pages", &Dims::pages},
    {"page_words", &Dims::page_words},
    {"index_pages", &Dims::index_pages},
    {"index_page_words", &Dims::index_page_words},
    {"units", &Dims::units},
    {"num_partitions", &Dims::num_partitions},
};

// One term of a shape word: a number, a letter, ceil(letter/number) or ceil(letter*letter/number). Unknown: -1.
int64_t term_value(Dims& dims, const char* term, size_t length) {
    if (term[0] >= '0' && term[0] <= '9') return strtoll(term, nullptr, 10);
    if (length > 5 && strncmp(term, "ceil(", 5) == 0) {
        const char* slash = static_cast<const char*>(memchr(term, '/', length));
        auto const inner = static_cast<size_t>(slash - term - 5);
        const char* star = static_cast<const char*>(memchr(term + 5, '*', inner));
        int64_t const* value = dims.find(term + 5, star == nullptr ? inner : static_cast<size_t>(star - term - 5));
        int64_t const one = 1, *factor = star == nullptr ? &one : dims.find(star + 1, static_cast<size_t>(slash - star - 1));
        if (value == nullptr || factor == nullptr || *value < 0 || *factor < 0) return -1;
        return ceil_div<int64_t>(*value * *factor, strtoll(slash + 1, nullptr, 10));
    }
    int64_t const* value = dims.find(term, length);
    return value == nullptr ? -1 : *value;
}

// The size that a shape word such as "R+Dr" stands for, -1 while a letter is unknown.
int64_t word_value(Dims& dims, const char* word, size_t length) {
    int64_t total = 0;
    while (length > 0) {
        const char* plus = static_cast<const char*>(memchr(word, '+', length));
        size_t const term = plus == nullptr ? length : static_cast<size_t>(plus - word);
        int64_t const value = term_value(dims, word, term);
        if (value < 0) return -1;
        total += value;
        size_t const step = plus == nullptr ? length : term + 1;
        word += step;
        length -= step;
    }
    return total;
}

// Binds the letters that stand alone in the words of a shape and checks all words that can be evaluated.
int unify(Dims& dims, const OpSpec& op, const TensorSpec& spec, const MlaTensor& tensor) {
    const char* word = spec.shape;
    int axis = 0;
    for (; *word != '\0'; ++axis) {
        size_t const length = strcspn(word, " ");
        if (axis >= tensor.rank) break;
        int64_t const size = tensor.shape[axis];
        int64_t* letter = dims.find(word, length);
        if (letter != nullptr && *letter < 0) *letter = size;
        int64_t const expected = word_value(dims, word, length);
        bool const longer = spec.kind == Kind::table && axis == 1 && size > expected;
        if (expected >= 0 && expected != size && !longer) {
            return fail(MLA_BAD_CALL, "%s: %s has %lld along %.*s, expected %lld", op.name, spec.name,
                        static_cast<long long>(size), static_cast<int>(length), word,
                        static_cast<long long>(expected));
        }
        word += length;
        while (*word == ' ') ++word;
    }
    if (*word != '\0' || axis != tensor.rank) {
        return fail(MLA_BAD_CALL, "%s: %s has %d dimensions, expected [%s]", op.name, spec.name, tensor.rank, spec.shape);
    }
    return MLA_OK;
}

bool is_float(int32_t type) { return type == MLA_FLOAT || type == MLA_FLOAT16 || type == MLA_BFLOAT16; }

bool type_fits(Kind kind, int32_t type) {
    switch (kind) {
        case Kind::any_float:
        case Kind::table: return is_float(type);
        case Kind::f32: return type == MLA_FLOAT;
        case Kind::i32: return type == MLA_INT32;
        case Kind::weight: return is_float(type) || type == MLA_FLOAT8E4M3FN;
        case Kind::e4m3: return type == MLA_FLOAT8E4M3FN;
        case Kind::any: return true;
    }
    return false;
}

int check_tensor(const OpSpec& op, const TensorSpec& spec, const MlaTensor& tensor) {
    if (tensor.rank > MLA_MAX_RANK) {
        return fail(MLA_BAD_CALL, "%s: %s has %d dimensions, at most %d are possible", op.name, spec.name, tensor.rank,
                    MLA_MAX_RANK);
    }
    for (int axis = 0; axis < tensor.rank; ++axis) {
        if (tensor.shape[axis] < 0) {
            return fail(MLA_BAD_CALL, "%s: %s has a negative size along axis %d", op.name, spec.name, axis);
        }
    }
    if (!type_fits(spec.kind, tensor.type)) {
        return fail(MLA_BAD_CALL, "%s: %s has the type %d (onnx.TensorProto), which the op does not take", op.name,
                    spec.name, tensor.type);
    }
    return MLA_OK;
}

int bind(const OpSpec& op, const MlaAttributes& attributes, const MlaTensor* in, const MlaTensor* out, Dims& dims) {
    for (int i = 0; i < op.attributes; ++i) {
        const AttributeSpec& spec = op.attribute[i];
        if (spec.letter == nullptr) continue;
        *dims.find(spec.letter, strlen(spec.letter)) =
            *reinterpret_cast<const int32_t*>(reinterpret_cast<const char*>(&attributes) + spec.offset);
    }
    for (int i = 0; i < op.inputs; ++i) {
        if (in[i].rank < 0) {
            if (op.input[i].optional) continue;
            return fail(MLA_BAD_CALL, "%s: the input %s is missing", op.name, op.input[i].name);
        }
        if (int status = check_tensor(op, op.input[i], in[i])) return status;
        if (op.input[i].shape == nullptr) {  // only MlaPlan's tokens: any shape with T elements
            dims.T = 1;
            for (int axis = 0; axis < in[i].rank; ++axis) dims.T *= in[i].shape[axis];
        }
    }
    // twice: a sum of letters can be checked once a later input has bound them
    for (int pass = 0; pass < 2; ++pass) {
        for (int i = 0; i < op.inputs; ++i) {
            if (in[i].rank < 0 || op.input[i].shape == nullptr) continue;
            if (int status = unify(dims, op, op.input[i], in[i])) return status;
        }
    }
    for (int i = 0; i < op.outputs; ++i) {
        if (out[i].rank < 0) {
            if (op.output[i].optional) continue;
            return fail(MLA_BAD_CALL, "%s: the output %s is missing", op.name, op.output[i].name);
        }
        if (int status = check_tensor(op, {op.output[i].name, op.output[i].kind, op.output[i].shape, false}, out[i])) {
            return status;
        }
        if (int status = unify(dims, op, op.output[i], out[i])) return status;
    }
    return MLA_OK;
}

int check_layouts(const OpSpec& op, const MlaAttributes& attributes, const Dims& dims) {
    if (dims.page_words >= 0 && dims.page_words != KvLayout(attributes).page_words()) {
        return fail(MLA_BAD_CALL, "%s: a page of kv_cache has %lld words, but rows of this format need %lld", op.name,
                    static_cast<long long>(dims.page_words), static_cast<long long>(KvLayout(attributes).page_words()));
    }
    if (dims.index_page_words >= 0 && dims.index_page_words != IndexLayout(attributes).page_words()) {
        return fail(MLA_BAD_CALL, "%s: a page of indexer_cache has %lld words, but rows of this format need %lld", op.name,
                    static_cast<long long>(dims.index_page_words),
                    static_cast<long long>(IndexLayout(attributes).page_words()));
    }
    return MLA_OK;
}

using Run = int (*)(Call&);
constexpr Run runs[op::count] = {
    run_plan,    run_fused_rope_rms_norm_quantization, run_decoding,  run_prefill,          run_prefill_sparse,
    run_decode_branch_fp8, run_indexer,                run_attention, run_sparse_attention,
    run_input_projections, run_output_projection,
};

int call_op(int32_t number, const MlaAttributes* attributes, const MlaTensor* in, const MlaTensor* out,
            Workspace& workspace, cudaStream_t stream) {
    if (number < 0 || number >= op::count) return fail(MLA_BAD_CALL, "there is no op %d", number);
    Dims dims;
    if (int status = bind(ops[number], *attributes, in, out, dims)) return status;
    if (int status = check_layouts(ops[number], *attributes, dims)) return status;
    Call call{*attributes, in, out, dims, workspace, stream};
    return runs[number](call);
}

}  // namespace

int64_t* Dims::find(const char* letter, size_t length) {
    for (const Letter& known : letters) {
        if (strlen(known.name) == length && strncmp(known.name, letter, length) == 0) return &(this->*known.member);
    }
    return nullptr;
}

int fail(int status, const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(last_error, sizeof last_error, format, arguments);
    va_end(arguments);
    return status;
}

int check_cuda(const char* what, cudaError_t error) {
    if (error == cudaSuccess) return MLA_OK;
    return fail(MLA_CUDA, "%s: %s (%s)", what, cudaGetErrorString(error), cudaGetErrorName(error));
}

int check_launch(const char* what) { return check_cuda(what, cudaGetLastError()); }

int current_device(Device* device) {
    int number = 0;
    if (int status = check_cuda("current device", cudaGetDevice(&number))) return status;
    struct {
        int* value;
        cudaDeviceAttr attribute;
    } const wanted[] = {
        {&device->major, cudaDevAttrComputeCapabilityMajor},
        {&device->multiprocessors, cudaDevAttrMultiProcessorCount},
        {&device->shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin},
    };
    for (auto const& [value, attribute] : wanted) {
        if (int status = check_cuda("device attributes", cudaDeviceGetAttribute(value, attribute, number))) return status;
    }
    return MLA_OK;
}

}  // namespace mla

extern "C" {

int mla_workspace_bytes(int32_t op, const MlaAttributes* attributes, const MlaTensor* inputs, const MlaTensor* outputs,
                        size_t* bytes) {
    mla::Workspace workspace(nullptr, 0, true);
    int const status = mla::call_op(op, attributes, inputs, outputs, workspace, nullptr);
    *bytes = workspace.most();
    return status;
}

int mla_enqueue(int32_t op, const MlaAttributes* attributes, const MlaTensor* inputs, const MlaTensor* outputs,
                void* workspace_memory, size_t workspace_bytes, void* stream) {
    // sized first: an op may then take its memory without asking at each step whether there is enough
    size_t needed = 0;
    if (int status = mla_workspace_bytes(op, attributes, inputs, outputs, &needed)) return status;
    if (needed > workspace_bytes) {
        return mla::fail(MLA_BAD_CALL, "%s needs %zu bytes of workspace, got %zu", mla::ops[op].name, needed,
                         workspace_bytes);
    }
    mla::Workspace workspace(workspace_memory, workspace_bytes, false);
    return mla::call_op(op, attributes, inputs, outputs, workspace, static_cast<cudaStream_t>(stream));
}

int mla_kv_page_words(const MlaAttributes* attributes, int64_t* words) {
    *words = mla::KvLayout(*attributes).page_words();
    return MLA_OK;
}

int mla_index_page_words(const MlaAttributes* attributes, int64_t* words) {
    *words = mla::IndexLayout(*attributes).page_words();
    return MLA_OK;
}

const char* mla_last_error(void) { return mla::last_error; }

const char* mla_build(void) { return MLA_BUILD; }
}
