// Second and cross moments of the rows of layers, position by position: sum += z_l' z_m over rows, with
// z = [y, |y|^2, 1] or y alone and y = (x - shift) unit.
//
// A block of four warps takes a tile of 64 x 64 entries of one moment of one position. It stages 16 rows of
// both strips of columns at a time: loaded into registers while the rows before are multiplied, then widened,
// shifted and stored where the operands of an mma are read in 128-bit loads. |y|^2 and 1 are columns like
// others, the first from a kernel that has passed over the rows. Which of the 16 rows stands in which slot of
// an mma does not matter, as long as both operands agree.
//
// Every entry is summed in the order of the rows, 1,024 of them apart before they are added: its bits depend
// on the rows of its own position alone. Either a block goes through all rows, or a block of the grid each
// takes 1,024 and `rgfast_moments_gather` adds what they have. If only the sum of squares of a moment is
// wanted (cka.cu), all rows are summed in registers, and a tile leaves one number.
#pragma once

#include "cuda/moments_products.cuh"

namespace rgfast::cuda::moments {

struct Pair {
  std::int64_t left, right, first;  // layers, and the first of its tiles
  double* sum;                      // [positions, columns of left, columns of right]
  double* apart;                    // the same of every 1,024 rows, or null
};

inline constexpr int kPairWords = 5;

// Shared memory: two stages of two strips, or a tile whose rows have one number of padding, then the plan.
inline constexpr int kPadded = kSide + 1;
inline constexpr int kArea = 4 * Exact<float>::kStrip;  // 33,792
static_assert(kArea >= kSide * kPadded * 8 && kArea >= 4 * Split<float>::kStrip);

__device__ inline Pair pair_at(const std::int64_t* table, std::int64_t layers, std::int64_t k) {
  const std::int64_t* word = table + layers * kLayerWords + k * kPairWords;
  return {word[0], word[1], word[2], reinterpret_cast<double*>(word[3]), reinterpret_cast<double*>(word[4])};
}

// What a block's threads share: what they load, and where their sums go.
struct Plan {
  std::int64_t pair;
  Strip strip[2];             // down the tile, and to the right of it
  double* sum;                // the tile's first entry
  double* mirror;             // that of the tile on the other side of the diagonal, or null
  std::int64_t stride;        // of a row of the moment
  const unsigned char* mask;  // of the position's rows, or null
  std::int64_t same;          // whether the tile is on the diagonal, and both strips are one
};

// rgfast/ops/moments/tiles.py and impl/cuda.py launch with these numbers.
inline constexpr int kShared = kArea + sizeof(Plan);
static_assert(kShared == 34016 && kSide == 64 && kBlock == 1024 && kThreads == 128);
static_assert(kLayerWords == 9 && kPairWords == 5);

struct Work {
  const std::int64_t* table;
  std::int64_t layers, pairs, tiles, rows;
  Keep keep;
  std::int64_t extras, add, spread;
  double* squares = nullptr;  // [positions, tiles], for sums of squares
};

// Looks for the pair that the block's tile belongs to, all threads together, and lays out its work.
template <class T, bool Squared>
__device__ void make_plan(const Work& work, int most, Plan& plan) {
  const std::int64_t position = blockIdx.x / work.tiles, tile = blockIdx.x % work.tiles;
  for (std::int64_t k = threadIdx.x; k < work.pairs; k += kThreads) {
    const std::int64_t* word = work.table + work.layers * kLayerWords + k * kPairWords;
    if (word[2] <= tile && (k + 1 == work.pairs || tile < word[kPairWords + 2])) plan.pair = k;
  }
  __syncthreads();
  if (threadIdx.x < 2) {
    const Pair pair = pair_at(work.table, work.layers, plan.pair);
    const Layer left = layer_at(work.table, pair.left), right = layer_at(work.table, pair.right);
    const bool own = pair.left == pair.right;
    const std::int64_t high = left.width + work.extras, wide = right.width + work.extras;
    const Tile at = tile_at(tile - pair.first, strips(wide), own);
    const std::int64_t row = at.row * kSide, column = at.column * kSide;
    plan.strip[threadIdx.x] = threadIdx.x == 0
                                  ? strip_at<T>(left, position, work.rows, row, work.extras, most)
                                  : strip_at<T>(right, position, work.rows, column, work.extras, most);
    if (Squared && threadIdx.x == 0) {
      plan.sum = work.squares + blockIdx.x;
      plan.mirror = own ? plan.sum : nullptr;
      plan.stride = 0;
      plan.mask = nullptr;
      plan.same = own && row == column;
    } else if (threadIdx.x == 0) {
      double* sum =
          (pair.apart == nullptr ? pair.sum : pair.apart + blockIdx.y * work.spread) + position * high * wide;
      plan.sum = sum + row * wide + column;
      plan.mirror = own ? sum + column * wide + row : nullptr;
      plan.stride = wide;
      plan.mask = work.keep.mask == nullptr ? nullptr : work.keep.mask + position * work.keep.position_stride;
      plan.same = own && row == column;
    }
  }
  __syncthreads();
}

// Of the quarter that begins at these columns of a tile of so many, `same` if it is on the diagonal. What is
// below the diagonal is a copy.
__device__ inline Shape shape_of(bool same, int high, int wide, int top, int left) {
  const auto blocks = [](int columns, int size, int most) {
    return columns <= 0 ? 0 : columns > size * most ? most : (columns + size - 1) / size;
  };
  const bool below = same && top > left, on = same && top == left;
  return {below ? 0 : blocks(high - top, 16, 2), blocks(wide - left, 8, 4), on ? 2 : 0};
}

template <class How>
__device__ __forceinline__ void stage(unsigned char* to, const Strip& strip, const typename How::Mover& mover,
                                      int column, int k, std::int64_t row, const bool (&kept)[2]) {
  using Mover = typename How::Mover;
  using Number = typename Mover::Number;
  Number y[2][4];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const Number number = mover.number(strip, h, e);
      y[h][e] = kept[h] ? number : Number{0};
    }
    if (strip.body >= kSide || strip.body == strip.columns) continue;
    const Number norm = Mover::norm(strip, kept[h] && strip.body >= 0 ? strip.norms[row + 8 * h] : 0.0);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if (column + e == strip.body) y[h][e] = norm;
      if (column + e == strip.body + 1) y[h][e] = kept[h] ? Number{1} : Number{0};
    }
  }
  How::put(to, column, k, y);
}

