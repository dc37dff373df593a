// Panels, tiles and their products for one instruction set. See cka.hpp for what is computed.
namespace rgfast::cka {
namespace RGFAST_NS {

template <class T>
struct Vector;
template <>
struct Vector<float> {
  typedef float type __attribute__((vector_size(RGFAST_SIMD), aligned(4)));
};
template <>
struct Vector<double> {
  typedef double type __attribute__((vector_size(RGFAST_SIMD), aligned(8)));
};
typedef float HalfFloats __attribute__((vector_size(RGFAST_SIMD / 2), aligned(4)));
using Doubles = Vector<double>::type;

// As many T as a vector has doubles.
template <class T>
struct Narrow {
  typedef HalfFloats type;
};
template <>
struct Narrow<double> {
  typedef Doubles type;
};

template <class T>
inline constexpr int kLanes = static_cast<int>(RGFAST_SIMD / sizeof(T));
// Accumulators fill the registers: 6x4 or 4x4 of 32, 4x2 of 16.
inline constexpr int kMostColumns = RGFAST_TARGET == RGFAST_TARGET_AVX512 ? 4 : 2;
inline constexpr int kTile = RGFAST_TARGET == RGFAST_TARGET_AVX512 ? 4 : 8;  // panels on a side of a tile

#define RGFAST_INLINE static inline __attribute__((always_inline))

template <class T>
RGFAST_INLINE typename Vector<T>::type load(const T* from) {
  return *reinterpret_cast<const typename Vector<T>::type*>(from);
}
RGFAST_INLINE void store(double* to, Doubles value) { *reinterpret_cast<Doubles*>(to) = value; }

RGFAST_INLINE Vector<float>::type fused(Vector<float>::type a, Vector<float>::type b, Vector<float>::type c) {
#if RGFAST_TARGET == RGFAST_TARGET_AVX512
  return (Vector<float>::type)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif RGFAST_TARGET == RGFAST_TARGET_AVX2
  return (Vector<float>::type)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif RGFAST_TARGET == RGFAST_TARGET_NEON
  return (Vector<float>::type)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}
RGFAST_INLINE Doubles fused(Doubles a, Doubles b, Doubles c) {
#if RGFAST_TARGET == RGFAST_TARGET_AVX512
  return (Doubles)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif RGFAST_TARGET == RGFAST_TARGET_AVX2
  return (Doubles)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#elif RGFAST_TARGET == RGFAST_TARGET_NEON
  return (Doubles)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b);
#else
  return a * b + c;
#endif
}

RGFAST_INLINE Vector<float>::type splat(float value) {
#if RGFAST_TARGET == RGFAST_TARGET_AVX512
  return (Vector<float>::type)_mm512_set1_ps(value);
#elif RGFAST_TARGET == RGFAST_TARGET_AVX2
  return (Vector<float>::type)_mm256_set1_ps(value);
#else
  return Vector<float>::type{value, value, value, value};
#endif
}
RGFAST_INLINE Doubles splat(double value) {
#if RGFAST_TARGET == RGFAST_TARGET_AVX512
  return (Doubles)_mm512_set1_pd(value);
#elif RGFAST_TARGET == RGFAST_TARGET_AVX2
  return (Doubles)_mm256_set1_pd(value);
#else
  return Doubles{value, value};
#endif
}

RGFAST_INLINE Doubles wide(const double* from) { return load(from); }
RGFAST_INLINE Doubles wide(const float* from) {
  return __builtin_convertvector(*reinterpret_cast<const HalfFloats*>(from), Doubles);
}
RGFAST_INLINE void narrow(double* to, Doubles value) { store(to, value); }
RGFAST_INLINE void narrow(float* to, Doubles value) {
  *reinterpret_cast<HalfFloats*>(to) = __builtin_convertvector(value, HalfFloats);
}

RGFAST_INLINE double total(Doubles v) {
  double sum = 0.0;
  for (int i = 0; i < kLanes<double>; ++i) sum += v[i];
  return sum;
}

// Up to two stretches of memory that the next tile reads, fetched a line at a time beside this one's
// products.
struct Ahead {
  const char* at = nullptr;
  const char* end = nullptr;
  const char* then = nullptr;
  const char* then_end = nullptr;
};
RGFAST_INLINE const char* take(Ahead& ahead, std::int64_t lines) {
  if (ahead.at >= ahead.end) {
    ahead.at = ahead.then;
    ahead.end = ahead.then_end;
    ahead.then = ahead.then_end = nullptr;
  }
  const char* const from = ahead.at;
  if (from != nullptr) ahead.at += 64 * lines;
  return from;
}

// c[Rows, Columns·lanes] (+)= aᵀ b over `depth` products. `b` are panels `panel` elements apart.
template <class T, int Rows, int Columns>
static void product(const T* a, const T* b, std::int64_t depth, std::int64_t panel, double* c, bool add,
                    const char* ahead) {
  using V = typename Vector<T>::type;
  constexpr int lanes = kLanes<T>;
  V sum[Rows][Columns];
#pragma GCC unroll 8
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 8
    for (int v = 0; v < Columns; ++v) sum[i][v] = V{};
  for (std::int64_t k = 0; k < depth; ++k, a += lanes, b += lanes) {
    V right[Columns];
    __builtin_prefetch(ahead + 64 * k, 0, 2);  // past the end does no harm
#pragma GCC unroll 8
    for (int v = 0; v < Columns; ++v) right[v] = load(b + v * panel);
#pragma GCC unroll 8
    for (int i = 0; i < Rows; ++i) {
      const V left = splat(a[i]);
#pragma GCC unroll 8
      for (int v = 0; v < Columns; ++v) sum[i][v] = fused(left, right[v], sum[i][v]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 8
    for (int v = 0; v < Columns; ++v) {
      T line[lanes];
      *reinterpret_cast<V*>(line) = sum[i][v];
#pragma GCC unroll 2
      for (int half = 0; half < lanes; half += kLanes<double>) {
        double* const to = c + i * kTile * lanes + v * lanes + half;
        const Doubles value = wide(line + half);
        store(to, add ? load(to) + value : value);
      }
    }
}

// All rows of one panel times `Columns` panels.
template <class T, int Columns>
RGFAST_INLINE void strip(const T* a, const T* b, std::int64_t depth, std::int64_t panel, double* c, bool add,
                         Ahead& ahead) {
  constexpr std::int64_t line = kTile * kLanes<T>;
  if constexpr (kLanes<T> == 16) {
    product<T, 6, Columns>(a, b, depth, panel, c, add, take(ahead, depth));
    product<T, 6, Columns>(a + 6, b, depth, panel, c + 6 * line, add, take(ahead, depth));
    product<T, 4, Columns>(a + 12, b, depth, panel, c + 12 * line, add, take(ahead, depth));
  } else if constexpr (kLanes<T> == 2) {
    product<T, 2, Columns>(a, b, depth, panel, c, add, take(ahead, depth));
  } else {
    for (int i = 0; i < kLanes<T>; i += 4)
      product<T, 4, Columns>(a + i, b, depth, panel, c + i * line, add, take(ahead, depth));
  }
}

// c = aᵀ b of `rows` by `columns` panels, each up to kTile and `panel` elements apart; a line of c is always
// kTile panels wide. On the diagonal, panels below it are left as they are.
template <class T>
static void tile(const T* a, const T* b, std::int64_t depth, std::int64_t panel, int rows, int columns,
                 bool diagonal, double* c, Ahead ahead) {
  constexpr int lanes = kLanes<T>;
  constexpr std::int64_t line = kTile * lanes;
  for (std::int64_t from = 0; from < depth; from += kDepth) {
    const std::int64_t part = depth - from < kDepth ? depth - from : kDepth;
    for (int group = 0; group < columns; group += kMostColumns)
      for (int i = 0; i < rows; ++i) {
        const int first = diagonal && i > group ? i : group;
        const int end = group + kMostColumns < columns ? group + kMostColumns : columns;
        const T* const left = a + i * panel + from * lanes;
        const T* const right = b + first * panel + from * lanes;
        double* const to = c + i * lanes * line + first * lanes;
        switch (end - first) {
          case 4:
            strip<T, kMostColumns>(left, right, part, panel, to, from > 0, ahead);
            break;
          case 3:
            strip<T, kMostColumns == 4 ? 3 : 2>(left, right, part, panel, to, from > 0, ahead);
            break;
          case 2:
            strip<T, 2>(left, right, part, panel, to, from > 0, ahead);
            break;
          case 1:
            strip<T, 1>(left, right, part, panel, to, from > 0, ahead);
            break;
          default:
            break;
        }
      }
  }
}

// Writes (x - shift) * scale, rounded to T, in pieces of a vector `panel` elements apart; adds it to the
// column sums `rest` and returns the sum of its squares. `shift` holds numbers that T holds: the difference
// of two floats is then rounded once, as the difference of the same numbers in fp64 would be.
template <class S, class T>
RGFAST_INLINE double centered_row(const S* row, const double* shift, const T* same_shift, double scale,
                                  std::int64_t d, T* to, std::int64_t panel, double* rest, const S* soon) {
  constexpr int half = kLanes<double>;
  Doubles squares[2] = {};
  double edge = 0.0;
  std::int64_t j = 0;
  for (; j + kLanes<T> <= d; j += kLanes<T>, to += panel) {
    __builtin_prefetch(soon + j, 0, 3);
    if constexpr (sizeof(S) == 4 && sizeof(T) == 4)
      *reinterpret_cast<typename Vector<T>::type*>(to) =
          (load(row + j) - load(same_shift + j)) * splat(static_cast<T>(scale));
    else
#pragma GCC unroll 2
      for (int part = 0; part < kLanes<T>; part += half)
        narrow(to + part, (wide(row + j + part) - load(shift + j + part)) * splat(scale));
#pragma GCC unroll 2
    for (int part = 0; part < kLanes<T>; part += half) {
      const Doubles value = wide(to + part);
      squares[part / half] = fused(value, value, squares[part / half]);
      store(rest + j + part, load(rest + j + part) + value);
    }
  }
  for (int v = 0; j < d; ++j, ++v) {
    to[v] = static_cast<T>((static_cast<double>(row[j]) - shift[j]) * scale);
    const double value = static_cast<double>(to[v]);
    edge += value * value;
    rest[j] += value;
  }
  return total(squares[0] + squares[1]) + edge;
}

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define RGFAST_TRANSPOSES 1
#endif
#endif
#ifdef RGFAST_TRANSPOSES
// One step of a transposition: trades the blocks off the diagonal between vectors `Step` apart.
template <int Step, class H, int... K>
RGFAST_INLINE void trade(H& a, H& b, std::integer_sequence<int, K...>) {
  constexpr int n = static_cast<int>(sizeof...(K));
  const H low = __builtin_shufflevector(a, b, ((K & Step) != 0 ? n + K - Step : K)...);
  b = __builtin_shufflevector(a, b, ((K & Step) != 0 ? n + K : K + Step)...);
  a = low;
}
template <int Step, class H>
RGFAST_INLINE void trades(H* v) {
  constexpr int n = kLanes<double>;
  if constexpr (Step < n) {
#pragma GCC unroll 8
    for (int i = 0; i < n; ++i)
      if ((i & Step) == 0) trade<Step>(v[i], v[i + Step], std::make_integer_sequence<int, n>{});
    trades<2 * Step>(v);
  }
}
#endif

// to[d, lanes] = linesᵀ, lines[lanes, d].
template <class T>
static void transpose(const T* lines, std::int64_t d, T* to) {
  constexpr int n = kLanes<double>;
  std::int64_t j = 0;
#ifdef RGFAST_TRANSPOSES
  using H = typename Narrow<T>::type;
  for (; j + n <= d; j += n)
    for (int from = 0; from < kLanes<T>; from += n) {
      H v[n];
#pragma GCC unroll 8
      for (int i = 0; i < n; ++i) v[i] = *reinterpret_cast<const H*>(lines + (from + i) * d + j);
      trades<1>(v);
#pragma GCC unroll 8
      for (int i = 0; i < n; ++i) *reinterpret_cast<H*>(to + (j + i) * kLanes<T> + from) = v[i];
    }
#endif
  for (; j < d; ++j)
    for (int i = 0; i < kLanes<T>; ++i) to[j * kLanes<T> + i] = lines[i * d + j];
}

// Shift and scale from every `step`-th row, rounded to T.
template <class S, class T>
static Status means(const PackJob& job, std::int64_t step, double* shift, double* sums, double* scale) {
  const S* const source = static_cast<const S*>(job.source);
  const std::int64_t n = job.samples, d = job.width, whole = d - d % kLanes<double>;
  for (std::int64_t j = 0; j < d; ++j) {
    shift[j] = static_cast<double>(source[j]);
    sums[j] = 0.0;
  }
  // Off the first row, so that equal rows become exact zeros and an offset costs no digits.
  Doubles most{};
  double largest = 0.0, rows = 0.0;
  for (std::int64_t i = 0; i < n; i += step, rows += 1.0) {
    const S* const row = source + i * job.sample_stride;
    for (std::int64_t j = 0; j < whole; j += kLanes<double>) {
      const Doubles off = wide(row + j) - load(shift + j);
      store(sums + j, load(sums + j) + off);
      const Doubles size = off < 0.0 ? -off : off;
      most = size > most ? size : most;
    }
    for (std::int64_t j = whole; j < d; ++j) {
      const double off = static_cast<double>(row[j]) - shift[j], size = off < 0.0 ? -off : off;
      sums[j] += off;
      largest = size > largest ? size : largest;
    }
  }
  for (int v = 0; v < kLanes<double>; ++v) largest = most[v] > largest ? most[v] : largest;
  bool finite = true;
  for (std::int64_t j = 0; j < d; ++j) {
    finite = finite && sums[j] - sums[j] == 0.0;  // NaN and infinity come through
    const double exact = shift[j] + sums[j] / rows, rounded = static_cast<double>(static_cast<T>(exact));
    shift[j] = rounded - rounded == 0.0 ? rounded : 0.0;
  }
  if (!finite) return Status::not_finite;
  const int exponent = largest == 0.0 ? 0 : __builtin_ilogb(largest);
  // The scale stays a normal number of T.
  const int most_exponent = sizeof(T) == 4 ? 120 : 1000;
  *scale = __builtin_ldexp(1.0, exponent < -most_exponent  ? most_exponent
                                : exponent > most_exponent ? -most_exponent
                                                           : -exponent);
  return largest == 0.0 ? Status::constant : Status::good;
}

// Panels, norms and the column sums `rest`; returns the sum of the norms.
template <class S, class T>
static double fill(const PackJob& job, const double* shift, double scale, double* rest, T* scratch) {
  constexpr int lanes = kLanes<T>;
  const S* const source = static_cast<const S*>(job.source);
  const std::int64_t n = job.samples, d = job.width;
  T* const panels = static_cast<T*>(job.panels);
  T* const same_shift = scratch;
  T* const lines = scratch + d;
  for (std::int64_t j = 0; j < d; ++j) {
    same_shift[j] = static_cast<T>(shift[j]);
    rest[j] = 0.0;
  }
  double trace = 0.0;
  T* const last = panels + d / lanes * job.panel;
  for (std::int64_t from = 0; from < n; from += lanes) {
    const std::int64_t rows = n - from < lanes ? n - from : lanes;
    for (std::int64_t r = 0; r < rows; ++r) {
      const std::int64_t i = from + r;
      const S* const row = source + i * job.sample_stride;
      const S* const soon = i + 4 < n ? row + 4 * job.sample_stride : row;
      if (job.by_features)
        for (std::int64_t j = d % lanes; j > 0 && j < lanes; ++j) last[i * lanes + j] = T{0};
      job.norms[i] =
          job.by_features
              ? centered_row(row, shift, same_shift, scale, d, panels + i * lanes, job.panel, rest, soon)
              : centered_row(row, shift, same_shift, scale, d, lines + r * d, lanes, rest, soon);
      trace += job.norms[i];
    }
    if (job.by_features) continue;
    for (std::int64_t k = rows * d; k < lanes * d; ++k) lines[k] = T{0};
    transpose(lines, d, panels + from / lanes * job.panel);
  }
  return trace;
}

// What a shift from a few rows must keep to: a mean that is left over may not rival the spread, and the
// values are of the order of 1. Then the exact corrections by row sums cost no digits.
static bool fair(double trace, const double* rest, std::int64_t n, std::int64_t d) {
  double left = 0.0;
  for (std::int64_t j = 0; j < d; ++j) left += rest[j] * rest[j];
  const double level = trace / (static_cast<double>(n) * static_cast<double>(d));
  return left <= 0.1 * trace * static_cast<double>(n) && level > 1e-6 && level < 1e6;
}

template <class S, class T>
static void pack(const PackJob& job) {
  constexpr int lanes = kLanes<T>;
  const std::int64_t n = job.samples, d = job.width;
  T* const panels = static_cast<T*>(job.panels);
  double* const shift = job.columns;
  double* const rest = shift + d;
  T* const scratch = reinterpret_cast<T*>(rest + d);
  double scale = 1.0;
  const std::int64_t step = n > 64 ? n / 32 : 1;
  *job.status = means<S, T>(job, step, shift, rest, &scale);
  bool done = *job.status == Status::good && fair(fill<S>(job, shift, scale, rest, scratch), rest, n, d);
  if (!done && step > 1) *job.status = means<S, T>(job, 1, shift, rest, &scale);
  if (*job.status != Status::good) {
    const std::int64_t whole = ((job.by_features ? d : n) + lanes - 1) / lanes * job.panel;
    for (std::int64_t i = 0; i < whole; ++i) panels[i] = T{0};
    for (std::int64_t i = 0; i < n; ++i) job.norms[i] = job.row_sums[i] = 0.0;
    return;
  }
  if (!done && step > 1) fill<S>(job, shift, scale, rest, scratch);
  if (job.by_features) {
    const T* const last = panels + d / lanes * job.panel;
    for (std::int64_t i = 0; i < n; ++i) {
      Doubles sum[2] = {};
      double edge = 0.0;
      std::int64_t j = 0;
      const T* row = panels + i * lanes;
      for (; j + lanes <= d; j += lanes, row += job.panel)
#pragma GCC unroll 2
        for (int part = 0; part < lanes; part += kLanes<double>) {
          Doubles& one = sum[part / kLanes<double>];
          one = fused(wide(row + part), load(rest + j + part), one);
        }
      for (; j < d; ++j) edge += static_cast<double>(last[i * lanes + j % lanes]) * rest[j];
      job.row_sums[i] = total(sum[0] + sum[1]) + edge;
    }
    return;
  }
  for (std::int64_t from = 0; from < n; from += lanes) {
    const T* const panel = panels + from / lanes * job.panel;
    Doubles sum[lanes / kLanes<double>] = {};
    for (std::int64_t j = 0; j < d; ++j)
#pragma GCC unroll 2
      for (int part = 0; part < lanes; part += kLanes<double>) {
        Doubles& one = sum[part / kLanes<double>];
        one = fused(wide(panel + j * lanes + part), splat(rest[j]), one);
      }
    for (int v = 0; v < lanes && from + v < n; ++v)
      job.row_sums[from + v] = sum[v / kLanes<double>][v % kLanes<double>];
  }
}

static void pack_any(const PackJob& job, bool single) {
  if (job.is_double)
    single ? pack<double, float>(job) : pack<double, double>(job);
  else
    single ? pack<float, float>(job) : pack<float, double>(job);
}

// Products of layers [l, l+4) with [m, m+4) over a tile; what lies past the end repeats the last layer.
static void products(const SampleJob& job, int l, int m, std::int64_t size, std::int64_t used) {
  const double* left[4];
  const double* right[4];
  for (int i = 0; i < 4; ++i) {
    left[i] = job.tiles + (l + i < job.layers ? l + i : job.layers - 1) * size;
    right[i] = job.tiles + (m + i < job.layers ? m + i : job.layers - 1) * size;
  }
  Doubles sum[4][4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) sum[i][j] = Doubles{};
  for (std::int64_t k = 0; k < used; k += kLanes<double>) {
    Doubles b[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) b[j] = load(right[j] + k);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const Doubles a = load(left[i] + k);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) sum[i][j] = fused(a, b[j], sum[i][j]);
    }
  }
  for (int i = 0; i < 4 && l + i < job.layers; ++i)
    for (int j = 0; j < 4 && m + j < job.layers; ++j) {
      const int at = l + i <= m + j ? job.pairs[(l + i) * job.layers + m + j] : -1;
      if (at >= 0) job.sums[at] = 2.0 * total(sum[i][j]);
    }
}

template <class T>
static void gram_tiles(const SampleJob& job) {
  constexpr std::int64_t line = kTile * kLanes<T>;
  const std::int64_t height = job.rows * kLanes<T>, width = job.columns * kLanes<T>;
  for (int l = 0; l < job.layers; ++l) {
    double* const out = job.tiles + l * line * line;
    Ahead ahead;
    if (l + 1 < job.layers) {
      ahead.at = static_cast<const char*>(job.left[l + 1]);
      ahead.then = static_cast<const char*>(job.right[l + 1]);
      const std::int64_t bytes = job.panels[l + 1] * static_cast<std::int64_t>(sizeof(T));
      ahead.end = ahead.at + job.rows * bytes;
      ahead.then_end = ahead.then + job.columns * bytes;
    }
    tile(static_cast<const T*>(job.left[l]), static_cast<const T*>(job.right[l]), job.widths[l],
         job.panels[l], job.rows, job.columns, job.diagonal, out, ahead);
    for (std::int64_t i = 0; i < height; ++i) {
      for (std::int64_t j = 0; job.diagonal && j <= i; ++j) out[i * line + j] = 0.0;
      for (std::int64_t j = width; j < line; ++j) out[i * line + j] = 0.0;
    }
  }
}

static void sample(const SampleJob& job, bool single) {
  const std::int64_t line = kTile * (single ? kLanes<float> : kLanes<double>);
  const std::int64_t used = line * job.rows * (single ? kLanes<float> : kLanes<double>);
  single ? gram_tiles<float>(job) : gram_tiles<double>(job);
  for (int l = 0; l < job.layers; l += 4)
    for (int m = l; m < job.layers; m += 4) {
      bool wanted = false;
      for (int i = l; i < l + 4 && i < job.layers; ++i)
        for (int j = m; j < m + 4 && j < job.layers; ++j)
          wanted = wanted || (i <= j && job.pairs[i * job.layers + j] >= 0);
      if (wanted) products(job, l, m, line * line, used);
    }
}

template <class T>
static void feature(FeatureJob& job) {
  constexpr std::int64_t line = kTile * kLanes<T>;
  const std::int64_t panel = job.panel;
  const std::int64_t height = job.rows * kLanes<T>;
  job.sum = 0.0;
  for (std::int64_t p = job.first; p < job.panels; p += kTile) {
    const int columns = static_cast<int>(job.panels - p < kTile ? job.panels - p : kTile);
    const bool diagonal = p == job.diagonal;
    const T* const right = static_cast<const T*>(job.right) + p * panel;
    Ahead ahead;
    if (p + columns < job.panels) {
      ahead.at = reinterpret_cast<const char*>(right + columns * panel);
      ahead.end = reinterpret_cast<const char*>(right + 2 * columns * panel);
    }
    tile(static_cast<const T*>(job.left), right, job.samples, panel, job.rows, columns, diagonal, job.tile,
         ahead);
    double own = 0.0;
    if (diagonal)
      for (std::int64_t i = 0; i < height; ++i) {
        own += job.tile[i * line + i] * job.tile[i * line + i];
        for (std::int64_t j = 0; j <= i; ++j) job.tile[i * line + j] = 0.0;
      }
    Doubles sum[2] = {};
    for (std::int64_t i = 0; i < height; ++i)
      for (std::int64_t j = 0; j < columns * kLanes<T>; j += kLanes<double>) {
        const Doubles value = load(job.tile + i * line + j);
        sum[j / kLanes<double> % 2] = fused(value, value, sum[j / kLanes<double> % 2]);
      }
    const double all = total(sum[0] + sum[1]);
    job.sum += job.diagonal >= 0 ? 2.0 * all + own : all;
  }
}

static void feature_any(FeatureJob& job, bool single) { single ? feature<float>(job) : feature<double>(job); }

static void dot(VectorJob& job) {
  Doubles sum[4] = {};
  std::int64_t i = 0;
  for (; i + 4 * kLanes<double> <= job.count; i += 4 * kLanes<double>)
    for (int v = 0; v < 4; ++v)
      sum[v] = fused(load(job.a + i + v * kLanes<double>), load(job.b + i + v * kLanes<double>), sum[v]);
  double edge = 0.0;
  for (; i < job.count; ++i) edge += job.a[i] * job.b[i];
  job.sum = total((sum[0] + sum[1]) + (sum[2] + sum[3])) + edge;
}

static std::int64_t lanes(bool single) { return single ? kLanes<float> : kLanes<double>; }

inline Kernels kernels() { return {kTile, &lanes, &pack_any, &sample, &feature_any, &dot}; }

#undef RGFAST_INLINE
#undef RGFAST_TRANSPOSES

}  // namespace RGFAST_NS
}  // namespace rgfast::cka
