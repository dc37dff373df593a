// From a dense symmetric matrix to one of half-width 16, by a block per matrix.
//
// Panels of 16 columns are made triangular by Householder reflectors, whose product is Q = 1 - V T V'. With
// U = A V and W = U T - V (T' V' U T) / 2 the rest of the matrix becomes A - V W' - W V'. It is kept whole,
// so that one pass over its rows applies that for the last panel and multiplies by V of the next one. The
// columns of the next panel are brought up to date before.
#pragma once

#include "cuda/common/mma.cuh"
#include "cuda/spectrum_workspace.cuh"

namespace rgfast::cuda::spectrum {

constexpr int kBandWarps = 8;

// Of a column of the panel in shared memory, beyond the workspace's rows: 8 columns at 16 bytes are in banks
// of their own.
constexpr int kPanelPadding = 8;

// Before the panel.
struct BandSpace {
  static constexpr int kParts = kHalfWidth * kHalfWidth;
  double parts[2][kBandWarps][kHalfWidth], pivots[2][kHalfWidth], sums[kBandWarps][kHalfWidth];
  double top[kHalfWidth][2 * kHalfWidth];  // V and W of the panel's own rows
  double gram[kParts], factor[kParts], product[kParts];
  double tau[kHalfWidth];
  double scratch[BlockTeam<double, kBandWarps>::kScratch];
};

struct Band {
  const Workspace& work;
  BandSpace& space;
  double* panel;
  int thread, lane, warp;

  static constexpr int kThreads = 32 * kBandWarps;
  static constexpr int kAhead = 4;  // loads before the first store

  __device__ __forceinline__ double& column(int c, int i) const {
    return panel[c * (work.rows + kPanelPadding) + i];
  }

  // The scaled matrix, whole, with rows of zeros at the end. False if it was not finite.
  __device__ __forceinline__ void load(const Task<double>& task, std::int64_t index) const {
    const BlockTeam<double, kBandWarps> team{thread, space.scratch};
    const int n = task.n, rows = work.rows;
    const double* matrix = task.matrices + index * n * n;
    double largest = 0;
    for (int i = warp; i < n; i += kBandWarps)
      for (int j = lane; j <= i; j += 32) loaded(matrix + static_cast<std::int64_t>(i) * n + j, largest);
    const auto scale = MatrixScale<double>::of(team.largest(largest));
    for (int i = warp; i < rows; i += kBandWarps)
      for (int from = lane; from <= i; from += 32 * kAhead) {
        double entry[kAhead], unused = 0;
#pragma unroll
        for (int t = 0; t < kAhead; ++t) {
          const int j = from + 32 * t;
          entry[t] = i < n && j <= i
                         ? scale.down * loaded(matrix + static_cast<std::int64_t>(i) * n + j, unused)
                         : 0.0;
        }
#pragma unroll
        for (int t = 0; t < kAhead; ++t) {
          const int j = from + 32 * t;
          if (j <= i) work.at(i, j) = work.at(j, i) = entry[t];
        }
      }
    for (int i = thread; i < rows * kStride; i += kThreads) work.band[i] = 0;
    if (thread == 0) work.state->scale = scale;
    __syncthreads();
  }

