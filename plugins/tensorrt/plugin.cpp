#include "plugin.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string_view>
#include <vector>

#include "log.h"
#include "shapes.h"

namespace mla::tensorrt {
namespace {

using nvinfer1::DataType;
using nvinfer1::Dims;
using nvinfer1::DimensionOperation;
using nvinfer1::IDimensionExpr;

constexpr int32_t most(int32_t OpSpec::* count) {
    int32_t largest = 0;
    for (const OpSpec& op : ops) largest = op.*count > largest ? op.*count : largest;
    return largest;
}

// The tensors of a call in the op's order, absent ones included.
struct CallTensors {
    std::array<MlaTensor, most(&OpSpec::inputs)> inputs;
    std::array<MlaTensor, most(&OpSpec::outputs)> outputs;

    // input(i) and output(i) make the tensors of the node's positions; `memory` is that of the resident pools.
    template <typename Input, typename Output>
    CallTensors(const Instance& instance, Input&& input, Output&& output, const std::vector<void*>* memory = nullptr) {
        inputs.fill({nullptr, 0, -1, {}});
        outputs.fill({nullptr, 0, -1, {}});
        for (int32_t i = 0; i < instance.input_count(); ++i) {
            inputs[static_cast<size_t>(instance.input_formal(i))] = input(i);
        }
        for (int32_t i = 0; i < instance.output_count(); ++i) {
            outputs[static_cast<size_t>(instance.output_formal(i))] = output(i);
        }
        for (size_t pool = 0; pool < instance.resident.size(); ++pool) {
            MlaTensor const tensor = resident_tensor(instance, pool, memory == nullptr ? nullptr : memory->at(pool));
            const Pool& names = *instance.resident[pool];
            inputs[formal_of(names.input, instance.spec().input)] = tensor;
            outputs[formal_of(names.output, instance.spec().output)] = tensor;
        }
    }

private:
    static size_t formal_of(std::string_view name, const TensorSpec* specs) {
        size_t formal = 0;
        while (name != specs[formal].name) ++formal;
        return formal;
    }
};

int32_t onnx_type(DataType type) {
    switch (type) {
        case DataType::kFLOAT: return MLA_FLOAT;
        case DataType::kHALF: return MLA_FLOAT16;
        case DataType::kBF16: return MLA_BFLOAT16;
        case DataType::kFP8: return MLA_FLOAT8E4M3FN;
        case DataType::kINT32: return MLA_INT32;
        case DataType::kINT64: return MLA_INT64;
        default: return 0;  // fits no kind but 'any'
    }
}

bool is_float(DataType type) { return type == DataType::kFLOAT || type == DataType::kHALF || type == DataType::kBF16; }

bool type_fits(Kind kind, DataType type) {
    switch (kind) {
        case Kind::any_float:
        case Kind::table: return is_float(type);
        case Kind::f32: return type == DataType::kFLOAT;
        case Kind::i32: return type == DataType::kINT32;
        case Kind::weight: return is_float(type) || type == DataType::kFP8;
        case Kind::e4m3: return type == DataType::kFP8;
        case Kind::any: return true;
    }
    return false;
}

Instance settled(const Instance& instance, int32_t input_count) {
    Instance copy = instance;
    copy.settle_inputs(input_count);
    return copy;
}

// The input whose type the floating-point outputs have.
int32_t first_float_input(const Instance& instance) {
    for (int32_t i = 0; i < instance.input_count(); ++i) {
        if (instance.input(i).kind == Kind::any_float) return i;
    }
    throw std::invalid_argument("no input says which type the floating-point outputs have");
}

DataType output_type(const Instance& instance, int32_t output, DataType float_type) {
    switch (instance.output(output).kind) {
        case Kind::any_float: return float_type;
        case Kind::f32: return DataType::kFLOAT;
        case Kind::i32: return DataType::kINT32;
        default: throw std::logic_error("an output of a kind that no op has");
    }
}

bool has_float_output(const Instance& instance) {
    for (int32_t i = 0; i < instance.output_count(); ++i) {
        if (instance.output(i).kind == Kind::any_float) return true;
    }
    return false;
}

template <typename Value, typename Algebra>
Value product(Algebra& algebra, const Value* first, const Value* last) {
    Value all = algebra.constant(1);
    for (; first != last; ++first) all = algebra.product(all, *first);
    return all;
}

template <typename Value>
struct Sizes {
    std::array<Value, Dims::MAX_DIMS> size;
    int32_t rank;
};

// Sizes of an input as the op has it, from those that it has in the network.
template <typename Value, typename Algebra>
Sizes<Value> op_sizes(const Instance& instance, int32_t input, Algebra& algebra, const Value* sizes, int32_t rank) {
    rank = std::max(rank, 0);
    bool const rows = instance.has_rows(input) && rank > 0;
    if (instance.input(input).shape == nullptr) return {{product(algebra, sizes, sizes + rank - rows)}, 1};  // MlaPlan's tokens
    if (rows) return {{product(algebra, sizes, sizes + rank - 1), sizes[rank - 1]}, 2};
    Sizes<Value> same{{}, rank};
    std::copy_n(sizes, rank, same.size.begin());
    return same;
}

// Letters by attributes and by the inputs' dimensions: sizes_of(i) are those of input i in the op. merge(known, size) settles what a letter
// is that several dimensions give.
template <typename Algebra, typename SizesOf, typename Merge>
Letters<typename Algebra::Value> bind_letters(const Instance& instance, Algebra& algebra, SizesOf&& sizes_of, Merge&& merge) {
    Letters<typename Algebra::Value> letters;
    Letters<bool> fixed;
    const OpSpec& op = instance.spec();
    for (int32_t i = 0; i < op.attributes; ++i) {
        const AttributeSpec& attribute = op.attribute[i];
        if (attribute.letter == nullptr) continue;
        int32_t value;
        memcpy(&value, reinterpret_cast<const char*>(&instance.attributes) + attribute.offset, sizeof value);
        letters[attribute.letter] = algebra.constant(value);
        fixed[attribute.letter] = true;
    }
    auto const give = [&](std::string_view letter, typename Algebra::Value size) {
        if (fixed.count(letter) != 0) return;
        auto const [known, is_new] = letters.emplace(letter, size);
        if (!is_new) known->second = merge(known->second, size);
    };
    for (int32_t i = 0; i < instance.input_count(); ++i) {
        const TensorSpec& spec = instance.input(i);
        auto const sizes = sizes_of(i);
        if (spec.shape == nullptr) {
            give("T", sizes.size[0]);
            continue;
        }
        int32_t const axes = each_word(spec.shape, [&](int32_t axis, std::string_view word) {
            if (axis < sizes.rank && is_letter(word)) give(word, sizes.size[static_cast<size_t>(axis)]);
        });
        if (axes != sizes.rank) {
            throw std::invalid_argument("the input '" + std::string(spec.name) + "' has " + std::to_string(sizes.rank) +
                                        " dimensions, expected [" + spec.shape + "]");
        }
    }
    return letters;
}

struct Expressions {
    using Value = const IDimensionExpr*;
    nvinfer1::IExprBuilder& builder;

