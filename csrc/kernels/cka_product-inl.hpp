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

// c[Rows, Columns·lanes] (+)= aᵀ b over `depth` products, the sum of every `stretch` of them widened. `b` are
// panels `panel` elements apart.
template <class T, int Rows, int Columns>
static void product(const T* a, const T* b, std::int64_t depth, std::int64_t stretch, std::int64_t panel,
                    double* c, bool add, const char* ahead) {
  using V = typename Vector<T>::type;
  constexpr int lanes = kLanes<T>;
  for (std::int64_t from = 0; from < depth; from += stretch, add = true) {
    V sum[Rows][Columns];
#pragma GCC unroll 8
    for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 8
      for (int v = 0; v < Columns; ++v) sum[i][v] = V{};
    const std::int64_t end = from + stretch < depth ? from + stretch : depth;
    for (std::int64_t k = from; k < end; ++k, a += lanes, b += lanes) {
      V right[Columns];
      __builtin_prefetch(ahead + 64 * k, 0, 2);  // past the end does no harm
#pragma GCC unroll 8
      for (int v = 0; v < Columns; ++v) right[v] = load(b + v * panel);
#pragma GCC unroll 8
      for (int i = 0; i < Rows; ++i) {
        const V left = splat(a[i]);
#pragma GCC unroll 8
        for (int v = 0; v < Columns; ++v) sum[i][v] = fused(left, right[v], sum[i][v]);
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 8
      for (int v = 0; v < Columns; ++v) {
        T line[lanes];
        *reinterpret_cast<V*>(line) = sum[i][v];
#pragma GCC unroll 2
        for (int half = 0; half < lanes; half += kLanes<double>) {
          double* const to = c + i * kTile<T> * lanes + v * lanes + half;
          const Doubles value = wide(line + half);
          store(to, add ? load(to) + value : value);
        }
      }
  }
}

// All rows of one panel times `Columns` panels.
template <class T, int Columns>
RGFAST_INLINE void strip(const T* a, const T* b, std::int64_t depth, std::int64_t stretch, std::int64_t panel,
                         double* c, bool add, Ahead& ahead) {
  constexpr std::int64_t line = kTile<T> * kLanes<T>;
  if constexpr (kLanes<T> == 16) {
    product<T, 6, Columns>(a, b, depth, stretch, panel, c, add, take(ahead, depth));
    product<T, 6, Columns>(a + 6, b, depth, stretch, panel, c + 6 * line, add, take(ahead, depth));
    product<T, 4, Columns>(a + 12, b, depth, stretch, panel, c + 12 * line, add, take(ahead, depth));
  } else if constexpr (kLanes<T> == 2) {
    product<T, 2, Columns>(a, b, depth, stretch, panel, c, add, take(ahead, depth));
  } else {
    for (int i = 0; i < kLanes<T>; i += 4)
      product<T, 4, Columns>(a + i, b, depth, stretch, panel, c + i * line, add, take(ahead, depth));
  }
}

// c = aᵀ b of `rows` by `columns` panels, each up to kTile and `panel` elements apart; a line of c is always
// kTile panels wide. On the diagonal, panels below it are left as they are.
template <class T>
static void tile(const T* a, const T* b, std::int64_t depth, std::int64_t stretch, std::int64_t panel,
                 int rows, int columns, bool diagonal, double* c, Ahead ahead) {
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
            strip<T, kMostColumns>(left, right, part, stretch, panel, to, from > 0, ahead);
            break;
          case 3:
            strip<T, kMostColumns == 4 ? 3 : 2>(left, right, part, stretch, panel, to, from > 0, ahead);
            break;
          case 2:
            strip<T, 2>(left, right, part, stretch, panel, to, from > 0, ahead);
            break;
          case 1:
            strip<T, 1>(left, right, part, stretch, panel, to, from > 0, ahead);
            break;
          default:
            break;
        }
      }
  }
}

}  // namespace RGFAST_NS
}  // namespace rgfast::cka
