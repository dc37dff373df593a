// Moments of small matrices, one per SIMD lane, straight into the triangles that the solver reduces. No
// include guard: see foreach_target.hpp.

namespace rgfast {
namespace RGFAST_NS {

// Doubles that a tile of centred terms takes, to stay in the first-level cache.
constexpr long long kSmallTile = 3072;
// Terms to a partial sum: those of `gram_tiles`, whose bits these are.
constexpr long long kSmallStretch = kGramTile / 2;

inline std::size_t small_workspace(long long n, long long d) {
  constexpr long long L = Simd<double>::lanes;
  // The data in lanes; origins and means; partial sums; a widened row of every lane.
  return sizeof(double) *
         static_cast<std::size_t>((n * d + 2 * d + d * (d + 1) / 2) * L + L * gram_stride(d));
}

// Elements [0, count) of every lane's row, an element of all of them to a vector.
template <class T>
inline void interleave(const T* const* rows, long long count, double* to) {
  constexpr int L = Simd<double>::lanes;
  VecD part[L];
  for (long long k = 0; k < count; k += L) {
    for (int lane = 0; lane < L; ++lane) part[lane] = load_wide_some(rows[lane] + k, count - k);
    transpose<double>(part);
    for (int i = 0; i < L && k + i < count; ++i) store(to + (k + i) * L, part[i]);
  }
}

template <class T>
inline void interleave_rows(const spectrum::SmallTask& task, double* y) {
  constexpr int L = Simd<double>::lanes;
  const bool whole = task.shared.row_stride == task.shared.d;
  const long long rows = whole ? 1 : task.shared.n;
  const long long width = whole ? task.shared.n * task.shared.d : task.shared.d;
  for (long long i = 0; i < rows; ++i) {
    const T* from[L];
    for (int lane = 0; lane < L; ++lane)
      from[lane] = static_cast<const T*>(task.x[lane]) + i * task.shared.row_stride;
    interleave(from, width, y + i * task.shared.d * L);
  }
}

inline void interleave_any(const spectrum::SmallTask& task, double* y, double* wide) {
  constexpr int L = Simd<double>::lanes;
  const spectrum::GramTask& shared = task.shared;
  const long long bytes = shared.dtype == DType::f64 ? 8 : shared.dtype == DType::f32 ? 4 : 2;
  const double* from[L];
  for (int lane = 0; lane < L; ++lane) from[lane] = wide + lane * gram_stride(shared.d);
  for (long long i = 0; i < shared.n; ++i) {
    for (int lane = 0; lane < L; ++lane)
      widen_row(static_cast<const char*>(task.x[lane]) + i * shared.row_stride * bytes, shared.dtype,
                shared.column_stride, shared.d, 1.0, wide + lane * gram_stride(shared.d));
    interleave(from, shared.d, y + i * shared.d * L);
  }
}

// The data to a magnitude of about 1 in every lane, by powers of two.
inline void scale_small(double* y, long long count, spectrum::GramResult* results) {
  constexpr int L = Simd<double>::lanes;
  VecD top{};
  for (long long k = 0; k < count; ++k) top = max(top, abs(load(y + k * L)));
  double scale[L];
  for (int lane = 0; lane < L; ++lane) {
    results[lane].exponent = data_exponent(top[lane]);
    scale[lane] = Range<double>::power(-results[lane].exponent);
  }
  const VecD factor = load(scale);
  for (long long k = 0; k < count; ++k) store(y + k * L, load(y + k * L) * factor);
}

// The first row goes first, as in `gram`, then the mean of what is left; returns n times its squared norm.
inline VecD mean_small(const double* y, long long n, long long d, double* origin, double* mean) {
  constexpr int L = Simd<double>::lanes;
  for (long long j = 0; j < d; ++j) {
    store(origin + j * L, load(y + j * L));
    store(mean + j * L, VecD{});
  }
  for (long long i = 1; i < n; ++i)
    for (long long j = 0; j < d; ++j)
      store(mean + j * L, load(mean + j * L) + (load(y + (i * d + j) * L) - load(origin + j * L)));
  const VecD count = broadcast(static_cast<double>(n));
  VecD squares{};
  for (long long j = 0; j < d; ++j) {
    const VecD found = load(mean + j * L) / count;
    squares += found * found;
    store(mean + j * L, found);
  }
  return squares * count;
}

// Centres terms in place and counts those that are not zero.
inline VecD center_small(double* y, long long terms, long long d, const double* origin, const double* mean) {
  constexpr int L = Simd<double>::lanes;
  const VecD one = broadcast(1.0);
  VecD live{};
  for (long long i = 0; i < terms; ++i) {
    VecD size{};
    for (long long j = 0; j < d; ++j) {
      double* const at = y + (i * d + j) * L;
      const VecD z = (load(at) - load(origin + j * L)) - load(mean + j * L);
      size = max(abs(z), size);
      store(at, z);
    }
    live += select(less(VecD{}, size), one, VecD{});
  }
  return live;
}

// Rows [i, i + R) by columns [j, j + C) of the triangle, or, where these are the same, their own triangle.
template <int R, int C, bool Diagonal>
RGFAST_INLINE void small_block(const double* y, long long terms, long long d, double* packed, long long i,
                               long long j, bool first) {
  constexpr int L = Simd<double>::lanes;
  VecD sum[R][C];
#pragma GCC unroll 4
  for (int c = 0; c < C; ++c)
#pragma GCC unroll 4
    for (int r = Diagonal ? c : 0; r < R; ++r)
      sum[r][c] = first ? VecD{} : load(packed + (triangle_column(d, j + c) + i + r) * L);
  for (long long k = 0; k < terms; ++k) {
    const double* const term = y + k * d * L;
    VecD row[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) row[r] = load(term + (i + r) * L);
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
      const VecD column = Diagonal ? row[c] : load(term + (j + c) * L);
#pragma GCC unroll 4
      for (int r = Diagonal ? c : 0; r < R; ++r) sum[r][c] = fma(row[r], column, sum[r][c]);
    }
  }
#pragma GCC unroll 4
  for (int c = 0; c < C; ++c)
#pragma GCC unroll 4
    for (int r = Diagonal ? c : 0; r < R; ++r)
      store(packed + (triangle_column(d, j + c) + i + r) * L, sum[r][c]);
}

template <int R>
RGFAST_INLINE void small_rows(const double* y, long long terms, long long d, double* packed, long long i,
                              bool first) {
  for (long long j = 0; j < i; j += 4) small_block<R, 4, false>(y, terms, d, packed, i, j, first);
  small_block<R, R, true>(y, terms, d, packed, i, i, first);
}

inline void small_product(const double* y, long long terms, long long d, double* packed, bool first) {
  long long i = 0;
  for (; i + 4 <= d; i += 4) small_rows<4>(y, terms, d, packed, i, first);
  if (d - i == 3) small_rows<3>(y, terms, d, packed, i, first);
  if (d - i == 2) small_rows<2>(y, terms, d, packed, i, first);
  if (d - i == 1) small_rows<1>(y, terms, d, packed, i, first);
}

// As `gram`, to the bit, for n >= d, n no more than kGramTile squared by half.
inline void gram_small(const spectrum::SmallTask& task) {
  constexpr int L = Simd<double>::lanes;
  const spectrum::GramTask& shared = task.shared;
  const long long n = shared.n;
  const long long d = shared.d;
  double* const y = static_cast<double*>(shared.workspace);
  double* const origin = y + n * d * L;
  double* const mean = origin + d * L;
  double* const part = mean + d * L;
  const long long triangle = d * (d + 1) / 2;
  if (shared.column_stride != 1)
    interleave_any(task, y, part + triangle * L);
  else if (shared.dtype == DType::f64)
    interleave_rows<double>(task, y);
  else if (shared.dtype == DType::f32)
    interleave_rows<float>(task, y);
  else if (shared.dtype == DType::bf16)
    interleave_rows<Brain>(task, y);
  else
    interleave_rows<Half>(task, y);
  for (int lane = 0; lane < L; ++lane) task.results[lane].exponent = 0;
  if (shared.dtype == DType::f64) scale_small(y, n * d, task.results);

  VecD accumulated{};
  if (shared.centred)
    accumulated = mean_small(y, n, d, origin, mean);
  else
    for (long long j = 0; j < 2 * d * L; ++j) origin[j] = 0.0;
  if (task.means != nullptr)
    for (long long j = 0; j < d; ++j) store(task.means + j * L, load(origin + j * L) + load(mean + j * L));
  const long long step = kSmallTile / (d * L) > 1 ? kSmallTile / (d * L) : 1;
  VecD rows{};
  for (long long start = 0; start < n; start += kSmallStretch) {
    const long long stop = n - start < kSmallStretch ? n : start + kSmallStretch;
    double* const sums = start == 0 ? task.packed : part;
    for (long long i = start; i < stop; i += step) {
      const long long terms = stop - i < step ? stop - i : step;
      rows += center_small(y + i * d * L, terms, d, origin, mean);
      small_product(y + i * d * L, terms, d, sums, i == start);
    }
    for (long long k = 0; start > 0 && k < triangle; ++k)
      store(task.packed + k * L, load(task.packed + k * L) + load(part + k * L));
  }
  VecD columns{};
  for (long long j = 0; j < d; ++j) {
    const VecD square = load(task.packed + (triangle_column(d, j) + j) * L);
    accumulated += square;
    columns += select(less(VecD{}, square), broadcast(1.0), VecD{});
  }
  for (int lane = 0; lane < L; ++lane) {
    const long long live = static_cast<long long>(rows[lane]) - (shared.centred && rows[lane] > 0.0 ? 1 : 0);
    const long long other = static_cast<long long>(columns[lane]);
    task.results[lane].accumulated = accumulated[lane];
    task.results[lane].rank_limit = live < other ? live : other;
  }
}

}  // namespace RGFAST_NS
}  // namespace rgfast
