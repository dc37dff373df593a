// The CUDA driver, opened when the first kernel is wanted: no CUDA library is linked.
//
// One Driver per process holds the fat binary and, per device, its primary context (the one that torch uses)
// and the functions taken from it. Threads may share it. A context is pushed around everything that needs one
// and popped again, since threads that Python or autograd starts have none.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "driver/abi.hpp"

namespace rgfast::driver {

// What went wrong, as a sentence.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// What is known of the fat binary without the driver.
struct Image {
  std::string bytes;
  std::string holds;  // the architectures in it, in words
  int major = 0;      // release of the compiler that made it; 0 if unknown
  int minor = 0;
};

struct Launch {
  std::string kernel;
  int device = 0;
  std::uintptr_t stream = 0;
  std::array<unsigned, 3> grid{1, 1, 1};
  unsigned block = 1;
  unsigned shared_bytes = 0;
  unsigned cluster = 1;              // CTAs along x
  std::vector<std::uint64_t> words;  // one for each parameter, which are 8 bytes each
};

// What the driver says of a kernel on a device.
struct Resources {
  int registers = 0;
  int local_bytes = 0;
  int static_shared_bytes = 0;
  int max_threads = 0;
};

class Driver {
 public:
  // Opens `path` and initializes the driver; the image is loaded when the first kernel is.
  Driver(const std::string& path, Image image);
  Driver(const Driver&) = delete;
  Driver& operator=(const Driver&) = delete;

  // Throws in a process that was forked from the one that opened the driver.
  void same_process() const;
  int version() const { return version_; }  // 1000 * major + 10 * minor of the CUDA that it supports
  int device_count() const { return static_cast<int>(devices_.size()); }
  std::string device_name(int device);
  int attribute(int device, DeviceAttribute attribute);
  // Whether what is queued on the stream now goes into a graph instead of being run.
  bool capturing(int device, std::uintptr_t stream);
  Resources resources(int device, const std::string& kernel);
  // Throws unless launch() of this would be accepted, as far as the driver says that beforehand.
  void check(const Launch& launch);
  void launch(const Launch& launch);

 private:
  struct Loaded {
    Function function = nullptr;
    Resources resources;
    int parameters = -1;     // unknown of a driver before 12.4
    int allowed_shared = 0;  // bytes of dynamic shared memory
    bool large_clusters = false;
    std::map<std::tuple<unsigned, unsigned, unsigned>, int> clusters;  // by block, shared memory and size
  };
  struct Place {
    Device device = 0;
    Context context = nullptr;
    std::map<std::string, Loaded> kernels;
  };
  class Pushed;

  Device known(int device) const;
  Context context(int device);
  Place& place(int device);
  Loaded& loaded(Place& place, int device, const std::string& kernel);
  Loaded& ready(const Launch& launch);
  void claim_shared(Loaded& kernel, const Launch& launch);
  void claim_clusters(Loaded& kernel, const Launch& launch);
  std::string architecture(int device);
  std::string spoken(Result code) const;
  void good(Result code, const std::string& what) const;

  Api api_;
  Image image_;
  int version_ = 0;
  int process_;
  std::mutex mutex_;  // guards what follows
  Library library_ = nullptr;
  std::vector<Place> devices_;
};

}  // namespace rgfast::driver
