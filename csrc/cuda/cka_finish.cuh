// Values of CKA from sums of pairs of layers, each where it stands in the result, and what is wrong with
// them.
#pragma once

#include "cuda/cka.cuh"

namespace rgfast::cuda::cka {

__device__ inline double nothing() { return __longlong_as_double(0x7ff8000000000000); }

// What is wanted. rgfast/ops/cka/launches.py has the same numbers.
enum Task : int {
  kMatrix = 0,  // to[positions, L, L], or of the first layers with the rest
  kDrift = 1,   // to[positions, L - 1]: 1 - CKA of neighbors
  kBoth = 2,    // to[variants, 2, positions, L, L]: debiased and biased CKA, NaN for pairs that are not there
  kInner = 3,   // to[positions]: weighted inner products of two layers
  kParts = 4    // to[positions, L, L + 2]: weighted inner products, their floor and their exponents, in units
};

// Samples in batches of the same size, each with a weight of its inner products: sums[positions, count,
// variants, pairs].
struct Batches {
  const PairSums* sums;
  std::int64_t count, rows;
  double weight;
};

struct Finish {
  const std::int64_t* table;
  std::int64_t layers, first, pairs, start, positions, task, debiased;
  Batches batches[2];
  double* to;
  std::int64_t* faults;
};

// A pair of layers at the block's position and variant. `one` and `other` are the pairs of each with itself.
struct PairAt {
  const Finish& work;
  std::int64_t pair, one, other;
  int exponents[2] = {};
  double units[2];

  __device__ PairAt(const Finish& of, std::int64_t k) : work(of), pair(k) {
    const std::int64_t* word = of.table + of.layers * moments::kLayerWords + k * moments::kPairWords;
    one = word[3];
    other = word[4];
    double most[2] = {};
    each([&](const Batches& batches, std::int64_t b, double) {
      const double traces[2] = {sums(batches, b, one).trace, sums(batches, b, other).trace};
      for (int s = 0; s < 2; ++s) most[s] = traces[s] > most[s] ? traces[s] : most[s];
    });
    for (int s = 0; s < 2; ++s) {
      exponents[s] = exponent_for(most[s]);
      units[s] = power_of_two<double>(-2 * exponents[s]);
    }
  }

  __device__ const PairSums& sums(const Batches& batches, std::int64_t b, std::int64_t k,
                                  std::int64_t variant) const {
    return batches.sums[((blockIdx.x * batches.count + b) * gridDim.y + variant) * work.pairs + k];
  }
  __device__ const PairSums& sums(const Batches& batches, std::int64_t b, std::int64_t k) const {
    return sums(batches, b, k, blockIdx.y);
  }

  // Calls `take(batches, b, n)` for all batches.
  template <class Take>
  __device__ void each(const Take& take) const {
    const std::int64_t groups = std::int64_t{gridDim.y} - 1, variant = blockIdx.y;
#pragma unroll
    for (int size = 0; size < 2; ++size) {
      const Batches& batches = work.batches[size];
      const std::int64_t n = variant == 0 ? batches.rows : left_without(batches.rows, groups, variant - 1);
      for (std::int64_t b = 0; b < batches.count; ++b) take(batches, b, static_cast<double>(n));
    }
  }

  // The inner product of the pair in units.
  __device__ double cross(bool debiased) const { return total(pair, other, 0, 1, debiased); }
  // The squared norm of one of the layers; `norm` is NaN without variance.
  __device__ double own(int side, bool debiased) const {
    const std::int64_t k = side == 0 ? one : other;
    return total(k, k, side, side, debiased);
  }
  __device__ double norm(int side, bool debiased) const {
    const double square = own(side, debiased);
    return varies(square, floor(side)) ? square : nothing();
  }
  __device__ double floor(int side) const {
    double sum = 0.0;
    each([&](const Batches& batches, std::int64_t b, double n) {
      const double trace = sums(batches, b, side == 0 ? one : other).trace * units[side];
      sum += batches.weight * (trace * trace / n);
    });
    return sum;
  }
  // The root of the product, not the product of roots: identical layers then have a CKA of exactly 1.
  __device__ double alignment(bool debiased) const {
    return cross(debiased) / sqrt(norm(0, debiased) * norm(1, debiased));
  }

