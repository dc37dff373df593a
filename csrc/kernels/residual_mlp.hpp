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
  const float* norm_weight;  // [normed_width] or null
  const float* norm_bias;    // [normed_width] or null
  Norm norm;
  Activation activation;
  float scale;
  float eps;
  // 0, or D: the block then mixes positions. x is [rows / D, width, D] without gaps, the MLP runs across its
  // positions for every feature, and norm_weight and norm_bias have D elements like the norm.
  std::int64_t mixed = 0;
  // [rows, hidden] or null: the first product's sums without b1. The forward pass leaves them there and the
  // backward pass reads them, which forms them again where there are none, to the same bits.
  float* sums = nullptr;
};

// The features that the norm runs over.
inline std::int64_t normed_width(const Block& block) { return block.mixed > 0 ? block.mixed : block.width; }

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
  float* norm_weight;  // [normed_width]
  float* norm_bias;    // [normed_width]
};

// dy: [rows, width], contiguous. The order of every sum is a function of the shape alone.
void backward(const Block& block, const float* dy, const Gradients& gradients, int threads);

// Blocks of one width one after the other. A block's x and rows are not looked at but for the first one's.
struct Stack {
  const Block* blocks;
  std::int64_t depth;
  std::int64_t rows_in_all;  // of which a call may get a part; it decides the route, and with it the bits
};

// Floats that `pack` writes for `forward` to read.
std::int64_t stack_floats(const Stack& stack);
void stack_pack(const Stack& stack, float* packed, int threads);

// Block l writes [rows, width] at outputs + l * step. With a step of 0 only the last output is there at the
// end. Rows pass all blocks a tile at a time, so that a tile stays in cache.
void stack_forward(const Stack& stack, const float* packed, float* outputs, std::int64_t step, int threads);

// values and, unless null, slopes of the activation at `count` inputs.
void activate(Activation activation, const float* input, float* values, float* slopes, std::int64_t count);

}  // namespace rgfast::residual_mlp
