// Kernels by name, called with the 8-byte words of a launch: what the library that stands for CUDA's driver
// runs them by. register.cmake writes the source that registers those of a device source.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "cuda/shim/runtime.hpp"
#include "driver/tests/fake.hpp"

namespace rgfast::shim {

// Runs what is asked for in the order of threads and blocks that comes next.
void emulate(const driver::fake::Launch& asked, void (*body)(void*), void* argument);

void add_kernel(const char* name, const driver::fake::Emulated& kernel);

template <class P>
P parameter(const void* word) {
  static_assert(std::is_pointer_v<P> || std::is_same_v<P, std::int64_t> || std::is_same_v<P, double>,
                "a kernel's parameters are pointers, int64_t and double, 8 bytes each");
  P value;
  std::memcpy(&value, word, sizeof value);
  return value;
}

template <auto kernel>
struct Emulation;

template <class... P, void (*kernel)(P...)>
struct Emulation<kernel> {
  static constexpr int kParameters = sizeof...(P);

  static void run(const driver::fake::Launch& asked, void** words) {
    emulate(asked, [](void* of) { call(static_cast<void**>(of), std::index_sequence_for<P...>()); }, words);
  }

 private:
  template <std::size_t... i>
  static void call([[maybe_unused]] void** words, std::index_sequence<i...>) {
    kernel(parameter<P>(words[i])...);
  }
};

template <auto kernel>
struct Registered {
  explicit Registered(const char* name) {
    add_kernel(name, {Emulation<kernel>::kParameters, Emulation<kernel>::run});
  }
};

}  // namespace rgfast::shim

#define RGFAST_REGISTER(kernel) static const rgfast::shim::Registered<kernel> registered_##kernel(#kernel);
