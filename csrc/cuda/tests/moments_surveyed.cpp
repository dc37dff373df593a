// Means over positions and numbers that are not finite by the kernels, run by fibres, against loops.
#include "cuda/moments_rows.cuh"

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "tests/check.hpp"

#define RGFAST_DECLARE(name) \
  extern "C" void rgfast_moments_survey_##name(const std::int64_t*, std::int64_t, std::int64_t, std::int64_t)
RGFAST_DECLARE(float64);
RGFAST_DECLARE(float32);
RGFAST_DECLARE(bfloat16);
RGFAST_DECLARE(float16);

namespace {

using namespace rgfast::cuda;
using namespace rgfast::cuda::moments;
using rgfast::shim::launch;

template <class T>
struct Kernel;
#define RGFAST_KERNEL(T, name)                                \
  template <>                                                 \
  struct Kernel<T> {                                          \
    static constexpr auto run = rgfast_moments_survey_##name; \
  }
RGFAST_KERNEL(double, float64);
RGFAST_KERNEL(float, float32);
RGFAST_KERNEL(Bfloat16, bfloat16);
RGFAST_KERNEL(Half, float16);

void narrow(double x, double& to) { to = x; }
void narrow(double x, float& to) { to = static_cast<float>(x); }
void narrow(double x, Half& to) { to = to_half(static_cast<float>(x)); }
void narrow(double x, Bfloat16& to) { to = to_bfloat16(static_cast<float>(x)); }

std::int64_t word(const void* p) { return reinterpret_cast<std::int64_t>(p); }

// Two layers in just the memory that they need; of the second, features are not neighbors.
template <class T>
struct Batch {
  std::int64_t sequences, positions, width[2];
  std::vector<T> x[2];
  std::vector<unsigned char> mask;  // of the second layer
  std::vector<double> means[2];
  std::vector<std::int32_t> bad[2];

  Batch(std::int64_t b, std::int64_t t, std::int64_t d, std::int64_t e)
      : sequences(b), positions(t), width{d, e} {
    std::mt19937 generator(static_cast<unsigned>(t + d));
    std::normal_distribution<double> normal;
    for (int l = 0; l < 2; ++l) {
      x[l].resize(static_cast<std::size_t>(b * t * width[l]));
      for (T& value : x[l]) narrow(3.0 + normal(generator), value);
    }
    mask.resize(static_cast<std::size_t>(b * t));
    for (unsigned char& each : mask) each = generator() % 3 != 0;
    for (std::int64_t k = 0; k < t; ++k) mask[static_cast<std::size_t>(k)] = 0;  // a sequence of none
  }

  T& entry(int l, std::int64_t b, std::int64_t t, std::int64_t c) {
    const std::int64_t at = l == 0 ? (b * positions + t) * width[0] + c : (b * width[1] + c) * positions + t;
    return x[l][static_cast<std::size_t>(at)];
  }
  bool counts(int l, std::int64_t b, std::int64_t t) const {
    return l == 0 || mask[static_cast<std::size_t>(b * positions + t)] != 0;
  }

  void run(std::uint64_t seed, bool averaged = true) {
    const std::int64_t strips = (std::max(width[0], width[1]) + 127) / 128;
    std::vector<std::int64_t> table;
    for (int l = 0; l < 2; ++l) {
      means[l].assign(static_cast<std::size_t>(sequences * width[l]), NAN);
      bad[l].assign(static_cast<std::size_t>(sequences * strips * positions), 0);
      for (const std::int64_t w :
           {word(x[l].data()), positions * width[l], l == 0 ? width[0] : 1, l == 0 ? 1 : positions, width[l],
            l == 0 ? std::int64_t{0} : word(mask.data()), positions, std::int64_t{1},
            averaged ? word(means[l].data()) : 0, word(bad[l].data())})
        table.push_back(w);
    }
    const auto blocks = static_cast<unsigned>((sequences * strips + 3) / 4);
    launch({.grid = {blocks, 2, 1}, .block = {kThreads, 1, 1}, .seed = seed}, Kernel<T>::run, table.data(),
           sequences, positions, strips);
  }

  void check() {
    for (int l = 0; l < 2; ++l) {
      std::vector<std::int64_t> found(static_cast<std::size_t>(positions)), want(found);
      for (std::size_t k = 0; k < bad[l].size(); ++k)
        found[k % static_cast<std::size_t>(positions)] += bad[l][k];
      for (std::int64_t b = 0; b < sequences; ++b)
        for (std::int64_t c = 0; c < width[l]; ++c) {
          double sum = 0.0;
          std::int64_t number = 0;
          for (std::int64_t t = 0; t < positions; ++t) {
            if (!counts(l, b, t)) continue;
            const double value = widened(entry(l, b, t, c));
            sum += value;
            ++number;
            want[static_cast<std::size_t>(t)] += std::isfinite(value) ? 0 : 1;
          }
          const double mean = sum / static_cast<double>(number > 1 ? number : 1),
                       mine = means[l][static_cast<std::size_t>(b * width[l] + c)];
          CHECK(mine == mean || (std::isnan(mine) && std::isnan(mean)));
        }
      CHECK(found == want);
    }
  }
};

template <class T>
void check_shapes() {
  for (const std::int64_t d : {1, 2, 3, 16, 65, 127, 128, 130, 257})
    for (const std::int64_t t : {1, 3, 4, 9}) {
      Batch<T> given(3, t, d, d % 2 == 0 ? 7 : 140);
      given.run(static_cast<std::uint64_t>(d));
      given.check();
    }
}

TEST(moments_surveyed_of_odd_shapes_in_fp64) { check_shapes<double>(); }
TEST(moments_surveyed_of_odd_shapes_in_fp32) { check_shapes<float>(); }
TEST(moments_surveyed_of_odd_shapes_in_bf16) { check_shapes<Bfloat16>(); }
TEST(moments_surveyed_of_odd_shapes_in_fp16) { check_shapes<Half>(); }

TEST(moments_surveyed_count_what_is_not_finite_among_rows_that_count) {
  Batch<float> given(4, 6, 150, 131);
  const float infinite = std::numeric_limits<float>::infinity();
  for (int l = 0; l < 2; ++l) {
    given.entry(l, 1, 2, 0) = NAN;
    given.entry(l, 1, 2, 129) = infinite;
    given.entry(l, 1, 5, 129) = -infinite;
    given.entry(l, 3, 0, 130) = infinite;
    for (std::int64_t t = 0; t < 6; ++t)
      for (std::int64_t b = 0; b < 4; ++b)
        if (!given.counts(l, b, t)) given.entry(l, b, t, 5) = NAN;
    given.entry(l, 2, 4, 7) = std::numeric_limits<float>::max();
  }
  given.run(1);
  given.check();
}

TEST(moments_surveyed_do_not_take_a_sum_that_overflows_for_infinite_numbers) {
  Batch<double> given(1, 4, 5, 3);
  for (std::int64_t t = 0; t < 4; ++t) given.entry(0, 0, t, 1) = std::numeric_limits<double>::max();
  given.run(0);
  given.check();
  CHECK(std::isinf(given.means[0][1]));
}

TEST(moments_surveyed_without_means_write_none) {
  Batch<Half> given(2, 3, 9, 4);
  given.run(0, false);
  for (const auto& means : given.means)
    for (const double each : means) CHECK(std::isnan(each));
}

}  // namespace
