// What the driver hands to the kernels of one instruction set.
#pragma once

#include <cstdint>

#include "kernels/cka.hpp"

namespace rgfast::cka {

// Features of a product that stay in the nearest cache, summed before they are widened.
inline constexpr std::int64_t kDepth = 128;
// Samples likewise. Fewer floats: where few features carry a layer, a Gram over samples averages their
// rounding, and ‖xᵀy‖² does not.
template <class T>
inline constexpr std::int64_t kStretch = sizeof(T) == 4 ? 32 : kDepth;

// One layer at one position into panels: rows centred, scaled, rounded to T.
struct PackJob {
  const void* source;  // [samples, width]
  bool is_double;
  std::int64_t sample_stride;
  std::int64_t samples;
  std::int64_t width;
  bool by_features;
  std::int64_t groups;       // sample i goes to slot i / groups of group i % groups
  std::int64_t group_slots;  // of a group; those that no sample has hold zeros
  std::int64_t panel;        // elements from panel to panel
  void* panels;      // by samples [slots/lanes][width][lanes], by features [width/lanes][slots][lanes]
  double* norms;     // [slots]: K_ii
  double* row_sums;  // [groups, slots]: Σ_j K_ij over the samples j of a group
  double* columns;   // scratch [2 + groups, width]
  Status* status;
};

// The Gram tiles of some layers at one tile of samples. Above the diagonal only; the rest is zero.
struct GramJob {
  const void* const* left;   // [layers]: panels of the tile's rows
  const void* const* right;  // [layers]: panels of its columns
  const std::int64_t* widths;
  const std::int64_t* panels;  // [layers]: elements from panel to panel
  int layers;
  int rows, columns;  // panels
  bool diagonal;      // rows and columns are the same samples
  double* tiles;      // [layers, side, side] out
};

// Layers [left, left + kBlock) beside layers [right, right + kBlock).
inline constexpr int kBlock = 4;
struct LayerBlock {
  int left, right;
};

// The products wanted between the Gram tiles of all layers.
struct InnerJob {
  const double* tiles;  // [layers, size], of which `used` entries count
  std::int64_t size, used;
  int layers;
  const LayerBlock* blocks;  // [count]: those with a product that is wanted
  std::int64_t count;
  const int* pairs;  // [layers, layers], upper triangle: where the product goes, or -1
  double* partial;   // scratch [count, kBlock, kBlock, a vector]
  double* sums;      // [pairs] out
};

// Σ over one row of tiles of (x_lᵀ x_m)², of all samples and of all but those of each group.
struct FeatureJob {
  const void* left;            // panels of the tiles' rows
  const void* right;           // panels of layer m
  std::int64_t first, panels;  // right panels to take: [first, panels)
  std::int64_t diagonal;  // index of the panel that `left` is, or -1: tiles off the diagonal count twice then
  std::int64_t groups;
  std::int64_t samples;  // of a group
  std::int64_t panel;    // elements from panel to panel
  int rows;              // panels
  double* tiles;         // scratch [tiles(groups), side, side]
  double* sums;          // [variants] out

  std::int64_t variants() const { return groups > 1 ? 1 + groups : 1; }
};

struct VectorJob {
  const double* a;
  const double* b;
  std::int64_t count;
  double sum;
};

struct Kernels {
  int (*tile)(bool single);            // panels on a side of a tile
  std::int64_t (*lanes)(bool single);  // columns of a panel
  void (*pack)(const PackJob&, bool single);
  void (*grams)(const GramJob&, bool single);
  void (*inner)(const InnerJob&);
  void (*feature)(FeatureJob&, bool single);
  void (*dot)(VectorJob&);
};

}  // namespace rgfast::cka
