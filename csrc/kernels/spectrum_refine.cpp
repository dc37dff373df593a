#include <algorithm>
#include <cmath>
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

// As rgfast/ops/spectrum/trailing.py has them, which computes these few from the rows.
constexpr std::int64_t kTrailingFrom = 96;
constexpr long long kFew = 16;

void tell(const MomentInfo& info, std::int64_t index, const GramResult& result) {
  info.accumulated[index] = result.accumulated;
  info.exponent[index] = result.exponent;
  info.rank_limit[index] = result.rank_limit;
}

// Fills a buffer with the moments of one group of matrices, what is settled taken out.
struct Source {
  const GramKernels& kernel;
  const View& x;
  const Refinement& step;
  const MomentInfo& info;
  std::int64_t first;
  Lanes to;

  void fill(int from, int count) const {
    const std::int64_t m = std::min(x.size(-2), x.size(-1));
    for (int i = 0; i < count; ++i) {
      const std::int64_t index = first + from + i;
      GramTask task = moment_of(x, step.centred, step.at[index]);
      task.c = to.buffer + i * to.size;
      task.stride = to.stride;
      task.project = step.vectors + index * m * step.stride;
      task.project_stride = step.stride;
      task.ends = step.ends + index * kRefineStages;
      task.stages = step.stage;
      task.workspace = to.workspace;
      tell(info, index, kernel.run(task));
    }
  }
};

// The first stage of matrices that follow each other, and the second of the chosen ones among them.
struct Both {
  const GramKernels& kernel;
  const View& x;
  const MomentInfo& info;
  std::int64_t first;
  std::int64_t columns;  // of a vector
  Lanes to;
  // For the second:
  bool centred = true;
  const double* vectors = nullptr;  // [matrix][m][columns]
  const long long* found = nullptr;
  double* trace = nullptr;
  std::vector<std::int64_t> chosen = {};

  GramTask task(std::int64_t index, int lane) const {
    GramTask gram = moment_of(x, centred, index);
    gram.c = to.buffer + lane * to.size;
    gram.stride = to.stride;
    gram.workspace = to.workspace;
    return gram;
  }

  void fill_first(int from, int count) const {
    for (int i = 0; i < count; ++i) {
      GramTask gram = task(first + from + i, i);
      gram.next = i + 1 < count ? moment_of(x, centred, first + from + i + 1).x : nullptr;
      gram.mean = to.means == nullptr ? nullptr : to.means + i * gram.d;
      tell(info, first + from + i, kernel.run(gram));
      // As the solver takes it: n mean mean' is that of this.
      const double root = std::sqrt(static_cast<double>(gram.n));
      for (std::int64_t j = 0; gram.mean != nullptr && j < gram.d; ++j) gram.mean[j] *= root;
    }
  }

  void fill_second(int from, int count) const {
    for (int i = 0; i < count; ++i) {
      const std::int64_t own = chosen[static_cast<std::size_t>(from + i)];
      GramTask gram = task(first + own, i);
      gram.project = vectors + own * std::min(gram.n, gram.d) * columns;
      gram.project_stride = columns;
      gram.ends = found + own;
      gram.stages = 1;
      trace[first + own] = kernel.run(gram).accumulated;
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
    const Lanes lanes{solver.lanes, buffer, nullptr, stride, size, bytes + for_solver};
    Source source{kernel, x, step, info, first, lanes};
    std::vector<long long> from(static_cast<std::size_t>(count));
    std::vector<long long> found(static_cast<std::size_t>(count));
    for (std::int64_t i = 0; step.stage > 0 && i < count; ++i)
      from[static_cast<std::size_t>(i)] = step.ends[(first + i) * kRefineStages + step.stage - 1];
    const LeadingTask leading{share,
                              -1.0,
                              m,
                              0,
                              step.vectors + first * m * step.stride,
                              m * step.stride,
                              step.stride,
                              from.data(),
                              found.data(),
                              step.residual + first};
    MomentsTask moments(lanes, first, count, m, trouble.data() + first, bytes);
    moments.task.values = values;
    moments.task.leading = &leading;
    moments.fill_from<&Source::fill>(source);
    solver.lanes_run(moments.task);
    for (std::int64_t i = 0; i < count; ++i) {
      const auto at = static_cast<std::size_t>(i);
      step.ends[(first + i) * kRefineStages + step.stage] = from[at] + found[at];
    }
  });
  return first_trouble(trouble);
}

