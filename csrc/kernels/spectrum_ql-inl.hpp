// Root-free QL (Pal, Walker and Kahan; the recurrence of LAPACK's sterf) on one tridiagonal matrix per SIMD
// lane. No include guard: see foreach_target.hpp.
//
// A lane's arithmetic depends on its own matrix alone, so that a result does not depend on which matrices
// share its vector. Lanes seek the same row together, each in its own unreduced block: rows above the block
// are computed with but not written. A zero off-diagonal restarts the recurrence by itself (c = 1, s = 0),
// which is how a lane whose block ends below the others' begins.

namespace rgfast {
namespace RGFAST_NS {

// Matrices come scaled so that their largest entry is in [2^(scale - 1), 2^scale). Above p = floor, which is
// where p is as good as zero, neither r p nor its reciprocal leaves the normal numbers; with c = p / r at u
// and r at the smallest off-diagonal kept, p is well above it.
template <class T>
struct QlLimits;
template <>
struct QlLimits<double> {
  static constexpr int scale = 0;
  static constexpr double floor = 0x1p-330;
  // Squared off-diagonals up to this are dropped: the off-diagonals are below 2 u, which moves no eigenvalue
  // by more, and a shift that far from a diagonal entry may round to the entry itself: it would never go.
  static constexpr double drop = 0x1p-104;
};
template <>
struct QlLimits<float> {
  static constexpr int scale = 20;
  static constexpr float floor = 0x1p-60F;
  static constexpr float drop = 0x1p-6F;
};

// One group of lanes on its way: rows and squared off-diagonals are n vectors each.
template <class T>
struct QlGroup {
  using V = typename Simd<T>::Vec;
  using M = typename Simd<T>::Mask;
  T* d;
  T* e;
  T* copy;  // of both as they were in the beginning
  long long n;
  long long row;  // the eigenvalue being sought
  long long at;   // the row that the sweep does next, going down
  int sweeps;     // so far for this row
  M failed;
  M split;   // lanes in which an off-diagonal has vanished since their block's end was sought
  V bottom;  // last row of each lane's block
  V end;     // the same, but -1 where the lane sits this sweep out
  V sigma;
  V gamma;
  V p;
  V c;
  V s;
};

constexpr int kMostSweeps = 60;

// Begins the next sweep; false when no off-diagonal is left.
template <class T>
inline bool begin_sweep(QlGroup<T>& group) {
  using V = typename Simd<T>::Vec;
  constexpr int L = Simd<T>::lanes;
  const V zero{};
  const V one = broadcast(T(1));
  for (;;) {
    if (group.row >= group.n - 1) return false;
    const V e = load(group.e + group.row * L);
    const auto pending = without(less(zero, e), group.failed);
    if (!any(pending)) {
      ++group.row;
      group.sweeps = 0;
      continue;
    }
    if (++group.sweeps > kMostSweeps) {
      group.failed = either(group.failed, pending);
      continue;
    }
    // Down to the first zero from the row on; the last entry is zero. The end stays where it is until an
    // off-diagonal vanishes.
    const V row = broadcast(static_cast<T>(group.row));
    auto open = both(pending, either(group.split, less_equal(group.bottom, row)));
    group.split = without(group.split, open);
    for (long long at = group.row; any(open);) {
      ++at;
      const auto here = without(open, less(zero, load(group.e + at * L)));
      group.bottom = select(here, broadcast(static_cast<T>(at)), group.bottom);
      open = without(open, here);
    }
    group.end = select(pending, group.bottom, broadcast(T(-1)));
    T ends[L];
    store(ends, group.end);
    T furthest = ends[0];
    for (int lane = 1; lane < L; ++lane) furthest = ends[lane] > furthest ? ends[lane] : furthest;
    const auto last = static_cast<long long>(furthest);
    const V p = load(group.d + group.row * L);
    const V root = sqrt(select(pending, e, one));
    const V ratio = (load(group.d + (group.row + 1) * L) - p) / (root + root);
    const V r = sqrt(fma(ratio, ratio, one));
    const V denominator = select(less(ratio, zero), ratio - r, ratio + r);
    group.sigma = p - root / denominator;
    group.gamma = load(group.d + last * L) - group.sigma;
    group.p = max(group.gamma * group.gamma, broadcast(QlLimits<T>::floor));
    group.c = one;
    group.s = zero;
    group.at = last - 1;
    return true;
  }
}

template <class T>
inline void end_sweep(QlGroup<T>& group) {
  using V = typename Simd<T>::Vec;
  constexpr int L = Simd<T>::lanes;
  V e = group.s * group.p;
  e = select(less_equal(e, broadcast(QlLimits<T>::drop)), V{}, e);
  const auto active = less(V{}, group.end);
  store_where(active, group.e + group.row * L, e);
  store_where(active, group.d + group.row * L, group.sigma + group.gamma);
}

template <class T>
struct QlStep {
  using V = typename Simd<T>::Vec;
  using M = typename Simd<T>::Mask;
  T* d;
  T* e;
  V end;
  V row;
  M inside;  // where the row below the current one is not a block's last, whose off-diagonal is zero
  M split;
  V sigma;
  V gamma;
  V p;
  V c;
  V s;

