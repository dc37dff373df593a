// From half-width 16 to a tridiagonal matrix, by a block per matrix, and its eigenvalues.
//
// Sweep s takes column s to tridiagonal form by a reflector of 16 rows, which pushes a triangle out of the
// band below. The next reflector puts that back where its first column is concerned, and so on down to the
// last row. A warp has a sweep, two steps behind the one before: they do not touch the same entries then.
#pragma once

#include "cuda/spectrum_workspace.cuh"

namespace rgfast::cuda::spectrum {

constexpr int kDone = 1 << 28;

// A block of the band by a warp: row lane % 16, and 8 columns on either half of the lanes.
struct Sweep {
  static constexpr int kMine = kHalfWidth / 2;
  double* band;
  int n, row, from;
  double u[kMine], tau;  // the last reflector, as columns have it

  __device__ __forceinline__ double& at(int i, int j) const { return band[j * (kStride - 1) + i]; }

  // The values of lanes `from` and on of what 16 rows have.
  __device__ __forceinline__ void by_column(double value, double (&to)[kMine]) const {
#pragma unroll
    for (int q = 0; q < kMine; ++q) to[q] = __shfl_sync(kFullWarp, value, from + q);
  }
  __device__ __forceinline__ static double times(const double (&a)[kMine], const double (&b)[kMine]) {
    double even = 0, odd = 0;
#pragma unroll
    for (int q = 0; q < kMine; q += 2) {
      even = fused(a[q], b[q], even);
      odd = fused(a[q + 1], b[q + 1], odd);
    }
    const double sum = even + odd;
    return sum + __shfl_xor_sync(kFullWarp, sum, 16);
  }

