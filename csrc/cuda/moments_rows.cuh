// Rows of a layer on their way to shared memory: four columns of two rows per thread and step.
#pragma once

#include "cuda/moments_math.cuh"

namespace rgfast::cuda::moments {

struct Layer {
  const void* rows;  // [positions, rows, width] of any strides, in elements
  std::int64_t position_stride, row_stride, feature_stride;
  std::int64_t width;
  const double* shift;  // [positions, width]
  double unit;          // a power of two
  double* norms;        // [positions, rows]: |y|^2, zero for rows that are not kept
  double* tops;         // [positions]: the largest finite one of these
};

inline constexpr int kLayerWords = 9;

__device__ inline Layer layer_at(const std::int64_t* table, std::int64_t k) {
  const std::int64_t* word = table + k * kLayerWords;
  return {reinterpret_cast<const void*>(word[0]),
          word[1],
          word[2],
          word[3],
          word[4],
          reinterpret_cast<const double*>(word[5]),
          __longlong_as_double(word[6]),
          reinterpret_cast<double*>(word[7]),
          reinterpret_cast<double*>(word[8])};
}

// Which rows count: all if there is no mask.
struct Keep {
  const unsigned char* mask;
  std::int64_t position_stride, row_stride;
  __device__ bool operator()(std::int64_t position, std::int64_t row) const {
    return mask == nullptr || mask[position * position_stride + row * row_stride] != 0;
  }
};

__device__ inline double widened(double x) { return x; }
__device__ inline double widened(float x) { return static_cast<double>(x); }
__device__ inline double widened(Half x) { return static_cast<double>(to_float(x)); }
__device__ inline double widened(Bfloat16 x) { return static_cast<double>(to_float(x)); }
__device__ inline float narrowed(float x) { return x; }
__device__ inline float narrowed(Half x) { return to_float(x); }
__device__ inline float narrowed(Bfloat16 x) { return to_float(x); }

template <int Bytes>
struct Bits;
template <>
struct Bits<8> {
  using Type = uint2;
};
template <>
struct Bits<16> {
  using Type = uint4;
};

// A strip of columns of one position, for all threads of a block, which keep little of it in registers.
struct Strip {
  const void* at;  // the first row and column
  std::int64_t row_stride, feature_stride;
  const double* shift;  // of the first column
  const double* norms;
  double unit;
  double factor;           // that split numbers are multiplied by, the unit included: a power of two
  double norm_factor;      // and |y|^2
  double back, norm_back;  // that take sums back to units
  int body, columns;       // how many from the first on are features, and with |y|^2 and 1: at most 2 kSide
};

__host__ __device__ inline int within(int x, int most) { return x < -most ? -most : x > most ? most : x; }

// `most` is the largest exponent of a factor, 0 if numbers are not split.
template <class T>
__device__ Strip strip_at(const Layer& layer, std::int64_t position, std::int64_t rows, std::int64_t first,
                          std::int64_t extras, int most) {
  const std::int64_t rest = layer.width - first;
  const int body = rest < 2 * kSide ? static_cast<int>(rest) : 2 * kSide;
  const double top = most == 0 ? 0.0 : layer.tops[position];
  const int unit = exponent_above(layer.unit) - 1, exponent = within(unit - split_exponent(top), most);
  const int norm_exponent = top == 0.0 ? 0 : within(kTop - exponent_above(top), 1000);
  return {static_cast<const T*>(layer.rows) + position * layer.position_stride + first * layer.feature_stride,
          layer.row_stride,
          layer.feature_stride,
          layer.shift + position * layer.width + first,
          layer.norms + position * rows,
          layer.unit,
          power_of_two<double>(exponent),
          power_of_two<double>(norm_exponent),
          power_of_two<double>(within(unit - exponent, 1000)),
          power_of_two<double>(-norm_exponent),
          body,
          body + static_cast<int>(extras)};
}

template <class T>
inline constexpr int kLoad = sizeof(T) == 2 ? 8 : 16;  // bytes

// Whether four neighboring features of every row are whole loads, counted from `at` on.
template <class T>
__device__ bool in_loads(const T* at, std::int64_t row_stride, std::int64_t feature_stride) {
  return feature_stride == 1 && reinterpret_cast<std::uintptr_t>(at) % kLoad<T> == 0 &&
         row_stride * static_cast<std::int64_t>(sizeof(T)) % kLoad<T> == 0;
}

// Four numbers: in whole loads, or each that is `there` by itself.
template <class T, class There>
__device__ __forceinline__ void load_four(T (&to)[4], const T* at, std::int64_t stride, bool whole,
                                          const There& there) {
  if (whole) {
    using Load = typename Bits<kLoad<T> >::Type;
    constexpr int step = kLoad<T> / sizeof(T);
#pragma unroll
    for (int e = 0; e < 4; e += step) {
      const Load bits = *reinterpret_cast<const Load*>(at + e);
      memcpy(to + e, &bits, kLoad<T>);
    }
  } else {
#pragma unroll
    for (int e = 0; e < 4; ++e)
      if (there(e)) to[e] = at[e * stride];
  }
}

// Four columns, and what rows k and k + 8 of the next step are made of.
template <class T>
struct Columns {
  const T* from;
  bool whole;  // whether they come in whole loads
  T raw[2][4] = {};

