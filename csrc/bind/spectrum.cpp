#include "kernels/spectrum.hpp"

#include <pybind11/stl.h>

#include "bind/register.hpp"

namespace py = pybind11;

namespace rgfast::bind {
namespace {

std::pair<std::int64_t, int> eigvalsh(const Tensor& a, const Tensor& values, int threads) {
  const View in = view(a, "a", 2);
  const View out = view(values, "values", 1);
  checked_threads(threads);
  if (in.dtype != DType::f64 && in.dtype != DType::f32)
    throw std::invalid_argument("a must be float64 or float32");
  if (out.dtype != in.dtype) throw std::invalid_argument("values must have the dtype of a");
  if (in.size(-1) != in.size(-2))
    throw std::invalid_argument("a must be square, got " + std::to_string(in.size(-2)) + " x " +
                                std::to_string(in.size(-1)));
  bool fits = out.ndim == in.ndim - 1;
  for (int dim = 0; fits && dim < out.ndim; ++dim) fits = out.size(dim) == in.size(dim);
  if (!fits) throw std::invalid_argument("values must have the shape of a without its last dimension");
  const py::gil_scoped_release release;
  const spectrum::Status status = spectrum::eigvalsh(in, out, threads);
  return {status.index, static_cast<int>(status.trouble)};
}

}  // namespace

void register_spectrum(py::module_& m) {
  m.def("eigvalsh", &eigvalsh, py::arg("a"), py::arg("values"), py::arg("threads"),
        "Ascending eigenvalues of a[..., d, d] into values[..., d]; returns the first matrix in trouble, or "
        "-1, "
        "and its trouble: 1 for NaN or infinity, 2 for no convergence.");
  m.def(
      "eigvalsh_workspace",
      [](bool fp64, std::int64_t d) {
        return spectrum::eigvalsh_workspace(fp64 ? DType::f64 : DType::f32, d);
      },
      py::arg("fp64"), py::arg("d"), "Bytes of scratch that eigvalsh takes per thread for d x d matrices.");
}

}  // namespace rgfast::bind
