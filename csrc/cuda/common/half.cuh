// fp16 and bf16 as their bits, without CUDA's headers for them. Conversion to float is exact, from float
// rounds to the nearest, ties to even.
#pragma once

#include "cuda/common/device.cuh"

namespace rgfast::cuda {

struct Half {
  std::uint16_t bits;
};
struct Bfloat16 {
  std::uint16_t bits;
};

// Two numbers in a register of an mma operand, the one with the smaller index in the low half.
struct HalfPair {
  std::uint32_t bits;
};
struct Bfloat16Pair {
  std::uint32_t bits;
};

__host__ __device__ __forceinline__ HalfPair pair(Half low, Half high) {
  return {static_cast<std::uint32_t>(high.bits) << 16 | low.bits};
}
__host__ __device__ __forceinline__ Bfloat16Pair pair(Bfloat16 low, Bfloat16 high) {
  return {static_cast<std::uint32_t>(high.bits) << 16 | low.bits};
}

#ifdef __CUDACC__

__device__ __forceinline__ float to_float(Half x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}
__device__ __forceinline__ float to_float(Bfloat16 x) {
  return __uint_as_float(static_cast<std::uint32_t>(x.bits) << 16);
}
__device__ __forceinline__ Half to_half(float x) {
  Half y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
}
__device__ __forceinline__ Bfloat16 to_bfloat16(float x) {
  Bfloat16 y;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
}

#else

inline float to_float(Bfloat16 x) { return __uint_as_float(static_cast<std::uint32_t>(x.bits) << 16); }

inline float to_float(Half x) {
  const int exponent = x.bits >> 10 & 31, fraction = x.bits & 1023;
  float y;
  if (exponent == 31)
    y = fraction == 0 ? INFINITY : NAN;
  else
    y = exponent == 0 ? std::ldexp(static_cast<float>(fraction), -24)
                      : std::ldexp(static_cast<float>(fraction + 1024), exponent - 25);
  return (x.bits & 0x8000) != 0 ? -y : y;
}

inline Half to_half(float x) {
  const unsigned sign = __float_as_uint(x) >> 16 & 0x8000U;
  const double size = std::fabs(static_cast<double>(x));
  unsigned bits;
  if (std::isnan(x)) {
    bits = 0x7fff;
  } else if (size >= 65520.0) {
    bits = 0x7c00;
  } else {
    // Below 2^-14 the spacing is 2^-24; the bits then count up to the first normal number by themselves.
    const int exponent = size < std::ldexp(1.0, -14) ? -14 : std::ilogb(size);
    const auto steps = static_cast<unsigned>(std::nearbyint(std::ldexp(size, 10 - exponent)));
    bits = static_cast<unsigned>(exponent + 14) * 1024U + steps;
  }
  return {static_cast<std::uint16_t>(sign | bits)};
}

inline Bfloat16 to_bfloat16(float x) {
  const unsigned bits = __float_as_uint(x);
  if (std::isnan(x)) return {0x7fff};
  return {static_cast<std::uint16_t>((bits + 0x7fffU + (bits >> 16 & 1U)) >> 16)};
}

#endif

}  // namespace rgfast::cuda
