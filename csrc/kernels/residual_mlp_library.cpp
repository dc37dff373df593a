#include "kernels/residual_mlp_library.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include "kernels/residual_mlp_workspace.hpp"
#include "rgfast/parallel.hpp"

namespace rgfast::residual_mlp {
namespace {

// A matrix row by row.
struct In {
  const float* at;
  std::int64_t stride;
};

struct Out {
  float* at;
  std::int64_t stride;
};

// Products of one thread, which the library is told on construction and until destruction.
class Products {
 public:
  explicit Products(const Library& library) : library_(library), before_(library.set_threads(1)) {}
  ~Products() { library_.set_threads(before_); }
  Products(const Products&) = delete;
  Products& operator=(const Products&) = delete;

  // c[m][n] = a b^T over k terms, a[m][k] and b[n][k].
  void rows_by_rows(std::int64_t m, std::int64_t n, std::int64_t k, In a, In b, Out c) const {
    run('T', 'N', m, n, k, a, b, c, false);
  }
  // c[m][n] = a b over k terms, a[m][k] and b[k][n].
  void rows_by_columns(std::int64_t m, std::int64_t n, std::int64_t k, In a, In b, Out c) const {
    run('N', 'N', m, n, k, a, b, c, false);
  }
  // c[m][n] (+)= a^T b over k terms, a[k][m] and b[k][n].
  void columns_by_columns(std::int64_t m, std::int64_t n, std::int64_t k, In a, In b, Out c, bool add) const {
    run('N', 'T', m, n, k, a, b, c, add);
  }

 private:
  // The library's columns are our rows: it forms the transpose of c from b and a in turn.
  void run(char of_b, char of_a, std::int64_t m, std::int64_t n, std::int64_t k, In a, In b, Out c,
           bool add) const {
    const float one = 1.0f;
    const float kept = add ? 1.0f : 0.0f;
    library_.sgemm(&of_b, &of_a, &n, &m, &k, &one, b.at, &b.stride, a.at, &a.stride, &kept, c.at, &c.stride);
  }

  const Library& library_;
  int before_;
};

// `total` in pieces as even as whole vectors allow, none above `most`.
struct Pieces {
  std::int64_t total;
  std::int64_t size;
  std::int64_t count;

  Pieces(std::int64_t total_, std::int64_t most) : total(total_) {
    const std::int64_t wanted = std::max<std::int64_t>(1, (total + most - 1) / most);
    size = std::max<std::int64_t>(16, aligned((total + wanted - 1) / wanted));
    count = (total + size - 1) / size;
  }
  std::int64_t begin(std::int64_t index) const { return index * size; }
  std::int64_t length(std::int64_t index) const { return std::min(size, total - index * size); }
};

// A product is repacked by the library for every tile, which costs a tile of a rows and b columns 42 (1/a +
// 1/b) of its time: tiles are large, but no fewer than can keep several threads at work.
constexpr std::int64_t kTileRows = 512;
constexpr std::int64_t kTileColumns = 1024;
constexpr std::int64_t kLeastTiles = 8;
constexpr std::int64_t kLeastColumns = 64;

struct Tiles {
  Pieces rows;
  Pieces columns;

  Tiles(std::int64_t m, std::int64_t n) : rows(m, kTileRows), columns(n, columns_of(m, n)) {}
  std::int64_t count() const { return rows.count * columns.count; }

