// What the stages of the eigenvalues of large matrices leave each other, in the device's memory.
#pragma once

#include "cuda/spectrum_team.cuh"

namespace rgfast::cuda::spectrum {

constexpr int kHalfWidth = 16;
// Rows of a column of the band, of its diagonal and below: room for what a sweep pushes out of it for a
// while. Also what a row of V and W has.
constexpr int kStride = 2 * kHalfWidth;

// Matrices lie in tiles of 8 x 8, one after another along a row of tiles, so that a warp moves a tile by 16
// bytes a lane, which are neighbors: entries 2t and 2t + 1 of row g = lane / 4, t = lane % 4, as `mma` has
// them.
constexpr int kTile = 64;
struct alignas(16) Pair {
  double even, odd;
};
__device__ __forceinline__ const Pair& pair_at(const double* at) {
  return *reinterpret_cast<const Pair*>(at);
}
__device__ __forceinline__ Pair& pair_at(double* at) { return *reinterpret_cast<Pair*>(at); }

__host__ __device__ __forceinline__ int tiled(int i, int j, int columns) {
  return (i >> 3) * 8 * columns + (j >> 3) * kTile + (i & 7) * 8 + (j & 7);
}

// How a matrix was scaled, and the norm of its scaled mean.
struct State {
  MatrixScale<double> scale;
  MeanScale<double> mean;
  double norm;
};
static_assert(sizeof(State) == 32);

__host__ __device__ constexpr int whole_panels(int n) {
  return (n + kHalfWidth - 1) / kHalfWidth * kHalfWidth;
}

// Of a matrix. rgfast/ops/spectrum/stages.py has the same.
__host__ __device__ constexpr std::int64_t workspace_doubles(int n) {
  const std::int64_t rows = whole_panels(n);
  return rows * (rows + 3 * kStride + kHalfWidth + 2) + 4;
}
static_assert(workspace_doubles(193) == 66980);

struct Workspace {
  int rows;
  double* matrix;               // [rows, rows], in tiles
  double* vectors;              // [2][rows, kStride], V and W, in tiles
  double* product;              // [rows, kHalfWidth], A V, in tiles
  double* band;                 // [rows, kStride], by columns
  double *diagonal, *coupling;  // [rows] each, coupling[i] between rows i - 1 and i
  State* state;

  __device__ __forceinline__ Workspace(double* workspace, std::int64_t index, int n)
      : rows(whole_panels(n)), matrix(workspace + index * workspace_doubles(n)) {
    vectors = matrix + static_cast<std::int64_t>(rows) * rows;
    product = vectors + 2 * rows * kStride;
    band = product + rows * kHalfWidth;
    diagonal = band + rows * kStride;
    coupling = diagonal + rows;
    state = reinterpret_cast<State*>(coupling + rows);
  }
  __device__ __forceinline__ double& at(int i, int j) const { return matrix[tiled(i, j, rows)]; }
  __device__ __forceinline__ double& band_at(int i, int j) const { return band[j * (kStride - 1) + i]; }
};

}  // namespace rgfast::cuda::spectrum
