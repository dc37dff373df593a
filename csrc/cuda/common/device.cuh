// Comes first in every device source. Compiled by nvcc it adds little to CUDA; a host compiler gets the rest
// of CUDA from the shim, so that the same source runs in tests on the CPU.
#pragma once

#include <cstddef>
#include <cstdint>

#ifndef __CUDACC__
#include "cuda/shim/shim.hpp"
#endif

// Clusters and fp64 mma wider than m8n8k4 exist from sm_90 on. A kernel with clusters stands under this
// condition, in the host's compilation as well.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define RGFAST_SM90 1
#else
#define RGFAST_SM90 0
#endif

#ifdef __CUDACC__
#define RGFAST_NOINLINE __noinline__
#else
#define RGFAST_NOINLINE __attribute__((noinline))
#endif

namespace rgfast::cuda {

inline constexpr unsigned kFullWarp = 0xffffffffU;

// The block's dynamic shared memory, on 16 bytes.
template <class T>
__device__ __forceinline__ T* shared_memory() {
#ifdef __CUDACC__
  extern __shared__ __align__(16) unsigned char rgfast_shared[];
  return reinterpret_cast<T*>(rgfast_shared);
#else
  return reinterpret_cast<T*>(shim::shared_memory());
#endif
}

// A value that the compiler knows nothing of. `if (c == k) x = a[c]` over an array of registers goes to local
// memory unless the value passes through this.
template <class T>
__device__ __forceinline__ T opaque(T x) {
#ifdef __CUDACC__
  if constexpr (sizeof(T) == 8)
    asm volatile("" : "+d"(x));
  else
    asm volatile("" : "+f"(x));
#endif
  return x;
}

#ifdef __CUDACC__

// Waits for `threads` threads, whole warps, that come to the barrier `id` of 1 to 15; 0 is __syncthreads.
__device__ __forceinline__ void named_barrier(unsigned id, unsigned threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Tells other threads of the block how far this one is: what it wrote before is visible to who has seen the
// value.
__device__ __forceinline__ void publish(int* flag, int value) {
  asm volatile("st.release.cta.s32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
}

// Waits until `*flag` is at least `at_least`.
__device__ __forceinline__ void wait_for(const int* flag, int at_least) {
  int value;
  do asm volatile("ld.acquire.cta.s32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
  while (value < at_least);
}

#if RGFAST_SM90
__device__ __forceinline__ unsigned cluster_rank() {
  unsigned rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
__device__ __forceinline__ unsigned cluster_size() {
  unsigned size;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
}
__device__ __forceinline__ void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }

// The same place of shared memory in the block of that rank. No block may end while a peer still reads from
// it.
template <class T>
__device__ __forceinline__ T* cluster_map(T* mine, unsigned rank) {
  T* peer;
  asm("mapa.u64 %0, %1, %2;" : "=l"(peer) : "l"(mine), "r"(rank));
  return peer;
}
__device__ __forceinline__ void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}
#endif

#else

inline void named_barrier(unsigned id, unsigned threads, RGFAST_HERE) {
  shim::block_barrier("named_barrier", {file, line}, id, threads, false);
}
inline void publish(int* flag, int value) { shim::publish(flag, value); }
inline void wait_for(const int* flag, int at_least, RGFAST_HERE) {
  shim::wait_for(flag, at_least, {file, line});
}

inline unsigned cluster_rank() { return shim::cluster_rank(); }
inline unsigned cluster_size() { return shim::cluster_size(); }
inline void cluster_arrive(RGFAST_HERE) { shim::cluster_arrive({file, line}); }
inline void cluster_wait(RGFAST_HERE) { shim::cluster_wait({file, line}); }
inline void cluster_sync(RGFAST_HERE) {
  shim::cluster_arrive({file, line});
  shim::cluster_wait({file, line});
}
template <class T>
T* cluster_map(T* mine, unsigned rank, RGFAST_HERE) {
  return reinterpret_cast<T*>(shim::peer_memory(mine, rank, {file, line}));
}

#endif

}  // namespace rgfast::cuda