  __device__ Columns(const Strip& strip, int column, std::int64_t row)
      : from(static_cast<const T*>(strip.at) + column * strip.feature_stride + row * strip.row_stride),
        whole(column + 4 <= strip.body && in_loads(from, strip.row_stride, strip.feature_stride)) {}

  // `left` rows come before the end.
  __device__ void fetch(const Strip& strip, int column, int left) {
#pragma unroll
    for (int h = 0; h < 2; ++h)
      if (8 * h < left)
        load_four(raw[h], from + 8 * h * strip.row_stride, strip.feature_stride, whole,
                  [&](int e) { return column + e < strip.body; });
    from += kStep * strip.row_stride;
  }
};

// Numbers of a strip in fp64: exactly widened, shifted, in units.
template <class T>
struct Widened : Columns<T> {
  using Number = double;
  static constexpr int kMost = 0;
  double shift[4];

  __device__ Widened(const Strip& strip, int column, std::int64_t row) : Columns<T>(strip, column, row) {
    for (int e = 0; e < 4; ++e)
      shift[e] = column + e < strip.body ? strip.shift[column + e] * strip.unit : 0.0;
  }

  // The product with a power of two is exact, so that this rounds as the difference does.
  __device__ double number(const Strip& strip, int h, int e) const {
    return fma(widened(this->raw[h][e]), strip.unit, -shift[e]);
  }

  __device__ static double norm(const Strip&, double norm) { return norm; }
  __device__ static double scale(const Strip&, int) { return 1.0; }
};

// fp32 rows less a shift of two fp32 numbers: as good as fp32 wherever the shift is.
template <class T>
struct Shifted {
  static constexpr int kMost = 126;
  float high[4], low[4];
  __device__ void set(int e, const Strip&, double shift) {
    high[e] = static_cast<float>(shift);
    low[e] = static_cast<float>(shift - static_cast<double>(high[e]));
  }
  __device__ float operator()(const Strip& strip, int e, T x) const {
    return ((narrowed(x) - high[e]) - low[e]) * static_cast<float>(strip.factor);
  }
};
template <>
struct Shifted<double> {
  static constexpr int kMost = 1000;
  double shift[4];
  __device__ void set(int e, const Strip& strip, double by) { shift[e] = by * strip.factor; }
  __device__ float operator()(const Strip& strip, int e, double x) const {
    return static_cast<float>(fma(x, strip.factor, -shift[e]));
  }
};

// Numbers of a strip in fp32, times powers of two that bring the longest row to less than 2^kTop.
template <class T>
struct Narrowed : Columns<T> {
  using Number = float;
  static constexpr int kMost = Shifted<T>::kMost;
  Shifted<T> move;

  __device__ Narrowed(const Strip& strip, int column, std::int64_t row) : Columns<T>(strip, column, row) {
    for (int e = 0; e < 4; ++e) move.set(e, strip, column + e < strip.body ? strip.shift[column + e] : 0.0);
  }

  __device__ float number(const Strip& strip, int h, int e) const { return move(strip, e, this->raw[h][e]); }
  __device__ static float norm(const Strip& strip, double norm) {
    return static_cast<float>(norm * strip.norm_factor);
  }
  __device__ static double scale(const Strip& strip, int column) {
    return column < strip.body ? strip.back : column == strip.body ? strip.norm_back : 1.0;
  }
};

// |y|^2 of every row, by a warp for four rows at a time.
template <class T>
__device__ void norms(const std::int64_t* table, std::int64_t positions, std::int64_t rows,
                      const Keep& keep) {
  constexpr int count = 4;
  const Layer layer = layer_at(table, blockIdx.y);
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const std::int64_t first = (std::int64_t{blockIdx.x} * (kThreads / 32) + threadIdx.x / 32) * count;
  const T* from[count];
  const double* shift[count];
  bool kept[count];
  double sum[count] = {};
#pragma unroll
  for (int i = 0; i < count; ++i) {
    const std::int64_t at = first + i, position = at / rows, row = at % rows;
    kept[i] = at < positions * rows && keep(position, row);
    from[i] = static_cast<const T*>(layer.rows) +
              (kept[i] ? position * layer.position_stride + row * layer.row_stride : 0);
    shift[i] = layer.shift + (kept[i] ? position * layer.width : 0);
  }
  for (std::int64_t column = lane; column < layer.width; column += 32)
#pragma unroll
    for (int i = 0; i < count; ++i) {
      if (!kept[i]) continue;
      const double y =
          fma(widened(from[i][column * layer.feature_stride]), layer.unit, -(shift[i][column] * layer.unit));
      sum[i] = fma(y, y, sum[i]);
    }
#pragma unroll
  for (int i = 0; i < count; ++i) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) sum[i] += __shfl_xor_sync(kFullWarp, sum[i], step);
    if (lane == 0 && first + i < positions * rows) layer.norms[first + i] = sum[i];
  }
}

}  // namespace rgfast::cuda::moments
