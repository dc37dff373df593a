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
  void* panels;      // by samples [slots/lanes][width][lanes], by features [width/lanes][samples][lanes]
  double* norms;     // [slots]: K_ii
  double* row_sums;  // [groups, slots]: Σ_j K_ij over the samples j of a group
  double* columns;   // scratch [2 + groups, width]
  Status* status;
};

// One tile of samples: every layer's Gram tile, and the products wanted between them.
struct SampleJob {
  const void* const* left;   // [layers]: panels of the tile's rows
  const void* const* right;  // [layers]: panels of its columns
  const std::int64_t* widths;
  const std::int64_t* panels;  // [layers]: elements from panel to panel
  int layers;
  int rows, columns;  // panels
  bool diagonal;      // rows and columns are the same samples
  const int* pairs;   // [layers, layers], upper triangle: where the product goes, or -1
  double* tiles;      // scratch [layers, side, side]
  double* sums;       // [pairs] out
};

// Σ over one row of tiles of (x_lᵀ x_m)².
struct FeatureJob {
  const void* left;            // panels of the tiles' rows
  const void* right;           // panels of layer m
  std::int64_t first, panels;  // right panels to take: [first, panels)
  std::int64_t diagonal;  // index of the panel that `left` is, or -1: tiles off the diagonal count twice then
  std::int64_t samples;
  std::int64_t panel;  // elements from panel to panel
  int rows;            // panels
  double* tile;        // scratch [side, side]
  double sum;          // out
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
  void (*sample)(const SampleJob&, bool single);
  void (*feature)(FeatureJob&, bool single);
  void (*dot)(VectorJob&);
};

}  // namespace rgfast::cka
