#include "kernels/moments.hpp"

#include <algorithm>
#include <cstddef>
#include <vector>

#include "kernels/moments_job.hpp"
#include "rgfast/isa.hpp"
#include "rgfast/parallel.hpp"
#include "rgfast/workspace.hpp"

#define RGFAST_TARGET_FILE "kernels/moments-inl.hpp"
#include "rgfast/foreach_target.hpp"

namespace rgfast::moments {
namespace {

Kernels kernels() {
  static constexpr IsaTable<Kernels (*)()> table = RGFAST_ISA_TABLE(moment_kernels);
  return table.active()();
}

// Products that take about half a millisecond on one thread.
constexpr double kLengthy = 1 << 23;
// Rows of a moment in one task, where positions alone are too few tasks.
constexpr std::int64_t kTileRows = 64;

class Run {
 public:
  explicit Run(const Problem& problem) : p_(problem), kernel_(kernels()) {
    for (const Layer& layer : p_.layers) {
      const std::int64_t width = layer.rows.size(2);
      widest_ = std::max(widest_, width);
      layer_ = std::max<std::int64_t>(layer_, (kernel_.layer(width) + 7) / 8 * 8);
    }
    for (const Pair& pair : p_.pairs)
      products_ += static_cast<double>(p_.positions * p_.rows * width(pair.left)) *
                   static_cast<double>(width(pair.right)) / (pair.left == pair.right ? 2 : 1);
  }

  void all() {
    if (p_.threads == 1 || p_.positions >= 2 * p_.threads)
      by_position();
    else
      by_tile();
  }

 private:
  std::int64_t width(int layer) const { return p_.layers[static_cast<std::size_t>(layer)].rows.size(2); }
  bool lengthy() const { return products_ >= kLengthy; }
  static std::size_t bytes(std::int64_t doubles) {
    return sizeof(double) * static_cast<std::size_t>(doubles);
  }

  std::int64_t pack(std::int64_t position, int index, std::int64_t from, double* panels, double* row) const {
    const Layer& layer = p_.layers[static_cast<std::size_t>(index)];
    const View& x = layer.rows;
    PackJob job{};
    job.x = x.data +
            (position * x.stride(0) + from * x.stride(1)) * static_cast<std::int64_t>(item_size(x.dtype));
    job.dtype = x.dtype;
    job.row_stride = x.stride(1);
    job.column_stride = x.size(2) == 1 ? 1 : x.stride(2);
    job.width = x.size(2);
    job.shift = layer.shift + position * x.size(2);
    job.unit = layer.unit;
    if (p_.keep != nullptr) {
      job.keep = p_.keep + position * p_.keep_strides[0] + from * p_.keep_strides[1];
      job.keep_stride = p_.keep_strides[1];
    }
    job.count = std::min<std::int64_t>(kTerms, p_.rows - from);
    job.panels = panels;
    job.row = row;
    return kernel_.pack(job);
  }

  ProductJob product(const Pair& pair, std::int64_t position, const double* left, const double* right,
                     std::int64_t terms) const {
    ProductJob job{};
    job.left = left;
    job.right = right;
    job.left_width = width(pair.left);
    job.right_width = width(pair.right);
    job.terms = terms;
    job.same = pair.left == pair.right;
    job.first = 0;
    job.last = kernel_.panels(job.left_width);
    job.moment = pair.moment + position * (job.left_width + 2) * (job.right_width + 2);
    return job;
  }

  // Where each pair finds its layers when a packed layer's place is taken again after its last pair.
  struct Step {
    int place[2];
    bool fresh[2];
  };

  std::vector<Step> steps(int& places) const {
    std::vector<int> place(p_.layers.size(), -1), free;
    std::vector<std::size_t> last(p_.layers.size());
    for (std::size_t k = 0; k < p_.pairs.size(); ++k)
      for (const int layer : {p_.pairs[k].left, p_.pairs[k].right}) last[static_cast<std::size_t>(layer)] = k;
    std::vector<Step> found;
    places = 0;
    for (std::size_t k = 0; k < p_.pairs.size(); ++k) {
      const int sides[2] = {p_.pairs[k].left, p_.pairs[k].right};
      Step step{};
      for (int side = 0; side < 2; ++side) {
        int& at = place[static_cast<std::size_t>(sides[side])];
        step.fresh[side] = at < 0;
        if (at < 0 && free.empty()) {
          at = places++;
        } else if (at < 0) {
          at = free.back();
          free.pop_back();
        }
        step.place[side] = at;
      }
      for (int side = 0; side < (sides[0] == sides[1] ? 1 : 2); ++side)
        if (last[static_cast<std::size_t>(sides[side])] == k) free.push_back(step.place[side]);
      found.push_back(step);
    }
    return found;
  }

