#include <algorithm>
#include <cstddef>
#include <limits>
#include <vector>

#include "kernels/spectrum.hpp"
#include "kernels/spectrum_solve.hpp"
#include "kernels/spectrum_task.hpp"
#include "rgfast/parallel.hpp"
#include "rgfast/workspace.hpp"

namespace rgfast::spectrum {
namespace {

constexpr std::int64_t kManyRows =
    128;  // above, a task takes one group: the triangles of more leave the cache

// Fills a buffer with the moments of one group of matrices, what is settled taken out.
struct Source {
  const GramKernels& kernel;
  const View& x;
  const Refinement& step;
  const MomentInfo& info;
  std::int64_t first;
  double* buffer;
  std::int64_t stride;
  std::int64_t size;
  void* workspace;

  void fill(int from, int count) const {
    const std::int64_t m = std::min(x.size(-2), x.size(-1));
    for (int i = 0; i < count; ++i) {
      const std::int64_t index = first + from + i;
      GramTask task = moment_of(x, step.centred, step.at[index]);
      task.c = buffer + i * size;
      task.stride = stride;
      task.project = step.vectors + index * m * step.stride;
      task.project_stride = step.stride;
      task.ends = step.ends + index * kRefineStages;
      task.stages = step.stage;
      task.workspace = workspace;
      const GramResult result = kernel.run(task);
      info.accumulated[index] = result.accumulated;
      info.exponent[index] = result.exponent;
      info.rank_limit[index] = result.rank_limit;
    }
  }
};

}  // namespace

Status refine(const View& x, std::int64_t batch, const Refinement& step, double* values,
              const MomentInfo& info, int threads) {
  const GramKernels kernel = active_gram_kernels();
  const EigenKernels<double> solver = active_eigen_kernels<double>();
  const std::int64_t n = x.size(-2);
  const std::int64_t d = x.size(-1);
  const std::int64_t m = std::min(n, d);
  if (batch == 0) return {};
  threads = useful_threads(threads, batch, eigen_products(m) + n * d * m / 2);
  const std::int64_t stride = kernel.stride(m);
  const std::int64_t size = stride * stride;
  const std::int64_t each = m > kManyRows ? solver.lanes : task_size(solver, batch, threads);
  const std::size_t for_solver = aligned(solver.leading_workspace(m, static_cast<int>(each / solver.lanes)));
  const std::size_t for_gram = aligned(kernel.workspace(moment_of(x, step.centred, 0)));
  const double share = step.stage + 1 == kRefineStages ? std::numeric_limits<double>::infinity() : step.share;
  std::vector<unsigned char> trouble(static_cast<std::size_t>(batch));
  parallel_for((batch + each - 1) / each, threads, [&](std::int64_t index, int) {
    const std::int64_t first = index * each;
    const std::int64_t count = std::min(each, batch - first);
    const Workspace workspace(for_solver + for_gram +
                              sizeof(double) * static_cast<std::size_t>(solver.lanes * size));
    auto* const bytes = static_cast<std::byte*>(workspace.data());
    auto* const buffer = reinterpret_cast<double*>(bytes + for_solver + for_gram);
    Source source{kernel, x, step, info, first, buffer, stride, size, bytes + for_solver};
    std::vector<long long> offsets(static_cast<std::size_t>(solver.lanes + count));
    std::vector<long long> from(static_cast<std::size_t>(count));
    std::vector<long long> found(static_cast<std::size_t>(count));
    for (int lane = 0; lane < solver.lanes; ++lane) offsets[static_cast<std::size_t>(lane)] = lane * size;
    for (std::int64_t i = 0; i < count; ++i) {
      const auto at = static_cast<std::size_t>(i);
      offsets[static_cast<std::size_t>(solver.lanes) + at] = (first + i) * m;
      from[at] = step.stage == 0 ? 0 : step.ends[(first + i) * kRefineStages + step.stage - 1];
    }
    const LeadingTask leading{share,
                              step.vectors + first * m * step.stride,
                              m * step.stride,
                              step.stride,
                              from.data(),
                              found.data(),
                              step.residual + first};
    EigenTask<double> task{};
    task.a = buffer;
    task.values = values;
    task.offsets = offsets.data();
    task.values_offsets = offsets.data() + solver.lanes;
    task.count = static_cast<int>(count);
    task.n = m;
    task.row_stride = 1;
    task.column_stride = stride;
    task.values_stride = 1;
    task.trouble = trouble.data() + first;
    task.workspace = bytes;
    task.fill = [](void* context, int start, int some) { static_cast<Source*>(context)->fill(start, some); };
    task.context = &source;
    task.leading = &leading;
    solver.lanes_run(task);
    for (std::int64_t i = 0; i < count; ++i) {
      const auto at = static_cast<std::size_t>(i);
      step.ends[(first + i) * kRefineStages + step.stage] = from[at] + found[at];
    }
  });
  return first_trouble(trouble);
}

}  // namespace rgfast::spectrum
