// What spectrum.cpp hands to the code of one instruction set.
#pragma once

#include <cstddef>

namespace rgfast::spectrum {

// Up to `group` * kGroups matrices, each with its own place to read from and write to.
template <class T>
struct EigenTask {
  const T* a;
  T* values;
  const long long* offsets;         // of each matrix, in elements from a
  const long long* values_offsets;  // of each result
  int count;
  long long n;
  long long row_stride;
  long long column_stride;
  long long values_stride;
  unsigned char* trouble;  // one per matrix: a Trouble
  void* workspace;
};

template <class T>
struct EigenKernels {
  int lanes;   // matrices in one group
  int groups;  // groups in one task
  std::size_t (*lanes_workspace)(long long n);
  void (*lanes_run)(const EigenTask<T>& task);
};

}  // namespace rgfast::spectrum
