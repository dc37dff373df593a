// Exact widening to fp64, a value, a vector or a row at a time. No include guard: see foreach_target.hpp.

namespace rgfast {
namespace RGFAST_NS {

inline double widen_half(unsigned short h) {
  const unsigned exponent = (h >> 10) & 31U;
  const unsigned wide = exponent == 31U ? 0x7F800000U | ((h & 1023U) << 13) : (h & 0x7FFFU) << 13;
  float value;
  __builtin_memcpy(&value, &wide, sizeof value);
  const double scaled = exponent == 31U ? static_cast<double>(value) : static_cast<double>(value) * 0x1p112;
  return (h & 0x8000U) != 0 ? -scaled : scaled;
}

inline double widen_brain(unsigned short h) {
  const unsigned wide = static_cast<unsigned>(h) << 16;
  float value;
  __builtin_memcpy(&value, &wide, sizeof value);
  return static_cast<double>(value);
}

// row[j] = x[j * stride] * scale, exactly: scale is a power of two, and 1 but for fp64.
inline void widen_row(const void* x, DType dtype, long long stride, long long count, double scale,
                      double* __restrict row) {
  if (dtype == DType::f64) {
    const double* const from = static_cast<const double*>(x);
    if (stride == 1)
      for (long long j = 0; j < count; ++j) row[j] = from[j] * scale;
    else
      for (long long j = 0; j < count; ++j) row[j] = from[j * stride] * scale;
  } else if (dtype == DType::f32) {
    const float* const from = static_cast<const float*>(x);
    if (stride == 1)
      for (long long j = 0; j < count; ++j) row[j] = static_cast<double>(from[j]);
    else
      for (long long j = 0; j < count; ++j) row[j] = static_cast<double>(from[j * stride]);
  } else {
    const unsigned short* const from = static_cast<const unsigned short*>(x);
    if (dtype == DType::bf16)
      for (long long j = 0; j < count; ++j) row[j] = widen_brain(from[j * stride]);
    else
      for (long long j = 0; j < count; ++j) row[j] = widen_half(from[j * stride]);
  }
}

struct Brain {
  unsigned short bits;
};
struct Half {
  unsigned short bits;
};

RGFAST_INLINE double widened(double x) { return x; }
RGFAST_INLINE double widened(float x) { return static_cast<double>(x); }
RGFAST_INLINE double widened(Brain x) { return widen_brain(x.bits); }
RGFAST_INLINE double widened(Half x) { return widen_half(x.bits); }

RGFAST_INLINE VecD load_wide(const Brain* p) {
#if RGFAST_TARGET == RGFAST_TARGET_AVX512
  const __m256i low = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return _mm512_cvtps_pd(_mm256_castsi256_ps(_mm256_slli_epi32(low, 16)));
#elif RGFAST_TARGET == RGFAST_TARGET_AVX2
  const __m128i low = _mm_cvtepu16_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  return _mm256_cvtps_pd(_mm_castsi128_ps(_mm_slli_epi32(low, 16)));
#else
  VecD v{};
  for (int i = 0; i < Simd<double>::lanes; ++i) v[i] = widened(p[i]);
  return v;
#endif
}
RGFAST_INLINE VecD load_wide(const Half* p) {
#if RGFAST_TARGET == RGFAST_TARGET_AVX512
  return _mm512_cvtps_pd(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif RGFAST_TARGET == RGFAST_TARGET_AVX2
  return _mm256_cvtps_pd(_mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
  VecD v{};
  for (int i = 0; i < Simd<double>::lanes; ++i) v[i] = widened(p[i]);
  return v;
#endif
}

template <class T>
RGFAST_INLINE VecD load_half_some(const T* p, long long count) {
  if (count >= Simd<double>::lanes) return load_wide(p);
  double part[Simd<double>::lanes] = {};
  for (long long i = 0; i < count; ++i) part[i] = widened(p[i]);
  return load(part);
}
RGFAST_INLINE VecD load_wide_some(const Brain* p, long long count) { return load_half_some(p, count); }
RGFAST_INLINE VecD load_wide_some(const Half* p, long long count) { return load_half_some(p, count); }

}  // namespace RGFAST_NS
}  // namespace rgfast
