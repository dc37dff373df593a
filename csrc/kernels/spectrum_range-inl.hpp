// Magnitudes and powers of two of a type. No include guard: see foreach_target.hpp.

namespace rgfast {
namespace RGFAST_NS {

template <class T>
struct Range;
template <>
struct Range<double> {
  static constexpr double largest = __DBL_MAX__;
  static constexpr double low = 0x1p-300;
  static constexpr double high = 0x1p+300;
  static RGFAST_INLINE int exponent(double x) {
    int e = 0;
    __builtin_frexp(x, &e);
    return e;
  }
  static RGFAST_INLINE double power(int e) { return __builtin_ldexp(1.0, e); }
};
template <>
struct Range<float> {
  static constexpr float largest = __FLT_MAX__;
  static constexpr float low = 0x1p-20F;
  static constexpr float high = 0x1p+30F;
  static RGFAST_INLINE int exponent(float x) {
    int e = 0;
    __builtin_frexpf(x, &e);
    return e;
  }
  static RGFAST_INLINE float power(int e) { return __builtin_ldexpf(1.0F, e); }
};

RGFAST_INLINE double scalar_sqrt(double x) { return __builtin_sqrt(x); }
RGFAST_INLINE float scalar_sqrt(float x) { return __builtin_sqrtf(x); }

}  // namespace RGFAST_NS
}  // namespace rgfast
