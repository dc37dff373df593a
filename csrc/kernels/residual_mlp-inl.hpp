// The forward pass of one tile of rows: normalise once, then for each block of hidden units form it,
// activate it and multiply it on while it is in cache.

namespace rgfast::RGFAST_NS {

// The first two moments by two passes, the mean refined by what the centred values still sum to, so that a
// large common offset costs no digits.
static void row_moments(const float* x, std::int64_t width, residual_mlp::Norm norm, float eps, float& shift,
                        float& factor) {
  const std::int64_t whole = width / kLanes * kLanes;
  const int rest = static_cast<int>(width - whole);
  const float count = static_cast<float>(width);
  Vec sum = splat(0.0f);
  shift = 0.0f;
  if (norm == residual_mlp::Norm::layer) {
    for (std::int64_t k = 0; k < whole; k += kLanes) sum = sum + load(x + k);
    if (rest > 0) sum = sum + load_first(x + whole, rest);
    shift = lane_sum(sum) / count;
  }
  const Vec center = splat(shift);
  Vec squares = splat(0.0f);
  sum = splat(0.0f);
  for (std::int64_t k = 0; k < whole; k += kLanes) {
    const Vec centred = load(x + k) - center;
    sum = sum + centred;
    squares = fma(centred, centred, squares);
  }
  if (rest > 0) {
    const Vec centred = keep_first(load_first(x + whole, rest) - center, rest);
    sum = sum + centred;
    squares = fma(centred, centred, squares);
  }
  float second = lane_sum(squares) / count;
  if (norm == residual_mlp::Norm::layer) {
    const float correction = lane_sum(sum) / count;
    shift += correction;
    second = std::max(second - correction * correction, 0.0f);
  }
  factor = 1.0f / std::sqrt(second + eps);
}

// One row of norm(x), column k going to place(k); whole vectors are written.
template <class Place>
static inline void normalise_row(const residual_mlp::Block& block, const float* x, float shift, float factor,
                                 const Place& place) {
  const std::int64_t width = residual_mlp::normed_width(block);
  const Vec center = splat(shift);
  const Vec gain = splat(factor);
  for (std::int64_t k = 0; k < width; k += kLanes) {
    const int live = static_cast<int>(std::min<std::int64_t>(kLanes, width - k));
    Vec v = (load_first(x + k, live) - center) * gain;
    if (block.norm_weight != nullptr) v = v * load_first(block.norm_weight + k, live);
    if (block.norm_bias != nullptr) v = v + load_first(block.norm_bias + k, live);
    store(place(k), v);
  }
}

struct InColumnBlocks {
  float* row;
  std::int64_t block_floats;
  float* operator()(std::int64_t k) const { return row + k / kBlock * block_floats + k % kBlock; }
};

struct InARow {
  float* row;
  float* operator()(std::int64_t k) const { return row + k; }
};

// One row of x normalised into place; what was subtracted from it and the factor then applied into *shift and
// *factor unless null.
template <class Place>
static inline void normalise_one(const residual_mlp::Block& block, const float* x, const Place& place,
                                 float* shift_out, float* factor_out) {
  float shift = 0.0f;
  float factor = 1.0f;
  if (block.norm != residual_mlp::Norm::none)
    row_moments(x, residual_mlp::normed_width(block), block.norm, block.eps, shift, factor);
  if (shift_out != nullptr) {
    *shift_out = shift;
    *factor_out = factor;
  }
  normalise_row(block, x, shift, factor, place);
}

// A mixing block multiplies across positions: its rows are features, and what it reads is
// x[position][feature] flipped, by way of a stage of one sequence, [position][stage_stride].
static std::int64_t stage_stride(const residual_mlp::Block& block) {
  return (block.mixed + kLanes - 1) / kLanes * kLanes;
}

static std::int64_t stage_floats(const residual_mlp::Block& block) {
  return block.mixed > 0 ? block.width * stage_stride(block) : 0;
}

struct InFlippedBlocks {
  float* first;
  std::int64_t block_floats;
  float* operator()(std::int64_t row, std::int64_t k) const {
    return first + k / kBlock * block_floats + row * kStride + k % kBlock;
  }
};

// place(column, row) becomes source[row * stride + column]; whole vectors along rows are written.
template <class Place>
static void flip(const float* source, std::int64_t stride, std::int64_t rows, std::int64_t columns,
                 const Place& place) {
  for (std::int64_t r = 0; r < rows; r += kLanes) {
    const std::int64_t live_rows = std::min<std::int64_t>(kLanes, rows - r);
    for (std::int64_t c = 0; c < columns; c += kLanes) {
      const int live = static_cast<int>(std::min<std::int64_t>(kLanes, columns - c));
      const float* from = source + r * stride + c;
      Vec square[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i)
        square[i] = i < live_rows ? load_first(from + i * stride, live) : splat(0.0f);
      transpose(square);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i)
        if (i < live) store(place(c + i, r), square[i]);
    }
  }
}

