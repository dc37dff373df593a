// A step of Householder's reduction to tridiagonal form by a block: what every warp works out by itself.
//
// Step k has the rows i of the vectors in its lanes, 32 apart in chunks. It knows the last reflector v (rows
// k and on; v[k] = 1) and the products A v, of which it makes the update w: A <- A - v w' - w v'. It applies
// that to column k alone, whose reflector u follows. Applying it to the rest of A and forming A u is one
// pass. Column -1, where the steps start there, is the mean that A may be raised by.
#pragma once

#include "cuda/spectrum_team.cuh"

namespace rgfast::cuda::spectrum {

template <class T, int Chunks>
struct Steps {
  static constexpr int kRows = 32 * Chunks;

  T last[Chunks], update[Chunks], now[Chunks];  // v, w, u
  T tau;

  __device__ __forceinline__ Steps() : tau(T(0)) {
#pragma unroll
    for (int c = 0; c < Chunks; ++c) last[c] = update[c] = now[c] = T(0);
  }

  // Takes `product(i)`, row i of p = A v, unless this is the first step, and column k of A without the
  // update. One thread of the block, the `writer`'s, leaves entries of the tridiagonal matrix: coupling[i] is
  // between rows i - 1 and i. False at the last row, which needs no reflector.
  //
  // A v less a multiple of v has the same update: p[k] v, which leaves of A = mu 1 + E what E has. With q for
  // it the column with the update is y + slope v, y = column - tau q, where the slope comes from q v. The
  // column's square comes from sums that are added up over the lanes together with q v, so that lanes are
  // waited for once. Where these cancel, it is summed once more, of the column itself.
  template <class Product>
  __device__ __forceinline__ bool advance(int k, int n, int lane, bool begun, const Product& product,
                                          const T* column, bool writer, T* diagonal, T* coupling) {
    const int first = k / 32, second = (k + 1) / 32;
    // q v, and of the rows after k + 1 y y, y v and v v; y and v of row k + 1.
    T sums[4] = {}, lead_y = T(0), lead_v = T(0);
    T x[Chunks];  // y, then the column
    const T shift = begun ? product(k) : T(0);
#pragma unroll
    for (int c = 0; c < Chunks; ++c) {
      x[c] = T(0);
      if (c >= first) {
        const int i = 32 * c + lane;
        const bool there = i >= k && i < n;
        update[c] = there && begun ? fused(-shift, last[c], product(i)) : T(0);
        x[c] = there ? fused(-tau, update[c], column[i]) : T(0);
        const T y = opaque(x[c]), v = opaque(last[c]);
        lead_y = c == second ? y : lead_y;
        lead_v = c == second ? v : lead_v;
        const T below_y = i > k + 1 ? y : T(0), below_v = i > k + 1 ? v : T(0);
        sums[0] = fused(update[c], v, sums[0]);
        sums[1] = fused(below_y, below_y, sums[1]);
        sums[2] = fused(below_y, below_v, sums[2]);
        sums[3] = fused(below_v, below_v, sums[3]);
      }
    }
    lead_y = __shfl_sync(kFullWarp, lead_y, (k + 1) % 32);
    lead_v = __shfl_sync(kFullWarp, lead_v, (k + 1) % 32);
    const T part = shared_out<4, 32>(sums, lane);
#pragma unroll
    for (int s = 0; s < 4; ++s) sums[s] = __shfl_sync(kFullWarp, part, 8 * s);
    const T slope = tau * tau * sums[0];  // q[k] is zero
#pragma unroll
    for (int c = 0; c < Chunks; ++c)
      if (c >= first) {
        const int i = 32 * c + lane;
        update[c] = fused(tau, update[c], T(-0.5) * slope * last[c]);
        x[c] = fused(slope, last[c], x[c]);
        if (writer && i == k) diagonal[k] = x[c];
      }
    if (k == n - 1) return false;
    const T apart = fused(slope * slope, sums[3], sums[1]);  // what y and slope v have by themselves
    T rest = fused(slope, T(2) * sums[2], apart);
    if (rest < T(0x1p-4) * apart) {
      rest = T(0);
#pragma unroll
      for (int c = 0; c < Chunks; ++c) {
        const T below = 32 * c + lane > k + 1 ? x[c] : T(0);
        rest = fused(below, below, rest);
      }
      rest = sum_of_lanes<32>(rest);
    }
    const Reflector<T> h = reflector(fused(slope, lead_v, lead_y), rest);
    if (writer && lane == 0) coupling[k + 1] = h.value;
    tau = h.tau;
#pragma unroll
    for (int c = 0; c < Chunks; ++c)
      if (c >= first) {
        const int i = 32 * c + lane;
        now[c] = i == k + 1 ? T(1) : i > k + 1 ? x[c] * h.inverse : T(0);
      }
    return true;
  }

