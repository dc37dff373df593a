// Runs the threads of a block, or of a cluster of blocks, as fibres on one processor, in an order that a seed
// shuffles. What a kernel calls (barriers, warp collectives) is declared in collectives.hpp on top of this.
//
// Stricter than the hardware where the hardware's leniency hides faults: a thread that has exited counts at
// no barrier, all lanes of a warp must come to a collective at the same place in the source with the same
// mask, and shared memory has exactly the bytes asked for and begins as NaN.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/shim/fibre.hpp"
#include "cuda/shim/types.hpp"

namespace rgfast::shim {

// What a launch fails with: a sentence that says which thread did what where.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Launch {
  dim3 grid{};
  dim3 block{32};
  std::size_t shared = 0;  // bytes of dynamic shared memory of a block
  unsigned cluster = 1;    // blocks of a cluster, along x
  std::uint64_t seed = 0;  // of the order of threads and blocks
};

struct Site {
  const char* file;
  int line;
};

// Does a warp collective's work once for all lanes of the mask: in[lane], out[lane] are those of the lanes'
// calls.
using Combine = void (*)(unsigned mask, const void* const* in, void* const* out);

// How __syncthreads_or and its kind reduce.
struct Votes {
  unsigned nonzero;
  unsigned threads;
};

// The calls of a thread that runs; `what` names the CUDA function for messages.
void warp_collective(const char* what, Site site, unsigned mask, const void* in, void* out, Combine combine);
void warp_barrier(const char* what, Site site, unsigned mask);
Votes block_barrier(const char* what, Site site, unsigned id, unsigned threads, bool vote);
void cluster_arrive(Site site);
void cluster_wait(Site site);
unsigned cluster_rank();
unsigned cluster_size();
std::byte* shared_memory();
std::byte* peer_memory(void* mine, unsigned rank, Site site);
void publish(int* flag, int value);
void wait_for(const int* flag, int at_least, Site site);
void copy_async(void* to, const void* from, std::size_t bytes, std::size_t filled);
void copy_async_commit();
void copy_async_wait(std::size_t newest);
int lane();
[[noreturn]] void fail(const std::string& sentence);
[[noreturn]] void fail_shuffle(int lane, int source);

// Runs `body(argument)` once per thread. Throws Error, and std::invalid_argument for a launch that no GPU
// takes.
void run_grid(const Launch& launch, void (*body)(void*), void* argument);

template <class... P, class... A>
void launch(const Launch& how, void (*kernel)(P...), A... arguments) {
  auto call = [&] { kernel(static_cast<P>(arguments)...); };
  run_grid(how, [](void* f) { (*static_cast<decltype(call)*>(f))(); }, &call);
}

}  // namespace rgfast::shim