  // Applies the reflector that takes the mean to the first unit vector, with which the tridiagonal matrices
  // of both spectra differ in one entry.
  __device__ __forceinline__ void turn_mean(const Task<double>& task, std::int64_t index) const {
    const BlockTeam<double, kBandWarps> team{thread, space.scratch};
    const int n = task.n, rows = work.rows;
    double *u = panel, *w = panel + rows;
    double square = 0;
    for (int i = thread; i < n; i += kThreads) loaded_mean(task.means + index * n + i, task.samples, square);
    const auto scale = MeanScale<double>::of(team.largest(square));
    double rest = 0, unused = 0;
    for (int i = thread; i < rows; i += kThreads) {
      const double x =
          i < n ? scale.down() * loaded_mean(task.means + index * n + i, task.samples, unused) : 0;
      u[i] = x;
      if (i > 0) rest = fused(x, x, rest);
    }
    rest = total(rest, 0);
    const Reflector<double> h = reflector(u[0], rest);
    __syncthreads();
    for (int i = thread; i < rows; i += kThreads) u[i] = i == 0 ? 1 : u[i] * h.inverse;
    if (thread == 0) {
      work.state->mean = scale;
      work.state->norm = h.value;
    }
    __syncthreads();
    for (int i = warp; i < rows; i += kBandWarps) {
      double sum = 0;
      for (int j = lane; j < rows; j += 32) sum = fused(work.at(i, j), u[j], sum);
      sum = sum_of_lanes<32>(sum);
      if (lane == 0) w[i] = sum;
    }
    __syncthreads();
    double dot = 0;
    for (int i = thread; i < rows; i += kThreads) dot = fused(u[i], w[i], dot);
    const double half = 0.5 * h.tau * h.tau * total(dot, 1);
    for (int i = thread; i < rows; i += kThreads) w[i] = fused(h.tau, w[i], -half * u[i]);
    __syncthreads();
    for (int i = warp; i < rows; i += kBandWarps)
      for (int j = lane; j < rows; j += 32)
        work.at(i, j) = fused(-u[i], w[j], fused(-w[i], u[j], work.at(i, j)));
    __syncthreads();
  }

  // Over the block. Two calls need different places.
  __device__ __forceinline__ double total(double value, int place) const {
    value = sum_of_lanes<32>(value);
    if (lane == 0) space.parts[place][warp][0] = value;
    __syncthreads();
    value = 0;
#pragma unroll
    for (int from = 0; from < kBandWarps; ++from) value += space.parts[place][from][0];
    return value;
  }

  // Columns `first` and on, up to date: what is in the band already goes there, the rest to the panel.
  // `last`, unless null, has V and W of the rows from `first` on.
  __device__ __forceinline__ void load_panel(int first, const double* last) const {
    if (last != nullptr)
      for (int e = thread; e < kHalfWidth * kStride; e += kThreads)
        space.top[e / kStride][e % kStride] = last[tiled(e / kStride, e % kStride, kStride)];
    __syncthreads();
    for (int i = thread; i < work.rows - first; i += kThreads) {
      double x[kHalfWidth];
#pragma unroll
      for (int c = 0; c < kHalfWidth; c += 2) {
        const Pair entries = pair_at(&work.at(first + i, first + c));
        x[c] = entries.even;
        x[c + 1] = entries.odd;
      }
      if (last != nullptr) {
#pragma unroll 1
        for (int k = 0; k < kStride; k += 2) {
          const Pair entries = pair_at(last + tiled(i, k, kStride));
          const int other = (k + kHalfWidth) % kStride;  // V and W', W and V'
#pragma unroll
          for (int c = 0; c < kHalfWidth; ++c)
            x[c] =
                fused(-entries.odd, space.top[c][other + 1], fused(-entries.even, space.top[c][other], x[c]));
        }
      }
#pragma unroll
      for (int c = 0; c < kHalfWidth; ++c) {
        if (i >= kHalfWidth)
          column(c, i - kHalfWidth) = x[c];
        else if (i >= c)
          work.band_at(first + i, first + c) = x[c];
      }
    }
  }

