// The shape words of the op table ("T", "R+Dr", "ceil(Dr/2)", "ceil(H*M/128)", "num_partitions+1") over any kind of value: numbers, or
// the expressions from which TensorRT computes shapes at run time.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <map>
#include <stdexcept>
#include <string>
#include <string_view>

namespace mla::tensorrt {

template <typename Value>
using Letters = std::map<std::string_view, Value>;

// Calls visit(axis, word) for each word; returns the number of axes.
template <typename Visit>
int32_t each_word(std::string_view shape, Visit&& visit) {
    int32_t axis = 0;
    while (!shape.empty()) {
        size_t const length = std::min(shape.find(' '), shape.size());
        visit(axis++, shape.substr(0, length));
        shape.remove_prefix(std::min(length + 1, shape.size()));
    }
    return axis;
}

inline bool is_letter(std::string_view word) {
    bool const is_number = word[0] >= '0' && word[0] <= '9';
    return !is_number && word.find_first_of("+(") == std::string_view::npos;
}

inline int64_t number_of(std::string_view digits) { return strtoll(std::string(digits).c_str(), nullptr, 10); }

// `Algebra` has a type Value and makes values: constant(n), sum(a, b), product(a, b), ceil_div(a, n).
template <typename Algebra>
typename Algebra::Value evaluate(std::string_view word, const Letters<typename Algebra::Value>& letters,
                                 Algebra& algebra) {
    auto const letter = [&](std::string_view name) {
        auto const found = letters.find(name);
        if (found == letters.end()) {
            throw std::invalid_argument("no input and no attribute says how long '" + std::string(name) + "' is");
        }
        return found->second;
    };
    size_t const plus = word.find('+');
    if (plus != std::string_view::npos) {
        return algebra.sum(evaluate(word.substr(0, plus), letters, algebra),
                           evaluate(word.substr(plus + 1), letters, algebra));
    }
    if (is_letter(word)) return letter(word);
    constexpr std::string_view ceil = "ceil(";
    if (word.substr(0, ceil.size()) != ceil) return algebra.constant(number_of(word));
    size_t const slash = word.find('/');
    std::string_view const inner = word.substr(ceil.size(), slash - ceil.size());
    size_t const star = std::min(inner.find('*'), inner.size());
    typename Algebra::Value value = letter(inner.substr(0, star));
    if (star < inner.size()) value = algebra.product(value, letter(inner.substr(star + 1)));
    return algebra.ceil_div(value, number_of(word.substr(slash + 1)));
}

struct Numbers {
    using Value = int64_t;
    Value constant(int64_t value) const { return value; }
    Value sum(Value first, Value second) const { return first + second; }
    Value product(Value first, Value second) const { return first * second; }
    Value ceil_div(Value value, int64_t divisor) const { return (value + divisor - 1) / divisor; }
};

}  // namespace mla::tensorrt
