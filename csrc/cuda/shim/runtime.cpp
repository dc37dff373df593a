#include "cuda/shim/runtime.hpp"

#include <algorithm>
#include <cstring>
#include <map>
#include <mutex>
#include <new>

#include "cuda/shim/sanitizers.hpp"

namespace rgfast::shim {
namespace {

constexpr unsigned kLanes = 32;
constexpr unsigned kBarriers = 16;

struct Block;

struct Copy {
  std::byte* to;
  const std::byte* from;
  std::size_t filled;
};

// One CUDA thread. The fields from `what` on say where it waits.
struct Thread {
  Block* block = nullptr;
  uint3 index{};
  unsigned linear = 0;
  bool exited = false;
  std::unique_ptr<Fibre> fibre;

  const char* what = nullptr;
  Site site{};
  unsigned mask = 0;
  const void* in = nullptr;
  void* out = nullptr;
  Votes votes{};
  bool arrived_at_cluster = false;
  unsigned cluster_phase = 0;
  std::vector<std::vector<Copy>> copies{1};  // committed groups, and the one that is open
};

struct Warp {
  unsigned waiting = 0;
  std::vector<Thread*> lanes;
};

struct Barrier {
  unsigned threads = 0;
  Votes votes{};
  std::vector<Thread*> waiting;
  std::vector<Site> first;  // where each warp came to it
};

struct Block {
  uint3 index{};
  unsigned rank = 0;
  std::byte* shared = nullptr;
  std::vector<Warp> warps;
  Barrier barriers[kBarriers];
  unsigned running = 0;
};

bool same(Site a, Site b) { return a.line == b.line && std::strcmp(a.file, b.file) == 0; }

std::string text(Site site) {
  const char* slash = std::strrchr(site.file, '/');
  return std::string(slash == nullptr ? site.file : slash + 1) + ":" + std::to_string(site.line);
}

std::string text(uint3 at) {
  return "(" + std::to_string(at.x) + ", " + std::to_string(at.y) + ", " + std::to_string(at.z) + ")";
}

std::string hexadecimal(unsigned mask) {
  char digits[16];
  std::snprintf(digits, sizeof digits, "0x%08x", mask);
  return digits;
}

class Runner {
 public:
  Runner(const Launch& launch, void (*body)(void*), void* argument)
      : launch_(launch), body_(body), argument_(argument), random_(launch.seed) {}
  ~Runner();

  void run();
  void run_thread(Thread& thread);
  void suspend();
  void wake(Thread* thread) { ready_.push_back(thread); }
  template <class Threads>
  void wake_all(Threads& threads) {
    ready_.insert(ready_.end(), threads.begin(), threads.end());
    threads.clear();
  }

  const Launch& launch_;
  Thread* now_ = nullptr;
  std::vector<std::unique_ptr<Block>> blocks_;  // of the cluster that runs
  std::vector<Thread*> watching_;               // those in wait_for
  Barrier cluster_;
  unsigned cluster_phase_ = 0;

 private:
  void run_cluster(unsigned x, unsigned y, unsigned z);
  void allocate(Block& block);
  void release();
  std::string deadlock() const;
  std::size_t pick(std::size_t count) {
    return std::uniform_int_distribution<std::size_t>(0, count - 1)(random_);
  }