// Puts the sum of squares of the entries of a tile, of those with a mirror image twice, in an order that no
// block's number decides.
template <class How>
__device__ __forceinline__ void put_squares(const typename How::Sums& sums, const Plan& plan, double* shared,
                                            int top, int left) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const bool same = plan.same != 0, own = plan.mirror != nullptr;
  double sum = 0.0;
#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int r = top + How::row(i, e, lane), c = left + How::column(j, e, lane);
        if (r >= plan.strip[0].columns || c >= plan.strip[1].columns || (same && r > c)) continue;
        const double value = sums.value(i, j, e);
        sum = fma(own && !(same && r == c) ? 2.0 * value : value, value, sum);
      }
#pragma unroll
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(kFullWarp, sum, step);
  if (lane == 0) shared[top / 16 + left / 32] = sum;
  __syncthreads();
  if (threadIdx.x == 0) *plan.sum = (shared[0] + shared[1]) + (shared[2] + shared[3]);
}

template <template <class> class Product, class T, bool Squared = false>
__device__ void tiles(const Work& work) {
  using How = Product<T>;
  using Mover = typename How::Mover;
  auto* shared = shared_memory<unsigned char>();
  auto* tile = reinterpret_cast<double*>(shared);
  auto& plan = *reinterpret_cast<Plan*>(shared + kArea);
  make_plan<T, Squared>(work, Mover::kMost, plan);

  // Which quarter of the tile a warp multiplies differs from block to block, since not all quarters have as
  // much to do and the warps of the same number of all blocks on a multiprocessor share a tensor core.
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
  const int quarter = (thread / 32 + static_cast<int>(blockIdx.x >> 2)) & 3;
  const int top = quarter / 2 * 32, left = quarter % 2 * 32;
  const bool same = plan.same != 0;
  const bool whole =
      plan.strip[0].columns >= top + 32 && plan.strip[1].columns >= left + 32 && !(same && top >= left);

  // Eight neighboring lanes take two rows each, and lanes eight apart other columns.
  const int k = lane % 8, column = 4 * (lane / 8 + thread / 32 * 4);
  std::int64_t first = blockIdx.y * kBlock;
  Mover down(plan.strip[0], column, first + k), right(plan.strip[1], column, first + k);
  do {
    const std::int64_t rest = work.rows - first;
    const int count = static_cast<int>(Squared || rest < kBlock ? rest : kBlock);
    bool kept[2];
    const auto fetch = [&](int at) {
      for (int h = 0; h < 2; ++h)
        kept[h] = at + 8 * h < count &&
                  (plan.mask == nullptr || plan.mask[(first + at + 8 * h) * work.keep.row_stride] != 0);
      down.fetch(plan.strip[0], column, count - at);
      if (plan.same == 0) right.fetch(plan.strip[1], column, count - at);
    };
    const auto put = [&](unsigned char* to, int at) {
      stage<How>(to, plan.strip[0], down, column, k, first + at, kept);
      if (plan.same == 0) stage<How>(to + How::kStrip, plan.strip[1], right, column, k, first + at, kept);
    };
    typename How::Sums sums;
    sums.clear();
    fetch(k);
    put(shared, k);
    __syncthreads();
    for (int at = 0; at < count; at += kStep) {
      const bool more = at + kStep < count;
      const unsigned char* now = shared + at / kStep % 2 * 2 * How::kStrip;
      unsigned char* next = shared + (at / kStep + 1) % 2 * 2 * How::kStrip;
      if (more) fetch(at + kStep + k);
      const unsigned char* beside = plan.same != 0 ? now : now + How::kStrip;
      if (whole)
        How::template multiply<true>(sums, now, beside, top, left, {});
      else
        How::template multiply<false>(
            sums, now, beside, top, left,
            shape_of(same, plan.strip[0].columns, plan.strip[1].columns, top, left));
      if (more) put(next, at + kStep + k);
      __syncthreads();
    }
    sums.settle();
    if constexpr (Squared) {
      put_squares<How>(sums, plan, tile, top, left);
      return;
    }

    // Through shared memory, so that both the tile and its mirror image are written row by row.
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e)
          tile[(top + How::row(i, e, lane)) * kPadded + left + How::column(j, e, lane)] = sums.value(i, j, e);
    __syncthreads();
    const int down_end = plan.strip[0].columns, right_end = plan.strip[1].columns;
    const bool onto = work.spread == 0 && (work.add != 0 || first > 0);
    for (int at = thread; at < kSide * kSide; at += kThreads) {
      const int r = at / kSide, c = at % kSide;
      if (r >= down_end || c >= right_end || (same && r > c)) continue;
      double* entry = plan.sum + r * plan.stride + c;
      double& value = tile[r * kPadded + c];
      value = value * Mover::scale(plan.strip[0], r) * Mover::scale(plan.strip[1], c);
      if (onto) value += *entry;
      *entry = value;
    }
    __syncthreads();
    if (plan.mirror != nullptr)
      for (int at = thread; at < kSide * kSide; at += kThreads) {
        const int r = at % kSide, c = at / kSide;
        if (r < down_end && c < right_end && !(same && r >= c))
          plan.mirror[c * plan.stride + r] = tile[r * kPadded + c];
      }
    __syncthreads();
    first += kBlock;
  } while (work.spread == 0 && first < work.rows);
}

}  // namespace rgfast::cuda::moments
