// The twins of mma against plain products, with operands laid out as the PTX ISA says, written down once more
// here.
#include "cuda/common/mma.cuh"

#include <cmath>
#include <random>
#include <vector>

#include "tests/check.hpp"

namespace {

using rgfast::shim::launch;
using rgfast::shim::Launch;

struct Problem {
  int m, k;
  std::vector<double> a, b, c, want;

  Problem(int rows, int depth, double (*round)(double)) : m(rows), k(depth) {
    std::mt19937 generator(7);
    std::normal_distribution<double> normal;
    const auto draw = [&](std::vector<double>& x, int count) {
      for (int i = 0; i < count; ++i) x.push_back(round(normal(generator)));
    };
    draw(a, m * k);
    draw(b, k * 8);
    draw(c, m * 8);
    want = c;
    for (int i = 0; i < m; ++i)
      for (int j = 0; j < 8; ++j)
        for (int l = 0; l < k; ++l)
          want[static_cast<std::size_t>(i * 8 + j)] +=
              a[static_cast<std::size_t>(i * k + l)] * b[static_cast<std::size_t>(l * 8 + j)];
  }

  double worst() const {
    double most = 0;
    for (std::size_t i = 0; i < c.size(); ++i) most = std::fmax(most, std::fabs(c[i] - want[i]));
    return most;
  }
};

double as_it_is(double x) { return x; }
double as_half(double x) { return rgfast::cuda::to_float(rgfast::cuda::to_half(static_cast<float>(x))); }
double as_bfloat16(double x) {
  return rgfast::cuda::to_float(rgfast::cuda::to_bfloat16(static_cast<float>(x)));
}

template <int M, int K>
void wide(const double* a, const double* b, double* c) {
  const int lane = static_cast<int>(threadIdx.x), g = lane / 4, t = lane % 4;
  double held_a[M * K / 32], held_b[K / 4], sum[M / 4];
  for (int i = 0; i < M * K / 32; ++i) held_a[i] = a[(g + 8 * (i % (M / 8))) * K + t + 4 * (i / (M / 8))];
  for (int i = 0; i < K / 4; ++i) held_b[i] = b[(t + 4 * i) * 8 + g];
  for (int i = 0; i < M / 4; ++i) sum[i] = c[(g + 8 * (i / 2)) * 8 + 2 * t + i % 2];
  if constexpr (M == 8)
    rgfast::cuda::mma_m8n8k4(sum, held_a[0], held_b[0]);
  else if constexpr (K == 4)
    rgfast::cuda::mma_m16n8k4(sum, held_a, held_b);
  else if constexpr (K == 8)
    rgfast::cuda::mma_m16n8k8(sum, held_a, held_b);
  else
    rgfast::cuda::mma_m16n8k16(sum, held_a, held_b);
  for (int i = 0; i < M / 4; ++i) c[(g + 8 * (i / 2)) * 8 + 2 * t + i % 2] = sum[i];
}

template <class Number>
Number converted(double x) {
  if constexpr (std::is_same_v<Number, rgfast::cuda::Half>)
    return rgfast::cuda::to_half(static_cast<float>(x));
  else
    return rgfast::cuda::to_bfloat16(static_cast<float>(x));
}

template <class Number>
void narrow(const double* a, const double* b, double* c) {
  using Pair = decltype(pair(Number{}, Number{}));
  const int lane = static_cast<int>(threadIdx.x), g = lane / 4, t = lane % 4;
  Pair held_a[4], held_b[2];
  float sum[4];
  for (int i = 0; i < 4; ++i) {
    const double* from = a + (g + 8 * (i % 2)) * 16 + 2 * t + 8 * (i / 2);
    held_a[i] = pair(converted<Number>(from[0]), converted<Number>(from[1]));
  }
  for (int i = 0; i < 2; ++i) {
    const double* from = b + (2 * t + 8 * i) * 8 + g;
    held_b[i] = pair(converted<Number>(from[0]), converted<Number>(from[8]));
  }
  for (int i = 0; i < 4; ++i) sum[i] = static_cast<float>(c[(g + 8 * (i / 2)) * 8 + 2 * t + i % 2]);
  rgfast::cuda::mma_m16n8k16(sum, held_a, held_b);
  for (int i = 0; i < 4; ++i) c[(g + 8 * (i / 2)) * 8 + 2 * t + i % 2] = sum[i];
}

template <int M, int K>
double error_of_wide() {
  Problem problem(M, K, as_it_is);
  launch({}, wide<M, K>, problem.a.data(), problem.b.data(), problem.c.data());
  return problem.worst();
}

template <class Number>
double error_of_narrow(double (*round)(double)) {
  Problem problem(16, 16, round);
  launch({}, narrow<Number>, problem.a.data(), problem.b.data(), problem.c.data());
  return problem.worst();
}

TEST(fp64_products_of_every_shape) {
  CHECK((error_of_wide<8, 4>() < 1e-14));
  CHECK((error_of_wide<16, 4>() < 1e-14));
  CHECK((error_of_wide<16, 8>() < 1e-14));
  CHECK((error_of_wide<16, 16>() < 1e-14));
}

// 16 terms of size about 1: one truncation to fp32 of a sum below 16.
TEST(half_products_with_fp32_sums) {
  CHECK(error_of_narrow<rgfast::cuda::Half>(as_half) < 16 * 0x1p-23);
  CHECK(error_of_narrow<rgfast::cuda::Bfloat16>(as_bfloat16) < 16 * 0x1p-23);
}

void truncates(float* out) {
  rgfast::cuda::HalfPair a[4], b[2];
  const auto value = [](float x) { return pair(rgfast::cuda::to_half(x), rgfast::cuda::to_half(x)); };
  for (auto& x : a) x = value(0.25F);
  for (auto& x : b) x = value(0x1p-13F);
  float c[4] = {0x1p10F, -0x1p10F, 0x1p-24F, 0};
  rgfast::cuda::mma_m16n8k16(c, a, b);
  if (threadIdx.x == 0)
    for (int i = 0; i < 4; ++i) out[i] = c[i];
}

// The sum of the products is 2^-11; one unit of fp32 is 2^-13 at 2^10, so nothing is lost but in the third
// one.
TEST(accumulators_lose_what_lies_below_their_last_bit) {
  float out[4];
  launch({}, truncates, static_cast<float*>(out));
  CHECK(out[0] == 0x1p10F + 0x1p-11F);
  CHECK(out[1] == -0x1p10F + 0x1p-11F);
  CHECK(out[2] == 0x1p-11F + 0x1p-24F);
  CHECK(out[3] == 0x1p-11F);
}

TEST(half_conversions_of_every_bit_pattern) {
  for (unsigned bits = 0; bits < 0x10000U; ++bits) {
    const rgfast::cuda::Half half{static_cast<std::uint16_t>(bits)};
    const rgfast::cuda::Bfloat16 brain{static_cast<std::uint16_t>(bits)};
    const float wide_half = to_float(half), wide_brain = to_float(brain);
    if (!std::isnan(wide_half)) CHECK(rgfast::cuda::to_half(wide_half).bits == bits);
    if (!std::isnan(wide_brain)) CHECK(rgfast::cuda::to_bfloat16(wide_brain).bits == bits);
  }
}

TEST(conversions_to_half_round_to_even) {
  using rgfast::cuda::to_bfloat16;
  using rgfast::cuda::to_half;
  CHECK(to_half(1.0F + 0x1p-11F).bits == 0x3c00);
  CHECK(to_half(1.0F + 3 * 0x1p-11F).bits == 0x3c02);
  CHECK(to_half(0x1p-25F).bits == 0);
  CHECK(to_half(-3 * 0x1p-25F).bits == 0x8002);
  CHECK(to_half(65519.0F).bits == 0x7bff);
  CHECK(to_half(65520.0F).bits == 0x7c00);
  CHECK(to_half(-INFINITY).bits == 0xfc00);
  CHECK(std::isnan(to_float(to_half(NAN))));
  CHECK(to_bfloat16(1.0F + 0x1p-8F).bits == 0x3f80);
  CHECK(to_bfloat16(1.0F + 3 * 0x1p-8F).bits == 0x3f82);
  CHECK(std::isnan(to_float(to_bfloat16(NAN))));
}

}  // namespace
