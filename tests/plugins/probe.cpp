// Asks a plugin library what TensorRT would ask it, without TensorRT and without a GPU, and prints the answers as JSON.
//
//   probe LIBNVINFER PLUGINS steps STEP...     load, load-copy (PLUGINS.copy), unload, dlopen, dlclose, get
//   probe LIBNVINFER PLUGINS creators          names and fields of all creators
//   probe LIBNVINFER PLUGINS node < LINES      one node: "op NAME", "int|float|text NAME VALUE", "input TYPE DIM..."
#include <NvInferRuntime.h>
#include <dlfcn.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iostream>
#include <list>
#include <memory>
#include <sstream>
#include <string>
#include <vector>

using namespace nvinfer1;

namespace {

std::string quoted(const std::string& text) {
    std::string out = "\"";
    for (char const c : text) {
        if (c == '"' || c == '\\') out += '\\';
        out += c == '\n' ? ' ' : c;
    }
    return out + "\"";
}

template <typename Items, typename Write>
std::string array_of(const Items& items, Write&& write) {
    std::string out = "[";
    for (const auto& item : items) out += (out.size() == 1 ? "" : ", ") + write(item);
    return out + "]";
}

std::vector<std::string> messages;

struct Logger final : ILogger {
    void log(Severity, const char* message) noexcept override { messages.push_back(message); }
};

struct Finder final : ILoggerFinder {
    ILogger* findLogger() override { return &logger; }
    Logger logger;
};

Finder finder;

[[noreturn]] void fail(const std::string& problem) {
    fprintf(stderr, "probe: %s\n", problem.c_str());
    exit(1);
}

void* open_library(const char* path) {
    void* const library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) fail(dlerror());
    return library;
}

template <typename Function>
Function symbol(void* library, const char* name) {
    void* const address = dlsym(library, name);
    if (address == nullptr) fail(std::string("no symbol ") + name);
    return reinterpret_cast<Function>(address);
}

// Dimensions that are all known: expressions fold as they are made.
class Expression final : public IDimensionExpr {
public:
    explicit Expression(int64_t value) : implementation_(value) { mImpl = &implementation_; }

private:
    struct Implementation final : apiv::VDimensionExpr {
        explicit Implementation(int64_t value_) : value(value_) {}
        bool isConstant() const override { return true; }
        int64_t getConstantValue() const override { return value; }
        bool isSizeTensor() const override { return false; }
        int64_t value;
    };
    Implementation implementation_;
};

class Expressions final : public IExprBuilder {
public:
    Expressions() { mImpl = &implementation_; }

private:
    struct Implementation final : apiv::VExprBuilder {
        const IDimensionExpr* constant(int64_t value) override { return &made.emplace_back(value); }
        const IDimensionExpr* operation(DimensionOperation operation, const IDimensionExpr& a,
                                        const IDimensionExpr& b) override {
            int64_t const x = a.getConstantValue();
            int64_t const y = b.getConstantValue();
            switch (operation) {
                case DimensionOperation::kSUM: return constant(x + y);
                case DimensionOperation::kPROD: return constant(x * y);
                case DimensionOperation::kCEIL_DIV: return constant((x + y - 1) / y);
                default: return nullptr;
            }
        }
        const IDimensionExpr* declareSizeTensor(int32_t, const IDimensionExpr&, const IDimensionExpr&) override {
            return nullptr;
        }
        std::list<Expression> made;
    };
    Implementation implementation_;
};

struct Fields {
    std::list<std::string> names, texts;
    std::list<int32_t> integers;
    std::list<float> numbers;
    std::vector<PluginField> all;

    void add(const std::string& kind, const std::string& name, const std::string& value) {
        const char* const field = names.emplace_back(name).c_str();
        if (kind == "int") {
            all.emplace_back(field, &integers.emplace_back(std::stoi(value)), PluginFieldType::kINT32, 1);
        } else if (kind == "float") {
            all.emplace_back(field, &numbers.emplace_back(std::stof(value)), PluginFieldType::kFLOAT32, 1);
        } else {
            const std::string& text = texts.emplace_back(value);
            all.emplace_back(field, text.data(), PluginFieldType::kCHAR, static_cast<int32_t>(text.size()));
        }
    }
    PluginFieldCollection collection() const { return {static_cast<int32_t>(all.size()), all.data()}; }
};

