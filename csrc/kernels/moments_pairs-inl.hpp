// Cross moments of two layers at one position. No include guard: see foreach_target.hpp.
#include "kernels/cka_vector-inl.hpp"
// The rest needs what the first one defines.
#include "kernels/cka_product-inl.hpp"

namespace rgfast::moments {
namespace RGFAST_NS {

namespace simd = cka::RGFAST_NS;
using simd::Doubles;

inline constexpr int kPairLanes = simd::kLanes<float>;
inline constexpr int kHalf = simd::kLanes<double>;

inline std::int64_t pair_lanes() { return kPairLanes; }

// to = (x - shift) unit in fp64, and its squared norm. What lies past the width stays as it is.
template <class S>
RGFAST_INLINE double widened_row(const S* x, const double* shift, double unit, std::int64_t width,
                                 double* to) {
  Doubles norm[2] = {};
  const Doubles units = simd::splat(unit);
  std::int64_t j = 0;
  for (; j + kHalf <= width; j += kHalf) {
    const Doubles value = (simd::wide(x + j) - simd::load(shift + j)) * units;
    simd::store(to + j, value);
    norm[j / kHalf % 2] = simd::fused(value, value, norm[j / kHalf % 2]);
  }
  double rest = 0.0;
  for (; j < width; ++j) {
    to[j] = (static_cast<double>(x[j]) - shift[j]) * unit;
    rest += to[j] * to[j];
  }
  return simd::total(norm[0] + norm[1]) + rest;
}

RGFAST_INLINE double widened_row(const Rows& layer, std::int64_t position, std::int64_t sample, double* to) {
  const double* const shift = layer.shift + position * layer.width;
  const std::int64_t at = position * layer.position_stride + sample * layer.sample_stride;
  if (layer.is_double)
    return widened_row(reinterpret_cast<const double*>(layer.data) + at, shift, layer.unit[position],
                       layer.width, to);
  return widened_row(reinterpret_cast<const float*>(layer.data) + at, shift, layer.unit[position],
                     layer.width, to);
}

// A row into panels, rounded; `off` is taken off first if it is there.
RGFAST_INLINE void narrowed_row(const double* row, const double* off, std::int64_t width, float* to,
                                std::int64_t panel) {
  for (std::int64_t j = 0; j < width; j += kPairLanes, to += panel)
#pragma GCC unroll 2
    for (int half = 0; half < kPairLanes; half += kHalf) {
      const Doubles value = simd::load(row + j + half);
      simd::narrow(to + half, off == nullptr ? value : value - simd::load(off + j + half));
    }
}

RGFAST_INLINE void add_times(double* to, double factor, const double* x, std::int64_t width) {
  const Doubles factors = simd::splat(factor);
  for (std::int64_t j = 0; j < width; j += kHalf)
    simd::store(to + j, simd::fused(factors, simd::load(x + j), simd::load(to + j)));
}

// Samples [first, last) of both layers into panels, and into the sums that squared norms are part of.
static double pack_pair(const PairJob& job, std::int64_t first, std::int64_t last, double* own_products) {
  const Rows &left = *job.left, &right = *job.right;
  double* const u = job.lines;
  double* const v = u + job.line;
  double* const sums = v + job.line;
  double products = 0.0;
  for (std::int64_t i = first; i < last; ++i) {
    const double a = widened_row(left, job.position, i, u);
    if (job.own[0].products != nullptr) {
      own_products[0] += a * a;
      add_times(sums, a, u, left.width);
    }
    if (job.same) continue;
    const double b = widened_row(right, job.position, i, v);
    if (job.own[1].products != nullptr) {
      own_products[1] += b * b;
      add_times(sums + job.line, b, v, right.width);
    }
    float* const to = job.left_panels + (i - first) * kPairLanes;
    narrowed_row(u, nullptr, left.width, to, job.panel);
    narrowed_row(v, job.difference ? u : nullptr, right.width, job.right_panels + (to - job.left_panels),
                 job.panel);
    products += a * b;
    add_times(sums + 2 * job.line, a, v, right.width);
    add_times(sums + 3 * job.line, b, u, left.width);
  }
  return products;
}

// C, `unit` times what was multiplied plus `share` times the own moment, to what is made of it.
RGFAST_INLINE double take_moment(const PairJob& job, const double* cross, double unit, const double* own,
                                 double share) {
  const std::int64_t height = job.left->width, width = job.right->width;
  const double* const e = job.left->move == nullptr ? nullptr : job.left->move + job.position * height;
  const double* const f = job.right->move == nullptr ? nullptr : job.right->move + job.position * width;
  double squares = 0.0;
  for (std::int64_t i = 0; i < height; ++i) {
    double* const total = job.total + i * width;
    const double* const part = cross == nullptr ? nullptr : cross + i * job.line;
    const double* const mine = own == nullptr ? nullptr : own + i * width;
    const double moved = e == nullptr ? 0.0 : e[i];
    Doubles square{}, along{};
    std::int64_t j = 0;
    for (; j + kHalf <= width; j += kHalf) {
      Doubles value = part == nullptr ? Doubles{} : simd::load(part + j) * simd::splat(unit);
      if (mine != nullptr) value = simd::fused(simd::load(mine + j), simd::splat(share), value);
      simd::store(total + j, simd::load(total + j) + value);
      square = simd::fused(value, value, square);
      if (e != nullptr) {
        double* const to = job.moved_right + j;
        simd::store(to, simd::fused(value, simd::splat(moved), simd::load(to)));
        along = simd::fused(value, simd::load(f + j), along);
      }
    }
    double rest = 0.0, edge = 0.0;
    for (; j < width; ++j) {
      const double value =
          (part == nullptr ? 0.0 : part[j] * unit) + (mine == nullptr ? 0.0 : mine[j] * share);
      total[j] += value;
      rest += value * value;
      if (e != nullptr) {
        job.moved_right[j] += value * moved;
        edge += value * f[j];
      }
    }
    squares += simd::total(square) + rest;
    if (e != nullptr) job.moved_left[i] = simd::total(along) + edge;
  }
  return squares;
}

// Products of the panels of so many samples, written to the cross moment, or added.
static void multiply_panels(const PairJob& job, std::int64_t samples, bool add) {
  constexpr std::int64_t side = simd::kTile<float>, line = side * kPairLanes;
  const std::int64_t height = job.left->width;
  const std::int64_t rows = (height + kPairLanes - 1) / kPairLanes;
  const std::int64_t columns = (job.right->width + kPairLanes - 1) / kPairLanes;
  for (std::int64_t r = 0; r < rows; r += side)
    for (std::int64_t c = 0; c < columns; c += side) {
      const std::int64_t wide = columns - c < side ? columns - c : side;
      simd::Ahead ahead;
      simd::tile<cka::kStretch<float>>(job.left_panels + r * job.panel, job.right_panels + c * job.panel,
                                       samples, job.panel,
                                       static_cast<int>(rows - r < side ? rows - r : side),
                                       static_cast<int>(wide), false, job.tile, ahead);
      const std::int64_t high = height - r * kPairLanes < line ? height - r * kPairLanes : line;
      for (std::int64_t i = 0; i < high; ++i) {
        const double* const from = job.tile + i * line;
        double* const to = job.cross + (r * kPairLanes + i) * job.line + c * kPairLanes;
        for (std::int64_t j = 0; j < wide * kPairLanes; j += kHalf)
          simd::store(to + j, add ? simd::load(to + j) + simd::load(from + j) : simd::load(from + j));
      }
    }
}

static void clear(double* to, std::int64_t count) {
  for (std::int64_t i = 0; to != nullptr && i < count; ++i) to[i] = 0.0;
}

static void run_pair(const PairJob& job) {
  const std::int64_t height = job.left->width, width = job.right->width;
  clear(job.left_sums, height);
  clear(job.moved_left, height);
  clear(job.right_sums, width);
  clear(job.moved_right, width);
  *job.norm = 0.0;
  if (!job.same) *job.products = 0.0;
  const double units[2] = {job.left->unit[job.position], job.right->unit[job.position]};
  const bool constant = units[0] == 0.0 || units[1] == 0.0;
  clear(job.lines, 6 * job.line);
  double own_products[2] = {0.0, 0.0}, products = 0.0;
  const bool reads = !job.same || job.own[0].products != nullptr;
  for (std::int64_t first = 0; reads && first < job.samples; first += job.chunk) {
    const std::int64_t last = first + job.chunk < job.samples ? first + job.chunk : job.samples;
    products += pack_pair(job, first, last, own_products);
    if (!job.same && !constant) multiply_panels(job, last - first, first > 0);
  }
  const double* const sums = job.lines + 2 * job.line;
  for (int k = 0; k < 2; ++k) {
    if (job.own[k].products == nullptr) continue;
    const double one = units[k] == 0.0 ? 0.0 : 1.0 / units[k];
    const std::int64_t count = k == 0 ? height : width;
    *job.own[k].products = own_products[k] * one * one * one * one;
    for (std::int64_t j = 0; j < count; ++j)
      job.own[k].left[j] = job.own[k].right[j] = sums[k * job.line + j] * one * one * one;
  }
  if (job.same) {
    *job.norm = take_moment(job, nullptr, 0.0, job.left->own + job.position * height * height, 1.0);
    return;
  }
  if (constant) return;
  const double one = 1.0 / units[0], other = 1.0 / units[1];
  *job.products = products * one * one * other * other;
  for (std::int64_t j = 0; j < width; ++j) job.right_sums[j] = sums[2 * job.line + j] * other * one * one;
  for (std::int64_t j = 0; j < height; ++j) job.left_sums[j] = sums[3 * job.line + j] * one * other * other;
  const double* const own = job.difference ? job.left->own + job.position * height * height : nullptr;
  *job.norm = take_moment(job, job.cross, one * other, own, units[0] / units[1]);
}

template <class S>
RGFAST_INLINE void add_wide(const S* from, std::int64_t width, double* to) {
  std::int64_t j = 0;
  for (; j + kHalf <= width; j += kHalf) simd::store(to + j, simd::load(to + j) + simd::wide(from + j));
  for (; j < width; ++j) to[j] += static_cast<double>(from[j]);
}

static void add_rows(const Rows& rows, std::int64_t positions, std::int64_t sample, double* to) {
  for (std::int64_t p = 0; p < positions; ++p) {
    const std::int64_t at = p * rows.position_stride + sample * rows.sample_stride;
    if (rows.is_double)
      add_wide(reinterpret_cast<const double*>(rows.data) + at, rows.width, to);
    else
      add_wide(reinterpret_cast<const float*>(rows.data) + at, rows.width, to);
  }
}

inline PairKernels pair_kernels() { return {&pair_lanes, &run_pair, &add_rows}; }

}  // namespace RGFAST_NS
}  // namespace rgfast::moments

#undef RGFAST_INLINE
#undef RGFAST_TRANSPOSES
