// What the values of CKA are made of, from sums of pairs of layers: inner products of centered and of
// U-centered kernels, and whether sums are good enough for them. The host compiles it, too.
#pragma once

#include "cuda/common/exponents.cuh"

namespace rgfast::cuda::cka {

// Of two layers at a position, in this order in memory.
struct PairSums {
  double off;    // over pairs of different samples, of products of both kernels' entries
  double same;   // of products of their diagonals
  double trace;  // of the left layer's kernel
  double apart;  // of the left layer n |mean|^2: of all samples of its rows, without a group of centered ones
};

// What is wrong with the sums of a position.
inline constexpr int kNotFinite = 1;   // a trace is none: NaN, Inf, or rows too long
inline constexpr int kOutOfRange = 2;  // products leave fp64, or the rounding of a mean counts
inline constexpr int kTiny = 4;        // 1 - CKA has lost digits
inline constexpr int kMoved = 8;       // without a group rows are badly centered, or much smaller

// HSIC(K, K) below this fraction of (tr K)^2/n is rounding, not variance.
inline constexpr double kNoVariance = 1e-13;
// Traces whose squares and products stay within fp64, and n |mean|^2 over a trace up to which the rounding of
// a mean changes a CKA by 1e-13 at most.
inline constexpr double kLeast = 1e-130, kMost = 1e150, kMostOffset = 8e16;
// Below this 1 - CKA of fp64 products has lost digits.
inline constexpr double kTinyDrift = 1e-8;
// What moving the mean back may take off a trace, over what is left of it, and the least mean square of what
// is left over that of all.
inline constexpr double kMostMoved = 1.0 / 9.0, kLeastLeft = 1e-3;

// Exponent e such that a kernel of that trace is of about the size 2^2e; 0 for one of zeros.
__host__ __device__ inline int exponent_for(double trace) {
  return trace == 0.0 ? 0 : (exponent_of(trace) + 2) >> 1;
}

// Inner product of two kernels of n samples, each in a unit of its own. Every product is within fp64 for
// traces within their range.
__host__ __device__ inline double inner_product(const PairSums& sums, double right_trace, double left_unit,
                                                double right_unit, double n, bool debiased) {
  const double unit = left_unit * right_unit;
  if (!debiased) return (sums.off + sums.same) * unit;
  const double both = (sums.trace * left_unit) * (right_trace * right_unit);
  return sums.off * unit - 2.0 * (sums.same * unit) / (n - 2.0) + both / ((n - 1.0) * (n - 2.0));
}

// Whether a kernel's squared norm is more than rounding. `floor` is (tr K)^2/n in the unit of the norm.
__host__ __device__ inline bool varies(double own, double floor) { return own > kNoVariance * floor; }

// Of all samples.
__host__ __device__ inline int faults_of_all(const PairSums& own) {
  if (own.trace == 0.0) return 0;
  if (!(own.trace <= 0x1.fffffffffffffp1023)) return kNotFinite;
  const bool fine = own.trace > kLeast && own.trace < kMost && own.apart <= kMostOffset * own.trace;
  return fine ? 0 : kOutOfRange;
}

// Of all but a group, `left` of n samples. `all` are the sums of all, of which faults_of_all tells.
__host__ __device__ inline int faults_without(const PairSums& own, const PairSums& all, double left,
                                              double n) {
  const bool fine = own.apart <= kMostMoved * own.trace && own.trace * n >= kLeastLeft * all.trace * left;
  return fine || all.trace == 0.0 ? 0 : kMoved;
}

// How many of `rows` samples are not in group g of samples g, g + groups, ...
__host__ __device__ inline std::int64_t left_without(std::int64_t rows, std::int64_t groups, std::int64_t g) {
  return rows - (rows - g + groups - 1) / groups;
}

}  // namespace rgfast::cuda::cka