std::string fields_text(const PluginFieldCollection* fields) {
    std::vector<PluginField> const all(fields->fields, fields->fields + fields->nbFields);
    return array_of(all, [](const PluginField& field) {
        std::ostringstream value;
        if (field.data == nullptr) {
            value << "null";
        } else if (field.type == PluginFieldType::kINT32) {
            value << *static_cast<const int32_t*>(field.data);
        } else if (field.type == PluginFieldType::kFLOAT32) {
            value.precision(9);
            value << *static_cast<const float*>(field.data);
        } else {
            value << quoted(std::string(static_cast<const char*>(field.data), static_cast<size_t>(field.length)));
        }
        return "[" + quoted(field.name) + ", " + std::to_string(static_cast<int>(field.type)) + ", " + value.str() + "]";
    });
}

template <typename Capability>
Capability* capability(IPluginV3* plugin, PluginCapabilityType type) {
    return static_cast<Capability*>(plugin->getCapabilityInterface(type));
}

std::string serialized(IPluginV3* plugin) {
    return fields_text(capability<IPluginV3OneRuntime>(plugin, PluginCapabilityType::kRUNTIME)->getFieldsToSerialize());
}

DynamicPluginTensorDesc description(DataType type, const std::vector<int64_t>& sizes) {
    DynamicPluginTensorDesc tensor{};
    tensor.desc.type = type;
    tensor.desc.format = TensorFormat::kLINEAR;
    tensor.desc.dims.nbDims = static_cast<int32_t>(sizes.size());
    std::copy(sizes.begin(), sizes.end(), tensor.desc.dims.d);
    tensor.min = tensor.max = tensor.opt = tensor.desc.dims;
    return tensor;
}

