// What moments_pairs.cpp hands to the code of one instruction set.
#pragma once

#include <cstdint>

#include "kernels/moments_pairs.hpp"

namespace rgfast::moments {

// Samples whose panels stay in the second-level cache beside a cross moment that does too; of wider layers,
// whose cross moments do not, as many as keep it from being read too often.
inline constexpr std::int64_t kFewSamples = 256, kManySamples = 1024;
inline constexpr std::int64_t kSmallMoment = 1 << 17;

// Where sum |u|^4 and, twice, sum |u|^2 u of a layer go, or nulls.
struct OwnSums {
  double* products;
  double* left;
  double* right;
};

// One pair at one position.
struct PairJob {
  const Rows* left;
  const Rows* right;
  bool same;        // one layer, whose own moment is all there is to take
  bool difference;  // right panels hold v - u, of layers of one width with an own moment
  std::int64_t position;
  std::int64_t samples;
  std::int64_t chunk;  // samples that are packed at once
  std::int64_t panel;  // elements from panel to panel
  float* left_panels;
  float* right_panels;
  double* lines;  // scratch: two rows, and four sums of rows, of `line` entries each
  std::int64_t line;
  double* tile;   // scratch [64, 64]
  double* cross;  // scratch [width of left, `line`]
  OwnSums own[2];
  double* total;
  double* norm;
  double* products;
  double* right_sums;
  double* left_sums;
  double* moved_right;
  double* moved_left;
};

struct PairKernels {
  std::int64_t (*lanes)();  // columns of a panel
  void (*run)(const PairJob& job);
  void (*add_rows)(const Rows& rows, std::int64_t positions, std::int64_t sample, double* to);
};

}  // namespace rgfast::moments
