// The fp64 second moment of one matrix of samples, centred while it is packed. No include guard: see
// foreach_target.hpp.

#include "rgfast/simd-inl.hpp"

#include "rgfast/panels-inl.hpp"
#include "rgfast/transpose-inl.hpp"
#include "rgfast/widen-inl.hpp"

#include "kernels/spectrum_range-inl.hpp"

#include "kernels/spectrum_panels-inl.hpp"

#include "kernels/spectrum_small-inl.hpp"

namespace rgfast {
namespace RGFAST_NS {

inline std::size_t gram_workspace(const spectrum::GramTask& task) {
  const long long m = task.tall || task.d < task.n ? task.d : task.n;
  const long long panels = gram_stride(m) / Simd<double>::lanes * kPanel;
  // Besides the panels: origin, mean and live columns, and a widened tile.
  return sizeof(double) * static_cast<std::size_t>(panels + (3 + kGramTile) * gram_stride(task.d));
}

// Rows of the data that can be read a vector at a time: the data themselves, or a widened copy.
template <class T>
struct Rows {
  const T* x;
  long long stride;
  double scale;

  RGFAST_INLINE VecD vector(long long i, long long j, long long count) const {
    const VecD v = load_wide_some(x + i * stride + j, count);
    return sizeof(T) == sizeof(double) ? v * broadcast(scale) : v;
  }
};

struct Moments {
  double* panels;
  double* origin;
  double* mean;
  double* live;
  double* wide;
  long long live_rows = 0;
};

// Adds columns [j, j + Vectors * lanes) of `count` rows, less the origin, to the mean's sums.
template <int Vectors, class T>
RGFAST_INLINE void add_columns(const Rows<T>& rows, long long count, long long j, const Moments& at) {
  constexpr int L = Simd<double>::lanes;
  VecD origin[Vectors];
  VecD sum[Vectors];
#pragma GCC unroll 8
  for (int c = 0; c < Vectors; ++c) {
    origin[c] = load(at.origin + j + c * L);
    sum[c] = load(at.mean + j + c * L);
  }
  for (long long i = 0; i < count; ++i)
#pragma GCC unroll 8
    for (int c = 0; c < Vectors; ++c) sum[c] += rows.vector(i, j + c * L, L) - origin[c];
#pragma GCC unroll 8
  for (int c = 0; c < Vectors; ++c) store(at.mean + j + c * L, sum[c]);
}

// Long stretches of every row, which is how the memory likes to be read.
template <class T>
inline void add_rows(const Rows<T>& rows, long long count, long long d, const Moments& at) {
  constexpr int L = Simd<double>::lanes;
  long long j = 0;
  for (; j + 8 * L <= d; j += 8 * L) add_columns<8>(rows, count, j, at);
  for (; j + 2 * L <= d; j += 2 * L) add_columns<2>(rows, count, j, at);
  for (; j + L <= d; j += L) add_columns<1>(rows, count, j, at);
  if (j == d) return;
  VecD sum = load(at.mean + j);
  for (long long i = 0; i < count; ++i) sum += rows.vector(i, j, d - j) - load(at.origin + j);
  store(at.mean + j, sum);
}

template <class T>
inline bool is_zero_row(const Rows<T>& rows, long long i, long long d, const Moments& at) {
  constexpr int L = Simd<double>::lanes;
  for (long long j = 0; j < d; j += L)
    if (any(less(VecD{}, abs((rows.vector(i, j, d - j) - load(at.origin + j)) - load(at.mean + j)))))
      return false;
  return true;
}

template <int Vectors, class T>
RGFAST_INLINE void pack_columns(const Rows<T>& rows, long long count, long long j, const Moments& at) {
  constexpr int L = Simd<double>::lanes;
  VecD origin[Vectors];
  VecD mean[Vectors];
#pragma GCC unroll 8
  for (int c = 0; c < Vectors; ++c) {
    origin[c] = load(at.origin + j + c * L);
    mean[c] = load(at.mean + j + c * L);
  }
  double* const to = at.panels + j / L * kPanel;
  for (long long i = 0; i < count; ++i)
#pragma GCC unroll 8
    for (int c = 0; c < Vectors; ++c)
      store(to + c * kPanel + i * L, (rows.vector(i, j + c * L, L) - origin[c]) - mean[c]);
}

// Terms are samples: rows become terms, L columns of them a panel.
template <class T>
inline void pack_tall(const Rows<T>& rows, long long count, long long d, Moments& at) {
  constexpr int L = Simd<double>::lanes;
  long long j = 0;
  for (; j + 8 * L <= d; j += 8 * L) pack_columns<8>(rows, count, j, at);
  for (; j + 2 * L <= d; j += 2 * L) pack_columns<2>(rows, count, j, at);
  for (; j + L <= d; j += L) pack_columns<1>(rows, count, j, at);
  if (j < d) {
    double* const to = at.panels + j / L * kPanel;
    for (long long i = 0; i < count; ++i)
      store(to + i * L, (rows.vector(i, j, d - j) - load(at.origin + j)) - load(at.mean + j));
  }
  for (long long i = 0; i < count; ++i)
    if (any(less(VecD{}, abs(load(at.panels + i * L)))) || !is_zero_row(rows, i, d, at)) ++at.live_rows;
}

// Terms are features [start, start + count): n samples, of which `done` came before, L to a panel.
template <class T>
inline void pack_wide(const Rows<T>& rows, long long n, long long done, long long start, long long count,
                      const Moments& at) {
  constexpr int L = Simd<double>::lanes;
  double block[L * L];
  for (long long i = 0; i < gram_stride(n); i += L) {
    double* const to = at.panels + (done + i) / L * kPanel;
    for (long long k = 0; k < count; k += L) {
      const long long kept = count - k < L ? count - k : L;
      VecD live = load(at.live + start + k);
      for (int r = 0; r < L; ++r) {
        VecD y{};
        if (i + r < n)
          y = (rows.vector(i + r, start + k, kept) - load(at.origin + start + k)) - load(at.mean + start + k);
        live = live + abs(y);
        store(block + r * L, y);
      }
      store(at.live + start + k, live);
      for (long long c = 0; c < kept; ++c)
        for (int r = 0; r < L; ++r) to[(k + c) * L + r] = block[r * L + c];
    }
  }
}

// Calls use(rows, count) for tiles of at most kGramTile rows.
template <class Use>
RGFAST_INLINE void for_row_tiles(const spectrum::GramTask& task, double scale, double* wide, const Use& use) {
  const long long bytes = task.dtype == DType::f64 ? 8 : task.dtype == DType::f32 ? 4 : 2;
  const bool direct = task.column_stride == 1 && bytes > 2;
  for (long long start = 0; start < task.n; start += kGramTile) {
    const long long count = task.n - start < kGramTile ? task.n - start : kGramTile;
    const char* const from = static_cast<const char*>(task.x) + start * task.row_stride * bytes;
    if (direct && bytes == 4) {
      use(Rows<float>{reinterpret_cast<const float*>(from), task.row_stride, 1.0}, count);
    } else if (direct) {
      use(Rows<double>{reinterpret_cast<const double*>(from), task.row_stride, scale}, count);
    } else {
      const long long stride = gram_stride(task.d);
      for (long long i = 0; i < count; ++i)
        widen_row(from + i * task.row_stride * bytes, task.dtype, task.column_stride, task.d, 1.0,
                  wide + i * stride);
      use(Rows<double>{wide, stride, scale}, count);
    }
  }
}

inline double largest_magnitude(const spectrum::GramTask& task, double* wide) {
  constexpr int L = Simd<double>::lanes;
  VecD top{};
  for_row_tiles(task, 1.0, wide, [&](const auto& rows, long long count) __attribute__((always_inline)) {
    for (long long i = 0; i < count; ++i)
      for (long long j = 0; j < task.d; j += L) top = max(top, abs(rows.vector(i, j, task.d - j)));
  });
  double found = 0.0;
  for (int lane = 0; lane < L; ++lane) found = top[lane] > found ? top[lane] : found;
  return found;
}

// The data that follow, spread over the blocks of all tiles.
inline Ahead ahead_of(const spectrum::GramTask& task, long long panels, long long terms) {
  const long long bytes = task.dtype == DType::f64 ? 8 : task.dtype == DType::f32 ? 4 : 2;
  if (task.next == nullptr || task.column_stride != 1 || task.row_stride != task.d) return {nullptr, 0, 0};
  const long long blocks = (panels * panels / 6 + 1) * ((terms + kGramTile / 2 - 1) / (kGramTile / 2));
  const long long lines = task.n * task.d * bytes / 64;
  return {static_cast<const char*>(task.next), lines, lines / blocks + 1};
}

// Lower triangle of the smaller side's moment into task.c; returns what is needed to bound its error.
inline spectrum::GramResult gram(const spectrum::GramTask& task) {
  const long long n = task.n;
  const long long d = task.d;
  const bool tall = task.tall || n >= d;
  const long long m = tall ? d : n;
  const long long stride = task.stride;
  const long long panels = gram_stride(m) / Simd<double>::lanes;
  const long long columns = gram_stride(d);
  Moments at{};
  at.panels = static_cast<double*>(task.workspace);
  at.origin = at.panels + panels * kPanel;
  at.mean = at.origin + columns;
  at.live = at.mean + columns;
  at.wide = at.live + columns;
  for (long long j = 0; j < 3 * columns; ++j) at.origin[j] = 0.0;

  spectrum::GramResult result{};
  double scale = 1.0;
  if (task.dtype == DType::f64) {
    const double top = largest_magnitude(task, at.wide);
    result.exponent = data_exponent(top);
    scale = Range<double>::power(-result.exponent);
  }
  if (task.centred) {
    // The first row goes first: a constant column is then exactly zero, and the mean of the signal's size.
    if (task.origin == nullptr)
      widen_row(task.x, task.dtype, task.column_stride, d, scale, at.origin);
    else
      for (long long j = 0; j < d; ++j) at.origin[j] = task.origin[j];
    for_row_tiles(task, scale, at.wide,
                  [&](const auto& rows, long long count)
                      __attribute__((always_inline)) { add_rows(rows, count, d, at); });
    for (long long j = 0; j < d; ++j) {
      at.mean[j] /= static_cast<double>(n);
      result.accumulated += at.mean[j] * at.mean[j];
    }
    result.accumulated *= static_cast<double>(n);
  }
  if (task.mean != nullptr)
    for (long long j = 0; j < d; ++j)
      task.mean[j] = task.origin == nullptr ? at.origin[j] + at.mean[j] : at.mean[j];
  bool first = true;
  Ahead ahead = ahead_of(task, panels, tall ? n : d);
  if (tall) {
    for_row_tiles(task, scale, at.wide,
                  [&](const auto& rows, long long count) __attribute__((always_inline)) {
                    pack_tall(rows, count, d, at);
                    project_stages(task, at.panels, panels, count);
                    gram_tiles(at.panels, panels, count, task.c, stride, first, n, ahead);
                    first = false;
                  });
  } else {
    for (long long start = 0; start < d; start += kGramTile) {
      const long long count = d - start < kGramTile ? d - start : kGramTile;
      long long done = 0;
      for_row_tiles(task, scale, at.wide,
                    [&](const auto& rows, long long some) __attribute__((always_inline)) {
                      pack_wide(rows, some, done, start, count, at);
                      done += some;
                    });
      project_stages(task, at.panels, panels, count);
      gram_tiles(at.panels, panels, count, task.c, stride, first, d, ahead);
      first = false;
    }
  }
  long long live = 0;
  if (task.stages > 0) result.accumulated = 0.0;
  for (long long j = 0; j < m; ++j) {
    result.accumulated += task.c[j * stride + j];
    live += task.c[j * stride + j] > 0.0 ? 1 : 0;
  }
  long long other = at.live_rows;
  if (!tall)
    for (long long j = 0; j < d; ++j) other += at.live[j] > 0.0 ? 1 : 0;
  long long rows = tall ? other : live;
  const long long cols = tall ? live : other;
  if (task.centred && rows > 0) --rows;
  result.rank_limit = rows < cols ? rows : cols;
  return result;
}

inline void first_row(const spectrum::GramTask& task, double* row) {
  widen_row(task.x, task.dtype, task.column_stride, task.d, 1.0, row);
}

inline void pool_moments(spectrum::PooledMoments& all) {
  const long long d = all.d;
  for (long long j = 0; j < d; ++j) {
    double mean = 0.0;
    for (long long g = 0; g < all.groups; ++g)
      mean += static_cast<double>(all.sizes[g]) * all.means[g * d + j];
    mean /= static_cast<double>(all.n);
    for (long long g = 0; g < all.groups; ++g) all.means[g * d + j] -= mean;
    all.mean[j] = all.origin[j] + mean;
  }
  all.between = 0.0;
  for (long long g = 0; g < all.groups; ++g) {
    const double weight = static_cast<double>(all.sizes[g]);
    const double* const off = all.means + g * d;
    for (long long j = 0; j < d; ++j) {
      const double* __restrict part = all.parts + g * all.size + j * all.stride;
      double* __restrict whole = all.whole + j * all.stride;
      const double factor = weight * off[j];
      all.between += factor * off[j];
      if (g == 0)
        for (long long i = j; i < d; ++i) whole[i] = part[i] + factor * off[i];
      else
        for (long long i = j; i < d; ++i) whole[i] += part[i] + factor * off[i];
    }
  }
}

// Of sums over two sets of samples, the one of the second from that of both and that of the first.
inline void leave_out(const spectrum::PooledMoments& all, long long group, double* c, double* mean) {
  const long long d = all.d;
  const double own = static_cast<double>(all.sizes[group]);
  const double rest = static_cast<double>(all.n) - own;
  const double* const off = all.means + group * d;
  for (long long j = 0; j < d; ++j) {
    mean[j] = all.mean[j] - own / rest * off[j];
    const double* __restrict whole = all.whole + j * all.stride;
    const double* __restrict part = all.parts + group * all.size + j * all.stride;
    double* __restrict to = c + j * all.stride;
    const double factor = own * static_cast<double>(all.n) / rest * off[j];
    for (long long i = j; i < d; ++i) to[i] = (whole[i] - part[i]) - factor * off[i];
  }
}

inline spectrum::GramKernels gram_kernels() {
  return {&gram_stride, &gram_workspace,  &gram,      &first_row, &pool_moments,
          &leave_out,   &small_workspace, &gram_small};
}

}  // namespace RGFAST_NS
}  // namespace rgfast
