// Gram tiles of centered rows, run by fibres, against sums in long double.
#include "cuda/cka_samples.cuh"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

#include "cuda/tests/cka_layers.hpp"
#include "cuda/tests/effort.hpp"
#include "tests/check.hpp"

#define RGFAST_DECLARE(name)                                                                                \
  extern "C" void rgfast_cka_grams_##name(const std::int64_t*, std::int64_t, std::int64_t, std::int64_t,    \
                                          std::int64_t, std::int64_t, std::int64_t, std::int64_t, double*); \
  extern "C" void rgfast_cka_near_##name(const std::int64_t*, std::int64_t, std::int64_t, std::int64_t,     \
                                         std::int64_t, std::int64_t, std::int64_t, double*)
RGFAST_DECLARE(float64);
RGFAST_DECLARE(float32);
RGFAST_DECLARE(bfloat16);
RGFAST_DECLARE(float16);
extern "C" void rgfast_cka_inner(const double*, std::int64_t, std::int64_t, std::int64_t, std::int64_t,
                                 std::int64_t, std::int64_t, double*);

namespace {

using namespace rgfast::cuda;
using namespace rgfast::cuda::cka;
using rgfast::cuda::moments::Exact;
using rgfast::cuda::moments::strips;
using rgfast::cuda::moments::tile_at;
using rgfast::shim::launch;
using rgfast::test::grid_of;
using rgfast::test::kFew;

template <class T>
struct Kernels;
#define RGFAST_KERNELS(T, name)                            \
  template <>                                              \
  struct Kernels<T> {                                      \
    static constexpr auto grams = rgfast_cka_grams_##name; \
    static constexpr auto near = rgfast_cka_near_##name;   \
  }
RGFAST_KERNELS(double, float64);
RGFAST_KERNELS(float, float32);
RGFAST_KERNELS(Bfloat16, bfloat16);
RGFAST_KERNELS(Half, float16);

template <class T>
struct Case : rgfast::test::Layers<T> {
  using rgfast::test::Layers<T>::Layers;

  Order order() const { return {this->rows, this->groups}; }
  std::int64_t tiles() const {
    const std::int64_t side = order().strips * this->groups;
    return side * (side + 1) / 2;
  }

  // [positions from `start` on, 2, apart, kTile] of `count` tiles from `first` on.
  std::vector<double> grams(std::int64_t start, std::int64_t first, std::int64_t count, std::int64_t apart,
                            std::uint64_t seed = 0) const {
    const auto words = this->table();
    this->center(words, seed);
    const std::int64_t here = this->positions - start;
    std::vector<double> out(static_cast<std::size_t>(((here * 2 - 1) * apart + count) * kTile), NAN);
    launch({.grid = grid_of(here * count, 2), .block = {kThreads, 1, 1}, .shared = kGramShared, .seed = seed},
           Kernels<T>::grams, words.data(), this->positions, this->rows, this->groups, start, first, count,
           apart, out.data());
    return out;
  }

  // [tiles, positions, 2, 2]
  std::vector<double> near(std::int64_t run, std::uint64_t seed = 0) const {
    const auto words = this->table();
    this->center(words, seed);
    std::vector<double> out(static_cast<std::size_t>(tiles() * this->positions * 4), NAN);
    launch({.grid = grid_of(this->positions * tiles(), (2 + run - 1) / run),
            .block = {kThreads, 1, 1},
            .shared = kNearShared,
            .seed = seed},
           Kernels<T>::near, words.data(), this->positions, std::int64_t{2}, this->rows, this->groups,
           tiles(), run, out.data());
    return out;
  }

  // Entries [kSide, kSide] of a layer's tile, and of each the size that its error is measured by.
  void truth(int l, std::int64_t p, std::int64_t tile, std::vector<long double>& entries,
             std::vector<long double>& sizes) const {
    const auto z = this->centered(l, p);
    const std::int64_t d = this->width[l];
    const Tile at = tile_at(tile, 0, true);
    entries.assign(kTile, 0.0L);
    sizes.assign(kTile, 0.0L);
    for (std::int64_t r = 0; r < kSide; ++r)
      for (std::int64_t c = 0; c < kSide; ++c) {
        if ((at.row == at.column && r >= c) || r >= order().size(at.row) || c >= order().size(at.column))
          continue;
        const std::int64_t i = order().first(at.row) + r * this->groups,
                           j = order().first(at.column) + c * this->groups;
        long double dot = 0.0L, one = 0.0L, other = 0.0L;
        for (std::int64_t f = 0; f < d; ++f) {
          const long double a = z[static_cast<std::size_t>(i * d + f)],
                            b = z[static_cast<std::size_t>(j * d + f)];
          dot += a * b;
          one += a * a;
          other += b * b;
        }
        entries[static_cast<std::size_t>(r * kSide + c)] = dot;
        sizes[static_cast<std::size_t>(r * kSide + c)] = std::sqrt(one * other);
      }
  }

