#include "kernels/cka.hpp"

#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <vector>

#include "tests/check.hpp"

namespace {

using rgfast::cka::Layer;
using rgfast::cka::Problem;
using rgfast::cka::Result;
using rgfast::cka::Status;

struct Found {
  std::vector<double> centered, u_centered, trace, grand;
  std::vector<Status> status;
};

Found products(const Problem& problem) {
  const auto positions = static_cast<std::size_t>(problem.positions);
  const double poison = std::numeric_limits<double>::quiet_NaN();
  Found out;
  const auto variants = static_cast<std::size_t>(problem.variants());
  out.centered.assign(positions * variants * problem.pairs.size(), poison);
  out.u_centered.assign(positions * variants * problem.pairs.size(), poison);
  out.trace.assign(positions * variants * problem.layers.size(), poison);
  out.grand.assign(positions * variants * problem.layers.size(), poison);
  out.status.assign(positions * problem.layers.size(), Status::good);
  // Just as much as is asked for, so that a sanitizer sees a step outside.
  std::vector<double> space(rgfast::cka::workspace_bytes(problem) / 8 + 8, poison);
  auto* const at = reinterpret_cast<std::byte*>(space.data());
  const std::size_t off = reinterpret_cast<std::uintptr_t>(at) % 64;
  rgfast::cka::run(problem,
                   Result{out.centered.data(), out.u_centered.data(), out.trace.data(), out.grand.data(),
                          out.status.data()},
                   at + (off == 0 ? 0 : 64 - off));
  return out;
}

// ⟨K, M⟩ / (‖K‖ ‖M‖) of the doubly centred Grams, one entry at a time.
double brute(const std::vector<float>& x, std::int64_t d, const std::vector<float>& y, std::int64_t e,
             std::int64_t n) {
  const auto gram = [n](const std::vector<float>& z, std::int64_t width) {
    std::vector<double> mean(static_cast<std::size_t>(width));
    for (std::int64_t i = 0; i < n * width; ++i)
      mean[static_cast<std::size_t>(i % width)] += z[static_cast<std::size_t>(i)] / static_cast<double>(n);
    std::vector<double> k(static_cast<std::size_t>(n * n));
    for (std::int64_t i = 0; i < n; ++i)
      for (std::int64_t j = 0; j < n; ++j)
        for (std::int64_t c = 0; c < width; ++c)
          k[static_cast<std::size_t>(i * n + j)] +=
              (z[static_cast<std::size_t>(i * width + c)] - mean[static_cast<std::size_t>(c)]) *
              (z[static_cast<std::size_t>(j * width + c)] - mean[static_cast<std::size_t>(c)]);
    return k;
  };
  const std::vector<double> k = gram(x, d), m = gram(y, e);
  double km = 0.0, kk = 0.0, mm = 0.0;
  for (std::size_t i = 0; i < k.size(); ++i) {
    km += k[i] * m[i];
    kk += k[i] * k[i];
    mm += m[i] * m[i];
  }
  return km / std::sqrt(kk * mm);
}

TEST(cka_of_odd_shapes_on_both_routes) {
  std::mt19937 generator(0);
  std::normal_distribution<float> normal(3.0F, 1.0F);
  for (const std::int64_t n : {2, 3, 17, 63, 65, 130})
    for (const auto& [d, e] : {std::pair<std::int64_t, std::int64_t>{1, 5}, {16, 33}, {70, 64}}) {
      std::vector<float> x(static_cast<std::size_t>(n * d)), y(static_cast<std::size_t>(n * e));
      for (float& v : x) v = normal(generator);
      for (float& v : y) v = normal(generator);
      const double expected = brute(x, d, y, e, n);
      for (const bool by_features : {false, true})
        for (const bool single : {false, true}) {
          const Problem problem{1,
                                n,
                                {Layer{x.data(), false, 0, d, d}, Layer{y.data(), false, 0, e, e}},
                                {{0, 0}, {1, 1}, {0, 1}},
                                by_features,
                                single,
                                3};
          const Found found = products(problem);
          const double got = found.centered[2] / std::sqrt(found.centered[0] * found.centered[1]);
          CHECK(std::abs(got - expected) <= (single ? 1e-5 : 1e-10));
        }
    }
}

// Of all samples and of all but each group, against products of just those.
TEST(cka_of_groups) {
  std::mt19937 generator(1);
  std::normal_distribution<float> normal(3.0F, 1.0F);
  for (const std::int64_t n : {9, 64, 131, 200})
    for (const std::int64_t groups : {2, 3, 8}) {
      const std::int64_t d = groups == 3 ? 70 : 21;
      constexpr std::int64_t positions = 2;
      std::vector<float> x(static_cast<std::size_t>(positions * n * d)), y = x;
      for (float& v : x) v = normal(generator);
      for (float& v : y) v = normal(generator);
      const std::vector<std::pair<int, int>> pairs{{0, 0}, {1, 1}, {0, 1}};
      const auto layer = [&](const std::vector<float>& z, std::int64_t samples) {
        return Layer{z.data(), false, samples * d, d, d};
      };
      for (const auto& [single, by_features] :
           {std::pair{false, false}, {true, false}, {false, true}, {true, true}}) {
        Problem problem{positions, n, {layer(x, n), layer(y, n)}, pairs, by_features, single, 3};
        problem.groups = groups;
        const Found found = products(problem);
        for (std::int64_t v = 0; v <= groups; ++v) {
          std::vector<float> few_x, few_y;
          for (std::int64_t p = 0; p < positions; ++p)
            for (std::int64_t i = 0; i < n; ++i)
              for (std::int64_t j = 0; j < d && i % groups != v - 1; ++j) {
                few_x.push_back(x[static_cast<std::size_t>((p * n + i) * d + j)]);
                few_y.push_back(y[static_cast<std::size_t>((p * n + i) * d + j)]);
              }
          const std::int64_t left = static_cast<std::int64_t>(few_x.size()) / (positions * d);
          const Found wanted = products(
              {positions, left, {layer(few_x, left), layer(few_y, left)}, pairs, by_features, single, 1});
          for (std::size_t p = 0; p < positions; ++p) {
            const std::size_t at =
                3 * (p * static_cast<std::size_t>(1 + groups) + static_cast<std::size_t>(v));
            const auto ratio = [](const std::vector<double>& all, std::size_t from) {
              return all[from + 2] / std::sqrt(all[from] * all[from + 1]);
            };
            const double limit = single ? 1e-5 : 1e-11;
            CHECK(std::abs(ratio(found.centered, at) - ratio(wanted.centered, 3 * p)) <= limit);
            CHECK(left < 4 ||
                  std::abs(ratio(found.u_centered, at) - ratio(wanted.u_centered, 3 * p)) <= limit);
          }
        }
      }
    }
}

TEST(cka_tells_constant_and_not_finite_layers) {
  std::vector<double> x(40 * 3, 0.1), y(40 * 3);
  for (std::size_t i = 0; i < y.size(); ++i) y[i] = static_cast<double>(i * i % 7);
  y[100] = std::numeric_limits<double>::infinity();
  for (const bool by_features : {false, true}) {
    const Found found = products(Problem{1,
                                         40,
                                         {Layer{x.data(), true, 0, 3, 3}, Layer{y.data(), true, 0, 3, 3}},
                                         {{0, 0}},
                                         by_features,
                                         false,
                                         1});
    CHECK(found.status[0] == Status::constant && found.status[1] == Status::not_finite);
    CHECK(found.centered[0] == 0.0 && found.trace[0] == 0.0);
  }
}

}  // namespace
