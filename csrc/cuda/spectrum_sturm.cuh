// Eigenvalues of a tridiagonal matrix by counting: one after another by itself, each from a shared table.
//
// T is scaled so that no row sums to more than 1 in magnitude, and its couplings are raised to u/2, which
// moves an eigenvalue by no more than u. The number of eigenvalues below x is then that of sign changes in
// the leading minors of T - x, p+ = (d - x) p - e^2 p-, without a division. A count is exact for a matrix
// whose entries are a few u away, so that it errs as little as that however many rows there are.
#pragma once

#include "cuda/spectrum_math.cuh"

namespace rgfast::cuda::spectrum {

// A row of T: what is on the diagonal, and the square of what couples it to the row before. Read as one word.
template <class T>
struct alignas(2 * sizeof(T)) Row {
  T diagonal, square;
};

// Minors leave the range of T no sooner than in so many rows: one shrinks by u^2/4 in two steps at most.
template <class T>
constexpr int kRowsPerScale = sizeof(T) == 8 ? 16 : 4;

template <class T>
__host__ __device__ constexpr int padded_rows(int n) {
  return (n + kRowsPerScale<T> - 1) / kRowsPerScale<T> * kRowsPerScale<T>;
}

// Halfway between the ends of an interval no wider, an eigenvalue is off by 2 u of the largest row sum.
template <class T>
constexpr T kTolerance = T(4) * Limits<T>::unit;

template <class T>
__host__ __device__ __forceinline__ Row<T> scaled_row(T diagonal, T before, T scale, bool first) {
  const T coupling = first ? T(0) : larger(magnitude(before) * scale, T(0.5) * Limits<T>::unit);
  return {diagonal * scale, coupling * coupling};
}

// Rows that pad T: no x up to 1 has a sign change there.
template <class T>
__host__ __device__ __forceinline__ Row<T> padding_row() {
  return {T(2), T(0)};
}

// Eigenvalues below x, and det(T - x) = minor 2^exponent.
template <class T>
struct Count {
  T minor;
  int exponent, below;
};

template <class T>
__host__ __device__ __forceinline__ Count<T> count_below(const Row<T>* rows, int padded, T x) {
  constexpr int kStep = kRowsPerScale<T>;
  T minor = T(1), before = T(0);
  int below = 0, exponent = 0;
#pragma unroll 1
  for (int i = 0; i < padded; i += kStep) {
#pragma unroll
    for (int t = 0; t < kStep; ++t) {
      const Row<T> row = rows[i + t];
      const T next = fused(row.diagonal - x, minor, -(row.square * before));
      below += signs_differ(next, minor);
      before = minor;
      minor = next;
    }
    const int e = exponent_of(larger(magnitude(minor), magnitude(before)));
    const T scale = power_of_two<T>(-e);
    minor *= scale;
    before *= scale;
    exponent += e;
  }
  return {minor, exponent, below};
}

// An interval with eigenvalue k in it. What is known of its ends guides the search.
template <class T>
struct Bracket {
  T low, high;
  Count<T> at_low, at_high;
  bool known_low, known_high;
};

template <class T>
__host__ __device__ __forceinline__ Bracket<T> whole(int n, T bound) {
  return {-bound, bound, {T(0), 0, 0}, {T(0), 0, n}, false, false};
}

template <class T>
__host__ __device__ __forceinline__ void narrow(Bracket<T>& at, int k, T x, const Count<T>& count) {
  if (count.below <= k) {
    at.low = x;
    at.at_low = count;
    at.known_low = true;
  } else {
    at.high = x;
    at.at_high = count;
    at.known_high = true;
  }
}

// Where a table of `points` counts over the interval of `whole` looks.
template <class T>
__host__ __device__ __forceinline__ T table_point(int at, int points, T bound) {
  return bound * (T(2 * (at + 1)) / T(points + 1) - T(1));
}

// The bracket of eigenvalue k that a table of counts leaves. They may be out of order by rounding: any k is
// between two that follow each other, all the same.
template <class T>
__host__ __device__ __forceinline__ Bracket<T> from_table(const Count<T>* table, int points, int n, int k,
                                                          T bound) {
  int before = -1, after = points;
  while (after - before > 1) {
    const int middle = (before + after) / 2;
    (table[middle].below <= k ? before : after) = middle;
  }
  Bracket<T> at = whole(n, bound);
  if (before >= 0) narrow(at, k, table_point(before, points, bound), table[before]);
  if (after < points) narrow(at, k, table_point(after, points, bound), table[after]);
  return at;
}

// Interpolation that truncates and projects (ITP; Oliveira and Takahashi, 2020) between the determinants at
// the ends of an interval with one eigenvalue: as fast as the secant, no slower than halving. `slack` is how
// far beyond halving it may still go. As published it ends up halving where the slack is used up by one bad
// guess: here it starts again. A guess keeps 3/4 of the tolerance from the secant's, so that the other end
// moves, too.
template <class T>
struct Interpolation {
  bool started = false;
  T slack = T(0), curvature = T(0);