  // A thread takes a position: layers are packed when a pair first needs them, and multiplied from its cache.
  void by_position() const {
    int places = 0;
    const std::vector<Step> order = steps(places);
    parallel_for(p_.positions, p_.threads, lengthy(), [&](std::int64_t position, int) {
      const Workspace space(bytes(places * layer_ + widest_));
      auto* const base = static_cast<double*>(space.data());
      double* const row = base + places * layer_;
      for (std::int64_t from = 0; from < p_.rows; from += kTerms) {
        std::int64_t terms = 0;
        for (std::size_t k = 0; k < p_.pairs.size(); ++k) {
          const Pair& pair = p_.pairs[k];
          double* const left = base + order[k].place[0] * layer_;
          double* const right = base + order[k].place[1] * layer_;
          if (order[k].fresh[0]) terms = pack(position, pair.left, from, left, row);
          if (terms == 0) break;  // as it is for every layer
          if (order[k].fresh[1]) pack(position, pair.right, from, right, row);
          kernel_.multiply(product(pair, position, left, right, terms));
        }
      }
    });
  }

  // Few positions: all layers are packed, and tiles of moments shared out.
  void by_tile() const {
    struct Tile {
      const Pair* pair;
      std::int64_t first, last;
    };
    std::vector<Tile> tiles;
    const std::int64_t side = std::max<std::int64_t>(1, kernel_.panels(kTileRows));
    for (const Pair& pair : p_.pairs) {
      const std::int64_t panels = kernel_.panels(width(pair.left));
      std::int64_t first = 0;
      do {
        tiles.push_back({&pair, first, std::min(first + side, panels)});
        first += side;
      } while (first < panels);
    }
    const auto layers = static_cast<std::int64_t>(p_.layers.size());
    const auto count = static_cast<std::int64_t>(tiles.size());
    const Workspace space(bytes(p_.positions * layers * layer_ + p_.threads * widest_));
    auto* const base = static_cast<double*>(space.data());
    double* const scratch = base + p_.positions * layers * layer_;
    std::vector<std::int64_t> terms(static_cast<std::size_t>(p_.positions * layers));
    const auto panels = [&](std::int64_t position, std::int64_t layer) {
      return base + (position * layers + layer) * layer_;
    };
    for (std::int64_t from = 0; from < p_.rows; from += kTerms) {
      parallel_for(p_.positions * layers, p_.threads, lengthy(), [&](std::int64_t index, int slot) {
        const std::int64_t position = index / layers, layer = index % layers;
        terms[static_cast<std::size_t>(index)] =
            pack(position, static_cast<int>(layer), from, panels(position, layer), scratch + slot * widest_);
      });
      parallel_for(p_.positions * count, p_.threads, lengthy(), [&](std::int64_t index, int) {
        const std::int64_t position = index / count;
        const std::int64_t kept = terms[static_cast<std::size_t>(position * layers)];
        if (kept == 0) return;
        const Tile& tile = tiles[static_cast<std::size_t>(index % count)];
        ProductJob job = product(*tile.pair, position, panels(position, tile.pair->left),
                                 panels(position, tile.pair->right), kept);
        job.first = tile.first;
        job.last = tile.last;
        kernel_.multiply(job);
      });
    }
  }

  const Problem& p_;
  const Kernels kernel_;
  std::int64_t widest_ = 0;
  std::int64_t layer_ = 0;  // doubles between packed layers
  double products_ = 0.0;
};

}  // namespace

void add(const Problem& problem) {
  if (problem.positions == 0 || problem.rows == 0 || problem.pairs.empty()) return;
  Run(problem).all();
}

}  // namespace rgfast::moments
