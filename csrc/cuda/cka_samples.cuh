// Inner products of kernels of layers over samples: Gram tiles of centered rows, 64 samples by 64, of which
// no whole kernel is ever in memory.
//
// A tile is multiplied as those of moments.cuh are, with samples in place of columns and features in place of
// rows. Only entries above the diagonal of a kernel count: a tile on the diagonal has zeros elsewhere, and
// what is summed is half of the sum over different samples. Either the tiles of all layers for some pairs of
// strips of samples go to memory as far as the second level of cache holds them, and `inner` multiplies all
// layers by all. Or a block keeps the tile of the layer before in shared memory, if only neighbors are
// compared.
//
// Rows are moved by a mean and by its rounding (cka.cuh): without the diagonal, an error of the mean would
// count once.
#pragma once

#include "cuda/cka.cuh"

namespace rgfast::cuda::cka {

using moments::kSide;
using moments::kStep;
using moments::Tile;

inline constexpr int kTile = kSide * kSide;

// Shared memory: two stages of two strips; for neighbors the tile of the layer before and sums of warps, too.
inline constexpr int kGramShared = moments::kArea;
inline constexpr int kBefore = 8 * kTile;
inline constexpr int kNearShared = kGramShared + kBefore + 8 * kWarps;
// Layers down and across whose tiles a block multiplies, and of how many entries.
inline constexpr int kGroup = 32, kSpan = 512;
inline constexpr int kInnerShared = 8 * kWarps * kGroup * kGroup;
// rgfast/ops/cka/launches.py launches with these numbers.
static_assert(kGramShared == 33792 && kNearShared == 66592 && kInnerShared == 32768);
static_assert(kTile == 4096 && kGroup == 32 && kSpan == 512);

// Samples of groups 0, 1, ... (sample i is of group i % groups) one group after the other, each in strips of
// its own, so that a tile is of two groups. One group has all samples as they are.
struct Order {
  int rows, groups, strips;  // of a group

  __host__ __device__ Order(std::int64_t count, std::int64_t number)
      : rows(static_cast<int>(count)),
        groups(static_cast<int>(number)),
        strips(static_cast<int>(moments::strips((count + number - 1) / number))) {}
  // The first sample of a strip, the next of which are `groups` apart, and how many it has.
  __host__ __device__ int first(std::int64_t strip) const {
    const int at = static_cast<int>(strip);
    return at / strips + at % strips * kSide * groups;
  }
  __host__ __device__ int size(std::int64_t strip) const {
    const int left = (rows - first(strip) + groups - 1) / groups;
    return left < 0 ? 0 : left < kSide ? left : kSide;
  }
};

// A thread's part of a strip of 64 samples: of two samples 32 apart four of 16 features. Four neighboring
// lanes have 16 features of a sample.
template <class T>
struct Part {
  const T* from;
  std::int64_t apart, stride;  // of the two samples, and of features
  bool there[2], aligned;
  T raw[2][4] = {};

  __device__ Part(const Layer& layer, std::int64_t position, const Order& order, std::int64_t strip)
      : apart(32 * layer.row_stride * order.groups), stride(layer.feature_stride) {
    const int sample = static_cast<int>(threadIdx.x) / 4, size = order.size(strip);
    from = static_cast<const T*>(layer.rows) + position * layer.position_stride +
           std::int64_t{order.first(strip) + sample * order.groups} * layer.row_stride +
           threadIdx.x % 4 * 4 * stride;
    there[0] = sample < size;
    there[1] = sample + 32 < size;
    aligned = moments::in_loads(from, layer.row_stride, stride);
  }

  // The next features, of which `left` come before the end.
  __device__ void fetch(int left) {
#pragma unroll
    for (int h = 0; h < 2; ++h)
      if (there[h])
        moments::load_four(raw[h], from + h * apart, stride, aligned && left >= 4,
                           [left](int e) { return e < left; });
    from += kStep * stride;
  }

  // Feature 4 q + e goes to slot 2 q + e % 2 + 8 (e / 2): lanes of a half-warp then store to 16 different
  // banks.
  __device__ void put(double* strip, const double (&mean)[4], const double (&rest)[4], int left) const {
    const int q = static_cast<int>(threadIdx.x) % 4, sample = static_cast<int>(threadIdx.x) / 4;
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const double y = (widened(raw[h][e]) - mean[e]) - rest[e];
        strip[(2 * q + e % 2 + e / 2 * 8) * moments::Exact<T>::kApart + sample + 32 * h] =
            there[h] && e < left ? y : 0.0;
      }
  }
};

// What a block multiplies, the same for all layers: its tile of samples, and each warp's quarter of it. Which
// that is depends on the tile, since on the diagonal not all have as much to do.
struct Place {
  std::int64_t position, pair;
  Tile tile;
  int quarter, top, left;
  bool same;

