#include "cuda/shim/fibre.hpp"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <deque>
#include <new>

#include "cuda/shim/sanitizers.hpp"

// RGFAST_UCONTEXT forces what other processors get.
#if !defined(RGFAST_UCONTEXT) && !defined(__x86_64__) && !defined(__aarch64__)
#define RGFAST_UCONTEXT
#endif
#ifdef RGFAST_UCONTEXT
#include <ucontext.h>
#endif

// rgfast_switch(&from, to) saves the registers that a callee must keep and the stack pointer in `from`, and
// takes those of `to`.
#if defined(RGFAST_UCONTEXT)
#elif defined(__x86_64__)
asm(R"(
.text
.globl rgfast_switch
rgfast_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.globl rgfast_begin
rgfast_begin:
  movq %r12, %rdi
  callq *%rbx
  ud2
)");
#elif defined(__aarch64__)
asm(R"(
.text
.globl rgfast_switch
.p2align 2
rgfast_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.globl rgfast_begin
.p2align 2
rgfast_begin:
  mov x0, x20
  blr x19
  brk #1
)");
#endif

namespace rgfast::shim {

#ifndef RGFAST_UCONTEXT
// The asm labels keep macOS from putting an underscore in front.
extern "C" void rgfast_switch(void** from, void* to) asm("rgfast_switch");
extern "C" void rgfast_begin() asm("rgfast_begin");

namespace {

// The saved registers of a fibre that has not run: rgfast_begin finds the function and its argument in two of
// them.
void* first_context(Stack& stack, void (*function)(void*), void* argument) {
  auto* top = reinterpret_cast<std::uint64_t*>(stack.top());
#if defined(__x86_64__)
  // r15 r14 r13 r12 rbx rbp, the return address, and two words that keep rsp on 16 bytes in rgfast_begin.
  std::uint64_t* context = top - 9;
  for (int i = 0; i < 9; ++i) context[i] = 0;
  context[3] = reinterpret_cast<std::uint64_t>(argument);
  context[4] = reinterpret_cast<std::uint64_t>(function);
  context[6] = reinterpret_cast<std::uint64_t>(&rgfast_begin);
#else
  std::uint64_t* context = top - 20;
  for (int i = 0; i < 20; ++i) context[i] = 0;
  context[0] = reinterpret_cast<std::uint64_t>(function);
  context[1] = reinterpret_cast<std::uint64_t>(argument);
  context[11] = reinterpret_cast<std::uint64_t>(&rgfast_begin);
#endif
  return context;
}

void drop_context(void*) {}

}  // namespace
#else
namespace {

// makecontext passes ints, so a pointer travels as two.
void trampoline(unsigned high, unsigned low, unsigned argument_high, unsigned argument_low) {
  const auto join = [](unsigned a, unsigned b) { return static_cast<std::uintptr_t>(a) << 32 | b; };
  reinterpret_cast<void (*)(void*)>(join(high, low))(
      reinterpret_cast<void*>(join(argument_high, argument_low)));
}

void* first_context(Stack& stack, void (*function)(void*), void* argument) {
  auto* context = new ucontext_t;
  getcontext(context);
  context->uc_stack.ss_sp = stack.bottom();
  context->uc_stack.ss_size = Stack::kBytes;
  context->uc_link = nullptr;
  const auto f = reinterpret_cast<std::uintptr_t>(function), a = reinterpret_cast<std::uintptr_t>(argument);
  makecontext(context, reinterpret_cast<void (*)()>(trampoline), 4, static_cast<unsigned>(f >> 32),
              static_cast<unsigned>(f), static_cast<unsigned>(a >> 32), static_cast<unsigned>(a));
  return context;
}

void rgfast_switch(void** from, void* to) {
  if (*from == nullptr) *from = new ucontext_t;
  swapcontext(static_cast<ucontext_t*>(*from), static_cast<ucontext_t*>(to));
}

void drop_context(void* context) { delete static_cast<ucontext_t*>(context); }

}  // namespace
#endif

#ifdef RGFAST_TSAN
namespace {

// What TSan takes for threads. It needs 0.3 ms to make one, so they serve again, after many others, since one
// that serves twice does not race with itself: a block races with those that ran just before.
constexpr std::size_t kResting = 400;

std::deque<void*>& resting() {
  static std::deque<void*> all;
  return all;
}

// Places that stand for what the scheduler did before the fibre began, and for what fibres did that are gone.
char before_all, after_all;

void* wake() {
  __tsan_release(&before_all);
  if (resting().size() < kResting) return __tsan_create_fiber(0);
  void* thread = resting().front();
  resting().pop_front();
  return thread;
}

void rest(void* thread, bool suspended) {
  void* host = __tsan_get_current_fiber();
  __tsan_switch_to_fiber(thread, __tsan_switch_to_fiber_no_sync);
  if (suspended) __tsan_ignore_thread_end();
  __tsan_release(&after_all);
  __tsan_switch_to_fiber(host, __tsan_switch_to_fiber_no_sync);
  // One that was left in mid-air, in a call of the shim, still has the calls of a kernel open.
  if (suspended)
    __tsan_destroy_fiber(thread);
  else
    resting().push_back(thread);
}

}  // namespace
#endif

Stack::Stack() : guard_(static_cast<std::size_t>(sysconf(_SC_PAGESIZE))) {
  void* memory = mmap(nullptr, guard_ + kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  base_ = static_cast<std::byte*>(memory);
  mprotect(base_, guard_, PROT_NONE);
}

Stack::~Stack() { munmap(base_, guard_ + kBytes); }

Fibre::Fibre(Stack& stack, void (*entry)(void*), void* argument)
    : stack_(stack), entry_(entry), argument_(argument) {
  // A fibre that was left in mid-air has left its frames' red zones behind.
  RGFAST_ASAN_ONLY(__asan_unpoison_memory_region(stack.bottom(), Stack::kBytes);)
  // Pages of another fibre hold its accesses, which are no races with this one's: new pages.
  RGFAST_TSAN_ONLY(mmap(stack.bottom(), Stack::kBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
                   thread_ = wake();)
  context_ = first_context(stack, &Fibre::begin, this);
}

Fibre::~Fibre() {
  RGFAST_TSAN_ONLY(rest(thread_, suspended_);)
  drop_context(context_);
  drop_context(host_context_);
}

void Fibre::begin(void* self) {
  auto* fibre = static_cast<Fibre*>(self);
  RGFAST_ASAN_ONLY(__sanitizer_finish_switch_fiber(nullptr, &fibre->host_bottom_, &fibre->host_bytes_);)
  RGFAST_TSAN_ONLY(__tsan_acquire(&before_all);)
  fibre->entry_(fibre->argument_);
}

void Fibre::join() { RGFAST_TSAN_ONLY(__tsan_acquire(&after_all);) }

void Fibre::resume() {
  RGFAST_ASAN_ONLY(__sanitizer_start_switch_fiber(&host_fake_stack_, stack_.bottom(), Stack::kBytes);)
  RGFAST_TSAN_ONLY(host_thread_ = __tsan_get_current_fiber();
                   __tsan_switch_to_fiber(thread_, __tsan_switch_to_fiber_no_sync);)
  rgfast_switch(&host_context_, context_);
  RGFAST_ASAN_ONLY(__sanitizer_finish_switch_fiber(host_fake_stack_, nullptr, nullptr);)
}

void Fibre::suspend() {
  RGFAST_ASAN_ONLY(__sanitizer_start_switch_fiber(&fake_stack_, host_bottom_, host_bytes_);)
  RGFAST_TSAN_ONLY(__tsan_switch_to_fiber(host_thread_, __tsan_switch_to_fiber_no_sync);)
  suspended_ = true;
  rgfast_switch(&context_, host_context_);
  suspended_ = false;
  RGFAST_ASAN_ONLY(__sanitizer_finish_switch_fiber(fake_stack_, &host_bottom_, &host_bytes_);)
}

void Fibre::leave() {
  // A null pointer tells ASan that this stack is not entered again.
  RGFAST_ASAN_ONLY(__sanitizer_start_switch_fiber(nullptr, host_bottom_, host_bytes_);)
  RGFAST_TSAN_ONLY(__tsan_switch_to_fiber(host_thread_, __tsan_switch_to_fiber_no_sync);)
  rgfast_switch(&context_, host_context_);
}

}  // namespace rgfast::shim
