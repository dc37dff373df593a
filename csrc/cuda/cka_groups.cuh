// What is needed of layers without each group g of their samples g, g + groups, ...: sums of the rows of a
// group, products of all rows with them, and squares of cross moments without a group (cka.cuh has the
// formulas).
#pragma once

#include "cuda/cka.cuh"

namespace rgfast::cuda::cka {

using moments::kStep;
using moments::Strip;

// Shared memory for tiles without groups: what a tile has, and the tile of all samples.
inline constexpr int kLeftOutShared = moments::kShared + 8 * moments::kSide * moments::kSide;
static_assert(kLeftOutShared == 66784 && moments::kShared % 16 == 0);
// rgfast/ops/cka/launches.py launches with this number.

inline constexpr int kTogether = 8;  // groups whose products with a row are formed at once

// Sums of the centered rows of every group. A block takes 32 columns of a group of a position.
template <class T>
__device__ void group_sums(const std::int64_t* table, std::int64_t rows, std::int64_t chunks,
                           std::int64_t groups) {
  const Layer layer = layer_at(table, blockIdx.y);
  auto* shared = shared_memory<double>();
  const std::int64_t at = blockIdx.x / chunks, position = at / groups, group = at % groups;
  const std::int64_t positions = gridDim.x / (chunks * groups);
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const std::int64_t column = blockIdx.x % chunks * kColumns + lane;
  const bool mine = column < layer.width;
  double sum = 0.0;
  if (mine) {
    const T* x =
        static_cast<const T*>(layer.rows) + position * layer.position_stride + column * layer.feature_stride;
    const double* mean = layer.shift + position * layer.width + column;
    const double rest = mean[positions * layer.width];
    for (std::int64_t row = group + warp * groups; row < rows; row += kWarps * groups)
      sum += (widened(x[row * layer.row_stride]) - *mean) - rest;
  }
  shared[warp * 32 + lane] = sum;
  __syncthreads();
  if (warp != 0 || !mine) return;
  layer.tops[at * layer.width + column] =
      (shared[lane] + shared[32 + lane]) + (shared[64 + lane] + shared[96 + lane]);
}

// Products of every centered row with these sums, by a warp for a row.
template <class T>
__device__ void products_with_groups(const std::int64_t* table, std::int64_t positions, std::int64_t rows,
                                     std::int64_t groups) {
  const Layer layer = layer_at(table, blockIdx.y);
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const std::int64_t at = std::int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  if (at >= positions * rows) return;
  const std::int64_t position = at / rows, row = at % rows;
  const T* x = static_cast<const T*>(layer.rows) + position * layer.position_stride + row * layer.row_stride;
  const double* mean = layer.shift + position * layer.width;
  const double* rest = mean + positions * layer.width;
  const double* sums = layer.tops + position * groups * layer.width;
  double* to = layer.tops + positions * groups * layer.width + position * groups * rows + row;
  for (std::int64_t first = 0; first < groups; first += kTogether) {
    const int count = static_cast<int>(groups - first < kTogether ? groups - first : kTogether);
    double product[kTogether] = {};
    for (std::int64_t column = lane; column < layer.width; column += 32) {
      const double y = (widened(x[column * layer.feature_stride]) - mean[column]) - rest[column];
#pragma unroll
      for (int k = 0; k < kTogether; ++k)
        if (k < count) product[k] = fma(y, sums[(first + k) * layer.width + column], product[k]);
    }
#pragma unroll
    for (int k = 0; k < kTogether; ++k) {
#pragma unroll
      for (int step = 16; step > 0; step /= 2) product[k] += __shfl_xor_sync(kFullWarp, product[k], step);
      if (lane == k && k < count) to[(first + k) * rows] = product[k];
    }
  }
}

// squares[positions, 1 + groups, tiles]: of every tile of a cross moment the sum of squares, of all samples
// and without each group. A group's products are formed by themselves and taken off those of all, which stay
// in shared memory, in fp64; so is what moves the means of what is left.
template <class T>
__device__ void left_out(const std::int64_t* table, std::int64_t layers, std::int64_t pairs,
                         std::int64_t tiles, std::int64_t rows, std::int64_t groups, double* squares) {
  using How = moments::Exact<T>;
  using Mover = typename How::Mover;
  auto* shared = shared_memory<unsigned char>();
  auto& plan = *reinterpret_cast<moments::Plan*>(shared + moments::kArea);
  moments::make_plan<T, true>({table, layers, pairs, tiles, rows, {nullptr, 0, 0}, 0, 0, 0, squares}, 0,
                              plan);

  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
  const int quarter = (thread / 32 + static_cast<int>(blockIdx.x >> 2)) & 3;
  const int top = quarter / 2 * 32, left = quarter % 2 * 32;
  const bool same = plan.same != 0;
  const bool whole =
      plan.strip[0].columns >= top + 32 && plan.strip[1].columns >= left + 32 && !(same && top >= left);
  auto* all = reinterpret_cast<double*>(shared + moments::kShared) + thread;  // kThreads apart
  const int k = lane % 8, column = 4 * (lane / 8 + thread / 32 * 4);
  for (int variant = 0; variant <= static_cast<int>(groups); ++variant) {
    const int g = variant - 1;
    __syncthreads();
    // All rows, then those of group 0, and from there on by one row to the next group.
    if (thread < 2) {
      Strip& strip = plan.strip[thread];
      if (variant > 1) strip.at = static_cast<const T*>(strip.at) + strip.row_stride / groups;
      if (variant == 1) strip.row_stride *= groups;
    }
    if (thread == 0)
      plan.sum = squares + (blockIdx.x / tiles * (1 + groups) + variant) * tiles + blockIdx.x % tiles;
    __syncthreads();
    const int count = static_cast<int>(variant == 0 ? rows : rows - left_without(rows, groups, g));
    Mover down(plan.strip[0], column, k), right(plan.strip[1], column, k);
    bool kept[2];
    const auto fetch = [&](int at) {
      for (int h = 0; h < 2; ++h) kept[h] = at + 8 * h < count;
      down.fetch(plan.strip[0], column, count - at);
      if (!same) right.fetch(plan.strip[1], column, count - at);
    };
    const auto put = [&](unsigned char* to) {
      moments::stage<How>(to, plan.strip[0], down, column, k, 0, kept);
      if (!same) moments::stage<How>(to + How::kStrip, plan.strip[1], right, column, k, 0, kept);
    };
    typename How::Sums sums;
    sums.clear();
    fetch(k);
    put(shared);
    __syncthreads();
    for (int at = 0; at < count; at += kStep) {
      const bool more = at + kStep < count;
      const unsigned char* now = shared + at / kStep % 2 * 2 * How::kStrip;
      unsigned char* next = shared + (at / kStep + 1) % 2 * 2 * How::kStrip;
      if (more) fetch(at + kStep + k);
      const unsigned char* beside = same ? now : now + How::kStrip;
      if (whole)
        How::template multiply<true>(sums, now, beside, top, left, {});
      else
        How::template multiply<false>(
            sums, now, beside, top, left,
            moments::shape_of(same, plan.strip[0].columns, plan.strip[1].columns, top, left));
      if (more) put(next);
      __syncthreads();
    }
    if (variant == 0) {
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j)
#pragma unroll
          for (int e = 0; e < 4; ++e) all[(16 * i + 4 * j + e) * kThreads] = sums.total[i][j][e];
    } else {
      const std::int64_t position = blockIdx.x / tiles;
      const Pair pair = pair_at(table, layers, plan.pair);
      const Layer one = layer_at(table, pair.left), other = layer_at(table, pair.right);
      // How far into their layers the strips begin.
      const std::int64_t from = plan.strip[0].shift - one.shift - position * one.width;
      const std::int64_t onto = plan.strip[1].shift - other.shift - position * other.width;
      const double* a = one.tops + (position * groups + g) * one.width + from;
      const double* b = other.tops + (position * groups + g) * other.width + onto;
      const double n = static_cast<double>(rows - count);
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j)
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const int r = top + How::row(i, e, lane), c = left + How::column(j, e, lane);
            const bool there = r < plan.strip[0].columns && c < plan.strip[1].columns;
            const double moved = there ? a[r] / n * b[c] : 0.0;
            sums.total[i][j][e] = (all[(16 * i + 4 * j + e) * kThreads] - sums.total[i][j][e]) - moved;
          }
    }
    moments::put_squares<How>(sums, plan, reinterpret_cast<double*>(shared), top, left);
  }
}

