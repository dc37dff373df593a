// Linked with csrc/driver/tests/fake.cpp and the device sources this makes the library that stands for CUDA's
// driver run the kernels that are launched, on memory of the host.
#include <atomic>
#include <map>
#include <string>

#include "cuda/shim/emulation.hpp"

namespace rgfast::shim {
namespace {

std::map<std::string, driver::fake::Emulated>& kernels() {
  static std::map<std::string, driver::fake::Emulated> all;
  return all;
}

std::atomic<std::uint64_t> next_seed{0};

}  // namespace

void add_kernel(const char* name, const driver::fake::Emulated& kernel) { kernels()[name] = kernel; }

void emulate(const driver::fake::Launch& asked, void (*body)(void*), void* argument) {
  Launch how;
  how.grid = {asked.grid[0], asked.grid[1], asked.grid[2]};
  how.block = {asked.block[0], asked.block[1], asked.block[2]};
  how.shared = asked.shared_bytes;
  how.cluster = asked.cluster;
  how.seed = next_seed++;
  // What it throws goes through the driver's functions to the caller of _native, where it is a RuntimeError.
  run_grid(how, body, argument);
}

}  // namespace rgfast::shim

extern "C" {

const rgfast::driver::fake::Emulated* rgfast_emulated(const char* name) {
  const auto found = rgfast::shim::kernels().find(name);
  return found == rgfast::shim::kernels().end() ? nullptr : &found->second;
}

// Of the next launch; those after it count on from there.
void emulated_seed(std::uint64_t seed) { rgfast::shim::next_seed = seed; }

// The names, a line each; valid until the library is unloaded.
const char* emulated_kernels() {
  static const std::string names = [] {
    std::string all;
    for (const auto& kernel : rgfast::shim::kernels()) all += kernel.first + "\n";
    return all;
  }();
  return names.c_str();
}
}
