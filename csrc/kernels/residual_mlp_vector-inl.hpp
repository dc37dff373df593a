// One register of fp32 lanes and the few operations that the residual block needs on it.

namespace rgfast::RGFAST_NS {

inline constexpr int kLanes = RGFAST_SIMD / 4;

#if RGFAST_TARGET == RGFAST_TARGET_AVX512
using Vec = __m512;
using Bits = __m512i;
static inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
static inline void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
static inline Vec splat(float x) { return _mm512_set1_ps(x); }
static inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
// The second operand where either is NaN, as the instruction has it.
static inline Vec minimum(Vec a, Vec b) { return _mm512_min_ps(a, b); }
static inline Vec maximum(Vec a, Vec b) { return _mm512_max_ps(a, b); }
static inline Vec absolute(Vec v) { return _mm512_abs_ps(v); }
static inline Vec with_sign_of(Vec sign, Vec v) {
  return _mm512_or_ps(_mm512_and_ps(_mm512_set1_ps(-0.0f), sign), v);
}
static inline Vec zero_where_less(Vec a, Vec b, Vec v) {
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a, b, _CMP_NLT_UQ), v);
}
static inline Vec where_less(Vec a, Vec b, Vec yes, Vec no) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), no, yes);
}
static inline __mmask16 first(int count) { return static_cast<__mmask16>((1u << count) - 1u); }
static inline Vec load_first(const float* p, int count) { return _mm512_maskz_loadu_ps(first(count), p); }
static inline void store_first(float* p, Vec v, int count) { _mm512_mask_storeu_ps(p, first(count), v); }
static inline Vec keep_first(Vec v, int count) { return _mm512_maskz_mov_ps(first(count), v); }
static inline float lane_sum(Vec v) {
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
  __m128 sum = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
  return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
}
static inline Vec as_float(Bits b) { return _mm512_castsi512_ps(b); }
static inline Bits as_bits(Vec v) { return _mm512_castps_si512(v); }
static inline Bits shift_to_exponent(Bits b) { return _mm512_slli_epi32(b, 23); }
static inline Bits add_bits(Bits a, Bits b) { return _mm512_add_epi32(a, b); }
// a0 b0 a1 b1 ...: the first half of it in `low`, the second in `high`.
static inline void interleave(Vec a, Vec b, Vec& low, Vec& high) {
  const Bits from_low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const Bits from_high = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  low = _mm512_permutex2var_ps(a, from_low, b);
  high = _mm512_permutex2var_ps(a, from_high, b);
}

