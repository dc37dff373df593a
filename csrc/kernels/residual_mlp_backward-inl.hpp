// The gradients of one chunk of rows, tile by tile, the hidden units formed again block by block. Weight
// gradients of a chunk add up over its tiles in order; chunks are added up in order afterwards.

namespace rgfast::RGFAST_NS {

// One chunk's parameter gradients. Those of vectors are sums over every row and may cancel, so that they are
// kept in fp64; they are padded to whole panels.
struct Partial {
  double* b1;           // [hidden]
  double* b2;           // [width]
  double* norm_weight;  // [normed_width]
  double* norm_bias;    // [normed_width]
  float* w1;            // [hidden][width]
  float* w2;            // [width][hidden]

  // The weights' gradients lie where they are wanted instead if there is only this chunk.
  Partial(const residual_mlp::Block& block, float* memory, float* w1_out, float* w2_out) {
    const std::int64_t normed = panels(residual_mlp::normed_width(block)) * kPanel;
    b1 = reinterpret_cast<double*>(memory);
    b2 = b1 + panels(block.hidden) * kPanel;
    norm_weight = b2 + panels(block.width) * kPanel;
    norm_bias = norm_weight + normed;
    float* weights = reinterpret_cast<float*>(norm_bias + normed);
    w1 = w1_out != nullptr ? w1_out : weights;
    w2 = w2_out != nullptr ? w2_out : weights + block.hidden * block.width;
  }
};

static std::int64_t partial_vectors(const residual_mlp::Block& block) {
  return (panels(block.hidden) + panels(block.width) + 2 * panels(residual_mlp::normed_width(block))) *
         kPanel;
}

static std::int64_t partial_floats(const residual_mlp::Block& block) {
  return 2 * partial_vectors(block) + 2 * block.hidden * block.width;
}

// The weights as the three products of a tile read them: u = a w1^T, dh = dz w2, da = du w1.
struct Weights {
  Weight up;
  Weight down;
  Weight back;

