// Eigenvalues of matrices of up to 32 rows: a row per lane, in registers, and several matrices per warp.
#pragma once

#include "cuda/spectrum_team.cuh"

namespace rgfast::cuda::spectrum {

constexpr int kLaneThreads = 128;
// Columns that are taken or left together: loads of one hide behind those of the others.
constexpr int kColumns = 8;

// Shared memory of one matrix.
template <class T, int Lanes>
struct LaneSpace {
  Row<T> rows[padded_rows<T>(Lanes)];
  Count<T> table[Lanes];
  alignas(16) T reflector[Lanes];
  alignas(16) T update[Lanes];
};

template <class T, int Lanes>
__device__ __forceinline__ void solve_in_lanes(const Task<T>& task) {
  const int n = task.n;
  const int slot = static_cast<int>(threadIdx.x) / Lanes, r = static_cast<int>(threadIdx.x) % Lanes;
  const LaneTeam<T, Lanes> team{r};
  auto& space = shared_memory<LaneSpace<T, Lanes>>()[slot];
  // Lanes without a matrix of their own do the last one again: a warp's collectives need all of its lanes.
  const std::int64_t wanted = static_cast<std::int64_t>(blockIdx.x) * (kLaneThreads / Lanes) + slot;
  const std::int64_t index = wanted < task.batch ? wanted : task.batch - 1;
  const T* matrix = task.matrices + index * n * n;

  T a[Lanes], largest = T(0);
#pragma unroll
  for (int j = 0; j < Lanes; ++j) a[j] = j < n && r < n ? loaded(matrix + place_of(n, r, j), largest) : T(0);
  const auto scale = MatrixScale<T>::of(team.largest(largest));
#pragma unroll
  for (int j = 0; j < Lanes; ++j) a[j] *= scale.down;

  T diagonal = T(0), after = T(0), norm = T(0), x = a[0];
  MeanScale<T> mean_scale{0, true};
  if (task.means != nullptr) {  // the columns begin with the mean
    T square = T(0);
    x = r < n ? loaded_mean(task.means + index * n + n - 1 - r, task.samples, square) : T(0);
    mean_scale = MeanScale<T>::of(team.largest(square));
    x *= mean_scale.down();
  }
#pragma unroll 1
  for (int k = task.start(); k + 1 < n; ++k) {
    const T below = r > k + 1 ? x : T(0);
    const T lead = __shfl_sync(kFullWarp, x, k + 1, Lanes);
    const Reflector<T> h = reflector(lead, sum_of_lanes<Lanes>(below * below));
    if (r == k) {
      diagonal = x;
      after = h.value;
    }
    if (k < 0) norm = h.value;
    const T u = r == k + 1 ? T(1) : below * h.inverse;
    space.reflector[r] = u;
    team.sync();
    T sums[4] = {};
#pragma unroll
    for (int j = 0; j < Lanes; j += kColumns)
      if (j + kColumns - 1 > k && j < n) {
#pragma unroll
        for (int part = j; part < j + kColumns; part += 4) {
          T now[4];
          load_four(space.reflector + part, now);
#pragma unroll
          for (int t = 0; t < 4; ++t) sums[t] = fused(a[part + t], now[t], sums[t]);
        }
      }
    const T product = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    const T half = T(0.5) * h.tau * h.tau * sum_of_lanes<Lanes>(product * u);
    const T w = r > k ? fused(h.tau, product, -half * u) : T(0);
    space.update[r] = w;
    team.sync();
#pragma unroll
    for (int j = 0; j < Lanes; j += kColumns)
      if (j + kColumns - 1 > k && j < n) {
#pragma unroll
        for (int part = j; part < j + kColumns; part += 4) {
          T now[4], update[4];
          load_four(space.reflector + part, now);
          load_four(space.update + part, update);
#pragma unroll
          for (int t = 0; t < 4; ++t) {
            T& entry = a[part + t];
            entry = fused(-u, update[t], fused(-w, now[t], entry));
            const T value = opaque(entry);
            x = part + t == k + 1 ? value : x;
          }
        }
      }
    team.sync();
  }
  if (r == n - 1) diagonal = x;
  const T previous = __shfl_up_sync(kFullWarp, after, 1, Lanes);
  const T before = r > 0 ? previous : T(0);
  write_eigenvalues(team, task, wanted, diagonal, before, after, norm, scale, mean_scale, space.rows,
                    space.table);
}

}  // namespace rgfast::cuda::spectrum
