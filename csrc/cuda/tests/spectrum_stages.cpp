// Eigenvalues in stages on the shim, against extended precision.
#include <cstdint>

#include "cuda/common/device.cuh"
#include "cuda/spectrum_workspace.cuh"
#include "cuda/tests/effort.hpp"
#include "cuda/tests/spectrum_cases.hpp"
#include "tests/check.hpp"

#define RGFAST_STAGE(name)                                                                                  \
  extern "C" void rgfast_spectrum_##name##_f64(const double* matrices, const double* means, std::int64_t n, \
                                               std::int64_t batch, double samples, double* values,          \
                                               double* raw, double* workspace)
RGFAST_STAGE(band_narrow);
RGFAST_STAGE(band);
RGFAST_STAGE(band_wide);
RGFAST_STAGE(chase);
RGFAST_STAGE(chase_far);
RGFAST_STAGE(count);
#undef RGFAST_STAGE

namespace {

using namespace rgfast::test::spectrum;
using rgfast::cuda::spectrum::whole_panels;
using rgfast::cuda::spectrum::workspace_doubles;
using rgfast::test::everything;
using rgfast::test::kFew;

constexpr double kSamples = 50;

struct Solved {
  Each<double> values, raw;
};

// Which kernels: by rows, or those of more rows.
enum class Which { kByRows, kWider, kWidest };

// Buffers of the exact size, which begin as NaN.
Solved solve(const Each<double>& matrices, const Each<double>& means, int n, std::uint64_t seed = 1,
             Which which = Which::kByRows) {
  const double nan = std::numeric_limits<double>::quiet_NaN();
  std::vector<double> all, all_means;
  for (const auto& matrix : matrices) all.insert(all.end(), matrix.begin(), matrix.end());
  for (const auto& mean : means) all_means.insert(all_means.end(), mean.begin(), mean.end());
  std::vector<double> values(matrices.size() * static_cast<std::size_t>(n), nan), raw(all_means.size(), nan);
  std::vector<double> workspace(matrices.size() * static_cast<std::size_t>(workspace_doubles(n)), nan);
  const auto rows = static_cast<std::size_t>(whole_panels(n)), flags = 4 * static_cast<std::size_t>(n);
  const auto run = [&](auto kernel, unsigned threads, std::size_t shared, unsigned parts = 1) {
    rgfast::shim::Launch how;
    how.grid = {static_cast<unsigned>(matrices.size()), parts};
    how.block = {threads};
    how.shared = shared;
    how.seed = seed;
    rgfast::shim::launch(how, kernel, static_cast<const double*>(all.data()),
                         means.empty() ? nullptr : static_cast<const double*>(all_means.data()),
                         std::int64_t{n}, static_cast<std::int64_t>(matrices.size()), kSamples, values.data(),
                         means.empty() ? nullptr : raw.data(), workspace.data());
  };
  const std::size_t panel = 128 * (rows + 8);
  const bool far = which == Which::kWidest || n > 512;
  if (far)
    run(rgfast_spectrum_band_wide_f64, 512, 34816 + panel);
  else if (which == Which::kWider || n > 272)
    run(rgfast_spectrum_band_f64, 256, 34816 + panel);
  else
    run(rgfast_spectrum_band_narrow_f64, 128, 18432 + panel);
  const auto chasing = 32 * static_cast<unsigned>(std::clamp(n / 56, 3, 12));
  if (far)
    run(rgfast_spectrum_chase_far_f64, chasing, flags);
  else
    run(rgfast_spectrum_chase_f64, chasing, 256 * rows + flags);
  run(rgfast_spectrum_count_f64, 128, 18496, static_cast<unsigned>(n + 127) / 128);
  for (auto* all_values : {&values, &raw})  // as stages.py puts them in order
    for (std::size_t i = 1; i < all_values->size(); ++i)
      if (i % static_cast<std::size_t>(n) != 0)
        (*all_values)[i] = std::max((*all_values)[i], (*all_values)[i - 1]);
  Solved solved;
  for (std::size_t i = 0; i < matrices.size(); ++i) {
    const auto from = static_cast<std::ptrdiff_t>(i) * n;
    solved.values.emplace_back(values.begin() + from, values.begin() + from + n);
    if (!means.empty()) solved.raw.emplace_back(raw.begin() + from, raw.begin() + from + n);
  }
  return solved;
}

void check_sizes(const std::vector<int>& sizes, std::size_t most) {
  for (const int n : sizes) {
    const auto all = families(n);
    Each<double> matrices;
    for (std::size_t i = 0; i < std::min(most, all.size()); ++i) matrices.push_back(lower<double>(all[i], n));
    const auto values = solve(matrices, {}, n).values;
    for (std::size_t i = 0; i < matrices.size(); ++i) {
      const double off = error(matrices[i], n, values[i]);
      CHECK(off <= 1);
      if (!(off <= 1)) std::printf("n = %d, family %zu: %g of what is promised\n", n, i, off);
    }
  }
}

// The kernels do not mind small ones, of which there can be many.
TEST(stages_solve_matrices_of_every_size) {
  if (kFew) return check_sizes({1, 17, 81}, 1);
  check_sizes({1, 2, 3, 15, 16, 17, 18, 31, 32, 33, 50, 81}, 1);
  check_sizes({37}, 100);
  if (!everything()) return;
  check_sizes({47, 64, 79, 129, 130, 191, 192, 193, 200, 256, 257, 272, 273, 300}, 2);
  check_sizes({512}, 2);
  check_sizes({1024}, 1);
  check_sizes({197}, 100);
}

TEST(stages_solve_both_spectra) {
  const std::vector<int> sizes = kFew           ? std::vector<int>{17}
                                 : everything() ? std::vector<int>{1, 2, 17, 32, 45, 193}
                                                : std::vector<int>{1, 2, 35};
  for (const int n : sizes) {
    Each<double> matrices, means, raised;
    std::mt19937 draw(static_cast<unsigned>(n));
    std::normal_distribution<double> normal;
    for (const double offset : {0.0, 1e-9, 0.3, 3e3, 1e17}) {
      const auto full = rotated(values_by(n, [](int k) { return std::pow(0.5, k); }), 5);
      std::vector<double> mean;
      for (int i = 0; i < n; ++i) mean.push_back(offset * (1 + 0.1 * normal(draw)));
      matrices.push_back(lower<double>(full, n));
      means.push_back(mean);
      Matrix<double> sum = matrices.back();
      for (int i = 0; i < n; ++i)
        for (int j = 0; j <= i; ++j)
          sum[static_cast<std::size_t>(i * n + j)] +=
              kSamples * mean[static_cast<std::size_t>(i)] * mean[static_cast<std::size_t>(j)];
      raised.push_back(sum);
    }
    const auto both = solve(matrices, means, n);
    for (std::size_t i = 0; i < matrices.size(); ++i) {
      CHECK(error(matrices[i], n, both.values[i]) <= 1);
      CHECK(error(raised[i], n, both.raw[i]) <= 1);
    }
    means[1][static_cast<std::size_t>(n - 1)] = std::numeric_limits<double>::infinity();
    const auto bad = solve(matrices, means, n);
    CHECK(std::isnan(bad.raw[1][0]));
    CHECK(bad.values[0] == both.values[0] && bad.raw[2] == both.raw[2]);
  }
}

TEST(stages_give_nan_for_a_matrix_that_is_not_finite) {
  const int n = 21;
  Each<double> matrices(3, lower<double>(gaussian(n, 8), n));
  matrices[1][static_cast<std::size_t>(n * (n - 1))] = std::numeric_limits<double>::infinity();
  const auto values = solve(matrices, {}, n).values;
  for (const double x : values[1]) CHECK(std::isnan(x));
  CHECK(error(matrices[0], n, values[0]) <= 1);
  CHECK(values[2] == values[0]);
}

TEST(stages_solve_at_every_scale) {
  const int n = 24;
  for (const double factor : {1e150, 1e-150, 1e300, 1e-300, 1e-307}) {
    const auto a = lower<double>(gaussian(n, 3), n, factor);
    CHECK(error(a, n, solve({a}, {}, n).values[0]) <= 1);
  }
}

TEST(stages_have_the_same_bits_in_any_batch_and_order) {
  const std::vector<int> sizes = kFew           ? std::vector<int>{20}
                                 : everything() ? std::vector<int>{50, 67, 200}
                                                : std::vector<int>{50};
  for (const int n : sizes) {
    Each<double> matrices;
    for (unsigned i = 0; i < 3; ++i) matrices.push_back(lower<double>(gaussian(n, i), n));
    const auto values = solve(matrices, {}, n).values;
    CHECK(solve(matrices, {}, n, 77).values == values);
    for (const Which which : {Which::kWider, Which::kWidest}) {
      const auto wider = solve(matrices, {}, n, 5, which).values;
      CHECK(solve(matrices, {}, n, 78, which).values == wider);
      for (std::size_t i = 0; i < matrices.size(); ++i) CHECK(error(matrices[i], n, wider[i]) <= 1);
    }
    CHECK(solve({matrices[2], matrices[0]}, {}, n).values[1] == values[0]);
  }
}

}  // namespace
