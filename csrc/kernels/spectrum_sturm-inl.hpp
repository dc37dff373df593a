// Checks eigenvalues of tridiagonal matrices by Sturm counts and mends those that have drifted. No include
// guard: see foreach_target.hpp.
//
// QL (of any kind, LAPACK's too) rounds once per sweep, so that its error grows with the number of rows and
// now and then exceeds what is promised. A count errs as one rounding of every entry would make it err: a
// few u of the norm whatever the number of rows.

namespace rgfast {
namespace RGFAST_NS {

// Below this many rows no drift comes near the promise.
constexpr long long kLeastSturm = 24;

// Minors are brought back into range every few rows; between two of those they cannot leave it. In the units
// of a Sturm sequence no entry exceeds 1.
template <class T>
struct SturmLimits;
template <>
struct SturmLimits<double> {
  static constexpr double unit = 0x1p-53;
  static constexpr double down = 1.0;           // from the units of the solver to those of the sequence
  static constexpr double coupling = 0x1p-120;  // least square of an off-diagonal: none is zero
  static constexpr double pivot = 0x1p-300;     // what a smaller one counts as
  static constexpr int rows = 8;
  static constexpr double low = 0x1p-400;
  static constexpr double raise = 0x1p+800;
  static constexpr double high = 0x1p+400;
  static constexpr double lower = 0x1p-400;
};
template <>
struct SturmLimits<float> {
  static constexpr float unit = 0x1p-24F;
  static constexpr float down = 0x1p-20F;
  static constexpr float coupling = 0x1p-50F;
  static constexpr float pivot = 0x1p-60F;
  static constexpr int rows = 4;
  static constexpr float low = 0x1p-24F;
  static constexpr float raise = 0x1p+104F;
  static constexpr float high = 0x1p+60F;
  static constexpr float lower = 0x1p-60F;
};

// What an eigenvalue may be off by before it is mended: three tenths of the promise, for the reduction to
// tridiagonal form and the rounding of the result take their share of it too.
template <class T>
inline T sturm_tolerance(long long n) {
  const T share = n > 100 ? static_cast<T>(n) / T(2) : T(50);
  return T(0.3) * share * SturmLimits<T>::unit;
}

// One matrix per lane, or one for all lanes; e[i] is the square of what couples row i to the one before.
template <class T>
struct LaneRows {
  const T* d;
  const T* e;
  RGFAST_INLINE typename Simd<T>::Vec diagonal(long long i) const { return load(d + i * Simd<T>::lanes); }
  RGFAST_INLINE typename Simd<T>::Vec square(long long i) const { return load(e + i * Simd<T>::lanes); }
};
template <class T>
struct SharedRows {
  const T* d;
  const T* e;
  RGFAST_INLINE typename Simd<T>::Vec diagonal(long long i) const { return broadcast(d[i]); }
  RGFAST_INLINE typename Simd<T>::Vec square(long long i) const { return broadcast(e[i]); }
};

// Counts where two values differ in sign.
template <class T>
struct Counter;
template <>
struct Counter<double> {
  typedef unsigned long long Bits __attribute__((vector_size(RGFAST_SIMD)));
  Bits count{};
  RGFAST_INLINE void add(VecD a, VecD b) { count += ((Bits)a ^ (Bits)b) >> 63; }
  RGFAST_INLINE VecD value() const { return __builtin_convertvector(count, VecD); }
};
template <>
struct Counter<float> {
  typedef unsigned Bits __attribute__((vector_size(RGFAST_SIMD)));
  Bits count{};
  RGFAST_INLINE void add(VecF a, VecF b) { count += ((Bits)a ^ (Bits)b) >> 31; }
  RGFAST_INLINE VecF value() const { return __builtin_convertvector(count, VecF); }
};

RGFAST_INLINE VecD fms(VecD a, VecD b, VecD c) { return fma(a, b, -c); }
RGFAST_INLINE VecF fms(VecF a, VecF b, VecF c) { return fma(a, b, -c); }

// How many eigenvalues are below each x: the sign changes in the leading minors of T - x.
template <class T, int Chains, class Rows>
RGFAST_INLINE void sturm_counts(const Rows& rows, long long n, const typename Simd<T>::Vec* x,
                                typename Simd<T>::Vec* count) {
  using V = typename Simd<T>::Vec;
  using Limits = SturmLimits<T>;
  V last[Chains];
  V minor[Chains];
  Counter<T> found[Chains];
#pragma GCC unroll 8
  for (int c = 0; c < Chains; ++c) {
    last[c] = V{};
    minor[c] = broadcast(T(1));
    found[c] = Counter<T>{};
  }
  for (long long i = 0; i < n;) {
    const long long stop = n - i < Limits::rows ? n : i + Limits::rows;
    for (; i < stop; ++i) {
      const V diagonal = rows.diagonal(i);
      const V square = rows.square(i);
#pragma GCC unroll 8
      for (int c = 0; c < Chains; ++c) {
        const V next = fms(diagonal - x[c], minor[c], square * last[c]);
        found[c].add(minor[c], next);
        last[c] = minor[c];
        minor[c] = next;
      }
    }
#pragma GCC unroll 8
    for (int c = 0; c < Chains; ++c) {
      const V size = max(abs(last[c]), abs(minor[c]));
      V factor = select(less(size, broadcast(Limits::low)), broadcast(Limits::raise), broadcast(T(1)));
      factor = select(less(broadcast(Limits::high), size), broadcast(Limits::lower), factor);
      last[c] = last[c] * factor;
      minor[c] = minor[c] * factor;
    }
  }
#pragma GCC unroll 8
  for (int c = 0; c < Chains; ++c) count[c] = found[c].value();
}

// Eigenvalue k of the matrix whose entries are `stride` apart, by bisection from a value near it.
template <class T>
inline T bisect(const T* d, const T* e, long long n, long long stride, long long k, T near, T tolerance) {
  const auto below = [&](T x) {
    long long found = 0;
    T q = T(1);
    for (long long i = 0; i < n; ++i) {
      q = d[i * stride] - x - e[i * stride] / q;
      if ((q < T(0) ? -q : q) < SturmLimits<T>::pivot) q = -SturmLimits<T>::pivot;
      found += q < T(0) ? 1 : 0;
    }
    return found;
  };
  T low = near - tolerance;
  T high = near + tolerance;
  for (T step = tolerance; below(low) > k; step = step + step) low -= step;
  for (T step = tolerance; below(high) <= k; step = step + step) high += step;
  while (high - low > T(0.25) * tolerance) {
    const T middle = low + T(0.5) * (high - low);
    if (!(low < middle && middle < high)) break;
    (below(middle) <= k ? low : high) = middle;
  }
  return low + T(0.5) * (high - low);
}

// Keeps `values`, `stride` apart and nearly in order, in order.
template <class T>
inline void insertion_sort(T* values, long long n, long long stride) {
  for (long long i = 1; i < n; ++i) {
    const T value = values[i * stride];
    long long at = i;
    for (; at > 0 && values[(at - 1) * stride] > value; --at) values[at * stride] = values[(at - 1) * stride];
    values[at * stride] = value;
  }
}

// Eigenvalues of a group, sorted, against the matrices d and e, one per lane; `lanes` holds those to check.
template <class T>
inline void confirm_lanes(T* values, const T* d, const T* e, long long n, unsigned lanes) {
  using V = typename Simd<T>::Vec;
  constexpr int L = Simd<T>::lanes;
  constexpr int kValues = 2;
  if (n < kLeastSturm) return;
  const V down = broadcast(SturmLimits<T>::down);
  const V norm = down * max(abs(load(values)), abs(load(values + (n - 1) * L)));
  // In a lane without variance every value is exact, whatever the tolerance.
  const V tolerance = select(less(V{}, norm), norm * broadcast(sturm_tolerance<T>(n)), broadcast(T(1)));
  T allowed[L];
  store(allowed, tolerance);
  unsigned mended = 0;
  for (long long first = 0; first < n; first += kValues) {
    const long long start = first + kValues <= n ? first : n - kValues;
    V x[2 * kValues];
    V count[2 * kValues];
#pragma GCC unroll 8
    for (int c = 0; c < kValues; ++c) {
      const V value = down * load(values + (start + c) * L);
      x[2 * c] = value - tolerance;
      x[2 * c + 1] = value + tolerance;
    }
    sturm_counts<T, 2 * kValues>(LaneRows<T>{d, e}, n, x, count);
    for (int c = 0; c < kValues; ++c) {
      const V index = broadcast(static_cast<T>(start + c));
      const unsigned off =
          lanes & bits(either(less(index, count[2 * c]), less_equal(count[2 * c + 1], index)));
      mended |= off;
      for (int lane = 0; lane < L; ++lane)
        if (((off >> lane) & 1U) != 0) {
          T& value = values[(start + c) * L + lane];
          value = bisect(d + lane, e + lane, n, L, start + c, value * SturmLimits<T>::down, allowed[lane]) /
                  SturmLimits<T>::down;
        }
    }
  }
  for (int lane = 0; lane < L; ++lane)
    if (((mended >> lane) & 1U) != 0) insertion_sort(values + lane, n, L);
}

// One copy of what `confirm_lanes` compares with.
template <class T>
inline void keep_lanes(const T* d, const T* e, long long n, T* kept_d, T* kept_e) {
  using V = typename Simd<T>::Vec;
  constexpr int L = Simd<T>::lanes;
  const V down = broadcast(SturmLimits<T>::down);
  store(kept_e, V{});
  for (long long i = 0; i < n; ++i) {
    store(kept_d + i * L, load(d + i * L) * down);
    if (i + 1 < n)
      store(kept_e + (i + 1) * L, max(load(e + i * L) * down * down, broadcast(SturmLimits<T>::coupling)));
  }
}

// The same for one matrix, its eigenvalues in the lanes. `values` has room for whole vectors.
template <class T>
inline void confirm_alone(T* values, const T* d, const T* e, long long n) {
  using V = typename Simd<T>::Vec;
  constexpr int L = Simd<T>::lanes;
  if (n < kLeastSturm) return;
  const T bottom = values[0] < T(0) ? -values[0] : values[0];
  const T top = values[n - 1] < T(0) ? -values[n - 1] : values[n - 1];
  constexpr T down = SturmLimits<T>::down;
  const T norm = down * (bottom > top ? bottom : top);
  if (!(norm > T(0))) return;
  const T tolerance = norm * sturm_tolerance<T>(n);
  for (long long i = n; i < whole_vectors(n, L); ++i) values[i] = values[n - 1];
  bool mended = false;
  constexpr int kVectors = 2;
  for (long long first = 0; first < n; first += kVectors * L) {
    V x[2 * kVectors];
    V count[2 * kVectors];
    for (int c = 0; c < kVectors; ++c) {
      const long long at = first + c * L < n ? first + c * L : first;
      x[2 * c] = broadcast(down) * load(values + at) - broadcast(tolerance);
      x[2 * c + 1] = broadcast(down) * load(values + at) + broadcast(tolerance);
    }
    sturm_counts<T, 2 * kVectors>(SharedRows<T>{d, e}, n, x, count);
    for (int c = 0; c < kVectors; ++c) {
      T lower[L];
      T upper[L];
      store(lower, count[2 * c]);
      store(upper, count[2 * c + 1]);
      for (long long lane = 0; lane < L && first + c * L + lane < n; ++lane) {
        const long long k = first + c * L + lane;
        if (lower[lane] <= static_cast<T>(k) && static_cast<T>(k) < upper[lane]) continue;
        values[k] = bisect(d, e, n, 1, k, values[k] * down, tolerance) / down;
        mended = true;
      }
    }
  }
  if (mended) insertion_sort(values, n, 1);
}

}  // namespace RGFAST_NS
}  // namespace rgfast
