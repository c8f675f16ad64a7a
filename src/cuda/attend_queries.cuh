// SPDX-License-Identifier: Apache-2.0
// The query warp: rotates and scales the queries of the CTA's segments, ahead of those who need them.
#pragma once

#include "cuda/attend_walk.cuh"
#include "cuda/device.cuh"

namespace kvarn::cuda {

// The rotation of one vector over a warp: element 32 k + lane.
template <int kHeadDim>
__device__ inline void rotate_over_warp(float (&x)[kHeadDim / 32], int lane) {
#pragma unroll
  for (int bit = 1; bit < 32; bit *= 2)
#pragma unroll
    for (float& y : x) {
      const float other = __shfl_xor_sync(~0u, y, bit);
      y = lane & bit ? other - y : y + other;
    }
  constexpr int kFirst = kHeadDim == 96 ? 64 : kHeadDim;  // 96 = 64 + 32 are rotated apart
#pragma unroll
  for (int bit = 1; bit < kFirst / 32; bit *= 2)
#pragma unroll
    for (int k = 0; k < kFirst / 32; ++k)
      if ((k & bit) == 0) {
        const float a = x[k], b = x[k + bit];
        x[k] = a + b;
        x[k + bit] = a - b;
      }
#pragma unroll
  for (int k = 0; k < kHeadDim / 32; ++k) {
    const int block = 32 * k < kFirst ? kFirst : kHeadDim - kFirst;
    x[k] *= block == 256 ? 0.0625f : block == 128 ? 0.0883883461f : block == 64 ? 0.125f : 0.176776692f;
  }
}

// queries f32 [query_slots][4 kTiles][D]; scales [query_slots][4 kTiles] {2^-e, 2^e} with |q| 2^-e <= 1.
template <class S, int kTiles>
__device__ void prepare_queries(const AttendParameters& p, const Cut& cut, float* queries, float2* scales, Barrier* full,
                                Barrier* empty, int lane) {
  constexpr int kColumns = 4 * kTiles, kEach = S::head_dim / 32;
  Place at;
  at.begin(p, cut);
  int slot = 0;
  uint32_t parity = 1;  // the first round finds empty slots
  for (bool more = cut.units > 0; more;) {
    wait(&empty[slot], parity);
    const BlockPlan& b = p.plan.blocks[at.block];
    const int first = b.first_column, columns = b.columns, row = b.row;
    float* to = queries + slot * kColumns * S::head_dim;
#pragma unroll 4
    for (int c = 0; c < kColumns; ++c) {
      float x[kEach] = {}, largest = 0;
      if (c < columns) {
        const int column = first + c;
        const int64_t start = (row + column / p.group) * p.q.token_stride +
                              (at.head * p.group + column % p.group) * p.q.head_stride;
#pragma unroll
        for (int k = 0; k < kEach; ++k) x[k] = load_element(p.q.data, p.q.dtype, start + 32 * k + lane);
        rotate_over_warp<S::head_dim>(x, lane);
      }
#pragma unroll
      for (int k = 0; k < kEach; ++k) {
        x[k] *= p.factor;
        largest = fmaxf(largest, fabsf(x[k]));
        to[c * S::head_dim + 32 * k + lane] = x[k];
      }
#pragma unroll
      for (int bit = 1; bit < 32; bit *= 2) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, bit));
      // The power of two above, within what has an inverse.
      const uint32_t exponent = min(max(__float_as_uint(largest) >> 23, 64u), 190u) + 1;
      if (lane == 0)
        scales[slot * kColumns + c] =
            make_float2(__uint_as_float((254 - exponent) << 23), __uint_as_float(exponent << 23));
    }
    arrive(&full[slot]);
    if (++slot == p.query_slots) slot = 0, parity ^= 1;
    more = at.advance(p, min(at.units - at.unit, cut.units - at.number), cut.units);
  }
}

// Rows that no request of the step owns become zeros.
template <class S>
__device__ void clear_absent(const AttendParameters& p, int lane) {
  const int query_heads = p.heads * p.group;
  for (int r = static_cast<int>(blockIdx.x); r <= p.requests; r += static_cast<int>(gridDim.x)) {
    if (r < p.requests && p.plan.requests[r].queries > 0) continue;
    const int first = max(p.query_starts[r], 0), end = r < p.requests ? p.query_starts[r + 1] : p.tokens;
    for (int row = first; row < min(end, p.tokens); ++row)
      for (int h = 0; h < query_heads; ++h)
        for (int d = lane; d < S::head_dim; d += 32)
          store_element(0.0f, p.out.data, p.out.dtype, row * p.out.token_stride + h * p.out.head_stride + d);
  }
}

}  // namespace kvarn::cuda