 private:
  static std::int64_t columns_of(std::int64_t m, std::int64_t n) {
    const std::int64_t below = Pieces(m, kTileRows).count;
    const std::int64_t across = std::max<std::int64_t>(1, kLeastTiles / below);
    return std::clamp(n / across, kLeastColumns, kTileColumns);
  }
};

// Rows that go through all products before the next: the weights are packed again for every chunk, and the
// hidden layer is there for one chunk at a time.
constexpr std::int64_t kChunkHidden = std::int64_t{1} << 23;
constexpr std::int64_t kLeastChunk = 512;
// Rows of a task that sums over rows, or that goes over rows without a product.
constexpr std::int64_t kRowsOfTask = 64;

Pieces chunks_of(const Block& block) {
  return Pieces(block.rows, std::max(kLeastChunk, kChunkHidden / block.hidden));
}

// Rows that no cache set is shared by if their width is a power of two.
std::int64_t apart(std::int64_t width) { return aligned(width) + 16; }

// Memory in the order in which it is asked for.
class Layout {
 public:
  std::int64_t floats(std::int64_t count) {
    const std::int64_t at = total_;
    total_ += aligned(count);
    return at;
  }
  std::int64_t doubles(std::int64_t count) { return floats(2 * count); }
  std::int64_t total() const { return total_; }