  RGFAST_INLINE explicit QlStep(const QlGroup<T>& group)
      : d(group.d + group.at * Simd<T>::lanes),
        e(group.e + group.at * Simd<T>::lanes),
        end(group.end),
        row(broadcast(static_cast<T>(group.at))),
        inside(less(row + broadcast(T(1)), end)),
        split(group.split),
        sigma(group.sigma),
        gamma(group.gamma),
        p(group.p),
        c(group.c),
        s(group.s) {}

  RGFAST_INLINE void save(QlGroup<T>& group, long long steps) const {
    group.at -= steps;
    group.split = split;
    group.gamma = gamma;
    group.p = p;
    group.c = c;
    group.s = s;
  }

  RGFAST_INLINE void run() {
    constexpr int L = Simd<T>::lanes;
    const V floor = broadcast(QlLimits<T>::floor);
    const V square = load(e);
    const V r = p + square;
    const V above = s * r;
    const M active = less(row, end);
    row -= broadcast(T(1));
    const M gone = less_equal(above, broadcast(QlLimits<T>::drop));
    split = either(split, both(inside, gone));
    inside = active;
    store_where(active, e + L, select(gone, V{}, above));
    // c = p / r, s = e / r and then p = gamma^2 / c = gamma^2 r / p: one reciprocal of r p serves all.
    const V inverse = reciprocal(r * p);
    const V over_r = inverse * p;
    const M coupled = less(V{}, square);
    // Exactly 1 at a restart: what came before it must leave no trace, not even a rounding.
    const V r_over_p = select(coupled, inverse * (r * r), broadcast(T(1)));
    const M vanished = both(less_equal(p, floor), coupled);
    const V limit = c * square;
    // Where p vanishes the recurrence has a limit: c = 0, s = 1, p = c e with the c before.
    c = select(vanished, V{}, select(coupled, p * over_r, broadcast(T(1))));
    s = select(vanished, broadcast(T(1)), square * over_r);
    const V alpha = load(d);
    const V before = gamma;
    gamma = fnma(s, before, c * (alpha - sigma));
    store_where(active, d + L, before + (alpha - gamma));
    p = max(select(vanished, limit, gamma * gamma * r_over_p), floor);
    d -= L;
    e -= L;
  }
};

// The groups are independent: side by side, one's divisions hide in the latency of the others'.
template <class T>
inline void run_steps(QlGroup<T>* const* groups, int count, long long steps) {
  if (count == 1) {
    QlStep<T> a(*groups[0]);
    for (long long i = 0; i < steps; ++i) a.run();
    a.save(*groups[0], steps);
  } else if (count == 2) {
    QlStep<T> a(*groups[0]);
    QlStep<T> b(*groups[1]);
    for (long long i = 0; i < steps; ++i) {
      a.run();
      b.run();
    }
    a.save(*groups[0], steps);
    b.save(*groups[1], steps);
  } else if (count == 3) {
    QlStep<T> a(*groups[0]);
    QlStep<T> b(*groups[1]);
    QlStep<T> c(*groups[2]);
    for (long long i = 0; i < steps; ++i) {
      a.run();
      b.run();
      c.run();
    }
    a.save(*groups[0], steps);
    b.save(*groups[1], steps);
    c.save(*groups[2], steps);
  } else {
    QlStep<T> a(*groups[0]);
    QlStep<T> b(*groups[1]);
    QlStep<T> c(*groups[2]);
    QlStep<T> f(*groups[3]);
    for (long long i = 0; i < steps; ++i) {
      a.run();
      b.run();
      c.run();
      f.run();
    }
    a.save(*groups[0], steps);
    b.save(*groups[1], steps);
    c.save(*groups[2], steps);
    f.save(*groups[3], steps);
  }
}

constexpr int kQlGroups = 4;

// Sets every group's `d` to its eigenvalues, unsorted, and `failed` to the lanes that did not converge.
// Rows are expected scaled, what is negligible dropped and the pointers set, row and sweeps 0.
template <class T>
inline void ql_groups(QlGroup<T>* all, int count) {
  QlGroup<T>* live[kQlGroups];
  int alive = 0;
  for (int g = 0; g < count; ++g)
    if (begin_sweep(all[g])) live[alive++] = &all[g];
  while (alive > 0) {
    long long steps = live[0]->at - live[0]->row + 1;
    for (int g = 1; g < alive; ++g) {
      const long long own = live[g]->at - live[g]->row + 1;
      steps = own < steps ? own : steps;
    }
    run_steps(live, alive, steps);
    int kept = 0;
    for (int g = 0; g < alive; ++g) {
      QlGroup<T>* const group = live[g];
      if (group->at < group->row) {
        end_sweep(*group);
        if (!begin_sweep(*group)) continue;
      }
      live[kept++] = group;
    }
    alive = kept;
  }
}

// The same recurrence for one matrix that has no company to hide its latency: scalar divisions are faster
// than the refined reciprocal of a vector. Sorts, too. False where it does not converge.
template <class T>
inline bool ql_alone(T* d, T* e, long long n) {
  constexpr T floor = QlLimits<T>::floor;
  constexpr T drop = QlLimits<T>::drop;
  for (long long i = 0; i < n; ++i)
    if (e[i] <= drop) e[i] = T(0);
  for (long long row = 0; row < n - 1; ++row) {
    for (int sweeps = 0; e[row] > T(0); ++sweeps) {
      if (sweeps == kMostSweeps) return false;
      long long end = row;
      while (e[end] > T(0)) ++end;
      T p = d[row];
      const T root = scalar_sqrt(e[row]);
      const T ratio = (d[row + 1] - p) / (root + root);
      const T length = scalar_sqrt(ratio * ratio + T(1));
      const T sigma = p - root / (ratio < T(0) ? ratio - length : ratio + length);
      T gamma = d[end] - sigma;
      p = gamma * gamma > floor ? gamma * gamma : floor;
      T c = T(1);
      T s = T(0);
      for (long long i = end - 1; i >= row; --i) {
        const T square = e[i];
        const T r = p + square;
        const T above = s * r;
        e[i + 1] = above > drop ? above : T(0);
        const T r_over_p = r / p;
        const bool vanished = p <= floor;
        const T limit = c * square;
        c = p / r;
        s = square / r;
        if (__builtin_expect(vanished, 0)) {
          c = T(0);
          s = T(1);
        }
        const T alpha = d[i];
        const T before = gamma;
        gamma = c * (alpha - sigma) - s * before;
        d[i + 1] = before + (alpha - gamma);
        p = gamma * gamma * r_over_p;
        if (__builtin_expect(vanished, 0)) p = limit;
        if (__builtin_expect(p < floor, 0)) p = floor;
      }
      const T last = s * p;
      e[row] = last > drop ? last : T(0);
      d[row] = sigma + gamma;
    }
  }
  insertion_sort(d, n, 1);  // nearly in order as they come
  return true;
}

// Batcher's merge exchange (Knuth, vol. 3, algorithm M): the same comparisons for every lane, any n.
template <class T>
inline void sort_lanes(T* d, long long n) {
  using V = typename Simd<T>::Vec;
  constexpr int L = Simd<T>::lanes;
  if (n < 2) return;
  long long top = 1;
  while (top * 2 < n) top *= 2;
  for (long long p = top; p > 0; p /= 2) {
    long long q = top;
    long long r = 0;
    long long gap = p;
    for (;;) {
      for (long long i = 0; i < n - gap; ++i) {
        if ((i & p) != r) {
          i += p - 1 - (i & (p - 1));  // the rest of this block of p is not compared either
          continue;
        }
        const V a = load(d + i * L);
        const V b = load(d + (i + gap) * L);
        store(d + i * L, min(a, b));
        store(d + (i + gap) * L, max(a, b));
      }
      if (q == p) break;
      gap = q - p;
      q /= 2;
      r = p;
    }
  }
}

}  // namespace RGFAST_NS
}  // namespace rgfast
