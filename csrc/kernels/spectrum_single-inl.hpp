// Householder tridiagonalisation of a single matrix, SIMD along its columns: for matrices too few to fill the
// lanes, or too large to share a cache. No include guard: see foreach_target.hpp.

namespace rgfast {
namespace RGFAST_NS {

template <class T>
RGFAST_INLINE typename Simd<T>::Vec lane_numbers() {
  T numbers[Simd<T>::lanes];
  for (int lane = 0; lane < Simd<T>::lanes; ++lane) numbers[lane] = static_cast<T>(lane);
  return load(numbers);
}

inline long long whole_vectors(long long n, long long lanes) { return (n + lanes - 1) / lanes * lanes; }

// A -= u w' + w u' for what is pending on columns [j, j + Columns) and their share of y = A next.
// Column-major, lower triangle, rows padded to whole vectors with zeros in all vectors; what is stored above
// the diagonal is ignored.
template <class T, int Columns, int Updates>
RGFAST_INLINE void single_block(T* a, long long stride, long long rows, long long j, const Pending<T>& by,
                                const T* __restrict next, T* __restrict y) {
  using V = typename Simd<T>::Vec;
  constexpr int L = Simd<T>::lanes;
  constexpr int kRoom = Updates > 0 ? Updates : 1;
  const T* u[kRoom] = {};
  const T* w[kRoom] = {};
  T* column[Columns];
  V uj[kRoom][Columns];
  V wj[kRoom][Columns];
  V nj[Columns];
  V sum[Columns];
#pragma GCC unroll 8
  for (int c = 0; c < Columns; ++c) {
    column[c] = a + (j + c) * stride;
#pragma GCC unroll 2
    for (int p = 0; p < Updates; ++p) {
      u[p] = by.u[p];
      w[p] = by.w[p];
      uj[p][c] = broadcast(u[p][j + c]);
      wj[p][c] = broadcast(w[p][j + c]);
    }
    nj[c] = broadcast(next[j + c]);
    sum[c] = V{};
  }
  const V numbers = lane_numbers<T>();
  long long i = j / L * L;
  for (; i < j + Columns; i += L) {
    V yi = load(y + i);
    for (int c = 0; c < Columns; ++c) {
      const V diagonal = broadcast(static_cast<T>(j + c - i));
      V v = load(column[c] + i);
#pragma GCC unroll 2
      for (int p = 0; p < Updates; ++p) {
        v = fnma(load(u[p] + i), wj[p][c], v);
        v = fnma(load(w[p] + i), uj[p][c], v);
      }
      v = select(less(numbers, diagonal), V{}, v);
      if (Updates > 0) store(column[c] + i, v);
      yi = fma(v, nj[c], yi);
      sum[c] = fma(select(less(diagonal, numbers), v, V{}), load(next + i), sum[c]);
    }
    store(y + i, yi);
  }
  for (; i < rows; i += L) {
    V ui[kRoom];
    V wi[kRoom];
#pragma GCC unroll 2
    for (int p = 0; p < Updates; ++p) {
      ui[p] = load(u[p] + i);
      wi[p] = load(w[p] + i);
    }
    const V ni = load(next + i);
    V yi = load(y + i);
#pragma GCC unroll 8
    for (int c = 0; c < Columns; ++c) {
      V v = load(column[c] + i);
#pragma GCC unroll 2
      for (int p = 0; p < Updates; ++p) {
        v = fnma(ui[p], wj[p][c], v);
        v = fnma(wi[p], uj[p][c], v);
      }
      if (Updates > 0) store(column[c] + i, v);
      yi = fma(v, nj[c], yi);
      sum[c] = fma(v, ni, sum[c]);
    }
    store(y + i, yi);
  }
  for (int c = 0; c < Columns; ++c) y[j + c] += sum_lanes(sum[c]);
}

template <class T, int Updates>
inline void single_pass(T* a, long long stride, long long n, long long rows, long long first,
                        const Pending<T>& by, const T* next, T* y) {
  constexpr int kColumns = kMostPending == 2 ? 4 : 2;
  for (long long i = first / Simd<T>::lanes * Simd<T>::lanes; i < rows; ++i) y[i] = T(0);
  long long j = first;
  for (; j + kColumns <= n; j += kColumns)
    single_block<T, kColumns, Updates>(a, stride, rows, j, by, next, y);
  for (; j < n; ++j) single_block<T, 1, Updates>(a, stride, rows, j, by, next, y);
}

// As `multiply`; next has zeros above row `first`.
template <class T>
inline void multiply_single(T* a, long long stride, long long n, long long rows, long long first,
                            Pending<T>& pending, const T* next, T* y) {
  using V = typename Simd<T>::Vec;
  constexpr int L = Simd<T>::lanes;
  if (pending.count == kMostPending) {
    single_pass<T, kMostPending>(a, stride, n, rows, first, pending, next, y);
    pending.count = 0;
    return;
  }
  single_pass<T, 0>(a, stride, n, rows, first, pending, next, y);
  if (pending.count == 0) return;
  const long long from = first / L * L;
  const T* const u = pending.u[0];
  const T* const w = pending.w[0];
  V by_w{};
  V by_u{};
  for (long long i = from; i < rows; i += L) {
    by_w = fma(load(w + i), load(next + i), by_w);
    by_u = fma(load(u + i), load(next + i), by_u);
  }
  const V along_w = broadcast(sum_lanes(by_w));
  const V along_u = broadcast(sum_lanes(by_u));
  for (long long i = from; i < rows; i += L)
    store(y + i, fnma(load(w + i), along_u, fnma(load(u + i), along_w, load(y + i))));
}

// Destroys a (column-major, lower triangle; columns of `stride` >= whole vectors of rows, which past n may
// hold anything). `scratch` holds kReductionRows vectors of as many rows. `mean` and `square` as in
// tridiagonal_lanes.
template <class T>
inline void tridiagonal_single(T* a, long long stride, long long n, T* diagonal, T* off_squared, T* scratch,
                               const T* mean, T* square) {
  using V = typename Simd<T>::Vec;
  constexpr int L = Simd<T>::lanes;
  const long long rows = whole_vectors(n, L);
  T* next = scratch;
  T* const y = next + rows;
  Pending<T> pending;
  for (int p = 0; p < kMostPending; ++p) {
    pending.u[p] = y + (2 * p + 1) * rows;
    pending.w[p] = y + (2 * p + 2) * rows;
  }
  for (long long i = 0; i < kReductionRows * rows; ++i) scratch[i] = T(0);
  for (long long j = 0; j < n; ++j)
    for (long long i = n; i < rows; ++i) a[j * stride + i] = T(0);
  if (mean != nullptr)
    for (long long i = 0; i < n; ++i) y[i] = mean[i];
  for (long long k = mean == nullptr ? 0 : -1; k < n; ++k) {
    T* const column = k < 0 ? y : a + k * stride;
    for (int p = 0; p < pending.count; ++p) {
      const T* const u = pending.u[p];
      const T* const w = pending.w[p];
      const V uk = broadcast(u[k]);
      const V wk = broadcast(w[k]);
      for (long long i = k / L * L; i < rows; i += L) {
        V v = load(column + i);
        v = fnma(load(u + i), wk, v);
        v = fnma(load(w + i), uk, v);
        store(column + i, v);
      }
    }
    if (k >= 0) {
      diagonal[k] = column[k];
      off_squared[k] = T(0);
    }
    if (k == n - 1) break;
    const T alpha = column[k + 1];
    // What stands above row k + 2 does not belong to the rest; next is zero there but for its first entry.
    const V numbers = lane_numbers<T>();
    V part{};
    const long long from = (k + 1) / L * L;
    for (long long i = from; i < rows; i += L) {
      V x = load(column + i);
      if (i < k + 2) x = select(less(numbers, broadcast(static_cast<T>(k + 2 - i))), V{}, x);
      store(next + i, x);
      part = fma(x, x, part);
    }
    const T rest = sum_lanes(part);
    const T total = alpha * alpha + rest;
    *(k < 0 ? square : off_squared + k) = total;
    if (k == n - 2) continue;
    T tau = T(0);
    T inverse = T(0);
    if (rest > T(0)) {
      const T norm = scalar_sqrt(total);
      const T shifted = alpha < T(0) ? alpha - norm : alpha + norm;
      inverse = T(1) / shifted;
      tau = (shifted < T(0) ? -shifted : shifted) / norm;
    }
    const V factor = broadcast(inverse);
    for (long long i = from; i < rows; i += L) store(next + i, load(next + i) * factor);
    next[k + 1] = T(1);
    multiply_single(a, stride, n, rows, k + 1, pending, next, y);
    V dots{};
    for (long long i = from; i < rows; i += L) dots = fma(load(y + i), load(next + i), dots);
    const T half = T(-0.5) * tau * tau * sum_lanes(dots);
    T* const w = pending.w[pending.count];
    for (long long i = from; i < rows; i += L)
      store(w + i, fma(broadcast(half), load(next + i), broadcast(tau) * load(y + i)));
    T* const spare = pending.u[pending.count];
    pending.u[pending.count] = next;
    next = spare;
    ++pending.count;
  }
}

}  // namespace RGFAST_NS
}  // namespace rgfast
