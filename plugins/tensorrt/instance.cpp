#include "instance.h"

#include <algorithm>
#include <cstring>
#include <iterator>
#include <sstream>
#include <stdexcept>

#include "shapes.h"

namespace mla::tensorrt {
namespace {

using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;

std::vector<std::string> split(const std::string& text) {
    std::istringstream stream(text);
    std::vector<std::string> words;
    for (std::string word; stream >> word;) words.push_back(word);
    return words;
}

const PluginField* find(const nvinfer1::PluginFieldCollection& fields, const char* name) {
    for (int32_t i = 0; i < fields.nbFields; ++i) {
        if (fields.fields[i].name != nullptr && strcmp(fields.fields[i].name, name) == 0) return &fields.fields[i];
    }
    return nullptr;
}

[[noreturn]] void refuse(const char* field, const std::string& problem) {
    throw std::invalid_argument("attribute '" + std::string(field) + "' " + problem);
}

std::string text_of(const PluginField& field) {
    if (field.type != PluginFieldType::kCHAR || (field.data == nullptr && field.length > 0)) {
        refuse(field.name, "is not text");
    }
    std::string text(static_cast<const char*>(field.data), static_cast<size_t>(std::max(field.length, 0)));
    return text.substr(0, text.find('\0'));  // some writers count the terminator
}

template <typename Value>
Value read_as(const PluginField& field) {
    Value value;
    memcpy(&value, field.data, sizeof value);
    return value;
}

void check_single(const PluginField& field) {
    if (field.data == nullptr || field.length != 1) refuse(field.name, "must have one value");
}

int32_t integer_of(const PluginField& field) {
    check_single(field);
    if (field.type == PluginFieldType::kINT32) return read_as<int32_t>(field);
    if (field.type == PluginFieldType::kINT64) return static_cast<int32_t>(read_as<int64_t>(field));
    refuse(field.name, "is not an integer");
}

float number_of(const PluginField& field) {
    check_single(field);
    if (field.type == PluginFieldType::kFLOAT32) return read_as<float>(field);
    if (field.type == PluginFieldType::kFLOAT64) return static_cast<float>(read_as<double>(field));
    refuse(field.name, "is not a float");
}

int32_t choice_number(const AttributeSpec& attribute, const std::string& text) {
    std::vector<std::string> const choices = split(attribute.choices);
    auto const found = std::find(choices.begin(), choices.end(), text);
    if (found == choices.end()) refuse(attribute.name, "is '" + text + "', expected one of: " + attribute.choices);
    return static_cast<int32_t>(found - choices.begin());
}

template <typename Value>
Value& slot(MlaAttributes& attributes, const AttributeSpec& attribute) {
    return *reinterpret_cast<Value*>(reinterpret_cast<char*>(&attributes) + attribute.offset);
}

void set_default(MlaAttributes& attributes, const AttributeSpec& attribute) {
    if (attribute.kind == AttributeSpec::number) {
        slot<float>(attributes, attribute) = static_cast<float>(attribute.default_value);
    } else {
        slot<int32_t>(attributes, attribute) = static_cast<int32_t>(attribute.default_value);
    }
}

void set_from(MlaAttributes& attributes, const AttributeSpec& attribute, const PluginField& field) {
    switch (attribute.kind) {
        case AttributeSpec::integer: slot<int32_t>(attributes, attribute) = integer_of(field); break;
        case AttributeSpec::number: slot<float>(attributes, attribute) = number_of(field); break;
        case AttributeSpec::text:
            slot<int32_t>(attributes, attribute) = choice_number(attribute, text_of(field));
            break;
    }
}

int32_t formal_named(const std::string& name, const TensorSpec* specs, int32_t count) {
    return static_cast<int32_t>(
        std::find_if(specs, specs + count, [&](const TensorSpec& spec) { return spec.name == name; }) - specs);
}

// Formals by their names, each at most once, none that is `held`, and none that must be there left out.
std::vector<int32_t> formals_named(const char* field, const std::string& names, const TensorSpec* specs, int32_t count,
                                   const std::vector<std::string>& held) {
    std::vector<int32_t> formals;
    auto const is_held = [&](const std::string& name) {
        return std::find(held.begin(), held.end(), name) != held.end();
    };
    auto const has = [&](int32_t formal) {
        return std::find(formals.begin(), formals.end(), formal) != formals.end();
    };
    for (const std::string& name : split(names)) {
        int32_t const formal = formal_named(name, specs, count);
        if (formal == count) refuse(field, "names '" + name + "', which the op does not have");
        if (is_held(name)) refuse(field, "names '" + name + "', which the plugin holds");
        if (has(formal)) refuse(field, "names '" + name + "' twice");
        formals.push_back(formal);
    }
    for (int32_t formal = 0; formal < count; ++formal) {
        if (!specs[formal].optional && !has(formal) && !is_held(specs[formal].name)) {
            refuse(field, "lacks '" + std::string(specs[formal].name) + "', which the op needs");
        }
    }
    return formals;
}

// Formals that a field names, if the node has it.
std::vector<int32_t> formals_among(const char* field, const nvinfer1::PluginFieldCollection& fields, const TensorSpec* specs, int32_t count) {
    std::vector<int32_t> formals;
    const PluginField* const names = find(fields, field);
    if (names == nullptr) return formals;
    for (const std::string& name : split(text_of(*names))) {
        int32_t const formal = formal_named(name, specs, count);
        if (formal == count) refuse(field, "names '" + name + "', which the op does not have");
        formals.push_back(formal);
    }
    return formals;
}

std::vector<int32_t> first_formals(int32_t count) {
    std::vector<int32_t> formals(static_cast<size_t>(count));
    for (int32_t i = 0; i < count; ++i) formals[static_cast<size_t>(i)] = i;
    return formals;
}

std::vector<const Pool*> pools_named(const std::string& names, const OpSpec& spec) {
    std::vector<const Pool*> found;
    for (const std::string& name : split(names)) {
        auto const* const pool =
            std::find_if(std::begin(pools), std::end(pools), [&](const Pool& entry) { return name == entry.input; });
        if (pool == std::end(pools) || formal_named(pool->input, spec.input, spec.inputs) == spec.inputs ||
            formal_named(pool->output, spec.output, spec.outputs) == spec.outputs) {
            refuse(resident_field, "names '" + name + "', which is no pool that the op updates");
        }
        if (std::find(found.begin(), found.end(), pool) != found.end()) {
            refuse(resident_field, "names '" + name + "' twice");
        }
        found.push_back(pool);
    }
    return found;
}

void read_resident(Instance& instance, const nvinfer1::PluginFieldCollection& fields) {
    const PluginField* names = find(fields, resident_field);
    if (names == nullptr) return;
    instance.resident = pools_named(text_of(*names), instance.spec());
    if (instance.resident.empty()) return;
    for (const char* const needed : {inputs_field, outputs_field, pages_field}) {
        if (find(fields, needed) == nullptr) refuse(needed, "is missing, which a node with resident pools needs");
    }
    instance.resident_pages = integer_of(*find(fields, pages_field));
    if (instance.resident_pages < 1) refuse(pages_field, "is less than 1");
}

std::string names_of(const std::vector<int32_t>& formals, const TensorSpec* specs) {
    std::string names;
    for (int32_t const formal : formals) names += (names.empty() ? "" : " ") + std::string(specs[formal].name);
    return names;
}

}  // namespace

int32_t Instance::position_of(std::string_view input_name) const {
    int32_t const count = knows_inputs ? input_count() : spec().inputs;
    for (int32_t i = 0; i < count; ++i) {
        if (input_name == spec().input[knows_inputs ? input_formal(i) : i].name) return i;
    }
    return -1;
}

void Instance::settle_inputs(int32_t count) {
    if (!knows_inputs) {
        if (count > spec().inputs) {
            throw std::invalid_argument("the node has " + std::to_string(count) + " inputs, but the op has " +
                                        std::to_string(spec().inputs));
        }
        for (int32_t formal = count; formal < spec().inputs; ++formal) {
            if (spec().input[formal].optional) continue;
            throw std::invalid_argument("the input '" + std::string(spec().input[formal].name) + "' is missing");
        }
        inputs = first_formals(count);
        knows_inputs = true;
    }
    if (count != input_count()) {
        throw std::invalid_argument("the node has " + std::to_string(count) + " inputs, but its attribute '" +
                                    inputs_field + "' names " + std::to_string(input_count()));
    }
}

Instance read_instance(int32_t op, const nvinfer1::PluginFieldCollection& fields) {
    Instance instance;
    instance.op = op;
    const OpSpec& spec = instance.spec();
    for (int32_t i = 0; i < spec.attributes; ++i) {
        const AttributeSpec& attribute = spec.attribute[i];
        const PluginField* field = find(fields, attribute.name);
        if (field != nullptr) {
            set_from(instance.attributes, attribute, *field);
        } else if (attribute.required) {
            refuse(attribute.name, "is missing");
        } else {
            set_default(instance.attributes, attribute);
        }
    }
    read_resident(instance, fields);
    std::vector<std::string> held_inputs, held_outputs;
    for (const Pool* pool : instance.resident) {
        held_inputs.emplace_back(pool->input);
        held_outputs.emplace_back(pool->output);
    }
    const PluginField* inputs = find(fields, inputs_field);
    if (inputs != nullptr) {
        instance.inputs = formals_named(inputs_field, text_of(*inputs), spec.input, spec.inputs, held_inputs);
        instance.knows_inputs = true;
    }
    const PluginField* outputs = find(fields, outputs_field);
    instance.outputs = outputs == nullptr
                           ? first_formals(spec.outputs)
                           : formals_named(outputs_field, text_of(*outputs), spec.output, spec.outputs, held_outputs);
    instance.rows = formals_among(rows_field, fields, spec.input, spec.inputs);
    for (int32_t const formal : instance.rows) {
        const TensorSpec& rows = spec.input[formal];
        if (rows.shape != nullptr && each_word(rows.shape, [](int32_t, std::string_view) {}) != 2) {
            refuse(rows_field, "names '" + std::string(rows.name) + "', which is no rows but [" + rows.shape + "]");
        }
    }
    instance.batched = formals_among(batched_field, fields, spec.output, spec.outputs);
    return instance;
}

std::string choice_text(const AttributeSpec& attribute, int32_t number) {
    return split(attribute.choices).at(static_cast<size_t>(number));
}

InstanceFields::InstanceFields(const Instance& instance)
    : attributes_(instance.attributes), resident_pages_(instance.resident_pages) {
    const OpSpec& spec = instance.spec();
    texts_.reserve(static_cast<size_t>(spec.attributes) + 5);  // fields point into the texts: they must not move
    for (int32_t i = 0; i < spec.attributes; ++i) {
        const AttributeSpec& attribute = spec.attribute[i];
        if (attribute.kind == AttributeSpec::text) {
            add_text(attribute.name, choice_text(attribute, slot<int32_t>(attributes_, attribute)));
        } else {
            auto const type =
                attribute.kind == AttributeSpec::number ? PluginFieldType::kFLOAT32 : PluginFieldType::kINT32;
            fields_.emplace_back(attribute.name, &slot<int32_t>(attributes_, attribute), type, 1);
        }
    }
    if (instance.knows_inputs) add_text(inputs_field, names_of(instance.inputs, spec.input));
    add_text(outputs_field, names_of(instance.outputs, spec.output));
    if (!instance.rows.empty()) add_text(rows_field, names_of(instance.rows, spec.input));
    if (!instance.batched.empty()) add_text(batched_field, names_of(instance.batched, spec.output));
    if (!instance.resident.empty()) {
        std::string names;
        for (const Pool* pool : instance.resident) names += (names.empty() ? "" : " ") + std::string(pool->input);
        add_text(resident_field, names);
        fields_.emplace_back(pages_field, &resident_pages_, PluginFieldType::kINT32, 1);
    }
    collection_ = {static_cast<int32_t>(fields_.size()), fields_.data()};
}

void InstanceFields::add_text(const char* name, const std::string& text) {
    texts_.push_back(text);
    fields_.emplace_back(name, texts_.back().data(), PluginFieldType::kCHAR, static_cast<int32_t>(text.size()));
}

std::string InstanceFields::text() const {
    std::ostringstream stream;
    for (const PluginField& field : fields_) {
        stream << field.name << '=';
        switch (field.type) {
            case PluginFieldType::kINT32: stream << read_as<int32_t>(field); break;
            case PluginFieldType::kFLOAT32: stream << std::hexfloat << read_as<float>(field); break;
            default: stream << text_of(field); break;
        }
        stream << ';';
    }
    return stream.str();
}

}  // namespace mla::tensorrt
