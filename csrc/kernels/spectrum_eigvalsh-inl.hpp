// Eigenvalues of up to four groups of matrices, one matrix per SIMD lane. No include guard: see
// foreach_target.hpp. The blank lines keep the includes in this order, each needing those above it.

#include "rgfast/simd-inl.hpp"

#include "kernels/spectrum_range-inl.hpp"

#include "kernels/spectrum_tridiagonal-inl.hpp"

#include "kernels/spectrum_pack-inl.hpp"

#include "kernels/spectrum_single-inl.hpp"

#include "kernels/spectrum_sturm-inl.hpp"

#include "kernels/spectrum_ql-inl.hpp"

#include "kernels/spectrum_leading-inl.hpp"

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

// Scales the tridiagonal matrices of a group, whose lanes are to be multiplied by 2^exponents in the end, so
// that the solver can work with them, and drops what is negligible then.
template <class T>
inline void prepare_group(QlGroup<T>& group, Scale<T>& scale, const int* exponents) {
  using V = typename Simd<T>::Vec;
  constexpr int L = Simd<T>::lanes;
  const long long n = group.n;
  V top{};
  V square{};
  for (long long i = 0; i < n; ++i) {
    top = max(top, abs(load(group.d + i * L)));
    square = max(square, load(group.e + i * L));
  }
  T largest[L];
  store(largest, max(top, sqrt(square)));
  Scale<T> inner;
  for (int lane = 0; lane < L; ++lane) {
    const int exponent = largest[lane] > T(0) ? Range<T>::exponent(largest[lane]) - QlLimits<T>::scale : 0;
    inner.set(lane, exponent);
    scale.set(lane, exponents[lane] + exponent);
  }
  scale_all(group.d, n, inner.down_a, inner.down_b);
  scale_all(group.e, n, inner.down_a, inner.down_b);
  scale_all(group.e, n, inner.down_a, inner.down_b);
  for (long long i = 0; i < n; ++i) {
    const V e = load(group.e + i * L);
    store(group.e + i * L, select(less_equal(e, broadcast(QlLimits<T>::drop)), V{}, e));
  }
  if (n >= kLeastSturm) keep_lanes(group.d, group.e, n, group.copy, group.copy + n * L);
  group.row = 0;
  group.sweeps = 0;
  group.failed = no_lanes(T());
  group.split = no_lanes(T());
  group.bottom = broadcast(T(-1));
}

// The group of T with `lift` added in the first corner, for a group of T that the lanes' 2^exponents are yet
// to multiply.
template <class T>
inline void lift_group(const QlGroup<T>& from, QlGroup<T>& to, const int* exponents,
                       typename Simd<T>::Vec lift) {
  constexpr int L = Simd<T>::lanes;
  const long long size = from.n * L;
  for (long long i = 0; i < size; ++i) {
    to.d[i] = from.d[i];
    to.e[i] = from.e[i];
  }
  Scale<T> scale;
  bool extreme = false;
  for (int lane = 0; lane < L; ++lane) {
    scale.set(lane, exponents[lane]);
    extreme = extreme || exponents[lane] != 0;
  }
  if (extreme) {
    scale_all(to.d, from.n, scale.up_a, scale.up_b);
    scale_all(to.e, from.n, scale.up_a, scale.up_b);
    scale_all(to.e, from.n, scale.up_a, scale.up_b);
  }
  store(to.d, load(to.d) + lift);
}

// Solves, sorts and writes groups that are prepared. `Task` is an EigenTask or a TridiagonalTask; with `raw`,
// every second group is lifted.
template <class T, class Task>
inline void finish_groups(QlGroup<T>* groups, const Scale<T>* scales, const unsigned* bad, int count,
                          const Task& task) {
  constexpr int L = Simd<T>::lanes;
  const int ways = task.raw == nullptr ? 1 : 2;
  ql_groups(groups, count);
  for (int g = 0; g < count; ++g) {
    QlGroup<T>& group = groups[g];
    const unsigned failed = bits(group.failed);
    sort_lanes(group.d, group.n);
    confirm_lanes(group.d, group.copy, group.copy + group.n * L, group.n, ~failed);
    scale_all(group.d, group.n, scales[g].up_a, scales[g].up_b);
    T* const values = g % ways == 0 ? task.values : task.raw;
    for (int lane = 0; lane < L && g / ways * L + lane < task.count; ++lane) {
      const int index = g / ways * L + lane;
      const bool is_bad = ((bad[g] >> lane) & 1U) != 0;
      const bool is_failed = ((failed >> lane) & 1U) != 0;
      if (g % ways == 0) task.trouble[index] = 0;
      if (is_bad || is_failed) task.trouble[index] = is_bad ? 1 : 2;
      T* const out = values + task.values_offsets[index];
      for (long long i = 0; i < group.n; ++i)
        out[i * task.values_stride] = is_bad || is_failed ? T(__builtin_nan("")) : group.d[i * L + lane];
    }
  }
}

