// Eigenvectors of the largest eigenvalues, one matrix per SIMD lane, by inverse iteration on the tridiagonal
// form. No include guard: see foreach_target.hpp.

namespace rgfast {
namespace RGFAST_NS {

constexpr int kKeptRows = 5;     // of n vectors each: four of tridiagonal_lanes, then the diagonal
constexpr int kLeadingRows = 7;  // scratch besides the vectors
constexpr int kInverseSteps = 3;

// P (T - x) = L U of a tridiagonal matrix with row interchanges, lane by lane: n vectors each.
struct TridiagonalFactors {
  double* multiplier;
  double* swapped;  // 1 where row i changed places with row i + 1, else 0
  double* inverse;  // of the pivots
  double* first;    // the two superdiagonals of U
  double* second;
};

inline void factor_tridiagonal(const double* d, const double* e, long long n, VecD x,
                               const TridiagonalFactors& to) {
  constexpr int L = Simd<double>::lanes;
  const VecD zero{};
  const VecD one = broadcast(1.0);
  const VecD least = broadcast(0x1p-53);  // of a matrix whose norm is about 1
  VecD pivot = load(d) - x;
  VecD beside = n > 1 ? load(e) : zero;
  for (long long i = 0; i < n; ++i) {
    VecD first = beside;
    VecD second = zero;
    VecD next{};
    if (i + 1 < n) {
      const VecD below = load(e + i * L);
      const VecD diagonal = load(d + (i + 1) * L) - x;
      const VecD right = i + 2 < n ? load(e + (i + 1) * L) : zero;
      const auto swap = less(abs(pivot), abs(below));
      const VecD top = select(swap, below, pivot);
      const VecD low = select(swap, pivot, below);
      const VecD multiplier = low / select(less(abs(top), least), least, top);
      first = select(swap, diagonal, beside);
      second = select(swap, right, zero);
      next = fnma(multiplier, first, select(swap, beside, diagonal));
      beside = fnma(multiplier, second, select(swap, zero, right));
      pivot = top;
      store(to.multiplier + i * L, multiplier);
      store(to.swapped + i * L, select(swap, one, zero));
    }
    store(to.inverse + i * L, one / select(less(abs(pivot), least), least, pivot));
    store(to.first + i * L, first);
    store(to.second + i * L, second);
    pivot = next;
  }
}

inline void solve_tridiagonal(const TridiagonalFactors& by, long long n, double* z) {
  constexpr int L = Simd<double>::lanes;
  const VecD half = broadcast(0.5);
  VecD carried = load(z);
  for (long long i = 0; i + 1 < n; ++i) {
    const VecD below = load(z + (i + 1) * L);
    const auto swap = less(half, load(by.swapped + i * L));
    const VecD top = select(swap, below, carried);
    store(z + i * L, top);
    carried = fnma(load(by.multiplier + i * L), top, select(swap, carried, below));
  }
  store(z + (n - 1) * L, carried);
  VecD one{};
  VecD two{};
  for (long long i = n; i-- > 0;) {
    const VecD found =
        fnma(load(by.second + i * L), two, fnma(load(by.first + i * L), one, load(z + i * L))) *
        load(by.inverse + i * L);
    store(z + i * L, found);
    two = one;
    one = found;
  }
}

// a -= factor b
RGFAST_INLINE void take_lanes(double* a, const double* b, long long n, VecD factor) {
  constexpr int L = Simd<double>::lanes;
  for (long long i = 0; i < n; ++i) store(a + i * L, fnma(factor, load(b + i * L), load(a + i * L)));
}

// Makes vector j orthogonal to those before it, and its norm 1.
inline void orthonormal_lanes(double* vectors, long long n, long long j) {
  constexpr int L = Simd<double>::lanes;
  double* const z = vectors + j * n * L;
  const VecD one = broadcast(1.0);
  // Its largest entry goes to 1 first: of a solution near a singular matrix the squares may leave the range.
  VecD top{};
  for (long long i = 0; i < n; ++i) top = max(top, abs(load(z + i * L)));
  VecD factor = one / max(top, broadcast(__DBL_MIN__));
  for (int turn = 0; turn < 2; ++turn) {
    for (long long i = 0; i < n; ++i) store(z + i * L, load(z + i * L) * factor);
    for (long long k = 0; k < j; ++k) {
      const double* const other = vectors + k * n * L;
      take_lanes(z, other, n, dot_rows(other, z, 0, n));
    }
    factor = one / max(sqrt(dot_rows<double>(z, z, 0, n)), broadcast(__DBL_MIN__));
  }
  for (long long i = 0; i < n; ++i) store(z + i * L, load(z + i * L) * factor);
}

// The norm of (T - x) z, squared.
inline VecD residual_lanes(const double* d, const double* e, long long n, VecD x, const double* z) {
  constexpr int L = Simd<double>::lanes;
  VecD sum{};
  VecD above{};
  for (long long i = 0; i < n; ++i) {
    VecD off = fma(load(d + i * L) - x, load(z + i * L), above);
    if (i + 1 < n) off = fma(load(e + i * L), load(z + (i + 1) * L), off);
    sum = fma(off, off, sum);
    above = load(e + i * L) * load(z + i * L);
  }
  return sum;
}

// One reflection of K vectors, from row `from` on.
template <int K>
RGFAST_INLINE void reflect_once(const double* u, VecD tau, long long n, long long from, double* vectors) {
  constexpr int L = Simd<double>::lanes;
  VecD dot[K] = {};
  for (long long i = from; i < n; ++i) {
    const VecD ui = load(u + i * L);
#pragma GCC unroll 4
    for (int c = 0; c < K; ++c) dot[c] = fma(ui, load(vectors + (c * n + i) * L), dot[c]);
  }
#pragma GCC unroll 4
  for (int c = 0; c < K; ++c) dot[c] *= tau;
  for (long long i = from; i < n; ++i) {
    const VecD ui = load(u + i * L);
#pragma GCC unroll 4
    for (int c = 0; c < K; ++c) {
      double* const at = vectors + (c * n + i) * L;
      store(at, fnma(dot[c], ui, load(at)));
    }
  }
}

// Vectors of the tridiagonal form become those of the matrix, K at a time.
template <int K>
inline void reflect_lanes(const double* packed, const double* kept, bool first, long long n,
                          double* vectors) {
  constexpr int L = Simd<double>::lanes;
  for (long long k = n - 3; k >= 0; --k)
    reflect_once<K>(packed + (k * n - k * (k + 1) / 2) * L, load(kept + k * L), n, k + 1, vectors);
  if (first) reflect_once<K>(kept + 2 * n * L, load(kept + 3 * n * L), n, 0, vectors);
}

// Whether the effective rank that eigenvalues x[i L], ascending, of a moment lead to is expected to be off by
// more than `allowed`, if no more than `most` are not zero. They err by about 4 u x_1, so their roots s by
// e = min(4 u s_1^2 / s, sqrt(4 u) s_1), and the entropy by about the sum of e ln(S / s) / S, S being that of
// s.
inline bool doubtful(const double* x, long long n, long long most, double allowed) {
  constexpr int L = Simd<double>::lanes;
  constexpr double unit = 0x1p-51;
  const double top = x[(n - 1) * L] > 0.0 ? scalar_sqrt(x[(n - 1) * L]) : 0.0;
  if (!(top > 0.0)) return false;
  const long long end = most < n ? n - most : 0;
  double sum = 0.0;
  for (long long i = 0; i < n; ++i) sum += x[i * L] > 0.0 ? scalar_sqrt(x[i * L]) : 0.0;
  const double least = x[end * L] > 0.0 ? scalar_sqrt(x[end * L]) : 0.0;
  constexpr double longest = 36.8;  // no logarithm that counts is larger
  if (least > 0.0 && unit * longest * static_cast<double>(n) * top / least * (top / sum) <= allowed)
    return false;
  double expected = 0.0;
  for (long long i = n - 1; i >= end; --i) {
    const double s = x[i * L] > 0.0 ? scalar_sqrt(x[i * L]) : 0.0;
    const double share = s / sum > 0x1p-53 ? s / sum : 0x1p-53;
    const double most_error = 0x1.6a09e667f3bcdp-26 * top;  // sqrt(4 u)
    double error = s > 0.0 ? unit * top * (top / s) : most_error;
    error = error < most_error ? error : most_error;
    expected -= error / sum * __builtin_log(share);
  }
  return expected > allowed;
}

// Whether of eigenvalues x[i L], ascending, between one and `few` lie far below all others: few_small of
// rgfast/ops/spectrum/trailing.py, with the same numbers.
inline bool few_small(const double* x, long long n, long long few) {
  constexpr int L = Simd<double>::lanes;
  constexpr double gap = 1e3;
  const double rounding = 1e-15 * x[(n - 1) * L];
  for (long long i = 0; i < few && i + 1 < n; ++i) {
    const double below = x[i * L] > rounding ? x[i * L] : rounding;
    if (x[(i + 1) * L] > gap * below) return true;
  }
  return false;
}

// A number in [-1, 1) that depends on nothing but its place.
RGFAST_INLINE double start_of(long long i, long long j) {
  unsigned long long bits = static_cast<unsigned long long>(i * 8191 + j + 1) * 0x9E3779B97F4A7C15ULL;
  bits = (bits ^ (bits >> 31)) * 0xBF58476D1CE4E5B9ULL;
  return static_cast<double>(static_cast<long long>(bits ^ (bits >> 29)) >> 11) * 0x1p-52;
}

// For the matrices first, ..., first + count - 1 of a task in the lanes, whose reduction has left `kept`
// (rows and reflectors) and whose ascending eigenvalues are `values`, in units that kept ones have times
// 2^exponents. `scratch` holds n + kLeadingRows times n vectors.
inline void leading_lanes(const spectrum::LeadingTask& task, long long n, double* kept, const double* values,
                          const int* exponents, bool mean, const double* square, double* scratch, int first,
                          int count) {
  constexpr int L = Simd<double>::lanes;
  double* const d = scratch + 5 * n * L;
  double* const e = d + n * L;
  double* const vectors = scratch + kLeadingRows * n * L;
  const TridiagonalFactors factors{scratch, scratch + n * L, scratch + 2 * n * L, scratch + 3 * n * L,
                                   scratch + 4 * n * L};
  long long wanted[L] = {};
  long long most = 0;
  for (int lane = 0; lane < count; ++lane) {
    const long long from = task.from[first + lane];
    const double top = values[(n - 1) * L + lane];
    long long k = 0;
    const bool asked = task.doubt < 0.0 || (doubtful(values + lane, n, task.most, task.doubt) &&
                                            !few_small(values + lane, n, task.few));
    while (asked && k < n - from && values[(n - 1 - k) * L + lane] >= task.share * top) ++k;
    // None where all are as large, nor of what is zero or NaN.
    wanted[lane] = k >= n - from || !(top > 0.0) ? 0 : k;
    task.count[first + lane] = wanted[lane];
    task.residual[first + lane] = 0.0;
    most = wanted[lane] > most ? wanted[lane] : most;
  }
  if (most == 0) return;
  for (long long i = 0; i < n; ++i) {
    store(d + i * L, load(kept + (4 * n + i) * L));
    store(e + i * L, load(kept + (n + i) * L));
  }
  for (int lane = 0; square != nullptr && lane < L; ++lane)
    d[lane] += square[lane] * Range<double>::power(-exponents[lane] / 2) *
               Range<double>::power(exponents[lane] / 2 - exponents[lane]);

  // To a norm of about 1, all of them.
  VecD top{};
  for (long long i = 0; i < n; ++i) top = max(top, max(abs(load(d + i * L)), abs(load(e + i * L))));
  double largest[L];
  store(largest, top);
  double down_a[L], down_b[L], back_a[L], back_b[L], values_a[L], values_b[L];
  for (int lane = 0; lane < L; ++lane) {
    const int inner = largest[lane] > 0.0 ? Range<double>::exponent(largest[lane]) : 0;
    const int outer = inner + exponents[lane];
    down_a[lane] = Range<double>::power(-inner / 2);
    down_b[lane] = Range<double>::power(inner / 2 - inner);
    values_a[lane] = Range<double>::power(-outer / 2);
    values_b[lane] = Range<double>::power(outer / 2 - outer);
    back_a[lane] = Range<double>::power(outer / 2);
    back_b[lane] = Range<double>::power(outer - outer / 2);
  }
  for (double* const row : {d, e})
    for (long long i = 0; i < n; ++i) store(row + i * L, load(row + i * L) * load(down_a) * load(down_b));

  VecD residual{};
  for (long long j = 0; j < most; ++j) {
    double* const z = vectors + j * n * L;
    const VecD x = load(values + (n - 1 - j) * L) * load(values_a) * load(values_b);
    for (long long i = 0; i < n; ++i) store(z + i * L, broadcast(start_of(i, j)));
    factor_tridiagonal(d, e, n, x, factors);
    for (int step = 0; step < kInverseSteps; ++step) {
      orthonormal_lanes(vectors, n, j);
      solve_tridiagonal(factors, n, z);
    }
    orthonormal_lanes(vectors, n, j);
    double active[L];
    for (int lane = 0; lane < L; ++lane) active[lane] = j < wanted[lane] ? 1.0 : 0.0;
    const VecD off = residual_lanes(d, e, n, x, z);
    residual = select(less(VecD{}, load(active)), residual + off, residual);
  }
  double norms[L];
  store(norms, sqrt(residual) * load(back_a) * load(back_b));
  for (int lane = 0; lane < count; ++lane) task.residual[first + lane] = norms[lane];

  const double* const packed = kept + kKeptRows * n * L;
  long long j = 0;
  for (; j + 4 <= most; j += 4) reflect_lanes<4>(packed, kept, mean, n, vectors + j * n * L);
  for (; j < most; ++j) reflect_lanes<1>(packed, kept, mean, n, vectors + j * n * L);
  for (int lane = 0; lane < count; ++lane)
    for (j = 0; j < wanted[lane]; ++j) {
      const long long from = task.from[first + lane];
      double* const to = task.vectors + (first + lane) * task.size + (from + j) * task.stride;
      for (long long i = 0; i < n; ++i) to[i] = vectors[(j * n + i) * L + lane];
      for (long long i = n; i < task.stride; ++i) to[i] = 0.0;
    }
}

}  // namespace RGFAST_NS
}  // namespace rgfast
