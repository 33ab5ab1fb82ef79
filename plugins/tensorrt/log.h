// Messages to TensorRT's logger, and the guard around everything that TensorRT calls: its interfaces are noexcept.
#pragma once

#include <exception>
#include <string>

#include <NvInferRuntime.h>

namespace mla::tensorrt {

void set_logger_finder(nvinfer1::ILoggerFinder* finder) noexcept;

// To the logger of the finder, else to TensorRT's own, else to stderr.
void log(nvinfer1::ILogger::Severity severity, const std::string& message) noexcept;

// Logs an error under `name`, unless the text names it already.
void log_error(const char* name, const char* text) noexcept;

// Runs `work`; what it throws is logged under `name`. 0, or 1 after an exception.
template <typename Work>
int32_t guarded(const char* name, Work&& work) noexcept {
    try {
        work();
        return 0;
    } catch (const std::exception& error) {
        log_error(name, error.what());
    } catch (...) {
        log_error(name, "an exception of an unknown type");
    }
    return 1;
}

}  // namespace mla::tensorrt
