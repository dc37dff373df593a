// The kernels of CKA, run by fibres, against sums in long double.
#include "cuda/cka.cuh"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "cuda/tests/cka_layers.hpp"
#include "cuda/tests/effort.hpp"
#include "tests/check.hpp"

#define RGFAST_DECLARE(name)                                                                               \
  extern "C" void rgfast_cka_squares_##name(const std::int64_t*, std::int64_t, std::int64_t, std::int64_t, \
                                            std::int64_t, double*)
RGFAST_DECLARE(float64);
RGFAST_DECLARE(float32);
RGFAST_DECLARE(bfloat16);
RGFAST_DECLARE(float16);
extern "C" void rgfast_cka_sums(const std::int64_t*, std::int64_t, std::int64_t, std::int64_t, std::int64_t,
                                const double*, double*);

namespace {

using namespace rgfast::cuda;
using namespace rgfast::cuda::cka;
using rgfast::cuda::moments::kShared;
using rgfast::cuda::moments::strips;
using rgfast::shim::launch;
using rgfast::test::grid_of;

template <class T>
constexpr auto kSquares = rgfast_cka_squares_float64;
template <>
constexpr auto kSquares<float> = rgfast_cka_squares_float32;
template <>
constexpr auto kSquares<Bfloat16> = rgfast_cka_squares_bfloat16;
template <>
constexpr auto kSquares<Half> = rgfast_cka_squares_float16;

// Pairs of both layers with themselves and each other.
template <class T>
struct Case : rgfast::test::Layers<T> {
  using rgfast::test::Layers<T>::Layers;

  // [positions, 3, kSums] of the pairs (0, 0), (0, 1) and (1, 1).
  std::vector<double> run(std::uint64_t seed = 0) const {
    const std::int64_t positions = this->positions, rows = this->rows;
    auto table = this->table();
    std::int64_t tiles = 0;
    for (const auto& [left, right] : {std::pair{0, 0}, {0, 1}, {1, 1}}) {
      for (const std::int64_t w :
           {std::int64_t{left}, std::int64_t{right}, tiles, std::int64_t{0}, std::int64_t{0}})
        table.push_back(w);
      const std::int64_t high = strips(this->width[left]), wide = strips(this->width[right]);
      tiles += left == right ? high * (high + 1) / 2 : high * wide;
    }
    this->center(table, seed);
    std::vector<double> squares(static_cast<std::size_t>(positions * tiles), NAN);
    std::vector<double> out(static_cast<std::size_t>(positions * 3 * kSums), NAN);
    const dim3 block{kThreads, 1, 1};
    launch({.grid = grid_of(positions * tiles, 1), .block = block, .shared = kShared, .seed = seed},
           kSquares<T>, table.data(), std::int64_t{2}, std::int64_t{3}, tiles, rows, squares.data());
    launch({.grid = grid_of(positions, 3), .block = block, .shared = 8 * kWarps, .seed = seed},
           rgfast_cka_sums, table.data(), std::int64_t{2}, std::int64_t{3}, tiles, rows, squares.data(),
           out.data());
    return out;
  }

  // The largest relative error of all sums.
  double worst(const std::vector<double>& out) const {
    double most = 0.0;
    for (std::int64_t p = 0; p < this->positions; ++p) {
      std::vector<long double> z[2], a[2];
      long double trace[2] = {}, size[2] = {};
      for (int l = 0; l < 2; ++l) {
        z[l] = this->centered(l, p, &size[l]);
        a[l].assign(static_cast<std::size_t>(this->rows), 0.0L);
        for (std::size_t at = 0; at < z[l].size(); ++at)
          a[l][at / static_cast<std::size_t>(this->width[l])] += z[l][at] * z[l][at];
        for (const long double v : a[l]) trace[l] += v;
      }
      const int left[3] = {0, 0, 1}, right[3] = {0, 1, 1};
      for (int k = 0; k < 3; ++k) {
        const int i = left[k], j = right[k];
        long double norm = 0.0L, products = 0.0L;
        for (std::int64_t c = 0; c < this->width[i]; ++c)
          for (std::int64_t e = 0; e < this->width[j]; ++e) {
            long double entry = 0.0L;
            for (std::int64_t r = 0; r < this->rows; ++r)
              entry += z[i][static_cast<std::size_t>(r * this->width[i] + c)] *
                       z[j][static_cast<std::size_t>(r * this->width[j] + e)];
            norm += entry * entry;
          }
        for (std::size_t r = 0; r < a[i].size(); ++r) products += a[i][r] * a[j][r];
        const long double want[kSums] = {norm, products, trace[i], size[i]};
        for (int s = 0; s < kSums; ++s) {
          const double got = out[static_cast<std::size_t>((p * 3 + k) * kSums + s)];
          const auto error = static_cast<double>(std::fabs(got - want[s]) / (want[s] + 1e-300L));
          most = std::fmax(most, std::isnan(error) ? INFINITY : error);
        }
      }
    }
    return most;
  }
};

template <class T>
void check_shapes() {
  for (const std::int64_t d : {1, 16, 33, 64, 67})
    for (const std::int64_t n : {2, 17, 40}) {
      if (rgfast::test::kFew && n * d % 3 != 1) continue;
      Case<T> given(2, n, d, d == 33 ? 70 : 5);
      CHECK(given.worst(given.run()) <= 1e-13);
    }
}

TEST(cka_of_odd_shapes_in_fp64) { check_shapes<double>(); }
TEST(cka_of_odd_shapes_in_fp32) { check_shapes<float>(); }

TEST(cka_of_half_rows) {
  Case<Half> half(1, 30, 33, 9);
  CHECK(half.worst(half.run()) <= 1e-13);
  Case<Bfloat16> brain(1, 30, 33, 9);
  CHECK(brain.worst(brain.run()) <= 1e-13);
}

TEST(cka_keeps_digits_at_an_offset) {
  Case<double> given(1, 40, 18, 5, 1e6);
  CHECK(given.worst(given.run()) <= 1e-13);
}

TEST(cka_of_equal_rows_is_zero_and_of_tiny_ones_is_not) {
  Case<double> given(1, 9, 4, 3);
  given.x[0].assign(given.x[0].size(), 1.0 / 3.0);
  for (double& v : given.x[1]) v *= 1e-170;
  const auto out = given.run();
  for (const std::size_t s : {0, 1, 2}) CHECK(out[s] == 0.0);
  CHECK(out[2 * kSums + 2] > 0.0 && out[2 * kSums + 2] < 1e-300);
}

TEST(cka_bits_depend_on_the_rows_of_a_position_alone) {
  Case<float> given(3, rgfast::test::kFew ? 40 : 130, 20, 65);
  const auto together = given.run();
  CHECK(given.run(5) == together);
  Case<float> alone(1, given.rows, 20, 65);
  for (int l = 0; l < 2; ++l)
    std::copy_n(given.x[l].begin() + given.rows * given.width[l], alone.x[l].size(), alone.x[l].begin());
  const auto one = alone.run();
  CHECK(std::equal(one.begin(), one.end(), together.begin() + static_cast<std::ptrdiff_t>(one.size())));
}

TEST(cka_rounding_of_a_sum_is_exact) {
  const double sum = 1e4 + 1.0 / 3.0;
  CHECK(left_over(1e4, 1.0 / 3.0, sum) == 1.0 / 3.0 - (sum - 1e4));
  CHECK(left_over(1.0 / 3.0, 1e4, sum) == 1.0 / 3.0 - (sum - 1e4));
}

}  // namespace
