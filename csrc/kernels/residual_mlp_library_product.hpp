// Products done by the library that the process has already: in tiles, each by one thread, of factors that
// are packed once for all tiles where the library can and it pays.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "kernels/residual_mlp_library.hpp"
#include "kernels/residual_mlp_workspace.hpp"

namespace rgfast::residual_mlp {

// A matrix row by row.
struct In {
  const float* at;
  std::int64_t stride;
};

struct Out {
  float* at;
  std::int64_t stride;
};

// One side of a product over k terms: [size][k], or [k][size] where turned.
struct Factor {
  In matrix;
  bool turned;

  Factor from(std::int64_t index) const {
    return {{matrix.at + (turned ? index : index * matrix.stride), matrix.stride}, turned};
  }
};

// Products c[m][n] (+)= left right of one thread, which the library is told on construction and until
// destruction. The library's columns are our rows, so that what it calls A and B are our right and left.
class Products {
 public:
  explicit Products(const Library& library) : library_(library), before_(library.set_threads(1)) {}
  ~Products() { library_.set_threads(before_); }
  Products(const Products&) = delete;
  Products& operator=(const Products&) = delete;

  void multiply(std::int64_t m, std::int64_t n, std::int64_t k, const Factor& left, const Factor& right,
                Out c, bool add) const {
    const float one = 1.0f;
    const float kept = add ? 1.0f : 0.0f;
    library_.sgemm(right.turned ? "N" : "T", left.turned ? "T" : "N", &n, &m, &k, &one, right.matrix.at,
                   &right.matrix.stride, left.matrix.at, &left.matrix.stride, &kept, c.at, &c.stride);
  }

  std::int64_t packed_floats(bool left, std::int64_t m, std::int64_t n, std::int64_t k) const {
    const std::size_t bytes = library_.pack_size(left ? "B" : "A", &n, &m, &k);
    return aligned(static_cast<std::int64_t>((bytes + sizeof(float) - 1) / sizeof(float)));
  }
  void pack(bool left, std::int64_t m, std::int64_t n, std::int64_t k, const Factor& factor,
            float* to) const {
    const float one = 1.0f;
    const char* turn = factor.turned == left ? "T" : "N";
    library_.pack(left ? "B" : "A", turn, &n, &m, &k, &one, factor.matrix.at, &factor.matrix.stride, to);
  }
  void multiply_packed(std::int64_t m, std::int64_t n, std::int64_t k, const float* left, const float* right,
                       Out c, bool add) const {
    const float kept = add ? 1.0f : 0.0f;
    library_.compute("P", "P", &n, &m, &k, right, &k, left, &k, &kept, c.at, &c.stride);
  }

 private:
  const Library& library_;
  int before_;
};

// `total` in pieces of one size, a multiple of `grain` unless there is but one, and a lesser rest.
struct Pieces {
  std::int64_t total;
  std::int64_t size;
  std::int64_t count;

  Pieces(std::int64_t total_, std::int64_t most, std::int64_t grain) : total(total_) {
    const std::int64_t wanted = (total + most - 1) / most;
    size = wanted <= 1 ? std::max<std::int64_t>(total, 1) : std::max(grain, total / wanted / grain * grain);
    count = (total + size - 1) / size;
  }
  std::int64_t begin(std::int64_t index) const { return index * size; }
  std::int64_t length(std::int64_t index) const { return std::min(size, total - index * size); }
};

// A product whose tiles are `shared` by `taken` pieces, of its rows and columns or the other way round: a
// task takes one of the latter and goes through all of the former. Factors are packed once for all tiles,
// those of shared pieces beforehand, so that tiles can be small; a tile of a lesser size than the first is
// done from the factors as they lie, since what was packed for one size is good for no other. Where packing
// does not pay there is one shared piece.
class Product {
 public:
  Product(const Library& library, bool shares_rows, const Pieces& shared, const Pieces& taken,
          std::int64_t k);

  const Pieces& shared() const { return shared_; }
  const Pieces& taken() const { return taken_; }
  std::int64_t shared_floats() const { return packs_ ? shared_.count * shared_floats_ : 0; }
  std::int64_t taken_floats() const { return packs_ ? taken_floats_ : 0; }

  // Packs the shared pieces of `factor` beforehand, into shared_floats().
  void share(const Factor& factor, float* packed, int threads) const;

  // The tiles of the taken piece `piece`, whose factor is `taken`; `c` is at the first of its elements, and
  // then(shared piece) is called after each tile.
  template <class Then>
  void run(const Products& products, std::int64_t piece, const Factor& shared, const Factor& taken,
           const float* packed, float* scratch, Out c, bool add, const Then& then) const {
    const bool regular = packs_ && taken_.length(piece) == taken_.length(0);
    if (regular) products.pack(!shares_rows_, rows(0, 0), columns(0, 0), k_, taken, scratch);
    for (std::int64_t other = 0; other < shared_.count; ++other) {
      const std::int64_t first = shared_.begin(other);
      const Out tile{c.at + (shares_rows_ ? first * c.stride : first), c.stride};
      const std::int64_t m = rows(other, piece);
      const std::int64_t n = columns(other, piece);
      const Factor part = shared.from(first);
      if (regular && shared_.length(other) == shared_.length(0)) {
        const float* const ready = packed + other * shared_floats_;
        products.multiply_packed(m, n, k_, shares_rows_ ? ready : scratch, shares_rows_ ? scratch : ready,
                                 tile, add);
      } else {
        products.multiply(m, n, k_, shares_rows_ ? part : taken, shares_rows_ ? taken : part, tile, add);
      }
      then(other);
    }
  }
  void run(const Products& products, std::int64_t piece, const Factor& shared, const Factor& taken,
           const float* packed, float* scratch, Out c, bool add) const {
    run(products, piece, shared, taken, packed, scratch, c, add, [](std::int64_t) {});
  }

 private:
  std::int64_t rows(std::int64_t shared, std::int64_t taken) const {
    return shares_rows_ ? shared_.length(shared) : taken_.length(taken);
  }
  std::int64_t columns(std::int64_t shared, std::int64_t taken) const {
    return shares_rows_ ? taken_.length(taken) : shared_.length(shared);
  }

  const Library& library_;
  bool shares_rows_;
  Pieces shared_;
  Pieces taken_;
  std::int64_t k_;
  bool packs_ = false;
  std::int64_t shared_floats_ = 0;
  std::int64_t taken_floats_ = 0;
};

// How rows or columns are cut where tasks share the pieces, and where each takes one; `rows` are those of a
// chunk.
Pieces shared_pieces(std::int64_t total);
Pieces taken_pieces(const Library& library, std::int64_t total, std::int64_t rows);

}  // namespace rgfast::residual_mlp
