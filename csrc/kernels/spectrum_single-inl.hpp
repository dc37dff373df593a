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

// A -= u w' + w u' on columns [j, j + Columns) and their share of y = A next. Column-major, lower triangle,
// rows padded to whole vectors with zeros in all four vectors; what is stored above the diagonal is ignored.
template <class T, int Columns, bool Update>
RGFAST_INLINE void single_block(T* a, long long stride, long long rows, long long j, const T* __restrict u,
                                const T* __restrict w, const T* __restrict next, T* __restrict y) {
  using V = typename Simd<T>::Vec;
  constexpr int L = Simd<T>::lanes;
  T* column[Columns];
  V uj[Columns];
  V wj[Columns];
  V nj[Columns];
  V sum[Columns];
#pragma GCC unroll 8
  for (int c = 0; c < Columns; ++c) {
    column[c] = a + (j + c) * stride;
    if (Update) {
      uj[c] = broadcast(u[j + c]);
      wj[c] = broadcast(w[j + c]);
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
      if (Update) {
        v = fnma(load(u + i), wj[c], v);
        v = fnma(load(w + i), uj[c], v);
      }
      v = select(less(numbers, diagonal), V{}, v);
      if (Update) store(column[c] + i, v);
      yi = fma(v, nj[c], yi);
      sum[c] = fma(select(less(diagonal, numbers), v, V{}), load(next + i), sum[c]);
    }
    store(y + i, yi);
  }
  for (; i < rows; i += L) {
    V ui{};
    V wi{};
    if (Update) {
      ui = load(u + i);
      wi = load(w + i);
    }
    const V ni = load(next + i);
    V yi = load(y + i);
#pragma GCC unroll 8
    for (int c = 0; c < Columns; ++c) {
      V v = load(column[c] + i);
      if (Update) {
        v = fnma(ui, wj[c], v);
        v = fnma(wi, uj[c], v);
        store(column[c] + i, v);
      }
      yi = fma(v, nj[c], yi);
      sum[c] = fma(v, ni, sum[c]);
    }
    store(y + i, yi);
  }
  for (int c = 0; c < Columns; ++c) y[j + c] += sum_lanes(sum[c]);
}

template <class T, bool Update>
inline void single_pass(T* a, long long stride, long long n, long long rows, long long first, const T* u,
                        const T* w, const T* next, T* y) {
  constexpr int kColumns = RGFAST_SIMD == 64 || RGFAST_TARGET == RGFAST_TARGET_NEON ? 4 : 2;
  for (long long i = first / Simd<T>::lanes * Simd<T>::lanes; i < rows; ++i) y[i] = T(0);
  long long j = first;
  for (; j + kColumns <= n; j += kColumns)
    single_block<T, kColumns, Update>(a, stride, rows, j, u, w, next, y);
  for (; j < n; ++j) single_block<T, 1, Update>(a, stride, rows, j, u, w, next, y);
}

// Destroys a (column-major, lower triangle; columns of `stride` >= whole vectors of rows, which past n may
// hold anything). `scratch` holds four vectors of as many rows. `mean` and `square` as in tridiagonal_lanes.
template <class T>
inline void tridiagonal_single(T* a, long long stride, long long n, T* diagonal, T* off_squared, T* scratch,
                               const T* mean, T* square) {
  using V = typename Simd<T>::Vec;
  constexpr int L = Simd<T>::lanes;
  const long long rows = whole_vectors(n, L);
  T* u = scratch;
  T* w = u + rows;
  T* next = w + rows;
  T* y = next + rows;
  for (long long i = 0; i < 4 * rows; ++i) scratch[i] = T(0);
  for (long long j = 0; j < n; ++j)
    for (long long i = n; i < rows; ++i) a[j * stride + i] = T(0);
  if (mean != nullptr)
    for (long long i = 0; i < n; ++i) y[i] = mean[i];
  bool pending = false;
  for (long long k = mean == nullptr ? 0 : -1; k < n; ++k) {
    T* const column = k < 0 ? y : a + k * stride;
    if (pending) {
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
    if (pending)
      single_pass<T, true>(a, stride, n, rows, k + 1, u, w, next, y);
    else
      single_pass<T, false>(a, stride, n, rows, k + 1, u, w, next, y);
    V dots{};
    for (long long i = from; i < rows; i += L) dots = fma(load(y + i), load(next + i), dots);
    const T half = T(-0.5) * tau * tau * sum_lanes(dots);
    for (long long i = from; i < rows; i += L)
      store(w + i, fma(broadcast(half), load(next + i), broadcast(tau) * load(y + i)));
    T* const spare = u;
    u = next;
    next = spare;
    pending = true;
  }
}

}  // namespace RGFAST_NS
}  // namespace rgfast
