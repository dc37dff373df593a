#include "kernels/cka.hpp"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>
#include <vector>

#include "kernels/cka_job.hpp"
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

std::int64_t rounded(std::int64_t count, std::int64_t unit) { return (count + unit - 1) / unit * unit; }

// Sizes that follow from the shapes and the instruction set, and where everything lies in the workspace.
struct Plan {
  const Problem& problem;
  Kernels kernel = kernels();
  std::int64_t lanes = 0;  // columns of a panel
  std::int64_t side = 0;   // of a tile, panels
  std::int64_t item = 0;   // bytes
  std::int64_t widest = 0;
  std::int64_t group_slots = 0;  // a group begins with a tile of its own
  std::int64_t slots = 0;
  std::int64_t sample_tiles = 0;
  std::int64_t tasks = 0;           // per position
  std::vector<std::size_t> panels;  // offset of a layer's panels at position 0
  std::size_t position_bytes = 0, norms = 0, row_sums = 0, columns_at = 0, columns_bytes = 0, tiles = 0,
              tile_bytes = 0, sums = 0, end = 0;

  explicit Plan(const Problem& p) : problem(p) {
    item = p.single ? 4 : 8;
    for (const Layer& layer : p.layers) widest = std::max(widest, layer.width);
    lanes = kernel.lanes(p.single);
    side = kernel.tile(p.single);
    group_slots = p.groups == 1 ? p.samples : rounded((p.samples - 1) / p.groups + 1, side * lanes);
    slots = p.groups * group_slots;
    sample_tiles = blocks(slots);
    for (const Layer& layer : p.layers) {
      panels.push_back(position_bytes);
      const std::int64_t count = p.by_features ? layer.width : slots;
      position_bytes += bytes((count + lanes - 1) / lanes * panel(layer) * item);
    }
    const auto layers = static_cast<std::int64_t>(p.layers.size());
    const auto pairs = static_cast<std::int64_t>(p.pairs.size());
    std::int64_t results = 0;
    if (p.by_features) {
      for (const auto& pair : p.pairs) tasks += feature_tiles(pair.first);
      results = tasks;
    } else {
      tasks = sample_tiles * (sample_tiles + 1) / 2;
      results = tasks * pairs;
    }
    norms = static_cast<std::size_t>(p.positions) * position_bytes;
    row_sums = norms + bytes(p.positions * layers * slots * 8);
    columns_at = row_sums + bytes(p.positions * layers * p.groups * slots * 8);
    columns_bytes = bytes((2 + p.groups) * widest * 8);
    tiles = columns_at + columns_bytes * static_cast<std::size_t>(p.threads);
    tile_bytes = bytes((p.by_features ? 1 : layers) * side * side * lanes * lanes * 8);
    sums = tiles + tile_bytes * static_cast<std::size_t>(p.threads);
    end = sums + bytes(p.positions * results * 8);
  }

  static std::size_t bytes(std::int64_t count) { return static_cast<std::size_t>(rounded(count, 64)); }

  // Elements from panel to panel: an odd number of vectors, or panels would share their sets of a cache.
  std::int64_t panel(const Layer& layer) const {
    return ((problem.by_features ? problem.samples : layer.width) | 1) * lanes;
  }
  std::int64_t panel(int layer) const { return panel(problem.layers[static_cast<std::size_t>(layer)]); }
  std::int64_t blocks(std::int64_t count) const { return (count + side * lanes - 1) / (side * lanes); }
  std::int64_t width(int layer) const { return problem.layers[static_cast<std::size_t>(layer)].width; }
  std::int64_t feature_tiles(int layer) const { return blocks(width(layer)); }
  std::int64_t feature_panels(int layer) const { return (width(layer) + lanes - 1) / lanes; }
  // Panels in the tile of that index, of `count` columns in all.
  int panels_in(std::int64_t index, std::int64_t count) const {
    return static_cast<int>(std::min(side, (count + lanes - 1) / lanes - index * side));
  }
};

