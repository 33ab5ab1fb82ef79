// Stands in for libnvinfer when the plugin library is linked: it gives the name to find at load time (the soname) and the
// symbols, so that no TensorRT library is needed to build.
extern "C" {
__attribute__((visibility("default"))) void* getPluginRegistry() noexcept { return nullptr; }
__attribute__((visibility("default"))) void* getLogger() noexcept { return nullptr; }
}
