// The moments of all positions together, Σ_p T_p' M_p T'_p, from those of each: M = Σ z_x z_y' of extended
// rows z = [x, |x|^2, 1], [d + 2, e + 2], and T of a move of x by left_p, of y by right_p. All M are read
// once.
//
// A block takes 32 rows of a pair's x at all positions and every column of y, four rows a warp. What all rows
// or columns add to - the last two of either - is left in parts, which the second kernel adds in their order.
#include "cuda/common/warp.cuh"

namespace rgfast::cuda::moments {

inline constexpr int kPoolWarps = 8;
inline constexpr int kPoolThreads = 32 * kPoolWarps;
inline constexpr int kPoolEach = 4;  // rows of a warp
inline constexpr int kPoolRows = kPoolEach * kPoolWarps;
inline constexpr int kPooledWords = 4;
inline constexpr int kOfPosition = 5;

// rgfast/ops/moments/pooling.py launches with these numbers.
static_assert(kPoolThreads == 256 && kPoolRows == 32 && kPooledWords == 4 && kOfPosition == 5);

// A pair: moments[positions, d + 2, e + 2], moves left[positions, d] and right[positions, e], and out[d + 2,
// e + 2].
struct Pooled {
  const double *moments, *left, *right;
  double* out;
};

__device__ inline Pooled pooled_at(const std::int64_t* table, std::int64_t k) {
  const std::int64_t* word = table + k * kPooledWords;
  return {reinterpret_cast<const double*>(word[0]), reinterpret_cast<const double*>(word[1]),
          reinterpret_cast<const double*>(word[2]), reinterpret_cast<double*>(word[3])};
}

// The entries of rows and columns of features. out[i, e] gets what M and right give Σ x_i |y + right|^2,
// once, and parts[pairs, blocks, e + 1] what left and M give Σ |x + left|^2 y_j, and all three together.
__device__ inline void pool(const std::int64_t* table, std::int64_t positions, std::int64_t d, std::int64_t e,
                            double* parts) {
  const Pooled pair = pooled_at(table, blockIdx.y);
  auto* shared = shared_memory<double>();
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const std::int64_t stride = e + 2, size = (d + 2) * stride;
  const std::int64_t first = std::int64_t{blockIdx.x} * kPoolRows + warp * kPoolEach;
  double* part = parts + (std::int64_t{blockIdx.y} * gridDim.x + blockIdx.x) * (e + 1);
  double dot[kPoolEach] = {}, corner = 0.0;
  for (std::int64_t begin = 0; begin < e; begin += 32) {
    const std::int64_t j = begin + lane;
    double sum[kPoolEach] = {}, column = 0.0;
    for (std::int64_t p = 0; j < e && p < positions; ++p) {
      const double* moment = pair.moments + p * size;
      const double* last = moment + (d + 1) * stride;
      const double right = pair.right[p * e + j], moved = fma(last[e + 1], right, last[j]);
#pragma unroll
      for (int r = 0; r < kPoolEach; ++r) {
        const std::int64_t i = first + r;
        if (i >= d) continue;
        const double* row = moment + i * stride;
        const double entry = row[j], left = pair.left[p * d + i], product = entry * right;
        sum[r] = fma(left, moved, fma(row[e + 1], right, sum[r] + entry));
        dot[r] += product;
        column = fma(left, entry, column);
        corner = fma(left, product, corner);
      }
    }
#pragma unroll
    for (int r = 0; r < kPoolEach; ++r)
      if (j < e && first + r < d) pair.out[(first + r) * stride + j] = sum[r];
    shared[warp * 32 + lane] = column;
    __syncthreads();
    if (warp == 0 && j < e) {
      double all = shared[lane];
      for (int k = 1; k < kPoolWarps; ++k) all += shared[k * 32 + lane];
      part[j] = all;
    }
    __syncthreads();
  }
#pragma unroll
  for (int r = 0; r < kPoolEach; ++r) {
    const double all = sum_of_warp(dot[r]);
    if (lane == 0 && first + r < d) pair.out[(first + r) * stride + e] = all;
  }
  corner = sum_of_warp(corner);
  if (lane == 0) shared[warp] = corner;
  __syncthreads();
  if (threadIdx.x == 0) {
    double all = shared[0];
    for (int k = 1; k < kPoolWarps; ++k) all += shared[k];
    part[e] = all;
  }
}

// The last two rows and columns of a pair, of which there is a block.
__device__ inline void pool_ends(const std::int64_t* table, std::int64_t positions, std::int64_t d,
                                 std::int64_t e, std::int64_t blocks, const double* parts) {
  const Pooled pair = pooled_at(table, blockIdx.x);
  auto* shared = shared_memory<double>();
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
  const std::int64_t stride = e + 2, size = (d + 2) * stride;
  const double* mine = parts + std::int64_t{blockIdx.x} * blocks * (e + 1);
  double* out = pair.out;
  // Of every position: Σ|x|^2 + 2 left Σ x, |left|^2, the same of y, and its share of the last corner but
  // one.
  for (std::int64_t p = thread / 32; p < positions; p += kPoolWarps) {
    const double* moment = pair.moments + p * size;
    const double *squares = moment + d * stride, *last = squares + stride;
    double with_left = 0.0, left_square = 0.0, left_norms = 0.0;
    for (std::int64_t i = lane; i < d; i += 32) {
      const double left = pair.left[p * d + i];
      with_left = fma(left, moment[i * stride + e + 1], with_left);
      left_norms = fma(left, moment[i * stride + e], left_norms);
      left_square = fma(left, left, left_square);
    }
    double with_right = 0.0, right_square = 0.0, right_norms = 0.0;
    for (std::int64_t j = lane; j < e; j += 32) {
      const double right = pair.right[p * e + j];
      with_right = fma(right, last[j], with_right);
      right_norms = fma(right, squares[j], right_norms);
      right_square = fma(right, right, right_square);
    }
    with_left = sum_of_warp(with_left);
    left_square = sum_of_warp(left_square);
    left_norms = sum_of_warp(left_norms);
    with_right = sum_of_warp(with_right);
    right_square = sum_of_warp(right_square);
    right_norms = sum_of_warp(right_norms);
    if (lane != 0) continue;
    double* to = shared + p * kOfPosition;
    const double of_x = squares[e + 1], of_y = last[e], count = last[e + 1];
    to[0] = of_x + 2.0 * with_left;
    to[1] = left_square;
    to[2] = of_y + 2.0 * with_right;
    to[3] = right_square;
    to[4] = squares[e] + 2.0 * right_norms + right_square * of_x +
            2.0 * (left_norms + right_square * with_left) + left_square * (to[2] + right_square * count);
  }
  __syncthreads();
  for (std::int64_t j = thread; j < e; j += kPoolThreads) {
    double ones = 0.0, norms = 0.0, apart = 0.0;
    for (std::int64_t p = 0; p < positions; ++p) {
      const double* squares = pair.moments + p * size + d * stride;
      const double right = pair.right[p * e + j], *of = shared + p * kOfPosition;
      const double moved = fma(squares[stride + e + 1], right, squares[stride + j]);
      ones += moved;
      norms += fma(of[1], moved, fma(of[0], right, squares[j]));
    }
    for (std::int64_t block = 0; block < blocks; ++block) apart += mine[block * (e + 1) + j];
    out[d * stride + j] = fma(2.0, apart, norms);
    out[(d + 1) * stride + j] = ones;
  }
  for (std::int64_t i = thread; i < d; i += kPoolThreads) {
    double ones = 0.0, norms = 0.0;
    for (std::int64_t p = 0; p < positions; ++p) {
      const double* moment = pair.moments + p * size;
      const double left = pair.left[p * d + i], *of = shared + p * kOfPosition;
      const double moved = fma(moment[(d + 1) * stride + e + 1], left, moment[i * stride + e + 1]);
      ones += moved;
      norms += fma(of[3], moved, fma(of[2], left, moment[i * stride + e]));
    }
    out[i * stride + e] = fma(2.0, out[i * stride + e], norms);
    out[i * stride + e + 1] = ones;
  }
  if (thread != 0) return;
  double of_x = 0.0, of_y = 0.0, both = 0.0, all = 0.0, apart = 0.0;
  for (std::int64_t p = 0; p < positions; ++p) {
    const double count = pair.moments[p * size + size - 1], *of = shared + p * kOfPosition;
    of_x += fma(of[1], count, of[0]);
    of_y += fma(of[3], count, of[2]);
    both += of[4];
    all += count;
  }
  for (std::int64_t block = 0; block < blocks; ++block) apart += mine[block * (e + 1) + e];
  out[d * stride + e] = fma(4.0, apart, both);
  out[d * stride + e + 1] = of_x;
  out[(d + 1) * stride + e] = of_y;
  out[(d + 1) * stride + e + 1] = all;
}

}  // namespace rgfast::cuda::moments

extern "C" __global__ void __launch_bounds__(256, 2)
    rgfast_moments_pool(const std::int64_t* table, std::int64_t positions, std::int64_t left,
                        std::int64_t right, double* parts) {
  rgfast::cuda::moments::pool(table, positions, left, right, parts);
}

extern "C" __global__ void __launch_bounds__(256, 2)
    rgfast_moments_pool_ends(const std::int64_t* table, std::int64_t positions, std::int64_t left,
                             std::int64_t right, std::int64_t blocks, const double* parts) {
  rgfast::cuda::moments::pool_ends(table, positions, left, right, blocks, parts);
}
