// A library that stands for the CUDA driver in tests: it exports cuGetProcAddress_v2, records every call that
// is made through what that returns, and answers as it was set up to. Linked alone (fake.cpp) it runs
// nothing. Linked with a definition of rgfast_emulated it runs kernels too, on memory of the host.
#pragma once

#include <cstdint>

namespace rgfast::driver::fake {

struct Launch {
  unsigned grid[3];
  unsigned block[3];
  unsigned shared_bytes;
  unsigned cluster;  // CTAs along x, 1 without clusters
};

// A kernel that can be run: `arguments[i]` points to the 8 bytes of parameter i.
struct Emulated {
  int parameters;
  void (*run)(const Launch& launch, void** arguments);
};

}  // namespace rgfast::driver::fake

extern "C" {

// Null for a name that there is no kernel of. Weak in fake.cpp, to be defined by what emulates.
const rgfast::driver::fake::Emulated* rgfast_emulated(const char* name);

// Setting up, from a test by ctypes. Everything is forgotten by fake_reset().
void fake_reset();
// A kernel that is found and not run, with its number of parameters; `shared` is what it declares statically.
void fake_kernel(const char* name, int parameters, int shared);
// "version" (13000), "devices" (1), "major" (9), "minor" (0), "shared" (232448), "ratio" (2),
// "clusters" (132), "capturing" (0), "threads" (1024: most per block), "running" (1: run
// kernels that can be run); devices are alike.
void fake_set(const char* what, std::int64_t value);
// Calls of a driver function, by its name in the driver, return `code` from now on; 0 undoes it.
void fake_fail(const char* function, int code);
// cuGetProcAddress_v2 does not find the function from now on.
void fake_lacks(const char* function);
// All calls since the last fake_reset or fake_log, a JSON object per line; valid until the next call.
const char* fake_log();
}
