// The plugin creators, and the two ways in which TensorRT comes to know them (docs/plugins.md):
// - whoever only opens the library (Triton, ctypes) has them registered by the static constructor;
// - IPluginRegistry::loadLibrary and trtexec's --dynamicPlugins open it too, then ask for the creators and register
//   them. That fails when they are registered already, and TensorRT then closes the library whose creators stay in its
//   registry: the next look-up crashes. So asking for the creators takes the static registration back.
#include <array>
#include <atomic>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "log.h"
#include "plugin.h"

namespace mla::tensorrt {
namespace {

using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;

class Creator final : public nvinfer1::IPluginCreatorV3One {
public:
    explicit Creator(int32_t op) : op_(op) {
        const OpSpec& spec = ops[op];
        for (int32_t i = 0; i < spec.attributes; ++i) {
            fields_.emplace_back(spec.attribute[i].name, nullptr, field_type(spec.attribute[i]), 1);
        }
        fields_.emplace_back(inputs_field, nullptr, PluginFieldType::kCHAR, 1);
        fields_.emplace_back(outputs_field, nullptr, PluginFieldType::kCHAR, 1);
        fields_.emplace_back(rows_field, nullptr, PluginFieldType::kCHAR, 1);
        fields_.emplace_back(batched_field, nullptr, PluginFieldType::kCHAR, 1);
        fields_.emplace_back(resident_field, nullptr, PluginFieldType::kCHAR, 1);
        fields_.emplace_back(pages_field, nullptr, PluginFieldType::kINT32, 1);
        collection_ = {static_cast<int32_t>(fields_.size()), fields_.data()};
    }

    Creator(const Creator&) = delete;
    Creator& operator=(const Creator&) = delete;

    nvinfer1::IPluginV3* createPlugin(const char* name, const nvinfer1::PluginFieldCollection* fields,
                                      nvinfer1::TensorRTPhase phase) noexcept override {
        nvinfer1::IPluginV3* plugin = nullptr;
        guarded(getPluginName(), [&] {
            try {
                nvinfer1::PluginFieldCollection const none{};
                Instance instance = read_instance(op_, fields == nullptr ? none : *fields);
                // An engine that is built has no pools: they would take memory that its layers are timed with.
                bool const holds = phase == nvinfer1::TensorRTPhase::kRUNTIME && !instance.resident.empty();
                auto resident = holds ? std::make_shared<ResidentPools>(instance) : nullptr;
                plugin = new Plugin(std::move(instance), std::move(resident));
            } catch (const std::invalid_argument& error) {
                throw std::invalid_argument("node '" + std::string(name == nullptr ? "" : name) + "': " + error.what());
            }
        });
        return plugin;
    }

    const nvinfer1::PluginFieldCollection* getFieldNames() noexcept override { return &collection_; }
    const char* getPluginName() const noexcept override { return ops[op_].name; }
    const char* getPluginVersion() const noexcept override { return ops[op_].version; }
    const char* getPluginNamespace() const noexcept override { return plugin_namespace; }

private:
    static PluginFieldType field_type(const AttributeSpec& attribute) {
        switch (attribute.kind) {
            case AttributeSpec::integer: return PluginFieldType::kINT32;
            case AttributeSpec::number: return PluginFieldType::kFLOAT32;
            default: return PluginFieldType::kCHAR;
        }
    }

    int32_t op_;
    std::vector<PluginField> fields_;
    nvinfer1::PluginFieldCollection collection_;
};

template <size_t... Ops>
std::array<Creator, sizeof...(Ops)> make_creators(std::index_sequence<Ops...>) {
    return {Creator(static_cast<int32_t>(Ops))...};
}

// Never destroyed: registries outlive this library's static objects when a process ends.
std::array<Creator, op::count>& creators() {
    static auto* const all = new auto(make_creators(std::make_index_sequence<op::count>()));
    return *all;
}

class StaticRegistration {
public:
    StaticRegistration() noexcept {
        guarded("registration", [&] {
            nvinfer1::IPluginRegistry* registry = getPluginRegistry();
            if (registry == nullptr) return;
            for (size_t i = 0; i < creators().size(); ++i) {
                // false where another copy of the library is there already; that one then serves
                registered_[i] = registry->registerCreator(creators()[i], plugin_namespace);
            }
        });
    }

    ~StaticRegistration() { withdraw(); }

    void withdraw() noexcept {
        guarded("registration", [&] {
            nvinfer1::IPluginRegistry* registry = getPluginRegistry();
            if (registry == nullptr) return;
            for (size_t i = 0; i < creators().size(); ++i) {
                if (registered_[i].exchange(false)) registry->deregisterCreator(creators()[i]);
            }
        });
    }

private:
    std::array<std::atomic<bool>, op::count> registered_{};
};

StaticRegistration static_registration;

}  // namespace
}  // namespace mla::tensorrt

extern "C" {

MLA_EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count) {
    using namespace mla::tensorrt;
    static auto const list = [] {
        std::array<nvinfer1::IPluginCreatorInterface*, mla::op::count> pointers{};
        for (size_t i = 0; i < pointers.size(); ++i) pointers[i] = &creators()[i];
        return pointers;
    }();
    static_registration.withdraw();
    count = static_cast<int32_t>(list.size());
    return list.data();
}

MLA_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder* finder) { mla::tensorrt::set_logger_finder(finder); }
}
