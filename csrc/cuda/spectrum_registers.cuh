// Eigenvalues by a block per matrix, whose lower triangle stays in registers.
//
// A warp has groups of four columns, in turns; a lane rows 32 apart. One barrier per step: sums over columns
// and over rows go through shared memory, in two buffers that alternate.
#pragma once

#include "cuda/spectrum_steps.cuh"

namespace rgfast::cuda::spectrum {

template <class T, int Chunks, int Warps>
struct RegisterSpace {
  static constexpr int kRows = 32 * Chunks;
  Row<T> rows[kRows];
  Count<T> table[32 * Warps];
  alignas(16) T now[kRows];
  T last[kRows], update[kRows];
  T by_row[2][Warps][kRows], by_column[2][kRows];  // parts of A u
  T column[2][kRows];
  T diagonal[kRows], coupling[kRows];
  T scratch[BlockTeam<T, Warps>::kScratch];
  MatrixScale<T> scale;  // here until the end: a register of every thread is worth more
  MeanScale<T> mean;
};

template <class T, int Chunks, int Warps>
__device__ __forceinline__ void solve_in_registers(const Task<T>& task) {
  static_assert(Warps <= 8 && (Warps & (Warps - 1)) == 0,
                "the groups of a warp in a chunk are known beforehand");
  constexpr int kGroups = 8 * Chunks / Warps;
  const int n = task.n, groups = (n + 3) / 4;
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  auto& space = *shared_memory<RegisterSpace<T, Chunks, Warps>>();
  const BlockTeam<T, Warps> team{static_cast<int>(threadIdx.x), space.scratch};
  const std::int64_t index = blockIdx.x;
  const T* matrix = task.matrices + index * n * n;

  // a[q][t][c] is in column 4 (q Warps + warp) + t and row 32 c + lane; zero above the group.
  T a[kGroups][4][Chunks], largest = T(0);
#pragma unroll
  for (int q = 0; q < kGroups; ++q) {
    const int g = q * Warps + warp;
#pragma unroll
    for (int t = 0; t < 4; ++t)
#pragma unroll
      for (int c = q * Warps / 8; c < Chunks; ++c) {
        const int i = 32 * c + lane, j = 4 * g + t;
        a[q][t][c] = i >= 4 * g && i < n && j < n ? loaded(matrix + place_of(n, i, j), largest) : T(0);
      }
  }
  const auto scale = MatrixScale<T>::of(team.largest(largest));
  keep_scales(team, task, index, scale, space);
#pragma unroll
  for (int q = 0; q < kGroups; ++q)
#pragma unroll
    for (int t = 0; t < 4; ++t)
#pragma unroll
      for (int c = q * Warps / 8; c < Chunks; ++c) a[q][t][c] *= scale.down;
  if (warp == 0) {
#pragma unroll
    for (int c = 0; c < Chunks; ++c) space.column[0][32 * c + lane] = a[0][0][c];
  }
  __syncthreads();

  Steps<T, Chunks> steps;
#pragma unroll 1
  for (int k = task.start();; ++k) {
    const int ready = k & 1, next = 1 - ready;
    const auto product = [&](int i) { return of_all(space.by_column[ready][i], space.by_row[ready], i); };
    if (!steps.advance(k, n, lane, k > task.start(), product, space.column[ready], warp == 0, space.diagonal,
                       space.coupling))
      break;
    steps.template publish_own<Warps>(k, lane, warp, space.now, space.last, space.update);
    T by_row[Chunks] = {};
    const int first = (k + 1) / 4, kept = (k + 1) % 4;
#pragma unroll
    for (int from = 0; from < kGroups; from += kTogether) {
      if ((from + kTogether - 1) * Warps + warp < first || from * Warps + warp >= groups) continue;
      T by_column[4 * kTogether] = {};
#pragma unroll
      for (int q = from; q < from + kTogether && q < kGroups; ++q) {
        const int g = q * Warps + warp;
        if (g < first || g >= groups) continue;
        T u[4], v[4], w[4];
        load_four(space.now + 4 * g, u);
        load_four(space.last + 4 * g, v);
        load_four(space.update + 4 * g, w);
#pragma unroll
        for (int c = q * Warps / 8; c < Chunks; ++c) {
          const int i = 32 * c + lane;
          T row_v = steps.last[c], row_w = steps.update[c], row_u = steps.now[c];
          if (32 * c < 4 * (q * Warps + Warps)) {  // the group's own rows may be in this chunk
            row_v = i >= 4 * g ? row_v : T(0);
            row_w = i >= 4 * g ? row_w : T(0);
            row_u = i >= 4 * g + 4 ? row_u : T(0);
          }
#pragma unroll
          for (int t = 0; t < 4; ++t) {
            const T entry = fused(-row_v, w[t], fused(-row_w, v[t], a[q][t][c]));
            a[q][t][c] = entry;
            by_row[c] = fused(entry, u[t], by_row[c]);
            by_column[4 * (q - from) + t] = fused(entry, row_u, by_column[4 * (q - from) + t]);
          }
        }
        if (g == first) {
#pragma unroll
          for (int t = 0; t < 4; ++t)
            if (t == kept) {
#pragma unroll
              for (int c = q * Warps / 8; c < Chunks; ++c)
                space.column[next][32 * c + lane] = opaque(a[q][t][c]);
            }
        }
      }
      leave_sums<Warps>(by_column, lane, from * Warps + warp, groups, space.by_column[next]);
    }
#pragma unroll
    for (int c = 0; c < Chunks; ++c) {
      if (c >= (k + 1) / 32) space.by_row[next][warp][32 * c + lane] = by_row[c];
      steps.last[c] = steps.now[c];
    }
    __syncthreads();
  }
  write_eigenvalues(team, task, index, space);
}

}  // namespace rgfast::cuda::spectrum
