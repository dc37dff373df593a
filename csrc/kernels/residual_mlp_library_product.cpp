#include "kernels/residual_mlp_library_product.hpp"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <vector>

#include "rgfast/parallel.hpp"

namespace rgfast::residual_mlp {
namespace {

// Below this many rows packing costs more than it saves.
constexpr std::int64_t kLeastPacked = 192;

}  // namespace

Product::Product(const Library& library, bool shares_rows, const Pieces& shared, const Pieces& taken,
                 std::int64_t k)
    : library_(library), shares_rows_(shares_rows), shared_(shared), taken_(taken), k_(k) {
  packs_ = library.pack != nullptr && std::min(k, shares_rows ? shared.total : k) >= kLeastPacked;
  if (!packs_) {
    shared_ = Pieces(shared.total, std::max<std::int64_t>(shared.total, 1), 1);
    return;
  }
  const Products products(library);
  shared_floats_ = products.packed_floats(shares_rows_, rows(0, 0), columns(0, 0), k);
  taken_floats_ = products.packed_floats(!shares_rows_, rows(0, 0), columns(0, 0), k);
}

void Product::share(const Factor& factor, float* packed, int threads) const {
  if (!packs_) return;
  parallel_for(shared_.count, threads, [&](std::int64_t piece, int) {
    if (shared_.length(piece) == shared_.length(0))
      Products(library_).pack(shares_rows_, rows(0, 0), columns(0, 0), k_, factor.from(shared_.begin(piece)),
                              packed + piece * shared_floats_);
  });
}

// Without packing beforehand the library packs for every tile, which costs a tile of a rows and b columns 42
// (1/a + 1/b) of its time, so that tiles are as large as leaves work for several threads.
Pieces shared_pieces(std::int64_t total) {
  return {total, std::clamp<std::int64_t>(total / 4, 256, 1024), 1};
}

// The library is twice as slow on few rows by 128 columns as on few by 256.
Pieces taken_pieces(const Library& library, std::int64_t total, std::int64_t rows) {
  const std::int64_t least = rows < kLeastPacked ? 256 : 128;
  const std::int64_t most = library.pack != nullptr ? 512 : 1024;
  return {total, std::clamp(total / 8, least, most), 16};
}

bool works(const Library& library) {
  // Whole numbers, so that the order of the sums does not matter; sizes that an interface reading other
  // integers, or a C entry point, would take for something else.
  constexpr std::int64_t m = 5;
  constexpr std::int64_t n = 3;
  constexpr std::int64_t k = 7;
  float a[m * k];
  float b[n * k];
  float got[m * (n + 1)];
  for (std::int64_t i = 0; i < m * k; ++i) a[i] = static_cast<float>(i % 11 - 4);
  for (std::int64_t i = 0; i < n * k; ++i) b[i] = static_cast<float>(i % 7 - 2);
  std::fill(std::begin(got), std::end(got), -1.0f);
  const int before = library.set_threads(3);
  {
    const Products products(library);
    products.multiply(m, n, k, {{a, k}, false}, {{b, k}, false}, {got, n + 1}, false);
    if (library.pack == nullptr) {
      products.multiply(m, n, k, {{a, m}, true}, {{b, n}, true}, {got, n + 1}, true);
    } else {
      std::vector<float> left(static_cast<std::size_t>(products.packed_floats(true, m, n, k)));
      std::vector<float> right(static_cast<std::size_t>(products.packed_floats(false, m, n, k)));
      products.pack(true, m, n, k, {{a, m}, true}, left.data());
      products.pack(false, m, n, k, {{b, n}, true}, right.data());
      products.multiply_packed(m, n, k, left.data(), right.data(), {got, n + 1}, true);
    }
  }
  if (library.set_threads(before) != 3) return false;
  for (std::int64_t i = 0; i < m; ++i) {
    for (std::int64_t j = 0; j < n; ++j) {
      float want = 0.0f;
      for (std::int64_t t = 0; t < k; ++t) want += a[i * k + t] * b[j * k + t] + a[t * m + i] * b[t * n + j];
      if (got[i * (n + 1) + j] != want) return false;
    }
    if (got[i * (n + 1) + n] != -1.0f) return false;
  }
  return true;
}

}  // namespace rgfast::residual_mlp
