// Transposing as many vectors as they have lanes. No include guard: see foreach_target.hpp.

#if defined(__clang__)
#define RGFAST_ZIP(Int, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define RGFAST_ZIP(Int, a, b, ...) __builtin_shuffle(a, b, Int{__VA_ARGS__})
#endif

namespace rgfast {
namespace RGFAST_NS {

// The first and the second half of a0 b0 a1 b1 a2 b2 ...
#if RGFAST_SIMD == 64
RGFAST_INLINE VecD zip_low(VecD a, VecD b) { return RGFAST_ZIP(IntD, a, b, 0, 8, 1, 9, 2, 10, 3, 11); }
RGFAST_INLINE VecD zip_high(VecD a, VecD b) { return RGFAST_ZIP(IntD, a, b, 4, 12, 5, 13, 6, 14, 7, 15); }
RGFAST_INLINE VecF zip_low(VecF a, VecF b) {
  return RGFAST_ZIP(IntF, a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
}
RGFAST_INLINE VecF zip_high(VecF a, VecF b) {
  return RGFAST_ZIP(IntF, a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
}
#elif RGFAST_SIMD == 32
RGFAST_INLINE VecD zip_low(VecD a, VecD b) { return RGFAST_ZIP(IntD, a, b, 0, 4, 1, 5); }
RGFAST_INLINE VecD zip_high(VecD a, VecD b) { return RGFAST_ZIP(IntD, a, b, 2, 6, 3, 7); }
RGFAST_INLINE VecF zip_low(VecF a, VecF b) { return RGFAST_ZIP(IntF, a, b, 0, 8, 1, 9, 2, 10, 3, 11); }
RGFAST_INLINE VecF zip_high(VecF a, VecF b) { return RGFAST_ZIP(IntF, a, b, 4, 12, 5, 13, 6, 14, 7, 15); }
#else
RGFAST_INLINE VecD zip_low(VecD a, VecD b) { return RGFAST_ZIP(IntD, a, b, 0, 2); }
RGFAST_INLINE VecD zip_high(VecD a, VecD b) { return RGFAST_ZIP(IntD, a, b, 1, 3); }
RGFAST_INLINE VecF zip_low(VecF a, VecF b) { return RGFAST_ZIP(IntF, a, b, 0, 4, 1, 5); }
RGFAST_INLINE VecF zip_high(VecF a, VecF b) { return RGFAST_ZIP(IntF, a, b, 2, 6, 3, 7); }
#endif

// As many rows as lanes: interleaving the halves log2(lanes) times transposes.
template <class T>
RGFAST_INLINE void transpose(typename Simd<T>::Vec* rows) {
  constexpr int L = Simd<T>::lanes;
#pragma GCC unroll 4
  for (int round = 1; round < L; round *= 2) {
    typename Simd<T>::Vec mixed[L];
#pragma GCC unroll 8
    for (int i = 0; i < L / 2; ++i) {
      mixed[2 * i] = zip_low(rows[i], rows[i + L / 2]);
      mixed[2 * i + 1] = zip_high(rows[i], rows[i + L / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) rows[i] = mixed[i];
  }
}

}  // namespace RGFAST_NS
}  // namespace rgfast

#undef RGFAST_ZIP
