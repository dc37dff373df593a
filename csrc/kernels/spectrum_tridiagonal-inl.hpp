// Householder tridiagonalisation of one matrix per SIMD lane. No include guard: see foreach_target.hpp.

namespace rgfast {
namespace RGFAST_NS {

// The lower triangle, column after column, each element a vector of lanes: element (i, j), i >= j, is at
// column(j) + i * lanes.
template <class T>
RGFAST_INLINE T* lane_column(T* packed, long long n, long long j) {
  return packed + triangle_column(n, j) * Simd<T>::lanes;
}

// Updates A -= u w' + w u' that are put off: what a step does to the trailing matrix is left to a later pass,
// so that every other one only reads. Two need 31 of the 32 registers of AVX-512.
constexpr int kMostPending = RGFAST_SIMD == 64 || RGFAST_TARGET == RGFAST_TARGET_NEON ? 2 : 1;

template <class T>
struct Pending {
  int count = 0;
  T* u[kMostPending];  // the reflector's vector, first entry 1
  T* w[kMostPending];  // tau A u - (tau^2 / 2)(u' A u) u
};

// Applies `Updates` of them to columns [first, n) and sets y = A next, in one pass over the lower triangle:
// reading and writing every element is what bounds this beyond the first-level cache.
template <class T, int Columns, int Updates>
RGFAST_INLINE void update_and_multiply_block(T* packed, long long n, long long j, const Pending<T>& by,
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
#pragma GCC unroll 2
  for (int p = 0; p < Updates; ++p) {
    u[p] = by.u[p];
    w[p] = by.w[p];
  }
#pragma GCC unroll 8
  for (int c = 0; c < Columns; ++c) {
    column[c] = lane_column(packed, n, j + c);
#pragma GCC unroll 2
    for (int p = 0; p < Updates; ++p) {
      uj[p][c] = load(u[p] + (j + c) * L);
      wj[p][c] = load(w[p] + (j + c) * L);
    }
    nj[c] = load(next + (j + c) * L);
    sum[c] = load(y + (j + c) * L);
  }
#pragma GCC unroll 8
  for (int c = 0; c < Columns; ++c) {
#pragma GCC unroll 8
    for (int r = c; r < Columns; ++r) {
      V a = load(column[c] + (j + r) * L);
#pragma GCC unroll 2
      for (int p = 0; p < Updates; ++p) {
        a = fnma(uj[p][r], wj[p][c], a);
        a = fnma(wj[p][r], uj[p][c], a);
      }
      if (Updates > 0) store(column[c] + (j + r) * L, a);
      sum[r] = fma(a, nj[c], sum[r]);
      if (r > c) sum[c] = fma(a, nj[r], sum[c]);
    }
  }
  for (long long i = j + Columns; i < n; ++i) {
    V ui[kRoom];
    V wi[kRoom];
#pragma GCC unroll 2
    for (int p = 0; p < Updates; ++p) {
      ui[p] = load(u[p] + i * L);
      wi[p] = load(w[p] + i * L);
    }
    const V ni = load(next + i * L);
    V yi = load(y + i * L);
#pragma GCC unroll 8
    for (int c = 0; c < Columns; ++c) {
      V a = load(column[c] + i * L);
#pragma GCC unroll 2
      for (int p = 0; p < Updates; ++p) {
        a = fnma(ui[p], wj[p][c], a);
        a = fnma(wi[p], uj[p][c], a);
      }
      if (Updates > 0) store(column[c] + i * L, a);
      yi = fma(a, nj[c], yi);
      sum[c] = fma(a, ni, sum[c]);
    }
    store(y + i * L, yi);
  }
#pragma GCC unroll 8
  for (int c = 0; c < Columns; ++c) store(y + (j + c) * L, sum[c]);
}

template <class T, int Updates>
inline void update_and_multiply(T* packed, long long n, long long first, const Pending<T>& by, const T* next,
                                T* y) {
  // Four columns and one update need 21 registers: the 16 of AVX2 hold two.
  constexpr int kColumns = kMostPending == 2 ? 4 : 2;
  const typename Simd<T>::Vec zero{};
  for (long long i = first; i < n; ++i) store(y + i * Simd<T>::lanes, zero);
  long long j = first;
  for (; j + kColumns <= n; j += kColumns)
    update_and_multiply_block<T, kColumns, Updates>(packed, n, j, by, next, y);
  for (; j < n; ++j) update_and_multiply_block<T, 1, Updates>(packed, n, j, by, next, y);
}

template <class T>
RGFAST_INLINE typename Simd<T>::Vec dot_rows(const T* a, const T* b, long long first, long long n) {
  using V = typename Simd<T>::Vec;
  constexpr int L = Simd<T>::lanes;
  V part[4] = {};
  long long i = first;
  for (; i + 4 <= n; i += 4)
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) part[c] = fma(load(a + (i + c) * L), load(b + (i + c) * L), part[c]);
  for (; i < n; ++i) part[0] = fma(load(a + i * L), load(b + i * L), part[0]);
  return (part[0] + part[1]) + (part[2] + part[3]);
}

// y = A next, A being the trailing matrix from row `first` on after all that is pending.
template <class T>
inline void multiply(T* packed, long long n, long long first, Pending<T>& pending, const T* next, T* y) {
  using V = typename Simd<T>::Vec;
  constexpr int L = Simd<T>::lanes;
  if (pending.count == kMostPending) {
    update_and_multiply<T, kMostPending>(packed, n, first, pending, next, y);
    pending.count = 0;
    return;
  }
  update_and_multiply<T, 0>(packed, n, first, pending, next, y);
  if (pending.count == 0) return;
  const T* const u = pending.u[0];
  const T* const w = pending.w[0];
  const V along_w = dot_rows(w, next, first, n);
  const V along_u = dot_rows(u, next, first, n);
  for (long long i = first; i < n; ++i)
    store(y + i * L, fnma(load(w + i * L), along_u, fnma(load(u + i * L), along_w, load(y + i * L))));
}

constexpr int kReductionRows = 2 * kMostPending + 2;

// Destroys `packed`; writes the diagonal and the squares of the off-diagonal (its last entry is 0).
// `scratch` holds kReductionRows n vectors. Where `mean` (n vectors) is given, a reflection that takes it to
// the first axis goes first: mean mean' is then square e1 e1', square being its squared norm. Where `keep` (2
// n vectors) is given, it gets the factors tau and then the off-diagonal with its signs, and the columns of
// `packed` below the diagonal become the reflectors' vectors: what takes eigenvectors back.
template <class T>
inline void tridiagonal_lanes(T* packed, long long n, T* diagonal, T* off_squared, T* scratch, T* mean,
                              T* square, T* keep = nullptr) {
  using V = typename Simd<T>::Vec;
  using M = typename Simd<T>::Mask;
  constexpr int L = Simd<T>::lanes;
  const V zero{};
  const V one = broadcast(T(1));
  T* next = scratch;
  T* const y = next + n * L;
  Pending<T> pending;
  for (int p = 0; p < kMostPending; ++p) {
    pending.u[p] = y + (2 * p + 1) * n * L;
    pending.w[p] = y + (2 * p + 2) * n * L;
  }
  if (keep != nullptr) store(keep + 3 * n * L, zero);
  for (long long k = mean == nullptr ? 0 : -1; k < n; ++k) {
    T* const column = k < 0 ? mean : lane_column(packed, n, k);
    for (int p = 0; p < pending.count; ++p) {
      const T* const u = pending.u[p];
      const T* const w = pending.w[p];
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
    multiply(packed, n, k + 1, pending, next, y);
    const V half = broadcast(T(-0.5)) * tau * tau * dot_rows(y, next, k + 1, n);
    T* const w = pending.w[pending.count];
    for (i = k + 1; i < n; ++i) store(w + i * L, fma(half, load(next + i * L), tau * load(y + i * L)));
    T* const spare = pending.u[pending.count];
    pending.u[pending.count] = next;
    next = spare;
    ++pending.count;
  }
}

}  // namespace RGFAST_NS
}  // namespace rgfast
