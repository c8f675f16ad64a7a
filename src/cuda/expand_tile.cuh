// SPDX-License-Identifier: Apache-2.0
// One (tile, KV head) from its record, or from raw tokens, to rows of the outputs.
//
// A thread owns 8 adjacent channels, so that a token's row is written in runs of 16 bytes a lane, adjacent lanes
// adjacent; a CTA takes as many heads as make a run of 256 bytes or more. Codes come straight from global memory, 16
// bytes a load: what lanes read twice, because their codes are fields of the same bytes, the L1 cache serves. Nothing
// goes through shared memory.
#pragma once

#include "cuda/device.cuh"
#include "cuda/expand.hpp"
#include "cuda/expand_codes.cuh"
#include "format/raw.hpp"

namespace kvarn::cuda {

template <class Shape>
struct ExpandGrid {
  static constexpr int heads = Shape::head_dim < 128 ? 2 : 1;                            // that a CTA expands at a time
  static constexpr int octets = heads * Shape::head_dim / 8;                             // threads along channels
  static constexpr int rows = Shape::head_dim == 96 || Shape::head_dim == 256 ? 8 : 16;  // threads along tokens
  static constexpr int threads = octets * rows;
  static constexpr int ctas_per_sm = 1024 / threads;  // 64 registers a thread
};

// How 8 channels are stored. Halves: any of the 16-bit types, 16-byte aligned.
struct Halves {
  __device__ static void store(uint8_t* to, kvarn_dtype dtype, const float (&x)[8]) {
    uint32_t w[4];
    for (int i = 0; i < 4; ++i) {
      const __half2 half = __floats2half2_rn(x[2 * i], x[2 * i + 1]);
      const __nv_bfloat162 bfloat = __floats2bfloat162_rn(x[2 * i], x[2 * i + 1]);
      w[i] = dtype == KVARN_FLOAT16 ? *reinterpret_cast<const uint32_t*>(&half)
                                    : *reinterpret_cast<const uint32_t*>(&bfloat);
    }
    // Streamed past the L2 cache: 1 % faster, and steadier where more CTAs run.
    __stcs(reinterpret_cast<uint4*>(to), make_uint4(w[0], w[1], w[2], w[3]));
  }
};

// Any dtype and any alignment.
struct Elements {
  __device__ static void store(uint8_t* to, kvarn_dtype dtype, const float (&x)[8]) {
    if (dtype == KVARN_FLOAT32 && reinterpret_cast<uintptr_t>(to) % 16 == 0) {
      reinterpret_cast<float4*>(to)[0] = make_float4(x[0], x[1], x[2], x[3]);
      reinterpret_cast<float4*>(to)[1] = make_float4(x[4], x[5], x[6], x[7]);
    } else {
      for (int i = 0; i < 8; ++i) store_element(x[i], to, dtype, i);
    }
  }
};

template <int Count>
__device__ void load_halves(const uint8_t* from, float (&x)[Count]) {
  static_assert(Count == 4 || Count == 8);
  uint32_t w[Count / 2];
  if constexpr (Count == 8) {
    const uint4 q = *reinterpret_cast<const uint4*>(from);
    w[0] = q.x, w[1] = q.y, w[2] = q.z, w[3] = q.w;
  } else {
    const uint2 q = *reinterpret_cast<const uint2*>(from);
    w[0] = q.x, w[1] = q.y;
  }
  for (int i = 0; i < Count / 2; ++i) {
    const float2 pair = __half22float2(*reinterpret_cast<const __half2*>(&w[i]));
    x[2 * i] = pair.x, x[2 * i + 1] = pair.y;
  }
}

__device__ inline uint32_t word_of(const uint4& q, int i) { return i == 0 ? q.x : i == 1 ? q.y : i == 2 ? q.z : q.w; }

// Where a thread stands in the CTA.
template <class Shape>
struct Lane {
  int head = static_cast<int>(threadIdx.x) % ExpandGrid<Shape>::octets / (Shape::head_dim / 8);
  int octet = static_cast<int>(threadIdx.x) % (Shape::head_dim / 8);
  int row = static_cast<int>(threadIdx.x) / ExpandGrid<Shape>::octets;

