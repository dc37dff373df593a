// Vectors of the target that is being compiled: see foreach_target.hpp. No include guard on purpose.
//
// Everything is forced inline: a vector wider than the baseline's may not cross a function call whose other
// end was compiled for another set. Masks are mask registers on AVX-512 and all-ones lanes elsewhere.

#define RGFAST_INLINE inline __attribute__((always_inline))

namespace rgfast {
namespace RGFAST_NS {

typedef double VecD __attribute__((vector_size(RGFAST_SIMD)));
typedef float VecF __attribute__((vector_size(RGFAST_SIMD)));
typedef long long IntD __attribute__((vector_size(RGFAST_SIMD)));
typedef int IntF __attribute__((vector_size(RGFAST_SIMD)));
typedef double LooseD __attribute__((vector_size(RGFAST_SIMD), aligned(8), may_alias));
typedef float LooseF __attribute__((vector_size(RGFAST_SIMD), aligned(4), may_alias));

template <class T>
struct Simd;

#if RGFAST_TARGET == RGFAST_TARGET_AVX512
typedef __mmask8 MaskD;
typedef __mmask16 MaskF;
#else
typedef IntD MaskD;
typedef IntF MaskF;
#endif

template <>
struct Simd<double> {
  using Vec = VecD;
  using Mask = MaskD;
  static constexpr int lanes = RGFAST_SIMD / 8;
};

template <>
struct Simd<float> {
  using Vec = VecF;
  using Mask = MaskF;
  static constexpr int lanes = RGFAST_SIMD / 4;
};

RGFAST_INLINE VecD load(const double* p) { return *reinterpret_cast<const LooseD*>(p); }
RGFAST_INLINE VecF load(const float* p) { return *reinterpret_cast<const LooseF*>(p); }
RGFAST_INLINE void store(double* p, VecD v) { *reinterpret_cast<LooseD*>(p) = v; }
RGFAST_INLINE void store(float* p, VecF v) { *reinterpret_cast<LooseF*>(p) = v; }
// Not `VecD{} + x`: adding to zero is an instruction, since it turns -0 into 0.
RGFAST_INLINE VecD broadcast(double x) {
#if RGFAST_SIMD == 64
  return VecD{x, x, x, x, x, x, x, x};
#elif RGFAST_SIMD == 32
  return VecD{x, x, x, x};
#else
  return VecD{x, x};
#endif
}
RGFAST_INLINE VecF broadcast(float x) {
#if RGFAST_SIMD == 64
  return VecF{x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x};
#elif RGFAST_SIMD == 32
  return VecF{x, x, x, x, x, x, x, x};
#else
  return VecF{x, x, x, x};
#endif
}

#if RGFAST_TARGET == RGFAST_TARGET_AVX512

RGFAST_INLINE VecD fma(VecD a, VecD b, VecD c) { return _mm512_fmadd_pd(a, b, c); }
RGFAST_INLINE VecF fma(VecF a, VecF b, VecF c) { return _mm512_fmadd_ps(a, b, c); }
RGFAST_INLINE VecD fnma(VecD a, VecD b, VecD c) { return _mm512_fnmadd_pd(a, b, c); }
RGFAST_INLINE VecF fnma(VecF a, VecF b, VecF c) { return _mm512_fnmadd_ps(a, b, c); }
RGFAST_INLINE VecD sqrt(VecD a) { return _mm512_sqrt_pd(a); }
RGFAST_INLINE VecF sqrt(VecF a) { return _mm512_sqrt_ps(a); }
RGFAST_INLINE VecD max(VecD a, VecD b) { return _mm512_max_pd(a, b); }
RGFAST_INLINE VecF max(VecF a, VecF b) { return _mm512_max_ps(a, b); }
RGFAST_INLINE VecD min(VecD a, VecD b) { return _mm512_min_pd(a, b); }
RGFAST_INLINE VecF min(VecF a, VecF b) { return _mm512_min_ps(a, b); }
RGFAST_INLINE VecD abs(VecD a) { return _mm512_abs_pd(a); }
RGFAST_INLINE VecF abs(VecF a) { return _mm512_abs_ps(a); }
RGFAST_INLINE MaskD less(VecD a, VecD b) { return _mm512_cmp_pd_mask(a, b, _CMP_LT_OQ); }
RGFAST_INLINE MaskF less(VecF a, VecF b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
RGFAST_INLINE MaskD less_equal(VecD a, VecD b) { return _mm512_cmp_pd_mask(a, b, _CMP_LE_OQ); }
RGFAST_INLINE MaskF less_equal(VecF a, VecF b) { return _mm512_cmp_ps_mask(a, b, _CMP_LE_OQ); }
RGFAST_INLINE VecD select(MaskD m, VecD a, VecD b) { return _mm512_mask_blend_pd(m, b, a); }
RGFAST_INLINE VecF select(MaskF m, VecF a, VecF b) { return _mm512_mask_blend_ps(m, b, a); }
RGFAST_INLINE MaskD no_lanes(double) { return 0; }
RGFAST_INLINE MaskF no_lanes(float) { return 0; }
RGFAST_INLINE MaskD both(MaskD a, MaskD b) { return static_cast<MaskD>(a & b); }
RGFAST_INLINE MaskF both(MaskF a, MaskF b) { return static_cast<MaskF>(a & b); }
RGFAST_INLINE MaskD either(MaskD a, MaskD b) { return static_cast<MaskD>(a | b); }
RGFAST_INLINE MaskF either(MaskF a, MaskF b) { return static_cast<MaskF>(a | b); }
RGFAST_INLINE MaskD without(MaskD a, MaskD b) { return static_cast<MaskD>(a & ~b); }
RGFAST_INLINE MaskF without(MaskF a, MaskF b) { return static_cast<MaskF>(a & ~b); }
RGFAST_INLINE unsigned bits(MaskD m) { return m; }
RGFAST_INLINE unsigned bits(MaskF m) { return m; }
RGFAST_INLINE void store_where(MaskD m, double* p, VecD v) { _mm512_mask_storeu_pd(p, m, v); }
RGFAST_INLINE void store_where(MaskF m, float* p, VecF v) { _mm512_mask_storeu_ps(p, m, v); }

// Within two units in the last place for a normal argument with a normal reciprocal: a division would
// keep the only divider busy four times as long.
RGFAST_INLINE VecD reciprocal(VecD a) {
  const VecD one = broadcast(1.0);
  VecD r = _mm512_rcp14_pd(a);
  r = fma(r, fnma(a, r, one), r);
  return fma(r, fnma(a, r, one), r);
}
RGFAST_INLINE VecF reciprocal(VecF a) {
  const VecF r = _mm512_rcp14_ps(a);
  return fma(r, fnma(a, r, broadcast(1.0F)), r);
}

RGFAST_INLINE VecD gather(const double* base, const long long* offsets) {
  return _mm512_i64gather_pd(_mm512_loadu_si512(offsets), base, 8);
}
RGFAST_INLINE VecF gather(const float* base, const long long* offsets) {
  const __m256 low = _mm512_i64gather_ps(_mm512_loadu_si512(offsets), base, 4);
  const __m256 high = _mm512_i64gather_ps(_mm512_loadu_si512(offsets + 8), base, 4);
  return _mm512_insertf32x8(_mm512_castps256_ps512(low), high, 1);
}

#else

#if RGFAST_TARGET == RGFAST_TARGET_AVX2
RGFAST_INLINE VecD fma(VecD a, VecD b, VecD c) { return _mm256_fmadd_pd(a, b, c); }
RGFAST_INLINE VecF fma(VecF a, VecF b, VecF c) { return _mm256_fmadd_ps(a, b, c); }
RGFAST_INLINE VecD fnma(VecD a, VecD b, VecD c) { return _mm256_fnmadd_pd(a, b, c); }
RGFAST_INLINE VecF fnma(VecF a, VecF b, VecF c) { return _mm256_fnmadd_ps(a, b, c); }
RGFAST_INLINE VecD sqrt(VecD a) { return _mm256_sqrt_pd(a); }
RGFAST_INLINE VecF sqrt(VecF a) { return _mm256_sqrt_ps(a); }
RGFAST_INLINE VecD max(VecD a, VecD b) { return _mm256_max_pd(a, b); }
RGFAST_INLINE VecF max(VecF a, VecF b) { return _mm256_max_ps(a, b); }
RGFAST_INLINE VecD min(VecD a, VecD b) { return _mm256_min_pd(a, b); }
RGFAST_INLINE VecF min(VecF a, VecF b) { return _mm256_min_ps(a, b); }
RGFAST_INLINE unsigned bits(MaskD m) { return static_cast<unsigned>(_mm256_movemask_pd((__m256d)m)); }
RGFAST_INLINE unsigned bits(MaskF m) { return static_cast<unsigned>(_mm256_movemask_ps((__m256)m)); }
#elif RGFAST_TARGET == RGFAST_TARGET_NEON
RGFAST_INLINE VecD fma(VecD a, VecD b, VecD c) {
  return (VecD)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b);
}
RGFAST_INLINE VecF fma(VecF a, VecF b, VecF c) {
  return (VecF)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
}
RGFAST_INLINE VecD fnma(VecD a, VecD b, VecD c) {
  return (VecD)vfmsq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b);
}
RGFAST_INLINE VecF fnma(VecF a, VecF b, VecF c) {
  return (VecF)vfmsq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
}
#else
RGFAST_INLINE VecD fma(VecD a, VecD b, VecD c) { return a * b + c; }
RGFAST_INLINE VecF fma(VecF a, VecF b, VecF c) { return a * b + c; }
RGFAST_INLINE VecD fnma(VecD a, VecD b, VecD c) { return c - a * b; }
RGFAST_INLINE VecF fnma(VecF a, VecF b, VecF c) { return c - a * b; }
#endif

RGFAST_INLINE MaskD less(VecD a, VecD b) { return (MaskD)(a < b); }
RGFAST_INLINE MaskF less(VecF a, VecF b) { return (MaskF)(a < b); }
RGFAST_INLINE MaskD less_equal(VecD a, VecD b) { return (MaskD)(a <= b); }
RGFAST_INLINE MaskF less_equal(VecF a, VecF b) { return (MaskF)(a <= b); }
RGFAST_INLINE VecD select(MaskD m, VecD a, VecD b) { return (VecD)((m & (MaskD)a) | (~m & (MaskD)b)); }
RGFAST_INLINE VecF select(MaskF m, VecF a, VecF b) { return (VecF)((m & (MaskF)a) | (~m & (MaskF)b)); }
RGFAST_INLINE MaskD no_lanes(double) { return MaskD{}; }
RGFAST_INLINE MaskF no_lanes(float) { return MaskF{}; }
RGFAST_INLINE MaskD both(MaskD a, MaskD b) { return a & b; }
RGFAST_INLINE MaskF both(MaskF a, MaskF b) { return a & b; }
RGFAST_INLINE MaskD either(MaskD a, MaskD b) { return a | b; }
RGFAST_INLINE MaskF either(MaskF a, MaskF b) { return a | b; }
RGFAST_INLINE MaskD without(MaskD a, MaskD b) { return a & ~b; }
RGFAST_INLINE MaskF without(MaskF a, MaskF b) { return a & ~b; }
RGFAST_INLINE VecD abs(VecD a) { return (VecD)((IntD)a & (IntD{} + 0x7FFFFFFFFFFFFFFFLL)); }
RGFAST_INLINE VecF abs(VecF a) { return (VecF)((IntF)a & (IntF{} + 0x7FFFFFFF)); }
RGFAST_INLINE VecD reciprocal(VecD a) { return broadcast(1.0) / a; }
RGFAST_INLINE VecF reciprocal(VecF a) { return broadcast(1.0F) / a; }
RGFAST_INLINE void store_where(MaskD m, double* p, VecD v) { store(p, select(m, v, load(p))); }
RGFAST_INLINE void store_where(MaskF m, float* p, VecF v) { store(p, select(m, v, load(p))); }

#if RGFAST_TARGET != RGFAST_TARGET_AVX2
RGFAST_INLINE VecD max(VecD a, VecD b) { return select(less(b, a), a, b); }
RGFAST_INLINE VecF max(VecF a, VecF b) { return select(less(b, a), a, b); }
RGFAST_INLINE VecD min(VecD a, VecD b) { return select(less(a, b), a, b); }
RGFAST_INLINE VecF min(VecF a, VecF b) { return select(less(a, b), a, b); }
RGFAST_INLINE VecD sqrt(VecD a) {
  for (int i = 0; i < Simd<double>::lanes; ++i) a[i] = __builtin_sqrt(a[i]);
  return a;
}
RGFAST_INLINE VecF sqrt(VecF a) {
  for (int i = 0; i < Simd<float>::lanes; ++i) a[i] = __builtin_sqrtf(a[i]);
  return a;
}
RGFAST_INLINE unsigned bits(MaskD m) {
  unsigned found = 0;
  for (int i = 0; i < Simd<double>::lanes; ++i) found |= (m[i] != 0 ? 1U : 0U) << i;
  return found;
}
RGFAST_INLINE unsigned bits(MaskF m) {
  unsigned found = 0;
  for (int i = 0; i < Simd<float>::lanes; ++i) found |= (m[i] != 0 ? 1U : 0U) << i;
  return found;
}
#endif

RGFAST_INLINE VecD gather(const double* base, const long long* offsets) {
  VecD v{};
  for (int i = 0; i < Simd<double>::lanes; ++i) v[i] = base[offsets[i]];
  return v;
}
RGFAST_INLINE VecF gather(const float* base, const long long* offsets) {
  VecF v{};
  for (int i = 0; i < Simd<float>::lanes; ++i) v[i] = base[offsets[i]];
  return v;
}

#endif

// As many values as an fp64 vector has lanes.
RGFAST_INLINE VecD load_wide(const double* p) { return load(p); }
RGFAST_INLINE VecD load_wide(const float* p) {
#if RGFAST_TARGET == RGFAST_TARGET_AVX512
  return _mm512_cvtps_pd(_mm256_loadu_ps(p));
#elif RGFAST_TARGET == RGFAST_TARGET_AVX2
  return _mm256_cvtps_pd(_mm_loadu_ps(p));
#else
  VecD v{};
  for (int i = 0; i < Simd<double>::lanes; ++i) v[i] = static_cast<double>(p[i]);
  return v;
#endif
}

RGFAST_INLINE double sum_lanes(VecD v) {
#if RGFAST_TARGET == RGFAST_TARGET_AVX512
  return _mm512_reduce_add_pd(v);
#else
  double total = v[0];
  for (int i = 1; i < Simd<double>::lanes; ++i) total += v[i];
  return total;
#endif
}
RGFAST_INLINE float sum_lanes(VecF v) {
#if RGFAST_TARGET == RGFAST_TARGET_AVX512
  return _mm512_reduce_add_ps(v);
#else
  float total = v[0];
  for (int i = 1; i < Simd<float>::lanes; ++i) total += v[i];
  return total;
#endif
}

// `count` elements from p, zeros beyond.
template <class T>
RGFAST_INLINE typename Simd<T>::Vec load_some(const T* p, long long count) {
  if (count >= Simd<T>::lanes) return load(p);
#if RGFAST_TARGET == RGFAST_TARGET_AVX512
  const unsigned mask = (1U << count) - 1U;
  if constexpr (sizeof(T) == sizeof(double))
    return _mm512_maskz_loadu_pd(static_cast<__mmask8>(mask), p);
  else
    return _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), p);
#else
  T part[Simd<T>::lanes] = {};
  for (long long i = 0; i < count; ++i) part[i] = p[i];
  return load(part);
#endif
}

// As many values as an fp64 vector has lanes, of which `count` are there and the others zero.
RGFAST_INLINE VecD load_wide_some(const double* p, long long count) { return load_some(p, count); }
RGFAST_INLINE VecD load_wide_some(const float* p, long long count) {
  if (count >= Simd<double>::lanes) return load_wide(p);
#if RGFAST_TARGET == RGFAST_TARGET_AVX512
  return _mm512_cvtps_pd(_mm256_maskz_loadu_ps(static_cast<__mmask8>((1U << count) - 1U), p));
#else
  double part[Simd<double>::lanes] = {};
  for (long long i = 0; i < count; ++i) part[i] = static_cast<double>(p[i]);
  return load(part);
#endif
}

template <class Mask>
RGFAST_INLINE bool any(Mask m) {
  return bits(m) != 0;
}

}  // namespace RGFAST_NS
}  // namespace rgfast
