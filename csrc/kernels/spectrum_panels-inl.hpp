// What is done to a tile of terms in panels [panel][term][lane]: directions are taken out, products summed.
// No include guard: see foreach_target.hpp.

namespace rgfast {
namespace RGFAST_NS {

constexpr long long kGramTile = 256;  // terms per partial sum: part of the error bound that Python states
// From one panel to the next; a power of two would put them all in the same sets of the cache.
constexpr long long kPanel = (kGramTile + 1) * Simd<double>::lanes;

inline long long gram_stride(long long m) {
  constexpr long long L = Simd<double>::lanes;
  return (m + L - 1) / L * L;
}

// Of fp64 data whose largest magnitude this is, the power of two that they are divided by.
inline int data_exponent(double top) {
  if (!(top > 0.0 && top <= __DBL_MAX__)) return 0;
  const int exponent = Range<double>::exponent(top);
  return exponent < -1000 ? -1000 : exponent > 1000 ? 1000 : exponent;
}

// Data that the next moment is of, fetched line by line while this one's products keep the memory waiting.
struct Ahead {
  const char* at;
  long long lines;
  long long each;

  RGFAST_INLINE void fetch() {
    const long long some = lines < each ? lines : each;
    for (long long i = 0; i < some; ++i) __builtin_prefetch(at + i * 64, 0, 2);
    at += some * 64;
    lines -= some;
  }
};

// c += y'y for one tile of terms, lower triangle, from panels [panel][term][lane].
inline void gram_tile(const double* panels, long long count, long long terms, double* c, long long stride,
                      bool first, Ahead& ahead) {
  constexpr int L = Simd<double>::lanes;
  for (long long i = 0; i < count;) {
    const long long left = count - i;
    const int rows = left >= 3 && left != 4 ? 3 : left >= 2 ? 2 : 1;
    for (long long j = 0; j < i + rows; ++j) {
      const int above = j > i ? static_cast<int>(j - i) : 0;  // panels that lie above the diagonal
      const double* const a = panels + (i + above) * kPanel;
      const double* const b = panels + j * kPanel;
      double* const at = c + j * L * stride + (i + above) * L;
      ahead.fetch();
      if (rows - above == 3)
        panel_block<3, L, kPanel>(a, b, terms, at, stride, first);
      else if (rows - above == 2)
        panel_block<2, L, kPanel>(a, b, terms, at, stride, first);
      else
        panel_block<1, L, kPanel>(a, b, terms, at, stride, first);
    }
    i += rows;
  }
}

// The same in stretches whose panels stay in the first-level cache, where that leaves the error within what
// Python states for tiles: `total` terms in sums of b err by no more than b + total / b roundings.
inline void gram_tiles(const double* panels, long long count, long long terms, double* c, long long stride,
                       bool first, long long total, Ahead& ahead) {
  const long long step = total <= kGramTile * kGramTile / 2 ? kGramTile / 2 : kGramTile;
  for (long long k = 0; k < terms; k += step)
    gram_tile(panels + k * Simd<double>::lanes, count, terms - k < step ? terms - k : step, c, stride,
              first && k == 0, ahead);
}

// Takes the directions of K orthonormal vectors out of R terms that follow each other. Sums run across the
// panels, K R of them at a time: alone, every one would wait for the one before it.
template <int R, int K>
RGFAST_INLINE void project_terms(double* at, long long count, const double* vectors, long long stride) {
  constexpr int L = Simd<double>::lanes;
  VecD dot[R][K];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int k = 0; k < K; ++k) dot[r][k] = VecD{};
  for (long long p = 0; p < count; ++p) {
    VecD y[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) y[r] = load(at + p * kPanel + r * L);
#pragma GCC unroll 4
    for (int k = 0; k < K; ++k) {
      const VecD v = load(vectors + k * stride + p * L);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) dot[r][k] = fma(y[r], v, dot[r][k]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int k = 0; k < K; ++k) dot[r][k] = broadcast(sum_lanes(dot[r][k]));
  for (long long p = 0; p < count; ++p) {
    VecD y[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) y[r] = load(at + p * kPanel + r * L);
#pragma GCC unroll 4
    for (int k = 0; k < K; ++k) {
      const VecD v = load(vectors + k * stride + p * L);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) y[r] = fnma(dot[r][k], v, y[r]);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) store(at + p * kPanel + r * L, y[r]);
  }
}

template <int K>
inline void project_tile(double* panels, long long count, long long terms, const double* vectors,
                         long long stride) {
  constexpr int L = Simd<double>::lanes;
  constexpr int R = 8 / K;
  long long i = 0;
  for (; i + R <= terms; i += R) project_terms<R, K>(panels + i * L, count, vectors, stride);
  for (; i < terms; ++i) project_terms<1, K>(panels + i * L, count, vectors, stride);
}

inline void project_stages(const spectrum::GramTask& task, double* panels, long long count, long long terms) {
  long long done = 0;
  for (int stage = 0; stage < task.stages; ++stage)
    while (done < task.ends[stage]) {
      const double* const vectors = task.project + done * task.project_stride;
      const long long left = task.ends[stage] - done;
      if (left >= 4)
        project_tile<4>(panels, count, terms, vectors, task.project_stride);
      else if (left >= 2)
        project_tile<2>(panels, count, terms, vectors, task.project_stride);
      else
        project_tile<1>(panels, count, terms, vectors, task.project_stride);
      done += left >= 4 ? 4 : left >= 2 ? 2 : 1;
    }
}

}  // namespace RGFAST_NS
}  // namespace rgfast
