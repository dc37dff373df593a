// Residual blocks to be tested, with their numbers.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "kernels/residual_mlp.hpp"

namespace rgfast::residual_mlp {

inline std::vector<float> numbers(std::int64_t count, std::uint64_t seed) {
  std::vector<float> found(static_cast<std::size_t>(count));
  for (float& value : found) {
    seed = seed * 6364136223846793005u + 1442695040888963407u;
    value = static_cast<float>(static_cast<double>(seed >> 40) / 16777216.0 - 0.5);
  }
  return found;
}

// Buffers of exactly the sizes that the header names, so that the sanitizer sees a step outside.
struct Case {
  std::vector<float> x, w1, b1, w2, b2, weight, bias, dy;
  Block block;

  Case(std::int64_t rows, std::int64_t width, std::int64_t hidden, bool vectors, Norm norm,
       Activation activation, float scale = 0.5f)
      : x(numbers(rows * width, 1)),
        w1(numbers(hidden * width, 2)),
        b1(numbers(hidden, 3)),
        w2(numbers(width * hidden, 4)),
        b2(numbers(width, 5)),
        weight(numbers(width, 6)),
        bias(numbers(width, 7)),
        dy(numbers(rows * width, 9)),
        block{rows,
              width,
              hidden,
              x.data(),
              width,
              w1.data(),
              vectors ? b1.data() : nullptr,
              w2.data(),
              vectors ? b2.data() : nullptr,
              vectors ? weight.data() : nullptr,
              vectors ? bias.data() : nullptr,
              norm,
              activation,
              scale,
              1e-5f} {}
};

}  // namespace rgfast::residual_mlp
