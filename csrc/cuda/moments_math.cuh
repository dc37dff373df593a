// What the kernels of second and cross moments compute apart from their products: which tile a block takes,
// and how a number is brought into units and split into halves.
#pragma once

#include "cuda/common/exponents.cuh"
#include "cuda/common/half.cuh"

namespace rgfast::cuda::moments {

inline constexpr int kSide = 64;  // columns of a strip, and of a tile's side
inline constexpr int kStep = 16;  // rows that are staged and multiplied at a time
inline constexpr int kThreads = 128;
inline constexpr std::int64_t kBlock = 1024;  // rows that are summed apart before they are added to a moment
inline constexpr int kFresh = 4;              // steps that fp32 accumulators of split products take
inline constexpr int kTop = 14;               // split numbers are below 2^kTop in size; fp16 ends below 2^16

__host__ __device__ inline std::int64_t strips(std::int64_t columns) { return (columns + kSide - 1) / kSide; }

struct Tile {
  std::int64_t row, column;
};

// Of a moment whose right side has `columns` strips: row by row, or of the upper triangle column by column.
__host__ __device__ inline Tile tile_at(std::int64_t index, std::int64_t columns, bool own) {
  if (!own) return {index / columns, index % columns};
  std::int64_t column = 0;
  while ((column + 1) * (column + 2) / 2 <= index) ++column;
  return {index - column * (column + 1) / 2, column};
}

// The exponent above finite x >= 0: x < 2^exponent. Zero and subnormal numbers have that of the least normal
// one.
__host__ __device__ inline int exponent_above(double x) {
  const int exponent = exponent_of(x);
  return (exponent < -1022 ? -1022 : exponent) + 1;
}

// Exponent e such that numbers whose squares are at most `square` are below 2^kTop times 2^e.
__host__ __device__ inline int split_exponent(double square) {
  return square == 0.0 ? 0 : ((exponent_above(square) + 1) >> 1) - kTop;
}

// y = high + low but for 2^-22 of it, as far as low is not below fp16's normal numbers.
struct Halves {
  Half high, low;
};

__device__ inline Halves split(float y) {
  const Half high = to_half(y);
  return {high, to_half(y - to_float(high))};
}

// sum + rest += x without a rounding error in the sum (Knuth).
__host__ __device__ inline void add_exactly(float& sum, float& rest, float x) {
  const float total = sum + x, taken = total - sum;
  rest += (sum - (total - taken)) + (x - taken);
  sum = total;
}

}  // namespace rgfast::cuda::moments
