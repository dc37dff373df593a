// Eigenvalues of many symmetric matrices.
#pragma once

#include <cstddef>
#include <cstdint>

#include "rgfast/view.hpp"

namespace rgfast::spectrum {

enum class Trouble : int { none = 0, not_finite = 1, not_converged = 2 };

// The first matrix in trouble.
struct Status {
  std::int64_t index = -1;
  Trouble trouble = Trouble::none;
};

// Ascending eigenvalues of a[..., d, d] (fp64 or fp32; the lower triangle is read) into values[..., d] of
// the same dtype. Values of a matrix in trouble are NaN.
Status eigvalsh(const View& a, const View& values, int threads);

// Bytes of scratch that a thread takes for it.
std::size_t eigvalsh_workspace(DType dtype, std::int64_t d);

}  // namespace rgfast::spectrum