// Where the group of a number has its rows, of four stretches of n vectors each.
template <class T>
inline void place_group(QlGroup<T>& group, T* rows, int number, long long n) {
  constexpr int L = Simd<T>::lanes;
  group.d = rows + 4 * number * n * L;
  group.e = group.d + n * L;
  group.copy = group.e + n * L;
  group.n = n;
}

template <class T>
inline bool out_of_range(T largest) {
  return largest != T(0) && !(largest > Range<T>::low && largest < Range<T>::high);
}

template <class T>
inline std::size_t eigen_lanes_workspace(long long n) {
  constexpr std::size_t L = Simd<T>::lanes;
  const auto size = static_cast<std::size_t>(n);
  return sizeof(T) * L * (size * (size + 1) / 2 + (kReductionRows + 1) * size + 4 * kQlGroups * size);
}

// With eigenvectors every group keeps its triangle, reflectors by then, and what they are made of.
template <class T>
inline std::size_t leading_workspace(long long n, int groups) {
  constexpr std::size_t L = Simd<T>::lanes;
  const auto size = static_cast<std::size_t>(n);
  const std::size_t kept = size * (size + 1) / 2 + kKeptRows * size;
  return eigen_lanes_workspace<T>(n) +
         sizeof(T) * L * (static_cast<std::size_t>(groups) * kept + (size + kLeadingRows) * size);
}

template <class T>
inline void eigen_lanes(const spectrum::EigenTask<T>& task) {
  constexpr int L = Simd<T>::lanes;
  const long long n = task.n;
  T* packed = static_cast<T*>(task.workspace);
  T* const scratch = packed + n * (n + 1) / 2 * L;
  T* const mean = scratch + kReductionRows * n * L;
  T* const rows = mean + n * L;
  T* const kept = rows + 4 * kQlGroups * n * L;
  const long long kept_size = (n * (n + 1) / 2 + kKeptRows * n) * L;
  const int ways = task.raw == nullptr ? 1 : 2;
  int exponents_of[kQlGroups][L];
  T squares_of[kQlGroups][L] = {};

  QlGroup<T> groups[kQlGroups];
  Scale<T> scales[kQlGroups];
  unsigned bad[kQlGroups];
  int count = 0;
  for (int first = 0; first < task.count; first += L, ++count) {
    QlGroup<T>& group = groups[count];
    place_group(group, rows, count, n);
    T* const keep = task.leading == nullptr ? nullptr : kept + count / ways * kept_size;
    if (keep != nullptr) packed = keep + kKeptRows * n * L;
    T largest[L];
    bad[count] = fill_lanes(task, first, packed, mean, largest);
    int exponents[L];
    Scale<T> outer;
    bool extreme = false;
    for (int lane = 0; lane < L; ++lane) {
      const bool out = out_of_range(largest[lane]);
      exponents[lane] = out ? Range<T>::exponent(largest[lane]) : 0;
      outer.set(lane, exponents[lane]);
      extreme = extreme || out;
    }
    if (extreme) scale_all(packed, n * (n + 1) / 2, outer.down_a, outer.down_b);
    for (int lane = 0; lane < L; ++lane) exponents_of[count / ways][lane] = exponents[lane];
    if (task.raw == nullptr) {
      tridiagonal_lanes<T>(packed, n, group.d, group.e, scratch, nullptr, nullptr, keep);
    } else {
      T square[L];
      tridiagonal_lanes(packed, n, group.d, group.e, scratch, mean, square, keep);
      QlGroup<T>& lifted = groups[count + 1];
      place_group(lifted, rows, count + 1, n);
      lift_group(group, lifted, exponents, load(square));
      for (int lane = 0; lane < L; ++lane) squares_of[count / ways][lane] = square[lane];
      const int none[L] = {};
      prepare_group(lifted, scales[count + 1], none);
      bad[count + 1] = bad[count];
    }
    if (keep != nullptr)
      for (long long i = 0; i < n * L; ++i) keep[4 * n * L + i] = group.d[i];
    prepare_group(group, scales[count], exponents);
    if (task.raw != nullptr) ++count;
  }
  finish_groups(groups, scales, bad, count, task);
  if constexpr (sizeof(T) == sizeof(double)) {
    if (task.leading == nullptr) return;
    T* const vectors = kept + (task.count + L - 1) / L * kept_size;
    for (int g = 0; g < count; ++g) {
      const int own = g / ways;
      const bool lifted = g % ways != 0;
      if (lifted && task.leading_raw == nullptr) continue;
      leading_lanes(lifted ? *task.leading_raw : *task.leading, n, kept + own * kept_size, groups[g].d,
                    exponents_of[own], task.raw != nullptr, lifted ? squares_of[own] : nullptr, vectors,
                    own * L, task.count - own * L < L ? task.count - own * L : L);
    }
  }
}

