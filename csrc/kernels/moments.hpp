// The products that streamed second moments are made of: moment += z_i' z_j with z = [x - shift, |x -
// shift|^2, 1].
#pragma once

#include <cstdint>
#include <vector>

#include "rgfast/view.hpp"

namespace rgfast::moments {

struct Layer {
  View rows;            // [positions, rows, width], any dtype and strides
  const double* shift;  // [positions, width]
  double unit;          // rows less their shift are multiplied by it: a power of two
};

struct Pair {
  int left;
  int right;
  double* moment;  // [positions, width of left + 2, width of right + 2]
};

struct Problem {
  std::vector<Layer> layers;
  std::vector<Pair> pairs;
  const unsigned char* keep;  // [positions, rows], or null: rows that are not kept are not read
  std::int64_t keep_strides[2];
  std::int64_t positions;
  std::int64_t rows;
  int threads;
};

// Every entry of a moment is a sum in the order of the rows, 128 of them at a time: its bits depend on the
// instruction set, and neither on threads nor on addresses or strides.
void add(const Problem& problem);

}  // namespace rgfast::moments