  void (*body_)(void*);
  void* argument_;
  std::mt19937_64 random_;
  std::vector<std::unique_ptr<Thread>> threads_;
  std::vector<Thread*> ready_;
  std::string error_;
};

Runner* runner = nullptr;

// Kept between launches: mapping thousands of stacks takes longer than a small kernel.
std::vector<std::unique_ptr<Stack>>& stacks() {
  static std::vector<std::unique_ptr<Stack>> all;
  return all;
}

std::string place(const Thread& thread) {
  return "block " + text(thread.block->index) + ", thread " + text(thread.index);
}

void enter(void* thread) { runner->run_thread(*static_cast<Thread*>(thread)); }

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
  block.shared = static_cast<std::byte*>(::operator new(launch_.shared, std::align_val_t(128)));
  std::memset(block.shared, 0xff, launch_.shared);  // NaN in every floating-point format
}

void Runner::release() {
  threads_.clear();
  for (const auto& block : blocks_) {
    RGFAST_ASAN_ONLY(__asan_unpoison_memory_region(block->shared, launch_.shared);)
    ::operator delete(block->shared, std::align_val_t(128));
  }
  blocks_.clear();
  ready_.clear();
  watching_.clear();
}

Runner::~Runner() { release(); }

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

Thread& self() { return *runner->now_; }

void wait_at(const char* what, Site site) {
  self().what = what;
  self().site = site;
  runner->suspend();
}

// Waits until all lanes of the mask are here; true in the one that comes last, which has left the others
// asleep.
bool meet(const char* what, Site site, unsigned mask) {
  Thread& me = self();
  Warp& warp = me.block->warps[me.linear / kLanes];
  const unsigned mine = 1U << (me.linear % kLanes);
  const auto refuse = [&](const std::string& reason) {
    fail(std::string(what) + " at " + text(site) + ", " + place(me) + ": " + reason);
  };
  if ((mask & mine) == 0) refuse("the mask " + hexadecimal(mask) + " does not name the lane that calls");
  if (warp.lanes.size() < kLanes && mask >> warp.lanes.size() != 0)
    refuse("the mask " + hexadecimal(mask) + " names lanes that this warp of " +
           std::to_string(warp.lanes.size()) + " threads does not have");
  for (const Thread* other : warp.lanes) {
    const unsigned bit = 1U << (other->linear % kLanes);
    if ((warp.waiting & bit) == 0 || ((mask & bit) == 0 && (other->mask & mine) == 0)) continue;
    if (other->mask != mask || other->what != what || !same(other->site, site))
      refuse("lane " + std::to_string(me.linear % kLanes) + " comes with mask " + hexadecimal(mask) +
             ", while lane " + std::to_string(other->linear % kLanes) + " waits in " + other->what + " at " +
             text(other->site) + " with mask " + hexadecimal(other->mask));
  }
  me.what = what;
  me.site = site;
  me.mask = mask;
  warp.waiting |= mine;
  if ((warp.waiting & mask) == mask) return true;
  runner->suspend();
  return false;
}

void part(unsigned mask) {
  Thread& me = self();
  Warp& warp = me.block->warps[me.linear / kLanes];
  warp.waiting &= ~mask;
  for (Thread* other : warp.lanes)
    if (other != &me && (mask >> (other->linear % kLanes) & 1U) != 0) runner->wake(other);
}

}  // namespace

// Caught where the thread began: what it has on its stack is released.
void fail(const std::string& sentence) { throw Error(sentence); }

void fail_shuffle(int lane, int source) {
  fail(std::string(self().what) + " at " + text(self().site) + ", block " + text(blockIdx) + ": lane " +
       std::to_string(lane) + " asks for the value of lane " + std::to_string(source) + ", which the mask " +
       hexadecimal(self().mask) + " does not name");
}

int lane() { return static_cast<int>(self().linear % kLanes); }

void warp_collective(const char* what, Site site, unsigned mask, const void* in, void* out, Combine combine) {
  Thread& me = self();
  me.in = in;
  me.out = out;
  if (!meet(what, site, mask)) return;
  const void* all_in[kLanes] = {};
  void* all_out[kLanes] = {};
  for (Thread* lane : me.block->warps[me.linear / kLanes].lanes) {
    all_in[lane->linear % kLanes] = lane->in;
    all_out[lane->linear % kLanes] = lane->out;
  }
  combine(mask, all_in, all_out);
  part(mask);
}

void warp_barrier(const char* what, Site site, unsigned mask) {
  Warp& warp = self().block->warps[self().linear / kLanes];
  RGFAST_TSAN_ONLY(__tsan_release(&warp);)
  if (meet(what, site, mask)) part(mask);
  RGFAST_TSAN_ONLY(__tsan_acquire(&warp);)
  static_cast<void>(warp);
}

Votes block_barrier(const char* what, Site site, unsigned id, unsigned threads, bool vote) {
  Thread& me = self();
  Block& block = *me.block;
  if (id >= kBarriers)
    fail(std::string(what) + " at " + text(site) + ": there are 16 barriers, this is " + std::to_string(id));
  Barrier& barrier = block.barriers[id];
  const auto in_block = static_cast<unsigned>(block.warps.size() - 1) * kLanes +
                        static_cast<unsigned>(block.warps.back().lanes.size());
  if (threads == 0) threads = in_block;
  if (id != 0 && (threads % kLanes != 0 || threads > in_block))
    fail(std::string(what) + " at " + text(site) + ": the threads must be whole warps of the block, not " +
         std::to_string(threads) + " of " + std::to_string(in_block));
  if (barrier.waiting.empty()) {
    barrier.threads = threads;
    barrier.votes = {0, 0};
    barrier.first.assign(block.warps.size(), Site{"", 0});
  }
  Site& first = barrier.first[me.linear / kLanes];
  if (first.line == 0) first = site;
  if (barrier.threads != threads)
    fail(std::string(what) + " at " + text(site) + ", " + place(me) + ": barrier " + std::to_string(id) +
         " awaits " + std::to_string(barrier.threads) + " threads, this one says " + std::to_string(threads));
  if (!same(first, site))
    fail(std::string(what) + ", " + place(me) +
         ": the threads of one warp diverge: some came to the barrier at " + text(first) + ", this one at " +
         text(site));
  ++barrier.votes.threads;
  barrier.votes.nonzero += vote ? 1U : 0U;
  RGFAST_TSAN_ONLY(__tsan_release(&barrier);)
  if (barrier.votes.threads == threads) {
    me.votes = barrier.votes;
    for (Thread* other : barrier.waiting) other->votes = barrier.votes;
    runner->wake_all(barrier.waiting);
  } else {
    barrier.waiting.push_back(&me);
    wait_at(what, site);
  }
  RGFAST_TSAN_ONLY(__tsan_acquire(&barrier);)
  return me.votes;
}

