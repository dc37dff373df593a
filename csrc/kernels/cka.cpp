#include "kernels/cka.hpp"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>
#include <vector>

#include "kernels/cka_job.hpp"
#include "kernels/cka_plan.hpp"
#include "rgfast/isa.hpp"
#include "rgfast/parallel.hpp"

#define RGFAST_TARGET_FILE "kernels/cka_target-inl.hpp"
#include "rgfast/foreach_target.hpp"

namespace rgfast::cka {
namespace {

Kernels kernels() {
  static constexpr IsaTable<Kernels (*)()> table = RGFAST_ISA_TABLE(kernels);
  return table.active()();
}

class Run {
 public:
  Run(const Problem& problem, const Result& result, std::byte* workspace)
      : p_(problem), result_(result), plan_(problem, kernels()), base_(workspace) {
    for (std::int64_t i = 0; i < plan_.sample_tiles && !p_.by_features; ++i)
      for (std::int64_t j = i; j < plan_.sample_tiles; ++j) tiles_.emplace_back(i, j);
    // The small tasks, on the diagonal, come last: they even out what the others leave.
    std::stable_partition(tiles_.begin(), tiles_.end(), [](const auto& at) { return at.first != at.second; });
  }

  void all() {
    const std::int64_t layers = count(p_.layers);
    if (plan_.whole == 0)
      parallel_for(p_.positions * layers, p_.threads, lengthy(), [&](std::int64_t index, int slot) {
        const std::int64_t position = index / layers, layer = index % layers;
        pack(position, layer, panels(position, layer), slot);
      });
    if (p_.by_features)
      features();
    else
      samples();
    parallel_for(p_.positions, p_.threads, [&](std::int64_t position, int) { finish(position); });
  }

 private:
  // Packing and multiplying so many numbers takes half a millisecond and more.
  bool lengthy() const {
    std::int64_t numbers = 0;
    for (const Layer& layer : p_.layers) numbers += p_.positions * p_.samples * layer.width;
    return numbers >= 1 << 19;
  }

  template <class V>
  static std::int64_t count(const V& values) {
    return static_cast<std::int64_t>(values.size());
  }
  double* doubles(std::size_t offset) const { return reinterpret_cast<double*>(base_ + offset); }
  double* norms(std::int64_t position, std::int64_t layer) const {
    return doubles(plan_.norms) + (position * count(p_.layers) + layer) * plan_.slots;
  }
  double* row_sums(std::int64_t position, std::int64_t layer) const {
    return doubles(plan_.row_sums) + (position * count(p_.layers) + layer) * p_.groups * plan_.slots;
  }
  std::byte* panels(std::int64_t position, std::int64_t layer) const {
    return base_ + static_cast<std::size_t>(position) * plan_.position_bytes +
           plan_.panels[static_cast<std::size_t>(layer)];
  }

  void pack(std::int64_t position, std::int64_t index, std::byte* panels, int slot) {
    const Layer& layer = p_.layers[static_cast<std::size_t>(index)];
    PackJob job{};
    job.source = static_cast<const std::byte*>(layer.data) +
                 position * layer.position_stride * (layer.is_double ? 8 : 4);
    job.is_double = layer.is_double;
    job.sample_stride = layer.sample_stride;
    job.samples = p_.samples;
    job.width = layer.width;
    job.by_features = p_.by_features;
    job.groups = p_.groups;
    job.group_slots = plan_.group_slots;
    job.panel = plan_.panel(layer);
    job.panels = panels;
    job.norms = norms(position, index);
    job.row_sums = row_sums(position, index);
    job.columns = doubles(plan_.columns_at + plan_.columns_bytes * static_cast<std::size_t>(slot));
    job.status = result_.status + position * count(p_.layers) + index;
    plan_.kernel.pack(job, p_.single);
  }

