// The register tile behind every matrix product of the block, and the packing of its right operand.
//
// Activations lie in column blocks: element (row, k) of a tile of `rows` rows is at
// [k / kBlock][row][k % kBlock] with rows kStride apart, so that the register tile's addresses are constants
// and rows of a power of two do not share cache sets. Weights come in panels of kPanel columns, [k][kPanel].
// Every output element is a sum over blocks of kBlock terms in a fixed order, whatever the tile around it.

namespace rgfast::RGFAST_NS {

inline constexpr int kBlock = 256;
inline constexpr int kStride = kBlock + 16;
inline constexpr int kPanelVecs = 2;
inline constexpr int kPanel = kPanelVecs * kLanes;
#if RGFAST_TARGET == RGFAST_TARGET_AVX512 || RGFAST_TARGET == RGFAST_TARGET_NEON
inline constexpr int kTileRows = RGFAST_TARGET == RGFAST_TARGET_AVX512 ? 14 : 12;
#else
inline constexpr int kTileRows = 6;  // 16 registers: 12 sums, 2 of the panel, one of the tile
#endif

// c[Rows][Vecs * kLanes] (+)= a b over `depth` terms. a is read at [row * RowStep + k * TermStep] and b at
// [k * PanelStep]; `live` lanes of the last vector exist in c, whose rows are OutStep apart, or c_step where
// that is 0.
template <int Rows, int Vecs, int RowStep, int TermStep, int PanelStep, int OutStep>
static void product(const float* a, const float* b, std::int64_t depth, float* c, std::int64_t c_step,
                    bool accumulate, int live) {
  const std::int64_t c_stride = OutStep > 0 ? OutStep : c_step;
  Vec sum[Rows][Vecs];
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < Vecs; ++v) sum[i][v] = splat(0.0f);
  if (accumulate) {
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 4
      for (int v = 0; v < Vecs; ++v) __builtin_prefetch(c + i * c_stride + v * kLanes, 1);
  }
#pragma GCC unroll 1
  for (std::int64_t k = 0; k < depth; ++k) {
    Vec right[Vecs];
#pragma GCC unroll 4
    for (int v = 0; v < Vecs; ++v) right[v] = load(b + v * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i) {
      const Vec left = splat(a[i * RowStep]);
#pragma GCC unroll 4
      for (int v = 0; v < Vecs; ++v) sum[i][v] = fma(left, right[v], sum[i][v]);
    }
    a += TermStep;
    b += PanelStep;
  }
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < Vecs; ++v) {
      float* out = c + i * c_stride + v * kLanes;
      if (v + 1 < Vecs || live == kLanes) {
        store(out, accumulate ? load(out) + sum[i][v] : sum[i][v]);
      } else {
        store_first(out, accumulate ? load_first(out, live) + sum[i][v] : sum[i][v], live);
      }
    }
}

using Product = void (*)(const float*, const float*, std::int64_t, float*, std::int64_t, bool, int);

template <int RowStep, int TermStep, int PanelStep, int OutStep>
static Product product_of(int vecs, std::int64_t rows) {
  switch (rows) {
#define RGFAST_ROWS(n)                                                                        \
  case n:                                                                                     \
    return vecs == 1                                                                          \
               ? &product<(n <= kTileRows ? n : 1), 1, RowStep, TermStep, PanelStep, OutStep> \
               : &product<(n <= kTileRows ? n : 1), kPanelVecs, RowStep, TermStep, PanelStep, OutStep>;
    RGFAST_ROWS(1)
    RGFAST_ROWS(2)
    RGFAST_ROWS(3)
    RGFAST_ROWS(4)
    RGFAST_ROWS(5)
    RGFAST_ROWS(6)
    RGFAST_ROWS(7)
    RGFAST_ROWS(8)
    RGFAST_ROWS(9)
    RGFAST_ROWS(10)
    RGFAST_ROWS(11)
    RGFAST_ROWS(12)
    RGFAST_ROWS(13)
    RGFAST_ROWS(14)
#undef RGFAST_ROWS
  }
  return nullptr;
}

// `count` rows in groups of at most kTileRows, as even as can be.
struct Groups {
  std::int64_t count;
  std::int64_t base;
  std::int64_t longer;

  explicit Groups(std::int64_t rows)
      : count((rows + kTileRows - 1) / kTileRows),
        base(count == 0 ? 0 : rows / count),
        longer(count == 0 ? 0 : rows % count) {}
  std::int64_t size(std::int64_t group) const { return base + (group < longer ? 1 : 0); }
};

// How many vectors of a panel hold columns, and how many lanes of the last of them.
struct Columns {
  int vecs;
  int live;

  Columns(std::int64_t width, std::int64_t first_column) {
    const std::int64_t left = std::min<std::int64_t>(kPanel, width - first_column);
    vecs = static_cast<int>((left + kLanes - 1) / kLanes);
    live = static_cast<int>(left - (vecs - 1) * kLanes);
  }
};

// A group of rows by one panel, out of column blocks into column blocks.
static void multiply_group(std::int64_t rows, const Columns& columns, const float* a, const float* panel,
                           std::int64_t depth, float* c, bool accumulate) {
  product_of<kStride, 1, kPanel, kStride>(columns.vecs, rows)(a, panel, depth, c, kStride, accumulate,
                                                              kLanes);
}

// All rows of a tile by one panel.
static void multiply_rows(const Groups& groups, const Columns& columns, const float* a, const float* panel,
                          std::int64_t depth, float* c, bool accumulate) {
  std::int64_t r = 0;
  for (std::int64_t g = 0; g < groups.count; ++g) {
    const std::int64_t size = groups.size(g);
    multiply_group(size, columns, a + r * kStride, panel, depth, c + r * kStride, accumulate);
    r += size;
  }
}

// A panel of `width` columns, [depth][kPanel], of the matrix whose element (k, j) is at
// source[k * k_step + j * j_step]; one of the steps is 1. Columns that do not exist are zero.
static void pack_panel(const float* source, std::int64_t depth, std::int64_t width, std::int64_t k_step,
                       std::int64_t j_step, float* out) {
  if (width < kPanel) std::memset(out, 0, static_cast<std::size_t>(depth * kPanel) * sizeof(float));
  if (j_step == 1) {
    for (std::int64_t k = 0; k < depth; ++k)
      std::memcpy(out + k * kPanel, source + k * k_step, static_cast<std::size_t>(width) * sizeof(float));
    return;
  }
  for (std::int64_t j = 0; j < width; j += kLanes) {
    const std::int64_t lanes = std::min<std::int64_t>(kLanes, width - j);
    std::int64_t k = 0;
    if (lanes == kLanes)
      for (; k + kLanes <= depth; k += kLanes) {
        Vec square[kLanes];
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) square[i] = load(source + (j + i) * j_step + k);
        transpose(square);
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) store(out + (k + i) * kPanel + j, square[i]);
      }
    for (std::int64_t i = 0; i < lanes; ++i)
      for (std::int64_t rest = k; rest < depth; ++rest)
        out[rest * kPanel + j + i] = source[(j + i) * j_step + rest];
  }
}

}  // namespace rgfast::RGFAST_NS
