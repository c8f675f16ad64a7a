// SPDX-License-Identifier: Apache-2.0
// The rotation of specification section 2 on the device. A vector lies over the lanes of a part of a warp, 8 adjacent
// elements a lane: loads and stores are 16 bytes and coalesced, three stages of the butterfly stay inside a lane, the
// others are exchanges.
#pragma once

#include "cuda/device.cuh"

namespace kvarn::cuda {

inline constexpr int kChunk = 8;  // elements of a lane

template <int kHeadDim>
inline constexpr int kVectorLanes = kHeadDim <= 64 ? 8 : (kHeadDim <= 128 ? 16 : 32);
// Has the lane a chunk? At head_dim 80 and 96 some have none.
template <int kHeadDim>
__device__ inline bool has_chunk(int lane) {
  return kVectorLanes<kHeadDim> * kChunk == kHeadDim || lane < kHeadDim / kChunk;
}

// A row of the caller, addressed once: element strides, and whether every vector starts at a multiple of 16 bytes.
struct Rows {
  const void* data;
  kvarn_dtype dtype;
  int64_t token_stride, head_stride;
  bool aligned;
};
inline bool vectors_are_aligned(const void* data, kvarn_dtype dtype, int64_t token_stride, int64_t head_stride) {
  const int64_t bytes = dtype == KVARN_FLOAT32 ? 4 : 2;
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && token_stride * bytes % 16 == 0 && head_stride * bytes % 16 == 0;
}
inline Rows make_rows(const kvarn_rows& r) {
  return {r.data, r.dtype, r.token_stride, r.head_stride,
          vectors_are_aligned(r.data, r.dtype, r.token_stride, r.head_stride)};
}

// 16 bits each to binary32.
__device__ inline void widen_chunk(uint4 bits, kvarn_dtype dtype, float (&x)[kChunk]) {
  const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (dtype == KVARN_FLOAT16) {
      const float2 pair = __half22float2(*reinterpret_cast<const __half2*>(&words[i]));
      x[2 * i] = pair.x, x[2 * i + 1] = pair.y;
    } else {
      x[2 * i] = __uint_as_float(words[i] << 16), x[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    }
  }
}

// Elements first .. first + 7.
__device__ inline void load_chunk(const Rows& rows, int64_t first, float (&x)[kChunk]) {
  if (!rows.aligned) {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) x[i] = load_element(rows.data, rows.dtype, first + i);
  } else if (rows.dtype == KVARN_FLOAT32) {
    const float4* from = reinterpret_cast<const float4*>(static_cast<const float*>(rows.data) + first);
    const float4 a = from[0], b = from[1];
    x[0] = a.x, x[1] = a.y, x[2] = a.z, x[3] = a.w, x[4] = b.x, x[5] = b.y, x[6] = b.z, x[7] = b.w;
  } else {
    widen_chunk(*reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(rows.data) + first), rows.dtype, x);
  }
}

// The largest magnitude, NaN if there is one.
__device__ inline float magnitude(const float (&x)[kChunk]) {
  float most = 0;
#pragma unroll
  for (int i = 0; i < kChunk; ++i) asm("max.NaN.f32 %0, %0, %1;" : "+f"(most) : "f"(fabsf(x[i])));
  return most;
}
// Below this, rotation keeps every element within f16's range.
inline constexpr float kTame = 2048;

// NaN to 0, magnitudes above 65504 to 65504. Returns how many elements it replaced.
__device__ inline int sanitize(float (&x)[kChunk]) {
  int replaced = 0;
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    if (fabsf(x[i]) <= 65504.0f) continue;
    x[i] = x[i] > 0 ? 65504.0f : x[i] < 0 ? -65504.0f : 0.0f;
    ++replaced;
  }
  return replaced;
}

// 1 / sqrt(block), rounded to binary32.
constexpr float rotation_scale(int block) {
  return block == 16    ? .25f
         : block == 32  ? static_cast<float>(0.17677669529663688)
         : block == 64  ? .125f
         : block == 128 ? static_cast<float>(0.08838834764831845)
                        : .0625f;
}

// All 32 lanes of the warp take part, those without a chunk with any numbers. The blocks of head_dim 80 and 96 lie in
// lanes 0 .. 7 and 8 and up.
template <int kHeadDim>
__device__ inline void rotate(float (&x)[kChunk], int lane) {
  constexpr int kFirst = kHeadDim >= 256 ? 256 : kHeadDim >= 128 ? 128 : 64, kRest = kHeadDim - kFirst;
  static_assert(kRest == 0 || kRest == 16 || kRest == 32);
#pragma unroll
  for (int h = 1; h < kChunk; h *= 2)
#pragma unroll
    for (int i = 0; i < kChunk; ++i)
      if ((i & h) == 0) {
        const float a = x[i], b = x[i + h];
        x[i] = __fadd_rn(a, b), x[i + h] = __fsub_rn(a, b);
      }
#pragma unroll
  for (int h = 1; h * kChunk < kFirst; h *= 2) {
    const bool mine = kRest == 0 || h * kChunk < kRest || lane < kFirst / kChunk;
    const float sign = (lane & h) != 0 ? -1.0f : 1.0f;  // the upper element becomes lower - upper
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      const float other = __shfl_xor_sync(0xffffffffu, x[i], h), y = __fmaf_rn(x[i], sign, other);  // rounds once
      x[i] = mine ? y : x[i];
    }
  }
  const float scale = lane < kFirst / kChunk ? rotation_scale(kFirst) : rotation_scale(kRest);
#pragma unroll
  for (int i = 0; i < kChunk; ++i) x[i] = __fmul_rn(x[i], scale);
}

// A chunk as the pages hold it: f16, saturating if need be, zeros without a sign.
__device__ inline uint4 raw_chunk(float (&x)[kChunk], bool saturate) {
  if (saturate) {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) x[i] = fminf(fmaxf(x[i], -65504.0f), 65504.0f);
  }
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const __half2 rounded = __float22half2_rn(make_float2(x[2 * i], x[2 * i + 1]));
    // Adding +0 takes a zero's sign away and changes nothing else.
    const __half2 pair = __hadd2_rn(rounded, __float2half2_rn(0.0f));
    words[i] = *reinterpret_cast<const uint32_t*>(&pair);
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

}  // namespace kvarn::cuda
