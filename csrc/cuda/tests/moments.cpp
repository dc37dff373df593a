// The kernels of moments, run by fibres, against sums in long double, and their arithmetic by itself.
#include "cuda/moments.cuh"

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "cuda/tests/effort.hpp"
#include "tests/check.hpp"

#define RGFAST_DECLARE(name)                                                                                 \
  extern "C" void rgfast_moments_norms_##name(const std::int64_t*, std::int64_t, std::int64_t,               \
                                              const unsigned char*, std::int64_t, std::int64_t);             \
  extern "C" void rgfast_moments_exact_##name(const std::int64_t*, std::int64_t, std::int64_t, std::int64_t, \
                                              std::int64_t, const unsigned char*, std::int64_t,              \
                                              std::int64_t, std::int64_t, std::int64_t, std::int64_t);       \
  extern "C" void rgfast_moments_split_##name(const std::int64_t*, std::int64_t, std::int64_t, std::int64_t, \
                                              std::int64_t, const unsigned char*, std::int64_t,              \
                                              std::int64_t, std::int64_t, std::int64_t, std::int64_t)
RGFAST_DECLARE(float64);
RGFAST_DECLARE(float32);
RGFAST_DECLARE(bfloat16);
RGFAST_DECLARE(float16);
extern "C" void rgfast_moments_tops(const std::int64_t*, std::int64_t);
extern "C" void rgfast_moments_gather(const std::int64_t*, std::int64_t, std::int64_t, std::int64_t,
                                      std::int64_t, std::int64_t, std::int64_t);

