// Eigenvalues of many symmetric matrices.
#pragma once

#include <cstddef>
#include <cstdint>

#include "rgfast/view.hpp"

namespace rgfast::spectrum {

enum class Trouble : int { none = 0, not_finite = 1, not_converged = 2 };

// The first matrix in trouble.
struct Status {
  std::int64_t index = -1;
  Trouble trouble = Trouble::none;
};

// How a matrix is reduced: beside others in the lanes of a vector, or by itself. `choose` goes by the size
// and the number of the matrices, never by the threads.
enum class Route : int { choose = 0, lanes = 1, single = 2 };

// Ascending eigenvalues of a[..., d, d] (fp64 or fp32; the lower triangle is read) into values[..., d] of
// the same dtype. Values of a matrix in trouble are NaN.
Status eigvalsh(const View& a, const View& values, int threads, Route route);

// Bytes of scratch that a thread takes for it.
std::size_t eigvalsh_workspace(DType dtype, std::int64_t batch, std::int64_t d);

// Second moments of x[b, n, d], of any dtype, in fp64: x'x or x x', whichever is smaller, of x 2^-exponent
// less its column means if `centred`. accumulated, exponent and rank_limit (int64) hold b entries each, mean
// (or nullptr) b rows of d: the column means of x 2^-exponent, 0 unless `centred`. matrix (or nullptr) is
// where gram_eigenvalues leaves the moments themselves [b, m, m].
struct MomentInfo {
  double* accumulated;
  std::int64_t* exponent;
  std::int64_t* rank_limit;
  double* mean = nullptr;
  double* matrix = nullptr;
};

// Full symmetric matrices into matrix[b, m, m], m = min(n, d), contiguous.
void gram(const View& x, bool centred, double* matrix, const MomentInfo& info, int threads);

// Their ascending eigenvalues into values[b, m], contiguous, without forming them all; and unless `raw` is
// null, which goes with `centred` and n >= d, those of the moment of x itself into raw[b, m]: both spectra
// from one reduction to tridiagonal form.
Status gram_eigenvalues(const View& x, bool centred, double* values, double* raw, const MomentInfo& info,
                        int threads, Route route);

// The same of centred x (not fp64) without samples g, g + groups, ... for every g: values and raw[b, groups,
// d], info of b groups entries, from the moments of the groups. Returns false, having done nothing, for sizes
// whose matrices are not solved in lanes.
bool left_out_eigenvalues(const View& x, std::int64_t groups, double* values, double* raw,
                          const MomentInfo& info, int threads, Status& status);

// One stage of recovering small eigenvalues of the moments of matrices at[i] of x, which the README of the op
// describes: the directions found in the stages before are taken out of the data, and what is left has a
// moment of its own. Its eigenvectors whose eigenvalues are no less than `share` of the largest follow those
// there are, unless none is smaller or the stage is the last.
constexpr int kRefineStages = 3;
struct Refinement {
  const std::int64_t* at;
  bool centred;
  int stage;  // from 0
  double share;
  double* vectors;      // [batch, m, stride]
  std::int64_t stride;  // at least m, whole vectors of any instruction set: a multiple of 8
  long long* ends;      // [batch, kRefineStages]: how many vectors there are by the end of each stage
  double* residual;     // norm of A V - V Lambda of a stage's vectors
};

// Ascending eigenvalues into values[batch, m]; info (without means) as for `gram`, but that what is
// accumulated after stage 0 is the trace alone.
Status refine(const View& x, std::int64_t batch, const Refinement& step, double* values,
              const MomentInfo& info, int threads);

// What the second of two stages gives, for every matrix: its eigenvalues, how many lead (0: there was no
// second stage), the norm of their residual, and the trace.
struct SecondStage {
  double* values;
  long long* count;
  double* residual;
  double* trace;
};

// What `gram_eigenvalues` does of centred x in lanes, and a second stage, as `refine` makes it, while the
// data are in the cache: of matrices whose effective rank may be off by more than `doubt`, centred and, in
// second[1], as they are. Returns false, having done nothing, for sizes whose matrices are not solved in
// lanes.
bool refined_eigenvalues(const View& x, double doubt, double share, double* values, double* raw,
                         const MomentInfo& info, const SecondStage* second, int threads, Status& status);

// Effective ranks by singular values or by variance, and the bound on the relative error of the former that
// the README of the op derives (infinite where the data are not finite): b entries each.
struct RankInfo {
  bool variance;
  double* rank;
  double* bound;
};

// From the ascending eigenvalues[b, m] of moments summed over `terms` terms.
void effective_ranks(const double* values, std::int64_t batch, std::int64_t m, std::int64_t terms,
                     const MomentInfo& info, const RankInfo& ranks, int threads);

}  // namespace rgfast::spectrum
