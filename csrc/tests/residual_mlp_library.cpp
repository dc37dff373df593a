#include "kernels/residual_mlp_library.hpp"

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <map>
#include <mutex>
#include <tuple>
#include <vector>

#include "tests/check.hpp"
#include "tests/residual_mlp_case.hpp"

namespace {

using namespace rgfast::residual_mlp;

thread_local int threads_of_library = 0;

int set_threads(int count) {
  const int before = threads_of_library;
  threads_of_library = count;
  return before;
}

std::atomic<std::int64_t> calls{0};
std::atomic<std::int64_t> wrong_calls{0};

// Stands in for the library: the definition, element by element, as the sanitizer watches. Every call has to
// come with the library held to one thread, and with strides that hold a column.
void sgemm(const char* trans_a, const char* trans_b, const std::int64_t* m, const std::int64_t* n,
           const std::int64_t* k, const float* alpha, const float* a, const std::int64_t* lda, const float* b,
           const std::int64_t* ldb, const float* beta, float* c, const std::int64_t* ldc) {
  ++calls;
  const bool by_rows = *trans_a == 'T';
  const bool by_columns = *trans_b == 'T';
  const bool right = threads_of_library == 1 && *m > 0 && *n > 0 && *k > 0 && *lda >= (by_rows ? *k : *m) &&
                     *ldb >= (by_columns ? *n : *k) && *ldc >= *m && (*beta == 0.0f || *beta == 1.0f);
  if (!right) ++wrong_calls;
  for (std::int64_t j = 0; j < *n; ++j)
    for (std::int64_t i = 0; i < *m; ++i) {
      float sum = 0.0f;
      for (std::int64_t t = 0; t < *k; ++t)
        sum +=
            (by_rows ? a[i * *lda + t] : a[t * *lda + i]) * (by_columns ? b[t * *ldb + j] : b[j * *ldb + t]);
      float& out = c[j * *ldc + i];
      out = *alpha * sum + (*beta == 0.0f ? 0.0f : *beta * out);
    }
}

const Library plain{sgemm, set_threads};

// A packed factor is the sizes it is for, and then [size][k].
constexpr std::size_t kHeader = 3;

std::size_t pack_size(const char* identifier, const std::int64_t* m, const std::int64_t* n,
                      const std::int64_t* k) {
  return (kHeader + static_cast<std::size_t>((*identifier == 'A' ? *m : *n) * *k)) * sizeof(float);
}

void pack(const char* identifier, const char* trans, const std::int64_t* m, const std::int64_t* n,
          const std::int64_t* k, const float* alpha, const float* source, const std::int64_t* ld,
          float* packed) {
  const bool first = *identifier == 'A';
  const std::int64_t size = first ? *m : *n;
  const bool adjacent = (*trans == 'T') == first;  // whether the terms of an element follow each other
  if (threads_of_library != 1 || *alpha != 1.0f || size < 1 || *k < 1 || *ld < (adjacent ? *k : size))
    ++wrong_calls;
  packed[0] = static_cast<float>(*m);
  packed[1] = static_cast<float>(*n);
  packed[2] = static_cast<float>(*k);
  for (std::int64_t i = 0; i < size; ++i)
    for (std::int64_t t = 0; t < *k; ++t)
      packed[kHeader + static_cast<std::size_t>(i * *k + t)] =
          adjacent ? source[i * *ld + t] : source[t * *ld + i];
}

void compute(const char* trans_a, const char* trans_b, const std::int64_t* m, const std::int64_t* n,
             const std::int64_t* k, const float* a, const std::int64_t*, const float* b, const std::int64_t*,
             const float* beta, float* c, const std::int64_t* ldc) {
  for (const float* packed : {a, b})
    if (packed[0] != static_cast<float>(*m) || packed[1] != static_cast<float>(*n) ||
        packed[2] != static_cast<float>(*k))
      ++wrong_calls;
  if (*trans_a != 'P' || *trans_b != 'P') ++wrong_calls;
  const float one = 1.0f;
  sgemm("T", "N", m, n, k, &one, a + kHeader, k, b + kHeader, k, beta, c, ldc);
}

const Library packing{sgemm, set_threads, pack_size, pack, compute};

using Results = std::vector<std::vector<float>>;

template <class Forward, class Backward>
Results results(const Case& of, const Forward& run_forward, const Backward& run_backward) {
  const Block& b = of.block;
  const std::int64_t sizes[8] = {
      b.rows * b.width, b.rows * b.width, b.hidden * b.width, b.hidden, b.width * b.hidden, b.width,
      b.width,          b.width};
  Results found;
  for (const std::int64_t size : sizes) found.emplace_back(static_cast<std::size_t>(size), NAN);
  run_forward(b, found[0].data());
  run_backward(b, of.dy.data(),
               Gradients{found[1].data(), found[2].data(), found[3].data(), found[4].data(), found[5].data(),
                         found[6].data(), found[7].data()});
  return found;
}

Results by_library(const Case& of, int threads, const Library& library = plain) {
  return results(
      of, [&](const Block& b, float* y) { library_forward(library, b, y, threads); },
      [&](const Block& b, const float* dy, const Gradients& g) {
        library_backward(library, b, dy, g, threads);
      });
}

Results by_ourselves(const Case& of) {
  return results(
      of, [](const Block& b, float* y) { forward(b, y, 2); },
      [](const Block& b, const float* dy, const Gradients& g) { backward(b, dy, g, 2); });
}

// The largest difference, in units of the largest value.
float apart(const Results& a, const Results& b) {
  float most = 0.0f;
  for (std::size_t i = 0; i < a.size(); ++i) {
    float difference = 0.0f;
    float size = 1e-3f;
    for (std::size_t j = 0; j < a[i].size(); ++j) {
      if (!std::isfinite(a[i][j]) || !std::isfinite(b[i][j])) return INFINITY;
      difference = std::max(difference, std::fabs(a[i][j] - b[i][j]));
      size = std::max(size, std::fabs(b[i][j]));
    }
    most = std::max(most, difference / size);
  }
  return most;
}

bool same(const Results& a, const Results& b) {
  for (std::size_t i = 0; i < a.size(); ++i)
    if (!a[i].empty() && std::memcmp(a[i].data(), b[i].data(), a[i].size() * sizeof(float)) != 0)
      return false;
  return true;
}

}  // namespace

