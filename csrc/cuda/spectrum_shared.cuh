// Eigenvalues by a block per matrix, whose lower triangle is packed in shared memory.
//
// Groups of four columns go to the warps in turns, each with its rows from the diagonal on, two or four
// entries of a row side by side so that a lane moves 16 bytes and lanes are neighbors.
#pragma once

#include "cuda/spectrum_steps.cuh"

namespace rgfast::cuda::spectrum {

// Before the packed matrix in shared memory.
template <class T, int Chunks, int Warps>
struct SharedSpace {
  static constexpr int kRows = 32 * Chunks;
  alignas(16) T now[kRows];
  T last[kRows], update[kRows];
  union {  // sums of the reduction, then the eigenvalues' own
    T by_row[Warps][kRows];
    Row<T> rows[kRows];
  };
  union {
    T sums[2][kRows];  // by column, and of all
    Count<T> table[32 * Warps];
  };
  T column[2][kRows];
  T diagonal[kRows], coupling[kRows];
  T scratch[BlockTeam<T, Warps>::kScratch];
  MatrixScale<T> scale;  // here until the end: a register of every thread is worth more
  MeanScale<T> mean;
};

// Where group g begins, the groups before it having n, n - 4, ... rows of four entries.
__host__ __device__ __forceinline__ int group_offset(int n, int g) { return 4 * (n * g - 2 * g * (g - 1)); }

// Row r of a group with so many rows.
template <class T>
__device__ __forceinline__ void load_row(const T* group, int r, int rows, T (&to)[4]) {
  constexpr int kWord = 16 / sizeof(T);
#pragma unroll
  for (int part = 0; part < 4; part += kWord) {
    const T* from = static_cast<const T*>(__builtin_assume_aligned(group + part * rows + kWord * r, 16));
#pragma unroll
    for (int t = 0; t < kWord; ++t) to[part + t] = from[t];
  }
}
template <class T>
__device__ __forceinline__ void store_row(T* group, int r, int rows, const T (&from)[4]) {
  constexpr int kWord = 16 / sizeof(T);
#pragma unroll
  for (int part = 0; part < 4; part += kWord) {
    T* to = static_cast<T*>(__builtin_assume_aligned(group + part * rows + kWord * r, 16));
#pragma unroll
    for (int t = 0; t < kWord; ++t) to[t] = from[part + t];
  }
}

template <class T, int Chunks, int Warps>
__device__ __forceinline__ void solve_in_shared(const Task<T>& task) {
  using Space = SharedSpace<T, Chunks, Warps>;
  const int n = task.n, groups = (n + 3) / 4, thread = static_cast<int>(threadIdx.x);
  const int lane = thread % 32, warp = thread / 32;
  auto& space = *shared_memory<Space>();
  T* packed = reinterpret_cast<T*>(shared_memory<unsigned char>() + sizeof(Space));
  const BlockTeam<T, Warps> team{thread, space.scratch};
  const std::int64_t index = blockIdx.x;
  const T* matrix = task.matrices + index * n * n;

  T largest = T(0);
  for (int g = warp; g < groups; g += Warps)
    for (int r = lane; r < n - 4 * g; r += 32) {
      T entry[4];
#pragma unroll
      for (int t = 0; t < 4; ++t)
        entry[t] = 4 * g + t < n ? loaded(matrix + place_of(n, 4 * g + r, 4 * g + t), largest) : T(0);
      store_row(packed + group_offset(n, g), r, n - 4 * g, entry);
    }
  const auto scale = MatrixScale<T>::of(team.largest(largest));
  keep_scales(team, task, index, scale, space);
  for (int g = warp; g < groups; g += Warps)
    for (int r = lane; r < n - 4 * g; r += 32) {
      T entry[4];
      load_row(packed + group_offset(n, g), r, n - 4 * g, entry);
#pragma unroll
      for (int t = 0; t < 4; ++t) entry[t] *= scale.down;
      store_row(packed + group_offset(n, g), r, n - 4 * g, entry);
      if (g == 0) space.column[0][r] = entry[0];
    }
  __syncthreads();

  Steps<T, Chunks> steps;
#pragma unroll 1
  for (int k = task.start();; ++k) {
    const auto product = [&](int i) { return space.sums[1][i]; };
    if (!steps.advance(k, n, lane, k > task.start(), product, space.column[k & 1], warp == 0, space.diagonal,
                       space.coupling))
      break;
    steps.template publish_own<Warps>(k, lane, warp, space.now, space.last, space.update);
    T by_row[Chunks] = {};
    const int first = (k + 1) / 4, kept = (k + 1) % 4;
#pragma unroll 1
    for (int from = first + ((warp - first) % Warps + Warps) % Warps; from < groups;
         from += kTogether * Warps) {
      T by_column[4 * kTogether] = {};
#pragma unroll
      for (int s = 0; s < kTogether; ++s) {
        const int g = from + s * Warps;
        if (g >= groups) continue;
        T* group = packed + group_offset(n, g);
        const int rows = n - 4 * g;
        T v[4], w[4];
        load_four(space.last + 4 * g, v);
        load_four(space.update + 4 * g, w);
#pragma unroll
        for (int pair = -(Chunks % 2); pair < Chunks; pair += 2) {
          if (pair + 1 < g / 8) continue;
          T entry[2][4];  // of two chunks, so that loads of one hide behind the other
          bool there[2];
#pragma unroll
          for (int z = 0; z < 2; ++z) {
            const int r = 32 * (pair + z) + lane - 4 * g;
            there[z] = pair + z >= 0 && r >= 0 && r < rows;
            if (there[z]) {
              load_row(group, r, rows, entry[z]);
            } else {
#pragma unroll
              for (int t = 0; t < 4; ++t) entry[z][t] = T(0);
            }
          }
#pragma unroll
          for (int z = pair < 0 ? 1 : 0; z < 2; ++z) {
            const int c = pair + z, r = 32 * c + lane - 4 * g;
            const T row_u = r >= 4 ? steps.now[c] : T(0);
            T u[4];  // once more for every chunk: registers are few
            load_four(space.now + 4 * g, u);
            T even = by_row[c], odd = T(0);
#pragma unroll
            for (int t = 0; t < 4; ++t) {
              entry[z][t] = fused(-steps.last[c], w[t], fused(-steps.update[c], v[t], entry[z][t]));
              by_column[4 * s + t] = fused(entry[z][t], row_u, by_column[4 * s + t]);
            }
            even = fused(entry[z][0], u[0], even);
            odd = fused(entry[z][1], u[1], odd);
            even = fused(entry[z][2], u[2], even);
            odd = fused(entry[z][3], u[3], odd);
            by_row[c] = there[z] ? even + odd : by_row[c];
            if (there[z]) {
              store_row(group, r, rows, entry[z]);
              if (g == first) {
                T column = entry[z][0];
#pragma unroll
                for (int t = 1; t < 4; ++t) column = t == kept ? entry[z][t] : column;
                space.column[(k + 1) & 1][4 * g + r] = column;
              }
            }
          }
        }
      }
      leave_sums<Warps>(by_column, lane, from, groups, space.sums[0]);
    }
#pragma unroll
    for (int c = 0; c < Chunks; ++c) {
      if (c >= (k + 1) / 32) space.by_row[warp][32 * c + lane] = by_row[c];
      steps.last[c] = steps.now[c];
    }
    __syncthreads();
    for (int i = k + 1 + thread; i < n; i += 32 * Warps)
      space.sums[1][i] = of_all(space.sums[0][i], space.by_row, i);
    __syncthreads();
  }
  write_eigenvalues(team, task, index, space);
}

}  // namespace rgfast::cuda::spectrum
