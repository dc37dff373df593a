// Writes a number to every element: what shows that kernels of this file can be launched at all.
#include "cuda/common/device.cuh"

extern "C" __global__ void rgfast_fill(double* out, std::int64_t count, double value) {
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * blockDim.x;
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count;
       i += step)
    out[i] = value;
}
