// Planted faults: what the proofs must report, each by the tool that is there for it.
#include "cuda/common/async_copy.cuh"

using rgfast::cuda::shared_memory;

// TSan. The barrier between the write and the neighbor's read is missing.
extern "C" __global__ void rgfast_fault_missing_barrier(const double* x, double* out) {
  auto* shared = shared_memory<double>();
  shared[threadIdx.x] = x[threadIdx.x];
  out[threadIdx.x] = shared[(threadIdx.x + 1) % blockDim.x];
}

// What the one above should be.
extern "C" __global__ void rgfast_fault_none(const double* x, double* out) {
  auto* shared = shared_memory<double>();
  shared[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = shared[(threadIdx.x + 1) % blockDim.x];
}

// TSan. A shuffle is no barrier for memory.
extern "C" __global__ void rgfast_fault_missing_warp_barrier(const double* x, double* out) {
  auto* shared = shared_memory<double>();
  shared[threadIdx.x] = x[threadIdx.x];
  const double kept = __shfl_sync(rgfast::cuda::kFullWarp, x[threadIdx.x], 0);
  out[threadIdx.x] = kept + shared[threadIdx.x ^ 1U];
}

// TSan. The second barrier of the loop is missing: a fast thread writes what a slow one still reads.
extern "C" __global__ void rgfast_fault_late_barrier(const double* x, double* out) {
  auto* shared = shared_memory<double>();
  double sum = 0;
  for (int round = 0; round < 3; ++round) {
    shared[threadIdx.x] = x[threadIdx.x] + round;
    __syncthreads();
    sum += shared[(threadIdx.x + 1) % blockDim.x];
  }
  out[threadIdx.x] = sum;
}

// TSan. An asynchronous copy is under way until it has been waited for.
extern "C" __global__ void rgfast_fault_early_read(const double* x, double* out) {
  auto* shared = shared_memory<double>();
  rgfast::cuda::copy_async<8>(shared + threadIdx.x, x + threadIdx.x);
  rgfast::cuda::copy_async_commit();
  __syncthreads();
  out[threadIdx.x] = shared[(threadIdx.x + 1) % blockDim.x];
  rgfast::cuda::copy_async_wait<0>();
}

// TSan. Blocks add to one number.
extern "C" __global__ void rgfast_fault_race(double* sum) {
  if (threadIdx.x == 0) sum[0] += 1.0;
}

// ASan. Shared memory has a number per thread.
extern "C" __global__ void rgfast_fault_out_of_bounds(double* out) {
  auto* shared = shared_memory<double>();
  shared[threadIdx.x + 1] = threadIdx.x;
  __syncthreads();
  out[threadIdx.x] = shared[threadIdx.x];
}

// The shim. One thread does not come to the barrier.
extern "C" __global__ void rgfast_fault_skipped_barrier(double* out) {
  if (threadIdx.x != 5) __syncthreads();
  out[threadIdx.x] = 1.0;
}

// The compile gate. More numbers than the registers that so many threads leave to each.
extern "C" __global__ void __launch_bounds__(1024, 2) rgfast_fault_spill(const double* x, double* out) {
  double held[48];
#pragma unroll
  for (int k = 0; k < 48; ++k) held[k] = x[k * 1024 + threadIdx.x];
#pragma unroll
  for (int k = 0; k < 48; ++k)
#pragma unroll
    for (int l = 0; l < 48; ++l) held[k] = held[k] * held[l] + held[(k + l) % 48];
#pragma unroll
  for (int k = 0; k < 48; ++k) out[k * 1024 + threadIdx.x] = held[k];
}
