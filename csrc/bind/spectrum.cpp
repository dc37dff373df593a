#include "kernels/spectrum.hpp"

#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <optional>

#include "bind/register.hpp"

namespace py = pybind11;

namespace rgfast::bind {
namespace {

spectrum::Route checked_route(int route) {
  if (route < 0 || route > 2)
    throw std::invalid_argument("route must be 0, 1 or 2, got " + std::to_string(route));
  return static_cast<spectrum::Route>(route);
}

std::pair<std::int64_t, int> eigvalsh(const Tensor& a, const Tensor& values, int threads, int route) {
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
  const spectrum::Status status = spectrum::eigvalsh(in, out, threads, checked_route(route));
  return {status.index, static_cast<int>(status.trouble)};
}

// The same for a[batch, d, d] and contiguous values, without what it costs to pass tensors: beside one small
// matrix that is much.
std::pair<std::int64_t, int> eigvalsh_plain(std::uintptr_t a, bool fp64, std::int64_t batch, std::int64_t d,
                                            std::int64_t batch_stride, std::int64_t row_stride,
                                            std::int64_t column_stride, std::uintptr_t values, int threads) {
  if (batch < 0 || d < 0) throw std::invalid_argument("batch and d must not be negative");
  if (batch != 0 && d != 0 && (a == 0 || values == 0))
    throw std::invalid_argument("a and values must not be null pointers");
  checked_threads(threads);
  View in;
  in.data = reinterpret_cast<std::byte*>(a);
  in.dtype = fp64 ? DType::f64 : DType::f32;
  in.ndim = 3;
  in.sizes[0] = batch;
  in.sizes[1] = in.sizes[2] = d;
  in.strides[0] = batch_stride;
  in.strides[1] = row_stride;
  in.strides[2] = column_stride;
  View out;
  out.data = reinterpret_cast<std::byte*>(values);
  out.dtype = in.dtype;
  out.ndim = 2;
  out.sizes[0] = batch;
  out.sizes[1] = d;
  out.strides[0] = d;
  out.strides[1] = 1;
  const py::gil_scoped_release release;
  const spectrum::Status status = spectrum::eigvalsh(in, out, threads, spectrum::Route::choose);
  return {status.index, static_cast<int>(status.trouble)};
}

void check_samples(const View& x) {
  if (x.ndim != 3) throw std::invalid_argument("x must have 3 dimensions, got " + std::to_string(x.ndim));
  if (x.size(1) == 0 || x.size(2) == 0)
    throw std::invalid_argument("x must have at least one sample and one feature");
}

using Info = std::tuple<std::uintptr_t, std::uintptr_t, std::uintptr_t, std::uintptr_t>;

std::pair<std::int64_t, int> moments(const Tensor& x, bool centred, bool solve, const Tensor& result,
                                     std::uintptr_t raw, const Info& info, int threads, int route,
                                     std::uintptr_t matrix) {
  const View in = view(x, "x", 3);
  const View out = view(result, "result", solve ? 2 : 3);
  checked_threads(threads);
  check_samples(in);
  const std::int64_t m = std::min(in.size(1), in.size(2));
  bool fits = out.ndim == (solve ? 2 : 3) && out.size(0) == in.size(0) && out.dtype == DType::f64;
  std::int64_t step = 1;
  for (int dim = out.ndim - 1; fits && dim >= 0; --dim) {
    fits = (dim == 0 || out.size(dim) == m) && (out.size(dim) == 1 || out.stride(dim) == step);
    step *= out.size(dim);
  }
  if (!fits && in.size(0) != 0)
    throw std::invalid_argument("result must be contiguous float64 of shape [b, m] or [b, m, m]");
  const auto& [accumulated, exponent, limit, mean] = info;
  if (raw != 0 && !(solve && centred && in.size(1) >= in.size(2)))
    throw std::invalid_argument("raw goes with eigenvalues of centred x of no fewer samples than features");
  if (!solve && matrix != 0) throw std::invalid_argument("matrices beside the result come with eigenvalues");
  const spectrum::MomentInfo told{reinterpret_cast<double*>(accumulated),
                                  reinterpret_cast<std::int64_t*>(exponent),
                                  reinterpret_cast<std::int64_t*>(limit), reinterpret_cast<double*>(mean),
                                  reinterpret_cast<double*>(matrix)};
  auto* const to = reinterpret_cast<double*>(out.data);
  const spectrum::Route way = checked_route(route);
  spectrum::Status status;
  const py::gil_scoped_release release;
  if (solve)
    status = spectrum::gram_eigenvalues(in, centred, to, reinterpret_cast<double*>(raw), told, threads, way);
  else
    spectrum::gram(in, centred, to, told, threads);
  return {status.index, static_cast<int>(status.trouble)};
}

std::optional<std::pair<std::int64_t, int>> left_out_moments(const Tensor& x, std::int64_t groups,
                                                             std::uintptr_t values, std::uintptr_t raw,
                                                             const Info& info, int threads) {
  const View in = view(x, "x", 3);
  checked_threads(threads);
  check_samples(in);
  if (in.dtype == DType::f64) throw std::invalid_argument("x must be of fewer bits than float64");
  if (groups < 2 || in.size(1) / groups < 1)
    throw std::invalid_argument("groups must be from 2 to the number of samples, got " +
                                std::to_string(groups));
  if (in.size(0) != 0 && values == 0) throw std::invalid_argument("values must not be a null pointer");
  const auto& [accumulated, exponent, limit, mean] = info;
  const spectrum::MomentInfo told{reinterpret_cast<double*>(accumulated),
                                  reinterpret_cast<std::int64_t*>(exponent),
                                  reinterpret_cast<std::int64_t*>(limit)};
  spectrum::Status status;
  const py::gil_scoped_release release;
  if (!spectrum::left_out_eigenvalues(in, groups, reinterpret_cast<double*>(values),
                                      reinterpret_cast<double*>(raw), told, threads, status))
    return std::nullopt;
  return std::pair<std::int64_t, int>{status.index, static_cast<int>(status.trouble)};
}

std::pair<std::int64_t, int> refine(const Tensor& x, std::uintptr_t at, std::int64_t batch, bool centred,
                                    std::tuple<int, double> stage,
                                    const std::array<std::uintptr_t, 4>& results, const Info& info,
                                    int threads) {
  const View in = view(x, "x", 3);
  checked_threads(threads);
  check_samples(in);
  const auto [number, share] = stage;
  if (number < 0 || number >= spectrum::kRefineStages)
    throw std::invalid_argument("stage must be from 0 to " + std::to_string(spectrum::kRefineStages - 1) +
                                ", got " + std::to_string(number));
  const auto& [accumulated, exponent, limit, mean] = info;
  const std::int64_t m = std::min(in.size(1), in.size(2));
  if (batch < 0) throw std::invalid_argument("batch must not be negative");
  if (batch != 0 && (at == 0 || accumulated == 0 || exponent == 0 || limit == 0 ||
                     std::count(results.begin(), results.end(), std::uintptr_t{0}) != 0))
    throw std::invalid_argument("at, results and info must not hold null pointers");
  const auto* const index = reinterpret_cast<const std::int64_t*>(at);
  for (std::int64_t i = 0; i < batch; ++i)
    if (index[i] < 0 || index[i] >= in.size(0))
      throw std::invalid_argument("at must be from 0 to " + std::to_string(in.size(0) - 1) + ", got " +
                                  std::to_string(index[i]));
  const auto& [values, vectors, ends, residual] = results;
  for (std::int64_t i = 0; i < batch; ++i) {
    long long before = 0;
    for (int s = 0; s < number; ++s) {
      const long long end = reinterpret_cast<const long long*>(ends)[i * spectrum::kRefineStages + s];
      if (end < before || end > m)
        throw std::invalid_argument("numbers of vectors must not fall and be at most " + std::to_string(m) +
                                    ", got " + std::to_string(end));
      before = end;
    }
  }
  const spectrum::Refinement step{index,
                                  centred,
                                  number,
                                  share,
                                  reinterpret_cast<double*>(vectors),
                                  (m + 7) / 8 * 8,
                                  reinterpret_cast<long long*>(ends),
                                  reinterpret_cast<double*>(residual)};
  const spectrum::MomentInfo told{reinterpret_cast<double*>(accumulated),
                                  reinterpret_cast<std::int64_t*>(exponent),
                                  reinterpret_cast<std::int64_t*>(limit)};
  const py::gil_scoped_release release;
  const spectrum::Status status =
      spectrum::refine(in, batch, step, reinterpret_cast<double*>(values), told, threads);
  return {status.index, static_cast<int>(status.trouble)};
}

std::optional<std::pair<std::int64_t, int>> refined_moments(
    const Tensor& x, std::tuple<double, double> limits, std::pair<std::uintptr_t, std::uintptr_t> results,
    const Info& info, const std::array<std::array<std::uintptr_t, 4>, 2>& second, int threads) {
  const View in = view(x, "x", 3);
  checked_threads(threads);
  check_samples(in);
  const auto [doubt, share] = limits;
  const auto [values, raw] = results;
  const auto& [accumulated, exponent, limit, mean] = info;
  if (!(doubt >= 0.0)) throw std::invalid_argument("doubt must not be negative");
  if (raw != 0 && in.size(1) < in.size(2))
    throw std::invalid_argument("raw goes with no fewer samples than features");
  bool null = values == 0 || accumulated == 0 || exponent == 0 || limit == 0;
  const auto real = [](std::uintptr_t address) { return reinterpret_cast<double*>(address); };
  std::array<spectrum::SecondStage, 2> stages{};
  for (std::size_t way = 0; way < (raw == 0 ? 1 : 2); ++way) {
    const auto& [found, count, residual, trace] = second[way];
    null = null || found == 0 || count == 0 || residual == 0 || trace == 0;
    stages[way] = {real(found), reinterpret_cast<long long*>(count), real(residual), real(trace)};
  }
  if (in.size(0) != 0 && null)
    throw std::invalid_argument("results, info and second must not hold null pointers");
  const spectrum::MomentInfo told{real(accumulated), reinterpret_cast<std::int64_t*>(exponent),
                                  reinterpret_cast<std::int64_t*>(limit)};
  spectrum::Status status;
  const py::gil_scoped_release release;
  if (!spectrum::refined_eigenvalues(in, doubt, share, real(values), real(raw), told, stages.data(), threads,
                                     status))
    return std::nullopt;
  return std::pair<std::int64_t, int>{status.index, static_cast<int>(status.trouble)};
}

std::tuple<std::int64_t, int, double> effective_ranks(const Tensor& x, bool centred, bool variance,
                                                      std::uintptr_t rank, std::uintptr_t scratch,
                                                      int threads) {
  const View in = view(x, "x", 3);
  checked_threads(threads);
  check_samples(in);
  const std::int64_t b = in.size(0);
  const std::int64_t m = std::min(in.size(1), in.size(2));
  if (b != 0 && (rank == 0 || scratch == 0))
    throw std::invalid_argument("rank and scratch must not be null pointers");
  auto* const accumulated = reinterpret_cast<double*>(scratch);
  auto* const exponent = reinterpret_cast<std::int64_t*>(scratch) + b;
  double* const bound = accumulated + 3 * b;
  double* const values = accumulated + 4 * b;
  const spectrum::MomentInfo told{accumulated, exponent, exponent + b};
  const py::gil_scoped_release release;
  const spectrum::Status status =
      spectrum::gram_eigenvalues(in, centred, values, nullptr, told, threads, spectrum::Route::choose);
  spectrum::effective_ranks(values, b, m, std::max(in.size(1), in.size(2)), told,
                            {variance, reinterpret_cast<double*>(rank), bound}, threads);
  const double worst = b == 0 ? 0.0 : *std::max_element(bound, bound + b);
  return {status.index, static_cast<int>(status.trouble), worst};
}

}  // namespace

void register_spectrum(py::module_& m) {
  m.def("eigvalsh", &eigvalsh, py::arg("a"), py::arg("values"), py::arg("threads"), py::arg("route") = 0,
        "Ascending eigenvalues of a[..., d, d] into values[..., d]; returns the first matrix in trouble, or "
        "-1, "
        "and its trouble: 1 for NaN or infinity, 2 for no convergence. route: 0 to choose, 1 for one matrix "
        "per lane, 2 for one at a time.");
  m.def("eigvalsh_plain", &eigvalsh_plain, py::arg("a"), py::arg("fp64"), py::arg("batch"), py::arg("d"),
        py::arg("batch_stride"), py::arg("row_stride"), py::arg("column_stride"), py::arg("values"),
        py::arg("threads"),
        "What eigvalsh does, for a[batch, d, d] and contiguous values[batch, d] by their addresses.");
  m.def(
      "moments", &moments, py::arg("x"), py::arg("centred"), py::arg("solve"), py::arg("result"),
      py::arg("raw"), py::arg("info"), py::arg("threads"), py::arg("route") = 0, py::arg("matrix") = 0,
      "fp64 second moments of x[b, n, d] on its smaller side, result[b, m, m], or with `solve` their "
      "ascending eigenvalues, result[b, m]. raw: the address of as many that the moments of x itself have, "
      "or 0. info: the addresses of what was accumulated (fp64), the exponents and the rank limits (int64), "
      "b entries each, and of the column means (fp64 [b, d], or 0). matrix: the address of the moments "
      "[b, m, m] beside the eigenvalues, or 0. Returns what eigvalsh does.");
  m.def(
      "left_out_moments", &left_out_moments, py::arg("x"), py::arg("groups"), py::arg("values"),
      py::arg("raw"), py::arg("info"), py::arg("threads"),
      "Ascending eigenvalues of the centred fp64 moments of x[b, n, d] without samples g, g + groups, ... "
      "for "
      "every g, to the address values[b, groups, d], and those of rows as they are to raw, or 0. info as for "
      "moments, of b groups entries. Returns what eigvalsh does, or None, having done nothing, for sizes "
      "that "
      "are not solved in lanes.");
  m.def(
      "refine", &refine, py::arg("x"), py::arg("at"), py::arg("batch"), py::arg("centred"), py::arg("stage"),
      py::arg("results"), py::arg("info"), py::arg("threads"),
      "One stage of refinement of matrices at[batch] (int64) of x[b, n, d]. stage: its number and the share "
      "of the largest eigenvalue under which others are small. results: the addresses of eigenvalues "
      "[batch, m], vectors [batch, m, m rounded up to 8], their numbers by stage [batch, 3] (int64) and the "
      "norms of their residuals [batch]. info as for moments, without means. Returns what eigvalsh does.");
  m.def(
      "refined_moments", &refined_moments, py::arg("x"), py::arg("limits"), py::arg("results"),
      py::arg("info"), py::arg("second"), py::arg("threads"),
      "Ascending eigenvalues of the centred fp64 moments of x[b, n, d], and a second stage of refinement of "
      "those whose effective rank may be off by more than the first of `limits`, the second being the share "
      "of "
      "the largest eigenvalue under which others are small. results: the addresses of values[b, m] and of "
      "those of rows as they are, or 0. info as for moments, without means. second: of centred rows and of "
      "rows as they are, the addresses of values of the second stage [b, m], the numbers of leading vectors "
      "(int64, 0: no second stage), the norms of their residuals, and traces [b]. Returns what eigvalsh "
      "does, "
      "or None, having done nothing, for sizes that are not solved in lanes.");
  m.def("effective_ranks", &effective_ranks, py::arg("x"), py::arg("centred"), py::arg("variance"),
        py::arg("rank"), py::arg("scratch"), py::arg("threads"),
        "fp64 effective ranks of x[b, n, d] to address `rank`. scratch: the address of b (4 + m) items of 8 "
        "bytes, m = min(n, d), which become what `moments` calls info, the bounds on the relative error of "
        "the singular effective rank (fp64), and the eigenvalues. Returns what eigvalsh does and the largest "
        "bound.");
  m.def(
      "eigvalsh_workspace",
      [](bool fp64, std::int64_t batch, std::int64_t d) {
        return spectrum::eigvalsh_workspace(fp64 ? DType::f64 : DType::f32, batch, d);
      },
      py::arg("fp64"), py::arg("batch"), py::arg("d"),
      "Bytes of scratch that eigvalsh takes per thread for d x d matrices.");
}

}  // namespace rgfast::bind