struct InStage {
  float* stage;
  std::int64_t stride;
  float* operator()(std::int64_t position, std::int64_t feature) const {
    return stage + position * stride + feature;
  }
};

// The rows of one sequence, out of column blocks, onto the stage.
static void flip_back(const residual_mlp::Block& block, const float* rows, std::int64_t block_floats,
                      float* stage) {
  const std::int64_t stride = stage_stride(block);
  for (std::int64_t t = 0; t < block.width; t += kBlock)
    flip(rows + t / kBlock * block_floats, kStride, block.mixed,
         std::min<std::int64_t>(kBlock, block.width - t), InStage{stage + t * stride, stride});
}

// Rows [row0, row0 + rows) of what the MLP reads, into column blocks of `capacity` rows; `shifts` and
// `factors`, by row of x, unless null. `stage` is for mixing blocks alone.
static void normalise(const residual_mlp::Block& block, std::int64_t row0, std::int64_t rows,
                      std::int64_t capacity, float* out, float* shifts, float* factors, float* stage) {
  if (block.mixed == 0) {
    for (std::int64_t r = 0; r < rows; ++r)
      normalise_one(block, block.x + (row0 + r) * block.x_stride,
                    InColumnBlocks{out + r * kStride, capacity * kStride},
                    shifts != nullptr ? shifts + r : nullptr, factors + (factors != nullptr ? r : 0));
    return;
  }
  const std::int64_t stride = stage_stride(block);
  for (std::int64_t r = 0; r < rows; r += block.mixed) {
    const float* x = block.x + (row0 + r) * block.width;
    const std::int64_t first = r / block.mixed * block.width;
    for (std::int64_t t = 0; t < block.width; ++t)
      normalise_one(block, x + t * block.mixed, InARow{stage + t * stride},
                    shifts != nullptr ? shifts + first + t : nullptr,
                    factors + (factors != nullptr ? first + t : 0));
    flip(stage, stride, block.width, block.mixed, InFlippedBlocks{out + r * kStride, capacity * kStride});
  }
}

// Sums of `rows` rows and the columns of one panel to where the backward pass finds them.
static void keep_sums(const residual_mlp::Block& block, const float* h, std::int64_t row, std::int64_t rows,
                      std::int64_t column, const Columns& columns) {
  for (std::int64_t r = 0; r < rows; ++r)
    for (int v = 0; v < columns.vecs; ++v) {
      const int live = v + 1 < columns.vecs ? kLanes : columns.live;
      store_first(block.sums + (row + r) * block.hidden + column + v * kLanes,
                  load(h + r * kStride + v * kLanes), live);
    }
}

template <class Activation>
static void activate_block(float* h, std::int64_t rows, int vecs, const float* bias) {
  for (std::int64_t r = 0; r < rows; ++r)
    for (int v = 0; v < vecs; ++v) {
      float* at = h + r * kStride + v * kLanes;
      store(at, Activation::value(load(at) + load(bias + v * kLanes)));
    }
}

// y = x + scale (z + bias), z being the columns [column, ...) of a tile's finished sums.
static void finish_block(const residual_mlp::Block& block, const float* z, std::int64_t row,
                         std::int64_t rows, std::int64_t column, const float* bias, float* y) {
  const Columns columns(block.width, column);
  const Vec scale = splat(block.scale);
  for (std::int64_t r = 0; r < rows; ++r)
    for (int v = 0; v < columns.vecs; ++v) {
      const int live = v + 1 < columns.vecs ? kLanes : columns.live;
      const std::int64_t k = column + v * kLanes;
      const Vec update = load(z + r * kStride + v * kLanes) + load(bias + k);
      const Vec x = load_first(block.x + (row + r) * block.x_stride + k, live);
      store_first(y + (row + r) * block.width + k, fma(scale, update, x), live);
    }
}

