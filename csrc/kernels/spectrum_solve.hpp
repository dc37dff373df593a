// What eigvalsh and gram_eigenvalues share: choosing the route, and the second half of the single one.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <type_traits>
#include <vector>

#include "kernels/spectrum.hpp"
#include "kernels/spectrum_task.hpp"
#include "rgfast/parallel.hpp"
#include "rgfast/workspace.hpp"

namespace rgfast::spectrum {

// A group costs the same however full it is; a single matrix costs less than a full lane's share only where
// the triangles of a whole group outgrow the cache. Measured, see the README of the op.
template <class T>
bool takes_lanes(const EigenKernels<T>& kernel, std::int64_t batch, std::int64_t n, Route route) {
  if (route != Route::choose) return route == Route::lanes;
  if (n <= 12) return batch > 1;
  if (n > 256) return false;
  const std::int64_t filled = std::min<std::int64_t>(batch, kernel.lanes);
  return n <= 64 ? filled * 2 > kernel.lanes : filled * 4 > kernel.lanes * 3;
}

// Waking a thread costs tens of microseconds, and on a busy machine a woken one may keep the caller waiting:
// no more threads than have a tenth of a millisecond each to do. `products` is about what one core does
// 16,000 of in a microsecond.
inline int useful_threads(int threads, std::int64_t batch, std::int64_t products) {
  const double microseconds = static_cast<double>(batch) * static_cast<double>(products) / 16e3;
  return static_cast<int>(std::min(static_cast<double>(threads), 1.0 + microseconds / 100.0));
}

inline std::int64_t eigen_products(std::int64_t n) { return n * n * (n + 30); }

// As many matrices to a task as fill `groups` groups, but no more than leave every thread a task. A lifted
// matrix beside every one takes a group too.
template <class T>
std::int64_t task_size(const EigenKernels<T>& kernel, std::int64_t batch, int threads, bool lifted = false) {
  const std::int64_t groups = (batch + kernel.lanes - 1) / kernel.lanes;
  return std::clamp<std::int64_t>(groups / threads, 1, lifted ? kernel.groups / 2 : kernel.groups) *
         kernel.lanes;
}

// The task that makes the moment of matrix `index` of x[b, n, d]: all but where to.
GramTask moment_of(const View& x, bool centred, std::int64_t index);

// What the lanes of a task are filled with: moments, a vector of them at a time.
struct Lanes {
  std::int64_t count;
  double* buffer;  // [count, m, stride]; null for what fills the lanes itself
  double* means;   // [count, m], or null
  std::int64_t stride;
  std::int64_t size;
  void* workspace;  // of the moment's kernel
};

// The task that solves matrices first, ..., first + count - 1 of m rows from such lanes. Set by the caller:
// where values go, and, by fill_from, what puts the moments there.
struct MomentsTask {
  std::vector<long long> offsets;
  std::size_t lanes;
  EigenTask<double> task{};

  MomentsTask(const Lanes& from, std::int64_t first, std::int64_t count, std::int64_t m,
              unsigned char* trouble, void* workspace)
      : offsets(static_cast<std::size_t>(from.count + count)), lanes(static_cast<std::size_t>(from.count)) {
    for (std::size_t lane = 0; lane < lanes; ++lane) offsets[lane] = static_cast<long long>(lane) * from.size;
    task.n = m;
    for (std::int64_t i = 0; i < count; ++i) place(static_cast<std::size_t>(i), first + i);
    task.a = from.buffer;
    task.means = from.means;
    task.offsets = offsets.data();
    task.values_offsets = offsets.data() + lanes;
    task.count = static_cast<int>(count);
    task.row_stride = 1;
    task.column_stride = from.stride;
    task.values_stride = 1;
    task.trouble = trouble;
    task.workspace = workspace;
  }

  // The values of matrix i of the task are number `index` of all.
  void place(std::size_t i, std::int64_t index) { offsets[lanes + i] = index * task.n; }

