// Inner products of kernels of layers in feature space: means of columns, norms of centered rows, squares of
// cross moments without the moments (moments.cuh), and what is summed of them per pair of layers.
//
// A mean in fp64 is off by a rounding of itself, which an offset makes large beside the spread. That rounding
// is known exactly and kept as well: rows are moved by the mean that is rounded, their norms by both. In
// cross moments it is squared before it counts.
#pragma once

#include "cuda/cka_math.cuh"
#include "cuda/moments.cuh"

namespace rgfast::cuda::cka {

using moments::Layer;
using moments::layer_at;
using moments::Pair;
using moments::pair_at;
using moments::widened;

inline constexpr int kWarps = 4;
inline constexpr int kThreads = 32 * kWarps;
inline constexpr int kColumns = 32;  // that a block centers

// rgfast/ops/cka/impl/cuda.py launches with these numbers.
static_assert(kThreads == moments::kThreads && kWarps == 4 && kColumns == 32 && sizeof(PairSums) == 32);

// Of a rounded sum a + b, what rounding took off (Knuth).
__host__ __device__ inline double left_over(double a, double b, double sum) {
  const double taken = sum - a;
  return (a - (sum - taken)) + (b - taken);
}

// Means are formed from distances to the first row, so that equal rows have an exact one. A block takes 32
// columns of a position, each of its warps every fourth row.
template <class T>
__device__ void centers(const std::int64_t* table, std::int64_t positions, std::int64_t rows,
                        std::int64_t chunks) {
  const Layer layer = layer_at(table, blockIdx.y);
  auto* shared = shared_memory<double>();
  const auto parts = static_cast<unsigned>(chunks);
  const std::int64_t position = blockIdx.x / parts;
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const std::int64_t column = std::int64_t{blockIdx.x % parts} * kColumns + lane;
  const bool mine = column < layer.width;
  const T* at = static_cast<const T*>(layer.rows) + position * layer.position_stride +
                (mine ? column * layer.feature_stride : 0);
  const double first = widened(*at);
  constexpr int count = 4;  // loads under way
  double sum[count] = {};
  for (std::int64_t row = warp; mine && row < rows; row += count * kWarps)
#pragma unroll
    for (int i = 0; i < count; ++i) {
      const std::int64_t here = row + i * kWarps;
      if (here < rows) sum[i] += widened(at[here * layer.row_stride]) - first;
    }
  shared[warp * 32 + lane] = (sum[0] + sum[1]) + (sum[2] + sum[3]);
  __syncthreads();
  if (warp != 0 || !mine) return;
  double total = shared[lane];
  for (int k = 1; k < kWarps; ++k) total += shared[k * 32 + lane];
  const double apart = total / static_cast<double>(rows), mean = first + apart;
  // [2, positions, width]: the mean and its rounding
  auto* to = const_cast<double*>(layer.shift) + position * layer.width + column;
  to[0] = mean;
  to[positions * layer.width] = left_over(first, apart, mean);
}

// Squared lengths of centered rows, by a warp for a row: zero only if the row is.
template <class T>
__device__ void norms(const std::int64_t* table, std::int64_t positions, std::int64_t rows) {
  const Layer layer = layer_at(table, blockIdx.y);
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const std::int64_t at = std::int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  if (at >= positions * rows) return;
  const std::int64_t position = at / rows;
  const T* row =
      static_cast<const T*>(layer.rows) + position * layer.position_stride + at % rows * layer.row_stride;
  const double* mean = layer.shift + position * layer.width;
  const double* rest = mean + positions * layer.width;
  double sum = 0.0;
  bool some = false;
  for (std::int64_t column = lane; column < layer.width; column += 32) {
    const double y = (widened(row[column * layer.feature_stride]) - mean[column]) - rest[column];
    sum = fma(y, y, sum);
    some = some || y != 0.0;
  }
  if (some && sum == 0.0) sum = 0x1p-1022;
#pragma unroll
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(kFullWarp, sum, step);
  if (lane == 0) layer.norms[at] = sum;
}

// The sum of `mine` over all threads, for all, in a fixed order.
__device__ inline double block_sum(double mine, double* shared) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) mine += __shfl_xor_sync(kFullWarp, mine, step);
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = mine;
  __syncthreads();
  const double sum = (shared[0] + shared[1]) + (shared[2] + shared[3]);
  __syncthreads();
  return sum;
}