// Columns of whole vectors, but not a page apart: those would share the sets of the cache.
template <class T>
inline long long single_stride(long long n) {
  constexpr long long L = Simd<T>::lanes;
  const long long rows = whole_vectors(n, L);
  return rows * static_cast<long long>(sizeof(T)) % 2048 == 0 ? rows + 64 / static_cast<long long>(sizeof(T))
                                                              : rows;
}

template <class T>
inline std::size_t single_workspace(long long n, long long stride) {
  const long long rows = whole_vectors(n, Simd<T>::lanes);
  return sizeof(T) * static_cast<std::size_t>(n * stride + Simd<T>::lanes + kReductionRows * rows);
}

template <class T>
inline void eigen_single(const spectrum::SingleTask<T>& task) {
  const long long n = task.n;
  const long long stride = task.stride;
  T* const matrix = static_cast<T*>(task.workspace);
  T* const scratch = matrix + n * stride + Simd<T>::lanes;
  if (task.a != nullptr) {
    constexpr long long kSide = 16;  // blocks that both strides leave in the first-level cache
    for (long long j0 = 0; j0 < n; j0 += kSide)
      for (long long i0 = j0; i0 < n; i0 += kSide)
        for (long long j = j0; j < n && j < j0 + kSide; ++j)
          for (long long i = i0; i < n && i < i0 + kSide; ++i)
            if (i >= j) matrix[j * stride + i] = task.a[i * task.row_stride + j * task.column_stride];
  }
  T largest = T(0);
  for (long long j = 0; j < n; ++j)
    for (long long i = j; i < n; ++i) {
      const T size = matrix[j * stride + i] < T(0) ? -matrix[j * stride + i] : matrix[j * stride + i];
      largest = size > largest ? size : largest;
    }
  const bool finite = largest <= Range<T>::largest;
  *task.exponent = finite && out_of_range(largest) ? Range<T>::exponent(largest) : 0;
  if (*task.exponent != 0) {
    const int half = *task.exponent / 2;
    const T a = Range<T>::power(-half);
    const T b = Range<T>::power(half - *task.exponent);
    for (long long j = 0; j < n; ++j)
      for (long long i = j; i < n; ++i) matrix[j * stride + i] = matrix[j * stride + i] * a * b;
  }
  tridiagonal_single(matrix, stride, n, task.diagonal, task.off_squared, scratch, task.mean, task.square);
}

template <class T>
inline std::size_t tridiagonal_workspace(long long n) {
  return sizeof(T) * Simd<T>::lanes * 4 * kQlGroups * static_cast<std::size_t>(n);
}

