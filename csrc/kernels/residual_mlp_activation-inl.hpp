// The activations and their slopes. Coefficients are weighted minimax fits, rounded to fp32 one after the
// other with the rest fitted again; what they reach is in rgfast/ops/residual_mlp/README.md and its tests.
//
// In minimum(a, b) and maximum(a, b) a NaN in b survives: the data is always b.

namespace rgfast::RGFAST_NS {

static inline Vec clamped(Vec x, float limit) { return maximum(splat(-limit), minimum(splat(limit), x)); }

// exp(x) for |x| <= 87: 2^n (1 + r + r^2 q(r)), |r| <= ln(2)/2, n rounded by adding 1.5 * 2^23.
static inline Vec exponential(Vec x) {
  const Vec magic = splat(12582912.0f);
  const Vec shifted = fma(x, splat(1.44269504f), magic);
  const Vec n = shifted - magic;
  Vec r = fma(n, splat(-0.693145752f), x);
  r = fma(n, splat(-1.42860677e-06f), r);
  Vec q = splat(1.382045448e-03f);
  q = fma(q, r, splat(8.369251154e-03f));
  q = fma(q, r, splat(4.166828468e-02f));
  q = fma(q, r, splat(1.666651666e-01f));
  q = fma(q, r, splat(4.999999404e-01f));
  const Vec mantissa = splat(1.0f) + fma(r * r, q, r);
  return as_float(add_bits(as_bits(mantissa), shift_to_exponent(as_bits(shifted))));
}

struct Relu {
  static inline Vec value(Vec x) { return maximum(splat(0.0f), x); }
  static inline void both(Vec x, Vec& value, Vec& slope) {
    value = maximum(splat(0.0f), x);
    slope = where_less(splat(0.0f), x, splat(1.0f), splat(0.0f));
  }
};

struct Gelu {
  // Beyond this the normal distribution function is 0 or 1 to half a unit of fp32, and at it the sum below
  // comes out as exactly 1 with fused products and without.
  static constexpr float kLimit = 5.46f;

  // Phi(x) = 1/2 + x H(|x|). H is smooth where x Phi(x) is not small against its terms, so that rounding in
  // the polynomial's argument does no harm; H(s), s = |x|/2 - 1.375, keeps the sum free of cancellation.
  static inline Vec normal_cdf(Vec x) {
    const Vec held = clamped(x, kLimit);
    const Vec s = fma(absolute(held), splat(0.5f), splat(-1.375f));
    Vec h = splat(-6.032218607e-06f);
    h = fma(h, s, splat(6.580590252e-06f));
    h = fma(h, s, splat(6.849873171e-05f));
    h = fma(h, s, splat(-1.193183925e-04f));
    h = fma(h, s, splat(-2.684387146e-04f));
    h = fma(h, s, splat(8.470395696e-04f));
    h = fma(h, s, splat(-7.178328087e-05f));
    h = fma(h, s, splat(-2.686788095e-03f));
    h = fma(h, s, splat(4.326337483e-03f));
    h = fma(h, s, splat(4.758292343e-04f));
    h = fma(h, s, splat(-1.220271550e-02f));
    h = fma(h, s, splat(2.055384219e-02f));
    h = fma(h, s, splat(-1.029849052e-02f));
    h = fma(h, s, splat(-2.386427112e-02f));
    h = exact_fma(h, s, splat(7.259789109e-02f));
    h = exact_fma(h, s, splat(-1.248298734e-01f));
    h = exact_fma(h, s, splat(1.807346344e-01f));
    return exact_fma(held, h, splat(0.5f));
  }

  static inline Vec value(Vec x) { return zero_where_less(x, splat(-kLimit), x * normal_cdf(x)); }

  static inline void both(Vec x, Vec& value, Vec& slope) {
    const Vec cdf = normal_cdf(x);
    value = zero_where_less(x, splat(-kLimit), x * cdf);
    const Vec held = clamped(x, 9.0f);
    const Vec density = splat(0.398942280f) * exponential(splat(-0.5f) * held * held);
    slope = fma(held, density, zero_where_less(x, splat(-kLimit), cdf));
  }
};

struct Silu {
  static constexpr float kLimit = 87.0f;

  static inline Vec value(Vec x) {
    const Vec decay = exponential(splat(0.0f) - clamped(x, kLimit));
    return zero_where_less(x, splat(-kLimit), x / (splat(1.0f) + decay));
  }

