// The TensorRT plugin of every op: the op table says what it takes and gives, the kernel library computes it.
#pragma once

#include <memory>

#include "instance.h"
#include "resident.h"

namespace mla::tensorrt {

constexpr const char* plugin_namespace = "mla_trt";

class Plugin final : public nvinfer1::IPluginV3,
                     public nvinfer1::IPluginV3OneCore,
                     public nvinfer1::IPluginV3OneBuildV2,
                     public nvinfer1::IPluginV3OneRuntime {
public:
    // `resident`: the pools that the instance names; null while an engine is built.
    Plugin(Instance instance, std::shared_ptr<ResidentPools> resident);

    nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept override;
    nvinfer1::IPluginV3* clone() noexcept override;

    const char* getPluginName() const noexcept override { return instance_.spec().name; }
    const char* getPluginVersion() const noexcept override { return instance_.spec().version; }
    const char* getPluginNamespace() const noexcept override { return plugin_namespace; }

    int32_t getNbOutputs() const noexcept override { return instance_.output_count(); }
    int32_t getOutputDataTypes(nvinfer1::DataType* output_types, int32_t output_count,
                               const nvinfer1::DataType* input_types, int32_t input_count) const noexcept override;
    int32_t getOutputShapes(const nvinfer1::DimsExprs* inputs, int32_t input_count,
                            const nvinfer1::DimsExprs* shape_inputs, int32_t shape_input_count,
                            nvinfer1::DimsExprs* outputs, int32_t output_count,
                            nvinfer1::IExprBuilder& builder) noexcept override;
    bool supportsFormatCombination(int32_t position, const nvinfer1::DynamicPluginTensorDesc* tensors,
                                   int32_t input_count, int32_t output_count) noexcept override;
    int32_t configurePlugin(const nvinfer1::DynamicPluginTensorDesc* inputs, int32_t input_count,
                            const nvinfer1::DynamicPluginTensorDesc* outputs, int32_t output_count) noexcept override;
    size_t getWorkspaceSize(const nvinfer1::DynamicPluginTensorDesc* inputs, int32_t input_count,
                            const nvinfer1::DynamicPluginTensorDesc* outputs,
                            int32_t output_count) const noexcept override;
    int32_t getAliasedInput(int32_t output) noexcept override;
    const char* getTimingCacheID() noexcept override;

    int32_t onShapeChange(const nvinfer1::PluginTensorDesc* inputs, int32_t input_count,
                          const nvinfer1::PluginTensorDesc* outputs, int32_t output_count) noexcept override;
    int32_t enqueue(const nvinfer1::PluginTensorDesc* input_descriptions,
                    const nvinfer1::PluginTensorDesc* output_descriptions, const void* const* inputs,
                    void* const* outputs, void* workspace, cudaStream_t stream) noexcept override;
    nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext* context) noexcept override;
    const nvinfer1::PluginFieldCollection* getFieldsToSerialize() noexcept override;

private:
    Instance instance_;
    std::shared_ptr<ResidentPools> resident_;
    std::unique_ptr<InstanceFields> serialized_;
    std::string timing_cache_id_;
};

}  // namespace mla::tensorrt