  // Makes the panel's m rows triangular, which goes to the band, and leaves V in its place, T in
  // `space.factor`. One barrier per column: a thread has rows of its own.
  __device__ __forceinline__ void factor_panel(int first, int m) const {
#pragma unroll 1
    for (int k = 0; k < kHalfWidth; ++k) {
      double dots[kHalfWidth] = {};
      for (int i = thread; i < m; i += kThreads) {
        if (i == k)
          for (int j = 0; j < kHalfWidth; ++j) space.pivots[k & 1][j] = column(j, i);
        if (i <= k) continue;
        const double x = column(k, i);
#pragma unroll
        for (int j = 0; j < kHalfWidth; ++j) dots[j] = fused(x, column(j, i), dots[j]);
      }
      const double part = shared_out<kHalfWidth, 32>(dots, lane);
      if (lane % 2 == 0) space.parts[k & 1][warp][lane / 2] = part;
      __syncthreads();
      const int mine = lane % kHalfWidth;
      double sum = 0;
#pragma unroll
      for (int from = 0; from < kBandWarps; from += 2)
        sum += space.parts[k & 1][from + lane / kHalfWidth][mine];
      sum += __shfl_xor_sync(kFullWarp, sum, 16);
      const double lead = space.pivots[k & 1][k];
      const Reflector<double> h = reflector(lead, __shfl_sync(kFullWarp, sum, k));
      const double dot = fused(h.inverse, sum, space.pivots[k & 1][mine]);  // u' and a column
      if (lane < kHalfWidth) {
        space.sums[warp][mine] = h.tau * dot;
        if (warp == 0 && mine < k) space.gram[mine * kHalfWidth + k] = dot;
        if (warp == 0 && mine == k) space.tau[k] = h.tau;
      }
      __syncwarp();
      for (int i = thread; i < m; i += kThreads) {
        const double x = column(k, i), u = i > k ? x * h.inverse : i == k ? 1.0 : 0.0;
        if (i <= k) work.band_at(first + kHalfWidth + i, first + k) = i == k ? h.value : x;
        if (i >= k)
          for (int j = k + 1; j < kHalfWidth; ++j)
            column(j, i) = fused(-u, space.sums[warp][j], column(j, i));
        column(k, i) = u;
      }
      __syncwarp();
    }
    if (warp == 0) {
      for (int k = 0; k < kHalfWidth; ++k) {
        double entry = lane == k ? space.tau[k] : 0.0;
        if (lane < k) {
          for (int j = lane; j < k; ++j)
            entry = fused(space.factor[lane * kHalfWidth + j], space.gram[j * kHalfWidth + k], entry);
          entry *= -space.tau[k];
        }
        if (lane < kHalfWidth) space.factor[lane * kHalfWidth + k] = entry;
        __syncwarp();
      }
    }
  }

