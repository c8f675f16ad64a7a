// SPDX-License-Identifier: Apache-2.0
// binary32 as the specification counts: every operation rounds once, to nearest even. The compiler may not fuse a
// multiplication and an addition of these, whatever the flags of the file.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

namespace kvarn::cuda {

struct Real {
  float value;
  Real() = default;
  __device__ constexpr Real(float x) : value(x) {}
};

__device__ inline Real operator+(Real a, Real b) { return __fadd_rn(a.value, b.value); }
__device__ inline Real operator-(Real a, Real b) { return __fsub_rn(a.value, b.value); }
__device__ inline Real operator*(Real a, Real b) { return __fmul_rn(a.value, b.value); }
__device__ inline Real operator/(Real a, Real b) { return __fdiv_rn(a.value, b.value); }
__device__ inline bool operator<(Real a, Real b) { return a.value < b.value; }
__device__ inline bool operator>(Real a, Real b) { return a.value > b.value; }
__device__ inline bool operator<=(Real a, Real b) { return a.value <= b.value; }

// With one NaN these give the other operand, as the specification's clamps do.
__device__ inline Real smaller(Real a, Real b) { return fminf(a.value, b.value); }
__device__ inline Real larger(Real a, Real b) { return fmaxf(a.value, b.value); }
__device__ inline Real clamp(Real x, Real low, Real high) { return smaller(larger(x, low), high); }
__device__ inline Real square_root(Real x) { return __fsqrt_rn(x.value); }

// 1 / x for x between 2^-100 and 2^99: there __frcp_rn does the same, behind a branch for what is special elsewhere.
__device__ inline Real reciprocal(Real x) {
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x.value));
  return __fmaf_rn(r, __fmaf_rn(-x.value, r, 1.0f), r);
}

__device__ inline __half to_f16(Real x) { return __float2half_rn(clamp(x, -65504.0f, 65504.0f).value); }
__device__ inline Real f16(Real x) { return __half2float(to_f16(x)); }

// x in [0, 2^22): adding 1.5 * 2^23 leaves the integer, rounded half to even, in the low bits of the word.
inline constexpr float kRounder = 12582912.0f;
__device__ inline uint16_t rounded_bits(Real x) {
  return static_cast<uint16_t>(__float_as_uint((x + Real(kRounder)).value) & 0xffffu);
}

// Division by a number that many are divided by: 5 operations instead of 9, and no branch. The quotient after the first
// correction is one of the two neighbours of the true one; with a correctly rounded reciprocal the second correction
// then rounds correctly (Markstein). Nothing may come near overflow or 2^-100.
struct Divisor {
  Real divisor, inverse;
  __device__ explicit Divisor(Real x) : divisor(x), inverse(reciprocal(x)) {}
  __device__ Divisor(Real x, Real its_reciprocal) : divisor(x), inverse(its_reciprocal) {}
};
__device__ inline Real operator/(Real a, const Divisor& b) {
  float q = __fmul_rn(a.value, b.inverse.value);
  q = __fmaf_rn(__fmaf_rn(-b.divisor.value, q, a.value), b.inverse.value, q);
  return __fmaf_rn(__fmaf_rn(-b.divisor.value, q, a.value), b.inverse.value, q);
}
// a / b without a branch, for b between 2^-100 and 2^99, a 0 or from 2^-120 to 2^100, the quotient 0 or from 2^-124 to
// 2^100: lifted by 2^24, nothing on the way is subnormal.
__device__ inline Real quotient(Real a, Real b) { return a * Real(0x1p24f) / Divisor(b) * Real(0x1p-24f); }

// Several sums side by side.
template <int kCount>
struct Sums {
  Real of[kCount];
};
template <int kCount>
__device__ inline Sums<kCount> operator+(const Sums<kCount>& a, const Sums<kCount>& b) {
  Sums<kCount> out;
#pragma unroll
  for (int i = 0; i < kCount; ++i) out.of[i] = a.of[i] + b.of[i];
  return out;
}

// SUM of specification section 5 over a warp: term(i) of lane l is element l + 32 i. All lanes get the result.
template <int kElements, class Term>
__device__ inline Real warp_sum(const Term& term) {
  Real sum = term(0);
#pragma unroll
  for (int i = 1; i < kElements / 32; ++i) sum = sum + term(i);
#pragma unroll
  for (int o = 16; o >= 1; o /= 2) sum = sum + Real(__shfl_xor_sync(0xffffffffu, sum.value, o));
  return sum;
}

}  // namespace kvarn::cuda
