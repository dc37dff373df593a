// Barriers and warp collectives under CUDA's names. Each takes its place in the source as a default argument.
#pragma once

#include <type_traits>

#include "cuda/shim/runtime.hpp"

#define RGFAST_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(RGFAST_HERE) {
  rgfast::shim::block_barrier("__syncthreads", {file, line}, 0, 0, false);
}
inline int __syncthreads_or(int predicate, RGFAST_HERE) {
  return rgfast::shim::block_barrier("__syncthreads_or", {file, line}, 0, 0, predicate != 0).nonzero != 0;
}
inline int __syncthreads_and(int predicate, RGFAST_HERE) {
  const auto votes = rgfast::shim::block_barrier("__syncthreads_and", {file, line}, 0, 0, predicate != 0);
  return votes.nonzero == votes.threads;
}
inline int __syncthreads_count(int predicate, RGFAST_HERE) {
  return static_cast<int>(
      rgfast::shim::block_barrier("__syncthreads_count", {file, line}, 0, 0, predicate != 0).nonzero);
}
inline void __syncwarp(unsigned mask = 0xffffffffU, RGFAST_HERE) {
  rgfast::shim::warp_barrier("__syncwarp", {file, line}, mask);
}
// Order memory without waiting; one processor runs all threads, so there is nothing to do.
inline void __threadfence_block() {}
inline void __threadfence() {}

namespace rgfast::shim {

template <class T>
struct Shuffle {
  T value;
  int lane;  // whose value this lane asks for
};

// Combines run in the lane that comes last.
template <class T>
void shuffle(unsigned mask, const void* const* in, void* const* out) {
  for (int lane = 0; lane < 32; ++lane) {
    if ((mask >> lane & 1U) == 0) continue;
    const int source = static_cast<const Shuffle<T>*>(in[lane])->lane;
    if ((mask >> source & 1U) == 0) fail_shuffle(lane, source);
    *static_cast<T*>(out[lane]) = static_cast<const Shuffle<T>*>(in[source])->value;
  }
}

inline void ballot(unsigned mask, const void* const* in, void* const* out) {
  unsigned votes = 0;
  for (int lane = 0; lane < 32; ++lane)
    if ((mask >> lane & 1U) != 0 && *static_cast<const int*>(in[lane]) != 0) votes |= 1U << lane;
  for (int lane = 0; lane < 32; ++lane)
    if ((mask >> lane & 1U) != 0) *static_cast<unsigned*>(out[lane]) = votes;
}

template <class T>
T shuffled(const char* what, Site site, unsigned mask, T value, int lane) {
  static_assert(std::is_arithmetic_v<T>, "CUDA shuffles numbers of 4 and 8 bytes");
  const Shuffle<T> in{value, lane};
  T out{};
  warp_collective(what, site, mask, &in, &out, shuffle<T>);
  return out;
}

inline unsigned voted(const char* what, Site site, unsigned mask, int predicate) {
  unsigned out = 0;
  warp_collective(what, site, mask, &predicate, &out, ballot);
  return out;
}

}  // namespace rgfast::shim

template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32, RGFAST_HERE) {
  const int base = rgfast::shim::lane() & ~(width - 1);
  return rgfast::shim::shuffled("__shfl_sync", {file, line}, mask, value, base + (lane & (width - 1)));
}
// The lanes whose source lies outside the segment keep their own value.
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, RGFAST_HERE) {
  const int me = rgfast::shim::lane(), from = me - static_cast<int>(delta);
  return rgfast::shim::shuffled("__shfl_up_sync", {file, line}, mask, value,
                                from < (me & ~(width - 1)) ? me : from);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, RGFAST_HERE) {
  const int me = rgfast::shim::lane(), from = me + static_cast<int>(delta);
  return rgfast::shim::shuffled("__shfl_down_sync", {file, line}, mask, value,
                                from > (me | (width - 1)) ? me : from);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, RGFAST_HERE) {
  const int me = rgfast::shim::lane(), from = me ^ bits;
  return rgfast::shim::shuffled("__shfl_xor_sync", {file, line}, mask, value,
                                from > (me | (width - 1)) ? me : from);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, RGFAST_HERE) {
  return rgfast::shim::voted("__ballot_sync", {file, line}, mask, predicate);
}
inline int __any_sync(unsigned mask, int predicate, RGFAST_HERE) {
  return rgfast::shim::voted("__any_sync", {file, line}, mask, predicate) != 0;
}
inline int __all_sync(unsigned mask, int predicate, RGFAST_HERE) {
  return rgfast::shim::voted("__all_sync", {file, line}, mask, predicate) == mask;
}
