// Two layers that kernels of CKA center, and their rows less the mean in long double.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <vector>

#include "cuda/cka.cuh"

#define RGFAST_DECLARE(name)                                                                                \
  extern "C" void rgfast_cka_centers_##name(const std::int64_t*, std::int64_t, std::int64_t, std::int64_t); \
  extern "C" void rgfast_cka_norms_##name(const std::int64_t*, std::int64_t, std::int64_t);                 \
  extern "C" void rgfast_cka_group_sums_##name(const std::int64_t*, std::int64_t, std::int64_t,             \
                                               std::int64_t);                                               \
  extern "C" void rgfast_cka_group_products_##name(const std::int64_t*, std::int64_t, std::int64_t,         \
                                                   std::int64_t)
RGFAST_DECLARE(float64);
RGFAST_DECLARE(float32);
RGFAST_DECLARE(bfloat16);
RGFAST_DECLARE(float16);
#undef RGFAST_DECLARE

namespace rgfast::test {

template <class T>
struct Centering;
#define RGFAST_CENTERING(T, name)                                            \
  template <>                                                                \
  struct Centering<T> {                                                      \
    static constexpr auto centers = rgfast_cka_centers_##name;               \
    static constexpr auto norms = rgfast_cka_norms_##name;                   \
    static constexpr auto group_sums = rgfast_cka_group_sums_##name;         \
    static constexpr auto group_products = rgfast_cka_group_products_##name; \
  }
RGFAST_CENTERING(double, float64);
RGFAST_CENTERING(float, float32);
RGFAST_CENTERING(cuda::Bfloat16, bfloat16);
RGFAST_CENTERING(cuda::Half, float16);
#undef RGFAST_CENTERING

inline void narrow(double x, double& to) { to = x; }
inline void narrow(double x, float& to) { to = static_cast<float>(x); }
inline void narrow(double x, cuda::Half& to) { to = cuda::to_half(static_cast<float>(x)); }
inline void narrow(double x, cuda::Bfloat16& to) { to = cuda::to_bfloat16(static_cast<float>(x)); }

inline std::int64_t word(const void* p) { return reinterpret_cast<std::int64_t>(p); }
inline std::int64_t word(double x) {
  std::int64_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline dim3 grid_of(std::int64_t blocks, std::int64_t beside) {
  return {static_cast<unsigned>(blocks), static_cast<unsigned>(beside), 1};
}

// Two layers with just the memory that they need.
template <class T>
struct Layers {
  std::int64_t positions, rows, width[2], row_stride[2], feature_stride[2] = {1, 1};
  std::vector<T> x[2];
  std::int64_t groups;
  std::vector<double> means[2], norms[2], of_groups[2];

  Layers(std::int64_t p, std::int64_t n, std::int64_t d, std::int64_t e, double offset = 0.75,
         std::int64_t number = 1)
      : positions(p), rows(n), width{d, e}, row_stride{d, e}, groups(number) {
    std::mt19937 generator(static_cast<unsigned>(n + d));
    std::normal_distribution<double> normal;
    for (int l = 0; l < 2; ++l) {
      x[l].resize(static_cast<std::size_t>(p * n * width[l]));
      for (T& v : x[l]) narrow(offset + normal(generator), v);
      means[l].assign(static_cast<std::size_t>(2 * p * width[l]), NAN);
      norms[l].assign(static_cast<std::size_t>(p * n), NAN);
      if (groups > 1) of_groups[l].assign(static_cast<std::size_t>(groups * p * (width[l] + n)), NAN);
    }
  }

  const T& at(int l, std::int64_t p, std::int64_t r, std::int64_t c) const {
    return x[l][static_cast<std::size_t>(p * rows * width[l] + r * row_stride[l] + c * feature_stride[l])];
  }

  // The first words of a table.
  std::vector<std::int64_t> table() const {
    std::vector<std::int64_t> words;
    for (int l = 0; l < 2; ++l)
      for (const std::int64_t w :
           {word(x[l].data()), rows * width[l], row_stride[l], feature_stride[l], width[l],
            word(means[l].data()), word(1.0), word(norms[l].data()), word(of_groups[l].data())})
        words.push_back(w);
    return words;
  }

  void center(const std::vector<std::int64_t>& words, std::uint64_t seed) const {
    const std::int64_t chunks = (std::max(width[0], width[1]) + 31) / 32;
    const dim3 block{cuda::cka::kThreads, 1, 1};
    shim::launch({.grid = grid_of(positions * chunks, 2),
                  .block = block,
                  .shared = 8 * cuda::cka::kThreads,
                  .seed = seed},
                 Centering<T>::centers, words.data(), positions, rows, chunks);
    const std::int64_t blocks = (positions * rows + cuda::cka::kWarps - 1) / cuda::cka::kWarps;
    shim::launch({.grid = grid_of(blocks, 2), .block = block, .seed = seed}, Centering<T>::norms,
                 words.data(), positions, rows);
    if (groups == 1) return;
    shim::launch({.grid = grid_of(positions * chunks * groups, 2),
                  .block = block,
                  .shared = 8 * cuda::cka::kThreads,
                  .seed = seed},
                 Centering<T>::group_sums, words.data(), rows, chunks, groups);
    shim::launch({.grid = grid_of(blocks, 2), .block = block, .seed = seed}, Centering<T>::group_products,
                 words.data(), positions, rows, groups);
  }

  // Rows less their mean [rows left, width], without samples g, g + groups, ... unless g is -1. Also what
  // `sums` tells of how far they were moved.
  std::vector<long double> centered(int l, std::int64_t p, std::int64_t g = -1,
                                    long double* apart = nullptr) const {
    std::vector<std::int64_t> left;
    for (std::int64_t r = 0; r < rows; ++r)
      if (g < 0 || r % groups != g) left.push_back(r);
    const auto n = static_cast<long double>(left.size());
    std::vector<long double> z(left.size() * static_cast<std::size_t>(width[l]));
    for (std::int64_t c = 0; c < width[l]; ++c) {
      // An offset would take digits of long double, too.
      const long double first = cuda::moments::widened(at(l, p, 0, c));
      long double mean = 0.0L, all = 0.0L;
      for (const std::int64_t r : left) mean += cuda::moments::widened(at(l, p, r, c)) - first;
      for (std::int64_t r = 0; r < rows; ++r) all += cuda::moments::widened(at(l, p, r, c)) - first;
      mean /= n;
      all /= static_cast<long double>(rows);
      const long double moved = g < 0 ? first + all : mean - all;
      if (apart != nullptr) *apart += n * moved * moved;
      for (std::size_t k = 0; k < left.size(); ++k)
        z[k * static_cast<std::size_t>(width[l]) + static_cast<std::size_t>(c)] =
            (cuda::moments::widened(at(l, p, left[k], c)) - first) - mean;
    }
    return z;
  }
};

}  // namespace rgfast::test
