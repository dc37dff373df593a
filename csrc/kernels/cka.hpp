// Inner products of the centred Gram matrices of many layers, without ever holding one.
//
// K_l = x_l x_lᵀ of n samples at each of P positions. For every wanted pair (l, m) of layers the kernel
// returns ⟨K, M⟩ of the doubly centred and of the U-centred matrices. Two routes to Σ_{i≠j} K_ij M_ij:
//   samples:  tiles of all K_l over samples, upper triangle only, and products between the tiles;
//   features: ‖x_lᵀ x_m‖² tile by tile, less Σ K_ii M_ii.
// Rows are centred in fp64 and scaled by a power of two first; products of T (float or double) are summed
// over blocks of kDepth and everything after is fp64. What rounding to T leaves of the row sums of K enters
// as a rank-1 correction. The partition of the work depends on shapes alone, and so do the bits.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

namespace rgfast::cka {

// x[P, n, d]: element strides of positions and samples; features are contiguous.
struct Layer {
  const void* data;
  bool is_double;
  std::int64_t position_stride;
  std::int64_t sample_stride;
  std::int64_t width;
};

enum class Status : std::uint8_t { good = 0, constant = 1, not_finite = 2 };

struct Problem {
  std::int64_t positions;
  std::int64_t samples;
  std::vector<Layer> layers;
  std::vector<std::pair<int, int>> pairs;
  bool by_features;
  bool single;  // products of floats, else of doubles
  int threads;
  // Sample i is in group i % groups. With more than one, results are of V = 1 + groups variants, all samples
  // and all but those of each group, from the same products.
  std::int64_t groups = 1;

  std::int64_t variants() const { return groups > 1 ? 1 + groups : 1; }
};

struct Result {
  double* centered;    // [P, V, pairs]
  double* u_centered;  // [P, V, pairs]; meaningless for fewer than 4 samples
  double* trace;       // [P, V, L]: Σ_i K_ii
  double* grand;       // [P, V, L]: Σ_ij K_ij, which is what centring has left of the squared sum of rows
  Status* status;      // [P, L]
};

// Bytes that run() works in.
std::size_t workspace_bytes(const Problem& problem);

// `workspace` is aligned to 64 bytes.
void run(const Problem& problem, const Result& result, std::byte* workspace);

}  // namespace rgfast::cka
