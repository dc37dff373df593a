#include <algorithm>
#include <array>
#include <cmath>
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

GramKernels active_gram_kernels() {
  static constexpr IsaTable<GramKernels (*)()> table = RGFAST_ISA_TABLE(gram_kernels);
  return table.active()();
}

GramTask moment_of(const View& x, bool centred, std::int64_t index) {
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

namespace {

constexpr std::size_t kMostLanes = 8;  // fp64 values of a vector of any instruction set
// Up to so many features, and so many data of a matrix, it is sooner done in lanes: the README has figures.
constexpr std::int64_t kMostSmall = 16;
constexpr std::int64_t kMostSmallData = 8192;

void tell(const MomentInfo& info, std::int64_t index, const GramResult& result) {
  info.accumulated[index] = result.accumulated;
  info.exponent[index] = result.exponent;
  info.rank_limit[index] = result.rank_limit;
}

// The mean as the solver takes it: n mean mean' is that of this.
void scale_mean(double* mean, std::int64_t d, std::int64_t samples) {
  const double root = std::sqrt(static_cast<double>(samples));
  for (std::int64_t j = 0; j < d; ++j) mean[j] *= root;
}

// A lower triangle c, column-major, as a whole symmetric matrix: by blocks that stay in the first-level
// cache.
void spread(const double* c, std::int64_t stride, std::int64_t m, double* out) {
  constexpr std::int64_t kSide = 16;
  for (std::int64_t j0 = 0; j0 < m; j0 += kSide)
    for (std::int64_t i0 = j0; i0 < m; i0 += kSide)
      for (std::int64_t j = j0; j < std::min(j0 + kSide, m); ++j)
        for (std::int64_t i = std::max(i0, j); i < std::min(i0 + kSide, m); ++i)
          out[j * m + i] = out[i * m + j] = c[j * stride + i];
}

// The mean and the moment that were asked for beside the eigenvalues.
void keep(const MomentInfo& info, std::int64_t index, const GramTask& task) {
  if (info.mean != nullptr) std::copy(task.mean, task.mean + task.d, info.mean + index * task.d);
  if (info.matrix == nullptr) return;
  const std::int64_t m = std::min(task.n, task.d);
  spread(task.c, task.stride, m, info.matrix + index * m * m);
}

// Fills a buffer with the moments of one group of matrices.
struct Source {
  const GramKernels& kernel;
  const View& x;
  bool centred;
  bool lifted;  // the means go to the solver
  const MomentInfo& info;
  std::int64_t first;
  Lanes to;

  void fill(int from, int count) {
    for (int i = 0; i < count; ++i) {
      GramTask task = moment_of(x, centred, first + from + i);
      task.next = i + 1 < count ? moment_of(x, centred, first + from + i + 1).x : nullptr;
      task.c = to.buffer + i * to.size;
      double* const own = info.mean == nullptr ? nullptr : info.mean + (first + from + i) * task.d;
      task.mean = lifted ? to.means + i * task.d : own;
      task.stride = to.stride;
      task.workspace = to.workspace;
      tell(info, first + from + i, kernel.run(task));
      keep(info, first + from + i, task);
      if (lifted) scale_mean(task.mean, task.d, task.n);
    }
  }
};

// Moments small enough to be formed in the lanes themselves.
struct SmallSource {
  const GramKernels& kernel;
  const View& x;
  bool centred;
  const MomentInfo& info;
  std::int64_t first;
  Lanes to;

  // `means`, unless null, as the solver takes them.
  void fill(int from, int count, double* packed, double* means) {
    const std::int64_t n = x.size(-2), d = x.size(-1);
    std::array<const void*, kMostLanes> begin{};
    std::array<GramResult, kMostLanes> results{};
    SmallTask task{moment_of(x, centred, first + from), begin.data(), packed, means, results.data()};
    task.shared.workspace = to.workspace;
    if (means == nullptr && info.mean != nullptr) task.means = to.means;
    for (std::int64_t lane = 0; lane < to.count; ++lane)
      begin[static_cast<std::size_t>(lane)] =
          moment_of(x, centred, first + from + (lane < count ? lane : 0)).x;
    kernel.run_small(task);
    for (std::int64_t lane = 0; lane < count; ++lane) {
      const std::int64_t index = first + from + lane;
      tell(info, index, results[static_cast<std::size_t>(lane)]);
      if (info.mean != nullptr)
        for (std::int64_t j = 0; j < d; ++j) info.mean[index * d + j] = task.means[j * to.count + lane];
      if (info.matrix == nullptr) continue;
      double* const out = info.matrix + index * d * d;
      const double* at = packed + lane;
      for (std::int64_t j = 0; j < d; ++j)
        for (std::int64_t i = j; i < d; ++i, at += to.count) out[i * d + j] = out[j * d + i] = *at;
    }
    if (means != nullptr) scale_mean(means, d * to.count, n);
  }
};

// The same with every group of samples left out in turn: matrix index / groups without group index % groups.
// The moments of the groups are kept for the matrices that follow.
struct LeftOut {
  const GramKernels& kernel;
  const View& x;
  std::int64_t groups;
  bool lifted;
  const MomentInfo& info;
  std::int64_t first;
  Lanes to;
  std::vector<long long> sizes = {};
  std::vector<double> parts = {}, means = {}, whole = {}, mean = {}, mean_left = {}, origin = {};
  PooledMoments all = {};
  std::int64_t held = -1;
  double accumulated = 0.0;

  void hold(std::int64_t matrix) {
    const std::int64_t n = x.size(-2), d = x.size(-1);
    if (held < 0) {
      for (std::int64_t g = 0; g < groups; ++g) sizes.push_back((n - g + groups - 1) / groups);
      parts.resize(static_cast<std::size_t>(groups * to.size));
      means.resize(static_cast<std::size_t>(groups * d));
      whole.resize(static_cast<std::size_t>(to.size));
      mean.resize(static_cast<std::size_t>(d));
      mean_left.resize(static_cast<std::size_t>(d));
      origin.resize(static_cast<std::size_t>(d));
      all = {parts.data(), origin.data(), means.data(), sizes.data(), groups, n, d,
             to.stride,    to.size,       whole.data(), mean.data(),  0.0};
    }
    held = matrix;
    accumulated = 0.0;
    kernel.first_row(moment_of(x, true, matrix), origin.data());
    for (std::int64_t g = 0; g < groups; ++g) {
      GramTask task = moment_of(x, true, matrix);
      task.x = static_cast<const std::byte*>(task.x) +
               g * task.row_stride * static_cast<std::int64_t>(item_size(x.dtype));
      task.row_stride *= groups;
      task.n = sizes[static_cast<std::size_t>(g)];
      task.tall = true;
      task.origin = origin.data();
      task.c = parts.data() + g * to.size;
      task.stride = to.stride;
      task.mean = means.data() + g * d;
      task.workspace = to.workspace;
      accumulated += kernel.run(task).accumulated;
    }
    kernel.pool(all);
    accumulated += all.between;
  }

  void fill(int from, int count) {
    for (int i = 0; i < count; ++i) {
      const std::int64_t index = first + from + i, group = index % groups;
      if (index / groups != held) hold(index / groups);
      double* const c = to.buffer + i * to.size;
      double* const other = !lifted ? mean_left.data() : to.means + i * all.d;
      kernel.leave_out(all, group, c, other);
      std::int64_t live = 0;
      for (std::int64_t j = 0; j < all.d; ++j) live += c[j * to.stride + j] > 0.0 ? 1 : 0;
      const std::int64_t rest = all.n - sizes[static_cast<std::size_t>(group)];
      scale_mean(other, all.d, rest);
      tell(info, index, {accumulated, 0, std::min(rest - 1, live)});
    }
  }
};

// Solves so many matrices of m rows in lanes. make(first, lanes) gives what fills these with matrices from
// the first on, in `scratch` bytes; stride 0: the lanes of the solver themselves.
template <class Make>
Status solve_in_lanes(const EigenKernels<double>& solver, std::int64_t batch, std::int64_t m, int threads,
                      std::int64_t stride, std::size_t scratch, const Results<double>& out,
                      const Make& make) {
  const std::int64_t size = stride * stride;
  const bool lifted = out.raw != nullptr;
  std::vector<unsigned char> trouble(static_cast<std::size_t>(batch));
  const std::int64_t each = task_size(solver, batch, threads, lifted);
  parallel_for((batch + each - 1) / each, threads, [&](std::int64_t index, int) {
    const std::int64_t first = index * each;
    const std::int64_t count = std::min(each, batch - first);
    const std::size_t for_solver = aligned(solver.lanes_workspace(m));
    const Workspace workspace(for_solver + aligned(scratch) +
                              sizeof(double) * static_cast<std::size_t>(solver.lanes * (size + m)));
    auto* const bytes = static_cast<std::byte*>(workspace.data());
    auto* const means = reinterpret_cast<double*>(bytes + for_solver + aligned(scratch));
    const Lanes lanes{solver.lanes, means + solver.lanes * m, means, stride, size, bytes + for_solver};
    auto source = make(first, lanes);
    MomentsTask moments(lanes, first, count, m, trouble.data() + first, bytes);
    moments.task.values = out.values;
    moments.task.raw = out.raw;
    moments.template fill_from<&decltype(source)::fill>(source);
    solver.lanes_run(moments.task);
  });
  return first_trouble(trouble);
}

}  // namespace

void gram(const View& x, bool centred, double* matrix, const MomentInfo& info, int threads) {
  const GramKernels kernel = active_gram_kernels();
  const std::int64_t n = x.size(-2);
  const std::int64_t d = x.size(-1);
  const std::int64_t m = std::min(n, d);
  const std::int64_t stride = kernel.stride(m);
  threads = useful_threads(threads, x.batch(2), n * d * (m + 30) / 2);
  parallel_for(x.batch(2), threads, [&](std::int64_t index, int) {
    const std::size_t scratch = aligned(kernel.workspace(moment_of(x, centred, 0)));
    const Workspace workspace(scratch + sizeof(double) * static_cast<std::size_t>(stride * stride));
    GramTask task = moment_of(x, centred, index);
    task.workspace = workspace.data();
    task.stride = stride;
    task.mean = info.mean == nullptr ? nullptr : info.mean + index * d;
    task.c = reinterpret_cast<double*>(static_cast<std::byte*>(workspace.data()) + scratch);
    tell(info, index, kernel.run(task));
    spread(task.c, stride, m, matrix + index * m * m);
  });
}

Status gram_eigenvalues(const View& x, bool centred, double* values, double* raw, const MomentInfo& info,
                        int threads, Route route) {
  const GramKernels kernel = active_gram_kernels();
  const EigenKernels<double> solver = active_eigen_kernels<double>();
  const std::int64_t batch = x.batch(2);
  const std::int64_t n = x.size(-2);
  const std::int64_t d = x.size(-1);
  const std::int64_t m = std::min(n, d);
  if (batch == 0) return {};
  threads = useful_threads(threads, batch, eigen_products(m) + n * d * m / 2);
  const Results<double> results{values, 1, raw};
  if (!takes_lanes(solver, batch, m, route)) {
    const auto reduce = [&](std::int64_t index, SingleTask<double>& task) {
      GramTask gram = moment_of(x, centred, index);
      const std::size_t for_solver = aligned(solver.single_workspace(m, task.stride));
      const std::size_t for_gram = aligned(kernel.workspace(gram));
      const Workspace workspace(for_solver + for_gram + sizeof(double) * static_cast<std::size_t>(d));
      auto* const bytes = static_cast<std::byte*>(workspace.data());
      task.workspace = bytes;
      gram.c = reinterpret_cast<double*>(bytes);
      gram.stride = task.stride;
      gram.workspace = bytes + for_solver;
      gram.mean = reinterpret_cast<double*>(bytes + for_solver + for_gram);
      if (raw != nullptr) task.mean = gram.mean;
      tell(info, index, kernel.run(gram));
      keep(info, index, gram);
      if (raw != nullptr) scale_mean(gram.mean, d, n);
      solver.single_run(task);
    };
    return solve_singly(solver, batch, m, threads, results, reduce,
                        [m](std::int64_t index) { return index * m; });
  }
  if (n >= d && d <= kMostSmall && n * d <= kMostSmallData)
    return solve_in_lanes(solver, batch, m, threads, 0, kernel.small_workspace(n, d), results,
                          [&](std::int64_t first, const Lanes& to) {
                            return SmallSource{kernel, x, centred, info, first, to};
                          });
  return solve_in_lanes(solver, batch, m, threads, kernel.stride(m),
                        kernel.workspace(moment_of(x, centred, 0)), results,
                        [&](std::int64_t first, const Lanes& to) {
                          return Source{kernel, x, centred, raw != nullptr, info, first, to};
                        });
}

bool left_out_eigenvalues(const View& x, std::int64_t groups, double* values, double* raw,
                          const MomentInfo& info, int threads, Status& status) {
  const GramKernels kernel = active_gram_kernels();
  const EigenKernels<double> solver = active_eigen_kernels<double>();
  const std::int64_t n = x.size(-2);
  const std::int64_t d = x.size(-1);
  const std::int64_t batch = x.batch(2) * groups;
  if (!takes_lanes(solver, batch, d, Route::choose)) return false;
  status = {};
  if (batch == 0) return true;
  threads = useful_threads(threads, batch, eigen_products(d) + n * d * d / (2 * groups));
  GramTask task = moment_of(x, true, 0);
  task.tall = true;
  status = solve_in_lanes(solver, batch, d, threads, kernel.stride(d), kernel.workspace(task),
                          Results<double>{values, 1, raw}, [&](std::int64_t first, const Lanes& to) {
                            return LeftOut{kernel, x, groups, raw != nullptr, info, first, to};
                          });
  return true;
}

}  // namespace rgfast::spectrum