// The same for a mixing block, whose sums are those of `rows` features: they are flipped back first.
static void finish_mixed(const residual_mlp::Block& block, const float* sums, std::int64_t row0,
                         std::int64_t rows, std::int64_t block_floats, const float* bias, float* stage,
                         float* y) {
  const std::int64_t stride = stage_stride(block);
  const Vec scale = splat(block.scale);
  for (std::int64_t r = 0; r < rows; r += block.mixed) {
    flip_back(block, sums + r * kStride, block_floats, stage);
    for (std::int64_t t = 0; t < block.width; ++t) {
      const std::int64_t at = (row0 + r) * block.width + t * block.mixed;
      const Vec shift = splat(bias[t]);
      for (std::int64_t k = 0; k < block.mixed; k += kLanes) {
        const int live = static_cast<int>(std::min<std::int64_t>(kLanes, block.mixed - k));
        const Vec update = load(stage + t * stride + k) + shift;
        store_first(y + at + k, fma(scale, update, load_first(block.x + at + k, live)), live);
      }
    }
  }
}

static std::int64_t panels(std::int64_t columns) { return (columns + kPanel - 1) / kPanel; }

// Panels of a weight as products read them: all packed beforehand where that is worth the memory, else each
// panel when its turn comes, into a scratch panel that is still in cache when it is used.
struct Weight {
  const float* source;
  std::int64_t depth, columns, k_step, j_step;
  float* packed;   // [panels][depth][kPanel] or null
  float* scratch;  // [kBlock][kPanel]

  const float* panel(std::int64_t column, std::int64_t k, std::int64_t count) const {
    if (packed != nullptr) return packed + column * depth + k * kPanel;
    pack_panel(source + k * k_step + column * j_step, count, std::min<std::int64_t>(kPanel, columns - column),
               k_step, j_step, scratch);
    return scratch;
  }
  void pack(std::int64_t index) const {
    const std::int64_t column = index * kPanel;
    pack_panel(source + column * j_step, depth, std::min<std::int64_t>(kPanel, columns - column), k_step,
               j_step, packed + column * depth);
  }
};

// The shared part of the workspace: biases padded to whole panels, and the packed weights unless each thread
// packs for itself.
struct Shared {
  float* b1;
  float* b2;
  Weight w1;
  Weight w2;

  Shared(const residual_mlp::Block& block, bool whole, float* memory) {
    b1 = memory;
    b2 = b1 + panels(block.hidden) * kPanel;
    float* weights = b2 + panels(block.width) * kPanel;
    w1 = Weight{block.w1, block.width, block.hidden, 1, block.width, whole ? weights : nullptr, nullptr};
    w2 = Weight{block.w2,     block.hidden,
                block.width,  1,
                block.hidden, whole ? weights + panels(block.hidden) * kPanel * block.width : nullptr,
                nullptr};
  }
};

static std::int64_t shared_floats(const residual_mlp::Block& block, bool whole) {
  const std::int64_t first = panels(block.hidden) * kPanel;
  const std::int64_t second = panels(block.width) * kPanel;
  return first + second + (whole ? first * block.width + second * block.hidden : 0);
}

static void pad_bias(const float* bias, std::int64_t count, float* out) {
  const std::int64_t padded = panels(count) * kPanel;
  for (std::int64_t j = 0; j < padded; ++j) out[j] = bias != nullptr && j < count ? bias[j] : 0.0f;
}

// Task 0 is the biases, then one for every panel if they are packed beforehand.
static std::int64_t shared_tasks(const residual_mlp::Block& block, bool whole) {
  return 1 + (whole ? panels(block.hidden) + panels(block.width) : 0);
}

static void shared_task(const residual_mlp::Block& block, bool whole, std::int64_t task, float* memory) {
  const Shared shared(block, whole, memory);
  const std::int64_t first = panels(block.hidden);
  if (task == 0) {
    pad_bias(block.b1, block.hidden, shared.b1);
    pad_bias(block.b2, block.width, shared.b2);
  } else if (task <= first) {
    shared.w1.pack(task - 1);
  } else {
    shared.w2.pack(task - 1 - first);
  }
}

static std::int64_t column_blocks(std::int64_t width) { return (width + kBlock - 1) / kBlock; }

static std::int64_t forward_floats(const residual_mlp::Block& block, std::int64_t capacity) {
  return (2 * column_blocks(block.width) + 1) * capacity * kStride + kBlock * kPanel + stage_floats(block);
}