// Which samples are left out, and what is summed of them: variant 0 has all, variant g + 1 all but group g of
// samples g, g + groups, ... Of a layer's group data at `tops` (cka_groups.cuh) there are sums of rows
// [positions, groups, width] and products of rows with them [positions, groups, rows].
struct Without {
  std::int64_t groups;
  int g;  // -1: nothing is left out
  double left;

  __device__ Without(std::int64_t count, std::int64_t variant, std::int64_t rows)
      : groups(count),
        g(static_cast<int>(variant) - 1),
        left(static_cast<double>(variant == 0 ? rows : left_without(rows, count, variant - 1))) {}
  __device__ const double* sum(const Layer& layer, std::int64_t position) const {
    return layer.tops + (position * groups + g) * layer.width;
  }
  __device__ const double* products(const Layer& layer, std::int64_t positions, std::int64_t position,
                                    std::int64_t rows) const {
    return layer.tops + positions * groups * layer.width + (position * groups + g) * rows;
  }
};

// Squared length of the mean of all rows, or of the sum of those that are left out.
__device__ inline double squared_length(const double* x, std::int64_t width, double* shared) {
  double mine = 0.0;
  for (std::int64_t column = threadIdx.x; column < width; column += kThreads)
    mine = fma(x[column], x[column], mine);
  return block_sum(mine, shared);
}

// to[positions, variants, pairs] from squares[positions, variants, tiles]. By features the tiles of a pair
// add up to the squared norm of its cross moment; by samples one number is half of the sum over different
// samples.
//
// Without a group rows are moved by -m/n', m the sum of those that are left out and n' how many are left.
// Then |z|^2 grows by d = 2 z m/n' + |m|^2/n'^2, and the row sums of a kernel are -z m. By samples the change
// of the inner product is formed from these, so that it is as small as they are.
__device__ inline void sums(const std::int64_t* table, std::int64_t layers, std::int64_t pairs,
                            std::int64_t tiles, std::int64_t rows, std::int64_t groups, std::int64_t samples,
                            const double* squares, PairSums* to) {
  const std::int64_t position = blockIdx.x, k = blockIdx.y, variants = gridDim.z;
  const Without without(groups, blockIdx.z, rows);
  const Pair pair = pair_at(table, layers, k);
  const Layer left = layer_at(table, pair.left), right = layer_at(table, pair.right);
  const std::int64_t end = samples != 0    ? pair.first + 1
                           : k + 1 < pairs ? pair_at(table, layers, k + 1).first
                                           : tiles;
  const std::int64_t at = position * variants + blockIdx.z;
  auto* shared = shared_memory<double>();
  double product = 0.0, same = 0.0, trace = 0.0, change = 0.0;
  for (std::int64_t tile = pair.first + threadIdx.x; tile < end; tile += kThreads)
    product += squares[at * tiles + tile];
  const double* a = left.norms + position * rows;
  const double* b = right.norms + position * rows;
  double apart = 0.0;
  if (without.g < 0) {
    for (std::int64_t row = threadIdx.x; row < rows; row += kThreads) {
      same = fma(a[row], b[row], same);
      trace += a[row];
    }
    apart = without.left * squared_length(left.shift + position * left.width, left.width, shared);
  } else {
    const double one = squared_length(without.sum(left, position), left.width, shared);
    const double other = squared_length(without.sum(right, position), right.width, shared);
    const double n = without.left, square = n * n;
    const double* s = without.products(left, gridDim.x, position, rows);
    const double* t = without.products(right, gridDim.x, position, rows);
    for (std::int64_t row = threadIdx.x; row < rows; row += kThreads) {
      if (static_cast<int>(row) % static_cast<int>(groups) == without.g) continue;
      const double da = 2.0 * s[row] / n + one / square, db = 2.0 * t[row] / n + other / square;
      same = fma(a[row] + da, b[row] + db, same);
      trace += a[row] + da;
      change += a[row] * db + da * (b[row] + db) + 2.0 * s[row] * t[row] / n;
    }
    if (threadIdx.x == 0) change -= one / n * (other / n);
    apart = one / n;
  }
  product = block_sum(product, shared);
  same = block_sum(same, shared);
  trace = block_sum(trace, shared);
  change = block_sum(change, shared);
  if (threadIdx.x == 0)
    to[at * pairs + k] = {samples != 0 ? 2.0 * product - change : product - same, same, trace, apart};
}

}  // namespace rgfast::cuda::cka
