#include <algorithm>
#include <cstddef>
#include <vector>

#include "kernels/spectrum.hpp"
#include "kernels/spectrum_solve.hpp"
#include "kernels/spectrum_task.hpp"
#include "rgfast/isa.hpp"
#include "rgfast/parallel.hpp"
#include "rgfast/workspace.hpp"

#define RGFAST_TARGET_FILE "kernels/spectrum_gram-inl.hpp"
#include "rgfast/foreach_target.hpp"

namespace rgfast::spectrum {
namespace {

GramKernels grams() {
  static constexpr IsaTable<GramKernels (*)()> table = RGFAST_ISA_TABLE(gram_kernels);
  return table.active()();
}

GramTask task_for(const View& x, bool centred, std::int64_t index) {
  GramTask task{};
  task.x = x.data + x.batch_offset(index, 2) * static_cast<std::int64_t>(item_size(x.dtype));
  task.dtype = x.dtype;
  task.n = x.size(-2);
  task.d = x.size(-1);
  task.row_stride = x.stride(-2);
  task.column_stride = x.stride(-1);
  task.centred = centred;
  return task;
}

void tell(const MomentInfo& info, std::int64_t index, const GramResult& result) {
  info.accumulated[index] = result.accumulated;
  info.exponent[index] = result.exponent;
  info.rank_limit[index] = result.rank_limit;
}

// Fills a buffer with the moments of one group of matrices.
struct Source {
  const GramKernels& kernel;
  const View& x;
  bool centred;
  const MomentInfo& info;
  std::int64_t first;
  double* buffer;
  double* means;  // or null
  std::int64_t stride;
  std::int64_t size;
  void* workspace;

  void fill(int from, int count) const {
    for (int i = 0; i < count; ++i) {
      GramTask task = task_for(x, centred, first + from + i);
      task.c = buffer + i * size;
      task.mean = means == nullptr ? nullptr : means + i * task.d;
      task.stride = stride;
      task.workspace = workspace;
      tell(info, first + from + i, kernel.run(task));
    }
  }
};

}  // namespace

void gram(const View& x, bool centred, double* matrix, const MomentInfo& info, int threads) {
  const GramKernels kernel = grams();
  const std::int64_t n = x.size(-2);
  const std::int64_t d = x.size(-1);
  const std::int64_t m = std::min(n, d);
  const std::int64_t stride = kernel.stride(m);
  threads = useful_threads(threads, x.batch(2), n * d * (m + 30) / 2);
  parallel_for(x.batch(2), threads, [&](std::int64_t index, int) {
    const std::size_t scratch = aligned(kernel.workspace(task_for(x, centred, 0)));
    const Workspace workspace(scratch + sizeof(double) * static_cast<std::size_t>(stride * stride));
    GramTask task = task_for(x, centred, index);
    task.workspace = workspace.data();
    task.stride = stride;
    task.mean = info.mean == nullptr ? nullptr : info.mean + index * d;
    task.c = reinterpret_cast<double*>(static_cast<std::byte*>(workspace.data()) + scratch);
    tell(info, index, kernel.run(task));
    double* const out = matrix + index * m * m;
    constexpr std::int64_t kSide = 16;  // both triangles, by blocks that stay in the first-level cache
    for (std::int64_t j0 = 0; j0 < m; j0 += kSide)
      for (std::int64_t i0 = j0; i0 < m; i0 += kSide)
        for (std::int64_t j = j0; j < std::min(j0 + kSide, m); ++j)
          for (std::int64_t i = std::max(i0, j); i < std::min(i0 + kSide, m); ++i)
            out[j * m + i] = out[i * m + j] = task.c[j * stride + i];
  });
}

Status gram_eigenvalues(const View& x, bool centred, double* values, double* raw, const MomentInfo& info,
                        int threads, Route route) {
  const GramKernels kernel = grams();
  const EigenKernels<double> solver = active_eigen_kernels<double>();
  const std::int64_t batch = x.batch(2);
  const std::int64_t n = x.size(-2);
  const std::int64_t d = x.size(-1);
  const std::int64_t m = std::min(n, d);
  if (batch == 0) return {};
  threads = useful_threads(threads, batch, eigen_products(m) + n * d * m / 2);
  if (!takes_lanes(solver, batch, m, route)) {
    const auto reduce = [&](std::int64_t index, SingleTask<double>& task) {
      GramTask gram = task_for(x, centred, index);
      const std::size_t for_solver = aligned(solver.single_workspace(m, task.stride));
      const std::size_t for_gram = aligned(kernel.workspace(gram));
      const Workspace workspace(for_solver + for_gram + sizeof(double) * static_cast<std::size_t>(d));
      auto* const bytes = static_cast<std::byte*>(workspace.data());
      task.workspace = bytes;
      gram.c = reinterpret_cast<double*>(bytes);
      gram.stride = task.stride;
      gram.workspace = bytes + for_solver;
      if (raw != nullptr) task.mean = gram.mean = reinterpret_cast<double*>(bytes + for_solver + for_gram);
      tell(info, index, kernel.run(gram));
      solver.single_run(task);
    };
    const Results<double> results{values, 1, raw, static_cast<double>(n)};
    return solve_singly(solver, batch, m, threads, results, reduce,
                        [m](std::int64_t index) { return index * m; });
  }
  const std::int64_t stride = kernel.stride(m);
  const std::int64_t size = stride * stride;
  std::vector<unsigned char> trouble(static_cast<std::size_t>(batch));
  const std::int64_t each = task_size(solver, batch, threads, raw != nullptr);
  parallel_for((batch + each - 1) / each, threads, [&](std::int64_t index, int) {
    const std::int64_t first = index * each;
    const std::int64_t count = std::min(each, batch - first);
    const std::size_t for_solver = aligned(solver.lanes_workspace(m));
    const std::size_t for_gram = aligned(kernel.workspace(task_for(x, centred, 0)));
    const Workspace workspace(for_solver + for_gram +
                              sizeof(double) * static_cast<std::size_t>(solver.lanes * (size + d)));
    auto* const bytes = static_cast<std::byte*>(workspace.data());
    auto* const buffer = reinterpret_cast<double*>(bytes + for_solver + for_gram);
    double* const means = raw == nullptr ? nullptr : buffer + solver.lanes * size;
    Source source{kernel, x, centred, info, first, buffer, means, stride, size, bytes + for_solver};
    std::vector<long long> offsets(static_cast<std::size_t>(solver.lanes + count));
    for (int lane = 0; lane < solver.lanes; ++lane) offsets[static_cast<std::size_t>(lane)] = lane * size;
    for (std::int64_t i = 0; i < count; ++i)
      offsets[static_cast<std::size_t>(solver.lanes + i)] = (first + i) * m;
    EigenTask<double> task{};
    task.a = buffer;
    task.values = values;
    task.raw = raw;
    task.means = means;
    task.terms = static_cast<double>(n);
    task.offsets = offsets.data();
    task.values_offsets = offsets.data() + solver.lanes;
    task.count = static_cast<int>(count);
    task.n = m;
    task.row_stride = 1;
    task.column_stride = stride;
    task.values_stride = 1;
    task.trouble = trouble.data() + first;
    task.workspace = bytes;
    task.fill = [](void* context, int from, int some) { static_cast<Source*>(context)->fill(from, some); };
    task.context = &source;
    solver.lanes_run(task);
  });
  return first_trouble(trouble);
}

}  // namespace rgfast::spectrum
