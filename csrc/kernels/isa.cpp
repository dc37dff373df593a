#include "rgfast/isa.hpp"

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <stdexcept>

#if RGFAST_X86
#include <cpuid.h>
#endif

namespace rgfast {
namespace {

constexpr int kNotForced = -1;
std::atomic<int> forced{kNotForced};

#if RGFAST_X86
std::uint64_t enabled_state() {
  std::uint32_t low = 0;
  std::uint32_t high = 0;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<std::uint64_t>(high) << 32) | low;
}

bool has(unsigned flags, int bit) { return ((flags >> bit) & 1U) != 0; }

Isa detect() {
  unsigned a = 0;
  unsigned b = 0;
  unsigned c = 0;
  unsigned d = 0;
  if (__get_cpuid(1, &a, &b, &c, &d) == 0) return Isa::baseline;
  const bool osxsave = has(c, 27);
  const bool first = has(c, 28) && has(c, 12) && has(c, 29);  // AVX, FMA, F16C
  if (!osxsave || !first) return Isa::baseline;
  constexpr std::uint64_t kYmm = 0x6;
  constexpr std::uint64_t kZmm = 0xE6;
  const std::uint64_t state = enabled_state();
  if ((state & kYmm) != kYmm || __get_cpuid_count(7, 0, &a, &b, &c, &d) == 0) return Isa::baseline;
  if (!(has(b, 5) && has(b, 3) && has(b, 8))) return Isa::baseline;        // AVX2, BMI, BMI2
  const bool wide = has(b, 16) && has(b, 17) && has(b, 30) && has(b, 31);  // AVX-512 F, DQ, BW, VL
  return wide && (state & kZmm) == kZmm ? Isa::avx512 : Isa::avx2;
}
#else
Isa detect() { return RGFAST_ARM ? Isa::neon : Isa::baseline; }
#endif

std::string names(const std::vector<Isa>& isas) {
  std::string text;
  for (const Isa isa : isas) text += (text.empty() ? "" : ", ") + std::string(isa_name(isa));
  return text;
}

Isa named(const std::string& name, const char* argument) {
  for (const Isa isa : available_isas())
    if (name == isa_name(isa)) return isa;
  throw std::invalid_argument(std::string(argument) + " must be one of " + names(available_isas()) +
                              " on this machine, got '" + name + "'");
}

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::neon:
      return "neon";
    case Isa::avx2:
      return "avx2";
    case Isa::avx512:
      return "avx512";
    case Isa::baseline:
      break;
  }
  return "baseline";
}

std::vector<Isa> compiled_isas() {
#if RGFAST_X86
  return {Isa::baseline, Isa::avx2, Isa::avx512};
#elif RGFAST_ARM
  return {Isa::baseline, Isa::neon};
#else
  return {Isa::baseline};
#endif
}

std::vector<Isa> available_isas() {
  static const Isa best = detect();
  std::vector<Isa> found;
  for (const Isa isa : compiled_isas())
    if (isa <= best) found.push_back(isa);
  return found;
}

Isa active_isa() {
  const int set = forced.load(std::memory_order_relaxed);
  if (set != kNotForced) return static_cast<Isa>(set);
  // Read once: getenv is not safe beside a setenv on another thread.
  static const std::string asked = [] {
    const char* value = std::getenv("RGFAST_ISA");
    return std::string(value == nullptr ? "" : value);
  }();
  if (!asked.empty()) return named(asked, "RGFAST_ISA");
  static const Isa best = available_isas().back();
  return best;
}

void set_isa(const std::string& name) {
  forced.store(name.empty() ? kNotForced : static_cast<int>(named(name, "isa")), std::memory_order_relaxed);
}

std::string forced_isa() {
  const int set = forced.load(std::memory_order_relaxed);
  return set == kNotForced ? "" : isa_name(static_cast<Isa>(set));
}

}  // namespace rgfast
