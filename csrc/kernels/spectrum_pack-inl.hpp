// Copying a group of matrices into lanes. No include guard: see foreach_target.hpp.

#include "rgfast/transpose-inl.hpp"

namespace rgfast {
namespace RGFAST_NS {

// Zeroes the lanes that hold NaN or infinity, and returns them.
template <class T>
RGFAST_INLINE unsigned clear_bad(T* packed, long long n, typename Simd<T>::Mask good,
                                 typename Simd<T>::Vec top, T* largest) {
  using V = typename Simd<T>::Vec;
  constexpr int L = Simd<T>::lanes;
  const unsigned bad = ((1U << L) - 1U) & ~bits(good);
  if (bad != 0) {
    for (long long i = 0; i < n * (n + 1) / 2; ++i)
      store(packed + i * L, select(good, load(packed + i * L), V{}));
    top = select(good, top, V{});
  }
  store(largest, top);
  return bad;
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
  const auto put = [&](long long i, long long j, V a) __attribute__((always_inline)) {
    const V size = abs(a);
    good = both(good, less_equal(size, limit));
    top = max(top, size);
    store(lane_column(packed, n, j) + i * L, a);
  };
  V part[L];
  if (task.column_stride == 1) {
    for (long long i = 0; i < n; ++i)
      for (long long j = 0; j <= i; j += L) {
        // To the end of the row, which may be past the diagonal, and not past the matrix.
        const T* const from = task.a + i * task.row_stride + j;
        for (int lane = 0; lane < L; ++lane) part[lane] = load_some(from + offsets[lane], n - j);
        transpose<T>(part);
        for (long long c = 0; c < L && j + c <= i; ++c) put(i, j + c, part[c]);
      }
  } else if (task.row_stride == 1) {
    for (long long j = 0; j < n; ++j)
      for (long long i = j; i < n; i += L) {
        const T* const from = task.a + j * task.column_stride + i;
        for (int lane = 0; lane < L; ++lane) part[lane] = load_some(from + offsets[lane], n - i);
        transpose<T>(part);
        for (long long r = 0; r < L && i + r < n; ++r) put(i + r, j, part[r]);
      }
  } else {
    for (long long i = 0; i < n; ++i)
      for (long long j = 0; j <= i; ++j)
        put(i, j, gather(task.a + i * task.row_stride + j * task.column_stride, offsets));
  }
  return clear_bad(packed, n, good, top, largest);
}

// What pack_lanes returns and writes, of lanes that are filled already.
template <class T>
inline unsigned check_lanes(T* packed, long long n, T* largest) {
  using V = typename Simd<T>::Vec;
  const V limit = broadcast(Range<T>::largest);
  V top{};
  auto good = less_equal(V{}, V{});
  for (long long i = 0; i < n * (n + 1) / 2; ++i) {
    const V size = abs(load(packed + i * Simd<T>::lanes));
    good = both(good, less_equal(size, limit));
    top = max(top, size);
  }
  return clear_bad(packed, n, good, top, largest);
}

// Puts matrices first, first + 1, ... of a task into lanes, and their means for raw eigenvalues. A group that
// is not full repeats its first matrix.
template <class T>
inline unsigned fill_lanes(const spectrum::EigenTask<T>& task, int first, T* packed, T* mean, T* largest) {
  constexpr int L = Simd<T>::lanes;
  const long long n = task.n;
  const int count = task.count - first < L ? task.count - first : L;
  unsigned bad = 0;
  if (task.fill_lanes != nullptr) {
    task.fill_lanes(task.context, first, count, packed, task.raw == nullptr ? nullptr : mean);
    bad = check_lanes(packed, n, largest);
  } else {
    if (task.fill != nullptr) task.fill(task.context, first, count);
    long long offsets[L];
    for (int lane = 0; lane < L; ++lane)
      offsets[lane] = task.offsets[(task.fill == nullptr ? first : 0) + (lane < count ? lane : 0)];
    bad = pack_lanes(task, offsets, packed, largest);
    for (int lane = 0; task.raw != nullptr && lane < L; ++lane)
      for (long long i = 0; i < n; ++i) mean[i * L + lane] = task.means[(lane < count ? lane : 0) * n + i];
  }
  for (int lane = 0; task.raw != nullptr && bad != 0 && lane < L; ++lane)
    for (long long i = 0; ((bad >> lane) & 1U) != 0 && i < n; ++i) mean[i * L + lane] = T(0);
  return bad;
}

}  // namespace RGFAST_NS
}  // namespace rgfast
