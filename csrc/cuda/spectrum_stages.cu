// Eigenvalues of larger fp64 matrices in stages, one launch each, on the same workspace of
// `batch workspace_doubles(n)`: `band`, then `chase` (`chase_far`, where a band has no room in shared
// memory), then `count`. Arguments, order of the values and NaN are those of spectrum.cu.
//
// Grid: a block per matrix. Threads (of `chase`: at most) and bytes of shared memory are listed beside each;
// rgfast/ops/spectrum/stages.py has the same.
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

// And 16 times the workspace's rows and 8 more.
static_assert(sizeof(rgfast::cuda::spectrum::BandSpace) == 13824);
RGFAST_STAGE(band, 256, 2, rgfast::cuda::spectrum::reduce_to_band)
// The band's 32 rows of the workspace, and 4 bytes a row.
RGFAST_STAGE(chase, 384, 1, rgfast::cuda::spectrum::chase<true>)
// 4 bytes a row.
RGFAST_STAGE(chase_far, 384, 1, rgfast::cuda::spectrum::chase<false>)
static_assert(sizeof(rgfast::cuda::spectrum::CountSpace) == 24848);
RGFAST_STAGE(count, 512, 1, rgfast::cuda::spectrum::count_all)

#undef RGFAST_STAGE
