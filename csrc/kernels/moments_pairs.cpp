#include "kernels/moments_pairs.hpp"

#include <algorithm>
#include <cstddef>
#include <initializer_list>
#include <type_traits>
#include <utility>
#include <vector>

#include "kernels/cka_job.hpp"
#include "kernels/moments_pairs_job.hpp"
#include "rgfast/isa.hpp"
#include "rgfast/parallel.hpp"
#include "rgfast/workspace.hpp"

#define RGFAST_TARGET_FILE "kernels/moments_pairs-inl.hpp"
#include "rgfast/foreach_target.hpp"

namespace rgfast::moments {
namespace {

PairKernels kernels() {
  static constexpr IsaTable<PairKernels (*)()> table = RGFAST_ISA_TABLE(pair_kernels);
  return table.active()();
}

// Pairs alone are enough tasks from here on; fewer are cut by position.
constexpr std::int64_t kTasks = 16;
constexpr std::int64_t kTile = 64;

std::int64_t rounded(std::int64_t count, std::int64_t unit) { return (count + unit - 1) / unit * unit; }

}  // namespace

void add_positions(const Rows& rows, std::int64_t positions, std::int64_t samples, double* to, int threads) {
  const PairKernels kernel = kernels();
  constexpr std::int64_t kEach = 32;
  const bool lengthy = positions * samples * rows.width >= 1 << 21;
  parallel_for((samples + kEach - 1) / kEach, threads, lengthy, [&](std::int64_t task, int) {
    for (std::int64_t i = task * kEach; i < std::min(samples, (task + 1) * kEach); ++i)
      kernel.add_rows(rows, positions, i, to + i * rows.width);
  });
}

void pair_products(const PairProblem& problem) {
  const auto pairs = static_cast<std::int64_t>(problem.pairs.size());
  if (pairs == 0 || problem.positions == 0) return;
  const PairKernels kernel = kernels();
  const std::int64_t lanes = kernel.lanes();
  std::int64_t widest = 0;
  for (const Rows& layer : problem.layers) widest = std::max(widest, layer.width);
  const std::int64_t line = rounded(widest, lanes), entries = line * line;
  const std::int64_t chunk = std::min(problem.samples, entries <= kSmallMoment ? kFewSamples : kManySamples);
  const std::int64_t panel = (chunk | 1) * lanes;
  // A layer beside itself is taken along by its first pair with another one.
  std::vector<std::int64_t> alone(problem.layers.size(), -1), first(problem.layers.size(), -1);
  for (std::int64_t k = 0; k < pairs; ++k) {
    const PairSums& pair = problem.pairs[static_cast<std::size_t>(k)];
    const auto i = static_cast<std::size_t>(pair.left), j = static_cast<std::size_t>(pair.right);
    if (i == j) alone[i] = k;
    if (i == j) continue;
    if (first[i] < 0) first[i] = k;
    if (first[j] < 0) first[j] = k;
  }
  const std::int64_t slices = std::clamp<std::int64_t>(kTasks / pairs, 1, problem.positions);
  std::vector<double> parts(static_cast<std::size_t>(slices > 1 ? pairs * slices * entries : 0));
  const std::size_t floats = static_cast<std::size_t>(rounded(line / lanes * panel, 16));
  const std::size_t doubles = static_cast<std::size_t>(rounded(6 * line, 8) + kTile * kTile + entries);
  parallel_for(pairs * slices, problem.threads, true, [&](std::int64_t task, int) {
    const std::int64_t index = task / slices, slice = task % slices;
    const PairSums& pair = problem.pairs[static_cast<std::size_t>(index)];
    const Workspace space(2 * floats * sizeof(float) + doubles * sizeof(double));
    auto* const base = static_cast<std::byte*>(space.data());
    PairJob job{};
    job.left = &problem.layers[static_cast<std::size_t>(pair.left)];
    job.right = &problem.layers[static_cast<std::size_t>(pair.right)];
    job.same = pair.left == pair.right;
    job.difference = !job.same && job.left->own != nullptr && job.left->width == job.right->width;
    job.samples = problem.samples;
    job.chunk = chunk;
    job.panel = panel;
    job.left_panels = reinterpret_cast<float*>(base);
    job.right_panels = job.left_panels + floats;
    job.lines = reinterpret_cast<double*>(base + 2 * floats * sizeof(float));
    job.line = line;
    job.tile = job.lines + rounded(6 * line, 8);
    job.cross = job.tile + kTile * kTile;
    job.total = slices > 1 ? parts.data() + task * entries : pair.total;
    const std::int64_t begin = problem.positions * slice / slices;
    const std::int64_t end = problem.positions * (slice + 1) / slices;
    for (job.position = begin; job.position < end; ++job.position) {
      const std::int64_t at = job.position * problem.stride;
      job.norm = pair.norm + job.position;
      if (!job.same) {
        job.products = pair.products + job.position;
        job.right_sums = pair.right_sums + at;
        job.left_sums = pair.left_sums + at;
      }
      const int sides[2] = {pair.left, pair.right};
      for (int side = 0; side < (job.same ? 1 : 2); ++side) {
        const auto layer = static_cast<std::size_t>(sides[side]);
        if (alone[layer] < 0 || (job.same ? first[layer] >= 0 : first[layer] != index)) continue;
        const PairSums& own = problem.pairs[static_cast<std::size_t>(alone[layer])];
        job.own[side] = {own.products + job.position, own.left_sums + at, own.right_sums + at};
      }
      job.moved_right = pair.moved_right == nullptr ? nullptr : pair.moved_right + at;
      job.moved_left = pair.moved_left == nullptr ? nullptr : pair.moved_left + at;
      kernel.run(job);
    }
  });
  if (slices == 1) return;
  parallel_for(pairs, problem.threads, [&](std::int64_t index, int) {
    const PairSums& pair = problem.pairs[static_cast<std::size_t>(index)];
    const std::int64_t count = problem.layers[static_cast<std::size_t>(pair.left)].width *
                               problem.layers[static_cast<std::size_t>(pair.right)].width;
    for (std::int64_t slice = 0; slice < slices; ++slice) {
      const double* const part = parts.data() + (index * slices + slice) * entries;
      for (std::int64_t k = 0; k < count; ++k) pair.total[k] += part[k];
    }
  });
}

}  // namespace rgfast::moments
