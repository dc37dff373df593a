// Copies from global to shared memory that a thread starts and waits for later (cp.async). In the shim a copy
// is made when it is waited for, and its target is NaN until then.
#pragma once

#include "cuda/common/device.cuh"

namespace rgfast::cuda {

// Starts to copy `filled` of `Bytes` (4, 8 or 16) bytes; the rest of the target is set to zero, and what lies
// behind `filled` is not read. Both addresses are multiples of `Bytes`.
template <int Bytes>
__device__ __forceinline__ void copy_async(void* to, const void* from, int filled = Bytes) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16, "cp.async copies 4, 8 or 16 bytes");
#ifdef __CUDACC__
  const auto target = static_cast<unsigned>(__cvta_generic_to_shared(to));
  if constexpr (Bytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(from), "r"(filled)
                 : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(target), "l"(from), "n"(Bytes),
                 "r"(filled)
                 : "memory");
#else
  shim::copy_async(to, from, Bytes, static_cast<std::size_t>(filled));
#endif
}

// Closes a group of copies.
__device__ __forceinline__ void copy_async_commit() {
#ifdef __CUDACC__
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  shim::copy_async_commit();
#endif
}

// Waits until at most the `Newest` groups closed last are under way. Other threads see the copies after a
// barrier.
template <int Newest>
__device__ __forceinline__ void copy_async_wait() {
#ifdef __CUDACC__
  asm volatile("cp.async.wait_group %0;" ::"n"(Newest) : "memory");
#else
  shim::copy_async_wait(Newest);
#endif
}

}  // namespace rgfast::cuda
