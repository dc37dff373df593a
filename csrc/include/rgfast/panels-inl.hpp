// Products of panels [term][lane], summed in registers. No include guard: see foreach_target.hpp.

namespace rgfast {
namespace RGFAST_NS {

// c += a b' for R panels of rows, `Panel` elements apart, and `Columns` columns of one panel, c column-major.
// A term costs R loads and `Columns` broadcasts for R Columns products: three panels by a whole one need 24
// of the 32 registers of AVX-512, and leave the two loads a cycle waiting for the two products.
template <int R, int Columns, long long Panel>
RGFAST_INLINE void panel_block(const double* a, const double* b, long long terms, double* c, long long stride,
                               bool first) {
  constexpr int L = Simd<double>::lanes;
  VecD sum[R][Columns];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int j = 0; j < Columns; ++j) sum[r][j] = VecD{};
  for (long long k = 0; k < terms; ++k) {
    VecD row[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) row[r] = load(a + r * Panel + k * L);
#pragma GCC unroll 8
    for (int j = 0; j < Columns; ++j) {
      const VecD column = broadcast(b[k * L + j]);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) sum[r][j] = fma(row[r], column, sum[r][j]);
    }
  }
#pragma GCC unroll 8
  for (int j = 0; j < Columns; ++j)
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      double* const at = c + j * stride + r * L;
      store(at, first ? sum[r][j] : load(at) + sum[r][j]);
    }
}

}  // namespace RGFAST_NS
}  // namespace rgfast
