// Rank measures by the kernel, run by fibres, against sums in long double.
#include "cuda/spectrum_ranks_math.cuh"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <vector>

#include "tests/check.hpp"

extern "C" void rgfast_spectrum_ranks(const double*, const double*, const double*, const std::int64_t*,
                                      std::int64_t, std::int64_t, std::int64_t, std::int64_t, std::int64_t,
                                      double, double*, double*);

namespace {

using namespace rgfast::cuda::ranks;
using rgfast::shim::launch;
using Real = long double;

struct Table {
  std::int64_t batch, d;
  std::vector<double> sigma, rows;

  double at(int measure, std::int64_t matrix) const {
    return rows[static_cast<std::size_t>(measure * batch + matrix)];
  }
};

// Of eigenvalues [kinds, batch, m] of matrices all of whose d features vary.
Table measured(const std::vector<double>& values, std::int64_t batch, std::int64_t m, std::int64_t d,
               const std::vector<std::int64_t>& count, std::uint64_t seed = 0) {
  const auto kinds = static_cast<std::int64_t>(values.size()) / (batch * m);
  std::vector<double> variance(static_cast<std::size_t>(kinds * batch * d), 1.0);
  std::vector<double> accumulated(static_cast<std::size_t>(batch), 0.0);
  Table table{batch, d, std::vector<double>(static_cast<std::size_t>(batch * d), NAN),
              std::vector<double>(static_cast<std::size_t>(10 * batch), NAN)};
  launch({.grid = {static_cast<unsigned>(batch), 1, 1}, .block = {128, 1, 1}, .shared = 192, .seed = seed},
         rgfast_spectrum_ranks, values.data(), variance.data(), accumulated.data(), count.data(), batch, m, d,
         kinds, std::int64_t{m < d}, 1e-7, table.sigma.data(), table.rows.data());
  return table;
}

bool near(double found, Real wanted) { return std::fabs(found - wanted) <= 1e-13L * std::fabs(wanted); }

}  // namespace

TEST(ranks_bound_of_entropy) {
  CHECK(entropy_error(1.0, 0.0, 1.0) == 20.0 * 0x1p-53);
  // Half of everything may be anything: all ranks but their logarithm are possible.
  CHECK(std::fabs(entropy_error(1.0, 0.6, 8.0) - 7.0) <= 1e-14);
  const Real t = 0.1L, change = t * std::log(7.0L) - t * std::log(t) - 0.9L * std::log(0.9L);
  CHECK(near(entropy_error(2.0, 0.2, 8.0), std::exp(change) - 1));
  CHECK(std::isfinite(entropy_error(0.0, 0.0, 0.0)));
}

TEST(ranks_bound_of_moments) {
  CHECK(gram_error(100.0, 2.0, 1.0, 4.0) == 0x1p-53 * (104.0 * 2.0 + 50.0));
  CHECK(gram_error(1024.0, 1.0, 1.0, 200.0) == 0x1p-53 * (264.0 + 100.0));
  CHECK(root_error(0.0, 4e-20, 2e-10, 1e-9) == 4e-20 / 2e-10 + 1e-9);
  CHECK(root_error(1.0, 4e-20, 2e-10, 0.0) == 4e-20);
}

TEST(ranks_of_random_spectra) {
  for (const std::int64_t d : {1, 2, 33, 128, 129, 300}) {
    std::mt19937_64 random(static_cast<unsigned>(d));
    std::uniform_real_distribution<double> uniform;
    std::vector<double> values(static_cast<std::size_t>(4 * d));
    for (double& each : values) each = std::pow(uniform(random), 6);
    for (int k = 0; k < 4; ++k) std::sort(values.begin() + k * d, values.begin() + (k + 1) * d);
    const Table found = measured(values, 2, d, d, {1000, 1000});
    const Table again = measured(values, 2, d, d, {1000, 1000}, 9);
    CHECK(std::memcmp(found.rows.data(), again.rows.data(), found.rows.size() * sizeof(double)) == 0);
    for (std::int64_t k = 0; k < 4; ++k) {
      Real total = 0, shares = 0, squares = 0, entropy = 0, of_shares = 0;
      const double* mine = values.data() + k * d;
      const Real top = mine[d - 1];
      for (std::int64_t i = 0; i < d; ++i) {
        total += std::sqrt(static_cast<Real>(mine[i]));
        shares += mine[i] / top;
        squares += mine[i] / top * (mine[i] / top);
      }
      for (std::int64_t i = 0; i < d; ++i) {
        const Real p = std::sqrt(static_cast<Real>(mine[i])) / total, q = mine[i] / top / shares;
        entropy -= p > 0 ? p * std::log(p) : 0;
        of_shares -= q > 0 ? q * std::log(q) : 0;
      }
      const bool raw = k >= 2;
      CHECK(near(found.at(raw ? 5 : 0, k % 2), std::exp(entropy)));
      CHECK(near(found.at(raw ? 6 : 1, k % 2), std::exp(of_shares)));
      if (raw) continue;
      CHECK(near(found.at(2, k), shares * shares / squares));
      CHECK(near(found.at(3, k), shares));
      for (std::int64_t i = 0; i < d; ++i)
        CHECK(found.sigma[static_cast<std::size_t>(k * d + i)] == std::sqrt(mine[d - 1 - i]));
    }
  }
}

TEST(ranks_of_nothing_of_few_rows_and_of_no_numbers) {
  const double values[] = {0.0, 0.0, 1.0, 4.0, 1.0, NAN, 0.0, 9.0, 1.0, 4.0, 1.0, 2.0};
  const Table found = measured({std::begin(values), std::end(values)}, 3, 2, 5, {9, 1, 9});
  for (int measure = 0; measure < 5; ++measure) {
    CHECK(found.at(measure, 0) == 0.0);
    CHECK(std::isnan(found.at(measure, 1)));
  }
  CHECK(found.at(5, 0) == 1.0 && found.at(8, 0) == 0.0);  // rows that are all the same
  CHECK(found.at(9, 0) == 1.0 && found.at(9, 1) == 1.0 && found.at(9, 2) == 0.0);
  CHECK(found.sigma[4] == 0.0 && std::isnan(found.sigma[5]));
}
