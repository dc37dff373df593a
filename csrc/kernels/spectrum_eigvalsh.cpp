#include <algorithm>
#include <cstddef>
#include <vector>

#include "kernels/spectrum.hpp"
#include "kernels/spectrum_solve.hpp"
#include "kernels/spectrum_task.hpp"
#include "rgfast/isa.hpp"
#include "rgfast/parallel.hpp"
#include "rgfast/workspace.hpp"

#define RGFAST_TARGET_FILE "kernels/spectrum_eigvalsh-inl.hpp"
#include "rgfast/foreach_target.hpp"

namespace rgfast::spectrum {

template <>
EigenKernels<double> active_eigen_kernels<double>() {
  static constexpr IsaTable<EigenKernels<double> (*)()> table = RGFAST_ISA_TABLE(eigen_kernels_double);
  return table.active()();
}

template <>
EigenKernels<float> active_eigen_kernels<float>() {
  static constexpr IsaTable<EigenKernels<float> (*)()> table = RGFAST_ISA_TABLE(eigen_kernels_float);
  return table.active()();
}

namespace {

template <class T>
Status solve(const View& a, const View& values, int threads, Route route) {
  const EigenKernels<T> kernel = active_eigen_kernels<T>();
  const std::int64_t batch = a.batch(2);
  const std::int64_t n = a.size(-1);
  if (batch == 0 || n == 0) return {};
  threads = useful_threads(threads, batch, eigen_products(n));
  T* const out = values.item<T>(0, 1);
  if (!takes_lanes(kernel, batch, n, route)) {
    const auto reduce = [&](std::int64_t index, SingleTask<T>& task) {
      const Workspace workspace(kernel.single_workspace(n, task.stride));
      task.a = a.item<T>(index, 2);
      task.row_stride = a.stride(-2);
      task.column_stride = a.stride(-1);
      task.workspace = workspace.data();
      kernel.single_run(task);
    };
    return solve_singly(kernel, batch, n, threads, Results<T>{out, values.stride(-1)}, reduce,
                        [&](std::int64_t index) { return values.batch_offset(index, 1); });
  }
  std::vector<unsigned char> trouble(static_cast<std::size_t>(batch));
  const std::int64_t each = task_size(kernel, batch, threads);
  parallel_for((batch + each - 1) / each, threads, [&](std::int64_t index, int) {
    const Workspace workspace(kernel.lanes_workspace(n));
    const std::int64_t first = index * each;
    const std::int64_t count = std::min(each, batch - first);
    std::vector<long long> offsets(static_cast<std::size_t>(2 * count));
    for (std::int64_t i = 0; i < count; ++i) {
      offsets[static_cast<std::size_t>(i)] = a.batch_offset(first + i, 2);
      offsets[static_cast<std::size_t>(count + i)] = values.batch_offset(first + i, 1);
    }
    EigenTask<T> task{};
    task.a = a.item<T>(0, 2);
    task.values = out;
    task.offsets = offsets.data();
    task.values_offsets = offsets.data() + count;
    task.count = static_cast<int>(count);
    task.n = n;
    task.row_stride = a.stride(-2);
    task.column_stride = a.stride(-1);
    task.values_stride = values.stride(-1);
    task.trouble = trouble.data() + first;
    task.workspace = workspace.data();
    kernel.lanes_run(task);
  });
  return first_trouble(trouble);
}

template <class T>
std::size_t workspace_of(std::int64_t batch, std::int64_t n) {
  const EigenKernels<T> kernel = active_eigen_kernels<T>();
  if (takes_lanes(kernel, batch, n, Route::choose)) return kernel.lanes_workspace(n);
  return std::max(kernel.single_workspace(n, kernel.single_stride(n)), kernel.tridiagonal_workspace(n));
}

}  // namespace

Status eigvalsh(const View& a, const View& values, int threads, Route route) {
  return a.dtype == DType::f64 ? solve<double>(a, values, threads, route)
                               : solve<float>(a, values, threads, route);
}

std::size_t eigvalsh_workspace(DType dtype, std::int64_t batch, std::int64_t d) {
  return dtype == DType::f64 ? workspace_of<double>(batch, d) : workspace_of<float>(batch, d);
}

}  // namespace rgfast::spectrum
