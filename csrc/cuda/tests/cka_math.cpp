// Inner products and faults of sums, on the host.
#include "cuda/cka_math.cuh"

#include <cmath>
#include <cstdint>

#include "tests/check.hpp"

namespace {

using namespace rgfast::cuda::cka;
using rgfast::cuda::power_of_two;

TEST(cka_math_exponents_bring_a_trace_near_one) {
  for (const double trace : {1e-130, 0.3, 1.0, 3.0, 4.0, 1e18, 1e150}) {
    const double scaled = trace * power_of_two<double>(-2 * exponent_for(trace));
    CHECK(scaled >= 0.25 && scaled < 4.0);
  }
  CHECK(exponent_for(0.0) == 0);
}

TEST(cka_math_inner_products) {
  const PairSums sums{7.0, 3.0, 2.0, 0.0};
  CHECK(inner_product(sums, 5.0, 1.0, 1.0, 6.0, false) == 10.0);
  CHECK(inner_product(sums, 5.0, 1.0, 1.0, 6.0, true) == 7.0 - 6.0 / 4.0 + 10.0 / 20.0);
  CHECK(inner_product(sums, 5.0, 0.5, 0.25, 6.0, true) == (7.0 - 6.0 / 4.0 + 10.0 / 20.0) / 8.0);
  // At the ends of the range nothing over- or underflows.
  for (const double trace : {1e-129, 1e149}) {
    const double unit = power_of_two<double>(-2 * exponent_for(trace)), square = trace * trace;
    const double value = inner_product({square, 0.5 * square, trace, 0.0}, trace, unit, unit, 10.0, true);
    const double size = trace * unit;
    CHECK(std::fabs(value / (size * size * (1.0 - 1.0 / 8.0 + 1.0 / 72.0)) - 1.0) < 1e-14);
  }
}

TEST(cka_math_variance_is_more_than_rounding) {
  CHECK(varies(2e-13, 1.0) && !varies(1e-13, 1.0) && !varies(0.0, 0.0) && !varies(NAN, 1.0));
}

TEST(cka_math_faults_of_all_samples) {
  const auto fault = [](double trace, double apart) { return faults_of_all({1.0, 1.0, trace, apart}); };
  CHECK(fault(1.0, 0.0) == 0 && fault(1.0, 8e16) == 0 && fault(0.0, 1e30) == 0);
  CHECK(fault(1.0, 9e16) == kOutOfRange && fault(1.0, NAN) == kOutOfRange);
  CHECK(fault(1e-131, 0.0) == kOutOfRange && fault(1e151, 0.0) == kOutOfRange);
  CHECK(fault(NAN, 0.0) == kNotFinite && fault(INFINITY, 0.0) == kNotFinite);
}

TEST(cka_math_faults_without_a_group) {
  const auto fault = [](double trace, double apart, double all) {
    return faults_without({1.0, 1.0, trace, apart}, {1.0, 1.0, all, 0.0}, 9.0, 10.0);
  };
  CHECK(fault(0.9, 0.0, 1.0) == 0 && fault(0.9, 0.09, 1.0) == 0 && fault(0.0, 0.0, 0.0) == 0);
  CHECK(fault(0.9, 0.11, 1.0) == kMoved);    // far from the mean of all
  CHECK(fault(0.8e-3, 0.0, 1.0) == kMoved);  // and so much smaller
  CHECK(fault(NAN, 0.0, 1.0) == kMoved && fault(0.9, NAN, 1.0) == kMoved);
}

TEST(cka_math_counts_without_a_group) {
  for (std::int64_t rows = 4; rows < 20; ++rows)
    for (std::int64_t groups = 2; groups < 8; ++groups)
      for (std::int64_t g = 0; g < groups; ++g) {
        std::int64_t left = 0;
        for (std::int64_t r = 0; r < rows; ++r) left += r % groups != g ? 1 : 0;
        CHECK(left_without(rows, groups, g) == left);
      }
}

}  // namespace
