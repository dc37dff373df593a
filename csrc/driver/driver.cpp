// Devices, kernels and launches; open.cpp has how the driver is opened.
#include "driver/driver.hpp"

#include <unistd.h>

namespace rgfast::driver {
namespace {

constexpr int kUnasked = 48 << 10;  // bytes of shared memory that every kernel may use

std::string on(int device) { return "cuda:" + std::to_string(device); }

LaunchConfig configured(const Launch& launch, LaunchAttribute& attribute) {
  LaunchConfig config{};
  config.grid_x = launch.grid[0];
  config.grid_y = launch.grid[1];
  config.grid_z = launch.grid[2];
  config.block_x = launch.block;
  config.block_y = config.block_z = 1;
  config.shared_bytes = launch.shared_bytes;
  config.stream = reinterpret_cast<Stream>(launch.stream);
  if (launch.cluster > 1) {
    attribute.id = kClusterDimension;
    attribute.value.cluster = {launch.cluster, 1, 1};
    config.attributes = &attribute;
    config.attribute_count = 1;
  }
  return config;
}

void sensible(const Launch& launch) {
  const auto& [x, y, z] = launch.grid;
  if (x == 0 || y == 0 || z == 0)
    throw Error("grid must have no side of 0, got (" + std::to_string(x) + ", " + std::to_string(y) + ", " +
                std::to_string(z) + ") for " + launch.kernel);
  if (launch.block == 0) throw Error("block must be at least 1, got 0 for " + launch.kernel);
  if (launch.cluster == 0 || x % launch.cluster != 0)
    throw Error("cluster must divide the grid's first side, " + std::to_string(x) + ", got " +
                std::to_string(launch.cluster) + " for " + launch.kernel);
}

}  // namespace

// The context of a device is current on this thread while one of these lives.
class Driver::Pushed {
 public:
  Pushed(const Driver& driver, Context context) : api_(driver.api_) {
    driver.good(api_.push_context(context), "making the device's context current");
  }
  ~Pushed() {
    Context popped = nullptr;
    api_.pop_context(&popped);
  }
  Pushed(const Pushed&) = delete;
  Pushed& operator=(const Pushed&) = delete;

