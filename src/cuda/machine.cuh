// SPDX-License-Identifier: Apache-2.0
// The few PTX instructions that attention is made of. A warp's lane is 4 g + i: of an MMA's left operand it holds rows
// g and g + 8, of the right one column g, of the result rows g and g + 8 in columns 2 i and 2 i + 1.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

namespace kvarn::cuda {

// c += left (16 x 32 unsigned bytes) * right (32 x 8 bytes: signed for queries, unsigned for probabilities); exact.
template <bool kSigned>
__device__ inline void mma_bytes(int (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                 uint32_t b1) {
  int d[4];
  if constexpr (kSigned)
    asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
        : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1), "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]));
  else
    asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.u8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
        : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1), "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]));
  for (int i = 0; i < 4; ++i) c[i] = d[i];
}

// c += left (16 x 16 f16) * right (16 x 8 f16), sums in binary32.
__device__ inline void mma_halves(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Transposes an 8 x 8 matrix of 16-bit values that lies over the warp.
__device__ inline uint32_t transpose(uint32_t x) {
  uint32_t y;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Four 8 x 8 matrices of 16-bit values; lane l names a row (16 bytes) of matrix l / 8.
template <bool kTransposed>
__device__ inline void load_matrices(uint32_t (&a)[4], const void* row) {
  if constexpr (kTransposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
                 : "r"(shared_address(row))
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
                 : "r"(shared_address(row))
                 : "memory");
}

__device__ inline float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 2^d for an integer d <= 0, 0 below -126.
__device__ inline float power_of_two(float d) {
  const float shifted = fmaxf(d, -127.0f) + (8388608.0f + 127.0f);
  return __uint_as_float(__float_as_uint(shifted) << 23);
}

// The biased exponent of the power of two above x >= 0, within what has an inverse; and the power of such an exponent.
__device__ inline uint32_t exponent_above(float x) { return min(max(__float_as_uint(x) >> 23, 64u), 190u) + 1; }
__device__ inline float power_between(uint32_t exponent) { return __uint_as_float(exponent << 23); }

__device__ inline __half2 halves_of(uint32_t bits) {
  __half2 h;
  memcpy(&h, &bits, 4);
  return h;
}
__device__ inline float2 widen(uint32_t bits) { return __half22float2(halves_of(bits)); }

template <class T>
__device__ inline T load_as(const void* at) {
  return *static_cast<const T*>(at);
}

}  // namespace kvarn::cuda