  // Packed beforehand into `memory` unless that is null.
  Weights(const residual_mlp::Block& block, float* memory, float* scratch)
      : up{block.w1, block.width, block.hidden, 1, block.width, memory, scratch},
        down{block.w2, block.width, block.hidden, block.hidden, 1, memory, scratch},
        back{block.w1, block.hidden, block.width, block.width, 1, memory, scratch} {
    if (memory == nullptr) return;
    down.packed = up.packed + panels(block.hidden) * kPanel * block.width;
    back.packed = down.packed + panels(block.hidden) * kPanel * block.width;
  }
};

static std::int64_t weights_floats(const residual_mlp::Block& block) {
  return (2 * panels(block.hidden) * block.width + panels(block.width) * block.hidden) * kPanel;
}

static std::int64_t weights_tasks(const residual_mlp::Block& block) {
  return 2 * panels(block.hidden) + panels(block.width);
}

static void weights_task(const residual_mlp::Block& block, std::int64_t task, float* memory) {
  const Weights weights(block, memory, nullptr);
  const std::int64_t hidden = panels(block.hidden);
  if (task < hidden) {
    weights.up.pack(task);
  } else if (task < 2 * hidden) {
    weights.down.pack(task - hidden);
  } else {
    weights.back.pack(task - 2 * hidden);
  }
}

// How many rows of x the norm sees where the MLP sees `rows`.
static std::int64_t normed_rows(const residual_mlp::Block& block, std::int64_t rows) {
  return block.mixed > 0 ? rows / block.mixed * block.width : rows;
}

static std::int64_t backward_floats(const residual_mlp::Block& block, std::int64_t capacity) {
  return (3 * column_blocks(block.width) + 2) * capacity * kStride + kBlock * kPanel +
         2 * normed_rows(block, capacity) + 2 * panels(residual_mlp::normed_width(block)) * kPanel +
         stage_floats(block);
}

// Column sums over rows are fp64 sums of fp32 sums of this many.
inline constexpr std::int64_t kSumRows = 16;

static inline void add_wide(double* sums, Vec v) {
  float lanes[kLanes];
  store(lanes, v);
  for (int i = 0; i < kLanes; ++i) sums[i] += static_cast<double>(lanes[i]);
}

// scale * dy into column blocks, and its column sums onto `sums`. `dy` is that of the tile's first row.
static void scaled_gradient(const residual_mlp::Block& block, const float* dy, std::int64_t rows,
                            std::int64_t capacity, float* out, double* sums) {
  if (block.mixed > 0)
    for (std::int64_t r = 0; r < rows; r += block.mixed)
      flip(dy + r * block.width, block.mixed, block.width, block.mixed,
           InFlippedBlocks{out + r * kStride, capacity * kStride});
  const Vec scale = splat(block.scale);
  for (std::int64_t k = 0; k < block.width; k += kLanes) {
    const int live = static_cast<int>(std::min<std::int64_t>(kLanes, block.width - k));
    float* to = out + k / kBlock * capacity * kStride + k % kBlock;
    for (std::int64_t r0 = 0; r0 < rows; r0 += kSumRows) {
      Vec sum = splat(0.0f);
      for (std::int64_t r = r0; r < std::min(rows, r0 + kSumRows); ++r) {
        const Vec given =
            block.mixed > 0 ? load(to + r * kStride) : load_first(dy + r * block.width + k, live);
        const Vec v = scale * given;
        store(to + r * kStride, v);
        sum = sum + v;
      }
      add_wide(sums + k, sum);
    }
  }
}

// u -> act(u + bias) and dh -> dh act'(u + bias) in place; the column sums of the latter onto `sums`.
template <class Activation>
static void activate_backward(float* u, float* dh, std::int64_t rows, std::int64_t columns, const float* bias,
                              double* sums) {
  for (std::int64_t j = 0; j < columns; j += kLanes) {
    const Vec shift = load(bias + j);
    for (std::int64_t r0 = 0; r0 < rows; r0 += kSumRows) {
      Vec sum = splat(0.0f);
      for (std::int64_t r = r0; r < std::min(rows, r0 + kSumRows); ++r) {
        Vec value;
        Vec slope;
        Activation::both(load(u + r * kStride + j) + shift, value, slope);
        const Vec gradient = load(dh + r * kStride + j) * slope;
        store(u + r * kStride + j, value);
        store(dh + r * kStride + j, gradient);
        sum = sum + gradient;
      }
      add_wide(sums + j, sum);
    }
  }
}

// dx of a row from da, the gradient of norm(x); adds to the sums that the norm's parameters get.
static void normalise_backward(const residual_mlp::Block& block, const float* x, const float* dy,
                               const float* da, std::int64_t block_floats, float shift, float factor,
                               float* weight_sums, float* bias_sums, float* dx) {
  const std::int64_t width = residual_mlp::normed_width(block);
  const Vec center = splat(shift);
  const Vec gain = splat(factor);
  const float count = static_cast<float>(width);
  Vec sum = splat(0.0f);
  Vec along = splat(0.0f);
  for (std::int64_t k = 0; k < width; k += kLanes) {
    const int live = static_cast<int>(std::min<std::int64_t>(kLanes, width - k));
    const Vec gradient = load(da + k / kBlock * block_floats + k % kBlock);  // zero beyond the width
    const Vec n = (load_first(x + k, live) - center) * gain;
    store(weight_sums + k, fma(gradient, n, load(weight_sums + k)));
    store(bias_sums + k, load(bias_sums + k) + gradient);
    const Vec weighted =
        block.norm_weight != nullptr ? gradient * load_first(block.norm_weight + k, live) : gradient;
    sum = sum + weighted;
    along = fma(weighted, n, along);
  }
  Vec mean = splat(0.0f);
  Vec slope = splat(0.0f);
  if (block.norm == residual_mlp::Norm::layer) mean = splat(lane_sum(sum) / count);
  if (block.norm != residual_mlp::Norm::none) slope = splat(lane_sum(along) / count);
  for (std::int64_t k = 0; k < width; k += kLanes) {
    const int live = static_cast<int>(std::min<std::int64_t>(kLanes, width - k));
    const Vec gradient = load(da + k / kBlock * block_floats + k % kBlock);
    const Vec n = (load_first(x + k, live) - center) * gain;
    const Vec weighted =
        block.norm_weight != nullptr ? gradient * load_first(block.norm_weight + k, live) : gradient;
    const Vec inner = weighted - mean - n * slope;
    store_first(dx + k, fma(gain, inner, load_first(dy + k, live)), live);
  }
}

// out[rows of a][columns of b] (+)= a^T b over the tile's rows.
static void outer_products(const float* a, std::int64_t a_columns, const float* b, std::int64_t b_columns,
                           std::int64_t rows, float* out, std::int64_t out_stride, bool accumulate) {
  const Groups groups(a_columns);
  for (std::int64_t j = 0; j < b_columns; j += kPanel) {
    const Columns columns(b_columns, j);
    std::int64_t i = 0;
    for (std::int64_t g = 0; g < groups.count; ++g) {
      const std::int64_t size = groups.size(g);
      product_of<1, kStride, kStride, 0>(columns.vecs, size)(a + i, b + j, rows, out + i * out_stride + j,
                                                             out_stride, accumulate, columns.live);
      i += size;
    }
  }
}

// The kept sums of `units` hidden units, in whole vectors.
static void fetch_sums(const residual_mlp::Block& block, std::int64_t row0, std::int64_t rows,
                       std::int64_t h0, std::int64_t units, float* h) {
  for (std::int64_t r = 0; r < rows; ++r)
    for (std::int64_t j = 0; j < units; j += kLanes)
      store(h + r * kStride + j, load_first(block.sums + (row0 + r) * block.hidden + h0 + j,
                                            static_cast<int>(std::min<std::int64_t>(kLanes, units - j))));
}

// dx of a tile's rows, and the sums that the norm's parameters get.
static void gradient_of_rows(const residual_mlp::Block& block, const float* dy, std::int64_t row0,
                             std::int64_t rows, std::int64_t capacity, const float* da, const float* shifts,
                             const float* factors, float* sums, float* stage, const Partial& partial,
                             float* dx) {
  const std::int64_t width = residual_mlp::normed_width(block);
  const std::int64_t padded = panels(width) * kPanel;
  const std::int64_t first = normed_rows(block, row0);
  const std::int64_t count = normed_rows(block, rows);
  for (std::int64_t r0 = 0; r0 < count;) {
    // A mixing block's rows lie on the stage a sequence at a time, so that sums end there.
    const std::int64_t sequence = block.mixed > 0 ? r0 / block.width : 0;
    const std::int64_t left = block.mixed > 0 ? (sequence + 1) * block.width : count;
    const std::int64_t end = std::min(left, r0 + kSumRows);
    if (block.mixed > 0 && r0 % block.width == 0)
      flip_back(block, da + sequence * block.mixed * kStride, capacity * kStride, stage);
    std::memset(sums, 0, static_cast<std::size_t>(2 * padded) * sizeof(float));
    for (std::int64_t r = r0; r < end; ++r) {
      const float* x = block.x + (first + r) * (block.mixed > 0 ? width : block.x_stride);
      const bool staged = block.mixed > 0;
      normalise_backward(block, x, dy + (first + r) * width,
                         staged ? stage + r % block.width * stage_stride(block) : da + r * kStride,
                         staged ? kBlock : capacity * kStride, shifts[r], factors[r], sums, sums + padded,
                         dx + (first + r) * width);
    }
    for (std::int64_t k = 0; k < 2 * padded; k += kLanes)  // both sums, as they lie in a partial
      add_wide(partial.norm_weight + k, load(sums + k));
    r0 = end;
  }
}

template <class Activation>
static void backward_rows(const residual_mlp::Block& block, float* packed, const float* dy, bool parameters,
                          std::int64_t first_row, std::int64_t end_row, std::int64_t capacity,
                          float* workspace, float* partial_memory, float* w1_out, float* w2_out, float* dx) {
  const std::int64_t block_floats = capacity * kStride;
  const std::int64_t blocks = column_blocks(block.width);
  float* normed = workspace;
  float* dz = normed + blocks * block_floats;
  float* da = dz + blocks * block_floats;
  float* h = da + blocks * block_floats;
  float* du = h + block_floats;
  float* scratch = du + block_floats;
  float* shifts = scratch + kBlock * kPanel;
  float* factors = shifts + normed_rows(block, capacity);
  float* sums = factors + normed_rows(block, capacity);
  const std::int64_t padded = panels(residual_mlp::normed_width(block)) * kPanel;
  float* stage = sums + 2 * padded;
  const Partial partial(block, partial_memory, w1_out, w2_out);
  std::fill_n(partial.b1, partial_vectors(block), 0.0);
  if (first_row == end_row) {
    std::fill_n(partial.w1, block.hidden * block.width, 0.0f);
    std::fill_n(partial.w2, block.hidden * block.width, 0.0f);
  }
  const Weights weights(block, packed, scratch);
  for (std::int64_t row0 = first_row; row0 < end_row; row0 += capacity) {
    const std::int64_t rows = std::min(capacity, end_row - row0);
    const bool added = row0 > first_row;
    const Groups groups(rows);
    normalise(block, row0, rows, capacity, normed, shifts, factors, stage);
    scaled_gradient(block, dy + row0 * block.width, rows, capacity, dz, partial.b2);
    for (std::int64_t h0 = 0; h0 < block.hidden; h0 += kBlock) {
      const std::int64_t units = std::min<std::int64_t>(kBlock, block.hidden - h0);
      for (std::int64_t k = 0; k < block.width; k += kBlock) {
        const std::int64_t depth = std::min<std::int64_t>(kBlock, block.width - k);
        const std::int64_t at = k / kBlock * block_floats;
        for (std::int64_t j = 0; j < units; j += kPanel) {
          const Columns columns(units, j);
          if (block.sums == nullptr)
            multiply_rows(groups, columns, normed + at, weights.up.panel(h0 + j, k, depth), depth, h + j,
                          k > 0);
          multiply_rows(groups, columns, dz + at, weights.down.panel(h0 + j, k, depth), depth, du + j, k > 0);
        }
      }
      if (block.sums != nullptr) fetch_sums(block, row0, rows, h0, units, h);
      float bias[kBlock + kPanel] = {};
      if (block.b1 != nullptr)
        std::memcpy(bias, block.b1 + h0, static_cast<std::size_t>(units) * sizeof(float));
      activate_backward<Activation>(h, du, rows, units, bias, partial.b1 + h0);
      for (std::int64_t j = 0; j < block.width; j += kPanel)
        multiply_rows(groups, Columns(block.width, j), du, weights.back.panel(j, h0, units), units,
                      da + j / kBlock * block_floats + j % kBlock, h0 > 0);
      if (!parameters) continue;
      for (std::int64_t k = 0; k < block.width; k += kBlock) {
        const std::int64_t depth = std::min<std::int64_t>(kBlock, block.width - k);
        const std::int64_t at = k / kBlock * block_floats;
        outer_products(dz + at, depth, h, units, rows, partial.w2 + k * block.hidden + h0, block.hidden,
                       added);
        outer_products(du, units, normed + at, depth, rows, partial.w1 + h0 * block.width + k, block.width,
                       added);
      }
    }
    gradient_of_rows(block, dy, row0, rows, capacity, da, shifts, factors, sums, stage, partial, dx);
  }
}

static void backward_chunk(const residual_mlp::Block& block, float* packed, const float* dy, bool parameters,
                           std::int64_t first_row, std::int64_t end_row, std::int64_t capacity,
                           float* workspace, float* partial, float* w1_out, float* w2_out, float* dx) {
  switch (block.activation) {
    case residual_mlp::Activation::gelu:
      return backward_rows<Gelu>(block, packed, dy, parameters, first_row, end_row, capacity, workspace,
                                 partial, w1_out, w2_out, dx);
    case residual_mlp::Activation::gelu_tanh:
      return backward_rows<GeluTanh>(block, packed, dy, parameters, first_row, end_row, capacity, workspace,
                                     partial, w1_out, w2_out, dx);
    case residual_mlp::Activation::relu:
      return backward_rows<Relu>(block, packed, dy, parameters, first_row, end_row, capacity, workspace,
                                 partial, w1_out, w2_out, dx);
    case residual_mlp::Activation::silu:
      return backward_rows<Silu>(block, packed, dy, parameters, first_row, end_row, capacity, workspace,
                                 partial, w1_out, w2_out, dx);
    case residual_mlp::Activation::tanh:
      return backward_rows<Tanh>(block, packed, dy, parameters, first_row, end_row, capacity, workspace,
                                 partial, w1_out, w2_out, dx);
  }
}

// out = the sum over `count` chunks, `step` floats apart, of one array of their gradients, first chunk first.
template <class T>
static void add_up(const float* from, std::int64_t count, std::int64_t step, std::int64_t size, float* out) {
  const T* first = reinterpret_cast<const T*>(from);
  const std::int64_t stride =
      step * static_cast<std::int64_t>(sizeof(float)) / static_cast<std::int64_t>(sizeof(T));
  for (std::int64_t i = 0; i < size; ++i) {
    T sum = first[i];
    for (std::int64_t c = 1; c < count; ++c) sum += first[c * stride + i];
    out[i] = static_cast<float>(sum);
  }
}

static void add_chunks(const residual_mlp::Block& block, const float* partials, std::int64_t count,
                       std::int64_t step, std::int64_t begin, std::int64_t end,
                       const residual_mlp::Gradients& gradients) {
  // The weights' elements [begin, end); the task that has the first of them adds the vectors as well.
  const Partial at(block, const_cast<float*>(partials), nullptr, nullptr);
  if (count > 1 && gradients.w1 != nullptr)
    add_up<float>(at.w1 + begin, count, step, end - begin, gradients.w1 + begin);
  if (count > 1 && gradients.w2 != nullptr)
    add_up<float>(at.w2 + begin, count, step, end - begin, gradients.w2 + begin);
  if (begin > 0) return;
  const double* const vectors[4] = {at.b1, at.b2, at.norm_weight, at.norm_bias};
  float* const outputs[4] = {gradients.b1, gradients.b2, gradients.norm_weight, gradients.norm_bias};
  const std::int64_t normed = residual_mlp::normed_width(block);
  const std::int64_t lengths[4] = {block.hidden, block.width, normed, normed};
  for (int i = 0; i < 4; ++i)
    if (outputs[i] != nullptr)
      add_up<double>(reinterpret_cast<const float*>(vectors[i]), count, step, lengths[i], outputs[i]);
}

}  // namespace rgfast::RGFAST_NS
