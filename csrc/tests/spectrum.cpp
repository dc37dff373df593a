#include "kernels/spectrum.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

#include "tests/check.hpp"

namespace {

using rgfast::DType;
using rgfast::View;
using rgfast::spectrum::MomentInfo;
using rgfast::spectrum::Route;

template <class T>
constexpr DType dtype_of() {
  return sizeof(T) == 8 ? DType::f64 : DType::f32;
}

template <class T>
View contiguous(std::vector<T>& values, std::vector<std::int64_t> sizes) {
  View view;
  view.data = reinterpret_cast<std::byte*>(values.data());
  view.dtype = dtype_of<T>();
  view.ndim = static_cast<int>(sizes.size());
  std::int64_t step = 1;
  for (std::size_t dim = sizes.size(); dim-- > 0;) {
    view.sizes[dim] = sizes[dim];
    view.strides[dim] = step;
    step *= sizes[dim];
  }
  return view;
}

// The second difference: 2 - 2 cos(k pi / (n + 1)). Buffers of the exact size, so that a sanitizer sees one
// step beyond them.
template <class T>
double worst_error(std::int64_t batch, std::int64_t n, int threads, Route route) {
  std::vector<T> a(static_cast<std::size_t>(batch * n * n));
  for (std::int64_t b = 0; b < batch; ++b)
    for (std::int64_t i = 0; i < n; ++i)
      for (std::int64_t j = 0; j < n; ++j)
        a[static_cast<std::size_t>((b * n + i) * n + j)] = static_cast<T>(i == j                 ? 2
                                                                          : std::abs(i - j) == 1 ? -1
                                                                                                 : 0);
  std::vector<T> values(static_cast<std::size_t>(batch * n), std::nanf(""));
  const auto status = rgfast::spectrum::eigvalsh(contiguous(a, {batch, n, n}), contiguous(values, {batch, n}),
                                                 threads, route);
  if (status.index != -1) return 1.0;
  double worst = 0.0;
  const double pi = std::acos(-1.0);
  for (std::int64_t b = 0; b < batch; ++b)
    for (std::int64_t k = 0; k < n; ++k) {
      const double want = 2.0 - 2.0 * std::cos(static_cast<double>(k + 1) * pi / static_cast<double>(n + 1));
      const double got = static_cast<double>(values[static_cast<std::size_t>(b * n + k)]);
      const double off = std::fabs(got - want);
      worst = off <= worst ? worst : off;  // NaN wins
    }
  return worst;
}

TEST(eigenvalues_of_the_second_difference) {
  for (const Route route : {Route::choose, Route::lanes, Route::single})
    for (const int threads : {1, 3})
      for (const std::int64_t batch : {1, 2, 3, 17, 40})
        for (const std::int64_t n : {1, 2, 3, 4, 5, 8, 13, 16, 17, 33}) {
          CHECK(worst_error<double>(batch, n, threads, route) < 4e-14);
          CHECK(worst_error<float>(batch, n, threads, route) < 2e-5);
        }
}

// Trace and norm of the moment against those of its eigenvalues; `raw`: of x itself, beside the centred ones.
double moment_error(std::int64_t batch, std::int64_t n, std::int64_t d, bool centred, bool raw, Route route) {
  std::mt19937 draw(static_cast<unsigned>(n * 1000 + d));
  std::normal_distribution<float> normal(3.0F, 1.0F);
  std::vector<float> x(static_cast<std::size_t>(batch * n * d));
  for (float& value : x) value = normal(draw);
  const std::int64_t m = std::min(n, d);
  std::vector<double> matrix(static_cast<std::size_t>(batch * m * m), std::nan(""));
  std::vector<double> values(static_cast<std::size_t>(batch * m), std::nan(""));
  std::vector<double> accumulated(static_cast<std::size_t>(batch));
  std::vector<std::int64_t> exponent(static_cast<std::size_t>(batch));
  std::vector<std::int64_t> limit(static_cast<std::size_t>(batch));
  const MomentInfo info{accumulated.data(), exponent.data(), limit.data()};
  const View view = contiguous(x, {batch, n, d});
  rgfast::spectrum::gram(view, centred && !raw, matrix.data(), info, 2);
  std::vector<double> other(values.size(), std::nan(""));
  if (rgfast::spectrum::gram_eigenvalues(view, centred, values.data(), raw ? other.data() : nullptr, info, 2,
                                         route)
          .index != -1)
    return 1e9;
  if (raw) values = other;
  double worst = 0.0;
  for (std::int64_t b = 0; b < batch; ++b) {
    double trace = 0.0;
    double squares = 0.0;
    double sum = 0.0;
    double sum_of_squares = 0.0;
    for (std::int64_t i = 0; i < m; ++i) {
      trace += matrix[static_cast<std::size_t>((b * m + i) * m + i)];
      sum += values[static_cast<std::size_t>(b * m + i)];
      sum_of_squares += std::pow(values[static_cast<std::size_t>(b * m + i)], 2);
      for (std::int64_t j = 0; j < m; ++j)
        squares += std::pow(matrix[static_cast<std::size_t>((b * m + i) * m + j)], 2);
    }
    const double scale = trace > 0 ? trace : 1.0;
    for (const double off :
         {std::fabs(trace - sum) / scale, std::fabs(squares - sum_of_squares) / (scale * scale)})
      worst = off <= worst ? worst : off;
  }
  return worst;
}

TEST(moments_and_their_eigenvalues_agree) {
  for (const Route route : {Route::lanes, Route::single})
    for (const bool centred : {false, true})
      for (const std::int64_t batch : {1, 3, 19})
        for (const auto& [n, d] : std::vector<std::pair<std::int64_t, std::int64_t>>{
                 {1, 1}, {1, 9}, {9, 1}, {7, 5}, {5, 7}, {40, 17}, {17, 40}, {300, 8}, {8, 300}, {33, 33}})
          for (const bool raw : {false, true})
            if (!raw || (centred && n >= d)) CHECK(moment_error(batch, n, d, centred, raw, route) < 1e-13);
}

// Eigenvalues without each group of samples, against those of the rows that are left.
TEST(spectra_without_groups) {
  using rgfast::spectrum::left_out_eigenvalues;
  std::mt19937 draw(5);
  std::normal_distribution<float> normal(3.0F, 1.0F);
  for (const std::int64_t batch : {2, 5, 17})
    for (const auto& [n, d, groups] :
         std::vector<std::array<std::int64_t, 3>>{{9, 1, 2}, {30, 5, 3}, {70, 17, 8}, {301, 33, 7}}) {
      std::vector<float> x(static_cast<std::size_t>(batch * n * d));
      for (float& value : x) value = normal(draw);
      const auto results = static_cast<std::size_t>(batch * groups);
      std::vector<double> accumulated(results), values(results * static_cast<std::size_t>(d)), raw(values);
      std::vector<std::int64_t> exponent(results), limit(results);
      rgfast::spectrum::Status status;
      if (!left_out_eigenvalues(contiguous(x, {batch, n, d}), groups, values.data(), raw.data(),
                                {accumulated.data(), exponent.data(), limit.data()}, 2, status))
        continue;
      CHECK(status.index == -1);
      for (std::int64_t g = 0; g < groups; ++g) {
        std::vector<float> few;
        for (std::int64_t row = 0; row < batch * n; ++row)
          for (std::int64_t j = 0; j < d && row % n % groups != g; ++j)
            few.push_back(x[static_cast<std::size_t>(row * d + j)]);
        const std::int64_t left = static_cast<std::int64_t>(few.size()) / (batch * d);
        for (const bool centred : {true, false}) {
          std::vector<double> wanted(static_cast<std::size_t>(batch * d));
          const View view = contiguous(few, {batch, left, d});
          rgfast::spectrum::gram_eigenvalues(view, centred, wanted.data(), nullptr,
                                             {accumulated.data(), exponent.data(), limit.data()}, 1,
                                             Route::choose);
          for (std::int64_t b = 0; b < batch; ++b)
            for (std::int64_t j = 0; j < d; ++j) {
              const double got = (centred ? values : raw)[static_cast<std::size_t>((b * groups + g) * d + j)];
              const double largest = wanted[static_cast<std::size_t>(b * d + d - 1)];
              CHECK(std::fabs(got - wanted[static_cast<std::size_t>(b * d + j)]) <= 1e-13 * largest);
            }
        }
      }
    }
}

// A diagonal moment has its ranks in closed form: k equal eigenvalues and the rest zero is rank k.
TEST(effective_ranks_of_flat_spectra) {
  for (const std::int64_t batch : {1, 63, 64, 65, 200})
    for (const std::int64_t m : {1, 2, 5, 17}) {
      std::vector<double> values(static_cast<std::size_t>(batch * m), 0.0);
      std::vector<double> accumulated(static_cast<std::size_t>(batch));
      std::vector<std::int64_t> exponent(static_cast<std::size_t>(batch), 0);
      std::vector<std::int64_t> limit(static_cast<std::size_t>(batch));
      for (std::int64_t b = 0; b < batch; ++b) {
        const std::int64_t live = b % (m + 1);
        for (std::int64_t i = 0; i < live; ++i) values[static_cast<std::size_t>(b * m + m - 1 - i)] = 9.0;
        accumulated[static_cast<std::size_t>(b)] = 9.0 * static_cast<double>(live);
        limit[static_cast<std::size_t>(b)] = live;
      }
      const MomentInfo info{accumulated.data(), exponent.data(), limit.data()};
      for (const bool variance : {false, true}) {
        std::vector<double> rank(static_cast<std::size_t>(batch), std::nan(""));
        std::vector<double> bound(static_cast<std::size_t>(batch), std::nan(""));
        rgfast::spectrum::effective_ranks(values.data(), batch, m, 40, info,
                                          {variance, rank.data(), bound.data()}, 2);
        for (std::int64_t b = 0; b < batch; ++b) {
          const auto at = static_cast<std::size_t>(b);
          CHECK(std::fabs(rank[at] - static_cast<double>(b % (m + 1))) < 1e-12);
          CHECK(bound[at] >= 0.0 && bound[at] < 1e-10);
        }
      }
    }
}

// Columns of random numbers on a scale that falls by a factor from one to the next.
std::vector<double> graded(std::int64_t batch, std::int64_t n, std::int64_t d, double factor) {
  std::mt19937 draw(static_cast<unsigned>(n + d));
  std::normal_distribution<double> normal(0.0, 1.0);
  std::vector<double> x(static_cast<std::size_t>(batch * n * d));
  for (std::size_t i = 0; i < x.size(); ++i)
    x[i] = normal(draw) * std::pow(factor, static_cast<double>(i % static_cast<std::size_t>(d)));
  return x;
}

// A stage's vectors are orthonormal, and what they leave of the data has their eigenvalues no longer. Buffers
// of the exact size, so that a sanitizer sees one step beyond them.
void check_refinement(std::int64_t batch, std::int64_t n, std::int64_t d, double factor) {
  using rgfast::spectrum::kRefineStages;
  const std::int64_t m = std::min(n, d);
  const std::int64_t stride = (m + 7) / 8 * 8;
  std::vector<double> x = graded(batch, n, d, factor);
  const auto results = static_cast<std::size_t>(batch);
  std::vector<std::int64_t> at(results), exponent(results), limit(results);
  for (std::int64_t i = 0; i < batch; ++i) at[static_cast<std::size_t>(i)] = batch - 1 - i;
  std::vector<double> values(results * static_cast<std::size_t>(m)), first, accumulated(results),
      residual(results);
  std::vector<double> vectors(results * static_cast<std::size_t>(m * stride), std::nan(""));
  std::vector<long long> ends(results * kRefineStages, 0);
  for (int stage = 0; stage < kRefineStages; ++stage) {
    const rgfast::spectrum::Refinement step{at.data(),      true,   stage,       1e-6,
                                            vectors.data(), stride, ends.data(), residual.data()};
    const auto status = rgfast::spectrum::refine(contiguous(x, {batch, n, d}), batch, step, values.data(),
                                                 {accumulated.data(), exponent.data(), limit.data()}, 2);
    CHECK(status.index == -1);
    if (stage == 0) first = values;
    for (std::int64_t b = 0; b < batch; ++b) {
      const long long* const end = ends.data() + b * kRefineStages;
      const double* const basis = vectors.data() + b * m * stride;
      const double top = values[static_cast<std::size_t>(b * m + m - 1)];
      CHECK(residual[static_cast<std::size_t>(b)] <= 1e-14 * static_cast<double>(m) * top);
      if (stage == 1 && end[0] > 0) CHECK(top < 1.001e-6 * first[static_cast<std::size_t>(b * m + m - 1)]);
      const long long before = stage == 0 ? 0 : end[stage - 1];
      CHECK(end[stage] >= before && end[stage] < m);
      if (stage == kRefineStages - 1) CHECK(end[stage] == before);
      for (long long i = before; i < end[stage]; ++i)
        for (long long j = before; j <= i; ++j) {
          double dot = i == j ? -1.0 : 0.0;
          for (std::int64_t c = 0; c < stride; ++c) dot += basis[i * stride + c] * basis[j * stride + c];
          CHECK(std::fabs(dot) < 1e-13);
        }
    }
  }
}

// Two stages in one pass are stages 0 and 1 of `refine`, about a mean that is far off.
void check_second_stage(std::int64_t batch, std::int64_t n, std::int64_t d, double factor, bool raw) {
  const std::int64_t m = std::min(n, d);
  std::vector<double> x = graded(batch, n, d, factor);
  for (std::size_t i = 0; i < x.size(); ++i)
    x[i] += 30.0 * static_cast<double>(i % static_cast<std::size_t>(d));
  const auto results = static_cast<std::size_t>(batch);
  const auto all = results * static_cast<std::size_t>(m);
  std::vector<double> values(all), lifted(all), accumulated(results);
  std::vector<std::int64_t> exponent(results), limit(results);
  std::vector<double> second[2] = {std::vector<double>(all), std::vector<double>(all)};
  std::vector<long long> count[2] = {std::vector<long long>(results), std::vector<long long>(results)};
  std::vector<double> residual(results),
      trace[2] = {std::vector<double>(results), std::vector<double>(results)};
  const rgfast::spectrum::SecondStage stages[2] = {
      {second[0].data(), count[0].data(), residual.data(), trace[0].data()},
      {second[1].data(), count[1].data(), residual.data(), trace[1].data()}};
  rgfast::spectrum::Status status;
  if (!rgfast::spectrum::refined_eigenvalues(
          contiguous(x, {batch, n, d}), 1e-11, 1e-6, values.data(), raw ? lifted.data() : nullptr,
          {accumulated.data(), exponent.data(), limit.data()}, stages, 2, status))
    return;
  CHECK(status.index == -1);
  for (std::size_t way = 0; way < (raw ? 2 : 1); ++way)
    for (std::size_t b = 0; b < results; ++b) {
      if (count[way][b] == 0) continue;
      double sum = 0.0;
      for (std::size_t i = 0; i < static_cast<std::size_t>(m); ++i)
        sum += second[way][b * static_cast<std::size_t>(m) + i];
      CHECK(std::fabs(sum - trace[way][b]) <= 1e-13 * trace[way][b]);
      const double top = (way == 0 ? values : lifted)[(b + 1) * static_cast<std::size_t>(m) - 1];
      CHECK(second[way][(b + 1) * static_cast<std::size_t>(m) - 1] <= 1.001e-6 * top);
    }
}

TEST(second_stages) {
  for (const std::int64_t batch : {2, 9, 40})
    for (const auto& [n, d] : std::vector<std::pair<std::int64_t, std::int64_t>>{
             {2, 2}, {3, 1}, {9, 2}, {40, 17}, {17, 40}, {96, 24}, {33, 33}})
      for (const double factor : {1.0, 0.5, 1e-2, 1e-9, 0.0})
        for (const bool raw : {false, true})
          if (!raw || n >= d) check_second_stage(batch, n, d, factor, raw);
}

TEST(stages_of_refinement) {
  for (const std::int64_t batch : {1, 9, 40})
    for (const auto& [n, d] : std::vector<std::pair<std::int64_t, std::int64_t>>{
             {1, 1}, {2, 3}, {9, 2}, {40, 17}, {17, 40}, {300, 8}, {33, 33}})
      for (const double factor : {1.0, 0.5, 1e-2, 1e-9, 0.0}) check_refinement(batch, n, d, factor);
  check_refinement(3, 150, 140, 0.8);
}

}  // namespace
