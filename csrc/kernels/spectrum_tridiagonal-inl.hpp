// Householder tridiagonalisation of one matrix per SIMD lane. No include guard: see foreach_target.hpp.

namespace rgfast {
namespace RGFAST_NS {

// The lower triangle, column after column, each element a vector of lanes: element (i, j), i >= j, is at
// column(j) + i * lanes.
template <class T>
RGFAST_INLINE T* lane_column(T* packed, long long n, long long j) {
  return packed + triangle_column(n, j) * Simd<T>::lanes;
}

template <class T>
struct Reflector {
  T* u;  // the vector, first entry 1
  T* w;  // tau A u - (tau^2 / 2)(u' A u) u: A - u w' - w u' is the transformed trailing matrix
};

// A -= u w' + w u' over columns [first, n) and y = A next, in one pass over the lower triangle: every
// element is read and written once a step, which is what bounds this beyond the first-level cache.
template <class T, int Columns, bool Update>
RGFAST_INLINE void update_and_multiply_block(T* packed, long long n, long long j, const T* __restrict u,
                                             const T* __restrict w, const T* __restrict next,
                                             T* __restrict y) {
  using V = typename Simd<T>::Vec;
  constexpr int L = Simd<T>::lanes;
  T* column[Columns];
  V uj[Columns];
  V wj[Columns];
  V nj[Columns];
  V sum[Columns];
#pragma GCC unroll 8
  for (int c = 0; c < Columns; ++c) {
    column[c] = lane_column(packed, n, j + c);
    if (Update) {
      uj[c] = load(u + (j + c) * L);
      wj[c] = load(w + (j + c) * L);
    }
    nj[c] = load(next + (j + c) * L);
    sum[c] = load(y + (j + c) * L);
  }
#pragma GCC unroll 8
  for (int c = 0; c < Columns; ++c) {
#pragma GCC unroll 8
    for (int r = c; r < Columns; ++r) {
      V a = load(column[c] + (j + r) * L);
      if (Update) {
        a = fnma(uj[r], wj[c], a);
        a = fnma(wj[r], uj[c], a);
        store(column[c] + (j + r) * L, a);
      }
      sum[r] = fma(a, nj[c], sum[r]);
      if (r > c) sum[c] = fma(a, nj[r], sum[c]);
    }
  }
  for (long long i = j + Columns; i < n; ++i) {
    V ui{};
    V wi{};
    if (Update) {
      ui = load(u + i * L);
      wi = load(w + i * L);
    }
    const V ni = load(next + i * L);
    V yi = load(y + i * L);
#pragma GCC unroll 8
    for (int c = 0; c < Columns; ++c) {
      V a = load(column[c] + i * L);
      if (Update) {
        a = fnma(ui, wj[c], a);
        a = fnma(wi, uj[c], a);
        store(column[c] + i * L, a);
      }
      yi = fma(a, nj[c], yi);
      sum[c] = fma(a, ni, sum[c]);
    }
    store(y + i * L, yi);
  }
#pragma GCC unroll 8
  for (int c = 0; c < Columns; ++c) store(y + (j + c) * L, sum[c]);
}

template <class T, bool Update>
inline void update_and_multiply(T* packed, long long n, long long first, const T* u, const T* w,
                                const T* next, T* y) {
  // Four columns need 21 registers: the 16 of AVX2 hold two.
  constexpr int kColumns = RGFAST_SIMD == 64 || RGFAST_TARGET == RGFAST_TARGET_NEON ? 4 : 2;
  const typename Simd<T>::Vec zero{};
  for (long long i = first; i < n; ++i) store(y + i * Simd<T>::lanes, zero);
  long long j = first;
  for (; j + kColumns <= n; j += kColumns)
    update_and_multiply_block<T, kColumns, Update>(packed, n, j, u, w, next, y);
  for (; j < n; ++j) update_and_multiply_block<T, 1, Update>(packed, n, j, u, w, next, y);
}

// Destroys `packed`; writes the diagonal and the squares of the off-diagonal (its last entry is 0).
// `scratch` holds 4 n vectors. Where `mean` (n vectors) is given, a reflection that takes it to the first
// axis goes first: mean mean' is then square e1 e1', square being its squared norm. Where `keep` (2 n
// vectors) is given, it gets the factors tau and then the off-diagonal with its signs, and the columns of
// `packed` below the diagonal become the reflectors' vectors: what takes eigenvectors back.
template <class T>
inline void tridiagonal_lanes(T* packed, long long n, T* diagonal, T* off_squared, T* scratch, T* mean,
                              T* square, T* keep = nullptr) {
  using V = typename Simd<T>::Vec;
  using M = typename Simd<T>::Mask;
  constexpr int L = Simd<T>::lanes;
  const V zero{};
  const V one = broadcast(T(1));
  T* u = scratch;
  T* w = u + n * L;
  T* next = w + n * L;
  T* y = next + n * L;
  bool pending = false;
  if (keep != nullptr) store(keep + 3 * n * L, zero);
  for (long long k = mean == nullptr ? 0 : -1; k < n; ++k) {
    T* const column = k < 0 ? mean : lane_column(packed, n, k);
    if (pending) {
      const V uk = load(u + k * L);
      const V wk = load(w + k * L);
      for (long long i = k; i < n; ++i) {
        V a = load(column + i * L);
        a = fnma(load(u + i * L), wk, a);
        a = fnma(load(w + i * L), uk, a);
        store(column + i * L, a);
      }
    }
    if (k >= 0) store(diagonal + k * L, load(column + k * L));
    if (k == n - 1) {
      store(off_squared + k * L, zero);
      if (keep != nullptr) {
        store(keep + k * L, zero);
        store(keep + (n + k) * L, zero);
      }
      break;
    }
    const V alpha = load(column + (k + 1) * L);
    V part[4] = {zero, zero, zero, zero};
    long long i = k + 2;
    for (; i + 4 <= n; i += 4)
      for (int c = 0; c < 4; ++c) {
        const V x = load(column + (i + c) * L);
        part[c] = fma(x, x, part[c]);
      }
    for (; i < n; ++i) {
      const V x = load(column + i * L);
      part[0] = fma(x, x, part[0]);
    }
    const V rest = (part[0] + part[1]) + (part[2] + part[3]);
    const V total = fma(alpha, alpha, rest);
    store(k < 0 ? square : off_squared + k * L, total);
    if (k == n - 2) {
      if (keep != nullptr && k >= 0) {
        store(keep + k * L, zero);
        store(keep + (n + k) * L, alpha);
      }
      continue;
    }
    const V norm = sqrt(total);
    // beta = -sign(alpha) norm, u = x / (alpha - beta) with first entry 1, tau = (beta - alpha) / beta.
    const M negative = less(alpha, zero);
    const V shifted = select(negative, alpha - norm, alpha + norm);
    const M null = less_equal(rest, zero);
    const V inverse = select(null, zero, one / shifted);
    const V tau = select(null, zero, abs(shifted) / norm);
    store(next + (k + 1) * L, one);
    for (i = k + 2; i < n; ++i) store(next + i * L, load(column + i * L) * inverse);
    if (keep != nullptr) {
      store(k < 0 ? keep + 3 * n * L : keep + k * L, tau);
      if (k >= 0) store(keep + (n + k) * L, select(null, alpha, select(negative, norm, zero - norm)));
      T* const reflector = k < 0 ? keep + 2 * n * L : column;
      for (i = k + 1; i < n; ++i) store(reflector + i * L, load(next + i * L));
    }
    if (pending)
      update_and_multiply<T, true>(packed, n, k + 1, u, w, next, y);
    else
      update_and_multiply<T, false>(packed, n, k + 1, u, w, next, y);
    V dots[4] = {zero, zero, zero, zero};
    i = k + 1;
    for (; i + 4 <= n; i += 4)
      for (int c = 0; c < 4; ++c) dots[c] = fma(load(y + (i + c) * L), load(next + (i + c) * L), dots[c]);
    for (; i < n; ++i) dots[0] = fma(load(y + i * L), load(next + i * L), dots[0]);
    const V dot = (dots[0] + dots[1]) + (dots[2] + dots[3]);
    const V half = broadcast(T(-0.5)) * tau * tau * dot;
    for (i = k + 1; i < n; ++i) store(w + i * L, fma(half, load(next + i * L), tau * load(y + i * L)));
    T* const spare = u;
    u = next;
    next = spare;
    pending = true;
  }
}

}  // namespace RGFAST_NS
}  // namespace rgfast