void cluster_arrive(Site site) {
  Thread& me = self();
  if (me.arrived_at_cluster)
    fail("cluster_arrive at " + text(site) + ", " + place(me) +
         ": it has arrived already and must wait first");
  me.arrived_at_cluster = true;
  me.cluster_phase = runner->cluster_phase_;
  RGFAST_TSAN_ONLY(__tsan_release(&runner->cluster_);)
  std::size_t total = 0;
  for (const auto& block : runner->blocks_)
    for (const auto& warp : block->warps) total += warp.lanes.size();
  if (++runner->cluster_.votes.threads < total) return;
  runner->cluster_.votes.threads = 0;
  ++runner->cluster_phase_;
  runner->wake_all(runner->cluster_.waiting);
}

void cluster_wait(Site site) {
  Thread& me = self();
  if (!me.arrived_at_cluster)
    fail("cluster_wait at " + text(site) + ", " + place(me) + ": it has not arrived");
  me.arrived_at_cluster = false;
  if (me.cluster_phase == runner->cluster_phase_) {
    runner->cluster_.waiting.push_back(&me);
    wait_at("cluster_wait", site);
  }
  RGFAST_TSAN_ONLY(__tsan_acquire(&runner->cluster_);)
}

unsigned cluster_rank() { return self().block->rank; }

unsigned cluster_size() { return runner->launch_.cluster; }

std::byte* shared_memory() { return self().block->shared; }

std::byte* peer_memory(void* mine, unsigned rank, Site site) {
  const std::ptrdiff_t offset = static_cast<std::byte*>(mine) - self().block->shared;
  const std::string where = "cluster_map at " + text(site) + ", " + place(self()) + ": ";
  if (rank >= runner->launch_.cluster)
    fail(where + "there is no block of rank " + std::to_string(rank) + " in a cluster of " +
         std::to_string(runner->launch_.cluster));
  if (offset < 0 || static_cast<std::size_t>(offset) > runner->launch_.shared)
    fail(where + "the pointer is outside the block's shared memory");
  return runner->blocks_[rank]->shared + offset;
}

void publish(int* flag, int value) {
  RGFAST_TSAN_ONLY(__tsan_release(flag);)
  *flag = value;
  runner->wake_all(runner->watching_);
}

void wait_for(const int* flag, int at_least, Site site) {
  while (*flag < at_least) {
    runner->watching_.push_back(&self());
    wait_at("wait_for", site);
  }
  RGFAST_TSAN_ONLY(__tsan_acquire(const_cast<int*>(flag));)
}

void copy_async(void* to, const void* from, std::size_t bytes, std::size_t filled) {
  const auto misaligned = [&](const void* address) {
    return reinterpret_cast<std::uintptr_t>(address) % bytes != 0;
  };
  if (filled > bytes || misaligned(to) || misaligned(from))
    fail(place(self()) + ": an asynchronous copy of " + std::to_string(filled) + " of " +
         std::to_string(bytes) + " bytes, whose addresses must be multiples of " + std::to_string(bytes));
  // Until the copy is waited for its target is NaN, so that a read that comes too early shows.
  std::memset(to, 0xff, bytes);
  if (filled < bytes) std::memset(static_cast<std::byte*>(to) + filled, 0, bytes - filled);
  self().copies.back().push_back({static_cast<std::byte*>(to), static_cast<const std::byte*>(from), filled});
}

void copy_async_commit() { self().copies.emplace_back(); }

void copy_async_wait(std::size_t newest) {
  auto& copies = self().copies;
  while (copies.size() > newest + 1) {
    for (const Copy& copy : copies.front()) std::memcpy(copy.to, copy.from, copy.filled);
    copies.erase(copies.begin());
  }
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
  Runner here(launch, body, argument);
  runner = &here;
  struct Clear {
    ~Clear() { runner = nullptr; }
  } clear;
  here.run();
}

}  // namespace rgfast::shim
