// Sums about means by the kernel, run by fibres, against rows in long double.
#include "cuda/moments_centered.cuh"

#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <vector>

#include "tests/check.hpp"

extern "C" void rgfast_moments_centered(const std::int64_t*, std::int64_t, std::int64_t, std::int64_t,
                                        double*, double*, double*);

namespace {

using namespace rgfast::cuda::moments;
using rgfast::shim::launch;
using Real = long double;

std::int64_t word(const void* p) { return reinterpret_cast<std::int64_t>(p); }
std::int64_t word(double x) {
  std::int64_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

// Rows of two layers, of d and e features, at some positions, and the moments of what they are less shifts.
struct Part {
  std::int64_t positions, rows, d, e;
  std::vector<double> x, y, shift, moments;  // y is x where the layer is the same

  Part(std::int64_t positions, std::int64_t rows, std::int64_t d, std::int64_t e, bool own, double offset,
       unsigned seed)
      : positions(positions), rows(rows), d(d), e(e) {
    std::mt19937_64 random(seed);
    std::normal_distribution<double> normal;
    x.resize(static_cast<std::size_t>(positions * rows * d));
    for (double& each : x) each = normal(random) + offset;
    y = x;
    if (!own) {
      y.resize(static_cast<std::size_t>(positions * rows * e));
      for (double& each : y) each = normal(random) - offset;
    }
    shift.assign(static_cast<std::size_t>(positions * d), offset);
    moments.resize(static_cast<std::size_t>(positions * (d + 2) * (e + 2)));
    for (std::int64_t p = 0; p < positions; ++p)
      for (std::int64_t i = 0; i < d + 2; ++i)
        for (std::int64_t j = 0; j < e + 2; ++j) {
          Real sum = 0;
          for (std::int64_t r = 0; r < rows; ++r)
            sum += extended(x, d, offset, p, r, i) * extended(y, e, own ? offset : -offset, p, r, j);
          moments[static_cast<std::size_t>((p * (d + 2) + i) * (e + 2) + j)] = static_cast<double>(sum);
        }
  }

  Real entry(const std::vector<double>& of, std::int64_t wide, std::int64_t p, std::int64_t r,
             std::int64_t i) const {
    return of[static_cast<std::size_t>((p * rows + r) * wide + i)];
  }

  Real extended(const std::vector<double>& of, std::int64_t wide, double off, std::int64_t p, std::int64_t r,
                std::int64_t i) const {
    if (i == wide + 1) return 1;
    if (i < wide) return entry(of, wide, p, r, i) - off;
    Real sum = 0;
    for (std::int64_t k = 0; k < wide; ++k)
      sum += extended(of, wide, off, p, r, k) * extended(of, wide, off, p, r, k);
    return sum;
  }

  // Of position p: rows less their mean, and the mean.
  std::vector<Real> centered(const std::vector<double>& of, std::int64_t wide, std::int64_t p,
                             std::vector<Real>& mean) const {
    mean.assign(static_cast<std::size_t>(wide), 0);
    std::vector<Real> z(static_cast<std::size_t>(rows * wide));
    for (std::int64_t i = 0; i < wide; ++i) {
      Real& sum = mean[static_cast<std::size_t>(i)];
      for (std::int64_t r = 0; r < rows; ++r) sum += entry(of, wide, p, r, i);
      if (rows > 0) sum /= static_cast<Real>(rows);
      for (std::int64_t r = 0; r < rows; ++r)
        z[static_cast<std::size_t>(r * wide + i)] = entry(of, wide, p, r, i) - sum;
    }
    return z;
  }
};

bool near(double found, Real wanted, Real size, double allowed) {
  return std::fabs(static_cast<Real>(found) - wanted) <= allowed * size;
}

// Both parts as those of one pair, and of another without matrices; the second begins where the first ends.
void check(std::int64_t d, std::int64_t e, bool own, std::int64_t rows, double offset = 0.5,
           double allowed = 1e-13) {
  const Part parts[2] = {{2, rows, d, e, own, offset, 1}, {1, rows + 3, d, e, own, offset, 2}};
  const std::int64_t entries = 6;
  std::vector<std::int64_t> table;
  for (std::int64_t k = 0; k < 2; ++k)
    for (int part = 0; part < 2; ++part)
      for (const std::int64_t w :
           {word(parts[part].moments.data()), own && k == 0 ? word(parts[part].shift.data()) : 0,
            3 * k + 2 * part, parts[part].positions, word(1.0)})
        table.push_back(w);
  std::vector<double> sums(4 * entries, NAN), again(4 * entries, NAN);
  std::vector<double> matrices(own ? static_cast<std::size_t>(3 * d * d) : 0, NAN);
  std::vector<double> means(own ? static_cast<std::size_t>(3 * d) : 0, NAN);
  const auto run = [&](std::vector<double>& to, std::uint64_t seed) {
    launch(
        {.grid = {2, 4, 1}, .block = {kCenteringThreads, 1, 1}, .shared = 8 * kCenteringWarps, .seed = seed},
        rgfast_moments_centered, table.data(), d, e, entries, to.data(), matrices.data(), means.data());
  };
  run(sums, 0);
  run(again, 7);
  CHECK(std::memcmp(sums.data(), again.data(), sums.size() * sizeof(double)) == 0);
  for (std::int64_t at = 0; at < 3; ++at) {
    const Part& part = parts[at / 2];
    const std::int64_t p = at % 2;
    std::vector<Real> mean, other;
    const auto x = part.centered(part.x, d, p, mean), y = part.centered(part.y, e, p, other);
    Real norm = 0, product = 0, trace = 0, accumulated = 0;
    for (std::int64_t i = 0; i < d; ++i)
      for (std::int64_t j = 0; j < e; ++j) {
        Real cross = 0, size = 0;
        for (std::int64_t r = 0; r < part.rows; ++r) {
          const Real term = x[static_cast<std::size_t>(r * d + i)] * y[static_cast<std::size_t>(r * e + j)];
          cross += term;
          size += std::fabs(term);
        }
        norm += cross * cross;
        if (own && j <= i)
          CHECK(near(matrices[static_cast<std::size_t>((at * d + i) * d + j)], cross, size + 1, allowed));
        if (own && j > i) CHECK(std::isnan(matrices[static_cast<std::size_t>((at * d + i) * d + j)]));
      }
    for (std::int64_t r = 0; r < part.rows; ++r) {
      Real a = 0, b = 0;
      for (std::int64_t i = 0; i < d; ++i) {
        a += x[static_cast<std::size_t>(r * d + i)] * x[static_cast<std::size_t>(r * d + i)];
        const Real moved = part.entry(part.x, d, p, r, i) - offset;
        accumulated += moved * moved;
      }
      for (std::int64_t j = 0; j < e; ++j)
        b += y[static_cast<std::size_t>(r * e + j)] * y[static_cast<std::size_t>(r * e + j)];
      product += a * b;
      trace += a;
    }
    for (std::int64_t k = 0; k < 2; ++k) {
      const auto found = [&](std::int64_t s) {
        return sums[static_cast<std::size_t>(s * entries + 3 * k + at)];
      };
      CHECK(near(found(0), norm, norm + 1e-30L, allowed));
      CHECK(near(found(1), product, product + 1, allowed));
      CHECK(near(found(2), trace, trace + 1, allowed));
      CHECK(near(found(3), accumulated, accumulated, allowed));
    }
    const Real root = std::sqrt(static_cast<Real>(part.rows));
    for (std::int64_t i = 0; own && i < d; ++i) {
      const Real wanted = mean[static_cast<std::size_t>(i)] * root;
      CHECK(near(means[static_cast<std::size_t>(at * d + i)], wanted, std::fabs(wanted) + 1, allowed));
    }
  }
}

}  // namespace

TEST(moments_centered_of_odd_shapes) {
  for (const std::int64_t d : {1, 2, 31, 33}) check(d, d, true, 5);
  check(3, 40, false, 4);
  check(65, 2, false, 9);
}

TEST(moments_centered_far_from_zero) { check(6, 6, true, 12, 1e6); }

TEST(moments_centered_of_no_rows_are_zero) {
  const Part none(1, 0, 4, 4, true, 2.0, 3);
  const std::vector<std::int64_t> table{word(none.moments.data()), word(none.shift.data()), 0, 1, word(1.0)};
  std::vector<double> sums(4, NAN), matrix(16, NAN), mean(4, NAN);
  launch({.grid = {1, 1, 1}, .block = {kCenteringThreads, 1, 1}, .shared = 8 * kCenteringWarps},
         rgfast_moments_centered, table.data(), std::int64_t{4}, std::int64_t{4}, std::int64_t{1},
         sums.data(), matrix.data(), mean.data());
  for (const double each : sums) CHECK(each == 0.0);
  for (const double each : mean) CHECK(each == 0.0);
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j <= i; ++j) CHECK(matrix[static_cast<std::size_t>(4 * i + j)] == 0.0);
}
