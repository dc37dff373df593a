// What a warp adds up.
#pragma once

#include "cuda/common/device.cuh"

namespace rgfast::cuda {

// The sum over all lanes, for all of them, in a fixed order.
__device__ __forceinline__ double sum_of_warp(double mine) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) mine += __shfl_xor_sync(kFullWarp, mine, step);
  return mine;
}

}  // namespace rgfast::cuda