  void samples() {
    const int layers = static_cast<int>(count(p_.layers));
    where_.assign(static_cast<std::size_t>(layers * layers), -1);
    for (std::size_t i = 0; i < p_.pairs.size(); ++i)
      where_[static_cast<std::size_t>(p_.pairs[i].first * layers + p_.pairs[i].second)] = static_cast<int>(i);
    for (int l = 0; l < layers; l += kBlock)
      for (int m = l; m < layers; m += kBlock)
        if (std::any_of(p_.pairs.begin(), p_.pairs.end(), [=](const auto& pair) {
              return pair.first / kBlock * kBlock == l && pair.second / kBlock * kBlock == m;
            }))
          blocks_.push_back({l, m});
    plan_.whole > 0 ? whole_grams() : tiles_of_grams();
  }

  // All Grams of some positions, a layer after the other, and then the products between them.
  void whole_grams() {
    const std::int64_t layers = count(p_.layers), tasks = plan_.tasks;
    const auto tile = [&](std::int64_t position, std::int64_t task) {
      return doubles(plan_.tiles + static_cast<std::size_t>(position * tasks + task) * plan_.tile_bytes);
    };
    for (std::int64_t first = 0; first < p_.positions; first += plan_.whole) {
      const std::int64_t positions = std::min(plan_.whole, p_.positions - first);
      parallel_for(positions * layers, p_.threads, lengthy(), [&](std::int64_t index, int slot) {
        const std::int64_t position = index / layers, layer = index % layers;
        std::byte* const panels = base_ + plan_.thread_bytes * static_cast<std::size_t>(slot);
        pack(first + position, layer, panels, slot);
        const std::int64_t width = p_.layers[static_cast<std::size_t>(layer)].width;
        const std::int64_t stride = plan_.panel(static_cast<int>(layer));
        for (std::int64_t task = 0; task < tasks; ++task) {
          const auto [i, j] = tiles_[static_cast<std::size_t>(task)];
          const void* const left = panels + i * plan_.side * stride * plan_.item;
          const void* const right = panels + j * plan_.side * stride * plan_.item;
          double* const to = tile(position, task) + layer * plan_.tile_size();
          plan_.kernel.grams(gram_job(i, j, &left, &right, &width, &stride, 1, to), p_.single);
        }
      });
      parallel_for(positions * tasks, p_.threads, lengthy(), [&](std::int64_t index, int slot) {
        inner((first + index / tasks) * tasks + index % tasks, tile(index / tasks, index % tasks), slot);
      });
    }
  }

  // A tile of all layers, and at once the products between them.
  void tiles_of_grams() {
    const int layers = static_cast<int>(count(p_.layers));
    std::vector<std::int64_t> widths, strides;
    for (const Layer& layer : p_.layers) {
      widths.push_back(layer.width);
      strides.push_back(plan_.panel(layer));
    }
    std::vector<const void*> panel(static_cast<std::size_t>(2 * layers * p_.threads));
    parallel_for(p_.positions * plan_.tasks, p_.threads, lengthy(), [&](std::int64_t task, int slot) {
      const std::int64_t position = task / plan_.tasks;
      const auto [i, j] = tiles_[static_cast<std::size_t>(task % plan_.tasks)];
      const void** const left = panel.data() + 2 * layers * slot;
      const void** const right = left + layers;
      for (int l = 0; l < layers; ++l) {
        const std::int64_t size = plan_.side * strides[static_cast<std::size_t>(l)] * plan_.item;
        left[l] = panels(position, l) + i * size;
        right[l] = panels(position, l) + j * size;
      }
      double* const tiles = doubles(plan_.tiles + plan_.tile_bytes * static_cast<std::size_t>(slot));
      plan_.kernel.grams(gram_job(i, j, left, right, widths.data(), strides.data(), layers, tiles),
                         p_.single);
      inner(task, tiles, slot);
    });
  }

  GramJob gram_job(std::int64_t i, std::int64_t j, const void* const* left, const void* const* right,
                   const std::int64_t* widths, const std::int64_t* strides, int layers, double* tiles) const {
    return {left,
            right,
            widths,
            strides,
            layers,
            plan_.panels_in(i, plan_.slots),
            plan_.panels_in(j, plan_.slots),
            i == j,
            tiles};
  }

