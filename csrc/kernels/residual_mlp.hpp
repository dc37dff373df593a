// y = x + scale (act(norm(x) w1^T + b1) w2^T + b2) over rows, and its gradients. fp32, raw pointers.
#pragma once

#include <cstdint>

namespace rgfast::residual_mlp {

enum class Norm : int { none = 0, layer = 1, rms = 2 };
enum class Activation : int { gelu = 0, gelu_tanh = 1, relu = 2, silu = 3, tanh = 4 };

struct Block {
  std::int64_t rows, width, hidden;
  const float* x;  // [rows, width], features adjacent
  std::int64_t x_stride;
  const float* w1;           // [hidden, width]
  const float* b1;           // [hidden] or null
  const float* w2;           // [width, hidden]
  const float* b2;           // [width] or null
  const float* norm_weight;  // [width] or null
  const float* norm_bias;    // [width] or null
  Norm norm;
  Activation activation;
  float scale;
  float eps;
};

// y: [rows, width], contiguous, apart from every input. A row's bits depend on
// nothing but that row and whether there are more than a few.
void forward(const Block& block, float* y, int threads);

// Written in full; a null one is not wanted.
struct Gradients {
  float* x;            // [rows, width]
  float* w1;           // [hidden, width]
  float* b1;           // [hidden]
  float* w2;           // [width, hidden]
  float* b2;           // [width]
  float* norm_weight;  // [width]
  float* norm_bias;    // [width]
};

// dy: [rows, width], contiguous. The order of every sum is a function of the shape alone.
void backward(const Block& block, const float* dy, const Gradients& gradients, int threads);

// values and, unless null, slopes of the activation at `count` inputs.
void activate(Activation activation, const float* input, float* values, float* slopes, std::int64_t count);

}  // namespace rgfast::residual_mlp
