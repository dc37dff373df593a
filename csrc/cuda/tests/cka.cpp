// The kernels of CKA, run by fibres, against sums in long double.
#include "cuda/cka_groups.cuh"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "cuda/tests/cka_layers.hpp"
#include "cuda/tests/effort.hpp"
#include "tests/check.hpp"

#define RGFAST_DECLARE(name)                                                                                \
  extern "C" void rgfast_cka_squares_##name(const std::int64_t*, std::int64_t, std::int64_t, std::int64_t,  \
                                            std::int64_t, double*);                                         \
  extern "C" void rgfast_cka_left_out_##name(const std::int64_t*, std::int64_t, std::int64_t, std::int64_t, \
                                             std::int64_t, std::int64_t, double*)
RGFAST_DECLARE(float64);
RGFAST_DECLARE(float32);
RGFAST_DECLARE(bfloat16);
RGFAST_DECLARE(float16);
extern "C" void rgfast_cka_sums(const std::int64_t*, std::int64_t, std::int64_t, std::int64_t, std::int64_t,
                                std::int64_t, std::int64_t, const double*, double*);
extern "C" void rgfast_cka_collect(const double*, std::int64_t, std::int64_t, std::int64_t, std::int64_t,
                                   std::int64_t, std::int64_t, std::int64_t, std::int64_t, double*);

namespace {

using namespace rgfast::cuda;
using namespace rgfast::cuda::cka;
using rgfast::cuda::moments::kShared;
using rgfast::cuda::moments::strips;
using rgfast::shim::launch;
using rgfast::test::grid_of;
using rgfast::test::kFew;

template <class T>
struct Kernels;
#define RGFAST_KERNELS(T, name)                                  \
  template <>                                                    \
  struct Kernels<T> {                                            \
    static constexpr auto squares = rgfast_cka_squares_##name;   \
    static constexpr auto left_out = rgfast_cka_left_out_##name; \
  }
RGFAST_KERNELS(double, float64);
RGFAST_KERNELS(float, float32);
RGFAST_KERNELS(Bfloat16, bfloat16);
RGFAST_KERNELS(Half, float16);

// Pairs of both layers with themselves and each other.
template <class T>
struct Case : rgfast::test::Layers<T> {
  using rgfast::test::Layers<T>::Layers;

  std::int64_t variants() const { return this->groups > 1 ? 1 + this->groups : 1; }

  // [positions, variants, 3] of the pairs (0, 0), (0, 1) and (1, 1).
  std::vector<PairSums> run(std::uint64_t seed = 0) const {
    const std::int64_t positions = this->positions, rows = this->rows, groups = this->groups;
    auto table = this->table();
    std::int64_t tiles = 0;
    for (const auto& [left, right] : {std::pair{0, 0}, {0, 1}, {1, 1}}) {
      for (const std::int64_t w :
           {std::int64_t{left}, std::int64_t{right}, tiles, std::int64_t{2} * left, std::int64_t{2} * right})
        table.push_back(w);
      const std::int64_t high = strips(this->width[left]), wide = strips(this->width[right]);
      tiles += left == right ? high * (high + 1) / 2 : high * wide;
    }
    this->center(table, seed);
    std::vector<double> squares(static_cast<std::size_t>(positions * variants() * tiles), NAN);
    std::vector<PairSums> out(static_cast<std::size_t>(positions * variants() * 3), {NAN, NAN, NAN, NAN});
    const dim3 block{kThreads, 1, 1}, grid = grid_of(positions * tiles, 1);
    if (groups > 1)
      launch({.grid = grid, .block = block, .shared = kLeftOutShared, .seed = seed}, Kernels<T>::left_out,
             table.data(), std::int64_t{2}, std::int64_t{3}, tiles, rows, groups, squares.data());
    else
      launch({.grid = grid, .block = block, .shared = kShared, .seed = seed}, Kernels<T>::squares,
             table.data(), std::int64_t{2}, std::int64_t{3}, tiles, rows, squares.data());
    launch({.grid = {static_cast<unsigned>(positions), 3, static_cast<unsigned>(variants())},
            .block = block,
            .shared = 8 * kWarps,
            .seed = seed},
           rgfast_cka_sums, table.data(), std::int64_t{2}, std::int64_t{3}, tiles, rows, groups,
           std::int64_t{0}, squares.data(), reinterpret_cast<double*>(out.data()));
    return out;
  }