  // Whether all sums of neighbors agree with the truth to 1e-13 of the kernels' sizes.
  bool near_is_right(const std::vector<double>& out) const {
    bool right = true;
    std::vector<long double> entries[2], sizes;
    for (std::int64_t tile = 0; tile < tiles(); ++tile)
      for (std::int64_t p = 0; p < this->positions; ++p) {
        for (int l = 0; l < 2; ++l) truth(l, p, tile, entries[l], sizes);
        long double own[2] = {}, both = 0.0L;
        for (std::size_t e = 0; e < kTile; ++e) {
          for (int l = 0; l < 2; ++l) own[l] += entries[l][e] * entries[l][e];
          both += entries[0][e] * entries[1][e];
        }
        const double* got = out.data() + (tile * this->positions + p) * 4;
        const long double most = 1e-13L * std::sqrt(own[0] * own[1]) + 1e-300L;
        right = right && std::fabs(got[0] - own[0]) <= 1e-13L * own[0] && std::fabs(got[1] - both) <= most &&
                std::fabs(got[2] - own[1]) <= 1e-13L * own[1] && got[3] == 0.0;
      }
    return right;
  }
};

// Row and column of the number at `index` of a tile.
std::int64_t place_of(std::int64_t index, std::int64_t& column) {
  using How = Exact<double>;
  const int k = static_cast<int>(index / kThreads), thread = static_cast<int>(index % kThreads);
  const int quarter = thread / 32, lane = thread % 32;
  column = quarter % 2 * 32 + How::column(k / 4 % 4, k % 4, lane);
  return quarter / 2 * 32 + How::row(k / 16, k % 4, lane);
}

template <class T>
void check_tiles(const Case<T>& given) {
  const std::int64_t tiles = given.tiles();
  const auto out = given.grams(0, 0, tiles, tiles);
  std::vector<long double> entries, sizes;
  bool right = true;
  for (std::int64_t p = 0; p < given.positions; ++p)
    for (int l = 0; l < 2; ++l)
      for (std::int64_t tile = 0; tile < tiles; ++tile) {
        given.truth(l, p, tile, entries, sizes);
        for (std::int64_t index = 0; index < kTile; ++index) {
          std::int64_t column = 0;
          const std::int64_t row = place_of(index, column);
          const auto at = static_cast<std::size_t>(row * kSide + column);
          const double got = out[static_cast<std::size_t>(((p * 2 + l) * tiles + tile) * kTile + index)];
          right = right && std::fabs(got - entries[at]) <= 1e-14L * sizes[at];
        }
      }
  CHECK(right);
  CHECK(given.near_is_right(given.near(2)));
}

template <class T>
void check_shapes() {
  for (const std::int64_t d : {1, 5, 16, 35})
    for (const std::int64_t n : {2, 17, 64, 65, 130}) {
      if (kFew && (n != 65 || d != 5)) continue;
      if (!rgfast::test::everything() && d == 35 && n > 65) continue;
      check_tiles(Case<T>(n < 60 ? 2 : 1, n, d, d == 16 ? 20 : 3));
    }
}

TEST(cka_grams_of_odd_shapes_in_fp64) { check_shapes<double>(); }
TEST(cka_grams_of_odd_shapes_in_fp32) { check_shapes<float>(); }

TEST(cka_grams_of_half_rows) {
  check_tiles(Case<Half>(1, kFew ? 17 : 70, 33, 9));
  check_tiles(Case<Bfloat16>(1, kFew ? 17 : 70, 33, 9));
}

TEST(cka_grams_of_groups_one_after_the_other) {
  check_tiles(Case<double>(1, 65, 5, 3, 0.75, 2));
  if (!kFew) check_tiles(Case<float>(1, 9, 5, 3, 0.75, 4));
}

TEST(cka_order_has_every_sample_once) {
  for (const std::int64_t rows : {4, 63, 64, 65, 130, 200})
    for (const std::int64_t groups : {1, 2, 3, 4}) {
      const Order order(rows, groups);
      std::vector<int> seen(static_cast<std::size_t>(rows));
      for (std::int64_t strip = 0; strip < order.strips * groups; ++strip)
        for (int k = 0; k < order.size(strip); ++k) {
          const std::int64_t sample = order.first(strip) + k * groups;
          CHECK(sample < rows && sample % groups == strip / order.strips);
          ++seen[static_cast<std::size_t>(sample)];
        }
      CHECK(std::all_of(seen.begin(), seen.end(), [](int count) { return count == 1; }));
    }
}

TEST(cka_grams_keep_digits_at_an_offset) { check_tiles(Case<double>(1, 40, 18, 5, 1e6)); }

TEST(cka_grams_of_equal_rows_are_zero) {
  Case<double> given(1, 9, 4, 3);
  given.x[0].assign(given.x[0].size(), 1.0 / 3.0);
  const auto out = given.grams(0, 0, 1, 1);
  CHECK(std::all_of(out.begin(), out.begin() + kTile, [](double v) { return v == 0.0; }));
}

TEST(cka_grams_of_some_tiles_are_those_of_all) {
  const Case<float> given(2, 130, 6, 5);
  const std::int64_t tiles = given.tiles(), some = 2, apart = 3;
  const auto all = given.grams(0, 0, tiles, tiles), few = given.grams(1, 3, some, apart, 5);
  bool same = true;
  for (std::int64_t l = 0; l < 2; ++l)
    for (std::int64_t at = 0; at < some * kTile; ++at)
      same = same && few[static_cast<std::size_t>(l * apart * kTile + at)] ==
                         all[static_cast<std::size_t>(((2 + l) * tiles + 3) * kTile + at)];
  CHECK(same);
}

TEST(cka_grams_of_rows_of_any_strides_have_the_same_bits) {
  const Case<float> given(1, 70, 21, 8);
  Case<float> turned = given;
  for (int l = 0; l < 2; ++l) {
    turned.row_stride[l] = 1;
    turned.feature_stride[l] = given.rows;
    for (std::int64_t r = 0; r < given.rows; ++r)
      for (std::int64_t c = 0; c < given.width[l]; ++c)
        turned.x[l][static_cast<std::size_t>(c * given.rows + r)] = given.at(l, 0, r, c);
  }
  CHECK(turned.grams(0, 0, 3, 3) == given.grams(0, 0, 3, 3));
}

TEST(cka_neighbors_have_the_same_bits_in_runs_of_any_length) {
  const Case<float> given(2, 70, 9, 12);
  const auto together = given.near(2);
  CHECK(given.near(1, 3) == together);
  Case<float> alone(1, 70, 9, 12);
  for (int l = 0; l < 2; ++l)
    std::copy_n(given.x[l].begin() + given.rows * given.width[l], alone.x[l].size(), alone.x[l].begin());
  const auto one = alone.near(2);
  for (std::int64_t tile = 0; tile < given.tiles(); ++tile)
    CHECK(std::equal(one.begin() + tile * 4, one.begin() + tile * 4 + 4, together.begin() + tile * 8 + 4));
}

// Two of three positions, with two of three tiles, added to what is there.
void check_products(std::int64_t layers) {
  constexpr std::int64_t count = 2, apart = 3, positions = 3, start = 1, spans = count * kTile / kSpan;
  std::mt19937 generator(static_cast<unsigned>(layers));
  std::normal_distribution<double> normal;
  std::vector<double> from(static_cast<std::size_t>(((2 * layers - 1) * apart + count) * kTile));
  for (double& v : from) v = normal(generator);
  std::vector<double> to(static_cast<std::size_t>(spans * positions * layers * layers), 0.5);
  const std::int64_t groups = (layers + kGroup - 1) / kGroup;
  launch({.grid = grid_of(2 * spans, groups * (groups + 1) / 2),
          .block = {kThreads, 1, 1},
          .shared = kInnerShared},
         rgfast_cka_inner, from.data(), layers, count, apart, positions, start, std::int64_t{1}, to.data());
  bool right = true;
  for (std::int64_t span = 0; span < spans; ++span)
    for (std::int64_t p = 0; p < positions; ++p)
      for (std::int64_t i = 0; i < layers; ++i)
        for (std::int64_t j = 0; j < layers; ++j) {
          const double got = to[static_cast<std::size_t>(((span * positions + p) * layers + i) * layers + j)];
          long double want = 0.5L;
          if (p >= start && i <= j)
            for (std::int64_t e = 0; e < kSpan; ++e) {
              const auto at = [&](std::int64_t l) {
                return from[static_cast<std::size_t>(((p - start) * layers + l) * apart * kTile +
                                                     span * kSpan + e)];
              };
              want += static_cast<long double>(at(i)) * at(j);
            }
          right = right && std::fabs(got - want) <= 1e-11L;
        }
  CHECK(right);
}

TEST(cka_products_of_layers_over_entries) {
  for (const std::int64_t layers : {1, 9, 25, 34})
    if (!kFew || layers == 9) check_products(layers);
}

}  // namespace
