// Exponents of floating-point numbers and powers of two, by their bits. The host compiles them too.
#pragma once

#include <cstdint>
#include <cstring>

#include "cuda/common/device.cuh"

namespace rgfast::cuda {

template <class T>
struct Format;
template <>
struct Format<double> {
  using Bits = std::uint64_t;
  static constexpr int mantissa = 52, bias = 1023;
};
template <>
struct Format<float> {
  using Bits = std::uint32_t;
  static constexpr int mantissa = 23, bias = 127;
};

template <class T>
__host__ __device__ __forceinline__ typename Format<T>::Bits bits_of(T a) {
  typename Format<T>::Bits bits;
  memcpy(&bits, &a, sizeof bits);
  return bits;
}

// The e of |a| = 2^e m with 1 <= m < 2; -bias for zero and what is below the normal numbers.
template <class T>
__host__ __device__ __forceinline__ int exponent_of(T a) {
  constexpr int kMask = 2 * Format<T>::bias + 1;
  return (static_cast<int>(bits_of(a) >> Format<T>::mantissa) & kMask) - Format<T>::bias;
}

// 2^e, the nearest that is a normal number.
template <class T>
__host__ __device__ __forceinline__ T power_of_two(int e) {
  constexpr int kBias = Format<T>::bias;
  e = e < 1 - kBias ? 1 - kBias : e > kBias ? kBias : e;
  const auto bits = static_cast<typename Format<T>::Bits>(e + kBias) << Format<T>::mantissa;
  T power;
  memcpy(&power, &bits, sizeof power);
  return power;
}

}  // namespace rgfast::cuda
