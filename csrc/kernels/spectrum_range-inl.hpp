// Magnitudes and powers of two of a type, and where a packed triangle has its columns. No include guard: see
// foreach_target.hpp.

namespace rgfast {
namespace RGFAST_NS {

// Where column j of a packed lower triangle of n rows would have its row 0: element (i, j), i >= j, is i on.
RGFAST_INLINE long long triangle_column(long long n, long long j) { return j * n - j * (j + 1) / 2; }

// exponent(x): the e with 2^(e-1) <= |x| < 2^e; power(e): 2^e, a normal number. By bits, since the library's
// calls cost more than a small matrix's share of everything else.
template <class T>
struct Range;
template <>
struct Range<double> {
  static constexpr double largest = __DBL_MAX__;
  static constexpr double low = 0x1p-300;
  static constexpr double high = 0x1p+300;
  static RGFAST_INLINE int exponent(double x) {
    unsigned long long bits;
    __builtin_memcpy(&bits, &x, sizeof bits);
    int e = static_cast<int>((bits >> 52) & 2047U) - 1022;
    if (__builtin_expect(e == -1022, 0)) __builtin_frexp(x, &e);
    return e;
  }
  static RGFAST_INLINE double power(int e) {
    const unsigned long long bits = static_cast<unsigned long long>(e + 1023) << 52;
    double value;
    __builtin_memcpy(&value, &bits, sizeof value);
    return value;
  }
};
template <>
struct Range<float> {
  static constexpr float largest = __FLT_MAX__;
  static constexpr float low = 0x1p-20F;
  static constexpr float high = 0x1p+30F;
  static RGFAST_INLINE int exponent(float x) {
    unsigned bits;
    __builtin_memcpy(&bits, &x, sizeof bits);
    int e = static_cast<int>((bits >> 23) & 255U) - 126;
    if (__builtin_expect(e == -126, 0)) __builtin_frexpf(x, &e);
    return e;
  }
  static RGFAST_INLINE float power(int e) {
    const unsigned bits = static_cast<unsigned>(e + 127) << 23;
    float value;
    __builtin_memcpy(&value, &bits, sizeof value);
    return value;
  }
};

RGFAST_INLINE double scalar_sqrt(double x) { return __builtin_sqrt(x); }
RGFAST_INLINE float scalar_sqrt(float x) { return __builtin_sqrtf(x); }

}  // namespace RGFAST_NS
}  // namespace rgfast
