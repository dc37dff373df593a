// Kernels of second and cross moments; moments.cuh says what they compute.
//
// `table` has kLayerWords numbers per layer, then kPairWords per pair (layer_at, pair_at). A block of the
// grid is a tile of a position, of `tiles` per position of all pairs together; with `spread` the grid's
// second side are blocks of 1,024 rows, whose moments lie `spread` numbers apart.
#include "cuda/moments.cuh"

namespace rgfast::cuda::moments {

inline constexpr double kLargest = 0x1.fffffffffffffp1023;

// The largest finite |y|^2 of the rows of a position.
__device__ inline void tops(const std::int64_t* table, std::int64_t rows) {
  const Layer layer = layer_at(table, blockIdx.y);
  const double* norms = layer.norms + blockIdx.x * rows;
  auto* shared = shared_memory<double>();
  double top = 0.0;
  for (std::int64_t row = threadIdx.x; row < rows; row += kThreads)
    if (norms[row] > top && norms[row] <= kLargest) top = norms[row];
  shared[threadIdx.x] = top;
  for (int step = kThreads / 2; step > 0; step /= 2) {
    __syncthreads();
    const int thread = static_cast<int>(threadIdx.x);
    if (thread < step && shared[thread + step] > shared[thread]) shared[thread] = shared[thread + step];
  }
  if (threadIdx.x == 0) layer.tops[blockIdx.x] = shared[0];
}

// Adds what blocks of 1,024 rows have, in their order.
__device__ inline void gather(const std::int64_t* table, std::int64_t layers, std::int64_t positions,
                              std::int64_t extras, std::int64_t add, std::int64_t blocks,
                              std::int64_t spread) {
  const Pair pair = pair_at(table, layers, blockIdx.y);
  const std::int64_t columns = layer_at(table, pair.left).width + extras;
  const std::int64_t entries = positions * columns * (layer_at(table, pair.right).width + extras);
  const std::int64_t at = std::int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (at >= entries) return;
  double sum = pair.apart[at];
  if (add != 0) sum = pair.sum[at] + sum;
  for (std::int64_t block = 1; block < blocks; ++block) sum += pair.apart[block * spread + at];
  pair.sum[at] = sum;
}

}  // namespace rgfast::cuda::moments

// Three blocks of fp64 products on a multiprocessor, two where rows or products need more registers than 168.
#define RGFAST_MOMENTS(name, T, blocks)                                                                \
  extern "C" __global__ void __launch_bounds__(128) rgfast_moments_norms_##name(                       \
      const std::int64_t* table, std::int64_t positions, std::int64_t rows, const unsigned char* keep, \
      std::int64_t keep_position, std::int64_t keep_row) {                                             \
    rgfast::cuda::moments::norms<T>(table, positions, rows, {keep, keep_position, keep_row});          \
  }                                                                                                    \
  extern "C" __global__ void __launch_bounds__(128, blocks) rgfast_moments_exact_##name(               \
      const std::int64_t* table, std::int64_t layers, std::int64_t pairs, std::int64_t tiles,          \
      std::int64_t rows, const unsigned char* keep, std::int64_t keep_position, std::int64_t keep_row, \
      std::int64_t extras, std::int64_t add, std::int64_t spread) {                                    \
    rgfast::cuda::moments::tiles<rgfast::cuda::moments::Exact, T>(                                     \
        {table, layers, pairs, tiles, rows, {keep, keep_position, keep_row}, extras, add, spread});    \
  }                                                                                                    \
  extern "C" __global__ void __launch_bounds__(128, 2) rgfast_moments_split_##name(                    \
      const std::int64_t* table, std::int64_t layers, std::int64_t pairs, std::int64_t tiles,          \
      std::int64_t rows, const unsigned char* keep, std::int64_t keep_position, std::int64_t keep_row, \
      std::int64_t extras, std::int64_t add, std::int64_t spread) {                                    \
    rgfast::cuda::moments::tiles<rgfast::cuda::moments::Split, T>(                                     \
        {table, layers, pairs, tiles, rows, {keep, keep_position, keep_row}, extras, add, spread});    \
  }

RGFAST_MOMENTS(float64, double, 2)
RGFAST_MOMENTS(float32, float, 3)
RGFAST_MOMENTS(bfloat16, rgfast::cuda::Bfloat16, 3)
RGFAST_MOMENTS(float16, rgfast::cuda::Half, 3)
#undef RGFAST_MOMENTS

extern "C" __global__ void __launch_bounds__(128)
    rgfast_moments_tops(const std::int64_t* table, std::int64_t rows) {
  rgfast::cuda::moments::tops(table, rows);
}

extern "C" __global__ void __launch_bounds__(128)
    rgfast_moments_gather(const std::int64_t* table, std::int64_t layers, std::int64_t positions,
                          std::int64_t extras, std::int64_t add, std::int64_t blocks, std::int64_t spread) {
  rgfast::cuda::moments::gather(table, layers, positions, extras, add, blocks, spread);
}
