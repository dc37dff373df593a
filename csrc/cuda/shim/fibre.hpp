// Fibres: functions that run on stacks of their own and hand the processor back where they choose. The
// context switch saves only what the ABI asks a callee to save, about 5 ns, since a small launch switches
// 100,000 times; swapcontext also makes two system calls for the signal mask.
#pragma once

#include <cstddef>

namespace rgfast::shim {

// A stack with an unmapped page below it, so that an overflow faults instead of reaching a neighbor.
class Stack {
 public:
  static constexpr std::size_t kBytes = 256 * 1024;

  Stack();
  ~Stack();
  Stack(const Stack&) = delete;
  Stack& operator=(const Stack&) = delete;

  std::byte* bottom() const { return base_ + guard_; }
  std::byte* top() const { return bottom() + kBytes; }

 private:
  std::byte* base_;
  std::size_t guard_;
};

class Fibre {
 public:
  // `entry(argument)` begins at the first resume and must end in `leave`.
  Fibre(Stack& stack, void (*entry)(void*), void* argument);
  ~Fibre();
  Fibre(const Fibre&) = delete;
  Fibre& operator=(const Fibre&) = delete;

  void resume();   // from the scheduler: returns at the next suspend or leave
  void suspend();  // from the fibre: returns at the next resume
  void leave();    // from the fibre, for good

  // From the scheduler, for TSan, which takes a switch as no order between the accesses of two fibres: what
  // fibres did that are gone was before what follows.
  static void join();

 private:
  struct Host;

  static void begin(void* self);

  Stack& stack_;
  void (*entry_)(void*);
  void* argument_;
  void* context_ = nullptr;       // where the fibre goes on
  void* host_context_ = nullptr;  // where the scheduler goes on
  // What the sanitizers keep for each stack.
  void* fake_stack_ = nullptr;
  void* host_fake_stack_ = nullptr;
  const void* host_bottom_ = nullptr;
  std::size_t host_bytes_ = 0;
  void* thread_ = nullptr;
  void* host_thread_ = nullptr;
  bool suspended_ = false;
};

}  // namespace rgfast::shim