  __device__ Place(std::int64_t at, std::int64_t index)
      : position(at),
        pair(index),
        tile(moments::tile_at(index, 0, true)),
        quarter((static_cast<int>(threadIdx.x) / 32 + static_cast<int>(index)) & 3),
        top(quarter / 2 * 32),
        left(quarter % 2 * 32),
        same(tile.row == tile.column) {}

  // Where a thread's entries begin among those of its tile, kThreads apart.
  __device__ int first() const { return quarter * 32 + static_cast<int>(threadIdx.x) % 32; }
};

// The thread's entries of a layer's tile; all threads of the block together.
template <class T>
__device__ __forceinline__ void gram(typename moments::Exact<T>::Sums& sums, const Layer& layer,
                                     const Place& place, std::int64_t positions, const Order& order,
                                     unsigned char* shared) {
  using How = moments::Exact<T>;
  const int high = order.size(place.tile.row), wide = order.size(place.tile.column);
  const moments::Shape shape = moments::shape_of(place.same, high, wide, place.top, place.left);
  const bool whole =
      high >= place.top + 32 && wide >= place.left + 32 && !(place.same && place.top >= place.left);
  const int mine = static_cast<int>(threadIdx.x) % 4 * 4, width = static_cast<int>(layer.width);
  // The means of the thread's next four features, and how far behind them their rounding stands.
  const double* means = layer.shift + place.position * width + mine;
  const std::int64_t behind = positions * width;
  Part<T> down(layer, place.position, order, place.tile.row),
      right(layer, place.position, order, place.tile.column);
  const auto fetch = [&](int at) {
    down.fetch(width - at - mine);
    if (!place.same) right.fetch(width - at - mine);
  };
  const auto put = [&](unsigned char* to, int at) {
    const int left = width - at - mine;
    double mean[4], rest[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      mean[e] = e < left ? means[e] : 0.0;
      rest[e] = e < left ? means[behind + e] : 0.0;
    }
    means += kStep;
    down.put(reinterpret_cast<double*>(to), mean, rest, left);
    if (!place.same) right.put(reinterpret_cast<double*>(to + How::kStrip), mean, rest, left);
  };
  sums.clear();
  fetch(0);
  put(shared, 0);
  __syncthreads();
  for (int at = 0; at < width; at += kStep) {
    const bool more = at + kStep < width;
    const unsigned char* now = shared + at / kStep % 2 * 2 * How::kStrip;
    unsigned char* next = shared + (at / kStep + 1) % 2 * 2 * How::kStrip;
    if (more) fetch(at + kStep);
    const unsigned char* beside = place.same ? now : now + How::kStrip;
    if (whole)
      How::template multiply<true>(sums, now, beside, place.top, place.left, {});
    else
      How::template multiply<false>(sums, now, beside, place.top, place.left, shape);
    if (more) put(next, at + kStep);
    __syncthreads();
  }
}

// Calls `take(k, value)` for the thread's entries, zero unless above the diagonal.
template <class T, class Take>
__device__ __forceinline__ void each(const typename moments::Exact<T>::Sums& sums, const Place& place,
                                     const Take& take) {
  using How = moments::Exact<T>;
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const bool above = place.top + How::row(i, e, lane) < place.left + How::column(j, e, lane);
        take(16 * i + 4 * j + e, !place.same || above ? sums.value(i, j, e) : 0.0);
      }
}

// Tiles of pairs of strips from `first` on, `count` of them, of all layers at positions from `start` on:
// to[positions of the grid, layers, apart, kTile].
template <class T>
__device__ void grams(const std::int64_t* table, std::int64_t positions, std::int64_t rows,
                      std::int64_t groups, std::int64_t start, std::int64_t first, std::int64_t count,
                      std::int64_t apart, double* to) {
  const std::int64_t here = blockIdx.x / count, pair = blockIdx.x % count;
  const Place place(start + here, first + pair);
  typename moments::Exact<T>::Sums sums;
  gram<T>(sums, layer_at(table, blockIdx.y), place, positions, {rows, groups},
          shared_memory<unsigned char>());
  double* tile = to + ((here * gridDim.y + blockIdx.y) * apart + pair) * kTile + place.first();
  each<T>(sums, place, [tile](int k, double value) { tile[k * kThreads] = value; });
}