TEST(residual_mlp_by_the_library_is_the_block_by_ourselves) {
  int kind = 0;
  for (const std::int64_t rows : {0, 1, 17, 48, 70, 600})
    for (const std::int64_t width : {1, 9, 64, 100})
      for (const std::int64_t hidden : {1, 31, 130}) {
        const auto norm = static_cast<Norm>(kind % 3);
        const auto activation = static_cast<Activation>(kind % 5);
        ++kind;
        // A kink amplifies a rounding error, and one feature has no variance to speak of.
        if (activation == Activation::relu || (width == 1 && norm != Norm::none)) continue;
        const Case with(rows, width, hidden, kind % 4 != 0, norm, activation, kind % 2 == 0 ? 1.0f : 0.5f);
        CHECK(apart(by_library(with, 2), by_ourselves(with)) < 1e-4f);
      }
  CHECK(calls > 0);
  CHECK(wrong_calls == 0);
  CHECK(threads_of_library == 0);
}

// Sizes with a rest in rows, features and units, and without.
TEST(residual_mlp_by_packed_factors_is_the_block_by_ourselves) {
  wrong_calls = 0;
  for (const auto& [rows, width, hidden] :
       {std::tuple{259, 200, 139}, std::tuple{192, 192, 256}, std::tuple{520, 263, 300}}) {
    const Case with(rows, width, hidden, true, Norm::layer, Activation::gelu, rows == 192 ? 1.0f : 0.5f);
    const Results one = by_library(with, 1, packing);
    CHECK(apart(one, by_ourselves(with)) < 1e-4f);
    CHECK(same(by_library(with, 3, packing), one));
  }
  CHECK(wrong_calls == 0);
}

