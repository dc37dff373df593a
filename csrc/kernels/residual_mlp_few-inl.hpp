// The forward pass of a few rows: weights are read once, as they lie, and every sum runs along a row of them.
// Packing a weight would cost more than these products.

namespace rgfast::RGFAST_NS {

inline constexpr int kFewRows = 4;
inline constexpr int kFewUnits = kTileRows > 6 ? 4 : 2;

// sums[row * sum_stride + unit] = the dot product of a row of a and a row of w, Rows by Units of them.
template <int Rows, int Units>
static void dots(const float* a, std::int64_t a_stride, const float* w, std::int64_t depth, float* sums,
                 std::int64_t sum_stride) {
  Vec sum[Rows][Units];
#pragma GCC unroll 4
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < Units; ++j) sum[i][j] = splat(0.0f);
  const std::int64_t whole = depth / kLanes * kLanes;
#pragma GCC unroll 1
  for (std::int64_t k = 0; k < whole; k += kLanes) {
    Vec left[Rows];
#pragma GCC unroll 4
    for (int i = 0; i < Rows; ++i) left[i] = load(a + i * a_stride + k);
#pragma GCC unroll 4
    for (int j = 0; j < Units; ++j) {
      const Vec right = load(w + j * depth + k);
#pragma GCC unroll 4
      for (int i = 0; i < Rows; ++i) sum[i][j] = fma(left[i], right, sum[i][j]);
    }
  }
  const int rest = static_cast<int>(depth - whole);
#pragma GCC unroll 4
  for (int j = 0; j < Units; ++j) {
    const Vec right = rest > 0 ? load_first(w + j * depth + whole, rest) : splat(0.0f);
#pragma GCC unroll 4
    for (int i = 0; i < Rows; ++i) {
      if (rest > 0) sum[i][j] = fma(load_first(a + i * a_stride + whole, rest), right, sum[i][j]);
      sums[i * sum_stride + j] = lane_sum(sum[i][j]);
    }
  }
}

template <int Units>
static void dots_of(std::int64_t rows, const float* a, std::int64_t a_stride, const float* w,
                    std::int64_t depth, float* sums, std::int64_t sum_stride) {
  for (std::int64_t r = 0; r < rows; r += kFewRows) {
    const float* from = a + r * a_stride;
    float* to = sums + r * sum_stride;
    switch (std::min<std::int64_t>(kFewRows, rows - r)) {
      case 1:
        dots<1, Units>(from, a_stride, w, depth, to, sum_stride);
        break;
      case 2:
        dots<2, Units>(from, a_stride, w, depth, to, sum_stride);
        break;
      case 3:
        dots<3, Units>(from, a_stride, w, depth, to, sum_stride);
        break;
      default:
        dots<4, Units>(from, a_stride, w, depth, to, sum_stride);
    }
  }
}

// Columns [begin, end) of a w^T, w having `depth` columns; sums is the address of column `begin`.
static void few_products(std::int64_t rows, const float* a, std::int64_t a_stride, const float* w,
                         std::int64_t depth, std::int64_t begin, std::int64_t end, float* sums,
                         std::int64_t sum_stride) {
  std::int64_t j = begin;
  for (; j + kFewUnits <= end; j += kFewUnits)
    dots_of<kFewUnits>(rows, a, a_stride, w + j * depth, depth, sums + (j - begin), sum_stride);
  for (; j < end; ++j) dots_of<1>(rows, a, a_stride, w + j * depth, depth, sums + (j - begin), sum_stride);
}

// Floats between rows of a workspace holding `width` columns: whole vectors, one more so that rows of a power
// of two do not share cache sets.
static std::int64_t few_stride(std::int64_t width) { return (width + kLanes - 1) / kLanes * kLanes + kLanes; }

static std::int64_t few_floats(const residual_mlp::Block& block) {
  return block.rows * (few_stride(block.width) + few_stride(block.hidden)) + few_stride(block.hidden);
}

static void few_normalise(const residual_mlp::Block& block, float* workspace) {
  const std::int64_t stride = few_stride(block.width);
  for (std::int64_t r = 0; r < block.rows; ++r)
    normalise_one(block, block.x + r * block.x_stride, InARow{workspace + r * stride}, nullptr, nullptr);
}

template <class Activation>
static void few_hidden_of(const residual_mlp::Block& block, std::int64_t begin, std::int64_t end,
                          const float* normed, float* h) {
  const std::int64_t stride = few_stride(block.hidden);
  few_products(block.rows, normed, few_stride(block.width), block.w1, block.width, begin, end, h + begin,
               stride);
  for (std::int64_t r = 0; r < block.rows; ++r)
    for (std::int64_t j = begin; j < end; j += kLanes) {
      const int live = static_cast<int>(std::min<std::int64_t>(kLanes, end - j));
      float* at = h + r * stride + j;
      Vec u = load_first(at, live);
      if (block.b1 != nullptr) u = u + load_first(block.b1 + j, live);
      store_first(at, Activation::value(u), live);
    }
}

static void few_hidden(const residual_mlp::Block& block, std::int64_t begin, std::int64_t end,
                       float* workspace) {
  float* h = workspace + block.rows * few_stride(block.width);
  switch (block.activation) {
    case residual_mlp::Activation::gelu:
      return few_hidden_of<Gelu>(block, begin, end, workspace, h);
    case residual_mlp::Activation::gelu_tanh:
      return few_hidden_of<GeluTanh>(block, begin, end, workspace, h);
    case residual_mlp::Activation::relu:
      return few_hidden_of<Relu>(block, begin, end, workspace, h);
    case residual_mlp::Activation::silu:
      return few_hidden_of<Silu>(block, begin, end, workspace, h);
    case residual_mlp::Activation::tanh:
      return few_hidden_of<Tanh>(block, begin, end, workspace, h);
  }
}

static void few_outputs(const residual_mlp::Block& block, std::int64_t begin, std::int64_t end,
                        const float* workspace, float* y) {
  const float* h = workspace + block.rows * few_stride(block.width);
  few_products(block.rows, h, few_stride(block.hidden), block.w2, block.hidden, begin, end, y + begin,
               block.width);
  const Vec scale = splat(block.scale);
  for (std::int64_t r = 0; r < block.rows; ++r)
    for (std::int64_t k = begin; k < end; k += kLanes) {
      const int live = static_cast<int>(std::min<std::int64_t>(kLanes, end - k));
      float* at = y + r * block.width + k;
      Vec update = load_first(at, live);
      if (block.b2 != nullptr) update = update + load_first(block.b2 + k, live);
      store_first(at, fma(scale, update, load_first(block.x + r * block.x_stride + k, live)), live);
    }
}

}  // namespace rgfast::RGFAST_NS
