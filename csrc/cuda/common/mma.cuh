// Products of small matrices by a warp: c += a b with a [m, k], b [k, n] and c [m, n] spread over the lanes
// as the PTX ISA lays them out. With g = lane / 4 and t = lane % 4:
//
//   fp64       a[2 j + h] = A[g + 8 h, t + 4 j]     b[j] = B[t + 4 j, g]     c[2 h + i] = C[g + 8 h, 2 t + i]
//   fp16, bf16 a[2 j + h] = A[g + 8 h, 2 t + 8 j + {0, 1}]     b[j] = B[2 t + 8 j + {0, 1}, g]     c as above
//
// for m = 16; m8n8k4 has h = 0 alone. All 32 lanes call. The wide fp64 shapes are one instruction from sm_90
// on (at twice the rate of the narrow one, measured on an H100) and narrow products on the same registers
// before.
#pragma once

#include "cuda/common/half.cuh"
#ifndef __CUDACC__
#include "cuda/shim/mma.hpp"
#endif

namespace rgfast::cuda {

#ifdef __CUDACC__

__device__ __forceinline__ void mma_m8n8k4(double (&c)[2], double a, double b) {
  asm volatile("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0,%1},{%2},{%3},{%0,%1};"
               : "+d"(c[0]), "+d"(c[1])
               : "d"(a), "d"(b));
}

// K / 4 steps of m8n8k4 for either half of the rows.
template <int Steps>
__device__ __forceinline__ void mma_narrow(double (&c)[4], const double (&a)[2 * Steps],
                                           const double (&b)[Steps]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    double part[2] = {c[2 * half], c[2 * half + 1]};
#pragma unroll
    for (int step = 0; step < Steps; ++step) mma_m8n8k4(part, a[2 * step + half], b[step]);
    c[2 * half] = part[0];
    c[2 * half + 1] = part[1];
  }
}

__device__ __forceinline__ void mma_m16n8k4(double (&c)[4], const double (&a)[2], const double (&b)[1]) {
#if RGFAST_SM90
  asm volatile("mma.sync.aligned.m16n8k4.row.col.f64.f64.f64.f64 {%0,%1,%2,%3},{%4,%5},{%6},{%0,%1,%2,%3};"
               : "+d"(c[0]), "+d"(c[1]), "+d"(c[2]), "+d"(c[3])
               : "d"(a[0]), "d"(a[1]), "d"(b[0]));
#else
  mma_narrow<1>(c, a, b);
#endif
}

__device__ __forceinline__ void mma_m16n8k8(double (&c)[4], const double (&a)[4], const double (&b)[2]) {
#if RGFAST_SM90
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f64.f64.f64.f64 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
      : "+d"(c[0]), "+d"(c[1]), "+d"(c[2]), "+d"(c[3])
      : "d"(a[0]), "d"(a[1]), "d"(a[2]), "d"(a[3]), "d"(b[0]), "d"(b[1]));
#else
  mma_narrow<2>(c, a, b);
#endif
}

__device__ __forceinline__ void mma_m16n8k16(double (&c)[4], const double (&a)[8], const double (&b)[4]) {
#if RGFAST_SM90
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f64.f64.f64.f64 "
      "{%0,%1,%2,%3},{%4,%5,%6,%7,%8,%9,%10,%11},{%12,%13,%14,%15},{%0,%1,%2,%3};"
      : "+d"(c[0]), "+d"(c[1]), "+d"(c[2]), "+d"(c[3])
      : "d"(a[0]), "d"(a[1]), "d"(a[2]), "d"(a[3]), "d"(a[4]), "d"(a[5]), "d"(a[6]), "d"(a[7]), "d"(b[0]),
        "d"(b[1]), "d"(b[2]), "d"(b[3]));
#else
  mma_narrow<4>(c, a, b);
#endif
}

__device__ __forceinline__ void mma_m16n8k16(float (&c)[4], const HalfPair (&a)[4], const HalfPair (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0].bits), "r"(a[1].bits), "r"(a[2].bits), "r"(a[3].bits), "r"(b[0].bits), "r"(b[1].bits));
}

__device__ __forceinline__ void mma_m16n8k16(float (&c)[4], const Bfloat16Pair (&a)[4],
                                             const Bfloat16Pair (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0].bits), "r"(a[1].bits), "r"(a[2].bits), "r"(a[3].bits), "r"(b[0].bits), "r"(b[1].bits));
}

#else

inline void mma_m8n8k4(double (&c)[2], double a, double b, RGFAST_HERE) {
  shim::multiply<shim::Wide<8, 4> >("mma_m8n8k4", {file, line}, c, &a, &b);
}
inline void mma_m16n8k4(double (&c)[4], const double (&a)[2], const double (&b)[1], RGFAST_HERE) {
  shim::multiply<shim::Wide<16, 4> >("mma_m16n8k4", {file, line}, c, a, b);
}
inline void mma_m16n8k8(double (&c)[4], const double (&a)[4], const double (&b)[2], RGFAST_HERE) {
  shim::multiply<shim::Wide<16, 8> >("mma_m16n8k8", {file, line}, c, a, b);
}
inline void mma_m16n8k16(double (&c)[4], const double (&a)[8], const double (&b)[4], RGFAST_HERE) {
  shim::multiply<shim::Wide<16, 16> >("mma_m16n8k16", {file, line}, c, a, b);
}
inline void mma_m16n8k16(float (&c)[4], const HalfPair (&a)[4], const HalfPair (&b)[2], RGFAST_HERE) {
  shim::multiply<shim::Narrow<HalfPair> >("mma_m16n8k16 (fp16)", {file, line}, c, a, b);
}
inline void mma_m16n8k16(float (&c)[4], const Bfloat16Pair (&a)[4], const Bfloat16Pair (&b)[2], RGFAST_HERE) {
  shim::multiply<shim::Narrow<Bfloat16Pair> >("mma_m16n8k16 (bf16)", {file, line}, c, a, b);
}

#endif

}  // namespace rgfast::cuda
