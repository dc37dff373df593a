// How much tests of kernels try.
#pragma once

#include <cstdlib>

namespace rgfast::test {

// TSan takes ten times as long, and sees a race in the first launch that has it.
#ifdef RGFAST_TSAN
inline constexpr bool kFew = true;
#else
inline constexpr bool kFew = false;
#endif

// `make gate` sets RGFAST_GATE.
inline bool everything() { return !kFew && std::getenv("RGFAST_GATE") != nullptr; }

}  // namespace rgfast::test