// to[tiles, positions, layers, 2]: of every layer's tile the sum of squares, and that of products with the
// layer after it. A block goes through `run` layers and the one after them.
template <class T>
__device__ void near(const std::int64_t* table, std::int64_t positions, std::int64_t layers,
                     std::int64_t rows, std::int64_t groups, std::int64_t tiles, std::int64_t run,
                     double* to) {
  const Place place(blockIdx.x / tiles, blockIdx.x % tiles);
  auto* shared = shared_memory<unsigned char>();
  auto* before = reinterpret_cast<double*>(shared + kGramShared) + place.first();
  auto* warps = reinterpret_cast<double*>(shared + kGramShared + kBefore);
  double* out = to + (place.pair * positions + place.position) * layers * 2;
  const std::int64_t first = blockIdx.y * run, end = first + run < layers ? first + run : layers;
#pragma unroll 1
  for (std::int64_t layer = first; layer < end + (end < layers ? 1 : 0); ++layer) {
    typename moments::Exact<T>::Sums sums;
    gram<T>(sums, layer_at(table, layer), place, positions, {rows, groups}, shared);
    double own = 0.0, both = 0.0;
    each<T>(sums, place, [&](int k, double value) {
      own = fma(value, value, own);
      if (layer > first) both = fma(value, before[k * kThreads], both);
      before[k * kThreads] = value;
    });
    own = block_sum(own, warps);
    both = block_sum(both, warps);
    if (threadIdx.x != 0) continue;
    if (layer < end) out[2 * layer] = own;
    if (layer > first) out[2 * layer - 1] = both;
    if (layer + 1 == layers && layer < end) out[2 * layer + 1] = 0.0;
  }
}

// Products of layers, summed over kSpan entries of the tiles that `grams` has put `from`, `count` of `apart`:
// to[spans, positions, layers, layers] from position `start` on, added to what is there with `add`. A block
// has kGroup layers down and kGroup across, of pairs of such groups that are not below the diagonal; each of
// its warps takes a quarter of the entries.
//
// Lanes read two neighboring entries of a layer each, straight from memory: those of 8 layers are a right
// operand of an mma and half of a left one, twice, since any four entries may be multiplied at once.
__device__ inline void inner(const double* from, std::int64_t layers, std::int64_t count, std::int64_t apart,
                             std::int64_t positions, std::int64_t start, std::int64_t add, double* to) {
  const Tile at = moments::tile_at(blockIdx.y, 0, true);
  const bool same = at.row == at.column;
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const std::int64_t spans = count * (kTile / kSpan), here = blockIdx.x / spans, span = blockIdx.x % spans;
  const std::int64_t layer = apart * kTile;  // from one to the next
  const double* entries =
      from + here * layers * layer + span * kSpan + warp * (kSpan / kWarps) + lane % 4 * 2 + lane / 4 * layer;
  const double* down = entries + at.row * kGroup * layer;
  const double* across = entries + at.column * kGroup * layer;
  const auto left = [layers](std::int64_t group) {
    return static_cast<int>(layers - group * kGroup < kGroup ? layers - group * kGroup : kGroup);
  };
  const int high = left(at.row), wide = left(at.column);
  const auto fetch = [lane, layer](double2(&rows)[4], const double* first, int size) {
#pragma unroll
    for (int k = 0; k < 4; ++k)
      if (8 * k + lane / 4 < size) rows[k] = *reinterpret_cast<const double2*>(first + 8 * k * layer);
  };
  // Whether anything of 16 layers down and 8 across is wanted.
  const auto wanted = [=](int i, int j) {
    return 16 * i < high && 8 * j < wide && !(same && i == 1 && j < 2);
  };

  double sums[2][4][4] = {};
  double2 a[4] = {}, b[4] = {}, next_a[4] = {}, next_b[4] = {};
  fetch(next_a, down, high);
  if (!same) fetch(next_b, across, wide);
#pragma unroll 1
  for (int step = 0; step < kSpan / kWarps; step += 8) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      a[k] = next_a[k];
      b[k] = same ? next_a[k] : next_b[k];
    }
    down += 8;
    across += 8;
    if (step + 8 < kSpan / kWarps) {
      fetch(next_a, down, high);
      if (!same) fetch(next_b, across, wide);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (!wanted(i, j)) continue;
        const double first[2] = {a[2 * i].x, a[2 * i + 1].x}, second[2] = {a[2 * i].y, a[2 * i + 1].y};
        const double right[2][1] = {{b[j].x}, {b[j].y}};
        mma_m16n8k4(sums[i][j], first, right[0]);
        mma_m16n8k4(sums[i][j], second, right[1]);
      }
  }

  auto* shared = shared_memory<double>();
#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int r = 16 * i + lane / 4 + e / 2 * 8, c = 8 * j + lane % 4 * 2 + e % 2;
        shared[(warp * kGroup + r) * kGroup + c] = sums[i][j][e];
      }
  __syncthreads();
  double* out = to + (span * positions + start + here) * layers * layers + at.row * kGroup * layers +
                at.column * kGroup;
  for (int index = static_cast<int>(threadIdx.x); index < kGroup * kGroup; index += kThreads) {
    const int r = index / kGroup, c = index % kGroup;
    if (r >= high || c >= wide || (same && r > c)) continue;
    const auto part = [&](int k) { return shared[k * kGroup * kGroup + index]; };
    const double sum = (part(0) + part(1)) + (part(2) + part(3));
    double& value = out[r * layers + c];
    value = add != 0 ? value + sum : sum;
  }
}

}  // namespace rgfast::cuda::cka
