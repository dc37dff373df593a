// The threads, warps and blocks of a cluster that runs, and who runs next. Private to the shim: what kernels
// call (runtime.cpp) puts threads to sleep and wakes them, the scheduler (scheduler.cpp) picks among those
// awake.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "cuda/shim/runtime.hpp"
#include "cuda/shim/sanitizers.hpp"

namespace rgfast::shim {

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

  // Places whose addresses stand for its coming to a barrier and its going on, for TSan.
  std::uint64_t arrival = 0, departure = 0;
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

std::string text(Site site);
std::string text(uint3 at);
std::string place(const Thread& thread);

// Runs one launch, a cluster at a time.
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
  std::uint64_t cluster_arrivals_[2] = {};  // places for TSan; nobody is two phases ahead of another

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

extern Runner* runner;  // of the launch that runs

inline Thread& self() { return *runner->now_; }

}  // namespace rgfast::shim
