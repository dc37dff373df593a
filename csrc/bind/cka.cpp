#include "kernels/cka.hpp"

#include <pybind11/stl.h>

#include "bind/register.hpp"

namespace py = pybind11;

namespace rgfast::bind {
namespace {

cka::Problem problem(const std::vector<Tensor>& layers, const std::vector<std::pair<int, int>>& pairs,
                     bool by_features, bool single, std::int64_t groups, int threads) {
  cka::Problem found{};
  found.by_features = by_features;
  found.single = single;
  found.threads = checked_threads(threads);
  for (const Tensor& tensor : layers) {
    const View layer = view(tensor, "layers", 3);
    if (layer.ndim != 3 || layer.size(1) < 1 || layer.size(2) < 1)
      throw std::invalid_argument(
          "layers must be [positions, samples, features] with a sample and a feature");
    if (layer.dtype != DType::f64 && layer.dtype != DType::f32)
      throw std::invalid_argument("layers must be float64 or float32");
    if (layer.size(2) > 1 && layer.stride(2) != 1)
      throw std::invalid_argument("layers must have contiguous features");
    if (!found.layers.empty() && (layer.size(0) != found.positions || layer.size(1) != found.samples))
      throw std::invalid_argument("layers must agree in positions and samples");
    found.positions = layer.size(0);
    found.samples = layer.size(1);
    found.layers.push_back(
        {layer.data, layer.dtype == DType::f64, layer.stride(0), layer.stride(1), layer.size(2)});
  }
  found.groups = groups;
  if (groups < 1 || groups > std::max<std::int64_t>(found.samples, 1))
    throw std::invalid_argument("groups must be from 1 to the number of samples");
  if (layers.empty()) throw std::invalid_argument("layers must hold at least one layer, got none");
  const int count = static_cast<int>(layers.size());
  for (const auto& [l, m] : pairs)
    if (l < 0 || l > m || m >= count)
      throw std::invalid_argument("pairs must be (l, m) with 0 <= l <= m < " + std::to_string(count) +
                                  ", got (" + std::to_string(l) + ", " + std::to_string(m) + ")");
  found.pairs = pairs;
  return found;
}

template <class T>
T* output(const Tensor& tensor, const char* name, std::int64_t count) {
  const View found = view(tensor, name, 1);
  if (found.dtype != DType::f64) throw std::invalid_argument(std::string(name) + " must be float64");
  if (found.ndim != 1 || found.size(0) < count || (count > 1 && found.stride(0) != 1))
    throw std::invalid_argument(std::string(name) + " must be contiguous and hold " + std::to_string(count) +
                                " elements, got " + std::to_string(found.size(0)));
  return reinterpret_cast<T*>(found.data);
}

}  // namespace

void register_cka(py::module_& m) {
  m.def(
      "cka_workspace",
      [](const std::vector<Tensor>& layers, const std::vector<std::pair<int, int>>& pairs, bool by_features,
         bool single, std::int64_t groups, int threads) {
        return cka::workspace_bytes(problem(layers, pairs, by_features, single, groups, threads));
      },
      py::arg("layers"), py::arg("pairs"), py::arg("by_features"), py::arg("single"), py::arg("groups"),
      py::arg("threads"), "Bytes that cka_products works in.");
  m.def(
      "cka_products",
      [](const std::vector<Tensor>& layers, const std::vector<std::pair<int, int>>& pairs, bool by_features,
         bool single, std::int64_t groups, int threads, const Tensor& centered, const Tensor& u_centered,
         const Tensor& trace, const Tensor& grand, const Tensor& workspace) {
        const cka::Problem asked = problem(layers, pairs, by_features, single, groups, threads);
        const auto count = static_cast<std::int64_t>(layers.size());
        const std::int64_t each = asked.positions * asked.variants();
        const std::int64_t values = each * static_cast<std::int64_t>(pairs.size());
        const std::int64_t states = each * count;
        std::vector<cka::Status> status(static_cast<std::size_t>(asked.positions * count));
        const cka::Result result{
            output<double>(centered, "centered", values), output<double>(u_centered, "u_centered", values),
            output<double>(trace, "trace", states), output<double>(grand, "grand", states), status.data()};
        const std::size_t bytes = cka::workspace_bytes(asked);
        auto* const space = output<std::byte>(workspace, "workspace", static_cast<std::int64_t>(bytes / 8));
        if (reinterpret_cast<std::uintptr_t>(space) % 64 != 0)
          throw std::invalid_argument("workspace must be aligned to 64 bytes");
        {
          const py::gil_scoped_release release;
          cka::run(asked, result, space);
        }
        return std::any_of(status.begin(), status.end(),
                           [](cka::Status one) { return one == cka::Status::not_finite; });
      },
      py::arg("layers"), py::arg("pairs"), py::arg("by_features"), py::arg("single"), py::arg("groups"),
      py::arg("threads"), py::arg("centered"), py::arg("u_centered"), py::arg("trace"), py::arg("grand"),
      py::arg("workspace"),
      "Inner products of centred and U-centred Grams [P, V, pairs], traces and sums of Grams [P, V, L]; True "
      "where NaN or Inf came. V is 1, or with groups of samples i, i + groups, ... 1 + groups: all samples, "
      "and all but each group.");
}

}  // namespace rgfast::bind
