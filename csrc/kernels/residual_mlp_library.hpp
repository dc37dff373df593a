// The residual block with its products done by a BLAS that the process has already, its entry points handed
// over at run time. Everything between the products, and which thread does which of them, is ours: products
// are cut into tiles that follow from the shape alone, each done by one thread, so that neither the bits nor
// the order of a sum depends on how many threads there are.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/residual_mlp.hpp"

namespace rgfast::residual_mlp {

// Fortran's GEMM, column by column. Dimensions are read through pointers, so that 64-bit variables below 2^31
// are right for libraries with 32-bit integers too, on machines that store the low half first.
using Sgemm = void (*)(const char* trans_a, const char* trans_b, const std::int64_t* m, const std::int64_t* n,
                       const std::int64_t* k, const float* alpha, const float* a, const std::int64_t* lda,
                       const float* b, const std::int64_t* ldb, const float* beta, float* c,
                       const std::int64_t* ldc);

// MKL's way of packing a factor once for several products, which have to have the sizes named then.
// identifier: A or B, as the factor is called in sgemm; compute takes P for a packed one's transposition.
using PackSize = std::size_t (*)(const char* identifier, const std::int64_t* m, const std::int64_t* n,
                                 const std::int64_t* k);
using Pack = void (*)(const char* identifier, const char* trans, const std::int64_t* m, const std::int64_t* n,
                      const std::int64_t* k, const float* alpha, const float* source, const std::int64_t* ld,
                      float* packed);
using Compute = void (*)(const char* trans_a, const char* trans_b, const std::int64_t* m,
                         const std::int64_t* n, const std::int64_t* k, const float* a,
                         const std::int64_t* lda, const float* b, const std::int64_t* ldb, const float* beta,
                         float* c, const std::int64_t* ldc);

struct Library {
  Sgemm sgemm;
  // How many threads the library may use for calls from this thread, 0 for its own choice; returns what was
  // set before.
  int (*set_threads)(int);
  // All three, bytes from the first, or none.
  PackSize pack_size = nullptr;
  Pack pack = nullptr;
  Compute compute = nullptr;
};

// Whether small products come out right, and the number of threads is set and given back.
bool works(const Library& library);

// As `forward` and `backward` of residual_mlp.hpp, for blocks that do not mix positions.
void library_forward(const Library& library, const Block& block, float* y, int threads);
void library_backward(const Library& library, const Block& block, const float* dy, const Gradients& gradients,
                      int threads);

// What lies between the products, compiled for the active instruction set. Matrices are row by row with
// `stride` floats between rows; sums over rows are added to fp64 sums, whole vectors of them.
struct Bodies {
  std::int64_t lanes;
  // norm(x) of rows [row, row + rows) into out, with what was subtracted and the factor unless null. Whole
  // vectors are written.
  void (*normalise)(const Block& block, std::int64_t row, std::int64_t rows, float* out, std::int64_t stride,
                    float* shifts, float* factors);
  // h = act(u + b1) for the units [unit, unit + units), u and h being those of `unit`. In place if need be.
  void (*activate)(const Block& block, const float* u, std::int64_t u_stride, std::int64_t rows,
                   std::int64_t unit, std::int64_t units, float* h, std::int64_t h_stride);
  // y = x + scale (y + b2) for rows [row, row + rows), y being all of the output, and columns likewise.
  void (*finish)(const Block& block, std::int64_t row, std::int64_t rows, std::int64_t column,
                 std::int64_t columns, float* y);
  // out = scale dy unless out is null, and its column sums onto `sums`. dy is [rows][width].
  void (*scale)(const Block& block, const float* dy, std::int64_t rows, float* out, std::int64_t stride,
                double* sums);
  // h = act(u + b1) and du *= act'(u + b1); the column sums of the latter onto `sums`.
  void (*activate_backward)(const Block& block, const float* u, std::int64_t u_stride, std::int64_t rows,
                            std::int64_t unit, std::int64_t units, float* h, std::int64_t h_stride, float* du,
                            std::int64_t du_stride, double* sums);
  // dx of rows [row, row + rows) from dz, the gradient of norm(x), with zeros up to whole vectors. x, dy and
  // dx are all of them; dz, shifts and factors are those of `row`. The sums are what the norm's parameters
  // get.
  void (*normalise_backward)(const Block& block, const float* dy, std::int64_t row, std::int64_t rows,
                             const float* dz, std::int64_t stride, const float* shifts, const float* factors,
                             double* weight_sums, double* bias_sums, float* scratch, float* dx);
};

Bodies library_bodies();

}  // namespace rgfast::residual_mlp
