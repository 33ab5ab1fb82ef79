#include "log.h"

#include <atomic>
#include <cstdio>
#include <cstring>

namespace mla::tensorrt {
namespace {

std::atomic<nvinfer1::ILoggerFinder*> logger_finder{nullptr};

}  // namespace

void set_logger_finder(nvinfer1::ILoggerFinder* finder) noexcept { logger_finder = finder; }

void log(nvinfer1::ILogger::Severity severity, const std::string& message) noexcept {
    try {
        nvinfer1::ILoggerFinder* const finder = logger_finder;
        nvinfer1::ILogger* logger = finder == nullptr ? nullptr : finder->findLogger();
        if (logger == nullptr) logger = getLogger();
        if (logger != nullptr) {
            logger->log(severity, ("mla_trt: " + message).c_str());
        } else {
            fprintf(stderr, "mla_trt: %s\n", message.c_str());
        }
    } catch (...) {
    }
}

void log_error(const char* name, const char* text) noexcept {
    try {
        bool const is_named = strncmp(text, name, strlen(name)) == 0;
        log(nvinfer1::ILogger::Severity::kERROR, is_named ? std::string(text) : std::string(name) + ": " + text);
    } catch (...) {
    }
}

}  // namespace mla::tensorrt
