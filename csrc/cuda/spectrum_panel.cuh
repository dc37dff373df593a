// Panels of 16 columns, which Householder reflectors make triangular.
#pragma once

#include "cuda/spectrum_band_parts.cuh"

namespace rgfast::cuda::spectrum {

template <int Warps>
struct Panel : BandParts<Warps> {
  using Parts = BandParts<Warps>;
  using Parts::column;
  using Parts::kThreads;
  using Parts::lane;
  using Parts::load_left;
  using Parts::load_right;
  using Parts::space;
  using Parts::thread;
  using Parts::warp;
  using Parts::work;

  // Columns `first` and on, up to date: what is in the band already goes there, the rest to the panel.
  // `last`, unless null, has V and W of the rows from `first` on. Else the matrix has its scale yet to get.
  __device__ __forceinline__ void load_panel(int first, const double* last, double down) const {
    const int g = lane / 4, t = lane % 4, below = 8 * work.rows;
    double right[2][2][4];
    if (last != nullptr) {
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int part = 0; part < 2; ++part)
          load_right(last + half * 8 * kStride + 2 * lane, part, right[half][part]);
    }
#pragma unroll 1
    for (int row = kHalfWidth * warp; row < work.rows - first; row += kHalfWidth * Warps) {
      double left[2][8];
      if (last != nullptr) load_left(last, row, left);
      const double* at = &work.at(first + row, first) + 2 * lane;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const Pair upper = pair_at(at + half * kTile), lower = pair_at(at + half * kTile + below);
        double c[4] = {upper.even, upper.odd, lower.even, lower.odd};
        if (last != nullptr) {
#pragma unroll
          for (int part = 0; part < 2; ++part) mma_m16n8k16(c, left[part], right[half][part]);
        } else {
#pragma unroll
          for (int e = 0; e < 4; ++e) c[e] *= down;
        }
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int i = g + 8 * (e / 2), j = 8 * half + 2 * t + e % 2;
          if (row > 0)
            column(j, row - kHalfWidth + i) = c[e];
          else if (i >= j)
            work.band_at(first + i, first + j) = c[e];
        }
      }
    }
  }

  // Makes the panel's m rows triangular, which goes to the band, and leaves V in its place and in `next`, T
  // in `space.factor`. A thread has Rows of the rows in registers.
  template <int Rows>
  __device__ __forceinline__ void factor_panel(int first, int m, double* next) const {
    double x[Rows][kHalfWidth];
#pragma unroll
    for (int r = 0; r < Rows; ++r) {
      const int i = thread + r * kThreads;
#pragma unroll
      for (int c = 0; c < kHalfWidth; ++c) x[r][c] = i < m ? column(c, i) : 0.0;
    }
    // The columns turn by four at a time, so that those of four steps have places known beforehand.
#pragma unroll 1
    for (int done = 0; done < kHalfWidth; done += 4) {
#pragma unroll
      for (int t = 0; t < 4; ++t) step(first, done, t, x);
#pragma unroll
      for (int r = 0; r < Rows; ++r) {
        double turned[kHalfWidth];
#pragma unroll
        for (int c = 0; c < kHalfWidth; ++c) turned[c] = x[r][(c + 4) % kHalfWidth];
#pragma unroll
        for (int c = 0; c < kHalfWidth; ++c) x[r][c] = turned[c];
      }
    }
#pragma unroll
    for (int r = 0; r < Rows; ++r) {
      const int i = thread + r * kThreads;
      if (i >= m) continue;
#pragma unroll
      for (int c = 0; c < kHalfWidth; c += 2) {
        column(c, i) = x[r][c];
        column(c + 1, i) = x[r][c + 1];
        pair_at(next + tiled(i, c, kStride)) = {x[r][c], x[r][c + 1]};
      }
    }
    if (warp == 0) write_factor();
  }

  // The reflector of column k = done + t of a panel, which is x[..][t]: x[..][j] are of column done + j,
  // those beyond the last of V. One barrier, whose sums give the norm, the products with the columns left and
  // V'V at once.
  template <int Rows>
  __device__ __forceinline__ void step(int first, int done, int t, double (&x)[Rows][kHalfWidth]) const {
    auto& steps = space.steps;
    const int k = done + t, left = kHalfWidth - done, buffer = t & 1;
    double dots[kHalfWidth] = {};
#pragma unroll
    for (int r = 0; r < Rows; ++r) {
      const double below = thread + r * kThreads > k ? x[r][t] : 0.0;
#pragma unroll
      for (int j = 0; j < kHalfWidth; ++j) dots[j] = fused(below, x[r][j], dots[j]);
    }
    if (thread == k) {
#pragma unroll
      for (int j = 0; j < kHalfWidth; ++j) steps.pivots[buffer][j] = x[0][j];
    }
    const double part = shared_out<kHalfWidth, 32>(dots, lane);
    if (lane % 2 == 0) steps.parts[buffer][warp][lane / 2] = part;
    __syncthreads();
    const int mine = lane % kHalfWidth;
    double sum = 0;
#pragma unroll
    for (int from = 0; from < Warps; from += 2) sum += steps.parts[buffer][from + lane / kHalfWidth][mine];
    sum += __shfl_xor_sync(kFullWarp, sum, 16);
    const Reflector<double> h = reflector(steps.pivots[buffer][t], __shfl_sync(kFullWarp, sum, t));
    const double dot = fused(h.inverse, sum, steps.pivots[buffer][mine]);  // u' and a column
    if (lane < kHalfWidth) {
      steps.sums[warp][mine] = h.tau * dot;
      if (warp == 0 && (mine < t || mine >= left))
        steps.gram[(done + mine) % kHalfWidth * kHalfWidth + k] = dot;
      if (warp == 0 && mine == t) steps.tau[k] = h.tau;
    }
    __syncwarp();
#pragma unroll
    for (int r = 0; r < Rows; ++r) {
      const int i = thread + r * kThreads;
      const double u = i > k ? x[r][t] * h.inverse : i == k ? 1.0 : 0.0;
      if (i <= k) work.band_at(first + kHalfWidth + i, first + k) = i == k ? h.value : x[r][t];
#pragma unroll
      for (int j = t + 1; j < kHalfWidth; ++j)
        if (j < left) x[r][j] = fused(-u, steps.sums[warp][j], x[r][j]);
      x[r][t] = u;
    }
  }

  // T of V'V, by one warp: a lane has a row.
  __device__ __forceinline__ void write_factor() const {
    __syncwarp();
    double row[kHalfWidth];
#pragma unroll
    for (int k = 0; k < kHalfWidth; ++k) {
      const double tau = space.steps.tau[k];
      double sum = 0;
#pragma unroll
      for (int j = 0; j < k; ++j) sum = fused(row[j], space.steps.gram[j * kHalfWidth + k], sum);
      row[k] = lane == k ? tau : lane < k ? -tau * sum : 0.0;
      if (lane < kHalfWidth) space.factor[lane * kHalfWidth + k] = row[k];
    }
  }
};

}  // namespace rgfast::cuda::spectrum