  static inline void both(Vec x, Vec& value, Vec& slope) {
    const Vec held = clamped(x, kLimit);
    const Vec decay = exponential(splat(0.0f) - held);
    const Vec sum = splat(1.0f) + decay;
    const Vec sigmoid = splat(1.0f) / sum;
    value = zero_where_less(x, splat(-kLimit), x / sum);
    slope = fma(held * sigmoid, decay * sigmoid, sigmoid);
  }
};

// x sigmoid(2u), u = sqrt(2/pi) (x + 0.044715 x^3): the same as x (1 + tanh u) / 2 without its cancellation.
struct GeluTanh {
  static constexpr float kLimit = 9.875f;

  static inline Vec value(Vec x) {
    const Vec held = clamped(x, kLimit);
    const Vec twice_u = held * fma(held * held, splat(7.1354814e-02f), splat(1.5957691f));
    const Vec decay = exponential(splat(0.0f) - twice_u);
    return zero_where_less(x, splat(-kLimit), x / (splat(1.0f) + decay));
  }

  static inline void both(Vec x, Vec& value, Vec& slope) {
    const Vec held = clamped(x, kLimit);
    const Vec square = held * held;
    const Vec decay = exponential(splat(0.0f) - held * fma(square, splat(7.1354814e-02f), splat(1.5957691f)));
    const Vec sum = splat(1.0f) + decay;
    const Vec sigmoid = splat(1.0f) / sum;
    const Vec steepness = fma(square, splat(0.21406444f), splat(1.5957691f));
    value = zero_where_less(x, splat(-kLimit), x / sum);
    slope = fma(held * sigmoid, steepness * (decay * sigmoid), sigmoid);
  }
};

// In fp64, two half vectors at a time: one rounding at the end, as libraries have it.
struct Tanh {
  using Wide = double __attribute__((vector_size(RGFAST_SIMD)));
  using WideBits = std::int64_t __attribute__((vector_size(RGFAST_SIMD)));
  using Half = float __attribute__((vector_size(RGFAST_SIMD / 2)));

  static inline Wide chosen(WideBits mask, Wide yes, Wide no) {
    return (Wide)((mask & (WideBits)yes) | (~mask & (WideBits)no));
  }

  // 1 - 2 / (e^2x + 1), and near 0, where that cancels, the odd series.
  static inline Wide wide(Wide x) {
    const Wide square = x * x;
    const Wide small =
        x + x * square * (-1.0 / 3 + square * (2.0 / 15 + square * (-17.0 / 315 + square * (62.0 / 2835))));
    Wide twice = x + x;
    twice = chosen(twice > 40.0, Wide{} + 40.0, twice);
    twice = chosen(twice < -40.0, Wide{} - 40.0, twice);
    const double magic = 6755399441055744.0;  // 1.5 * 2^52: adding it rounds to a whole number
    const Wide shifted = twice * 1.4426950408889634 + magic;
    const Wide r = twice - (shifted - magic) * 0.6931471805599453;
    Wide p = Wide{} + 1.0 / 40320;
    p = p * r + 1.0 / 5040;
    p = p * r + 1.0 / 720;
    p = p * r + 1.0 / 120;
    p = p * r + 1.0 / 24;
    p = p * r + 1.0 / 6;
    p = p * r + 0.5;
    p = p * r + 1.0;
    p = p * r + 1.0;
    const Wide power = (Wide)((WideBits)p + ((WideBits)shifted << 52));
    const Wide large = 1.0 - 2.0 / (power + 1.0);
    return chosen(x == x, chosen(square < 1.0 / 64, small, large), x);
  }

  static inline Vec value(Vec x) {
    float lanes[kLanes];
    store(lanes, x);
    for (int half = 0; half < kLanes; half += kLanes / 2) {
      Half narrow;
      std::memcpy(&narrow, lanes + half, sizeof narrow);
      narrow = __builtin_convertvector(wide(__builtin_convertvector(narrow, Wide)), Half);
      std::memcpy(lanes + half, &narrow, sizeof narrow);
    }
    return with_sign_of(x, absolute(load(lanes)));  // a zero keeps its sign
  }

  static inline void both(Vec x, Vec& value_out, Vec& slope) {
    value_out = value(x);
    slope = fma(splat(0.0f) - value_out, value_out, splat(1.0f));
  }
};

template <class Activation>
static void activate(const float* input, float* values, float* slopes, std::int64_t count) {
  for (std::int64_t i = 0; i < count; i += kLanes) {
    const int live = static_cast<int>(std::min<std::int64_t>(kLanes, count - i));
    const Vec x = load_first(input + i, live);
    Vec value = Activation::value(x);
    if (slopes != nullptr) {
      Vec slope;
      Activation::both(x, value, slope);
      store_first(slopes + i, slope, live);
    }
    store_first(values + i, value, live);
  }
}

}  // namespace rgfast::RGFAST_NS