  // `task` counts the tiles of all positions.
  void inner(std::int64_t task, const double* tiles, int slot) {
    const std::int64_t i = tiles_[static_cast<std::size_t>(task % plan_.tasks)].first;
    const std::int64_t line = plan_.side * plan_.lanes;
    plan_.kernel.inner({tiles, plan_.tile_size(), plan_.panels_in(i, plan_.slots) * plan_.lanes * line,
                        static_cast<int>(count(p_.layers)), blocks_.data(), count(blocks_), where_.data(),
                        doubles(plan_.partial + plan_.partial_bytes * static_cast<std::size_t>(slot)),
                        doubles(plan_.sums) + task * count(p_.pairs)});
  }

  void features() {
    struct Row {
      std::int64_t pair, tile;
    };
    std::vector<Row> rows;
    for (std::int64_t pair = 0; pair < count(p_.pairs); ++pair)
      for (std::int64_t i = 0; i < plan_.feature_tiles(p_.pairs[static_cast<std::size_t>(pair)].first); ++i)
        rows.push_back({pair, i});
    parallel_for(p_.positions * plan_.tasks, p_.threads, lengthy(), [&](std::int64_t task, int slot) {
      const std::int64_t position = task / plan_.tasks;
      const Row row = rows[static_cast<std::size_t>(task % plan_.tasks)];
      const auto [l, m] = p_.pairs[static_cast<std::size_t>(row.pair)];
      FeatureJob job{};
      job.left = panels(position, l) + row.tile * plan_.side * plan_.panel(l) * plan_.item;
      job.right = panels(position, m);
      job.first = l == m ? row.tile * plan_.side : 0;
      job.panels = plan_.feature_panels(m);
      job.diagonal = l == m ? row.tile * plan_.side : -1;
      job.groups = p_.groups;
      job.samples = plan_.group_slots;
      job.panel = plan_.panel(l);
      job.rows = plan_.panels_in(row.tile, plan_.width(l));
      job.tiles = doubles(plan_.tiles + plan_.tile_bytes * static_cast<std::size_t>(slot));
      job.sums = doubles(plan_.sums) + task * p_.variants();
      plan_.kernel.feature(job, p_.single);
    });
  }

  // The slots [0, from) and [to, slots) count: all, or all but a group's.
  struct Kept {
    std::int64_t group;  // left out, or -1
    std::int64_t from, to;
    double samples;
  };

  Kept kept(std::int64_t variant) const {
    const std::int64_t all = p_.samples, g = variant - 1;
    if (variant == 0) return {-1, plan_.slots, plan_.slots, static_cast<double>(all)};
    const std::int64_t own = (all - g + p_.groups - 1) / p_.groups;
    return {g, g * plan_.group_slots, (g + 1) * plan_.group_slots, static_cast<double>(all - own)};
  }

  double dot(const double* a, const double* b, const Kept& which) const {
    VectorJob job{a, b, which.from, 0.0};
    plan_.kernel.dot(job);
    const double before = job.sum;
    if (which.to == plan_.slots) return before;
    job = {a + which.to, b + which.to, plan_.slots - which.to, 0.0};
    plan_.kernel.dot(job);
    return before + job.sum;
  }

  // Every pair's products summed over the tiles of kept samples, in their order; or over its own of features.
  std::vector<double> tile_sums(std::int64_t position, const Kept& which) const {
    const std::int64_t pairs = count(p_.pairs), side = plan_.side * plan_.lanes;
    const double* sums =
        doubles(plan_.sums) + position * plan_.tasks * (p_.by_features ? p_.variants() : pairs);
    std::vector<double> total(static_cast<std::size_t>(pairs));
    if (p_.by_features) {
      for (std::int64_t pair = 0; pair < pairs; ++pair) {
        const std::int64_t rows = plan_.feature_tiles(p_.pairs[static_cast<std::size_t>(pair)].first);
        for (std::int64_t i = 0; i < rows; ++i, sums += p_.variants())
          total[static_cast<std::size_t>(pair)] += sums[1 + which.group];
      }
      return total;
    }
    for (const auto& [i, j] : tiles_) {
      const bool left_out = which.group >= 0 && (i * side / plan_.group_slots == which.group ||
                                                 j * side / plan_.group_slots == which.group);
      for (std::int64_t pair = 0; pair < pairs && !left_out; ++pair)
        total[static_cast<std::size_t>(pair)] += sums[pair];
      sums += pairs;
    }
    return total;
  }

