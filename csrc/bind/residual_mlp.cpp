#include "kernels/residual_mlp.hpp"

#include <string>

#include "bind/register.hpp"

namespace py = pybind11;

namespace rgfast::bind {
namespace {

using residual_mlp::Activation;
using residual_mlp::Block;
using residual_mlp::Norm;

// Small blocks are called thousands of times a second, so tensors come as bare addresses with the few sizes
// that they share: the Python side hands over contiguous fp32 (x with any row stride).
const float* input(std::uintptr_t address) { return reinterpret_cast<const float*>(address); }
float* output(std::uintptr_t address) { return reinterpret_cast<float*>(address); }

int code(int value, int most, const char* name) {
  if (value < 0 || value > most)
    throw std::invalid_argument(std::string(name) + " must be a code from 0 to " + std::to_string(most) +
                                ", got " + std::to_string(value));
  return value;
}

Block block(std::int64_t rows, std::int64_t width, std::int64_t hidden, std::uintptr_t x,
            std::int64_t x_stride, std::uintptr_t w1, std::uintptr_t b1, std::uintptr_t w2, std::uintptr_t b2,
            std::uintptr_t norm_weight, std::uintptr_t norm_bias, int norm, int activation, float scale,
            float eps) {
  if (rows < 0 || width < 1 || hidden < 1)
    throw std::invalid_argument("rows, width and hidden must be at least 0, 1 and 1, got " +
                                std::to_string(rows) + ", " + std::to_string(width) + " and " +
                                std::to_string(hidden));
  if (w1 == 0 || w2 == 0 || (x == 0 && rows > 0))
    throw std::invalid_argument("x, w1 and w2 must not be null");
  return Block{rows,
               width,
               hidden,
               input(x),
               x_stride,
               input(w1),
               input(b1),
               input(w2),
               input(b2),
               input(norm_weight),
               input(norm_bias),
               static_cast<Norm>(code(norm, 2, "norm")),
               static_cast<Activation>(code(activation, 4, "activation")),
               scale,
               eps};
}

}  // namespace

void register_residual_mlp(py::module_& m) {
  m.def(
      "residual_mlp_forward",
      [](std::int64_t rows, std::int64_t width, std::int64_t hidden, std::uintptr_t x, std::int64_t x_stride,
         std::uintptr_t w1, std::uintptr_t b1, std::uintptr_t w2, std::uintptr_t b2,
         std::uintptr_t norm_weight, std::uintptr_t norm_bias, int norm, int activation, float scale,
         float eps, std::uintptr_t y, int threads) {
        const Block found = block(rows, width, hidden, x, x_stride, w1, b1, w2, b2, norm_weight, norm_bias,
                                  norm, activation, scale, eps);
        if (y == 0 && rows > 0) throw std::invalid_argument("y must not be null");
        checked_threads(threads);
        const py::gil_scoped_release release;
        residual_mlp::forward(found, output(y), threads);
      },
      "The residual block over rows of fp32 into y.");
  m.def(
      "residual_mlp_backward",
      [](std::int64_t rows, std::int64_t width, std::int64_t hidden, std::uintptr_t x, std::int64_t x_stride,
         std::uintptr_t w1, std::uintptr_t b1, std::uintptr_t w2, std::uintptr_t b2,
         std::uintptr_t norm_weight, std::uintptr_t norm_bias, int norm, int activation, float scale,
         float eps, std::uintptr_t dy, std::uintptr_t dx, std::uintptr_t dw1, std::uintptr_t db1,
         std::uintptr_t dw2, std::uintptr_t db2, std::uintptr_t d_norm_weight, std::uintptr_t d_norm_bias,
         int threads) {
        const Block found = block(rows, width, hidden, x, x_stride, w1, b1, w2, b2, norm_weight, norm_bias,
                                  norm, activation, scale, eps);
        if (dy == 0 && rows > 0) throw std::invalid_argument("dy must not be null");
        checked_threads(threads);
        const py::gil_scoped_release release;
        residual_mlp::backward(found, input(dy),
                               {output(dx), output(dw1), output(db1), output(dw2), output(db2),
                                output(d_norm_weight), output(d_norm_bias)},
                               threads);
      },
      "The gradients of the residual block, each unless its address is 0.");
  m.def(
      "residual_mlp_activation",
      [](int activation, std::int64_t count, std::uintptr_t values_in, std::uintptr_t values,
         std::uintptr_t slopes) {
        const auto kind = static_cast<Activation>(code(activation, 4, "activation"));
        if (count < 0)
          throw std::invalid_argument("count must not be negative, got " + std::to_string(count));
        if (count > 0 && (values_in == 0 || values == 0))
          throw std::invalid_argument("input and values must not be null");
        const py::gil_scoped_release release;
        residual_mlp::activate(kind, input(values_in), output(values), output(slopes), count);
      },
      py::arg("activation"), py::arg("count"), py::arg("input"), py::arg("values"), py::arg("slopes") = 0,
      "The kernels' activation at `count` fp32 inputs, and its slope unless `slopes` is 0.");
}

}  // namespace rgfast::bind
