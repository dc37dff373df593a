#include "rgfast/parallel.hpp"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>

#if defined(__unix__) || defined(__APPLE__)
#include <dlfcn.h>
#include <pthread.h>
#endif

namespace rgfast::detail {
namespace {

struct Job {
  Task task;
  void* context;
  std::int64_t count;
  std::atomic<std::int64_t> next{0};
  std::atomic<bool> failed{false};
  std::exception_ptr error{};

  Job(Task t, void* c, std::int64_t n) : task(t), context(c), count(n) {}

  void work(int slot) {
    try {
      for (std::int64_t index = 0; !failed.load(std::memory_order_relaxed) &&
                                   (index = next.fetch_add(1, std::memory_order_relaxed)) < count;)
        task(context, index, slot);
    } catch (...) {
      if (!failed.exchange(true)) error = std::current_exception();
    }
  }
};

thread_local bool inside_task = false;

// The entry point of GNU OpenMP's thread team: body(data) on each of `threads` threads, then a barrier.
using Team = void (*)(void (*body)(void*), void* data, unsigned threads, unsigned flags);

#if defined(__unix__) || defined(__APPLE__)
// A forked child does not have the team's threads, and OpenMP would wait for them.
std::atomic<bool> forked{false};

// The team that the process has already (PyTorch brings it), or null. It is found, not linked: a second copy
// of OpenMP would bring threads of its own.
Team team() {
  static const Team found = reinterpret_cast<Team>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return forked.load(std::memory_order_relaxed) ? nullptr : found;
}
#else
Team team() { return nullptr; }
#endif

struct Shared {
  Job& job;
  std::atomic<int> next_slot{0};
};

class Pool {
 public:
  // False where another thread has the pool.
  bool run(Job& job, int threads, bool lengthy) {
    const std::unique_lock<std::mutex> owner(owner_, std::try_to_lock);
    if (!owner.owns_lock()) return false;
    if (const Team borrowed = lengthy ? team() : nullptr) {
      Shared shared{job};
      borrowed(
          [](void* data) {
            Shared& all = *static_cast<Shared*>(data);
            inside_task = true;
            all.job.work(all.next_slot.fetch_add(1));
            inside_task = false;
          },
          &shared, static_cast<unsigned>(threads), 0);
      return true;
    }
    grow(threads - 1);
    {
      const std::lock_guard<std::mutex> lock(state_);
      job_ = &job;
      next_slot_ = 1;
      tickets_ = std::min(threads - 1, helpers_);
    }
    for (int i = std::min(threads - 1, helpers_); i > 0; --i) wake_.notify_one();
    inside_task = true;
    job.work(0);
    inside_task = false;
    std::unique_lock<std::mutex> lock(state_);
    tickets_ = 0;  // a helper that has not woken by now is not waited for
    done_.wait(lock, [this] { return running_ == 0; });
    job_ = nullptr;
    return true;
  }

 private:
  void grow(int wanted) {
    while (helpers_ < wanted) {
      try {
        // Detached, and the pool is never destroyed: a parked helper must not hold up, nor outlive by a
        // destructor, the exit of the interpreter.
        std::thread([this] { help(); }).detach();
      } catch (const std::system_error&) {
        return;  // no thread to be had: those there are do the work
      }
      ++helpers_;
    }
  }

  void help() {
    inside_task = true;
    std::unique_lock<std::mutex> lock(state_);
    for (;;) {
      wake_.wait(lock, [this] { return tickets_ > 0; });
      --tickets_;
      ++running_;
      const int slot = next_slot_++;
      Job* const job = job_;
      lock.unlock();
      job->work(slot);
      lock.lock();
      if (--running_ == 0) done_.notify_one();
    }
  }

  std::mutex owner_;
  std::mutex state_;
  std::condition_variable wake_;
  std::condition_variable done_;
  Job* job_ = nullptr;
  int helpers_ = 0;
  int tickets_ = 0;
  int running_ = 0;
  int next_slot_ = 1;
};

std::atomic<Pool*> current{nullptr};

#if defined(__unix__) || defined(__APPLE__)
// The child has none of the helpers, and the locks may have been held by threads that it does not have
// either: the old pool is left as it is.
void forget_pool() {
  current.store(nullptr, std::memory_order_relaxed);
  forked.store(true, std::memory_order_relaxed);
}

// When the module is loaded, not at the first loop: the parent may have used OpenMP by itself.
[[maybe_unused]] const int watching = pthread_atfork(nullptr, nullptr, forget_pool);
#endif

Pool& pool() {
  Pool* found = current.load(std::memory_order_acquire);
  if (found != nullptr) return *found;
  Pool* fresh = new Pool;
  if (current.compare_exchange_strong(found, fresh, std::memory_order_acq_rel)) return *fresh;
  delete fresh;
  return *found;
}

}  // namespace

void run_tasks(std::int64_t count, int threads, bool lengthy, Task task, void* context) {
  if (count <= 0) return;
  Job job(task, context, count);
  threads = static_cast<int>(std::min<std::int64_t>(threads, count));
  if (threads <= 1 || inside_task || !pool().run(job, threads, lengthy)) {
    const bool outer = inside_task;
    inside_task = true;
    job.work(0);
    inside_task = outer;
  }
  if (job.error) std::rethrow_exception(job.error);
}

}  // namespace rgfast::detail
