// Moments of all positions together by the kernels, run by fibres, against Σ T' M T in long double.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <vector>

#include "cuda/common/device.cuh"
#include "tests/check.hpp"

extern "C" void rgfast_moments_pool(const std::int64_t*, std::int64_t, std::int64_t, std::int64_t, double*);
extern "C" void rgfast_moments_pool_ends(const std::int64_t*, std::int64_t, std::int64_t, std::int64_t,
                                         std::int64_t, const double*);

namespace {

using rgfast::shim::launch;
using Real = long double;

std::int64_t word(const void* p) { return reinterpret_cast<std::int64_t>(p); }

std::vector<double> drawn(std::int64_t count, unsigned seed) {
  std::mt19937_64 random(seed);
  std::normal_distribution<double> normal;
  std::vector<double> found(static_cast<std::size_t>(count));
  for (double& each : found) each = normal(random);
  return found;
}

// T of a move by delta[wide], and the same of absolute values, for a bound on what rounding does.
std::vector<Real> moving(const double* delta, std::int64_t wide, bool absolute) {
  const std::int64_t n = wide + 2;
  std::vector<Real> t(static_cast<std::size_t>(n * n));
  const auto at = [&](std::int64_t i, std::int64_t j) -> Real& {
    return t[static_cast<std::size_t>(i * n + j)];
  };
  for (std::int64_t i = 0; i < n; ++i) at(i, i) = 1;
  for (std::int64_t i = 0; i < wide; ++i) {
    const Real by = absolute ? std::fabs(static_cast<Real>(delta[i])) : static_cast<Real>(delta[i]);
    at(i, wide) = 2 * by;
    at(wide + 1, i) = by;
    at(wide + 1, wide) += by * by;
  }
  return t;
}

void add_moved(const double* moment, const double* left, const double* right, std::int64_t d, std::int64_t e,
               bool absolute, std::vector<Real>& to) {
  const auto a = moving(left, d, absolute), b = moving(right, e, absolute);
  const std::int64_t high = d + 2, wide = e + 2;
  std::vector<Real> half(static_cast<std::size_t>(high * wide));
  for (std::int64_t i = 0; i < high; ++i)
    for (std::int64_t k = 0; k < wide; ++k) {
      const Real entry = moment[i * wide + k];
      for (std::int64_t j = 0; j < wide; ++j)
        half[static_cast<std::size_t>(i * wide + j)] +=
            (absolute ? std::fabs(entry) : entry) * b[static_cast<std::size_t>(k * wide + j)];
    }
  for (std::int64_t k = 0; k < high; ++k)
    for (std::int64_t i = 0; i < high; ++i)
      for (std::int64_t j = 0; j < wide; ++j)
        to[static_cast<std::size_t>(i * wide + j)] +=
            a[static_cast<std::size_t>(k * high + i)] * half[static_cast<std::size_t>(k * wide + j)];
}

// Two pairs of any numbers: what the kernels do is linear in them.
void check(std::int64_t positions, std::int64_t d, std::int64_t e) {
  const std::int64_t size = (d + 2) * (e + 2), blocks = (d + 31) / 32;
  std::vector<double> moments[2], left[2], right[2], out[2];
  std::vector<std::int64_t> table;
  for (int k = 0; k < 2; ++k) {
    moments[k] = drawn(positions * size, 1 + k);
    left[k] = drawn(positions * d, 3 + k);
    right[k] = drawn(positions * e, 5 + k);
    out[k].assign(static_cast<std::size_t>(size), NAN);
    for (const void* p :
         {static_cast<const void*>(moments[k].data()), static_cast<const void*>(left[k].data()),
          static_cast<const void*>(right[k].data()), static_cast<const void*>(out[k].data())})
      table.push_back(word(p));
  }
  std::vector<double> parts(static_cast<std::size_t>(2 * blocks * (e + 1)), NAN);
  const auto run = [&](std::uint64_t seed) {
    launch(
        {.grid = {static_cast<unsigned>(blocks), 2, 1}, .block = {256, 1, 1}, .shared = 2048, .seed = seed},
        rgfast_moments_pool, table.data(), positions, d, e, parts.data());
    launch({.grid = {2, 1, 1},
            .block = {256, 1, 1},
            .shared = static_cast<std::size_t>(40 * positions),
            .seed = seed},
           rgfast_moments_pool_ends, table.data(), positions, d, e, blocks,
           static_cast<const double*>(parts.data()));
  };
  run(0);
  const auto once = out[1];
  run(5);
  CHECK(std::memcmp(once.data(), out[1].data(), once.size() * sizeof(double)) == 0);
  for (int k = 0; k < 2; ++k) {
    std::vector<Real> wanted(static_cast<std::size_t>(size)), bound(static_cast<std::size_t>(size));
    for (std::int64_t p = 0; p < positions; ++p)
      for (const bool absolute : {false, true})
        add_moved(moments[k].data() + p * size, left[k].data() + p * d, right[k].data() + p * e, d, e,
                  absolute, absolute ? bound : wanted);
    for (std::size_t at = 0; at < wanted.size(); ++at)
      CHECK(std::fabs(static_cast<Real>(out[k][at]) - wanted[at]) <= 1e-15L * bound[at]);
  }
}

}  // namespace

TEST(moments_pooled_of_odd_shapes) {
  check(1, 1, 1);
  check(3, 33, 5);
  check(2, 4, 35);
  check(9, 65, 33);
}
