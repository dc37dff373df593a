// The shim itself: what barriers, collectives, clusters and shared memory do, and that misuse is a sentence.
#include <cmath>
#include <string>
#include <vector>

#include "cuda/common/async_copy.cuh"
#include "tests/check.hpp"

namespace {

using rgfast::shim::launch;
using rgfast::shim::Launch;

Launch blocks(unsigned grid, unsigned block, std::size_t shared = 0, unsigned cluster = 1) {
  Launch how;
  how.grid = {grid};
  how.block = {block};
  how.shared = shared;
  how.cluster = cluster;
  return how;
}

template <class... P, class... A>
std::string failure(const Launch& how, void (*kernel)(P...), A... arguments) {
  try {
    launch(how, kernel, arguments...);
  } catch (const rgfast::shim::Error& error) {
    return error.what();
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "";
}

bool has(const std::string& text, const std::string& part) {
  if (text.find(part) != std::string::npos) return true;
  std::printf("\"%s\" is not in \"%s\"\n", part.c_str(), text.c_str());
  return false;
}

void row_sums(const double* x, double* out, std::int64_t width) {
  auto* sums = rgfast::cuda::shared_memory<double>();
  double sum = 0;
  for (std::int64_t j = threadIdx.x; j < width; j += blockDim.x) sum += x[blockIdx.x * width + j];
  sums[threadIdx.x] = sum;
  __syncthreads();
  for (unsigned step = blockDim.x / 2; step > 0; step /= 2) {
    if (threadIdx.x < step) sums[threadIdx.x] += sums[threadIdx.x + step];
    __syncthreads();
  }
  if (threadIdx.x == 0) out[blockIdx.x] = sums[0];
}

TEST(a_block_reduces_through_shared_memory) {
  const std::int64_t rows = 5, width = 131;
  std::vector<double> x(static_cast<std::size_t>(rows * width)), out(static_cast<std::size_t>(rows));
  for (std::size_t i = 0; i < x.size(); ++i) x[i] = static_cast<double>(i % 17);
  for (std::uint64_t seed = 0; seed < 5; ++seed) {
    Launch how = blocks(5, 64, 64 * sizeof(double));
    how.seed = seed;
    launch(how, row_sums, x.data(), out.data(), width);
    for (std::int64_t r = 0; r < rows; ++r) {
      double want = 0;
      for (std::int64_t j = 0; j < width; ++j) want += x[static_cast<std::size_t>(r * width + j)];
      CHECK(out[static_cast<std::size_t>(r)] == want);
    }
  }
}

void order(int* out, int* next) {
  out[atomicAdd(next, 1)] = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
}

TEST(a_seed_shuffles_threads_and_blocks_and_repeats) {
  std::vector<std::vector<int>> seen;
  for (const std::uint64_t seed : {1, 1, 2}) {
    Launch how = blocks(3, 40);
    how.seed = seed;
    std::vector<int> out(120, -1);
    int next = 0;
    launch(how, order, out.data(), &next);
    seen.push_back(out);
    std::vector<bool> once(120);
    for (const int thread : out) once[static_cast<std::size_t>(thread)] = true;
    CHECK(once == std::vector<bool>(120, true));
  }
  CHECK(seen[0] == seen[1]);
  CHECK(seen[0] != seen[2]);
}

void indices(unsigned* out) {
  const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  ++out[block * blockDim.x * blockDim.y * blockDim.z + thread];
}

TEST(every_thread_of_every_block_runs_once) {
  Launch how;
  how.grid = {3, 2, 2};
  how.block = {5, 3, 2};
  std::vector<unsigned> out(12 * 30);
  launch(how, indices, out.data());
  CHECK(out == std::vector<unsigned>(12 * 30, 1));
}

void shuffles(int* out) {
  const unsigned full = rgfast::cuda::kFullWarp;
  const int lane = static_cast<int>(threadIdx.x);
  int* mine = out + lane * 8;
  mine[0] = __shfl_sync(full, 100 + lane, 7);
  mine[1] = __shfl_sync(full, 100 + lane, lane + 1, 8);
  mine[2] = __shfl_xor_sync(full, 100 + lane, 5);
  mine[3] = __shfl_up_sync(full, 100 + lane, 3);
  mine[4] = __shfl_down_sync(full, 100 + lane, 3, 16);
  mine[5] = static_cast<int>(__ballot_sync(full, lane % 3 == 0));
  mine[6] = __any_sync(full, lane == 40) * 2 + __all_sync(full, lane < 32);
  // Halves of a warp go their own ways.
  const unsigned half = lane < 16 ? 0xffffU : 0xffff0000U;
  double sum = lane;
  if (lane < 16) {
    for (int bit = 8; bit > 0; bit /= 2) sum += __shfl_xor_sync(half, sum, bit);
  } else {
    for (int bit = 1; bit < 16; bit *= 2) sum += __shfl_xor_sync(half, sum, bit);
    __syncwarp(half);
  }
  mine[7] = static_cast<int>(sum);
}

TEST(shuffles_and_votes) {
  std::vector<int> out(32 * 8);
  launch({}, shuffles, out.data());
  for (int lane = 0; lane < 32; ++lane) {
    const int* mine = out.data() + lane * 8;
    CHECK(mine[0] == 107);
    CHECK(mine[1] == 100 + lane / 8 * 8 + (lane + 1) % 8);
    CHECK(mine[2] == 100 + (lane ^ 5));
    CHECK(mine[3] == 100 + (lane < 3 ? lane : lane - 3));
    CHECK(mine[4] == 100 + (lane % 16 + 3 > 15 ? lane : lane + 3));
    CHECK(mine[5] == 0x49249249);
    CHECK(mine[6] == 1);
    CHECK(mine[7] == (lane < 16 ? 120 : 376));
  }
}

void block_votes(int* out) {
  const int thread = static_cast<int>(threadIdx.x);
  const int or_none = __syncthreads_or(0), or_one = __syncthreads_or(thread == 37);
  const int and_all = __syncthreads_and(1), and_but_one = __syncthreads_and(thread != 5);
  out[thread] = or_none * 8 + or_one * 4 + and_all * 2 + and_but_one + 16 * __syncthreads_count(thread % 2);
}

TEST(block_wide_votes) {
  std::vector<int> out(50);
  launch(blocks(1, 50), block_votes, out.data());
  CHECK(out == std::vector<int>(50, 6 + 16 * 25));
}

// Warp 0 produces for warp 1 by one barrier and is told by another that it may overwrite.
void two_barriers(int* out) {
  auto* box = rgfast::cuda::shared_memory<int>();
  const int lane = static_cast<int>(threadIdx.x % 32);
  for (int round = 0; round < 4; ++round) {
    if (threadIdx.x < 32) {
      box[lane] = 10 * round + lane;
      rgfast::cuda::named_barrier(1, 64);
      rgfast::cuda::named_barrier(2, 64);
    } else {
      rgfast::cuda::named_barrier(1, 64);
      out[round * 32 + lane] = box[31 - lane];
      rgfast::cuda::named_barrier(2, 64);
    }
  }
}

TEST(named_barriers_between_warps) {
  std::vector<int> out(128);
  launch(blocks(1, 64, 32 * sizeof(int)), two_barriers, out.data());
  for (int round = 0; round < 4; ++round)
    for (int lane = 0; lane < 32; ++lane)
      CHECK(out[static_cast<std::size_t>(round * 32 + lane)] == 10 * round + 31 - lane);
}

// Each warp follows the one before it at a distance of one step.
void pipeline(int* out, std::int64_t steps) {
  auto* progress = rgfast::cuda::shared_memory<int>();
  const unsigned warp = threadIdx.x / 32;
  if (threadIdx.x < 4) progress[threadIdx.x] = 0;
  __syncthreads();
  for (int step = 0; step < steps; ++step) {
    if (warp > 0) rgfast::cuda::wait_for(progress + warp - 1, step + 1);
    if (threadIdx.x % 32 == 0) out[step] = 3 * out[step] + static_cast<int>(warp);
    __syncwarp();
    if (threadIdx.x % 32 == 0) rgfast::cuda::publish(progress + warp, step + 1);
  }
}

TEST(flags_order_warps) {
  std::vector<int> out(9);
  launch(blocks(1, 128, 4 * sizeof(int)), pipeline, out.data(), 9);
  CHECK(out == std::vector<int>(9, 3 * (3 * 1 + 2) + 3));
}

void cluster_sums(double* out) {
  auto* mine = rgfast::cuda::shared_memory<double>();
  mine[threadIdx.x] = blockIdx.x * 100.0 + threadIdx.x;
  rgfast::cuda::cluster_sync();
  double sum = 0;
  for (unsigned rank = 0; rank < rgfast::cuda::cluster_size(); ++rank)
    sum += *rgfast::cuda::cluster_map(mine + threadIdx.x, rank);
  out[blockIdx.x * blockDim.x + threadIdx.x] = sum * 10 + rgfast::cuda::cluster_rank();
  rgfast::cuda::cluster_sync();
}

TEST(clusters_read_the_shared_memory_of_their_blocks) {
  std::vector<double> out(4 * 33);
  launch(blocks(4, 33, 33 * sizeof(double), 2), cluster_sums, out.data());
  for (int block = 0; block < 4; ++block)
    for (int thread = 0; thread < 33; ++thread)
      CHECK(out[static_cast<std::size_t>(block * 33 + thread)] ==
            10.0 * (400 * (block / 2) + 100 + 2 * thread) + block % 2);
}

void copies(const double* from, double* out, std::int64_t late) {
  auto* box = rgfast::cuda::shared_memory<double>();
  const unsigned t = threadIdx.x;
  rgfast::cuda::copy_async<8>(box + t, from + t);
  rgfast::cuda::copy_async_commit();
  rgfast::cuda::copy_async<16>(box + 32 + 2 * t, from + 32 + 2 * t, 8);
  rgfast::cuda::copy_async_commit();
  if (late != 0)
    rgfast::cuda::copy_async_wait<1>();
  else
    rgfast::cuda::copy_async_wait<0>();
  __syncthreads();
  out[t] = box[31 - t];
  out[32 + t] = box[32 + 2 * (31 - t)] + box[33 + 2 * (31 - t)];
  rgfast::cuda::copy_async_wait<0>();
}

TEST(asynchronous_copies_are_there_once_waited_for) {
  std::vector<double> from(96), out(64);
  for (std::size_t i = 0; i < from.size(); ++i) from[i] = static_cast<double>(i);
  launch(blocks(1, 32, 96 * sizeof(double)), copies, from.data(), out.data(), 0);
  for (int t = 0; t < 32; ++t) {
    CHECK(out[static_cast<std::size_t>(t)] == 31 - t);
    CHECK(out[static_cast<std::size_t>(32 + t)] == 32 + 2 * (31 - t));
  }
#ifndef RGFAST_TSAN
  launch(blocks(1, 32, 96 * sizeof(double)), copies, from.data(), out.data(), 1);
  CHECK(out[0] == 31);
  CHECK(std::isnan(out[32]));
#endif
}

void reads_unwritten(double* out) {
  out[0] = rgfast::cuda::shared_memory<double>()[0];
  out[1] = rgfast::cuda::shared_memory<float>()[2];
}

TEST(shared_memory_begins_as_nan) {
  double out[2] = {0, 0};
  launch(blocks(1, 1, 16), reads_unwritten, static_cast<double*>(out));
  CHECK(std::isnan(out[0]));
  CHECK(std::isnan(out[1]));
}

void leaves_early() {
  if (threadIdx.x == 5) return;
  __syncthreads();
}

TEST(a_thread_that_misses_a_barrier_is_named) {
  const std::string error = failure(blocks(2, 40), leaves_early);
  CHECK(has(error, "the threads wait for each other forever"));
  CHECK(has(error, "exited: 1 threads, the first is (5, 0, 0)"));
  CHECK(has(error, "waiting in __syncthreads at shim.cpp:"));
  // The shim is fit for use after a failure.
  std::vector<int> out(32 * 8);
  launch({}, shuffles, out.data());
  CHECK(out[0] == 107);
}

void diverges() {
  if (threadIdx.x < 10)
    __syncthreads();
  else
    __syncthreads();
}

TEST(a_barrier_at_two_places_of_one_warp_is_divergence) {
  CHECK(has(failure(blocks(1, 32), diverges), "the threads of one warp diverge"));
}

void missing_lane() {
  if (threadIdx.x != 3) __shfl_xor_sync(rgfast::cuda::kFullWarp, 1.0, 1);
}
void other_mask() { __shfl_xor_sync(threadIdx.x < 16 ? 0xffffffffU : 0xffff0000U, 1.0, 1); }
void unnamed_lane() { __syncwarp(1); }
void unnamed_source() { __shfl_sync(0xffffU << (threadIdx.x / 16 * 16), 1, 31); }
void two_kinds() {
  if (threadIdx.x % 2 == 0)
    __syncwarp();
  else
    __shfl_sync(rgfast::cuda::kFullWarp, 1, 0);
}
void full_mask() { __syncwarp(); }
void own_shuffle() { __any_sync(0x1ffU, 1); }

TEST(misused_warp_collectives_are_named) {
  CHECK(has(failure({}, missing_lane), "waiting in __shfl_xor_sync at shim.cpp:"));
  CHECK(has(failure({}, other_mask), "comes with mask 0xffff"));
  CHECK(has(failure({}, unnamed_lane), "does not name the lane that calls"));
  CHECK(has(failure({}, unnamed_source),
            "asks for the value of lane 31, which the mask 0x0000ffff does not name"));
  CHECK(has(failure({}, two_kinds), "waits in __s"));
  CHECK(has(failure(blocks(1, 9), full_mask), "names lanes that this warp of 9 threads does not have"));
  CHECK(failure(blocks(1, 9), own_shuffle).empty());
}

void waits_in_vain() {
  auto* flag = rgfast::cuda::shared_memory<int>();
  if (threadIdx.x == 0) *flag = 0;
  __syncthreads();
  rgfast::cuda::wait_for(flag, 1);
}
void forgets_to_arrive() { rgfast::cuda::cluster_wait(); }
void one_block_leaves() {
  if (rgfast::cuda::cluster_rank() == 1) return;
  rgfast::cuda::cluster_sync();
}
void no_such_rank() { rgfast::cuda::cluster_map(rgfast::cuda::shared_memory<int>(), 2); }
void not_shared() {
  int own = 0;
  rgfast::cuda::cluster_map(&own, 0);
}
void counts_differ() { rgfast::cuda::named_barrier(3, threadIdx.x < 32 ? 64 : 32); }
void half_a_warp() { rgfast::cuda::named_barrier(3, 16); }
void never_waits(const double* from) {
  rgfast::cuda::copy_async<8>(rgfast::cuda::shared_memory<double>(), from);
}
void misaligned_copy(const double* from) {
  rgfast::cuda::copy_async<16>(rgfast::cuda::shared_memory<double>() + 1, from);
}

TEST(other_misuse_is_named) {
  const double value[2] = {1, 1};
  CHECK(has(failure(blocks(1, 64, 4), waits_in_vain), "waiting in wait_for"));
  CHECK(has(failure(blocks(2, 32, 4, 2), forgets_to_arrive), "it has not arrived"));
  CHECK(has(failure(blocks(2, 32, 4, 2), one_block_leaves), "waiting in cluster_wait"));
  CHECK(has(failure(blocks(2, 32, 4, 2), no_such_rank), "no block of rank 2 in a cluster of 2"));
  CHECK(has(failure(blocks(2, 32, 4, 2), not_shared), "outside the block's shared memory"));
  CHECK(has(failure(blocks(1, 64), counts_differ), "barrier 3 awaits"));
  CHECK(has(failure(blocks(1, 64), half_a_warp), "whole warps of the block, not 16 of 64"));
  CHECK(has(failure(blocks(1, 1, 8), never_waits, &value[0]), "that it has not waited for"));
  CHECK(has(failure(blocks(1, 1, 24), misaligned_copy, &value[0]), "must be multiples of 16"));
}

void nothing() {}

TEST(launches_that_no_gpu_takes_are_refused) {
  CHECK(has(failure(blocks(1, 1025), nothing), "a block has 1 to 1024 threads, not 1025"));
  CHECK(has(failure(blocks(0, 32), nothing), "the grid is empty"));
  CHECK(has(failure(blocks(3, 32, 0, 2), nothing), "divides the grid's width 3, not 2"));
  CHECK(has(failure(blocks(1, 32, 232449), nothing), "232448 is the most"));
}

}  // namespace