  __host__ __device__ __forceinline__ T next(const Bracket<T>& at, T tolerance) {
    const T width = at.high - at.low;
    const T middle = T(0.5) * (at.low + at.high);
    if (!(at.known_low && at.known_high && at.at_high.below - at.at_low.below == 1)) return middle;
    if (!started) {
      started = true;
      slack = tolerance;
      while (slack < width) slack += slack;
      curvature = T(0.2) / width;
    }
    int apart = at.at_low.exponent - at.at_high.exponent;
    apart = apart > 60 ? 60 : apart < -60 ? -60 : apart;
    const T low = magnitude(at.at_low.minor) * power_of_two<T>(apart);
    const T sum = low + magnitude(at.at_high.minor);
    const T secant = sum > T(0) ? at.low + width * (low / sum) : middle;
    const T toward = middle - secant;
    const T side = toward >= T(0) ? T(1) : T(-1);
    const T offset = larger(curvature * width * width, T(0.75) * tolerance);
    const T truncated = magnitude(toward) >= offset ? secant + side * offset : middle;
    const T reach = larger(slack - T(0.5) * width, T(0));
    slack *= T(0.5);
    if (reach < T(0.05) * width) {
      started = false;
      return middle;
    }
    const T x = magnitude(truncated - middle) <= reach ? truncated : middle - side * reach;
    return x > at.low && x < at.high ? x : middle;
  }
};

// Eigenvalue k of the scaled T, ascending from 0. `counts`, where given, is how many it took.
template <class T>
__host__ __device__ __forceinline__ T find_eigenvalue(const Row<T>* rows, int padded, int k, Bracket<T> at,
                                                      int* counts = nullptr) {
  constexpr T kTol = kTolerance<T>;
  constexpr int kMost = 128;  // halving needs 53: no data keep a thread here
  Interpolation<T> interpolation;
  int taken = 0;
#pragma unroll 1
  for (; at.high - at.low > kTol && taken < kMost; ++taken) {
    const T x = interpolation.next(at, kTol);
    narrow(at, k, x, count_below(rows, padded, x));
  }
  if (counts != nullptr) *counts = taken;
  return T(0.5) * (at.low + at.high);
}

// What a tridiagonal matrix whose largest row sum of magnitudes is `bound` is scaled by, and the bound then.
template <class T>
struct TridiagonalScale {
  int exponent;
  T down, bound;
};
template <class T>
__host__ __device__ __forceinline__ TridiagonalScale<T> tridiagonal_scale(T bound) {
  const int exponent = scale_of(bound) + 1;
  const T down = power_of_two<T>(-exponent);
  return {exponent, down, smaller(bound * down, T(1)) + T(16) * Limits<T>::unit};
}

}  // namespace rgfast::cuda::spectrum
