// Includes RGFAST_TARGET_FILE once per instruction set, each time inside that set's target region.
//
//   #define RGFAST_TARGET_FILE "kernels/<op>-inl.hpp"
//   #include "rgfast/foreach_target.hpp"
//
// The file wraps itself in `namespace RGFAST_NS { ... }` inside rgfast::, has no include guard, includes
// nothing but other -inl files of its kind, and holds no objects at namespace scope. Anything it needs from
// the standard library is included before, outside the region: a template of the standard library first
// instantiated with wider instructions could be the copy that the linker keeps for everybody. RGFAST_SIMD
// is the vector width in bytes and RGFAST_FMA says whether there are fused multiply-adds.

#ifndef RGFAST_TARGET_FILE
#error "define RGFAST_TARGET_FILE before including foreach_target.hpp"
#endif

#include "rgfast/isa.hpp"

#if RGFAST_X86
// GCC 12 takes the deliberately undefined operand inside its own AVX-512 header for a mistake.
#pragma GCC diagnostic push
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>
#pragma GCC diagnostic pop
#elif RGFAST_ARM
#include <arm_neon.h>
#endif

#define RGFAST_TARGET_BASELINE 0
#define RGFAST_TARGET_NEON 1
#define RGFAST_TARGET_AVX2 2
#define RGFAST_TARGET_AVX512 3

#define RGFAST_NS baseline
#define RGFAST_TARGET RGFAST_TARGET_BASELINE
#define RGFAST_SIMD 16
#define RGFAST_FMA 0
#include RGFAST_TARGET_FILE
#undef RGFAST_NS
#undef RGFAST_TARGET
#undef RGFAST_SIMD
#undef RGFAST_FMA

#if RGFAST_ARM
#define RGFAST_NS neon
#define RGFAST_TARGET RGFAST_TARGET_NEON
#define RGFAST_SIMD 16
#define RGFAST_FMA 1
#include RGFAST_TARGET_FILE
#undef RGFAST_NS
#undef RGFAST_TARGET
#undef RGFAST_SIMD
#undef RGFAST_FMA
#endif

#if RGFAST_X86
#define RGFAST_NS avx2
#define RGFAST_TARGET RGFAST_TARGET_AVX2
#define RGFAST_SIMD 32
#define RGFAST_FMA 1
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx,avx2,fma,f16c,bmi,bmi2"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx,avx2,fma,f16c,bmi,bmi2")
#endif
#include RGFAST_TARGET_FILE
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef RGFAST_NS
#undef RGFAST_TARGET
#undef RGFAST_SIMD
#undef RGFAST_FMA

#define RGFAST_NS avx512
#define RGFAST_TARGET RGFAST_TARGET_AVX512
#define RGFAST_SIMD 64
#define RGFAST_FMA 1
#if defined(__clang__)
#pragma clang attribute push(                                                                 \
    __attribute__((target("avx,avx2,fma,f16c,bmi,bmi2,avx512f,avx512bw,avx512dq,avx512vl"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx,avx2,fma,f16c,bmi,bmi2,avx512f,avx512bw,avx512dq,avx512vl")
#endif
#include RGFAST_TARGET_FILE
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef RGFAST_NS
#undef RGFAST_TARGET
#undef RGFAST_SIMD
#undef RGFAST_FMA
#endif

#undef RGFAST_TARGET_BASELINE
#undef RGFAST_TARGET_NEON
#undef RGFAST_TARGET_AVX2
#undef RGFAST_TARGET_AVX512
#undef RGFAST_TARGET_FILE