  // Rows `first` and on. At the first step, of sweep first - 1, they have one column to the left.
  __device__ __forceinline__ void step(int first, bool begins, int lane) {
    const int i = first + row, left = begins ? first - 1 : first - kHalfWidth;
    const bool there = i < n;
    double b[kMine], d[kMine];
#pragma unroll
    for (int q = 0; q < kMine; ++q) {
      const int c = from + q, j = first + c;
      b[q] = there && (!begins || c == 0) ? at(i, left + c) : 0.0;
      d[q] = there && j < n ? at(i > j ? i : j, i > j ? j : i) : 0.0;
    }
    const double moved = tau * times(b, u);
#pragma unroll
    for (int q = 0; q < kMine; ++q) b[q] = fused(-moved, u[q], b[q]);

    const double x = __shfl_sync(kFullWarp, b[0], row);
    const double below = row > 0 ? x : 0.0;
    const Reflector<double> h = reflector(__shfl_sync(kFullWarp, x, 0), sum_of_lanes<16>(below * below));
    const double mine = row == 0 ? 1.0 : below * h.inverse;
    tau = h.tau;
    by_column(mine, u);

    double sums[kMine];
#pragma unroll
    for (int q = 0; q < kMine; ++q) sums[q] = mine * b[q];
    const double sum = tau * shared_out<kMine, 16>(sums, lane);
    const double product = times(d, u);
    const double half = 0.5 * tau * tau * sum_of_lanes<16>(product * mine);
    const double w = fused(tau, product, -half * mine);
    double others[kMine];
    by_column(w, others);
    __syncwarp();  // a lane below the diagonal writes what one above it has read
#pragma unroll
    for (int q = 0; q < kMine; ++q) {
      const int c = from + q, j = first + c;
      b[q] = fused(-mine, __shfl_sync(kFullWarp, sum, 2 * from + 2 * q), b[q]);
      if (c == 0) b[q] = row == 0 ? h.value : 0.0;
      d[q] = fused(-mine, others[q], fused(-w, u[q], d[q]));
      if (there && (!begins || c == 0)) at(i, left + c) = b[q];
      if (there && i >= j) at(i, j) = d[q];
    }
  }
};

// With the band in shared memory if there is room. By any number of warps.
template <bool Shared>
__device__ __forceinline__ void chase(const Task<double>& task, double* workspace) {
  const int n = task.n;
  const Workspace work(workspace, blockIdx.x, n);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int threads = static_cast<int>(blockDim.x), warps = threads / 32;
  double* band = work.band;
  int* progress = shared_memory<int>();  // steps that a sweep has made
  if constexpr (Shared) {
    band = shared_memory<double>();
    progress = reinterpret_cast<int*>(band + work.rows * kStride);
    for (int i = thread; i < work.rows * kStride; i += threads) band[i] = work.band[i];
  }
  for (int i = thread; i < n; i += threads) progress[i] = 0;
  __syncthreads();
#pragma unroll 1
  for (int s = warp; s < n - 2; s += warps) {
    Sweep sweep{band, n, lane % kHalfWidth, lane / kHalfWidth * Sweep::kMine, {}, 0.0};
    int made = 0;
#pragma unroll 1
    for (int first = s + 1; first < n; first += kHalfWidth) {
      if (s > 0) wait_for(progress + s - 1, made + 2);
      __syncwarp();
      sweep.step(first, made == 0, lane);
      __syncwarp();
      ++made;
      if (lane == 0) publish(progress + s, made);
    }
    if (lane == 0) publish(progress + s, kDone);
  }
  __syncthreads();
  for (int i = thread; i < n; i += threads) {
    work.diagonal[i] = band[i * kStride];
    work.coupling[i] = i > 0 ? band[(i - 1) * kStride + 1] : 0.0;
  }
}

constexpr int kCountWarps = 4, kCountRows = 1024;

struct CountSpace {
  Row<double> rows[kCountRows];
  Count<double> table[32 * kCountWarps];
  double scratch[BlockTeam<double, kCountWarps>::kScratch];
};

// The eigenvalues of what `chase` left, by a thread each. Neighbors that are as close as the tolerance may be
// in the wrong order.
__device__ __forceinline__ void count_all(const Task<double>& task, double* workspace) {
  constexpr int kThreads = 32 * kCountWarps;
  auto& space = *shared_memory<CountSpace>();
  const Workspace work(workspace, blockIdx.x, task.n);
  const int n = task.n, thread = static_cast<int>(threadIdx.x), padded = padded_rows<double>(n);
  const int k = static_cast<int>(blockIdx.y) * kThreads + thread;
  const BlockTeam<double, kCountWarps> team{thread, space.scratch};
#pragma unroll 1
  for (int round = 0; round < (task.means == nullptr ? 1 : 2); ++round) {
    MatrixScale<double> scale = work.state->scale;
    double factor = 1, more = 0;
    if (round == 1) {
      const RaisedScale<double> raised(scale, work.state->mean);
      scale = raised.both;
      factor = raised.matrix;
      more = task.samples * work.state->norm * work.state->norm * raised.square;
    }
    const auto diagonal = [&](int i) { return factor * work.diagonal[i] + (i == 0 ? more : 0.0); };
    const auto coupling = [&](int i) { return i > 0 && i < n ? factor * work.coupling[i] : 0.0; };
    __syncthreads();
    double bound = 0;
    for (int i = thread; i < n; i += kThreads)
      bound = larger(bound, magnitude(diagonal(i)) + magnitude(coupling(i)) + magnitude(coupling(i + 1)));
    bound = team.largest(bound);
    const TridiagonalScale<double> unit = tridiagonal_scale(bound);
    for (int i = thread; i < padded; i += kThreads)
      space.rows[i] = i < n ? scaled_row(diagonal(i), coupling(i), unit.down, i == 0) : padding_row<double>();
    __syncthreads();
    space.table[thread] = count_below(space.rows, padded, table_point(thread, kThreads, unit.bound));
    __syncthreads();
    if (k >= n) continue;
    double value =
        find_eigenvalue(space.rows, padded, k, from_table(space.table, kThreads, n, k, unit.bound));
    value =
        bound > 0 ? value * power_of_two<double>(unit.exponent) * power_of_two<double>(scale.exponent) : 0.0;
    double* to = round == 0 ? task.values : task.raw;
    to[static_cast<std::int64_t>(blockIdx.x) * n + k] = scale.finite ? value : Limits<double>::nothing;
  }
}

}  // namespace rgfast::cuda::spectrum
