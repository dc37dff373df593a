#include "kernels/residual_mlp.hpp"

#include <pybind11/stl.h>

#include <array>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "bind/register.hpp"
#include "kernels/residual_mlp_library.hpp"

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

// A block as Python hands it over, field by field as in `Block`: one argument, since it stands in every call.
using Given = std::tuple<std::int64_t, std::int64_t, std::int64_t, std::uintptr_t, std::int64_t,
                         std::uintptr_t, std::uintptr_t, std::uintptr_t, std::uintptr_t, std::uintptr_t,
                         std::uintptr_t, int, int, float, float, std::int64_t, std::uintptr_t>;

Block block(const Given& given) {
  const auto& [rows, width, hidden, x, x_stride, w1, b1, w2, b2, norm_weight, norm_bias, norm, activation,
               scale, eps, mixed, sums] = given;
  if (mixed < 0 || (mixed > 0 && rows % mixed != 0))
    throw std::invalid_argument("mixed must be 0 or divide rows, got " + std::to_string(mixed) + " and " +
                                std::to_string(rows));
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
               eps,
               mixed,
               output(sums)};
}

// A stack's blocks, from six addresses for each: w1, b1, w2, b2, norm_weight, norm_bias.
std::vector<Block> blocks(std::int64_t rows, std::int64_t width, const std::vector<std::int64_t>& hidden,
                          const std::vector<std::uintptr_t>& addresses, int norm, int activation, float scale,
                          float eps) {
  if (hidden.empty() || addresses.size() != 6 * hidden.size())
    throw std::invalid_argument("addresses must be six for each of at least one block, got " +
                                std::to_string(addresses.size()) + " for " + std::to_string(hidden.size()));
  std::vector<Block> found;
  for (std::size_t l = 0; l < hidden.size(); ++l) {
    const std::uintptr_t* const at = addresses.data() + 6 * l;
    found.push_back(block({0, width, hidden[l], 0, width, at[0], at[1], at[2], at[3], at[4], at[5], norm,
                           activation, scale, eps, 0, 0}));
  }
  found.front().rows = rows;
  return found;
}

// What residual_mlp_use_library was given, once it has been found to work. Written under the GIL.
std::optional<residual_mlp::Library> library;

residual_mlp::Library checked_library(const Block& found) {
  if (!library)
    throw std::invalid_argument("by_library must be false until residual_mlp_use_library was called");
  if (found.mixed > 0) throw std::invalid_argument("by_library must be false where mixed is not 0");
  return *library;
}

residual_mlp::Stack stack_of(const std::vector<Block>& found, std::int64_t rows_in_all) {
  return {found.data(), static_cast<std::int64_t>(found.size()), rows_in_all};
}

}  // namespace

