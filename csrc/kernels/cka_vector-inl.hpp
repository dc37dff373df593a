// One register of floats or of doubles, and the few operations that CKA needs on it.
namespace rgfast::cka {
namespace RGFAST_NS {

template <class T>
struct Vector;
template <>
struct Vector<float> {
  typedef float type __attribute__((vector_size(RGFAST_SIMD), aligned(4)));
};
template <>
struct Vector<double> {
  typedef double type __attribute__((vector_size(RGFAST_SIMD), aligned(8)));
};
typedef float HalfFloats __attribute__((vector_size(RGFAST_SIMD / 2), aligned(4)));
using Doubles = Vector<double>::type;

template <class T>
inline constexpr int kLanes = static_cast<int>(RGFAST_SIMD / sizeof(T));
// Accumulators fill the registers: 6x4 or 4x4 of 32, 4x2 of 16.
inline constexpr int kMostColumns = RGFAST_TARGET == RGFAST_TARGET_AVX512 ? 4 : 2;
template <class T>
inline constexpr int kTile = 64 / kLanes<T>;  // panels on a side of a tile

#define RGFAST_INLINE static inline __attribute__((always_inline))

template <class T>
RGFAST_INLINE typename Vector<T>::type load(const T* from) {
  return *reinterpret_cast<const typename Vector<T>::type*>(from);
}
RGFAST_INLINE void store(double* to, Doubles value) { *reinterpret_cast<Doubles*>(to) = value; }
RGFAST_INLINE void store(float* to, Vector<float>::type value) {
  *reinterpret_cast<Vector<float>::type*>(to) = value;
}

RGFAST_INLINE Vector<float>::type fused(Vector<float>::type a, Vector<float>::type b, Vector<float>::type c) {
#if RGFAST_TARGET == RGFAST_TARGET_AVX512
  return (Vector<float>::type)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif RGFAST_TARGET == RGFAST_TARGET_AVX2
  return (Vector<float>::type)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif RGFAST_TARGET == RGFAST_TARGET_NEON
  return (Vector<float>::type)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}
RGFAST_INLINE Doubles fused(Doubles a, Doubles b, Doubles c) {
#if RGFAST_TARGET == RGFAST_TARGET_AVX512
  return (Doubles)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif RGFAST_TARGET == RGFAST_TARGET_AVX2
  return (Doubles)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#elif RGFAST_TARGET == RGFAST_TARGET_NEON
  return (Doubles)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b);
#else
  return a * b + c;
#endif
}

RGFAST_INLINE Vector<float>::type splat(float value) {
#if RGFAST_TARGET == RGFAST_TARGET_AVX512
  return (Vector<float>::type)_mm512_set1_ps(value);
#elif RGFAST_TARGET == RGFAST_TARGET_AVX2
  return (Vector<float>::type)_mm256_set1_ps(value);
#else
  return Vector<float>::type{value, value, value, value};
#endif
}
RGFAST_INLINE Doubles splat(double value) {
#if RGFAST_TARGET == RGFAST_TARGET_AVX512
  return (Doubles)_mm512_set1_pd(value);
#elif RGFAST_TARGET == RGFAST_TARGET_AVX2
  return (Doubles)_mm256_set1_pd(value);
#else
  return Doubles{value, value};
#endif
}

RGFAST_INLINE Doubles wide(const double* from) { return load(from); }
RGFAST_INLINE Doubles wide(const float* from) {
  const HalfFloats value = *reinterpret_cast<const HalfFloats*>(from);
#if RGFAST_TARGET == RGFAST_TARGET_AVX512
  return (Doubles)_mm512_cvtps_pd((__m256)value);  // GCC would convert it in two pieces
#elif RGFAST_TARGET == RGFAST_TARGET_AVX2
  return (Doubles)_mm256_cvtps_pd((__m128)value);
#else
  return __builtin_convertvector(value, Doubles);
#endif
}
// A whole vector of T, in halves where T is float.
RGFAST_INLINE void widen(Doubles value, Doubles* to) { to[0] = value; }
RGFAST_INLINE void widen(Vector<float>::type value, Doubles* to) {
#if RGFAST_TARGET == RGFAST_TARGET_AVX512
  to[0] = (Doubles)_mm512_cvtps_pd(_mm512_castps512_ps256((__m512)value));
  to[1] = (Doubles)_mm512_cvtps_pd(_mm512_extractf32x8_ps((__m512)value, 1));
#elif RGFAST_TARGET == RGFAST_TARGET_AVX2
  to[0] = (Doubles)_mm256_cvtps_pd(_mm256_castps256_ps128((__m256)value));
  to[1] = (Doubles)_mm256_cvtps_pd(_mm256_extractf128_ps((__m256)value, 1));
#else
  float line[kLanes<float>];
  store(line, value);
  to[0] = wide(line);
  to[1] = wide(line + kLanes<double>);
#endif
}
RGFAST_INLINE void narrow(double* to, Doubles value) { store(to, value); }
RGFAST_INLINE void narrow(float* to, Doubles value) {
#if RGFAST_TARGET == RGFAST_TARGET_AVX512
  *reinterpret_cast<HalfFloats*>(to) = (HalfFloats)_mm512_cvtpd_ps((__m512d)value);
#elif RGFAST_TARGET == RGFAST_TARGET_AVX2
  *reinterpret_cast<HalfFloats*>(to) = (HalfFloats)_mm256_cvtpd_ps((__m256d)value);
#else
  *reinterpret_cast<HalfFloats*>(to) = __builtin_convertvector(value, HalfFloats);
#endif
}

RGFAST_INLINE double total(Doubles v) {
#if RGFAST_TARGET == RGFAST_TARGET_AVX512
  return _mm512_reduce_add_pd((__m512d)v);
#else
  double sum = 0.0;
  for (int i = 0; i < kLanes<double>; ++i) sum += v[i];
  return sum;
#endif
}

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define RGFAST_TRANSPOSES 1
#endif
#endif
#ifdef RGFAST_TRANSPOSES
// One step of a transposition: trades the blocks off the diagonal between vectors `Step` apart.
template <int Step, class V, int... K>
RGFAST_INLINE void trade(V& a, V& b, std::integer_sequence<int, K...>) {
  constexpr int n = static_cast<int>(sizeof...(K));
  const V low = __builtin_shufflevector(a, b, ((K & Step) != 0 ? n + K - Step : K)...);
  b = __builtin_shufflevector(a, b, ((K & Step) != 0 ? n + K : K + Step)...);
  a = low;
}
#if RGFAST_TARGET == RGFAST_TARGET_AVX512
// The same without a register for the order of the lanes.
template <int Step, int... K>
RGFAST_INLINE void trade(Vector<float>::type& a, Vector<float>::type& b, std::integer_sequence<int, K...>) {
  using V = Vector<float>::type;
  const __m512 x = (__m512)a, y = (__m512)b;
  if constexpr (Step == 1) {
    a = (V)_mm512_mask_moveldup_ps(x, 0xAAAA, y);
    b = (V)_mm512_mask_movehdup_ps(y, 0x5555, x);
  } else if constexpr (Step == 2) {
    a = (V)_mm512_shuffle_ps(x, y, 0x44);
    b = (V)_mm512_shuffle_ps(x, y, 0xEE);
  } else if constexpr (Step == 4) {
    a = (V)_mm512_mask_shuffle_f32x4(x, 0xF0F0, y, y, 0xA0);
    b = (V)_mm512_mask_shuffle_f32x4(y, 0x0F0F, x, x, 0xF5);
  } else {
    a = (V)_mm512_shuffle_f32x4(x, y, 0x44);
    b = (V)_mm512_shuffle_f32x4(x, y, 0xEE);
  }
}
#endif
template <int Step, int N, class V>
RGFAST_INLINE void trades(V* v) {
  if constexpr (Step < N) {
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i)
      if ((i & Step) == 0) trade<Step>(v[i], v[i + Step], std::make_integer_sequence<int, N>{});
    trades<2 * Step, N>(v);
  }
}
#endif

// A square of vectors, transposed.
template <class T>
RGFAST_INLINE void transpose(typename Vector<T>::type* v) {
#ifdef RGFAST_TRANSPOSES
  trades<1, kLanes<T>>(v);
#else
  for (int i = 0; i < kLanes<T>; ++i)
    for (int j = 0; j < i; ++j) {
      const T above = v[j][i];
      v[j][i] = v[i][j];
      v[i][j] = above;
    }
#endif
}

}  // namespace RGFAST_NS
}  // namespace rgfast::cka
