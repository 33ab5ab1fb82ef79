// A libnvinfer of nothing but a plugin registry, which treats plugin libraries as TensorRT 10.6's was seen to: loadLibrary
// opens the library, gives it the logger finder, asks for its creators, and closes it again when one of them is registered.
#include <NvInferRuntime.h>
#include <dlfcn.h>

#include <map>
#include <string>
#include <vector>

using namespace nvinfer1;

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

using CreatorList = IPluginCreatorInterface* const* (*)(int32_t&);

struct Finder final : ILoggerFinder {
    ILogger* findLogger() override { return nullptr; }
};

// Names are asked for once, at registration: a creator may be gone when the registry still holds it.
struct Entry {
    std::string name;
    IPluginCreatorInterface* creator;
};

class Registry final : public IPluginRegistry {
public:
    bool registerCreator(IPluginCreatorInterface& creator, const char* space) noexcept override {
        std::string const name = key(creator, space);
        for (const Entry& entry : entries_) {
            if (entry.name == name) return false;
        }
        entries_.push_back({name, &creator});
        return true;
    }
    bool deregisterCreator(const IPluginCreatorInterface& creator) noexcept override {
        for (size_t i = 0; i < entries_.size(); ++i) {
            if (entries_[i].creator != &creator) continue;
            entries_.erase(entries_.begin() + static_cast<std::ptrdiff_t>(i));
            return true;
        }
        return false;
    }
    IPluginCreatorInterface* getCreator(const char* name, const char* version, const char* space) noexcept override {
        for (const Entry& entry : entries_) {
            if (entry.name != std::string(space) + "::" + name + "::" + version) continue;
            (void)entry.creator->getInterfaceInfo();  // reads the creator, as TensorRT does
            return entry.creator;
        }
        return nullptr;
    }
    PluginLibraryHandle loadLibrary(const char* path) noexcept override {
        void* const library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
        if (library == nullptr) return nullptr;
        auto const set_finder = reinterpret_cast<void (*)(ILoggerFinder*)>(dlsym(library, "setLoggerFinder"));
        auto const list = reinterpret_cast<CreatorList>(dlsym(library, "getCreators"));
        if (set_finder != nullptr) set_finder(&finder_);
        int32_t count = 0;
        IPluginCreatorInterface* const* creators = list == nullptr ? nullptr : list(count);
        bool ok = creators != nullptr;
        for (int32_t i = 0; i < count && ok; ++i) {
            ok = registerCreator(*creators[i], static_cast<IPluginCreatorV3One*>(creators[i])->getPluginNamespace());
        }
        if (ok) return library;
        dlclose(library);
        return nullptr;
    }
    void deregisterLibrary(PluginLibraryHandle library) noexcept override {
        auto const list = reinterpret_cast<CreatorList>(dlsym(library, "getCreators"));
        int32_t count = 0;
        IPluginCreatorInterface* const* creators = list(count);
        for (int32_t i = 0; i < count; ++i) deregisterCreator(*creators[i]);
        dlclose(library);
    }

    void setErrorRecorder(IErrorRecorder*) noexcept override {}
    IErrorRecorder* getErrorRecorder() const noexcept override { return nullptr; }
    bool isParentSearchEnabled() const override { return true; }
    void setParentSearchEnabled(bool) override {}
    IPluginCreatorInterface* const* getAllCreators(int32_t*) const noexcept override { return nullptr; }
    IPluginResource* acquirePluginResource(const char*, IPluginResource*) noexcept override { return nullptr; }
    int32_t releasePluginResource(const char*) noexcept override { return 0; }
#if NV_TENSORRT_MAJOR == 10
    bool registerCreator(IPluginCreator&, const char*) noexcept override { return false; }
    bool deregisterCreator(const IPluginCreator&) noexcept override { return false; }
    IPluginCreator* const* getPluginCreatorList(int32_t*) const noexcept override { return nullptr; }
    IPluginCreator* getPluginCreator(const char*, const char*, const char*) noexcept override { return nullptr; }
#else
    IPluginCreatorInterface* const* getAllCreatorsRecursive(int32_t*) noexcept override { return nullptr; }
#endif

private:
    static std::string key(IPluginCreatorInterface& creator, const char* space) {
        auto& one = static_cast<IPluginCreatorV3One&>(creator);
        return std::string(space) + "::" + one.getPluginName() + "::" + one.getPluginVersion();
    }

    std::vector<Entry> entries_;
    Finder finder_;
};

}  // namespace

EXPORT IPluginRegistry* getPluginRegistry() noexcept {
    static Registry registry;
    return &registry;
}

EXPORT ILogger* getLogger() noexcept { return nullptr; }
