// What the rows of a batch are read for while a model runs: numbers that are not finite, and every sequence's
// mean over the positions that count. One launch for all layers reads every row that counts once, and no
// other.
//
// A warp takes 128 columns of a sequence, four per lane, through all positions in their order. A number that
// is not finite shows in the sum of its column; a warp with such a sum goes through its rows once more and
// counts these numbers by position. Others leave `bad` as it was, which has to be zero.
#include "cuda/moments_rows.cuh"

namespace rgfast::cuda::moments {

inline constexpr int kSurveyColumns = 128;  // of a warp
inline constexpr int kSurveyRows = 4;       // that a lane loads before it adds them up
inline constexpr int kSurveyWords = 10;

// rgfast/ops/moments/surveying.py launches with these numbers.
static_assert(kThreads == 128 && kSurveyColumns == 128 && kSurveyWords == 10);

struct Surveyed {
  const void* rows;  // [sequences, positions, width] of any strides, in elements
  std::int64_t sequence_stride, row_stride, feature_stride;
  std::int64_t width;
  const unsigned char* mask;  // [sequences, positions] of any strides, or null: all rows count
  std::int64_t mask_sequence, mask_row;
  double* means;      // [sequences, width], or null
  std::int32_t* bad;  // [sequences, strips, positions]
};

__device__ inline Surveyed surveyed_at(const std::int64_t* table, std::int64_t k) {
  const std::int64_t* word = table + k * kSurveyWords;
  return {reinterpret_cast<const void*>(word[0]),
          word[1],
          word[2],
          word[3],
          word[4],
          reinterpret_cast<const unsigned char*>(word[5]),
          word[6],
          word[7],
          reinterpret_cast<double*>(word[8]),
          reinterpret_cast<std::int32_t*>(word[9])};
}

__device__ inline bool is_finite(double x) { return x - x == 0.0; }

// The widest layer has `strips` of 128 columns.
template <class T>
__device__ void survey(const std::int64_t* table, std::int64_t sequences, std::int64_t positions,
                       std::int64_t strips) {
  const Surveyed layer = surveyed_at(table, blockIdx.y);
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const std::int64_t task = std::int64_t{blockIdx.x} * (kThreads / 32) + threadIdx.x / 32;
  const std::int64_t sequence = task / strips, first = task % strips * kSurveyColumns;
  if (sequence >= sequences || first >= layer.width) return;  // a whole warp
  const std::int64_t column = first + 4 * lane, left = layer.width - column;
  const T* from = static_cast<const T*>(layer.rows) + sequence * layer.sequence_stride +
                  (left > 0 ? column : 0) * layer.feature_stride;
  const unsigned char* mask = layer.mask == nullptr ? nullptr : layer.mask + sequence * layer.mask_sequence;
  const bool whole = left >= 4 && in_loads(from, layer.row_stride, layer.feature_stride);
  const auto counts = [&](std::int64_t row) { return mask == nullptr || mask[row * layer.mask_row] != 0; };

  double sum[4] = {};
  std::int64_t number = 0;
  for (std::int64_t at = 0; at < positions; at += kSurveyRows) {
    T raw[kSurveyRows][4] = {};
    bool kept[kSurveyRows];
#pragma unroll
    for (int r = 0; r < kSurveyRows; ++r) {
      kept[r] = at + r < positions && counts(at + r);
      if (kept[r])
        load_four(raw[r], from + (at + r) * layer.row_stride, layer.feature_stride, whole,
                  [&](int e) { return e < left; });
    }
#pragma unroll
    for (int r = 0; r < kSurveyRows; ++r) {
      if (!kept[r]) continue;
      ++number;
#pragma unroll
      for (int e = 0; e < 4; ++e) sum[e] += widened(raw[r][e]);
    }
  }

  bool finite = true;
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    if (e >= left) continue;
    finite = finite && is_finite(sum[e]);
    if (layer.means != nullptr)
      layer.means[sequence * layer.width + column + e] =
          sum[e] / static_cast<double>(number > 1 ? number : 1);
  }
  if (__all_sync(kFullWarp, finite)) return;
  for (std::int64_t at = 0; at < positions; ++at) {
    if (!counts(at)) continue;  // of all lanes alike
    int found = 0;
    for (int e = 0; e < 4 && e < left; ++e)
      found += is_finite(widened(from[at * layer.row_stride + e * layer.feature_stride])) ? 0 : 1;
#pragma unroll
    for (int step = 16; step > 0; step /= 2) found += __shfl_xor_sync(kFullWarp, found, step);
    if (lane == 0) layer.bad[task * positions + at] = found;
  }
}

}  // namespace rgfast::cuda::moments

#define RGFAST_SURVEY(name, T)                                                                          \
  extern "C" __global__ void __launch_bounds__(128) rgfast_moments_survey_##name(                       \
      const std::int64_t* table, std::int64_t sequences, std::int64_t positions, std::int64_t strips) { \
    rgfast::cuda::moments::survey<T>(table, sequences, positions, strips);                              \
  }

RGFAST_SURVEY(float64, double)
RGFAST_SURVEY(float32, float)
RGFAST_SURVEY(bfloat16, rgfast::cuda::Bfloat16)
RGFAST_SURVEY(float16, rgfast::cuda::Half)
#undef RGFAST_SURVEY
