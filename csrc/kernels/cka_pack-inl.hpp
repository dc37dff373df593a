// Layers into panels: rows centred, scaled and rounded, their norms and the row sums of their Gram.
namespace rgfast::cka {
namespace RGFAST_NS {

// (x - shift) * scale, rounded to T. `shift` and `same_shift` hold the same numbers, which T holds: the
// difference of two floats is then rounded once, as it would be in fp64.
template <class S, class T>
RGFAST_INLINE typename Vector<T>::type centered(const S* x, const double* shift, const T* same_shift,
                                                double scale) {
  if constexpr (sizeof(S) == 4 && sizeof(T) == 4) {
    return (load(x) - load(same_shift)) * splat(static_cast<T>(scale));
  } else {
    T line[kLanes<T>];
#pragma GCC unroll 2
    for (int part = 0; part < kLanes<T>; part += kLanes<double>)
      narrow(line + part, (wide(x + part) - load(shift + part)) * splat(scale));
    return load(line);
  }
}

// A row in pieces of a vector `panel` elements apart; adds it to the column sums `rest` and returns the sum
// of its squares.
template <class S, class T>
RGFAST_INLINE double centered_row(const S* row, const double* shift, const T* same_shift, double scale,
                                  std::int64_t d, T* to, std::int64_t panel, double* rest, const S* soon) {
  constexpr int half = kLanes<double>;
  Doubles squares[2] = {};
  double edge = 0.0;
  std::int64_t j = 0;
  for (; j + kLanes<T> <= d; j += kLanes<T>, to += panel) {
    __builtin_prefetch(soon + j, 0, 3);
    store(to, centered<S, T>(row + j, shift + j, same_shift + j, scale));
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

// As many rows as a vector has lanes, or fewer with zeros after them, turned: to[d, lanes]. Adds the column
// sums to `rest`: those of a panel in T.
template <bool Full, class S, class T>
static void turned_rows(const S* source, std::int64_t stride, std::int64_t rows, const double* shift,
                        const T* same_shift, double scale, std::int64_t d, T* to, double* rest) {
  using V = typename Vector<T>::type;
  constexpr int lanes = kLanes<T>;
  const std::int64_t panel = lanes * stride;
  std::int64_t j = 0;
  for (; j + lanes <= d; j += lanes, to += lanes * lanes) {
    V v[lanes], sum[2] = {};
    const S* at = source + j;
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i, at += stride) {
      if (!Full && i >= rows) {
        v[i] = V{};
        continue;
      }
      __builtin_prefetch(at + panel, 0, 2);  // past the end does no harm
      v[i] = centered<S, T>(at, shift + j, same_shift + j, scale);
      sum[i % 2] = sum[i % 2] + v[i];
    }
    T line[lanes];
    store(line, sum[0] + sum[1]);
#pragma GCC unroll 2
    for (int part = 0; part < lanes; part += kLanes<double>)
      store(rest + j + part, load(rest + j + part) + wide(line + part));
    transpose<T>(v);
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i) store(to + i * lanes, v[i]);
  }
  for (; j < d; ++j, to += lanes)
    for (int i = 0; i < lanes; ++i) {
      to[i] =
          i < rows ? static_cast<T>((static_cast<double>(source[i * stride + j]) - shift[j]) * scale) : T{0};
      rest[j] += static_cast<double>(to[i]);
    }
}

// Σ_j panel[j] · weights[j], or · panel[j] where there are none, for every lane of a panel of samples: in T
// over 16 features, then in fp64.
template <class T>
RGFAST_INLINE void lane_sums(const T* panel, const T* weights, std::int64_t d, std::int64_t rows,
                             double* out) {
  using V = typename Vector<T>::type;
  constexpr int lanes = kLanes<T>;
  Doubles sums[lanes / kLanes<double>] = {};
  for (std::int64_t from = 0; from < d; from += 16) {
    const std::int64_t count = d - from < 16 ? d - from : 16;
    V part[4] = {};
    const auto add = [&](std::int64_t k) {
      const V value = load(panel + (from + k) * lanes);
      part[k % 4] = fused(value, weights != nullptr ? splat(weights[from + k]) : value, part[k % 4]);
    };
    if (count == 16) {
#pragma GCC unroll 16
      for (int k = 0; k < 16; ++k) add(k);
    } else {
      for (std::int64_t k = 0; k < count; ++k) add(k);
    }
    T line[lanes];
    store(line, (part[0] + part[1]) + (part[2] + part[3]));
#pragma GCC unroll 2
    for (int half = 0; half < lanes; half += kLanes<double>)
      sums[half / kLanes<double>] = sums[half / kLanes<double>] + wide(line + half);
  }
  for (int v = 0; v < rows; ++v) out[v] = sums[v / kLanes<double>][v % kLanes<double>];
}

// Σ_j row[j] · weights[j] of a row in pieces of a vector `panel` elements apart.
template <class T>
RGFAST_INLINE double row_sum(const T* row, std::int64_t panel, const double* weights, std::int64_t d) {
  Doubles sum[2] = {};
  double edge = 0.0;
  std::int64_t j = 0;
  for (; j + kLanes<T> <= d; j += kLanes<T>, row += panel)
#pragma GCC unroll 2
    for (int part = 0; part < kLanes<T>; part += kLanes<double>) {
      Doubles& one = sum[part / kLanes<double>];
      one = fused(wide(row + part), load(weights + j + part), one);
    }
  for (int v = 0; j < d; ++j, ++v) edge += static_cast<double>(row[v]) * weights[j];
  return total(sum[0] + sum[1]) + edge;
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
    const S* const soon = row + (i + 2 * step < n ? 2 * step * job.sample_stride : 0);
    for (std::int64_t j = 0; j < whole; j += kLanes<double>) {
      __builtin_prefetch(soon + j, 0, 3);
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

// Panels, norms and the column sums `rest` of every group; returns the sum of the norms.
template <class S, class T>
static double fill(const PackJob& job, const double* shift, double scale, double* rest, T* same_shift) {
  constexpr int lanes = kLanes<T>;
  const S* const source = static_cast<const S*>(job.source);
  const std::int64_t n = job.samples, d = job.width, stride = job.sample_stride;
  T* const panels = static_cast<T*>(job.panels);
  for (std::int64_t j = 0; j < d; ++j) same_shift[j] = static_cast<T>(shift[j]);
  for (std::int64_t j = 0; j < job.groups * d; ++j) rest[j] = 0.0;
  double trace = 0.0;
  const std::int64_t step = job.groups * stride;
  if (job.by_features) {
    T* const last = panels + d / lanes * job.panel;
    for (std::int64_t g = 0; g < job.groups; ++g) {
      const std::int64_t count = (n - g + job.groups - 1) / job.groups, first = g * job.group_slots;
      for (std::int64_t i = 0; i < count; ++i) {
        const S* const row = source + g * stride + i * step;
        const S* const soon = i + 4 < count ? row + 4 * step : row;
        const std::int64_t slot = first + i;
        for (std::int64_t j = d % lanes; j > 0 && j < lanes; ++j) last[slot * lanes + j] = T{0};
        job.norms[slot] = centered_row(row, shift, same_shift, scale, d, panels + slot * lanes, job.panel,
                                       rest + g * d, soon);
        trace += job.norms[slot];
      }
      for (std::int64_t slot = first + count; slot < first + job.group_slots; ++slot) {
        job.norms[slot] = 0.0;
        for (std::int64_t j = 0; j < d; j += lanes)
          for (int v = 0; v < lanes; ++v) panels[j / lanes * job.panel + slot * lanes + v] = T{0};
      }
    }
    return trace;
  }
  for (std::int64_t g = 0; g < job.groups; ++g) {
    const std::int64_t count = (n - g + job.groups - 1) / job.groups, first = g * job.group_slots;
    double* const norms = job.norms + first;
    double* const own = rest + g * d;
    std::int64_t from = 0;
    for (; from < count; from += lanes) {
      const std::int64_t rows = count - from < lanes ? count - from : lanes;
      T* const panel = panels + (first + from) / lanes * job.panel;
      const S* const at = source + g * stride + from * step;
      rows == lanes ? turned_rows<true>(at, step, rows, shift, same_shift, scale, d, panel, own)
                    : turned_rows<false>(at, step, rows, shift, same_shift, scale, d, panel, own);
      lane_sums<T>(panel, nullptr, d, rows, norms + from);
      for (std::int64_t r = 0; r < rows; ++r) trace += norms[from + r];
    }
    for (; from < job.group_slots; from += lanes) {
      T* const panel = panels + (first + from) / lanes * job.panel;
      for (std::int64_t i = 0; i < d * lanes; ++i) panel[i] = T{0};
    }
    for (std::int64_t i = count; i < job.group_slots; ++i) norms[i] = 0.0;
  }
  return trace;
}

// What a shift from a few rows must keep to: a mean that is left over may not rival the spread, and the
// values are of the order of 1. Then the exact corrections by row sums cost no digits.
static bool fair(double trace, const double* rest, std::int64_t groups, std::int64_t n, std::int64_t d) {
  double left = 0.0;
  for (std::int64_t j = 0; j < d; ++j) {
    double sum = rest[j];
    for (std::int64_t g = 1; g < groups; ++g) sum += rest[g * d + j];
    left += sum * sum;
  }
  const double level = trace / (static_cast<double>(n) * static_cast<double>(d));
  return left <= 0.1 * trace * static_cast<double>(n) && level > 1e-6 && level < 1e6;
}

template <class S, class T>
static void pack(const PackJob& job) {
  constexpr int lanes = kLanes<T>;
  const std::int64_t n = job.samples, d = job.width, slots = job.groups * job.group_slots;
  T* const panels = static_cast<T*>(job.panels);
  double* const shift = job.columns;
  double* const rest = shift + d;
  T* const scratch = reinterpret_cast<T*>(rest + job.groups * d);
  double scale = 1.0;
  const std::int64_t step = n > 64 ? n / 32 : 1;
  *job.status = means<S, T>(job, step, shift, rest, &scale);
  bool done =
      *job.status == Status::good && fair(fill<S>(job, shift, scale, rest, scratch), rest, job.groups, n, d);
  if (!done && step > 1) *job.status = means<S, T>(job, 1, shift, rest, &scale);
  if (*job.status != Status::good) {
    const std::int64_t whole = ((job.by_features ? d : slots) + lanes - 1) / lanes * job.panel;
    for (std::int64_t i = 0; i < whole; ++i) panels[i] = T{0};
    for (std::int64_t i = 0; i < slots; ++i) job.norms[i] = 0.0;
    for (std::int64_t i = 0; i < job.groups * slots; ++i) job.row_sums[i] = 0.0;
    return;
  }
  if (!done && step > 1) fill<S>(job, shift, scale, rest, scratch);
  if (job.by_features) {
    for (std::int64_t g = 0; g < job.groups; ++g)
      for (std::int64_t i = 0; i < slots; ++i)
        job.row_sums[g * slots + i] = row_sum(panels + i * lanes, job.panel, rest + g * d, d);
    return;
  }
  T* const weights = scratch;
  for (std::int64_t g = 0; g < job.groups; ++g) {
    for (std::int64_t j = 0; j < d; ++j) weights[j] = static_cast<T>(rest[g * d + j]);
    for (std::int64_t from = 0; from < slots; from += lanes)
      lane_sums<T>(panels + from / lanes * job.panel, weights, d, slots - from < lanes ? slots - from : lanes,
                   job.row_sums + g * slots + from);
  }
}

static void pack_any(const PackJob& job, bool single) {
  if (job.is_double)
    single ? pack<double, float>(job) : pack<double, double>(job);
  else
    single ? pack<float, float>(job) : pack<float, double>(job);
}

}  // namespace RGFAST_NS
}  // namespace rgfast::cka
