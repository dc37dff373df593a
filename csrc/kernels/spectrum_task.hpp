// What spectrum.cpp hands to the code of one instruction set.
#pragma once

#include <cstddef>

#include "rgfast/view.hpp"

namespace rgfast::spectrum {

// The eigenvectors of a task's matrices whose eigenvalues are no less than `share` of the largest. Of matrix
// i the first from[i] rows of vectors + i * size are there already: so many eigenvalues, the least, are not
// looked at, and the rows that follow are written, to whole strides. Where all that are looked at are as
// large, none is.
//
// With doubt >= 0 those alone whose effective rank the eigenvalues may not tell to that, of a rank of no more
// than `most`, and of these not those where `few` eigenvalues or fewer lie far below all others: the vectors
// of the few cost less.
struct LeadingTask {
  double share;
  double doubt;
  long long most;
  long long few;
  double* vectors;
  long long size;
  long long stride;
  const long long* from;
  long long* count;  // vectors written
  double* residual;  // the norm of A V - V Lambda
};

// Up to `groups` groups of matrices, each with its own place to write to. They are read from a at their own
// offsets; or, with `fill`, a group at a time from the same `lanes` offsets, after fill(context, first,
// count) has put matrices first, first + 1, ... there. With `raw` (and `fill`, which then puts rows of n into
// `means` too), the eigenvalues of a + mean mean' go there, at the same offsets.
template <class T>
struct EigenTask {
  const T* a;
  T* values;
  T* raw;
  const T* means;
  const long long* offsets;         // of each matrix, in elements from a
  const long long* values_offsets;  // of each result
  int count;
  long long n;
  long long row_stride;
  long long column_stride;
  long long values_stride;
  unsigned char* trouble;  // one per matrix: a Trouble
  void* workspace;
  void (*fill)(void* context, int first, int count);
  // Or fills the lanes themselves: packed lower triangles, and n vectors of means unless null.
  void (*fill_lanes)(void* context, int first, int count, T* packed, T* means);
  void* context;
  const LeadingTask* leading;      // fp64 alone; or null
  const LeadingTask* leading_raw;  // the same of raw ones; or null
};

// One matrix to tridiagonal form: `diagonal` and `off_squared`, n entries each, of the matrix times
// 2^-exponent.
template <class T>
struct SingleTask {
  const T* a;  // null where the workspace begins with the lower triangle, column-major, already
  long long n;
  long long row_stride;
  long long column_stride;
  long long stride;  // of the columns in the workspace
  T* diagonal;
  T* off_squared;
  int* exponent;
  const T* mean;  // n entries that a first reflection takes to the first axis, or null
  T* square;      // their squared norm out
  void* workspace;
};

// Eigenvalues of up to `groups` groups of tridiagonal matrices as SingleTask leaves them, one after another;
// with `raw`, of those with their square in the first corner too, and of half as many.
template <class T>
struct TridiagonalTask {
  const T* diagonal;
  const T* off_squared;
  const int* exponents;
  const T* squares;
  T* values;
  T* raw;
  const long long* values_offsets;
  int count;
  long long n;
  long long values_stride;
  unsigned char* trouble;
  void* workspace;
  bool alone;  // one matrix, solved without lanes
};

template <class T>
struct EigenKernels {
  int lanes;   // matrices in one group
  int groups;  // groups in one task
  std::size_t (*lanes_workspace)(long long n);
  void (*lanes_run)(const EigenTask<T>& task);
  std::size_t (*leading_workspace)(long long n, int groups);  // with leading eigenvectors
  long long (*single_stride)(long long n);
  std::size_t (*single_workspace)(long long n, long long stride);
  void (*single_run)(const SingleTask<T>& task);
  std::size_t (*tridiagonal_workspace)(long long n);
  void (*tridiagonal_run)(const TridiagonalTask<T>& task);
};

template <class T>
EigenKernels<T> active_eigen_kernels();

// The second moment of x[n, d] or, unless `tall`, of its transpose where that is smaller, as x'x in fp64.
struct GramTask {
  const void* x;
  const void* next;  // where the data of the task after this begin, of the same sizes, or null
  DType dtype;
  long long n;
  long long d;
  long long row_stride;
  long long column_stride;
  bool centred;
  bool tall;
  double* c;         // lower triangle, column-major; what is above it is written too, and means nothing
  long long stride;  // of its columns, at least GramKernels::stride(m)
  double* mean;      // d column means out, or nullptr
  // Taken off every row first, if centred, and then no part of the mean; nullptr for the first row, which is.
  const double* origin;
  // Stage after stage, ends[s] vectors in all by the end of stage s, orthonormal ones, whose directions are
  // taken out of every term before the sum: what is accumulated is then the trace alone.
  const double* project;
  long long project_stride;  // whole vectors, zeros beyond m
  const long long* ends;
  int stages;
  void* workspace;
};

struct GramResult {
  double accumulated;    // squared norm of all that was summed: not finite exactly where x is not
  int exponent;          // the data were taken times 2^-exponent
  long long rank_limit;  // what the rank cannot exceed
};

// Centred moments of the groups of n samples that `sizes` tells, [groups, d, stride], and their means
// [groups, d] off an origin, which become deviations from the mean of all. Out: that of all, `whole`
// [d, stride] and `mean`.
struct PooledMoments {
  const double* parts;
  const double* origin;
  double* means;
  const long long* sizes;
  long long groups;
  long long n;
  long long d;
  long long stride;
  long long size;  // elements from part to part
  double* whole;
  double* mean;
  double between;  // what the means add to the trace, out
};

// Moments of as many small matrices as a vector has lanes, x[lane] being where each begins and `shared` all
// else that they have in common: packed lower triangles, one per lane; means [d] likewise, or null. Sums are
// of n terms in a row.
struct SmallTask {
  GramTask shared;
  const void* const* x;
  double* packed;
  double* means;
  GramResult* results;
};

struct GramKernels {
  long long (*stride)(long long m);
  std::size_t (*workspace)(const GramTask& task);
  GramResult (*run)(const GramTask& task);
  void (*first_row)(const GramTask& task, double* row);
  void (*pool)(PooledMoments& all);
  // The moment c [d, stride] and the mean of all samples but those of a group.
  void (*leave_out)(const PooledMoments& all, long long group, double* c, double* mean);
  std::size_t (*small_workspace)(long long n, long long d);
  void (*run_small)(const SmallTask& task);
};

GramKernels active_gram_kernels();

}  // namespace rgfast::spectrum
