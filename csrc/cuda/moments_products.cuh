// How 16 rows of two strips of 64 columns stand in shared memory, and how four warps multiply them.
//
// A thread stages four columns of rows k and k + 8. A warp multiplies 32 columns from `top` on by 32 from
// `left` on, in two blocks of 16 by four of 8.
#pragma once

#include "cuda/common/mma.cuh"
#include "cuda/moments_math.cuh"
#include "cuda/moments_rows.cuh"

namespace rgfast::cuda::moments {

// Which blocks are multiplied, unless it is all: this many down and to the right, of the second down those
// from `skip`.
struct Shape {
  int high, wide, skip;
};

// fp64 products of exactly widened rows.
//
// Two neighboring columns of a row are the two numbers that m16n8k4 takes on the left, and one each of two
// blocks on the right: one 128-bit load, without a move between registers. A block's columns are therefore
// not neighbors, which `row` and `column` undo. Rows are 66 numbers apart, one 128-bit bank more than a whole
// line: the same columns of eight rows are stored, and two columns of rows 0, 2, 4 and 6 are loaded, without
// a conflict.
template <class T>
struct Exact {
  using Mover = Widened<T>;
  static constexpr int kApart = kSide + 2;
  static constexpr int kStrip = kStep * kApart * 8;

  struct Sums {
    double total[2][4][4];

    __device__ void clear() {
      for (auto& row : total)
        for (auto& block : row)
          for (double& x : block) x = 0.0;
    }
    __device__ void settle() {}
    __device__ double value(int i, int j, int e) const { return total[i][j][e]; }
  };

  // Of the moment's entry e of block i, j.
  __device__ static int row(int i, int e, int lane) { return 16 * i + lane / 4 * 2 + e / 2; }
  __device__ static int column(int j, int e, int lane) {
    return j / 2 * 16 + lane % 4 * 4 + e % 2 * 2 + j % 2;
  }

  __device__ static void put(unsigned char* strip, int column, int k, const double (&y)[2][4]) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      auto* to = reinterpret_cast<double2*>(strip) + ((k + 8 * h) * kApart + column) / 2;
      to[0] = make_double2(y[h][0], y[h][1]);
      to[1] = make_double2(y[h][2], y[h][3]);
    }
  }

  template <bool Whole>
  __device__ __forceinline__ static void multiply(Sums& sums, const unsigned char* down,
                                                  const unsigned char* right, int top, int left,
                                                  Shape shape) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int first = lane % 4 * kApart + lane / 4;  // in pairs: rows 0, 2, 4 and 6
#pragma unroll 1
    for (int k = 0; k < 4; ++k) {
      const int at = first + (k % 2 + k / 2 * 8) * kApart / 2;
      double a[2][2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const double2 two = reinterpret_cast<const double2*>(down)[at + top / 2 + 8 * i];
        a[i][0] = two.x;
        a[i][1] = two.y;
      }
#pragma unroll
      for (int j = 0; j < 4; j += 2) {
        if (!Whole && j >= shape.wide) continue;
        const double2 two = reinterpret_cast<const double2*>(right)[at + left / 2 + 4 * j];
        const double b[2][1] = {{two.x}, {two.y}};
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          if (Whole || shape.high > 0) mma_m16n8k4(sums.total[0][j + n], a[0], b[n]);
          if (Whole || (shape.high > 1 && j + n >= shape.skip)) mma_m16n8k4(sums.total[1][j + n], a[1], b[n]);
        }
      }
    }
  }
};

// Products of numbers split into two fp16 numbers each: high low + low high + high high, in fp32 for 64 rows,
// since tensor cores truncate what they add to, and in pairs of fp32 numbers between.
//
// A column has 64 bytes: eight pairs of rows k and k + 8, high before low. Of two columns in a line of banks
// the places are exchanged in every other group of four, so that a store of every fourth column has no
// conflict.
template <class T>
struct Split {
  using Mover = Narrowed<T>;
  static constexpr int kStrip = kSide * 64;

  struct Sums {
    float fresh[2][4][4], total[2][4][4], rest[2][4][4];
    int steps;

    __device__ void clear() {
      steps = 0;
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j)
#pragma unroll
          for (int e = 0; e < 4; ++e) fresh[i][j][e] = total[i][j][e] = rest[i][j][e] = 0.0F;
    }
    __device__ void settle() {
      steps = 0;
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j)
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            add_exactly(total[i][j][e], rest[i][j][e], fresh[i][j][e]);
            fresh[i][j][e] = 0.0F;
          }
    }
    __device__ double value(int i, int j, int e) const {
      return static_cast<double>(total[i][j][e]) + static_cast<double>(rest[i][j][e]);
    }
  };

  __device__ static int row(int i, int e, int lane) { return 16 * i + lane / 4 + e / 2 * 8; }
  __device__ static int column(int j, int e, int lane) { return 8 * j + lane % 4 * 2 + e % 2; }

  // Of a pair of rows, in bytes.
  __device__ static int place(int column, int k) {
    return column / 2 * 128 + ((column ^ column >> 2) & 1) * 64 + k * 8;
  }

  __device__ static void put(unsigned char* strip, int column, int k, const float (&y)[2][4]) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const Halves one = split(y[0][e]), other = split(y[1][e]);
      *reinterpret_cast<uint2*>(strip + place(column + e, k)) =
          make_uint2(pair(one.high, other.high).bits, pair(one.low, other.low).bits);
    }
  }

  // Two pairs of rows of a column, high and low of each.
  __device__ static uint4 four(const unsigned char* strip, int column, int t) {
    return *reinterpret_cast<const uint4*>(strip + place(column, 2 * t));
  }

  template <bool Whole>
  __device__ __forceinline__ static void multiply(Sums& sums, const unsigned char* down,
                                                  const unsigned char* right, int top, int left,
                                                  Shape shape) {
    const int lane = static_cast<int>(threadIdx.x) % 32, group = lane / 4, t = lane % 4;
    HalfPair a[2][2][4];  // by block, high or low
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint4 upper = four(down, top + 16 * i + group, t),
                  lower = four(down, top + 16 * i + 8 + group, t);
      a[i][0][0] = {upper.x};
      a[i][0][1] = {lower.x};
      a[i][0][2] = {upper.z};
      a[i][0][3] = {lower.z};
      a[i][1][0] = {upper.y};
      a[i][1][1] = {lower.y};
      a[i][1][2] = {upper.w};
      a[i][1][3] = {lower.w};
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (!Whole && j >= shape.wide) continue;
      const uint4 rest = four(right, left + 8 * j + group, t);
      const HalfPair b[2][2] = {{{rest.x}, {rest.z}}, {{rest.y}, {rest.w}}};
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (!Whole && (i >= shape.high || (i == 1 && j < shape.skip))) continue;
        mma_m16n8k16(sums.fresh[i][j], a[i][0], b[1]);
        mma_m16n8k16(sums.fresh[i][j], a[i][1], b[0]);
        mma_m16n8k16(sums.fresh[i][j], a[i][0], b[0]);
      }
    }
    if (++sums.steps == kFresh) sums.settle();
  }
};

}  // namespace rgfast::cuda::moments
