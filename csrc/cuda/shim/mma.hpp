// The scalar twin of mma: the lane that comes last gathers both operands from all lanes, multiplies, and adds
// to every lane's accumulators.
#pragma once

#include "cuda/common/half.cuh"
#include "cuda/shim/collectives.hpp"

namespace rgfast::shim {

template <class Operand, class Accumulator>
struct Fragments {
  const Operand* a;
  const Operand* b;
  Accumulator* c;
};

// fp64 [M, K] x [K, 8]: one product and sum after the other, each rounded once.
template <int M, int K>
struct Wide {
  using Operand = double;
  using Accumulator = double;
  static constexpr int rows = M, depth = K, halves = M / 8;

  static double a(const double* held, int row, int k) { return held[k / 4 * halves + row / 8]; }
  static double b(const double* held, int k) { return held[k / 4]; }
  static int lane_of_a(int row, int k) { return row % 8 * 4 + k % 4; }
  static int lane_of_b(int k, int column) { return column * 4 + k % 4; }
  static double add(double sum, const double* row, const double* column) {
    for (int k = 0; k < K; ++k) sum = std::fma(row[k], column[k], sum);
    return sum;
  }
};

// fp16 or bf16 [16, 16] x [16, 8] with fp32 accumulators. Tensor cores truncate the sum, so this does: a
// kernel that keeps long sums in the accumulator then shows the error that it has on the card.
template <class Pair>
struct Narrow {
  using Operand = Pair;
  using Accumulator = float;
  static constexpr int rows = 16, depth = 16, halves = 2;

  static float number(Pair two, int which) {
    const auto bits = static_cast<std::uint16_t>(two.bits >> (16 * which));
    if constexpr (std::is_same_v<Pair, cuda::HalfPair>)
      return cuda::to_float(cuda::Half{bits});
    else
      return cuda::to_float(cuda::Bfloat16{bits});
  }
  static double a(const Pair* held, int row, int k) { return number(held[k / 8 * 2 + row / 8], k % 2); }
  static double b(const Pair* held, int k) { return number(held[k / 8], k % 2); }
  static int lane_of_a(int row, int k) { return row % 8 * 4 + k % 8 / 2; }
  static int lane_of_b(int k, int column) { return column * 4 + k % 8 / 2; }
  static float add(float start, const double* row, const double* column) {
    double sum = start;
    for (int k = 0; k < depth; ++k) sum += row[k] * column[k];
    const auto nearest = static_cast<float>(sum);
    return std::fabs(static_cast<double>(nearest)) > std::fabs(sum) ? std::nextafter(nearest, 0.0F) : nearest;
  }
};

template <class Shape>
void multiply_warp(unsigned, const void* const* in, void* const*) {
  using Held = Fragments<typename Shape::Operand, typename Shape::Accumulator>;
  double a[Shape::rows][Shape::depth], b[8][Shape::depth];
  for (int k = 0; k < Shape::depth; ++k) {
    for (int row = 0; row < Shape::rows; ++row)
      a[row][k] = Shape::a(static_cast<const Held*>(in[Shape::lane_of_a(row, k)])->a, row, k);
    for (int column = 0; column < 8; ++column)
      b[column][k] = Shape::b(static_cast<const Held*>(in[Shape::lane_of_b(k, column)])->b, k);
  }
  for (int lane = 0; lane < 32; ++lane) {
    auto* c = static_cast<const Held*>(in[lane])->c;
    for (int i = 0; i < 2 * Shape::halves; ++i)
      c[i] = Shape::add(c[i], a[lane / 4 + 8 * (i / 2)], b[2 * (lane % 4) + i % 2]);
  }
}

template <class Shape>
void multiply(const char* what, Site site, typename Shape::Accumulator* c, const typename Shape::Operand* a,
              const typename Shape::Operand* b) {
  const Fragments<typename Shape::Operand, typename Shape::Accumulator> held{a, b, c};
  warp_collective(what, site, 0xffffffffU, &held, nullptr, multiply_warp<Shape>);
}

}  // namespace rgfast::shim
