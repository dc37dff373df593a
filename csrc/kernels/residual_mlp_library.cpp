#include "kernels/residual_mlp_library.hpp"

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "kernels/residual_mlp_library_product.hpp"
#include "kernels/residual_mlp_workspace.hpp"
#include "rgfast/parallel.hpp"

namespace rgfast::residual_mlp {
namespace {

// Rows that go through all products before the next: the weights are packed again for every chunk, and the
// hidden layer is there for one chunk at a time.
constexpr std::int64_t kChunkHidden = std::int64_t{1} << 22;
constexpr std::int64_t kLeastChunk = 1024;
// Rows of a task that sums over rows, or that goes over rows without a product.
constexpr std::int64_t kRowsOfTask = 64;
// Of the workspace that a thread keeps from call to call most is room that packing asks for and never
// touches.
constexpr std::size_t kKept = std::size_t{1} << 30;

std::int64_t chunk_rows(const Block& block) {
  const std::int64_t most = std::max(kLeastChunk, kChunkHidden / block.hidden);
  const std::int64_t chunks = std::max<std::int64_t>(1, (block.rows + most - 1) / most);
  return std::max<std::int64_t>(1, (block.rows + chunks - 1) / chunks);
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
  const Pieces tasks(rows, kRowsOfTask, kRowsOfTask);
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
  const std::int64_t most = chunk_rows(block);
  const bool long_loops = lengthy(block.rows * block.width, block.hidden);
  const std::int64_t h_stride = apart(block.hidden);
  const auto up_of = [&](std::int64_t rows) {
    return Product(library, true, shared_pieces(rows), taken_pieces(library, block.hidden, most),
                   block.width);
  };
  const auto down_of = [&](std::int64_t rows) {
    return Product(library, true, shared_pieces(rows), taken_pieces(library, block.width, most),
                   block.hidden);
  };
  Layout layout;
  const std::int64_t z_at = layout.floats(most * apart(block.width));
  const std::int64_t h_at = layout.floats(most * h_stride);
  std::int64_t shared_floats = 0;
  std::int64_t taken_floats = 0;
  for (const std::int64_t rows : {most, block.rows % most})
    for (const Product& product : {up_of(rows), down_of(rows)}) {
      shared_floats = std::max(shared_floats, product.shared_floats());
      taken_floats = std::max(taken_floats, product.taken_floats());
    }
  const std::int64_t shared_at = layout.floats(shared_floats);
  const std::int64_t taken_at = layout.floats(threads * taken_floats);
  const Workspace workspace(layout.total(), kKept);
  float* const h = workspace.get() + h_at;
  float* const packed = workspace.get() + shared_at;
  float* const scratch = workspace.get() + taken_at;
  for (std::int64_t row0 = 0; row0 < block.rows; row0 += most) {
    const std::int64_t rows = std::min(most, block.rows - row0);
    const In normed =
        normed_rows(bodies, block, row0, rows, workspace.get() + z_at, nullptr, nullptr, threads);
    const Factor z{normed, false};
    const Product up = up_of(rows);
    up.share(z, packed, threads);
    parallel_for(up.taken().count, threads, long_loops, [&](std::int64_t piece, int slot) {
      const std::int64_t j = up.taken().begin(piece);
      Out u{h + j, h_stride};
      if (block.sums != nullptr) u = {block.sums + row0 * block.hidden + j, block.hidden};
      up.run(Products(library), piece, z, Factor{{block.w1, block.width}, false}.from(j), packed,
             scratch + slot * taken_floats, u, false, [&](std::int64_t other) {
               const std::int64_t r = up.shared().begin(other);
               bodies.activate(block, u.at + r * u.stride, u.stride, up.shared().length(other), j,
                               up.taken().length(piece), h + r * h_stride + j, h_stride);
             });
    });
    const Factor hidden{{h, h_stride}, false};
    const Product down = down_of(rows);
    down.share(hidden, packed, threads);
    parallel_for(down.taken().count, threads, long_loops, [&](std::int64_t piece, int slot) {
      const std::int64_t k = down.taken().begin(piece);
      down.run(Products(library), piece, hidden, Factor{{block.w2, block.hidden}, false}.from(k), packed,
               scratch + slot * taken_floats, {y + row0 * block.width + k, block.width}, false,
               [&](std::int64_t other) {
                 bodies.finish(block, row0 + down.shared().begin(other), down.shared().length(other), k,
                               down.taken().length(piece), y);
               });
    });
  }
}

void library_backward(const Library& library, const Block& block, const float* dy, const Gradients& gradients,
                      int threads) {
  const Bodies bodies = library_bodies();
  const std::int64_t width = block.width;
  const std::int64_t hidden = block.hidden;
  const std::int64_t padded = aligned(width);
  const std::int64_t most = chunk_rows(block);
  const bool long_loops = lengthy(block.rows * width, hidden);
  const bool of_rows =
      gradients.x != nullptr || gradients.norm_weight != nullptr || gradients.norm_bias != nullptr;
  const bool of_hidden = of_rows || gradients.w1 != nullptr || gradients.b1 != nullptr;
  const bool scaled = block.scale != 1.0f;
  const Pieces units = taken_pieces(library, hidden, most);
  const int slots = static_cast<int>(std::min<std::int64_t>(threads, units.count));
  const std::int64_t z_stride = apart(width);
  const std::int64_t du_stride = apart(hidden);
  const std::int64_t h_stride = apart(units.size);
  const std::int64_t row_tasks = Pieces(most, kRowsOfTask, kRowsOfTask).count + 1;

  // What a piece of hidden units takes part in, and the gradient of norm(x) from all of them.
  struct All {
    Product hidden;  // sums of the first product, and the gradient of h
    Product w2;      // dy^T h
    Product w1;      // du^T norm(x)
    Product back;    // du w1
  };
  const auto products_of = [&](std::int64_t rows) {
    return All{{library, true, shared_pieces(rows), units, width},
               {library, true, shared_pieces(width), units, rows},
               {library, false, shared_pieces(width), units, rows},
               {library, true, shared_pieces(rows), taken_pieces(library, width, most), hidden}};
  };

  Layout layout;
  const std::int64_t totals_at = layout.doubles(aligned(hidden) + 3 * padded);
  const std::int64_t parts_at = layout.doubles(2 * row_tasks * padded);
  const std::int64_t scratch_at = layout.floats(2 * padded * threads);
  const std::int64_t shifts_at = layout.floats(2 * most);
  const std::int64_t z_at = layout.floats(most * z_stride);
  const std::int64_t dys_at = layout.floats(scaled ? most * z_stride : 0);
  const std::int64_t dz_at = layout.floats(of_rows ? most * z_stride : 0);
  const std::int64_t du_at = layout.floats(most * du_stride);
  const std::int64_t h_at = layout.floats(slots * most * h_stride);
  const std::int64_t dx_at = layout.floats(of_rows && gradients.x == nullptr ? block.rows * width : 0);
  std::int64_t shared_floats = 0;
  std::int64_t taken_floats = 0;
  for (const std::int64_t rows : {most, block.rows % most}) {
    const All all = products_of(rows);
    shared_floats =
        std::max({shared_floats, all.back.shared_floats(),
                  2 * all.hidden.shared_floats() + all.w2.shared_floats() + all.w1.shared_floats()});
    taken_floats = std::max({taken_floats, all.hidden.taken_floats(), all.w2.taken_floats(),
                             all.w1.taken_floats(), all.back.taken_floats()});
  }
  const std::int64_t shared_at = layout.floats(shared_floats);
  const std::int64_t taken_at = layout.floats(threads * taken_floats);
  const Workspace workspace(layout.total(), kKept);
  float* const memory = workspace.get();
  double* const b2_sums = as_doubles(memory + totals_at);
  double* const weight_sums = b2_sums + padded;
  double* const bias_sums = weight_sums + padded;
  double* const b1_sums = bias_sums + padded;
  double* const parts = as_doubles(memory + parts_at);
  float* const shifts = memory + shifts_at;
  float* const factors = shifts + most;
  float* const dz = memory + dz_at;
  float* const du = memory + du_at;
  float* const dx = gradients.x != nullptr ? gradients.x : memory + dx_at;
  std::fill_n(b2_sums, 3 * padded + aligned(hidden), 0.0);
  if (block.rows == 0) {
    if (gradients.w1 != nullptr) std::fill_n(gradients.w1, hidden * width, 0.0f);
    if (gradients.w2 != nullptr) std::fill_n(gradients.w2, hidden * width, 0.0f);
  }

  for (std::int64_t row0 = 0; row0 < block.rows; row0 += most) {
    const std::int64_t rows = std::min(most, block.rows - row0);
    const bool add = row0 > 0;
    const Pieces tasks(rows, kRowsOfTask, kRowsOfTask);
    const All all = products_of(rows);
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

    float* const packed = memory + shared_at;
    float* const packed_dy = packed + all.hidden.shared_floats();
    float* const packed_w2 = packed_dy + all.hidden.shared_floats();
    float* const packed_w1 = packed_w2 + all.w2.shared_floats();
    if (block.sums == nullptr) all.hidden.share({z, false}, packed, threads);
    if (of_hidden) all.hidden.share({dys, false}, packed_dy, threads);
    if (gradients.w2 != nullptr) all.w2.share({dys, true}, packed_w2, threads);
    if (gradients.w1 != nullptr) all.w1.share({z, true}, packed_w1, threads);
    parallel_for(units.count, slots, long_loops, [&](std::int64_t piece, int slot) {
      const std::int64_t j = units.begin(piece);
      const std::int64_t n = units.length(piece);
      float* const h = memory + h_at + slot * most * h_stride;
      float* const scratch = memory + taken_at + slot * taken_floats;
      const Products products(library);
      In u{h, h_stride};
      if (block.sums != nullptr) {
        u = {block.sums + row0 * hidden + j, hidden};
      } else {
        all.hidden.run(products, piece, {z, false}, Factor{{block.w1, width}, false}.from(j), packed, scratch,
                       {h, h_stride}, false);
      }
      if (of_hidden) {
        all.hidden.run(products, piece, {dys, false}, Factor{{block.w2, hidden}, true}.from(j), packed_dy,
                       scratch, {du + j, du_stride}, false, [&](std::int64_t other) {
                         const std::int64_t r = all.hidden.shared().begin(other);
                         bodies.activate_backward(block, u.at + r * u.stride, u.stride,
                                                  all.hidden.shared().length(other), j, n, h + r * h_stride,
                                                  h_stride, du + r * du_stride + j, du_stride, b1_sums + j);
                       });
      } else {
        bodies.activate(block, u.at, u.stride, rows, j, n, h, h_stride);
      }
      if (gradients.w2 != nullptr)
        all.w2.run(products, piece, {dys, true}, {{h, h_stride}, true}, packed_w2, scratch,
                   {gradients.w2 + j, hidden}, add);
      if (gradients.w1 != nullptr)
        all.w1.run(products, piece, {z, true}, {{du + j, du_stride}, true}, packed_w1, scratch,
                   {gradients.w1 + j * width, width}, add);
    });
    if (!of_rows) continue;

    const Factor gradient{{du, du_stride}, false};
    all.back.share(gradient, packed, threads);
    parallel_for(all.back.taken().count, threads, long_loops, [&](std::int64_t piece, int slot) {
      const std::int64_t k = all.back.taken().begin(piece);
      all.back.run(Products(library), piece, gradient, Factor{{block.w1, width}, true}.from(k), packed,
                   memory + taken_at + slot * taken_floats, {dz + k, z_stride}, false);
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

}  // namespace rgfast::residual_mlp
