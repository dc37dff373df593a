// Products of panels: a tile of xᵀy at a time, accumulated in fp64.
namespace rgfast::cka {
namespace RGFAST_NS {

// Up to two stretches of memory that the next tile reads, fetched a line at a time beside this one's
// products.
struct Ahead {
  const char* at = nullptr;
  const char* end = nullptr;
  const char* then = nullptr;
  const char* then_end = nullptr;
};
RGFAST_INLINE const char* take(Ahead& ahead, std::int64_t lines) {
  if (ahead.at >= ahead.end) {
    ahead.at = ahead.then;
    ahead.end = ahead.then_end;
    ahead.then = ahead.then_end = nullptr;
  }
  const char* const from = ahead.at;
  if (from != nullptr) ahead.at += 64 * lines;
  return from;
}

// sum[Rows, Columns] = aᵀ b over `depth` products. `b` are panels `panel` elements apart.
template <class T, int Rows, int Columns>
RGFAST_INLINE void multiply(const T*& a, const T*& b, std::int64_t depth, std::int64_t panel,
                            const char*& ahead, typename Vector<T>::type (*sum)[Columns]) {
  using V = typename Vector<T>::type;
  constexpr int lanes = kLanes<T>;
#pragma GCC unroll 8
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 8
    for (int v = 0; v < Columns; ++v) sum[i][v] = V{};
  for (std::int64_t k = 0; k < depth; ++k, a += lanes, b += lanes, ahead += 64) {
    V right[Columns];
    __builtin_prefetch(ahead, 0, 2);  // past the end does no harm
#pragma GCC unroll 8
    for (int v = 0; v < Columns; ++v) right[v] = load(b + v * panel);
#pragma GCC unroll 8
    for (int i = 0; i < Rows; ++i) {
      const V left = splat(a[i]);
#pragma GCC unroll 8
      for (int v = 0; v < Columns; ++v) sum[i][v] = fused(left, right[v], sum[i][v]);
    }
  }
}

// c[Rows, Columns·lanes] (+)= aᵀ b over `depth` products. Every Stretch of them are summed by themselves, and
// the sum of these sums is widened.
template <class T, std::int64_t Stretch, int Rows, int Columns>
static void product(const T* a, const T* b, std::int64_t depth, std::int64_t panel, double* c, bool add,
                    const char* ahead) {
  using V = typename Vector<T>::type;
  constexpr int lanes = kLanes<T>, parts = lanes / kLanes<double>;
  V sum[Rows][Columns];
  if (Stretch >= kDepth || depth <= Stretch) {
    multiply<T, Rows, Columns>(a, b, depth, panel, ahead, sum);
  } else {
    V before[Rows][Columns];
    multiply<T, Rows, Columns>(a, b, Stretch, panel, ahead, sum);
    for (std::int64_t left = depth - Stretch; left > 0; left -= Stretch) {
#pragma GCC unroll 8
      for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 8
        for (int v = 0; v < Columns; ++v) before[i][v] = sum[i][v];
      multiply<T, Rows, Columns>(a, b, left < Stretch ? left : Stretch, panel, ahead, sum);
#pragma GCC unroll 8
      for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 8
        for (int v = 0; v < Columns; ++v) sum[i][v] = before[i][v] + sum[i][v];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 8
    for (int v = 0; v < Columns; ++v) {
      double* const to = c + i * kTile<T> * lanes + v * lanes;
      Doubles value[parts];
      widen(sum[i][v], value);
#pragma GCC unroll 2
      for (int part = 0; part < parts; ++part) {
        double* const at = to + part * kLanes<double>;
        store(at, add ? load(at) + value[part] : value[part]);
      }
    }
}

// All rows of one panel times `Columns` panels.
template <class T, std::int64_t Stretch, int Columns>
RGFAST_INLINE void strip(const T* a, const T* b, std::int64_t depth, std::int64_t panel, double* c, bool add,
                         Ahead& ahead) {
  constexpr std::int64_t line = kTile<T> * kLanes<T>;
  if constexpr (kLanes<T> == 16) {
    product<T, Stretch, 6, Columns>(a, b, depth, panel, c, add, take(ahead, depth));
    product<T, Stretch, 6, Columns>(a + 6, b, depth, panel, c + 6 * line, add, take(ahead, depth));
    product<T, Stretch, 4, Columns>(a + 12, b, depth, panel, c + 12 * line, add, take(ahead, depth));
  } else if constexpr (kLanes<T> == 2) {
    product<T, Stretch, 2, Columns>(a, b, depth, panel, c, add, take(ahead, depth));
  } else {
    for (int i = 0; i < kLanes<T>; i += 4)
      product<T, Stretch, 4, Columns>(a + i, b, depth, panel, c + i * line, add, take(ahead, depth));
  }
}

// c = aᵀ b of `rows` by `columns` panels, each up to kTile and `panel` elements apart; a line of c is always
// kTile panels wide. On the diagonal, panels below it are left as they are.
template <std::int64_t Stretch, class T>
static void tile(const T* a, const T* b, std::int64_t depth, std::int64_t panel, int rows, int columns,
                 bool diagonal, double* c, Ahead ahead) {
  constexpr int lanes = kLanes<T>;
  constexpr std::int64_t line = kTile<T> * lanes;
  for (std::int64_t from = 0; from < depth; from += kDepth) {
    const std::int64_t part = depth - from < kDepth ? depth - from : kDepth;
    for (int group = 0; group < columns; group += kMostColumns)
      for (int i = 0; i < rows; ++i) {
        const int first = diagonal && i > group ? i : group;
        const int end = group + kMostColumns < columns ? group + kMostColumns : columns;
        const T* const left = a + i * panel + from * lanes;
        const T* const right = b + first * panel + from * lanes;
        double* const to = c + i * lanes * line + first * lanes;
        switch (end - first) {
          case 4:
            strip<T, Stretch, kMostColumns>(left, right, part, panel, to, from > 0, ahead);
            break;
          case 3:
            strip<T, Stretch, kMostColumns == 4 ? 3 : 2>(left, right, part, panel, to, from > 0, ahead);
            break;
          case 2:
            strip<T, Stretch, 2>(left, right, part, panel, to, from > 0, ahead);
            break;
          case 1:
            strip<T, Stretch, 1>(left, right, part, panel, to, from > 0, ahead);
            break;
          default:
            break;
        }
      }
  }
}

}  // namespace RGFAST_NS
}  // namespace rgfast::cka
