// Which instruction set runs. Kernels are compiled once per set (foreach_target.hpp) and picked at run time.
#pragma once

#include <string>
#include <vector>

#if defined(__x86_64__)
#define RGFAST_X86 1
#else
#define RGFAST_X86 0
#endif
#if defined(__aarch64__) && defined(__ARM_NEON)
#define RGFAST_ARM 1
#else
#define RGFAST_ARM 0
#endif

namespace rgfast {

enum class Isa : int { baseline = 0, neon = 1, avx2 = 2, avx512 = 3 };

const char* isa_name(Isa isa);

// In ascending order of preference. Available ones are compiled in, supported by the processor and enabled
// by the operating system, which is asked through cpuid and xgetbv: no kernel runs to find out.
std::vector<Isa> compiled_isas();
std::vector<Isa> available_isas();

// The forced set, else the one RGFAST_ISA names, else the best available.
// Throws std::invalid_argument where RGFAST_ISA names none that can run here.
Isa active_isa();

// Forces a set for the whole process; an empty name returns the choice to RGFAST_ISA.
// Throws std::invalid_argument for a set that cannot run here.
void set_isa(const std::string& name);
std::string forced_isa();  // what set_isa was last given

// One function pointer per set; null where the set is not compiled.
template <class Fn>
struct IsaTable {
  Fn baseline;
  Fn neon;
  Fn avx2;
  Fn avx512;

  Fn active() const {
    switch (active_isa()) {
      case Isa::avx512:
        return avx512;
      case Isa::avx2:
        return avx2;
      case Isa::neon:
        return neon;
      case Isa::baseline:
        break;
    }
    return baseline;
  }
};

}  // namespace rgfast

#if RGFAST_X86
#define RGFAST_ISA_TABLE(fn) {&baseline::fn, nullptr, &avx2::fn, &avx512::fn}
#elif RGFAST_ARM
#define RGFAST_ISA_TABLE(fn) {&baseline::fn, &neon::fn, nullptr, nullptr}
#else
#define RGFAST_ISA_TABLE(fn) {&baseline::fn, nullptr, nullptr, nullptr}
#endif
