// How a problem is cut, and where everything lies in the workspace.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "kernels/cka.hpp"
#include "kernels/cka_job.hpp"

namespace rgfast::cka {

inline std::int64_t rounded(std::int64_t count, std::int64_t unit) {
  return (count + unit - 1) / unit * unit;
}

// Grams that stay in the last cache. Where they are not much more than the rows that they are products of,
// all of a layer's are made while its rows are near, and rows are read once.
inline constexpr std::size_t kWholeBytes = 16 << 20;

// Sizes that follow from the shapes and the instruction set, and where everything lies in the workspace.
struct Plan {
  const Problem& problem;
  Kernels kernel;
  std::int64_t lanes = 0;  // columns of a panel
  std::int64_t side = 0;   // of a tile, panels
  std::int64_t item = 0;   // bytes
  std::int64_t widest = 0;
  std::int64_t group_slots = 0;  // by samples a group begins with a tile of its own
  std::int64_t slots = 0;
  std::int64_t sample_tiles = 0;
  std::int64_t tasks = 0;  // per position
  std::int64_t whole = 0;  // positions whose Grams are kept at a time; 0: one tile of them for a thread
  std::vector<std::size_t> panels;  // offset of a layer's panels at position 0
  std::size_t position_bytes = 0, thread_bytes = 0, norms = 0, row_sums = 0, columns_at = 0,
              columns_bytes = 0, tiles = 0, tile_bytes = 0, partial = 0, partial_bytes = 0, sums = 0, end = 0;

  Plan(const Problem& p, const Kernels& k) : problem(p), kernel(k) {
    item = p.single ? 4 : 8;
    for (const Layer& layer : p.layers) widest = std::max(widest, layer.width);
    lanes = kernel.lanes(p.single);
    side = kernel.tile(p.single);
    group_slots = (p.samples - 1) / p.groups + 1;
    if (p.groups > 1 && !p.by_features) group_slots = rounded(group_slots, side * lanes);
    slots = p.groups * group_slots;
    sample_tiles = blocks(slots);
    for (const Layer& layer : p.layers) {
      panels.push_back(position_bytes);
      const std::int64_t count = p.by_features ? layer.width : slots;
      const std::size_t own = bytes((count + lanes - 1) / lanes * panel(layer) * item);
      position_bytes += own;
      thread_bytes = std::max(thread_bytes, own);
    }
    const auto layers = static_cast<std::int64_t>(p.layers.size());
    const auto pairs = static_cast<std::int64_t>(p.pairs.size());
    std::int64_t results = pairs, held = layers;
    if (p.by_features) {
      for (const auto& pair : p.pairs) tasks += feature_tiles(pair.first);
      results = p.variants();
      held = p.variants();
    } else {
      tasks = sample_tiles * (sample_tiles + 1) / 2;
    }
    tile_bytes = bytes(held * tile_size() * 8);
    std::size_t tiles_count = static_cast<std::size_t>(p.threads);
    if (const std::size_t grams = static_cast<std::size_t>(tasks) * tile_bytes;
        !p.by_features && grams <= std::min(kWholeBytes, 2 * position_bytes)) {
      whole = std::min(p.positions, static_cast<std::int64_t>(kWholeBytes / grams));
      tiles_count = static_cast<std::size_t>(whole * tasks);
    }
    norms = whole > 0 ? static_cast<std::size_t>(p.threads) * thread_bytes
                      : static_cast<std::size_t>(p.positions) * position_bytes;
    row_sums = norms + bytes(p.positions * layers * slots * 8);
    columns_at = row_sums + bytes(p.positions * layers * p.groups * slots * 8);
    columns_bytes = bytes((2 + p.groups) * widest * 8);
    tiles = columns_at + columns_bytes * static_cast<std::size_t>(p.threads);
    partial = tiles + tile_bytes * tiles_count;
    const std::int64_t sides = p.by_features ? 0 : (layers + kBlock - 1) / kBlock;
    // A vector is 8 bytes for each of the lanes of doubles.
    partial_bytes = bytes(sides * (sides + 1) / 2 * kBlock * kBlock * kernel.lanes(false) * 8);
    sums = partial + partial_bytes * static_cast<std::size_t>(p.threads);
    end = sums + bytes(p.positions * tasks * results * 8);
  }

  static std::size_t bytes(std::int64_t count) { return static_cast<std::size_t>(rounded(count, 64)); }

  // Elements from panel to panel: an odd number of vectors, or panels would share their sets of a cache.
  std::int64_t panel(const Layer& layer) const {
    return ((problem.by_features ? slots : layer.width) | 1) * lanes;
  }
  std::int64_t panel(int layer) const { return panel(problem.layers[static_cast<std::size_t>(layer)]); }
  std::int64_t tile_size() const { return side * side * lanes * lanes; }
  std::int64_t blocks(std::int64_t count) const { return (count + side * lanes - 1) / (side * lanes); }
  std::int64_t width(int layer) const { return problem.layers[static_cast<std::size_t>(layer)].width; }
  std::int64_t feature_tiles(int layer) const { return blocks(width(layer)); }
  std::int64_t feature_panels(int layer) const { return (width(layer) + lanes - 1) / lanes; }
  // Panels in the tile of that index, of `count` columns in all.
  int panels_in(std::int64_t index, std::int64_t count) const {
    return static_cast<int>(std::min(side, (count + lanes - 1) / lanes - index * side));
  }
};

}  // namespace rgfast::cka