  template <auto Fill, class Source>
  void fill_from(Source& source) {
    task.context = &source;
    if constexpr (std::is_invocable_v<decltype(Fill), Source&, int, int>)
      task.fill = [](void* context, int from, int some) {
        (static_cast<Source*>(context)->*Fill)(from, some);
      };
    else
      task.fill_lanes = [](void* context, int from, int some, double* packed, double* means) {
        (static_cast<Source*>(context)->*Fill)(from, some, packed, means);
      };
  }
};

inline Status first_trouble(const std::vector<unsigned char>& trouble) {
  const auto found =
      std::find_if(trouble.begin(), trouble.end(), [](unsigned char code) { return code != 0; });
  if (found == trouble.end()) return {};
  return {found - trouble.begin(), static_cast<Trouble>(*found)};
}

inline std::size_t aligned(std::size_t bytes) { return (bytes + 63) / 64 * 64; }

// Where results go: eigenvalues, and, unless null, those of the matrices with mean mean' added.
template <class T>
struct Results {
  T* values;
  std::int64_t stride;
  T* raw = nullptr;
};

// Calls reduce(index, task) for every matrix, which sets what is the source's in the task, workspace too (and
// the mean, for raw results), and runs it; then solves the tridiagonal matrices together, in lanes.
// offset(index) is that of a result.
template <class T, class Reduce, class Offset>
Status solve_singly(const EigenKernels<T>& kernel, std::int64_t batch, std::int64_t n, int threads,
                    const Results<T>& results, const Reduce& reduce, const Offset& offset) {
  const bool lifted = results.raw != nullptr;
  std::vector<unsigned char> trouble(static_cast<std::size_t>(batch));
  const std::unique_ptr<T[]> diagonal(new T[static_cast<std::size_t>(batch * n)]);
  const std::unique_ptr<T[]> off_squared(new T[static_cast<std::size_t>(batch * n)]);
  std::vector<int> exponents(static_cast<std::size_t>(batch));
  std::vector<T> squares(static_cast<std::size_t>(lifted ? batch : 0));
  parallel_for(batch, threads, [&](std::int64_t index, int) {
    SingleTask<T> task{};
    task.n = n;
    task.stride = kernel.single_stride(n);
    task.diagonal = diagonal.get() + index * n;
    task.off_squared = off_squared.get() + index * n;
    task.exponent = &exponents[static_cast<std::size_t>(index)];
    if (lifted) task.square = &squares[static_cast<std::size_t>(index)];
    reduce(index, task);
  });
  // Two matrices are sooner done one after the other than side by side in lanes that are mostly empty.
  const bool alone = batch <= 2;
  const std::int64_t each = alone ? 1 : task_size(kernel, batch, threads, lifted);
  parallel_for((batch + each - 1) / each, threads, [&](std::int64_t index, int) {
    const std::int64_t first = index * each;
    const std::int64_t count = std::min(each, batch - first);
    const Workspace workspace(kernel.tridiagonal_workspace(n));
    std::vector<long long> offsets(static_cast<std::size_t>(count));
    for (std::int64_t i = 0; i < count; ++i) offsets[static_cast<std::size_t>(i)] = offset(first + i);
    TridiagonalTask<T> task{};
    task.diagonal = diagonal.get() + first * n;
    task.off_squared = off_squared.get() + first * n;
    task.exponents = exponents.data() + first;
    if (lifted) task.squares = squares.data() + first;
    task.values = results.values;
    task.raw = results.raw;
    task.values_offsets = offsets.data();
    task.count = static_cast<int>(count);
    task.n = n;
    task.values_stride = results.stride;
    task.trouble = trouble.data() + first;
    task.workspace = workspace.data();
    task.alone = alone;
    kernel.tridiagonal_run(task);
  });
  return first_trouble(trouble);
}

}  // namespace rgfast::spectrum
