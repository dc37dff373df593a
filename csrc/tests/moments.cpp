#include "kernels/moments.hpp"

#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

#include "tests/check.hpp"

namespace {

using rgfast::DType;
using rgfast::View;
using rgfast::moments::Problem;

View rows_view(std::vector<float>& x, std::int64_t positions, std::int64_t rows, std::int64_t width) {
  View view;
  view.data = reinterpret_cast<std::byte*>(x.data());
  view.dtype = DType::f32;
  view.ndim = 3;
  view.sizes = {positions, rows, width};
  view.strides = {rows * width, width, 1};
  return view;
}

TEST(moments_of_odd_shapes_by_positions_and_by_tiles) {
  std::mt19937 generator(0);
  std::normal_distribution<float> normal(1.0F, 1.0F);
  for (const std::int64_t positions : {1, 5})
    for (const std::int64_t rows : {1, 130})
      for (const std::int64_t width : {1, 7, 24, 65, 99}) {
        const std::int64_t d = width + 2;
        // Just as much as there is, so that a sanitizer sees a step outside.
        std::vector<float> x(static_cast<std::size_t>(positions * rows * width));
        for (float& v : x) v = normal(generator);
        const std::vector<double> shift(static_cast<std::size_t>(positions * width), 0.75);
        std::vector<unsigned char> keep(static_cast<std::size_t>(positions * rows));
        for (std::size_t k = 0; k < keep.size(); ++k) keep[k] = k % 3 == 0 ? 1 : 0;
        std::vector<double> first;
        for (const int threads : {1, 2, 3}) {
          std::vector<double> own(static_cast<std::size_t>(positions * d * d), 1.0), cross(own);
          Problem problem{};
          for (int layer = 0; layer < 2; ++layer)
            problem.layers.push_back({rows_view(x, positions, rows, width), shift.data(), 0.5});
          problem.pairs = {{0, 0, own.data()}, {0, 1, cross.data()}};
          problem.keep = keep.data();
          problem.keep_strides[0] = rows;
          problem.keep_strides[1] = 1;
          problem.positions = positions;
          problem.rows = rows;
          problem.threads = threads;
          rgfast::moments::add(problem);
          CHECK(own == cross);  // the lower triangle is a copy of sums of the same terms in the same order
          if (first.empty()) first = own;
          CHECK(own == first);
          for (std::int64_t p = 0; p < positions; ++p) {
            std::vector<double> want(static_cast<std::size_t>(d * d), 1.0);
            for (std::int64_t k = 0; k < rows; ++k) {
              if (keep[static_cast<std::size_t>(p * rows + k)] == 0) continue;
              std::vector<double> z(static_cast<std::size_t>(d), 1.0);
              z[static_cast<std::size_t>(width)] = 0.0;
              for (std::int64_t j = 0; j < width; ++j) {
                const double v = (x[static_cast<std::size_t>((p * rows + k) * width + j)] - 0.75) * 0.5;
                z[static_cast<std::size_t>(j)] = v;
                z[static_cast<std::size_t>(width)] += v * v;
              }
              for (std::int64_t i = 0; i < d; ++i)
                for (std::int64_t j = 0; j < d; ++j)
                  want[static_cast<std::size_t>(i * d + j)] +=
                      z[static_cast<std::size_t>(i)] * z[static_cast<std::size_t>(j)];
            }
            bool good = true;
            for (std::int64_t i = 0; i < d * d; ++i) {
              const double found = own[static_cast<std::size_t>(p * d * d + i)];
              good = good && std::abs(found - want[static_cast<std::size_t>(i)]) <= 1e-9;
            }
            CHECK(good);
          }
        }
      }
}

}  // namespace
