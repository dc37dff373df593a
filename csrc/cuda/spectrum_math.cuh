// Scalars of the eigenvalue kernels: scales, inverses, reflectors. The host compiles them too.
#pragma once

#include <cmath>

#include "cuda/common/exponents.cuh"

namespace rgfast::cuda::spectrum {

template <class T>
struct Limits;
template <>
struct Limits<double> : Format<double> {
  static constexpr double unit = 0x1p-53;
  static constexpr double largest = 0x1.fffffffffffffp+1023;
  static constexpr double infinity = __builtin_huge_val();
  static constexpr double nothing = __builtin_nan("");
  static constexpr double negligible = 1e-280;  // square of a column beside entries near 1
  static constexpr int scale = 1000;
};
template <>
struct Limits<float> : Format<float> {
  static constexpr float unit = 0x1p-24F;
  static constexpr float largest = 0x1.fffffep+127F;
  static constexpr float infinity = __builtin_huge_valf();
  static constexpr float nothing = __builtin_nanf("");
  static constexpr float negligible = 1e-30F;
  static constexpr int scale = 120;
};

__host__ __device__ __forceinline__ double fused(double a, double b, double c) { return fma(a, b, c); }
__host__ __device__ __forceinline__ float fused(float a, float b, float c) { return fmaf(a, b, c); }
__host__ __device__ __forceinline__ double magnitude(double a) { return fabs(a); }
__host__ __device__ __forceinline__ float magnitude(float a) { return fabsf(a); }
template <class T>
__host__ __device__ __forceinline__ T larger(T a, T b) {
  return a > b ? a : b;
}
template <class T>
__host__ __device__ __forceinline__ T smaller(T a, T b) {
  return a < b ? a : b;
}

// 1 where the signs differ. A zero has one, too.
template <class T>
__host__ __device__ __forceinline__ int signs_differ(T a, T b) {
  return static_cast<int>((bits_of(a) ^ bits_of(b)) >> (8 * sizeof(T) - 1));
}

// The exponent that a matrix is scaled by whose largest magnitude this is: its entries then are less than 4,
// and both powers are normal numbers.
template <class T>
__host__ __device__ __forceinline__ int scale_of(T largest) {
  constexpr int kLeast = -Limits<T>::scale, kMost = Limits<T>::bias - 1;
  const int e = exponent_of(largest);
  return e < kLeast ? kLeast : e > kMost ? kMost : e;
}

// 1/sqrt(a) and 1/a to a unit in the last place or so, for normal a. The device's approximations have 20 and
// more bits; one step of third order makes 60 of them. On the host a seed that is as far off stands for them.
__host__ __device__ __forceinline__ double inverse_root(double a) {
#ifdef __CUDA_ARCH__
  double y;
  asm("rsqrt.approx.ftz.f64 %0, %1;" : "=d"(y) : "d"(a));
#else
  double y = (1 + 5e-7) / std::sqrt(a);
#endif
  const double rest = fma(-a * y, y, 1.0);
  return fma(y * rest, fma(rest, 0.375, 0.5), y);
}
__host__ __device__ __forceinline__ double inverse(double a) {
#ifdef __CUDA_ARCH__
  double y;
  asm("rcp.approx.ftz.f64 %0, %1;" : "=d"(y) : "d"(a));
#else
  double y = (1 - 5e-7) / a;
#endif
  const double rest = fma(-a, y, 1.0);
  return fma(y, fma(rest, rest, rest), y);
}
__host__ __device__ __forceinline__ float inverse_root(float a) {
#ifdef __CUDA_ARCH__
  return __frsqrt_rn(a);
#else
  return static_cast<float>(1.0 / std::sqrt(static_cast<double>(a)));
#endif
}
__host__ __device__ __forceinline__ float inverse(float a) {
#ifdef __CUDA_ARCH__
  return __frcp_rn(a);
#else
  return 1.0F / a;
#endif
}

// H = 1 - tau u u' takes a column (lead, x) to (value, 0), with u = (1, inverse x).
template <class T>
struct Reflector {
  T value, inverse, tau;
};

// The reflector of a column with `lead` on top and the squared norm `rest` below. Nothing is subtracted from
// something of its own size. A column of nothing but zeros stays: H = 1.
template <class T>
__host__ __device__ __forceinline__ Reflector<T> reflector(T lead, T rest) {
  const bool any = rest > Limits<T>::negligible;
  const T square = fused(lead, lead, rest);
  const T root = any ? inverse_root(square) : T(0);
  const T norm = square * root;
  Reflector<T> found;
  found.value = !any ? lead : lead >= T(0) ? -norm : norm;
  found.inverse = any ? inverse(lead - found.value) : T(0);
  found.tau = any ? fused(magnitude(lead), root, T(1)) : T(0);
  return found;
}

}  // namespace rgfast::cuda::spectrum
