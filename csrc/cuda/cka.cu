// Kernels of CKA; cka.cuh and cka_samples.cuh say what they compute. `table` is that of moments.cu, without
// units, tops and sums: of a layer's shift [2, positions, width] and norms [positions, rows] these kernels
// write what stands there.
#include "cuda/cka_samples.cuh"

#define RGFAST_CKA(name, T, blocks)                                                                   \
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
      const std::int64_t* table, std::int64_t positions, std::int64_t rows, std::int64_t start,       \
      std::int64_t first, std::int64_t count, std::int64_t apart, double* to) {                       \
    rgfast::cuda::cka::grams<T>(table, positions, rows, start, first, count, apart, to);              \
  }                                                                                                   \
  extern "C" __global__ void __launch_bounds__(128, 3)                                                \
      rgfast_cka_near_##name(const std::int64_t* table, std::int64_t positions, std::int64_t layers,  \
                             std::int64_t rows, std::int64_t tiles, std::int64_t run, double* to) {   \
    rgfast::cuda::cka::near<T>(table, positions, layers, rows, tiles, run, to);                       \
  }

RGFAST_CKA(float64, double, 3)
RGFAST_CKA(float32, float, 3)
RGFAST_CKA(bfloat16, rgfast::cuda::Bfloat16, 3)
RGFAST_CKA(float16, rgfast::cuda::Half, 3)
#undef RGFAST_CKA

extern "C" __global__ void __launch_bounds__(128)
    rgfast_cka_sums(const std::int64_t* table, std::int64_t layers, std::int64_t pairs, std::int64_t tiles,
                    std::int64_t rows, const double* squares, double* to) {
  rgfast::cuda::cka::sums(table, layers, pairs, tiles, rows, squares, to);
}

extern "C" __global__ void __launch_bounds__(128, 3)
    rgfast_cka_inner(const double* from, std::int64_t layers, std::int64_t count, std::int64_t apart,
                     std::int64_t positions, std::int64_t start, std::int64_t add, double* to) {
  rgfast::cuda::cka::inner(from, layers, count, apart, positions, start, add, to);
}