TEST(residual_mlp_by_the_library_does_not_depend_on_threads) {
  for (const std::int64_t rows : {3, 130, 1100}) {
    const Case with(rows, 33, 70, true, Norm::layer, Activation::relu, 0.5f);
    const Results one = by_library(with, 1);
    for (const int threads : {2, 5}) CHECK(same(by_library(with, threads), one));
  }
}

// Which elements of the two products each call writes: the tiles of a product are to cover it once.
TEST(residual_mlp_tiles_cover_each_product_once) {
  static std::mutex lock;
  static std::map<const float*, int> written;
  written.clear();
  const Library counting{
      [](const char* ta, const char* tb, const std::int64_t* m, const std::int64_t* n, const std::int64_t* k,
         const float* alpha, const float* a, const std::int64_t* lda, const float* b, const std::int64_t* ldb,
         const float* beta, float* c, const std::int64_t* ldc) {
        const std::lock_guard<std::mutex> guard(lock);
        for (std::int64_t j = 0; j < *n; ++j)
          for (std::int64_t i = 0; i < *m; ++i) ++written[c + j * *ldc + i];
        sgemm(ta, tb, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
      },
      set_threads};
  Case with(1030, 8, 1100, true, Norm::none, Activation::tanh, 1.0f);
  std::vector<float> y(with.x.size(), NAN);
  std::vector<float> sums(static_cast<std::size_t>(1030 * 1100), NAN);
  with.block.sums = sums.data();
  library_forward(counting, with.block, y.data(), 3);
  CHECK(written.size() == y.size() + sums.size());
  for (const auto& [at, times] : written) {
    const bool inside =
        (at >= y.data() && at < y.data() + y.size()) || (at >= sums.data() && at < sums.data() + sums.size());
    CHECK(inside);
    CHECK(times == 1);
  }
}

TEST(residual_mlp_by_the_library_keeps_sums_that_give_the_same_gradients) {
  for (const std::int64_t rows : {5, 140}) {
    Case with(rows, 40, 90, true, Norm::layer, Activation::gelu, 1.0f);
    const Results again = by_library(with, 2);
    std::vector<float> sums(static_cast<std::size_t>(rows * 90), NAN);
    with.block.sums = sums.data();
    CHECK(apart(by_library(with, 2), again) < 1e-5f);
  }
}

TEST(residual_mlp_forms_only_the_gradients_that_are_wanted) {
  const Case with(70, 20, 50, true, Norm::layer, Activation::silu, 0.5f);
  const Results all = by_library(with, 2);
  for (std::size_t wanted = 1; wanted < 8; ++wanted) {
    std::vector<float> one(all[wanted].size(), NAN);
    float* at[8] = {};
    at[wanted] = one.data();
    library_backward(plain, with.block, with.dy.data(), {at[1], at[2], at[3], at[4], at[5], at[6], at[7]}, 2);
    CHECK(std::memcmp(one.data(), all[wanted].data(), one.size() * sizeof(float)) == 0);
  }
}

TEST(residual_mlp_refuses_a_library_that_errs) {
  CHECK(works(plain));
  CHECK(works(packing));
  Library wrong = packing;
  wrong.compute = [](const char*, const char*, const std::int64_t*, const std::int64_t*, const std::int64_t*,
                     const float*, const std::int64_t*, const float*, const std::int64_t*, const float*,
                     float*, const std::int64_t*) {};
  CHECK(!works(wrong));
  CHECK(!works({[](const char*, const char*, const std::int64_t*, const std::int64_t*, const std::int64_t*,
                   const float*, const float*, const std::int64_t*, const float*, const std::int64_t*,
                   const float*, float*, const std::int64_t*) {},
                set_threads}));
  CHECK(!works({sgemm, [](int) { return 0; }}));
}
