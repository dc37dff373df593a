#include "kernels/residual_mlp.hpp"

#include <cmath>
#include <cstdint>
#include <vector>

#include "tests/check.hpp"
#include "tests/residual_mlp_case.hpp"

namespace {

using namespace rgfast::residual_mlp;

float largest_difference(const std::vector<float>& a, const std::vector<float>& b) {
  float most = 0.0f;
  for (std::size_t i = 0; i < a.size(); ++i) {
    if (!std::isfinite(a[i]) || !std::isfinite(b[i])) return INFINITY;
    most = std::max(most, std::fabs(a[i] - b[i]));
  }
  return most;
}

std::vector<float> forward_of(const Case& with, int threads) {
  std::vector<float> y(with.x.size(), NAN);
  forward(with.block, y.data(), threads);
  return y;
}

struct All {
  std::vector<float> x, w1, b1, w2, b2, weight, bias;

  All(const Case& of, const std::vector<float>& dy, int threads)
      : x(of.x.size(), NAN),
        w1(of.w1.size(), NAN),
        b1(of.b1.size(), NAN),
        w2(of.w2.size(), NAN),
        b2(of.b2.size(), NAN),
        weight(of.weight.size(), NAN),
        bias(of.bias.size(), NAN) {
    backward(of.block, dy.data(),
             {x.data(), w1.data(), b1.data(), w2.data(), b2.data(), weight.data(), bias.data()}, threads);
  }
};

}  // namespace

TEST(residual_mlp_rows_do_not_depend_on_their_tile) {
  for (const std::int64_t width : {1, 3, 15, 16, 17, 33, 255, 257, 300})
    for (const std::int64_t hidden : {1, 16, 31, 97, 270}) {
      const Case many(67, width, hidden, width % 2 == 1, Norm::layer, Activation::gelu);
      const std::vector<float> y = forward_of(many, 2);
      const Case fewer(53, width, hidden, width % 2 == 1, Norm::layer, Activation::gelu);
      std::vector<float> z = forward_of(fewer, 1);
      CHECK(largest_difference(z, std::vector<float>(y.begin(), y.begin() + 53 * width)) == 0.0f);
      const Case few(7, width, hidden, width % 2 == 1, Norm::layer, Activation::gelu);
      z = forward_of(few, 2);
      CHECK(largest_difference(z, std::vector<float>(y.begin(), y.begin() + 7 * width)) < 1e-4f);
    }
}

TEST(residual_mlp_gradients_do_not_depend_on_threads) {
  for (const std::int64_t rows : {0, 1, 13, 300})
    for (const std::int64_t width : {1, 17, 257})
      for (const Norm norm : {Norm::none, Norm::layer, Norm::rms}) {
        const Case with(rows, width, 2 * width + 3, true, norm, Activation::silu);
        const std::vector<float> dy = numbers(rows * width, 9);
        const All one(with, dy, 1);
        const All three(with, dy, 3);
        CHECK(largest_difference(one.x, three.x) == 0.0f);
        CHECK(largest_difference(one.w1, three.w1) == 0.0f);
        CHECK(largest_difference(one.b1, three.b1) == 0.0f);
        CHECK(largest_difference(one.w2, three.w2) == 0.0f);
        CHECK(largest_difference(one.b2, three.b2) == 0.0f);
        CHECK(largest_difference(one.weight, three.weight) == 0.0f);
        CHECK(largest_difference(one.bias, three.bias) == 0.0f);
      }
}

TEST(residual_mlp_kept_sums_give_the_same_gradients) {
  for (const std::int64_t rows : {1, 40, 300})
    for (const std::int64_t width : {3, 64, 300}) {
      Case with(rows, width, 2 * width + 1, true, Norm::layer, Activation::gelu);
      const std::vector<float> dy = numbers(rows * width, 9);
      const All again(with, dy, 2);
      std::vector<float> sums(static_cast<std::size_t>(rows * with.block.hidden), NAN);
      with.block.sums = sums.data();
      forward_of(with, 2);
      CHECK(largest_difference(sums, sums) == 0.0f);
      const All kept(with, dy, 2);

      CHECK(largest_difference(again.x, kept.x) == 0.0f);
      CHECK(largest_difference(again.w1, kept.w1) == 0.0f);
      CHECK(largest_difference(again.w2, kept.w2) == 0.0f);
    }
}

