// What the stages of the eigenvalues of large matrices leave each other, in the device's memory.
#pragma once

#include "cuda/spectrum_team.cuh"

namespace rgfast::cuda::spectrum {

constexpr int kHalfWidth = 16;
// Rows of a column of the band, of its diagonal and below: room for what a sweep pushes out of it for a
// while. Also what a row of V and W has.
constexpr int kStride = 2 * kHalfWidth;

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
  double* matrix;               // [rows, rows]
  double* vectors;              // [2][rows, kStride], V and W
  double* product;              // [rows, kHalfWidth], A V
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
  __device__ __forceinline__ double& at(int i, int j) const {
    return matrix[static_cast<std::int64_t>(i) * rows + j];
  }
  __device__ __forceinline__ double& band_at(int i, int j) const { return band[j * (kStride - 1) + i]; }
};

}  // namespace rgfast::cuda::spectrum