  // Leaves u, v and w of the columns that this warp has, groups of four in turns, to be read by all its
  // lanes.
  template <int Warps>
  __device__ __forceinline__ void publish_own(int k, int lane, int warp, T* u, T* v, T* w) const {
#pragma unroll
    for (int c = 0; c < Chunks; ++c) {
      const int i = 32 * c + lane;
      if (c >= k / 32 && static_cast<unsigned>(i) / 4 % Warps == static_cast<unsigned>(warp)) {
        u[i] = now[c];
        v[i] = i > k ? last[c] : T(0);
        w[i] = i > k ? update[c] : T(0);
      }
    }
    __syncwarp();
  }
};

// Groups of four columns that a warp adds up over its lanes at once: as many shuffles wait for each other as
// for one group.
constexpr int kTogether = 4;

// Row i of a product: what its column has of it and what the warps have, in two chains that do not wait for
// each other.
template <int Warps, int Rows, class T>
__device__ __forceinline__ T of_all(T by_column, const T (&by_row)[Warps][Rows], int i) {
  T even = by_row[0][i], odd = by_column;
#pragma unroll
  for (int from = 1; from < Warps; ++from) (from % 2 == 0 ? even : odd) += by_row[from][i];
  return even + odd;
}

// Leaves the sums of the groups `from`, `from` + Warps, ... of a warp where the block can read them.
template <int Warps, class T>
__device__ __forceinline__ void leave_sums(const T (&by_column)[4 * kTogether], int lane, int from,
                                           int groups, T* sums) {
  constexpr int kLanes = 32 / (4 * kTogether);  // that have the same sum
  const T sum = shared_out<4 * kTogether, 32>(by_column, lane);
  const int column = lane / kLanes, g = from + column / 4 * Warps;
  if (lane % kLanes == 0 && g < groups) sums[4 * g + column % 4] = sum;
}

// Leaves the scales in shared memory and, if there are means, the scaled one as column -1.
template <class T, int Warps, class Space>
__device__ __forceinline__ void keep_scales(const BlockTeam<T, Warps>& team, const Task<T>& task,
                                            std::int64_t index, const MatrixScale<T>& scale, Space& space) {
  const int n = task.n;
  if (task.means != nullptr) {
    T square = T(0), mean = T(0);
    if (team.rank < n) mean = loaded_mean(task.means + index * n + n - 1 - team.rank, task.samples, square);
    __syncthreads();
    const auto mean_scale = MeanScale<T>::of(team.largest(square));
    if (team.rank < n) space.column[1][team.rank] = mean * mean_scale.down();
    if (threadIdx.x == 0) space.mean = mean_scale;
  }
  if (threadIdx.x == 0) space.scale = scale;
}

// `write_eigenvalues` (spectrum_team.cuh) of what a block has left in shared memory.
template <class T, int Warps, class Space>
__device__ __forceinline__ void write_eigenvalues(const BlockTeam<T, Warps>& team, const Task<T>& task,
                                                  std::int64_t index, Space& space) {
  __syncthreads();
  const int n = task.n, k = team.rank;
  const bool mine = k < n;
  write_eigenvalues(
      team, task, index, mine ? space.diagonal[k] : T(0), mine && k > 0 ? space.coupling[k] : T(0),
      mine && k + 1 < n ? space.coupling[k + 1] : T(0), task.means == nullptr ? T(0) : space.coupling[0],
      space.scale, space.mean, space.rows, space.table);
}

}  // namespace rgfast::cuda::spectrum
