// Eigenvalues of up to four groups of matrices, one matrix per SIMD lane. No include guard: see
// foreach_target.hpp. The blank lines keep the includes in this order, each needing those above it.

#include "rgfast/simd-inl.hpp"

#include "kernels/spectrum_range-inl.hpp"

#include "kernels/spectrum_tridiagonal-inl.hpp"

#include "kernels/spectrum_ql-inl.hpp"

namespace rgfast {
namespace RGFAST_NS {

// A power of two for every lane, as two factors: one alone may overflow.
template <class T>
struct Scale {
  T down_a[Simd<T>::lanes];
  T down_b[Simd<T>::lanes];
  T up_a[Simd<T>::lanes];
  T up_b[Simd<T>::lanes];

  RGFAST_INLINE void set(int lane, int exponent) {
    const int half = exponent / 2;
    down_a[lane] = Range<T>::power(-half);
    down_b[lane] = Range<T>::power(half - exponent);
    up_a[lane] = Range<T>::power(half);
    up_b[lane] = Range<T>::power(exponent - half);
  }
};

template <class T>
inline void scale_all(T* values, long long count, const T* a, const T* b) {
  const auto va = load(a);
  const auto vb = load(b);
  for (long long i = 0; i < count; ++i) {
    T* const at = values + i * Simd<T>::lanes;
    store(at, load(at) * va * vb);
  }
}

// Copies the lower triangles of one group into lanes; returns the lanes that hold NaN or infinity, which
// are zeroed, and writes each lane's largest magnitude.
template <class T>
inline unsigned pack_lanes(const spectrum::EigenTask<T>& task, const long long* offsets, T* packed,
                           T* largest) {
  using V = typename Simd<T>::Vec;
  constexpr int L = Simd<T>::lanes;
  const long long n = task.n;
  const V limit = broadcast(Range<T>::largest);
  V top{};
  auto good = less_equal(V{}, V{});
  for (long long i = 0; i < n; ++i) {
    const T* const row = task.a + i * task.row_stride;
    for (long long j = 0; j <= i; ++j) {
      const V a = gather(row + j * task.column_stride, offsets);
      const V size = abs(a);
      good = both(good, less_equal(size, limit));
      top = max(top, size);
      store(lane_column(packed, n, j) + i * L, a);
    }
  }
  const unsigned bad = ((1U << L) - 1U) & ~bits(good);
  if (bad != 0) {
    for (long long i = 0; i < n * (n + 1) / 2; ++i)
      store(packed + i * L, select(good, load(packed + i * L), V{}));
    top = select(good, top, V{});
  }
  store(largest, top);
  return bad;
}

template <class T>
inline std::size_t eigen_lanes_workspace(long long n) {
  constexpr std::size_t L = Simd<T>::lanes;
  const auto size = static_cast<std::size_t>(n);
  return sizeof(T) * L * (size * (size + 1) / 2 + 4 * size + 2 * kQlGroups * size);
}

template <class T>
inline void eigen_lanes(const spectrum::EigenTask<T>& task) {
  using V = typename Simd<T>::Vec;
  constexpr int L = Simd<T>::lanes;
  const long long n = task.n;
  T* const packed = static_cast<T*>(task.workspace);
  T* const scratch = packed + n * (n + 1) / 2 * L;
  T* const rows = scratch + 4 * n * L;

  QlGroup<T> groups[kQlGroups];
  Scale<T> scales[kQlGroups];
  unsigned bad[kQlGroups];
  int count = 0;
  for (int first = 0; first < task.count; first += L, ++count) {
    QlGroup<T>& group = groups[count];
    Scale<T>& scale = scales[count];
    group.d = rows + 2 * count * n * L;
    group.e = group.d + n * L;
    group.n = n;
    group.row = 0;
    group.sweeps = 0;
    group.failed = no_lanes(T());
    // A group that is not full repeats its first matrix.
    long long offsets[L];
    for (int lane = 0; lane < L; ++lane)
      offsets[lane] =
          task.offsets[(task.fill == nullptr ? first : 0) + (first + lane < task.count ? lane : 0)];
    if (task.fill != nullptr) task.fill(task.context, first, task.count - first < L ? task.count - first : L);
    T largest[L];
    bad[count] = pack_lanes(task, offsets, packed, largest);
    int exponents[L];
    bool extreme = false;
    for (int lane = 0; lane < L; ++lane) {
      const bool out =
          largest[lane] != T(0) && !(largest[lane] > Range<T>::low && largest[lane] < Range<T>::high);
      exponents[lane] = out ? Range<T>::exponent(largest[lane]) : 0;
      scale.set(lane, exponents[lane]);
      extreme = extreme || out;
    }
    if (extreme) scale_all(packed, n * (n + 1) / 2, scale.down_a, scale.down_b);
    tridiagonal_lanes(packed, n, group.d, group.e, scratch);

    V top{};
    V square{};
    for (long long i = 0; i < n; ++i) {
      top = max(top, abs(load(group.d + i * L)));
      square = max(square, load(group.e + i * L));
    }
    top = max(top, sqrt(square));
    store(largest, top);
    Scale<T> inner;
    for (int lane = 0; lane < L; ++lane) {
      const int exponent = largest[lane] > T(0) ? Range<T>::exponent(largest[lane]) : 0;
      inner.set(lane, exponent);
      scale.set(lane, exponents[lane] + exponent);
    }
    scale_all(group.d, n, inner.down_a, inner.down_b);
    scale_all(group.e, n, inner.down_a, inner.down_b);
    scale_all(group.e, n, inner.down_a, inner.down_b);
    // The largest entry is now in [1/2, 1). An off-diagonal below 2 u moves no eigenvalue by more than that,
    // and a shift that far from a diagonal entry may round to the entry itself: it would never go away.
    group.drop = broadcast(T(4) * QlLimits<T>::epsilon * QlLimits<T>::epsilon);
    for (long long i = 0; i < n; ++i) {
      const V e = load(group.e + i * L);
      store(group.e + i * L, select(less_equal(e, group.drop), V{}, e));
    }
  }
  ql_groups(groups, count);
  for (int g = 0; g < count; ++g) {
    QlGroup<T>& group = groups[g];
    sort_lanes(group.d, n);
    scale_all(group.d, n, scales[g].up_a, scales[g].up_b);
    const unsigned failed = bits(group.failed);
    for (int lane = 0; lane < L && g * L + lane < task.count; ++lane) {
      const int index = g * L + lane;
      const bool is_bad = ((bad[g] >> lane) & 1U) != 0;
      const bool is_failed = ((failed >> lane) & 1U) != 0;
      task.trouble[index] = is_bad ? 1 : is_failed ? 2 : 0;
      T* const out = task.values + task.values_offsets[index];
      for (long long i = 0; i < n; ++i)
        out[i * task.values_stride] = is_bad || is_failed ? T(__builtin_nan("")) : group.d[i * L + lane];
    }
  }
}

template <class T>
inline spectrum::EigenKernels<T> eigen_kernels() {
  return {Simd<T>::lanes, kQlGroups, &eigen_lanes_workspace<T>, &eigen_lanes<T>};
}

inline spectrum::EigenKernels<double> eigen_kernels_double() { return eigen_kernels<double>(); }
inline spectrum::EigenKernels<float> eigen_kernels_float() { return eigen_kernels<float>(); }

}  // namespace RGFAST_NS
}  // namespace rgfast