template <class Activation>
static void forward_rows(const residual_mlp::Block& block, Shared shared, std::int64_t row0,
                         std::int64_t rows, std::int64_t capacity, float* workspace, float* y) {
  const std::int64_t block_floats = capacity * kStride;
  float* normed = workspace;
  float* sums = normed + column_blocks(block.width) * block_floats;
  float* h = sums + column_blocks(block.width) * block_floats;
  shared.w1.scratch = shared.w2.scratch = h + block_floats;
  float* stage = h + block_floats + kBlock * kPanel;
  normalise(block, row0, rows, capacity, normed, nullptr, nullptr, stage);
  const Groups groups(rows);
  for (std::int64_t h0 = 0; h0 < block.hidden; h0 += kBlock) {
    const std::int64_t units = std::min<std::int64_t>(kBlock, block.hidden - h0);
    for (std::int64_t k = 0; k < block.width; k += kBlock) {
      const std::int64_t depth = std::min<std::int64_t>(kBlock, block.width - k);
      const bool last = k + kBlock >= block.width;
      for (std::int64_t j = 0; j < units; j += kPanel) {
        const Columns columns(units, j);
        const float* panel = shared.w1.panel(h0 + j, k, depth);
        std::int64_t r = 0;
        for (std::int64_t g = 0; g < groups.count; ++g) {
          const std::int64_t size = groups.size(g);
          float* out = h + r * kStride + j;
          multiply_group(size, columns, normed + k / kBlock * block_floats + r * kStride, panel, depth, out,
                         k > 0);
          if (last && block.sums != nullptr) keep_sums(block, out, row0 + r, size, h0 + j, columns);
          if (last) activate_block<Activation>(out, size, columns.vecs, shared.b1 + h0 + j);
          r += size;
        }
      }
    }
    const bool last = h0 + kBlock >= block.hidden;
    for (std::int64_t j = 0; j < block.width; j += kPanel) {
      const Columns columns(block.width, j);
      const float* panel = shared.w2.panel(j, h0, units);
      std::int64_t r = 0;
      for (std::int64_t g = 0; g < groups.count; ++g) {
        const std::int64_t size = groups.size(g);
        float* out = sums + j / kBlock * block_floats + r * kStride + j % kBlock;
        multiply_group(size, columns, h + r * kStride, panel, units, out, h0 > 0);
        if (last && block.mixed == 0) finish_block(block, out, row0 + r, size, j, shared.b2, y);
        r += size;
      }
    }
  }
  if (block.mixed > 0) finish_mixed(block, sums, row0, rows, block_floats, shared.b2, stage, y);
}

static void forward_tile(const residual_mlp::Block& block, bool whole, float* memory, std::int64_t row0,
                         std::int64_t rows, std::int64_t capacity, float* workspace, float* y) {
  const Shared shared(block, whole, memory);
  switch (block.activation) {
    case residual_mlp::Activation::gelu:
      return forward_rows<Gelu>(block, shared, row0, rows, capacity, workspace, y);
    case residual_mlp::Activation::gelu_tanh:
      return forward_rows<GeluTanh>(block, shared, row0, rows, capacity, workspace, y);
    case residual_mlp::Activation::relu:
      return forward_rows<Relu>(block, shared, row0, rows, capacity, workspace, y);
    case residual_mlp::Activation::silu:
      return forward_rows<Silu>(block, shared, row0, rows, capacity, workspace, y);
    case residual_mlp::Activation::tanh:
      return forward_rows<Tanh>(block, shared, row0, rows, capacity, workspace, y);
  }
}

static void activation_values(residual_mlp::Activation activation, const float* input, float* values,
                              float* slopes, std::int64_t count) {
  switch (activation) {
    case residual_mlp::Activation::gelu:
      return activate<Gelu>(input, values, slopes, count);
    case residual_mlp::Activation::gelu_tanh:
      return activate<GeluTanh>(input, values, slopes, count);
    case residual_mlp::Activation::relu:
      return activate<Relu>(input, values, slopes, count);
    case residual_mlp::Activation::silu:
      return activate<Silu>(input, values, slopes, count);
    case residual_mlp::Activation::tanh:
      return activate<Tanh>(input, values, slopes, count);
  }
}

}  // namespace rgfast::RGFAST_NS