// to[all positions, variants, entries], at positions from `start` on, `here` of them: sums over Gram tiles
// from `first` on, `count` of them, of from[count, spans, here, entries]; without a group those of tiles that
// have no part in it, of which each has `strips`. Added to what is there with `add`. A block has 32 numbers,
// each of its warps every fourth tile.
__device__ inline void collect(const double* from, std::int64_t first, std::int64_t count, std::int64_t spans,
                               std::int64_t here, std::int64_t entries, std::int64_t strips,
                               std::int64_t start, std::int64_t add, double* to) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const std::int64_t at = std::int64_t{blockIdx.x} * 32 + lane, step = here * entries;
  const bool mine = at < step;
  const std::int64_t g = std::int64_t{blockIdx.y} - 1;
  auto* shared = shared_memory<double>();
  moments::Tile tile = moments::tile_at(first + warp, 0, true);
  double sum = 0.0;
  for (std::int64_t k = warp; mine && k < count; k += kWarps) {
    if (g < 0 || (tile.row / strips != g && tile.column / strips != g)) {
      const double* next = from + k * spans * step + at;
#pragma unroll 8
      for (std::int64_t span = 0; span < spans; ++span) sum += next[span * step];
    }
    tile.row += kWarps;
    while (tile.row > tile.column) tile.row -= ++tile.column;
  }
  shared[warp * 32 + lane] = sum;
  __syncthreads();
  if (warp != 0 || !mine) return;
  sum = (shared[lane] + shared[32 + lane]) + (shared[64 + lane] + shared[96 + lane]);
  double& value = to[((start + at / entries) * gridDim.y + blockIdx.y) * entries + at % entries];
  value = add != 0 ? value + sum : sum;
}

}  // namespace rgfast::cuda::cka
