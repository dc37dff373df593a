// What lies between the products where a library does them: rows as they lie, whole rows apart.

namespace rgfast::RGFAST_NS {

static void library_normalise(const residual_mlp::Block& block, std::int64_t row, std::int64_t rows,
                              float* out, std::int64_t stride, float* shifts, float* factors) {
  for (std::int64_t r = 0; r < rows; ++r)
    normalise_one(block, block.x + (row + r) * block.x_stride, InARow{out + r * stride},
                  shifts != nullptr ? shifts + r : nullptr, factors + (factors != nullptr ? r : 0));
}

template <class Activation>
static void activate_plain(const float* bias, const float* u, std::int64_t u_stride, std::int64_t rows,
                           std::int64_t units, float* h, std::int64_t h_stride) {
  for (std::int64_t r = 0; r < rows; ++r)
    for (std::int64_t j = 0; j < units; j += kLanes) {
      const int live = static_cast<int>(std::min<std::int64_t>(kLanes, units - j));
      Vec v = load_first(u + r * u_stride + j, live);
      if (bias != nullptr) v = v + load_first(bias + j, live);
      store_first(h + r * h_stride + j, Activation::value(v), live);
    }
}

static void library_activate(const residual_mlp::Block& block, const float* u, std::int64_t u_stride,
                             std::int64_t rows, std::int64_t unit, std::int64_t units, float* h,
                             std::int64_t h_stride) {
  const float* bias = block.b1 != nullptr ? block.b1 + unit : nullptr;
  switch (block.activation) {
    case residual_mlp::Activation::gelu:
      return activate_plain<Gelu>(bias, u, u_stride, rows, units, h, h_stride);
    case residual_mlp::Activation::gelu_tanh:
      return activate_plain<GeluTanh>(bias, u, u_stride, rows, units, h, h_stride);
    case residual_mlp::Activation::relu:
      return activate_plain<Relu>(bias, u, u_stride, rows, units, h, h_stride);
    case residual_mlp::Activation::silu:
      return activate_plain<Silu>(bias, u, u_stride, rows, units, h, h_stride);
    case residual_mlp::Activation::tanh:
      return activate_plain<Tanh>(bias, u, u_stride, rows, units, h, h_stride);
  }
}

static void library_finish(const residual_mlp::Block& block, std::int64_t row, std::int64_t rows,
                           std::int64_t column, std::int64_t columns, float* y) {
  const Vec scale = splat(block.scale);
  for (std::int64_t r = row; r < row + rows; ++r)
    for (std::int64_t k = column; k < column + columns; k += kLanes) {
      const int live = static_cast<int>(std::min<std::int64_t>(kLanes, column + columns - k));
      float* at = y + r * block.width + k;
      Vec update = load_first(at, live);
      if (block.b2 != nullptr) update = update + load_first(block.b2 + k, live);
      store_first(at, fma(scale, update, load_first(block.x + r * block.x_stride + k, live)), live);
    }
}

static void library_scale(const residual_mlp::Block& block, const float* dy, std::int64_t rows, float* out,
                          std::int64_t stride, double* sums) {
  const Vec scale = splat(block.scale);
  for (std::int64_t r0 = 0; r0 < rows; r0 += kSumRows)
    for (std::int64_t k = 0; k < block.width; k += kLanes) {
      const int live = static_cast<int>(std::min<std::int64_t>(kLanes, block.width - k));
      Vec sum = splat(0.0f);
      for (std::int64_t r = r0; r < std::min(rows, r0 + kSumRows); ++r) {
        const Vec v = scale * load_first(dy + r * block.width + k, live);
        if (out != nullptr) store_first(out + r * stride + k, v, live);
        sum = sum + v;
      }
      add_wide(sums + k, sum);
    }
}

template <class Activation>
static void activate_backward_plain(const float* bias, const float* u, std::int64_t u_stride,
                                    std::int64_t rows, std::int64_t units, float* h, std::int64_t h_stride,
                                    float* du, std::int64_t du_stride, double* sums) {
  for (std::int64_t r0 = 0; r0 < rows; r0 += kSumRows)
    for (std::int64_t j = 0; j < units; j += kLanes) {
      const int live = static_cast<int>(std::min<std::int64_t>(kLanes, units - j));
      const Vec shift = bias != nullptr ? load_first(bias + j, live) : splat(0.0f);
      Vec sum = splat(0.0f);
      for (std::int64_t r = r0; r < std::min(rows, r0 + kSumRows); ++r) {
        Vec value;
        Vec slope;
        Activation::both(load_first(u + r * u_stride + j, live) + shift, value, slope);
        const Vec gradient = load_first(du + r * du_stride + j, live) * slope;
        store_first(h + r * h_stride + j, value, live);
        store_first(du + r * du_stride + j, gradient, live);
        sum = sum + gradient;
      }
      add_wide(sums + j, sum);
    }
}

static void library_activate_backward(const residual_mlp::Block& block, const float* u, std::int64_t u_stride,
                                      std::int64_t rows, std::int64_t unit, std::int64_t units, float* h,
                                      std::int64_t h_stride, float* du, std::int64_t du_stride,
                                      double* sums) {
  const float* bias = block.b1 != nullptr ? block.b1 + unit : nullptr;
  switch (block.activation) {
    case residual_mlp::Activation::gelu:
      return activate_backward_plain<Gelu>(bias, u, u_stride, rows, units, h, h_stride, du, du_stride, sums);
    case residual_mlp::Activation::gelu_tanh:
      return activate_backward_plain<GeluTanh>(bias, u, u_stride, rows, units, h, h_stride, du, du_stride,
                                               sums);
    case residual_mlp::Activation::relu:
      return activate_backward_plain<Relu>(bias, u, u_stride, rows, units, h, h_stride, du, du_stride, sums);
    case residual_mlp::Activation::silu:
      return activate_backward_plain<Silu>(bias, u, u_stride, rows, units, h, h_stride, du, du_stride, sums);
    case residual_mlp::Activation::tanh:
      return activate_backward_plain<Tanh>(bias, u, u_stride, rows, units, h, h_stride, du, du_stride, sums);
  }
}

static void library_normalise_backward(const residual_mlp::Block& block, const float* dy, std::int64_t row,
                                       std::int64_t rows, const float* dz, std::int64_t stride,
                                       const float* shifts, const float* factors, double* weight_sums,
                                       double* bias_sums, float* scratch, float* dx) {
  const std::int64_t padded = (block.width + kLanes - 1) / kLanes * kLanes;
  for (std::int64_t r0 = 0; r0 < rows; r0 += kSumRows) {
    std::memset(scratch, 0, static_cast<std::size_t>(2 * padded) * sizeof(float));
    for (std::int64_t r = r0; r < std::min(rows, r0 + kSumRows); ++r)
      normalise_backward(block, block.x + (row + r) * block.x_stride, dy + (row + r) * block.width,
                         dz + r * stride, kBlock, shifts[r], factors[r], scratch, scratch + padded,
                         dx + (row + r) * block.width);
    for (std::int64_t k = 0; k < padded; k += kLanes) {
      add_wide(weight_sums + k, load(scratch + k));
      add_wide(bias_sums + k, load(scratch + padded + k));
    }
  }
}

static residual_mlp::Bodies library_bodies() {
  return {kLanes,        library_normalise,         library_activate,          library_finish,
          library_scale, library_activate_backward, library_normalise_backward};
}

}  // namespace rgfast::RGFAST_NS