// A mixing block against the same MLP on rows that were flipped by hand; without a norm they are one thing.
TEST(residual_mlp_mixing_is_the_block_on_flipped_rows) {
  for (const std::int64_t features : {1, 5, 16, 33})
    for (const std::int64_t length : {1, 12, 17, 258}) {
      const std::int64_t sequences = 4;
      const std::int64_t rows = sequences * features;
      Case rowwise(rows, length, 2 * length + 1, true, Norm::none, Activation::relu);
      Case mixing(rows, length, 2 * length + 1, true, Norm::none, Activation::relu);
      const auto flipped = [&](const std::vector<float>& from, bool back) {
        std::vector<float> to(from.size());
        for (std::int64_t s = 0; s < sequences; ++s)
          for (std::int64_t t = 0; t < length; ++t)
            for (std::int64_t d = 0; d < features; ++d) {
              const auto by_feature = static_cast<std::size_t>((s * features + d) * length + t);
              const auto by_position = static_cast<std::size_t>((s * length + t) * features + d);
              if (back)
                to[by_feature] = from[by_position];
              else
                to[by_position] = from[by_feature];
            }
        return to;
      };
      mixing.x = flipped(rowwise.x, false);
      mixing.block.x = mixing.x.data();
      mixing.block.mixed = features;
      mixing.block.norm_weight = nullptr;
      mixing.block.norm_bias = nullptr;
      rowwise.block.norm_weight = nullptr;
      rowwise.block.norm_bias = nullptr;
      mixing.weight.assign(static_cast<std::size_t>(features), 0.0f);
      mixing.bias.assign(static_cast<std::size_t>(features), 0.0f);
      CHECK(largest_difference(flipped(forward_of(mixing, 2), true), forward_of(rowwise, 2)) < 1e-4f);
      const std::vector<float> dy = numbers(rows * length, 9);
      const All one(mixing, flipped(dy, false), 1);
      const All three(mixing, flipped(dy, false), 3);
      const All plain(rowwise, dy, 2);
      CHECK(largest_difference(one.w1, three.w1) == 0.0f);
      CHECK(largest_difference(one.weight, three.weight) == 0.0f);
      CHECK(largest_difference(flipped(one.x, true), plain.x) < 1e-4f);
      CHECK(largest_difference(one.w1, plain.w1) < 1e-3f);
      CHECK(largest_difference(one.w2, plain.w2) < 1e-3f);
      CHECK(largest_difference(one.b2, plain.b2) < 1e-3f);
    }
}

TEST(residual_mlp_stack_is_its_blocks_one_after_the_other) {
  for (const std::int64_t rows : {0, 1, 16, 17, 300})
    for (const std::int64_t width : {3, 64, 300}) {
      const Case first(rows, width, 2 * width + 1, true, Norm::layer, Activation::gelu);
      Case second(rows, width, width, false, Norm::layer, Activation::gelu);
      const std::size_t floats = first.x.size();
      std::vector<float> want(2 * floats, NAN);
      forward(first.block, want.data(), 2);
      second.block.x = want.data();
      forward(second.block, want.data() + floats, 2);
      const Block blocks[2] = {first.block, second.block};
      const Stack stack{blocks, 2, rows};
      std::vector<float> packed(static_cast<std::size_t>(stack_floats(stack)), NAN);
      stack_pack(stack, packed.data(), 2);
      std::vector<float> all(2 * floats, NAN);
      stack_forward(stack, packed.data(), all.data(), static_cast<std::int64_t>(floats), 2);
      CHECK(largest_difference(all, want) == 0.0f);
      std::vector<float> last(floats, NAN);
      stack_forward(stack, packed.data(), last.data(), 0, 3);
      CHECK(largest_difference(last, std::vector<float>(want.begin() + static_cast<std::ptrdiff_t>(floats),
                                                        want.end())) == 0.0f);
    }
}

// The derivative along the gradient of y . dy with respect to w1, by a central difference.
TEST(residual_mlp_gradient_is_the_slope) {
  Case with(40, 24, 50, true, Norm::layer, Activation::gelu);
  const std::vector<float> dy = numbers(40 * 24, 11);
  const All gradients(with, dy, 2);
  const std::vector<float> start = with.w1;
  const auto value = [&](float step) {
    for (std::size_t i = 0; i < start.size(); ++i) with.w1[i] = start[i] + step * gradients.w1[i];
    const std::vector<float> y = forward_of(with, 1);
    double total = 0.0;
    for (std::size_t i = 0; i < y.size(); ++i)
      total += static_cast<double>(y[i]) * static_cast<double>(dy[i]);
    return total;
  };
  double square = 0.0;
  for (const float g : gradients.w1) square += static_cast<double>(g) * static_cast<double>(g);
  const double slope = (value(1e-2f) - value(-1e-2f)) / 2e-2;
  CHECK(std::fabs(slope - square) < 2e-3 * square);
}

TEST(residual_mlp_activation_of_any_count) {
  for (const std::int64_t count : {0, 1, 3, 15, 16, 17, 33})
    for (int kind = 0; kind < 5; ++kind) {
      const std::vector<float> in = numbers(count, 13);
      std::vector<float> values(in.size(), NAN);
      std::vector<float> slopes(in.size(), NAN);
      activate(static_cast<Activation>(kind), in.data(), values.data(), slopes.data(), count);
      CHECK(largest_difference(values, in) < 1.0f);
      CHECK(largest_difference(slopes, in) < 2.0f);
    }
}
