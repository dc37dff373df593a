// What module.cpp calls, one function per binding file, and what those files share.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "rgfast/view.hpp"

namespace rgfast::bind {

void register_cka(pybind11::module_& m);
void register_cuda(pybind11::module_& m);
void register_moments(pybind11::module_& m);
void register_runtime(pybind11::module_& m);
void register_residual_mlp(pybind11::module_& m);
void register_spectrum(pybind11::module_& m);

// How Python passes a tensor: data_ptr(), shape, stride() and the dtype code, as one tuple (native.py's
// `tensor()` makes it). Throws std::invalid_argument, which becomes ValueError.
using Tensor = std::tuple<std::uintptr_t, std::vector<std::int64_t>, std::vector<std::int64_t>, int>;

inline View view(const Tensor& tensor, const char* name, int least_dims) {
  const auto& [pointer, sizes, strides, code] = tensor;
  const std::string prefix(name);
  if (code < 0 || code > static_cast<int>(DType::f16))
    throw std::invalid_argument(prefix + " must have a dtype code from 0 to 3, got " + std::to_string(code));
  if (sizes.size() != strides.size())
    throw std::invalid_argument(prefix + " must have as many strides as sizes, got " +
                                std::to_string(strides.size()) + " and " + std::to_string(sizes.size()));
  if (sizes.size() < static_cast<std::size_t>(least_dims) || sizes.size() > kMaxDims)
    throw std::invalid_argument(prefix + " must have from " + std::to_string(least_dims) + " to " +
                                std::to_string(kMaxDims) + " dimensions, got " +
                                std::to_string(sizes.size()));
  View found;
  found.data = reinterpret_cast<std::byte*>(pointer);
  found.dtype = static_cast<DType>(code);
  found.ndim = static_cast<int>(sizes.size());
  bool empty = false;
  for (const std::int64_t size : sizes) {
    if (size < 0)
      throw std::invalid_argument(prefix + " must have no negative size, got " + std::to_string(size));
    empty = empty || size == 0;
  }
  if (pointer == 0 && !empty) throw std::invalid_argument(prefix + " must not be a null pointer");
  std::copy(sizes.begin(), sizes.end(), found.sizes.begin());
  std::copy(strides.begin(), strides.end(), found.strides.begin());
  return found;
}

inline int checked_threads(int threads) {
  if (threads < 1) throw std::invalid_argument("threads must be at least 1, got " + std::to_string(threads));
  return threads;
}

}  // namespace rgfast::bind
