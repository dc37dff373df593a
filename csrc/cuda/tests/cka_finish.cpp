// What is made of sums of pairs of layers, against the same in long double, and what is wrong with them.
#include "cuda/cka_finish.cuh"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <random>
#include <utility>
#include <vector>

#include "tests/check.hpp"

extern "C" void rgfast_cka_finish(const std::int64_t*, std::int64_t, std::int64_t, std::int64_t, std::int64_t,
                                  std::int64_t, std::int64_t, std::int64_t, const double*, std::int64_t,
                                  std::int64_t, double, const double*, std::int64_t, std::int64_t, double,
                                  double*, std::int64_t*);

namespace {

using namespace rgfast::cuda::cka;
using rgfast::shim::launch;

struct Sizes {
  std::vector<PairSums> sums;  // [positions, count, variants, pairs]
  std::int64_t count = 1, rows = 10;
  double weight = 1.0;
};

struct Case {
  std::int64_t layers, first, positions, variants, start = 0;
  std::vector<std::pair<std::int64_t, std::int64_t>> pairs;
  Sizes sizes[2];

  // All pairs of so many layers, or of neighbors, at `here` positions, of sums that kernels might have.
  Case(std::int64_t count, std::int64_t here, bool near, std::int64_t others = 1)
      : layers(count), first(count), positions(here), variants(others) {
    for (std::int64_t i = 0; i < layers; ++i)
      for (std::int64_t j = i; j < (near ? std::min(i + 2, layers) : layers); ++j) pairs.emplace_back(i, j);
    sizes[1].count = 0;
    fill(sizes[0], 1);
  }

  void fill(Sizes& of, unsigned seed) const {
    std::mt19937 generator(seed);
    std::uniform_real_distribution<double> draw(0.5, 1.0);
    for (std::int64_t k = 0; k < positions * of.count * variants; ++k) {
      std::vector<double> scale(static_cast<std::size_t>(layers)), trace;
      for (double& s : scale) s = draw(generator);
      for (const double s : scale) trace.push_back(10.0 * s);
      for (const auto& [i, j] : pairs) {
        const double size = scale[static_cast<std::size_t>(i)] * scale[static_cast<std::size_t>(j)];
        of.sums.push_back({(i == j ? 40.0 : 30.0 * draw(generator)) * size, 12.0 * size,
                           trace[static_cast<std::size_t>(i)], 0.0});
      }
    }
  }

  std::size_t own(std::int64_t layer) const {
    const auto found = std::find(pairs.begin(), pairs.end(), std::pair{layer, layer});
    return static_cast<std::size_t>(found - pairs.begin());
  }

  std::vector<double> run(Task task, bool debiased, std::size_t numbers, std::vector<std::int64_t>& faults,
                          std::uint64_t seed = 0) const {
    std::vector<std::int64_t> table(static_cast<std::size_t>(layers * rgfast::cuda::moments::kLayerWords));
    for (const auto& [i, j] : pairs)
      for (const std::int64_t w :
           {i, j, std::int64_t{0}, static_cast<std::int64_t>(own(i)), static_cast<std::int64_t>(own(j))})
        table.push_back(w);
    std::vector<double> to(numbers, 0.25);
    const std::int64_t all = start + positions;
    faults.assign(static_cast<std::size_t>(all * variants), -1);
    const auto from = [](const Sizes& of) { return reinterpret_cast<const double*>(of.sums.data()); };
    launch({.grid = {static_cast<unsigned>(positions), static_cast<unsigned>(variants), 1},
            .block = {kThreads, 1, 1},
            .seed = seed},
           rgfast_cka_finish, table.data(), layers, first, static_cast<std::int64_t>(pairs.size()), start,
           all, static_cast<std::int64_t>(task), std::int64_t{debiased}, from(sizes[0]), sizes[0].count,
           sizes[0].rows, sizes[0].weight, from(sizes[1]), sizes[1].count, sizes[1].rows, sizes[1].weight,
           to.data(), faults.data());
    return to;
  }