  // Adds the tiles up, and takes off what centring takes off, for all samples and without each group.
  void finish(std::int64_t position) {
    const std::int64_t layers = count(p_.layers);
    std::vector<double> trace(static_cast<std::size_t>(layers)), grand(trace);
    std::vector<double> rows(static_cast<std::size_t>(layers * plan_.slots)), all(rows);
    for (std::int64_t l = 0; l < layers; ++l)
      for (std::int64_t g = 0; g < p_.groups; ++g)
        for (std::int64_t i = 0; i < plan_.slots; ++i)
          all[static_cast<std::size_t>(l * plan_.slots + i)] += row_sums(position, l)[g * plan_.slots + i];
    for (std::int64_t variant = 0; variant < p_.variants(); ++variant) {
      const Kept which = kept(variant);
      const std::int64_t at = position * p_.variants() + variant;
      for (std::int64_t l = 0; l < layers; ++l) {
        const double* const norm = norms(position, l);
        const double* const left_out =
            which.group < 0 ? nullptr : row_sums(position, l) + which.group * plan_.slots;
        // Row sums of K without its diagonal.
        double* const row = rows.data() + l * plan_.slots;
        double diagonal = 0.0, sum = 0.0;
        for (std::int64_t i = 0; i < plan_.slots; ++i) {
          if (i == which.from) i = which.to;
          if (i == plan_.slots) break;
          const double full =
              all[static_cast<std::size_t>(l * plan_.slots + i)] - (left_out != nullptr ? left_out[i] : 0.0);
          diagonal += norm[i];
          sum += full;
          row[i] = full - norm[i];
        }
        trace[static_cast<std::size_t>(l)] = result_.trace[at * layers + l] = diagonal;
        grand[static_cast<std::size_t>(l)] = result_.grand[at * layers + l] = sum;
      }
      centre(position, at, which, rows.data(), trace, grand);
    }
  }

  void centre(std::int64_t position, std::int64_t at, const Kept& which, const double* rows,
              const std::vector<double>& trace, const std::vector<double>& grand) const {
    const std::int64_t pairs = count(p_.pairs);
    const double n = which.samples;
    const std::vector<double> sums = tile_sums(position, which);
    for (std::int64_t pair = 0; pair < pairs; ++pair) {
      const auto l = static_cast<std::size_t>(p_.pairs[static_cast<std::size_t>(pair)].first);
      const auto m = static_cast<std::size_t>(p_.pairs[static_cast<std::size_t>(pair)].second);
      const double* const a = norms(position, static_cast<std::int64_t>(l));
      const double* const b = norms(position, static_cast<std::int64_t>(m));
      const double* const r = rows + static_cast<std::int64_t>(l) * plan_.slots;
      const double* const s = rows + static_cast<std::int64_t>(m) * plan_.slots;
      const double diagonals = dot(a, b, which), products = dot(r, s, which);
      const double off = sums[static_cast<std::size_t>(pair)] - (p_.by_features ? diagonals : 0.0);
      const double full_rows = products + dot(r, b, which) + dot(a, s, which) + diagonals;
      result_.centered[at * pairs + pair] =
          off + diagonals - 2.0 * full_rows / n + grand[l] * grand[m] / (n * n);
      result_.u_centered[at * pairs + pair] =
          off - 2.0 * products / (n - 2.0) +
          (grand[l] - trace[l]) * (grand[m] - trace[m]) / ((n - 1.0) * (n - 2.0));
    }
  }

  const Problem& p_;
  const Result& result_;
  const Plan plan_;
  std::byte* const base_;
  std::vector<std::pair<std::int64_t, std::int64_t>> tiles_;  // of samples
  std::vector<int> where_;                                    // [layers, layers]: a pair's number, or -1
  std::vector<LayerBlock> blocks_;
};

}  // namespace

std::size_t workspace_bytes(const Problem& problem) { return Plan(problem, kernels()).end; }

void run(const Problem& problem, const Result& result, std::byte* workspace) {
  Run(problem, result, workspace).all();
}

}  // namespace rgfast::cka
