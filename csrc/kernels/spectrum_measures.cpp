#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>

#include "kernels/spectrum.hpp"
#include "kernels/spectrum_solve.hpp"
#include "rgfast/parallel.hpp"

namespace rgfast::spectrum {
namespace {

constexpr double kUnit = 0x1p-53;
constexpr double kTiny = 0x1p-1022;
constexpr std::int64_t kTile = 256;  // terms to a partial sum of a moment

// Bound on the relative error of exp(entropy) over `rank` outcomes whose distribution is off by a total
// variation of t (Fannes and Audenaert), and what evaluating it rounds.
double entropy_error(double t, double rank) {
  const double most = std::log(std::max(rank, 1.0));
  double change = most;
  if (t < 0.5) {
    const double binary = (t > 0.0 ? -t * std::log(t) : 0.0) - (1.0 - t) * std::log1p(-t);
    change = std::min(t * std::log(std::max(rank - 1.0, 1.0)) + binary, most);
  }
  return std::expm1(change) + 4.0 * (rank + 4.0) * kUnit;
}

}  // namespace

void effective_ranks(const double* values, std::int64_t batch, std::int64_t m, std::int64_t terms,
                     const MomentInfo& info, const RankInfo& ranks, int threads) {
  constexpr std::int64_t kEach = 64;
  const auto size = static_cast<double>(m);
  const double chain = static_cast<double>(std::min(terms, kTile + (terms + kTile - 1) / kTile)) + 4.0;
  threads = useful_threads(threads, batch, 160 * m + 2000);
  parallel_for((batch + kEach - 1) / kEach, threads, [&](std::int64_t block, int) {
    for (std::int64_t b = block * kEach; b < std::min(batch, (block + 1) * kEach); ++b) {
      const double* const value = values + b * m;
      const double accumulated = info.accumulated[b];
      const std::int64_t limit = std::min(info.rank_limit[b], m);
      const double top = std::max(value[m - 1], 0.0);
      const double epsilon = kUnit * (chain * accumulated + std::max(50.0, size / 2.0) * top);
      const double root = std::max(std::sqrt(epsilon), kTiny);
      const double floor = 2.0 * kUnit * std::sqrt(accumulated);
      const double per_top = top > 0.0 ? 1.0 / top : 0.0;
      const double per_root = top > 0.0 ? 1.0 / std::sqrt(top) : 0.0;
      // With w = lambda / lambda_1: the entropy is ln S - T / S, S the sum and T that of its terms'
      // logarithms.
      double sum = 0.0;
      double logs = 0.0;
      double squares = 0.0;
      double square_logs = 0.0;
      double error = 0.0;
      for (std::int64_t i = 0; i < limit; ++i) {
        const double lambda = std::max(value[m - 1 - i], 0.0);
        const double sigma = std::sqrt(lambda);
        error += epsilon / std::max(sigma, root) + floor;
        if (!(lambda > 0.0)) continue;
        const double w = lambda * per_top;
        const double s = sigma * per_root;
        const double l = std::log(w);
        sum += s;
        logs += s * l;
        squares += w;
        square_logs += w * l;
      }
      const double total = sum * std::sqrt(top);
      const double t = std::min(error / std::max(total, kTiny), 1.0);
      const double mass = ranks.variance ? squares : sum;
      const double log_mass = ranks.variance ? square_logs : 0.5 * logs;
      ranks.rank[b] = mass > 0.0 ? std::exp(std::log(mass) - log_mass / mass) : 0.0;
      ranks.bound[b] = std::isfinite(accumulated) ? entropy_error(t, static_cast<double>(limit))
                                                  : std::numeric_limits<double>::infinity();
    }
  });
}

}  // namespace rgfast::spectrum
