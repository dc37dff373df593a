// Eigenvalues to compare with, in extended precision: Householder's reduction and bisection, as plain as can
// be.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace rgfast::test {

struct Tridiagonal {
  std::vector<double> diagonal, coupling;  // coupling[i] is between rows i and i + 1
  [[nodiscard]] int rows() const { return static_cast<int>(diagonal.size()); }
};

// The largest sum of magnitudes in a row.
template <class T>
T largest_row(const std::vector<T>& diagonal, const std::vector<T>& coupling) {
  T bound = 0;
  for (std::size_t i = 0; i < diagonal.size(); ++i) {
    const T before = i > 0 ? std::fabs(coupling[i - 1]) : T(0);
    const T after = i + 1 < diagonal.size() ? std::fabs(coupling[i]) : T(0);
    bound = std::max(bound, std::fabs(diagonal[i]) + before + after);
  }
  return bound;
}

inline std::vector<double> by_bisection(const Tridiagonal& t) {
  using Wide = long double;
  const int n = t.rows();
  const Wide bound = largest_row(t.diagonal, t.coupling);
  std::vector<double> values;
  for (int k = 0; k < n; ++k) {
    Wide low = -bound, high = bound;
    for (int step = 0; step < 70; ++step) {
      const Wide x = (low + high) / 2;
      int below = 0;
      Wide pivot = 1;
      for (int i = 0; i < n; ++i) {
        const Wide e = i > 0 ? t.coupling[static_cast<std::size_t>(i - 1)] : 0;
        pivot = t.diagonal[static_cast<std::size_t>(i)] - x - e * e / pivot;
        if (std::fabs(pivot) < bound * 0x1p-90L) pivot = -bound * 0x1p-90L;
        below += pivot < 0 ? 1 : 0;
      }
      (below <= k ? low : high) = x;
    }
    values.push_back(static_cast<double>((low + high) / 2));
  }
  return values;
}

// The tridiagonal matrix with the eigenvalues of symmetric `a[n, n]`, of which the lower triangle is read.
template <class T>
Tridiagonal tridiagonal(const T* a, int rows) {
  using Wide = long double;
  const auto n = static_cast<std::size_t>(rows);
  std::vector<std::vector<Wide>> m(n, std::vector<Wide>(n));
  Wide largest = 0;
  for (std::size_t i = 0; i < n; ++i)
    for (std::size_t j = 0; j <= i; ++j) {
      m[i][j] = m[j][i] = a[i * n + j];
      largest = std::max(largest, std::fabs(m[i][j]));
    }
  Tridiagonal t;
  std::vector<Wide> u(n), w(n);
  for (std::size_t k = 0; k + 1 < n; ++k) {
    Wide norm = 0;
    for (std::size_t i = k + 1; i < n; ++i) norm = std::hypot(norm, m[i][k]);
    if (norm == 0) continue;
    for (std::size_t i = k + 1; i < n; ++i) u[i] = m[i][k] / norm;
    u[k + 1] += u[k + 1] >= 0 ? 1 : -1;
    const Wide half = std::fabs(u[k + 1]);  // u'u / 2
    Wide dot = 0;
    for (std::size_t i = k; i < n; ++i) {
      w[i] = 0;
      for (std::size_t j = k + 1; j < n; ++j) w[i] += m[i][j] * u[j];
      w[i] /= half;
      if (i > k) dot += w[i] * u[i];
    }
    u[k] = 0;
    for (std::size_t i = k; i < n; ++i) w[i] -= dot / (2 * half) * u[i];
    for (std::size_t i = k; i < n; ++i)
      for (std::size_t j = k; j < n; ++j) m[i][j] -= u[i] * w[j] + w[i] * u[j];
  }
  for (std::size_t i = 0; i < n; ++i) t.diagonal.push_back(m[i][i]);
  for (std::size_t i = 0; i + 1 < n; ++i) t.coupling.push_back(m[i + 1][i]);
  return t;
}

}  // namespace rgfast::test
