// The eigenvalue kernels on the shim: every kind of matrix against extended precision, at the edges of every
// kernel.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/common/device.cuh"
#include "cuda/tests/effort.hpp"
#include "cuda/tests/spectrum_cases.hpp"
#include "tests/check.hpp"

#define RGFAST_SPECTRUM_KERNEL(name, T)                                                     \
  extern "C" void rgfast_spectrum_##name(const T* matrices, const T* means, std::int64_t n, \
                                         std::int64_t batch, double samples, T* values, T* raw)
RGFAST_SPECTRUM_KERNEL(lanes8_f64, double);
RGFAST_SPECTRUM_KERNEL(lanes16_f64, double);
RGFAST_SPECTRUM_KERNEL(lanes32_f64, double);
RGFAST_SPECTRUM_KERNEL(shared64_f64, double);
RGFAST_SPECTRUM_KERNEL(shared96_f64, double);
RGFAST_SPECTRUM_KERNEL(shared102_f64, double);
RGFAST_SPECTRUM_KERNEL(registers128_f64, double);
RGFAST_SPECTRUM_KERNEL(lanes8_f32, float);
RGFAST_SPECTRUM_KERNEL(lanes16_f32, float);
RGFAST_SPECTRUM_KERNEL(lanes32_f32, float);
RGFAST_SPECTRUM_KERNEL(registers64_f32, float);
RGFAST_SPECTRUM_KERNEL(shared96_f32, float);
RGFAST_SPECTRUM_KERNEL(shared128_f32, float);
RGFAST_SPECTRUM_KERNEL(shared160_f32, float);
RGFAST_SPECTRUM_KERNEL(shared192_f32, float);
RGFAST_SPECTRUM_KERNEL(shared222_f32, float);
RGFAST_SPECTRUM_KERNEL(registers256_f32, float);
#undef RGFAST_SPECTRUM_KERNEL

