// SPDX-License-Identifier: Apache-2.0
// The few PTX instructions that fragment_order.cu needs, and the place of everything in a k4v2_g128 record at D = 128.
// A warp's lane is 4 g + i: of an MMA's left operand it holds rows g and g + 8, of the right one column g, of the
// result rows g and g + 8 in columns 2 i and 2 i + 1.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

inline constexpr int kTokens = 128, kChannels = 128, kColumns = 8;
inline constexpr int kKScale = 8192, kKToken = 8704, kVCodes = 8960, kVChannel = 13056, kVScale = 13312;
inline constexpr int kRecordBytes = 13824;

// result = left (16 x 16 fp16) * right (16 x 8 fp16) + carry, fp32
__device__ inline void mma_f16(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                               uint32_t b1) {
  float d[4];  // apart from c: a tied operand makes ptxas copy the initial zeros
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
  for (int i = 0; i < 4; ++i) c[i] = d[i];
}

// The same of 16 x 32 unsigned and 32 x 8 signed bytes. The sums start at the bits of 1.5 * 2^23, so that they are read
// back as floats without a conversion while they stay below 2^22.
inline constexpr int kMagicBits = 0x4B400000;
inline constexpr float kMagic = 12582912.f;

__device__ inline void mma_s8(int (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                              uint32_t b1) {
  int d[4];
  asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
      : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1), "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]));
  for (int i = 0; i < 4; ++i) c[i] = d[i];
}

// Transposes an 8 x 8 matrix of 16-bit values that lies over the warp.
__device__ inline uint32_t transpose(uint32_t x) {
  uint32_t y;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

// Bytes 1 and 3 of a word as two 16-bit numbers; any choice of 16-bit halves of two words.
__device__ inline uint32_t odd_bytes(uint32_t w) { return __byte_perm(w, 0, 0x4341); }
inline constexpr uint32_t kLowHalves = 0x5410, kHighHalves = 0x7632;

__device__ inline half2 as_half2(uint32_t x) { return *reinterpret_cast<half2*>(&x); }
__device__ inline uint32_t as_bits(half2 x) { return *reinterpret_cast<uint32_t*>(&x); }
__device__ inline uint32_t multiply(uint32_t a, uint32_t b) { return as_bits(__hmul2(as_half2(a), as_half2(b))); }

template <class T>
__device__ inline T load(const uint8_t* at) {
  return *reinterpret_cast<const T*>(at);
}

__device__ inline void widen(uint32_t x, float& low, float& high) {
  const float2 f = __half22float2(as_half2(x));
  low = f.x;
  high = f.y;
}
