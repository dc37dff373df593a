// What moments.cpp hands to the code of one instruction set.
#pragma once

#include "rgfast/view.hpp"

namespace rgfast::moments {

// Rows whose products are summed in registers before the sum is added to a moment.
inline constexpr long long kTerms = 128;

// Up to kTerms rows of one layer into panels [feature / lanes][term][lanes] of (x - shift) * unit, then a
// panel whose first two lanes are |z|^2 and 1, then the |z|^2 again, side by side.
struct PackJob {
  const void* x;  // [count, width]
  DType dtype;
  long long row_stride;
  long long column_stride;
  long long width;
  const double* shift;
  double unit;                // a power of two
  const unsigned char* keep;  // null to keep all
  long long keep_stride;
  long long count;
  double* panels;
  double* row;  // scratch, one row
};

// moment += left' right for the rows of `moment` in the panels [first, last) of `left`, extended columns
// included; the task with the last panel has the extended rows as well. `same` says that both sides are one
// layer: what is above the diagonal is copied to what is below.
struct ProductJob {
  const double* left;
  const double* right;
  long long left_width;
  long long right_width;
  long long terms;
  bool same;
  long long first;
  long long last;
  double* moment;  // [left_width + 2, right_width + 2]
};

struct Kernels {
  long long (*panels)(long long width);
  long long (*layer)(long long width);    // doubles that a packed layer takes
  long long (*pack)(const PackJob& job);  // returns the number of rows kept
  void (*multiply)(const ProductJob& job);
};

}  // namespace rgfast::moments
