// Cross moments of pairs of layers from rows that are all there, in fp32 products of what tells the layers
// apart, beside each layer's own moment in fp64.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

namespace rgfast::moments {

// What a layer is at P positions. Rows have contiguous features.
struct Rows {
  const std::byte* data;  // [positions, samples, width]
  bool is_double;
  std::int64_t position_stride;
  std::int64_t sample_stride;
  std::int64_t width;
  const double* shift;  // [positions, width], taken off every row
  const double* unit;   // [positions]: powers of two that bring the rows to about 1, 0 if all are zero
  const double* own;    // [positions, width, width]: moments of the rows less their shift, or null
  const double* move;   // [positions, width], or null
};

// Where results of a pair (i, j) go. With u and v the rows of the two layers less their shifts, and
// C = sum u v' of a position: u (u' v) is C itself if there is no own moment, and else own + sum u (v - u)',
// whose rounding errors are of the size of the difference.
struct PairSums {
  int left;
  int right;
  double* total;        // [width of left, width of right]: the sum of C over positions is added
  double* norm;         // [positions]: the squared norm of C
  double* products;     // [positions]: sum |u|^2 |v|^2
  double* right_sums;   // [positions, right_stride]: sum |u|^2 v
  double* left_sums;    // [positions, left_stride]: sum |v|^2 u
  double* moved_right;  // C' move of left, or null
  double* moved_left;   // C move of right
};

struct PairProblem {
  std::vector<Rows> layers;
  std::vector<PairSums> pairs;  // left == right takes the own moment alone
  std::int64_t positions;
  std::int64_t samples;
  std::int64_t stride;  // of the vectors in PairSums
  int threads;
};

// to[n, width] += the sum over positions of rows[positions, n, width] in fp64; `data` and strides as in Rows.
void add_positions(const Rows& rows, std::int64_t positions, std::int64_t samples, double* to, int threads);

// Sums run in the order of samples and positions, in pieces that follow from the shapes: the bits do not
// depend on the number of threads.
void pair_products(const PairProblem& problem);

}  // namespace rgfast::moments
