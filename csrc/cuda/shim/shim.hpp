// Makes a host compiler take device sources: CUDA's keywords, types, variables and functions.
// For tests; nothing of it is in the package.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/shim/collectives.hpp"
#include "cuda/shim/intrinsics.hpp"
#include "cuda/shim/runtime.hpp"
#include "cuda/shim/types.hpp"

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)
// __shared__ stays undefined: kernels take dynamic shared memory alone, whose exact size the shim can watch.
