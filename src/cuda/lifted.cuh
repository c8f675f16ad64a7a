// SPDX-License-Identifier: Apache-2.0
// Codes as numbers just above 1: a code q is held as t = 1 + q * 2^-23, the mantissa of t is q. Adding 1 to q in units
// of 2^-23 is what rounds it to an integer, half to even; the clamp from below is the multiplication's saturation, and
// fma(t, a, -a) = a * q * 2^-23, rounded once, saves the subtraction of the 1. A grid's s is held as s * 2^23, so that
// all powers of two cancel: nothing comes near the ends of binary32, and every bit is that of the plain formula.
#pragma once

#include "cuda/encode_real.cuh"

namespace kvarn::cuda {

inline constexpr float kLift = 8388608.0f;  // 2^23

// 1 / max(s, 1e-10) in units of 2^-23, of a lifted s.
__device__ inline Real lifted_inverse(Real s) { return reciprocal(larger(s, 1e-10f * kLift)); }

// f16(s) of a lifted s, lifted.
__device__ inline Real lifted_f16(Real s) { return f16(s * Real(1.0f / kLift)) * Real(kLift); }

// code(x) of the grid (z, inverse), lifted. NaN saturates to 0, as in the specification.
template <int kMost>
__device__ inline Real lifted_code(Real x, Real z, Real inverse) {
  constexpr float kTop = 1.0f + static_cast<float>(kMost) / kLift;
  float steps;
  asm("mul.rn.sat.f32 %0, %1, %2;" : "=f"(steps) : "f"((x - z).value), "f"(inverse.value));
  return smaller(Real(steps) + Real(1.0f), kTop);
}
// q * a, in units of 2^-23; of a lifted s for a, q * s.
__device__ inline Real times_code(Real t, Real a) { return __fmaf_rn(t.value, a.value, -a.value); }
__device__ inline uint16_t code_bits(Real t) { return static_cast<uint16_t>(__float_as_uint(t.value) & 0xffffu); }

}  // namespace kvarn::cuda
