// What eigenvalues of a moment say of ranks, and how far they may be off: rgfast/ops/spectrum/measures.py and
// refine.py have the same in words and in torch.
#pragma once

#include <cmath>

#include "cuda/common/device.cuh"

namespace rgfast::cuda::ranks {

inline constexpr double kRoundoff = 0x1p-53, kTiny = 0x1p-1022, kTile = 256.0;

__host__ __device__ inline double at_least(double x, double low) { return x < low ? low : x; }
__host__ __device__ inline double at_most(double x, double high) { return x > high ? high : x; }

// Bound on the error of every eigenvalue of a moment of so many rows, summed over `terms` in tiles and then
// solved, of which `top` is the largest.
__host__ __device__ inline double gram_error(double terms, double accumulated, double top, double rows) {
  const double chain = at_most(terms, kTile + ceil(terms / kTile)) + 4.0;
  return kRoundoff * (chain * accumulated + at_least(rows / 2.0, 50.0) * top);
}

// That of a root of an eigenvalue, which is off by `epsilon`, with `least` its root and what shifting adds.
__host__ __device__ inline double root_error(double sigma, double epsilon, double least, double shifted) {
  return epsilon / at_least(sigma, at_least(least, kTiny)) + shifted;
}

// -p ln p.
__host__ __device__ inline double entropy_of(double p) { return p > 0.0 ? -p * log(p) : p; }

// (value / largest)^2.
__host__ __device__ inline double share_of(double value, double largest) {
  const double ratio = value / at_least(largest, kTiny);
  return ratio * ratio;
}

// Bound on the relative error of exp(entropy) of weights that sum to `total` and are off by `spread`
// together, of which `rank` are not zero (Fannes and Audenaert).
__host__ __device__ inline double entropy_error(double total, double spread, double rank) {
  const double t = at_most(spread / at_least(total, kTiny), 1.0), inner = at_most(t, 0.5);
  const double binary = -inner * log(at_least(inner, kTiny)) - (1.0 - inner) * log1p(-inner);
  const double most = log(at_least(rank, 1.0));
  const double change = t < 0.5 ? at_most(t * log(at_least(rank - 1.0, 1.0)) + binary, most) : most;
  return expm1(change) + 4.0 * (rank + 4.0) * kRoundoff;
}

}  // namespace rgfast::cuda::ranks
