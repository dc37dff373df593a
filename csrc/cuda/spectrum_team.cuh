// The threads that solve a matrix together: lanes of a warp, or a block.
#pragma once

#include "cuda/spectrum_sturm.cuh"

namespace rgfast::cuda::spectrum {

template <int Lanes, class T>
__device__ __forceinline__ T sum_of_lanes(T value) {
#pragma unroll
  for (int apart = Lanes / 2; apart > 0; apart /= 2) value += __shfl_xor_sync(kFullWarp, value, apart);
  return value;
}
// Sums Count values over Width lanes: a lane gets the sum of that which its upper bits name.
template <int Count, int Width, class T>
__device__ __forceinline__ T shared_out(const T (&value)[Count], int lane) {
  static_assert(Count < Width, "more lanes than sums");
  constexpr int kHalf = Count / 2;
  if constexpr (Count == 1) {
    return sum_of_lanes<Width>(value[0]);
  } else {
    const bool upper = (lane & (Width / 2)) != 0;
    T keep[kHalf];
#pragma unroll
    for (int j = 0; j < kHalf; ++j) {
      const T give = upper ? value[j] : value[j + kHalf];
      keep[j] = (upper ? value[j + kHalf] : value[j]) + __shfl_xor_sync(kFullWarp, give, Width / 2);
    }
    return shared_out<kHalf, Width / 2>(keep, lane);
  }
}

template <int Lanes, class T>
__device__ __forceinline__ T largest_of_lanes(T value) {
#pragma unroll
  for (int apart = Lanes / 2; apart > 0; apart /= 2)
    value = larger(value, __shfl_xor_sync(kFullWarp, value, apart));
  return value;
}
// The largest of this lane's and those before it.
template <int Lanes, class T>
__device__ __forceinline__ T largest_so_far(T value, int rank) {
#pragma unroll
  for (int apart = 1; apart < Lanes; apart *= 2) {
    const T before = __shfl_up_sync(kFullWarp, value, apart, Lanes);
    if (rank >= apart) value = larger(value, before);
  }
  return value;
}

template <class T, int Lanes>
struct LaneTeam {
  static constexpr int kSize = Lanes;
  int rank;

  __device__ __forceinline__ void sync() const { __syncwarp(); }
  __device__ __forceinline__ T largest(T value) const { return largest_of_lanes<Lanes>(value); }
  __device__ __forceinline__ T so_far(T value) const { return largest_so_far<Lanes>(value, rank); }
};

template <class T, int Warps>
struct BlockTeam {
  static constexpr int kSize = 32 * Warps;
  static constexpr int kScratch = 2 * Warps;
  int rank;
  T* scratch;  // [kScratch], shared

  __device__ __forceinline__ void sync() const { __syncthreads(); }

  // Two calls need a barrier between them.
  __device__ __forceinline__ T largest(T value) const {
    value = largest_of_lanes<32>(value);
    if (rank % 32 == 0) scratch[rank / 32] = value;
    __syncthreads();
    value = scratch[0];
#pragma unroll
    for (int warp = 1; warp < Warps; ++warp) value = larger(value, scratch[warp]);
    return value;
  }

  __device__ __forceinline__ T so_far(T value) const {
    value = largest_so_far<32>(value, rank % 32);
    if (rank % 32 == 31) scratch[Warps + rank / 32] = value;
    __syncthreads();
#pragma unroll
    for (int warp = 0; warp + 1 < Warps; ++warp)
      if (warp < rank / 32) value = larger(value, scratch[Warps + warp]);
    return value;
  }
};

// From shared memory, on 16 bytes.
template <class T>
__device__ __forceinline__ void load_four(const T* from, T (&to)[4]) {
  const T* aligned = static_cast<const T*>(__builtin_assume_aligned(from, 16));
#pragma unroll
  for (int t = 0; t < 4; ++t) to[t] = aligned[t];
}

// Entry (i, j) of a matrix as the kernels see it: the last row comes first, so that lanes along i >= j read
// neighbors in memory although only the lower triangle of rows is read. The eigenvalues are the same.
__device__ __forceinline__ int place_of(int n, int i, int j) {
  const int after = i > j ? i : j, before = i > j ? j : i;
  return (n - 1 - before) * n + n - 1 - after;
}

// An entry, and the largest magnitude of all so far: infinite if one is not finite.
template <class T>
__device__ __forceinline__ T loaded(const T* entry, T& largest) {
  const T value = *entry;
  const bool finite = magnitude(value) <= Limits<T>::largest;
  largest = larger(largest, finite ? magnitude(value) : Limits<T>::infinity);
  return finite ? value : T(0);
}

// An entry of the mean of so many samples, whose n mean mean' a moment may be raised by.
template <class T>
__device__ __forceinline__ T loaded_mean(const T* entry, T samples, T& largest) {
  const T value = *entry, square = samples * value * value;
  const bool finite = square <= Limits<T>::largest;
  largest = larger(largest, finite ? square : Limits<T>::infinity);
  return finite ? value : T(0);
}

// How a matrix is scaled; one that is not finite becomes zero.
template <class T>
struct MatrixScale {
  T down;
  int exponent;
  bool finite;

