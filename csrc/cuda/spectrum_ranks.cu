// Every rank measure of eigenvalues of centered moments and of raw ones, and bounds on their rounding errors,
// in one launch: a block takes both spectra of one matrix. All sums have a fixed order.
#include "cuda/spectrum_ranks_math.cuh"

namespace rgfast::cuda::ranks {

inline constexpr int kRankWarps = 4;
inline constexpr int kRankThreads = 32 * kRankWarps;
inline constexpr int kRankSums = 6;

// rgfast/ops/spectrum/rank_kernel.py launches with these numbers and has the measures in this order.
static_assert(kRankThreads == 128 && kRankWarps * kRankSums * 8 == 192);
enum Measure {
  kSingular,
  kVariance,
  kParticipation,
  kStable,
  kNumerical,
  kRawSingular,
  kRawVariance,
  kBound,
  kRawBound,
  kFinite,
};

// values[kinds, batch, m], ascending, with sums of squares of all features variance[kinds, batch, d], m <= d:
// of centered rows, and if there are two kinds of raw ones. accumulated[batch] was summed for the former, of
// count[batch] rows; a moment has so many terms, or d if `by_features`.
struct Spectra {
  const double* values;
  const double* variance;
  const double* accumulated;
  const std::int64_t* count;
  std::int64_t batch, m, d, kinds, by_features;
  double tolerance;
};

struct RankSums {
  double of[kRankSums];
};

__device__ inline RankSums total_of(RankSums mine, double* shared) {
#pragma unroll
  for (int k = 0; k < kRankSums; ++k) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) mine.of[k] += __shfl_xor_sync(kFullWarp, mine.of[k], step);
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32 * kRankSums + k] = mine.of[k];
  }
  __syncthreads();
#pragma unroll
  for (int k = 0; k < kRankSums; ++k)
    mine.of[k] =
        (shared[k] + shared[kRankSums + k]) + (shared[2 * kRankSums + k] + shared[3 * kRankSums + k]);
  __syncthreads();
  return mine;
}

// One spectrum of a matrix: its singular values by their number, none beyond the largest rank there can be.
struct Roots {
  const double* values;
  std::int64_t m, limit;
  double largest;

  __device__ double sigma(std::int64_t i) const {
    if (i >= m || i >= limit) return 0.0;
    const double value = values[m - 1 - i];
    return value > 0.0 ? sqrt(value) : 0.0;
  }
};

// table[10, batch], NaN for fewer than two rows; sigma[batch, d] of centered rows.
__device__ inline void measure(const Spectra& given, double* sigma, double* table) {
  auto* shared = shared_memory<double>();
  const std::int64_t index = blockIdx.x, batch = given.batch, d = given.d, m = given.m;
  const std::int64_t count = given.count[index];
  const double unknown = __longlong_as_double(0x7ff8000000000000LL);
  const bool known = count >= 2;
  const auto put = [&](int row, double value) {
    if (threadIdx.x == 0) table[row * batch + index] = known ? value : unknown;
  };
  double finite = 1.0, centered = 0.0;
  for (std::int64_t kind = 0; kind < given.kinds; ++kind) {
    const std::int64_t at = kind * batch + index;
    Roots roots{given.values + at * m, m, d, 0.0};
    RankSums mine{};
    for (std::int64_t i = threadIdx.x; i < d; i += kRankThreads) {
      const double variance = given.variance[at * d + i];
      mine.of[0] += variance;
      mine.of[1] += variance > 0.0 ? 1.0 : 0.0;
      if (i < m) mine.of[2] += fabs(roots.values[i]) <= 0x1.fffffffffffffp1023 ? 0.0 : 1.0;
    }
    const RankSums first = total_of(mine, shared);
    if (first.of[2] > 0.0) finite = 0.0;
    const double accumulated = kind == 0 ? at_least(first.of[0], given.accumulated[index]) : first.of[0];
    const std::int64_t freedom = kind == 0 ? count - 1 : count,
                       varying = static_cast<std::int64_t>(first.of[1]);
    roots.limit = freedom < 0 ? 0 : freedom < varying ? freedom : varying;
    roots.largest = roots.sigma(0);

    const double top = at_least(m > 0 ? roots.values[m - 1] : 0.0, 0.0);
    const auto terms = static_cast<double>(given.by_features != 0 ? d : count);
    const double epsilon = gram_error(terms, accumulated, top, static_cast<double>(d));
    const double least = sqrt(epsilon), shifted = 2.0 * kRoundoff * sqrt(accumulated);
    // Raw rows that are all the same have a moment of rank one, which eigenvalues only say to rounding.
    const bool constant = kind == 1 && centered == 0.0 && roots.largest > 0.0;
    mine = {};
    for (std::int64_t i = threadIdx.x; i < d; i += kRankThreads) {
      const double value = roots.sigma(i), share = share_of(value, roots.largest);
      if (kind == 0) sigma[index * d + i] = known ? value : unknown;
      if (i < roots.limit) mine.of[1] += root_error(value, epsilon, least, shifted);
      mine.of[0] += value;
      mine.of[2] += share;
      mine.of[3] = fma(share, share, mine.of[3]);
      mine.of[4] += value / at_least(roots.largest, kTiny) > given.tolerance ? 1.0 : 0.0;
    }
    const RankSums sums = total_of(mine, shared);
    const double total = at_least(sums.of[0], kTiny), shares = at_least(sums.of[2], kTiny);
    mine = {};
    for (std::int64_t i = threadIdx.x; i < d; i += kRankThreads) {
      const double value = roots.sigma(i);
      mine.of[0] += entropy_of(value / total);
      mine.of[1] += entropy_of(share_of(value, roots.largest) / shares);
    }
    const RankSums entropies = total_of(mine, shared);
    const bool none = !(sums.of[0] > 0.0);
    const double one = none ? 0.0 : 1.0;
    put(kind == 0 ? kSingular : kRawSingular, constant || none ? one : exp(entropies.of[0]));
    put(kind == 0 ? kVariance : kRawVariance, constant || none ? one : exp(entropies.of[1]));
    const double bound = entropy_error(sums.of[0], sums.of[1], static_cast<double>(roots.limit));
    put(kind == 0 ? kBound : kRawBound, constant ? 0.0 : bound);
    if (kind == 0) {
      put(kParticipation, sums.of[2] * sums.of[2] / at_least(sums.of[3], kTiny));
      put(kStable, sums.of[2]);
      put(kNumerical, sums.of[4]);
      centered = roots.largest;
    }
  }
  if (given.kinds == 1)
    for (const int row : {kRawSingular, kRawVariance, kRawBound}) put(row, unknown);
  if (threadIdx.x == 0) table[kFinite * batch + index] = finite;
}

}  // namespace rgfast::cuda::ranks

extern "C" __global__ void __launch_bounds__(128, 5)
    rgfast_spectrum_ranks(const double* values, const double* variance, const double* accumulated,
                          const std::int64_t* count, std::int64_t batch, std::int64_t m, std::int64_t d,
                          std::int64_t kinds, std::int64_t by_features, double tolerance, double* sigma,
                          double* table) {
  rgfast::cuda::ranks::measure(
      {values, variance, accumulated, count, batch, m, d, kinds, by_features, tolerance}, sigma, table);
}
