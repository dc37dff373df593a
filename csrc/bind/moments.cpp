#include "kernels/moments.hpp"

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
}

}  // namespace rgfast::bind