  __device__ __forceinline__ static MatrixScale of(T largest) {
    const bool finite = largest <= Limits<T>::largest;
    const int exponent = scale_of(largest);
    return {finite ? power_of_two<T>(-exponent) : T(0), exponent, finite};
  }
};

// How a mean is scaled, by half of the exponent of what it adds to a matrix.
template <class T>
struct MeanScale {
  int half;
  bool finite;

  __device__ __forceinline__ static MeanScale of(T largest_square) {
    return {scale_of(largest_square) >> 1, largest_square <= Limits<T>::largest};
  }
  __device__ __forceinline__ T down() const { return power_of_two<T>(-half); }
};

// The matrix and what it is raised by have one scale between them, in which the smaller may vanish.
template <class T>
struct RaisedScale {
  MatrixScale<T> both;
  T matrix, square;  // from the units of either

  __device__ __forceinline__ RaisedScale(const MatrixScale<T>& scale, const MeanScale<T>& mean)
      : both{T(0), scale.exponent > 2 * mean.half ? scale.exponent : 2 * mean.half,
             scale.finite && mean.finite},
        matrix(power_of_two<T>(scale.exponent - both.exponent)),
        square(power_of_two<T>(2 * mean.half - both.exponent)) {}
};

// What a kernel is asked for. `means[batch, n]`, unless null, are of so many `samples`: `raw` then gets the
// eigenvalues of matrix + samples mean mean'.
template <class T>
struct Task {
  const T* matrices;
  const T* means;
  int n;
  std::int64_t batch;
  T samples;
  T* values;
  T* raw;

  // The rows before the first: with a mean there is a step that takes it to the first unit vector. After that
  // the tridiagonal matrices of both differ in one entry.
  __device__ __forceinline__ int start() const { return means == nullptr ? 0 : -1; }
};

// Eigenvalue `team.rank` of a tridiagonal matrix of n <= team.kSize rows, of which each thread brings its own
// row: what is on the diagonal, what couples it to the row before and to the one after. In `rows` and `table`
// (shared) there is room for the padded rows and for a count of each thread. NaN if the matrix was not
// finite.
template <class T, class Team>
__device__ __forceinline__ T eigenvalue(const Team& team, int n, T diagonal, T before, T after,
                                        const MatrixScale<T>& scale, Row<T>* rows, Count<T>* table) {
  const int rank = team.rank, padded = padded_rows<T>(n);
  const bool mine = rank < n;
  const T bound = team.largest(mine ? magnitude(diagonal) + magnitude(before) + magnitude(after) : T(0));
  const TridiagonalScale<T> unit = tridiagonal_scale(bound);
  for (int i = rank; i < padded; i += Team::kSize)
    rows[i] = i < n ? scaled_row(diagonal, before, unit.down, i == 0) : padding_row<T>();
  team.sync();
  table[rank] = count_below(rows, padded, table_point(rank, Team::kSize, unit.bound));
  team.sync();
  T value = -Limits<T>::infinity;
  if (mine) value = find_eigenvalue(rows, padded, rank, from_table(table, Team::kSize, n, rank, unit.bound));
  // Neighbors that rounding has put in the wrong order are as close as the tolerance.
  value = team.so_far(value);
  // Either power is a normal number where their product is not.
  value = bound > T(0) ? value * power_of_two<T>(unit.exponent) * power_of_two<T>(scale.exponent) : T(0);
  return scale.finite ? value : Limits<T>::nothing;
}

// Writes the eigenvalues of matrix `index`, and of the raised one if that is asked for: `norm` times the
// first unit vector is what the first reflector made of the scaled mean.
template <class T, class Team>
__device__ __forceinline__ void write_eigenvalues(const Team& team, const Task<T>& task, std::int64_t index,
                                                  T diagonal, T before, T after, T norm,
                                                  const MatrixScale<T>& scale, const MeanScale<T>& mean,
                                                  Row<T>* rows, Count<T>* table) {
  const int n = task.n, rank = team.rank, rounds = task.means == nullptr ? 1 : 2;
  MatrixScale<T> now = scale;
  T* to = task.values;
#pragma unroll 1
  for (int round = 0; round < rounds; ++round) {
    if (round == 1) {
      const RaisedScale<T> raised(scale, mean);
      now = raised.both;
      to = task.raw;
      diagonal *= raised.matrix;
      before *= raised.matrix;
      after *= raised.matrix;
      if (rank == 0) diagonal += task.samples * norm * norm * raised.square;
      team.sync();
    }
    const T value = eigenvalue(team, n, diagonal, before, after, now, rows, table);
    if (index < task.batch && rank < n) to[index * n + rank] = value;
  }
}

}  // namespace rgfast::cuda::spectrum