void register_residual_mlp(py::module_& m) {
  m.def(
      "residual_mlp_use_library",
      [](std::uintptr_t sgemm, std::uintptr_t set_threads, std::uintptr_t pack_size, std::uintptr_t pack,
         std::uintptr_t compute) {
        if (sgemm == 0 || set_threads == 0)
          throw std::invalid_argument("sgemm and set_threads must not be null");
        residual_mlp::Library given{reinterpret_cast<residual_mlp::Sgemm>(sgemm),
                                    reinterpret_cast<int (*)(int)>(set_threads)};
        if (pack_size != 0 && pack != 0 && compute != 0) {
          given.pack_size = reinterpret_cast<residual_mlp::PackSize>(pack_size);
          given.pack = reinterpret_cast<residual_mlp::Pack>(pack);
          given.compute = reinterpret_cast<residual_mlp::Compute>(compute);
        }
        if (!residual_mlp::works(given)) return false;
        library = given;
        return true;
      },
      py::arg("sgemm"), py::arg("set_threads"), py::arg("pack_size") = 0, py::arg("pack") = 0,
      py::arg("compute") = 0,
      "Whether the Fortran sgemm and the C function that sets and returns a thread's number of threads, at "
      "these\naddresses, do what they should; only then are they used where by_library is true.");
  m.def(
      "residual_mlp_forward",
      [](const Given& given, std::uintptr_t y, int threads, bool by_library) {
        const Block found = block(given);
        if (y == 0 && found.rows > 0) throw std::invalid_argument("y must not be null");
        checked_threads(threads);
        if (by_library) {
          const residual_mlp::Library blas = checked_library(found);
          const py::gil_scoped_release release;
          residual_mlp::library_forward(blas, found, output(y), threads);
          return;
        }
        const py::gil_scoped_release release;
        residual_mlp::forward(found, output(y), threads);
      },
      "The residual block over rows of fp32 into y. block: rows, width, hidden, then x and its row stride, "
      "the\n"
      "addresses of w1, b1, w2, b2, norm_weight, norm_bias, the codes of norm and activation, scale, eps, "
      "the\n"
      "width of mixed rows or 0, and where the first product's sums are kept or 0.");
  m.def(
      "residual_mlp_backward",
      [](const Given& given, std::uintptr_t dy, const std::array<std::uintptr_t, 7>& gradients, int threads,
         bool by_library) {
        const Block found = block(given);
        if (dy == 0 && found.rows > 0) throw std::invalid_argument("dy must not be null");
        checked_threads(threads);
        const auto& [dx, dw1, db1, dw2, db2, d_norm_weight, d_norm_bias] = gradients;
        const residual_mlp::Gradients wanted{output(dx),         output(dw1), output(db1),
                                             output(dw2),        output(db2), output(d_norm_weight),
                                             output(d_norm_bias)};
        if (by_library) {
          const residual_mlp::Library blas = checked_library(found);
          const py::gil_scoped_release release;
          residual_mlp::library_backward(blas, found, input(dy), wanted, threads);
          return;
        }
        const py::gil_scoped_release release;
        residual_mlp::backward(found, input(dy), wanted, threads);
      },
      "The gradients of the residual block, in the order of its tensors, each unless its address is 0.");
  m.def(
      "residual_stack_floats",
      [](std::int64_t width, const std::vector<std::int64_t>& hidden,
         const std::vector<std::uintptr_t>& addresses, std::int64_t rows_in_all) {
        const auto found = blocks(0, width, hidden, addresses, 0, 0, 1.0f, 0.0f);
        return residual_mlp::stack_floats(stack_of(found, rows_in_all));
      },
      "How many floats residual_stack_pack writes.");
  m.def(
      "residual_stack_pack",
      [](std::int64_t width, const std::vector<std::int64_t>& hidden,
         const std::vector<std::uintptr_t>& addresses, std::int64_t rows_in_all, std::uintptr_t packed,
         int threads) {
        const auto found = blocks(0, width, hidden, addresses, 0, 0, 1.0f, 0.0f);
        if (packed == 0) throw std::invalid_argument("packed must not be null");
        checked_threads(threads);
        const py::gil_scoped_release release;
        residual_mlp::stack_pack(stack_of(found, rows_in_all), output(packed), threads);
      },
      "The weights of a stack as its products read them.");
  m.def(
      "residual_stack_forward",
      [](std::int64_t rows, std::int64_t rows_in_all, std::int64_t width,
         const std::vector<std::int64_t>& hidden, const std::vector<std::uintptr_t>& addresses, int norm,
         int activation, float scale, float eps, std::uintptr_t packed, std::uintptr_t x,
         std::int64_t x_stride, std::uintptr_t outputs, std::int64_t step, int threads) {
        auto found = blocks(rows, width, hidden, addresses, norm, activation, scale, eps);
        if (rows > 0 && (x == 0 || outputs == 0))
          throw std::invalid_argument("x and outputs must not be null");
        if (step != 0 && step < rows * width)
          throw std::invalid_argument("step must be 0 or hold an output, got " + std::to_string(step));
        checked_threads(threads);
        found.front().x = input(x);
        found.front().x_stride = x_stride;
        const py::gil_scoped_release release;
        residual_mlp::stack_forward(stack_of(found, rows_in_all), input(packed), output(outputs), step,
                                    threads);
      },
      "Blocks one after the other; the output of block l lies `step` floats after that of the one before, "
      "or\n"
      "with a step of 0 the last one's alone is left.");
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
