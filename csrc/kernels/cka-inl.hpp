// What is done with tiles of products. See cka.hpp for what is computed.
namespace rgfast::cka {
namespace RGFAST_NS {

// Products of Rows layers with Columns layers, `size` apart, over `count` entries of their tiles, added to
// `sums` unless these are the first. Among the same layers only those above the diagonal and on it.
template <int Rows, int Columns, bool Same>
static void products(const double* left, const double* right, std::int64_t size, std::int64_t count,
                     bool first, double* sums) {
  Doubles sum[Rows][Columns];
#pragma GCC unroll 4
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 4
    for (int j = Same ? i : 0; j < Columns; ++j)
      sum[i][j] = first ? Doubles{} : load(sums + (i * kBlock + j) * kLanes<double>);
  for (std::int64_t k = 0; k < count; k += kLanes<double>) {
    Doubles b[Columns];
#pragma GCC unroll 4
    for (int j = 0; j < Columns; ++j) b[j] = load(right + j * size + k);
#pragma GCC unroll 4
    for (int i = 0; i < Rows; ++i) {
      const Doubles a = Same ? b[i] : load(left + i * size + k);
#pragma GCC unroll 4
      for (int j = Same ? i : 0; j < Columns; ++j) sum[i][j] = fused(a, b[j], sum[i][j]);
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 4
    for (int j = Same ? i : 0; j < Columns; ++j) store(sums + (i * kBlock + j) * kLanes<double>, sum[i][j]);
}

// The products of a block over the entries [from, end). Only the last layers are fewer than kBlock, and what
// is left of them comes before them or is them.
static void block_products(const InnerJob& job, const LayerBlock& block, std::int64_t from, std::int64_t end,
                           double* sums) {
  using Products = void (*)(const double*, const double*, std::int64_t, std::int64_t, bool, double*);
  static_assert(kBlock == 4);
  constexpr Products same[] = {&products<1, 1, true>, &products<2, 2, true>, &products<3, 3, true>,
                               &products<4, 4, true>};
  constexpr Products other[] = {&products<4, 1, false>, &products<4, 2, false>, &products<4, 3, false>,
                                &products<4, 4, false>};
  const int columns = job.layers - block.right < kBlock ? job.layers - block.right : kBlock;
  const Products run = (block.left == block.right ? same : other)[columns - 1];
  run(job.tiles + block.left * job.size + from, job.tiles + block.right * job.size + from, job.size,
      end - from, from == 0, sums);
}

// Entries of all layers are taken a stretch at a time, which stays in the nearest cache with the sums.
static void inner(const InnerJob& job) {
  constexpr std::int64_t each = kBlock * kBlock * kLanes<double>, cache = 28 << 10;
  const std::int64_t room = (cache - job.count * each * 8) / (8 * job.layers) / 64 * 64;
  const std::int64_t stretch = room < 64 ? 64 : room;
  for (std::int64_t from = 0; from < job.used; from += stretch)
    for (std::int64_t b = 0; b < job.count; ++b)
      block_products(job, job.blocks[b], from, from + stretch < job.used ? from + stretch : job.used,
                     job.partial + b * each);
  for (std::int64_t b = 0; b < job.count; ++b)
    for (int i = 0; i < kBlock; ++i)
      for (int j = 0; j < kBlock; ++j) {
        const int l = job.blocks[b].left + i, m = job.blocks[b].right + j;
        const int at = l <= m && m < job.layers ? job.pairs[l * job.layers + m] : -1;
        if (at >= 0)
          job.sums[at] = 2.0 * total(load(job.partial + b * each + (i * kBlock + j) * kLanes<double>));
      }
}

template <class T>
static void grams(const GramJob& job) {
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
    tile<kDepth>(static_cast<const T*>(job.left[l]), static_cast<const T*>(job.right[l]), job.widths[l],
                 job.panels[l], job.rows, job.columns, job.diagonal, out, ahead);
    for (std::int64_t i = 0; i < height; ++i) {
      for (std::int64_t j = 0; job.diagonal && j <= i; ++j) out[i * line + j] = 0.0;
      for (std::int64_t j = width; j < line; ++j) out[i * line + j] = 0.0;
    }
  }
}

static void grams_any(const GramJob& job, bool single) { single ? grams<float>(job) : grams<double>(job); }

// Σ (left - right)² over a tile, or of `left` alone. Of a layer's own tile on the diagonal, entries on the
// diagonal and twice those above it.
template <class T>
static double squares(const double* left, const double* right, std::int64_t height, std::int64_t width,
                      bool diagonal) {
  constexpr std::int64_t line = kTile<T> * kLanes<T>;
  Doubles sum[2] = {};
  double above = 0.0, own = 0.0;
  for (std::int64_t i = 0; i < height; ++i) {
    std::int64_t j = 0;
    if (diagonal) {
      const double at = left[i * line + i] - (right != nullptr ? right[i * line + i] : 0.0);
      own += at * at;
      for (j = i + 1; j % kLanes<double> != 0; ++j) {
        const double off = left[i * line + j] - (right != nullptr ? right[i * line + j] : 0.0);
        above += off * off;
      }
    }
    for (; j < width; j += kLanes<double>) {
      Doubles value = load(left + i * line + j);
      if (right != nullptr) value = value - load(right + i * line + j);
      Doubles& to = sum[j / kLanes<double> % 2];
      to = fused(value, value, to);
    }
  }
  const double all = total(sum[0] + sum[1]) + above;
  return diagonal ? 2.0 * all + own : all;
}

template <class T>
static void feature(FeatureJob& job) {
  constexpr std::int64_t line = kTile<T> * kLanes<T>, size = line * line;
  const std::int64_t panel = job.panel, step = job.samples * kLanes<T>;
  const std::int64_t height = job.rows * kLanes<T>;
  double* const all = job.tiles + (job.groups > 1 ? job.groups * size : 0);
  for (std::int64_t v = 0; v < job.variants(); ++v) job.sums[v] = 0.0;
  for (std::int64_t p = job.first; p < job.panels; p += kTile<T>) {
    const int columns = static_cast<int>(job.panels - p < kTile<T> ? job.panels - p : kTile<T>);
    const bool diagonal = p == job.diagonal;
    const T* const left = static_cast<const T*>(job.left);
    const T* const right = static_cast<const T*>(job.right) + p * panel;
    for (std::int64_t g = 0; g < job.groups; ++g) {
      Ahead ahead;
      if (p + columns < job.panels && job.groups == 1) {
        ahead.at = reinterpret_cast<const char*>(right + columns * panel);
        ahead.end = reinterpret_cast<const char*>(right + 2 * columns * panel);
      }
      tile<kStretch<T>>(left + g * step, right + g * step, job.samples, panel, job.rows, columns, diagonal,
                        job.tiles + g * size, ahead);
    }
    if (job.groups > 1)
      for (std::int64_t i = 0; i < height * line; i += kLanes<double>) {
        Doubles sum = load(job.tiles + i);
        for (std::int64_t g = 1; g < job.groups; ++g) sum = sum + load(job.tiles + g * size + i);
        store(all + i, sum);
      }
    const double times = job.diagonal >= 0 && !diagonal ? 2.0 : 1.0;
    for (std::int64_t v = 0; v < job.variants(); ++v) {
      const double* const left_out = v == 0 ? nullptr : job.tiles + (v - 1) * size;
      job.sums[v] += times * squares<T>(all, left_out, height, columns * kLanes<T>, diagonal);
    }
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

inline Kernels kernels() { return {&tile_panels, &lanes, &pack_any, &grams_any, &inner, &feature_any, &dot}; }

}  // namespace RGFAST_NS
}  // namespace rgfast::cka
