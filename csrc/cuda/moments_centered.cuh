// Sums of rows about their means, from sums of extended rows z = [x, |x|^2, 1]: M = Σ z_x z_y', [d + 2, e +
// 2], of pairs of layers at positions. A block reads one M, once: each of its warps every eighth row.
//
// The means are taken off every entry before it is squared, as rows close to their mean need it. What is
// linear in M is not: Σ|y_c|² z of each row's z is a product of M and the mean of y.
#pragma once

#include "cuda/common/warp.cuh"

namespace rgfast::cuda::moments {

inline constexpr int kCenteringWarps = 8;
inline constexpr int kCenteringThreads = 32 * kCenteringWarps;
inline constexpr int kCenteredWords = 5;

// rgfast/ops/moments/centering.py launches with these numbers.
static_assert(kCenteringThreads == 256 && kCenteredWords == 5);

// A pair's moments of one part of the positions: [positions, d + 2, e + 2], and [positions, d] of shifts,
// which `unit` brings into the units of the moments; null for a pair whose matrix is not wanted. The first of
// its positions is number `first` of those of all pairs and parts.
struct Uncentered {
  const double* moments;
  const double* shifts;
  std::int64_t first, positions;
  double unit;
};

__device__ inline Uncentered uncentered_at(const std::int64_t* table, std::int64_t k) {
  const std::int64_t* word = table + k * kCenteredWords;
  return {reinterpret_cast<const double*>(word[0]), reinterpret_cast<const double*>(word[1]), word[2],
          word[3], __longlong_as_double(word[4])};
}

// The sum over all threads of the block, for all of them.
__device__ inline double sum_of_centering(double mine, double* shared) {
  mine = sum_of_warp(mine);
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = mine;
  __syncthreads();
  double sum = shared[0];
  for (int warp = 1; warp < kCenteringWarps; ++warp) sum += shared[warp];
  __syncthreads();
  return sum;
}

// sums[4, entries]: |Σ x_c y_c'|², Σ|x_c|²|y_c|², Σ|x_c|² and Σ|x|². matrices[entries, d, d]: the lower
// triangles of Σ x_c x_c'. means[entries, d]: the mean of x + shift times the root of the count.
__device__ inline void center(const std::int64_t* table, std::int64_t d, std::int64_t e, std::int64_t entries,
                              double* sums, double* matrices, double* means) {
  const Uncentered part = uncentered_at(table, blockIdx.y);
  const std::int64_t position = blockIdx.x;
  if (position >= part.positions) return;
  auto* shared = shared_memory<double>();
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const std::int64_t at = part.first + position, stride = e + 2;
  const double* moment = part.moments + position * (d + 2) * stride;
  const double* columns = moment + (d + 1) * stride;  // Σ y, Σ|y|² and the count
  const double count = columns[e + 1], share = 1.0 / (count > 1.0 ? count : 1.0);

  double left = 0.0, right = 0.0;  // squares of the means
  for (std::int64_t i = thread; i < d; i += kCenteringThreads) {
    const double mean = moment[i * stride + e + 1] * share;
    left = fma(mean, mean, left);
  }
  for (std::int64_t j = thread; j < e; j += kCenteringThreads) {
    const double mean = columns[j] * share;
    right = fma(mean, mean, right);
  }
  left = sum_of_centering(left, shared);
  right = sum_of_centering(right, shared);

  double* matrix = part.shifts == nullptr ? nullptr : matrices + at * d * d;
  double norm = 0.0, moved = 0.0, product = 0.0;
  for (std::int64_t i = warp; i < d + 2; i += kCenteringWarps) {
    const double* row = moment + i * stride;
    const int wide = static_cast<int>(e), kept = matrix != nullptr && i < d ? static_cast<int>(i) + 1 : 0;
    double* to = kept > 0 ? matrix + i * d : nullptr;
    const double sum = row[e + 1], off = -sum * share;
    double dot = 0.0, squares = 0.0;
#pragma unroll 4
    for (int j = lane; j < wide; j += 32) {
      const double entry = row[j], column = columns[j];
      const double centered = fma(off, column, entry);
      dot = fma(entry, column, dot);
      squares = fma(centered, centered, squares);
      if (j < kept) to[j] = centered;
    }
    // Σ z|y_c|² of this row's z.
    const double norms = fma(right, sum, row[e]) - 2.0 * share * sum_of_warp(dot);
    if (i < d) {
      norm += squares;
      moved = fma(off, norms, moved);
    } else {
      product = i == d ? product + norms : fma(left, norms, product);
    }
  }
  // All lanes of a warp have the same.
  const double both = lane == 0 ? fma(2.0, moved, product) : 0.0;
  norm = sum_of_centering(norm, shared);
  product = sum_of_centering(both, shared);
  if (thread == 0) {
    const double size = moment[d * stride + e + 1];
    sums[at] = norm;
    sums[entries + at] = product;
    sums[2 * entries + at] = fma(-left, count, size);
    sums[3 * entries + at] = size;
  }
  if (matrix == nullptr) return;
  const double root = sqrt(count);
  for (std::int64_t i = thread; i < d; i += kCenteringThreads)
    means[at * d + i] =
        fma(part.shifts[position * d + i], part.unit, moment[i * stride + e + 1] * share) * root;
}

}  // namespace rgfast::cuda::moments
