// Eigenvalues of symmetric matrices, ascending: `values[batch, n]` of `matrices[batch, n, n]`, whose lower
// triangles are read. NaN for a matrix with an entry that is not finite. With `means[batch, n]`, which may be
// null, `raw[batch, n]` gets those of matrix + samples mean mean', from the same reduction. The kernel that a
// matrix gets depends on n and the type alone, so that it has the same values in any batch.
//
// Grid: `lanes` take 128 / 8, 128 / 16 or 128 / 32 matrices per block, the others one. Threads, blocks per
// multiprocessor that the registers allow, and bytes of shared memory are listed beside each;
// rgfast/ops/spectrum/impl/cuda.py has the same.
#include "cuda/common/device.cuh"
#include "cuda/spectrum_lanes.cuh"
#include "cuda/spectrum_registers.cuh"
#include "cuda/spectrum_shared.cuh"

// The last argument is the function, whose template arguments have commas.
#define RGFAST_KERNEL(name, T, threads, blocks, ...)                                                  \
  extern "C" __global__ void __launch_bounds__(threads, blocks)                                       \
      rgfast_spectrum_##name(const T* matrices, const T* means, std::int64_t n, std::int64_t batch,   \
                             double samples, T* values, T* raw) {                                     \
    __VA_ARGS__({matrices, means, static_cast<int>(n), batch, static_cast<T>(samples), values, raw}); \
  }
#define RGFAST_LANES(name, T, lanes, blocks, shared)                                                \
  static_assert(sizeof(rgfast::cuda::spectrum::LaneSpace<T, lanes>) * (128 / (lanes)) == (shared)); \
  RGFAST_KERNEL(name, T, 128, blocks, rgfast::cuda::spectrum::solve_in_lanes<T, lanes>)
#define RGFAST_REGISTERS(name, T, chunks, warps, blocks, shared)                              \
  static_assert(sizeof(rgfast::cuda::spectrum::RegisterSpace<T, chunks, warps>) == (shared)); \
  RGFAST_KERNEL(name, T, 32 * (warps), blocks, rgfast::cuda::spectrum::solve_in_registers<T, chunks, warps>)
#define RGFAST_SHARED(name, T, chunks, warps, blocks, shared)                               \
  static_assert(sizeof(rgfast::cuda::spectrum::SharedSpace<T, chunks, warps>) == (shared)); \
  RGFAST_KERNEL(name, T, 32 * (warps), blocks, rgfast::cuda::spectrum::solve_in_shared<T, chunks, warps>)

RGFAST_LANES(lanes8_f64, double, 8, 4, 8192)
RGFAST_LANES(lanes16_f64, double, 16, 4, 6144)
RGFAST_LANES(lanes32_f64, double, 32, 4, 6144)
RGFAST_LANES(lanes8_f32, float, 8, 8, 3584)
RGFAST_LANES(lanes16_f32, float, 16, 6, 3584)
RGFAST_LANES(lanes32_f32, float, 32, 5, 3584)

RGFAST_REGISTERS(registers128_f64, double, 4, 4, 2, 21600)
RGFAST_REGISTERS(registers64_f32, float, 2, 2, 8, 4656)
RGFAST_REGISTERS(registers256_f32, float, 8, 8, 1, 30816)

// The packed matrix follows, of 4 (n g - 2 g (g - 1)) entries, g = ceil(n / 4). Four blocks of 102 fp64 rows
// fit a multiprocessor of an H100, and two of 222 fp32 rows.
RGFAST_SHARED(shared64_f64, double, 2, 2, 8, 5696)
RGFAST_SHARED(shared96_f64, double, 3, 3, 5, 9296)
RGFAST_SHARED(shared102_f64, double, 4, 4, 4, 13408)
RGFAST_SHARED(shared96_f32, float, 3, 3, 8, 5040)
RGFAST_SHARED(shared128_f32, float, 4, 4, 6, 7232)
RGFAST_SHARED(shared160_f32, float, 5, 5, 4, 9664)
RGFAST_SHARED(shared192_f32, float, 6, 6, 3, 12368)
RGFAST_SHARED(shared222_f32, float, 7, 7, 2, 15312)

#undef RGFAST_KERNEL
#undef RGFAST_LANES
#undef RGFAST_REGISTERS
#undef RGFAST_SHARED