  // The largest relative error of all sums, of those over different samples by the squared norm.
  double worst(const std::vector<PairSums>& out) const {
    double most = 0.0;
    for (std::int64_t p = 0; p < this->positions; ++p)
      for (std::int64_t v = 0; v < variants(); ++v) {
        std::vector<long double> z[2], a[2];
        long double trace[2] = {}, apart[2] = {};
        for (int l = 0; l < 2; ++l) {
          z[l] = this->centered(l, p, v - 1, &apart[l]);
          a[l].assign(z[l].size() / static_cast<std::size_t>(this->width[l]), 0.0L);
          for (std::size_t at = 0; at < z[l].size(); ++at)
            a[l][at / static_cast<std::size_t>(this->width[l])] += z[l][at] * z[l][at];
          for (const long double x : a[l]) trace[l] += x;
        }
        const int left[3] = {0, 0, 1}, right[3] = {0, 1, 1};
        for (int k = 0; k < 3; ++k) {
          const int i = left[k], j = right[k];
          long double norm = 0.0L, same = 0.0L;
          for (std::int64_t c = 0; c < this->width[i]; ++c)
            for (std::int64_t e = 0; e < this->width[j]; ++e) {
              long double entry = 0.0L;
              for (std::size_t r = 0; r < a[i].size(); ++r)
                entry += z[i][r * static_cast<std::size_t>(this->width[i]) + static_cast<std::size_t>(c)] *
                         z[j][r * static_cast<std::size_t>(this->width[j]) + static_cast<std::size_t>(e)];
              norm += entry * entry;
            }
          for (std::size_t r = 0; r < a[i].size(); ++r) same += a[i][r] * a[j][r];
          const PairSums& got = out[static_cast<std::size_t>((p * variants() + v) * 3 + k)];
          const auto off = [](double x, long double want, long double size) {
            const auto error = static_cast<double>(std::fabs(x - want) / (size + 1e-300L));
            return std::isnan(error) ? INFINITY : error;
          };
          most =
              std::max({most, off(got.off, norm - same, norm + same), off(got.same, same, same),
                        off(got.trace, trace[i], trace[i]), off(got.apart, apart[i], apart[i] + trace[i])});
        }
      }
    return most;
  }
};

template <class T>
void check_shapes() {
  for (const std::int64_t d : {1, 16, 33, 64, 67})
    for (const std::int64_t n : {2, 17, 40}) {
      if (rgfast::test::kFew && n * d % 3 != 1) continue;
      Case<T> given(2, n, d, d == 33 ? 70 : 5);
      CHECK(given.worst(given.run()) <= 1e-13);
    }
}

TEST(cka_of_odd_shapes_in_fp64) { check_shapes<double>(); }
TEST(cka_of_odd_shapes_in_fp32) { check_shapes<float>(); }

TEST(cka_of_half_rows) {
  Case<Half> half(1, 30, 33, 9);
  CHECK(half.worst(half.run()) <= 1e-13);
  Case<Bfloat16> brain(1, 30, 33, 9);
  CHECK(brain.worst(brain.run()) <= 1e-13);
}

TEST(cka_keeps_digits_at_an_offset) {
  Case<double> given(1, 40, 18, 5, 1e6);
  CHECK(given.worst(given.run()) <= 1e-13);
}

TEST(cka_of_equal_rows_is_zero_and_of_tiny_ones_is_not) {
  Case<double> given(1, 9, 4, 3);
  given.x[0].assign(given.x[0].size(), 1.0 / 3.0);
  for (double& v : given.x[1]) v *= 1e-170;
  const auto out = given.run();
  CHECK(out[0].off == 0.0 && out[0].same == 0.0 && out[0].trace == 0.0);
  CHECK(out[2].trace > 0.0 && out[2].trace < 1e-300);
}

bool alike(const std::vector<PairSums>& one, const PairSums* other) {
  return std::memcmp(one.data(), other, one.size() * sizeof(PairSums)) == 0;
}

TEST(cka_bits_depend_on_the_rows_of_a_position_alone) {
  Case<float> given(3, rgfast::test::kFew ? 40 : 130, 20, 65);
  const auto together = given.run();
  CHECK(alike(given.run(5), together.data()));
  Case<float> alone(1, given.rows, 20, 65);
  for (int l = 0; l < 2; ++l)
    std::copy_n(given.x[l].begin() + given.rows * given.width[l], alone.x[l].size(), alone.x[l].begin());
  CHECK(alike(alone.run(), together.data() + 3));
}

TEST(cka_without_each_group_of_samples) {
  for (const std::int64_t groups : {2, 3, 9}) {
    if (kFew && groups != 3) continue;
    const Case<double> given(kFew ? 1 : 2, 40, 33, 5, 0.75, groups);
    CHECK(given.worst(given.run()) <= 1e-13);
    CHECK(alike(given.run(7), given.run().data()));
  }
  const Case<float> wide(1, 20, kFew ? 9 : 67, 4, 1e4, 2);
  CHECK(wide.worst(wide.run()) <= 1e-12);
}

TEST(cka_without_groups_of_half_rows) {
  const Case<Half> half(1, 30, 18, 9, 0.75, 2);
  CHECK(half.worst(half.run()) <= 1e-13);
  const Case<Bfloat16> brain(1, 30, 18, 9, 0.75, 2);
  CHECK(brain.worst(brain.run()) <= 1e-13);
}

// Six of ten tiles of four strips in two groups, of two positions of three, added to what is there.
TEST(cka_collects_tiles_without_a_group) {
  constexpr std::int64_t first = 3, count = 6, spans = 2, here = 2, entries = 70, start = 1;
  std::vector<double> from(count * spans * here * entries);
  for (std::size_t k = 0; k < from.size(); ++k) from[k] = static_cast<double>(k % 97);
  std::vector<double> to(3 * 3 * entries, 0.5);
  launch({.grid = grid_of(5, 3), .block = {kThreads, 1, 1}, .shared = 8 * kThreads}, rgfast_cka_collect,
         from.data(), first, count, spans, here, entries, std::int64_t{2}, start, std::int64_t{1}, to.data());
  bool right = true;
  for (std::int64_t p = 0; p < 3; ++p)
    for (std::int64_t v = 0; v < 3; ++v)
      for (std::int64_t e = 0; e < entries; ++e) {
        double want = 0.5;
        for (std::int64_t k = 0; p >= start && k < count * spans; ++k) {
          // Rows and columns of tiles 3 to 8.
          const std::int64_t row[6] = {0, 1, 2, 0, 1, 2}, column[6] = {2, 2, 2, 3, 3, 3}, at = k / spans;
          if (row[at] / 2 == v - 1 || column[at] / 2 == v - 1) continue;
          want += from[static_cast<std::size_t>((k * here + p - start) * entries + e)];
        }
        right = right && to[static_cast<std::size_t>((p * 3 + v) * entries + e)] == want;
      }
  CHECK(right);
}

TEST(cka_rounding_of_a_sum_is_exact) {
  const double sum = 1e4 + 1.0 / 3.0;
  CHECK(left_over(1e4, 1.0 / 3.0, sum) == 1.0 / 3.0 - (sum - 1e4));
  CHECK(left_over(1.0 / 3.0, 1e4, sum) == 1.0 / 3.0 - (sum - 1e4));
}

}  // namespace