 private:
  __device__ double total(std::int64_t k, std::int64_t right, int left_side, int right_side,
                          bool debiased) const {
    double sum = 0.0;
    each([&](const Batches& batches, std::int64_t b, double n) {
      sum += batches.weight * inner_product(sums(batches, b, k), sums(batches, b, right).trace,
                                            units[left_side], units[right_side], n, debiased);
    });
    return sum;
  }
};

// What is wrong with a layer.
__device__ inline int faults_of(const PairAt& place) {
  int found = 0;
  place.each([&](const Batches& batches, std::int64_t b, double n) {
    const PairSums &own = place.sums(batches, b, place.pair), &all = place.sums(batches, b, place.pair, 0);
    found |=
        blockIdx.y == 0 ? faults_of_all(own) : faults_without(own, all, n, static_cast<double>(batches.rows));
  });
  return found;
}

// A block has a position and a variant.
__device__ inline void finish(const Finish& work) {
  const std::int64_t layers = work.layers, position = work.start + blockIdx.x, variant = blockIdx.y;
  const bool debiased = work.debiased != 0;
  double* square = work.to + position * layers * layers;
  const std::int64_t kind = work.positions * layers * layers;  // from a kind of CKA to the next
  if (work.task == kBoth) {
    square += 2 * variant * kind;
    if (work.pairs < layers * (layers + 1) / 2)
      for (std::int64_t at = threadIdx.x; at < layers * layers; at += kThreads) {
        const std::int64_t apart = at / layers - at % layers;
        if (apart < -1 || apart > 1) square[at] = square[kind + at] = nothing();
      }
  }
  int found = 0;
  for (std::int64_t k = threadIdx.x; k < work.pairs; k += kThreads) {
    const Pair pair = pair_at(work.table, layers, k);
    const std::int64_t i = pair.left, j = pair.right;
    const PairAt place(work, k);
    if (i == j) found |= faults_of(place);
    const auto both = [i, j, layers](double* to, double value) {
      to[i * layers + j] = to[j * layers + i] = value;
    };
    switch (static_cast<int>(work.task)) {
      case kMatrix:
        if (work.first == layers) {
          both(square, place.alignment(debiased));
        } else if (i < work.first && j >= work.first) {
          const std::int64_t rest = layers - work.first;
          work.to[(position * work.first + i) * rest + j - work.first] = place.alignment(debiased);
        }
        break;
      case kDrift:
        if (i != j) {
          const double drift = 1.0 - place.alignment(debiased);
          const double one = place.own(0, false) / place.norm(0, debiased);
          const double other = place.own(1, false) / place.norm(1, debiased);
          if (drift < kTinyDrift * (one > other ? one : other)) found |= kTiny;
          work.to[position * (layers - 1) + i] = drift < 0.0 ? 0.0 : drift;
        }
        break;
      case kBoth:
        both(square, place.alignment(true));
        both(square + kind, place.alignment(false));
        break;
      case kInner:
        if (i != j) {
          // Two factors each: 2^2e may leave the range where 2^e does not.
          const double once = power_of_two<double>(place.exponents[0]),
                       twice = power_of_two<double>(place.exponents[1]);
          work.to[position] = place.cross(debiased) * once * twice * once * twice;
        }
        break;
      default: {
        double* row = work.to + position * layers * (layers + 2);
        row[i * (layers + 2) + j] = row[j * (layers + 2) + i] = place.cross(debiased);
        if (i == j) {
          row[i * (layers + 2) + layers] = place.floor(0);
          row[i * (layers + 2) + layers + 1] = static_cast<double>(place.exponents[0]);
        }
      }
    }
  }
  int all = 0;
#pragma unroll
  for (int bit = kNotFinite; bit <= kMoved; bit *= 2)
    if (__syncthreads_or(found & bit) != 0) all |= bit;
  if (threadIdx.x == 0) work.faults[position * gridDim.y + variant] = all;
}

}  // namespace rgfast::cuda::cka
