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
  int start;

  __device__ __forceinline__ explicit Steps(int start) : tau(T(0)), start(start) {
#pragma unroll
    for (int c = 0; c < Chunks; ++c) last[c] = update[c] = now[c] = T(0);
  }

  // Takes `product(i)`, row i of A v, and column k of A without the update. One thread of the block, the
  // `writer`'s, leaves entries of the tridiagonal matrix: coupling[i] is between rows i - 1 and i. False at
  // the last row, which needs no reflector.
  template <class Product>
  __device__ __forceinline__ bool advance(int k, int n, int lane, const Product& product, const T* column,
                                          bool writer, T* diagonal, T* coupling) {
    const int first = k / 32;
    if (k > start) {
      T dot = T(0);
#pragma unroll
      for (int c = 0; c < Chunks; ++c)
        if (c >= first) {
          const int i = 32 * c + lane;
          const T sum = product(i);
          update[c] = i >= k && i < n ? sum : T(0);
          dot = fused(update[c], last[c], dot);
        }
      const T half = T(0.5) * tau * tau * sum_of_lanes<32>(dot);
#pragma unroll
      for (int c = 0; c < Chunks; ++c)
        if (c >= first) update[c] = fused(tau, update[c], -half * last[c]);
    }
    T on_top = T(0);  // w[k]
#pragma unroll
    for (int c = 0; c < Chunks; ++c) {
      const T value = opaque(update[c]);
      on_top = c == first ? value : on_top;
    }
    on_top = __shfl_sync(kFullWarp, on_top, k & 31);
    T x[Chunks], lead = T(0), rest = T(0);
#pragma unroll
    for (int c = 0; c < Chunks; ++c) {
      x[c] = T(0);
      if (c >= first) {
        const int i = 32 * c + lane;
        if (i >= k && i < n) x[c] = fused(-last[c], on_top, column[i] - update[c]);
        const T value = opaque(x[c]);
        if (writer && i == k) diagonal[k] = value;
        lead = c == (k + 1) / 32 ? value : lead;
        const T below = i > k + 1 ? x[c] : T(0);
        rest = fused(below, below, rest);
      }
    }
    if (k == n - 1) return false;
    lead = __shfl_sync(kFullWarp, lead, (k + 1) % 32);
    const Reflector<T> h = reflector(lead, sum_of_lanes<32>(rest));
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
      if (c >= k / 32 && i / 4 % Warps == warp) {
        u[i] = now[c];
        v[i] = i > k ? last[c] : T(0);
        w[i] = i > k ? update[c] : T(0);
      }
    }
    __syncwarp();
  }
};

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
