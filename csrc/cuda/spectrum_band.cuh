// From a dense symmetric matrix to one of half-width 16, by a block per matrix.
//
// Panels of 16 columns are made triangular by Householder reflectors, whose product is Q = 1 - V T V'. With
// U = A V and W = U T - V (T' V' U T) / 2 the rest of the matrix becomes A - V W' - W V'. Only blocks of
// 16 x 16 on and below the diagonal are kept: one pass over them applies that for the last panel and
// multiplies by V of the next one, for both places of a block. The columns of the next panel are brought up
// to date before.
#pragma once

#include "cuda/spectrum_panel.cuh"
#include "cuda/spectrum_products.cuh"

namespace rgfast::cuda::spectrum {

template <int Warps>
struct Beginning : BandParts<Warps> {
  using Parts = BandParts<Warps>;
  using Parts::column;
  using Parts::kThreads;
  using Parts::lane;
  using Parts::space;
  using Parts::thread;
  using Parts::warp;
  using Parts::work;

  static constexpr int kAhead = 4;  // loads before the first store

  // The matrix with rows of zeros at the end, without its scale. That is zero if it was not finite.
  __device__ __forceinline__ MatrixScale<double> load(const Task<double>& task, std::int64_t index) const {
    const BlockTeam<double, Warps> team{thread, space.steps.scratch};
    const int n = task.n;
    const double* matrix = task.matrices + index * n * n;
    double largest = 0;
    for (int i = warp; i < work.rows; i += Warps)
      for (int from = lane; from <= (i | (kHalfWidth - 1)); from += 32 * kAhead) {
        double entry[kAhead];
#pragma unroll
        for (int t = 0; t < kAhead; ++t) {
          const int j = from + 32 * t, after = i > j ? i : j, before = i > j ? j : i;
          entry[t] = after < n && j <= (i | (kHalfWidth - 1))
                         ? loaded(matrix + static_cast<std::int64_t>(after) * n + before, largest)
                         : 0.0;
        }
#pragma unroll
        for (int t = 0; t < kAhead; ++t) {
          const int j = from + 32 * t;
          if (j <= (i | (kHalfWidth - 1))) work.at(i, j) = entry[t];
        }
      }
    for (int i = thread; i < work.rows * kStride; i += kThreads) work.band[i] = 0;
    const auto scale = MatrixScale<double>::of(team.largest(largest));
    if (thread == 0) work.state->scale = scale;
    __syncthreads();
    return scale;
  }

  // V and T of the reflector that takes the mean to the first unit vector, with which the tridiagonal
  // matrices of both spectra differ in one entry.
  __device__ __forceinline__ void reflect_mean(const Task<double>& task, std::int64_t index,
                                               double* next) const {
    const BlockTeam<double, Warps> team{thread, space.steps.scratch};
    const int n = task.n, rows = work.rows;
    const double* mean = task.means + index * n;
    double square = 0;
    for (int i = thread; i < n; i += kThreads) loaded_mean(mean + i, task.samples, square);
    const auto scale = MeanScale<double>::of(team.largest(square));
    double rest = 0, unused = 0;
    for (int i = thread; i < rows; i += kThreads) {
      const double x = i < n ? scale.down() * loaded_mean(mean + i, task.samples, unused) : 0;
      column(0, i) = x;
      if (i > 0) rest = fused(x, x, rest);
    }
    rest = sum_of_lanes<32>(rest);
    if (lane == 0) space.steps.sums[warp][0] = rest;
    __syncthreads();
    rest = 0;
#pragma unroll
    for (int from = 0; from < Warps; ++from) rest += space.steps.sums[from][0];
    const Reflector<double> h = reflector(column(0, 0), rest);
    __syncthreads();
    for (int i = thread; i < rows; i += kThreads)
      for (int c = 0; c < kHalfWidth; ++c) {
        const double u = c > 0 ? 0 : i == 0 ? 1 : column(0, i) * h.inverse;
        column(c, i) = next[tiled(i, c, kStride)] = u;
      }
    for (int e = thread; e < kBlock; e += kThreads) space.factor[e] = e == 0 ? h.tau : 0;
    if (thread == 0) {
      work.state->mean = scale;
      work.state->norm = h.value;
    }
    __syncthreads();
  }
};

template <int Warps>
__device__ __forceinline__ void reduce_to_band(const Task<double>& task, double* workspace) {
  const std::int64_t index = blockIdx.x;
  const Workspace work(workspace, index, task.n);
  auto& space = *shared_memory<BandSpace<Warps>>();
  double* panel = reinterpret_cast<double*>(shared_memory<unsigned char>() + sizeof(BandSpace<Warps>));
  const int thread = static_cast<int>(threadIdx.x);
  const BandParts<Warps> parts{work, space, panel, thread, thread % 32, thread / 32};
  const Beginning<Warps> beginning{parts};
  const Panel<Warps> columns{parts};
  const Products<Warps> products{parts};
  const double down = beginning.load(task, index).down;
  const double* last = nullptr;
#pragma unroll 1
  for (int first = task.means == nullptr ? 0 : -kHalfWidth, turn = 0;; first += kHalfWidth, turn = 1 - turn) {
    const int m = work.rows - first - kHalfWidth;
    double* next = work.vectors + turn * work.rows * kStride;
    if (first < 0) {
      beginning.reflect_mean(task, index, next);
    } else {
      columns.load_panel(first, last, down);
      if (m == 0) break;
      __syncthreads();
      if (m <= BandParts<Warps>::kThreads)
        columns.template factor_panel<1>(first, m, next);
      else
        columns.template factor_panel<2>(first, m, next);
      if (last != nullptr) last += kHalfWidth * kStride;
    }
    __syncthreads();
    products.update_and_multiply(first + kHalfWidth, m, last, down);
    __syncthreads();
    products.finish(m, next);
    __syncthreads();
    last = next;
  }
}

}  // namespace rgfast::cuda::spectrum