#elif RGFAST_TARGET == RGFAST_TARGET_AVX2
using Vec = __m256;
using Bits = __m256i;
static inline Vec load(const float* p) { return _mm256_loadu_ps(p); }
static inline void store(float* p, Vec v) { _mm256_storeu_ps(p, v); }
static inline Vec splat(float x) { return _mm256_set1_ps(x); }
static inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
static inline Vec minimum(Vec a, Vec b) { return _mm256_min_ps(a, b); }
static inline Vec maximum(Vec a, Vec b) { return _mm256_max_ps(a, b); }
static inline Vec absolute(Vec v) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), v); }
static inline Vec with_sign_of(Vec sign, Vec v) {
  return _mm256_or_ps(_mm256_and_ps(_mm256_set1_ps(-0.0f), sign), v);
}
static inline Vec zero_where_less(Vec a, Vec b, Vec v) {
  return _mm256_and_ps(_mm256_cmp_ps(a, b, _CMP_NLT_UQ), v);
}
static inline Vec where_less(Vec a, Vec b, Vec yes, Vec no) {
  return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, b, _CMP_LT_OQ));
}
static inline __m256i first(int count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
static inline Vec load_first(const float* p, int count) { return _mm256_maskload_ps(p, first(count)); }
static inline void store_first(float* p, Vec v, int count) { _mm256_maskstore_ps(p, first(count), v); }
static inline Vec keep_first(Vec v, int count) { return _mm256_and_ps(_mm256_castsi256_ps(first(count)), v); }
static inline float lane_sum(Vec v) {
  __m128 sum = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
  return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
}
static inline Vec as_float(Bits b) { return _mm256_castsi256_ps(b); }
static inline Bits as_bits(Vec v) { return _mm256_castps_si256(v); }
static inline Bits shift_to_exponent(Bits b) { return _mm256_slli_epi32(b, 23); }
static inline Bits add_bits(Bits a, Bits b) { return _mm256_add_epi32(a, b); }
static inline void interleave(Vec a, Vec b, Vec& low, Vec& high) {
  const Vec even = _mm256_unpacklo_ps(a, b);
  const Vec odd = _mm256_unpackhi_ps(a, b);
  low = _mm256_permute2f128_ps(even, odd, 0x20);
  high = _mm256_permute2f128_ps(even, odd, 0x31);
}

#else
using Vec = float __attribute__((vector_size(16)));
using Bits = std::int32_t __attribute__((vector_size(16)));
static inline Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
static inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }
static inline Vec splat(float x) { return Vec{x, x, x, x}; }
#if RGFAST_FMA
static inline Vec fma(Vec a, Vec b, Vec c) {
  return (Vec)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
}
#else
static inline Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
#endif
static inline Vec as_float(Bits b) { return (Vec)b; }
static inline Bits as_bits(Vec v) { return (Bits)v; }
static inline Vec choose(Bits mask, Vec yes, Vec no) {
  return as_float((mask & as_bits(yes)) | (~mask & as_bits(no)));
}
static inline Vec minimum(Vec a, Vec b) { return choose(a < b, a, b); }
static inline Vec maximum(Vec a, Vec b) { return choose(a > b, a, b); }
static inline Vec absolute(Vec v) { return as_float(as_bits(v) & 0x7fffffff); }
static inline Vec with_sign_of(Vec sign, Vec v) {
  return as_float((as_bits(sign) & ~0x7fffffff) | as_bits(v));
}
static inline Vec zero_where_less(Vec a, Vec b, Vec v) { return as_float(~(a < b) & as_bits(v)); }
static inline Vec where_less(Vec a, Vec b, Vec yes, Vec no) { return choose(a < b, yes, no); }
static inline Vec load_first(const float* p, int count) {
  Vec v = splat(0.0f);
  std::memcpy(&v, p, static_cast<std::size_t>(count) * sizeof(float));
  return v;
}
static inline void store_first(float* p, Vec v, int count) {
  std::memcpy(p, &v, static_cast<std::size_t>(count) * sizeof(float));
}
static inline Vec keep_first(Vec v, int count) {
  for (int i = count; i < kLanes; ++i) v[i] = 0.0f;
  return v;
}
static inline float lane_sum(Vec v) { return (v[0] + v[2]) + (v[1] + v[3]); }
static inline Bits shift_to_exponent(Bits b) { return b << 23; }
static inline Bits add_bits(Bits a, Bits b) { return a + b; }
static inline void interleave(Vec a, Vec b, Vec& low, Vec& high) {
  low = Vec{a[0], b[0], a[1], b[1]};
  high = Vec{a[2], b[2], a[3], b[3]};
}
#endif

// Rows become columns: interleaving the first half of the rows with the second, once for every bit of a
// row's number.
static inline void transpose(Vec (&rows)[kLanes]) {
#pragma GCC unroll 4
  for (int step = 1; step < kLanes; step *= 2) {
    Vec mixed[kLanes];
#pragma GCC unroll 8
    for (int i = 0; i < kLanes / 2; ++i)
      interleave(rows[i], rows[i + kLanes / 2], mixed[2 * i], mixed[2 * i + 1]);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) rows[i] = mixed[i];
  }
}

// a b + c with the product unrounded, also where there is no such instruction.
static inline Vec exact_fma(Vec a, Vec b, Vec c) {
#if RGFAST_FMA
  return fma(a, b, c);
#else
  Vec sum;
  for (int i = 0; i < kLanes; ++i)
    sum[i] =
        static_cast<float>(static_cast<double>(a[i]) * static_cast<double>(b[i]) + static_cast<double>(c[i]));
  return sum;
#endif
}

}  // namespace rgfast::RGFAST_NS