namespace {

using rgfast::test::everything;
using rgfast::test::kFew;

using namespace rgfast::test::spectrum;

template <class T>
struct Kernel {
  int rows;  // of the largest matrix
  void (*run)(const T*, const T*, std::int64_t, std::int64_t, double, T*, T*);
  int threads, per_block;
  std::size_t shared;  // without a packed matrix
  bool packed;
};

template <class T>
std::vector<Kernel<T>> kernels();
template <>
std::vector<Kernel<double>> kernels() {
  return {{8, rgfast_spectrum_lanes8_f64, 128, 16, 8192, false},
          {16, rgfast_spectrum_lanes16_f64, 128, 8, 6144, false},
          {32, rgfast_spectrum_lanes32_f64, 128, 4, 6144, false},
          {64, rgfast_spectrum_shared64_f64, 64, 1, 5696, true},
          {96, rgfast_spectrum_shared96_f64, 96, 1, 9296, true},
          {102, rgfast_spectrum_shared102_f64, 128, 1, 13408, true},
          {128, rgfast_spectrum_registers128_f64, 128, 1, 21600, false}};
}
template <>
std::vector<Kernel<float>> kernels() {
  return {{8, rgfast_spectrum_lanes8_f32, 128, 16, 3584, false},
          {16, rgfast_spectrum_lanes16_f32, 128, 8, 3584, false},
          {32, rgfast_spectrum_lanes32_f32, 128, 4, 3584, false},
          {64, rgfast_spectrum_registers64_f32, 64, 1, 4656, false},
          {96, rgfast_spectrum_shared96_f32, 96, 1, 5040, true},
          {128, rgfast_spectrum_shared128_f32, 128, 1, 7232, true},
          {160, rgfast_spectrum_shared160_f32, 160, 1, 9664, true},
          {192, rgfast_spectrum_shared192_f32, 192, 1, 12368, true},
          {222, rgfast_spectrum_shared222_f32, 224, 1, 15312, true},
          {256, rgfast_spectrum_registers256_f32, 256, 1, 30816, false}};
}

constexpr double kSamples = 50;

// Of the matrices, and of them raised by their means if there are any. Buffers of the exact size, so that a
// sanitizer sees one step beyond them; the output begins as NaN.
template <class T>
std::pair<Each<T>, Each<T>> solve_both(const Each<T>& matrices, const Each<T>& means, int n,
                                       std::uint64_t seed) {
  std::vector<T> all, all_means;
  for (const auto& matrix : matrices) all.insert(all.end(), matrix.begin(), matrix.end());
  for (const auto& mean : means) all_means.insert(all_means.end(), mean.begin(), mean.end());
  const auto batch = static_cast<std::int64_t>(matrices.size());
  const auto all_kernels = kernels<T>();
  const auto chosen =
      std::find_if(all_kernels.begin(), all_kernels.end(), [n](const auto& k) { return k.rows >= n; });
  if (chosen == all_kernels.end()) throw std::invalid_argument("no kernel takes so many rows");
  const int groups = (n + 3) / 4;
  const auto packed =
      chosen->packed ? static_cast<std::size_t>(4 * (n * groups - 2 * groups * (groups - 1))) : 0;
  rgfast::shim::Launch how;
  how.grid = {static_cast<unsigned>((batch + chosen->per_block - 1) / chosen->per_block)};
  how.block = {static_cast<unsigned>(chosen->threads)};
  how.shared = chosen->shared + packed * sizeof(T);
  how.seed = seed;
  std::vector<T> values(matrices.size() * static_cast<std::size_t>(n), std::numeric_limits<T>::quiet_NaN());
  std::vector<T> raw(all_means.size(), std::numeric_limits<T>::quiet_NaN());
  rgfast::shim::launch(how, chosen->run, static_cast<const T*>(all.data()),
                       means.empty() ? nullptr : static_cast<const T*>(all_means.data()), std::int64_t{n},
                       batch, kSamples, values.data(), means.empty() ? nullptr : raw.data());
  std::pair<Each<T>, Each<T>> each;
  for (std::size_t i = 0; i < matrices.size(); ++i) {
    const auto from = static_cast<std::ptrdiff_t>(i) * n;
    each.first.emplace_back(values.begin() + from, values.begin() + from + n);
    if (!means.empty()) each.second.emplace_back(raw.begin() + from, raw.begin() + from + n);
  }
  return each;
}

template <class T>
Each<T> solve(const Each<T>& matrices, int n, std::uint64_t seed = 1) {
  return solve_both<T>(matrices, {}, n, seed).first;
}

template <class T>
void check_sizes(const std::vector<int>& sizes, std::size_t most) {
  for (const int n : sizes) {
    Each<T> matrices;
    for (const auto& family : families(n))
      if (matrices.size() < most) matrices.push_back(lower<T>(family, n));
    const auto values = solve(matrices, n);
    for (std::size_t i = 0; i < matrices.size(); ++i) {
      const double off = error(matrices[i], n, values[i]);
      CHECK(off <= 1);
      if (!(off <= 1)) std::printf("n = %d, family %zu: %g of what is promised\n", n, i, off);
    }
  }
}

std::vector<int> up_to(int n) {
  std::vector<int> sizes(static_cast<std::size_t>(n));
  std::iota(sizes.begin(), sizes.end(), 1);
  return sizes;
}

// For the gate every size there is, else those at the edges of every kernel.
TEST(eigenvalues_at_every_size) {
  const bool every = everything();
  const std::vector<int> edges =
      kFew ? std::vector<int>{1, 8, 9, 17, 33, 65, 103}
           : std::vector<int>{1, 2, 3, 8, 9, 16, 17, 24, 25, 32, 33, 64, 65, 96, 97, 102, 103};
  check_sizes<double>(every ? up_to(128) : edges, every ? 4 : 2);
  check_sizes<float>(every ? up_to(130) : edges, every ? 4 : 2);
  check_sizes<float>({129}, 1);
  if (kFew) return;
  check_sizes<double>({128}, 1);
  check_sizes<float>({128, 161, 193, 223}, 1);
  if (every) check_sizes<float>({150, 160, 161, 191, 192, 193, 200, 222, 223, 255, 256}, 2);
}

TEST(eigenvalues_of_every_family) {
  for (const int n : {12, 27, 42, 70, 105}) {
    if (n > (kFew ? 12 : 42) && !everything()) return;
    check_sizes<double>({n}, 100);
    check_sizes<float>({n}, 100);
  }
}

template <class T>
void check_scale(double factor) {
  for (const int n : {5, 13, 30, 40}) {
    const Each<T> matrices{lower<T>(gaussian(n, 3), n, factor), lower<T>(gaussian(n, 4), n, 1)};
    const auto values = solve(matrices, n);
    for (std::size_t i = 0; i < 2; ++i) CHECK(error(matrices[i], n, values[i]) <= 1);
  }
}

TEST(eigenvalues_at_every_scale) {
  for (const double factor : {1e150, 1e-150, 1e300, 1e-300, 1e-307}) check_scale<double>(factor);
  for (const double factor : {1e18, 1e-18, 1e37, 1e-37}) check_scale<float>(factor);
  const double least = std::numeric_limits<double>::denorm_min();
  CHECK(solve<double>({{2 * least, 0, 4 * least, 2 * least}}, 2)[0] ==
        (std::vector<double>{-2 * least, 6 * least}));
}

template <class T>
void check_bad(int n) {
  const Matrix<T> good = lower<T>(gaussian(n, 8), n);
  Each<T> matrices(5, good);
  matrices[1][0] = std::numeric_limits<T>::quiet_NaN();
  matrices[2][static_cast<std::size_t>(n * n - 1)] = std::numeric_limits<T>::infinity();
  matrices[3][static_cast<std::size_t>(n * (n - 1))] = -std::numeric_limits<T>::infinity();
  const auto values = solve(matrices, n);
  const auto nothing = [](T x) { return std::isnan(x); };
  for (const std::size_t i : {1, 2, 3}) CHECK(std::all_of(values[i].begin(), values[i].end(), nothing));
  CHECK(error(good, n, values[0]) <= 1);
  CHECK(values[4] == values[0]);
}

TEST(a_matrix_that_is_not_finite_has_nan_for_eigenvalues) {
  for (const int n : {1, 4, 11, 20, 40}) {
    check_bad<double>(n);
    check_bad<float>(n);
  }
}

// A moment, and the same raised by 50 mean mean', of means small and large, against either in fp64.
template <class T>
void check_raised(int n) {
  std::mt19937 draw(static_cast<unsigned>(n));
  std::normal_distribution<double> normal;
  Each<T> matrices, means, raised;
  for (const double offset : {0.0, 1e-9, 0.3, 1.0, 3e3, 1e9, 1e-17, 1e17}) {
    const std::vector<double> full = rotated(values_by(n, [](int k) { return std::pow(0.5, k); }), 5);
    std::vector<T> mean;
    for (int i = 0; i < n; ++i) mean.push_back(static_cast<T>(offset * (1 + 0.1 * normal(draw))));
    if (offset == 3e3) std::fill(mean.begin() + 1, mean.end(), T(0));
    matrices.push_back(lower<T>(full, n));
    means.push_back(mean);
    Matrix<T> sum = matrices.back();
    for (int i = 0; i < n; ++i)
      for (int j = 0; j <= i; ++j) {
        const double product = kSamples * static_cast<double>(mean[static_cast<std::size_t>(i)]) *
                               static_cast<double>(mean[static_cast<std::size_t>(j)]);
        T& entry = sum[static_cast<std::size_t>(i * n + j)];
        entry = static_cast<T>(static_cast<double>(entry) + product);
      }
    raised.push_back(sum);
  }
  const auto both = solve_both(matrices, means, n, 2);
  for (std::size_t i = 0; i < matrices.size(); ++i) {
    CHECK(error(matrices[i], n, both.first[i]) <= 1);
    CHECK(error(raised[i], n, both.second[i]) <= 1);
  }
  means[1][static_cast<std::size_t>(n - 1)] = std::numeric_limits<T>::infinity();
  const auto bad = solve_both(matrices, means, n, 2);
  CHECK(std::isnan(bad.second[1][0]));
  CHECK(bad.first[0] == both.first[0] && bad.second[2] == both.second[2]);
}

TEST(both_spectra_come_from_one_reduction) {
  for (const int n : {1, 2, 8, 13, 32, 35}) {
    check_raised<double>(n);
    check_raised<float>(n);
  }
  if (!everything()) return;
  for (const int n : {64, 97, 103, 128}) {
    check_raised<double>(n);
    check_raised<float>(n);
  }
  for (const int n : {131, 161, 193, 223}) check_raised<float>(n);
}

template <class T>
void check_bits(int n, std::size_t batch) {
  Each<T> matrices;
  for (std::size_t i = 0; i < batch; ++i)
    matrices.push_back(lower<T>(gaussian(n, static_cast<unsigned>(i)), n));
  const auto values = solve(matrices, n);
  CHECK(solve(matrices, n, 77) == values);
  for (std::size_t i = 0; i < batch; ++i) CHECK(solve<T>({matrices[i]}, n)[0] == values[i]);
  std::reverse(matrices.begin(), matrices.end());
  auto reversed = solve(matrices, n);
  std::reverse(reversed.begin(), reversed.end());
  CHECK(reversed == values);
}

TEST(eigenvalues_have_the_same_bits_in_any_batch) {
  check_bits<double>(6, 19);
  check_bits<float>(14, 10);
  check_bits<double>(25, 6);
  check_bits<float>(50, 2);
  if (!everything()) return;
  for (const int n : {80, 100, 110}) check_bits<double>(n, 2);
  for (const int n : {80, 131, 170, 200, 230}) check_bits<float>(n, 2);
}

}  // namespace
