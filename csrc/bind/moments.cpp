#include "kernels/moments.hpp"

#include "kernels/moments_pairs.hpp"

#include <pybind11/stl.h>

#include "bind/register.hpp"

namespace py = pybind11;

namespace rgfast::bind {
namespace {

moments::Problem problem(const std::vector<Tensor>& rows, const std::vector<std::uintptr_t>& shifts,
                         const std::vector<double>& units) {
  moments::Problem found{};
  if (rows.size() != shifts.size() || rows.size() != units.size())
    throw std::invalid_argument("rows, shifts and units must be as many, got " + std::to_string(rows.size()) +
                                ", " + std::to_string(shifts.size()) + " and " +
                                std::to_string(units.size()));
  for (std::size_t k = 0; k < rows.size(); ++k) {
    const View x = view(rows[k], "rows", 3);
    if (x.ndim != 3) throw std::invalid_argument("rows must be [positions, rows, width]");
    if (k > 0 && (x.size(0) != found.positions || x.size(1) != found.rows))
      throw std::invalid_argument("rows must agree in positions and rows");
    found.positions = x.size(0);
    found.rows = x.size(1);
    found.layers.push_back({x, reinterpret_cast<const double*>(shifts[k]), units[k]});
  }
  return found;
}

// A layer and the addresses of its shift, unit, own moment and move.
using PairLayer = std::tuple<Tensor, std::uintptr_t, std::uintptr_t, std::uintptr_t, std::uintptr_t>;
// Layers, and the addresses of total, norm, products, right and left sums, moved right and left.
using PairResult = std::tuple<int, int, std::uintptr_t, std::uintptr_t, std::uintptr_t, std::uintptr_t,
                              std::uintptr_t, std::uintptr_t, std::uintptr_t>;

void pair_products(const std::vector<PairLayer>& layers, const std::vector<PairResult>& pairs,
                   std::int64_t stride, int threads) {
  moments::PairProblem asked{};
  asked.threads = checked_threads(threads);
  asked.stride = stride;
  const auto doubles = [](std::uintptr_t address) { return reinterpret_cast<double*>(address); };
  for (const auto& [tensor, shift, unit, own, move] : layers) {
    const View x = view(tensor, "rows", 3);
    if (x.ndim != 3) throw std::invalid_argument("rows must be [positions, samples, width]");
    if (x.dtype != DType::f64 && x.dtype != DType::f32)
      throw std::invalid_argument("rows must be float64 or float32");
    if (x.size(2) > 1 && x.stride(2) != 1) throw std::invalid_argument("rows must have contiguous features");
    if (!asked.layers.empty() && (x.size(0) != asked.positions || x.size(1) != asked.samples))
      throw std::invalid_argument("rows must agree in positions and samples");
    if (x.size(2) > stride) throw std::invalid_argument("stride must be at least the width of every layer");
    asked.positions = x.size(0);
    asked.samples = x.size(1);
    asked.layers.push_back({x.data, x.dtype == DType::f64, x.stride(0), x.stride(1), x.size(2),
                            doubles(shift), doubles(unit), doubles(own), doubles(move)});
  }
  const int count = static_cast<int>(layers.size());
  for (const auto& [i, j, total, norm, products, right, left, moved_right, moved_left] : pairs) {
    if (i < 0 || i > j || j >= count)
      throw std::invalid_argument("pairs must be (i, j) with 0 <= i <= j < " + std::to_string(count) +
                                  ", got (" + std::to_string(i) + ", " + std::to_string(j) + ")");
    if (i == j && asked.layers[static_cast<std::size_t>(i)].own == nullptr)
      throw std::invalid_argument("a layer beside itself needs its own moment");
    asked.pairs.push_back({i, j, doubles(total), doubles(norm), doubles(products), doubles(right),
                           doubles(left), doubles(moved_right), doubles(moved_left)});
  }
  const py::gil_scoped_release release;
  moments::pair_products(asked);
}

void add_positions(const Tensor& tensor, std::uintptr_t to, int threads) {
  const View x = view(tensor, "rows", 3);
  checked_threads(threads);
  if (x.ndim != 3) throw std::invalid_argument("rows must be [positions, samples, width]");
  if (x.dtype != DType::f64 && x.dtype != DType::f32)
    throw std::invalid_argument("rows must be float64 or float32");
  if (x.size(2) > 1 && x.stride(2) != 1) throw std::invalid_argument("rows must have contiguous features");
  moments::Rows rows{};
  rows.data = x.data;
  rows.is_double = x.dtype == DType::f64;
  rows.position_stride = x.stride(0);
  rows.sample_stride = x.stride(1);
  rows.width = x.size(2);
  const py::gil_scoped_release release;
  moments::add_positions(rows, x.size(0), x.size(1), reinterpret_cast<double*>(to), threads);
}

}  // namespace

void register_moments(py::module_& m) {
  m.def(
      "moments_add",
      [](const std::vector<Tensor>& rows, const std::vector<std::uintptr_t>& shifts,
         const std::vector<double>& units, const std::tuple<std::uintptr_t, std::int64_t, std::int64_t>& keep,
         const std::vector<std::tuple<int, int, std::uintptr_t>>& pairs, int threads) {
        moments::Problem asked = problem(rows, shifts, units);
        asked.threads = checked_threads(threads);
        asked.keep = reinterpret_cast<const unsigned char*>(std::get<0>(keep));
        asked.keep_strides[0] = std::get<1>(keep);
        asked.keep_strides[1] = std::get<2>(keep);
        const int count = static_cast<int>(rows.size());
        for (const auto& [i, j, address] : pairs) {
          if (i < 0 || i > j || j >= count)
            throw std::invalid_argument("pairs must be (i, j) with 0 <= i <= j < " + std::to_string(count) +
                                        ", got (" + std::to_string(i) + ", " + std::to_string(j) + ")");
          asked.pairs.push_back({i, j, reinterpret_cast<double*>(address)});
        }
        const py::gil_scoped_release release;
        moments::add(asked);
      },
      py::arg("rows"), py::arg("shifts"), py::arg("units"), py::arg("keep"), py::arg("pairs"),
      py::arg("threads"),
      "Adds to moments[P, d_i + 2, d_j + 2] of pairs (i, j, address) the products of rows[P, b, d] less "
      "shifts[P, d] times units, each extended by its squared norm and 1; keep is (address or 0, strides).");
  m.def("add_positions", &add_positions, py::arg("rows"), py::arg("to"), py::arg("threads"),
        "Adds the sum over positions of rows[P, n, d] to the address of fp64 [n, d].");
  m.def("pair_products", &pair_products, py::arg("layers"), py::arg("pairs"), py::arg("stride"),
        py::arg("threads"),
        "Cross moments of pairs of layers in fp32 products; see kernels/moments_pairs.hpp. Layers are (rows, "
        "addresses of shift, unit, own and move, the last two or 0), pairs (i, j, addresses of what PairSums "
        "names in its order, the moved ones or 0).");
}

}  // namespace rgfast::bind
