// What a probe is read from: sums about means; moments_centered.cuh says of what. `table` has kCenteredWords
// numbers per pair and part (uncentered_at). Grid: the positions of the largest part, pairs and parts.
#include "cuda/moments_centered.cuh"

extern "C" __global__ void __launch_bounds__(256, 2)
    rgfast_moments_centered(const std::int64_t* table, std::int64_t left, std::int64_t right,
                            std::int64_t entries, double* sums, double* matrices, double* means) {
  rgfast::cuda::moments::center(table, left, right, entries, sums, matrices, means);
}
