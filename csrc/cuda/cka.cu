// Kernels of CKA; the headers say what they compute. `table` is that of moments.cu without units: of a
// layer's shift [2, positions, width], norms [positions, rows] and, with groups, tops (cka.cuh) these kernels
// write what stands there. Of a pair, in place of its sums, there are the pairs of each of its layers with
// itself; by samples, in place of the first of its tiles, its place among the products of layers.
#include "cuda/cka_finish.cuh"
#include "cuda/cka_groups.cuh"
#include "cuda/cka_samples.cuh"

// Blocks on a multiprocessor of squares, and without groups: fp64 rows need more registers than 168 there.
#define RGFAST_CKA(name, T, blocks, without)                                                          \
  extern "C" __global__ void __launch_bounds__(128) rgfast_cka_centers_##name(                        \
      const std::int64_t* table, std::int64_t positions, std::int64_t rows, std::int64_t chunks) {    \
    rgfast::cuda::cka::centers<T>(table, positions, rows, chunks);                                    \
  }                                                                                                   \
  extern "C" __global__ void __launch_bounds__(128)                                                   \
      rgfast_cka_norms_##name(const std::int64_t* table, std::int64_t positions, std::int64_t rows) { \
    rgfast::cuda::cka::norms<T>(table, positions, rows);                                              \
  }                                                                                                   \
  extern "C" __global__ void __launch_bounds__(128, blocks)                                           \
      rgfast_cka_squares_##name(const std::int64_t* table, std::int64_t layers, std::int64_t pairs,   \
                                std::int64_t tiles, std::int64_t rows, double* squares) {             \
    rgfast::cuda::moments::tiles<rgfast::cuda::moments::Exact, T, true>(                              \
        {table, layers, pairs, tiles, rows, {nullptr, 0, 0}, 0, 0, 0, squares});                      \
  }                                                                                                   \
  extern "C" __global__ void __launch_bounds__(128, 3) rgfast_cka_grams_##name(                       \
      const std::int64_t* table, std::int64_t positions, std::int64_t rows, std::int64_t groups,      \
      std::int64_t start, std::int64_t first, std::int64_t count, std::int64_t apart, double* to) {   \
    rgfast::cuda::cka::grams<T>(table, positions, rows, groups, start, first, count, apart, to);      \
  }                                                                                                   \
  extern "C" __global__ void __launch_bounds__(128, 3) rgfast_cka_near_##name(                        \
      const std::int64_t* table, std::int64_t positions, std::int64_t layers, std::int64_t rows,      \
      std::int64_t groups, std::int64_t tiles, std::int64_t run, double* to) {                        \
    rgfast::cuda::cka::near<T>(table, positions, layers, rows, groups, tiles, run, to);               \
  }                                                                                                   \
  extern "C" __global__ void __launch_bounds__(128) rgfast_cka_group_sums_##name(                     \
      const std::int64_t* table, std::int64_t rows, std::int64_t chunks, std::int64_t groups) {       \
    rgfast::cuda::cka::group_sums<T>(table, rows, chunks, groups);                                    \
  }                                                                                                   \
  extern "C" __global__ void __launch_bounds__(128) rgfast_cka_group_products_##name(                 \
      const std::int64_t* table, std::int64_t positions, std::int64_t rows, std::int64_t groups) {    \
    rgfast::cuda::cka::products_with_groups<T>(table, positions, rows, groups);                       \
  }                                                                                                   \
  extern "C" __global__ void __launch_bounds__(128, without) rgfast_cka_left_out_##name(              \
      const std::int64_t* table, std::int64_t layers, std::int64_t pairs, std::int64_t tiles,         \
      std::int64_t rows, std::int64_t groups, double* squares) {                                      \
    rgfast::cuda::cka::left_out<T>(table, layers, pairs, tiles, rows, groups, squares);               \
  }

RGFAST_CKA(float64, double, 3, 2)
RGFAST_CKA(float32, float, 3, 3)
RGFAST_CKA(bfloat16, rgfast::cuda::Bfloat16, 3, 3)
RGFAST_CKA(float16, rgfast::cuda::Half, 3, 3)
#undef RGFAST_CKA

extern "C" __global__ void __launch_bounds__(128)
    rgfast_cka_sums(const std::int64_t* table, std::int64_t layers, std::int64_t pairs, std::int64_t tiles,
                    std::int64_t rows, std::int64_t groups, std::int64_t samples, const double* squares,
                    double* to) {
  rgfast::cuda::cka::sums(table, layers, pairs, tiles, rows, groups, samples, squares,
                          reinterpret_cast<rgfast::cuda::cka::PairSums*>(to));
}

extern "C" __global__ void __launch_bounds__(128, 3)
    rgfast_cka_inner(const double* from, std::int64_t layers, std::int64_t count, std::int64_t apart,
                     std::int64_t positions, std::int64_t start, std::int64_t add, double* to) {
  rgfast::cuda::cka::inner(from, layers, count, apart, positions, start, add, to);
}

extern "C" __global__ void __launch_bounds__(128)
    rgfast_cka_collect(const double* from, std::int64_t first, std::int64_t count, std::int64_t spans,
                       std::int64_t here, std::int64_t entries, std::int64_t strips, std::int64_t start,
                       std::int64_t add, double* to) {
  rgfast::cuda::cka::collect(from, first, count, spans, here, entries, strips, start, add, to);
}

extern "C" __global__ void __launch_bounds__(128)
    rgfast_cka_finish(const std::int64_t* table, std::int64_t layers, std::int64_t first, std::int64_t pairs,
                      std::int64_t start, std::int64_t positions, std::int64_t task, std::int64_t debiased,
                      const double* one, std::int64_t one_count, std::int64_t one_rows, double one_weight,
                      const double* other, std::int64_t other_count, std::int64_t other_rows,
                      double other_weight, double* to, std::int64_t* faults) {
  using rgfast::cuda::cka::PairSums;
  rgfast::cuda::cka::finish(
      {table,
       layers,
       first,
       pairs,
       start,
       positions,
       task,
       debiased,
       {{reinterpret_cast<const PairSums*>(one), one_count, one_rows, one_weight},
        {reinterpret_cast<const PairSums*>(other), other_count, other_rows, other_weight}},
       to,
       faults});
}