  // Weighted inner product of a pair of layers; with `floor` also 1e-13 of what a norm must exceed.
  long double inner(std::int64_t p, std::int64_t v, std::size_t k, bool debiased) const {
    long double sum = 0.0L;
    for (const Sizes& of : sizes)
      for (std::int64_t b = 0; b < of.count; ++b) {
        const PairSums* at =
            of.sums.data() + ((p * of.count + b) * variants + v) * static_cast<std::int64_t>(pairs.size());
        const long double n = v == 0 ? of.rows : left_without(of.rows, variants - 1, v - 1);
        const long double traces =
            static_cast<long double>(at[own(pairs[k].first)].trace) * at[own(pairs[k].second)].trace;
        sum += of.weight * (debiased ? at[k].off - 2 * at[k].same / (n - 2) + traces / ((n - 1) * (n - 2))
                                     : static_cast<long double>(at[k].off) + at[k].same);
      }
    return sum;
  }
  long double alignment(std::int64_t p, std::int64_t v, std::size_t k, bool debiased) const {
    return inner(p, v, k, debiased) / std::sqrt(inner(p, v, own(pairs[k].first), debiased) *
                                                inner(p, v, own(pairs[k].second), debiased));
  }
};

bool close(double got, long double want) { return std::fabs(got - want) <= 1e-14L * (1 + std::fabs(want)); }
bool none(const std::vector<std::int64_t>& faults, std::size_t from = 0) {
  return std::all_of(faults.begin() + static_cast<std::ptrdiff_t>(from), faults.end(),
                     [](std::int64_t f) { return f == 0; });
}

void check_matrix(Case given) {
  std::vector<std::int64_t> faults;
  const auto L = static_cast<std::size_t>(given.layers);
  for (const bool debiased : {true, false}) {
    const auto out = given.run(kMatrix, debiased, static_cast<std::size_t>(given.positions) * L * L, faults);
    CHECK(none(faults));
    for (std::int64_t p = 0; p < given.positions; ++p)
      for (std::size_t k = 0; k < given.pairs.size(); ++k) {
        const auto [i, j] = given.pairs[k];
        const long double want = given.alignment(p, 0, k, debiased);
        const double* at = out.data() + p * given.layers * given.layers;
        CHECK(close(at[i * given.layers + j], want) && at[i * given.layers + j] == at[j * given.layers + i]);
        if (i == j) CHECK(at[i * given.layers + i] == 1.0);
      }
  }
}

TEST(cka_finish_matrix) {
  check_matrix(Case(1, 1, false));
  check_matrix(Case(4, 2, false));
  check_matrix(Case(17, 1, false));  // more pairs than threads
}

TEST(cka_finish_batches_of_two_sizes) {
  Case given(3, 2, false);
  given.sizes[0] = {{}, 3, 10, 1.0 / 70.0};
  given.sizes[1] = {{}, 2, 11, 1.0 / 88.0};
  for (unsigned k = 0; k < 2; ++k) given.fill(given.sizes[k], 5 + k);
  check_matrix(given);
  // In units of a power of two that all batches have in common.
  for (Sizes& of : given.sizes)
    for (PairSums& sums : of.sums) {
      for (double* x : {&sums.off, &sums.same}) *x *= 1e200;
      sums.trace *= 1e100;
    }
  check_matrix(given);
  std::vector<std::int64_t> faults;
  const auto parts = given.run(kParts, true, 2 * 3 * 5, faults);
  CHECK(none(faults));
  for (std::int64_t p = 0; p < 2; ++p)
    for (std::size_t k = 0; k < given.pairs.size(); ++k) {
      const auto [i, j] = given.pairs[k];
      const double* at = parts.data() + p * 15;
      const int exponent = static_cast<int>(at[i * 5 + 4] + at[j * 5 + 4]);
      CHECK(close(at[i * 5 + j], std::ldexp(given.inner(p, 0, k, true), -2 * exponent)));
      CHECK(at[i * 5 + j] == at[j * 5 + i]);
    }
}

TEST(cka_finish_two_models) {
  Case given(5, 2, false);
  given.first = 2;
  std::vector<std::int64_t> faults;
  const auto out = given.run(kMatrix, true, 2 * 2 * 3, faults);
  for (std::int64_t p = 0; p < 2; ++p)
    for (std::size_t k = 0; k < given.pairs.size(); ++k) {
      const auto [i, j] = given.pairs[k];
      if (i < 2 && j >= 2)
        CHECK(close(out[static_cast<std::size_t>((p * 2 + i) * 3 + j - 2)], given.alignment(p, 0, k, true)));
    }
}

TEST(cka_finish_drifts_and_says_which_are_tiny) {
  Case given(3, 3, true);
  given.start = 1;
  const std::size_t pairs = given.pairs.size();
  auto& sums = given.sizes[0].sums;
  sums[pairs + 1] = sums[pairs];  // the second position's first two layers are equal
  sums[pairs + 2] = sums[pairs];
  std::vector<std::int64_t> faults;
  const auto out = given.run(kDrift, false, 8, faults);
  CHECK(faults == (std::vector<std::int64_t>{-1, 0, kTiny, 0}));
  CHECK(out[0] == 0.25 && out[1] == 0.25);
  for (std::int64_t p = 0; p < 3; ++p)
    for (std::int64_t l = 0; l < 2; ++l) {
      const auto k = static_cast<std::size_t>(2 * l + 1);
      CHECK(close(out[static_cast<std::size_t>(2 * (p + 1) + l)], 1 - given.alignment(p, 0, k, false)));
    }
  CHECK(out[4] == 0.0);
}

TEST(cka_finish_both_kinds_of_every_variant) {
  for (const bool near : {true, false}) {
    const Case given(4, 2, near, 4);
    std::vector<std::int64_t> faults;
    const auto out = given.run(kBoth, true, 4 * 2 * 2 * 16, faults);
    CHECK(none(faults) && given.run(kBoth, true, 4 * 2 * 2 * 16, faults, 3).size() == out.size());
    for (std::size_t at = 0; at < out.size(); ++at) {
      const auto i = static_cast<std::int64_t>(at / 4 % 4), j = static_cast<std::int64_t>(at % 4);
      const auto p = static_cast<std::int64_t>(at / 16 % 2), v = static_cast<std::int64_t>(at / 64);
      const auto found =
          std::find(given.pairs.begin(), given.pairs.end(), std::pair{std::min(i, j), std::max(i, j)});
      if (found == given.pairs.end())
        CHECK(std::isnan(out[at]));
      else
        CHECK(close(out[at], given.alignment(p, v, static_cast<std::size_t>(found - given.pairs.begin()),
                                             at / 32 % 2 == 0)));
    }
  }
}

TEST(cka_finish_weighted_inner_product_of_two_layers) {
  Case given(2, 2, false);
  given.sizes[0].weight = 1.0 / 70.0;
  for (const double scale : {1.0, 1e60}) {
    for (PairSums& sums : given.sizes[0].sums) {
      for (double* x : {&sums.off, &sums.same}) *x *= scale * scale;
      sums.trace *= scale;
    }
    std::vector<std::int64_t> faults;
    const auto out = given.run(kInner, true, 2, faults);
    for (std::int64_t p = 0; p < 2; ++p)
      CHECK(close(out[static_cast<std::size_t>(p)] / (scale * scale),
                  given.inner(p, 0, 1, true) / (scale * scale)));
  }
}

TEST(cka_finish_layers_without_variance_and_faults) {
  Case given(3, 4, false, 3);
  const std::size_t pairs = given.pairs.size(), each = 3 * pairs;
  auto& sums = given.sizes[0].sums;
  for (const std::size_t k : {1, 3, 4}) sums[k] = {0.0, 0.0, k == 1 ? sums[k].trace : 0.0, 0.0};
  sums[each].trace = NAN;
  sums[2 * each + given.own(1)].apart = 1e18;
  sums[3 * each + pairs + given.own(2)].apart = sums[3 * each + pairs + given.own(2)].trace;
  std::vector<std::int64_t> faults;
  const auto out = given.run(kBoth, true, 3 * 2 * 4 * 9, faults);
  const std::vector<std::int64_t> want = {0, 0, 0, kNotFinite, 0, 0, kOutOfRange, 0, 0, 0, kMoved, 0};
  // Variants are compared with all samples, which are none there.
  for (std::size_t k = 0; k < want.size(); ++k)
    if (k < 1 || k > 5 || k == 3) CHECK(faults[k] == want[k]);
  for (int l = 0; l < 3; ++l)
    for (int m = 0; m < 3; ++m)
      CHECK(std::isnan(out[static_cast<std::size_t>(3 * l + m)]) == (l == 1 || m == 1));
}

}  // namespace
