// The sanitizers' interfaces, or nothing in a build without them.
#pragma once

#if defined(__SANITIZE_ADDRESS__)
#define RGFAST_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define RGFAST_ASAN 1
#endif
#endif

#ifdef RGFAST_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define RGFAST_ASAN_ONLY(...) __VA_ARGS__
#else
#define RGFAST_ASAN_ONLY(...)
#endif

// The shim itself is compiled without -fsanitize=thread, which would define a macro, so CMake names it:
// accesses of the shim to a thread's values belong to the hardware and must not be seen.
#ifdef RGFAST_TSAN
#include <sanitizer/tsan_interface.h>
#define RGFAST_TSAN_ONLY(...) __VA_ARGS__
extern "C" void __tsan_ignore_thread_begin();
extern "C" void __tsan_ignore_thread_end();
#else
#define RGFAST_TSAN_ONLY(...)
#endif

namespace rgfast::shim {

// While one of these lives TSan sees no access to memory: what the shim does is no kernel's doing, and it
// runs instrumented code all the same (malloc, free, templates that a kernel's source has made too).
class Unseen {
 public:
  Unseen() { RGFAST_TSAN_ONLY(__tsan_ignore_thread_begin();) }
  ~Unseen() { RGFAST_TSAN_ONLY(__tsan_ignore_thread_end();) }
  Unseen(const Unseen&) = delete;
  Unseen& operator=(const Unseen&) = delete;
};

}  // namespace rgfast::shim
