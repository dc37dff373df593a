// What a panel's reflectors do to the rest of a matrix.
#pragma once

#include "cuda/spectrum_band_parts.cuh"

namespace rgfast::cuda::spectrum {

template <int Warps>
struct Products : BandParts<Warps> {
  using Parts = BandParts<Warps>;
  using Parts::column;
  using Parts::kThreads;
  using Parts::lane;
  using Parts::load_left;
  using Parts::load_right;
  using Parts::space;
  using Parts::thread;
  using Parts::warp;
  using Parts::work;

  static constexpr int kEach = kBlock < kThreads ? 1 : kBlock / kThreads;  // of a block, by a thread

  // A -= V W' + W V' of the last panel, if there is one, in the rows and columns from `first` on, else its
  // scale, and U = A V of the next, which is in the panel. Each warp has 16 rows, all go through the columns
  // together, and what they have for rows of the same number as those columns is added up at once, in an
  // order that does not change. C of a product is A of the next with its columns in another order, in which
  // the rows of V are taken, too; so are the columns of V and W.
  __device__ __forceinline__ void update_and_multiply(int first, int m, const double* last,
                                                      double down) const {
    constexpr int kBuffers = BandSpace<Warps>::kBuffers;
    const int g = lane / 4, t = lane % 4, below = 8 * work.rows, blocks = m / kHalfWidth;
    // Of a block of 8 x 8 that is turned: where a value comes from.
    const int source = 8 * t + 4 * (g % 2) + g / 2;
    const bool updates = last != nullptr;
    int turn = 0;
#pragma unroll 1
    for (int begin = (blocks - 1) % Warps + 1 - Warps; begin < blocks; begin += Warps) {
      const int own = begin + warp;  // before the first: none
      double left[2][8], across[2][4], u[2][4] = {};
      double* at = nullptr;
      const double* others = nullptr;
      Pair ahead[2] = {};  // a tile
      if (own >= 0) {
        const int row = kHalfWidth * own;
        if (updates) {
          load_left(last, row, left);
          others = last + 2 * lane;
        }
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const Pair v = pair_at(&column(8 * (e % 2) + g, row + 8 * (e / 2) + 2 * t));
          across[e / 2][e % 2] = v.even;
          across[e / 2][2 + e % 2] = v.odd;
        }
        at = &work.at(first + row, first) + 2 * lane;
        ahead[0] = pair_at(at);
        ahead[1] = pair_at(at + below);
      }
#pragma unroll 1
      for (int to = 0; to < begin + Warps; ++to, turn = (turn + 1) % kBuffers) {
        double* const part = space.products[turn * Warps + warp];
        double* const sums = work.product + kBlock * to;
        if (to <= own) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            double c[4] = {ahead[0].even, ahead[0].odd, ahead[1].even, ahead[1].odd};
            if (to < own || half == 0) {
              ahead[0] = pair_at(at + kTile);
              ahead[1] = pair_at(at + kTile + below);
            }
            if (updates) {
#pragma unroll
              for (int which = 0; which < 2; ++which) {
                double right[4];
                load_right(others, which, right);
                mma_m16n8k16(c, left[which], right);
              }
              others += 8 * kStride;
            } else {
#pragma unroll
              for (int e = 0; e < 4; ++e) c[e] *= down;
            }
            pair_at(at) = {c[0], c[1]};
            pair_at(at + below) = {c[2], c[3]};
            at += kTile;
            const double a[4] = {c[0], c[2], c[1], c[3]};
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              const Pair v = pair_at(&column(8 * e + g, kHalfWidth * to + 8 * half + 2 * t));
              const double b[2] = {v.even, v.odd};
              mma_m16n8k8(u[e], a, b);
            }
            if (to < own) {  // V' of the rows, and the columns as rows
              double sum_of_rows[4] = {};
#pragma unroll
              for (int lower = 0; lower < 2; ++lower) {
                const double* values = c + 2 * lower;
                const bool odd = (source & 4) != 0;
                const double one = __shfl_sync(kFullWarp, odd ? values[1] : values[0], source);
                const double other = __shfl_sync(kFullWarp, odd ? values[0] : values[1], source ^ 4);
                const double turned[2] = {odd ? other : one, odd ? one : other};
                mma_m16n8k8(sum_of_rows, across[lower], turned);
              }
#pragma unroll
              for (int e = 0; e < 2; ++e)
                pair_at(part + (2 * half + e) * kTile + 2 * lane) = {sum_of_rows[2 * e],
                                                                     sum_of_rows[2 * e + 1]};
            }
          }
          if (to == own) {
#pragma unroll
            for (int e = 0; e < 8; ++e)
              part[(e / 2 % 2 * 2 + e / 4) * kTile + 8 * (2 * t + e % 2) + g] = u[e / 4][e % 4];
          }
        }
        __syncthreads();
#pragma unroll
        for (int e = thread, each = 0; each < kEach; e += kThreads, ++each) {
          if (e >= kBlock) continue;
          double& all = sums[(e & ~63) + 8 * (e % 8) + e / 8 % 8];  // turned in tiles
          const double before = to < begin ? all : 0.0;
          double sum = 0;
#pragma unroll
          for (int from = 0; from < Warps; ++from)
            if (begin + from >= to) sum += space.products[turn * Warps + from][e];
          all = before + sum;
        }
        if constexpr (kBuffers == 1) __syncthreads();
      }
    }
  }

  // W beside V in `next`.
  __device__ __forceinline__ void finish(int m, double* next) const {
    const int g = lane / 4, t = lane % 4, c = thread % kHalfWidth;
    double gram[2][4] = {};
#pragma unroll 1
    for (int row = 8 * warp; row < m; row += 8 * Warps) {
      const Pair low = pair_at(&column(g, row + 2 * t)), high = pair_at(&column(8 + g, row + 2 * t));
      const double a[4] = {low.even, high.even, low.odd, high.odd};
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const double* u = work.product + tiled(row + 2 * t, 8 * half + g, kHalfWidth);
        const double b[2] = {u[0], u[8]};
        mma_m16n8k8(gram[half], a, b);
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        space.products[warp][(g + e / 2 * 8) * kHalfWidth + 8 * half + 2 * t + e % 2] = gram[half][e];
    __syncthreads();
    double small[kEach] = {};  // of V'U T
    if (thread < kBlock) {
#pragma unroll
      for (int each = 0; each < kEach; ++each) {
        double sum = 0, product = 0;
#pragma unroll
        for (int from = 0; from < Warps; ++from) sum += space.products[from][thread + each * kThreads];
#pragma unroll
        for (int j = 0; j < kHalfWidth; ++j)  // T is zero below its diagonal
          product =
              fused(__shfl_sync(kFullWarp, sum, j, kHalfWidth), space.factor[j * kHalfWidth + c], product);
        small[each] = product;
      }
    }
    __syncthreads();
    if (thread < kBlock) {
#pragma unroll
      for (int each = 0; each < kEach; ++each) space.products[0][thread + each * kThreads] = small[each];
    }
    __syncthreads();
    if (thread < kBlock) {
#pragma unroll
      for (int each = 0; each < kEach; ++each) {
        const int r = (thread + each * kThreads) / kHalfWidth;
        double sum = 0;
#pragma unroll
        for (int j = 0; j < kHalfWidth; ++j)
          sum = fused(space.factor[j * kHalfWidth + r], space.products[0][j * kHalfWidth + c], sum);
        space.products[1][thread + each * kThreads] = -0.5 * sum;
      }
    }
    __syncthreads();
    double right[2][2][4];
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int from = (8 * (e / 2) + 2 * t + e % 2) * kHalfWidth + 8 * half + g;
        right[0][half][e] = space.factor[from];
        right[1][half][e] = space.products[1][from];
      }
#pragma unroll 1
    for (int row = kHalfWidth * warp; row < m; row += kHalfWidth * Warps) {
      double left[2][8];
      load_left(work.product, row, kHalfWidth, 1.0, left[0]);
      load_left(next, row, kStride, 1.0, left[1]);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        double w[4] = {};
        mma_m16n8k16(w, left[0], right[0][half]);
        mma_m16n8k16(w, left[1], right[1][half]);
#pragma unroll
        for (int lower = 0; lower < 2; ++lower)
          pair_at(next + tiled(row + 8 * lower, kHalfWidth + 8 * half, kStride) + 2 * lane) = {
              w[2 * lower], w[2 * lower + 1]};
      }
    }
  }
};

}  // namespace rgfast::cuda::spectrum