 private:
  std::int64_t total_ = 0;
};

double* as_doubles(float* at) { return reinterpret_cast<double*>(at); }

// norm(x) of a chunk as products read it: x itself where there is no norm.
In normed_rows(const Bodies& bodies, const Block& block, std::int64_t row0, std::int64_t rows, float* out,
               float* shifts, float* factors, int threads) {
  if (block.norm == Norm::none && block.norm_weight == nullptr && block.norm_bias == nullptr) {
    if (shifts != nullptr) {
      std::fill_n(shifts, rows, 0.0f);
      std::fill_n(factors, rows, 1.0f);
    }
    return {block.x + row0 * block.x_stride, block.x_stride};
  }
  const std::int64_t stride = apart(block.width);
  const Pieces tasks(rows, kRowsOfTask);
  parallel_for(tasks.count, threads, [&](std::int64_t task, int) {
    const std::int64_t r = tasks.begin(task);
    bodies.normalise(block, row0 + r, tasks.length(task), out + r * stride, stride,
                     shifts != nullptr ? shifts + r : nullptr, factors != nullptr ? factors + r : nullptr);
  });
  return {out, stride};
}

// sums += each of `count` arrays of `size`, in order.
void add_in_order(const double* parts, std::int64_t count, std::int64_t size, double* sums) {
  for (std::int64_t part = 0; part < count; ++part)
    for (std::int64_t i = 0; i < size; ++i) sums[i] += parts[part * size + i];
}

void narrow(const double* from, std::int64_t count, float* to) {
  if (to != nullptr) std::transform(from, from + count, to, [](double v) { return static_cast<float>(v); });
}

}  // namespace

void library_forward(const Library& library, const Block& block, float* y, int threads) {
  if (block.rows == 0) return;
  const Bodies bodies = library_bodies();
  const Pieces chunks = chunks_of(block);
  const bool long_loops = lengthy(block.rows * block.width, block.hidden);
  const std::int64_t h_stride = apart(block.hidden);
  Layout layout;
  const std::int64_t z_at = layout.floats(chunks.size * apart(block.width));
  const std::int64_t h_at = layout.floats(chunks.size * h_stride);
  const Workspace workspace(layout.total());
  float* const h = workspace.get() + h_at;
  for (std::int64_t chunk = 0; chunk < chunks.count; ++chunk) {
    const std::int64_t row0 = chunks.begin(chunk);
    const std::int64_t rows = chunks.length(chunk);
    const In z = normed_rows(bodies, block, row0, rows, workspace.get() + z_at, nullptr, nullptr, threads);
    const Tiles up(rows, block.hidden);
    parallel_for(up.count(), threads, long_loops, [&](std::int64_t tile, int) {
      const std::int64_t r = up.rows.begin(tile / up.columns.count);
      const std::int64_t j = up.columns.begin(tile % up.columns.count);
      const std::int64_t m = up.rows.length(tile / up.columns.count);
      const std::int64_t n = up.columns.length(tile % up.columns.count);
      float* const activated = h + r * h_stride + j;
      Out u{activated, h_stride};
      if (block.sums != nullptr) u = {block.sums + (row0 + r) * block.hidden + j, block.hidden};
      Products(library).rows_by_rows(m, n, block.width, {z.at + r * z.stride, z.stride},
                                     {block.w1 + j * block.width, block.width}, u);
      bodies.activate(block, u.at, u.stride, m, j, n, activated, h_stride);
    });
    const Tiles down(rows, block.width);
    parallel_for(down.count(), threads, long_loops, [&](std::int64_t tile, int) {
      const std::int64_t r = down.rows.begin(tile / down.columns.count);
      const std::int64_t k = down.columns.begin(tile % down.columns.count);
      const std::int64_t m = down.rows.length(tile / down.columns.count);
      const std::int64_t n = down.columns.length(tile % down.columns.count);
      Products(library).rows_by_rows(m, n, block.hidden, {h + r * h_stride, h_stride},
                                     {block.w2 + k * block.hidden, block.hidden},
                                     {y + (row0 + r) * block.width + k, block.width});
      bodies.finish(block, row0 + r, m, k, n, y);
    });
  }
}

void library_backward(const Library& library, const Block& block, const float* dy, const Gradients& gradients,
                      int threads) {
  const Bodies bodies = library_bodies();
  const std::int64_t width = block.width;
  const std::int64_t hidden = block.hidden;
  const std::int64_t padded = aligned(width);
  const Pieces chunks = chunks_of(block);
  const bool long_loops = lengthy(block.rows * width, hidden);
  const bool of_rows =
      gradients.x != nullptr || gradients.norm_weight != nullptr || gradients.norm_bias != nullptr;
  const bool of_hidden = of_rows || gradients.w1 != nullptr || gradients.b1 != nullptr;
  const bool scaled = block.scale != 1.0f;
  const Pieces units(hidden, std::clamp(hidden / kLeastTiles, kLeastColumns, kTileRows));
  const int slots = static_cast<int>(std::min<std::int64_t>(threads, units.count));
  const std::int64_t z_stride = apart(width);
  const std::int64_t du_stride = apart(hidden);
  const std::int64_t h_stride = apart(units.size);
  const std::int64_t row_tasks = Pieces(chunks.size, kRowsOfTask).count;

  Layout layout;
  const std::int64_t totals_at = layout.doubles(aligned(hidden) + units.size + 3 * padded);
  const std::int64_t parts_at = layout.doubles(2 * row_tasks * padded);
  const std::int64_t scratch_at = layout.floats(2 * padded * threads);
  const std::int64_t shifts_at = layout.floats(2 * chunks.size);
  const std::int64_t z_at = layout.floats(chunks.size * z_stride);
  const std::int64_t dys_at = layout.floats(scaled ? chunks.size * z_stride : 0);
  const std::int64_t dz_at = layout.floats(of_rows ? chunks.size * z_stride : 0);
  const std::int64_t du_at = layout.floats(chunks.size * du_stride);
  const std::int64_t h_at = layout.floats(slots * chunks.size * h_stride);
  const std::int64_t dx_at = layout.floats(of_rows && gradients.x == nullptr ? block.rows * width : 0);
  const Workspace workspace(layout.total());
  float* const memory = workspace.get();
  double* const b2_sums = as_doubles(memory + totals_at);
  double* const weight_sums = b2_sums + padded;
  double* const bias_sums = weight_sums + padded;
  double* const b1_sums = bias_sums + padded;
  double* const parts = as_doubles(memory + parts_at);
  float* const shifts = memory + shifts_at;
  float* const factors = shifts + chunks.size;
  float* const dz = memory + dz_at;
  float* const du = memory + du_at;
  float* const dx = gradients.x != nullptr ? gradients.x : memory + dx_at;
  std::fill_n(b2_sums, 3 * padded + aligned(hidden) + units.size, 0.0);
  if (block.rows == 0) {
    if (gradients.w1 != nullptr) std::fill_n(gradients.w1, hidden * width, 0.0f);
    if (gradients.w2 != nullptr) std::fill_n(gradients.w2, hidden * width, 0.0f);
  }

  for (std::int64_t chunk = 0; chunk < chunks.count; ++chunk) {
    const std::int64_t row0 = chunks.begin(chunk);
    const std::int64_t rows = chunks.length(chunk);
    const bool add = chunk > 0;
    const Pieces tasks(rows, kRowsOfTask);
    const In z = normed_rows(bodies, block, row0, rows, memory + z_at, shifts, factors, threads);
    In dys{dy + row0 * width, width};
    if (scaled || gradients.b2 != nullptr) {
      std::fill_n(parts, tasks.count * padded, 0.0);
      parallel_for(tasks.count, threads, [&](std::int64_t task, int) {
        const std::int64_t r = tasks.begin(task);
        bodies.scale(block, dys.at + r * width, tasks.length(task),
                     scaled ? memory + dys_at + r * z_stride : nullptr, z_stride, parts + task * padded);
      });
      add_in_order(parts, tasks.count, padded, b2_sums);
      if (scaled) dys = {memory + dys_at, z_stride};
    }

    parallel_for(units.count, slots, long_loops, [&](std::int64_t piece, int slot) {
      const std::int64_t j = units.begin(piece);
      const std::int64_t n = units.length(piece);
      float* const h = memory + h_at + slot * chunks.size * h_stride;
      const Products products(library);
      In u{h, h_stride};
      if (block.sums != nullptr) {
        u = {block.sums + row0 * hidden + j, hidden};
      } else {
        products.rows_by_rows(rows, n, width, z, {block.w1 + j * width, width}, {h, h_stride});
      }
      if (of_hidden) {
        products.rows_by_columns(rows, n, width, dys, {block.w2 + j, hidden}, {du + j, du_stride});
        bodies.activate_backward(block, u.at, u.stride, rows, j, n, h, h_stride, du + j, du_stride,
                                 b1_sums + j);
      } else {
        bodies.activate(block, u.at, u.stride, rows, j, n, h, h_stride);
      }
      if (gradients.w2 != nullptr)
        products.columns_by_columns(width, n, rows, dys, {h, h_stride}, {gradients.w2 + j, hidden}, add);
      if (gradients.w1 != nullptr)
        products.columns_by_columns(n, width, rows, {du + j, du_stride}, z, {gradients.w1 + j * width, width},
                                    add);
    });
    if (!of_rows) continue;

    const Tiles back(rows, width);
    parallel_for(back.count(), threads, long_loops, [&](std::int64_t tile, int) {
      const std::int64_t r = back.rows.begin(tile / back.columns.count);
      const std::int64_t k = back.columns.begin(tile % back.columns.count);
      Products(library).rows_by_columns(
          back.rows.length(tile / back.columns.count), back.columns.length(tile % back.columns.count), hidden,
          {du + r * du_stride, du_stride}, {block.w1 + k, width}, {dz + r * z_stride + k, z_stride});
    });
    std::fill_n(parts, 2 * tasks.count * padded, 0.0);
    parallel_for(tasks.count, threads, [&](std::int64_t task, int slot) {
      const std::int64_t r = tasks.begin(task);
      for (std::int64_t i = r; i < r + tasks.length(task); ++i)
        std::fill_n(dz + i * z_stride + width, padded - width, 0.0f);
      bodies.normalise_backward(block, dy, row0 + r, tasks.length(task), dz + r * z_stride, z_stride,
                                shifts + r, factors + r, parts + task * padded,
                                parts + (tasks.count + task) * padded,
                                memory + scratch_at + slot * 2 * padded, dx);
    });
    add_in_order(parts, tasks.count, padded, weight_sums);
    add_in_order(parts + tasks.count * padded, tasks.count, padded, bias_sums);
  }
  narrow(b1_sums, hidden, gradients.b1);
  narrow(b2_sums, width, gradients.b2);
  narrow(weight_sums, width, gradients.norm_weight);
  narrow(bias_sums, width, gradients.norm_bias);
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
    products.rows_by_rows(m, n, k, {a, k}, {b, k}, {got, n + 1});
    products.columns_by_columns(m, n, k, {a, m}, {b, n}, {got, n + 1}, true);
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