int probe_node(IPluginCreatorInterface* const* creators, int32_t creator_count) {
    std::string op;
    Fields fields;
    std::vector<DynamicPluginTensorDesc> tensors;
    for (std::string line; std::getline(std::cin, line);) {
        std::istringstream words(line);
        std::string kind;
        words >> kind;
        if (kind == "op") {
            words >> op;
        } else if (kind == "input") {
            int32_t type;
            words >> type;
            std::vector<int64_t> sizes;
            for (int64_t size; words >> size;) sizes.push_back(size);
            tensors.push_back(description(static_cast<DataType>(type), sizes));
        } else {
            std::string name, value;
            words >> name >> std::ws;
            std::getline(words, value);
            fields.add(kind, name, value);
        }
    }
    auto const input_count = static_cast<int32_t>(tensors.size());
    IPluginCreatorV3One* creator = nullptr;
    for (int32_t i = 0; i < creator_count; ++i) {
        auto* const one = static_cast<IPluginCreatorV3One*>(creators[i]);
        if (op == one->getPluginName()) creator = one;
    }
    if (creator == nullptr) fail("no creator of " + op);

    auto const write_messages = [] { return "\"messages\": " + array_of(messages, quoted); };
    PluginFieldCollection const collection = fields.collection();
    std::unique_ptr<IPluginV3> plugin(creator->createPlugin("probed", &collection, TensorRTPhase::kBUILD));
    if (plugin == nullptr) {
        printf("{\"created\": false, %s}\n", write_messages().c_str());
        return 0;
    }
    auto* const build = capability<IPluginV3OneBuildV2>(plugin.get(), PluginCapabilityType::kBUILD);
    int32_t const output_count = build->getNbOutputs();

    std::vector<DataType> input_types, output_types(static_cast<size_t>(output_count));
    std::vector<DimsExprs> input_shapes, output_shapes(static_cast<size_t>(output_count));
    Expressions expressions;
    for (const DynamicPluginTensorDesc& tensor : tensors) {
        input_types.push_back(tensor.desc.type);
        DimsExprs& shape = input_shapes.emplace_back();
        shape.nbDims = tensor.desc.dims.nbDims;
        for (int32_t axis = 0; axis < shape.nbDims; ++axis) {
            shape.d[axis] = expressions.constant(tensor.desc.dims.d[axis]);
        }
    }
    int32_t const types_status =
        build->getOutputDataTypes(output_types.data(), output_count, input_types.data(), input_count);
    int32_t const shapes_status = build->getOutputShapes(input_shapes.data(), input_count, nullptr, 0,
                                                         output_shapes.data(), output_count, expressions);
    if (types_status != 0 || shapes_status != 0) {
        printf("{\"created\": true, \"inferred\": false, %s}\n", write_messages().c_str());
        return 0;
    }
    std::vector<int32_t> positions;
    std::string outputs = "[";
    std::string aliases = "[";
    for (int32_t i = 0; i < output_count; ++i) {
        const DimsExprs& shape = output_shapes[static_cast<size_t>(i)];
        std::vector<int64_t> sizes;
        for (int32_t axis = 0; axis < shape.nbDims; ++axis) sizes.push_back(shape.d[axis]->getConstantValue());
        outputs += (i == 0 ? "[" : ", [") + std::to_string(static_cast<int>(output_types[static_cast<size_t>(i)])) + ", " +
                   array_of(sizes, [](int64_t size) { return std::to_string(size); }) + "]";
        aliases += (i == 0 ? "" : ", ") + std::to_string(build->getAliasedInput(i));
        tensors.push_back(description(output_types[static_cast<size_t>(i)], sizes));
    }

    // which types each position takes when all positions before it are right; nothing must be read past it
    std::string formats = "[";
    bool takes_only_linear = true;
    for (int32_t position = 0; position < input_count + output_count; ++position) {
        std::vector<DynamicPluginTensorDesc> seen(tensors.begin(), tensors.begin() + position + 1);
        std::vector<int> taken;
        for (int const type : {0, 1, 2, 3, 6, 7, 8}) {
            seen.back().desc.type = static_cast<DataType>(type);
            seen.back().desc.format = TensorFormat::kLINEAR;
            if (build->supportsFormatCombination(position, seen.data(), input_count, output_count)) taken.push_back(type);
            seen.back().desc.format = TensorFormat::kCHW32;
            if (build->supportsFormatCombination(position, seen.data(), input_count, output_count)) {
                takes_only_linear = false;
            }
        }
        formats += (position == 0 ? "" : ", ") + array_of(taken, [](int type) { return std::to_string(type); });
    }
    std::string const timing_cache_id = build->getTimingCacheID();

    std::string const first = serialized(plugin.get());
    int32_t const configured =
        build->configurePlugin(tensors.data(), input_count, tensors.data() + input_count, output_count);
    std::string const fields_of_configured = serialized(plugin.get());
    std::unique_ptr<IPluginV3> copy(plugin->clone());
    auto* const runtime = capability<IPluginV3OneRuntime>(copy.get(), PluginCapabilityType::kRUNTIME);
    std::unique_ptr<IPluginV3> read(
        creator->createPlugin("probed", runtime->getFieldsToSerialize(), TensorRTPhase::kRUNTIME));
    if (read == nullptr) fail("the serialized fields make no plugin");
    std::string const fields_of_read = serialized(read.get());

    std::vector<PluginTensorDesc> plain;
    for (const DynamicPluginTensorDesc& tensor : tensors) plain.push_back(tensor.desc);
    std::vector<const void*> const data(tensors.size(), nullptr);
    std::vector<void*> const output_data(static_cast<size_t>(output_count), nullptr);
    auto* const execution = capability<IPluginV3OneRuntime>(read.get(), PluginCapabilityType::kRUNTIME);
    int32_t const shape_change =
        execution->onShapeChange(plain.data(), input_count, plain.data() + input_count, output_count);
    // pools in the plugin: none while an engine is built, where enqueue does nothing; then memory, of which there is none here
    bool const resident = std::any_of(fields.names.begin(), fields.names.end(),
                                      [](const std::string& name) { return name == "resident"; });
    auto* const building = capability<IPluginV3OneRuntime>(plugin.get(), PluginCapabilityType::kRUNTIME);
    int32_t const timed = resident ? building->enqueue(plain.data(), plain.data() + input_count, data.data(),
                                                       output_data.data(), nullptr, nullptr)
                                   : 0;
    std::unique_ptr<IPluginV3> const attached(execution->attachToContext(nullptr));
    plain[0].dims.nbDims = 4;  // no tensor of any op that has this rank begins with such sizes
    plain[0].dims.d[0] = plain[0].dims.d[1] = plain[0].dims.d[2] = plain[0].dims.d[3] = 3;
    int32_t const wrong_enqueue = execution->enqueue(plain.data(), plain.data() + input_count, data.data(),
                                                     output_data.data(), nullptr, nullptr);

    printf("{\"created\": true, \"inferred\": true, \"outputs\": %s], \"aliases\": %s], \"formats\": %s], ",
           outputs.c_str(), aliases.c_str(), formats.c_str());
    printf("\"timed\": %d, \"attached\": %s, ", timed, attached == nullptr ? "false" : "true");
    printf("\"takes_only_linear\": %s, \"configured\": %d, \"shape_change\": %d, \"wrong_enqueue\": %d, ",
           takes_only_linear ? "true" : "false", configured, shape_change, wrong_enqueue);
    printf("\"timing_cache_id\": %s, \"fields\": %s, \"fields_of_configured\": %s, \"fields_of_read\": %s, ",
           quoted(timing_cache_id).c_str(), first.c_str(), fields_of_configured.c_str(), fields_of_read.c_str());
    printf("%s}\n", write_messages().c_str());
    return 0;
}

