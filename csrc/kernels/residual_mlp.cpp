#include "kernels/residual_mlp.hpp"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>

#include "kernels/residual_mlp_library.hpp"
#include "kernels/residual_mlp_workspace.hpp"
#include "rgfast/parallel.hpp"

// GCC 12 takes the undefined operand inside its own AVX-512 intrinsics for an uninitialised variable.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

#define RGFAST_TARGET_FILE "kernels/residual_mlp_target-inl.hpp"
#include "rgfast/foreach_target.hpp"

namespace rgfast::residual_mlp {
namespace {

struct Kernels {
  std::int64_t (*shared_floats)(const Block&, bool);
  std::int64_t (*shared_tasks)(const Block&, bool);
  void (*shared_task)(const Block&, bool, std::int64_t, float*);
  std::int64_t (*forward_floats)(const Block&, std::int64_t);
  void (*forward_tile)(const Block&, bool, float*, std::int64_t, std::int64_t, std::int64_t, float*, float*);
  std::int64_t (*few_floats)(const Block&);
  void (*few_normalise)(const Block&, float*);
  void (*few_hidden)(const Block&, std::int64_t, std::int64_t, float*);
  void (*few_outputs)(const Block&, std::int64_t, std::int64_t, const float*, float*);
  std::int64_t (*partial_floats)(const Block&);
  std::int64_t (*backward_floats)(const Block&, std::int64_t);
  std::int64_t (*weights_floats)(const Block&);
  std::int64_t (*weights_tasks)(const Block&);
  void (*weights_task)(const Block&, std::int64_t, float*);
  void (*backward_chunk)(const Block&, float*, const float*, bool, std::int64_t, std::int64_t, std::int64_t,
                         float*, float*, float*, float*, float*);
  void (*add_chunks)(const Block&, const float*, std::int64_t, std::int64_t, std::int64_t, std::int64_t,
                     const Gradients&);
};

#define RGFAST_MLP_KERNELS(ns)                                                                            \
  Kernels {                                                                                               \
    ns::shared_floats, ns::shared_tasks, ns::shared_task, ns::forward_floats, ns::forward_tile,           \
        ns::few_floats, ns::few_normalise, ns::few_hidden, ns::few_outputs, ns::partial_floats,           \
        ns::backward_floats, ns::weights_floats, ns::weights_tasks, ns::weights_task, ns::backward_chunk, \
        ns::add_chunks                                                                                    \
  }

Kernels baseline_kernels() { return RGFAST_MLP_KERNELS(baseline); }
#if RGFAST_ARM
Kernels neon_kernels() { return RGFAST_MLP_KERNELS(neon); }
#endif
#if RGFAST_X86
Kernels avx2_kernels() { return RGFAST_MLP_KERNELS(avx2); }
Kernels avx512_kernels() { return RGFAST_MLP_KERNELS(avx512); }
#endif

Kernels active_kernels() {
  switch (active_isa()) {
#if RGFAST_X86
    case Isa::avx512:
      return avx512_kernels();
    case Isa::avx2:
      return avx2_kernels();
#endif
#if RGFAST_ARM
    case Isa::neon:
      return neon_kernels();
#endif
    default:
      return baseline_kernels();
  }
}

// Packing the weights beforehand pays while they stay in cache; above that, packing each panel again for
// every tile is cheap against the tile's products if the tile has many rows.
constexpr std::int64_t kWholeWeights = std::int64_t{1} << 22;

std::int64_t tile_rows(std::int64_t rows, std::int64_t most, int threads) {
  const std::int64_t share = (rows + threads - 1) / threads;
  const std::int64_t tiles = std::max<std::int64_t>(1, (share + most - 1) / most);
  return (share + tiles - 1) / tiles;
}

// `rows` up to whole sequences where the block mixes their positions.
std::int64_t whole_sequences(const Block& block, std::int64_t rows) {
  return block.mixed > 0 ? (rows + block.mixed - 1) / block.mixed * block.mixed : rows;
}

}  // namespace

// Up to this many rows weights are read as they lie: wide ones cost more to pack. The bits of a row change
// where this is crossed.
constexpr std::int64_t kFewRows = 16;
constexpr std::int64_t kFewRowsOfWide = 48;
constexpr std::int64_t kWide = 128;

bool few(const Block& block, std::int64_t rows) {
  return block.mixed == 0 && block.sums == nullptr &&
         rows <= (block.width < kWide ? kFewRows : kFewRowsOfWide);
}

void forward_few(const Kernels& kernels, const Block& block, float* y, int threads) {
  const Workspace workspace(kernels.few_floats(block));
  float* memory = workspace.get();
  kernels.few_normalise(block, memory);
  const std::int64_t macs = block.rows * block.width * block.hidden;
  const int used = macs > 1 << 16 ? threads : 1;
  const auto split = [&](std::int64_t columns, auto&& body) {
    const std::int64_t piece = std::max<std::int64_t>(16, (columns + 4 * used - 1) / (4 * used) / 16 * 16);
    const std::int64_t pieces = (columns + piece - 1) / piece;
    parallel_for(
        pieces, static_cast<int>(std::min<std::int64_t>(used, pieces)),
        [&](std::int64_t index, int) { body(index * piece, std::min(columns, (index + 1) * piece)); });
  };
  split(block.hidden,
        [&](std::int64_t begin, std::int64_t end) { kernels.few_hidden(block, begin, end, memory); });
  split(block.width,
        [&](std::int64_t begin, std::int64_t end) { kernels.few_outputs(block, begin, end, memory, y); });
}

void forward(const Block& block, float* y, int threads) {
  if (block.rows == 0) return;
  const Kernels kernels = active_kernels();
  if (few(block, block.rows)) return forward_few(kernels, block, y, threads);
  const std::int64_t weights = 2 * block.width * block.hidden;
  const bool whole = weights <= (block.rows < 1024 ? kWholeWeights / 8 : kWholeWeights);
  const std::int64_t capacity = whole_sequences(block, tile_rows(block.rows, whole ? 196 : 392, threads));
  const std::int64_t tiles = (block.rows + capacity - 1) / capacity;
  const std::int64_t shared_floats = aligned(kernels.shared_floats(block, whole));
  const std::int64_t tile_floats = aligned(kernels.forward_floats(block, capacity));
  const int slots = static_cast<int>(std::min<std::int64_t>(threads, tiles));
  const Workspace workspace(shared_floats + slots * tile_floats);
  float* shared = workspace.get();
  float* scratch = shared + shared_floats;
  const bool large = block.width * block.hidden > 1 << 15;
  parallel_for(kernels.shared_tasks(block, whole), large ? threads : 1,
               lengthy(block.rows * block.width, block.hidden),
               [&](std::int64_t task, int) { kernels.shared_task(block, whole, task, shared); });
  parallel_for(tiles, slots, lengthy(block.rows * block.width, block.hidden),
               [&](std::int64_t tile, int slot) {
                 const std::int64_t row0 = tile * capacity;
                 kernels.forward_tile(block, whole, shared, row0, std::min(capacity, block.rows - row0),
                                      capacity, scratch + slot * tile_floats, y);
               });
}

void backward(const Block& block, const float* dy, const Gradients& gradients, int threads) {
  const Kernels kernels = active_kernels();
  const std::int64_t partial_floats = aligned(kernels.partial_floats(block));
  // Chunks and tiles follow from the shape, never from the threads: they decide in which order rows add up.
  const std::int64_t most_chunks = std::clamp<std::int64_t>((std::int64_t{1} << 23) / partial_floats, 2, 8);
  // Adding up a chunk's weight gradients costs as much as the products of some thirty rows.
  const std::int64_t least = std::clamp<std::int64_t>((block.rows + 1) / 2, 128, 512);
  const std::int64_t chunk_rows =
      whole_sequences(block, std::max((block.rows + most_chunks - 1) / most_chunks, least));
  const std::int64_t chunks = std::max<std::int64_t>(1, (block.rows + chunk_rows - 1) / chunk_rows);
  const std::int64_t capacity =
      whole_sequences(block, tile_rows(std::min(chunk_rows, std::max<std::int64_t>(block.rows, 1)), 256, 1));
  const std::int64_t tile_floats = aligned(kernels.backward_floats(block, capacity));
  const int slots = static_cast<int>(std::min<std::int64_t>(threads, chunks));
  const bool whole = chunks > 1 && 3 * block.width * block.hidden <= kWholeWeights;
  const std::int64_t weights_floats = whole ? aligned(kernels.weights_floats(block)) : 0;
  const Workspace workspace(weights_floats + chunks * partial_floats + slots * tile_floats +
                            (gradients.x ? 0 : block.rows * block.width));
  float* packed = whole ? workspace.get() : nullptr;
  float* partials = workspace.get() + weights_floats;
  float* scratch = partials + chunks * partial_floats;
  float* dx = gradients.x != nullptr ? gradients.x : scratch + slots * tile_floats;
  if (whole)
    parallel_for(kernels.weights_tasks(block), block.width * block.hidden > 1 << 15 ? threads : 1,
                 [&](std::int64_t task, int) { kernels.weights_task(block, task, packed); });
  const bool weights = gradients.w1 != nullptr || gradients.w2 != nullptr;
  parallel_for(
      chunks, slots, lengthy(block.rows * block.width, block.hidden), [&](std::int64_t chunk, int slot) {
        const std::int64_t row0 = chunk * chunk_rows;
        kernels.backward_chunk(block, packed, dy, weights, row0, std::min(block.rows, row0 + chunk_rows),
                               capacity, scratch + slot * tile_floats, partials + chunk * partial_floats,
                               chunks == 1 ? gradients.w1 : nullptr, chunks == 1 ? gradients.w2 : nullptr,
                               dx);
      });
  constexpr std::int64_t kPiece = 1 << 14;
  const std::int64_t elements = weights ? block.width * block.hidden : 1;
  const std::int64_t pieces = (elements + kPiece - 1) / kPiece;
  parallel_for(pieces, static_cast<int>(std::min<std::int64_t>(threads, pieces)),
               [&](std::int64_t piece, int) {
                 kernels.add_chunks(block, partials, chunks, partial_floats, piece * kPiece,
                                    std::min(elements, (piece + 1) * kPiece), gradients);
               });
}

std::int64_t stack_floats(const Stack& stack) {
  const Kernels kernels = active_kernels();
  std::int64_t total = 0;
  for (std::int64_t l = 0; l < stack.depth; ++l)
    if (!few(stack.blocks[l], stack.rows_in_all))
      total += aligned(kernels.shared_floats(stack.blocks[l], true));
  return total;
}

void stack_pack(const Stack& stack, float* packed, int threads) {
  const Kernels kernels = active_kernels();
  for (std::int64_t l = 0; l < stack.depth; ++l) {
    const Block& block = stack.blocks[l];
    if (few(block, stack.rows_in_all)) continue;
    const bool large = block.width * block.hidden > 1 << 15;
    parallel_for(kernels.shared_tasks(block, true), large ? threads : 1,
                 [&](std::int64_t task, int) { kernels.shared_task(block, true, task, packed); });
    packed += aligned(kernels.shared_floats(block, true));
  }
}

void stack_few(const Kernels& kernels, const Stack& stack, float* outputs, std::int64_t step, int threads) {
  Block block = stack.blocks[0];
  const std::int64_t floats = block.rows * block.width;
  const std::unique_ptr<float[]> turns(step == 0 ? new float[static_cast<std::size_t>(2 * floats)] : nullptr);
  const Block first = block;
  for (std::int64_t l = 0; l < stack.depth; ++l) {
    const float* x = l == 0 ? first.x : block.x;
    const std::int64_t x_stride = l == 0 ? first.x_stride : first.width;
    block = stack.blocks[l];
    block.rows = first.rows;
    block.x = x;
    block.x_stride = x_stride;
    float* y = outputs + l * step;
    if (step == 0 && l + 1 < stack.depth) y = turns.get() + l % 2 * floats;
    forward_few(kernels, block, y, threads);
    block.x = y;
  }
}

void stack_forward(const Stack& stack, const float* packed, float* outputs, std::int64_t step, int threads) {
  const Block& first = stack.blocks[0];
  if (first.rows == 0) return;
  const Kernels kernels = active_kernels();
  if (few(first, stack.rows_in_all)) return stack_few(kernels, stack, outputs, step, threads);
  const std::int64_t capacity = tile_rows(first.rows, 196, threads);
  const std::int64_t tiles = (first.rows + capacity - 1) / capacity;
  std::int64_t tile_floats = 0;
  std::int64_t work = 0;
  for (std::int64_t l = 0; l < stack.depth; ++l) {
    tile_floats = std::max(tile_floats, aligned(kernels.forward_floats(stack.blocks[l], capacity)));
    work += stack.blocks[l].hidden;
  }
  const int slots = static_cast<int>(std::min<std::int64_t>(threads, tiles));
  const Workspace workspace(slots * tile_floats);
  parallel_for(tiles, slots, lengthy(first.rows * first.width, work), [&](std::int64_t tile, int slot) {
    const std::int64_t row0 = tile * capacity;
    const float* x = first.x;
    std::int64_t x_stride = first.x_stride;
    // The kernels take the shared part as they write it, though a tile only reads.
    float* weights = const_cast<float*>(packed);
    for (std::int64_t l = 0; l < stack.depth; ++l) {
      Block block = stack.blocks[l];
      block.rows = first.rows;
      block.x = x;
      block.x_stride = x_stride;
      float* y = outputs + l * step;
      // In place is safe: a tile's rows are normalised before any of its outputs is written.
      kernels.forward_tile(block, true, weights, row0, std::min(capacity, first.rows - row0), capacity,
                           workspace.get() + slot * tile_floats, y);
      weights += aligned(kernels.shared_floats(block, true));
      x = y;
      x_stride = block.width;
    }
  });
}

Bodies library_bodies() {
  using Get = Bodies (*)();
  static const IsaTable<Get> table = RGFAST_ISA_TABLE(library_bodies);
  return table.active()();
}

void activate(Activation activation, const float* input, float* values, float* slopes, std::int64_t count) {
  using Run = void (*)(Activation, const float*, float*, float*, std::int64_t);
  static const IsaTable<Run> table = RGFAST_ISA_TABLE(activation_values);
  table.active()(activation, input, values, slopes, count);
}

}  // namespace rgfast::residual_mlp
