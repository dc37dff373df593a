// Eigenvalues of larger fp64 matrices in stages, one launch each, on the same workspace of
// `batch workspace_doubles(n)`: `band`, then `chase` (`chase_far`, where a band has no room in shared
// memory), then `count`. Arguments and NaN are those of spectrum.cu.
// Values that are as close as rounding may be in the wrong order.
//
// Grid: a block per matrix, of `count` for every 128 rows along y. Threads (of `chase`: at most) and bytes of
// shared memory are listed beside each; rgfast/ops/spectrum/stages.py has the same.
#include "cuda/common/device.cuh"
#include "cuda/spectrum_band.cuh"
#include "cuda/spectrum_chase.cuh"

// The last argument is the function, whose template arguments have commas.
#define RGFAST_STAGE(name, threads, blocks, ...)                                                       \
  extern "C" __global__ void __launch_bounds__(threads, blocks) rgfast_spectrum_##name##_f64(          \
      const double* matrices, const double* means, std::int64_t n, std::int64_t batch, double samples, \
      double* values, double* raw, double* workspace) {                                                \
    __VA_ARGS__({matrices, means, static_cast<int>(n), batch, samples, values, raw}, workspace);       \
  }

// And 16 times the workspace's rows and 8 more. To 272, 512 and 1,024 rows: two of a panel for each thread.
static_assert(sizeof(rgfast::cuda::spectrum::BandSpace<4>) == 18432);
RGFAST_STAGE(band_narrow, 128, 4, rgfast::cuda::spectrum::reduce_to_band<4>)
static_assert(sizeof(rgfast::cuda::spectrum::BandSpace<8>) == 34816);
RGFAST_STAGE(band, 256, 2, rgfast::cuda::spectrum::reduce_to_band<8>)
static_assert(sizeof(rgfast::cuda::spectrum::BandSpace<16>) == 34816);
RGFAST_STAGE(band_wide, 512, 1, rgfast::cuda::spectrum::reduce_to_band<16>)
// The band's 32 rows of the workspace, and 4 bytes a row.
RGFAST_STAGE(chase, 384, 1, rgfast::cuda::spectrum::chase<true>)
// 4 bytes a row.
RGFAST_STAGE(chase_far, 384, 1, rgfast::cuda::spectrum::chase<false>)
static_assert(sizeof(rgfast::cuda::spectrum::CountSpace) == 18496);
RGFAST_STAGE(count, 128, 5, rgfast::cuda::spectrum::count_all)

#undef RGFAST_STAGE
