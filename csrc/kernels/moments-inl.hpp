// Packing rows of layers and multiplying them. No include guard: see foreach_target.hpp.

#include "rgfast/simd-inl.hpp"

#include "rgfast/panels-inl.hpp"
#include "rgfast/transpose-inl.hpp"
#include "rgfast/widen-inl.hpp"

namespace rgfast {
namespace RGFAST_NS {

// One vector more than there are terms; a power of two would put all panels in the same sets of the cache.
constexpr long long kMomentPanel = (moments::kTerms + 1) * Simd<double>::lanes;

inline long long moment_panels(long long width) {
  constexpr long long L = Simd<double>::lanes;
  return (width + L - 1) / L;
}

inline long long moment_layer(long long width) {
  return (moment_panels(width) + 1) * kMomentPanel + moments::kTerms;
}

// One row, read once: widened, shifted, scaled, squared and stored while it is in registers.
template <class T>
RGFAST_INLINE double pack_term(const T* x, const moments::PackJob& job, double* to) {
  constexpr int L = Simd<double>::lanes;
  const VecD unit = broadcast(job.unit);
  VecD norm[2] = {VecD{}, VecD{}};
  long long j = 0;
  for (; j + 2 * L <= job.width; j += 2 * L, to += 2 * kMomentPanel) {
    const VecD a = (load_wide(x + j) - load(job.shift + j)) * unit;
    const VecD b = (load_wide(x + j + L) - load(job.shift + j + L)) * unit;
    store(to, a);
    store(to + kMomentPanel, b);
    norm[0] = fma(a, a, norm[0]);
    norm[1] = fma(b, b, norm[1]);
  }
  for (; j < job.width; j += L, to += kMomentPanel) {
    double rest[L] = {};
    for (long long lane = 0; lane < L && j + lane < job.width; ++lane)
      rest[lane] = widened(x[j + lane]) - job.shift[j + lane];
    const VecD a = load(rest) * unit;
    store(to, a);
    norm[0] = fma(a, a, norm[0]);
  }
  return sum_lanes(norm[0] + norm[1]);
}

template <class T>
inline long long pack_terms(const moments::PackJob& job) {
  constexpr int L = Simd<double>::lanes;
  double* const extra = job.panels + moment_panels(job.width) * kMomentPanel;
  double* const norms = extra + kMomentPanel;
  long long terms = 0;
  for (long long k = 0; k < job.count; ++k) {
    if (job.keep != nullptr && job.keep[k * job.keep_stride] == 0) continue;
    const T* const x = static_cast<const T*>(job.x) + k * job.row_stride;
    double norm;
    if (job.column_stride == 1) {
      norm = pack_term(x, job, job.panels + terms * L);
    } else {
      for (long long j = 0; j < job.width; ++j) job.row[j] = widened(x[j * job.column_stride]);
      norm = pack_term(static_cast<const double*>(job.row), job, job.panels + terms * L);
    }
    extra[terms * L] = norms[terms] = norm;
    extra[terms * L + 1] = 1.0;
    ++terms;
  }
  return terms;
}

inline long long pack_moment(const moments::PackJob& job) {
  switch (job.dtype) {
    case DType::f64:
      return pack_terms<double>(job);
    case DType::f32:
      return pack_terms<float>(job);
    case DType::bf16:
      return pack_terms<Brain>(job);
    case DType::f16:
      break;
  }
  return pack_terms<Half>(job);
}

// Rows [b, b + lanes) and the columns of R panels from a on, as far as the moment has them.
template <int R>
inline void moment_block(const moments::ProductJob& job, long long a, long long b) {
  constexpr int L = Simd<double>::lanes;
  const long long line = job.right_width + 2;
  const double* const from = job.right + a * kMomentPanel;
  const double* const rows = job.left + b * kMomentPanel;
  double* const to = job.moment + b * L * line + a * L;
  const long long height = job.left_width - b * L < L ? job.left_width - b * L : L;
  const long long width = job.right_width - a * L < R * L ? job.right_width - a * L : R * L;
  for (long long i = 0; i < height; ++i)
    for (long long j = 0; j < width; j += 8) __builtin_prefetch(to + i * line + j, 1, 2);
  if (height == L && width == R * L) {
    panel_block<R, L, kMomentPanel>(from, rows, job.terms, to, line, false);
    return;
  }
  double part[L * R * L];
  long long i = 0;
  if (height == L) {
    panel_block<R, L, kMomentPanel>(from, rows, job.terms, part, R * L, true);
    i = L;
  }
  if constexpr (L > 4)
    if (height - i >= 4) {
      panel_block<R, 4, kMomentPanel>(from, rows + i, job.terms, part + i * R * L, R * L, true);
      i += 4;
    }
  if constexpr (L > 2)
    if (height - i >= 2) {
      panel_block<R, 2, kMomentPanel>(from, rows + i, job.terms, part + i * R * L, R * L, true);
      i += 2;
    }
  if (height - i == 1)
    panel_block<R, 1, kMomentPanel>(from, rows + i, job.terms, part + i * R * L, R * L, true);
  for (i = 0; i < height; ++i)
    for (long long j = 0; j < width; ++j) to[i * line + j] += part[i * R * L + j];
}

// The block in rows of panel b and columns of panel a, also below the diagonal.
inline void mirror_block(const moments::ProductJob& job, long long a, long long b) {
  constexpr int L = Simd<double>::lanes;
  const long long line = job.right_width + 2;
  const double* const from = job.moment + b * L * line + a * L;
  double* const to = job.moment + a * L * line + b * L;
  if (a * L + L <= job.right_width) {
    VecD rows[L];
#pragma GCC unroll 8
    for (int i = 0; i < L; ++i) rows[i] = load(from + i * line);
    transpose<double>(rows);
#pragma GCC unroll 8
    for (int i = 0; i < L; ++i) store(to + i * line, rows[i]);
    return;
  }
  for (long long j = 0; j < job.right_width - a * L; ++j)
    for (long long i = 0; i < L; ++i) to[j * line + i] = from[i * line + j];
}

// Sums of the features in R panels times |z|^2 and times 1 of the other side: part[2][R lanes].
template <int R>
inline void edge_block(const double* features, const double* extra, long long terms, double* part) {
  panel_block<R, 2, kMomentPanel>(features, extra, terms, part, R * Simd<double>::lanes, true);
}

// Calls use(column, count, part, stride) for panels [first, last), several at a time.
template <class Use>
RGFAST_INLINE void for_edges(const double* panels, const double* extra, long long terms, long long first,
                             long long last, const Use& use) {
  constexpr int L = Simd<double>::lanes;
  // Two products a panel: enough panels at once to hide the latency of a product.
  constexpr int most = RGFAST_SIMD == 64 ? 8 : 4;
  double part[2 * most * L];
  for (long long a = first; a < last;) {
    const double* const from = panels + a * kMomentPanel;
    int count = 1;
    if (last - a >= most) {
      edge_block<most>(from, extra, terms, part);
      count = most;
    } else if (last - a >= 3) {
      edge_block<3>(from, extra, terms, part);
      count = 3;
    } else {
      edge_block<1>(from, extra, terms, part);
    }
    use(a * L, part, count * L);
    a += count;
  }
}

RGFAST_INLINE double dot_terms(const double* a, const double* b, long long terms) {
  double sum[4] = {};
  long long k = 0;
  for (; k + 4 <= terms; k += 4)
    for (int s = 0; s < 4; ++s) sum[s] += a[k + s] * b[k + s];
  for (; k < terms; ++k) sum[0] += a[k] * b[k];
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

RGFAST_INLINE double sum_terms(const double* a, long long terms) {
  double sum[4] = {};
  long long k = 0;
  for (; k + 4 <= terms; k += 4)
    for (int s = 0; s < 4; ++s) sum[s] += a[k + s];
  for (; k < terms; ++k) sum[0] += a[k];
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

inline void multiply_edges(const moments::ProductJob& job) {
  const long long line = job.right_width + 2;
  const long long rows = moment_panels(job.left_width), columns = moment_panels(job.right_width);
  const double* const left_extra = job.left + rows * kMomentPanel;
  const double* const right_extra = job.right + columns * kMomentPanel;
  double* const across = job.moment + job.left_width * line;
  for_edges(job.left, right_extra, job.terms, job.first, job.last,
            [&](long long at, const double* part, long long stride) __attribute__((always_inline)) {
              for (long long i = 0; i < stride && at + i < job.left_width; ++i) {
                double* const to = job.moment + (at + i) * line + job.right_width;
                to[0] += part[i];
                to[1] += part[stride + i];
                if (job.same) {
                  across[at + i] = to[0];
                  across[line + at + i] = to[1];
                }
              }
            });
  if (job.last != rows) return;
  if (!job.same)
    for_edges(job.right, left_extra, job.terms, 0, columns,
              [&](long long at, const double* part, long long stride) __attribute__((always_inline)) {
                for (long long j = 0; j < stride && at + j < job.right_width; ++j) {
                  across[at + j] += part[j];
                  across[line + at + j] += part[stride + j];
                }
              });
  const double* const a = left_extra + kMomentPanel;
  const double* const b = right_extra + kMomentPanel;
  across[job.right_width] += dot_terms(a, b, job.terms);
  across[job.right_width + 1] += sum_terms(a, job.terms);
  across[line + job.right_width] += sum_terms(b, job.terms);
  across[line + job.right_width + 1] += static_cast<double>(job.terms);
}

inline void multiply_moment(const moments::ProductJob& job) {
  const long long columns = moment_panels(job.right_width);
  // Three panels of columns stay in the nearest cache while those of rows go by.
  for (long long a = 0; a < columns;) {
    const long long left = columns - a;
    const int group = left >= 3 && left != 4 ? 3 : left >= 2 ? 2 : 1;
    for (long long b = job.first; b < job.last && (!job.same || b < a + group); ++b) {
      const long long at = job.same && b > a ? b : a;  // what lies below the diagonal is left out
      const int count = static_cast<int>(a + group - at);
      if (count == 3)
        moment_block<3>(job, at, b);
      else if (count == 2)
        moment_block<2>(job, at, b);
      else
        moment_block<1>(job, at, b);
      for (long long c = at; job.same && c < a + group; ++c)
        if (c != b) mirror_block(job, c, b);
    }
    a += group;
  }
  multiply_edges(job);
}

inline moments::Kernels moment_kernels() {
  return {&moment_panels, &moment_layer, &pack_moment, &multiply_moment};
}

}  // namespace RGFAST_NS
}  // namespace rgfast
