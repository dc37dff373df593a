// Matrices to try the eigenvalue kernels on, and how far off they may be.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <functional>
#include <limits>
#include <random>
#include <vector>

#include "cuda/tests/spectrum_truth.hpp"

namespace rgfast::test::spectrum {

template <class T>
using Matrix = std::vector<T>;
template <class T>
using Each = std::vector<std::vector<T>>;

// The error in units of what is promised; infinite for values that do not ascend.
template <class T>
double error(const Matrix<T>& a, int n, const std::vector<T>& values) {
  const std::vector<double> want = rgfast::test::by_bisection(rgfast::test::tridiagonal(a.data(), n));
  const double norm = std::max(std::fabs(want.front()), std::fabs(want.back()));
  double worst = 0;
  for (std::size_t k = 0; k < values.size(); ++k) {
    const double off = std::fabs(static_cast<double>(values[k]) - want[k]);
    worst = off <= worst ? worst : off;  // NaN wins
    if (k > 0 && !(values[k] >= values[k - 1])) return std::numeric_limits<double>::infinity();
  }
  if (norm == 0) return worst == 0 ? 0 : std::numeric_limits<double>::infinity();
  const double unit = std::numeric_limits<T>::epsilon() / 2;
  return worst / (norm * unit * std::max(50.0, n / 2.0));
}

// Only the lower triangle is given: the rest is NaN.
template <class T>
Matrix<T> lower(const std::vector<double>& full, int n, double factor = 1) {
  Matrix<T> a(full.size());
  for (int i = 0; i < n; ++i)
    for (int j = 0; j < n; ++j) {
      const auto at = static_cast<std::size_t>(i * n + j);
      a[at] = j <= i ? static_cast<T>(full[at] * factor) : std::numeric_limits<T>::quiet_NaN();
    }
  return a;
}

inline std::vector<double> filled(int n, const std::function<double(int, int)>& entry) {
  std::vector<double> a(static_cast<std::size_t>(n * n));
  for (int i = 0; i < n; ++i)
    for (int j = 0; j < n; ++j)
      a[static_cast<std::size_t>(i * n + j)] = entry(std::max(i, j), std::min(i, j));
  return a;
}

inline std::vector<double> gaussian(int n, unsigned seed) {
  std::mt19937 draw(seed);
  std::normal_distribution<double> normal;
  return filled(n, [&](int, int) { return normal(draw); });
}

// Q diag(values) Q' for Q a product of two reflections.
inline std::vector<double> rotated(const std::vector<double>& values, unsigned seed) {
  const int n = static_cast<int>(values.size());
  std::mt19937 draw(seed);
  std::normal_distribution<double> normal;
  std::vector<double> a =
      filled(n, [&](int i, int j) { return i == j ? values[static_cast<std::size_t>(i)] : 0; });
  for (int round = 0; round < 2; ++round) {
    std::vector<double> u(values.size()), w(values.size());
    double square = 0, dot = 0;
    for (double& x : u) {
      x = normal(draw);
      square += x * x;
    }
    for (int i = 0; i < n; ++i) {
      for (int j = 0; j < n; ++j)
        w[static_cast<std::size_t>(i)] +=
            a[static_cast<std::size_t>(i * n + j)] * u[static_cast<std::size_t>(j)];
      dot += w[static_cast<std::size_t>(i)] * u[static_cast<std::size_t>(i)];
    }
    for (std::size_t i = 0; i < u.size(); ++i) w[i] = 2 / square * (w[i] - dot / square * u[i]);
    for (std::size_t i = 0; i < u.size(); ++i)
      for (std::size_t j = 0; j < u.size(); ++j) a[i * u.size() + j] -= u[i] * w[j] + w[i] * u[j];
  }
  return a;
}

inline std::vector<double> values_by(int n, const std::function<double(int)>& value) {
  std::vector<double> values;
  for (int k = 0; k < n; ++k) values.push_back(value(k));
  return values;
}

inline std::vector<std::vector<double>> families(int n) {
  const auto seed = static_cast<unsigned>(n);
  const auto wilkinson = [](int i, int j, int size) {
    return i == j ? std::abs(i % size - size / 2) : i == j + 1 && i % size != 0 ? 1.0 : 0.0;
  };
  return {
      gaussian(n, seed),
      rotated(values_by(n, [](int k) { return std::pow(10.0, -k); }), seed),
      rotated(values_by(n, [n](int k) { return k < n / 2 ? 1.0 + 1e-14 * k : -1.0; }), seed),
      rotated(values_by(n, [](int k) { return k == 0 ? 1.0 : 1e-10; }), seed),
      rotated(values_by(n, [](int k) { return k == 0 ? 1e10 : 1.0 + 0.01 * k; }), seed),
      filled(n, [](int, int) { return 0.0; }),
      filled(n, [](int, int) { return 1.0; }),
      filled(n, [](int i, int j) { return i == j ? 3.0 : 0.0; }),
      filled(n, [n](int i, int j) { return i == j ? i - n / 3 : 0.0; }),
      filled(n, [](int i, int j) { return i == j       ? 2.0
                                          : i == j + 1 ? -1.0
                                                       : 0.0; }),
      filled(n, [&](int i, int j) { return wilkinson(i, j, 21); }),
      filled(n, [&](int i, int j) { return i == j + 1 && i % 21 == 0 ? 1e-9 : wilkinson(i, j, 21); }),
      filled(n, [](int i, int j) { return 1.0 / (i + j + 1); }),
      filled(n, [](int i, int j) { return std::pow(0.5, i + j) * (i == j ? 2 : 1); }),
      filled(n, [n](int i, int j) { return std::pow(0.5, 2 * n - i - j) * (i == j ? 2 : 1); }),
      filled(n, [](int i, int j) { return j == 0   ? 1.0
                                          : i == j ? 1 + 0.03 * i
                                                   : 0.0; }),
  };
}

}  // namespace rgfast::test::spectrum
