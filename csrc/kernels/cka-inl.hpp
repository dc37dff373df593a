// What is done with tiles of products. See cka.hpp for what is computed.
namespace rgfast::cka {
namespace RGFAST_NS {

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
  constexpr std::int64_t line = kTile<T> * kLanes<T>;
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
    tile(static_cast<const T*>(job.left[l]), static_cast<const T*>(job.right[l]), job.widths[l], kDepth,
         job.panels[l], job.rows, job.columns, job.diagonal, out, ahead);
    for (std::int64_t i = 0; i < height; ++i) {
      for (std::int64_t j = 0; job.diagonal && j <= i; ++j) out[i * line + j] = 0.0;
      for (std::int64_t j = width; j < line; ++j) out[i * line + j] = 0.0;
    }
  }
}

template <class T>
static void sample(const SampleJob& job) {
  constexpr std::int64_t line = kTile<T> * kLanes<T>;
  const std::int64_t used = line * job.rows * kLanes<T>;
  gram_tiles<T>(job);
  for (int l = 0; l < job.layers; l += 4)
    for (int m = l; m < job.layers; m += 4) {
      bool wanted = false;
      for (int i = l; i < l + 4 && i < job.layers; ++i)
        for (int j = m; j < m + 4 && j < job.layers; ++j)
          wanted = wanted || (i <= j && job.pairs[i * job.layers + j] >= 0);
      if (wanted) products(job, l, m, line * line, used);
    }
}

static void sample_any(const SampleJob& job, bool single) {
  single ? sample<float>(job) : sample<double>(job);
}

template <class T>
static void feature(FeatureJob& job) {
  constexpr std::int64_t line = kTile<T> * kLanes<T>;
  const std::int64_t panel = job.panel;
  const std::int64_t height = job.rows * kLanes<T>;
  job.sum = 0.0;
  for (std::int64_t p = job.first; p < job.panels; p += kTile<T>) {
    const int columns = static_cast<int>(job.panels - p < kTile<T> ? job.panels - p : kTile<T>);
    const bool diagonal = p == job.diagonal;
    const T* const right = static_cast<const T*>(job.right) + p * panel;
    Ahead ahead;
    if (p + columns < job.panels) {
      ahead.at = reinterpret_cast<const char*>(right + columns * panel);
      ahead.end = reinterpret_cast<const char*>(right + 2 * columns * panel);
    }
    tile(static_cast<const T*>(job.left), right, job.samples, kStretch<T>, panel, job.rows, columns, diagonal,
         job.tile, ahead);
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
static int tile_panels(bool single) { return single ? kTile<float> : kTile<double>; }

inline Kernels kernels() { return {&tile_panels, &lanes, &pack_any, &sample_any, &feature_any, &dot}; }

}  // namespace RGFAST_NS
}  // namespace rgfast::cka
