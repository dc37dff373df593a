// What the eigenvalue kernels compute on one thread, on the host: reflectors, scales, and eigenvalues of
// tridiagonal matrices against bisection in extended precision.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "cuda/spectrum_math.cuh"
#include "cuda/spectrum_sturm.cuh"
#include "cuda/tests/spectrum_truth.hpp"
#include "tests/check.hpp"

namespace {

using rgfast::cuda::exponent_of;
using rgfast::cuda::power_of_two;
using namespace rgfast::cuda::spectrum;
using rgfast::test::by_bisection;
using rgfast::test::largest_row;
using rgfast::test::Tridiagonal;

template <class T>
Tridiagonal rounded(Tridiagonal t) {
  for (double& x : t.diagonal) x = static_cast<double>(static_cast<T>(x));
  for (double& x : t.coupling) x = static_cast<double>(static_cast<T>(x));
  return t;
}

// The error in units of u times the norm, and how many counts an eigenvalue takes on average, with the
// table's.
template <class T>
std::pair<double, double> tried(const Tridiagonal& exact, int points) {
  const Tridiagonal t = rounded<T>(exact);
  const int n = t.rows(), padded = padded_rows<T>(n);
  const std::vector<T> d(t.diagonal.begin(), t.diagonal.end()), e(t.coupling.begin(), t.coupling.end());
  const T bound = largest_row(d, e);
  const TridiagonalScale<T> scale = tridiagonal_scale(bound);
  std::vector<Row<T>> rows;
  for (int i = 0; i < padded; ++i) {
    const auto at = static_cast<std::size_t>(i);
    rows.push_back(i < n ? scaled_row(d[at], i > 0 ? e[at - 1] : T(0), scale.down, i == 0)
                         : padding_row<T>());
  }
  std::vector<Count<T>> table;
  for (int i = 0; i < points; ++i)
    table.push_back(count_below(rows.data(), padded, table_point(i, points, scale.bound)));
  const std::vector<double> want = by_bisection(t);
  const double norm = std::max(std::fabs(want.front()), std::fabs(want.back()));
  double worst = 0, taken = 0;
  for (int k = 0; k < n; ++k) {
    int counts = 0;
    const T found =
        find_eigenvalue(rows.data(), padded, k, from_table(table.data(), points, n, k, scale.bound), &counts);
    const T value = bound > T(0) ? found * power_of_two<T>(scale.exponent) : T(0);
    const double off = std::fabs(static_cast<double>(value) - want[static_cast<std::size_t>(k)]);
    worst = off <= worst ? worst : off;  // NaN wins
    taken += counts + 1;
  }
  return {norm > 0 ? worst / (norm * static_cast<double>(Limits<T>::unit)) : worst, taken / n};
}

Tridiagonal drawn(int n, unsigned seed) {
  std::mt19937 draw(seed);
  std::normal_distribution<double> normal;
  Tridiagonal t;
  for (int i = 0; i < n; ++i) t.diagonal.push_back(normal(draw));
  for (int i = 0; i + 1 < n; ++i) t.coupling.push_back(normal(draw));
  return t;
}

Tridiagonal wilkinson(int half) {
  Tridiagonal t;
  for (int i = -half; i <= half; ++i) t.diagonal.push_back(std::abs(i));
  t.coupling.assign(static_cast<std::size_t>(2 * half), 1.0);
  return t;
}

Tridiagonal glued(int blocks, double glue) {
  Tridiagonal t;
  for (int block = 0; block < blocks; ++block) {
    const Tridiagonal one = wilkinson(10);
    if (block > 0) t.coupling.push_back(glue);
    t.diagonal.insert(t.diagonal.end(), one.diagonal.begin(), one.diagonal.end());
    t.coupling.insert(t.coupling.end(), one.coupling.begin(), one.coupling.end());
  }
  return t;
}

Tridiagonal graded(int n, double ratio) {
  Tridiagonal t;
  for (int i = 0; i < n; ++i) t.diagonal.push_back(std::pow(ratio, i));
  for (int i = 0; i + 1 < n; ++i) t.coupling.push_back(0.5 * std::pow(ratio, i + 0.5));
  return t;
}

Tridiagonal constant(int n, double diagonal, double coupling) {
  return {std::vector<double>(static_cast<std::size_t>(n), diagonal),
          std::vector<double>(static_cast<std::size_t>(n - 1), coupling)};
}

Tridiagonal times(Tridiagonal t, double factor) {
  for (double& x : t.diagonal) x *= factor;
  for (double& x : t.coupling) x *= factor;
  return t;
}

std::vector<std::pair<std::string, Tridiagonal>> families() {
  std::vector<std::pair<std::string, Tridiagonal>> all;
  for (const int n : {1, 2, 3, 4, 5, 15, 16, 17, 31, 33, 64, 97, 130, 192})
    all.emplace_back("drawn " + std::to_string(n), drawn(n, static_cast<unsigned>(n)));
  all.emplace_back("second difference", constant(100, 2, -1));
  all.emplace_back("a single value", constant(60, 3, 0));
  all.emplace_back("zero", constant(40, 0, 0));
  all.emplace_back("a cluster", constant(70, 1, 1e-12));
  all.emplace_back("Wilkinson", wilkinson(10));
  all.emplace_back("Wilkinson, longer", wilkinson(50));
  all.emplace_back("glued", glued(5, 1e-9));
  all.emplace_back("glued by nothing", glued(5, 0));
  all.emplace_back("graded down", graded(80, 0.5));
  all.emplace_back("graded up", times(graded(80, 2), 0x1p-80));
  Tridiagonal one = constant(64, 1e-5, 1e-7);
  one.diagonal.front() = 1;
  all.emplace_back("one and noise", one);
  Tridiagonal diagonal = drawn(50, 3);
  diagonal.coupling.assign(49, 0.0);
  all.emplace_back("diagonal", diagonal);
  Tridiagonal hollow = drawn(50, 5);
  hollow.diagonal.assign(50, 0.0);
  all.emplace_back("hollow", hollow);
  return all;
}

template <class T>
void check_families(double factor) {
  for (const auto& [name, t] : families())
    for (const int points : {t.rows(), 256}) {
      const auto [error, counts] = tried<T>(times(t, factor), points);
      CHECK(error <= 16);
      CHECK(counts <= 60);
      if (error > 16 || counts > 60) std::printf("%s: %g u, %g counts\n", name.c_str(), error, counts);
    }
}

TEST(eigenvalues_by_counts) {
  check_families<double>(1);
  check_families<double>(1e150);
  check_families<double>(1e-150);
  check_families<double>(1e300);
  check_families<float>(1);
  check_families<float>(1e18);
  check_families<float>(1e-18);
}

// As published, interpolation would take 40 to 50 counts on most of these.
TEST(interpolation_takes_a_third_of_the_counts_of_halving) {
  double most = 0;
  for (const int n : {16, 32, 64, 100, 128, 192}) {
    const double counts = tried<double>(drawn(n, 7), n < 128 ? n : 128).second;
    most = std::max(most, counts);
  }
  CHECK(most <= 18);
}

TEST(counts_are_of_sign_changes) {
  const Row<double> rows[16] = {{-0.5, 0}, {0.25, 0}, {0.75, 0}, {2, 0}, {2, 0}, {2, 0}, {2, 0}, {2, 0},
                                {2, 0},    {2, 0},    {2, 0},    {2, 0}, {2, 0}, {2, 0}, {2, 0}, {2, 0}};
  const std::pair<double, int> expected[] = {{-1, 0}, {-0.25, 1}, {0.5, 2}, {1, 3}};
  for (const auto& [x, below] : expected) CHECK(count_below(rows, 16, x).below == below);
  const Count<double> at = count_below(rows, 16, 0.0);
  CHECK(std::fabs(std::ldexp(at.minor, at.exponent) + 0.5 * 0.25 * 0.75 * 8192) < 1e-9);
}

template <class T>
double reflected(const std::vector<double>& column) {
  double rest = 0, norm = 0;
  std::vector<double> x;
  for (const double value : column) x.push_back(static_cast<double>(static_cast<T>(value)));
  T sum = 0;
  for (std::size_t i = 1; i < x.size(); ++i) sum += static_cast<T>(x[i]) * static_cast<T>(x[i]);
  const Reflector<T> h = reflector(static_cast<T>(x[0]), sum);
  for (const double value : x) norm += value * value;
  norm = std::sqrt(norm);
  double dot = x[0];
  for (std::size_t i = 1; i < x.size(); ++i) dot += x[i] * x[i] * static_cast<double>(h.inverse);
  double worst = std::fabs(x[0] - static_cast<double>(h.tau) * dot - static_cast<double>(h.value));
  for (std::size_t i = 1; i < x.size(); ++i) {
    rest = x[i] - static_cast<double>(h.tau) * dot * static_cast<double>(h.inverse) * x[i];
    worst = std::max(worst, std::fabs(rest));
  }
  worst = std::max(worst, std::fabs(std::fabs(static_cast<double>(h.value)) - norm));
  return norm > 0 ? worst / (norm * static_cast<double>(Limits<T>::unit)) : worst;
}

TEST(reflectors_annihilate) {
  std::mt19937 draw(11);
  std::normal_distribution<double> normal;
  for (int round = 0; round < 200; ++round) {
    std::vector<double> column(static_cast<std::size_t>(1 + round % 40));
    for (double& x : column) x = normal(draw);
    if (round % 3 == 1) column[0] *= 1e-9;
    if (round % 3 == 2)
      for (std::size_t i = 1; i < column.size(); ++i) column[i] *= 1e-6;
    if (round % 5 == 0) column[0] = 0;
    CHECK(reflected<double>(column) <= 24);
    CHECK(reflected<float>(column) <= 24);
  }
  const Reflector<double> none = reflector(-3.0, 0.0);
  CHECK(none.value == -3.0 && none.tau == 0.0 && none.inverse == 0.0);
  CHECK(reflector(0.0, 4.0).tau == 1.0);
}

template <class T>
void check_scales() {
  using Numbers = std::numeric_limits<T>;
  for (const T x : {Numbers::min(), Numbers::max(), T(1), T(1.5), T(-3), Numbers::denorm_min(), T(0)}) {
    const T down = power_of_two<T>(-scale_of(x)), up = power_of_two<T>(scale_of(x));
    CHECK(down * up == T(1));
    CHECK(std::fabs(x * down) < std::ldexp(T(1), Limits<T>::bias / 4));
    CHECK(x * down * up == x);
  }
  for (int e = 1 - Limits<T>::bias; e <= Limits<T>::bias; ++e) {
    CHECK(power_of_two<T>(e) == std::ldexp(T(1), e));
    CHECK(exponent_of(std::ldexp(T(-1.75), e)) == e);
  }
  CHECK(signs_differ(T(-1), T(2)) == 1 && signs_differ(T(-1), T(-2)) == 0 && signs_differ(T(0), -T(0)) == 1);
}

TEST(powers_of_two) {
  check_scales<double>();
  check_scales<float>();
}

}  // namespace
