// One node of the op set: which op, its attributes, and which of the op's tensors the node has.
#pragma once

#include <algorithm>
#include <string>
#include <string_view>
#include <vector>

#include <NvInferRuntime.h>

#include "api.h"

namespace mla::tensorrt {

// Fields beside the attributes: formal names of the tensors that a node has, in the node's order, separated by spaces.
constexpr const char* inputs_field = "inputs";
constexpr const char* outputs_field = "outputs";

// Fields of a node whose tensors have other axes than the op's, as the model has them: formal names of inputs all of whose axes but the last
// count as one (MlaPlan's tokens are as many as such rows), and of outputs with an axis of 1 before the others.
constexpr const char* rows_field = "rows";
constexpr const char* batched_field = "batched";

// Fields of a node whose plugins hold page pools themselves: formal names of these inputs, and the pages of each pool.
constexpr const char* resident_field = "resident";
constexpr const char* pages_field = "resident_pages";

// Pools that an op updates in place: TensorRT binds both names to one address, or neither is a tensor of the node.
struct Pool {
    const char* input;
    const char* output;
    int (*page_words)(const MlaAttributes* attributes, int64_t* words);
};
inline constexpr Pool pools[] = {{"kv_cache", "kv_cache_out", mla_kv_page_words},
                                 {"indexer_cache", "indexer_cache_out", mla_index_page_words}};

struct Instance {
    int32_t op = 0;
    MlaAttributes attributes{};
    bool knows_inputs = false;  // false: the node has as many of the op's first inputs as TensorRT will say
    std::vector<int32_t> inputs;   // the formal of each input
    std::vector<int32_t> outputs;  // the formal of each output
    std::vector<int32_t> rows, batched;  // formals of the fields
    std::vector<const Pool*> resident;  // the pools that the plugin holds
    int32_t resident_pages = 0;

    const OpSpec& spec() const { return ops[op]; }
    int32_t input_count() const { return static_cast<int32_t>(inputs.size()); }
    int32_t output_count() const { return static_cast<int32_t>(outputs.size()); }
    int32_t input_formal(int32_t position) const { return inputs.at(static_cast<size_t>(position)); }
    int32_t output_formal(int32_t position) const { return outputs.at(static_cast<size_t>(position)); }
    const TensorSpec& input(int32_t position) const { return spec().input[input_formal(position)]; }
    const TensorSpec& output(int32_t position) const { return spec().output[output_formal(position)]; }
    bool has_rows(int32_t position) const { return has(rows, input_formal(position)); }
    bool is_batched(int32_t position) const { return has(batched, output_formal(position)); }

    // Where the node has this input, -1 where it has not.
    int32_t position_of(std::string_view input_name) const;

    // Settles which formals a node of `count` inputs has. Throws std::invalid_argument where the op takes no such node.
    void settle_inputs(int32_t count);

private:
    static bool has(const std::vector<int32_t>& formals, int32_t formal) {
        return std::find(formals.begin(), formals.end(), formal) != formals.end();
    }
};

// The node of this op that the fields describe. Throws std::invalid_argument.
Instance read_instance(int32_t op, const nvinfer1::PluginFieldCollection& fields);

// Fields that read_instance makes the same node from, with the memory that they point to.
class InstanceFields {
public:
    explicit InstanceFields(const Instance& instance);
    InstanceFields(const InstanceFields&) = delete;
    InstanceFields& operator=(const InstanceFields&) = delete;

    const nvinfer1::PluginFieldCollection* collection() const { return &collection_; }

    // All of it as text: nodes of an op with the same text do the same.
    std::string text() const;

private:
    void add_text(const char* name, const std::string& text);

    MlaAttributes attributes_;
    int32_t resident_pages_;
    std::vector<std::string> texts_;
    std::vector<nvinfer1::PluginField> fields_;
    nvinfer1::PluginFieldCollection collection_;
};

// The text field of an attribute whose value is the number of a choice.
std::string choice_text(const AttributeSpec& attribute, int32_t number);

}  // namespace mla::tensorrt