bool refined_eigenvalues(const View& x, double doubt, double share, double* values, double* raw,
                         const MomentInfo& info, const SecondStage* second, int threads, Status& status) {
  const GramKernels kernel = active_gram_kernels();
  const EigenKernels<double> solver = active_eigen_kernels<double>();
  const std::int64_t n = x.size(-2);
  const std::int64_t d = x.size(-1);
  const std::int64_t m = std::min(n, d);
  const std::int64_t batch = x.batch(2);
  if (!takes_lanes(solver, batch, m, Route::choose)) return false;
  status = {};
  if (batch == 0) return true;
  threads = useful_threads(threads, batch, eigen_products(m) + n * d * m / 2);
  const bool lifted = raw != nullptr;
  const int ways = lifted ? 2 : 1;
  const std::int64_t stride = kernel.stride(m);
  const std::int64_t size = stride * stride;
  const std::int64_t columns = (m + 7) / 8 * 8;
  const std::int64_t each = m > kManyRows ? solver.lanes : task_size(solver, batch, threads, lifted);
  const std::size_t for_solver = aligned(solver.leading_workspace(m, static_cast<int>(each / solver.lanes)));
  const std::size_t for_gram = aligned(kernel.workspace(moment_of(x, true, 0)));
  std::vector<unsigned char> trouble(static_cast<std::size_t>(batch));
  parallel_for((batch + each - 1) / each, threads, [&](std::int64_t index, int) {
    const std::int64_t first = index * each;
    const std::int64_t count = std::min(each, batch - first);
    const Workspace workspace(
        for_solver + for_gram +
        sizeof(double) * static_cast<std::size_t>(solver.lanes * (size + d) + ways * count * m * columns));
    auto* const bytes = static_cast<std::byte*>(workspace.data());
    auto* const buffer = reinterpret_cast<double*>(bytes + for_solver + for_gram);
    double* const means = buffer + solver.lanes * size;
    double* const vectors = means + solver.lanes * d;
    const Lanes lanes{solver.lanes, buffer, lifted ? means : nullptr, stride, size, bytes + for_solver};
    Both both{kernel, x, info, first, columns, lanes};
    const std::vector<long long> from(static_cast<std::size_t>(count));
    LeadingTask leading[2];
    for (int way = 0; way < ways; ++way)
      leading[way] = {share,
                      doubt,
                      way == 0 ? n - 1 : n,
                      n >= d && d >= kTrailingFrom ? kFew : 0,
                      vectors + way * count * m * columns,
                      m * columns,
                      columns,
                      from.data(),
                      second[way].count + first,
                      second[way].residual + first};
    MomentsTask moments(lanes, first, count, m, trouble.data() + first, bytes);
    EigenTask<double>& task = moments.task;
    task.values = values;
    task.raw = raw;
    task.leading = &leading[0];
    task.leading_raw = lifted ? &leading[1] : nullptr;
    moments.fill_from<&Both::fill_first>(both);
    solver.lanes_run(task);

    task.raw = nullptr;
    task.leading = task.leading_raw = nullptr;
    moments.fill_from<&Both::fill_second>(both);
    for (int way = 0; way < ways; ++way) {
      both.centred = way == 0;
      both.vectors = leading[way].vectors;
      both.found = leading[way].count;
      both.trace = second[way].trace;
      both.chosen.clear();
      for (std::int64_t i = 0; i < count; ++i)
        if (both.found[i] > 0) {
          moments.place(both.chosen.size(), first + i);
          both.chosen.push_back(i);
        }
      std::vector<unsigned char> stuck(both.chosen.size());
      task.values = second[way].values;
      task.count = static_cast<int>(stuck.size());
      task.trouble = stuck.data();
      if (task.count > 0) solver.lanes_run(task);
      for (std::size_t i = 0; i < stuck.size(); ++i)
        if (stuck[i] != 0) trouble[static_cast<std::size_t>(first + both.chosen[i])] = stuck[i];
    }
  });
  status = first_trouble(trouble);
  return true;
}

}  // namespace rgfast::spectrum