// One matrix, or the lifted one.
template <class T>
inline void eigen_alone(const spectrum::TridiagonalTask<T>& task, bool lifted) {
  const long long n = task.n;
  const long long rows = whole_vectors(n, Simd<T>::lanes);
  T* const d = static_cast<T*>(task.workspace);
  T* const e = d + rows;
  T* const copy = e + rows;
  T top = T(0);
  bool finite = true;
  Scale<T> outer;
  outer.set(0, lifted ? task.exponents[0] : 0);
  for (long long i = 0; i < n; ++i) {
    d[i] = task.diagonal[i] * outer.up_a[0] * outer.up_b[0];
    e[i] = task.off_squared[i] * outer.up_a[0] * outer.up_b[0] * outer.up_a[0] * outer.up_b[0];
    if (lifted && i == 0) d[i] += task.squares[0];
    const T size = d[i] < T(0) ? -d[i] : d[i];
    top = size > top ? size : top;
    top = e[i] > top * top ? scalar_sqrt(e[i]) : top;
    finite = finite && size <= Range<T>::largest && e[i] <= Range<T>::largest;
  }
  T* const out = (lifted ? task.raw : task.values) + task.values_offsets[0];
  const int exponent = finite && top > T(0) ? Range<T>::exponent(top) - QlLimits<T>::scale : 0;
  Scale<T> inner;
  inner.set(0, exponent);
  for (long long i = 0; i < n; ++i) {
    d[i] = d[i] * inner.down_a[0] * inner.down_b[0];
    e[i] = e[i] * inner.down_a[0] * inner.down_b[0] * inner.down_a[0] * inner.down_b[0];
  }
  constexpr T down = SturmLimits<T>::down;
  copy[rows] = T(0);
  for (long long i = 0; i < n; ++i) {
    copy[i] = d[i] * down;
    const T square = e[i] * down * down;
    if (i + 1 < n) copy[rows + i + 1] = square > SturmLimits<T>::coupling ? square : SturmLimits<T>::coupling;
  }
  const bool converged = finite && ql_alone(d, e, n);
  if (converged) confirm_alone(d, copy, copy + rows, n);
  inner.set(0, exponent + (lifted ? 0 : task.exponents[0]));
  for (long long i = 0; i < n; ++i)
    out[i * task.values_stride] = converged ? d[i] * inner.up_a[0] * inner.up_b[0] : T(__builtin_nan(""));
  if (!lifted) task.trouble[0] = 0;
  if (!converged) task.trouble[0] = finite ? 2 : 1;
}

template <class T>
inline void eigen_tridiagonal(const spectrum::TridiagonalTask<T>& task) {
  using V = typename Simd<T>::Vec;
  constexpr int L = Simd<T>::lanes;
  const long long n = task.n;
  if (task.alone) {
    eigen_alone(task, false);
    if (task.raw != nullptr) eigen_alone(task, true);
    return;
  }
  const V limit = broadcast(Range<T>::largest);
  QlGroup<T> groups[kQlGroups];
  Scale<T> scales[kQlGroups];
  unsigned bad[kQlGroups];
  int count = 0;
  for (int first = 0; first < task.count; first += L, ++count) {
    QlGroup<T>& group = groups[count];
    place_group(group, static_cast<T*>(task.workspace), count, n);
    int exponents[L];
    T square[L];
    for (int lane = 0; lane < L; ++lane) {
      const int index = first + lane < task.count ? first + lane : first;
      exponents[lane] = task.exponents[index];
      square[lane] = task.raw == nullptr ? T(0) : task.squares[index];
      for (long long i = 0; i < n; ++i) {
        group.d[i * L + lane] = task.diagonal[index * n + i];
        group.e[i * L + lane] = task.off_squared[index * n + i];
      }
    }
    // NaN or infinity anywhere in a matrix has reached its tridiagonal form.
    auto good = less_equal(V{}, V{});
    for (long long i = 0; i < n; ++i) {
      good = both(good, less_equal(abs(load(group.d + i * L)), limit));
      good = both(good, less_equal(load(group.e + i * L), limit));
    }
    for (long long i = 0; i < n; ++i) {
      store(group.d + i * L, select(good, load(group.d + i * L), V{}));
      store(group.e + i * L, select(good, load(group.e + i * L), V{}));
    }
    bad[count] = ((1U << L) - 1U) & ~bits(good);
    if (task.raw != nullptr) {
      QlGroup<T>& lifted = groups[count + 1];
      place_group(lifted, static_cast<T*>(task.workspace), count + 1, n);
      lift_group(group, lifted, exponents, select(good, load(square), V{}));
      const int none[L] = {};
      prepare_group(lifted, scales[count + 1], none);
      bad[count + 1] = bad[count];
    }
    prepare_group(group, scales[count], exponents);
    if (task.raw != nullptr) ++count;
  }
  finish_groups(groups, scales, bad, count, task);
}

template <class T>
inline spectrum::EigenKernels<T> eigen_kernels() {
  return {Simd<T>::lanes,
          kQlGroups,
          &eigen_lanes_workspace<T>,
          &eigen_lanes<T>,
          &leading_workspace<T>,
          &single_stride<T>,
          &single_workspace<T>,
          &eigen_single<T>,
          &tridiagonal_workspace<T>,
          &eigen_tridiagonal<T>};
}

inline spectrum::EigenKernels<double> eigen_kernels_double() { return eigen_kernels<double>(); }
inline spectrum::EigenKernels<float> eigen_kernels_float() { return eigen_kernels<float>(); }

}  // namespace RGFAST_NS
}  // namespace rgfast
