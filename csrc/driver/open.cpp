// Opening the driver: the library, its functions, the version, the devices.
#include <dlfcn.h>
#include <unistd.h>

#include <string>
#include <utility>

#include "driver/driver.hpp"

namespace rgfast::driver {
namespace {

// The oldest driver of each CUDA release, by NVIDIA's table of compatibility.
std::string needed_driver(int major) {
  if (major >= 13) return "NVIDIA driver 580 or later";
  return "NVIDIA driver 525 or later";
}

std::string release(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

void* entry(GetProcAddress get, const char* symbol, int version, const std::string& path, bool needed) {
  void* found = nullptr;
  ProcAddressStatus status = kProcFound;
  const Result code = get(symbol, &found, version, kLegacyStream, &status);
  if (code == kSuccess && status == kProcFound && found != nullptr) return found;
  if (!needed) return nullptr;
  throw Error("the CUDA driver (" + path + ") has no " + symbol + " of CUDA " + release(version) + ": " +
              needed_driver(12) + " is needed");
}

Api resolve(const std::string& path) {
  // Kept open: threads of the driver run until the process ends.
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    const char* why = dlerror();
    throw Error("there is no CUDA driver (" + std::string(why == nullptr ? path : why) + ")");
  }
  const auto get = reinterpret_cast<GetProcAddress>(dlsym(library, kGetProcAddress));
  if (get == nullptr)
    throw Error("the CUDA driver (" + path + ") has no " + kGetProcAddress + ": " + needed_driver(12) +
                " is needed");
  Api api;
#define RGFAST_RESOLVE(name, symbol, version, parameters) \
  api.name = reinterpret_cast<decltype(api.name)>(entry(get, #symbol, version, path, true));
#define RGFAST_RESOLVE_OPTIONAL(name, symbol, version, parameters) \
  api.name = reinterpret_cast<decltype(api.name)>(entry(get, #symbol, version, path, false));
  RGFAST_DRIVER_FUNCTIONS(RGFAST_RESOLVE)
  RGFAST_DRIVER_OPTIONAL_FUNCTIONS(RGFAST_RESOLVE_OPTIONAL)
#undef RGFAST_RESOLVE
#undef RGFAST_RESOLVE_OPTIONAL
  return api;
}

}  // namespace

Driver::Driver(const std::string& path, Image image)
    : api_(resolve(path)), image_(std::move(image)), process_(getpid()) {
  const Result begun = api_.init(0);
  if (begun == kNoDevice) throw Error("the CUDA driver finds no GPU");
  if (begun == kNotInitialized)
    throw Error(
        "the CUDA driver cannot start in this process, which was forked from one that had used it: start "
        "processes by 'spawn'");
  if (begun == kStubLibrary)
    throw Error(path + " is a stub to link against and no CUDA driver: remove it from the library path");
  if (begun == kSystemDriverMismatch)
    throw Error(
        "the CUDA driver's library and its kernel module are of different versions: restart the machine");
  good(begun, "starting the CUDA driver");
  good(api_.driver_version(&version_), "asking for the CUDA driver's version");
  // Code for another major release is refused by the driver with a message that names neither.
  if (version_ / 1000 < image_.major)
    throw Error("the CUDA driver supports CUDA " + release(version_) +
                ", and the kernels were built by nvcc " + std::to_string(image_.major) + "." +
                std::to_string(image_.minor) + ": " + needed_driver(image_.major) + " is needed");
  int count = 0;
  good(api_.device_count(&count), "counting GPUs");
  if (count < 1) throw Error("the CUDA driver finds no GPU");
  devices_.resize(static_cast<std::size_t>(count));
  for (int k = 0; k < count; ++k)
    good(api_.device(&devices_[static_cast<std::size_t>(k)].device, k),
         "asking for cuda:" + std::to_string(k));
}

}  // namespace rgfast::driver