namespace {

using namespace rgfast::cuda;
using namespace rgfast::cuda::moments;
using rgfast::shim::launch;

template <class T>
struct Kernels;
#define RGFAST_KERNELS(T, name)                                \
  template <>                                                  \
  struct Kernels<T> {                                          \
    static constexpr auto norms = rgfast_moments_norms_##name; \
    static constexpr auto exact = rgfast_moments_exact_##name; \
    static constexpr auto split = rgfast_moments_split_##name; \
  }
RGFAST_KERNELS(double, float64);
RGFAST_KERNELS(float, float32);
RGFAST_KERNELS(Bfloat16, bfloat16);
RGFAST_KERNELS(Half, float16);

double widened(double x) { return x; }
double widened(float x) { return static_cast<double>(x); }
double widened(Half x) { return static_cast<double>(to_float(x)); }
double widened(Bfloat16 x) { return static_cast<double>(to_float(x)); }
void narrow(double x, double& to) { to = x; }
void narrow(double x, float& to) { to = static_cast<float>(x); }
void narrow(double x, Half& to) { to = to_half(static_cast<float>(x)); }
void narrow(double x, Bfloat16& to) { to = to_bfloat16(static_cast<float>(x)); }

std::int64_t word(double x) {
  std::int64_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
std::int64_t word(const void* p) { return reinterpret_cast<std::int64_t>(p); }

// Two layers of rows with just the memory that they need, so that a sanitizer sees a step outside.
template <class T>
struct Case {
  std::int64_t positions, rows;
  std::int64_t width[2];
  bool across;  // features are not neighbors, but rows are
  std::vector<T> x[2];
  std::vector<double> shift[2], norms[2], tops[2];
  std::vector<unsigned char> keep;
  double unit[2] = {0.5, 4.0};
  std::int64_t extras = 2, add = 1;
  bool split = false, spread = false;

  Case(std::int64_t p, std::int64_t n, std::int64_t d, std::int64_t e, double offset = 0.75,
       double scale = 1.0, bool turned = false)
      : positions(p), rows(n), width{d, e}, across(turned) {
    std::mt19937 generator(static_cast<unsigned>(n + d));
    std::normal_distribution<double> normal;
    for (int l = 0; l < 2; ++l) {
      x[l].resize(static_cast<std::size_t>(p * n * width[l]));
      for (T& v : x[l]) narrow((offset + normal(generator)) * scale, v);
      shift[l].resize(static_cast<std::size_t>(p * width[l]));
      for (double& v : shift[l]) v = (offset + 0.01 * normal(generator)) * scale;
      norms[l].assign(static_cast<std::size_t>(p * n), NAN);
      tops[l].assign(static_cast<std::size_t>(p), NAN);
    }
    keep.assign(static_cast<std::size_t>(p * n), 1);
  }

  std::int64_t row_stride(int l) const { return across ? 1 : width[l]; }
  std::int64_t feature_stride() const { return across ? rows : 1; }
  std::int64_t at(int l, std::int64_t p, std::int64_t r, std::int64_t c) const {
    return p * rows * width[l] + r * row_stride(l) + c * feature_stride();
  }
  std::int64_t columns(int l) const { return width[l] + extras; }

  // {own moment of the first layer, moment of both}, added to ones.
  std::vector<std::vector<double>> run(std::uint64_t seed = 0) {
    const std::int64_t blocks = (rows + kBlock - 1) / kBlock;
    std::vector<std::vector<double>> sums, parts;
    std::vector<std::int64_t> table;
    for (int l = 0; l < 2; ++l)
      for (const std::int64_t w :
           {word(x[l].data()), rows * width[l], row_stride(l), feature_stride(), width[l],
            word(shift[l].data()), word(unit[l]), word(norms[l].data()), word(tops[l].data())})
        table.push_back(w);
    const std::int64_t entries = positions * columns(0) * std::max(columns(0), columns(1));
    std::int64_t tiles = 0;
    for (int pair = 0; pair < 2; ++pair) {
      const std::int64_t high = strips(columns(0)), wide = strips(columns(pair));
      sums.emplace_back(static_cast<std::size_t>(positions * columns(0) * columns(pair)), 1.0);
      parts.emplace_back(static_cast<std::size_t>(blocks * entries), NAN);
      for (const std::int64_t w : {std::int64_t{0}, std::int64_t{pair}, tiles, word(sums[pair].data()),
                                   spread ? word(parts[pair].data()) : 0})
        table.push_back(w);
      tiles += pair == 0 ? high * (high + 1) / 2 : high * wide;
    }
    const auto groups = static_cast<unsigned>((positions * rows + 15) / 16);
    launch({.grid = {groups, 2, 1}, .block = {kThreads, 1, 1}, .seed = seed}, Kernels<T>::norms, table.data(),
           positions, rows, keep.data(), rows, std::int64_t{1});
    if (split)
      launch({.grid = {static_cast<unsigned>(positions), 2, 1},
              .block = {kThreads, 1, 1},
              .shared = 8 * kThreads,
              .seed = seed},
             rgfast_moments_tops, table.data(), rows);
    launch(
        {.grid = {static_cast<unsigned>(positions * tiles), spread ? static_cast<unsigned>(blocks) : 1U, 1},
         .block = {kThreads, 1, 1},
         .shared = kShared,
         .seed = seed},
        split ? Kernels<T>::split : Kernels<T>::exact, table.data(), std::int64_t{2}, std::int64_t{2}, tiles,
        rows, keep.data(), rows, std::int64_t{1}, extras, add, spread ? entries : std::int64_t{0});
    if (spread)
      launch({.grid = {static_cast<unsigned>((entries + kThreads - 1) / kThreads), 2, 1},
              .block = {kThreads, 1, 1}},
             rgfast_moments_gather, table.data(), std::int64_t{2}, positions, extras, add, blocks, entries);
    return sums;
  }

  // The largest error of the sums over what `most` says, in sums of absolute values of the products.
  double worst(const std::vector<std::vector<double>>& sums) const {
    double most = 0.0;
    for (int pair = 0; pair < 2; ++pair)
      for (std::int64_t p = 0; p < positions; ++p) {
        const auto high = static_cast<std::size_t>(columns(0)),
                   wide = static_cast<std::size_t>(columns(pair));
        std::vector<long double> want(high * wide), size(high * wide);
        for (std::int64_t r = 0; r < rows; ++r) {
          if (keep[static_cast<std::size_t>(p * rows + r)] == 0) continue;
          std::vector<long double> z[2];
          for (int side = 0; side < 2; ++side) {
            const int l = side * pair;
            long double norm = 0.0;
            for (std::int64_t c = 0; c < width[l]; ++c) {
              const long double y =
                  (static_cast<long double>(widened(x[l][static_cast<std::size_t>(at(l, p, r, c))])) -
                   shift[l][static_cast<std::size_t>(p * width[l] + c)]) *
                  unit[l];
              z[side].push_back(y);
              norm += y * y;
            }
            if (extras != 0) z[side].insert(z[side].end(), {norm, 1.0L});
          }
          for (std::size_t i = 0; i < high; ++i)
            for (std::size_t j = 0; j < wide; ++j) {
              want[i * wide + j] += z[0][i] * z[1][j];
              size[i * wide + j] += std::fabs(z[0][i] * z[1][j]);
            }
        }
        for (std::size_t k = 0; k < want.size(); ++k) {
          const double got =
              sums[static_cast<std::size_t>(pair)][static_cast<std::size_t>(p) * want.size() + k];
          const long double start = add != 0 ? 1.0L : 0.0L;
          const auto error = static_cast<double>(std::fabs(got - start - want[k]));
          if (!(error <= 0x1p-50 * static_cast<double>(start)))
            most = std::fmax(most,
                             std::isnan(error) ? INFINITY : error / static_cast<double>(size[k] + 1e-300L));
        }
      }
    return most;
  }
};

// Rows and sums in fp64: terms of both, and a few roundings of what they are made of.
double bound(std::int64_t rows, std::int64_t width) {
  return 0x1p-53 * static_cast<double>(rows + width + 16);
}

TEST(moments_tiles_of_a_pair_cover_it_once) {
  for (const std::int64_t high : {1, 2, 5})
    for (const std::int64_t wide : {1, 3, 5})
      for (const bool own : {false, true}) {
        if (own && high != wide) continue;
        std::vector<int> seen(static_cast<std::size_t>(high * wide), 0);
        for (std::int64_t k = 0; k < (own ? wide * (wide + 1) / 2 : high * wide); ++k) {
          const Tile tile = tile_at(k, wide, own);
          ++seen[static_cast<std::size_t>(tile.row * wide + tile.column)];
        }
        for (std::int64_t i = 0; i < high; ++i)
          for (std::int64_t j = 0; j < wide; ++j)
            CHECK(seen[static_cast<std::size_t>(i * wide + j)] == (own && i > j ? 0 : 1));
      }
}

TEST(moments_exponents_and_splits) {
  for (const double x : {1e-300, 0.3, 0.5, 1.0, 1.5, 4.0, 1e300}) {
    CHECK(x < std::ldexp(1.0, exponent_above(x)) && x >= std::ldexp(0.5, exponent_above(x)));
    const int e = split_exponent(x);
    CHECK(std::sqrt(x) * std::ldexp(1.0, -e) < std::ldexp(1.0, kTop));
    CHECK(std::sqrt(x) * std::ldexp(1.0, -e) >= std::ldexp(1.0, kTop - 2));
  }
  CHECK(split_exponent(0.0) == 0 && power_of_two<double>(-1022) == std::numeric_limits<double>::min());
  std::mt19937 generator(3);
  std::uniform_real_distribution<float> uniform(-16384.0F, 16384.0F);
  for (int k = 0; k < 1000; ++k) {
    const float y = uniform(generator) * (k % 2 == 0 ? 1.0F : 0x1p-12F);
    const Halves halves = split(y);
    const double back =
        static_cast<double>(to_float(halves.high)) + static_cast<double>(to_float(halves.low));
    CHECK(std::fabs(back - static_cast<double>(y)) <= 0x1p-22 * std::fabs(static_cast<double>(y)) + 0x1p-25);
  }
  float sum = 0.0F, rest = 0.0F;
  double want = 0.0;
  for (int k = 0; k < 1000; ++k) {
    const float x = uniform(generator);
    add_exactly(sum, rest, x);
    want += static_cast<double>(x);
  }
  CHECK(std::fabs(static_cast<double>(sum) + static_cast<double>(rest) - want) <= 1e-3);
}

template <class T>
void check_shapes() {
  for (const std::int64_t d : {1, 2, 15, 16, 17, 63, 64, 65})
    for (const std::int64_t n : {1, 2, 3, 17, 40}) {
      if ((n == 40 && d > 17 && d != 65) || (rgfast::test::kFew && n * d % 7 != 0)) continue;
      Case<T> given(2, n, d, d % 3 == 0 ? 7 : 70);
      const auto sums = given.run();
      CHECK(given.worst(sums) <= bound(n, d));
      for (std::int64_t p = 0; p < 2; ++p)
        for (std::int64_t i = 0; i < d + 2; ++i)
          for (std::int64_t j = 0; j < i; ++j) {
            const auto here = [&](std::int64_t r, std::int64_t c) {
              return sums[0][static_cast<std::size_t>((p * (d + 2) + r) * (d + 2) + c)];
            };
            CHECK(here(i, j) == here(j, i));
          }
    }
}

TEST(moments_of_odd_shapes_in_fp64) { check_shapes<double>(); }
TEST(moments_of_odd_shapes_in_fp32) { check_shapes<float>(); }

TEST(moments_of_half_rows_are_widened_exactly) {
  Case<Half> half(1, 50, 33, 9);
  CHECK(half.worst(half.run()) <= bound(50, 33));
  Case<Bfloat16> brain(1, 50, 33, 9);
  CHECK(brain.worst(brain.run()) <= bound(50, 33));
}

TEST(moments_without_their_last_columns_and_not_added) {
  Case<float> given(2, 33, 66, 64);
  given.extras = 0;
  given.add = 0;
  CHECK(given.worst(given.run()) <= bound(33, 66));
}

TEST(moments_keep_digits_at_offsets_and_scales) {
  for (const double scale : {1e-150, 1e-18, 1.0, 1e18, 1e70}) {
    Case<double> given(1, 20, 18, 5, 1e4, scale);
    given.unit[0] = given.unit[1] = std::ldexp(1.0, -std::ilogb(scale));
    CHECK(given.worst(given.run()) <= bound(20, 18));
  }
}

TEST(moments_of_any_strides_are_the_same_bits) {
  Case<float> given(2, 37, 20, 33);
  Case<float> turned(2, 37, 20, 33, 0.75, 1.0, true);
  for (int l = 0; l < 2; ++l)
    for (std::int64_t p = 0; p < 2; ++p)
      for (std::int64_t r = 0; r < 37; ++r)
        for (std::int64_t c = 0; c < given.width[l]; ++c)
          turned.x[l][static_cast<std::size_t>(turned.at(l, p, r, c))] =
              given.x[l][static_cast<std::size_t>(given.at(l, p, r, c))];
  CHECK(given.run() == turned.run());
}

TEST(moments_read_nothing_of_rows_that_are_not_kept) {
  for (const bool split : {false, true}) {
    Case<float> given(3, 40, 19, 66);
    given.split = split;
    for (std::size_t k = 0; k < given.keep.size(); ++k) given.keep[k] = k / 40 != 1 && k % 3 != 0;
    for (int l = 0; l < 2; ++l)
      for (std::size_t k = 0; k < given.x[l].size(); ++k)
        if (given.keep[k / static_cast<std::size_t>(given.width[l])] == 0) given.x[l][k] = NAN;
    const auto sums = given.run();
    CHECK(given.worst(sums) <= (split ? 0x1p-18 : bound(40, 19)));
    for (std::size_t k = 0; k < sums[0].size() / 3; ++k) CHECK(sums[0][sums[0].size() / 3 + k] == 1.0);
  }
}

TEST(moments_bits_depend_on_the_rows_of_a_position_alone) {
  const std::int64_t rows = rgfast::test::kFew ? 1040 : 2100;
  for (const bool split : {false, true}) {
    Case<float> given(3, rows, 8, 5);
    given.split = split;
    const auto together = given.run();
    given.spread = true;
    CHECK(given.run(5) == together);  // 1,024 rows a block of the grid, in another order
    given.spread = false;
    Case<float> alone(1, rows, 8, 5);
    alone.split = split;
    for (int l = 0; l < 2; ++l) {
      std::copy_n(given.x[l].begin() + rows * given.width[l], alone.x[l].size(), alone.x[l].begin());
      std::copy_n(given.shift[l].begin() + given.width[l], alone.shift[l].size(), alone.shift[l].begin());
    }
    const auto one = alone.run();
    for (std::size_t pair = 0; pair < 2; ++pair)
      CHECK(std::equal(one[pair].begin(), one[pair].end(),
                       together[pair].begin() + static_cast<std::ptrdiff_t>(one[pair].size())));
  }
}

template <class T>
void check_split(double offset, double scale) {
  Case<T> given(2, 150, 34, 70, offset, scale);
  given.split = true;
  given.unit[0] = given.unit[1] = std::ldexp(1.0, -std::ilogb(scale));
  const double worst = given.worst(given.run());
  CHECK(worst <= 0x1p-18);
}

TEST(moments_by_split_products_err_as_fp32_does) {
  check_split<double>(0.75, 1.0);
  check_split<float>(0.75, 1.0);
  check_split<Half>(0.75, 1.0);
  check_split<Bfloat16>(0.75, 1.0);
  check_split<double>(0.75, 1e-150);
  check_split<float>(0.75, 1e18);
  check_split<float>(0.75, 1e-18);
  check_split<double>(1e4, 1.0);
}

TEST(moments_of_what_is_not_finite_are_not_finite) {
  for (const bool split : {false, true}) {
    Case<float> given(2, 20, 5, 3);
    given.split = split;
    given.x[0][7] = INFINITY;  // position 0, row 1, column 2
    const auto sums = given.run();
    CHECK(!std::isfinite(sums[0][2 * 7 + 2]) && !std::isfinite(sums[0][5 * 7 + 6]) &&
          !std::isfinite(sums[1][2 * 5]));
    for (std::size_t k = 49; k < 98; ++k) CHECK(std::isfinite(sums[0][k]));
  }
}

}  // namespace