class Run {
 public:
  Run(const Problem& problem, const Result& result, std::byte* workspace)
      : p_(problem), result_(result), plan_(problem), base_(workspace) {
    for (std::int64_t i = 0; i < plan_.sample_tiles && !p_.by_features; ++i)
      for (std::int64_t j = i; j < plan_.sample_tiles; ++j) tiles_.emplace_back(i, j);
    // The small tasks, on the diagonal, come last: they even out what the others leave.
    std::stable_partition(tiles_.begin(), tiles_.end(), [](const auto& at) { return at.first != at.second; });
  }

  void all() {
    const std::int64_t layers = count(p_.layers);
    parallel_for(p_.positions * layers, p_.threads, lengthy(),
                 [&](std::int64_t index, int slot) { pack(index / layers, index % layers, slot); });
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

  void pack(std::int64_t position, std::int64_t index, int slot) {
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
    job.panels = panels(position, index);
    job.norms = norms(position, index);
    job.row_sums = row_sums(position, index);
    job.columns = doubles(plan_.columns_at + plan_.columns_bytes * static_cast<std::size_t>(slot));
    job.status = result_.status + position * count(p_.layers) + index;
    plan_.kernel.pack(job, p_.single);
  }

  void samples() {
    const int layers = static_cast<int>(count(p_.layers));
    std::vector<int> where(static_cast<std::size_t>(layers * layers), -1);
    for (std::size_t i = 0; i < p_.pairs.size(); ++i)
      where[static_cast<std::size_t>(p_.pairs[i].first * layers + p_.pairs[i].second)] = static_cast<int>(i);
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
      SampleJob job{};
      job.left = left;
      job.right = right;
      job.widths = widths.data();
      job.panels = strides.data();
      job.layers = layers;
      job.rows = plan_.panels_in(i, plan_.slots);
      job.columns = plan_.panels_in(j, plan_.slots);
      job.diagonal = i == j;
      job.pairs = where.data();
      job.tiles = doubles(plan_.tiles + plan_.tile_bytes * static_cast<std::size_t>(slot));
      job.sums = doubles(plan_.sums) + task * count(p_.pairs);
      plan_.kernel.sample(job, p_.single);
    });
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
      job.samples = p_.samples;
      job.panel = plan_.panel(l);
      job.rows = plan_.panels_in(row.tile, plan_.width(l));
      job.tile = doubles(plan_.tiles + plan_.tile_bytes * static_cast<std::size_t>(slot));
      plan_.kernel.feature(job, p_.single);
      doubles(plan_.sums)[task] = job.sum;
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
    const double* sums = doubles(plan_.sums) + position * plan_.tasks * (p_.by_features ? 1 : pairs);
    std::vector<double> total(static_cast<std::size_t>(pairs));
    if (p_.by_features) {
      for (std::int64_t pair = 0; pair < pairs; ++pair) {
        const std::int64_t rows = plan_.feature_tiles(p_.pairs[static_cast<std::size_t>(pair)].first);
        for (std::int64_t i = 0; i < rows; ++i) total[static_cast<std::size_t>(pair)] += *sums++;
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
    std::vector<double> rows(static_cast<std::size_t>(layers * plan_.slots));
    for (std::int64_t variant = 0; variant < p_.variants(); ++variant) {
      const Kept which = kept(variant);
      const std::int64_t at = position * p_.variants() + variant;
      for (std::int64_t l = 0; l < layers; ++l) {
        const double* const norm = norms(position, l);
        const double* const sums = row_sums(position, l);
        // Row sums of K without its diagonal.
        double* const row = rows.data() + l * plan_.slots;
        double diagonal = 0.0, sum = 0.0;
        for (std::int64_t i = 0; i < plan_.slots; ++i) {
          if (i == which.from) i = which.to;
          if (i == plan_.slots) break;
          double full = 0.0;
          for (std::int64_t g = 0; g < p_.groups; ++g)
            if (g != which.group) full += sums[g * plan_.slots + i];
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
};

}  // namespace

std::size_t workspace_bytes(const Problem& problem) { return Plan(problem).end; }

void run(const Problem& problem, const Result& result, std::byte* workspace) {
  Run(problem, result, workspace).all();
}

}  // namespace rgfast::cka