  // A -= V W' + W V' of the last panel, if there is one, in the rows and columns from `first` on, and U = A V
  // of the next, which is in the panel. A warp has 16 rows at a time. C of a product is A of the next with
  // its columns in another order, in which the rows of V are taken, too; so are the columns of V and W.
  __device__ __forceinline__ void update_and_multiply(int first, int m, const double* last) const {
    const int g = lane / 4, t = lane % 4, below = 8 * work.rows;
    for (int row = 16 * warp; row < m; row += 16 * kBandWarps) {
      double x[2][8], u[2][4] = {};
      if (last != nullptr) {
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          const int part = e / 4, half = e / 2 % 2, lower = e % 2;
          const Pair entries = pair_at(last + tiled(row + 8 * lower, 8 * (e / 2), kStride) + 2 * lane);
          x[part][4 * half + lower] = -entries.even;
          x[part][4 * half + 2 + lower] = -entries.odd;
        }
      }
      double* at = &work.at(first + row, first) + 2 * lane;
      const double* others = last == nullptr ? nullptr : last + 2 * lane;
      Pair next[2] = {pair_at(at), pair_at(at + below)};  // a tile ahead
#pragma unroll 1
      for (int to = 0; to < m; to += 8) {
        double c[4] = {next[0].even, next[0].odd, next[1].even, next[1].odd};
        if (to + 8 < m) {
          next[0] = pair_at(at + kTile);
          next[1] = pair_at(at + kTile + below);
        }
        if (last != nullptr) {
#pragma unroll
          for (int part = 0; part < 2; ++part) {
            double other[4];
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              const Pair entries = pair_at(others + (2 * (1 - part) + half) * kTile);
              other[2 * half] = entries.even;
              other[2 * half + 1] = entries.odd;
            }
            mma_m16n8k16(c, x[part], other);
          }
          pair_at(at) = {c[0], c[1]};
          pair_at(at + below) = {c[2], c[3]};
          others += 8 * kStride;
        }
        const double a[4] = {c[0], c[2], c[1], c[3]};
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const Pair v = pair_at(&column(8 * half + g, to + 2 * t));
          const double b[2] = {v.even, v.odd};
          mma_m16n8k8(u[half], a, b);
        }
        at += kTile;
      }
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int half = e / 2, lower = e % 2;
        pair_at(work.product + tiled(row + 8 * lower, 8 * half, kHalfWidth) + 2 * lane) = {
            u[half][2 * lower], u[half][2 * lower + 1]};
      }
    }
  }

  // W beside V in `next`.
  __device__ __forceinline__ void finish(int m, double* next) const {
    const int r = thread / kHalfWidth, c = thread % kHalfWidth;
    double sums[4] = {};
    for (int i = 0; i < m; i += 4)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        sums[e] = fused(column(r, i + e), work.product[tiled(i + e, c, kHalfWidth)], sums[e]);
    space.gram[thread] = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    __syncthreads();
    double sum = 0;
    for (int j = 0; j <= c; ++j)
      sum = fused(space.gram[r * kHalfWidth + j], space.factor[j * kHalfWidth + c], sum);
    space.product[thread] = sum;
    __syncthreads();
    sum = 0;
    for (int j = 0; j <= r; ++j)
      sum = fused(space.factor[j * kHalfWidth + r], space.product[j * kHalfWidth + c], sum);
    space.gram[thread] = 0.5 * sum;
    __syncthreads();
    for (int i = thread; i < m; i += kThreads) {
      double w[kHalfWidth] = {};
#pragma unroll 1
      for (int j = 0; j < kHalfWidth; ++j) {
        const double u = work.product[tiled(i, j, kHalfWidth)], v = column(j, i);
#pragma unroll
        for (int e = 0; e < kHalfWidth; ++e)  // T is zero below its diagonal
          w[e] = fused(-v, space.gram[j * kHalfWidth + e], fused(u, space.factor[j * kHalfWidth + e], w[e]));
      }
#pragma unroll
      for (int e = 0; e < kHalfWidth; e += 2)
        pair_at(next + tiled(i, kHalfWidth + e, kStride)) = {w[e], w[e + 1]};
    }
  }
};

__device__ __forceinline__ void reduce_to_band(const Task<double>& task, double* workspace) {
  static_assert(Band::kThreads == BandSpace::kParts, "a thread for each entry of T");
  const std::int64_t index = blockIdx.x;
  const Workspace work(workspace, index, task.n);
  auto& space = *shared_memory<BandSpace>();
  double* panel = reinterpret_cast<double*>(shared_memory<unsigned char>() + sizeof(BandSpace));
  const int thread = static_cast<int>(threadIdx.x);
  const Band band{work, space, panel, thread, thread % 32, thread / 32};
  band.load(task, index);
  if (task.means != nullptr) band.turn_mean(task, index);
  const double* last = nullptr;
#pragma unroll 1
  for (int first = 0, turn = 0;; first += kHalfWidth, turn = 1 - turn) {
    const int m = work.rows - first - kHalfWidth;
    double* next = work.vectors + turn * work.rows * kStride;
    band.load_panel(first, last);
    if (m == 0) break;
    __syncthreads();
    band.factor_panel(first, m);
    for (int i = thread; i < m; i += Band::kThreads)
      for (int c = 0; c < kHalfWidth; c += 2)
        pair_at(next + tiled(i, c, kStride)) = {band.column(c, i), band.column(c + 1, i)};
    __syncthreads();
    band.update_and_multiply(first + kHalfWidth, m, last == nullptr ? nullptr : last + kHalfWidth * kStride);
    __syncthreads();
    band.finish(m, next);
    __syncthreads();
    last = next;
  }
}

}  // namespace rgfast::cuda::spectrum