    Value constant(int64_t value) { return check(builder.constant(value)); }
    Value sum(Value first, Value second) { return operation(DimensionOperation::kSUM, first, second); }
    Value product(Value first, Value second) { return operation(DimensionOperation::kPROD, first, second); }
    Value ceil_div(Value value, int64_t divisor) {
        return operation(DimensionOperation::kCEIL_DIV, value, constant(divisor));
    }

private:
    Value operation(DimensionOperation operation, Value first, Value second) {
        return check(builder.operation(operation, *first, *second));
    }
    static Value check(Value value) {
        if (value == nullptr) throw std::runtime_error("TensorRT made no expression for a dimension");
        return value;
    }
};

// Upper bounds of the letters. Every dimension of a letter keeps within its own bound, so the least of them counts.
Letters<int64_t> largest_letters(const Instance& instance, const nvinfer1::DynamicPluginTensorDesc* inputs) {
    Numbers numbers;
    return bind_letters(
        instance, numbers, [&](int32_t i) { return op_sizes(instance, i, numbers, inputs[i].max.d, inputs[i].max.nbDims); },
        [](int64_t first, int64_t second) { return std::min(first, second); });
}

MlaTensor tensor_of_letters(const TensorSpec& spec, int32_t type, const Letters<int64_t>& letters) {
    Numbers numbers;
    MlaTensor tensor{nullptr, type, 0, {}};
    tensor.rank = each_word(spec.shape == nullptr ? "T" : spec.shape, [&](int32_t axis, std::string_view word) {
        tensor.shape[axis] = evaluate(word, letters, numbers);
    });
    return tensor;
}

MlaTensor tensor_of_sizes(DataType type, const int64_t* sizes, int32_t rank, void* data) {
    MlaTensor tensor{data, onnx_type(type), rank, {}};
    int32_t const axes = std::min<int32_t>(rank, MLA_MAX_RANK);  // a call refuses tensors of more
    std::copy_n(sizes, std::max(axes, 0), tensor.shape);
    return tensor;
}

MlaTensor input_tensor(const Instance& instance, int32_t input, DataType type, const Dims& dims, const void* data) {
    Numbers numbers;
    auto const sizes = op_sizes(instance, input, numbers, dims.d, dims.nbDims);
    return tensor_of_sizes(type, sizes.size.data(), sizes.rank, const_cast<void*>(data));
}

MlaTensor output_tensor(const Instance& instance, int32_t output, DataType type, const Dims& dims, void* data) {
    bool const batched = instance.is_batched(output) && dims.nbDims > 0;
    return tensor_of_sizes(type, dims.d + batched, dims.nbDims - batched, data);
}

void check(int status) {
    if (status != MLA_OK) throw std::runtime_error(mla_last_error());
}

size_t workspace_for(const Instance& instance, const CallTensors& call) {
    size_t bytes = 0;
    check(mla_workspace_bytes(instance.op, &instance.attributes, call.inputs.data(), call.outputs.data(), &bytes));
    return bytes;
}

size_t largest_workspace(const Instance& instance, const nvinfer1::DynamicPluginTensorDesc* inputs,
                         const nvinfer1::DynamicPluginTensorDesc* outputs) {
    Letters<int64_t> const letters = largest_letters(instance, inputs);
    CallTensors const call(
        instance,
        [&](int32_t i) { return tensor_of_letters(instance.input(i), onnx_type(inputs[i].desc.type), letters); },
        [&](int32_t i) { return tensor_of_letters(instance.output(i), onnx_type(outputs[i].desc.type), letters); });
    return workspace_for(instance, call);
}

// A call at the shapes that TensorRT tunes for finds sizes that contradict each other while the engine is built.
void check_tuned_shapes(const Instance& instance, const nvinfer1::DynamicPluginTensorDesc* inputs,
                        const nvinfer1::DynamicPluginTensorDesc* outputs) {
    auto const known = [](const nvinfer1::DynamicPluginTensorDesc& tensor) {
        const Dims& opt = tensor.opt;
        return std::all_of(opt.d, opt.d + std::max(opt.nbDims, 0), [](int64_t size) { return size >= 0; });
    };
    if (!std::all_of(inputs, inputs + instance.input_count(), known)) return;
    if (!std::all_of(outputs, outputs + instance.output_count(), known)) return;
    CallTensors const call(
        instance, [&](int32_t i) { return input_tensor(instance, i, inputs[i].desc.type, inputs[i].opt, nullptr); },
        [&](int32_t i) { return output_tensor(instance, i, outputs[i].desc.type, outputs[i].opt, nullptr); });
    workspace_for(instance, call);
}

void check_output_count(const Instance& instance, int32_t output_count) {
    if (output_count != instance.output_count()) {
        throw std::invalid_argument("the node has " + std::to_string(output_count) + " outputs, expected " +
                                    std::to_string(instance.output_count()));
    }
}

}  // namespace

Plugin::Plugin(Instance instance, std::shared_ptr<ResidentPools> resident)
    : instance_(std::move(instance)), resident_(std::move(resident)) {}

nvinfer1::IPluginCapability* Plugin::getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept {
    switch (type) {
        case nvinfer1::PluginCapabilityType::kCORE: return static_cast<nvinfer1::IPluginV3OneCore*>(this);
        case nvinfer1::PluginCapabilityType::kBUILD: return static_cast<nvinfer1::IPluginV3OneBuildV2*>(this);
        case nvinfer1::PluginCapabilityType::kRUNTIME: return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
    }
    return nullptr;
}

nvinfer1::IPluginV3* Plugin::clone() noexcept {
    nvinfer1::IPluginV3* copy = nullptr;
    guarded(getPluginName(), [&] { copy = new Plugin(instance_, resident_); });
    return copy;
}

nvinfer1::IPluginV3* Plugin::attachToContext(nvinfer1::IPluginResourceContext*) noexcept {
    int32_t const failed = guarded(getPluginName(), [&] {
        if (resident_ != nullptr) resident_->memory();  // too little of it is an error here, not in a step
    });
    return failed ? nullptr : clone();
}

int32_t Plugin::getOutputDataTypes(DataType* output_types, int32_t output_count, const DataType* input_types,
                                   int32_t input_count) const noexcept {
    return guarded(getPluginName(), [&] {
        Instance const instance = settled(instance_, input_count);
        check_output_count(instance, output_count);
        DataType const float_type =
            has_float_output(instance) ? input_types[first_float_input(instance)] : DataType::kFLOAT;
        for (int32_t i = 0; i < output_count; ++i) output_types[i] = output_type(instance, i, float_type);
    });
}

int32_t Plugin::getOutputShapes(const nvinfer1::DimsExprs* inputs, int32_t input_count, const nvinfer1::DimsExprs*,
                                int32_t, nvinfer1::DimsExprs* outputs, int32_t output_count,
                                nvinfer1::IExprBuilder& builder) noexcept {
    return guarded(getPluginName(), [&] {
        Instance const instance = settled(instance_, input_count);
        check_output_count(instance, output_count);
        Expressions expressions{builder};
        auto const letters = bind_letters(
            instance, expressions, [&](int32_t i) { return op_sizes(instance, i, expressions, inputs[i].d, inputs[i].nbDims); },
            [](const IDimensionExpr* first, const IDimensionExpr*) { return first; });
        for (int32_t i = 0; i < output_count; ++i) {
            int32_t const before = instance.is_batched(i);
            if (before > 0) outputs[i].d[0] = expressions.constant(1);
            outputs[i].nbDims = before + each_word(instance.output(i).shape, [&](int32_t axis, std::string_view word) {
                outputs[i].d[before + axis] = evaluate(word, letters, expressions);
            });
        }
    });
}

bool Plugin::supportsFormatCombination(int32_t position, const nvinfer1::DynamicPluginTensorDesc* tensors,
                                       int32_t input_count, int32_t output_count) noexcept {
    bool supported = false;
    guarded(getPluginName(), [&] {
        Instance const instance = settled(instance_, input_count);
        check_output_count(instance, output_count);
        const nvinfer1::PluginTensorDesc& tensor = tensors[position].desc;
        if (tensor.format != nvinfer1::TensorFormat::kLINEAR) return;
        if (position < input_count) {
            supported = type_fits(instance.input(position).kind, tensor.type);
            return;
        }
        DataType const float_type =
            has_float_output(instance) ? tensors[first_float_input(instance)].desc.type : DataType::kFLOAT;
        supported = tensor.type == output_type(instance, position - input_count, float_type);
    });
    return supported;
}

int32_t Plugin::configurePlugin(const nvinfer1::DynamicPluginTensorDesc* inputs, int32_t input_count,
                                const nvinfer1::DynamicPluginTensorDesc* outputs, int32_t output_count) noexcept {
    return guarded(getPluginName(), [&] {
        instance_.settle_inputs(input_count);
        check_output_count(instance_, output_count);
        check_tuned_shapes(instance_, inputs, outputs);
        largest_workspace(instance_, inputs, outputs);  // its failure must end the build here, not at getWorkspaceSize
    });
}

size_t Plugin::getWorkspaceSize(const nvinfer1::DynamicPluginTensorDesc* inputs, int32_t input_count,
                                const nvinfer1::DynamicPluginTensorDesc* outputs, int32_t output_count) const noexcept {
    size_t bytes = std::numeric_limits<size_t>::max() / 2;  // more than there is: a failure must not pass for success
    guarded(getPluginName(), [&] {
        Instance const instance = settled(instance_, input_count);
        check_output_count(instance, output_count);
        bytes = largest_workspace(instance, inputs, outputs);
    });
    return bytes;
}

int32_t Plugin::getAliasedInput(int32_t output) noexcept {
    int32_t aliased = -1;
    guarded(getPluginName(), [&] {
        for (const Pool& pool : pools) {
            if (strcmp(instance_.output(output).name, pool.output) == 0) aliased = instance_.position_of(pool.input);
        }
    });
    return aliased;
}

const char* Plugin::getTimingCacheID() noexcept {
    guarded(getPluginName(), [&] { timing_cache_id_ = InstanceFields(instance_).text(); });
    return timing_cache_id_.c_str();
}

int32_t Plugin::onShapeChange(const nvinfer1::PluginTensorDesc*, int32_t input_count, const nvinfer1::PluginTensorDesc*,
                              int32_t output_count) noexcept {
    return guarded(getPluginName(), [&] {
        instance_.settle_inputs(input_count);
        check_output_count(instance_, output_count);
    });
}

int32_t Plugin::enqueue(const nvinfer1::PluginTensorDesc* input_descriptions,
                        const nvinfer1::PluginTensorDesc* output_descriptions, const void* const* inputs,
                        void* const* outputs, void* workspace, cudaStream_t stream) noexcept {
    return guarded(getPluginName(), [&] {
        if (!instance_.resident.empty() && resident_ == nullptr) return;  // timed while an engine is built
        CallTensors const call(
            instance_,
            [&](int32_t i) {
                const nvinfer1::PluginTensorDesc& described = input_descriptions[i];
                return input_tensor(instance_, i, described.type, described.dims, inputs[i]);
            },
            [&](int32_t i) {
                const nvinfer1::PluginTensorDesc& described = output_descriptions[i];
                return output_tensor(instance_, i, described.type, described.dims, outputs[i]);
            },
            resident_ == nullptr ? nullptr : &resident_->memory());
        // TensorRT does not say how large the workspace is; it was sized for the largest shapes of the profile.
        check(mla_enqueue(instance_.op, &instance_.attributes, call.inputs.data(), call.outputs.data(), workspace,
                          std::numeric_limits<size_t>::max(), stream));
    });
}

const nvinfer1::PluginFieldCollection* Plugin::getFieldsToSerialize() noexcept {
    const nvinfer1::PluginFieldCollection* collection = nullptr;
    guarded(getPluginName(), [&] {
        serialized_ = std::make_unique<InstanceFields>(instance_);
        collection = serialized_->collection();
    });
    return collection;
}

}  // namespace mla::tensorrt
