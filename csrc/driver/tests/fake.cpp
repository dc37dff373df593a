#include "driver/tests/fake.hpp"

#include <cstring>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "driver/abi.hpp"

extern "C" __attribute__((weak)) const rgfast::driver::fake::Emulated* rgfast_emulated(const char*) {
  return nullptr;
}

namespace rgfast::driver::fake {
namespace {

struct Named {
  std::string name;
  int parameters = 0;
  int shared = 0;
  bool there = true;
};

struct State {
  std::map<std::string, std::int64_t> settings{
      {"version", 13000}, {"devices", 1},    {"major", 9},     {"minor", 0},   {"shared", 232448},
      {"ratio", 2},       {"clusters", 132}, {"capturing", 0}, {"running", 1}, {"threads", 1024}};
  std::map<std::string, int> failing;
  std::set<std::string> lacking;
  std::string log;
  std::string told;
};

// Recursive: a kernel that runs inside cuLaunchKernelEx may ask.
std::recursive_mutex mutex;
State state;
// Not forgotten, since handles of a Driver that is still there are addresses of these.
std::map<std::string, Named> kernels;
thread_local std::vector<Context> stack;
// Handles are addresses of these; a device's context is that of its place.
char contexts[64];
char library;

std::string quoted(const std::string& text) { return "\"" + text + "\""; }

Context current() { return stack.empty() ? nullptr : stack.back(); }

int ordinal(Context context) {
  return context == nullptr ? -1 : static_cast<int>(reinterpret_cast<char*>(context) - contexts);
}

// Adds a call to the log. Returns what it is to fail with.
Result call(const char* function, const std::string& more = "") {
  state.log += "{\"call\": " + quoted(function) + ", \"context\": " + std::to_string(ordinal(current())) +
               (more.empty() ? "" : ", " + more) + "}\n";
  const auto found = state.failing.find(function);
  return found == state.failing.end() ? kSuccess : static_cast<Result>(found->second);
}

std::string number(const char* name, std::int64_t value) {
  return quoted(name) + ": " + std::to_string(value);
}

#define RGFAST_FAKE_BEGIN(...)                             \
  const std::lock_guard<std::recursive_mutex> lock(mutex); \
  if (const Result code = call(__VA_ARGS__); code != kSuccess) return code

// A kernel's or function's handle is the address of its entry.
const Named* entry(const void* handle) { return static_cast<const Named*>(handle); }

Result init(unsigned) {
  RGFAST_FAKE_BEGIN("cuInit");
  return kSuccess;
}

Result driver_version(int* version) {
  RGFAST_FAKE_BEGIN("cuDriverGetVersion");
  *version = static_cast<int>(state.settings["version"]);
  return kSuccess;
}

Result error_name(Result code, const char** name) {
  *name = code == kIllegalAddress ? "CUDA_ERROR_ILLEGAL_ADDRESS" : "CUDA_ERROR_FAKE";
  return kSuccess;
}

Result error_string(Result, const char** text) {
  *text = "what the driver says of it";
  return kSuccess;
}

Result device_count(int* count) {
  RGFAST_FAKE_BEGIN("cuDeviceGetCount");
  *count = static_cast<int>(state.settings["devices"]);
  return kSuccess;
}

Result device(Device* device, int ordinal) {
  RGFAST_FAKE_BEGIN("cuDeviceGet", number("ordinal", ordinal));
  if (ordinal < 0 || ordinal >= state.settings["devices"]) return kInvalidDevice;
  *device = ordinal;
  return kSuccess;
}

Result device_name(char* name, int length, Device device) {
  RGFAST_FAKE_BEGIN("cuDeviceGetName", number("device", device));
  std::strncpy(name, ("Fake GPU " + std::to_string(device)).c_str(), static_cast<std::size_t>(length));
  return kSuccess;
}

Result device_attribute(int* value, DeviceAttribute attribute, Device device) {
  RGFAST_FAKE_BEGIN("cuDeviceGetAttribute", number("device", device) + ", " + number("attribute", attribute));
  static const std::map<int, const char*> names{{kComputeCapabilityMajor, "major"},
                                                {kComputeCapabilityMinor, "minor"},
                                                {kMaxSharedPerBlockOptin, "shared"},
                                                {kSingleToDoubleRatio, "ratio"},
                                                {kMultiprocessorCount, "clusters"}};
  const auto found = names.find(attribute);
  if (found == names.end()) return kInvalidValue;
  *value = static_cast<int>(state.settings[found->second]);
  return kSuccess;
}

Result retain_primary(Context* context, Device device) {
  RGFAST_FAKE_BEGIN("cuDevicePrimaryCtxRetain", number("device", device));
  *context = reinterpret_cast<Context>(&contexts[device]);
  return kSuccess;
}

Result push_context(Context context) {
  RGFAST_FAKE_BEGIN("cuCtxPushCurrent", number("pushed", ordinal(context)));
  stack.push_back(context);
  return kSuccess;
}

Result pop_context(Context* context) {
  RGFAST_FAKE_BEGIN("cuCtxPopCurrent");
  if (stack.empty()) return kInvalidContext;
  *context = stack.back();
  stack.pop_back();
  return kSuccess;
}

Result load_library(Library* loaded, const void*, int*, void**, unsigned, int*, void**, unsigned) {
  RGFAST_FAKE_BEGIN("cuLibraryLoadData");
  *loaded = reinterpret_cast<Library>(&library);
  return kSuccess;
}

Result library_kernel(Kernel* kernel, Library, const char* name) {
  RGFAST_FAKE_BEGIN("cuLibraryGetKernel", "\"kernel\": " + quoted(name));
  Named& found = kernels[name];
  if (const Emulated* emulated = rgfast_emulated(name); emulated != nullptr)
    found = {name, emulated->parameters, 0, true};
  if (found.name.empty() || !found.there) return kNotFound;
  *kernel = reinterpret_cast<Kernel>(&found);
  return kSuccess;
}

Result kernel_function(Function* function, Kernel kernel) {
  RGFAST_FAKE_BEGIN("cuKernelGetFunction", "\"kernel\": " + quoted(entry(kernel)->name));
  if (current() == nullptr) return kInvalidContext;
  *function = reinterpret_cast<Function>(kernel);
  return kSuccess;
}

Result function_attribute(int* value, FunctionAttribute attribute, Function function) {
  RGFAST_FAKE_BEGIN("cuFuncGetAttribute", number("attribute", attribute));
  *value = attribute == kMaxThreadsPerBlock  ? static_cast<int>(state.settings["threads"])
           : attribute == kStaticSharedBytes ? entry(function)->shared
           : attribute == kRegisters         ? 32
                                             : 0;
  return kSuccess;
}

Result set_function_attribute(Function function, FunctionAttribute attribute, int value) {
  RGFAST_FAKE_BEGIN("cuFuncSetAttribute", "\"kernel\": " + quoted(entry(function)->name) + ", " +
                                              number("attribute", attribute) + ", " + number("value", value));
  return kSuccess;
}

Result is_capturing(Stream stream, CaptureStatus* status) {
  RGFAST_FAKE_BEGIN("cuStreamIsCapturing", number("stream", reinterpret_cast<std::int64_t>(stream)));
  if (current() == nullptr) return kInvalidContext;
  *status = static_cast<CaptureStatus>(state.settings["capturing"]);
  return kSuccess;
}

std::string described(const LaunchConfig& config) {
  const auto three = [](unsigned x, unsigned y, unsigned z) {
    return "[" + std::to_string(x) + ", " + std::to_string(y) + ", " + std::to_string(z) + "]";
  };
  const bool clustered = config.attribute_count == 1 && config.attributes->id == kClusterDimension;
  return "\"grid\": " + three(config.grid_x, config.grid_y, config.grid_z) +
         ", \"block\": " + three(config.block_x, config.block_y, config.block_z) + ", " +
         number("shared", config.shared_bytes) + ", " +
         number("stream", reinterpret_cast<std::int64_t>(config.stream)) + ", " +
         number("cluster", clustered ? config.attributes->value.cluster.x : 1);
}

Result active_clusters(int* clusters, Function function, const LaunchConfig* config) {
  RGFAST_FAKE_BEGIN("cuOccupancyMaxActiveClusters",
                    "\"kernel\": " + quoted(entry(function)->name) + ", " + described(*config));
  *clusters = static_cast<int>(state.settings["clusters"]);
  return kSuccess;
}

Result launch(const LaunchConfig* config, Function function, void** parameters, void**) {
  const Named kernel = *entry(function);
  const Emulated* emulated = nullptr;
  {
    std::string words;
    for (int k = 0; k < kernel.parameters; ++k) {
      std::uint64_t word = 0;
      std::memcpy(&word, parameters[k], sizeof(word));
      words += (k == 0 ? "" : ", ") + std::to_string(word);
    }
    RGFAST_FAKE_BEGIN("cuLaunchKernelEx", "\"kernel\": " + quoted(kernel.name) + ", " + described(*config) +
                                              ", \"words\": [" + words + "]");
    if (current() == nullptr) return kInvalidContext;
    if (state.settings["running"] != 0) emulated = rgfast_emulated(kernel.name.c_str());
  }
  if (emulated == nullptr) return kSuccess;
  Launch asked{};
  asked.grid[0] = config->grid_x;
  asked.grid[1] = config->grid_y;
  asked.grid[2] = config->grid_z;
  asked.block[0] = config->block_x;
  asked.block[1] = config->block_y;
  asked.block[2] = config->block_z;
  asked.shared_bytes = config->shared_bytes;
  asked.cluster = config->attribute_count == 1 ? config->attributes->value.cluster.x : 1;
  emulated->run(asked, parameters);
  return kSuccess;
}

Result function_parameter(Function function, std::size_t index, std::size_t* offset, std::size_t* size) {
  const std::lock_guard<std::recursive_mutex> lock(mutex);
  if (index >= static_cast<std::size_t>(entry(function)->parameters)) return kInvalidValue;
  *offset = 8 * index;
  *size = 8;
  return kSuccess;
}

Result get_proc_address(const char* symbol, void** function, int version, std::uint64_t flags,
                        ProcAddressStatus* status) {
  const std::lock_guard<std::recursive_mutex> lock(mutex);
  const std::string name(symbol);
  *function = nullptr;
  *status = kProcNotFound;
  if (flags != kLegacyStream || state.lacking.count(name) != 0) return kNotFound;
  if (version > state.settings["version"]) {
    *status = kProcVersionNotSufficient;
    return kNotFound;
  }
#define RGFAST_FAKE_FIND(ours, theirs, since, parameters) \
  if (name == #theirs) *function = reinterpret_cast<void*>(static_cast<decltype(Api::ours)>(&ours));
  RGFAST_DRIVER_FUNCTIONS(RGFAST_FAKE_FIND)
  RGFAST_DRIVER_OPTIONAL_FUNCTIONS(RGFAST_FAKE_FIND)
#undef RGFAST_FAKE_FIND
  if (*function == nullptr) return kNotFound;
  *status = kProcFound;
  return kSuccess;
}

}  // namespace
}  // namespace rgfast::driver::fake

using rgfast::driver::fake::state;
using Lock = std::lock_guard<std::recursive_mutex>;

extern "C" {

rgfast::driver::Result cuGetProcAddress_v2(const char* symbol, void** function, int version,
                                           std::uint64_t flags, rgfast::driver::ProcAddressStatus* status) {
  return rgfast::driver::fake::get_proc_address(symbol, function, version, flags, status);
}

void fake_reset() {
  const Lock lock(rgfast::driver::fake::mutex);
  state = {};
  for (auto& each : rgfast::driver::fake::kernels) each.second.there = false;
}

void fake_kernel(const char* name, int parameters, int shared) {
  const Lock lock(rgfast::driver::fake::mutex);
  rgfast::driver::fake::kernels[name] = {name, parameters, shared, true};
}

void fake_set(const char* what, std::int64_t value) {
  const Lock lock(rgfast::driver::fake::mutex);
  state.settings.at(what) = value;
}

void fake_fail(const char* function, int code) {
  const Lock lock(rgfast::driver::fake::mutex);
  state.failing[function] = code;
}

void fake_lacks(const char* function) {
  const Lock lock(rgfast::driver::fake::mutex);
  state.lacking.insert(function);
}

const char* fake_log() {
  const Lock lock(rgfast::driver::fake::mutex);
  state.told = std::move(state.log);
  state.log.clear();
  return state.told.c_str();
}
}