 private:
  const Api& api_;
};

void Driver::same_process() const {
  if (getpid() != process_)
    throw Error(
        "this process was forked from one that had opened the CUDA driver: start processes by 'spawn'");
}

std::string Driver::spoken(Result code) const {
  const char* name = nullptr;
  const char* text = nullptr;
  if (api_.error_name(code, &name) != kSuccess || name == nullptr) name = "unknown error";
  if (api_.error_string(code, &text) != kSuccess || text == nullptr) text = "the driver has no text for it";
  return std::string(name) + " (" + std::to_string(code) + "): " + text;
}

void Driver::good(Result code, const std::string& what) const {
  if (code != kSuccess) throw Error(what + " failed: " + spoken(code));
}

// The mutex must be held. Retains the primary context at first: torch's, or the one that torch will use.
Driver::Place& Driver::place(int device) {
  known(device);
  Place& found = devices_[static_cast<std::size_t>(device)];
  if (found.context == nullptr) {
    const Result code = api_.retain_primary(&found.context, found.device);
    if (code != kSuccess) found.context = nullptr;
    if (code == kDeviceUnavailable)
      throw Error(on(device) + " is in use by another process that has it for itself");
    good(code, "taking the context of " + on(device));
  }
  return found;
}

Device Driver::known(int device) const {
  if (device < 0 || device >= device_count())
    throw Error("device must be one of the " + std::to_string(device_count()) +
                " that the CUDA driver finds, got " + on(device));
  return devices_[static_cast<std::size_t>(device)].device;
}

std::string Driver::device_name(int device) {
  same_process();
  std::array<char, 256> name{};
  good(api_.device_name(name.data(), static_cast<int>(name.size()) - 1, known(device)),
       "asking for the name of " + on(device));
  return name.data();
}

int Driver::attribute(int device, DeviceAttribute attribute) {
  same_process();
  int value = 0;
  good(api_.device_attribute(&value, attribute, known(device)),
       "asking " + on(device) + " for attribute " + std::to_string(attribute));
  return value;
}

std::string Driver::architecture(int device) {
  return "sm_" + std::to_string(attribute(device, kComputeCapabilityMajor)) +
         std::to_string(attribute(device, kComputeCapabilityMinor));
}

bool Driver::capturing(int device, std::uintptr_t stream) {
  const Pushed current(*this, context(device));
  CaptureStatus status = kNotCapturing;
  const Result code = api_.is_capturing(reinterpret_cast<Stream>(stream), &status);
  // Asked of the default stream, which would join a capture of another one.
  if (code == kStreamCaptureImplicit) return true;
  good(code, "asking whether a stream of " + on(device) + " is being captured");
  return status != kNotCapturing;
}

// The mutex must be held and the device's context be current.
Driver::Loaded& Driver::loaded(Place& place, int device, const std::string& kernel) {
  const auto known = place.kernels.find(kernel);
  if (known != place.kernels.end()) return known->second;
  const auto judged = [&](Result code, const std::string& what) {
    if (code == kNoBinaryForGpu || code == kInvalidImage)
      throw Error("the package has no kernels for " + architecture(device) + " (it has " + image_.holds +
                  ")");
    if (code == kUnsupportedPtxVersion)
      throw Error("the package has " + image_.holds + ", and this driver is too old to compile the PTX for " +
                  architecture(device) + ": it needs one that supports CUDA " + std::to_string(image_.major) +
                  "." + std::to_string(image_.minor));
    if (code == kNotFound)
      throw Error("the package has no kernel " + kernel + " for " + architecture(device));
    good(code, what);
  };
  if (library_ == nullptr) {
    const Result code =
        api_.load_library(&library_, image_.bytes.data(), nullptr, nullptr, 0, nullptr, nullptr, 0);
    if (code != kSuccess) library_ = nullptr;
    judged(code, "loading the package's kernels");
  }
  Kernel named = nullptr;
  judged(api_.library_kernel(&named, library_, kernel.c_str()), "looking up " + kernel);
  Loaded found;
  judged(api_.kernel_function(&found.function, named), "loading " + kernel + " on " + on(device));
  const auto ask = [&](FunctionAttribute attribute, int& value) {
    good(api_.function_attribute(&value, attribute, found.function), "asking about " + kernel);
  };
  ask(kRegisters, found.resources.registers);
  ask(kLocalBytes, found.resources.local_bytes);
  ask(kStaticSharedBytes, found.resources.static_shared_bytes);
  ask(kMaxThreadsPerBlock, found.resources.max_threads);
  found.allowed_shared = kUnasked - found.resources.static_shared_bytes;
  if (api_.function_parameter != nullptr) {
    std::size_t offset = 0;
    std::size_t size = 0;
    found.parameters = 0;
    while (api_.function_parameter(found.function, static_cast<std::size_t>(found.parameters), &offset,
                                   &size) == kSuccess) {
      if (size != sizeof(std::uint64_t))
        throw Error("parameter " + std::to_string(found.parameters) + " of " + kernel + " has " +
                    std::to_string(size) + " bytes instead of 8");
      ++found.parameters;
    }
  }
  return place.kernels.emplace(kernel, found).first->second;
}

// A kernel may use more than 48 KB of shared memory only after asking, once per function.
void Driver::claim_shared(Loaded& kernel, const Launch& launch) {
  const int most = attribute(launch.device, kMaxSharedPerBlockOptin);
  const std::int64_t wanted =
      static_cast<std::int64_t>(launch.shared_bytes) + kernel.resources.static_shared_bytes;
  if (wanted > most)
    throw Error(launch.kernel + " needs " + std::to_string(wanted) +
                " bytes of shared memory per block, and " + on(launch.device) + " (" +
                architecture(launch.device) + ") has " + std::to_string(most));
  good(api_.set_function_attribute(kernel.function, kMaxDynamicSharedBytes,
                                   static_cast<int>(launch.shared_bytes)),
       "asking for " + std::to_string(launch.shared_bytes) + " bytes of shared memory for " + launch.kernel);
  kernel.allowed_shared = static_cast<int>(launch.shared_bytes);
}

// How many clusters fit differs with the GPU and with the part of it that a process has (MIG).
void Driver::claim_clusters(Loaded& kernel, const Launch& launch) {
  const auto key = std::make_tuple(launch.block, launch.shared_bytes, launch.cluster);
  auto known = kernel.clusters.find(key);
  if (known == kernel.clusters.end()) {
    const int major = attribute(launch.device, kComputeCapabilityMajor);
    int fit = 0;
    if (major >= 9) {
      constexpr unsigned kPortable = 8;
      if (launch.cluster > kPortable && !kernel.large_clusters) {
        good(api_.set_function_attribute(kernel.function, kNonPortableClusterSizeAllowed, 1),
             "asking for clusters of " + std::to_string(launch.cluster) + " for " + launch.kernel);
        kernel.large_clusters = true;
      }
      LaunchAttribute attribute{};
      const LaunchConfig config = configured(launch, attribute);
      good(api_.active_clusters(&fit, kernel.function, &config), "asking how many clusters fit");
    }
    known = kernel.clusters.emplace(key, fit).first;
  }
  if (known->second < 1)
    throw Error(launch.kernel + " needs clusters of " + std::to_string(launch.cluster) +
                " blocks, of which " + on(launch.device) + " (" + architecture(launch.device) +
                ") has room for none");
}

// The mutex must be held and the device's context be current.
Driver::Loaded& Driver::ready(const Launch& launch) {
  Loaded& kernel = loaded(place(launch.device), launch.device, launch.kernel);
  if (launch.block > static_cast<unsigned>(kernel.resources.max_threads))
    throw Error(launch.kernel + " runs in blocks of at most " + std::to_string(kernel.resources.max_threads) +
                " threads, got " + std::to_string(launch.block));
  if (static_cast<std::int64_t>(launch.shared_bytes) > kernel.allowed_shared) claim_shared(kernel, launch);
  if (launch.cluster > 1) claim_clusters(kernel, launch);
  return kernel;
}

Context Driver::context(int device) {
  same_process();
  const std::lock_guard<std::mutex> lock(mutex_);
  return place(device).context;
}

Resources Driver::resources(int device, const std::string& kernel) {
  const Pushed current(*this, context(device));
  const std::lock_guard<std::mutex> lock(mutex_);
  return loaded(place(device), device, kernel).resources;
}

void Driver::check(const Launch& launch) {
  sensible(launch);
  const Pushed current(*this, context(launch.device));
  const std::lock_guard<std::mutex> lock(mutex_);
  ready(launch);
}

void Driver::launch(const Launch& launch) {
  sensible(launch);
  const Pushed current(*this, context(launch.device));
  Function function = nullptr;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    const Loaded& kernel = ready(launch);
    if (kernel.parameters >= 0 && static_cast<std::size_t>(kernel.parameters) != launch.words.size())
      throw Error(launch.kernel + " takes " + std::to_string(kernel.parameters) + " arguments, got " +
                  std::to_string(launch.words.size()));
    function = kernel.function;
  }
  std::vector<std::uint64_t> words = launch.words;
  std::vector<void*> parameters;
  for (std::uint64_t& word : words) parameters.push_back(&word);
  LaunchAttribute attribute{};
  const LaunchConfig config = configured(launch, attribute);
  const Result code = api_.launch(&config, function, parameters.data(), nullptr);
  const std::string what = "launching " + launch.kernel + " on " + on(launch.device);
  if (code == kLaunchOutOfResources)
    throw Error(what + " failed: it needs more registers or shared memory than the GPU has for blocks of " +
                std::to_string(launch.block) + " threads with " + std::to_string(launch.shared_bytes) +
                " bytes of shared memory");
  if (code == kOutOfMemory) throw Error(what + " failed: the GPU is out of memory");
  if (code == kIllegalAddress || code == kLaunchFailed)
    throw Error(what + " failed, since a kernel before it did: " + spoken(code) +
                ". CUDA_LAUNCH_BLOCKING=1 shows which of torch's, compute-sanitizer which at all");
  good(code, what);
}

}  // namespace rgfast::driver
