// What a block has of a matrix that it brings to half-width 16, and how it takes part in products.
#pragma once

#include "cuda/common/mma.cuh"
#include "cuda/spectrum_workspace.cuh"

namespace rgfast::cuda::spectrum {

// Of a column of the panel in shared memory, beyond the workspace's rows: 8 columns at 16 bytes are in banks
// of their own.
constexpr int kPanelPadding = 8;
constexpr int kBlock = kHalfWidth * kHalfWidth;

// Before the panel. What the steps of a panel and the products leave is never there at the same time.
template <int Warps>
struct BandSpace {
  struct Steps {
    double parts[2][Warps][kHalfWidth], pivots[2][kHalfWidth], sums[Warps][kHalfWidth];
    double gram[kBlock], tau[kHalfWidth];
    double scratch[BlockTeam<double, Warps>::kScratch];
  };
  static constexpr int kBuffers = Warps < 16 ? 2 : 1;
  double factor[kBlock];  // T
  union {
    double products[kBuffers * Warps][kBlock];
    Steps steps;
  };
};

template <int Warps>
struct BandParts {
  const Workspace& work;
  BandSpace<Warps>& space;
  double* panel;
  int thread, lane, warp;

  static constexpr int kThreads = 32 * Warps;

  __device__ __forceinline__ double& column(int c, int i) const {
    return panel[c * (work.rows + kPanelPadding) + i];
  }

  // -V and -W of 16 rows, as the first operand of a product.
  __device__ __forceinline__ void load_left(const double* last, int row, double (&left)[2][8]) const {
#pragma unroll
    for (int part = 0; part < 2; ++part)
      load_left(last + kHalfWidth / 8 * kTile * part, row, kStride, -1.0, left[part]);
  }
  __device__ __forceinline__ void load_left(const double* from, int row, int columns, double sign,
                                            double (&left)[8]) const {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int half = e / 2, lower = e % 2;
      const Pair entries = pair_at(from + tiled(row + 8 * lower, 8 * half, columns) + 2 * lane);
      left[4 * half + lower] = sign * entries.even;
      left[4 * half + 2 + lower] = sign * entries.odd;
    }
  }
  // W and V of 8 rows, which `others` points to, as the second.
  __device__ __forceinline__ static void load_right(const double* others, int part, double (&right)[4]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Pair entries = pair_at(others + (2 * (1 - part) + half) * kTile);
      right[2 * half] = entries.even;
      right[2 * half + 1] = entries.odd;
    }
  }
};

}  // namespace rgfast::cuda::spectrum