  __device__ uint8_t* at(const Output& out, int64_t token, int32_t head) const {
    const int element = out.dtype == KVARN_FLOAT32 ? 4 : 2;
    return out.data + token * out.token_stride + head * out.head_stride + octet * 8 * element;
  }
};

// K: rows are tokens. A thread takes 4 adjacent tokens of each of its groups of 16.
template <class Shape, class Store>
__device__ void expand_k(const uint8_t* record, const Output& out, int64_t token, int32_t head) {
  constexpr int kGroups = Shape::page_tokens / (4 * ExpandGrid<Shape>::rows);
  const Lane<Shape> lane;
  const int quad = lane.row % 4, first_group = lane.row / 4 * kGroups;
  float s[8], z[8];
  load_halves(record + Shape::layout.k_scale + 16 * lane.octet, s);
  load_halves(record + Shape::layout.k_zero + 16 * lane.octet, z);
  uint8_t* rows = lane.at(out, token, head);
#pragma unroll 1  // unrolled, an SM holds 768 threads: 2 % faster on much work, 9 % slower on 64 tiles
  for (int i = 0; i < kGroups; ++i) {
    const int first = 16 * (first_group + i) + 4 * quad;
    const uint8_t* matrix = record + Shape::layout.k_codes;
    const uint4 low = codes<Shape::k_planes>(matrix, first_group + i, quad, 2 * lane.octet),
                high = codes<Shape::k_planes>(matrix, first_group + i, quad, 2 * lane.octet + 1);
    float t[4];
    load_halves(record + Shape::layout.k_token + 2 * first, t);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      float x[8];
#pragma unroll
      for (int c = 0; c < 8; ++c) x[c] = dequantize(code_at(word_of(c < 4 ? low : high, j), c % 4), s[c], z[c], t[j]);
      Store::store(rows + (first + j) * out.token_stride, out.dtype, x);
    }
  }
}

// V: rows are channels. A thread takes 4 adjacent tokens, and again every 4 kRows tokens.
template <class Shape, class Store>
__device__ void expand_v(const uint8_t* record, const Output& out, int64_t token, int32_t head) {
  constexpr int kRows = ExpandGrid<Shape>::rows, kParts = Shape::page_tokens / (4 * kRows);
  const Lane<Shape> lane;
  float channel[8];
  load_halves(record + Shape::layout.v_channel + 16 * lane.octet, channel);
  uint8_t* rows = lane.at(out, token, head);
#pragma unroll 1
  for (int i = 0; i < kParts; ++i) {
    const int group = lane.row + kRows * i, first = 4 * group;
    const uint8_t* matrix = record + Shape::layout.v_codes;
    const uint4 low = codes<Shape::v_planes>(matrix, lane.octet / 2, lane.octet % 2 * 2, group),
                high = codes<Shape::v_planes>(matrix, lane.octet / 2, lane.octet % 2 * 2 + 1, group);
    float s[4], z[4];
    load_halves(record + Shape::layout.v_scale + 2 * first, s);
    load_halves(record + Shape::layout.v_zero + 2 * first, z);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      float x[8];
#pragma unroll
      for (int c = 0; c < 8; ++c)
        x[c] = dequantize(code_at(word_of(c < 4 ? low : high, c % 4), j), s[j], z[j], channel[c]);
      Store::store(rows + (first + j) * out.token_stride, out.dtype, x);
    }
  }
}

// Page `index`, inside the pool whatever the block table says.
__device__ inline const uint8_t* page_at(const kvarn_pages& pages, int32_t index) {
  return pages.data + min(max(int64_t{index}, int64_t{0}), pages.count - 1) * pages.stride;
}

// The raw tokens 0 .. count-1 of a tile, zeros behind them. k_of(o): the K vector of token o; its V lies v_distance
// bytes further.
template <class Shape, class Store, class VectorOf>
__device__ void expand_raw(VectorOf k_of, int64_t v_distance, int count, const Output& k, const Output& v,
                           int64_t token, int32_t head) {
  const Lane<Shape> lane;
  uint8_t *k_rows = lane.at(k, token, head), *v_rows = lane.at(v, token, head);
#pragma unroll 2
  for (int o = lane.row; o < Shape::page_tokens; o += ExpandGrid<Shape>::rows) {
    float x[8] = {}, y[8] = {};
    if (o < count) {
      const uint8_t* from = k_of(o) + 16 * lane.octet;
      load_halves(from, x);
      load_halves(from + v_distance, y);
    }
    Store::store(k_rows + o * k.token_stride, k.dtype, x);
    Store::store(v_rows + o * v.token_stride, v.dtype, y);
  }
}

}  // namespace kvarn::cuda