int probe_creators(IPluginCreatorInterface* const* creators, int32_t count) {
    std::vector<IPluginCreatorV3One*> all;
    for (int32_t i = 0; i < count; ++i) all.push_back(static_cast<IPluginCreatorV3One*>(creators[i]));
    std::string const text = array_of(all, [](IPluginCreatorV3One* creator) {
        return "{\"name\": " + quoted(creator->getPluginName()) + ", \"version\": " + quoted(creator->getPluginVersion()) +
               ", \"namespace\": " + quoted(creator->getPluginNamespace()) +
               ", \"interface\": " + quoted(creator->getInterfaceInfo().kind) +
               ", \"fields\": " + fields_text(creator->getFieldNames()) + "}";
    });
    printf("%s\n", text.c_str());
    return 0;
}

int probe_steps(IPluginRegistry* registry, const std::string& path, int count, char** steps) {
    std::vector<std::string> results;
    std::vector<void*> loaded, opened;
    for (int i = 0; i < count; ++i) {
        std::string const step = steps[i];
        if (step == "load" || step == "load-copy") {
            void* const handle = registry->loadLibrary((step == "load" ? path : path + ".copy").c_str());
            if (handle != nullptr) loaded.push_back(handle);
            results.push_back(handle == nullptr ? "refused" : "loaded");
        } else if (step == "unload") {
            registry->deregisterLibrary(loaded.back());
            loaded.pop_back();
            results.push_back("unloaded");
        } else if (step == "dlopen") {
            opened.push_back(open_library(path.c_str()));
            results.push_back("opened");
        } else if (step == "dlclose") {
            dlclose(opened.back());
            opened.pop_back();
            results.push_back("closed");
        } else if (step == "get") {
            auto* const creator = registry->getCreator("MlaPlan", "1", "mla_trt");
            bool const found =
                creator != nullptr && strcmp(creator->getInterfaceInfo().kind, "PLUGIN CREATOR_V3ONE") == 0;
            results.push_back(found ? "found" : "absent");
        } else {
            fail("unknown step " + step);
        }
    }
    printf("%s\n", array_of(results, quoted).c_str());
    return 0;
}

}  // namespace

int main(int count, char** arguments) {
    if (count < 4) fail("usage: probe LIBNVINFER PLUGINS steps|creators|node ...");
    void* const nvinfer = dlopen(arguments[1], RTLD_NOW | RTLD_GLOBAL);
    if (nvinfer == nullptr) fail(dlerror());
    std::string const action = arguments[3];
    if (action == "steps") {
        auto* const registry = symbol<IPluginRegistry* (*)()>(nvinfer, "getPluginRegistry")();
        return probe_steps(registry, arguments[2], count - 4, arguments + 4);
    }
    void* const library = open_library(arguments[2]);
    symbol<void (*)(ILoggerFinder*)>(library, "setLoggerFinder")(&finder);
    int32_t creator_count = 0;
    auto* const creators =
        symbol<IPluginCreatorInterface* const* (*)(int32_t&)>(library, "getCreators")(creator_count);
    return action == "creators" ? probe_creators(creators, creator_count) : probe_node(creators, creator_count);
}
