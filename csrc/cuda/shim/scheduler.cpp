#include "cuda/shim/scheduler.hpp"

#include <algorithm>
#include <cstring>
#include <map>
#include <mutex>
#include <new>

#ifdef RGFAST_TSAN
#include <sys/mman.h>
#endif

namespace rgfast::shim {

Runner* runner = nullptr;

namespace {

// Kept between launches: mapping thousands of stacks takes longer than a small kernel.
std::vector<std::unique_ptr<Stack>>& stacks() {
  static std::vector<std::unique_ptr<Stack>> all;
  return all;
}

// TSan takes an access of one block, and the next block's to the same memory, for a race; what is unmapped it
// forgets. ASan needs what lies around memory of the heap.
std::byte* new_shared_memory(std::size_t bytes) {
#ifdef RGFAST_TSAN
  void* memory = mmap(nullptr, bytes + 1, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
#else
  void* memory = ::operator new(bytes, std::align_val_t(128));
#endif
  return static_cast<std::byte*>(memory);
}

void delete_shared_memory(std::byte* memory, [[maybe_unused]] std::size_t bytes) {
#ifdef RGFAST_TSAN
  munmap(memory, bytes + 1);
#else
  ::operator delete(memory, std::align_val_t(128));
#endif
}

void enter(void* thread) { runner->run_thread(*static_cast<Thread*>(thread)); }

}  // namespace

std::string text(Site site) {
  const char* slash = std::strrchr(site.file, '/');
  return std::string(slash == nullptr ? site.file : slash + 1) + ":" + std::to_string(site.line);
}

std::string text(uint3 at) {
  return "(" + std::to_string(at.x) + ", " + std::to_string(at.y) + ", " + std::to_string(at.z) + ")";
}

std::string place(const Thread& thread) {
  return "block " + text(thread.block->index) + ", thread " + text(thread.index);
}

void Runner::run_thread(Thread& thread) {
  try {
    body_(argument_);
    for (const auto& group : thread.copies)
      if (!group.empty()) fail(place(thread) + " exits with asynchronous copies that it has not waited for");
  } catch (const Error& error) {
    error_ = error.what();
  }
  thread.exited = true;
  thread.what = nullptr;
  // A peer that reads the shared memory of a block that has gone is a fault that ASan then sees.
  if (--thread.block->running == 0 && launch_.cluster > 1) {
    RGFAST_ASAN_ONLY(__asan_poison_memory_region(thread.block->shared, launch_.shared);)
  }
  thread.fibre->leave();
}

void Runner::suspend() { now_->fibre->suspend(); }

void Runner::allocate(Block& block) {
  block.shared = new_shared_memory(launch_.shared);
  std::memset(block.shared, 0xff, launch_.shared);  // NaN in every floating-point format
}

void Runner::release() {
  threads_.clear();
  for (const auto& block : blocks_) {
    RGFAST_ASAN_ONLY(__asan_unpoison_memory_region(block->shared, launch_.shared);)
    delete_shared_memory(block->shared, launch_.shared);
  }
  blocks_.clear();
  ready_.clear();
  watching_.clear();
}

Runner::~Runner() {
  release();
  Fibre::join();
}

void Runner::run_cluster(unsigned x, unsigned y, unsigned z) {
  const dim3 size = launch_.block;
  const unsigned count = size.x * size.y * size.z;
  cluster_ = Barrier{};
  cluster_phase_ = 0;
  while (stacks().size() < static_cast<std::size_t>(count) * launch_.cluster)
    stacks().push_back(std::make_unique<Stack>());
  for (unsigned rank = 0; rank < launch_.cluster; ++rank) {
    blocks_.push_back(std::make_unique<Block>());
    Block& block = *blocks_.back();
    allocate(block);
    block.index = {x + rank, y, z};
    block.rank = rank;
    block.running = count;
    block.warps.resize((count + kLanes - 1) / kLanes);
    for (unsigned t = 0; t < count; ++t) {
      threads_.push_back(std::make_unique<Thread>());
      Thread& thread = *threads_.back();
      thread.block = &block;
      thread.linear = t;
      thread.index = {t % size.x, t / size.x % size.y, t / (size.x * size.y)};
      thread.fibre = std::make_unique<Fibre>(*stacks()[threads_.size() - 1], enter, &thread);
      block.warps[t / kLanes].lanes.push_back(&thread);
      ready_.push_back(&thread);
    }
  }
  std::size_t exited = 0;
  while (!ready_.empty()) {
    std::swap(ready_[pick(ready_.size())], ready_.back());
    now_ = ready_.back();
    ready_.pop_back();
    threadIdx = now_->index;
    blockIdx = now_->block->index;
    now_->fibre->resume();
    if (!error_.empty()) throw Error(error_);
    if (now_->exited) ++exited;
  }
  if (exited != threads_.size()) throw Error(deadlock());
  release();
}

// Who waits where, grouped, and who has exited.
std::string Runner::deadlock() const {
  std::map<std::string, std::vector<const Thread*>> groups;
  for (const auto& thread : threads_) {
    std::string key = "block " + text(thread->block->index) + ": ";
    key += thread->what == nullptr ? "exited"
                                   : "waiting in " + std::string(thread->what) + " at " + text(thread->site);
    groups[key].push_back(thread.get());
  }
  std::string sentence = "the threads wait for each other forever";
  int shown = 0;
  for (const auto& [key, members] : groups) {
    if (++shown > 8) return sentence + "; ...";
    sentence += "; " + key + ": " + std::to_string(members.size()) + " threads, the first is " +
                text(members[0]->index);
  }
  return sentence;
}

void Runner::run() {
  const dim3 grid = launch_.grid;
  std::vector<std::uint64_t> order(static_cast<std::size_t>(grid.x / launch_.cluster) * grid.y * grid.z);
  for (std::size_t i = 0; i < order.size(); ++i) order[i] = i;
  std::shuffle(order.begin(), order.end(), random_);
  blockDim = launch_.block;
  gridDim = grid;
  const std::uint64_t columns = grid.x / launch_.cluster;
  for (const std::uint64_t i : order)
    run_cluster(static_cast<unsigned>(i % columns) * launch_.cluster,
                static_cast<unsigned>(i / columns % grid.y), static_cast<unsigned>(i / columns / grid.y));
}

void run_grid(const Launch& launch, void (*body)(void*), void* argument) {
  const auto refuse = [](const std::string& sentence) { throw std::invalid_argument("launch: " + sentence); };
  const std::uint64_t threads = std::uint64_t{launch.block.x} * launch.block.y * launch.block.z;
  if (threads == 0 || threads > 1024) refuse("a block has 1 to 1024 threads, not " + std::to_string(threads));
  if (launch.grid.x == 0 || launch.grid.y == 0 || launch.grid.z == 0) refuse("the grid is empty");
  if (launch.grid.y > 65535 || launch.grid.z > 65535)
    refuse("the grid is at most 65535 blocks high and deep");
  if (launch.cluster == 0 || launch.cluster > 16 || launch.grid.x % launch.cluster != 0)
    refuse("a cluster is 1 to 16 blocks and divides the grid's width " + std::to_string(launch.grid.x) +
           ", not " + std::to_string(launch.cluster));
  if (launch.shared > 227 * 1024)
    refuse(std::to_string(launch.shared) + " bytes of shared memory; 232448 is the most");
  // The built-in variables and the stacks are the process's.
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  const Unseen host;
  Runner here(launch, body, argument);
  runner = &here;
  struct Clear {
    ~Clear() { runner = nullptr; }
  } clear;
  here.run();
}

}  // namespace rgfast::shim
